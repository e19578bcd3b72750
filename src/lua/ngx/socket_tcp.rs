//! `ngx.socket.tcp`: connections of scripts over TCP or a unix socket, with TLS and keepalive pools.
//!
//! The face is lua/moongate/socket.lua; contract and texts are lua-nginx-module's. What is read ahead waits in one
//! buffer per connection; every wait ends with the socket's timeout, which counts from the last byte as nginx's does.

use std::{
    borrow::Cow,
    cell::{Cell, RefCell},
    ffi::c_int,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::fd::{AsRawFd, BorrowedFd, RawFd},
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::{Buf, Bytes, BytesMut};
use rustls::{CertificateError, OtherError};
use rustls_pki_types::ServerName;
use smallvec::smallvec;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpSocket, TcpStream, UnixStream},
    time::timeout,
};
use tokio_rustls::TlsConnector;

pub use super::socket::set_resolver;
use super::{
    object,
    socket::{self, Owner, Shut, TIMEOUT, error_text},
    socket_pool::{Lease, POOL_SIZE, Pool},
    ssl,
};
use crate::{
    conf::locations::{Location, SocketTls},
    error::{Kind, Result},
    exchange::{Exchange, Headers, RequestBody, Version},
    lua::{
        api::{Api, Phases, Raise, Stack, Wait, request},
        fast,
        host::Answer,
        sched::{Op, Value, Values, failed},
    },
    net::into_tunnel,
    observe::log::{self, Level},
    tls,
};

/// Room for one read.
const READ_SIZE: usize = 16 * 1024;

/// What one `receive` may gather: a peer that never stops must not take the worker's memory.
const MAX_RECEIVE: usize = 64 * 1024 * 1024;

/// `lua_socket_keepalive_timeout`: lua-nginx-module's default.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(60);
/// What options and pools answer on `ngx.req.socket`: the descriptor is the gateway's.
const NOT_OURS: &str = "not supported: the connection is the client's";

/// Any byte stream.
trait Io: AsyncRead + AsyncWrite + Unpin {}
impl<T: AsyncRead + AsyncWrite + Unpin> Io for T {}

/// An open connection.
pub struct Conn {
    /// `None` while TLS is being agreed on.
    io: Option<Box<dyn Io>>,
    fd: RawFd,
    peer: IpAddr,
    /// Read, not yet received.
    buf: BytesMut,
    tls: bool,
    pub(super) reused: u32,
    /// The pool that it belongs to or would go to.
    name: Box<[u8]>,
    pub(super) lease: Option<Lease>,
    read_ended: bool,
    write_ended: bool,
}

impl Conn {
    fn new(io: impl Io + AsRawFd + 'static, peer: IpAddr, name: Box<[u8]>, lease: Option<Lease>) -> Conn {
        let fd = io.as_raw_fd();
        let (buf, io) = (BytesMut::new(), Some(Box::new(io) as Box<dyn Io>));
        Conn { io, fd, peer, buf, tls: false, reused: 0, name, lease, read_ended: false, write_ended: false }
    }

    /// Ready when an idle connection is of no more use: its peer has closed it or speaks out of turn.
    pub(super) fn poll_idle(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(io) = &mut self.io else { return Poll::Ready(()) };
        let mut byte = [0; 1];
        Pin::new(io).poll_read(cx, &mut ReadBuf::new(&mut byte)).map(|_| ())
    }

    /// Reads once into the buffer; 0 is the end.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let Some(io) = &mut self.io else { return Poll::Ready(Ok(0)) };
        self.buf.reserve(READ_SIZE);
        let mut room = ReadBuf::uninit(self.buf.spare_capacity_mut());
        ready!(Pin::new(io).poll_read(cx, &mut room))?;
        let n = room.filled().len();
        // SAFETY: the first `n` bytes of the spare capacity were just filled.
        unsafe { self.buf.set_len(self.buf.len() + n) };
        Poll::Ready(Ok(n))
    }
}

const CONNECTING: u8 = 1;
const READING: u8 = 2;
const WRITING: u8 = 4;

struct Socket {
    owner: Rc<Owner>,
    conn: RefCell<Option<Conn>>,
    busy: Cell<u8>,
    connect_timeout: Cell<Option<Duration>>,
    send_timeout: Cell<Option<Duration>>,
    read_timeout: Cell<Option<Duration>>,
    /// `bind`
    local: Cell<Option<SocketAddr>>,
    /// `setclientcert`
    client: RefCell<Option<ssl::Pair>>,
    /// `settrustedstore`, until a handshake has taken it.
    trusted: RefCell<Option<Rc<ssl::Chain>>>,
}

impl Shut for Socket {
    fn shut(&self) {
        self.close();
    }

    fn holds_connection(&self) -> bool {
        self.conn.borrow().is_some() || self.busy.get() & CONNECTING != 0
    }
}

impl Socket {
    /// How long a wait may take: `settimeout`, else what the location says, else lua-nginx-module's default.
    fn limit(&self, of: u8) -> Duration {
        let set = || Some(fast::exchange()?.location.as_ref()?.directives.socket);
        let (own, of_location, what) = match of {
            CONNECTING => (&self.connect_timeout, set().and_then(|p| p.connect), "connect"),
            READING => (&self.read_timeout, set().and_then(|p| p.read), "read"),
            _ => (&self.send_timeout, set().and_then(|p| p.send), "send"),
        };
        let limit = own.get().or(of_location).unwrap_or(TIMEOUT);
        if log::enabled(Level::Debug) {
            note(&format!("lua tcp socket {what} timeout: {}", limit.as_millis()));
        }
        limit
    }

