//! Which route and which node a request gets, where more than its head decides, and what error.log says of it.

use std::io::{BufReader, Read, Write};

use serde_json::{Value, json};

use super::{Client, Dir, Gateway, OK, Upstream, always, eventually, read_request, route};

fn with_info() -> Gateway {
    Gateway::with(json!({"nginx_config": {"error_log_level": "info"}}))
}

/// A route `/*` under these conditions.
fn conditional(gw: &Gateway, id: &str, up: &Upstream, vars: Value) {
    let upstream = json!({"type": "roundrobin", "nodes": {up.addr(): 1}});
    gw.put(&format!("/routes/{id}"), json!({"uri": "/*", "vars": vars, "upstream": upstream}));
}

#[test]
fn each_failed_try_is_a_line_in_nginxs_words() {
    let gw = with_info();
    let (one, two) = (Upstream::dead(), Upstream::dead());
    route(&gw, &[one.clone(), two.clone()], json!({"retries": 5}));
    assert_eq!(gw.get("/").status, 502);
    gw.expect_log("failed to find valid upstream server, all upstream servers tried");
    let log = gw.log();
    for node in [&one, &two] {
        assert!(log.contains(&format!("proxy request to {node} while connecting to upstream")), "{log}");
        let line = log.lines().find(|l| l.contains("connect() failed") && l.contains(node.as_str())).expect("a line");
        assert!(line.contains("[error]") && line.contains("(111: Connection refused) while connecting to upstream"));
    }
    assert_eq!(log.matches("connect() failed").count(), 2);
    assert!(log.contains("failed to get server from current priority 0, try next one"));
}

#[test]
fn a_name_without_an_address_is_answered_for_with_503() {
    let gw = Gateway::start();
    route(&gw, &["nowhere.invalid:80".to_owned()], json!({}));
    let reply = gw.get("/");
    assert_eq!((reply.status, reply.header("X-APISIX-Upstream-Status")), (503, None));
    gw.expect_log("failed to parse domain: nowhere.invalid");
}

#[test]
fn chash_says_what_it_hashes_and_falls_back_to_the_address() {
    let gw = with_info();
    let (one, two) = (always(OK), always(OK));
    let upstream = |more: Value| {
        let mut upstream = json!({"type": "chash", "nodes": {one.addr(): 1, two.addr(): 1}});
        for (key, value) in more.as_object().expect("a map") {
            upstream[key] = value.clone();
        }
        gw.put("/routes/1", json!({"uri": "/*", "upstream": upstream}));
    };
    upstream(json!({"hash_on": "header", "key": "X-Session"}));
    assert_eq!(gw.send("GET", "/", &[("X-Session", "a\"b")], b"").status, 200);
    gw.expect_log("hash_on: header");
    gw.expect_log("chash_key: \"a\\\"b\"");
    gw.get("/");
    gw.expect_log("chash_key fetch is nil, use default chash_key remote_addr: 127.0.0.1");
    upstream(json!({"hash_on": "vars_combinations", "key": "$http_a-$http_b"}));
    gw.send("GET", "/", &[("B", "2")], b"");
    gw.expect_log("chash_key: \"-2\"");
    let missing = || gw.log().matches("chash_key fetch is nil").count();
    let before = missing();
    gw.get("/");
    eventually("one more line", || (missing() == before + 1).then_some(()));
}

#[test]
fn least_conn_counts_a_request_to_its_end() {
    let gw = Gateway::with(json!({"nginx_config": {"worker_processes": 1}}));
    // Their heads come, their bodies do not.
    let holding = || {
        Upstream::serving(|_, mut stream| {
            read_request(&mut BufReader::new(stream.try_clone().expect("a clone")));
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n").expect("sent");
            let _ = stream.read(&mut [0]);
        })
    };
    let (one, two) = (holding(), holding());
    let nodes = json!({one.addr(): 1, two.addr(): 1});
    gw.put("/routes/1", json!({"uri": "/*", "upstream": {"type": "least_conn", "nodes": nodes}}));
    let mut clients = Vec::new();
    for busy in [(1, 0), (1, 1), (2, 1), (2, 2)] {
        let mut client = Client::connect(&gw.proxy());
        client.send("GET", "/", &[], b"");
        assert_eq!(client.head().status, 200);
        clients.push(client);
        let (a, b) = (one.connections(), two.connections());
        assert_eq!((a.max(b), a.min(b)), busy);
    }
}

