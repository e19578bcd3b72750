//! The codec over real sockets, with a handler that echoes.

use std::{
    cell::Cell,
    future::poll_fn,
    net::{Ipv4Addr, SocketAddr},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    runtime::{Builder, Runtime},
    task::LocalSet,
};

use super::{io::Socket, listener::Listener, *};
use crate::{
    exchange::{BodyLength, RequestBody},
    model::{Object, Ssl, next_uid},
    store::{Published, Snapshot},
    tcp, tls,
};

thread_local! {
    /// Requests that `Echo` has answered.
    static HANDLED: Cell<usize> = const { Cell::new(0) };
}

/// Answers `METHOD path body`, chunked when the path says so. Refusals get `refused`.
struct Echo;

impl Handler for Echo {
    async fn handle(&self, mut x: Box<Exchange>) -> Box<Exchange> {
        let mut client = x.client.take().expect("a client");
        let mut body = Vec::new();
        let mut status = 200;
        let skip = x.request.path == b"/unread";
        if x.request.path == b"/hold" {
            std::future::pending::<()>().await;
        }
        if !skip && matches!(x.body, RequestBody::Streaming { .. }) {
            loop {
                match poll_fn(|cx| client.poll_read_body(cx, &mut body, 10_000)).await {
                    Ok(0) => break,
                    Ok(_) => {}
                    Err(e) => {
                        status = if e.kind() == crate::error::Kind::TooLarge { 413 } else { 400 };
                        break;
                    }
                }
            }
        }
        x.response.status = status;
        x.response.headers.append("Server", "test");
        let size = x.request.args.iter().fold(0usize, |n, b| n * 10 + usize::from(b - b'0'));
        let mut answer = [&x.request.method[..], b" ", &x.request.path, b" ", &body].concat();
        if x.request.path == b"/conn" {
            let tls = x.conn.tls.as_ref();
            let tls = tls.map(|t| (t.sni.clone(), t.protocol, &t.client_verify));
            answer = format!("{} {:?} {tls:?}", x.conn.peer.ip(), x.conn.proxy).into_bytes();
        }
        answer.resize(answer.len().max(size), b'.');
        let length = match x.request.path == b"/chunked" {
            true => BodyLength::Unknown,
            false => BodyLength::Known(answer.len() as u64),
        };
        let sent = async {
            client.start(&x.request, &x.response, length)?;
            let mut at = 0;
            while at < answer.len() {
                at += poll_fn(|cx| client.poll_write(cx, &answer[at..])).await?;
            }
            poll_fn(|cx| client.poll_finish(cx)).await
        };
        if sent.await.is_err() {
            client.abort();
        }
        x.client = Some(client);
        HANDLED.set(HANDLED.get() + 1);
        x
    }

    async fn reject(&self, mut x: Box<Exchange>, _why: &'static str) -> Box<Exchange> {
        if let Some(client) = &mut x.client {
            let sent = async {
                client.start(&x.request, &x.response, BodyLength::Known(7))?;
                poll_fn(|cx| client.poll_write(cx, b"refused")).await?;
                poll_fn(|cx| client.poll_finish(cx)).await
            };
            let _ = sent.await;
        }
        x
    }
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().expect("a runtime")
}

/// Runs `test` against a server with `settings`.
fn with_server<F: Future<Output = ()>>(settings: Settings, test: impl FnOnce(SocketAddr, Rc<Server<Echo>>) -> F) {
    LocalSet::new().block_on(&runtime(), async {
        tokio::task::spawn_local(tcp::turns());
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
        let addr = listener.local_addr().expect("an address");
        let server = Rc::new(Server { handler: Echo, settings, pool: ExchangePool::new(), drain: Drain::default() });
        let shared = server.clone();
        tokio::task::spawn_local(async move {
            while let Ok((tcp, peer)) = listener.accept().await {
                let conn = Rc::new(Connection::new(1, peer, addr));
                let io = Io::Tcp(Socket::new(tcp, Vec::new()));
                tokio::task::spawn_local(serve_connection(shared.clone(), io, conn, None, shared.drain.enter()));
            }
        });
        let done = tokio::time::timeout(Duration::from_secs(20), test(addr, server)).await;
        assert!(done.is_ok(), "the test hangs");
    })
}

