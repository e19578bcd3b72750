//! A header block: names and values as they came, in order, in one buffer.
//!
//! Built for the proxy path: parsing copies the block once, changes append, nothing allocates once the
//! buffers have grown to the traffic's size. Names keep their case and match without it (RFC 9110, 5.1).

/// One field; offsets into the block's buffer.
#[derive(Clone, Copy, Debug)]
struct Field {
    name: Span,
    value: Span,
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
        self.fields.iter().filter(move |f| self.is(f, name)).map(|f| self.slice(f.value))
    }

    pub fn contains(&self, name: impl AsRef<[u8]>) -> bool {
        self.get(name).is_some()
    }

    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.fields.iter().map(|f| (self.slice(f.name), self.slice(f.value)))
    }

    /// Names, values, and where it stands in one piece the whole line with its CRLF, which is then one copy to write.
    pub fn lines(&self) -> impl Iterator<Item = (&[u8], &[u8], Option<&[u8]>)> {
        self.fields.iter().map(|f| (self.slice(f.name), self.slice(f.value), self.line(f)))
    }

    /// Adds a field at the end, also when one of that name exists.
    pub fn append(&mut self, name: impl AsRef<[u8]>, value: impl AsRef<[u8]>) {
        let field = self.store(name.as_ref(), value.as_ref());
        self.fields.push(field);
    }

    /// Makes `value` the only value of `name`; an existing field keeps its place and the new name's case.
    pub fn set(&mut self, name: impl AsRef<[u8]>, value: impl AsRef<[u8]>) {
        let (name, value) = (name.as_ref(), value.as_ref());
        let first = if self.may_have(name) { self.fields.iter().position(|f| self.is(f, name)) } else { None };
        let Some(first) = first else {
            return self.append(name, value);
        };
        self.remove_from(first + 1, name);
        self.fields[first] = self.store(name, value);
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

    /// Appends `Name: value\r\n` for every field.
    pub fn write_to(&self, out: &mut Vec<u8>) {
        for (name, value, line) in self.lines() {
            write_line(out, name, value, line);
        }
    }

    /// Bytes held, changed fields' old text included: what a bound on a block counts.
    pub fn byte_len(&self) -> usize {
        self.bytes.len()
    }

    /// Replaces the block by fields that lie in `block` (what a parser found there): one copy for all.
    pub fn adopt<'a>(&mut self, block: &'a [u8], fields: impl Iterator<Item = (&'a [u8], &'a [u8])>) {
        self.clear();
        self.bytes.extend_from_slice(block);
        let base = block.as_ptr() as usize;
        let span = |s: &[u8]| Span { at: (s.as_ptr() as usize).wrapping_sub(base) as u32, len: s.len() as u32 };
        for (name, value) in fields {
            self.lengths |= bit(name);
            self.fields.push(Field { name: span(name), value: span(value) });
        }
        debug_assert!(
            self.fields.iter().all(|f| (f.value.at + f.value.len) as usize <= self.bytes.len() || f.value.len == 0)
        );
    }

    fn remove_from(&mut self, start: usize, name: &[u8]) -> bool {
        let before = self.fields.len();
        let mut at = 0;
        let bytes = &self.bytes;
        self.fields.retain(|f| {
            at += 1;
            at <= start || !span_of(bytes, f.name).eq_ignore_ascii_case(name)
        });
        before != self.fields.len()
    }

    fn is(&self, f: &Field, name: &[u8]) -> bool {
        f.name.len as usize == name.len() && self.slice(f.name).eq_ignore_ascii_case(name)
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

    fn line(&self, f: &Field) -> Option<&[u8]> {
        let (start, middle) = (f.name.at as usize, (f.name.at + f.name.len) as usize);
        let (value, end) = (f.value.at as usize, f.value.at as usize + f.value.len as usize);
        let whole = value == middle + 2
            && self.bytes.get(middle..value) == Some(b": ")
            && self.bytes.get(end..end + 2) == Some(b"\r\n");
        whole.then(|| &self.bytes[start..end + 2])
    }

    /// Stores a field as the line that it will be.
    fn store(&mut self, name: &[u8], value: &[u8]) -> Field {
        self.lengths |= bit(name);
        self.bytes.reserve(name.len() + value.len() + 4);
        let at = self.bytes.len() as u32;
        write_line(&mut self.bytes, name, value, None);
        let value_at = at + name.len() as u32 + 2;
        Field { name: Span { at, len: name.len() as u32 }, value: Span { at: value_at, len: value.len() as u32 } }
    }
}

/// Appends `Name: value\r\n`; `line`: the same in one piece.
#[inline]
pub fn write_line(out: &mut Vec<u8>, name: &[u8], value: &[u8], line: Option<&[u8]>) {
    match line {
        Some(line) => out.extend_from_slice(line),
        None => {
            out.extend_from_slice(name);
            out.extend_from_slice(b": ");
            out.extend_from_slice(value);
            out.extend_from_slice(b"\r\n");
        }
    }
}

/// Whether a head of so many lines holds the bytes of their ends and no others: no field brought one, nor a NUL.
pub fn is_sound(head: &[u8], lines: usize) -> bool {
    // Pieces that a byte can count, in a form that compiles to vector instructions.
    let ends = |piece: &[u8]| piece.iter().fold(0u8, |n, b| n + u8::from((*b == b'\n') | (*b == b'\r') | (*b == 0)));
    head.chunks(128).map(|piece| usize::from(ends(piece))).sum::<usize>() == 2 * lines
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
        h.write_to(&mut out);
        assert_eq!(out, b"Host: a\r\nX-A: 1\r\nx-a: 2\r\n");
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
}
