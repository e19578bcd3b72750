//! `ngx.socket.udp`: datagrams to one peer. The Lua face is lua/moongate/socket.lua.

use std::{
    cell::{Cell, RefCell},
    net::SocketAddr,
    rc::Rc,
    time::Duration,
};

use tokio::net::{UdpSocket, UnixDatagram};

use super::{
    object,
    socket_tcp::{io_text, resolve},
};
use crate::{
    error::Result,
    lua::{
        Op, Value, Wait,
        api::{Api, Phases, Raise, Stack},
        sched::failed,
    },
};

/// `lua_socket_read_timeout`
const TIMEOUT: Duration = Duration::from_secs(60);

/// The largest datagram that OpenResty reads.
const MAX_DATAGRAM: usize = 65536;

#[derive(Clone)]
enum Peer {
    Udp(Rc<UdpSocket>),
    Unix(Rc<UnixDatagram>),
}

struct Udp {
    peer: RefCell<Option<Peer>>,
    timeout: Cell<Duration>,
}

pub fn register(api: &mut Api) -> Result<()> {
    let any = Phases::ANY;
    api.func("native.udp.new", any, "new(): a socket", |s| {
        Ok(object::push(s, Rc::new(Udp { peer: RefCell::default(), timeout: Cell::new(TIMEOUT) })))
    })?;
    api.wait("native.udp.set_peer", any, "set_peer(socket, host, port | nil): 1; nil, err", set_peer)?;
    api.wait("native.udp.send", any, "send(socket, data): 1; nil, err", send)?;
    api.wait("native.udp.receive", any, "receive(socket, size | nil): data; nil, err", receive)?;
    api.func("native.udp.timeout", any, "timeout(socket, ms)", |s| {
        let ms = s.arg_number(2)?;
        let time = if ms > 0.0 { Duration::from_secs_f64((ms / 1000.0).min(1e9)) } else { TIMEOUT };
        object::get::<Udp>(s, 1)?.timeout.set(time);
        Ok(0)
    })?;
    api.func("native.udp.close", any, "close(socket): 1; nil, \"closed\"", |s| {
        match object::get::<Udp>(s, 1)?.peer.borrow_mut().take() {
            Some(_) => Ok(s.push_number(1.0)),
            None => s.fail("closed"),
        }
    })
}

fn set_peer(s: &Stack) -> std::result::Result<Wait, Raise> {
    let udp = object::get::<Udp>(s, 1)?;
    let host = s.arg_str(2)?.into_owned();
    let port = s.opt_number(3)?.unwrap_or(0.0) as u16;
    Ok(Wait::Park(Op::future(async move {
        let opened = tokio::time::timeout(udp.timeout.get(), open(&host, port)).await;
        match opened.unwrap_or_else(|_| Err("timeout".into())) {
            Ok(peer) => {
                *udp.peer.borrow_mut() = Some(peer);
                smallvec::smallvec![Value::Number(1.0)]
            }
            Err(why) => failed(why),
        }
    })))
}

async fn open(host: &str, port: u16) -> std::result::Result<Peer, String> {
    if let Some(path) = host.strip_prefix("unix:") {
        let socket = UnixDatagram::unbound().map_err(|e| io_text(&e))?;
        socket.connect(path).map_err(|e| io_text(&e))?;
        return Ok(Peer::Unix(Rc::new(socket)));
    }
    let ip = *resolve(host).await?.first().ok_or("no address")?;
    let any: SocketAddr = if ip.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0_u16; 8], 0).into() };
    let socket = UdpSocket::bind(any).await.map_err(|e| io_text(&e))?;
    socket.connect((ip, port)).await.map_err(|e| io_text(&e))?;
    Ok(Peer::Udp(Rc::new(socket)))
}

fn peer(s: &Stack, udp: &Udp) -> std::result::Result<Peer, Wait> {
    udp.peer.borrow().clone().ok_or_else(|| {
        s.push_nil();
        s.push_bytes("closed");
        Wait::Ready(2)
    })
}

fn send(s: &Stack) -> std::result::Result<Wait, Raise> {
    let udp = object::get::<Udp>(s, 1)?;
    let data = s.arg_bytes(2)?.to_vec();
    let peer = match peer(s, &udp) {
        Ok(peer) => peer,
        Err(closed) => return Ok(closed),
    };
    Ok(Wait::Park(Op::future(async move {
        let sent = match peer {
            Peer::Udp(socket) => socket.send(&data).await,
            Peer::Unix(socket) => socket.send(&data).await,
        };
        match sent {
            Ok(_) => smallvec::smallvec![Value::Number(1.0)],
            Err(e) => failed(io_text(&e)),
        }
    })))
}

fn receive(s: &Stack) -> std::result::Result<Wait, Raise> {
    let udp = object::get::<Udp>(s, 1)?;
    let size = s.opt_number(2)?.map_or(MAX_DATAGRAM, |n| (n.max(1.0) as usize).min(MAX_DATAGRAM));
    let peer = match peer(s, &udp) {
        Ok(peer) => peer,
        Err(closed) => return Ok(closed),
    };
    let time = udp.timeout.get();
    Ok(Wait::Park(Op::future(async move {
        let mut data = vec![0; size];
        let read = tokio::time::timeout(time, async {
            match peer {
                Peer::Udp(socket) => socket.recv(&mut data).await,
                Peer::Unix(socket) => socket.recv(&mut data).await,
            }
        });
        match read.await {
            Ok(Ok(n)) => {
                data.truncate(n);
                smallvec::smallvec![Value::Bytes(data)]
            }
            Ok(Err(e)) => failed(io_text(&e)),
            Err(_) => failed("timeout"),
        }
    })))
}
