//! TLS on both sides: certificates and routes by SNI, and what nodes are told.

use std::{
    io::{Read, Write},
    net::TcpStream,
    sync::Arc,
};

use rcgen::{CertifiedKey, KeyPair};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned,
    crypto::{CryptoProvider, ring},
    pki_types::{PrivatePkcs8KeyDer, ServerName},
    server::WebPkiClientVerifier,
};
use serde_json::{Value, json};

use crate::{
    listening, node,
    support::{DEADLINE, Gateway, Upstream},
    to,
};

fn certificate(names: &[&str]) -> CertifiedKey<KeyPair> {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    rcgen::generate_simple_self_signed(names).expect("a certificate")
}

fn ssl(pair: &CertifiedKey<KeyPair>, snis: Value) -> Value {
    json!({"cert": pair.cert.pem(), "key": pair.signing_key.serialize_pem(), "snis": snis})
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// A client that trusts this certificate, and shows one of its own.
fn client(trusted: &CertifiedKey<KeyPair>, own: Option<&CertifiedKey<KeyPair>>, alpn: &[&str]) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.cert.der().clone()).expect("a root");
    let builder = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
    let builder = builder.expect("versions").with_root_certificates(roots);
    let mut config = match own {
        Some(pair) => builder
            .with_client_auth_cert(
                vec![pair.cert.der().clone()],
                PrivatePkcs8KeyDer::from(pair.signing_key.serialize_der()).into(),
            )
            .expect("a client's certificate"),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    Arc::new(config)
}

/// Sends over TLS, ends its direction, and reads to the end.
fn ask(address: &str, config: &Arc<ClientConfig>, name: &'static str, text: &str) -> Result<String, String> {
    let tcp = TcpStream::connect(address).map_err(|e| e.to_string())?;
    tcp.set_read_timeout(Some(DEADLINE)).expect("a timeout");
    let name = ServerName::try_from(name).expect("a name");
    let connection = ClientConnection::new(config.clone(), name).expect("a client");
    let mut tls = StreamOwned::new(connection, tcp);
    tls.write_all(text.as_bytes()).map_err(|e| e.to_string())?;
    tls.conn.send_close_notify();
    tls.flush().map_err(|e| e.to_string())?;
    let mut answer = String::new();
    tls.read_to_string(&mut answer).map_err(|e| e.to_string())?;
    Ok(answer)
}

/// A gateway with one TLS address, and what else config.yaml says of `apisix`.
fn gateway(apisix: Value) -> Gateway {
    let mut settings = listening(json!([{"addr": "127.0.0.1:0", "tls": true}, "127.0.0.1:0"]), json!([]));
    settings["apisix"].as_object_mut().expect("a map").extend(apisix.as_object().expect("a map").clone());
    Gateway::with(settings)
}

#[test]
fn certificates_and_routes_are_chosen_by_name() {
    let (a, b, c) = (node("a"), node("b"), node("c"));
    let pair = certificate(&["x.moon.test", "y.moon.test", "z.z.moon.test"]);
    let config = client(&pair, None, &[]);
    let gw = gateway(json!({}));
    let refused = ask(&gw.tcp(), &config, "x.moon.test", "x").expect_err("there is no certificate");
    assert!(refused.contains("alert"), "{refused}");
    gw.expect_log("failed to match any SSL certificate by SNI: x.moon.test");
    gw.put("/ssls/1", ssl(&pair, json!(["*.moon.test", "z.z.moon.test"])));
    gw.put("/stream_routes/1", json!({"upstream": to(c.addr())}));
    gw.put("/stream_routes/2", json!({"sni": "*.moon.test", "upstream": to(b.addr())}));
    gw.put("/stream_routes/3", json!({"sni": "X.moon.test", "upstream": to(a.addr())}));
    let says = |name| ask(&gw.tcp(), &config, name, "hello").expect("an answer");
    assert_eq!([says("x.moon.test"), says("y.moon.test"), says("z.z.moon.test")], ["a hello", "b hello", "b hello"]);
    let far = json!({"sni": "x.moon.test", "remote_addr": "10.0.0.1", "upstream": to(a.addr())});
    gw.put("/stream_routes/3", far);
    assert_eq!(says("x.moon.test"), "b hello");
    gw.admin("DELETE", "/stream_routes/2", ());
    assert_eq!(says("x.moon.test"), "c hello");
    // Whatever is spoken inside: the gateway has no say in it.
    let database = client(&pair, None, &["postgresql"]);
    assert_eq!(ask(&gw.tcp(), &database, "x.moon.test", "hello").expect("an answer"), "c hello");
    let long = "0123456789".repeat(1 << 18);
    assert_eq!(ask(&gw.tcp(), &config, "x.moon.test", &long).expect("an answer").len(), long.len() + 2);
}

