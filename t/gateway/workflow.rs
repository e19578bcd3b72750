//! The workflow plugin: rules, what they refuse, and plugins that are run by it.

use serde_json::{Value, json};

use crate::support::{Dir, Gateway, Upstream, eventually};

fn workflow(rules: Value) -> Value {
    json!({"workflow": {"rules": rules}})
}

fn refusal(gw: &Gateway, rules: Value) -> String {
    let reply = gw.admin(
        "PUT",
        "/routes/1",
        json!({"uri": "/x", "plugins": workflow(rules), "upstream": {"nodes": {"127.0.0.1:80": 1}}}),
    );
    assert_eq!(reply.status, 400, "{}", reply.text());
    let text = reply.json()["error_msg"].as_str().expect("a text").to_owned();
    text.strip_prefix("failed to check the configuration of plugin workflow err: ").expect("of the plugin").to_owned()
}

#[test]
fn the_first_rule_that_holds_decides() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    gw.route(
        "1",
        "/*",
        &up,
        workflow(json!([
            {"case": [["arg_foo", "==", "bar"], ["uri", "==", "/a"]], "actions": [["return", {"code": 403}]]},
            {"case": ["OR", ["uri", "==", "/a"], ["uri", "==", "/b"]], "actions": [["return", {"code": 401}]]},
        ])),
    );
    let refused = gw.get("/a?foo=bar");
    assert_eq!((refused.status, refused.text().as_str()), (403, "{\"error_msg\":\"rejected by workflow\"}\n"));
    assert_eq!((gw.get("/a?foo=other").status, gw.get("/b").status), (401, 401));
    assert!(up.seen().is_empty(), "nothing that was answered here goes on");
    assert_eq!(gw.get("/c?foo=bar").status, 200);
    gw.expect_log("workflow exits with http status code 403");
    gw.route("1", "/*", &up, workflow(json!([{"actions": [["return", {"code": 418}]]}])));
    assert_eq!(gw.get("/c").status, 418, "a rule without a case is for every request");
}

#[test]
fn a_rule_that_cannot_work_is_refused() {
    let gw = Gateway::start();
    let case = json!([["uri", "==", "/x"]]);
    let with = |action: Value| json!([{"case": case, "actions": [action]}]);
    let limit = json!({"count": 2, "time_window": 60});
    let cases = [
        (
            json!([{"case": case}]),
            "property \"rules\" validation failed: failed to validate item 1: property \"actions\" is required",
        ),
        (with(json!(["fake", {}])), "unsupported action: fake"),
        (with(json!(["key-auth", {}])), "unsupported action: key-auth"),
        (with(json!(["return", {}])), "failed to validate the 'return' action: property \"code\" is required"),
        (with(json!(["return"])), "failed to validate the 'return' action: property \"code\" is required"),
        (
            with(json!(["return", {"code": "403"}])),
            "failed to validate the 'return' action: property \"code\" validation failed: wrong type: expected integer, got string",
        ),
        (
            with(json!(["return", {"code": 600}])),
            "failed to validate the 'return' action: property \"code\" validation failed: expected 600 to be at most 599",
        ),
        (with(json!(["return", 1])), "failed to validate the 'return' action: wrong type: expected object, got number"),
        (
            with(json!(["limit-count", {"count": 2}])),
            "failed to validate the 'limit-count' action: value should match only one schema, but matches none",
        ),
        (
            with(json!(["limit-count", {"count": 2, "time_window": 60, "group": "g"}])),
            "failed to validate the 'limit-count' action: group is not supported",
        ),
        (
            json!([{"case": ["no", "such"], "actions": [["limit-count", limit]]}]),
            "failed to validate the 'case' expression: ",
        ),
    ];
    for (rules, expected) in cases {
        let text = refusal(&gw, rules.clone());
        assert!(text.starts_with(expected), "{rules}: {text}");
    }
}

#[test]
fn rules_with_the_same_limit_count_apart() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    let rule = |uri: &str| json!({"case": [["uri", "==", uri]], "actions": [["limit-count", {"count": 2, "time_window": 60}]]});
    gw.route("1", "/*", &up, workflow(json!([rule("/a"), rule("/b")])));
    let statuses: Vec<u16> = ["/a", "/b", "/a", "/b", "/a", "/b", "/c"].map(|path| gw.get(path).status).into();
    assert_eq!(statuses, [200, 200, 200, 200, 503, 503, 200]);
}

#[test]
fn a_plugin_that_a_workflow_runs_is_passed_over_in_its_own_place() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    let limit = |count: u32| json!({"count": count, "time_window": 60, "rejected_code": 429});
    let mut plugins = workflow(json!([{"case": [["arg_w", "==", "1"]], "actions": [["limit-count", limit(3)]]}]));
    plugins["limit-count"] = limit(1);
    gw.route("1", "/x", &up, plugins);
    let count = |path: &str| (0..5).filter(|_| gw.get(path).status == 200).count();
    assert_eq!(count("/x?w=1"), 3, "the workflow's limit alone");
    assert_eq!(count("/x"), 1, "the route's own where no rule holds, untouched by the others");
}

