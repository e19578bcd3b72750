//! The embedded store: one redb file, one writer thread.
//!
//! Writes that arrive together share one transaction (group commit) and are answered after it is on the disk.
//! Reads see the last commit. A watcher that falls behind gets the newest version of what changed, never an
//! older one, and never holds a writer up.

use std::{
    collections::HashMap,
    mem,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot};

use super::{
    Batch, BoxFuture, Change, ChangeSink, Committed, Condition, Entry, Revision, Store, Written,
    disk::Disk,
    revisions::{self, Bounds, Changed, Page, Query, Write},
};
use crate::error::{Error, Kind, Result};

/// Writes that may wait for the writer. More wait in their callers.
const MAX_QUEUED: usize = 1024;
/// Writes in one transaction. Enough that fsync is no longer what limits a burst.
const MAX_GROUP: usize = 256;
/// Keys that a watcher may lag behind. Past it the watcher reads everything again instead.
const MAX_PENDING: usize = 65_536;
/// Before a watcher that cannot read the file tries again.
const REREAD_DELAY: Duration = Duration::from_secs(1);

pub struct Embedded {
    disk: Arc<Disk>,
    /// Taken when the store is dropped.
    writer: Option<(Sender<Request>, thread::JoinHandle<()>)>,
    slots: Arc<Semaphore>,
    feeds: Arc<Feeds>,
}

/// The file is closed once the store is dropped and what was asked of it is answered.
impl Drop for Embedded {
    fn drop(&mut self) {
        if let Some((inbox, thread)) = self.writer.take() {
            drop(inbox);
            let _ = thread.join();
        }
    }
}

struct Request {
    op: Op,
    answer: oneshot::Sender<Result<Done>>,
    /// The request's place in the queue.
    _slot: OwnedSemaphorePermit,
}

enum Op {
    Put { key: Arc<str>, value: Arc<str>, on: Condition, ttl_secs: Option<u64> },
    Delete { key: Arc<str>, on: Condition },
    Batch(Batch),
    Renew(Lease),
}

enum Done {
    Put(Written),
    Deleted(Option<(Entry, i64)>),
    Batch(Committed),
    /// Whether the entry still was there.
    Renewed(bool),
}

/// The time that one version of an entry was given, as text `ttl/revision/key`: it holds over a restart.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Lease {
    ttl_secs: u64,
    revision: i64,
    key: Arc<str>,
}

impl Lease {
    fn read(text: &str) -> Option<Lease> {
        let (ttl, rest) = text.split_once('/')?;
        let (revision, key) = rest.split_once('/')?;
        Some(Lease { ttl_secs: ttl.parse().ok()?, revision: revision.parse().ok()?, key: format!("/{key}").into() })
    }
}

impl std::fmt::Display for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}{}", self.ttl_secs, self.revision, self.key)
    }
}

impl Embedded {
    /// Opens the file, or creates it empty, and starts its writer.
    pub fn open(path: &Path) -> Result<Arc<Self>> {
        Self::open_with(path, Bounds::default())
    }

    /// The same with other bounds on the revisions that it keeps.
    pub fn open_with(path: &Path, bounds: Bounds) -> Result<Arc<Self>> {
        let disk = Arc::new(Disk::open(path)?);
        let feeds = Arc::new(Feeds::default());
        let (sender, inbox) = channel();
        let mut writer = Writer { disk: disk.clone(), inbox, feeds: feeds.clone(), bounds };
        let thread = thread::Builder::new().name("store-writer".to_owned()).spawn(move || writer.run())?;
        let slots = Arc::new(Semaphore::new(MAX_QUEUED));
        Ok(Arc::new(Embedded { disk, writer: Some((sender, thread)), slots, feeds }))
    }

    async fn write(&self, op: Op) -> Result<Done> {
        let slot = self.slots.clone().acquire_owned().await.map_err(|_| writer_gone())?;
        let (answer, done) = oneshot::channel();
        let (writer, _) = self.writer.as_ref().ok_or_else(writer_gone)?;
        writer.send(Request { op, answer, _slot: slot }).map_err(|_| writer_gone())?;
        done.await.map_err(|_| writer_gone())?
    }

