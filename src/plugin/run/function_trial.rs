//! A dry run of a function: one mock request, in a VM of its own on a thread of its own.
//!
//! What is tried out changes nothing of what serves, and no request waits for it.

use std::{
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{sync::SemaphorePermit, time::timeout};

use super::{
    Flow, failed,
    function::{self, Call, FunctionVm},
    mock::{MockRequest, WORKER, apart, nobodys},
};
use crate::{
    exchange::{Exchange, FunctionCall, Phase},
    lua::log_error,
    model::{self, Id, Variant},
    observe::functions::{Line, Record, Trigger},
    plugin::registry::Setup,
    store::Snapshot,
};

/// What a dry run may take beside the function's own time: its VM is made first.
const MARGIN: Duration = Duration::from_secs(5);

/// A dry run.
pub struct Trial {
    pub id: Id,
    pub function: model::Function,
    pub request: MockRequest,
    /// Given back when it is over, which may be after whoever asked has gone.
    pub place: Option<SemaphorePermit<'static>>,
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

/// Runs it. The text says why nothing came of it.
pub async fn run(setup: Setup, snapshot: Arc<Snapshot>, mut trial: Trial) -> Result<Tried, String> {
    let (place, longest) = (trial.place.take(), trial.function.limits.timeout + MARGIN);
    let tried = apart("function-trial", place, move || async move { play(&setup, &snapshot, &trial).await });
    match timeout(longest, tried).await {
        Ok(tried) => tried,
        Err(_) => Err(format!("the function has not ended within {longest:?}")),
    }
}

async fn play(setup: &Setup, snapshot: &Arc<Snapshot>, trial: &Trial) -> Tried {
    let Trial { id, function, request, .. } = trial;
    let record = Arc::new(Record::default());
    let variant = Variant { uid: 1, revision: function.revision, source: function.source.clone(), canary: None };
    let (trigger, scheduled_at) = (Trigger::Request, None);
    let call = Call { id, function, variant, record: record.clone(), trigger, scheduled_at };
    let mut x = nobodys(snapshot);
    x.phase = Phase::Content;
    request.fill(&mut x);
    x.lua.function = Some(Rc::new(FunctionCall::new(record.clone(), &function.limits)));
    let begun = Instant::now();
    let flow = match call.admits(&mut x) {
        true => in_own_vm(setup, &call, &mut x, snapshot).await,
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

async fn in_own_vm(setup: &Setup, call: &Call<'_>, x: &mut Exchange, snapshot: &Arc<Snapshot>) -> Flow {
    let made = FunctionVm::new(setup.vm_config(call.purpose(), WORKER, snapshot));
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
