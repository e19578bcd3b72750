//! References to secrets: plugins see values, of the environment, Vault and AWS; what cannot be had is told.

use serde_json::json;

use crate::support::{Gateway, Upstream, upstream::Seen};

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