#[test]
fn a_consumers_workflow_takes_the_place_of_the_routes_plugin() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    let limit = |count: u32, code: u32| json!({"count": count, "time_window": 60, "rejected_code": code});
    gw.route("1", "/x", &up, json!({"key-auth": {}, "limit-count": limit(2, 503)}));
    gw.put("/consumers/rose", json!({"username": "rose", "plugins": {"key-auth": {"key": "rose"}}}));
    let mut plugins =
        workflow(json!([{"case": [["route_id", "==", "1"]], "actions": [["limit-count", limit(4, 429)]]}]));
    plugins["key-auth"] = json!({"key": "jack"});
    gw.put("/consumers/jack", json!({"username": "jack", "plugins": plugins}));
    let statuses = |who: &str| (0..5).map(|_| gw.send("GET", "/x", &[("apikey", who)], b"").status).collect::<Vec<_>>();
    assert_eq!(statuses("rose"), [200, 200, 503, 503, 503]);
    assert_eq!(statuses("jack"), [200, 200, 200, 200, 429]);
}

#[test]
fn limit_conn_is_left_when_its_request_ends() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    let limit = json!({"conn": 1, "burst": 0, "default_conn_delay": 0.1, "key": "remote_addr"});
    let mut plugins = workflow(json!([{"actions": [["limit-conn", limit]]}]));
    plugins["limit-conn"] = limit.clone();
    gw.route("1", "/x", &up, plugins);
    for _ in 0..4 {
        // The answer is there before the log phase has ended.
        eventually("the request before has left", || (gw.get("/x").status == 200).then_some(()));
    }
}

/// A plugin that says which of its functions ran, and offers itself to workflows in the way that `offer` says.
fn own_plugin(offer: &str) -> Dir {
    let dir = Dir::new();
    let source = format!(
        "local core = require('apisix.core')\n\
         local _M = {{ version = 1, priority = 10, name = 'mine', schema = {{ type = 'object',\n\
             properties = {{ word = {{ type = 'string', default = 'none' }} }} }} }}\n\
         function _M.check_schema(conf) return core.schema.check(_M.schema, conf) end\n\
         function _M.access(conf) ngx.req.set_header('X-Chain', conf.word) end\n\
         function _M.header_filter() ngx.header['X-Chain'] = 'chain' end\n\
         local function act(conf, ctx)\n\
             if ctx.var.arg_stop then return 409, {{ word = conf.word }} end\n\
             ngx.req.set_header('X-Action', conf.word)\n\
         end\n\
         local function log(conf) core.log.error('logged by the action: ', conf.word) end\n\
         function _M.workflow_handler() {offer} end\n\
         return _M\n"
    );
    dir.write("plugins/mine.lua", source);
    dir.configure(json!({"plugins": ["workflow", "mine"]}));
    dir
}

fn plays_its_part(dir: Dir) {
    let up = Upstream::echo();
    let gw = Gateway::in_dir(dir);
    let mut plugins = workflow(json!([{"case": [["arg_w", "==", "1"]], "actions": [["mine", {"word": "moon"}]]}]));
    plugins["mine"] = json!({});
    gw.route("1", "/x", &up, plugins);
    let reply = gw.get("/x?w=1");
    let seen = up.last();
    assert_eq!((reply.status, reply.header("x-chain")), (200, None), "no phase of the chain's own");
    assert_eq!((seen.header("x-action"), seen.header("x-chain")), (Some("moon"), None));
    gw.expect_log("logged by the action: moon");
    let stopped = gw.get("/x?w=1&stop=1");
    assert_eq!((stopped.status, stopped.json()), (409, json!({"word": "moon"})));
    let other = gw.get("/x");
    assert_eq!((other.header("x-chain"), up.last().header("x-chain")), (Some("chain"), Some("none")));
    let refused = refusal(&gw, json!([{"actions": [["mine", {"word": 1}]]}]));
    assert!(
        refused.starts_with("failed to validate the 'mine' action: property \"word\" validation failed"),
        "{refused}"
    );
    let unknown = refusal(&gw, json!([{"actions": [["limit-count", {"count": 1, "time_window": 1}]]}]));
    assert_eq!(unknown, "unsupported action: limit-count", "it is not on the list of plugins");
}

#[test]
fn ones_own_plugin_registers_with_workflows() {
    plays_its_part(own_plugin("require('apisix.plugins.workflow').register('mine', _M.check_schema, act, log)"));
}

#[test]
fn ones_own_plugin_returns_its_handler_to_workflows() {
    plays_its_part(own_plugin("return { handler = act, log = log }"));
}

#[test]
fn a_workflow_handler_that_fails_is_no_action() {
    let gw = Gateway::in_dir(own_plugin("error('cannot be run')"));
    gw.expect_log("cannot be run");
    assert_eq!(refusal(&gw, json!([{"actions": [["mine", {}]]}])), "unsupported action: mine");
}
