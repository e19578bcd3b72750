//! Which requests are watched: those that the operator traces, and those of the debug mode.
//!
//! One flag says whether anybody may be; a request for whom it is not set pays for one look at it.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use arc_swap::ArcSwap;
use serde_json::Value;
use subtle::ConstantTimeEq;

use crate::{
    conf,
    exchange::{
        Exchange, Phase,
        watch::{Planned, Watch},
    },
    observe::log::Level,
};

/// conf/debug.yaml in effect (debug-mode.md).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Debug {
    /// `basic.enable`: responses say which plugins ran.
    pub basic: bool,
    /// `http_filter`, where it is enabled: only requests with this field have the functions of `hooks` tell.
    pub header: Option<Box<str>>,
    /// `hook_conf`, where it is enabled.
    pub hooks: Option<Hooks>,
}

/// Functions that tell of their calls.
#[derive(Clone, Debug, PartialEq)]
pub struct Hooks {
    /// `{module: [function, …]}`
    pub functions: Value,
    /// `warn`
    pub level: Box<str>,
    pub arguments: bool,
    pub results: bool,
}

/// What is watched, and what has been seen. One per process.
#[derive(Debug, Default)]
pub struct Watching {
    any: AtomicBool,
    debug: ArcSwap<Debug>,
    trace: Option<conf::Trace>,
    traces: Mutex<VecDeque<(Box<str>, Box<str>)>>,
}

impl Watching {
    pub fn new(trace: Option<conf::Trace>) -> Arc<Watching> {
        Arc::new(Watching { any: AtomicBool::new(trace.is_some()), trace, ..Watching::default() })
    }

    /// Whether a request may be one that is watched.
    pub fn any(&self) -> bool {
        self.any.load(Ordering::Relaxed)
    }

    pub fn debug(&self) -> Arc<Debug> {
        self.debug.load_full()
    }

    pub fn set_debug(&self, debug: Debug) {
        let any = self.trace.is_some() || debug.basic || debug.hooks.is_some();
        self.debug.store(Arc::new(debug));
        self.any.store(any, Ordering::Relaxed);
    }

    /// Has the request watched when it asks for that, or the debug mode does. The key does not go on to anybody.
    pub fn begin(&self, x: &mut Exchange) {
        let traced = self.trace.as_ref().filter(|trace| is_asked_for(trace, x));
        let debug = self.debug.load();
        let hooked =
            debug.hooks.is_some() && debug.header.as_ref().is_none_or(|name| x.request.headers.contains(&**name));
        // Nothing is made for those that nobody asks about.
        if traced.is_none() && !debug.basic && !hooked {
            return;
        }
        let mut watch = Watch::default();
        (watch.traced, watch.named, watch.hooked) = (traced.is_some(), debug.basic, hooked);
        watch.dynamic = debug.header.is_some();
        if let Some(trace) = traced {
            watch.secrets = trace.secrets.iter().cloned().collect();
        }
        x.watch = Some(Box::new(watch));
    }

    /// The field that names the trace in the response.
    fn id_header(&self) -> Option<String> {
        self.trace.as_ref().map(|trace| format!("{}-Id", trace.header))
    }

    /// Keeps a trace; the oldest one goes when there are too many.
    pub fn keep(&self, id: &str, json: String) {
        let Some(trace) = &self.trace else { return };
        let mut traces = self.traces.lock().unwrap_or_else(PoisonError::into_inner);
        while traces.len() >= trace.keep.max(1) {
            traces.pop_front();
        }
        traces.push_back((id.into(), json.into()));
    }

    /// A trace that is still kept, as JSON.
    pub fn trace(&self, id: &str) -> Option<String> {
        let traces = self.traces.lock().unwrap_or_else(PoisonError::into_inner);
        traces.iter().rev().find(|(own, _)| **own == *id).map(|(_, json)| json.to_string())
    }

    /// The response's head is about to leave: says which plugins have run and will, and what the trace is called.
    pub fn head(&self, x: &mut Exchange) {
        let Some(mut watch) = x.watch.take() else { return };
        if !watch.told {
            watch.told = true;
            if watch.traced
                && let Some(name) = self.id_header()
            {
                x.response.headers.set(name, trace_id(x));
            }
            if watch.named
                && let Some(text) = names(x, &watch)
            {
                x.response.headers.set("Apisix-Plugins", text);
            }
        }
        x.watch = Some(watch);
    }
}

/// Whether the request has the key, which goes no further whatever it is.
fn is_asked_for(trace: &conf::Trace, x: &mut Exchange) -> bool {
    let headers = &mut x.request.headers;
    let Some(given) = headers.get(&trace.header) else { return false };
    let asked = is_key(trace, given);
    headers.remove(&trace.header);
    asked
}

