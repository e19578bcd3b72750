//! Request ids: unique, not secret. A fast generator per worker thread, seeded by the operating system.

use std::cell::Cell;

use ring::rand::{SecureRandom, SystemRandom};

thread_local! {
    static STATE: Cell<[u64; 4]> = Cell::new(seed());
    static SERIAL: Cell<u64> = const { Cell::new(0) };
}

/// The next serial of this thread and sixteen random bytes.
pub(super) fn request_id() -> (u64, [u8; 16]) {
    let serial = SERIAL.get() + 1;
    SERIAL.set(serial);
    let mut id = [0; 16];
    id[..8].copy_from_slice(&next().to_ne_bytes());
    id[8..].copy_from_slice(&next().to_ne_bytes());
    (serial, id)
}

/// xoshiro256**, by Blackman and Vigna.
fn next() -> u64 {
    let mut s = STATE.get();
    let result = s[1].wrapping_mul(5).rotate_left(7).wrapping_mul(9);
    let t = s[1] << 17;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = s[3].rotate_left(45);
    STATE.set(s);
    result
}

fn seed() -> [u64; 4] {
    let mut bytes = [0; 32];
    if SystemRandom::new().fill(&mut bytes).is_err() {
        // Without the system's generator the ids must still differ between threads and starts.
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        bytes[..16].copy_from_slice(&now.as_nanos().to_ne_bytes());
        let here = std::ptr::from_ref(&now) as u64 ^ u64::from(std::process::id());
        bytes[16..24].copy_from_slice(&here.to_ne_bytes());
    }
    let mut words = [0; 4];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = bytes.iter().fold(0, |n, b| n << 8 | u64::from(*b));
    }
    words[3] |= 1; // The state must not be all zero.
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_differ_and_serials_grow() {
        let (first, a) = request_id();
        let (second, b) = request_id();
        assert_ne!(a, b);
        assert_eq!(second, first + 1);
        let other = std::thread::spawn(|| request_id().1).join().unwrap();
        assert!(other != a && other != b);
    }
}
