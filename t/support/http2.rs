//! A client of HTTP/2: one request over one connection.

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    runtime::{Builder, Runtime},
    time::timeout,
};

use super::{DEADLINE, http::Reply};

/// What runs a client.
pub fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().expect("a runtime")
}

/// Asks a port without TLS.
pub fn get(address: &str, path: &str) -> Reply {
    ask(address, Request::get(format!("http://{address}{path}")).body(Full::default()).expect("a request"))
}

/// Asks what the request says, over a connection of its own.
pub fn ask(address: &str, request: Request<Full<Bytes>>) -> Reply {
    runtime().block_on(async {
        let stream = TcpStream::connect(address).await.expect("a connection");
        ask_over(stream, request).await
    })
}

/// Asks over a connection that is there.
pub async fn get_over<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(stream: S, uri: &str) -> Reply {
    ask_over(stream, Request::get(uri).body(Full::default()).expect("a request")).await
}

async fn ask_over<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    request: Request<Full<Bytes>>,
) -> Reply {
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
    let (mut send, connection) = handshake.await.expect("HTTP/2");
    tokio::spawn(connection);
    let answered = async {
        let (head, body) = send.send_request(request).await.expect("an answer").into_parts();
        let text = |v: &http::HeaderValue| String::from_utf8_lossy(v.as_bytes()).into_owned();
        Reply {
            status: head.status.as_u16(),
            headers: head.headers.iter().map(|(n, v)| (n.to_string(), text(v))).collect(),
            body: body.collect().await.expect("a whole body").to_bytes().to_vec(),
        }
    };
    timeout(DEADLINE, answered).await.expect("in time")
}
