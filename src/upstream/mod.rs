//! The upstream's side: connecting, the HTTP/1 client codec, and connections kept for the next request.
//!
//! One `Pool` per worker, no task and no channel per connection: whoever sends the request drives its connection.
//! The codec reads head and body out of one buffer and copies neither.

pub mod conn;
pub mod pool;
pub mod response;
mod stream;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use rustls::{ClientConfig, pki_types::ServerName};
use tokio::net::TcpStream;

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

/// Opens a connection to a node, TLS included, within `limit`.
pub async fn connect(addr: SocketAddr, tls: Option<&Tls>, limit: Duration) -> Result<Box<Conn>> {
    let opening = async {
        let socket = TcpStream::connect(addr).await.map_err(refused)?;
        // Heads and bodies are gathered before they are written: Nagle would only hold back their ends.
        let _ = socket.set_nodelay(true);
        match tls {
            None => Ok(Stream::Tcp(tcp::Stream::new(socket))),
            Some(tls) => handshake(socket, tls).await,
        }
    };
    let late = || Error::upstream(Kind::ConnectTimeout).retry(Retry::Safe).context("Connection timed out");
    let stream = tokio::time::timeout(limit, opening).await.map_err(|_| late());
    let stream = stream.flatten().map_err(|e| e.context(format!("connect() to {addr} failed")))?;
    Ok(Box::new(Conn::new(stream)))
}

async fn handshake(tcp: TcpStream, tls: &Tls) -> Result<Stream> {
    let connector = tokio_rustls::TlsConnector::from(tls.config.clone());
    let stream = connector.connect(tls.name.clone(), tcp).await;
    let failed = |e| Error::upstream(Kind::Tls).retry(Retry::Safe).context("TLS handshake").cause(e);
    stream.map(|s| Stream::Tls(Box::new(s))).map_err(failed)
}

fn refused(e: io::Error) -> Error {
    let kind = if e.kind() == io::ErrorKind::TimedOut { Kind::ConnectTimeout } else { Kind::ConnectRefused };
    Error::upstream(kind).retry(Retry::Safe).cause(e)
}
