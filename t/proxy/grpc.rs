//! gRPC to nodes over HTTP/2: streams both ways, trailers, and what happens when there is no node.

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::mpsc,
    task::{Context, Poll},
    thread,
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use hyper::{
    body::{Body, Frame, Incoming},
    client::conn::http2::{self, SendRequest},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};

use super::{Gateway, Upstream, access_log, gateway, route};

/// Gives back what it gets, piece by piece, and ends with trailers.
struct Echo(Incoming, bool);

impl Body for Echo {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match Pin::new(&mut self.0).poll_frame(cx) {
            Poll::Ready(None) if !self.1 => {
                self.1 = true;
                let mut trailers = HeaderMap::new();
                trailers.insert("grpc-status", "0".parse().expect("a value"));
                Poll::Ready(Some(Ok(Frame::trailers(trailers))))
            }
            other => other,
        }
    }
}

/// A node on a thread of its own, as long as the test runs. Its answers say what it was asked.
fn node() -> SocketAddr {
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
            tell.send(listener.local_addr().expect("an address")).expect("the test waits");
            while let Ok((stream, _)) = listener.accept().await {
                let serve = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(stream), service_fn(|request| async { answer(request) }));
                tokio::spawn(serve);
            }
        });
    });
    told.recv().expect("the node's address")
}

fn answer(request: Request<Incoming>) -> Result<Response<Echo>, std::convert::Infallible> {
    let text = |name: &str| request.headers().get(name).map(|v| v.to_str().unwrap_or_default().to_owned());
    let seen = format!(
        "{} {} {} te={} ct={}",
        request.method(),
        request.uri().authority().map_or("", |a| a.as_str()),
        request.uri().path(),
        text("te").unwrap_or_default(),
        text("content-type").unwrap_or_default(),
    );
    let head_only = request.uri().path() == "/svc/refuse";
    let mut response = Response::new(Echo(request.into_body(), head_only));
    response.headers_mut().insert("x-seen", seen.parse().expect("a value"));
    if head_only {
        response.headers_mut().insert("grpc-status", "7".parse().expect("a value"));
    }
    Ok(response)
}

/// A body that a test writes to.
pub(super) struct Pieces(pub tokio::sync::mpsc::Receiver<Bytes>);

impl Body for Pieces {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::convert::Infallible>>> {
        self.0.poll_recv(cx).map(|piece| piece.map(|piece| Ok(Frame::data(piece))))
    }
}

/// What is left of a response: its bytes and its trailers.
pub(super) async fn rest(body: &mut Incoming) -> (Vec<u8>, HeaderMap) {
    let (mut bytes, mut trailers) = (Vec::new(), HeaderMap::new());
    while let Some(frame) = piece(body).await {
        match frame.into_data() {
            Ok(data) => bytes.extend_from_slice(&data),
            Err(frame) => trailers = frame.into_trailers().expect("trailers"),
        }
    }
    (bytes, trailers)
}

async fn piece(body: &mut Incoming) -> Option<Frame<Bytes>> {
    std::future::poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await.map(|frame| frame.expect("a frame"))
}

pub(super) async fn client(gw: &Gateway) -> SendRequest<Pieces> {
    client_with_window(gw, 1 << 20).await
}

/// One that takes so many bytes of a response before it reads them.
pub(super) async fn client_with_window(gw: &Gateway, window: u32) -> SendRequest<Pieces> {
    let stream = TcpStream::connect(gw.proxy()).await.expect("a connection");
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder.initial_stream_window_size(window);
    let (sender, connection) = builder.handshake(TokioIo::new(stream)).await.expect("HTTP/2");
    tokio::spawn(connection);
    sender
}

pub(super) fn call(gw: &Gateway, path: &str) -> (Request<Pieces>, tokio::sync::mpsc::Sender<Bytes>) {
    let (give, pieces) = tokio::sync::mpsc::channel(4);
    let request = Request::post(format!("http://{}{path}", gw.proxy()))
        .header("te", "trailers")
        .header("content-type", "application/grpc")
        .body(Pieces(pieces))
        .expect("a request");
    (request, give)
}