    /// Everything, then changes until there are too many; false when nobody listens any more.
    async fn feed(&self, feed: &Feed, sink: &ChangeSink) -> bool {
        let disk = self.disk.clone();
        match tokio::task::spawn_blocking(move || disk.list("/")).await {
            Ok(Ok((entries, revision))) => {
                if sink.send(Change::All { entries, revision }).await.is_err() {
                    return false;
                }
            }
            failed => {
                let reason = match failed {
                    Ok(Err(e)) => e.to_string(),
                    _ => "the reader failed".to_owned(),
                };
                if sink.send(Change::Lost { reason }).await.is_err() {
                    return false;
                }
                tokio::time::sleep(REREAD_DELAY).await;
                return true;
            }
        }
        loop {
            tokio::select! {
                () = feed.ready.notified() => {}
                () = sink.closed() => return false,
            }
            let pending = feed.take();
            if pending.overflow {
                return true;
            }
            if pending.changes.is_empty() {
                continue;
            }
            let changes = pending.changes.into_iter().collect();
            if sink.send(Change::Some { changes, revision: pending.revision }).await.is_err() {
                return false;
            }
        }
    }
}

impl Store for Embedded {
    fn name(&self) -> &'static str {
        "embedded"
    }

    // A point read is a few pages from the cache of redb or of the kernel: quicker than a thread's wake-up.
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Entry>>> {
        Box::pin(async move { self.disk.get(key) })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<(Vec<Entry>, i64)>> {
        let (disk, prefix) = (self.disk.clone(), prefix.to_owned());
        Box::pin(async move {
            let read = tokio::task::spawn_blocking(move || disk.list(&prefix)).await;
            read.map_err(|e| Error::internal(Kind::Other).cause(e).context("list"))?
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
            match self.write(Op::Put { key: key.into(), value: value.into(), on, ttl_secs }).await? {
                Done::Put(written) => Ok(written),
                _ => Err(writer_gone()),
            }
        })
    }

    fn delete<'a>(&'a self, key: &'a str, on: Condition) -> BoxFuture<'a, Result<Option<(Entry, i64)>>> {
        Box::pin(async move {
            match self.write(Op::Delete { key: key.into(), on }).await? {
                Done::Deleted(deleted) => Ok(deleted),
                _ => Err(writer_gone()),
            }
        })
    }

    fn commit<'a>(&'a self, batch: Batch) -> BoxFuture<'a, Result<Committed>> {
        Box::pin(async move {
            match self.write(Op::Batch(batch)).await? {
                Done::Batch(committed) => Ok(committed),
                _ => Err(writer_gone()),
            }
        })
    }

    fn revisions<'a>(&'a self, query: Query) -> BoxFuture<'a, Result<Option<Page>>> {
        let disk = self.disk.clone();
        Box::pin(async move {
            let read = tokio::task::spawn_blocking(move || disk.revisions(&query)).await;
            let page = read.map_err(|e| Error::internal(Kind::Other).cause(e).context("revisions"))?;
            page.map(Some)
        })
    }

    fn keep_alive<'a>(&'a self, lease: &'a str) -> BoxFuture<'a, Result<Option<u64>>> {
        Box::pin(async move {
            let Some(lease) = Lease::read(lease) else { return Ok(None) };
            let ttl_secs = lease.ttl_secs;
            let renewed = matches!(self.write(Op::Renew(lease)).await?, Done::Renewed(true));
            Ok(renewed.then_some(ttl_secs))
        })
    }

    fn watch(self: Arc<Self>, changes: ChangeSink) -> BoxFuture<'static, ()> {
        Box::pin(async move {
            // Registered before everything is read, so that no commit falls between; one that falls into both is
            // the same version twice.
            let feed = self.feeds.register();
            while self.feed(&feed, &changes).await {}
        })
    }
}

fn writer_gone() -> Error {
    Error::internal(Kind::Unavailable).context("the store's writer has stopped")
}

struct Writer {
    disk: Arc<Disk>,
    inbox: Receiver<Request>,
    feeds: Arc<Feeds>,
    bounds: Bounds,
}

