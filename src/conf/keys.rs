//! The file's keys: which are known, which lose their meaning here, which do nothing, and what an unknown one may have meant.

use serde_json::{Map, Value};

use super::Warning;

/// Keys that APISIX knows beside those with a default. A trailing `.*` stands for anything below.
const OPTIONAL: &[&str] = &[
    "apisix.custom_lua_shared_dict.*",
    "apisix.customize_timeout",
    "apisix.disable_upstream_healthcheck",
    "apisix.dns_resolver",
    "apisix.dns_resolver_valid",
    "apisix.events.*",
    "apisix.id",
    "apisix.lua_module_hook",
    "apisix.proxy_protocol.enable_tcp_pp",
    "apisix.proxy_protocol.enable_tcp_pp_to_upstream",
    "apisix.proxy_protocol.listen_http_port",
    "apisix.proxy_protocol.listen_https_port",
    "apisix.ssl.fallback_cert",
    "apisix.ssl.fallback_key",
    "apisix.ssl.fallback_sni",
    "apisix.ssl.listen_port",
    "apisix.ssl.ssl_session_cache",
    "apisix.status.ip",
    "apisix.status.port",
    "apisix.stream_proxy.tcp",
    "apisix.stream_proxy.udp",
    "apisix.trace.header",
    "apisix.trace.keep",
    "apisix.trace.key",
    "apisix.trace.secrets",
    "apisix.trusted_addresses",
    "custom_plugins",
    "deployment.admin.admin_api_mtls.admin_ssl_ca_cert",
    "deployment.admin.admin_api_mtls.admin_ssl_cert",
    "deployment.admin.admin_api_mtls.admin_ssl_cert_key",
    "deployment.admin.https_admin",
    "deployment.certs.*",
    "deployment.etcd.health_check_retry",
    "deployment.etcd.health_check_timeout",
    "deployment.etcd.password",
    "deployment.etcd.resync_delay",
    "deployment.etcd.tls.cert",
    "deployment.etcd.tls.key",
    "deployment.etcd.tls.sni",
    "deployment.etcd.use_grpc",
    "deployment.etcd.user",
    "discovery.dns.order",
    "discovery.dns.resolv_conf",
    "discovery.dns.servers",
    "ext-plugin.*",
    "lua_init.*",
    "lua_listen",
    "lua_locations",
    "lua_options.*",
    "lua_package_cpath",
    "lua_package_path",
    "lua_server.*",
    "lua_shared_dict.*",
    "lua_upstreams.*",
    "nginx_config.envs",
    "nginx_config.http.custom_lua_shared_dict.*",
    "nginx_config.max_pending_timers",
    "nginx_config.stream.real_ip_from",
    "nginx_config.user",
    "nginx_config.worker_rlimit_core",
    "nginx_config.worker_shutdown_timeout",
    "plugin_attr.*",
    "stream_plugins",
    "test_node.*",
    "vault.*",
    "wasm.*",
    "xrpc.*",
];

/// Maps of which each key is somebody's own, but for what is in `OPTIONAL` under it: a registry says itself what it takes.
const OPEN: &[&str] = &["discovery"];

/// Keys whose meaning would be lost: the start stops, with the way out.
const UNSUPPORTED: &[(&str, &str)] = &[
    ("nginx_config.main_configuration_snippet", SNIPPET),
    ("nginx_config.http_configuration_snippet", SNIPPET),
    ("nginx_config.http_server_configuration_snippet", SNIPPET),
    ("nginx_config.http_server_location_configuration_snippet", SNIPPET),
    ("nginx_config.http_admin_configuration_snippet", SNIPPET),
    ("nginx_config.http_end_configuration_snippet", SNIPPET),
    ("nginx_config.stream_configuration_snippet", SNIPPET),
    ("wasm", "there is no WebAssembly host; write the plugin in Lua and upload it through the Admin API"),
    ("xrpc", "xRPC protocols are not served; keep those services on APISIX"),
    ("ext-plugin", "external plugin runners are not started; write the plugin in Lua"),
];

const SNIPPET: &str = "there is no nginx that could read it; express it by routes, plugins or Lua";

/// Known keys that do nothing here, because their job does not exist or needs no tuning.
const WITHOUT_COUNTERPART: &[&str] = &[
    "apisix.disable_sync_configuration_during_start",
    "apisix.enable_resolv_search_opt",
    "apisix.events",
    "apisix.ssl.ssl_ciphers",
    "apisix.enable_reuseport",
    "apisix.ssl.fallback_cert",
    "apisix.ssl.fallback_key",
    "apisix.ssl.ssl_session_cache",
    "apisix.worker_startup_time_threshold",
    "deployment.certs",
    "deployment.etcd.health_check_retry",
    "deployment.etcd.health_check_timeout",
    "deployment.etcd.resync_delay",
    "deployment.etcd.startup_retry",
    "deployment.etcd.use_grpc",
    "deployment.etcd.watch_timeout",
    "nginx_config.http.proxy_ssl_server_name",
    "nginx_config.http.variables_hash_max_size",
    "nginx_config.stream.metrics_zone_size",
    "nginx_config.user",
    "nginx_config.worker_rlimit_core",
    "nginx_config.worker_rlimit_nofile",
];

