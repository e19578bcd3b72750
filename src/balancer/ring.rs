//! Consistent hashing: each node owns points on a ring, a key belongs to the first point at or after it.
//!
//! Points and keys are those of nginx's `hash … consistent` (the ketama of Cache::Memcached::Fast: chained CRC-32 of host, a zero
//! byte and port, 160 points per weight), which APISIX has, too: a key stays on its node when a gateway is exchanged for this one,
//! and all workers and all gateways of a cluster send it to the same place.

use super::Member;
use crate::model::upstream::Node;

/// Points per unit of weight, after what all weights have in common is taken out of them. Shares then differ by about 8 % from what
/// weights say.
const POINTS_PER_WEIGHT: u64 = 160;

/// Points of the whole ring, however many nodes and however heavy: 8 bytes each in every worker. Past it each node has its share of
/// them, and keys land elsewhere than with nginx.
const MAX_POINTS: u64 = 1 << 18;

pub(super) struct Ring {
    /// `(hash, member)`, by hash.
    points: Vec<(u32, u32)>,
}

impl Ring {
    pub fn new(members: &[Member], nodes: &[Node]) -> Self {
        let common = members.iter().map(|m| u64::from(m.weight)).fold(0, gcd).max(1);
        let total = members.iter().map(|m| u64::from(m.weight) / common).sum::<u64>().max(1);
        let most = MAX_POINTS.max(members.len() as u64);
        let budget = total.saturating_mul(POINTS_PER_WEIGHT).min(most);
        let mut points = Vec::with_capacity(budget as usize);
        for (at, member) in members.iter().enumerate() {
            let node = &nodes[member.node];
            let weight = u64::from(member.weight) / common;
            let share = (u128::from(budget) * u128::from(weight) / u128::from(total)).max(1) as usize;
            points.extend(node_points(&node.host, node.port).take(share).map(|hash| (hash, at as u32)));
        }
        points.sort_unstable();
        Ring { points }
    }

    /// The key's member, or the next one on the ring that is usable.
    pub fn pick(&self, key: &[u8], members: usize, usable: &impl Fn(usize) -> bool) -> Option<usize> {
        let wanted = crc32fast::hash(key);
        let start = self.points.partition_point(|(hash, _)| *hash < wanted);
        let mut refused = Refused::new(members);
        let (before, after) = self.points.split_at(start);
        for (_, member) in after.iter().chain(before) {
            let at = *member as usize;
            if refused.contains(at) {
                continue;
            }
            if usable(at) {
                return Some(at);
            }
            if refused.add(at) == members {
                return None;
            }
        }
        None
    }
}

/// Members that are out of the question: each is asked about once, and the search ends when none is left.
struct Refused {
    seen: smallvec::SmallVec<[u64; 4]>,
    count: usize,
}

impl Refused {
    fn new(members: usize) -> Self {
        Refused { seen: smallvec::smallvec![0; members.div_ceil(64)], count: 0 }
    }

    fn contains(&self, at: usize) -> bool {
        self.seen[at / 64] & (1 << (at % 64)) != 0
    }

    /// How many there are now.
    fn add(&mut self, at: usize) -> usize {
        self.seen[at / 64] |= 1 << (at % 64);
        self.count += 1;
        self.count
    }
}

/// A node's points, without end.
fn node_points(host: &str, port: u16) -> impl Iterator<Item = u32> {
    let mut own = crc32fast::Hasher::new();
    own.update(host.as_bytes());
    own.update(&[0]);
    own.update(itoa::Buffer::new().format(port).as_bytes());
    let mut last = 0_u32;
    std::iter::repeat_with(move || {
        let mut next = own.clone();
        next.update(&last.to_le_bytes());
        last = next.finalize();
        last
    })
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_land_where_nginx_sends_them() {
        let member = |(node, weight): (usize, u32)| Member { node, weight };
        let node = |(host, port): (&str, u16)| Node {
            host: host.into(),
            ip: None,
            port,
            explicit_port: true,
            weight: 1,
            priority: 0,
        };
        let first = |nodes: &[Node], weights: [u32; 2], key: &str| {
            let members: Vec<Member> = weights.into_iter().enumerate().map(member).collect();
            Ring::new(&members, nodes).pick(key.as_bytes(), 2, &|_| true).map(|at| members[at].node)
        };
        let nodes = [("127.0.0.1", 1980), ("127.0.0.1", 1981)].map(node);
        for (key, wanted) in [("jack", 1), ("tom", 0), ("127.0.0.1", 0), ("cuscookie", 1)] {
            assert_eq!(first(&nodes, [1, 1], key), Some(wanted), "{key}");
            assert_eq!(first(&nodes, [100, 100], key), Some(wanted), "only what weights differ by counts: {key}");
        }
        let weighted = [("127.0.0.1", 1979), ("127.0.0.2", 1979)].map(node);
        assert_eq!(first(&weighted, [2, 1], "127.0.0.1"), Some(0));
    }

    #[test]
    fn points_are_bounded_and_every_node_has_one() {
        let count = (MAX_POINTS / POINTS_PER_WEIGHT + 100) as usize;
        let node = |port: usize| Node {
            host: "127.0.0.1".into(),
            ip: None,
            port: port as u16,
            explicit_port: true,
            weight: 1,
            priority: 0,
        };
        let nodes: Vec<Node> = (0..count).map(node).collect();
        for heavy in [1, 1_000_000] {
            let member = |node: usize| Member { node, weight: if node == 0 { heavy } else { 1 } };
            let members: Vec<Member> = (0..count).map(member).collect();
            let ring = Ring::new(&members, &nodes);
            assert!(ring.points.len() <= MAX_POINTS as usize + count, "{}", ring.points.len());
            let mut seen = vec![false; count];
            ring.points.iter().for_each(|(_, member)| seen[*member as usize] = true);
            assert!(seen.iter().all(|seen| *seen));
        }
    }
}
