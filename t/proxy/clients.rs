//! Who the client is: PROXY protocol, and whose word on it counts.

use std::{
    io::{Read, Write},
    net::TcpStream,
    sync::Arc,
};

use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned, crypto::ring, pki_types::ServerName};

use super::*;
use crate::support::DEADLINE;

const HEADER: &str = "PROXY TCP4 8.8.8.8 10.9.9.9 1234 443\r\n";
const REQUEST: &str = "GET /x HTTP/1.1\r\nHost: a.test\r\nX-Forwarded-Proto: wss\r\nConnection: close\r\n\r\n";
/// What the route tells its upstream, by plugins' variables.
const TOLD: &str = "$remote_addr $realip_remote_addr $proxy_protocol_addr:$proxy_protocol_port \
                    $proxy_protocol_server_addr:$proxy_protocol_server_port";

/// A gateway whose `apisix` and `nginx_config.http` say these, with a route that tells who the client is.
fn telling(apisix: Value, http: Value) -> (Gateway, Upstream) {
    let (gw, up) = (Gateway::with(json!({"apisix": apisix, "nginx_config": {"http": http}})), Upstream::echo());
    gw.route("1", "/x", &up, json!({"proxy-rewrite": {"headers": {"set": {"X-Who": TOLD}}}}));
    (gw, up)
}

/// A gateway whose one listener takes a header.
fn taking(apisix: Value, http: Value) -> (Gateway, Upstream) {
    let mut all = json!({"node_listen": [{"ip": "127.0.0.1", "port": 0, "proxy_protocol": true}]});
    all.as_object_mut().expect("a map").extend(apisix.as_object().expect("a map").clone());
    telling(all, http)
}

/// What the upstream was told of this client, and which scheme.
#[track_caller]
fn who(address: &str, up: &Upstream, header: &str) -> (String, String) {
    let answer = raw(address, format!("{header}{REQUEST}").as_bytes());
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let last = up.last();
    let field = |name| last.header(name).unwrap_or_default().to_owned();
    (field("x-who"), field("x-forwarded-proto"))
}

#[test]
fn a_proxy_protocol_header_is_believed_of_trusted_peers_where_the_configuration_says_so() {
    const SAID: &str = "8.8.8.8:1234 10.9.9.9:443";
    let by_header = "proxy_protocol";
    for (real_ip, client) in [
        (json!({"real_ip_from": ["9.9.9.9"], "real_ip_header": by_header}), "127.0.0.1"),
        (json!({"real_ip_from": ["127.0.0.1"], "real_ip_header": by_header}), "8.8.8.8"),
        (json!({"real_ip_from": ["127.0.0.1"]}), "127.0.0.1"),
    ] {
        let (gw, up) = taking(json!({}), real_ip.clone());
        assert_eq!(who(&gw.proxy(), &up, HEADER).0, format!("{client} 127.0.0.1 {SAID}"), "{real_ip}");
        // A balancer's own check names nobody.
        assert_eq!(who(&gw.proxy(), &up, "PROXY UNKNOWN\r\n").0, "127.0.0.1 127.0.0.1 : :", "{real_ip}");
        assert_eq!(raw(&gw.proxy(), REQUEST.as_bytes()), "", "no header");
        gw.expect_log("no PROXY protocol header");
    }
}

#[test]
fn a_proxy_protocol_header_makes_nobody_a_trusted_address() {
    let real_ip = || json!({"real_ip_from": ["127.0.0.1"], "real_ip_header": "proxy_protocol"});
    let (gw, up) = taking(json!({"trusted_addresses": ["8.8.8.8"]}), real_ip());
    assert_eq!(who(&gw.proxy(), &up, HEADER).1, "http");
    let (gw, up) = taking(json!({"trusted_addresses": ["127.0.0.1"]}), real_ip());
    assert_eq!(who(&gw.proxy(), &up, HEADER).1, "wss");
}

#[test]
fn the_ports_of_proxy_protocol_take_a_header_and_the_others_do_not() {
    let ports = json!({"listen_http_port": 0, "listen_https_port": 0});
    let (gw, up) = telling(json!({"proxy_protocol": ports}), json!({"real_ip_header": "proxy_protocol"}));
    let pair = rcgen::generate_simple_self_signed(["a.test".to_owned()]).expect("a certificate");
    let ssl = json!({"cert": pair.cert.pem(), "key": pair.signing_key.serialize_pem(), "snis": ["a.test"]});
    gw.put("/ssls/1", ssl);
    let [plain, with_header] = gw.addresses("proxy").try_into().expect("two addresses");
    assert_eq!(who(&with_header, &up, HEADER).0, "8.8.8.8 127.0.0.1 8.8.8.8:1234 10.9.9.9:443");
    assert_eq!(who(&plain, &up, "").0, "127.0.0.1 127.0.0.1 : :");
    assert_eq!(raw(&with_header, REQUEST.as_bytes()), "");
    let refused = raw(&plain, format!("{HEADER}{REQUEST}").as_bytes());
    assert!(refused.starts_with("HTTP/1.1 400 "), "{refused}");

    let mut roots = RootCertStore::empty();
    roots.add(pair.cert.der().clone()).expect("a root");
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let builder = builder.with_safe_default_protocol_versions().expect("versions");
    let config = Arc::new(builder.with_root_certificates(roots).with_no_client_auth());
    let over_tls = |address: &str, header: &str| {
        let mut tcp = TcpStream::connect(address).expect("a connection");
        tcp.set_read_timeout(Some(DEADLINE)).expect("a timeout");
        tcp.write_all(header.as_bytes()).expect("the header is sent");
        let client = ClientConnection::new(config.clone(), ServerName::try_from("a.test").expect("a name"));
        let mut tls = StreamOwned::new(client.expect("a client"), tcp);
        tls.write_all(REQUEST.as_bytes()).ok()?;
        let mut answer = String::new();
        tls.read_to_string(&mut answer).ok().filter(|_| answer.starts_with("HTTP/1.1 200 "))
    };
    let [plain, with_header] = gw.addresses("proxy_tls").try_into().expect("two addresses");
    over_tls(&with_header, HEADER).expect("an answer");
    let told = up.last().header("x-who").map(str::to_owned);
    assert_eq!(told.as_deref(), Some("8.8.8.8 127.0.0.1 8.8.8.8:1234 10.9.9.9:443"));
    assert_eq!(over_tls(&with_header, ""), None);
    assert!(over_tls(&plain, "").is_some());
    assert_eq!(over_tls(&plain, HEADER), None);
}
