//! The Lua VMs: making one, calling into it, what it may call back, and the bounds it runs in.
//!
//! A VM belongs to one thread. `api` is the table of functions that scripts see, `sched` drives coroutines and their
//! waits, `fast` holds what LuaJIT reaches through FFI, `limits` stops what runs away. This module owns no logic of
//! the gateway: it binds what `exchange`, `shdict`, `store` and the others do.

pub mod api;
pub mod convert;
pub mod counters;
pub mod fast;
pub mod host;
pub mod limits;
pub mod ngx;
pub mod preload;
pub mod sched;
pub mod timers;
pub mod vm;

pub use api::{Api, Phases, Raise, Stack, Wait};
pub use counters::Counters;
pub use sched::{Op, Value, Values};
pub use vm::{Vm, VmConfig};

use crate::{error::Result, observe::log::Level};

/// Everything that fills the API table, in order. An area adds its `register` here.
pub const REGISTRARS: &[fn(&mut Api) -> Result<()>] =
    &[fast::register, sched::register, timers::register, host::register, ngx::register];

/// Says in error.log what went wrong in a script, with the request it happened in.
pub fn log_error(x: &crate::exchange::Exchange, text: &str) {
    x.log(Level::Error, format!("[lua] {text}").as_bytes());
}
