//! etcd as a store: APISIX's layout under its prefix, so that both can share a cluster.
//!
//! One connection to one member at a time; the next member is tried when it fails. A watch goes on from the
//! revision that was seen last; when that is compacted away, or the cluster is another one, everything is read
//! again. A member that stops answering without closing its connection is noticed by HTTP/2 pings.

mod connect;
mod revisions;

use std::{
    collections::hash_map::RandomState,
    error::Error as _,
    hash::{BuildHasher, Hasher},
    path::Path,
    sync::Arc,
    time::Duration,
};

use etcd_client::{
    Client, Compare, CompareOp, DeleteOptions, GetOptions, KeyValue, PutOptions, ResponseHeader, Txn, TxnOp,
    TxnOpResponse, WatchOptions, WatchResponse,
};
use serde_json::Value;
use tokio::{sync::Mutex, time::timeout};
use tonic::Code;

use super::{
    Batch, BoxFuture, Change, ChangeSink, Committed, Condition, Entry, NOT_UTF8, Store, Written,
    revisions::{Bounds, Page, Query},
};
use crate::error::{Error, Kind, Result};
use connect::Tls;
use revisions::History;

/// Keys in one page of a list. At a few hundred bytes each a page stays well under `MAX_MESSAGE`.
const PAGE: i64 = 2000;
/// The largest message taken from etcd. A page that is larger is asked for in halves.
const MAX_MESSAGE: usize = 64 << 20;
/// Between two tries to reach the cluster: doubled from the first to the second, with jitter. The second keeps the promise that five
/// seconds after a cluster is back all nodes serve what it holds.
const BACKOFF: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(2)];
/// What APISIX writes to make a directory of a key.
const DIRECTORY: &[u8] = b"init_dir";

/// `deployment.etcd`.
#[derive(Clone, Debug)]
pub struct EtcdConfig {
    /// `http://127.0.0.1:2379`.
    pub hosts: Vec<String>,
    /// `/apisix`, without a slash at its end.
    pub prefix: String,
    pub user: Option<(String, String)>,
    /// Of one request.
    pub timeout: Duration,
    tls: Tls,
    revisions: Bounds,
}

impl EtcdConfig {
    /// Reads `deployment.etcd` of the effective configuration; file names in it are relative to `dir`.
    pub fn from_json(config: &Value, dir: &Path) -> Result<Self> {
        let etcd = config.pointer("/deployment/etcd").unwrap_or(&Value::Null);
        let hosts = match &etcd["host"] {
            Value::Array(list) => list.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
            Value::String(one) => vec![one.clone()],
            _ => vec!["http://127.0.0.1:2379".to_owned()],
        };
        if hosts.is_empty() {
            return Err(Error::config(Kind::Invalid).context("deployment.etcd.host is empty: name at least one member"));
        }
        let text = |v: &Value| v.as_str().filter(|s| !s.is_empty()).map(str::to_owned);
        let prefix = text(&etcd["prefix"]).unwrap_or_else(|| "/apisix".to_owned());
        let timeout = &etcd["timeout"];
        let seconds = timeout.as_f64().or_else(|| timeout.as_str()?.trim().parse().ok());
        let seconds = seconds.filter(|t| *t > 0.0 && *t < 86_400.0).unwrap_or(30.0);
        Ok(EtcdConfig {
            hosts,
            prefix: prefix.trim_end_matches('/').to_owned(),
            user: text(&etcd["user"]).map(|user| (user, text(&etcd["password"]).unwrap_or_default())),
            timeout: Duration::from_secs_f64(seconds),
            tls: Tls::from_json(config, dir)?,
            revisions: Bounds::from_json(config),
        })
    }
}

pub struct Etcd {
    config: EtcdConfig,
    link: Mutex<Link>,
    history: History,
}

/// The member that is spoken to.
#[derive(Default)]
struct Link {
    host: usize,
    client: Option<Client>,
}

/// A failed call to etcd.
struct Failure {
    /// The member could not be reached, or lost its cluster: another one may do better.
    unreachable: bool,
    /// Nothing of the request was sent.
    unsent: bool,
    too_large: bool,
    message: String,
}

