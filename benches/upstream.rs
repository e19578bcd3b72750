//! The upstream of the benchmark: answers every request with 1 KB, for as little CPU as epoll allows.
//!
//! One thread, keepalive, pipelining; requests have no bodies. `rustc -O benches/upstream.rs`, then `upstream PORT`.

use std::{
    collections::HashMap,
    io::{ErrorKind, Read, Write},
    net::{TcpListener, TcpStream},
    os::fd::{AsRawFd, RawFd},
};

#[repr(C)]
#[cfg_attr(target_arch = "x86_64", repr(packed))]
#[derive(Clone, Copy)]
struct Event {
    events: u32,
    data: u64,
}

unsafe extern "C" {
    fn epoll_create1(flags: i32) -> i32;
    fn epoll_ctl(epoll: i32, op: i32, fd: i32, event: *mut Event) -> i32;
    fn epoll_wait(epoll: i32, events: *mut Event, max: i32, timeout: i32) -> i32;
}

const ADD: i32 = 1;
const READABLE: u32 = 1;

struct Connection {
    socket: TcpStream,
    /// How much of the blank line that ends a head was seen at the end of the last read.
    matched: usize,
}

fn main() {
    let port = std::env::args().nth(1).and_then(|p| p.parse().ok()).expect("usage: upstream PORT");
    let listener = TcpListener::bind(("127.0.0.1", port)).expect("bind");
    listener.set_nonblocking(true).expect("nonblocking");
    let answer = format!(
        "HTTP/1.1 200 OK\r\nServer: bench\r\nContent-Type: text/plain\r\nContent-Length: 1024\r\n\r\n{}",
        "x".repeat(1024)
    );
    // SAFETY: no pointer goes in.
    let epoll = unsafe { epoll_create1(0) };
    watch(epoll, listener.as_raw_fd());
    let mut connections: HashMap<RawFd, Connection> = HashMap::new();
    let mut events = [Event { events: 0, data: 0 }; 256];
    loop {
        // SAFETY: the array outlives the call and is as long as it says.
        let ready = unsafe { epoll_wait(epoll, events.as_mut_ptr(), events.len() as i32, -1) };
        for event in &events[..ready.max(0) as usize] {
            let fd = event.data as RawFd;
            if fd == listener.as_raw_fd() {
                accept(epoll, &listener, &mut connections);
            } else if connections.get_mut(&fd).is_some_and(|c| !serve(c, answer.as_bytes())) {
                connections.remove(&fd);
            }
        }
    }
}

fn watch(epoll: i32, fd: RawFd) {
    let mut event = Event { events: READABLE, data: fd as u64 };
    // SAFETY: the event lives through the call.
    unsafe { epoll_ctl(epoll, ADD, fd, &mut event) };
}

fn accept(epoll: i32, listener: &TcpListener, connections: &mut HashMap<RawFd, Connection>) {
    while let Ok((socket, _)) = listener.accept() {
        let (_, _) = (socket.set_nonblocking(true), socket.set_nodelay(true));
        let fd = socket.as_raw_fd();
        connections.insert(fd, Connection { socket, matched: 0 });
        watch(epoll, fd);
    }
}

/// Answers what has arrived; false when the connection is over.
fn serve(connection: &mut Connection, answer: &[u8]) -> bool {
    let mut buffer = [0; 16 * 1024];
    let length = match connection.socket.read(&mut buffer) {
        Ok(0) => return false,
        Ok(length) => length,
        Err(e) => return e.kind() == ErrorKind::WouldBlock,
    };
    const END: &[u8; 4] = b"\r\n\r\n";
    for byte in &buffer[..length] {
        connection.matched = match *byte == END[connection.matched] {
            true => connection.matched + 1,
            false => usize::from(*byte == b'\r'),
        };
        if connection.matched == END.len() {
            connection.matched = 0;
            // A kilobyte always fits the socket's buffer of a peer that reads.
            if connection.socket.write_all(answer).is_err() {
                return false;
            }
        }
    }
    true
}