/// Keys of APISIX 2 and what they are now.
const MOVED: &[(&str, &str)] = &[
    ("apisix.admin_api_mtls", "deployment.admin.admin_api_mtls"),
    ("apisix.admin_key", "deployment.admin.admin_key"),
    ("apisix.allow_admin", "deployment.admin.allow_admin"),
    ("apisix.config_center", "config_provider of the role below deployment"),
    ("apisix.enable_admin_cors", "deployment.admin.enable_admin_cors"),
    ("apisix.https_admin", "deployment.admin.https_admin"),
    ("apisix.port_admin", "deployment.admin.admin_listen.port"),
    ("etcd", "deployment.etcd"),
];

/// What is said of a key that nobody knows.
pub const UNKNOWN: &str = "is not a known key";

/// Looks at every key that was written. Mistakes and warnings name their path.
pub(super) fn look(written: &Value, defaults: &Value, mistakes: &mut Vec<String>) -> Vec<Warning> {
    let mut warnings = Vec::new();
    let allowed = allowed(written);
    for (path, way_out) in unsupported(written) {
        if allowed.contains(&path) {
            warnings.push(Warning(format!("{path}: has no effect: {way_out}")));
        } else {
            mistakes.push(format!(
                "{path}: cannot be honoured: {way_out}. To start without it, add {path} to apisix.allow_unsupported"
            ));
        }
    }
    for path in WITHOUT_COUNTERPART {
        if at(written, path).is_some_and(|value| at(defaults, path) != Some(value)) {
            warnings.push(Warning(format!("{path}: has no effect here")));
        }
    }
    unknown(written, defaults, "", &mut warnings);
    warnings
}

/// The paths that were written and whose meaning would be lost, with the way out.
pub(super) fn unsupported(written: &Value) -> impl Iterator<Item = (&'static str, &'static str)> {
    UNSUPPORTED.iter().copied().filter(|(path, _)| is_used(at(written, path)))
}

fn allowed(written: &Value) -> Vec<&str> {
    let list = at(written, "apisix.allow_unsupported").and_then(Value::as_array);
    list.map(|items| items.iter().filter_map(Value::as_str).collect()).unwrap_or_default()
}

/// Set to something that would do something.
fn is_used(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null | Value::Bool(false)) => false,
        // APISIX's own example file has comments in its snippets.
        Some(Value::String(text)) => text.lines().map(str::trim).any(|line| !line.is_empty() && !line.starts_with('#')),
        Some(Value::Array(items)) => !items.is_empty(),
        Some(Value::Object(map)) => !map.is_empty(),
        Some(_) => true,
    }
}

fn unknown(written: &Value, defaults: &Value, path: &str, warnings: &mut Vec<Warning>) {
    let (Value::Object(map), Value::Object(known)) = (written, defaults) else { return };
    let nothing = Value::Object(Map::new());
    for (key, value) in map {
        let here = join(path, key);
        match known.get(key) {
            Some(default) if !is_free(&here) => unknown(value, default, &here, warnings),
            Some(_) => {}
            None if is_optional(&here) || OPEN.contains(&path) && !has_optional(&here) => {}
            None if OPEN.contains(&&*here) || has_optional(&here) => unknown(value, &nothing, &here, warnings),
            None => match MOVED.iter().find(|(old, _)| *old == here) {
                // APISIX's own tests write `admin_key: null`.
                Some(_) if value.is_null() => {}
                Some((_, new)) => {
                    warnings.push(Warning(format!("{here}: {UNKNOWN}, and has no effect: it is {new} now")))
                }
                None => warnings.push(Warning(format!("{here}: {UNKNOWN}{}", suggestion(key, path, known)))),
            },
        }
    }
}

/// Maps whose keys are the user's own.
fn is_free(path: &str) -> bool {
    path.ends_with("lua_shared_dict") || path == "plugin_attr"
}

fn is_optional(path: &str) -> bool {
    OPTIONAL.iter().any(|known| match known.strip_suffix(".*") {
        Some(start) => path == start || path.strip_prefix(start).is_some_and(|rest| rest.starts_with('.')),
        None => path == *known,
    })
}

/// Whether keys below it are optional ones.
fn has_optional(path: &str) -> bool {
    OPTIONAL.iter().any(|known| known.strip_prefix(path).is_some_and(|rest| rest.starts_with('.')))
}

fn suggestion(key: &str, path: &str, known: &Map<String, Value>) -> String {
    let optional =
        OPTIONAL.iter().filter_map(|o| o.trim_end_matches(".*").strip_prefix(path)).map(|o| o.trim_matches('.'));
    let names = known.keys().map(String::as_str).chain(optional.filter(|o| !o.contains('.')));
    let nearest = names.map(|name| (distance(key, name), name)).min();
    match nearest {
        Some((d, name)) if d <= 3.max(key.len() / 3) => format!("; did you mean {}?", join(path, name)),
        _ => String::new(),
    }
}

/// Levenshtein's distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut left_above = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let cost = (left_above + usize::from(x != *y)).min(row[j] + 1).min(row[j + 1] + 1);
            left_above = row[j + 1];
            row[j + 1] = cost;
        }
    }
    row[b.len()]
}

/// Maps merge, everything else is replaced.
pub(super) fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        // `apisix:` with nothing under it is not a wish to have no defaults.
        (Value::Object(_), Value::Null) => {}
        (into, from) => *into = from,
    }
}

/// The value at `a.b.c`.
pub(super) fn at<'v>(value: &'v Value, path: &str) -> Option<&'v Value> {
    path.split('.').try_fold(value, |value, key| value.get(key))
}

pub(super) fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}
