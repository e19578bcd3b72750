//! The path of a request, from its head to its log line.
//!
//! `request` is the path from top to bottom, `forward` speaks to the upstream, `head` writes what goes there, `rescue` turns
//! errors into answers. Nothing here names a VM: plugins are `plugin::run` and an `Exchange`.

pub mod access_log;
mod asked;
mod capture;
mod files;
pub mod forward;
mod forwarded;
pub mod handshake;
pub mod head;
mod kept;
mod location;
pub mod real_ip;
pub mod request;
pub mod rescue;
mod servlet;
pub mod tunnel;
pub mod upload;
mod watch;

use std::{
    cell::{Cell, OnceCell, RefCell},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use forward::servers::Named;
use hashbrown::HashMap;
use ipnet::IpNet;
use kept::{LocalNumbers, TlsNumbers};

use crate::{
    balancer::Pickers,
    conf::locations::{Locations, Rewrite, Script},
    dns::Resolver,
    exchange::{Exchange, host::Host},
    health::Watched,
    location::Chooser,
    model,
    net::Handler,
    plugin::run::Runner,
    store::{Published, Snapshot},
    upstream::{self, Pool},
};

/// What config.yaml says about proxying.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The `Server` field.
    pub server: String,
    pub delete_uri_tail_slash: bool,
    pub normalize_uri_like_servlet: bool,
    /// `%2F` in a path is no slash to routes.
    pub match_uri_encoded_slash: bool,
    /// The longest body that is looked at for `graphql_*`, in bytes.
    pub graphql_max: u64,
    /// The longest body that is looked at for `post_arg`, in bytes.
    pub posted_max: u64,
    /// `X-APISIX-Upstream-Status` on every response, not only on 5xx.
    pub show_upstream_status: bool,
    /// For upstreams without a `keepalive_pool` of their own.
    pub keepalive: model::upstream::Keepalive,
    /// For upstreams and routes without a `timeout` of their own.
    pub timeout: model::route::Timeouts,
    /// From these `X-Forwarded-*` is taken as it comes.
    pub trusted: Vec<IpNet>,
    /// Whose word counts about where a request comes from.
    pub real_ip: crate::conf::RealIp,
}

/// nginx's `proxy_*_timeout`, which APISIX leaves as they are.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);

/// Called when a request is over: its log line and its counters.
pub trait Ending {
    fn ended(&self, x: &Exchange, runner: &Runner);
}

/// The proxy of one worker.
pub struct Proxy {
    pub settings: Settings,
    pub published: Arc<Published>,
    pub runner: Runner,
    pub locations: Chooser,
    pub resolver: Arc<Resolver>,
    pub pool: Pool,
    /// To nodes of gRPC.
    pub http2: upstream::h2::Connections,
    /// Tried, and run, before a location is chosen.
    server_rewrites: Vec<Rewrite>,
    server_rewrite: Option<Arc<Script>>,
    /// `lua_upstreams` and what else locations name, by name.
    upstreams: HashMap<Box<str>, Rc<Named>>,
    /// What scripts reach the proxy by; made with the first request that has any.
    host: OnceCell<Rc<dyn Host>>,
    ending: Box<dyn Ending>,
    current: RefCell<Arc<Snapshot>>,
    version: Cell<u64>,
    pickers: Pickers,
    /// Whose nodes' health is known.
    watched: Watched,
    /// Spreads requests over the addresses of a name: the state of a linear congruential generator.
    turn: Cell<u64>,
    tls_numbers: TlsNumbers,
    local_numbers: LocalNumbers,
}

impl Proxy {
    pub fn new(
        settings: Settings,
        published: Arc<Published>,
        runner: Runner,
        locations: &Locations,
        resolver: Arc<Resolver>,
        watched: Watched,
        ending: Box<dyn Ending>,
    ) -> Self {
        let current = published.load();
        Proxy {
            upstreams: forward::servers::named(locations, runner.groups()),
            settings,
            runner,
            locations: Chooser::new(&locations.list, locations.rest.clone()),
            server_rewrites: locations.server_rewrites.clone(),
            server_rewrite: locations.server_rewrite.clone(),
            host: OnceCell::new(),
            resolver,
            pool: Pool::default(),
            http2: upstream::h2::Connections::default(),
            tls_numbers: TlsNumbers::default(),
            local_numbers: LocalNumbers::default(),
            ending,
            version: Cell::new(current.version),
            current: RefCell::new(current),
            published,
            pickers: Pickers::default(),
            watched,
            turn: Cell::new(0),
        }
    }

    /// The configuration that a request which starts now is served by.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        if self.published.version() != self.version.get() {
            let next = self.published.load();
            self.version.set(next.version);
            *self.current.borrow_mut() = next;
        }
        self.current.borrow().clone()
    }

    /// Whether a request that starts now is served by a revision, or a later one, with the plugins that it has.
    pub fn serves(&self, revision: i64) -> bool {
        let snapshot = self.snapshot();
        snapshot.revision >= revision && self.runner.keeps_up(&snapshot)
    }

    fn pin(&self, x: &mut Exchange) {
        if self.published.version() == x.snapshot.version {
            return;
        }
        x.snapshot = self.snapshot();
    }
}

impl Handler for Rc<Proxy> {
    fn expect<'a>(&self, path: impl FnOnce() -> &'a [u8]) {
        self.current.borrow().router.expect(path);
    }

    async fn handle(&self, mut x: Box<Exchange>) -> Box<Exchange> {
        request::serve(self, &mut x).await;
        x
    }

    async fn reject(&self, mut x: Box<Exchange>, why: &'static str) -> Box<Exchange> {
        request::reject(self, &mut x, why).await;
        x
    }
}
