//! The HTTP/1 server codec: one `H1` per connection, which is the `Client` of each request on it in turn.
//!
//! Buffers are held only while bytes wait in them, so an idle connection costs its box and its task. What was read too
//! far stays in `inp` for the next request. Responses gather in `out` until a flush; large pieces go out beside it
//! by `writev` without a copy.

use std::{
    any::Any,
    future::poll_fn,
    io::{self, IoSlice},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker, ready},
    time::{Duration, Instant},
};

use tokio::io::AsyncWrite;

use super::{
    Handler, Io, Server, Settings,
    answer::{self, Closing, Length},
    drain::Drain,
    h2, head,
    listener::Tls,
    rate::Rate,
};
use crate::{
    error::{Error, Kind, Result},
    exchange::{
        BodyLength, Client, Connection, Exchange, Headers, Request, RequestBody, Response, TcpInfo, Version,
        deadline::Deadline,
        framing::{ChunkDecoder, Chunked, Framing, HeadScan, LAST_CHUNK, Refusal, write_chunk_size},
    },
    tcp::buffers,
};

/// Response bytes gathered before they must be written: a head and a small body leave in one write.
const OUT_HIGH: usize = 32 * 1024;
/// A piece from this size on is written from where it is: the copy would cost more than the second `iovec`.
const DIRECT_MIN: usize = 16 * 1024;
/// A request body that nobody read is thrown away up to here to keep the connection; past it closing is cheaper.
pub(super) const DISCARD_MAX: u64 = 256 * 1024;

/// A connection after `101 Switching Protocols`: raw bytes both ways.
pub struct Tunnel {
    pub io: Io,
    /// Read already: what the client sent right after its request.
    pub unread: Vec<u8>,
}

/// Takes the connection out of an HTTP/1 client, whose queued bytes must be flushed. `None` for HTTP/2, or when it was
/// taken before.
pub fn into_tunnel(mut client: Box<dyn Client>) -> Option<Tunnel> {
    client.as_any().downcast_mut::<H1>()?.take()
}

/// Serves requests until the connection ends.
pub(super) async fn serve<H: Handler>(server: &Rc<Server<H>>, io: Io, conn: Rc<Connection>, tls: Option<Tls>) {
    let mut client: Box<dyn Client> = Box::new(H1::new(io, server.settings, server.drain.clone()));
    let mut nth = 0;
    while let Some(h1) = client.as_any().downcast_mut::<H1>() {
        match poll_fn(|cx| h1.poll_next(cx, nth)).await {
            Next::Closed => return,
            Next::Http2 => {
                if let Some(Tunnel { io: Io::Tcp(mut socket), unread }) = h1.take() {
                    socket.put_back(unread);
                    h2::serve(server, Io::Tcp(socket), conn, tls).await;
                }
                return;
            }
            Next::Refused(refusal) => return reject(server, client, &conn, refusal).await,
            Next::Head(len) => {
                nth += 1;
                server.handler.expect(|| head::raw_path(&h1.unread()[..len]));
                let mut x = server.pool.take(&conn);
                x.request.nth = nth;
                let begun = h1.begin(len, &mut x);
                let allowed = begun.and_then(|()| tls.as_ref().map_or(Ok(()), |tls| tls.check(&conn, &x.request)));
                if let Err(refusal) = allowed {
                    return refuse(server, client, x, refusal).await;
                }
                x.client = Some(client);
                let mut x = server.handler.handle(x).await;
                let back = x.client.take();
                server.pool.put(x);
                let Some(back) = back else { return };
                client = back;
            }
        }
        let Some(h1) = client.as_any().downcast_mut::<H1>() else { return };
        if !h1.end().await {
            return h1.linger().await;
        }
    }
}

/// Answers a head that is none.
async fn reject<H: Handler>(server: &Server<H>, mut client: Box<dyn Client>, conn: &Rc<Connection>, refusal: Refusal) {
    let mut x = server.pool.take(conn);
    if let Some(h1) = client.as_any().downcast_mut::<H1>() {
        head::salvage(h1.unread(), &mut x.request);
        x.request.head_len = h1.unread().len() as u64;
    }
    refuse(server, client, x, refusal).await
}