    fn close(&self) -> bool {
        let conn = self.conn.take();
        conn.is_some()
    }

    /// What another light thread does with the socket, of these.
    fn busy_text(&self, with: u8) -> Option<&'static str> {
        match self.busy.get() & with {
            0 => None,
            b if b & CONNECTING != 0 => Some("socket busy connecting"),
            b if b & READING != 0 => Some("socket busy reading"),
            _ => Some("socket busy writing"),
        }
    }

    fn poll_fill(&self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        match &mut *self.conn.borrow_mut() {
            Some(conn) => conn.poll_fill(cx),
            None => Poll::Ready(Ok(0)),
        }
    }

    fn poll_write(&self, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let mut conn = self.conn.borrow_mut();
        match conn.as_mut().and_then(|c| c.io.as_mut()) {
            Some(io) => Pin::new(io).poll_write(cx, data),
            None => Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
        }
    }

    fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut conn = self.conn.borrow_mut();
        match conn.as_mut().and_then(|c| c.io.as_mut()) {
            Some(io) => Pin::new(io).poll_flush(cx),
            None => Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
        }
    }

    /// Notes that one direction has failed or ended; with both the connection goes.
    fn end(&self, of: u8) {
        let mut conn = self.conn.borrow_mut();
        let Some(c) = conn.as_mut() else { return };
        c.read_ended |= of & READING != 0;
        c.write_ended |= of & WRITING != 0;
        let gone = if c.read_ended && c.write_ended { conn.take() } else { None };
        drop(conn);
        drop(gone);
    }

    /// Whether this direction can be used.
    fn is_open(&self, of: u8) -> bool {
        self.conn.borrow().as_ref().is_some_and(|c| if of == READING { !c.read_ended } else { !c.write_ended })
    }
}

/// Keeps other light threads off while one waits; ends with the wait, however it ends.
struct Busy {
    socket: Rc<Socket>,
    with: u8,
}

impl Busy {
    fn new(socket: &Rc<Socket>, with: u8) -> Busy {
        socket.busy.set(socket.busy.get() | with);
        Busy { socket: socket.clone(), with }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.socket.busy.set(self.socket.busy.get() & !self.with);
        // A handshake that was given up has taken the stream with it.
        let mut conn = self.socket.conn.borrow_mut();
        let gone = if conn.as_ref().is_some_and(|c| c.io.is_none()) { conn.take() } else { None };
        drop(conn);
        drop(gone);
    }
}

pub fn register(api: &mut Api) -> Result<()> {
    let any = Phases::ANY;
    api.func("native.tcp.new", any, "new() -> object: the insides of a TCP socket.", new)?;
    api.func("native.tcp.bind", any, "bind(self, address, port?): where connections come from.", bind)?;
    api.wait(
        "native.tcp.connect",
        any,
        "connect(self, host, port, options?) or connect(self, \"unix:…\", …).",
        connect,
    )?;
    api.func(
        "native.tcp.of_request",
        Phases::BEFORE_HEAD,
        "of_request() -> object: reads the request's body.",
        of_request,
    )?;
    let doc = "of_client() -> object: the client's connection itself, from now on the script's.";
    api.wait("native.tcp.of_client", Phases::BEFORE_HEAD, doc, of_client)?;
    let doc =
        "setclientcert(self, certificate?, key?) -> true | nil, err: objects of native.ssl for the next handshake.";
    api.func("native.tcp.setclientcert", any, doc, set_client_cert)?;
    let doc =
        "settrustedstore(self, certificates?) -> true | nil, err: authorities of the next handshake that verifies.";
    api.func("native.tcp.settrustedstore", any, doc, set_trusted_store)?;
    api.func("native.tcp.has_tls", any, "has_tls(self) -> true | nil, err.", has_tls)?;
    api.wait("native.tcp.sslhandshake", any, "sslhandshake(self, session?, name?, verify?) -> true.", handshake)?;
    api.wait("native.tcp.send", any, "send(self, data) -> bytes.", send)?;
    api.wait("native.tcp.receive", any, "receive(self, size | \"*a\" | \"*l\") -> data.", receive)?;
    api.wait("native.tcp.receiveany", any, "receiveany(self, max) -> data.", receive_any)?;
    api.func("native.tcp.receiveuntil", any, "receiveuntil(self, pattern, options?) -> object for read_until.", until)?;
    api.wait("native.tcp.read_until", any, "read_until(self, object, size?) -> data.", read_until)?;
    api.func("native.tcp.close", any, "close(self) -> 1.", close)?;
    api.func("native.tcp.settimeout", any, "settimeout(self, ms): for all waits.", set_timeout)?;
    api.func("native.tcp.settimeouts", any, "settimeouts(self, connect, send, read): in milliseconds.", set_timeouts)?;
    api.func("native.tcp.setoption", any, "setoption(self, name, value) -> true.", set_option)?;
    api.func("native.tcp.setkeepalive", any, "setkeepalive(self, timeout?, size?) -> 1.", set_keepalive)?;
    api.func("native.tcp.getreusedtimes", any, "getreusedtimes(self) -> number.", reused_times)?;
    api.func("native.tcp.getfd", any, "getfd(self) -> number.", get_fd)
}

fn new(s: &Stack) -> Answer {
    Ok(object::push(s, new_socket()?))
}

