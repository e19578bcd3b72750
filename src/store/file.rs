//! conf/apisix.yaml (or apisix.json) as a store: read only.
//!
//! Read again when it changes: told by inotify on its directory, so that editors that replace the file are seen too,
//! and looked at once a second for filesystems without inotify. A YAML file counts as whole when its last line is
//! `#END`. A file that cannot be used leaves the configuration as it is.

use std::{
    collections::{BTreeMap, hash_map::DefaultHasher},
    fs,
    hash::{Hash, Hasher},
    io,
    ops::Bound,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use serde_json::{Map, Value};
use tokio::sync::Notify;

use super::{BoxFuture, Change, ChangeSink, Condition, Entry, Store, Written};
use crate::{
    conf::document,
    conf::profile,
    error::{Error, Kind, Result},
    model,
};

/// As often as APISIX looks at the file.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Yaml,
    Json,
}

impl Format {
    /// `conf/apisix.yaml`, or the profile's, relative to the prefix.
    pub fn file(self) -> String {
        match self {
            Format::Yaml => profile::file("apisix", "yaml"),
            Format::Json => profile::file("apisix", "json"),
        }
    }
}

pub struct File {
    path: PathBuf,
    /// As messages and errors name it: `conf/apisix.yaml`.
    shown: Arc<str>,
    format: Format,
    loaded: Mutex<Loaded>,
}

#[derive(Default)]
struct Loaded {
    entries: BTreeMap<Arc<str>, Entry>,
    revision: i64,
}

impl File {
    /// `dir` is the gateway's prefix; the profile is in the file's name.
    pub fn new(dir: &Path, format: Format) -> Arc<Self> {
        let shown = format.file();
        Arc::new(File { path: dir.join(&shown), shown: shown.into(), format, loaded: Mutex::default() })
    }

    fn loaded(&self) -> MutexGuard<'_, Loaded> {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over what the file says; what did not change keeps its revisions.
    fn take_over(&self, texts: BTreeMap<Arc<str>, Arc<str>>, modified: SystemTime) -> (Vec<Entry>, i64) {
        let modified_ms = modified.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as i64);
        let mut loaded = self.loaded();
        let revision = modified_ms.max(loaded.revision + 1);
        let entries: BTreeMap<_, _> = texts
            .into_iter()
            .map(|(key, value)| {
                let old = loaded.entries.get(&key);
                let unchanged = old.filter(|e| e.value == value).map(|e| e.mod_revision);
                let create_revision = old.map_or(revision, |e| e.create_revision);
                let entry =
                    Entry { key: key.clone(), value, create_revision, mod_revision: unchanged.unwrap_or(revision) };
                (key, entry)
            })
            .collect();
        let all = entries.values().cloned().collect();
        *loaded = Loaded { entries, revision };
        (all, revision)
    }

    fn read_only(&self) -> Error {
        Error::client(Kind::Invalid).context(format!("the configuration is read from {}: edit that file", self.shown))
    }
}

/// What a file that no gateway serves says: its entries in key order, and what stands in it more than once. Nothing is written or
/// watched.
pub fn entries(text: &str, format: Format) -> Result<(Vec<Entry>, Vec<String>)> {
    let Contents { texts, repeated } = contents(text, format, &|name| std::env::var(name).ok())?;
    let entry = |(key, value)| Entry { key, value, create_revision: 1, mod_revision: 1 };
    Ok((texts.into_iter().map(entry).collect(), repeated))
}

impl Store for File {
    fn name(&self) -> &'static str {
        "file"
    }

    fn identity(&self) -> Option<String> {
        Some(format!("file {}", self.path.display()))
    }

    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Entry>>> {
        Box::pin(async move { Ok(self.loaded().entries.get(key).cloned()) })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<(Vec<Entry>, i64)>> {
        Box::pin(async move {
            let loaded = self.loaded();
            let from = loaded.entries.range::<str, _>((Bound::Included(prefix), Bound::Unbounded));
            let entries = from.take_while(|(k, _)| k.starts_with(prefix)).map(|(_, e)| e.clone()).collect();
            Ok((entries, loaded.revision))
        })
    }

    fn put<'a>(&'a self, _: &'a str, _: String, _: Condition, _: Option<u64>) -> BoxFuture<'a, Result<Written>> {
        Box::pin(async move { Err(self.read_only()) })
    }

    fn delete<'a>(&'a self, _: &'a str, _: Condition) -> BoxFuture<'a, Result<Option<(Entry, i64)>>> {
        Box::pin(async move { Err(self.read_only()) })
    }

    fn watch(self: Arc<Self>, changes: ChangeSink) -> BoxFuture<'static, ()> {
        Box::pin(async move {
            let touched = Arc::new(Notify::new());
            let _watcher = watch_directory(&self.path, touched.clone());
            let mut reader = Reader { file: self, seen: None, seen_text: None, trouble: None, repeated: None };
            loop {
                let step = tokio::task::spawn_blocking(move || {
                    let said = reader.look();
                    (reader, said)
                });
                let Ok((back, said)) = step.await else { return };
                reader = back;
                for change in said {
                    if changes.send(change).await.is_err() {
                        return;
                    }
                }
                tokio::select! {
                    () = touched.notified() => {}
                    () = tokio::time::sleep(POLL_INTERVAL) => {}
                    () = changes.closed() => return,
                }
            }
        })
    }
}

