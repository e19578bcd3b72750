//! The servers of one of `lua_upstreams`, picked as nginx's round robin picks them, and what is known of each.
//!
//! Pure, as its parent: times are arguments. A `Group` belongs to one worker, as in nginx without a `zone`: all that
//! it knows of a server (failures, `down`) was seen or said there.
//!
//! A server that fails `max_fails` times, each within `fail_timeout` of the one before, rests for `fail_timeout`. Then one request
//! may try it: it is back when that succeeds, and rests again when it fails. The only server of a group never rests. Backup servers are
//! asked when no primary one can be.

use std::{
    cell::Cell,
    collections::HashMap,
    rc::Rc,
    time::{Duration, Instant},
};

use super::Tried;
use crate::conf::{locations::Locations, upstreams::Server};

/// Those of a worker, by name.
#[derive(Debug, Default)]
pub struct Groups {
    /// In the order in which scripts are told of them.
    list: Vec<Rc<Group>>,
    by_name: HashMap<Box<str>, usize>,
}

/// One upstream.
#[derive(Debug)]
pub struct Group {
    pub name: Box<str>,
    /// Nobody has written it down: a `proxy_pass` names its only server. The port where it names none.
    pub implicit: Option<u16>,
    peers: Vec<Peer>,
    /// Indexes into `peers`.
    primary: Vec<usize>,
    backup: Vec<usize>,
}

/// A server and what this worker knows of it.
#[derive(Debug)]
pub struct Peer {
    pub server: Server,
    pub down: Cell<bool>,
    /// What it is owed: the one that is owed most is picked.
    pub current_weight: Cell<i64>,
    /// Its weight, lower after failures.
    pub effective_weight: Cell<i64>,
    pub fails: Cell<u32>,
    /// Requests that it is serving.
    pub conns: Cell<usize>,
    /// When it was picked last.
    pub accessed: Cell<Option<Instant>>,
    /// When it was found to fail, or picked to see whether it still does.
    pub checked: Cell<Option<Instant>>,
    /// Until then it is not picked, if it has failed often enough; failures before it count together with those after.
    rests_until: Cell<Option<Instant>>,
}

/// A peer that was picked for a try. Counts among its connections until it is dropped.
#[derive(Debug)]
pub struct Lease {
    group: Rc<Group>,
    at: usize,
    /// It had failed too often: this try says whether it is back.
    probe: bool,
}

impl Groups {
    /// Those that are written down, then the hosts that a `proxy_pass` names beside them.
    pub fn new(locations: &Locations) -> Groups {
        let mut groups = Groups::default();
        let written = locations.upstreams.iter().map(|u| Group::new(&u.name, &u.servers));
        written
            .map(Some)
            .chain(locations.proxied().map(|(scheme, host)| Group::implicit(scheme, host)))
            .for_each(|group| groups.add(group));
        groups
    }

    /// Unless it is no group, or one of its name is there.
    fn add(&mut self, group: Option<Group>) {
        let Some(group) = group.filter(|group| !self.by_name.contains_key(&group.name)) else { return };
        self.by_name.insert(group.name.clone(), self.list.len());
        self.list.push(Rc::new(group));
    }

    pub fn get(&self, name: &str) -> Option<&Rc<Group>> {
        self.by_name.get(name).map(|at| &self.list[*at])
    }

    pub fn iter(&self) -> impl Iterator<Item = &Rc<Group>> {
        self.list.iter()
    }
}

impl Group {
    fn new(name: &str, servers: &[Server]) -> Group {
        let of = |backup: bool| servers.iter().enumerate().filter(move |(_, s)| s.backup == backup).map(|(at, _)| at);
        Group {
            name: name.into(),
            implicit: None,
            primary: of(false).collect(),
            backup: of(true).collect(),
            peers: servers.iter().cloned().map(Peer::new).collect(),
        }
    }

    /// The group of a `proxy_pass` to `scheme://place`; `None`: that is no address and no name.
    pub fn implicit(scheme: &str, place: &str) -> Option<Group> {
        let port = default_port(scheme);
        let server = Server::at(place, port).ok()?;
        Some(Group { implicit: Some(port), ..Group::new(place, &[server]) })
    }

    /// Whether a `proxy_pass` that names it means it: without a port, the scheme says which one.
    pub fn serves(&self, scheme: &str) -> bool {
        let port = default_port(scheme);
        self.implicit.is_none_or(|known| known == port || self.peers.iter().all(|peer| peer.server.port != known))
    }

    /// Primary and backup ones, in the order in which they are written.
    pub fn peers(&self) -> &[Peer] {
        &self.peers
    }

    /// The primary ones, or the backups, each in its order: `id` of a peer in `ngx.upstream` is its place there.
    pub fn level(&self, backup: bool) -> impl ExactSizeIterator<Item = &Peer> {
        if backup { &self.backup } else { &self.primary }.iter().map(|at| &self.peers[*at])
    }