async fn refuse<H: Handler>(server: &Server<H>, mut client: Box<dyn Client>, mut x: Box<Exchange>, refusal: Refusal) {
    x.response.status = refusal.status;
    x.request.keep_alive = false;
    // As nginx: a client that was too slow is not told so, only logged.
    let silent = refusal.status == 408;
    if !silent {
        if let Some(h1) = client.as_any().downcast_mut::<H1>() {
            h1.refused(&x.request);
        }
        x.client = Some(client);
    }
    let mut x = server.handler.reject(x, refusal.why).await;
    let back = x.client.take();
    server.pool.put(x);
    if let Some(mut client) = back
        && let Some(h1) = client.as_any().downcast_mut::<H1>()
    {
        h1.end().await;
        h1.linger().await;
    }
}

/// What comes next on a connection.
enum Next {
    /// A whole head stands in so many bytes of `inp`.
    Head(usize),
    Refused(Refusal),
    /// The preface waits in `inp`.
    Http2,
    /// Closed by the client, idle for too long, or the worker drains.
    Closed,
}

/// What is left to read of the request's body.
#[derive(Debug)]
enum BodyIn {
    Done,
    Length(u64),
    Chunked(ChunkDecoder),
}

/// Where the response is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BodyOut {
    NotStarted,
    /// HEAD, 204, 304: what is written is dropped.
    None,
    Known(u64),
    /// So many bytes of the chunk that was announced are still to come.
    Chunked(u64),
    UntilClose,
    Ended,
}

struct H1 {
    /// `None` once a tunnel took it.
    io: Option<Io>,
    settings: Settings,
    drain: Drain,
    read_limit: Limit,
    write_limit: Limit,

    /// `inp[at..]` is read from the socket and not used yet.
    inp: Vec<u8>,
    at: usize,
    /// The client has closed its side.
    eof: bool,
    scan: HeadScan,
    /// The empty line that may stand before a request line was seen.
    skipped: bool,

    body: BodyIn,
    body_bytes: u64,
    /// What it may have at most; 0: no bound.
    max_body: u64,
    received: u64,
    continues: Continue,

    /// `out[out_at..]` is queued and not written.
    out: Vec<u8>,
    out_at: usize,
    body_out: BodyOut,
    rate: Rate,
    sent: u64,
    version: Version,
    keep: bool,
    /// The head or the request was refused: more of it may be on its way.
    refused: bool,
}

/// `Expect: 100-continue`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Continue {
    No,
    /// The client waits for it.
    Awaited,
    /// Queued, perhaps not written.
    Queued,
}

/// A deadline that is set when a wait begins.
pub(super) struct Limit {
    deadline: Deadline,
    armed: bool,
}

impl Limit {
    pub(super) fn new() -> Self {
        Limit { deadline: Deadline::new(), armed: false }
    }

    /// For a wait that cannot go on now: starts the clock with the first call, says whether time is up.
    pub(super) fn poll(&mut self, cx: &Context<'_>, limit: Duration) -> bool {
        if self.armed {
            return self.deadline.poll_expired(cx);
        }
        self.armed = true;
        self.deadline.start(limit, cx);
        false
    }

    /// The wait went on: the next one has its own time.
    pub(super) fn progress(&mut self) {
        self.armed = false;
    }
}

impl H1 {
    fn new(io: Io, settings: Settings, drain: Drain) -> Self {
        H1 {
            io: Some(io),
            settings,
            drain,
            read_limit: Limit::new(),
            write_limit: Limit::new(),
            inp: Vec::new(),
            at: 0,
            eof: false,
            scan: HeadScan::default(),
            skipped: false,
            body: BodyIn::Done,
            body_bytes: 0,
            max_body: settings.max_body,
            received: 0,
            continues: Continue::No,
            out: Vec::new(),
            out_at: 0,
            body_out: BodyOut::NotStarted,
            rate: Rate::default(),
            sent: 0,
            version: Version::Http11,
            keep: true,
            refused: false,
        }
    }

    fn unread(&self) -> &[u8] {
        &self.inp[self.at..]
    }

