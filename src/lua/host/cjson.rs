//! `cjson` and `cjson.safe`, as lua-cjson 2.1.0 in OpenResty behaves: formats, defaults and error texts.
//!
//! Works directly on the Lua stack: no value in between. Settings belong to the instance (`cjson.new()`), which its functions
//! carry as an upvalue.

use std::{
    cell::RefCell,
    ffi::{CStr, c_int, c_void},
    ptr,
};

use mlua::ffi;

use super::{Answer, native};
use crate::{
    error::Result,
    lua::{
        api::{Api, Phases, Raise, Stack},
        convert, limits,
    },
};

/// Tables within tables that are encoded or decoded, as lua-cjson's default.
const MAX_DEPTH: c_int = 1000;

/// The longest text that is encoded: one table may hold the same long string any number of times.
const MAX_TEXT: usize = 256 << 20;

/// A JSON buffer larger than this is given back after use: one huge document must not be paid for ever.
const KEEP_BUFFER: usize = 1 << 20;

/// Digits of a number (`%.14g`).
const PRECISION: c_int = 14;

#[derive(Clone, Copy)]
struct Settings {
    sparse_convert: bool,
    sparse_ratio: c_int,
    sparse_safe: c_int,
    encode_depth: c_int,
    decode_depth: c_int,
    precision: c_int,
    /// 0: an error, 1: as written by C, 2: null.
    encode_invalid: c_int,
    decode_invalid: bool,
    keep_buffer: bool,
    empty_as_object: bool,
    decode_array_mt: bool,
    escape_slash: bool,
    skip_unsupported: bool,
}

const DEFAULTS: Settings = Settings {
    sparse_convert: false,
    sparse_ratio: 2,
    sparse_safe: 10,
    encode_depth: MAX_DEPTH,
    decode_depth: MAX_DEPTH,
    precision: PRECISION,
    encode_invalid: 0,
    decode_invalid: true,
    keep_buffer: true,
    empty_as_object: true,
    decode_array_mt: false,
    escape_slash: true,
    skip_unsupported: false,
};

/// Their addresses are values and keys: `cjson.empty_array`, and a metatable in the registry.
static EMPTY_ARRAY: u8 = 0;
static EMPTY_ARRAY_MT: u8 = 1;

fn key(of: &'static u8) -> *mut c_void {
    ptr::from_ref(of).cast_mut().cast()
}

pub fn register(api: &mut Api) -> Result<()> {
    api.func("native.cjson.new", Phases::ANY, "an instance of cjson: its functions raise", open)?;
    api.func("native.cjson.new_safe", Phases::ANY, "an instance of cjson.safe: nil, err instead of raising", open_safe)
}

fn open(s: &Stack) -> Answer {
    instance(s, false)
}

fn open_safe(s: &Stack) -> Answer {
    instance(s, true)
}

fn instance(s: &Stack, safe: bool) -> Answer {
    let l = s.raw();
    s.push_table(0, 24);
    let table = s.top();
    // SAFETY: plain old data in a userdata; its alignment is that of any C type.
    unsafe { ffi::lua_newuserdata(l, size_of::<Settings>()).cast::<Settings>().write(DEFAULTS) };
    for (name, f) in if safe { SAFE } else { RAISING }.iter().chain(COMMON) {
        s.push_copy(table + 1);
        s.push_bytes(name.to_bytes());
        // SAFETY: two values were pushed for the closure; the table takes it.
        unsafe {
            ffi::lua_pushcclosure(l, *f, 2);
            ffi::lua_setfield(l, table, name.as_ptr());
        }
    }
    s.set_top(table);
    // SAFETY: pushes one value each.
    unsafe { ffi::lua_pushlightuserdata(l, key(&EMPTY_ARRAY)) };
    s.set(table, "empty_array");
    push_array_mt(s);
    s.set(table, "array_mt");
    push_empty_array_mt(s);
    s.set(table, "empty_array_mt");
    s.push_null();
    s.set(table, "null");
    s.push_bytes("cjson");
    s.set(table, "_NAME");
    s.push_bytes("2.1.0.14");
    s.set(table, "_VERSION");
    Ok(1)
}

/// The metatable that marks arrays everywhere in the VM.
fn push_array_mt(s: &Stack) {
    // SAFETY: the registry holds it from the VM's first moment.
    unsafe { ffi::lua_getfield_(s.raw(), ffi::LUA_REGISTRYINDEX, convert::ARRAY_MT.as_ptr()) };
}

fn push_empty_array_mt(s: &Stack) {
    let l = s.raw();
    // SAFETY: registry access with a lightuserdata key; leaves one table on the stack.
    unsafe {
        ffi::lua_pushlightuserdata(l, key(&EMPTY_ARRAY_MT));
        ffi::lua_rawget_(l, ffi::LUA_REGISTRYINDEX);
        if s.is_table(-1) {
            return;
        }
        s.pop(1);
        s.push_table(0, 0);
        ffi::lua_pushlightuserdata(l, key(&EMPTY_ARRAY_MT));
        s.push_copy(-2);
        ffi::lua_rawset(l, ffi::LUA_REGISTRYINDEX);
    }
}

