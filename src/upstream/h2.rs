//! HTTP/2 to nodes, by hyper: connections that requests share.
//!
//! hyper owns a connection and drives it in tasks of its own; a request hands its body over through a `Feed`. Which connection a
//! request goes by, and which request has to wait for one, is `share`'s.

mod feed;
mod share;

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    io,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
    time::Instant,
};

use hyper::client::conn::http2::{self, Builder, SendRequest};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::Stream;
use crate::error::{Error, Kind, Result, Retry};
pub use feed::{Feed, Feeding};
pub use share::{Connections, Lease};

/// Response bytes that a node may send ahead of who reads them, per stream and per connection.
const STREAM_WINDOW: u32 = 128 * 1024;
const CONNECTION_WINDOW: u32 = 1024 * 1024;
/// A response's head and trailers: as long as HTTP/1's may be.
const FIELDS_MAX: u32 = 64 * 1024;
/// Requests that may be sent before the node has said how many it takes at once (RFC 9113, 6.5.2: it may be none): the one that the
/// connection was made for, as nginx has it. More could be refused.
const STREAMS_AT_FIRST: usize = 1;

/// Sends requests on a connection that others use, too.
pub type Sender = SendRequest<Feeding>;

type Driver = http2::Connection<TokioIo<Heard>, Feeding, Local>;

/// A connection to a node.
struct Connection {
    sender: Sender,
    /// `None`: it has ended. Borrowed for the length of a call only.
    driver: Rc<RefCell<Option<Driver>>>,
    /// Reads that had something from the node.
    heard: Rc<Cell<u64>>,
    /// Requests that are on it.
    streams: Cell<usize>,
    /// Takes no more of them.
    retired: Cell<bool>,
    used: Cell<Instant>,
}

impl Connection {
    /// Starts HTTP/2 on a stream to a node. `changed` is called when the node has said something, which may be that it takes more
    /// requests, and when the connection has ended.
    async fn start(stream: Stream, changed: Rc<dyn Fn()>) -> Result<Connection> {
        let heard = Rc::new(Cell::new(0));
        let io = Heard { stream, heard: heard.clone(), changed: changed.clone() };
        let mut builder = Builder::new(Local);
        builder
            .timer(TokioTimer::new())
            .initial_max_send_streams(STREAMS_AT_FIRST)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_header_list_size(FIELDS_MAX)
            .max_send_buf_size(feed::QUEUE_MAX);
        let (sender, driver) = builder.handshake(TokioIo::new(io)).await.map_err(|e| {
            let text = format!("upstream speaks no HTTP/2: {e} while connecting to upstream");
            Error::upstream(Kind::Malformed).retry(Retry::Safe).context(text)
        })?;
        let driver = Rc::new(RefCell::new(Some(driver)));
        tokio::task::spawn_local(drive(driver.clone(), changed));
        let (streams, retired, used) = (Cell::new(0), Cell::new(false), Cell::new(Instant::now()));
        Ok(Connection { sender, driver, heard, streams, retired, used })
    }

    /// Whether it has room for another request.
    fn has_room(&self) -> bool {
        let most = || match self.driver.try_borrow() {
            Ok(driver) => driver.as_ref().map_or(0, Driver::current_max_send_streams),
            Err(_) => 0,
        };
        !self.retired.get() && !self.sender.is_closed() && self.streams.get() < most()
    }

    /// The node has not said yet how many requests it takes.
    fn is_young(&self) -> bool {
        self.heard.get() == 0 && !self.retired.get() && !self.sender.is_closed()
    }

    /// Nothing is on it, and nothing will be.
    fn is_over(&self) -> bool {
        self.sender.is_closed() || (self.retired.get() && self.streams.get() == 0)
    }
}

/// Runs a connection to its end.
async fn drive(driver: Rc<RefCell<Option<Driver>>>, changed: Rc<dyn Fn()>) {
    let ended = poll_fn(|cx| match &mut *driver.borrow_mut() {
        Some(driver) => Pin::new(driver).poll(cx),
        None => Poll::Ready(Ok(())),
    })
    .await;
    let driver = driver.borrow_mut().take();
    drop(driver);
    changed();
    if let Err(e) = ended {
        tracing::debug!("HTTP/2 connection to an upstream: {e}");
    }
}

/// Whether the node has not looked at a request, whatever its method: it has refused the stream, or left its connection behind before
/// the stream (RFC 9113, 8.7), or the request was never sent.
pub fn is_untouched(e: &hyper::Error) -> bool {
    let by_node = std::error::Error::source(e).and_then(|why| why.downcast_ref::<h2::Error>()).is_some_and(|why| {
        // Streams that the node may have seen end otherwise, also behind its GOAWAY.
        why.is_remote() && (why.is_go_away() || (why.is_reset() && why.reason() == Some(h2::Reason::REFUSED_STREAM)))
    });
    e.is_canceled() || by_node
}

/// A stream of bytes as hyper has it: notes that the node is there.
struct Heard {
    stream: Stream,
    heard: Rc<Cell<u64>>,
    changed: Rc<dyn Fn()>,
}

impl AsyncRead for Heard {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        if buf.filled().len() > before {
            self.heard.set(self.heard.get() + 1);
            (self.changed)();
        }
        read
    }
}

impl AsyncWrite for Heard {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Runs hyper's tasks on this thread.
#[derive(Clone, Copy)]
struct Local;

impl<F: Future + 'static> hyper::rt::Executor<F> for Local {
    fn execute(&self, task: F) {
        tokio::task::spawn_local(async move {
            task.await;
        });
    }
}
