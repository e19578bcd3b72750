//! Exchanges that wait for their next use, so that a request allocates nothing once a worker is warm.

use std::{
    cell::{Cell, RefCell},
    net::{Ipv4Addr, SocketAddr},
    rc::Rc,
    sync::Arc,
};

use crate::{
    exchange::{Connection, Exchange},
    store::Snapshot,
};

/// Exchanges kept for reuse per worker: as many as are in flight on a busy one; each keeps tens of kilobytes at most.
const KEPT_EXCHANGES: usize = 256;

/// A worker's idle exchanges.
pub struct ExchangePool {
    // Boxed, because a box is what requests pass around.
    #[allow(clippy::vec_box)]
    idle: RefCell<Vec<Box<Exchange>>>,
    /// What idle exchanges hold instead of a connection, or of a configuration that is not the newest seen.
    no_snapshot: Arc<Snapshot>,
    no_connection: Rc<Connection>,
    /// The newest configuration that a request held. Idle exchanges keep it: to take it again would be two counts of a
    /// reference that all workers share, per request.
    newest: Cell<u64>,
}

impl ExchangePool {
    pub fn new() -> Self {
        let nowhere = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        ExchangePool {
            idle: RefCell::default(),
            no_snapshot: Arc::default(),
            no_connection: Rc::new(Connection::new(0, nowhere, nowhere)),
            newest: Cell::new(0),
        }
    }

    /// An exchange for a request of `conn` that starts now.
    pub fn take(&self, conn: &Rc<Connection>) -> Box<Exchange> {
        let mut x = match self.idle.borrow_mut().pop() {
            Some(x) => x,
            None => Box::new(Exchange::new(self.no_connection.clone(), self.no_snapshot.clone())),
        };
        x.conn = conn.clone();
        x.begin();
        x
    }

    /// Takes an exchange back whose request is over.
    pub fn put(&self, mut x: Box<Exchange>) {
        x.reset();
        x.conn = self.no_connection.clone();
        let mut idle = self.idle.borrow_mut();
        if x.snapshot.version > self.newest.get() {
            self.newest.set(x.snapshot.version);
            idle.iter_mut().for_each(|old| old.snapshot = self.no_snapshot.clone());
        } else if x.snapshot.version < self.newest.get() {
            x.snapshot = self.no_snapshot.clone();
        }
        if idle.len() < KEPT_EXCHANGES {
            idle.push(x);
        }
    }
}

impl Default for ExchangePool {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exchanges_are_kept_up_to_a_number() {
        let (pool, nowhere) = (ExchangePool::new(), SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)));
        let conn = Rc::new(Connection::new(1, nowhere, nowhere));
        let out: Vec<_> = (0..=KEPT_EXCHANGES).map(|_| pool.take(&conn)).collect();
        out.into_iter().for_each(|x| pool.put(x));
        assert_eq!(pool.idle.borrow().len(), KEPT_EXCHANGES);
        assert_eq!(Rc::strong_count(&conn), 1, "idle ones hold no connection");
    }
}
