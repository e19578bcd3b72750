//! Health checks: who is probed, what it tells, and whom requests still reach.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering},
    },
};

use serde_json::{Value, json};

use super::{Gateway, Upstream, eventually, get};

/// A node that answers probes of `/status` with a status that can be changed, and requests with one, too.
struct Node {
    up: Upstream,
    probes: Arc<AtomicU16>,
    requests: Arc<AtomicU16>,
}

impl Node {
    fn new() -> Node {
        let (probes, requests) = (Arc::new(AtomicU16::new(200)), Arc::new(AtomicU16::new(200)));
        let (of_probes, of_requests) = (probes.clone(), requests.clone());
        let up = Upstream::answering(move |seen| {
            let status = if seen.target.starts_with("/status") { &of_probes } else { &of_requests };
            format!("HTTP/1.1 {} X\r\nContent-Length: 0\r\n\r\n", status.load(Ordering::SeqCst))
        });
        Node { up, probes, requests }
    }

    fn served(&self) -> usize {
        self.up.seen().iter().filter(|seen| !seen.target.starts_with("/status")).count()
    }

    fn probed(&self) -> usize {
        self.up.seen().len() - self.served()
    }
}

/// `checks` that decide after one probe a second.
fn active(more: Value) -> Value {
    let mut active = json!({
        "http_path": "/status",
        "healthy": {"interval": 1, "successes": 1},
        "unhealthy": {"interval": 1, "http_failures": 1, "tcp_failures": 1, "timeouts": 1},
    });
    for (key, value) in more.as_object().expect("a map") {
        active[key] = value.clone();
    }
    json!({"active": active})
}

fn upstream(nodes: &[String], checks: Value) -> Value {
    let nodes: serde_json::Map<String, Value> = nodes.iter().map(|addr| (addr.clone(), json!(1))).collect();
    json!({"type": "roundrobin", "nodes": nodes, "checks": checks})
}

fn checked(gw: &Gateway, nodes: &[String], checks: Value) {
    gw.put("/upstreams/u", upstream(nodes, checks));
    gw.put("/routes/1", json!({"uri": "/*", "upstream_id": "u"}));
}

/// The status that the control API shows of a node.
fn shown(gw: &Gateway, place: &str) -> Option<String> {
    let checker = get(&gw.control(), "/v1/healthcheck/upstreams/u").json();
    let is_it = |node: &&Value| format!("{}:{}", node["ip"].as_str().unwrap(), node["port"]) == place;
    let node = checker["nodes"].as_array()?.iter().find(is_it)?;
    Some(node["status"].as_str()?.to_owned())
}

#[track_caller]
fn becomes(gw: &Gateway, node: &str, status: &str) {
    eventually(&format!("{node} is {status}"), || (shown(gw, node)? == status).then_some(()));
}

/// Nodes that answer twenty requests, by their place in `nodes`.
fn answering(gw: &Gateway, nodes: &[&Node]) -> BTreeSet<usize> {
    let before: Vec<usize> = nodes.iter().map(|node| node.served()).collect();
    for _ in 0..20 {
        gw.get("/");
    }
    (0..nodes.len()).filter(|at| nodes[*at].served() > before[*at]).collect()
}

