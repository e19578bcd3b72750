//! The upstream of the benchmark: answers every request with 1 KB, for as little CPU as epoll allows.
//!
//! One thread, keepalive, pipelining; requests have no bodies. `rustc -O benches/upstream.rs`, then `upstream PORT`.

use std::{
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
/// One event for each arrival: what is told once need not be looked at again.
const EDGE: u32 = 1 << 31;

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
    // By descriptor.
    let mut connections: Vec<Option<Connection>> = Vec::new();
    let mut buffer = [0; 16 * 1024];
    let mut events = [Event { events: 0, data: 0 }; 256];
    loop {
        // SAFETY: the array outlives the call and is as long as it says.
        let ready = unsafe { epoll_wait(epoll, events.as_mut_ptr(), events.len() as i32, -1) };
        for event in &events[..ready.max(0) as usize] {
            let fd = event.data as RawFd;
            if fd == listener.as_raw_fd() {
                accept(epoll, &listener, &mut connections);
            } else if let Some(connection) = connections.get_mut(fd as usize)
                && connection.as_mut().is_some_and(|c| !serve(c, &mut buffer, answer.as_bytes()))
            {
                *connection = None;
            }
        }
    }
}

fn watch(epoll: i32, fd: RawFd) {
    let mut event = Event { events: READABLE | EDGE, data: fd as u64 };
    // SAFETY: the event lives through the call.
    unsafe { epoll_ctl(epoll, ADD, fd, &mut event) };
}

fn accept(epoll: i32, listener: &TcpListener, connections: &mut Vec<Option<Connection>>) {
    while let Ok((socket, _)) = listener.accept() {
        let (_, _) = (socket.set_nonblocking(true), socket.set_nodelay(true));
        let fd = socket.as_raw_fd();
        let at = fd as usize;
        connections.resize_with(connections.len().max(at + 1), || None);
        connections[at] = Some(Connection { socket, matched: 0 });
        watch(epoll, fd);
    }
}

/// Answers what has arrived; false when the connection is over.
fn serve(connection: &mut Connection, buffer: &mut [u8], answer: &[u8]) -> bool {
    loop {
        let length = match connection.socket.read(buffer) {
            Ok(0) => return false,
            Ok(length) => length,
            Err(e) => return e.kind() == ErrorKind::WouldBlock,
        };
        for _ in 0..requests(&mut connection.matched, &buffer[..length]) {
            // A kilobyte always fits the socket's buffer of a peer that reads.
            if connection.socket.write_all(answer).is_err() {
                return false;
            }
        }
        if length < buffer.len() {
            return true;
        }
    }
}

/// How many heads end in `bytes`.
fn requests(matched: &mut usize, bytes: &[u8]) -> usize {
    const END: &[u8; 4] = b"\r\n\r\n";
    // Nearly always whole ones.
    if *matched == 0 && bytes.ends_with(END) {
        return bytes.windows(END.len()).filter(|part| part == END).count();
    }
    let mut ends = 0;
    for byte in bytes {
        *matched = match *byte == END[*matched] {
            true => *matched + 1,
            false => usize::from(*byte == b'\r'),
        };
        if *matched == END.len() {
            *matched = 0;
            ends += 1;
        }
    }
    ends
}
