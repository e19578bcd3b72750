//! What the gateway does between a client and its upstreams: tries, time limits, framing, streams, tunnels.

#[path = "proxy/bodies.rs"]
mod bodies;
#[path = "proxy/certificates.rs"]
mod certificates;
#[path = "proxy/choice.rs"]
mod choice;
#[path = "proxy/grpc.rs"]
mod grpc;
#[path = "proxy/grpcio.rs"]
mod grpcio;
#[path = "proxy/health.rs"]
mod health;
#[path = "proxy/streams.rs"]
mod streams;
mod support;

use std::{
    io::{BufReader, Read, Write},
    net::TcpStream,
    os::unix::net::UnixStream,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
};

use serde_json::{Value, json};
use support::{Client, Dir, Gateway, Reply, Upstream, eventually, get, http::raw, rss_kib, upstream::read_request};

/// Settings of a gateway that logs requests as the tests ask about them.
fn gateway(format: &str) -> Gateway {
    Gateway::with(json!({"nginx_config": {"http": {"access_log_format": format, "access_log_buffer": 0}}}))
}

/// A route `/*` to these nodes, in order of preference, with more of an upstream's settings.
#[track_caller]
fn route(gw: &Gateway, nodes: &[String], more: Value) {
    let node = |(at, addr): (usize, &String)| {
        let (host, port) = addr.rsplit_once(':').expect("host:port");
        json!({"host": host, "port": port.parse::<u16>().expect("a port"), "weight": 1, "priority": -(at as i64)})
    };
    let nodes: Vec<Value> = nodes.iter().enumerate().map(node).collect();
    let mut upstream = json!({"type": "roundrobin", "nodes": nodes});
    for (key, value) in more.as_object().expect("a map") {
        upstream[key] = value.clone();
    }
    gw.put("/routes/1", json!({"uri": "/*", "upstream": upstream}));
}

/// Answers every request with these bytes.
fn always(bytes: &'static str) -> Upstream {
    Upstream::answering(move |_| bytes)
}

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

fn access_log(gw: &Gateway, line: &str) {
    eventually(&format!("{line:?} in access.log"), || {
        gw.dir.read("logs/access.log").lines().any(|l| l == line).then_some(())
    });
}

#[test]
fn a_dead_node_costs_a_try_and_not_the_request() {
    let gw = gateway("$status [$upstream_status] $upstream_addr");
    let (dead, up) = (Upstream::dead(), always(OK));
    route(&gw, &[dead.clone(), up.addr()], json!({}));
    let reply = gw.send("POST", "/", &[], b"body");
    assert_eq!((reply.status, reply.text().as_str()), (200, "ok"));
    assert_eq!(up.last().body, b"body");
    access_log(&gw, &format!("200 [502, 200] {dead}, {}", up.addr()));
    gw.expect_log("Connection refused");
    gw.expect_log(&format!("request: \"POST / HTTP/1.1\", upstream: \"http://{dead}/\", host: \"{}\"", gw.proxy()));
}

#[test]
fn retries_are_bounded_and_their_statuses_shown() {
    let gw = Gateway::start();
    let nodes = [Upstream::dead(), Upstream::dead(), Upstream::dead()];
    for (retries, statuses) in [(0, "502"), (1, "502, 502"), (2, "502, 502, 502")] {
        route(&gw, &nodes, json!({"retries": retries}));
        let reply = gw.get("/");
        assert_eq!(reply.status, 502);
        assert_eq!(reply.header("X-APISIX-Upstream-Status"), Some(statuses));
        assert!(reply.text().contains("502 Bad Gateway"));
    }
}

#[test]
fn only_what_is_harmless_is_sent_again_after_a_node_has_seen_it() {
    let gw = Gateway::start();
    // Reads the request and hangs up.
    let rude = Upstream::serving(|_, stream| {
        read_request(&mut BufReader::new(stream));
    });
    let up = always(OK);
    route(&gw, &[rude.addr(), up.addr()], json!({}));
    for (method, status) in [("GET", 200), ("PUT", 200), ("DELETE", 200), ("POST", 502), ("PATCH", 502)] {
        let before = up.seen().len();
        assert_eq!(gw.send(method, "/", &[], b"x").status, status, "{method}");
        assert_eq!(up.seen().len() - before, usize::from(status == 200), "{method}");
    }
}

