//! A request to an upstream and its response back: tries, streams both ways, and gives the connection back.

mod grpc;
pub(super) mod servers;

use std::{
    borrow::Cow,
    future::poll_fn,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use rustls::pki_types::ServerName;

use super::{Proxy, head, head::BodyFraming, rescue, tunnel, upload::Upload};
use crate::{
    balancer::{NoNode, Owner, Picked, Tried, has_memory},
    error::{Error, Kind, Origin, Result, Retry},
    exchange::{Client, Exchange, RequestBody, Response, Source, Try, Var, headers::same_name},
    health::Checker,
    model::{
        route::Timeouts,
        upstream::{Balance, HashOn, Keepalive, Node, Scheme, Upstream},
    },
    observe::log::{self, Level},
    plugin::{PhaseMask, output},
    tls,
    upstream::{self, Conn, Head, Key, Tls},
};
use servers::Servers;

/// Interim responses (1xx) before the real one: past it the node is playing.
const MAX_INTERIM: usize = 16;

/// Forwards the request to `x.upstream.conf` and its response to the client.
pub(super) async fn forward(p: &Proxy, x: &mut Exchange) -> Result<()> {
    let Some(conf) = x.upstream.conf.clone() else {
        return Err(Error::config(Kind::NoNode).context("missing upstream configuration in Route or Service"));
    };
    if served(x, &conf)?.http2 {
        // In a box: what only gRPC needs is no part of every request.
        return Box::pin(grpc::forward(p, x, &conf)).await;
    }
    let (upload, framing) = body(x)?;
    Way::new(p, x, &conf, upload, framing).run(x).await
}

/// What is spoken to a node.
#[derive(Clone, Copy)]
struct Spoken {
    tls: bool,
    /// gRPC: HTTP/2 in any case, never negotiated.
    http2: bool,
}

impl Spoken {
    /// By the scheme that a script has set, else the upstream's. `None`: nobody speaks that here.
    fn of(x: &Exchange, conf: &Upstream) -> Option<Spoken> {
        let (tls, http2) = match &x.upstream.scheme[..] {
            b"" => match conf.scheme {
                Scheme::Http => (false, false),
                Scheme::Https => (true, false),
                Scheme::Grpc => (false, true),
                Scheme::Grpcs => (true, true),
                _ => return None,
            },
            b"http" => (false, false),
            b"https" => (true, false),
            b"grpc" => (false, true),
            b"grpcs" => (true, true),
            _ => return None,
        };
        Some(Spoken { tls, http2 })
    }
}

/// Refuses a scheme that nobody speaks here.
fn served(x: &Exchange, conf: &Upstream) -> Result<Spoken> {
    Spoken::of(x, conf).ok_or_else(|| {
        let scheme = crate::exchange::vars::scheme_name(conf.scheme);
        Error::upstream(Kind::Other).context(format!("upstream scheme {scheme} is not served here"))
    })
}

/// The body as it is to be sent, and how it is framed.
#[inline(always)]
fn body(x: &Exchange) -> Result<(Upload, BodyFraming)> {
    let (upload, mut framing) = Upload::new(&x.body, is_harmless(x))?;
    // `Content-Length: 0` is passed on: some servers refuse a POST that says nothing.
    if framing == BodyFraming::None && x.request.headers.contains("content-length") {
        framing = BodyFraming::Length(0);
    }
    Ok((upload, framing))
}

/// To be repeated, should nobody know whether a node acted on it.
fn is_harmless(x: &Exchange) -> bool {
    !matches!(&x.request.method[..], b"POST" | b"PATCH" | b"LOCK")
}

/// One request on its way.
struct Way<'a> {
    p: &'a Proxy,
    conf: &'a Upstream,
    framing: BodyFraming,
    websocket: bool,
    times: Timeouts,
    upload: Upload,
    /// Between the response's head and its end there was a wait, or a plugin.
    waited: bool,
    /// Of a location; a route has nodes only.
    servers: Option<Box<Servers>>,
}

/// A node that has answered.
struct Reached {
    conn: Box<Conn>,
    key: Key,
    head: Head,
    /// When its try began.
    begun: Instant,
}

