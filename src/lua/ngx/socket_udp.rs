//! `ngx.socket.udp`: datagrams over UDP or a unix socket. The face is lua/moongate/socket.lua.

use std::{
    cell::{Cell, RefCell},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    rc::Rc,
    time::Duration,
};

use smallvec::smallvec;
use tokio::{
    net::{UdpSocket, UnixDatagram},
    time::timeout,
};

use super::{
    object,
    socket::{self, Owner, Shut, TIMEOUT, error_text},
};
use crate::{
    error::Result,
    lua::{
        api::{Api, Phases, Raise, Stack, Wait},
        host::Answer,
        sched::{Op, Value, failed},
    },
};

/// The largest datagram that `receive` gives, as in lua-nginx-module.
const MAX_DATAGRAM: usize = 8192;

enum Peer {
    Udp(UdpSocket),
    Unix(UnixDatagram),
}

impl Peer {
    async fn send(&self, data: &[u8]) -> io::Result<usize> {
        match self {
            Peer::Udp(s) => s.send(data).await,
            Peer::Unix(s) => s.send(data).await,
        }
    }

    async fn receive(&self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Peer::Udp(s) => s.recv(into).await,
            Peer::Unix(s) => s.recv(into).await,
        }
    }
}

struct Socket {
    owner: Rc<Owner>,
    peer: RefCell<Option<Rc<Peer>>>,
    receiving: Cell<bool>,
    timeout: Cell<Option<Duration>>,
    /// `bind`
    local: Cell<Option<IpAddr>>,
}

impl Shut for Socket {
    fn shut(&self) {
        self.peer.take();
    }

    fn holds_connection(&self) -> bool {
        self.peer.borrow().is_some()
    }
}

/// One light thread receives at a time.
struct Receiving(Rc<Socket>);

impl Drop for Receiving {
    fn drop(&mut self) {
        self.0.receiving.set(false);
    }
}

pub fn register(api: &mut Api) -> Result<()> {
    let any = Phases::ANY;
    api.func("native.udp.new", any, "new() -> object: the insides of a UDP socket.", new)?;
    api.func("native.udp.bind", any, "bind(self, address): where datagrams come from.", bind)?;
    api.wait(
        "native.udp.setpeername",
        any,
        "setpeername(self, host, port) or setpeername(self, \"unix:…\").",
        set_peer,
    )?;
    api.wait("native.udp.send", any, "send(self, data) -> 1.", send)?;
    api.wait("native.udp.receive", any, "receive(self, size?) -> data.", receive)?;
    api.func("native.udp.settimeout", any, "settimeout(self, ms).", set_timeout)?;
    api.func("native.udp.close", any, "close(self) -> 1.", close)
}

fn new(s: &Stack) -> Answer {
    let owner = socket::current_owner()?;
    let socket = Rc::new(Socket {
        owner: owner.clone(),
        peer: RefCell::default(),
        receiving: Cell::new(false),
        timeout: Cell::new(None),
        local: Cell::new(None),
    });
    let weak: std::rc::Weak<Socket> = Rc::downgrade(&socket);
    owner.adopt(weak);
    Ok(object::push(s, socket))
}

/// The socket in `self[1]`, if it belongs to whoever runs.
fn this(s: &Stack) -> Result<Rc<Socket>, Raise> {
    s.arg_table(1)?;
    s.get_index(1, 1);
    let socket = object::get::<Socket>(s, -1);
    s.pop(1);
    let socket = socket.map_err(|_| s.argument_error(1, "socket expected"))?;
    socket::check_owner(&socket.owner)?;
    Ok(socket)
}

fn bind(s: &Stack) -> Answer {
    let socket = this(s)?;
    match socket::literal(&s.arg_str(2)?) {
        Some(address) => {
            socket.local.set(Some(address));
            Ok(s.push_number(1.0))
        }
        None => s.fail("bad address"),
    }
}

fn set_peer(s: &Stack) -> Result<Wait, Raise> {
    let socket = this(s)?;
    let host = s.arg_str(2)?.into_owned();
    let port = match socket::unix_path(&host) {
        Some(_) => 0,
        None => match socket::port(s, 3)? {
            Ok(port) => port,
            Err(text) => return s.fail(text).map(Wait::Ready),
        },
    };
    if socket.receiving.get() {
        return s.fail("socket busy").map(Wait::Ready);
    }
    socket.shut();
    Ok(Wait::Park(Op::future(async move {
        match timeout(socket.timeout.get().unwrap_or(TIMEOUT), reach(&host, port, socket.local.get())).await {
            Err(_) => failed("timeout"),
            Ok(Err(text)) => failed(text),
            Ok(Ok(peer)) => {
                *socket.peer.borrow_mut() = Some(Rc::new(peer));
                smallvec![Value::Number(1.0)]
            }
        }
    })))
}

async fn reach(host: &str, port: u16, local: Option<IpAddr>) -> Result<Peer, String> {
    let text = |e: io::Error| error_text(&e);
    if let Some(path) = socket::unix_path(host) {
        // The empty name has the kernel choose one, so that the peer can answer.
        let socket = UnixDatagram::bind("").map_err(text)?;
        socket.connect(path).map_err(text)?;
        return Ok(Peer::Unix(socket));
    }
    let address = socket::address(host, port).await?;
    let any = if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind(SocketAddr::new(local.unwrap_or(any), 0)).await.map_err(text)?;
    socket.connect(address).await.map_err(text)?;
    Ok(Peer::Udp(socket))
}

fn send(s: &Stack) -> Result<Wait, Raise> {
    let socket = this(s)?;
    let mut data = Vec::new();
    socket::gather(s, 2, &mut data)?;
    let Some(peer) = socket.peer.borrow().clone() else { return s.fail("closed").map(Wait::Ready) };
    Ok(Wait::Park(Op::future(async move {
        match timeout(socket.timeout.get().unwrap_or(TIMEOUT), peer.send(&data)).await {
            Err(_) => failed("timeout"),
            Ok(Err(e)) => failed(error_text(&e)),
            Ok(Ok(_)) => smallvec![Value::Number(1.0)],
        }
    })))
}

fn receive(s: &Stack) -> Result<Wait, Raise> {
    let socket = this(s)?;
    let size = s.opt_number(2)?.map_or(MAX_DATAGRAM, |n| n as usize).clamp(1, MAX_DATAGRAM);
    let Some(peer) = socket.peer.borrow().clone() else { return s.fail("closed").map(Wait::Ready) };
    if socket.receiving.replace(true) {
        return s.fail("socket busy").map(Wait::Ready);
    }
    let receiving = Receiving(socket);
    Ok(Wait::Park(Op::future(async move {
        let mut data = vec![0; size];
        match timeout(receiving.0.timeout.get().unwrap_or(TIMEOUT), peer.receive(&mut data)).await {
            Err(_) => failed("timeout"),
            Ok(Err(e)) => failed(error_text(&e)),
            Ok(Ok(n)) => {
                data.truncate(n);
                smallvec![Value::Bytes(data)]
            }
        }
    })))
}

fn set_timeout(s: &Stack) -> Answer {
    let (socket, limit) = (this(s)?, socket::timeout(s, 2)?);
    socket.timeout.set(limit);
    Ok(0)
}

fn close(s: &Stack) -> Answer {
    let socket = this(s)?;
    if socket.receiving.get() {
        return s.fail("socket busy");
    }
    match socket.peer.take() {
        Some(_) => Ok(s.push_number(1.0)),
        None => s.fail("closed"),
    }
}
