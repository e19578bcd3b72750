//! Prefixes that end with a slash, as `/a/*` and `/a/:id` have: a path has few of them, so that a hash finds their rules
//! without a walk down a tree. What is kept here is how deep they lie, so that a lookup asks only where there are rules.

use smallvec::SmallVec;

/// Deeper prefixes stay in the tree: the mask has a bit for each depth, and a path of slashes must not cost a look for each.
const MAX_DEPTH: usize = 63;

/// How many rules there are under folders of each depth.
#[derive(Clone, Default)]
pub(super) struct Folders {
    counts: SmallVec<[u32; 4]>,
    /// Bit `depth` is set where `counts` is not zero.
    mask: u64,
}

/// The depth of a prefix that is a folder: how many slashes it has.
pub(super) fn depth(prefix: &[u8]) -> Option<usize> {
    let depth = memchr::memchr_iter(b'/', prefix).count();
    (prefix.ends_with(b"/") && depth <= MAX_DEPTH).then_some(depth)
}

impl Folders {
    pub fn add(&mut self, depth: usize) {
        if self.counts.len() <= depth {
            self.counts.resize(depth + 1, 0);
        }
        self.counts[depth] += 1;
        self.mask |= 1 << depth;
    }

    pub fn remove(&mut self, depth: usize) {
        let Some(count) = self.counts.get_mut(depth) else { return };
        *count -= 1;
        if *count == 0 {
            self.mask &= !(1 << depth);
        }
    }

    pub fn is_empty(&self) -> bool {
        self.mask == 0
    }

    /// The lengths of those folders of `path` at whose depth there are rules, shortest first.
    pub fn of(&self, path: &[u8]) -> SmallVec<[usize; 8]> {
        let mut lengths = SmallVec::new();
        // Without the bits of the depths that are behind.
        let mut mask = self.mask >> 1;
        let mut slashes = memchr::memchr_iter(b'/', path);
        while mask != 0
            && let Some(slash) = slashes.next()
        {
            if mask & 1 != 0 {
                lengths.push(slash + 1);
            }
            mask >>= 1;
        }
        lengths
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lookup_asks_only_where_there_are_rules() {
        let mut folders = Folders::default();
        for prefix in ["/", "/a/b/", "/c/d/"] {
            folders.add(depth(prefix.as_bytes()).unwrap());
        }
        assert_eq!(folders.of(b"/x/y/z/w")[..], [1, 5]);
        assert_eq!(folders.of(b"/x/y")[..], [1]);
        assert!(folders.of(b"x").is_empty());
        folders.remove(3);
        assert_eq!(folders.of(b"/x/y/z/w")[..], [1, 5]);
        folders.remove(3);
        folders.remove(1);
        assert!(folders.is_empty() && folders.of(b"/x/y/z/w").is_empty());
    }

    #[test]
    fn what_lies_too_deep_is_no_folder() {
        assert_eq!(depth("/".repeat(MAX_DEPTH).as_bytes()), Some(MAX_DEPTH));
        assert_eq!(depth("/".repeat(MAX_DEPTH + 1).as_bytes()), None);
        assert_eq!((depth(b"/a"), depth(b"")), (None, None));
        let mut folders = Folders::default();
        folders.add(MAX_DEPTH);
        assert_eq!(folders.of("/".repeat(10_000).as_bytes())[..], [MAX_DEPTH]);
    }
}
