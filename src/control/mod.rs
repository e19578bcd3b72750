//! The control API (control-api.md): what this gateway serves now, for people and tools on its own machine.
//!
//! Reads the published snapshot and asks the workers, one of which also answers for plugins' own endpoints (`control_api`).

mod health;
pub mod status;

mod sources;

use std::{future::Future, pin::Pin, rc::Rc, sync::Arc};

use bytes::Bytes;
use http::Method;
use serde_json::{Value, json};
use tokio::{net::TcpListener, runtime};

use crate::{
    admin::{
        PluginHost,
        http::{self as api, Answer, Call, Incomplete},
    },
    model::{Id, Kind, Object, Served, with_whole_numbers},
    schema,
    store::{Published, Snapshot, SourceState, snapshot::Table},
};

/// Requests have no body worth reading.
pub(crate) const MAX_BODY_BYTES: usize = 64 * 1024;

/// What is known a while later.
pub type Later<T = Value> = Pin<Box<dyn Future<Output = T>>>;

/// A request for an endpoint of a plugin. Goes to a worker.
#[derive(Debug)]
pub struct PluginCall {
    pub method: String,
    /// As sent.
    pub path: String,
    pub args: String,
    pub headers: Vec<(String, Vec<u8>)>,
    pub body: Bytes,
}

/// What a plugin's endpoint answers.
#[derive(Debug)]
pub struct PluginReply {
    pub status: u16,
    pub content_type: String,
    pub body: Vec<u8>,
}

/// Asks a worker for an endpoint of a plugin: `None` where there is none; an error is why nobody answered.
pub type AskPlugins = Box<dyn Fn(PluginCall) -> Later<Result<Option<PluginReply>, String>>>;

/// Has the plugins loaded anew; an error is why they were not.
pub type AskReload = Box<dyn Fn() -> Later<Result<(), String>>>;

/// Finds a trace by its id.
pub type FindTrace = Box<dyn Fn(&str) -> Option<String>>;

pub struct State {
    /// Before the keys of objects: that of etcd's, nothing where the configuration is a file.
    pub prefix: String,
    pub published: Arc<Published>,
    pub source: Arc<SourceState>,
    pub plugins: Rc<dyn PluginHost>,
    /// Collects garbage in every VM; called for `POST /v1/gc`.
    pub collect: Option<Box<dyn Fn()>>,
    /// The health of upstreams' nodes, as `GET /v1/healthcheck` lists it.
    pub health: Option<Box<dyn Fn() -> Vec<Value>>>,
    /// What every VM of every worker holds, for `GET /v1/lua`.
    pub lua: Option<Box<dyn Fn() -> Later>>,
    /// Loads the plugins anew in every VM, from a configuration that is read again: `PUT /v1/plugins/reload`. Why it cannot, else.
    pub reload: Option<AskReload>,
    /// Endpoints of plugins, asked where no other is.
    pub plugin_apis: Option<AskPlugins>,
    /// The trace of that id as JSON: `GET /v1/trace/{id}`.
    pub trace: Option<FindTrace>,
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
        (&Method::GET | &Method::HEAD, ["v1", "lua"]) => match &state.lua {
            Some(held) => {
                let mut held = held().await;
                held["control"] = json!({"tasks": runtime::Handle::current().metrics().num_alive_tasks()});
                Answer::json(200, &held)
            }
            None => not_found(),
        },
        (&Method::PUT, ["v1", "plugins", "reload"]) => reload(state).await,
        (&Method::GET | &Method::HEAD, ["v1", rest @ ..]) => match get(state, &snapshot, rest, call) {
            Some(answer) => answer,
            None => plugin_api(state, call).await,
        },
        _ => plugin_api(state, call).await,
    }
}

async fn reload(state: &State) -> Answer {
    let Some(reload) = &state.reload else { return not_found() };
    match reload().await {
        Ok(()) => Answer::text(200, "done"),
        Err(why) => Answer::refuse(500, why),
    }
}

/// Answers by what a plugin has for this path and method.
async fn plugin_api(state: &State, call: &Call) -> Answer {
    let Some(ask) = &state.plugin_apis else { return not_found() };
    let headers = call.headers.iter().map(|(name, value)| (name.as_str().to_owned(), value.as_bytes().to_vec()));
    let plugin_call = PluginCall {
        method: call.method.as_str().to_owned(),
        path: call.path.clone(),
        args: call.args.clone(),
        headers: headers.collect(),
        body: call.body.clone(),
    };
    match ask(plugin_call).await {
        Ok(Some(reply)) => Answer::of_type(reply.status, reply.content_type, reply.body),
        Ok(None) => not_found(),
        Err(why) => Answer::refuse(504, why),
    }
}