/// Which nodes of a route's upstream a request has tried, and which may follow.
struct Tries {
    /// `None` for a single node of which nothing is known: ten thousand upstreams of one node each need no memory for it.
    picked: Option<Rc<Picked>>,
    hash_key: Vec<u8>,
    tried: Tried,
    /// What health checks say of the nodes.
    health: Option<Arc<Checker>>,
    /// Further tries after the first.
    retries: usize,
    started: Instant,
    /// When the try under way began. One look at the clock serves all that happens at its start.
    begun: Instant,
}

/// A request that its node is serving: until its end the balancer counts it there.
struct UnderWay {
    picked: Rc<Picked>,
    at: usize,
    latency: Option<Duration>,
    begun: Instant,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.picked.picker.done(self.at, self.latency, self.begun + self.latency.unwrap_or_default());
    }
}

impl Tries {
    #[inline(always)]
    fn new(p: &Proxy, x: &Exchange, conf: &Upstream) -> Tries {
        // Without plugins the request has hardly begun: one look at the clock less.
        let started = if x.lua.run.is_none() { x.started } else { Instant::now() };
        let retries = x.upstream.more_tries.or(conf.retries);
        Tries {
            picked: (conf.nodes.len() != 1 || has_memory(&conf.balance))
                .then(|| p.pickers.of_owner(conf, owner(x, conf), started)),
            health: conf.checks.as_ref().and_then(|_| p.watched.of(conf, || owner(x, conf))),
            hash_key: hash_key(x, conf),
            tried: Tried::default(),
            retries: retries.map_or(conf.nodes.len().saturating_sub(1), |n| n as usize),
            started,
            begun: started,
        }
    }

    /// The node for the try that begins.
    #[inline(always)]
    fn next(&self, x: &Exchange, conf: &Upstream) -> Result<usize> {
        let Some(picked) = &self.picked else { return Ok(0) };
        picked.used.set(self.begun);
        match picked.picker.pick(&self.hash_key, self.begun, &self.tried, &|at| self.is_up(at)) {
            Ok(at) => {
                tell_skipped(x, conf, at);
                Ok(at)
            }
            Err(NoNode::NoneValid) => Err(Error::upstream(Kind::NoNode).context(NoNode::NoneValid.message())),
            Err(e) => Err(Error::upstream(Kind::Other).context(e.message())),
        }
    }

    fn is_up(&self, at: usize) -> bool {
        self.health.as_ref().is_none_or(|health| health.is_up(at))
    }

    /// The node has answered with a head of that status.
    #[inline(always)]
    fn reached(self, x: &Exchange, at: usize, status: u16) -> Option<UnderWay> {
        let last = x.upstream.tries.last();
        if let (Some(health), Some(last)) = (&self.health, last) {
            health.answered(at, last.addr.ip(), status);
        }
        let latency = last.and_then(|t| t.header_time);
        self.picked.map(|picked| UnderWay { picked, at, latency, begun: self.begun })
    }

    /// Whether the count of tries allows for one more.
    fn may_follow(&self) -> bool {
        self.tried.len() < self.retries
    }

    /// The try has failed; `may_repeat`: the request may go elsewhere. The error, if it is the request's.
    fn failed(&mut self, x: &Exchange, conf: &Upstream, at: usize, e: Error, may_repeat: bool) -> Result<()> {
        self.begun = Instant::now();
        if let Some(picked) = &self.picked {
            picked.picker.done(at, None, self.begun);
        }
        if let Some(health) = self.health.as_ref().filter(|_| e.origin() == Origin::Upstream) {
            health.failed(at, x.upstream.tries.last().map(|t| t.addr.ip()), &e);
        }
        self.tried.push(at);
        if !may_repeat {
            return Err(e);
        }
        // A line per failed try, as nginx writes it; the last one's is the answer's.
        x.log(Level::Error, e.to_string().as_bytes());
        let limit = conf.retry_timeout.filter(|limit| !limit.is_zero());
        if limit.is_some_and(|limit| self.begun.duration_since(self.started) >= limit) {
            let text = format!("proxy retry timeout, retry count: {}", self.tried.len() - 1);
            return Err(Error::upstream(Kind::Other).context(text));
        }
        Ok(())
    }
}