impl From<etcd_client::Error> for Failure {
    fn from(e: etcd_client::Error) -> Self {
        let (code, refused, message) = match &e {
            etcd_client::Error::GRpcStatus(status) => {
                let mut message = status.message().to_owned();
                let mut refused = false;
                let mut cause = status.source();
                while let Some(inner) = cause {
                    let io = inner.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
                    refused |= io == Some(std::io::ErrorKind::ConnectionRefused);
                    let text = inner.to_string();
                    if !message.contains(&text) {
                        message = format!("{message}: {text}");
                    }
                    cause = inner.source();
                }
                (status.code(), refused, message)
            }
            etcd_client::Error::TransportError(_) | etcd_client::Error::IoError(_) => {
                (Code::Unavailable, false, e.to_string())
            }
            other => (Code::Internal, false, other.to_string()),
        };
        let unreachable = matches!(code, Code::Unavailable | Code::Unknown | Code::Cancelled | Code::DeadlineExceeded);
        let too_large = matches!(code, Code::OutOfRange | Code::ResourceExhausted) && message.contains("too large");
        Failure { unreachable, unsent: refused, too_large, message }
    }
}

impl Failure {
    fn timed_out() -> Self {
        let message = "no answer in time".to_owned();
        Failure { unreachable: true, unsent: false, too_large: false, message }
    }

    fn into_error(self, what: &str) -> Error {
        let kind = if self.unreachable { Kind::Unavailable } else { Kind::Other };
        Error::config(kind).context(self.message).context(format!("etcd: {what}"))
    }
}

type Outcome<T> = std::result::Result<T, Failure>;
type Call<T> = BoxFuture<'static, std::result::Result<T, etcd_client::Error>>;

impl Etcd {
    /// Does not connect yet: a cluster that is down is no reason not to start.
    pub fn new(config: EtcdConfig) -> Arc<Self> {
        Arc::new(Etcd { config, link: Mutex::default(), history: History::default() })
    }

    /// The member in use and a client of it.
    async fn client(&self) -> Outcome<(usize, Client)> {
        let mut link = self.link.lock().await;
        if let Some(client) = &link.client {
            return Ok((link.host, client.clone()));
        }
        let host = &self.config.hosts[link.host];
        let dial = connect::dial(host, &self.config.tls, self.config.user.clone());
        let client = match timeout(self.config.timeout, dial).await {
            Ok(Ok(client)) => client,
            failed => {
                link.host = (link.host + 1) % self.config.hosts.len();
                return Err(failed.map_or_else(
                    |_| Failure::timed_out(),
                    |e| e.err().map_or_else(Failure::timed_out, Failure::from),
                ));
            }
        };
        link.client = Some(client.clone());
        Ok((link.host, client))
    }

    /// From now on another member, unless that has happened already.
    async fn give_up_on(&self, host: usize) {
        let mut link = self.link.lock().await;
        if link.host == host {
            *link = Link { host: (host + 1) % self.config.hosts.len(), client: None };
        }
    }

    /// Calls members in turn until one answers. `again`: the call may be repeated even if a member that then failed
    /// may have acted on it.
    async fn call<T>(&self, again: bool, call: impl Fn(Client) -> Call<T> + Send) -> Outcome<T> {
        let mut tries = self.config.hosts.len();
        loop {
            tries -= 1;
            let failure = match self.client().await {
                Err(e) => e,
                Ok((host, client)) => match timeout(self.config.timeout, call(client)).await {
                    Ok(Ok(answer)) => return Ok(answer),
                    failed => {
                        let failure = match failed {
                            Ok(Err(e)) => Failure::from(e),
                            _ => Failure::timed_out(),
                        };
                        if failure.unreachable {
                            self.give_up_on(host).await;
                        }
                        if !(again || failure.unsent) {
                            return Err(failure);
                        }
                        failure
                    }
                },
            };
            if !failure.unreachable || tries == 0 {
                return Err(failure);
            }
        }
    }

    fn full_key(&self, key: &str) -> String {
        format!("{}{key}", self.config.prefix)
    }

    async fn read(&self, key: &str) -> Outcome<Option<Entry>> {
        let full = self.full_key(key);
        let answer = self
            .call(true, move |client| {
                let full = full.clone();
                Box::pin(async move { kv(&client).get(full, None).await })
            })
            .await?;
        Ok(answer.kvs().first().and_then(|kv| self.entry(kv)))
    }

