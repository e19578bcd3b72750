//! Which connection to a node a request goes by.
//!
//! A node says how many requests it takes at once on a connection. Past that another connection is made, one at a time; where there
//! are as many as may be, or one is just being made, requests wait in turn for room, so many of them and so long at most. Who has got
//! room calls the next one while there is more.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    future::poll_fn,
    pin::{Pin, pin},
    rc::Rc,
    task::{Poll, Waker},
    time::{Duration, Instant},
};

use hashbrown::HashMap;
use tokio::time::Sleep;

use super::{Connection, Sender};
use crate::{
    error::{Error, Kind, Result, Retry},
    upstream::{Key, Stream},
};

/// Connections of a worker, and nodes that it remembers; past it those that are idle go.
const CONNECTIONS_MAX: usize = 1024;
/// Connections of a worker to one node: four thousand calls at a node that takes the hundred streams that RFC 9113 (6.5.2) has as the
/// least, and no more than a pool of HTTP/1 connections keeps.
const CONNECTIONS_PER_NODE: usize = 40;
/// Requests of a worker that wait for room at one node: as many as it has connections of clients by default, about, with one each.
const WAITING_MAX: usize = 1024;
/// One that no request has used for so long is closed, as nginx's `keepalive_timeout` has it.
const IDLE: Duration = Duration::from_secs(60);

/// The connections of a worker, by node.
#[derive(Default)]
pub struct Connections {
    nodes: RefCell<HashMap<Key, Rc<Node>>>,
    /// To all nodes.
    count: Rc<Cell<usize>>,
}

/// What a worker has of a node.
#[derive(Default)]
struct Node {
    open: RefCell<Vec<Rc<Counted>>>,
    /// A connection is being made.
    opening: Cell<bool>,
    waiting: RefCell<BTreeMap<u64, Waker>>,
    /// The number of the next one that waits.
    next: Cell<u64>,
}

/// A connection that counts as one of the worker's.
struct Counted {
    connection: Connection,
    count: Rc<Cell<usize>>,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.count.set(self.count.get() - 1);
    }
}

/// A request's place on a connection.
pub struct Lease {
    on: Rc<Counted>,
    node: Rc<Node>,
    /// Others have used the connection before.
    pub reused: bool,
    /// Since when nothing has come for the request.
    since: Cell<Instant>,
    /// What had been heard of the node then.
    heard: Cell<u64>,
    /// A node that says nothing for so long may be gone.
    patience: Duration,
}

/// What there is for a request.
enum Place {
    Room(Lease),
    /// It has to make a connection.
    Open(Opening),
    /// It has to wait.
    Full,
}

/// A connection that is being made.
struct Opening(Rc<Node>);

impl Drop for Opening {
    fn drop(&mut self) {
        self.0.opening.set(false);
        self.0.call_next();
    }
}

impl Connections {
    /// A place on a connection to a node, which `open` may have to make. `patience`: how long room is waited for. `not`: where the
    /// request was refused before.
    pub async fn lease(
        &self,
        key: Key,
        patience: Duration,
        not: Option<&Lease>,
        open: impl AsyncFnOnce() -> Result<Stream>,
    ) -> Result<Lease> {
        let node = self.node(key);
        let mut late = pin!(None);
        let mut ticket = None;
        loop {
            match node.place(patience, not) {
                Place::Room(lease) => {
                    if node.takes_more() {
                        node.call_next();
                    }
                    return Ok(lease);
                }
                Place::Open(opening) => {
                    let lease = self.open(&node, patience, open().await?).await;
                    drop(opening);
                    return lease;
                }
                // Room that is of no use here may be to the next one.
                Place::Full => {
                    if let (Some(_), Some(Ticket { number, .. })) = (not, &ticket) {
                        node.call_after(*number);
                    }
                }
            }
            if late.is_none() {
                late.set(Some(tokio::time::sleep(patience)));
            }
            let ticket = match &mut ticket {
                Some(ticket) => ticket,
                none => none.insert(Ticket::draw(&node)?),
            };
            if let Some(late) = late.as_mut().as_pin_mut()
                && !ticket.wait(late).await
            {
                let text = "upstream timed out (110: Connection timed out) while waiting for room on its connections";
                return Err(Error::upstream(Kind::Busy).retry(Retry::Safe).context(text));
            }
        }
    }

