use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use super::*;

fn sample<'a>() -> RequestSample<'a> {
    RequestSample {
        status: 200,
        route: "1",
        matched_uri: "/hello",
        matched_host: "",
        service: "",
        consumer: "jack",
        node: Node::Ip(IpAddr::from([127, 0, 0, 1])),
        request_type: "traditional_http",
        request_llm_model: "",
        llm_model: "",
        response_source: "upstream",
        extra: &[],
        request_time: Duration::from_millis(12),
        upstream_time: Some(Duration::from_millis(8)),
        bytes_received: 100,
        bytes_sent: 1000,
        now: Instant::now(),
    }
}

fn scrape(metrics: &Metrics) -> String {
    let mut page = String::new();
    metrics.scrape(&mut page);
    page
}

#[track_caller]
fn assert_line(page: &str, line: &str) {
    assert!(page.lines().any(|l| l == line), "no line {line}\nin\n{page}");
}

const REST: &str = r#"route="1",service="",consumer="jack",node="127.0.0.1",request_type="traditional_http",request_llm_model="",llm_model="""#;

#[test]
fn a_request_shows_in_three_metrics() {
    let metrics = Metrics::new(Settings::default());
    let workers = [metrics.recorder(), metrics.recorder()];
    for worker in &workers {
        worker.record(&sample());
    }
    workers[0].record(&RequestSample { status: 404, upstream_time: None, ..sample() });
    let page = scrape(&metrics);
    let status = r#"route="1",matched_uri="/hello",matched_host="",service="",consumer="jack",node="127.0.0.1",request_type="traditional_http",request_llm_model="",llm_model="",response_source="upstream""#;
    assert_line(&page, "# TYPE apisix_http_status counter");
    assert_line(&page, "# HELP apisix_http_status HTTP status codes per service in APISIX");
    assert_line(&page, &format!("apisix_http_status{{code=\"200\",{status}}} 2"));
    assert_line(&page, &format!("apisix_http_status{{code=\"404\",{status}}} 1"));
    assert_line(&page, &format!("apisix_bandwidth{{type=\"egress\",{REST}}} 3000"));
    assert_line(&page, &format!("apisix_bandwidth{{type=\"ingress\",{REST}}} 300"));
    assert_line(&page, "# TYPE apisix_http_latency histogram");
    assert_line(&page, &format!("apisix_http_latency_bucket{{type=\"upstream\",{REST},le=\"5\"}} 0"));
    assert_line(&page, &format!("apisix_http_latency_bucket{{type=\"upstream\",{REST},le=\"10\"}} 2"));
    assert_line(&page, &format!("apisix_http_latency_bucket{{type=\"request\",{REST},le=\"+Inf\"}} 3"));
    assert_line(&page, &format!("apisix_http_latency_count{{type=\"request\",{REST}}} 3"));
    assert_line(&page, &format!("apisix_http_latency_sum{{type=\"upstream\",{REST}}} 16"));
    assert_line(&page, &format!("apisix_http_latency_bucket{{type=\"apisix\",{REST},le=\"5\"}} 2"));
}

#[test]
fn a_worker_that_ended_still_counts() {
    let metrics = Metrics::new(Settings::default());
    for _ in 0..3 {
        let worker = metrics.recorder();
        worker.record(&sample());
        worker.connections().opened();
        worker.connections().request_started();
        worker.connections().request_ended();
        worker.connections().closed();
    }
    assert!(lock(&metrics.workers).is_empty());
    let page = scrape(&metrics);
    assert_line(&page, &format!("apisix_bandwidth{{type=\"ingress\",{REST}}} 300"));
    assert_line(&page, "apisix_http_requests_total 3");
    assert_line(&page, "apisix_nginx_http_current_connections{state=\"accepted\"} 3");
    assert_line(&page, "apisix_nginx_http_current_connections{state=\"active\"} 0");
}

#[test]
fn settings_change_prefix_buckets_and_labels() {
    let attr = json!({
        "metric_prefix": "x_",
        "default_buckets": [105, 15],
        "metrics": {"bandwidth": {"extra_labels": [{"upstream_addr": "$upstream_addr"}, {"none": "$none"}]}},
    });
    let settings = Settings::from_attr(&attr);
    assert_eq!(settings.extra[0].variable, "upstream_addr");
    let metrics = Metrics::new(settings);
    metrics.recorder().record(&RequestSample { extra: &[b"127.0.0.1:\"80", b""], ..sample() });
    let page = scrape(&metrics);
    let extra = r#"upstream_addr="127.0.0.1:\"80",none="""#;
    assert_line(&page, &format!("x_bandwidth{{type=\"ingress\",{REST},{extra}}} 100"));
    assert_line(&page, &format!("x_http_latency_bucket{{type=\"request\",{REST},le=\"15\"}} 1"));
    assert_line(&page, &format!("x_http_latency_bucket{{type=\"request\",{REST},le=\"105\"}} 1"));
}

