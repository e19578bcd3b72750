//! The state of a worker's balancers, kept from request to request up to a bound.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    time::{Duration, Instant},
};

use hashbrown::HashMap;

use super::Picker;
use crate::model::Upstream;

/// Upstreams whose balancer state is kept; past it those not used for `PICKER_IDLE` go.
const MAX_PICKERS: usize = 10_000;
const PICKER_IDLE: Duration = Duration::from_secs(60);

/// An upstream's balancer state, and when it was last used.
pub struct Picked {
    pub picker: Picker,
    pub used: Cell<Instant>,
}

/// By `Upstream::uid`.
#[derive(Default)]
pub struct Pickers(RefCell<HashMap<u64, Rc<Picked>>>);

impl Pickers {
    /// The balancer's state for an upstream. Where all that is kept is in use, it lasts for one request.
    pub fn of(&self, upstream: &Upstream, now: Instant) -> Rc<Picked> {
        let mut pickers = self.0.borrow_mut();
        if let Some(picked) = pickers.get(&upstream.uid) {
            return picked.clone();
        }
        if pickers.len() >= MAX_PICKERS {
            pickers.retain(|_, picked| now.duration_since(picked.used.get()) < PICKER_IDLE);
        }
        let picked = Rc::new(Picked { picker: Picker::new(upstream), used: Cell::new(now) });
        if pickers.len() < MAX_PICKERS {
            pickers.insert(upstream.uid, picked.clone());
        }
        picked
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn upstream(uid: u64) -> Upstream {
        Upstream { uid, ..Upstream::of_nodes([]) }
    }

    #[test]
    fn balancers_past_the_bound_last_for_one_request_until_others_are_idle() {
        let (pickers, begun) = (Pickers::default(), Instant::now());
        let first = pickers.of(&upstream(0), begun);
        for uid in 1..MAX_PICKERS as u64 {
            pickers.of(&upstream(uid), begun);
        }
        let more = upstream(MAX_PICKERS as u64);
        let later = begun + PICKER_IDLE - Duration::from_secs(1);
        let passing = pickers.of(&more, later);
        assert!(!Rc::ptr_eq(&passing, &pickers.of(&more, later)), "not kept: all others are in use");
        assert!(Rc::ptr_eq(&first, &pickers.of(&upstream(0), later)));
        assert_eq!(pickers.0.borrow().len(), MAX_PICKERS);
        first.used.set(later);
        let kept = pickers.of(&more, begun + PICKER_IDLE);
        assert!(Rc::ptr_eq(&kept, &pickers.of(&more, begun + PICKER_IDLE)));
        assert!(Rc::ptr_eq(&first, &pickers.of(&upstream(0), begun + PICKER_IDLE)), "it was used");
        assert_eq!(pickers.0.borrow().len(), 2);
    }
}