/// `None`: the gateway itself has nothing there.
fn get(state: &State, snapshot: &Snapshot, place: &[&str], call: &Call) -> Option<Answer> {
    Some(match place {
        ["schema"] => schemas(state),
        ["plugins"] => {
            let names = state.plugins.list().into_iter().map(|plugin| Value::String(plugin.name));
            Answer::json(200, &Value::Array(names.collect()))
        }
        ["config", "errors"] => errors(state, snapshot),
        ["plugin_sources"] => sources::list(state, snapshot),
        ["healthcheck"] => health::all(state, call),
        ["healthcheck", kind, id] => health::one(state, call, kind, id),
        ["trace", id] => match state.trace.as_ref().and_then(|trace| trace(id)) {
            Some(trace) => Answer::json_text(200, trace),
            None => Answer::refuse(404, format!("trace[{id}] not found")),
        },
        ["routes"] => all(state, &snapshot.routes, Kind::Route),
        ["route", id] => one(state, &snapshot.routes, Kind::Route, id),
        ["services"] => all(state, &snapshot.services, Kind::Service),
        ["service", id] => one(state, &snapshot.services, Kind::Service, id),
        ["upstreams"] => all(state, &snapshot.upstreams, Kind::Upstream),
        ["upstream", id] => one(state, &snapshot.upstreams, Kind::Upstream, id),
        ["plugin_metadatas"] => metadata(snapshot),
        ["plugin_metadata", name] => match snapshot.plugin_metadata.get(*name) {
            Some(object) => Answer::json(200, &as_stored(&object.json)),
            None => Answer::refuse(404, format!("plugin metadata[{name}] not found")),
        },
        _ => return None,
    })
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

/// Objects that are refused and so not served in their newest version, plugins that do not load, and how the source does.
fn errors(state: &State, snapshot: &Snapshot) -> Answer {
    let mut errors: Vec<_> = snapshot.errors.values().collect();
    errors.sort_by(|a, b| a.key.cmp(&b.key));
    let mut list: Vec<Value> = errors
        .iter()
        .map(|e| json!({ "key": e.key.as_ref(), "modifiedIndex": e.revision, "error": e.message }))
        .collect();
    let broken = state.plugins.broken().into_iter();
    let broken = broken.filter(|(name, _)| !snapshot.errors.contains_key(format!("/plugin_sources/{name}").as_str()));
    let failed = state.plugins.failed_inits().into_iter().map(|(name, why)| (name, format!("init: {why}")));
    list.extend(broken.chain(failed).map(|(name, why)| json!({ "key": format!("/plugins/{name}"), "error": why })));
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

fn all<T>(state: &State, table: &Table<T>, kind: Kind) -> Answer {
    let mut objects: Vec<(&Id, &Arc<Object<T>>)> = table.iter().collect();
    objects.sort_by(|a, b| a.0.cmp(b.0));
    let list: Vec<Value> = objects.iter().map(|(_, object)| shown(state, object, kind)).collect();
    Answer::json(200, &Value::Array(list))
}

fn one<T>(state: &State, table: &Table<T>, kind: Kind, id: &str) -> Answer {
    match table.get(id) {
        Some(object) => Answer::json(200, &shown(state, object, kind)),
        None => Answer::refuse(404, format!("{}[{id}] not found", kind.singular())),
    }
}

/// The object as it is served: defaults filled in, nodes as a list.
fn shown<T>(state: &State, object: &Object<T>, kind: Kind) -> Value {
    let Served { mut value, has_domain } = Served::of(kind, &object.id, &object.json);
    fill_plugins(&mut value);
    let mut shown = json!({
        "key": format!("{}/{}/{}", state.prefix, kind.plural(), object.id),
        "value": value,
        "createdIndex": object.create_revision,
        "modifiedIndex": object.mod_revision,
        "has_domain": has_domain,
    });
    if kind == Kind::Route {
        shown["orig_modifiedIndex"] = object.mod_revision.into();
    }
    shown
}

/// Plugins as they run: with their defaults, as far as their schemas are APISIX's, and a `_meta`.
fn fill_plugins(value: &mut Value) {
    for (name, conf) in value.get_mut("plugins").and_then(Value::as_object_mut).into_iter().flatten() {
        if let Some(schemas) = schema::plugin(name) {
            // What is served has passed this check.
            let _ = schemas.schema.check(conf);
        }
        if let Some(conf) = conf.as_object_mut() {
            conf.entry("_meta").or_insert_with(|| json!({}));
        }
    }
}

/// An object as the Admin API shows it.
fn as_stored(json: &str) -> Value {
    let mut value = serde_json::from_str(json).unwrap_or_default();
    with_whole_numbers(&mut value);
    value
}

fn metadata(snapshot: &Snapshot) -> Answer {
    let mut objects: Vec<_> = snapshot.plugin_metadata.values().collect();
    objects.sort_by(|a, b| a.id.cmp(&b.id));
    let list = objects.iter().map(|object| as_stored(&object.json));
    Answer::json(200, &Value::Array(list.collect()))
}
