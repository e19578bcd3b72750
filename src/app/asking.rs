//! Asks the workers what their VMs hold: `GET /v1/lua`.
//!
//! Each answers between two events of its own, so that nothing on the way of a request has to be shared for it.

use std::time::Duration;

use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use crate::plugin::VmState;

/// Questions that one worker has before it; who asks more often waits.
const QUESTIONS: usize = 16;
/// A worker may be inside a script, which by default is stopped after one second.
const PATIENCE: Duration = Duration::from_secs(2);

/// Where the answer goes.
type Question = oneshot::Sender<Vec<VmState>>;

/// The worker's end.
pub struct Questions(mpsc::Receiver<Question>);

/// The control thread's end: the workers in their order.
#[derive(Clone, Default)]
pub struct Asking(Vec<mpsc::Sender<Question>>);

impl Asking {
    /// One more worker, which is to hold the result.
    pub fn worker(&mut self) -> Questions {
        let (sender, questions) = mpsc::channel(QUESTIONS);
        self.0.push(sender);
        Questions(questions)
    }

    /// What each worker's VMs hold, and which workers did not say.
    pub async fn ask(self) -> Value {
        let workers = self.0.iter().enumerate().map(async |(id, worker)| match timeout(PATIENCE, ask(worker)).await {
            Ok(Some(vms)) => json!({"id": id, "vms": vms}),
            Ok(None) => json!({"id": id, "error": "the worker has ended"}),
            Err(_) => json!({"id": id, "error": format!("no answer within {PATIENCE:?}: a script keeps it busy")}),
        });
        json!({"workers": join_all(workers).await})
    }
}

async fn ask(worker: &mpsc::Sender<Question>) -> Option<Vec<VmState>> {
    let (sender, answer) = oneshot::channel();
    worker.send(sender).await.ok()?;
    answer.await.ok()
}

impl Questions {
    /// Answers as long as there is somebody to ask.
    pub async fn answer(mut self, states: impl Fn() -> Vec<VmState>) {
        while let Some(question) = self.0.recv().await {
            // Whoever asked may have lost patience.
            let _ = question.send(states());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn more_questions_than_a_worker_takes_wait_no_longer_than_one() {
        let mut asking = Asking::default();
        let silent = asking.worker();
        drop(asking.worker());
        let answers = join_all((0..3 * QUESTIONS).map(|_| asking.clone().ask())).await;
        for answer in answers {
            let errors = [&answer["workers"][0]["error"], &answer["workers"][1]["error"]];
            assert_eq!(errors, ["no answer within 2s: a script keeps it busy", "the worker has ended"]);
        }
        assert_eq!(silent.0.len(), QUESTIONS);
    }
}
