//! Picks an upstream node for a request.
//!
//! Pure: takes the key, the time, what was tried and what is healthy, returns an index into the upstream's nodes. No
//! clock, no socket, no lock. A `Picker` belongs to one worker and one version of an upstream.
//!
//! What least_conn and ewma know of a node goes on in the next version of its upstream: a node that joins is not taken for as busy as
//! those that were there.
//!
//! Nodes of a lower priority are asked when every healthy one of a higher priority was tried. A node of weight 0 gets
//! nothing, unless it is the only one. When health leaves no node at all, health is not asked: a guess beats a refusal.

mod ewma;
pub mod group;
mod kept;
mod least_conn;
mod ring;
mod round_robin;

use std::{
    cell::Cell,
    collections::BTreeSet,
    rc::Rc,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use smallvec::SmallVec;

pub use self::kept::{Owner, Picked, Pickers};
use self::{ewma::Ewma, least_conn::LeastConn, ring::Ring, round_robin::RoundRobin};
use crate::model::upstream::{Balance, Node, Upstream};

/// Nodes that a request has failed on: indexes into the upstream's nodes.
pub type Tried = SmallVec<[usize; 4]>;

/// Why `Picker::pick` found nothing, in the words of APISIX's error log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoNode {
    /// No node, or only such of weight 0.
    NoneValid,
    AllTried,
}

impl NoNode {
    pub fn message(self) -> &'static str {
        match self {
            NoNode::NoneValid => "failed to find valid upstream server, no valid upstream node",
            NoNode::AllTried => "failed to find valid upstream server, all upstream servers tried",
        }
    }
}

pub struct Picker {
    /// The only node: nothing to choose, also after it failed.
    single: bool,
    known: Knowledge,
    /// From the highest priority to the lowest.
    levels: SmallVec<[Level; 1]>,
}

/// What is known of a node from request to request.
#[derive(Default)]
struct Known {
    /// Requests that it is serving.
    under_way: Cell<u32>,
    average: Cell<ewma::Average>,
}

/// That of all nodes, in their order, with their places; empty for policies that ask nothing.
#[derive(Default)]
struct Knowledge(Vec<(Box<str>, u16, Rc<Known>)>);

impl Knowledge {
    /// `before`: of the version before; a node that was there has it still.
    fn new(upstream: &Upstream, before: Option<&Knowledge>) -> Knowledge {
        if !has_memory(&upstream.balance) {
            return Knowledge::default();
        }
        let known = |node: &Node| {
            let same = |(host, port, _): &&(Box<str>, u16, Rc<Known>)| *host == node.host && *port == node.port;
            before.and_then(|before| before.0.iter().find(same)).map(|(.., known)| known.clone()).unwrap_or_default()
        };
        Knowledge(upstream.nodes.iter().map(|node| (node.host.clone(), node.port, known(node))).collect())
    }

    fn of(&self, node: usize) -> &Known {
        &self.0[node].2
    }
}

/// Whether the policy knows something of nodes that outlives a version of their upstream.
pub fn has_memory(balance: &Balance) -> bool {
    matches!(balance, Balance::LeastConn | Balance::Ewma)
}

/// The nodes of one priority.
struct Level {
    members: Vec<Member>,
    policy: Policy,
}

/// A node as a policy sees it.
#[derive(Clone, Copy)]
struct Member {
    /// Index into the upstream's nodes.
    node: usize,
    weight: u32,
}

enum Policy {
    RoundRobin(RoundRobin),
    Ring(Ring),
    LeastConn(LeastConn),
    Ewma(Ewma),
}

impl Picker {
    pub fn new(upstream: &Upstream) -> Self {
        Self::after(upstream, None)
    }

    /// One that goes on with what the picker of the upstream's version before knew. `before` of another upstream is no harm.
    pub fn after(upstream: &Upstream, before: Option<&Picker>) -> Self {
        let nodes = &upstream.nodes;
        let mut priorities: SmallVec<[i64; 4]> = nodes.iter().filter(|n| n.weight > 0).map(|n| n.priority).collect();
        priorities.sort_unstable_by(|a, b| b.cmp(a));
        priorities.dedup();
        let levels = priorities.iter().map(|priority| Level::new(upstream, *priority)).collect();
        let known = Knowledge::new(upstream, before.map(|before| &before.known));
        Picker { single: nodes.len() == 1, known, levels }
    }

