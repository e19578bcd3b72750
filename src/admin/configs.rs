//! `/apisix/admin/configs`: the whole configuration as one document (deployment-modes.md, "API-driven"), and checking one that is
//! not to be stored.

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use ::http::{Method, request::Parts};
use serde_json::{Map, Value, json};
use tokio::{
    sync::{Mutex, Semaphore, SemaphorePermit, watch},
    task::{spawn_blocking, yield_now},
    time::timeout,
};

use super::{
    ROOT, State,
    http::{self, Answer, Call},
    resource, session, store_error,
};
use crate::{
    error::{self, Error},
    model::{self, Kind, PluginSource},
    store::{
        Standalone,
        file::{id_in, id_of, json_of_yaml},
        revisions::Note,
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

/// Clients that wait at once (`?wait=`): deployment tools, some for each of the nodes that they know. Half of what the Admin API serves.
const WAITING: usize = 128;
/// The longest wait in milliseconds: what lies between waits no longer by default.
const LONGEST_WAIT_MS: u64 = 60_000;
/// When a client that finds no place to wait is to ask again, in seconds.
const RETRY_AFTER: &str = "1";

/// What documents share.
pub struct Documents {
    /// Taken before a body is read, kept until it is answered.
    bodies: Semaphore,
    /// One document at a time is taken apart, checked, stored and served: checking yields, and another would come between.
    turn: Mutex<()>,
    /// Who waits for something to happen.
    waiting: Semaphore,
    /// The gateway ends: nobody waits any more.
    ending: watch::Sender<bool>,
}

impl Default for Documents {
    fn default() -> Self {
        Documents {
            bodies: Semaphore::new(BODIES),
            turn: Mutex::new(()),
            waiting: Semaphore::new(WAITING),
            ending: watch::Sender::new(false),
        }
    }
}

/// A client that may wait: as long as it is there, for so long.
pub(super) struct Wait<'a> {
    patience: Duration,
    _place: SemaphorePermit<'a>,
}

impl Documents {
    /// Nobody waits from now on.
    pub(super) fn end(&self) {
        self.ending.send_replace(true);
    }

    /// Whether it came to be before the client's time, or the gateway's, was over.
    async fn wait_for(&self, wait: &Wait<'_>, fact: impl Future<Output = ()>) -> bool {
        let mut ending = self.ending.subscribe();
        tokio::select! {
            done = timeout(wait.patience, fact) => done.is_ok(),
            // The sender lives in `self`.
            _ = ending.wait_for(|ending| *ending) => false,
        }
    }

    /// What `?wait=` asks for.
    pub(super) fn wait_of(&self, state: &State, head: &Parts) -> Outcome<Option<Wait<'_>>> {
        let may_wait = matches!(head.method, Method::GET | Method::HEAD | Method::PUT);
        if !is_document(head.uri.path()) || !may_wait || state.store.clone().standalone().is_none() {
            return Ok(None);
        }
        let query = http::parse_query(head.uri.query().unwrap_or(""));
        let Some((_, given)) = query.into_iter().find(|(name, _)| name == "wait") else { return Ok(None) };
        let Some(ms) = given.parse::<u64>().ok().filter(|_| given.bytes().all(|b| b.is_ascii_digit())) else {
            return Err(Answer::refuse(400, "invalid argument wait: should be a number of milliseconds"));
        };
        let place = self.waiting.try_acquire().map_err(|_| {
            let text = format!("{WAITING} clients wait already: try again later");
            Answer::refuse(503, text).header("retry-after", RETRY_AFTER)
        })?;
        Ok(Some(Wait { patience: Duration::from_millis(ms.min(LONGEST_WAIT_MS)), _place: place }))
    }

    /// Waits for room for a body. `None`: the semaphore is closed, which it never is.
    pub(super) async fn room(&self) -> Option<SemaphorePermit<'_>> {
        self.bodies.acquire().await.ok()
    }
}

