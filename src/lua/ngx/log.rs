//! `ngx.log`, `print` and `ngx.errlog`: lines of error.log with the position of the caller.

use std::{
    ffi::{CStr, c_int, c_void},
    sync::atomic::{AtomicI32, Ordering},
};

use mlua::ffi;

use crate::{
    error::Result,
    lua::{
        api::{Api, Phases, Stack},
        fast,
        host::Answer,
    },
};

/// nginx's levels, 0 to 8.
pub const LEVELS: [&str; 9] = ["stderr", "emerg", "alert", "crit", "error", "warn", "notice", "info", "debug"];

/// Longest text of one line, as nginx cuts it.
const MAX_LINE: usize = 4096;

/// What is written: lines of this level and more severe ones. `warn`, until `set_level`.
static LEVEL: AtomicI32 = AtomicI32::new(5);

/// `error_log_level`: 0 to 8.
pub fn set_level(level: i32) {
    LEVEL.store(level.clamp(0, 8), Ordering::Relaxed);
}

/// The number of a level's name in config.yaml.
pub fn level_of(name: &str) -> Option<i32> {
    LEVELS.iter().position(|l| *l == name || (*l == "error" && name == "err")).map(|n| n as i32)
}

crate::export! {
    fn log_level() -> c_int, 5 => {
        LEVEL.load(Ordering::Relaxed)
    }
}

pub fn register(api: &mut Api) -> Result<()> {
    let doc = "the level that is written: 4 is error";
    api.fast("log_level", "int (void)", Phases::ANY, doc, log_level as *const c_void)?;
    api.func("native.log.write", Phases::ANY, "write(level, text): a line with the caller's position", write)
}

fn write(s: &Stack) -> Answer {
    let level = s.arg_number(1)? as i32;
    let text = s.arg_bytes(2)?;
    let text = String::from_utf8_lossy(&text[..text.len().min(MAX_LINE)]);
    emit(level, &format!("{}{text}", caller(s)));
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

/// Writes a line, with the request that runs.
pub fn emit(level: i32, text: &str) {
    let name = LEVELS[level.clamp(0, 8) as usize];
    macro_rules! line {
        ($level:ident) => {
            match fast::exchange() {
                Some(x) => {
                    let method = String::from_utf8_lossy(&x.request.method);
                    let target = String::from_utf8_lossy(&x.request.target);
                    tracing::$level!(
                        target: "lua",
                        level = name,
                        connection = x.conn.serial,
                        client = %x.remote().ip(),
                        request = %format_args!("{method} {target}"),
                        "{text}"
                    )
                }
                None => tracing::$level!(target: "lua", level = name, "{text}"),
            }
        };
    }
    match level {
        ..=4 => line!(error),
        5 => line!(warn),
        6 | 7 => line!(info),
        _ => line!(debug),
    }
}
