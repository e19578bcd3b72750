//! Sends a response made or filtered by plugins.
//!
//! `answer` is for a response that is whole; `start`, `chunk` and `finish` for one that comes in pieces (an upstream's behind body
//! filters, a function that flushes). Filters run where the request's plan has them.

use std::future::poll_fn;

use super::{PhaseMask, late, run::Runner};
use crate::{
    error::{Error, Kind, Result},
    exchange::{BodyLength, Client, Exchange, Phase, framing::parse_decimal},
};

/// What an answer of Lua's is that does not say it: nginx's type and APISIX's charset.
pub const LUA_TYPE: &str = "text/plain; charset=utf-8";

/// Gives a plugin's or a function's answer a type, unless it has one or was relieved of it. Locations have one of their own.
pub fn default_type(x: &mut Exchange, kind: &str) {
    if x.location.is_none() && !x.untyped && !x.response.headers.contains("content-type") {
        x.response.headers.append("Content-Type", kind);
    }
}

/// Sends the response whose body is `x.printed`, through the filters, to its end.
pub async fn answer(x: &mut Exchange, runner: &Runner) -> Result<()> {
    answer_with(x, runner, |_| true).await.map(drop)
}

/// The same; `last` works on what the filters have left, and says whether it goes out. So does the result.
pub async fn answer_with(x: &mut Exchange, runner: &Runner, last: impl FnOnce(&mut Exchange) -> bool) -> Result<bool> {
    if x.response.head_sent {
        rest(x, runner).await?;
        return Ok(true);
    }
    if x.response.status == 0 {
        x.response.status = 200;
    }
    // The gateway's own bodies have the length that they have, whatever a plugin copied.
    x.response.headers.remove("content-length");
    let length = x.printed.len() as u64;
    filter_head_of(x, runner, Some(length)).await?;
    if changes_body(x, runner) {
        std::mem::swap(&mut x.chunk.data, &mut x.printed);
        x.chunk.eof = true;
        filter_chunk(x, runner).await?;
        std::mem::swap(&mut x.chunk.data, &mut x.printed);
    }
    if !last(x) {
        return Ok(false);
    }
    plain(x).await?;
    Ok(true)
}

/// What was printed after a script had the head sent.
async fn rest(x: &mut Exchange, runner: &Runner) -> Result<()> {
    if x.response.ended {
        return Ok(());
    }
    std::mem::swap(&mut x.chunk.data, &mut x.printed);
    x.printed.clear();
    x.chunk.eof = true;
    chunk(x, runner).await?;
    finish(x).await
}

/// Settles the status that an error page has, before the filters do, or for an answer that goes by them.
pub fn settle_status(x: &mut Exchange) {
    late::status(x);
}

/// The same without filters.
pub async fn plain(x: &mut Exchange) -> Result<()> {
    let body = std::mem::take(&mut x.printed);
    let sent = send_whole(x, &body).await;
    x.printed = body;
    x.printed.clear();
    sent
}

async fn send_whole(x: &mut Exchange, body: &[u8]) -> Result<()> {
    send_head(x, BodyLength::Known(body.len() as u64))?;
    write(x, body).await?;
    end(x).await
}

/// Runs header_filter and queues the head of a response whose body comes in pieces. `length`: what is known of it before filters.
pub async fn start(x: &mut Exchange, runner: &Runner) -> Result<()> {
    filter_head(x, runner).await?;
    let length = remaining_length(x);
    send_head(x, length)
}

/// Runs the body filters on `x.chunk`: what they leave of it is the caller's to send.
pub async fn filter(x: &mut Exchange, runner: &Runner) -> Result<()> {
    if changes_body(x, runner) {
        filter_chunk(x, runner).await?;
    }
    Ok(())
}

