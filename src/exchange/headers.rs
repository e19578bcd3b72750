//! A header block: names and values as they came, in order, in one buffer.
//!
//! No name and no value holds a line break or a NUL, which would end its line: what is added with one has a space there
//! instead. So a block can be written to a connection as it is.
//!
//! Built for the proxy path: parsing copies the block once, changes append, nothing allocates once the
//! buffers have grown to the traffic's size. Names keep their case and match without it (RFC 9110, 5.1).

use std::borrow::Cow;

/// One field; offsets into the block's buffer.
#[derive(Clone, Copy, Debug)]
struct Field {
    name: Span,
    value: Span,
    /// It stands in the buffer as the line that it becomes: `Name: value\r\n`.
    whole: bool,
}

#[derive(Clone, Copy, Debug)]
struct Span {
    at: u32,
    len: u32,
}

/// An ordered, case-preserving multimap of header fields. Reusable: `clear` keeps its memory.
#[derive(Clone, Debug, Default)]
pub struct Headers {
    bytes: Vec<u8>,
    fields: Vec<Field>,
    /// Bit n: a name of n bytes (modulo 64) was added. Most look-ups are for fields that are not there, and end here.
    lengths: u64,
}

impl Headers {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn clear(&mut self) {
        self.bytes.clear();
        self.fields.clear();
        self.lengths = 0;
    }

    pub fn len(&self) -> usize {
        self.fields.len()
    }

    pub fn is_empty(&self) -> bool {
        self.fields.is_empty()
    }

    /// The first value of `name`.
    pub fn get(&self, name: impl AsRef<[u8]>) -> Option<&[u8]> {
        let name = name.as_ref();
        if !self.may_have(name) {
            return None;
        }
        self.fields.iter().find(|f| self.is(f, name)).map(|f| self.slice(f.value))
    }

    /// All values of `name`, in order.
    pub fn get_all<'a>(&'a self, name: &'a [u8]) -> impl Iterator<Item = &'a [u8]> {
        let fields = if self.may_have(name) { &self.fields[..] } else { &[] };
        fields.iter().filter(move |f| self.is(f, name)).map(|f| self.slice(f.value))
    }

    /// The nth value of `name`, and whether more follow.
    /// Inlined at each of its few places: an answer of three words otherwise comes by way of the stack, where the processor waits for it.
    #[inline(always)]
    pub fn nth(&self, name: &[u8], n: usize) -> Option<(&[u8], bool)> {
        if !self.may_have(name) {
            return None;
        }
        let mut left = n;
        let mut found = None;
        for field in self.fields.iter().filter(|f| self.is(f, name)) {
            match (found, left) {
                (Some(value), _) => return Some((self.slice(value), true)),
                (None, 0) => found = Some(field.value),
                _ => left -= 1,
            }
        }
        found.map(|value| (self.slice(value), false))
    }

    pub fn contains(&self, name: impl AsRef<[u8]>) -> bool {
        self.get(name).is_some()
    }