impl<'a> Way<'a> {
    // No `Result`, and made where it stays: it is large, and is not to be moved there.
    #[inline(always)]
    fn new(p: &'a Proxy, x: &Exchange, conf: &'a Upstream, upload: Upload, framing: BodyFraming) -> Way<'a> {
        let (websocket, times) = (is_websocket(x), timeouts(p, x, conf));
        Way { p, conf, framing, websocket, times, upload, waited: false, servers: None }
    }

    async fn run(&mut self, x: &mut Exchange) -> Result<()> {
        std::mem::swap(&mut x.response.headers, &mut x.response.early);
        let (Reached { mut conn, key, head, begun }, _under_way) = match self.servers {
            None => self.reach(x).await?,
            // In a box: what only locations need is no part of every request.
            Some(_) => match Box::pin(self.reach_server(x)).await? {
                Some(reached) => (reached, None),
                None => return Ok(()),
            },
        };
        if head.status == 101 {
            return self.switch(x, conn).await;
        }
        let relayed = self.relay(x, &mut conn, head).await;
        // A response that came whole with its head ended when it began, as far as a clock can tell.
        let first = x.upstream.tries.last().and_then(|last| last.header_time).filter(|_| !self.waited);
        let ended = first.map_or_else(Instant::now, |first| begun + first);
        if let Some(last) = x.upstream.tries.last_mut() {
            last.bytes_received = conn.received();
            last.response_length = conn.taken();
            last.bytes_sent = conn.sent();
            last.response_time = Some(ended.duration_since(begun));
        }
        relayed?;
        // A body that the node did not wait for leaves the connection in the middle of a request.
        if self.upload.is_done() {
            self.p.pool.put(key, conn, &keepalive(self.p, x, self.conf), ended);
        }
        Ok(())
    }

    /// Tries nodes until one answers with a head.
    async fn reach(&mut self, x: &mut Exchange) -> Result<(Reached, Option<UnderWay>)> {
        let conf = self.conf;
        let mut tries = Tries::new(self.p, x, conf);
        loop {
            let at = tries.next(x, conf)?;
            match self.attempt::<false>(x, &conf.nodes[at], at, tries.begun).await {
                Ok(reached) => {
                    let status = reached.head.status;
                    return Ok((reached, tries.reached(x, at, status)));
                }
                Err(e) => {
                    let again =
                        |way: &mut Self, x: &Exchange, e: &Error| way.may_repeat(x, e) && way.upload.rewind(&x.body);
                    let may_repeat = tries.may_follow() && again(self, x, &e);
                    tries.failed(x, conf, at, e, may_repeat)?;
                }
            }
        }
    }

    /// As nginx's `proxy_next_upstream error timeout`: what may have been acted on is repeated only when that is harmless.
    fn may_repeat(&self, x: &Exchange, e: &Error) -> bool {
        match e.retry_advice() {
            _ if e.origin() != Origin::Upstream => false,
            Retry::Safe => true,
            Retry::Idempotent => is_harmless(x) || !self.upload.has_started(),
            Retry::Never => false,
        }
    }

    /// One try at a node, the upstream's `at`th. A pooled connection that turns out to be closed does not count: a new one is
    /// made. `SERVER`: of a location's upstream. Each has a copy of its own, which the compiler makes part of its caller.
    async fn attempt<const SERVER: bool>(
        &mut self,
        x: &mut Exchange,
        node: &Node,
        at: usize,
        begun: Instant,
    ) -> Result<Reached> {
        let addr = self.place::<SERVER>(x, node, at, begun).await?;
        let (mut key, tls) = self.key(x, node, addr).await.map_err(|e| fail(x, begun, e))?;
        let from = x.upstream.balancing.as_ref().and_then(|b| b.local);
        if let Some(from) = from {
            key.tls = self.p.local_numbers.of(from, key.tls);
        }
        if let Some(mut conn) = self.p.pool.take(&key, begun) {
            match self.ask(x, node, &mut conn).await {
                Ok(head) => return Ok(Reached { conn, key, head: succeed(x, begun, head), begun }),
                Err(e) if e.kind() == Kind::Closed && self.may_repeat(x, &e) && self.upload.rewind(&x.body) => {}
                Err(e) => return Err(fail(x, begun, e)),
            }
        }
        let mut conn =
            upstream::connect(addr, from, tls.as_ref(), self.times.connect).await.map_err(|e| fail(x, begun, e))?;
        if let Some(last) = x.upstream.tries.last_mut() {
            last.connect_time = Some(begun.elapsed());
        }
        match self.ask(x, node, &mut conn).await {
            Ok(head) => Ok(Reached { conn, key, head: succeed(x, begun, head), begun }),
            Err(e) => Err(fail(x, begun, e)),
        }
    }

    /// The address of the try that begins, which is noted.
    #[inline(always)]
    async fn place<const SERVER: bool>(
        &self,
        x: &mut Exchange,
        node: &Node,
        at: usize,
        begun: Instant,
    ) -> Result<SocketAddr> {
        let addr = match node.ip.filter(|_| x.upstream.peer.is_none()) {
            Some(ip) => Ok(SocketAddr::new(ip, node.port)),
            None => self.address(x, node).await,
        };
        let addr = match addr {
            Ok(addr) => addr,
            // As with APISIX: what has no address was not asked.
            Err(e) if !SERVER => return Err(e),
            Err(e) => {
                push_try(x, SocketAddr::from(([0, 0, 0, 0], node.port)), at);
                return Err(fail(x, begun, e));
            }
        };
        if !SERVER && log::enabled(Level::Info) {
            x.log(Level::Info, format!("proxy request to {addr} while connecting to upstream").as_bytes());
        }
        push_try(x, addr, at);
        Ok(addr)
    }

    async fn address(&self, x: &mut Exchange, node: &Node) -> Result<SocketAddr> {
        // A peer set by a script wins, once.
        let (host, port) = match x.upstream.peer.take() {
            Some((host, port)) => (Cow::Owned(host.into_string()), port),
            None => (Cow::Borrowed(&*node.host), node.port),
        };
        if let Ok(ip) = host.parse() {
            return Ok(SocketAddr::new(ip, port));
        }
        let addresses = self.p.resolver.resolve(&host).await.map_err(|e| unresolved(x, &host).cause(e))?;
        // Not one after the other: names that are asked for in turn would each get every other address.
        let turn = self.p.turn.get().wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.p.turn.set(turn);
        let Some(ip) = addresses.get((turn >> 33) as usize % addresses.len().max(1)) else {
            return Err(unresolved(x, &host).context(format!("{host} has no address")));
        };
        if x.location.is_none() && log::enabled(Level::Info) {
            x.log(Level::Info, format!("dns resolver domain: {host} to {ip}").as_bytes());
        }
        Ok(SocketAddr::new(*ip, port))
    }

    /// The client certificate that the upstream wants to see: its own, or that of an object.
    fn client_pair<'x>(&'x self, x: &'x Exchange) -> Option<&'x tls::secrets::Pair> {
        let settings = self.conf.tls.as_deref()?;
        let of_id = || x.snapshot.ssls.get(settings.client_cert_id.as_ref()?)?.value.pairs.first();
        settings.client_pair.as_ref().or_else(of_id)
    }

    /// Which pooled connections will do, and how to make one that does. Waits only where a manager of secrets has the client certificate.
    #[inline(always)]
    async fn key(&self, x: &Exchange, node: &Node, addr: SocketAddr) -> Result<(Key, Option<Tls>)> {
        let alpn: &[&'static [u8]] = match Spoken::of(x, self.conf) {
            Some(Spoken { tls: true, http2 }) => {
                if http2 {
                    &[b"h2"]
                } else {
                    &[]
                }
            }
            _ => return Ok((Key { addr, tls: 0 }, None)),
        };
        let settings = self.conf.tls.as_deref();
        let pair = self.client_pair(x);
        let fetched = match pair.is_some_and(tls::secrets::has_managed) {
            // Boxed: nearly no upstream has it, and each request would carry its place.
            true => Box::pin(tls::secrets::fetched_pair(pair, self.p)).await?,
            false => None,
        };
        let pair = fetched.as_ref().or(pair).map(|(cert, key)| (&**cert, &**key));
        let config = tls::client_config(settings.is_some_and(|t| t.verify), pair, alpn)?;
        let name = server_name(x, node);
        let number = self.p.tls_numbers.of(&name, &config);
        let name = ServerName::try_from(name.into_string())
            .map_err(|e| Error::upstream(Kind::Tls).cause(e).context("server name for TLS to the upstream"))?;
        Ok((Key { addr, tls: number }, Some(Tls { config, name })))
    }

    /// Sends the request on `conn` and waits for the response's head.
    async fn ask(&mut self, x: &mut Exchange, node: &Node, conn: &mut Conn) -> Result<Head> {
        conn.begin();
        if let Some(last) = x.upstream.tries.last_mut() {
            last.reused = conn.requests() > 1;
        }
        head::write(x, node, self.framing, self.websocket, self.upload.head_mut())?;
        self.upload.resend_kept();
        poll_fn(|cx| self.poll_head(cx, x, conn)).await
    }

    fn poll_head(&mut self, cx: &mut Context<'_>, x: &mut Exchange, conn: &mut Conn) -> Poll<Result<Head>> {
        let to_head = x.request.method == b"HEAD";
        let mut broken = None;
        if !self.upload.is_done() {
            match self.upload.poll(cx, conn, &mut x.client, self.times.send) {
                Poll::Ready(Err(e)) if e.origin() == Origin::Upstream => broken = Some(e),
                Poll::Ready(Err(e)) => return Poll::Ready(Err(e)),
                Poll::Ready(Ok(())) | Poll::Pending => {}
            }
        }
        // A node may answer before it has read everything, and then close: its answer counts.
        let limit = self.upload.is_done().then_some(self.times.read);
        for _ in 0..MAX_INTERIM {
            match conn.poll_head(cx, limit, to_head, &mut x.response) {
                Poll::Ready(Ok(head)) if head.is_interim() => continue,
                Poll::Ready(Ok(head)) => return Poll::Ready(Ok(head)),
                Poll::Ready(Err(e)) => return Poll::Ready(Err(broken.unwrap_or(e))),
                Poll::Pending => {}
            }
            if let Some(e) = broken {
                return Poll::Ready(Err(e));
            }
            // Until all of the request is sent, the wait may be the client's own.
            return match !self.upload.is_done() || conn.is_slow() {
                true => poll_client(cx, &mut x.client),
                false => Poll::Pending,
            };
        }
        Poll::Ready(Err(Error::upstream(Kind::Malformed).context("too many interim responses from the upstream")))
    }

    /// The response, through the filters, to the client.
    async fn relay(&mut self, x: &mut Exchange, conn: &mut Conn, head: Head) -> Result<()> {
        x.response.status = head.status;
        x.response.source = Source::Upstream;
        if self.p.runner.mask(x) != PhaseMask::default() {
            x.upstream.headers.clone_from(&x.response.headers);
            if let Some(last) = x.upstream.tries.last_mut() {
                (last.bytes_received, last.bytes_sent) = (conn.received(), conn.sent());
            }
            self.waited = true;
        }
        let passes = x.location.as_ref().is_some_and(|location| location.directives.proxy_pass_server);
        if !passes || !x.response.headers.contains(b"server") {
            x.response.headers.set_sound(b"Server", self.p.settings.server.as_bytes());
        }
        add_early(&mut x.response);
        super::location::add_headers(x);
        rescue::upstream_status(self.p, x);
        output::filter_head(x, &self.p.runner).await?;
        let length = output::remaining_length(x);
        output::send_head(x, length)?;
        if x.header_only {
            // The rest is closed away with its connection.
        } else if output::changes_body(x, &self.p.runner) {
            self.relay_filtered(x, conn).await?;
        } else {
            poll_fn(|cx| {
                let relayed = self.poll_relay(cx, x, conn);
                self.waited |= relayed.is_pending();
                relayed
            })
            .await?;
        }
        output::finish(x).await?;
        if matches!(x.body, RequestBody::Streaming { .. }) && self.upload.is_done() {
            x.body = RequestBody::Consumed;
        }
        Ok(())
    }

    /// Piece by piece without a copy of our own: what the client takes from the connection's buffer is used up.
    fn poll_relay(&mut self, cx: &mut Context<'_>, x: &mut Exchange, conn: &mut Conn) -> Poll<Result<()>> {
        loop {
            self.poll_rest_of_request(cx, x, conn)?;
            match conn.poll_body(cx, self.times.read) {
                Poll::Ready(Ok(false)) => return Poll::Ready(Ok(())),
                Poll::Ready(Ok(true)) => {
                    let Some(client) = &mut x.client else { return Poll::Ready(Err(Error::client(Kind::Closed))) };
                    let n = ready!(client.poll_write(cx, conn.data()))?;
                    conn.consume(n);
                    x.body_bytes_sent += n as u64;
                }
                Poll::Ready(Err(e)) => return Poll::Ready(Err(e)),
                Poll::Pending => return poll_idle(cx, x, conn),
            }
        }
    }

    /// What is left of the request goes on while the response comes. A node that no longer reads it is not an error now.
    fn poll_rest_of_request(&mut self, cx: &mut Context<'_>, x: &mut Exchange, conn: &mut Conn) -> Result<()> {
        if self.upload.is_done() {
            return Ok(());
        }
        match self.upload.poll(cx, conn, &mut x.client, self.times.send) {
            Poll::Ready(Err(e)) if e.origin() == Origin::Client => Err(e),
            _ => Ok(()),
        }
    }

    /// Through the body filters: each piece is theirs to change, and they may wait.
    async fn relay_filtered(&mut self, x: &mut Exchange, conn: &mut Conn) -> Result<()> {
        loop {
            let piece = poll_fn(|cx| {
                self.poll_rest_of_request(cx, x, conn)?;
                match conn.poll_body(cx, self.times.read) {
                    Poll::Pending => poll_idle(cx, x, conn),
                    ready => ready,
                }
            })
            .await?;
            x.chunk.data.clear();
            if piece {
                x.chunk.data.extend_from_slice(conn.data());
                let n = conn.data().len();
                conn.consume(n);
                if let Some(last) = x.upstream.tries.last_mut() {
                    last.response_length = conn.taken();
                }
            }
            x.chunk.eof = conn.is_done()?;
            output::chunk(x, &self.p.runner).await?;
            if x.chunk.eof {
                return Ok(());
            }
        }
    }

    /// `101`: from here on bytes are only passed on.
    async fn switch(&mut self, x: &mut Exchange, conn: Box<Conn>) -> Result<()> {
        if !self.websocket {
            return Err(
                Error::upstream(Kind::Malformed).context("the upstream switches protocols that nobody asked for")
            );
        }
        x.response.status = 101;
        x.response.source = Source::Upstream;
        let upgrade = x.request.headers.get("upgrade").unwrap_or(b"websocket").to_vec();
        x.response.headers.set("Upgrade", upgrade);
        output::filter_head(x, &self.p.runner).await?;
        output::send_head(x, crate::exchange::BodyLength::None)?;
        tunnel::run(x, conn, self.times.read).await
    }
}

