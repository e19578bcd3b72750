//! A request from top to bottom.

use std::{
    borrow::Cow,
    cell::{Cell, RefCell},
    net::IpAddr,
    rc::Rc,
    sync::Arc,
};

use super::{Proxy, asked, forward, forwarded, location, real_ip, rescue, servlet, watch};
use crate::{
    error::{Error, Kind, Result},
    exchange::{Exchange, Matched, Phase, RequestBody, Var, asked::Asked},
    model::{Id, Object, Route, Service},
    observe::log::Level,
    plugin::{
        PhaseMask, output,
        run::{Flow, Runner},
    },
    router::{Facts, Found},
};

/// Serves a request whose head is there, to its log line.
pub(super) async fn serve(p: &Rc<Proxy>, x: &mut Exchange) {
    p.pin(x);
    x.snapshot.router.expect_soon(&x.request.host, &x.request.path);
    real_ip::apply(&p.settings.real_ip, x);
    if p.runner.watching().any() {
        p.runner.watching().begin(x);
    }
    if !p.locations.is_empty() && location::serve(p, x).await {
        return;
    }
    forwarded::apply(&p.settings.trusted, x);
    let sound = match !p.settings.normalize_uri_like_servlet || servlet::normalize(&mut x.request.path) {
        true => find_route(p, x).await,
        false => Err(Error::client(Kind::Malformed).context("failed to normalize the URI like a servlet container")),
    };
    if p.runner.is_between(x) {
        // In a box: no other request has it.
        Box::pin(p.runner.settled(x)).await;
    }
    let phases = p.runner.begin(x);
    let answered = match sound {
        Ok(()) => answer(p, x, phases).await,
        Err(e) => Err(e),
    };
    if let Err(e) = answered {
        rescue::answer(p, x, e).await;
    }
    end(p, x, phases).await;
}

/// Answers what was refused before it was a request, and logs it.
pub(super) async fn reject(p: &Rc<Proxy>, x: &mut Exchange, why: &'static str) {
    let status = x.response.status;
    match (status, &x.body) {
        (413, RequestBody::Streaming { length: Some(n) }) => {
            x.log(Level::Error, format!("{why}: {n} bytes").as_bytes())
        }
        _ => x.log(Level::Info, format!("client sent an invalid request: {why}").as_bytes()),
    }
    if x.client.is_some() && location::serve_refusal(p, x, status).await {
        return;
    }
    if x.client.is_some() {
        rescue::page(p, x, status);
        if let Err(e) = output::plain(x).await {
            tracing::debug!("the refusal was not sent: {e}");
        }
    }
    x.phase = Phase::Log;
    p.ending.ended(x, &p.runner);
}

pub(super) async fn end(p: &Proxy, x: &mut Exchange, phases: PhaseMask) {
    if let Some(client) = &x.client {
        x.bytes_sent = client.bytes_sent();
    }
    if let Some(matched) = &x.matched {
        matched.found.expect_drop();
    }
    x.phase = Phase::Log;
    if phases != PhaseMask::default() || x.lua.run.is_some() {
        p.runner.log(x).await;
    }
    if x.watch.is_some() {
        watch::end(p, x);
    }
    p.ending.ended(x, &p.runner);
}

async fn answer(p: &Rc<Proxy>, x: &mut Exchange, phases: PhaseMask) -> Result<()> {
    if let Some((status, reason)) = missing(x) {
        return refuse(p, x, status, &reason).await;
    }
    if phases != PhaseMask::default() {
        x.lua.host = Some(location::host(p));
    }
    if phases.has(Phase::Rewrite) || phases.has(Phase::Access) {
        x.phase = Phase::Access;
        let flow = p.runner.rewrite_access(x).await;
        if flow != Flow::Next {
            return flowed(p, x, flow).await;
        }
        if let Some(id) = missing_group(x) {
            return refuse(p, x, 503, &format!("failed to fetch consumer group config by id: {id}")).await;
        }
    }
    let Some(matched) = &x.matched else {
        return match p.locations.rest() {
            Some(rest) if x.lua.run.is_none() => location::serve_rest(p, x, rest).await,
            _ => rescue::no_route(p, x).await,
        };
    };
    if matched.found.plain_upstream().is_none()
        && let Some(id) = matched.route().value.function_id.clone()
    {
        return function(p, x, &id).await;
    }
    if choose_upstream(x)? {
        // In a box: what only registries need is no part of every request.
        Box::pin(p.runner.discover(x)).await?;
    }
    if p.runner.mask(x).has(Phase::BeforeProxy) {
        x.phase = Phase::BeforeProxy;
        let chosen = x.upstream.chosen.as_ref().map(|upstream| upstream.uid);
        let flow = p.runner.before_proxy(x).await;
        if flow != Flow::Next {
            return flowed(p, x, flow).await;
        }
        if x.upstream.chosen.as_ref().map(|upstream| upstream.uid) != chosen && choose_upstream(x)? {
            Box::pin(p.runner.discover(x)).await?;
        }
    }
    forward::forward(p, x).await
}

