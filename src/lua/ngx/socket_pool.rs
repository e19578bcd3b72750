//! Idle connections of scripts, by name: one set per VM, bounded per pool and in number.
//!
//! A pool begins with `connect`'s `pool_size` or `backlog`, or with the first `setkeepalive`, and ends with its last
//! connection. With `backlog` it also bounds the connections in use: who comes later waits in order.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    rc::{Rc, Weak},
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use hashbrown::HashMap;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::AbortHandle,
};

use super::socket_tcp::Conn;
use crate::observe::log::Level;

/// `lua_socket_pool_size`: lua-nginx-module's default.
pub const POOL_SIZE: usize = 30;

/// Connections that one pool may hold, whatever a script asks for.
const MAX_POOL_SIZE: usize = 65_536;

/// Pools of one VM: names may come from requests.
pub const MAX_POOLS: usize = 4096;

/// A line for those who look at how their connections are kept.
fn note(what: &str, name: &[u8]) {
    let line = format!("{what} \"{}\"", String::from_utf8_lossy(name));
    crate::observe::log::line(Level::Debug, line.as_bytes(), None);
}

#[derive(Default)]
pub struct Pools {
    map: RefCell<HashMap<Box<[u8]>, Rc<Pool>>>,
}

pub struct Pool {
    name: Box<[u8]>,
    size: usize,
    gate: Option<Gate>,
    /// Least recently used first.
    idle: RefCell<VecDeque<Idle>>,
    serial: Cell<u64>,
    pools: Weak<Pools>,
}

/// Bounds the connections in use.
struct Gate {
    permits: Arc<Semaphore>,
    backlog: usize,
    waiting: Cell<usize>,
}

struct Idle {
    serial: u64,
    conn: Option<Conn>,
    watch: AbortHandle,
}

impl Drop for Idle {
    fn drop(&mut self) {
        self.watch.abort();
    }
}

/// What a connection in use holds of its pool.
pub struct Lease {
    pool: Rc<Pool>,
    permit: Option<OwnedSemaphorePermit>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.permit = None;
        self.pool.leave();
    }
}

impl Pools {
    /// The pool of this name, if there is one.
    pub fn get(&self, name: &[u8]) -> Option<Rc<Pool>> {
        self.map.borrow().get(name).cloned()
    }

    /// The pool of this name; a new one if there is none. `None`: there are too many.
    pub fn open(self: &Rc<Self>, name: &[u8], size: usize, backlog: Option<usize>) -> Option<Rc<Pool>> {
        let mut map = self.map.borrow_mut();
        if let Some(pool) = map.get(name) {
            return Some(pool.clone());
        }
        if map.len() >= MAX_POOLS {
            return None;
        }
        let size = size.clamp(1, MAX_POOL_SIZE);
        let gate =
            backlog.map(|backlog| Gate { permits: Arc::new(Semaphore::new(size)), backlog, waiting: Cell::new(0) });
        let pool = Rc::new(Pool {
            name: name.into(),
            size,
            gate,
            idle: RefCell::default(),
            serial: Cell::new(0),
            pools: Rc::downgrade(self),
        });
        map.insert(name.into(), pool.clone());
        note("lua tcp socket keepalive create connection pool for key", name);
        Some(pool)
    }

    /// Connections that wait for their next use.
    pub fn idle(&self) -> usize {
        self.map.borrow().values().map(|pool| pool.idle.borrow().len()).sum()
    }

    #[cfg(test)]
    pub fn count(&self) -> usize {
        self.map.borrow().len()
    }
}

impl Pool {
    /// A place among the connections in use, without waiting.
    pub fn try_lease(self: &Rc<Self>) -> Option<Lease> {
        let permit = match &self.gate {
            Some(gate) => Some(gate.permits.clone().try_acquire_owned().ok()?),
            None => None,
        };
        Some(Lease { pool: self.clone(), permit })
    }

    /// Whether one more may wait for a place.
    pub fn may_wait(&self) -> bool {
        self.gate.as_ref().is_none_or(|gate| gate.waiting.get() < gate.backlog)
    }

    /// Waits for a place. Counts as waiting from the call on.
    pub fn lease(self: &Rc<Self>) -> impl Future<Output = Option<Lease>> + use<> {
        let waiting = Waiting::new(self.clone());
        async move {
            let pool = waiting.0.clone();
            let permit = match &pool.gate {
                Some(gate) => Some(gate.permits.clone().acquire_owned().await.ok()?),
                None => None,
            };
            Some(Lease { pool, permit })
        }
    }

