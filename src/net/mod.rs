//! The client's side of the network: listeners, PROXY protocol, the HTTP/1 server codec and HTTP/2.
//!
//! One `Server` per worker. A connection is one task; it takes an exchange from the worker's pool for each request,
//! puts itself in as `x.client`, awaits the handler, takes itself back and goes on. Framing is strict: an
//! ambiguous request is refused, never forwarded.

mod answer;
pub mod drain;
pub mod h1;
mod h2;
pub mod head;
pub mod io;
pub mod listener;
pub mod pool;
pub mod proxy_protocol;
mod rate;
pub mod settings;
#[cfg(test)]
mod tests;

use std::{future::Future, rc::Rc};

pub use drain::Drain;
pub use h1::{Tunnel, into_tunnel};
pub use io::Io;
pub use pool::ExchangePool;
pub use settings::Settings;

use crate::exchange::{Connection, Exchange};

/// What is done with requests: the proxy.
pub trait Handler: 'static {
    /// A request is there and about to be read, for a path that the client spells so: the moment to ask for memory that serving
    /// it will need.
    fn expect<'a>(&self, _path: impl FnOnce() -> &'a [u8]) {}

    /// Runs a request from its head to its log line. `x.request`, `x.body`, `x.client` and `x.conn` are set and
    /// `begin` was called; the snapshot is the handler's to set. Hands the exchange back with `x.client` still in it
    /// (without it the connection ends: a tunnel took it).
    fn handle(&self, x: Box<Exchange>) -> impl Future<Output = Box<Exchange>>;

    /// Answers and logs a request that was refused before it was one. `x.response.status` is decided; of `x.request`
    /// only what could be understood is there: without a method, `target` is the first line as it came. Without
    /// a client nothing can be sent any more (a timeout): only the log line remains. The connection ends afterwards.
    fn reject(&self, x: Box<Exchange>, why: &'static str) -> impl Future<Output = Box<Exchange>>;
}

/// What the connections of one worker share.
pub struct Server<H> {
    pub handler: H,
    pub settings: Settings,
    pub pool: ExchangePool,
    pub drain: Drain,
}

/// Serves a connection until it ends. TLS and PROXY protocol are done: `conn` says what they found. `open` counts it.
async fn serve_connection<H: Handler>(
    server: Rc<Server<H>>,
    io: Io,
    conn: Rc<Connection>,
    tls: Option<listener::Tls>,
    open: drain::Open,
) {
    match h2::agreed(&io) {
        true => h2::serve(&server, io, conn, tls).await,
        false => h1::serve(&server, io, conn, tls).await,
    }
    drop(open);
}
