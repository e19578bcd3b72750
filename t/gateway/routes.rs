//! Walk 2: routes over the Admin API, served at once.

use serde_json::json;

use crate::support::{Gateway, Upstream, request};

#[test]
fn a_route_is_served_as_soon_as_its_put_is_answered() {
    let (a, b) = (Upstream::echo(), Upstream::echo());
    let gw = Gateway::start();
    for round in 0..20 {
        let up = if round % 2 == 0 { &a } else { &b };
        gw.route("1", "/get", up, json!({}));
        let before = up.seen().len();
        assert_eq!(gw.get("/get").status, 200);
        assert_eq!(up.seen().len(), before + 1, "round {round} went to the upstream of its own write");
    }
    assert_eq!(gw.admin("DELETE", "/routes/1", ()).status, 200);
    assert_eq!(gw.get("/get").status, 404);
}

#[test]
fn answers_have_the_shape_of_apisix() {
    let gw = Gateway::start();
    let route = json!({"uri": "/get", "upstream": {"type": "roundrobin", "nodes": {"127.0.0.1:8080": 1}}});
    let created = gw.admin("PUT", "/routes/1", route.clone());
    assert_eq!(created.status, 201);
    let body = created.json();
    assert_eq!(body["key"], "/apisix/routes/1");
    assert_eq!(body["value"]["id"], "1");
    assert!(body["value"]["create_time"].is_u64() && body["value"]["update_time"].is_u64());
    assert_eq!(gw.admin("PUT", "/routes/1", route.clone()).status, 200);
    let posted = gw.admin("POST", "/routes", route);
    assert_eq!(posted.status, 201);
    let got = gw.admin("GET", "/routes/1", ()).json();
    assert!(got["createdIndex"].as_i64() < got["modifiedIndex"].as_i64(), "{got}");
    let list = gw.admin("GET", "/routes", ()).json();
    assert_eq!(list["total"], 2);
    assert_eq!(list["list"].as_array().map(Vec::len), Some(2));
    let deleted = gw.admin("DELETE", "/routes/1", ());
    assert_eq!((deleted.status, deleted.json()["deleted"].clone()), (200, json!("1")));
    let missing = gw.admin("GET", "/routes/1", ());
    assert_eq!((missing.status, missing.json()), (404, json!({"message": "Key not found"})));
}

#[test]
fn bad_input_is_refused_with_a_reason_and_changes_nothing() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    gw.route("1", "/get", &up, json!({}));
    for bad in [
        json!({"uri": 5}),
        json!({"uri": "/get", "upstream": {"nodes": {"127.0.0.1:80": -1}}}),
        json!({"uri": "/get", "plugins": {"no-such-plugin": {}}}),
        json!({"uri": "/get", "upstream_id": "nowhere"}),
        json!({"uri": "/get", "plugins": {"limit-count": {"count": "many"}}}),
    ] {
        let reply = gw.admin("PUT", "/routes/1", bad.clone());
        assert_eq!(reply.status, 400, "{bad}: {}", reply.text());
        assert!(reply.json()["error_msg"].is_string(), "{}", reply.text());
    }
    assert_eq!(gw.admin_text("PUT", "/routes/1", "{", "application/json").status, 400);
    assert_eq!(gw.get("/get").status, 200);
}

#[test]
fn no_key_or_a_wrong_one_is_refused() {
    let gw = Gateway::start();
    let admin = gw.admin_address();
    let none = request(&admin, "GET", "/apisix/admin/routes", &[], b"");
    assert_eq!(none.status, 401);
    let wrong = request(&admin, "GET", "/apisix/admin/routes", &[("X-API-KEY", "wrong")], b"");
    assert_eq!(wrong.status, 401);
    assert_eq!(gw.admin("GET", "/routes", ()).status, 200);
}

#[test]
fn what_is_in_use_is_not_deleted() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    gw.put("/upstreams/u1", json!({"type": "roundrobin", "nodes": {up.addr(): 1}}));
    gw.put("/services/s1", json!({"upstream_id": "u1"}));
    gw.put("/routes/1", json!({"uri": "/s", "service_id": "s1"}));
    assert_eq!(gw.get("/s").status, 200);
    assert_eq!(gw.admin("DELETE", "/upstreams/u1", ()).status, 400);
    assert_eq!(gw.admin("DELETE", "/services/s1", ()).status, 400);
    assert_eq!(gw.admin("DELETE", "/routes/1", ()).status, 200);
    assert_eq!(gw.admin("DELETE", "/services/s1", ()).status, 200);
    assert_eq!(gw.admin("DELETE", "/upstreams/u1", ()).status, 200);
}

#[test]
fn patch_changes_a_part() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    gw.route("1", "/a", &up, json!({}));
    assert_eq!(gw.admin("PATCH", "/routes/1", json!({"uri": "/b"})).status, 200);
    assert_eq!((gw.get("/a").status, gw.get("/b").status), (404, 200));
    assert_eq!(gw.admin("PATCH", "/routes/1/status", json!(0)).status, 200);
    assert_eq!(gw.get("/b").status, 404);
}

