//! `ngx.log`, `print` and `ngx.errlog`: lines of error.log with the position of the caller.

use std::ffi::{CStr, c_int, c_void};

use mlua::ffi;

use crate::{
    error::Result,
    lua::{
        api::{Api, Phases, Stack},
        fast,
        host::Answer,
        vm::{self, Purpose},
    },
    observe::{
        capture,
        log::{self, Level},
    },
};

/// Captured lines that one call gives: more stay for the next.
const MAX_CAPTURED: usize = 100_000;

crate::export! {
    fn log_level() -> c_int, 5 => {
        // What a function says is kept whatever error.log takes.
        let kept = if fast::exchange().is_some_and(|x| x.lua.function.is_some()) { Level::Info } else { Level::Stderr };
        c_int::from(log::level().max(kept as u8))
    }
}

pub fn register(api: &mut Api) -> Result<()> {
    let doc = "the level that is written: 4 is error";
    api.fast("log_level", "int (void)", Phases::ANY, doc, log_level as *const c_void)?;
    let any = Phases::ANY;
    api.func("native.log.write", any, "write(level, text): a line with the caller's position", write)?;
    api.func("native.log.raw", any, "raw(level, text): a line as it is; false for a level that is none", raw)?;
    let doc = "capture_level(level): true | nil, err; the least severe line that is captured";
    api.func("native.log.capture_level", any, doc, capture_level)?;
    let doc =
        "captured(max, list?): list | nil, err; level, time and text of captured lines, which are gone then; 0: all";
    api.func("native.log.captured", any, doc, captured)
}

const NOT_SET: &str = "directive \"lua_capture_error_log\" is not set";

/// Other people's lines are nothing for an uploaded function.
fn is_open() -> bool {
    vm::current().is_none_or(|vm| vm.config.purpose != Purpose::Functions)
}

fn raw(s: &Stack) -> Answer {
    let level = s.arg_number(1)?;
    let level = if (0.0..=8.0).contains(&level) { Level::from_number(level as u8) } else { None };
    let Some(level) = level else { return Ok(s.push_bool(false)) };
    emit(level, s.arg_bytes(2)?);
    Ok(s.push_bool(true))
}

fn capture_level(s: &Stack) -> Answer {
    let level = s.arg_number(1)?;
    let level = if (0.0..=8.0).contains(&level) { Level::from_number(level as u8) } else { None };
    match level {
        _ if !is_open() => s.fail("not open to functions"),
        None => s.fail("bad log level"),
        Some(level) if capture::set_level(level) => Ok(s.push_bool(true)),
        Some(_) => s.fail(NOT_SET),
    }
}

fn captured(s: &Stack) -> Answer {
    let max = s.arg_number(1)?;
    let max = if max >= 1.0 { (max as usize).min(MAX_CAPTURED) } else { MAX_CAPTURED };
    if !is_open() {
        return s.fail("not open to functions");
    }
    let Some(lines) = capture::take(max) else { return s.fail(NOT_SET) };
    match s.is_table(2) {
        true => s.push_copy(2),
        false => s.push_table(lines.len() * 3, 0),
    };
    let list = s.top();
    for (i, line) in lines.iter().enumerate() {
        s.push_number(f64::from(line.level as u8));
        s.set_index(list, i * 3 + 1);
        s.push_number(line.time);
        s.set_index(list, i * 3 + 2);
        s.push_bytes(&line.text);
        s.set_index(list, i * 3 + 3);
    }
    s.push_nil();
    s.set_index(list, lines.len() * 3 + 1);
    Ok(1)
}

fn write(s: &Stack) -> Answer {
    let level = Level::from_number(s.arg_number(1)?.clamp(0.0, 8.0) as u8).unwrap_or(Level::Error);
    let mut line = b"[lua] ".to_vec();
    line.extend_from_slice(caller(s).as_bytes());
    line.extend_from_slice(s.arg_bytes(2)?);
    emit(level, &line);
    Ok(0)
}

/// `file.lua:12: name(): ` of the Lua function that runs; `ngx.log` leaves the stack by a tail call.
fn caller(s: &Stack) -> String {
    // SAFETY: the structure is filled before it is read; its texts live as long as the function does.
    unsafe {
        let mut ar: ffi::lua_Debug = std::mem::zeroed();
        if ffi::lua_getstack(s.raw(), 1, &mut ar) == 0 || ffi::lua_getinfo(s.raw(), c"nSl".as_ptr(), &mut ar) == 0 {
            return String::new();
        }
        let source = CStr::from_ptr(ar.short_src.as_ptr()).to_string_lossy();
        let file = source.rsplit('/').next().unwrap_or(&source);
        if ar.name.is_null() {
            return format!("{file}:{}: ", ar.currentline);
        }
        format!("{file}:{}: {}(): ", ar.currentline, CStr::from_ptr(ar.name).to_string_lossy())
    }
}

/// Writes a line, with the request that runs; a timer has none.
fn emit(level: Level, line: &[u8]) {
    match fast::exchange() {
        Some(x) => x.log(level, line),
        None => log::line(level, line, None),
    }
}