impl Writer {
    /// Until the store is dropped.
    fn run(&mut self) {
        let mut next_expiry = self.next_expiry();
        while let Some(group) = self.next_group(next_expiry) {
            self.commit(group);
            next_expiry = self.next_expiry();
        }
    }

    fn next_expiry(&self) -> Option<u64> {
        self.disk.next_expiry().unwrap_or_else(|e| {
            tracing::error!("{e}");
            None
        })
    }

    /// What is queued, once something is; an empty group when an entry expires first.
    fn next_group(&self, next_expiry: Option<u64>) -> Option<Vec<Request>> {
        let first = match next_expiry {
            None => self.inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(at) => self.inbox.recv_timeout(Duration::from_millis(at.saturating_sub(now_ms()))),
        };
        let mut group = match first {
            Ok(request) => vec![request],
            Err(RecvTimeoutError::Timeout) => Vec::new(),
            Err(RecvTimeoutError::Disconnected) => return None,
        };
        group.extend(self.inbox.try_iter().take(MAX_GROUP - group.len()));
        Some(group)
    }

    fn commit(&self, group: Vec<Request>) {
        let mut changes = Vec::new();
        let committed = self.disk.write(|draft| {
            let before = draft.revision()?;
            let mut tx = Tx { draft, revision: before, changes: &mut changes, bounds: self.bounds };
            tx.expire(now_ms())?;
            let answers = group.iter().map(|r| tx.run(&r.op)).collect::<Result<Vec<_>, _>>()?;
            let revision = tx.revision;
            if revision != before {
                draft.set_revision(revision)?;
            }
            Ok((answers, revision))
        });
        match committed {
            Ok((answers, revision)) => {
                self.feeds.push(&changes, revision);
                for (request, answer) in group.into_iter().zip(answers) {
                    let _ = request.answer.send(answer);
                }
            }
            Err(e) => {
                tracing::error!("{} writes lost: {e}", group.len());
                let reason = e.to_string();
                for request in group {
                    let refused = Error::config(Kind::Io).context(reason.clone());
                    let _ = request.answer.send(Err(refused));
                }
            }
        }
    }
}

/// One group's transaction: each write gets its own revision and sees the ones before it.
struct Tx<'a, 't> {
    draft: &'a mut super::disk::Draft<'t>,
    revision: i64,
    changes: &'a mut Vec<(Arc<str>, Option<Entry>)>,
    bounds: Bounds,
}

impl Tx<'_, '_> {
    /// The outer error is the disk's and ends the group; the inner one is the write's own.
    fn run(&mut self, op: &Op) -> Result<Result<Done>, redb::Error> {
        match op {
            Op::Put { key, value, on, ttl_secs } => self.put(key, value, *on, *ttl_secs),
            Op::Delete { key, on } => self.delete(key, *on),
            Op::Batch(batch) => self.batch(batch),
            Op::Renew(lease) => self.renew(lease),
        }
    }

    fn put(
        &mut self,
        key: &Arc<str>,
        value: &Arc<str>,
        on: Condition,
        ttl_secs: Option<u64>,
    ) -> Result<Result<Done>, redb::Error> {
        let previous = self.draft.get(key)?;
        if let Err(conflict) = check(key, on, previous.as_ref()) {
            return Ok(Err(conflict));
        }
        self.revision += 1;
        let revision = self.revision;
        let entry = Entry {
            key: key.clone(),
            value: value.clone(),
            create_revision: previous.as_ref().map_or(revision, |p| p.create_revision),
            mod_revision: revision,
        };
        self.draft.put(&entry, expires_ms(ttl_secs))?;
        self.changes.push((key.clone(), Some(entry.clone())));
        let lease = ttl_secs.map(|ttl_secs| Lease { ttl_secs, revision, key: key.clone() }.to_string());
        Ok(Ok(Done::Put(Written { entry, previous, revision, lease })))
    }

    /// Nothing that a watcher would see changes.
    fn renew(&mut self, lease: &Lease) -> Result<Result<Done>, redb::Error> {
        let entry = self.draft.get(&lease.key)?.filter(|e| e.mod_revision == lease.revision);
        if let Some(entry) = &entry {
            self.draft.put(entry, expiry(lease.ttl_secs))?;
        }
        Ok(Ok(Done::Renewed(entry.is_some())))
    }

