//! One request's view of the store: what it writes is a revision of the key that came with it, happens only under the condition that
//! its headers name, and not at all when it is a dry run.
//!
//! The handlers know nothing of it: they get a `Store`.

use std::{
    collections::HashMap,
    rc::Rc,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use ::http::Method;
use serde_json::{Value, json};

use super::{
    ROOT, State, configs,
    functions::{self, FUNCTION_REVISIONS},
    given_key,
    http::{self, Answer, Call},
    resource::Target,
    revisions,
};
use crate::{
    error::{Error, Kind as ErrorKind, Result},
    model::Kind,
    store::{
        Batch, BoxFuture, ChangeSink, Committed, Condition, Entry, Standalone, Store, Written,
        revisions::{Changed, MAX_CHANGES, Note, Page, Query, Write},
    },
};

/// Texts that go with their owner in one revision. With the owner's own, Lua compresses to what etcd takes in one request.
const MAX_OWNED_BYTES: usize = 1 << 20;

/// The revision of a write that has not happened: served by everybody.
const PRETENDED: i64 = 0;

/// Tries of a write under a condition of the headers that others' writes get in the way of.
const MAX_TRIES: usize = 5;

/// A request that may write.
pub(super) struct Session {
    state: State,
    view: Arc<View>,
    /// The object that the path names.
    named: Option<String>,
    /// The object that a GET reads.
    read: Option<String>,
    /// What a GET knows already.
    known: Option<Precondition>,
}

impl Session {
    /// Refuses headers that cannot be understood.
    pub fn begin(state: &State, call: &Call) -> std::result::Result<Session, Answer> {
        let is_read = matches!(call.method, Method::GET | Method::HEAD);
        let dry_run = !is_read && call.switch("dry_run")?;
        if dry_run && !writes_objects(&call.path) {
            return Err(Answer::refuse(400, "dry_run is for objects: this would be done"));
        }
        let read = is_read.then(|| key_of_path(&call.path)).flatten();
        let (precondition, known) = match is_read {
            true => (None, call.header("if-none-match").map(Precondition::known)),
            // Its digest is what the conditions of a document are about.
            false if configs::is_document(&call.path) => (None, None),
            false => (Precondition::of(call)?.filter(|p| *p != Precondition::Absent || !creates(call)), None),
        };
        if precondition.is_some() && !writes_objects(&call.path) {
            return Err(Answer::refuse(400, "If-Match and If-None-Match are for objects: this would be done"));
        }
        let named = target_of_path(&call.path).and_then(|target| Some(target.kind.key(&target.id?)));
        let view = Arc::new(View {
            inner: state.store.clone(),
            who: who(state, call).into(),
            precondition,
            dry_run,
            seen: Mutex::default(),
        });
        let contest = if dry_run { Rc::new(state.contest.pretended()) } else { state.contest.clone() };
        Ok(Session { state: State { store: view.clone(), contest, ..state.clone() }, view, named, read, known })
    }

    /// What the handlers work with.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The handlers' answer as the client gets it.
    pub fn finish(self, answer: Answer) -> Answer {
        let seen = self.view.seen();
        if let (Some(now), false) = (seen.failed, answer.status.is_success()) {
            return moved(now);
        }
        if !answer.status.is_success() {
            return if answer.status == 404 && self.lacks_object(&seen) { moved(0) } else { answer };
        }
        if self.view.dry_run {
            return pretended(&self.state, answer, &seen);
        }
        let entry = match &self.read {
            Some(key) => seen.entries.get(key.as_str()).and_then(Option::as_ref),
            None => seen.written.as_ref(),
        };
        match entry {
            Some(entry) if self.known.as_ref().is_some_and(|known| known.holds(entry.mod_revision)) => {
                Answer::text(304, "").header("etag", &etag(entry))
            }
            Some(entry) => answer.header("etag", &etag(entry)),
            None => answer,
        }
    }

    /// Whether the object is not there, where the headers say that it must be.
    fn lacks_object(&self, seen: &Seen) -> bool {
        let is_wanted = matches!(self.view.precondition, Some(Precondition::Is(_) | Precondition::Exists));
        let found = self.named.as_ref().and_then(|key| seen.entries.get(key.as_str()));
        is_wanted && found.is_some_and(Option::is_none)
    }
}

fn etag(entry: &Entry) -> String {
    format!("\"{}\"", entry.mod_revision)
}

/// The name of the key that came with the request, else its role.
pub(super) fn who(state: &State, call: &Call) -> String {
    let given = given_key(&call.query, &call.headers);
    given.and_then(|key| state.settings.name_of(&key)).unwrap_or_else(|| "anonymous".to_owned())
}

/// Whether what a request to this path writes are objects, and nothing else happens.
fn writes_objects(path: &str) -> bool {
    let first = path.strip_prefix(ROOT).and_then(|rest| rest.split('/').find(|s| !s.is_empty()));
    first.is_some_and(|first| first == "revisions" || Kind::ALL.into_iter().any(|kind| kind.plural() == first))
}

fn target_of_path(path: &str) -> Option<Target> {
    let decoded: Vec<String> =
        path.strip_prefix(ROOT)?.split('/').filter(|s| !s.is_empty()).map(http::decode_path).collect();
    Target::of(&decoded.iter().map(String::as_str).collect::<Vec<_>>())
}

/// A POST of an object that gets its id here: that it is not there is no condition, but how the id is found.
fn creates(call: &Call) -> bool {
    call.method == Method::POST && target_of_path(&call.path).is_some_and(|target| target.id.is_none())
}

/// The key of the one object that a path names.
fn key_of_path(path: &str) -> Option<String> {
    let target = target_of_path(path)?;
    let id = target.id.filter(|_| target.sub_path.is_none())?;
    Some(target.kind.key(&id))
}

fn moved(now: i64) -> Answer {
    let text = match now {
        0 => "the object does not exist".to_owned(),
        now => format!("the object's modifiedIndex is {now}"),
    };
    let answer = Answer::json(412, &json!({ "error_msg": text, "modifiedIndex": now }));
    if now == 0 { answer } else { answer.header("etag", &format!("\"{now}\"")) }
}

/// What would have been answered, and what would be different.
fn pretended(state: &State, answer: Answer, seen: &Seen) -> Answer {
    let Ok(Value::Object(mut body)) = serde_json::from_slice(&answer.body) else { return answer };
    body.insert("dry_run".into(), true.into());
    body.insert("diff".into(), revisions::differences(state, &seen.changes));
    if body.get("revision").and_then(Value::as_i64) == Some(PRETENDED) {
        body.insert("revision".into(), seen.next.into());
    }
    Answer::json(answer.status.as_u16(), &Value::Object(body))
}

/// `If-Match`, `If-None-Match`.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Precondition {
    /// One of these `modifiedIndex`es.
    Is(Vec<i64>),
    Exists,
    Absent,
}