    /// Whose pool a lease is of.
    pub fn of(lease: &Lease) -> Rc<Pool> {
        lease.pool.clone()
    }

    /// Keeps `conn` for `timeout`, or until its peer speaks or closes.
    pub fn keep(self: &Rc<Self>, mut conn: Conn, timeout: Option<Duration>) {
        // The place goes to the next only when the connection can be taken.
        let lease = conn.lease.take();
        let serial = self.serial.get() + 1;
        self.serial.set(serial);
        let watch = tokio::task::spawn_local(watch(Rc::downgrade(self), serial, timeout)).abort_handle();
        let oldest = {
            let mut idle = self.idle.borrow_mut();
            idle.push_back(Idle { serial, conn: Some(conn), watch });
            if idle.len() > self.size { idle.pop_front() } else { None }
        };
        drop(oldest);
        drop(lease);
    }

    /// The connection that was used last and still stands.
    pub fn pop(&self) -> Option<Conn> {
        loop {
            let mut idle = self.idle.borrow_mut().pop_back()?;
            let Some(mut conn) = idle.conn.take() else { continue };
            drop(idle);
            if conn.poll_idle(&mut Context::from_waker(Waker::noop())).is_pending() {
                conn.reused += 1;
                return Some(conn);
            }
        }
    }

    fn poll_watched(&self, serial: u64, cx: &mut Context<'_>) -> Poll<()> {
        let mut idle = self.idle.borrow_mut();
        match idle.iter_mut().find(|i| i.serial == serial).and_then(|i| i.conn.as_mut()) {
            Some(conn) => conn.poll_idle(cx),
            None => Poll::Ready(()),
        }
    }

    fn remove(&self, serial: u64) {
        let gone = {
            let mut idle = self.idle.borrow_mut();
            let at = idle.iter().position(|i| i.serial == serial);
            at.and_then(|at| idle.remove(at))
        };
        drop(gone);
    }

    /// Ends the pool when nothing uses it but the map and the caller.
    fn leave(self: &Rc<Self>) {
        const MAP_AND_CALLER: usize = 2;
        if Rc::strong_count(self) > MAP_AND_CALLER || !self.idle.borrow().is_empty() {
            return;
        }
        if let Some(pools) = self.pools.upgrade() {
            note("lua tcp socket keepalive: free connection pool for", &self.name);
            pools.map.borrow_mut().remove(&self.name);
        }
    }
}

/// One that waits for a place.
struct Waiting(Rc<Pool>);

impl Waiting {
    fn new(pool: Rc<Pool>) -> Waiting {
        if let Some(gate) = &pool.gate {
            gate.waiting.set(gate.waiting.get() + 1);
        }
        Waiting(pool)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(gate) = &self.0.gate {
            gate.waiting.set(gate.waiting.get() - 1);
        }
    }
}

async fn watch(pool: Weak<Pool>, serial: u64, timeout: Option<Duration>) {
    let spoken = std::future::poll_fn(|cx| match pool.upgrade() {
        Some(pool) => pool.poll_watched(serial, cx),
        None => Poll::Ready(()),
    });
    match timeout {
        Some(timeout) => {
            let _ = tokio::time::timeout(timeout, spoken).await;
        }
        None => spoken.await,
    }
    if let Some(pool) = pool.upgrade() {
        pool.remove(serial);
        pool.leave();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pools_are_bounded_in_number_and_size() {
        let pools = Rc::new(Pools::default());
        let open = |n: usize| pools.open(n.to_string().as_bytes(), usize::MAX, Some(0));
        let held: Vec<Lease> = (0..MAX_POOLS).map(|n| open(n).expect("a pool").try_lease().expect("a place")).collect();
        assert!(open(MAX_POOLS).is_none());
        let first = open(0).expect("was there");
        assert_eq!(first.size, MAX_POOL_SIZE);
        let all: Vec<_> = (1..MAX_POOL_SIZE).map(|_| first.try_lease().expect("a place")).collect();
        assert!(first.try_lease().is_none() && !first.may_wait());
        drop((all, first, held));
        assert_eq!(pools.count(), 0, "a pool ends with its last connection");
        assert!(open(MAX_POOLS).is_some());
    }
}
