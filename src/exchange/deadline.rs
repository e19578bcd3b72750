//! Time limits of waits on a worker, made for one per connection and a new limit per request.
//!
//! Setting a limit is a store into a slot; a single task per worker looks at all slots every `TICK` and wakes the
//! tasks whose time is up. A tokio timer per request costs 3-4 % of the request instead. The price is that a limit
//! is late by up to one `TICK`, and that is all it may be used for: bounds on waits, not schedules.

use std::{
    cell::RefCell,
    task::{Context, Waker},
    time::Duration,
};

use slab::Slab;

/// How late a limit may be noticed: small beside any timeout in use, large beside a scan of 10,000 slots (20 us).
const TICK: Duration = Duration::from_millis(50);

#[derive(Default)]
struct Timers {
    slots: Slab<Slot>,
    ticking: bool,
}

struct Slot {
    /// By `now_ms`; `NEVER`: no limit is set.
    at: u64,
    waker: Option<Waker>,
}

impl Slot {
    fn wakes(&mut self, cx: &Context<'_>) {
        match &mut self.waker {
            Some(w) => w.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
    }
}

const NEVER: u64 = u64::MAX;

/// Milliseconds of the coarse monotonic clock: it moves every 1 to 10 ms and costs a quarter of the exact one.
fn now_ms() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid timespec to write to. The clock exists on every Linux; were it to fail, time would stand
    // still and no limit would expire.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &mut now) };
    now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000
}

/// What the coarse clock may be behind.
const COARSE_MS: u64 = 10;

thread_local! {
    static TIMERS: RefCell<Timers> = RefCell::default();
}

/// One time limit, set anew for each wait. Belongs to the thread that made it.
#[derive(Debug)]
pub struct Deadline {
    slot: usize,
    /// Slots are the thread's own.
    _local: std::marker::PhantomData<*const ()>,
}

impl Deadline {
    /// Needs a `LocalSet` or `LocalRuntime` around it: the first one on a thread starts the tick.
    pub fn new() -> Self {
        let (slot, start) = TIMERS.with_borrow_mut(|t| {
            let start = !std::mem::replace(&mut t.ticking, true);
            (t.slots.insert(Slot { at: NEVER, waker: None }), start)
        });
        if start {
            tokio::task::spawn_local(tick());
        }
        Deadline { slot, _local: std::marker::PhantomData }
    }

    /// Time is up after `limit` from now, and the task is woken then; replaces what was set.
    pub fn start(&self, limit: Duration, cx: &Context<'_>) {
        let limit = u64::try_from(limit.as_millis()).unwrap_or(NEVER);
        let at = now_ms().saturating_add(limit).saturating_add(COARSE_MS);
        TIMERS.with_borrow_mut(|t| {
            let slot = &mut t.slots[self.slot];
            slot.at = at;
            slot.wakes(cx);
        })
    }

    /// No limit.
    pub fn clear(&self) {
        TIMERS.with_borrow_mut(|t| t.slots[self.slot].at = NEVER)
    }

    /// Whether time is up; if not, the task is woken when it is, and by `wake_all`.
    pub fn poll_expired(&self, cx: &Context<'_>) -> bool {
        TIMERS.with_borrow_mut(|t| {
            let slot = &mut t.slots[self.slot];
            if slot.at != NEVER && slot.at <= now_ms() {
                return true;
            }
            slot.wakes(cx);
            false
        })
    }
}

impl Default for Deadline {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Deadline {
    fn drop(&mut self) {
        // A thread that is ending may have lost its slots already.
        let _ = TIMERS.try_with(|t| {
            if let Ok(mut t) = t.try_borrow_mut() {
                t.slots.try_remove(self.slot);
            }
        });
    }
}

/// Wakes every task of this thread that waits with a limit, so that it looks at what changed (a drain that began).
pub fn wake_all() {
    let wakers: Vec<Waker> =
        TIMERS.with_borrow(|t| t.slots.iter().filter_map(|(_, slot)| slot.waker.clone()).collect());
    wakers.into_iter().for_each(Waker::wake);
}

/// Ends when nothing is left to watch, so that an idle thread sleeps.
async fn tick() {
    let mut interval = tokio::time::interval(TICK);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut due = Vec::new();
    loop {
        interval.tick().await;
        let goes_on = TIMERS.with_borrow_mut(|t| {
            let now = now_ms();
            due.extend(t.slots.iter_mut().filter(|(_, s)| s.at <= now).filter_map(|(_, s)| s.waker.take()));
            t.ticking = !t.slots.is_empty();
            t.ticking
        });
        due.drain(..).for_each(Waker::wake);
        if !goes_on {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, task::Poll, time::Instant};

    use super::*;

    fn local(f: impl Future<Output = ()>) {
        let rt = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        tokio::task::LocalSet::new().block_on(&rt, f);
    }

    async fn start(d: &Deadline, ms: u64) {
        poll_fn(|cx| {
            d.start(Duration::from_millis(ms), cx);
            Poll::Ready(())
        })
        .await
    }

    async fn expired(d: &Deadline) {
        poll_fn(|cx| if d.poll_expired(cx) { Poll::Ready(()) } else { Poll::Pending }).await
    }

    #[test]
    fn expires_after_its_limit_and_not_before() {
        local(async {
            let (d, begun) = (Deadline::new(), Instant::now());
            start(&d, 120).await;
            expired(&d).await;
            assert!(begun.elapsed() >= Duration::from_millis(120));
            start(&d, 60_000).await;
            assert!(poll_fn(|cx| Poll::Ready(!d.poll_expired(cx))).await);
            d.clear();
            assert!(poll_fn(|cx| Poll::Ready(!d.poll_expired(cx))).await);
        });
    }

    #[test]
    fn starts_again_after_all_were_dropped() {
        local(async {
            for _ in 0..2 {
                let d = Deadline::new();
                start(&d, 0).await;
                expired(&d).await;
                drop(d);
                while TIMERS.with_borrow(|t| t.ticking) {
                    tokio::task::yield_now().await;
                }
            }
        });
    }
}
