//! The Admin API: APISIX's paths, bodies, status codes and error texts (admin-api.md).
//!
//! Runs on the control thread. A write is answered when it is stored and every request that starts is served by it.
//! Keys are compared in constant time; bodies and connections are bounded.

mod configs;
mod contest;
mod difference;
mod functions;
pub mod http;
mod list;
mod mock;
mod patch;
pub mod plugins;
mod references;
mod resource;
mod revisions;
mod session;
mod settings;
mod shape;
mod sources;
#[cfg(test)]
mod tests;
pub mod tls;

use std::{future::Future, pin::Pin, rc::Rc, sync::Arc, time::Duration};

use ::http::{HeaderMap, Method};
use serde_json::{Value, json};
use tokio::{net::TcpListener, time::timeout};

pub use self::{
    configs::Documents,
    contest::Contest,
    functions::MAX_REVISIONS,
    plugins::{Listed, PackedPlugins, PluginHost, PluginInfo},
    settings::{AdminKey, ApiVersion, Role, Settings, keyring},
    tls::Tls,
};
use self::{
    http::{Answer, Call, Incomplete},
    resource::Target,
    session::Session,
};
use crate::{
    error::{self, Error, Kind as ErrorKind},
    model::{
        Kind,
        crypt::{self, EncryptFields},
    },
    schema,
    store::{Condition, Handle, Published, Store},
};

/// The version of APISIX whose Admin API this is.
pub const APISIX_VERSION: &str = "3.18.0";
/// Where the store has the list of plugins.
const PLUGIN_LIST: &str = "/plugins";
const ROOT: &str = "/apisix/admin";
/// Largest request body: APISIX's bound on what etcd takes.
const MAX_BODY_BYTES: usize = 1_572_864;
/// How long an answer waits for its write to be served. Normally a millisecond; past this the source is in trouble.
const SERVED_PATIENCE: Duration = Duration::from_secs(5);

/// What the handlers work with.
#[derive(Clone)]
pub struct State {
    pub settings: Settings,
    pub store: Arc<dyn Store>,
    pub published: Arc<Published>,
    pub plugins: Rc<dyn PluginHost>,
    /// Encrypted fields of plugins that the packed schemas do not know: the same that the store's parser asks.
    pub fields: Option<Arc<dyn EncryptFields + Send + Sync>>,
    /// `None`: plugins cannot be reloaded.
    pub pipeline: Option<Handle>,
    pub documents: Rc<Documents>,
    pub contest: Rc<Contest>,
    /// Resolves when every worker serves a revision; `None`: there are no workers to ask.
    pub workers: Option<Workers>,
}

/// Asks the workers.
pub type Workers = Rc<dyn Fn(i64) -> Pin<Box<dyn Future<Output = ()>>>>;

impl State {
    fn encrypted(&self) -> Option<&dyn EncryptFields> {
        self.fields.as_deref().map(|fields| fields as &dyn EncryptFields)
    }

    /// Private keys of an `ssls` object or an upstream's `tls` as they are stored.
    fn encrypt_keys(&self, value: &mut Value) {
        resource::for_each_key_owner(value, &mut |map| {
            crypt::with_private_keys(map, &mut |text| Some(self.settings.keyring.encrypt_pkey(text)));
        });
    }
}

/// Serves the Admin API on `listener` until `shutdown`. Must run inside a `LocalSet`.
///
/// `tls`: speaks nothing else.
pub async fn serve(listener: TcpListener, tls: Option<Tls>, state: Rc<State>, shutdown: impl Future<Output = ()>) {
    match timeout(SERVED_PATIENCE, share_list(&state)).await {
        Ok(Ok(())) => {}
        Ok(Err(e)) => tracing::error!("the list of plugins in the store may be another node's: {e}"),
        Err(_) => tracing::error!("the list of plugins in the store may be another node's: the store does not answer"),
    }
    let documents = state.documents.clone();
    let shutdown = async move {
        shutdown.await;
        // Whoever waits is answered before the server ends.
        documents.end();
    };
    let handler = move |request: Incomplete| {
        let state = state.clone();
        async move { handle(&state, request).await }
    };
    http::serve(listener, tls, Rc::new(handler), shutdown).await;
}

