//! Revisions of what the Admin API writes, dry runs, conditions of writes, and uploaded plugins: on the embedded store and on a real
//! etcd.

mod support;

use serde_json::{Value, json};
use support::{Gateway, Reply, Upstream, eventually, peers::Etcd, request};

/// Two administrators by name, so that it is seen who has written.
const JANE: &str = "jane-0123456789abcdef";
const JOE: &str = "joe-0123456789abcdef";

fn settings(more: Value) -> Value {
    let keys = json!([{"name": "jane", "key": JANE, "role": "admin"}, {"name": "", "key": JOE, "role": "admin"},
        {"name": "looks", "key": "viewer-0123456789abcdef", "role": "viewer"}]);
    let mut admin = json!({"admin_key": keys});
    if let (Value::Object(admin), Value::Object(more)) = (&mut admin, more) {
        admin.extend(more);
    }
    json!({"deployment": {"admin": admin}})
}

/// Runs the scene on both stores.
fn on_both(more: Value, scene: impl Fn(&Gateway, Option<&Etcd>)) {
    scene(&Gateway::with(settings(more.clone())), None);
    let etcd = Etcd::start();
    scene(&on_etcd(&etcd, more), Some(&etcd));
}

/// A node of that etcd.
fn on_etcd(etcd: &Etcd, more: Value) -> Gateway {
    let mut settings = settings(more);
    settings["deployment"]["role"] = "traditional".into();
    settings["deployment"]["role_traditional"] = json!({"config_provider": "etcd"});
    settings["deployment"]["etcd"] = json!({"host": [etcd.url()], "prefix": "/apisix", "timeout": 5});
    Gateway::with(settings)
}

fn call_as(gw: &Gateway, key: &str, method: &str, path: &str, headers: &[(&str, &str)], body: Value) -> Reply {
    let text = if body.is_null() { String::new() } else { body.to_string() };
    let mut all = vec![("X-API-KEY", key), ("Content-Type", "application/json")];
    all.extend(headers);
    request(&gw.admin_address(), method, &format!("/apisix/admin{path}"), &all, text.as_bytes())
}

fn call(gw: &Gateway, method: &str, path: &str, body: Value) -> Reply {
    call_as(gw, JANE, method, path, &[], body)
}

#[track_caller]
fn ok(reply: Reply) -> Value {
    assert!((200..300).contains(&reply.status), "{} {}", reply.status, reply.text());
    reply.json()
}

#[track_caller]
fn refused(reply: Reply, status: u16, text: &str) -> Value {
    assert_eq!(reply.status, status, "{}", reply.text());
    assert!(reply.text().contains(text), "{:?} is not in {}", text, reply.text());
    reply.json()
}

fn route(uri: &str) -> Value {
    json!({"uri": uri, "upstream": {"type": "roundrobin", "nodes": {"127.0.0.1:1": 1}}})
}

fn index(gw: &Gateway, path: &str) -> i64 {
    ok(call(gw, "GET", path, Value::Null))["modifiedIndex"].as_i64().expect("a number")
}

/// Newest first.
fn numbers(gw: &Gateway, query: &str) -> Vec<i64> {
    let list = ok(call(gw, "GET", &format!("/revisions{query}"), Value::Null));
    list["list"].as_array().expect("a list").iter().map(|r| r["revision"].as_i64().expect("a number")).collect()
}

#[test]
fn every_write_is_a_revision_that_tells_who_did_what() {
    on_both(json!({}), |gw, _| {
        ok(call(gw, "PUT", "/routes/1", route("/a")));
        let created = index(gw, "/routes/1");
        ok(call_as(gw, JOE, "PATCH", "/routes/1", &[], json!({"uri": "/b", "upstream": {"retries": 2}})));
        let updated = index(gw, "/routes/1");
        ok(call(gw, "PUT", "/services/1", json!({"upstream": {"nodes": {"127.0.0.1:1": 1}}})));
        ok(call(gw, "DELETE", "/routes/1", Value::Null));
        let all = ok(call(gw, "GET", "/revisions", Value::Null));
        assert_eq!(all["total"], 4);
        let list = all["list"].as_array().expect("a list");
        let told: Vec<_> =
            list.iter().map(|r| [&r["action"], &r["key"], &r["who"]].map(|v| v.as_str().unwrap())).collect();
        assert_eq!(
            told,
            [
                ["delete", "/apisix/routes/1", "jane"],
                ["create", "/apisix/services/1", "jane"],
                ["update", "/apisix/routes/1", "admin"],
                ["create", "/apisix/routes/1", "jane"],
            ]
        );
        assert!(list.iter().all(|r| r["time"].as_f64().is_some_and(|t| t > 1.7e9)));
        assert_eq!((&list[2]["revision"], &list[3]["revision"]), (&json!(updated), &json!(created)));
        // Pages, and those of one object.
        assert_eq!(numbers(gw, "?page_size=1&page=3"), [updated]);
        assert_eq!(numbers(gw, "?key=/routes/1"), numbers(gw, "?key=/apisix/routes/1"));
        assert_eq!(numbers(gw, "?key=/routes/1").len(), 3);
        assert_eq!(numbers(gw, "?key=/routes/2"), [0i64; 0]);
        refused(call(gw, "GET", "/revisions?page_size=501", Value::Null), 400, "page_size must be between 1 and 500");
        refused(call(gw, "GET", "/revisions?page=x", Value::Null), 400, "page");
        // What it found and what it left.
        let one = ok(call(gw, "GET", &format!("/revisions/{updated}"), Value::Null));
        assert_eq!(
            (&one["objects"][0]["before"]["uri"], &one["objects"][0]["after"]["uri"]),
            (&json!("/a"), &json!("/b"))
        );
        let diff = ok(call(gw, "GET", &format!("/revisions/{updated}/diff"), Value::Null));
        assert_eq!(diff["diff"][0]["changed"]["/uri"], json!({"from": "/a", "to": "/b"}));
        assert_eq!(diff["diff"][0]["added"], json!({"/upstream/retries": 2}));
        assert_eq!(diff["diff"][0]["removed"], json!({}));
        let gone = ok(call(gw, "GET", &format!("/revisions/{}", numbers(gw, "")[0]), Value::Null));
        assert_eq!((&gone["objects"][0]["before"]["uri"], &gone["objects"][0]["after"]), (&json!("/b"), &Value::Null));
        refused(call(gw, "GET", "/revisions/4000000", Value::Null), 404, "revision 4000000 is not kept");
        refused(call(gw, "GET", "/revisions/x", Value::Null), 400, "a revision is a number");
        refused(call(gw, "PUT", &format!("/revisions/{updated}"), json!({})), 405, "not supported");
        // What is refused is none, and they are no resources.
        refused(call(gw, "PUT", "/routes/2", json!({"uri": 1})), 400, "uri");
        assert_eq!(numbers(gw, "").len(), 4);
        assert_eq!(ok(call(gw, "GET", "/routes", Value::Null))["total"], 0);
        let viewer =
            call_as(gw, "viewer-0123456789abcdef", "POST", &format!("/revisions/{updated}/rollback"), &[], json!({}));
        assert_eq!(viewer.status, 401);
    });
}

#[test]
fn a_rollback_sets_back_what_a_revision_changed_and_is_one_itself() {
    on_both(json!({}), |gw, etcd| {
        let up = Upstream::echo();
        gw_route(gw, "/one", &up);
        let first = index(gw, "/routes/1");
        gw_route(gw, "/two", &up);
        let second = index(gw, "/routes/1");
        assert_eq!((gw.get("/one").status, gw.get("/two").status), (404, 200));
        let would = ok(call(gw, "POST", &format!("/revisions/{second}/rollback?dry_run=true"), Value::Null));
        assert_eq!(would["diff"][0]["changed"]["/uri"], json!({"from": "/two", "to": "/one"}));
        assert_eq!(index(gw, "/routes/1"), second, "nothing happened");
        let expected = would["revision"].clone();
        let back = ok(call(gw, "POST", &format!("/revisions/{second}/rollback"), Value::Null));
        assert_eq!((&back["refers_to"], &back["revision"]), (&json!(second), &expected));
        assert_eq!((gw.get("/one").status, gw.get("/two").status), (200, 404), "served with the answer");
        let newest = ok(call(gw, "GET", "/revisions?page_size=1", Value::Null))["list"][0].clone();
        assert_eq!(
            [&newest["action"], &newest["refers_to"], &newest["revision"]],
            [&json!("rollback"), &json!(second), &back["revision"]]
        );
        // Changed since: by the rollback.
        let text =
            refused(call(gw, "POST", &format!("/revisions/{second}/rollback"), Value::Null), 409, "changed since");
        assert_eq!(text["modifiedIndex"], back["revision"]);
        let forced = ok(call(gw, "POST", &format!("/revisions/{second}/rollback?force=true"), Value::Null));
        assert_eq!(forced["objects"][0]["value"]["uri"], "/one");
        // A rollback is rolled back like any other.
        let n = forced["revision"].as_i64().expect("a number");
        ok(call(gw, "POST", &format!("/revisions/{n}/rollback"), Value::Null));
        // Of a creation: it goes.
        ok(call(gw, "POST", &format!("/revisions/{first}/rollback?force=true"), Value::Null));
        assert_eq!(call(gw, "GET", "/routes/1", Value::Null).status, 404);
        assert_eq!(gw.get("/one").status, 404);
        if let Some(etcd) = etcd {
            // What others write straight into etcd is no revision of ours, and not overwritten unseen.
            ok(call(gw, "PUT", "/routes/9", route("/ours")));
            let ours = index(gw, "/routes/9");
            let count = numbers(gw, "").len();
            etcd.put("/apisix/routes/9", &route("/theirs").to_string());
            assert_eq!(numbers(gw, "").len(), count);
            refused(call(gw, "POST", &format!("/revisions/{ours}/rollback"), Value::Null), 409, "changed since");
            assert!(etcd.get("/apisix/routes/9").contains("/theirs"));
        }
    });
}

