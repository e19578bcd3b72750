//! What LuaJIT reaches through FFI: no raise, no yield, no way back into the VM, no panic that leaves.
//!
//! The request is found through one cell of the thread that the driver sets before every resume. An export is
//! declared with `export!`, which catches panics, and registered with `Api::fast`.

use std::{
    cell::Cell,
    ffi::{c_int, c_void},
    ptr,
};

use super::api::{Api, Phases};
use crate::{
    error::Result,
    exchange::{Exchange, Phase},
};

thread_local! {
    static CURRENT: Cell<*mut Exchange> = const { Cell::new(ptr::null_mut()) };
    static PANICKED: Cell<bool> = const { Cell::new(false) };
}

/// The request that runs on this thread now. The borrow must end before Lua runs again.
#[inline]
pub fn exchange<'a>() -> Option<&'a mut Exchange> {
    // SAFETY: `enter` set it from a live `&mut Exchange` and clears it before that borrow ends; one thread, and
    // callers drop the reference before they return to Lua.
    unsafe { CURRENT.get().as_mut() }
}

/// Where that request is, for what may not borrow it.
pub(super) fn place() -> *const Exchange {
    CURRENT.get()
}

/// The same without what is no request: a timer's run, a handshake, the start of a VM.
#[inline]
pub fn request<'a>() -> Option<&'a mut Exchange> {
    exchange().filter(|x| Phases::REQUEST.has(x.phase))
}

/// The phase that runs; outside of any: `Init`.
#[inline]
pub fn phase() -> Phase {
    exchange().map_or(Phase::Init, |x| x.phase)
}

/// Makes `x` the current request while `run` runs.
#[inline]
pub fn enter<R>(x: &mut Exchange, run: impl FnOnce() -> R) -> R {
    struct Restore(*mut Exchange);
    impl Drop for Restore {
        fn drop(&mut self) {
            CURRENT.set(self.0);
        }
    }
    let _restore = Restore(CURRENT.replace(x));
    run()
}

/// A host function panicked: the driver fails the phase even when a script swallows the error.
pub fn note_panic() {
    PANICKED.set(true);
}

/// Whether one panicked since the last call.
pub fn take_panic() -> bool {
    PANICKED.replace(false)
}

/// Runs an export's body; a panic is noted and `on_panic` returned.
#[inline]
pub fn guard<R>(on_panic: R, body: impl FnOnce() -> R) -> R {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)) {
        Ok(r) => r,
        Err(_) => {
            note_panic();
            on_panic
        }
    }
}

/// Declares `extern "C"` functions for FFI: `export! { fn name(a: *const u8, n: usize) -> c_int, -1 => { … } }`, where
/// the expression after the return type is what a panic returns. What Lua owes to all of them is said once, above.
#[macro_export]
macro_rules! export {
    ($($(#[$meta:meta])* fn $name:ident($($arg:ident: $ty:ty),* $(,)?) -> $ret:ty, $on_panic:expr => $body:block)*) => {$(
        $(#[$meta])*
        #[allow(clippy::undocumented_unsafe_blocks, reason = "t/tidy.rs: each has one, or one stands above all")]
        pub(crate) extern "C" fn $name($($arg: $ty),*) -> $ret {
            $crate::lua::fast::guard($on_panic, move || $body)
        }
    )*};
}

/// Bytes that FFI passed. Empty for a null pointer.
///
/// # Safety
/// `p` points at `len` readable bytes that live as long as the result is used.
#[inline]
pub unsafe fn bytes<'a>(p: *const u8, len: usize) -> &'a [u8] {
    // SAFETY: by contract.
    if p.is_null() { &[] } else { unsafe { std::slice::from_raw_parts(p, len) } }
}

export! {
    /// Index of the request's tables in the VM; 0 without a request.
    fn mg_slot() -> c_int, 0 => {
        exchange().and_then(|x| x.lua.slot).map_or(0, |s| s as c_int)
    }

    /// Bytes by which the call of an uploaded function may make its VM grow; -1: none runs.
    fn mg_call_memory() -> f64, -1.0 => {
        exchange().and_then(|x| x.lua.function.as_ref()).map_or(-1.0, |call| call.memory_kb as f64 * 1024.0)
    }

    /// `Phase as int`; `Init` outside of a request.
    fn mg_phase() -> c_int, 0 => {
        phase() as c_int
    }
}

pub fn register(api: &mut Api) -> Result<()> {
    api.fast(
        "slot",
        "int (void)",
        Phases::ANY,
        "index of the request's tables; 0: no request",
        mg_slot as *const c_void,
    )?;
    api.fast(
        "call_memory",
        "double (void)",
        Phases::ANY,
        "bytes by which a function's call may make its VM grow; -1: no function runs",
        mg_call_memory as *const c_void,
    )?;
    api.fast("phase", "int (void)", Phases::ANY, "number of the phase that runs", mg_phase as *const c_void)
}
