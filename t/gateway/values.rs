//! What plugins and functions read of a request and its configuration, and what their answers carry.

use std::{
    io::{Read, Write},
    net::TcpStream,
};

use serde_json::{Value, json};

use crate::support::{Client, DEADLINE, Dir, Gateway, Reply, Upstream};

/// A gateway whose plugin `probe` runs this as its access phase.
fn probing(body: &str, settings: Value) -> Gateway {
    let dir = Dir::new();
    dir.configure(settings);
    dir.write(
        "plugins/probe.lua",
        format!(
            "local core = require('apisix.core')
             local _M = {{ version = 0.1, priority = 1, name = 'probe', schema = {{ type = 'object',
                 properties = {{ token = {{ type = 'string' }} }}, encrypt_fields = {{ 'token' }} }},
                 metadata_schema = {{ type = 'object', properties = {{ secret = {{ type = 'string' }} }},
                     encrypt_fields = {{ 'secret' }} }} }}
             function _M.access(conf, ctx) {body} end
             return _M"
        ),
    );
    Gateway::in_dir(dir)
}

fn header<'r>(reply: &'r Reply, name: &str) -> Option<&'r str> {
    reply.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
}

#[test]
fn encrypted_fields_are_in_clear_wherever_a_plugin_finds_them() {
    let up = Upstream::echo();
    let gw = probing(
        "local plugin = require('apisix.plugin')
         local of = function(value) return value and value.plugins.probe.token end
         return 200, { conf = conf.token, metadata = plugin.plugin_metadata('probe').value.secret,
             route = of(ctx.matched_route.value), service = of(ctx.service.value),
             config = of(require('apisix.plugin_config').get('c').value),
             consumer = ctx.consumer.plugins['key-auth'].key, auth = ctx.consumer.auth_conf.key }",
        json!({"apisix": {"data_encryption": {"enable_encrypt_fields": true, "keyring": ["edd1c9f0985e76a2"]}}}),
    );
    gw.put("/plugin_metadata/probe", json!({"secret": "of metadata"}));
    gw.put("/plugin_configs/c", json!({"plugins": {"probe": {"token": "of config"}}}));
    let upstream = json!({"nodes": {up.addr(): 1}, "type": "roundrobin"});
    gw.put("/services/s", json!({"plugins": {"probe": {"token": "of service"}}, "upstream": upstream}));
    gw.put("/consumers", json!({"username": "jack", "plugins": {"key-auth": {"key": "of jack"}}}));
    let plugins = json!({"probe": {"token": "of route"}, "key-auth": {}});
    gw.put("/routes/1", json!({"uri": "/r", "service_id": "s", "plugin_config_id": "c", "plugins": plugins}));
    let seen = gw.send("GET", "/r", &[("apikey", "of jack")], b"");
    let expected = json!({"conf": "of route", "metadata": "of metadata", "route": "of route", "service": "of service",
        "config": "of config", "consumer": "of jack", "auth": "of jack"});
    assert_eq!(seen.json(), expected, "{}", seen.text());
}

#[test]
fn what_the_server_does_not_let_be_written_stays_with_ctx_var() {
    let (gw, up) = (
        probing(
            "local var, said = ctx.var, {}
             for name, value in pairs({ remote_addr = '1.1.1.1', uri = '/other', status = 5, arg_x = 'set', request_uri = '/u' }) do
                 local real = var[name]
                 var[name] = value
                 said[name] = { var[name] == value, ngx.var[name] == real }
                 var[name] = nil
                 said[name][3] = var[name] == real
             end
             var.remote_addr, var.mine, var.list = nil, 'own', { 1 }
             said.mine, said.list = ngx.var.mine, var.list
             return 200, said",
            json!({}),
        ),
        Upstream::echo(),
    );
    gw.route("1", "/r", &up, json!({"probe": {}}));
    let seen = gw.get("/r?x=1").json();
    for name in ["remote_addr", "arg_x", "request_uri", "status"] {
        assert_eq!(seen[name], json!([true, true, true]), "{name}: {seen}");
    }
    assert_eq!(seen["uri"][0], true, "{seen}");
    assert_eq!((&seen["mine"], &seen["list"]), (&json!("own"), &json!([1])), "{seen}");
}

