//! Connections: which node they reach, what of them is passed on, and how they end.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Shutdown, TcpStream},
    sync::mpsc,
    time::{Duration, Instant},
};

use serde_json::json;

use crate::{
    gateway, listening, node,
    support::{DEADLINE, Dir, Gateway, Upstream, eventually, get, rss_kib},
    to,
};

fn connect(address: &str) -> TcpStream {
    let stream = TcpStream::connect(address).expect("connects");
    stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
    stream.set_write_timeout(Some(DEADLINE)).expect("a timeout");
    stream
}

/// Sends, ends its direction, and reads to the end. Empty: it was closed without a word, or reset.
fn ask(address: &str, text: &str) -> String {
    let mut stream = connect(address);
    let _ = stream.write_all(text.as_bytes());
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = String::new();
    match stream.read_to_string(&mut answer) {
        Ok(_) => answer,
        Err(e) if e.kind() == ErrorKind::ConnectionReset => answer,
        Err(e) => panic!("{e}"),
    }
}

#[test]
fn bytes_pass_both_ways_and_an_end_leaves_the_other_direction_open() {
    let (gw, up) = (gateway(), node("a"));
    gw.put("/stream_routes/1", json!({"upstream": to(up.addr())}));
    assert_eq!(ask(&gw.tcp(), "hello"), "a hello");
    let long = "0123456789".repeat(1 << 20);
    assert_eq!(ask(&gw.tcp(), &long).len(), long.len() + 2);
    // The node's end comes first.
    let greeting = Upstream::serving(|_, mut stream| {
        stream.write_all(b"greetings").expect("sent");
        stream.shutdown(Shutdown::Write).expect("ended");
        let mut rest = String::new();
        stream.read_to_string(&mut rest).expect("read to the end");
        assert_eq!(rest, "thanks");
    });
    gw.put("/stream_routes/1", json!({"upstream": to(greeting.addr())}));
    let mut stream = connect(&gw.tcp());
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("read to the end");
    assert_eq!(text, "greetings");
    stream.write_all(b"thanks").expect("sent");
}

#[test]
fn routes_are_found_by_address_and_port_the_oldest_first() {
    let (a, b, c) = (node("a"), node("b"), node("c"));
    let gw = Gateway::with(listening(json!(["127.0.0.1:0", "127.0.0.1:0"]), json!([])));
    let [first, second] = gw.addresses("tcp").try_into().expect("two addresses");
    assert_eq!(ask(&first, "x"), "", "no route");
    gw.expect_log("not hit any route, client: 127.0.0.1, server: 127.0.0.1:");
    let port: u16 = second.rsplit_once(':').and_then(|(_, port)| port.parse().ok()).expect("a port");
    gw.put("/stream_routes/3", json!({"server_port": port, "upstream": to(b.addr())}));
    gw.put("/stream_routes/1", json!({"remote_addr": "127.0.0.0/26", "upstream": to(a.addr())}));
    assert_eq!((ask(&first, "x").as_str(), ask(&second, "x").as_str()), ("a x", "b x"));
    gw.put("/stream_routes/3", json!({"server_addr": "127.0.0.2", "upstream": to(b.addr())}));
    assert_eq!(ask(&second, "x"), "a x");
    gw.put("/stream_routes/1", json!({"remote_addr": "10.0.0.0/8", "upstream": to(a.addr())}));
    assert_eq!(ask(&second, "x"), "");
    gw.put("/upstreams/u", to(c.addr()));
    gw.put("/services/s", json!({"upstream_id": "u"}));
    gw.put("/stream_routes/1", json!({"service_id": "s"}));
    assert_eq!(ask(&second, "x"), "c x");
    gw.put("/stream_routes/1", json!({"upstream_id": "u"}));
    gw.put("/upstreams/u", to(a.addr()));
    assert_eq!(ask(&second, "x"), "a x", "as the upstream is now");
    assert_eq!(gw.admin("DELETE", "/stream_routes/1", ()).status, 200);
    assert_eq!(ask(&second, "x"), "");
}

