//! A data set as an APISIX keeps it in etcd: objects of every kind, made from a seed by APISIX's own schemas.
//!
//! What a schema requires of a plugin has a realistic value here; what it allows beside is drawn from the schema: one of an enum,
//! a number within its bounds, a default. Every object is held against the schemas before it is given away. Left out is what
//! the gateway does not do yet: health checks, discovery, plugins that it has not; and references to secrets, which nobody answers.

use moongate::{
    model::{self, Keyring, Kind, SchemaKind, crypt},
    schema,
};
use serde_json::{Map, Value, json};

/// APISIX's default keyring (conf/config.yaml.example); the first encrypts.
pub const KEYRING: [&str; 2] = ["qeddd145sfvddff3", "edd1c9f0985e76a2"];

/// How many of each kind; together `COUNT`.
const KINDS: [(Kind, usize); 13] = [
    (Kind::Route, 2497),
    (Kind::Service, 500),
    (Kind::Upstream, 600),
    (Kind::Consumer, 350),
    (Kind::Credential, 300),
    (Kind::Ssl, 60),
    (Kind::GlobalRule, 5),
    (Kind::PluginConfig, 200),
    (Kind::ConsumerGroup, 80),
    (Kind::PluginMetadata, 5),
    (Kind::Secret, 3),
    (Kind::Proto, 100),
    (Kind::StreamRoute, 300),
];
pub const COUNT: usize = 5000;

/// Routes whose node is the test's own: `/served/0` and so on, for any host.
pub const SERVED: usize = 40;

/// Plugins of routes, services and plugin configs that let requests pass.
const PLUGINS: [&str; 20] = [
    "cors",
    "echo",
    "fault-injection",
    "file-logger",
    "http-logger",
    "ip-restriction",
    "key-auth",
    "basic-auth",
    "jwt-auth",
    "limit-conn",
    "limit-count",
    "limit-req",
    "mocking",
    "prometheus",
    "proxy-rewrite",
    "redirect",
    "request-id",
    "response-rewrite",
    "serverless-pre-function",
    "ua-restriction",
];

/// Properties that are drawn from the plugin's schema when they are there; others have a place in `plugin_conf`, or stay away because
/// they mean nothing by themselves.
const DRAWN: [&str; 38] = [
    "allow_degradation",
    "append_query_string",
    "batch_max_size",
    "buffer_duration",
    "burst",
    "bypass_missing",
    "concat_method",
    "content_type",
    "delay",
    "encode_uri",
    "header_name",
    "hide_credentials",
    "inactive_timeout",
    "include_in_response",
    "include_req_body",
    "include_resp_body",
    "key_claim_name",
    "max_age",
    "max_req_body_bytes",
    "max_resp_body_bytes",
    "max_resp_body_size",
    "max_retry_count",
    "message",
    "nodelay",
    "only_use_default_delay",
    "prefer_name",
    "realm",
    "rejected_code",
    "rejected_msg",
    "response_code",
    "response_status",
    "retry_delay",
    "show_limit_quota_header",
    "ssl_verify",
    "status_code",
    "store_in_ctx",
    "timeout",
    "with_mock_header",
];

/// The whole data set: keys below the prefix, and values as they are stored. `node` answers for the served routes.
pub fn objects(seed: u64, node: &str) -> Vec<(String, Value)> {
    let mut made = Maker { random: Random(seed), groups: 0, node: node.to_owned(), keyrings: keyrings() };
    let mut all = Vec::with_capacity(COUNT);
    for (kind, count) in KINDS {
        for n in 0..count {
            let (id, mut value) = made.object(kind, n);
            // The Admin API stores the defaults of plugins, too; other writers do not.
            let filled = accepted(kind, &id, &value);
            if n % 4 != 3 {
                value = filled;
            }
            made.encrypt(kind, &id, &mut value);
            let plural = if kind == Kind::Credential { "consumers" } else { kind.plural() };
            all.push((format!("/{plural}/{id}"), value));
        }
    }
    assert_eq!(all.len(), COUNT);
    all
}

/// The key that opens the served routes behind `key-auth`: it is stored encrypted.
pub const KEY: &str = "key-of-consumer-0";

