//! What a plugin may say of itself, and a configuration of one under `_meta` (plugin-develop.md, terminology/plugin.md).

use serde_json::{Value, json};

use crate::support::{Dir, Gateway, Upstream, eventually, request};

/// A gateway with a plugin `mine`, whose body is in the middle of this.
fn with_plugin(fields: &str, body: &str) -> Gateway {
    let dir = Dir::new();
    let source = format!(
        "local core = require('apisix.core')\n\
         local _M = {{ version = 0.1, priority = 10, name = 'mine', schema = {{ type = 'object' }}, {fields} }}\n{body}\nreturn _M\n"
    );
    dir.write("plugins/mine.lua", source);
    dir.configure(json!({"nginx_config": {"worker_processes": 1}}));
    Gateway::in_dir(dir)
}

fn refused(gw: &Gateway, path: &str, body: Value) -> String {
    let reply = gw.admin("PUT", path, body);
    assert_eq!(reply.status, 400, "{}", reply.text());
    reply.text()
}

#[test]
fn a_plugin_that_prefers_routes_steps_back_for_theirs() {
    let gw = with_plugin(
        "run_policy = 'prefer_route'",
        "function _M.access(conf) core.response.add_header('X-Mine', conf.who) end",
    );
    let up = Upstream::echo();
    gw.put("/global_rules/1", json!({"plugins": {"mine": {"who": "rule"}}}));
    gw.route("1", "/own", &up, json!({"mine": {"who": "route"}}));
    gw.route("2", "/none", &up, json!({}));
    gw.route("3", "/disabled", &up, json!({"mine": {"who": "route", "_meta": {"disable": true}}}));
    let who = |path: &str| gw.get(path).headers.into_iter().filter(|(n, _)| n.eq_ignore_ascii_case("x-mine"));
    let who = |path: &str| who(path).map(|(_, value)| value).collect::<Vec<_>>();
    assert_eq!([who("/own"), who("/none"), who("/disabled")], [["route"], ["rule"], ["rule"]]);
}

#[test]
fn delayed_body_filters_see_what_body_filters_have_left() {
    let gw = with_plugin(
        "",
        "function _M.header_filter() core.response.clear_header_as_body_modified() end\n\
         function _M.body_filter() if ngx.arg[2] then ngx.arg[1] = 'changed' end end\n\
         function _M.delayed_body_filter() if ngx.arg[2] then core.log.warn('delayed saw ', ngx.arg[1]) end end",
    );
    let up = Upstream::answering(|_| "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nold");
    gw.route("1", "/x", &up, json!({"mine": {}}));
    assert!(gw.get("/x").text().ends_with("changed"));
    gw.expect_log("delayed saw changed");
}

#[test]
fn metadata_is_checked_by_its_own_schema_and_has_its_defaults() {
    let gw = with_plugin(
        "metadata_schema = { type = 'object', properties = { a = { type = 'integer' }, b = { type = 'string', default = 'b' } }, \
         required = { 'a' } }",
        "function _M.check_schema(conf, kind)\n\
             if kind == core.schema.TYPE_METADATA then return core.schema.check(_M.metadata_schema, conf) end\n\
             return core.schema.check(_M.schema, conf)\n\
         end\n\
         function _M.access() local m = require('apisix.plugin').plugin_metadata('mine') return 200, m.value.a .. m.value.b end",
    );
    let up = Upstream::echo();
    assert!(refused(&gw, "/plugin_metadata/mine", json!({})).contains("property \\\"a\\\" is required"));
    gw.put("/plugin_metadata/mine", json!({"a": 1}));
    gw.route("1", "/x", &up, json!({"mine": {}}));
    assert_eq!(gw.get("/x").text(), "1b");
}

#[test]
fn secret_fields_are_stored_encrypted_and_plain_for_the_plugin() {
    let gw = with_plugin(
        "",
        "_M.schema = { type = 'object', encrypt_fields = { 'secret', 'inner.secret' }, properties = { secret = { type = 'string' },\n\
             inner = { type = 'object' } } }\n\
         function _M.access(conf) return 200, conf.secret .. conf.inner.secret end",
    );
    let up = Upstream::echo();
    let conf = json!({"secret": "plain-text-of-mine", "inner": {"secret": "another-plain-text"}});
    gw.route("1", "/x", &up, json!({"mine": conf}));
    assert_eq!(gw.get("/x").text(), "plain-text-of-mineanother-plain-text");
    let told = gw.admin("GET", "/routes/1", ()).json();
    assert_eq!(told["value"]["plugins"]["mine"]["secret"], "plain-text-of-mine");
    let stored = std::fs::read(gw.dir.join("data/moongate.redb")).unwrap();
    for plain in ["plain-text-of-mine", "another-plain-text"] {
        assert!(!stored.windows(plain.len()).any(|bytes| bytes == plain.as_bytes()), "{plain} in the store");
    }
}

