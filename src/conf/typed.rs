//! From the effective configuration to typed values; every mistake is noted with its path, and reading goes on.

mod ports;
mod proxy_protocol;
mod stream;

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use ipnet::IpNet;
use serde_json::Value;

use self::ports::Taker;
use super::{
    AccessLog, Admin, AdminKey, AdminTls, Client, Config, Keepalive, Listen, ListenUnix, LuaLimits, Prometheus, RealIp,
    Resolver, Router, Tls, Trace, Warning, keys::at, locations, locations::Options, outgoing::Charset,
};

/// Worker threads that `auto` never exceeds: each costs a VM.
const MAX_WORKERS: usize = 512;

/// Sizes past this are typos: no dictionary or body bound needs a tebibyte.
const MAX_SIZE: u64 = 1 << 40;

/// Where the status API listens when `apisix.status` does not say it.
const STATUS_IP: &str = "127.0.0.1";
const STATUS_PORT: u16 = 7085;

/// The field that asks for a trace.
const TRACE_HEADER: &str = "X-Moongate-Trace";
/// A shorter key can be found by trying.
const MIN_TRACE_KEY: usize = 16;
/// Traces that are kept: more than an operator looks at in a sitting; at 10 KB each, which is a lot for one, a megabyte.
const TRACES: usize = 100;
/// Each may take some hundred kilobytes.
const MAX_TRACES: u64 = 10_000;

/// `lua_capture_error_log` must be larger than a line of nginx's.
const MIN_CAPTURED_LOG: u64 = 4096;

pub(super) fn read(
    prefix: &Path,
    json: Value,
    written: &Value,
    warnings: &mut Vec<Warning>,
    mistakes: &mut Vec<String>,
) -> Option<Config> {
    let prefix = std::path::absolute(prefix).unwrap_or_else(|_| prefix.to_owned());
    let mut r = Reader { json: &json, mistakes };
    r.role();
    r.etcd(&prefix);
    let mut listen = r.listeners("apisix.node_listen", warnings);
    let mut listen_tls = match r.flag("apisix.ssl.enable") {
        true => r.listeners("apisix.ssl.listen", warnings),
        false => Vec::new(),
    };
    r.proxy_protocol(&mut listen, &mut listen_tls, warnings);
    let listen_unix = r.lua_listen(&mut listen, &mut listen_tls, &prefix);
    let tls = r.tls(&prefix, warnings);
    let router = r.one_of(
        "apisix.router.http",
        &[
            ("radixtree_host_uri", Router::HostUri),
            ("radixtree_uri", Router::Uri),
            ("radixtree_uri_with_parameter", Router::UriWithParameter),
        ],
    );
    let workers = r.workers();
    let client = r.client();
    if let Some(what) = Charset::mistake_of_routes(&json) {
        r.wrong("nginx_config.http.charset", what);
    }
    let upstream_keepalive = r.upstream_keepalive();
    let (error_log, error_log_level) = r.error_log(&prefix);
    let access_log = r.access_log(&prefix, "nginx_config.http");
    let admin = r.admin(&prefix, warnings);
    let control = r.control();
    let status = r.status();
    let trace = r.trace();
    let prometheus = r.prometheus();
    let plugins = r.texts("plugins");
    let shared_dicts = r.shared_dicts();
    let resolver = r.resolver(warnings);
    let real_ip = r.real_ip();
    let envs = r.envs();
    let trusted_addresses = r.networks("apisix.trusted_addresses");
    let (keyring, encrypt_fields) = r.keyring();
    let captured_log = r.captured_log();
    let preload = r.texts("lua.preload");
    // Read from the JSON by those that it is for.
    r.flag("lua.trusted_functions");
    let (serves_http, mut stream) = r.stream(&prefix, warnings);
    // A control plane serves the Admin API alone.
    let is_control_plane = r.text("deployment.role") == "control_plane";
    if !serves_http || is_control_plane {
        listen.clear();
        listen_tls.clear();
    }
    if is_control_plane {
        stream.tcp.clear();
        stream.udp.clear();
    }
    let of_workers = |name, path, addrs| Taker { name, path, addrs, of_workers: true };
    let api =
        |name, path, addr: Option<SocketAddr>| Taker { name, path, addrs: Vec::from_iter(addr), of_workers: false };
    r.conflicts(&[
        of_workers("http listen", "apisix.node_listen", listen.iter().map(|l| l.addr).collect()),
        of_workers("https listen", "apisix.ssl.listen", listen_tls.iter().map(|l| l.addr).collect()),
        of_workers("stream", "apisix.stream_proxy.tcp", stream.tcp.iter().map(|l| l.addr).collect()),
        api("prometheus", "plugin_attr.prometheus.export_addr", prometheus.addr),
        api("status", "apisix.status", status),
        api("admin", "deployment.admin.admin_listen", admin.as_ref().map(|admin| admin.addr)),
        api("control", "apisix.control", control),
    ]);
    let locations = Arc::new(locations::read(&json, &prefix, r.mistakes));
    Some(Config {
        listen,
        listen_tls,
        listen_unix,
        tls,
        router: router?,
        delete_uri_tail_slash: r.flag("apisix.delete_uri_tail_slash"),
        normalize_uri_like_servlet: r.flag("apisix.normalize_uri_like_servlet"),
        match_uri_encoded_slash: r.flag("apisix.match_uri_encoded_slash"),
        graphql_max: r.number("graphql.max_size", 1, u64::MAX),
        posted_max: r.posted_max(),
        enable_server_tokens: r.flag("apisix.enable_server_tokens"),
        show_upstream_status: r.flag("apisix.show_upstream_status_in_response_header"),
        client,
        upstream_keepalive,
        workers,
        shutdown_timeout: r.duration("nginx_config.worker_shutdown_timeout"),
        worker_connections: r.number("nginx_config.event.worker_connections", 1, 10_000_000) as usize,
        cpu_affinity: r.flag("nginx_config.enable_cpu_affinity"),
        error_log,
        error_log_level,
        access_log,
        admin,
        control,
        status,
        trace,
        prometheus,
        keyring,
        encrypt_fields,
        plugins,
        plugins_are_default: at(written, "plugins").is_none(),
        extra_lua_path: r.text("apisix.extra_lua_path"),
        extra_lua_cpath: r.text("apisix.extra_lua_cpath"),
        shared_dicts,
        resolver,
        lua: LuaLimits {
            cpu_ms: r.number("lua.limits.cpu_ms", 0, 86_400_000),
            memory_mb: r.number("lua.limits.memory_mb", 0, 1 << 20),
        },
        captured_log,
        preload,
        real_ip,
        envs,
        trusted_addresses,
        locations,
        stream,
        prefix,
        file: None,
        json: Arc::new(json.clone()),
    })
}