#[test]
fn only_texts_name_a_variable() {
    let (gw, up) = (
        probing(
            "local said = {}
             for i, name in ipairs({ 55, true }) do
                 said[i] = select(2, pcall(function() return ctx.var[name] end))
             end
             said[3] = select(2, pcall(function() return ctx.var[nil] end))
             said[4] = select(2, pcall(function() ctx.var[55] = 1 end))
             return 200, said",
            json!({}),
        ),
        Upstream::echo(),
    );
    gw.route("1", "/r", &up, json!({"probe": {}}));
    let said = gw.get("/r").json();
    let said: Vec<&str> = said.as_array().expect("an array").iter().filter_map(Value::as_str).collect();
    assert_eq!(said.len(), 4);
    assert!(said.iter().all(|text| text.ends_with("invalid argument, expect string value")), "{said:?}");
}

#[test]
fn a_status_that_is_none_is_a_500_and_444_closes() {
    let up = Upstream::echo();
    let gw = probing("return tonumber(ctx.var.arg_status), ctx.var.arg_body", json!({}));
    gw.route("1", "/r", &up, json!({"probe": {}}));
    gw.put("/functions/f", json!({"source": "return function(ctx) return tonumber(ctx.var.arg_status) end"}));
    gw.put("/routes/2", json!({"uri": "/f", "function_id": "f"}));
    for path in ["/r?status=444", "/r?status=444&body=x", "/f?status=444"] {
        let mut stream = TcpStream::connect(gw.proxy()).expect("it listens");
        stream.set_read_timeout(Some(DEADLINE)).expect("a deadline");
        stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes()).expect("it is sent");
        let mut got = Vec::new();
        // The end may come as a reset.
        let _ = stream.read_to_end(&mut got);
        assert_eq!(String::from_utf8_lossy(&got), "", "{path}");
    }
    for path in ["/r?status=100", "/r?status=101&body=x", "/f?status=199", "/r?status=1000", "/r?status=0"] {
        assert_eq!(gw.get(path).status, 500, "{path}");
    }
    gw.expect_log("answered with status 100");
    gw.expect_log("answered with status 199");
    assert_eq!((gw.get("/r?status=200").status, gw.get("/r?status=599&body=x").status), (200, 599));
}

#[test]
fn answers_of_lua_have_a_type() {
    let up = Upstream::echo();
    let gw = probing(
        "local what = ctx.var.arg_what
         if what == 'text' then return 200, 'x' end
         if what == 'table' then return 403, { url = 'a/b', f = print } end
         if what == 'exit' then return core.response.exit(403, { url = 'a/b', f = print }) end
         if what == 'say' then ngx.say('x') return ngx.exit(200) end
         if what == 'flush' then ngx.say('x') ngx.flush(true) return ngx.exit(200) end
         if what == 'own' then ngx.header.content_type = 'a/b' return 403, 'x' end
         if what == 'none' then ngx.header.content_type = nil return 200, 'x' end
         return 403",
        json!({}),
    );
    gw.route("1", "/r", &up, json!({"probe": {}}));
    let kind = |what: &str| header(&gw.get(&format!("/r?what={what}")), "Content-Type").map(str::to_owned);
    let plain = Some("text/plain; charset=utf-8".to_owned());
    for what in ["text", "table", "exit", "say", "flush"] {
        assert_eq!(kind(what), plain, "{what}");
    }
    assert_eq!((kind("own").as_deref(), kind("none")), (Some("a/b"), None));
    assert_eq!(kind("page").as_deref(), Some("text/html; charset=utf-8"));
    let told = |what: &str| gw.get(&format!("/r?what={what}")).json();
    assert_eq!((&told("table")["url"], &told("exit")["url"]), (&json!("a/b"), &json!("a/b")));
    for what in ["table", "exit"] {
        let text = gw.get(&format!("/r?what={what}")).text();
        assert!(text.contains("\"a/b\"") && text.contains("function: ") && text.ends_with("}\n"), "{text}");
    }
    let source = "return function(ctx)
        local what = ctx.var.arg_what
        if what == 'table' then return 200, { url = 'a/b' } end
        if what == 'say' then ngx.say('x') return end
        if what == 'own' then ngx.header['Content-Type'] = 'a/b' return 200, {} end
        return 200, 'x'
    end";
    gw.put("/functions/f", json!({"source": source}));
    gw.put("/routes/2", json!({"uri": "/f", "function_id": "f"}));
    let of = |what: &str| gw.get(&format!("/f?what={what}"));
    assert_eq!(header(&of("table"), "Content-Type"), Some("application/json"));
    assert_eq!(of("table").text(), "{\"url\":\"a/b\"}\n");
    assert_eq!(
        (header(&of("text"), "Content-Type"), header(&of("say"), "Content-Type")),
        (plain.as_deref(), plain.as_deref())
    );
    assert_eq!(header(&of("own"), "Content-Type"), Some("a/b"));
}