type Functions = &'static [(&'static CStr, ffi::lua_CFunction)];

const RAISING: Functions = &[(c"encode", native!(encode)), (c"decode", native!(decode)), (c"new", native!(open))];
const SAFE: Functions =
    &[(c"encode", native!(encode_safe)), (c"decode", native!(decode_safe)), (c"new", native!(open_safe))];
const COMMON: Functions = &[
    (c"encode_sparse_array", native!(encode_sparse_array)),
    (c"encode_max_depth", native!(encode_max_depth)),
    (c"decode_max_depth", native!(decode_max_depth)),
    (c"encode_number_precision", native!(encode_number_precision)),
    (c"encode_keep_buffer", native!(encode_keep_buffer)),
    (c"encode_invalid_numbers", native!(encode_invalid_numbers)),
    (c"decode_invalid_numbers", native!(decode_invalid_numbers)),
    (c"encode_empty_table_as_object", native!(encode_empty_table_as_object)),
    (c"decode_array_with_array_mt", native!(decode_array_with_array_mt)),
    (c"encode_escape_forward_slash", native!(encode_escape_forward_slash)),
    (c"encode_skip_unsupported_value_types", native!(encode_skip_unsupported)),
];

/// The instance's settings. The reference ends before the next call into Lua that could collect the closure.
#[allow(clippy::mut_from_ref)]
fn settings<'a>(s: &Stack) -> &'a mut Settings {
    // SAFETY: every function of the module was made with the userdata as its first upvalue.
    unsafe { &mut *ffi::lua_touserdata(s.raw(), ffi::lua_upvalueindex(1)).cast() }
}

fn flag(s: &Stack, of: impl Fn(&mut Settings) -> &mut bool) -> Answer {
    if !s.is_nil(1) {
        *of(settings(s)) = match s.bytes(1) {
            Some(b"on") => true,
            Some(b"off") => false,
            Some(_) => return Err(s.argument_error(1, "invalid option")),
            None => s.boolean(1),
        };
    }
    s.push_bool(*of(settings(s)));
    Ok(1)
}

fn integer(s: &Stack, i: c_int, min: c_int, max: c_int, of: &mut c_int) -> Result<(), Raise> {
    if s.is_nil(i) {
        return Ok(());
    }
    let n = s.arg_number(i)?;
    if !(f64::from(min)..=f64::from(max)).contains(&n) {
        return Err(s.argument_error(i, &format!("expected integer between {min} and {max}")));
    }
    *of = n as c_int;
    Ok(())
}

fn encode_sparse_array(s: &Stack) -> Answer {
    let set = settings(s);
    if !s.is_nil(1) {
        set.sparse_convert = s.boolean(1);
    }
    integer(s, 2, 0, c_int::MAX, &mut set.sparse_ratio)?;
    integer(s, 3, 0, c_int::MAX, &mut set.sparse_safe)?;
    s.push_bool(set.sparse_convert);
    s.push_number(set.sparse_ratio.into());
    s.push_number(set.sparse_safe.into());
    Ok(3)
}

fn encode_max_depth(s: &Stack) -> Answer {
    let set = settings(s);
    integer(s, 1, 1, c_int::MAX, &mut set.encode_depth)?;
    s.push_number(set.encode_depth.into());
    Ok(1)
}

fn decode_max_depth(s: &Stack) -> Answer {
    let set = settings(s);
    integer(s, 1, 1, c_int::MAX, &mut set.decode_depth)?;
    s.push_number(set.decode_depth.into());
    Ok(1)
}

fn encode_number_precision(s: &Stack) -> Answer {
    let set = settings(s);
    integer(s, 1, 1, 16, &mut set.precision)?;
    s.push_number(set.precision.into());
    Ok(1)
}

fn encode_keep_buffer(s: &Stack) -> Answer {
    flag(s, |x| &mut x.keep_buffer)
}

fn encode_invalid_numbers(s: &Stack) -> Answer {
    let set = settings(s);
    if !s.is_nil(1) {
        set.encode_invalid = match s.bytes(1) {
            Some(b"on") => 1,
            Some(b"off") => 0,
            Some(b"null") => 2,
            Some(_) => return Err(s.argument_error(1, "invalid option")),
            None => s.boolean(1) as c_int,
        };
    }
    match set.encode_invalid {
        2 => s.push_bytes("null"),
        n => s.push_bool(n == 1),
    };
    Ok(1)
}

fn decode_invalid_numbers(s: &Stack) -> Answer {
    flag(s, |x| &mut x.decode_invalid)
}

fn encode_empty_table_as_object(s: &Stack) -> Answer {
    flag(s, |x| &mut x.empty_as_object)
}

fn decode_array_with_array_mt(s: &Stack) -> Answer {
    flag(s, |x| &mut x.decode_array_mt)
}

fn encode_escape_forward_slash(s: &Stack) -> Answer {
    flag(s, |x| &mut x.escape_slash)
}

fn encode_skip_unsupported(s: &Stack) -> Answer {
    flag(s, |x| &mut x.skip_unsupported)
}

