//! Walk 5: uploaded functions.

use serde_json::json;

use crate::support::Gateway;

const LUA: &str = "text/plain";

fn with_hello(source: &str) -> Gateway {
    let gw = Gateway::start();
    let reply = gw.admin_text("PUT", "/functions/hello", source, LUA);
    assert_eq!(reply.status, 201, "{}", reply.text());
    gw.put("/routes/2", json!({"uri": "/hello", "function_id": "hello"}));
    gw
}

#[test]
fn answers_without_an_upstream() {
    let gw = with_hello("return function(ctx) return 200, 'hello ' .. (ctx.var.arg_name or 'world') end");
    let reply = gw.get("/hello?name=moon");
    assert_eq!((reply.status, reply.text().as_str()), (200, "hello moon"));
}

#[test]
fn a_chunk_may_print_its_answer() {
    let gw = with_hello("ngx.header['X-Own'] = '1'\nngx.status = 203\nngx.say('printed ', ngx.var.uri)");
    for _ in 0..2 {
        let reply = gw.get("/hello");
        assert_eq!((reply.status, reply.text().as_str(), reply.header("x-own")), (203, "printed /hello\n", Some("1")));
    }
}

#[test]
fn a_new_source_serves_the_next_request_on_every_worker() {
    let gw = with_hello("return function() return 200, '0' end");
    for version in 1..10 {
        let source = format!("return function() return 200, '{version}' end");
        assert_eq!(gw.admin_text("PUT", "/functions/hello", &source, LUA).status, 200);
        for _ in 0..8 {
            assert_eq!(gw.get("/hello").text(), version.to_string());
        }
    }
}

#[test]
fn a_source_that_does_not_compile_is_refused_and_the_old_one_serves() {
    let gw = with_hello("return function() return 200, 'old' end");
    let refused = gw.admin_text("PUT", "/functions/hello", "local a = 1\nreturn function( oops", LUA);
    assert_eq!(refused.status, 400);
    assert!(refused.text().contains("hello") && refused.text().contains(":2:"), "{}", refused.text());
    assert_eq!(gw.get("/hello").text(), "old");
}

#[test]
fn json_uploads_work_too() {
    let gw = Gateway::start();
    gw.put("/functions/j", json!({"source": "return function(ctx) return 200, {n = 1} end"}));
    gw.put("/routes/1", json!({"uri": "/j", "function_id": "j"}));
    assert_eq!(gw.get("/j").json(), json!({"n": 1}));
}

#[test]
fn a_table_is_answered_as_cjson_writes_it() {
    for (table, expected) in [
        ("{n = 1, 1}", json!({"n": 1, "1": 1})),
        ("{[1] = 'a', [3] = 'c'}", json!(["a", null, "c"])),
        ("{}", json!({})),
        ("{list = {1, 2.5}, null = ngx.null}", json!({"list": [1, 2.5], "null": null})),
    ] {
        let gw = with_hello(&format!("return function() return 200, {table} end"));
        assert_eq!(gw.get("/hello").json(), expected, "{table}");
    }
    let gw = with_hello("return function() return 200, {print} end");
    assert_eq!(gw.get("/hello").status, 500, "what is no JSON is no answer");
}

#[test]
fn a_function_reads_the_body_and_waits() {
    let gw = with_hello(
        "return function() ngx.req.read_body() ngx.sleep(0.01) return 200, 'got ' .. ngx.req.get_body_data() end",
    );
    assert_eq!(gw.send("POST", "/hello", &[], b"this").text(), "got this");
}

#[test]
fn an_error_answers_500_and_the_sandbox_holds() {
    let gw = with_hello("return function() error('boom') end");
    assert_eq!(gw.get("/hello").status, 500);
    gw.expect_log("boom");
    for forbidden in ["io.open('/etc/passwd')", "os.execute('true')", "require('ffi')", "debug.getregistry()"] {
        let source = format!("return function() local v = {forbidden} return 200, 'got out' end");
        gw.admin_text("PUT", "/functions/hello", &source, LUA);
        assert_eq!(gw.get("/hello").status, 500, "{forbidden}");
    }
}

#[test]
fn a_function_does_not_see_keys_and_secrets() {
    let gw = with_hello(
        "return function()
            local core = require('apisix.core')
            local conf, seen = core.config_local.local_conf(), {}
            for _, name in ipairs({ 'apisix.secret', 'apisix.core.data_encryption', 'apisix.core.env', 'apisix.consumer' }) do
                seen[#seen + 1] = pcall(require, name)
            end
            local hosts = require('apisix.core.dns.client').new({ hosts = '/etc/passwd' }).hosts
            return 200, core.json.encode({ conf = conf.deployment or conf.apisix.data_encryption or false, seen = seen,
                encrypt = core.data_encryption.encrypt == nil, hosts = hosts['localhost'] ~= nil })
        end",
    );
    let expected = json!({"conf": false, "seen": [false, false, false, false], "encrypt": true, "hosts": true});
    let reply = gw.get("/hello");
    assert_eq!(serde_json::from_str::<serde_json::Value>(&reply.text()).expect("JSON"), expected, "{}", reply.text());
}

#[test]
fn a_function_that_never_ends_is_stopped() {
    let gw = with_hello("return function() while true do end end");
    assert_eq!(gw.get("/hello").status, 500);
    gw.admin_text(
        "PUT",
        "/functions/hello",
        "return function() while true do pcall(function() while true do end end) end end",
        LUA,
    );
    assert_eq!(gw.get("/hello").status, 500);
    gw.admin_text("PUT", "/functions/hello", "return function() return 200, 'fine' end", LUA);
    assert_eq!(gw.get("/hello").text(), "fine");
}

#[test]
fn a_pattern_that_never_ends_is_stopped() {
    let gw = with_hello(
        "return function(ctx)
            if ctx.var.arg_spin then
                return 200, tostring(pcall(string.find, ('x'):rep(60), ('x*'):rep(60) .. 'y'))
            end
            return 200, (('a-b'):gsub('%-', '+'))
        end",
    );
    assert_eq!(gw.get("/hello").text(), "a+b");
    let spun = gw.get("/hello?spin=1");
    assert_eq!(spun.status, 500, "{}", spun.text());
    gw.expect_log("longer than lua.limits.cpu_ms allows");
    assert_eq!(gw.get("/hello").text(), "a+b", "the worker goes on");
}