    /// The fields whose names have so many bytes.
    pub fn of_length(&self, len: usize) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.fields
            .iter()
            .filter(move |f| f.name.len as usize == len)
            .map(|f| (self.slice(f.name), self.slice(f.value)))
    }

    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.fields.iter().map(|f| (self.slice(f.name), self.slice(f.value)))
    }

    /// Adds a field at the end, also when one of that name exists.
    pub fn append(&mut self, name: impl AsRef<[u8]>, value: impl AsRef<[u8]>) {
        let field = self.store(name.as_ref(), value.as_ref());
        self.fields.push(field);
    }

    /// Adds the fields of a block that was made by `append`s: one copy for all.
    pub fn append_block(&mut self, block: &Headers) {
        let base = self.bytes.len() as u32;
        let moved = |s: Span| Span { at: s.at.wrapping_add(base), len: s.len };
        self.bytes.extend_from_slice(&block.bytes);
        self.lengths |= block.lengths;
        self.fields.extend(block.fields.iter().map(|f| Field { name: moved(f.name), value: moved(f.value), ..*f }));
    }

    /// Makes `value` the only value of `name`; an existing field keeps its place and the new name's case.
    pub fn set(&mut self, name: impl AsRef<[u8]>, value: impl AsRef<[u8]>) {
        let (name, value) = (name.as_ref(), value.as_ref());
        match has_break(name) || has_break(value) {
            true => self.set_sound(&cleaned(name), &cleaned(value)),
            false => self.set_sound(name, value),
        }
    }

    /// As `set`, for a name and a value that were looked at: neither holds CR, LF or NUL.
    pub fn set_sound(&mut self, name: &[u8], value: &[u8]) {
        let first = if self.may_have(name) { self.fields.iter().position(|f| self.is(f, name)) } else { None };
        if let Some(first) = first
            && self.fields[first + 1..].iter().any(|f| self.is(f, name))
        {
            self.remove_from(first + 1, name);
        }
        let field = self.store_sound(name, value);
        match first {
            Some(first) => self.fields[first] = field,
            None => self.fields.push(field),
        }
    }

    /// Removes every field of that name; says whether there was one.
    pub fn remove(&mut self, name: impl AsRef<[u8]>) -> bool {
        self.may_have(name.as_ref()) && self.remove_from(0, name.as_ref())
    }

    /// Keeps the fields for which `keep(name, value)` holds.
    pub fn retain(&mut self, mut keep: impl FnMut(&[u8], &[u8]) -> bool) {
        let bytes = &self.bytes;
        self.fields.retain(|f| keep(span_of(bytes, f.name), span_of(bytes, f.value)));
    }

    /// Appends `Name: value\r\n` for every field for which `keep(name, value)` holds; how many. Lines that stand one behind
    /// the other are one copy.
    #[inline]
    pub fn write_to(&self, out: &mut Vec<u8>, mut keep: impl FnMut(&[u8], &[u8]) -> bool) -> usize {
        let (mut start, mut end, mut lines) = (0, 0, 0);
        for f in &self.fields {
            let (name, value) = (self.slice(f.name), self.slice(f.value));
            if !keep(name, value) {
                continue;
            }
            lines += 1;
            if f.whole && f.name.at as usize == end {
                end = f.end();
                continue;
            }
            out.extend_from_slice(&self.bytes[start..end]);
            (start, end) = if f.whole { (f.name.at as usize, f.end()) } else { (0, 0) };
            if !f.whole {
                write_line(out, name, value);
            }
        }
        out.extend_from_slice(&self.bytes[start..end]);
        lines
    }

    /// Bytes held, changed fields' old text included: what a bound on a block counts.
    pub fn byte_len(&self) -> usize {
        self.bytes.len()
    }

    /// Replaces the block by fields that lie in `block`: one copy for all. A parser has found them there, so they are sound.
    pub fn adopt<'a>(&mut self, block: &'a [u8], fields: impl Iterator<Item = (&'a [u8], &'a [u8])>) {
        self.clear();
        self.bytes.extend_from_slice(block);
        let base = block.as_ptr() as usize;
        let span = |s: &[u8]| Span { at: (s.as_ptr() as usize).wrapping_sub(base) as u32, len: s.len() as u32 };
        for (name, value) in fields {
            self.lengths |= bit(name);
            let mut field = Field { name: span(name), value: span(value), whole: false };
            field.whole = field.is_whole(block);
            self.fields.push(field);
        }
        debug_assert!(
            self.fields.iter().all(|f| (f.value.at + f.value.len) as usize <= self.bytes.len() || f.value.len == 0)
        );
    }

    /// Leaves out what no field is any more, where that is most of the block.
    fn compact(&mut self) {
        let lines = self.fields.iter().map(|f| (f.name.len + f.value.len) as usize + 4);
        if lines.sum::<usize>() > self.bytes.len() / 2 {
            return;
        }
        let old = std::mem::take(&mut self.bytes);
        for f in &mut self.fields {
            let (name, value) = (span_of(&old, f.name), span_of(&old, f.value));
            let at = self.bytes.len() as u32;
            write_line(&mut self.bytes, name, value);
            (f.name.at, f.value.at, f.whole) = (at, at + f.name.len + 2, true);
        }
    }

    fn remove_from(&mut self, start: usize, name: &[u8]) -> bool {
        let before = self.fields.len();
        let mut at = 0;
        let bytes = &self.bytes;
        self.fields.retain(|f| {
            at += 1;
            at <= start || !same_name(span_of(bytes, f.name), name)
        });
        before != self.fields.len()
    }

    #[inline]
    fn is(&self, f: &Field, name: &[u8]) -> bool {
        f.name.len as usize == name.len() && same_name(self.slice(f.name), name)
    }

    fn slice(&self, s: Span) -> &[u8] {
        span_of(&self.bytes, s)
    }

    /// False: there is surely no field whose name has so many bytes.
    pub fn may_have_length(&self, len: usize) -> bool {
        self.lengths & (1 << (len & 63)) != 0
    }

    /// False: there is surely no such field.
    fn may_have(&self, name: &[u8]) -> bool {
        self.may_have_length(name.len())
    }

    /// Stores a field as the line that it will be.
    fn store(&mut self, name: &[u8], value: &[u8]) -> Field {
        if has_break(name) || has_break(value) {
            return self.store(&cleaned(name), &cleaned(value));
        }
        self.store_sound(name, value)
    }

    fn store_sound(&mut self, name: &[u8], value: &[u8]) -> Field {
        debug_assert!(!has_break(name) && !has_break(value));
        if self.bytes.len() > COMPACT_AT {
            self.compact();
        }
        self.lengths |= bit(name);
        let at = self.bytes.len() as u32;
        write_line(&mut self.bytes, name, value);
        let value_at = at + name.len() as u32 + 2;
        let (name, value) = (name.len() as u32, value.len() as u32);
        Field { name: Span { at, len: name }, value: Span { at: value_at, len: value }, whole: true }
    }
}