fn safely(s: &Stack, f: fn(&Stack) -> Answer) -> Answer {
    match f(s) {
        Err(Raise(text)) => {
            s.set_top(0);
            s.fail(text.as_bytes())
        }
        other => other,
    }
}

fn encode_safe(s: &Stack) -> Answer {
    safely(s, encode)
}

fn decode_safe(s: &Stack) -> Answer {
    safely(s, decode)
}

thread_local! {
    /// Grows to the thread's documents and is reused.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

fn encode(s: &Stack) -> Answer {
    if s.top() != 1 {
        return Err(s.argument_error(1, "expected 1 argument"));
    }
    let mut out = BUFFER.with(RefCell::take);
    out.clear();
    let mut encoder = Encoder { s, out, max: MAX_TEXT, set: *settings(s) };
    let done = encoder.value(0);
    let out = encoder.out;
    if done.is_ok() {
        s.push_bytes(&out);
    }
    if out.capacity() <= KEEP_BUFFER {
        BUFFER.with(|b| b.replace(out));
    }
    done.map(|_| 1)
}

/// What a table's metatable makes of it.
#[derive(Clone, Copy, PartialEq)]
enum Mark {
    Plain,
    Array,
    EmptyArray,
}

struct Encoder<'a> {
    s: &'a Stack,
    out: Vec<u8>,
    max: usize,
    set: Settings,
}