    fn take(&mut self) -> Option<Tunnel> {
        let io = self.io.take()?;
        let mut unread = std::mem::take(&mut self.inp);
        unread.drain(..self.at);
        self.at = 0;
        Some(Tunnel { io, unread })
    }

    /// Reads until a whole head is there. `nth`: requests so far.
    fn poll_next(&mut self, cx: &mut Context<'_>, nth: u64) -> Poll<Next> {
        loop {
            match self.look(nth) {
                Ok(Some(next)) => return Poll::Ready(next),
                Ok(None) => {}
                Err(refusal) => return Poll::Ready(Next::Refused(refusal)),
            }
            let idle = self.unread().is_empty();
            match self.poll_fill(cx) {
                Poll::Ready(Ok(n)) if n > 0 => {
                    // The limit on a head starts with its first byte and covers all of it.
                    if idle {
                        self.read_limit.progress();
                    }
                }
                Poll::Ready(_) => return Poll::Ready(Next::Closed),
                Poll::Pending => return self.poll_idle(cx, idle, nth),
            }
        }
    }

    /// Nothing to read now: is there a reason to stop waiting?
    fn poll_idle(&mut self, cx: &Context<'_>, idle: bool, nth: u64) -> Poll<Next> {
        // The client does not take its answer: the time between requests begins when it has.
        if idle && self.io.as_ref().is_some_and(|io| io.stream().is_stuck()) {
            self.read_limit.progress();
            let late = self.write_limit.poll(cx, self.settings.send_timeout);
            return if late { Poll::Ready(Next::Closed) } else { Poll::Pending };
        }
        if idle && self.drain.is_draining() {
            return Poll::Ready(Next::Closed);
        }
        let between = idle && nth > 0;
        let limit = if between { self.settings.keepalive_timeout } else { self.settings.header_timeout };
        match self.read_limit.poll(cx, limit) {
            false => Poll::Pending,
            true if idle => Poll::Ready(Next::Closed),
            true => Poll::Ready(Next::Refused(Refusal::with(408, "client timed out sending its request"))),
        }
    }

    /// What stands in `inp`, if that can be told yet.
    fn look(&mut self, nth: u64) -> Result<Option<Next>, Refusal> {
        if !self.skipped && self.unread().starts_with(b"\r\n") {
            self.at += 2;
            self.skipped = true;
        }
        let unread = &self.inp[self.at..];
        match unread {
            [] | [b'\r'] if unread.is_empty() || !self.skipped => return Ok(None),
            [b'A'..=b'Z' | b'_' | b'-', ..] => {}
            _ => return Err(Refusal::bad("invalid method")),
        }
        if nth == 0 && self.settings.http2 && matches!(self.io, Some(Io::Tcp(_))) {
            let begun = unread.len() >= 4 && unread.starts_with(&h2::PREFACE[..4]);
            match unread.len() >= h2::PREFACE.len() {
                true if unread.starts_with(h2::PREFACE) => return Ok(Some(Next::Http2)),
                false if begun && h2::PREFACE.starts_with(unread) => return Ok(None),
                _ if begun => return Err(Refusal::bad("invalid request line")),
                _ => {}
            }
        }
        // A request without a body ends what was read. Its head needs no search: the parser finds its end, too.
        let short = unread.len() <= self.settings.head.line.min(self.settings.head.total);
        if short && self.scan.is_new() && unread.ends_with(b"\r\n\r\n") {
            return Ok(Some(Next::Head(unread.len())));
        }
        Ok(self.scan.next(unread, self.settings.head)?.map(Next::Head))
    }

