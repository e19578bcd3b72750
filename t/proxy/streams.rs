//! What calls over HTTP/2 do to nodes that have little room, refuse streams, or say nothing. The node here is one of frames (RFC 9113, 4.1).

use std::{
    io::{Read, Write},
    net::TcpStream,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use http::Response;
use hyper::body::Incoming;
use serde_json::json;

use super::{
    Gateway, Upstream, access_log, eventually, gateway,
    grpc::{call, client, rest},
    route,
    support::http2,
};

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;

const INTERNAL_ERROR: u32 = 2;
const REFUSED_STREAM: u32 = 7;

/// A node's end of a connection.
struct Frames(TcpStream);

struct Frame {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: Vec<u8>,
}

impl Frames {
    /// Behind the client's preface and the node's settings, which may bound the streams.
    fn begin(mut stream: TcpStream, max_streams: Option<u32>) -> Option<Frames> {
        stream.read_exact(&mut [0; 24]).ok()?;
        let mut frames = Frames(stream);
        let max = max_streams.map(|max| [&[0, 3][..], &max.to_be_bytes()].concat());
        frames.send(SETTINGS, 0, 0, &max.unwrap_or_default());
        Some(frames)
    }

    /// The next one that is about a request.
    fn next(&mut self) -> Option<Frame> {
        loop {
            let mut head = [0; 9];
            self.0.read_exact(&mut head).ok()?;
            let [a, b, c, kind, flags, stream @ ..] = head;
            let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
            self.0.read_exact(&mut payload).ok()?;
            match kind {
                SETTINGS if flags & ACK == 0 => self.send(SETTINGS, ACK, 0, &[]),
                PING if flags & ACK == 0 => self.send(PING, ACK, 0, &payload),
                SETTINGS | PING => {}
                WINDOW_UPDATE if stream == [0; 4] => {}
                _ => return Some(Frame { kind, flags, stream: u32::from_be_bytes(stream), payload }),
            }
        }
    }

    fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let length = (payload.len() as u32).to_be_bytes();
        let head = [&length[1..], &[kind, flags], &stream.to_be_bytes()].concat();
        let _ = self.0.write_all(&[&head, payload].concat());
    }

    /// `:status: 200` (RFC 7541, A), and the body.
    fn answer(&mut self, stream: u32, body: &[u8]) {
        self.send(HEADERS, END_HEADERS, stream, &[0x88]);
        self.send(DATA, END_STREAM, stream, body);
    }

    fn reset(&mut self, stream: u32, code: u32) {
        self.send(RST_STREAM, 0, stream, &code.to_be_bytes());
    }

    /// Says that it has looked at streams up to `last`.
    fn go_away(&mut self, last: u32) {
        self.send(GOAWAY, 0, 0, &[last.to_be_bytes(), [0; 4]].concat());
    }

    /// Lets as much come again as a frame had.
    fn widen(&mut self, data: &Frame) {
        let length = (data.payload.len() as u32).to_be_bytes();
        self.send(WINDOW_UPDATE, 0, 0, &length);
        self.send(WINDOW_UPDATE, 0, data.stream, &length);
    }

    /// The next request with its body.
    fn request(&mut self) -> Option<(u32, Vec<u8>)> {
        let mut body = Vec::new();
        loop {
            let frame = self.next()?;
            if frame.kind == DATA && !frame.payload.is_empty() {
                self.widen(&frame);
                body.extend_from_slice(&frame.payload);
            }
            if matches!(frame.kind, DATA | HEADERS) && frame.flags & END_STREAM != 0 {
                return Some((frame.stream, body));
            }
        }
    }
}

/// A node whose nth connection is served by `serve`.
fn node(serve: impl Fn(usize, Frames) + Send + Sync + 'static) -> Upstream {
    let nth = AtomicUsize::new(0);
    Upstream::serving(move |_, stream| {
        let nth = nth.fetch_add(1, Ordering::SeqCst);
        if let Some(frames) = Frames::begin(stream, None) {
            serve(nth, frames);
        }
    })
}

/// Gives every body back, as far as a frame takes it.
fn echo(mut frames: Frames) {
    while let Some((stream, body)) = frames.request() {
        frames.answer(stream, &body[..body.len().min(16 << 10)]);
    }
}

