//! UDP clients: their sessions, their answers, and the bounds of both.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};

use crate::{
    listening,
    support::{DEADLINE, Gateway, eventually, get},
    to,
};

/// A node that answers each datagram with its name, the port that it came from, and what was in it.
struct Node {
    addr: String,
    seen: Arc<AtomicUsize>,
}

impl Node {
    fn start(name: &'static str) -> Node {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
        let addr = socket.local_addr().expect("an address").to_string();
        let seen = Arc::new(AtomicUsize::new(0));
        let count = seen.clone();
        thread::spawn(move || {
            let mut data = vec![0; 1 << 16];
            while let Ok((n, from)) = socket.recv_from(&mut data) {
                count.fetch_add(1, Ordering::SeqCst);
                if &data[..n] != b"hush" {
                    let head = format!("{name} {} ", from.port());
                    let _ = socket.send_to(&[head.as_bytes(), &data[..n]].concat(), from);
                }
            }
        });
        Node { addr, seen }
    }

    fn seen(&self) -> usize {
        self.seen.load(Ordering::SeqCst)
    }
}

fn gateway(extra: Value) -> Gateway {
    let mut settings = listening(json!([]), json!(["127.0.0.1:0"]));
    settings["nginx_config"] = extra;
    Gateway::with(settings)
}

fn client(address: &str) -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
    socket.connect(address).expect("connects");
    socket.set_read_timeout(Some(DEADLINE)).expect("a timeout");
    socket
}

fn receive(socket: &UdpSocket) -> String {
    let mut data = vec![0; 1 << 16];
    let n = socket.recv(&mut data).expect("a datagram");
    String::from_utf8_lossy(&data[..n]).into_owned()
}

/// The name of the node that answers, the port that it sees, and what it got.
fn ask(socket: &UdpSocket, text: &str) -> (String, u16, String) {
    socket.send(text.as_bytes()).expect("sent");
    let answer = receive(socket);
    let mut words = answer.splitn(3, ' ');
    let mut word = || words.next().expect("three words").to_owned();
    (word(), word().parse().expect("a port"), word())
}

/// Nothing comes, although what was sent after it has been answered.
fn silent(socket: &UdpSocket) -> bool {
    socket.set_read_timeout(Some(Duration::from_millis(50))).expect("a timeout");
    let nothing = socket.recv(&mut [0; 16]).is_err();
    socket.set_read_timeout(Some(DEADLINE)).expect("a timeout");
    nothing
}

#[test]
fn each_client_has_its_session_and_its_answers() {
    let (gw, up) = (gateway(json!({})), Node::start("a"));
    let (one, two) = (client(&gw.udp()), client(&gw.udp()));
    one.send(b"lost").expect("sent");
    gw.expect_log("not hit any route, client: 127.0.0.1");
    gw.put("/stream_routes/1", json!({"upstream": to(&*up.addr)}));
    let first = ask(&one, "hello");
    assert_eq!((first.0.as_str(), first.2.as_str()), ("a", "hello"));
    assert_eq!(ask(&one, "again"), ("a".into(), first.1, "again".into()), "the same session");
    let other = ask(&two, "hello");
    assert_ne!(first.1, other.1, "another client, another session");
    assert!(silent(&one) && silent(&two), "answers go to their client alone");
    let long = "x".repeat(60_000);
    assert_eq!(ask(&one, &long).2, long);
    assert_eq!(ask(&one, "").2, "", "an empty one is a datagram, too");
    // A burst: what comes while the session finds its node waits for it.
    let three = client(&gw.udp());
    for n in 0..5 {
        three.send(n.to_string().as_bytes()).expect("sent");
    }
    let all: Vec<String> = (0..5).map(|_| receive(&three)).collect();
    assert!(all.iter().enumerate().all(|(n, answer)| answer.ends_with(&format!(" {n}"))), "{all:?}");
}

#[test]
fn a_session_ends_when_it_is_idle_and_keeps_its_node_until_then() {
    let (a, b) = (Node::start("a"), Node::start("b"));
    let gw = gateway(json!({"stream": {"enable_access_log": true,
        "access_log_format": "$protocol $status $bytes_received $bytes_sent $upstream_addr"}}));
    let timeout = json!({"connect": 1, "send": 1, "read": 0.3});
    let route = |node: &Node| json!({"upstream": {"nodes": {&*node.addr: 1}, "timeout": timeout}});
    gw.put("/stream_routes/1", route(&a));
    let socket = client(&gw.udp());
    let (name, port, _) = ask(&socket, "hello");
    gw.put("/stream_routes/1", route(&b));
    assert_eq!((name.as_str(), ask(&socket, "hello").0.as_str()), ("a", "a"));
    let sent = 2 * format!("a {port} hello").len();
    let line = format!("UDP 200 10 {sent} {}\n", a.addr);
    eventually("its line", || gw.dir.read("logs/access_stream.log").contains(&line).then_some(()));
    assert_eq!(ask(&socket, "hello").0, "b", "a new session");
    // What the client alone sends keeps a session, too.
    let before = b.seen();
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(900) {
        socket.send(b"hush").expect("sent");
        thread::park_timeout(Duration::from_millis(20));
    }
    eventually("the node has some", || (b.seen() > before).then_some(()));
    assert_eq!(gw.dir.read("logs/access_stream.log"), line);
}