    /// The node to try. `key` is what chash hashes; the other policies do not look at it.
    pub fn pick(
        &self,
        key: &[u8],
        now: Instant,
        tried: &Tried,
        healthy: &impl Fn(usize) -> bool,
    ) -> Result<usize, NoNode> {
        if self.single {
            // It has no other node to be compared with, as long as none joins.
            self.pick_if(key, now, &|_| true);
            return Ok(0);
        }
        if let Some(node) = self.pick_if(key, now, &|node| !tried.contains(&node) && healthy(node)) {
            return Ok(node);
        }
        let mut all = self.levels.iter().flat_map(|level| &level.members).peekable();
        if all.peek().is_none() {
            return Err(NoNode::NoneValid);
        }
        match all.any(|member| healthy(member.node)) {
            true => Err(NoNode::AllTried),
            false => self.pick_if(key, now, &|node| !tried.contains(&node)).ok_or(NoNode::AllTried),
        }
    }

    /// A try at the node that `pick` gave has ended. `latency`: until its response's head; `None` when it failed.
    pub fn done(&self, node: usize, latency: Option<Duration>, now: Instant) {
        let Some((.., known)) = self.known.0.get(node) else { return };
        known.under_way.set(known.under_way.get().saturating_sub(1));
        if let Some(Policy::Ewma(policy)) = self.levels.first().map(|level| &level.policy) {
            policy.done(&self.known, node, latency, now);
        }
    }

    fn pick_if(&self, key: &[u8], now: Instant, usable: &impl Fn(usize) -> bool) -> Option<usize> {
        self.levels.iter().find_map(|level| level.pick(key, &self.known, now, usable))
    }
}

/// Says once of each name (of the first 64) that nobody balances so.
fn tell_unknown(name: &str) {
    static TOLD: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let mut told = TOLD.lock().unwrap_or_else(PoisonError::into_inner);
    if told.len() < 64 && told.insert(name.to_owned()) {
        tracing::warn!("invalid balancer type: {name}: the nodes of its upstreams take turns");
    }
}

impl Level {
    fn new(upstream: &Upstream, priority: i64) -> Self {
        let is_member = |node: &Node| node.weight > 0 && node.priority == priority;
        let all = upstream.nodes.iter().enumerate();
        let members: Vec<Member> =
            all.filter(|(_, n)| is_member(n)).map(|(node, n)| Member { node, weight: n.weight }).collect();
        let policy = match &upstream.balance {
            Balance::Chash { .. } => Policy::Ring(Ring::new(&members, &upstream.nodes)),
            Balance::LeastConn => Policy::LeastConn(LeastConn),
            Balance::Ewma => Policy::Ewma(Ewma::new()),
            // A balancer of the user's own picks in Lua; this serves when it does not.
            Balance::RoundRobin => Policy::RoundRobin(RoundRobin::new(&members)),
            Balance::Other(name) => {
                tell_unknown(name);
                Policy::RoundRobin(RoundRobin::new(&members))
            }
        };
        Level { members, policy }
    }