/// What may be said of a listener.
const LISTENER_KEYS: [&str; 5] = ["ip", "port", "enable_http2", "enable_http3", "proxy_protocol"];

/// Why this names no member of an etcd cluster; nothing when it does: `http://127.0.0.1:2379`.
fn not_a_member(host: &Value) -> Option<String> {
    let Some(text) = host.as_str() else { return Some(format!("{host} is not a URL")) };
    let url = text.parse::<http::Uri>().ok();
    let scheme = url.as_ref().and_then(|url| url.scheme_str());
    if !matches!(scheme, Some("http" | "https")) {
        return Some(format!("{text:?} does not start with http:// or https://"));
    }
    let port = text.rsplit_once(':').map_or("", |(_, port)| port.trim_end_matches('/'));
    let bad_port = port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_err();
    let no_host = url.and_then(|url| url.host().map(str::is_empty)).unwrap_or(true);
    (no_host || bad_port).then(|| format!("{text:?} is not a URL of a host and a port"))
}

struct Reader<'a> {
    json: &'a Value,
    mistakes: &'a mut Vec<String>,
}

impl<'a> Reader<'a> {
    fn get(&self, path: &str) -> Option<&'a Value> {
        at(self.json, path).filter(|value| !value.is_null())
    }

    fn wrong(&mut self, path: &str, what: impl std::fmt::Display) {
        self.mistakes.push(format!("{path}: {what}"));
    }

    fn flag(&mut self, path: &str) -> bool {
        match self.get(path) {
            None => false,
            Some(Value::Bool(b)) => *b,
            // nginx's own words, which APISIX uses in nginx_config.
            Some(Value::String(s)) if s == "on" => true,
            Some(Value::String(s)) if s == "off" => false,
            Some(other) => {
                self.wrong(path, format!("{other} is not a boolean; write true or false"));
                false
            }
        }
    }

    fn text(&mut self, path: &str) -> String {
        match self.get(path) {
            None => String::new(),
            Some(Value::String(s)) => s.clone(),
            Some(Value::Number(n)) => n.to_string(),
            Some(other) => {
                self.wrong(path, format!("{other} is not a text"));
                String::new()
            }
        }
    }

    fn texts(&mut self, path: &str) -> Vec<String> {
        let items = match self.get(path) {
            None => return Vec::new(),
            Some(Value::Array(items)) => items,
            Some(other) => {
                self.wrong(path, format!("{other} is not a list"));
                return Vec::new();
            }
        };
        let texts = items.iter().enumerate().filter_map(|(i, item)| {
            let text = item.as_str().map(str::to_owned);
            if text.is_none() {
                self.wrong(&format!("{path}[{i}]"), format!("{item} is not a text"));
            }
            text
        });
        texts.collect()
    }

    fn number(&mut self, path: &str, least: u64, most: u64) -> u64 {
        let Some(value) = self.get(path) else { return least };
        let number = value.as_u64().or_else(|| value.as_str().and_then(|s| s.parse().ok()));
        match number {
            Some(n) if (least..=most).contains(&n) => n,
            _ => {
                self.wrong(path, format!("{value} is not a whole number from {least} to {most}"));
                least
            }
        }
    }

    /// `max_post_args_readable_size` is in MB; 0: no limit.
    fn posted_max(&mut self) -> u64 {
        match self.number("apisix.max_post_args_readable_size", 0, u64::MAX >> 20) {
            0 => u64::MAX,
            n => n << 20,
        }
    }

    /// nginx's `60s`, `5m`, `100ms`, `1h30m`; a bare number counts seconds.
    fn duration(&mut self, path: &str) -> Duration {
        let Some(value) = self.get(path) else { return Duration::ZERO };
        let parsed = match value {
            Value::Number(n) => n.as_f64().and_then(|s| Duration::try_from_secs_f64(s).ok()),
            Value::String(s) => duration(s),
            _ => None,
        };
        parsed.unwrap_or_else(|| {
            self.wrong(path, format!("{value} is not a time; write 60s, 5m or 100ms"));
            Duration::ZERO
        })
    }

    /// nginx's `10m`, `1g`, `512k`; a bare number counts bytes.
    fn size(&mut self, path: &str) -> u64 {
        let Some(value) = self.get(path) else { return 0 };
        let parsed = match value {
            Value::Number(n) => n.as_u64(),
            Value::String(s) => size(s),
            _ => None,
        };
        parsed.filter(|n| *n <= MAX_SIZE).unwrap_or_else(|| {
            self.wrong(path, format!("{value} is not a size; write 512k, 10m or 1g"));
            0
        })
    }

    fn one_of<T: Copy>(&mut self, path: &str, choices: &[(&str, T)]) -> Option<T> {
        let text = self.text(path);
        let found = choices.iter().find(|(name, _)| *name == text).map(|(_, value)| *value);
        if found.is_none() {
            let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
            self.wrong(path, format!("{text:?} is not one of {}", names.join(", ")));
        }
        found
    }

    fn role(&mut self) {
        let roles = [("traditional", ()), ("data_plane", ()), ("control_plane", ())];
        if self.one_of("deployment.role", &roles).is_none() {
            return;
        }
        let role = self.text("deployment.role");
        let path = format!("deployment.role_{role}.config_provider");
        let providers: &[(&str, ())] = match role.as_str() {
            "data_plane" => &[("etcd", ()), ("yaml", ()), ("json", ())],
            "traditional" => &[("embedded", ()), ("etcd", ()), ("yaml", ())],
            _ => &[("embedded", ()), ("etcd", ())],
        };
        self.one_of(&path, providers);
    }

    /// `deployment.etcd` is read by the store; here only its mistakes are told, along with all others, when it is in use.
    fn etcd(&mut self, prefix: &Path) {
        let role = self.text("deployment.role");
        if self.text(&format!("deployment.role_{role}.config_provider")) != "etcd" {
            return;
        }
        let path = "deployment.etcd.host";
        match self.get(path) {
            Some(Value::Array(hosts)) if hosts.is_empty() => self.wrong(path, "is empty: name at least one member"),
            Some(Value::Array(hosts)) => hosts.iter().enumerate().for_each(|(i, host)| {
                if let Some(why) = not_a_member(host) {
                    self.wrong(&format!("{path}[{i}]"), why);
                }
            }),
            Some(host) => {
                if let Some(why) = not_a_member(host) {
                    self.wrong(path, why);
                }
            }
            None => {}
        }
        let path = "deployment.etcd.timeout";
        let seconds = |written: &Value| written.as_f64().or_else(|| written.as_str()?.trim().parse().ok());
        if let Some(timeout) = self.get(path)
            && seconds(timeout).is_none_or(|secs: f64| secs <= 0.0 || secs >= 86_400.0)
        {
            self.wrong(path, format!("{timeout} is not a number of seconds between 0 and 86400"));
        }
        let path = "deployment.etcd.prefix";
        if let Some(written) = self.get(path)
            && !written.is_string()
        {
            self.wrong(path, format!("{written} is not a text such as /apisix"));
        }
        if let Some(verify) = self.get("deployment.etcd.tls.verify")
            && !verify.is_boolean()
        {
            self.wrong("deployment.etcd.tls.verify", format!("{verify} is not true or false"));
        }
        let file = |key: &str| self.get(&format!("deployment.etcd.tls.{key}")).and_then(Value::as_str);
        let files = ["cert", "key"].map(|key| (key, file(key).filter(|name| !name.is_empty())));
        if files[0].1.is_some() != files[1].1.is_some() {
            self.wrong("deployment.etcd.tls", "cert and key go together: set both or neither");
        }
        for (key, name) in files {
            if let Some(Err(e)) = name.map(|name| std::fs::File::open(prefix.join(name))) {
                self.wrong(&format!("deployment.etcd.tls.{key}"), format!("{}: {e}", name.unwrap_or_default()));
            }
        }
    }

    fn listeners(&mut self, path: &str, warnings: &mut Vec<Warning>) -> Vec<Listen> {
        let items = match self.get(path) {
            None => return Vec::new(),
            Some(Value::Array(items)) => items.clone(),
            Some(one) => vec![one.clone()],
        };
        let http2 = self.flag("apisix.enable_http2");
        let mut out = Vec::new();
        for (i, item) in items.iter().enumerate() {
            let path = format!("{path}[{i}]");
            for key in item.as_object().into_iter().flatten().map(|(key, _)| key.as_str()) {
                if !LISTENER_KEYS.contains(&key) {
                    let known = LISTENER_KEYS.join(", ");
                    warnings.push(Warning(format!("{path}.{key}: is not a known key; there are {known}")));
                }
            }
            self.listener(&path, item, http2, &mut out);
        }
        out
    }

    fn listener(&mut self, path: &str, item: &Value, http2: bool, out: &mut Vec<Listen>) {
        let map = match item {
            Value::Object(map) => map.clone(),
            port => serde_json::Map::from_iter([("port".to_owned(), port.clone())]),
        };
        let port = map.get("port").and_then(|p| p.as_u64().or_else(|| p.as_str()?.parse().ok()));
        let Some(port) = port.and_then(|p| u16::try_from(p).ok()) else {
            let written = map.get("port").unwrap_or(&Value::Null);
            return self.wrong(path, format!("port {written} is not a number from 0 to 65535"));
        };
        let flag = |key: &str, default| map.get(key).and_then(Value::as_bool).unwrap_or(default);
        if flag("enable_http3", false) {
            self.wrong(path, "enable_http3: HTTP/3 is not served yet; leave it off");
        }
        let (http2, proxy_protocol) = (flag("enable_http2", http2), flag("proxy_protocol", false));
        let mut add = |ip| out.push(Listen { addr: SocketAddr::new(ip, port), http2, proxy_protocol });
        match map.get("ip").map(|ip| ip.as_str().unwrap_or_default().trim_matches(['[', ']']).parse::<IpAddr>()) {
            Some(Ok(ip)) => add(ip),
            Some(Err(_)) => self.wrong(path, format!("ip {} is not an address", map["ip"])),
            None => {
                add(Ipv4Addr::UNSPECIFIED.into());
                if port != 0 && self.flag("apisix.enable_ipv6") {
                    out.push(Listen {
                        addr: SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port),
                        http2,
                        proxy_protocol,
                    });
                }
            }
        }
    }

    fn tls(&mut self, prefix: &Path, warnings: &mut Vec<Warning>) -> Tls {
        let protocols: Vec<String> =
            self.text("apisix.ssl.ssl_protocols").split_whitespace().map(str::to_owned).collect();
        let path = "apisix.ssl.ssl_protocols";
        let served = |p: &&String| matches!(p.as_str(), "TLSv1.2" | "TLSv1.3");
        let one_is = protocols.iter().any(|p| served(&p));
        for protocol in protocols.iter().filter(|p| !served(p)) {
            let text = format!("{protocol} is not served; TLSv1.2 and TLSv1.3 are, older ones are broken");
            // Beside one that is served, an old one costs only clients that know nothing newer.
            match protocol.as_str() {
                "SSLv2" | "SSLv3" | "TLSv1" | "TLSv1.1" if one_is => warnings.push(Warning(format!("{path}: {text}"))),
                _ => self.wrong(path, text),
            }
        }
        let trusted = self.text("apisix.ssl.ssl_trusted_certificate");
        let fallback = self.text("apisix.ssl.fallback_sni");
        Tls {
            protocols,
            session_tickets: self.flag("apisix.ssl.ssl_session_tickets"),
            fallback_sni: Some(fallback.to_ascii_lowercase()).filter(|s| !s.is_empty()),
            trusted_certificate: Some(trusted).filter(|t| !t.is_empty() && t != "system").map(|t| prefix.join(t)),
        }
    }

    fn workers(&mut self) -> usize {
        let path = "nginx_config.worker_processes";
        match self.get(path) {
            _ if self.flag("apisix.enable_dev_mode") => 1,
            Some(Value::String(s)) if s == "auto" => {
                thread::available_parallelism().map_or(1, |n| n.get().min(MAX_WORKERS))
            }
            _ => self.number(path, 1, MAX_WORKERS as u64) as usize,
        }
    }

    /// Further addresses of the node, as nginx's `listen` has them: `1987`, `127.0.0.1:9999 ssl`, and `unix:PATH`, which are given
    /// back.
    fn lua_listen(&mut self, plain: &mut Vec<Listen>, tls: &mut Vec<Listen>, prefix: &Path) -> Vec<ListenUnix> {
        let mut unix = Vec::new();
        for (i, text) in self.texts("lua_listen").into_iter().enumerate() {
            let mut words = text.split_whitespace();
            let place = words.next().unwrap_or_default();
            if let Some(path) = place.strip_prefix("unix:").filter(|path| !path.is_empty()) {
                let words: Vec<_> = words.collect();
                let has = |word| words.contains(&word);
                let (path, proxy_protocol) = (prefix.join(path), has("proxy_protocol"));
                unix.push(ListenUnix { path, tls: has("ssl"), http2: has("http2"), proxy_protocol });
                continue;
            }
            let any = |port| SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port);
            let addr = place.parse::<SocketAddr>().ok().or_else(|| place.parse().ok().map(any));
            let Some(addr) = addr else {
                self.wrong(
                    &format!("lua_listen[{i}]"),
                    format!("{place:?} is not a port, an address with a port, or unix:PATH"),
                );
                continue;
            };
            let words: Vec<_> = words.collect();
            let listen =
                Listen { addr, http2: words.contains(&"http2"), proxy_protocol: words.contains(&"proxy_protocol") };
            if words.contains(&"ssl") { tls.push(listen) } else { plain.push(listen) }
        }
        unix
    }

    fn client(&mut self) -> Client {
        Client {
            header_timeout: self.duration("nginx_config.http.client_header_timeout"),
            body_timeout: self.duration("nginx_config.http.client_body_timeout"),
            send_timeout: self.duration("nginx_config.http.send_timeout"),
            keepalive_timeout: self.duration("nginx_config.http.keepalive_timeout"),
            max_body: self.size("nginx_config.http.client_max_body_size"),
            underscores_in_headers: self.flag("nginx_config.http.underscores_in_headers"),
        }
    }

    fn upstream_keepalive(&mut self) -> Keepalive {
        Keepalive {
            size: self.number("nginx_config.http.upstream.keepalive", 1, 1_000_000) as usize,
            requests: self.number("nginx_config.http.upstream.keepalive_requests", 1, u64::MAX),
            timeout: self.duration("nginx_config.http.upstream.keepalive_timeout"),
        }
    }

    fn error_log(&mut self, prefix: &Path) -> (PathBuf, String) {
        const LEVELS: [&str; 8] = ["debug", "info", "notice", "warn", "error", "crit", "alert", "emerg"];
        let level = self.text("nginx_config.error_log_level");
        if !LEVELS.contains(&level.as_str()) {
            self.wrong("nginx_config.error_log_level", format!("{level:?} is not one of {}", LEVELS.join(", ")));
        }
        (log_path(prefix, self.text("nginx_config.error_log")), level)
    }

    /// `of`: `nginx_config.http`, or `nginx_config.stream`, which has no buffer.
    fn access_log(&mut self, prefix: &Path, of: &str) -> Option<AccessLog> {
        let path = self.text(&format!("{of}.access_log"));
        if !self.flag(&format!("{of}.enable_access_log")) || path.is_empty() || path == "off" {
            return None;
        }
        let escapes = [("default", ()), ("json", ()), ("none", ())];
        self.one_of(&format!("{of}.access_log_format_escape"), &escapes);
        Some(AccessLog {
            path: log_path(prefix, path),
            format: self.text(&format!("{of}.access_log_format")),
            escape: self.text(&format!("{of}.access_log_format_escape")),
            buffer: self.size(&format!("{of}.access_log_buffer")) as usize,
        })
    }

    fn admin(&mut self, prefix: &Path, warnings: &mut Vec<Warning>) -> Option<Admin> {
        if !super::serves_admin(self.json) {
            return None;
        }
        let key_required = self.flag("deployment.admin.admin_key_required");
        if !key_required {
            let path = "deployment.admin.admin_key_required";
            warnings
                .push(Warning(format!("{path}: Admin key is bypassed! Whoever reaches the Admin API may change all")));
        }
        // Read by the store, which keeps them; beyond these its own lists of them would be what takes the memory.
        self.number("deployment.admin.revisions.max", 0, 100_000);
        self.number("deployment.admin.revisions.max_mb", 0, 4096);
        Some(Admin {
            addr: self.address("deployment.admin.admin_listen")?,
            keys: self.admin_keys(),
            key_required,
            tls: self.admin_tls(prefix),
            allow: self.networks("deployment.admin.allow_admin"),
            cors: self.flag("deployment.admin.enable_admin_cors"),
        })
    }

    /// Relative files are looked for beside config.yaml, as nginx does.
    fn admin_tls(&mut self, prefix: &Path) -> Option<AdminTls> {
        if self.get("deployment.admin.https_admin").and_then(Value::as_bool) != Some(true) {
            return None;
        }
        let conf = prefix.join("conf");
        let mut file = |key: &str| {
            let text = self.text(&format!("deployment.admin.admin_api_mtls.{key}"));
            (!text.is_empty()).then(|| conf.join(text))
        };
        let (cert, key, client_ca) = (file("admin_ssl_cert"), file("admin_ssl_cert_key"), file("admin_ssl_ca_cert"));
        for (key, missing) in [("admin_ssl_cert", cert.is_none()), ("admin_ssl_cert_key", key.is_none())] {
            if missing {
                let path = format!("deployment.admin.admin_api_mtls.{key}");
                self.wrong(&path, "is missing: https_admin needs a certificate and its key, files in PEM");
            }
        }
        Some(AdminTls { cert: cert?, key: key?, client_ca })
    }

    fn admin_keys(&mut self) -> Vec<AdminKey> {
        let path = "deployment.admin.admin_key";
        let items = match self.get(path) {
            None => return Vec::new(),
            Some(Value::Array(items)) => items,
            // Not what it is: it may be the key.
            Some(_) => {
                self.wrong(path, "what stands here is not a list of name, key and role".to_owned());
                return Vec::new();
            }
        };
        let mut keys = Vec::new();
        for (i, item) in items.iter().enumerate() {
            let field = |name: &str| item.get(name).map(text_of).unwrap_or_default();
            let role = field("role");
            if !matches!(role.as_str(), "admin" | "viewer") {
                self.wrong(&format!("{path}[{i}].role"), format!("{role:?} is not one of admin, viewer"));
            }
            keys.push(AdminKey { name: field("name"), key: field("key"), role });
        }
        keys
    }

    fn control(&mut self) -> Option<SocketAddr> {
        if !self.flag("apisix.enable_control") {
            return None;
        }
        self.address("apisix.control")
    }

    /// Off unless the file has it, as in APISIX.
    fn status(&mut self) -> Option<SocketAddr> {
        let path = "apisix.status";
        let written = self.get(path)?;
        if !written.is_object() {
            self.wrong(path, format!("{written} is not a map of ip and port"));
            return None;
        }
        let ip = self.get("apisix.status.ip").map_or_else(|| STATUS_IP.to_owned(), |_| self.text("apisix.status.ip"));
        let port = match self.get("apisix.status.port") {
            Some(_) => self.number("apisix.status.port", 0, 65535) as u16,
            None => STATUS_PORT,
        };
        match ip.trim_matches(['[', ']']).parse::<IpAddr>() {
            Ok(ip) => Some(SocketAddr::new(ip, port)),
            Err(_) => {
                self.wrong("apisix.status.ip", format!("{ip:?} is not an address"));
                None
            }
        }
    }

    /// A key that can be guessed would show strangers what the gateway does.
    fn trace(&mut self) -> Option<Trace> {
        self.get("apisix.trace")?;
        let mut header = self.text("apisix.trace.header");
        if header.is_empty() {
            TRACE_HEADER.clone_into(&mut header);
        }
        if http::HeaderName::from_bytes(header.as_bytes()).is_err() {
            self.wrong("apisix.trace.header", format!("{header:?} is not the name of a field"));
        }
        let key = self.text("apisix.trace.key");
        if key.len() < MIN_TRACE_KEY || !key.bytes().all(|b| b.is_ascii_graphic()) {
            let what = format!("write at least {MIN_TRACE_KEY} visible characters of ASCII that nobody can guess");
            self.wrong("apisix.trace.key", what);
        }
        let keep = match self.get("apisix.trace.keep") {
            Some(_) => self.number("apisix.trace.keep", 1, MAX_TRACES) as usize,
            None => TRACES,
        };
        let secrets = match self.get("apisix.trace.secrets") {
            Some(_) => self.texts("apisix.trace.secrets").into_iter().map(Into::into).collect(),
            None => Box::default(),
        };
        Some(Trace { header, key, keep, secrets })
    }

    fn prometheus(&mut self) -> Prometheus {
        let enabled = self.flag("plugin_attr.prometheus.enable_export_server");
        Prometheus {
            addr: if enabled { self.address("plugin_attr.prometheus.export_addr") } else { None },
            uri: self.text("plugin_attr.prometheus.export_uri"),
            prefix: self.text("plugin_attr.prometheus.metric_prefix"),
        }
    }

    /// A map `{ip, port}`.
    fn address(&mut self, path: &str) -> Option<SocketAddr> {
        let ip = self.text(&format!("{path}.ip"));
        let port = self.number(&format!("{path}.port"), 0, 65535) as u16;
        match ip.trim_matches(['[', ']']).parse::<IpAddr>() {
            Ok(ip) => Some(SocketAddr::new(ip, port)),
            Err(_) => {
                self.wrong(&format!("{path}.ip"), format!("{ip:?} is not an address"));
                None
            }
        }
    }

    fn networks(&mut self, path: &str) -> Vec<IpNet> {
        let mut out = Vec::new();
        for (i, text) in self.texts(path).into_iter().enumerate() {
            // A unix socket has no network; its peers are local by nature.
            if text == "unix:" {
                continue;
            }
            match network(&text) {
                Some(net) => out.push(net),
                None => self.wrong(&format!("{path}[{i}]"), format!("{text:?} is not an address or a CIDR")),
            }
        }
        out
    }

    fn shared_dicts(&mut self) -> Vec<(String, usize)> {
        let mut out: Vec<(String, usize)> = Vec::new();
        let maps = [
            "nginx_config.http.lua_shared_dict",
            "nginx_config.meta.lua_shared_dict",
            "nginx_config.http.custom_lua_shared_dict",
            "apisix.custom_lua_shared_dict",
            "lua_shared_dict",
        ];
        for path in maps {
            let Some(Value::Object(map)) = self.get(path) else { continue };
            for name in map.keys() {
                let size = self.size(&format!("{path}.{name}")) as usize;
                if !out.iter().any(|(known, _)| known == name) {
                    out.push((name.clone(), size));
                }
            }
        }
        out
    }

    fn resolver(&mut self, warnings: &mut Vec<Warning>) -> Resolver {
        let mut servers = Vec::new();
        for (i, text) in self.texts("apisix.dns_resolver").into_iter().enumerate() {
            if text.contains('%') {
                let what = format!("{text} has a zone, and is not asked");
                warnings.push(Warning(format!("apisix.dns_resolver[{i}]: {what}")));
                continue;
            }
            let parsed = text.parse::<SocketAddr>().ok();
            match parsed.or_else(|| Some(SocketAddr::new(text.trim_matches(['[', ']']).parse().ok()?, 53))) {
                Some(addr) => servers.push(addr),
                None => self.wrong(&format!("apisix.dns_resolver[{i}]"), format!("{text:?} is not an address")),
            }
        }
        let valid = self.get("apisix.dns_resolver_valid").map(|_| self.duration("apisix.dns_resolver_valid"));
        Resolver {
            servers,
            valid,
            timeout: self.duration("apisix.resolver_timeout"),
            ipv6: self.flag("apisix.enable_ipv6"),
        }
    }

    fn captured_log(&mut self) -> usize {
        let path = "lua_options.lua_capture_error_log";
        let before = self.mistakes.len();
        let size = self.size(path);
        if self.get(path).is_some() && self.mistakes.len() == before && size < MIN_CAPTURED_LOG {
            self.wrong(
                path,
                format!("{size} bytes do not hold a long line; write at least {MIN_CAPTURED_LOG}, or 100k"),
            );
        }
        size as usize
    }

    /// `nginx_config.http.real_ip_…`, or the directives themselves in `lua_options`.
    fn real_ip(&mut self) -> RealIp {
        if let Some(lines) = self.get("lua_options.set_real_ip_from") {
            let options = Options::read(self.get("lua_options").and_then(Value::as_object), &Options::default());
            let mut from = Vec::new();
            for line in options.all("set_real_ip_from") {
                match network(line) {
                    Some(network) => from.push(network),
                    // No connection comes in over a Unix socket.
                    None if &**line == "unix:" => {}
                    None => self.wrong(
                        "lua_options.set_real_ip_from",
                        format!("{line:?} of {lines} is neither an address nor a network as 10.0.0.0/8"),
                    ),
                }
            }
            let header = options.get("real_ip_header").unwrap_or("X-Real-IP").into();
            return RealIp { header, from, recursive: options.get("real_ip_recursive") == Some("on") };
        }
        RealIp {
            header: self.text("nginx_config.http.real_ip_header").as_str().into(),
            from: self.networks("nginx_config.http.real_ip_from"),
            recursive: self.flag("nginx_config.http.real_ip_recursive"),
        }
    }

    /// `NAME=value` of `nginx_config.envs`; a bare name is there anyway.
    fn envs(&mut self) -> Vec<(String, String)> {
        let texts = self.texts("nginx_config.envs");
        texts.iter().filter_map(|text| text.split_once('=')).map(|(name, value)| (name.into(), value.into())).collect()
    }

    fn keyring(&mut self) -> (Vec<String>, bool) {
        let path = "apisix.data_encryption.keyring";
        let keys = match self.get(path) {
            Some(Value::String(one)) => vec![one.clone()],
            _ => self.texts(path),
        };
        for (i, key) in keys.iter().enumerate() {
            if !matches!(key.len(), 16 | 32) {
                self.wrong(&format!("{path}[{i}]"), "a key has 16 bytes (or 32)");
            }
        }
        (keys, self.flag("apisix.data_encryption.enable_encrypt_fields"))
    }
}

