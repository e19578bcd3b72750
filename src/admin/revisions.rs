//! `/revisions`: what the Admin API's writes did, their differences, and taking them back.
//!
//! Values are shown as they are stored: secrets encrypted. What the store has in clear, because no key is configured, is not shown.

use std::{
    collections::{HashMap, HashSet},
    hash::{BuildHasher, RandomState},
    sync::{Arc, OnceLock},
};

use ::http::Method;
use serde_json::{Value, json};

use super::{
    State, difference, functions,
    http::{Answer, Call},
    references, resource, sources, store_error,
};
use crate::{
    error::{Kind as ErrorKind, Result},
    model::{
        Kind, SchemaKind,
        crypt::{self, is_reference},
    },
    store::{
        Batch, BoxFuture, ChangeSink, Condition, Entry, Revision, Store, Written,
        revisions::{Changed, Note, Query, TimeLeft, Write, time_left},
    },
};

/// What `page_size` may be: a page with a hundred differences is read by nobody.
const PAGE_SIZES: std::ops::RangeInclusive<usize> = 1..=500;
const PAGE_SIZE: usize = 50;

pub(super) type Outcome<T = Answer> = std::result::Result<T, Answer>;

pub(super) async fn handle(state: &State, call: &Call, place: &[&str]) -> Outcome {
    match (&call.method, place) {
        (&Method::GET | &Method::HEAD, []) => list(state, call, call.arg("key").map(|key| relative(state, key))).await,
        (&Method::GET | &Method::HEAD, [number]) => show(state, &find(state, number).await?),
        (&Method::GET | &Method::HEAD, [number, "diff"]) => {
            let revision = find(state, number).await?;
            with_texts(&revision)?;
            let diff = differences(state, &revision.changes);
            Ok(Answer::json(200, &json!({ "revision": revision.number, "diff": diff })))
        }
        (&Method::POST, [number, "rollback"]) => rollback(state, call, &find(state, number).await?).await,
        (method, [] | [_] | [_, "diff" | "rollback"]) => {
            Err(Answer::refuse(405, format!("not supported `{method}` method for revisions")))
        }
        _ => Err(Answer::refuse(404, "not found")),
    }
}

/// A key as the API writes it (`/apisix/routes/1`) or without its prefix.
fn relative(state: &State, key: &str) -> String {
    key.strip_prefix(&state.settings.prefix).filter(|rest| rest.starts_with('/')).unwrap_or(key).to_owned()
}

fn shown_key(state: &State, key: &str) -> String {
    format!("{}{key}", state.settings.prefix)
}

/// A page of the revisions, of one object if `key` says which: `{"list", "total"}`, the newest first.
pub(super) async fn list(state: &State, call: &Call, key: Option<String>) -> Outcome {
    let number = |name: &str, default: usize| match call.arg(name).map(str::parse) {
        None => Ok(default),
        Some(Ok(n)) => Ok(n),
        Some(Err(_)) => Err(Answer::refuse(400, format!("invalid argument {name}: should be a number"))),
    };
    let (page, size) = (number("page", 1)?.max(1), number("page_size", PAGE_SIZE)?);
    if !PAGE_SIZES.contains(&size) {
        let text = format!("page_size must be between {} and {}", PAGE_SIZES.start(), PAGE_SIZES.end());
        return Err(Answer::refuse(400, text));
    }
    let found =
        query(state, Query { key, skip: (page - 1).saturating_mul(size), take: size, heads: true, number: None })
            .await?;
    let list: Vec<Value> = found.0.iter().map(|revision| head(state, revision)).collect();
    Ok(Answer::json(200, &json!({ "list": list, "total": found.1 })))
}

async fn query(state: &State, query: Query) -> Outcome<(Vec<Revision>, usize)> {
    match state.store.revisions(query).await.map_err(|e| store_error(&e))? {
        Some(page) => Ok((page.list, page.total)),
        None => Err(Answer::refuse(404, format!("the store \"{}\" keeps no revisions", state.store.name()))),
    }
}

