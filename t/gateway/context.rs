//! What `ctx` tells plugins of the request: its upstream and the node that was picked, resources, what its body says.

use serde_json::{Value, json};

use crate::support::{Dir, Gateway, Upstream, ports::dead_port};

/// Functions as a route's `serverless-pre-function` and `serverless-post-function`.
fn functions(pre: (&str, &str), post: (&str, &str)) -> Value {
    let one = |(phase, source): (&str, &str)| json!({"phase": phase, "functions": [format!("return function(_, ctx) local core = require('apisix.core') {source} end")]});
    json!({"serverless-pre-function": one(pre), "serverless-post-function": one(post)})
}

fn answering(source: &str) -> Value {
    let source = format!("return function(_, ctx) local core = require('apisix.core') {source} end");
    json!({"serverless-pre-function": {"phase": "access", "functions": [source]}})
}

fn port(up: &Upstream) -> u16 {
    up.addr().rsplit_once(':').expect("a port").1.parse().expect("a port")
}

/// Has the headers of the response say what `ctx` has.
const TELL: &str =
    "for _, name in ipairs({ 'upstream_conf', 'upstream_key', 'upstream_version', 'upstream_scheme', 'picked_server',
        'balancer_ip', 'balancer_port', 'balancer_try_count', 'matched_upstream' }) do
        ngx.header['x-' .. name] = core.json.encode({ ctx[name] })
    end";

/// What `TELL` has said of it.
fn told(gw: &Gateway, path: &str, name: &str) -> Value {
    let reply = gw.get(path);
    let text = reply
        .header(&format!("x-{}", name.replace('_', "-")))
        .unwrap_or_else(|| panic!("{path}: {}", reply.text()))
        .to_owned();
    let list: Value = serde_json::from_str(&text).expect("JSON");
    list.get(0).cloned().unwrap_or_default()
}

#[test]
fn an_upstream_id_that_a_plugin_sets_and_nobody_has_is_an_error() {
    let (own, other) = (Upstream::echo(), Upstream::echo());
    let gw = Gateway::start();
    gw.put("/upstreams/u1", json!({"type": "roundrobin", "nodes": {other.addr(): 1}}));
    let keyless = json!({"serverless-pre-function": {"phase": "rewrite", "functions": [
        "return function(_, ctx) ctx.upstream_id = 'lost-in-rewrite' end"]}});
    gw.route("1", "/rewrite", &own, keyless.clone());
    let mut with_auth = keyless;
    with_auth["key-auth"] = json!({});
    gw.put("/consumers", json!({"username": "jack", "plugins": {"key-auth": {"key": "k"}}}));
    gw.route("2", "/auth", &own, with_auth.clone());
    with_auth["serverless-post-function"] =
        json!({"phase": "access", "functions": ["return function(_, ctx) ctx.upstream_id = 'u1' end"]});
    gw.route("3", "/mended", &own, with_auth);
    gw.route("4", "/access", &own, answering("ctx.upstream_id = 'lost-in-access'"));
    let split =
        json!({"traffic-split": {"rules": [{"weighted_upstreams": [{"upstream_id": "lost-in-split", "weight": 1}]}]}});
    gw.route("5", "/split", &own, split);
    let key = [("apikey", "k")];
    for (path, id) in [
        ("/rewrite", "lost-in-rewrite"),
        ("/auth", "lost-in-rewrite"),
        ("/access", "lost-in-access"),
        ("/split", "lost-in-split"),
    ] {
        let line = format!("failed to find upstream by id: {id}");
        let before = gw.log().matches(&line).count();
        assert_eq!(gw.send("GET", path, &key, b"").status, 500, "{path}");
        gw.expect_log(&line);
        assert_eq!(gw.log().matches(&line).count(), before + 1, "{path}");
    }
    assert_eq!(gw.send("GET", "/mended", &key, b"").status, 200);
    assert_eq!((own.seen().len(), other.seen().len()), (0, 1));
}

