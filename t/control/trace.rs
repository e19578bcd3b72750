//! Traces of single requests.

use serde_json::{Value, json};

use crate::support::{Dir, Gateway, Reply, Upstream, get};

const KEY: &str = "a-key-that-nobody-guesses";

fn tracing(trace: Value) -> Gateway {
    Gateway::with(json!({"apisix": {"trace": trace}}))
}

fn traced(gw: &Gateway, path: &str, headers: &[(&str, &str)]) -> Reply {
    let mut all = vec![("X-Moongate-Trace", KEY)];
    all.extend_from_slice(headers);
    gw.send("GET", path, &all, b"")
}

#[track_caller]
fn trace_of(gw: &Gateway, reply: &Reply) -> Value {
    let id = reply.header("x-moongate-trace-id").expect("the trace's id");
    get(&gw.control(), &format!("/v1/trace/{id}")).json()
}

#[test]
fn a_trace_tells_what_became_of_a_request() {
    let up = Upstream::echo();
    let gw = tracing(json!({"key": KEY}));
    let upstream = json!({"type": "roundrobin", "nodes": {up.addr(): 1}});
    gw.put("/routes/post", json!({"uri": "/x/*", "methods": ["POST"], "priority": 9, "upstream": upstream}));
    gw.put("/routes/vars", json!({"uri": "/x/*", "vars": [["arg_a", "==", "1"]], "priority": 8, "upstream": upstream}));
    gw.put("/global_rules/g", json!({"plugins": {"request-id": {}}}));
    gw.put(
        "/routes/found",
        json!({"uri": "/x/*", "upstream": upstream, "plugins": {
            "serverless-pre-function": {"functions": ["return function() ngx.req.set_header('X-Set', 'by me') \
                ngx.req.set_header('Authorization', 'secret') ngx.req.clear_header('X-Gone') end"]},
            "response-rewrite": {"headers": {"set": {"X-Answer": "1"}}},
        }}),
    );
    let reply = traced(&gw, "/x/y?a=2", &[("X-Gone", "1")]);
    assert_eq!((reply.status, reply.header("x-answer")), (200, Some("1")));
    assert_eq!(up.last().header("x-moongate-trace"), None, "the key stays here");
    let trace = trace_of(&gw, &reply);
    assert_eq!(
        trace["request"],
        json!({"client": "127.0.0.1", "method": "GET", "host": "127.0.0.1", "uri": "/x/y?a=2"})
    );
    let candidates: Vec<_> = trace["candidates"]
        .as_array()
        .expect("candidates")
        .iter()
        .map(|c| (c["route"].as_str().unwrap(), c["matched"].as_bool().unwrap(), c["refused_by"].as_str()))
        .collect();
    assert_eq!(candidates, [("post", false, Some("methods")), ("vars", false, Some("vars")), ("found", true, None)]);
    assert_eq!((&trace["route"], &trace["service"]), (&json!("found"), &Value::Null));
    let plan: Vec<_> = trace["plan"]
        .as_array()
        .expect("a plan")
        .iter()
        .map(|p| (p["plugin"].as_str().unwrap(), p["owner"].as_str().unwrap(), p["from"].as_str().unwrap()))
        .collect();
    assert_eq!(
        plan,
        [
            ("request-id", "global_rule/g", "/global_rules/g"),
            ("serverless-pre-function", "route", "/routes/found"),
            ("response-rewrite", "route", "/routes/found"),
        ]
    );
    let ran = trace["plugins"].as_array().expect("plugins");
    let of = |plugin: &str, phase: &str| {
        ran.iter()
            .find(|r| r["plugin"] == plugin && r["phase"] == phase)
            .unwrap_or_else(|| panic!("{plugin} in {trace:#}"))
    };
    let pre = of("serverless-pre-function", "access");
    assert_eq!(pre["request_headers"], json!({"x-set": "by me", "x-gone": null, "authorization": "(6 bytes)"}));
    assert_eq!((&pre["calls"], &pre["answered"], &pre["cut_off"]), (&json!(1), &Value::Null, &json!(false)));
    assert!(pre["took_us"].as_u64() <= trace["took_us"].as_u64(), "{trace:#}");
    assert_eq!(of("response-rewrite", "header_filter")["response_headers"]["x-answer"], "1");
    let tried = &trace["upstream"][0];
    assert_eq!((&tried["address"], &tried["status"]), (&json!(up.addr()), &json!(200)));
    assert!(tried["response_us"].is_u64(), "{trace:#}");
    assert_eq!((&trace["response"]["status"], &trace["response"]["from"]), (&json!(200), &json!("upstream")));
}