#[test]
fn disabled_labels_are_blank_and_series_meet() {
    let metrics = Metrics::new(Settings::default());
    metrics.disable_labels(Some(
        &json!({"disabled_labels": {"http_latency": ["node", "consumer"], "http_status": ["matched_uri"]}}),
    ));
    let worker = metrics.recorder();
    for last in 1..=3 {
        worker.record(&RequestSample { node: Node::Ip(IpAddr::from([10, 0, 0, last])), ..sample() });
    }
    let page = scrape(&metrics);
    let blank = REST.replace("jack", "").replace("127.0.0.1", "");
    assert_line(&page, &format!("apisix_http_latency_count{{type=\"request\",{blank}}} 3"));
    assert_line(&page, &format!("apisix_bandwidth{{type=\"ingress\",{}}} 100", REST.replace("127.0.0.1", "10.0.0.2")));
    assert!(page.contains("matched_uri=\"\"") && !page.contains("/hello"));
}

#[test]
fn series_are_bounded_and_totals_stay_right() {
    let metrics = Metrics::new(Settings::default());
    let worker = metrics.recorder();
    let many = cells::MAX_CELLS + 50;
    for i in 0..many {
        worker.record(&RequestSample { route: &i.to_string(), ..sample() });
    }
    let page = scrape(&metrics);
    assert_line(&page, "apisix_metric_series_dropped_total 50");
    let statuses = page.lines().filter(|l| l.starts_with("apisix_http_status{"));
    let total: usize = statuses.map(|l| l.rsplit(' ').next().unwrap().parse::<usize>().unwrap()).sum();
    assert_eq!(total, many);
    // Those that find no place are told apart by their status alone, and no further than to a bound.
    for status in 0..2 * cells::MAX_BLANK as u16 {
        worker.record(&RequestSample { route: "late", status, ..sample() });
    }
    let (mut kept, mut from) = (0, 0);
    loop {
        let part = lock(&worker.worker.cells).part(from).len();
        (kept, from) = (kept + part, from + part);
        if part == 0 {
            break;
        }
    }
    assert_eq!(kept, cells::MAX_CELLS + cells::MAX_BLANK);
    let page = scrape(&metrics);
    assert_line(&page, &format!("apisix_metric_series_dropped_total {}", 50 + 2 * cells::MAX_BLANK));
}

#[test]
fn idle_series_expire() {
    let expire = json!({"expire": 60});
    let attr = json!({"metrics": {"http_status": expire, "http_latency": expire, "bandwidth": expire}});
    let metrics = Metrics::new(Settings::from_attr(&attr));
    let worker = metrics.recorder();
    let Some(long_ago) = Instant::now().checked_sub(Duration::from_secs(61)) else { return };
    worker.record(&RequestSample { now: long_ago, ..sample() });
    worker.record(&RequestSample { route: "2", ..sample() });
    let page = scrape(&metrics);
    assert!(!page.contains("route=\"1\"") && page.contains("route=\"2\""));
    assert_eq!(lock(&worker.worker.cells).part(0).len(), 1);
    worker.record(&RequestSample { route: "2", ..sample() });
    assert_eq!(lock(&worker.worker.cells).part(0)[0].count, 2);
}

fn definition(kind: Kind, labels: &[&str], bounds: &[f64]) -> Definition {
    let labels = labels.iter().map(|label| (*label).to_owned()).collect();
    Definition { kind, help: "a\nb".into(), labels, bounds: bounds.into() }
}