    /// Makes the head that stands in `len` bytes at the front of `inp` the request of `x`.
    fn begin(&mut self, len: usize, x: &mut Exchange) -> Result<(), Refusal> {
        self.scan = HeadScan::default();
        self.skipped = false;
        self.read_limit.progress();
        self.write_limit.progress();
        self.body = BodyIn::Done;
        (self.body_bytes, self.received, self.sent) = (0, 0, 0);
        self.max_body = self.settings.max_body;
        self.continues = Continue::No;
        self.body_out = BodyOut::NotStarted;
        self.rate.lift();
        let framing = head::parse(&self.inp[self.at..self.at + len], &x.conn.last_host, &mut x.request);
        self.at += x.request.head_len as usize;
        if self.at == self.inp.len() {
            // Others have a use for it while this one waits for its answer, and the one used last is the warmest.
            buffers::put(std::mem::take(&mut self.inp));
            self.at = 0;
        }
        self.version = x.request.version;
        let framing = framing?;
        if !self.settings.underscores {
            head::drop_underscored(x);
        }
        self.keep = x.request.keep_alive
            && x.request.nth < self.settings.keepalive_requests
            && !self.settings.keepalive_timeout.is_zero();
        if x.request.expects_continue {
            self.continues = Continue::Awaited;
        }
        match framing {
            Framing::Length(n) => {
                self.body = BodyIn::Length(n);
                x.body = RequestBody::Streaming { length: Some(n) };
                if self.settings.max_body != 0 && n > self.settings.max_body {
                    return Err(Refusal::with(413, "client intended to send too large body"));
                }
            }
            Framing::Chunked => {
                self.body = BodyIn::Chunked(ChunkDecoder::new());
                x.body = RequestBody::Streaming { length: None };
            }
            Framing::None | Framing::UntilClose => x.body = RequestBody::None,
        }
        Ok(())
    }

    /// The connection ends with the answer to come.
    fn refused(&mut self, request: &Request) {
        self.keep = false;
        self.refused = true;
        self.version = request.version;
        self.body_out = BodyOut::NotStarted;
        self.rate.lift();
        self.sent = 0;
    }

    /// Ends a request: whether another may follow.
    async fn end(&mut self) -> bool {
        if self.io.is_none() || self.body_out != BodyOut::Ended {
            self.keep = false;
        }
        if poll_fn(|cx| self.poll_flush(cx)).await.is_err() {
            self.io = None;
            return false;
        }
        self.keep && self.continues != Continue::Awaited && self.discard_body().await
    }

    /// Reads and forgets the rest of the request's body, if it is short.
    async fn discard_body(&mut self) -> bool {
        if matches!(self.body, BodyIn::Done) {
            return true;
        }
        if matches!(self.body, BodyIn::Length(n) if n > DISCARD_MAX) {
            return false;
        }
        let (mut rest, mut total) = (buffers::take(), 0);
        let done = loop {
            match poll_fn(|cx| self.poll_read_body(cx, &mut rest, buffers::SIZE)).await {
                Ok(0) => break true,
                Ok(n) => total += n as u64,
                Err(_) => break false,
            }
            rest.clear();
            if total > DISCARD_MAX {
                break false;
            }
        };
        buffers::put(rest);
        done
    }

    /// Closes so that the client can read what it was sent: if more of its bytes may come they are read for a while,
    /// since bytes that meet a closed socket make a reset of it, which destroys what was sent.
    async fn linger(&mut self) {
        let more = self.refused || !matches!(self.body, BodyIn::Done) || !self.unread().is_empty();
        let Some(io) = &mut self.io else { return };
        if more || matches!(io, Io::Tls(_)) {
            let _ = poll_fn(|cx| Pin::new(&mut *io).poll_shutdown(cx)).await;
        }
        if !more {
            return;
        }
        let until = Instant::now() + self.settings.linger_max;
        self.read_limit.progress();
        while Instant::now() < until {
            self.at = self.inp.len();
            let read = poll_fn(|cx| match self.poll_fill(cx) {
                Poll::Pending if self.read_limit.poll(cx, self.settings.linger_idle) => Poll::Ready(Ok(0)),
                other => other,
            });
            match read.await {
                Ok(n) if n > 0 => self.read_limit.progress(),
                _ => return,
            }
        }
    }

