//! One connection to a node: the HTTP/1 client codec.
//!
//! `inp` holds what was read; the head is parsed where it stands and body bytes are handed out where they stand. The
//! buffer is held only while something waits in it, so a kept connection costs its box and its socket.

use std::{
    ops::Range,
    pin::Pin,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{
    Stream, call_failed,
    response::{self, Head},
    timed_out,
};
use crate::{
    error::{Error, Kind, Result, Retry},
    exchange::{
        Response,
        deadline::Deadline,
        framing::{ChunkDecoder, Chunked, Framing, HeadScan, Refusal},
    },
    tcp::buffers,
};

// nginx's names of the parts of a try.
const SENDING: &str = "sending request to upstream";
const READING_HEAD: &str = "reading response header from upstream";
const READING_BODY: &str = "reading upstream";

/// What is left to read of the response's body.
#[derive(Debug)]
enum Body {
    Done,
    Length(u64),
    Chunked(ChunkDecoder),
    UntilClose,
}

/// How long the node is being waited for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wait {
    None,
    Short,
    /// `SOON` has passed.
    Long,
}

/// A wait that is shorter is not worth a look at anything else: to watch a client costs 2 % of a request that has nothing
/// else to do, and nearly all nodes answer before that tells them anything.
const SOON: Duration = Duration::from_millis(50);

pub struct Conn {
    io: Stream,
    deadline: Deadline,
    wait: Wait,
    /// `inp[at..]` was read and not looked at yet.
    inp: Vec<u8>,
    at: usize,
    /// Body bytes that wait to be taken: before `at`.
    run: Range<usize>,
    scan: HeadScan,
    body: Body,
    eof: bool,
    keep: bool,
    requests: u64,
    received: u64,
    taken: u64,
    sent: u64,
}

impl Conn {
    pub fn new(io: Stream) -> Self {
        Conn {
            io,
            deadline: Deadline::new(),
            wait: Wait::None,
            inp: Vec::new(),
            at: 0,
            run: 0..0,
            scan: HeadScan::default(),
            body: Body::Done,
            eof: false,
            keep: false,
            requests: 0,
            received: 0,
            taken: 0,
            sent: 0,
        }
    }

    /// Starts the next request.
    pub fn begin(&mut self) {
        self.requests += 1;
        (self.received, self.sent, self.taken) = (0, 0, 0);
        self.scan = HeadScan::default();
        self.body = Body::Done;
        self.keep = false;
        self.wait = Wait::None;
    }

    /// Requests that it has served, with the one under way.
    pub fn requests(&self) -> u64 {
        self.requests
    }

    /// Bytes of the response so far, head and framing included.
    pub fn received(&self) -> u64 {
        self.received
    }

    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Whether another request may be sent on it: the response was read to its end and nothing came after it.
    pub fn is_reusable(&self) -> bool {
        self.keep
            && !self.eof
            && self.io.is_settled()
            && matches!(self.body, Body::Done)
            && self.run.is_empty()
            && self.at == self.inp.len()
    }

    /// Lets go of what an idle connection does not need.
    pub fn rest(&mut self) {
        self.deadline.clear();
        buffers::put(std::mem::take(&mut self.inp));
        self.at = 0;
        self.run = 0..0;
    }

    /// Whether an idle connection is still open and silent. Costs no system call while no event came.
    pub fn is_alive(&mut self) -> bool {
        let mut byte = [0];
        if let Stream::Tcp(tcp) = &self.io {
            // Unlike a poll this leaves the waker alone.
            return tcp.is_settled()
                && matches!(tcp.tcp().try_read(&mut byte), Err(e) if e.kind() == std::io::ErrorKind::WouldBlock);
        }
        let mut buf = ReadBuf::new(&mut byte);
        let mut cx = Context::from_waker(Waker::noop());
        Pin::new(&mut self.io).poll_read(&mut cx, &mut buf).is_pending()
    }

    /// Gives request bytes to the kernel: how many it took.
    pub fn poll_write(&mut self, cx: &mut Context<'_>, data: &[u8], limit: Duration) -> Poll<Result<usize>> {
        match Pin::new(&mut self.io).poll_write(cx, data) {
            Poll::Ready(Ok(n)) if n > 0 => {
                self.wait = Wait::None;
                self.sent += n as u64;
                Poll::Ready(Ok(n))
            }
            Poll::Ready(Ok(_)) => Poll::Ready(Err(self.broken(format!("upstream closed connection while {SENDING}")))),
            Poll::Ready(Err(e)) => Poll::Ready(Err(self.broken(call_failed("writev()", &e, SENDING)))),
            Poll::Pending if self.late(cx, limit) => {
                let late = Error::upstream(Kind::WriteTimeout).retry(Retry::Idempotent);
                Poll::Ready(Err(late.context(timed_out(SENDING))))
            }
            Poll::Pending => Poll::Pending,
        }
    }

