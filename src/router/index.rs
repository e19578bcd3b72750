//! The rules that a hash finds: a hash table whose clones share what they do not change, as the router's versions need it.
//!
//! A path's hash leads to a page, which is a short list of rules in one allocation, and from there to the rule: two waits for
//! memory where a tree of nodes has one more for each level. Pages lie in groups, and a change copies one page, one group and
//! the list of groups. The table grows and shrinks by one page at a time (linear hashing, Litwin 1980), so that no change pays
//! for all of it.

use std::sync::Arc;

use super::{
    prefetch,
    rule::{Rule, Rules},
};

/// Pages in a group: with a hundred thousand rules the list of groups is about as long as a group.
const GROUP: usize = 128;
/// Hashes of a page, on average, past which there is one page more. With more pages, the groups that lead to them would leave the
/// caches; a longer page would take more time to look through and to copy.
const LOAD: usize = 8;

/// Rules by a hash of their path and scope. Rules that share a hash by accident share a list.
#[derive(Clone)]
pub(super) struct Index {
    groups: Arc<Vec<Arc<Group>>>,
    /// How many are in use: the last group's other ones are empty.
    pages: usize,
    /// How many hashes there are.
    len: usize,
}

type Group = [Page; GROUP];

/// `None` when it is empty, which takes no allocation.
type Page = Option<Arc<[Entry]>>;

#[derive(Clone)]
struct Entry {
    key: u64,
    rules: Rules,
}

impl Default for Index {
    fn default() -> Self {
        Index { groups: Arc::default(), pages: 1, len: 0 }
    }
}

impl Index {
    pub fn get(&self, key: u64) -> Option<&Rules> {
        let at = place(key, self.pages);
        let page = self.groups.get(at / GROUP)?[at % GROUP].as_deref()?;
        page.iter().find(|entry| entry.key == key).map(|entry| &entry.rules)
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// Pages, and groups of them.
    #[cfg(test)]
    pub fn size(&self) -> (usize, usize) {
        (self.pages, self.groups.len())
    }

    /// Asks for the page that `get` will read.
    pub fn prefetch(&self, key: u64) {
        let at = place(key, self.pages);
        if let Some(page) = self.groups.get(at / GROUP).and_then(|group| group[at % GROUP].as_ref()) {
            prefetch::shared(page);
        }
    }

    pub fn add(&mut self, key: u64, rule: Arc<Rule>) {
        let page = self.page(place(key, self.pages));
        let at = page.as_deref().and_then(|known| known.iter().position(|entry| entry.key == key));
        if let (Some(at), Some(known)) = (at, page.as_mut()) {
            return Arc::make_mut(known)[at].rules.add(rule);
        }
        let new = Entry { key, rules: Rules::One(rule) };
        *page = Some(page.as_deref().unwrap_or_default().iter().cloned().chain([new]).collect());
        self.len += 1;
        if self.len > self.pages * LOAD {
            self.split();
        }
    }

    /// Takes out the rule that is equal to `rule` in order, if it is there.
    pub fn remove(&mut self, key: u64, rule: &Rule) {
        if self.get(key).is_none() {
            return;
        }
        let page = self.page(place(key, self.pages));
        let Some(entries) = page.as_mut().map(Arc::make_mut) else { return };
        if !entries.iter_mut().any(|entry| entry.key == key && entry.rules.remove(rule)) {
            return;
        }
        *page = collected(entries.iter().filter(|entry| entry.key != key).cloned());
        self.len -= 1;
        // Half of what makes it grow: a rule that comes and goes does not move a page each time.
        if self.pages > 1 && self.len < self.pages * LOAD / 2 {
            self.join();
        }
    }

    /// A page of this version's own.
    fn page(&mut self, at: usize) -> &mut Page {
        let groups = Arc::make_mut(&mut self.groups);
        if groups.len() <= at / GROUP {
            groups.resize_with(at / GROUP + 1, || Arc::new([const { None }; GROUP]));
        }
        &mut Arc::make_mut(&mut groups[at / GROUP])[at % GROUP]
    }

    /// Moves those rules of a page that belong to the next one there.
    fn split(&mut self) {
        let new = self.pages;
        self.pages += 1;
        let old = self.page(partner(new));
        let Some(entries) = old.take() else { return };
        let belongs = |at: usize| entries.iter().filter(move |entry| place(entry.key, new + 1) == at).cloned();
        *old = collected(belongs(partner(new)));
        let moved = collected(belongs(new));
        *self.page(new) = moved;
    }

    /// The reverse of `split`.
    fn join(&mut self) {
        self.pages -= 1;
        let last = self.pages;
        let moved = self.page(last).take();
        if let Some(moved) = moved {
            let page = self.page(partner(last));
            *page = collected(page.iter().flat_map(|page| page.iter()).chain(moved.iter()).cloned());
        }
        if last.is_multiple_of(GROUP) {
            Arc::make_mut(&mut self.groups).truncate(last / GROUP);
        }
    }
}

fn collected(entries: impl Iterator<Item = Entry>) -> Page {
    let mut entries = entries.peekable();
    entries.peek().is_some().then_some(())?;
    Some(entries.collect())
}

/// The page of a key when there are `pages`: its last bits, one less of them where there is no such page yet.
fn place(key: u64, pages: usize) -> usize {
    let mask = pages.next_power_of_two() - 1;
    match key as usize & mask {
        at if at < pages => at,
        at => at & (mask >> 1),
    }
}

/// The page that the rules of page `at` were in before there was such a page.
fn partner(at: usize) -> usize {
    at & !(1 << at.ilog2())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_split_into_itself_and_the_next() {
        for pages in 1..3000 {
            for key in [0, 1, 2, 77, 1023, 1024, 4711, u64::MAX, 0x9E37_79B9_7F4A_7C15] {
                let (before, after) = (place(key, pages), place(key, pages + 1));
                assert!(after == before || (after == pages && before == partner(pages)), "{key} of {pages}");
                assert!(before < pages);
            }
        }
    }
}
