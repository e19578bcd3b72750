//! `/functions/{id}/…`: revisions of the source, rollback, logs, dry runs; and what a write of a function does beside it.
//!
//! Revisions stand beside the function under keys of their own (`/moongate/function_revisions/{id}/{number}`), which no node serves
//! from: a function that has a canary carries the canary's source itself. They go with the function in one revision of the Admin API,
//! and come back with it.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use ::http::Method;
use base64::{Engine, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{
    State,
    contest::MAX_TRIES,
    http::{Answer, Call},
    mock, resource,
    shape::Action,
    store_error,
};
use crate::{
    error,
    model::{self, Kind, ParseContext, Parsed},
    observe::functions::{self, Line, MAX_LINES},
    plugin::{Trial, Tried, registry::UNTRUSTED},
    schema,
    store::{
        Condition, Entry,
        revisions::{Write, time_left},
    },
};

type Outcome<T = Answer> = Result<T, Answer>;

/// Revisions kept of a function, the live one and the canary included: some weeks of somebody who changes it every day.
pub const MAX_REVISIONS: usize = 20;

/// Lines that `logs` shows when nobody says how many: a screen.
const LINES: usize = 100;
/// Where the sources of functions lie, by id and number.
pub(super) const FUNCTION_REVISIONS: &str = "/moongate/function_revisions/";

/// What a dry run shows of an answer's body.
const MAX_SHOWN_BODY: usize = 1 << 20;

/// A dry run is waited for so long, whatever the function may take.
const LONGEST_TRIAL: Duration = Duration::from_secs(60);

/// A source that was stored once.
#[derive(Debug, Deserialize, Serialize)]
struct Revision {
    revision: u64,
    source: String,
    create_time: u64,
}

/// Paths below a function that are not its own fields.
pub(super) fn is_action(call: &Call, action: &str) -> bool {
    call.method != Method::PATCH && matches!(action, "logs" | "revisions" | "rollback" | "promote" | "test")
}

pub(super) async fn handle(state: &State, id: &str, action: &[&str], call: &Call) -> Outcome {
    match (&call.method, action) {
        (&Method::GET | &Method::HEAD, ["logs"]) => logs(state, id, call).await,
        (&Method::GET | &Method::HEAD, ["revisions"]) => list(state, id).await,
        (&Method::GET | &Method::HEAD, ["revisions", number]) => show(state, id, number).await,
        (&Method::POST, ["revisions"]) => add(state, id, call).await,
        (&Method::POST, ["rollback"]) => rollback(state, id, call).await,
        (&Method::POST, ["promote"]) => promote(state, id).await,
        (&Method::POST, ["test"]) => test(state, id, call).await,
        (method, [action, ..]) => {
            Err(Answer::refuse(405, format!("not supported `{method}` method for function {action}")))
        }
        _ => Err(Answer::refuse(404, "not found")),
    }
}

/// Whether the configuration lets a function out of the sandbox that wants to be.
pub(super) fn may_trust(state: &State, value: &Value) -> Result<(), String> {
    match value.get("trusted").and_then(Value::as_bool) == Some(true) && !state.settings.trusted_functions {
        true => Err(format!("invalid configuration: property \"trusted\" validation failed: {UNTRUSTED}")),
        false => Ok(()),
    }
}

/// Under which condition a function is written: two writers must not take the same number.
pub(super) fn condition(kind: Kind, previous: Option<&Entry>) -> Condition {
    match kind {
        Kind::Function => Condition::Unmodified(previous.map_or(0, |entry| entry.mod_revision)),
        _ => Condition::Always,
    }
}

/// Puts the source of the canary's revision beside its number.
pub(super) async fn resolve_canary(state: &State, id: &str, value: &mut Value) -> Outcome<()> {
    let Some(Value::Object(canary)) = value.get_mut("canary") else { return Ok(()) };
    canary.remove("source");
    let Some(number) = canary.get("revision") else {
        let text = "invalid configuration: property \"canary\" validation failed: property \"revision\" is required";
        return Err(Answer::refuse(400, text));
    };
    // What is no number is for the schema to refuse.
    let Some(number) = number.as_u64() else { return Ok(()) };
    let found = revisions(state, id).await?.into_iter().find(|revision| revision.revision == number);
    let Some(found) = found else {
        let text = format!("failed to fetch revision info by revision [{number}], response code: 404");
        return Err(Answer::refuse(400, text));
    };
    canary.insert("source".into(), found.source.into());
    if let Value::Object(map) = value {
        map.remove("backed_out");
    }
    Ok(())
}

/// Gives the source its number, and keeps it: a source that differs from the live one is a new revision.
pub(super) async fn revise(state: &State, id: &str, value: &mut Value, previous: Option<&Entry>) -> Outcome<()> {
    let source = text(value, "source");
    let before: Value = previous.and_then(|entry| serde_json::from_str(&entry.value).ok()).unwrap_or_default();
    let mut live = number(&before, "revision");
    let known = text(&before, "source");
    if live == 0 && previous.is_some() {
        // Stored by somebody who does not count: its source is the first that can be gone back to.
        live = keep_source(state, id, &known, 0).await?;
    }
    let now = if live > 0 && known == source { live } else { keep_source(state, id, &source, live).await? };
    if let Value::Object(map) = value {
        map.insert("revision".into(), now.into());
    }
    let canary = value.get("canary").map_or(0, |canary| number(canary, "revision"));
    prune(state, id, &[now, live, canary]).await
}

/// What is to be written beside a function that is set back to what it was: the sources that it runs, where they are kept no more, or
/// the end of all that are kept, when the function itself goes. `given`: what is set back with it.
pub(super) async fn restoring(state: &State, id: &str, write: &mut Write, given: &[Arc<str>]) -> Outcome<Vec<Write>> {
    let (kept, _) = state.store.list(&history(id)).await.map_err(|e| store_error(&e))?;
    let Some(text) = &write.value else {
        let gone = kept.into_iter().filter(|entry| !given.contains(&entry.key));
        return Ok(gone.map(Write::deletion_of).collect());
    };
    let mut value: Value = serde_json::from_str(text).unwrap_or_default();
    let known: Vec<Revision> = kept.iter().filter_map(|entry| serde_json::from_str(&entry.value).ok()).collect();
    let mut newest = known.last().map_or(0, |revision| revision.revision);
    let (mut writes, mut renumbered) = (Vec::new(), false);
    for place in ["", "/canary"] {
        let Some(Value::Object(run)) = value.pointer_mut(place) else { continue };
        let Some(number) = run.get("revision").and_then(Value::as_u64).filter(|n| *n > 0) else { continue };
        let source = run.get("source").and_then(Value::as_str).unwrap_or_default().to_owned();
        let same = known.iter().find(|revision| revision.revision == number).map(|known| known.source == source);
        if same == Some(true) || given.iter().any(|given| **given == *key(id, number)) {
            continue;
        }
        newest = newest.max(number);
        // Another function of this name has taken the number since.
        let number = if same.is_some() { newest + 1 } else { number };
        newest = newest.max(number);
        if same.is_some() {
            run.insert("revision".into(), number.into());
            renumbered = true;
        }
        writes.push(Write {
            key: key(id, number).into(),
            value: Some(kept_text(number, &source).into()),
            on: Condition::Unmodified(0),
            ttl_secs: None,
            seen: Some(None),
        });
    }
    if renumbered {
        write.value = Some(value.to_string().into());
    }
    Ok(writes)
}

/// Below this the revisions of a function stand.
pub(super) fn history(id: &str) -> String {
    format!("{FUNCTION_REVISIONS}{id}/")
}

/// How a source is kept.
fn kept_text(revision: u64, source: &str) -> String {
    let create_time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    json!({"revision": revision, "source": source, "create_time": create_time}).to_string()
}

fn key(id: &str, number: u64) -> String {
    format!("{}{number:010}", history(id))
}

fn text(value: &Value, key: &str) -> String {
    value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn number(value: &Value, key: &str) -> u64 {
    value.get(key).and_then(Value::as_u64).unwrap_or(0)
}

/// Oldest first.
async fn revisions(state: &State, id: &str) -> Outcome<Vec<Revision>> {
    let (entries, _) = state.store.list(&history(id)).await.map_err(|e| store_error(&e))?;
    Ok(entries.iter().filter_map(|entry| serde_json::from_str(&entry.value).ok()).collect())
}

/// The number under which a source is kept: that of the newest revision, if it is the same and not the live one, else a new one.
async fn keep_source(state: &State, id: &str, source: &str, live: u64) -> Outcome<u64> {
    for _ in 0..MAX_TRIES {
        let known = revisions(state, id).await?;
        if let Some(same) = known.last().filter(|last| last.source == source && last.revision > live) {
            return Ok(same.revision);
        }
        let revision = known.last().map_or(0, |last| last.revision).max(live) + 1;
        let kept = kept_text(revision, source);
        match state.store.put(&key(id, revision), kept, Condition::Unmodified(0), None).await {
            Ok(_) => return Ok(revision),
            Err(e) if e.kind() == error::Kind::Conflict => {}
            Err(e) => return Err(store_error(&e)),
        }
    }
    Err(Answer::refuse(409, "another writer took every revision that was tried"))
}

/// Drops the oldest revisions, but none of `used`.
async fn prune(state: &State, id: &str, used: &[u64]) -> Outcome<()> {
    let known = revisions(state, id).await?;
    let surplus = known.len().saturating_sub(MAX_REVISIONS);
    for old in known.iter().filter(|revision| !used.contains(&revision.revision)).take(surplus) {
        state.store.delete(&key(id, old.revision), Condition::Always).await.map_err(|e| store_error(&e))?;
    }
    Ok(())
}

async fn stored(state: &State, id: &str) -> Outcome<(Entry, Value)> {
    let found = state.store.get(&Kind::Function.key(id)).await.map_err(|e| store_error(&e))?;
    let entry = found.ok_or_else(resource::not_found)?;
    let value = serde_json::from_str(&entry.value).unwrap_or_default();
    Ok((entry, value))
}

async fn list(state: &State, id: &str) -> Outcome {
    let (_, value) = stored(state, id).await?;
    let (live, canary) = (number(&value, "revision"), value.get("canary"));
    let on_trial = canary.map_or(0, |canary| number(canary, "revision"));
    let list: Vec<Value> = revisions(state, id)
        .await?
        .iter()
        .map(|r| {
            let (is_live, is_canary) = (r.revision == live, canary.is_some() && r.revision == on_trial);
            let mut shown = json!({
                "revision": r.revision, "create_time": r.create_time, "bytes": r.source.len(),
                "live": is_live, "canary": is_canary,
            });
            if is_canary && let Some((calls, errors)) = trial(state, id) {
                shown["calls"] = calls.into();
                shown["errors"] = errors.into();
            }
            shown
        })
        .collect();
    Ok(Answer::json(200, &json!({ "total": list.len(), "list": list })))
}

/// How the canary does on this node.
fn trial(state: &State, id: &str) -> Option<(u64, u64)> {
    let snapshot = state.published.load();
    snapshot.functions.get(id)?.value.canary.as_ref()?.trial.counts()
}

async fn show(state: &State, id: &str, number: &str) -> Outcome {
    let wanted = number.parse().ok();
    let found = revisions(state, id).await?.into_iter().find(|revision| Some(revision.revision) == wanted);
    let revision = found.ok_or_else(resource::not_found)?;
    Ok(Answer::json(200, &json!(revision)))
}

/// A revision that serves nobody yet: for a canary.
async fn add(state: &State, id: &str, call: &Call) -> Outcome {
    let (_, mut value) = stored(state, id).await?;
    let source = text(&resource::body(state, Kind::Function, call)?, "source");
    let live = number(&value, "revision");
    let canary = value.get("canary").map_or(0, |canary| number(canary, "revision"));
    if let Value::Object(map) = &mut value {
        map.insert("source".into(), source.as_str().into());
    }
    resource::check(state, Kind::Function, id, &value).await?;
    let revision = keep_source(state, id, &source, live).await?;
    prune(state, id, &[revision, live, canary]).await?;
    Ok(Answer::json(201, &json!({ "revision": revision })))
}

async fn rollback(state: &State, id: &str, call: &Call) -> Outcome {
    let wanted = match call.body.is_empty() {
        true => None,
        false => match resource::json_body(state, call)?.get("revision").map(Value::as_u64) {
            None => None,
            Some(Some(number)) => Some(number),
            Some(None) => {
                return Err(Answer::refuse(
                    400,
                    "property \"revision\" validation failed: wrong type: expected integer",
                ));
            }
        },
    };
    make_live(state, id, |value, known| {
        let live = number(value, "revision");
        let before = || known.iter().map(|revision| revision.revision).rfind(|number| *number < live);
        wanted
            .or_else(before)
            .ok_or_else(|| Answer::refuse(400, format!("function [{id}] has no revision before {live}")))
    })
    .await
}

/// The canary becomes what serves.
async fn promote(state: &State, id: &str) -> Outcome {
    make_live(state, id, |value, _| {
        let canary = value.get("canary").map(|canary| number(canary, "revision"));
        canary.ok_or_else(|| Answer::refuse(400, format!("function [{id}] has no canary")))
    })
    .await
}

async fn make_live(state: &State, id: &str, pick: impl Fn(&Value, &[Revision]) -> Outcome<u64>) -> Outcome {
    let mut tries = resource::tries(state, Kind::Function).await;
    loop {
        let (entry, mut value) = stored(state, id).await?;
        let known = revisions(state, id).await?;
        let number = pick(&value, &known)?;
        let Some(revision) = known.into_iter().find(|revision| revision.revision == number) else {
            let text = format!("failed to fetch revision info by revision [{number}], response code: 404");
            return Err(Answer::refuse(404, text));
        };
        // It did compile once; the libraries may be others now.
        state.plugins.compile_function(id, &revision.source).map_err(|e| Answer::refuse(400, e))?;
        if let Value::Object(map) = &mut value {
            map.insert("source".into(), revision.source.into());
            map.insert("revision".into(), number.into());
            map.remove("canary");
            map.remove("backed_out");
        }
        resource::stamp(&mut value, Some(&entry), None);
        let on = Condition::Unmodified(entry.mod_revision);
        let left = time_left(&*state.store, &entry.key, entry.mod_revision).await.map_err(|e| store_error(&e))?;
        match state.store.put(&entry.key, value.to_string(), on, left.of_what_is_there()).await {
            Ok(written) => {
                drop(tries);
                return Ok(resource::done(state, 200, Action::Set, &written).await);
            }
            Err(e) if e.kind() == error::Kind::Conflict && tries.again().await => {}
            Err(e) => return Err(resource::overwritten(&e)),
        }
    }
}

async fn logs(state: &State, id: &str, call: &Call) -> Outcome {
    stored(state, id).await?;
    let max = match call.arg("lines").map(str::parse) {
        None => LINES,
        Some(Ok(n)) if (1..=MAX_LINES).contains(&n) => n,
        Some(_) => {
            return Err(Answer::refuse(
                400,
                format!("invalid argument lines: should be a number from 1 to {MAX_LINES}"),
            ));
        }
    };
    let (lines, total) = functions::known(id).map(|record| record.lines(max)).unwrap_or_default();
    let list: Vec<Value> = lines.iter().map(shown_line).collect();
    Ok(Answer::json(200, &json!({ "list": list, "total": total })))
}

fn shown_line(line: &Line) -> Value {
    json!({ "time": line.time, "level": line.level.name(), "message": line.text })
}

/// `POST /functions/{id}/test`
async fn test(state: &State, id: &str, call: &Call) -> Outcome {
    let mut asked = if call.body.is_empty() { json!({}) } else { resource::json_body(state, call)? };
    if let Some(schema) = schema::resource("function_test") {
        schema.check(&mut asked).map_err(|e| Answer::refuse(400, format!("invalid configuration: {e}")))?;
    }
    let mut function = to_try(state, id, &asked).await?;
    function.limits.timeout = function.limits.timeout.min(LONGEST_TRIAL);
    let request = mock::request(&asked)?;
    let trial = Trial { id: id.into(), function, request, place: Some(mock::FUNCTIONS.take()?) };
    match state.plugins.try_function(state.published.load(), trial).await {
        Ok(tried) => Ok(Answer::json(200, &shown(tried))),
        Err(reason) => Err(Answer::refuse(504, reason)),
    }
}

/// The stored function with what is given in place of it.
async fn to_try(state: &State, id: &str, asked: &Value) -> Outcome<model::Function> {
    let mut value = match stored(state, id).await {
        Ok((_, value)) => value,
        Err(_) if asked.get("source").is_some() => json!({}),
        Err(refusal) => return Err(refusal),
    };
    if let Value::Object(map) = &mut value {
        for field in ["source", "env", "limits", "trusted"] {
            if let Some(given) = asked.get(field) {
                map.insert(field.into(), given.clone());
            }
        }
        map.remove("canary");
    }
    may_trust(state, &value).map_err(|text| Answer::refuse(400, text))?;
    state.plugins.compile_function(id, &text(&value, "source")).map_err(|e| Answer::refuse(400, e))?;
    let context = ParseContext::new(&state.settings.keyring);
    match model::parse(Kind::Function, id, &value.to_string(), &context) {
        Ok(Parsed::Function(function)) => Ok(function),
        Ok(_) => Err(resource::not_found()),
        Err(e) => Err(Answer::refuse(400, e.to_string())),
    }
}

fn shown(tried: Tried) -> Value {
    let Tried { status, headers, mut body, lines, time_ms } = tried;
    let truncated = body.len() > MAX_SHOWN_BODY;
    body.truncate(MAX_SHOWN_BODY);
    let mut fields = Map::new();
    for (name, value) in headers {
        match fields.get_mut(&name) {
            Some(Value::Array(values)) => values.push(value.into()),
            Some(one) => *one = json!([one.take(), value]),
            None => drop(fields.insert(name, value.into())),
        }
    }
    let lines: Vec<Value> = lines.iter().map(shown_line).collect();
    let mut answer = json!({ "status": status, "headers": fields, "logs": lines, "time_ms": time_ms });
    match String::from_utf8(body) {
        Ok(text) => answer["body"] = text.into(),
        Err(bytes) => answer["body_base64"] = STANDARD.encode(bytes.as_bytes()).into(),
    }
    if truncated {
        answer["body_truncated"] = true.into();
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dry_run_shows_several_fields_of_a_name_and_bodies_that_are_no_text() {
        let field = |value: &str| ("A".to_owned(), value.to_owned());
        let headers = vec![field("1"), field("2"), field("3"), ("B".into(), "4".into())];
        let body = vec![b'x'; MAX_SHOWN_BODY + 1];
        let answer = shown(Tried { status: 200, headers, body, ..Tried::default() });
        assert_eq!(answer["headers"], json!({"A": ["1", "2", "3"], "B": "4"}));
        assert_eq!(answer["body"].as_str().map(str::len), Some(MAX_SHOWN_BODY));
        assert_eq!(answer["body_truncated"], true);
        let whole = shown(Tried { body: vec![b'x'; MAX_SHOWN_BODY], ..Tried::default() });
        assert_eq!(whole.get("body_truncated"), None);
        assert_eq!(shown(Tried { body: vec![0xff], ..Tried::default() })["body_base64"], "/w==");
    }
}