/// The same with the accept loop.
fn with_listener<F: Future<Output = ()>>(proxy_protocol: bool, ssls: Vec<Ssl>, test: impl FnOnce(SocketAddr) -> F) {
    LocalSet::new().block_on(&runtime(), async {
        tokio::task::spawn_local(tcp::turns());
        let mut snapshot = Snapshot::default();
        for (i, ssl) in ssls.into_iter().enumerate() {
            let id: Arc<str> = i.to_string().into();
            let revision = i as i64;
            snapshot.ssls.insert(
                id.clone(),
                Arc::new(Object {
                    id,
                    uid: next_uid(),
                    create_revision: revision,
                    mod_revision: revision,
                    json: "{}".into(),
                    value: ssl,
                }),
            );
        }
        let options = tls::ServerOptions {
            protocols: vec!["TLSv1.2".into(), "TLSv1.3".into()],
            session_tickets: false,
            fallback_sni: None,
            alpn: &[b"h2", b"http/1.1"],
        };
        let tls = (!snapshot.ssls.is_empty()).then(|| listener::Tls {
            server: Arc::new(tls::Server::new(options).expect("options")),
            published: Published::new(snapshot),
            scripts: Rc::default(),
            secrets: Rc::new(tls::secrets::NoManager),
        });
        let settings = Settings { max_connections: 2, ..Settings::default() };
        let server = Rc::new(Server { handler: Echo, settings, pool: ExchangePool::new(), drain: Drain::default() });
        let socket = listener::bind((Ipv4Addr::LOCALHOST, 0).into()).expect("binds");
        let addr = socket.local_addr().expect("an address");
        let accepting =
            tokio::task::spawn_local(listener::run(server.clone(), Listener { socket, proxy_protocol, tls }));
        let done = tokio::time::timeout(Duration::from_secs(20), test(addr)).await;
        assert!(done.is_ok(), "the test hangs");
        server.drain.begin();
        server.drain.done().await;
        assert!(accepting.await.is_ok_and(|r| r.is_ok()), "a drain ends the accept loop");
        assert!(TcpStream::connect(addr).await.is_err(), "and closes its socket");
    })
}

/// Sends `request` and reads until the server closes.
async fn talk(addr: SocketAddr, request: impl AsRef<[u8]>) -> String {
    let mut tcp = TcpStream::connect(addr).await.expect("connects");
    tcp.write_all(request.as_ref()).await.expect("sends");
    rest(&mut tcp).await
}

async fn rest(tcp: &mut TcpStream) -> String {
    String::from_utf8(rest_bytes(tcp).await).expect("text")
}

async fn rest_bytes(tcp: &mut TcpStream) -> Vec<u8> {
    let mut all = Vec::new();
    let _ = tcp.read_to_end(&mut all).await;
    all
}

async fn until(tcp: &mut TcpStream, end: &str) -> String {
    let mut all = Vec::new();
    while !all.ends_with(end.as_bytes()) {
        let n = tcp.read_buf(&mut all).await.expect("reads");
        assert!(n > 0, "closed after {}", String::from_utf8_lossy(&all));
    }
    String::from_utf8(all).expect("text")
}

const LAST: &str = "GET /last HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";

#[test]
fn pipelines_and_keeps_the_connection() {
    with_server(Settings::default(), |addr, _| async move {
        let request = "POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello\
                       POST /b HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n1;x\r\n!\r\n0\r\nT: 1\r\n\r\n\
                       \r\nHEAD /c HTTP/1.1\r\nHost: a\r\n\r\n";
        let all = talk(addr, [request, LAST].concat()).await;
        assert_eq!(all.matches("HTTP/1.1 200 OK\r\n").count(), 4, "{all}");
        assert_eq!(all.matches("Connection: keep-alive").count(), 3);
        assert!(all.contains("\r\n\r\nPOST /a helloHTTP/1.1") && all.contains("POST /b hi!HTTP/1.1"), "{all}");
        assert!(
            all.contains("Content-Length: 8\r\nConnection: keep-alive\r\n\r\nHTTP/1.1 200"),
            "HEAD has no body: {all}"
        );
        assert!(all.ends_with("Connection: close\r\n\r\nGET /last "), "{all}");
    })
}

#[test]
fn a_request_may_come_byte_by_byte() {
    with_server(Settings::default(), |addr, _| async move {
        let mut tcp = TcpStream::connect(addr).await.expect("connects");
        tcp.set_nodelay(true).expect("is a socket");
        let request = "POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n";
        for b in request.as_bytes() {
            tcp.write_all(&[*b]).await.expect("sends");
            tokio::task::yield_now().await;
        }
        assert!(rest(&mut tcp).await.ends_with("POST / abc"));
    })
}

#[test]
fn http_1_0_ends_with_the_connection() {
    with_server(Settings::default(), |addr, _| async move {
        let all = talk(addr, "GET /chunked HTTP/1.0\r\n\r\n").await;
        assert!(!all.contains("Transfer-Encoding") && all.contains("Connection: close\r\n"), "{all}");
        assert!(all.ends_with("\r\n\r\nGET /chunked "));
        let all = talk(addr, "GET /a HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET /b HTTP/1.0\r\n\r\n").await;
        assert!(all.contains("GET /a HTTP/1.1 200") && all.ends_with("GET /b "), "{all}");
    })
}

