//! Native modules under the names that plugins `require`.
//!
//! The Rust side registers functions under `native.<area>`; the module that a plugin names is a Lua file in lua/ on top of them.

pub mod apisix;
pub mod cjson;
pub mod crypto;
pub mod jwt;
pub mod regex;

use std::ffi::c_int;

use super::api::{Api, Raise};
use crate::error::Result;

/// What a host function answers: how many results it pushed, or an error to raise.
pub type Answer = std::result::Result<c_int, Raise>;

/// Makes a `lua_CFunction` of a `fn(&Stack) -> Answer` for closures that carry upvalues of their own. The second
/// upvalue must be the function's name, for messages.
macro_rules! native {
    ($f:path) => {{
        unsafe extern "C-unwind" fn native(l: *mut mlua::ffi::lua_State) -> std::ffi::c_int {
            // SAFETY: called by Lua with its state; `raise` runs when nothing of Rust is left to be dropped.
            unsafe {
                match $f(&$crate::lua::api::Stack::new(l)) {
                    Ok(results) => results,
                    Err(raise) => $crate::lua::host::throw(l, raise),
                }
            }
        }
        native as mlua::ffi::lua_CFunction
    }};
}
pub(crate) use native;

/// Raises with the position of the Lua code that called.
///
/// # Safety
/// `l` is the state of the running C function.
pub(crate) unsafe fn throw(l: *mut mlua::ffi::lua_State, raise: Raise) -> c_int {
    use mlua::ffi;
    unsafe {
        ffi::luaL_where(l, 1);
        ffi::lua_pushlstring_(l, raise.0.as_ptr().cast(), raise.0.len());
        drop(raise);
        ffi::lua_concat(l, 2);
        ffi::lua_error(l)
    }
}

pub fn register(api: &mut Api) -> Result<()> {
    cjson::register(api)?;
    crypto::register(api)?;
    jwt::register(api)?;
    regex::register(api)?;
    apisix::register(api)
}

#[cfg(test)]
pub(crate) mod tests {
    use crate::lua::{Vm, VmConfig};

    /// Runs a chunk in a VM of its own and compares what it returns as a string.
    #[track_caller]
    pub(crate) fn check(chunk: &str, expected: &str) {
        let vm = Vm::new(VmConfig::default()).expect("a VM");
        match vm.lua.load(chunk).set_name("=test").eval::<mlua::LuaString>() {
            Ok(got) => assert_eq!(String::from_utf8_lossy(&got.as_bytes()), expected, "{chunk}"),
            Err(e) => panic!("{chunk}\n{e}"),
        }
    }

    /// Runs a chunk for a request and compares what it returns; gives the request back.
    #[track_caller]
    pub(crate) fn serve(
        prepare: impl FnOnce(&mut crate::exchange::Exchange),
        chunk: &str,
        expected: &str,
    ) -> crate::exchange::Exchange {
        use crate::{exchange, lua::fast, store::Snapshot};
        let vm = Vm::new(VmConfig::default()).expect("a VM");
        let peer = "127.0.0.1:4000".parse().expect("an address");
        let conn = exchange::Connection { serial: 7, peer, local: peer, tls: None, proxy: None };
        let mut x = exchange::Exchange::new(conn.into(), Snapshot::default().into());
        x.phase = exchange::Phase::Access;
        prepare(&mut x);
        let got = fast::enter(&mut x, || vm.lua.load(chunk).set_name("=test").eval::<mlua::LuaString>());
        match got {
            Ok(got) => assert_eq!(String::from_utf8_lossy(&got.as_bytes()), expected, "{chunk}"),
            Err(e) => panic!("{chunk}\n{e}"),
        }
        x
    }

    /// Runs a chunk that must raise an error with this text, after the position.
    #[track_caller]
    pub(crate) fn fails(chunk: &str, text: &str) {
        let chunk = format!(
            "local ok, e = pcall(function() {chunk} end)
             return (not ok and tostring(e):gsub('^test:%d+: ', '') or 'no error')"
        );
        check(&chunk, text);
    }
}