fn one_worker(format: &str) -> Gateway {
    let http = json!({"access_log_format": format, "access_log_buffer": 0});
    Gateway::with(json!({"nginx_config": {"worker_processes": 1, "http": http}}))
}

fn post(gw: &Gateway, body: &[u8]) -> (u16, String) {
    let reply = gw.send("POST", "/svc/x", &[("Content-Type", "application/grpc")], body);
    (reply.status, reply.text())
}

/// The calls that a node has, and how to answer one.
#[derive(Clone, Default)]
struct Held(Arc<Mutex<Vec<HeldCall>>>);

/// A connection, and the stream on it.
type HeldCall = (Arc<Mutex<TcpStream>>, u32);

impl Held {
    fn count(&self) -> usize {
        self.0.lock().expect("not poisoned").len()
    }

    fn answer_one(&self) {
        let (stream, id) = self.0.lock().expect("not poisoned").remove(0);
        let stream = stream.lock().expect("not poisoned").try_clone().expect("a socket");
        Frames(stream).answer(id, b"ok");
    }
}

/// A node that takes two calls at once on a connection, and keeps them. Where it is sent a third it says so.
fn narrow(held: &Held, broken: &Arc<AtomicUsize>) -> Upstream {
    let (held, broken) = (held.clone(), broken.clone());
    Upstream::serving(move |_, stream| {
        let shared = Arc::new(Mutex::new(stream.try_clone().expect("a socket")));
        let Some(mut frames) = Frames::begin(stream, Some(2)) else { return };
        while let Some((id, _)) = frames.request() {
            let mut all = held.0.lock().expect("not poisoned");
            all.push((shared.clone(), id));
            if all.iter().filter(|(stream, _)| Arc::ptr_eq(stream, &shared)).count() > 2 {
                broken.fetch_add(1, Ordering::SeqCst);
            }
        }
    })
}

/// Connections of a worker to one node, as `upstream::h2::share` has it.
const CONNECTIONS: usize = 40;

#[test]
fn a_node_with_room_for_two_gets_more_connections_and_the_rest_waits_for_a_time() {
    let gw = one_worker("$status [$upstream_status]");
    let (held, broken) = (Held::default(), Arc::default());
    let node = narrow(&held, &broken);
    let times = json!({"connect": 4, "send": 60, "read": 60});
    route(&gw, &[node.addr()], json!({"scheme": "grpc", "timeout": times}));
    http2::runtime().block_on(async {
        let mut sender = client(&gw).await;
        let mut ask = || {
            let (request, give) = call(&gw, "/svc/x");
            drop(give);
            tokio::spawn(sender.send_request(request))
        };
        let mut answers: Vec<_> = (0..CONNECTIONS * 2).map(|_| ask()).collect();
        until(|| held.count() == CONNECTIONS * 2).await;
        assert_eq!((node.connections(), broken.load(Ordering::SeqCst)), (CONNECTIONS, 0));
        // One more has to wait, and does so no longer than for a connection.
        let late = ask().await.expect("a task").expect("an answer");
        assert_eq!((late.status(), held.count(), node.connections()), (504.try_into().unwrap(), 80, CONNECTIONS));
        gw.expect_log("upstream timed out (110: Connection timed out) while waiting for room on its connections");
        // There is room again for one that waits, and for one that comes later.
        let waits = ask();
        held.answer_one();
        until(|| held.count() == CONNECTIONS * 2).await;
        held.answer_one();
        answers.push(ask());
        answers.push(waits);
        until(|| held.count() == CONNECTIONS * 2).await;
        while held.count() > 0 {
            held.answer_one();
        }
        for answer in answers {
            assert_eq!(answer.await.expect("a task").expect("an answer").status(), 200);
        }
    });
    assert_eq!((node.connections(), broken.load(Ordering::SeqCst)), (CONNECTIONS, 0));
}

/// Waits for a fact without holding up the runtime.
async fn until(fact: impl Fn() -> bool) {
    let end = tokio::time::Instant::now() + super::support::DEADLINE;
    let mut looks = tokio::time::interval(std::time::Duration::from_millis(2));
    while !fact() {
        assert!(tokio::time::Instant::now() < end, "in time");
        looks.tick().await;
    }
}

