//! `ngx.semaphore`: light threads of one VM wait for each other.

use std::{cell::Cell, rc::Rc, time::Duration};

use tokio::sync::Semaphore;

use super::object;
use crate::{
    error::Result,
    lua::{
        Op, Value, Wait,
        api::{Api, Phases, Raise, Stack},
        sched::failed,
    },
};

/// Resources that one post may add: what tokio can count, with room.
const MAX_POST: f64 = 1e6;

struct Sema {
    permits: Semaphore,
    waiting: Cell<i64>,
}

/// Counts a wait from its start to its end, however that comes.
struct Waiting(Rc<Sema>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.waiting.set(self.0.waiting.get() - 1);
    }
}

pub fn register(api: &mut Api) -> Result<()> {
    let any = Phases::ANY;
    api.func("native.semaphore.new", any, "new(n): a semaphore with n resources", |s| {
        let n = amount(s, 1, 0.0)?;
        Ok(object::push(s, Rc::new(Sema { permits: Semaphore::new(n), waiting: Cell::new(0) })))
    })?;
    api.func("native.semaphore.post", any, "post(semaphore, n)", |s| {
        object::get::<Sema>(s, 1)?.permits.add_permits(amount(s, 2, 1.0)?);
        Ok(s.push_bool(true))
    })?;
    api.func("native.semaphore.count", any, "count(semaphore): resources, or less than 0: who waits", |s| {
        let sema = object::get::<Sema>(s, 1)?;
        Ok(s.push_number((sema.permits.available_permits() as i64 - sema.waiting.get()) as f64))
    })?;
    api.wait("native.semaphore.wait", any, "wait(semaphore, timeout): true; nil, \"timeout\"", wait)
}

fn amount(s: &Stack, i: i32, default: f64) -> std::result::Result<usize, Raise> {
    let n = s.opt_number(i)?.unwrap_or(default);
    if (0.0..=MAX_POST).contains(&n) { Ok(n as usize) } else { Err(s.argument_error(i, "out of range")) }
}

fn wait(s: &Stack) -> std::result::Result<Wait, Raise> {
    let sema = object::get::<Sema>(s, 1)?;
    let timeout = s.arg_number(2)?.clamp(0.0, 1e9);
    if let Ok(permit) = sema.permits.try_acquire() {
        permit.forget();
        return Ok(Wait::Ready(s.push_bool(true)));
    }
    if timeout == 0.0 {
        s.push_nil();
        s.push_bytes("timeout");
        return Ok(Wait::Ready(2));
    }
    sema.waiting.set(sema.waiting.get() + 1);
    let waiting = Waiting(sema.clone());
    Ok(Wait::Park(Op::future(async move {
        let _waiting = waiting;
        match tokio::time::timeout(Duration::from_secs_f64(timeout), sema.permits.acquire()).await {
            Ok(Ok(permit)) => {
                permit.forget();
                smallvec::smallvec![Value::Bool(true)]
            }
            _ => failed("timeout"),
        }
    })))
}