fn new_socket() -> Result<Rc<Socket>, Raise> {
    let owner = socket::current_owner()?;
    let socket = Rc::new(Socket {
        owner: owner.clone(),
        conn: RefCell::default(),
        busy: Cell::new(0),
        connect_timeout: Cell::new(None),
        send_timeout: Cell::new(None),
        read_timeout: Cell::new(None),
        local: Cell::new(None),
        client: RefCell::default(),
        trusted: RefCell::default(),
    });
    let weak: std::rc::Weak<Socket> = Rc::downgrade(&socket);
    owner.adopt(weak);
    Ok(socket)
}

/// The request's body as something to read from: it is found by the request that runs, which polls.
struct BodyIo;

impl AsyncRead for BodyIo {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let client = fast::exchange().and_then(|x| x.client.as_mut());
        let Some(client) = client else { return Poll::Ready(Err(io::ErrorKind::NotConnected.into())) };
        let mut piece = Vec::new();
        match ready!(client.poll_read_body(cx, &mut piece, buf.remaining())) {
            Ok(_) => {
                buf.put_slice(&piece);
                Poll::Ready(Ok(()))
            }
            Err(e) if e.kind() == Kind::Closed => Poll::Ready(Err(io::Error::other("client aborted"))),
            Err(e) => Poll::Ready(Err(io::Error::other(e.to_string()))),
        }
    }
}