fn gw_route(gw: &Gateway, uri: &str, up: &Upstream) {
    ok(call(gw, "PUT", "/routes/1", json!({"uri": uri, "upstream": {"type": "roundrobin", "nodes": {up.addr(): 1}}})));
}

#[test]
fn a_rollback_is_checked_like_any_write() {
    on_both(json!({}), |gw, _| {
        ok(call(gw, "PUT", "/upstreams/1", json!({"nodes": {"127.0.0.1:1": 1}})));
        let made = index(gw, "/upstreams/1");
        ok(call(gw, "PUT", "/routes/1", json!({"uri": "/a", "upstream_id": "1"})));
        refused(call(gw, "POST", &format!("/revisions/{made}/rollback"), Value::Null), 400, "is still using it");
        ok(call(gw, "PUT", "/routes/1", route("/a")));
        let moved = index(gw, "/routes/1");
        ok(call(gw, "DELETE", "/upstreams/1", Value::Null));
        let text = "failed to fetch upstream info by upstream id [1]";
        refused(call(gw, "POST", &format!("/revisions/{moved}/rollback"), Value::Null), 400, text);
        // The deletion is undone, then the other goes.
        let deleted = numbers(gw, "?key=/upstreams/1")[0];
        ok(call(gw, "POST", &format!("/revisions/{deleted}/rollback"), Value::Null));
        ok(call(gw, "POST", &format!("/revisions/{moved}/rollback"), Value::Null));
        assert_eq!(ok(call(gw, "GET", "/routes/1", Value::Null))["value"]["upstream_id"], "1");
    });
}

#[test]
fn a_consumer_goes_and_comes_back_with_its_credentials_and_secrets_are_never_shown() {
    on_both(json!({}), |gw, _| {
        let up = Upstream::echo();
        ok(call(gw, "PUT", "/consumers", json!({"username": "jack"})));
        for n in 1..=3 {
            let plugins = json!({"key-auth": {"key": format!("open-sesame-{n}")}});
            ok(call(gw, "PUT", &format!("/consumers/jack/credentials/c{n}"), json!({"plugins": plugins})));
        }
        let plugins = json!({"key-auth": {}});
        let upstream = json!({"type": "roundrobin", "nodes": {up.addr(): 1}});
        ok(call(gw, "PUT", "/routes/1", json!({"uri": "/a", "plugins": plugins, "upstream": upstream})));
        let opens = |status| assert_eq!(gw.send("GET", "/a", &[("apikey", "open-sesame-2")], b"").status, status);
        opens(200);
        ok(call(gw, "DELETE", "/consumers/jack", Value::Null));
        opens(401);
        let gone = ok(call(gw, "GET", "/revisions?page_size=1", Value::Null))["list"][0].clone();
        assert_eq!((&gone["action"], &gone["key"]), (&json!("delete"), &json!("/apisix/consumers/jack")));
        assert_eq!(gone["keys"].as_array().map(Vec::len), Some(4));
        let n = gone["revision"].as_i64().expect("a number");
        for path in ["", "/diff"] {
            let shown = call(gw, "GET", &format!("/revisions/{n}{path}"), Value::Null);
            assert!(!shown.text().contains("open-sesame") && shown.text().contains("key-auth"), "{}", shown.text());
        }
        let back = call(gw, "POST", &format!("/revisions/{n}/rollback"), Value::Null);
        assert_eq!(back.status, 200, "{}", back.text());
        assert!(!back.text().contains("open-sesame"));
        opens(200);
    });
}

#[test]
fn a_refused_write_of_a_function_leaves_its_revisions() {
    on_both(json!({}), |gw, _| {
        let source = |n: u32| json!({"source": format!("return function() return 200, '{n}' end")});
        ok(call(gw, "PUT", "/functions/f", source(0)));
        ok(call(gw, "PUT", "/functions/f", source(1)));
        let revisions = || ok(call(gw, "GET", "/functions/f/revisions", Value::Null));
        let before = revisions();
        for n in 2..25 {
            let stale = call_as(gw, JANE, "PUT", "/functions/f", &[("If-Match", "\"1000000\"")], source(n));
            refused(stale, 412, "modifiedIndex");
        }
        assert_eq!(revisions(), before);
        let tag = format!("\"{}\"", index(gw, "/functions/f"));
        ok(call_as(gw, JANE, "PUT", "/functions/f", &[("If-Match", &tag)], source(2)));
        assert_ne!(revisions(), before);
    });
}

/// A function that answers this number.
fn answers(n: u32) -> Value {
    json!({"source": format!("return function() return 200, '{n}' end")})
}

/// The numbers of a function's own revisions, the live one, and the canary's.
fn known(gw: &Gateway) -> (Vec<u64>, Vec<u64>, Vec<u64>) {
    let list = ok(call(gw, "GET", "/functions/f/revisions", Value::Null));
    let that = |is: &dyn Fn(&Value) -> bool| {
        let list = list["list"].as_array().expect("a list").iter();
        list.filter(|r| is(r)).map(|r| r["revision"].as_u64().expect("a number")).collect()
    };
    (that(&|_| true), that(&|r| r["live"] == true), that(&|r| r["canary"] == true))
}

#[test]
fn a_function_goes_and_comes_back_with_its_own_revisions() {
    on_both(json!({}), |gw, etcd| {
        ok(call(gw, "PUT", "/functions/f", answers(1)));
        ok(call(gw, "PUT", "/functions/f", answers(2)));
        assert_eq!(ok(call(gw, "POST", "/functions/f/revisions", answers(3)))["revision"], 3);
        ok(call(gw, "PATCH", "/functions/f", json!({"canary": {"revision": 3, "weight": 50}})));
        ok(call(gw, "PUT", "/routes/f", json!({"uri": "/f", "function_id": "f"})));
        let before = known(gw);
        assert_eq!(before, (vec![1, 2, 3], vec![2], vec![3]));
        ok(call(gw, "DELETE", "/functions/f?force=true", Value::Null));
        if let Some(etcd) = etcd {
            assert_eq!(etcd.keys("/apisix/moongate/function_revisions/").len(), 0, "none outlives it");
        }
        let gone = ok(call(gw, "GET", "/revisions?page_size=1", Value::Null))["list"][0].clone();
        assert_eq!((&gone["key"], &gone["action"]), (&json!("/apisix/functions/f"), &json!("delete")));
        let dry = ok(call(gw, "POST", &format!("/revisions/{}/rollback?dry_run=true", gone["revision"]), Value::Null));
        assert_eq!(dry["diff"].as_array().map(Vec::len), Some(1), "{dry}");
        refused(call(gw, "GET", "/functions/f/revisions", Value::Null), 404, "Key not found");
        let back = ok(call(gw, "POST", &format!("/revisions/{}/rollback", gone["revision"]), Value::Null));
        assert_eq!(back["objects"].as_array().map(Vec::len), Some(1), "{back}");
        assert_eq!(known(gw), before);
        // Which is what promoting and going back need, and both are revisions themselves.
        ok(call(gw, "POST", "/functions/f/promote", Value::Null));
        assert_eq!((gw.get("/f").text(), numbers(gw, "")[0]), ("3".to_owned(), index(gw, "/functions/f")));
        ok(call(gw, "POST", "/functions/f/rollback", json!({"revision": 1})));
        assert_eq!((gw.get("/f").text(), numbers(gw, "")[0]), ("1".to_owned(), index(gw, "/functions/f")));
        let diff = ok(call(gw, "GET", &format!("/revisions/{}/diff", numbers(gw, "")[0]), Value::Null));
        assert_eq!(diff["diff"][0]["changed"]["/revision"], json!({"from": 3, "to": 1}));
        // A promotion that is taken back leaves a canary that can be promoted again.
        let promoted = numbers(gw, "")[1];
        ok(call(gw, "POST", &format!("/revisions/{promoted}/rollback?force=true"), Value::Null));
        assert_eq!(known(gw), before);
        ok(call(gw, "POST", "/functions/f/promote", Value::Null));
        assert_eq!(gw.get("/f").text(), "3");
        // To take back that it was made is to take all of it away.
        ok(call(gw, "DELETE", "/routes/f", Value::Null));
        let list = ok(call(gw, "GET", "/revisions?key=/functions/f&page_size=500", Value::Null));
        let made = list["list"].as_array().and_then(|list| list.last()).expect("the first")["revision"].clone();
        ok(call(gw, "POST", &format!("/revisions/{made}/rollback?force=true"), Value::Null));
        refused(call(gw, "GET", "/functions/f", Value::Null), 404, "Key not found");
        ok(call(gw, "PUT", "/functions/f", answers(9)));
        assert_eq!(known(gw).0, [1]);
    });
}