#[test]
fn large_answers_arrive_whole() {
    with_server(Settings::default(), |addr, _| async move {
        let all = talk(addr, ["GET /x?5000000 HTTP/1.1\r\nHost: a\r\n\r\n", LAST].concat()).await;
        let body = all.split_once("\r\n\r\n").expect("a body").1;
        assert!(body.starts_with("GET /x ....") && body.find("HTTP/1.1") == Some(5_000_000));
        let all = talk(addr, ["GET /chunked?300000 HTTP/1.1\r\nHost: a\r\n\r\n", LAST].concat()).await;
        assert!(all.contains("\r\n\r\n493e0\r\nGET /chunked ..."), "{}", &all[..300]);
        assert!(all.contains("..\r\n0\r\n\r\nHTTP/1.1 200"));
    })
}

#[test]
fn continues_only_when_the_body_is_read() {
    with_server(Settings::default(), |addr, _| async move {
        let mut tcp = TcpStream::connect(addr).await.expect("connects");
        let head = |path: &str| {
            format!("POST {path} HTTP/1.1\r\nHost: a\r\nExpect: 100-Continue\r\nContent-Length: 2\r\n\r\n")
        };
        tcp.write_all(head("/").as_bytes()).await.expect("sends");
        assert_eq!(until(&mut tcp, "\r\n\r\n").await, "HTTP/1.1 100 Continue\r\n\r\n");
        tcp.write_all(b"hi").await.expect("sends");
        assert!(until(&mut tcp, "POST / hi").await.contains("keep-alive"));
        tcp.write_all(head("/unread").as_bytes()).await.expect("sends");
        let all = rest(&mut tcp).await;
        assert!(all.starts_with("HTTP/1.1 200") && all.contains("Connection: close"), "{all}");
    })
}

#[test]
fn an_unread_body_is_thrown_away_or_ends_the_connection() {
    with_server(Settings::default(), |addr, _| async move {
        let small = "POST /unread HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello";
        let all = talk(addr, [small, LAST].concat()).await;
        assert!(all.contains("POST /unread HTTP/1.1 200") && all.ends_with("GET /last "), "{all}");
        let mut tcp = TcpStream::connect(addr).await.expect("connects");
        let large = "POST /unread HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n";
        tcp.write_all(large.as_bytes()).await.expect("sends");
        tcp.write_all(&[0; 100_000]).await.expect("sends");
        let all = rest(&mut tcp).await;
        assert!(all.contains("Connection: close") && all.ends_with("POST /unread "), "{all}");
    })
}

#[test]
fn an_unread_body_is_thrown_away_up_to_its_bound() {
    with_server(Settings::default(), |addr, _| async move {
        let most = h1::DISCARD_MAX as usize;
        for (size, kept) in [(most, true), (most + 1, false)] {
            let body = "x".repeat(size);
            let with_length = format!("Content-Length: {size}\r\n\r\n{body}");
            let all = talk(addr, ["POST /unread HTTP/1.1\r\nHost: a\r\n", &with_length, LAST].concat()).await;
            assert_eq!(all.contains("Connection: keep-alive"), kept, "{all}");
            assert_eq!(all.ends_with("GET /last "), kept, "{all}");
            // How long it is shows when it has been read.
            let chunked = format!("Transfer-Encoding: chunked\r\n\r\n{size:x}\r\n{body}\r\n0\r\n\r\n");
            let all = talk(addr, ["POST /unread HTTP/1.1\r\nHost: a\r\n", &chunked, LAST].concat()).await;
            assert_eq!(all.ends_with("GET /last "), kept, "{all}");
        }
    })
}

#[test]
fn refusals_are_answered_and_close() {
    let settings = Settings { max_body: 10, ..Settings::default() };
    with_server(settings, |addr, _| async move {
        let long = "a".repeat(9000);
        let cases = [
            ("GET / HTTP/1.1\r\n\r\n".to_owned(), 400),
            ("\x16\x03\x01".to_owned(), 400),
            ("GET / HTTP/1.1\nHost: a\n\n".to_owned(), 400),
            (format!("GET /{long}"), 414),
            (format!("GET / HTTP/1.1\r\nHost: a\r\nX: {long}"), 400),
            ("GET / HTTP/1.1\r\nHost: a\r\n".to_owned() + &"X: 34567\r\n".repeat(4000), 400),
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 11\r\n\r\n".to_owned(), 413),
            (
                "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nb\r\n12345678901\r\n0\r\n\r\n"
                    .to_owned(),
                413,
            ),
            ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n".to_owned(), 400),
            ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n".to_owned(), 501),
            ("GET / HTTP/1.1\r\nHost: a\r\n\r\ngarbage".to_owned(), 400),
        ];
        for (request, status) in cases {
            let mut tcp = TcpStream::connect(addr).await.expect("connects");
            tcp.write_all(request.as_bytes()).await.expect("sends");
            let all = rest(&mut tcp).await;
            let last = all.rfind("HTTP/1.1 ").map(|at| &all[at..]).unwrap_or_default();
            assert!(last.starts_with(&format!("HTTP/1.1 {status} ")), "{}: {all}", &request[..request.len().min(60)]);
            assert!(last.contains("Connection: close\r\n"), "{all}");
            assert!(talk(addr, LAST).await.ends_with("GET /last "));
        }
    })
}

