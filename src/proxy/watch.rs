//! A watched request: how its route was found, and the trace that is left of it.

use std::{
    borrow::Cow,
    cell::RefCell,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::{Proxy, request::RequestFacts};
use crate::{
    exchange::{
        Exchange, Phase, Source, Try, secrets,
        watch::{Candidate, Children, Choice, Planned, Ran, Watch},
    },
    expr::Expr,
    location::Chosen,
    model::{Object, Route},
    plugin::{
        Flow,
        watch::{phase_name, trace_id},
    },
    router::{Facts, Found, Refused},
};

/// Finds the route, and notes which ones were looked at.
#[inline(never)]
pub(super) fn find(x: &Exchange, facts: &RequestFacts<'_>) -> (Option<Found>, Vec<Candidate>) {
    let explained = Explained { facts, candidates: RefCell::default() };
    let found = x.snapshot.router.find(&explained);
    (found, explained.candidates.into_inner())
}

struct Explained<'a> {
    facts: &'a RequestFacts<'a>,
    candidates: RefCell<Vec<Candidate>>,
}

/// Routes that one path leads to and that are told of: a lookup may look at thousands.
const MAX_CANDIDATES: usize = 1000;

impl Facts for Explained<'_> {
    fn host(&self) -> &[u8] {
        self.facts.host()
    }

    fn path(&self) -> &[u8] {
        self.facts.path()
    }

    fn method(&self) -> &[u8] {
        self.facts.method()
    }

    fn remote(&self) -> IpAddr {
        self.facts.remote()
    }

    fn var(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        self.facts.var(name)
    }

    fn vars(&self, vars: &Expr) -> bool {
        self.facts.vars(vars)
    }

    fn filter(&self, route: &Arc<Object<Route>>) -> bool {
        self.facts.filter(route)
    }

    fn looked_at(&self, route: &Arc<Object<Route>>, uri: &str, refused: Option<Refused>) {
        let mut candidates = self.candidates.borrow_mut();
        if candidates.len() < MAX_CANDIDATES {
            let (route, refused) = ((&*route.id).into(), refused.map(Refused::name));
            candidates.push(Candidate { route, uri: uri.into(), refused });
        }
    }
}

/// The request is over: keeps the trace of one that is traced.
pub(super) fn end(p: &Proxy, x: &mut Exchange) {
    let Some(mut watch) = x.watch.take().filter(|watch| watch.traced) else { return };
    watch.cut_off();
    let id = trace_id(x);
    let mut trace = trace(x, &watch, x.started);
    trace["id"] = json!(id);
    trace["config_revision"] = json!(x.snapshot.revision);
    trace["children_untold"] = json!(watch.children.untold());
    let mut text = trace.to_string();
    if text.len() > MAX_TRACE {
        let children = trace["children"].as_array().map_or(0, Vec::len);
        trace["children_untold"] = json!(watch.children.untold() + children);
        trace["children"] = json!([]);
        text = trace.to_string();
    }
    p.runner.watching().keep(&id, text);
}

/// Bytes of a trace with what it tells of subrequests; without them it is as bounded as its parts.
const MAX_TRACE: usize = 1 << 20;

/// Looks for a location, and notes which ones were asked.
#[inline(never)]
pub(super) fn choose(p: &Proxy, x: &mut Exchange) -> Option<Chosen> {
    let mut choice = Choice::of(&x.request.path);
    let told = x.watch.as_ref().map(|watch| watch.children.clone()).unwrap_or_default();
    let found = p.locations.choose_telling(&x.request.path, |location, fits| {
        if told.tells_location() {
            choice.tried(location.pattern.to_string(), fits);
        }
    });
    choice.chosen = found.as_ref().map(|found| found.location.pattern.to_string());
    // One look, and one for each of the few jumps that there may be.
    if let Some(watch) = &mut x.watch {
        watch.locations.push(choice);
    }
    found
}

/// Has a subrequest of a traced request traced, too: where its trace is to go. There may be too many.
pub(super) fn of_child(parent: &Watch, child: &mut Exchange) -> Option<Children> {
    if !parent.traced {
        return None;
    }
    let mut watch = Watch::default();
    watch.children = parent.children.one_more()?;
    watch.secrets = parent.secrets.clone();
    // Only the client's response names the trace.
    (watch.traced, watch.told) = (true, true);
    child.watch = Some(Box::new(watch));
    Some(parent.children.clone())
}

