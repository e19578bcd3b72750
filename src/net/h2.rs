//! HTTP/2 for clients: hyper's server, made to look like HTTP/1's `Client`.
//!
//! hyper owns the connection and asks a service for each stream's response; the service starts a task that runs the
//! handler and waits for the head. Task and hyper share a `Stream`, whose queue is bounded, so that a client that
//! does not read stops the handler. hyper refuses what breaks the protocol (pseudo-headers, connection fields, flow control,
//! floods of resets); what it lets through and HTTP/1 would refuse is refused here.

use std::{
    any::Any,
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::poll_fn,
    io::{self, IoSlice},
    pin::{Pin, pin},
    rc::{Rc, Weak},
    task::{Context, Poll, Waker, ready},
};

use bytes::{Buf, Bytes};
use http::{HeaderName, HeaderValue, header, request::Parts};
use hyper::{
    body::{Body, Frame, Incoming, SizeHint},
    server::conn::http2::Builder,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{Handler, Io, Server, Settings, h1::Limit, head, listener::Tls, rate::Rate};
use crate::{
    error::{Error, Kind, Result},
    exchange::{
        BodyLength, Client, Connection, Headers, LastHost, Request, RequestBody, Response, TcpInfo, Version,
        framing::{BodyFields, Refusal},
        status,
    },
};

/// What a client that knows we speak HTTP/2 starts with.
pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// nginx's `http2_max_concurrent_streams`.
pub(super) const MAX_STREAMS: u32 = 128;
/// Streams that a client may reset before they were looked at (CVE-2023-44487); then the connection is closed.
pub(super) const MAX_RESETS: usize = 20;
/// Request body bytes that a client may send ahead of who reads them, per stream and per connection.
pub(super) const STREAM_WINDOW: u32 = 128 * 1024;
const CONNECTION_WINDOW: u32 = 1024 * 1024;
/// Response bytes queued per stream, in the queue here and in hyper's.
const QUEUE_MAX: usize = 64 * 1024;

/// What the streams of a connection share.
struct Streams {
    conn: Rc<Connection>,
    tls: Option<Tls>,
    open: Cell<usize>,
    total: Cell<u64>,
    /// A client took no bytes of a stream for `send_timeout`. hyper sees that a stream is cut only when the client takes more
    /// of it, so the connection has to end.
    stalled: Cell<bool>,
    /// The connection that hyper reads and writes: gone when it is.
    io: Weak<RefCell<Io>>,
    /// Of the connection's task.
    waker: RefCell<Option<Waker>>,
}

/// The connection as hyper has it. What streams ask of it they ask between two of hyper's calls, on the same thread.
struct Shared(Rc<RefCell<Io>>);

impl AsyncRead for Shared {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_read(cx, buf)
    }
}

impl AsyncWrite for Shared {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_write(cx, data)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_write_vectored(cx, data)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.borrow().is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_shutdown(cx)
    }
}

impl Streams {
    fn changed(&self) {
        if let Some(waker) = self.waker.borrow_mut().take() {
            waker.wake();
        }
    }
}

pub(super) async fn serve<H: Handler>(server: &Rc<Server<H>>, io: Io, conn: Rc<Connection>, tls: Option<Tls>) {
    let io = Rc::new(RefCell::new(io));
    let streams = Rc::new(Streams {
        conn,
        tls,
        open: Cell::new(0),
        total: Cell::new(0),
        stalled: Cell::new(false),
        io: Rc::downgrade(&io),
        waker: RefCell::default(),
    });
    let service = service_fn(|request| answer(server.clone(), streams.clone(), request));
    let mut connection = pin!(builder(&server.settings).serve_connection(TokioIo::new(Shared(io)), service));
    let mut limit = Limit::new();
    let mut leaving = false;
    let ended = poll_fn(|cx| {
        *streams.waker.borrow_mut() = Some(cx.waker().clone());
        let idle = streams.open.get() == 0;
        if !idle {
            limit.progress();
        }
        let time = if leaving { server.settings.goodbye } else { server.settings.keepalive_timeout };
        // Asked in any case, since it also wakes us when a drain begins.
        let late = limit.poll(cx, time) && idle;
        if late && leaving {
            return Poll::Ready(Ok(()));
        }
        let worn = streams.total.get() >= server.settings.keepalive_requests;
        if !leaving && (late || worn || streams.stalled.get() || server.drain.is_draining()) {
            leaving = true;
            limit.progress();
            // From now on: a client that says nothing wakes nobody.
            limit.poll(cx, server.settings.goodbye);
            connection.as_mut().graceful_shutdown();
        }
        connection.as_mut().poll(cx)
    });
    if let Err(e) = ended.await {
        tracing::debug!("HTTP/2 connection of {}: {e}", streams.conn.peer.ip());
    }
}