#[test]
fn what_a_body_says_is_learnt_anew_when_it_is_replaced() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    let json_of = |m: &str| format!("{{\"m\":\"{m}\",\"query\":\"query {m} {{ a }}\"}}");
    let file = gw.dir.join("body.json");
    std::fs::write(&file, json_of("file")).expect("a file");
    let source = format!(
        "local said = {{}}
         local function look()
             said[#said + 1] = tostring(ctx.var['post_arg.m']) .. '/' .. tostring(ctx.var.graphql_name) .. '/' .. tostring(ctx._graphql.name)
         end
         look()
         ngx.req.set_body_data('{}') look()
         core.request.set_body_data(ctx, '{}') look()
         ngx.req.set_body_file('{}') look()
         ngx.req.init_body() ngx.req.append_body('{}') ngx.req.finish_body() look()
         return 200, table.concat(said, ' ')",
        json_of("data"),
        json_of("core"),
        file.display(),
        json_of("appended"),
    );
    let mut route = json!({"uri": "/post", "upstream": {"nodes": {up.addr(): 1}}, "plugins": answering(&source)});
    route["vars"] = json!([["post_arg.m", "==", "sent"]]);
    gw.put("/routes/1", route);
    let send = |m: &str| gw.send("POST", "/post", &[("content-type", "application/json")], json_of(m).as_bytes());
    let all = ["sent", "data", "core", "file", "appended"].map(|m| format!("{m}/{m}/{m}"));
    assert_eq!(send("sent").text(), all.join(" "));
    assert_eq!(send("other").status, 404);
}

#[test]
fn the_upstream_is_shown_once_it_is_settled_and_the_node_once_it_is_picked() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    let early = "assert(ctx.upstream_conf == nil and ctx.upstream_key == nil and ctx.picked_server == nil)";
    let plugins = functions(("access", early), ("header_filter", TELL));
    gw.put("/upstreams/u", json!({"nodes": {up.addr(): 1}}));
    gw.route("r", "/inline", &up, plugins.clone());
    gw.put("/routes/by-id", json!({"uri": "/by-id", "upstream_id": "u", "plugins": plugins}));
    gw.put("/services/s", json!({"upstream": {"nodes": {up.addr(): 1}}}));
    gw.put("/routes/service", json!({"uri": "/service", "service_id": "s", "plugins": plugins}));
    let node = json!({"host": "127.0.0.1", "port": port(&up), "weight": 1, "priority": 0});
    for (path, key) in
        [("/inline", "roundrobin#route_r"), ("/by-id", "roundrobin#upstream_u"), ("/service", "roundrobin#service_s")]
    {
        let conf = told(&gw, path, "upstream_conf");
        assert_eq!(
            (&conf["nodes"], &conf["scheme"], &conf["pass_host"]),
            (&json!([node]), &json!("http"), &json!("pass")),
            "{path}"
        );
        assert_eq!(told(&gw, path, "matched_upstream"), conf, "{path}");
        assert_eq!(told(&gw, path, "upstream_key"), key);
        assert!(told(&gw, path, "upstream_version").is_number(), "{path}");
        assert_eq!(told(&gw, path, "upstream_scheme"), "http");
        assert_eq!(told(&gw, path, "picked_server"), json!({"host": "127.0.0.1", "port": port(&up)}), "{path}");
        assert_eq!(told(&gw, path, "balancer_ip"), "127.0.0.1");
        assert_eq!(told(&gw, path, "balancer_port"), port(&up));
        assert_eq!(told(&gw, path, "balancer_try_count"), 1);
    }
}

#[test]
fn further_tries_are_counted_and_an_answer_of_the_gateways_own_has_picked_nothing() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    let nodes = json!([{"host": "127.0.0.1", "port": dead_port(), "weight": 1, "priority": 1},
        {"host": "localhost", "port": port(&up), "weight": 1}]);
    let plugins = functions(("rewrite", "if ngx.var.arg_stop then return 403 end"), ("header_filter", TELL));
    gw.put("/routes/1", json!({"uri": "/get", "upstream": {"nodes": nodes}, "plugins": plugins}));
    let server = told(&gw, "/get", "picked_server");
    assert_eq!((&server["domain"], &server["port"]), (&json!("localhost"), &json!(port(&up))));
    assert_eq!(told(&gw, "/get", "balancer_try_count"), 2);
    for name in ["picked_server", "balancer_ip", "balancer_port", "balancer_try_count", "upstream_conf", "upstream_key"]
    {
        assert_eq!(told(&gw, "/get?stop=1", name), Value::Null, "{name}");
    }
}