#[test]
fn a_node_that_cannot_be_reached_is_left_for_the_next() {
    let (gw, up) = (gateway(), node("a"));
    let place = |address: &str, priority: i64| {
        let (host, port) = address.rsplit_once(':').expect("a port");
        json!({"host": host, "port": port.parse::<u16>().expect("a port"), "weight": 1, "priority": priority})
    };
    let (dead, other) = (Upstream::dead(), Upstream::dead());
    for balance in ["roundrobin", "least_conn", "chash"] {
        let nodes = [place(&dead, 1), place(&other, 0), place(&up.addr(), -1)];
        let upstream = json!({"type": balance, "key": "remote_addr", "nodes": nodes});
        gw.put("/stream_routes/1", json!({"upstream": upstream}));
        assert_eq!(ask(&gw.tcp(), "x"), "a x", "{balance}");
    }
    gw.expect_log("trying the next upstream node");
    let nodes = [place(&dead, 0), place(&up.addr(), -1)];
    gw.put("/stream_routes/1", json!({"upstream": {"type": "roundrobin", "nodes": nodes, "retries": 0}}));
    assert_eq!(ask(&gw.tcp(), "x"), "");
    gw.expect_log("connect() failed (111: Connection refused) while connecting to upstream");
    let before = up.connections();
    gw.put("/stream_routes/1", json!({"upstream": {"type": "roundrobin", "nodes": {&dead: 1}, "retries": 4_000_000}}));
    assert_eq!(ask(&gw.tcp(), "x"), "", "however many tries it asks for");
    assert_eq!(up.connections(), before);
    gw.put("/stream_routes/1", json!({"upstream": to("nowhere.invalid:1")}));
    assert_eq!(ask(&gw.tcp(), "x"), "");
    gw.expect_log("no valid upstream node");
}

#[test]
fn chash_keeps_clients_where_they_are_and_least_conn_counts_sessions() {
    let (a, b) = (node("a"), node("b"));
    let gw = gateway();
    let nodes = json!({a.addr(): 1, b.addr(): 1});
    for key in
        [json!({"key": "server_addr"}), json!({"hash_on": "vars_combinations", "key": "$remote_addr$server_port"})]
    {
        let mut upstream = json!({"type": "chash", "nodes": nodes});
        upstream.as_object_mut().expect("a map").extend(key.as_object().expect("a map").clone());
        gw.put("/stream_routes/1", json!({"upstream": upstream}));
        let first = ask(&gw.tcp(), "x");
        for _ in 0..5 {
            assert_eq!(ask(&gw.tcp(), "x"), first);
        }
    }
    // One worker, so that one balancer sees all.
    let mut settings = listening(json!(["127.0.0.1:0"]), json!([]));
    settings["nginx_config"] = json!({"worker_processes": 1});
    let gw = Gateway::with(settings);
    gw.put("/stream_routes/1", json!({"upstream": {"type": "least_conn", "nodes": nodes}}));
    let (before_a, before_b) = (a.connections(), b.connections());
    let held: Vec<TcpStream> = (0..4).map(|_| connect(&gw.tcp())).collect();
    let shares = || (a.connections() - before_a, b.connections() - before_b);
    eventually("all are with a node", || (shares().0 + shares().1 == 4).then_some(()));
    assert_eq!(shares(), (2, 2));
    drop(held);
}

