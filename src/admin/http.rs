//! The HTTP side of the Admin and control APIs: accept, read a bounded body, answer JSON.
//!
//! Runs on the control thread; handlers need not be `Send`.

use std::{
    borrow::Cow, cell::RefCell, convert::Infallible, future::Future, net::IpAddr, pin::pin, rc::Rc, sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, header, request::Parts};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    time::{sleep, timeout},
};

use super::{
    settings::Role,
    tls::{self, Tls},
};

/// Wait after `accept` failed (out of descriptors), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const JSON: &str = "application/json";

/// What one server takes and waits for.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    /// Connections served at once: an operator's tools and a console, not traffic.
    pub connections: usize,
    /// How long a client may take to send a request's head, then its body.
    pub head_patience: Duration,
    pub body_patience: Duration,
    /// How long a drain waits for requests in flight.
    pub drain_patience: Duration,
    /// What is read of a body that is too long, so that its client reads the refusal: more than anyone sends by mistake.
    pub discard: usize,
}

pub(super) const LIMITS: Limits = Limits {
    connections: 256,
    head_patience: Duration::from_secs(30),
    body_patience: Duration::from_secs(60),
    drain_patience: Duration::from_secs(10),
    discard: 256 << 20,
};

/// A request with its body read.
pub struct Call {
    pub method: Method,
    /// Without query, as sent.
    pub path: String,
    /// Behind the question mark, as sent.
    pub args: String,
    /// Decoded, in order.
    pub query: Vec<(String, String)>,
    pub headers: HeaderMap,
    pub body: Bytes,
    /// Whose key came with it; `None`: no key was asked for.
    pub role: Option<Role>,
}

impl Call {
    pub fn arg(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    /// `?name=true` or `?name=false`, the latter when it is not there. What else is said, in another spelling or twice, is refused: whoever
    /// says so did not mean nothing by it.
    pub fn switch(&self, name: &str) -> Result<bool, Answer> {
        let mut said = self.query.iter().filter(|(given, _)| letters(given).eq(letters(name)));
        match (said.next(), said.next()) {
            (None, _) => Ok(false),
            (Some((given, value)), None) if given == name && matches!(value.as_str(), "true" | "false") => {
                Ok(value == "true")
            }
            _ => Err(Answer::refuse(400, format!("invalid argument {name}: should be true or false"))),
        }
    }

    /// `?force=true`: the caller knows what depends on it.
    pub fn forces(&self) -> bool {
        self.arg("force") == Some("true")
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|v| v.to_str().ok())
    }
}

/// What is left of `Dry-Run` and `dry_run` alike.
fn letters(name: &str) -> impl Iterator<Item = u8> {
    name.bytes().filter(|b| !b"-_".contains(b)).map(|b| b.to_ascii_lowercase())
}

/// What is answered.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub body: Bytes,
    content_type: Cow<'static, str>,
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl Answer {
    pub fn json(status: u16, value: &Value) -> Answer {
        Answer::json_text(status, value.to_string())
    }

    /// JSON that is text already.
    pub fn json_text(status: u16, text: impl Into<Bytes>) -> Answer {
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Answer { status, body: text.into(), content_type: JSON.into(), headers: Vec::new() }
    }

    pub fn text(status: u16, text: impl Into<Bytes>) -> Answer {
        Answer::of_type(status, "text/plain", text)
    }

    /// Of any type.
    pub fn of_type(status: u16, content_type: impl Into<Cow<'static, str>>, body: impl Into<Bytes>) -> Answer {
        Answer { content_type: content_type.into(), ..Answer::json_text(status, body) }
    }

    pub fn yaml(status: u16, text: impl Into<Bytes>) -> Answer {
        Answer::of_type(status, "application/yaml", text)
    }

    pub fn html(status: u16, text: impl Into<Bytes>) -> Answer {
        Answer::of_type(status, "text/html", text)
    }

    /// `{"error_msg": …}`.
    pub fn refuse(status: u16, text: impl AsRef<str>) -> Answer {
        Answer::json(status, &json!({ "error_msg": text.as_ref() }))
    }

    pub fn header(mut self, name: &'static str, value: &str) -> Answer {
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.push((HeaderName::from_static(name), value));
        }
        self
    }

    /// The same headers on another answer.
    pub fn with_json(self, status: u16, value: &Value) -> Answer {
        Answer { headers: self.headers, ..Answer::json(status, value) }
    }

    /// JSON ends with a line feed, as APISIX's answers do.
    fn into_response(self) -> Response<Full<Bytes>> {
        let body = match &*self.content_type {
            JSON if !self.body.is_empty() && !self.body.ends_with(b"\n") => [&self.body, &b"\n"[..]].concat().into(),
            _ => self.body,
        };
        let mut response = Response::new(Full::new(body));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        let plain = HeaderValue::from_static("text/plain");
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_str(&self.content_type).unwrap_or(plain));
        headers.extend(self.headers);
        response
    }
}

