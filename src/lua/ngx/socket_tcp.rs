//! `ngx.socket.tcp`: sockets that park the coroutine instead of blocking the worker. The Lua face is lua/moongate/socket.lua.
//!
//! Idle connections of `setkeepalive` are kept per worker. A read and a write may wait at the same time, in two light
//! threads; each borrows the stream for the time of one poll only. Beyond OpenResty they work in every phase.

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, VecDeque},
    future::{Future, poll_fn},
    io,
    net::SocketAddr,
    pin::Pin,
    rc::Rc,
    sync::{Arc, OnceLock},
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use memchr::memmem;
use mlua::ffi;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
};

use super::object;
use crate::{
    dns::Resolver,
    error::Result,
    lua::{
        Op, Value, Values, Wait,
        api::{Api, Phases, Raise, Stack},
        sched::failed,
    },
    tls,
};

/// `lua_socket_connect_timeout` and its like.
const TIMEOUT: Duration = Duration::from_secs(60);

/// `lua_socket_pool_size`
const POOL_SIZE: usize = 30;

/// `lua_socket_keepalive_timeout`
const KEEPALIVE: Duration = Duration::from_secs(60);

/// Names of pools per worker: scripts may put anything into a name.
const MAX_POOLS: usize = 1024;

/// Bytes asked of a socket at once.
const READ_CHUNK: usize = 16 << 10;

/// What one `receive` may gather: a peer that never ends its line must not take the worker's memory.
const MAX_RECEIVE: usize = 256 << 20;

static RESOLVER: OnceLock<Arc<Resolver>> = OnceLock::new();

/// Names are resolved by this from now on; before, only addresses connect. The first one stays.
pub fn set_resolver(resolver: Arc<Resolver>) {
    let _ = RESOLVER.set(resolver);
}

/// The addresses of a host, or the error in nginx's words.
pub(super) async fn resolve(host: &str) -> std::result::Result<Vec<std::net::IpAddr>, String> {
    if let Ok(ip) = host.trim_start_matches('[').trim_end_matches(']').parse() {
        return Ok(vec![ip]);
    }
    let Some(resolver) = RESOLVER.get() else {
        return Err(format!("no resolver defined to resolve \"{host}\""));
    };
    match resolver.resolve(host).await {
        Ok(addrs) => Ok(addrs.to_vec()),
        Err(_) => Err(format!("{host} could not be resolved (3: Host not found)")),
    }
}

trait Io: AsyncRead + AsyncWrite + Unpin {}
impl<T: AsyncRead + AsyncWrite + Unpin> Io for T {}

/// An open connection.
struct Open {
    io: Box<dyn Io>,
    /// Read and not yet asked for.
    buffer: Vec<u8>,
    reused: u32,
    tls: bool,
}

struct Tcp {
    open: RefCell<Option<Open>>,
    /// connect, send, read
    timeouts: Cell<[Duration; 3]>,
    pool: RefCell<String>,
    busy_reading: Cell<bool>,
    busy_writing: Cell<bool>,
}

/// Holds a direction while an operation waits, and frees it however that ends.
struct Busy {
    tcp: Rc<Tcp>,
    reading: bool,
}

impl Busy {
    fn take(tcp: &Rc<Tcp>, reading: bool) -> Option<Busy> {
        let flag = if reading { &tcp.busy_reading } else { &tcp.busy_writing };
        (!flag.replace(true)).then(|| Busy { tcp: tcp.clone(), reading })
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let flag = if self.reading { &self.tcp.busy_reading } else { &self.tcp.busy_writing };
        flag.set(false);
    }
}

struct Idle {
    open: Open,
    until: Instant,
}

thread_local! {
    static POOLS: RefCell<HashMap<String, VecDeque<Idle>>> = RefCell::default();
}

