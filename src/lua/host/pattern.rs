//! Lua patterns (Lua 5.1 manual, 5.4.1) whose work can be cut off.
//!
//! LuaJIT matches a pattern inside one C call, where no hook runs: `("x"):rep(50):find(("x*"):rep(50) .. "y")` would hold its
//! worker for ever. This matcher asks the watchdog now and then. Uploaded functions get it under the names of the
//! string library (lua/moongate/pattern.lua); what it finds is what LuaJIT's own finds, and a test compares the two.

use std::{cell::Cell, ffi::c_int};

use smallvec::SmallVec;

use super::Answer;
use crate::{
    error::Result,
    lua::{
        api::{Api, Phases, Raise, Stack},
        limits,
    },
};

pub(super) fn register(api: &mut Api) -> Result<()> {
    api.func(
        "native.pattern.find",
        Phases::ANY,
        "find(text, pattern, from, plain, anchors) -> first, last, captures… | nil: the first match at or behind byte `from`, \
         counted from 0. `plain`: the pattern is a text; nil: it is one when it has no sign. `anchors`: a `^` ties it to `from`.",
        find,
    )
}

/// Captures of a pattern, as in LuaJIT.
const MAX_CAPTURES: usize = 32;
/// Matches inside of matches (one per capture and quantifier): LuaJIT's own bound, which protects the stack.
const MAX_DEPTH: u32 = 200;
/// Bytes and pieces of a pattern between two looks at the watchdog: some hundred microseconds.
const LOOK_EVERY: usize = 1 << 16;

/// What a text is made of: bytes here, characters for `lua-utf8`.
pub(super) trait Unit: Copy + PartialEq + PartialOrd {
    /// What stands before and behind a text.
    const NONE: Self;

    /// The byte that a sign of a pattern would be; 0xff for what is no sign.
    fn sign(self) -> u8;
    fn in_class(self, class: Self) -> bool;
    fn push(text: &[Self], s: &Stack);
}

impl Unit for u8 {
    const NONE: u8 = 0;

    fn sign(self) -> u8 {
        self
    }

    fn in_class(self, class: u8) -> bool {
        in_class(self, class)
    }

    fn push(text: &[u8], s: &Stack) {
        s.push_bytes(text);
    }
}

fn find(s: &Stack) -> Answer {
    let (text, pattern) = (s.arg_bytes(1)?, s.arg_bytes(2)?);
    let from = s.arg_int(3)?.max(0) as usize;
    let anchors = s.boolean(5);
    let plain = s.boolean(4) || (s.is_nil(4) && !pattern.iter().any(|b| b"^$*+?.([%-".contains(b)));
    if from > text.len() {
        return Ok(s.push_nil());
    }
    if plain {
        return Ok(match memchr::memmem::find(&text[from..], pattern) {
            Some(at) => push_span(s, from + at, from + at + pattern.len()),
            None => s.push_nil(),
        });
    }
    first_match(s, text, pattern, from, anchors)
}

/// Pushes where the first match at or behind `from` is, and its captures; nil when there is none.
pub(super) fn first_match<T: Unit>(s: &Stack, text: &[T], pattern: &[T], from: usize, anchors: bool) -> Answer {
    let anchored = anchors && pattern.first().is_some_and(|u| u.sign() == b'^');
    let pattern = if anchored { &pattern[1..] } else { pattern };
    let mut m = Matcher { text, pattern, captures: SmallVec::new(), depth: 0, work: Cell::new(0) };
    for start in from..=text.len() {
        m.captures.clear();
        if let Some(end) = m.matches(start, 0)? {
            let n = push_span(s, start, end);
            return m.push_captures(s).map(|captures| n + captures);
        }
        if anchored {
            break;
        }
    }
    Ok(s.push_nil())
}

/// First and last unit, counted from 1.
pub(super) fn push_span(s: &Stack, start: usize, end: usize) -> c_int {
    s.push_number((start + 1) as f64) + s.push_number(end as f64)
}

struct Matcher<'a, T> {
    text: &'a [T],
    pattern: &'a [T],
    captures: SmallVec<[Capture; 4]>,
    depth: u32,
    /// Done since the last look at the watchdog.
    work: Cell<usize>,
}

