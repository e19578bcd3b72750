//! `ngx.log`, `print` and `ngx.errlog`: lines of error.log with the position of the caller.

use std::ffi::{CStr, c_int, c_void};

use mlua::ffi;

use crate::{
    error::Result,
    lua::{
        api::{Api, Phases, Stack},
        fast,
        host::Answer,
    },
    observe::log::{self, Level},
};

crate::export! {
    fn log_level() -> c_int, 5 => {
        c_int::from(log::level())
    }
}

pub fn register(api: &mut Api) -> Result<()> {
    let doc = "the level that is written: 4 is error";
    api.fast("log_level", "int (void)", Phases::ANY, doc, log_level as *const c_void)?;
    api.func("native.log.write", Phases::ANY, "write(level, text): a line with the caller's position", write)
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