#[test]
fn a_body_too_long_to_keep_goes_out_once() {
    let gw = Gateway::start();
    let rude = Upstream::serving(|_, stream| {
        read_request(&mut BufReader::new(stream));
    });
    let up = always(OK);
    route(&gw, &[rude.addr(), up.addr()], json!({}));
    assert_eq!(gw.send("PUT", "/", &[], &[b'x'; 60_000]).status, 200);
    assert_eq!(up.last().body.len(), 60_000);
    assert_eq!(gw.send("PUT", "/", &[], &vec![b'x'; 1 << 20]).status, 502);
    assert_eq!(up.seen().len(), 1);
}

#[test]
fn a_kept_connection_that_its_node_closed_costs_nothing() {
    let gw = Gateway::with(json!({"nginx_config": {"worker_processes": 1}}));
    // Says keep-alive, closes after one answer.
    let up = Upstream::serving(|_, stream| {
        let mut stream = BufReader::new(stream);
        if read_request(&mut stream).is_some() {
            let _ = stream.get_mut().write_all(OK.as_bytes());
        }
    });
    route(&gw, &[up.addr()], json!({"retries": 0}));
    for _ in 0..20 {
        assert_eq!(gw.get("/").status, 200);
    }
    assert_eq!(up.connections(), 20);
}

#[test]
fn connections_to_nodes_are_kept_as_long_as_configured() {
    let gw = Gateway::with(json!({"nginx_config": {"worker_processes": 1}}));
    let up = always(OK);
    let ten = |connections| {
        let before = up.connections();
        (0..10).for_each(|_| assert_eq!(gw.get("/").status, 200));
        assert_eq!(up.connections() - before, connections);
    };
    route(&gw, &[up.addr()], json!({}));
    ten(1);
    route(&gw, &[up.addr()], json!({"keepalive_pool": {"size": 4, "idle_timeout": 60, "requests": 5}}));
    // The first of them was used ten times already.
    ten(2);
}

#[test]
fn a_slow_node_is_answered_for_with_504() {
    let gw = gateway("$request_method $status $upstream_status");
    let (hold, held) = mpsc::channel::<()>();
    let held = Arc::new(std::sync::Mutex::new(held));
    let slow = Upstream::serving(move |_, stream| {
        read_request(&mut BufReader::new(stream.try_clone().expect("a clone")));
        let _ = held.lock().map(|held| held.recv());
    });
    route(&gw, &[slow.addr()], json!({"timeout": {"connect": 1, "send": 1, "read": 0.2}}));
    let reply = gw.get("/");
    assert_eq!(reply.status, 504);
    assert!(reply.text().contains("504 Gateway Time-out"));
    assert_eq!(reply.header("X-APISIX-Upstream-Status"), Some("504"));
    gw.expect_log("Connection timed out");
    access_log(&gw, "GET 504 504");
    drop(hold);
}

#[test]
fn retry_timeout_ends_the_tries() {
    let gw = Gateway::start();
    let nobody = || Upstream::serving(|_, mut stream| while matches!(stream.read(&mut [0; 512]), Ok(n) if n > 0) {});
    let (first, second) = (nobody(), always(OK));
    let timeout = json!({"connect": 1, "send": 1, "read": 0.3});
    route(&gw, &[first.addr(), second.addr()], json!({"retry_timeout": 0.1, "timeout": timeout}));
    assert_eq!(gw.get("/").status, 502);
    gw.expect_log("upstream timed out (110: Connection timed out) while reading response header from upstream");
    gw.expect_log("proxy retry timeout, retry count: 0");
    route(&gw, &[first.addr(), second.addr()], json!({"retry_timeout": 0, "timeout": timeout}));
    assert_eq!(gw.get("/").status, 200);
}