/// Runs the body filters on `x.chunk` and sends what they left of it.
pub async fn chunk(x: &mut Exchange, runner: &Runner) -> Result<()> {
    if changes_body(x, runner) {
        filter_chunk(x, runner).await?;
    }
    let data = std::mem::take(&mut x.chunk.data);
    let written = write(x, &data).await;
    x.chunk.data = data;
    x.chunk.data.clear();
    written
}

/// Ends the response.
pub async fn finish(x: &mut Exchange) -> Result<()> {
    end(x).await
}

/// Waits until the client's side holds nothing back.
pub async fn flush(x: &mut Exchange) -> Result<()> {
    let client = client(&mut x.client)?;
    poll_fn(|cx| client.poll_flush(cx)).await
}

/// Whether a chunk has to go through Lua.
pub fn has_body_filter(mask: PhaseMask) -> bool {
    mask.has(Phase::BodyFilter) || mask.has(Phase::DelayedBodyFilter)
}

/// Whether what goes out is not what came: only known behind `filter_head`.
pub fn changes_body(x: &Exchange, runner: &Runner) -> bool {
    has_body_filter(runner.mask(x)) || x.encoder.is_some()
}

/// What `Content-Length` still says after header_filter: a filter that changes the body removes it.
pub fn remaining_length(x: &Exchange) -> BodyLength {
    if x.request.method == b"HEAD" || matches!(x.response.status, 204 | 304) {
        return BodyLength::None;
    }
    match x.response.headers.get("content-length").and_then(parse_decimal) {
        Some(n) => BodyLength::Known(n),
        None => BodyLength::Unknown,
    }
}

/// Runs header_filter, and what nginx does behind it.
pub fn filter_head(x: &mut Exchange, runner: &Runner) -> impl Future<Output = Result<()>> {
    filter_head_of(x, runner, None)
}

/// `length`: of the body, where the head does not say it.
async fn filter_head_of(x: &mut Exchange, runner: &Runner, length: Option<u64>) -> Result<()> {
    let of_location = x.location.is_some();
    if of_location {
        late::status(x);
    }
    if runner.mask(x).has(Phase::HeaderFilter) {
        x.phase = Phase::HeaderFilter;
        runner.header_filter(x).await?;
    }
    if of_location {
        late::head(x, length);
    } else if let Some(charset) = runner.charset() {
        late::name_charset(&mut x.response.headers, charset);
    }
    if x.watch.is_some() {
        runner.watching().head(x);
    }
    Ok(())
}

async fn filter_chunk(x: &mut Exchange, runner: &Runner) -> Result<()> {
    let mask = runner.mask(x);
    if mask.has(Phase::BodyFilter) {
        x.phase = Phase::BodyFilter;
        runner.body_filter(x).await?;
    }
    if mask.has(Phase::DelayedBodyFilter) {
        x.phase = Phase::DelayedBodyFilter;
        runner.delayed_body_filter(x).await?;
    }
    if x.encoder.is_some() {
        // In a box: what only locations need is no part of every request.
        Box::pin(late::chunk(x)).await?;
    }
    Ok(())
}

pub fn send_head(x: &mut Exchange, length: BodyLength) -> Result<()> {
    let client = client(&mut x.client)?;
    client.start(&x.request, &x.response, length)?;
    x.response.head_sent = true;
    Ok(())
}

async fn write(x: &mut Exchange, mut data: &[u8]) -> Result<()> {
    let client = client(&mut x.client)?;
    while !data.is_empty() {
        let n = poll_fn(|cx| client.poll_write(cx, data)).await?;
        x.body_bytes_sent += n as u64;
        data = &data[n..];
    }
    Ok(())
}

async fn end(x: &mut Exchange) -> Result<()> {
    let client = client(&mut x.client)?;
    poll_fn(|cx| client.poll_finish(cx)).await?;
    x.response.ended = true;
    Ok(())
}

fn client(client: &mut Option<Box<dyn Client>>) -> Result<&mut Box<dyn Client>> {
    client.as_mut().ok_or_else(|| Error::client(Kind::Closed).context("the client is gone"))
}