    /// Reads more into `inp`; 0 is the end of the stream. The buffer is held only while it has something.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let Some(io) = self.io.as_mut().filter(|_| !self.eof) else { return Poll::Ready(Ok(0)) };
        if self.at == self.inp.len() {
            self.inp.clear();
            self.at = 0;
        }
        if self.inp.capacity() == 0 {
            // Most looks find nothing: they need no buffer.
            if let Io::Tcp(socket) = io {
                ready!(socket.poll_readable(cx))?;
            }
            self.inp = buffers::take();
        }
        if self.inp.len() == self.inp.capacity() {
            if self.at > 0 {
                self.inp.drain(..self.at);
                self.at = 0;
            } else {
                self.inp.reserve(buffers::SIZE);
            }
        }
        let read = io.poll_read_into(cx, &mut self.inp, usize::MAX);
        if self.inp.is_empty() {
            buffers::put(std::mem::take(&mut self.inp));
        }
        self.eof |= matches!(read, Poll::Ready(Ok(0)));
        read
    }

    /// Moves body bytes that are as long as they are (`Content-Length`) to `into`: from `inp`, then from the socket.
    fn poll_read_plain(
        &mut self,
        cx: &mut Context<'_>,
        into: &mut Vec<u8>,
        max: usize,
        left: u64,
    ) -> Poll<Result<usize>> {
        let max = max.min(usize::try_from(left).unwrap_or(usize::MAX));
        let n = if !self.unread().is_empty() {
            let n = self.unread().len().min(max);
            into.extend_from_slice(&self.inp[self.at..self.at + n]);
            self.at += n;
            n
        } else {
            into.reserve(max.min(buffers::SIZE));
            let read = match &mut self.io {
                Some(io) if !self.eof => io.poll_read_into(cx, into, max),
                _ => Poll::Ready(Ok(0)),
            };
            ready!(self.check_body_read(cx, read))?
        };
        self.received += n as u64;
        self.body = if n as u64 == left { BodyIn::Done } else { BodyIn::Length(left - n as u64) };
        Poll::Ready(Ok(n))
    }

    /// The same for a chunked body.
    fn poll_read_chunked(&mut self, cx: &mut Context<'_>, into: &mut Vec<u8>, max: usize) -> Poll<Result<usize>> {
        let mut taken = 0;
        loop {
            let BodyIn::Chunked(decoder) = &mut self.body else { return Poll::Ready(Ok(taken)) };
            let end = self.inp.len().min(self.at.saturating_add(max - taken));
            let found = decoder.next(&self.inp[self.at..end]);
            let found = found.map_err(|r| Error::client(Kind::Malformed).context(r.why))?;
            let used = match found {
                Chunked::Data { from, to } => {
                    into.extend_from_slice(&self.inp[self.at + from..self.at + to]);
                    taken += to - from;
                    to
                }
                Chunked::More => end - self.at,
                Chunked::Done { used } => {
                    self.body = BodyIn::Done;
                    used
                }
            };
            self.at += used;
            self.received += used as u64;
            if taken == max || (taken > 0 && self.unread().is_empty()) || matches!(found, Chunked::Done { .. }) {
                return self.count_body(taken);
            }
            if self.unread().is_empty() {
                let read = self.poll_fill(cx);
                ready!(self.check_body_read(cx, read))?;
            }
        }
    }

    /// `client_max_body_size` for a body that did not say its length.
    fn count_body(&mut self, n: usize) -> Poll<Result<usize>> {
        self.body_bytes += n as u64;
        let max = self.max_body;
        if max != 0 && self.body_bytes > max {
            return Poll::Ready(Err(Error::client(Kind::TooLarge).context("client sent too large chunked body")));
        }
        Poll::Ready(Ok(n))
    }

    /// A read of the body: its end came too early, or it takes too long.
    fn check_body_read(&mut self, cx: &Context<'_>, read: Poll<io::Result<usize>>) -> Poll<Result<usize>> {
        match read {
            Poll::Ready(Ok(0)) => Poll::Ready(Err(closed("client closed the connection before its body was whole"))),
            Poll::Ready(Ok(n)) => {
                self.read_limit.progress();
                Poll::Ready(Ok(n))
            }
            Poll::Ready(Err(e)) => Poll::Ready(Err(closed("read the client's body").cause(e))),
            Poll::Pending if self.read_limit.poll(cx, self.settings.body_timeout) => {
                Poll::Ready(Err(Error::client(Kind::ReadTimeout).context("client timed out sending its body")))
            }
            Poll::Pending => Poll::Pending,
        }
    }

    /// Queues `100 Continue` when the client waits for it, and sees that it leaves.
    fn poll_continue(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        if self.continues == Continue::Awaited {
            // After the final head it would be a second one. To a client that sends without waiting it is sent as nginx does.
            if self.body_out != BodyOut::NotStarted {
                self.continues = Continue::No;
                return Poll::Ready(Ok(()));
            }
            self.queue(b"HTTP/1.1 100 Continue\r\n\r\n");
            self.continues = Continue::Queued;
        }
        ready!(self.poll_flush(cx))?;
        self.continues = Continue::No;
        Poll::Ready(Ok(()))
    }

    fn queue(&mut self, bytes: &[u8]) {
        if self.out.capacity() == 0 {
            self.out = buffers::take();
        }
        self.out.extend_from_slice(bytes);
    }

    /// Writes what is queued and then `data`: how much of `data` was taken. Without data: until nothing is queued.
    fn poll_push(&mut self, cx: &mut Context<'_>, data: &[u8]) -> Poll<Result<usize>> {
        loop {
            let queued = &self.out[self.out_at..];
            if queued.is_empty() && data.is_empty() {
                return Poll::Ready(Ok(0));
            }
            let io = self.io.as_mut().ok_or_else(|| closed("the client's connection is gone"))?;
            let io = Pin::new(io);
            let written = match (queued.is_empty(), data.is_empty()) {
                (true, _) => io.poll_write(cx, data),
                (_, true) => io.poll_write(cx, queued),
                _ => io.poll_write_vectored(cx, &[IoSlice::new(queued), IoSlice::new(data)]),
            };
            let queued = queued.len();
            let n = match written {
                Poll::Ready(Ok(n)) if n > 0 => n,
                Poll::Ready(Ok(_)) => return Poll::Ready(Err(self.broken("client takes no more bytes"))),
                Poll::Ready(Err(e)) => return Poll::Ready(Err(self.broken("send to the client").cause(e))),
                Poll::Pending if self.write_limit.poll(cx, self.settings.send_timeout) => {
                    let late = Error::client(Kind::WriteTimeout).context("client timed out taking the response");
                    self.keep = false;
                    return Poll::Ready(Err(late));
                }
                Poll::Pending => return Poll::Pending,
            };
            self.write_limit.progress();
            self.sent += n as u64;
            if n < queued {
                self.out_at += n;
                continue;
            }
            self.out_at = 0;
            buffers::put(std::mem::take(&mut self.out));
            if n > queued || data.is_empty() {
                return Poll::Ready(Ok(n - queued));
            }
        }
    }

    /// Takes body bytes: small ones into the queue, large ones straight to the socket.
    fn poll_send(&mut self, cx: &mut Context<'_>, data: &[u8]) -> Poll<Result<usize>> {
        if data.len() >= DIRECT_MIN {
            return self.poll_push(cx, data);
        }
        if self.out.len() - self.out_at + data.len() > OUT_HIGH {
            ready!(self.poll_push(cx, &[]))?;
        }
        self.queue(data);
        Poll::Ready(Ok(data.len()))
    }

    /// Leaves the end of a response to the end of the worker's turn, where the connection goes on.
    fn send_later(&mut self, waker: &Waker) -> bool {
        let goes_on = self.keep && self.out_at == 0 && matches!(self.body, BodyIn::Done);
        let Some(Io::Tcp(socket)) = self.io.as_ref().filter(|_| goes_on && !self.out.is_empty()) else { return false };
        let taken = socket.stream().send_later(&self.out, Some(waker));
        if taken {
            self.sent += self.out.len() as u64;
            buffers::put(std::mem::take(&mut self.out));
            self.write_limit.progress();
        }
        taken
    }

    fn broken(&mut self, what: &'static str) -> Error {
        self.keep = false;
        self.eof = true;
        closed(what)
    }

    /// Whether the connection can serve another request, as far as that is known when the head is written.
    fn stays(&self) -> bool {
        let long = matches!(self.body, BodyIn::Length(n) if n > DISCARD_MAX);
        self.keep && !long && self.continues != Continue::Awaited && !self.drain.is_draining()
    }
}

