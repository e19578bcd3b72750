//! The export server: the page over HTTP, for the control thread.

use std::{convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{net::TcpListener, sync::Semaphore};

use super::Metrics;

/// Scrapers connected at the same time; more wait to be accepted.
pub(super) const MAX_CONNECTIONS: usize = 64;

/// A scraper sends its request at once.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection is closed after this long: an answer takes milliseconds, and a scraper comes again.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(300);

/// How long to wait when no connection can be accepted (no file descriptors left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Answers `GET uri` with the page, until it is dropped.
pub async fn serve(listener: TcpListener, metrics: Arc<Metrics>, uri: Arc<str>) {
    serve_within(HEAD_TIMEOUT, CONNECTION_TIMEOUT, listener, metrics, uri).await;
}

pub(super) async fn serve_within(
    head_timeout: Duration,
    connection_timeout: Duration,
    listener: TcpListener,
    metrics: Arc<Metrics>,
    uri: Arc<str>,
) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        // The semaphore is never closed.
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        let Ok((socket, _)) = listener.accept().await else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let (metrics, uri) = (metrics.clone(), uri.clone());
        tokio::spawn(async move {
            let _slot = slot;
            let service = service_fn(move |request| answer(request, metrics.clone(), uri.clone()));
            let mut server = http1::Builder::new();
            server.timer(TokioTimer::new()).header_read_timeout(head_timeout);
            let connection = server.serve_connection(TokioIo::new(socket), service);
            // What goes wrong here is the scraper's to see.
            let _ = tokio::time::timeout(connection_timeout, connection).await;
        });
    }
}

async fn answer(
    request: Request<Incoming>,
    metrics: Arc<Metrics>,
    uri: Arc<str>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    if request.uri().path() != &*uri {
        return Ok(plain(StatusCode::NOT_FOUND, "{\"error_msg\":\"404 Route Not Found\"}\n".into()));
    }
    if request.method() != Method::GET && request.method() != Method::HEAD {
        return Ok(plain(StatusCode::METHOD_NOT_ALLOWED, String::new()));
    }
    let page = tokio::task::spawn_blocking(move || {
        let mut page = String::new();
        metrics.scrape(&mut page);
        page
    });
    Ok(match page.await {
        Ok(page) => plain(StatusCode::OK, page),
        Err(_) => plain(StatusCode::INTERNAL_SERVER_ERROR, String::new()),
    })
}

fn plain(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let kind = header::HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}
