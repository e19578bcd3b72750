//! Listening sockets, and the loop that turns what they accept into connections.
//!
//! Each worker has its own socket on each address (SO_REUSEPORT): the kernel spreads connections, nothing is shared.

use std::{
    cell::RefCell,
    fmt::Display,
    future::poll_fn,
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener as StdListener, TcpStream as StdStream},
    os::{
        fd::OwnedFd,
        unix::net::{UnixListener as StdUnixListener, UnixStream},
    },
    path::Path,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use socket2::{Domain, Protocol, SockAddr, Socket as RawSocket, Type};
use tokio::{
    io::AsyncReadExt,
    net::{TcpListener, TcpStream, UnixListener},
    task::spawn_local,
};

use super::{
    Handler, Io, Server,
    drain::{Drain, Open},
    io::Socket,
    proxy_protocol::{self, Header},
    serve_connection,
};
use crate::{
    error::{Error, Kind, Result},
    exchange::{Connection, Exchange, Request, deadline::Deadline, framing::Refusal, handshake::Handshake},
    store::{Published, Snapshot},
    tls::{self, hello::Hello},
};

/// nginx's default for `backlog`.
pub const BACKLOG: i32 = 511;
/// How long accepting rests when the process is out of descriptors or memory, as nginx's `accept_mutex_delay`.
const ACCEPT_PAUSE: Duration = Duration::from_millis(500);
/// Refused connections are told to the log this often, not once each.
const REPORT_EVERY: Duration = Duration::from_secs(10);

/// A listening socket with what is spoken on it.
pub struct Listener {
    pub socket: StdListener,
    pub proxy_protocol: bool,
    pub tls: Option<Tls>,
}

/// Those that have a say in handshakes, when there are any. All listeners of a worker share one, which a reload fills anew.
pub type HandshakeScripts = Rc<RefCell<Option<Rc<dyn tls::Scripts>>>>;

/// Certificates, and the configuration that says which.
#[derive(Clone)]
pub struct Tls {
    pub server: Arc<tls::Server>,
    pub published: Arc<Published>,
    pub scripts: HandshakeScripts,
    /// Asked for certificates and keys that managers of secrets have.
    pub secrets: Rc<dyn tls::Secrets>,
}

impl Tls {
    /// Refuses a request whose host or path needs a client certificate that its connection does not have.
    pub(super) fn check(&self, conn: &Connection, request: &Request) -> Result<(), Refusal> {
        let Some(info) = &conn.tls else { return Ok(()) };
        // Nearly all: no certificate is asked for, and the host is the one that the handshake named. A name whose certificate a script
        // has brought may have got an object since.
        let named = info.sni.as_deref().is_some_and(|sni| sni.as_bytes() == request.host);
        if named && info.ssl.as_ref().is_some_and(|ssl| ssl.value.client_ca.is_none()) {
            return Ok(());
        }
        let ssls = &self.published.load().ssls;
        self.server.check_client(info, &request.host, &request.path, ssls).map_err(|why| {
            tracing::error!(client = %conn.peer.ip(), "{why}");
            Refusal::bad("client certificate refused")
        })
    }
}

/// Refuses an address that another process listens on. With SO_REUSEPORT alone both would bind it, and the kernel
/// would share the connections out between them.
pub fn ensure_free(addr: SocketAddr) -> Result<()> {
    let probe = || -> io::Result<()> {
        let socket = RawSocket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
        if addr.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.set_reuse_address(true)?;
        socket.bind(&SockAddr::from(addr))
    };
    match probe() {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
            Err(Error::config(Kind::Io).cause(e).context(format!("listen on {addr}")))
        }
        // What else is wrong with the address is for `bind` to say.
        _ => Ok(()),
    }
}

/// Binds one of the sockets on `addr`. Call it once per worker; with port 0 give the later calls the first one's address.
pub fn bind(addr: SocketAddr) -> Result<StdListener> {
    let failed = |e: io::Error| Error::config(Kind::Io).cause(e).context(format!("listen on {addr}"));
    let socket = RawSocket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP)).map_err(failed)?;
    if addr.is_ipv6() {
        // As nginx: [::] and 0.0.0.0 are two listeners.
        socket.set_only_v6(true).map_err(failed)?;
    }
    socket.set_reuse_address(true).map_err(failed)?;
    socket.set_reuse_port(true).map_err(failed)?;
    socket.set_nonblocking(true).map_err(failed)?;
    socket.bind(&SockAddr::from(addr)).map_err(failed)?;
    socket.listen(BACKLOG).map_err(failed)?;
    Ok(socket.into())
}