fn closed(what: &'static str) -> Error {
    Error::client(Kind::Closed).context(what)
}

impl Drop for H1 {
    fn drop(&mut self) {
        buffers::put(std::mem::take(&mut self.inp));
        buffers::put(std::mem::take(&mut self.out));
    }
}

impl Client for H1 {
    fn limit_body(&mut self, max: u64) {
        self.max_body = self.settings.tighter(max);
    }

    fn poll_read_body(&mut self, cx: &mut Context<'_>, into: &mut Vec<u8>, max: usize) -> Poll<Result<usize>> {
        if max == 0 || matches!(self.body, BodyIn::Done) {
            return Poll::Ready(Ok(0));
        }
        if self.continues != Continue::No {
            ready!(self.poll_continue(cx))?;
        }
        let read = match self.body {
            BodyIn::Length(left) => self.poll_read_plain(cx, into, max, left),
            _ => self.poll_read_chunked(cx, into, max),
        };
        if let Poll::Ready(Err(_)) = read {
            self.keep = false;
        }
        read
    }

    fn start(&mut self, request: &Request, response: &Response, length: BodyLength) -> Result<()> {
        if self.body_out != BodyOut::NotStarted {
            return Err(Error::internal(Kind::Other).context("the response's head was sent before"));
        }
        let bodiless = request.is_head || matches!(response.status, 100..=199 | 204 | 304);
        let (length, body_out) = match length {
            BodyLength::Known(n) if bodiless => (Length::Claimed(n), BodyOut::None),
            BodyLength::None if bodiless => (Length::AsStands, BodyOut::None),
            BodyLength::Unknown if bodiless => (Length::AsStands, BodyOut::None),
            BodyLength::Known(n) => (Length::Claimed(n), BodyOut::Known(n)),
            // `None`: of a node that was asked with another method than the client's nothing comes, but plugins may add to it.
            BodyLength::Unknown | BodyLength::None if self.version == Version::Http10 => {
                (Length::Absent, BodyOut::UntilClose)
            }
            BodyLength::Unknown | BodyLength::None => (Length::Chunked, BodyOut::Chunked(0)),
        };
        self.keep = self.stays() && body_out != BodyOut::UntilClose && response.status != 101;
        if self.out.capacity() == 0 {
            self.out = buffers::take();
        }
        let closing = match (response.status, self.keep) {
            (101, _) => Closing::Upgrade,
            (_, true) => Closing::Stays,
            (_, false) => Closing::Closes,
        };
        self.keep &= answer::write_head(&mut self.out, response, length, closing);
        self.body_out = body_out;
        Ok(())
    }