    fn delete(&mut self, key: &Arc<str>, on: Condition) -> Result<Result<Done>, redb::Error> {
        let previous = self.draft.get(key)?;
        if let Err(conflict) = check(key, on, previous.as_ref()) {
            return Ok(Err(conflict));
        }
        let Some(previous) = previous else { return Ok(Ok(Done::Deleted(None))) };
        self.revision += 1;
        self.draft.remove(key)?;
        self.changes.push((key.clone(), None));
        Ok(Ok(Done::Deleted(Some((previous, self.revision)))))
    }

    fn batch(&mut self, batch: &Batch) -> Result<Result<Done>, redb::Error> {
        let mut done = Vec::with_capacity(batch.writes.len());
        // All conditions first: nothing is written when one does not hold.
        for write in &batch.writes {
            let previous = self.draft.get(&write.key)?;
            if let Err(conflict) = check(&write.key, write.on, previous.as_ref()) {
                return Ok(Err(conflict));
            }
            done.push((previous, None));
        }
        let mut changes = Vec::new();
        for (write, (previous, now)) in batch.writes.iter().zip(&mut done) {
            if write.value.is_none() && previous.is_none() {
                continue;
            }
            if changes.is_empty() {
                self.revision += 1;
            }
            *now = self.apply(write, previous.as_ref())?;
            changes.push(Changed::of(write, previous.as_ref()));
        }
        if !changes.is_empty() && self.bounds.keeps_any() {
            let tag = revisions::tag(&changes);
            match Revision::of(&batch.note, changes).encode(self.bounds.room()) {
                Ok(packed) => self.draft.keep(self.revision, tag, &packed, self.bounds)?,
                // The write itself is sound.
                Err(e) => tracing::error!("the revision {} is not kept: {e}", self.revision),
            }
        }
        let last = batch.writes.last().filter(|write| write.value.is_some());
        let lease = last.and_then(|write| {
            let (ttl_secs, key) = (write.ttl_secs?, write.key.clone());
            Some(Lease { ttl_secs, revision: self.revision, key }.to_string())
        });
        Ok(Ok(Done::Batch(Committed { done, revision: self.revision, lease })))
    }

    /// One write of a batch, under the revision of all.
    fn apply(&mut self, write: &Write, previous: Option<&Entry>) -> Result<Option<Entry>, redb::Error> {
        let revision = self.revision;
        let now = write.value.as_ref().map(|value| Entry {
            key: write.key.clone(),
            value: value.clone(),
            create_revision: previous.map_or(revision, |p| p.create_revision),
            mod_revision: revision,
        });
        match &now {
            Some(entry) => self.draft.put(entry, expires_ms(write.ttl_secs))?,
            None => self.draft.remove(&write.key)?,
        }
        self.changes.push((write.key.clone(), now.clone()));
        Ok(now)
    }

    fn expire(&mut self, now_ms: u64) -> Result<(), redb::Error> {
        while let Some(key) = self.draft.expired(now_ms)? {
            self.revision += 1;
            self.draft.remove(&key)?;
            self.changes.push((key, None));
        }
        Ok(())
    }
}

fn check(key: &str, on: Condition, previous: Option<&Entry>) -> Result<()> {
    let found = previous.map_or(0, |p| p.mod_revision);
    match on {
        Condition::Unmodified(expected) if expected != found => {
            Err(Error::client(Kind::Conflict).context(format!("{key} has been modified (revision {found})")))
        }
        _ => Ok(()),
    }
}

/// 0: never.
fn expires_ms(ttl_secs: Option<u64>) -> u64 {
    ttl_secs.map_or(0, expiry)
}