impl Encoder<'_> {
    /// Writes the value on top of the stack; false when it was left out (`encode_skip_unsupported_value_types`).
    fn value(&mut self, depth: c_int) -> Result<bool, Raise> {
        let s = self.s;
        match s.kind(-1) {
            ffi::LUA_TSTRING => self.string(s.bytes(-1).unwrap_or_default()),
            ffi::LUA_TNUMBER => self.number(s.number(-1).unwrap_or_default())?,
            ffi::LUA_TBOOLEAN => self.out.extend_from_slice(if s.boolean(-1) { b"true" } else { b"false" }),
            ffi::LUA_TNIL => self.out.extend_from_slice(b"null"),
            ffi::LUA_TTABLE => self.table(depth + 1)?,
            // SAFETY: there is a value on top; reading it changes nothing.
            ffi::LUA_TLIGHTUSERDATA => match unsafe { ffi::lua_touserdata(s.raw(), -1) } {
                p if p.is_null() => self.out.extend_from_slice(b"null"),
                p if p == key(&EMPTY_ARRAY) => self.out.extend_from_slice(b"[]"),
                _ => return self.unsupported(),
            },
            _ => return self.unsupported(),
        }
        Ok(true)
    }

    fn unsupported(&self) -> Result<bool, Raise> {
        if self.set.skip_unsupported {
            return Ok(false);
        }
        self.refuse("type not supported")
    }

    fn refuse<T>(&self, why: &str) -> Result<T, Raise> {
        Err(Raise::from(format!("Cannot serialise {}: {why}", self.s.kind_name(-1))))
    }

    fn table(&mut self, depth: c_int) -> Result<(), Raise> {
        let s = self.s;
        if depth > self.set.encode_depth || s.reserve(4).is_err() {
            return Err(Raise::from(format!("Cannot serialise, excessive depth ({depth})")));
        }
        limits::check()?;
        let mark = self.mark();
        if mark == Mark::Array {
            return self.array(s.len(-1), depth);
        }
        match self.array_length()? {
            Some(0) if self.set.empty_as_object && mark != Mark::EmptyArray => self.out.extend_from_slice(b"{}"),
            Some(n) => self.array(n, depth)?,
            None => self.object(depth)?,
        }
        Ok(())
    }

    /// What the metatable of the table on top says.
    fn mark(&self) -> Mark {
        let s = self.s;
        // SAFETY: what getmetatable pushes is popped again; comparing pointers touches nothing.
        unsafe {
            if ffi::lua_getmetatable(s.raw(), -1) == 0 {
                return Mark::Plain;
            }
            push_array_mt(s);
            push_empty_array_mt(s);
            let at = |i| ffi::lua_topointer(s.raw(), i);
            let mark = match at(-3) {
                mt if mt == at(-2) => Mark::Array,
                mt if mt == at(-1) => Mark::EmptyArray,
                _ => Mark::Plain,
            };
            s.pop(3);
            mark
        }
    }

    /// Elements of the table on top as an array; `None`: an object.
    fn array_length(&self) -> Result<Option<usize>, Raise> {
        let s = self.s;
        let (mut max, mut items) = (0.0_f64, 0.0_f64);
        s.push_nil();
        // SAFETY: the table lies below the key, which `lua_next` itself left there or which is nil.
        while unsafe { ffi::lua_next(s.raw(), -2) } != 0 {
            let n = if s.kind(-2) == ffi::LUA_TNUMBER { s.number(-2).unwrap_or_default() } else { 0.0 };
            if n < 1.0 || n.floor() != n {
                s.pop(2);
                return Ok(None);
            }
            max = max.max(n);
            items += 1.0;
            s.pop(1);
        }
        let set = &self.set;
        if set.sparse_ratio > 0 && max > items * f64::from(set.sparse_ratio) && max > f64::from(set.sparse_safe) {
            return if set.sparse_convert { Ok(None) } else { self.refuse("excessively sparse array") };
        }
        Ok(Some(max as usize))
    }

    fn array(&mut self, len: usize, depth: c_int) -> Result<(), Raise> {
        self.out.push(b'[');
        let mut first = true;
        for i in 1..=len {
            let before = self.out.len();
            if !first {
                self.out.push(b',');
            }
            self.s.get_index(-1, i);
            let written = self.value(depth)?;
            self.s.pop(1);
            self.fits()?;
            if written {
                first = false;
            } else {
                self.out.truncate(before);
            }
        }
        self.out.push(b']');
        Ok(())
    }

    fn object(&mut self, depth: c_int) -> Result<(), Raise> {
        let s = self.s;
        self.out.push(b'{');
        let mut first = true;
        s.push_nil();
        // SAFETY: the table lies below the key, which `lua_next` itself left there or which is nil.
        while unsafe { ffi::lua_next(s.raw(), -2) } != 0 {
            let before = self.out.len();
            if !first {
                self.out.push(b',');
            }
            match s.kind(-2) {
                ffi::LUA_TSTRING => self.string(s.bytes(-2).unwrap_or_default()),
                ffi::LUA_TNUMBER => {
                    self.out.push(b'"');
                    self.number(s.number(-2).unwrap_or_default())?;
                    self.out.push(b'"');
                }
                _ => {
                    s.pop(1);
                    return self.refuse("table key must be a number or string");
                }
            }
            self.out.push(b':');
            if self.value(depth)? {
                first = false;
            } else {
                self.out.truncate(before);
            }
            s.pop(1);
            self.fits()?;
        }
        self.out.push(b'}');
        Ok(())
    }

    fn fits(&self) -> Result<(), Raise> {
        match self.out.len() > self.max {
            true => Err(Raise::from(format!("Cannot serialise, more than {} bytes", self.max))),
            false => Ok(()),
        }
    }

    fn number(&mut self, n: f64) -> Result<(), Raise> {
        if !n.is_finite() {
            match self.set.encode_invalid {
                0 => return self.refuse("must not be NaN or Infinity"),
                1 => self.out.extend_from_slice(if n.is_nan() {
                    b"NaN"
                } else if n > 0.0 {
                    b"Infinity"
                } else {
                    b"-Infinity"
                }),
                _ => self.out.extend_from_slice(b"null"),
            }
            return Ok(());
        }
        write_number(&mut self.out, n, self.set.precision);
        Ok(())
    }

    fn string(&mut self, text: &[u8]) {
        self.out.reserve(text.len() + 2);
        self.out.push(b'"');
        let mut from = 0;
        for (i, &b) in text.iter().enumerate() {
            if PLAIN[b as usize] || (b == b'/' && !self.set.escape_slash) {
                continue;
            }
            self.out.extend_from_slice(&text[from..i]);
            from = i + 1;
            self.escape(b);
        }
        self.out.extend_from_slice(&text[from..]);
        self.out.push(b'"');
    }

    fn escape(&mut self, b: u8) {
        let short = match b {
            b'"' | b'\\' | b'/' => b,
            8 => b'b',
            9 => b't',
            10 => b'n',
            12 => b'f',
            13 => b'r',
            _ => {
                const HEX: &[u8; 16] = b"0123456789abcdef";
                let (high, low) = (HEX[b as usize >> 4], HEX[b as usize & 15]);
                return self.out.extend_from_slice(&[b'\\', b'u', b'0', b'0', high, low]);
            }
        };
        self.out.extend_from_slice(&[b'\\', short]);
    }
}

/// Bytes that stand in a JSON string as they are.
const PLAIN: [bool; 256] = {
    let mut plain = [true; 256];
    let mut i = 0;
    while i < 32 {
        plain[i] = false;
        i += 1;
    }
    plain[b'"' as usize] = false;
    plain[b'\\' as usize] = false;
    plain[b'/' as usize] = false;
    plain[127] = false;
    plain
};

/// Writes a finite number as `%.{precision}g`.
pub(crate) fn write_number(out: &mut Vec<u8>, n: f64, precision: c_int) {
    if n.fract() == 0.0 && n.abs() < 10f64.powi(precision.min(15)) && !(n == 0.0 && n.is_sign_negative()) {
        out.extend_from_slice(itoa::Buffer::new().format(n as i64).as_bytes());
        return;
    }
    // Hundredths, such as seconds that were rounded: whole numbers are quicker to write.
    let hundredths = n * 100.0;
    if hundredths.fract() == 0.0 && (100.0..1e9).contains(&hundredths) && (12..=14).contains(&precision) {
        let (whole, rest) = (hundredths as u64 / 100, hundredths as u64 % 100);
        out.extend_from_slice(itoa::Buffer::new().format(whole).as_bytes());
        let digits = [b'.', b'0' + (rest / 10) as u8, b'0' + (rest % 10) as u8];
        out.extend_from_slice(&digits[..if rest % 10 == 0 { 2 } else { 3 }]);
        return;
    }
    let mut text = [0u8; 48];
    // SAFETY: the buffer's length is given; `%.16g` needs 24 bytes.
    let len = unsafe { libc::snprintf(text.as_mut_ptr().cast(), text.len(), c"%.*g".as_ptr(), precision, n) };
    out.extend_from_slice(&text[..(len.max(0) as usize).min(text.len() - 1)]);
}