#[test]
fn what_a_plugin_has_chosen_is_shown_and_before_proxy_may_choose_too() {
    let (own, other) = (Upstream::echo(), Upstream::echo());
    let gw = Gateway::start();
    let nodes = json!({other.addr(): 1});
    let node = json!({"host": "127.0.0.1", "port": port(&other), "weight": 1, "priority": 0});
    gw.put("/upstreams/u", json!({"nodes": nodes, "scheme": "http"}));
    let mut split = json!({"serverless-post-function": functions(("log", ""), ("header_filter", TELL))["serverless-post-function"],
        "traffic-split": {"rules": [{"weighted_upstreams": [{"upstream": {"nodes": nodes}, "weight": 1}]}]}});
    gw.route("1", "/split", &own, split.clone());
    split["traffic-split"]["rules"][0]["weighted_upstreams"][0] = json!({"upstream_id": "u", "weight": 1});
    gw.route("2", "/split-id", &own, split);
    let set = format!(
        "local conf = {{ type = 'roundrobin', nodes = {{ {{ host = '127.0.0.1', port = {}, weight = 1, priority = 0 }} }} }}
         assert(require('apisix.upstream').set(ctx, 'my#key', 'v1', conf))
         assert(ctx.upstream_conf == conf)",
        port(&other)
    );
    for (id, phase) in [("3", "access"), ("4", "before_proxy")] {
        gw.route(id, &format!("/{phase}"), &own, functions((phase, &set), ("header_filter", TELL)));
    }
    for path in ["/split", "/split-id", "/access", "/before_proxy"] {
        for name in ["upstream_conf", "matched_upstream"] {
            assert_eq!(told(&gw, path, name)["nodes"], json!([node]), "{path} {name}");
        }
        assert_eq!(told(&gw, path, "balancer_port"), port(&other), "{path}");
    }
    assert_eq!(told(&gw, "/split-id", "upstream_key"), "roundrobin#upstream_u");
    for path in ["/access", "/before_proxy"] {
        assert_eq!(
            (told(&gw, path, "upstream_key"), told(&gw, path, "upstream_version")),
            (json!("my#key"), json!("v1"))
        );
    }
    assert!(own.seen().is_empty());
}