#[test]
fn every_framing_of_a_response_arrives_whole() {
    let gw = Gateway::start();
    let cases: [(&str, u16, &str, Option<&str>); 9] = [
        (OK, 200, "ok", Some("2")),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\no\r\n1;x=y\r\nk\r\n0\r\nT: 1\r\n\r\n",
            200,
            "ok",
            None,
        ),
        ("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nok", 200, "ok", None),
        ("HTTP/1.0 200 OK\r\nConnection: close\r\n\r\nok", 200, "ok", None),
        ("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 200, "", Some("0")),
        ("HTTP/1.1 204 No Content\r\n\r\n", 204, "", None),
        ("HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", 304, "", Some("5")),
        (
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
            200,
            "ok",
            Some("2"),
        ),
        ("HTTP/1.1 404 Nope\r\nContent-Length: 2\r\n\r\nno", 404, "no", Some("2")),
    ];
    for (bytes, status, body, length) in cases {
        let up = always(bytes);
        route(&gw, &[up.addr()], json!({}));
        let reply = gw.get("/");
        assert_eq!(
            (reply.status, reply.text().as_str(), reply.header("content-length")),
            (status, body, length),
            "{bytes}"
        );
        assert!(reply.header("server").is_some_and(|s| s.starts_with("moongate")), "{bytes}");
    }
    let up = always("HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n");
    route(&gw, &[up.addr()], json!({}));
    let mut client = Client::connect(&gw.proxy());
    for _ in 0..2 {
        client.send("HEAD", "/", &[], b"");
        let reply = client.reply("HEAD");
        assert_eq!((reply.status, reply.header("content-length")), (200, Some("1000")));
    }
}

#[test]
fn a_response_that_can_be_read_in_two_ways_is_refused() {
    let gw = Gateway::start();
    let long = Box::leak(format!("HTTP/1.1 200 OK\r\nX: {}\r\n\r\n", "x".repeat(100_000)).into_boxed_str());
    for bytes in [
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok",
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nX: y\r\n folded\r\n\r\n",
        "HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
        "HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        "nonsense\r\n\r\n",
        long,
    ] {
        let up = always(bytes);
        route(&gw, &[up.addr()], json!({}));
        let reply = gw.get("/");
        assert_eq!(reply.status, 502, "{}", &bytes[..bytes.len().min(80)]);
    }
}

#[test]
fn a_response_cut_short_does_not_look_whole() {
    let gw = Gateway::start();
    for bytes in [
        "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 9\r\n\r\nshort",
        "HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nshort\r\n",
        "HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nshort\r\nx\r\n",
    ] {
        let up = always(bytes);
        route(&gw, &[up.addr()], json!({}));
        let text = raw(&gw.proxy(), b"GET / HTTP/1.1\r\nHost: a\r\n\r\n");
        // Nothing at all when the mistake stood in the first bytes; never the end of a body.
        assert!(text.is_empty() || text.starts_with("HTTP/1.1 200"), "{bytes}: {text}");
        assert!(!text.ends_with("0\r\n\r\n"), "{bytes}: {text}");
    }
}

