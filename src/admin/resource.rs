//! Reading and writing resources: GET, PUT, POST, PATCH, DELETE.

use std::time::{SystemTime, UNIX_EPOCH};

use http::Method;
use serde_json::{Map, Value, json};
use tokio::time::timeout;

use super::{
    SERVED_PATIENCE, State,
    http::{Answer, Call},
    key_of,
    list::{self, Shown},
    patch, references, store_error,
};
use crate::{
    error,
    model::{self, Kind, ParseContext, PluginSource, SchemaKind, crypt},
    store::{Condition, Entry, PluginSchema, Refusal, Written},
};

/// Tries of a PATCH or POST that others' writes get in the way of.
pub(super) const MAX_TRIES: usize = 5;
/// Managers that a secret may belong to.
const SECRET_MANAGERS: [&str; 3] = ["vault", "aws", "gcp"];

type Outcome<T = Answer> = Result<T, Answer>;

/// What a path names.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub kind: Kind,
    /// As in the key: `1`, `jack/credentials/c1`, `vault/1`.
    pub id: Option<String>,
    /// A credential list's consumer.
    pub owner: Option<String>,
    /// The rest of the path, for PATCH.
    pub sub_path: Option<String>,
}

impl Target {
    /// From the segments after `/apisix/admin/`, decoded.
    pub fn of(segments: &[&str]) -> Option<Target> {
        let (plural, rest) = segments.split_first()?;
        let sub = |rest: &[&str]| (!rest.is_empty()).then(|| rest.join("/"));
        if let ("consumers", [username, "credentials", rest @ ..]) = (*plural, rest) {
            let id = rest.first().map(|id| format!("{username}/credentials/{id}"));
            let sub_path = sub(rest.get(1..).unwrap_or_default());
            return Some(Target { kind: Kind::Credential, id, owner: Some((*username).to_owned()), sub_path });
        }
        let kind = Kind::ALL.into_iter().find(|kind| kind.plural() == *plural && *kind != Kind::Credential)?;
        let (id, rest) = match (kind, rest) {
            (Kind::Secret, [manager, id, rest @ ..]) => (Some(format!("{manager}/{id}")), rest),
            (_, [id, rest @ ..]) => (Some((*id).to_owned()), rest),
            (_, []) => (None, rest),
        };
        Some(Target { kind, id, owner: None, sub_path: sub(rest) })
    }

    /// The last part of the id: what stands in `value.id`.
    fn short_id(&self) -> Option<&str> {
        let id = self.id.as_deref()?;
        match self.kind {
            Kind::Credential => id.rsplit('/').next(),
            _ => Some(id),
        }
    }
}

/// How APISIX speaks of a kind in its errors.
fn spoken(kind: Kind) -> &'static str {
    match kind {
        Kind::ConsumerGroup => "consumer group",
        Kind::PluginConfig => "plugin config",
        Kind::GlobalRule => "global rule",
        Kind::StreamRoute => "stream route",
        Kind::PluginSource => "plugin source",
        other => other.singular(),
    }
}

pub(super) async fn handle(state: &State, target: Target, call: &Call) -> Outcome {
    match call.method {
        Method::GET | Method::HEAD => get(state, &target, call).await,
        Method::PUT => put(state, target, call).await,
        Method::POST => post(state, target, call).await,
        Method::PATCH => patch(state, target, call).await,
        Method::DELETE => delete(state, target, call).await,
        _ => Err(Answer::refuse(404, "not found")),
    }
}

async fn get(state: &State, target: &Target, call: &Call) -> Outcome {
    let Some(id) = &target.id else {
        return get_list(state, target, call).await;
    };
    let found = state.store.get(&key_of(target.kind, id)).await.map_err(|e| store_error(&e))?;
    match found {
        Some(entry) => Ok(Answer::json(200, &shown(state, target.kind, &entry).to_json())),
        None => Err(not_found()),
    }
}

