//! gRPC: requests over HTTP/2 to nodes of scheme `grpc` and `grpcs`, streamed both ways at once, with the trailers in which gRPC
//! says how a call has ended.
//!
//! The body is handed on as it comes. A call goes to another connection or node only where the first has not looked at it, and where
//! what has left the client by then was little enough to be kept.

use std::{
    fs::File,
    future::poll_fn,
    io::Read,
    net::SocketAddr,
    pin::{Pin, pin},
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, header};
use hyper::body::{Body, Incoming};
use tokio::time::Sleep;

use super::{BodyFraming, Tries, Way, add_early, fail, poll_client, rescue};
use crate::{
    error::{Error, Kind, Origin, Result, Retry},
    exchange::{BodyLength, Exchange, Headers, RequestBody, Source},
    model::upstream::{Node, Upstream},
    plugin::{PhaseMask, output},
    proxy::{
        Proxy, head,
        upload::{REPLAY_MAX, Upload},
    },
    upstream::{
        self, Key, Tls,
        h2::{self, Feed, Lease},
    },
};

/// Body bytes taken from the client, or from disk, in one piece.
const PIECE: usize = 16 * 1024;
/// Pieces kept, of `REPLAY_MAX` bytes in all: small messages of a stream would cost more than their bytes.
const KEPT_PIECES: usize = 64;

/// Forwards the request and the response.
pub(super) async fn forward(p: &Proxy, x: &mut Exchange, conf: &Upstream) -> Result<()> {
    std::mem::swap(&mut x.response.headers, &mut x.response.early);
    // Only what is about nodes is asked of it.
    let (upload, _) = Upload::new(&RequestBody::None, false)?;
    let way = Way::new(p, x, conf, upload, BodyFraming::None);
    let mut tries = Tries::new(p, x, conf);
    let mut call = Call { way, feed: Feed::default(), unwanted: false, given: Given::of(&x.body)?, kept: Kept::of(x) };
    let (answered, begun, _under_way) = loop {
        let (at, begun) = (tries.next(x, conf)?, tries.begun);
        match call.attempt(x, &conf.nodes[at], at, begun).await {
            Ok(answered) => {
                let status = answered.response.status().as_u16();
                break (answered, begun, tries.reached(x, at, status));
            }
            Err(e) => {
                let may_repeat = tries.may_follow() && call.may_restart(&e);
                tries.failed(x, conf, at, e, may_repeat)?;
                call.restart(x)?;
            }
        }
    };
    let relayed = call.relay(x, answered).await;
    if let Some(last) = x.upstream.tries.last_mut() {
        last.response_time = Some(begun.elapsed());
        last.bytes_received = last.response_length;
    }
    relayed
}

/// One call.
struct Call<'a> {
    way: Way<'a>,
    feed: Feed,
    /// The node takes no more of the body.
    unwanted: bool,
    given: Given,
    kept: Kept,
}

/// A node's answer, and its place on the connection for as long as it comes.
struct Answered {
    response: Response<Incoming>,
    lease: Lease,
}

/// Where the rest of the request's body is.
enum Given {
    Done,
    Client,
    Memory(Bytes),
    File(File),
}

impl Given {
    fn of(body: &RequestBody) -> Result<Given> {
        Ok(match body {
            RequestBody::None | RequestBody::Consumed | RequestBody::Forgone => Given::Done,
            RequestBody::Streaming { .. } => Given::Client,
            RequestBody::Memory(bytes) => Given::Memory(bytes.clone()),
            RequestBody::File { path, .. } => {
                let file = File::open(&**path).map_err(|e| {
                    Error::internal(Kind::Io).cause(e).context(format!("request body in {}", path.display()))
                })?;
                Given::File(file)
            }
            RequestBody::Lost => return Err(RequestBody::unsendable()),
        })
    }
}

/// What has left the client, should the call have to begin anew.
enum Kept {
    /// The body is not the client's to give: all of it stays where it is.
    Elsewhere,
    /// All of it so far, of so many bytes.
    All(Vec<Bytes>, usize),
    /// It was more than is kept.
    Lost,
}

