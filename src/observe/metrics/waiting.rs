//! How many entries wait in batch processors: a slot for each processor's name, route and address, in all VMs.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use super::{lock, page::Page};

/// Slots there are at most: routes with a logger, and those that had one. Past it those go in which nothing waits; where something waits in
/// all, entries of further ones are not shown, which counts as an error.
pub(super) const MAX_SLOTS: usize = 4096;

const LABELS: [&str; 3] = ["name", "route_id", "server_addr"];

pub(super) struct Waiting {
    /// Whose slot it is, counted up with each owner, and the entries: 32 bits each, so that nobody adds to another's.
    counts: Box<[AtomicU64]>,
    slots: Mutex<Slots>,
    refused: AtomicU64,
}

struct Slots {
    taken: BTreeMap<[Box<str>; 3], usize>,
    free: Vec<usize>,
}

impl Default for Waiting {
    fn default() -> Self {
        let counts = (0..MAX_SLOTS).map(|_| AtomicU64::new(0)).collect();
        let slots = Slots { taken: BTreeMap::new(), free: (0..MAX_SLOTS).rev().collect() };
        Waiting { counts, slots: Mutex::new(slots), refused: AtomicU64::new(0) }
    }
}

impl Waiting {
    /// The slot of a processor of this name, route and address: asked for once per processor, not per entry.
    pub fn slot(&self, values: [&str; 3]) -> Option<usize> {
        let Slots { taken, free } = &mut *lock(&self.slots);
        let key = values.map(|value| Box::from(super::custom::cut(value)));
        if let Some(known) = taken.get(&key) {
            return Some(self.number(*known));
        }
        if free.is_empty() {
            free.extend(taken.extract_if(.., |_, at| self.gives_up(*at)).map(|(_, at)| at));
        }
        let Some(at) = free.pop() else {
            self.refused.fetch_add(1, Relaxed);
            return None;
        };
        taken.insert(key, at);
        Some(self.number(at))
    }

    /// So many more, or fewer. Whether the slot is still this one's: else another is to be asked for.
    pub fn add(&self, number: usize, entries: i64) -> bool {
        let (at, owner) = (number % MAX_SLOTS, (number / MAX_SLOTS) as u64);
        let change = |now: u64| {
            let count = i64::from(now as u32).saturating_add(entries).clamp(0, i64::from(u32::MAX));
            (now >> 32 == owner).then_some(owner << 32 | count as u64)
        };
        self.counts[at].fetch_update(Relaxed, Relaxed, change).is_ok()
    }

    /// Takes the slot away from its owner when nothing waits in it.
    fn gives_up(&self, at: usize) -> bool {
        let next = |now: u64| (now as u32 == 0).then_some(((now >> 32) + 1 & 0xffff_ffff) << 32);
        self.counts[at].fetch_update(Relaxed, Relaxed, next).is_ok()
    }

    fn number(&self, at: usize) -> usize {
        (self.counts[at].load(Relaxed) >> 32) as usize * MAX_SLOTS + at
    }

    pub fn refused(&self) -> u64 {
        self.refused.load(Relaxed)
    }

    pub fn write(&self, page: &mut Page) {
        for (values, slot) in &lock(&self.slots).taken {
            let labels: Vec<_> = LABELS.into_iter().zip(values.iter().map(|value| &**value)).collect();
            let count = self.counts[*slot].load(Relaxed) as u32;
            page.gauge("batch_process_entries", "batch process remaining entries", &labels, f64::from(count));
        }
    }
}