pub fn register(api: &mut Api) -> Result<()> {
    let any = Phases::ANY;
    api.func("native.tcp.new", any, "new(): a socket", |s| {
        let tcp = Tcp {
            open: RefCell::default(),
            timeouts: Cell::new([TIMEOUT; 3]),
            pool: RefCell::default(),
            busy_reading: Cell::new(false),
            busy_writing: Cell::new(false),
        };
        Ok(object::push(s, Rc::new(tcp)))
    })?;
    api.wait("native.tcp.connect", any, "connect(socket, host, port | nil, pool | nil): 1; nil, err", connect)?;
    api.wait("native.tcp.handshake", any, "handshake(socket, name | nil, verify): true; nil, err", handshake)?;
    api.wait("native.tcp.send", any, "send(socket, data): bytes; nil, err", send)?;
    api.wait("native.tcp.receive", any, "receive(socket, size or pattern): data; nil, err, partial", receive)?;
    api.wait("native.tcp.receive_any", any, "receive_any(socket, max): data; nil, err", receive_any)?;
    api.wait("native.tcp.receive_until", any, "receive_until(socket, mark, inclusive, size | nil)", receive_until)?;
    api.func("native.tcp.timeouts", any, "timeouts(socket, connect, send, read): milliseconds; nil keeps", |s| {
        let tcp = object::get::<Tcp>(s, 1)?;
        let mut all = tcp.timeouts.get();
        for (i, timeout) in all.iter_mut().enumerate() {
            match s.opt_number(i as i32 + 2)? {
                Some(ms) if ms > 0.0 => *timeout = Duration::from_secs_f64((ms / 1000.0).min(1e9)),
                Some(_) => *timeout = TIMEOUT,
                None => {}
            }
        }
        tcp.timeouts.set(all);
        Ok(0)
    })?;
    api.func("native.tcp.keep", any, "keep(socket, idle ms | nil, size | nil): 1; nil, err", keep)?;
    api.func("native.tcp.close", any, "close(socket): 1; nil, \"closed\"", |s| {
        let tcp = object::get::<Tcp>(s, 1)?;
        if busy(&tcp, s) {
            return Ok(2);
        }
        match tcp.open.borrow_mut().take() {
            Some(_) => Ok(s.push_number(1.0)),
            None => s.fail("closed"),
        }
    })?;
    api.func("native.tcp.reused", any, "reused(socket): how often the connection was; nil, \"closed\"", |s| {
        match &*object::get::<Tcp>(s, 1)?.open.borrow() {
            Some(open) => Ok(s.push_number(open.reused.into())),
            None => s.fail("closed"),
        }
    })
}

/// Pushes `nil, "socket busy …"` when a light thread waits on the socket.
fn busy(tcp: &Tcp, s: &Stack) -> bool {
    let text = if tcp.busy_reading.get() {
        "socket busy reading"
    } else if tcp.busy_writing.get() {
        "socket busy writing"
    } else {
        return false;
    };
    s.push_nil();
    s.push_bytes(text);
    true
}

fn refuse(s: &Stack, text: &str) -> std::result::Result<Wait, Raise> {
    s.push_nil();
    s.push_bytes(text);
    Ok(Wait::Ready(2))
}

/// An I/O error in nginx's words.
pub(super) fn io_text(e: &io::Error) -> String {
    match e.kind() {
        io::ErrorKind::ConnectionRefused => "connection refused".into(),
        io::ErrorKind::ConnectionReset => "connection reset by peer".into(),
        io::ErrorKind::BrokenPipe => "broken pipe".into(),
        io::ErrorKind::TimedOut => "timeout".into(),
        io::ErrorKind::UnexpectedEof => "closed".into(),
        io::ErrorKind::NotFound => "no such file or directory".into(),
        io::ErrorKind::PermissionDenied => "permission denied".into(),
        io::ErrorKind::HostUnreachable => "no route to host".into(),
        io::ErrorKind::NetworkUnreachable => "network is unreachable".into(),
        _ => e.to_string().to_lowercase(),
    }
}

async fn within<T>(
    time: Duration,
    f: impl Future<Output = std::result::Result<T, String>>,
) -> std::result::Result<T, String> {
    tokio::time::timeout(time, f).await.unwrap_or_else(|_| Err("timeout".into()))
}

