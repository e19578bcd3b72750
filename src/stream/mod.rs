//! TCP and UDP proxying by stream routes: APISIX's "stream proxy".
//!
//! A connection, or the datagrams of one UDP client, is a session (`session`): its route is found by where it comes from and goes
//! to, a node of the route's upstream is picked as for requests, and bytes are passed on (`tcp`, `copy`, `udp`) until one side ends
//! or nothing moves for too long. No plugin and no script has a part in it, but
//! for registries that know an upstream's nodes. A session keeps the route that it has begun with.

mod copy;
mod packets;
mod session;
pub mod tcp;
pub mod udp;

use std::{
    cell::Cell,
    future::Future,
    net::SocketAddr,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use ipnet::IpNet;

pub use self::session::Log;
use self::session::{Session, Try};
use crate::{
    balancer::{NoNode, Owner, Picked, Pickers, Tried},
    dns::Resolver,
    error::{Error, Kind, Origin, Result, Retry},
    health::{Checker, Watched},
    model::{
        Upstream,
        route::Timeouts,
        upstream::{Balance, HashOn, Node},
    },
    net::Drain,
    observe::{
        log::Level,
        metrics::{Ends, Metrics},
    },
    router::streams::Place,
    store::{Published, Snapshot},
    tls,
};

/// nginx's `proxy_connect_timeout`.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);
/// nginx's `proxy_timeout`, without a byte in either direction, where the upstream has no `timeout`.
const TCP_IDLE: Duration = Duration::from_secs(600);
/// The same for UDP, where nobody says goodbye: as long as most address translators on the way keep a client's port.
const UDP_IDLE: Duration = Duration::from_secs(60);
/// Tries of one session, whatever `retries` says: one node that refuses at once would be asked without end.
const MAX_TRIES: usize = 256;

/// What goes wrong with UDP sessions is told this often, not once each: whoever forges sender addresses begins one with each datagram.
const REPORT_EVERY: Duration = Duration::from_secs(10);
/// No further node is tried after so long, where `retry_timeout` says nothing: a client that has gone meanwhile is not noticed. Two
/// tries with nginx's time to connect.
const LONGEST_SEARCH: Duration = Duration::from_secs(120);

/// What config.yaml says.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `worker_connections`: of requests and sessions together.
    pub max_connections: usize,
    /// Whose PROXY protocol headers say who the client is.
    pub real_ip_from: Vec<IpNet>,
    /// The name of TLS clients that send none.
    pub fallback_sni: Option<Box<str>>,
    /// Where UDP is taken, with the ports that were found: no client is there.
    pub udp_listeners: Vec<SocketAddr>,
}

/// Who asks registries for the nodes of upstreams that name one, and managers for secrets: the worker's plugins.
pub trait Registries: tls::Secrets {
    /// The upstream with the nodes that its registry knows now.
    fn nodes(&self, upstream: Arc<Upstream>) -> Pin<Box<dyn Future<Output = Result<Arc<Upstream>>> + '_>>;
}

/// What the sessions of one worker share.
pub struct Streams {
    settings: Settings,
    published: Arc<Published>,
    resolver: Arc<Resolver>,
    drain: Drain,
    log: Option<Log>,
    registries: Rc<dyn Registries>,
    metrics: Arc<Metrics>,
    ends: Ends,
    pickers: Pickers,
    /// Whose nodes' health is known.
    watched: Watched,
    /// Spreads sessions over the addresses of a name.
    turn: Cell<usize>,
    /// UDP sessions of all listeners.
    udp_sessions: Cell<usize>,
    /// Lines about UDP sessions.
    udp_lines: Cell<Seldom>,
}

/// Counts what is told only now and then.
#[derive(Clone, Copy, Default)]
struct Seldom {
    since_report: u64,
    reported: Option<Instant>,
}

impl Seldom {
    /// One more; how many there were since the last report, when it is time for the next.
    fn count(cell: &Cell<Seldom>, now: Instant) -> Option<u64> {
        let Seldom { since_report, reported } = cell.get();
        let n = since_report + 1;
        let due = reported.is_none_or(|at| now.saturating_duration_since(at) >= REPORT_EVERY);
        let (since_report, reported) = if due { (0, Some(now)) } else { (n, reported) };
        cell.set(Seldom { since_report, reported });
        due.then_some(n)
    }
}