#[test]
fn more_sessions_than_there_may_be_are_refused() {
    let up = Node::start("a");
    let gw = gateway(json!({"worker_processes": 1, "event": {"worker_connections": 4}}));
    gw.put("/stream_routes/1", json!({"upstream": to(&*up.addr)}));
    let sockets: Vec<UdpSocket> = (0..3).map(|_| client(&gw.udp())).collect();
    ask(&sockets[0], "x");
    ask(&sockets[1], "x");
    sockets[2].send(b"x").expect("sent");
    gw.expect_log("datagrams to ");
    assert!(silent(&sockets[2]));
    assert_eq!(gw.get("/").status, 404, "the other half of the connections is for requests");
    assert_eq!((ask(&sockets[0], "y").2.as_str(), up.seen()), ("y", 3));
}

#[test]
fn a_node_that_nobody_listens_at_ends_the_session() {
    let gw = gateway(
        json!({"stream": {"enable_access_log": true, "access_log_format": "$protocol $status $upstream_addr"}}),
    );
    let dead = {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
        socket.local_addr().expect("an address").to_string()
    };
    gw.put("/stream_routes/1", json!({"upstream": to(dead.clone())}));
    let socket = client(&gw.udp());
    socket.send(b"x").expect("sent");
    gw.expect_log("no datagram reaches the upstream");
    let line = format!("UDP 502 {dead}\n");
    eventually("its line", || gw.dir.read("logs/access_stream.log").contains(&line).then_some(()));
    let up = Node::start("a");
    gw.put("/stream_routes/1", json!({"upstream": {"scheme": "tls", "nodes": {&*up.addr: 1}}}));
    socket.send(b"x").expect("sent");
    gw.expect_log("upstream scheme tls is not spoken over UDP");
    gw.put("/stream_routes/1", json!({"upstream": to(&*up.addr)}));
    assert_eq!(ask(&socket, "x").0, "a");
}

#[test]
fn a_dead_node_is_told_once_for_many_sessions() {
    let gw = gateway(json!({"worker_processes": 1, "error_log_level": "info"}));
    let dead = {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
        socket.local_addr().expect("an address").to_string()
    };
    gw.put("/stream_routes/1", json!({"upstream": to(dead)}));
    let sockets: Vec<UdpSocket> = (0..5).map(|_| client(&gw.udp())).collect();
    for socket in &sockets {
        socket.send(b"x").expect("sent");
    }
    let lines = |of: &str| {
        let log = gw.log();
        log.lines().filter(|line| line.contains("no datagram reaches the upstream") && line.contains(of)).count()
    };
    eventually("all have ended", || (lines("") == 5).then_some(()));
    assert_eq!((lines("[error]"), lines("[info]")), (1, 4));
}

#[test]
fn a_datagram_from_another_listener_begins_no_session() {
    let up = Node::start("a");
    let mut settings = listening(json!([]), json!(["127.0.0.1:0", "127.0.0.1:0"]));
    settings["nginx_config"] = json!({"worker_processes": 1});
    let gw = Gateway::with(settings);
    gw.put("/stream_routes/1", json!({"upstream": to(&*up.addr)}));
    let [one, other] = gw.addresses("udp").try_into().expect("two addresses");
    let forged = Socket::new(Domain::IPV4, Type::DGRAM, None).expect("a socket");
    forged.set_reuse_port(true).expect("an option");
    forged.bind(&one.parse::<SocketAddr>().expect("an address").into()).expect("binds");
    UdpSocket::from(forged).send_to(b"echo me", &other).expect("sent");
    assert_eq!((ask(&client(&other), "x").0.as_str(), up.seen()), ("a", 1));
}

