//! The configuration as one document that the Admin API replaces whole (deployment-modes.md, "API-driven"): in memory only, empty
//! after a start.
//!
//! Each kind of resource has a version, `routes_conf_version`: what comes with the version that is served is left as it is, an older
//! one is refused, none counts one up. An item with the `modifiedIndex` that is served stays as it is, too. What a rollback has set back
//! keeps the version of the document that it was set back from, and gives way to the next document that has this one or a higher one:
//! the version is the tool's to count.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use serde_json::{Map, Value};
use tokio::sync::watch;

use super::{
    Batch, BoxFuture, Change, ChangeSink, Committed, Condition, Entry, Revision, Store, Written, file,
    revisions::{Bounds, Changed, Note, Packed, Page, Query},
};
use crate::{
    error::{Error, Kind as ErrorKind, Result},
    model::Kind,
};

/// Stands behind a kind's plural in the document.
const VERSION: &str = "_conf_version";
/// Which version of an item its sender says this is. Not the item's revision here: after a deletion it may come again
/// with something else, and caches hold what they made by key and revision.
pub const MODIFIED_INDEX: &str = "modifiedIndex";
/// Numbers that JSON holds exactly everywhere: versions and indexes are whole numbers up to this one.
const MAX_EXACT: i64 = 1 << 53;
/// Objects that the revision of a document names. One that changes more is kept without texts: nobody reads such a difference, and it
/// is in the tool that sent it.
const MAX_CHANGES: usize = 1000;

/// One per process.
pub struct Standalone {
    held: Mutex<Held>,
    history: Mutex<History>,
    bounds: Bounds,
    /// The number of updates.
    changed: watch::Sender<i64>,
}

/// The revisions that are kept, the oldest first: in memory, as the document is.
#[derive(Default)]
struct History {
    kept: VecDeque<(i64, Packed)>,
    bytes: u64,
}

/// A done update.
#[derive(Debug)]
pub struct Updated {
    /// The revision that serves it.
    pub revision: i64,
    /// What it has changed, for `keep`.
    pub changes: Vec<Changed>,
}

#[derive(Default)]
struct Held {
    sections: BTreeMap<&'static str, Section>,
    /// Counts the updates.
    revision: i64,
    digest: Option<String>,
    modified_secs: Option<u64>,
}

/// One kind of resource.
#[derive(Clone, Default)]
struct Section {
    version: i64,
    /// As sent.
    items: Option<Value>,
    entries: BTreeMap<Arc<str>, Indexed>,
    /// Since a rollback, until a document comes: it is not what the document of this version brought.
    is_set_back: bool,
}

impl Section {
    /// Whether a document which gives this version says that nothing has changed.
    fn is_at(&self, version: Option<i64>) -> bool {
        version == Some(self.version) && !self.is_set_back
    }
}

#[derive(Clone)]
struct Indexed {
    /// Its revision is the update that brought it, which is never another's.
    entry: Entry,
    /// As sent; the kind's version when there was none. `None` since a rollback: nobody has sent it so.
    index: Option<i64>,
}

/// What `GET /configs` tells.
#[derive(Debug)]
pub struct Current {
    /// The resources as sent, and the version of each kind.
    pub document: Value,
    /// Who sent it calls it so.
    pub digest: Option<String>,
    /// Seconds since 1970.
    pub modified_secs: Option<u64>,
}

/// The kinds that stand in a document.
pub fn kinds() -> impl Iterator<Item = Kind> {
    Kind::ALL.into_iter().filter(|kind| kind.owner().is_none())
}

impl Standalone {
    pub fn new() -> Arc<Self> {
        Self::with(Bounds::default())
    }

    /// With other bounds on the revisions that it keeps.
    pub fn with(bounds: Bounds) -> Arc<Self> {
        Arc::new(Standalone {
            held: Mutex::default(),
            history: Mutex::default(),
            bounds,
            changed: watch::Sender::new(0),
        })
    }

    fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of updates.
    pub fn revision(&self) -> i64 {
        self.held().revision
    }

