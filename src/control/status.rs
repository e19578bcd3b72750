//! The status API (status-api.md): whether the gateway runs, and whether its workers serve what they are to serve.
//!
//! It listens before the first configuration is there and until the last request of a drain is answered.

use std::{
    cell::OnceCell,
    future::Future,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::SystemTime,
};

use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::Mutex};

use super::MAX_BODY_BYTES;
use crate::{
    admin::http::{self as api, Answer, Incomplete},
    store::{Published, SourceState},
};

/// What the workers have reported. The control thread writes, anyone reads.
#[derive(Debug)]
pub struct Readiness {
    workers: Box<[AtomicBool]>,
    ending: AtomicBool,
}

impl Readiness {
    pub fn new(workers: usize) -> Arc<Self> {
        Arc::new(Readiness {
            workers: (0..workers).map(|_| AtomicBool::new(false)).collect(),
            ending: AtomicBool::new(false),
        })
    }

    /// Whether the worker accepts requests.
    pub fn set(&self, worker: usize, ready: bool) {
        if let Some(flag) = self.workers.get(worker) {
            flag.store(ready, Ordering::Relaxed);
        }
    }

    /// The gateway takes no new connections any more.
    pub fn end(&self) {
        self.ending.store(true, Ordering::Relaxed);
    }

    fn flags(&self) -> Vec<bool> {
        self.workers.iter().map(|flag| flag.load(Ordering::Relaxed)).collect()
    }
}

/// What it is answered from.
pub struct Status {
    pub workers: Arc<Readiness>,
    /// There once the store has answered, or was given up on.
    configuration: OnceCell<Configuration>,
    /// The digest of the snapshot of that version, which takes a while with many objects.
    digest: Mutex<Option<(u64, String)>>,
}

struct Configuration {
    published: Arc<Published>,
    source: Arc<SourceState>,
    /// Whether a document is there, where the configuration is one that the Admin API was given.
    has_document: Box<dyn Fn() -> bool>,
}

impl Configuration {
    fn is_received(&self) -> bool {
        self.source.load().received && (self.has_document)()
    }
}

impl Status {
    pub fn new(workers: Arc<Readiness>) -> Rc<Self> {
        Rc::new(Status { workers, configuration: OnceCell::new(), digest: Mutex::default() })
    }

    /// From here on there is a configuration. `has_document`: false while a store that is given its document has none.
    pub fn configured(&self, published: Arc<Published>, source: Arc<SourceState>, has_document: Box<dyn Fn() -> bool>) {
        // Told once: a second time would say the same.
        let _ = self.configuration.set(Configuration { published, source, has_document });
    }

    /// Why the gateway is not ready, in APISIX's words where it has some.
    fn refusal(&self) -> Option<String> {
        let flags = self.workers.flags();
        let ready = flags.iter().filter(|ready| **ready).count();
        if self.workers.ending.load(Ordering::Relaxed) {
            return Some("the gateway is ending".into());
        }
        if ready < flags.len() {
            return Some(format!("worker count: {} but status report count: {ready}", flags.len()));
        }
        // All of them serve the same snapshot.
        let received = self.configuration.get().is_some_and(Configuration::is_received);
        (!received).then(|| "worker id: 0 has not received configuration".into())
    }

    async fn ready(&self) -> Answer {
        let refusal = self.refusal();
        let workers: Vec<Value> =
            self.workers.flags().iter().enumerate().map(|(id, ready)| json!({"id": id, "ready": ready})).collect();
        let mut body = json!({"status": if refusal.is_some() { "error" } else { "ok" }, "workers": workers});
        if let Some(Configuration { published, source, .. }) = self.configuration.get() {
            let (snapshot, source) = (published.load(), source.load());
            body["revision"] = snapshot.revision.into();
            body["digest"] = self.digest(published).await.into();
            body["source"] = json!({
                "name": source.name,
                "connected": source.connected,
                "stale_seconds": source.stale_since.map(seconds_since),
                "reason": source.stale_since.and(source.last_error.as_deref()),
            });
        }
        match refusal {
            Some(error) => {
                body["error"] = error.into();
                Answer::json(503, &body)
            }
            None => Answer::json(200, &body),
        }
    }

    /// Of what is served now: made once per version, on another thread. `None`: that thread is gone.
    async fn digest(&self, published: &Published) -> Option<String> {
        let mut known = self.digest.lock().await;
        let snapshot = published.load();
        if let Some((_, digest)) = known.as_ref().filter(|(version, _)| *version == snapshot.version) {
            return Some(digest.clone());
        }
        let version = snapshot.version;
        let digest = tokio::task::spawn_blocking(move || snapshot.digest()).await.ok()?;
        *known = Some((version, digest.clone()));
        Some(digest)
    }
}

fn seconds_since(then: SystemTime) -> u64 {
    then.elapsed().map_or(0, |past| past.as_secs())
}

/// Serves the status API on `listener` until `shutdown`. Must run inside a `LocalSet`.
pub async fn serve(listener: TcpListener, status: Rc<Status>, shutdown: impl Future<Output = ()>) {
    let handler = move |request: Incomplete| {
        let status = status.clone();
        async move {
            match request.complete(MAX_BODY_BYTES).await {
                Ok(call) if call.path == "/status" => Answer::json(200, &json!({"status": "ok"})),
                Ok(call) if call.path == "/status/ready" => status.ready().await,
                Ok(_) => super::not_found(),
                Err(refusal) => refusal,
            }
        }
    };
    api::serve(listener, None, Rc::new(handler), shutdown).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Snapshot;

    #[test]
    fn it_is_not_ready_before_every_worker_and_the_configuration_are_there_nor_after_the_end_began() {
        let workers = Readiness::new(2);
        let status = Status::new(workers.clone());
        assert_eq!(status.refusal().as_deref(), Some("worker count: 2 but status report count: 0"));
        workers.set(1, true);
        workers.set(2, true);
        assert_eq!(status.refusal().as_deref(), Some("worker count: 2 but status report count: 1"));
        workers.set(0, true);
        status.configured(Published::new(Snapshot::default()), SourceState::new("etcd"), Box::new(|| true));
        assert_eq!(status.refusal().as_deref(), Some("worker id: 0 has not received configuration"));
        workers.end();
        assert_eq!(status.refusal().as_deref(), Some("the gateway is ending"));
    }
}
