//! HTTP/2 to nodes, by hyper: one connection per node and worker, which all requests share.
//!
//! hyper owns the connection and drives it in a task of its own; a request hands its body over through a `Feed`, whose queue is
//! bounded, so that a node that does not read stops the client.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use bytes::Bytes;
use hashbrown::HashMap;
use hyper::{
    body::{Body, Frame, SizeHint},
    client::conn::http2::{Builder, SendRequest},
};
use hyper_util::rt::{TokioIo, TokioTimer};

use super::{Key, Stream};
use crate::error::{Error, Kind, Result, Retry};

/// Response bytes that a node may send ahead of who reads them, per stream and per connection.
const STREAM_WINDOW: u32 = 128 * 1024;
const CONNECTION_WINDOW: u32 = 1024 * 1024;
/// Request bytes that wait for the node, per stream, in the queue here and in hyper's.
const QUEUE_MAX: usize = 64 * 1024;
/// A response's head and trailers: as long as HTTP/1's may be.
const FIELDS_MAX: u32 = 64 * 1024;
/// Connections of a worker; past it those that are idle go.
const CONNECTIONS_MAX: usize = 1024;
/// One that no request has used for so long is closed, as nginx's `keepalive_timeout` has it.
const IDLE: Duration = Duration::from_secs(60);

/// Sends requests on a connection that others use, too.
pub type Sender = SendRequest<Feeding>;

/// The connections of a worker, by node.
#[derive(Default)]
pub struct Connections(RefCell<HashMap<Key, Open>>);

struct Open {
    sender: Sender,
    used: Cell<Instant>,
}

impl Connections {
    /// One that is open.
    pub fn get(&self, key: &Key, now: Instant) -> Option<Sender> {
        let mut open = self.0.borrow_mut();
        let found = open.get(key)?;
        if found.sender.is_closed() {
            open.remove(key);
            return None;
        }
        found.used.set(now);
        Some(found.sender.clone())
    }

    /// Keeps one for the next requests. Where there is no room it ends with the request that made it.
    pub fn put(&self, key: Key, sender: &Sender, now: Instant) {
        let mut open = self.0.borrow_mut();
        if open.len() >= CONNECTIONS_MAX {
            open.retain(|_, one| one.is_wanted(now));
        }
        if open.len() < CONNECTIONS_MAX {
            open.insert(key, Open { sender: sender.clone(), used: Cell::new(now) });
        }
    }

    /// Gives up one that has not answered in time: nobody knows whether it is still there.
    pub fn forget(&self, key: &Key) {
        self.0.borrow_mut().remove(key);
    }

    /// Lets go of what is closed or was not used for long; requests under way keep theirs. To be called now and then.
    pub fn sweep(&self, now: Instant) {
        self.0.borrow_mut().retain(|_, one| one.is_wanted(now));
    }
}

impl Open {
    fn is_wanted(&self, now: Instant) -> bool {
        !self.sender.is_closed() && now.saturating_duration_since(self.used.get()) < IDLE
    }
}

