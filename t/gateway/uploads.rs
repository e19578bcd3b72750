//! Walk 6: uploaded plugins, and plugin files.

use serde_json::json;

use crate::support::{Dir, Gateway, Upstream};

fn plugin(name: &str, answer: &str) -> String {
    format!(
        r#"
local core = require("apisix.core")
local schema = {{ type = "object", properties = {{ text = {{ type = "string" }} }}, required = {{ "text" }} }}
local _M = {{ version = 0.1, priority = 10, name = "{name}", schema = schema }}
function _M.check_schema(conf) return core.schema.check(schema, conf) end
function _M.access(conf, ctx) return 200, "{answer} " .. conf.text end
return _M
"#
    )
}

#[test]
fn an_uploaded_plugin_is_used_at_once_on_every_worker() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    assert_eq!(gw.admin_text("PUT", "/plugin_sources/mine", &plugin("mine", "one"), "text/plain").status, 201);
    gw.route("1", "/mine", &up, json!({"mine": {"text": "x"}}));
    for _ in 0..8 {
        assert_eq!(gw.get("/mine").text(), "one x");
    }
    assert_eq!(gw.admin_text("PUT", "/plugin_sources/mine", &plugin("mine", "two"), "text/plain").status, 200);
    for _ in 0..8 {
        assert_eq!(gw.get("/mine").text(), "two x");
    }
    let refused = gw.admin("PUT", "/routes/1", json!({"uri": "/mine", "plugins": {"mine": {}}}));
    assert_eq!(refused.status, 400);
    assert!(refused.text().contains("property \\\"text\\\" is required"), "{}", refused.text());
}

#[test]
fn a_plugin_that_does_not_load_is_refused_and_the_old_one_serves() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    gw.admin_text("PUT", "/plugin_sources/mine", &plugin("mine", "good"), "text/plain");
    gw.route("1", "/mine", &up, json!({"mine": {"text": "x"}}));
    for bad in ["local x = ", "error('at load')", "return 5", "return { name = 'mine' }"] {
        let reply = gw.admin_text("PUT", "/plugin_sources/mine", bad, "text/plain");
        assert_eq!(reply.status, 400, "{bad}: {}", reply.text());
    }
    assert_eq!(gw.get("/mine").text(), "good x");
}

#[test]
fn files_that_did_not_exist_at_start_are_picked_up_by_reload() {
    let up = Upstream::echo();
    let dir = Dir::new();
    std::fs::create_dir_all(dir.join("extra/apisix/plugins")).expect("a directory");
    let path = format!("{}/?.lua", dir.join("extra").display());
    dir.configure(json!({"apisix": {"extra_lua_path": path}, "plugins": ["from-path", "from-dir", "key-auth"]}));
    let gw = Gateway::in_dir(dir);
    gw.dir.write("extra/apisix/plugins/from-path.lua", plugin("from-path", "path"));
    gw.dir.write("plugins/from-dir.lua", plugin("from-dir", "dir"));
    let before = gw.admin("PUT", "/routes/1", json!({"uri": "/p", "plugins": {"from-path": {"text": "x"}}}));
    assert_eq!(before.status, 400, "{}", before.text());
    assert_eq!(gw.admin("PUT", "/plugins/reload", ()).status, 200);
    gw.route("1", "/p", &up, json!({"from-path": {"text": "x"}}));
    gw.route("2", "/d", &up, json!({"from-dir": {"text": "x"}}));
    assert_eq!((gw.get("/p").text(), gw.get("/d").text()), ("path x".into(), "dir x".into()));
    gw.dir.write("plugins/from-dir.lua", plugin("from-dir", "changed"));
    assert_eq!(gw.admin("PUT", "/plugins/reload", ()).status, 200);
    assert_eq!(gw.get("/d").text(), "changed x");
}

#[test]
fn the_list_of_plugins_names_what_is_loaded() {
    let gw = Gateway::start();
    let list = gw.admin("GET", "/plugins/list", ()).json();
    let names: Vec<&str> = list.as_array().expect("a list").iter().filter_map(|n| n.as_str()).collect();
    for name in [
        "key-auth",
        "basic-auth",
        "jwt-auth",
        "limit-count",
        "limit-req",
        "limit-conn",
        "proxy-rewrite",
        "response-rewrite",
        "redirect",
        "cors",
        "ip-restriction",
        "ua-restriction",
        "request-id",
        "prometheus",
        "http-logger",
        "file-logger",
        "serverless-pre-function",
        "serverless-post-function",
        "echo",
        "fault-injection",
        "mocking",
        "traffic-split",
        "workflow",
        "uri-blocker",
        "referer-restriction",
        "consumer-restriction",
        "public-api",
    ] {
        assert!(names.contains(&name), "{name} in {names:?}");
    }
    assert!(gw.admin("GET", "/plugins/key-auth", ()).json()["properties"].is_object());
    assert_eq!(gw.admin("GET", "/plugins/no-such", ()).status, 404);
}
