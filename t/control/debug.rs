//! The debug mode of conf/debug.yaml.

use serde_json::json;

use crate::support::{Dir, Gateway, Upstream, eventually};

const BASIC: &str = "basic:\n  enable: true\n#END\n";

fn debugged(text: &str) -> Gateway {
    let dir = Dir::new();
    dir.write("conf/debug.yaml", text);
    dir.configure(json!({"nginx_config": {"worker_processes": 1}}));
    Gateway::in_dir(dir)
}

fn limits() -> serde_json::Value {
    json!({
        "limit-count": {"count": 200, "time_window": 60, "key": "remote_addr"},
        "limit-conn": {"conn": 100, "burst": 50, "default_conn_delay": 0.1, "key": "remote_addr"},
    })
}

#[test]
fn responses_name_the_plugins_that_run() {
    let gw = debugged(BASIC);
    gw.expect_log("loaded plugin and sort by priority: 1002 name: limit-count");
    let up = Upstream::echo();
    gw.route("1", "/two", &up, limits());
    gw.route("2", "/none", &up, json!({}));
    gw.route("3", "/refused", &up, json!({"key-auth": {}, "limit-count": limits()["limit-count"]}));
    let header = |path: &str| gw.get(path).header("apisix-plugins").map(str::to_owned);
    assert_eq!(header("/two").as_deref(), Some("limit-conn#access, limit-count#access, limit-conn#log"));
    assert_eq!(header("/none").as_deref(), Some("no plugin"));
    assert_eq!(header("/refused").as_deref(), Some("key-auth#rewrite"), "what did not come to run is not named");
    assert_eq!(header("/unknown"), None);
    gw.put("/global_rules/1", json!({"plugins": {"response-rewrite": {"body": "yes\n"}}}));
    let two = gw.get("/two");
    let expected = "limit-conn#access, limit-count#access, response-rewrite#header_filter, limit-conn#log";
    assert_eq!((two.header("apisix-plugins"), &*two.text()), (Some(expected), "yes\n"));
    // What no header could tell: it has left by then, and nobody knows of a global rule whether it will run.
    gw.expect_log("[warn]");
    gw.expect_log("Apisix-Plugins: response-rewrite#body_filter");
    assert!(!gw.log().contains("Apisix-Plugins: limit-conn#log"));
}

#[test]
fn the_file_is_followed() {
    let gw = debugged("basic:\n  enable: false\n");
    let up = Upstream::echo();
    gw.route("1", "/x", &up, json!({}));
    let header = || gw.get("/x").header("apisix-plugins").map(str::to_owned);
    assert_eq!(header(), None);
    gw.dir.write("conf/debug.yaml", BASIC);
    eventually("the debug mode begins", &header);
    gw.dir.write("conf/debug.yaml", "basic: [");
    gw.expect_log("failed to validate debug config");
    assert!(header().is_some(), "a file with mistakes changes nothing");
    std::fs::remove_file(gw.dir.join("conf/debug.yaml")).unwrap();
    eventually("it ends", || header().is_none().then_some(()));
}

#[test]
fn what_a_consumer_brings_ran_in_rewrite() {
    let gw = debugged(BASIC);
    let up = Upstream::echo();
    gw.route("1", "/x", &up, json!({"key-auth": {}}));
    let plugins = json!({"key-auth": {"key": "k"}, "proxy-rewrite": {"uri": "/y"}});
    gw.put("/consumers", json!({"username": "jack", "plugins": plugins}));
    let reply = gw.send("GET", "/x", &[("apikey", "k")], b"");
    assert_eq!(reply.header("apisix-plugins"), Some("key-auth#rewrite, proxy-rewrite#rewrite"));
    assert_eq!(up.last().target, "/y");
}

/// The functions that stand for nginx's phases, and one of a plugin's own.
fn hooks(dynamic: bool) -> String {
    format!(
        "http_filter:\n  enable: {dynamic}\n  enable_header_name: X-APISIX-Dynamic-Debug\nhook_conf:\n  enable: true\n  \
         name: mine\n  log_level: warn\n  is_print_input_args: true\n  is_print_return_value: true\nmine:\n  \
         apisix: [http_access_phase, http_header_filter_phase, http_body_filter_phase, http_log_phase]\n  \
         apisix.core.string: [has_prefix]\n  apisix.core.table: [not_there]\n  not.there: [a]\n#END\n"
    )
}

const ASKS: &str = "return function() require('apisix.core').string.has_prefix('moongate', 'moon') end";

#[test]
fn functions_that_are_named_tell_of_their_calls() {
    let gw = debugged(&hooks(false));
    gw.expect_log("failed to load module: not.there");
    gw.expect_log("failed to find function not_there in module apisix.core.table");
    let up = Upstream::echo();
    gw.route("1", "/plain", &up, json!({}));
    gw.route("2", "/asks", &up, json!({"serverless-pre-function": {"functions": [ASKS]}}));
    assert_eq!(gw.get("/plain").status, 200);
    for phase in ["access", "header_filter", "body_filter", "log"] {
        for what in ["args", "return"] {
            gw.expect_log(&format!("call require(\"apisix\").http_{phase}_phase() {what}:{{}}"));
        }
    }
    assert_eq!(gw.get("/asks").status, 200);
    gw.expect_log("call require(\"apisix.core.string\").has_prefix() args:{ \"moongate\", \"moon\" }");
    gw.expect_log("call require(\"apisix.core.string\").has_prefix() return:{ true }");
    std::fs::remove_file(gw.dir.join("conf/debug.yaml")).unwrap();
    let told = || gw.log().matches("has_prefix() args").count();
    eventually("the hooks are gone", || {
        let before = told();
        assert_eq!(gw.get("/asks").status, 200);
        (told() == before).then_some(())
    });
}

#[test]
fn hooks_can_be_asked_for_by_a_header() {
    let gw = debugged(&hooks(true));
    let up = Upstream::echo();
    gw.route("1", "/asks", &up, json!({"serverless-pre-function": {"functions": [ASKS]}}));
    assert_eq!(gw.get("/asks?silent").status, 200);
    assert_eq!(gw.send("GET", "/asks?told", &[("X-APISIX-Dynamic-Debug", "")], b"").status, 200);
    gw.expect_log("http_log_phase() return:{}");
    let log = gw.log();
    let told: Vec<_> = log.lines().filter(|line| line.contains("call require(\"apisix")).collect();
    assert!(!told.is_empty() && told.iter().all(|line| line.contains("GET /asks?told")), "{told:#?}");
    assert!(log.contains("has_prefix() args") && !log.contains("http_access_phase() args"), "{log}");
}

#[test]
fn scripts_see_what_is_debugged() {
    let asks = "return function(_, ctx)
        local debug = require('apisix.debug')
        return 200, tostring(debug.enable_debug()) .. ' ' .. tostring(debug.dynamic_debug(ctx))
    end";
    let answers = |gw: &Gateway| {
        gw.route("1", "/", &Upstream::echo(), json!({"serverless-pre-function": {"functions": [asks]}}));
        (gw.get("/").text(), gw.send("GET", "/", &[("X-APISIX-Dynamic-Debug", "")], b"").text())
    };
    assert_eq!(answers(&Gateway::start()), ("false false".into(), "false false".into()));
    assert_eq!(answers(&debugged(BASIC)), ("true false".into(), "true false".into()));
    assert_eq!(answers(&debugged(&hooks(true))), ("false false".into(), "false true".into()));
    assert_eq!(answers(&debugged(&hooks(false))), ("false true".into(), "false true".into()));
}
