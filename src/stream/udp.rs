//! UDP: the datagrams of one client are a session, which ends when nothing has moved for a while.
//!
//! Each worker has its own socket on each address (SO_REUSEPORT), and the kernel gives a client's datagrams to the same one every
//! time. A session has a socket of its own towards its node, so that what comes back is known to be its client's. Datagrams are never
//! queued but for the moment in which a session finds its node: who cannot take one now loses it, as on any other hop.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    io::{self, ErrorKind},
    mem,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket as StdSocket},
    os::fd::AsRawFd,
    pin::pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
    time::{Duration, Instant},
};

use hashbrown::{HashMap, hash_map::Entry};
use socket2::{Domain, Protocol, SockAddr, Socket as RawSocket, Type};
use tokio::{
    io::{Interest, ReadBuf},
    net::UdpSocket,
    task::spawn_local,
};

use super::{Lease, Seldom, Streams, Target, UDP_IDLE, packets, packets::Received, session::Session, timeouts};
use crate::{
    error::{Error, Kind, Result, Retry},
    exchange::deadline::Deadline,
    model::upstream::Scheme,
    net::{drain::Open, listener},
    observe::metrics::Listening,
};

/// Sessions of one worker, and no more than half of `worker_connections`: each holds a descriptor until it is idle, and whoever forges
/// sender addresses opens as many as there may be. The rest remains for TCP and HTTP.
const SESSIONS_MAX: usize = 4096;
/// Datagrams that wait while their session finds its node: a client that hears nothing repeats itself a few times.
const WAITING_MAX: usize = 8;
/// Bytes of all that wait at one listener.
const WAITING_BYTES: usize = 4 << 20;
/// Longer than any datagram.
const DATAGRAM_MAX: usize = 1 << 16;
/// Datagrams of one socket in a row: then others have their turn.
const BATCH: usize = 64;
/// A worker that drains gives a session this long without a datagram: an answer that is under way still arrives.
const DRAIN_QUIET: Duration = Duration::from_secs(1);
/// Refuses an address that another process listens on, as `listener::ensure_free` does for TCP.
pub fn ensure_free(addr: SocketAddr) -> Result<()> {
    let probe = || -> io::Result<()> {
        let socket = RawSocket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))?;
        if addr.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.bind(&SockAddr::from(addr))
    };
    match probe() {
        Err(e) if e.kind() == ErrorKind::AddrInUse => {
            Err(Error::config(Kind::Io).cause(e).context(format!("listen on {addr} (UDP)")))
        }
        // What else is wrong with the address is for `bind` to say.
        _ => Ok(()),
    }
}

/// Binds one of the sockets on `addr`, as `listener::bind` does for TCP.
pub fn bind(addr: SocketAddr) -> Result<StdSocket> {
    let bound = || -> io::Result<StdSocket> {
        let socket = RawSocket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))?;
        if addr.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.set_reuse_port(true)?;
        socket.set_nonblocking(true)?;
        if addr.ip().is_unspecified() {
            packets::ask_for_address(&socket, addr.is_ipv6())?;
        }
        socket.bind(&SockAddr::from(addr))?;
        Ok(socket.into())
    };
    bound().map_err(|e| Error::config(Kind::Io).cause(e).context(format!("listen on {addr} (UDP)")))
}

/// Takes datagrams until the worker drains; those of sessions that are open also afterwards.
pub async fn run(streams: Rc<Streams>, socket: StdSocket) -> Result<()> {
    let local = socket.local_addr()?;
    let socket = UdpSocket::from_std(socket)?;
    // Known from now on, so that the first answer does not find it unknown.
    socket.writable().await?;
    let drain = streams.drain.clone();
    let desk = Rc::new(Desk {
        listening: streams.metrics.listening(local),
        streams,
        socket,
        local,
        sessions: RefCell::default(),
        waiting: Cell::new(0),
        datagram: RefCell::new(vec![0; DATAGRAM_MAX].into()),
        refused: Cell::default(),
    });
    spawn_local(async move { poll_fn(|cx| desk.poll_receive(cx)).await });
    let wake = Deadline::new();
    poll_fn(|cx| {
        if drain.is_draining() {
            return Poll::Ready(Ok(()));
        }
        // No limit is set: this only asks to be woken when the drain begins.
        wake.poll_expired(cx);
        Poll::Pending
    })
    .await
}

