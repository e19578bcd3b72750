//! Walks 3 and 4: plugins on routes, consumers, one's own Lua.

use serde_json::{Value, json};

use crate::support::{Client, Dir, Gateway, Upstream, eventually, get, http::raw, http2};

#[test]
fn key_auth_and_limit_count_answer_401_then_200_then_503() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    gw.route(
        "1",
        "/get",
        &up,
        json!({"key-auth": {}, "limit-count": {"count": 2, "time_window": 60, "rejected_code": 503, "key": "remote_addr"}}),
    );
    gw.put("/consumers", json!({"username": "jack"}));
    gw.put("/consumers/jack/credentials/c1", json!({"plugins": {"key-auth": {"key": "secret"}}}));
    let refused = gw.get("/get");
    assert_eq!((refused.status, refused.json()), (401, json!({"message": "Missing API key in request"})));
    assert_eq!(refused.header("www-authenticate"), Some("apikey realm=\"key\""));
    let wrong = gw.send("GET", "/get", &[("apikey", "wrong")], b"");
    assert_eq!((wrong.status, wrong.json()), (401, json!({"message": "Invalid API key in request"})));
    let first = gw.send("GET", "/get", &[("apikey", "secret")], b"");
    assert_eq!(first.status, 200, "{}", first.text());
    assert_eq!(first.header("x-ratelimit-limit"), Some("2"));
    assert_eq!(first.header("x-ratelimit-remaining"), Some("1"));
    assert_eq!(up.last().header("x-consumer-username"), Some("jack"));
    assert_eq!(up.last().header("x-credential-identifier"), Some("c1"));
    assert_eq!(gw.send("GET", "/get", &[("apikey", "secret")], b"").status, 200);
    assert_eq!(gw.send("GET", "/get", &[("apikey", "secret")], b"").status, 503);
    assert_eq!(up.seen().len(), 2, "refused requests do not reach the upstream");
}

#[test]
fn a_limit_holds_across_workers() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    gw.route("1", "/get", &up, json!({"limit-count": {"count": 20, "time_window": 60, "key": "remote_addr"}}));
    let served = (0..40).filter(|_| gw.get("/get").status == 200).count();
    assert_eq!(served, 20);
}

#[test]
fn serverless_functions_run_in_every_phase_they_allow() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    let phases = ["rewrite", "access", "before_proxy"];
    for (id, phase) in phases.iter().enumerate() {
        let source = format!("return function(conf, ctx) ngx.req.set_header('X-Phase', '{phase}') end");
        gw.route(
            &id.to_string(),
            &format!("/{phase}"),
            &up,
            json!({"serverless-pre-function": {"phase": phase, "functions": [source]}}),
        );
        assert_eq!(gw.get(&format!("/{phase}")).status, 200);
        assert_eq!(up.last().header("x-phase"), Some(*phase));
    }
    gw.route(
        "8",
        "/h",
        &up,
        json!({"serverless-post-function": {"phase": "header_filter",
        "functions": ["return function() ngx.header['X-Moon'] = 'full' end"]}}),
    );
    assert_eq!(gw.get("/h").header("x-moon"), Some("full"));
    gw.route(
        "9",
        "/b",
        &up,
        json!({"serverless-post-function": {"phase": "body_filter",
        "functions": ["return function() ngx.arg[1] = ngx.arg[1]:upper() end"]},
        "response-rewrite": {"headers": {"remove": ["Content-Length"]}}}),
    );
    assert!(gw.get("/b").text().contains("\"METHOD\""), "{}", gw.get("/b").text());
    gw.route(
        "10",
        "/l",
        &up,
        json!({"serverless-post-function": {"phase": "log",
        "functions": ["return function() ngx.log(ngx.WARN, 'logged in phase ', ngx.get_phase()) end"]}}),
    );
    gw.get("/l");
    gw.expect_log("logged in phase log");
}

#[test]
fn a_function_that_does_not_compile_is_refused() {
    let gw = Gateway::start();
    let reply = gw.admin(
        "PUT",
        "/routes/1",
        json!({"uri": "/x", "upstream": {"nodes": {"127.0.0.1:80": 1}},
        "plugins": {"serverless-pre-function": {"functions": ["return function("]}}}),
    );
    assert_eq!(reply.status, 400);
    assert!(
        reply.text().contains("failed to check the configuration of plugin serverless-pre-function"),
        "{}",
        reply.text()
    );
}

#[test]
fn a_plugin_error_answers_500_and_logs_file_and_line() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    gw.route(
        "1",
        "/x",
        &up,
        json!({"serverless-pre-function": {"functions": ["return function() error('boom') end"]}}),
    );
    assert_eq!(gw.get("/x").status, 500);
    gw.expect_log("boom");
    let log = gw.log();
    let line = log.lines().find(|line| line.contains("boom")).unwrap_or_else(|| panic!("no boom in {log}"));
    // `2026/11/25 10:00:00 [error] 7#9: *1 [lua] …`
    let (head, message) = line.split_once(": ").expect("a message");
    let head: Vec<_> = head.split(' ').collect();
    assert!(head.len() == 4 && head[2] == "[error]" && head[3].starts_with(&format!("{}#", gw.pid())), "{line}");
    assert!(message.starts_with('*') && message.contains(" [lua] failed to run access_by_lua*: "), "{line}");
    assert!(message.contains("serverless-pre-function(function 1):1: boom"), "{line}");
    let about = format!(", client: 127.0.0.1, server: _, request: \"GET /x HTTP/1.1\", host: \"{}\"", gw.proxy());
    assert!(log.contains(&about), "{about} in {log}");
    assert!(up.seen().is_empty());
}

#[test]
fn rewrites_of_request_and_response() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    gw.route(
        "1",
        "/old/*",
        &up,
        json!({
            "proxy-rewrite": {"regex_uri": ["^/old/(.*)", "/new/$1"], "host": "moon.test",
                "headers": {"set": {"X-Set": "v-$remote_addr"}, "remove": ["X-Gone"]}},
            "response-rewrite": {"headers": {"set": {"X-Res": "1"}, "add": ["X-Add: 2"]}, "status_code": 201},
        }),
    );
    let reply = gw.send("GET", "/old/a?q=1", &[("X-Gone", "1")], b"");
    assert_eq!(reply.status, 201);
    assert_eq!((reply.header("x-res"), reply.header("x-add")), (Some("1"), Some("2")));
    let seen = up.last();
    assert_eq!(seen.target, "/new/a?q=1");
    assert_eq!((seen.header("host"), seen.header("x-set")), (Some("moon.test"), Some("v-127.0.0.1")));
    assert_eq!(seen.header("x-gone"), None);
    gw.route("2", "/body", &up, json!({"response-rewrite": {"body": "new body"}}));
    assert_eq!(gw.get("/body").text(), "new body");
}

