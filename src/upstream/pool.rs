//! Connections that wait for their next request, per worker.
//!
//! The last one put in is the first one out: the others grow old and are closed. A connection that the node closed
//! is noticed when it is taken or by the next sweep.

use std::{
    cell::{Cell, RefCell},
    hash::{Hash, Hasher},
    net::{IpAddr, SocketAddr},
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    pub addr: SocketAddr,
    /// 0 without TLS; else one number per (name, verification, client certificate).
    pub tls: u64,
}

/// By address, port and number alone: what else belongs to an IPv6 address hardly ever tells two apart.
impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let place = (u64::from(self.addr.port()) << 48) ^ self.tls;
        match self.addr.ip() {
            IpAddr::V4(ip) => state.write_u64(place ^ u64::from(ip.to_bits())),
            IpAddr::V6(ip) => {
                state.write_u64(place);
                state.write_u128(ip.to_bits());
            }
        }
    }
}

/// Connections are boxed: they go from hand to hand with each request.
struct Idle {
    conn: Box<Conn>,
    since: Instant,
    timeout: Duration,
}

pub struct Pool {
    idle: RefCell<HashMap<Key, Vec<Idle>>>,
    count: Cell<usize>,
    max: usize,
}

impl Default for Pool {
    fn default() -> Self {
        Pool::new(IDLE_MAX)
    }
}

impl Pool {
    /// `max`: idle connections in all.
    fn new(max: usize) -> Self {
        Pool { idle: RefCell::default(), count: Cell::new(0), max }
    }

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
        if !conn.is_reusable() || conn.requests() >= keepalive.requests || self.count.get() >= self.max {
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

#[cfg(test)]
mod tests {
    use std::{
        future::poll_fn,
        net::{Ipv4Addr, TcpListener},
    };

    use tokio::{io::AsyncReadExt, net::TcpStream};

    use super::*;
    use crate::{exchange::Response, upstream::Stream};

    /// Runs `test` as a worker runs: connections set their deadlines in local tasks.
    fn on_a_worker(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        tokio::task::LocalSet::new().block_on(&runtime, test);
    }

    /// A node that answers each connection once and keeps it open.
    struct Node {
        listener: tokio::net::TcpListener,
        key: Key,
        open: Vec<TcpStream>,
    }

    impl Node {
        fn new() -> Node {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
            listener.set_nonblocking(true).expect("is a socket");
            let addr = listener.local_addr().expect("an address");
            let listener = tokio::net::TcpListener::from_std(listener).expect("a runtime");
            Node { listener, key: Key { addr, tls: 0 }, open: Vec::new() }
        }

        /// A connection that has had its answer.
        async fn used(&mut self) -> Box<Conn> {
            let stream = TcpStream::connect(self.key.addr).await.expect("connects");
            let (node, _) = self.listener.accept().await.expect("accepts");
            let mut conn = Box::new(Conn::new(Stream::Tcp(crate::tcp::Stream::new(stream))));
            conn.begin();
            node.try_write(b"HTTP/1.1 204 No Content\r\n\r\n").expect("is sent");
            self.open.push(node);
            let mut response = Response::default();
            poll_fn(|cx| conn.poll_head(cx, Some(Duration::from_secs(10)), false, &mut response))
                .await
                .expect("a head");
            conn
        }

        /// Whether the gateway has closed its nth connection.
        async fn sees_the_end(&mut self, nth: usize) {
            assert_eq!(self.open[nth].read(&mut [0; 9]).await.expect("an end"), 0);
        }
    }

    #[test]
    fn connections_to_all_nodes_together_are_bounded() {
        on_a_worker(async {
            let (pool, now) = (Pool::new(3), Instant::now());
            let (mut a, mut b) = (Node::new(), Node::new());
            for _ in 0..2 {
                pool.put(a.key, a.used().await, &KEEPALIVE, now);
            }
            pool.put(b.key, b.used().await, &KEEPALIVE, now);
            for node in [&mut a, &mut b] {
                pool.put(node.key, node.used().await, &KEEPALIVE, now);
                assert_eq!(pool.len(), 3);
            }
            a.sees_the_end(2).await;
            b.sees_the_end(1).await;
            assert!(pool.take(&a.key, now).is_some());
            pool.put(b.key, b.used().await, &KEEPALIVE, now);
            assert_eq!(pool.len(), 3, "there was room again");
            pool.sweep(now + KEEPALIVE.idle_timeout);
            assert!(pool.is_empty() && pool.idle.borrow().is_empty(), "no node is remembered that has no connection");
            assert_eq!(Pool::default().max, IDLE_MAX);
        });
    }

    #[test]
    fn connections_to_one_node_are_bounded_and_so_are_their_requests() {
        on_a_worker(async {
            let (pool, now) = (Pool::default(), Instant::now());
            let mut node = Node::new();
            let keepalive = Keepalive { size: 1, requests: 2, ..KEEPALIVE };
            for _ in 0..2 {
                pool.put(node.key, node.used().await, &keepalive, now);
            }
            node.sees_the_end(1).await;
            let mut kept = pool.take(&node.key, now).expect("the first");
            assert!(pool.is_empty());
            kept.begin();
            node.open[0].try_write(b"HTTP/1.1 204 No Content\r\n\r\n").expect("is sent");
            let mut response = Response::default();
            poll_fn(|cx| kept.poll_head(cx, Some(Duration::from_secs(10)), false, &mut response))
                .await
                .expect("a head");
            pool.put(node.key, kept, &keepalive, now);
            node.sees_the_end(0).await;
            assert!(pool.is_empty(), "it has had its two requests");
        });
    }
}
