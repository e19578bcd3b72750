//! `ngx.timer.at`, `ngx.timer.every`: callbacks that run outside of the request which set them.

use std::{cell::Cell, ffi::c_int, rc::Rc, time::Duration};

use mlua::ffi;

use super::{
    api::{Api, Phases, Raise, Stack},
    sched::{Outcome, background, call, end_background, seconds},
    vm::{self, Vm},
};
use crate::error;

pub(super) fn register(api: &mut Api) -> error::Result<()> {
    let anywhere = Phases::ANY;
    api.func("ngx.timer.at", anywhere, "runs a function later, outside of the request", timer_at)?;
    api.func("ngx.timer.every", anywhere, "runs a function again and again", timer_every)?;
    api.func("ngx.timer.running_count", anywhere, "how many timer callbacks run", |s| {
        let vm = vm::current().ok_or("no VM runs")?;
        Ok(s.push_number(vm.timers.counts().0 as f64))
    })?;
    api.func("ngx.timer.pending_count", anywhere, "how many timers wait for their time", |s| {
        let vm = vm::current().ok_or("no VM runs")?;
        Ok(s.push_number(vm.timers.counts().1 as f64))
    })?;
    Ok(())
}

/// Timers of one VM: how many there may be, and the bell that ends them early.
pub struct Timers {
    pending: Cell<usize>,
    running: Cell<usize>,
    max_pending: usize,
    max_running: usize,
    closing: Cell<bool>,
    bell: tokio::sync::Notify,
}

/// `nginx_config.max_pending_timers` and `.max_running_timers`: APISIX's defaults.
const MAX_PENDING_TIMERS: usize = 16384;
const MAX_RUNNING_TIMERS: usize = 4096;

impl Timers {
    pub(super) fn from_config(config: &serde_json::Value) -> Timers {
        let read = |key: &str, default| {
            let of_options =
                config.pointer("/lua_options").and_then(|o| o.get(format!("lua_{key}"))?.as_str()?.parse().ok());
            let of_nginx = || config.pointer("/nginx_config")?.get(key)?.as_u64();
            of_options.or_else(of_nginx).map_or(default, |n| n as usize)
        };
        Timers {
            pending: Cell::new(0),
            running: Cell::new(0),
            max_pending: read("max_pending_timers", MAX_PENDING_TIMERS),
            max_running: read("max_running_timers", MAX_RUNNING_TIMERS),
            closing: Cell::new(false),
            bell: tokio::sync::Notify::new(),
        }
    }

    pub(super) fn close(&self) {
        self.closing.set(true);
        self.bell.notify_waiters();
    }

    pub(super) fn is_closing(&self) -> bool {
        self.closing.get()
    }

    /// How many callbacks run now and how many wait for their time.
    pub fn counts(&self) -> (usize, usize) {
        (self.running.get(), self.pending.get())
    }

    /// Waits for the end.
    pub(super) async fn closed(&self) {
        let bell = self.bell.notified();
        tokio::pin!(bell);
        bell.as_mut().enable();
        if !self.closing.get() {
            bell.await;
        }
    }

    /// Waits for the time or for the end; says whether it was the end.
    async fn wait(&self, delay: Duration) -> bool {
        let bell = self.bell.notified();
        tokio::pin!(bell);
        bell.as_mut().enable();
        if self.closing.get() {
            return true;
        }
        tokio::select! {
            () = tokio::time::sleep(delay) => self.closing.get(),
            () = bell => true,
        }
    }
}

fn timer_at(s: &Stack) -> Result<c_int, Raise> {
    timer(s, false)
}

fn timer_every(s: &Stack) -> Result<c_int, Raise> {
    timer(s, true)
}

/// `ngx.timer.at(delay, callback, args…)`, `ngx.timer.every`.
fn timer(s: &Stack, every: bool) -> Result<c_int, Raise> {
    let delay = s.arg_number(1)?;
    if every && delay == 0.0 {
        return Err("delay cannot be zero".into());
    }
    if delay < 0.0 {
        return Err(s.argument_error(1, "delay must be a positive number"));
    }
    s.arg_function(2)?;
    let vm = vm::current().ok_or("no VM runs")?;
    if vm.timers.closing.get() {
        return s.fail("process exiting");
    }
    match vm.config.purpose {
        vm::Purpose::Check => return s.fail("no timers while a plugin is checked"),
        vm::Purpose::Thread => return s.fail("no timers in a worker thread"),
        vm::Purpose::Plugins | vm::Purpose::Functions => {}
    }
    if vm.timers.pending.get() >= vm.timers.max_pending {
        return s.fail("too many pending timers");
    }
    // The callback and its arguments wait in a table.
    let n = s.top() - 1;
    s.push_table(n as usize, 0);
    for i in 1..=n {
        s.push_copy(i + 1);
        s.set_index(-2, i as usize);
    }
    // SAFETY: the table is on top; the reference is released by the task.
    let anchor = unsafe { ffi::luaL_ref(s.raw(), ffi::LUA_REGISTRYINDEX) };
    let kept = Kept { vm: vm.clone(), anchor, n };
    vm.timers.pending.set(vm.timers.pending.get() + 1);
    tokio::task::spawn_local(run_timer(kept, seconds(delay), every));
    Ok(s.push_number(1.0))
}

/// A callback and its arguments, in the registry.
struct Kept {
    vm: Rc<Vm>,
    anchor: c_int,
    n: c_int,
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.vm.release(self.anchor);
    }
}

impl Kept {
    /// Pushes `callback, premature, args…`; how many arguments.
    fn push(&self, s: &Stack, premature: bool) -> c_int {
        if s.reserve(self.n as usize + 3).is_err() {
            return 0;
        }
        s.get_index(ffi::LUA_REGISTRYINDEX, self.anchor as usize);
        let table = s.top();
        s.get_index(table, 1);
        s.push_bool(premature);
        for i in 2..=self.n {
            s.get_index(table, i as usize);
        }
        // SAFETY: the table lies below the function.
        unsafe { ffi::lua_remove(s.raw(), table) };
        self.n
    }
}

async fn run_timer(kept: Kept, delay: Duration, every: bool) {
    let timers = &kept.vm.timers;
    loop {
        let premature = timers.wait(delay).await;
        if !every {
            timers.pending.set(timers.pending.get() - 1);
        }
        if timers.running.get() >= timers.max_running {
            tracing::error!(target: "lua", "{} lua_max_running_timers are not enough", timers.max_running);
        } else {
            timers.running.set(timers.running.get() + 1);
            fire(&kept, premature).await;
            timers.running.set(timers.running.get() - 1);
        }
        if !every || premature {
            break;
        }
    }
    if every {
        timers.pending.set(timers.pending.get() - 1);
    }
}

/// Runs a timer's callback in an exchange of its own.
async fn fire(kept: &Kept, premature: bool) {
    tracing::debug!("lua ngx.timer expired");
    let mut x = background(&kept.vm);
    let outcome = call(&kept.vm, &mut x, |s| kept.push(s, premature), |_| ()).await;
    if let Outcome::Failed(text) = outcome {
        super::log_error(&x, &format!("lua entry thread aborted: runtime error: {text}"));
    }
    end_background(&kept.vm, &mut x);
    tracing::debug!("http lua close fake http connection");
}