    fn interim(&mut self, status: u16, headers: &Headers) -> Result<()> {
        // HTTP/1.0 knows none (RFC 9110, 15.2).
        if self.version != Version::Http10 && self.body_out == BodyOut::NotStarted {
            if self.out.capacity() == 0 {
                self.out = buffers::take();
            }
            answer::write_interim(&mut self.out, status, headers);
            if status == 100 && self.continues == Continue::Awaited {
                self.continues = Continue::Queued;
            }
        }
        Ok(())
    }

    fn limit_rate(&mut self, rate: u64, free: u64) {
        self.rate.set(rate, free);
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, data: &[u8]) -> Poll<Result<usize>> {
        if data.is_empty() {
            return Poll::Ready(Ok(0));
        }
        if self.rate.is_limited() {
            return self.poll_write_limited(cx, data);
        }
        self.poll_take(cx, data)
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        ready!(self.poll_push(cx, &[]))?;
        match &mut self.io {
            Some(io @ Io::Tls(_)) => match ready!(Pin::new(io).poll_flush(cx)) {
                Ok(()) => Poll::Ready(Ok(())),
                Err(e) => Poll::Ready(Err(self.broken("send to the client").cause(e))),
            },
            _ => Poll::Ready(Ok(())),
        }
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        match self.body_out {
            BodyOut::Known(left) if left > 0 => return Poll::Ready(Err(wrong("less body than Content-Length says"))),
            BodyOut::Chunked(left) if left > 0 => return Poll::Ready(Err(wrong("a chunk is not whole"))),
            BodyOut::NotStarted => return Poll::Ready(Err(wrong("no response to finish"))),
            BodyOut::Chunked(_) => self.queue(LAST_CHUNK),
            _ => {}
        }
        self.body_out = BodyOut::Ended;
        if self.send_later(cx.waker()) {
            return Poll::Ready(Ok(()));
        }
        self.poll_flush(cx)
    }

    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            // A client that sends far ahead is not looked at further: its bytes would have to be kept.
            if self.unread().len() >= buffers::SIZE {
                return Poll::Pending;
            }
            match ready!(self.poll_fill(cx)) {
                Ok(n) if n > 0 => {}
                _ => return Poll::Ready(()),
            }
        }
    }

    fn abort(&mut self) {
        self.keep = false;
        let Some(io) = self.io.take() else { return };
        // Of an earlier answer.
        io.stream().flush();
        // Where only the end of the connection ends the body, it must not look like one.
        if self.body_out == BodyOut::UntilClose {
            let _ = socket2::SockRef::from(io.stream().tcp()).set_linger(Some(Duration::ZERO));
        }
    }

    fn bytes_sent(&self) -> u64 {
        self.sent
    }

    fn body_received(&self) -> u64 {
        self.received
    }

    fn tcp_info(&self) -> Option<TcpInfo> {
        self.io.as_ref()?.tcp_info()
    }

    fn export_keying_material(
        &self,
        out: &mut [u8],
        label: &[u8],
        context: Option<&[u8]>,
    ) -> Option<std::result::Result<(), String>> {
        self.io.as_ref()?.export_keying_material(out, label, context)
    }

    fn as_any(&mut self) -> &mut dyn Any {
        self
    }
}