    /// Notifies of each update.
    pub fn subscribe(&self) -> watch::Receiver<i64> {
        self.changed.subscribe()
    }

    /// Keeps what an update has changed as a revision. Packing takes its time: not for the control thread.
    pub fn keep(&self, number: i64, note: &Note, mut changes: Vec<Changed>) -> Result<()> {
        if changes.is_empty() || !self.bounds.keeps_any() {
            return Ok(());
        }
        let is_cut = changes.len() > MAX_CHANGES;
        changes.truncate(MAX_CHANGES);
        let revision = Revision::of(note, changes);
        let packed = revision.encode(if is_cut { 0 } else { self.bounds.room() })?;
        let mut history = self.history();
        history.bytes += packed.bytes() as u64;
        history.kept.push_back((number, packed));
        while self.bounds.exceeded(history.kept.len(), history.bytes) {
            let Some((_, dropped)) = history.kept.pop_front() else { break };
            history.bytes -= dropped.bytes() as u64;
        }
        Ok(())
    }

    fn page(&self, query: &Query) -> Result<Page> {
        let history = self.history();
        let mut page = Page::default();
        let wanted =
            history.kept.iter().rev().filter(|(number, _)| query.number.is_none_or(|wanted| wanted == *number));
        for (number, packed) in wanted {
            if let Some(key) = &query.key
                && !Revision::decode_head(*number, &packed.head)?.concerns(key)
            {
                continue;
            }
            if page.total >= query.skip && page.list.len() < query.take {
                page.list.push(match query.heads {
                    true => Revision::decode_head(*number, &packed.head)?,
                    false => Revision::decode(*number, &packed.head, packed.texts.as_deref())?,
                });
            }
            page.total += 1;
        }
        Ok(page)
    }

    /// Sets objects back to what they were. The document is another then than any tool has sent, and has a digest of its own.
    fn set_back(&self, batch: &Batch) -> Result<(Committed, Vec<Changed>)> {
        let mut held = self.held();
        let revision = held.revision + 1;
        let mut next = held.sections.clone();
        let (mut done, mut changes) = (Vec::new(), Vec::new());
        for write in &batch.writes {
            let kind = Kind::of_key(&write.key).map(|(kind, _)| kind.owner().unwrap_or(kind));
            let kind = kind.ok_or_else(Self::refused)?;
            let section = next.entry(kind.plural()).or_default();
            let before = section.entries.get(&write.key).map(|indexed| indexed.entry.clone());
            let found = before.as_ref().map_or(0, |entry| entry.mod_revision);
            if matches!(write.on, Condition::Unmodified(n) if n != found) {
                return Err(Error::client(ErrorKind::Conflict).context(format!("{} has been modified", write.key)));
            }
            changes.push(Changed::of(write, before.as_ref()));
            let now = write.value.as_ref().map(|value| Entry {
                key: write.key.clone(),
                value: value.clone(),
                create_revision: before.as_ref().map_or(revision, |before| before.create_revision),
                mod_revision: revision,
            });
            section.set(kind, &write.key, now.clone());
            section.is_set_back = true;
            done.push((before, now));
        }
        held.sections = next;
        held.revision = revision;
        held.digest = Some(format!("revision-{revision}"));
        held.modified_secs = Some(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()));
        self.changed.send_replace(revision);
        Ok((Committed { done, revision, lease: None }, changes))
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a document has come since the start.
    pub fn is_loaded(&self) -> bool {
        self.held().revision > 0
    }

    pub fn digest(&self) -> Option<String> {
        self.held().digest.clone()
    }

    pub fn current(&self) -> Current {
        let held = self.held();
        let mut document = Map::new();
        for kind in kinds() {
            let section = held.sections.get(kind.plural());
            // A tool that knows APISIX only reads of kinds that APISIX has.
            if section.is_some() || !matches!(kind, Kind::Function | Kind::PluginSource) {
                let version = section.map_or(0, |section| section.version);
                document.insert(format!("{}{VERSION}", kind.plural()), version.into());
            }
            if let Some(items) = section.and_then(|section| section.items.clone()) {
                document.insert(kind.plural().into(), items);
            }
        }
        Current { document: document.into(), digest: held.digest.clone(), modified_secs: held.modified_secs }
    }

