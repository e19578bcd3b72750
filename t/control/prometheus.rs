//! What a Prometheus that scrapes the gateway makes of it: the questions of APISIX's Grafana dashboard all have answers.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    io::{Read, Write},
    net::TcpStream,
    process::{Command, Stdio},
};

use serde_json::{Value, json};

use crate::support::{
    Gateway, Upstream, eventually, get,
    peers::{self, Etcd},
    request,
};

/// A question, the label that tells its answers apart (none: there is one answer), and values of it that must be there.
type Question = (String, &'static str, &'static [&'static str]);

/// What panels of requests narrow down: the variables of the dashboard when all of each is chosen.
const ALL: &str = "service=~\".*\",route=~\".*\",instance=~\"127.0.0.1:.*\"";

fn questions() -> Vec<Question> {
    let connections = "apisix_nginx_http_current_connections";
    let ask = |text: &str| text.to_owned();
    let mut all: Vec<Question> = vec![
        (ask("sum(apisix_http_requests_total{instance=~\".+\"})"), "", &[]),
        (format!("sum({connections}{{state=\"accepted\"}})"), "", &[]),
        (format!("sum({connections}{{state=\"handled\"}})"), "", &[]),
        (
            format!("sum({connections}{{state=~\"active|reading|writing|waiting\"}}) by (state)"),
            "state",
            &["active", "reading", "waiting", "writing"],
        ),
        (ask("sum(rate(apisix_bandwidth{instance=~\".+\"}[1m])) by (type)"), "type", &["egress", "ingress"]),
        (format!("sum(rate(apisix_http_status{{{ALL}}}[1m])) by (code)"), "code", &["200", "401", "404", "502"]),
        (ask("sum(rate(apisix_http_status[1m]))"), "", &[]),
        (format!("sum(rate(apisix_http_status{{{ALL}}}[1m])) by (service)"), "service", &["svc", "a.test"]),
        (format!("sum(rate(apisix_http_status{{{ALL}}}[1m])) by (route)"), "route", &["served", "down", "secret"]),
        (
            ask("sum(apisix_etcd_modify_indexes) by (key)"),
            "key",
            &[
                "consumers",
                "global_rules",
                "max_modify_index",
                "prev_index",
                "protos",
                "routes",
                "services",
                "ssls",
                "stream_routes",
                "upstreams",
                "x_etcd_index",
            ],
        ),
        (ask("sum(apisix_etcd_reachable{instance=~\".+\"}) == 1"), "", &[]),
        (ask("sum(apisix_nginx_metric_errors_total{instance=~\".+\"}) == 0"), "", &[]),
        (
            ask("apisix_shared_dict_free_space_bytes * 100 / on (name) apisix_shared_dict_capacity_bytes"),
            "name",
            &["kept", "prometheus-metrics"],
        ),
        (ask("apisix_node_info"), "version", &["3.18.0"]),
        // What other boards and alerts ask.
        (ask("sum(rate(apisix_http_status{code=~\"5..\"}[1m])) / sum(rate(apisix_http_status[1m]))"), "", &[]),
        (ask("sum(rate(apisix_http_status[1m])) by (consumer)"), "consumer", &["jack"]),
        (ask("sum(rate(apisix_http_status[1m])) by (response_source)"), "response_source", &["apisix", "upstream"]),
        (ask("sum(rate(apisix_http_latency_sum[1m])) / sum(rate(apisix_http_latency_count[1m]))"), "", &[]),
        (ask("apisix_batch_process_entries"), "name", &["http logger"]),
        (ask("apisix_stream_connection_total"), "route", &["tcp"]),
        (ask("sum(apisix_stream_active_connections) >= 1"), "", &[]),
        (ask("sum(apisix_stream_status) by (code)"), "code", &["200", "502"]),
        (ask("sum(apisix_stream_bandwidth > 0) by (type)"), "type", &["egress", "ingress"]),
        (ask("sum(apisix_stream_bandwidth > 0) by (side)"), "side", &["downstream", "upstream"]),
    ];
    for (way, rate) in [("ingress", "irate"), ("egress", "rate")] {
        let bytes = format!("sum({rate}(apisix_bandwidth{{type=\"{way}\",{ALL}}}[1m]))");
        all.push((format!("{bytes} by (service)"), "service", &["svc"]));
        all.push((format!("{bytes} by (route)"), "route", &["served", "down"]));
    }
    for kind in ["request", "upstream", "apisix"] {
        for share in ["0.90", "0.95", "0.99"] {
            let narrowed = format!("type=~\"{kind}\",consumer=~\".*\",node=~\".*\",{ALL}");
            let buckets = format!("sum(rate(apisix_http_latency_bucket{{{narrowed}}}[1m])) by (le)");
            all.push((format!("histogram_quantile({share}, {buckets})"), "", &[]));
        }
    }
    all
}

/// A Prometheus that looks at the gateway five times a second.
fn prometheus(gw: &Gateway) -> (peers::Peer, String) {
    let target = gw.prometheus();
    let server = peers::prometheus(&json!({
        "global": {"scrape_interval": "200ms", "scrape_timeout": "200ms"},
        "scrape_configs": [{
            "job_name": "apisix",
            "metrics_path": "/apisix/prometheus/metrics",
            "static_configs": [{"targets": [target]}],
        }],
    }));
    let address = server.address();
    (server, address)
}

fn encoded(text: &str) -> String {
    text.bytes().fold(String::new(), |mut out, b| {
        let _ = write!(out, "%{b:02X}");
        out
    })
}

/// The samples of an instant query: labels and value. NaN is none.
fn ask(address: &str, question: &str) -> Vec<(Value, f64)> {
    let answer = get(address, &format!("/api/v1/query?query={}", encoded(question))).json();
    assert_eq!(answer["status"], "success", "{question}: {answer}");
    let samples = answer["data"]["result"].as_array().cloned().unwrap_or_default();
    let number = |sample: &Value| sample["value"][1].as_str()?.parse::<f64>().ok().filter(|n| n.is_finite());
    samples.iter().filter_map(|sample| Some((sample["metric"].clone(), number(sample)?))).collect()
}

/// What an answer lacks.
fn lacks(address: &str, (question, label, wanted): &Question) -> Option<String> {
    let samples = ask(address, question);
    let values: BTreeSet<_> = samples.iter().filter_map(|(labels, _)| labels[label].as_str()).collect();
    let absent: Vec<_> = wanted.iter().filter(|value| !values.contains(*value)).collect();
    (samples.is_empty() || !absent.is_empty()).then(|| format!("{question}: without {absent:?} in {samples:?}"))
}

fn gateway(etcd: &Etcd) -> Gateway {
    Gateway::with(json!({
        "apisix": {"proxy_mode": "http&stream", "stream_proxy": {"tcp": ["127.0.0.1:0", "127.0.0.1:0"]}},
        "deployment": {
            "role": "traditional",
            "role_traditional": {"config_provider": "etcd"},
            "etcd": {"host": [etcd.url()], "prefix": "/apisix"},
        },
        "lua_shared_dict": {"kept": "1m"},
    }))
}

fn configure(gw: &Gateway, up: &Upstream, logs: &Upstream) {
    let nodes = |address: String| json!({"type": "roundrobin", "nodes": {address: 1}});
    let pair = rcgen::generate_simple_self_signed(["a.test".to_owned()]).expect("a certificate");
    gw.put("/ssls/1", json!({"snis": ["a.test"], "cert": pair.cert.pem(), "key": pair.signing_key.serialize_pem()}));
    gw.put("/global_rules/1", json!({"plugins": {"prometheus": {}}}));
    gw.put("/services/svc", json!({"upstream": nodes(up.addr())}));
    gw.put("/consumers/jack", json!({"username": "jack", "plugins": {"key-auth": {"key": "jacks"}}}));
    let logger = json!({"uri": format!("http://{}/", logs.addr()), "batch_max_size": 1, "name": "http logger"});
    gw.put("/routes/served", json!({"uri": "/served", "service_id": "svc", "plugins": {"http-logger": logger}}));
    gw.put("/routes/down", json!({"uri": "/down", "upstream": nodes(Upstream::dead())}));
    gw.put("/routes/secret", json!({"uri": "/secret", "service_id": "svc", "plugins": {"key-auth": {}}}));
    gw.put("/routes/host", json!({"uri": "/host", "host": "a.test", "upstream": nodes(up.addr())}));
    let ports = gw.addresses("tcp");
    let port = |at: usize| ports[at].rsplit(':').next().and_then(|port| port.parse::<u16>().ok()).expect("a port");
    let route =
        |at: usize, to: String| json!({"server_port": port(at), "upstream": nodes(to), "plugins": {"prometheus": {}}});
    gw.put("/stream_routes/tcp", route(0, up.addr()));
    gw.put("/stream_routes/lost", route(1, Upstream::dead()));
}

/// One request of each sort.
fn traffic(gw: &Gateway) {
    assert_eq!(gw.get("/served").status, 200);
    assert_eq!(gw.get("/down").status, 502);
    assert_eq!(gw.get("/secret").status, 401);
    assert_eq!(gw.send("GET", "/secret", &[("apikey", "jacks")], b"").status, 200);
    assert_eq!(gw.get("/nowhere").status, 404);
    let through = request(&gw.addresses("tcp")[0], "GET", "/", &[("Connection", "close")], b"");
    assert_eq!(through.status, 200);
    let mut lost = TcpStream::connect(&gw.addresses("tcp")[1]).expect("a connection");
    let _ = lost.read(&mut [0]);
}

/// A request over TLS.
fn over_tls(gw: &Gateway) {
    let mut client = Command::new("openssl")
        .args(["s_client", "-quiet", "-servername", "a.test", "-connect", &gw.proxy_tls()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("openssl is installed");
    let mut stdin = client.stdin.take().expect("its input");
    stdin.write_all(b"GET /host HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n").expect("a request");
    let out = client.wait_with_output().expect("an answer");
    assert!(out.stdout.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&out.stdout));
}

#[test]
fn every_question_of_the_dashboard_has_an_answer() {
    let (etcd, up) = (Etcd::start(), Upstream::echo());
    let logs = Upstream::answering(|_| "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    let gw = gateway(&etcd);
    configure(&gw, &up, &logs);
    let (_server, address) = prometheus(&gw);
    over_tls(&gw);
    let _open = TcpStream::connect(&gw.addresses("tcp")[0]).expect("a session that stays");
    let mut open = questions();
    eventually("every question has an answer", || {
        traffic(&gw);
        over_tls(&gw);
        open.retain(|question| lacks(&address, question).is_some());
        if let Some(question) = open.first() {
            eprintln!("{} without an answer: {}", open.len(), lacks(&address, question).unwrap_or_default());
        }
        open.is_empty().then_some(())
    });
    // What the dashboard's variables are chosen from.
    for (label, from, wanted) in [
        ("service", "apisix_http_status", "svc"),
        ("route", "apisix_http_status", "served"),
        ("consumer", "apisix_http_latency_count", "jack"),
        ("node", "apisix_http_latency_count", "127.0.0.1"),
        ("instance", "apisix_nginx_http_current_connections", &*gw.prometheus()),
    ] {
        let values = get(&address, &format!("/api/v1/label/{label}/values?match[]={from}")).json();
        assert!(values["data"].as_array().is_some_and(|all| all.contains(&json!(wanted))), "{label}: {values}");
    }
    // The index of routes is that of the last write, and etcd's.
    let written = gw.admin("GET", "/routes/host", ()).json()["modifiedIndex"].as_f64().expect("an index");
    let index = |key: &str| ask(&address, &format!("apisix_etcd_modify_indexes{{key=\"{key}\"}}"))[0].1;
    assert_eq!(index("routes"), written);
    assert!(index("x_etcd_index") >= index("max_modify_index") && index("max_modify_index") > written);
    assert!(index("services") < written && index("protos") == 0.0);
}

#[test]
fn an_etcd_that_is_gone_is_told() {
    let mut etcd = Etcd::start();
    let gw = gateway(&etcd);
    let reachable = |value: &str| {
        let line = format!("apisix_etcd_reachable {value}");
        eventually(&line, || get(&gw.prometheus(), "/apisix/prometheus/metrics").text().contains(&line).then_some(()));
    };
    reachable("1");
    etcd.stop();
    reachable("0");
    etcd.restart();
    reachable("1");
}

#[test]
fn a_file_has_no_etcd() {
    let dir = crate::support::Dir::new();
    dir.configure(json!({"deployment": {"role": "data_plane", "role_data_plane": {"config_provider": "yaml"}}}));
    dir.write("conf/apisix.yaml", "routes: []\n#END\n");
    let gw = Gateway::in_dir(dir);
    let page = get(&gw.prometheus(), "/apisix/prometheus/metrics").text();
    assert!(
        page.contains("apisix_node_info{hostname=") && page.contains("apisix_shared_dict_capacity_bytes{"),
        "{page}"
    );
    assert!(!page.contains("apisix_etcd_"), "{page}");
}

#[test]
fn stream_routes_have_this_plugin_and_no_other() {
    let gw = Gateway::with(json!({"apisix": {"proxy_mode": "http&stream", "stream_proxy": {"tcp": ["127.0.0.1:0"]}}}));
    let route =
        |plugins: Value| json!({"server_port": 1, "upstream": {"nodes": {"127.0.0.1:1": 1}}, "plugins": plugins});
    gw.put("/stream_routes/1", route(json!({"prometheus": {"prefer_name": true}})));
    for (plugins, why) in [
        (json!({"prometheus": {}, "limit-conn": {}}), "unknown plugin [limit-conn]"),
        (json!({"prometheus": "x"}), "wrong type: expected object"),
        (json!({"prometheus": {"prefer_name": 1}}), "wrong type: expected boolean"),
    ] {
        let refused = gw.admin("PUT", "/stream_routes/1", route(plugins));
        assert!(refused.status == 400 && refused.text().contains(why), "{}: {}", refused.status, refused.text());
    }
}

#[test]
fn options_of_the_plugin_are_honoured() {
    let up = Upstream::echo();
    let gw = Gateway::with(json!({"plugin_attr": {"prometheus": {
        "export_uri": "/own",
        "metric_prefix": "my_",
        "default_buckets": [15, 55],
        "metrics": {
            "http_status": {"extra_labels": [{"addr": "$upstream_addr"}, {"who": "$route_name"}, {"dummy": "$nothing"}]},
            "bandwidth": {"extra_labels": [{"code": "$status"}]},
        },
    }}}));
    let upstream = json!({"type": "roundrobin", "nodes": {up.addr(): 1}});
    gw.put("/services/s", json!({"name": "shop", "upstream": upstream}));
    let route =
        json!({"uri": "/x", "name": "till", "service_id": "s", "plugins": {"prometheus": {"prefer_name": true}}});
    gw.put("/routes/1", route);
    assert_eq!(gw.get("/x").status, 200);
    let page =
        |part: &str| eventually(part, || Some(get(&gw.prometheus(), "/own").text()).filter(|page| page.contains(part)));
    let labels = "route=\"till\",matched_uri=\"/x\",matched_host=\"\",service=\"shop\",consumer=\"\"";
    let rest = "request_type=\"traditional_http\",request_llm_model=\"\",llm_model=\"\"";
    let addr = up.addr();
    let extra = format!("response_source=\"upstream\",addr=\"{addr}\",who=\"till\",dummy=\"\"");
    let all = page(&format!("my_http_status{{code=\"200\",{labels},node=\"127.0.0.1\",{rest},{extra}}} 1"));
    assert!(all.contains(&format!("{rest},code=\"200\"}}")), "bandwidth has its own: {all}");
    let bounds = |all: &str| {
        let buckets = all.lines().filter(|line| line.starts_with("my_http_latency_bucket{type=\"request\""));
        let bound = |line: &str| line.split("le=\"").nth(1).and_then(|rest| rest.split('"').next().map(str::to_owned));
        buckets.filter_map(bound).collect::<Vec<_>>()
    };
    assert_eq!(bounds(&all), ["15", "55", "+Inf"]);
    assert!(!all.contains("apisix_"), "{all}");
    assert_eq!(get(&gw.prometheus(), "/apisix/prometheus/metrics").status, 404);
    gw.put("/plugin_metadata/prometheus", json!({"disabled_labels": {"http_status": ["node", "service"]}}));
    let all = page(&format!("service=\"\",consumer=\"\",node=\"\",{rest},{extra}}} 1"));
    assert!(
        all.contains("my_bandwidth{type=\"egress\",route=\"till\",service=\"shop\",consumer=\"\",node=\"127.0.0.1\""),
        "{all}"
    );
    let refused = gw.admin("PUT", "/plugin_metadata/prometheus", json!({"disabled_labels": {"http_status": ["code"]}}));
    assert_eq!(refused.status, 400, "{}", refused.text());
}

#[test]
fn nodes_that_are_checked_are_told() {
    let (up, gw) = (Upstream::echo(), Gateway::start());
    let checks = json!({"active": {"http_path": "/", "healthy": {"interval": 1, "successes": 1},
        "unhealthy": {"interval": 1, "tcp_failures": 1}}});
    let dead = Upstream::dead();
    let upstream = json!({"type": "roundrobin", "nodes": {up.addr(): 1, dead.clone(): 1}, "checks": checks});
    gw.put("/routes/1", json!({"uri": "/x", "upstream": upstream}));
    gw.get("/x");
    let port = |address: &str| address.rsplit(':').next().unwrap_or_default().to_owned();
    for (address, is_up) in [(up.addr(), 1), (dead, 0)] {
        let name = "name=\"/apisix/routes/1\"";
        let line = format!("apisix_upstream_status{{{name},ip=\"127.0.0.1\",port=\"{}\"}} {is_up}", port(&address));
        let page = || get(&gw.prometheus(), "/apisix/prometheus/metrics").text();
        eventually(&line, || page().contains(&line).then_some(()));
    }
}