#[test]
fn fields_of_the_clients_connection_stop_at_the_gateway() {
    let gw = Gateway::start();
    let up = Upstream::echo();
    route(&gw, &[up.addr()], json!({}));
    let sent = [
        ("Connection", "close, X-Hop"),
        ("X-Hop", "1"),
        ("Keep-Alive", "5"),
        ("Proxy-Connection", "close"),
        ("TE", "gzip"),
        ("Upgrade", "h2c"),
        ("X-Real-IP", "127.0.0.1"),
        ("X-Forwarded-For", "1.2.3.4"),
        ("X-Forwarded-Proto", "https"),
        ("X-Forwarded-Host", "evil.com"),
        ("Forwarded", "for=1.2.3.4"),
        ("X-Kept", "yes"),
        ("Host", "Example.com:8443"),
    ];
    gw.send("GET", "/a%20b//c?x=1", &sent, b"");
    let seen = up.last();
    assert_eq!(seen.target, "/a%20b//c?x=1");
    for gone in
        ["Connection", "X-Hop", "Keep-Alive", "Proxy-Connection", "TE", "Upgrade", "Forwarded", "Transfer-Encoding"]
    {
        assert_eq!(seen.header(gone), None, "{gone}");
    }
    for (name, value) in [
        ("Host", "Example.com:8443"),
        ("X-Kept", "yes"),
        ("X-Real-IP", "127.0.0.1"),
        ("X-Forwarded-For", "1.2.3.4, 127.0.0.1"),
        ("X-Forwarded-Proto", "http"),
        ("X-Forwarded-Host", "Example.com:8443"),
        ("X-Forwarded-Port", "8443"),
    ] {
        assert_eq!(seen.header(name), Some(value), "{name}");
    }
}

#[test]
fn trusted_peers_are_believed() {
    let gw = Gateway::with(json!({"apisix": {"trusted_addresses": ["127.0.0.0/8"]}}));
    let up = Upstream::echo();
    route(&gw, &[up.addr()], json!({}));
    let sent = [("X-Forwarded-Proto", "https"), ("X-Forwarded-Host", "a.com"), ("X-Forwarded-Port", "8443")];
    gw.send("GET", "/", &sent, b"");
    sent.iter().for_each(|(name, value)| assert_eq!(up.last().header(name), Some(*value)));
}

#[test]
fn pass_host_decides_the_name_that_the_node_is_called_by() {
    let gw = Gateway::start();
    let up = Upstream::echo();
    let (_, port) = up.addr().rsplit_once(':').map(|(h, p)| (h.to_owned(), p.to_owned())).expect("host:port");
    for (more, host) in [
        (json!({"pass_host": "pass"}), "client.com".to_owned()),
        (json!({"pass_host": "node"}), format!("127.0.0.1:{port}")),
        (json!({"pass_host": "rewrite", "upstream_host": "other.com"}), "other.com".to_owned()),
    ] {
        route(&gw, &[up.addr()], more);
        gw.send("GET", "/", &[("Host", "client.com")], b"");
        assert_eq!(up.last().header("Host"), Some(host.as_str()));
    }
}

#[test]
fn bodies_keep_their_framing_on_the_way_up() {
    let gw = Gateway::start();
    let up = Upstream::echo();
    route(&gw, &[up.addr()], json!({}));
    gw.send("POST", "/", &[("Content-Length", "0")], b"");
    assert_eq!(up.last().header("Content-Length"), Some("0"));
    gw.send("POST", "/", &[], b"abc");
    assert_eq!((up.last().header("Content-Length"), &up.last().body[..]), (Some("3"), &b"abc"[..]));
    let mut client = Client::connect(&gw.proxy());
    client.send("POST", "/", &[("Transfer-Encoding", "chunked")], b"");
    for piece in ["3\r\nabc\r\n", "2\r\nde\r\n", "0\r\n\r\n"] {
        client.write(piece.as_bytes()).expect("written");
    }
    assert_eq!(client.reply("POST").status, 200);
    assert_eq!((up.last().header("Content-Length"), &up.last().body[..]), (None, &b"abcde"[..]));
}

#[test]
fn each_piece_of_a_response_is_passed_on_at_once() {
    let gw = Gateway::start();
    let (next, pieces) = mpsc::channel::<&'static str>();
    let pieces = Arc::new(std::sync::Mutex::new(pieces));
    let up = Upstream::serving(move |_, stream| {
        let mut stream = BufReader::new(stream);
        read_request(&mut stream);
        for piece in pieces.lock().expect("not poisoned").iter() {
            stream.get_mut().write_all(piece.as_bytes()).expect("written");
        }
    });
    route(&gw, &[up.addr()], json!({}));
    let mut client = Client::connect(&gw.proxy());
    client.send("GET", "/", &[], b"");
    next.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").expect("sent");
    assert_eq!(client.head().status, 200);
    for piece in ["1\r\na\r\n", "1\r\nb\r\n"] {
        next.send(piece).expect("sent");
        assert_eq!(client.chunk().as_deref(), Some(&piece.as_bytes()[3..4]));
    }
    next.send("0\r\n\r\n").expect("sent");
    assert_eq!(client.chunk(), None);
}

