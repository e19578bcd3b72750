//! Subrequests: a request of a script's own to a location, whose answer the script gets.

use std::{
    any::Any,
    cell::RefCell,
    rc::Rc,
    task::{Context, Poll},
    time::Instant,
};

use futures_util::future::{join_all, ready};

use super::{Proxy, location, watch};
use crate::{
    error::{Error, Kind, Result},
    exchange::{
        BodyLength, Client, Exchange, Headers, MainHead, Request, RequestBody, Response,
        host::{Answered, Captured, Doing, Subrequest},
        vars::MAX_CUSTOM,
        watch::Children,
    },
    observe::log::{self, Level},
};

/// Subrequests within subrequests, as in nginx.
const MAX_DEPTH: u32 = 50;

/// The longest answer that is kept for a script.
const MAX_BODY: usize = 256 << 20;

/// Makes them all. Those that share the request's variables run one after the other.
pub(super) fn run(p: Rc<Proxy>, x: &Exchange, list: Vec<Subrequest>) -> Doing<'static, Answered> {
    if x.depth >= MAX_DEPTH {
        let path = String::from_utf8_lossy(&x.request.path);
        x.log(Level::Error, format!("lua subrequests cycle while processing \"{path}\"").as_bytes());
        let list = list.iter().map(|_| Captured { status: 500, ..Captured::default() }).collect();
        return Box::pin(ready(Answered { list, vars: None }));
    }
    let share = list.iter().any(|one| one.share_vars);
    let children: Vec<_> = list.into_iter().map(|one| (one.share_vars, child(x, one))).collect();
    if share { Box::pin(in_turn(p, children)) } else { Box::pin(at_once(p, children)) }
}

async fn at_once(p: Rc<Proxy>, children: Vec<(bool, Child)>) -> Answered {
    let done = join_all(children.into_iter().map(|(_, child)| run_one(&p, child))).await;
    Answered { list: done.into_iter().map(|(answer, _)| answer).collect(), vars: None }
}

async fn in_turn(p: Rc<Proxy>, children: Vec<(bool, Child)>) -> Answered {
    let mut answered = Answered::default();
    for (share, mut child) in children {
        if let (true, Some(vars)) = (share, &answered.vars) {
            child.x.custom_vars.clone_from(vars);
        }
        let (answer, vars) = run_one(&p, child).await;
        if share {
            answered.vars = Some(vars);
        }
        answered.list.push(answer);
    }
    answered
}

type Vars = Vec<(Box<str>, Vec<u8>)>;

/// The exchange of a subrequest and what its client will have received.
struct Child {
    x: Exchange,
    /// Where its trace goes, when the request is traced.
    traced: Option<Children>,
    received: Rc<RefCell<Received>>,
}

#[derive(Default)]
struct Received {
    body: Vec<u8>,
    /// What the head says of the body, which may not follow.
    length: Option<u64>,
    bodiless: bool,
    header_only: bool,
    truncated: bool,
    failed: bool,
}

fn child(x: &Exchange, one: Subrequest) -> Child {
    if log::enabled(Level::Debug) {
        let text = String::from_utf8_lossy;
        x.log(Level::Debug, format!("lua http subrequest \"{}?{}\"", text(&one.path), text(&one.args)).as_bytes());
    }
    let mut child = Exchange::new(x.conn.clone(), x.snapshot.clone());
    child.begin();
    child.started = x.started;
    (child.depth, child.internal) = (x.depth + 1, true);
    let (from, to) = (&x.request, &mut child.request);
    from.append_line(&mut to.line);
    let main = || Rc::new(MainHead { method: from.method.clone(), headers: from.headers.clone() });
    to.main = Some(from.main.clone().unwrap_or_else(main));
    to.method = one.method;
    to.version = from.version;
    to.target.clone_from(&from.target);
    to.host.clone_from(&from.host);
    to.headers.clone_from(&from.headers);
    (to.path, to.args, to.uri_changed) = (one.path, one.args, true);
    to.real_ip = from.real_ip;
    child.body = match one.body {
        Some(body) => RequestBody::Memory(body),
        None if one.forward_body => x.body.lent(),
        None => RequestBody::None,
    };
    child.request.headers.remove("transfer-encoding");
    let length = match &child.body {
        RequestBody::Memory(data) => Some(data.len() as u64),
        RequestBody::File { length, .. } => Some(*length),
        _ => None,
    };
    match length {
        Some(length) => child.request.headers.set("Content-Length", length.to_string()),
        None => drop(child.request.headers.remove("content-length")),
    }
    if one.copy_vars || one.share_vars {
        child.custom_vars.clone_from(&x.custom_vars);
    }
    for (name, value) in one.vars {
        if child.custom_vars.len() < MAX_CUSTOM || child.is_made(&name) {
            // What cannot be changed stays.
            let _ = child.set_var(&name, &value);
        }
    }
    child.lua.ctx = one.ctx;
    let traced = x.watch.as_ref().and_then(|own| watch::of_child(own, &mut child));
    child.header_only = one.header_only;
    let received = Rc::new(RefCell::new(Received { header_only: one.header_only, ..Received::default() }));
    child.client = Some(Box::new(Capture(received.clone())));
    Child { x: child, traced, received }
}

