//! References to secrets: plugins see values, of the environment, Vault and AWS; what cannot be had is told.

use std::{
    io::{BufReader, Write},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::json;

use crate::support::{
    Gateway, Upstream, eventually,
    upstream::{Seen, read_request},
};

/// A server of secrets: `answer` gives status and body.
fn manager(answer: impl Fn(&Seen) -> (u16, String) + Send + Sync + 'static) -> Upstream {
    Upstream::answering(move |seen| {
        let (status, body) = answer(seen);
        format!("HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len())
    })
}

/// A route whose requests go on with the header `X-Token: <reference>`.
fn route(gw: &Gateway, up: &Upstream, reference: &str) {
    gw.route("1", "/get", up, json!({"proxy-rewrite": {"headers": {"set": {"X-Token": reference}}}}));
}

/// A reference that stays reaches proxy-rewrite, which takes `$env` and `$secret` in it for variables without a value.
fn as_written(reference: &str) -> &str {
    reference.trim_start_matches("$env").trim_start_matches("$secret")
}

#[test]
fn a_plugin_sees_what_vault_says_and_asks_it_once() {
    let vault = manager(|seen| match seen.header("x-vault-token") {
        Some("root") => (200, json!({"data": {"token": "opened"}}).to_string()),
        _ => (403, json!({"errors": ["permission denied"]}).to_string()),
    });
    let up = Upstream::echo();
    let gw = Gateway::start();
    let uri = format!("http://{}", vault.addr());
    gw.put("/secrets/vault/1", json!({"uri": uri, "prefix": "kv/apisix", "token": "root", "namespace": "team"}));
    route(&gw, &up, "$secret://vault/1/gateway/token");
    for _ in 0..6 {
        assert_eq!(gw.get("/get").status, 200);
        assert_eq!(up.last().header("x-token"), Some("opened"));
    }
    let asked = vault.seen();
    assert_eq!(asked[0].target, "/v1/kv/apisix/gateway");
    assert_eq!(asked[0].header("x-vault-namespace"), Some("team"));
    assert!(asked.len() <= 2, "once for each worker: {}", asked.len());

    gw.put("/secrets/vault/1", json!({"uri": uri, "prefix": "kv/apisix", "token": "wrong"}));
    assert_eq!(gw.get("/get").status, 200);
    assert_eq!(
        up.last().header("x-token"),
        Some(as_written("$secret://vault/1/gateway/token")),
        "a manager's change counts at once"
    );
    gw.expect_log(
        "failed to resolve secret reference: $secret://vault/1/gateway/token, field: X-Token, err: failed to decode result, client: ",
    );
    assert!(!gw.log().contains("permission denied"), "what a manager answers is not for the log");
}

#[test]
fn the_longest_name_of_an_aws_secret_is_taken() {
    let aws = manager(|seen| {
        let known = String::from_utf8_lossy(&seen.body).contains("\"john/secret\"");
        match known {
            true => (200, json!({"SecretString": "{\"key\":\"value\"}"}).to_string()),
            false => (400, json!({"__type": "ResourceNotFoundException"}).to_string()),
        }
    });
    let up = Upstream::echo();
    let gw = Gateway::start();
    let conf = json!({
        "endpoint_url": format!("http://{}", aws.addr()), "region": "eu-west-1",
        "access_key_id": "access", "secret_access_key": "secret", "session_token": "session",
    });
    gw.put("/secrets/aws/main", conf);
    route(&gw, &up, "$secret://aws/main/john/secret/key");
    assert_eq!(gw.get("/get").status, 200);
    assert_eq!(up.last().header("x-token"), Some("value"));
    let asked = aws.seen();
    assert_eq!(asked.len(), 2, "john/secret/key, then john/secret");
    let signed = asked[0].header("authorization").expect("it is signed").to_owned();
    assert!(signed.starts_with("AWS4-HMAC-SHA256 Credential=access/"), "{signed}");
    assert!(signed.contains("/eu-west-1/secretsmanager/aws4_request, SignedHeaders="), "{signed}");
    assert_eq!(asked[0].header("x-amz-target"), Some("secretsmanager.GetSecretValue"));
    assert_eq!(asked[0].header("x-amz-security-token"), Some("session"));

    route(&gw, &up, "$secret://aws/main/nobody");
    assert_eq!(gw.get("/get").status, 200);
    gw.expect_log(
        "err: failed to retrieve data from aws secret manager: SecretsManager:getSecretValue() was answered 400",
    );
}

#[test]
fn what_has_no_value_stays_and_is_told() {
    let up = Upstream::echo();
    let gw = Gateway::with(json!({"nginx_config": {"envs": ["GATEWAY_TOKEN=of the file"]}}));
    route(&gw, &up, "$env://GATEWAY_TOKEN");
    assert_eq!(gw.get("/get").status, 200);
    assert_eq!(up.last().header("x-token"), Some("of the file"));
    for (reference, reason) in [
        ("$env://NOT_SET_ANYWHERE", "there is no such value"),
        ("$secret://vault/none/a/b", "no secret conf, secret_uri: $secret://vault/none/a/b"),
        ("$secret://vault/none", "error format: no secret conf id"),
    ] {
        route(&gw, &up, reference);
        assert_eq!(gw.get("/get").status, 200);
        assert_eq!(up.last().header("x-token"), Some(as_written(reference)));
        gw.expect_log(&format!("failed to resolve secret reference: {reference}, field: X-Token, err: {reason}"));
    }
}

#[test]
fn a_reference_passes_the_schema_of_its_field() {
    let up = Upstream::echo();
    let gw = Gateway::with(json!({"nginx_config": {"envs": ["PATH_OF_IT=/other"]}}));
    gw.route("1", "/get", &up, json!({"proxy-rewrite": {"uri": "$env://PATH_OF_IT"}}));
    assert_eq!(gw.get("/get").status, 200);
    assert_eq!(up.last().target, "/other");
    let refused = gw.admin("PUT", "/routes/2", json!({"uri": "/b", "plugins": {"proxy-rewrite": {"uri": "other"}}}));
    assert_eq!(refused.status, 400, "{}", refused.text());
}

#[test]
fn a_reference_that_cannot_be_resolved_is_no_password_and_is_asked_for_again() {
    let up = Upstream::echo();
    let gw = Gateway::with(json!({"nginx_config": {"envs": ["THERE=open"]}}));
    let basic = |user: &str, password: &str| {
        gw.put(
            "/consumers",
            json!({"username": user, "plugins": {"basic-auth": {"username": user, "password": password}}}),
        );
    };
    basic("jack", "$env://NOT_THERE");
    basic("jill", "$env://THERE");
    gw.route("1", "/get", &up, json!({"basic-auth": {}}));
    let status = |user: &str, password: &str| {
        use base64::{Engine, engine::general_purpose::STANDARD};
        let given = format!("Basic {}", STANDARD.encode(format!("{user}:{password}")));
        gw.send("GET", "/get", &[("Authorization", &given)], b"").status
    };
    assert_eq!((status("jack", "$env://NOT_THERE"), status("jack", "")), (401, 401));
    assert_eq!((status("jill", "open"), status("jill", "$env://THERE")), (200, 401));
}

/// One worker, whose cache holds a second and for `stale_ttl` seconds after a failure.
fn impatient(stale_ttl: u32) -> Gateway {
    Gateway::with(json!({
        "apisix": {"lru": {"secret": {"ttl": 1, "neg_ttl": 1, "stale_ttl": stale_ttl}}},
        "nginx_config": {"worker_processes": 1, "error_log_level": "debug"},
    }))
}

/// A manager of Vault's kind that answers by what the number says: a value, an outage, another value, a refusal.
fn moody() -> (Upstream, Arc<AtomicUsize>) {
    let mood = Arc::new(AtomicUsize::new(0));
    let by = mood.clone();
    let vault = manager(move |_| match by.load(Ordering::SeqCst) {
        0 => (200, json!({"data": {"token": "first-of-it"}}).to_string()),
        1 => (503, json!({"errors": ["Vault is sealed"]}).to_string()),
        2 => (200, json!({"data": {"token": "second-of-it"}}).to_string()),
        3 => (403, json!({"errors": ["permission denied"]}).to_string()),
        _ => (200, json!({"data": {"token": null}}).to_string()),
    });
    (vault, mood)
}

const TOKEN: &str = "$secret://vault/1/gateway/token";

fn through_vault(gw: &Gateway, vault: &Upstream, up: &Upstream) {
    gw.put("/secrets/vault/1", json!({"uri": format!("http://{}", vault.addr()), "prefix": "kv", "token": "root"}));
    route(gw, up, TOKEN);
}

/// Asks until the upstream sees this value.
fn expect_token(gw: &Gateway, up: &Upstream, value: &str) {
    eventually(value, || {
        assert_eq!(gw.get("/get").status, 200);
        (up.last().header("x-token") == Some(value)).then_some(())
    });
}

#[test]
fn the_last_value_outlives_an_outage_of_its_manager_but_not_a_refusal() {
    let (vault, mood) = moody();
    let (up, gw) = (Upstream::echo(), impatient(3600));
    through_vault(&gw, &vault, &up);
    expect_token(&gw, &up, "first-of-it");

    mood.store(1, Ordering::SeqCst);
    let failed = format!("failed to refresh secret {TOKEN}, its value of ");
    eventually("two failed attempts", || {
        assert_eq!(gw.get("/get").status, 200);
        assert_eq!(up.last().header("x-token"), Some("first-of-it"));
        (gw.log().matches(&failed).count() >= 2).then_some(())
    });
    assert!(gw.log().contains("seconds ago goes on: failed to decode result"));
    assert!(gw.log().contains("vault answered with status 503 for key: gateway, client: "));

    mood.store(2, Ordering::SeqCst);
    expect_token(&gw, &up, "second-of-it");
    mood.store(3, Ordering::SeqCst);
    expect_token(&gw, &up, as_written(TOKEN));
    mood.store(2, Ordering::SeqCst);
    expect_token(&gw, &up, "second-of-it");
    mood.store(4, Ordering::SeqCst);
    expect_token(&gw, &up, as_written(TOKEN));
    let last = format!("failed to resolve secret reference: {TOKEN}, field: X-Token, err: there is no such value");
    gw.expect_log(&last);
    assert!(!gw.log().contains("-of-it"), "values are not for the log");
}

#[test]
fn the_last_value_has_an_end() {
    let (vault, mood) = moody();
    let (up, gw) = (Upstream::echo(), impatient(2));
    through_vault(&gw, &vault, &up);
    expect_token(&gw, &up, "first-of-it");
    mood.store(1, Ordering::SeqCst);
    gw.get("/get");
    expect_token(&gw, &up, as_written(TOKEN));
    gw.expect_log(&format!(
        "failed to resolve secret reference: {TOKEN}, field: X-Token, err: failed to decode result"
    ));
}

#[test]
fn a_phase_that_cannot_wait_gets_what_is_known() {
    let (vault, mood) = moody();
    let (up, gw) = (Upstream::echo(), impatient(3600));
    gw.put("/secrets/vault/1", json!({"uri": format!("http://{}", vault.addr()), "prefix": "kv", "token": "root"}));
    let ask = "return function(conf, ctx)
        local value, err = require('apisix.secret').fetch_known('$secret://vault/1/gateway/token')
        ngx.header['X-Found'], ngx.header['X-Why'] = tostring(value), err
    end";
    let asking = |id: &str, phase: &str| {
        let plugin = json!({"serverless-pre-function": {"phase": phase, "functions": [ask]}});
        gw.route(id, &format!("/{phase}"), &up, plugin);
    };
    asking("1", "access");
    asking("2", "header_filter");
    let found = |uri: &str| gw.get(uri).header("x-found").map(str::to_owned);
    let refused = gw.get("/header_filter");
    assert_eq!(refused.header("x-found"), Some("nil"));
    assert_eq!(refused.header("x-why"), Some("a manager of secrets cannot be asked in this phase"));
    assert!(vault.seen().is_empty());
    assert_eq!(found("/access").as_deref(), Some("first-of-it"));
    mood.store(1, Ordering::SeqCst);
    eventually("its time is over", || {
        found("/access");
        gw.log().contains("failed to refresh secret").then_some(())
    });
    assert_eq!(found("/header_filter").as_deref(), Some("first-of-it"));
}

#[test]
fn a_manager_that_takes_its_time_is_left_after_four_seconds_and_asked_once() {
    let drip = Upstream::serving(|_, stream| {
        let mut stream = BufReader::new(stream);
        if read_request(&mut stream).is_none() {
            return;
        }
        let _ = stream.get_mut().write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n");
        // A byte now and then: no single wait of the gateway's is long.
        while stream.get_mut().write_all(b" ").is_ok() {
            thread::park_timeout(Duration::from_millis(20));
        }
    });
    let up = Upstream::echo();
    let gw = Gateway::with(json!({"nginx_config": {"worker_processes": 1}}));
    through_vault(&gw, &drip, &up);
    let began = Instant::now();
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| assert_eq!(gw.get("/get").status, 200));
        }
    });
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert_eq!(drip.connections(), 1, "the others waited for the first");
    assert_eq!(up.last().header("x-token"), Some(as_written(TOKEN)));
    gw.expect_log(&format!("{TOKEN}, field: X-Token, err: no answer within 4 seconds"));
}