async fn get_list(state: &State, target: &Target, call: &Call) -> Outcome {
    let prefix = match &target.owner {
        Some(username) => {
            require_consumer(state, username).await.map_err(|_| not_found())?;
            format!("/consumers/{username}/credentials/")
        }
        None => format!("/{}/", target.kind.plural()),
    };
    let (entries, _) = state.store.list(&prefix).await.map_err(|e| store_error(&e))?;
    // Credentials stand among the consumers.
    let own = entries.iter().filter(|e| Kind::of_key(&e.key).is_some_and(|(kind, _)| kind == target.kind));
    Ok(list::answer(target.kind, call, own.map(|entry| shown(state, target.kind, entry)).collect()))
}

async fn require_consumer(state: &State, username: &str) -> Outcome<()> {
    let found = state.store.get(&key_of(Kind::Consumer, username)).await.map_err(|e| store_error(&e))?;
    found.map(|_| ()).ok_or_else(|| Answer::refuse(404, "consumer not found"))
}

/// An entry as the API shows it: secrets readable, private keys left out.
fn shown(state: &State, kind: Kind, entry: &Entry) -> Shown {
    let mut value: Value = serde_json::from_str(&entry.value).unwrap_or(Value::Null);
    decrypt(state, kind, entry, &mut value);
    if let (Kind::Ssl, Value::Object(map)) = (kind, &mut value) {
        map.remove("key");
        map.remove("keys");
    }
    Shown {
        key: format!("{}{}", state.settings.prefix, entry.key),
        value,
        created: entry.create_revision,
        modified: entry.mod_revision,
    }
}

pub(super) fn not_found() -> Answer {
    Answer::json(404, &json!({ "message": "Key not found" }))
}

async fn put(state: &State, mut target: Target, call: &Call) -> Outcome {
    let mut value = body(target.kind, call)?;
    let ttl = ttl(call)?;
    let id = identify(&mut target, &mut value)?;
    forbid_times(&value)?;
    check(state, target.kind, &id, &value).await?;
    let key = key_of(target.kind, &id);
    let previous = state.store.get(&key).await.map_err(|e| store_error(&e))?;
    stamp(&mut value, previous.as_ref(), None);
    let text = stored_text(state, target.kind, &value);
    let written = state.store.put(&key, text, Condition::Always, ttl).await.map_err(|e| store_error(&e))?;
    let status = if written.previous.is_some() { 200 } else { 201 };
    Ok(done(state, status, &written).await)
}

/// The answer to a write: `{"key", "value"}`, as stored, once it is served.
async fn done(state: &State, status: u16, written: &Written) -> Answer {
    served(state, written.revision).await;
    let key = json!(format!("{}{}", state.settings.prefix, written.entry.key));
    Answer::json_text(status, format!("{{\"key\":{key},\"value\":{}}}", written.entry.value))
}

async fn post(state: &State, mut target: Target, call: &Call) -> Outcome {
    let by_name = [Kind::Consumer, Kind::Credential, Kind::PluginMetadata, Kind::Secret, Kind::PluginSource];
    if by_name.contains(&target.kind) {
        return Err(Answer::refuse(405, format!("not supported `POST` method for {}", spoken(target.kind))));
    }
    let mut value = body(target.kind, call)?;
    if target.id.is_some() || value.get("id").is_some() {
        return Err(Answer::refuse(400, format!("wrong {} id, do not need it", spoken(target.kind))));
    }
    let ttl = ttl(call)?;
    forbid_times(&value)?;
    for _ in 0..MAX_TRIES {
        let id = next_id(state).await?;
        target.id = Some(id.clone());
        set_id(&mut value, &id);
        check(state, target.kind, &id, &value).await?;
        stamp(&mut value, None, None);
        let key = key_of(target.kind, &id);
        let text = stored_text(state, target.kind, &value);
        match state.store.put(&key, text, Condition::Unmodified(0), ttl).await {
            Ok(written) => return Ok(done(state, 201, &written).await),
            Err(e) if e.kind() == error::Kind::Conflict => continue,
            Err(e) => return Err(store_error(&e)),
        }
    }
    Err(Answer::refuse(409, "another writer took every id that was tried"))
}

