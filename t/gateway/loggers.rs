//! What loggers write, and what waits for them.

use std::{collections::BTreeSet, fs};

use serde_json::{Value, json};

use crate::support::{Dir, Gateway, Upstream, eventually};

/// Entries in a file, as soon as there are so many.
fn entries(gw: &Gateway, file: &str, count: usize) -> Vec<Value> {
    eventually(&format!("{count} entries in {file}"), || {
        let text = fs::read_to_string(gw.dir.join(file)).ok()?;
        let all: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("an entry")).collect();
        (all.len() >= count).then_some(all)
    })
}

fn fields(value: &Value) -> BTreeSet<&str> {
    value.as_object().expect("an object").keys().map(String::as_str).collect()
}

#[track_caller]
fn has_fields(value: &Value, expected: &[&str]) {
    assert_eq!(fields(value), expected.iter().copied().collect(), "{value}");
}

/// A moment of the request, in milliseconds.
#[track_caller]
fn is_millis(value: &Value) -> f64 {
    let millis = value.as_f64().expect("a number");
    assert!((0.0..60_000.0).contains(&millis), "{millis}");
    millis
}

/// Checks the entry of `POST /log?a=1&b=2&b=3` with a body, by a consumer, over a service.
fn is_whole(entry: &Value, gw: &Gateway, up: &Upstream) {
    let own =
        ["request", "response", "server", "upstream", "service_id", "route_id", "consumer", "client_ip", "start_time"];
    has_fields(entry, &[own.as_slice(), &["latency", "upstream_latency", "apisix_latency"]].concat());
    let (request, response) = (&entry["request"], &entry["response"]);
    has_fields(request, &["url", "uri", "method", "headers", "querystring", "size", "body"]);
    assert_eq!(request["url"], format!("http://{}/log?a=1&b=2&b=3", gw.proxy()));
    assert_eq!((&request["uri"], &request["method"]), (&json!("/log?a=1&b=2&b=3"), &json!("POST")));
    assert_eq!(request["querystring"], json!({"a": "1", "b": ["2", "3"]}));
    assert_eq!((&request["headers"]["x-mine"], &request["body"]), (&json!("yes"), &json!("a body")));
    assert!(request["size"].as_u64().expect("bytes") > 100, "{request}");
    has_fields(response, &["status", "headers", "size", "body"]);
    assert_eq!((&response["status"], &response["body"]), (&json!(200), &json!("moon")));
    assert_eq!(response["headers"]["content-type"], "text/plain; charset=utf-8");
    assert!(response["size"].as_u64().expect("bytes") > 60, "{response}");
    has_fields(&entry["server"], &["hostname", "version"]);
    assert!(entry["server"]["hostname"].as_str().is_some_and(|name| !name.is_empty()));
    assert_eq!(entry["server"]["version"], "3.18.0", "of APISIX, whose format it is");
    assert_eq!((&entry["upstream"], &entry["client_ip"]), (&json!(up.addr()), &json!("127.0.0.1")));
    assert_eq!((&entry["service_id"], &entry["route_id"]), (&json!("s1"), &json!("r1")));
    assert_eq!(entry["consumer"], json!({"username": "jack", "group_id": "g1"}));
    assert!(entry["start_time"].as_f64().expect("a number") > 1.6e12, "milliseconds since 1970: {entry}");
    let sum = is_millis(&entry["upstream_latency"]) + is_millis(&entry["apisix_latency"]);
    assert!((sum - is_millis(&entry["latency"])).abs() < 1.0, "{entry}");
}

