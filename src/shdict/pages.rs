//! How full a dictionary is, counted as nginx's slab allocator would: pages of 4 KB, each cut into pieces of one power of two, and
//! whole pages for what is longer. So a size that was chosen for OpenResty holds as many entries here, and the write that
//! first evicts another is the same one.
//!
//! Only counted: the entries themselves lie where the allocator of the process puts them.

/// Bytes of a page, and what its place in the allocator's own table takes.
const PAGE: usize = 4096;
const PAGE_ENTRY: usize = 24;

/// Head of a zone before that table.
const ZONE_HEAD: usize = 704;

/// Pieces are of 8 bytes and more; what is longer than the largest gets whole pages.
const SMALLEST: u32 = 3;
const LARGEST: u32 = 11;
const CLASSES: usize = (LARGEST - SMALLEST + 1) as usize;

/// What lua-nginx-module keeps in each zone for itself: its lists, and the name for nginx's log.
const OWN: [usize; 2] = [80, 64];

#[derive(Debug)]
pub(super) struct Pages {
    total: usize,
    used: usize,
    /// Pieces in use, by class.
    pieces: [u32; CLASSES],
}

impl Pages {
    /// Of a zone of so many bytes. One that holds nothing beside nginx's own things gets a page for entries all the same.
    pub fn new(bytes: usize) -> Pages {
        let by_size = bytes.saturating_sub(ZONE_HEAD) / (PAGE + PAGE_ENTRY);
        let start = (ZONE_HEAD + by_size * PAGE_ENTRY).next_multiple_of(PAGE);
        let by_place = bytes.saturating_sub(start) / PAGE;
        let mut pages = Pages { total: by_size.min(by_place).max(OWN.len() + 1), used: 0, pieces: [0; CLASSES] };
        OWN.into_iter().for_each(|bytes| pages.take(bytes));
        pages
    }

    /// Bytes of pages that nothing is in.
    pub fn free(&self) -> usize {
        (self.total - self.used) * PAGE
    }

    /// Whether so many bytes would ever fit, all else gone.
    pub fn could_hold(&self, bytes: usize) -> bool {
        bytes.div_ceil(PAGE) <= self.total - OWN.len()
    }

    pub fn has_room(&self, bytes: usize) -> bool {
        let needed = match class(bytes) {
            Some(class) => usize::from(self.is_full(class)),
            None => bytes.div_ceil(PAGE),
        };
        self.used + needed <= self.total
    }

    /// Counts a block in; only after `has_room`.
    pub fn take(&mut self, bytes: usize) {
        match class(bytes) {
            Some(class) => {
                self.used += usize::from(self.is_full(class));
                self.pieces[class] += 1;
            }
            None => self.used += bytes.div_ceil(PAGE),
        }
    }

    /// Counts a block out that was counted in with as many bytes.
    pub fn give(&mut self, bytes: usize) {
        match class(bytes) {
            Some(class) => {
                self.pieces[class] -= 1;
                self.used -= usize::from(self.is_full(class));
            }
            None => self.used -= bytes.div_ceil(PAGE),
        }
    }

    /// Whether the pages of a class have no piece left, so that one more needs one more page.
    fn is_full(&self, class: usize) -> bool {
        self.pieces[class].is_multiple_of(1 << (12 - SMALLEST as usize - class))
    }
}

/// Whether two blocks are of one size in pages and pieces.
pub(super) fn same_size(one: usize, other: usize) -> bool {
    match (class(one), class(other)) {
        (None, None) => one.div_ceil(PAGE) == other.div_ceil(PAGE),
        (one, other) => one == other,
    }
}

fn class(bytes: usize) -> Option<usize> {
    if bytes > 1 << LARGEST {
        return None;
    }
    let bits = usize::BITS - bytes.saturating_sub(1).leading_zeros();
    Some((bits.max(SMALLEST) - SMALLEST) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_powers_of_two_and_the_rest_are_pages() {
        for (bytes, expected) in
            [(0, Some(0)), (8, Some(0)), (9, Some(1)), (128, Some(4)), (129, Some(5)), (2048, Some(8)), (2049, None)]
        {
            assert_eq!(class(bytes), expected, "{bytes}");
        }
        assert!(same_size(65, 128) && same_size(4097, 8192));
        assert!(!same_size(128, 129) && !same_size(2048, 2049) && !same_size(8192, 8193));
    }

    /// The figures that nginx gives on 64 bits: 24 pages of 100k, two of them its own.
    #[test]
    fn a_zone_holds_as_many_as_in_nginx() {
        let filled = |zone: usize, bytes: usize| {
            let mut pages = Pages::new(zone);
            (0..).take_while(|_| pages.has_room(bytes).then(|| pages.take(bytes)).is_some()).count()
        };
        assert_eq!(filled(100 << 10, 138), 22 * 16);
        assert_eq!(filled(100 << 10, 128), 22 * 32 + 31, "the page of nginx's own lists has room for 31");
        assert_eq!(filled(100 << 10, 5000), 11);
        assert_eq!(filled(1, 4096), 1);
    }

    #[test]
    fn what_is_given_back_can_be_taken_again() {
        let mut pages = Pages::new(32 << 10);
        let free = pages.free();
        for bytes in [200, 1000, 3000] {
            pages.take(bytes);
            pages.take(bytes);
            assert!(pages.free() < free, "{bytes}");
            pages.give(bytes);
            pages.give(bytes);
            assert_eq!(pages.free(), free, "{bytes}");
        }
        assert!(pages.could_hold(free) && !pages.could_hold(free + 1) && !pages.has_room(free + 1));
    }
}
