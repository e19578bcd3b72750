//! Asks the workers: what their VMs hold (`GET /v1/lua`), and what a plugin's own endpoint of the control API says.
//!
//! Each answers between two events of its own, so that nothing on the way of a request has to be shared for it.

use std::{future::Future, sync::Arc, time::Duration};

use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    task::spawn_local,
    time::{sleep, timeout},
};

use crate::{
    control::{PluginCall, PluginReply},
    plugin::VmState,
};

/// Questions that one worker has before it; who asks more often waits.
const QUESTIONS: usize = 16;
/// A worker may be inside a script, which by default is stopped after one second.
const PATIENCE: Duration = Duration::from_secs(2);

/// Between two looks at a worker whose plugins are being loaded: what waits for it is a tool.
const SERVING_PAUSE: Duration = Duration::from_millis(5);

/// An endpoint of a plugin may wait for others, as long as a client of the proxy by default waits for an upstream.
const ENDPOINT_PATIENCE: Duration = Duration::from_secs(60);
/// Endpoints of plugins that run at once in a worker: they are for operators, and the worker is for requests.
const ENDPOINTS: usize = 16;

/// What is asked, and where the answer goes.
enum Question {
    States(oneshot::Sender<Vec<VmState>>),
    /// Whether requests that start now are served by a revision, or a later one, with its plugins.
    Serving(i64, oneshot::Sender<bool>),
    Endpoint(PluginCall, oneshot::Sender<Result<Option<PluginReply>, String>>),
}

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

    /// Returns when every worker that has not ended serves a revision, or a later one.
    pub async fn serving(self, revision: i64) {
        join_all(self.0.iter().map(async |worker| {
            while ask_serving(worker, revision).await == Some(false) {
                sleep(SERVING_PAUSE).await;
            }
        }))
        .await;
    }

    /// What the plugins of the first worker answer. `None`: none of them has that endpoint.
    pub async fn endpoint(self, call: PluginCall) -> Result<Option<PluginReply>, String> {
        let Some(worker) = self.0.first() else { return Ok(None) };
        match timeout(ENDPOINT_PATIENCE, ask_endpoint(worker, call)).await {
            Ok(Some(answer)) => answer,
            Ok(None) => Err("the worker has ended".into()),
            Err(_) => Err(format!("no answer within {ENDPOINT_PATIENCE:?}")),
        }
    }
}

async fn ask(worker: &mpsc::Sender<Question>) -> Option<Vec<VmState>> {
    let (sender, answer) = oneshot::channel();
    worker.send(Question::States(sender)).await.ok()?;
    answer.await.ok()
}

async fn ask_serving(worker: &mpsc::Sender<Question>, revision: i64) -> Option<bool> {
    let (sender, answer) = oneshot::channel();
    worker.send(Question::Serving(revision, sender)).await.ok()?;
    answer.await.ok()
}

async fn ask_endpoint(
    worker: &mpsc::Sender<Question>,
    call: PluginCall,
) -> Option<Result<Option<PluginReply>, String>> {
    let (sender, answer) = oneshot::channel();
    worker.send(Question::Endpoint(call, sender)).await.ok()?;
    answer.await.ok()
}

impl Questions {
    /// Answers as long as there is somebody to ask.
    pub async fn answer<F>(
        mut self,
        states: impl Fn() -> Vec<VmState>,
        serves: impl Fn(i64) -> bool,
        endpoint: impl Fn(PluginCall) -> F,
    ) where
        F: Future<Output = Option<PluginReply>> + 'static,
    {
        let places = Arc::new(Semaphore::new(ENDPOINTS));
        while let Some(question) = self.0.recv().await {
            match question {
                // Whoever asked may have lost patience.
                Question::States(sender) => drop(sender.send(states())),
                Question::Serving(revision, sender) => drop(sender.send(serves(revision))),
                Question::Endpoint(call, sender) => match places.clone().try_acquire_owned() {
                    Ok(place) => run(place, endpoint(call), sender),
                    Err(_) => drop(sender.send(Err(format!("{ENDPOINTS} endpoints of plugins run already")))),
                },
            }
        }
    }
}

/// Runs an endpoint beside the requests, for as long as somebody waits for it.
fn run(
    place: OwnedSemaphorePermit,
    endpoint: impl Future<Output = Option<PluginReply>> + 'static,
    mut sender: oneshot::Sender<Result<Option<PluginReply>, String>>,
) {
    spawn_local(async move {
        let reply = tokio::select! {
            reply = endpoint => Some(reply),
            () = sender.closed() => None,
        };
        if let Some(reply) = reply {
            let _ = sender.send(Ok(reply));
        }
        drop(place);
    });
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

    #[tokio::test]
    async fn only_so_many_endpoints_run_at_once_and_one_that_nobody_waits_for_ends() {
        let mut asking = Asking::default();
        let questions = asking.worker();
        let (release, _) = tokio::sync::watch::channel(());
        let held = release.clone();
        let endpoint = move |_| {
            let mut released = held.subscribe();
            async move {
                let _ = released.changed().await;
                None
            }
        };
        let call = || PluginCall {
            method: String::new(),
            path: String::new(),
            args: String::new(),
            headers: Vec::new(),
            body: Default::default(),
        };
        tokio::task::LocalSet::new()
            .run_until(async {
                spawn_local(questions.answer(Vec::new, |_| true, endpoint));
                let ask = || spawn_local(asking.clone().endpoint(call()));
                let run = async |n: usize| {
                    while release.receiver_count() != n {
                        tokio::task::yield_now().await;
                    }
                };
                let mut running: Vec<_> = (0..ENDPOINTS).map(|_| ask()).collect();
                run(ENDPOINTS).await;
                let refused = asking.clone().endpoint(call()).await;
                assert_eq!(refused.err().as_deref(), Some("16 endpoints of plugins run already"));
                let given_up = running.remove(0);
                given_up.abort();
                assert!(given_up.await.is_err());
                run(ENDPOINTS - 1).await;
                running.push(ask());
                run(ENDPOINTS).await;
                release.send_replace(());
                for one in running {
                    assert!(matches!(one.await, Ok(Ok(None))));
                }
            })
            .await;
    }
}