#[test]
fn a_function_is_set_back_to_a_source_that_is_kept_no_more() {
    let gw = Gateway::with(settings(json!({})));
    for n in 1..=22 {
        ok(call(&gw, "PUT", "/functions/f", answers(n)));
    }
    assert_eq!(known(&gw).0, (3..=22).collect::<Vec<_>>());
    let second = numbers(&gw, "?page_size=500")[21];
    // What the second write has found is the first source.
    ok(call(&gw, "POST", &format!("/revisions/{}/rollback?force=true", second + 2), Value::Null));
    let (kept, live, _) = known(&gw);
    assert_eq!(live.len(), 1);
    assert!(kept.contains(&live[0]) && live[0] < 3, "{kept:?} {live:?}");
    // Its number is another function's meanwhile.
    ok(call(&gw, "DELETE", "/functions/f", Value::Null));
    ok(call(&gw, "PUT", "/functions/f", answers(100)));
    let old = numbers(&gw, "?key=/functions/f&page_size=500");
    let deleted = old[1];
    let found = ok(call(&gw, "GET", &format!("/revisions/{}", old[2]), Value::Null));
    assert_eq!(found["action"], "rollback");
    ok(call(&gw, "POST", &format!("/revisions/{}/rollback?force=true", old[3]), Value::Null));
    let (kept, live, _) = known(&gw);
    assert!(kept.contains(&live[0]), "{kept:?} {live:?} {deleted}");
}

#[test]
fn a_ttl_goes_on_through_a_rollback() {
    on_both(json!({}), |gw, _| {
        ok(call(gw, "PUT", "/functions/f?ttl=4", answers(1)));
        ok(call(gw, "POST", "/functions/f/revisions", answers(2)));
        ok(call(gw, "POST", "/functions/f/rollback", json!({"revision": 2})));
        ok(call(gw, "PUT", "/routes/1?ttl=4", route("/a")));
        ok(call(gw, "PATCH", "/routes/1", json!({"uri": "/b"})));
        let patched = numbers(gw, "")[0];
        ok(call(gw, "POST", &format!("/revisions/{patched}/rollback"), Value::Null));
        assert_eq!(ok(call(gw, "GET", "/routes/1", Value::Null))["value"]["uri"], "/a");
        eventually("the end of its time", || {
            let gone = |path| call(gw, "GET", path, Value::Null).status == 404;
            (gone("/routes/1") && gone("/functions/f")).then_some(())
        });
        // What would be gone is not brought back.
        let text = format!("/revisions/{patched}/rollback?force=true");
        refused(call(gw, "POST", &text, Value::Null), 400, "the ttl of /apisix/routes/1 is over");
    });
}

#[test]
fn an_uploaded_plugin_that_was_deleted_comes_back() {
    on_both(json!({}), |gw, _| {
        ok(call(gw, "PUT", "/plugin_sources/mine", json!({"source": plugin("mine", "return 200, 'one'")})));
        let first = index(gw, "/plugin_sources/mine");
        ok(call(gw, "DELETE", "/plugin_sources/mine", Value::Null));
        let list = ok(call(gw, "GET", "/plugin_sources/mine/revisions", Value::Null));
        assert_eq!((&list["total"], &list["list"][0]["action"]), (&json!(2), &json!("delete")));
        ok(call(gw, "POST", "/plugin_sources/mine/rollback", json!({"revision": first})));
        gw_with_plugins(gw, &Upstream::echo(), json!({"mine": {}}));
        assert_eq!(gw.get("/mine").text(), "one");
        ok(call(gw, "DELETE", "/routes/1", Value::Null));
        ok(call(gw, "DELETE", "/plugin_sources/mine", Value::Null));
        let gone = numbers(gw, "")[0];
        ok(call(gw, "POST", &format!("/revisions/{gone}/rollback"), Value::Null));
        assert_eq!(numbers(gw, "?key=/plugin_sources/mine").len(), 5);
        gw_with_plugins(gw, &Upstream::echo(), json!({"mine": {}}));
        assert_eq!(gw.get("/mine").text(), "one");
    });
}

#[test]
fn a_list_of_large_revisions_takes_no_memory_for_their_texts() {
    let gw = Gateway::with(settings(json!({})));
    for n in 0..40 {
        let text = format!("{}\n-- {}{}", plugin("mine", "return 200"), "x".repeat(1_000_000), n);
        ok(call(&gw, "PUT", "/plugin_sources/mine", json!({ "source": text })));
    }
    let status = format!("/proc/{}/status", gw.pid());
    let kb = |name: &str| {
        let text = std::fs::read_to_string(&status).expect("the process is there");
        let line = text.lines().find(|line| line.starts_with(name)).expect("a line").to_owned();
        line.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok()).expect("a number")
    };
    // The peak is counted from here on.
    std::fs::write(format!("/proc/{}/clear_refs", gw.pid()), "5").expect("may be reset");
    let before = kb("VmRSS:");
    for path in ["/revisions?page_size=500", "/revisions?key=/plugin_sources/mine", "/plugin_sources/mine/revisions"] {
        let list = ok(call(&gw, "GET", path, Value::Null));
        assert_eq!(list["total"], 40, "{path}");
    }
    let peak = kb("VmHWM:");
    assert!(peak < before + 16 * 1024, "{before} KB before, {peak} KB at most");
    let newest = ok(call(&gw, "GET", &format!("/revisions/{}", numbers(&gw, "")[0]), Value::Null));
    let text = newest["objects"][0]["before"]["source"].as_str().expect("the text");
    assert!(text.len() > 1_000_000);
}

#[test]
fn an_owner_of_more_than_one_revision_takes_goes_in_several() {
    on_both(json!({}), |gw, _| {
        ok(call(gw, "PUT", "/consumers", json!({"username": "jack"})));
        for n in 0..64 {
            let plugins = json!({"key-auth": {"key": format!("k{n}")}});
            ok(call(gw, "PUT", &format!("/consumers/jack/credentials/c{n}"), json!({"plugins": plugins})));
        }
        let before = numbers(gw, "?page_size=500").len();
        // Nothing of it goes where the owner would stay.
        let stale = call_as(gw, JANE, "DELETE", "/consumers/jack", &[("If-Match", "\"1000000\"")], Value::Null);
        refused(stale, 412, "modifiedIndex");
        assert_eq!(ok(call(gw, "GET", "/consumers/jack/credentials?page_size=500", Value::Null))["total"], 64);
        ok(call(gw, "DELETE", "/consumers/jack", Value::Null));
        let list = ok(call(gw, "GET", "/revisions?page_size=2", Value::Null));
        let keys = |n: usize| list["list"][n]["keys"].as_array().map_or(1, Vec::len);
        assert_eq!((keys(0), keys(1), &list["total"]), (64, 1, &json!(before + 2)));
        assert_eq!(list["list"][0]["key"], "/apisix/consumers/jack");
        assert_eq!(call(gw, "GET", "/consumers/jack/credentials", Value::Null).status, 404);
        // The owner first: a credential without one is refused.
        let (last, first) = (&list["list"][0]["revision"], &list["list"][1]["revision"]);
        refused(call(gw, "POST", &format!("/revisions/{first}/rollback"), Value::Null), 404, "consumer not found");
        ok(call(gw, "POST", &format!("/revisions/{last}/rollback"), Value::Null));
        ok(call(gw, "POST", &format!("/revisions/{first}/rollback"), Value::Null));
        assert_eq!(ok(call(gw, "GET", "/consumers/jack/credentials?page_size=500", Value::Null))["total"], 64);
    });
}

#[test]
fn secrets_that_the_store_has_in_clear_are_not_shown_by_revisions() {
    let mut clear = settings(json!({}));
    clear["apisix"] = json!({"data_encryption": {"enable_encrypt_fields": false, "keyring": []}});
    let gw = Gateway::with(clear);
    ok(call(&gw, "PUT", "/consumers", json!({"username": "jack", "plugins": {"key-auth": {"key": "open-sesame"}}})));
    ok(call(&gw, "PUT", "/consumers", json!({"username": "jack", "plugins": {"key-auth": {"key": "open-other"}}})));
    let vault = json!({"uri": "http://127.0.0.1:1", "prefix": "kv", "token": "open-vault"});
    ok(call(&gw, "PUT", "/secrets/vault/1", vault));
    for n in numbers(&gw, "") {
        for path in ["", "/diff"] {
            let shown = call(&gw, "GET", &format!("/revisions/{n}{path}"), Value::Null);
            assert!(!shown.text().contains("open-"), "{}", shown.text());
            assert!(shown.text().contains("in clear in the store"), "{}", shown.text());
        }
    }
    let diff = ok(call(&gw, "GET", &format!("/revisions/{}/diff", numbers(&gw, "")[1]), Value::Null));
    assert!(diff["diff"][0]["changed"]["/plugins/key-auth/key"].is_object(), "that it changed is seen: {diff}");
    ok(call(&gw, "PUT", "/functions/f", json!({"source": "return 200", "env": {"TOKEN": "open-env"}})));
    for n in numbers(&gw, "") {
        assert!(!call(&gw, "GET", &format!("/revisions/{n}"), Value::Null).text().contains("open-"));
    }
}

