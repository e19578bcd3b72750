//! Chunked bodies: never a panic, and the result does not depend on how the bytes arrive.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moongate::exchange::framing::{ChunkDecoder, Chunked};

/// The body and how many bytes belong to it; `None` when refused or unfinished.
fn decode(data: &[u8], step: usize) -> Option<(Vec<u8>, usize)> {
    let (mut decoder, mut body, mut at, mut end) = (ChunkDecoder::new(), Vec::new(), 0, 0);
    loop {
        match decoder.next(&data[at..end]).ok()? {
            Chunked::Data { from, to } => {
                body.extend_from_slice(&data[at + from..at + to]);
                at += to;
            }
            Chunked::Done { used } => return Some((body, at + used)),
            Chunked::More if end == data.len() => return None,
            Chunked::More => {
                at = end;
                end = (end + step).min(data.len());
            }
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let whole = decode(data, data.len().max(1));
    assert_eq!(whole, decode(data, 1));
    assert_eq!(whole, decode(data, 7));
});