/// Where a session goes.
struct Target {
    snapshot: Arc<Snapshot>,
    upstream: Arc<Upstream>,
    /// What health checks say of its nodes.
    health: Option<Arc<Checker>>,
}

/// A node that serves a session: its balancer counts it until this is dropped.
struct Lease {
    picked: Rc<Picked>,
    at: usize,
    /// `None`: the node has failed.
    connect_time: Option<Duration>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.picked.picker.done(self.at, self.connect_time, Instant::now());
    }
}

impl Streams {
    /// `drain` counts the worker's connections; sessions are among them.
    pub fn new(
        settings: Settings,
        (published, resolver, watched): (Arc<Published>, Arc<Resolver>, Watched),
        drain: Drain,
        (log, registries): (Option<Log>, Rc<dyn Registries>),
        metrics: Arc<Metrics>,
    ) -> Result<Self> {
        let (pickers, turn, udp_sessions, udp_lines) = Default::default();
        let ends = Ends::of(&metrics)?;
        Ok(Streams {
            settings,
            published,
            resolver,
            drain,
            log,
            registries,
            metrics,
            ends,
            pickers,
            watched,
            turn,
            udp_sessions,
            udp_lines,
        })
    }

    /// Where the session goes. Waits only for a registry, as long as a connection to a node may take. Errors of kind `ConnectTimeout`
    /// past it, else those of the registry.
    async fn target(&self, session: &mut Session) -> Result<Target> {
        let (mut target, owner) = self.choose(session)?;
        if target.upstream.nodes.is_empty() && target.upstream.discovery.is_some() {
            let limit = timeouts(&target.upstream, TCP_IDLE).connect;
            let nodes = tokio::time::timeout(limit, self.registries.nodes(target.upstream)).await;
            target.upstream = nodes.map_err(|_| unanswered(limit))??;
        }
        target.health = target.upstream.checks.as_ref().and_then(|_| self.watched.of(&target.upstream, || owner));
        Ok(target)
    }

    /// The route's upstream, else its service's, and whose it is.
    fn choose(&self, session: &mut Session) -> Result<(Target, Option<Owner>)> {
        let snapshot = self.published.load();
        let sni = session.sni().or(self.settings.fallback_sni.as_deref().filter(|_| session.tls.is_some()));
        let place = Place { client: session.client.ip(), server: session.server, sni };
        let Some(route) = snapshot.stream_router.find(&place).cloned() else {
            return Err(Error::client(Kind::NotFound).context("not hit any route"));
        };
        session.route = Some(route.id.clone());
        session.counted = route.value.counted_as(&route.id);
        let missing = |what: &str, id: &str| {
            Error::config(Kind::NotFound).context(format!("stream route {}: there is no {what} {id}", route.id))
        };
        let (mut inline, mut id) = (&route.value.upstream, &route.value.upstream_id);
        let service = match &route.value.service_id {
            Some(id) => Some(snapshot.services.get(id).ok_or_else(|| missing("service", id))?),
            None => None,
        };
        if let (Some(service), None, None) = (service, inline, id) {
            (inline, id) = (&service.value.upstream, &service.value.upstream_id);
        }
        // An id wins over an upstream beside it, as for requests.
        let upstream = match (id, inline) {
            (Some(id), _) => snapshot.upstreams.get(id).ok_or_else(|| missing("upstream", id))?.value.clone(),
            (None, Some(upstream)) => upstream.clone(),
            (None, None) => {
                let text = format!("stream route {}: missing upstream configuration in Route or Service", route.id);
                return Err(Error::config(Kind::NoNode).context(text));
            }
        };
        let of_service = |_| route.value.service_id.clone().map(Owner::Service);
        let owner = match &route.value.upstream {
            None => service.and_then(of_service),
            Some(_) => Some(Owner::StreamRoute(route.id.clone())),
        };
        Ok((Target { snapshot, upstream, health: None }, owner))
    }