    /// Everything under `prefix` at one revision, in pages.
    async fn pages(&self, prefix: &str) -> Outcome<(Vec<Entry>, Position)> {
        let start = self.full_key(prefix);
        let end = prefix_end(&start);
        let (mut entries, mut from, mut page) = (Vec::new(), start.into_bytes(), PAGE);
        let mut position: Option<Position> = None;
        loop {
            let revision = position.as_ref().map_or(0, |p| p.revision);
            let range = (from.clone(), end.clone());
            let answer = self
                .call(true, move |client| {
                    let (from, end) = range.clone();
                    let options = GetOptions::new().with_range(end).with_limit(page).with_revision(revision);
                    Box::pin(async move { kv(&client).get(from, Some(options)).await })
                })
                .await;
            let answer = match answer {
                Err(e) if e.too_large && page > 1 => {
                    page = (page / 2).max(1);
                    continue;
                }
                answer => answer?,
            };
            let at = position.get_or_insert_with(|| Position::of(answer.header()));
            entries.extend(answer.kvs().iter().filter_map(|kv| self.entry(kv)));
            match answer.kvs().last() {
                Some(last) if answer.more() => from = [last.key(), b"\0"].concat(),
                _ => return Ok((entries, *at)),
            }
        }
    }

    /// The entry as the rest of the gateway knows it; `None` for what APISIX keeps beside resources.
    fn entry(&self, kv: &KeyValue) -> Option<Entry> {
        let key = self.relative(kv.key())?;
        if kv.value() == DIRECTORY {
            return None;
        }
        let value = std::str::from_utf8(kv.value()).unwrap_or(NOT_UTF8).into();
        Some(Entry { key, value, create_revision: kv.create_revision(), mod_revision: kv.mod_revision() })
    }

    fn relative(&self, key: &[u8]) -> Option<Arc<str>> {
        let key = std::str::from_utf8(key).ok()?.strip_prefix(&self.config.prefix)?;
        (key.starts_with('/') && !key.ends_with('/')).then(|| key.into())
    }

    async fn write(&self, key: &str, value: String, on: Condition, ttl_secs: Option<u64>) -> Outcome<Option<Written>> {
        let lease = match ttl_secs {
            Some(ttl) => Some(self.lease(ttl).await?),
            None => None,
        };
        let (full, text) = (self.full_key(key), value.clone());
        let answer = self
            .call(on == Condition::Always, move |client| {
                let put = lease.map_or_else(PutOptions::new, |id| PutOptions::new().with_lease(id)).with_prev_key();
                let txn = guarded(&full, on, TxnOp::put(full.as_str(), text.as_str(), Some(put)));
                Box::pin(async move { kv(&client).txn(txn).await })
            })
            .await?;
        if !answer.succeeded() {
            return Ok(None);
        }
        let revision = answer.header().map_or(0, ResponseHeader::revision);
        let previous = answer.op_responses().into_iter().find_map(|op| match op {
            TxnOpResponse::Put(put) => put.prev_key().and_then(|kv| self.entry(kv)),
            _ => None,
        });
        let entry = Entry {
            key: key.into(),
            value: value.into(),
            create_revision: previous.as_ref().map_or(revision, |p| p.create_revision),
            mod_revision: revision,
        };
        Ok(Some(Written { entry, previous, revision, lease: lease.map(|id| id.to_string()) }))
    }

    async fn lease(&self, ttl_secs: u64) -> Outcome<i64> {
        let ttl = i64::try_from(ttl_secs).unwrap_or(i64::MAX);
        let granted =
            self.call(true, move |mut client| Box::pin(async move { client.lease_grant(ttl, None).await })).await?;
        Ok(granted.id())
    }

    async fn renew(&self, lease: i64) -> Outcome<Option<u64>> {
        let renewed = self
            .call(true, move |mut client| {
                Box::pin(async move {
                    let alive = client.lease_keep_alive(lease).await;
                    match alive {
                        // Says only whether there is such a lease.
                        Ok(_) => client.lease_time_to_live(lease, None).await.map(Some),
                        Err(etcd_client::Error::LeaseKeepAliveError(_)) => Ok(None),
                        Err(e) => Err(e),
                    }
                })
            })
            .await?;
        Ok(renewed.and_then(|left| u64::try_from(left.granted_ttl()).ok()))
    }

