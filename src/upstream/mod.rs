//! The upstream's side: connecting, the HTTP/1 client codec, and connections kept for the next request.
//!
//! One `Pool` per worker, no task and no channel per connection: whoever sends the request drives its connection.
//! The codec reads head and body out of one buffer and copies neither.

pub mod conn;
pub mod h2;
pub mod pool;
pub mod response;
mod stream;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpSocket, TcpStream},
};

pub use conn::Conn;
pub use pool::{Key, Pool};
pub use response::Head;
pub use stream::Stream;

use crate::{
    error::{Error, Kind, Result, Retry},
    tcp,
};

/// How TLS is spoken to a node.
#[derive(Clone, Debug)]
pub struct Tls {
    pub config: Arc<ClientConfig>,
    /// The name that the node's certificate must have, and that is sent as SNI.
    pub name: ServerName<'static>,
}

/// Opens a connection to a node, TLS included, within `limit`. `from`: the address that it comes from, where that is not the
/// system's to choose.
pub async fn connect(
    addr: SocketAddr,
    from: Option<SocketAddr>,
    tls: Option<&Tls>,
    limit: Duration,
) -> Result<Box<Conn>> {
    open(addr, from, &[], tls, limit).await.map(|stream| Box::new(Conn::new(stream)))
}

/// The same for a stream that is no HTTP. `first` is sent before TLS begins (a PROXY protocol header).
pub async fn open(
    addr: SocketAddr,
    from: Option<SocketAddr>,
    first: &[u8],
    tls: Option<&Tls>,
    limit: Duration,
) -> Result<Stream> {
    let mut doing = CONNECTING;
    let opening = async {
        let mut socket = match from {
            None => TcpStream::connect(addr).await.map_err(refused)?,
            Some(from) => bound(from)?.connect(addr).await.map_err(|e| match e.raw_os_error() {
                // No fault of the node: another connection has the port, or the address is of the other family.
                Some(libc::EADDRNOTAVAIL | libc::EINVAL | libc::EADDRINUSE | libc::EAFNOSUPPORT) => {
                    Error::internal(Kind::Io).cause(e).context(format!("connect from {from} failed"))
                }
                _ => refused(e),
            })?,
        };
        // Heads and bodies are gathered before they are written: Nagle would only hold back their ends.
        let _ = socket.set_nodelay(true);
        if !first.is_empty() {
            socket.write_all(first).await.map_err(|e| {
                let text = call_failed("send()", &e, "sending PROXY protocol header to upstream");
                Error::upstream(Kind::Closed).retry(Retry::Safe).context(text)
            })?;
        }
        let Some(tls) = tls else { return Ok(Stream::Tcp(tcp::Stream::new(socket))) };
        doing = HANDSHAKING;
        handshake(socket, tls).await
    };
    match tokio::time::timeout(limit, opening).await {
        Ok(opened) => opened,
        Err(_) => Err(Error::upstream(Kind::ConnectTimeout).retry(Retry::Safe).context(timed_out(doing))),
    }
}

/// What nginx calls the parts of a try, in the lines of error.log that alerts look for.
const CONNECTING: &str = "connecting to upstream";
const HANDSHAKING: &str = "SSL handshaking to upstream";

/// nginx's words for a wait that was too long.
fn timed_out(doing: &str) -> String {
    format!("upstream timed out (110: Connection timed out) while {doing}")
}

/// nginx's words for a system call that failed: `recv() failed (104: Connection reset by peer) while …`.
fn call_failed(call: &str, e: &io::Error, doing: &str) -> String {
    match e.raw_os_error() {
        Some(code) => {
            let text = e.to_string();
            let text = text.split(" (os error").next().unwrap_or_default();
            format!("{call} failed ({code}: {text}) while {doing}")
        }
        None => format!("{call} failed ({e}) while {doing}"),
    }
}

async fn handshake(tcp: TcpStream, tls: &Tls) -> Result<Stream> {
    let connector = tokio_rustls::TlsConnector::from(tls.config.clone());
    let stream = connector.connect(tls.name.clone(), tcp).await;
    stream.map(|s| Stream::Tls(Box::new(s))).map_err(handshake_failed)
}

fn handshake_failed(e: io::Error) -> Error {
    let text = match e.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::InvalidCertificate(why)) => {
            format!("upstream SSL certificate verify error: ({why}) while {HANDSHAKING}")
        }
        Some(why) => format!("SSL_do_handshake() failed (SSL: {why}) while {HANDSHAKING}"),
        None if e.kind() == io::ErrorKind::UnexpectedEof => {
            format!("peer closed connection in SSL handshake while {HANDSHAKING}")
        }
        None => call_failed("SSL_do_handshake()", &e, HANDSHAKING),
    };
    Error::upstream(Kind::Tls).retry(Retry::Safe).context(text)
}

/// A socket that connects from this address. That it cannot be had is no fault of the node.
fn bound(from: SocketAddr) -> Result<TcpSocket> {
    let socket = if from.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
    let failed = |e| Error::internal(Kind::Io).cause(e).context(format!("bind({from}) failed"));
    let socket = socket.map_err(failed)?;
    // A port that is named may still be that of a connection that has ended.
    socket.set_reuseaddr(true).map_err(failed)?;
    socket.bind(from).map_err(failed)?;
    Ok(socket)
}

fn refused(e: io::Error) -> Error {
    let kind = if e.kind() == io::ErrorKind::TimedOut { Kind::ConnectTimeout } else { Kind::ConnectRefused };
    let text = match kind {
        Kind::ConnectTimeout => timed_out(CONNECTING),
        _ => call_failed("connect()", &e, CONNECTING),
    };
    Error::upstream(kind).retry(Retry::Safe).context(text)
}