#[test]
fn the_upstream_sees_the_request_as_nginx_would_send_it() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    gw.route("1", "/*", &up, json!({}));
    let reply = gw.send(
        "POST",
        "/p/%41?a=1&b=%20",
        &[("X-Own", "kept"), ("Connection", "close, X-Hop"), ("X-Hop", "dropped"), ("X-Forwarded-For", "10.0.0.1")],
        b"body",
    );
    assert_eq!(reply.status, 200);
    let seen = up.last();
    assert_eq!(
        (seen.method.as_str(), seen.target.as_str(), &seen.body[..]),
        ("POST", "/p/%41?a=1&b=%20", &b"body"[..])
    );
    assert_eq!(seen.header("host"), Some(gw.proxy().as_str()));
    assert_eq!(seen.header("x-own"), Some("kept"));
    assert_eq!(seen.header("x-hop"), None);
    assert_eq!(seen.header("x-forwarded-for"), Some("10.0.0.1, 127.0.0.1"));
    assert_eq!(seen.header("x-real-ip"), Some("127.0.0.1"));
    assert!(seen.headers.iter().any(|(name, _)| name == "X-Own"), "names keep their case: {:?}", seen.headers);
}

#[test]
fn routes_match_by_host_method_and_vars() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    let upstream = json!({"type": "roundrobin", "nodes": {up.addr(): 1}});
    gw.put("/routes/1", json!({"uri": "/h", "hosts": ["*.moon.test"], "upstream": upstream}));
    gw.put("/routes/2", json!({"uri": "/m", "methods": ["POST"], "upstream": upstream}));
    gw.put("/routes/3", json!({"uri": "/v", "vars": [["arg_k", "==", "1"]], "upstream": upstream}));
    assert_eq!(gw.send("GET", "/h", &[("Host", "a.moon.test")], b"").status, 200);
    assert_eq!(gw.send("GET", "/h", &[("Host", "moon.example")], b"").status, 404);
    assert_eq!(gw.send("POST", "/m", &[], b"x").status, 200);
    assert_eq!(gw.get("/m").status, 404);
    assert_eq!((gw.get("/v?k=1").status, gw.get("/v?k=2").status), (200, 404));
}

#[test]
fn admin_answers_are_apisix_own_to_the_last_byte() {
    let gw = Gateway::start();
    let upstream = json!({"nodes": {"127.0.0.1:1": 1}});
    let written = gw.admin("PUT", "/routes/1", json!({"id": 1, "uri": "/a", "upstream": upstream}));
    assert!(written.text().ends_with("}\n"), "{:?}", written.text());
    assert_eq!(written.json()["value"]["id"], 1);
    let in_brackets = json!({"uri": "/c", "upstream": {"nodes": [{"host": "127.0.0.1:1980", "weight": 1}]},
        "vars": [[["arg_x", "==", "y"]]]});
    assert_eq!(gw.admin("PUT", "/routes/3", in_brackets).status, 201);
    let raw =
        gw.admin_text("PUT", "/routes/4", "{\"uri\":\"/d\",\"desc\":\"a\nb\\\"c\nd\",\"plugins\":{}}", "text/plain");
    assert_eq!((raw.status, &raw.json()["value"]["desc"]), (201, &json!("a\nb\"c\nd")));
    let few = gw.admin("GET", "/routes?page=1&page_size=2", json!(null));
    assert_eq!((few.status, few.text().as_str()), (400, "page_size must be between 10 and 500"));
    let reload = gw.admin("GET", "/plugins/reload", json!(null));
    assert_eq!(reload.status, 405, "{}", reload.text());
    let nobody = gw.admin("GET", "/consumers/nobody/credentials", json!(null));
    assert_eq!((nobody.status, nobody.json()), (404, json!({"message": "Key not found"})));
    let patched = gw.admin("PATCH", "/routes/1", json!({"desc": "d"}));
    assert_eq!((patched.status, &patched.json()["value"]["id"]), (200, &json!("1")));
    let refused = gw.admin("PUT", "/routes/2", json!({"uri": "/b", "plugins": {"cors": "all"}}));
    assert_eq!(refused.status, 400);
    assert_eq!(refused.text(), "{\"error_msg\":\"invalid plugin conf \\\"all\\\" for plugin [cors]\"}\n");
}

#[test]
fn a_body_that_is_too_long_is_refused_in_words() {
    let gw = Gateway::start();
    let body = vec![b' '; 40 << 20];
    let key = gw.key();
    let reply = request(&gw.admin_address(), "PUT", "/apisix/admin/routes/1", &[("X-API-KEY", &key)], &body);
    assert_eq!(reply.status, 400, "{}", reply.text());
    assert!(reply.text().contains("is greater than the maximum size"), "{}", reply.text());
    assert_eq!(gw.admin("GET", "/routes/1", json!(null)).status, 404);
}