    /// Whether a document says of a kind that it is what is served.
    pub fn serves(&self, document: &Map<String, Value>, kind: Kind) -> bool {
        let given = version(document, kind).unwrap_or_default();
        self.held().sections.get(kind.plural()).map_or(given == Some(0), |section| section.is_at(given))
    }

    /// What is wrong with the versions in a document.
    pub fn stale(&self, document: &Map<String, Value>) -> Vec<(Kind, String)> {
        let held = self.held();
        let wrong = |kind: Kind| {
            let served = held.sections.get(kind.plural()).map_or(0, |section| section.version);
            match version(document, kind) {
                Err(text) => Some((kind, text)),
                Ok(Some(given)) if given < served => {
                    let text = format!("{}{VERSION} must be greater than or equal to ({served})", kind.plural());
                    Some((kind, text))
                }
                Ok(_) => None,
            }
        };
        kinds().filter_map(wrong).collect()
    }

    /// Takes over a document that has been checked; answers the revision that serves it.
    pub fn update(&self, mut document: Map<String, Value>, digest: String, now_secs: u64) -> Result<Updated> {
        if let Some((_, text)) = self.stale(&document).into_iter().next() {
            return Err(Error::client(ErrorKind::Invalid).context(text));
        }
        let mut held = self.held();
        let revision = held.revision + 1;
        let mut changes = Vec::new();
        for kind in kinds() {
            let section = held.sections.entry(kind.plural()).or_default();
            let given = version(&document, kind).unwrap_or_default();
            if section.is_at(given) {
                continue;
            }
            section.version = given.unwrap_or(section.version + 1);
            section.is_set_back = false;
            section.items = document.remove(kind.plural());
            changes.extend(section.take_over(kind, revision));
        }
        held.revision = revision;
        held.digest = Some(digest);
        held.modified_secs = Some(now_secs);
        self.changed.send_replace(revision);
        Ok(Updated { revision, changes })
    }

    fn everything(&self) -> Change {
        let held = self.held();
        let entries = held.sections.values().flat_map(Section::all).cloned().collect();
        Change::All { entries, revision: held.revision }
    }

    /// Of a write of one object.
    pub fn refused() -> Error {
        let text = "the configuration is one document: replace it by PUT /apisix/admin/configs";
        Error::client(ErrorKind::Invalid).context(text)
    }
}

impl Section {
    fn all(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values().map(|indexed| &indexed.entry)
    }

    /// Sets or takes away one entry, and its item.
    fn set(&mut self, kind: Kind, key: &Arc<str>, entry: Option<Entry>) {
        let prefix = format!("/{}/", kind.plural());
        let id = key.strip_prefix(&*prefix).unwrap_or(key).to_owned();
        let mut items = match self.items.take() {
            Some(Value::Array(items)) => items,
            _ => Vec::new(),
        };
        // As `take_over` has counted them.
        let at = items
            .iter()
            .enumerate()
            .position(|(i, item)| file::id_of(kind, item).unwrap_or_else(|| format!("arr_{}", i + 1)) == id);
        // An item without an id is called by its place, which another's end must not move.
        for (i, item) in items.iter_mut().enumerate().filter(|(_, item)| file::id_of(kind, item).is_none()) {
            item["id"] = format!("arr_{}", i + 1).into();
        }
        match &entry {
            None => {
                at.map(|at| items.remove(at));
                self.entries.remove(key);
            }
            Some(entry) => {
                let mut item: Value = serde_json::from_str(&entry.value).unwrap_or_default();
                if kind.within(&id) != kind || kind != Kind::Consumer {
                    item["id"] = id.as_str().into();
                }
                match at.and_then(|at| items.get_mut(at)) {
                    Some(place) => *place = item,
                    None => items.push(item),
                }
                self.entries.insert(key.clone(), Indexed { entry: entry.clone(), index: None });
            }
        }
        self.items = Some(Value::Array(items));
    }