/// An auth plugin of one's own: consumers are found by a field of theirs.
const AUTH: &str = "function _M.check_schema(conf, kind)\n\
        if kind == core.schema.TYPE_CONSUMER then return core.schema.check(_M.consumer_schema, conf) end\n\
        return core.schema.check(_M.schema, conf)\n\
    end\n\
    function _M.rewrite(conf, ctx)\n\
        local consumer_mod = require('apisix.consumer')\n\
        local consumer, consumer_conf = consumer_mod.find_consumer('mine', 'word', core.request.header(ctx, 'X-Word') or '')\n\
        if not consumer then return 401, { message = 'who are you' } end\n\
        consumer_mod.attach_consumer(ctx, consumer, consumer_conf)\n\
    end\n\
    function _M.access(conf, ctx) core.response.set_header('X-Who', ctx.consumer_name) end";

#[test]
fn consumers_have_a_schema_of_their_own_and_bring_their_plugins() {
    let fields = "type = 'auth', consumer_schema = { type = 'object', properties = { word = { type = 'string' } }, required = { 'word' } }";
    let gw = with_plugin(fields, AUTH);
    let up = Upstream::echo();
    assert!(refused(&gw, "/consumers/jack", json!({"username": "jack", "plugins": {"mine": {}}})).contains("word"));
    let brings = json!({"mine": {"word": "sesame"}, "response-rewrite": {"headers": {"set": {"X-Brought": "1"}}}});
    gw.put("/consumers/jack", json!({"username": "jack", "plugins": brings}));
    gw.route("1", "/x", &up, json!({"mine": {}}));
    let known = gw.send("GET", "/x", &[("X-Word", "sesame")], b"");
    assert_eq!((known.status, known.header("x-who"), known.header("x-brought")), (200, Some("jack"), Some("1")));
    let unknown = gw.send("GET", "/x", &[("X-Word", "open")], b"");
    assert_eq!((unknown.status, unknown.header("x-brought")), (401, None));
}

#[test]
fn an_anonymous_consumer_stands_in_for_whoever_says_nothing() {
    let gw = Gateway::start();
    let up = Upstream::echo();
    gw.put("/consumers/anyone", json!({"username": "anyone"}));
    gw.route("1", "/x", &up, json!({"key-auth": {"anonymous_consumer": "anyone"}}));
    gw.route("2", "/y", &up, json!({"key-auth": {"anonymous_consumer": "nobody"}}));
    assert_eq!(gw.get("/x").status, 200);
    assert_eq!(up.last().header("x-consumer-username"), Some("anyone"));
    assert_eq!(gw.get("/y").status, 401);
}

#[test]
fn meta_decides_on_order_and_hooks() {
    let gw = with_plugin(
        "",
        "function _M.access(conf, ctx) ctx.said = (ctx.said or '') .. 'mine ' .. (conf.word or '-') .. ';' end\n\
         function _M.before_proxy(conf, ctx) return 200, ctx.said end",
    );
    let up = Upstream::echo();
    let other = "return function(_, ctx) ctx.said = (ctx.said or '') .. 'other;' end";
    let plugins = |meta: Value| json!({"mine": {"_meta": meta}, "serverless-pre-function": {"functions": [other]}});
    gw.route("1", "/as-is", &up, plugins(json!({})));
    gw.route("2", "/first", &up, plugins(json!({"priority": 20000})));
    gw.route("3", "/hooked", &up, plugins(json!({"pre_function": "return function(conf) conf.word = 'set' end"})));
    gw.route("4", "/filtered", &up, plugins(json!({"filter": [["arg_run", "==", "1"]]})));
    assert_eq!(gw.get("/as-is").text(), "other;mine -;");
    assert_eq!(gw.get("/first").text(), "mine -;other;");
    assert_eq!(gw.get("/hooked").text(), "other;mine set;");
    assert_eq!(gw.get("/filtered?run=1").text(), "other;mine -;");
    assert_eq!(gw.get("/filtered").json()["uri"], "/filtered", "the upstream's answer");
    assert!(
        refused(&gw, "/routes/5", json!({"uri": "/", "plugins": plugins(json!({"colour": 1}))})).contains("colour")
    );
}

#[test]
fn plugins_begin_and_end_with_their_vm() {
    let gw = with_plugin(
        "",
        "function _M.init() core.log.warn('mine begins') end\nfunction _M.destroy() core.log.warn('mine ends') end",
    );
    gw.expect_log("mine begins");
    assert!(!gw.log().contains("mine ends"));
    assert_eq!(request(&gw.control(), "PUT", "/v1/plugins/reload", &[], b"").status, 200);
    eventually("another one begins", || (gw.log().matches("mine begins").count() >= 2).then_some(()));
    gw.expect_log("mine ends");
}

#[test]
fn public_endpoints_are_served_where_a_route_says_so() {
    let gw = with_plugin(
        "",
        "function _M.api() return { { methods = { 'GET' }, uri = '/mine/*', handler = function(ctx) return 200, ctx.var.uri end } } end",
    );
    gw.put("/routes/1", json!({"uri": "/mine/*", "plugins": {"public-api": {}}}));
    assert_eq!((gw.get("/mine/a/b").status, &*gw.get("/mine/a/b").text()), (200, "/mine/a/b"));
    assert_eq!(gw.send("POST", "/mine/a", &[], b"").status, 404);
    gw.put("/routes/2", json!({"uri": "/elsewhere", "plugins": {"public-api": {"uri": "/other"}}}));
    assert_eq!(gw.get("/elsewhere").status, 404);
}