#[test]
fn a_client_without_a_name_is_given_the_fallback() {
    let (a, b) = (node("a"), node("b"));
    let pair = certificate(&["127.0.0.1"]);
    let config = client(&pair, None, &[]);
    let gw = gateway(json!({"ssl": {"fallback_sni": "a.moon.test", "listen": [{"ip": "127.0.0.1", "port": 0}]}}));
    gw.put("/ssls/1", ssl(&pair, json!(["a.moon.test"])));
    gw.put("/stream_routes/1", json!({"upstream": to(b.addr())}));
    gw.put("/stream_routes/2", json!({"sni": "a.moon.test", "upstream": to(a.addr())}));
    assert_eq!(ask(&gw.tcp(), &config, "127.0.0.1", "hello").expect("an answer"), "a hello");
}

#[test]
fn a_client_certificate_is_asked_for_and_no_path_excuses_it() {
    let up = node("a");
    let (server, known, unknown) = (certificate(&["a.moon.test"]), certificate(&["known"]), certificate(&["unknown"]));
    let gw = gateway(json!({}));
    gw.put("/stream_routes/1", json!({"upstream": to(up.addr())}));
    let mut mutual = ssl(&server, json!(["a.moon.test"]));
    for skip in [json!([]), json!([".*"])] {
        mutual["client"] = json!({"ca": known.cert.pem()});
        if skip != json!([]) {
            mutual["client"]["skip_mtls_uri_regex"] = skip;
        }
        gw.put("/ssls/1", mutual.clone());
        let says = |own| ask(&gw.tcp(), &client(&server, own, &[]), "a.moon.test", "hello");
        assert_eq!(says(Some(&known)).expect("an answer"), "a hello");
        assert!(!says(None).is_ok_and(|answer| answer.contains("hello")));
        assert!(!says(Some(&unknown)).is_ok_and(|answer| answer.contains("hello")));
    }
    assert_eq!(up.connections(), 2);
    gw.expect_log("client certificate verification is not passed: NONE");
}

/// A node that speaks TLS, and answers with the name that it was asked for and what it has read. `clients`: whose it takes.
fn tls_node(pair: &CertifiedKey<KeyPair>, clients: Option<&CertifiedKey<KeyPair>>) -> Upstream {
    let builder = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
    let builder = builder.expect("versions");
    let builder = match clients {
        Some(known) => {
            let mut roots = RootCertStore::empty();
            roots.add(known.cert.der().clone()).expect("a root");
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider());
            builder.with_client_cert_verifier(verifier.build().expect("a verifier"))
        }
        None => builder.with_no_client_auth(),
    };
    let key = PrivatePkcs8KeyDer::from(pair.signing_key.serialize_der()).into();
    let config = Arc::new(builder.with_single_cert(vec![pair.cert.der().clone()], key).expect("a certificate"));
    Upstream::serving(move |_, tcp| {
        let connection = ServerConnection::new(config.clone()).expect("a server");
        let mut tls = StreamOwned::new(connection, tcp);
        let mut text = String::new();
        if tls.read_to_string(&mut text).is_err() {
            return;
        }
        let name = tls.conn.server_name().unwrap_or("nobody").to_owned();
        let _ = write!(tls, "{name} {text}");
        tls.conn.send_close_notify();
        let _ = tls.flush();
    })
}

