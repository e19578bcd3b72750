//! Calls of functions that no client asks for, by a schedule: the first worker runs them.

use std::sync::Arc;

use tokio::sync::oneshot;

use super::{Runner, function::Call, mock::nobodys, roll};
use crate::{exchange::Phase, model::Id, observe::functions::Trigger, store::Snapshot};

/// What a worker is asked to run.
pub struct Errand {
    pub id: Id,
    /// The function's version: another one is not run.
    pub uid: u64,
    /// The time that the run is for, in seconds since the epoch.
    pub at: i64,
    /// Answered when it has ended.
    pub done: oneshot::Sender<()>,
}

impl Runner {
    /// Runs an errand to its end. Whoever asked may have lost patience.
    pub async fn errand(&self, Errand { id, uid, at, done }: Errand, snapshot: Arc<Snapshot>) {
        self.scheduled(&id, uid, at, snapshot).await;
        let _ = done.send(());
    }

    async fn scheduled(&self, id: &str, uid: u64, at: i64, snapshot: Arc<Snapshot>) {
        let Some(function) = snapshot.functions.get(id).filter(|function| function.uid == uid).cloned() else { return };
        let mut x = nobodys(&snapshot);
        x.phase = Phase::Timer;
        let mut call = Call::new(&function, self.functions.record(&function), roll(&x));
        (call.trigger, call.scheduled_at) = (Trigger::Schedule, Some(at));
        self.functions.run(|| self.function_vm(call.purpose(), &snapshot), &call, &mut x).await;
    }
}