#[test]
fn plugins_of_the_first_release_do_what_they_say() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    gw.route("1", "/redirect", &up, json!({"redirect": {"uri": "/to", "ret_code": 301}}));
    let redirect = gw.get("/redirect");
    assert_eq!((redirect.status, redirect.header("location")), (301, Some("/to")));
    gw.route("2", "/cors", &up, json!({"cors": {"allow_origins": "https://moon.test"}}));
    let cors = gw.send("GET", "/cors", &[("Origin", "https://moon.test")], b"");
    assert_eq!(cors.header("access-control-allow-origin"), Some("https://moon.test"));
    assert_eq!(
        gw.send("GET", "/cors", &[("Origin", "https://sun.test")], b"").header("access-control-allow-origin"),
        None
    );
    gw.route("3", "/ip", &up, json!({"ip-restriction": {"blacklist": ["127.0.0.0/24"]}}));
    assert_eq!(gw.get("/ip").status, 403);
    gw.route("4", "/ua", &up, json!({"ua-restriction": {"denylist": ["bad-bot"]}}));
    assert_eq!(gw.send("GET", "/ua", &[("User-Agent", "bad-bot/1")], b"").status, 403);
    assert_eq!(gw.send("GET", "/ua", &[("User-Agent", "good")], b"").status, 200);
    gw.route("5", "/id", &up, json!({"request-id": {}}));
    let id = gw.get("/id");
    assert_eq!(id.header("x-request-id"), up.last().header("x-request-id"));
    assert!(id.header("x-request-id").is_some());
    gw.route("6", "/fault", &up, json!({"fault-injection": {"abort": {"http_status": 418, "body": "teapot"}}}));
    let fault = gw.get("/fault");
    assert_eq!((fault.status, fault.text().as_str()), (418, "teapot"));
    gw.route("7", "/mock", &up, json!({"mocking": {"response_example": "{\"a\":1}", "response_status": 202}}));
    let mock = gw.get("/mock");
    assert_eq!((mock.status, mock.text().as_str()), (202, "{\"a\":1}"));
    gw.route("8", "/echo", &up, json!({"echo": {"before_body": "<", "after_body": ">"}}));
    let echo = gw.get("/echo").text();
    assert!(echo.starts_with("<{") && echo.ends_with("}>"), "{echo}");
    gw.route(
        "9",
        "/req",
        &up,
        json!({"limit-req": {"rate": 1, "burst": 0, "key": "remote_addr", "rejected_code": 429}}),
    );
    let answers: Vec<u16> = (0..3).map(|_| gw.get("/req").status).collect();
    assert_eq!(answers[0], 200);
    assert!(answers.contains(&429), "{answers:?}");
}

#[test]
fn basic_auth_and_jwt_auth_know_their_consumers() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    gw.put(
        "/consumers",
        json!({"username": "jack", "plugins": {
        "basic-auth": {"username": "jack", "password": "123"},
        "jwt-auth": {"key": "jack-key", "secret": "my-secret-key"}}}),
    );
    gw.route("1", "/basic", &up, json!({"basic-auth": {}}));
    gw.route("2", "/jwt", &up, json!({"jwt-auth": {}}));
    assert_eq!(gw.get("/basic").status, 401);
    assert_eq!(gw.send("GET", "/basic", &[("Authorization", "Basic amFjazoxMjM=")], b"").status, 200);
    assert_eq!(gw.send("GET", "/basic", &[("Authorization", "Basic amFjazoxMjQ=")], b"").status, 401);
    // {"alg":"HS256","typ":"JWT"} . {"key":"jack-key","exp":9999999999}, signed with my-secret-key
    let token = jwt("my-secret-key");
    assert_eq!(gw.get("/jwt").status, 401);
    let good = gw.send("GET", "/jwt", &[("Authorization", &token)], b"");
    assert_eq!(good.status, 200, "{}", good.text());
    let forged = gw.send("GET", "/jwt", &[("Authorization", &jwt("other"))], b"");
    assert_eq!((forged.status, forged.json()), (401, json!({"message": "failed to verify jwt"})));
}

fn jwt(secret: &str) -> String {
    use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD as B64};
    let head = B64.encode(r#"{"alg":"HS256","typ":"JWT"}"#);
    let payload = B64.encode(r#"{"key":"jack-key","exp":9999999999}"#);
    let signed = format!("{head}.{payload}");
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, secret.as_bytes());
    format!("{signed}.{}", B64.encode(ring::hmac::sign(&key, signed.as_bytes())))
}

#[test]
fn traffic_split_and_public_api() {
    let (a, b) = (Upstream::echo(), Upstream::echo());
    let gw = Gateway::start();
    gw.route(
        "1",
        "/split",
        &a,
        json!({"traffic-split": {"rules": [{
        "match": [{"vars": [["http_x_canary", "==", "1"]]}],
        "weighted_upstreams": [{"upstream": {"type": "roundrobin", "nodes": {b.addr(): 1}}, "weight": 1}]}]}}),
    );
    gw.get("/split");
    gw.send("GET", "/split", &[("X-Canary", "1")], b"");
    assert_eq!((a.seen().len(), b.seen().len()), (1, 1));
    gw.put("/routes/2", json!({"uri": "/apisix/prometheus/metrics", "plugins": {"public-api": {}}}));
    let metrics = gw.get("/apisix/prometheus/metrics");
    assert!(metrics.text().contains("apisix_http_requests_total"), "{}", metrics.text());
}

#[test]
fn prometheus_counts_by_route_and_code() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    gw.route("1", "/counted", &up, json!({"prometheus": {}}));
    for _ in 0..3 {
        gw.get("/counted");
    }
    // The log phase counts, and it follows the answer.
    let line = eventually("three requests are counted", || {
        let text = get(&gw.prometheus(), "/apisix/prometheus/metrics").text();
        let line = text.lines().find(|l| l.starts_with("apisix_http_status{") && l.contains("code=\"200\""))?;
        line.ends_with(" 3").then(|| line.to_owned())
    });
    assert!(line.contains("route=\"1\"") && line.contains("matched_uri=\"/counted\""), "{line}");
}