    /// Tries nodes until `open` has reached one.
    async fn reach<T>(
        &self,
        session: &mut Session,
        (upstream, health): (&Upstream, Option<&Checker>),
        open: impl AsyncFn(SocketAddr) -> Result<T>,
    ) -> Result<(T, Lease)> {
        let started = Instant::now();
        let picked = self.pickers.of(upstream, started);
        let is_up = |at: usize| health.is_none_or(|health| health.is_up(at));
        let key = hash_key(session, upstream);
        let tries = upstream.retries.map_or(upstream.nodes.len(), |n| n as usize + 1).min(MAX_TRIES);
        let mut tried = Tried::default();
        loop {
            let begun = Instant::now();
            picked.used.set(begun);
            let at = picked.picker.pick(&key, begun, &tried, &is_up).map_err(no_node)?;
            let mut lease = Lease { picked: picked.clone(), at, connect_time: None };
            let e = match self.attempt(session, &upstream.nodes[at], &open).await {
                Ok(opened) => {
                    lease.connect_time = Some(begun.elapsed());
                    return Ok((opened, lease));
                }
                Err(e) => e,
            };
            drop(lease);
            if let Some(health) = health {
                health.failed(at, session.tries.last().map(|t| t.addr.ip()), &e);
            }
            tried.push(at);
            let late = is_late(started.elapsed(), upstream.retry_timeout);
            if tried.len() >= tries || late || e.retry_advice() != Retry::Safe {
                return Err(e);
            }
            self.tell(session, Level::Warn, &format!("{e}; trying the next upstream node"));
        }
    }

    async fn attempt<T>(
        &self,
        session: &mut Session,
        node: &Node,
        open: &impl AsyncFn(SocketAddr) -> Result<T>,
    ) -> Result<T> {
        let addr = self.address(node).await?;
        let begun = Instant::now();
        session.tries.push(Try::new(addr, begun));
        session.log(Level::Info, &format!("proxy request to {addr}"));
        let opened = open(addr).await;
        if let Some(last) = session.tries.last_mut() {
            let took = begun.elapsed();
            match opened {
                Ok(_) => last.connect_time = Some(took),
                Err(_) => last.session_time = Some(took),
            }
        }
        opened
    }

    async fn address(&self, node: &Node) -> Result<SocketAddr> {
        if let Some(ip) = node.ip {
            return Ok(SocketAddr::new(ip, node.port));
        }
        let failed =
            |e: Error| Error::upstream(Kind::Resolve).retry(Retry::Safe).cause(e).context("no valid upstream node");
        let addresses = self.resolver.resolve(&node.host).await.map_err(failed)?;
        self.turn.set(self.turn.get().wrapping_add(1));
        match addresses.get(self.turn.get() % addresses.len().max(1)) {
            Some(ip) => Ok(SocketAddr::new(*ip, node.port)),
            None => Err(failed(Error::upstream(Kind::Resolve).context(format!("{} has no address", node.host)))),
        }
    }

    /// Writes a line of error.log. Of those about UDP sessions that are worse than `info` one now and then is, with the number of all.
    fn tell(&self, session: &Session, level: Level, text: &str) {
        if session.protocol != "UDP" || level >= Level::Info {
            return session.log(level, text);
        }
        match Seldom::count(&self.udp_lines, Instant::now()) {
            Some(1) => session.log(level, text),
            Some(n) => session.log(level, &format!("{text} (one of {n} such lines, the others are of severity info)")),
            None => session.log(Level::Info, text),
        }
    }

    /// Logs and counts how a session at that listener has ended.
    fn ended(&self, session: &mut Session, listening: SocketAddr, outcome: Result<()>) {
        if let Err(e) = &outcome {
            // What clients do is not the operator's concern, as in nginx and APISIX; access_stream.log has it.
            let of_client = e.origin() == Origin::Client || session.established;
            self.tell(session, if of_client { Level::Info } else { Level::Error }, &e.to_string());
        }
        session.status = status(session, &outcome);
        if let Some(route) = &session.counted {
            let node = session.tries.last().map(|last| last.addr);
            self.ends.ended(route, ending(session.status, &outcome), listening, node);
        }
        if let Some(log) = &self.log {
            log.write(session);
        }
    }
}

