//! Buffers between two uses, so that a warm worker allocates none: what comes from clients and nodes, and what goes to them.

use std::cell::RefCell;

/// A buffer's first size: a head and a small body.
pub const SIZE: usize = 16 * 1024;
/// A buffer that grew past this is freed instead.
pub const KEPT_SIZE: usize = 64 * 1024;
/// Buffers kept per worker. Connections hold one only while bytes wait in it.
const KEPT: usize = 128;

thread_local! {
    static IDLE: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// An empty buffer of at least `SIZE`: the one that was used last.
pub fn take() -> Vec<u8> {
    IDLE.with_borrow_mut(Vec::pop).unwrap_or_else(|| Vec::with_capacity(SIZE))
}

/// Takes a buffer back. One that never held anything is none.
pub fn put(mut buffer: Vec<u8>) {
    if !(SIZE..=KEPT_SIZE).contains(&buffer.capacity()) {
        return;
    }
    buffer.clear();
    IDLE.with_borrow_mut(|idle| {
        if idle.len() < KEPT {
            idle.push(buffer);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_kept_up_to_a_number_and_a_size() {
        let count = || IDLE.with_borrow(Vec::len);
        put(Vec::with_capacity(KEPT_SIZE + 1));
        put(Vec::with_capacity(SIZE - 1));
        assert_eq!(count(), 0, "neither one that grew too long nor one that is too short");
        put(Vec::with_capacity(KEPT_SIZE));
        for _ in 0..KEPT {
            put(vec![b'x'; SIZE]);
        }
        assert_eq!(count(), KEPT);
        assert!(take().is_empty());
        assert_eq!(count(), KEPT - 1);
    }
}