#[test]
fn plugins_have_metrics_of_their_own() {
    let metrics = Metrics::new(Settings::default());
    let define =
        |kind, name, labels: &[&str], bounds: &[f64]| metrics.define(OWN_PAGE, name, definition(kind, labels, bounds));
    let change = |number, values: &[&str], change| {
        metrics.change(number, &values.iter().map(|value| value.as_bytes()).collect::<Vec<_>>(), change)
    };
    let gauge = define(Kind::Gauge, "entries", &["name", "route_id"], &[]).unwrap();
    change(gauge, &["http \"logger", "1"], Change::Set(4.0)).unwrap();
    change(gauge, &["http \"logger", "1"], Change::Inc(-1.5)).unwrap();
    change(gauge, &["gone", "1"], Change::Set(4.0)).unwrap();
    change(gauge, &["gone", "1"], Change::Remove).unwrap();
    let times = define(Kind::Histogram, "times", &[], &[1.0, 2.0]).unwrap();
    change(times, &[], Change::Observe(1.5)).unwrap();
    let count = define(Kind::Counter, "seen", &[], &[]).unwrap();
    change(count, &[], Change::Inc(2.0)).unwrap();
    for (number, values, done, why) in [
        (gauge, &["wrong"][..], Change::Set(4.0), "entries: inconsistent labels count, expected 2, got 1"),
        (gauge, &["a", "b"], Change::Observe(1.0), "entries: only histograms have observe"),
        (times, &[], Change::Inc(1.0), "times: a histogram has no inc"),
        (times, &[], Change::Observe(f64::NAN), "times: the value is no number"),
        (count, &[], Change::Inc(-1.0), "seen: the value of a counter does not fall"),
        (count, &[], Change::Set(1.0), "seen: only gauges have set"),
        (99, &[], Change::Inc(1.0), "there is no metric 99"),
    ] {
        assert_eq!(change(number, values, done).expect_err("refused"), why);
    }
    let page = scrape(&metrics);
    assert!(page.contains("# HELP apisix_entries a b\n# TYPE apisix_entries gauge\n"), "{page}");
    assert_line(&page, "apisix_entries{name=\"http \\\"logger\",route_id=\"1\"} 2.5");
    assert_line(&page, "apisix_times_bucket{le=\"1\"} 0");
    assert_line(&page, "apisix_times_bucket{le=\"2\"} 1");
    assert_line(&page, "apisix_times_sum 1.5");
    assert_line(&page, "apisix_seen 2");
    assert_line(&page, "apisix_nginx_metric_errors_total 7");
    assert!(!page.contains("gone"));
    // The same once more is the same; another one in its place starts again.
    assert_eq!(define(Kind::Counter, "seen", &[], &[]).unwrap(), count);
    assert_line(&scrape(&metrics), "apisix_seen 2");
    assert_eq!(define(Kind::Counter, "seen", &["by"], &[]).unwrap(), count);
    assert!(change(count, &[], Change::Inc(1.0)).is_err());
    change(count, &["me"], Change::Inc(1.0)).unwrap();
    let page = scrape(&metrics);
    assert!(page.contains("apisix_seen{by=\"me\"} 1\n") && !page.contains("apisix_seen 2"), "{page}");
    metrics.reset(count);
    assert!(!scrape(&metrics).contains("apisix_seen"));
}

#[test]
fn what_can_be_no_metric_is_refused() {
    let metrics = Metrics::new(Settings::default());
    let labels: Vec<String> = (0..=custom::MAX_LABELS).map(|i| format!("l{i}")).collect();
    let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
    let bounds: Vec<f64> = (0..=custom::MAX_BOUNDS).map(|i| i as f64).collect();
    let long = "n".repeat(cells::MAX_VALUE + 1);
    let names = "has a character that Prometheus does not allow in names";
    for (name, labels, bounds, why) in [
        ("a b", &[][..], &[1.0][..], names),
        ("1a", &[], &[1.0], names),
        (&long, &[], &[1.0], names),
        ("a", &["a-b"], &[1.0], names),
        ("a", &["a", "a"], &[1.0], "has a label twice"),
        ("a", &["le"], &[1.0], "has a label twice, or one that histograms have"),
        ("a", &labels, &[1.0], "has more than 32 labels"),
        ("a", &[], &[], "has bounds that are not ascending numbers"),
        ("a", &[], &[2.0, 1.0], "has bounds that are not ascending numbers"),
        ("a", &[], &[1.0, f64::INFINITY], "has bounds that are not ascending numbers"),
        ("a", &[], &bounds, "has more than 128 bounds"),
        ("http_status", &[], &[1.0], "is one of the gateway's own"),
        ("function_calls", &[], &[1.0], "is one of the gateway's own"),
    ] {
        let refused = metrics.define(OWN_PAGE, name, definition(Kind::Histogram, labels, bounds)).expect_err("refused");
        assert!(refused.to_string().contains(why), "{refused}");
    }
    metrics.define(OWN_PAGE, "a", definition(Kind::Histogram, &labels[1..], &bounds[1..])).unwrap();
    // Pages of their own have nothing of the gateway's.
    let number = metrics.define("mine", "http_status", definition(Kind::Counter, &[], &[])).unwrap();
    metrics.change(number, &[], Change::Inc(1.0)).unwrap();
    let mut page = String::new();
    metrics.page("mine", &mut page);
    assert_eq!(page, "# HELP http_status a b\n# TYPE http_status counter\nhttp_status 1\n");
    assert!(!scrape(&metrics).contains("apisix_http_status 1"));
}