fn keyrings() -> [Keyring; 2] {
    KEYRING.map(|key| Keyring::new([key], true).expect("a key of 16 bytes"))
}

/// The schemas have the last word. The object with the defaults of its plugins.
fn accepted(kind: Kind, id: &str, value: &Value) -> Value {
    let of = |e: String| panic!("{}/{id}: {e}: {value}", kind.plural());
    let mut filled = value.clone();
    model::check(kind, id, &mut value.clone()).map(drop).unwrap_or_else(|e| of(e.to_string()));
    if kind == Kind::PluginMetadata {
        let schema = schema::plugin(id).and_then(|plugin| plugin.metadata_schema.as_ref()).expect("a schema");
        schema.check(&mut filled).unwrap_or_else(of);
    }
    for (name, conf) in filled.get_mut("plugins").and_then(Value::as_object_mut).into_iter().flatten() {
        let plugin = schema::plugin(name).unwrap_or_else(|| panic!("no plugin {name}"));
        let of_consumer = matches!(kind, Kind::Consumer | Kind::Credential);
        let schema = plugin.consumer_schema.as_ref().filter(|_| of_consumer).unwrap_or(&plugin.schema);
        schema.check(conf).unwrap_or_else(|e| of(format!("{name}: {e}")));
    }
    filled
}

/// xorshift64*: the same numbers for the same seed everywhere.
struct Random(u64);

impl Random {
    /// Below `n`.
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        ((self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % n as u64) as usize
    }

    /// True once in `n` times.
    fn once_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    fn one_of<'a, T: ?Sized>(&mut self, choices: &[&'a T]) -> &'a T {
        choices[self.below(choices.len())]
    }
}

struct Maker {
    random: Random,
    /// Groups of limit-count so far: all that share one must say the same.
    groups: usize,
    node: String,
    keyrings: [Keyring; 2],
}

impl Maker {
    fn object(&mut self, kind: Kind, n: usize) -> (String, Value) {
        let id = self.id(kind, n);
        let mut value = match kind {
            Kind::Route => self.route(n),
            Kind::Service => self.service(n),
            Kind::Upstream => self.upstream(),
            Kind::Consumer => self.consumer(n),
            Kind::Credential => self.credential(n),
            Kind::Ssl => self.ssl(n),
            Kind::GlobalRule => self.global_rule(n),
            Kind::PluginConfig | Kind::ConsumerGroup => {
                json!({"plugins": self.plugins(kind), "desc": "shared by a team"})
            }
            Kind::PluginMetadata => metadata(n),
            Kind::Secret => secret(n),
            Kind::Proto => json!({"content": proto(n), "desc": "of the team's gRPC service"}),
            Kind::StreamRoute => self.stream_route(n),
            _ => unreachable!("{kind:?} is not among KINDS"),
        };
        let created = 1_700_000_000 + self.random.below(50_000_000);
        match kind {
            Kind::PluginMetadata | Kind::Secret => value["id"] = id.as_str().into(),
            Kind::Consumer => {}
            // In the value an id is a name or a number; its key has it as text.
            _ if kind == Kind::Upstream && n % 3 == 1 => value["id"] = id.parse::<u64>().unwrap_or(1).into(),
            Kind::Credential => value["id"] = format!("cred-{n}").into(),
            _ => value["id"] = id.as_str().into(),
        }
        if !matches!(kind, Kind::PluginMetadata | Kind::Secret) {
            value["create_time"] = created.into();
            value["update_time"] = (created + self.random.below(100_000)).into();
            let labelled = matches!(kind, Kind::Route | Kind::Service | Kind::Upstream | Kind::Consumer | Kind::Ssl);
            if labelled && self.random.once_in(4) {
                value["labels"] =
                    json!({"env": self.random.one_of(&["prod", "stage"]), "team": format!("t{}", n % 17)});
            }
        }
        (id, value)
    }

    /// POST makes ids of twenty digits; people write names and small numbers.
    fn id(&mut self, kind: Kind, n: usize) -> String {
        match (kind, n % 3) {
            (Kind::Consumer, _) => format!("consumer_{n}"),
            (Kind::Credential, _) => format!("consumer_{}/credentials/cred-{n}", n % 350),
            (Kind::PluginMetadata, _) => METADATA[n].to_owned(),
            (Kind::Secret, _) => ["vault/1", "aws/prod", "gcp/2"][n].to_owned(),
            (_, 0) => format!("{:020}", 1000 + n),
            (_, 1) => format!("{}", n + 1),
            _ => format!("{}-{n}.team_{}", kind.singular().replace('_', "-"), n % 17),
        }
    }