    async fn server_version(&self) -> Outcome<String> {
        let status = self.call(true, |mut client| Box::pin(async move { client.status().await })).await?;
        Ok(status.version().to_owned())
    }

    /// `None`: the condition did not hold.
    async fn erase(&self, key: &str, on: Condition) -> Outcome<Option<Option<(Entry, i64)>>> {
        let full = self.full_key(key);
        let answer = self
            .call(false, move |client| {
                let delete = TxnOp::delete(full.as_str(), Some(DeleteOptions::new().with_prev_key()));
                let txn = guarded(&full, on, delete);
                Box::pin(async move { kv(&client).txn(txn).await })
            })
            .await?;
        if !answer.succeeded() {
            return Ok(None);
        }
        let revision = answer.header().map_or(0, ResponseHeader::revision);
        let deleted = answer.op_responses().into_iter().find_map(|op| match op {
            TxnOpResponse::Delete(d) => d.prev_kvs().first().and_then(|kv| self.entry(kv)),
            _ => None,
        });
        Ok(Some(deleted.map(|entry| (entry, revision))))
    }
}

/// A client of keys that takes large answers.
fn kv(client: &Client) -> etcd_client::KvClient {
    client.kv_client().max_decoding_message_size(MAX_MESSAGE)
}

fn guarded(key: &str, on: Condition, op: TxnOp) -> Txn {
    let txn = Txn::new();
    let txn = match on {
        Condition::Always => txn,
        Condition::Unmodified(revision) => txn.when([Compare::mod_revision(key, CompareOp::Equal, revision)]),
    };
    txn.and_then([op])
}

/// The first key that does not start with `prefix`, which is text and not empty.
fn prefix_end(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    // No byte of UTF-8 text is 0xff, so the last one can always be counted up.
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}

fn conflict(key: &str) -> Error {
    Error::client(Kind::Conflict).context(format!("{key} has been modified"))
}

impl Store for Etcd {
    fn name(&self) -> &'static str {
        "etcd"
    }

    fn identity(&self) -> Option<String> {
        let mut hosts = self.config.hosts.clone();
        hosts.sort();
        Some(format!("etcd {} {}", hosts.join(","), self.config.prefix))
    }

    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Entry>>> {
        Box::pin(async move { self.read(key).await.map_err(|e| e.into_error("get")) })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<(Vec<Entry>, i64)>> {
        Box::pin(async move {
            let (entries, at) = self.pages(prefix).await.map_err(|e| e.into_error("list"))?;
            Ok((entries, at.revision))
        })
    }

    fn put<'a>(
        &'a self,
        key: &'a str,
        value: String,
        on: Condition,
        ttl_secs: Option<u64>,
    ) -> BoxFuture<'a, Result<Written>> {
        Box::pin(async move {
            let written = self.write(key, value, on, ttl_secs).await.map_err(|e| e.into_error("put"))?;
            written.ok_or_else(|| conflict(key))
        })
    }

    fn delete<'a>(&'a self, key: &'a str, on: Condition) -> BoxFuture<'a, Result<Option<(Entry, i64)>>> {
        Box::pin(async move {
            let deleted = self.erase(key, on).await.map_err(|e| e.into_error("delete"))?;
            deleted.ok_or_else(|| conflict(key))
        })
    }

    fn commit<'a>(&'a self, batch: Batch) -> BoxFuture<'a, Result<Committed>> {
        Box::pin(self.commit_batch(batch))
    }

    fn revisions<'a>(&'a self, query: Query) -> BoxFuture<'a, Result<Option<Page>>> {
        Box::pin(async move { self.history_page(&query).await.map(Some) })
    }

    fn keep_alive<'a>(&'a self, lease: &'a str) -> BoxFuture<'a, Result<Option<u64>>> {
        Box::pin(async move {
            match lease.parse() {
                Ok(id) => self.renew(id).await.map_err(|e| e.into_error("keepalive")),
                Err(_) => Ok(None),
            }
        })
    }

    fn version(&self) -> BoxFuture<'_, Result<String>> {
        Box::pin(async move { self.server_version().await.map_err(|e| e.into_error("version")) })
    }

    fn watch(self: Arc<Self>, changes: ChangeSink) -> BoxFuture<'static, ()> {
        let mut watcher = Watcher { etcd: self, sink: changes, at: None, lost: None, failures: 0 };
        Box::pin(async move { watcher.run().await })
    }
}

