//! The status API: whether the gateway runs, and what it serves.

use std::io::Read;

use serde_json::{Value, json};

use crate::support::{
    Client, Dir, Gateway, Upstream, eventually, get,
    ports::{dead_port, free_port},
};

fn settings() -> Value {
    json!({"apisix": {"status": {"ip": "127.0.0.1", "port": 0}}})
}

#[test]
fn a_gateway_that_serves_says_what() {
    let gw = Gateway::with(settings());
    let status = get(&gw.status(), "/status");
    assert_eq!((status.status, status.json()), (200, json!({"status": "ok"})));
    let ready = get(&gw.status(), "/status/ready");
    let first = ready.json();
    assert_eq!((ready.status, &first["status"]), (200, &json!("ok")));
    assert_eq!(first["workers"], json!([{"id": 0, "ready": true}, {"id": 1, "ready": true}]));
    assert_eq!(first["source"], json!({"name": "embedded", "connected": true, "stale_seconds": null, "reason": null}));
    let up = Upstream::echo();
    gw.route("1", "/x", &up, json!({}));
    let second = get(&gw.status(), "/status/ready").json();
    assert_ne!(first["digest"], second["digest"]);
    assert!(first["revision"].as_i64() < second["revision"].as_i64());
    assert_eq!(gw.admin("DELETE", "/routes/1", ()).status, 200);
    let third = get(&gw.status(), "/status/ready").json();
    assert_eq!(first["digest"], third["digest"], "the same configuration as before");
    assert_eq!(get(&gw.status(), "/status/other").status, 404);
}

#[test]
fn it_is_off_unless_it_is_configured() {
    let gw = Gateway::start();
    let listening: Value = serde_json::from_str(&gw.dir.read("logs/listen.json")).unwrap();
    assert_eq!(listening["status"], Value::Null);
}

#[test]
fn a_gateway_whose_source_was_never_there_is_not_ready() {
    let port = dead_port();
    let mut config = settings();
    config["deployment"] = json!({
        "role_traditional": {"config_provider": "etcd"},
        "etcd": {"host": [format!("http://127.0.0.1:{port}")], "timeout": 1, "startup_retry": 1},
    });
    let gw = Gateway::with(config);
    assert_eq!(get(&gw.status(), "/status").json(), json!({"status": "ok"}));
    let ready = get(&gw.status(), "/status/ready");
    let body = ready.json();
    assert_eq!((ready.status, &body["status"]), (503, &json!("error")));
    assert_eq!(body["error"], "worker id: 0 has not received configuration");
    assert_eq!(body["source"]["connected"], false);
    assert!(body["source"]["stale_seconds"].is_u64() && body["source"]["reason"].is_string(), "{body}");
}

#[test]
fn it_tells_of_a_drain_until_the_gateway_is_gone() {
    let dir = Dir::new();
    let port = free_port();
    let status = format!("127.0.0.1:{port}");
    dir.configure(json!({
        "apisix": {"status": {"port": port}},
        "lua_locations": [{"location": "/wait", "content_by_lua": "while true do ngx.sleep(0.001) end"}],
    }));
    let mut gw = Gateway::in_dir(dir);
    let mut waiting = Client::connect(&gw.proxy());
    waiting.send("GET", "/wait", &[], b"");
    eventually("the request runs", || {
        let lua = get(&gw.control(), "/v1/lua").json();
        let vms = lua["workers"].as_array()?.iter().flat_map(|w| w["vms"].as_array().cloned().unwrap_or_default());
        (vms.filter_map(|vm| vm["requests"].as_u64()).sum::<u64>() > 0).then_some(())
    });
    gw.signal(libc::SIGQUIT);
    let refused = eventually("it is not ready any more", || {
        let ready = get(&status, "/status/ready");
        (ready.status == 503).then_some(ready)
    });
    assert_eq!(refused.json()["error"], "the gateway is ending");
    gw.signal(libc::SIGTERM);
    assert!(gw.wait().success());
    drop(waiting);
    let mut nobody = String::new();
    assert!(std::net::TcpStream::connect(&status).and_then(|mut s| s.read_to_string(&mut nobody)).is_err());
}