#[test]
fn what_probes_find_unwell_gets_no_requests_until_they_find_it_well() {
    let gw = Gateway::start();
    let (one, two) = (Node::new(), Node::new());
    let places = [one.up.addr(), two.up.addr()];
    checked(&gw, &places, active(json!({"host": "probes.test", "req_headers": ["X-Probe: 1"]})));
    assert_eq!(get(&gw.control(), "/v1/healthcheck").text().trim(), "{}", "nobody has asked for it yet");
    assert_eq!((one.probed(), two.probed()), (0, 0));
    assert_eq!(answering(&gw, &[&one, &two]), BTreeSet::from([0, 1]));
    eventually("both are probed", || (one.probed() > 0 && two.probed() > 0).then_some(()));
    let probe = one.up.seen().into_iter().find(|seen| seen.target == "/status").unwrap();
    assert_eq!(
        (&*probe.method, probe.header("Host"), probe.header("X-Probe")),
        ("GET", Some("probes.test"), Some("1"))
    );

    one.probes.store(500, Ordering::SeqCst);
    becomes(&gw, &places[0], "unhealthy");
    gw.expect_log(&format!(
        "[healthcheck] (upstream#/apisix/upstreams/u) unhealthy HTTP increment (1/1) for 'probes.test({})'",
        places[0]
    ));
    assert_eq!(shown(&gw, &places[1]).as_deref(), Some("healthy"));
    assert_eq!(answering(&gw, &[&one, &two]), BTreeSet::from([1]));

    // What is known goes on in the next version of the upstream.
    gw.put("/upstreams/u", upstream(&places, active(json!({"host": "probes.test", "req_headers": ["X-Probe: 1"]}))));
    assert_eq!(answering(&gw, &[&one, &two]), BTreeSet::from([1]));

    two.probes.store(503, Ordering::SeqCst);
    becomes(&gw, &places[1], "unhealthy");
    assert_eq!(answering(&gw, &[&one, &two]), BTreeSet::from([0, 1]), "a guess beats a refusal");

    one.probes.store(302, Ordering::SeqCst);
    becomes(&gw, &places[0], "healthy");
    gw.expect_log("healthy SUCCESS increment (1/1)");
    assert_eq!(answering(&gw, &[&one, &two]), BTreeSet::from([0]));

    let all = get(&gw.control(), "/v1/healthcheck").json();
    assert_eq!((&all[0]["name"], &all[0]["type"]), (&json!("/apisix/upstreams/u"), &json!("http")));
    assert_eq!(all[0]["nodes"].as_array().unwrap().len(), 2);
    gw.admin("DELETE", "/routes/1", ());
    gw.admin("DELETE", "/upstreams/u", ());
    eventually("the checker has ended", || (get(&gw.control(), "/v1/healthcheck").text().trim() == "{}").then_some(()));
    assert_eq!(get(&gw.control(), "/v1/healthcheck/upstreams/u").status, 404);
}

#[test]
fn what_comes_of_requests_counts_for_all_workers() {
    let gw = Gateway::with(json!({"nginx_config": {"worker_processes": 2}}));
    let (one, two) = (Node::new(), Node::new());
    let places = [one.up.addr(), two.up.addr()];
    // Probes find nothing bad: no status of theirs is one.
    let mut checks = active(json!({"type": "tcp"}));
    checks["active"]["healthy"]["interval"] = json!(1000);
    checks["active"]["unhealthy"]["interval"] = json!(1000);
    checks["passive"] = json!({"healthy": {"successes": 1}, "unhealthy": {"http_statuses": [500], "http_failures": 2}});
    checked(&gw, &places, checks);
    one.requests.store(500, Ordering::SeqCst);
    let statuses: Vec<u16> = (0..20).map(|_| gw.get("/").status).collect();
    assert_eq!(statuses.iter().filter(|status| **status == 500).count(), 2, "{statuses:?}");
    assert_eq!(shown(&gw, &places[0]).as_deref(), Some("unhealthy"));
    gw.expect_log("unhealthy HTTP increment (2/2)");
    two.requests.store(404, Ordering::SeqCst);
    for _ in 0..5 {
        assert_eq!(gw.get("/").status, 404);
    }
    assert_eq!(shown(&gw, &places[1]).as_deref(), Some("healthy"), "that status tells nothing");
}

#[test]
fn a_failed_try_counts_as_what_it_is_or_as_the_status_that_it_makes() {
    let often = |more: Value| {
        let mut checks = active(json!({"type": "tcp", "healthy": {"interval": 1000}, "unhealthy": {"interval": 1000}}));
        checks["active"]["port"] = json!(Node::new().up.addr().rsplit(':').next().unwrap().parse::<u16>().unwrap());
        checks["passive"] = json!({"unhealthy": more});
        checks
    };
    for (unhealthy, told) in [
        (json!({"tcp_failures": 1}), "unhealthy TCP increment (1/1)"),
        (json!({"http_statuses": [502], "http_failures": 1}), "unhealthy HTTP increment (1/1)"),
    ] {
        let gw = Gateway::start();
        let (well, dead) = (Node::new(), Upstream::dead());
        let mut u = upstream(&[well.up.addr(), dead.clone()], often(unhealthy));
        u["retries"] = json!(0);
        gw.put("/upstreams/u", u);
        gw.put("/routes/1", json!({"uri": "/*", "upstream_id": "u"}));
        let statuses: Vec<u16> = (0..10).map(|_| gw.get("/").status).collect();
        let failed = statuses.iter().filter(|status| **status == 502).count();
        // Each worker may have begun a try before it was told.
        assert!(failed <= 1 && statuses.ends_with(&[200; 5]), "{statuses:?}");
        gw.expect_log(told);
    }
}