fn connect(s: &Stack) -> std::result::Result<Wait, Raise> {
    let tcp = object::get::<Tcp>(s, 1)?;
    let host = s.arg_str(2)?.into_owned();
    let path = host.strip_prefix("unix:").map(str::to_owned);
    let port = match (&path, s.opt_number(3)?) {
        (Some(_), _) => 0,
        (None, Some(port)) if (0.0..65536.0).contains(&port) => port as u16,
        (None, Some(port)) => return Err(s.argument_error(3, &format!("bad port number: {port}"))),
        (None, None) => return Err(s.bad_argument(3, "number")),
    };
    if busy(&tcp, s) {
        return Ok(Wait::Ready(2));
    }
    let pool = match s.opt_bytes(4)? {
        Some(name) => String::from_utf8_lossy(name).into_owned(),
        None if path.is_some() => host.clone(),
        None => format!("{host}:{port}"),
    };
    *tcp.open.borrow_mut() = from_pool(&pool);
    tcp.pool.replace(pool);
    if tcp.open.borrow().is_some() {
        return Ok(Wait::Ready(s.push_number(1.0)));
    }
    let busy = (Busy::take(&tcp, true), Busy::take(&tcp, false));
    Ok(Wait::Park(Op::future(async move {
        let _busy = busy;
        let opened = within(tcp.timeouts.get()[0], async {
            match path {
                Some(path) => open_unix(&path).await,
                None => open_tcp(&host, port).await,
            }
        });
        match opened.await {
            Ok(io) => {
                *tcp.open.borrow_mut() = Some(Open { io, buffer: Vec::new(), reused: 0, tls: false });
                smallvec::smallvec![Value::Number(1.0)]
            }
            Err(why) => failed(why),
        }
    })))
}

async fn open_unix(path: &str) -> std::result::Result<Box<dyn Io>, String> {
    let stream = UnixStream::connect(path).await.map_err(|e| io_text(&e))?;
    Ok(Box::new(stream))
}

/// Tries the addresses in turn.
async fn open_tcp(host: &str, port: u16) -> std::result::Result<Box<dyn Io>, String> {
    let mut last = "no address".to_owned();
    for ip in resolve(host).await? {
        match TcpStream::connect(SocketAddr::new(ip, port)).await {
            Ok(stream) => {
                // Small requests must not wait for acknowledgements; a socket that refuses works all the same.
                let _ = stream.set_nodelay(true);
                return Ok(Box::new(stream));
            }
            Err(e) => last = io_text(&e),
        }
    }
    Err(last)
}

/// An idle connection that is still good. Ones that ran out are dropped on the way.
fn from_pool(name: &str) -> Option<Open> {
    POOLS.with_borrow_mut(|pools| {
        let pool = pools.get_mut(name)?;
        let now = Instant::now();
        while let Some(mut idle) = pool.pop_back() {
            if idle.until > now && quiet(&mut idle.open) {
                idle.open.reused += 1;
                return Some(idle.open);
            }
        }
        None
    })
}

/// The peer has neither closed nor sent anything.
fn quiet(open: &mut Open) -> bool {
    let mut byte = [0];
    let mut buf = ReadBuf::new(&mut byte);
    let mut cx = Context::from_waker(Waker::noop());
    Pin::new(&mut open.io).poll_read(&mut cx, &mut buf).is_pending()
}

fn keep(s: &Stack) -> crate::lua::host::Answer {
    let tcp = object::get::<Tcp>(s, 1)?;
    let idle = s.opt_number(2)?;
    let size = s.opt_number(3)?.map_or(POOL_SIZE, |n| n as usize);
    if busy(&tcp, s) {
        return Ok(2);
    }
    let Some(mut open) = tcp.open.borrow_mut().take() else { return s.fail("closed") };
    if !open.buffer.is_empty() {
        return s.fail("unread data in buffer");
    }
    if !quiet(&mut open) {
        return s.fail("closed");
    }
    let time = match idle {
        None => KEEPALIVE,
        // 0: without an end; a day is as good, and bounded.
        Some(ms) if ms <= 0.0 => Duration::from_secs(86_400),
        Some(ms) => Duration::from_secs_f64((ms / 1000.0).min(86_400.0)),
    };
    put(tcp.pool.borrow().clone(), Idle { open, until: Instant::now() + time }, size.max(1));
    Ok(s.push_number(1.0))
}

