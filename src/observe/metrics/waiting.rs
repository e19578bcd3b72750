//! How many entries wait in batch processors: a slot for each processor's name, route and address, in all VMs.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex,
        atomic::{AtomicI64, AtomicU64, Ordering::Relaxed},
    },
};

use super::{lock, page::Page};

/// Slots there are at most: routes with a logger. Entries of further ones are not shown, which counts as an error.
pub(super) const MAX_SLOTS: usize = 4096;

const LABELS: [&str; 3] = ["name", "route_id", "server_addr"];

pub(super) struct Waiting {
    counts: Box<[AtomicI64]>,
    slots: Mutex<BTreeMap<[Box<str>; 3], usize>>,
    refused: AtomicU64,
}

impl Default for Waiting {
    fn default() -> Self {
        let counts = (0..MAX_SLOTS).map(|_| AtomicI64::new(0)).collect();
        Waiting { counts, slots: Mutex::default(), refused: AtomicU64::new(0) }
    }
}

impl Waiting {
    /// The slot of a processor of this name, route and address: asked for once per processor, not per entry.
    pub fn slot(&self, values: [&str; 3]) -> Option<usize> {
        let mut slots = lock(&self.slots);
        let key = values.map(|value| Box::from(super::custom::cut(value)));
        let next = slots.len();
        if let Some(known) = slots.get(&key) {
            return Some(*known);
        }
        if next >= MAX_SLOTS {
            self.refused.fetch_add(1, Relaxed);
            return None;
        }
        slots.insert(key, next);
        Some(next)
    }

    pub fn add(&self, slot: usize, entries: i64) {
        if let Some(count) = self.counts.get(slot) {
            count.fetch_add(entries, Relaxed);
        }
    }

    pub fn refused(&self) -> u64 {
        self.refused.load(Relaxed)
    }

    pub fn write(&self, page: &mut Page) {
        for (values, slot) in lock(&self.slots).iter() {
            let labels: Vec<_> = LABELS.into_iter().zip(values.iter().map(|value| &**value)).collect();
            let count = self.counts.get(*slot).map_or(0, |count| count.load(Relaxed)).max(0);
            page.gauge("batch_process_entries", "batch process remaining entries", &labels, count as f64);
        }
    }
}