    fn node(&self, key: Key) -> Rc<Node> {
        let mut nodes = self.nodes.borrow_mut();
        if let Some(node) = nodes.get(&key) {
            return node.clone();
        }
        if nodes.len() >= CONNECTIONS_MAX {
            nodes.retain(|_, node| !node.is_forgotten());
        }
        let node = Rc::new(Node::default());
        // Where there is no room for it, it ends with the request.
        if nodes.len() < CONNECTIONS_MAX {
            nodes.insert(key, node.clone());
        }
        node
    }

    async fn open(&self, node: &Rc<Node>, patience: Duration, stream: Stream) -> Result<Lease> {
        let weak = Rc::downgrade(node);
        let changed = move || {
            if let Some(node) = weak.upgrade() {
                node.call_next();
            }
        };
        let connection = Connection::start(stream, Rc::new(changed)).await?;
        if self.count.get() >= CONNECTIONS_MAX {
            self.nodes.borrow().values().for_each(|node| node.close_idle(Instant::now(), Duration::ZERO));
        }
        // Where there is no room it serves this request only.
        connection.retired.set(self.count.get() >= CONNECTIONS_MAX);
        self.count.set(self.count.get() + 1);
        let counted = Rc::new(Counted { connection, count: self.count.clone() });
        node.open.borrow_mut().push(counted.clone());
        Ok(Lease::new(counted, node.clone(), false, patience))
    }

    /// Lets go of what is closed or was not used for long; requests under way keep theirs. To be called now and then.
    pub fn sweep(&self, now: Instant) {
        self.nodes.borrow_mut().retain(|_, node| {
            node.close_idle(now, IDLE);
            !node.is_forgotten()
        });
    }
}

impl Node {
    fn place(self: &Rc<Node>, patience: Duration, not: Option<&Lease>) -> Place {
        let mut open = self.open.borrow_mut();
        open.retain(|one| !one.connection.is_over());
        let is_other = |one: &&Rc<Counted>| not.is_none_or(|not| !Rc::ptr_eq(&not.on, one));
        // The first ones: the others become idle, and end.
        if let Some(one) = open.iter().filter(is_other).find(|one| one.connection.has_room()) {
            return Place::Room(Lease::new(one.clone(), self.clone(), true, patience));
        }
        if !self.may_open(open.iter().filter(is_other)) || open.len() >= CONNECTIONS_PER_NODE {
            return Place::Full;
        }
        self.opening.set(true);
        Place::Open(Opening(self.clone()))
    }

    /// Nothing is on its way that may bring room.
    fn may_open<'a>(&self, mut open: impl Iterator<Item = &'a Rc<Counted>>) -> bool {
        !self.opening.get() && !open.any(|one| one.connection.is_young())
    }

    /// Whether one that waits would get room, or make it.
    fn takes_more(&self) -> bool {
        let open = self.open.borrow();
        open.iter().any(|one| one.connection.has_room())
            || (open.len() < CONNECTIONS_PER_NODE && self.may_open(open.iter()))
    }

    /// Has the one that has waited longest look again.
    fn call_next(&self) {
        let first = self.waiting.borrow_mut().pop_first();
        if let Some((_, waker)) = first {
            waker.wake();
        }
    }

    /// Has the one look again that has waited longest of those that came later.
    fn call_after(&self, number: u64) {
        let mut waiting = self.waiting.borrow_mut();
        let next = waiting.range(number + 1..).next().map(|(next, _)| *next);
        let waker = next.and_then(|next| waiting.remove(&next));
        drop(waiting);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn close_idle(&self, now: Instant, after: Duration) {
        self.open.borrow_mut().retain(|one| {
            let unused = one.connection.streams.get() == 0;
            let long = now.saturating_duration_since(one.connection.used.get()) >= after;
            !(one.connection.is_over() || (unused && long))
        });
    }

    /// Nobody has anything to do with it.
    fn is_forgotten(&self) -> bool {
        self.open.borrow().is_empty() && !self.opening.get() && self.waiting.borrow().is_empty()
    }
}