#[test]
fn loggers_write_one_entry_per_request() {
    let up = Upstream::echo();
    let collector = Upstream::answering(|_| "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    let gw = Gateway::start();
    let file = gw.dir.join("logs/requests.log");
    gw.route(
        "1",
        "/logged",
        &up,
        json!({
            "file-logger": {"path": file.to_string_lossy()},
            "http-logger": {"uri": format!("http://{}/log", collector.addr()), "batch_max_size": 1},
        }),
    );
    gw.get("/logged");
    let text = crate::support::eventually("the file has an entry", || {
        Some(std::fs::read_to_string(&file).ok()?).filter(|t| t.ends_with('\n'))
    });
    let entry: serde_json::Value = serde_json::from_str(text.trim()).expect("one JSON line");
    assert_eq!(entry["request"]["uri"], "/logged");
    assert_eq!((&entry["response"]["status"], &entry["route_id"]), (&json!(200), &json!("1")));
    let seen = crate::support::eventually("the collector has it", || collector.seen().pop());
    let entry: serde_json::Value = serde_json::from_slice(&seen.body).expect("JSON");
    assert_eq!(entry["request"]["uri"], "/logged");
}

#[test]
fn meta_disables_filters_and_reorders() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    gw.route("1", "/off", &up, json!({"fault-injection": {"_meta": {"disable": true}, "abort": {"http_status": 418}}}));
    assert_eq!(gw.get("/off").status, 200);
    gw.route(
        "2",
        "/some",
        &up,
        json!({"fault-injection": {"_meta": {"filter": [["arg_x", "==", "1"]]}, "abort": {"http_status": 418}}}),
    );
    assert_eq!((gw.get("/some").status, gw.get("/some?x=1").status), (200, 418));
    gw.route("3", "/err", &up, json!({"key-auth": {"_meta": {"error_response": {"message": "no entry"}}}}));
    let refused = gw.get("/err");
    assert_eq!((refused.status, refused.json()), (401, json!({"message": "no entry"})));
}

#[test]
fn plugins_come_from_route_service_plugin_config_consumer_and_global_rules() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    let set = |name: &str| json!({"proxy-rewrite": {"headers": {"set": {"X-From": name}}}});
    gw.put("/services/s", json!({"upstream": {"nodes": {up.addr(): 1}}, "plugins": set("service")}));
    gw.put("/routes/1", json!({"uri": "/service", "service_id": "s"}));
    gw.put("/routes/2", json!({"uri": "/route", "service_id": "s", "plugins": set("route")}));
    gw.put("/plugin_configs/p", json!({"plugins": set("plugin_config")}));
    gw.put("/routes/3", json!({"uri": "/config", "service_id": "s", "plugin_config_id": "p"}));
    for (path, from) in [("/service", "service"), ("/route", "route"), ("/config", "plugin_config")] {
        gw.get(path);
        assert_eq!(up.last().header("x-from"), Some(from), "{path}");
    }
    gw.put("/global_rules/1", json!({"plugins": {"response-rewrite": {"headers": {"set": {"X-Global": "1"}}}}}));
    assert_eq!(gw.get("/route").header("x-global"), Some("1"));
    assert_eq!(gw.get("/nowhere").header("x-global"), Some("1"), "global rules run for requests that match no route");
    gw.put("/consumer_groups/g", json!({"plugins": {"response-rewrite": {"headers": {"set": {"X-Group": "1"}}}}}));
    gw.put("/consumers", json!({"username": "jack", "group_id": "g", "plugins": {"key-auth": {"key": "k"}}}));
    gw.put("/routes/4", json!({"uri": "/auth", "service_id": "s", "plugins": {"key-auth": {}}}));
    let reply = gw.send("GET", "/auth", &[("apikey", "k")], b"");
    assert_eq!((reply.status, reply.header("x-group")), (200, Some("1")), "{}", reply.text());
}

#[test]
fn a_key_behind_a_reference_is_asked_for_and_the_reference_is_none() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    gw.route("1", "/get", &up, json!({"key-auth": {}}));
    gw.put("/consumers", json!({"username": "set", "plugins": {"key-auth": {"key": "$env://PATH"}}}));
    gw.put("/consumers", json!({"username": "unset", "plugins": {"key-auth": {"key": "$env://NOT_SET_ANYWHERE"}}}));
    let path = std::env::var("PATH").unwrap();
    assert_eq!(gw.send("GET", "/get", &[("apikey", &path)], b"").status, 200);
    assert_eq!(up.last().header("x-consumer-username"), Some("set"));
    for reference in ["$env://PATH", "$ENV://PATH", "$env://NOT_SET_ANYWHERE"] {
        assert_eq!(gw.send("GET", "/get", &[("apikey", reference)], b"").status, 401, "{reference}");
    }
    gw.expect_log("invalid api key");
}

#[test]
fn an_expired_token_is_refused_even_where_no_claim_is_named() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    gw.route("1", "/get", &up, json!({"jwt-auth": {"claims_to_verify": []}}));
    let conf = json!({"key": "moon", "secret": "a-long-enough-shared-secret"});
    gw.put("/consumers", json!({"username": "jack", "plugins": {"jwt-auth": conf}}));
    let expired = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJrZXkiOiJtb29uIiwiZXhwIjoxMDAwMDAwMDAwfQ.8NvTtORBCW6UxXhdrMP5WMg1vCHaEcXx2_aVKUcLa20";
    let reply = gw.send("GET", "/get", &[("Authorization", expired)], b"");
    assert_eq!((reply.status, reply.json()), (401, json!({"message": "failed to verify jwt"})));
    gw.expect_log("failed to verify jwt: 'exp' claim expired at Sun, 09 Sep 2001 01:46:40 GMT");
}

#[test]
fn basic_auth_logs_why_it_refuses() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    gw.route("1", "/get", &up, json!({"basic-auth": {}}));
    assert_eq!(gw.send("GET", "/get", &[("Authorization", "Digest Zm9v")], b"").status, 401);
    gw.expect_log("Invalid authorization header format");
    assert_eq!(gw.send("GET", "/get", &[("Authorization", "Basic bW9vbg==")], b"").status, 401);
    gw.expect_log("Split authorization err: invalid decoded data: moon");
}

#[test]
fn proxy_rewrite_sends_no_empty_field_and_refuses_what_is_none() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    let set = json!({"X-Old": "", "X-None": "$there_is_no_such_variable", "X-Kept": "v"});
    gw.route("1", "/get", &up, json!({"proxy-rewrite": {"headers": {"set": set}}}));
    assert_eq!(gw.send("GET", "/get", &[("X-Old", "1"), ("X-None", "1")], b"").status, 200);
    let seen = up.last();
    assert_eq!((seen.header("x-old"), seen.header("x-none"), seen.header("x-kept")), (None, None, Some("v")));
    for (field, value, text) in [("X:Y", "v", "invalid field character"), ("X-Y", "v\r\n", "invalid value character")] {
        let route = json!({"uri": "/x", "upstream": {"nodes": {"127.0.0.1:1": 1}},
            "plugins": {"proxy-rewrite": {"headers": {field: value}}}});
        let reply = gw.admin("PUT", "/routes/2", route);
        assert_eq!(reply.status, 400);
        assert!(reply.text().contains(text), "{}", reply.text());
    }
}

#[test]
fn plugins_say_why_they_refuse_a_conf() {
    let gw = Gateway::start();
    for (plugin, conf, text) in [
        ("mocking", json!({"response_schema": {"type": "nothing"}}), "unsupported type: nothing"),
        ("response-rewrite", json!({"filters": [{"regex": "(", "replace": "x"}]}), "regex \\\"(\\\" validation failed"),
    ] {
        let reply = gw.admin("PUT", "/routes/1", json!({"uri": "/x", "plugins": {plugin: conf}}));
        assert_eq!(reply.status, 400);
        assert!(reply.text().contains(text), "{}", reply.text());
    }
}

