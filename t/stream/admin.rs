//! Stream routes in the Admin API and in the stores.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpStream},
};

use serde_json::json;

use crate::{
    gateway, listening, node,
    support::{Dir, Gateway, Upstream, eventually, get, peers::Etcd, run},
    to,
};

/// What a node answers through the gateway.
fn answer(gw: &Gateway) -> Option<String> {
    let mut stream = TcpStream::connect(gw.tcp()).ok()?;
    stream.write_all(b"x").ok()?;
    stream.shutdown(Shutdown::Write).ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    Some(text)
}

#[test]
fn routes_are_written_listed_changed_and_deleted() {
    let gw = gateway();
    let route = json!({"name": "db", "remote_addr": "127.0.0.1", "upstream": to("127.0.0.1:1")});
    let written = gw.admin("PUT", "/stream_routes/1", route.clone());
    assert_eq!((written.status, &written.json()["key"]), (201, &json!("/apisix/stream_routes/1")));
    assert_eq!(gw.admin("PUT", "/stream_routes/1", route.clone()).status, 200);
    let posted = gw.admin("POST", "/stream_routes", route).json();
    assert!(posted["value"]["id"].is_string(), "{posted}");
    let patched = gw.admin("PATCH", "/stream_routes/1", json!({"server_port": 9100})).json();
    assert_eq!((&patched["value"]["server_port"], &patched["value"]["name"]), (&json!(9100), &json!("db")));
    let list = gw.admin("GET", "/stream_routes", ()).json();
    assert_eq!(list["total"], json!(2));
    let one = gw.admin("GET", "/stream_routes/1", ()).json();
    assert_eq!(one["value"]["upstream"], to("127.0.0.1:1"));
    let deleted = gw.admin("DELETE", "/stream_routes/1", ()).json();
    assert_eq!(deleted, json!({"deleted": "1", "key": "/apisix/stream_routes/1"}));
    assert_eq!(gw.admin("GET", "/stream_routes/1", ()).status, 404);
}

#[test]
fn what_cannot_be_served_is_refused_with_apisix_words() {
    let gw = gateway();
    let cases = [
        (json!({"remote_addr": ":/8", "upstream_id": "1"}), "invalid remote_addr: :/8"),
        (json!({"server_addr": ":/8", "upstream_id": "1"}), "invalid server_addr: :/8"),
        (json!({"plugins": {"mqttt-proxy": {}}}), "unknown plugin [mqttt-proxy]"),
        (json!({"plugins": {"limit-conn": {}}, "upstream": to("a:1")}), "unknown plugin [limit-conn]"),
        (json!({"protocol": {"name": "redis"}, "upstream": to("a:1")}), "unknown protocol [redis]"),
        (json!({"upstream_id": "no"}), "failed to fetch upstream info by upstream id [no], response code: 404"),
        (json!({"service_id": "no"}), "failed to fetch service info by service id [no], response code: 404"),
    ];
    for (route, text) in cases {
        let reply = gw.admin("PUT", "/stream_routes/1", route);
        assert_eq!((reply.status, reply.json()), (400, json!({"error_msg": text})));
    }
    for route in [json!({"sni": "a b"}), json!({"server_port": 0}), json!({"remote_addr": "here"}), json!({"uri": "/"})]
    {
        let reply = gw.admin("PUT", "/stream_routes/1", route);
        assert!(reply.status == 400 && reply.text().contains("invalid configuration: "), "{}", reply.text());
    }
    assert_eq!(gw.admin("PUT", "/stream_routes/*no", json!({"upstream": to("a:1")})).status, 400);
}

#[test]
fn the_key_of_an_upstream_is_stored_and_shown_encrypted_and_can_be_written_back() {
    let gw = gateway();
    let pair = rcgen::generate_simple_self_signed(["own".to_owned()]).expect("a certificate");
    let tls = json!({"client_cert": pair.cert.pem(), "client_key": pair.signing_key.serialize_pem()});
    let upstream = json!({"scheme": "tls", "nodes": {"127.0.0.1:1": 1}, "tls": tls});
    let written = gw.put("/stream_routes/1", json!({"upstream": upstream}));
    let mut read = gw.admin("GET", "/stream_routes/1", ()).json()["value"].take();
    assert!(!written.to_string().contains("PRIVATE KEY") && !read.to_string().contains("PRIVATE KEY"));
    let key = read["upstream"]["tls"]["client_key"].clone();
    for time in ["create_time", "update_time"] {
        read.as_object_mut().expect("a map").remove(time);
    }
    let again = gw.put("/stream_routes/1", read);
    assert_eq!(again["value"]["upstream"]["tls"]["client_key"], key);
}