#[test]
fn a_refused_connection_and_one_that_says_nothing_are_told_apart() {
    let gw = Gateway::start();
    let silent = Upstream::serving(|_, stream| {
        let _ = std::io::Read::read_to_end(&mut &stream, &mut Vec::new());
    });
    let rude = Upstream::answering(|_| "SSH-2.0-nobody\r\n\r\n");
    let (well, dead) = (Node::new(), Upstream::dead());
    let places = [well.up.addr(), silent.addr(), rude.addr(), dead.clone()];
    let mut u = upstream(&places, active(json!({"timeout": 0.2})));
    u["timeout"] = json!({"connect": 1, "send": 1, "read": 0.2});
    gw.put("/upstreams/u", u);
    gw.put("/routes/1", json!({"uri": "/*", "upstream_id": "u"}));
    gw.get("/");
    for place in &places[1..] {
        becomes(&gw, place, "unhealthy");
    }
    gw.expect_log(&format!("unhealthy TCP increment (1/1) for '127.0.0.1({dead})'"));
    gw.expect_log(&format!("unhealthy TIMEOUT increment (1/1) for '127.0.0.1({})'", silent.addr()));
    gw.expect_log("SSH-2.0-nobody\\r is no status line");
    assert_eq!(answering(&gw, &[&well]), BTreeSet::from([0]));
    assert!((0..20).all(|_| gw.get("/").status == 200));
}

#[test]
fn probes_of_tcp_only_connect_and_ports_may_be_their_own() {
    let gw = Gateway::start();
    let (one, two, other) = (Node::new(), Node::new(), Node::new());
    let port: u16 = other.up.addr().rsplit(':').next().unwrap().parse().unwrap();
    checked(&gw, &[one.up.addr(), two.up.addr()], active(json!({"type": "tcp", "port": port})));
    gw.get("/");
    eventually("the other port is connected to", || (other.up.connections() >= 2).then_some(()));
    assert_eq!((one.probed(), two.probed(), other.up.seen().len()), (0, 0, 0));
    assert_eq!(get(&gw.control(), "/v1/healthcheck/upstreams/u").json()["type"], "tcp");
}

#[test]
fn probes_by_tls_verify_unless_told_otherwise() {
    let node = Gateway::start();
    let pair = rcgen::generate_simple_self_signed(["probes.test".to_owned()]).expect("a certificate");
    let (cert, key) = (pair.cert.pem(), pair.signing_key.serialize_pem());
    node.put("/ssls/1", json!({"cert": cert, "key": key, "snis": ["probes.test"]}));
    let up = Node::new();
    node.route("1", "/*", &up.up, json!({}));
    let gw = Gateway::start();
    let place = node.proxy_tls();
    let checks =
        |verify: bool| active(json!({"type": "https", "host": "probes.test", "https_verify_certificate": verify}));
    checked(&gw, &[place.clone(), Upstream::dead()], checks(true));
    gw.get("/");
    becomes(&gw, &place, "unhealthy");
    gw.expect_log("upstream SSL certificate verify error");
    checked(&gw, &[place.clone(), Upstream::dead()], checks(false));
    becomes(&gw, &place, "healthy");
    eventually("it is asked", || (up.probed() > 0).then_some(()));
}

#[test]
fn checks_can_be_switched_off() {
    let gw = Gateway::with(
        json!({"apisix": {"disable_upstream_healthcheck": true}, "nginx_config": {"error_log_level": "info"}}),
    );
    gw.expect_log("disabled upstream healthcheck");
    let one = Node::new();
    checked(&gw, &[one.up.addr(), Upstream::dead()], active(json!({})));
    for _ in 0..4 {
        assert_eq!(gw.get("/").status, 200);
    }
    assert_eq!((get(&gw.control(), "/v1/healthcheck").text().trim(), one.probed()), ("{}", 0));
}
