//! Reading and writing resources: GET, PUT, POST, PATCH, DELETE.

use std::time::{SystemTime, UNIX_EPOCH};

use http::Method;
use serde_json::{Map, Value, json};
use tokio::time::timeout;

use super::{
    SERVED_PATIENCE, State,
    contest::Tries,
    functions,
    http::{Answer, Call},
    list::{self, Shown},
    patch, references,
    shape::{self, Action},
    sources, store_error,
};
use crate::{
    error,
    model::{self, Kind, ParseContext, PluginSource, SchemaKind, crypt},
    store::{Condition, Entry, PluginSchema, Refusal, Written},
};

/// Managers that a secret may belong to.
const SECRET_MANAGERS: [&str; 3] = ["vault", "aws", "gcp"];

pub(super) type Outcome<T = Answer> = Result<T, Answer>;

/// What a path names.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub kind: Kind,
    /// As in the key: `1`, `jack/credentials/c1`, `vault/1`.
    pub id: Option<String>,
    /// The consumer of credentials, the service of cost decorations.
    pub owner: Option<String>,
    /// The rest of the path, for PATCH.
    pub sub_path: Option<String>,
}

impl Target {
    /// From the segments after `/apisix/admin/`, decoded.
    pub fn of(segments: &[&str]) -> Option<Target> {
        let (plural, rest) = segments.split_first()?;
        let sub = |rest: &[&str]| (!rest.is_empty()).then(|| rest.join("/"));
        let kind = Kind::ALL.into_iter().find(|kind| kind.plural() == *plural && kind.owner().is_none())?;
        if let [owner, owned, rest @ ..] = rest
            && let Some(owned) = Kind::ALL.into_iter().find(|k| k.owner() == Some(kind) && k.plural() == *owned)
        {
            let id = rest.first().map(|id| owned_id(owned, owner, id));
            let sub_path = sub(rest.get(1..).unwrap_or_default());
            return Some(Target { kind: owned, id, owner: Some((*owner).to_owned()), sub_path });
        }
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
        match self.kind.owner() {
            Some(_) => id.rsplit('/').next(),
            None => Some(id),
        }
    }

    /// As in the key: with the owner, where there is one.
    pub fn full_id(&self, short: &str) -> String {
        self.owner.as_ref().map_or_else(|| short.to_owned(), |owner| owned_id(self.kind, owner, short))
    }
}

/// `jack/credentials/c1`
fn owned_id(kind: Kind, owner: &str, id: &str) -> String {
    format!("{owner}/{}/{id}", kind.plural())
}

/// How APISIX speaks of a kind in its errors.
fn spoken(kind: Kind) -> &'static str {
    match kind {
        Kind::ConsumerGroup => "consumer group",
        Kind::PluginConfig => "plugin config",
        Kind::GlobalRule => "global rule",
        Kind::StreamRoute => "stream route",
        Kind::PluginSource => "plugin source",
        Kind::GraphqlCostDecoration => "graphql cost decoration",
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
    let found = state.store.get(&target.kind.key(id)).await.map_err(|e| store_error(&e))?;
    match found {
        Some(entry) => Ok(shape::one(state, &shown(state, target.kind, &entry))),
        None => Err(not_found()),
    }
}

async fn get_list(state: &State, target: &Target, call: &Call) -> Outcome {
    let prefix = match &target.owner {
        Some(owner) => {
            references::require_owner(state, target.kind, owner).await.map_err(|_| not_found())?;
            target.kind.key(&owned_id(target.kind, owner, ""))
        }
        None => target.kind.key(""),
    };
    let (entries, _) = state.store.list(&prefix).await.map_err(|e| store_error(&e))?;
    // Credentials stand among the consumers, cost decorations among the services.
    let own = entries.iter().filter(|e| Kind::of_key(&e.key).is_some_and(|(kind, _)| kind == target.kind));
    let items = own.map(|entry| shown(state, target.kind, entry)).collect();
    let (page, total) = list::page_of(target.kind, call, items)?;
    Ok(shape::list(state, prefix.trim_end_matches('/'), &page, total))
}