#[tokio::test]
async fn the_page_is_served() {
    let metrics = Metrics::new(Settings::default());
    metrics.add_source(Box::new(|page| page.gauge("node_info", "Info of APISIX node", &[("hostname", "h")], 1.0)));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(serve(listener, metrics, "/apisix/prometheus/metrics".into()));
    let ask = |path: &'static str| async move {
        let mut socket = TcpStream::connect(addr).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await.unwrap();
        answer
    };
    let answer = ask("/apisix/prometheus/metrics").await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(answer.contains("content-type: text/plain; charset=utf-8\r\n"), "{answer}");
    assert_line(&answer, "apisix_node_info{hostname=\"h\"} 1");
    assert!(ask("/other").await.starts_with("HTTP/1.1 404"));
}

#[test]
#[ignore = "a measurement, for release builds: prints nanoseconds"]
fn measure() {
    let metrics = Metrics::new(Settings::default());
    let worker = metrics.recorder();
    let routes: Vec<String> = (0..1000).map(|i| format!("route-{i}")).collect();
    let started = Instant::now();
    for i in 0..1_000_000 {
        worker.record(&RequestSample { route: &routes[i % 1000], ..sample() });
    }
    println!("record {:?}", started.elapsed() / 1_000_000);
    let started = Instant::now();
    println!("{} bytes of page in {:?}", scrape(&metrics).len(), started.elapsed());
}

#[test]
fn metrics_of_plugins_are_bounded_in_number_and_series() {
    let metrics = Metrics::new(Settings::default());
    let count = |i: usize| metrics.define(OWN_PAGE, &format!("count_{i}"), definition(Kind::Counter, &["of"], &[]));
    for i in 0..custom::MAX_FAMILIES {
        count(i).unwrap();
    }
    let refused = count(custom::MAX_FAMILIES).err().unwrap().to_string();
    assert!(refused.contains("metric \"count_256\" is one too many"), "{refused}");
    let add = |of: &str| metrics.change(0, &[of.as_bytes()], Change::Inc(1.0));
    for i in 0..custom::MAX_SERIES {
        add(&i.to_string()).unwrap();
    }
    assert_eq!(add("late").expect_err("refused"), "count_0: there are 10000 series");
    add("0").unwrap();
    let page = scrape(&metrics);
    assert_line(&page, "apisix_count_0{of=\"0\"} 2");
    assert_eq!(page.lines().filter(|l| l.starts_with("apisix_count_0{")).count(), custom::MAX_SERIES);
    assert_line(&page, "apisix_nginx_metric_errors_total 1");
    metrics.change(0, &[b"0"], Change::Remove).unwrap();
    add("late").unwrap();
    assert_line(&scrape(&metrics), "apisix_count_0{of=\"late\"} 1");
}

#[test]
fn values_of_plugins_are_cut_where_a_character_ends() {
    let metrics = Metrics::new(Settings::default());
    metrics.define("mine", "a", definition(Kind::Counter, &["of"], &[])).unwrap();
    let long = format!("{}ä", "x".repeat(cells::MAX_VALUE - 1));
    for value in [long.as_bytes(), b"no\xfftext", b"\xc3", &[0x80; 2000]] {
        metrics.change(0, &[value], Change::Inc(1.0)).unwrap();
    }
    let mut page = String::new();
    metrics.page("mine", &mut page);
    assert_line(&page, &format!("a{{of=\"{}\"}} 1", "x".repeat(cells::MAX_VALUE - 1)));
    assert_line(&page, "a{of=\"no\"} 1");
    assert_eq!(page.lines().filter(|line| line.starts_with("a{")).count(), 4);
}

#[test]
fn long_values_are_cut() {
    let metrics = Metrics::new(Settings::default());
    let (long, model) = ("r".repeat(cells::MAX_VALUE), "m".repeat(cells::MAX_MODEL));
    metrics.recorder().record(&RequestSample {
        route: &format!("{long}r"),
        llm_model: &format!("{model}m"),
        ..sample()
    });
    let page = scrape(&metrics);
    assert!(page.contains(&format!("route=\"{long}\"")), "{page}");
    assert!(page.contains(&format!("\"{model}\"")));
    assert!(!page.contains(&format!("{long}r")) && !page.contains(&format!("{model}m")));
}