#[test]
fn an_answer_that_comes_before_the_body_was_sent_counts() {
    let gw = Gateway::start();
    let up = Upstream::serving(|_, mut stream| {
        let mut head = [0; 64];
        let _ = stream.read(&mut head);
        let _ = stream.write_all(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nbig");
        // Keeps reading a little, so that the answer is not lost to a reset.
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut rest = [0; 65536];
        while matches!(stream.read(&mut rest), Ok(n) if n > 0) {}
    });
    route(&gw, &[up.addr()], json!({}));
    let mut client = Client::connect(&gw.proxy());
    client.write(b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\nsome").expect("written");
    let reply = client.reply("PUT");
    assert_eq!((reply.status, reply.text().as_str()), (413, "big"));
}

#[test]
fn a_client_that_leaves_is_logged_as_499_and_its_node_let_go() {
    let gw = gateway("$uri $status $upstream_status");
    let (gone, node_saw) = mpsc::channel();
    let (came, waits) = mpsc::channel();
    let up = Upstream::serving(move |_, stream| {
        let mut stream = BufReader::new(stream);
        read_request(&mut stream);
        came.send(()).expect("sent");
        let ended = matches!(stream.read(&mut [0]), Ok(0) | Err(_));
        let _ = gone.send(ended);
    });
    let tell = "return function(_, ctx)
        local core = require('apisix.core')
        ngx.log(ngx.WARN, 'told: ', core.response.get_upstream_status(ctx), ' ', core.response.get_response_source(ctx))
    end";
    let plugins = json!({"serverless-pre-function": {"phase": "log", "functions": [tell]}, "prometheus": {}});
    gw.put("/routes/1", json!({"uri": "/*", "upstream": {"nodes": {up.addr(): 1}}, "plugins": plugins}));
    let mut client = Client::connect(&gw.proxy());
    client.send("GET", "/left", &[], b"");
    waits.recv().expect("the node got it");
    drop(client);
    assert!(node_saw.recv().expect("the node saw the end"));
    access_log(&gw, "/left 499 -");
    gw.expect_log("told: nil nginx");
    let page = get(&gw.prometheus(), "/apisix/prometheus/metrics").text();
    assert!(page.lines().any(|l| l.contains("code=\"499\"") && l.contains("response_source=\"nginx\"")), "{page}");
}

#[test]
fn what_has_no_route_or_no_upstream_is_said_so() {
    let gw = Gateway::start();
    let reply = gw.get("/nowhere");
    assert_eq!((reply.status, reply.text().as_str()), (404, "{\"error_msg\":\"404 Route Not Found\"}\n"));
    gw.put("/routes/1", json!({"uri": "/x", "plugins": {}}));
    assert_eq!(gw.get("/x").status, 503);
    gw.expect_log("missing upstream configuration in Route or Service");
}

#[test]
fn a_line_break_that_a_plugin_sets_does_not_become_a_request() {
    let gw = Gateway::start();
    let up = Upstream::echo();
    let lua = "return function() ngx.req.set_header('X-A', 'a\\r\\n\\r\\nGET /evil HTTP/1.1\\r\\nHost: b') end";
    gw.route("1", "/*", &up, json!({"serverless-pre-function": {"phase": "access", "functions": [lua]}}));
    gw.get("/");
    assert!(up.seen().iter().all(|seen| seen.target != "/evil" && !seen.headers.iter().any(|(_, v)| v == "b")));
}

#[test]
fn a_script_says_which_node_is_first_how_often_to_try_and_how_long_to_wait() {
    let gw = gateway("$uri $status [$upstream_status]");
    let (dead, up) = (Upstream::dead(), always(OK));
    let silent = Upstream::serving(|_, stream| {
        let mut stream = BufReader::new(stream);
        while read_request(&mut stream).is_some() {}
    });
    let scene = |path: &str, nodes: &[String], peer: &str, more: &str| {
        let nodes: serde_json::Map<_, _> = nodes.iter().map(|node| (node.clone(), json!(1))).collect();
        let lua = format!(
            "return function() local b = require('ngx.balancer') assert(b.set_current_peer('{}', {})) {more} end",
            peer.rsplit_once(':').unwrap().0,
            peer.rsplit_once(':').unwrap().1
        );
        gw.put(
            &format!("/routes/{}", &path[1..]),
            json!({
                "uri": path,
                "plugins": {"serverless-pre-function": {"phase": "before_proxy", "functions": [lua]}},
                "upstream": {"type": "roundrobin", "nodes": nodes},
            }),
        );
        gw.get(path).status
    };
    assert_eq!(scene("/peer", std::slice::from_ref(&dead), &up.addr(), ""), 200);
    access_log(&gw, "/peer 200 [200]");
    assert_eq!(scene("/once", &[up.addr(), dead.clone()], &dead, "b.set_more_tries(0)"), 502);
    access_log(&gw, "/once 502 [502]");
    assert_eq!(scene("/again", &[up.addr()], &dead, "b.set_more_tries(1)"), 200);
    access_log(&gw, "/again 200 [502, 200]");
    assert_eq!(scene("/late", &[up.addr()], &silent.addr(), "b.set_timeouts(nil, nil, 0.05)"), 504);
    access_log(&gw, "/late 504 [504]");
    // Each of the two workers may have one older connection; all others serve one request only.
    let before = up.connections();
    assert_eq!(scene("/single", &[up.addr()], &up.addr(), "b.enable_keepalive(60, 1)"), 200);
    (0..10).for_each(|_| assert_eq!(gw.get("/single").status, 200));
    let opened = up.connections() - before;
    assert!((9..=11).contains(&opened), "{opened} connections for 11 requests");
}

#[test]
fn x_forwarded_fields_that_a_plugin_sets_reach_the_node() {
    let gw = Gateway::start();
    let up = Upstream::echo();
    gw.route("1", "/*", &up, json!({"proxy-rewrite": {"headers": {"set": {"X-Forwarded-Proto": "https"}}}}));
    assert_eq!(gw.get("/").status, 200);
    assert_eq!(up.last().header("X-Forwarded-Proto"), Some("https"));
}

#[test]
fn a_websocket_passes_both_ways_where_it_is_enabled() {
    let gw = gateway("$status");
    let up = Upstream::serving(|_, stream| {
        let mut stream = BufReader::new(stream);
        let Some(seen) = read_request(&mut stream) else { return };
        if seen.header("Upgrade") != Some("websocket") || seen.header("Connection") != Some("upgrade") {
            let _ = stream.get_mut().write_all(OK.as_bytes());
            return;
        }
        let head = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\nhello";
        stream.get_mut().write_all(head.as_bytes()).expect("written");
        let mut piece = [0; 1024];
        while let Ok(n @ 1..) = stream.read(&mut piece) {
            stream.get_mut().write_all(&piece[..n]).expect("written");
        }
    });
    let enabled = |on: bool| {
        let upstream = json!({"type": "roundrobin", "nodes": {up.addr(): 1}});
        gw.put("/routes/1", json!({"uri": "/*", "enable_websocket": on, "upstream": upstream}));
    };
    let ask = [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Key", "x")];
    enabled(false);
    assert_eq!(gw.send("GET", "/", &ask, b"").status, 200);
    enabled(true);
    let mut client = Client::connect(&gw.proxy());
    client.send("GET", "/", &ask, b"");
    let reply = client.head();
    assert_eq!((reply.status, reply.header("Upgrade")), (101, Some("websocket")));
    let expect = |client: &mut Client, text: &str| {
        let mut got = Vec::new();
        while got.len() < text.len() {
            let some = client.some();
            assert!(!some.is_empty(), "the tunnel ended");
            got.extend(some);
        }
        assert_eq!(String::from_utf8_lossy(&got), text);
    };
    expect(&mut client, "hello");
    for text in ["one", "two"] {
        client.write(text.as_bytes()).expect("written");
        expect(&mut client, text);
    }
    drop(client);
    access_log(&gw, "101");
}

#[test]
fn a_gibibyte_streams_both_ways_in_constant_memory() {
    const SIZE: u64 = 1 << 30;
    let gw = Gateway::with(json!({"nginx_config": {"worker_processes": 1}}));
    let total = Arc::new(AtomicUsize::new(0));
    let counted = total.clone();
    // Reads a gibibyte, then sends one.
    let up = Upstream::serving(move |_, mut stream| {
        let mut piece = vec![0; 1 << 16];
        let mut head = Vec::new();
        let body = loop {
            let n = stream.read(&mut piece).expect("readable");
            head.extend_from_slice(&piece[..n]);
            if let Some(end) = head.windows(4).position(|w| w == b"\r\n\r\n") {
                break head.len() - end - 4;
            }
        };
        let mut left = SIZE - body as u64;
        while left > 0 {
            let n = stream.read(&mut piece).expect("readable") as u64;
            assert!(n > 0, "the whole body comes");
            left -= n;
        }
        counted.store(SIZE as usize, Ordering::SeqCst);
        write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {SIZE}\r\n\r\n").expect("written");
        let zeros = vec![0; 1 << 16];
        (0..SIZE / zeros.len() as u64).for_each(|_| stream.write_all(&zeros).expect("written"));
    });
    route(&gw, &[up.addr()], json!({}));
    let before = rss_kib(gw.pid());
    let mut stream = TcpStream::connect(gw.proxy()).expect("connected");
    write!(stream, "PUT / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {SIZE}\r\n\r\n")
        .expect("written");
    let zeros = vec![0; 1 << 16];
    let mut most = before;
    for i in 0..SIZE / zeros.len() as u64 {
        stream.write_all(&zeros).expect("written");
        if i % 1024 == 0 {
            most = most.max(rss_kib(gw.pid()));
        }
    }
    let (mut got, mut piece) = (0, vec![0; 1 << 16]);
    loop {
        let n = stream.read(&mut piece).expect("readable") as u64;
        if n == 0 {
            break;
        }
        if (got >> 26) != ((got + n) >> 26) {
            most = most.max(rss_kib(gw.pid()));
        }
        got += n;
    }
    assert_eq!(total.load(Ordering::SeqCst) as u64, SIZE);
    assert!(got > SIZE && got < SIZE + 1024, "{got}");
    assert!(most - before < 8 * 1024, "{before} KiB grew to {most} KiB");
}

#[test]
fn a_drain_cuts_no_request_and_closes_idle_connections() {
    let mut gw = Gateway::start();
    let (let_go, wait) = mpsc::channel::<()>();
    let wait = Arc::new(std::sync::Mutex::new(wait));
    let (came, arrived) = mpsc::channel();
    let up = Upstream::serving(move |_, stream| {
        let mut stream = BufReader::new(stream);
        while let Some(seen) = read_request(&mut stream) {
            if seen.target == "/slow" {
                came.send(()).expect("sent");
                wait.lock().expect("not poisoned").recv().expect("let go");
            }
            stream.get_mut().write_all(OK.as_bytes()).expect("written");
        }
    });
    route(&gw, &[up.addr()], json!({}));
    let mut idle = Client::connect(&gw.proxy());
    idle.send("GET", "/", &[], b"");
    assert_eq!(idle.reply("GET").status, 200);
    let mut busy = Client::connect(&gw.proxy());
    busy.send("GET", "/slow", &[], b"");
    arrived.recv().expect("it is with the node");
    let address = gw.proxy();
    gw.signal(libc::SIGQUIT);
    assert!(idle.closed(), "an idle connection closes");
    eventually("new connections are refused", || TcpStream::connect(&address).is_err().then_some(()));
    let_go.send(()).expect("sent");
    let reply: Reply = busy.reply("GET");
    assert_eq!((reply.status, reply.text().as_str(), reply.header("Connection")), (200, "ok", Some("close")));
    assert!(gw.wait().success());
}

#[test]
fn access_log_writes_what_its_format_says() {
    let gw = gateway("\"$request\" $status $body_bytes_sent $http_x_a $route_id $upstream_status \"$http_none\"");
    let up = always(OK);
    route(&gw, &[up.addr()], json!({}));
    gw.send("GET", "/a?b=c", &[("X-A", "q\"q")], b"");
    access_log(&gw, "\"GET /a?b=c HTTP/1.1\" 200 2 q\\x22q 1 200 \"-\"");
    get(&gw.proxy(), "/other");
    raw(&gw.proxy(), b"nonsense\r\n\r\n");
    eventually("a refused request in access.log", || gw.dir.read("logs/access.log").contains(" 400 ").then_some(()));
}

#[test]
fn a_node_that_only_sends_interim_answers_is_given_up() {
    let up = Upstream::answering(|seen| {
        let interim = "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n";
        let times = if seen.target == "/few" { 3 } else { 200 };
        format!("{}HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", interim.repeat(times))
    });
    let gw = gateway("$status");
    route(&gw, &[up.addr()], json!({"retries": 0}));
    assert_eq!(gw.get("/few").text(), "ok");
    assert_eq!(gw.get("/many").status, 502);
    gw.expect_log("too many interim responses from the upstream");
}

#[test]
fn a_body_is_kept_for_another_try_up_to_its_bound() {
    for (size, status) in [(1000, 200), (60 * 1024, 200), (100 * 1024, 502)] {
        let gw = gateway("$status");
        // Reads the whole request and closes: what was sent is lost, and only a kept body can be sent again.
        let lossy = Upstream::serving(|_, stream| drop(read_request(&mut BufReader::new(stream))));
        let good = always(OK);
        route(&gw, &[lossy.addr(), good.addr()], json!({}));
        let body = vec![b'x'; size];
        assert_eq!(gw.send("PUT", "/", &[], &body).status, status, "{size} bytes");
        assert_eq!(lossy.connections(), 1);
        let arrived = good.seen().pop().map(|seen| seen.body.len());
        assert_eq!(arrived, (status == 200).then_some(size));
    }
}

#[test]
fn a_node_that_sends_only_line_ends_is_refused_at_once() {
    let gw = gateway("$status");
    route(&gw, &[always("\r\n\r\n").addr()], json!({"retries": 0}));
    // Not 504 after the time limit: no byte that follows could make a head of it.
    assert_eq!(gw.get("/").status, 502);
}

#[test]
fn requests_come_by_a_socket_of_the_file_system_too() {
    let mut gw = Gateway::with(json!({"lua_listen": ["unix:logs/in.sock"]}));
    let up = always(OK);
    route(&gw, &[up.addr()], json!({}));
    let ask = |gw: &Gateway| {
        let mut stream = UnixStream::connect(gw.dir.join("logs/in.sock")).expect("it listens");
        stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        answer
    };
    let answer = ask(&gw);
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\nok"), "{answer}");
    assert_eq!(up.last().header("X-Real-IP"), Some("127.0.0.1"));
    // What a killed gateway has left behind is in nobody's way.
    gw.kill();
    gw.launch();
    assert!(ask(&gw).ends_with("ok"));
    let second = support::Dir::new();
    second.configure(json!({"lua_listen": [format!("unix:{}", gw.dir.join("logs/in.sock").display())]}));
    let (status, said) = support::run(second.command());
    assert!(!status.success() && said.contains("listen on unix:"), "{said}");
}
