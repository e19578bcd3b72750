//! Plugins that say who may call a route, by what the request says of itself.

use serde_json::{Value, json};

use crate::support::{Gateway, Upstream};

/// The status and message of a request with these headers.
fn answer(gw: &Gateway, path: &str, headers: &[(&str, &str)]) -> (u16, Value) {
    let reply = gw.send("GET", path, headers, b"");
    let body = serde_json::from_slice(&reply.body).unwrap_or(Value::Null);
    (reply.status, if reply.status == 200 { Value::Null } else { body })
}

#[test]
fn uri_blocker_looks_at_the_uri_as_it_came_and_as_it_is_meant() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    let with = |conf: Value| gw.route("1", "/*", &up, json!({"uri-blocker": conf}));
    with(json!({"block_rules": ["root\\.exe", "select.+(from|limit)", "^/internal/"]}));
    let blocked =
        ["/root.exe?a", "/x?q=select%20from", "/internal/x", "/./internal/x", "/%69nternal/x", "/a/../internal/x"];
    for path in blocked {
        assert_eq!(gw.get(path).status, 403, "{path}");
    }
    assert!(up.seen().is_empty());
    for path in ["/root_exe", "/x?q=/internal/", "/ROOT.EXE"] {
        assert_eq!(gw.get(path).status, 200, "{path}");
    }
    with(json!({"block_rules": ["root"], "case_insensitive": true, "rejected_code": 451, "rejected_msg": "no"}));
    assert_eq!(answer(&gw, "/ROOT.EXE", &[]), (451, json!({"error_msg": "no"})));
    with(json!({"block_rules": []}));
    assert_eq!(gw.get("/root.exe").status, 200, "no rule blocks nothing");
    let broken = json!({"uri": "/x", "plugins": {"uri-blocker": {"block_rules": ["a", "(b"]}}, "upstream": {"nodes": {up.addr(): 1}}});
    let refused = gw.admin("PUT", "/routes/2", broken);
    assert_eq!(refused.status, 400);
    assert!(
        refused.text().contains("failed to check the configuration of plugin uri-blocker err: "),
        "{}",
        refused.text()
    );
}

#[test]
fn referer_restriction_goes_by_the_host() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    let with = |conf: Value| gw.route("1", "/x", &up, json!({"referer-restriction": conf}));
    let status = |referer: &str| gw.send("GET", "/x", &[("Referer", referer)], b"").status;
    with(json!({"whitelist": ["*.xx.com", "YY.com", "[::1]"]}));
    let allowed = ["http://www.xx.com", "https://a.b.XX.com:8443/p?q", "http://me:xx@yy.com/am", "http://[::1]:80/"];
    assert!(allowed.iter().all(|referer| status(referer) == 200));
    let refused = [
        "http://xx.com",
        "http://www.yy.com",
        "http://evil.com/www.xx.com",
        "http://yy.com@evil.com/",
        "http://yy.com.evil.com",
    ];
    for referer in refused.into_iter().chain(["yy.com", "//yy.com", "http://", ""]) {
        assert_eq!(status(referer), 403, "{referer}");
    }
    assert_eq!(answer(&gw, "/x", &[]), (403, json!({"message": "Your referer host is not allowed"})));
    with(json!({"blacklist": ["*.xx.com"], "bypass_missing": true, "message": "no"}));
    assert_eq!(answer(&gw, "/x", &[("Referer", "http://a.xx.com/")]), (403, json!({"message": "no"})));
    assert_eq!((status("http://yy.com"), status("malformed"), gw.get("/x").status), (200, 200, 200));
    let both = json!({"whitelist": ["a.com"], "blacklist": ["b.com"]});
    let refused = gw.admin("PUT", "/routes/1", json!({"uri": "/x", "plugins": {"referer-restriction": both}}));
    assert_eq!(refused.status, 400);
}

#[test]
fn consumer_restriction_goes_by_consumer_group_service_and_route() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    gw.put("/consumer_groups/g", json!({"plugins": {}}));
    gw.put("/consumers/jack", json!({"username": "jack", "group_id": "g", "plugins": {"key-auth": {"key": "jack"}}}));
    gw.put("/consumers/rose", json!({"username": "rose", "plugins": {"key-auth": {"key": "rose"}}}));
    gw.put("/services/s", json!({"upstream": {"nodes": {up.addr(): 1}}}));
    let with = |conf: Value| {
        let plugins = json!({"key-auth": {}, "consumer-restriction": conf});
        gw.put("/routes/r", json!({"uri": "/x", "service_id": "s", "plugins": plugins}));
    };
    let asks = |who: &str| answer(&gw, "/x", &[("apikey", who)]);
    let ok = || (200, Value::Null);
    let forbidden = |kind: &str| (403, json!({"message": format!("The {kind} is forbidden.")}));
    let unknown = |kind: &str| {
        (401, json!({"message": format!("The request is rejected, please check the {kind} for this request")}))
    };

    with(json!({"whitelist": ["jack"]}));
    assert_eq!((asks("jack"), asks("rose")), (ok(), forbidden("consumer_name")));
    with(json!({"blacklist": ["jack"], "whitelist": ["jack"], "rejected_code": 451, "rejected_msg": "no"}));
    assert_eq!((asks("jack"), asks("rose")), ((451, json!({"message": "no"})), (451, json!({"message": "no"}))));
    with(json!({"allowed_by_methods": [{"user": "jack", "methods": ["POST"]}, {"user": "jack", "methods": ["PUT"]}]}));
    assert_eq!(
        (asks("jack"), asks("rose")),
        (forbidden("consumer_name"), ok()),
        "a list of methods binds whom it names"
    );
    assert_eq!(gw.send("PUT", "/x", &[("apikey", "jack")], b"").status, 200);
    with(json!({"whitelist": ["jack"], "allowed_by_methods": [{"user": "jack", "methods": ["POST"]}]}));
    assert_eq!(asks("jack"), ok(), "the whitelist frees from the methods");
    with(json!({"type": "consumer_group_id", "blacklist": ["g"]}));
    assert_eq!((asks("jack"), asks("rose")), (forbidden("consumer_group_id"), unknown("consumer_group_id")));
    with(json!({"type": "service_id", "whitelist": ["s"]}));
    assert_eq!(asks("rose"), ok());
    with(json!({"type": "route_id", "blacklist": ["r"]}));
    assert_eq!(asks("rose"), forbidden("route_id"));
    gw.route("open", "/open", &up, json!({"consumer-restriction": {"whitelist": ["jack"]}}));
    assert_eq!(answer(&gw, "/open", &[]), unknown("consumer_name"), "nobody is not on the list");
    gw.route("open", "/open", &up, json!({"consumer-restriction": {"type": "service_id", "blacklist": ["s"]}}));
    assert_eq!(answer(&gw, "/open", &[]), unknown("service_id"));
}