/// One listener and its sessions.
struct Desk {
    streams: Rc<Streams>,
    socket: UdpSocket,
    local: SocketAddr,
    listening: Arc<Listening>,
    sessions: RefCell<HashMap<Key, State>>,
    /// Bytes of datagrams that wait.
    waiting: Cell<usize>,
    /// The one that is passed on right now.
    datagram: RefCell<Box<[u8]>>,
    refused: Cell<Seldom>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    client: SocketAddr,
    /// What the client has sent to.
    server: IpAddr,
}

enum State {
    /// Its node is being found; what waits for it.
    Opening(Vec<Box<[u8]>>),
    Open(Rc<Flow>),
}

/// The way to a node.
struct Flow {
    socket: UdpSocket,
    listening: Arc<Listening>,
    /// Bytes to the node, and from it to the client.
    up: Cell<u64>,
    down: Cell<u64>,
    /// A datagram has passed since somebody looked.
    moved: Cell<bool>,
    /// Why the node could not be sent to, and who is to know.
    failed: RefCell<(Option<io::Error>, Option<Waker>)>,
}

impl Desk {
    fn poll_receive(self: &Rc<Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut datagram = self.datagram.borrow_mut();
        for _ in 0..BATCH {
            let received =
                self.socket.try_io(Interest::READABLE, || packets::receive(self.socket.as_raw_fd(), &mut datagram));
            match received {
                Ok(received) => self.take(&datagram[..received.len], received),
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    if let Err(e) = ready!(self.socket.poll_recv_ready(cx)) {
                        tracing::error!("receive on {} (UDP) failed: {e}", self.local);
                        return Poll::Ready(());
                    }
                }
                Err(e) => tracing::debug!("receive on {} (UDP) failed: {e}", self.local),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Gives a client's datagram to its session, or begins one.
    fn take(self: &Rc<Self>, data: &[u8], received: Received) {
        let key = Key { client: received.from, server: received.to.unwrap_or(self.local.ip()) };
        let mut sessions = self.sessions.borrow_mut();
        match sessions.entry(key) {
            Entry::Occupied(mut known) => match known.get_mut() {
                State::Open(flow) => flow.send(data),
                State::Opening(waiting) => keep(waiting, &self.waiting, data),
            },
            Entry::Vacant(new) => {
                if is_own(&self.streams.settings.udp_listeners, key) {
                    return tracing::debug!("a datagram from {}, where this gateway listens, is dropped", key.client);
                }
                let Some(open) = self.enter() else { return };
                let mut waiting = Vec::new();
                keep(&mut waiting, &self.waiting, data);
                new.insert(State::Opening(waiting));
                spawn_local(session(Place { desk: self.clone(), key, _open: open }));
            }
        }
    }

    /// Counts a session; `None`: there is no room.
    fn enter(&self) -> Option<Open> {
        let Streams { drain, settings, udp_sessions, .. } = &*self.streams;
        if drain.is_draining() {
            return None;
        }
        let open = udp_sessions.get();
        if !has_room(open, drain.open(), settings.max_connections) {
            self.refuse(open);
            return None;
        }
        udp_sessions.set(open + 1);
        Some(drain.enter())
    }

    fn refuse(&self, open: usize) {
        if let Some(n) = Seldom::count(&self.refused, Instant::now()) {
            tracing::warn!("{n} datagrams to {} refused: {open} UDP sessions are open", self.local);
        }
    }

    /// From the address that the client has sent to. What cannot be sent now is lost.
    fn answer(&self, key: Key, data: &[u8]) -> io::Result<usize> {
        let from = Some(key.server).filter(|_| self.local.ip().is_unspecified());
        self.socket.try_io(Interest::WRITABLE, || packets::send(self.socket.as_raw_fd(), data, key.client, from))
    }

    /// What has waited for a session; `then`: its state from now on.
    fn waited(&self, key: Key, then: Option<Rc<Flow>>) -> Vec<Box<[u8]>> {
        let mut sessions = self.sessions.borrow_mut();
        let before = match then {
            Some(flow) => sessions.insert(key, State::Open(flow)),
            None => sessions.remove(&key),
        };
        let Some(State::Opening(waited)) = before else { return Vec::new() };
        let bytes: usize = waited.iter().map(|data| data.len()).sum();
        self.waiting.set(self.waiting.get() - bytes);
        waited
    }
}

/// Whether what was sent comes from a listener, so that its answer would be a client's datagram again, without end. One on all addresses
/// has the one that was sent to, and this machine's own; the kernel takes none of them from outside as a sender.
fn is_own(listeners: &[SocketAddr], Key { client, server }: Key) -> bool {
    let is_here = |ip: IpAddr| ip == server || ip.is_loopback();
    listeners
        .iter()
        .filter(|own| own.port() == client.port() && own.is_ipv4() == client.is_ipv4())
        .any(|own| own.ip() == client.ip() || own.ip().is_unspecified() && is_here(client.ip()))
}

/// `sessions` of UDP, and all that is `open` in the worker, of which there may be `max`.
fn has_room(sessions: usize, open: usize, max: usize) -> bool {
    sessions < SESSIONS_MAX.min(max.div_ceil(2)) && open < max
}

/// Puts a datagram behind those that wait, if there is room; `bytes`: of all that wait at the listener.
fn keep(waiting: &mut Vec<Box<[u8]>>, bytes: &Cell<usize>, data: &[u8]) {
    let all = bytes.get() + data.len();
    if waiting.len() < WAITING_MAX && all <= WAITING_BYTES {
        waiting.push(data.into());
        bytes.set(all);
    }
}

/// A session's place among the others, which is free when this is dropped.
struct Place {
    desk: Rc<Desk>,
    key: Key,
    _open: Open,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.desk.waited(self.key, None);
        let count = &self.desk.streams.udp_sessions;
        count.set(count.get() - 1);
    }
}

async fn session(place: Place) {
    let Place { desk, key, .. } = &place;
    let server = SocketAddr::new(key.server, desk.local.port());
    let mut session = Session::new(listener::next_serial(), "UDP", key.client, server);
    let _active = desk.listening.session();
    let outcome = serve(desk, *key, &mut session).await;
    desk.streams.ended(&mut session, desk.local, outcome);
}

async fn serve(desk: &Desk, key: Key, session: &mut Session) -> Result<()> {
    let (flow, limit, _lease) = open(desk, session).await?;
    session.established = true;
    for data in desk.waited(key, Some(flow.clone())) {
        flow.send(&data);
    }
    let deadline = Deadline::new();
    let (mut begun, mut draining) = (false, false);
    // No read is woken by it: a node that nobody listens at, as ICMP tells.
    let mut broken = pin!(flow.socket.ready(Interest::ERROR));
    let outcome = poll_fn(|cx| {
        while broken.as_mut().poll(cx).is_ready() {
            match flow.socket.take_error() {
                Ok(Some(e)) | Err(e) if !is_too_long(&e) => return Poll::Ready(Err(e)),
                // A send or a read has met it already, and said so.
                Ok(_) | Err(_) => {}
            }
            let _ = flow.socket.try_io(Interest::ERROR, || Err::<(), _>(ErrorKind::WouldBlock.into()));
            broken.set(flow.socket.ready(Interest::ERROR));
        }
        if let Err(e) = flow.poll_answers(cx, desk, key) {
            return Poll::Ready(Err(e));
        }
        let drains = desk.streams.drain.is_draining();
        if flow.moved.replace(false) || !begun || drains != draining {
            (begun, draining) = (true, drains);
            deadline.start(if drains { limit.min(DRAIN_QUIET) } else { limit }, cx);
        } else if deadline.poll_expired(cx) {
            return Poll::Ready(Ok(()));
        }
        Poll::Pending
    })
    .await;
    session.over(flow.up.get(), flow.down.get());
    // Nobody is there.
    session.established = outcome.is_ok() || flow.down.get() > 0;
    outcome.map_err(|e| Error::upstream(Kind::ConnectRefused).cause(e).context("no datagram reaches the upstream"))
}

/// A way to a node, how long it may be idle, and the node's place with its balancer.
async fn open(desk: &Desk, session: &mut Session) -> Result<(Rc<Flow>, Duration, Lease)> {
    let Target { upstream, health, .. } = desk.streams.target(session).await?;
    if upstream.scheme == Scheme::Tls {
        return Err(Error::config(Kind::Invalid).context("upstream scheme tls is not spoken over UDP"));
    }
    let (socket, lease) = desk.streams.reach(session, (&upstream, health.as_deref()), connect).await?;
    let (up, down, moved, failed) = Default::default();
    let listening = desk.listening.clone();
    Ok((Rc::new(Flow { socket, listening, up, down, moved, failed }), timeouts(&upstream, UDP_IDLE).read, lease))
}

/// A socket that sends to a node, and hears from it alone.
async fn connect(addr: SocketAddr) -> Result<UdpSocket> {
    let connected = async {
        let any: IpAddr = if addr.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = UdpSocket::bind(SocketAddr::new(any, 0)).await?;
        socket.connect(addr).await?;
        // Known from now on, so that the first datagram does not find it unknown.
        socket.writable().await?;
        Ok(socket)
    };
    let failed = |e: io::Error| Error::upstream(Kind::ConnectRefused).retry(Retry::Safe).cause(e);
    connected.await.map_err(|e| failed(e).context(format!("connect() to {addr} failed")))
}

/// One datagram does not fit the way to the node, as it or ICMP says; shorter ones go on.
fn is_too_long(e: &io::Error) -> bool {
    e.raw_os_error() == Some(libc::EMSGSIZE)
}

impl Flow {
    /// What the node cannot take now is lost.
    fn send(&self, data: &[u8]) {
        self.moved.set(true);
        let sent = self.socket.try_send(data);
        self.listening.up(data.len() as u64, *sent.as_ref().unwrap_or(&0) as u64);
        match sent {
            Ok(n) => self.up.set(self.up.get() + n as u64),
            Err(e) if e.kind() == ErrorKind::WouldBlock || is_too_long(&e) => {}
            Err(e) => {
                let mut failed = self.failed.borrow_mut();
                failed.0 = Some(e);
                if let Some(waker) = &failed.1 {
                    waker.wake_by_ref();
                }
            }
        }
    }

