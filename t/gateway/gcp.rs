//! Secrets of Google Cloud: a token server that checks the assertion, and a manager that checks the token.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{
    Engine,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use ring::{
    rsa::{KeyPair, PublicKeyComponents},
    signature::RSA_PKCS1_2048_8192_SHA256,
};
use serde_json::{Value, json};

use crate::support::{Gateway, Upstream, upstream::Seen};

const KEY: &str = include_str!("../../src/lua/host/testdata/rsa.pem");
const EMAIL: &str = "gateway@moon.iam.gserviceaccount.test";

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs()
}

/// The public half of the account's key.
fn public_key() -> PublicKeyComponents<Vec<u8>> {
    let der: String = KEY.lines().filter(|line| !line.starts_with("-----")).collect();
    let pair = KeyPair::from_pkcs8(&STANDARD.decode(der).expect("base64")).expect("a key");
    PublicKeyComponents::from(pair.public())
}

/// The fields of a form whose values have only `:` escaped.
fn form(body: &[u8]) -> HashMap<String, String> {
    let text = String::from_utf8_lossy(body).replace("%3A", ":").replace("%3a", ":");
    text.split('&').filter_map(|field| field.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
}

fn decoded(part: &str) -> Value {
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).expect("base64url")).expect("JSON")
}

/// The claims of an assertion whose signature holds; what is wrong with it otherwise.
fn verified(assertion: &str) -> Result<Value, String> {
    let (signed, signature) = assertion.rsplit_once('.').ok_or("no JWT")?;
    let (header, claims) = signed.split_once('.').ok_or("no JWT")?;
    if decoded(header)["alg"] != "RS256" {
        return Err(format!("alg {}", decoded(header)));
    }
    let signature = URL_SAFE_NO_PAD.decode(signature).map_err(|e| e.to_string())?;
    public_key()
        .verify(&RSA_PKCS1_2048_8192_SHA256, signed.as_bytes(), &signature)
        .map_err(|_| "the signature does not hold")?;
    Ok(decoded(claims))
}