/// When what lives so long from now ends, in ms since the epoch.
fn expiry(ttl_secs: u64) -> u64 {
    now_ms().saturating_add(ttl_secs.saturating_mul(1000))
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

/// The watchers.
#[derive(Default)]
struct Feeds(Mutex<Vec<Arc<Feed>>>);

impl Feeds {
    fn register(&self) -> Arc<Feed> {
        let feed = Arc::<Feed>::default();
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(feed.clone());
        feed
    }

    fn push(&self, changes: &[(Arc<str>, Option<Entry>)], revision: i64) {
        if changes.is_empty() {
            return;
        }
        let mut feeds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Ours is the only reference to a feed whose watcher has ended.
        feeds.retain(|feed| Arc::strong_count(feed) > 1);
        for feed in feeds.iter() {
            feed.push(changes, revision);
        }
    }
}

/// What one watcher has not been told yet: the newest version of each key that changed.
#[derive(Default)]
struct Feed {
    pending: Mutex<Pending>,
    ready: Notify,
}

#[derive(Default)]
struct Pending {
    changes: HashMap<Arc<str>, Option<Entry>>,
    revision: i64,
    overflow: bool,
}

impl Feed {
    fn push(&self, changes: &[(Arc<str>, Option<Entry>)], revision: i64) {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        pending.revision = revision;
        if !pending.overflow {
            pending.changes.extend(changes.iter().cloned());
            if pending.changes.len() > MAX_PENDING {
                pending.overflow = true;
                pending.changes = HashMap::new();
            }
        }
        drop(pending);
        self.ready.notify_one();
    }

    fn take(&self) -> Pending {
        mem::take(&mut *self.pending.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        task::{Context, Waker},
    };

    use tokio::sync::mpsc;

    use super::*;

    fn store() -> (tempfile::TempDir, Arc<Embedded>) {
        let dir = tempfile::tempdir().unwrap();
        let store = Embedded::open(&dir.path().join("data/moongate.redb")).unwrap();
        (dir, store)
    }

    #[tokio::test]
    async fn revisions_count_writes_and_conditions_hold() {
        let (_dir, s) = store();
        let a = s.put("/routes/1", "a".into(), Condition::Unmodified(0), None).await.unwrap();
        assert_eq!((a.entry.create_revision, a.entry.mod_revision, a.revision), (1, 1, 1));
        assert!(a.previous.is_none());
        let conflict = s.put("/routes/1", "b".into(), Condition::Unmodified(0), None).await.unwrap_err();
        assert_eq!(conflict.kind(), Kind::Conflict);
        let b = s.put("/routes/1", "b".into(), Condition::Unmodified(1), None).await.unwrap();
        assert_eq!((b.entry.create_revision, b.entry.mod_revision), (1, 2));
        assert_eq!(&*b.previous.unwrap().value, "a");
        s.put("/services/1", "s".into(), Condition::Always, None).await.unwrap();
        let (routes, revision) = s.list("/routes/").await.unwrap();
        assert_eq!((routes.len(), revision), (1, 3));
        assert_eq!(s.delete("/routes/1", Condition::Unmodified(1)).await.unwrap_err().kind(), Kind::Conflict);
        let (gone, revision) = s.delete("/routes/1", Condition::Always).await.unwrap().unwrap();
        assert_eq!((gone.mod_revision, revision), (2, 4));
        assert!(s.delete("/routes/1", Condition::Always).await.unwrap().is_none());
        assert!(s.get("/routes/1").await.unwrap().is_none());
    }

    #[tokio::test]
    async fn what_was_written_is_there_after_reopening_and_a_second_opener_is_told_why_not() {
        let (dir, s) = store();
        let path = dir.path().join("data/moongate.redb");
        s.put("/routes/1", "a".into(), Condition::Always, None).await.unwrap();
        let refused = Embedded::open(&path).err().unwrap();
        assert!(refused.to_string().contains("in use by another process"), "{refused}");
        drop(s);
        let s = Embedded::open(&path).unwrap();
        assert_eq!(&*s.get("/routes/1").await.unwrap().unwrap().value, "a");
        let next = s.put("/routes/2", "b".into(), Condition::Always, None).await.unwrap();
        assert_eq!(next.revision, 2);
    }

    #[test]
    fn a_damaged_file_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("moongate.redb");
        for junk in [b"not a database".to_vec(), vec![0; 8192], vec![0xff; 100_000]] {
            fs::write(&path, &junk).unwrap();
            let refused = Embedded::open(&path).err().unwrap();
            assert!(refused.to_string().contains("move it away"), "{refused}");
        }
    }

    #[tokio::test]
    async fn a_watcher_sees_everything_then_each_change_and_a_slow_one_only_the_newest() {
        let (_dir, s) = store();
        s.put("/routes/1", "a".into(), Condition::Always, None).await.unwrap();
        let (tx, mut rx) = mpsc::channel(1);
        let watch = tokio::spawn(s.clone().watch(tx));
        let Some(Change::All { entries, revision }) = rx.recv().await else { panic!("no All") };
        assert_eq!((entries.len(), revision), (1, 1));
        for i in 0..500 {
            s.put("/routes/1", i.to_string(), Condition::Always, None).await.unwrap();
        }
        s.delete("/routes/1", Condition::Always).await.unwrap();
        let (mut last, mut seen, mut messages) = (Some(String::new()), 0, 0);
        while seen < 502 {
            let Some(Change::Some { changes, revision }) = rx.recv().await else { panic!("no Some") };
            assert!(revision > seen);
            seen = revision;
            messages += 1;
            last = changes.last().and_then(|(_, e)| e.as_ref().map(|e| e.value.to_string()));
        }
        assert_eq!(last, None);
        assert!(messages < 500, "coalesced");
        drop(rx);
        watch.await.unwrap();
    }

    #[tokio::test]
    async fn an_entry_with_a_ttl_disappears_and_one_put_again_without_does_not() {
        let (_dir, s) = store();
        let (tx, mut rx) = mpsc::channel(8);
        tokio::spawn(s.clone().watch(tx));
        s.put("/routes/stays", "a".into(), Condition::Always, Some(1)).await.unwrap();
        s.put("/routes/goes", "a".into(), Condition::Always, Some(1)).await.unwrap();
        s.put("/routes/stays", "b".into(), Condition::Always, None).await.unwrap();
        loop {
            match rx.recv().await.unwrap() {
                Change::Some { changes, .. } if changes.iter().any(|(k, e)| &**k == "/routes/goes" && e.is_none()) => {
                    break;
                }
                _ => {}
            }
        }
        assert!(s.get("/routes/goes").await.unwrap().is_none());
        assert!(s.get("/routes/stays").await.unwrap().is_some());
    }

    #[tokio::test]
    async fn concurrent_writes_each_get_their_own_revision() {
        let (_dir, s) = store();
        let writes = (0..300).map(|i| {
            let s = s.clone();
            tokio::spawn(async move {
                s.put(&format!("/routes/{i}"), "x".into(), Condition::Always, None).await.unwrap().revision
            })
        });
        let mut revisions = Vec::new();
        for w in writes.collect::<Vec<_>>() {
            revisions.push(w.await.unwrap());
        }
        revisions.sort_unstable();
        assert_eq!(revisions, (1..=300).collect::<Vec<_>>());
    }

    fn batch(writes: &[(&str, Option<&str>, Condition)]) -> Batch {
        let write = |(key, value, on): &(&str, Option<&str>, Condition)| Write {
            key: (*key).into(),
            value: value.map(Into::into),
            on: *on,
            ttl_secs: None,
            seen: None,
        };
        let note = revisions::Note { who: "jane".into(), refers_to: None };
        Batch { writes: writes.iter().map(write).collect(), note }
    }

    async fn kept(s: &Embedded, query: Query) -> Page {
        s.revisions(query).await.unwrap().expect("keeps revisions")
    }

    #[tokio::test]
    async fn a_batch_happens_as_a_whole_under_one_revision_or_not_at_all() {
        let (dir, s) = store();
        let all = Query { take: 10, ..Query::default() };
        s.put("/routes/9", "plain".into(), Condition::Always, None).await.unwrap();
        assert_eq!(kept(&s, all.clone()).await.total, 0, "a write without an author is none");
        let always = Condition::Always;
        let done = s.commit(batch(&[("/routes/1", Some("a"), always), ("/routes/9", None, always)])).await.unwrap();
        assert_eq!(done.revision, 2);
        assert_eq!(done.done[0].1.as_ref().unwrap().mod_revision, 2);
        assert!(done.done[1].0.is_some() && done.done[1].1.is_none());
        let half = batch(&[("/routes/2", Some("b"), always), ("/routes/1", Some("b"), Condition::Unmodified(1))]);
        assert_eq!(s.commit(half).await.unwrap_err().kind(), Kind::Conflict);
        assert!(s.get("/routes/2").await.unwrap().is_none(), "nothing of it");
        assert_eq!(s.commit(batch(&[("/routes/7", None, always)])).await.unwrap().revision, 2, "nothing to delete");
        s.commit(batch(&[("/routes/1", Some("c"), always)])).await.unwrap();
        drop(s);
        let s = Embedded::open(&dir.path().join("data/moongate.redb")).unwrap();
        let page = kept(&s, all.clone()).await;
        assert_eq!(page.list.iter().map(|r| r.number).collect::<Vec<_>>(), [3, 2]);
        let change = &page.list[0].changes[0];
        assert_eq!((change.before.as_deref(), change.after.as_deref()), (Some("a"), Some("c")));
        let about = kept(&s, Query { key: Some("/routes/9".into()), ..all.clone() }).await;
        assert_eq!((about.total, about.list[0].number), (1, 2), "one of several in a revision");
        assert_eq!(kept(&s, Query { number: Some(3), ..all.clone() }).await.list, page.list[..1]);
        assert_eq!(kept(&s, Query { skip: 1, take: 1, ..all }).await.list, page.list[1..]);
    }

    #[tokio::test]
    async fn the_oldest_revisions_go_when_they_are_too_many_or_too_much() {
        let dir = tempfile::tempdir().unwrap();
        let bounds = Bounds { count: 3, bytes: 1 << 20 };
        let s = Embedded::open_with(&dir.path().join("moongate.redb"), bounds).unwrap();
        let numbers = async || {
            let page = kept(&s, Query { take: 10, ..Query::default() }).await;
            page.list.iter().map(|r| r.number).collect::<Vec<_>>()
        };
        let write =
            async |text: &str| s.commit(batch(&[("/functions/f", Some(text), Condition::Always)])).await.unwrap();
        for n in 0..3 {
            write(&n.to_string()).await;
        }
        assert_eq!(numbers().await, [3, 2, 1], "as many as may be");
        write("3").await;
        assert_eq!(numbers().await, [4, 3, 2]);
        // What does not compress: two of them are more than a megabyte.
        let noise = |seed: u64| {
            let mut x = seed;
            let mut next = || {
                x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                char::from(b' ' + 1 + ((x >> 33) % 90) as u8)
            };
            (0..700_000).map(|_| next()).filter(|c| *c != '"' && *c != '\\').collect::<String>()
        };
        write(&noise(1)).await;
        assert_eq!(numbers().await, [5, 4, 3]);
        write(&noise(2)).await;
        assert_eq!(numbers().await, [6, 5, 4]);
        let newest = kept(&s, Query { take: 1, ..Query::default() }).await.list.remove(0);
        assert!(newest.omitted, "before and after together are too much by themselves");
        write("small").await;
        assert_eq!(numbers().await, [7, 6], "two with large texts are too much");
        let none = Embedded::open_with(&dir.path().join("b.redb"), Bounds { count: 0, ..bounds }).unwrap();
        none.commit(batch(&[("/routes/1", Some("a"), Condition::Always)])).await.unwrap();
        assert_eq!(kept(&none, Query { take: 1, ..Query::default() }).await.total, 0);
    }

    fn request(slots: &Arc<Semaphore>, key: &str) -> Request {
        let _slot = slots.clone().try_acquire_owned().unwrap();
        let op = Op::Put { key: key.into(), value: "x".into(), on: Condition::Always, ttl_secs: None };
        Request { op, answer: oneshot::channel().0, _slot }
    }

    #[test]
    fn one_commit_takes_only_so_many_writes() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Arc::new(Disk::open(&dir.path().join("moongate.redb")).unwrap());
        let (sender, inbox) = channel();
        let writer = Writer { disk, inbox, feeds: Arc::default(), bounds: Bounds::default() };
        let slots = Arc::new(Semaphore::new(MAX_QUEUED));
        (0..=MAX_GROUP).for_each(|i| sender.send(request(&slots, &i.to_string())).unwrap());
        let lengths = [(); 2].map(|()| writer.next_group(None).unwrap().len());
        assert_eq!(lengths, [MAX_GROUP, 1]);
        assert_eq!(writer.next_group(Some(0)).unwrap().len(), 0, "what has expired does not wait for a write");
        drop(sender);
        assert!(writer.next_group(None).is_none());
    }

    #[tokio::test]
    async fn writes_past_the_bound_wait_for_a_place() {
        let (_dir, s) = store();
        let places = s.slots.clone().acquire_many_owned(MAX_QUEUED as u32).await.unwrap();
        let mut write = s.put("/routes/1", "a".into(), Condition::Always, None);
        assert!(write.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        // It has not reached the writer: what is written directly is written first.
        let (writer, _) = s.writer.as_ref().unwrap();
        let first = request(&Arc::new(Semaphore::new(1)), "/routes/0");
        writer.send(first).unwrap();
        drop(places);
        assert_eq!(write.await.unwrap().revision, 2);
        drop(s.slots.acquire_many(MAX_QUEUED as u32).await.unwrap());
    }

    #[tokio::test]
    async fn a_watcher_that_is_too_slow_is_told_everything_anew() {
        let (_dir, s) = store();
        let (tx, mut rx) = mpsc::channel(1);
        let watch = tokio::spawn(s.clone().watch(tx));
        let Some(Change::All { revision: 0, .. }) = rx.recv().await else { panic!("no All") };
        let written = s.put("/routes/1", "a".into(), Condition::Always, None).await.unwrap();
        let Some(Change::Some { revision: 1, .. }) = rx.recv().await else { panic!("no Some") };
        let feed = s.feeds.0.lock().unwrap()[0].clone();
        let changes = |n: usize| (0..n).map(|i| (Arc::from(i.to_string()), None)).collect::<Vec<_>>();
        feed.push(&changes(MAX_PENDING), 2);
        assert_eq!(feed.take().changes.len(), MAX_PENDING);
        feed.push(&changes(MAX_PENDING), 2);
        feed.push(&[("one more".into(), None)], 3);
        {
            let pending = feed.pending.lock().unwrap();
            assert!(pending.overflow && pending.changes.capacity() == 0, "nothing is held any more");
        }
        let Some(Change::All { entries, revision }) = rx.recv().await else { panic!("no All") };
        assert_eq!((entries, revision), (vec![written.entry], 1));
        drop(rx);
        watch.await.unwrap();
    }

    #[tokio::test]
    #[ignore = "measurement: cargo test --release --lib store::embedded -- --ignored --nocapture"]
    async fn writes_and_reads_100_000_routes() {
        let (dir, s) = store();
        let text = "x".repeat(120);
        let start = std::time::Instant::now();
        for chunk in 0..100 {
            let writes = (0..1000).map(|i| {
                let (s, text) = (s.clone(), text.clone());
                tokio::spawn(async move {
                    s.put(&format!("/routes/{}", chunk * 1000 + i), text, Condition::Always, None).await.unwrap();
                })
            });
            for w in writes.collect::<Vec<_>>() {
                w.await.unwrap();
            }
        }
        println!("100,000 writes, 1000 at once: {:?}", start.elapsed());
        let start = std::time::Instant::now();
        for _ in 0..100 {
            s.put("/routes/1", text.clone(), Condition::Always, None).await.unwrap();
        }
        println!("one write alone: {:?}", start.elapsed() / 100);
        // What a process that is killed now would leave.
        let crashed = dir.path().join("crashed.redb");
        fs::copy(dir.path().join("data/moongate.redb"), &crashed).unwrap();
        drop(s);
        for path in [dir.path().join("data/moongate.redb"), crashed] {
            let start = std::time::Instant::now();
            let s = Embedded::open(&path).unwrap();
            let opened = start.elapsed();
            assert_eq!(s.list("/").await.unwrap().0.len(), 100_000);
            println!("{}: opened in {opened:?}, read in {:?}", path.display(), start.elapsed() - opened);
        }
    }
}