/// As etcd's in-order keys: twenty digits that grow.
async fn next_id(state: &State) -> Outcome<String> {
    // No key starts like this: only the revision is wanted.
    let (_, revision) = state.store.list("/-/").await.map_err(|e| store_error(&e))?;
    Ok(format!("{:020}", revision + 1))
}

async fn patch(state: &State, target: Target, call: &Call) -> Outcome {
    let by_put = [Kind::Consumer, Kind::Credential, Kind::PluginMetadata];
    if by_put.contains(&target.kind) {
        return Err(Answer::refuse(405, format!("not supported `PATCH` method for {}", spoken(target.kind))));
    }
    let Some(id) = target.id.as_deref() else {
        return Err(missing_id(target.kind));
    };
    let change = json_body(call)?;
    let key = key_of(target.kind, id);
    for _ in 0..MAX_TRIES {
        let Some(entry) = state.store.get(&key).await.map_err(|e| store_error(&e))? else {
            return Err(not_found());
        };
        let mut value: Value = serde_json::from_str(&entry.value).unwrap_or(Value::Null);
        decrypt(state, target.kind, &entry, &mut value);
        let sub_path = target.sub_path.as_deref().unwrap_or("");
        patch::put_at(&mut value, sub_path, change.clone()).map_err(|e| Answer::refuse(400, e))?;
        same_id(&target, &value)?;
        if value.get("id").is_some() {
            set_id(&mut value, target.short_id().unwrap_or(id));
        }
        check(state, target.kind, id, &value).await?;
        stamp(&mut value, Some(&entry), Some(&change).filter(|_| sub_path.is_empty()));
        let text = stored_text(state, target.kind, &value);
        match state.store.put(&key, text, Condition::Unmodified(entry.mod_revision), ttl(call)?).await {
            Ok(written) => return Ok(done(state, 200, &written).await),
            Err(e) if e.kind() == error::Kind::Conflict => continue,
            Err(e) => return Err(store_error(&e)),
        }
    }
    Err(Answer::refuse(409, "value changed before overwritten"))
}

async fn delete(state: &State, target: Target, call: &Call) -> Outcome {
    let Some(id) = target.id.as_deref() else {
        return Err(missing_id(target.kind));
    };
    if call.arg("force") != Some("true")
        && let Some(reason) = references::in_use(&state.published.load(), target.kind, id)
    {
        return Err(Answer::refuse(400, reason));
    }
    let key = key_of(target.kind, id);
    let Some((_, mut revision)) = state.store.delete(&key, Condition::Always).await.map_err(|e| store_error(&e))?
    else {
        return Err(not_found());
    };
    if target.kind == Kind::Consumer {
        let (credentials, _) = state.store.list(&format!("{key}/credentials/")).await.map_err(|e| store_error(&e))?;
        for credential in credentials {
            let deleted = state.store.delete(&credential.key, Condition::Always).await.map_err(|e| store_error(&e))?;
            revision = deleted.map_or(revision, |(_, at)| at);
        }
    }
    served(state, revision).await;
    Ok(Answer::json(200, &json!({ "deleted": "1", "key": format!("{}{key}", state.settings.prefix) })))
}

/// Waits until every request that starts is served by that revision; a source that lags does not hold the answer for ever.
pub(super) async fn served(state: &State, revision: i64) {
    if timeout(SERVED_PATIENCE, state.published.reached(revision)).await.is_err() {
        tracing::warn!("revision {revision} is stored but not served after {SERVED_PATIENCE:?}");
    }
}

pub(super) fn json_body(call: &Call) -> Outcome<Value> {
    if call.body.is_empty() {
        return Err(Answer::refuse(400, "missing configurations"));
    }
    parse(&call.body).map_err(|e| Answer::refuse(400, format!("invalid request body: {e}")))
}