/// The node has nothing now: send what is queued, and look after the client. The node's time is its connection's to watch.
fn poll_idle<T>(cx: &mut Context<'_>, x: &mut Exchange, conn: &Conn) -> Poll<Result<T>> {
    if let Some(client) = &mut x.client
        && let Poll::Ready(Err(e)) = client.poll_flush(cx)
    {
        return Poll::Ready(Err(e));
    }
    if conn.is_slow() { poll_client(cx, &mut x.client) } else { Poll::Pending }
}

/// Ready when nobody waits for the response any more.
fn poll_client<T>(cx: &mut Context<'_>, client: &mut Option<Box<dyn Client>>) -> Poll<Result<T>> {
    if client.as_mut().is_none_or(|c| c.poll_gone(cx).is_ready()) {
        return Poll::Ready(Err(Error::client(Kind::Closed).context("client prematurely closed connection")));
    }
    Poll::Pending
}

/// Whose upstream it is that stands inside a route or a service.
fn owner(x: &Exchange, conf: &Upstream) -> Option<Owner> {
    // What a registry has found is whose upstream has asked it.
    let written = conf.discovery.as_ref().map(|discovery| discovery.uid);
    let is_it = |upstream: &Option<Arc<Upstream>>| {
        upstream.as_ref().is_some_and(|u| std::ptr::eq(&**u, conf) || Some(u.uid) == written)
    };
    let matched = x.matched.as_ref().filter(|_| has_memory(&conf.balance) || conf.checks.is_some())?;
    let route = matched.route();
    if is_it(&route.value.upstream) {
        return Some(Owner::Route(route.id.clone()));
    }
    let service = matched.service.as_ref().filter(|service| is_it(&service.value.upstream))?;
    Some(Owner::Service(service.id.clone()))
}