/// Sends without TLS, ends its direction, and reads to the end.
fn ask_plain(address: &str, text: &str) -> String {
    let mut tcp = TcpStream::connect(address).expect("connects");
    tcp.set_read_timeout(Some(DEADLINE)).expect("a timeout");
    let _ = tcp.write_all(text.as_bytes());
    let _ = tcp.shutdown(std::net::Shutdown::Write);
    let mut answer = String::new();
    let _ = tcp.read_to_string(&mut answer);
    answer
}

#[test]
fn a_node_is_spoken_to_over_tls_and_told_the_clients_name() {
    let (server, own) = (certificate(&["a.moon.test"]), certificate(&["own"]));
    let up = tls_node(&server, None);
    let gw = gateway(json!({}));
    let [over_tls, plain] = gw.addresses("tcp").try_into().expect("two addresses");
    gw.put("/ssls/1", ssl(&server, json!(["a.moon.test"])));
    gw.put("/upstreams/u", json!({"scheme": "tls", "nodes": {up.addr(): 1}}));
    gw.put("/stream_routes/1", json!({"upstream_id": "u"}));
    assert_eq!(ask_plain(&plain, "hello"), "apisix_backend hello");
    let config = client(&server, None, &[]);
    assert_eq!(ask(&over_tls, &config, "a.moon.test", "hello").expect("an answer"), "a.moon.test hello");
    gw.put("/upstreams/u", json!({"scheme": "tls", "nodes": {up.addr(): 1}, "tls": {"verify": true}}));
    assert_eq!(ask_plain(&plain, "hello"), "", "nobody has signed its certificate");
    gw.expect_log("upstream SSL certificate verify error");

    // A node that wants to see a certificate.
    let up = tls_node(&server, Some(&own));
    let with = |tls: Value| json!({"scheme": "tls", "nodes": {up.addr(): 1}, "tls": tls});
    let (cert, key) = (own.cert.pem(), own.signing_key.serialize_pem());
    gw.put("/upstreams/u", json!({"scheme": "tls", "nodes": {up.addr(): 1}}));
    assert_eq!(ask_plain(&plain, "hello"), "");
    gw.put("/upstreams/u", with(json!({"client_cert": cert, "client_key": key})));
    assert_eq!(ask_plain(&plain, "hello"), "apisix_backend hello");
    gw.put("/ssls/own", json!({"type": "client", "cert": cert, "key": key}));
    gw.put("/upstreams/u", with(json!({"client_cert_id": "own"})));
    assert_eq!(ask_plain(&plain, "hello"), "apisix_backend hello");
    gw.put("/stream_routes/1", json!({"upstream": with(json!({"client_cert": cert, "client_key": key}))}));
    assert_eq!(ask_plain(&plain, "hello"), "apisix_backend hello");

    // The same from a manager of secrets, the name's certificate too.
    let answer = |pair: &CertifiedKey<KeyPair>| {
        json!({"data": {"cert": pair.cert.pem(), "key": pair.signing_key.serialize_pem()}}).to_string()
    };
    let (of_own, of_server) = (answer(&own), answer(&server));
    let vault = Upstream::answering(move |seen| {
        let body = if seen.target.ends_with("/own") { &of_own } else { &of_server };
        format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())
    });
    let uri = format!("http://{}", vault.addr());
    gw.put("/secrets/vault/1", json!({"uri": uri, "prefix": "kv", "token": "root"}));
    let reference = |name: &str, field: &str| format!("$secret://vault/1/{name}/{field}");
    let pair = json!({"client_cert": reference("own", "cert"), "client_key": reference("own", "key")});
    gw.put("/stream_routes/1", json!({"upstream": with(pair)}));
    gw.put("/ssls/1", json!({"sni": "a.moon.test", "cert": reference("a", "cert"), "key": reference("a", "key")}));
    assert_eq!(ask(&over_tls, &config, "a.moon.test", "hello").expect("an answer"), "a.moon.test hello");
}
