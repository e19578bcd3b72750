//! `lua-utf8`: texts by characters (luautf8's README). What is no UTF-8 counts byte by byte, as characters of their value.

use unicode_normalization::UnicodeNormalization;
use unicode_width::UnicodeWidthChar;

use super::{
    Answer,
    pattern::{self, Unit},
};
use crate::{
    error::Result,
    lua::api::{Api, Phases, Stack},
};

pub fn register(api: &mut Api) -> Result<()> {
    let any = Phases::ANY;
    api.func(
        "native.utf8.find",
        any,
        "find(text, pattern, from, plain, anchors) -> first, last, captures… | nil: as pattern.find, in characters",
        find,
    )?;
    api.func("native.utf8.len", any, "len(text, lax) -> characters | nil, place of the first bad byte", len)?;
    api.func("native.utf8.sub", any, "sub(text, i, j): characters i to j, counted from the end when negative", sub)?;
    api.func(
        "native.utf8.change",
        any,
        "change(text, \"lower\" | \"upper\" | \"title\" | \"fold\" | \"reverse\")",
        change,
    )?;
    api.func("native.utf8.width", any, "width(text, ambiguous is wide): columns of a terminal", width)?;
    api.func("native.utf8.clean", any, "clean(text, replacement) -> text, whether it was good", clean)?;
    api.func("native.utf8.nfc", any, "nfc(text) -> text, whether it was so | nil: not UTF-8", nfc)
}

/// A character's number; bytes that are no UTF-8 stand for themselves.
#[derive(Clone, Copy, PartialEq, PartialOrd)]
struct Letter {
    code: u32,
    /// How it was written: UTF-8 or a byte that is none.
    bad: bool,
}

impl Letter {
    fn char(self) -> Option<char> {
        char::from_u32(self.code).filter(|_| !self.bad)
    }

    fn write(self, out: &mut Vec<u8>) {
        match self.char() {
            Some(c) => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
            None => out.push(self.code as u8),
        }
    }
}

fn letters(text: &[u8]) -> Vec<Letter> {
    let mut all = Vec::with_capacity(text.len());
    for chunk in text.utf8_chunks() {
        all.extend(chunk.valid().chars().map(|c| Letter { code: c.into(), bad: false }));
        all.extend(chunk.invalid().iter().map(|b| Letter { code: (*b).into(), bad: true }));
    }
    all
}

fn bytes(letters: &[Letter]) -> Vec<u8> {
    let mut out = Vec::with_capacity(letters.len());
    letters.iter().for_each(|letter| letter.write(&mut out));
    out
}

impl Unit for Letter {
    const NONE: Letter = Letter { code: 0, bad: false };

    fn sign(self) -> u8 {
        u8::try_from(self.code).ok().filter(u8::is_ascii).unwrap_or(0xff)
    }

    fn in_class(self, class: Letter) -> bool {
        let Some(c) = self.char().filter(|c| !c.is_ascii()) else {
            return match class.sign() {
                0xff => self == class,
                sign => pattern::in_class(self.code as u8, sign),
            };
        };
        let inside = match class.sign().to_ascii_lowercase() {
            b'a' => c.is_alphabetic(),
            b'c' => c.is_control(),
            b'd' => c.is_numeric(),
            b'g' => !c.is_control() && !c.is_whitespace(),
            b'l' => c.is_lowercase(),
            b'p' => !c.is_alphanumeric() && !c.is_control() && !c.is_whitespace(),
            b's' => c.is_whitespace(),
            b'u' => c.is_uppercase(),
            b'w' => c.is_alphanumeric(),
            b'x' | b'z' => false,
            _ => return self == class,
        };
        inside != class.sign().is_ascii_uppercase()
    }

    fn push(text: &[Letter], s: &Stack) {
        s.push_bytes(bytes(text));
    }
}

