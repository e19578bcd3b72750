//! What is known of names, and for how long. Pure: the time is an argument.

use std::time::{Duration, Instant};

use hashbrown::HashMap;

use super::Addrs;

/// Names kept. Far more than upstreams name; a plugin that resolves names from requests must not grow memory.
pub(super) const MAX_NAMES: usize = 4096;

/// A name is not asked for more often than this, whatever its TTL says.
const MIN_TTL: Duration = Duration::from_secs(1);

/// No answer is believed for longer: a record may say seventy years.
const MAX_TTL: Duration = Duration::from_secs(24 * 3600);

/// How long addresses that have run out stand in for a DNS that does not answer.
const STALE: Duration = Duration::from_secs(3600);

/// How long a failure is believed: long enough that an outage of DNS does not cost each request a wait.
const NEGATIVE_TTL: Duration = Duration::from_secs(2);

/// What a name may be resolved to now.
#[derive(Debug, PartialEq)]
pub(super) enum Known<'a> {
    Addrs(&'a Addrs),
    /// The name was asked for a moment ago, without success.
    Failed(&'a str),
    Nothing,
}

#[derive(Default)]
pub(super) struct Cache {
    names: HashMap<Box<str>, Entry>,
}

struct Entry {
    addrs: Addrs,
    fresh_until: Instant,
    /// The last attempt's error, and how long not to try again.
    failed: Option<(Box<str>, Instant)>,
}

impl Entry {
    fn usable_until(&self) -> Instant {
        match &self.failed {
            Some((_, until)) if self.addrs.is_empty() => *until,
            _ => self.fresh_until + STALE,
        }
    }
}

impl Cache {
    pub fn get(&self, name: &str, now: Instant) -> Known<'_> {
        let Some(entry) = self.names.get(name) else { return Known::Nothing };
        let waits = entry.failed.as_ref().filter(|(_, until)| now < *until);
        let has_addrs = !entry.addrs.is_empty() && now < entry.usable_until();
        match waits {
            _ if has_addrs && now < entry.fresh_until => Known::Addrs(&entry.addrs),
            Some(_) if has_addrs => Known::Addrs(&entry.addrs),
            Some((error, _)) => Known::Failed(error),
            None => Known::Nothing,
        }
    }

    pub fn learned(&mut self, name: &str, addrs: Addrs, ttl: Duration, now: Instant) {
        let fresh_until = now + ttl.clamp(MIN_TTL, MAX_TTL);
        self.put(name, Entry { addrs, fresh_until, failed: None }, now);
    }

    /// Notes that a lookup failed. Gives the addresses that go on standing for the name, if there are any.
    pub fn failed(&mut self, name: &str, error: &str, now: Instant) -> Option<Addrs> {
        let failed = Some((error.into(), now + NEGATIVE_TTL));
        match self.names.get_mut(name) {
            Some(entry) => {
                entry.failed = failed;
                (!entry.addrs.is_empty() && now < entry.usable_until()).then(|| entry.addrs.clone())
            }
            None => {
                self.put(name, Entry { addrs: Addrs::new(), fresh_until: now, failed }, now);
                None
            }
        }
    }

    fn put(&mut self, name: &str, entry: Entry, now: Instant) {
        if self.names.len() >= MAX_NAMES && !self.names.contains_key(name) {
            self.make_room(now);
        }
        self.names.insert(name.into(), entry);
    }

    /// Drops what is of no use any more, or else what soon will be. As rare as lookups, so a scan will do.
    fn make_room(&mut self, now: Instant) {
        self.names.retain(|_, entry| now < entry.usable_until());
        if self.names.len() < MAX_NAMES {
            return;
        }
        let first = self.names.iter().min_by_key(|(_, entry)| entry.usable_until()).map(|(name, _)| name.clone());
        if let Some(name) = first {
            self.names.remove(&name);
        }
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.names.len()
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    fn addrs(last: u8) -> Addrs {
        Addrs::from_slice(&[IpAddr::from([10, 0, 0, last])])
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn an_answer_holds_for_its_ttl_within_bounds() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        for (ttl, held) in [(0, 1), (30, 30), (1 << 31, 24 * 3600)] {
            cache.learned("a", addrs(1), SECOND * ttl, now);
            assert_eq!(cache.get("a", now + SECOND * held - SECOND / 2), Known::Addrs(&addrs(1)));
            assert_eq!(cache.get("a", now + SECOND * held), Known::Nothing);
        }
    }

    #[test]
    fn a_failure_holds_for_a_moment() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        assert_eq!(cache.failed("a", "no such name", now), None);
        assert_eq!(cache.get("a", now + SECOND), Known::Failed("no such name"));
        assert_eq!(cache.get("a", now + SECOND * 3), Known::Nothing);
        cache.learned("a", addrs(2), SECOND, now);
        assert_eq!(cache.get("a", now), Known::Addrs(&addrs(2)));
    }

    #[test]
    fn old_addresses_stand_in_for_a_failing_dns_for_a_bounded_time() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        cache.learned("a", addrs(1), SECOND, now);
        let later = now + SECOND * 5;
        assert_eq!(cache.get("a", later), Known::Nothing, "a refresh is due");
        assert_eq!(cache.failed("a", "timeout", later), Some(addrs(1)));
        assert_eq!(cache.get("a", later + SECOND), Known::Addrs(&addrs(1)), "no wait while the failure is recent");
        assert_eq!(cache.get("a", later + SECOND * 3), Known::Nothing, "the next attempt is due");
        let too_late = now + SECOND + STALE;
        assert_eq!(cache.failed("a", "timeout", too_late), None);
        assert_eq!(cache.get("a", too_late), Known::Failed("timeout"));
    }

    #[test]
    fn names_are_bounded() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        for i in 0..MAX_NAMES + 10 {
            cache.learned(&i.to_string(), addrs(1), SECOND * (10 + i as u32), now);
        }
        assert_eq!(cache.len(), MAX_NAMES);
        assert_eq!(cache.get("3", now), Known::Nothing, "the one to run out first goes first");
        assert_eq!(cache.get("4100", now), Known::Addrs(&addrs(1)));
    }
}
