//! Which nodes of upstreams are well. One `Health` per process: probes go out once, whoever asks, and what the requests of one
//! worker tell counts for all.
//!
//! As in APISIX (its health check tutorial), an upstream is checked from its first request on, nodes begin healthy, and balancers ask
//! nobody about health when it leaves no node. What is known of a node goes on in the next version of its upstream.

mod probe;
mod state;

use std::{
    cell::RefCell,
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use tokio::{
    sync::{Notify, Semaphore},
    task::{AbortHandle, JoinSet},
    time::{Instant, sleep, sleep_until},
};

pub use self::state::Event;
use self::state::State;
use crate::{
    balancer::Owner,
    dns::Resolver,
    error::Error,
    model::upstream::{
        PassHost, Upstream,
        checks::{Checks, Limits, Probe},
    },
    observe::log::{self, Level},
    store::{Published, Snapshot},
};

/// Upstreams that are checked. Past it further ones are served without: each is a task and a line of the control API.
const MAX_CHECKERS: usize = 10_000;
/// Probes under way at once, of all upstreams: each is a socket. Others wait for their turn.
const MAX_PROBES: usize = 256;
/// Between two looks at what a configuration that changes all the time has left of the checked upstreams.
const SETTLE: Duration = Duration::from_millis(100);

/// All that is checked.
pub struct Health {
    resolver: Arc<Resolver>,
    /// Before keys where they are shown.
    prefix: String,
    checkers: Mutex<HashMap<Owner, Arc<Checker>>>,
    /// A checker has come.
    changed: Notify,
    turns: Semaphore,
}

/// One version of an upstream that is checked.
pub struct Checker {
    /// `/apisix/upstreams/1`
    name: Box<str>,
    uid: u64,
    checks: Checks,
    /// For probes by TLS, PEM.
    pair: Option<(Box<str>, Box<str>)>,
    /// In the order of the upstream's nodes.
    targets: Box<[Arc<Target>]>,
}

/// What one worker knows of the checkers, so that its requests share no lock.
pub struct Watched {
    /// `None`: nothing is checked.
    health: Option<Arc<Health>>,
    /// By `Upstream::uid`.
    known: RefCell<HashMap<u64, Option<Arc<Checker>>>>,
}

/// Upstreams that a worker knows; past it all are looked up anew.
const MAX_KNOWN: usize = 1000;

/// A node.
struct Target {
    host: Box<str>,
    /// Where requests go.
    port: u16,
    /// What probes call it.
    called: Box<str>,
    state: Mutex<State>,
    /// Of `state`: it is unhealthy.
    down: AtomicBool,
    /// Of `state`: it is healthy, and nothing was counted. What goes well need not be told then.
    calm: AtomicBool,
    /// Where it was found last.
    address: Mutex<Option<IpAddr>>,
}

impl Health {
    /// `prefix`: before keys where they are shown, such as `/apisix`.
    pub fn new(resolver: Arc<Resolver>, prefix: String) -> Arc<Health> {
        let (checkers, changed) = Default::default();
        Arc::new(Health { resolver, prefix, checkers, changed, turns: Semaphore::new(MAX_PROBES) })
    }

    /// What is known of the nodes of an upstream with `checks`, which is checked from now on. `None`: it has none, or too many others
    /// are checked.
    pub fn of(&self, upstream: &Upstream, owner: Owner) -> Option<Arc<Checker>> {
        let checks = upstream.checks.as_deref()?;
        let mut checkers = lock(&self.checkers);
        let before = checkers.get(&owner);
        match before {
            Some(known) if known.uid == upstream.uid => return Some(known.clone()),
            None if checkers.len() >= MAX_CHECKERS => {
                tracing::error!("upstream {} is not checked: {MAX_CHECKERS} others are", self.name(&owner));
                return None;
            }
            _ => {}
        }
        let made = Arc::new(Checker::new(self.name(&owner), upstream, checks, before.map(|before| &**before)));
        // A request that holds on to an old configuration is served by that, and changes nothing.
        if before.is_none_or(|before| before.uid < made.uid) {
            made.announce();
            checkers.insert(owner, made.clone());
            self.changed.notify_one();
        }
        Some(made)
    }

    fn name(&self, owner: &Owner) -> Box<str> {
        let (kind, id) = match owner {
            Owner::Upstream(id) => ("upstreams", id),
            Owner::Route(id) => ("routes", id),
            Owner::Service(id) => ("services", id),
            Owner::StreamRoute(id) => ("stream_routes", id),
        };
        format!("{}/{kind}/{id}", self.prefix).into()
    }

    /// Probes for ever, inside a `LocalSet`. Checkers end with their upstreams.
    pub async fn run(self: Arc<Self>, published: Arc<Published>) {
        let mut revisions = published.subscribe();
        let mut running: HashMap<Owner, (u64, AbortHandle)> = HashMap::new();
        let mut probing = JoinSet::new();
        loop {
            self.follow(&published.load());
            self.start_and_stop(&mut probing, &mut running);
            tokio::select! {
                () = self.changed.notified() => {}
                changed = revisions.changed() => match changed {
                    Ok(()) => sleep(SETTLE).await,
                    Err(_) => return,
                },
                // What was stopped is let go of.
                Some(_) = probing.join_next(), if !probing.is_empty() => {}
            }
        }
    }

    /// Makes the checkers those of the newest configuration.
    fn follow(&self, snapshot: &Snapshot) {
        let mut checkers = lock(&self.checkers);
        checkers.retain(|owner, checker| {
            let Some(upstream) = upstream_of(snapshot, owner).filter(|upstream| upstream.checks.is_some()) else {
                return false;
            };
            if let Some(checks) = upstream.checks.as_deref().filter(|_| upstream.uid > checker.uid) {
                *checker = Arc::new(Checker::new(self.name(owner), upstream, checks, Some(checker)));
                checker.announce();
            }
            true
        });
    }

    fn start_and_stop(self: &Arc<Self>, probing: &mut JoinSet<()>, running: &mut HashMap<Owner, (u64, AbortHandle)>) {
        let checkers = lock(&self.checkers);
        running.retain(|owner, (uid, task)| {
            let goes_on = checkers.get(owner).is_some_and(|checker| checker.uid == *uid);
            if !goes_on {
                task.abort();
            }
            goes_on
        });
        for (owner, checker) in checkers.iter() {
            if !running.contains_key(owner) {
                let task = probing.spawn_local(probe_all(self.clone(), checker.clone()));
                running.insert(owner.clone(), (checker.uid, task));
            }
        }
    }

    /// `GET /v1/healthcheck`: `{ name, type, nodes }` each, by name.
    pub fn list(&self) -> Vec<Value> {
        let mut checkers: Vec<_> = lock(&self.checkers).values().cloned().collect();
        checkers.sort_by(|a, b| a.name.cmp(&b.name));
        checkers.iter().map(|checker| checker.to_json()).collect()
    }
}

fn upstream_of<'s>(snapshot: &'s Snapshot, owner: &Owner) -> Option<&'s Arc<Upstream>> {
    match owner {
        Owner::Upstream(id) => snapshot.upstreams.get(id).map(|object| &object.value),
        Owner::Route(id) => snapshot.routes.get(id)?.value.upstream.as_ref(),
        Owner::Service(id) => snapshot.services.get(id)?.value.upstream.as_ref(),
        Owner::StreamRoute(id) => snapshot.stream_routes.get(id)?.value.upstream.as_ref(),
    }
}