fn builder(settings: &Settings) -> Builder<Local> {
    let mut builder = Builder::new(Local);
    builder
        .timer(TokioTimer::new())
        .auto_date_header(false)
        .max_concurrent_streams(MAX_STREAMS)
        .max_pending_accept_reset_streams(MAX_RESETS)
        .max_header_list_size(u32::try_from(settings.head.total).unwrap_or(u32::MAX))
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buf_size(QUEUE_MAX);
    builder
}

/// Runs hyper's stream tasks on this thread.
#[derive(Clone, Copy)]
struct Local;

impl<F: Future + 'static> hyper::rt::Executor<F> for Local {
    fn execute(&self, task: F) {
        tokio::task::spawn_local(async move {
            task.await;
        });
    }
}

/// One stream: starts the handler, waits for the head.
async fn answer<H: Handler>(
    server: Rc<Server<H>>,
    streams: Rc<Streams>,
    request: http::Request<Incoming>,
) -> Result<http::Response<Outgoing>, Cut> {
    streams.open.set(streams.open.get() + 1);
    streams.total.set(streams.total.get() + 1);
    let (parts, incoming) = request.into_parts();
    server.handler.expect(|| parts.uri.path().as_bytes());
    let mut x = server.pool.take(&streams.conn);
    x.request.nth = streams.total.get();
    let read = read_head(&parts, &x.conn.last_host, &mut x.request).and_then(|length| {
        if !server.settings.underscores {
            head::drop_underscored(&mut x);
        }
        if !incoming.is_end_stream() {
            x.body = RequestBody::Streaming { length };
        }
        match server.settings.max_body {
            max if max != 0 && length.is_some_and(|n| n > max) => {
                Err(Refusal::with(413, "client intended to send too large body"))
            }
            _ => Ok(()),
        }
    });
    let read = read.and_then(|()| streams.tls.as_ref().map_or(Ok(()), |tls| tls.check(&streams.conn, &x.request)));
    let stream = Rc::new(Stream::default());
    x.client = Some(Box::new(H2::new(incoming, stream.clone(), streams.clone(), server.settings)));
    let served = stream.clone();
    tokio::task::spawn_local(async move {
        let x = match read {
            Ok(()) => server.handler.handle(x).await,
            Err(refusal) => {
                x.response.status = refusal.status;
                server.handler.reject(x, refusal.why).await
            }
        };
        // Dropping the client here cuts a stream that was not ended.
        server.pool.put(x);
        if served.0.borrow().late {
            streams.stalled.set(true);
        }
        streams.open.set(streams.open.get() - 1);
        streams.changed();
    });
    let outgoing = Outgoing(stream);
    let head = poll_fn(|cx| outgoing.0.poll_head(cx)).await?;
    Ok(head.map(|()| outgoing))
}

/// The stream ends without a whole response.
#[derive(Debug)]
struct Cut;

impl std::fmt::Display for Cut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the response was cut")
    }
}

impl std::error::Error for Cut {}

/// Makes a stream's head a request, and says what `content-length` does.
fn read_head(parts: &Parts, last: &LastHost, request: &mut Request) -> Result<Option<u64>, Refusal> {
    request.version = Version::Http2;
    request.keep_alive = true;
    request.method.extend_from_slice(parts.method.as_str().as_bytes());
    request.is_head = parts.method == http::Method::HEAD;
    let target = parts.uri.path_and_query().map_or("", |p| p.as_str());
    request.target.extend_from_slice(target.as_bytes());
    let authority = parts.uri.authority().map(|a| a.as_str().as_bytes());
    if let Some(authority) = authority {
        request.headers.append("host", authority);
    }
    let body = read_fields(parts, authority, &mut request.headers)?;
    head::check_method(&request.method)?;
    head::split_target(request)?;
    let host = request.headers.get("host").ok_or(Refusal::bad("no Host"))?;
    head::name_of(host, last, &mut request.host)?;
    request.head_len = (request.method.len() + target.len() + request.headers.byte_len()) as u64;
    Ok(body.length())
}

