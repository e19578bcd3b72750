//! The faster of two nodes picked by chance, by a moving average of latencies that fades while a node rests.

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

use super::{Knowledge, Member};

/// After this long without news, an average counts for 1/e of what it was.
const DECAY: Duration = Duration::from_secs(10);

/// What a failed try counts as, so that a node which refuses at once does not look fast.
const FAILED: Duration = Duration::from_secs(1);

/// The averages are `Known::average`.
pub(super) struct Ewma {
    random: Cell<u64>,
}

#[derive(Clone, Copy, Default)]
pub(super) struct Average {
    secs: f64,
    at: Option<Instant>,
}

impl Ewma {
    pub fn new() -> Self {
        Ewma { random: Cell::new(0x9E37_79B9) }
    }

    pub fn pick(
        &self,
        members: &[Member],
        known: &Knowledge,
        now: Instant,
        usable: &impl Fn(usize) -> bool,
    ) -> Option<usize> {
        let count = members.len();
        let start = self.below(count);
        let mut usable = (start..count).chain(0..start).filter(|at| usable(*at));
        let first = usable.next()?;
        // The second one is any other: the next usable after a jump would favour neighbours of the sick, but only them.
        let Some(second) = usable.next() else { return Some(first) };
        let faded = |at: usize| known.of(members[at].node).average.get().faded(now);
        Some(if faded(second) < faded(first) { second } else { first })
    }

    pub fn done(&self, known: &Knowledge, node: usize, latency: Option<Duration>, now: Instant) {
        let average = &known.of(node).average;
        average.set(average.get().added(latency.unwrap_or(FAILED), now));
    }

    /// xorshift64.
    fn below(&self, n: usize) -> usize {
        let mut x = self.random.get();
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.random.set(x);
        (x % n.max(1) as u64) as usize
    }
}

impl Average {
    fn weight(&self, now: Instant) -> f64 {
        let rested = self.at.map_or(0.0, |at| now.saturating_duration_since(at).as_secs_f64());
        (-rested / DECAY.as_secs_f64()).exp()
    }

    fn faded(&self, now: Instant) -> f64 {
        self.secs * self.weight(now)
    }

    fn added(self, latency: Duration, now: Instant) -> Average {
        // The first news is all there is to know.
        let weight = if self.at.is_some() { self.weight(now) } else { 0.0 };
        // What is told late, at the end of a long answer, does not set the clock back.
        let at = self.at.map_or(now, |at| at.max(now));
        Average { secs: self.secs * weight + latency.as_secs_f64() * (1.0 - weight), at: Some(at) }
    }
}