#[test]
fn the_default_entry_says_all_of_a_request() {
    let up = Upstream::answering(|_| "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 4\r\n\r\nmoon");
    let collector = Upstream::echo();
    let gw = Gateway::start();
    let file = gw.dir.join("entries.log");
    let bodies = json!({"include_req_body": true, "include_resp_body": true});
    let (mut to_file, mut to_http) = (bodies.clone(), bodies);
    to_file["path"] = json!(file.to_string_lossy());
    to_http["uri"] = json!(format!("http://{}/in", collector.addr()));
    to_http["batch_max_size"] = json!(1);
    let upstream = json!({"nodes": {up.addr(): 1}});
    gw.put("/services/s1", json!({"upstream": upstream}));
    gw.put("/consumer_groups/g1", json!({"plugins": {}}));
    gw.put("/consumers/jack", json!({"username": "jack", "group_id": "g1", "plugins": {"key-auth": {"key": "jack"}}}));
    let plugins = json!({"key-auth": {}, "file-logger": to_file, "http-logger": to_http});
    gw.put("/routes/r1", json!({"uri": "/log", "service_id": "s1", "plugins": plugins}));
    let headers = [("apikey", "jack"), ("X-Mine", "yes")];
    assert_eq!(gw.send("POST", "/log?a=1&b=2&b=3", &headers, b"a body").status, 200);
    is_whole(&entries(&gw, "entries.log", 1)[0], &gw, &up);
    let sent = eventually("an entry at the collector", || collector.seen().pop());
    is_whole(&serde_json::from_slice(&sent.body).expect("JSON"), &gw, &up);
}

#[test]
fn an_entry_without_service_consumer_upstream_and_bodies_leaves_them_out() {
    let gw = Gateway::start();
    let plugins =
        json!({"file-logger": {"path": gw.dir.join("e.log").to_string_lossy()}, "mocking": {"response_example": "x"}});
    gw.put("/routes/1", json!({"uri": "/x", "plugins": plugins, "upstream": {"nodes": {"127.0.0.1:1": 1}}}));
    assert_eq!(gw.get("/x").status, 200);
    let entry = &entries(&gw, "e.log", 1)[0];
    let own = [
        "request",
        "response",
        "server",
        "service_id",
        "route_id",
        "client_ip",
        "start_time",
        "latency",
        "apisix_latency",
    ];
    has_fields(entry, &own);
    assert_eq!(entry["service_id"], "");
    has_fields(&entry["request"], &["url", "uri", "method", "headers", "querystring", "size"]);
    has_fields(&entry["response"], &["status", "headers", "size"]);
}

/// A route whose file-logger has this conf, asked once: the entry.
fn entry_with(gw: &Gateway, up: &Upstream, file: &str, mut conf: Value) -> Value {
    conf["path"] = json!(gw.dir.join(file).to_string_lossy());
    gw.route("1", "/*", up, json!({"file-logger": conf}));
    assert_eq!(gw.get("/x?a=1").status, 200);
    entries(gw, file, 1).remove(0)
}

#[test]
fn log_format_replaces_the_entry_and_log_format_extra_adds_to_it() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    let format = json!({
        "host": "$host", "text": "$request_method of $arg_a$arg_none", "fixed": "plain", "number": 7, "missing": "$arg_none",
        "request": {"uri": "$request_uri", "response": {"status": "$status"}},
    });
    let extra = json!({"arg": "$arg_a", "route_id": "mine", "more": {"by": "$upstream_unresolved_host"}});
    let both =
        json!({"log_format": format, "log_format_extra": extra, "include_req_body": true, "include_resp_body": true});
    let expected = json!({
        "host": "127.0.0.1", "text": "GET of 1", "fixed": "plain", "number": 7,
        "request": {"uri": "/x?a=1", "response": {"status": 200}}, "route_id": "1",
    });
    assert_eq!(entry_with(&gw, &up, "a.log", both), expected, "no bodies, and nothing extra");
    let added = entry_with(&gw, &up, "b.log", json!({"log_format_extra": extra}));
    assert_eq!(
        (&added["arg"], &added["route_id"], &added["more"]["by"]),
        (&json!("1"), &json!("mine"), &json!("127.0.0.1"))
    );
    assert_eq!((&added["response"]["status"], &added["upstream"]), (&json!(200), &json!(up.addr())));
    let deep =
        entry_with(&gw, &up, "c.log", json!({"log_format": {"a": {"b": {"c": {"d": {"e": {"f": {"g": "$host"}}}}}}}}));
    assert_eq!(deep, json!({"a": {"b": {"c": {"d": {"e": {}}}}}, "route_id": "1"}));
    gw.expect_log("log_format nesting exceeds max depth 5, truncating");
}

