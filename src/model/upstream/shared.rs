//! Upstreams that say the same are one upstream.
//!
//! Thousands of routes that name the same node are the rule in large configurations. One upstream for all of them lies in the
//! processor's caches whichever route is asked for, and costs its memory once.

use std::{
    hash::{BuildHasher, RandomState},
    sync::{Arc, LazyLock, Mutex, PoisonError, Weak},
};

use hashbrown::HashMap;
use serde_json::{Map, Value};

use super::Upstream;

static KNOWN: LazyLock<Mutex<Known>> = LazyLock::new(Mutex::default);
static HASHER: LazyLock<RandomState> = LazyLock::new(RandomState::new);

/// Upstreams in use, by a hash of their JSON. One for each hash: another that has it by accident takes the place.
#[derive(Default)]
struct Known {
    by_hash: HashMap<u64, Weak<Upstream>>,
    /// How many there may be before those that nobody uses any more are taken out.
    sweep_at: usize,
}

/// A map smaller than this is not worth a sweep.
const SWEEP_MIN: usize = 1024;

/// An upstream that stands in a route or a service as `json`: the one that is known, if it says the same.
pub(super) fn share(upstream: Upstream, json: &Map<String, Value>) -> Arc<Upstream> {
    if !is_stateless(&upstream) {
        return Arc::new(upstream);
    }
    let hash = HASHER.hash_one(json);
    KNOWN.lock().unwrap_or_else(PoisonError::into_inner).share(upstream, hash)
}

/// With one node that is written down there is nothing to balance and nothing to find out, so that nobody can tell whether two
/// routes share it. A client's key is never compared.
fn is_stateless(upstream: &Upstream) -> bool {
    upstream.nodes.len() == 1 && upstream.checks.is_none() && upstream.discovery.is_none() && upstream.tls.is_none()
}

impl Known {
    fn share(&mut self, upstream: Upstream, hash: u64) -> Arc<Upstream> {
        if let Some(known) = self.by_hash.get(&hash).and_then(Weak::upgrade)
            && known.says_the_same(&upstream)
        {
            return known;
        }
        if self.by_hash.len() >= self.sweep_at {
            self.by_hash.retain(|_, known| known.strong_count() > 0);
            // Twice what is in use: a sweep costs each upstream that is put in no more than two looks.
            self.sweep_at = (2 * self.by_hash.len()).max(SWEEP_MIN);
        }
        let upstream = Arc::new(upstream);
        self.by_hash.insert(hash, Arc::downgrade(&upstream));
        upstream
    }
}

impl Upstream {
    /// Equal in everything but `uid`.
    fn says_the_same(&self, other: &Upstream) -> bool {
        let Upstream {
            nodes,
            scheme,
            balance,
            pass_host,
            timeout,
            keepalive,
            retries,
            uid: _,
            retry_timeout,
            tls,
            id,
            name,
            discovery,
            checks,
        } = self;
        *nodes == other.nodes
            && *scheme == other.scheme
            && *balance == other.balance
            && *pass_host == other.pass_host
            && *timeout == other.timeout
            && *keepalive == other.keepalive
            && *retries == other.retries
            && *retry_timeout == other.retry_timeout
            && *id == other.id
            && *name == other.name
            && *discovery == other.discovery
            && *checks == other.checks
            && tls.is_none()
            && other.tls.is_none()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::model::{Keyring, ParseContext};

    fn upstream(json: &Value) -> Upstream {
        let (keyring, mut json) = (Keyring::default(), json.clone());
        Upstream::from_json(json.as_object_mut().expect("a map"), &ParseContext::new(&keyring)).expect("a good one")
    }

    fn same(a: &Value, b: &Value) -> bool {
        let shared = |json: &Value| share(upstream(json), json.as_object().expect("a map"));
        Arc::ptr_eq(&shared(a), &shared(b))
    }

    fn with(more: &Value) -> Value {
        let mut json = json!({"type": "roundrobin", "nodes": {"127.0.0.1:1980": 1}});
        json.as_object_mut().expect("a map").extend(more.as_object().expect("a map").clone());
        json
    }

    #[test]
    fn what_says_the_same_is_one_upstream_and_nothing_else_is() {
        let one = with(&json!({}));
        assert!(same(&one, &one));
        for more in [
            json!({"nodes": {"127.0.0.1:1981": 1}}),
            json!({"nodes": {"127.0.0.1:1980": 0}}),
            json!({"type": "least_conn"}),
            json!({"scheme": "https"}),
            json!({"pass_host": "node"}),
            json!({"timeout": {"connect": 1, "send": 1, "read": 1}}),
            json!({"keepalive_pool": {"size": 1}}),
            json!({"retries": 2}),
            json!({"retry_timeout": 3}),
            json!({"name": "other"}),
        ] {
            let other = with(&more);
            assert!(same(&other, &other) && !same(&one, &other), "{other}");
            let mut known = Known::default();
            let [one, other] = [&one, &other].map(|json| known.share(upstream(json), 7));
            assert!(!Arc::ptr_eq(&one, &other), "although their hashes are equal: {more}");
        }
    }

    #[test]
    fn what_has_a_state_of_its_own_is_not_shared() {
        for more in [
            json!({"nodes": {"127.0.0.1:1980": 1, "127.0.0.1:1981": 1}}),
            json!({"nodes": {}}),
            json!({"checks": {"active": {"http_path": "/"}}}),
            json!({"discovery_type": "dns", "service_name": "x"}),
            json!({"tls": {"verify": true}}),
        ] {
            assert!(!same(&with(&more), &with(&more)), "{more}");
        }
    }

    #[test]
    fn upstreams_that_nobody_uses_are_forgotten() {
        let mut known = Known::default();
        let mut share = |i: u64| {
            let shared = known.share(upstream(&with(&json!({"nodes": {format!("node-{i}"): 1}}))), i);
            assert!(known.by_hash.len() <= 2 * SWEEP_MIN);
            shared
        };
        let kept: Vec<_> = (0..SWEEP_MIN as u64).map(&mut share).collect();
        for i in 0..20 * SWEEP_MIN as u64 {
            share(1_000_000 + i);
        }
        assert!(kept.iter().zip(0..).all(|(kept, i)| Arc::ptr_eq(kept, &share(i))));
    }
}
