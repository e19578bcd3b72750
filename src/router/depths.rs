//! How deep paths and prefixes lie, by their slashes: a lookup asks only at depths where there are rules. Prefixes that end
//! with a slash, as `/a/*` and `/a/:id` have, are folders: a path has few of them, so that a hash finds their rules without a
//! walk down a tree.

use smallvec::SmallVec;

/// What is deeper counts as this deep; folders deeper than this stay in the tree. A mask has a bit for each depth, and a path of
/// slashes must not cost a look for each.
const MAX: usize = 63;

/// How many rules there are at each depth.
#[derive(Clone, Default)]
pub(super) struct Depths {
    counts: SmallVec<[u32; 4]>,
    /// Bit `depth` is set where `counts` is not zero.
    mask: u64,
}

/// Where the first slashes of a path are.
pub(super) struct Slashes(SmallVec<[u32; 16]>);

/// The depth of a path.
pub(super) fn of_path(path: &[u8]) -> usize {
    memchr::memchr_iter(b'/', path).take(MAX).count()
}

/// The depth of a prefix that is a folder.
pub(super) fn of_folder(prefix: &[u8]) -> Option<usize> {
    let depth = memchr::memchr_iter(b'/', prefix).take(MAX + 1).count();
    (prefix.ends_with(b"/") && depth <= MAX).then_some(depth)
}

impl Slashes {
    pub fn of(path: &[u8]) -> Self {
        Slashes(memchr::memchr_iter(b'/', path).take(MAX).map(|at| at as u32).collect())
    }
}

impl Depths {
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

    /// Whether there are rules at a path's depth.
    pub fn have(&self, slashes: &Slashes) -> bool {
        self.mask & (1 << slashes.0.len()) != 0
    }

    /// The lengths of those folders of a path at whose depth there are rules, longest first.
    pub fn folders<'a>(&self, slashes: &'a Slashes) -> impl Iterator<Item = usize> + use<'a> {
        let mut mask = self.mask & (u64::MAX >> (MAX - slashes.0.len()));
        std::iter::from_fn(move || {
            let depth = mask.checked_ilog2()? as usize;
            mask ^= 1 << depth;
            // A folder has a slash at least.
            Some(slashes.0[depth - 1] as usize + 1)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folders(depths: &Depths, path: &str) -> Vec<usize> {
        depths.folders(&Slashes::of(path.as_bytes())).collect()
    }

    #[test]
    fn a_lookup_asks_only_where_there_are_rules() {
        let mut depths = Depths::default();
        for prefix in ["/", "/a/b/", "/c/d/"] {
            depths.add(of_folder(prefix.as_bytes()).unwrap());
        }
        assert_eq!(folders(&depths, "/x/y/z/w"), [5, 1]);
        assert_eq!(folders(&depths, "/x/y"), [1]);
        assert!(folders(&depths, "x").is_empty());
        depths.remove(3);
        assert_eq!(folders(&depths, "/x/y/z/w"), [5, 1]);
        depths.remove(3);
        depths.remove(1);
        assert!(depths.is_empty() && folders(&depths, "/x/y/z/w").is_empty());
    }

    #[test]
    fn a_path_is_as_deep_as_it_has_slashes() {
        let mut depths = Depths::default();
        depths.add(of_path(b"/a/b"));
        let have = |depths: &Depths, path: &str| depths.have(&Slashes::of(path.as_bytes()));
        assert!(have(&depths, "/c/d") && have(&depths, "//"));
        assert!(!have(&depths, "/c") && !have(&depths, "/c/d/") && !have(&depths, "*"));
        let deep = "/".repeat(10_000);
        assert!(!have(&depths, &deep));
        depths.add(of_path("/x".repeat(MAX + 5).as_bytes()));
        assert!(have(&depths, &deep));
    }

    #[test]
    fn what_lies_too_deep_is_no_folder() {
        assert_eq!(of_folder("/".repeat(MAX).as_bytes()), Some(MAX));
        assert_eq!(of_folder("/".repeat(MAX + 1).as_bytes()), None);
        assert_eq!((of_folder(b"/a"), of_folder(b"")), (None, None));
        let mut depths = Depths::default();
        depths.add(MAX);
        assert_eq!(folders(&depths, &"/".repeat(10_000)), [MAX]);
    }
}