fn unanswered(limit: Duration) -> Error {
    let text = format!("no valid upstream node: the registry has not answered within {} ms", limit.as_millis());
    Error::upstream(Kind::ConnectTimeout).context(text)
}

/// Whether a search that has lasted so long goes to no further node.
fn is_late(lasted: Duration, retry_timeout: Option<Duration>) -> bool {
    lasted >= retry_timeout.unwrap_or(LONGEST_SEARCH)
}

/// nginx's `$status` of a session.
fn status(session: &Session, outcome: &Result<()>) -> u16 {
    match outcome {
        // What happens to a session that had a node is its own affair.
        _ if session.established => 200,
        Ok(()) => 200,
        Err(e) if e.origin() == Origin::Upstream => 502,
        Err(e) if e.kind() == Kind::Tls => 403,
        Err(_) => 500,
    }
}

/// How a session has ended, in the words of `stream_status`: nginx's status, which is 200 of whatever had a node, made narrower.
fn ending(status: u16, outcome: &Result<()>) -> u16 {
    match outcome {
        Err(e) if status == 200 && e.origin() == Origin::Client && e.kind() != Kind::ReadTimeout => 400,
        Err(_) if status == 200 => 502,
        _ => status,
    }
}

fn no_node(e: NoNode) -> Error {
    Error::upstream(Kind::NoNode).context(e.message())
}

/// What chash hashes. Of what only requests have, and where a variable is empty, the client's address stands in.
fn hash_key(session: &Session, upstream: &Upstream) -> Vec<u8> {
    let Balance::Chash { on, key } = &upstream.balance else { return Vec::new() };
    let mut out = Vec::new();
    match on {
        HashOn::Vars => drop(session.append_var(key, &mut out)),
        HashOn::VarsCombinations => session::Format::parse(key).append(session, b"", &mut out),
        HashOn::Header | HashOn::Cookie | HashOn::Consumer => {}
    }
    if out.is_empty() {
        out.extend_from_slice(session.client.ip().to_string().as_bytes());
    }
    out
}

/// The upstream's own, else nginx's. `idle`: for reads and writes.
fn timeouts(upstream: &Upstream, idle: Duration) -> Timeouts {
    let own = upstream.timeout.as_deref().copied();
    own.unwrap_or(Timeouts { connect: CONNECT_TIMEOUT, send: idle, read: idle })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happens_often_is_told_seldom_with_its_number() {
        let (cell, begun) = (Cell::default(), Instant::now());
        assert_eq!(Seldom::count(&cell, begun), Some(1));
        let just_before = begun + REPORT_EVERY - Duration::from_nanos(1);
        assert_eq!([Seldom::count(&cell, begun), Seldom::count(&cell, just_before)], [None; 2]);
        assert_eq!(Seldom::count(&cell, begun + REPORT_EVERY), Some(3));
        assert_eq!(Seldom::count(&cell, begun + REPORT_EVERY), None);
    }

    #[test]
    fn what_nginx_calls_200_is_told_apart() {
        for (status, outcome, code) in [
            (200, Ok(()), 200),
            (200, Err(Error::client(Kind::Closed)), 400),
            (200, Err(Error::upstream(Kind::Closed)), 502),
            (200, Err(Error::client(Kind::ReadTimeout)), 502),
            (502, Err(Error::upstream(Kind::ConnectRefused)), 502),
            (403, Err(Error::client(Kind::Tls)), 403),
            (500, Err(Error::config(Kind::NoNode)), 500),
        ] {
            assert_eq!(ending(status, &outcome), code, "{status} {outcome:?}");
        }
    }

    #[test]
    fn a_search_for_a_node_has_an_end() {
        let second = Duration::from_secs(1);
        assert!(!is_late(LONGEST_SEARCH - second, None) && is_late(LONGEST_SEARCH, None));
        assert!(!is_late(second, Some(2 * second)) && is_late(2 * second, Some(2 * second)));
        assert!(!is_late(LONGEST_SEARCH, Some(2 * LONGEST_SEARCH)), "whoever says more gets more");
    }
}