impl Kept {
    fn of(x: &Exchange) -> Kept {
        match x.body {
            RequestBody::Streaming { .. } => Kept::All(Vec::new(), 0),
            _ => Kept::Elsewhere,
        }
    }

    fn add(&mut self, piece: &Bytes) {
        let Kept::All(pieces, length) = self else { return };
        *length += piece.len();
        // Pieces are small where the client sends small ones.
        if *length > REPLAY_MAX || pieces.len() == KEPT_PIECES {
            *self = Kept::Lost;
        } else {
            pieces.push(piece.clone());
        }
    }
}

impl Call<'_> {
    /// Whether another node, or another connection, may be asked: nothing was done, and all of the body is still there.
    fn may_restart(&self, e: &Error) -> bool {
        e.origin() == Origin::Upstream && e.retry_advice() == Retry::Safe && !matches!(self.kept, Kept::Lost)
    }

    fn restart(&mut self, x: &Exchange) -> Result<()> {
        self.feed = Feed::default();
        self.unwanted = false;
        let Kept::All(pieces, _) = &self.kept else {
            self.given = Given::of(&x.body)?;
            return Ok(());
        };
        pieces.iter().for_each(|piece| self.feed.give(piece.clone()));
        if matches!(self.given, Given::Done) {
            self.feed.end();
        }
        Ok(())
    }

    /// One try at a node, to the response's head.
    async fn attempt(&mut self, x: &mut Exchange, node: &Node, at: usize, begun: Instant) -> Result<Answered> {
        let addr = self.way.place::<false>(x, node, at, begun).await?;
        match self.ask(x, node, addr, begun).await {
            Ok(answered) => {
                if let Some(last) = x.upstream.tries.last_mut() {
                    last.status = answered.response.status().as_u16();
                    last.header_time = Some(begun.elapsed());
                }
                Ok(answered)
            }
            Err(e) => Err(fail(x, begun, e)),
        }
    }

    /// Asks by one connection, and by another one where the first was closed just now or its node has refused the stream there: that
    /// does not count as a try.
    async fn ask(&mut self, x: &mut Exchange, node: &Node, addr: SocketAddr, begun: Instant) -> Result<Answered> {
        let (key, tls) = self.way.key(x, node, addr).await?;
        let lease = self.lease(x, key, tls.as_ref(), None).await?;
        note_connected(x, if lease.reused { Duration::ZERO } else { begun.elapsed() }, lease.reused);
        match self.send(x, &lease, request(x, node, tls.is_some(), &self.feed)?).await {
            Ok(response) => return Ok(Answered { response, lease }),
            Err(e) if self.may_restart(&e) => self.restart(x)?,
            Err(e) => return Err(e),
        }
        let lease = self.lease(x, key, tls.as_ref(), Some(&lease)).await?;
        note_connected(x, if lease.reused { Duration::ZERO } else { begun.elapsed() }, lease.reused);
        let response = self.send(x, &lease, request(x, node, tls.is_some(), &self.feed)?).await?;
        Ok(Answered { response, lease })
    }

    /// A place on a connection, as long as the client waits for it.
    async fn lease(&self, x: &mut Exchange, key: Key, tls: Option<&Tls>, not: Option<&Lease>) -> Result<Lease> {
        let patience = self.way.times.connect;
        let open = async || upstream::open(key.addr, None, &[], tls, patience).await;
        let mut lease = pin!(self.way.p.http2.lease(key, patience, not, open));
        poll_fn(|cx| match lease.as_mut().poll(cx) {
            Poll::Pending => poll_client(cx, &mut x.client),
            leased => leased,
        })
        .await
    }

    /// Sends the request, its body as far as it comes, and waits for the response's head.
    async fn send(
        &mut self,
        x: &mut Exchange,
        lease: &Lease,
        request: Request<h2::Feeding>,
    ) -> Result<Response<Incoming>> {
        let doing = "reading response header from upstream";
        let mut sender = lease.sender();
        // Of a connection that was kept and is closed just now, nothing has left.
        if let Err(e) = sender.ready().await {
            let text = format!("upstream closed connection: {e} while sending request to upstream");
            return Err(Error::upstream(Kind::Closed).retry(Retry::Safe).context(text));
        }
        let mut response = pin!(sender.send_request(request));
        let mut patience = pin!(Patience::new());
        let mut limit = None;
        poll_fn(|cx| {
            self.poll_give(cx, x)?;
            match response.as_mut().poll(cx) {
                Poll::Ready(Ok(response)) => return Poll::Ready(Ok(response)),
                Poll::Ready(Err(e)) => return Poll::Ready(Err(broken(&e, doing))),
                Poll::Pending => {}
            }
            let before = std::mem::replace(&mut limit, self.limit(cx));
            if before != limit {
                patience.as_mut().reset();
            }
            if let Some(limit) = limit
                && patience.as_mut().poll(cx, limit.time(&self.way), self.feed.moved())
            {
                lease.gave_up();
                return Poll::Ready(Err(limit.error(doing)));
            }
            poll_client(cx, &mut x.client)
        })
        .await
    }

    /// What the node's time is limited by, until its response begins. `None`: the client has the next word, and a limit of its own.
    fn limit(&self, cx: &Context<'_>) -> Option<Limit> {
        let has_all = matches!(self.given, Given::Done) || self.unwanted;
        match self.feed.poll_taken(cx) {
            Poll::Ready(()) => has_all.then_some(Limit::Read),
            Poll::Pending => Some(Limit::Send),
        }
    }

    /// Hands on of the body what there is and what the node has room for. Its time is the client's own to watch.
    fn poll_give(&mut self, cx: &mut Context<'_>, x: &mut Exchange) -> Result<()> {
        while !self.unwanted && !matches!(self.given, Given::Done) {
            match self.feed.poll_room(cx) {
                Poll::Pending => return Ok(()),
                // A node may answer without having read everything.
                Poll::Ready(false) => self.unwanted = true,
                Poll::Ready(true) => match self.poll_piece(cx, x) {
                    Poll::Pending => return Ok(()),
                    Poll::Ready(piece) => piece?,
                },
            }
        }
        if !self.feed.has_ended() && matches!(self.given, Given::Done) {
            self.feed.end();
        }
        Ok(())
    }

    /// Hands on the next piece of the body.
    fn poll_piece(&mut self, cx: &mut Context<'_>, x: &mut Exchange) -> Poll<Result<()>> {
        let piece = match &mut self.given {
            Given::Done => Bytes::new(),
            Given::Memory(bytes) => bytes.split_to(bytes.len().min(PIECE)),
            Given::File(file) => {
                let mut piece = vec![0; PIECE];
                let n = file.read(&mut piece)?;
                piece.truncate(n);
                piece.into()
            }
            Given::Client => {
                let Some(client) = &mut x.client else { return Poll::Ready(Err(Error::client(Kind::Closed))) };
                let mut piece = Vec::with_capacity(PIECE);
                ready!(client.poll_read_body(cx, &mut piece, PIECE))?;
                piece.shrink_to_fit();
                let piece = Bytes::from(piece);
                self.kept.add(&piece);
                piece
            }
        };
        if !piece.is_empty() {
            self.feed.give(piece);
            return Poll::Ready(Ok(()));
        }
        if matches!(x.body, RequestBody::Streaming { .. }) {
            x.body = RequestBody::Consumed;
        }
        self.given = Given::Done;
        Poll::Ready(Ok(()))
    }

    /// The response, through the filters, to the client.
    async fn relay(&mut self, x: &mut Exchange, Answered { response, lease }: Answered) -> Result<()> {
        let p = self.way.p;
        let (parts, body) = response.into_parts();
        x.response.status = parts.status.as_u16();
        x.response.source = Source::Upstream;
        take_fields(&parts.headers, &mut x.response.headers);
        if p.runner.mask(x) != PhaseMask::default() {
            x.upstream.headers.clone_from(&x.response.headers);
        }
        x.response.headers.set_sound(b"Server", p.settings.server.as_bytes());
        add_early(&mut x.response);
        rescue::upstream_status(p, x);
        output::filter_head(x, &p.runner).await?;
        let length = match output::remaining_length(x) {
            // Trailers alone: the stream ends with its head.
            BodyLength::Known(0) => BodyLength::Unknown,
            length => length,
        };
        output::send_head(x, length)?;
        if !x.header_only {
            self.relay_body(x, body, &lease).await?;
        }
        output::finish(x).await
    }

    async fn relay_body(&mut self, x: &mut Exchange, mut body: Incoming, lease: &Lease) -> Result<()> {
        let p = self.way.p;
        let mut patience = pin!(Patience::new());
        loop {
            patience.as_mut().reset();
            let frame = poll_fn(|cx| {
                self.poll_give(cx, x)?;
                match Pin::new(&mut body).poll_frame(cx) {
                    Poll::Ready(frame) => return Poll::Ready(Ok(frame)),
                    Poll::Pending => {}
                }
                if patience.as_mut().poll(cx, self.way.times.read, self.feed.moved()) {
                    lease.gave_up();
                    return Poll::Ready(Err(Limit::Read.error("reading upstream")));
                }
                if let Some(client) = &mut x.client
                    && let Poll::Ready(Err(e)) = client.poll_flush(cx)
                {
                    return Poll::Ready(Err(e));
                }
                poll_client(cx, &mut x.client)
            });
            let frame = match frame.await? {
                None => break,
                Some(frame) => frame.map_err(|e| broken(&e, "reading upstream"))?,
            };
            lease.answered();
            match frame.into_data() {
                Ok(data) => self.relay_data(x, &data).await?,
                Err(frame) => {
                    if let (Ok(fields), Some(client)) = (frame.into_trailers(), &mut x.client) {
                        let mut trailers = Headers::new();
                        take_fields(&fields, &mut trailers);
                        client.trailers(&trailers);
                    }
                }
            }
        }
        x.chunk.data.clear();
        x.chunk.eof = true;
        output::chunk(x, &p.runner).await
    }

    /// A piece of the response, as fast as the client takes it. What the client sends meanwhile goes on to the node.
    async fn relay_data(&mut self, x: &mut Exchange, data: &Bytes) -> Result<()> {
        if let Some(last) = x.upstream.tries.last_mut() {
            last.response_length += data.len() as u64;
        }
        x.chunk.data.clear();
        x.chunk.data.extend_from_slice(data);
        x.chunk.eof = false;
        output::filter(x, &self.way.p.runner).await?;
        let mut sent = 0;
        poll_fn(|cx| {
            while sent < x.chunk.data.len() {
                let Some(client) = &mut x.client else { return Poll::Ready(Err(Error::client(Kind::Closed))) };
                let Poll::Ready(n) = client.poll_write(cx, &x.chunk.data[sent..]) else {
                    return self.poll_give(cx, x).map_or_else(|e| Poll::Ready(Err(e)), |()| Poll::Pending);
                };
                let n = n?;
                sent += n;
                x.body_bytes_sent += n as u64;
            }
            Poll::Ready(Ok(()))
        })
        .await
    }
}