#[test]
fn a_wildcard_address_answers_from_where_it_was_asked() {
    let (a, b) = (Node::start("a"), Node::start("b"));
    let mut settings = listening(json!([]), json!(["0.0.0.0:0", "[::]:0"]));
    settings["nginx_config"] = json!({"worker_processes": 2});
    let gw = Gateway::with(settings);
    let [v4, v6] = gw.addresses("udp").try_into().expect("two addresses");
    let port = |address: &str| address.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok()).expect("a port");
    gw.put("/stream_routes/1", json!({"server_addr": "127.0.0.2", "upstream": to(&*a.addr)}));
    gw.put("/stream_routes/2", json!({"server_addr": "127.0.0.3", "upstream": to(&*b.addr)}));
    gw.put("/stream_routes/3", json!({"server_addr": "::1", "upstream": to(&*b.addr)}));
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
    socket.set_read_timeout(Some(DEADLINE)).expect("a timeout");
    // One client port, two addresses of the gateway: two sessions.
    for (to, name) in [("127.0.0.2", "a "), ("127.0.0.3", "b "), ("127.0.0.2", "a ")] {
        socket.send_to(b"x", (to, port(&v4))).expect("sent");
        let mut data = [0; 64];
        let (n, from) = socket.recv_from(&mut data).expect("an answer");
        assert_eq!((from.to_string(), data[..n].starts_with(name.as_bytes())), (format!("{to}:{}", port(&v4)), true));
    }
    let socket = UdpSocket::bind("[::1]:0").expect("a socket");
    socket.connect(("::1", port(&v6))).expect("connects");
    socket.set_read_timeout(Some(DEADLINE)).expect("a timeout");
    assert_eq!(ask(&socket, "x").0, "b");
}

#[test]
fn a_drain_waits_for_an_answer_under_way_and_no_longer() {
    let node = UdpSocket::bind("127.0.0.1:0").expect("a socket");
    node.set_read_timeout(Some(DEADLINE)).expect("a timeout");
    let mut gw = gateway(json!({}));
    gw.put("/stream_routes/1", json!({"upstream": to(node.local_addr().expect("an address").to_string())}));
    let socket = client(&gw.udp());
    socket.send(b"x").expect("sent");
    let (_, from) = node.recv_from(&mut [0; 16]).expect("a datagram");
    gw.signal(libc::SIGQUIT);
    eventually("nobody accepts", || std::net::TcpStream::connect(gw.proxy()).is_err().then_some(()));
    node.send_to(b"late", from).expect("sent");
    assert_eq!(receive(&socket), "late");
    let begun = Instant::now();
    assert!(gw.wait().success());
    assert!(begun.elapsed() < Duration::from_secs(10), "an idle session holds nobody up");
}

#[test]
fn sessions_of_both_protocols_are_counted_while_they_last_and_when_they_end() {
    let gw = Gateway::with(listening(json!(["127.0.0.1:0"]), json!(["127.0.0.1:0"])));
    let node = UdpSocket::bind("127.0.0.1:0").expect("a socket");
    let port = |address: String| address.rsplit(':').next().and_then(|p| p.parse::<u16>().ok()).expect("a port");
    let route = |address: String, node: String| {
        json!({"server_port": port(address), "plugins": {"prometheus": {}},
            "upstream": {"nodes": {node: 1}, "timeout": {"connect": 5, "send": 5, "read": 1}}})
    };
    gw.put("/stream_routes/udp", route(gw.udp(), node.local_addr().expect("an address").to_string()));
    let client = UdpSocket::bind("127.0.0.1:0").expect("a socket");
    client.send_to(b"hello", gw.udp()).expect("sent");
    let mut buf = [0; 16];
    let (n, from) = node.recv_from(&mut buf).expect("a datagram");
    node.send_to(b"hi", from).expect("sent");
    assert_eq!((n, client.recv(&mut buf).expect("an answer")), (5, 2));
    let page = || get(&gw.prometheus(), "/apisix/prometheus/metrics").text();
    let has = |line: &str| {
        eventually(line, || page().lines().any(|own| own == line).then_some(()));
    };
    let at = format!("listen_addr=\"{}\"", gw.udp());
    has(&format!("apisix_stream_active_connections{{{at}}} 1"));
    for (way, side, bytes) in [
        ("ingress", "downstream", 5),
        ("egress", "upstream", 5),
        ("ingress", "upstream", 2),
        ("egress", "downstream", 2),
    ] {
        has(&format!("apisix_stream_bandwidth{{{at},type=\"{way}\",side=\"{side}\"}} {bytes}"));
    }
    // Silence is the end of a session, and nobody's fault.
    has(&format!("apisix_stream_status{{code=\"200\",{at},node=\"{}\"}} 1", node.local_addr().expect("an address")));
    has(&format!("apisix_stream_active_connections{{{at}}} 0"));
    has("apisix_stream_connection_total{route=\"udp\"} 1");
    // A node that says nothing for too long is one of TCP.
    let mute = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    gw.put("/stream_routes/tcp", route(gw.tcp(), mute.local_addr().expect("an address").to_string()));
    let waits = std::net::TcpStream::connect(gw.tcp()).expect("a connection");
    let at = format!("listen_addr=\"{}\"", gw.tcp());
    has(&format!("apisix_stream_status{{code=\"502\",{at},node=\"{}\"}} 1", mute.local_addr().expect("an address")));
    drop(waits);
}
