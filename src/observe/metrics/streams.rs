//! What streams do: sessions and bytes by listening address, and how the sessions of routes with the plugin have ended.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use super::{
    Metrics,
    custom::{Change, Family},
    lock,
    page::Page,
};
use crate::error::Result;

/// The listeners' counts. There are as many as config.yaml has ports, 1024 at most.
#[derive(Default)]
pub(super) struct Listeners(Mutex<BTreeMap<SocketAddr, Arc<Listening>>>);

/// Counts of one listening address, of all workers together: each adds some times per 16 KB or datagram.
#[derive(Debug, Default)]
pub struct Listening {
    active: AtomicU64,
    from_client: AtomicU64,
    to_client: AtomicU64,
    from_node: AtomicU64,
    to_node: AtomicU64,
}

/// A session that lasts, until it is dropped.
#[derive(Debug)]
pub struct Active(Arc<Listening>);

impl Listening {
    pub fn session(self: &Arc<Self>) -> Active {
        self.active.fetch_add(1, Relaxed);
        Active(self.clone())
    }

    /// Bytes that were read from the client, and written to the node.
    pub fn up(&self, read: u64, written: u64) {
        add(&self.from_client, read);
        add(&self.to_node, written);
    }

    /// Bytes that were read from the node, and written to the client.
    pub fn down(&self, read: u64, written: u64) {
        add(&self.from_node, read);
        add(&self.to_client, written);
    }
}

fn add(count: &AtomicU64, n: u64) {
    if n != 0 {
        count.fetch_add(n, Relaxed);
    }
}

impl Active {
    pub fn listening(&self) -> &Listening {
        &self.0
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Relaxed);
    }
}

/// The two metrics that a session adds to when it is over.
#[derive(Clone)]
pub struct Ends {
    total: Arc<Family>,
    status: Arc<Family>,
}

impl Ends {
    pub fn of(metrics: &Metrics) -> Result<Ends> {
        let total = "Total number of connections handled per stream route in APISIX";
        let status = "Stream sessions per termination status in APISIX";
        let labels = ["code", "listen_addr", "node"];
        Ok(Ends {
            total: metrics.counter("stream_connection_total", total, &["route"])?,
            status: metrics.counter("stream_status", status, &labels)?,
        })
    }

    /// `node`: the last one that was tried.
    pub fn ended(&self, route: &str, code: u16, listening: SocketAddr, node: Option<SocketAddr>) {
        let node = node.map_or_else(String::new, |node| node.to_string());
        // One session too many for the labels is counted no more.
        let _ = self.total.change(&[route.as_bytes()], Change::Inc(1.0));
        let (code, listening) = (code.to_string(), listening.to_string());
        let _ = self.status.change(&[code.as_bytes(), listening.as_bytes(), node.as_bytes()], Change::Inc(1.0));
    }
}

impl Listeners {
    pub fn at(&self, addr: SocketAddr) -> Arc<Listening> {
        lock(&self.0).entry(addr).or_default().clone()
    }

    pub fn write(&self, page: &mut Page) {
        for (addr, counts) in lock(&self.0).iter() {
            let addr = addr.to_string();
            let help = "Number of stream sessions currently being proxied per listening address";
            let active = counts.active.load(Relaxed) as f64;
            page.gauge("stream_active_connections", help, &[("listen_addr", &addr)], active);
            let ways = [
                ("ingress", "downstream", &counts.from_client),
                ("egress", "downstream", &counts.to_client),
                ("ingress", "upstream", &counts.from_node),
                ("egress", "upstream", &counts.to_node),
            ];
            for (way, side, bytes) in ways {
                let help = "Total bandwidth in bytes proxied by the stream subsystem in APISIX";
                let labels = [("listen_addr", &*addr), ("type", way), ("side", side)];
                page.counter("stream_bandwidth", help, &labels, bytes.load(Relaxed));
            }
        }
    }
}