fn http(status: u16, body: &Value) -> String {
    let body = body.to_string();
    format!("HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

/// Google, as far as the gateway sees it.
#[derive(Clone)]
struct Google {
    server: Upstream,
    /// Claims of each assertion, in the order of the tokens: token-1, token-2…
    claims: Arc<Mutex<Vec<Value>>>,
    /// Tokens below this number are no longer taken.
    valid_from: Arc<AtomicUsize>,
    /// Seconds that a token lives.
    expires_in: Arc<AtomicU64>,
}

impl Google {
    fn start() -> Self {
        let (claims, valid_from): (Arc<Mutex<Vec<Value>>>, Arc<AtomicUsize>) = Default::default();
        let expires_in = Arc::new(AtomicU64::new(3600));
        let (into, from, life) = (claims.clone(), valid_from.clone(), expires_in.clone());
        let server = Upstream::answering(move |seen| match seen.target.as_str() {
            "/token" => grant(seen, &mut into.lock().expect("not poisoned"), life.load(Ordering::SeqCst)),
            _ => secret(seen, from.load(Ordering::SeqCst)),
        });
        Google { server, claims, valid_from, expires_in }
    }

    fn conf(&self, scope: &str) -> Value {
        let base = format!("http://{}", self.server.addr());
        json!({"auth_config": {
            "client_email": EMAIL, "private_key": KEY, "project_id": "moon", "token_uri": format!("{base}/token"),
            "scope": [scope], "entries_uri": format!("{base}/v1"),
        }})
    }

    fn tokens(&self) -> usize {
        self.claims.lock().expect("not poisoned").len()
    }
}

/// The token endpoint: RFC 7523, 3.
fn grant(seen: &Seen, known: &mut Vec<Value>, expires_in: u64) -> String {
    let form = form(&seen.body);
    assert_eq!(form["grant_type"], "urn:ietf:params:oauth:grant-type:jwt-bearer");
    let claims = match verified(&form["assertion"]) {
        Ok(claims) => claims,
        Err(why) => {
            return http(
                401,
                &json!({"error": "invalid_grant", "error_description": why, "assertion": form["assertion"]}),
            );
        }
    };
    if claims["scope"] != "cloud" {
        return http(401, &json!({"error": "invalid_scope", "leak": form["assertion"]}));
    }
    known.push(claims);
    let token = format!("token-{}", known.len());
    http(200, &json!({"access_token": token, "token_type": "Bearer", "expires_in": expires_in}))
}

/// `versions.access` of a secret.
fn secret(seen: &Seen, valid_from: usize) -> String {
    let token = seen.header("authorization").and_then(|value| value.strip_prefix("Bearer token-"));
    if token.and_then(|n| n.parse().ok()).is_none_or(|n: usize| n < valid_from) {
        return http(401, &json!({"error": {"code": 401, "status": "UNAUTHENTICATED"}}));
    }
    let data = match seen.target.as_str() {
        "/v1/projects/moon/secrets/plain/versions/latest:access" => "plain-value",
        "/v1/projects/moon/secrets/object/versions/latest:access" => "{\"key\":\"inner-value\"}",
        "/v1/projects/moon/secrets/odd/versions/latest:access" => {
            return http(200, &json!({"payload": {"data": "%odd-value%"}}));
        }
        _ => return http(404, &json!({"error": {"code": 404, "status": "NOT_FOUND"}})),
    };
    http(200, &json!({"name": "n", "payload": {"data": STANDARD.encode(data)}}))
}

/// One worker, which keeps what it was told for a second.
fn gateway() -> Gateway {
    let gw = Gateway::with(json!({
        "apisix": {"lru": {"secret": {"ttl": 1, "neg_ttl": 1}}},
        "nginx_config": {"worker_processes": 1, "error_log_level": "debug"},
    }));
    let ask = "return function(conf, ctx)
        local value, err = require('apisix.secret').fetch_by_uri('$secret://gcp/' .. ctx.var.arg_key)
        return 200, { value = value, err = err }
    end";
    let plugin = json!({"phase": "access", "functions": [ask]});
    gw.put("/routes/1", json!({"uri": "/ask", "plugins": {"serverless-pre-function": plugin}}));
    gw
}

/// What `apisix.secret` says of a key.
fn ask(gw: &Gateway, key: &str) -> Value {
    gw.get(&format!("/ask?key={key}")).json()
}

#[test]
fn a_token_is_asked_for_with_a_signed_assertion_and_kept() {
    let (google, gw) = (Google::start(), gateway());
    gw.put("/secrets/gcp/1", google.conf("cloud"));
    let before = now();
    assert_eq!(ask(&gw, "1/plain"), json!({"value": "plain-value"}));
    assert_eq!(ask(&gw, "1/object/key"), json!({"value": "inner-value"}));
    assert_eq!(ask(&gw, "1/object/none"), json!({}));
    assert_eq!(google.tokens(), 1, "the token holds for an hour");
    let claims = google.claims.lock().expect("not poisoned")[0].clone();
    assert_eq!((claims["iss"].as_str(), claims["scope"].as_str()), (Some(EMAIL), Some("cloud")));
    assert_eq!(claims["aud"], format!("http://{}/token", google.server.addr()));
    let (issued, expires) = (claims["iat"].as_u64().expect("a time"), claims["exp"].as_u64().expect("a time"));
    assert!((before.saturating_sub(2)..=now() + 2).contains(&issued), "{claims}");
    assert_eq!(expires, issued + 3600, "Google allows an hour at most");
}

#[test]
fn a_token_is_renewed_before_its_end_and_when_it_is_refused() {
    let (google, gw) = (Google::start(), gateway());
    gw.put("/secrets/gcp/1", google.conf("cloud"));
    // Less than the minute before its end in which a token is renewed.
    google.expires_in.store(59, Ordering::SeqCst);
    assert_eq!(ask(&gw, "1/plain")["value"], "plain-value");
    google.expires_in.store(3600, Ordering::SeqCst);
    assert_eq!(ask(&gw, "1/plain")["value"], "plain-value");
    assert_eq!(google.tokens(), 2);
    assert_eq!(ask(&gw, "1/plain")["value"], "plain-value");
    assert_eq!(google.tokens(), 2);

    google.valid_from.store(3, Ordering::SeqCst);
    let refused = ask(&gw, "1/plain");
    assert_eq!(
        refused["err"],
        "failed to retrtive data from gcp secret manager: invalid response status 401 (UNAUTHENTICATED)"
    );
    assert_eq!(ask(&gw, "1/plain")["value"], "plain-value", "the next one has a new token");
    assert_eq!(google.tokens(), 3);
}

#[test]
fn a_refused_account_and_what_is_no_secret_are_told_without_values() {
    let (google, gw) = (Google::start(), gateway());
    gw.put("/secrets/gcp/1", google.conf("cloud"));
    gw.put("/secrets/gcp/2", google.conf("everything"));
    let of = |err: &str| json!({"err": format!("failed to retrtive data from gcp secret manager: {err}")});
    assert_eq!(ask(&gw, "2/plain"), of("failed to get google oauth token"));
    gw.expect_log("failed to refresh google oauth access token, status: 401, error: {\"error\":\"invalid_scope\"}");
    assert_eq!(ask(&gw, "1/none"), of("invalid response status 404 (NOT_FOUND)"));
    assert_eq!(ask(&gw, "1/odd"), of("failed to parse response data, err: there is no payload"));
    assert_eq!(ask(&gw, "1//plain"), json!({"err": "can't find main key, key: /plain"}));
    let no_object = ask(&gw, "1/plain/field");
    assert!(
        no_object["err"].as_str().is_some_and(|err| err.starts_with("failed to decode result, err: ")),
        "{no_object}"
    );

    let mut forged = google.conf("cloud");
    forged["auth_config"]["private_key"] = json!("no key");
    gw.put("/secrets/gcp/3", forged);
    assert_eq!(ask(&gw, "3/plain"), of("failed to get google oauth token"));
    gw.expect_log("failed to sign the assertion for google oauth token: ");
    let log = gw.log();
    for value in
        ["plain-value", "inner-value", "odd-value", "token-1", "PRIVATE KEY", "eyJ", &STANDARD.encode("plain-value")]
    {
        assert!(!log.contains(value), "{value} is not for the log");
    }
}

#[test]
fn a_key_that_cannot_sign_is_told_and_nothing_sent() {
    let key = rcgen::KeyPair::generate().expect("a key of another kind");
    let (google, gw) = (Google::start(), gateway());
    let mut conf = google.conf("cloud");
    conf["auth_config"]["private_key"] = json!(key.serialize_pem());
    gw.put("/secrets/gcp/1", conf);
    let told = ask(&gw, "1/plain");
    assert_eq!(told["err"], "failed to retrtive data from gcp secret manager: failed to get google oauth token");
    gw.expect_log("failed to sign the assertion for google oauth token: ");
    assert!(google.server.seen().is_empty());
}