    /// How many servers one request may try.
    pub fn tries(&self) -> u32 {
        u32::try_from(self.peers.iter().filter(|peer| !peer.down.get()).count()).unwrap_or(u32::MAX)
    }

    /// The server to try, none of `tried`. `None`: nobody is left that could be asked.
    pub fn pick(self: &Rc<Self>, now: Instant, tried: &Tried) -> Option<Lease> {
        let usable = |at: usize| {
            let peer = &self.peers[at];
            !peer.down.get() && (self.is_single() || (!tried.contains(&at) && !peer.rests(now)))
        };
        let at = [&self.primary, &self.backup].into_iter().find_map(|level| self.most_owed(level, &usable))?;
        let peer = &self.peers[at];
        let probe = !self.is_single() && peer.has_failed_out();
        if probe {
            // Other requests wait for what comes of this one.
            peer.rest(now);
        }
        peer.accessed.set(Some(now));
        peer.conns.set(peer.conns.get() + 1);
        Some(Lease { group: self.clone(), at, probe })
    }

    /// Every usable peer earns its weight; the one that is owed most pays for all.
    fn most_owed(&self, level: &[usize], usable: &impl Fn(usize) -> bool) -> Option<usize> {
        let mut total = 0;
        let mut best: Option<usize> = None;
        for &at in level.iter().filter(|at| usable(**at)) {
            let peer = &self.peers[at];
            let earned = peer.effective_weight.get();
            total += earned;
            peer.current_weight.set(peer.current_weight.get() + earned);
            peer.effective_weight.set((earned + 1).min(i64::from(peer.server.weight)));
            if best.is_none_or(|best| peer.current_weight > self.peers[best].current_weight) {
                best = Some(at);
            }
        }
        let paying = &self.peers[best?].current_weight;
        paying.set(paying.get() - total);
        best
    }

    fn is_single(&self) -> bool {
        self.peers.len() == 1
    }
}

impl Peer {
    fn new(server: Server) -> Peer {
        Peer {
            down: Cell::new(server.down),
            current_weight: Cell::new(0),
            effective_weight: Cell::new(server.weight.into()),
            fails: Cell::new(0),
            conns: Cell::new(0),
            accessed: Cell::new(None),
            checked: Cell::new(None),
            rests_until: Cell::new(None),
            server,
        }
    }

    fn has_failed_out(&self) -> bool {
        self.server.max_fails > 0 && self.fails.get() >= self.server.max_fails
    }

    fn rests(&self, now: Instant) -> bool {
        self.has_failed_out() && self.rests_until.get().is_some_and(|until| now < until)
    }

    fn rest(&self, now: Instant) {
        self.checked.set(Some(now));
        self.rests_until.set(Some(later(now, self.server.fail_timeout)));
    }

    /// Whether that is when it begins to rest.
    fn fail(&self, now: Instant) -> bool {
        let rested_before = self.has_failed_out();
        if !rested_before && self.rests_until.get().is_none_or(|until| now >= until) {
            self.fails.set(0);
        }
        self.fails.set(self.fails.get().saturating_add(1));
        self.rest(now);
        if let Some(lost) = self.server.weight.checked_div(self.server.max_fails) {
            self.effective_weight.set((self.effective_weight.get() - i64::from(lost)).max(0));
        }
        self.has_failed_out() && !rested_before
    }
}

impl Lease {
    /// Index into the group's peers.
    pub fn at(&self) -> usize {
        self.at
    }

    fn peer(&self) -> &Peer {
        &self.group.peers[self.at]
    }

    /// The server has answered.
    pub fn succeeded(&self) {
        if self.probe {
            self.peer().fails.set(0);
        }
    }

    /// It has not, or with an error. Whether it rests from now on.
    pub fn failed(&self, now: Instant) -> bool {
        !self.group.is_single() && self.peer().fail(now)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let conns = &self.peer().conns;
        conns.set(conns.get() - 1);
    }
}

fn default_port(scheme: &str) -> u16 {
    if scheme == "https" { 443 } else { 80 }
}