    /// Makes entries of `items`, and tells what has changed.
    fn take_over(&mut self, kind: Kind, revision: i64) -> Vec<Changed> {
        let old = std::mem::take(&mut self.entries);
        let items = self.items.as_ref().and_then(Value::as_array);
        for (i, item) in items.into_iter().flatten().enumerate() {
            let mut item = item.clone();
            let index = index_of(&item).unwrap_or_default();
            item.as_object_mut().and_then(|map| map.remove(MODIFIED_INDEX));
            let id = file::id_in(kind, &mut item, i);
            let key: Arc<str> = format!("/{}/{id}", kind.plural()).into();
            let value: Arc<str> = item.to_string().into();
            let indexed = match old.get(&key) {
                Some(old) if index.map_or(old.entry.value == value, |index| Some(index) == old.index) => old.clone(),
                old => {
                    let create_revision = old.map_or(revision, |old| old.entry.create_revision);
                    let entry = Entry { key: key.clone(), value, create_revision, mod_revision: revision };
                    Indexed { entry, index: index.or(Some(self.version)) }
                }
            };
            self.entries.insert(key, indexed);
        }
        changes_between(&old, &self.entries)
    }
}

fn changes_between(old: &BTreeMap<Arc<str>, Indexed>, new: &BTreeMap<Arc<str>, Indexed>) -> Vec<Changed> {
    let change = |key: &Arc<str>, before: Option<&Indexed>, after: Option<&Indexed>| Changed {
        key: key.to_string(),
        before: before.map(|indexed| indexed.entry.value.to_string()),
        after: after.map(|indexed| indexed.entry.value.to_string()),
        found: before.map_or(0, |indexed| indexed.entry.mod_revision),
        expires_ms: None,
    };
    let gone =
        old.iter().filter(|(key, _)| !new.contains_key(*key)).map(|(key, before)| change(key, Some(before), None));
    let set = new.iter().filter_map(|(key, after)| {
        let before = old.get(key);
        let is_same = before.is_some_and(|before| before.entry.mod_revision == after.entry.mod_revision);
        (!is_same).then(|| change(key, before, Some(after)))
    });
    gone.chain(set).collect()
}

/// The version that a document gives for a kind.
fn version(document: &Map<String, Value>, kind: Kind) -> std::result::Result<Option<i64>, String> {
    let name = format!("{}{VERSION}", kind.plural());
    document.get(&name).map(|given| whole(&name, given)).transpose()
}

/// The `modifiedIndex` of an item, if it has one.
pub fn index_of(item: &Value) -> std::result::Result<Option<i64>, String> {
    item.get(MODIFIED_INDEX).map(|given| whole(MODIFIED_INDEX, given)).transpose()
}

fn whole(name: &str, value: &Value) -> std::result::Result<i64, String> {
    let number = value.as_f64().ok_or_else(|| format!("{name} must be a number"))?;
    let whole = value.as_i64().unwrap_or(number as i64);
    if number.fract() != 0.0 || whole.saturating_abs() > MAX_EXACT {
        return Err(format!("{name} must be a whole number up to {MAX_EXACT}"));
    }
    Ok(whole)
}