fn read_fields(parts: &Parts, authority: Option<&[u8]>, headers: &mut Headers) -> Result<BodyFields, Refusal> {
    let mut body = BodyFields::default();
    let mut cookies: Vec<u8> = Vec::new();
    let mut hosts = 0;
    for (name, value) in &parts.headers {
        let value = value.as_bytes();
        match *name {
            header::CONNECTION | header::TRANSFER_ENCODING | header::UPGRADE => {
                return Err(Refusal::bad("connection-specific field in HTTP/2"));
            }
            // RFC 9113, 8.2.3: the crumbs of one field.
            header::COOKIE => {
                if !cookies.is_empty() {
                    cookies.extend_from_slice(b"; ");
                }
                cookies.extend_from_slice(value);
                continue;
            }
            header::HOST => {
                hosts += 1;
                let agrees = authority.is_none_or(|a| a.eq_ignore_ascii_case(value));
                if hosts > 1 || !agrees {
                    return Err(Refusal::bad("several Host"));
                }
                if authority.is_some() {
                    continue;
                }
            }
            header::EXPECT if !value.eq_ignore_ascii_case(b"100-continue") => {
                return Err(Refusal::with(417, "unknown expectation"));
            }
            header::CONTENT_LENGTH => body.content_length(value)?,
            _ => {}
        }
        headers.append(name.as_str(), value);
    }
    if !cookies.is_empty() {
        headers.append("cookie", &cookies);
    }
    Ok(body)
}

/// What the handler's task and hyper share. Each side wakes the other; both run on one thread.
#[derive(Default)]
struct Stream(RefCell<State>);

#[derive(Default)]
struct State {
    head: Option<http::Response<()>>,
    queue: VecDeque<Bytes>,
    queued: usize,
    /// Sent behind the body.
    trailers: Option<http::HeaderMap>,
    /// The body is whole.
    ended: bool,
    /// The handler cut the response.
    cut: bool,
    /// hyper lost interest: the client reset the stream or went away.
    gone: bool,
    /// It took too long to take what was sent.
    late: bool,
    hyper: Option<Waker>,
    handler: Option<Waker>,
}