/// Starts HTTP/2 on a stream to a node.
pub async fn start(stream: Stream) -> Result<Sender> {
    let mut builder = Builder::new(Local);
    builder
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(FIELDS_MAX)
        .max_send_buf_size(QUEUE_MAX);
    let (sender, connection) = builder.handshake(TokioIo::new(stream)).await.map_err(|e| {
        let text = format!("upstream speaks no HTTP/2: {e} while connecting to upstream");
        Error::upstream(Kind::Malformed).retry(Retry::Safe).context(text)
    })?;
    tokio::task::spawn_local(async move {
        if let Err(e) = connection.await {
            tracing::debug!("HTTP/2 connection to an upstream: {e}");
        }
    });
    Ok(sender)
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

/// A request's end of its body. Dropped before `end`: the stream is reset.
#[derive(Default)]
pub struct Feed(Rc<RefCell<Queue>>);

/// hyper's end of it.
pub struct Feeding(Rc<RefCell<Queue>>);

#[derive(Default)]
struct Queue {
    pieces: VecDeque<Bytes>,
    queued: usize,
    ended: bool,
    /// The request is over before its body.
    cut: bool,
    /// The node wants no more of it.
    gone: bool,
    hyper: Option<Waker>,
    request: Option<Waker>,
}

impl Feed {
    /// What hyper is given.
    pub fn body(&self) -> Feeding {
        Feeding(self.0.clone())
    }

    /// Ready when more may be given: `false` says that nobody wants more.
    pub fn poll_room(&self, cx: &Context<'_>) -> Poll<bool> {
        let mut queue = self.0.borrow_mut();
        if queue.gone {
            return Poll::Ready(false);
        }
        if queue.queued < QUEUE_MAX {
            return Poll::Ready(true);
        }
        queue.request = Some(cx.waker().clone());
        Poll::Pending
    }

    pub fn give(&self, piece: Bytes) {
        self.change(|queue| {
            queue.queued += piece.len();
            queue.pieces.push_back(piece);
        });
    }

    pub fn end(&self) {
        self.change(|queue| queue.ended = true);
    }

    fn change(&self, change: impl FnOnce(&mut Queue)) {
        let mut queue = self.0.borrow_mut();
        change(&mut queue);
        let waker = queue.hyper.take();
        drop(queue);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.change(|queue| queue.cut = !queue.ended);
    }
}

impl Feeding {
    fn wake_request(&self) {
        let waker = self.0.borrow_mut().request.take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl Drop for Feeding {
    fn drop(&mut self) {
        self.0.borrow_mut().gone = true;
        self.wake_request();
    }
}

/// The request ended before its body did.
#[derive(Debug)]
pub struct Cut;

impl std::fmt::Display for Cut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the request was cut")
    }
}

impl std::error::Error for Cut {}

impl Body for Feeding {
    type Data = Bytes;
    type Error = Cut;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Cut>>> {
        let mut queue = self.0.borrow_mut();
        if let Some(piece) = queue.pieces.pop_front() {
            queue.queued -= piece.len();
            drop(queue);
            self.wake_request();
            return Poll::Ready(Some(Ok(Frame::data(piece))));
        }
        if queue.ended {
            return Poll::Ready(None);
        }
        if queue.cut {
            return Poll::Ready(Some(Err(Cut)));
        }
        queue.hyper = Some(cx.waker().clone());
        Poll::Pending
    }

    fn is_end_stream(&self) -> bool {
        let queue = self.0.borrow();
        queue.ended && queue.pieces.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_that_is_full_holds_the_request_back() {
        let feed = Feed::default();
        let mut body = feed.body();
        let mut cx = Context::from_waker(Waker::noop());
        feed.give(Bytes::from(vec![0; QUEUE_MAX - 1]));
        assert_eq!(feed.poll_room(&cx), Poll::Ready(true));
        feed.give(Bytes::from_static(b"x"));
        assert_eq!(feed.poll_room(&cx), Poll::Pending);
        assert!(matches!(Pin::new(&mut body).poll_frame(&mut cx), Poll::Ready(Some(Ok(_)))));
        assert_eq!(feed.poll_room(&cx), Poll::Ready(true));
        feed.end();
        assert!(!body.is_end_stream());
        assert!(matches!(Pin::new(&mut body).poll_frame(&mut cx), Poll::Ready(Some(Ok(_)))));
        assert!(matches!(Pin::new(&mut body).poll_frame(&mut cx), Poll::Ready(None)));
        drop(body);
        assert_eq!(feed.poll_room(&cx), Poll::Ready(false), "nobody is there");
    }

    #[test]
    fn a_request_that_ends_before_its_body_cuts_the_stream() {
        let feed = Feed::default();
        let mut body = feed.body();
        drop(feed);
        let mut cx = Context::from_waker(Waker::noop());
        assert!(matches!(Pin::new(&mut body).poll_frame(&mut cx), Poll::Ready(Some(Err(Cut)))));
    }
}