/// One revision by its number, as it stands in a path.
pub(super) async fn find(state: &State, number: &str) -> Outcome<Revision> {
    let wanted: Option<i64> = number.parse().ok().filter(|n| *n > 0);
    let Some(wanted) = wanted else { return Err(Answer::refuse(400, "a revision is a number above 0")) };
    let (list, _) = query(state, Query { number: Some(wanted), take: 1, ..Query::default() }).await?;
    list.into_iter().next().ok_or_else(|| {
        Answer::refuse(404, format!("revision {wanted} is not kept: it is no write of the Admin API, or too old"))
    })
}

/// Refuses what was kept without texts.
pub(super) fn with_texts(revision: &Revision) -> Outcome<()> {
    match revision.omitted {
        true => {
            let text = format!("the objects of revision {} were too large to be kept with it", revision.number);
            Err(Answer::refuse(400, text))
        }
        false => Ok(()),
    }
}

/// Without the objects.
fn head(state: &State, revision: &Revision) -> Value {
    let keys: Vec<String> = revision.changes.iter().map(|change| shown_key(state, &change.key)).collect();
    let mut shown = json!({
        "revision": revision.number,
        "time": revision.time_ms as f64 / 1000.0,
        "who": revision.who,
        "action": revision.action,
        // Others of it went, or came back, with this one.
        "key": keys.last(),
    });
    if keys.len() > 1 {
        shown["keys"] = json!(keys);
    }
    if let Some(refers_to) = revision.refers_to {
        shown["refers_to"] = refers_to.into();
    }
    if revision.omitted {
        shown["omitted"] = true.into();
    }
    shown
}

fn show(state: &State, revision: &Revision) -> Outcome {
    let mut shown = head(state, revision);
    let object = |change: &Changed| {
        json!({
            "key": shown_key(state, &change.key),
            "before": as_stored(state, &change.key, change.before.as_deref()),
            "after": as_stored(state, &change.key, change.after.as_deref()),
        })
    };
    shown["objects"] = revision.changes.iter().map(object).collect();
    Ok(Answer::json(200, &shown))
}

/// `[{"key", "added", "removed", "changed"}]`
pub(super) fn differences(state: &State, changes: &[Changed]) -> Value {
    let difference = |change: &Changed| {
        let before = as_stored(state, &change.key, change.before.as_deref());
        let after = as_stored(state, &change.key, change.after.as_deref());
        let mut diff = difference::of_values(before.as_ref(), after.as_ref());
        diff["key"] = shown_key(state, &change.key).into();
        diff
    };
    changes.iter().map(difference).collect()
}

/// A stored text as it is shown: what is a secret and stands there in clear is replaced.
fn as_stored(state: &State, key: &str, text: Option<&str>) -> Option<Value> {
    let mut value = resource::value_of(text?);
    let Some((kind, id)) = Kind::of_key(key) else { return Some(value) };
    let keyring = &state.settings.keyring;
    let in_clear = |_: &str, text: &str| (!is_reference(text) && keyring.decrypt(text).is_none()).then(|| hidden(text));
    let schema = resource::schema_kind(kind);
    if kind == Kind::PluginMetadata {
        crypt::with_fields(state.encrypted(), id, SchemaKind::Metadata, &mut value, &in_clear);
    }
    if let Some(Value::Object(plugins)) = value.get_mut("plugins") {
        for (name, conf) in plugins {
            crypt::with_fields(state.encrypted(), name, schema, conf, &in_clear);
        }
    }
    if kind == Kind::Secret {
        hide_manager(&mut value);
    }
    if kind == Kind::Function {
        hide_env(&mut value, &|text| in_clear("", text));
    }
    resource::for_each_key_owner(&mut value, &mut |map| {
        crypt::with_private_keys(map, &mut |stored| stored.starts_with("---").then(|| hidden(stored)));
    });
    Some(value)
}

/// Secret managers' own secrets, which are never encrypted.
fn hide_manager(value: &mut Value) {
    for path in ["/token", "/access_key_id", "/secret_access_key", "/session_token", "/auth_config/private_key"] {
        if let Some(Value::String(text)) = value.pointer_mut(path)
            && !is_reference(text)
        {
            *text = hidden(text);
        }
    }
}

