//! The HTTP/1 server codec.

use std::rc::Rc;

use super::{Handler, Io, Server};
use crate::exchange::{Client, Connection};

/// A connection after `101 Switching Protocols`: raw bytes both ways.
pub struct Tunnel {
    pub io: Io,
    /// Read already: what the client sent right after its request.
    pub unread: Vec<u8>,
}

/// Takes the connection out of an HTTP/1 client. `None` for HTTP/2, or when it was taken before.
pub fn into_tunnel(_client: Box<dyn Client>) -> Option<Tunnel> {
    None
}

pub(super) async fn serve<H: Handler>(_server: &Rc<Server<H>>, _io: Io, _conn: Rc<Connection>) {}