#[test]
fn time_limits_end_connections() {
    let short = Duration::from_millis(100);
    let settings =
        Settings { header_timeout: short, keepalive_timeout: short, body_timeout: short, ..Settings::default() };
    with_server(settings, |addr, server| async move {
        assert_eq!(talk(addr, "").await, "");
        assert_eq!(talk(addr, "GET / HT").await, "");
        let kept = talk(addr, "GET /a HTTP/1.1\r\nHost: a\r\n\r\n").await;
        assert!(kept.ends_with("GET /a ") && kept.contains("keep-alive"));
        let late = talk(addr, "POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n1").await;
        assert!(late.starts_with("HTTP/1.1 400"), "{late}");
        server.drain.done().await;
    })
}

#[test]
fn a_client_that_takes_no_answer_is_let_go() {
    let settings = Settings { send_timeout: Duration::from_millis(50), ..Settings::default() };
    with_server(settings, |addr, server| async move {
        let mut tcp = TcpStream::connect(addr).await.expect("connects");
        tcp.write_all(b"GET /x?50000000 HTTP/1.1\r\nHost: a\r\n\r\n").await.expect("sends");
        while server.drain.open() == 0 {
            tokio::task::yield_now().await;
        }
        server.drain.done().await;
        assert!(rest(&mut tcp).await.len() < 50_000_000);
    })
}

/// A connection whose client has not taken all of `sent` when its request is answered. The answer waits for the client.
async fn with_answer_that_is_stuck(server: &Rc<Server<Echo>>) -> (TcpStream, usize) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
    let addr = listener.local_addr().expect("an address");
    let mut client = TcpStream::connect(addr).await.expect("connects");
    let (tcp, peer) = listener.accept().await.expect("a connection");
    tcp.writable().await.expect("is open");
    let mut sent = 0;
    while let Ok(n) = tcp.try_write(&[b'.'; 1 << 16]) {
        sent += n;
    }
    let (io, conn) = (Io::Tcp(Socket::new(tcp, Vec::new())), Rc::new(Connection::new(1, peer, addr)));
    tokio::task::spawn_local(serve_connection(server.clone(), io, conn, None, server.drain.enter()));
    client.write_all(b"GET /late HTTP/1.1\r\nHost: a\r\n\r\n").await.expect("sends");
    while HANDLED.get() == 0 {
        tokio::task::yield_now().await;
    }
    tcp::flush();
    (client, sent)
}

#[test]
fn an_answer_that_waits_for_its_client_outlasts_a_drain() {
    with_server(Settings::default(), |_, server| async move {
        let (mut client, before) = with_answer_that_is_stuck(&server).await;
        server.drain.begin();
        let got = rest_bytes(&mut client).await;
        let answer = String::from_utf8_lossy(&got[before..]);
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("GET /late "), "{answer}");
        server.drain.done().await;
    })
}

#[test]
fn an_answer_waits_only_so_long_for_its_client() {
    let settings = Settings { send_timeout: Duration::from_millis(50), ..Settings::default() };
    with_server(settings, |_, server| async move {
        let (mut client, before) = with_answer_that_is_stuck(&server).await;
        server.drain.done().await;
        assert_eq!(rest_bytes(&mut client).await.len(), before);
    })
}

#[test]
fn answers_wait_for_the_end_of_the_turn() {
    with_server(Settings::default(), |addr, _| async move {
        let mut client = TcpStream::connect(addr).await.expect("connects");
        client.write_all(b"GET /a HTTP/1.1\r\nHost: a\r\n\r\nGET /b HTTP/1.1\r\nHost: a\r\n\r\n").await.expect("sends");
        while HANDLED.get() < 2 {
            assert!(client.try_read(&mut [0]).is_err(), "the first one is sent with the second");
            tokio::task::yield_now().await;
        }
        let both = until(&mut client, "GET /b ").await;
        assert_eq!(both.matches("HTTP/1.1 200 OK").count(), 2, "{both}");
        assert!(both.contains("GET /a HTTP/1.1"), "{both}");
    })
}