    fn plugins(&mut self, kind: Kind) -> Value {
        let mut plugins = Map::new();
        for _ in 0..1 + self.random.below(3) {
            let name = self.random.one_of(&PLUGINS);
            // APISIX merges those into a consumer's requests after it has been found.
            if kind == Kind::ConsumerGroup && name.ends_with("-auth") {
                continue;
            }
            let conf = self.plugin_conf(name);
            plugins.insert(name.to_owned(), conf);
        }
        if plugins.is_empty() {
            plugins.insert("request-id".to_owned(), json!({}));
        }
        plugins.into()
    }

    /// What the schema requires with values that people write, and some of what it allows.
    fn plugin_conf(&mut self, name: &str) -> Value {
        self.groups += 1;
        let group = format!("group-{}", self.groups);
        let r = &mut self.random;
        let n = r.below(1000);
        let mut conf = match name {
            "cors" if n.is_multiple_of(3) => json!({"allow_origins": "https://a.example.com,https://b.example.com",
                "allow_methods": "GET,POST", "allow_headers": "X-A,X-B", "expose_headers": "X-C", "allow_credential": true}),
            "cors" => json!({"allow_origins": "**", "allow_origins_by_regex": [".*\\.example\\.com$"]}),
            "echo" => json!({"before_body": "before ", "headers": {"X-Echo": n}}),
            "fault-injection" if n.is_multiple_of(2) => json!({"delay": {"duration": 0.001, "percentage": n % 101}}),
            "fault-injection" => json!({"abort": {"http_status": 503, "body": "no $remote_addr",
                "percentage": 0, "vars": [[["arg_fault", "==", "yes"], ["http_x_n", ">", n]]]}}),
            "file-logger" => {
                json!({"path": format!("logs/file-{n}.log"), "log_format": {"host": "$host", "at": "$time_iso8601"}})
            }
            "http-logger" => {
                json!({"uri": format!("http://10.0.0.{}:8080/logs", n % 250), "auth_header": format!("Bearer token-{n}")})
            }
            "ip-restriction" if n.is_multiple_of(2) => {
                json!({"whitelist": ["127.0.0.0/8", "10.0.0.1", "::1", "fe80::/32"]})
            }
            "ip-restriction" => json!({"blacklist": [format!("192.0.2.{}", n % 250), "203.0.113.0/24"]}),
            "limit-conn" if n.is_multiple_of(4) => json!({"conn": 100 + n, "burst": n % 50, "default_conn_delay": 0.1,
                "key": "remote_addr", "policy": "redis", "redis_host": format!("10.0.1.{}", n % 250), "key_ttl": 60 + n}),
            "limit-conn" => json!({"conn": 100 + n, "burst": n % 50, "default_conn_delay": 0.1, "key": "remote_addr"}),
            "limit-count" if n.is_multiple_of(3) => {
                json!({"count": 10_000 + n, "time_window": 60, "key_type": "var_combination",
                "key": "$remote_addr $http_x_tenant", "group": group})
            }
            "limit-count" if n % 9 == 1 => json!({"count": 10_000 + n, "time_window": 60, "policy": "redis",
                "redis_host": "redis.internal", "redis_port": 6380, "redis_database": n % 16, "redis_username": "gateway",
                "redis_password": format!("pass word {n}"), "redis_ssl": true, "sync_interval": 0.5}),
            "limit-count" if n % 9 == 2 => json!({"count": 10_000 + n, "time_window": 60, "policy": "redis-cluster",
                "redis_cluster_nodes": ["10.0.2.1:7000", "10.0.2.2:7000"], "redis_cluster_name": format!("cluster-{n}"),
                "window_type": "sliding"}),
            "limit-count" if n % 9 == 4 => json!({"count": 10_000 + n, "time_window": 60, "policy": "redis-sentinel",
                "redis_sentinels": [{"host": "10.0.3.1", "port": 26379}], "redis_master_name": "mymaster",
                "sentinel_password": format!("pass word {n}")}),
            "limit-count" => json!({"count": 10_000 + n, "time_window": 60, "key": "consumer_name"}),
            "limit-req" if n.is_multiple_of(4) => json!({"rate": 1000 + n, "burst": n, "key": "server_addr",
                "policy": "redis-cluster", "redis_cluster_nodes": ["10.0.2.1:7000"], "redis_cluster_name": "limits"}),
            "limit-req" => json!({"rate": 1000 + n, "burst": n, "key": "server_addr", "key_type": "var"}),
            "mocking" if n.is_multiple_of(2) => json!({"response_example": "{\"a\": 1}"}),
            "mocking" => {
                json!({"response_schema": {"type": "object", "properties": {"a": {"type": "integer", "example": n}}}})
            }
            "proxy-rewrite" if n.is_multiple_of(3) => {
                json!({"regex_uri": ["^/v(\\d+)/(.*)", "/$2"], "headers": {"X-Api": "$1"}})
            }
            "proxy-rewrite" if n % 3 == 1 => {
                json!({"uri": "/served$uri", "host": "backend.example.com", "method": "GET"})
            }
            "proxy-rewrite" => {
                json!({"headers": {"set": {"X-Route": "$route_id"}, "add": {"X-N": n.to_string()}, "remove": ["X-No"]}})
            }
            "redirect" if n.is_multiple_of(3) => json!({"http_to_https": true}),
            "redirect" if n % 3 == 1 => return json!({"uri": "/to$uri/$arg_a", "ret_code": 301}),
            "redirect" => return json!({"regex_uri": ["^/old/(.*)", "/new/$1"]}),
            "request-id" => json!({"algorithm": r.one_of(&["uuid", "nanoid", "range_id"])}),
            "response-rewrite" if n.is_multiple_of(3) => json!({"headers": {"X-Server": n, "X-Id": "$upstream_addr"},
                "vars": [["status", "==", 200]]}),
            "response-rewrite" if n % 3 == 1 => {
                json!({"headers": {"set": {"X-A": "b"}, "add": ["X-C: d"], "remove": ["X-E"]}})
            }
            "response-rewrite" => {
                json!({"filters": [{"regex": "Hello (\\w+)", "scope": "global", "replace": "Bye $1"}]})
            }
            "serverless-pre-function" => json!({"phase": r.one_of(&["rewrite", "access", "log"]), "functions": [
                "return function(conf, ctx) local core = require('apisix.core') core.log.info('at ', ctx.var.uri) end"]}),
            "ua-restriction" if n.is_multiple_of(2) => json!({"denylist": ["(?i)badbot/\\d+", "curl/7"]}),
            "ua-restriction" => json!({"allowlist": [".+"]}),
            _ => json!({}),
        };
        self.draw(name, &mut conf);
        if self.random.once_in(12) {
            conf["_meta"] = json!({"disable": false, "priority": n, "filter": [["arg_version", "==", "v2"]]});
        }
        conf
    }

