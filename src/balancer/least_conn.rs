//! The node with the lowest `(requests under way + 1) / weight`.

use std::cell::RefCell;

use super::Member;

pub(super) struct LeastConn {
    under_way: RefCell<Vec<u32>>,
}

impl LeastConn {
    pub fn new(members: &[Member]) -> Self {
        LeastConn { under_way: RefCell::new(vec![0; members.len()]) }
    }

    pub fn pick(&self, members: &[Member], usable: &impl Fn(usize) -> bool) -> Option<usize> {
        let mut under_way = self.under_way.borrow_mut();
        // Fractions compare by cross products: no division, no rounding.
        let load = |at: usize| u64::from(under_way[at]) + 1;
        let less = |a: usize, b: usize| load(a) * u64::from(members[b].weight) < load(b) * u64::from(members[a].weight);
        let mut best: Option<usize> = None;
        for at in (0..members.len()).filter(|at| usable(*at)) {
            if best.is_none_or(|best| less(at, best)) {
                best = Some(at);
            }
        }
        under_way[best?] += 1;
        best
    }

    pub fn done(&self, members: &[Member], node: usize) {
        // Members stand in the order of their nodes.
        let Ok(at) = members.binary_search_by_key(&node, |m| m.node) else { return };
        let count = &mut self.under_way.borrow_mut()[at];
        *count = count.saturating_sub(1);
    }
}