impl Precondition {
    /// What the client of a GET has, or may have: of several tags one that is none of ours is no mistake.
    fn known(tags: &str) -> Precondition {
        match tags.trim() {
            "*" => Precondition::Exists,
            tags => Precondition::Is(
                tags.split(',').filter_map(|tag| tag_in(tag.trim().trim_start_matches("W/"))).collect(),
            ),
        }
    }

    fn of(call: &Call) -> std::result::Result<Option<Precondition>, Answer> {
        let wrong = |name: &str, may: &str| Err(Answer::refuse(400, format!("invalid header {name}: use {may}")));
        match (call.header("if-match").map(str::trim), call.header("if-none-match").map(str::trim)) {
            (None, None) => Ok(None),
            (Some(_), Some(_)) => wrong("If-None-Match", "either If-Match or If-None-Match"),
            (None, Some("*")) => Ok(Some(Precondition::Absent)),
            (None, Some(_)) => wrong("If-None-Match", "* (create only)"),
            (Some("*"), None) => Ok(Some(Precondition::Exists)),
            (Some(list), None) => match list.split(',').map(tag_in).collect() {
                Some(tags) => Ok(Some(Precondition::Is(tags))),
                None => wrong("If-Match", "a modifiedIndex (\"12\"), several with commas between, or *"),
            },
        }
    }

    /// `now`: the object's `modifiedIndex`, 0 when there is none.
    fn holds(&self, now: i64) -> bool {
        match self {
            Precondition::Is(tags) => now != 0 && tags.contains(&now),
            Precondition::Exists => now != 0,
            Precondition::Absent => now == 0,
        }
    }
}

/// `"12"`, or 12.
fn tag_in(text: &str) -> Option<i64> {
    let text = text.trim();
    text.strip_prefix('"').and_then(|t| t.strip_suffix('"')).unwrap_or(text).parse().ok().filter(|n| *n > 0)
}

/// The store as one request has it.
struct View {
    inner: Arc<dyn Store>,
    who: Arc<str>,
    precondition: Option<Precondition>,
    dry_run: bool,
    seen: Mutex<Seen>,
}