#[test]
fn what_a_json_body_has_comes_with_its_type() {
    let up = Upstream::echo();
    let gw = probing(
        "local said = {}
         for _, path in ipairs({ 'b', 'n', 't', 'o', 'l', 'l[*]', 'l[1]', 'o.none', 'nothing', 'nothing[*]' }) do
             local value = ctx.var['post_arg.' .. path]
             said[path] = { type(value), value }
         end
         return 200, said",
        json!({}),
    );
    gw.put(
        "/routes/1",
        json!({"uri": "/r", "plugins": {"probe": {}}, "vars": [["post_arg.b", "==", "true"], ["post_arg.n", ">", 1]],
            "upstream": {"type": "roundrobin", "nodes": {up.addr(): 1}}}),
    );
    let body = json!({"b": true, "n": 1.5, "t": "x", "o": {"k": [1], "none": null}, "l": [1, false]}).to_string();
    let seen = gw.send("POST", "/r", &[("Content-Type", "application/json")], body.as_bytes());
    assert_eq!(seen.status, 200, "conditions compare texts: {}", seen.text());
    let expected = json!({"b": ["boolean", true], "n": ["number", 1.5], "t": ["string", "x"],
        "o": ["table", {"k": [1], "none": null}], "l": ["table", [1, false]], "l[*]": ["table", [1, false]],
        "l[1]": ["boolean", false], "o.none": ["nil"], "nothing": ["nil"], "nothing[*]": ["nil"]});
    assert_eq!(seen.json(), expected, "{}", seen.text());
    let form = gw.send("POST", "/r", &[("Content-Type", "application/x-www-form-urlencoded")], b"b=true&n=2&t=x");
    assert_eq!((&form.json()["b"], &form.json()["n"]), (&json!(["string", "true"]), &json!(["string", "2"])));
}

