//! A request's body on its way to hyper: a queue that is bounded, so that a node that does not read stops the client.

use std::{
    cell::RefCell,
    collections::VecDeque,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
    time::Instant,
};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};

/// Request bytes that wait for the node, per stream, in the queue here and in hyper's.
pub(super) const QUEUE_MAX: usize = 64 * 1024;
/// What a piece counts beside its bytes: a client that sends one byte at a time is to cost no more than one that does not.
const PIECE_COST: usize = 64;

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
    /// When hyper last took something.
    moved: Option<Instant>,
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

    /// Ready when all that was given is with hyper.
    pub fn poll_taken(&self, cx: &Context<'_>) -> Poll<()> {
        let mut queue = self.0.borrow_mut();
        if queue.pieces.is_empty() || queue.gone {
            return Poll::Ready(());
        }
        queue.request = Some(cx.waker().clone());
        Poll::Pending
    }

    /// When the node last took something of it.
    pub fn moved(&self) -> Option<Instant> {
        self.0.borrow().moved
    }

    pub fn give(&self, piece: Bytes) {
        self.change(|queue| {
            queue.queued += piece.len() + PIECE_COST;
            queue.pieces.push_back(piece);
        });
    }

    pub fn has_ended(&self) -> bool {
        self.0.borrow().ended
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
            queue.queued -= piece.len() + PIECE_COST;
            queue.moved = Some(Instant::now());
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
        feed.give(Bytes::from(vec![0; QUEUE_MAX - PIECE_COST - 1]));
        assert_eq!(feed.poll_room(&cx), Poll::Ready(true));
        feed.give(Bytes::from_static(b"x"));
        assert_eq!((feed.poll_room(&cx), feed.poll_taken(&cx)), (Poll::Pending, Poll::Pending));
        assert!(matches!(Pin::new(&mut body).poll_frame(&mut cx), Poll::Ready(Some(Ok(_)))));
        assert_eq!(feed.poll_room(&cx), Poll::Ready(true));
        feed.end();
        assert!(!body.is_end_stream() && feed.poll_taken(&cx).is_pending());
        assert!(matches!(Pin::new(&mut body).poll_frame(&mut cx), Poll::Ready(Some(Ok(_)))));
        assert!(matches!(Pin::new(&mut body).poll_frame(&mut cx), Poll::Ready(None)));
        assert!(feed.poll_taken(&cx).is_ready() && feed.moved().is_some());
        drop(body);
        assert_eq!(feed.poll_room(&cx), Poll::Ready(false), "nobody is there");
    }

    #[test]
    fn a_queue_of_single_bytes_is_full_by_what_they_cost() {
        let (feed, cx) = (Feed::default(), Context::from_waker(Waker::noop()));
        for _ in 0..QUEUE_MAX.div_ceil(1 + PIECE_COST) {
            assert_eq!(feed.poll_room(&cx), Poll::Ready(true));
            feed.give(Bytes::from_static(b"x"));
        }
        assert!(feed.poll_room(&cx).is_pending());
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