/// Up to where a watcher knows a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Position {
    cluster: u64,
    revision: i64,
}

impl Position {
    fn of(header: Option<&ResponseHeader>) -> Self {
        Position {
            cluster: header.map_or(0, ResponseHeader::cluster_id),
            revision: header.map_or(0, ResponseHeader::revision),
        }
    }
}

/// Why a session with a member ended.
enum End {
    /// Nobody listens any more.
    Closed,
    /// The changes since the last position are not to be had.
    Reload(String),
    Failed(Failure),
}

impl From<Failure> for End {
    fn from(e: Failure) -> Self {
        End::Failed(e)
    }
}

impl From<etcd_client::Error> for End {
    fn from(e: etcd_client::Error) -> Self {
        match Failure::from(e) {
            f if f.too_large => End::Reload(f.message),
            f => End::Failed(f),
        }
    }
}

struct Watcher {
    etcd: Arc<Etcd>,
    sink: ChangeSink,
    at: Option<Position>,
    lost: Option<String>,
    /// In a row.
    failures: u32,
}

impl Watcher {
    async fn run(&mut self) {
        loop {
            let Err(end) = self.session().await;
            match end {
                End::Closed => return,
                End::Reload(reason) => {
                    tracing::warn!("etcd: reading everything again: {reason}");
                    self.at = None;
                }
                End::Failed(failure) => {
                    // Told again when it is something else: an etcd that is back and shuts us out is no etcd that is gone.
                    if self.lost.as_ref() != Some(&failure.message) {
                        self.lost = Some(failure.message.clone());
                        if self.sink.send(Change::Lost { reason: failure.message }).await.is_err() {
                            return;
                        }
                    }
                }
            }
            tokio::select! {
                () = tokio::time::sleep(backoff(self.failures)) => {}
                () = self.sink.closed() => return,
            }
            self.failures = self.failures.saturating_add(1);
        }
    }

    /// Catches up, then follows one member until it fails.
    async fn session(&mut self) -> std::result::Result<std::convert::Infallible, End> {
        let at = self.catch_up().await?;
        let (host, client) = self.etcd.client().await?;
        let end = self.follow(client, at).await;
        if let Err(End::Failed(_)) = &end {
            self.etcd.give_up_on(host).await;
        }
        end
    }

    /// The position to follow from: where we were, if the cluster still goes on from there; else everything is read.
    async fn catch_up(&mut self) -> std::result::Result<Position, End> {
        if let Some(at) = self.at {
            let prefix = self.etcd.full_key("/");
            let answer = self
                .etcd
                .call(true, move |client| {
                    let options = GetOptions::new().with_prefix().with_limit(1).with_keys_only();
                    let prefix = prefix.clone();
                    Box::pin(async move { kv(&client).get(prefix, Some(options)).await })
                })
                .await?;
            let now = Position::of(answer.header());
            if now.cluster == at.cluster && now.revision >= at.revision {
                self.found().await?;
                return Ok(at);
            }
            // A cluster restored from a backup would never reach our revision: we would wait for ever.
            tracing::warn!(
                "etcd: another cluster, or one set back to revision {}: reading everything again",
                now.revision
            );
        }
        let (entries, at) = self.etcd.pages("/").await?;
        self.found().await?;
        self.send(Change::All { entries, revision: at.revision }).await?;
        self.at = Some(at);
        Ok(at)
    }

    async fn found(&mut self) -> std::result::Result<(), End> {
        match self.lost.take().is_some() {
            true => self.send(Change::Found).await,
            false => Ok(()),
        }
    }

    async fn send(&self, change: Change) -> std::result::Result<(), End> {
        self.sink.send(change).await.map_err(|_| End::Closed)
    }