    /// Passes on what the node has sent; an error is the end of the session.
    fn poll_answers(&self, cx: &mut Context<'_>, desk: &Desk, key: Key) -> io::Result<()> {
        {
            let mut failed = self.failed.borrow_mut();
            if let Some(e) = mem::take(&mut failed.0) {
                return Err(e);
            }
            match &mut failed.1 {
                Some(waker) => waker.clone_from(cx.waker()),
                none => *none = Some(cx.waker().clone()),
            }
        }
        let mut datagram = desk.datagram.borrow_mut();
        for _ in 0..BATCH {
            let mut buf = ReadBuf::new(&mut datagram);
            match self.socket.poll_recv(cx, &mut buf) {
                Poll::Pending => return Ok(()),
                Poll::Ready(Err(e)) if is_too_long(&e) => continue,
                Poll::Ready(received) => received?,
            }
            self.moved.set(true);
            let answered = desk.answer(key, buf.filled());
            self.listening.down(buf.filled().len() as u64, *answered.as_ref().unwrap_or(&0) as u64);
            match answered {
                Ok(n) => self.down.set(self.down.get() + n as u64),
                Err(e) => tracing::debug!("a datagram to {} is lost: {e}", key.client),
            }
        }
        cx.waker().wake_by_ref();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn datagrams_wait_up_to_a_number_and_a_size() {
        let (mut waiting, bytes) = (Vec::new(), Cell::new(0));
        (0..=WAITING_MAX).for_each(|_| keep(&mut waiting, &bytes, b"ab"));
        assert_eq!((waiting.len(), bytes.get()), (WAITING_MAX, 2 * WAITING_MAX));
        let (mut waiting, bytes) = (Vec::new(), Cell::new(WAITING_BYTES - 3));
        keep(&mut waiting, &bytes, b"abcd");
        keep(&mut waiting, &bytes, b"abc");
        keep(&mut waiting, &bytes, b"a");
        assert_eq!((waiting.len(), bytes.get()), (1, WAITING_BYTES));
    }

    #[test]
    fn sessions_are_bounded_by_their_number_and_by_the_workers_connections() {
        let plenty = 3 * SESSIONS_MAX;
        assert!(has_room(SESSIONS_MAX - 1, SESSIONS_MAX, plenty));
        assert!(!has_room(SESSIONS_MAX, SESSIONS_MAX, plenty));
        assert!(has_room(49, 99, 100) && !has_room(49, 100, 100));
        assert!(!has_room(50, 50, 100), "half of them are for others");
        assert!(has_room(0, 0, 1));
    }

    #[test]
    fn a_listener_is_nobodys_client() {
        let address = |text: &str| text.parse::<SocketAddr>().expect("an address");
        let listeners = ["10.0.0.1:53", "0.0.0.0:54", "[::]:55"].map(address);
        for (client, server, own) in [
            ("10.0.0.1:53", "10.0.0.9", true),
            ("10.0.0.1:52", "10.0.0.9", false),
            ("10.0.0.2:53", "10.0.0.9", false),
            ("10.0.0.9:54", "10.0.0.9", true),
            ("127.0.0.5:54", "10.0.0.9", true),
            ("10.0.0.8:54", "10.0.0.9", false),
            ("[::1]:55", "::2", true),
            ("[::1]:54", "::1", false),
        ] {
            let key = Key { client: address(client), server: server.parse().expect("an address") };
            assert_eq!(is_own(&listeners, key), own, "{client} to {server}");
        }
    }

    #[tokio::test]
    async fn a_datagram_that_is_too_long_for_the_way_is_lost_alone() {
        let node = StdSocket::bind("127.0.0.1:0").expect("a socket");
        let socket = connect(node.local_addr().expect("an address")).await.expect("a socket");
        let (up, down, moved, failed) = Default::default();
        let flow = Flow { socket, listening: Arc::default(), up, down, moved, failed };
        flow.send(&vec![0; DATAGRAM_MAX - 1]);
        assert!(flow.failed.borrow().0.is_none() && flow.up.get() == 0);
        flow.send(b"short");
        assert_eq!((flow.up.get(), node.recv(&mut [0; 16]).expect("a datagram")), (5, 5));
    }

    #[test]
    fn an_address_that_another_socket_has_is_refused() {
        let taken = bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a socket");
        let addr = taken.local_addr().expect("an address");
        let refused = ensure_free(addr).expect_err("it is taken").to_string();
        assert!(refused.contains(&format!("listen on {addr} (UDP)")), "{refused}");
        bind(addr).expect("a second worker's");
        drop(taken);
        ensure_free(addr).expect("it is free");
    }
}