/// An entry as the API shows it: secrets readable, private keys left out.
fn shown(state: &State, kind: Kind, entry: &Entry) -> Shown {
    let mut value = value_of(&entry.value);
    // The only secret of a stream route is its upstream's private key, which APISIX does not show. Written back it is the same.
    if kind != Kind::StreamRoute {
        decrypt(state, kind, entry, &mut value);
    }
    if let (Kind::Ssl, Value::Object(map)) = (kind, &mut value) {
        map.remove("key");
        map.remove("keys");
    }
    if let (Kind::Function, Some(Value::Object(canary))) = (kind, value.get_mut("canary")) {
        canary.remove("source");
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
    let mut value = body(state, target.kind, call)?;
    let ttl = ttl(call)?;
    let id = identify(&mut target, &mut value)?;
    forbid_times(&value)?;
    prepare(state, target.kind, &id, &mut value).await?;
    take_owner(&target, &mut value)?;
    check(state, target.kind, &id, &value).await?;
    keeps_users(state, target.kind, &id, &value, call).await?;
    let key = target.kind.key(&id);
    let mut tries = tries(state, target.kind).await;
    loop {
        let previous = state.store.get(&key).await.map_err(|e| store_error(&e))?;
        if target.kind == Kind::Function {
            functions::revise(state, &id, &mut value, previous.as_ref()).await?;
        }
        stamp(&mut value, previous.as_ref(), None);
        let text = stored_text(state, target.kind, &value);
        let written = match state.store.put(&key, text, functions::condition(target.kind, previous.as_ref()), ttl).await
        {
            Err(e) if e.kind() == error::Kind::Conflict && tries.again().await => continue,
            written => written.map_err(|e| overwritten(&e))?,
        };
        drop(tries);
        if written.previous.is_none() && target.kind == Kind::Service {
            // What an earlier service of that name left is not this one's.
            delete_owned(state, target.kind, &key).await?;
        }
        let status = if written.previous.is_some() { 200 } else { 201 };
        return Ok(done(state, status, Action::Set, &written).await);
    }
}

/// Writers of functions take turns from the first try on: what loses has kept its source by then.
pub(super) async fn tries(state: &State, kind: Kind) -> Tries<'_> {
    let mut tries = Tries::of(state);
    if kind == Kind::Function {
        tries.take_turn().await;
    }
    tries
}

/// A write that has lost to others every time, or failed.
pub(super) fn overwritten(e: &error::Error) -> Answer {
    match e.kind() {
        error::Kind::Conflict => Answer::refuse(409, "value changed before overwritten"),
        _ => store_error(e),
    }
}

/// What a write brings along before it is checked.
async fn prepare(state: &State, kind: Kind, id: &str, value: &mut Value) -> Outcome<()> {
    if kind != Kind::Function {
        return Ok(());
    }
    functions::resolve_canary(state, id, value).await
}

/// The answer to a write: `{"key", "value"}`, as stored, once it is served.
pub(super) async fn done(state: &State, status: u16, action: Action, written: &Written) -> Answer {
    served(state, written.revision).await;
    if is_source(&written.entry.key) {
        taken_over(state, written.revision).await;
    }
    shape::written(state, status, action, &written.entry)
}

async fn post(state: &State, target: Target, call: &Call) -> Outcome {
    let by_name = [Kind::Consumer, Kind::Credential, Kind::PluginMetadata, Kind::Secret, Kind::PluginSource];
    if by_name.contains(&target.kind) {
        return Err(Answer::refuse(405, format!("not supported `POST` method for {}", spoken(target.kind))));
    }
    let mut value = body(state, target.kind, call)?;
    if target.id.is_some() || value.get("id").is_some() {
        return Err(Answer::refuse(400, format!("wrong {} id, do not need it", spoken(target.kind))));
    }
    let ttl = ttl(call)?;
    forbid_times(&value)?;
    take_owner(&target, &mut value)?;
    let mut tries = tries(state, target.kind).await;
    loop {
        let short = tries.id(&target).await?;
        let id = target.full_id(&short);
        let key = target.kind.key(&id);
        // A function's source is kept before the function: not among another's.
        if target.kind == Kind::Function && state.store.get(&key).await.map_err(|e| store_error(&e))?.is_some() {
            match tries.again().await {
                true => continue,
                false => return Err(Tries::exhausted()),
            }
        }
        set_id(&mut value, &short);
        prepare(state, target.kind, &id, &mut value).await?;
        check(state, target.kind, &id, &value).await?;
        if target.kind == Kind::Function {
            functions::revise(state, &id, &mut value, None).await?;
        }
        stamp(&mut value, None, None);
        let text = stored_text(state, target.kind, &value);
        match state.store.put(&key, text, Condition::Unmodified(0), ttl).await {
            Ok(written) => {
                drop(tries);
                return Ok(done(state, 201, Action::Create, &written).await);
            }
            Err(e) if e.kind() != error::Kind::Conflict => return Err(store_error(&e)),
            Err(_) if tries.again().await => {}
            Err(_) => return Err(Tries::exhausted()),
        }
    }
}

