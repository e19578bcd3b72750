//! `/apisix/admin/configs`: the whole configuration as one document (deployment-modes.md, "API-driven"), and checking one that is
//! not to be stored.

use std::{
    collections::HashSet,
    time::{SystemTime, UNIX_EPOCH},
};

use http::{Method, request::Parts};
use serde_json::{Map, Value, json};
use tokio::{
    sync::{Mutex, Semaphore, SemaphorePermit},
    task::yield_now,
};

use super::{
    ROOT, State,
    http::{Answer, Call},
    resource, store_error,
};
use crate::{
    model::Kind,
    store::{
        Standalone,
        file::{id_in, id_of, json_of_yaml},
        standalone::{self, MODIFIED_INDEX},
    },
};

/// Largest document. A hundred thousand routes of some hundred bytes fit in it.
pub(super) const MAX_BODY_BYTES: usize = 64 << 20;
/// Faults that one answer lists.
pub(super) const MAX_FAULTS: usize = 1000;
/// Items that are checked before the control thread looks at what else there is to do: some milliseconds' worth.
const ITEMS_AT_ONCE: usize = 64;
const YAML: &str = "application/yaml";
const DIGEST: &str = "x-digest";
const MODIFIED: &str = "x-last-modified";

type Outcome<T = Answer> = Result<T, Answer>;

/// Bodies of documents that are held at once: more than one, so that a client that stalls holds up nobody.
const BODIES: usize = 4;

/// What documents share.
pub struct Documents {
    /// Taken before a body is read, kept until it is answered.
    bodies: Semaphore,
    /// One document at a time is taken apart, checked, stored and served: checking yields, and another would come between.
    turn: Mutex<()>,
}

impl Default for Documents {
    fn default() -> Self {
        Documents { bodies: Semaphore::new(BODIES), turn: Mutex::new(()) }
    }
}

impl Documents {
    /// Waits for room for a body. `None`: the semaphore is closed, which it never is.
    pub(super) async fn room(&self) -> Option<SemaphorePermit<'_>> {
        self.bodies.acquire().await.ok()
    }
}

/// Whether a request brings a document that may be larger than a resource.
pub(super) fn brings_document(state: &State, head: &Parts) -> bool {
    match (&head.method, head.uri.path().strip_prefix(ROOT)) {
        (&Method::PUT, Some("/configs")) => state.store.clone().standalone().is_some(),
        (&Method::POST, Some("/configs/validate")) => true,
        _ => false,
    }
}

/// What is wrong with one item.
struct Fault {
    kind: Kind,
    /// Counted from 0; `None`: it is the section.
    index: Option<usize>,
    id: Option<String>,
    text: String,
}

impl Fault {
    fn to_json(&self) -> Value {
        let mut fault = json!({ "resource_type": self.kind.plural(), "error": self.text });
        if let Some(index) = self.index {
            fault["index"] = index.into();
        }
        if let Some(id) = &self.id {
            fault["resource_id"] = id.as_str().into();
        }
        fault
    }
}

/// `GET`, `HEAD` and `PUT /configs`.
pub(super) async fn handle(state: &State, call: &Call) -> Outcome {
    let Some(store) = state.store.clone().standalone() else {
        return Err(Answer::refuse(404, "not found: the configuration is not one document (config_provider: yaml)"));
    };
    match call.method {
        Method::GET | Method::HEAD => get(&store, call),
        Method::PUT => put(state, &store, call).await,
        _ => Err(Answer::refuse(404, "not found")),
    }
}

fn get(store: &Standalone, call: &Call) -> Outcome {
    let current = store.current();
    let answer = if call.header("accept").is_some_and(|accept| accept.contains(YAML)) {
        let text = serde_norway::to_string(&current.document).map_err(|e| Answer::refuse(500, e.to_string()))?;
        Answer::yaml(200, text)
    } else {
        Answer::json(200, &current.document)
    };
    Ok(described(answer, current.digest.as_deref(), current.modified_secs))
}

fn described(answer: Answer, digest: Option<&str>, modified_secs: Option<u64>) -> Answer {
    let answer = match modified_secs {
        Some(secs) => answer.header(MODIFIED, &secs.to_string()),
        None => answer,
    };
    match digest {
        Some(digest) => answer.header(DIGEST, digest),
        None => answer,
    }
}