fn find(s: &Stack) -> Answer {
    let (text, wanted) = (letters(s.arg_bytes(1)?), letters(s.arg_bytes(2)?));
    let from = s.arg_int(3)?.max(0) as usize;
    if from > text.len() {
        return Ok(s.push_nil());
    }
    if !s.boolean(4) {
        return pattern::first_match(s, &text, &wanted, from, s.boolean(5));
    }
    let needle = bytes(&wanted);
    let rest = bytes(&text[from..]);
    Ok(match memchr::memmem::find(&rest, &needle) {
        Some(at) => {
            let start = from + letters(&rest[..at]).len();
            pattern::push_span(s, start, start + wanted.len())
        }
        None => s.push_nil(),
    })
}

fn len(s: &Stack) -> Answer {
    let (text, lax) = (s.arg_bytes(1)?, s.boolean(2));
    match std::str::from_utf8(text) {
        Ok(text) => Ok(s.push_number(text.chars().count() as f64)),
        Err(_) if lax => Ok(s.push_number(letters(text).len() as f64)),
        Err(e) => Ok(s.push_nil() + s.push_number((e.valid_up_to() + 1) as f64)),
    }
}

fn sub(s: &Stack) -> Answer {
    let all = letters(s.arg_bytes(1)?);
    let count = all.len() as i64;
    let place = |i: i64| if i < 0 { (count + i + 1).max(0) } else { i };
    let (first, last) = (place(s.arg_int(2)?).max(1), place(s.opt_number(3)?.unwrap_or(-1.0) as i64).min(count));
    let cut = if first > last { &[] } else { &all[first as usize - 1..last as usize] };
    Ok(s.push_bytes(bytes(cut)))
}

fn change(s: &Stack) -> Answer {
    let mut all = letters(s.arg_bytes(1)?);
    // One character becomes one, as in the tables of the original.
    let one = |letter: Letter, mut to: Box<dyn Iterator<Item = char>>| match (to.next(), to.next()) {
        (Some(c), None) => Letter { code: c.into(), ..letter },
        _ => letter,
    };
    let lower = |l: Letter| l.char().map_or(l, |c| one(l, Box::new(c.to_lowercase())));
    let upper = |l: Letter| l.char().map_or(l, |c| one(l, Box::new(c.to_uppercase())));
    match s.arg_bytes(2)? {
        b"lower" => all.iter_mut().for_each(|l| *l = lower(*l)),
        // A final sigma and its like fold as their capitals do.
        b"fold" => all.iter_mut().for_each(|l| *l = lower(upper(*l))),
        b"reverse" => all.reverse(),
        _ => all.iter_mut().for_each(|l| *l = upper(*l)),
    }
    Ok(s.push_bytes(bytes(&all)))
}

fn width(s: &Stack) -> Answer {
    let wide = s.boolean(2);
    let of = |l: &Letter| match l.char() {
        Some(c) if wide => c.width_cjk(),
        Some(c) => c.width(),
        None => Some(1),
    };
    let columns: usize = letters(s.arg_bytes(1)?).iter().filter_map(of).sum();
    Ok(s.push_number(columns as f64))
}

fn clean(s: &Stack) -> Answer {
    let (text, replacement) = (s.arg_bytes(1)?, s.arg_bytes(2)?);
    let (mut out, mut good) = (Vec::with_capacity(text.len()), true);
    for chunk in text.utf8_chunks() {
        out.extend_from_slice(chunk.valid().as_bytes());
        if !chunk.invalid().is_empty() {
            out.extend_from_slice(replacement);
            good = false;
        }
    }
    Ok(s.push_bytes(out) + s.push_bool(good))
}

fn nfc(s: &Stack) -> Answer {
    let Ok(text) = std::str::from_utf8(s.arg_bytes(1)?) else { return Ok(s.push_nil()) };
    let made: String = text.nfc().collect();
    Ok(s.push_bytes(&made) + s.push_bool(made == text))
}