impl Stream {
    /// Changes the state as the handler's side; wakes hyper's.
    fn give(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.0.borrow_mut();
        change(&mut state);
        let waker = state.hyper.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn poll_head(&self, cx: &Context<'_>) -> Poll<Result<http::Response<()>, Cut>> {
        let mut state = self.0.borrow_mut();
        if let Some(head) = state.head.take() {
            return Poll::Ready(Ok(head));
        }
        if state.cut {
            return Poll::Ready(Err(Cut));
        }
        state.hyper = Some(cx.waker().clone());
        Poll::Pending
    }
}

/// hyper's end of a stream. Dropped before the body's end: the client is gone.
struct Outgoing(Rc<Stream>);

impl Drop for Outgoing {
    fn drop(&mut self) {
        let mut state = self.0.0.borrow_mut();
        state.gone = true;
        let waker = state.handler.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl Body for Outgoing {
    type Data = Bytes;
    type Error = Cut;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Cut>>> {
        let mut state = self.0.0.borrow_mut();
        if state.cut {
            return Poll::Ready(Some(Err(Cut)));
        }
        if let Some(data) = state.queue.pop_front() {
            state.queued -= data.len();
            let waker = state.handler.take();
            drop(state);
            if let Some(waker) = waker {
                waker.wake();
            }
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        if state.ended {
            return Poll::Ready(state.trailers.take().map(|fields| Ok(Frame::trailers(fields))));
        }
        state.hyper = Some(cx.waker().clone());
        Poll::Pending
    }

    fn is_end_stream(&self) -> bool {
        let state = self.0.0.borrow();
        state.ended && state.queue.is_empty() && state.trailers.is_none() && !state.cut
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

/// A stream as the handler sees it.
struct H2 {
    incoming: Incoming,
    /// Received and not read yet.
    unread: Bytes,
    body_ended: bool,
    stream: Rc<Stream>,
    streams: Rc<Streams>,
    settings: Settings,
    read_limit: Limit,
    write_limit: Limit,
    started: bool,
    /// HEAD, 204, 304: what is written is dropped.
    bodiless: bool,
    /// What `Content-Length` still promises.
    left: Option<u64>,
    received: u64,
    /// What the body may have at most; 0: no bound.
    max_body: u64,
    rate: Rate,
    sent: u64,
}

impl H2 {
    fn new(incoming: Incoming, stream: Rc<Stream>, streams: Rc<Streams>, settings: Settings) -> Self {
        H2 {
            body_ended: incoming.is_end_stream(),
            incoming,
            unread: Bytes::new(),
            stream,
            streams,
            settings,
            read_limit: Limit::new(),
            write_limit: Limit::new(),
            started: false,
            bodiless: false,
            left: None,
            received: 0,
            max_body: settings.max_body,
            rate: Rate::default(),
            sent: 0,
        }
    }

    /// Fetches the next piece of the body into `unread`; `false` at the end.
    fn poll_fetch(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool>> {
        loop {
            match Pin::new(&mut self.incoming).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => {
                    self.read_limit.progress();
                    // Trailers are dropped, as with HTTP/1.
                    let Ok(data) = frame.into_data() else { continue };
                    if data.is_empty() {
                        continue;
                    }
                    self.received += data.len() as u64;
                    if self.max_body != 0 && self.received > self.max_body {
                        let late = Error::client(Kind::TooLarge).context("client sent too large body");
                        return Poll::Ready(Err(late));
                    }
                    self.unread = data;
                    return Poll::Ready(Ok(true));
                }
                Poll::Ready(Some(Err(e))) => {
                    return Poll::Ready(Err(Error::client(Kind::Closed).cause(e).context("read the client's body")));
                }
                Poll::Ready(None) => {
                    self.body_ended = true;
                    return Poll::Ready(Ok(false));
                }
                Poll::Pending if self.read_limit.poll(cx, self.settings.body_timeout) => {
                    let late = Error::client(Kind::ReadTimeout).context("client timed out sending its body");
                    return Poll::Ready(Err(late));
                }
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    /// Ready when at most `queued` bytes wait for hyper.
    fn poll_room(&mut self, cx: &mut Context<'_>, queued: usize) -> Poll<Result<()>> {
        let mut state = self.stream.0.borrow_mut();
        if state.queued <= queued {
            self.write_limit.progress();
            return Poll::Ready(Ok(()));
        }
        if state.gone {
            return Poll::Ready(Err(gone()));
        }
        state.handler = Some(cx.waker().clone());
        drop(state);
        if self.write_limit.poll(cx, self.settings.send_timeout) {
            self.stream.0.borrow_mut().late = true;
            let late = Error::client(Kind::WriteTimeout).context("client timed out taking the response");
            return Poll::Ready(Err(late));
        }
        Poll::Pending
    }

    /// How many of `len` bytes the rate lets pass, which are taken then, once hyper has all that came before: only that wait is
    /// the client's own.
    #[cold]
    fn poll_allowed(&mut self, cx: &mut Context<'_>, len: usize) -> Poll<Result<usize>> {
        ready!(self.poll_room(cx, 0))?;
        let Poll::Ready(allowed) = self.rate.poll(cx, len) else {
            // A client that goes away ends the wait.
            self.stream.0.borrow_mut().handler = Some(cx.waker().clone());
            return Poll::Pending;
        };
        self.rate.spend(allowed);
        Poll::Ready(Ok(allowed))
    }
}

fn gone() -> Error {
    Error::client(Kind::Closed).context("client reset the stream")
}

fn wrong(what: &'static str) -> Error {
    Error::internal(Kind::Invalid).context(what)
}

impl Drop for H2 {
    fn drop(&mut self) {
        self.abort();
    }
}

impl Client for H2 {
    fn limit_body(&mut self, max: u64) {
        self.max_body = self.settings.tighter(max);
    }

    fn poll_read_body(&mut self, cx: &mut Context<'_>, into: &mut Vec<u8>, max: usize) -> Poll<Result<usize>> {
        if max == 0 || (self.unread.is_empty() && (self.body_ended || !ready!(self.poll_fetch(cx))?)) {
            return Poll::Ready(Ok(0));
        }
        let n = self.unread.len().min(max);
        into.extend_from_slice(&self.unread[..n]);
        self.unread.advance(n);
        Poll::Ready(Ok(n))
    }

    fn start(&mut self, request: &Request, response: &Response, length: BodyLength) -> Result<()> {
        if self.started {
            return Err(Error::internal(Kind::Other).context("the response's head was sent before"));
        }
        self.started = true;
        let has_none = request.is_head || matches!(response.status, 100..=199 | 204 | 304);
        // Of a node that was asked with another method than the client's nothing comes, but plugins may add to it.
        let length = if length == BodyLength::None && !has_none { BodyLength::Unknown } else { length };
        self.bodiless = has_none;
        if let (false, BodyLength::Known(n)) = (self.bodiless, length) {
            self.left = Some(n);
        }
        let head = response_head(response, length, self.bodiless)?;
        self.sent += head.headers().iter().map(|(n, v)| n.as_str().len() + v.len()).sum::<usize>() as u64;
        let ended = self.bodiless || self.left == Some(0);
        self.stream.give(|s| {
            s.head = Some(head);
            s.ended = ended;
        });
        Ok(())
    }

    /// hyper's server sends none.
    fn interim(&mut self, _status: u16, _headers: &Headers) -> Result<()> {
        Ok(())
    }

    fn limit_rate(&mut self, rate: u64, free: u64) {
        self.rate.set(rate, free);
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, data: &[u8]) -> Poll<Result<usize>> {
        if data.is_empty() || self.bodiless {
            return Poll::Ready(Ok(data.len()));
        }
        if !self.started {
            return Poll::Ready(Err(wrong("body outside of a response")));
        }
        if self.stream.0.borrow().gone {
            return Poll::Ready(Err(gone()));
        }
        let most = self.left.map_or(QUEUE_MAX, |n| usize::try_from(n).unwrap_or(QUEUE_MAX));
        let most = data.len().min(QUEUE_MAX).min(most);
        if most == 0 {
            return Poll::Ready(Err(wrong("more body than Content-Length says")));
        }
        let taken = match self.rate.is_limited() {
            true => ready!(self.poll_allowed(cx, most))?,
            false => ready!(self.poll_room(cx, QUEUE_MAX - 1)).map(|()| most)?,
        };
        let data = &data[..taken];
        self.left = self.left.map(|n| n - data.len() as u64);
        self.sent += data.len() as u64;
        let ended = self.left == Some(0);
        self.stream.give(|s| {
            s.queue.push_back(Bytes::copy_from_slice(data));
            s.queued += data.len();
            s.ended = ended;
        });
        Poll::Ready(Ok(data.len()))
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.poll_room(cx, 0)
    }

    fn trailers(&mut self, fields: &Headers) {
        let mut map = http::HeaderMap::with_capacity(fields.len());
        for (name, value) in fields.iter() {
            if let Ok(name) = HeaderName::from_bytes(name) {
                map.append(name, field_value(value));
            }
        }
        self.stream.give(|s| s.trailers = Some(map));
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        if !self.started || self.left.is_some_and(|n| n > 0) {
            return Poll::Ready(Err(wrong("less body than Content-Length says")));
        }
        self.stream.give(|s| s.ended = true);
        self.poll_flush(cx)
    }

    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.stream.0.borrow_mut();
        if state.gone {
            return Poll::Ready(());
        }
        state.handler = Some(cx.waker().clone());
        Poll::Pending
    }

    fn abort(&mut self) {
        self.stream.give(|s| {
            if !s.ended {
                s.cut = true;
                s.queue.clear();
                s.queued = 0;
            }
        });
    }

    fn bytes_sent(&self) -> u64 {
        self.sent
    }

    fn body_received(&self) -> u64 {
        self.received
    }

    fn tcp_info(&self) -> Option<TcpInfo> {
        self.streams.io.upgrade()?.borrow().tcp_info()
    }

    fn export_keying_material(
        &self,
        out: &mut [u8],
        label: &[u8],
        context: Option<&[u8]>,
    ) -> Option<std::result::Result<(), String>> {
        self.streams.io.upgrade()?.borrow().export_keying_material(out, label, context)
    }

    fn as_any(&mut self) -> &mut dyn Any {
        self
    }
}

/// The head as hyper wants it, without what HTTP/2 does not have.
fn response_head(response: &Response, length: BodyLength, bodiless: bool) -> Result<http::Response<()>> {
    let mut head = http::Response::new(());
    *head.status_mut() = http::StatusCode::from_u16(response.status)
        .ok()
        .filter(|s| !s.is_informational())
        .ok_or_else(|| wrong("a status that HTTP/2 cannot send"))?;
    let headers = head.headers_mut();
    headers.reserve(response.headers.len() + 2);
    for (name, value) in response.headers.iter() {
        let Ok(name) = HeaderName::from_bytes(name) else { continue };
        if matches!(name, header::CONNECTION | header::TRANSFER_ENCODING | header::UPGRADE)
            || matches!(name.as_str(), "keep-alive" | "proxy-connection")
            || (name == header::CONTENT_LENGTH && !(bodiless && length != BodyLength::Unknown))
        {
            continue;
        }
        headers.append(name, field_value(value));
    }
    if let BodyLength::Known(n) = length
        && response.status != 204
    {
        headers.insert(header::CONTENT_LENGTH, n.into());
    }
    if !headers.contains_key(header::DATE) {
        headers.insert(header::DATE, field_value(&status::date()));
    }
    Ok(head)
}

/// As with HTTP/1, a line break in a value becomes a space.
fn field_value(value: &[u8]) -> HeaderValue {
    HeaderValue::from_bytes(value).unwrap_or_else(|_| {
        let clean: Vec<u8> =
            value.iter().map(|b| if *b == b'\t' || (*b >= b' ' && *b != 0x7f) { *b } else { b' ' }).collect();
        HeaderValue::from_bytes(&clean).unwrap_or(HeaderValue::from_static(""))
    })
}

/// Whether the handshake agreed on HTTP/2.
pub(super) fn agreed(io: &Io) -> bool {
    matches!(io, Io::Tls(stream) if stream.get_ref().1.alpn_protocol() == Some(b"h2"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(request: http::request::Builder) -> Result<Request, u16> {
        let (parts, ()) = request.body(()).unwrap().into_parts();
        let mut got = Request::default();
        read_head(&parts, &LastHost::default(), &mut got).map(|_| got).map_err(|r| r.status)
    }

    fn get(uri: &str) -> http::request::Builder {
        http::Request::get(uri)
    }

    #[test]
    fn a_stream_becomes_a_request() {
        let r = get("https://A.example:1/x%20/../y?q")
            .header("cookie", "a=1")
            .header("x", "1")
            .header("cookie", "b=2")
            .header("host", "a.example:1");
        let r = read(r).unwrap();
        assert_eq!((&r.target[..], &r.path[..], &r.args[..]), (&b"/x%20/../y?q"[..], &b"/y"[..], &b"q"[..]));
        assert_eq!(r.host, b"a.example");
        let fields: Vec<_> = r.headers.iter().collect();
        let want: &[(&[u8], &[u8])] = &[(b"host", b"A.example:1"), (b"x", b"1"), (b"cookie", b"a=1; b=2")];
        assert_eq!(fields, want);
        assert_eq!(read(get("/").header("host", "b")).unwrap().host, b"b");
    }

    #[test]
    fn refuses_what_http_1_would() {
        let cases = [
            (get("/"), 400),
            (get("https://a/").header("host", "b"), 400),
            (get("/").header("host", "a").header("host", "a"), 400),
            (get("/").header("host", "a b"), 400),
            (get("https://a/%00"), 400),
            (get("https://a/../.."), 400),
            (get("https://a/").header("connection", "close"), 400),
            (get("https://a/").header("transfer-encoding", "chunked"), 400),
            (get("https://a/").header("content-length", "1").header("content-length", "2"), 400),
            (get("https://a/").header("expect", "x"), 417),
            (get("https://a/").method("TRACE"), 405),
            (get("https://a/").method("get"), 400),
        ];
        for (request, status) in cases {
            let text = format!("{request:?}");
            assert_eq!(read(request).map(|_| ()), Err(status), "{text}");
        }
    }

    #[test]
    fn a_response_head_has_nothing_of_the_connection() {
        let mut response = Response { status: 200, ..Response::default() };
        for (name, value) in
            [("Connection", "close"), ("Transfer-Encoding", "chunked"), ("X", "a\r\nb"), ("Content-Length", "9")]
        {
            response.headers.append(name, value);
        }
        let head = response_head(&response, BodyLength::Known(3), false).unwrap();
        assert_eq!(head.headers()["x"], "a  b");
        assert_eq!(head.headers()["content-length"], "3");
        assert_eq!(head.headers().len(), 3);
        response.status = 101;
        assert!(response_head(&response, BodyLength::None, true).is_err());
    }
}