/// Which of a node's times is over.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Limit {
    /// It takes nothing.
    Send,
    /// It has got everything, and says nothing.
    Read,
}

impl Limit {
    fn time(self, way: &Way<'_>) -> Duration {
        match self {
            Limit::Send => way.times.send,
            Limit::Read => way.times.read,
        }
    }

    fn error(self, doing: &str) -> Error {
        let (kind, doing) = match self {
            Limit::Send => (Kind::WriteTimeout, "sending request to upstream"),
            Limit::Read => (Kind::ReadTimeout, doing),
        };
        let text = format!("upstream timed out (110: Connection timed out) while {doing}");
        Error::upstream(kind).retry(Retry::Idempotent).context(text)
    }
}

/// How long a node has neither taken nor given anything.
struct Patience {
    since: tokio::time::Instant,
    timer: Pin<Box<Sleep>>,
}

impl Patience {
    fn new() -> Self {
        let since = tokio::time::Instant::now();
        Patience { since, timer: Box::pin(tokio::time::sleep_until(since)) }
    }

    /// The node has given something, or what was waited for was not it.
    fn reset(mut self: Pin<&mut Self>) {
        self.since = tokio::time::Instant::now();
    }

    /// Whether the time is over. `moved`: when the node last took something.
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>, limit: Duration, moved: Option<Instant>) -> bool {
        let since = moved.map_or(self.since, |moved| self.since.max(moved.into()));
        let end = since + limit;
        if self.timer.deadline() != end {
            self.timer.as_mut().reset(end);
        }
        self.timer.as_mut().poll(cx).is_ready()
    }
}