/// `None` where inotify is not to be had: polling does then.
fn watch_directory(path: &Path, touched: Arc<Notify>) -> Option<RecommendedWatcher> {
    let name = path.file_name()?.to_owned();
    let told = move |event: notify::Result<notify::Event>| {
        let ours = event.is_ok_and(|e| {
            !matches!(e.kind, notify::EventKind::Access(_)) && e.paths.iter().any(|p| p.file_name() == Some(&name))
        });
        if ours {
            touched.notify_one();
        }
    };
    let mut watcher = notify::recommended_watcher(told).ok()?;
    watcher.watch(path.parent()?, RecursiveMode::NonRecursive).ok()?;
    Some(watcher)
}

/// What tells one state of a file from another without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    modified: SystemTime,
    size: u64,
    inode: u64,
}

struct Reader {
    file: Arc<File>,
    seen: Option<Stamp>,
    /// A hash of the text that was looked at last.
    seen_text: Option<u64>,
    /// What was reported about the file and still holds.
    trouble: Option<String>,
    /// What was told of a file that is served.
    repeated: Option<String>,
}

impl Reader {
    /// What there is to say about the file now; nothing when it did not change.
    fn look(&mut self) -> Vec<Change> {
        match self.load() {
            Ok(None) => Vec::new(),
            Ok(Some((contents, modified))) => {
                let (entries, revision) = self.file.take_over(contents.texts, modified);
                let mut said = Vec::new();
                if self.trouble.take().is_some() {
                    said.push(Change::Refused { key: self.file.shown.clone(), message: None });
                    said.push(Change::Found);
                }
                tracing::info!("config file {} reloaded.", self.file.path.display());
                said.push(Change::All { entries, revision });
                let repeated = (!contents.repeated.is_empty()).then(|| contents.repeated.join("; "));
                if repeated.is_some() || self.repeated.is_some() {
                    said.push(Change::Noted { key: self.file.shown.clone(), message: repeated.clone() });
                }
                self.repeated = repeated;
                said
            }
            Err(e) => self.report(e.to_string()),
        }
    }

    fn report(&mut self, message: String) -> Vec<Change> {
        if self.trouble.as_ref() == Some(&message) {
            return Vec::new();
        }
        self.trouble = Some(message.clone());
        // Its own entry of the errors takes the place of what was noted.
        self.repeated = None;
        let refused = Change::Refused { key: self.file.shown.clone(), message: Some(message.clone()) };
        vec![refused, Change::Lost { reason: message }]
    }

    fn load(&mut self) -> Result<Option<(Contents, SystemTime)>> {
        let file = &self.file;
        let unreadable = |e: io::Error| Error::config(Kind::Io).cause(e).context(format!("read {}", file.shown));
        let stamp = stamp(&file.path).map_err(unreadable).inspect_err(|_| self.seen = None)?;
        if self.seen == Some(stamp) {
            return Ok(None);
        }
        let text = fs::read_to_string(&file.path).map_err(unreadable)?;
        self.seen = Some(stamp);
        let mut hasher = DefaultHasher::new();
        text.hash(&mut hasher);
        // The file may have been away meanwhile, and be back as it was: then the trouble is over.
        if self.seen_text.replace(hasher.finish()) == Some(hasher.finish()) && self.trouble.is_none() {
            return Ok(None);
        }
        let contents = contents(&text, file.format, &|name| std::env::var(name).ok())?;
        Ok(Some((contents, stamp.modified)))
    }
}