#[derive(Clone, Copy)]
struct Capture {
    start: usize,
    end: End,
}

#[derive(Clone, Copy, PartialEq)]
enum End {
    /// Its parenthesis is not closed yet.
    Open,
    At(usize),
    /// `()`: the place itself.
    Position,
}

type Matched = Result<Option<usize>, Raise>;

impl<T: Unit> Matcher<'_, T> {
    /// The sign at `p` of the pattern.
    fn sign(&self, p: usize) -> Option<u8> {
        self.pattern.get(p).map(|u| u.sign())
    }

    /// Where a match of `pattern[p..]` at `text[at..]` ends.
    fn matches(&mut self, at: usize, p: usize) -> Matched {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err("pattern too complex".into());
        }
        let end = self.run(at, p);
        self.depth -= 1;
        end
    }

    fn run(&mut self, mut at: usize, mut p: usize) -> Matched {
        loop {
            self.charge(1)?;
            let (Some(b), next) = (self.sign(p), self.sign(p + 1)) else { return Ok(Some(at)) };
            match (b, next) {
                (b'(', Some(b')')) => return self.open(at, p + 2, End::Position),
                (b'(', _) => return self.open(at, p + 1, End::Open),
                (b')', _) => return self.close(at, p + 1),
                (b'$', None) => return Ok((at == self.text.len()).then_some(at)),
                (b'%', Some(b'b')) => match self.balanced(at, p + 2)? {
                    Some(end) => (at, p) = (end, p + 4),
                    None => return Ok(None),
                },
                (b'%', Some(b'f')) => match self.frontier(at, p + 2)? {
                    Some(end) => p = end,
                    None => return Ok(None),
                },
                (b'%', Some(digit @ b'0'..=b'9')) => match self.back_reference(at, digit)? {
                    Some(end) => (at, p) = (end, p + 2),
                    None => return Ok(None),
                },
                _ => {
                    let end = self.class_end(p)?;
                    self.charge(end - p)?;
                    let here = self.single(at, p, end);
                    match self.sign(end) {
                        Some(b'?') => {
                            if here && let Some(found) = self.matches(at + 1, end + 1)? {
                                return Ok(Some(found));
                            }
                            p = end + 1;
                        }
                        Some(b'*') => return self.most(at, p, end),
                        Some(b'+') => return if here { self.most(at + 1, p, end) } else { Ok(None) },
                        Some(b'-') => return self.least(at, p, end),
                        _ if here => (at, p) = (at + 1, end),
                        _ => return Ok(None),
                    }
                }
            }
        }
    }

    /// So many bytes were looked at.
    fn charge(&self, n: usize) -> Result<(), Raise> {
        let work = self.work.get() + n;
        if work < LOOK_EVERY {
            self.work.set(work);
            return Ok(());
        }
        self.work.set(0);
        limits::check()
    }

    /// As many as there are, then fewer.
    fn most(&mut self, at: usize, p: usize, end: usize) -> Matched {
        let mut n = 0;
        while self.single(at + n, p, end) {
            self.charge(end - p)?;
            n += 1;
        }
        loop {
            if let Some(found) = self.matches(at + n, end + 1)? {
                return Ok(Some(found));
            }
            if n == 0 {
                return Ok(None);
            }
            n -= 1;
        }
    }

    /// As few as possible, then more.
    fn least(&mut self, mut at: usize, p: usize, end: usize) -> Matched {
        loop {
            if let Some(found) = self.matches(at, end + 1)? {
                return Ok(Some(found));
            }
            if !self.single(at, p, end) {
                return Ok(None);
            }
            at += 1;
        }
    }

    fn open(&mut self, at: usize, p: usize, end: End) -> Matched {
        if self.captures.len() >= MAX_CAPTURES {
            return Err("too many captures".into());
        }
        self.captures.push(Capture { start: at, end });
        let known = self.captures.len();
        let found = self.matches(at, p)?;
        if found.is_none() {
            self.captures.truncate(known - 1);
        }
        Ok(found)
    }

    fn close(&mut self, at: usize, p: usize) -> Matched {
        let open = self.captures.iter().rposition(|c| c.end == End::Open).ok_or("invalid pattern capture")?;
        self.captures[open].end = End::At(at);
        let found = self.matches(at, p)?;
        if found.is_none() {
            self.captures[open].end = End::Open;
        }
        Ok(found)
    }

    /// `%bxy`: from an x to its y.
    fn balanced(&mut self, at: usize, p: usize) -> Matched {
        let (Some(&open), Some(&close)) = (self.pattern.get(p), self.pattern.get(p + 1)) else {
            return Err("unbalanced pattern".into());
        };
        if self.text.get(at) != Some(&open) {
            return Ok(None);
        }
        let (mut level, mut at) = (1, at + 1);
        for piece in self.text[at..].chunks(LOOK_EVERY / 4) {
            for (n, b) in piece.iter().enumerate() {
                if *b == close {
                    level -= 1;
                    if level == 0 {
                        self.charge(n)?;
                        return Ok(Some(at + n + 1));
                    }
                } else if *b == open {
                    level += 1;
                }
            }
            self.charge(piece.len())?;
            at += piece.len();
        }
        Ok(None)
    }

    /// `%f[set]`: between a byte outside of the set and one inside. Where the set ends in the pattern.
    fn frontier(&mut self, at: usize, p: usize) -> Matched {
        if self.sign(p) != Some(b'[') {
            return Err("missing '[' after '%f' in pattern".into());
        }
        let end = self.class_end(p)?;
        let before = at.checked_sub(1).map_or(T::NONE, |before| self.text[before]);
        let here = self.text.get(at).copied().unwrap_or(T::NONE);
        Ok((!self.in_set(before, p, end - 1) && self.in_set(here, p, end - 1)).then_some(end))
    }

    fn back_reference(&mut self, at: usize, digit: u8) -> Matched {
        let capture = usize::from(digit).checked_sub(usize::from(b'1')).and_then(|n| self.captures.get(n));
        let (start, end) = match capture {
            Some(Capture { start, end: End::At(end) }) => (*start, *end),
            Some(Capture { end: End::Position, .. }) => return Ok(None),
            _ => return Err("invalid capture index".into()),
        };
        let wanted = &self.text[start..end];
        self.charge(wanted.len())?;
        Ok(self.text[at..].starts_with(wanted).then_some(at + wanted.len()))
    }

    /// Behind the class that starts at `p`.
    fn class_end(&self, p: usize) -> Result<usize, Raise> {
        let mut at = p + 1;
        match self.pattern[p].sign() {
            b'%' if at >= self.pattern.len() => Err("malformed pattern (ends with '%')".into()),
            b'%' => Ok(at + 1),
            b'[' => {
                if self.sign(at) == Some(b'^') {
                    at += 1;
                }
                // The first byte is of the set even when it is a bracket.
                loop {
                    let b = self.sign(at).ok_or("malformed pattern (missing ']')")?;
                    at += 1;
                    if b == b'%' && at < self.pattern.len() {
                        at += 1;
                    }
                    if self.sign(at) == Some(b']') {
                        return Ok(at + 1);
                    }
                }
            }
            _ => Ok(at),
        }
    }

    /// Whether the byte at `at` is of the class `pattern[p..end]`.
    fn single(&self, at: usize, p: usize, end: usize) -> bool {
        let Some(&b) = self.text.get(at) else { return false };
        match self.pattern[p].sign() {
            b'.' => true,
            b'%' => b.in_class(self.pattern[p + 1]),
            b'[' => self.in_set(b, p, end - 1),
            _ => self.pattern[p] == b,
        }
    }

    /// `p` is at the `[` and `end` at the `]`.
    fn in_set(&self, b: T, p: usize, end: usize) -> bool {
        let set = &self.pattern[p + 1..end];
        let (set, inside) = match set.split_first() {
            Some((first, rest)) if first.sign() == b'^' => (rest, false),
            _ => (set, true),
        };
        let mut at = 0;
        while at < set.len() {
            let found = match (set[at].sign(), set.get(at + 1), set.get(at + 2)) {
                (b'%', Some(class), _) => {
                    at += 1;
                    b.in_class(*class)
                }
                (_, Some(dash), Some(high)) if dash.sign() == b'-' => {
                    at += 2;
                    (set[at - 2]..=*high).contains(&b)
                }
                _ => set[at] == b,
            };
            if found {
                return inside;
            }
            at += 1;
        }
        !inside
    }

    fn push_captures(&self, s: &Stack) -> Answer {
        s.reserve(self.captures.len())?;
        for capture in &self.captures {
            match capture.end {
                End::Open => return Err("unfinished capture".into()),
                End::Position => s.push_number((capture.start + 1) as f64),
                End::At(end) => {
                    T::push(&self.text[capture.start..end], s);
                    1
                }
            };
        }
        Ok(self.captures.len() as c_int)
    }
}