/// What the route names and nobody has: status and reason. Served without it the request would lack what may protect it.
fn missing(x: &Exchange) -> Option<(u16, String)> {
    let matched = x.matched.as_ref().filter(|m| m.found.plain_upstream().is_none())?;
    let route = &matched.route().value;
    if let Some(id) = route.plugin_config_id.as_ref().filter(|id| !x.snapshot.plugin_configs.contains_key(*id)) {
        return Some((503, format!("failed to fetch plugin config by id: {id}")));
    }
    let id = route.service_id.as_ref().filter(|_| matched.service.is_none())?;
    Some((404, format!("failed to fetch service configuration by id: {id}")))
}

/// The group that the consumer is said to be in, when there is none of that name.
fn missing_group(x: &Exchange) -> Option<Id> {
    let id = x.consumer.as_ref()?.value.group_id.as_ref()?;
    (!x.snapshot.consumer_groups.contains_key(id)).then(|| id.clone())
}

/// nginx's page for the status; the reason is for the log.
async fn refuse(p: &Rc<Proxy>, x: &mut Exchange, status: u16, reason: &str) -> Result<()> {
    x.log(Level::Error, reason.as_bytes());
    rescue::page(p, x, status);
    rescue::stamp(p, x);
    output::answer(x, &p.runner).await
}

/// What a plugin decided instead of going on.
async fn flowed(p: &Proxy, x: &mut Exchange, flow: Flow) -> Result<()> {
    match flow {
        Flow::Next | Flow::Declined | Flow::Sent => Ok(()),
        Flow::Answer => {
            if x.response.head_sent {
                return output::answer(x, &p.runner).await;
            }
            if x.response.status >= 400 && x.printed.is_empty() && !x.response.headers.contains("content-type") {
                let status = x.response.status;
                rescue::page(p, x, status);
            }
            rescue::stamp(p, x);
            output::answer(x, &p.runner).await
        }
        // Plugins know no locations.
        Flow::Close | Flow::Jump => {
            if let Some(client) = &mut x.client {
                client.abort();
            }
            Ok(())
        }
    }
}

async fn function(p: &Rc<Proxy>, x: &mut Exchange, id: &str) -> Result<()> {
    x.lua.host = Some(location::host(p));
    x.phase = Phase::Content;
    match p.runner.function(x, id).await {
        Some(Flow::Next) => flowed(p, x, Flow::Answer).await,
        Some(flow) => flowed(p, x, flow).await,
        None => {
            tracing::error!("failed to find function by id: {id}");
            Err(Error::config(Kind::NotFound).context(format!("function {id} does not exist")))
        }
    }
}

/// A plugin's choice, else the route's upstream, else its service's. Whether its nodes are still to be found.
#[inline(always)]
fn choose_upstream(x: &mut Exchange) -> Result<bool> {
    if x.upstream.chosen.is_none()
        && let Some(upstream) = x.matched.as_ref().and_then(|matched| matched.found.plain_upstream())
    {
        // No registry has a part in a plain route.
        x.upstream.conf = Some(upstream.clone());
        return Ok(false);
    }
    look_for_upstream(x)?;
    // Asked of what lies beside the count that the line before has changed: most that come here have nodes.
    Ok(x.upstream.conf.as_ref().is_some_and(|upstream| upstream.nodes.is_empty() && upstream.discovery.is_some()))
}

fn look_for_upstream(x: &mut Exchange) -> Result<()> {
    if let Some(chosen) = &x.upstream.chosen {
        x.upstream.conf = Some(chosen.clone());
        return Ok(());
    }
    let Some(matched) = &x.matched else { return Ok(()) };
    let route = &matched.route().value;
    let service = matched.service.as_ref().map(|s| &s.value);
    let (inline, id) = if route.upstream.is_some() || route.upstream_id.is_some() {
        (&route.upstream, &route.upstream_id)
    } else {
        match service {
            Some(service) => (&service.upstream, &service.upstream_id),
            None => (&None, &None),
        }
    };
    // An id wins over an upstream beside it, as in APISIX.
    if let Some(id) = id {
        let Some(object) = x.snapshot.upstreams.get(id) else {
            return Err(Error::config(Kind::NotFound).context(format!("failed to find upstream by id: {id}")));
        };
        x.upstream.conf = Some(object.value.clone());
        return Ok(());
    }
    match inline {
        Some(upstream) => x.upstream.conf = Some(upstream.clone()),
        None => {
            return Err(Error::config(Kind::NoNode).context("missing upstream configuration in Route or Service"));
        }
    }
    Ok(())
}