    async fn follow(&mut self, client: Client, at: Position) -> std::result::Result<std::convert::Infallible, End> {
        let options = WatchOptions::new().with_prefix().with_start_revision(at.revision + 1).with_progress_notify();
        let mut watch = client.watch_client().max_decoding_message_size(MAX_MESSAGE);
        let opening = watch.watch(self.etcd.full_key("/"), Some(options));
        let opened = timeout(self.etcd.config.timeout, opening).await;
        let mut stream = opened.map_err(|_| Failure::timed_out())??;
        loop {
            let message = tokio::select! {
                message = stream.message() => message?,
                () = self.sink.closed() => return Err(End::Closed),
            };
            let Some(message) = message else {
                let message = "the watch was closed".to_owned();
                return Err(Failure { unreachable: true, unsent: false, too_large: false, message }.into());
            };
            self.take(&message).await?;
        }
    }

    async fn take(&mut self, message: &WatchResponse) -> std::result::Result<(), End> {
        if message.compact_revision() > 0 {
            return Err(End::Reload(format!("revisions before {} are compacted", message.compact_revision())));
        }
        if message.canceled() {
            let message = format!("the watch was cancelled: {}", message.cancel_reason());
            return Err(Failure { unreachable: true, unsent: false, too_large: false, message }.into());
        }
        self.failures = 0;
        let mut changes = Vec::new();
        let mut revision = 0;
        for kv in message.events().iter().filter_map(|e| e.kv()) {
            revision = revision.max(kv.mod_revision());
            let Some(key) = self.etcd.relative(kv.key()) else { continue };
            match kv.version() {
                // The key is gone.
                0 => changes.push((key, None)),
                _ => changes.extend(self.etcd.entry(kv).map(|e| (key, Some(e)))),
            }
        }
        // Without events it is a note of progress: all up to that revision has been sent.
        let progress = message.events().is_empty() && !message.created();
        if progress {
            revision = message.header().map_or(0, ResponseHeader::revision);
        }
        if let Some(at) = &mut self.at {
            at.revision = at.revision.max(revision);
        }
        // A key that is passed over (a directory's) has its revision, which a writer of it waits for.
        if message.events().is_empty() && !progress {
            return Ok(());
        }
        self.send(Change::Some { changes, revision }).await
    }
}

/// Doubles with each failure in a row; between half and all of it, so that the nodes of a cluster do not come back
/// in step.
fn backoff(failures: u32) -> Duration {
    let [first, most] = BACKOFF;
    let full = first.saturating_mul(1 << failures.min(10)).min(most);
    let random = RandomState::new().build_hasher().finish();
    full / 2 + (full / 2).mul_f64(random as f64 / u64::MAX as f64)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn reads_deployment_etcd() {
        let config = json!({"deployment": {"etcd": {
            "host": ["http://a:2379", "http://b:2379"], "prefix": "/x/", "timeout": 5, "user": "root", "password": "p",
        }}});
        let c = EtcdConfig::from_json(&config, Path::new("/")).unwrap();
        assert_eq!((c.hosts.len(), &*c.prefix, c.timeout), (2, "/x", Duration::from_secs(5)));
        assert_eq!(c.user, Some(("root".to_owned(), "p".to_owned())));
        let c = EtcdConfig::from_json(&json!({}), Path::new("/")).unwrap();
        assert_eq!(
            (&*c.hosts[0], &*c.prefix, c.timeout),
            ("http://127.0.0.1:2379", "/apisix", Duration::from_secs(30))
        );
        let empty = json!({"deployment": {"etcd": {"host": []}}});
        assert!(
            EtcdConfig::from_json(&empty, Path::new("/")).unwrap_err().to_string().contains("deployment.etcd.host")
        );
    }

    #[test]
    fn keys_are_relative_and_directories_are_not_entries() {
        let etcd = Etcd::new(EtcdConfig::from_json(&json!({}), Path::new("/")).unwrap());
        for (key, relative) in [
            ("/apisix/routes/1", Some("/routes/1")),
            ("/apisix/routes/", None),
            ("/apisix/", None),
            ("/apisix", None),
            ("/apisixx/routes/1", None),
            ("/other/routes/1", None),
        ] {
            assert_eq!(etcd.relative(key.as_bytes()).as_deref(), relative, "{key}");
        }
        assert_eq!(prefix_end("/apisix/"), b"/apisix0");
    }

    #[test]
    fn backs_off_between_half_and_all_of_a_bounded_time() {
        for (failures, most) in [(0, 100), (3, 800), (6, 2000), (u32::MAX, 2000)] {
            let d = backoff(failures).as_millis();
            assert!(d >= most / 2 && d <= most, "{failures}: {d}");
        }
    }
}