fn put(name: String, idle: Idle, size: usize) {
    POOLS.with_borrow_mut(|pools| {
        let now = Instant::now();
        pools.retain(|_, pool| {
            pool.retain(|idle| idle.until > now);
            !pool.is_empty()
        });
        if pools.len() >= MAX_POOLS && !pools.contains_key(&name) {
            return;
        }
        let pool = pools.entry(name).or_default();
        while pool.len() >= size {
            pool.pop_front();
        }
        pool.push_back(idle);
    });
}

fn handshake(s: &Stack) -> std::result::Result<Wait, Raise> {
    let tcp = object::get::<Tcp>(s, 1)?;
    let name = s.opt_bytes(2)?.map(|n| String::from_utf8_lossy(n).into_owned());
    let verify = s.boolean(3);
    if busy(&tcp, s) {
        return Ok(Wait::Ready(2));
    }
    match tcp.open.borrow().as_ref() {
        None => return refuse(s, "closed"),
        Some(open) if open.tls => return Ok(Wait::Ready(s.push_bool(true))),
        Some(_) => {}
    }
    let Some(Open { io, reused, .. }) = tcp.open.borrow_mut().take() else { return refuse(s, "closed") };
    let busy = (Busy::take(&tcp, true), Busy::take(&tcp, false));
    Ok(Wait::Park(Op::future(async move {
        let _busy = busy;
        let shaken = within(tcp.timeouts.get()[0], async {
            let config = tls::client::client_config(verify, None, &[]).map_err(|e| e.to_string())?;
            // Without a name there is no SNI; the protocol wants some name all the same.
            let server = name.as_deref().unwrap_or("localhost").to_owned();
            let server =
                rustls_pki_types::ServerName::try_from(server).map_err(|_| "invalid server name".to_owned())?;
            let connector = tokio_rustls::TlsConnector::from(config);
            connector.connect(server, io).await.map_err(|e| handshake_text(&e))
        });
        match shaken.await {
            Ok(stream) => {
                *tcp.open.borrow_mut() = Some(Open { io: Box::new(stream), buffer: Vec::new(), reused, tls: true });
                smallvec::smallvec![Value::Bool(true)]
            }
            Err(why) => failed(why),
        }
    })))
}

fn handshake_text(e: &io::Error) -> String {
    match e.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::InvalidCertificate(why)) => match why {
            rustls::CertificateError::UnknownIssuer => "20: unable to get local issuer certificate".into(),
            rustls::CertificateError::Expired | rustls::CertificateError::ExpiredContext { .. } => {
                "10: certificate has expired".into()
            }
            rustls::CertificateError::NotValidForName | rustls::CertificateError::NotValidForNameContext { .. } => {
                "certificate host mismatch".into()
            }
            other => format!("certificate verify error: {other:?}"),
        },
        Some(_) => "handshake failed".into(),
        None => io_text(e),
    }
}

/// Appends data as `tcpsock:send` takes it: strings, numbers, booleans, nil and tables of them.
fn gather(s: &Stack, i: i32, out: &mut Vec<u8>, depth: usize) -> std::result::Result<(), Raise> {
    const MAX_DEPTH: usize = 32;
    match s.kind(i) {
        ffi::LUA_TSTRING | ffi::LUA_TNUMBER => out.extend_from_slice(s.bytes(i).unwrap_or_default()),
        ffi::LUA_TBOOLEAN => out.extend_from_slice(if s.boolean(i) { b"true" } else { b"false" }),
        ffi::LUA_TNIL => out.extend_from_slice(b"nil"),
        ffi::LUA_TTABLE if depth < MAX_DEPTH => {
            s.reserve(2)?;
            let table = s.absolute(i);
            for n in 1..=s.len(table) {
                s.get_index(table, n);
                let done = gather(s, -1, out, depth + 1);
                s.pop(1);
                done?;
            }
        }
        _ => {
            let kind = s.kind_name(i);
            return Err(format!("string, number, boolean, nil, or array table expected, got {kind}").into());
        }
    }
    Ok(())
}