/// What a function finds in `env` and stands there in clear.
fn hide_env(value: &mut Value, in_clear: &dyn Fn(&str) -> Option<String>) {
    for value in value.get_mut("env").and_then(Value::as_object_mut).into_iter().flat_map(|env| env.values_mut()) {
        if let Some(hidden) = value.as_str().and_then(in_clear) {
            *value = hidden.into();
        }
    }
}

/// Stands for a secret: the same one looks the same as long as the gateway runs, so that a change is seen.
fn hidden(text: &str) -> String {
    static SEED: OnceLock<RandomState> = OnceLock::new();
    format!("*** in clear in the store ({:08x})", SEED.get_or_init(RandomState::new).hash_one(text) as u32)
}

/// Sets what the revision changed to what it was before.
async fn rollback(state: &State, call: &Call, revision: &Revision) -> Outcome {
    let wanted: Vec<(String, Option<Arc<str>>)> =
        revision.changes.iter().map(|change| (change.key.clone(), change.before.as_deref().map(Arc::from))).collect();
    with_texts(revision)?;
    let forced = call.forces();
    let mut writes = Vec::with_capacity(wanted.len());
    for ((key, value), change) in wanted.into_iter().zip(&revision.changes) {
        let now = state.store.get(&key).await.map_err(|e| store_error(&e))?;
        let is_ours = match (&now, &change.after) {
            (Some(now), Some(_)) => now.mod_revision == revision.number,
            (None, None) => true,
            _ => false,
        };
        if !is_ours && !forced {
            return Err(changed_since(state, revision.number, &key, now.as_ref()));
        }
        let ttl_secs = if value.is_some() { ttl_of(state, &key, change.found).await? } else { None };
        let on = Condition::Unmodified(now.as_ref().map_or(0, |e| e.mod_revision));
        writes.push(Write { key: key.into(), value, on, ttl_secs, seen: Some(now) });
    }
    restore(state, writes, revision.number, forced).await
}

/// The time that is left to a version of an object which is to be there again; refuses one that would be gone by now.
pub(super) async fn ttl_of(state: &State, key: &str, mod_revision: i64) -> Outcome<Option<u64>> {
    match time_left(&*state.store, key, mod_revision).await.map_err(|e| store_error(&e))? {
        TimeLeft::Forever => Ok(None),
        TimeLeft::Secs(secs) => Ok(Some(secs)),
        TimeLeft::Over => {
            let key = shown_key(state, key);
            Err(Answer::refuse(400, format!("the ttl of {key} is over: it would be gone by now; write it anew")))
        }
    }
}

fn changed_since(state: &State, number: i64, key: &str, now: Option<&Entry>) -> Answer {
    let now = now.map_or(0, |e| e.mod_revision);
    let how = if now == 0 { "is gone".to_owned() } else { format!("has modifiedIndex {now}") };
    let key = shown_key(state, key);
    let text = format!("{key} has been changed since revision {number}: it {how}; ?force=true rolls back all the same");
    Answer::json(409, &json!({ "error_msg": text, "key": key, "modifiedIndex": now }))
}

/// Writes objects as they were once, when they are valid today. `refers_to`: the revision that this takes back. `forced`: also sources
/// of plugins that refuse confs in use.
pub(super) async fn restore(state: &State, writes: Vec<Write>, refers_to: i64, forced: bool) -> Outcome {
    let writes = with_histories(state, writes).await?;
    let planned = Planned {
        inner: state.store.clone(),
        values: writes.iter().map(|write| (write.key.clone(), write.value.clone())).collect(),
    };
    let after = State { store: Arc::new(planned), ..state.clone() };
    for write in &writes {
        check(&after, write).await?;
        if !forced {
            keeps_plugin_users(state, write, &writes).await?;
        }
    }
    let note = Note { who: "".into(), refers_to: Some(refers_to) };
    let committed = match state.store.commit(Batch { writes: writes.clone(), note }).await {
        Ok(committed) => committed,
        Err(e) if e.kind() == ErrorKind::Conflict => {
            return Err(Answer::refuse(409, "another writer changed the objects meanwhile"));
        }
        Err(e) => return Err(store_error(&e)),
    };
    resource::served(state, committed.revision).await;
    if writes.iter().any(|write| resource::is_source(&write.key)) {
        resource::taken_over(state, committed.revision).await;
    }
    let object = |write: &Write| json!({ "key": shown_key(state, &write.key), "value": as_stored(state, &write.key, write.value.as_deref()) });
    let objects: Vec<Value> = writes.iter().filter(|write| Kind::of_key(&write.key).is_some()).map(object).collect();
    Ok(Answer::json(200, &json!({ "revision": committed.revision, "refers_to": refers_to, "objects": objects })))
}