#[test]
fn a_dry_run_answers_as_the_write_would_and_writes_nothing() {
    on_both(json!({}), |gw, _| {
        ok(call(gw, "PUT", "/routes/1", route("/a")));
        ok(call(gw, "PUT", "/consumers", json!({"username": "jack"})));
        ok(call(gw, "PUT", "/consumers/jack/credentials/c", json!({"plugins": {"key-auth": {"key": "k"}}})));
        let (before, count) = (index(gw, "/routes/1"), numbers(gw, "").len());
        let put = call(gw, "PUT", "/routes/1?dry_run=true", route("/b"));
        assert_eq!(put.status, 200);
        let put = put.json();
        assert_eq!(
            (&put["dry_run"], &put["value"]["uri"], &put["key"]),
            (&json!(true), &json!("/b"), &json!("/apisix/routes/1"))
        );
        assert_eq!(put["diff"][0]["changed"]["/uri"], json!({"from": "/a", "to": "/b"}));
        let new = call(gw, "PUT", "/routes/2?dry_run=true", route("/c"));
        assert_eq!((new.status, &new.json()["diff"][0]["added"]["/uri"]), (201, &json!("/c")));
        let post = call(gw, "POST", "/routes?dry_run=true", route("/c"));
        assert_eq!((post.status, &post.json()["diff"][0]["added"]["/uri"]), (201, &json!("/c")));
        let patch = ok(call(gw, "PATCH", "/routes/1?dry_run=true", json!({"desc": "x"})));
        assert_eq!(patch["diff"][0]["added"], json!({"/desc": "x"}));
        let delete = ok(call(gw, "DELETE", "/consumers/jack?dry_run=true", Value::Null));
        assert_eq!((&delete["deleted"], delete["diff"].as_array().map(Vec::len)), (&json!("1"), Some(2)));
        refused(call(gw, "PUT", "/routes/1?dry_run=true", json!({"uri": 5})), 400, "uri");
        refused(
            call(gw, "PUT", "/routes/1?dry_run=true", json!({"uri": "/x", "upstream_id": "no"})),
            400,
            "failed to fetch",
        );
        assert_eq!(call(gw, "DELETE", "/routes/7?dry_run=true", Value::Null).status, 404);
        refused(call(gw, "PUT", "/plugins/reload?dry_run=true", Value::Null), 400, "dry_run is for objects");
        let told = "invalid argument dry_run: should be true or false";
        let revision = numbers(gw, "?key=/routes/1")[0];
        for unclear in
            ["dry_run", "dry_run=yes", "dry_run=1", "dry_run=TRUE", "dryRun=true", "dry_run=false&dry_run=true"]
        {
            for (method, path, body) in [
                ("DELETE", "/routes/1".to_owned(), Value::Null),
                ("PUT", "/routes/1".to_owned(), route("/x")),
                ("POST", "/routes".to_owned(), route("/x")),
                ("PATCH", "/routes/1".to_owned(), json!({"desc": "x"})),
                ("POST", format!("/revisions/{revision}/rollback"), Value::Null),
                ("PUT", "/plugins/reload".to_owned(), Value::Null),
            ] {
                refused(call(gw, method, &format!("{path}?{unclear}"), body), 400, told);
            }
        }
        assert_eq!(index(gw, "/routes/1"), before, "nothing has been done");
        let source = json!({"source": plugin("dry", "return 200")});
        assert_eq!(call(gw, "PUT", "/plugin_sources/dry?dry_run=true", source).status, 201);
        assert_eq!(
            call(gw, "PUT", "/functions/f?dry_run=true", json!({"source": "return function() end"})).status,
            201
        );
        assert_eq!((index(gw, "/routes/1"), numbers(gw, "").len()), (before, count));
        for path in ["/routes/2", "/plugin_sources/dry", "/functions/f"] {
            assert_eq!(call(gw, "GET", path, Value::Null).status, 404, "{path}");
        }
        assert_eq!(call(gw, "GET", "/consumers/jack/credentials/c", Value::Null).status, 200);
    });
}

#[test]
fn a_write_may_depend_on_the_modified_index() {
    on_both(json!({}), |gw, _| {
        let with = |method: &str, path: &str, header: (&str, &str), body: Value| {
            call_as(gw, JANE, method, path, &[header], body)
        };
        let create = ("If-None-Match", "*");
        let reply = with("PUT", "/routes/1", create, route("/a"));
        assert_eq!(reply.status, 201);
        let first = index(gw, "/routes/1");
        let tag = format!("\"{first}\"");
        assert_eq!(reply.header("etag"), Some(&*tag));
        let again = refused(with("PUT", "/routes/1", create, route("/b")), 412, "modifiedIndex");
        assert_eq!(again["modifiedIndex"], first);
        let read = call(gw, "GET", "/routes/1", Value::Null);
        assert_eq!(read.header("etag"), Some(&*tag));
        for (tags, status) in [(&*tag, 304), (&*format!("\"0\", W/{tag}"), 304), ("*", 304), ("\"1000000\"", 200)] {
            assert_eq!(with("GET", "/routes/1", ("If-None-Match", tags), Value::Null).status, status, "{tags}");
        }
        ok(with("PUT", "/routes/1", ("If-Match", &tag), route("/b")));
        let second = index(gw, "/routes/1");
        for (method, path, body) in [
            ("PUT", "/routes/1", route("/c")),
            ("PATCH", "/routes/1", json!({"desc": "x"})),
            ("PATCH", "/routes/1/desc", json!("x")),
            ("DELETE", "/routes/1", Value::Null),
        ] {
            let reply = with(method, path, ("If-Match", &tag), body);
            assert_eq!(reply.header("etag"), Some(&*format!("\"{second}\"")));
            assert_eq!(refused(reply, 412, "modifiedIndex")["modifiedIndex"], second, "{method}");
        }
        assert_eq!(index(gw, "/routes/1"), second);
        let absent = refused(with("PUT", "/routes/2", ("If-Match", "*"), route("/c")), 412, "does not exist");
        assert_eq!(absent["modifiedIndex"], 0);
        ok(with("PATCH", "/routes/1", ("If-Match", &format!("\"1000000\", \"{second}\"")), json!({"desc": "x"})));
        ok(with("DELETE", "/routes/1", ("If-Match", "*"), Value::Null));
        for (method, path) in [("DELETE", "/routes/5"), ("PATCH", "/routes/5"), ("PATCH", "/routes/5/desc")] {
            for tags in ["*", "\"5\""] {
                let reply = with(method, path, ("If-Match", tags), json!({"desc": "x"}));
                assert_eq!(refused(reply, 412, "does not exist")["modifiedIndex"], 0, "{method} {path} {tags}");
            }
        }
        refused(with("POST", "/functions/none/promote", ("If-Match", "*"), Value::Null), 412, "does not exist");
        refused(with("DELETE", "/routes/5", ("If-None-Match", "*"), Value::Null), 404, "Key not found");
        refused(with("PUT", "/plugins/reload", ("If-Match", "*"), Value::Null), 400, "are for objects");
        for header in [("If-Match", "W/\"1\""), ("If-Match", "x"), ("If-None-Match", "\"1\"")] {
            refused(with("PUT", "/routes/1", header, route("/a")), 400, "invalid header");
        }
        // Of two writers with the same index one wins.
        ok(call(gw, "PUT", "/routes/1", route("/race")));
        let tag = format!("\"{}\"", index(gw, "/routes/1"));
        let (address, tag) = (gw.admin_address(), tag.as_str());
        let statuses: Vec<u16> = std::thread::scope(|scope| {
            let write = |n: usize| {
                let (address, body) = (address.clone(), route(&format!("/race{n}")).to_string());
                let headers = [("X-API-KEY", JANE), ("If-Match", tag)];
                request(&address, "PUT", "/apisix/admin/routes/1", &headers, body.as_bytes()).status
            };
            let writers: Vec<_> = (0..8).map(|n| scope.spawn(move || write(n))).collect();
            writers.into_iter().map(|w| w.join().expect("a writer")).collect()
        });
        assert_eq!(statuses.iter().filter(|s| **s == 200).count(), 1, "{statuses:?}");
        assert_eq!(statuses.iter().filter(|s| **s == 412).count(), 7, "{statuses:?}");
    });
}

