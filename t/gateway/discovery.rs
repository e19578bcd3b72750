//! Upstreams whose nodes a registry of the user's own knows (`discovery_type`).

use std::fs;

use serde_json::{Value, json};

use crate::support::{Dir, Gateway, Reply, Upstream, eventually, get, request, run};

/// Knows what the shared dictionary says of a service, and takes note of what it is asked.
const MINE: &str = r#"
local json = require("cjson.safe")
local dict = ngx.shared.discovery
local conf = require("apisix.core.config_local").local_conf().discovery.mine
local _M, texts, known = {}, {}, {}

function _M.nodes(service, args)
    if service == "boom" then error("out of order") end
    if service == "slow" then ngx.sleep(0.01) end
    if service == "new" then
        return dict:incr("asked", 1, 0) <= 40 and json.decode(dict:get("new")) or nil, "not known yet"
    end
    if service == "odd" then return "127.0.0.1" end
    if service == "huge" then return { { host = ("h"):rep(4 * 1024 * 1024), weight = 1 } } end
    local key = args and service .. "/" .. args.group_name or service
    local text = dict:get(key)
    if not text then return nil, "nobody knows " .. key end
    if texts[key] ~= text then texts[key], known[key] = text, json.decode(text) end
    if service == "fresh" then return json.decode(text) end
    return known[key]
end

function _M.init_worker()
    ngx.timer.at(0, function() dict:set("timed", json.encode({ { host = "127.0.0.1", port = conf.port, weight = conf.weight } })) end)
end

function _M.dump_data() return { config = conf, phase = ngx.get_phase() } end

function _M.control_api()
    return { methods = { "GET" }, uris = { "/v1/discovery/mine/show_dump_file" }, handler = function() return 200, "a file" end }
end

return _M
"#;

const SCHEMA: &str = r#"return { type = "object", required = { "port" }, properties = {
    port = { type = "integer" }, weight = { type = "integer", minimum = 1, default = 7 } } }"#;

/// Which nodes a service has, said by a request.
const TELL: &str = r#"return function()
    ngx.req.read_body()
    ngx.shared.discovery:set(ngx.var.arg_service, ngx.req.get_body_data() or "[]")
    ngx.exit(204)
end"#;

fn dir(module: &str, conf: Value) -> Dir {
    let dir = Dir::new();
    fs::create_dir_all(dir.join("mods/apisix/discovery/mine")).expect("directories");
    dir.write("mods/apisix/discovery/mine.lua", module);
    dir.write("mods/apisix/discovery/mine/schema.lua", SCHEMA);
    let path = format!("{}/?.lua", dir.join("mods").display());
    dir.configure(json!({"apisix": {"extra_lua_path": path}, "discovery": {"mine": conf}}));
    dir
}

fn gateway(timed: &Upstream) -> Gateway {
    let gw = Gateway::in_dir(dir(MINE, json!({"port": port(timed)})));
    gw.put("/routes/tell", json!({"uri": "/tell", "plugins": {"serverless-pre-function": {"functions": [TELL]}}}));
    gw
}

fn port(up: &Upstream) -> u16 {
    up.addr().rsplit_once(':').expect("a port").1.parse().expect("a port")
}

fn node(up: &Upstream) -> Value {
    json!({"host": "127.0.0.1", "port": port(up), "weight": 1})
}

fn tell(gw: &Gateway, service: &str, nodes: &Value) {
    let told = gw.send("POST", &format!("/tell?service={service}"), &[], nodes.to_string().as_bytes());
    assert_eq!(told.status, 204, "{}", told.text());
}

fn of(service: &str) -> Value {
    json!({"type": "roundrobin", "discovery_type": "mine", "service_name": service})
}

/// Statuses of some requests, as many as each worker gets some of.
fn statuses(gw: &Gateway, path: &str) -> Vec<u16> {
    let mut all: Vec<u16> = (0..20).map(|_| gw.get(path).status).collect();
    all.sort_unstable();
    all.dedup();
    all
}

fn control(gw: &Gateway, path: &str) -> Reply {
    get(&gw.control(), path)
}