#[tokio::test]
async fn a_call_streams_both_ways_and_ends_with_trailers() {
    let gw = gateway("$status $upstream_status $upstream_addr");
    let node = node();
    route(&gw, &[node.to_string()], json!({"scheme": "grpc"}));
    let mut sender = client(&gw).await;
    // Two calls at once, on one connection on either side.
    let (first, give_first) = call(&gw, "/svc/first");
    let (second, give_second) = call(&gw, "/svc/second");
    let mut first = sender.send_request(first).await.expect("the first head").into_body();
    let second = sender.send_request(second).await.expect("the second head");
    let seen = second.headers()["x-seen"].to_str().expect("text").to_owned();
    assert_eq!(seen, format!("POST {} /svc/second te=trailers ct=application/grpc", gw.proxy()));
    let mut second = second.into_body();
    for text in ["one", "two"] {
        give_first.send(Bytes::from_static(text.as_bytes())).await.expect("taken");
        let echoed = piece(&mut first).await.and_then(|frame| frame.into_data().ok());
        assert_eq!(echoed.as_deref(), Some(text.as_bytes()), "before the next piece is sent");
    }
    drop(give_first);
    let (bytes, trailers) = rest(&mut first).await;
    assert_eq!((bytes.len(), trailers["grpc-status"].to_str().ok()), (0, Some("0")));
    let large = Bytes::from(vec![b'x'; 300 * 1024]);
    give_second.send(large.clone()).await.expect("taken");
    drop(give_second);
    let (bytes, trailers) = rest(&mut second).await;
    assert!(bytes == large, "{} bytes", bytes.len());
    assert_eq!(trailers["grpc-status"], "0");
    access_log(&gw, &format!("200 200 {node}"));
}

#[tokio::test]
async fn a_call_that_the_node_answers_with_a_head_alone_has_its_status_there() {
    let gw = Gateway::start();
    route(&gw, &[node().to_string()], json!({"scheme": "grpc", "pass_host": "rewrite", "upstream_host": "svc.test"}));
    let (request, give) = call(&gw, "/svc/refuse");
    drop(give);
    let response = client(&gw).await.send_request(request).await.expect("a head");
    assert_eq!(response.headers()["grpc-status"], "7");
    assert!(response.headers()["x-seen"].to_str().expect("text").starts_with("POST svc.test /svc/refuse"));
    let (bytes, trailers) = rest(&mut response.into_body()).await;
    assert!(bytes.is_empty() && trailers.is_empty());
}

#[tokio::test]
async fn filters_see_the_bodies_of_calls() {
    let gw = Gateway::start();
    let filter = "return function() ngx.arg[1] = (ngx.arg[1] or ''):upper() end";
    let function = json!({"phase": "body_filter", "functions": [filter]});
    let upstream = json!({"type": "roundrobin", "scheme": "grpc", "nodes": {node().to_string(): 1}});
    gw.put("/routes/1", json!({"uri": "/*", "upstream": upstream, "plugins": {"serverless-post-function": function}}));
    let (request, give) = call(&gw, "/svc/upper");
    give.send(Bytes::from_static(b"abc")).await.expect("taken");
    drop(give);
    let response = client(&gw).await.send_request(request).await.expect("a head");
    let (bytes, trailers) = rest(&mut response.into_body()).await;
    assert_eq!((&bytes[..], trailers["grpc-status"].to_str().ok()), (&b"ABC"[..], Some("0")));
}

#[test]
fn a_dead_node_costs_a_try_and_http1_clients_are_served_too() {
    let gw = gateway("$status [$upstream_status]");
    let (dead, up) = (Upstream::dead(), node());
    route(&gw, &[dead.clone(), up.to_string()], json!({"scheme": "grpc"}));
    let reply = gw.send("POST", "/svc/x", &[("Content-Type", "application/grpc")], b"body");
    assert_eq!((reply.status, reply.text().as_str()), (200, "body"));
    access_log(&gw, "200 [502, 200]");
    gw.expect_log("connect() failed (111: Connection refused) while connecting to upstream");
    route(&gw, &[dead], json!({"scheme": "grpc"}));
    assert_eq!(gw.get("/").status, 502);
    access_log(&gw, "502 [502]");
}

#[test]
fn a_body_in_memory_goes_whole_to_the_next_node() {
    let gw = Gateway::start();
    let (dead, up) = (Upstream::dead(), node());
    let nodes = json!([
        {"host": "127.0.0.1", "port": port(&dead), "weight": 1, "priority": 1},
        {"host": "127.0.0.1", "port": up.port(), "weight": 1},
    ]);
    let read = json!({"phase": "access", "functions": ["return function() ngx.req.read_body() end"]});
    let upstream = json!({"type": "roundrobin", "scheme": "grpc", "nodes": nodes});
    gw.put("/routes/1", json!({"uri": "/*", "upstream": upstream, "plugins": {"serverless-pre-function": read}}));
    for _ in 0..2 {
        assert_eq!(gw.send("POST", "/svc/x", &[], b"body").text(), "body");
    }
}

fn port(addr: &str) -> u16 {
    addr.rsplit_once(':').and_then(|(_, port)| port.parse().ok()).expect("a port")
}

#[test]
fn a_node_that_speaks_no_http2_is_answered_for_with_502() {
    let gw = Gateway::start();
    let http1 = super::always(super::OK);
    route(&gw, &[http1.addr()], json!({"scheme": "grpc", "retries": 0}));
    assert_eq!(gw.get("/").status, 502);
}