fn send(s: &Stack) -> std::result::Result<Wait, Raise> {
    let tcp = object::get::<Tcp>(s, 1)?;
    let mut data = Vec::new();
    gather(s, 2, &mut data, 0)?;
    if tcp.open.borrow().is_none() {
        return refuse(s, "closed");
    }
    let Some(busy) = Busy::take(&tcp, false) else { return refuse(s, "socket busy writing") };
    let len = data.len() as f64;
    Ok(Wait::Park(Op::future(async move {
        let _busy = busy;
        let mut at = 0;
        let written = within(tcp.timeouts.get()[1], poll_fn(|cx| poll_send(cx, &tcp, &data, &mut at)));
        match written.await {
            Ok(()) => smallvec::smallvec![Value::Number(len)],
            Err(why) => {
                tcp.open.borrow_mut().take();
                failed(why)
            }
        }
    })))
}

fn poll_send(cx: &mut Context<'_>, tcp: &Tcp, data: &[u8], at: &mut usize) -> Poll<std::result::Result<(), String>> {
    let mut open = tcp.open.borrow_mut();
    let Some(open) = open.as_mut() else { return Poll::Ready(Err("closed".into())) };
    while *at < data.len() {
        match Pin::new(&mut open.io).poll_write(cx, &data[*at..]) {
            Poll::Ready(Ok(0)) => return Poll::Ready(Err("closed".into())),
            Poll::Ready(Ok(n)) => *at += n,
            Poll::Ready(Err(e)) => return Poll::Ready(Err(io_text(&e))),
            Poll::Pending => return Poll::Pending,
        }
    }
    Pin::new(&mut open.io).poll_flush(cx).map_err(|e| io_text(&e))
}

/// What a read looks for in the bytes so far: how many to give, and how many to take.
type Want = Box<dyn FnMut(&[u8]) -> Option<(usize, usize)>>;

/// How a read ended, other than by finding what it wants.
enum Short {
    Closed,
    Failed(String),
}

/// Reads until `want` is content. The bytes are in the buffer; it says which.
fn poll_want(cx: &mut Context<'_>, tcp: &Tcp, want: &mut Want) -> Poll<std::result::Result<(usize, usize), Short>> {
    let mut open = tcp.open.borrow_mut();
    let Some(open) = open.as_mut() else { return Poll::Ready(Err(Short::Closed)) };
    loop {
        if let Some(found) = want(&open.buffer) {
            return Poll::Ready(Ok(found));
        }
        if open.buffer.len() > MAX_RECEIVE {
            return Poll::Ready(Err(Short::Failed("too much data".into())));
        }
        open.buffer.reserve(READ_CHUNK);
        let mut buf = ReadBuf::uninit(open.buffer.spare_capacity_mut());
        match Pin::new(&mut open.io).poll_read(cx, &mut buf) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Err(e)) if e.kind() != io::ErrorKind::UnexpectedEof => {
                return Poll::Ready(Err(Short::Failed(io_text(&e))));
            }
            read => {
                let n = if read.is_ready() { buf.filled().len() } else { 0 };
                if n == 0 {
                    return Poll::Ready(Err(Short::Closed));
                }
                // SAFETY: the first `n` bytes of the spare capacity were just filled.
                unsafe { open.buffer.set_len(open.buffer.len() + n) };
            }
        }
    }
}

