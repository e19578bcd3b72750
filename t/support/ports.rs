//! Ports that tests which run beside this one do not get.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    process,
    sync::atomic::{AtomicU32, Ordering},
};

use socket2::{Domain, Socket, Type};

/// Below what kernels give out to those who ask for any port.
const FIRST: u32 = 10_000;
const LAST: u32 = 30_000;
/// Tests are processes, and those that run at once have numbers near each other.
const PER_PROCESS: u32 = 32;

/// A port at which nothing listens and nobody else will, as long as this process lives.
pub fn dead_port() -> u16 {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).expect("a free port");
    let port = socket.local_addr().ok().and_then(|at| at.as_socket()).expect("an address").port();
    // Bound and not listening it refuses whoever connects.
    std::mem::forget(socket);
    port
}

/// A free port for a peer that cannot choose one itself.
pub fn free_port() -> u16 {
    static TAKEN: AtomicU32 = AtomicU32::new(0);
    let first = process::id().wrapping_mul(PER_PROCESS);
    let mut ports = (0..LAST - FIRST).map(|_| {
        let nth = TAKEN.fetch_add(1, Ordering::Relaxed);
        u16::try_from(FIRST + first.wrapping_add(nth) % (LAST - FIRST)).expect("below 65536")
    });
    ports.find(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok()).expect("a free port")
}