/// A name without an address: nginx's words and 502 for a location, APISIX's and 503 for a route.
fn unresolved(x: &Exchange, host: &str) -> Error {
    let (kind, text) = match x.location {
        Some(_) => (Kind::Resolve, format!("{host} could not be resolved")),
        None => (Kind::NoNode, format!("failed to parse domain: {host}")),
    };
    Error::upstream(kind).retry(Retry::Safe).context(text)
}

/// Says, where info is wanted, that nodes of a higher priority than that of the chosen one were passed over.
fn tell_skipped(x: &Exchange, conf: &Upstream, at: usize) {
    if conf.nodes.len() == 1 || !log::enabled(Level::Info) {
        return;
    }
    let chosen = conf.nodes[at].priority;
    let mut higher: Vec<i64> =
        conf.nodes.iter().filter(|n| n.weight > 0 && n.priority > chosen).map(|n| n.priority).collect();
    higher.sort_unstable_by(|a, b| b.cmp(a));
    higher.dedup();
    for priority in higher {
        let text = format!("failed to get server from current priority {priority}, try next one");
        x.log(Level::Info, text.as_bytes());
    }
}

fn push_try(x: &mut Exchange, addr: SocketAddr, node: usize) {
    let another_group = std::mem::take(&mut x.upstream.another_group);
    x.upstream.tries.push(Try {
        addr,
        node,
        another_group,
        status: 0,
        connect_time: None,
        header_time: None,
        response_time: None,
        bytes_sent: 0,
        bytes_received: 0,
        response_length: 0,
        reused: false,
    });
}

