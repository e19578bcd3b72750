//! Endpoints that plugins offer, loading plugins anew, and what a plugin may say of itself.

use serde_json::json;

use crate::support::{Dir, Gateway, Reply, Upstream, get, request};

/// A plugin with endpoints that show what they are given, and what `access` has kept in the same VM.
const PLUGIN: &str = r#"
--- Counts.
local core = require("apisix.core")
local seen = 0
local _M = { version = 0.1, priority = 10, name = "mine", schema = { type = "object" } }
function _M.access() seen = seen + 1 end
local function hello() return 200, "world\n" end
local function made() return 201, { method = ngx.req.get_method(), body = core.request.get_body(),
    q = ngx.req.get_uri_args().q, agent = ngx.req.get_headers()["x-agent"], seen = seen } end
local function rest(ctx) return 200, ctx.curr_req_matched[":ext"] end
local function named(ctx) return { id = ctx.curr_req_matched.id } end
local function printed() ngx.header["Content-Type"] = "text/csv" ngx.status = 202 ngx.say("a,b") end
local function waits() ngx.sleep(0.001) return 418 end
function _M.control_api()
    return {
        { methods = { "GET" }, uris = { "/v1/plugin/mine/hello" }, handler = hello },
        { methods = { "GET", "POST" }, uri = "/v1/plugin/mine/made", handler = made },
        { methods = { "GET" }, uri = "/v1/plugin/mine/rest/*", handler = rest },
        { methods = { "GET" }, uri = "/v1/plugin/mine/id/:id", handler = named },
        { uri = "/v1/plugin/mine/printed", handler = printed },
        { uri = "/v1/plugin/mine/waits", handler = waits },
        { uri = "/v1/plugin/mine/fails", handler = function() error("endpoint broke") end },
    }
end
return _M
"#;

fn with_plugin(settings: serde_json::Value, source: &str) -> Gateway {
    let dir = Dir::new();
    dir.write("plugins/mine.lua", source);
    dir.configure(settings);
    Gateway::in_dir(dir)
}

fn one_worker() -> serde_json::Value {
    json!({"nginx_config": {"worker_processes": 1}})
}

fn control(gw: &Gateway, method: &str, path: &str, body: &str) -> Reply {
    request(&gw.control(), method, path, &[("X-Agent", "me")], body.as_bytes())
}

fn not_found() -> serde_json::Value {
    json!({"error_msg": "404 Not Found"})
}

#[test]
fn a_plugins_endpoints_answer_in_the_control_api() {
    let gw = with_plugin(one_worker(), PLUGIN);
    let up = Upstream::echo();
    gw.route("1", "/x", &up, json!({"mine": {}}));
    assert_eq!(gw.get("/x").status, 200);
    let hello = get(&gw.control(), "/v1/plugin/mine/hello");
    assert_eq!((hello.status, &*hello.text()), (200, "world\n"));
    assert_eq!(hello.header("content-type"), Some("text/plain"));
    let made = control(&gw, "POST", "/v1/plugin/mine/made?q=a%20b", "text");
    assert_eq!((made.status, made.header("content-type")), (201, Some("application/json")));
    assert_eq!(made.json(), json!({"method": "POST", "body": "text", "q": "a b", "agent": "me", "seen": 1}));
    assert_eq!(get(&gw.control(), "/v1/plugin/mine/rest/a/b").text(), "a/b");
    let printed = get(&gw.control(), "/v1/plugin/mine/printed");
    assert_eq!((printed.status, printed.header("content-type"), &*printed.text()), (202, Some("text/csv"), "a,b\n"));
    assert_eq!(get(&gw.control(), "/v1/plugin/mine/waits").status, 418);
    assert_eq!(get(&gw.control(), "/v1/plugin/mine/fails").status, 500);
    gw.expect_log("endpoint broke");
    for (method, path) in [("PUT", "/v1/plugin/mine/hello"), ("GET", "/v1/plugin/mine/none"), ("POST", "/v1/routes")] {
        let refused = control(&gw, method, path, "");
        assert_eq!((refused.status, refused.json()), (404, not_found()), "{method} {path}");
    }
    // Parameters are for a router that is asked for them.
    assert_eq!(get(&gw.control(), "/v1/plugin/mine/id/7").status, 404);
    assert_eq!(gw.get("/v1/plugin/mine/hello").status, 404, "not in public");
}

#[test]
fn parameters_in_paths_are_for_the_router_that_knows_them() {
    let settings = json!({"apisix": {"control": {"router": "radixtree_uri_with_parameter"}}});
    let gw = with_plugin(settings, PLUGIN);
    assert_eq!(get(&gw.control(), "/v1/plugin/mine/id/7").json(), json!({"id": "7"}));
    assert_eq!(get(&gw.control(), "/v1/plugin/mine/id/7/8").status, 404);
    assert_eq!(get(&gw.control(), "/v1/plugin/mine/hello").status, 200);
}

fn saying(word: &str) -> String {
    format!(
        "local _M = {{ version = 1, priority = 10, name = 'mine', schema = {{ type = 'object' }} }}\n\
         function _M.access() return 200, '{word} ' .. tostring((require('apisix.plugin').plugin_attr('mine') or {{}}).a) end\n\
         return _M\n"
    )
}