#[tokio::test]
async fn scrapers_past_the_bound_wait_for_a_place() {
    let metrics = Metrics::new(Settings::default());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(serve(listener, metrics, "/metrics".into()));
    async fn scraped(socket: &mut TcpStream) {
        socket.write_all(b"HEAD /metrics HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            assert!(socket.read_buf(&mut head).await.unwrap() > 0, "closed");
        }
        assert!(head.starts_with(b"HTTP/1.1 200"));
    }
    let mut held = Vec::new();
    for _ in 0..serve::MAX_CONNECTIONS {
        let mut socket = TcpStream::connect(addr).await.unwrap();
        scraped(&mut socket).await;
        held.push(socket);
    }
    let mut late = TcpStream::connect(addr).await.unwrap();
    late.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").await.unwrap();
    // Whoever has a place is still answered, whoever has none is not.
    for socket in &mut held {
        scraped(socket).await;
    }
    assert_eq!(late.try_read(&mut [0; 1]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    held.pop();
    let mut answer = String::new();
    late.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.0 200 OK"), "{answer}");
}

#[tokio::test]
async fn scrapers_that_are_too_slow_or_stay_too_long_are_let_go() {
    let (short, long) = (Duration::from_millis(50), Duration::from_secs(60));
    for (head, whole, request) in [(short, long, "GET /met"), (long, short, "GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")]
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let metrics = Metrics::new(Settings::default());
        tokio::spawn(serve::serve_within(head, whole, listener, metrics, "/metrics".into()));
        let mut socket = TcpStream::connect(addr).await.unwrap();
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer.starts_with("HTTP/1.1 200"), head == long, "{answer}");
    }
}

#[test]
fn processors_past_the_bound_take_the_place_of_those_in_which_nothing_waits() {
    let metrics = Metrics::new(Settings::default());
    let slot = |route: usize| metrics.waiting_slot("logger", &route.to_string(), "::1");
    let line = |route: usize, n: u64| {
        format!("apisix_batch_process_entries{{name=\"logger\",route_id=\"{route}\",server_addr=\"::1\"}} {n}")
    };
    for route in 0..waiting::MAX_SLOTS {
        assert_eq!(slot(route), Some(route));
        assert!(metrics.add_waiting(route, 5));
    }
    // Something waits in all.
    assert_eq!((slot(waiting::MAX_SLOTS), slot(3)), (None, Some(3)));
    assert!(metrics.add_waiting(3, -3) && metrics.add_waiting(4, -5) && metrics.add_waiting(5, -6));
    let page = scrape(&metrics);
    assert_line(&page, &line(3, 2));
    assert_line(&page, &line(4, 0));
    assert_line(&page, "apisix_nginx_metric_errors_total 1");
    // Two are empty: they go, and the next one has a place.
    let late = slot(waiting::MAX_SLOTS).expect("a place");
    assert!(metrics.add_waiting(late, 7));
    assert!(!metrics.add_waiting(4, 1) && !metrics.add_waiting(5, 1), "they are others' now, or nobody's");
    let again = slot(4).expect("a place");
    assert!(again != 4 && metrics.add_waiting(again, 1));
    let page = scrape(&metrics);
    assert_line(&page, &line(waiting::MAX_SLOTS, 7));
    assert_line(&page, &line(4, 1));
    assert!(!page.contains("route_id=\"5\""));
    assert_line(&page, "apisix_nginx_metric_errors_total 1");
}

#[test]
fn sessions_and_their_bytes_are_told_by_listener() {
    let metrics = Metrics::new(Settings::default());
    let addr = "127.0.0.1:9100".parse().unwrap();
    let session = metrics.listening(addr).session();
    session.listening().up(5, 4);
    metrics.listening(addr).down(3, 2);
    let line = |name: &str, labels: &str, n: u64| {
        format!("apisix_stream_{name}{{listen_addr=\"127.0.0.1:9100\"{labels}}} {n}")
    };
    let page = scrape(&metrics);
    assert_line(&page, &line("active_connections", "", 1));
    for (way, side, n) in [
        ("ingress", "downstream", 5),
        ("egress", "upstream", 4),
        ("ingress", "upstream", 3),
        ("egress", "downstream", 2),
    ] {
        assert_line(&page, &line("bandwidth", &format!(",type=\"{way}\",side=\"{side}\""), n));
    }
    drop(session);
    assert_line(&scrape(&metrics), &line("active_connections", "", 0));
}