async fn handle(state: &State, request: Incomplete) -> Answer {
    let admitted = admit(state, &request);
    let versioned = admitted.is_ok();
    let answer = match admitted {
        Ok(role) => answer(state, request, role).await,
        Err(refusal) => refusal,
    };
    let answer = answer.header("server", &state.settings.server);
    let answer = if versioned { answer.header("x-api-version", state.settings.version.name()) } else { answer };
    if state.settings.cors { with_cors(answer) } else { answer }
}

fn with_cors(answer: Answer) -> Answer {
    answer
        .header("access-control-allow-origin", "*")
        .header("access-control-allow-credentials", "true")
        .header("access-control-expose-headers", "*")
        .header("access-control-allow-methods", "GET, HEAD, PUT, POST, PATCH, DELETE, OPTIONS")
        .header("access-control-allow-headers", "content-type, x-api-key, if-match, if-none-match, x-digest")
        .header("access-control-max-age", "3600")
}

/// Lets in who may come in: by address, then by key. `None`: nobody was asked who they are.
fn admit(state: &State, request: &Incomplete) -> Result<Option<Role>, Answer> {
    let settings = &state.settings;
    if !settings.allows(request.peer) {
        return Err(Answer::refuse(403, "this address is not in deployment.admin.allow_admin"));
    }
    // A browser asks without a key whether it may ask.
    if !settings.key_required || request.head.method == Method::OPTIONS {
        return Ok(None);
    }
    let refuse = |description: &str| {
        let body = json!({ "error_msg": "failed to check token", "description": description });
        Err(Answer::json(401, &body))
    };
    let query = http::parse_query(request.head.uri.query().unwrap_or(""));
    let Some(given) = given_key(&query, &request.head.headers) else {
        return refuse("missing apikey");
    };
    match settings.role_of(&given) {
        None => refuse("wrong apikey"),
        Some(Role::Viewer) if !matches!(request.head.method, Method::GET | Method::HEAD) => {
            refuse("invalid method for role viewer")
        }
        role => Ok(role),
    }
}

/// The argument `api_key`, the header, the cookie.
fn given_key(query: &[(String, String)], headers: &HeaderMap) -> Option<String> {
    if let Some((_, key)) = query.iter().find(|(name, _)| name == "api_key") {
        return Some(key.clone());
    }
    if let Some(key) = headers.get("x-api-key") {
        return key.to_str().ok().map(str::to_owned);
    }
    let cookies = headers.get_all("cookie").iter().filter_map(|v| v.to_str().ok()).flat_map(|v| v.split(';'));
    let mut pairs = cookies.filter_map(|cookie| cookie.trim().split_once('='));
    pairs.find(|(name, _)| *name == "x_api_key").map(|(_, key)| key.to_owned())
}

async fn answer(state: &State, request: Incomplete, role: Option<Role>) -> Answer {
    if request.head.method == Method::OPTIONS {
        return Answer::text(200, "");
    }
    let wait = match state.documents.wait_of(state, &request.head) {
        Ok(wait) => wait,
        Err(refusal) => return refusal,
    };
    let is_document = configs::brings_document(state, &request.head);
    if let (Some(wait), false) = (&wait, is_document) {
        configs::await_change(state, &request.head, wait).await;
    }
    let room = if is_document { state.documents.room().await } else { None };
    let bound = if is_document { configs::MAX_BODY_BYTES } else { MAX_BODY_BYTES };
    let call = match request.complete(bound).await {
        Ok(call) => Call { role, ..call },
        Err(refusal) => return refusal,
    };
    let session = match Session::begin(state, &call) {
        Ok(session) => session,
        Err(refusal) => return refusal,
    };
    let answer = route(session.state(), &call).await.unwrap_or_else(|refusal| refusal);
    let answer = session.finish(answer);
    // Who waits holds no body.
    drop((call, room));
    match wait.filter(|_| is_document) {
        Some(wait) => configs::await_served(state, answer, &wait).await,
        None => answer,
    }
}