#[test]
fn an_upstream_that_a_plugin_writes_to_the_context_is_where_the_request_goes() {
    let (own, other, third) = (Upstream::echo(), Upstream::echo(), Upstream::echo());
    let gw = Gateway::with(json!({"nginx_config": {"worker_processes": 1}}));
    let conf = format!(
        "{{ type = 'roundrobin', nodes = {{ {{ host = '127.0.0.1', port = {}, weight = 1 }}, {{ host = '127.0.0.1', port = {}, weight = 1 }} }} }}",
        port(&other),
        port(&third)
    );
    let write = format!("ctx.upstream_conf, ctx.upstream_key, ctx.upstream_version = {conf}, 'my#key', 1");
    for (id, phase) in [("1", "rewrite"), ("2", "access"), ("3", "before_proxy")] {
        gw.route(id, &format!("/{phase}"), &own, functions((phase, &write), ("header_filter", TELL)));
        let ports = [0, 1].map(|_| told(&gw, &format!("/{phase}"), "balancer_port"));
        assert!(ports.contains(&port(&other).into()) && ports.contains(&port(&third).into()), "{phase}: {ports:?}");
        assert_eq!(told(&gw, &format!("/{phase}"), "upstream_key"), "my#key");
    }
    assert_eq!((own.seen().len(), other.seen().len() + third.seen().len()), (0, 9));
    // One that is read and not replaced is the route's own, with its balancer.
    let look = "assert(ctx.upstream_conf.nodes and ctx.upstream_conf == ctx.upstream_conf)";
    gw.route("4", "/look", &own, functions(("before_proxy", look), ("header_filter", TELL)));
    assert_eq!(told(&gw, "/look", "upstream_key"), "roundrobin#route_4");
    assert_eq!(told(&gw, "/look", "balancer_port"), port(&own));
    // Another table with the same but for its nodes.
    let change = format!(
        "local conf = core.table.clone(ctx.upstream_conf) conf.nodes = {{ {{ host = '127.0.0.1', port = {}, weight = 1 }} }}
         ctx.upstream_conf = conf",
        port(&third)
    );
    gw.route("5", "/change", &own, functions(("before_proxy", &change), ("header_filter", TELL)));
    assert_eq!(told(&gw, "/change", "balancer_port"), port(&third));
    // A key and a version that were only read are another upstream's.
    let tenant = format!(
        "local _ = tostring(ctx.upstream_key) .. tostring(ctx.upstream_version)
         local to = ngx.var.arg_to == 'other' and {} or {}
         ctx.upstream_conf = {{ nodes = {{ {{ host = '127.0.0.1', port = to, weight = 1 }}, {{ host = '127.0.0.1', port = to, weight = 2 }} }} }}",
        port(&other),
        port(&third)
    );
    gw.route("7", "/tenant", &own, functions(("before_proxy", &tenant), ("header_filter", TELL)));
    for (to, node) in [("other", &other), ("third", &third), ("other", &other)] {
        assert_eq!(told(&gw, &format!("/tenant?to={to}"), "balancer_port"), port(node), "{to}");
    }
    for phase in ["rewrite", "before_proxy"] {
        gw.route("6", "/wrong", &own, functions((phase, "ctx.upstream_conf = { nodes = 1 }"), ("log", "")));
        assert_eq!(gw.get("/wrong").status, 500, "{phase}");
    }
    gw.expect_log("failed to use ctx.upstream_conf: ");
    assert_eq!(own.seen().len(), 2);
}

#[test]
fn a_server_that_before_proxy_writes_to_the_context_gets_the_request() {
    let (own, other) = (Upstream::echo(), Upstream::echo());
    let gw = Gateway::start();
    let write = format!("ctx.picked_server = {{ host = '127.0.0.1', port = {} }}", port(&other));
    gw.route("1", "/server", &own, functions(("before_proxy", &write), ("header_filter", TELL)));
    let server = json!({"host": "127.0.0.1", "port": port(&other)});
    assert_eq!(told(&gw, "/server", "picked_server"), server);
    assert_eq!(told(&gw, "/server", "balancer_port"), port(&other));
    assert_eq!((own.seen().len(), other.seen().len()), (0, 2));
    // Before the node is to be picked it has no say, as in APISIX.
    gw.route("2", "/early", &own, functions(("access", &write), ("before_proxy", "")));
    assert_eq!((gw.get("/early").status, own.seen().len()), (200, 1));
    for wrong in ["1", "{}", "{ host = 1, port = 'x' }", "{ host = 'no address', port = 80 }"] {
        let write = format!("ctx.picked_server = {wrong}");
        gw.route("3", "/wrong", &own, functions(("before_proxy", &write), ("log", "")));
        assert_eq!(gw.get("/wrong").status, 500, "{wrong}");
    }
    gw.expect_log("failed to use ctx.picked_server: it is no table with host and port");
    assert_eq!(own.seen().len(), 1);
}

#[test]
fn the_version_of_what_runs_names_each_source() {
    let up = Upstream::echo();
    let gw = Gateway::with(json!({"nginx_config": {"error_log_level": "info"}}));
    gw.put("/services/s", json!({"upstream": {"nodes": {up.addr(): 1}}}));
    gw.put(
        "/plugin_configs/c",
        json!({"plugins": answering("return 200, ctx.conf_type .. ' ' .. ctx.conf_id .. ' ' .. ctx.conf_version")}),
    );
    gw.put("/routes/r", json!({"uri": "/all", "service_id": "s", "plugin_config_id": "c"}));
    gw.put("/routes/q", json!({"uri": "/own", "upstream": {"nodes": {up.addr(): 1}}, "plugin_config_id": "c"}));
    let revision = |path: &str| gw.admin("GET", path, Value::Null).json()["modifiedIndex"].to_string();
    let (r, q, s, c) =
        (revision("/routes/r"), revision("/routes/q"), revision("/services/s"), revision("/plugin_configs/c"));
    assert_eq!(gw.get("/all").text(), format!("route&service r&s {r}#{c}&{s}"));
    assert_eq!(gw.get("/own").text(), format!("route q {q}#{c}"));
    gw.expect_log(&format!("plugins of route q, conf_version: {q}#{c}, by priority: serverless-pre-function"));
}