/// Requests whose plugins are not done, log phase included.
fn requests_in_vms(gw: &Gateway) -> u64 {
    let told = get(&gw.control(), "/v1/lua").json();
    let workers = told["workers"].as_array().cloned().unwrap_or_default();
    let vms = workers.iter().flat_map(|worker| worker["vms"].as_array().cloned().unwrap_or_default());
    vms.map(|vm| vm["requests"].as_u64().unwrap_or(1)).sum()
}

#[test]
fn limit_conn_refuses_what_is_one_too_many_and_counts_down_again() {
    let (release, hold) = std::sync::mpsc::channel::<()>();
    let hold = std::sync::Mutex::new(hold);
    let up = Upstream::answering(move |_| {
        hold.lock().expect("one at a time").recv().expect("released");
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    });
    let gw = Gateway::start();
    let conf = json!({"conn": 1, "burst": 0, "default_conn_delay": 0.1, "key_type": "var", "key": "http_x_who",
        "rejected_code": 429, "rejected_msg": "too many at once"});
    gw.route("1", "/slow", &up, json!({"limit-conn": conf}));
    let ask = |who: &str| gw.send("GET", "/slow", &[("X-Who", who)], b"");
    for round in 1..=3 {
        let mut first = Client::connect(&gw.proxy());
        first.send("GET", "/slow", &[("X-Who", "a")], b"");
        eventually("the first is under way", || (up.seen().len() == 2 * round - 1).then_some(()));
        let refused = ask("a");
        assert_eq!((refused.status, refused.json()), (429, json!({"error_msg": "too many at once"})));
        let mut other = Client::connect(&gw.proxy());
        other.send("GET", "/slow", &[("X-Who", "b")], b"");
        eventually("another key is let in", || (up.seen().len() == 2 * round).then_some(()));
        release.send(()).expect("the upstream waits");
        release.send(()).expect("the upstream waits");
        assert_eq!((first.reply("GET").status, other.reply("GET").status), (200, 200));
        // The log phase counts down: it comes when the answer is sent.
        eventually("both have ended", || (requests_in_vms(&gw) == 0).then_some(()));
    }
    let bad = gw.admin(
        "PUT",
        "/routes/2",
        json!({"uri": "/x", "plugins": {"limit-conn": {"conn": 0, "burst": 0,
        "default_conn_delay": 0.1, "key": "remote_addr"}}}),
    );
    assert_eq!(bad.status, 400, "{}", bad.text());
}

#[test]
fn proxy_rewrite_shows_the_new_path_to_what_runs_after_it() {
    let (gw, up) = (Gateway::start(), Upstream::echo());
    let seen = "return function(conf, ctx) ngx.header['X-Seen'] = ngx.var.uri .. ' ' .. ctx.var.uri end";
    let plugins = json!({
        "proxy-rewrite": {"regex_uri": ["^/old/(.*)", "/new/a+b/$1"]},
        "serverless-post-function": {"phase": "access", "functions": [seen]},
    });
    gw.route("1", "/old/*", &up, plugins);
    let reply = gw.get("/old/x%20y?q=1");
    assert_eq!(reply.header("x-seen"), Some("/new/a+b/x y /new/a+b/x y"));
    assert_eq!(up.last().target, "/new/a+b/x%20y?q=1");
    // What a client writes is no reason to fail.
    assert_eq!(gw.get("/old/a%0Ab").status, 200);
    assert_eq!(up.last().target, "/new/a+b/a%0Ab");
    gw.route("2", "/bare/*", &up, json!({"proxy-rewrite": {"regex_uri": ["^/bare/(.*)", "$1"]}}));
    assert_ne!(gw.get("/bare/").status, 500);
}

#[test]
fn limit_count_counts_each_rule_by_itself_and_wants_one_to_match() {
    let (gw, up) = (Gateway::start(), Upstream::echo());
    let rules = json!([
        {"count": 1, "time_window": 60, "key": "${http_user}"},
        {"count": 5, "time_window": 60, "key": "${http_project}"},
    ]);
    gw.route("1", "/c", &up, json!({"limit-count": {"rules": rules}}));
    let status = |name: &str| gw.send("GET", "/c", &[(name, "v")], b"").status;
    assert_eq!((status("project"), status("user"), status("user"), status("project")), (200, 200, 503, 200));
    assert_eq!(gw.get("/c").status, 500);
    gw.expect_log("failed to get rate limit rules");
}

#[test]
fn limit_count_goes_on_counting_when_another_part_of_the_route_changes() {
    let (gw, up) = (Gateway::start(), Upstream::echo());
    let route = |label: &str, count: u64| {
        json!({"uri": "/c", "labels": {"l": label}, "plugins": {"limit-count": {"count": count, "time_window": 60}},
            "upstream": {"type": "roundrobin", "nodes": {up.addr(): 1}}})
    };
    gw.put("/routes/1", route("a", 1));
    assert_eq!((gw.get("/c").status, gw.get("/c").status), (200, 503));
    gw.put("/routes/1", route("b", 1));
    assert_eq!(gw.get("/c").status, 503);
    gw.put("/routes/1", route("b", 2));
    assert_eq!(gw.get("/c").status, 200, "another limit begins anew");
}

#[test]
fn cors_by_metadata_allows_nobody_else() {
    let (gw, up) = (Gateway::start(), Upstream::echo());
    gw.put("/plugin_metadata/cors", json!({"allow_origins": {"mine": "http://a.test"}}));
    gw.route("1", "/c", &up, json!({"cors": {"allow_origins_by_metadata": ["mine"]}}));
    let allowed = |origin: &str| {
        let reply = gw.send("GET", "/c", &[("Origin", origin)], b"");
        reply.header("access-control-allow-origin").map(str::to_owned)
    };
    assert_eq!(allowed("http://a.test").as_deref(), Some("http://a.test"));
    assert_eq!(allowed("http://b.test"), None);
}

#[test]
fn the_address_of_the_client_comes_from_whom_the_directives_name() {
    let up = Upstream::echo();
    let options = |from: &str| {
        Gateway::with(json!({"lua_options": {"set_real_ip_from": [[from]], "real_ip_header": "X-Forwarded-For"}}))
    };
    let status = |gw: &Gateway| {
        gw.route("1", "/i", &up, json!({"ip-restriction": {"whitelist": ["192.0.2.0/24"]}}));
        gw.send("GET", "/i", &[("X-Forwarded-For", "192.0.2.7")], b"").status
    };
    assert_eq!((status(&options("127.0.0.1")), status(&options("10.0.0.0/8"))), (200, 403));
}

