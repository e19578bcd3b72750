//! The codec over real sockets, with a handler that echoes.

use std::{
    future::poll_fn,
    net::{Ipv4Addr, SocketAddr},
    rc::Rc,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::LocalSet,
};

use super::{io::Socket, *};
use crate::exchange::{BodyLength, RequestBody};

/// Answers `METHOD path body`, chunked when the path says so. Refusals get `refused`.
struct Echo;

impl Handler for Echo {
    async fn handle(&self, mut x: Box<Exchange>) -> Box<Exchange> {
        let mut client = x.client.take().expect("a client");
        let mut body = Vec::new();
        let mut status = 200;
        let skip = x.request.path == b"/unread";
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

/// Runs `test` against a server with `settings`.
fn with_server<F: Future<Output = ()>>(settings: Settings, test: impl FnOnce(SocketAddr, Rc<Server<Echo>>) -> F) {
    let rt = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    LocalSet::new().block_on(&rt, async {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
        let addr = listener.local_addr().expect("an address");
        let server = Rc::new(Server { handler: Echo, settings, pool: ExchangePool::new(), drain: Drain::default() });
        let shared = server.clone();
        tokio::task::spawn_local(async move {
            while let Ok((tcp, peer)) = listener.accept().await {
                let conn = Rc::new(Connection { serial: 1, peer, local: addr, tls: None, proxy: None });
                let io = Io::Tcp(Socket::new(tcp, Vec::new()));
                tokio::task::spawn_local(serve_connection(shared.clone(), io, conn, shared.drain.enter()));
            }
        });
        let done = tokio::time::timeout(Duration::from_secs(20), test(addr, server)).await;
        assert!(done.is_ok(), "the test hangs");
    })
}

/// Sends `request` and reads until the server closes.
async fn talk(addr: SocketAddr, request: impl AsRef<[u8]>) -> String {
    let mut tcp = TcpStream::connect(addr).await.expect("connects");
    tcp.write_all(request.as_ref()).await.expect("sends");
    rest(&mut tcp).await
}

async fn rest(tcp: &mut TcpStream) -> String {
    let mut all = Vec::new();
    let _ = tcp.read_to_end(&mut all).await;
    String::from_utf8(all).expect("text")
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