#[test]
fn what_a_stream_route_uses_stays() {
    let gw = gateway();
    gw.put("/upstreams/u", to("127.0.0.1:1"));
    gw.put("/services/s", json!({"upstream": to("127.0.0.1:1")}));
    gw.put("/stream_routes/1", json!({"upstream_id": "u"}));
    gw.put("/stream_routes/2", json!({"service_id": "s"}));
    for (path, what, user) in [("/upstreams/u", "upstream", "1"), ("/services/s", "service directly", "2")] {
        let reply = gw.admin("DELETE", path, ());
        let text = format!("can not delete this {what}, stream_route [{user}] is still using it now");
        assert_eq!((reply.status, reply.json()), (400, json!({"error_msg": text})));
    }
    gw.admin("DELETE", "/stream_routes/1", ());
    assert_eq!(gw.admin("DELETE", "/upstreams/u", ()).status, 200);
}

#[test]
fn a_gateway_that_listens_for_none_takes_no_stream_route() {
    let gw = Gateway::start();
    let reply = gw.admin("PUT", "/stream_routes/1", json!({"upstream": to("127.0.0.1:1")}));
    let text = "stream mode is disabled, can not add stream routes";
    assert_eq!((reply.status, reply.json()), (400, json!({"error_msg": text})));
}

#[test]
fn etcd_and_a_file_are_followed_and_what_they_hold_in_vain_is_shown() {
    let (etcd, a, b) = (Etcd::start(), node("a"), node("b"));
    let of = |up: &Upstream| json!({"upstream": to(up.addr())}).to_string();
    etcd.put("/apisix/stream_routes/1", &of(&a));
    etcd.put("/apisix/stream_routes/2", &json!({"plugins": {"syslog": {}}, "upstream": to("a:1")}).to_string());
    let mut settings = listening(json!(["127.0.0.1:0"]), json!([]));
    settings["deployment"] = json!({
        "role_traditional": {"config_provider": "etcd"},
        "etcd": {"host": [etcd.url()]},
    });
    let gw = Gateway::with(settings);
    assert_eq!(answer(&gw).as_deref(), Some("a x"));
    let errors = get(&gw.control(), "/v1/config/errors").text();
    assert!(errors.contains("/stream_routes/2") && errors.contains("unknown plugin [syslog]"), "{errors}");
    etcd.put("/apisix/stream_routes/1", &of(&b));
    eventually("the change is served", || (answer(&gw)? == "b x").then_some(()));
    etcd.put("/apisix/stream_routes/1", r#"{"server_port": "many"}"#);
    eventually("the mistake shows", || {
        get(&gw.control(), "/v1/config/errors").text().contains("/stream_routes/1").then_some(())
    });
    assert_eq!(answer(&gw).as_deref(), Some("b x"), "a bad config never replaces a good one");
    etcd.delete("/apisix/stream_routes/1");
    eventually("it is gone", || answer(&gw).unwrap_or_default().is_empty().then_some(()));

    let dir = Dir::new();
    let mut settings = listening(json!(["127.0.0.1:0"]), json!([]));
    settings["deployment"] = json!({"role": "data_plane", "role_data_plane": {"config_provider": "yaml"}});
    dir.configure(settings);
    let file = |up: &Upstream| {
        format!("stream_routes:\n  - id: 1\n    upstream:\n      nodes:\n        \"{}\": 1\n#END\n", up.addr())
    };
    dir.write("conf/apisix.yaml", file(&a));
    let gw = Gateway::in_dir(dir);
    assert_eq!(answer(&gw).as_deref(), Some("a x"));
    gw.dir.write("conf/apisix.yaml", file(&b));
    eventually("the change is served", || (answer(&gw)? == "b x").then_some(()));
}

#[test]
fn addresses_that_cannot_be_listened_on_are_told_at_the_start() {
    let cases = [
        (json!({"tcp": ["here"]}), "apisix.stream_proxy.tcp[0]: \"here\" is not a port"),
        (json!({"tcp": [{"addr": "127.0.0.1:0", "tls": "yes"}]}), "tcp[0].tls: \"yes\" is not a boolean"),
        (json!({"udp": [70000]}), "apisix.stream_proxy.udp[0]: 70000 is not a port"),
        (json!({"tcp": ["1-2000"]}), "names more than 1024 ports"),
        (json!({"tcp": ["2000-2100"], "udp": ["2000-2999"]}), "names 1101 ports, more than 1024"),
        (json!({"tcp": []}), "names no address"),
    ];
    for (addresses, text) in cases {
        let dir = Dir::new();
        dir.configure(json!({"apisix": {"proxy_mode": "http&stream", "stream_proxy": addresses}}));
        let (status, said) = run(dir.command());
        assert!(!status.success() && said.contains(text), "{text:?} in {said}");
    }
    let held = std::net::UdpSocket::bind("127.0.0.1:0").expect("a socket");
    let taken = held.local_addr().expect("an address").to_string();
    let dir = Dir::new();
    dir.configure(listening(json!([]), json!([taken])));
    let (status, said) = run(dir.command());
    let said = said + &dir.read("logs/error.log");
    assert!(!status.success() && said.contains(&format!("listen on {taken} (UDP)")), "{said}");
    drop(held);
}