#[test]
fn tries_answers_and_errors_are_told() {
    let gw = tracing(json!({"key": KEY}));
    let gone = Upstream::dead();
    let up = Upstream::echo();
    let nodes = json!([
        {"host": "127.0.0.1", "port": gone.rsplit_once(':').unwrap().1.parse::<u16>().unwrap(), "weight": 1, "priority": 1},
        {"host": "127.0.0.1", "port": up.addr().rsplit_once(':').unwrap().1.parse::<u16>().unwrap(), "weight": 1},
    ]);
    gw.put("/routes/1", json!({"uri": "/tries", "upstream": {"type": "roundrobin", "nodes": nodes}}));
    let trace = trace_of(&gw, &traced(&gw, "/tries", &[]));
    let tries: Vec<_> = trace["upstream"].as_array().expect("tries").iter().map(|t| t["status"].clone()).collect();
    assert_eq!(tries, [json!(502), json!(200)]);
    gw.route("2", "/refused", &up, json!({"key-auth": {}}));
    let refused = trace_of(&gw, &traced(&gw, "/refused", &[]));
    assert_eq!((&refused["plugins"][0]["answered"], &refused["response"]["from"]), (&json!(401), &json!("gateway")));
    gw.route(
        "3",
        "/fails",
        &up,
        json!({"serverless-pre-function": {"functions": ["return function() error('x') end"]}}),
    );
    let failed = trace_of(&gw, &traced(&gw, "/fails", &[]));
    assert_eq!((&failed["plugins"][0]["cut_off"], &failed["response"]["status"]), (&json!(true), &json!(500)));
    let unknown = traced(&gw, "/unknown", &[]);
    assert_eq!((unknown.status, &trace_of(&gw, &unknown)["route"]), (404, &Value::Null));
}

#[test]
fn without_the_key_there_is_no_trace_and_old_traces_go() {
    let up = Upstream::echo();
    let gw = tracing(json!({"key": KEY, "keep": 2}));
    gw.route("1", "/x", &up, json!({}));
    let wrong = gw.send("GET", "/x", &[("X-Moongate-Trace", "a-key-that-somebody-guesses")], b"");
    assert_eq!((wrong.status, wrong.header("x-moongate-trace-id")), (200, None));
    assert_eq!(up.last().header("x-moongate-trace"), None);
    let replies: Vec<_> = (0..3).map(|_| traced(&gw, "/x", &[])).collect();
    let found = replies.iter().map(|reply| {
        let id = reply.header("x-moongate-trace-id").expect("an id");
        get(&gw.control(), &format!("/v1/trace/{id}")).status
    });
    assert_eq!(found.collect::<Vec<_>>(), [404, 200, 200]);
    let missing = get(&gw.control(), "/v1/trace/none");
    assert_eq!((missing.status, missing.json()), (404, json!({"error_msg": "trace[none] not found"})));
    let gw = Gateway::start();
    gw.route("1", "/x", &up, json!({}));
    assert_eq!(traced(&gw, "/x", &[]).header("x-moongate-trace-id"), None);
}

#[test]
fn a_location_does_not_see_the_key() {
    let says = "ngx.say(ngx.var.http_x_moongate_trace or 'nothing')";
    let gw = Gateway::with(json!({
        "apisix": {"trace": {"key": KEY}},
        "lua_locations": [{"location": "/l", "content_by_lua": says}],
    }));
    let reply = traced(&gw, "/l", &[]);
    assert_eq!(reply.text(), "nothing\n");
    let trace = trace_of(&gw, &reply);
    assert_eq!((&trace["response"]["status"], &trace["route"]), (&json!(200), &Value::Null));
}

#[test]
fn a_trace_does_not_show_what_is_secret() {
    let up = Upstream::echo();
    let gw = tracing(json!({"key": KEY, "secrets": ["X-Mine", "mine"]}));
    let sets = "return function() for _, name in ipairs({'X-Auth-Token', 'X-Mine', 'X-Plain'}) do \
        ngx.req.set_header(name, 'hidden') end \
        ngx.req.set_header('X-Original-Uri', '/a?b=1&access_token=hidden') end";
    gw.route("1", "/x", &up, json!({"serverless-pre-function": {"functions": [sets]}}));
    let reply = traced(&gw, "/x?a=hid&token=hidden&apikey=hidden&%6Dine=hidden", &[]);
    assert!(up.last().target.contains("token=hidden"), "the node gets all");
    let trace = trace_of(&gw, &reply);
    let masked = "/x?a=hid&token=(6 bytes)&apikey=(6 bytes)&%6Dine=(6 bytes)";
    assert_eq!(trace["request"]["uri"], masked);
    assert_eq!(
        trace["plugins"][0]["request_headers"],
        json!({"x-auth-token": "(6 bytes)", "x-mine": "(6 bytes)", "x-plain": "hidden",
            "x-original-uri": "/a?b=1&access_token=(6 bytes)"})
    );
}