/// What has happened in the request.
#[derive(Default)]
struct Seen {
    /// Objects as they were read last.
    entries: HashMap<Arc<str>, Option<Entry>>,
    /// The object that the request is about: the first that it wrote. What goes with it has no condition.
    primary: Option<Arc<str>>,
    /// That object, when it was written.
    written: Option<Entry>,
    /// The condition held and the object is written: what follows in the same request has none.
    satisfied: bool,
    /// What a dry run has not written.
    changes: Vec<Changed>,
    /// The revision that it would have been.
    next: i64,
    /// The `modifiedIndex` that did not satisfy the condition.
    failed: Option<i64>,
}

/// Objects are what revisions are kept of; what else stands in the store is nobody's to look at.
fn is_object(key: &str) -> bool {
    Kind::of_key(key).is_some()
}

fn index(entry: Option<&Entry>) -> i64 {
    entry.map_or(0, |e| e.mod_revision)
}

fn conflict(key: &str) -> Error {
    Error::client(ErrorKind::Conflict).context(format!("{key} has been modified"))
}

/// The headers' condition does not hold: no conflict that another try would help. `finish` tells the client.
fn unmet(key: &str) -> Error {
    Error::client(ErrorKind::Invalid).context(format!("{key} is not what the condition names"))
}

impl View {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn read(&self, key: &str) -> Result<Option<Entry>> {
        let found = self.inner.get(key).await?;
        self.seen().entries.insert(key.into(), found.clone());
        Ok(found)
    }

    /// The object as it was read last, or now.
    async fn known(&self, key: &str) -> Result<Option<Entry>> {
        let known = self.seen().entries.get(key).cloned();
        match known {
            Some(known) => Ok(known),
            None => self.read(key).await,
        }
    }

    async fn commit_batch(&self, mut batch: Batch) -> Result<Committed> {
        batch.note.who = self.who.clone();
        let Some(primary) = batch.writes.last().map(|write| write.key.clone()) else {
            return self.inner.commit(batch).await;
        };
        let primary = self.seen().primary.get_or_insert(primary).clone();
        for _ in 0..MAX_TRIES {
            let mut conditional = batch.clone();
            for write in &mut conditional.writes {
                self.require(write, write.key == primary).await?;
            }
            let done = match self.dry_run {
                true => self.pretend(&conditional).await,
                false => self.inner.commit(conditional).await,
            };
            match done {
                Ok(committed) => {
                    self.remember(&batch, &committed, &primary);
                    return Ok(committed);
                }
                Err(e) if e.kind() == ErrorKind::Conflict => {
                    let mut seen = self.seen();
                    batch.writes.iter().for_each(|write| drop(seen.entries.remove(&write.key)));
                    if self.precondition.is_none() {
                        // A POST goes on with another.
                        seen.primary = None;
                        return Err(e);
                    }
                }
                Err(e) => return Err(e),
            }
        }
        Err(conflict(&primary))
    }

    fn remember(&self, batch: &Batch, committed: &Committed, primary: &str) {
        let mut seen = self.seen();
        for (write, (_, now)) in batch.writes.iter().zip(&committed.done) {
            seen.entries.insert(write.key.clone(), now.clone());
            if *write.key == *primary {
                (seen.written, seen.satisfied) = (now.clone(), true);
            }
        }
    }

    /// Puts the headers' condition on the write, if it is the one that they are about, and says what was there.
    async fn require(&self, write: &mut Write, is_primary: bool) -> Result<()> {
        let Some(precondition) = self.precondition.as_ref().filter(|_| is_primary && !self.seen().satisfied) else {
            write.seen = write.seen.take().or_else(|| self.seen().entries.get(&write.key).cloned());
            return Ok(());
        };
        let found = self.known(&write.key).await?;
        let now = index(found.as_ref());
        if !precondition.holds(now) {
            self.seen().failed = Some(now);
            return Err(unmet(&write.key));
        }
        if matches!(write.on, Condition::Unmodified(n) if n != now) {
            return Err(conflict(&write.key));
        }
        (write.on, write.seen) = (Condition::Unmodified(now), Some(found));
        Ok(())
    }

    /// A function's sources are written before the function: not where the headers' condition on it does not hold.
    async fn require_owner(&self, key: &str) -> Result<()> {
        let id = key.strip_prefix(FUNCTION_REVISIONS).and_then(|rest| rest.split('/').next());
        match id {
            Some(id) => {
                let owner = Kind::Function.key(id);
                self.require(&mut deletion(&owner, Condition::Always), true).await
            }
            None => Ok(()),
        }
    }

