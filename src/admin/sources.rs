//! `/plugin_sources/{name}/…`: revisions of an uploaded plugin, going back to one, trying it, and who uses it.

use ::http::Method;
use serde_json::{Map, Value, json};

use super::{
    State, difference,
    http::{Answer, Call},
    mock, resource,
    revisions::{self, Outcome},
    store_error,
};
use crate::{
    model::{Kind, Object, PluginSource, Plugins},
    plugin::PluginTrial,
    store::{Condition, Entry, revisions::Write, snapshot::Table},
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
    revisions::restore(state, vec![write], number).await
}

/// What has the plugin: ids by kind.
async fn usage(state: &State, name: &str) -> Outcome {
    if stored(state, name).await?.is_none() {
        return Err(resource::not_found());
    }
    let snapshot = state.published.load();
    let mut found = Map::new();
    let mut note = |kind: Kind, mut ids: Vec<String>| {
        ids.sort();
        if !ids.is_empty() {
            found.insert(kind.plural().to_owned(), json!(ids));
        }
    };
    note(Kind::Route, users(&snapshot.routes, name, |v| &v.plugins));
    note(Kind::Service, users(&snapshot.services, name, |v| &v.plugins));
    note(Kind::PluginConfig, users(&snapshot.plugin_configs, name, |v| &v.plugins));
    note(Kind::Consumer, users(&snapshot.consumers, name, |v| &v.plugins));
    note(Kind::Credential, users(&snapshot.credentials, name, |v| &v.plugins));
    note(Kind::ConsumerGroup, users(&snapshot.consumer_groups, name, |v| &v.plugins));
    let rules = snapshot.global_rules.iter().filter(|rule| rule.value.plugins.get(name).is_some());
    note(Kind::GlobalRule, rules.map(|rule| rule.id.to_string()).collect());
    let metadata = snapshot.plugin_metadata.contains_key(name).then(|| name.to_owned());
    note(Kind::PluginMetadata, metadata.into_iter().collect());
    let total: usize = found.values().filter_map(Value::as_array).map(Vec::len).sum();
    Ok(Answer::json(200, &json!({ "name": name, "used_by": found, "total": total })))
}

fn users<T>(table: &Table<T>, name: &str, plugins: impl Fn(&T) -> &Plugins) -> Vec<String> {
    let has = |object: &&std::sync::Arc<Object<T>>| plugins(&object.value).get(name).is_some();
    table.values().filter(has).map(|object| object.id.to_string()).collect()
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
