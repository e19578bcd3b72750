//! A watched request: how its route was found, and the trace that is left of it.

use std::{borrow::Cow, cell::RefCell, net::IpAddr, sync::Arc, time::Duration};

use serde_json::{Value, json};

use super::{Proxy, request::RequestFacts};
use crate::{
    exchange::{
        Exchange, Source, Try,
        watch::{Candidate, Planned, Ran, Watch},
    },
    expr::Expr,
    model::{Object, Route},
    plugin::watch::{phase_name, trace_id},
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
    let trace = trace(x, &watch, &id);
    p.runner.watching().keep(&id, trace.to_string());
}

fn trace(x: &Exchange, watch: &Watch, id: &str) -> Value {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let consumer = x.consumer.as_ref().map(|consumer| consumer.value.username.to_string());
    json!({
        "id": id,
        "took_us": micros(x.started.elapsed()),
        "config_revision": x.snapshot.revision,
        "request": {
            "client": x.remote().ip().to_string(),
            "method": text(&x.request.method),
            "host": text(&x.request.host),
            "uri": text(&x.request.target),
        },
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
