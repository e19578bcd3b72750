//! The start of a VM: the scripts and plugins' functions that run before it serves. They may wait, as all others.
//!
//! At the start of a worker it listens once they are done. When plugins change, the old VM serves on until then; nearly always they
//! wait for nothing, and the new VM is there for the request that has found the change.

use std::{
    cell::RefCell,
    future::Future,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use mlua::ffi;
use tokio::task::{AbortHandle, spawn_local};

use super::{Ends, Generation, Groups, Runner};
use crate::{
    conf::locations::Script,
    error::{Error, Result},
    exchange::Phase,
    lua::{
        Stack, Vm,
        sched::{self, Outcome},
        vm,
    },
    plugin::registry::Setup,
    store::Snapshot,
};

/// All of it together: what waits longer will hardly come, and its worker serves nobody meanwhile.
const LONGEST_START: Duration = if cfg!(test) { Duration::from_millis(200) } else { Duration::from_secs(60) };

type Made = Result<Rc<Generation>>;

/// A VM that still starts, beside the one that serves.
pub(super) struct Renewal {
    /// `Snapshot::plugins_generation` that it is made for.
    number: u64,
    made: Rc<RefCell<Option<Made>>>,
    task: AbortHandle,
}

#[cfg(test)]
impl Renewal {
    pub fn has_ended(&self) -> bool {
        self.task.is_finished()
    }
}

impl Drop for Renewal {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// How far the change to a new VM is.
enum Change {
    Made(Made),
    Waiting,
}

impl Generation {
    /// A VM with its plugins, ready to serve. `before`: the one whose place it is to take.
    pub(super) async fn started(
        setup: Setup,
        worker: usize,
        snapshot: Arc<Snapshot>,
        before: Option<Rc<Generation>>,
        (groups, ends): (Rc<Groups>, Rc<Ends>),
    ) -> Result<Rc<Generation>> {
        let load = Self::load(&setup, worker, &snapshot, before.as_ref(), (&groups, &ends));
        let made = tokio::time::timeout(LONGEST_START, load).await.unwrap_or_else(|_| {
            let text = format!("plugins' init and init_by_lua waited for more than {LONGEST_START:?}");
            Err(Error::script(text).context("start a VM"))
        });
        if let (Err(_), Some(before)) = (&made, before) {
            before.step_up().await;
        }
        made
    }
}

/// Runs a script of the start, or of the end.
pub(super) async fn script(vm: &Rc<Vm>, script: &Script, phase: Phase) -> Result<()> {
    let chunk = vm::load_script(&vm.lua, script).map_err(Error::script)?;
    let anchor = vm.keep(chunk)?;
    let ran = call(vm, phase, anchor, |_| ()).await;
    vm.release(anchor);
    ran
}

/// Runs every plugin's `init`; what failed, by name.
pub(super) async fn init_plugins(vm: &Rc<Vm>) -> Result<Vec<(String, String)>> {
    let anchor = vm.function("moongate.plugins", "init")?;
    let failed = call(vm, Phase::Init, anchor, |s| {
        let mut failed = Vec::new();
        let text = |s: &Stack, i| String::from_utf8_lossy(s.bytes(i).unwrap_or_default()).into_owned();
        let _: std::result::Result<(), ()> = s.pairs(1, |s| {
            failed.push((text(s, -2), text(s, -1)));
            Ok(())
        });
        failed
    });
    let failed = failed.await;
    vm.release(anchor);
    failed
}

/// Runs every plugin's `destroy`.
pub(super) async fn destroy_plugins(vm: &Rc<Vm>) -> Result<()> {
    let anchor = vm.function("moongate.plugins", "destroy")?;
    let destroyed = call(vm, Phase::ExitWorker, anchor, |_| ()).await;
    vm.release(anchor);
    destroyed
}

async fn call<T>(vm: &Rc<Vm>, phase: Phase, anchor: i32, read: impl FnOnce(&Stack) -> T) -> Result<T> {
    let mut x = sched::background(vm);
    x.phase = phase;
    let push = |s: &Stack| {
        s.get_index(ffi::LUA_REGISTRYINDEX, anchor as usize);
        0
    };
    let outcome = sched::call(vm, &mut x, push, read).await;
    sched::end_background(vm, &mut x);
    match outcome {
        Outcome::Done(result) => Ok(result),
        Outcome::Exit(code) => Err(Error::script(format!("ngx.exit({code}) ends nothing here"))),
        Outcome::Failed(text) => Err(Error::script(text)),
    }
}

impl Runner {
    /// The snapshot is newer than what was followed, or a VM for it still starts. True: nothing is left to be done for it.
    pub(super) fn renew(&self, snapshot: &Arc<Snapshot>) -> bool {
        let made = match self.change(snapshot) {
            Change::Made(made) => made,
            Change::Waiting => return false,
        };
        match made {
            Ok(next) => self.install(next),
            Err(e) => tracing::error!(target: "lua", "failed to load the plugins anew, the old ones go on: {e}"),
        }
        true
    }

    fn change(&self, snapshot: &Arc<Snapshot>) -> Change {
        let number = snapshot.plugins_generation;
        let mut renewal = self.renewal.borrow_mut();
        if let Some(under_way) = renewal.as_ref().filter(|r| r.number == number) {
            let Some(made) = under_way.made.take() else { return Change::Waiting };
            *renewal = None;
            return Change::Made(made);
        }
        // In APISIX's words, which people look for.
        tracing::info!("start to hot reload plugins");
        let (setup, shared) = (self.setup.clone(), (self.groups.clone(), self.ends.clone()));
        let before = Some(self.generation.borrow().clone());
        let mut start = Box::pin(Generation::started(setup, self.worker, snapshot.clone(), before, shared));
        if let Poll::Ready(made) = once(start.as_mut()) {
            *renewal = None;
            return Change::Made(made);
        }
        let made = Rc::new(RefCell::new(None));
        let place = made.clone();
        let task = spawn_local(async move { *place.borrow_mut() = Some(start.await) }).abort_handle();
        *renewal = Some(Renewal { number, made, task });
        Change::Waiting
    }
}

/// Lets a future run until it first waits. Whoever goes on with it polls it at once, so that no wake is lost.
fn once<T>(future: Pin<&mut impl Future<Output = T>>) -> Poll<T> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}