fn stamp(path: &Path) -> io::Result<Stamp> {
    use std::os::unix::fs::MetadataExt;
    let meta = fs::metadata(path)?;
    Ok(Stamp { modified: meta.modified()?, size: meta.len(), inode: meta.ino() })
}

/// Ids that stand more than once and are told one by one; the others are counted.
const MAX_REPEATED: usize = 20;

#[derive(Default)]
struct Contents {
    /// Key -> JSON text of everything in the file.
    texts: BTreeMap<Arc<str>, Arc<str>>,
    /// What stands more than once: keys of maps, and ids.
    repeated: Vec<String>,
}

fn contents(text: &str, format: Format, env: document::Lookup<'_>) -> Result<Contents> {
    let read = match format {
        Format::Yaml => {
            is_whole(text)?;
            document::yaml(text, Some(env))
        }
        Format::Json => document::json(text, env),
    };
    let document = read.map_err(malformed)?;
    let mut contents = Contents { repeated: document.repeated, ..Contents::default() };
    let sections = match document.value {
        Value::Object(sections) => sections,
        Value::Null => Map::new(),
        _ => return Err(malformed("the top level must be a table of resources".to_owned())),
    };
    let mut ids = Vec::new();
    for (name, section) in sections {
        if name == "plugins" {
            let list = if section.is_null() { "[]".into() } else { section.to_string() };
            contents.texts.insert("/plugins".into(), list.into());
        } else if let Some(kind) = model::Kind::ALL.into_iter().find(|k| k.plural() == name) {
            add_section(kind, section, &mut contents.texts, &mut ids)?;
        } else if name != "stream_plugins" {
            add_own_section(&name, section, &mut contents.texts);
        }
    }
    let told = ids.iter().take(MAX_REPEATED);
    contents.repeated.extend(told.map(|key| format!("{key}: stands in the file more than once; the last one counts")));
    if let Some(more @ 1..) = ids.len().checked_sub(MAX_REPEATED) {
        contents.repeated.push(format!("{more} more ids stand in the file more than once"));
    }
    Ok(contents)
}

fn malformed(what: String) -> Error {
    Error::config(Kind::Malformed).context(what)
}

/// A section of no kind, for the plugin that asks for it (`core.config.new("/name")`): a list has an item per object, a table is one
/// item itself.
fn add_own_section(name: &str, section: Value, entries: &mut BTreeMap<Arc<str>, Arc<str>>) {
    let items = match section {
        Value::Array(items) => items,
        Value::Object(_) => {
            entries.insert(format!("/{name}").into(), section.to_string().into());
            return;
        }
        _ => return,
    };
    for (i, item) in items.into_iter().enumerate() {
        let id = match &item["id"] {
            Value::String(id) => id.clone(),
            Value::Number(id) => id.to_string(),
            _ => format!("arr_{}", i + 1),
        };
        entries.insert(format!("/{name}/{id}").into(), item.to_string().into());
    }
}

fn is_whole(text: &str) -> Result<()> {
    match text.trim_end().lines().next_back().is_some_and(|last| last.trim() == "#END") {
        true => Ok(()),
        false => Err(malformed("not read: its last line must be #END".to_owned())),
    }
}

/// A YAML document as JSON, merge keys (`<<`) applied, and its keys that are written more than once.
pub fn json_of_yaml(text: &str) -> Result<(Value, Vec<String>)> {
    let document = document::yaml(text, None).map_err(malformed)?;
    Ok((document.value, document.repeated))
}

/// `repeated`: keys of items whose id another one had.
fn add_section(
    kind: model::Kind,
    section: Value,
    entries: &mut BTreeMap<Arc<str>, Arc<str>>,
    repeated: &mut Vec<String>,
) -> Result<()> {
    let items = match section {
        Value::Array(items) => items,
        Value::Null => return Ok(()),
        Value::Object(map) if map.is_empty() => return Ok(()),
        _ => return Err(malformed(format!("{} must be a list", kind.plural()))),
    };
    for (i, mut item) in items.into_iter().enumerate() {
        let id = id_in(kind, &mut item, i);
        let key = format!("/{}/{id}", kind.plural());
        if entries.insert(key.as_str().into(), item.to_string().into()).is_some() {
            repeated.push(key);
        }
    }
    Ok(())
}

