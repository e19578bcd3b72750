//! gRPC: requests over HTTP/2 to nodes of scheme `grpc` and `grpcs`, streamed both ways at once, with the trailers in which gRPC
//! says how a call has ended.
//!
//! The body is handed on as it comes, so a call goes to another node only as long as nothing of it was taken.

use std::{
    fs::File,
    future::poll_fn,
    io::Read,
    pin::{Pin, pin},
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, header};
use hyper::body::{Body, Incoming};

use super::{BodyFraming, Tries, Way, add_early, fail, poll_client, rescue};
use crate::{
    error::{Error, Kind, Origin, Result, Retry},
    exchange::{BodyLength, Exchange, Headers, RequestBody, Source},
    model::upstream::{Node, Upstream},
    plugin::{PhaseMask, output},
    proxy::{Proxy, head, upload::Upload},
    upstream::{
        self,
        h2::{self, Feed, Sender},
    },
};

/// Body bytes taken from the client, or from disk, in one piece.
const PIECE: usize = 16 * 1024;

/// Forwards the request and the response.
pub(super) async fn forward(p: &Proxy, x: &mut Exchange, conf: &Upstream) -> Result<()> {
    std::mem::swap(&mut x.response.headers, &mut x.response.early);
    // Only what is about nodes is asked of it.
    let (upload, _) = Upload::new(&RequestBody::None, false)?;
    let way = Way::new(p, x, conf, upload, BodyFraming::None);
    let mut tries = Tries::new(p, x, conf);
    let mut call = Call { way, feed: Feed::default(), given: Given::of(&x.body)?, taken: false };
    let (response, begun, _under_way) = loop {
        let (at, begun) = (tries.next(x, conf)?, tries.begun);
        match call.attempt(x, &conf.nodes[at], at, begun).await {
            Ok(response) => {
                let status = response.status().as_u16();
                break (response, begun, tries.reached(x, at, status));
            }
            Err(e) => {
                let may_repeat = tries.may_follow() && call.may_restart(&e);
                tries.failed(x, conf, at, e, may_repeat)?;
                call.restart(x)?;
            }
        }
    };
    let relayed = call.relay(x, response).await;
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
    given: Given,
    /// Something of the body has left the client, and is nowhere else.
    taken: bool,
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
            RequestBody::Lost => {
                let what = "the request body went to an upstream that failed, and is too long to be sent once more";
                return Err(Error::upstream(Kind::Other).context(what));
            }
        })
    }
}