/// A subrequest is over.
pub(super) fn end_child(x: &mut Exchange, into: &Children, begun: Instant) {
    let Some(mut watch) = x.watch.take() else { return };
    watch.cut_off();
    let mut trace = trace(x, &watch, begun);
    let mut uri = x.request.path.clone();
    if !x.request.args.is_empty() {
        uri.push(b'?');
        uri.extend_from_slice(&x.request.args);
    }
    trace["request"]["uri"] = secrets::masked_target(&uri, &watch.secrets).into();
    trace["at_us"] = json!(micros(begun.duration_since(x.started)));
    into.keep(trace);
}

/// A script of a location is about to run.
pub(super) fn script_starts(x: &mut Exchange, phase: Phase) {
    let owner = x.location.as_ref().map_or_else(String::new, |location| location.pattern.to_string());
    x.watch_start("location", script_name(phase), &owner);
}

pub(super) fn script_ends(x: &mut Exchange, flow: Flow) {
    let answered = matches!(flow, Flow::Answer).then_some(x.response.status);
    x.watch_end(answered);
}

fn script_name(phase: Phase) -> &'static str {
    match phase {
        Phase::ServerRewrite => "server_rewrite_by_lua",
        Phase::RewriteByLua => "rewrite_by_lua",
        Phase::Access => "access_by_lua",
        Phase::Precontent => "precontent_by_lua",
        _ => "content_by_lua",
    }
}

fn choice(choice: &Choice) -> Value {
    let tried = choice.tried.iter().map(|tried| json!({"location": tried.location, "matched": tried.fits}));
    json!({"path": choice.path, "tried": tried.collect::<Vec<_>>(), "chosen": choice.chosen})
}

/// What there is to tell of a request or a subrequest that began then.
fn trace(x: &Exchange, watch: &Watch, begun: Instant) -> Value {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let consumer = x.consumer.as_ref().map(|consumer| consumer.value.username.to_string());
    json!({
        "took_us": micros(begun.elapsed()),
        "request": {
            "client": x.remote().ip().to_string(),
            "method": text(&x.request.method),
            "host": text(&x.request.host),
            "uri": secrets::masked_target(&x.request.target, &watch.secrets),
        },
        "locations": watch.locations.iter().map(choice).collect::<Vec<_>>(),
        "candidates": watch.candidates.iter().map(candidate).collect::<Vec<_>>(),
        "route": x.matched.as_ref().map(|matched| matched.route().id.to_string()),
        "service": x.matched.as_ref().and_then(|m| m.service.as_ref()).map(|service| service.id.to_string()),
        "consumer": consumer,
        "plan": watch.plan.iter().map(planned).collect::<Vec<_>>(),
        "plugins": watch.ran.iter().map(ran).collect::<Vec<_>>(),
        "upstream": x.upstream.tries.iter().map(attempt).collect::<Vec<_>>(),
        "response": {
            "status": x.response.status,
            "from": if x.response.source == Source::Upstream { "upstream" } else { "gateway" },
            "bytes_sent": x.bytes_sent,
        },
        "children": watch.children.take(),
    })
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn candidate(candidate: &Candidate) -> Value {
    json!({
        "route": candidate.route,
        "uri": candidate.uri,
        "matched": candidate.refused.is_none(),
        "refused_by": candidate.refused,
    })
}

fn planned(planned: &Planned) -> Value {
    let phases: Vec<&str> = planned.phases.iter().map(|phase| phase_name(*phase)).collect();
    json!({
        "plugin": planned.name,
        "priority": planned.priority,
        "owner": planned.owner,
        "from": planned.from,
        "phases": phases,
    })
}

fn ran(ran: &Ran) -> Value {
    let changes = |of_response: bool| {
        let own = ran.changes.iter().filter(|change| change.of_response == of_response);
        own.map(|change| (change.name.clone(), change.value.clone().into())).collect::<serde_json::Map<_, _>>()
    };
    json!({
        "plugin": ran.plugin,
        "phase": ran.phase,
        "owner": ran.owner,
        "at_us": micros(ran.at),
        "calls": ran.calls,
        "took_us": micros(ran.took),
        "answered": ran.answered,
        "cut_off": ran.cut_off,
        "request_headers": changes(false),
        "response_headers": changes(true),
    })
}

fn attempt(attempt: &Try) -> Value {
    json!({
        "address": attempt.addr.to_string(),
        "status": attempt.status,
        "reused": attempt.reused,
        "connect_us": attempt.connect_time.map(micros),
        "header_us": attempt.header_time.map(micros),
        "response_us": attempt.response_time.map(micros),
        "bytes_sent": attempt.bytes_sent,
        "bytes_received": attempt.bytes_received,
    })
}