#[test]
fn a_refusal_without_a_text_is_a_page() {
    let (gw, up) = (Gateway::start(), Upstream::echo());
    let limit = |msg: Option<&str>| {
        let mut conf = json!({"count": 1, "time_window": 60, "rejected_code": 503});
        if let Some(msg) = msg {
            conf["rejected_msg"] = json!(msg);
        }
        json!({"limit-count": conf})
    };
    gw.route("1", "/page", &up, limit(None));
    gw.route("2", "/text", &up, limit(Some("too many")));
    let refused = |path: &str| {
        assert_eq!(gw.get(path).status, 200);
        gw.get(path)
    };
    let page = refused("/page");
    assert_eq!((page.status, page.header("content-type")), (503, Some("text/html; charset=utf-8")));
    assert!(page.text().contains("<h1>503 Service Temporarily Unavailable</h1>"), "{}", page.text());
    let text = refused("/text");
    assert_eq!((text.status, text.json()), (503, json!({"error_msg": "too many"})));
}

#[test]
fn a_group_of_limit_count_is_bound_by_what_is_stored_not_by_what_is_asked() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    let limit = |count: u32, code: u32| json!({"count": count, "time_window": 60, "rejected_code": code, "group": "g"});
    let route = |conf: serde_json::Value| json!({"uri": "/x", "plugins": {"limit-count": conf}, "upstream": {"nodes": {up.addr(): 1}}});
    assert_eq!(gw.admin("POST", "/schema/validate/routes", route(limit(7, 503))).status, 200);
    let mut broken = route(limit(8, 503));
    broken["plugins"]["no-such-plugin"] = json!({});
    assert_eq!(gw.admin("PUT", "/routes/1", broken).status, 400);
    assert_eq!(gw.admin("PUT", "/routes/1?dry_run=true", route(limit(9, 503))).status, 201);
    gw.put("/routes/1", route(limit(2, 503)));
    let refused = gw.admin("PUT", "/routes/2", route(limit(3, 429)));
    assert_eq!(refused.status, 400);
    assert!(refused.text().contains("group conf mismatched"), "{}", refused.text());
    gw.expect_log("limit-count group g is in use with another conf: count, rejected_code");
    gw.put("/routes/2", route(limit(2, 503)));
}

