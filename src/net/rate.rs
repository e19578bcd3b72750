//! `$limit_rate`: when how much of a response may leave. One per request, as nginx documents it (`limit_rate`,
//! `limit_rate_after` in ngx_http_core_module).

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::time::{Instant, Sleep, sleep_until};

/// What leaves at once is as much as the rate lets pass in this time: short enough that a client sees a stream, long enough
/// that timers, which are up to a millisecond late, do not matter.
const PIECE: Duration = Duration::from_millis(100);

/// The rate of the response that is under way. Nearly all have none, which is a flag to look at.
#[derive(Default)]
pub(super) struct Rate {
    limited: bool,
    /// Kept from one request to the next once it was needed.
    limiter: Option<Box<Limiter>>,
}

struct Limiter {
    pace: Pace,
    sleep: Pin<Box<Sleep>>,
}

impl Rate {
    pub fn is_limited(&self) -> bool {
        self.limited
    }

    /// A new response begins.
    pub fn lift(&mut self) {
        self.limited = false;
    }

    /// From now on `rate` bytes per second, after `free` bytes more; 0: no limit.
    pub fn set(&mut self, rate: u64, free: u64) {
        let goes_on = std::mem::replace(&mut self.limited, rate != 0);
        if rate == 0 {
            return;
        }
        let now = Instant::now();
        let next = self.limiter.as_ref().filter(|_| goes_on).map_or(now, |l| l.pace.next);
        let pace = Pace { rate, free, next };
        match &mut self.limiter {
            Some(limiter) => limiter.pace = pace,
            none => *none = Some(Box::new(Limiter { pace, sleep: Box::pin(sleep_until(now)) })),
        }
    }

    /// How many of `len` bytes may leave, as soon as any may: at least one of them.
    pub fn poll(&mut self, cx: &mut Context<'_>, len: usize) -> Poll<usize> {
        let Some(Limiter { pace, sleep }) = self.limiter.as_deref_mut().filter(|_| self.limited) else {
            return Poll::Ready(len);
        };
        loop {
            match pace.allowed(Instant::now()) {
                Ok(most) => return Poll::Ready(len.min(usize::try_from(most).unwrap_or(usize::MAX))),
                Err(next) => sleep.as_mut().reset(next),
            }
            ready!(sleep.as_mut().poll(cx));
        }
    }

    /// So many have left.
    pub fn spend(&mut self, n: usize) {
        if let Some(limiter) = &mut self.limiter {
            limiter.pace.spend(Instant::now(), n as u64);
        }
    }
}

/// How fast bytes may leave. Pure: it is told the time.
struct Pace {
    /// Bytes per second, never 0.
    rate: u64,
    /// Bytes that go before the rate holds.
    free: u64,
    /// What has left would have taken until then: nothing leaves before.
    next: Instant,
}

impl Pace {
    /// How many bytes may leave now, or when some may.
    fn allowed(&self, now: Instant) -> Result<u64, Instant> {
        match self.free {
            0 if now < self.next => Err(self.next),
            0 => Ok((self.rate / (Duration::from_secs(1).as_millis() / PIECE.as_millis()) as u64).max(1)),
            free => Ok(free),
        }
    }

    fn spend(&mut self, now: Instant, n: u64) {
        let free = self.free.min(n);
        self.free -= free;
        if n == free {
            return;
        }
        // Time in which nothing was there to send is not made up for, but for what a late timer has cost.
        let next = now.checked_sub(PIECE).map_or(self.next, |earliest| earliest.max(self.next));
        let nanos = u128::from(n - free) * Duration::from_secs(1).as_nanos() / u128::from(self.rate);
        let taken = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        self.next = next.checked_add(taken).unwrap_or(next);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends `len` bytes with timers that are always `late`: the largest piece, and the time at the end.
    fn send(pace: &mut Pace, mut now: Instant, mut len: u64, late: Duration) -> (u64, Instant) {
        let mut largest = 0;
        while len > 0 {
            match pace.allowed(now) {
                Ok(most) => {
                    assert!(most > 0);
                    largest = largest.max(most.min(len));
                    pace.spend(now, most.min(len));
                    len -= most.min(len);
                }
                Err(next) => now = next + late,
            }
        }
        (largest, now)
    }

    #[test]
    fn bytes_leave_as_fast_as_they_may_and_no_faster() {
        let begun = Instant::now();
        for (rate, len, late, piece, from_ms, to_ms) in [
            (1000, 3000, 0, 100, 2900, 2900),
            (1000, 3000, 5, 100, 2900, 2905),
            (1000, 3000, 150, 100, 2900, 4400),
            (1 << 20, 1_000_000, 1, 104_857, 900, 901),
            (3, 4, 0, 1, 999, 1000),
            (1, 2, 0, 1, 1000, 1000),
        ] {
            let mut pace = Pace { rate, free: 0, next: begun };
            let (largest, ended) = send(&mut pace, begun, len, Duration::from_millis(late));
            let taken = (ended - begun).as_millis();
            assert!(largest == piece && (from_ms..=to_ms).contains(&taken), "{rate} {late}: {largest} {taken}");
        }
    }

    #[test]
    fn the_first_bytes_are_free_and_idle_time_is_not_saved_up() {
        let begun = Instant::now();
        let mut pace = Pace { rate: 1000, free: 5000, next: begun };
        assert_eq!(send(&mut pace, begun, 5000, Duration::ZERO), (5000, begun));
        let idle = begun + Duration::from_secs(60);
        let (largest, ended) = send(&mut pace, idle, 1000, Duration::ZERO);
        assert!(largest == 100 && (800..=900).contains(&(ended - idle).as_millis()), "{:?}", ended - idle);
    }

    #[test]
    fn the_ends_of_the_numbers_are_kept() {
        let now = Instant::now();
        let mut pace = Pace { rate: u64::MAX, free: u64::MAX, next: now };
        assert_eq!(pace.allowed(now), Ok(u64::MAX));
        pace.spend(now, u64::MAX);
        assert_eq!(pace.allowed(now), Ok(u64::MAX / 10));
        pace.rate = 1;
        pace.spend(now, u64::MAX);
        assert!(pace.allowed(now).is_err());
        pace.spend(now, u64::MAX);
    }
}
