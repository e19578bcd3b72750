//! Calls of functions that no client asked for: by a schedule, and dry runs.
//!
//! A dry run gets a VM of its own, which ends with it: what is tried out changes nothing of what serves.

use std::{rc::Rc, sync::Arc, time::Instant};

use bytes::Bytes;
use tokio::sync::oneshot;

use super::{
    Flow, Runner, failed,
    function::{self, Call, FunctionVm},
    roll,
};
use crate::{
    exchange::{Connection, Exchange, FunctionCall, Phase, RequestBody},
    lua::log_error,
    model::{self, Id, Variant},
    observe::functions::{Line, Record, Trigger},
    store::Snapshot,
};

/// What a worker is asked to run.
pub enum Errand {
    /// The function, when its version is still `uid`. Answered when it has ended.
    Scheduled {
        id: Id,
        uid: u64,
        at: i64,
        done: oneshot::Sender<()>,
    },
    Trial(Box<Trial>, oneshot::Sender<Tried>),
}

/// A dry run.
pub struct Trial {
    pub id: Id,
    pub function: model::Function,
    pub request: Mock,
}

/// The request of a dry run.
#[derive(Clone, Debug, Default)]
pub struct Mock {
    pub method: Vec<u8>,
    /// Decoded.
    pub path: Vec<u8>,
    /// Without `?`.
    pub args: Vec<u8>,
    pub headers: Vec<(String, String)>,
    pub body: Bytes,
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub struct Tried {
    /// 444: it would have closed the connection.
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    pub lines: Vec<Line>,
    pub time_ms: f64,
}

impl Runner {
    /// Runs an errand to its end. Whoever asked may have lost patience.
    pub async fn errand(&self, errand: Errand, snapshot: Arc<Snapshot>) {
        match errand {
            Errand::Scheduled { id, uid, at, done } => {
                self.scheduled(&id, uid, at, snapshot).await;
                let _ = done.send(());
            }
            Errand::Trial(trial, answer) => drop(answer.send(self.trial(&trial, snapshot).await)),
        }
    }

    async fn scheduled(&self, id: &str, uid: u64, at: i64, snapshot: Arc<Snapshot>) {
        let Some(function) = snapshot.functions.get(id).filter(|function| function.uid == uid).cloned() else { return };
        let mut x = nobodys(snapshot.clone());
        x.phase = Phase::Timer;
        let mut call = Call::new(&function, self.functions.record(&function), roll(&x));
        (call.trigger, call.scheduled_at) = (Trigger::Schedule, Some(at));
        self.functions.run(|| self.function_vm(call.purpose(), &snapshot), &call, &mut x).await;
    }

    async fn trial(&self, trial: &Trial, snapshot: Arc<Snapshot>) -> Tried {
        let Trial { id, function, request } = trial;
        let record = Arc::new(Record::default());
        let variant = Variant { uid: 1, revision: function.revision, source: function.source.clone(), rule: None };
        let (trigger, scheduled_at) = (Trigger::Request, None);
        let call = Call { id, function, variant, record: record.clone(), trigger, scheduled_at };
        let mut x = nobodys(snapshot.clone());
        x.phase = Phase::Content;
        fill(&mut x, request);
        x.lua.function = Some(Rc::new(FunctionCall::new(record.clone(), &function.limits)));
        let begun = Instant::now();
        let flow = match call.admits(&mut x) {
            true => self.try_in_own_vm(&call, &mut x, &snapshot).await,
            false => function::ended_with(&mut x, 413),
        };
        let headers = x.response.headers.iter();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Tried {
            status: if flow == Flow::Close { 444 } else { x.response.status },
            headers: headers.map(|(name, value)| (text(name), text(value))).collect(),
            body: std::mem::take(&mut x.printed),
            lines: record.lines(usize::MAX).0,
            time_ms: begun.elapsed().as_secs_f64() * 1e3,
        }
    }

    async fn try_in_own_vm(&self, call: &Call<'_>, x: &mut Exchange, snapshot: &Arc<Snapshot>) -> Flow {
        let made = FunctionVm::new(self.function_vm(call.purpose(), snapshot));
        let ready = made.and_then(|vm| vm.callable(call).map(|callable| (vm, callable)));
        match ready {
            Ok((vm, callable)) => {
                vm.vm.set_snapshot(snapshot);
                let (flow, _) = vm.run(x, callable, call).await;
                vm.vm.close();
                flow
            }
            Err(e) => {
                log_error(x, &format!("function {}: {e}", call.id));
                failed(x)
            }
        }
    }
}

/// An exchange without a client.
pub(super) fn nobodys(snapshot: Arc<Snapshot>) -> Exchange {
    let nowhere = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    let mut x = Exchange::new(Rc::new(Connection::new(0, nowhere, nowhere)), snapshot);
    x.begin();
    x
}

fn fill(x: &mut Exchange, from: &Mock) {
    let to = &mut x.request;
    to.method.clone_from(&from.method);
    to.path.clone_from(&from.path);
    to.args.clone_from(&from.args);
    to.target.clone_from(&from.path);
    if !from.args.is_empty() {
        to.target.push(b'?');
        to.target.extend_from_slice(&from.args);
    }
    for (name, value) in &from.headers {
        to.headers.append(name, value);
    }
    let host = to.headers.get("host").unwrap_or(b"localhost").to_ascii_lowercase();
    to.host = host;
    if !from.body.is_empty() {
        x.body = RequestBody::Memory(from.body.clone());
        x.request.headers.set("Content-Length", from.body.len().to_string());
    }
}
