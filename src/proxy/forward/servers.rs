//! The upstreams of locations: their servers are tried as nginx tries them, and their `balancer_by_lua` is asked before each try.
//!
//! Differs from nginx in that the script may wait, and in that the request is written anew for each try: what a script changes
//! holds without `recreate_request`.

use std::{borrow::Cow, rc::Rc, sync::Arc, time::Instant};

use hashbrown::HashMap;

use super::{Reached, Way, body, is_harmless, served, timeouts};
use crate::{
    balancer::{
        Tried,
        group::{Group, Groups, Lease},
    },
    conf::{
        directives::NextUpstream,
        locations::{Locations, Script},
    },
    error::{Error, Kind, Origin, Result, Retry},
    exchange::{Balancing, Exchange, Failure, Phase, RequestBody, Source},
    model::{self, upstream::Node},
    observe::log::Level,
    plugin::Flow,
    proxy::{
        Proxy, location, rescue,
        upload::{Taken, Upload},
    },
};

/// Tries of one request, whatever its scripts ask for.
const MAX_TRIES: u32 = 256;

/// nginx closes the connection without a word.
const CLOSE: u16 = 444;

/// What a `proxy_pass` may name.
pub(in crate::proxy) struct Named {
    /// The servers as nodes, in their order.
    conf: Arc<model::Upstream>,
    group: Rc<Group>,
    balancer: Option<Arc<Script>>,
}

impl Named {
    /// What a `proxy_pass` to `scheme://host` means. `None`: that is no place.
    pub fn find(p: &Proxy, scheme: &str, host: &str) -> Option<Rc<Named>> {
        let known = p.upstreams.get(host).filter(|named| named.group.serves(scheme)).cloned();
        let implicit = || Group::implicit(scheme, host).map(|group| Rc::new(Named::of(Rc::new(group), None)));
        known.or_else(implicit)
    }

    fn of(group: Rc<Group>, balancer: Option<Arc<Script>>) -> Named {
        let nodes = group.peers().iter().map(|peer| {
            let server = &peer.server;
            node(&server.host, server.port)
        });
        Named { conf: Arc::new(model::Upstream::of_nodes(nodes)), group, balancer }
    }
}

fn node(host: &str, port: u16) -> Node {
    Node { host: host.into(), ip: host.parse().ok(), port, explicit_port: true, weight: 1, priority: 0 }
}

/// Every upstream of the worker, by name.
pub(in crate::proxy) fn named(locations: &Locations, groups: &Groups) -> HashMap<Box<str>, Rc<Named>> {
    let script = |name: &str| locations.upstreams.iter().find(|u| *u.name == *name).and_then(|u| u.balancer.clone());
    let named = |group: &Rc<Group>| (group.name.clone(), Rc::new(Named::of(group.clone(), script(&group.name))));
    groups.iter().map(named).collect()
}

/// How a request goes through one of them.
pub(super) struct Servers {
    named: Rc<Named>,
    next: NextUpstream,
    tried: Tried,
    /// Tries that may follow the one that is under way.
    left: u32,
    started: Instant,
    /// Tries of the request at other upstreams, before.
    before: usize,
    /// The server that serves the request.
    lease: Option<Lease>,
    /// The status with which the script has ended the request.
    exit: Option<u16>,
}

/// What a try goes to.
struct Target<'a> {
    node: Cow<'a, Node>,
    /// `None` for a peer that the script has set.
    lease: Option<Lease>,
}

