//! The sockets of all workers, bound before anything is announced.

use std::{
    io,
    net::{SocketAddr, TcpListener, UdpSocket},
    os::unix::net::UnixListener,
    sync::Arc,
};

use crate::{
    conf::{Config, Listen, ListenUnix, StreamListen},
    error::{Error, Result},
    net::listener,
    stream::udp,
    tls,
};

/// One worker's sockets.
#[derive(Default)]
pub struct Bound {
    pub http: Vec<Http>,
    pub unix: Vec<Unix>,
    pub tcp: Vec<Tcp>,
    pub udp: Vec<UdpSocket>,
}

/// A socket for requests, on one of the configured addresses.
pub struct Http {
    pub socket: TcpListener,
    pub proxy_protocol: bool,
    pub http2: bool,
    /// `None`: plain.
    pub tls: Option<Arc<tls::Server>>,
}

/// A socket for requests, in the file system. All workers accept from the same one.
pub struct Unix {
    pub socket: UnixListener,
    pub proxy_protocol: bool,
    pub http2: bool,
    pub tls: Option<Arc<tls::Server>>,
}

/// A socket for connections that are proxied as they are.
pub struct Tcp {
    pub socket: TcpListener,
    pub proxy_protocol: bool,
    pub proxy_protocol_to_upstream: bool,
    pub tls: Option<Arc<tls::Server>>,
}

/// Everything that requests and sessions come in by.
#[derive(Default)]
pub struct Sockets {
    /// By worker.
    pub workers: Vec<Bound>,
    /// The real addresses, once each.
    pub plain: Vec<SocketAddr>,
    pub tls: Vec<SocketAddr>,
    pub tcp: Vec<SocketAddr>,
    pub udp: Vec<SocketAddr>,
}

/// Binds `config.workers` sockets on every address.
pub fn bind(config: &Config) -> Result<Sockets> {
    let mut sockets =
        Sockets { workers: (0..config.workers).map(|_| Bound::default()).collect(), ..Sockets::default() };
    // All before the first is bound: own addresses may overlap (0.0.0.0 and 127.0.0.1).
    let tcp = config.listen.iter().chain(&config.listen_tls).map(|listen| listen.addr);
    for addr in tcp.chain(config.stream.tcp.iter().map(|listen| listen.addr)).filter(|addr| addr.port() != 0) {
        listener::ensure_free(addr)?;
    }
    for addr in config.stream.udp.iter().filter(|addr| addr.port() != 0) {
        udp::ensure_free(*addr)?;
    }
    bind_http(&mut sockets, config)?;
    bind_streams(&mut sockets, config)?;
    Ok(sockets)
}

fn bind_http(sockets: &mut Sockets, config: &Config) -> Result<()> {
    for listen in &config.listen {
        if let Some(addr) = bind_requests(&mut sockets.workers, listen, None)? {
            sockets.plain.push(addr);
        }
    }
    let (mut with_http2, mut without) = (None, None);
    let mut server = |http2| {
        let (kept, alpn): (_, &[&[u8]]) = match http2 {
            true => (&mut with_http2, &[b"h2", b"http/1.1"]),
            false => (&mut without, &[b"http/1.1"]),
        };
        Ok::<_, Error>(match kept {
            Some(server) => Arc::clone(server),
            None => kept.insert(super::settings::tls(config, alpn)?).clone(),
        })
    };
    for listen in &config.listen_unix {
        let ListenUnix { path, tls, http2, proxy_protocol } = listen;
        let tls = if *tls { Some(server(*http2)?) } else { None };
        let socket = listener::bind_unix(path)?;
        for worker in &mut sockets.workers {
            let (socket, http2, proxy_protocol) = (socket.try_clone()?, *http2, *proxy_protocol);
            worker.unix.push(Unix { socket, proxy_protocol, http2, tls: tls.clone() });
        }
    }
    for listen in &config.listen_tls {
        let server = server(listen.http2)?;
        if let Some(addr) = bind_requests(&mut sockets.workers, listen, Some(&server))? {
            sockets.tls.push(addr);
        }
    }
    Ok(())
}

fn bind_streams(sockets: &mut Sockets, config: &Config) -> Result<()> {
    let mut server = None;
    for listen in &config.stream.tcp {
        if listen.tls && server.is_none() {
            // What is spoken inside is no concern of the gateway's.
            server = Some(super::settings::tls(config, &[])?);
        }
        let StreamListen { addr, tls, proxy_protocol, proxy_protocol_to_upstream } = *listen;
        let tls = server.as_ref().filter(|_| tls);
        let addr = bind_all(&mut sockets.workers, addr, listener::bind, TcpListener::local_addr, |worker, socket| {
            worker.tcp.push(Tcp { socket, proxy_protocol, proxy_protocol_to_upstream, tls: tls.cloned() });
        })?;
        sockets.tcp.push(addr);
    }
    for addr in &config.stream.udp {
        let addr = bind_all(&mut sockets.workers, *addr, udp::bind, UdpSocket::local_addr, |worker, socket| {
            worker.udp.push(socket);
        })?;
        sockets.udp.push(addr);
    }
    Ok(())
}

/// The address that came of `listen`; `None` when the machine has no IPv6 and nobody named an address.
fn bind_requests(workers: &mut [Bound], listen: &Listen, tls: Option<&Arc<tls::Server>>) -> Result<Option<SocketAddr>> {
    let Listen { addr, proxy_protocol, http2 } = *listen;
    let bound = bind_all(workers, addr, listener::bind, TcpListener::local_addr, |worker, socket| {
        worker.http.push(Http { socket, proxy_protocol, http2, tls: tls.cloned() });
    });
    match bound {
        Err(e) if addr.ip().is_unspecified() && addr.is_ipv6() && no_ipv6(&e) => {
            tracing::warn!("{e}: requests over IPv6 are not served");
            Ok(None)
        }
        bound => bound.map(Some),
    }
}

/// One socket for each worker, and the address that they have.
fn bind_all<S>(
    workers: &mut [Bound],
    mut addr: SocketAddr,
    bind: fn(SocketAddr) -> Result<S>,
    address: fn(&S) -> io::Result<SocketAddr>,
    keep: impl Fn(&mut Bound, S),
) -> Result<SocketAddr> {
    for worker in workers.iter_mut() {
        let socket = bind(addr)?;
        // With port 0 the first worker's port is everybody's.
        addr = address(&socket)?;
        keep(worker, socket);
    }
    Ok(addr)
}

fn no_ipv6(e: &Error) -> bool {
    let cause = std::error::Error::source(e).and_then(|cause| cause.downcast_ref::<io::Error>());
    let code = cause.and_then(io::Error::raw_os_error);
    matches!(code, Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_another_gateway_listens_on_is_refused() {
        let taken = listener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let addr = taken.local_addr().unwrap();
        let refused = listener::ensure_free(addr).unwrap_err().to_string();
        assert!(refused.contains(&format!("listen on {addr}")), "{refused}");
        drop(taken);
        listener::ensure_free(addr).unwrap();
    }
}