#[test]
fn a_format_may_name_the_response_body() {
    let up = Upstream::answering(|_| "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello");
    let gw = Gateway::start();
    let with = |include: bool| json!({"include_resp_body": include, "max_resp_body_bytes": 4, "log_format": {"b": "$resp_body", "in": "<$resp_body>"}});
    let entry = entry_with(&gw, &up, "a.log", with(true));
    assert_eq!(entry, json!({"b": "hell", "in": "<hell>", "route_id": "1"}));
    assert_eq!(entry_with(&gw, &up, "b.log", with(false)), json!({"in": "<>", "route_id": "1"}), "nobody gathers it");
    gw.put("/plugin_metadata/file-logger", json!({"log_format": {"b": "$resp_body"}}));
    let entry = entry_with(&gw, &up, "c.log", json!({"include_resp_body": true}));
    assert_eq!(entry, json!({"b": "hello", "route_id": "1"}));
    let source = "return function(conf, ctx) ngx.log(ngx.WARN, 'of var: ', ctx.var.resp_body) end";
    let plugins = json!({"serverless-post-function": {"phase": "log", "functions": [source]},
        "file-logger": {"path": "logs/d.log", "include_resp_body": true}});
    gw.route("1", "/*", &up, plugins);
    assert_eq!(gw.get("/x").status, 200);
    gw.expect_log("of var: hello");
    assert_eq!(entries(&gw, "logs/d.log", 1)[0]["b"], "hello");
}

#[test]
fn variables_of_apisix_are_there_for_formats() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    gw.put("/consumer_groups/g1", json!({"plugins": {}}));
    gw.put("/consumers", json!({"username": "jack", "group_id": "g1", "plugins": {"key-auth": {"key": "k"}}}));
    let node = up.addr().replace("127.0.0.1", "localhost");
    gw.put("/services/s1", json!({"name": "of all", "upstream": {"nodes": {node: 1}}}));
    let names = [
        "balancer_ip",
        "balancer_port",
        "consumer_name",
        "consumer_group_id",
        "graphql_name",
        "graphql_operation",
        "graphql_root_fields",
        "route_id",
        "route_name",
        "service_id",
        "service_name",
        "upstream_unresolved_host",
        "mqtt_client_id",
        "redis_cmd_line",
        "rpc_time",
    ];
    let format: serde_json::Map<String, Value> =
        names.iter().map(|name| (format!("v_{name}"), json!(format!("${name}")))).collect();
    let plugins = json!({"key-auth": {}, "file-logger": {"path": "logs/e.log", "log_format": format}});
    gw.put(
        "/routes/r1",
        json!({"uri": "/graphql", "name": "one", "service_id": "s1", "plugins": plugins,
        "vars": [["graphql_operation", "==", "query"]]}),
    );
    let body = br#"{"query": "query Heroes { hero { name } }"}"#;
    let headers = [("apikey", "k"), ("Content-Type", "application/json")];
    assert_eq!(gw.send("POST", "/graphql", &headers, body).status, 200);
    let entry = &entries(&gw, "logs/e.log", 1)[0];
    let port = up.addr().rsplit(':').next().expect("a port").to_owned();
    let expected = json!({
        "v_balancer_ip": "127.0.0.1", "v_balancer_port": entry["v_balancer_port"], "v_consumer_name": "jack", "v_consumer_group_id": "g1",
        "v_graphql_name": "Heroes", "v_graphql_operation": "query", "v_graphql_root_fields": ["hero"],
        "v_route_id": "r1", "v_route_name": "one", "v_service_id": "s1", "v_service_name": "of all",
        "v_upstream_unresolved_host": "localhost", "route_id": "r1", "service_id": "s1",
    });
    assert_eq!((entry, entry["v_balancer_port"].to_string().trim_matches('"')), (&expected, &*port));
}

