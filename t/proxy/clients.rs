//! Who the client is: PROXY protocol, and whose word on it counts.

use super::*;

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
