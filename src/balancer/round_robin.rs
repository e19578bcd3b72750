//! Smooth weighted round robin: `aabac` for weights 3, 1, 1, never `aaabc`.

use std::cell::{Cell, RefCell};

use super::Member;

pub(super) struct RoundRobin {
    /// Where the next search starts, when all weights are equal: the common case needs no sum.
    next: Cell<usize>,
    /// What each member is owed; empty when all weights are equal.
    credit: RefCell<Vec<i64>>,
}

impl RoundRobin {
    pub fn new(members: &[Member]) -> Self {
        let equal = members.windows(2).all(|pair| pair[0].weight == pair[1].weight);
        let credit = if equal { Vec::new() } else { vec![0; members.len()] };
        RoundRobin { next: Cell::new(0), credit: RefCell::new(credit) }
    }

    pub fn pick(&self, members: &[Member], usable: &impl Fn(usize) -> bool) -> Option<usize> {
        let mut credit = self.credit.borrow_mut();
        match credit.is_empty() {
            true => self.pick_next(members.len(), usable),
            false => pick_owed(&mut credit, members, usable),
        }
    }

    fn pick_next(&self, count: usize, usable: &impl Fn(usize) -> bool) -> Option<usize> {
        let start = self.next.get();
        let at = (start..count).chain(0..start.min(count)).find(|at| usable(*at))?;
        self.next.set(if at + 1 == count { 0 } else { at + 1 });
        Some(at)
    }
}

/// Every usable member earns its weight; the one that is owed most pays for all.
fn pick_owed(credit: &mut [i64], members: &[Member], usable: &impl Fn(usize) -> bool) -> Option<usize> {
    let mut total = 0;
    let mut best: Option<usize> = None;
    for (at, member) in members.iter().enumerate() {
        if !usable(at) {
            continue;
        }
        let weight = i64::from(member.weight);
        credit[at] += weight;
        total += weight;
        if best.is_none_or(|best| credit[at] > credit[best]) {
            best = Some(at);
        }
    }
    credit[best?] -= total;
    best
}
