//! The snapshot that the gateway serves now.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use arc_swap::ArcSwap;
use tokio::sync::watch;

use super::Snapshot;

/// How far the log of changes goes back: snapshots, and keys in all. A VM that is further behind looks at everything.
const MAX_LOGGED: usize = 256;
const MAX_LOGGED_KEYS: usize = 8192;

/// One per process. The pipeline publishes, every worker reads.
pub struct Published {
    current: ArcSwap<Snapshot>,
    version: AtomicU64,
    revision: watch::Sender<i64>,
    changes: Mutex<ChangeLog>,
}

/// Which keys the last snapshots changed.
#[derive(Default)]
struct ChangeLog {
    batches: VecDeque<(u64, Vec<Arc<str>>)>,
    keys: usize,
    /// What changed up to this version is forgotten.
    forgotten: u64,
}

impl ChangeLog {
    fn push(&mut self, version: u64, keys: Vec<Arc<str>>) {
        self.keys += keys.len();
        self.batches.push_back((version, keys));
        while self.batches.len() > MAX_LOGGED || self.keys > MAX_LOGGED_KEYS {
            let Some((version, keys)) = self.batches.pop_front() else { return };
            self.keys -= keys.len();
            self.forgotten = version;
        }
    }

    fn since(&self, version: u64, until: u64) -> Option<Vec<Arc<str>>> {
        let newer = || self.batches.iter().filter(|(v, _)| (version + 1..=until).contains(v));
        (version >= self.forgotten).then(|| newer().flat_map(|(_, keys)| keys.iter().cloned()).collect())
    }
}

impl Published {
    pub fn new(first: Snapshot) -> Arc<Self> {
        let version = AtomicU64::new(first.version);
        let (revision, _) = watch::channel(first.revision);
        let changes = Mutex::new(ChangeLog { forgotten: first.version, ..ChangeLog::default() });
        Arc::new(Published { current: ArcSwap::from_pointee(first), version, revision, changes })
    }

    /// The version now served: workers compare it with theirs at each request, one load.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    pub fn load(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// From here on every request that starts is served by `next`, which differs by these keys from the one before.
    pub fn publish(&self, next: Snapshot, changed: Vec<Arc<str>>) {
        let (version, revision) = (next.version, next.revision);
        // First, so that whoever sees the snapshot finds what it changed.
        self.changes.lock().unwrap_or_else(PoisonError::into_inner).push(version, changed);
        self.current.store(Arc::new(next));
        self.version.store(version, Ordering::Release);
        self.revision.send_replace(revision);
    }

    /// The snapshot now served, and the keys that changed between `version` and it; `None` when that was too long ago.
    pub fn changed_since(&self, version: u64) -> (Arc<Snapshot>, Option<Vec<Arc<str>>>) {
        let now = self.load();
        let changed = self.changes.lock().unwrap_or_else(PoisonError::into_inner).since(version, now.version);
        (now, changed)
    }

    /// Notifies of each published revision.
    pub fn subscribe(&self) -> watch::Receiver<i64> {
        self.revision.subscribe()
    }

    /// Waits until `revision` or a later one is served.
    pub async fn reached(&self, revision: i64) {
        let mut seen = self.revision.subscribe();
        // The sender lives in `self`, so the channel cannot close while we wait.
        let _ = seen.wait_for(|r| *r >= revision).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_told_as_far_back_as_the_log_goes() {
        let published = Published::new(Snapshot::default());
        let publish = |version: u64, keys: usize| {
            let keys = (0..keys).map(|n| format!("/routes/{version}-{n}").into()).collect();
            published.publish(Snapshot { version, ..Snapshot::default() }, keys);
        };
        let since = |version| published.changed_since(version).1.map(|keys| keys.len());
        assert_eq!(since(0), Some(0));
        publish(1, 2);
        publish(2, 1);
        assert_eq!((since(0), since(1), since(2)), (Some(3), Some(1), Some(0)));
        (3..=MAX_LOGGED as u64).for_each(|version| publish(version, 0));
        assert_eq!(since(0), Some(3), "the log is full");
        publish(MAX_LOGGED as u64 + 1, 0);
        assert_eq!((since(0), since(1)), (None, Some(1)));
        publish(MAX_LOGGED as u64 + 2, MAX_LOGGED_KEYS);
        assert_eq!(since(MAX_LOGGED as u64 + 1), Some(MAX_LOGGED_KEYS));
        publish(MAX_LOGGED as u64 + 3, 1);
        assert_eq!((since(MAX_LOGGED as u64 + 1), since(MAX_LOGGED as u64 + 2)), (None, Some(1)));
    }
}