    /// Optional properties, by the plugin's own schema.
    fn draw(&mut self, name: &str, conf: &mut Value) {
        let text = schema::plugin_json(name).expect("a plugin of APISIX's");
        let plugin: Value = serde_json::from_str(text).expect("JSON");
        let Some(properties) = plugin.pointer("/schema/properties").and_then(Value::as_object) else { return };
        for (property, schema) in properties {
            let given = conf.get(property).is_some();
            if given || !DRAWN.contains(&property.as_str()) || !self.random.once_in(3) {
                continue;
            }
            if let Some(value) = self.value_of(schema) {
                conf[property] = value;
            }
        }
        // Redirects to TLS take no query of their own, and functions no delay of seconds.
        if conf.get("http_to_https").is_some() {
            conf.as_object_mut().expect("a conf").remove("append_query_string");
        }
    }

    fn value_of(&mut self, schema: &Value) -> Option<Value> {
        if let Some(choices) = schema["enum"].as_array() {
            return Some(choices[self.random.below(choices.len())].clone());
        }
        match schema["type"].as_str()? {
            "boolean" => Some(self.random.once_in(2).into()),
            "integer" | "number" => {
                let least = schema["minimum"].as_u64().unwrap_or(1) as usize;
                let most = schema["maximum"].as_u64().unwrap_or(least as u64 + 100) as usize;
                Some((least + self.random.below(most - least + 1)).into())
            }
            "string" => Some(schema.get("default").cloned().unwrap_or_else(|| "as a team wrote it".into())),
            _ => None,
        }
    }

