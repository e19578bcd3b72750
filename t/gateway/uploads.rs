//! Walk 6: uploaded plugins, and plugin files.

use serde_json::json;

use crate::support::{Dir, Gateway, Upstream, eventually, get, request};

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

/// Tells of its start, its timer and its end; a request to it waits for the file `go`.
fn living(version: &str, go: &str) -> String {
    format!(
        r#"
local _M = {{ version = 0.1, priority = 10, name = "living", schema = {{ type = "object" }} }}
local function say(what) ngx.log(ngx.WARN, "living {version} ", what, " on ", ngx.worker.id()) end
function _M.init()
    say("init")
    ngx.timer.every(0.01, function(premature) if not premature then say("ticks") end end)
end
function _M.destroy() say("destroy") end
function _M.access()
    say("request")
    while not io.open("{go}") do ngx.sleep(0.01) end
    return 200, "{version}"
end
return _M
"#
    )
}

/// Where lines about `living` stand in error.log, from the last that tells `what`.
#[track_caller]
fn at(log: &str, what: &str) -> usize {
    log.rfind(what).unwrap_or_else(|| panic!("{what:?} in {log}"))
}

#[test]
fn a_plugin_begins_is_replaced_and_ends_on_workers_without_a_request() {
    let gw = Gateway::start();
    let go = gw.dir.join("go").display().to_string();
    let on_both = |what: &str| (0..2).for_each(|n| gw.expect_log(&format!("living {what} on {n}")));
    assert_eq!(gw.admin_text("PUT", "/plugin_sources/living", &living("one", &go), "text/plain").status, 201);
    on_both("one ticks");
    assert_eq!(gw.admin_text("PUT", "/plugin_sources/living", &living("two", &go), "text/plain").status, 200);
    on_both("two ticks");
    let log = gw.log();
    for n in 0..2 {
        let (ended, begun) = (format!("living one destroy on {n}"), format!("living two init on {n}"));
        assert!(at(&log, &ended) < at(&log, &begun), "{log}");
        assert_eq!(log.matches(&ended).count(), 1, "{log}");
    }
    assert_eq!(gw.admin("PUT", "/plugins/reload", ()).status, 200);
    gw.expect_log("load plugin times: 4");
    let inits = |n: usize| gw.log().matches(&format!("living two init on {n}")).count();
    eventually("both have loaded it anew", || ((inits(0), inits(1)) == (2, 2)).then_some(()));
    assert_eq!(request(&gw.control(), "PUT", "/v1/plugins/reload", &[], b"").status, 200);
    eventually("once each", || ((inits(0), inits(1)) == (3, 3)).then_some(()));
    assert_eq!(gw.admin("DELETE", "/plugin_sources/living", ()).status, 200);
    let ends = |n: usize| gw.log().matches(&format!("living two destroy on {n}")).count();
    eventually("the second has ended, as often as it began", || ((ends(0), ends(1)) == (3, 3)).then_some(()));
    assert_eq!((inits(0), inits(1)), (3, 3));
}

#[test]
fn a_plugin_that_a_request_is_in_ends_with_the_request() {
    let up = Upstream::echo();
    let gw = Gateway::with(json!({"nginx_config": {"worker_processes": 1}}));
    let go = gw.dir.join("go").display().to_string();
    gw.admin_text("PUT", "/plugin_sources/living", &living("one", &go), "text/plain");
    gw.route("1", "/living", &up, json!({"living": {}}));
    let address = gw.proxy();
    let waiting = std::thread::spawn(move || get(&address, "/living").text());
    gw.expect_log("living one request");
    assert_eq!(gw.admin_text("PUT", "/plugin_sources/living", &living("two", &go), "text/plain").status, 200);
    gw.expect_log("living two ticks");
    assert!(!gw.log().contains("living one destroy"), "{}", gw.log());
    gw.dir.write("go", "");
    assert_eq!(waiting.join().expect("an answer"), "one");
    gw.expect_log("living one destroy");
    assert_eq!(gw.get("/living").text(), "two");
}

fn requiring(field: &str) -> String {
    format!(
        r#"
local core = require("apisix.core")
local schema = {{ type = "object", properties = {{}}, required = {{ "{field}" }} }}
local _M = {{ version = 0.1, priority = 10, name = "sx", schema = schema }}
function _M.check_schema(conf) return core.schema.check(schema, conf) end
function _M.access() return 200, "by {field}" end
return _M
"#
    )
}