#[test]
fn metadata_formats_entries_where_the_conf_does_not() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    gw.put("/plugin_metadata/file-logger", json!({"log_format_extra": {"meta": "$arg_a"}}));
    let added = entry_with(&gw, &up, "a.log", json!({}));
    assert_eq!((&added["meta"], &added["route_id"]), (&json!("1"), &json!("1")));
    let own = entry_with(&gw, &up, "b.log", json!({"log_format_extra": {"own": "x"}}));
    assert_eq!((&own["own"], &own["meta"]), (&json!("x"), &Value::Null));
    gw.put("/plugin_metadata/file-logger", json!({"log_format": {"meta": "$arg_a"}}));
    assert_eq!(entry_with(&gw, &up, "c.log", json!({})), json!({"meta": "1", "route_id": "1"}));
    let own = entry_with(&gw, &up, "d.log", json!({"log_format": {"own": "$host"}}));
    assert_eq!(own, json!({"own": "127.0.0.1", "route_id": "1"}));
    let without = json!({"uri": "/*", "plugins": {"file-logger": {}}, "upstream": {"nodes": {up.addr(): 1}}});
    let refused = gw.admin("PUT", "/routes/1", without);
    assert_eq!(refused.status, 400);
    let reason = "property \\\"path\\\" is not set in either the plugin conf or the metadata";
    assert!(refused.text().contains(reason), "{}", refused.text());
    gw.put("/plugin_metadata/file-logger", json!({"path": gw.dir.join("meta.log").to_string_lossy()}));
    gw.route("1", "/*", &up, json!({"file-logger": {}}));
    assert_eq!(gw.get("/x").status, 200);
    assert_eq!(entries(&gw, "meta.log", 1)[0]["route_id"], "1");
    assert_eq!(gw.admin("DELETE", "/plugin_metadata/file-logger", ()).status, 200);
    assert_eq!(gw.get("/x").status, 200, "the route stays");
    gw.expect_log("property \"path\" is not set in either the plugin conf or the metadata");
}

#[test]
fn a_body_is_logged_as_the_client_reads_it_up_to_its_bound() {
    const GZIP: &[u8] = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\x03\x4b\x54\x48\xaf\xca\x2c\x50\x28\x49\xad\x28\x01\x00\xd9\xc9\x10\x7e\x0b\x00\x00\x00";
    let up = Upstream::answering(|_| {
        let head = format!("HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {}\r\n\r\n", GZIP.len());
        [head.as_bytes(), GZIP].concat()
    });
    let gw = Gateway::start();
    let whole = entry_with(&gw, &up, "a.log", json!({"include_resp_body": true}));
    assert_eq!(whole["response"]["body"], "a gzip text");
    let cut = entry_with(&gw, &up, "b.log", json!({"include_resp_body": true, "max_resp_body_bytes": 18}));
    let text = cut["response"]["body"].as_str().expect("a text");
    assert!((1..11).contains(&text.len()) && "a gzip text".starts_with(text), "what came before the cut: {text}");
}

/// A gateway of one worker with a logger of one's own, which tells what it holds at `/held`.
fn with_logger(stale_interval: &str) -> (Gateway, Upstream) {
    let dir = Dir::new();
    let source = format!(
        "local bpm = require('apisix.utils.batch-processor-manager')\n\
         local manager = bpm.new('my logger', 'mylogger')\n\
         {stale_interval}\n\
         local _M = {{ version = 1, priority = 10, name = 'mylogger', metadata_schema = manager:wrap_metadata_schema({{}}) }}\n\
         _M.schema = manager:wrap_schema({{ type = 'object', properties = {{ bytes = {{ type = 'integer', default = 1 }} }} }})\n\
         function _M.check_schema(conf, kind)\n\
             local schema = kind == 2 and _M.metadata_schema or _M.schema\n\
             return require('apisix.core').schema.check(schema, conf)\n\
         end\n\
         function _M.access(conf, ctx)\n\
             if ctx.var.uri ~= '/held' then return end\n\
             local waiting = manager.total_pushed_entries - manager.total_processed_entries\n\
             return 200, {{ processors = manager:count(), waiting = waiting, bytes = manager.pending_bytes }}\n\
         end\n\
         local function send(conf) return function() return conf.max_retry_count == 0, 'the server is down' end end\n\
         function _M.log(conf, ctx)\n\
             if ctx.var.uri == '/held' then return end\n\
             local entry = {{ text = ('x'):rep(conf.bytes) }}\n\
             if not manager:add_entry(conf, entry) then manager:add_entry_to_new_processor(conf, entry, ctx, send(conf)) end\n\
         end\n\
         return _M\n"
    );
    dir.write("plugins/mylogger.lua", source);
    dir.configure(json!({"nginx_config": {"worker_processes": 1}}));
    (Gateway::in_dir(dir), Upstream::echo())
}