/// Accepts until the worker drains. One task per connection, on the calling thread.
pub async fn run<H: Handler>(server: Rc<Server<H>>, listener: Listener) -> Result<()> {
    let Listener { socket, proxy_protocol, tls } = listener;
    let way = Rc::new(Way { local: socket.local_addr()?, proxy_protocol, tls });
    let (drain, max) = (server.drain.clone(), server.settings.max_connections);
    let serve = |tcp, peer, open| {
        spawn_local(connection(server.clone(), tcp, peer, way.clone(), open));
    };
    accept(socket, &drain, max, serve).await
}

/// The same for connections to a socket of the file system. Their client is local by nature, and says so: 127.0.0.1.
pub async fn run_unix<H: Handler>(
    server: Rc<Server<H>>,
    socket: StdUnixListener,
    proxy_protocol: bool,
    tls: Option<Tls>,
) -> Result<()> {
    let here = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let way = Rc::new(Way { local: here, proxy_protocol, tls });
    let (drain, max) = (server.drain.clone(), server.settings.max_connections);
    let serve = |stream, peer, open| {
        spawn_local(connection(server.clone(), stream, peer, way.clone(), open));
    };
    let socket = UnixListener::from_std(socket)?;
    let poll = |cx: &mut Context<'_>| {
        let (stream, _) = ready!(socket.poll_accept(cx))?;
        // Bytes come and go by the same calls; what is TCP's own is asked in vain, and nothing depends on it.
        let stream = StdStream::from(OwnedFd::from(stream.into_std()?));
        Poll::Ready(TcpStream::from_std(stream).map(|stream| (stream, here)))
    };
    accept_by(poll, "a socket of lua_listen", &drain, max, serve).await
}

/// Binds a socket of the file system. One that nobody listens on any more is replaced.
pub fn bind_unix(path: &Path) -> Result<StdUnixListener> {
    let failed = |e: io::Error| Error::config(Kind::Io).cause(e).context(format!("listen on unix:{}", path.display()));
    let left_over = |e: &io::Error| {
        let nobody = |e: io::Error| e.kind() == io::ErrorKind::ConnectionRefused;
        e.kind() == io::ErrorKind::AddrInUse && UnixStream::connect(path).is_err_and(nobody)
    };
    let socket = match StdUnixListener::bind(path) {
        Err(e) if left_over(&e) => {
            std::fs::remove_file(path).map_err(failed)?;
            StdUnixListener::bind(path)
        }
        bound => bound,
    };
    let socket = socket.map_err(failed)?;
    socket.set_nonblocking(true).map_err(failed)?;
    Ok(socket)
}

/// Accepts until the worker drains. `max`: connections of the worker that may be open, of all its listeners.
pub async fn accept(
    socket: StdListener,
    drain: &Drain,
    max: usize,
    serve: impl Fn(TcpStream, SocketAddr, Open),
) -> Result<()> {
    let local = socket.local_addr()?;
    let socket = TcpListener::from_std(socket)?;
    accept_by(|cx| socket.poll_accept(cx), local, drain, max, serve).await
}

