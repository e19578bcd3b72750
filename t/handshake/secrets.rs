//! Certificates and keys that a manager of secrets has: a Vault that says what it is told to.

use std::{
    io::{Read, Write},
    sync::{Arc, Mutex},
};

use rcgen::{CertificateParams, CertifiedKey, KeyPair, PKCS_ED25519};
use rustls::{SignatureScheme, StreamOwned};
use serde_json::{Value, json};

use crate::{
    BOTH, Browser, asking_config, pair,
    support::{Gateway, Upstream, eventually},
};

/// A Vault and what it says, whatever it is asked for; `None`: it is out of order.
struct Vault {
    server: Upstream,
    says: Arc<Mutex<Option<Value>>>,
}

impl Vault {
    fn start() -> Vault {
        let says: Arc<Mutex<Option<Value>>> = Arc::default();
        let said = says.clone();
        let server = Upstream::answering(move |_| {
            let (status, body) = match &*said.lock().expect("no panic") {
                Some(data) => (200, json!({"data": data}).to_string()),
                None => (503, json!({"errors": ["Vault is sealed"]}).to_string()),
            };
            format!(
                "HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            )
        });
        Vault { server, says }
    }

    fn say(&self, data: impl Into<Option<Value>>) {
        *self.says.lock().expect("no panic") = data.into();
    }

    /// Makes it the gateway's `vault/1`.
    fn join(&self, gw: &Gateway) {
        let uri = format!("http://{}", self.server.addr());
        gw.put("/secrets/vault/1", json!({"uri": uri, "prefix": "kv", "token": "root"}));
    }
}

fn pem(pair: &CertifiedKey<KeyPair>) -> Value {
    json!({"cert": pair.cert.pem(), "key": pair.signing_key.serialize_pem()})
}

const CERT: &str = "$secret://vault/1/tls/cert";
const KEY: &str = "$secret://vault/1/tls/key";

/// Kept for a second, so that a test sees them asked for again.
fn short() -> Gateway {
    Gateway::with(json!({"apisix": {"lru": {"secret": {"ttl": 1, "neg_ttl": 1}}}}))
}

#[test]
fn a_certificate_comes_from_a_manager_that_is_asked_once() {
    let (vault, any, second) = (Vault::start(), pair("a.test"), {
        let signing_key = KeyPair::generate_for(&PKCS_ED25519).expect("a key");
        let params = CertificateParams::new(["b.test".to_owned()]).expect("parameters");
        CertifiedKey { cert: params.self_signed(&signing_key).expect("a certificate"), signing_key }
    });
    let gw = Gateway::with(json!({"nginx_config": {"worker_processes": 1}}));
    vault.say(pem(&any));
    vault.join(&gw);
    gw.put("/ssls/1", json!({"sni": "a.test", "cert": CERT, "key": KEY}));
    let browser = Browser::new();
    for _ in 0..8 {
        assert_eq!(browser.connect(&gw, "a.test").expect("a connection").shown.certificate, any.cert.der().as_ref());
    }
    assert_eq!(vault.server.seen().len(), 2, "a certificate and a key, once");

    // `certs` and `keys`, beside what stands there itself.
    vault.say(pem(&second));
    let mut both = pem(&any);
    both["snis"] = json!(["b.test"]);
    both["certs"] = json!(["$secret://vault/1/more/cert"]);
    both["keys"] = json!(["$secret://vault/1/more/key"]);
    gw.put("/ssls/2", both);
    let shown = |schemes| Browser::checking(schemes, BOTH, None).connect(&gw, "b.test").expect("one").shown.certificate;
    assert_eq!(shown(vec![SignatureScheme::ED25519]), second.cert.der().as_ref());
    assert_eq!(shown(vec![SignatureScheme::ECDSA_NISTP256_SHA256]), any.cert.der().as_ref());

    // The authority of clients.
    let known = pair("known");
    let mut third = pem(&any);
    third["ca"] = known.cert.pem().into();
    vault.say(third);
    let of_third = |field: &str| format!("$secret://vault/1/third/{field}");
    let object =
        json!({"sni": "c.test", "cert": of_third("cert"), "key": of_third("key"), "client": {"ca": of_third("ca")}});
    gw.put("/ssls/3", object);
    let browser = |own| Browser::with(&[&rustls::version::TLS12], own);
    assert!(browser(Some(&known)).connect(&gw, "c.test").is_ok());
    assert!(browser(Some(&any)).connect(&gw, "c.test").is_err() && browser(None).connect(&gw, "c.test").is_err());
    assert!(!gw.log().contains("BEGIN"), "nothing of it is in the log");
}

#[test]
fn a_handshake_without_its_certificate_is_refused_and_told() {
    let (vault, any) = (Vault::start(), pair("a.test"));
    let gw = short();
    vault.join(&gw);
    let refused = |reference: &str, why: &str| {
        gw.put("/ssls/1", json!({"sni": "a.test", "cert": reference, "key": KEY}));
        let refused = Browser::new().connect(&gw, "a.test").map(|_| ()).expect_err("it is refused");
        assert!(refused.contains("alert"), "{refused}");
        gw.expect_log(&format!("ssls/1 cannot be served: failed to resolve secret reference: {reference}: {why}"));
    };
    refused(CERT, "failed to decode result");
    refused("$secret://vault/none/a/b", "no secret conf, secret_uri: $secret://vault/none/a/b");
    refused("$secret://nowhere/1/a/b", "no secret conf");
    vault.say(json!({"number": 5, "key": any.signing_key.serialize_pem(), "text": "no certificate"}));
    // What was refused is not asked for again at once: other fields are.
    refused("$secret://vault/1/tls/number", "it is no text");
    refused("$secret://vault/1/tls/none", "there is no such value");
    gw.put("/ssls/1", json!({"sni": "a.test", "cert": "$secret://vault/1/tls/text", "key": KEY}));
    // The key was refused a moment ago, and is asked for again when that is over.
    eventually("the text is looked into", || {
        assert!(Browser::new().connect(&gw, "a.test").is_err());
        gw.log().contains("ssls/1: no certificate in the PEM text").then_some(())
    });

    vault.say(pem(&any));
    gw.put("/ssls/1", json!({"sni": "a.test", "cert": CERT, "key": KEY}));
    let shown = eventually("the certificate is served", || Browser::new().connect(&gw, "a.test").ok()).shown;
    assert_eq!(shown.certificate, any.cert.der().as_ref());
}

#[test]
fn what_was_served_goes_on_until_there_is_a_whole_new_pair() {
    let (vault, old, new) = (Vault::start(), pair("a.test"), pair("a.test"));
    let gw = short();
    vault.say(pem(&old));
    vault.join(&gw);
    gw.put("/ssls/1", json!({"sni": "a.test", "cert": CERT, "key": KEY}));
    let browser = Browser::new();
    let shown = || browser.connect(&gw, "a.test").expect("a connection").shown.certificate;
    let goes_on_until = |text: &str| {
        eventually(text, || {
            assert_eq!(shown(), old.cert.der().as_ref());
            gw.log().contains(text).then_some(())
        });
    };
    // Both workers have it.
    eventually("each worker has asked", || {
        assert_eq!(shown(), old.cert.der().as_ref());
        (vault.server.seen().len() >= 4).then_some(())
    });
    vault.say(None);
    goes_on_until("failed to refresh secret $secret://vault/1/tls/cert, its value of");
    vault.say(json!({"cert": new.cert.pem(), "key": old.signing_key.serialize_pem()}));
    goes_on_until("ssls/1: key and certificate do not match; what was served before goes on");
    vault.say(pem(&new));
    eventually("the new one is served", || (shown() == new.cert.der().as_ref()).then_some(()));
}

/// A node that speaks HTTP over TLS, asks for the client's certificate, and answers with its length. Keeps those of probes, whose path is
/// `/probe`.
fn node() -> (Upstream, Arc<Mutex<Vec<String>>>) {
    let config = Arc::new(asking_config(&pair("node.test")));
    let probes: Arc<Mutex<Vec<String>>> = Arc::default();
    let kept = probes.clone();
    let node = Upstream::serving(move |_, stream| {
        let mut tls = StreamOwned::new(rustls::ServerConnection::new(config.clone()).expect("a server"), stream);
        if tls.conn.complete_io(&mut tls.sock).is_err() {
            return;
        }
        let shown = tls.conn.peer_certificates().map_or(0, |certs| certs[0].len()).to_string();
        let mut some = [0; 4096];
        let n = tls.read(&mut some).unwrap_or_default();
        if some[..n].starts_with(b"GET /probe ") {
            kept.lock().expect("no panic").push(shown.clone());
        }
        let _ = write!(tls, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{shown}", shown.len());
        tls.conn.send_close_notify();
        let _ = tls.flush();
    });
    (node, probes)
}

#[test]
fn a_node_is_shown_a_certificate_that_a_manager_has() {
    let (vault, own, (node, _)) = (Vault::start(), pair("gateway"), node());
    let gw = Gateway::with(json!({"nginx_config": {"worker_processes": 1}}));
    vault.join(&gw);
    let to = |tls: Value| json!({"uri": "/t", "upstream": {"scheme": "https", "nodes": {node.addr(): 1}, "tls": tls}});
    gw.put("/routes/1", to(json!({"client_cert": CERT, "client_key": KEY})));
    assert_eq!(gw.get("/t").status, 503, "{}", gw.get("/t").text());
    gw.expect_log(&format!("failed to resolve secret reference: {CERT}: failed to decode result"));
    vault.say(pem(&own));
    vault.join(&gw);
    let shown = own.cert.der().len().to_string();
    assert_eq!(gw.get("/t").text(), shown);
    let asked = vault.server.seen().len();
    for _ in 0..4 {
        assert_eq!(gw.get("/t").text(), shown);
    }
    assert_eq!(vault.server.seen().len(), asked, "it is kept");

    gw.put("/ssls/own", json!({"type": "client", "cert": CERT, "key": KEY}));
    gw.put("/routes/1", to(json!({"client_cert_id": "own"})));
    assert_eq!(gw.get("/t").text(), shown);
    gw.put("/routes/1", to(json!({})));
    assert_eq!(gw.get("/t").text(), "0");
}

#[test]
fn probes_show_what_requests_have_looked_up() {
    let (vault, own, (node, probes)) = (Vault::start(), pair("gateway"), node());
    let gw = short();
    vault.join(&gw);
    let active = json!({"type": "https", "http_path": "/probe", "https_verify_certificate": false,
        "healthy": {"interval": 1}, "unhealthy": {"interval": 1}});
    let upstream = json!({"scheme": "https", "nodes": {node.addr(): 1}, "checks": {"active": active},
        "tls": {"client_cert": "$secret://vault/1/probes/cert", "client_key": "$secret://vault/1/probes/key"}});
    gw.put("/routes/1", json!({"uri": "/t", "upstream": upstream}));
    assert_eq!(gw.get("/t").status, 503);
    assert_eq!(node.connections(), 0, "neither a request nor a probe comes without a certificate");
    vault.say(pem(&own));
    let shown = own.cert.der().len().to_string();
    eventually("a request has it", || (gw.get("/t").text() == shown).then_some(()));
    let seen =
        eventually("a probe has it", || Some(probes.lock().expect("no panic").clone()).filter(|p| !p.is_empty()));
    assert!(seen.iter().all(|probe| *probe == shown), "{seen:?}");
}