async fn patch(state: &State, target: Target, call: &Call) -> Outcome {
    let by_put = [Kind::Consumer, Kind::Credential, Kind::PluginMetadata];
    if by_put.contains(&target.kind) {
        return Err(Answer::refuse(405, format!("not supported `PATCH` method for {}", spoken(target.kind))));
    }
    let id = required_id(&target)?;
    let change = json_body(state, call)?;
    let sub_path = target.sub_path.as_deref().unwrap_or("");
    if target.kind == Kind::GraphqlCostDecoration && moves_owner(sub_path, &change) {
        return Err(Answer::refuse(400, "service_id can not be patched"));
    }
    let key = target.kind.key(id);
    let mut tries = tries(state, target.kind).await;
    loop {
        let Some(entry) = state.store.get(&key).await.map_err(|e| store_error(&e))? else {
            return Err(not_found());
        };
        let mut value = value_of(&entry.value);
        decrypt(state, target.kind, &entry, &mut value);
        patch::put_at(&mut value, sub_path, change.clone()).map_err(|e| Answer::refuse(400, e))?;
        same_id(&target, &value)?;
        if value.get("id").is_some() {
            set_id(&mut value, target.short_id().unwrap_or(id));
        }
        prepare(state, target.kind, id, &mut value).await?;
        check(state, target.kind, id, &value).await?;
        keeps_users(state, target.kind, id, &value, call).await?;
        if target.kind == Kind::Function {
            functions::revise(state, id, &mut value, Some(&entry)).await?;
        }
        stamp(&mut value, Some(&entry), Some(&change).filter(|_| sub_path.is_empty()));
        let text = stored_text(state, target.kind, &value);
        match state.store.put(&key, text, Condition::Unmodified(entry.mod_revision), ttl(call)?).await {
            Ok(written) => {
                drop(tries);
                return Ok(done(state, 200, Action::CompareAndSwap, &written).await);
            }
            Err(e) if e.kind() == error::Kind::Conflict && tries.again().await => {}
            Err(e) => return Err(overwritten(&e)),
        }
    }
}

async fn delete(state: &State, target: Target, call: &Call) -> Outcome {
    let id = required_id(&target)?;
    if !call.forces() {
        let snapshot = state.published.load();
        let used = match target.kind {
            Kind::PluginSource => sources::in_use(&snapshot, id, &|_| false),
            kind => references::in_use(&snapshot, kind, id),
        };
        if let Some(reason) = used {
            return Err(Answer::refuse(400, reason));
        }
    }
    let key = target.kind.key(id);
    // What it owns goes with it (`session`).
    let Some((_, revision)) = state.store.delete(&key, Condition::Always).await.map_err(|e| store_error(&e))? else {
        return Err(not_found());
    };
    served(state, revision).await;
    if is_source(&key) {
        taken_over(state, revision).await;
    }
    Ok(shape::deleted(state, &key))
}

/// A source must take the confs that its plugin has, unless the caller knows better.
async fn keeps_users(state: &State, kind: Kind, id: &str, value: &Value, call: &Call) -> Outcome<()> {
    match kind {
        Kind::PluginSource if !call.forces() => sources::fits_users(state, id, value, &|_| false).await,
        _ => Ok(()),
    }
}

pub(super) fn is_source(key: &str) -> bool {
    matches!(Kind::of_key(key), Some((Kind::PluginSource, _)))
}