#[test]
fn nodes_come_from_the_users_own_registry_and_change_without_a_write() {
    let (a, b) = (Upstream::echo(), Upstream::echo());
    let gw = gateway(&a);
    gw.put("/routes/1", json!({"uri": "/inline", "upstream": of("s")}));
    gw.put("/upstreams/1", of("s"));
    gw.put("/routes/2", json!({"uri": "/by-id", "upstream_id": "1"}));
    gw.put("/services/1", json!({"upstream": of("s")}));
    gw.put("/routes/3", json!({"uri": "/service", "service_id": "1"}));
    let set = "local up = { type = 'roundrobin', discovery_type = 'mine', service_name = 's' }
        return function(_, ctx) assert(require('apisix.upstream').set(ctx, 'mine#1', 1, up)) end";
    let plugin = json!({"serverless-pre-function": {"phase": "access", "functions": [set]}});
    gw.put("/routes/4", json!({"uri": "/plugin", "plugins": plugin, "upstream": {"nodes": {"127.0.0.1:1": 1}}}));
    let paths = ["/inline", "/by-id", "/service", "/plugin"];
    for path in paths {
        assert_eq!(statuses(&gw, path), [503], "{path}");
    }
    gw.expect_log("no valid upstream node: nobody knows s");
    tell(&gw, "s", &json!([node(&a)]));
    for path in paths {
        assert_eq!(statuses(&gw, path), [200], "{path}");
    }
    assert_eq!((a.seen().len(), b.seen().len()), (80, 0));
    gw.expect_log(&format!("upstream nodes: {{\"127.0.0.1:{}\":1}}", port(&a)));
    tell(&gw, "s", &json!([node(&b)]));
    for path in paths {
        assert_eq!(statuses(&gw, path), [200], "{path}");
    }
    assert_eq!((a.seen().len(), b.seen().len()), (80, 80), "the next request sees the change");
    tell(&gw, "s", &json!([]));
    for path in paths {
        assert_eq!(statuses(&gw, path), [503], "{path}");
    }
    tell(&gw, "s", &json!([node(&a), {"host": "127.0.0.1", "port": port(&b), "weight": 0}]));
    assert_eq!(statuses(&gw, "/inline"), [200]);
    assert_eq!((a.seen().len(), b.seen().len()), (100, 80), "weights count");
}

#[test]
fn what_a_timer_has_found_is_served_and_shown_by_the_control_api() {
    let up = Upstream::echo();
    let gw = gateway(&up);
    gw.put("/routes/1", json!({"uri": "/x", "upstream": of("timed")}));
    eventually("the timer has run", || (gw.get("/x").status == 200).then_some(()));
    let dump = control(&gw, "/v1/discovery/mine/dump");
    assert_eq!((dump.status, dump.header("content-type")), (200, Some("application/json")));
    assert_eq!(dump.json()["config"], json!({"port": port(&up), "weight": 7}), "the schema's default is filled in");
    assert_eq!(control(&gw, "/v1/discovery/mine/show_dump_file").text(), "a file");
    for path in ["/v1/discovery/mine/other", "/v1/discovery/dns/dump"] {
        assert_eq!(control(&gw, path).status, 404, "{path}");
    }
}

#[test]
fn a_new_vm_goes_on_with_what_the_one_before_has_found() {
    let up = Upstream::echo();
    let gw = gateway(&up);
    gw.put("/routes/1", json!({"uri": "/x", "upstream": of("new")}));
    tell(&gw, "new", &json!([node(&up)]));
    for _ in 0..40 {
        assert_eq!(gw.get("/x").status, 200);
    }
    assert_eq!(statuses(&gw, "/x"), [503], "the registry says that it does not know");
    for reload in 0..3 {
        assert_eq!(request(&gw.control(), "PUT", "/v1/plugins/reload", &[], b"").status, 200);
        // Nobody asks between the last two.
        if reload != 1 {
            assert_eq!(statuses(&gw, "/x"), [200], "a new one may not know yet");
        }
    }
}

