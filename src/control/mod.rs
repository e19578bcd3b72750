//! The control API (control-api.md): what this gateway serves now, for people and tools on its own machine.
//!
//! Reads the published snapshot, asks the workers, and changes nothing but that it has plugins loaded anew.

pub mod status;

use std::{future::Future, pin::Pin, rc::Rc, sync::Arc};

use http::Method;
use serde_json::{Value, json};
use tokio::{net::TcpListener, runtime};

use crate::{
    admin::{
        PluginHost,
        http::{self as api, Answer, Call, Incomplete},
    },
    model::{self, Id, Kind, Object},
    schema,
    store::{Handle, Published, Snapshot, SourceState, snapshot::Table},
};

/// Requests have no body worth reading.
pub(crate) const MAX_BODY_BYTES: usize = 64 * 1024;

/// What is known a while later.
pub type Later = Pin<Box<dyn Future<Output = Value>>>;

pub struct State {
    pub published: Arc<Published>,
    pub source: Arc<SourceState>,
    pub plugins: Rc<dyn PluginHost>,
    /// `None`: plugins cannot be reloaded.
    pub pipeline: Option<Handle>,
    /// Collects garbage in every VM; called for `POST /v1/gc`.
    pub collect: Option<Box<dyn Fn()>>,
    /// The health of upstreams' nodes, as `GET /v1/healthcheck` lists it.
    pub health: Option<Box<dyn Fn() -> Vec<Value>>>,
    /// What every VM of every worker holds, for `GET /v1/lua`.
    pub lua: Option<Box<dyn Fn() -> Later>>,
}

/// Serves the control API on `listener` until `shutdown`. Must run inside a `LocalSet`.
pub async fn serve(listener: TcpListener, state: Rc<State>, shutdown: impl Future<Output = ()>) {
    let handler = move |request: Incomplete| {
        let state = state.clone();
        async move {
            match request.complete(MAX_BODY_BYTES).await {
                Ok(call) => answer(&state, &call).await,
                Err(refusal) => refusal,
            }
        }
    };
    api::serve(listener, None, Rc::new(handler), shutdown).await;
}

async fn answer(state: &State, call: &Call) -> Answer {
    let decoded: Vec<String> = call.path.split('/').filter(|s| !s.is_empty()).map(api::decode).collect();
    let segments: Vec<&str> = decoded.iter().map(String::as_str).collect();
    let snapshot = state.published.load();
    match (&call.method, segments.as_slice()) {
        (&Method::POST, ["v1", "gc"]) => {
            if let Some(collect) = &state.collect {
                collect();
            }
            Answer::text(200, "")
        }
        (&Method::PUT, ["v1", "plugins", "reload"]) => match &state.pipeline {
            Some(pipeline) => match pipeline.reload_plugins().await {
                Ok(_) => Answer::text(200, "done"),
                Err(e) => Answer::refuse(503, e.to_string()),
            },
            None => Answer::refuse(503, "plugins cannot be reloaded"),
        },
        (&Method::GET | &Method::HEAD, ["v1", "lua"]) => match &state.lua {
            Some(held) => {
                let mut held = held().await;
                held["control"] = json!({"tasks": runtime::Handle::current().metrics().num_alive_tasks()});
                Answer::json(200, &held)
            }
            None => not_found(),
        },
        (&Method::GET | &Method::HEAD, ["v1", rest @ ..]) => get(state, &snapshot, rest),
        _ => not_found(),
    }
}

fn get(state: &State, snapshot: &Snapshot, place: &[&str]) -> Answer {
    match place {
        ["schema"] => schemas(state),
        ["plugins"] => {
            let names = state.plugins.list().into_iter().map(|plugin| Value::String(plugin.name));
            Answer::json(200, &Value::Array(names.collect()))
        }
        ["config", "errors"] => errors(state, snapshot),
        ["healthcheck"] => Answer::json(200, &Value::Array(health(state))),
        ["healthcheck", kind, id] => health_of(state, kind, id),
        ["routes"] => all(&snapshot.routes, Kind::Route),
        ["route", id] => one(&snapshot.routes, Kind::Route, id),
        ["services"] => all(&snapshot.services, Kind::Service),
        ["service", id] => one(&snapshot.services, Kind::Service, id),
        ["upstreams"] => all(&snapshot.upstreams, Kind::Upstream),
        ["upstream", id] => one(&snapshot.upstreams, Kind::Upstream, id),
        ["plugin_metadatas"] => metadata(snapshot),
        ["plugin_metadata", name] => match snapshot.plugin_metadata.get(*name) {
            Some(object) => Answer::json_text(200, object.json.to_string()),
            None => Answer::refuse(404, format!("plugin metadata[{name}] not found")),
        },
        _ => not_found(),
    }
}

fn not_found() -> Answer {
    Answer::refuse(404, "404 Not Found")
}