impl Field {
    /// Behind the line end of a whole one.
    fn end(&self) -> usize {
        (self.value.at + self.value.len) as usize + 2
    }

    fn is_whole(&self, block: &[u8]) -> bool {
        let middle = self.name.at.wrapping_add(self.name.len) as usize;
        let (value, end) = (self.value.at as usize, self.value.at.wrapping_add(self.value.len) as usize);
        value == middle + 2
            && block.get(middle..value) == Some(b": ")
            && block.get(end..).is_some_and(|rest| rest.starts_with(b"\r\n"))
    }
}

/// Appends `Name: value\r\n`.
#[inline]
fn write_line(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    append_all(out, [name, b": ", value, b"\r\n"]);
}

/// Appends the pieces with one look at the room that there is: heads are put together of dozens.
#[inline(always)]
pub fn append_all<const N: usize>(out: &mut Vec<u8>, pieces: [&[u8]; N]) {
    let len: usize = pieces.iter().map(|p| p.len()).sum();
    out.reserve(len);
    let mut at = out.len();
    for piece in pieces {
        // SAFETY: there is room for all pieces, which cannot lie in a buffer that is borrowed for writing.
        unsafe { std::ptr::copy_nonoverlapping(piece.as_ptr(), out.as_mut_ptr().add(at), piece.len()) };
        at += piece.len();
    }
    // SAFETY: all bytes up to `at` were written, now or before.
    unsafe { out.set_len(at) };
}

/// Whether the text holds what would end a line, or be read by somebody as its end: CR, LF or NUL.
#[inline]
pub fn has_break(text: &[u8]) -> bool {
    // Eight bytes at a time: is there a control byte at all?
    let low = |word: u64| word.wrapping_sub(0x10 * EACH) & !word & (0x80 * EACH) != 0;
    let any = match text.last_chunk() {
        Some(last) => low(u64::from_le_bytes(*last)) || text.chunks_exact(8).any(|word| low(short_word(word))),
        // Bytes that are not there read as zero.
        None => text.iter().any(|b| *b < 0x10),
    };
    any && text.iter().any(|b| matches!(b, b'\r' | b'\n' | 0))
}

#[cold]
fn cleaned(text: &[u8]) -> Vec<u8> {
    text.iter().map(|b| if matches!(b, b'\r' | b'\n' | 0) { b' ' } else { *b }).collect()
}

/// A longer block is looked through for what was changed or removed: a script that lives long may change a field for ever.
const COMPACT_AT: usize = 64 << 10;

/// One in each byte of a word.
const EACH: u64 = 0x0101_0101_0101_0101;

/// Whether two names are the same but for the case of their letters (RFC 9110, 5.1). Eight bytes at a time: a request
/// compares names some fifty times.
#[inline]
pub fn same_name(a: &[u8], b: &[u8]) -> bool {
    if a.len() != b.len() {
        return false;
    }
    match (a.last_chunk(), b.last_chunk()) {
        // The last words overlap those before them.
        (Some(x), Some(y)) => {
            let words = a.chunks_exact(8).zip(b.chunks_exact(8));
            same_word(u64::from_le_bytes(*x), u64::from_le_bytes(*y))
                && words.into_iter().all(|(a, b)| same_short(a, b))
        }
        _ => same_short(a, b),
    }
}

/// A name in lower case. `room` is for those that fit: nearly all.
#[inline]
pub fn lower<'a>(name: &[u8], room: &'a mut [u8; 64]) -> Cow<'a, [u8]> {
    let Some(out) = room.get_mut(..name.len()) else { return name.to_ascii_lowercase().into() };
    let (words, rest) = name.as_chunks();
    let (lowered, last) = out.as_chunks_mut();
    for (word, lowered) in words.iter().zip(lowered) {
        *lowered = lower_word(u64::from_le_bytes(*word)).to_le_bytes();
    }
    for (byte, lowered) in rest.iter().zip(last) {
        *lowered = byte.to_ascii_lowercase();
    }
    Cow::Borrowed(out)
}