#[test]
fn a_silent_http2_client_is_let_go() {
    let short = Duration::from_millis(50);
    let settings = Settings { keepalive_timeout: short, goodbye: short, ..Settings::default() };
    with_server(settings, |addr, server| async move {
        let mut frames = Frames::connect(addr).await;
        frames.0.write_all(&Frames::get(1, b"/a")).await.expect("sends");
        assert_eq!(frames.next(Frames::DATA).await, (1, b"GET /a ".to_vec()));
        frames.next(Frames::GOAWAY).await;
        rest_bytes(&mut frames.0).await;
        server.drain.done().await;
    })
}

#[test]
fn an_http2_client_that_takes_no_answer_is_let_go() {
    let short = Duration::from_millis(50);
    let settings = Settings { send_timeout: short, goodbye: short, ..Settings::default() };
    with_server(settings, |addr, server| async move {
        let mut frames = Frames::connect(addr).await;
        frames.0.write_all(&Frames::get(1, b"/x?50000000")).await.expect("sends");
        frames.next(Frames::GOAWAY).await;
        rest_bytes(&mut frames.0).await;
        server.drain.done().await;
    })
}

#[test]
fn a_connection_that_is_ended_lingers_only_so_long() {
    let short = Duration::from_millis(50);
    for (linger_idle, linger_max) in [(short, Duration::from_secs(60)), (Duration::from_secs(60), short)] {
        let settings = Settings { max_body: 10, linger_idle, linger_max, ..Settings::default() };
        with_server(settings, |addr, server| async move {
            let mut tcp = TcpStream::connect(addr).await.expect("connects");
            tcp.write_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 11\r\n\r\n").await.expect("sends");
            assert!(until(&mut tcp, "refused").await.starts_with("HTTP/1.1 413"));
            // One is silent; the other never stops.
            while linger_max == short && tcp.write_all(b"x").await.is_ok() {
                tokio::task::yield_now().await;
            }
            server.drain.done().await;
        });
    }
}

#[test]
fn a_connection_serves_only_so_many_requests() {
    let settings = Settings { keepalive_requests: 2, goodbye: Duration::from_millis(50), ..Settings::default() };
    with_server(settings, |addr, server| async move {
        let all = talk(addr, "GET /a HTTP/1.1\r\nHost: a\r\n\r\n".repeat(3)).await;
        assert_eq!(all.matches("GET /a ").count(), 2, "{all}");
        assert!(all.ends_with("Connection: close\r\n\r\nGET /a "), "{all}");
        // Who does not go when told to is shown out.
        let mut frames = Frames::connect(addr).await;
        for stream in [1, 3] {
            frames.0.write_all(&Frames::get(stream, b"/a")).await.expect("sends");
            assert_eq!(frames.next(Frames::DATA).await, (stream, b"GET /a ".to_vec()));
        }
        rest_bytes(&mut frames.0).await;
        server.drain.done().await;
    })
}

#[test]
fn a_drain_closes_idle_connections() {
    with_server(Settings::default(), |addr, server| async move {
        let mut idle = TcpStream::connect(addr).await.expect("connects");
        idle.write_all(b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n").await.expect("sends");
        until(&mut idle, "GET /a ").await;
        let mut busy = TcpStream::connect(addr).await.expect("connects");
        busy.write_all(b"POST /b HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n1").await.expect("sends");
        while server.drain.open() < 2 {
            tokio::task::yield_now().await;
        }
        // The server has read the busy one's head once it answers this.
        talk(addr, LAST).await;
        server.drain.begin();
        assert_eq!(rest(&mut idle).await, "");
        busy.write_all(b"2").await.expect("sends");
        let all = rest(&mut busy).await;
        assert!(all.contains("Connection: close") && all.ends_with("POST /b 12"), "{all}");
        server.drain.done().await;
    })
}

#[derive(Clone, Copy)]
struct Local;

impl<F: Future + 'static> hyper::rt::Executor<F> for Local {
    fn execute(&self, task: F) {
        tokio::task::spawn_local(async move {
            task.await;
        });
    }
}

async fn http2<S>(stream: S) -> SendRequest<Full<Bytes>>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + 'static,
{
    let (send, connection) = handshake(Local, TokioIo::new(stream)).await.expect("speaks HTTP/2");
    tokio::task::spawn_local(connection);
    send
}

async fn post(send: &mut SendRequest<Full<Bytes>>, uri: &str, body: Vec<u8>) -> (u16, Vec<u8>) {
    let request = http::Request::post(uri).body(Full::from(body)).expect("a request");
    send.ready().await.expect("is open");
    let response = send.send_request(request).await.expect("answers");
    let status = response.status().as_u16();
    (status, response.into_body().collect().await.expect("a whole body").to_bytes().to_vec())
}