/// A request before its body is read.
pub struct Incomplete {
    pub head: Parts,
    pub peer: IpAddr,
    body: RefCell<Option<Incoming>>,
    limits: Limits,
}

impl Incomplete {
    /// Reads the body, at most `limit` bytes of it.
    pub async fn complete(self, limit: usize) -> Result<Call, Answer> {
        let length = self.head.headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<usize>().ok());
        let body = match (self.body.into_inner(), length.filter(|length| *length > limit)) {
            (Some(mut body), Some(length)) => {
                // A client that asks first has sent nothing yet.
                if !self.head.headers.contains_key(header::EXPECT) {
                    discard(&mut body, &self.limits).await;
                }
                return Err(too_large(length, limit));
            }
            (Some(body), None) => read(body, limit, &self.limits).await?,
            (None, _) => Bytes::new(),
        };
        let Parts { method, uri, headers, .. } = self.head;
        let args = uri.query().unwrap_or("").to_owned();
        let query = parse_query(&args);
        Ok(Call { method, path: uri.path().to_owned(), query, args, headers, body, role: None })
    }
}

async fn read(mut body: Incoming, limit: usize, limits: &Limits) -> Result<Bytes, Answer> {
    match timeout(limits.body_patience, Limited::new(&mut body, limit).collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(e)) if e.is::<LengthLimitError>() => {
            discard(&mut body, limits).await;
            Err(too_large(limit + 1, limit))
        }
        Ok(Err(e)) => Err(Answer::refuse(400, format!("invalid request body: {e}"))),
        Err(_) => Err(Answer::refuse(408, "invalid request body: timeout")),
    }
}

/// Reads on and forgets, up to a bound: a connection that is closed in the middle of a body is reset, and that destroys the answer
/// before its client has read it.
async fn discard(body: &mut Incoming, limits: &Limits) {
    let rest = async {
        let mut left = limits.discard;
        while let Some(Ok(frame)) = body.frame().await {
            left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
            if left == 0 {
                break;
            }
        }
    };
    // Whoever is slower than this does not get the answer.
    let _ = timeout(limits.body_patience, rest).await;
}

fn too_large(size: usize, limit: usize) -> Answer {
    let text = format!("request size {size} is greater than the maximum size {limit} allowed");
    tracing::error!("failed to read request body: {text}");
    Answer::refuse(400, format!("invalid request body: {text}"))
}

pub fn parse_query(query: &str) -> Vec<(String, String)> {
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| pair.split_once('=').map_or((decode(pair), String::new()), |(n, v)| (decode(n), decode(v))))
        .collect()
}

/// `%41` and `+`: of arguments.
pub fn decode(text: &str) -> String {
    decoded(text, true)
}

/// `%41`: of a path, where a plus sign is one.
pub fn decode_path(text: &str) -> String {
    decoded(text, false)
}

fn decoded(text: &str, plus_is_space: bool) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let hex = bytes.get(i + 1..i + 3).and_then(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok());
        match (bytes[i], hex) {
            (b'%', Some(byte)) => {
                out.push(byte);
                i += 2;
            }
            (b'+', _) if plus_is_space => out.push(b' '),
            (byte, _) => out.push(byte),
        }
        i += 1;
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Serves `listener` until `shutdown`, then waits for the requests in flight.
///
/// Must run inside a `LocalSet`.
pub async fn serve<H, F>(listener: TcpListener, tls: Option<Tls>, handler: Rc<H>, shutdown: impl Future<Output = ()>)
where
    H: Fn(Incomplete) -> F + 'static,
    F: Future<Output = Answer> + 'static,
{
    serve_within(LIMITS, listener, tls, handler, shutdown).await;
}