impl AsyncWrite for BodyIo {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Err(io::ErrorKind::Unsupported.into()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// `ngx.req.socket()`
fn of_request(s: &Stack) -> Answer {
    let x = request()?;
    match &x.body {
        RequestBody::Streaming { .. } => {}
        RequestBody::None => return s.fail("no body"),
        _ => return s.fail("request body already exists"),
    }
    if x.request.headers.contains("transfer-encoding") {
        return s.fail("chunked request bodies not supported yet");
    }
    // Now, and not with the first read: the script may print something before that.
    if let Some(client) = x.client.as_mut().filter(|_| x.request.expects_continue)
        && let Err(e) = client.interim(100, &Headers::new())
    {
        return s.fail(e.to_string());
    }
    // The script may still put another one in its place.
    x.body = RequestBody::Memory(Bytes::new());
    x.body_read = true;
    new(s)?;
    let socket = object::get::<Socket>(s, -1)?;
    *socket.conn.borrow_mut() = Some(Conn {
        io: Some(Box::new(BodyIo)),
        fd: -1,
        peer: x.conn.peer.ip(),
        buf: BytesMut::new(),
        tls: false,
        reused: 0,
        name: Box::default(),
        lease: None,
        read_ended: false,
        write_ended: true,
    });
    Ok(1)
}

/// `ngx.req.socket(true)`: what was sent of the response goes out first.
fn of_client(s: &Stack) -> Result<Wait, Raise> {
    let x = request()?;
    if x.request.version == Version::Http2 {
        return refuse(s, "http v2 not supported yet");
    }
    if x.client.is_none() || x.depth > 0 {
        return refuse(s, "no connection");
    }
    let socket = new_socket()?;
    Ok(Wait::Park(Op::Exchange(Box::new(move |cx, x| {
        let Some(client) = &mut x.client else { return Poll::Ready(failed("closed")) };
        if let Err(e) = ready!(client.poll_flush(cx)) {
            return Poll::Ready(failed(e.to_string()));
        }
        let peer = x.conn.peer.ip();
        let Some(tunnel) = x.client.take().and_then(into_tunnel) else { return Poll::Ready(failed("closed")) };
        x.response.ended = true;
        let conn = Conn {
            io: Some(Box::new(tunnel.io)),
            fd: -1,
            peer,
            buf: BytesMut::from(&tunnel.unread[..]),
            tls: false,
            reused: 0,
            name: Box::default(),
            lease: None,
            read_ended: false,
            write_ended: false,
        };
        *socket.conn.borrow_mut() = Some(conn);
        let socket = socket.clone();
        Poll::Ready(smallvec![Value::Push(Box::new(move |s| {
            object::push(s, socket);
        }))])
    }))))
}

/// The socket in `self[1]`, if it belongs to whoever runs.
fn this(s: &Stack) -> Result<Rc<Socket>, Raise> {
    let socket = any(s)?;
    socket::check_owner(&socket.owner)?;
    Ok(socket)
}

/// The same for reading and writing. One of a request that has ended is not somebody else's: it is closed.
fn open_one(s: &Stack) -> Result<Rc<Socket>, Raise> {
    let socket = any(s)?;
    if !socket.owner.has_ended() {
        socket::check_owner(&socket.owner)?;
    }
    Ok(socket)
}

fn any(s: &Stack) -> Result<Rc<Socket>, Raise> {
    s.arg_table(1)?;
    s.get_index(1, 1);
    let socket = object::get::<Socket>(s, -1);
    s.pop(1);
    socket.map_err(|_| s.argument_error(1, "socket expected"))
}

fn refuse(s: &Stack, text: &str) -> Result<Wait, Raise> {
    s.fail(text).map(Wait::Ready)
}

fn bind(s: &Stack) -> Answer {
    let socket = this(s)?;
    let port = s.opt_number(3)?.unwrap_or(0.0) as u16;
    match socket::literal(&s.arg_str(2)?) {
        Some(address) => {
            socket.local.set(Some(SocketAddr::new(address, port)));
            Ok(s.push_number(1.0))
        }
        None => s.fail("bad address"),
    }
}

/// Where to connect.
enum Target {
    Tcp(String, u16),
    Unix(String),
}

/// `connect`'s last argument.
#[derive(Default)]
struct Options {
    pool: Option<Box<[u8]>>,
    size: Option<usize>,
    backlog: Option<usize>,
}

fn options(s: &Stack, i: c_int) -> Result<Options, Raise> {
    if s.is_nil(i) {
        return Ok(Options::default());
    }
    s.arg_table(i)?;
    let count = |name: &str, least: f64| {
        s.get(i, name);
        let (kind, kind_name, value) = (s.kind(-1), s.kind_name(-1), s.number(-1));
        s.pop(1);
        match value {
            _ if kind == mlua::ffi::LUA_TNIL => Ok(None),
            Some(n) if kind == mlua::ffi::LUA_TNUMBER && n >= least => Ok(Some(n as usize)),
            Some(n) if kind == mlua::ffi::LUA_TNUMBER => {
                Err(s.argument_error(i - 1, &format!("bad \"{name}\" option value: {n}")))
            }
            _ => Err(s.argument_error(i - 1, &format!("bad \"{name}\" option type: {kind_name}"))),
        }
    };
    let (size, backlog) = (count("pool_size", 1.0)?, count("backlog", 0.0)?);
    s.get(i, "pool");
    let pool = match s.kind(-1) {
        mlua::ffi::LUA_TNIL => None,
        mlua::ffi::LUA_TSTRING | mlua::ffi::LUA_TNUMBER => s.bytes(-1).map(Into::into),
        _ => return Err(s.argument_error(i - 1, &format!("bad \"pool\" option type: {}", s.kind_name(-1)))),
    };
    s.pop(1);
    Ok(Options { pool, size, backlog })
}

fn connect(s: &Stack) -> Result<Wait, Raise> {
    let socket = this(s)?;
    let host = s.arg_str(2)?.into_owned();
    let (target, options, name) = match socket::unix_path(&host) {
        Some(path) => (Target::Unix(path.to_owned()), options(s, 3)?, host.clone()),
        None => match socket::port(s, 3)? {
            Ok(port) => (Target::Tcp(host.clone(), port), options(s, 4)?, format!("{host}:{port}")),
            Err(text) => return refuse(s, &text),
        },
    };
    if let Some(text) = socket.busy_text(CONNECTING | READING | WRITING) {
        return refuse(s, text);
    }
    socket.close();
    let name = options.pool.unwrap_or_else(|| name.into_bytes().into());
    let pools = socket::current_vm()?.sockets.pools.clone();
    let pool = if options.size.is_some() || options.backlog.is_some() {
        let pool = pools.open(&name, options.size.unwrap_or(POOL_SIZE), options.backlog);
        if pool.is_none() {
            return refuse(s, "too many connection pools");
        }
        pool
    } else {
        pools.get(&name)
    };
    let lease = match &pool {
        None => None,
        Some(pool) => match pool.try_lease() {
            Some(lease) => match pooled(&socket, lease) {
                Ok(()) => {
                    note("lua tcp socket get keepalive peer: using connection");
                    return Ok(Wait::Ready(s.push_number(1.0)));
                }
                Err(lease) => Some(lease),
            },
            None if !pool.may_wait() => return refuse(s, "too many waiting connect operations"),
            None => {
                let place = pool.lease();
                return Ok(Wait::Park(Op::future(queued(Busy::new(&socket, CONNECTING), target, name, place))));
            }
        },
    };
    Ok(Wait::Park(Op::future(open(Busy::new(&socket, CONNECTING), target, name, lease))))
}

/// Takes an idle connection of the lease's pool, or gives the lease back.
fn pooled(socket: &Socket, lease: Lease) -> Result<(), Lease> {
    let Some(mut conn) = Pool::of(&lease).pop() else { return Err(lease) };
    conn.lease = Some(lease);
    *socket.conn.borrow_mut() = Some(conn);
    Ok(())
}

/// A line of level error about a socket, unless `lua_socket_log_errors` is off.
fn complain(text: &str) {
    let logs = |l: &Arc<Location>| l.directives.lua_socket_log_errors;
    if let Some(x) = fast::exchange().filter(|x| x.location.as_ref().is_some_and(logs)) {
        x.log(Level::Error, text.as_bytes());
    }
}

/// A line for those who look at how their sockets are used.
fn note(text: &str) {
    if let Some(x) = fast::exchange() {
        x.log(Level::Debug, text.as_bytes());
    }
}

async fn queued(busy: Busy, target: Target, name: Box<[u8]>, place: impl Future<Output = Option<Lease>>) -> Values {
    let limit = busy.socket.limit(CONNECTING);
    match timeout(limit, place).await {
        Err(_) => failed("timeout"),
        Ok(None) => failed("closed"),
        Ok(Some(lease)) => match pooled(&busy.socket, lease) {
            Ok(()) => smallvec![Value::Number(1.0)],
            Err(lease) => open(busy, target, name, Some(lease)).await,
        },
    }
}

async fn open(busy: Busy, target: Target, name: Box<[u8]>, lease: Option<Lease>) -> Values {
    let socket = &busy.socket;
    let limit = socket.limit(CONNECTING);
    match timeout(limit, reach(target, socket.local.get(), name, lease)).await {
        Err(_) => failed("timeout"),
        Ok(Err(text)) => failed(text),
        Ok(Ok(conn)) => {
            *socket.conn.borrow_mut() = Some(conn);
            smallvec![Value::Number(1.0)]
        }
    }
}

async fn reach(
    target: Target,
    local: Option<SocketAddr>,
    name: Box<[u8]>,
    lease: Option<Lease>,
) -> Result<Conn, String> {
    match target {
        Target::Unix(path) => {
            let stream = UnixStream::connect(path).await.map_err(|e| error_text(&e))?;
            Ok(Conn::new(stream, Ipv4Addr::LOCALHOST.into(), name, lease))
        }
        Target::Tcp(host, port) => {
            let (stream, peer) = dial(&host, port, local).await?;
            // Requests and answers are written whole: nothing is won by waiting for more.
            stream.set_nodelay(true).ok();
            Ok(Conn::new(stream, peer, name, lease))
        }
    }
}

/// Begins with an address at random, as nginx; goes on to the others where nginx gives up.
async fn dial(host: &str, port: u16, local: Option<SocketAddr>) -> Result<(TcpStream, IpAddr), String> {
    let mut addresses = socket::addresses(host).await?;
    socket::shuffle(&mut addresses);
    let mut last = format!("{host} could not be resolved (3: Host not found)");
    for address in addresses {
        match dial_one(SocketAddr::new(address, port), local).await {
            Ok(stream) => return Ok((stream, address)),
            Err(e) => last = error_text(&e),
        }
    }
    Err(last)
}

async fn dial_one(address: SocketAddr, local: Option<SocketAddr>) -> io::Result<TcpStream> {
    let Some(local) = local else { return TcpStream::connect(address).await };
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.bind(local)?;
    socket.connect(address).await
}

fn set_client_cert(s: &Stack) -> Answer {
    let socket = this(s)?;
    match ssl::client_pair(s) {
        Ok(pair) => {
            *socket.client.borrow_mut() = pair;
            Ok(s.push_bool(true))
        }
        Err(text) => s.fail(text),
    }
}

fn set_trusted_store(s: &Stack) -> Answer {
    let socket = this(s)?;
    if socket.conn.borrow().is_none() {
        return s.fail("closed");
    }
    let trusted = match s.is_nil(2) {
        true => None,
        false => match object::get::<ssl::Chain>(s, 2) {
            Ok(chain) => Some(chain),
            Err(_) => return s.fail(format!("bad store arg: cdata expected, got {}", s.kind_name(2))),
        },
    };
    *socket.trusted.borrow_mut() = trusted;
    Ok(s.push_bool(true))
}

fn has_tls(s: &Stack) -> Answer {
    let socket = this(s)?;
    let tls = socket.conn.borrow().as_ref().map(|conn| conn.tls);
    match tls {
        Some(true) => Ok(s.push_bool(true)),
        Some(false) => s.fail("not an SSL connection"),
        None => s.fail("closed"),
    }
}

/// `sslhandshake(session, name, verify)`. Sessions are resumed by the TLS configuration itself.
fn handshake(s: &Stack) -> Result<Wait, Raise> {
    let socket = this(s)?;
    let name = s.opt_bytes(3)?.map(|n| String::from_utf8_lossy(n).into_owned()).filter(|n| !n.is_empty());
    let verify = s.boolean(4);
    if let Some(text) = socket.busy_text(CONNECTING | READING | WRITING) {
        return refuse(s, text);
    }
    let (io, peer) = match &mut *socket.conn.borrow_mut() {
        None => return refuse(s, "closed"),
        Some(conn) if conn.read_ended || conn.write_ended => return refuse(s, "closed"),
        Some(conn) if conn.tls => return Ok(Wait::Ready(s.push_bool(true))),
        Some(conn) if !conn.buf.is_empty() => return refuse(s, "unread data in buffer"),
        Some(conn) => (conn.io.take(), conn.peer),
    };
    let Some(io) = io else { return refuse(s, "closed") };
    let own = fast::exchange().and_then(|x| Some(x.location.as_ref()?.socket_tls.clone()));
    Ok(Wait::Park(Op::future(agree(Busy::new(&socket, CONNECTING), io, peer, name, verify, own))))
}

/// `own`: what the location says of TLS.
async fn agree(
    busy: Busy,
    io: Box<dyn Io>,
    peer: IpAddr,
    name: Option<String>,
    verify: bool,
    own: Option<Arc<SocketTls>>,
) -> Values {
    let name = match name {
        // An address sends no name.
        None => Ok(ServerName::IpAddress(peer.into())),
        Some(name) => ServerName::try_from(name).map_err(|_| "invalid server name"),
    };
    let client = busy.socket.client.borrow().clone();
    let pair = client.as_ref().map(|(chain, key)| (&*chain.pem, &*key.pem));
    let trusted = busy.socket.trusted.borrow_mut().take().filter(|_| verify);
    let config = match (&trusted, &own) {
        (Some(trusted), own) => tls::client_config_trusting(&trusted.pem, own.as_ref(), pair),
        (None, Some(own)) => tls::client_config_of(own, verify, pair),
        (None, None) => tls::client_config(verify, pair, &[]),
    };
    let (name, config) = match (name, config) {
        (Ok(name), Ok(config)) => (name, config),
        (Err(text), _) => return failed(text),
        (_, Err(e)) => return failed(e.to_string()),
    };
    let limit = busy.socket.limit(CONNECTING);
    match timeout(limit, TlsConnector::from(config).connect(name, io)).await {
        Err(_) => failed("timeout"),
        Ok(Err(e)) => failed(tls_text(&e)),
        Ok(Ok(stream)) => {
            let mut conn = busy.socket.conn.borrow_mut();
            let Some(conn) = conn.as_mut() else { return failed("closed") };
            conn.io = Some(Box::new(stream));
            conn.tls = true;
            smallvec![Value::Bool(true)]
        }
    }
}

/// Why a handshake failed, in OpenSSL's words where scripts may look for them.
fn tls_text(e: &io::Error) -> String {
    let Some(error) = e.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()) else {
        return if e.kind() == io::ErrorKind::UnexpectedEof { "handshake failed".into() } else { error_text(e) };
    };
    let rustls::Error::InvalidCertificate(why) = error else { return "handshake failed".into() };
    match why {
        CertificateError::UnknownIssuer => "20: unable to get local issuer certificate",
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            "certificate host mismatch"
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => "10: certificate has expired",
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "9: certificate is not yet valid"
        }
        CertificateError::Revoked => "23: certificate revoked",
        CertificateError::BadSignature => "7: certificate signature failure",
        CertificateError::Other(OtherError(why)) if why.is::<tls::ChainTooLong>() => "22: certificate chain too long",
        _ => "handshake failed",
    }
    .into()
}

