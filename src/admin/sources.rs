//! `/plugin_sources/{name}/…`: revisions of an uploaded plugin, going back to one, trying it, and who uses it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use ::http::Method;
use serde_json::{Map, Value, json};
use tokio::task::yield_now;

use super::{
    State, difference,
    http::{Answer, Call},
    mock, resource,
    revisions::{self, Outcome},
    store_error,
};
use crate::{
    model::{Kind, PluginSource},
    plugin::PluginTrial,
    store::{Condition, Entry, PluginSchema, Snapshot, revisions::Write},
};

/// Paths below a source that are not its own fields.
pub(super) fn is_action(call: &Call, action: &str) -> bool {
    call.method != Method::PATCH && matches!(action, "revisions" | "rollback" | "test" | "usage")
}

pub(super) async fn handle(state: &State, call: &Call, name: &str, action: &[&str]) -> Outcome {
    match (&call.method, action) {
        (&Method::GET | &Method::HEAD, ["revisions"]) => {
            revisions::list(state, call, Some(Kind::PluginSource.key(name))).await
        }
        (&Method::GET | &Method::HEAD, ["revisions", number, "diff"]) => diff(state, name, number).await,
        (&Method::GET | &Method::HEAD, ["usage"]) => usage(state, name).await,
        (&Method::POST, ["rollback"]) => rollback(state, call, name).await,
        (&Method::POST, ["test"]) => test(state, call, name).await,
        (method, [action] | ["revisions", _, action @ "diff"]) => {
            Err(Answer::refuse(405, format!("not supported `{method}` method for plugin source {action}")))
        }
        _ => Err(Answer::refuse(404, "not found")),
    }
}

async fn stored(state: &State, name: &str) -> Outcome<Option<Entry>> {
    state.store.get(&Kind::PluginSource.key(name)).await.map_err(|e| store_error(&e))
}

/// A source with its modules, from a stored text or what was sent.
fn source_of(value: &Value) -> Outcome<PluginSource> {
    let empty = Map::new();
    let read = PluginSource::from_json(value.as_object().unwrap_or(&empty));
    read.map_err(|e| Answer::refuse(400, e.to_string()))
}

/// The texts of the plugin file and its modules, line by line.
async fn diff(state: &State, name: &str, number: &str) -> Outcome {
    let revision = revisions::find(state, number).await?;
    let key = Kind::PluginSource.key(name);
    let change = revision.changes.iter().find(|change| change.key == key);
    let change = change.ok_or_else(|| {
        Answer::refuse(404, format!("revision {} has not changed plugin source {name}", revision.number))
    })?;
    revisions::with_texts(&revision)?;
    let chunks = |text: Option<&String>| -> Outcome<Vec<(String, String)>> {
        let Some(text) = text else { return Ok(Vec::new()) };
        let source = source_of(&serde_json::from_str(text).unwrap_or_default())?;
        Ok(source.chunks(name).map(|(name, text)| (name.to_string(), text.to_string())).collect())
    };
    let (before, after) = (chunks(change.before.as_ref())?, chunks(change.after.as_ref())?);
    let mut names: Vec<&String> = before.iter().chain(&after).map(|(name, _)| name).collect();
    names.sort();
    names.dedup();
    let text = |of: &[(String, String)], name: &str| {
        of.iter().find(|(own, _)| own == name).map_or(String::new(), |(_, text)| text.clone())
    };
    let diffs = names.into_iter().map(|name| {
        let (from, to) = (format!("a/plugins/{name}.lua"), format!("b/plugins/{name}.lua"));
        difference::of_texts(&text(&before, name), &text(&after, name), (&from, &to))
    });
    Ok(Answer::text(200, diffs.collect::<String>()))
}

/// `{"revision": n}`: the source is again what that revision made it.
async fn rollback(state: &State, call: &Call, name: &str) -> Outcome {
    let asked = resource::json_body(state, call)?;
    let Some(number) = asked.get("revision").and_then(Value::as_i64) else {
        return Err(Answer::refuse(400, "property \"revision\" is required: the number of a revision"));
    };
    let revision = revisions::find(state, &number.to_string()).await?;
    revisions::with_texts(&revision)?;
    let key = Kind::PluginSource.key(name);
    let after = revision.changes.iter().find(|change| change.key == key).map(|change| change.after.as_deref());
    let text = match after {
        Some(Some(text)) => text,
        Some(None) => return Err(Answer::refuse(400, format!("revision {number} deleted plugin source {name}"))),
        None => return Err(Answer::refuse(404, format!("revision {number} has not changed plugin source {name}"))),
    };
    let now = stored(state, name).await?;
    let on = Condition::Unmodified(now.as_ref().map_or(0, |entry| entry.mod_revision));
    let ttl_secs = revisions::ttl_of(state, &key, number).await?;
    let write = Write { key: key.into(), value: Some(text.into()), on, ttl_secs, seen: Some(now) };
    revisions::restore(state, vec![write], number, call.forces()).await
}