async fn accept_by(
    mut poll: impl FnMut(&mut Context<'_>) -> Poll<io::Result<(TcpStream, SocketAddr)>>,
    local: impl Display,
    drain: &Drain,
    max: usize,
    serve: impl Fn(TcpStream, SocketAddr, Open),
) -> Result<()> {
    let wake = Deadline::new();
    let mut refused = Refused::default();
    loop {
        let accepted = poll_fn(|cx| {
            if drain.is_draining() {
                return Poll::Ready(None);
            }
            // No limit is set: this only asks to be woken when the drain begins.
            wake.poll_expired(cx);
            poll(cx).map(Some)
        });
        match accepted.await {
            None => return Ok(()),
            Some(Ok((tcp, peer))) if drain.open() < max => serve(tcp, peer, drain.enter()),
            // Dropped: better a quick refusal than a wait that nobody sees.
            Some(Ok(_)) => refused.count(max),
            Some(Err(e)) if is_exhaustion(&e) => {
                tracing::error!("accept on {local} failed: {e}; trying again in {ACCEPT_PAUSE:?}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
            Some(Err(e)) => tracing::debug!("accept on {local} failed: {e}"),
        }
    }
}

/// What a listener does with each of its connections.
pub struct Way {
    pub local: SocketAddr,
    pub proxy_protocol: bool,
    pub tls: Option<Tls>,
}

/// Connections closed because of `worker_connections`.
#[derive(Default)]
struct Refused {
    since_report: u64,
    reported: Option<Instant>,
}

impl Refused {
    fn count(&mut self, max: usize) {
        self.since_report += 1;
        if self.reported.is_none_or(|at| at.elapsed() >= REPORT_EVERY) {
            tracing::warn!("{max} worker_connections are not enough: {} connections refused", self.since_report);
            *self = Refused { since_report: 0, reported: Some(Instant::now()) };
        }
    }
}

/// Not this connection's fault: the next accept would fail in the same way at once.
fn is_exhaustion(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}

async fn connection<H: Handler>(server: Rc<Server<H>>, tcp: TcpStream, peer: SocketAddr, way: Rc<Way>, open: Open) {
    let opened = open_within(server.settings.header_timeout, tcp, peer, &way);
    let Some((io, conn)) = opened.await else { return };
    serve_connection(server, io, Rc::new(conn), way.tls.clone(), open).await;
}

/// PROXY protocol and TLS within `limit`. `None`: the log says why there is none.
pub async fn open_within(limit: Duration, tcp: TcpStream, peer: SocketAddr, way: &Way) -> Option<(Io, Connection)> {
    // Latency matters more than packets; a socket that refuses is about to fail anyway.
    let _ = tcp.set_nodelay(true);
    // A wildcard listener learns the address per connection.
    let local = if way.local.ip().is_unspecified() { tcp.local_addr().unwrap_or(way.local) } else { way.local };
    let prepared = tokio::time::timeout(limit, prepare(tcp, peer, local, way));
    let prepared = match way.proxy_protocol || way.tls.is_some() {
        true => prepared.await.unwrap_or_else(|_| Err(Error::client(Kind::ReadTimeout).context("handshake timed out"))),
        // Nothing to wait for, so no timer.
        false => prepared.into_inner().await,
    };
    prepared.inspect_err(|e| tracing::info!(client = %peer.ip(), server = %local, "{e}")).ok()
}

/// What must happen before the first request: PROXY protocol, then TLS.
async fn prepare(tcp: TcpStream, peer: SocketAddr, local: SocketAddr, way: &Way) -> Result<(Io, Connection)> {
    let mut conn = Connection::new(next_serial(), peer, local);
    let socket = match way.proxy_protocol {
        true => read_proxy_header(tcp, &mut conn).await?,
        false => Socket::new(tcp, Vec::new()),
    };
    let Some(tls) = &way.tls else { return Ok((Io::Tcp(socket), conn)) };
    let mut socket = socket;
    let opening = tls::hello::read(&mut socket).await?;
    socket.put_back(opening.bytes);
    let kept = opening.hello.as_deref().and_then(Hello::parse).map(|hello| hello.keep());
    let snapshot = tls.published.load();
    let scripts = tls.scripts.borrow().clone();
    let (stream, mut info) = match (scripts, opening.hello) {
        (Some(scripts), Some(hello)) => {
            let mut x = handshake(&conn, &snapshot, hello);
            let (stream, info, made) =
                tls.server.accept_scripted(socket, &snapshot.ssls, &mut x, (&*scripts, &*tls.secrets)).await?;
            scripts.end(&mut x);
            conn.ctx.clone_from(&x.lua.ctx);
            if !made.is_empty() {
                spawn_local(tls::store(scripts.clone(), x, made));
            }
            (stream, info)
        }
        // What is no ClientHello gets its alert from the library.
        _ => tls.server.accept(socket, &snapshot.ssls, &*tls.secrets).await?,
    };
    // TLS 1.3 has no such names: what a client sends there means nothing (RFC 8446, 4.1.2).
    let named = kept.as_ref().filter(|_| info.session_reused && info.protocol == "TLSv1.2");
    info.session_id = named.map(|hello| hello.session_id.clone()).filter(|id| !id.is_empty());
    info.hello = kept;
    conn.tls = Some(info);
    Ok((Io::Tls(Box::new(stream)), conn))
}

/// What scripts of a handshake run on, before there is a request.
fn handshake(conn: &Connection, snapshot: &Arc<Snapshot>, hello: Vec<u8>) -> Exchange {
    let mut own = Connection::new(conn.serial, conn.peer, conn.local);
    own.proxy = conn.proxy;
    let mut x = Exchange::new(Rc::new(own), snapshot.clone());
    x.begin();
    x.lua.handshake = Some(Box::new(Handshake { hello, ..Handshake::default() }));
    x
}

async fn read_proxy_header(mut tcp: TcpStream, conn: &mut Connection) -> Result<Socket> {
    let mut input = Vec::with_capacity(1024);
    let header = loop {
        let bad = |why: &'static str| Error::client(Kind::Malformed).context(why);
        if let Some(header) = proxy_protocol::parse(&input).map_err(bad)? {
            break header;
        }
        // Bounded: the parser refuses what is longer than a header can be.
        input.reserve(1024);
        let n = tcp.read_buf(&mut input).await?;
        if n == 0 {
            return Err(Error::client(Kind::Closed).context("closed before the PROXY protocol header was whole"));
        }
    };
    let Header { addresses, tlvs, len } = header;
    conn.proxy_tlvs = input[tlvs..len].into();
    conn.proxy = addresses;
    Ok(Socket::new(tcp, input.split_off(len)))
}

/// The number of the next connection.
pub fn next_serial() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}
