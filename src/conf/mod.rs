//! config.yaml: as written -> every mistake at once -> a typed `Config`.
//!
//! The defaults are conf/config.default.yaml, packed into the binary: one place, readable by people. A file is read as YAML,
//! environment references are filled in (`env`), it is laid over the defaults, its keys are looked at (`keys`), and what the
//! gateway uses becomes typed (`typed`). Nothing outside this module sees the file's shape.

pub mod admin_key;
pub mod ciphers;
pub mod directives;
pub mod document;
mod env;
mod keys;
pub mod locations;
pub mod outgoing;
pub mod profile;
mod texts;
mod typed;
pub mod upstreams;
mod yaml;

use std::{
    fmt, fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use serde_json::{Value, json};

use crate::error::{Error, Kind, Result};

const DEFAULTS: &str = include_str!("../../conf/config.default.yaml");

pub use keys::UNKNOWN as UNKNOWN_KEY;

/// Where a test node listens that says nothing else: the port that nginx's test suites use, for this machine alone.
const TEST_NODE: (&str, u16) = ("127.0.0.1", 1984);

/// The configuration in use.
#[derive(Clone, Debug)]
pub struct Config {
    /// conf/, logs/ and data/ are relative to it.
    pub prefix: PathBuf,
    /// The file that was named instead of conf/config.yaml, or the profile's.
    pub file: Option<PathBuf>,
    /// The whole effective configuration, defaults filled in: what Lua sees as `local_conf`.
    pub json: Arc<Value>,
    /// Plain listeners for requests.
    pub listen: Vec<Listen>,
    /// Listeners with TLS; empty when `apisix.ssl.enable` is off.
    pub listen_tls: Vec<Listen>,
    /// Sockets of the file system, of `lua_listen`.
    pub listen_unix: Vec<ListenUnix>,
    pub tls: Tls,
    pub router: Router,
    pub delete_uri_tail_slash: bool,
    pub normalize_uri_like_servlet: bool,
    pub match_uri_encoded_slash: bool,
    /// `graphql.max_size`, in bytes.
    pub graphql_max: u64,
    /// `apisix.max_post_args_readable_size`, in bytes.
    pub posted_max: u64,
    pub enable_server_tokens: bool,
    pub show_upstream_status: bool,
    pub client: Client,
    pub upstream_keepalive: Keepalive,
    /// Worker threads.
    pub workers: usize,
    /// How long a drain may take.
    pub shutdown_timeout: Duration,
    /// Client connections of one worker.
    pub worker_connections: usize,
    pub cpu_affinity: bool,
    pub error_log: PathBuf,
    /// `debug` … `emerg`
    pub error_log_level: String,
    pub access_log: Option<AccessLog>,
    pub admin: Option<Admin>,
    pub control: Option<SocketAddr>,
    /// The status API, where `apisix.status` is written.
    pub status: Option<SocketAddr>,
    /// `apisix.trace`: requests that may be traced. `None`: none.
    pub trace: Option<Trace>,
    pub prometheus: Prometheus,
    pub keyring: Vec<String>,
    pub encrypt_fields: bool,
    /// Names to load; those of the default list that do not exist are left out without a word.
    pub plugins: Vec<String>,
    pub plugins_are_default: bool,
    pub extra_lua_path: String,
    pub extra_lua_cpath: String,
    /// `ngx.shared` dictionaries and their sizes in bytes.
    pub shared_dicts: Vec<(String, usize)>,
    pub resolver: Resolver,
    pub lua: LuaLimits,
    /// `lua_options.lua_capture_error_log`: bytes for lines that scripts may read; 0: none.
    pub captured_log: usize,
    /// `lua.preload`: libraries whose symbols `ffi.C` sees.
    pub preload: Vec<String>,
    pub real_ip: RealIp,
    /// For the environment of the process.
    pub envs: Vec<(String, String)>,
    /// `X-Forwarded-*` of these peers is taken as it comes.
    pub trusted_addresses: Vec<IpNet>,
    pub locations: Arc<locations::Locations>,
    pub stream: Stream,
}

/// TCP and UDP proxying.
#[derive(Clone, Debug, Default)]
pub struct Stream {
    /// `apisix.proxy_mode` has it: stream routes may be written.
    pub enabled: bool,
    pub tcp: Vec<StreamListen>,
    pub udp: Vec<SocketAddr>,
    /// `nginx_config.stream.real_ip_from`: whose PROXY protocol headers say who the client is.
    pub real_ip_from: Vec<IpNet>,
    pub access_log: Option<AccessLog>,
}

/// One of `apisix.stream_proxy.tcp`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamListen {
    pub addr: SocketAddr,
    pub tls: bool,
    /// Connections begin with a PROXY protocol header.
    pub proxy_protocol: bool,
    /// So do those to upstreams.
    pub proxy_protocol_to_upstream: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen {
    pub addr: SocketAddr,
    pub http2: bool,
    pub proxy_protocol: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenUnix {
    pub path: PathBuf,
    pub tls: bool,
    pub http2: bool,
    pub proxy_protocol: bool,
}

#[derive(Clone, Debug)]
pub struct Tls {
    /// `TLSv1.2`, `TLSv1.3`
    pub protocols: Vec<String>,
    pub session_tickets: bool,
    pub fallback_sni: Option<String>,
    /// A bundle's path, or `None` for the system's.
    pub trusted_certificate: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Router {
    HostUri,
    Uri,
    UriWithParameter,
}

/// Limits on the client's side.
#[derive(Clone, Debug)]
pub struct Client {
    pub header_timeout: Duration,
    pub body_timeout: Duration,
    pub send_timeout: Duration,
    pub keepalive_timeout: Duration,
    /// 0: no bound.
    pub max_body: u64,
    pub underscores_in_headers: bool,
}

#[derive(Clone, Debug)]
pub struct Keepalive {
    pub size: usize,
    pub requests: u64,
    pub timeout: Duration,
}

#[derive(Clone, Debug)]
pub struct AccessLog {
    pub path: PathBuf,
    pub format: String,
    /// `default`, `json` or `none`
    pub escape: String,
    pub buffer: usize,
}

#[derive(Clone, Debug)]
pub struct Admin {
    pub addr: SocketAddr,
    pub keys: Vec<AdminKey>,
    pub key_required: bool,
    /// `https_admin`
    pub tls: Option<AdminTls>,
    /// Empty: anyone.
    pub allow: Vec<IpNet>,
    pub cors: bool,
}

/// `admin_api_mtls`: files in PEM.
#[derive(Clone, Debug)]
pub struct AdminTls {
    pub cert: PathBuf,
    pub key: PathBuf,
    /// Whoever asks must have a certificate of this CA.
    pub client_ca: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminKey {
    pub name: String,
    /// Empty: to be generated.
    pub key: String,
    /// `admin` or `viewer`
    pub role: String,
}

/// Who may have a request of theirs traced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// The field of the request that holds the key; that of the response which names the trace has `-Id` behind it.
    pub header: String,
    pub key: String,
    /// Traces that are kept.
    pub keep: usize,
    /// Names of fields and arguments whose values a trace does not show, beside those that are known to be secret.
    pub secrets: Box<[Box<str>]>,
}

#[derive(Clone, Debug)]
pub struct Prometheus {
    /// `None`: no server of its own.
    pub addr: Option<SocketAddr>,
    pub uri: String,
    pub prefix: String,
}

#[derive(Clone, Debug)]
pub struct Resolver {
    /// Empty: the system's.
    pub servers: Vec<SocketAddr>,
    /// Instead of the records' own TTL.
    pub valid: Option<Duration>,
    pub timeout: Duration,
    pub ipv6: bool,
}

#[derive(Clone, Debug)]
pub struct LuaLimits {
    /// Time on the CPU without a wait; 0: no limit.
    pub cpu_ms: u64,
    /// Memory of one VM; 0: no limit.
    pub memory_mb: u64,
}

#[derive(Clone, Debug)]
pub struct RealIp {
    pub header: RealIpHeader,
    pub from: Vec<IpNet>,
    pub recursive: bool,
}

/// `real_ip_header`: where a trusted peer says who the client is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RealIpHeader {
    Field(Box<str>),
    /// `proxy_protocol`: in what its connection began with.
    ProxyProtocol,
}

impl From<&str> for RealIpHeader {
    fn from(written: &str) -> Self {
        match written {
            "proxy_protocol" => RealIpHeader::ProxyProtocol,
            field => RealIpHeader::Field(field.into()),
        }
    }
}

/// Something that works differently from what the file's author may expect: `path: text`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning(pub String);

/// Everything wrong with a configuration, one line each: `path: what, and what to do`.
#[derive(Debug)]
pub struct Mistakes(pub Vec<String>);

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for mistake in &self.0 {
            writeln!(f, "{mistake}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Mistakes {}

impl From<Mistakes> for Error {
    fn from(mistakes: Mistakes) -> Self {
        Error::config(Kind::Invalid).context(mistakes.to_string())
    }
}

/// Reads the configuration: `file`, or conf/config.yaml under `prefix`, which may be missing; that of a profile may not.
pub fn load(prefix: &Path, file: Option<&Path>) -> Result<(Config, Vec<Warning>), Mistakes> {
    let one = |text: String| Mistakes(vec![text]);
    profile::check().map_err(one)?;
    let path = file.map_or_else(|| prefix.join(profile::file("config", "yaml")), Path::to_owned);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && file.is_none() => match profile::missing(&path) {
            Some(text) => return Err(one(text)),
            None => String::new(),
        },
        Err(e) => return Err(one(format!("{}: {e}", path.display()))),
    };
    let (mut config, warnings) = parse(prefix, &text).map_err(|Mistakes(lines)| {
        Mistakes(lines.into_iter().map(|line| format!("{}: {line}", path.display())).collect())
    })?;
    if let Some(text) = profile::missing_store(prefix, &config.json) {
        return Err(one(text));
    }
    config.file = file.map(|file| std::path::absolute(file).unwrap_or_else(|_| file.to_owned()));
    Ok((config, warnings))
}

/// The same from a text.
pub fn parse(prefix: &Path, text: &str) -> Result<(Config, Vec<Warning>), Mistakes> {
    let one = |e: String| Mistakes(vec![e]);
    let mut mistakes = Vec::new();
    let Written { json, key_chosen, mut warnings } = written(text, &mut mistakes).map_err(one)?;
    let (_, more, config) = take(prefix, (&json, key_chosen), &mut mistakes).map_err(one)?;
    warnings.extend(more);
    match config {
        Some(config) if mistakes.is_empty() => Ok((config, warnings)),
        _ => Err(Mistakes(mistakes)),
    }
}

/// All that can be said of a file that may be another gateway's: nothing in it ends the reading.
pub struct Survey {
    /// What the file says, environment variables filled in.
    pub written: Value,
    /// That over the defaults.
    pub effective: Value,
    /// `None` when the mistakes leave no configuration.
    pub config: Option<Config>,
    /// Paths whose meaning would be lost, and the way out.
    pub unsupported: Vec<(&'static str, &'static str)>,
    /// What stops the start beside those.
    pub mistakes: Vec<String>,
    pub warnings: Vec<Warning>,
}

/// Reads a configuration as if all that is unsupported were allowed. Fails on what is no YAML map.
pub fn survey(prefix: &Path, text: &str) -> Result<Survey, String> {
    let mut mistakes = Vec::new();
    let Written { json: written, key_chosen, mut warnings } = written(text, &mut mistakes)?;
    let unsupported: Vec<_> = keys::unsupported(&written).collect();
    let paths: Vec<_> = unsupported.iter().map(|(path, _)| *path).collect();
    let mut allowing = written.clone();
    keys::merge(&mut allowing, serde_json::json!({"apisix": {"allow_unsupported": paths}}));
    let (effective, more, config) = take(prefix, (&allowing, key_chosen), &mut mistakes)?;
    warnings.extend(more);
    warnings.retain(|Warning(text)| !paths.iter().any(|path| text.starts_with(&format!("{path}: has no effect: "))));
    Ok(Survey { written, effective, config, unsupported, mistakes, warnings })
}

struct Written {
    /// The file's own map, variables filled in.
    json: Value,
    /// It says something of admin keys.
    key_chosen: bool,
    warnings: Vec<Warning>,
}

fn written(text: &str, mistakes: &mut Vec<String>) -> Result<Written, String> {
    let document = document::yaml(text, None).map_err(|e| format!("not YAML: {e}"))?;
    let warnings = document.repeated.into_iter().map(Warning).collect();
    let mut written = document.value;
    if written.is_null() {
        written = Value::Object(Default::default());
    }
    if !written.is_object() {
        return Err("the file must hold a map: apisix:, deployment:, …".into());
    }
    for list in ["plugins", "stream_plugins"] {
        // `plugins:` with nothing after it lists none.
        if let Some(list) = written.get_mut(list).filter(|list| list.is_null()) {
            *list = Value::Array(Vec::new());
        }
    }
    // Before variables are filled in: one that is not set leaves a key empty, but was meant to be one.
    let key_chosen = chooses_key(&written, &defaults()?);
    env::fill(&mut written, mistakes);
    Ok(Written { json: written, key_chosen, warnings })
}

/// What was written over the defaults: as JSON, and as typed values. `key_chosen`: the file says something of admin keys.
fn take(
    prefix: &Path,
    (written, key_chosen): (&Value, bool),
    mistakes: &mut Vec<String>,
) -> Result<(Value, Vec<Warning>, Option<Config>), String> {
    let mut effective = defaults()?;
    let mut warnings = keys::look(written, &effective, mistakes);
    keys::merge(&mut effective, written.clone());
    if keys::at(written, "test_node").is_some() && keys::at(written, "apisix.node_listen").is_none() {
        effective["apisix"]["node_listen"] = json!([{"ip": TEST_NODE.0, "port": TEST_NODE.1}]);
    }
    if keys::at(written, "test_node").is_some() && keys::at(written, "nginx_config.worker_processes").is_none() {
        // What those suites count, they count in one worker.
        effective["nginx_config"]["worker_processes"] = 1.into();
    }
    if keys::at(written, "test_node").is_some() && keys::at(written, "nginx_config.http.charset").is_none() {
        // Their nginx.conf has none.
        effective["nginx_config"]["http"]["charset"] = "off".into();
    }
    let key_required = keys::at(written, "deployment.admin.admin_key_required") == Some(&Value::Bool(true));
    let on_node = serves_admin(&effective) && has_admin_on_node(&effective);
    if on_node && !key_chosen && !key_required {
        effective["deployment"]["admin"]["admin_key_required"] = false.into();
    }
    if on_node && keys::at(&effective, "deployment.admin.admin_key_required") == Some(&Value::Bool(false)) {
        let text = "the Admin API is on the node's own port, and open: whoever reaches the node may change all";
        warnings.push(Warning(format!("test_node.serve_on_node: {text}")));
    }
    let config = typed::read(prefix, effective.clone(), written, &mut warnings, mistakes);
    Ok((effective, warnings, config))
}

/// Where the two APIs listen in truth, for a test node that has them on its own port: one of the configured ports may be 0.
/// `started_with`: the file that says which these are, also after it has changed.
pub fn note_places(config: &mut Config, started_with: &Value, admin: Option<SocketAddr>, control: Option<SocketAddr>) {
    let on_node = |json| keys::at(json, "test_node.serve_on_node").cloned();
    let apis = on_node(started_with);
    if apis.is_none() && on_node(&config.json).is_none() {
        return;
    }
    let json = Arc::make_mut(&mut config.json);
    for (pointer, addr) in [("/deployment/admin/admin_listen/port", admin), ("/apisix/control/port", control)] {
        if let (Some(port), Some(addr)) = (json.pointer_mut(pointer), addr) {
            *port = addr.port().into();
        }
    }
    let mut read = json.clone();
    if let Some(map) = read.as_object_mut() {
        map.insert("test_node".into(), json!({"serve_on_node": apis}));
    }
    // What is wrong with them was told when they were read first.
    config.locations = Arc::new(locations::read(&read, &config.prefix, &mut Vec::new()));
}

/// Whether this node has an Admin API: a control plane is nothing else, a data plane has none.
fn serves_admin(json: &Value) -> bool {
    match keys::at(json, "deployment.role").and_then(Value::as_str) {
        Some("control_plane") => true,
        Some("data_plane") => false,
        _ => keys::at(json, "apisix.enable_admin") == Some(&Value::Bool(true)),
    }
}

/// A test node that has the Admin API on its own port.
fn has_admin_on_node(json: &Value) -> bool {
    let on_node = keys::at(json, "test_node.serve_on_node").and_then(Value::as_array);
    on_node.is_some_and(|apis| apis.iter().any(|api| api == "admin"))
}

/// Whether a file says anything of admin keys: `null` and the default list do not.
fn chooses_key(written: &Value, defaults: &Value) -> bool {
    let path = "deployment.admin.admin_key";
    keys::at(written, path).is_some_and(|keys| !keys.is_null() && Some(keys) != keys::at(defaults, path))
}

/// conf/config.default.yaml
fn defaults() -> Result<Value, String> {
    serde_norway::from_str(DEFAULTS).map_err(|e| format!("conf/config.default.yaml: {e}"))
}

#[cfg(test)]
mod tests;