impl Call<'_> {
    /// Whether another node, or another connection, may be asked: nothing was done, and all of the body is still there.
    fn may_restart(&self, e: &Error) -> bool {
        e.origin() == Origin::Upstream && e.retry_advice() == Retry::Safe && !self.taken
    }

    fn restart(&mut self, x: &Exchange) -> Result<()> {
        self.feed = Feed::default();
        self.given = Given::of(&x.body)?;
        Ok(())
    }

    /// One try at a node, to the response's head.
    async fn attempt(
        &mut self,
        x: &mut Exchange,
        node: &Node,
        at: usize,
        begun: Instant,
    ) -> Result<Response<Incoming>> {
        let addr = self.way.place::<false>(x, node, at, begun).await?;
        let reached = async {
            let (key, tls) = self.way.key(x, node, addr)?;
            let p = self.way.p;
            if let Some(sender) = p.http2.get(&key, begun) {
                note_connected(x, Duration::ZERO, true);
                let sent = self.send(x, sender, request(x, node, tls.is_some(), &self.feed)?).await;
                match sent {
                    // One that turns out to be closed does not count as a try.
                    Err(e) if self.may_restart(&e) => {
                        p.http2.forget(&key);
                        self.restart(x)?;
                    }
                    Err(e) => {
                        if e.kind() == Kind::ReadTimeout {
                            p.http2.forget(&key);
                        }
                        return Err(e);
                    }
                    sent => return sent,
                }
            }
            let stream = upstream::open(addr, None, &[], tls.as_ref(), self.way.times.connect).await?;
            let sender = h2::start(stream).await?;
            note_connected(x, begun.elapsed(), false);
            p.http2.put(key, &sender, begun);
            self.send(x, sender, request(x, node, tls.is_some(), &self.feed)?).await
        };
        match reached.await {
            Ok(response) => {
                if let Some(last) = x.upstream.tries.last_mut() {
                    last.status = response.status().as_u16();
                    last.header_time = Some(begun.elapsed());
                }
                Ok(response)
            }
            Err(e) => Err(fail(x, begun, e)),
        }
    }

    /// Sends the request, its body as far as it comes, and waits for the response's head.
    async fn send(
        &mut self,
        x: &mut Exchange,
        mut sender: Sender,
        request: Request<h2::Feeding>,
    ) -> Result<Response<Incoming>> {
        let doing = "reading response header from upstream";
        // Of a connection that was kept and is closed just now, nothing has left.
        if let Err(e) = sender.ready().await {
            let text = format!("upstream closed connection: {e} while sending request to upstream");
            return Err(Error::upstream(Kind::Closed).retry(Retry::Safe).context(text));
        }
        let mut response = pin!(sender.send_request(request));
        let mut late = pin!(tokio::time::sleep(self.way.times.read));
        poll_fn(|cx| {
            self.poll_give(cx, x)?;
            match response.as_mut().poll(cx) {
                Poll::Ready(Ok(response)) => return Poll::Ready(Ok(response)),
                Poll::Ready(Err(e)) => return Poll::Ready(Err(broken(&e, doing))),
                Poll::Pending => {}
            }
            if late.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Err(timed_out(doing)));
            }
            poll_client(cx, &mut x.client)
        })
        .await
    }

    /// Hands on of the body what there is and what the node has room for. Its time is the client's own to watch.
    fn poll_give(&mut self, cx: &mut Context<'_>, x: &mut Exchange) -> Result<()> {
        loop {
            match self.feed.poll_room(cx) {
                Poll::Pending => return Ok(()),
                // A node may answer without having read everything.
                Poll::Ready(false) => {
                    self.given = Given::Done;
                    return Ok(());
                }
                Poll::Ready(true) => {}
            }
            let piece = match self.poll_piece(cx, x) {
                Poll::Pending => return Ok(()),
                Poll::Ready(piece) => piece?,
            };
            match piece {
                Some(piece) => self.feed.give(piece),
                None => return Ok(()),
            }
        }
    }

    /// The next piece of the body; `None`: it has ended, which the node is told once.
    fn poll_piece(&mut self, cx: &mut Context<'_>, x: &mut Exchange) -> Poll<Result<Option<Bytes>>> {
        let mut piece = Vec::new();
        match &mut self.given {
            Given::Done => {}
            Given::Memory(bytes) => {
                let bytes = std::mem::take(bytes);
                if !bytes.is_empty() {
                    return Poll::Ready(Ok(Some(bytes)));
                }
            }
            Given::File(file) => {
                piece.resize(PIECE, 0);
                let n = file.read(&mut piece)?;
                piece.truncate(n);
            }
            Given::Client => {
                let Some(client) = &mut x.client else { return Poll::Ready(Err(Error::client(Kind::Closed))) };
                piece.reserve(PIECE);
                ready!(client.poll_read_body(cx, &mut piece, PIECE))?;
                self.taken |= !piece.is_empty();
            }
        }
        if !piece.is_empty() {
            return Poll::Ready(Ok(Some(piece.into())));
        }
        if matches!(x.body, RequestBody::Streaming { .. }) {
            x.body = RequestBody::Consumed;
        }
        self.given = Given::Done;
        self.feed.end();
        Poll::Ready(Ok(None))
    }

    /// The response, through the filters, to the client.
    async fn relay(&mut self, x: &mut Exchange, response: Response<Incoming>) -> Result<()> {
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
            self.relay_body(x, body).await?;
        }
        output::finish(x).await
    }

    async fn relay_body(&mut self, x: &mut Exchange, mut body: Incoming) -> Result<()> {
        let p = self.way.p;
        let mut late = pin!(tokio::time::sleep(self.way.times.read));
        loop {
            let frame = poll_fn(|cx| {
                self.poll_give(cx, x)?;
                match Pin::new(&mut body).poll_frame(cx) {
                    Poll::Ready(frame) => return Poll::Ready(Ok(frame)),
                    Poll::Pending => {}
                }
                if late.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(Err(timed_out("reading upstream")));
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
            late.as_mut().reset(tokio::time::Instant::now() + self.way.times.read);
            match frame.into_data() {
                Ok(data) => {
                    if let Some(last) = x.upstream.tries.last_mut() {
                        last.response_length += data.len() as u64;
                    }
                    x.chunk.data.clear();
                    x.chunk.data.extend_from_slice(&data);
                    x.chunk.eof = false;
                    output::chunk(x, &p.runner).await?;
                    // What a slow client took of the time is not the node's.
                    late.as_mut().reset(tokio::time::Instant::now() + self.way.times.read);
                }
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

fn timed_out(doing: &str) -> Error {
    let text = format!("upstream timed out (110: Connection timed out) while {doing}");
    Error::upstream(Kind::ReadTimeout).retry(Retry::Idempotent).context(text)
}

/// What hyper says of a stream or a connection that has failed.
fn broken(e: &hyper::Error, doing: &str) -> Error {
    let why = std::error::Error::source(e).map_or_else(|| e.to_string(), ToString::to_string);
    let text = format!("upstream rejected request or closed connection: {why} while {doing}");
    // A stream that the node has refused was not looked at (RFC 9113, 8.7).
    let retry = if e.is_canceled() { Retry::Safe } else { Retry::Idempotent };
    Error::upstream(Kind::Closed).retry(retry).context(text)
}
