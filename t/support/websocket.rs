//! WebSocket frames for tests, byte by byte (RFC 6455, 5.2).

use std::io::Read;

pub const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";

/// What asks for a WebSocket.
pub const HANDSHAKE: [(&str, &str); 5] = [
    ("Upgrade", "websocket"),
    ("Connection", "keep-alive, Upgrade"),
    ("Sec-WebSocket-Key", KEY),
    ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Protocol", "chat, more"),
];

/// A frame as it goes over the wire.
#[derive(Debug, PartialEq)]
pub struct Frame {
    pub first: u8,
    pub masked: bool,
    pub payload: Vec<u8>,
}

pub fn read_frame(stream: &mut impl Read) -> std::io::Result<Frame> {
    let mut bytes = |n: usize| {
        let mut data = vec![0; n];
        stream.read_exact(&mut data).map(|()| data)
    };
    let head = bytes(2)?;
    let number = |data: Vec<u8>| data.iter().fold(0, |n, byte| n * 256 + usize::from(*byte));
    let length = match head[1] & 0x7f {
        126 => number(bytes(2)?),
        127 => number(bytes(8)?),
        short => usize::from(short),
    };
    let masked = head[1] >= 0x80;
    let mask = if masked { bytes(4)? } else { vec![0; 4] };
    let payload = bytes(length)?.iter().zip(mask.iter().cycle()).map(|(a, b)| a ^ b).collect();
    Ok(Frame { first: head[0], masked, payload })
}

/// The bytes of a frame. `masked`: with a mask that shows.
pub fn frame(first: u8, masked: bool, payload: &[u8]) -> Vec<u8> {
    let mark = if masked { 0x80 } else { 0 };
    let mut out = vec![first];
    match payload.len() {
        short @ 0..126 => out.push(mark | short as u8),
        long => {
            out.push(mark | 126);
            out.extend((long as u16).to_be_bytes());
        }
    }
    let mask: &[u8] = if masked { &[0xa5, 0x5a, 1, 2] } else { &[0] };
    if masked {
        out.extend(mask);
    }
    out.extend(payload.iter().zip(mask.iter().cycle()).map(|(a, b)| a ^ b));
    out
}