#[test]
fn a_stream_that_its_node_has_refused_is_asked_for_again() {
    let gw = one_worker("$status [$upstream_status]");
    // Has read all of the request before it refuses the stream, or goes away without having looked at it.
    for go_away in [false, true] {
        let node = node(move |nth, mut frames| {
            if nth == 0
                && let Some((stream, _)) = frames.request()
            {
                match go_away {
                    true => frames.go_away(0),
                    false => frames.reset(stream, REFUSED_STREAM),
                }
            }
            echo(frames);
        });
        route(&gw, &[node.addr()], json!({"scheme": "grpc"}));
        assert_eq!(post(&gw, b"body"), (200, "body".into()));
        assert_eq!(node.connections(), 2);
        access_log(&gw, "200 [200]");
    }
}

#[test]
fn a_node_that_refuses_always_is_left_for_another_one() {
    let gw = one_worker("$status [$upstream_status]");
    let refuses = node(|_, mut frames| {
        while let Some((stream, _)) = frames.request() {
            frames.reset(stream, REFUSED_STREAM);
        }
    });
    let up = node(|_, frames| echo(frames));
    route(&gw, &[refuses.addr(), up.addr()], json!({"scheme": "grpc"}));
    assert_eq!(post(&gw, b"body"), (200, "body".into()));
    access_log(&gw, "200 [502, 200]");
    // What is more than is kept of a body goes nowhere else.
    assert_eq!(post(&gw, &[b'x'; 64 << 10]).0, 200);
    assert_eq!(post(&gw, &[b'x'; (64 << 10) + 1]).0, 502);
}

#[test]
fn a_stream_that_its_node_may_have_looked_at_is_not() {
    let gw = one_worker("$status [$upstream_status]");
    let up = node(|_, frames| echo(frames));
    for last in [None, Some(1)] {
        let fails = node(move |_, mut frames| {
            while let Some((stream, _)) = frames.request() {
                match last {
                    None => frames.reset(stream, INTERNAL_ERROR),
                    // Leaves, has looked at the stream, and ends without an answer.
                    Some(last) => {
                        frames.go_away(last);
                        let _ = frames.0.shutdown(std::net::Shutdown::Both);
                    }
                }
            }
        });
        route(&gw, &[fails.addr(), up.addr()], json!({"scheme": "grpc"}));
        assert_eq!(post(&gw, b"body").0, 502, "{last:?}");
        assert_eq!((fails.connections(), up.connections()), (1, 0));
    }
}

#[test]
fn a_connection_on_which_nothing_was_heard_is_not_used_again() {
    let gw = gateway("$status");
    let ended = Arc::new(AtomicUsize::new(0));
    let ends = ended.clone();
    // Accepts, reads, and says nothing at all.
    let silent = Upstream::serving(move |_, mut stream| {
        while stream.read(&mut [0; 4096]).is_ok_and(|n| n > 0) {}
        ends.fetch_add(1, Ordering::SeqCst);
    });
    let times = json!({"connect": 30, "send": 30, "read": 0.3});
    route(&gw, &[silent.addr()], json!({"scheme": "grpc", "timeout": times}));
    for nth in 1..=2 {
        assert_eq!(post(&gw, b"body").0, 504);
        assert_eq!(silent.connections(), nth);
        eventually("the connection is closed", || (ended.load(Ordering::SeqCst) == nth).then_some(()));
    }
}

#[test]
fn a_call_that_is_slow_does_not_cost_the_connection() {
    let gw = one_worker("$status");
    let slow = node(|_, mut frames| {
        let mut nth = 0;
        while let Some((stream, body)) = frames.request() {
            nth += 1;
            // It is there, and answers the second request only.
            match nth {
                1 => frames.send(PING, 0, 0, &[0; 8]),
                _ => frames.answer(stream, &body),
            }
        }
    });
    let times = json!({"connect": 30, "send": 30, "read": 1});
    route(&gw, &[slow.addr()], json!({"scheme": "grpc", "timeout": times}));
    assert_eq!(post(&gw, b"first").0, 504);
    assert_eq!(post(&gw, b"second"), (200, "second".into()));
    assert_eq!(slow.connections(), 1);
}

