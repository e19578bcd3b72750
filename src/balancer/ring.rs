//! Consistent hashing: each node owns points on a ring, a key belongs to the first point after it.
//!
//! The hash is fixed, so that all workers and all nodes of a cluster send a key to the same place.

use super::Member;
use crate::model::upstream::Node;

/// Points of a node of average weight: shares then differ by about 8 % from what weights say.
const POINTS_PER_NODE: u64 = 160;

/// Points of the whole ring, however many nodes: 8 bytes each in every worker.
const MAX_POINTS: u64 = 1 << 18;

pub(super) struct Ring {
    /// `(hash, member)`, by hash.
    points: Vec<(u32, u32)>,
}

impl Ring {
    pub fn new(members: &[Member], nodes: &[Node]) -> Self {
        let count = members.len() as u64;
        let total: u64 = members.iter().map(|m| u64::from(m.weight)).sum();
        let budget = (count * POINTS_PER_NODE).min(MAX_POINTS.max(count));
        let mut points = Vec::with_capacity(budget as usize);
        for (at, member) in members.iter().enumerate() {
            let node = &nodes[member.node];
            let own = hash(node.host.as_bytes()) ^ mix(u64::from(node.port));
            let share = (u128::from(budget) * u128::from(member.weight) / u128::from(total.max(1))).max(1) as u64;
            points.extend((0..share).map(|i| (mix(own.wrapping_add(mix(i))) as u32, at as u32)));
        }
        points.sort_unstable();
        Ring { points }
    }

    /// The key's member, or the next one on the ring that is usable.
    pub fn pick(&self, key: &[u8], members: usize, usable: &impl Fn(usize) -> bool) -> Option<usize> {
        let wanted = hash(key) as u32;
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

/// FNV-1a with a finish that spreads it over all bits.
fn hash(bytes: &[u8]) -> u64 {
    let fnv = bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3));
    mix(fnv)
}

/// The finish of splitmix64.
fn mix(n: u64) -> u64 {
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_bounded_and_every_node_has_one() {
        let count = (MAX_POINTS / POINTS_PER_NODE + 100) as usize;
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
