//! A plugin on trial: one mock request through its phases, in a VM of its own on a thread of its own.
//!
//! Nothing that serves notices it: no worker waits, no route is needed, timers and processes are refused. What is shared by the
//! whole process stays shared, though: `ngx.shared`, and the network that the plugin speaks to.

use std::{ffi::c_int, rc::Rc, sync::Arc, time::Duration};

use bytes::Bytes;
use mlua::ffi;
use serde_json::{Value, json};
use tokio::{
    sync::SemaphorePermit,
    time::{Instant, timeout},
};

use super::{
    Flow,
    mock::{MockRequest, WORKER, apart, nobodys},
    read_answer, registry, settle,
};
use crate::{
    error::Result,
    exchange::{Exchange, Phase},
    lua::{
        Stack, Vm, VmConfig,
        limits::{DEFAULT_CPU_MS, Limits},
        sched::{self, Outcome},
        vm::Purpose,
    },
    model::PluginSource,
    plugin::registry::Setup,
    store::Snapshot,
};

/// All of it: whoever waits for the answer is a person.
const PATIENCE: Duration = Duration::from_secs(10);
/// A trial's VM holds one plugin and one request.
const MEMORY_MB: usize = 128;
/// Shown of a body.
const MAX_SHOWN_BODY: usize = 1 << 20;
/// What is to be tried.
pub struct PluginTrial {
    pub name: String,
    pub source: PluginSource,
    pub conf: Value,
    pub request: MockRequest,
    pub upstream: MockResponse,
    /// Given back when the trial is over, which may be after whoever asked has gone.
    pub place: Option<SemaphorePermit<'static>>,
}

/// What the upstream answers when the plugin lets the request through.
#[derive(Clone, Debug)]
pub struct MockResponse {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Bytes,
}

/// The phases in the order of a request, as the plugin's functions are named.
const BEFORE: [(&str, Phase); 3] =
    [("rewrite", Phase::Rewrite), ("access", Phase::Access), ("before_proxy", Phase::BeforeProxy)];
const FILTERS: [(&str, Phase); 4] = [
    ("header_filter", Phase::HeaderFilter),
    ("body_filter", Phase::BodyFilter),
    ("delayed_body_filter", Phase::DelayedBodyFilter),
    ("log", Phase::Log),
];

/// Runs the trial. The text says why there is nothing to run: the source does not load, the conf does not pass.
pub async fn run(setup: Setup, snapshot: Arc<Snapshot>, mut trial: PluginTrial) -> Result<Value, String> {
    let place = trial.place.take();
    apart("plugin-trial", place, move || async move { limited(&setup, &snapshot, trial).await }).await?
}

async fn limited(setup: &Setup, snapshot: &Arc<Snapshot>, trial: PluginTrial) -> Result<Value, String> {
    match timeout(PATIENCE, play(setup, snapshot, trial)).await {
        Ok(outcome) => outcome,
        Err(_) => Err(format!("the plugin has not ended within {PATIENCE:?}")),
    }
}

async fn play(setup: &Setup, snapshot: &Arc<Snapshot>, trial: PluginTrial) -> Result<Value, String> {
    let stage = Stage::set(setup, snapshot, &trial).map_err(|e| e.to_string())?;
    let phases = stage.prepare(&trial.name, &trial.conf)?;
    let mut x = nobodys(snapshot);
    x.lua.slot = Some(stage.vm.take_slot());
    trial.request.fill(&mut x);
    let mut shown = stage.perform(&mut x, &phases, &trial.upstream).await;
    sched::end_background(&stage.vm, &mut x);
    stage.vm.close();
    let logged: String = stage.call("lines", ()).map_err(|e| e.to_string())?;
    let logged: Value = serde_json::from_str(&logged).unwrap_or_default();
    shown["logs"] = logged.get("lines").filter(|lines| lines.is_array()).cloned().unwrap_or_else(|| json!([]));
    shown["logs_dropped"] = logged["dropped"].clone();
    Ok(shown)
}

/// The VM with `moongate.trial` in it.
struct Stage {
    vm: Rc<Vm>,
    run: c_int,
}

impl Stage {
    fn set(setup: &Setup, snapshot: &Arc<Snapshot>, trial: &PluginTrial) -> Result<Stage> {
        let mut config = setup.vm_config(Purpose::Check, WORKER, snapshot);
        let own = format!("{}.", trial.name);
        config.plugin_sources.retain(|(name, _)| **name != *trial.name && !name.starts_with(&own));
        config.plugin_sources.extend(trial.source.chunks(&trial.name));
        let config = VmConfig { config: Arc::new(within_limits(&config.config)), ..config };
        let vm = registry::vm(config)?;
        vm.set_snapshot(snapshot);
        registry::call::<()>(&vm, "moongate.trial", "listen", ())?;
        let run = vm.function("moongate.trial", "run")?;
        Ok(Stage { vm, run })
    }

    fn call<R: mlua::FromLuaMulti>(&self, name: &str, args: impl mlua::IntoLuaMulti) -> Result<R> {
        registry::call(&self.vm, "moongate.trial", name, args)
    }