/// Whether a path names the document.
pub(super) fn is_document(path: &str) -> bool {
    path.strip_prefix(ROOT) == Some("/configs")
}

/// Whether a request brings a document that may be larger than a resource.
pub(super) fn brings_document(state: &State, head: &Parts) -> bool {
    match (&head.method, head.uri.path().strip_prefix(ROOT)) {
        (&Method::PUT, Some("/configs")) => state.store.clone().standalone().is_some(),
        (&Method::POST, Some("/configs/validate")) => true,
        _ => false,
    }
}

/// Holds the answer to a GET or HEAD until the document is another one than the client knows, by `X-Digest` or `If-None-Match`.
pub(super) async fn await_change(state: &State, head: &Parts, wait: &Wait<'_>) {
    let Some(store) = state.store.clone().standalone() else { return };
    let header = |name: &str| head.headers.get(name).and_then(|value| value.to_str().ok());
    let Some(known) = known_digest(header) else { return };
    let mut updates = store.subscribe();
    let differs = async {
        while store.digest().is_some_and(|digest| known.iter().any(|known| *known == digest)) {
            // The sender lives in the store.
            if updates.changed().await.is_err() {
                return;
            }
        }
    };
    state.documents.wait_for(wait, differs).await;
}

/// The digests that a client knows.
fn known_digest<'h>(header: impl Fn(&str) -> Option<&'h str>) -> Option<Vec<&'h str>> {
    match (header(DIGEST), header("if-none-match")) {
        (Some(digest), _) => Some(vec![digest]),
        (None, Some(tags)) => Some(tags.split(',').map(untagged).collect()),
        (None, None) => None,
    }
}

/// `"d"` and `W/"d"` are `d`.
fn untagged(tag: &str) -> &str {
    let tag = tag.trim();
    let tag = tag.strip_prefix("W/").unwrap_or(tag);
    tag.strip_prefix('"').and_then(|tag| tag.strip_suffix('"')).unwrap_or(tag)
}

/// Holds the answer to a PUT until every worker serves the document.
pub(super) async fn await_served(state: &State, answer: Answer, wait: &Wait<'_>) -> Answer {
    let Some(store) = state.store.clone().standalone().filter(|_| answer.status.is_success()) else { return answer };
    let revision = store.revision();
    let serves = async {
        state.published.reached(revision).await;
        if let Some(workers) = &state.workers {
            workers(revision).await;
        }
    };
    let served = state.documents.wait_for(wait, serves).await;
    let unchanged = answer.status == 204;
    match served {
        true if unchanged => answer,
        true => answer.with_json(200, &json!({ "served": true, "revision": revision })),
        false => {
            let ms = wait.patience.as_millis();
            let text = format!("the document is stored, but not every worker serves it after {ms} ms");
            answer.with_json(202, &json!({ "served": false, "revision": revision, "message": text }))
        }
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
        Method::GET | Method::HEAD => Ok(get(&store, call)?),
        Method::PUT => put(state, &store, call).await,
        _ => Err(Answer::refuse(404, "not found")),
    }
}

fn get(store: &Standalone, call: &Call) -> Outcome {
    let current = store.current();
    // Who waits says by X-Digest, too, what is known already.
    let header = |name: &str| call.header(name).filter(|_| name != DIGEST || call.arg("wait").is_some());
    let known = known_digest(header).unwrap_or_default();
    let is_known = current.digest.as_deref().is_some_and(|digest| known.contains(&digest));
    let answer = if is_known {
        Answer::text(304, "")
    } else if call.header("accept").is_some_and(|accept| accept.contains(YAML)) {
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
        Some(digest) => answer.header(DIGEST, digest).header("etag", &format!("\"{digest}\"")),
        None => answer,
    }
}

