//! Connections that wait for their next request, per worker.
//!
//! The last one put in is the first one out: the others grow old and are closed. A connection that the node closed
//! is noticed when it is taken or by the next sweep.

use std::{
    cell::{Cell, RefCell},
    net::SocketAddr,
    time::{Duration, Instant},
};

use hashbrown::HashMap;

use super::Conn;
use crate::model::upstream::Keepalive;

/// What `nginx_config.http.upstream` says where an upstream has no `keepalive_pool`: 320 per node, 60 s, 1000 requests.
pub const KEEPALIVE: Keepalive = Keepalive { size: 320, idle_timeout: Duration::from_secs(60), requests: 1000 };

/// Idle connections of a worker to all nodes together, so that thousands of nodes cannot use up its file descriptors.
const IDLE_MAX: usize = 4096;

/// Connections that may stand in for each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    pub addr: SocketAddr,
    /// 0 without TLS; else one number per (name, verification, client certificate).
    pub tls: u64,
}

/// Connections are boxed: they go from hand to hand with each request.
struct Idle {
    conn: Box<Conn>,
    since: Instant,
    timeout: Duration,
}

#[derive(Default)]
pub struct Pool {
    idle: RefCell<HashMap<Key, Vec<Idle>>>,
    count: Cell<usize>,
}

impl Pool {
    /// An idle connection that is still open.
    pub fn take(&self, key: &Key, now: Instant) -> Option<Box<Conn>> {
        let mut idle = self.idle.borrow_mut();
        let waiting = idle.get_mut(key)?;
        while let Some(mut next) = waiting.pop() {
            self.count.set(self.count.get() - 1);
            if now.saturating_duration_since(next.since) < next.timeout && next.conn.is_alive() {
                return Some(next.conn);
            }
        }
        None
    }

    /// Keeps a connection whose response was read to its end, if it may be kept.
    pub fn put(&self, key: Key, mut conn: Box<Conn>, keepalive: &Keepalive, now: Instant) {
        if !conn.is_reusable() || conn.requests() >= keepalive.requests || self.count.get() >= IDLE_MAX {
            return;
        }
        let mut idle = self.idle.borrow_mut();
        let waiting = idle.entry(key).or_default();
        if waiting.len() >= keepalive.size {
            return;
        }
        conn.rest();
        waiting.push(Idle { conn, since: now, timeout: keepalive.idle_timeout });
        self.count.set(self.count.get() + 1);
    }

    /// Closes what is too old or was closed by its node. To be called now and then.
    pub fn sweep(&self, now: Instant) {
        let mut idle = self.idle.borrow_mut();
        for waiting in idle.values_mut() {
            waiting.retain_mut(|i| now.saturating_duration_since(i.since) < i.timeout && i.conn.is_alive());
        }
        idle.retain(|_, waiting| !waiting.is_empty());
        self.count.set(idle.values().map(Vec::len).sum());
    }

    /// Closes all idle connections: the worker ends.
    pub fn clear(&self) {
        self.idle.borrow_mut().clear();
        self.count.set(0);
    }

    pub fn len(&self) -> usize {
        self.count.get()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