    /// What a commit would do, but for its number.
    async fn pretend(&self, batch: &Batch) -> Result<Committed> {
        if batch.note.refers_to.is_none() && self.inner.clone().standalone().is_some() {
            return Err(Standalone::refused());
        }
        let mut done = Vec::with_capacity(batch.writes.len());
        for write in &batch.writes {
            let found = self.read(&write.key).await?;
            if matches!(write.on, Condition::Unmodified(n) if n != index(found.as_ref())) {
                return Err(conflict(&write.key));
            }
            let create_revision = found.as_ref().map_or(0, |e| e.create_revision);
            let now = write.value.clone().map(|value| Entry {
                key: write.key.clone(),
                value,
                create_revision,
                mod_revision: index(found.as_ref()),
            });
            done.push((found, now));
        }
        // No key starts like this: only the revision is wanted.
        let (_, revision) = self.inner.list("/-/").await?;
        let mut seen = self.seen();
        seen.next = revision.saturating_add(1);
        for (write, (before, after)) in batch.writes.iter().zip(&done) {
            let is_new = seen.changes.iter().all(|change| change.key != *write.key);
            if is_new && is_object(&write.key) && (before.is_some() || after.is_some()) {
                seen.changes.push(Changed::of(write, before.as_ref()));
            }
        }
        Ok(Committed { done, revision: PRETENDED, lease: None })
    }

    fn note(&self) -> Note {
        Note { who: self.who.clone(), refers_to: None }
    }

    /// What lives under an object and goes with it: a consumer's credentials, a service's cost decorations, a function's revisions.
    async fn owned_by(&self, key: &str) -> Result<Vec<Write>> {
        let place = match Kind::of_key(key) {
            Some((Kind::Function, id)) => functions::history(id),
            Some((kind, _)) if Kind::ALL.into_iter().any(|other| other.owner() == Some(kind)) => format!("{key}/"),
            _ => return Ok(Vec::new()),
        };
        let (entries, _) = self.inner.list(&place).await?;
        Ok(entries.into_iter().map(Write::deletion_of).collect())
    }

    async fn delete_with_owned(&self, key: &str, on: Condition) -> Result<Option<(Entry, i64)>> {
        let mut batches = batches_of(self.owned_by(key).await?);
        // The owner last, and with as many others as one revision takes.
        let mut writes = batches.pop().unwrap_or_default();
        writes.push(deletion(key, on));
        self.seen().primary.get_or_insert_with(|| key.into());
        let mut known = self.known(key).await?;
        if known.is_none() {
            return Ok(None);
        }
        // Nothing of what the owner has goes where the owner itself would stay.
        if matches!(on, Condition::Unmodified(n) if n != index(known.as_ref())) {
            return Err(conflict(key));
        }
        self.require(&mut deletion(key, on), true).await?;
        for writes in batches {
            self.commit_batch(Batch { writes, note: self.note() }).await?;
        }
        let committed = self.commit_batch(Batch { writes, note: self.note() }).await?;
        known = committed.done.into_iter().next_back().and_then(|(previous, _)| previous);
        Ok(known.map(|previous| (previous, committed.revision)))
    }
}

/// Puts deletions together as revisions, in their order: the last has room for their owner, in number and in bytes.
fn batches_of(owned: Vec<Write>) -> Vec<Vec<Write>> {
    let mut batches = vec![Vec::new()];
    let mut bytes = 0;
    for write in owned.into_iter().rev() {
        let length = write.seen.as_ref().and_then(Option::as_ref).map_or(0, |entry| entry.value.len());
        let is_full = |batch: &Vec<Write>| batch.len() >= MAX_CHANGES - 1 || bytes + length > MAX_OWNED_BYTES;
        if batches.last().is_some_and(|batch| !batch.is_empty() && is_full(batch)) {
            (bytes, _) = (0, batches.push(Vec::new()));
        }
        bytes += length;
        if let Some(batch) = batches.last_mut() {
            batch.push(write);
        }
    }
    batches.iter_mut().for_each(|batch| batch.reverse());
    batches.reverse();
    batches
}

fn deletion(key: &str, on: Condition) -> Write {
    Write { key: key.into(), value: None, on, ttl_secs: None, seen: None }
}

impl Store for View {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Entry>>> {
        Box::pin(self.read(key))
    }

    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<(Vec<Entry>, i64)>> {
        self.inner.list(prefix)
    }