fn succeed(x: &mut Exchange, begun: Instant, head: Head) -> Head {
    if let Some(last) = x.upstream.tries.last_mut() {
        last.status = head.status;
        last.header_time = Some(begun.elapsed());
        last.connect_time.get_or_insert(Duration::ZERO);
    }
    head
}

fn fail(x: &mut Exchange, begun: Instant, e: Error) -> Error {
    let late = matches!(e.kind(), Kind::ConnectTimeout | Kind::Busy | Kind::ReadTimeout | Kind::WriteTimeout);
    if let Some(last) = x.upstream.tries.last_mut() {
        // A client that did not wait says nothing of the node.
        last.status = if e.origin() == Origin::Client {
            0
        } else if late {
            504
        } else {
            502
        };
        last.response_time = Some(begun.elapsed());
    }
    e
}

/// What a script has set, else the route's `timeout`, else the upstream's, else nginx's.
#[inline(always)]
fn timeouts(p: &Proxy, x: &Exchange, conf: &Upstream) -> Timeouts {
    let configured = configured_timeouts(p, x, conf);
    let [connect, send, read] = x.upstream.timeouts;
    Timeouts {
        connect: connect.unwrap_or(configured.connect),
        send: send.unwrap_or(configured.send),
        read: read.unwrap_or(configured.read),
    }
}