    fn pick(&self, key: &[u8], known: &Knowledge, now: Instant, usable: &impl Fn(usize) -> bool) -> Option<usize> {
        let usable = |at: usize| usable(self.members[at].node);
        let at = match &self.policy {
            Policy::RoundRobin(policy) => policy.pick(&self.members, &usable),
            Policy::Ring(ring) => ring.pick(key, self.members.len(), &usable),
            Policy::LeastConn(policy) => policy.pick(&self.members, known, &usable),
            Policy::Ewma(policy) => policy.pick(&self.members, known, now, &usable),
        }?;
        Some(self.members[at].node)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::model::upstream::HashOn;

    /// Nodes `(weight, priority)`, on ports from 1980.
    fn picker(balance: Balance, nodes: &[(u32, i64)]) -> Picker {
        Picker::new(&upstream(balance, nodes))
    }

    fn upstream(balance: Balance, nodes: &[(u32, i64)]) -> Upstream {
        let node = |(at, (weight, priority)): (usize, &(u32, i64))| Node {
            host: "127.0.0.1".into(),
            ip: None,
            port: 1980 + at as u16,
            explicit_port: true,
            weight: *weight,
            priority: *priority,
        };
        Upstream { balance, ..Upstream::of_nodes(nodes.iter().enumerate().map(node)) }
    }

    fn chash() -> Balance {
        Balance::Chash { on: HashOn::Vars, key: "remote_addr".into() }
    }

    fn all_kinds() -> [Balance; 4] {
        [Balance::RoundRobin, chash(), Balance::LeastConn, Balance::Ewma]
    }

    /// The nodes that one request tries, when each of them fails.
    fn tries(picker: &Picker, healthy: impl Fn(usize) -> bool) -> (Vec<usize>, NoNode) {
        let (now, mut tried) = (Instant::now(), Tried::new());
        loop {
            match picker.pick(b"127.0.0.1", now, &tried, &healthy) {
                Ok(node) => {
                    assert!(!tried.contains(&node));
                    tried.push(node);
                    picker.done(node, None, now);
                }
                Err(why) => return (tried.to_vec(), why),
            }
        }
    }

    fn shares(picker: &Picker, picks: usize) -> HashMap<usize, usize> {
        let mut shares = HashMap::new();
        for i in 0..picks {
            let key = i.to_string();
            let node = picker.pick(key.as_bytes(), Instant::now(), &Tried::new(), &|_| true).unwrap();
            *shares.entry(node).or_default() += 1;
        }
        shares
    }

    #[test]
    fn round_robin_is_smooth() {
        let order = |nodes: &[(u32, i64)], picks: usize| {
            let picker = picker(Balance::RoundRobin, nodes);
            let pick = || picker.pick(b"", Instant::now(), &Tried::new(), &|_| true).unwrap();
            (0..picks).map(|_| pick()).collect::<Vec<_>>()
        };
        assert_eq!(order(&[(5, 0), (1, 0), (1, 0)], 7), [0, 0, 1, 0, 2, 0, 0]);
        assert_eq!(order(&[(1, 0), (1, 0), (1, 0)], 5), [0, 1, 2, 0, 1]);
        assert_eq!(order(&[(3, 0), (0, 0), (1, 0)], 4), [0, 0, 2, 0]);
    }

    #[test]
    fn every_kind_tries_each_node_once_from_the_highest_priority_down() {
        for balance in all_kinds() {
            let name = format!("{balance:?}");
            let picker = picker(balance, &[(1, -1), (1000, 1), (1, 1), (2, -1), (0, 1), (7, 0)]);
            let (tried, why) = tries(&picker, |_| true);
            let mut groups = tried.clone();
            groups[0..2].sort_unstable();
            groups[3..5].sort_unstable();
            assert_eq!((groups, why), (vec![1, 2, 5, 0, 3], NoNode::AllTried), "{name}");
        }
    }

    #[test]
    fn health_is_obeyed_until_it_leaves_nothing() {
        for balance in all_kinds() {
            let picker = picker(balance, &[(1, 0), (1, 0), (1, -1)]);
            assert_eq!(tries(&picker, |node| node == 2), (vec![2], NoNode::AllTried));
            assert_eq!(tries(&picker, |node| node != 2).0.len(), 2);
            assert_eq!(tries(&picker, |_| false).0.len(), 3);
        }
    }

    #[test]
    fn without_a_valid_node_nothing_is_picked() {
        for balance in all_kinds() {
            assert_eq!(tries(&picker(balance.clone(), &[]), |_| true), (vec![], NoNode::NoneValid));
            assert_eq!(tries(&picker(balance, &[(0, 0), (0, 1)]), |_| true), (vec![], NoNode::NoneValid));
        }
    }

    #[test]
    fn the_only_node_is_always_picked() {
        for balance in all_kinds() {
            let picker = picker(balance, &[(0, 0)]);
            assert_eq!(picker.pick(b"", Instant::now(), &Tried::from_slice(&[0]), &|_| false), Ok(0));
        }
    }

    #[test]
    fn chash_keeps_a_key_on_its_node() {
        let nodes = [(1, 0); 5];
        let before = picker(chash(), &nodes);
        let pick = |picker: &Picker, key: usize, healthy: &dyn Fn(usize) -> bool| {
            picker.pick(key.to_string().as_bytes(), Instant::now(), &Tried::new(), &|n| healthy(n)).unwrap()
        };
        let without_last = picker(chash(), &nodes[..4]);
        for key in 0..2000 {
            let node = pick(&before, key, &|_| true);
            assert_eq!(node, pick(&before, key, &|_| true));
            if node != 4 {
                assert_eq!(node, pick(&without_last, key, &|_| true), "only the removed node's keys move");
                assert_eq!(node, pick(&before, key, &|n| n != 4), "only the sick node's keys move");
            }
        }
    }

    #[test]
    fn chash_shares_follow_weights() {
        let shares = shares(&picker(chash(), &[(100, 0), (300, 0), (100, 0), (u32::MAX, -1)]), 20_000);
        assert_eq!(shares.len(), 3);
        assert!((3_000..5_000).contains(&shares[&0]), "{shares:?}");
        assert!((10_500..13_500).contains(&shares[&1]), "{shares:?}");
        let huge = picker(chash(), &[(u32::MAX, 0), (u32::MAX, 0), (1, 0)]);
        assert_eq!(tries(&huge, |_| true).0.len(), 3);
    }

    #[test]
    fn least_conn_counts_what_is_under_way() {
        let picker = picker(Balance::LeastConn, &[(3, 0), (2, 0)]);
        let now = Instant::now();
        let pick = || picker.pick(b"", now, &Tried::new(), &|_| true).unwrap();
        assert_eq!([pick(), pick(), pick()], [0, 1, 0]);
        picker.done(1, None, now);
        assert_eq!(pick(), 1);
        picker.done(9, None, now);
    }

    #[test]
    fn what_is_known_of_a_node_goes_on_in_the_next_version() {
        let now = Instant::now();
        let pick = |picker: &Picker| picker.pick(b"", now, &Tried::new(), &|_| true);
        let lone = picker(Balance::LeastConn, &[(1, 0)]);
        assert_eq!([pick(&lone), pick(&lone)], [Ok(0), Ok(0)]);
        let both = Picker::after(&upstream(Balance::LeastConn, &[(1, 0), (1, 0)]), Some(&lone));
        assert_eq!([pick(&both), pick(&both)], [Ok(1), Ok(1)], "the first one is busy");
        // A request of the old version ends: the new one sees it.
        lone.done(0, None, now);
        assert_eq!(pick(&both), Ok(0));
        let ewma = picker(Balance::Ewma, &[(1, 0), (1, 0)]);
        ewma.done(0, Some(Duration::from_millis(1)), now);
        ewma.done(1, Some(Duration::from_millis(9)), now);
        let next = Picker::after(&upstream(Balance::Ewma, &[(1, 0), (1, 0)]), Some(&ewma));
        assert!((0..10).all(|_| pick(&next) == Ok(0)));
    }

    #[test]
    fn ewma_prefers_the_faster_node_and_forgets() {
        let picker = picker(Balance::Ewma, &[(1, 0), (1, 0)]);
        let mut now = Instant::now();
        let mut counts = [0; 2];
        for _ in 0..12 {
            let node = picker.pick(b"", now, &Tried::new(), &|_| true).unwrap();
            counts[node] += 1;
            now += Duration::from_millis(10);
            picker.done(node, Some(Duration::from_millis(if node == 0 { 1 } else { 5 })), now);
        }
        assert_eq!(counts, [11, 1]);
        // Node 0 stays in use, node 1 rests: what was known of it fades, and it gets another chance.
        let mut rested = 0;
        for _ in 0..60 {
            now += Duration::from_secs(1);
            let node = picker.pick(b"", now, &Tried::new(), &|_| true).unwrap();
            rested += usize::from(node == 1);
            picker.done(node, Some(Duration::from_millis(if node == 0 { 1 } else { 5 })), now);
        }
        assert!((1..30).contains(&rested), "{rested}");
    }
}
