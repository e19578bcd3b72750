//! The node with the lowest `(requests under way + 1) / weight`.

use super::{Knowledge, Member};

/// The counts are `Known::under_way`.
pub(super) struct LeastConn;

impl LeastConn {
    pub fn pick(&self, members: &[Member], known: &Knowledge, usable: &impl Fn(usize) -> bool) -> Option<usize> {
        // Fractions compare by cross products: no division, no rounding.
        let load = |at: usize| u64::from(known.of(members[at].node).under_way.get()) + 1;
        let less = |a: usize, b: usize| load(a) * u64::from(members[b].weight) < load(b) * u64::from(members[a].weight);
        let mut best: Option<usize> = None;
        for at in (0..members.len()).filter(|at| usable(*at)) {
            if best.is_none_or(|best| less(at, best)) {
                best = Some(at);
            }
        }
        let count = &known.of(members[best?].node).under_way;
        count.set(count.get() + 1);
        best
    }
}