/// As the packed reply, with the plugins that are loaded.
fn schemas(state: &State) -> Answer {
    let mut all: Value = serde_json::from_str(schema::all_json()).unwrap_or_default();
    let loaded = state.plugins.list().into_iter().map(|plugin| (plugin.name, Value::Object(plugin.about)));
    if let Value::Object(all) = &mut all {
        all.insert("plugins".into(), Value::Object(loaded.collect()));
    }
    Answer::json(200, &all)
}

/// Objects that are refused and so not served in their newest version, and how the source does.
fn errors(state: &State, snapshot: &Snapshot) -> Answer {
    let mut errors: Vec<_> = snapshot.errors.values().collect();
    errors.sort_by(|a, b| a.key.cmp(&b.key));
    let list: Vec<Value> = errors
        .iter()
        .map(|e| json!({ "key": e.key.as_ref(), "modifiedIndex": e.revision, "error": e.message }))
        .collect();
    let source = state.source.load();
    let seconds = |t: std::time::SystemTime| t.duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    Answer::json(
        200,
        &json!({
            "errors": list,
            "source": {
                "name": source.name,
                "connected": source.connected,
                "revision": source.revision,
                "served_revision": snapshot.revision,
                "stale_since": source.stale_since.map(seconds),
                "last_error": source.last_error,
            },
        }),
    )
}

fn health(state: &State) -> Vec<Value> {
    state.health.as_ref().map_or_else(Vec::new, |health| health())
}

fn health_of(state: &State, kind: &str, id: &str) -> Answer {
    if !matches!(kind, "routes" | "services" | "upstreams") {
        return Answer::refuse(400, format!("invalid src type {kind}"));
    }
    let name = format!("/{kind}/{id}");
    let found = health(state)
        .into_iter()
        .find(|checker| checker.get("name").and_then(Value::as_str).is_some_and(|own| own.ends_with(&name)));
    match found {
        Some(checker) => Answer::json(200, &checker),
        None => Answer::refuse(404, format!("{kind}[{id}] not found")),
    }
}

fn all<T>(table: &Table<T>, kind: Kind) -> Answer {
    let mut objects: Vec<(&Id, &Arc<Object<T>>)> = table.iter().collect();
    objects.sort_by(|a, b| a.0.cmp(b.0));
    let list: Vec<Value> = objects.iter().map(|(_, object)| shown(object, kind)).collect();
    Answer::json(200, &Value::Array(list))
}

fn one<T>(table: &Table<T>, kind: Kind, id: &str) -> Answer {
    match table.get(id) {
        Some(object) => Answer::json(200, &shown(object, kind)),
        None => Answer::refuse(404, format!("{}[{id}] not found", kind.singular())),
    }
}

/// The object as it is served: defaults filled in, nodes as a list.
fn shown<T>(object: &Object<T>, kind: Kind) -> Value {
    let mut value: Value = serde_json::from_str(&object.json).unwrap_or_default();
    // What is served has passed this check.
    let _ = model::check(kind, &object.id, &mut value);
    let mut has_domain = false;
    for path in ["", "/upstream"] {
        if let Some(nodes) = value.pointer_mut(path).and_then(|upstream| upstream.get_mut("nodes")) {
            has_domain |= list_nodes(nodes);
        }
    }
    json!({
        "key": format!("/{}/{}", kind.plural(), object.id),
        "value": value,
        "createdIndex": object.create_revision,
        "modifiedIndex": object.mod_revision,
        "has_domain": has_domain,
    })
}

/// Makes a list of nodes written as a map; says whether one is a name.
fn list_nodes(nodes: &mut Value) -> bool {
    if let Value::Object(map) = nodes {
        let list = map.iter().map(|(place, weight)| match split(place) {
            (host, Some(port)) => json!({ "host": host, "port": port, "weight": weight }),
            (host, None) => json!({ "host": host, "weight": weight }),
        });
        *nodes = Value::Array(list.collect());
    }
    let hosts = nodes.as_array().into_iter().flatten().filter_map(|node| node.get("host")?.as_str());
    hosts.into_iter().any(|host| host.trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_err())
}

/// `host:port`, brackets kept.
fn split(place: &str) -> (&str, Option<u16>) {
    match place.rsplit_once(':').map(|(host, port)| (host, port.parse())) {
        Some((host, Ok(port))) => (host, Some(port)),
        _ => (place, None),
    }
}

fn metadata(snapshot: &Snapshot) -> Answer {
    let mut objects: Vec<_> = snapshot.plugin_metadata.values().collect();
    objects.sort_by(|a, b| a.id.cmp(&b.id));
    let list = objects.iter().map(|object| serde_json::from_str(&object.json).unwrap_or_default());
    Answer::json(200, &Value::Array(list.collect()))
}
