//! Drives coroutines: resumes them, waits for what they wait for, ends them.
//!
//! A phase call runs in a recycled coroutine. A host function that must wait hands the driver an operation and
//! yields; user coroutines pass such a yield outwards (boot.lua), so that it reaches the driver from any depth. Light
//! threads (`ngx.thread.spawn`) run in the same call; the call ends when all of them have. `ngx.exit` ends it at once.

use std::{
    cell::RefCell,
    ffi::{c_int, c_void},
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use mlua::ffi;
use smallvec::SmallVec;

use super::api::{Api, Phases, Raise, Stack, Wait};
use crate::{error::Result, exchange::Exchange};

/// What an operation gives back to the coroutine: the results of the function that waited.
pub type Values = SmallVec<[Value; 3]>;

/// One result.
pub enum Value {
    Nil,
    Bool(bool),
    Number(f64),
    Bytes(Vec<u8>),
    /// Whatever else; pushes exactly one value.
    Push(Box<dyn FnOnce(&Stack)>),
}

impl Value {
    pub fn text(text: impl Into<Vec<u8>>) -> Value {
        Value::Bytes(text.into())
    }

    fn push(self, stack: &Stack) {
        match self {
            Value::Nil => stack.push_nil(),
            Value::Bool(b) => stack.push_bool(b),
            Value::Number(n) => stack.push_number(n),
            Value::Bytes(b) => stack.push_bytes(b),
            Value::Push(f) => {
                f(stack);
                1
            }
        };
    }
}

/// `nil, text` as results.
pub fn failed(text: impl Into<Vec<u8>>) -> Values {
    smallvec::smallvec![Value::Nil, Value::text(text)]
}

/// What a parked coroutine waits for. Whoever makes one bounds its time.
pub enum Op {
    /// Needs nothing of the request.
    Future(Pin<Box<dyn Future<Output = Values>>>),
    /// Is polled with the request (its body, its client).
    Exchange(Box<dyn FnMut(&mut Context<'_>, &mut Exchange) -> Poll<Values>>),
    /// `ngx.exit` and its like: the coroutine is not resumed, all light threads of the call end. The host function
    /// has put what is to be answered into the exchange; the number is what it was called with.
    Exit(i64),
    /// A coroutine of the top level yields: others run, then it goes on.
    Yield,
    /// `ngx.thread.spawn`: the new coroutine, function and arguments on its stack, kept by a registry reference.
    Spawn(NewThread),
    /// `ngx.thread.wait`: the first of these that ends.
    Join(SmallVec<[*mut ffi::lua_State; 2]>),
    /// `ngx.thread.kill`
    Kill(*mut ffi::lua_State),
}

/// A coroutine that has not run yet.
pub struct NewThread {
    pub(super) l: *mut ffi::lua_State,
    pub(super) anchor: c_int,
    pub(super) args: c_int,
}

impl Op {
    pub fn future(f: impl Future<Output = Values> + 'static) -> Op {
        Op::Future(Box::pin(f))
    }
}

thread_local! {
    static PARKED: RefCell<Option<Op>> = const { RefCell::new(None) };
}

static MARKER: u8 = 0;

/// The value that a host's yield carries.
pub(super) fn marker() -> *mut c_void {
    (&raw const MARKER).cast_mut().cast()
}

/// Leaves the operation for the driver, which the coming yield reaches.
pub(super) fn park(op: Op) {
    PARKED.with_borrow_mut(|p| *p = Some(op));
}

pub fn register(api: &mut Api) -> Result<()> {
    let anywhere = Phases::ANY;
    api.wait("ngx.sleep", anywhere, "sleeps for so many seconds", sleep)?;
    Ok(())
}

/// The longest that one `ngx.sleep` takes: a year, so that no sum of instants overflows.
const MAX_SLEEP_SECS: f64 = 365.0 * 86_400.0;

fn sleep(s: &Stack) -> Result<Wait, Raise> {
    let secs = s.arg_number(1)?;
    if secs < 0.0 {
        return Err(s.argument_error(1, &format!("invalid sleep duration \"{secs}\"")));
    }
    let time = Duration::from_secs_f64(if secs.is_finite() { secs.min(MAX_SLEEP_SECS) } else { MAX_SLEEP_SECS });
    Ok(Wait::Park(Op::future(async move {
        tokio::time::sleep(time).await;
        Values::new()
    })))
}

/// How a call ended.
#[derive(Debug)]
pub enum Outcome<T> {
    /// The entry function returned.
    Done(T),
    /// `ngx.exit` with this number.
    Exit(i64),
    /// A Lua error: message and traceback.
    Failed(String),
}
