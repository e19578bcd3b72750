//! The sockets of all workers, bound before anything is announced.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    sync::Arc,
};

use crate::{
    conf::{Config, Listen},
    error::{Error, Result},
    net::listener,
    tls,
};

/// One worker's socket on one of the configured addresses.
pub struct Bound {
    pub socket: TcpListener,
    pub proxy_protocol: bool,
    pub http2: bool,
    /// `None`: plain.
    pub tls: Option<Arc<tls::Server>>,
}

/// Everything that requests come in by.
#[derive(Default)]
pub struct Sockets {
    /// By worker.
    pub workers: Vec<Vec<Bound>>,
    /// The real addresses, once each.
    pub plain: Vec<SocketAddr>,
    pub tls: Vec<SocketAddr>,
}

/// Binds `config.workers` sockets on every address.
pub fn bind(config: &Config) -> Result<Sockets> {
    let mut sockets = Sockets { workers: (0..config.workers).map(|_| Vec::new()).collect(), ..Sockets::default() };
    // All before the first is bound: own addresses may overlap (0.0.0.0 and 127.0.0.1).
    for listen in config.listen.iter().chain(&config.listen_tls).filter(|listen| listen.addr.port() != 0) {
        listener::ensure_free(listen.addr)?;
    }
    for listen in &config.listen {
        if let Some(addr) = bind_all(&mut sockets.workers, listen, None)? {
            sockets.plain.push(addr);
        }
    }
    let (mut with_http2, mut without) = (None, None);
    for listen in &config.listen_tls {
        let kept = if listen.http2 { &mut with_http2 } else { &mut without };
        let server = match kept {
            Some(server) => Arc::clone(server),
            None => kept.insert(super::settings::tls(config, listen.http2)?).clone(),
        };
        if let Some(addr) = bind_all(&mut sockets.workers, listen, Some(&server))? {
            sockets.tls.push(addr);
        }
    }
    Ok(sockets)
}

/// The address that came of `listen`; `None` when the machine has no IPv6 and nobody named an address.
fn bind_all(workers: &mut [Vec<Bound>], listen: &Listen, tls: Option<&Arc<tls::Server>>) -> Result<Option<SocketAddr>> {
    let mut addr = listen.addr;
    for worker in workers.iter_mut() {
        let socket = match listener::bind(addr) {
            Err(e) if addr.ip().is_unspecified() && addr.is_ipv6() && no_ipv6(&e) => {
                tracing::warn!("{e}: requests over IPv6 are not served");
                return Ok(None);
            }
            bound => bound?,
        };
        // With port 0 the first worker's port is everybody's.
        addr = socket.local_addr()?;
        let Listen { proxy_protocol, http2, .. } = *listen;
        worker.push(Bound { socket, proxy_protocol, http2, tls: tls.cloned() });
    }
    Ok(Some(addr))
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