/// `["~ b$ no", "/a yes"]`
fn tried(choice: &Value) -> Vec<String> {
    let all = choice["tried"].as_array().expect("locations");
    let text = |one: &Value| {
        let fits = if one["matched"] == true { "yes" } else { "no" };
        format!("{} {fits}", one["location"].as_str().expect("a location"))
    };
    all.iter().map(text).collect()
}

#[test]
fn locations_are_told_in_the_order_of_the_look_and_subrequests_as_children() {
    let asks = "ngx.location.capture('/child?token=hidden&n=1') ngx.say('asked')";
    let gw = Gateway::with(json!({
        "apisix": {"trace": {"key": KEY}},
        "lua_locations": [
            {"location": "/p", "rewrite_by_lua": "local a = 1", "content_by_lua": asks},
            {"location": "~ none$", "content_by_lua": "ngx.say('none')"},
            {"location": "/child", "content_by_lua": "ngx.location.capture('/leaf') ngx.exit(204)"},
            {"location": "= /leaf", "content_by_lua": "ngx.say('leaf')"},
            {"location": "= /jump", "rewrite_by_lua": "ngx.exec('/leaf')"},
            {"location": "= /fields", "content_by_lua": "for n = 1, 60 do ngx.header['X-' .. n] = ('v'):rep(250) end ngx.say('f')"},
            {"location": "= /wide", "content_by_lua": "for _ = 1, 90 do ngx.location.capture('/fields') end ngx.say('wide')"},
            {"location": "= /many", "content_by_lua": "local all = {} for n = 1, 101 do all[n] = {'/leaf'} end \
                ngx.location.capture_multi(all) ngx.say('many')"},
        ],
    }));
    let reply = traced(&gw, "/path", &[]);
    assert_eq!((reply.text(), reply.headers.len()), ("asked\n".into(), traced(&gw, "/path", &[]).headers.len()));
    let trace = trace_of(&gw, &reply);
    let choice = &trace["locations"][0];
    assert_eq!((tried(choice), &choice["chosen"]), (vec!["/p yes".into(), "~ none$ no".into()], &json!("/p")));
    let ran: Vec<_> = trace["plugins"].as_array().expect("scripts").iter().map(|ran| ran["phase"].clone()).collect();
    assert_eq!(
        (ran, &trace["plugins"][0]["owner"]),
        (vec![json!("rewrite_by_lua"), json!("content_by_lua")], &json!("/p"))
    );
    let child = &trace["children"][0];
    assert_eq!(child["request"]["uri"], "/child?token=(6 bytes)&n=1");
    assert_eq!((&child["response"]["status"], &child["locations"][0]["chosen"]), (&json!(204), &json!("/child")));
    assert!(child["at_us"].is_u64() && child["took_us"].as_u64() <= trace["took_us"].as_u64(), "{trace:#}");
    let leaf = &child["children"][0];
    assert_eq!((tried(&leaf["locations"][0]), &leaf["children"]), (vec!["= /leaf yes".into()], &json!([])));
    let jump = trace_of(&gw, &traced(&gw, "/jump", &[]));
    let ways: Vec<_> = jump["locations"].as_array().expect("looks").iter().map(|c| c["chosen"].clone()).collect();
    assert_eq!(ways, [json!("= /jump"), json!("= /leaf")]);
    let many = trace_of(&gw, &traced(&gw, "/many", &[]));
    assert_eq!((many["children"].as_array().map(Vec::len), &many["children_untold"]), (Some(100), &json!(1)));
    let wide = trace_of(&gw, &traced(&gw, "/wide", &[]));
    assert_eq!(
        (&wide["children"], &wide["children_untold"], &wide["response"]["status"]),
        (&json!([]), &json!(90), &json!(200))
    );
    let none = trace_of(&gw, &traced(&gw, "/other", &[]));
    assert_eq!((&none["locations"][0]["chosen"], &none["route"]), (&Value::Null, &Value::Null));
}

#[test]
fn a_key_that_can_be_guessed_is_refused() {
    let dir = Dir::new();
    dir.configure(json!({"apisix": {"trace": {"header": "no name", "key": "short", "keep": 0}}}));
    let (status, text) = crate::support::run(dir.command());
    assert!(!status.success());
    for part in [
        "apisix.trace.header: \"no name\" is not the name of a field",
        "apisix.trace.key: write at least 16 visible characters",
        "apisix.trace.keep: 0 is not a whole number from 1 to 10000",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
}