fn configured_timeouts(p: &Proxy, x: &Exchange, conf: &Upstream) -> Timeouts {
    if let Some(location) = &x.location {
        let (set, default) = (location.directives.proxy, p.settings.timeout);
        return Timeouts {
            connect: set.connect.unwrap_or(default.connect),
            send: set.send.unwrap_or(default.send),
            read: set.read.unwrap_or(default.read),
        };
    }
    let matched = x.matched.as_ref().filter(|m| m.found.plain_upstream().is_none());
    let route = matched.and_then(|m| m.route().value.timeout.as_deref());
    *route.or(conf.timeout.as_deref()).unwrap_or(&p.settings.timeout)
}

fn keepalive(p: &Proxy, x: &Exchange, conf: &Upstream) -> Keepalive {
    let set = *conf.keepalive.as_deref().unwrap_or(&p.settings.keepalive);
    x.upstream.keepalive.map_or(set, |(idle_timeout, requests)| Keepalive { idle_timeout, requests, ..set })
}

/// The name for SNI and verification: a script's, else the Host that is sent, without its port.
fn server_name(x: &Exchange, node: &Node) -> Box<str> {
    if let Some(name) = x.upstream.balancing.as_ref().and_then(|b| b.tls_name.clone()) {
        return name;
    }
    let host = if x.upstream.host.is_empty() { &x.request.host } else { &x.upstream.host };
    let text = String::from_utf8_lossy(host);
    let name = match x.upstream.conf.as_deref().map(|c| &c.pass_host) {
        Some(crate::model::upstream::PassHost::Node) => Cow::Borrowed(&*node.host),
        Some(crate::model::upstream::PassHost::Rewrite(host)) => Cow::Borrowed(&**host),
        _ => text,
    };
    name.rsplit_once(':').filter(|(_, port)| port.bytes().all(|b| b.is_ascii_digit())).map_or(&*name, |(h, _)| h).into()
}