/// Probes each node whenever its time has come.
async fn probe_all(health: Arc<Health>, checker: Arc<Checker>) {
    let [healthy, unhealthy] = checker.checks.active.intervals;
    let mut due = vec![Instant::now(); checker.targets.len()];
    loop {
        let Some(next) = due.iter().min().copied() else { return };
        sleep_until(next).await;
        let now = Instant::now();
        let turn = due.iter().enumerate().filter(|(_, due)| **due <= now).map(|(at, _)| at);
        let probes = turn.clone().map(|at| probe_one(&health, &checker, at));
        stream::iter(probes).buffer_unordered(checker.checks.active.concurrency).collect::<()>().await;
        let again = |at: usize| now + if checker.is_up(at) { healthy } else { unhealthy };
        let turn: Vec<usize> = turn.collect();
        for at in turn {
            due[at] = again(at);
        }
    }
}

async fn probe_one(health: &Health, checker: &Checker, at: usize) {
    let Ok(_turn) = health.turns.acquire().await else { return };
    let (target, active) = (&checker.targets[at], &checker.checks.active);
    let ip = match health.resolver.resolve(&target.host).await {
        Ok(addresses) if !addresses.is_empty() => addresses[0],
        Ok(_) | Err(_) => return checker.tell(at, None, Event::Tcp, &active.limits, "its name has no address"),
    };
    let addr = SocketAddr::new(ip, active.port.unwrap_or(target.port));
    let pair = checker.pair.as_ref().map(|(cert, key)| (&**cert, &**key));
    let (event, why) = probe::probe(addr, &target.called, active, pair).await;
    if let Some(event) = event {
        checker.tell(at, Some(ip), event, &active.limits, &why);
    }
}

impl Watched {
    /// `health`: `None` where nothing is checked.
    pub fn new(health: Option<Arc<Health>>) -> Watched {
        Watched { health, known: RefCell::default() }
    }