async fn route(state: &State, call: &Call) -> Result<Answer, Answer> {
    let Some(rest) = call.path.strip_prefix(ROOT) else {
        return Err(Answer::refuse(404, "not found"));
    };
    let decoded: Vec<String> = rest.split('/').filter(|s| !s.is_empty()).map(http::decode_path).collect();
    // A decoded slash would reach another object than the path names.
    if decoded.iter().any(|segment| segment.contains(['/', '\0'])) {
        return Err(Answer::refuse(400, "invalid path"));
    }
    let segments: Vec<&str> = decoded.iter().map(String::as_str).collect();
    match (&call.method, segments.as_slice()) {
        (&Method::GET | &Method::HEAD, []) => Ok(Answer::text(200, "")),
        (&Method::PUT, ["plugins", "reload"]) => reload(state).await,
        (&Method::GET, ["plugins", "reload"]) => {
            Err(Answer::refuse(405, "please use PUT method to reload the plugins, GET method is not allowed."))
        }
        (&Method::GET | &Method::HEAD, ["plugins"]) => Ok(plugins::get(&*state.plugins, call, None)),
        (&Method::GET | &Method::HEAD, ["plugins", name]) => Ok(plugins::get(&*state.plugins, call, Some(name))),
        (&Method::POST, ["schema", "validate", resource]) => validate(call, resource),
        (&Method::GET | &Method::HEAD, ["schema", place @ ..]) => Ok(plugins::get_schema(&*state.plugins, call, place)),
        (_, ["plugin_sources", name, action @ ..])
            if action.first().is_some_and(|action| sources::is_action(call, action)) =>
        {
            sources::handle(state, call, name, action).await
        }
        (_, ["revisions", place @ ..]) => revisions::handle(state, call, place).await,
        (&Method::POST, ["configs", "validate"]) => configs::validate(state, call).await,
        (_, ["configs"]) => configs::handle(state, call).await,
        (_, []) => Err(Answer::refuse(404, "not found")),
        (_, ["functions", id, action @ ..]) if action.first().is_some_and(|a| functions::is_action(call, a)) => {
            functions::handle(state, id, action, call).await
        }
        (_, segments) => match Target::of(segments) {
            Some(target) => resource::handle(state, target, call).await,
            None => Err(Answer::refuse(404, format!("Unsupported resource type: {}", segments[0]))),
        },
    }
}

async fn reload(state: &State) -> Result<Answer, Answer> {
    let Some(pipeline) = &state.pipeline else {
        return Err(Answer::refuse(503, "plugins cannot be reloaded"));
    };
    share_list(state).await.map_err(|e| store_error(&e))?;
    match pipeline.reload_plugins().await {
        Ok(_) => {
            resource::taken_over(state, state.published.load().revision).await;
            Ok(Answer::text(200, "done"))
        }
        Err(e) => Err(store_error(&e)),
    }
}

/// The plugins of a cluster are those of the list that its nodes share: what the configuration file of the node with the Admin API
/// lists, as it was when the node started or reloaded its plugins. APISIX's own list need not be shared.
async fn share_list(state: &State) -> error::Result<()> {
    if state.store.name() != "etcd" {
        return Ok(());
    }
    let Some(listed) = state.plugins.listed() else { return Ok(()) };
    let stored = state.store.get(PLUGIN_LIST).await?;
    let known = stored.map(|entry| serde_json::from_str::<Value>(&entry.value).unwrap_or_default());
    if known.as_ref().map_or(listed.is_default, |known| *known == listed.names) {
        return Ok(());
    }
    let written = state.store.put(PLUGIN_LIST, listed.names.to_string(), Condition::Always, None).await?;
    tracing::info!("sync local conf to etcd");
    resource::served(state, written.revision).await;
    Ok(())
}

/// `POST /schema/validate/{resource}`: the schema alone, no references.
fn validate(call: &Call, resource: &str) -> Result<Answer, Answer> {
    let kind = Kind::ALL.into_iter().find(|kind| kind.plural() == resource);
    let Some(schema) = kind.and_then(|kind| schema::resource(kind.singular())) else {
        return Err(Answer::refuse(400, format!("Unsupported resource type: {resource}")));
    };
    let mut value =
        resource::parse(&call.body).map_err(|e| Answer::refuse(400, format!("invalid request body: {e}")))?;
    match schema.check(&mut value) {
        Ok(()) => Ok(Answer::text(200, "")),
        Err(text) => Err(Answer::refuse(400, text)),
    }
}

/// A store that refuses or fails.
fn store_error(e: &Error) -> Answer {
    let status = match e.kind() {
        ErrorKind::Conflict => 409,
        ErrorKind::Invalid | ErrorKind::TooLarge | ErrorKind::Malformed => 400,
        ErrorKind::NotFound => 404,
        ErrorKind::Unavailable | ErrorKind::ConnectRefused | ErrorKind::ConnectTimeout => 503,
        _ => 500,
    };
    Answer::refuse(status, e.to_string())
}