fn held(gw: &Gateway) -> (u64, u64, u64) {
    let told = gw.get("/held").json();
    let number = |field: &str| told[field].as_u64().expect("a number");
    (number("processors"), number("waiting"), number("bytes"))
}

#[test]
fn processors_of_confs_that_are_gone_go() {
    let (gw, up) = with_logger("");
    for bytes in 1..200 {
        gw.route("1", "/*", &up, json!({"mylogger": {"bytes": bytes, "batch_max_size": 1}}));
        assert_eq!(gw.get("/x").status, 200);
    }
    let (processors, ..) = held(&gw);
    assert!((1..=66).contains(&processors), "however often the conf changes: {processors}");
    eventually("all is sent", || (held(&gw).1 == 0).then_some(()));
    assert_eq!(held(&gw).2, 0);
}

#[test]
fn processors_for_which_nothing_waits_go_in_time() {
    let (gw, up) = with_logger("bpm.set_check_stale_interval(0.05)");
    gw.route("1", "/*", &up, json!({"mylogger": {"batch_max_size": 1}}));
    for _ in 0..2 {
        assert_eq!(gw.get("/x").status, 200);
        eventually("no processor is left", || (held(&gw) == (0, 0, 0)).then_some(()));
    }
    gw.route("1", "/*", &up, json!({"mylogger": {"batch_max_size": 1, "max_retry_count": 1000}}));
    assert_eq!(gw.get("/x").status, 200);
    gw.expect_log("failed to process entries: the server is down");
    assert_eq!((held(&gw).0, held(&gw).1), (1, 1), "what waits is kept");
}

#[test]
fn what_waits_for_a_logger_is_bounded_in_bytes_and_entries() {
    let (gw, up) = with_logger("");
    let conf = |bytes: usize| json!({"mylogger": {"bytes": bytes, "batch_max_size": 1, "max_retry_count": 1000, "retry_delay": 60}});
    gw.route("1", "/*", &up, conf(16 << 20));
    for _ in 0..5 {
        assert_eq!(gw.get("/x").status, 200, "requests go on");
    }
    gw.expect_log("max pending bytes limit exceeded. discarding entry. my logger pending_bytes: ");
    let (_, waiting, bytes) = held(&gw);
    assert_eq!(waiting, 3, "a fourth would be more than 64 MiB");
    assert!((3 << 24..64 << 20).contains(&bytes), "{bytes}");
    gw.route("1", "/*", &up, conf(1));
    assert_eq!(gw.get("/x").status, 200);
    assert_eq!(held(&gw).1, 4, "a small one has room");
    gw.put("/plugin_metadata/mylogger", json!({"max_pending_entries": 5}));
    eventually("a line about entries that are dropped", || {
        assert_eq!(gw.get("/x").status, 200);
        gw.log().contains("max_pending_entries: 5 discarded_entries: ").then_some(())
    });
    assert_eq!(held(&gw).1, 5);
}

#[test]
fn a_processor_that_is_used_by_itself_has_the_same_bound() {
    let (gw, up) = (Gateway::start(), Upstream::echo());
    let source = "return function() \
        local config = { batch_max_size = 100, max_pending_bytes = 300 } \
        local processor = require('apisix.utils.batch-processor'):new(function() return true end, config) \
        for _ = 1, 5 do processor:push(('x'):rep(100)) end \
        return 200, { waiting = processor.pending } end";
    gw.route("1", "/x", &up, json!({"serverless-pre-function": {"functions": [source]}}));
    assert_eq!(gw.get("/x").json(), json!({"waiting": 2}));
    gw.expect_log("max pending bytes limit exceeded. discarding entry. pending_bytes: 280 max_pending_bytes: 300");
}