fn send(s: &Stack) -> Result<Wait, Raise> {
    let socket = open_one(s)?;
    let mut data = Vec::new();
    socket::gather(s, 2, &mut data)?;
    if let Some(text) = socket.busy_text(CONNECTING | WRITING) {
        return refuse(s, text);
    }
    if !socket.is_open(WRITING) {
        return refuse(s, "closed");
    }
    Ok(Wait::Park(Op::future(write(Busy::new(&socket, WRITING), data))))
}

async fn write(busy: Busy, data: Vec<u8>) -> Values {
    let socket = &busy.socket;
    match write_all(socket, &data).await {
        Ok(()) => smallvec![Value::Number(data.len() as f64)],
        Err(e) => {
            socket.end(WRITING);
            failed(error_text(&e))
        }
    }
}

async fn write_all(socket: &Socket, mut data: &[u8]) -> io::Result<()> {
    let timed_out = |_| io::Error::from(io::ErrorKind::TimedOut);
    while !data.is_empty() {
        let limit = socket.limit(WRITING);
        let write = std::future::poll_fn(|cx| socket.poll_write(cx, data));
        match timeout(limit, write).await.map_err(timed_out)?? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => data = &data[n..],
        }
    }
    let limit = socket.limit(WRITING);
    timeout(limit, std::future::poll_fn(|cx| socket.poll_flush(cx))).await.map_err(timed_out)?
}