/// nginx's name for the stream is no file under the prefix.
fn log_path(prefix: &Path, written: String) -> PathBuf {
    if written == "stderr" { PathBuf::from("/dev/stderr") } else { prefix.join(written) }
}

fn text_of(value: &Value) -> String {
    match value {
        Value::String(s) => s.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

pub(super) fn network(text: &str) -> Option<IpNet> {
    text.parse().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}

pub(super) fn duration(text: &str) -> Option<Duration> {
    let mut total = Duration::ZERO;
    let mut rest = text.trim();
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let number: u64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let unit = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let millis = match &rest[..unit] {
            "ms" => 1,
            "" | "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return None,
        };
        total = total.checked_add(Duration::from_millis(number.checked_mul(millis)?))?;
        rest = rest[unit..].trim_start();
    }
    Some(total)
}

pub(super) fn size(text: &str) -> Option<u64> {
    let text = text.trim().to_ascii_lowercase();
    let (digits, factor) = match text.as_bytes().last()? {
        b'k' => (&text[..text.len() - 1], 1 << 10),
        b'm' => (&text[..text.len() - 1], 1 << 20),
        b'g' => (&text[..text.len() - 1], 1 << 30),
        _ => (&text[..], 1),
    };
    digits.parse::<u64>().ok()?.checked_mul(factor)
}