#[test]
fn http2_with_prior_knowledge() {
    let settings = Settings { max_body: 1_000_000, ..Settings::default() };
    with_server(settings, |addr, server| async move {
        let mut send = http2(TcpStream::connect(addr).await.expect("connects")).await;
        assert_eq!(post(&mut send, "http://a/x", b"hi".to_vec()).await, (200, b"POST /x hi".to_vec()));
        let large = vec![b'y'; 900_000];
        let (status, body) = post(&mut send, "http://a/chunked", large.clone()).await;
        assert!(status == 200 && body == [b"POST /chunked ", &large[..]].concat());
        assert_eq!(post(&mut send, "http://a/%00", vec![]).await, (400, b"refused".to_vec()));
        assert_eq!(post(&mut send, "http://a/unread", large.clone()).await.0, 200);
        assert_eq!(post(&mut send, "http://a/", vec![0; 1_000_001]).await.0, 413);
        assert_eq!(post(&mut send, "http://a/last", vec![]).await.0, 200);
        server.drain.begin();
        server.drain.done().await;
    })
}

#[test]
fn a_client_that_resets_its_stream_is_gone() {
    with_server(Settings::default(), |addr, server| async move {
        let mut send = http2(TcpStream::connect(addr).await.expect("connects")).await;
        // More than any window: the handler waits until the reset.
        let request = http::Request::get("http://a/x?50000000").body(Full::default()).expect("a request");
        let response = send.send_request(request).await.expect("answers");
        drop(response);
        assert_eq!(post(&mut send, "http://a/last", vec![]).await.0, 200);
        drop(send);
        server.drain.done().await;
    })
}

/// An HTTP/2 client that keeps no rules.
struct Frames(TcpStream);

impl Frames {
    const DATA: u8 = 0;
    const HEADERS: u8 = 1;
    const RST_STREAM: u8 = 3;
    const SETTINGS: u8 = 4;
    const GOAWAY: u8 = 7;

    async fn connect(addr: SocketAddr) -> Frames {
        let mut tcp = TcpStream::connect(addr).await.expect("connects");
        let hello = [h2::PREFACE, &Self::frame(Self::SETTINGS, 0, 0, &[])].concat();
        tcp.write_all(&hello).await.expect("sends");
        Frames(tcp)
    }

    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        frame.extend([kind, flags]);
        frame.extend(stream.to_be_bytes());
        frame.extend(payload);
        frame
    }

    /// `POST http://a/` with a body that is still to come.
    fn post(stream: u32) -> Vec<u8> {
        const END_HEADERS: u8 = 4;
        // HPACK: three fields of the static table, and `:authority` as a literal.
        Self::frame(Self::HEADERS, END_HEADERS, stream, &[0x83, 0x86, 0x84, 0x01, 1, b'a'])
    }

    /// `POST http://a{path}` with a body that is still to come.
    fn post_to(stream: u32, path: &[u8]) -> Vec<u8> {
        const END_HEADERS: u8 = 4;
        let fields = [&[0x83, 0x86, 0x01, 1, b'a', 0x04, path.len() as u8][..], path].concat();
        Self::frame(Self::HEADERS, END_HEADERS, stream, &fields)
    }

    /// `GET http://a{path}`.
    fn get(stream: u32, path: &[u8]) -> Vec<u8> {
        const END_STREAM_AND_HEADERS: u8 = 5;
        let fields = [&[0x82, 0x86, 0x01, 1, b'a', 0x04, path.len() as u8][..], path].concat();
        Self::frame(Self::HEADERS, END_STREAM_AND_HEADERS, stream, &fields)
    }

    /// The next frame of this kind: its stream and its payload.
    async fn next(&mut self, wanted: u8) -> (u32, Vec<u8>) {
        loop {
            let mut head = [0; 9];
            self.0.read_exact(&mut head).await.expect("a frame");
            let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
            self.0.read_exact(&mut payload).await.expect("a whole frame");
            if head[3] == wanted {
                return (u32::from_be_bytes([head[5], head[6], head[7], head[8]]), payload);
            }
        }
    }
}

#[test]
fn streams_past_the_bound_are_refused() {
    with_server(Settings::default(), |addr, _| async move {
        const REFUSED_STREAM: u32 = 7;
        const END_STREAM: u8 = 1;
        let mut client = Frames::connect(addr).await;
        // The handlers of all wait for bodies.
        let all: Vec<u8> = (0..=h2::MAX_STREAMS).flat_map(|n| Frames::post(2 * n + 1)).collect();
        client.0.write_all(&all).await.expect("sends");
        let last = 2 * h2::MAX_STREAMS + 1;
        assert_eq!(client.next(Frames::RST_STREAM).await, (last, REFUSED_STREAM.to_be_bytes().into()));
        let body = Frames::frame(Frames::DATA, END_STREAM, 1, b"hi");
        client.0.write_all(&body).await.expect("sends");
        assert_eq!(client.next(Frames::DATA).await, (1, b"POST / hi".to_vec()));
        // One has ended, so there is room for one.
        let next = [Frames::post(last + 2), Frames::frame(Frames::DATA, END_STREAM, last + 2, b"ho")].concat();
        client.0.write_all(&next).await.expect("sends");
        assert_eq!(client.next(Frames::DATA).await, (last + 2, b"POST / ho".to_vec()));
    })
}