#[test]
fn a_plugin_that_raises_is_logged_once_and_answers_with_its_error_response() {
    let up = Upstream::echo();
    let gw = Gateway::with(json!({"nginx_config": {"worker_processes": 1}}));
    let raising = r#"
local _M = { version = 0.1, priority = 10, name = "raising", schema = { type = "object" } }
for _, phase in ipairs({ "rewrite", "access", "before_proxy", "header_filter", "body_filter" }) do
    _M[phase] = function(conf)
        if conf.at == phase then error("raised for " .. conf.mark, 0) end
    end
end
return _M
"#;
    assert_eq!(gw.admin_text("PUT", "/plugin_sources/raising", raising, "text/plain").status, 201);
    let ask = |phase: &str, mark: &str, meta: serde_json::Value| {
        gw.route(mark, &format!("/{mark}"), &up, json!({"raising": {"at": phase, "mark": mark, "_meta": meta}}));
        let reply = gw.get(&format!("/{mark}"));
        let raised = format!("raised for {mark}");
        gw.expect_log(&raised);
        // What comes after it in the log: the request is over.
        gw.route("end", "/end", &up, json!({"raising": {"at": "access", "mark": format!("end of {mark}.")}}));
        gw.get("/end");
        gw.expect_log(&format!("raised for end of {mark}."));
        assert_eq!(gw.log().matches(&format!("{raised}\n")).count(), 1, "{phase}: {}", gw.log());
        (reply.status, reply.text())
    };
    for phase in ["rewrite", "access", "before_proxy"] {
        let meta = json!({"error_response": {"why": "we know"}});
        assert_eq!(ask(phase, &format!("m{phase}"), meta), (500, "{\"why\":\"we know\"}\n".into()), "{phase}");
        assert_eq!(ask(phase, &format!("t{phase}"), json!({"error_response": "text"})), (500, "text".into()));
        let (status, text) = ask(phase, &format!("n{phase}"), json!({}));
        assert!(status == 500 && text.contains("500 Internal Server Error"), "{phase}: {status} {text}");
    }
    let (status, text) = ask("header_filter", "hf", json!({"error_response": "text"}));
    assert!(status == 500 && text.contains("500 Internal Server Error"), "{status} {text}");
    // The head is out: what can be done is to cut the response off.
    gw.route("bf", "/bf", &up, json!({"raising": {"at": "body_filter", "mark": "bf"}}));
    let cut = raw(&gw.proxy(), b"GET /bf HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
    assert!(!cut.contains("500 Internal"), "{cut}");
    gw.route("end", "/end", &up, json!({"raising": {"at": "access", "mark": "the end."}}));
    gw.get("/end");
    gw.expect_log("raised for the end.");
    assert_eq!(gw.log().matches("raised for bf\n").count(), 1, "{}", gw.log());
}

/// A gateway with a hook module of that text.
fn hooked(text: &str, mut config: Value) -> Gateway {
    let dir = crate::support::Dir::new();
    std::fs::create_dir_all(dir.join("extra")).expect("a directory");
    dir.write("extra/my_hook.lua", text);
    config["apisix"]["extra_lua_path"] = format!("{}/?.lua", dir.join("extra").display()).into();
    config["apisix"]["lua_module_hook"] = "my_hook".into();
    dir.configure(config);
    Gateway::in_dir(dir)
}

#[test]
fn requests_come_by_what_a_hook_has_put_in_place_of_the_phases() {
    let text = r#"
local apisix = require("apisix")
for _, phase in ipairs({ "access", "header_filter", "body_filter", "log" }) do
    local name = "http_" .. phase .. "_phase"
    local old = apisix[name]
    apisix[name] = function(...)
        local ctx = ngx.ctx.api_ctx
        ctx.order = (ctx.order or "") .. " <" .. phase
        old(...)
        ctx.order = ctx.order .. " " .. phase .. ">"
        if phase == "header_filter" then ngx.header["X-Order"] = ctx.order end
        if phase == "log" then ngx.log(ngx.WARN, "order of ", ngx.var.uri, ":", ctx.order, " ", ngx.status) end
    end
end
"#;
    let gw = hooked(text, json!({"nginx_config": {"worker_processes": 1}}));
    let up = Upstream::echo();
    let plugin = |phases: &str| {
        format!(
            "local _M = {{ version = 1, priority = 1, name = 'mine', schema = {{ type = 'object' }} }}\n\
             for phase in ('{phases}'):gmatch('%S+') do\n\
             _M[phase] = function(conf, ctx) ctx.order = ctx.order .. ' ' .. phase return conf[phase] end end\n\
             return _M"
        )
    };
    let source = json!({"source": plugin("rewrite access header_filter body_filter log")});
    assert_eq!(gw.admin("PUT", "/plugin_sources/mine", source).status, 201);
    gw.route("plugin", "/plugin", &up, json!({"mine": {}}));
    gw.route("refusing", "/refusing", &up, json!({"mine": {"rewrite": 403}}));
    gw.route("plain", "/plain", &up, json!({}));
    let reply = gw.get("/plugin");
    let order = "<access rewrite access access> <header_filter header_filter header_filter>";
    assert_eq!((reply.status, reply.header("x-order").map(str::trim)), (200, Some(order)));
    // A body comes in one piece or with an empty one at its end.
    gw.expect_log("<body_filter body_filter body_filter> <log log log> 200");
    let reply = gw.get("/refusing");
    let order = "<access rewrite access> <header_filter header_filter header_filter>";
    assert_eq!((reply.status, reply.header("x-order").map(str::trim)), (403, Some(order)));
    // No plugin, and no route.
    for (path, status) in [("/plain", 200), ("/nowhere", 404)] {
        let reply = gw.get(path);
        let order = "<access access> <header_filter header_filter>";
        assert_eq!((reply.status, reply.header("x-order").map(str::trim)), (status, Some(order)), "{path}");
        gw.expect_log(&format!("order of {path}: {order}"));
        gw.expect_log(&format!("<log log> {status}"));
    }
    assert!(!gw.log().contains("no effect"), "{}", gw.log());
}

#[test]
fn a_plugin_may_put_something_in_the_place_of_a_phase_too() {
    let plugin = "local apisix = require('apisix')\n\
                  local _M = { version = 1, priority = 1, name = 'mine', schema = { type = 'object' } }\n\
                  function _M.init()\n\
                  local old = apisix.http_header_filter_phase\n\
                  apisix.http_header_filter_phase = function(...) ngx.header['X-Seen'] = 'yes' return old(...) end\n\
                  end\n\
                  return _M";
    let dir = crate::support::Dir::new();
    dir.write("plugins/mine.lua", plugin);
    dir.configure(json!({
        "plugins": ["mine"],
        "lua_locations": [{"location": "= /location", "content_by_lua": "ngx.say('of a location')"}],
    }));
    let gw = Gateway::in_dir(dir);
    let up = Upstream::echo();
    gw.route("1", "/x", &up, json!({}));
    let reply = gw.get("/x");
    assert_eq!((reply.status, reply.header("x-seen")), (200, Some("yes")));
    // Where there are locations, they have what no route takes, as if there were no plugin.
    let reply = gw.get("/location");
    assert_eq!((reply.text().as_str(), reply.header("x-seen")), ("of a location\n", None));
    assert_eq!(gw.get("/nowhere").header("x-seen"), None);
}

#[test]
fn a_hook_that_leaves_plugins_out_or_answers_lets_nobody_in() {
    let text = r#"
local apisix = require("apisix")
local old = apisix.http_access_phase
apisix.http_access_phase = function(...)
    if ngx.var.arg_do == "skip" then return end
    if ngx.var.arg_do == "raise" then error("of the hook") end
    if ngx.var.arg_do == "exit" then ngx.exit(418) end
    if ngx.var.arg_do == "catch" then pcall(old) return end
    if ngx.var.arg_do == "wait" then ngx.sleep(0.001) end
    old(...)
    if ngx.var.arg_do == "twice" then old(...) end
end
"#;
    let gw = hooked(text, json!({}));
    let up = Upstream::echo();
    gw.route(
        "1",
        "/x",
        &up,
        json!({"key-auth": {}, "limit-count": {"count": 1, "time_window": 600, "rejected_code": 429}}),
    );
    let consumer = json!({"username": "jack", "plugins": {"key-auth": {"key": "k"}}});
    assert_eq!(gw.admin("PUT", "/consumers", consumer).status, 201);
    let raising = json!({"serverless-pre-function": {"functions": ["return function() error('of a plugin') end"]}});
    gw.route("2", "/raising", &up, raising);
    assert_eq!((gw.get("/raising").status, gw.get("/raising?do=catch").status), (500, 500));
    for (what, status) in [("", 401), ("skip", 500), ("raise", 500), ("exit", 418), ("wait", 401), ("twice", 401)] {
        assert_eq!(gw.get(&format!("/x?do={what}")).status, status, "{what}");
    }
    gw.expect_log("http_access_phase was replaced by a function that has not called the original");
    gw.expect_log("my_hook.lua:6: of the hook");
    assert!(up.seen().is_empty());
    let with_key = |path: &str| gw.send("GET", path, &[("apikey", "k")], b"").status;
    assert_eq!((with_key("/x?do=twice"), with_key("/x?do=wait")), (200, 429), "the plugins have run once");
}

#[test]
fn a_hook_may_wrap_the_start_and_the_end_of_the_gateway() {
    let text = r#"
local apisix = require("apisix")
for _, name in ipairs({ "http_init", "http_init_worker", "http_exit_worker", "stream_init", "stream_init_worker" }) do
    local old = apisix[name]
    apisix[name] = function(...)
        ngx.log(ngx.WARN, "before ", name, " in ", ngx.get_phase())
        old(...)
        ngx.log(ngx.WARN, "after ", name)
        if name == "http_init_worker" then error("after all") end
    end
end
"#;
    let plugin = "local _M = { version = 1, priority = 1, name = 'mine', schema = { type = 'object' } }\n\
                  function _M.init() ngx.log(ngx.WARN, 'plugin begins') end\n\
                  function _M.destroy() ngx.log(ngx.WARN, 'plugin ends') end\n\
                  return _M";
    let dir = crate::support::Dir::new();
    std::fs::create_dir_all(dir.join("extra")).expect("a directory");
    dir.write("extra/my_hook.lua", text);
    dir.write("plugins/mine.lua", plugin);
    let path = format!("{}/?.lua", dir.join("extra").display());
    dir.configure(json!({
        "apisix": {"extra_lua_path": path, "lua_module_hook": "my_hook", "proxy_mode": "http&stream", "stream_proxy": {"tcp": ["127.0.0.1:0"]}},
        "plugins": ["mine"],
        "nginx_config": {"worker_processes": 1},
    }));
    let mut gw = Gateway::in_dir(dir);
    assert_eq!(gw.get("/").status, 404);
    assert!(gw.quit().success());
    let log = gw.log();
    let mut rest = &log[..];
    for line in [
        "before http_init in init",
        "after http_init",
        "before stream_init in",
        "before http_init_worker in init_worker",
        "plugin begins",
        "after http_init_worker",
        "apisix.http_init_worker: ",
        "before stream_init_worker in",
        "before http_exit_worker in exit_worker",
        "plugin ends",
        "after http_exit_worker",
    ] {
        let at = rest.find(line).unwrap_or_else(|| panic!("{line} is not there, or not in its place: {log}"));
        rest = &rest[at + line.len()..];
    }
    for (line, count) in [("plugin begins", 1), ("plugin ends", 1), ("after all", 1)] {
        assert_eq!(log.matches(line).count(), count, "{line}: {log}");
    }
}

#[test]
fn a_hook_that_replaces_what_the_gateway_does_itself_is_warned_of() {
    let up = Upstream::echo();
    let dir = crate::support::Dir::new();
    std::fs::create_dir_all(dir.join("extra")).expect("a directory");
    dir.write(
        "extra/my_hook.lua",
        r#"
require("apisix.plugin").run_plugin = function() ngx.exit(501) end
require("apisix.upstream").set_by_route = function() return 502 end
require("apisix").http_balancer_phase = function() ngx.exit(503) end
local response = require("apisix.core").response
local set_header = response.set_header
function response.set_header(...) set_header("X-Hooked", "yes") return set_header(...) end
"#,
    );
    let path = format!("{}/?.lua", dir.join("extra").display());
    dir.configure(json!({"apisix": {"extra_lua_path": path, "lua_module_hook": "my_hook"}}));
    let gw = Gateway::in_dir(dir);
    gw.expect_log(
        "my_hook] replaces apisix.http_balancer_phase, apisix.plugin.run_plugin, apisix.upstream.set_by_route: no effect",
    );
    assert_eq!(gw.log().matches("my_hook] replaces").count(), 1, "{}", gw.log());
    gw.route("1", "/x", &up, json!({"response-rewrite": {"headers": {"set": {"X-Set": "1"}}}}));
    let reply = gw.get("/x");
    assert_eq!((reply.status, reply.header("x-hooked")), (200, Some("yes")));
}

/// A plugin that answers with its own name.
fn answering(name: &str) -> String {
    format!(
        "local _M = {{version = 0.1, priority = 1, name = '{name}', schema = {{type = 'object'}}}}
         function _M.access() return 200, '{name}' end
         return _M"
    )
}

fn with_own_files(settings: Value) -> Gateway {
    let dir = Dir::new();
    std::fs::create_dir_all(dir.join("own/apisix/plugins")).expect("directories");
    for name in ["listed", "left-out"] {
        dir.write(&format!("own/apisix/plugins/{name}.lua"), answering(name));
    }
    dir.write("plugins/beside.lua", answering("beside"));
    dir.configure(settings);
    Gateway::in_dir(dir)
}

#[test]
fn a_list_of_plugins_switches_off_files_of_the_lua_path_that_it_leaves_out() {
    let list = json!(["key-auth", "listed", "my-typo", "csrf", "uploaded"]);
    let gw = with_own_files(json!({"apisix": {"extra_lua_path": "$prefix/own/?.lua"}, "plugins": list}));
    let write = |name: &str| {
        gw.admin(
            "PUT",
            &format!("/routes/{name}"),
            json!({"uri": format!("/{name}"), "plugins": {name: {}}, "upstream": {"nodes": {"127.0.0.1:1": 1}}}),
        )
    };
    for name in ["listed", "beside"] {
        assert_eq!((write(name).status, gw.get(&format!("/{name}")).text()), (201, name.to_owned()));
    }
    let refused = write("left-out");
    assert!(refused.status == 400 && refused.text().contains("unknown plugin [left-out]"), "{}", refused.text());
    gw.expect_log("failed to load plugin [my-typo] err: ");
    let log = gw.log();
    let told = |text: &str| log.lines().filter(|line| line.contains(text)).collect::<Vec<_>>();
    let typo = told("my-typo");
    assert!(typo.len() == 1 && typo[0].contains("[error]"), "{typo:?}");
    let theirs = told("this build does not have csrf");
    assert!(theirs.len() == 1 && theirs[0].contains("[warn]"), "{log}");
    // One that is uploaded later is missing until then.
    assert_eq!(told("[uploaded] err").len(), 1);
    gw.admin_text("PUT", "/plugin_sources/uploaded", &answering("uploaded"), "text/x-lua");
    assert_eq!((write("uploaded").status, gw.get("/uploaded").text()), (201, "uploaded".to_owned()));
}

#[test]
fn without_a_list_files_of_the_lua_path_run_and_nothing_is_said_of_what_is_missing() {
    let gw = with_own_files(json!({"apisix": {"extra_lua_path": "${prefix}/own/?.lua;$prefix/none/?.lua"}}));
    for name in ["listed", "left-out", "beside"] {
        gw.put("/routes/1", json!({"uri": "/x", "plugins": {name: {}}, "upstream": {"nodes": {"127.0.0.1:1": 1}}}));
        assert_eq!(gw.get("/x").text(), name);
    }
    let log = gw.log();
    assert!(!log.contains("failed to load plugin") && !log.contains("this build does not have"), "{log}");
}

#[test]
fn extra_lua_cpath_is_below_the_prefix() {
    let gw = with_own_files(json!({"apisix": {"extra_lua_cpath": "$prefix/own/?.so"}}));
    let source = "return function() ngx.say(package.cpath) ngx.exit(200) end";
    gw.put("/routes/1", json!({"uri": "/x", "plugins": {"serverless-pre-function": {"phase": "access", "functions": [source]}}, "upstream": {"nodes": {"127.0.0.1:1": 1}}}));
    let path = gw.get("/x").text();
    assert!(path.starts_with(&format!("{}/own/?.so;", gw.dir.path().display())), "{path}");
}

#[test]
fn a_pattern_that_no_limit_ends_is_told_of_with_its_route() {
    let dir = Dir::new();
    dir.configure(json!({"lua": {"limits": {"cpu_ms": 100}}, "nginx_config": {"worker_processes": 1}}));
    let gw = Gateway::in_dir(dir);
    let up = Upstream::echo();
    let spin = "return function() return string.find(('a'):rep(40), ('a?'):rep(40) .. ('a'):rep(40) .. 'b') end";
    gw.route("stuck", "/stuck", &up, json!({"serverless-pre-function": {"functions": [spin]}}));
    let endless = "return function() while true do end end";
    gw.route("lua", "/lua", &up, json!({"serverless-pre-function": {"functions": [endless]}}));
    // Lua code is ended, and nothing more is to be said.
    assert_eq!(gw.get("/lua").status, 500);
    Client::connect(&gw.proxy()).send("GET", "/stuck", &[], b"");
    gw.expect_log("worker-0 has not come back from a script for ");
    let log = gw.log();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("has not come back")).collect();
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains("[error]") && lines[0].contains("(route stuck)"), "{}", lines[0]);
}