#[test]
fn priorities_and_retries_are_those_of_nodes_that_are_written_down() {
    let up = Upstream::echo();
    let gw = gateway(&up);
    gw.put("/routes/1", json!({"uri": "/x", "upstream": of("fresh")}));
    let dead: u16 = Upstream::dead().rsplit_once(':').expect("a port").1.parse().expect("a port");
    let nodes = json!([node(&up), {"host": "127.0.0.1", "port": dead, "weight": 1, "priority": 1}]);
    tell(&gw, "fresh", &nodes);
    assert_eq!(statuses(&gw, "/x"), [200], "the dead node first, then the other");
    assert_eq!(up.seen().len(), 20);
    let shown = format!("upstream nodes: {{\"127.0.0.1:{dead}\":1,\"127.0.0.1:{}\":1}}", port(&up));
    let other = format!("upstream nodes: {{\"127.0.0.1:{}\":1,\"127.0.0.1:{dead}\":1}}", port(&up));
    let read = || gw.log().matches("upstream nodes: ").count();
    let before = read();
    assert!((1..=2).contains(&before), "once in each worker, though each request got a table of its own: {}", gw.log());
    assert!(gw.log().contains(&shown) || gw.log().contains(&other));
    tell(&gw, "fresh", &json!([nodes[1], nodes[0]]));
    assert_eq!(statuses(&gw, "/x"), [200]);
    assert_eq!(read(), before, "another order is no change");
    let named = json!([{"host": "localhost", "port": port(&up), "weight": 1, "metadata": {"zone": "a"}}]);
    tell(&gw, "fresh", &named);
    assert_eq!(statuses(&gw, "/x"), [200], "names are resolved");
    assert!(read() > before);
}

#[test]
fn arguments_are_passed_and_a_registry_may_wait() {
    let (up, timed) = (Upstream::echo(), Upstream::echo());
    let gw = gateway(&timed);
    let mut with_args = of("slow");
    with_args["discovery_args"] = json!({"group_name": "g"});
    gw.put("/routes/1", json!({"uri": "/x", "upstream": with_args}));
    gw.put("/routes/2", json!({"uri": "/y", "upstream": of("slow")}));
    tell(&gw, "slow/g", &json!([node(&up)]));
    assert_eq!((statuses(&gw, "/x"), statuses(&gw, "/y")), (vec![200], vec![503]));
}

#[test]
fn what_a_registry_does_wrong_is_the_requests_error_and_told() {
    let up = Upstream::echo();
    let gw = gateway(&up);
    for (at, service) in ["boom", "odd", "huge", "s"].iter().enumerate() {
        gw.put(&format!("/routes/{at}"), json!({"uri": format!("/{service}"), "upstream": of(service)}));
    }
    let unknown = json!({"type": "roundrobin", "discovery_type": "nobodys", "service_name": "s"});
    gw.put("/routes/9", json!({"uri": "/unknown", "upstream": unknown}));
    assert_eq!(statuses(&gw, "/boom"), [500]);
    gw.expect_log("mine.lua:8: out of order");
    assert_eq!(statuses(&gw, "/odd"), [503]);
    gw.expect_log("invalid nodes format: wrong type: expected array, got string");
    assert_eq!(statuses(&gw, "/huge"), [503]);
    gw.expect_log("bytes of nodes, more than 4194304");
    assert_eq!(statuses(&gw, "/unknown"), [503]);
    gw.expect_log("discovery nobodys is uninitialized");
    for (nodes, why) in [
        (json!([{"host": "127.0.0.1", "port": 1, "weight": "0"}]), "property \"weight\" validation failed: wrong type"),
        (json!([{"host": "127.0.0.1", "weight": 1}, 2]), "failed to validate item 2"),
        (json!(vec![node(&up); 10_001]), "10001 nodes, more than 10000"),
    ] {
        tell(&gw, "s", &nodes);
        assert_eq!(statuses(&gw, "/s"), [503], "{why}");
        gw.expect_log(why);
    }
    tell(&gw, "s", &json!(vec![node(&up); 10_000]));
    assert_eq!(statuses(&gw, "/s"), [200], "as many as there may be");
}

#[test]
fn a_registry_that_cannot_serve_stops_the_start() {
    let refused = |dir: Dir, why: &str| {
        let (status, text) = run(dir.command());
        assert!(!status.success() && text.contains(why), "{why}: {text}");
    };
    let no_port = "discovery.mine: property \"port\" is required";
    refused(dir(MINE, json!({})), no_port);
    refused(dir(MINE, json!({"port": 1, "weight": 0})), "discovery.mine: property \"weight\" validation failed");
    refused(dir("return {}", json!({"port": 1})), "apisix.discovery.mine has no function nodes");
    refused(dir("local x = = 1", json!({"port": 1})), "mine.lua:1: unexpected symbol");
    let missing = Dir::new();
    missing.configure(json!({"discovery": {"eureka": {"host": ["http://127.0.0.1:8761"]}}}));
    refused(missing, "discovery.eureka: there is no module apisix.discovery.eureka");
    let dns = Dir::new();
    dns.configure(json!({"discovery": {"dns": {"servers": ["127.0.0.1"], "order": ["B", "SRV"]}}}));
    refused(dns, "matches none of the enum values");
}