/// Forwards the request to one of the upstream's servers and its response to the client. `next`: when another is tried.
/// `Flow::Jump`: its script has ended the request with a status that an error page is for.
pub(in crate::proxy) async fn forward_to(
    p: &Proxy,
    x: &mut Exchange,
    named: &Rc<Named>,
    next: NextUpstream,
) -> Result<Flow> {
    if named.balancer.is_some() {
        // As nginx does before anything goes upstream: the script sees it, may replace it, and each try has all of it.
        p.runner.read_body(x).await?;
    }
    x.upstream.conf = Some(named.conf.clone());
    x.upstream.balancing = Some(Box::new(Balancing { name: named.group.name.clone(), ..Balancing::default() }));
    let mut servers = Servers {
        named: named.clone(),
        next,
        tried: Tried::default(),
        left: named.group.tries().saturating_sub(1),
        started: Instant::now(),
        before: x.upstream.tries.len(),
        lease: None,
        exit: None,
    };
    servers.left = servers.left.min(servers.most(x));
    let conf = named.conf.clone();
    if served(x, &conf)?.http2 {
        return Err(Error::upstream(Kind::Other).context("gRPC is for upstreams of routes"));
    }
    let (upload, framing) = body(x)?;
    let mut way = Way { servers: Some(Box::new(servers)), ..Way::new(p, x, &conf, upload, framing) };
    let outcome = way.run(x).await;
    let exit = way.servers.as_ref().and_then(|servers| servers.exit);
    // A header filter that ends the response ends it as it stands.
    if (outcome.is_err() || exit.is_some()) && !x.response.head_sent && x.filter_exit.is_none() {
        forget_head(x);
    }
    match (outcome, exit) {
        (Err(e), _) => {
            give_back(p, x, &mut way.upload, &e).await;
            Err(e)
        }
        (Ok(()), Some(status)) => end(p, x, status).await,
        (Ok(()), None) => Ok(Flow::Sent),
    }
}

/// What scripts have set stays; what came of the upstream does not.
fn forget_head(x: &mut Exchange) {
    x.response.headers.clear();
    std::mem::swap(&mut x.response.headers, &mut x.response.early);
    x.response.reason.clear();
    x.response.source = Source::Gateway;
}

/// What a failed upstream was given of the client's body is the request's again: an error page may read it, or pass it on.
async fn give_back(p: &Proxy, x: &mut Exchange, upload: &mut Upload, e: &Error) {
    if !matches!(x.body, RequestBody::Streaming { .. }) {
        return;
    }
    match upload.taken() {
        Taken::Nothing => {}
        Taken::All(body) => x.body = RequestBody::Memory(body.into()),
        Taken::Lost => x.body = RequestBody::Lost,
        Taken::Some(begun) => {
            // nginx has all of it before it asks an upstream. Where no page wants the rest, it is not waited for.
            let wanted = e.origin() != Origin::Client && location::has_page(x, rescue::status_of(e));
            if !wanted || p.runner.read_rest(x, begun).await.is_err() {
                x.body = RequestBody::Lost;
            }
        }
    }
}

impl Servers {
    /// Tries that may follow the one that comes, at most.
    fn most(&self, x: &Exchange) -> u32 {
        let all = if self.next.tries == 0 { MAX_TRIES } else { self.next.tries.min(MAX_TRIES) };
        all.saturating_sub(1 + (x.upstream.tries.len() - self.before) as u32)
    }

    /// The peer that the script has set, else the next of the servers.
    fn target(&self, x: &mut Exchange, now: Instant) -> Result<Target<'_>> {
        if let Some((host, port)) = x.upstream.peer.take() {
            return Ok(Target { node: Cow::Owned(node(&host, port)), lease: None });
        }
        match self.named.group.pick(now, &self.tried) {
            Some(lease) => Ok(Target { node: Cow::Borrowed(&self.named.conf.nodes[lease.at()]), lease: Some(lease) }),
            None if self.named.group.peers().is_empty() => Err(Error::script("lua balancer: no peer set")),
            None => Err(Error::upstream(Kind::Other).context("no live upstreams while connecting to upstream")),
        }
    }

    /// How the try has failed; `None`: it has not. The try's own error that is nobody's upstream counts as none, too.
    fn failure(&self, x: &Exchange, attempted: &Result<Reached>) -> Option<Failure> {
        match attempted {
            Ok(reached) if self.next.has_status(reached.head.status) => {
                let status = reached.head.status;
                Some(Failure { is_next: matches!(status, 403 | 404), status })
            }
            Ok(_) => None,
            Err(e) if e.origin() != Origin::Upstream => None,
            Err(_) => Some(Failure { is_next: false, status: x.upstream.tries.last().map_or(502, |last| last.status) }),
        }
    }

    /// Whether `proxy_next_upstream` wants another try after one that failed. `sent`: something of the request had left.
    fn wants_another(&self, x: &Exchange, attempted: &Result<Reached>, sent: bool) -> bool {
        let of_kind = |kind| match kind {
            Kind::ConnectTimeout | Kind::ReadTimeout | Kind::WriteTimeout => self.next.timeout,
            Kind::Malformed | Kind::TooLarge => self.next.invalid_header,
            _ => self.next.error,
        };
        let (named, safe) = match attempted {
            Ok(_) => (true, false),
            Err(e) => (of_kind(e.kind()), e.retry_advice() == Retry::Safe || !sent),
        };
        let in_time = self.next.within.is_none_or(|limit| self.started.elapsed() < limit);
        named && in_time && self.left > 0 && (safe || self.next.non_idempotent || is_harmless(x))
    }
}