async fn put(state: &State, store: &Standalone, call: &Call) -> Outcome {
    let digest = call.header(DIGEST).ok_or_else(|| Answer::refuse(400, "missing digest header"))?;
    let _turn = state.documents.turn.lock().await;
    if store.digest().as_deref() == Some(digest) {
        return Ok(Answer::text(204, ""));
    }
    meets_condition(store, call)?;
    let document = document(state, call)?;
    let faults = faults(state, Some(store), &document, 1).await;
    if let Some(fault) = faults.first() {
        return Err(Answer::refuse(400, &fault.text));
    }
    let now_secs = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let updated = store.update(document, digest.to_owned(), now_secs).map_err(|e| store_error(&e))?;
    let (revision, changes) = (updated.revision, updated.changes);
    let (history, note) =
        (state.store.clone().standalone(), Note { who: session::who(state, call).into(), refers_to: None });
    let kept = spawn_blocking(move || history.map_or(Ok(()), |store| store.keep(revision, &note, changes))).await;
    if let Err(e) = kept.unwrap_or_else(|e| Err(Error::internal(error::Kind::Other).cause(e))) {
        // The document itself is sound.
        tracing::error!("revision {revision} is not kept: {e}");
    }
    if call.arg("wait").is_none() {
        resource::served(state, revision).await;
    }
    Ok(described(Answer::text(202, ""), Some(digest), Some(now_secs)))
}

/// `If-Match` and `If-None-Match` of a PUT, by the digest of what is served; `*` is any.
fn meets_condition(store: &Standalone, call: &Call) -> Outcome<()> {
    let digest = store.digest();
    let names = |header: &str| {
        let mut tags = call.header(header)?.split(',').map(untagged);
        Some(digest.as_deref().is_some_and(|digest| tags.any(|tag| tag == "*" || tag == digest)))
    };
    if names("if-match") != Some(false) && names("if-none-match") != Some(true) {
        return Ok(());
    }
    let text = match &digest {
        Some(digest) => format!("the document's digest is {digest}"),
        None => "there is no document yet".to_owned(),
    };
    Err(described(Answer::refuse(412, text), digest.as_deref(), None))
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
        let (mut value, repeated) = json_of_yaml(text).map_err(|e| refuse(&e.to_string()))?;
        for key in repeated {
            tracing::warn!("{} {}: {key}", call.method, call.path);
        }
        model::with_whole_numbers(&mut value);
        value
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
    let with_sources = with_sources(state, store, document);
    let state = with_sources.as_ref().unwrap_or(state);
    // What is wrong with a plugin is told before what wants it.
    let (sources, others): (Vec<Kind>, Vec<Kind>) = standalone::kinds().partition(|kind| *kind == Kind::PluginSource);
    for kind in sources.into_iter().chain(others) {
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

/// The plugins as they are with the sources that a document brings; `None`: as they are now.
fn with_sources(state: &State, store: Option<&Standalone>, document: &Map<String, Value>) -> Option<State> {
    let kind = Kind::PluginSource;
    // Of the version that is served, those that are served stay.
    if store.is_some_and(|store| store.serves(document, kind)) {
        return None;
    }
    let items = document.get(kind.plural()).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let mut sources = HashMap::new();
    for (index, item) in items.iter().enumerate() {
        let mut item = item.clone();
        if let Value::Object(map) = &mut item {
            map.remove(MODIFIED_INDEX);
        }
        let id = id_in(kind, &mut item, index);
        // What is no source is told as a fault.
        let Some(source) = item.as_object().and_then(|map| PluginSource::from_json(map).ok()) else { continue };
        sources.insert(id, (item.to_string(), source));
    }
    let served = &state.published.load().plugin_sources;
    // Beside another store a document is only checked, by what it has beside what there is.
    let same = |(id, (text, _)): (&String, &(String, PluginSource))| {
        served.get(id.as_str()).is_some_and(|served| *served.json == **text)
    };
    if sources.iter().all(same) && (store.is_none() || sources.len() == served.len()) {
        return None;
    }
    let sources = sources.into_iter().map(|(id, (_, source))| (id, source)).collect();
    Some(State { plugins: state.plugins.with_sources(sources)?, ..state.clone() })
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