#[test]
fn whole_numbers_are_stored_and_shown_as_integers() {
    on_both(json!({}), |gw, etcd| {
        let text = r#"{"id": 8.0, "uri": "/n", "priority": 1e2, "desc": "1.0 and 1e2", "upstream": {"nodes": {"127.0.0.1:1980": 1.0}},
            "plugins": {"limit-count": {"count": 5.0, "time_window": 6E1, "key": "1.0", "rejected_code": 503},
            "fault-injection": {"delay": {"duration": 0.5, "percentage": 2.0}}}, "timeout": {"connect": 1.5, "send": -0.0e0, "read": 2.0}}"#;
        let send = |method: &str, path: &str, text: &str| {
            let headers = [("X-API-KEY", JANE), ("Content-Type", "application/json")];
            request(&gw.admin_address(), method, &format!("/apisix/admin{path}"), &headers, text.as_bytes())
        };
        refused(send("PUT", "/routes/8", text), 400, "timeout");
        let text = text.replace("-0.0e0", "3.0");
        let put = send("PUT", "/routes/8", &text);
        assert_eq!(put.status, 201, "{}", put.text());
        for reply in [put, call(gw, "GET", "/routes/8", Value::Null), call(gw, "GET", "/routes", Value::Null)] {
            let shown = reply.text();
            for part in [
                r#""id":8"#,
                r#""priority":100"#,
                r#""127.0.0.1:1980":1"#,
                r#""desc":"1.0 and 1e2""#,
                r#""count":5"#,
                r#""time_window":60"#,
                r#""key":"1.0""#,
                r#""duration":0.5"#,
                r#""percentage":2"#,
                r#""connect":1.5"#,
                r#""send":3"#,
            ] {
                let ends = [",", "}"].iter().any(|end| shown.contains(&format!("{part}{end}")));
                assert!(ends, "{part} in {shown}");
            }
        }
        assert_eq!(send("PATCH", "/routes/8", r#"{"priority": 3.0}"#).json()["value"]["priority"].to_string(), "3");
        assert_eq!(send("PATCH", "/routes/8/priority", "4.0").json()["value"]["priority"].to_string(), "4");
        assert_eq!(send("PUT", "/routes/9", &text).status, 400, "another id");
        if let Some(etcd) = etcd {
            etcd.put(
                "/apisix/routes/7",
                r#"{"uri": "/seven", "priority": 7.0, "upstream": {"nodes": {"127.0.0.1:1": 1.0}}}"#,
            );
            for (reply, place) in [
                (call(gw, "GET", "/routes/7", Value::Null), "/value"),
                (call(gw, "PATCH", "/routes/7", json!({"desc": "x"})), "/value"),
                (support::get(&gw.control(), "/v1/route/7"), "/value"),
            ] {
                let shown = reply.json();
                let priority = shown.pointer(place).expect("a value")["priority"].to_string();
                assert_eq!(priority, "7", "{shown}");
                assert!(!reply.text().contains("1.0,") && !reply.text().contains("1.0}"), "{}", reply.text());
            }
            let n = numbers(gw, "?key=/routes/7")[0];
            let shown = call(gw, "GET", &format!("/revisions/{n}"), Value::Null).text();
            assert!(shown.contains(r#""priority":7,"#) && !shown.contains(":7.0"), "{shown}");
        }
    });
    let gw = one_document();
    for (digest, kind, text) in [
        (
            "json",
            "application/json",
            r#"{"routes_conf_version": 5.0, "routes": [{"id": 8.0, "uri": "/n", "priority": 1e2, "upstream": {"nodes": {"127.0.0.1:1": 1.0}}}]}"#,
        ),
        (
            "yaml",
            "application/yaml",
            "routes_conf_version: 6.0\nroutes:\n- {id: 8.0, uri: /n, priority: 1.0e+2, upstream: {nodes: {'127.0.0.1:1': 1.0}}}\n",
        ),
    ] {
        let headers = [("X-API-KEY", JANE), ("Content-Type", kind), ("X-Digest", digest)];
        ok_text(request(&gw.admin_address(), "PUT", "/apisix/admin/configs", &headers, text.as_bytes()));
        let shown = call(&gw, "GET", "/configs", Value::Null).text();
        assert!(shown.contains(r#""priority":100"#) && shown.contains(r#""127.0.0.1:1":1}"#), "{shown}");
        assert_eq!(ok(call(&gw, "GET", "/routes/8", Value::Null))["value"]["priority"].to_string(), "100");
    }
}

/// Sends a request from each of many clients at once.
fn at_once(clients: usize, send: impl Fn(usize) -> Reply + Sync) -> Vec<Reply> {
    std::thread::scope(|scope| {
        let send = &send;
        let sending: Vec<_> = (0..clients).map(|n| scope.spawn(move || send(n))).collect();
        sending.into_iter().map(|client| client.join().expect("an answer")).collect()
    })
}

fn id_of(reply: Reply) -> String {
    assert_eq!(reply.status, 201, "{}", reply.text());
    let value = reply.json();
    let id = value["value"]["id"].as_str().expect("an id").to_owned();
    assert_eq!(value["key"].as_str().and_then(|key| key.rsplit('/').next()), Some(&*id));
    id
}

#[test]
fn ids_of_imported_objects_are_in_nobodys_way() {
    on_both(json!({}), |gw, _| {
        // Another store has given these ids; this one's revision is far behind.
        let imported: Vec<String> = (20..60).map(|n| format!("{n:020}")).collect();
        for id in &imported {
            ok(call(gw, "PUT", &format!("/routes/{id}"), route("/imported")));
        }
        for id in ["99999999999999999999", "09223372036854775807", "000000000000000000x1", "700"] {
            ok(call(gw, "PUT", &format!("/routes/{id}"), route("/imported")));
        }
        let would = id_of(call(gw, "POST", "/routes?dry_run=true", route("/new")));
        assert_eq!(would, format!("{:020}", 60));
        let reply = call_as(gw, JANE, "POST", "/routes", &[("If-None-Match", "*")], route("/new"));
        let tag = reply.header("etag").map(str::to_owned);
        assert_eq!(id_of(reply), would, "a dry run takes no id");
        assert_eq!(tag, Some(format!("\"{}\"", index(gw, &format!("/routes/{would}")))));
        assert_eq!(id_of(call(gw, "POST", "/routes", route("/new"))), format!("{:020}", 61));
        for id in &imported {
            assert_eq!(ok(call(gw, "GET", &format!("/routes/{id}"), Value::Null))["value"]["uri"], "/imported");
        }
        refused(call_as(gw, JANE, "POST", "/routes", &[("If-Match", "*")], route("/x")), 412, "does not exist");
        // A function that is in the way keeps its own sources.
        let next: i64 = id_of(call(gw, "POST", "/services?dry_run=true", json!({}))).parse().expect("digits");
        let functions: Vec<String> = (14..24).map(|n| format!("/functions/{:020}", next + n)).collect();
        for path in &functions {
            ok(call(gw, "PUT", path, answers(1)));
        }
        for n in 0..12 {
            id_of(call(gw, "POST", "/functions", answers(n)));
        }
        for path in &functions {
            assert_eq!(ok(call(gw, "GET", &format!("{path}/revisions"), Value::Null))["total"], 1);
        }
    });
}

#[test]
fn writers_that_come_at_once_are_no_conflict_of_theirs() {
    on_both(json!({}), |gw, _| {
        let posted = at_once(16, |n| call(gw, "POST", "/routes", route(&format!("/p{n}"))));
        let mut ids: Vec<String> = posted.into_iter().map(id_of).collect();
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), 16);
        ok(call(gw, "PUT", "/routes/1", route("/a")));
        let label = |n: usize| json!({"labels": {format!("l{n}"): "x"}});
        for reply in at_once(16, |n| call(gw, "PATCH", "/routes/1", label(n))) {
            assert_eq!(reply.status, 200, "{}", reply.text());
        }
        let labels = ok(call(gw, "GET", "/routes/1", Value::Null))["value"]["labels"].clone();
        assert_eq!(labels.as_object().map(|labels| labels.len()), Some(16), "{labels}");
        let tag = format!("\"{}\"", index(gw, "/routes/1"));
        let strict = at_once(16, |n| call_as(gw, JANE, "PATCH", "/routes/1", &[("If-Match", &tag)], label(n + 16)));
        assert_eq!(strict.iter().filter(|reply| reply.status == 200).count(), 1);
        assert_eq!(strict.iter().filter(|reply| reply.status == 412).count(), 15);
        ok(call(gw, "PUT", "/functions/f", answers(0)));
        for reply in at_once(16, |n| call(gw, "PUT", "/functions/f", answers(n as u32 + 1))) {
            assert_eq!(reply.status, 200, "{}", reply.text());
        }
        assert_eq!(known(gw).0, (1..=17).collect::<Vec<_>>());
    });
}

#[test]
fn writers_on_two_nodes_are_no_conflict_of_theirs() {
    let etcd = Etcd::start();
    let nodes = [on_etcd(&etcd, json!({})), on_etcd(&etcd, json!({}))];
    let posted = at_once(16, |n| call(&nodes[n % 2], "POST", "/routes", route(&format!("/p{n}"))));
    let mut ids: Vec<String> = posted.into_iter().map(id_of).collect();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 16);
    let path = format!("/routes/{}", ids[0]);
    for reply in at_once(16, |n| call(&nodes[n % 2], "PATCH", &path, json!({"labels": {format!("l{n}"): "x"}}))) {
        assert_eq!(reply.status, 200, "{}", reply.text());
    }
    let labels = ok(call(&nodes[0], "GET", &path, Value::Null))["value"]["labels"].clone();
    assert_eq!(labels.as_object().map(|labels| labels.len()), Some(16), "{labels}");
}

#[test]
fn only_so_many_revisions_are_kept() {
    on_both(json!({"revisions": {"max": 3, "max_mb": 1}}), |gw, etcd| {
        for n in 0..5 {
            ok(call(gw, "PUT", "/routes/1", route(&format!("/{n}"))));
        }
        let kept = numbers(gw, "");
        assert_eq!((kept.len(), kept[0]), (3, index(gw, "/routes/1")));
        // Two megabytes of noise do not fit: its revision is there, without the texts.
        let noise = |seed: u32| {
            let mut x = seed;
            let byte = |_| {
                x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                char::from(b'a' + ((x >> 24) % 26) as u8)
            };
            (0..900_000).map(byte).collect::<String>()
        };
        for seed in [1, 2] {
            ok(call(gw, "PUT", "/functions/f", json!({"source": format!("return function() end -- {}", noise(seed))})));
        }
        let newest = ok(call(gw, "GET", "/revisions?page_size=1", Value::Null))["list"][0].clone();
        assert_eq!((&newest["omitted"], &newest["action"]), (&json!(true), &json!("update")));
        let n = &newest["revision"];
        refused(call(gw, "GET", &format!("/revisions/{n}/diff"), Value::Null), 400, "too large");
        refused(call(gw, "POST", &format!("/revisions/{n}/rollback"), Value::Null), 400, "too large");
        if let Some(etcd) = etcd {
            let (texts, heads): (Vec<String>, Vec<String>) =
                etcd.keys("/apisix-revisions/").into_iter().partition(|key| key.contains("/texts/"));
            assert_eq!(heads.len(), numbers(gw, "").len());
            assert!(texts.iter().all(|key| heads.contains(&key.replace("texts/", ""))), "{texts:?} {heads:?}");
            for n in 0..4 {
                ok(call(gw, "PUT", "/routes/1", route(&format!("/more{n}"))));
            }
            assert_eq!(etcd.keys("/apisix-revisions/").len(), 3, "texts go with theirs");
            assert!(etcd.keys("/apisix/").iter().all(|key| !key.contains("/revisions")));
        }
    });
    let none = Gateway::with(settings(json!({"revisions": {"max": 0}})));
    ok(call(&none, "PUT", "/routes/1", route("/a")));
    assert_eq!(numbers(&none, ""), [0i64; 0]);
}

#[test]
fn revisions_survive_sigkill_with_their_writes() {
    let mut gw = Gateway::with(settings(json!({})));
    for n in 0..20 {
        ok(call(&gw, "PUT", &format!("/routes/{n}"), route("/a")));
    }
    gw.kill();
    gw.launch();
    assert_eq!(numbers(&gw, "").len(), 20);
    assert_eq!(numbers(&gw, "")[0], index(&gw, "/routes/19"));
}

#[test]
fn two_nodes_on_one_etcd_share_their_revisions() {
    let etcd = Etcd::start();
    let (a, b) = (on_etcd(&etcd, json!({})), on_etcd(&etcd, json!({})));
    ok(call(&a, "PUT", "/routes/1", route("/a")));
    ok(call(&b, "PUT", "/routes/1", route("/b")));
    ok(call(&a, "PUT", "/routes/1", route("/c")));
    assert_eq!(numbers(&a, "").len(), 3);
    assert_eq!(numbers(&a, ""), numbers(&b, ""));
    let second = numbers(&a, "")[1];
    let diff = ok(call(&a, "GET", &format!("/revisions/{second}/diff"), Value::Null));
    assert_eq!(diff["diff"][0]["changed"]["/uri"], json!({"from": "/a", "to": "/b"}));
}

/// A gateway whose configuration is one document.
fn one_document() -> Gateway {
    let mut settings = settings(json!({}));
    settings["deployment"]["role"] = "traditional".into();
    settings["deployment"]["role_traditional"] = json!({"config_provider": "yaml"});
    Gateway::with(settings)
}

#[test]
fn documents_are_revisions_too() {
    let gw = one_document();
    let with_id = |id: &str, uri: &str| {
        let mut route = route(uri);
        route["id"] = id.into();
        route
    };
    let put = |digest: &str, routes: Value| {
        ok_text(call_as(&gw, JANE, "PUT", "/configs", &[("X-Digest", digest)], json!({ "routes": routes })));
    };
    put("one", json!([with_id("a", "/a"), with_id("b", "/b")]));
    put("two", json!([with_id("a", "/other")]));
    let list = ok(call(&gw, "GET", "/revisions", Value::Null));
    let newest = &list["list"][0];
    assert_eq!((&list["total"], &newest["who"], &newest["revision"]), (&json!(2), &json!("jane"), &json!(2)));
    assert_eq!(newest["keys"], json!(["/apisix/routes/b", "/apisix/routes/a"]));
    let diff = ok(call(&gw, "GET", "/revisions/2/diff", Value::Null));
    assert_eq!(diff["diff"][1]["changed"], json!({"/uri": {"from": "/a", "to": "/other"}}));
    let dry = ok(call(&gw, "POST", "/revisions/2/rollback?dry_run=true", Value::Null));
    assert_eq!((&dry["dry_run"], numbers(&gw, "").len()), (&json!(true), 2));
    // What would be refused is refused.
    for query in ["", "?dry_run=true"] {
        for (method, path, body) in [
            ("PUT", "/routes/a", route("/x")),
            ("POST", "/routes", route("/x")),
            ("PATCH", "/routes/a", json!({"desc": "x"})),
            ("DELETE", "/routes/a", Value::Null),
            ("PUT", "/functions/f", answers(1)),
        ] {
            refused(call(&gw, method, &format!("{path}{query}"), body), 400, "replace it by PUT /apisix/admin/configs");
        }
    }
    ok(call(&gw, "POST", "/revisions/2/rollback", Value::Null));
    assert_eq!(ok(call(&gw, "GET", "/configs", Value::Null))["routes"].as_array().map(Vec::len), Some(2));
    assert_eq!(numbers(&gw, "?key=/routes/b"), [3, 2, 1]);
    // The tool that has sent it does so again.
    put("two", json!([with_id("a", "/other")]));
    assert_eq!(ok(call(&gw, "GET", "/configs", Value::Null))["routes"].as_array().map(Vec::len), Some(1));
    assert!(!call(&gw, "PUT", "/routes/1", route("/x")).text().is_empty());
    assert_eq!(numbers(&gw, "").len(), 4, "a single write is none");
}

#[test]
fn a_function_of_a_document_is_set_back_with_its_canary() {
    let gw = one_document();
    let put = |digest: &str, live: u32, canary: u32| {
        let mut function = answers(live);
        function["id"] = "f".into();
        function["canary"] = json!({"revision": canary, "weight": 0, "source": answers(canary)["source"]});
        let document = json!({"functions": [function], "routes": [{"id": "f", "uri": "/f", "function_id": "f"}]});
        ok_text(call_as(&gw, JANE, "PUT", "/configs", &[("X-Digest", digest)], document));
    };
    put("one", 1, 7);
    put("two", 2, 8);
    assert_eq!(gw.get("/f").text(), "2");
    ok(call(&gw, "POST", "/revisions/2/rollback?dry_run=true", Value::Null));
    ok(call(&gw, "POST", "/revisions/2/rollback", Value::Null));
    assert_eq!(gw.get("/f").text(), "1");
    assert_eq!(ok(call(&gw, "GET", "/functions/f", Value::Null))["value"]["canary"]["revision"], 7);
}

#[test]
fn after_a_rollback_the_next_document_is_taken() {
    let up = Upstream::echo();
    let upstream = json!({"type": "roundrobin", "nodes": {up.addr(): 1}});
    let put = |gw: &Gateway, digest: &str, version: i64, uri: &str| {
        let route = json!({"id": "lp", "uri": uri, "modifiedIndex": version, "upstream": upstream});
        let document = json!({"routes_conf_version": version, "routes": [route]});
        call_as(gw, JANE, "PUT", "/configs", &[("X-Digest", digest)], document)
    };
    let serves = |gw: &Gateway, uri: &str| {
        for path in ["/lp", "/lp2", "/lp3"] {
            assert_eq!(gw.get(path).status, if path == uri { 200 } else { 404 }, "{path}");
        }
    };
    for (what, digest, version, uri, status) in [
        ("counted on from what was sent or is shown", "v5002", 5002, "/lp3", 202),
        ("the same number", "v5001-b", 5001, "/lp3", 202),
        ("the document that was rolled back", "v5001", 5001, "/lp2", 202),
        ("an older one", "v5000", 5000, "/lp3", 400),
        ("what is served by its digest", "revision-3", 5003, "/lp3", 204),
    ] {
        let gw = one_document();
        ok_text(put(&gw, "v5000", 5000, "/lp"));
        ok_text(put(&gw, "v5001", 5001, "/lp2"));
        let shown = call(&gw, "GET", "/configs", Value::Null);
        assert_eq!(shown.json()["routes"][0]["uri"], "/lp2");
        ok(call(&gw, "POST", "/revisions/2/rollback", Value::Null));
        let shown = call(&gw, "GET", "/configs", Value::Null);
        assert_eq!((shown.header("x-digest"), shown.header("etag")), (Some("revision-3"), Some("\"revision-3\"")));
        let shown = shown.json();
        assert_eq!((&shown["routes_conf_version"], &shown["routes"][0]["uri"]), (&json!(5001), &json!("/lp")));
        serves(&gw, "/lp");
        let reply = put(&gw, digest, version, uri);
        assert_eq!(reply.status, status, "{what}: {}", reply.text());
        serves(&gw, if status == 202 { uri } else { "/lp" });
        if status == 202 {
            assert_eq!(put(&gw, digest, version, uri).status, 204, "{what}, again");
            // The number that is served says that nothing has changed, as it does without a rollback.
            assert_eq!(put(&gw, "another", version, "/lp").status, 202);
            serves(&gw, uri);
        }
    }
}

#[test]
fn a_document_may_depend_on_the_one_before() {
    let gw = one_document();
    let put = |digest: &str, condition: (&str, &str)| {
        let mut route = route(&format!("/{digest}"));
        route["id"] = "r".into();
        let document = json!({"routes": [route]});
        call_as(&gw, JANE, "PUT", "/configs", &[("X-Digest", digest), condition], document)
    };
    refused(put("5000", ("If-Match", "*")), 412, "there is no document yet");
    ok_text(put("5000", ("If-None-Match", "*")));
    for (digest, condition) in [
        ("5001", ("If-None-Match", "*")),
        ("5001", ("If-None-Match", "\"5000\"")),
        ("5001", ("If-Match", "\"4999\"")),
        ("5001", ("If-Match", "4999, \"5001\"")),
    ] {
        let reply = put(digest, condition);
        assert_eq!(reply.header("etag"), Some("\"5000\""));
        refused(reply, 412, "the document's digest is 5000");
    }
    assert_eq!(ok(call(&gw, "GET", "/configs", Value::Null))["routes"][0]["uri"], "/5000");
    ok_text(put("5001", ("If-Match", "\"4999\", \"5000\"")));
    assert_eq!(put("5001", ("If-Match", "\"5000\"")).status, 204, "it is there already");
    ok_text(put("5002", ("If-Match", "*")));
    assert_eq!(ok(call(&gw, "GET", "/configs", Value::Null))["routes"][0]["uri"], "/5002");
    // A rollback is another document.
    ok(call(&gw, "POST", "/revisions/3/rollback", Value::Null));
    refused(put("5003", ("If-Match", "\"5002\"")), 412, "the document's digest is revision-4");
    ok_text(put("5003", ("If-Match", "\"revision-4\"")));
}

#[track_caller]
fn ok_text(reply: Reply) {
    assert!((200..300).contains(&reply.status), "{} {}", reply.status, reply.text());
}

#[test]
fn what_plugins_write_is_a_revision() {
    on_both(json!({}), |gw, _| {
        let access = "local core = require('apisix.core')
            local route = {uri = '/by-plugin', upstream = {nodes = {['127.0.0.1:1'] = 1}}}
            local res = ngx.var.arg_gone and core.etcd.delete('/routes/7') or core.etcd.set('/routes/7', route, ngx.var.arg_ttl)
            core.etcd.set('/mine/own', {a = 1})
            return res.status";
        ok(call(gw, "PUT", "/plugin_sources/mine", json!({"source": plugin("mine", access)})));
        gw_with_plugins(gw, &Upstream::echo(), json!({"mine": {}}));
        let before = numbers(gw, "").len();
        gw.get("/mine");
        let list = ok(call(gw, "GET", "/revisions", Value::Null));
        let told = ["action", "key", "who"].map(|name| list["list"][0][name].clone());
        assert_eq!(told, ["create", "/apisix/routes/7", "core.etcd"].map(Value::from));
        assert_eq!(list["total"], before + 1, "keys of its own are not the gateway's objects");
        gw.get("/mine?gone=1");
        assert_eq!(ok(call(gw, "GET", "/revisions", Value::Null))["list"][0]["action"], "delete");
        let gone = numbers(gw, "")[0];
        ok(call(gw, "POST", &format!("/revisions/{gone}/rollback"), Value::Null));
        assert_eq!(ok(call(gw, "GET", "/routes/7", Value::Null))["value"]["uri"], "/by-plugin");
    });
}

fn plugin(name: &str, access: &str) -> String {
    format!(
        r#"local core = require("apisix.core")
local schema = {{ type = "object", properties = {{ text = {{ type = "string" }} }} }}
local _M = {{ version = 0.1, priority = 10, name = "{name}", schema = schema }}
function _M.check_schema(conf) return core.schema.check(schema, conf) end
function _M.access(conf, ctx)
    {access}
end
return _M
"#
    )
}

#[test]
fn an_uploaded_plugin_has_revisions_goes_back_and_says_who_uses_it() {
    on_both(json!({}), |gw, _| {
        let up = Upstream::echo();
        let put = |access: &str| ok(call(gw, "PUT", "/plugin_sources/mine", json!({"source": plugin("mine", access)})));
        put("return 200, 'one'");
        let first = index(gw, "/plugin_sources/mine");
        gw_with_plugins(gw, &up, json!({"mine": {}}));
        assert_eq!(gw.get("/mine").text(), "one");
        put("return 200, 'two'");
        let second = index(gw, "/plugin_sources/mine");
        assert_eq!(gw.get("/mine").text(), "two");
        let list = ok(call(gw, "GET", "/plugin_sources/mine/revisions", Value::Null));
        assert_eq!((&list["total"], &list["list"][0]["revision"]), (&json!(2), &json!(second)));
        let diff = call(gw, "GET", &format!("/plugin_sources/mine/revisions/{second}/diff"), Value::Null).text();
        assert!(diff.starts_with("--- a/plugins/mine.lua\n+++ b/plugins/mine.lua\n@@ -3,6 +3,6 @@\n"), "{diff}");
        assert!(diff.contains("\n-    return 200, 'one'\n+    return 200, 'two'\n"), "{diff}");
        let other = numbers(gw, "?key=/routes/1")[0];
        refused(
            call(gw, "GET", &format!("/plugin_sources/mine/revisions/{other}/diff"), Value::Null),
            404,
            "has not changed",
        );
        refused(call(gw, "POST", "/plugin_sources/mine/rollback", json!({})), 400, "revision");
        refused(call(gw, "POST", "/plugin_sources/mine/rollback", json!({"revision": other})), 404, "has not changed");
        let back = ok(call(gw, "POST", "/plugin_sources/mine/rollback", json!({"revision": first})));
        assert_eq!(back["refers_to"], first);
        assert_eq!(gw.get("/mine").text(), "one");
        let usage = ok(call(gw, "GET", "/plugin_sources/mine/usage", Value::Null));
        assert_eq!((&usage["used_by"], &usage["total"]), (&json!({"routes": ["1"]}), &json!(1)));
        assert_eq!(call(gw, "GET", "/plugin_sources/other/usage", Value::Null).status, 404);
        // What this node has of it.
        let status = support::get(&gw.control(), "/v1/plugin_sources").json();
        assert_eq!(status, json!([{"name": "mine", "modifiedIndex": back["revision"], "loaded": true, "error": null}]));
    });
}

fn gw_with_plugins(gw: &Gateway, up: &Upstream, plugins: Value) {
    let upstream = json!({"type": "roundrobin", "nodes": {up.addr(): 1}});
    ok(call(gw, "PUT", "/routes/1", json!({"uri": "/mine", "plugins": plugins, "upstream": upstream})));
}

#[test]
fn modules_lie_beside_an_uploaded_plugin() {
    on_both(json!({}), |gw, etcd| {
        let up = Upstream::echo();
        let source = plugin("mine", "return 200, require('apisix.plugins.mine.my.helper').text()");
        let put = |helper: &str| {
            let modules = json!({"my/helper": helper});
            call(gw, "PUT", "/plugin_sources/mine", json!({"source": source, "modules": modules}))
        };
        ok(put("return { text = function() return 'from a module' end }"));
        gw_with_plugins(gw, &up, json!({"mine": {}}));
        assert_eq!(gw.get("/mine").text(), "from a module");
        ok(put("return { text = function() return 'changed' end }"));
        assert_eq!(gw.get("/mine").text(), "changed");
        let n = index(gw, "/plugin_sources/mine");
        let diff = call(gw, "GET", &format!("/plugin_sources/mine/revisions/{n}/diff"), Value::Null).text();
        assert!(diff.starts_with("--- a/plugins/mine.my.helper.lua\n"), "{diff}");
        refused(put("return {"), 400, "plugins/mine.my.helper.lua:1:");
        let modules = json!({"../x": "return 1"});
        let outside = call(gw, "PUT", "/plugin_sources/mine", json!({"source": source, "modules": modules}));
        refused(outside, 400, "is no name of a module");
        assert_eq!(gw.get("/mine").text(), "changed");
        if let Some(etcd) = etcd {
            // Somebody else's mistake: the old one serves on, and this node says what is wrong.
            etcd.put("/apisix/plugin_sources/mine", &json!({"source": 5}).to_string());
            let status = eventually("the mistake is told", || {
                let status = support::get(&gw.control(), "/v1/plugin_sources").json();
                status[0]["error"].is_string().then_some(status)
            });
            assert_eq!((&status[0]["modifiedIndex"], &status[0]["loaded"]), (&json!(n), &json!(true)));
            assert_eq!(gw.get("/mine").text(), "changed");
            for (broken, told) in [("local x = ", "plugins/mine.lua:1:"), ("return { version = 1 }", "missing field")] {
                etcd.put("/apisix/plugin_sources/mine", &json!({"source": broken}).to_string());
                let errors = eventually("it is named", || {
                    let errors = support::get(&gw.control(), "/v1/config/errors").text();
                    errors.contains(told).then_some(errors)
                });
                assert!(errors.contains("/plugin_sources/mine"), "{errors}");
                let status = support::get(&gw.control(), "/v1/plugin_sources").json();
                assert_eq!((&status[0]["modifiedIndex"], &status[0]["loaded"]), (&json!(n), &json!(true)));
                assert!(status[0]["error"].as_str().is_some_and(|error| error.contains(told)), "{status}");
                assert_eq!(gw.get("/mine").text(), "changed");
            }
        }
    });
}

const TRIED: &str = r#"
local core = require("apisix.core")
local _M = { version = 0.1, priority = 10, name = "tried", schema = { type = "object",
    properties = { mode = { type = "string" } }, required = { "mode" } } }
function _M.check_schema(conf) return core.schema.check(_M.schema, conf) end
function _M.rewrite(conf, ctx)
    core.log.info("rewrite of ", ctx.var.uri, " with ", core.request.header(ctx, "X-In"))
    core.request.set_header(ctx, "X-Up", conf.mode)
    if conf.mode == "loop" then while true do end end
    if conf.mode == "sleep" then ngx.sleep(0.02) end
    if conf.mode == "forever" then ngx.sleep(3600) end
    if conf.mode == "raise" then error("at run time") end
end
function _M.access(conf, ctx)
    if conf.mode == "deny" then return 403, { message = "no: " .. core.request.get_body() } end
    core.response.set_header("X-Early", "1")
    local ok, err = ngx.timer.at(0, function() end)
    core.log.warn("timer: ", ok, " ", err)
end
function _M.header_filter(conf, ctx)
    ngx.header["X-Out"] = ctx.var.arg_a
    ngx.header.content_length = nil
end
function _M.body_filter(conf, ctx)
    ngx.arg[1] = string.upper(ngx.arg[1])
end
function _M.log(conf, ctx)
    ngx.log(ngx.ERR, "logged ", ngx.status)
end
return _M
"#;

#[test]
fn a_plugin_is_tried_with_a_mock_request_and_nothing_that_serves_notices() {
    let gw = Gateway::with(settings(json!({})));
    let ask = |more: Value| {
        let mut body = json!({"source": TRIED, "method": "POST", "uri": "/x%20y?a=1", "headers": {"X-In": "in"}, "body": "hi",
            "upstream": {"status": 201, "headers": {"X-From": "up"}, "body": "from upstream"}});
        if let (Value::Object(body), Value::Object(more)) = (&mut body, more) {
            body.extend(more);
        }
        call(&gw, "POST", "/plugin_sources/tried/test", body)
    };
    let passed = ok(ask(json!({"conf": {"mode": "sleep"}})));
    assert_eq!(
        (&passed["status"], &passed["body"], &passed["answered_by"]),
        (&json!(201), &json!("FROM UPSTREAM"), &json!("upstream"))
    );
    let headers = passed["headers"].as_array().expect("headers");
    for header in [["X-From", "up"], ["X-Out", "1"], ["X-Early", "1"]] {
        let has = headers
            .iter()
            .any(|h| h[0].as_str().is_some_and(|name| name.eq_ignore_ascii_case(header[0])) && h[1] == header[1]);
        assert!(has, "{header:?} in {headers:?}");
    }
    assert_eq!(passed["upstream_request"]["uri"], "/x%20y?a=1");
    let sent = passed["upstream_request"]["headers"].to_string().to_lowercase();
    assert!(sent.contains(r#"["x-up","sleep"]"#), "{sent}");
    let phases: Vec<&str> =
        passed["phases"].as_array().expect("phases").iter().filter_map(|p| p["phase"].as_str()).collect();
    assert_eq!(phases, ["rewrite", "access", "header_filter", "body_filter", "log"]);
    assert!(passed["phases"][0]["time_ms"].as_f64().is_some_and(|ms| ms >= 20.0), "{}", passed["phases"]);
    let logs = passed["logs"].to_string();
    for line in [
        r#"{"level":"info","message":"tried.lua:7: rewrite of /x y with in"}"#,
        "timer: nil no timers while a plugin is checked",
        r#"{"level":"error","message":"tried.lua:28: logged 201"}"#,
    ] {
        assert!(logs.contains(line), "{line} in {logs}");
    }
    let denied = ok(ask(json!({"conf": {"mode": "deny"}})));
    assert_eq!((&denied["status"], &denied["answered_by"]), (&json!(403), &json!("plugin")));
    assert_eq!(denied["body"], "{\"MESSAGE\":\"NO: HI\"}\n");
    assert!(denied.get("upstream_request").is_none());
    let raised = ok(ask(json!({"conf": {"mode": "raise"}})));
    assert_eq!(raised["status"], 500);
    assert!(raised["phases"][0]["error"].as_str().is_some_and(|e| e.contains("tried.lua:12: at run time")), "{raised}");
    let looped = ok(ask(json!({"conf": {"mode": "loop"}})));
    assert_eq!(looped["status"], 500);
    assert!(looped["phases"][0]["error"].is_string(), "{looped}");
    // What cannot be tried.
    refused(ask(json!({"conf": {}})), 400, "property \\\"mode\\\" is required");
    refused(ask(json!({"conf": {"mode": "x"}, "source": "return {"})), 400, "plugins/tried.lua:1:");
    refused(ask(json!({"conf": {"mode": "x"}, "uri": "no path"})), 400, "uri");
    refused(ask(json!({"conf": {"mode": "x"}, "headers": {"a b": "x"}})), 400, "headers");
    refused(ask(json!({"conf": {"mode": "x"}, "upstream": {"status": 99}})), 400, "upstream.status");
    let stored = call(&gw, "POST", "/plugin_sources/tried/test", json!({"conf": {"mode": "x"}}));
    assert_eq!(stored.status, 404, "nothing is stored");
    // Nothing of it is known outside, in the store or in error.log.
    assert!(!gw.log().contains("logged 201"));
    assert_eq!(numbers(&gw, ""), [0i64; 0]);
    refused(
        call(&gw, "PUT", "/routes/1", json!({"uri": "/x", "plugins": {"tried": {"mode": "x"}}})),
        400,
        "unknown plugin",
    );
    ok(call(&gw, "PUT", "/plugin_sources/tried", json!({"source": TRIED})));
    assert_eq!(ok(call(&gw, "POST", "/plugin_sources/tried/test", json!({"conf": {"mode": "x"}})))["status"], 200);
}

#[test]
fn only_two_plugins_are_on_trial_at_once_and_none_for_ever() {
    let gw = Gateway::with(settings(json!({})));
    let ask = || call(&gw, "POST", "/plugin_sources/tried/test", json!({"source": TRIED, "conf": {"mode": "forever"}}));
    let replies: Vec<Reply> = std::thread::scope(|scope| {
        let asking: Vec<_> = (0..3).map(|_| scope.spawn(ask)).collect();
        asking.into_iter().map(|a| a.join().expect("an answer")).collect()
    });
    let mut statuses: Vec<u16> = replies.iter().map(|r| r.status).collect();
    statuses.sort_unstable();
    assert_eq!(statuses, [400, 400, 503]);
    assert!(replies.iter().any(|r| r.text().contains("has not ended within 10s")));
    // There is room again.
    let next = call(&gw, "POST", "/plugin_sources/tried/test", json!({"source": TRIED, "conf": {"mode": "x"}}));
    assert_eq!(next.status, 200);
}