async fn run_one(p: &Rc<Proxy>, child: Child) -> (Captured, Vars) {
    let Child { mut x, traced, received } = child;
    let begun = Instant::now();
    location::serve_child(p, &mut x).await;
    if let Some(traced) = traced {
        watch::end_child(&mut x, &traced, begun);
    }
    let Received { body, length, truncated, failed, .. } = received.take();
    let mut headers = std::mem::take(&mut x.response.headers);
    // A file's length is known ahead of its bytes.
    if let Some(length) = length.filter(|_| headers.contains("last-modified")) {
        headers.set("Content-Length", length.to_string());
    }
    let captured = Captured { status: x.response.status, headers, body, truncated, failed };
    (captured, std::mem::take(&mut x.custom_vars))
}

fn capture(x: &mut Exchange) -> Option<&mut Capture> {
    x.client.as_mut()?.as_any().downcast_mut()
}

/// A body filter of the subrequest has failed: in nginx the request that made it ends with it.
pub(super) fn fail(x: &mut Exchange) {
    if let Some(Capture(received)) = capture(x) {
        received.borrow_mut().failed = true;
    }
}

/// What nginx fills before it passes it on (`proxy_buffering`).
const PIECE: usize = 4096;

/// The upstream took too long: what it has sent of the piece that was to be filled never came out, in nginx.
pub(super) fn forget_last_piece(x: &mut Exchange) {
    let buffered = x.location.as_ref().is_some_and(|l| l.directives.proxy_buffering);
    if let Some(Capture(received)) = capture(x).filter(|_| buffered) {
        let body = &mut received.borrow_mut().body;
        body.truncate(body.len() / PIECE * PIECE);
    }
}

/// A client whose body has ended.
#[cfg(test)]
pub(super) fn without_body() -> Box<dyn Client> {
    Box::new(Capture(Rc::default()))
}

/// The client of a subrequest: keeps what it is sent.
struct Capture(Rc<RefCell<Received>>);

impl Client for Capture {
    fn poll_read_body(&mut self, _: &mut Context<'_>, _: &mut Vec<u8>, _: usize) -> Poll<Result<usize>> {
        Poll::Ready(Ok(0))
    }

    fn start(&mut self, request: &Request, _: &Response, length: BodyLength) -> Result<()> {
        let mut received = self.0.borrow_mut();
        received.bodiless = received.header_only || request.method == b"HEAD" || length == BodyLength::None;
        received.length = if let BodyLength::Known(n) = length { Some(n) } else { None };
        Ok(())
    }

    fn interim(&mut self, _: u16, _: &Headers) -> Result<()> {
        Ok(())
    }

    fn poll_write(&mut self, _: &mut Context<'_>, data: &[u8]) -> Poll<Result<usize>> {
        let mut received = self.0.borrow_mut();
        if received.bodiless {
            return Poll::Ready(Ok(data.len()));
        }
        if received.body.len() + data.len() > MAX_BODY {
            received.truncated = true;
            return Poll::Ready(Err(Error::internal(Kind::TooLarge).context("the subrequest's answer is too long")));
        }
        received.body.extend_from_slice(data);
        Poll::Ready(Ok(data.len()))
    }

    fn poll_flush(&mut self, _: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_finish(&mut self, _: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_gone(&mut self, _: &mut Context<'_>) -> Poll<()> {
        Poll::Pending
    }

    fn abort(&mut self) {
        self.0.borrow_mut().truncated = true;
    }

    fn as_any(&mut self) -> &mut dyn Any {
        self
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::exchange::Connection;

    #[test]
    fn the_variables_of_a_subrequest_are_bounded() {
        let addr = "127.0.0.1:1".parse().expect("an address");
        let mut x = Exchange::new(Rc::new(Connection::new(1, addr, addr)), Arc::default());
        x.request.method.extend_from_slice(b"GET");
        x.custom_vars.push(("there".into(), b"old".to_vec()));
        let given = |name: String| (name.into(), b"new".to_vec());
        let mut vars: Vec<(Box<str>, Vec<u8>)> = (0..MAX_CUSTOM).map(|n| given(format!("v{n}"))).collect();
        vars.push(given("there".into()));
        let one = Subrequest {
            method: b"POST".to_vec(),
            path: b"/".to_vec(),
            args: Vec::new(),
            body: None,
            forward_body: false,
            vars,
            copy_vars: true,
            share_vars: false,
            ctx: None,
            header_only: false,
        };
        let Child { x: child, .. } = child(&x, one);
        assert_eq!(child.custom_vars.len(), MAX_CUSTOM);
        assert!(child.is_made(&format!("v{}", MAX_CUSTOM - 2)) && !child.is_made(&format!("v{}", MAX_CUSTOM - 1)));
        assert_eq!(child.custom_vars[0].1, b"new", "one that is there changes all the same");
    }
}