/// The id of the item that stands at `i` of its list, written into it.
pub fn id_in(kind: model::Kind, item: &mut Value, i: usize) -> String {
    let id = id_of(kind, item).unwrap_or_else(|| format!("arr_{}", i + 1));
    if let Value::Object(map) = item {
        if kind != model::Kind::Consumer {
            map.entry("id").or_insert_with(|| id.clone().into());
        }
        // The place of a credential, of a cost decoration is in its key.
        if kind.within(&id) != kind {
            let own = id.splitn(3, '/').nth(2).unwrap_or_default();
            map.insert("id".to_owned(), own.into());
        }
        // `key-auth:` with nothing after it is a plugin without settings.
        if let Some(Value::Object(plugins)) = map.get_mut("plugins") {
            plugins.values_mut().filter(|v| v.is_null()).for_each(|v| *v = Value::Object(Map::new()));
        }
    }
    id
}

/// A consumer is called by its `username`, whatever its `id` says; a credential stands among them by its `id`.
pub fn id_of(kind: model::Kind, item: &Value) -> Option<String> {
    let is_owned = |id: &Value| id.as_str().is_some_and(|id| kind.within(id) != kind);
    let named = match &item["id"] {
        id if kind == model::Kind::Consumer && !is_owned(id) && !item["username"].is_null() => &item["username"],
        Value::Null if kind == model::Kind::PluginSource => &item["name"],
        id => id,
    };
    match named {
        Value::String(s) if !s.is_empty() => Some(s.clone()),
        Value::Number(n) => Some(n.to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;

    fn yaml(text: &str) -> Result<BTreeMap<Arc<str>, Arc<str>>> {
        let env = |name: &str| match name {
            "HOST" => Some("127.0.0.1".to_owned()),
            "PORT" => Some("80".to_owned()),
            "BIG" => Some("356002209726529540".to_owned()),
            _ => None,
        };
        contents(text, Format::Yaml, &env).map(|contents| contents.texts)
    }

    #[test]
    fn makes_entries_of_every_section() {
        let entries = yaml(
            "routes:\n  - uri: /a\n    plugins:\n      key-auth:\n  - id: 7\n    uri: /b\nconsumers:\n  - {id: x, username: jack}\n  \
             - id: rose/credentials/c1\nservices:\n  - id: s/graphql_cost_decorations/d\nplugin_metadata:\n  - id: http-logger\nplugins:\n  - name: key-auth\nunknown: 1\n#END\n",
        )
        .unwrap();
        let keys: Vec<_> = entries.keys().map(|k| &**k).collect();
        let expected = [
            "/consumers/jack",
            "/consumers/rose/credentials/c1",
            "/plugin_metadata/http-logger",
            "/plugins",
            "/routes/7",
            "/routes/arr_1",
            "/services/s/graphql_cost_decorations/d",
        ];
        assert_eq!(keys, expected);
        assert_eq!(&*entries["/routes/arr_1"], r#"{"id":"arr_1","plugins":{"key-auth":{}},"uri":"/a"}"#);
        assert_eq!(&*entries["/routes/7"], r#"{"id":7,"uri":"/b"}"#);
        assert_eq!(&*entries["/consumers/jack"], r#"{"id":"x","username":"jack"}"#);
        assert_eq!(&*entries["/consumers/rose/credentials/c1"], r#"{"id":"c1"}"#);
        assert_eq!(&*entries["/services/s/graphql_cost_decorations/d"], r#"{"id":"d"}"#);
    }

    #[test]
    fn replaces_variables_in_values_and_keys() {
        let entries = yaml(
            "routes:\n  - id: 1\n    status: ${{PORT}}\n    uri: ${{ PATH_ :=/x }}\n    desc: ${{BIG}}\n    nodes:\n      \
             \"${{HOST}}:${{PORT}}\": 1\n#END",
        )
        .unwrap();
        let expected = r#"{"desc":"356002209726529540","id":1,"nodes":{"127.0.0.1:80":1},"status":80,"uri":"/x"}"#;
        assert_eq!(&*entries["/routes/1"], expected);
        let e = yaml("routes:\n  - uri: ${{NOT_SET}}\n#END").unwrap_err();
        assert!(e.to_string().contains("can't find environment variable NOT_SET"), "{e}");
    }

    #[test]
    fn refuses_what_is_not_whole() {
        for (text, why) in [
            ("routes: []\n", "#END"),
            ("routes: []\n#END\nservices: []", "#END"),
            ("routes: [\n#END", "line"),
            ("- a\n#END", "top level"),
            ("routes: 1\n#END", "routes must be a list"),
        ] {
            let e = yaml(text).unwrap_err().to_string();
            assert!(e.contains(why), "{text}: {e}");
        }
        assert!(yaml("#END").unwrap().is_empty());
        let json = contents(r#"{"routes":[{"id":"1"}]}"#, Format::Json, &|_| None).unwrap();
        assert_eq!(json.texts.len(), 1);
    }

    #[test]
    fn what_stands_more_than_once_is_told() {
        let text = "routes:\n  - {id: 1, uri: /a}\n  - {id: 1, uri: /b, uri: /c}\n  - {id: 2, uri: /d}\n#END\n";
        let (entries, repeated) = entries(text, Format::Yaml).unwrap();
        let values: Vec<_> = entries.iter().map(|e| &*e.value).collect();
        assert_eq!(values, [r#"{"id":1,"uri":"/c"}"#, r#"{"id":2,"uri":"/d"}"#]);
        let told = [
            "routes[1].uri: is written more than once, again in line 3; the last one counts",
            "/routes/1: stands in the file more than once; the last one counts",
        ];
        assert_eq!(repeated, told);
        let of = |pairs: usize| {
            let items: String = (0..2 * pairs).map(|i| format!("  - {{id: {}}}\n", i / 2)).collect();
            super::entries(&format!("routes:\n{items}#END\n"), Format::Yaml).unwrap().1
        };
        assert_eq!(of(MAX_REPEATED).len(), MAX_REPEATED);
        assert_eq!(of(MAX_REPEATED + 2)[MAX_REPEATED..], ["2 more ids stand in the file more than once"]);
    }

    async fn next(rx: &mut mpsc::Receiver<Change>) -> Change {
        tokio::time::timeout(Duration::from_secs(20), rx.recv()).await.unwrap().unwrap()
    }

    #[tokio::test]
    async fn an_edit_is_picked_up_and_a_broken_file_is_reported_once() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("conf")).unwrap();
        let path = dir.path().join("conf/apisix.yaml");
        fs::write(&path, "routes:\n  - {id: 1, uri: /a}\n  - {id: 2, uri: /b}\n#END\n").unwrap();
        let file = File::new(dir.path(), Format::Yaml);
        let (tx, mut rx) = mpsc::channel(4);
        tokio::spawn(file.clone().watch(tx));
        let Change::All { entries, revision: first } = next(&mut rx).await else { panic!("no All") };
        assert_eq!(entries.len(), 2);

        fs::write(&path, "routes: [\n#END\n").unwrap();
        let Change::Refused { key, message: Some(_) } = next(&mut rx).await else { panic!("not refused") };
        assert_eq!(&*key, "conf/apisix.yaml");
        let Change::Lost { .. } = next(&mut rx).await else { panic!("not lost") };

        let replace = |text: &str| {
            let new = dir.path().join("conf/.apisix.yaml.new");
            fs::write(&new, text).unwrap();
            fs::rename(&new, &path).unwrap();
        };
        replace("routes:\n  - {id: 1, uri: /a}\n  - {id: 2, uri: /c}\n#END\n");
        let Change::Refused { message: None, .. } = next(&mut rx).await else { panic!("still refused") };
        let Change::Found = next(&mut rx).await else { panic!("not found") };
        let Change::All { entries, revision } = next(&mut rx).await else { panic!("no All") };
        assert!(revision > first);
        assert_eq!((entries[0].mod_revision, entries[1].mod_revision), (first, revision));
        assert_eq!(&*file.get("/routes/2").await.unwrap().unwrap().value, r#"{"id":2,"uri":"/c"}"#);
        let refused = file.put("/routes/1", String::new(), Condition::Always, None).await.unwrap_err();
        assert!(refused.to_string().contains("edit that file"), "{refused}");

        replace("routes:\n  - {id: 1, uri: /a}\n  - {id: 1, uri: /b}\n#END\n");
        let Change::All { .. } = next(&mut rx).await else { panic!("no All") };
        let Change::Noted { message: Some(told), .. } = next(&mut rx).await else { panic!("not noted") };
        assert!(told.starts_with("/routes/1: stands in the file more than once"), "{told}");
        replace("routes:\n  - {id: 1, uri: /b}\n#END\n");
        let Change::All { .. } = next(&mut rx).await else { panic!("no All") };
        let Change::Noted { message: None, .. } = next(&mut rx).await else { panic!("still noted") };
    }
}
