//! Errors to answers: the only place that chooses a status for an `Error`.

use std::{future::poll_fn, task::Poll};

use super::Proxy;
use crate::{
    error::{Error, Kind, Origin, Result},
    exchange::{Client, Exchange, Source, status},
    observe::log::Level,
    plugin::output,
};

/// What nginx logs, and sends to nobody, when the client went away first.
const CLIENT_CLOSED: u16 = 499;

/// Answers for an error, unless the head is out already: then the connection is cut, so that nobody takes the piece for the whole.
pub(super) async fn answer(p: &Proxy, x: &mut Exchange, e: Error) {
    let status = status_of(&e);
    log(x, &e, status);
    if x.response.head_sent {
        if let Some(client) = &mut x.client {
            if e.origin() != Origin::Client {
                push(&mut **client).await;
            }
            client.abort();
        }
        return;
    }
    forget_body(x);
    // What plugins have set stays; what came of the upstream does not. A location's proxy has seen to that itself.
    if x.location.is_none() {
        x.response.headers.clear();
        std::mem::swap(&mut x.response.headers, &mut x.response.early);
    }
    x.response.source = Source::Gateway;
    if status == CLIENT_CLOSED {
        x.response.status = status;
        if let Some(client) = &mut x.client {
            client.abort();
        }
        return;
    }
    page(p, x, status);
    if e.origin() == Origin::Client {
        // What follows the broken body cannot be told from it.
        x.request.keep_alive = false;
    }
    // A plugin's filter has failed, and would again.
    let sent = match e.is_told() && x.location.is_none() {
        true => output::plain(x).await,
        false => output::answer(x, &p.runner).await,
    };
    if let Err(e) = sent {
        tracing::debug!("the error page was not sent: {e}");
        if let Some(client) = &mut x.client {
            client.abort();
        }
    }
}

/// What came before the error is the client's, as far as it takes that at once: nobody waits for one that is slow, only to cut the
/// response off then. Two looks, since with HTTP/2 it is the connection's task that sends.
async fn push(client: &mut dyn Client) {
    let mut look = async || poll_fn(|cx| Poll::Ready(client.poll_flush(cx).is_pending())).await;
    if look().await {
        tokio::task::yield_now().await;
        look().await;
    }
}

/// What a head has said of a body that will not come now, and what was to be done to that.
pub(super) fn forget_body(x: &mut Exchange) {
    x.encoder = None;
    x.response.reason.clear();
    for about_the_body in ["content-length", "content-encoding", "last-modified", "etag"] {
        x.response.headers.remove(about_the_body);
    }
}

/// What an error is answered with, where nothing else is.
pub(super) fn status_of(e: &Error) -> u16 {
    match (e.origin(), e.kind()) {
        (Origin::Client, Kind::TooLarge) => 413,
        (Origin::Client, Kind::ReadTimeout) => 408,
        (Origin::Client, Kind::Closed | Kind::WriteTimeout | Kind::Io) => CLIENT_CLOSED,
        (Origin::Client, _) => 400,
        (Origin::Upstream, Kind::ConnectTimeout | Kind::Busy | Kind::ReadTimeout | Kind::WriteTimeout) => 504,
        (Origin::Upstream, Kind::NoNode) => 503,
        (Origin::Upstream, _) => 502,
        (Origin::Config, Kind::NotFound) => 502,
        (Origin::Config, _) => 503,
        (Origin::Script, _) => 500,
        (Origin::Internal, _) => 500,
    }
}

fn log(x: &Exchange, e: &Error, status: u16) {
    if e.is_told() {
        return;
    }
    let level = if status == CLIENT_CLOSED { Level::Info } else { Level::Error };
    x.log(level, e.to_string().as_bytes());
}

/// No route matched: APISIX's body.
pub(super) async fn no_route(p: &Proxy, x: &mut Exchange) -> Result<()> {
    x.response.status = 404;
    x.printed.clear();
    x.printed.extend_from_slice(b"{\"error_msg\":\"404 Route Not Found\"}\n");
    x.response.headers.set("Content-Type", "text/plain; charset=utf-8");
    stamp(p, x);
    output::answer(x, &p.runner).await
}

/// The page that nginx would send for this status.
pub(super) fn page(p: &Proxy, x: &mut Exchange, code: u16) {
    use std::io::Write;
    x.response.status = code;
    // Within an error page it has its own status, not the page's.
    x.error_status = x.error_status.map(|_| 0);
    let reason = match code {
        302 => "Found",
        code => status::reason(code),
    };
    x.printed.clear();
    let _ = write!(
        x.printed,
        "<html>\r\n<head><title>{code} {reason}</title></head>\r\n<body>\r\n<center><h1>{code} {reason}</h1></center>\r\n\
         <hr><center>moongate</center>\r\n</body>\r\n</html>\r\n"
    );
    // APISIX names the charset, nginx does not.
    let kind = if x.location.is_some() { "text/html" } else { "text/html; charset=utf-8" };
    x.response.headers.set("Content-Type", kind);
    stamp(p, x);
}

/// What every response of the gateway's own carries.
pub(super) fn stamp(p: &Proxy, x: &mut Exchange) {
    x.response.headers.set("Server", &p.settings.server);
    upstream_status(p, x);
}

/// `X-APISIX-Upstream-Status`: on 5xx that an upstream was asked about, or always when configured.
pub(super) fn upstream_status(p: &Proxy, x: &mut Exchange) {
    if x.upstream.tries.is_empty() || !(p.settings.show_upstream_status || x.response.status / 100 == 5) {
        return;
    }
    let mut text = Vec::new();
    for (i, one) in x.upstream.tries.iter().enumerate() {
        if i > 0 {
            text.extend_from_slice(b", ");
        }
        text.extend_from_slice(itoa::Buffer::new().format(one.status).as_bytes());
    }
    x.response.headers.set("X-APISIX-Upstream-Status", &text);
}