    /// As the Admin API fills it.
    fn upstream(&mut self) -> Value {
        let n = self.random.below(60_000);
        let host = format!("10.{}.{}.{}", n % 7, n % 251, 1 + n % 250);
        let nodes = match n % 4 {
            0 => json!({format!("{host}:8080"): 1, "10.9.9.9:8080": n % 10}),
            1 => json!([{"host": host, "port": 8080, "weight": 1, "priority": 0, "metadata": {"zone": "a"}},
                {"host": "10.9.9.9", "port": 1 + n, "weight": 0, "priority": -1}]),
            2 => json!({format!("service-{n}.internal.example.com"): 100}),
            _ => json!([{"host": "service.example.com", "weight": 1}]),
        };
        let mut upstream =
            json!({"nodes": nodes, "type": "roundrobin", "scheme": "http", "hash_on": "vars", "pass_host": "pass"});
        match n % 9 {
            0 => upstream["type"] = "least_conn".into(),
            1 => upstream["type"] = "ewma".into(),
            2 => {
                upstream["type"] = "chash".into();
                upstream["key"] = self.random.one_of(&["remote_addr", "uri", "arg_user"]).into();
            }
            3 => {
                upstream["type"] = "chash".into();
                upstream["hash_on"] = self.random.one_of(&["header", "cookie"]).into();
                upstream["key"] = "x-session".into();
            }
            4 => {
                upstream["scheme"] = self.random.one_of(&["https", "grpc", "grpcs"]).into();
                upstream["tls"] = json!({"verify": false});
            }
            5 => {
                upstream["pass_host"] = "rewrite".into();
                upstream["upstream_host"] = "backend.example.com".into();
            }
            6 => upstream["timeout"] = json!({"connect": 3, "send": 6.5, "read": 60}),
            7 => upstream["keepalive_pool"] = json!({"size": 64, "requests": 500, "idle_timeout": 30}),
            _ => {
                upstream["retries"] = 2.into();
                upstream["retry_timeout"] = 1.5.into();
                upstream["name"] = format!("team service {n}").into();
            }
        }
        upstream
    }

    fn service(&mut self, n: usize) -> Value {
        let mut service = json!({"name": format!("service {n}"), "upstream": self.upstream()});
        match n % 4 {
            0 => service["hosts"] = json!([format!("s{n}.example.com"), format!("*.s{n}.example.org")]),
            1 => service["plugins"] = self.plugins(Kind::Service),
            2 => service["enable_websocket"] = true.into(),
            _ => {}
        }
        service
    }

    fn route(&mut self, n: usize) -> Value {
        if n < SERVED {
            return self.served(n);
        }
        let mut route = json!({"uri": format!("/api/v{}/team{}/r{n}{}", n % 3, n % 17, if n.is_multiple_of(2) { "/*" } else { "" }),
            "name": format!("route {n}"), "status": usize::from(!n.is_multiple_of(50)), "priority": 0});
        if n.is_multiple_of(6) {
            let uri = route["uri"].take();
            route.as_object_mut().expect("an object").remove("uri");
            route["uris"] = json!([uri, format!("/alias/{n}")]);
        }
        match n % 5 {
            0 => route["upstream"] = self.upstream(),
            1 => route["upstream_id"] = self.id(Kind::Upstream, n % 600).into(),
            2 => route["service_id"] = self.id(Kind::Service, n % 500).into(),
            3 => {
                route["upstream"] = self.upstream();
                route["plugins"] = self.plugins(Kind::Route);
            }
            _ => {
                route["upstream_id"] = self.id(Kind::Upstream, n % 600).into();
                route["plugin_config_id"] = self.id(Kind::PluginConfig, n % 200).into();
            }
        }
        match n % 11 {
            0 => route["host"] = format!("r{n}.example.com").into(),
            1 => route["hosts"] = json!([format!("r{n}.example.com"), "*.wild.example.com"]),
            2 => route["methods"] = json!(["GET", "POST", "PURGE"]),
            3 => route["vars"] = json!([["arg_version", "==", "v1"], ["http_x_tenant", "~~", "^[a-z]+$"]]),
            4 => route["vars"] = json!(["OR", ["cookie_beta", "==", "1"], ["remote_addr", "IPMATCH", ["10.0.0.0/8"]]]),
            5 => route["remote_addrs"] = json!(["127.0.0.0/8", "::1"]),
            6 => route["remote_addr"] = "10.0.0.0/8".into(),
            7 => route["filter_func"] = "function(vars) return vars.arg_a == 'b' end".into(),
            8 => route["timeout"] = json!({"connect": 5, "send": 5, "read": 30}),
            9 => route["enable_websocket"] = true.into(),
            _ => route["priority"] = (n % 100).into(),
        }
        route
    }

