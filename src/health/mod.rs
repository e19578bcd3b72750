//! Which nodes of upstreams are well. One `Health` per process: probes go out once, whoever asks, and what the requests of one
//! worker tell counts for all.
//!
//! As in APISIX (its health check tutorial), an upstream is checked from its first request on, nodes begin healthy, and balancers ask
//! nobody about health when it leaves no node. What is known of a node goes on in the next version of its upstream.

mod probe;
mod state;

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, HashSet, VecDeque},
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use futures_util::{StreamExt, stream::FuturesUnordered};
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
        Node, PassHost, Upstream,
        checks::{Checks, Limits, Probe},
    },
    observe::log::{self, Level},
    store::{Published, Snapshot},
    tls,
};

/// Upstreams that are checked. Past it further ones are served without: each is a task and a line of the control API.
const MAX_CHECKERS: usize = 10_000;
/// Probes under way at once, of all upstreams: each is a socket. Others wait for their turn.
const MAX_PROBES: usize = 256;
/// Between two looks at what is checked: a configuration may change all the time, and thousands of upstreams come at once.
const SETTLE: Duration = Duration::from_millis(100);

/// All that is checked.
pub struct Health {
    resolver: Arc<Resolver>,
    /// Before keys where they are shown.
    prefix: String,
    checked: Mutex<HashMap<Owner, Arc<Checked>>>,
    /// Something was added.
    changed: Notify,
    turns: Semaphore,
    /// The same for names that are looked up.
    lookups: Semaphore,
}

/// An upstream that is checked, as it is written.
struct Checked {
    /// `/apisix/upstreams/1`
    name: Box<str>,
    /// Of the upstream as it is written: what a registry finds for it are its views.
    uid: u64,
    checks: Checks,
    /// For probes by TLS, PEM.
    pair: Option<(Box<str>, Box<str>)>,
    /// Its nodes come from a registry.
    is_found: bool,
    targets: Mutex<Targets>,
}

/// The nodes of the last views.
#[derive(Clone, Default)]
struct Targets {
    by_place: HashMap<Place, Arc<Target>>,
    views: VecDeque<(u64, Box<[Arc<Target>]>)>,
}

/// Views whose nodes are probed: one, where nodes are written; of a registry, whose answers may differ from request to request, the
/// last few.
const MAX_VIEWS: usize = 16;

/// Host, port, and what probes call it.
type Place = (Box<str>, u16, Box<str>);

/// The nodes of one upstream, in their order.
pub struct Checker {
    of: Arc<Checked>,
    targets: Box<[Arc<Target>]>,
}

/// What one worker knows of the checkers, so that its requests share no lock.
pub struct Watched {
    /// `None`: nothing is checked.
    health: Option<Arc<Health>>,
    /// By `Upstream::uid`.
    known: RefCell<HashMap<u64, Option<Arc<Checker>>>>,
    /// Nodes of all of them.
    nodes: Cell<usize>,
}

/// Upstreams that a worker knows; past it all are looked up anew.
const MAX_KNOWN: usize = MAX_CHECKERS;
/// Their nodes together, likewise: a registry may give another list to each request.
const MAX_KNOWN_NODES: usize = 200_000;

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
    /// When it is to be probed next.
    due: Mutex<Instant>,
}

impl Health {
    /// `prefix`: before keys where they are shown, such as `/apisix`.
    pub fn new(resolver: Arc<Resolver>, prefix: String) -> Arc<Health> {
        let (checked, changed) = Default::default();
        let [turns, lookups] = [MAX_PROBES; 2].map(Semaphore::new);
        Arc::new(Health { resolver, prefix, checked, changed, turns, lookups })
    }