/// What a call waits to see in the buffer.
enum Want {
    /// Without its end; the number says how far there is none.
    Line(usize),
    Exactly(usize),
    All,
    Any(usize),
    Until(Rc<Until>, Option<usize>),
}

/// A `receiveuntil` iterator.
struct Until {
    pattern: Box<[u8]>,
    inclusive: bool,
    /// The pattern was seen behind the last piece: the next call says so.
    done: Cell<bool>,
}

/// What was wanted, as it lies in the buffer.
enum Got<'a> {
    Data(&'a [u8]),
    /// Up to its line feed.
    Line(&'a [u8]),
    /// The iterator has come to its pattern.
    End,
}

impl Got<'_> {
    fn push(&self, s: &Stack) -> c_int {
        match self {
            Got::Data(data) => s.push_bytes(data),
            Got::Line(line) => s.push_bytes(without_cr(line)),
            Got::End => s.push_nil(),
        }
    }

    fn values(&self) -> Values {
        match self {
            Got::Data(data) => smallvec![Value::Bytes(data.to_vec())],
            Got::Line(line) => smallvec![Value::Bytes(without_cr(line).into_owned())],
            Got::End => smallvec![Value::Nil],
        }
    }
}

impl Want {
    /// What is wanted, if it is there, and how many bytes go with it.
    fn look<'a>(&mut self, buf: &'a [u8]) -> Option<(Got<'a>, usize)> {
        let data = |n: usize| Some((Got::Data(&buf[..n]), n));
        match self {
            Want::Line(seen) => match memchr::memchr(b'\n', &buf[*seen..]) {
                Some(at) => Some((Got::Line(&buf[..*seen + at]), *seen + at + 1)),
                None => {
                    *seen = buf.len();
                    None
                }
            },
            Want::Exactly(n) if buf.len() >= *n => data(*n),
            Want::Any(max) if !buf.is_empty() => data((*max).min(buf.len())),
            Want::Until(until, size) => until.look(*size, buf),
            _ => None,
        }
    }

    /// What there is when no more comes, or not in time.
    fn partial(&self, buf: &mut BytesMut, ended: bool) -> Vec<u8> {
        let all = match self {
            // What may yet become the pattern waits for the next call.
            Want::Until(until, _) if !ended => buf.split_to(buf.len() - until.overlap(buf)),
            _ => buf.split(),
        };
        if let Want::Line(_) = self { without_cr(&all).into_owned() } else { all.to_vec() }
    }
}

/// A line's carriage returns do not count. Nearly all lines have one, at their end.
fn without_cr(line: &[u8]) -> Cow<'_, [u8]> {
    match memchr::memchr(b'\r', line) {
        None => line.into(),
        Some(at) if at + 1 == line.len() => line[..at].into(),
        Some(_) => line.iter().copied().filter(|b| *b != b'\r').collect(),
    }
}

