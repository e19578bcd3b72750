//! The state of a worker's balancers, kept from request to request up to a bound.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    time::{Duration, Instant},
};

use hashbrown::HashMap;

use super::{Picker, has_memory};
use crate::model::{Id, Upstream};

/// Upstreams whose balancer state is kept; past it those not used for `PICKER_IDLE` go.
const MAX_PICKERS: usize = 10_000;
const PICKER_IDLE: Duration = Duration::from_secs(60);

/// An upstream's balancer state, and when it was last used.
pub struct Picked {
    pub picker: Picker,
    pub used: Cell<Instant>,
}

/// By `Upstream::uid`, and the newest of each owner.
#[derive(Default)]
pub struct Pickers(RefCell<HashMap<u64, Rc<Picked>>>, RefCell<HashMap<Owner, Rc<Picked>>>);

/// Whose an upstream is: the same from one version to the next.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Owner {
    Upstream(Id),
    /// It stands inside.
    Route(Id),
    Service(Id),
    StreamRoute(Id),
}

impl Pickers {
    /// The balancer's state for an upstream. Where all that is kept is in use, it lasts for one request.
    pub fn of(&self, upstream: &Upstream, now: Instant) -> Rc<Picked> {
        self.of_owner(upstream, None, now)
    }

    /// The same for an upstream that stands inside `owner`.
    pub fn of_owner(&self, upstream: &Upstream, owner: Option<Owner>, now: Instant) -> Rc<Picked> {
        let mut pickers = self.0.borrow_mut();
        if let Some(picked) = pickers.get(&upstream.uid) {
            return picked.clone();
        }
        if pickers.len() >= MAX_PICKERS {
            pickers.retain(|_, picked| now.duration_since(picked.used.get()) < PICKER_IDLE);
        }
        let owner = upstream.id.clone().map(Owner::Upstream).or(owner).filter(|_| has_memory(&upstream.balance));
        let picked = self.next(upstream, owner, now);
        if pickers.len() < MAX_PICKERS {
            pickers.insert(upstream.uid, picked.clone());
        }
        picked
    }

    /// A new one, that goes on where the owner's last one is.
    fn next(&self, upstream: &Upstream, owner: Option<Owner>, now: Instant) -> Rc<Picked> {
        let made = |before: Option<&Rc<Picked>>| {
            let picker = Picker::after(upstream, before.map(|before| &before.picker));
            Rc::new(Picked { picker, used: Cell::new(now) })
        };
        let Some(owner) = owner else { return made(None) };
        let mut newest = self.1.borrow_mut();
        let picked = made(newest.get(&owner));
        if newest.len() >= MAX_PICKERS && !newest.contains_key(&owner) {
            newest.retain(|_, picked| now.duration_since(picked.used.get()) < PICKER_IDLE);
        }
        if newest.len() < MAX_PICKERS || newest.contains_key(&owner) {
            newest.insert(owner, picked.clone());
        }
        picked
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        balancer::Tried,
        model::upstream::{Balance, Node},
    };

    #[test]
    fn owners_past_the_bound_are_forgotten_once_they_are_idle() {
        let (pickers, begun) = (Pickers::default(), Instant::now());
        let node = |port| Node { host: "a".into(), ip: None, port, explicit_port: true, weight: 1, priority: 0 };
        let of = |uid: u64, owner: usize, now| {
            let upstream = Upstream { uid, balance: Balance::LeastConn, ..Upstream::of_nodes([node(1), node(2)]) };
            let picked = pickers.of_owner(&upstream, Some(Owner::Route(owner.to_string().into())), now);
            picked.picker.pick(b"", now, &Tried::new(), &|_| true)
        };
        assert_eq!(of(0, 0, begun), Ok(0));
        assert_eq!(of(1, 0, begun), Ok(1), "the next version knows");
        for owner in 1..MAX_PICKERS {
            let _ = of(owner as u64 + 1, owner, begun);
        }
        assert_eq!(pickers.1.borrow().len(), MAX_PICKERS);
        let _ = of(u64::MAX, MAX_PICKERS, begun);
        assert_eq!(pickers.1.borrow().len(), MAX_PICKERS, "one more is not kept");
        let _ = of(u64::MAX - 1, MAX_PICKERS, begun + PICKER_IDLE);
        assert_eq!(pickers.1.borrow().len(), 1);
    }

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