/// JSON whose strings may hold line breaks and other control characters as they are: people paste protos and Lua.
fn parse(bytes: &[u8]) -> serde_json::Result<Value> {
    serde_json::from_slice(bytes).or_else(|strict| {
        let is_raw = |b: &u8| *b < 0x20;
        if !bytes.iter().any(is_raw) {
            return Err(strict);
        }
        serde_json::from_slice(&escaped(bytes)).map_err(|_| strict)
    })
}

fn escaped(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len() + bytes.len() / 16);
    let (mut in_string, mut after_backslash) = (false, false);
    for &byte in bytes {
        if in_string && byte < 0x20 {
            out.extend_from_slice(format!("\\u{byte:04x}").as_bytes());
        } else {
            out.push(byte);
        }
        in_string ^= byte == b'"' && !after_backslash;
        after_backslash = in_string && byte == b'\\' && !after_backslash;
    }
    out
}

/// An object. Lua may be sent as it is.
fn body(kind: Kind, call: &Call) -> Outcome<Value> {
    let is_lua = matches!(kind, Kind::Function | Kind::PluginSource);
    let says_json = call.header("content-type").is_some_and(|t| t.contains("json"));
    let value = match json_body(call) {
        Ok(value) if !is_lua || says_json || value.get("source").is_some() => value,
        Err(refusal) if !is_lua || says_json || call.body.is_empty() => return Err(refusal),
        _ => match std::str::from_utf8(&call.body) {
            Ok(source) => json!({ "source": source }),
            Err(_) => return Err(Answer::refuse(400, "invalid request body: not UTF-8")),
        },
    };
    if value.is_object() { Ok(value) } else { Err(Answer::refuse(400, "invalid request body: an object is expected")) }
}

fn ttl(call: &Call) -> Outcome<Option<u64>> {
    match call.arg("ttl") {
        None => Ok(None),
        Some(text) => match text.parse::<f64>() {
            Ok(seconds) if seconds.is_finite() => Ok((seconds >= 1.0).then_some(seconds as u64)),
            _ => Err(Answer::refuse(400, "invalid argument ttl: should be a number")),
        },
    }
}

fn missing_id(kind: Kind) -> Answer {
    match kind {
        Kind::PluginMetadata => Answer::refuse(400, "missing plugin name"),
        Kind::Consumer => Answer::refuse(400, "missing consumer name"),
        Kind::Secret => Answer::refuse(400, "no secret id"),
        kind => Answer::refuse(400, format!("missing {} id", spoken(kind))),
    }
}

fn wrong_id(kind: Kind) -> Answer {
    match kind {
        Kind::Consumer => Answer::refuse(400, "wrong username"),
        kind => Answer::refuse(400, format!("wrong {} id", spoken(kind))),
    }
}

/// The id that path and body agree on, written into the body.
fn identify(target: &mut Target, value: &mut Value) -> Outcome<String> {
    let field = if target.kind == Kind::Consumer { "username" } else { "id" };
    let written = match value.get(field) {
        Some(Value::String(s)) => Some(s.clone()),
        Some(Value::Number(n)) => Some(n.to_string()),
        _ => None,
    };
    if target.kind == Kind::Consumer {
        // Without a name it is the schema that refuses.
        let Some(name) = written else { return Ok(target.id.clone().unwrap_or_default()) };
        return match &target.id {
            Some(id) if *id != name => Err(wrong_id(target.kind)),
            _ => Ok(name),
        };
    }
    if target.id.is_none()
        && let Some(written) = &written
    {
        target.id = match &target.owner {
            Some(username) => Some(format!("{username}/credentials/{written}")),
            None => Some(written.clone()),
        };
    }
    let (Some(id), Some(short)) = (target.id.clone(), target.short_id()) else {
        return Err(missing_id(target.kind));
    };
    match written {
        Some(written) if written != short => return Err(wrong_id(target.kind)),
        Some(_) => {}
        None => set_id(value, short),
    }
    if target.kind == Kind::Secret {
        let known = id.split_once('/').is_some_and(|(manager, _)| SECRET_MANAGERS.contains(&manager));
        return if known { Ok(id) } else { Err(missing_id(target.kind)) };
    }
    Ok(id)
}