/// Deletes what lives under the object at `key`.
async fn delete_owned(state: &State, owner: Kind, key: &str) -> Outcome<()> {
    for kind in Kind::ALL.into_iter().filter(|kind| kind.owner() == Some(owner)) {
        let prefix = format!("{key}/{}/", kind.plural());
        let (owned, _) = state.store.list(&prefix).await.map_err(|e| store_error(&e))?;
        for entry in owned {
            state.store.delete(&entry.key, Condition::Always).await.map_err(|e| store_error(&e))?;
        }
    }
    Ok(())
}

/// A cost decoration belongs to the service of its path.
fn take_owner(target: &Target, value: &mut Value) -> Outcome<()> {
    let (Kind::GraphqlCostDecoration, Some(owner), Value::Object(map)) = (target.kind, &target.owner, value) else {
        return Ok(());
    };
    let written = references::id_text(map.get("service_id"));
    if written.is_some_and(|written| written != *owner) {
        return Err(Answer::refuse(400, "wrong service_id, it is taken from the path"));
    }
    map.insert("service_id".into(), owner.as_str().into());
    Ok(())
}

fn moves_owner(sub_path: &str, change: &Value) -> bool {
    match sub_path.trim_matches('/') {
        "" => change.get("service_id").is_some(),
        path => path == "service_id",
    }
}

/// Waits until every request that starts is served by that revision; a source that lags does not hold the answer for ever.
pub(super) async fn served(state: &State, revision: i64) {
    if timeout(SERVED_PATIENCE, state.published.reached(revision)).await.is_err() {
        tracing::warn!("revision {revision} is stored but not served after {SERVED_PATIENCE:?}");
    }
}

/// Waits until the workers have the plugins of that revision, whose `init` may wait: for as long as for `served`.
pub(super) async fn taken_over(state: &State, revision: i64) {
    let Some(workers) = &state.workers else { return };
    if timeout(SERVED_PATIENCE, workers(revision)).await.is_err() {
        tracing::warn!("a worker still loads the plugins of revision {revision} after {SERVED_PATIENCE:?}");
    }
}

pub(super) fn json_body(state: &State, call: &Call) -> Outcome<Value> {
    if call.body.is_empty() {
        return Err(Answer::refuse(400, "missing configurations"));
    }
    parse(&call.body).map_err(|e| not_json(state, &call.body, &e))
}

/// What cjson says of the text: what tools of APISIX show.
pub(super) fn not_json(state: &State, body: &[u8], e: &serde_json::Error) -> Answer {
    let why = state.plugins.explain_json(body).unwrap_or_else(|| e.to_string());
    Answer::refuse(400, format!("invalid request body: {why}"))
}

/// A stored text; whoever has written it.
pub(super) fn value_of(text: &str) -> Value {
    let mut value = serde_json::from_str(text).unwrap_or(Value::Null);
    model::with_whole_numbers(&mut value);
    value
}

/// JSON whose strings may hold line breaks and other control characters as they are: people paste protos and Lua. Its numbers are what cjson
/// would make of them.
pub(super) fn parse(bytes: &[u8]) -> serde_json::Result<Value> {
    let mut value = parse_text(bytes)?;
    model::with_whole_numbers(&mut value);
    Ok(value)
}

fn parse_text(bytes: &[u8]) -> serde_json::Result<Value> {
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
pub(super) fn body(state: &State, kind: Kind, call: &Call) -> Outcome<Value> {
    let is_lua = matches!(kind, Kind::Function | Kind::PluginSource);
    let says_json = call.header("content-type").is_some_and(|t| t.contains("json"));
    let value = match json_body(state, call) {
        Ok(value) if !is_lua || says_json || value.get("source").is_some() => value,
        Err(refusal) if !is_lua || says_json || call.body.is_empty() => return Err(refusal),
        Ok(Value::Object(_)) => {
            let text =
                "invalid request body: either the Lua text itself, or a JSON object with the Lua text as \"source\"";
            return Err(Answer::refuse(400, text));
        }
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
            Ok(0.0) => Ok(None),
            Ok(seconds) if seconds >= 1.0 && seconds.is_finite() => Ok(Some(seconds as u64)),
            Ok(_) => Err(Answer::refuse(400, "invalid argument ttl: should be 0 (for ever) or at least 1 second")),
            _ => Err(Answer::refuse(400, "invalid argument ttl: should be a number")),
        },
    }
}