    /// One that a test may ask: every third wants a key.
    fn served(&mut self, n: usize) -> Value {
        let plugins = match n % 3 {
            0 => json!({"key-auth": {}, "response-rewrite": {"headers": {"X-Served": n}}}),
            1 => json!({"response-rewrite": {"headers": {"set": {"X-Served": n}}}, "limit-count":
                {"count": 10_000, "time_window": 60, "key": "remote_addr", "rejected_code": 429}}),
            _ => json!({"serverless-post-function": {"phase": "header_filter", "functions": [
                format!("return function() ngx.header['X-Served'] = {n} end")]}}),
        };
        let upstream = json!({"type": "roundrobin", "nodes": {&self.node: 1}, "scheme": "http", "hash_on": "vars", "pass_host": "pass"});
        json!({"uri": format!("/served/{n}"), "plugins": plugins, "upstream": upstream, "status": 1, "priority": 0})
    }

    fn consumer(&mut self, n: usize) -> Value {
        let plugins = match n % 5 {
            0 => json!({"key-auth": {"key": format!("key-of-consumer-{n}")}}),
            1 => json!({"basic-auth": {"username": format!("user-{n}"), "password": format!("pass word {n}")}}),
            2 => {
                json!({"jwt-auth": {"key": format!("jwt-{n}"), "secret": format!("secret of consumer {n}"), "exp": 3600}})
            }
            3 => {
                let key = rcgen::KeyPair::generate().expect("a key").public_key_pem();
                json!({"jwt-auth": {"key": format!("jwt-{n}"), "algorithm": "ES256", "public_key": key}})
            }
            _ => json!({"limit-count": {"count": 100 + n, "time_window": 60, "rejected_code": 429}}),
        };
        let mut consumer =
            json!({"username": format!("consumer_{n}"), "plugins": plugins, "desc": "a client of the API"});
        if n.is_multiple_of(7) {
            consumer["group_id"] = self.id(Kind::ConsumerGroup, n % 80).into();
        }
        consumer
    }

    fn credential(&mut self, n: usize) -> Value {
        match n % 3 {
            0 => json!({"plugins": {"key-auth": {"key": format!("key-of-credential-{n}")}}, "desc": "in rotation"}),
            1 => json!({"plugins": {"basic-auth": {"username": format!("cred-{n}"), "password": format!("p{n}")}}}),
            _ => {
                json!({"name": format!("cred {n}"), "plugins": {"jwt-auth": {"key": format!("cred-{n}"), "secret": "as long as it needs to be"}}})
            }
        }
    }

    fn ssl(&mut self, n: usize) -> Value {
        let name = format!("tls{n}.example.com");
        let pair = rcgen::generate_simple_self_signed([name.clone()]).expect("a certificate");
        let mut ssl =
            json!({"cert": pair.cert.pem(), "key": pair.signing_key.serialize_pem(), "status": 1, "type": "server"});
        match n % 5 {
            0 => ssl["sni"] = name.into(),
            1 => ssl["snis"] = json!([name, format!("*.tls{n}.example.org")]),
            2 => {
                ssl["sni"] = name.into();
                ssl["client"] = json!({"ca": pair.cert.pem(), "depth": 1});
            }
            3 => {
                ssl["sni"] = name.into();
                ssl["certs"] = json!([pair.cert.pem()]);
                ssl["keys"] = json!([pair.signing_key.serialize_pem()]);
                ssl["ssl_protocols"] = json!(["TLSv1.2", "TLSv1.3"]);
            }
            _ => ssl["type"] = "client".into(),
        }
        ssl
    }