/// A year from `now` at the latest: no sum of instants overflows.
fn later(now: Instant, after: Duration) -> Instant {
    now + after.min(Duration::from_secs(365 * 86_400))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::conf::upstreams::Upstream;

    fn group(servers: &[&str]) -> Rc<Group> {
        let servers: Vec<_> = servers.iter().map(|s| Server::parse(s).expect("a server")).collect();
        Rc::new(Group::new("g", &servers))
    }

    fn pick(group: &Rc<Group>, now: Instant) -> Option<usize> {
        group.pick(now, &Tried::new()).map(|lease| lease.at())
    }

    fn secs(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn shares_are_smooth_and_follow_weights() {
        let now = Instant::now();
        let weighted = group(&["a weight=5", "b", "c"]);
        let order: Vec<_> = (0..7).filter_map(|_| pick(&weighted, now)).collect();
        assert_eq!(order, [0, 0, 1, 0, 2, 0, 0]);
        let equal = group(&["a", "b down", "c"]);
        assert_eq!([pick(&equal, now), pick(&equal, now), pick(&equal, now)], [Some(0), Some(2), Some(0)]);
        assert_eq!((equal.tries(), weighted.tries()), (2, 3));
    }

    #[test]
    fn a_request_tries_each_server_once_and_backups_last() {
        let (g, now) = (group(&["x backup", "a", "b", "c down"]), Instant::now());
        let mut tried = Tried::new();
        while let Some(lease) = g.pick(now, &tried) {
            tried.push(lease.at());
        }
        assert_eq!(tried.as_slice(), [1, 2, 0]);
        g.peers()[1].down.set(true);
        g.peers()[2].down.set(true);
        assert_eq!(pick(&g, now), Some(0), "no primary is left");
        g.peers()[0].down.set(true);
        assert_eq!(pick(&g, now), None);
    }

    #[test]
    fn a_server_that_fails_too_often_rests_until_one_request_finds_it_well() {
        let (g, start) = (group(&["a max_fails=2 fail_timeout=10s", "b backup"]), Instant::now());
        let fail = |now| g.pick(now, &Tried::new()).expect("a server").failed(now);
        assert!(!fail(start), "one failure is not two");
        assert!(!fail(start + secs(10)), "nor are two that lie apart");
        assert!(fail(start + secs(11)));
        assert_eq!(g.peers()[0].fails.get(), 2);
        assert_eq!(pick(&g, start + secs(20)), Some(1));
        let probe = g.pick(start + secs(21), &Tried::new()).expect("a server");
        assert_eq!(probe.at(), 0);
        assert_eq!(pick(&g, start + secs(22)), Some(1), "nobody else tries before the probe has ended");
        assert!(!probe.failed(start + secs(23)), "it rested already");
        assert_eq!(pick(&g, start + secs(32)), Some(1));
        let probe = g.pick(start + secs(33), &Tried::new()).expect("a server");
        probe.succeeded();
        assert_eq!((g.peers()[0].fails.get(), pick(&g, start + secs(34))), (0, Some(0)));
    }

    #[test]
    fn an_answer_from_before_does_not_end_a_rest() {
        let (g, now) = (group(&["a", "b backup"]), Instant::now());
        let (first, second) = (g.pick(now, &Tried::new()).unwrap(), g.pick(now, &Tried::new()).unwrap());
        assert!(first.failed(now));
        second.succeeded();
        assert_eq!(pick(&g, now + secs(9)), Some(1));
    }

    #[test]
    fn the_only_server_never_rests_and_without_max_fails_none_does() {
        let now = Instant::now();
        let only = group(&["a"]);
        for _ in 0..3 {
            assert!(!only.pick(now, &Tried::from_slice(&[0])).expect("the server").failed(now));
        }
        let lasting = group(&["a max_fails=0", "b down"]);
        for _ in 0..3 {
            assert!(!lasting.pick(now, &Tried::new()).expect("the server").failed(now));
        }
        only.peers()[0].down.set(true);
        assert_eq!(pick(&only, now), None, "down is down");
    }

    #[test]
    fn failures_cost_weight_which_comes_back() {
        let (g, now) = (group(&["a weight=4 max_fails=2", "b weight=4"]), Instant::now());
        let lease = g.pick(now, &Tried::new()).expect("a server");
        assert_eq!((lease.at(), g.peers()[0].conns.get()), (0, 1));
        lease.failed(now);
        drop(lease);
        assert_eq!((g.peers()[0].effective_weight.get(), g.peers()[0].conns.get()), (2, 0));
        pick(&g, now);
        pick(&g, now);
        assert_eq!(g.peers()[0].effective_weight.get(), 4);
    }

    #[test]
    fn groups_are_known_by_name() {
        let named = Upstream { name: "b".into(), servers: vec![Server::parse("a").unwrap()], balancer: None };
        let mut groups = Groups::new(&Locations { upstreams: vec![Arc::new(named)], ..Locations::default() });
        for place in ["h:1", "b", "h:1", "h:x", "h:1 down"] {
            groups.add(Group::implicit("http", place));
        }
        let found: Vec<_> = groups.iter().map(|g| (&*g.name, g.implicit)).collect();
        assert_eq!(found, [("b", None), ("h:1", Some(80))]);
        assert!(groups.get("h:1").is_some() && groups.get("c").is_none());
    }

    #[test]
    fn without_a_port_the_scheme_says_which() {
        let port = |scheme, place| Group::implicit(scheme, place).expect("a group").peers()[0].server.port;
        assert_eq!((port("http", "h"), port("https", "h"), port("https", "h:80")), (80, 443, 80));
        let plain = Group::implicit("http", "h").expect("a group");
        assert!(plain.serves("http") && !plain.serves("https"));
        assert!(Group::implicit("http", "h:1").expect("a group").serves("https"));
        assert!(group(&["a"]).serves("https"), "what is written down has the ports that it has");
    }
}