    /// As `Health::of`. `owner`: whose the upstream is that has no id.
    pub fn of(&self, upstream: &Upstream, owner: Option<Owner>) -> Option<Arc<Checker>> {
        let health = self.health.as_ref()?;
        let mut known = self.known.borrow_mut();
        if let Some(checker) = known.get(&upstream.uid) {
            return checker.clone();
        }
        if known.len() >= MAX_KNOWN {
            known.clear();
        }
        let owner = upstream.id.clone().map(Owner::Upstream).or(owner)?;
        known.entry(upstream.uid).or_insert_with(|| health.of(upstream, owner)).clone()
    }
}

impl Checker {
    fn new(name: Box<str>, upstream: &Upstream, checks: &Checks, before: Option<&Checker>) -> Checker {
        let target = |node: &crate::model::upstream::Node| {
            let called = match (&checks.active.host, &upstream.pass_host) {
                (Some(host), _) => host.clone(),
                (None, PassHost::Rewrite(host)) => host.clone(),
                (None, PassHost::Node | PassHost::Pass) => node.host.clone(),
            };
            let same =
                |known: &&Arc<Target>| known.host == node.host && known.port == node.port && known.called == called;
            let known = before.filter(|before| before.checks == *checks).and_then(|b| b.targets.iter().find(same));
            known.cloned().unwrap_or_else(|| Arc::new(Target::new(&node.host, node.port, called)))
        };
        Checker {
            targets: upstream.nodes.iter().map(target).collect(),
            pair: upstream.tls.as_ref().and_then(|tls| tls.client_pair.clone()),
            uid: upstream.uid,
            checks: checks.clone(),
            name,
        }
    }

    /// In the words of APISIX's log, as far as they are about the upstream.
    fn announce(&self) {
        tracing::info!("create new checker: upstream#{}", self.name);
        if self.checks.passive.is_some() {
            tracing::info!("enabled healthcheck passive: upstream#{}", self.name);
        }
    }

    /// Whether requests may go to the node of that place.
    pub fn is_up(&self, at: usize) -> bool {
        self.targets.get(at).is_none_or(|target| !target.down.load(Relaxed))
    }

    /// A request's try at a node has got a response.
    pub fn answered(&self, at: usize, ip: IpAddr, status: u16) {
        let Some(passive) = &self.checks.passive else { return };
        if passive.kind == Probe::Tcp || passive.statuses.healthy.contains(&status) {
            if self.targets.get(at).is_some_and(|target| !target.calm.load(Relaxed)) {
                self.tell(at, Some(ip), Event::Success, &passive.limits, "");
            }
        } else if passive.statuses.unhealthy.contains(&status) {
            self.tell(at, Some(ip), Event::Http, &passive.limits, &format!("status {status} of a request"));
        }
    }

    /// A request's try at a node has failed. Where the status that the client would get for it is a failure, it counts as that.
    pub fn failed(&self, at: usize, ip: Option<IpAddr>, e: &Error) {
        let (Some(passive), Some(event)) = (&self.checks.passive, Event::of(e)) else { return };
        let status = if event == Event::Timeout { 504 } else { 502 };
        let counts = passive.kind != Probe::Tcp && passive.statuses.unhealthy.contains(&status);
        self.tell(at, ip, if counts { Event::Http } else { event }, &passive.limits, &e.to_string());
    }

    fn tell(&self, at: usize, ip: Option<IpAddr>, event: Event, limits: &Limits, why: &str) {
        let Some(target) = self.targets.get(at) else { return };
        let Some(counted) = target.take(event, limits, ip) else { return };
        let kind = if event == Event::Success { "healthy" } else { "unhealthy" };
        let text = format!(
            "[healthcheck] (upstream#{}) {kind} {} increment ({}/{}) for '{}({})'{}{why}",
            self.name,
            event.name(),
            counted.count,
            counted.limit,
            target.called,
            target.place(),
            if why.is_empty() { "" } else { ": " },
        );
        log::line(Level::Warn, text.as_bytes(), None);
    }

    fn to_json(&self) -> Value {
        let nodes: Vec<Value> = self.targets.iter().map(|target| target.to_json()).collect();
        // As APISIX, whose lists are maps when they are empty.
        let nodes = if nodes.is_empty() { json!({}) } else { Value::Array(nodes) };
        json!({"name": &*self.name, "type": self.checks.active.kind.name(), "nodes": nodes})
    }
}

impl Target {
    fn new(host: &str, port: u16, called: Box<str>) -> Target {
        Target {
            host: host.into(),
            port,
            called,
            state: Mutex::default(),
            down: AtomicBool::new(false),
            calm: AtomicBool::new(true),
            address: Mutex::new(host.parse().ok()),
        }
    }