/// Finds the route. Where one that is met has conditions about the body, that is read first.
#[inline(always)]
async fn find_route(p: &Proxy, x: &mut Exchange) -> Result<()> {
    let asked = look_up(p, x);
    if asked.any() {
        Box::pin(asked::read(p, x, asked)).await?;
        // Two kinds of questions may stand one after the other.
        let more = look_up(p, x);
        if more.any() {
            Box::pin(asked::read(p, x, more)).await?;
            look_up(p, x);
        }
    }
    Ok(())
}

/// Sets what matches; what its conditions have asked in vain.
fn look_up(p: &Proxy, x: &mut Exchange) -> Asked {
    let path = matched_path(p, x);
    let tail = p.settings.delete_uri_tail_slash && path.len() > 1 && path.ends_with(b"/");
    let path = path[..path.len() - usize::from(tail)].into();
    let facts = RequestFacts { x, runner: &p.runner, path, asked: Cell::default(), given: RefCell::default() };
    let (found, candidates) = match &x.watch {
        None => (x.snapshot.router.find(&facts), Vec::new()),
        Some(_) => watch::find(x, &facts),
    };
    let asked = facts.asked.get();
    if let Some(watch) = &mut x.watch {
        watch.candidates = candidates;
    }
    if !asked.any()
        && let Some(found) = found
    {
        let service = if found.plain_upstream().is_some() { None } else { service_of(x, &found) };
        x.matched = Some(Matched { found, service });
    }
    asked
}

/// The path that routes are compared with. With `match_uri_encoded_slash` an encoded slash stays `%2F`, as long as nothing but
/// decoding has made the path what it is: what climbs by dots cannot hide behind one.
fn matched_path<'a>(p: &Proxy, x: &'a Exchange) -> Cow<'a, [u8]> {
    let plain = Cow::Borrowed(&x.request.path[..]);
    if !p.settings.match_uri_encoded_slash {
        return plain;
    }
    let raw = x.request.target.split(|b| *b == b'?').next().unwrap_or_default();
    let (mut decoded, mut kept) = (Vec::with_capacity(raw.len()), Vec::with_capacity(raw.len()));
    let digit = |at: usize| raw.get(at).and_then(|b| (*b as char).to_digit(16));
    let mut at = 0;
    while at < raw.len() {
        match (raw[at], digit(at + 1), digit(at + 2)) {
            (b'%', Some(high), Some(low)) => {
                let b = (high * 16 + low) as u8;
                decoded.push(b);
                kept.extend_from_slice(if b == b'/' {
                    b"%2F"
                } else {
                    std::slice::from_ref(&decoded[decoded.len() - 1])
                });
                at += 3;
            }
            (b, ..) => {
                decoded.push(b);
                kept.push(b);
                at += 1;
            }
        }
    }
    if decoded == x.request.path { Cow::Owned(kept) } else { plain }
}

fn service_of(x: &Exchange, found: &Found) -> Option<Arc<Object<Service>>> {
    found.route().value.service_id.as_ref().and_then(|id| x.snapshot.services.get(id)).cloned()
}

/// The request as the router asks about it.
pub(super) struct RequestFacts<'a> {
    x: &'a Exchange,
    runner: &'a Runner,
    path: Cow<'a, [u8]>,
    /// What conditions have asked of a body that is not read.
    asked: Cell<Asked>,
    /// What modules have said of their variables: each is asked once, however many routes have conditions about it.
    given: RefCell<Vec<Given>>,
}

/// A variable's name, and its value where it has one.
type Given = (Box<str>, Option<Vec<u8>>);

impl RequestFacts<'_> {
    /// A variable that a Lua module gives.
    fn registered(&self, name: &str) -> Option<Vec<u8>> {
        if !self.runner.gives(name) {
            return None;
        }
        if let Some((_, known)) = self.given.borrow().iter().find(|(known, _)| **known == *name) {
            return known.clone();
        }
        let value = self.runner.registered(self.x, name);
        self.given.borrow_mut().push((name.into(), value.clone()));
        value
    }
}

impl Facts for RequestFacts<'_> {
    fn host(&self) -> &[u8] {
        &self.x.request.host
    }

    fn path(&self) -> &[u8] {
        &self.path
    }

    fn method(&self) -> &[u8] {
        &self.x.request.method
    }

    fn remote(&self) -> IpAddr {
        self.x.remote().ip()
    }

    fn var(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        let mut asked = self.asked.get();
        asked.note(self.x, name);
        self.asked.set(asked);
        let mut scratch = Vec::new();
        let value = self.x.var(&Var::parse(name), &mut scratch).map(<[u8]>::to_vec);
        value.or_else(|| self.registered(name)).map(Cow::Owned)
    }

    fn filter(&self, route: &Arc<Object<Route>>) -> bool {
        self.runner.filter(self.x, route)
    }
}