#[test]
fn an_upload_that_refuses_confs_in_use_is_refused_unless_it_is_forced() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    let put = |field: &str, query: &str| {
        gw.admin_text("PUT", &format!("/plugin_sources/sx{query}"), &requiring(field), "text/plain")
    };
    assert_eq!(put("a", "").status, 201);
    for id in 1..=12 {
        gw.route(&format!("r{id:02}"), &format!("/{id}"), &up, json!({"sx": {"a": 1}}));
    }
    let refused = put("zz", "");
    assert_eq!(refused.status, 400, "{}", refused.text());
    let told = refused.text();
    assert!(told.contains("routes/r01: failed to check the configuration of plugin sx"), "{told}");
    assert!(told.contains("routes/r10") && !told.contains("routes/r11") && told.contains("; and more;"), "{told}");
    assert_eq!(gw.get("/1").text(), "by a");
    let deleted = gw.admin("DELETE", "/plugin_sources/sx", ());
    assert_eq!(deleted.status, 400, "{}", deleted.text());
    let told = deleted.text();
    assert!(told.contains("can not delete this plugin source, route [r01] is still using it now"), "{told}");
    assert_eq!(put("zz", "?force=true").status, 200);
    let errors = || get(&gw.control(), "/v1/config/errors").text();
    assert!(errors().contains("/routes/r12") && errors().contains("\\\"zz\\\" is required"), "{}", errors());
    assert_eq!(put("a", "").status, 200);
    assert!(!errors().contains("/routes/r"), "{}", errors());
    assert_eq!(gw.get("/12").text(), "by a");
    assert_eq!(gw.admin("DELETE", "/plugin_sources/sx?force=true", ()).status, 200);
}

#[test]
fn no_request_meets_plugins_that_have_ended() {
    let gw = Gateway::with(json!({"nginx_config": {"worker_processes": 1}}));
    let source = |version: u32| {
        format!(
            "local handle = {{ version = {version} }}
             local _M = {{ version = 0.1, priority = 1, name = 'handled', schema = {{ type = 'object' }} }}
             function _M.check_schema() return true end
             function _M.init() ngx.sleep(0.1) end
             function _M.destroy() handle = nil ngx.sleep(0.1) end
             function _M.access() return 200, tostring(handle.version) end
             return _M"
        )
    };
    let put = |version| gw.admin_text("PUT", "/plugin_sources/handled", &source(version), "text/plain").status;
    assert_eq!(put(1), 201);
    gw.route("1", "/h", &Upstream::echo(), json!({"handled": {}}));
    assert_eq!(gw.get("/h").text(), "1");
    std::thread::scope(|scope| {
        let uploaded = scope.spawn(|| put(2));
        let mut seen = Vec::new();
        while !uploaded.is_finished() {
            let reply = gw.get("/h");
            seen.push((reply.status, reply.text()));
        }
        assert_eq!(uploaded.join().expect("an answer"), 200);
        assert!(seen.iter().all(|(status, _)| *status == 200), "{seen:?}");
    });
    assert_eq!(gw.get("/h").text(), "2");
}

#[test]
fn an_init_that_fails_is_told_of_until_one_succeeds() {
    let gw = Gateway::start();
    let source = |init: &str| {
        format!(
            "local _M = {{ version = 0.1, priority = 1, name = 'mine', schema = {{ type = 'object' }} }}
             function _M.init() {init} end
             return _M"
        )
    };
    let put =
        |init: &str| assert!(gw.admin_text("PUT", "/plugin_sources/mine", &source(init), "text/plain").status < 300);
    let status = || get(&gw.control(), "/v1/plugin_sources").json()[0].clone();
    let listed = || get(&gw.control(), "/v1/config/errors").json()["errors"].clone();
    put("error('no backend')");
    let told = eventually("it is told", || status()["error"].as_str().map(str::to_owned));
    assert!(told.starts_with("init: plugins/mine.lua:2: no backend") && !told.contains("traceback"), "{told}");
    assert_eq!(status()["loaded"], true);
    assert_eq!((&listed()[0]["key"], &listed()[0]["error"]), (&json!("/plugins/mine"), &json!(told)));
    put("");
    eventually("it is not told any more", || status()["error"].is_null().then_some(()));
    assert_eq!(listed(), json!([]));
}

#[test]
fn what_is_no_json_schema_is_refused() {
    let gw = Gateway::start();
    for field in ["schema", "consumer_schema", "metadata_schema", "attr_schema"] {
        for (schema, why) in [("{ type = 'bogus' }", "invalid JSON type: bogus"), ("5", "")] {
            let source = format!(
                "local _M = {{ version = 0.1, priority = 1, name = 'mine', schema = {{ type = 'object' }} }}
                 _M.{field} = {schema}
                 return _M"
            );
            let reply = gw.admin_text("PUT", "/plugin_sources/mine", &source, "text/plain");
            assert_eq!(reply.status, 400, "{field}: {}", reply.text());
            assert!(reply.text().contains(field) && reply.text().contains(why), "{}", reply.text());
        }
    }
    let source =
        "return { version = 0.1, priority = 1, name = 'mine', schema = {}, metadata_schema = { type = 'object' } }";
    assert_eq!(gw.admin_text("PUT", "/plugin_sources/mine", source, "text/plain").status, 201);
}
