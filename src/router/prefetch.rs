//! Asking for memory ahead of its use. With ten thousand routes, what nearly every request needs lies in no cache, and waits
//! that are begun together, or while there is other work, cost as much as one, or nothing.

use std::sync::Arc;

const LINE: usize = 64;
/// An `Arc`'s counts stand before its value.
const COUNTS: usize = 2 * size_of::<usize>();

/// A shared value, its counts included.
#[inline]
pub(super) fn shared<T: ?Sized>(value: &Arc<T>) {
    lines(Arc::as_ptr(value).cast::<u8>().wrapping_sub(COUNTS), COUNTS + size_of_val(&**value));
}

/// The counts of a shared value alone.
#[inline]
pub(super) fn counts<T>(value: &Arc<T>) {
    lines(Arc::as_ptr(value).cast::<u8>().wrapping_sub(COUNTS), COUNTS);
}

#[inline]
fn lines(start: *const u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let mut at = start.wrapping_sub(start.addr() % LINE);
        while at < start.wrapping_add(len) {
            // SAFETY: a prefetch changes nothing that can be seen, and an address that is none does no harm.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
            at = at.wrapping_add(LINE);
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (start, len, LINE);
}