impl Store for Standalone {
    fn name(&self) -> &'static str {
        "standalone"
    }

    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Entry>>> {
        Box::pin(async move {
            Ok(self.held().sections.values().find_map(|section| Some(section.entries.get(key)?.entry.clone())))
        })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<(Vec<Entry>, i64)>> {
        Box::pin(async move {
            let held = self.held();
            let all = held.sections.values().flat_map(Section::all);
            let mut entries: Vec<Entry> = all.filter(|entry| entry.key.starts_with(prefix)).cloned().collect();
            entries.sort_by(|a, b| a.key.cmp(&b.key));
            Ok((entries, held.revision))
        })
    }

    fn put<'a>(&'a self, _: &'a str, _: String, _: Condition, _: Option<u64>) -> BoxFuture<'a, Result<Written>> {
        Box::pin(async move { Err(Self::refused()) })
    }

    fn delete<'a>(&'a self, _: &'a str, _: Condition) -> BoxFuture<'a, Result<Option<(Entry, i64)>>> {
        Box::pin(async move { Err(Self::refused()) })
    }

    /// Only what is set back: whoever writes has a whole document.
    fn commit<'a>(&'a self, batch: Batch) -> BoxFuture<'a, Result<Committed>> {
        Box::pin(async move {
            if batch.note.refers_to.is_none() {
                return Err(Self::refused());
            }
            let (committed, changes) = self.set_back(&batch)?;
            self.keep(committed.revision, &batch.note, changes)?;
            Ok(committed)
        })
    }

    fn revisions<'a>(&'a self, query: Query) -> BoxFuture<'a, Result<Option<Page>>> {
        Box::pin(async move { self.page(&query).map(Some) })
    }

    fn standalone(self: Arc<Self>) -> Option<Arc<Standalone>> {
        Some(self)
    }

    fn watch(self: Arc<Self>, changes: ChangeSink) -> BoxFuture<'static, ()> {
        let mut updates = self.changed.subscribe();
        Box::pin(async move {
            loop {
                updates.mark_unchanged();
                if changes.send(self.everything()).await.is_err() {
                    return;
                }
                tokio::select! {
                    // The sender lives in `self`.
                    _ = updates.changed() => {}
                    () = changes.closed() => return,
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn put(store: &Standalone, document: Value) -> Result<i64> {
        let Value::Object(document) = document else { panic!("an object") };
        store.update(document, "d".into(), 1).map(|updated| updated.revision)
    }

    async fn stored(store: &Standalone, key: &str) -> (String, i64) {
        let entry = store.get(key).await.unwrap().unwrap();
        (entry.value.to_string(), entry.mod_revision)
    }

    #[tokio::test]
    async fn each_kind_has_a_version_that_only_grows() {
        let store = Standalone::new();
        assert_eq!((store.current().document["routes_conf_version"].clone(), store.is_loaded()), (json!(0), false));
        put(&store, json!({"routes": [{"id": "r1", "uri": "/a"}], "upstreams": [{"id": 7}]})).unwrap();
        assert_eq!(stored(&store, "/routes/r1").await, (r#"{"id":"r1","uri":"/a"}"#.to_owned(), 1));
        put(&store, json!({"routes_conf_version": 15, "upstreams_conf_version": 1})).unwrap();
        let document = store.current().document;
        let versions = ["routes", "upstreams", "ssls"].map(|kind| document[format!("{kind}_conf_version")].clone());
        assert_eq!(versions, [json!(15), json!(1), json!(2)]);
        assert!(store.get("/routes/r1").await.unwrap().is_none(), "what the new document lacks is gone");
        assert_eq!(document["upstreams"], json!([{"id": 7}]), "the version that is served is left as it is");
        for (given, told) in [
            (json!(14), "must be greater than or equal to (15)"),
            (json!("x"), "must be a number"),
            (json!(null), "must be a number"),
            (json!(15.5), "must be a whole number up to 9007199254740992"),
            (json!(1e300), "must be a whole number up to 9007199254740992"),
            (json!(u64::MAX), "must be a whole number up to 9007199254740992"),
        ] {
            let refused = put(&store, json!({"routes_conf_version": given, "ssls": [{"id": "s"}]})).unwrap_err();
            assert_eq!(refused.to_string(), format!("routes_conf_version {told}"));
        }
        assert!(store.get("/ssls/s").await.unwrap().is_none(), "nothing of a refused document is taken");
        put(&store, json!({ "routes_conf_version": MAX_EXACT })).unwrap();
        put(&store, json!({})).unwrap();
        assert_eq!(
            store.current().document["routes_conf_version"],
            json!(MAX_EXACT + 1),
            "it counts on from the largest"
        );
    }

    #[tokio::test]
    async fn an_item_with_the_same_index_stays() {
        let store = Standalone::new();
        let route = |uri: &str, index: i64| json!({"routes": [{"id": "r1", "uri": uri, "modifiedIndex": index}]});
        for (uri, index, served, revision) in [("/a", 1, "/a", 1), ("/b", 1, "/a", 1), ("/b", 2, "/b", 3)] {
            put(&store, route(uri, index)).unwrap();
            let expected = json!({"id": "r1", "uri": served}).to_string();
            assert_eq!(stored(&store, "/routes/r1").await, (expected, revision));
            assert_eq!(store.current().document["routes"][0]["uri"], uri, "it is shown as sent");
        }
        put(&store, json!({"routes": []})).unwrap();
        put(&store, route("/c", 2)).unwrap();
        let again = stored(&store, "/routes/r1").await;
        assert_eq!(again.1, 5, "what comes again is another version, whatever its index says");
        assert!(again.0.contains("/c"), "{}", again.0);
        put(&store, json!({"consumers": [{"username": "a"}, {"id": "a/credentials/c"}]})).unwrap();
        assert!(store.get("/consumers/a/credentials/c").await.unwrap().is_some());
    }

    #[tokio::test]
    async fn documents_are_revisions_and_objects_can_be_set_back() {
        let store = Standalone::with(Bounds { count: 2, bytes: 1 << 20 });
        let note = Note { who: "jane".into(), refers_to: None };
        let update = |document: Value| {
            let Value::Object(document) = document else { panic!("an object") };
            let updated = store.update(document, "d".into(), 1).unwrap();
            store.keep(updated.revision, &note, updated.changes).unwrap();
            updated.revision
        };
        update(json!({"routes": [{"id": "a", "uri": "/a"}, {"uri": "/no-id"}], "consumers": [{"username": "jack"}]}));
        update(json!({"routes": [{"id": "a", "uri": "/b"}, {"uri": "/no-id"}], "consumers": [{"username": "jack"}]}));
        update(json!({"routes": [{"id": "a", "uri": "/b"}, {"uri": "/no-id"}], "consumers": [{"username": "jack"}]}));
        let all = Query { take: 10, ..Query::default() };
        let page = store.revisions(all.clone()).await.unwrap().unwrap();
        assert_eq!(page.list.iter().map(|r| r.number).collect::<Vec<_>>(), [2, 1], "what changes nothing is none");
        let [change] = &page.list[0].changes[..] else { panic!("one object") };
        assert_eq!((&*change.key, change.found), ("/routes/a", 1));
        let write = |key: &str, value: Option<&str>, on: i64| super::super::revisions::Write {
            key: key.into(),
            value: value.map(Into::into),
            on: Condition::Unmodified(on),
            ttl_secs: None,
            seen: None,
        };
        let back = Note { who: "joe".into(), refers_to: Some(2) };
        let writes = vec![write("/routes/a", change.before.as_deref(), 2), write("/consumers/jack", None, 1)];
        let stale = Batch { writes: vec![write("/routes/a", None, 1)], note: back.clone() };
        assert_eq!(store.commit(stale).await.unwrap_err().kind(), ErrorKind::Conflict);
        assert!(store.commit(Batch { writes: writes.clone(), note: note.clone() }).await.is_err(), "no rollback");
        assert_eq!(store.commit(Batch { writes, note: back.clone() }).await.unwrap().revision, 4);
        assert_eq!(stored(&store, "/routes/a").await, (r#"{"id":"a","uri":"/a"}"#.to_owned(), 4));
        assert_eq!(stored(&store, "/routes/arr_2").await.1, 1, "the others stay what they are");
        let current = store.current();
        assert_eq!(current.digest.as_deref(), Some("revision-4"));
        assert_eq!((&current.document["routes"][0]["uri"], &current.document["consumers"]), (&json!("/a"), &json!([])));
        assert_eq!(current.document["routes_conf_version"], 3, "the number is the tool's");
        let gone = Batch { writes: vec![write("/routes/a", None, 4)], note: back };
        store.commit(gone).await.unwrap();
        assert_eq!(store.current().document["routes"], json!([{"id": "arr_2", "uri": "/no-id"}]));
        let page = store.revisions(Query { key: Some("/routes/a".into()), heads: true, ..all }).await.unwrap().unwrap();
        assert_eq!(page.list.iter().map(|r| r.number).collect::<Vec<_>>(), [5, 4], "the oldest go");
        assert_eq!(page.list[0].changes[0].before, None, "a list has no texts");
    }

    #[tokio::test]
    async fn what_was_set_back_gives_way_to_the_next_document() {
        let store = Standalone::new();
        let document = |version: i64, uri: &str, index: i64| {
            let items =
                json!([{"id": "a", "uri": uri, "modifiedIndex": index}, {"id": "b", "uri": "/b", "modifiedIndex": 1}]);
            json!({"routes": items, "routes_conf_version": version})
        };
        let serves = |version: i64| {
            let Value::Object(document) = document(version, "", 1) else { panic!("an object") };
            store.serves(&document, Kind::Route)
        };
        assert!(serves(0), "as much as nothing is served");
        put(&store, document(7, "/one", 7)).unwrap();
        put(&store, document(8, "/two", 8)).unwrap();
        for (version, index) in [(8, 8), (8, 9), (9, 9), (10, 8)] {
            let write = super::super::revisions::Write {
                key: "/routes/a".into(),
                value: Some(json!({"id": "a", "uri": "/back"}).to_string().into()),
                on: Condition::Always,
                ttl_secs: None,
                seen: None,
            };
            let note = Note { who: "joe".into(), refers_to: Some(2) };
            let before = store.current().document["routes_conf_version"].clone();
            assert!(serves(before.as_i64().unwrap()));
            store.commit(Batch { writes: vec![write], note }).await.unwrap();
            assert_eq!(store.current().document["routes_conf_version"], before);
            assert!(!serves(before.as_i64().unwrap()) && stored(&store, "/routes/a").await.0.contains("/back"));
            assert!(put(&store, document(before.as_i64().unwrap() - 1, "/old", 7)).is_err(), "not an older one");
            let (_, b) = stored(&store, "/routes/b").await;
            put(&store, document(version, "/next", index)).unwrap();
            assert!(stored(&store, "/routes/a").await.0.contains("/next"), "{version} {index}");
            assert_eq!(stored(&store, "/routes/b").await.1, b, "what was not set back stays");
            put(&store, document(version, "/again", index + 1)).unwrap();
            assert!(stored(&store, "/routes/a").await.0.contains("/next"), "the version that is served");
        }
    }

    #[tokio::test]
    async fn a_document_of_very_many_changes_is_kept_without_texts() {
        let store = Standalone::new();
        for (many, omitted) in [(MAX_CHANGES, false), (2 * MAX_CHANGES + 1, true)] {
            let routes: Vec<Value> = (0..many).map(|n| json!({"id": n, "uri": "/"})).collect();
            let Value::Object(document) = json!({ "routes": routes }) else { panic!("an object") };
            let updated = store.update(document, "d".into(), 1).unwrap();
            let note = Note { who: "jane".into(), refers_to: None };
            store.keep(updated.revision, &note, updated.changes).unwrap();
            let newest = store.revisions(Query { take: 1, ..Query::default() }).await.unwrap().unwrap();
            assert_eq!((newest.list[0].omitted, newest.list[0].changes.len()), (omitted, MAX_CHANGES));
        }
    }

    #[tokio::test]
    async fn nothing_else_writes() {
        let store = Standalone::new();
        let refused = store.put("/routes/1", "{}".into(), Condition::Always, None).await.unwrap_err();
        assert!(refused.to_string().contains("PUT /apisix/admin/configs"), "{refused}");
        assert!(store.delete("/routes/1", Condition::Always).await.is_err());
    }

    #[tokio::test]
    async fn an_update_is_told_to_who_watches() {
        let store = Standalone::new();
        let (sink, mut changes) = tokio::sync::mpsc::channel(1);
        let watching = tokio::spawn(store.clone().watch(sink));
        for expected in 0..3 {
            let Some(Change::All { entries, revision }) = changes.recv().await else { panic!("not everything") };
            assert_eq!((entries.len() as i64, revision), (expected, expected));
            let routes: Vec<Value> = (0..=expected).map(|id| json!({"id": id + 1, "uri": "/"})).collect();
            put(&store, json!({ "routes": routes })).unwrap();
        }
        drop(changes);
        watching.await.unwrap();
    }
}