#[test]
fn graphql_requests_are_told_apart_by_operation_name_and_fields() {
    let gw = Gateway::with(json!({"graphql": {"max_size": 64}}));
    let up = Upstream::echo();
    let vars = json!([
        ["graphql_operation", "==", "query"],
        ["graphql_name", "==", "repo"],
        ["graphql_root_fields", "has", "owner"],
    ]);
    conditional(&gw, "1", &up, vars);
    let json = ("Content-Type", "application/json");
    let post = |headers: &[(&str, &str)], body: &str| gw.send("POST", "/", headers, body.as_bytes()).status;
    assert_eq!(post(&[], "query repo { owner { name } }"), 200);
    assert_eq!(up.last().body, b"query repo { owner { name } }", "what was read is sent on");
    assert_eq!(post(&[json], r#"{"query": "query repo{owner}"}"#), 200);
    assert_eq!(gw.get("/?query=query%20repo%7Bowner%7D").status, 200);
    assert_eq!(post(&[], "mutation repo { owner { name } }"), 404);
    assert_eq!(post(&[], "query repo { name }"), 404);
    for (status, said) in [
        (post(&[], "AA"), "failed to parse graphql: Syntax error near line 1 body: AA"),
        (post(&[], ""), "failed to read graphql data, request body has zero size"),
        (post(&[json], "{}"), "failed to read graphql data, json body[query] is nil"),
        (gw.get("/").status, "failed to read graphql data, args[query] is nil"),
        (post(&[], &"x".repeat(65)), "request size 65 is greater than the maximum size 64 allowed"),
    ] {
        assert_eq!(status, 404, "{said}");
        gw.expect_log(said);
    }
}

#[test]
fn routes_ask_about_forms_json_and_multipart() {
    let gw = Gateway::with(json!({"apisix": {"max_post_args_readable_size": 1}}));
    let (flat, deep) = (Upstream::echo(), Upstream::echo());
    conditional(&gw, "1", &flat, json!([["post_arg_model", "==", "m"]]));
    conditional(&gw, "2", &deep, json!([["post_arg.messages[*].type", "has", "image"]]));
    let post = |kind: &str, body: &str| gw.send("POST", "/", &[("Content-Type", kind)], body.as_bytes()).status;
    assert_eq!(post("application/x-www-form-urlencoded; charset=utf-8", "a=1&model=m"), 200);
    assert_eq!(flat.last().body, b"a=1&model=m");
    assert_eq!(post("application/x-www-form-urlencoded", "model=x"), 404);
    let messages = r#"{"messages": [{"type": "text"}, {"type": "image"}]}"#;
    assert_eq!(post("application/json", messages), 200);
    assert_eq!(deep.last().body, messages.as_bytes());
    assert_eq!(post("application/json", r#"{"messages": [{"type": "text"}]}"#), 404);
    assert_eq!(post("text/plain", messages), 404);
    let part = "--B\r\nContent-Disposition: form-data; name=\"messages[*].type\"\r\n\r\nimage\r\n--B--\r\n";
    assert_eq!(post("multipart/form-data; boundary=B", part), 200);
    let padded = |n: usize| format!(r#"{{"messages": [{{"type": "image"}}], "pad": "{}"}}"#, "x".repeat(n));
    let most = (1 << 20) - padded(0).len();
    assert_eq!(post("application/json", &padded(most)), 200);
    assert_eq!(post("application/json", &padded(most + 1)), 404);
    gw.expect_log("is greater than the maximum size 1048576 allowed");
    let bad = json!({"uri": "/*", "vars": [["post_arg.a[.b", "==", "x"]], "upstream": {"nodes": {flat.addr(): 1}}});
    let refused = gw.admin("PUT", "/routes/3", bad);
    assert_eq!(refused.status, 400);
    assert!(refused.text().contains("failed to validate the 'vars' expression: invalid expression"));
}

#[test]
fn plugins_ask_about_a_body_that_no_route_has_asked_about() {
    let gw = Gateway::with(json!({"apisix": {"max_post_args_readable_size": 1}, "graphql": {"max_size": 64}}));
    let up = Upstream::echo();
    let print = "return function(_, ctx)
        local v = ctx.var
        require('apisix.core').response.exit(200, table.concat({
            tostring(v.post_arg_a), tostring(v['post_arg.a']), tostring(v['post_arg.b.c']), tostring(v.graphql_name),
        }, ' '))
    end";
    gw.route("print", "/print", &up, json!({"serverless-pre-function": {"functions": [print]}}));
    let filtered = |vars: Value| json!({"mocking": {"_meta": {"filter": vars}, "response_example": "mocked"}});
    gw.route("form", "/form", &up, filtered(json!([["post_arg_a", "==", "1"]])));
    gw.route("name", "/name", &up, filtered(json!([["graphql_name", "==", "repo"]])));
    let post =
        |path: &str, kind: &str, body: &str| gw.send("POST", path, &[("Content-Type", kind)], body.as_bytes()).text();
    let (form, json) = ("application/x-www-form-urlencoded", "application/json");
    assert_eq!(post("/print", form, "a=1&b=2"), "1 1 nil nil");
    assert_eq!(post("/print", json, r#"{"a": "x", "b": {"c": 3}}"#), "nil x 3 nil");
    assert_eq!(post("/print", "application/graphql", "query repo { owner }"), "nil nil nil repo");
    assert_eq!(gw.get("/print?query=query%20repo%7Bowner%7D").text(), "nil nil nil repo");
    assert_eq!(post("/print", form, &format!("a={}", "x".repeat(1 << 20))), "nil nil nil nil");
    gw.expect_log("is greater than the maximum size 1048576 allowed");
    assert_eq!(post("/form", form, "a=1"), "mocked");
    assert_ne!(post("/form", form, "a=2"), "mocked");
    assert_eq!(up.last().body, b"a=2", "what was read is sent on");
    assert_eq!(post("/name", "text/plain", "query repo { owner }"), "mocked");
    assert_ne!(post("/name", "text/plain", "query other { owner }"), "mocked");
}

#[test]
fn conditions_ask_modules_for_the_variables_that_they_give() {
    let dir = Dir::new();
    dir.write("plugins/giver.lua", GIVER);
    let gw = Gateway::in_dir(dir);
    let up = Upstream::echo();
    let filter = |op: &str| json!({"key-auth": {"_meta": {"filter": [["given_seven", op, "7"], ["given_none", "!", "==", "1"]]}}});
    gw.route("is", "/is", &up, filter("=="));
    gw.route("not", "/not", &up, filter("~="));
    assert_eq!((gw.get("/is").status, gw.get("/not").status), (401, 200));
    conditional(&gw, "vars", &up, json!([["given_arg", "==", "x"]]));
    assert_eq!((gw.get("/?a=x").status, gw.get("/?a=y").status, gw.get("/").status), (200, 404, 404));
    conditional(&gw, "vars", &up, json!([["given_broken", "==", "x"]]));
    assert_eq!(gw.get("/").status, 404);
    gw.expect_log("failed to get the variable given_broken: ");
    gw.expect_log("giver.lua:5: no such luck");
}

const GIVER: &str = "local core = require('apisix.core')
core.ctx.register_var('given_seven', function() return 7 end)
core.ctx.register_var('given_none', function() end)
core.ctx.register_var('given_arg', function(ctx) return ctx and ngx.var.arg_a end)
core.ctx.register_var('given_broken', function() error('no such luck') end)
return {version = 0.1, priority = 1, name = 'giver', schema = {type = 'object'}, check_schema = function() return true end}
";

#[test]
fn an_encoded_slash_stays_in_a_parameter_where_that_is_asked_for() {
    let router = json!({"http": "radixtree_uri_with_parameter"});
    let gw = Gateway::with(json!({"apisix": {"match_uri_encoded_slash": true, "router": router}}));
    let up = Upstream::echo();
    gw.route("1", "/a/:id/b", &up, json!({}));
    for (path, status) in [("/a/x%2fy/b", 200), ("/a/%41/b", 200), ("/a/x/y/b", 404), ("/a/..%2Fx/b", 404)] {
        assert_eq!(gw.get(path).status, status, "{path}");
    }
    assert_eq!(gw.get("/a/x%2Fy/../z/b").status, 404, "what climbs is seen as nginx sees it");
    gw.get("/a/x%2fy/b?q=%2F");
    assert_eq!(up.last().target, "/a/x%2fy/b?q=%2F", "it goes on as it came");
}