#[test]
fn limits_count_by_what_json_says_not_by_its_type() {
    let (gw, up) = (Gateway::start(), Upstream::echo());
    let limit = |key: &str| json!({"limit-count": {"count": 1, "time_window": 60, "key": key, "rejected_code": 429}});
    gw.route("1", "/bool", &up, limit("post_arg.b"));
    gw.route("2", "/table", &up, limit("post_arg.o"));
    let status =
        |path: &str, body: &str| gw.send("POST", path, &[("Content-Type", "application/json")], body.as_bytes()).status;
    for (path, one, other) in
        [("/bool", r#"{"b": true}"#, r#"{"b": false}"#), ("/table", r#"{"o": {"a": 1, "b": 2}}"#, r#"{"o": {"a": 1}}"#)]
    {
        assert_eq!((status(path, one), status(path, one), status(path, other)), (200, 429, 200), "{path}");
    }
    assert_eq!(status("/table", r#"{"o": {"b": 2, "a": 1}}"#), 429);
}

#[test]
fn a_form_that_lies_in_a_file_is_not_lost_without_a_line() {
    let up = Upstream::echo();
    let gw = probing(
        "local args, err = core.request.get_post_args(ctx)
         return 200, { a = args.a, err = err }",
        json!({}),
    );
    gw.route("1", "/r", &up, json!({"probe": {}}));
    let post =
        |body: &[u8]| gw.send("POST", "/r", &[("Content-Type", "application/x-www-form-urlencoded")], body).json();
    assert_eq!(post(b"a=1"), json!({"a": "1"}));
    let long = format!("a=1&b={}", "x".repeat(2 << 20));
    assert_eq!(post(long.as_bytes()), json!({"err": "request body in temp file not supported"}));
    gw.expect_log("the post form is too large: request body in temp file not supported");
}

#[test]
fn nil_is_named_by_schemas_and_an_unknown_port_is_nil() {
    let up = Upstream::echo();
    let gw = probing(
        "local schema = { type = 'object' }
         local of_nil = select(2, core.schema.check(schema, nil))
         local of_null = select(2, core.schema.check(schema, ngx.null))
         return 200, { of_nil, of_null, type(core.request.get_remote_client_port(ctx)), ctx.var.remote_port }",
        json!({}),
    );
    gw.route("1", "/r", &up, json!({"probe": {}}));
    let of = |ip: &str| gw.send("GET", "/r", &[("X-Real-IP", ip)], b"").json();
    let refused = |got: &str| format!("wrong type: expected object, got {got}");
    assert_eq!(of("9.9.9.9"), json!([refused("nil"), refused("userdata"), "nil", ""]));
    assert_eq!(of("9.9.9.9:77"), json!([refused("nil"), refused("userdata"), "number", "77"]));
    assert_eq!(gw.get("/r").json()[2], "number");
}

#[test]
fn a_function_sees_the_route_of_its_own_request() {
    let gw = Gateway::with(json!({"nginx_config": {"worker_processes": 1}}));
    gw.put("/functions/f", json!({"source": "return function(ctx) return 200, ctx.matched_route.value.id end"}));
    for id in ["a", "b"] {
        gw.put(&format!("/routes/{id}"), json!({"uri": format!("/{id}"), "function_id": "f"}));
    }
    for id in ["a", "b", "a", "a", "b"] {
        assert_eq!(gw.get(&format!("/{id}")).text(), id);
    }
}

#[test]
fn a_function_knows_who_was_let_in_but_not_by_which_key() {
    let gw = Gateway::start();
    let source = "return function(ctx)
        local c = ctx.consumer or {}
        return 200, { c.username, ctx.consumer_name, ctx.credential_id, ctx.conf_type, ctx.conf_id, ctx.conf_version,
            c.custom_id, type(c.plugins), type(c.auth_conf) }
    end";
    gw.put("/functions/f", json!({"source": source}));
    gw.put("/routes/1", json!({"uri": "/f", "function_id": "f", "plugins": {"key-auth": {}}}));
    gw.put("/routes/2", json!({"uri": "/open", "function_id": "f"}));
    gw.put("/consumers", json!({"username": "jack", "labels": {"custom_id": "17"}}));
    gw.put("/consumers/jack/credentials/c1", json!({"plugins": {"key-auth": {"key": "secret"}}}));
    let known = gw.send("GET", "/f", &[("apikey", "secret")], b"");
    assert_eq!(known.json(), json!(["jack", "jack", "c1", "function", "f", 1, "17", "nil", "nil"]), "{}", known.text());
    let open = gw.get("/open").json();
    assert_eq!((&open[0], &open[3], &open[4]), (&Value::Null, &json!("function"), &json!("f")), "{open}");
    // The keep-alive connection is used again: nothing of the last request stays.
    let mut client = Client::connect(&gw.proxy());
    client.send("GET", "/f", &[("apikey", "secret")], b"");
    assert_eq!(client.reply("GET").json()[1], "jack");
    client.send("GET", "/open", &[], b"");
    assert_eq!(client.reply("GET").json()[1], Value::Null);
}

#[test]
fn a_function_does_not_write_to_its_env_nor_end_the_gateway() {
    let gw = Gateway::start();
    let source = "return function()
        local set, why = pcall(rawset, env, 'A', 'mine')
        local ended, reason = pcall(require('ngx.process').signal_graceful_exit)
        return 200, { set, why, env.A, ended, reason }
    end";
    gw.put("/functions/f", json!({"source": source, "env": {"A": "given"}}));
    gw.put("/routes/1", json!({"uri": "/f", "function_id": "f"}));
    let said = gw.get("/f").json();
    assert_eq!((&said[0], &said[2], &said[3]), (&json!(false), &json!("given"), &json!(false)), "{said}");
    assert!(said[1].as_str().is_some_and(|why| why.ends_with("env is read-only")), "{said}");
    assert!(said[4].as_str().is_some_and(|why| why.ends_with("is not open to functions")), "{said}");
    let empty = gw.admin_text("PUT", "/functions/g", "{}", "text/plain");
    let text = "either the Lua text itself, or a JSON object with the Lua text as";
    assert!(empty.status == 400 && empty.text().contains(text), "{}", empty.text());
}