#[inline]
fn lower_word(word: u64) -> u64 {
    word | (letters(word | (0x20 * EACH)) >> 2)
}

/// For up to eight bytes, as many in both.
#[inline]
fn same_short(a: &[u8], b: &[u8]) -> bool {
    same_word(short_word(a), short_word(b))
}

/// Up to eight bytes as one word, some of them twice.
#[inline]
pub fn short_word(s: &[u8]) -> u64 {
    if let (Some(start), Some(end)) = (s.first_chunk(), s.last_chunk()) {
        return u64::from(u32::from_le_bytes(*start)) | u64::from(u32::from_le_bytes(*end)) << 32;
    }
    match *s {
        [] => 0,
        [a] => a.into(),
        [a, b] => u64::from(a) | u64::from(b) << 8,
        [a, b, c, ..] => u64::from(a) | u64::from(b) << 8 | u64::from(c) << 16,
    }
}

#[inline]
fn same_word(a: u64, b: u64) -> bool {
    // Mostly they are written alike.
    a == b || (a ^ b) & !(letters(a | (0x20 * EACH)) >> 2) == 0
}

/// The high bit of each byte that is a letter, when they are all in lower case.
#[inline]
fn letters(lower: u64) -> u64 {
    let low = lower & (0x7f * EACH);
    (low + 0x1f * EACH) & !(low + 0x05 * EACH) & !lower & (0x80 * EACH)
}

fn bit(name: &[u8]) -> u64 {
    1 << (name.len() & 63)
}