fn is_websocket(x: &Exchange) -> bool {
    if !x.request.upgrade {
        return false;
    }
    let Some(matched) = &x.matched else { return false };
    let of_service = matched.service.as_ref().and_then(|s| s.value.enable_websocket);
    matched.route().value.enable_websocket.or(of_service).unwrap_or(false)
}

/// Adds what plugins have set before; what describes the body is the node's to say. It stays there for the page of an error.
fn add_early(response: &mut Response) {
    for (name, value) in response.early.iter() {
        let is = |other: &[u8]| same_name(name, other);
        match name.len() {
            6 if is(b"server") => response.headers.set(name, value),
            12 if is(b"content-type") && response.headers.contains(name) => {}
            14 if is(b"content-length") && response.headers.contains(name) => {}
            16 if is(b"content-encoding") && response.headers.contains(name) => {}
            _ => response.headers.append(name, value),
        }
    }
}

/// What chash hashes; empty for the other policies. A key without a value falls back to the client's address, as APISIX does.
fn hash_key(x: &Exchange, conf: &Upstream) -> Vec<u8> {
    let Balance::Chash { on, key } = &conf.balance else { return Vec::new() };
    let (name, value) = match on {
        HashOn::Consumer => ("consumer", x.consumer.as_ref().map(|c| c.value.username.as_bytes().to_vec())),
        HashOn::Header => ("header", variable(x, &format!("http_{}", key.replace('-', "_")))),
        HashOn::Cookie => ("cookie", variable(x, &format!("cookie_{key}"))),
        HashOn::Vars => ("vars", variable(x, key)),
        HashOn::VarsCombinations => ("vars_combinations", combination(x, key)),
    };
    let value = value.filter(|v| !v.is_empty());
    let missing = value.is_none();
    let value = value.or_else(|| variable(x, "remote_addr")).unwrap_or_default();
    if log::enabled(Level::Info) {
        let text = String::from_utf8_lossy(&value);
        if missing {
            let line = format!("chash_key fetch is nil, use default chash_key remote_addr: {text}");
            x.log(Level::Info, line.as_bytes());
        }
        x.log(Level::Info, format!("hash_on: {name}").as_bytes());
        x.log(Level::Info, format!("chash_key: {}", serde_json::Value::from(text)).as_bytes());
    }
    value
}

fn variable(x: &Exchange, name: &str) -> Option<Vec<u8>> {
    x.var(&Var::parse(name), &mut Vec::new()).map(<[u8]>::to_vec)
}

/// `$request_uri$remote_addr`: texts and variables in turn. `None`: none of its variables has a value.
fn combination(x: &Exchange, key: &str) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let mut parts = key.split('$');
    out.extend_from_slice(parts.next().unwrap_or("").as_bytes());
    let mut any = false;
    for part in parts {
        let end = part.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(part.len());
        if let Some(value) = variable(x, &part[..end]) {
            any = true;
            out.extend_from_slice(&value);
        }
        out.extend_from_slice(&part.as_bytes()[end..]);
    }
    any.then_some(out)
}