impl Way<'_> {
    /// Tries servers until one answers with a head that is wanted. `None`: the script has ended the request (`Servers::exit`).
    pub(super) async fn reach_server(&mut self, x: &mut Exchange) -> Result<Option<Reached>> {
        let Some(mut servers) = self.servers.take() else { return Err(Error::internal(Kind::Other)) };
        let reached = loop {
            servers.exit = self.ask_script(x, &mut servers).await?;
            if servers.exit.is_some() {
                self.servers = Some(servers);
                return Ok(None);
            }
            let begun = Instant::now();
            let Target { node, lease } = servers.target(x, begun)?;
            let at = lease.as_ref().map_or(usize::MAX, Lease::at);
            let attempted = self.attempt::<true>(x, &node, at, begun).await;
            drop(node);
            let failure = servers.failure(x, &attempted);
            account(x, lease.as_ref(), &attempted, failure);
            let Some(failure) = failure else {
                servers.lease = lease;
                break attempted?;
            };
            let again = servers.wants_another(x, &attempted, self.upload.has_started()) && self.upload.rewind(&x.body);
            if !again {
                servers.lease = lease;
                break attempted?;
            }
            servers.left -= 1;
            servers.tried.extend(lease.as_ref().map(Lease::at));
            leave(x, attempted, failure);
        };
        self.servers = Some(servers);
        Ok(Some(reached))
    }

    /// Has the script say what the try that comes is to be. A status: there is none, that is the answer.
    async fn ask_script(&mut self, x: &mut Exchange, servers: &mut Servers) -> Result<Option<u16>> {
        let Some(script) = &servers.named.balancer else { return Ok(None) };
        let most = servers.most(x);
        x.upstream.peer = None;
        x.upstream.more_tries = None;
        x.upstream.keepalive = None;
        if let Some(balancing) = &mut x.upstream.balancing {
            balancing.most = Some(most);
            balancing.tls_name = None;
        }
        let ended = self.p.runner.balancer(x, script).await;
        x.phase = Phase::Content;
        if let Some(status) = ended? {
            return Ok(Some(status));
        }
        if let Some(more) = x.upstream.more_tries.take() {
            servers.left = more.min(most);
        }
        self.times = timeouts(self.p, x, self.conf);
        // The script may have made another body of it.
        (self.upload, self.framing) = body(x)?;
        Ok(None)
    }
}

/// Tells the server's record how the try has ended.
fn account(x: &Exchange, lease: Option<&Lease>, attempted: &Result<Reached>, failure: Option<Failure>) {
    let Some(lease) = lease else { return };
    let failed = failure.is_some_and(|failure| !failure.is_next);
    if failed && lease.failed(Instant::now()) {
        x.log(Level::Warn, b"upstream server temporarily disabled while connecting to upstream");
    }
    if !failed && attempted.is_ok() {
        lease.succeeded();
    }
}

/// Leaves a try behind for another one.
fn leave(x: &mut Exchange, attempted: Result<Reached>, failure: Failure) {
    match attempted {
        Ok(reached) => {
            if let Some(last) = x.upstream.tries.last_mut() {
                last.response_time = Some(reached.begun.elapsed());
                (last.bytes_received, last.bytes_sent) = (reached.conn.received(), reached.conn.sent());
            }
            // Nothing of its head is the client's.
            x.response.status = 0;
            x.response.headers.clear();
        }
        Err(e) => x.log(Level::Error, e.to_string().as_bytes()),
    }
    if let Some(balancing) = &mut x.upstream.balancing {
        balancing.last_failure = Some(failure);
    }
}

/// Answers with a status of the script's own, or goes to the page for it.
async fn end(p: &Proxy, x: &mut Exchange, status: u16) -> Result<Flow> {
    if status == CLOSE {
        x.response.status = status;
        if let Some(client) = &mut x.client {
            client.abort();
        }
        return Ok(Flow::Sent);
    }
    location::refuse(p, x, status).await
}