#[test]
fn what_a_client_writes_into_a_path_is_no_separator_behind_a_rewrite() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    let rewrite = |conf: Value| json!({"proxy-rewrite": conf});
    let files = json!({"regex_uri": ["^/files/(.*)", "/store/$1"]});
    let query = json!({"regex_uri": ["^/q/(.*)", "/search?q=$1&${1}$$"]});
    let unsafe_query = json!({"regex_uri": ["/hello/(.+)", "/hello?unsafe=$1"], "use_real_request_uri_unsafe": true});
    for (id, uri, conf) in [
        ("files", "/files/*", files),
        ("q", "/q/*", query),
        ("unsafe", "/hello/*", unsafe_query),
        ("safe", "/safe*", json!({"use_real_request_uri_unsafe": false})),
        ("host", "/host*", json!({"host": "test.com"})),
        ("part", "/part*", json!({"regex_uri": ["x(.)", "$1 y"]})),
    ] {
        gw.route(id, uri, &up, rewrite(conf));
    }
    for (asked, sent) in [
        ("/files/x%3Fadmin=true?user=1", "/store/x%3Fadmin=true?user=1"),
        ("/files/report%3Fv2%23a%25.pdf", "/store/report%3Fv2%23a%25.pdf"),
        ("/files/a/b%20c", "/store/a/b%20c"),
        ("/q/caf%C3%A9", "/search?q=caf%C3%A9&caf%C3%A9$"),
        ("/q/a%3Fb%23?c=d", "/search?q=a%3Fb%23&a%3Fb%23$&c=d"),
        ("/hello/%ED%85%8C%3F?a=b", "/hello?unsafe=%ED%85%8C%3F?a=b"),
        ("/safe%5Fand/..%2fsafe", "/safe"),
        ("/safe?plain=%5F", "/safe?plain=%5F"),
        ("/host%3f0z=700%26a=c%20x%0d%0a", "/host%3F0z=700&a=c%20x%0D%0A"),
        ("/host?a=b", "/host?a=b"),
        ("/part%3Fxz%3F", "/part%3Fz%20y%3F"),
        ("/part%20none", "/part%20none"),
    ] {
        assert_eq!(gw.get(asked).status, 200, "{asked}");
        assert_eq!(up.last().target, sent, "{asked}");
    }
}