#[test]
fn a_reload_that_was_answered_is_in_effect_in_every_worker() {
    let gw = with_plugin(json!({}), &saying("old"));
    let up = Upstream::echo();
    gw.route("1", "/x", &up, json!({"mine": {}}));
    assert_eq!(gw.get("/x").text(), "old nil");
    gw.dir.write("plugins/mine.lua", saying("new"));
    gw.dir.configure(json!({"plugin_attr": {"mine": {"a": 1}}}));
    for method in ["GET", "POST"] {
        assert_eq!(control(&gw, method, "/v1/plugins/reload", "").status, 404);
    }
    assert_eq!(gw.get("/x").text(), "old nil");
    let done = control(&gw, "PUT", "/v1/plugins/reload", "");
    assert_eq!((done.status, &*done.text()), (200, "done"));
    for _ in 0..10 {
        assert_eq!(gw.get("/x").text(), "new 1");
    }
    gw.expect_log("load plugin times: 2");
    gw.dir.write("conf/config.yaml", "apisix: {node_listen: wrong}");
    let refused = control(&gw, "PUT", "/v1/plugins/reload", "");
    assert_eq!(refused.status, 500);
    assert!(refused.text().contains("error.log names"), "{}", refused.text());
    assert_eq!(gw.get("/x").text(), "new 1");
}

#[test]
fn a_plugin_whose_attributes_are_wrong_is_not_loaded() {
    let source = "local _M = { version = 1, priority = 10, name = 'mine', schema = { type = 'object' },\n\
                  attr_schema = { type = 'object', properties = { a = { type = 'integer', default = 5 } } } }\n\
                  function _M.access() return 200, tostring(require('apisix.plugin').plugin_attr('mine').a) end\n\
                  return _M\n";
    let up = Upstream::echo();
    let gw = with_plugin(json!({"plugin_attr": {"mine": {"a": 3}}}), source);
    gw.route("1", "/x", &up, json!({"mine": {}}));
    assert_eq!(gw.get("/x").text(), "3");
    let gw = with_plugin(json!({"plugin_attr": {"mine": {"a": "x"}}}), source);
    let nodes = json!({up.addr(): 1});
    let route = json!({"uri": "/x", "plugins": {"mine": {}}, "upstream": {"nodes": nodes}});
    let refused = gw.admin("PUT", "/routes/1", route);
    assert_eq!(refused.status, 400);
    assert!(refused.text().contains("unknown plugin [mine]"), "{}", refused.text());
    gw.expect_log("failed to check the plugin_attr[mine]: property \"a\" validation failed");
}

#[test]
fn a_users_module_runs_before_plugins_and_may_replace_what_it_likes() {
    let dir = Dir::new();
    dir.write("plugins/mine.lua", saying("mine"));
    dir.write("my_hook.lua", "require('apisix.plugin').plugin_attr = function() return { a = 'hooked' } end\n");
    let path = format!("{}/?.lua", dir.path().display());
    dir.configure(json!({"apisix": {"extra_lua_path": path, "lua_module_hook": "my_hook"}}));
    let gw = Gateway::in_dir(dir);
    let up = Upstream::echo();
    gw.route("1", "/x", &up, json!({"mine": {}}));
    assert_eq!(gw.get("/x").text(), "mine hooked");
    let gw = Gateway::with(json!({"apisix": {"lua_module_hook": "not_there"}}));
    gw.expect_log("apisix.lua_module_hook: failed to load module [not_there]");
}

#[test]
fn a_plugin_can_offer_itself_to_workflows_before_it_begins() {
    let source = "local order = {}\n\
                  local _M = { version = 1, priority = 10, name = 'mine', schema = { type = 'object' } }\n\
                  function _M.workflow_handler() order[#order + 1] = 'workflow' end\n\
                  function _M.init() order[#order + 1] = 'init' end\n\
                  function _M.access() return 200, table.concat(order, ' ') end\n\
                  return _M\n";
    let gw = with_plugin(json!({}), source);
    let up = Upstream::echo();
    gw.route("1", "/x", &up, json!({"mine": {}}));
    assert_eq!(gw.get("/x").text(), "workflow init");
}

#[test]
fn health_is_a_list_and_a_page() {
    let gw = Gateway::start();
    assert_eq!(get(&gw.control(), "/v1/healthcheck").json(), json!({}), "as in APISIX");
    let page = request(&gw.control(), "GET", "/v1/healthcheck", &[("Accept", "text/html")], b"");
    assert_eq!((page.status, page.header("content-type")), (200, Some("text/html")));
    assert!(page.text().contains("<th>Upstream</th>"), "{}", page.text());
    let missing = get(&gw.control(), "/v1/healthcheck/upstreams/1");
    assert_eq!((missing.status, missing.json()), (404, json!({"error_msg": "upstreams[1] not found"})));
    let wrong = get(&gw.control(), "/v1/healthcheck/things/1");
    assert_eq!((wrong.status, wrong.json()), (400, json!({"error_msg": "invalid src type things"})));
    for path in ["/v1/discovery/eureka/dump", "/v1/discovery/dns/show_dump_file"] {
        assert_eq!((get(&gw.control(), path).status, get(&gw.control(), path).json()), (404, not_found()));
    }
}
