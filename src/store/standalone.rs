//! The configuration as one document that the Admin API replaces whole (deployment-modes.md, "API-driven"): in memory only, empty
//! after a start.
//!
//! Each kind of resource has a version, `routes_conf_version`: what comes with the version that is served is left as it is, an older
//! one is refused, none counts one up. An item with the `modifiedIndex` that is served stays as it is, too.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde_json::{Map, Value};
use tokio::sync::Notify;

use super::{BoxFuture, Change, ChangeSink, Condition, Entry, Store, Written, file};
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

/// One per process.
#[derive(Default)]
pub struct Standalone {
    held: Mutex<Held>,
    changed: Notify,
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
}

#[derive(Clone)]
struct Indexed {
    /// Its revision is the update that brought it, which is never another's.
    entry: Entry,
    /// As sent; the kind's version when there was none.
    index: i64,
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
        Arc::default()
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
    pub fn update(&self, mut document: Map<String, Value>, digest: String, now_secs: u64) -> Result<i64> {
        if let Some((_, text)) = self.stale(&document).into_iter().next() {
            return Err(Error::client(ErrorKind::Invalid).context(text));
        }
        let mut held = self.held();
        let revision = held.revision + 1;
        for kind in kinds() {
            let section = held.sections.entry(kind.plural()).or_default();
            let given = version(&document, kind).unwrap_or_default();
            if given == Some(section.version) {
                continue;
            }
            section.version = given.unwrap_or(section.version + 1);
            section.items = document.remove(kind.plural());
            section.take_over(kind, revision);
        }
        held.revision = revision;
        held.digest = Some(digest);
        held.modified_secs = Some(now_secs);
        self.changed.notify_one();
        Ok(revision)
    }

    fn everything(&self) -> Change {
        let held = self.held();
        let entries = held.sections.values().flat_map(Section::all).cloned().collect();
        Change::All { entries, revision: held.revision }
    }

    fn refused() -> Error {
        let text = "the configuration is one document: replace it by PUT /apisix/admin/configs";
        Error::client(ErrorKind::Invalid).context(text)
    }
}

impl Section {
    fn all(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values().map(|indexed| &indexed.entry)
    }

    /// Makes entries of `items`.
    fn take_over(&mut self, kind: Kind, revision: i64) {
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
                Some(old) if index.map_or(old.entry.value == value, |index| index == old.index) => old.clone(),
                old => {
                    let create_revision = old.map_or(revision, |old| old.entry.create_revision);
                    let entry = Entry { key: key.clone(), value, create_revision, mod_revision: revision };
                    Indexed { entry, index: index.unwrap_or(self.version) }
                }
            };
            self.entries.insert(key, indexed);
        }
    }
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

    fn standalone(self: Arc<Self>) -> Option<Arc<Standalone>> {
        Some(self)
    }

    fn watch(self: Arc<Self>, changes: ChangeSink) -> BoxFuture<'static, ()> {
        Box::pin(async move {
            loop {
                if changes.send(self.everything()).await.is_err() {
                    return;
                }
                tokio::select! {
                    () = self.changed.notified() => {}
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
        store.update(document, "d".into(), 1)
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