#[test]
fn who_does_not_read_is_sent_no_more() {
    let (release, released) = mpsc::channel::<()>();
    let released = std::sync::Mutex::new(released);
    let up = Upstream::serving(move |_, mut stream| {
        released.lock().expect("no panic").recv().expect("a word");
        let mut count = 0;
        let mut piece = vec![0; 1 << 16];
        while let Ok(n @ 1..) = stream.read(&mut piece) {
            count += n;
        }
        write!(stream, "{count}").expect("sent");
    });
    let gw = gateway();
    gw.put("/stream_routes/1", json!({"upstream": to(up.addr())}));
    let mut stream = connect(&gw.tcp());
    let before = rss_kib(gw.pid());
    stream.set_write_timeout(Some(Duration::from_millis(500))).expect("a timeout");
    let piece = vec![7; 1 << 20];
    let mut sent = 0;
    // The kernel's buffers of four sockets are all that fills.
    let full = loop {
        assert!(sent < 256 << 20, "the gateway takes everything");
        match stream.write(&piece) {
            Ok(n) => sent += n,
            Err(e) => break e.kind(),
        }
    };
    assert!(matches!(full, ErrorKind::WouldBlock | ErrorKind::TimedOut), "{full}");
    let grown = rss_kib(gw.pid()).saturating_sub(before);
    assert!(grown < 8 << 10, "{grown} KiB more");
    release.send(()).expect("the node waits");
    stream.set_write_timeout(Some(DEADLINE)).expect("a timeout");
    stream.shutdown(Shutdown::Write).expect("ended");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    assert_eq!(answer, sent.to_string());
}

#[test]
fn a_session_in_which_nothing_moves_ends() {
    let up = node("a");
    let gw = gateway();
    let timeout = json!({"connect": 1, "send": 1, "read": 0.2});
    gw.put("/stream_routes/1", json!({"upstream": {"nodes": {up.addr(): 1}, "timeout": timeout}}));
    let mut stream = connect(&gw.tcp());
    let begun = Instant::now();
    // Each byte starts the wait anew.
    for _ in 0..4 {
        stream.write_all(b"x").expect("sent");
        std::thread::park_timeout(Duration::from_millis(100));
    }
    assert_eq!(stream.read(&mut [0; 16]).unwrap_or(0), 0, "the node has seen no end");
    assert!(begun.elapsed() >= Duration::from_millis(500), "{:?}", begun.elapsed());
    gw.expect_log("connection timed out");
}

#[test]
fn a_node_that_ends_early_is_heard_to_its_end() {
    // Says no and goes away, with most of what the client sends unread.
    let up = Upstream::serving(|_, mut stream| {
        stream.read_exact(&mut [0; 1]).expect("a byte");
        stream.write_all(b"no").expect("sent");
    });
    let gw = gateway();
    gw.put("/stream_routes/1", json!({"upstream": to(up.addr())}));
    let mut stream = connect(&gw.tcp());
    stream.write_all(b"x").expect("sent");
    let mut answer = [0; 2];
    stream.read_exact(&mut answer).expect("an answer");
    assert_eq!(&answer, b"no");
    while stream.write_all(&[0; 1 << 16]).is_ok() {}
}

#[test]
fn the_log_and_the_counters_know_of_sessions() {
    let up = node("a");
    let mut settings = listening(json!(["127.0.0.1:0"]), json!([]));
    settings["nginx_config"] = json!({"stream": {"enable_access_log": true, "access_log_format":
        "$remote_addr $protocol $status $bytes_received $bytes_sent ${upstream_addr} $upstream_bytes_sent $route_id $none [$time_local] $session_time\n"}});
    let gw = Gateway::with(settings);
    gw.put("/stream_routes/r", json!({"upstream": to(up.addr())}));
    assert_eq!(ask(&gw.tcp(), "hello"), "a hello");
    let line = || gw.dir.read("logs/access_stream.log");
    let log = eventually("a line", || Some(line()).filter(|log| log.ends_with('\n')));
    assert!(log.starts_with(&format!("127.0.0.1 TCP 200 5 7 {} 5 r - [", up.addr())), "{log}");
    let dead = Upstream::dead();
    gw.put("/stream_routes/r", json!({"upstream": to(dead.clone())}));
    ask(&gw.tcp(), "hello");
    let failed = format!("127.0.0.1 TCP 502 0 0 {dead} 0 r - [");
    eventually("a line", || line().contains(&failed).then_some(()));
    gw.admin("DELETE", "/stream_routes/r", ());
    ask(&gw.tcp(), "hello");
    eventually("a line", || line().contains("127.0.0.1 TCP 500 0 0 - - - - [").then_some(()));
    let accepted = |text: String| text.contains("apisix_nginx_http_current_connections{state=\"accepted\"} 3");
    eventually("three connections", || {
        accepted(get(&gw.prometheus(), "/apisix/prometheus/metrics").text()).then_some(())
    });
}

