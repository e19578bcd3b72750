//! The snapshot that the gateway serves now.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use arc_swap::ArcSwap;
use tokio::sync::watch;

use super::Snapshot;

/// One per process. The pipeline publishes, every worker reads.
pub struct Published {
    current: ArcSwap<Snapshot>,
    version: AtomicU64,
    revision: watch::Sender<i64>,
}

impl Published {
    pub fn new(first: Snapshot) -> Arc<Self> {
        let version = AtomicU64::new(first.version);
        let (revision, _) = watch::channel(first.revision);
        Arc::new(Published { current: ArcSwap::from_pointee(first), version, revision })
    }

    /// The version now served: workers compare it with theirs at each request, one load.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    pub fn load(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// From here on every request that starts is served by `next`.
    pub fn publish(&self, next: Snapshot) {
        let (version, revision) = (next.version, next.revision);
        self.current.store(Arc::new(next));
        self.version.store(version, Ordering::Release);
        self.revision.send_replace(revision);
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