/// Eight threads that want the same value from a cache where one makes it for all; what `create` is, and what came of it.
fn eight_threads(create: &str) -> serde_json::Value {
    let gw = Gateway::with(json!({"nginx_config": {"worker_processes": 1}}));
    let script = format!(
        "return function()
        local cache = require('apisix.core').lrucache.new({{ ttl = 60, count = 8, serial_creating = true, invalid_stale = true }})
        local calls, running, most, got, threads = 0, 0, 0, {{}}, {{}}
        local function create()
            calls, running = calls + 1, running + 1
            most = math.max(most, running)
            local value, err = (function() {create} end)()
            running = running - 1
            return value, err
        end
        local function want()
            local value, err = cache('key', 1, create)
            got[#got + 1] = tostring(value) .. ' ' .. tostring(err)
        end
        for i = 1, 8 do threads[i] = ngx.thread.spawn(want) end
        for i = 1, 8 do ngx.thread.wait(threads[i]) end
        return 200, {{ calls = calls, most = most, got = got }}
    end"
    );
    let plugin = json!({"phase": "access", "functions": [script]});
    gw.put("/routes/1", json!({"uri": "/get", "plugins": {"serverless-pre-function": plugin}}));
    gw.get("/get").json()
}

#[test]
fn those_who_wait_for_a_value_take_turns_when_it_comes_to_nothing() {
    let told = eight_threads("ngx.sleep(0.01) return nil, 'none'");
    assert_eq!((&told["calls"], &told["most"]), (&json!(8), &json!(1)), "{told}");
    assert!(
        told["got"].as_array().is_some_and(|got| got.len() == 8 && got.iter().all(|one| one == "nil none")),
        "{told}"
    );
}

#[test]
fn of_those_who_wait_for_a_slow_value_one_gets_the_next_turn() {
    let told = eight_threads("local n = calls ngx.sleep(n == 1 and 5.5 or 1.5) return n");
    assert_eq!(told["calls"], 2, "one of seven after five seconds: {told}");
    let got = told["got"].as_array().expect("an array");
    assert_eq!(got.iter().filter(|one| *one == "1 nil").count(), 7, "the late one served the others: {told}");
}

#[test]
fn those_who_wait_for_two_turns_in_vain_are_told_so() {
    let told = eight_threads("ngx.sleep(6) return nil, 'none'");
    assert_eq!(told["calls"], 3, "at the start, after five seconds and after ten: {told}");
    let got = told["got"].as_array().expect("an array");
    assert_eq!(got.iter().filter(|one| *one == "nil timeout").count(), 5, "{told}");
}