#[test]
fn an_answer_has_the_form_that_the_clients_own_method_asks_for() {
    let up = Upstream::answering(|seen| {
        let body = if seen.method == "HEAD" { "" } else { "hello" };
        format!("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{body}")
    });
    let gw = Gateway::start();
    let to = |method: &str| json!({"proxy-rewrite": {"method": method}});
    gw.route("1", "/get", &up, to("GET"));
    gw.route("2", "/head", &up, to("HEAD"));
    let limit = json!({"count": 1, "time_window": 600, "rejected_code": 429});
    let mut refusing = to("GET");
    refusing["limit-count"] = limit;
    gw.route("3", "/refused", &up, refusing);
    let mut adding = to("HEAD");
    adding["response-rewrite"] = json!({"body": "added"});
    gw.route("4", "/added", &up, adding);
    // What a request that was HEAD leaves is not the next one's.
    let junk = raw(&gw.proxy(), b"HEAD /head HTTP/1.1\r\nHost: a\r\n\r\nGET /a b HTTP/1.1\r\n\r\n");
    assert!(junk.contains("400 Bad Request") && junk.trim_end().ends_with("</html>"), "{junk}");
    // On one connection: what stands behind an answer is the next one.
    let mut client = Client::connect(&gw.proxy());
    let mut ask = |method: &str, path: &str| {
        client.send(method, path, &[], b"");
        client.reply(method)
    };
    assert_eq!(ask("GET", "/refused").status, 200);
    for _ in 0..2 {
        for (method, path, status, length, body) in [
            ("HEAD", "/get", 200, "5", ""),
            ("GET", "/get", 200, "5", "hello"),
            ("GET", "/head", 200, "", ""),
            ("GET", "/added", 200, "", "added"),
            ("HEAD", "/added", 200, "", ""),
            ("HEAD", "/head", 200, "5", ""),
            ("HEAD", "/refused", 429, "", ""),
        ] {
            let reply = ask(method, path);
            assert_eq!((reply.status, &*reply.text()), (status, body), "{method} {path}");
            if !length.is_empty() {
                assert_eq!(reply.header("content-length"), Some(length), "{method} {path}");
            }
        }
    }
    let reply = http2::get(&gw.proxy(), "/head");
    assert_eq!((reply.status, &*reply.text(), reply.header("content-length")), (200, "", None));
    assert_eq!(http2::get(&gw.proxy(), "/added").text(), "added");
}

#[test]
fn an_argument_without_a_value_is_no_token() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    gw.route("1", "/x", &up, json!({"jwt-auth": {}}));
    for query in ["?jwt", "?jwt&jwt=a.b.c", "?jwt=", ""] {
        assert_eq!(gw.get(&format!("/x{query}")).status, 401, "{query}");
    }
    gw.put("/consumers", json!({"username": "nobody"}));
    gw.route("2", "/open", &up, json!({"jwt-auth": {"anonymous_consumer": "nobody"}}));
    assert_eq!(gw.get("/open?jwt").status, 200);
}

#[test]
fn confs_that_ask_for_nothing_do_nothing() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    gw.route("1", "/redirect", &up, json!({"redirect": {"http_to_https": false}}));
    let nothing = json!({"upstream": {"nodes": {up.addr(): 1}}, "weight": 0});
    gw.route(
        "2",
        "/split",
        &up,
        json!({"traffic-split": {"rules": [{"weighted_upstreams": [nothing, {"weight": 0}]}]}}),
    );
    for path in ["/redirect", "/split"] {
        assert_eq!(gw.get(path).status, 200, "{path}");
    }
    let filters = json!([{"regex": "h", "replace": "X", "options": "h"}]);
    let refused =
        gw.admin("PUT", "/routes/3", json!({"uri": "/x", "plugins": {"response-rewrite": {"filters": filters}}}));
    assert_eq!(refused.status, 400);
    let text = refused.json()["error_msg"].as_str().expect("a text").to_owned();
    assert!(text.ends_with("regex \"h\" validation failed: unknown flag \"h\" (flags \"h\")"), "{text}");
    gw.put(
        "/routes/4",
        json!({"uri": "/typo", "upstream": {"type": "leastconn", "nodes": {up.addr(): 1, Upstream::echo().addr(): 1}}}),
    );
    assert_eq!(gw.get("/typo").status, 200);
    gw.expect_log("invalid balancer type: leastconn: the nodes of its upstreams take turns");
}

#[test]
fn a_field_that_there_is_once_is_not_added_twice() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    let add = json!(["Content-Type: text/x", "Server: me", "X-Two: 1", "X-Two: 2"]);
    gw.route("1", "/x", &up, json!({"response-rewrite": {"headers": {"add": add}}}));
    let reply = gw.get("/x");
    let all = |name: &str| {
        reply.headers.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| &**v).collect::<Vec<_>>()
    };
    assert_eq!((all("content-type"), all("server"), all("x-two")), (vec!["text/x"], vec!["me"], vec!["1", "2"]));
}