fn set_id(value: &mut Value, id: &str) {
    if let Value::Object(map) = value {
        map.insert("id".into(), id.into());
    }
}

/// A PATCH may not move an object.
fn same_id(target: &Target, value: &Value) -> Outcome<()> {
    let written = match value.get("id") {
        Some(Value::String(s)) => s.clone(),
        Some(Value::Number(n)) => n.to_string(),
        _ => return Ok(()),
    };
    if Some(written.as_str()) == target.short_id() { Ok(()) } else { Err(wrong_id(target.kind)) }
}

fn forbid_times(value: &Value) -> Outcome<()> {
    for object in [Some(value), value.get("upstream")].into_iter().flatten() {
        for name in ["create_time", "update_time"] {
            if object.get(name).is_some() {
                return Err(Answer::refuse(400, format!("the property is forbidden: {name}")));
            }
        }
    }
    Ok(())
}

/// Writes `create_time` and `update_time`; a PATCH that names them has its way.
fn stamp(value: &mut Value, previous: Option<&Entry>, patch: Option<&Value>) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let Value::Object(map) = value else { return };
    let given = |name: &str| patch.is_some_and(|patch| patch.get(name).is_some());
    let created = previous.and_then(|entry| {
        let value: Value = serde_json::from_str(&entry.value).ok()?;
        value.get("create_time").cloned()
    });
    if !given("create_time") {
        map.insert("create_time".into(), created.unwrap_or_else(|| now.into()));
    }
    if !given("update_time") {
        map.insert("update_time".into(), now.into());
    }
}

/// Everything that must hold before a value is stored. Works on copies: what is stored is what was sent.
pub(super) async fn check(state: &State, kind: Kind, id: &str, value: &Value) -> Outcome<()> {
    if let Kind::PluginMetadata = kind {
        return check_metadata(state, id, value);
    }
    if kind == Kind::StreamRoute && !state.settings.stream {
        return Err(Answer::refuse(400, "stream mode is disabled, can not add stream routes"));
    }
    let invalid = |e: error::Error| Answer::refuse(400, e.to_string());
    let mut filled = value.clone();
    model::check(kind, id, &mut filled).map_err(invalid)?;
    check_plugins(state, kind, &mut filled)?;
    let context = ParseContext { keyring: &state.settings.keyring, fields: state.encrypted() };
    model::parse(kind, id, &value.to_string(), &context).map_err(invalid)?;
    check_lua(state, kind, id, value)?;
    references::check(state, kind, id, value).await
}

fn check_metadata(state: &State, name: &str, value: &Value) -> Outcome<()> {
    let mut conf = value.clone();
    if let Value::Object(map) = &mut conf {
        map.retain(|name, _| !matches!(name.as_str(), "id" | "create_time" | "update_time"));
    }
    match state.plugins.check(name, &mut conf, PluginSchema::Metadata) {
        Ok(()) => Ok(()),
        Err(Refusal::Unknown) => Err(Answer::refuse(400, "invalid plugin name")),
        Err(Refusal::Invalid(text)) => Err(Answer::refuse(400, format!("invalid configuration: {text}"))),
    }
}

fn check_plugins(state: &State, kind: Kind, owner: &mut Value) -> Outcome<()> {
    let (schema, before) = match kind {
        Kind::Consumer | Kind::Credential => (PluginSchema::Consumer, "invalid plugins configuration: "),
        // No plugin is one for streams: the model refuses them all.
        Kind::StreamRoute => return Ok(()),
        _ => (PluginSchema::Plugin, ""),
    };
    let Some(Value::Object(plugins)) = owner.get_mut("plugins") else { return Ok(()) };
    for (name, conf) in plugins {
        if !conf.is_object() && !conf.is_array() {
            let text = format!("{before}invalid plugin conf {conf} for plugin [{name}]");
            return Err(Answer::refuse(400, text));
        }
        let text = match state.plugins.check(name, conf, schema) {
            Ok(()) => continue,
            Err(Refusal::Unknown) => format!("{before}unknown plugin [{name}]"),
            Err(Refusal::Invalid(text)) => {
                format!("{before}failed to check the configuration of plugin {name} err: {text}")
            }
        };
        return Err(Answer::refuse(400, text));
    }
    Ok(())
}