    /// A plugin stands in one of the rules only.
    fn global_rule(&mut self, n: usize) -> Value {
        let plugins = [
            json!({"prometheus": {"prefer_name": true}}),
            json!({"request-id": {"header_name": "X-Request-Id"}}),
            json!({"ip-restriction": {"blacklist": ["192.0.2.7"], "message": "not from there"}}),
            json!({"ua-restriction": {"denylist": ["evil-bot"], "bypass_missing": true}}),
            json!({"cors": {"max_age": 600}}),
        ];
        json!({"plugins": plugins[n]})
    }

    fn stream_route(&mut self, n: usize) -> Value {
        let nodes = json!({format!("10.1.{}.{}:{}", n % 200, 1 + n % 250, 3306 + n): 1});
        let upstream = json!({"nodes": nodes, "type": "roundrobin", "scheme": if n.is_multiple_of(5) { "tls" } else { "tcp" },
            "hash_on": "vars", "pass_host": "pass"});
        match n % 4 {
            0 => json!({"server_port": 20_000 + n, "upstream": upstream}),
            1 => {
                json!({"server_addr": "127.0.0.1", "server_port": 20_000 + n, "remote_addr": "10.0.0.0/8", "upstream": upstream})
            }
            2 => json!({"sni": format!("db{n}.example.com"), "upstream": upstream, "desc": "a database"}),
            _ => {
                json!({"remote_addr": format!("192.0.2.{}", n % 250), "upstream_id": self.id(Kind::Upstream, n % 600)})
            }
        }
    }

    /// As APISIX stores it: most under the first key of the ring, some still under one that was the first before.
    fn encrypt(&mut self, kind: Kind, id: &str, value: &mut Value) {
        let keyring = &self.keyrings[usize::from(self.random.once_in(4))];
        let map = value.as_object_mut().expect("an object");
        if kind == Kind::Ssl {
            crypt::with_private_keys(map, &mut |key| Some(keyring.encrypt_pkey(key)));
        }
        let schema = match kind {
            Kind::Consumer | Kind::Credential => SchemaKind::Consumer,
            Kind::PluginMetadata => return crypt::encrypt_fields(keyring, None, id, SchemaKind::Metadata, value),
            _ => SchemaKind::Route,
        };
        for (name, conf) in map.get_mut("plugins").and_then(Value::as_object_mut).into_iter().flatten() {
            crypt::encrypt_fields(keyring, None, name, schema, conf);
        }
    }
}

/// Plugins that have settings for the whole gateway.
const METADATA: [&str; 5] = ["http-logger", "file-logger", "cors", "limit-count", "prometheus"];

fn metadata(n: usize) -> Value {
    let format = json!({"host": "$host", "@timestamp": "$time_iso8601", "client_ip": "$remote_addr", "more": {"route": "$route_id"}});
    match METADATA[n] {
        "cors" => json!({"allow_origins": {"key_1": "https://domain.example.com"}}),
        "limit-count" => json!({"limit_header": "X-Limit", "remaining_header": "X-Left"}),
        "prometheus" => json!({"disabled_labels": {"http_status": ["node"]}}),
        _ => json!({"log_format": format}),
    }
}

fn secret(n: usize) -> Value {
    [
        json!({"uri": "http://127.0.0.1:8200", "prefix": "kv/apisix", "token": "root"}),
        json!({"region": "us-east-1", "access_key_id": "id", "secret_access_key": "key", "endpoint_url": "http://127.0.0.1:4566"}),
        json!({"auth_config": {"client_email": "a@example.com", "private_key": "key", "project_id": "p"}, "ssl_verify": true}),
    ][n]
        .clone()
}

fn proto(n: usize) -> String {
    format!(
        "syntax = \"proto3\";\npackage team{n};\nservice Greeter {{\n  rpc SayHello (HelloRequest) returns (HelloReply) {{}}\n}}\n\
         message HelloRequest {{\n  string name = 1;\n}}\nmessage HelloReply {{\n  string message = 1;\n}}\n"
    )
}