/// Starts a read; `whole_at_end`: the end of the stream is what was asked for (`*a`).
fn read(s: &Stack, tcp: Rc<Tcp>, mut want: Want, whole_at_end: bool) -> std::result::Result<Wait, Raise> {
    let Some(busy) = Busy::take(&tcp, true) else { return refuse(s, "socket busy reading") };
    // What has been read already is answered at once.
    let ready = match tcp.open.borrow_mut().as_mut() {
        None => return refuse(s, "closed"),
        Some(open) => want(&open.buffer).map(|found| take(&mut open.buffer, found)),
    };
    if let Some(data) = ready {
        return Ok(Wait::Ready(s.push_bytes(data)));
    }
    Ok(Wait::Park(Op::future(async move {
        let _busy = busy;
        let time = tcp.timeouts.get()[2];
        let done = tokio::time::timeout(time, poll_fn(|cx| poll_want(cx, &tcp, &mut want))).await;
        let mut slot = tcp.open.borrow_mut();
        let Some(open) = slot.as_mut() else { return failed("closed") };
        let partial = |why: &str, data: Vec<u8>| -> Values {
            smallvec::smallvec![Value::Nil, Value::text(why), Value::Bytes(data)]
        };
        match done {
            Ok(Ok(found)) => smallvec::smallvec![Value::Bytes(take(&mut open.buffer, found))],
            // A read that timed out may be tried again.
            Err(_) => partial("timeout", std::mem::take(&mut open.buffer)),
            Ok(Err(short)) => {
                let data = std::mem::take(&mut open.buffer);
                *slot = None;
                match short {
                    Short::Closed if whole_at_end => smallvec::smallvec![Value::Bytes(data)],
                    Short::Closed => partial("closed", data),
                    Short::Failed(why) => partial(&why, data),
                }
            }
        }
    })))
}

/// Takes what a want found out of the buffer.
fn take(buffer: &mut Vec<u8>, (give, eat): (usize, usize)) -> Vec<u8> {
    if eat == buffer.len() {
        let mut data = std::mem::take(buffer);
        data.truncate(give);
        return data;
    }
    let data = buffer[..give].to_vec();
    buffer.drain(..eat);
    data
}

fn receive(s: &Stack) -> std::result::Result<Wait, Raise> {
    let tcp = object::get::<Tcp>(s, 1)?;
    if let Some(size) = s.number(2) {
        if size < 0.0 {
            return Err(s.argument_error(2, "bad pattern argument"));
        }
        let size = size as usize;
        return read(s, tcp, Box::new(move |b| (b.len() >= size).then_some((size, size))), false);
    }
    match s.opt_bytes(2)? {
        None | Some(b"*l" | b"l") => receive_line(s, tcp),
        Some(b"*a" | b"a") => read(s, tcp, Box::new(|_| None), true),
        Some(_) => Err(s.argument_error(2, "bad pattern argument")),
    }
}

/// A line without its end; all carriage returns are left out, as documented.
fn receive_line(s: &Stack, tcp: Rc<Tcp>) -> std::result::Result<Wait, Raise> {
    let mut seen = 0;
    let want: Want = Box::new(move |b| {
        let found = memchr::memchr(b'\n', &b[seen.min(b.len())..]).map(|at| at + seen.min(b.len()));
        seen = b.len();
        let end = found?;
        let give = if end > 0 && b[end - 1] == b'\r' { end - 1 } else { end };
        Some((give, end + 1))
    });
    read(s, tcp, want, false)
}

fn receive_any(s: &Stack) -> std::result::Result<Wait, Raise> {
    let tcp = object::get::<Tcp>(s, 1)?;
    let max = s.arg_number(2)?;
    if max < 1.0 {
        return Err(s.argument_error(2, "bad max argument"));
    }
    let max = max as usize;
    let want: Want = Box::new(move |b| (!b.is_empty()).then(|| (b.len().min(max), b.len().min(max))));
    read(s, tcp, want, false)
}