#[test]
fn the_time_of_a_node_begins_when_it_has_everything() {
    let gw = one_worker("$status [$upstream_status]");
    let taken = Arc::new(AtomicUsize::new(0));
    let takes = taken.clone();
    let node = node(move |_, mut frames| {
        while let Some(frame) = frames.next() {
            takes.fetch_add(usize::from(frame.kind == DATA && !frame.payload.is_empty()), Ordering::SeqCst);
            match frame.flags & END_STREAM {
                0 => {}
                // The second one is never answered.
                _ if frame.stream == 1 => frames.answer(1, b"ok"),
                _ => {}
            }
        }
    });
    let read = std::time::Duration::from_secs(1);
    let times = json!({"connect": 30, "send": 30, "read": read.as_secs_f64()});
    route(&gw, &[node.addr()], json!({"scheme": "grpc", "timeout": times}));
    http2::runtime().block_on(async {
        let mut sender = client(&gw).await;
        let (request, give) = call(&gw, "/svc/x");
        let answered = tokio::spawn(sender.send_request(request));
        // Goes on sending for three times as long as the node may take to answer.
        let begun = std::time::Instant::now();
        let mut pace = tokio::time::interval(read / 4);
        let mut sent = 0;
        while begun.elapsed() < read * 3 {
            pace.tick().await;
            give.send(Bytes::from_static(b"piece")).await.expect("taken");
            sent += 1;
            until(|| taken.load(Ordering::SeqCst) == sent).await;
        }
        drop(give);
        let (head, mut body): (_, Incoming) = answered.await.expect("a task").expect("an answer").into_parts();
        assert_eq!((head.status.as_u16(), rest(&mut body).await.0), (200, b"ok".to_vec()));
        let (request, give) = call(&gw, "/svc/x");
        drop(give);
        let late: Response<Incoming> = sender.send_request(request).await.expect("an answer");
        assert_eq!(late.status(), 504);
    });
    gw.expect_log("upstream timed out (110: Connection timed out) while reading response header from upstream");
}

#[test]
fn a_node_that_takes_nothing_has_its_time_too() {
    let gw = one_worker("$status");
    // Opens no window: 64 KiB are all that it ever takes.
    let full = node(|_, mut frames| while frames.next().is_some() {});
    let times = json!({"connect": 30, "send": 0.3, "read": 30});
    route(&gw, &[full.addr()], json!({"scheme": "grpc", "timeout": times}));
    assert_eq!(post(&gw, &vec![b'x'; 1 << 20]).0, 504);
    gw.expect_log("upstream timed out (110: Connection timed out) while sending request to upstream");
}

/// Bytes that the gateway has a node send ahead, per stream.
const WINDOW: usize = 128 << 10;

#[test]
fn a_client_that_does_not_read_goes_on_sending() {
    let gw = one_worker("$status");
    let (taken, given) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (takes, gives) = (taken.clone(), given.clone());
    // Answers with more than anybody holds back, and takes what it is sent.
    let node = node(move |_, mut frames| {
        while let Some(frame) = frames.next() {
            let room = match frame.kind {
                HEADERS => {
                    frames.send(HEADERS, END_HEADERS, frame.stream, &[0x88]);
                    WINDOW
                }
                WINDOW_UPDATE => frame.payload.iter().fold(0, |all, byte| all << 8 | usize::from(*byte)),
                _ => 0,
            };
            for piece in vec![b'y'; room].chunks(16 << 10) {
                frames.send(DATA, 0, frame.stream, piece);
                gives.fetch_add(piece.len(), Ordering::SeqCst);
            }
            if frame.kind == DATA && !frame.payload.is_empty() {
                takes.fetch_add(frame.payload.len(), Ordering::SeqCst);
                frames.widen(&frame);
            }
            if frame.kind == DATA && frame.flags & END_STREAM != 0 {
                frames.send(DATA, END_STREAM, frame.stream, b"");
                return;
            }
        }
    });
    route(&gw, &[node.addr()], json!({"scheme": "grpc"}));
    http2::runtime().block_on(async {
        let mut sender = super::grpc::client_with_window(&gw, 1024).await;
        let (request, give) = call(&gw, "/svc/x");
        let (_, mut body) = sender.send_request(request).await.expect("a head").into_parts();
        until(|| given.load(Ordering::SeqCst) > WINDOW).await;
        // Far more than the gateway holds of it.
        let piece = Bytes::from(vec![b'x'; 16 << 10]);
        for _ in 0..128 {
            give.send(piece.clone()).await.expect("is taken");
        }
        until(|| taken.load(Ordering::SeqCst) == 2 << 20).await;
        drop(give);
        let (bytes, _) = rest(&mut body).await;
        assert_eq!(bytes.len(), given.load(Ordering::SeqCst));
    });
}