#[test]
fn sessions_are_drained_and_new_connections_refused() {
    let up = node("a");
    let mut gw = gateway();
    gw.put("/stream_routes/1", json!({"upstream": to(up.addr())}));
    let mut stream = connect(&gw.tcp());
    stream.write_all(b"be").expect("sent");
    eventually("it is with the node", || (up.connections() == 1).then_some(()));
    gw.signal(libc::SIGQUIT);
    eventually("nobody accepts", || TcpStream::connect(gw.tcp()).is_err().then_some(()));
    stream.write_all(b"fore").expect("sent");
    stream.shutdown(Shutdown::Write).expect("ended");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    assert_eq!(answer, "a before");
    assert!(gw.wait().success());
}

#[test]
fn a_drain_does_not_wait_for_ever() {
    let up = node("a");
    let mut settings = listening(json!(["127.0.0.1:0"]), json!([]));
    settings["nginx_config"] = json!({"worker_shutdown_timeout": "300ms"});
    let mut gw = Gateway::with(settings);
    gw.put("/stream_routes/1", json!({"upstream": to(up.addr())}));
    let mut stream = connect(&gw.tcp());
    stream.write_all(b"x").expect("sent");
    eventually("it is with the node", || (up.connections() == 1).then_some(()));
    assert!(gw.quit().success());
    assert_eq!(stream.read(&mut [0; 16]).unwrap_or(0), 0);
}

#[test]
fn more_connections_than_a_worker_may_have_are_refused() {
    let up = node("a");
    let mut settings = listening(json!(["127.0.0.1:0"]), json!([]));
    settings["nginx_config"] = json!({"worker_processes": 1, "event": {"worker_connections": 2}});
    let gw = Gateway::with(settings);
    gw.put("/stream_routes/1", json!({"upstream": to(up.addr())}));
    let held = [connect(&gw.tcp()), connect(&gw.tcp())];
    eventually("they are with the node", || (up.connections() == 2).then_some(()));
    assert_eq!(ask(&gw.tcp(), "x"), "");
    gw.expect_log("2 worker_connections are not enough");
    drop(held);
    eventually("there is room again", || (ask(&gw.tcp(), "x") == "a x").then_some(()));
}

#[test]
fn proxy_protocol_is_taken_and_sent_where_it_is_configured() {
    let up = node("a");
    let tcp = json!([
        {"addr": "127.0.0.1:0"},
        {"addr": "127.0.0.1:0", "proxy_protocol": false, "proxy_protocol_to_upstream": true},
        {"addr": "127.0.0.1:0", "proxy_protocol_to_upstream": true},
    ]);
    let mut settings = listening(tcp, json!([]));
    settings["apisix"]["proxy_protocol"] = json!({"enable_tcp_pp": true});
    settings["nginx_config"] = json!({"stream": {"real_ip_from": ["127.0.0.1"]}});
    let gw = Gateway::with(settings);
    gw.put("/stream_routes/1", json!({"remote_addr": "10.1.0.0/16", "upstream": to(up.addr())}));
    let [takes, sends, both] = gw.addresses("tcp").try_into().expect("three addresses");
    let header = "PROXY TCP4 10.1.2.3 10.9.9.9 1234 443\r\n";
    assert_eq!(ask(&takes, &format!("{header}hello")), "a hello");
    assert_eq!(ask(&takes, "hello"), "", "no header");
    gw.expect_log("no PROXY protocol header");
    assert_eq!(ask(&sends, "hello"), "", "the client is the socket's other end");
    let port = both.rsplit_once(':').expect("a port").1;
    let expected = format!("a PROXY TCP4 10.1.2.3 127.0.0.1 1234 {port}\r\nhello");
    assert_eq!(ask(&both, &format!("{header}hello")), expected);
    gw.put("/stream_routes/1", json!({"upstream": to(up.addr())}));
    let answer = ask(&sends, "hello");
    assert!(answer.starts_with("a PROXY TCP4 127.0.0.1 127.0.0.1 ") && answer.ends_with("\r\nhello"), "{answer}");

    // Without trust a header is taken, and its word is not.
    let mut settings = listening(json!([{"addr": "127.0.0.1:0", "proxy_protocol": true}]), json!([]));
    settings["nginx_config"] = json!({"stream": {"real_ip_from": ["10.0.0.0/8"]}});
    let gw = Gateway::with(settings);
    gw.put("/stream_routes/1", json!({"remote_addr": "127.0.0.1", "upstream": to(up.addr())}));
    assert_eq!(ask(&gw.tcp(), &format!("{header}hello")), "a hello");
}