impl Until {
    fn look<'a>(&self, size: Option<usize>, buf: &'a [u8]) -> Option<(Got<'a>, usize)> {
        if self.done.replace(false) && size.is_some() {
            return Some((Got::End, 0));
        }
        let len = self.pattern.len();
        let Some(at) = memchr::memmem::find(buf, &self.pattern) else {
            // Of what cannot be the pattern's begin, as much as was asked for.
            let size = size.filter(|size| buf.len() - self.overlap(buf) >= *size)?;
            return Some((Got::Data(&buf[..size]), size));
        };
        let end = if self.inclusive { at + len } else { at };
        if let Some(size) = size {
            if at > size {
                return Some((Got::Data(&buf[..size]), size));
            }
            // Nothing in front of it is a piece, too: an empty line, say.
            self.done.set(true);
        }
        Some((Got::Data(&buf[..end]), at + len))
    }

    /// How many of the last bytes may be the begin of the pattern.
    fn overlap(&self, buf: &[u8]) -> usize {
        let most = (self.pattern.len() - 1).min(buf.len());
        (1..=most).rev().find(|n| buf.ends_with(&self.pattern[..*n])).unwrap_or(0)
    }
}

fn receive(s: &Stack) -> Result<Wait, Raise> {
    let socket = open_one(s)?;
    // Most ask for a line: looked at first, since what is no number takes long to be found none.
    if s.is_nil(2) || (s.kind(2) == mlua::ffi::LUA_TSTRING && s.bytes(2) == Some(b"*l")) {
        return read(s, &socket, Want::Line(0));
    }
    let want = match s.number(2) {
        Some(n) if n >= 0.0 => Want::Exactly(n as usize),
        Some(_) => return Err(s.argument_error(1, "bad number argument")),
        None => match s.arg_bytes(2)? {
            b"*a" => Want::All,
            other => {
                let text = format!("bad pattern argument: {}", String::from_utf8_lossy(other));
                return Err(s.argument_error(1, &text));
            }
        },
    };
    read(s, &socket, want)
}

fn receive_any(s: &Stack) -> Result<Wait, Raise> {
    if s.top() < 2 {
        return Err(format!("expecting 2 arguments (including the object), but got {}", s.top()).into());
    }
    let socket = open_one(s)?;
    match s.number(2) {
        Some(max) if max >= 1.0 => read(s, &socket, Want::Any(max as usize)),
        _ => Err(s.argument_error(2, "bad max argument")),
    }
}

fn until(s: &Stack) -> Answer {
    if s.top() < 2 {
        return Err(format!("expecting 2 arguments (including the object), but got {}", s.top()).into());
    }
    this(s)?;
    let pattern: Box<[u8]> = s.arg_bytes(2)?.into();
    if pattern.is_empty() {
        return s.fail("pattern is empty");
    }
    let inclusive = match s.kind(3) {
        mlua::ffi::LUA_TTABLE => {
            s.get(3, "inclusive");
            let inclusive = s.boolean(-1);
            s.pop(1);
            inclusive
        }
        _ => false,
    };
    Ok(object::push(s, Rc::new(Until { pattern, inclusive, done: Cell::new(false) })))
}

fn read_until(s: &Stack) -> Result<Wait, Raise> {
    let socket = open_one(s)?;
    let until = object::get::<Until>(s, 2)?;
    let size = match s.opt_number(3)? {
        Some(n) if n < 0.0 => return Err(s.argument_error(1, "bad size argument")),
        // 0 and nil: all at once.
        size => size.map(|n| n as usize).filter(|n| *n > 0),
    };
    read(s, &socket, Want::Until(until, size))
}

fn read(s: &Stack, socket: &Rc<Socket>, mut want: Want) -> Result<Wait, Raise> {
    if let Some(text) = socket.busy_text(CONNECTING | READING) {
        return refuse(s, text);
    }
    if !socket.is_open(READING) {
        return refuse(s, "closed");
    }
    if matches!(want, Want::Exactly(n) if n > MAX_RECEIVE) {
        return refuse(s, "too much data");
    }
    // Taken out: a push may collect garbage, and that run a script's finalizer.
    let mut buf = socket.conn.borrow_mut().as_mut().map(|c| std::mem::take(&mut c.buf)).unwrap_or_default();
    let found = want.look(&buf).map(|(got, len)| (got.push(s), len));
    if let Some((_, len)) = found {
        buf.advance(len);
    }
    if let Some(conn) = socket.conn.borrow_mut().as_mut() {
        conn.buf = buf;
    }
    if let Some((results, _)) = found {
        return Ok(Wait::Ready(results));
    }
    Ok(Wait::Park(Op::future(read_more(Busy::new(socket, READING), want))))
}

async fn read_more(busy: Busy, mut want: Want) -> Values {
    let socket = &busy.socket;
    loop {
        let limit = socket.limit(READING);
        let filled = timeout(limit, std::future::poll_fn(|cx| socket.poll_fill(cx))).await;
        let mut conn = socket.conn.borrow_mut();
        let Some(buf) = conn.as_mut().map(|c| &mut c.buf) else { return failed("closed") };
        let (text, ended) = match filled {
            Err(_) => {
                complain("lua tcp socket read timed out");
                ("timeout".to_owned(), false)
            }
            Ok(Ok(0)) if matches!(want, Want::All) => {
                let all = buf.split().to_vec();
                drop(conn);
                socket.end(READING);
                return smallvec![Value::Bytes(all)];
            }
            Ok(Ok(0)) => ("closed".to_owned(), true),
            Ok(Ok(_)) => match want.look(buf) {
                Some((got, len)) => {
                    let values = got.values();
                    buf.advance(len);
                    return values;
                }
                None if buf.len() <= MAX_RECEIVE => continue,
                None => {
                    buf.clear();
                    ("too much data".to_owned(), true)
                }
            },
            // A peer that ends TLS without saying so has closed.
            Ok(Err(e)) => (error_text(&e), true),
        };
        let partial = want.partial(buf, ended);
        drop(conn);
        if ended {
            socket.end(READING);
        }
        return smallvec![Value::Nil, Value::text(text), Value::Bytes(partial)];
    }
}

