//! The path of a request, from its head to its log line.
//!
//! `request` is the path from top to bottom, `forward` speaks to the upstream, `head` writes what goes there, `rescue` turns
//! errors into answers. Nothing here names a VM: plugins are `plugin::run` and an `Exchange`.

pub mod access_log;
mod capture;
pub mod forward;
mod forwarded;
pub mod head;
mod location;
pub mod real_ip;
pub mod request;
pub mod rescue;
mod servlet;
pub mod tunnel;
pub mod upload;

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use hashbrown::HashMap;
use ipnet::IpNet;

use crate::{
    balancer::Picker,
    conf::locations::Locations,
    dns::Resolver,
    exchange::Exchange,
    location::Chooser,
    model,
    net::Handler,
    plugin::run::Runner,
    store::{Published, Snapshot},
    upstream::Pool,
};

/// What config.yaml says about proxying.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The `Server` field.
    pub server: String,
    pub delete_uri_tail_slash: bool,
    pub normalize_uri_like_servlet: bool,
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
    /// `lua_upstreams`, by name.
    upstreams: HashMap<String, Arc<model::Upstream>>,
    ending: Box<dyn Ending>,
    current: RefCell<Arc<Snapshot>>,
    version: Cell<u64>,
    /// By `Upstream::uid`. Swept when the configuration changes.
    pickers: RefCell<HashMap<u64, Rc<Picked>>>,
    buffers: RefCell<Vec<Vec<u8>>>,
    /// Spreads requests over the addresses of a name: the state of a linear congruential generator.
    turn: Cell<u64>,
    /// A number per TLS name and settings, for the pool's keys. The settings are held so that no others get their address.
    tls_numbers: RefCell<HashMap<(Box<str>, usize), TlsNumber>>,
}

type TlsNumber = (u64, Arc<rustls::ClientConfig>);

/// An upstream's balancer state, and when it was last used.
struct Picked {
    picker: Picker,
    used: Cell<Instant>,
}

/// Upstreams whose balancer state is kept; past it those not used for `PICKER_IDLE` go.
const MAX_PICKERS: usize = 10_000;
const PICKER_IDLE: Duration = Duration::from_secs(60);
/// Buffers kept for request heads and bodies on their way up.
const KEPT_BUFFERS: usize = 64;
const KEPT_BUFFER_SIZE: usize = 64 * 1024;

impl Proxy {
    pub fn new(
        settings: Settings,
        published: Arc<Published>,
        runner: Runner,
        locations: &Locations,
        resolver: Arc<Resolver>,
        ending: Box<dyn Ending>,
    ) -> Self {
        let current = published.load();
        Proxy {
            settings,
            runner,
            locations: Chooser::new(&locations.list),
            upstreams: location::upstreams(locations),
            resolver,
            pool: Pool::default(),
            tls_numbers: RefCell::default(),
            ending,
            version: Cell::new(current.version),
            current: RefCell::new(current),
            published,
            pickers: RefCell::default(),
            buffers: RefCell::default(),
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

    fn pin(&self, x: &mut Exchange) {
        if self.published.version() == x.snapshot.version {
            return;
        }
        x.snapshot = self.snapshot();
    }

    /// The balancer's state for an upstream.
    fn picker(&self, upstream: &model::Upstream) -> Rc<Picked> {
        let mut pickers = self.pickers.borrow_mut();
        if let Some(picked) = pickers.get(&upstream.uid) {
            return picked.clone();
        }
        let now = Instant::now();
        if pickers.len() >= MAX_PICKERS {
            pickers.retain(|_, picked| now.duration_since(picked.used.get()) < PICKER_IDLE);
        }
        let picked = Rc::new(Picked { picker: Picker::new(upstream), used: Cell::new(now) });
        if pickers.len() < MAX_PICKERS {
            pickers.insert(upstream.uid, picked.clone());
        }
        picked
    }

    /// Connections with the same number may stand in for each other.
    fn tls_number(&self, name: &str, config: &Arc<rustls::ClientConfig>) -> u64 {
        let key = (Box::from(name), Arc::as_ptr(config) as usize);
        let mut numbers = self.tls_numbers.borrow_mut();
        if numbers.len() >= MAX_PICKERS {
            // Numbers are never reused, so connections under forgotten ones only grow old.
            numbers.clear();
        }
        numbers.entry(key).or_insert_with(|| (model::next_uid(), config.clone())).0
    }

    fn take_buffer(&self) -> Vec<u8> {
        self.buffers.borrow_mut().pop().unwrap_or_default()
    }

    fn put_buffer(&self, mut buffer: Vec<u8>) {
        let mut buffers = self.buffers.borrow_mut();
        if buffer.capacity() <= KEPT_BUFFER_SIZE && buffers.len() < KEPT_BUFFERS {
            buffer.clear();
            buffers.push(buffer);
        }
    }
}

impl Handler for Rc<Proxy> {
    async fn handle(&self, mut x: Box<Exchange>) -> Box<Exchange> {
        request::serve(self, &mut x).await;
        x
    }

    async fn reject(&self, mut x: Box<Exchange>, why: &'static str) -> Box<Exchange> {
        request::reject(self, &mut x, why).await;
        x
    }
}
