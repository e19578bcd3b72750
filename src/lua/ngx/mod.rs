//! `ngx.*`: one file per area, named as in lua-nginx-module.
//!
//! What is hot goes through FFI (`fast` entries) with a facade in lua/moongate/ngx.lua that the JIT compiles; what
//! waits or builds tables is a host function. Semantics are those of lua-nginx-module's README; the head of a response
//! is kept until the phase's end, so it may still change after the first `ngx.print`.

pub mod balancer;
pub mod codec;
pub mod header;
pub mod log;
pub mod object;
pub mod req;
pub mod resp;
pub mod semaphore;
pub mod shdict;
pub mod socket;
pub mod socket_pool;
pub mod socket_tcp;
pub mod socket_udp;
#[cfg(test)]
mod tests;
pub mod time;
pub mod var;
pub mod worker;

use super::api::Api;
use crate::error::Result;

/// A text that FFI hands to Lua: `moongate_str`. Valid until the request or the scratch buffer changes; Lua copies it
/// at once.
#[repr(C)]
pub struct Text {
    pub ptr: *const u8,
    pub len: usize,
}

impl Text {
    /// Points at `text`.
    pub fn set(&mut self, text: &[u8]) {
        (self.ptr, self.len) = (text.as_ptr(), text.len());
    }
}

/// A place for texts that are made on demand; one per thread, as Lua copies before the next call.
pub fn with_scratch<R>(fill: impl FnOnce(&mut Vec<u8>) -> R) -> R {
    thread_local! {
        static SCRATCH: std::cell::RefCell<Vec<u8>> = const { std::cell::RefCell::new(Vec::new()) };
    }
    SCRATCH.with_borrow_mut(|buffer| {
        buffer.clear();
        fill(buffer)
    })
}

/// Points `out` at what `fill` writes.
pub fn scratch(out: &mut Text, fill: impl FnOnce(&mut Vec<u8>)) {
    with_scratch(|buffer| {
        fill(buffer);
        out.set(buffer);
    });
}

pub fn register(api: &mut Api) -> Result<()> {
    balancer::register(api)?;
    codec::register(api)?;
    header::register(api)?;
    log::register(api)?;
    req::register(api)?;
    resp::register(api)?;
    semaphore::register(api)?;
    shdict::register(api)?;
    socket_tcp::register(api)?;
    socket_udp::register(api)?;
    time::register(api)?;
    var::register(api)?;
    worker::register(api)
}