#[test]
fn a_client_may_send_so_far_ahead_of_who_reads() {
    with_server(Settings::default(), |addr, _| async move {
        const INITIAL_WINDOW_SIZE: u16 = 4;
        const FLOW_CONTROL_ERROR: u32 = 3;
        const PART: u32 = 16 * 1024;
        let mut client = Frames::connect(addr).await;
        let (_, settings) = client.next(Frames::SETTINGS).await;
        let window = settings.chunks(6).find(|s| s[..2] == INITIAL_WINDOW_SIZE.to_be_bytes()).expect("is said");
        assert_eq!(window[2..], h2::STREAM_WINDOW.to_be_bytes());
        // The window holds once it is acknowledged.
        let ack = Frames::frame(Frames::SETTINGS, 1, 0, &[]);
        client.0.write_all(&[ack, Frames::post_to(1, b"/hold")].concat()).await.expect("sends");
        let part = Frames::frame(Frames::DATA, 0, 1, &[b'x'; PART as usize]);
        client.0.write_all(&part.repeat((h2::STREAM_WINDOW / PART) as usize)).await.expect("sends");
        // All of it is taken, and the connection is as good as before.
        client.0.write_all(&Frames::get(3, b"/other")).await.expect("sends");
        assert_eq!(client.next(Frames::DATA).await, (3, b"GET /other ".to_vec()));
        client.0.write_all(&Frames::frame(Frames::DATA, 0, 1, b"x")).await.expect("sends");
        assert_eq!(client.next(Frames::RST_STREAM).await, (1, FLOW_CONTROL_ERROR.to_be_bytes().into()));
    })
}

#[test]
fn a_head_past_the_bound_is_refused_and_its_connection_goes_on() {
    with_server(Settings::default(), |addr, _| async move {
        let mut send = http2(TcpStream::connect(addr).await.expect("connects")).await;
        let head = |len: usize| http::Request::get("http://a/x").header("x", "a".repeat(len));
        for (len, status) in [(Settings::default().head.total, 431), (1000, 200)] {
            send.ready().await.expect("is open");
            let request = head(len).body(Full::default()).expect("a request");
            assert_eq!(send.send_request(request).await.expect("answers").status(), status);
        }
    })
}

#[test]
fn a_client_that_resets_all_it_opens_is_let_go() {
    with_server(Settings::default(), |addr, server| async move {
        const ENHANCE_YOUR_CALM: u32 = 11;
        const CANCEL: [u8; 4] = 8u32.to_be_bytes();
        let mut client = Frames::connect(addr).await;
        let opened_and_reset = |n: u32| [Frames::post(n), Frames::frame(Frames::RST_STREAM, 0, n, &CANCEL)].concat();
        // In one piece: the server reads them all before it looks at the first.
        let all: Vec<u8> = (0..=h2::MAX_RESETS as u32).flat_map(|n| opened_and_reset(2 * n + 1)).collect();
        client.0.write_all(&all).await.expect("sends");
        let (_, why) = client.next(Frames::GOAWAY).await;
        assert_eq!(why[4..8], ENHANCE_YOUR_CALM.to_be_bytes());
        server.drain.done().await;
    })
}

#[test]
fn proxy_protocol_tells_the_client() {
    with_listener(true, vec![], |addr| async move {
        let request = "PROXY TCP4 1.2.3.4 5.6.7.8 9 10\r\nGET /conn HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
        assert!(talk(addr, request).await.ends_with("127.0.0.1 Some((1.2.3.4:9, 5.6.7.8:10)) None"));
        assert_eq!(talk(addr, LAST).await, "");
    })
}