impl H1 {
    /// Takes body bytes into the framing that the response has.
    #[inline(always)]
    fn poll_take(&mut self, cx: &mut Context<'_>, data: &[u8]) -> Poll<Result<usize>> {
        match self.body_out {
            BodyOut::None => Poll::Ready(Ok(data.len())),
            BodyOut::UntilClose => self.poll_send(cx, data),
            BodyOut::Known(left) if left > 0 => {
                let len = data.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                let n = ready!(self.poll_send(cx, &data[..len]))?;
                self.body_out = BodyOut::Known(left - n as u64);
                Poll::Ready(Ok(n))
            }
            BodyOut::Chunked(left) => {
                let left = if left > 0 { left } else { self.open_chunk(data.len()) };
                let len = data.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                let n = ready!(self.poll_send(cx, &data[..len]))?;
                self.body_out = BodyOut::Chunked(left - n as u64);
                if n as u64 == left {
                    self.queue(b"\r\n");
                }
                Poll::Ready(Ok(n))
            }
            BodyOut::Known(_) => Poll::Ready(Err(wrong("more body than Content-Length says"))),
            BodyOut::NotStarted | BodyOut::Ended => Poll::Ready(Err(wrong("body outside of a response"))),
        }
    }

    /// Takes what the rate lets pass, once all that was taken before has left: the time that a client has to take bytes stands
    /// still while the rate holds them back.
    #[cold]
    fn poll_write_limited(&mut self, cx: &mut Context<'_>, data: &[u8]) -> Poll<Result<usize>> {
        if self.body_out == BodyOut::None {
            return Poll::Ready(Ok(data.len()));
        }
        ready!(self.poll_flush(cx))?;
        let most = ready!(self.rate.poll(cx, data.len()));
        let n = ready!(self.poll_take(cx, &data[..most]))?;
        self.rate.spend(n);
        Poll::Ready(Ok(n))
    }

    fn open_chunk(&mut self, len: usize) -> u64 {
        if self.out.capacity() == 0 {
            self.out = buffers::take();
        }
        write_chunk_size(len as u64, &mut self.out);
        self.body_out = BodyOut::Chunked(len as u64);
        len as u64
    }
}

fn wrong(what: &'static str) -> Error {
    Error::internal(Kind::Invalid).context(what)
}