fn close(s: &Stack) -> Answer {
    let socket = this(s)?;
    match socket.busy_text(CONNECTING | READING | WRITING) {
        Some(text) => s.fail(text),
        None if socket.close() => Ok(s.push_number(1.0)),
        None => s.fail("closed"),
    }
}

fn set_timeout(s: &Stack) -> Answer {
    let (socket, limit) = (this(s)?, socket::timeout(s, 2)?);
    socket.connect_timeout.set(limit);
    socket.send_timeout.set(limit);
    socket.read_timeout.set(limit);
    Ok(0)
}

fn set_timeouts(s: &Stack) -> Answer {
    let socket = this(s)?;
    let (connect, send, read) = (socket::timeout(s, 2)?, socket::timeout(s, 3)?, socket::timeout(s, 4)?);
    socket.connect_timeout.set(connect);
    socket.send_timeout.set(send);
    socket.read_timeout.set(read);
    Ok(0)
}

fn set_option(s: &Stack) -> Answer {
    let socket = this(s)?;
    let name = s.arg_bytes(2)?.to_vec();
    let Some(fd) = socket.conn.borrow().as_ref().map(|c| c.fd) else { return s.fail("closed") };
    if fd < 0 {
        return s.fail(NOT_OURS);
    }
    if s.is_nil(3) {
        return s.fail("missing the \"value\" argument");
    }
    let number = s.number(3);
    let on = number.map_or_else(|| s.boolean(3), |n| n != 0.0);
    let size = number.unwrap_or(0.0).max(0.0) as usize;
    // SAFETY: the connection owns the descriptor and outlives this call.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    let socket = socket2::SockRef::from(&fd);
    let set = match &*name {
        b"keepalive" => socket.set_keepalive(on),
        b"reuseaddr" => socket.set_reuse_address(on),
        b"tcp-nodelay" => socket.set_tcp_nodelay(on),
        b"sndbuf" => socket.set_send_buffer_size(size),
        b"rcvbuf" => socket.set_recv_buffer_size(size),
        other => return s.fail(format!("unsupported option: {}", String::from_utf8_lossy(other))),
    };
    match set {
        Ok(()) => Ok(s.push_bool(true)),
        Err(e) => s.fail(error_text(&e)),
    }
}

fn set_keepalive(s: &Stack) -> Answer {
    let socket = this(s)?;
    let number = |i: c_int| {
        s.opt_number(i).map_err(|_| s.argument_error(i - 1, &format!("number expected, got {}", s.kind_name(i))))
    };
    let of_location = |x: &mut Exchange| {
        let set = &x.location.as_ref()?.directives;
        Some((set.socket_keepalive, set.socket_pool_size))
    };
    let (idle, most) = fast::exchange().and_then(of_location).unwrap_or_default();
    let limit = match number(2)? {
        None => Some(idle.unwrap_or(KEEPALIVE_TIMEOUT)).filter(|idle| !idle.is_zero()),
        Some(ms) if ms >= 1.0 => Some(Duration::from_millis(ms as u64)),
        Some(_) => None,
    };
    let size = number(3)?.map_or(most.unwrap_or(POOL_SIZE), |n| n.max(1.0) as usize);
    if let Some(text) = socket.busy_text(CONNECTING | READING | WRITING) {
        return s.fail(text);
    }
    if socket.conn.borrow().as_ref().is_some_and(|c| c.fd < 0) {
        return s.fail(NOT_OURS);
    }
    let Some(mut conn) = socket.conn.take() else { return s.fail("closed") };
    if conn.read_ended || conn.write_ended {
        return s.fail("closed");
    }
    if let Some(text) = dubious(&mut conn) {
        return s.fail(text);
    }
    let pools = socket::current_vm()?.sockets.pools.clone();
    let pool = match &conn.lease {
        Some(lease) => Some(Pool::of(lease)),
        None => pools.open(&conn.name, size, None),
    };
    // Where there are too many pools already, nothing is kept.
    if let Some(pool) = pool {
        pool.keep(conn, limit);
    }
    Ok(s.push_number(1.0))
}

/// Why a connection must not be used again.
fn dubious(conn: &mut Conn) -> Option<&'static str> {
    if !conn.buf.is_empty() {
        return Some("unread data in buffer");
    }
    match conn.poll_fill(&mut Context::from_waker(Waker::noop())) {
        Poll::Pending => {
            conn.buf = BytesMut::new();
            None
        }
        Poll::Ready(Ok(0)) => Some("closed"),
        Poll::Ready(_) => Some("connection in dubious state"),
    }
}

fn reused_times(s: &Stack) -> Answer {
    match this(s)?.conn.borrow().as_ref().map(|c| c.reused) {
        Some(times) => Ok(s.push_number(f64::from(times))),
        None => s.fail("closed"),
    }
}

fn get_fd(s: &Stack) -> Answer {
    match this(s)?.conn.borrow().as_ref().map(|c| c.fd) {
        Some(fd) => Ok(s.push_number(f64::from(fd))),
        None => s.fail("closed"),
    }
}