#[test]
fn resources_are_shown_as_they_are_in_force() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    let look = "local up, service = ctx.matched_upstream, ctx.service
        return 200, core.json.encode({
            up.nodes[1].host, up.nodes[1].port, up.nodes[1].priority, up.scheme, up.pass_host, up.hash_on, up.type,
            ctx.matched_route.value.priority, ctx.matched_route.value.status, service.value.upstream.nodes[1].weight,
            require('apisix.upstream').get_by_id('u') == up, ctx.matched_route.has_domain, service.has_domain,
        })";
    gw.put("/upstreams/u", json!({"nodes": {up.addr(): 1}}));
    gw.put("/services/s", json!({"upstream": {"nodes": {"a.test:80": 3}}}));
    gw.put("/routes/1", json!({"uri": "/get", "upstream_id": "u", "service_id": "s", "plugins": answering(look)}));
    let expected = json!(["127.0.0.1", port(&up), 0, "http", "pass", "vars", "roundrobin", 0, 1, 3, true, false, true]);
    assert_eq!(gw.get("/get").json(), expected);
    gw.put("/upstreams/u", json!({"nodes": {"127.0.0.2:81": 1}, "scheme": "https"}));
    let changed = gw.get("/get").json();
    assert_eq!((&changed[0], &changed[1], &changed[3]), (&json!("127.0.0.2"), &json!(81), &json!("https")));
}

#[test]
fn nodes_that_a_registry_has_found_and_ports_that_a_scheme_gives_are_shown() {
    let (a, b) = (Upstream::echo(), Upstream::echo());
    let dir = Dir::new();
    std::fs::create_dir_all(dir.join("mods/apisix/discovery")).expect("directories");
    let registry = format!(
        "return {{ init_worker = function() end, nodes = function(name) return {{ {{ host = '127.0.0.1', port = name == 'a' and {} or {}, weight = 2 }} }} end }}",
        port(&a),
        port(&b)
    );
    dir.write("mods/apisix/discovery/mine.lua", registry);
    let path = format!("{}/?.lua", dir.join("mods").display());
    dir.configure(json!({"apisix": {"extra_lua_path": path}, "discovery": {"mine": {}}}));
    let gw = Gateway::in_dir(dir);
    let plugins = functions(("log", ""), ("header_filter", TELL));
    for (name, up) in [("a", &a), ("b", &b)] {
        let upstream = json!({"type": "roundrobin", "discovery_type": "mine", "service_name": name});
        gw.put(
            &format!("/routes/{name}"),
            json!({"uri": format!("/{name}"), "upstream": upstream, "plugins": plugins}),
        );
        for _ in 0..2 {
            let conf = told(&gw, &format!("/{name}"), "upstream_conf");
            assert_eq!(conf["nodes"], json!([{"host": "127.0.0.1", "port": port(up), "weight": 2, "priority": 0}]));
            assert_eq!((&conf["service_name"], &conf["scheme"]), (&json!(name), &json!("http")));
        }
        assert!(told(&gw, &format!("/{name}"), "matched_upstream").get("nodes").is_none());
    }
    let ask = "return 200, core.json.encode({ ctx.upstream_conf.nodes[1].port, ctx.matched_upstream.nodes[1].port or 'none' })";
    let source = format!("return function(_, ctx) local core = require('apisix.core') {ask} end");
    let plugin = json!({"serverless-pre-function": {"phase": "before_proxy", "functions": [source]}});
    gw.put(
        "/routes/c",
        json!({"uri": "/c", "upstream": {"scheme": "https", "nodes": {"127.0.0.1": 1}}, "plugins": plugin}),
    );
    assert_eq!(gw.get("/c").json(), json!([443, "none"]));
}
