//! What a worker's proxy keeps from request to request, each up to a bound: numbers for names of TLS settings and local addresses.

use std::{cell::RefCell, net::SocketAddr, sync::Arc};

use hashbrown::HashMap;
use rustls::ClientConfig;

use crate::model::next_uid;

/// TLS settings and names that have a number; past it all are numbered anew.
const MAX_NUMBERS: usize = 10_000;

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