    fn put<'a>(
        &'a self,
        key: &'a str,
        value: String,
        on: Condition,
        ttl_secs: Option<u64>,
    ) -> BoxFuture<'a, Result<Written>> {
        Box::pin(async move {
            if !is_object(key) && !self.dry_run {
                self.require_owner(key).await?;
                return self.inner.put(key, value, on, ttl_secs).await;
            }
            let write = Write { key: key.into(), value: Some(value.into()), on, ttl_secs, seen: None };
            let batch = Batch { writes: vec![write], note: self.note() };
            let committed = match is_object(key) {
                true => self.commit_batch(batch).await?,
                false => self.pretend(&batch).await?,
            };
            let revision = committed.revision;
            match committed.done.into_iter().next() {
                Some((previous, Some(entry))) => Ok(Written { entry, previous, revision, lease: None }),
                _ => Err(Error::internal(ErrorKind::Other).context("a write without a result")),
            }
        })
    }

    fn delete<'a>(&'a self, key: &'a str, on: Condition) -> BoxFuture<'a, Result<Option<(Entry, i64)>>> {
        Box::pin(async move {
            match (is_object(key), self.dry_run) {
                (true, _) => self.delete_with_owned(key, on).await,
                (false, true) => Ok(self.read(key).await?.map(|entry| (entry, 0))),
                (false, false) => {
                    self.require_owner(key).await?;
                    self.inner.delete(key, on).await
                }
            }
        })
    }

    fn commit<'a>(&'a self, batch: Batch) -> BoxFuture<'a, Result<Committed>> {
        Box::pin(self.commit_batch(batch))
    }

    fn revisions<'a>(&'a self, query: Query) -> BoxFuture<'a, Result<Option<Page>>> {
        self.inner.revisions(query)
    }

    fn version(&self) -> BoxFuture<'_, Result<String>> {
        self.inner.version()
    }

    fn standalone(self: Arc<Self>) -> Option<Arc<Standalone>> {
        self.inner.clone().standalone()
    }

    fn identity(&self) -> Option<String> {
        self.inner.identity()
    }

    fn watch(self: Arc<Self>, changes: ChangeSink) -> BoxFuture<'static, ()> {
        self.inner.clone().watch(changes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_are_about_the_modified_index() {
        for (text, tag) in [("\"12\"", Some(12)), (" 7 ", Some(7)), ("W/\"1\"", None), ("\"x\"", None), ("0", None)] {
            assert_eq!(tag_in(text), tag, "{text}");
        }
        for (tags, holds) in
            [("\"7\"", true), ("\"x\", W/\"7\"", true), ("7", true), ("\"6\"", false), ("*", true), ("", false)]
        {
            assert_eq!(Precondition::known(tags).holds(7), holds, "{tags}");
        }
        assert!(Precondition::Is(vec![3, 4]).holds(4) && !Precondition::Is(vec![3]).holds(0));
        assert!(Precondition::Exists.holds(1) && !Precondition::Exists.holds(0));
        assert!(Precondition::Absent.holds(0) && !Precondition::Absent.holds(1));
    }

    #[test]
    fn what_goes_with_its_owner_fits_one_revision_with_it() {
        let entry = |n: usize, bytes: usize| Entry {
            key: format!("/{n:03}").into(),
            value: "x".repeat(bytes).into(),
            create_revision: 1,
            mod_revision: 1,
        };
        let sizes = |owned: Vec<usize>| {
            let writes = owned.into_iter().enumerate().map(|(n, bytes)| Write::deletion_of(entry(n, bytes)));
            let batches = batches_of(writes.collect());
            assert!(batches.concat().is_sorted_by_key(|write| write.key.clone()), "the order stays");
            batches.iter().map(Vec::len).collect::<Vec<_>>()
        };
        assert_eq!(sizes(vec![]), [0]);
        assert_eq!(sizes(vec![1; MAX_CHANGES - 1]), [63]);
        assert_eq!(sizes(vec![1; MAX_CHANGES]), [1, 63]);
        assert_eq!(sizes(vec![MAX_OWNED_BYTES / 2; 4]), [2, 2]);
        assert_eq!(sizes(vec![MAX_OWNED_BYTES / 2 + 1; 3]), [1, 1, 1]);
        assert_eq!(sizes(vec![2 * MAX_OWNED_BYTES, 1]), [1, 1]);
    }

    #[test]
    fn a_path_names_one_object_or_none() {
        for (path, key) in [
            ("/apisix/admin/routes/1", Some("/routes/1")),
            ("/apisix/admin/routes/a%20b", Some("/routes/a b")),
            ("/apisix/admin/consumers/jack/credentials/c", Some("/consumers/jack/credentials/c")),
            ("/apisix/admin/routes", None),
            ("/apisix/admin/routes/1/uri", None),
            ("/apisix/admin/plugins/list", None),
        ] {
            assert_eq!(key_of_path(path).as_deref(), key, "{path}");
        }
    }
}