#[test]
fn connections_past_the_bound_are_closed() {
    with_listener(false, vec![], |addr| async move {
        let mut held = Vec::new();
        for _ in 0..2 {
            let mut tcp = TcpStream::connect(addr).await.expect("connects");
            tcp.write_all(b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n").await.expect("sends");
            until(&mut tcp, "GET /a ").await;
            held.push(tcp);
        }
        assert_eq!(talk(addr, "").await, "");
    })
}

/// A CA, and certificates that it signs.
fn authority() -> (String, impl Fn(&str) -> (Box<str>, Box<str>)) {
    let mut params = rcgen::CertificateParams::new(vec![]).expect("parameters");
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.distinguished_name.push(rcgen::DnType::CommonName, "test CA");
    let key = rcgen::KeyPair::generate().expect("a key");
    let pem = params.self_signed(&key).expect("a certificate").pem();
    let issuer = rcgen::Issuer::new(params, key);
    let sign = move |name: &str| {
        let key = rcgen::KeyPair::generate().expect("a key");
        let params = rcgen::CertificateParams::new(vec![name.to_owned()]).expect("parameters");
        let cert = params.signed_by(&key, &issuer).expect("a certificate");
        (cert.pem().into(), key.serialize_pem().into())
    };
    (pem, sign)
}

fn ssl(sni: &str, pair: (Box<str>, Box<str>)) -> Ssl {
    Ssl {
        snis: vec![sni.into()],
        pairs: vec![pair],
        client_ca: None,
        skip_mtls_uri_regex: vec![],
        protocols: vec![],
        enabled: true,
        is_client: false,
    }
}

type Pair<'a> = Option<(&'a str, &'a str)>;

async fn connect_tls(
    addr: SocketAddr,
    name: &str,
    pair: Pair<'_>,
    alpn: &[&'static [u8]],
) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let config = tls::client_config(false, pair, alpn).expect("a configuration");
    let name = ServerName::try_from(name.to_owned()).expect("a name");
    let tcp = TcpStream::connect(addr).await?;
    tokio_rustls::TlsConnector::from(config).connect(name, tcp).await
}

async fn talk_tls(addr: SocketAddr, name: &str, pair: Pair<'_>) -> Result<String, std::io::Error> {
    ask_tls(addr, name, pair, "/conn", "a").await
}

async fn ask_tls(addr: SocketAddr, name: &str, pair: Pair<'_>, path: &str, host: &str) -> std::io::Result<String> {
    let mut stream = connect_tls(addr, name, pair, &[]).await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut all = String::new();
    stream.read_to_string(&mut all).await?;
    Ok(all)
}

#[test]
fn certificates_answer_their_names() {
    let (_, sign) = authority();
    let disabled = Ssl { enabled: false, ..ssl("off.test", sign("off.test")) };
    let ssls = vec![ssl("a.test", sign("a.test")), ssl("*.b.test", sign("*.b.test")), disabled];
    with_listener(false, ssls, |addr| async move {
        for name in ["a.test", "A.Test", "x.b.test"] {
            let answer = talk_tls(addr, name, None).await.expect("answers");
            let want = format!("(Some(\"{}\"), \"TLSv1.3\", \"NONE\"))", name.to_ascii_lowercase());
            assert!(answer.ends_with(&want), "{answer}");
        }
        for name in ["b.test", "x.y.b.test", "off.test", "127.0.0.1"] {
            assert!(talk_tls(addr, name, None).await.is_err(), "{name}");
        }
        let stream = connect_tls(addr, "a.test", None, &[b"h2"]).await.expect("connects");
        let mut send = http2(stream).await;
        assert_eq!(post(&mut send, "https://a.test/x", b"hi".to_vec()).await, (200, b"POST /x hi".to_vec()));
    })
}

#[test]
fn client_certificates_are_asked_for() {
    let (ca, sign) = authority();
    let (_, sign_other) = authority();
    let (good, bad) = (sign("client"), sign_other("client"));
    let strict = Ssl { client_ca: Some((ca.clone().into(), 1)), ..ssl("strict.test", sign("strict.test")) };
    let lax = Ssl {
        client_ca: Some((ca.into(), 1)),
        skip_mtls_uri_regex: vec!["^/free".into()],
        ..ssl("lax.test", sign("lax.test"))
    };
    let open = ssl("open.test", sign("open.test"));
    with_listener(false, vec![strict, lax, open], |addr| async move {
        let (good, bad) = (Some((&*good.0, &*good.1)), Some((&*bad.0, &*bad.1)));
        assert!(talk_tls(addr, "strict.test", good).await.expect("answers").contains("\"SUCCESS\""));
        assert!(talk_tls(addr, "strict.test", bad).await.is_err());
        assert!(talk_tls(addr, "strict.test", None).await.is_err());
        assert!(talk_tls(addr, "lax.test", good).await.expect("answers").contains("\"SUCCESS\""));
        for pair in [None, bad] {
            let skipped = ask_tls(addr, "lax.test", pair, "/free", "lax.test").await.expect("answers");
            assert!(skipped.ends_with("GET /free "), "{skipped}");
            let refused = ask_tls(addr, "lax.test", pair, "/conn", "lax.test").await.expect("answers");
            assert!(refused.starts_with("HTTP/1.1 400 "), "{refused}");
        }
        // A certificate for one name opens no other.
        for (sni, pair) in [("open.test", None), ("lax.test", good)] {
            let refused = ask_tls(addr, sni, pair, "/free", "strict.test").await.expect("answers");
            assert!(refused.starts_with("HTTP/1.1 400 "), "{refused}");
            let fine = ask_tls(addr, sni, pair, "/free", "open.test").await.expect("answers");
            assert!(fine.ends_with("GET /free "), "{fine}");
        }
    })
}
