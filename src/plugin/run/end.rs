//! The end of a VM: `exit_worker_by_lua`, then the plugins' `destroy`. They may wait, as all others.
//!
//! A VM ends when its plugins were replaced and its last request is over, or with its worker, which waits for all that end.

use std::{rc::Rc, sync::Arc, time::Duration};

use tokio::{
    sync::{oneshot, watch},
    task::spawn_local,
};

use super::{Runner, start};
use crate::{conf::locations::Script, exchange::Phase, lua::Vm};

/// What a VM gets whose worker goes on: as much as for its start.
const LONGEST_END: Duration = if cfg!(test) { Duration::from_millis(200) } else { Duration::from_secs(60) };

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
    pub fn after(&self, vm: &Rc<Vm>, script: Option<Arc<Script>>) -> Alive {
        let (alive, gone) = oneshot::channel();
        let mut worker_ends = self.0.subscribe();
        let vm = vm.clone();
        spawn_local(async move {
            let bounded = tokio::select! {
                // An error: no runner is left to end it, and nobody counts the time.
                ends = worker_ends.wait_for(|ends| *ends) => ends.is_err(),
                _ = gone => true,
            };
            let end = run(&vm, script.as_deref());
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

async fn run(vm: &Rc<Vm>, script: Option<&Script>) {
    if let Some(script) = script
        && let Err(e) = start::script(vm, script, Phase::ExitWorker).await
    {
        tracing::error!("exit_worker_by_lua error: {e}");
    }
    if let Err(e) = start::destroy_plugins(vm).await {
        tracing::error!(target: "lua", "failed to end the plugins: {e}");
    }
}
