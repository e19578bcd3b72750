//! The Lua API as its documents have it, on the real binary: what each function gives, and where it may be called.

mod support;

#[path = "api/functions.rs"]
mod functions;
#[path = "api/vars.rs"]
mod vars;