/// An empty span may point anywhere, so it must not be sliced.
fn span_of(bytes: &[u8], s: Span) -> &[u8] {
    if s.len == 0 { &[] } else { &bytes[s.at as usize..(s.at + s.len) as usize] }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Headers {
        let mut h = Headers::new();
        h.append("Host", "a");
        h.append("X-A", "1");
        h.append("x-a", "2");
        h
    }

    #[test]
    fn finds_without_case_and_keeps_case() {
        let h = sample();
        assert_eq!(h.get("HOST"), Some(&b"a"[..]));
        assert_eq!(h.get_all(b"X-a").count(), 2);
        assert_eq!(h.get("absent"), None);
        let mut out = Vec::new();
        assert_eq!(h.write_to(&mut out, |_, _| true), 3);
        assert_eq!(out, b"Host: a\r\nX-A: 1\r\nx-a: 2\r\n");
    }

    #[test]
    fn names_are_the_same_but_for_the_case_of_letters() {
        let all: Vec<u8> = (0..=255).collect();
        for n in 0..40 {
            let name: Vec<u8> = (0..n).map(|i| b"aZ-_09~^"[i % 8]).collect();
            assert!(same_name(&name, &name.to_ascii_uppercase()), "{n}");
            for at in 0..n {
                for b in &all {
                    let mut other = name.clone();
                    other[at] = *b;
                    assert_eq!(same_name(&name, &other), name.eq_ignore_ascii_case(&other), "{n} {at} {b}");
                }
            }
            assert!(!same_name(&name, &[&name[..], b"a"].concat()));
        }
    }

    #[test]
    fn letters_are_lowered_and_nothing_else() {
        let all: Vec<u8> = (0..=255).collect();
        for n in (0..80).chain([256]) {
            for start in [0, 60, 120, 250 - 60.min(n)] {
                let name: Vec<u8> = all.iter().cycle().skip(start).take(n).copied().collect();
                assert_eq!(*lower(&name, &mut [0; 64]), name.to_ascii_lowercase(), "{start} {n}");
            }
        }
    }

    #[test]
    fn a_line_break_does_not_get_in() {
        let mut h = Headers::new();
        h.append("X-A", "a\r\nSet-Cookie: b");
        h.set("X\n", "\0");
        h.append("X-B", "tab\tand \u{e9}");
        let all: Vec<_> = h.iter().collect();
        assert_eq!(
            all,
            [(&b"X-A"[..], &b"a  Set-Cookie: b"[..]), (b"X ", b" "), (b"X-B", "tab\tand \u{e9}".as_bytes())]
        );
        for n in 0..40 {
            for at in 0..n {
                for b in 0..=255 {
                    let mut text = vec![b'a'; n];
                    text[at] = b;
                    assert_eq!(has_break(&text), matches!(b, b'\r' | b'\n' | 0), "{n} {at} {b}");
                }
            }
        }
    }

    #[test]
    fn a_field_that_is_changed_for_ever_takes_no_more_room() {
        let mut h = sample();
        for i in 0..100_000 {
            h.set("X-B", i.to_string());
            h.set_sound(b"X-C", b"a value of some length");
            assert!(h.byte_len() <= COMPACT_AT + 100, "{i}: {}", h.byte_len());
        }
        let all: Vec<_> = h.iter().map(|(n, v)| [n, b"=", v].concat()).collect();
        assert_eq!(all.join(&b' '), b"Host=a X-A=1 x-a=2 X-B=99999 X-C=a value of some length");
        let mut out = Vec::new();
        assert_eq!(h.write_to(&mut out, |name, _| name != b"Host"), 4);
        assert_eq!(out, b"X-A: 1\r\nx-a: 2\r\nX-B: 99999\r\nX-C: a value of some length\r\n");
        // What is all in use stays.
        let long = "v".repeat(COMPACT_AT);
        (0..3).for_each(|_| h.append("L", &long));
        assert_eq!((h.byte_len() > 3 * COMPACT_AT, h.get_all(b"L").count()), (true, 3));
    }

    #[test]
    fn a_block_is_added_as_its_fields_are() {
        let (mut h, mut block) = (sample(), Headers::new());
        block.append("X-B", "3");
        block.append("Empty", "");
        h.append_block(&block);
        h.append_block(&Headers::new());
        let all: Vec<_> = h.iter().map(|(n, v)| [n, b"=", v].concat()).collect();
        assert_eq!(all.join(&b' '), b"Host=a X-A=1 x-a=2 X-B=3 Empty=");
        assert_eq!((h.get("x-b"), h.get("empty"), h.get("none")), (Some(&b"3"[..]), Some(&b""[..]), None));
        let mut out = Vec::new();
        assert_eq!(h.write_to(&mut out, |name, _| name != b"X-A"), 4);
        assert_eq!(out, b"Host: a\r\nx-a: 2\r\nX-B: 3\r\nEmpty: \r\n");
    }

    #[test]
    fn set_replaces_all_and_keeps_the_place() {
        let mut h = sample();
        h.set("X-a", "3");
        h.append("Z", "");
        let all: Vec<_> = h.iter().collect();
        assert_eq!(all, [(&b"Host"[..], &b"a"[..]), (b"X-a", b"3"), (b"Z", b"")]);
    }

    #[test]
    fn remove_takes_every_value() {
        let mut h = sample();
        assert!(h.remove("x-A"));
        assert!(!h.remove("x-A"));
        assert_eq!(h.len(), 1);
    }

    #[test]
    fn adopts_a_parsed_block_with_one_copy() {
        let block = b"Host: a\r\nEmpty:\r\n";
        let mut h = sample();
        h.adopt(block, [(&block[0..4], &block[6..7]), (&block[9..14], &b""[..])].into_iter());
        assert_eq!(h.iter().collect::<Vec<_>>(), [(&b"Host"[..], &b"a"[..]), (b"Empty", b"")]);
    }

    #[test]
    fn writes_what_is_kept_wherever_it_stands() {
        let block = b"A: 1\r\nB:2\r\nC: 3\r\nD: 4\r\nE: 5  \r\nF: 6\r\nG:\r\n";
        let field = |at: usize, value: usize, len| (&block[at..at + 1], &block[value..value + len]);
        let fields =
            [field(0, 3, 1), field(6, 8, 1), field(11, 14, 1), field(17, 20, 1), field(23, 26, 1), field(31, 34, 1)];
        let mut h = Headers::new();
        h.adopt(block, fields.into_iter().chain([(&block[37..38], &b""[..])]));
        h.append("H", "8");
        h.append("I", "9");
        let written = |dropped: &[u8]| {
            let mut out = b"> ".to_vec();
            let lines = h.write_to(&mut out, |name, _| !dropped.contains(&name[0]));
            (String::from_utf8(out).unwrap(), lines)
        };
        for dropped in [&b""[..], b"A", b"C", b"ABCDEFGHI", b"BEG", b"ADFI", b"H", b"CDEFG"] {
            let kept = h.iter().filter(|(name, _)| !dropped.contains(&name[0]));
            let lines: Vec<_> = kept.map(|(n, v)| format!("{}: {}\r\n", n.escape_ascii(), v.escape_ascii())).collect();
            assert_eq!(written(dropped), (format!("> {}", lines.concat()), lines.len()));
        }
    }
}