    /// Takes a whole request, to send it at the end of the worker's turn; `false`: it is to be written now.
    pub fn send_later(&mut self, request: &[u8]) -> bool {
        let Stream::Tcp(tcp) = &self.io else { return false };
        // Should the node not take it, the first look at this wait finds out (`SOON`).
        let taken = tcp.send_later(request, None);
        if taken {
            self.sent += request.len() as u64;
        }
        taken
    }

    /// What TLS still holds back leaves.
    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        match ready!(Pin::new(&mut self.io).poll_flush(cx)) {
            Ok(()) => Poll::Ready(Ok(())),
            Err(e) => Poll::Ready(Err(self.broken(call_failed("writev()", &e, SENDING)))),
        }
    }

    /// The next head, interim ones included. `limit`: `None` while the request is still on its way.
    pub fn poll_head(
        &mut self,
        cx: &mut Context<'_>,
        limit: Option<Duration>,
        to_head: bool,
        into: &mut Response,
    ) -> Poll<Result<Head>> {
        loop {
            if let Some((head, len)) = self.look(to_head, into).map_err(|r| invalid("header", r.why, READING_HEAD))? {
                self.at += len;
                self.scan = HeadScan::default();
                self.start_body(&head);
                return Poll::Ready(Ok(head));
            }
            if !ready!(self.poll_fill(cx, limit, READING_HEAD))? {
                return Poll::Ready(Err(self.closed(READING_HEAD)));
            }
        }
    }

    /// A head in what was read, and its length.
    fn look(&mut self, to_head: bool, into: &mut Response) -> Result<Option<(Head, usize)>, Refusal> {
        let unread = &self.inp[self.at..];
        if unread.is_empty() {
            return Ok(None);
        }
        // The first look finds all of it, nearly always, and the parser finds its end: no search. Only short ones, whose lines
        // are all within bounds.
        if self.scan.is_new()
            && let Some((head, len)) = response::parse(unread, to_head, into)?
            && len <= response::LIMITS.line
        {
            return Ok(Some((head, len)));
        }
        match self.scan.next(unread, response::LIMITS)? {
            // What ends like a head and is none (two line ends alone) will not become one.
            Some(len) => {
                response::parse(&unread[..len], to_head, into)?.map(Some).ok_or(Refusal::bad("incomplete head"))
            }
            None => Ok(None),
        }
    }

    fn start_body(&mut self, head: &Head) {
        if head.is_interim() {
            return;
        }
        self.keep = head.keep_alive;
        self.body = match head.framing {
            Framing::None | Framing::Length(0) => Body::Done,
            Framing::Length(n) => Body::Length(n),
            Framing::Chunked => Body::Chunked(ChunkDecoder::of_response()),
            Framing::UntilClose => Body::UntilClose,
        };
    }

    /// Sees that `data` has something; `false`: the body has ended.
    pub fn poll_body(&mut self, cx: &mut Context<'_>, limit: Duration) -> Poll<Result<bool>> {
        loop {
            if !self.run.is_empty() {
                return Poll::Ready(Ok(true));
            }
            match self.decode()? {
                Some(more) => return Poll::Ready(Ok(more)),
                None => {
                    let filled = ready!(self.poll_fill(cx, Some(limit), READING_BODY))?;
                    if !filled && matches!(self.body, Body::UntilClose) {
                        self.body = Body::Done;
                    } else if !filled {
                        return Poll::Ready(Err(self.closed(READING_BODY)));
                    }
                }
            }
        }
    }

    /// Body bytes where they stand in the buffer.
    pub fn data(&self) -> &[u8] {
        &self.inp[self.run.clone()]
    }

    /// The first `n` bytes of `data` were taken.
    pub fn consume(&mut self, n: usize) {
        self.run.start += n;
        self.taken += n as u64;
    }

    /// Bytes of the body that were taken so far.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// All of the body was taken, as far as that can be told without another read.
    pub fn is_done(&mut self) -> Result<bool> {
        Ok(self.run.is_empty() && self.decode()? == Some(false))
    }

    /// Looks at what was read: `Some(true)` there is data, `Some(false)` the body has ended, `None` it takes more input.
    fn decode(&mut self) -> Result<Option<bool>> {
        if !self.run.is_empty() {
            return Ok(Some(true));
        }
        let unread = self.inp.len() - self.at;
        let len = match &mut self.body {
            Body::Done => return Ok(Some(false)),
            Body::Chunked(_) => return self.decode_chunked(),
            Body::UntilClose => unread,
            Body::Length(left) => {
                let len = unread.min(usize::try_from(*left).unwrap_or(usize::MAX));
                *left -= len as u64;
                if *left == 0 {
                    self.body = Body::Done;
                }
                len
            }
        };
        self.run = self.at..self.at + len;
        self.at += len;
        Ok((len > 0).then_some(true))
    }

    fn decode_chunked(&mut self) -> Result<Option<bool>> {
        let Body::Chunked(decoder) = &mut self.body else { return Ok(None) };
        let found = decoder.next(&self.inp[self.at..]).map_err(|r| invalid("chunked response", r.why, READING_BODY))?;
        Ok(match found {
            Chunked::Data { from, to } => {
                self.run = self.at + from..self.at + to;
                self.at += to;
                Some(true)
            }
            Chunked::More => {
                self.at = self.inp.len();
                None
            }
            Chunked::Done { used } => {
                self.at += used;
                self.body = Body::Done;
                Some(false)
            }
        })
    }

    /// Reads more; `false` is the end of the stream.
    fn poll_fill(&mut self, cx: &mut Context<'_>, limit: Option<Duration>, what: &str) -> Poll<Result<bool>> {
        if self.eof {
            return Poll::Ready(Ok(false));
        }
        self.make_room();
        let full = self.inp.spare_capacity_mut().len();
        match self.io.poll_read_into(cx, &mut self.inp) {
            Poll::Ready(Ok(0)) => {
                self.eof = true;
                Poll::Ready(Ok(false))
            }
            Poll::Ready(Ok(n)) => {
                self.wait = Wait::None;
                self.received += n as u64;
                if n == full && self.inp.capacity() < buffers::KEPT_SIZE {
                    self.inp.reserve_exact(buffers::KEPT_SIZE - self.inp.len());
                }
                Poll::Ready(Ok(true))
            }
            // rustls reports a peer that went without a close_notify; for a body that the end of the stream delimits
            // that would hide a cut, so it stays an error.
            Poll::Ready(Err(e)) => {
                self.eof = true;
                Poll::Ready(Err(self.lost(call_failed("recv()", &e, what))))
            }
            Poll::Pending if self.inp.is_empty() => {
                // Others have a use for it meanwhile, and the one used last is the warmest.
                buffers::put(std::mem::take(&mut self.inp));
                self.poll_late(cx, limit, what)
            }
            Poll::Pending => self.poll_late(cx, limit, what),
        }
    }

    /// Nothing came: waits on, for `limit` in all.
    fn poll_late(&mut self, cx: &Context<'_>, limit: Option<Duration>, what: &str) -> Poll<Result<bool>> {
        match limit {
            Some(limit) if self.late(cx, limit) => {
                Poll::Ready(Err(Error::upstream(Kind::ReadTimeout).retry(Retry::Idempotent).context(timed_out(what))))
            }
            _ => Poll::Pending,
        }
    }

    fn make_room(&mut self) {
        if self.at == self.inp.len() && self.run.is_empty() {
            self.inp.clear();
            self.at = 0;
            self.run = 0..0;
        }
        if self.inp.capacity() == 0 {
            self.inp = buffers::take();
        }
        // Only a head can fill the buffer, and its length is bounded.
        if self.inp.len() == self.inp.capacity() {
            self.inp.reserve(buffers::SIZE);
        }
    }

    /// For a wait that cannot go on now: starts the clock with the first call, says whether time is up.
    fn late(&mut self, cx: &Context<'_>, limit: Duration) -> bool {
        let first = limit.min(SOON);
        match self.wait {
            Wait::None => {
                self.wait = Wait::Short;
                self.deadline.start(first, cx);
                false
            }
            _ if !self.deadline.poll_expired(cx) => false,
            Wait::Short if first < limit => {
                self.wait = Wait::Long;
                self.deadline.start(limit - first, cx);
                false
            }
            Wait::Short | Wait::Long => true,
        }
    }

    /// The node has been waited for so long that there is time to look after the client.
    pub fn is_slow(&self) -> bool {
        self.wait == Wait::Long
    }

    /// A failed write: if nothing of the request left, it may go elsewhere whatever it is.
    fn broken(&mut self, what: String) -> Error {
        self.keep = false;
        let retry = if self.sent == 0 { Retry::Safe } else { Retry::Idempotent };
        Error::upstream(Kind::Closed).retry(retry).context(what)
    }

    fn closed(&self, what: &str) -> Error {
        self.lost(format!("upstream prematurely closed connection while {what}"))
    }

    fn lost(&self, what: String) -> Error {
        let retry = if self.sent == 0 { Retry::Safe } else { Retry::Idempotent };
        Error::upstream(Kind::Closed).retry(retry).context(what)
    }

    /// The raw stream after a 101, and what was read of it already.
    #[expect(
        clippy::boxed_local,
        reason = "connections live in their boxes; unboxing one only to take it apart copies it"
    )]
    pub fn into_tunnel(mut self: Box<Self>) -> (Stream, Vec<u8>) {
        let mut unread = std::mem::take(&mut self.inp);
        unread.drain(..self.at);
        (self.io, unread)
    }
}

/// What a node has sent is no HTTP.
fn invalid(what: &str, why: &str, doing: &str) -> Error {
    let text = format!("upstream sent invalid {what}: {why} while {doing}");
    Error::upstream(Kind::Malformed).retry(Retry::Idempotent).context(text)
}