/// Objects that a refusal names; of the rest it says that there are more.
const MAX_NAMED: usize = 10;
/// Confs that are checked before others on the thread have their turn.
const CONFS_AT_ONCE: usize = 128;

/// Refuses a source whose schema does not take the confs that are in use: their owners would answer 500. `replaced`: keys whose confs
/// are about to be others.
pub(super) async fn fits_users(
    state: &State,
    name: &str,
    value: &Value,
    replaced: &dyn Fn(&str) -> bool,
) -> Outcome<()> {
    let snapshot = state.published.load();
    let mut confs: Vec<(Kind, String, Arc<str>)> = Vec::new();
    snapshot.each_conf(|kind, id, plugin, conf| {
        if plugin == name && !replaced(&kind.key(id)) {
            confs.push((kind, id.to_owned(), conf.clone()));
        }
    });
    if confs.is_empty() {
        return Ok(());
    }
    confs.sort_by(|a, b| (a.0.plural(), &a.1).cmp(&(b.0.plural(), &b.1)));
    let others = snapshot.plugin_sources.iter().filter(|(id, _)| &***id != name);
    let mut sources: Vec<_> = others.map(|(id, object)| (id.to_string(), object.value.clone())).collect();
    sources.push((name.to_owned(), source_of(value)?));
    // Without a VM nobody can say; the nodes will.
    let Some(plugins) = state.plugins.with_sources(sources) else { return Ok(()) };
    let mut refused = Vec::new();
    for (n, (kind, id, conf)) in confs.iter().enumerate() {
        if n % CONFS_AT_ONCE == CONFS_AT_ONCE - 1 {
            yield_now().await;
        }
        let mut conf = serde_json::from_str(conf).unwrap_or_default();
        if let Err(refusal) = plugins.check(name, &mut conf, PluginSchema::of(*kind)) {
            refused.push(format!("{}/{id}: {}", kind.plural(), refusal.words(name)));
        }
        if refused.len() > MAX_NAMED {
            break;
        }
    }
    if refused.is_empty() {
        return Ok(());
    }
    let more = if refused.len() > MAX_NAMED { "; and more" } else { "" };
    refused.truncate(MAX_NAMED);
    let text = format!(
        "plugin source {name} refuses confs that are in use: {}{more}; change these first, or use force=true",
        refused.join("; ")
    );
    Err(Answer::refuse(400, text))
}

/// Why a source may not be deleted: the first that has the plugin. `gone`: keys that are about to be deleted, too.
pub(super) fn in_use(snapshot: &Snapshot, name: &str, gone: &dyn Fn(&str) -> bool) -> Option<String> {
    let mut first: Option<(Kind, String)> = None;
    snapshot.each_conf(|kind, id, plugin, _| {
        let before = |(k, i): &(Kind, String)| (kind.plural(), id) < (k.plural(), i);
        if plugin == name && first.as_ref().is_none_or(before) && !gone(&kind.key(id)) {
            first = Some((kind, id.to_owned()));
        }
    });
    let (kind, id) = first?;
    Some(format!("can not delete this plugin source, {} [{id}] is still using it now", kind.singular()))
}

/// What has the plugin: ids by kind.
async fn usage(state: &State, name: &str) -> Outcome {
    if stored(state, name).await?.is_none() {
        return Err(resource::not_found());
    }
    let snapshot = state.published.load();
    let mut found: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    snapshot.each_conf(|kind, id, plugin, _| {
        if plugin == name {
            found.entry(kind.plural()).or_default().insert(id.to_owned());
        }
    });
    let total: usize = found.values().map(BTreeSet::len).sum();
    Ok(Answer::json(200, &json!({ "name": name, "used_by": found, "total": total })))
}

/// `POST …/test`: a mock request through the source that was sent, or the stored one.
async fn test(state: &State, call: &Call, name: &str) -> Outcome {
    let asked = resource::json_body(state, call)?;
    let sent = asked.get("source").is_some();
    let source = match (sent, stored(state, name).await?) {
        (true, _) => source_of(&asked)?,
        (false, Some(entry)) => source_of(&serde_json::from_str(&entry.value).unwrap_or_default())?,
        (false, None) => return Err(resource::not_found()),
    };
    let trial = PluginTrial {
        place: Some(mock::PLUGINS.take()?),
        name: name.to_owned(),
        source,
        conf: asked.get("conf").cloned().unwrap_or_else(|| json!({})),
        request: mock::request(&asked)?,
        upstream: mock::response(asked.get("upstream").unwrap_or(&Value::Null))?,
    };
    match state.plugins.try_plugin(state.published.load(), trial).await {
        Ok(shown) => Ok(Answer::json(200, &shown)),
        Err(reason) => Err(Answer::refuse(400, reason)),
    }
}
