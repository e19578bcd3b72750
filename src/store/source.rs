//! How the source of configuration does: what the control API and the status page tell.

use std::{sync::Arc, time::SystemTime};

use arc_swap::ArcSwap;

/// One per process. The pipeline writes, anyone reads.
#[derive(Debug)]
pub struct SourceState(ArcSwap<SourceStatus>);

#[derive(Clone, Debug)]
pub struct SourceStatus {
    /// `embedded`, `etcd`, `file` or `standalone`.
    pub name: &'static str,
    /// The last revision taken over.
    pub revision: i64,
    pub connected: bool,
    /// Something of it, or the last good state, is served.
    pub received: bool,
    /// When `connected` became what it is.
    pub since: SystemTime,
    /// Since when what is served may be older than what the source holds: the source has been lost since, or the
    /// gateway serves a last good state that was saved then.
    pub stale_since: Option<SystemTime>,
    pub last_error: Option<String>,
}

impl SourceState {
    pub fn new(name: &'static str) -> Arc<Self> {
        Arc::new(SourceState(ArcSwap::from_pointee(SourceStatus {
            name,
            revision: 0,
            connected: false,
            received: false,
            since: SystemTime::now(),
            stale_since: None,
            last_error: None,
        })))
    }

    pub fn load(&self) -> Arc<SourceStatus> {
        self.0.load_full()
    }

    /// Everything up to `revision` is served.
    pub(super) fn up_to_date(&self, revision: i64) {
        self.update(|s| {
            s.revision = revision;
            s.stale_since = None;
            s.received = true;
            set_connected(s, true);
        });
    }

    pub(super) fn lost(&self, reason: &str) {
        self.update(|s| {
            s.last_error = Some(reason.to_owned());
            s.stale_since.get_or_insert_with(SystemTime::now);
            set_connected(s, false);
        });
    }

    /// Connected again; what was missed is still on its way.
    pub(super) fn found(&self) {
        self.update(|s| set_connected(s, true));
    }

    /// Serving what was saved at `saved`.
    pub(super) fn last_good(&self, revision: i64, saved: SystemTime) {
        self.update(|s| {
            s.revision = revision;
            s.stale_since = Some(saved);
            s.received = true;
        });
    }

    fn update(&self, f: impl FnOnce(&mut SourceStatus)) {
        let mut next = SourceStatus::clone(&self.0.load());
        f(&mut next);
        self.0.store(Arc::new(next));
    }
}

fn set_connected(s: &mut SourceStatus, connected: bool) {
    if s.connected != connected {
        s.connected = connected;
        s.since = SystemTime::now();
    }
}