pub(super) async fn serve_within<H, F>(
    limits: Limits,
    listener: TcpListener,
    tls: Option<Tls>,
    handler: Rc<H>,
    shutdown: impl Future<Output = ()>,
) where
    H: Fn(Incomplete) -> F + 'static,
    F: Future<Output = Answer> + 'static,
{
    let places = Arc::new(Semaphore::new(limits.connections));
    let (ending, _) = watch::channel(false);
    let mut shutdown = pin!(shutdown);
    loop {
        let place = tokio::select! {
            place = places.clone().acquire_owned() => place,
            () = &mut shutdown => break,
        };
        let (stream, peer) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => (stream, peer.ip()),
                Err(e) => {
                    tracing::warn!("accept: {e}");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
            () = &mut shutdown => break,
        };
        let (handler, ended, tls) = (handler.clone(), ending.subscribe(), tls.clone());
        let _ = stream.set_nodelay(true);
        tokio::task::spawn_local(async move {
            let _place = place;
            match tls {
                None => connection(limits, stream, peer, handler, ended).await,
                Some(tls) => over_tls(limits, tls, stream, peer, handler, ended).await,
            }
        });
    }
    drop(listener);
    ending.send_replace(true);
    // Every connection holds a receiver until it is done.
    let _ = timeout(limits.drain_patience, ending.closed()).await;
}

async fn over_tls<H, F>(
    limits: Limits,
    tls: Tls,
    stream: TcpStream,
    peer: IpAddr,
    handler: Rc<H>,
    ended: watch::Receiver<bool>,
) where
    H: Fn(Incomplete) -> F + 'static,
    F: Future<Output = Answer> + 'static,
{
    let refuse =
        |why: &'static str| Rc::new(move |_: Incomplete| std::future::ready(Answer::html(400, tls::page(why))));
    match timeout(limits.head_patience, tls::begins(&stream)).await {
        Ok(Ok(true)) => {}
        Ok(Ok(false)) => return connection(limits, stream, peer, refuse(tls::PLAIN), ended).await,
        _ => return,
    }
    let Ok(Ok(stream)) = timeout(limits.head_patience, tls.accept(stream)).await else { return };
    if tls.lets_in(&stream) {
        return connection(limits, stream, peer, handler, ended).await;
    }
    connection(limits, stream, peer, refuse(tls::NO_CERTIFICATE), ended).await;
}

async fn connection<S, H, F>(limits: Limits, stream: S, peer: IpAddr, handler: Rc<H>, mut ended: watch::Receiver<bool>)
where
    S: AsyncRead + AsyncWrite + Unpin + 'static,
    H: Fn(Incomplete) -> F + 'static,
    F: Future<Output = Answer> + 'static,
{
    let service = service_fn(move |request: http::Request<Incoming>| {
        let handler = handler.clone();
        async move {
            let (head, body) = request.into_parts();
            let is_head = head.method == Method::HEAD;
            let request = Incomplete { head, peer, body: RefCell::new(Some(body)), limits };
            let mut response = handler(request).await.into_response();
            if is_head {
                *response.body_mut() = Full::default();
            }
            Ok::<_, Infallible>(response)
        }
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(limits.head_patience);
    let mut served = pin!(builder.serve_connection(TokioIo::new(stream), service));
    tokio::select! {
        _ = served.as_mut() => return,
        _ = ended.wait_for(|ended| *ended) => served.as_mut().graceful_shutdown(),
    }
    let _ = served.await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_switch_is_on_or_off_or_refused() {
        let call = |query: &str| Call {
            method: Method::PUT,
            path: String::new(),
            args: query.to_owned(),
            query: parse_query(query),
            headers: HeaderMap::new(),
            body: Bytes::new(),
            role: None,
        };
        for (query, expected) in [
            ("", Some(false)),
            ("dry=1&run", Some(false)),
            ("a=b&dry_run=true", Some(true)),
            ("dry%5Frun=false", Some(false)),
            ("dry_run", None),
            ("dry_run=", None),
            ("dry_run=1", None),
            ("dry_run=yes", None),
            ("dry_run=TRUE", None),
            ("dry_run=true+", None),
            ("dry-run=true", None),
            ("dryRun=true", None),
            ("Dry_Run=false", None),
            ("dry_run=true&dry_run=true", None),
            ("dry_run=false&dry_run=true", None),
        ] {
            assert_eq!(call(query).switch("dry_run").ok(), expected, "{query}");
        }
    }

    #[test]
    fn queries_are_decoded() {
        let expected = [("a", "b c"), ("filter", "x=1"), ("flag", ""), ("bad", "%zz")];
        let parsed = parse_query("a=b+c&filter=x%3D1&flag&bad=%zz");
        assert_eq!(parsed.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect::<Vec<_>>(), expected);
        assert_eq!((decode_path("/a+b%2Bc%20d"), decode("a+b")), ("/a+b+c d".into(), "a b".into()));
    }
}