    /// The phases that the plugin has.
    fn prepare(&self, name: &str, conf: &Value) -> Result<Vec<String>, String> {
        let (phases, reason): (Option<String>, Option<String>) =
            self.call("prepare", (name, conf.to_string())).map_err(|e| e.to_string())?;
        match phases {
            Some(phases) => Ok(phases.split(' ').map(str::to_owned).collect()),
            None => Err(reason.unwrap_or_default()),
        }
    }

    /// As the proxy would have it: who answers before the upstream does, and what the filters make of that.
    async fn perform(&self, x: &mut Exchange, phases: &[String], upstream: &MockResponse) -> Value {
        let has = |name: &str| phases.iter().any(|phase| phase == name);
        let mut times = Vec::new();
        let mut flow = Flow::Next;
        for (name, phase) in BEFORE.into_iter().filter(|(name, _)| has(name)) {
            if flow == Flow::Next {
                flow = self.phase(x, (name, phase), &mut times).await;
            }
        }
        let mut shown = json!({});
        match flow {
            Flow::Next | Flow::Declined => {
                shown["upstream_request"] = upstream_request(x);
                take(x, upstream);
            }
            _ => x.chunk.data = std::mem::take(&mut x.printed),
        }
        x.chunk.eof = true;
        for (name, phase) in FILTERS.into_iter().filter(|(name, _)| has(name)) {
            let (status, source) = (x.response.status, x.response.source);
            if self.phase(x, (name, phase), &mut times).await == Flow::Answer && phase != Phase::HeaderFilter {
                // What a filter returns means nothing.
                (x.response.status, x.response.source) = (status, source);
            }
        }
        let body = &x.chunk.data[..x.chunk.data.len().min(MAX_SHOWN_BODY)];
        // nginx's word for a connection that is closed without an answer.
        shown["status"] = if flow == Flow::Close { 444 } else { x.response.status }.into();
        shown["headers"] = listed(x.response.headers.iter());
        shown["body"] = String::from_utf8_lossy(body).into();
        shown["body_bytes"] = x.chunk.data.len().into();
        shown["answered_by"] = if shown.get("upstream_request").is_some() { "upstream" } else { "plugin" }.into();
        shown["phases"] = Value::Array(times);
        shown
    }

    async fn phase(&self, x: &mut Exchange, (name, phase): (&str, Phase), times: &mut Vec<Value>) -> Flow {
        x.phase = phase;
        let slot = x.lua.slot.unwrap_or_default();
        let push = |s: &Stack| {
            s.get_index(ffi::LUA_REGISTRYINDEX, self.run as usize);
            s.push_bytes(name.as_bytes());
            s.push_number(f64::from(slot));
            2
        };
        let begun = Instant::now();
        let outcome = sched::call(&self.vm, x, push, read_answer).await;
        let time_ms = (begun.elapsed().as_secs_f64() * 1e6).round() / 1e3;
        let mut said = json!({ "phase": name, "time_ms": time_ms });
        if let Outcome::Failed(text) = &outcome {
            said["error"] = text.as_str().into();
            // A line too many is no reason to end the trial.
            let _ = self.call::<()>("note", ("error", format!("failed to run {name}: {text}")));
        }
        times.push(said);
        settle(x, outcome)
    }
}

/// The configuration with bounds on scripts, whatever it says of them.
fn within_limits(config: &Value) -> Value {
    let set = Limits::from_config(config);
    let mut config = config.clone();
    let bounds = json!({ "cpu_ms": set.cpu_ms.min(DEFAULT_CPU_MS), "memory_mb": set.memory_mb.min(MEMORY_MB) });
    if let Value::Object(map) = &mut config {
        let lua = map.entry("lua").or_insert_with(|| json!({}));
        if !lua.is_object() {
            *lua = json!({});
        }
        lua["limits"] = bounds;
    }
    config
}

/// The upstream has answered.
fn take(x: &mut Exchange, from: &MockResponse) {
    std::mem::swap(&mut x.response.headers, &mut x.response.early);
    x.response.status = from.status;
    for (name, value) in &from.headers {
        x.response.headers.append(name, value);
    }
    let early: Vec<(Vec<u8>, Vec<u8>)> =
        x.response.early.iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect();
    early.iter().for_each(|(name, value)| x.response.headers.append(name, value));
    x.chunk.data = from.body.to_vec();
}

/// What would have gone to the upstream.
fn upstream_request(x: &Exchange) -> Value {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let uri = match (x.upstream.uri.is_empty(), x.request.uri_changed) {
        (false, _) => text(&x.upstream.uri),
        (true, false) => text(&x.request.target),
        (true, true) if x.request.args.is_empty() => text(&x.request.path),
        (true, true) => format!("{}?{}", text(&x.request.path), text(&x.request.args)),
    };
    json!({ "method": text(&x.request.method), "uri": uri, "headers": listed(x.request.headers.iter()) })
}

/// Names may come more than once.
fn listed<'a>(headers: impl Iterator<Item = (&'a [u8], &'a [u8])>) -> Value {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    headers.map(|(name, value)| json!([text(name), text(value)])).collect()
}