fn check_lua(state: &State, kind: Kind, id: &str, value: &Value) -> Outcome<()> {
    let text = |key: &str| value.get(key).and_then(Value::as_str);
    if let (Kind::Route, Some(source)) = (kind, text("filter_func")) {
        let outcome = state.plugins.compile_chunk(&format!("return {source}"));
        outcome.map_err(|e| Answer::refuse(400, format!("failed to load 'filter_func' string: {e}")))?;
    }
    let outcome = match (kind, text("source")) {
        (Kind::Function, Some(source)) => state.plugins.compile_function(id, source),
        (Kind::PluginSource, Some(_)) => inspect_source(state, id, value),
        _ => Ok(()),
    };
    outcome.map_err(|e| Answer::refuse(400, e))
}

fn inspect_source(state: &State, name: &str, value: &Value) -> Result<(), String> {
    let Value::Object(map) = value else { return Ok(()) };
    let source = PluginSource::from_json(map).map_err(|e| e.to_string())?;
    state.plugins.inspect_plugin(name, &source)
}

pub(super) fn schema_kind(kind: Kind) -> SchemaKind {
    match kind {
        Kind::Consumer | Kind::Credential => SchemaKind::Consumer,
        Kind::PluginMetadata => SchemaKind::Metadata,
        _ => SchemaKind::Route,
    }
}

/// The JSON text that is stored: secrets encrypted.
fn stored_text(state: &State, kind: Kind, value: &Value) -> String {
    let mut value = value.clone();
    let (keyring, of) = (&state.settings.keyring, schema_kind(kind));
    if let (Kind::PluginMetadata, Some(name)) = (kind, text_of(&value, "id")) {
        crypt::encrypt_fields(keyring, state.encrypted(), &name, of, &mut value);
    }
    if let Some(Value::Object(plugins)) = value.get_mut("plugins") {
        plugins.iter_mut().for_each(|(name, conf)| crypt::encrypt_fields(keyring, state.encrypted(), name, of, conf));
    }
    state.encrypt_keys(&mut value);
    value.to_string()
}

fn text_of(value: &Value, key: &str) -> Option<String> {
    value.get(key).and_then(Value::as_str).map(str::to_owned)
}

pub(super) fn decrypt(state: &State, kind: Kind, entry: &Entry, value: &mut Value) {
    let (keyring, of) = (&state.settings.keyring, schema_kind(kind));
    if kind == Kind::PluginMetadata {
        let name = entry.key.rsplit('/').next().unwrap_or_default();
        crypt::decrypt_fields(keyring, state.encrypted(), name, of, value);
    }
    if let Some(Value::Object(plugins)) = value.get_mut("plugins") {
        plugins.iter_mut().for_each(|(name, conf)| crypt::decrypt_fields(keyring, state.encrypted(), name, of, conf));
    }
    for_each_key_owner(value, &mut |map| {
        crypt::with_private_keys(map, &mut |stored| match stored.starts_with("---") {
            true => None,
            false => keyring.decrypt_pkey(stored),
        });
    });
}

/// The objects that may hold private keys: an `ssls` object, the `tls` of an upstream, inline or not.
pub(super) fn for_each_key_owner(value: &mut Value, visit: &mut dyn FnMut(&mut Map<String, Value>)) {
    let is_ssl = value.get("cert").is_some() || value.get("certs").is_some();
    for path in ["/tls", "/upstream/tls"] {
        if let Some(Value::Object(tls)) = value.pointer_mut(path) {
            visit(tls);
        }
    }
    if let (true, Value::Object(map)) = (is_ssl, value) {
        visit(map);
    }
}
