//! `ngx.worker`, `ngx.process`: the process and its workers.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::{
    error::Result,
    lua::{
        api::{Api, Phases, Stack},
        host::Answer,
        vm::{self, Purpose},
    },
};

static COUNT: AtomicUsize = AtomicUsize::new(1);

/// How many workers serve: `ngx.worker.count()`.
pub fn set_count(count: usize) {
    COUNT.store(count.max(1), Ordering::Relaxed);
}

static EXITING: AtomicBool = AtomicBool::new(false);

/// The gateway has begun to end: `ngx.worker.exiting()`.
pub fn set_exiting() {
    EXITING.store(true, Ordering::Relaxed);
}

pub fn register(api: &mut Api) -> Result<()> {
    let any = Phases::ANY;
    api.func("ngx.worker.pid", any, "pid(): of the process, which all workers share", |s| {
        Ok(s.push_number(std::process::id().into()))
    })?;
    api.func("ngx.worker.pids", any, "pids(): a list", |s| {
        s.push_table(1, 0);
        s.push_number(std::process::id().into());
        s.set_index(-2, 1);
        Ok(1)
    })?;
    api.func("ngx.worker.count", any, "count(): workers that serve", |s| {
        Ok(s.push_number(COUNT.load(Ordering::Relaxed) as f64))
    })?;
    api.func("ngx.worker.exiting", any, "exiting(): whether the gateway drains, or this VM is being replaced", |s| {
        let closes = vm::current().is_some_and(|vm| vm.timers.is_closing());
        Ok(s.push_bool(closes || EXITING.load(Ordering::Relaxed)))
    })?;
    let doc = "graceful_exit(): true | nil, err; the whole gateway drains, as after SIGQUIT. Raises in functions without trust";
    api.func("native.process.graceful_exit", any, doc, graceful_exit)
}

/// A worker is a thread that is not started again, so that the process drains where nginx ends one of its workers.
fn graceful_exit(s: &Stack) -> Answer {
    match vm::current().map(|vm| vm.config.purpose) {
        Some(Purpose::Functions) => return Err("signal_graceful_exit is not open to functions".into()),
        Some(Purpose::Check | Purpose::Thread) | None => return s.fail("nothing is served here"),
        Some(Purpose::Plugins | Purpose::Trusted) => {}
    }
    // SAFETY: plain numbers go in; the process hears the signal (app::control).
    match unsafe { libc::kill(libc::getpid(), libc::SIGQUIT) } {
        0 => Ok(s.push_bool(true)),
        _ => s.fail(std::io::Error::last_os_error().to_string()),
    }
}