fn is_key(trace: &conf::Trace, given: &[u8]) -> bool {
    given.ct_eq(trace.key.as_bytes()).into()
}

/// The request's own id names its trace.
pub fn trace_id(x: &Exchange) -> String {
    x.id.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Phases that run when the head has left.
const LATER: [Phase; 3] = [Phase::BodyFilter, Phase::DelayedBodyFilter, Phase::Log];

/// `limit-conn#access, limit-conn#log`: what ran, then what is going to, by what the plan says. Of global rules nobody can tell.
fn names(x: &Exchange, watch: &Watch) -> Option<String> {
    let ran = watch.ran.iter().map(|ran| format!("{}#{}", ran.plugin, ran.phase));
    let own = || watch.plan.iter().filter(|planned| !planned.is_global);
    let will = LATER.iter().flat_map(|phase| own().filter(|p| p.phases.contains(phase)).map(|p| entry(p, *phase)));
    let all: Vec<String> = ran.chain(will).collect();
    match (all.is_empty(), own().next()) {
        (false, _) => Some(all.join(", ")),
        (true, None) if x.matched.is_some() => Some("no plugin".into()),
        (true, _) => None,
    }
}

fn entry(planned: &Planned, phase: Phase) -> String {
    format!("{}#{}", planned.name, phase_name(phase))
}

/// The plugin's function of a phase.
pub fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Rewrite => "rewrite",
        Phase::Access => "access",
        Phase::BeforeProxy => "before_proxy",
        Phase::HeaderFilter => "header_filter",
        Phase::BodyFilter => "body_filter",
        Phase::DelayedBodyFilter => "delayed_body_filter",
        Phase::Log => "log",
        _ => "",
    }
}

/// A function has come back, for the first time: says so in error.log where the header could neither tell nor foresee it.
pub(super) fn tell_late(x: &Exchange, plugin: &str, phase: &str, is_global: bool) {
    if is_global && x.watch.as_ref().is_some_and(|watch| watch.named && watch.told) {
        x.log(Level::Warn, format!("Apisix-Plugins: {plugin}#{phase}").as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;
    use crate::exchange::Connection;

    fn request(headers: &[(&str, &str)]) -> Exchange {
        let addr = std::net::SocketAddr::from(([127, 0, 0, 1], 1));
        let mut x = Exchange::new(Rc::new(Connection::new(1, addr, addr)), Arc::default());
        headers.iter().for_each(|(name, value)| x.request.headers.append(name, value));
        x
    }

    fn tracing(keep: usize) -> Arc<Watching> {
        Watching::new(Some(conf::Trace {
            header: "X-T".into(),
            key: "0123456789abcdef".into(),
            keep,
            secrets: [].into(),
        }))
    }

    #[test]
    fn only_the_key_asks_for_a_trace_and_it_goes_no_further() {
        let watching = tracing(1);
        for (given, traced) in [("0123456789abcdef", true), ("0123456789abcdeg", false), ("", false), ("0", false)] {
            let mut x = request(&[("x-t", given)]);
            watching.begin(&mut x);
            assert_eq!(x.watch.is_some_and(|watch| watch.traced), traced, "{given:?}");
            assert!(!x.request.headers.contains("x-t"));
        }
    }

    #[test]
    fn hooks_follow_the_header_where_one_is_named() {
        let watching = Watching::new(None);
        assert!(!watching.any());
        let hooks = Hooks { functions: Value::Null, level: "warn".into(), arguments: true, results: true };
        watching.set_debug(Debug { basic: false, header: Some("X-D".into()), hooks: Some(hooks.clone()) });
        assert!(watching.any());
        let hooked = |headers: &[(&str, &str)]| {
            let mut x = request(headers);
            watching.begin(&mut x);
            x.watch.is_some_and(|watch| watch.hooked)
        };
        assert!(hooked(&[("x-d", "")]) && !hooked(&[]));
        watching.set_debug(Debug { hooks: Some(hooks), ..Debug::default() });
        assert!(hooked(&[]));
        watching.set_debug(Debug::default());
        assert!(!watching.any() && !hooked(&[("x-d", "")]));
    }

    #[test]
    fn the_oldest_trace_goes() {
        let watching = tracing(2);
        for id in ["a", "b", "c"] {
            watching.keep(id, format!("\"{id}\""));
        }
        let kept = ["a", "b", "c"].map(|id| watching.trace(id));
        assert_eq!(kept, [None, Some("\"b\"".into()), Some("\"c\"".into())]);
        assert_eq!(watching.traces.lock().unwrap().len(), 2);
    }
}