/// With what functions need of their own revisions, each before its function.
async fn with_histories(state: &State, writes: Vec<Write>) -> Outcome<Vec<Write>> {
    // A document brings the source of a canary along, and has nothing beside it.
    if state.store.clone().standalone().is_some() {
        return Ok(writes);
    }
    let given: Vec<Arc<str>> = writes.iter().map(|write| write.key.clone()).collect();
    let mut all = Vec::with_capacity(writes.len());
    for mut write in writes {
        if let Some((Kind::Function, id)) = Kind::of_key(&write.key.clone()) {
            all.extend(functions::restoring(state, id, &mut write, &given).await?);
        }
        all.push(write);
    }
    Ok(all)
}

/// As a PUT of the object or its DELETE would be checked.
async fn check(state: &State, write: &Write) -> Outcome<()> {
    if write.key.starts_with(functions::FUNCTION_REVISIONS) {
        // Nothing is served from it before it is made live, and then it is checked.
        return Ok(());
    }
    let Some((kind, id)) = Kind::of_key(&write.key) else {
        return Err(Answer::refuse(400, format!("{} is no object of the Admin API", write.key)));
    };
    let Some(text) = &write.value else {
        return match references::in_use(&state.published.load(), kind, id) {
            Some(reason) => Err(Answer::refuse(400, reason)),
            None => Ok(()),
        };
    };
    let entry = Entry { key: write.key.clone(), value: text.clone(), create_revision: 0, mod_revision: 0 };
    let mut value: Value = serde_json::from_str(text).unwrap_or(Value::Null);
    resource::decrypt(state, kind, &entry, &mut value);
    resource::check(state, kind, id, &value).await
}

/// Refuses a source, or its end, that those who have the plugin cannot do with. What is restored together is not asked.
async fn keeps_plugin_users(state: &State, write: &Write, writes: &[Write]) -> Outcome<()> {
    let Some((Kind::PluginSource, name)) = Kind::of_key(&write.key) else { return Ok(()) };
    let together: HashSet<&str> = writes.iter().map(|write| &*write.key).collect();
    let is_written = |key: &str| together.contains(key);
    match &write.value {
        Some(text) => {
            let value = serde_json::from_str(text).unwrap_or_default();
            sources::fits_users(state, name, &value, &is_written).await
        }
        None => match sources::in_use(&state.published.load(), name, &is_written) {
            Some(reason) => Err(Answer::refuse(400, reason)),
            None => Ok(()),
        },
    }
}

/// The store as it is when some objects are restored: an owner and what it owns may come back together.
struct Planned {
    inner: Arc<dyn Store>,
    values: HashMap<Arc<str>, Option<Arc<str>>>,
}

impl Store for Planned {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Entry>>> {
        match self.values.get(key) {
            None => self.inner.get(key),
            Some(planned) => {
                let entry = |value: &Arc<str>| Entry {
                    key: key.into(),
                    value: value.clone(),
                    create_revision: 0,
                    mod_revision: 0,
                };
                let entry = planned.as_ref().map(entry);
                Box::pin(async move { Ok(entry) })
            }
        }
    }

    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<(Vec<Entry>, i64)>> {
        self.inner.list(prefix)
    }

    fn put<'a>(
        &'a self,
        key: &'a str,
        value: String,
        on: Condition,
        ttl: Option<u64>,
    ) -> BoxFuture<'a, Result<Written>> {
        self.inner.put(key, value, on, ttl)
    }

    fn delete<'a>(&'a self, key: &'a str, on: Condition) -> BoxFuture<'a, Result<Option<(Entry, i64)>>> {
        self.inner.delete(key, on)
    }

    fn watch(self: Arc<Self>, changes: ChangeSink) -> BoxFuture<'static, ()> {
        self.inner.clone().watch(changes)
    }
}
