//! A request that nobody has sent: what is tried out works on it, on a thread where no request waits.

use std::{future::Future, rc::Rc, sync::Arc, thread};

use bytes::Bytes;
use tokio::{
    sync::{SemaphorePermit, oneshot},
    task::LocalSet,
};

use crate::{
    exchange::{Connection, Exchange, RequestBody},
    store::Snapshot,
};

/// No worker has this number, so that what only the first one does is not done.
pub(super) const WORKER: usize = u16::MAX as usize;

#[derive(Clone, Debug, Default)]
pub struct MockRequest {
    pub method: Vec<u8>,
    /// As in the request's first line.
    pub target: Vec<u8>,
    /// Decoded.
    pub path: Vec<u8>,
    /// Without `?`.
    pub args: Vec<u8>,
    pub headers: Vec<(String, String)>,
    pub body: Bytes,
}

/// An exchange without a client.
pub(super) fn nobodys(snapshot: &Arc<Snapshot>) -> Exchange {
    let nowhere = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    let mut x = Exchange::new(Rc::new(Connection::new(0, nowhere, nowhere)), snapshot.clone());
    x.begin();
    x
}

impl MockRequest {
    /// Makes it the request of an exchange.
    pub(super) fn fill(&self, x: &mut Exchange) {
        let to = &mut x.request;
        to.method.clone_from(&self.method);
        to.path.clone_from(&self.path);
        to.args.clone_from(&self.args);
        to.target.clone_from(&self.target);
        for (name, value) in &self.headers {
            to.headers.append(name, value);
        }
        to.host = to.headers.get("host").unwrap_or(b"localhost").to_ascii_lowercase();
        if !self.body.is_empty() {
            to.headers.set("Content-Length", self.body.len().to_string());
            x.body = RequestBody::Memory(self.body.clone());
        }
    }
}

/// Runs `work` on a thread of its own, which keeps `place` until it is done, though nobody may wait for it any more. The text says why
/// there is no outcome.
pub(super) async fn apart<T, F>(
    name: &str,
    place: Option<SemaphorePermit<'static>>,
    work: impl FnOnce() -> F + Send + 'static,
) -> Result<T, String>
where
    T: Send + 'static,
    F: Future<Output = T>,
{
    let (answer, outcome) = oneshot::channel();
    let body = move || {
        let _place = place;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let done = runtime.map(|runtime| LocalSet::new().block_on(&runtime, async { work().await }));
        let _ = answer.send(done.map_err(|e| e.to_string()));
    };
    thread::Builder::new().name(name.to_owned()).spawn(body).map_err(|e| e.to_string())?;
    outcome.await.unwrap_or_else(|_| Err("the trial's thread has ended".to_owned()))
}