    fn take(&self, event: Event, limits: &Limits, ip: Option<IpAddr>) -> Option<state::Counted> {
        if ip.is_some() {
            *lock(&self.address) = ip;
        }
        let mut state = lock(&self.state);
        let counted = state.take(event, limits);
        self.down.store(state.unhealthy, Relaxed);
        self.calm.store(state.name() == "healthy", Relaxed);
        counted
    }

    fn place(&self) -> String {
        match *lock(&self.address) {
            Some(ip) => SocketAddr::new(ip, self.port).to_string(),
            None => format!("{}:{}", self.host, self.port),
        }
    }

    fn to_json(&self) -> Value {
        let state = *lock(&self.state);
        let ip = lock(&self.address).map_or_else(|| self.host.to_string(), |ip| ip.to_string());
        json!({
            "ip": ip, "port": self.port, "hostname": &*self.called, "status": state.name(),
            "counter": {
                "success": state.success, "http_failure": state.http_failure, "tcp_failure": state.tcp_failure,
                "timeout_failure": state.timeout_failure,
            },
        })
    }
}

/// A state is whole after each statement: one that a panic left behind is as good as any.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{dns, model::upstream::Node};

    fn upstream(uid: u64, host: &str, more: Value) -> Upstream {
        let node =
            Node { host: host.into(), ip: host.parse().ok(), port: 1, explicit_port: true, weight: 1, priority: 0 };
        let mut checks = json!({"active": {"unhealthy": {"tcp_failures": 1}}});
        checks["active"].as_object_mut().expect("a map").extend(more.as_object().expect("a map").clone());
        let checks = Checks::from_json(checks.as_object().expect("a map"));
        Upstream { uid, checks: Some(Box::new(checks)), ..Upstream::of_nodes([node]) }
    }

    fn owner(n: usize) -> Owner {
        Owner::Route(n.to_string().into())
    }

    fn health() -> Arc<Health> {
        let config = dns::Config { servers: Vec::new(), valid: None, timeout: Duration::from_secs(1), search: false };
        Health::new(Arc::new(Resolver::new(&config, tokio::runtime::Handle::current())), "/apisix".into())
    }

    #[tokio::test]
    async fn upstreams_past_the_bound_are_served_unchecked() {
        let health = health();
        for n in 0..MAX_CHECKERS {
            assert!(health.of(&upstream(n as u64, "127.0.0.1", json!({})), owner(n)).is_some());
        }
        let more = upstream(MAX_CHECKERS as u64, "127.0.0.1", json!({}));
        assert!(health.of(&more, owner(MAX_CHECKERS)).is_none());
        assert!(health.of(&more, owner(0)).is_some(), "a new version of what is checked is no further one");
        health.follow(&Snapshot::default());
        assert!(health.list().is_empty(), "nobody has them any more");
    }

    #[tokio::test]
    async fn what_is_known_goes_on_until_the_checks_are_others() {
        let health = health();
        let of = |uid, host: &str, more: Value| health.of(&upstream(uid, host, more), owner(0)).expect("a checker");
        let first = of(1, "127.0.0.1", json!({}));
        first.tell(0, None, Event::Tcp, &first.checks.active.limits, "");
        assert!(!first.is_up(0));
        let second = of(2, "127.0.0.1", json!({}));
        assert!(!second.is_up(0));
        assert_eq!(of(1, "127.0.0.1", json!({})).uid, 1, "a request with an old configuration");
        assert_eq!(of(2, "127.0.0.1", json!({})).uid, 2, "which changes nothing");
        assert!(of(3, "127.0.0.2", json!({})).is_up(0), "another node");
        assert!(of(4, "127.0.0.1", json!({})).is_up(0), "it was not in the version before");
        let fourth = of(4, "127.0.0.1", json!({}));
        fourth.tell(0, None, Event::Tcp, &fourth.checks.active.limits, "");
        assert!(of(5, "127.0.0.1", json!({"http_path": "/other"})).is_up(0), "what was asked is not what is asked now");
    }

    #[tokio::test]
    async fn a_worker_looks_up_again_what_it_has_forgotten() {
        let health = health();
        let watched = Watched::new(Some(health.clone()));
        for n in 0..MAX_KNOWN {
            assert!(watched.of(&upstream(n as u64, "127.0.0.1", json!({})), Some(owner(n))).is_some());
        }
        assert_eq!(watched.known.borrow().len(), MAX_KNOWN);
        assert!(watched.of(&upstream(u64::MAX, "127.0.0.1", json!({})), Some(owner(MAX_KNOWN))).is_some());
        assert_eq!(watched.known.borrow().len(), 1);
        assert!(watched.of(&upstream(u64::MAX - 1, "127.0.0.1", json!({})), None).is_none(), "nobody's");
        assert!(Watched::new(None).of(&upstream(0, "127.0.0.1", json!({})), Some(owner(0))).is_none());
    }
}