fn decode(s: &Stack) -> Answer {
    if s.top() != 1 {
        return Err(s.argument_error(1, "expected 1 argument"));
    }
    let text = s.arg_bytes(1)?;
    if text.len() >= 2 && (text[0] == 0 || text[1] == 0) {
        return Err(Raise::from("JSON parser does not support UTF-16 or UTF-32"));
    }
    let mut decoder = Decoder { s, text, at: 0, depth: 0, set: *settings(s), scratch: Vec::new() };
    let token = decoder.next();
    decoder.value(token)?;
    match decoder.next() {
        Token::End => Ok(1),
        other => Err(decoder.unexpected("the end", &other)),
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Token {
    ObjectBegin,
    ObjectEnd,
    ArrayBegin,
    ArrayEnd,
    /// The string has been pushed.
    String,
    Number(f64),
    Bool(bool),
    Null,
    Colon,
    Comma,
    End,
    Bad(&'static str),
}

impl Token {
    fn name(&self) -> &'static str {
        match self {
            Token::ObjectBegin => "T_OBJ_BEGIN",
            Token::ObjectEnd => "T_OBJ_END",
            Token::ArrayBegin => "T_ARR_BEGIN",
            Token::ArrayEnd => "T_ARR_END",
            Token::String => "T_STRING",
            Token::Number(_) => "T_NUMBER",
            Token::Bool(_) => "T_BOOLEAN",
            Token::Null => "T_NULL",
            Token::Colon => "T_COLON",
            Token::Comma => "T_COMMA",
            Token::End => "T_END",
            Token::Bad(why) => why,
        }
    }
}

struct Decoder<'a> {
    s: &'a Stack,
    text: &'a [u8],
    at: usize,
    depth: c_int,
    set: Settings,
    /// A string with escapes, decoded.
    scratch: Vec<u8>,
}

impl Decoder<'_> {
    fn peek(&self) -> u8 {
        self.text.get(self.at).copied().unwrap_or(0)
    }

    /// Where the last token began is `start`; for a bad one, where it went bad.
    fn unexpected(&self, expected: &str, found: &Token) -> Raise {
        let at = match found {
            Token::Bad(_) => self.at,
            _ => self.start_of(found),
        };
        Raise::from(format!("Expected {expected} but found {} at character {}", found.name(), at + 1))
    }

    /// The first character of a token that has just been read.
    fn start_of(&self, token: &Token) -> usize {
        match token {
            Token::End => self.at,
            Token::Null => self.at - 4,
            Token::Bool(b) => self.at - if *b { 4 } else { 5 },
            Token::String => self.string_start(),
            Token::Number(_) => self.number_start(),
            _ => self.at - 1,
        }
    }

    /// Only for messages: the string's first quote, counted from the start of the text.
    fn string_start(&self) -> usize {
        let mut at = self.at - 1;
        while at > 0 {
            at -= 1;
            let escapes = self.text[..at].iter().rev().take_while(|b| **b == b'\\').count();
            if self.text[at] == b'"' && escapes % 2 == 0 {
                return at;
            }
        }
        0
    }

    fn number_start(&self) -> usize {
        let is_number = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'-' | b'.');
        self.at - self.text[..self.at].iter().rev().take_while(|b| is_number(b)).count()
    }

    fn next(&mut self) -> Token {
        while matches!(self.peek(), b' ' | b'\t' | b'\n' | b'\r') && self.at < self.text.len() {
            self.at += 1;
        }
        if self.at >= self.text.len() {
            return Token::End;
        }
        let single = match self.text[self.at] {
            b'{' => Token::ObjectBegin,
            b'}' => Token::ObjectEnd,
            b'[' => Token::ArrayBegin,
            b']' => Token::ArrayEnd,
            b':' => Token::Colon,
            b',' => Token::Comma,
            b'"' => return self.string(),
            b'-' | b'+' | b'0'..=b'9' => return self.number(),
            _ => return self.word(),
        };
        self.at += 1;
        single
    }

    fn word(&mut self) -> Token {
        for (text, token) in [(&b"true"[..], Token::Bool(true)), (b"false", Token::Bool(false)), (b"null", Token::Null)]
        {
            if self.text[self.at..].starts_with(text) {
                self.at += text.len();
                return token;
            }
        }
        match self.peek() {
            b'i' | b'I' | b'n' | b'N' if self.set.decode_invalid && self.invalid_number() => self.number(),
            _ => Token::Bad("invalid token"),
        }
    }

    /// `inf`, `infinity`, `nan` and hexadecimal, with a sign: what C's strtod reads and JSON has not.
    fn invalid_number(&self) -> bool {
        let rest = &self.text[self.at..];
        let rest = rest.strip_prefix(b"-").unwrap_or(rest);
        let begins = |word: &[u8]| rest.len() >= word.len() && rest[..word.len()].eq_ignore_ascii_case(word);
        begins(b"inf") || begins(b"nan") || begins(b"0x")
    }

    fn number(&mut self) -> Token {
        let odd = self.invalid_number();
        if !self.set.decode_invalid && (odd || self.breaks_json()) {
            return Token::Bad("invalid number");
        }
        if !odd
            && self.peek() != b'+'
            && let Some(n) = self.plain_number()
        {
            return Token::Number(n);
        }
        self.odd_number()
    }

    /// Leading zeros, and a sign without a digit.
    fn breaks_json(&self) -> bool {
        let rest = &self.text[self.at..];
        let rest = rest.strip_prefix(b"-").unwrap_or(rest);
        match rest {
            [b'0', next, ..] => next.is_ascii_digit(),
            [first, ..] => !first.is_ascii_digit(),
            [] => true,
        }
    }

    /// Reads what a C library would of a decimal number.
    fn plain_number(&mut self) -> Option<f64> {
        let rest = &self.text[self.at..];
        let digits = |from: usize| rest[from..].iter().take_while(|b| b.is_ascii_digit()).count();
        let sign = usize::from(rest[0] == b'-');
        let whole = digits(sign);
        let mut end = sign + whole;
        let mut integer = true;
        if rest.get(end) == Some(&b'.') {
            let fraction = digits(end + 1);
            if whole + fraction > 0 {
                end += 1 + fraction;
                integer = false;
            }
        }
        if end == sign {
            return None;
        }
        if matches!(rest.get(end), Some(b'e' | b'E')) {
            let signed = end + 1 + usize::from(matches!(rest.get(end + 1), Some(b'+' | b'-')));
            let exponent = if signed <= rest.len() { digits(signed) } else { 0 };
            if exponent > 0 {
                end = signed + exponent;
                integer = false;
            }
        }
        let text = &rest[..end];
        // Fifteen digits are exact in a double.
        let n = if integer && whole <= 15 {
            let n = text[sign..].iter().fold(0_i64, |n, b| n * 10 + i64::from(b - b'0')) as f64;
            if sign == 1 { -n } else { n }
        } else {
            std::str::from_utf8(text).ok()?.parse().ok()?
        };
        self.at += end;
        Some(n)
    }

    fn odd_number(&mut self) -> Token {
        // Longer than any number that strtod reads differently when cut.
        const LONGEST: usize = 400;
        let rest = &self.text[self.at..];
        let mut text = Vec::with_capacity(rest.len().min(LONGEST) + 1);
        text.extend(rest.iter().take(LONGEST).take_while(|b| **b != 0));
        text.push(0);
        let mut end = ptr::null_mut();
        // SAFETY: `text` ends with a zero.
        let n = unsafe { libc::strtod(text.as_ptr().cast(), &mut end) };
        let read = end as usize - text.as_ptr() as usize;
        if read == 0 {
            return Token::Bad("invalid number");
        }
        self.at += read;
        Token::Number(n)
    }

    /// Reads a string and pushes it.
    fn string(&mut self) -> Token {
        let from = self.at + 1;
        let rest = &self.text[from..];
        let Some(stop) = memchr::memchr3(b'"', b'\\', 0, rest).filter(|i| rest[*i] != 0) else {
            return self.unended(from);
        };
        if rest[stop] == b'"' {
            if self.s.reserve(1).is_err() {
                return Token::Bad("out of memory");
            }
            self.s.push_bytes(&rest[..stop]);
            self.at = from + stop + 1;
            return Token::String;
        }
        self.scratch.clear();
        self.at = from;
        match self.escaped_string() {
            Ok(()) => {
                self.s.push_bytes(&self.scratch);
                Token::String
            }
            Err(bad) => bad,
        }
    }

    /// A zero byte in a string is its end, as for lua-cjson.
    fn unended(&mut self, from: usize) -> Token {
        self.at = from + memchr::memchr(0, &self.text[from..]).unwrap_or(self.text.len() - from);
        Token::Bad("unexpected end of string")
    }

    fn escaped_string(&mut self) -> Result<(), Token> {
        loop {
            let rest = &self.text[self.at..];
            let Some(stop) = memchr::memchr3(b'"', b'\\', 0, rest).filter(|i| rest[*i] != 0) else {
                return Err(self.unended(self.at));
            };
            self.scratch.extend_from_slice(&rest[..stop]);
            self.at += stop;
            if rest[stop] == b'"' {
                self.at += 1;
                return Ok(());
            }
            let plain = match rest.get(stop + 1) {
                Some(b @ (b'"' | b'\\' | b'/')) => *b,
                Some(b'b') => 8,
                Some(b't') => 9,
                Some(b'n') => 10,
                Some(b'f') => 12,
                Some(b'r') => 13,
                Some(b'u') => {
                    self.unicode()?;
                    continue;
                }
                _ => return Err(Token::Bad("invalid escape code")),
            };
            self.scratch.push(plain);
            self.at += 2;
        }
    }

    fn hex4(&self, at: usize) -> Option<u32> {
        let digits = self.text.get(at..at + 4)?;
        digits.iter().try_fold(0, |n, b| Some(n * 16 + (*b as char).to_digit(16)?))
    }

    /// `\uXXXX`, as a pair of surrogates too; stands on the backslash.
    fn unicode(&mut self) -> Result<(), Token> {
        const BAD: Token = Token::Bad("invalid unicode escape code");
        let mut code = self.hex4(self.at + 2).ok_or(BAD)?;
        let mut len = 6;
        if (code & 0xF800) == 0xD800 {
            // A low half first, or a high one without its low one, is refused.
            if code & 0x400 != 0 || self.text.get(self.at + 6..self.at + 8) != Some(b"\\u") {
                return Err(BAD);
            }
            let low = self.hex4(self.at + 8).filter(|low| low & 0xFC00 == 0xDC00).ok_or(BAD)?;
            code = 0x10000 + ((code & 0x3FF) << 10 | low & 0x3FF);
            len = 12;
        }
        let c = char::from_u32(code).ok_or(BAD)?;
        self.scratch.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
        self.at += len;
        Ok(())
    }

    /// Pushes the value that begins with `token`.
    fn value(&mut self, token: Token) -> Result<(), Raise> {
        match token {
            Token::String => {}
            Token::Number(n) => drop(self.s.push_number(n)),
            Token::Bool(b) => drop(self.s.push_bool(b)),
            Token::Null => drop(self.s.push_null()),
            Token::ObjectBegin => self.object()?,
            Token::ArrayBegin => self.array()?,
            other => return Err(self.unexpected("value", &other)),
        }
        Ok(())
    }

    fn descend(&mut self) -> Result<(), Raise> {
        self.depth += 1;
        if self.depth <= self.set.decode_depth && self.s.reserve(4).is_ok() {
            return Ok(());
        }
        Err(Raise::from(format!("Found too many nested data structures ({}) at character {}", self.depth, self.at)))
    }

    fn object(&mut self) -> Result<(), Raise> {
        self.descend()?;
        self.s.push_table(0, 0);
        let mut token = self.next();
        if token == Token::ObjectEnd {
            self.depth -= 1;
            return Ok(());
        }
        loop {
            if token != Token::String {
                return Err(self.unexpected("object key string", &token));
            }
            match self.next() {
                Token::Colon => {}
                other => return Err(self.unexpected("colon", &other)),
            }
            let first = self.next();
            self.value(first)?;
            // SAFETY: table, key and value are on top.
            unsafe { ffi::lua_rawset(self.s.raw(), -3) };
            match self.next() {
                Token::ObjectEnd => break,
                Token::Comma => token = self.next(),
                other => return Err(self.unexpected("comma or object end", &other)),
            }
        }
        self.depth -= 1;
        Ok(())
    }

    fn array(&mut self) -> Result<(), Raise> {
        self.descend()?;
        self.s.push_table(0, 0);
        if self.set.decode_array_mt {
            push_array_mt(self.s);
            // SAFETY: the new table is on top, its metatable above it.
            unsafe { ffi::lua_setmetatable(self.s.raw(), -2) };
        }
        let mut token = self.next();
        if token == Token::ArrayEnd {
            self.depth -= 1;
            return Ok(());
        }
        for n in 1.. {
            self.value(token)?;
            self.s.set_index(-2, n);
            match self.next() {
                Token::ArrayEnd => break,
                Token::Comma => token = self.next(),
                other => return Err(self.unexpected("comma or array end", &other)),
            }
        }
        self.depth -= 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lua::host::tests::{check, fails, serve_with};

    #[test]
    fn encodes_as_lua_cjson() {
        for (lua, json) in [
            ("1", "1"),
            ("-0.5", "-0.5"),
            ("1e14", "1e+14"),
            ("123456789012345678", "1.2345678901235e+17"),
            ("0.1", "0.1"),
            ("99999999999999", "99999999999999"),
            ("{}", "{}"),
            ("cjson.empty_array", "[]"),
            ("setmetatable({}, cjson.empty_array_mt)", "[]"),
            ("setmetatable({}, cjson.array_mt)", "[]"),
            ("setmetatable({x = 1, 5}, cjson.array_mt)", "[5]"),
            ("{1, 2, nil, 4}", "[1,2,null,4]"),
            ("{[1.5] = 1}", r#"{"1.5":1}"#),
            ("{a = {true, false, cjson.null}}", r#"{"a":[true,false,null]}"#),
            (r#""a/b\"\\\n\1\127é""#, r#""a\/b\"\\\n\u0001\u007fé""#),
            ("nil", "null"),
        ] {
            check(&format!("local cjson = require 'cjson' return cjson.encode({lua})"), json);
        }
    }

    #[test]
    fn refuses_what_json_cannot_say() {
        for (lua, error) in [
            ("cjson.encode(print)", "Cannot serialise function: type not supported"),
            ("cjson.encode({[1] = 1, [100] = 1})", "Cannot serialise table: excessively sparse array"),
            ("cjson.encode({[true] = 1})", "Cannot serialise boolean: table key must be a number or string"),
            ("cjson.encode(0/0)", "Cannot serialise number: must not be NaN or Infinity"),
            (
                "(function() local t = {} t[1] = t return cjson.encode(t) end)()",
                "Cannot serialise, excessive depth (1001)",
            ),
            ("cjson.decode('')", "Expected value but found T_END at character 1"),
            ("cjson.decode('{\"a\":}')", "Expected value but found T_OBJ_END at character 6"),
            ("cjson.decode('{\"a\" 1}')", "Expected colon but found T_NUMBER at character 6"),
            ("cjson.decode('{1}')", "Expected object key string but found T_NUMBER at character 2"),
            ("cjson.decode('[1 2]')", "Expected comma or array end but found T_NUMBER at character 4"),
            ("cjson.decode('{\"a\":1 \"b\"}')", "Expected comma or object end but found T_STRING at character 8"),
            ("cjson.decode('{} x')", "Expected the end but found invalid token at character 4"),
            (
                "cjson.decode('[ \"bad escape \\\\q code\" ]')",
                "Expected value but found invalid escape code at character 15",
            ),
            ("cjson.decode('\"abc')", "Expected value but found unexpected end of string at character 5"),
            ("cjson.decode('\"a\\0b\"')", "Expected value but found unexpected end of string at character 3"),
            ("cjson.decode('[\"\\\\udc00\"]')", "Expected value but found invalid unicode escape code at character 3"),
            ("cjson.decode('[1e]')", "Expected comma or array end but found invalid token at character 3"),
            ("cjson.decode('-')", "Expected value but found invalid number at character 1"),
            ("cjson.decode('\\0a')", "JSON parser does not support UTF-16 or UTF-32"),
            ("cjson.decode(string.rep('[', 1001))", "Found too many nested data structures (1001) at character 1001"),
        ] {
            fails(&format!("local cjson = require 'cjson' local _ = {lua}"), error);
            fails(
                &format!("local cjson = require 'cjson.safe' local _, e = {lua} if e then error(e, 0) end return _"),
                error,
            );
        }
    }

    #[test]
    fn decodes_strings_numbers_and_nulls() {
        for (json, lua) in [
            (r#"[1,2.5,-3e2,0x10,1e400]"#, "v[1] == 1 and v[2] == 2.5 and v[3] == -300 and v[4] == 16 and v[5] == 1/0"),
            (r#"{"a":null}"#, "v.a == cjson.null and v.a == require('cjson.safe').null"),
            (r#""\u00e9\ud83d\ude00\n\/""#, r#"v == "é😀\n/""#),
            (r#"  [ ]  "#, "type(v) == 'table' and next(v) == nil"),
            (r#"123456789012345678"#, "v == 123456789012345678"),
            ("012", "v == 12"),
            ("{\"a\":{\"b\":[{}]}}", "next(v.a.b[1]) == nil"),
        ] {
            let chunk =
                format!("local cjson = require 'cjson' local v = cjson.decode([==[{json}]==]) return tostring({lua})");
            check(&chunk, "true");
        }
    }

    #[test]
    fn settings_belong_to_their_instance() {
        check(
            "local a, b = require('cjson').new(), require('cjson')
             a.encode_empty_table_as_object(false) a.encode_sparse_array(true) a.decode_array_with_array_mt(true)
             return a.encode({}) .. b.encode({}) .. a.encode({[1000] = 1}) .. a.encode(a.decode('[]'))",
            r#"[]{}{"1000":1}[]"#,
        );
    }

    #[test]
    fn texts_are_bounded() {
        let encode = |s: &Stack| {
            let mut encoder = Encoder { s, out: Vec::new(), max: 12, set: DEFAULTS };
            encoder.value(0)?;
            Ok(s.push_bytes(encoder.out))
        };
        for (lua, expected) in [
            ("f({'abc', 'de'})", "[\"abc\",\"de\"]"),
            ("pcall(f, {'abc', 'defg'})", "Cannot serialise, more than 12 bytes"),
            ("pcall(f, {a = 'b', c = {'def'}})", "Cannot serialise, more than 12 bytes"),
            ("f({'abc', 'de'})", "[\"abc\",\"de\"]"),
        ] {
            let chunk = format!("local a, b = {lua} return b and b:gsub('^.-:%d+: ', '') or a");
            serve_with(encode, &chunk, expected);
        }
    }

    #[test]
    fn a_long_text_leaves_no_buffer_behind() {
        let kept = || BUFFER.with_borrow(Vec::capacity);
        check("return require('cjson').encode(('x'):rep(100)):sub(1, 3)", "\"xx");
        assert!(kept() >= 100);
        check(&format!("return require('cjson').encode(('x'):rep({KEEP_BUFFER})):sub(1, 3)"), "\"xx");
        assert!(kept() <= KEEP_BUFFER, "{}", kept());
    }
}