/// `%a` and its like; a capital is the complement, what is no class stands for itself.
pub(super) fn in_class(b: u8, class: u8) -> bool {
    let inside = match class.to_ascii_lowercase() {
        b'a' => b.is_ascii_alphabetic(),
        b'c' => b.is_ascii_control(),
        b'd' => b.is_ascii_digit(),
        b'g' => b.is_ascii_graphic(),
        b'l' => b.is_ascii_lowercase(),
        b'p' => b.is_ascii_punctuation(),
        b's' => matches!(b, b' ' | b'\t'..=b'\r'),
        b'u' => b.is_ascii_uppercase(),
        b'w' => b.is_ascii_alphanumeric(),
        b'x' => b.is_ascii_hexdigit(),
        b'z' => b == 0,
        _ => return class == b,
    };
    inside != class.is_ascii_uppercase()
}

#[cfg(test)]
mod tests {
    use super::{MAX_CAPTURES, MAX_DEPTH};
    use crate::lua::host::tests::check;

    /// Random texts and patterns, by LuaJIT's own functions and by these: results, and whether there is an error. No pattern has
    /// a NUL, at which LuaJIT takes it to end.
    #[test]
    fn finds_what_luajit_finds() {
        check(
            r##"
            local own = require("moongate.pattern")
            math.randomseed(7)
            local random = math.random
            local pieces = { "a", "b", ".", "%a", "%d", "%w", "%S", "%s", "[ab]", "[^a]", "[a-c%d]", "[]]", "[^]]", "(", ")", "()",
                "*", "+", "-", "?", "%b()", "%f[%w]", "%1", "%2", "^", "$", "x", "1", " ", "%%", "%.", "[%]]", "%", "[", "%f", "%bx",
                "%z", "%g", "[a-]", "%p", "%X", "[%a_]" }
            local letters = { "a", "b", "c", "x", "1", "2", " ", "(", ")", ".", "%", "]", "\0", "\n", "-" }
            local function text(from, n)
                local out = {}
                for i = 1, random(n) - 1 do out[i] = from[random(#from)] end
                return table.concat(out)
            end
            local function show(ok, ...)
                -- LuaJIT notices an open parenthesis only where its capture is asked for.
                if not ok then return tostring((...)):find("unfinished capture", 1, true) and "unfinished" or "error" end
                local out = {}
                for i = 1, select("#", ...) do out[i] = type((select(i, ...))) .. tostring((select(i, ...))) end
                return table.concat(out, "|")
            end
            local function all(gmatch, s, p)
                local out = {}
                for a, b in gmatch(s, p) do
                    out[#out + 1] = tostring(a) .. "," .. tostring(b)
                    if #out > 100 then break end
                end
                return table.concat(out, ";")
            end
            local replacements = { "<%0>", "%1", "%%", "x", "%1%2", "", 5, { a = "A", b = 7, [1] = "one" },
                function(a, b) return a == "a" and "A" or nil end, function() return false end, function() return {} end, "%9", "%a" }
            local failures, matched = {}, 0
            local function same(what, s, p, a, b)
                if a ~= "" and a ~= "nilnil" and a ~= "error" then matched = matched + 1 end
                if a ~= b and b ~= "unfinished" then failures[#failures + 1] = ("%s %q %q: %s, not %s"):format(what, s, p, b, a) end
            end
            for i = 1, 60000 do
                local s, p = text(letters, 12), text(pieces, 7)
                local init = random(16) - 4
                same("find", s, p, show(pcall(string.find, s, p, init)), show(pcall(own.find, s, p, init)))
                same("plain", s, p, show(pcall(string.find, s, p, init, true)), show(pcall(own.find, s, p, init, true)))
                same("match", s, p, show(pcall(string.match, s, p, init)), show(pcall(own.match, s, p, init)))
                same("gmatch", s, p, show(pcall(all, string.gmatch, s, p)), show(pcall(all, own.gmatch, s, p)))
                local r = replacements[random(#replacements)]
                local max = random(4) == 1 and random(3) - 1 or nil
                same("gsub", s, p, show(pcall(string.gsub, s, p, r, max)), show(pcall(own.gsub, s, p, r, max)))
                if #failures > 10 then break end
            end
            assert(#failures > 0 or matched > 20000, matched)
            return table.concat(failures, "\n")
            "##,
            "",
        );
    }

    /// One step of these costs as much as the text or the set is long: it is the work that counts.
    #[test]
    fn long_work_is_cut_off_whatever_it_is() {
        for pattern in
            ["('('):rep(3e5), '%b()'", "('x'):rep(1e6), '^(x*)%1y'", "('a'):rep(3e5), '[' .. ('b'):rep(3e5) .. ']'"]
        {
            let config = serde_json::json!({"lua": {"limits": {"cpu_ms": 50}}});
            let vm = crate::lua::VmConfig { config: config.into(), ..Default::default() };
            let vm = crate::lua::Vm::new(vm).expect("a VM");
            let chunk = format!("return tostring(select(2, pcall(require('moongate.pattern').find, {pattern})))");
            let f = vm.lua.load(chunk).into_function().expect("compiles");
            let began = std::time::Instant::now();
            let end = vm.entered(|| crate::lua::limits::bounded(vm.main(), vm.limits(), || f.call::<String>(())));
            let text = end.unwrap_or_else(|e| e.to_string());
            assert!(text.contains("lua.limits.cpu_ms"), "{pattern}: {text}");
            // Left alone they take minutes.
            assert!(began.elapsed() < std::time::Duration::from_secs(20), "{pattern}: {:?}", began.elapsed());
        }
    }

    #[test]
    fn arguments_are_checked_as_luajit_does() {
        check(
            "local out = {}
             local function text(of, call)
                 local run = loadstring('local string = ... return string.' .. call)
                 local _, err = pcall(run, of)
                 return (tostring(err):gsub('^.-:%d+: ', ''):gsub([[ to '.-']], ''))
             end
             for _, call in ipairs({ 'find(nil, \"a\")', 'match(\"a\")', 'find()', 'gsub(\"a\", \"b\")', 'gsub(\"a\", \"a\", true)',
                 'find({}, \"a\")', 'gmatch(\"a\", nil)', 'gsub(\"a\", \"a\", function() return {} end)', 'find(\"a\", \"[a\")',
                 'find(\"a\", \"%\")', 'find(\"a\", \"(a\")', 'find(\"a\", \"a)\")', 'find(\"a\", \"%1\")' }) do
                 local real, mine = text(string, call), text(require('moongate.pattern'), call)
                 if real ~= mine then out[#out + 1] = real .. ' / ' .. mine end
             end
             return table.concat(out, '\\n')",
            "",
        );
        check("return require('moongate.pattern').gsub(1234, 2, 'x')", "1x34");
    }

    #[test]
    fn captures_and_depth_are_bounded() {
        let find = |pattern: &str, text: &str| {
            let call = format!("pcall(require('moongate.pattern').find, {text}, {pattern})");
            format!("return (tostring((select(2, {call}))):gsub('^.-:%d+: ', ''))")
        };
        let captures = |n: usize| format!("('(a)'):rep({n})");
        let text = format!("('a'):rep({})", MAX_CAPTURES + 1);
        check(&find(&captures(MAX_CAPTURES), &text), "1");
        check(&find(&captures(MAX_CAPTURES + 1), &text), "too many captures");
        let optional = |n: u32| format!("('a?'):rep({n})");
        let text = format!("('a'):rep({})", 2 * MAX_DEPTH);
        check(&find(&optional(MAX_DEPTH - 1), &text), "1");
        check(&find(&optional(MAX_DEPTH), &text), "pattern too complex");
    }
}