impl Lease {
    fn new(on: Rc<Counted>, node: Rc<Node>, reused: bool, patience: Duration) -> Self {
        on.connection.streams.set(on.connection.streams.get() + 1);
        let (since, heard) = (Cell::new(Instant::now()), Cell::new(on.connection.heard.get()));
        Lease { on, node, reused, since, heard, patience }
    }

    pub fn sender(&self) -> Sender {
        self.on.connection.sender.clone()
    }

    /// Something has come for the request.
    pub fn answered(&self) {
        self.since.set(Instant::now());
        self.heard.set(self.on.connection.heard.get());
    }

    /// The request was given up. Where the node has said nothing at all meanwhile, nobody knows whether it is still there: the
    /// connection takes no more requests, and ends with those that are on it.
    pub fn gave_up(&self) {
        if self.on.connection.heard.get() == self.heard.get() {
            self.on.connection.retired.set(true);
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let now = Instant::now();
        // Whoever waits with a shorter patience than ours (a client with a deadline) must not keep a dead connection alive.
        if now.saturating_duration_since(self.since.get()) >= self.patience {
            self.gave_up();
        }
        let connection = &self.on.connection;
        connection.streams.set(connection.streams.get() - 1);
        connection.used.set(now);
        if connection.is_over() {
            self.node.open.borrow_mut().retain(|one| !Rc::ptr_eq(one, &self.on));
        }
        self.node.call_next();
    }
}

/// A request that waits for room. It keeps its place when it was called in vain.
struct Ticket {
    node: Rc<Node>,
    number: u64,
    waits: bool,
}

impl Ticket {
    fn draw(node: &Rc<Node>) -> Result<Ticket> {
        if node.waiting.borrow().len() >= WAITING_MAX {
            let text = "too many requests wait for room on the upstream's connections";
            return Err(Error::upstream(Kind::Other).retry(Retry::Safe).context(text));
        }
        let number = node.next.get();
        node.next.set(number + 1);
        Ok(Ticket { node: node.clone(), number, waits: false })
    }