/// Data up to a mark, which is taken, too. With a size: at most that much, and less only when the mark comes next; it
/// stays for the Lua face to read.
fn receive_until(s: &Stack) -> std::result::Result<Wait, Raise> {
    let tcp = object::get::<Tcp>(s, 1)?;
    let mark = s.arg_bytes(2)?.to_vec();
    let inclusive = s.boolean(3);
    let size = s.opt_number(4)?.map(|n| n.max(1.0) as usize);
    let finder = memmem::Finder::new(&mark).into_owned();
    let len = mark.len();
    let mut seen = 0_usize;
    let want: Want = Box::new(move |b| {
        let from = seen.saturating_sub(len);
        let found = finder.find(&b[from.min(b.len())..]).map(|at| at + from);
        seen = b.len();
        match (found, size) {
            (Some(at), None) => Some((if inclusive { at + len } else { at }, at + len)),
            // At the mark itself the Lua face asks for it with a read of its length.
            (Some(at), Some(size)) => Some((at.min(size), at.min(size))),
            // What could be the mark's beginning is not given away.
            (None, Some(size)) if b.len() >= size + len => Some((size, size)),
            _ => None,
        }
    });
    read(s, tcp, want, false)
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::TcpListener,
    };

    use crate::lua::{Vm, VmConfig, sched};

    /// Answers each connection with `reply` after it has read `ask` bytes, then closes; `connections` times.
    fn server(connections: usize, ask: usize, reply: &'static [u8]) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("bound").port();
        std::thread::spawn(move || {
            for _ in 0..connections {
                let (mut peer, _) = listener.accept().expect("a client");
                let _ = peer.read_exact(&mut vec![0; ask]);
                let _ = peer.write_all(reply);
            }
        });
        port
    }

    #[track_caller]
    fn gives(chunk: &str, expected: &str) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("rt");
        let local = tokio::task::LocalSet::new();
        let got = local.block_on(&runtime, async {
            let vm = Vm::new(VmConfig::default()).expect("a VM");
            let f = vm.lua.load(chunk).set_name("=test").into_function().expect("compiles");
            vm.lua.globals().raw_set("under_test", f).expect("set");
            let mut x = sched::background(&vm);
            let outcome = sched::call(
                &vm,
                &mut x,
                |s| {
                    // SAFETY: pushes the global function.
                    unsafe { mlua::ffi::lua_getglobal(s.raw(), c"under_test".as_ptr()) };
                    0
                },
                |s| String::from_utf8_lossy(s.bytes(-1).unwrap_or_default()).into_owned(),
            );
            let outcome = outcome.await;
            sched::end_background(&vm, &mut x);
            outcome
        });
        match got {
            sched::Outcome::Done(text) => assert_eq!(text, expected, "{chunk}"),
            other => panic!("{chunk}\n{other:?}"),
        }
    }

    #[test]
    fn reads_lines_sizes_and_the_rest() {
        let port = server(1, 4, b"one\r\ntwo\n12345rest");
        gives(
            &format!(
                "local s = ngx.socket.tcp() s:settimeout(5000)
                 assert(s:connect('127.0.0.1', {port})) assert(s:send({{'p', {{'in', 'g'}}}}) == 4)
                 return table.concat({{s:receive(), s:receive('*l'), s:receive(3), s:receiveany(2), s:receive('*a')}}, '|')"
            ),
            "one|two|123|45|rest",
        );
    }

    #[test]
    fn tells_how_it_failed() {
        let port = server(1, 0, b"part");
        gives(
            &format!(
                "local s = ngx.socket.tcp() s:settimeout(5000) s:connect('127.0.0.1', {port})
                 local d, e, p = s:receive() local ok, again = s:send('x')
                 return tostring(d) .. e .. p .. tostring(ok) .. again .. select(2, s:close())"
            ),
            "nilclosedpartnilclosedclosed",
        );
        let closed = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound").port();
        gives(&format!("return select(2, ngx.socket.tcp():connect('127.0.0.1', {closed}))"), "connection refused");
        gives(
            "return select(2, ngx.socket.tcp():connect('some.name', 80))",
            "no resolver defined to resolve \"some.name\"",
        );
        gives("return select(2, ngx.socket.tcp():receive())", "closed");
    }

    #[test]
    fn a_read_that_timed_out_may_go_on() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("bound").port();
        gives(
            &format!(
                "local s = ngx.socket.tcp() s:settimeouts(5000, 5000, 5) assert(s:connect('127.0.0.1', {port}))
                 local d, e, p = s:receive(3) local ok = s:send('x')
                 return tostring(d) .. e .. p .. ok"
            ),
            "niltimeout1",
        );
    }

    #[test]
    fn reads_until_a_mark() {
        let port = server(2, 0, b"hello, world! -agentzh\n--abcedhb blah");
        gives(
            &format!(
                "local s = ngx.socket.tcp() s:connect('127.0.0.1', {port}) local r = s:receiveuntil('--abcedhb')
                 return r() .. '|' .. s:receive('*a')"
            ),
            "hello, world! -agentzh\n| blah",
        );
        gives(
            &format!(
                "local s = ngx.socket.tcp() s:connect('127.0.0.1', {port}) local r = s:receiveuntil('--abcedhb')
                 local t = {{}} while true do local d = r(4) if not d then break end t[#t + 1] = '[' .. d .. ']' end
                 return table.concat(t) .. s:receive('*a')"
            ),
            "[hell][o, w][orld][! -a][gent][zh\n] blah",
        );
    }

    #[test]
    fn idle_connections_are_used_again() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("bound").port();
        gives(
            &format!(
                "local s = ngx.socket.tcp() assert(s:connect('127.0.0.1', {port})) local a = s:getreusedtimes()
                 assert(s:setkeepalive(60000, 2)) local closed = select(2, s:send('x'))
                 local t = ngx.socket.tcp() assert(t:connect('127.0.0.1', {port}))
                 return a .. closed .. t:getreusedtimes()"
            ),
            "0closed1",
        );
    }

    #[test]
    fn the_http_client_asks_and_reads() {
        let plain = server(
            1,
            16,
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-A: 1\r\nX-A: 2\r\nConnection: close\r\n\r\nhello",
        );
        gives(
            &format!(
                "local res, e = require('resty.http').new():request_uri('http://127.0.0.1:{plain}/a?b=c', {{method = 'POST', body = 'x'}})
                 assert(res, e) return res.status .. res.body .. res.headers['x-a'][2]"
            ),
            "200hello2",
        );
        let chunked = server(
            1,
            16,
            b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n",
        );
        gives(
            &format!(
                "local h = require('resty.http').new() assert(h:connect('127.0.0.1', {chunked}))
                 local res = assert(h:request({{path = '/'}})) return res.status .. res:read_body() .. res.reason"
            ),
            "201abcdeCreated",
        );
        gives("return select(2, require('resty.http').new():request_uri('nonsense'))", "bad uri: nonsense");
    }

    #[test]
    fn semaphores_and_locks_wait() {
        crate::shdict::store().declare("test-locks", 1 << 20);
        gives(
            "local sema = require('ngx.semaphore').new() local order = {}
             local t = ngx.thread.spawn(function() order[1] = tostring(sema:count()) sema:wait(5) order[3] = 'woken' end)
             order[2] = tostring(sema:count()) sema:post() ngx.thread.wait(t)
             local _, e = sema:wait(0) return table.concat(order, ' ') .. e",
            "0 -1 wokentimeout",
        );
        gives(
            "local lock = require('resty.lock')
             local a, b = lock:new('test-locks'), lock:new('test-locks', {timeout = 0.01})
             assert(a:lock('k')) local _, e = b:lock('k') a:unlock() return e .. tostring(b:lock('k') ~= nil)",
            "timeouttrue",
        );
    }

    #[test]
    fn datagrams_go_both_ways() {
        let peer = std::net::UdpSocket::bind("127.0.0.1:0").expect("a port");
        let port = peer.local_addr().expect("bound").port();
        std::thread::spawn(move || {
            let mut data = [0; 16];
            let (n, from) = peer.recv_from(&mut data).expect("a datagram");
            peer.send_to(&data[..n], from).expect("sent");
        });
        gives(
            &format!(
                "local s = ngx.socket.udp() s:settimeout(5000) assert(s:setpeername('127.0.0.1', {port}))
                 assert(s:send('ping') == 1) return s:receive()"
            ),
            "ping",
        );
    }
}
