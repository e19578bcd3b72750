//! What a worker's proxy keeps from request to request, each up to a bound: balancers' state, names of TLS settings.

use std::{
    cell::{Cell, RefCell},
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use hashbrown::HashMap;
use rustls::ClientConfig;

use crate::{
    balancer::Picker,
    model::{Upstream, next_uid},
};

/// Upstreams whose balancer state is kept; past it those not used for `PICKER_IDLE` go.
const MAX_PICKERS: usize = 10_000;
const PICKER_IDLE: Duration = Duration::from_secs(60);
/// TLS settings and names that have a number; past it all are numbered anew.
const MAX_NUMBERS: usize = 10_000;

/// An upstream's balancer state, and when it was last used.
pub(super) struct Picked {
    pub picker: Picker,
    pub used: Cell<Instant>,
}

/// By `Upstream::uid`.
#[derive(Default)]
pub(super) struct Pickers(RefCell<HashMap<u64, Rc<Picked>>>);

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

/// A number per TLS name and settings, for the pool's keys. The settings are held so that no others get their address.
#[derive(Default)]
pub(super) struct TlsNumbers(RefCell<HashMap<(Box<str>, usize), Numbered>>);

type Numbered = (u64, Arc<ClientConfig>);

impl TlsNumbers {
    /// Connections with the same number may stand in for each other.
    pub fn of(&self, name: &str, config: &Arc<ClientConfig>) -> u64 {
        let key = (Box::from(name), Arc::as_ptr(config) as usize);
        let mut numbers = self.0.borrow_mut();
        if let Some((number, _)) = numbers.get(&key) {
            return *number;
        }
        if numbers.len() >= MAX_NUMBERS {
            // Numbers are never reused, so connections under forgotten ones only grow old.
            numbers.clear();
        }
        numbers.entry(key).or_insert_with(|| (next_uid(), config.clone())).0
    }
}

/// A number per address that connections come from and TLS number, for the pool's keys.
#[derive(Default)]
pub(super) struct LocalNumbers(RefCell<HashMap<(SocketAddr, u64), u64>>);

impl LocalNumbers {
    /// In place of the TLS number `tls`, for connections from `local`.
    pub fn of(&self, local: SocketAddr, tls: u64) -> u64 {
        let mut numbers = self.0.borrow_mut();
        if let Some(number) = numbers.get(&(local, tls)) {
            return *number;
        }
        if numbers.len() >= MAX_NUMBERS {
            numbers.clear();
        }
        *numbers.entry((local, tls)).or_insert_with(next_uid)
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

    #[test]
    fn names_past_the_bound_are_numbered_anew_and_no_number_comes_twice() {
        let config = crate::tls::client_config(false, None, &[]).expect("a configuration");
        let numbers = TlsNumbers::default();
        let given: Vec<u64> = (0..MAX_NUMBERS).map(|i| numbers.of(&format!("{i}.test"), &config)).collect();
        assert_eq!(numbers.of("0.test", &config), given[0], "what is known costs nobody its number");
        assert_eq!(numbers.0.borrow().len(), MAX_NUMBERS);
        let more = numbers.of("more.test", &config);
        assert_eq!(numbers.0.borrow().len(), 1);
        assert!(!given.contains(&more) && !given.contains(&numbers.of("0.test", &config)));
    }

    #[test]
    fn local_addresses_past_the_bound_are_numbered_anew() {
        let numbers = LocalNumbers::default();
        let from = |n: usize| SocketAddr::from((std::net::Ipv4Addr::from(n as u32), 0));
        let first = numbers.of(from(0), 0);
        assert_ne!(first, numbers.of(from(0), 7), "TLS is no plain connection");
        for n in 1..MAX_NUMBERS - 1 {
            numbers.of(from(n), 0);
        }
        assert_eq!((numbers.of(from(0), 0), numbers.0.borrow().len()), (first, MAX_NUMBERS));
        let more = numbers.of(from(MAX_NUMBERS), 0);
        assert!(numbers.0.borrow().len() == 1 && more != numbers.of(from(0), 0) && first != numbers.of(from(0), 0));
    }
}