    /// What is known of the nodes of an upstream with `checks`, which is checked from now on. `None`: it has none, or too many others
    /// are checked.
    pub fn of(&self, upstream: &Upstream, owner: Owner) -> Option<Arc<Checker>> {
        let checks = upstream.checks.as_deref()?;
        let uid = upstream.discovery.as_ref().map_or(upstream.uid, |discovery| discovery.uid);
        let before = {
            let checked = lock(&self.checked);
            let known = checked.get(&owner).cloned();
            if known.is_none() && checked.len() >= MAX_CHECKERS {
                tracing::error!("upstream {} is not checked: {MAX_CHECKERS} others are", self.name(&owner));
                return None;
            }
            known
        };
        if let Some(known) = before.as_ref().filter(|known| known.uid == uid) {
            return Some(known.view(upstream));
        }
        let made = Arc::new(Checked::new(self.name(&owner), uid, upstream, checks, before.as_deref()));
        let checker = made.view(upstream);
        let mut checked = lock(&self.checked);
        // A request that holds on to an old configuration is served by that, and changes nothing.
        match checked.get(&owner) {
            // Another worker was quicker: one set of targets is probed.
            Some(known) if known.uid == uid => return Some(known.view(upstream)),
            Some(known) if known.uid > uid => {}
            _ => {
                made.announce();
                checked.insert(owner, made);
                self.changed.notify_one();
            }
        }
        Some(checker)
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

    /// Probes for ever, inside a `LocalSet`. What is checked ends with its upstream.
    pub async fn run(self: Arc<Self>, published: Arc<Published>) {
        let mut revisions = published.subscribe();
        let mut running: HashMap<Owner, (u64, AbortHandle)> = HashMap::new();
        let mut probing = JoinSet::new();
        loop {
            self.start_and_stop(&mut probing, &mut running);
            // What was stopped is let go of.
            while probing.try_join_next().is_some() {}
            tokio::select! {
                () = self.changed.notified() => {}
                changed = revisions.changed() => {
                    if changed.is_err() {
                        return;
                    }
                }
            }
            sleep(SETTLE).await;
            // Also what a request with an old configuration has added.
            self.follow(&published.load());
        }
    }

    /// Makes what is checked that of the newest configuration.
    fn follow(&self, snapshot: &Snapshot) {
        let known: Vec<(Owner, Arc<Checked>)> =
            lock(&self.checked).iter().map(|(owner, checked)| (owner.clone(), checked.clone())).collect();
        for (owner, before) in known {
            let upstream = upstream_of(snapshot, &owner).filter(|upstream| upstream.checks.is_some());
            match upstream {
                Some(upstream) if upstream.uid <= before.uid => {}
                // A registry is asked by requests: the next one brings the nodes, and finds what is known of them.
                Some(upstream) if upstream.discovery.is_some() => {}
                Some(upstream) => drop(self.of(upstream, owner)),
                None => {
                    let mut checked = lock(&self.checked);
                    if checked.get(&owner).is_some_and(|known| Arc::ptr_eq(known, &before)) {
                        checked.remove(&owner);
                    }
                }
            }
        }
    }

    fn start_and_stop(self: &Arc<Self>, probing: &mut JoinSet<()>, running: &mut HashMap<Owner, (u64, AbortHandle)>) {
        let checked = lock(&self.checked);
        running.retain(|owner, (uid, task)| {
            let goes_on = checked.get(owner).is_some_and(|checked| checked.uid == *uid);
            if !goes_on {
                task.abort();
            }
            goes_on
        });
        for (owner, checked) in checked.iter() {
            if !running.contains_key(owner) {
                let task = probing.spawn_local(probe_all(self.clone(), checked.clone()));
                running.insert(owner.clone(), (checked.uid, task));
            }
        }
    }

    /// `GET /v1/healthcheck`: `{ name, type, nodes }` each, by name.
    pub fn list(&self) -> Vec<Value> {
        let mut checked: Vec<_> = lock(&self.checked).values().cloned().collect();
        checked.sort_by(|a, b| a.name.cmp(&b.name));
        checked.iter().map(|checked| checked.to_json()).collect()
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

/// Probes each node whenever its time has come. One that takes long holds up no other.
async fn probe_all(health: Arc<Health>, checked: Arc<Checked>) {
    let active = &checked.checks.active;
    let mut under_way = FuturesUnordered::new();
    let mut busy: HashSet<*const Target> = HashSet::new();
    let mut waiting: VecDeque<Arc<Target>> = VecDeque::new();
    let mut look = Instant::now();
    loop {
        let now = Instant::now();
        if waiting.is_empty() && look <= now {
            look = now + if checked.is_found { LOOK_EVERY } else { REST };
            for target in checked.targets() {
                let due = *lock(&target.due);
                if due > now {
                    look = look.min(due);
                } else if busy.insert(Arc::as_ptr(&target)) {
                    waiting.push_back(target);
                }
            }
            look = look.max(now + LOOK_AT_MOST_EVERY);
        }
        while under_way.len() < active.concurrency.min(MAX_PROBES) {
            let Some(target) = waiting.pop_front() else { break };
            under_way.push(probe_one(&health, &checked, target));
        }
        tokio::select! {
            Some(ended) = under_way.next() => {
                busy.remove(&Arc::as_ptr(&ended));
                look = look.min(*lock(&ended.due));
            }
            () = sleep_until(look), if waiting.is_empty() => {}
        }
    }
}

/// New nodes of a registry are looked for so often, when no probe is due before. Nodes that are written are the same for ever.
const LOOK_EVERY: Duration = Duration::from_secs(1);
const REST: Duration = Duration::from_secs(86_400);
/// Thousands of nodes are not looked over for each of them.
const LOOK_AT_MOST_EVERY: Duration = Duration::from_millis(50);

async fn probe_one(health: &Health, checked: &Checked, target: Arc<Target>) -> Arc<Target> {
    let begun = Instant::now();
    ask(health, checked, &target).await;
    let [healthy, unhealthy] = checked.checks.active.intervals;
    *lock(&target.due) = begun + if target.down.load(Relaxed) { unhealthy } else { healthy };
    target
}

async fn ask(health: &Health, checked: &Checked, target: &Target) {
    let active = &checked.checks.active;
    let Ok(lookup) = health.lookups.acquire().await else { return };
    let resolved = health.resolver.resolve(&target.host).await;
    drop(lookup);
    let ip = match resolved {
        Ok(addresses) if !addresses.is_empty() => addresses[0],
        Ok(_) | Err(_) => {
            return checked.tell(target, None, Event::Tcp, &active.limits, "its name has no address");
        }
    };
    let Ok(_turn) = health.turns.acquire().await else { return };
    let addr = SocketAddr::new(ip, active.port.unwrap_or(target.port));
    let pair = checked.pair.as_ref().map(tls::secrets::known_pair);
    // Whether the node is well is not known without the certificate that it wants to see: requests fetch it.
    if pair.as_ref().is_some_and(Option::is_none) {
        return;
    }
    let pair = pair.flatten();
    let pair = pair.as_ref().map(|(cert, key)| (&**cert, &**key));
    let (event, why) = probe::probe(addr, &target.called, active, pair).await;
    if let Some(event) = event {
        checked.tell(target, Some(ip), event, &active.limits, &why);
    }
}

impl Watched {
    /// `health`: `None` where nothing is checked.
    pub fn new(health: Option<Arc<Health>>) -> Watched {
        Watched { health, known: RefCell::default(), nodes: Cell::new(0) }
    }

    /// As `Health::of`. `owner`: whose the upstream is that has no id; asked where the upstream is not known.
    pub fn of(&self, upstream: &Upstream, owner: impl FnOnce() -> Option<Owner>) -> Option<Arc<Checker>> {
        let health = self.health.as_ref()?;
        let mut known = self.known.borrow_mut();
        if let Some(checker) = known.get(&upstream.uid) {
            return checker.clone();
        }
        let nodes = self.nodes.get() + upstream.nodes.len();
        self.nodes.set(nodes);
        if known.len() >= MAX_KNOWN || nodes > MAX_KNOWN_NODES {
            known.clear();
            self.nodes.set(upstream.nodes.len());
        }
        let owner = upstream.id.clone().map(Owner::Upstream).or_else(owner)?;
        known.entry(upstream.uid).or_insert_with(|| health.of(upstream, owner)).clone()
    }
}

impl Checked {
    fn new(name: Box<str>, uid: u64, upstream: &Upstream, checks: &Checks, before: Option<&Checked>) -> Checked {
        let before = before.filter(|before| before.checks == *checks);
        let mut targets = before.map(|before| lock(&before.targets).clone()).unwrap_or_default();
        let is_found = upstream.discovery.is_some();
        // What a registry finds in turn goes on, too; what was written is what is written now.
        if !is_found {
            targets.views.clear();
        }
        let pair = upstream.tls.as_ref().and_then(|tls| tls.client_pair.clone());
        Checked { name, uid, checks: checks.clone(), pair, is_found, targets: Mutex::new(targets) }
    }

    /// What is known of the nodes of one of its upstreams.
    fn view(self: &Arc<Self>, upstream: &Upstream) -> Arc<Checker> {
        let called = |node: &Node| match (&self.checks.active.host, &upstream.pass_host) {
            (Some(host), _) | (None, PassHost::Rewrite(host)) => host.clone(),
            (None, PassHost::Node | PassHost::Pass) => node.host.clone(),
        };
        let mut targets = lock(&self.targets);
        let known = targets.views.iter().find(|(uid, _)| *uid == upstream.uid).map(|(_, view)| view.clone());
        let view = known.unwrap_or_else(|| {
            let places = upstream.nodes.iter().map(|node| (node.host.clone(), node.port, called(node)));
            targets.add(upstream.uid, places)
        });
        Arc::new(Checker { of: self.clone(), targets: view })
    }

    fn targets(&self) -> Vec<Arc<Target>> {
        lock(&self.targets).by_place.values().cloned().collect()
    }

    /// In the words of APISIX's log, as far as they are about the upstream.
    fn announce(&self) {
        tracing::info!("create new checker: upstream#{}", self.name);
        if self.checks.passive.is_some() {
            tracing::info!("enabled healthcheck passive: upstream#{}", self.name);
        }
    }

    fn tell(&self, target: &Target, ip: Option<IpAddr>, event: Event, limits: &Limits, why: &str) {
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
        let mut nodes: Vec<Value> = self.targets().iter().map(|target| target.to_json()).collect();
        nodes.sort_by_key(|node| (node["ip"].to_string(), node["port"].as_u64()));
        // As APISIX, whose lists are maps when they are empty.
        let nodes = if nodes.is_empty() { json!({}) } else { Value::Array(nodes) };
        json!({"name": &*self.name, "type": self.checks.active.kind.name(), "nodes": nodes})
    }
}

impl Targets {
    /// The nodes of one more upstream; those that only forgotten ones have had go.
    fn add(&mut self, uid: u64, places: impl Iterator<Item = Place>) -> Box<[Arc<Target>]> {
        let make =
            |place: Place| self.by_place.entry(place).or_insert_with_key(|place| Arc::new(Target::new(place))).clone();
        let view: Box<[Arc<Target>]> = places.map(make).collect();
        if self.views.len() >= MAX_VIEWS {
            self.views.pop_front();
        }
        self.views.push_back((uid, view.clone()));
        let in_use: HashSet<*const Target> =
            self.views.iter().flat_map(|(_, view)| view.iter().map(Arc::as_ptr)).collect();
        self.by_place.retain(|_, target| {
            let stays = in_use.contains(&Arc::as_ptr(target));
            if !stays {
                // Nobody probes it any more: whoever still has it must not pass it over for ever.
                target.down.store(false, Relaxed);
            }
            stays
        });
        view
    }
}

impl Checker {
    /// Whether requests may go to the node of that place.
    pub fn is_up(&self, at: usize) -> bool {
        self.targets.get(at).is_none_or(|target| !target.down.load(Relaxed))
    }

    /// A request's try at a node has got a response.
    pub fn answered(&self, at: usize, ip: IpAddr, status: u16) {
        let (Some(passive), Some(target)) = (&self.of.checks.passive, self.targets.get(at)) else { return };
        if passive.kind == Probe::Tcp || passive.statuses.healthy.contains(&status) {
            if !target.calm.load(Relaxed) {
                self.of.tell(target, Some(ip), Event::Success, &passive.limits, "");
            }
        } else if passive.statuses.unhealthy.contains(&status) {
            let why = format!("status {status} of a request");
            self.of.tell(target, Some(ip), Event::Http, &passive.limits, &why);
        }
    }

    /// A request's try at a node has failed. Where the status that the client would get for it is a failure, it counts as that.
    pub fn failed(&self, at: usize, ip: Option<IpAddr>, e: &Error) {
        let (Some(passive), Some(target)) = (&self.of.checks.passive, self.targets.get(at)) else { return };
        let Some(event) = Event::of(e) else { return };
        let status = if event == Event::Timeout { 504 } else { 502 };
        let counts = passive.kind != Probe::Tcp && passive.statuses.unhealthy.contains(&status);
        self.of.tell(target, ip, if counts { Event::Http } else { event }, &passive.limits, &e.to_string());
    }
}

impl Target {
    fn new((host, port, called): &Place) -> Target {
        Target {
            host: host.clone(),
            port: *port,
            called: called.clone(),
            state: Mutex::default(),
            down: AtomicBool::new(false),
            calm: AtomicBool::new(true),
            address: Mutex::new(host.parse().ok()),
            due: Mutex::new(Instant::now()),
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
    use crate::dns;

    fn upstream(uid: u64, host: &str, more: Value) -> Upstream {
        let node =
            Node { host: host.into(), ip: host.parse().ok(), port: 1, explicit_port: true, weight: 1, priority: 0 };
        let mut checks = json!({"active": {"unhealthy": {"tcp_failures": 1}}});
        checks["active"].as_object_mut().expect("a map").extend(more.as_object().expect("a map").clone());
        let checks = Checks::from_json(checks.as_object().expect("a map"));
        Upstream { uid, checks: Some(Box::new(checks)), ..Upstream::of_nodes([node]) }
    }

    fn fails(checker: &Checker) {
        checker.of.tell(&checker.targets[0], None, Event::Tcp, &checker.of.checks.active.limits, "");
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
        fails(&first);
        assert!(!first.is_up(0));
        let second = of(2, "127.0.0.1", json!({}));
        assert!(!second.is_up(0));
        assert_eq!(of(1, "127.0.0.1", json!({})).of.uid, 1, "a request with an old configuration");
        assert_eq!(of(2, "127.0.0.1", json!({})).of.uid, 2, "which changes nothing");
        assert!(of(3, "127.0.0.2", json!({})).is_up(0), "another node");
        assert!(of(4, "127.0.0.1", json!({})).is_up(0), "it was not in the version before");
        let fourth = of(4, "127.0.0.1", json!({}));
        fails(&fourth);
        assert!(of(5, "127.0.0.1", json!({"http_path": "/other"})).is_up(0), "what was asked is not what is asked now");
    }

    #[tokio::test]
    async fn what_a_registry_finds_in_turn_is_known_and_probed_together() {
        let health = health();
        let discovery =
            || crate::model::upstream::Discovery { kind: "r".into(), service: "s".into(), args: None, uid: 7 };
        let of = |uid: u64, host: &str| {
            let found = Upstream { discovery: Some(Box::new(discovery())), ..upstream(uid, host, json!({})) };
            health.of(&found, owner(0)).expect("a checker")
        };
        let (first, second) = (of(8, "127.0.0.1"), of(9, "127.0.0.2"));
        fails(&first);
        assert!(!of(8, "127.0.0.1").is_up(0) && !of(10, "127.0.0.1").is_up(0) && second.is_up(0));
        assert_eq!(first.of.targets().len(), 2, "both are probed");
        for n in 0..MAX_VIEWS as u64 {
            of(100 + n, "127.0.0.3");
        }
        assert_eq!(first.of.targets().len(), 1, "what was not found for long is not");
        assert_eq!(lock(&first.of.targets).views.len(), MAX_VIEWS);
        // Ten thousand nodes of which one is another: no time that would be seen.
        let many = |last: &str| {
            let nodes = (0..9_999).map(|n| format!("n{n}")).chain([last.to_owned()]);
            let node = |host: String| Node {
                ip: None,
                host: host.into(),
                port: 1,
                explicit_port: true,
                weight: 1,
                priority: 0,
            };
            Upstream { checks: upstream(0, "a", json!({})).checks, ..Upstream::of_nodes(nodes.map(node)) }
        };
        for last in ["a", "b", "c"] {
            assert!(health.of(&many(last), owner(1)).expect("a checker").is_up(9_999));
        }
    }

    #[tokio::test]
    async fn workers_that_come_at_once_share_what_is_known() {
        let health = health();
        let all = std::thread::scope(|scope| {
            let of = |_| scope.spawn(|| health.of(&upstream(1, "127.0.0.1", json!({})), owner(0)).expect("a checker"));
            let all: Vec<_> = (0..8).map(of).collect();
            all.into_iter().map(|one| one.join().expect("a checker")).collect::<Vec<_>>()
        });
        fails(&all[0]);
        assert!(all.iter().all(|one| !one.is_up(0)));
    }

    #[tokio::test]
    async fn what_a_registry_finds_goes_on_when_its_upstream_is_written() {
        let health = health();
        let of = |written: u64, uid: u64, host: &str| {
            let discovery =
                crate::model::upstream::Discovery { kind: "r".into(), service: "s".into(), args: None, uid: written };
            let found = Upstream { discovery: Some(Box::new(discovery)), ..upstream(uid, host, json!({})) };
            health.of(&found, owner(0)).expect("a checker")
        };
        let (_, second) = (of(1, 2, "127.0.0.1"), of(1, 3, "127.0.0.2"));
        fails(&second);
        of(4, 5, "127.0.0.1");
        assert!(!of(4, 6, "127.0.0.2").is_up(0));
    }

    #[tokio::test]
    async fn a_worker_looks_up_again_what_it_has_forgotten() {
        let health = health();
        let watched = Watched::new(Some(health.clone()));
        for n in 0..MAX_KNOWN {
            assert!(watched.of(&upstream(n as u64, "127.0.0.1", json!({})), || Some(owner(n))).is_some());
        }
        assert_eq!(watched.known.borrow().len(), MAX_KNOWN);
        assert!(
            watched.of(&upstream(u64::MAX, "127.0.0.1", json!({})), || Some(owner(MAX_KNOWN))).is_none(),
            "too many are checked"
        );
        assert_eq!(watched.known.borrow().len(), 1);
        assert!(watched.of(&upstream(u64::MAX - 1, "127.0.0.1", json!({})), || None).is_none(), "nobody's");
        assert!(Watched::new(None).of(&upstream(0, "127.0.0.1", json!({})), || Some(owner(0))).is_none());
    }
}