fn note_connected(x: &mut Exchange, time: Duration, reused: bool) {
    if let Some(last) = x.upstream.tries.last_mut() {
        last.connect_time = Some(time);
        last.reused = reused;
    }
}

/// The request's head as it is written for HTTP/1, made one of HTTP/2.
fn request(x: &Exchange, node: &Node, tls: bool, feed: &Feed) -> Result<Request<h2::Feeding>> {
    let unsound = |what: &'static str| Error::script(what).context("the request's head to a gRPC upstream");
    let mut text = Vec::new();
    head::write(x, node, BodyFraming::None, false, &mut text)?;
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut parsed = httparse::Request::new(&mut fields);
    match parsed.parse(&text) {
        Ok(httparse::Status::Complete(_)) => {}
        _ => return Err(unsound("it is malformed, or has too many fields")),
    }
    let (Some(method), Some(target)) = (parsed.method, parsed.path) else { return Err(unsound("it is malformed")) };
    let host = parsed.headers.iter().find(|f| f.name.eq_ignore_ascii_case("host"));
    let authority = host.map(|f| String::from_utf8_lossy(f.value)).unwrap_or_default();
    let scheme = if tls { "https" } else { "http" };
    let mut request = Request::builder()
        .method(method)
        .uri(format!("{scheme}://{authority}{target}"))
        .body(feed.body())
        .map_err(|_| unsound("its method, path or host cannot be sent over HTTP/2"))?;
    let headers = request.headers_mut();
    for field in parsed.headers.iter().filter(|f| !f.name.eq_ignore_ascii_case("host")) {
        if let (Ok(name), Ok(value)) =
            (HeaderName::from_bytes(field.name.as_bytes()), HeaderValue::from_bytes(field.value))
        {
            headers.append(name, value);
        }
    }
    Ok(request)
}

/// Fields of a request: what a client may send, and what is added.
const MAX_FIELDS: usize = 256;

/// Takes over what is not the connection's own.
fn take_fields(from: &HeaderMap, into: &mut Headers) {
    into.clear();
    for (name, value) in from {
        let withheld = matches!(*name, header::CONNECTION | header::TRANSFER_ENCODING | header::UPGRADE | header::TE)
            || matches!(name.as_str(), "keep-alive" | "proxy-connection" | "x-accel-expires" | "x-accel-redirect");
        if !withheld {
            into.append(name.as_str(), value.as_bytes());
        }
    }
}

/// What hyper says of a stream or a connection that has failed.
fn broken(e: &hyper::Error, doing: &str) -> Error {
    let why = std::error::Error::source(e).map_or_else(|| e.to_string(), ToString::to_string);
    let text = format!("upstream rejected request or closed connection: {why} while {doing}");
    let retry = if h2::is_untouched(e) { Retry::Safe } else { Retry::Idempotent };
    Error::upstream(Kind::Closed).retry(retry).context(text)
}