fn required_id(target: &Target) -> Outcome<&str> {
    let whole = |id: &&str| target.kind != Kind::Secret || id.contains('/');
    target.id.as_deref().filter(whole).ok_or_else(|| missing_id(target.kind))
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
        target.id = Some(target.full_id(written));
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
pub(super) fn stamp(value: &mut Value, previous: Option<&Entry>, patch: Option<&Value>) {
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

/// Everything that must hold before a value is stored.
pub(super) async fn check(state: &State, kind: Kind, id: &str, value: &Value) -> Outcome<()> {
    check_alone(state, kind, id, value).map_err(|text| Answer::refuse(400, text))?;
    match kind {
        Kind::PluginMetadata => Ok(()),
        kind => references::check(state, kind, id, value).await,
    }
}

/// What must hold of a value, whatever else there is. Works on copies: what is stored is what was sent.
pub(super) fn check_alone(state: &State, kind: Kind, id: &str, value: &Value) -> Result<(), String> {
    if let Kind::PluginMetadata = kind {
        return check_metadata(state, id, value);
    }
    if kind == Kind::StreamRoute && !state.settings.stream {
        return Err("stream mode is disabled, can not add stream routes".to_owned());
    }
    let mut filled = value.clone();
    model::check(kind, id, &mut filled).map_err(|e| e.to_string())?;
    check_plugins(state, kind, &mut filled)?;
    if kind == Kind::Function {
        functions::may_trust(state, value)?;
    }
    let context = ParseContext { keyring: &state.settings.keyring, fields: state.encrypted() };
    model::parse(kind, id, &value.to_string(), &context).map_err(|e| e.to_string())?;
    check_sources(state, kind, id, value)
}

fn check_metadata(state: &State, name: &str, value: &Value) -> Result<(), String> {
    let mut conf = value.clone();
    if let Value::Object(map) = &mut conf {
        map.retain(|name, _| !matches!(name.as_str(), "id" | "create_time" | "update_time"));
    }
    match state.plugins.check(name, &mut conf, PluginSchema::Metadata) {
        Ok(()) => Ok(()),
        Err(Refusal::Unknown) => Err("invalid plugin name".to_owned()),
        Err(Refusal::Invalid(text)) => Err(format!("invalid configuration: {text}")),
    }
}

fn check_plugins(state: &State, kind: Kind, owner: &mut Value) -> Result<(), String> {
    let (schema, before) = match kind {
        Kind::Consumer | Kind::Credential => (PluginSchema::Consumer, "invalid plugins configuration: "),
        // No plugin is one for streams: the model refuses them all.
        Kind::StreamRoute => return Ok(()),
        _ => (PluginSchema::Plugin, ""),
    };
    let Some(Value::Object(plugins)) = owner.get_mut("plugins") else { return Ok(()) };
    for (name, conf) in plugins {
        if !conf.is_object() && !conf.is_array() {
            return Err(format!("{before}invalid plugin conf {conf} for plugin [{name}]"));
        }
        let text = match state.plugins.check(name, conf, schema) {
            Ok(()) => continue,
            Err(refusal) => format!("{before}{}", refusal.words(name)),
        };
        return Err(text);
    }
    Ok(())
}

/// Whether the Lua and the protos in a value compile.
fn check_sources(state: &State, kind: Kind, id: &str, value: &Value) -> Result<(), String> {
    let text = |key: &str| value.get(key).and_then(Value::as_str);
    if let (Kind::Route, Some(source)) = (kind, text("filter_func")) {
        let outcome = state.plugins.compile_chunk(&format!("return {source}"));
        outcome.map_err(|e| format!("failed to load 'filter_func' string: {e}"))?;
    }
    match (kind, text("source"), text("content")) {
        (Kind::Function, Some(source), _) => state.plugins.compile_function(id, source),
        (Kind::PluginSource, Some(_), _) => inspect_source(state, id, value),
        (Kind::Proto, _, Some(content)) => model::proto::check(content).map_err(|e| format!("invalid content: {e}")),
        _ => Ok(()),
    }
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
    if let (Kind::Function, Some(env)) = (kind, value.get_mut("env")) {
        crypt::encrypt_env(keyring, env);
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
    if let (Kind::Function, Some(env)) = (kind, value.get_mut("env")) {
        crypt::decrypt_env(keyring, env);
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