    /// Waits until it is called; `false`: it took too long.
    async fn wait(&mut self, mut late: Pin<&mut Sleep>) -> bool {
        poll_fn(|cx| {
            let mut waiting = self.node.waiting.borrow_mut();
            match waiting.get_mut(&self.number) {
                Some(waker) => waker.clone_from(cx.waker()),
                None if self.waits => {
                    self.waits = false;
                    return Poll::Ready(true);
                }
                None => {
                    waiting.insert(self.number, cx.waker().clone());
                    self.waits = true;
                }
            }
            drop(waiting);
            late.as_mut().poll(cx).map(|()| false)
        })
        .await
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        // One that was called and goes away passes the call on.
        if self.waits && self.node.waiting.borrow_mut().remove(&self.number).is_none() {
            self.node.call_next();
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;

    /// Runs `test` as a worker runs, on a thread of its own.
    fn on_a_worker(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        tokio::task::LocalSet::new().block_on(&runtime, test);
    }

    fn full() -> Rc<Node> {
        let node = Rc::new(Node::default());
        node.opening.set(true);
        node
    }

    /// What waits, by its number, until it is called.
    fn wait(node: &Rc<Node>, called: &Rc<RefCell<Vec<u64>>>) -> tokio::task::JoinHandle<bool> {
        let (mut ticket, called) = (Ticket::draw(node).expect("a ticket"), called.clone());
        tokio::task::spawn_local(async move {
            let mut late = pin!(sleep(Duration::from_secs(60)));
            let in_time = ticket.wait(late.as_mut()).await;
            called.borrow_mut().push(ticket.number);
            in_time
        })
    }

    /// Lets tasks run, so many turns as the runtime needs for all that the tests start.
    async fn settle() {
        for _ in 0..WAITING_MAX {
            tokio::task::yield_now().await;
        }
    }

    #[test]
    fn so_many_requests_wait_and_one_more_is_refused() {
        on_a_worker(async {
            let (node, called) = (full(), Rc::default());
            let waiting: Vec<_> = (0..WAITING_MAX).map(|_| wait(&node, &called)).collect();
            settle().await;
            let Err(refused) = Ticket::draw(&node) else { panic!("it is refused") };
            assert!(refused.retry_advice() == Retry::Safe && refused.to_string().contains("too many requests wait"));
            waiting[0].abort();
            settle().await;
            assert!(Ticket::draw(&node).is_ok(), "one has gone");
        });
    }

    #[test]
    fn they_are_called_in_turn_and_one_that_goes_away_passes_its_call_on() {
        on_a_worker(async {
            let (node, called) = (full(), Rc::<RefCell<Vec<u64>>>::default());
            let waiting: Vec<_> = (0..4).map(|_| wait(&node, &called)).collect();
            settle().await;
            node.call_next();
            settle().await;
            assert_eq!(*called.borrow(), [0]);
            // It is called, and gone before it looks.
            node.call_next();
            waiting[1].abort();
            settle().await;
            assert_eq!(*called.borrow(), [0, 2]);
            drop(Opening(node.clone()));
            settle().await;
            assert!(*called.borrow() == [0, 2, 3] && !node.opening.get());
        });
    }

    #[test]
    fn one_that_has_no_use_for_the_room_calls_those_behind_it() {
        on_a_worker(async {
            let (node, called) = (full(), Rc::<RefCell<Vec<u64>>>::default());
            let waiting: Vec<_> = (0..3).map(|_| wait(&node, &called)).collect();
            settle().await;
            node.call_after(0);
            node.call_after(2);
            settle().await;
            assert_eq!(*called.borrow(), [1], "nobody is behind the last one");
            node.call_after(0);
            settle().await;
            assert_eq!(*called.borrow(), [1, 2]);
            waiting[0].abort();
        });
    }

    #[test]
    fn a_wait_ends_in_time() {
        on_a_worker(async {
            let connections = Connections::default();
            let key = Key { addr: ([127, 0, 0, 1], 1).into(), tls: 0 };
            let node = connections.node(key);
            node.opening.set(true);
            let open = async || panic!("nobody opens one");
            let leased = connections.lease(key, Duration::from_millis(20), None, open).await;
            let Err(late) = leased else { panic!("there is no room") };
            assert_eq!((late.kind(), late.retry_advice()), (Kind::Busy, Retry::Safe));
            assert!(node.waiting.borrow().is_empty());
        });
    }

    #[test]
    fn nodes_are_forgotten_when_there_are_too_many() {
        let connections = Connections::default();
        let key = |port| Key { addr: ([127, 0, 0, 1], port).into(), tls: 0 };
        for port in 0..CONNECTIONS_MAX as u16 {
            connections.node(key(port)).opening.set(true);
        }
        connections.node(key(5000));
        assert_eq!(connections.nodes.borrow().len(), CONNECTIONS_MAX, "all of them are in use");
        connections.node(key(0)).opening.set(false);
        connections.node(key(5000));
        assert!(connections.nodes.borrow().contains_key(&key(5000)));
        assert_eq!(connections.nodes.borrow().len(), CONNECTIONS_MAX);
    }
}
