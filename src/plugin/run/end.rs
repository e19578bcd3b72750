//! The end of a VM: `exit_worker_by_lua`, then the plugins' `destroy`. They may wait, as all others.
//!
//! Where plugins take the place of others and no request is inside these, `destroy` runs before the new ones' `init`, as in APISIX: what
//! a plugin may have only once (a name, a file) changes hands. Else a request would find its plugins destroyed, so that it comes later.
//!
//! A VM ends when its plugins were replaced and its last request is over, or with its worker, which waits for all that end.

use std::{cell::Cell, rc::Rc, sync::Arc, time::Duration};

use tokio::{
    sync::{oneshot, watch},
    task::spawn_local,
};

use super::{Generation, Runner, start};
use crate::{conf::locations::Script, exchange::Phase, lua::Vm};

/// What a VM gets whose worker goes on: as much as for its start.
const LONGEST_END: Duration = if cfg!(test) { Duration::from_millis(200) } else { Duration::from_secs(60) };

/// What plugins get that others wait to follow; the rest of the wait is cut off.
pub(super) const LONGEST_STEP: Duration = if cfg!(test) { Duration::from_millis(50) } else { Duration::from_secs(5) };

/// The VMs of one worker whose end has not run. Each has a receiver: true is the worker's end.
pub(super) struct Ends(watch::Sender<bool>);

/// Keeps a VM from its end.
pub(super) type Alive = oneshot::Sender<()>;

impl Default for Ends {
    fn default() -> Self {
        Ends(watch::Sender::new(false))
    }
}

impl Ends {
    /// Runs the end of `vm` once the result is dropped, or when the worker ends. A task does: whoever drops it may be inside a VM.
    /// `stepped_down`: `destroy` has run already.
    pub fn after(&self, vm: &Rc<Vm>, script: Option<Arc<Script>>, stepped_down: Rc<Cell<bool>>) -> Alive {
        let (alive, gone) = oneshot::channel();
        let mut worker_ends = self.0.subscribe();
        let vm = vm.clone();
        spawn_local(async move {
            let bounded = tokio::select! {
                // An error: no runner is left to end it, and nobody counts the time.
                ends = worker_ends.wait_for(|ends| *ends) => ends.is_err(),
                _ = gone => true,
            };
            let end = run(&vm, script.as_deref(), &stepped_down);
            if !bounded {
                end.await;
            } else if tokio::time::timeout(LONGEST_END, end).await.is_err() {
                tracing::error!(
                    "exit_worker_by_lua and plugins' destroy waited for more than {LONGEST_END:?}: cut off"
                );
            }
        });
        alive
    }

    #[cfg(test)]
    pub fn open(&self) -> usize {
        self.0.receiver_count()
    }

    /// Ends all VMs, and waits until they have.
    async fn all(&self) {
        self.0.send_replace(true);
        self.0.closed().await;
    }
}

impl Runner {
    /// Runs what scripts and plugins have for the end of the worker; requests that still run are cut off after that. The caller limits its
    /// time.
    pub async fn end(&self) {
        self.ends.all().await;
    }
}

impl Generation {
    /// Runs `destroy` of plugins whose place others are about to take. Not while a request is inside them: then it runs when the last
    /// such has ended.
    pub(super) async fn step_down(self: &Rc<Self>) {
        if self.is_busy() || self.stepped_down.replace(true) {
            return;
        }
        match tokio::time::timeout(LONGEST_STEP, start::destroy_plugins(&self.vm)).await {
            Ok(Ok(())) => {}
            Ok(Err(e)) => tracing::error!(target: "lua", "failed to end the plugins: {e}"),
            Err(_) => {
                tracing::error!(
                    "plugins' destroy waited for more than {LONGEST_STEP:?}: cut off, others take their place"
                )
            }
        }
    }

    /// Nobody took the place after all: the plugins begin again.
    pub(super) async fn step_up(&self) {
        if !self.stepped_down.replace(false) {
            return;
        }
        match tokio::time::timeout(LONGEST_STEP, start::init_plugins(&self.vm)).await {
            Ok(Ok(failed)) => {
                for (name, text) in failed {
                    tracing::error!(target: "lua", "failed to init plugin [{name}]: {text}");
                }
            }
            Ok(Err(e)) => tracing::error!(target: "lua", "failed to begin the plugins again: {e}"),
            Err(_) => tracing::error!("plugins' init waited for more than {LONGEST_STEP:?}: cut off"),
        }
    }

    /// Whether a request is inside, or something else that waits (an endpoint of the control API, a registry's answer). The runner and
    /// whoever asks hold one reference each, and so does every plan.
    fn is_busy(self: &Rc<Self>) -> bool {
        const HELD: usize = 2;
        self.runs.get() > 0 || Rc::strong_count(self) > HELD + self.plans.get()
    }
}

async fn run(vm: &Rc<Vm>, script: Option<&Script>, stepped_down: &Cell<bool>) {
    if let Some(script) = script
        && let Err(e) = start::script(vm, script, Phase::ExitWorker).await
    {
        tracing::error!("exit_worker_by_lua error: {e}");
    }
    if !stepped_down.replace(true)
        && let Err(e) = start::destroy_plugins(vm).await
    {
        tracing::error!(target: "lua", "failed to end the plugins: {e}");
    }
}