async fn put(state: &State, store: &Standalone, call: &Call) -> Outcome {
    let digest = call.header(DIGEST).ok_or_else(|| Answer::refuse(400, "missing digest header"))?;
    let _turn = state.documents.turn.lock().await;
    if store.digest().as_deref() == Some(digest) {
        return Ok(Answer::text(204, ""));
    }
    let document = document(state, call)?;
    let faults = faults(state, Some(store), &document, 1).await;
    if let Some(fault) = faults.first() {
        return Err(Answer::refuse(400, &fault.text));
    }
    let now_secs = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let revision = store.update(document, digest.to_owned(), now_secs).map_err(|e| store_error(&e))?;
    resource::served(state, revision).await;
    Ok(described(Answer::text(202, ""), Some(digest), Some(now_secs)))
}

/// `POST /configs/validate`: all that is wrong, and nothing is stored.
pub(super) async fn validate(state: &State, call: &Call) -> Outcome {
    let _turn = state.documents.turn.lock().await;
    let document = document(state, call)?;
    let store = state.store.clone().standalone();
    let faults = faults(state, store.as_deref(), &document, MAX_FAULTS).await;
    if faults.is_empty() {
        return Ok(Answer::text(200, ""));
    }
    let errors: Vec<Value> = faults.iter().map(Fault::to_json).collect();
    Err(Answer::json(400, &json!({ "error_msg": "Configuration validation failed", "errors": errors })))
}

/// The body: YAML when it says so, else JSON.
fn document(state: &State, call: &Call) -> Outcome<Map<String, Value>> {
    let refuse = |why: &str| Answer::refuse(400, format!("invalid request body: {why}"));
    if call.body.is_empty() {
        return Err(refuse("empty request body"));
    }
    let value = if call.header("content-type").is_some_and(|kind| kind.contains(YAML)) {
        let text = std::str::from_utf8(&call.body).map_err(|e| refuse(&e.to_string()))?;
        json_of_yaml(text).map_err(|e| refuse(&e.to_string()))?
    } else {
        resource::parse(&call.body).map_err(|e| resource::not_json(state, &call.body, &e))?
    };
    match value {
        Value::Object(map) => Ok(map),
        // An empty document in YAML.
        Value::Null => Ok(Map::new()),
        _ => Err(refuse("an object is expected")),
    }
}

/// The first faults of a document, at most so many.
async fn faults(state: &State, store: Option<&Standalone>, document: &Map<String, Value>, most: usize) -> Vec<Fault> {
    let of_section = |(kind, text)| Fault { kind, index: None, id: None, text };
    let mut faults: Vec<Fault> = match store {
        Some(store) => store.stale(document).into_iter().map(of_section).collect(),
        None => Vec::new(),
    };
    for kind in standalone::kinds() {
        let items = match document.get(kind.plural()) {
            Some(Value::Array(items)) => items,
            None | Some(Value::Null) => continue,
            Some(Value::Object(map)) if map.is_empty() => continue,
            Some(_) => {
                faults.push(of_section((kind, format!("{} must be a list", kind.plural()))));
                continue;
            }
        };
        let mut seen = HashSet::new();
        for (index, item) in items.iter().enumerate() {
            if faults.len() >= most {
                return faults;
            }
            faults.extend(fault_of(state, kind, index, item, &mut seen));
            if index % ITEMS_AT_ONCE == ITEMS_AT_ONCE - 1 {
                yield_now().await;
            }
        }
    }
    faults.truncate(most);
    faults
}

fn fault_of(state: &State, kind: Kind, index: usize, item: &Value, seen: &mut HashSet<String>) -> Option<Fault> {
    let fault = |text: String| Some(Fault { kind, index: Some(index), id: id_of(kind, item), text });
    if let Err(text) = standalone::index_of(item) {
        return fault(text);
    }
    let mut stored = item.clone();
    if let Value::Object(map) = &mut stored {
        map.remove(MODIFIED_INDEX);
    }
    // What will be stored is what is checked.
    let id = id_in(kind, &mut stored, index);
    let own = kind.within(&id);
    if let Err(text) = resource::check_alone(state, own, &id, &stored) {
        return fault(text);
    }
    if seen.insert(id.clone()) {
        return None;
    }
    let plural = kind.plural();
    fault(match own {
        Kind::Consumer => format!("found duplicate username {id} in {plural}"),
        Kind::Credential => format!("found duplicate credential id {id} in {plural}"),
        _ => format!("found duplicate id {id} in {plural}"),
    })
}