#[test]
fn without_http_only_streams_are_served() {
    let up = node("a");
    let gw = Gateway::with(json!({"apisix": {"proxy_mode": "stream", "stream_proxy": {"tcp": ["127.0.0.1:0"]}}}));
    gw.put("/stream_routes/1", json!({"upstream": to(up.addr())}));
    assert_eq!(ask(&gw.tcp(), "x"), "a x");
    assert_eq!((gw.addresses("proxy").len(), gw.addresses("proxy_tls").len()), (0, 0));
}

#[test]
fn a_node_that_is_found_unwell_is_not_tried() {
    let (gw, up, dead) = (gateway(), node("a"), Upstream::dead());
    let often = json!({"interval": 1, "successes": 1, "tcp_failures": 1});
    let checks = json!({"active": {"type": "tcp", "healthy": often, "unhealthy": often}});
    let mut upstream = to(up.addr());
    upstream["nodes"][&dead] = json!(1);
    upstream["checks"] = checks;
    gw.put("/stream_routes/1", json!({"upstream": upstream}));
    assert_eq!(ask(&gw.tcp(), "x"), "a x");
    gw.expect_log(&format!("(upstream#/apisix/stream_routes/1) unhealthy TCP increment (1/1) for '127.0.0.1({dead})'"));
    let tried = || gw.log().matches("trying the next upstream node").count();
    let before = tried();
    for _ in 0..10 {
        assert_eq!(ask(&gw.tcp(), "x"), "a x");
    }
    assert_eq!(tried(), before);
}

#[test]
fn nodes_come_from_a_registry() {
    let (dir, up) = (Dir::new(), node("a"));
    std::fs::create_dir_all(dir.join("lua/apisix/discovery")).expect("directories");
    let (host, port) = (up.addr(), up.addr());
    let (host, port) = (host.split(':').next().expect("a host"), port.rsplit(':').next().expect("a port").to_owned());
    let module = format!(
        "return {{ nodes = function(name)
            ngx.sleep(name == 'never' and 3600 or 0.001)
            if name == 'a' then return {{ {{ host = '{host}', port = {port}, weight = 1 }} }} end
            return nil, 'nobody knows ' .. name
        end }}"
    );
    dir.write("lua/apisix/discovery/mine.lua", module);
    let mut settings = listening(json!(["127.0.0.1:0"]), json!([]));
    settings["discovery"] = json!({"mine": {}});
    dir.configure(settings);
    let gw = Gateway::in_dir(dir);
    let of =
        |name: &str| json!({"scheme": "tcp", "type": "roundrobin", "discovery_type": "mine", "service_name": name});
    gw.put("/stream_routes/1", json!({"upstream": of("a")}));
    assert_eq!(ask(&gw.tcp(), "hello"), "a hello");
    gw.put("/stream_routes/1", json!({"upstream": of("b")}));
    assert_eq!(ask(&gw.tcp(), "hello"), "");
    gw.expect_log("no valid upstream node: nobody knows b");
    let mut never = of("never");
    never["timeout"] = json!({"connect": 0.05, "send": 60, "read": 60});
    gw.put("/stream_routes/1", json!({"upstream": never}));
    assert_eq!(ask(&gw.tcp(), "hello"), "");
    gw.expect_log("no valid upstream node: the registry has not answered within 50 ms");
    gw.put("/stream_routes/1", json!({"upstream": of("a")}));
    assert_eq!(ask(&gw.tcp(), "hello"), "a hello");
}
