//! What uploaded functions do: how often, how long, how well, and what they log. One record per function for the whole
//! process; workers add to it, the metrics page and the Admin API read it.
//!
//! Also judges canaries: a new revision that fails more often than it may is reported once, to whoever listens.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, LazyLock, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::sync::mpsc;

use super::{log::Level, metrics::Page};

/// Functions that are told apart. More are counted together without a name, and their lines are in error.log only: at most
/// 64 MB of kept lines, and some thirty thousand lines of metrics.
pub const MAX_RECORDS: usize = 1000;

/// Lines kept of one function: some screens, which is what somebody who looks for an error reads.
pub const MAX_LINES: usize = 500;

/// The same in bytes.
pub const MAX_LINES_BYTES: usize = 64 << 10;

/// A longer line is cut: a traceback fits.
const MAX_LINE: usize = 4 << 10;

/// Upper bounds of the histogram in milliseconds: from a function that only computes to one that waits for a slow service.
const BOUNDS: [f64; 14] =
    [1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0, 5000.0, 10_000.0, 60_000.0];

/// A canary is judged by about so many of its last calls, so that one which fails after a good week is found soon.
const WINDOW: u64 = 1000;

/// Canaries that wait to be taken back; one that finds no room is judged again at its next call.
const MAX_BACK_OUTS: usize = 256;

/// What a function was called for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    Request,
    Schedule,
}

const TRIGGERS: [(Trigger, &str); 2] = [(Trigger::Request, "request"), (Trigger::Schedule, "schedule")];

/// A line that a function has logged.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// Seconds since the epoch.
    pub time: f64,
    pub level: Level,
    pub text: Box<str>,
}

/// When a canary has failed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rule {
    /// Unique for each version of the canary in this process; grows.
    pub uid: u64,
    pub revision: u64,
    /// From 0 to 1: a higher share of failed calls is too much.
    pub max_error_rate: f64,
    /// Fewer calls than this say nothing.
    pub min_calls: u64,
}

/// A canary that has failed more often than its rule allows.
#[derive(Clone, Debug, PartialEq)]
pub struct BackOut {
    pub id: Box<str>,
    pub rule: Rule,
    pub calls: u64,
    pub errors: u64,
}

/// One function's.
#[derive(Debug, Default)]
pub struct Record {
    /// Empty: of all that are one too many, or of a dry run.
    id: Box<str>,
    counts: [Counts; 2],
    lines: Mutex<Lines>,
}

/// Each for itself: a page that is read meanwhile may have a call without its time.
#[derive(Debug, Default)]
struct Counts {
    calls: AtomicU64,
    errors: AtomicU64,
    times: [AtomicU64; BOUNDS.len() + 1],
    sum_us: AtomicU64,
}

/// How a canary does here. Its own, and not of the function's record: that may be shared by many.
#[derive(Debug)]
pub struct Trial {
    pub rule: Rule,
    /// Of late: calls in the upper half, failed ones in the lower, so that both change together.
    tally: AtomicU64,
    /// It is served no more, whatever the store says.
    over: AtomicBool,
}

#[derive(Debug, Default)]
struct Lines {
    list: VecDeque<Line>,
    bytes: usize,
}

type Records = HashMap<Box<str>, Arc<Record>>;

static RECORDS: LazyLock<Mutex<Records>> = LazyLock::new(Mutex::default);
static REST: LazyLock<Arc<Record>> = LazyLock::new(Arc::default);
static LISTENER: Mutex<Option<mpsc::Sender<BackOut>>> = Mutex::new(None);

/// The record of a function, made when it is asked for first.
pub fn record(id: &str) -> Arc<Record> {
    let mut records = lock(&RECORDS);
    if let Some(known) = records.get(id) {
        return known.clone();
    }
    if records.len() >= MAX_RECORDS {
        return REST.clone();
    }
    let made = Arc::new(Record { id: id.into(), ..Record::default() });
    records.insert(id.into(), made.clone());
    made
}

/// The same for one that has been called; `None`: it has not, since the process started.
pub fn known(id: &str) -> Option<Arc<Record>> {
    lock(&RECORDS).get(id).cloned()
}

/// Forgets the functions that `is_there` says no to.
pub fn keep(is_there: impl Fn(&str) -> bool) {
    lock(&RECORDS).retain(|id, _| is_there(id));
}

/// Canaries to be taken back come here from now on.
pub fn listen() -> mpsc::Receiver<BackOut> {
    let (sender, back_outs) = mpsc::channel(MAX_BACK_OUTS);
    *lock(&LISTENER) = Some(sender);
    back_outs
}

/// Adds what is counted to a page of metrics.
pub fn write(page: &mut Page) {
    let mut records: Vec<Arc<Record>> = lock(&RECORDS).values().cloned().collect();
    records.push(REST.clone());
    for record in records {
        for ((_, trigger), counts) in TRIGGERS.iter().zip(&record.counts) {
            let number = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
            let calls = number(&counts.calls);
            if calls == 0 {
                continue;
            }
            let times = counts.times.each_ref().map(number);
            let sum_ms = number(&counts.sum_us) as f64 / 1e3;
            let labels = [("function", &*record.id), ("trigger", *trigger)];
            page.counter("function_calls_total", "Calls of uploaded functions", &labels, calls);
            let help = "Calls of uploaded functions that failed or answered with 5xx";
            page.counter("function_errors_total", help, &labels, number(&counts.errors));
            let help = "Time of calls of uploaded functions in milliseconds";
            page.histogram_of("function_latency", help, &labels, &BOUNDS, &times, sum_ms);
        }
    }
}

impl Record {
    /// Of the function; empty where the record is not one function's.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Counts a call that has ended.
    pub fn ended(&self, trigger: Trigger, failed: bool, took: Duration) {
        let ms = took.as_secs_f64() * 1e3;
        let at = BOUNDS.iter().position(|bound| ms <= *bound).unwrap_or(BOUNDS.len());
        let counts = &self.counts[trigger as usize];
        let add = |counter: &AtomicU64, n: u64| {
            counter.fetch_add(n, Ordering::Relaxed);
        };
        add(&counts.calls, 1);
        add(&counts.errors, u64::from(failed));
        add(&counts.times[at], 1);
        add(&counts.sum_us, u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
    }

    /// Keeps a line; the oldest go when there are too many.
    pub fn log(&self, level: Level, text: &[u8]) {
        if self.is_rest() {
            return;
        }
        let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_millis()) as f64 / 1e3;
        let text: Box<str> = String::from_utf8_lossy(&text[..text.len().min(MAX_LINE)]).into();
        let mut lines = lock(&self.lines);
        lines.bytes += text.len();
        lines.list.push_back(Line { time, level, text });
        while lines.list.len() > MAX_LINES || lines.bytes > MAX_LINES_BYTES {
            let Some(oldest) = lines.list.pop_front() else { return };
            lines.bytes -= oldest.text.len();
        }
    }

    /// The newest `max` lines, oldest first, and how many are kept.
    pub fn lines(&self, max: usize) -> (Vec<Line>, usize) {
        let lines = lock(&self.lines);
        let kept = lines.list.len();
        (lines.list.iter().skip(kept.saturating_sub(max)).cloned().collect(), kept)
    }

    fn is_rest(&self) -> bool {
        std::ptr::eq(self, &**REST)
    }
}

impl Trial {
    pub fn new(rule: Rule) -> Arc<Trial> {
        Arc::new(Trial { rule, tally: AtomicU64::new(0), over: AtomicBool::new(false) })
    }

    /// Counts a call of the canary of function `id`, and reports it when it fails too often.
    pub fn tried(&self, id: &str, failed: bool) {
        let rule = &self.rule;
        let most = 2 * rule.min_calls.clamp(WINDOW / 2, u64::from(u32::MAX) / 4);
        let counted = |tally: u64| {
            let (calls, errors) = (tally >> 32, tally & u64::from(u32::MAX));
            (calls + 1, errors + u64::from(failed))
        };
        let kept = |tally: u64| {
            let (calls, errors) = counted(tally);
            let (calls, errors) = if calls >= most { (calls / 2, errors / 2) } else { (calls, errors) };
            Some((calls << 32) | errors)
        };
        let (Ok(before) | Err(before)) = self.tally.fetch_update(Ordering::Relaxed, Ordering::Relaxed, kept);
        let (calls, errors) = counted(before);
        let too_many = errors as f64 > calls as f64 * rule.max_error_rate;
        // Of the calls that end at once, one tells.
        if too_many && calls >= rule.min_calls && !self.over.swap(true, Ordering::Relaxed) {
            let told = report(BackOut { id: id.into(), rule: *rule, calls, errors });
            self.over.store(told, Ordering::Relaxed);
        }
    }

    /// Calls and failed calls of late; `None`: it was not called here.
    pub fn counts(&self) -> Option<(u64, u64)> {
        let tally = self.tally.load(Ordering::Relaxed);
        (tally > 0).then_some((tally >> 32, tally & u64::from(u32::MAX)))
    }

    /// Whether it has failed here, and is to be left alone until the store says so, too.
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }
}

/// Without a listener nothing can be done about it but to leave the canary alone.
fn report(back_out: BackOut) -> bool {
    lock(&LISTENER).as_ref().is_none_or(|listener| listener.try_send(back_out).is_ok())
}

/// Nothing in here panics half way.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(uid: u64) -> Rule {
        Rule { uid, revision: 2, max_error_rate: 0.25, min_calls: 4 }
    }

    #[test]
    fn keeps_the_newest_lines_within_both_bounds() {
        let record = Record::default();
        for n in 0..=MAX_LINES {
            record.log(Level::Notice, format!("line {n}").as_bytes());
        }
        let (lines, kept) = record.lines(2);
        let texts: Vec<&str> = lines.iter().map(|line| &*line.text).collect();
        assert_eq!((texts, kept), (vec!["line 499", "line 500"], MAX_LINES));
        for _ in 0..=MAX_LINES_BYTES / MAX_LINE {
            record.log(Level::Error, &[b'x'; 2 * MAX_LINE]);
        }
        let (lines, kept) = record.lines(usize::MAX);
        assert_eq!((kept, lines.len()), (MAX_LINES_BYTES / MAX_LINE, kept));
        assert!(lines.iter().all(|line| line.text.len() == MAX_LINE));
    }

    #[test]
    fn a_canary_is_over_when_enough_of_its_calls_have_failed() {
        let first = Trial::new(rule(1));
        assert_eq!(first.counts(), None);
        // As often as it may.
        for failed in [true, false, false, false] {
            first.tried("f", failed);
        }
        assert!(!first.is_over());
        first.tried("f", true);
        assert!(first.is_over());
        // Another version starts from nothing, and too few calls say nothing.
        let second = Trial::new(rule(2));
        for _ in 0..3 {
            second.tried("f", true);
        }
        assert_eq!((second.is_over(), second.counts()), (false, Some((3, 3))));
        second.tried("f", true);
        assert!(second.is_over());
    }

    #[test]
    fn a_canary_that_begins_to_fail_late_is_found_soon() {
        let trial = Trial::new(rule(1));
        for _ in 0..100 * WINDOW {
            trial.tried("f", false);
        }
        let failed = (1..).find(|_| {
            trial.tried("f", true);
            trial.is_over()
        });
        assert!(failed.is_some_and(|n| n < WINDOW), "{failed:?}");
    }

    #[test]
    fn a_canary_that_nobody_can_be_told_of_is_judged_again() {
        let mut back_outs = listen();
        let fail = |trial: &Arc<Trial>| (0..4).for_each(|_| trial.tried("f", true));
        let told: Vec<Arc<Trial>> = (0..MAX_BACK_OUTS).map(|_| Trial::new(rule(1))).collect();
        told.iter().for_each(fail);
        assert!(told.iter().all(|trial| trial.is_over()));
        let one_more = Trial::new(rule(1));
        fail(&one_more);
        assert!(!one_more.is_over(), "there is no room for it");
        assert_eq!(back_outs.try_recv().map(|of| (of.calls, of.errors)), Ok((4, 4)));
        one_more.tried("f", true);
        assert!(one_more.is_over());
    }

    #[test]
    fn calls_that_end_at_once_are_all_counted_and_a_failed_canary_is_told_once() {
        let record = Arc::new(Record::default());
        let trial = Trial::new(Rule { min_calls: 2000, ..rule(7) });
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for n in 0..499 {
                        record.ended(Trigger::Request, n % 2 == 0, Duration::from_micros(10));
                        trial.tried("f", n % 2 == 0);
                    }
                });
            }
        });
        assert_eq!((trial.counts(), trial.is_over()), (Some((1996, 1000)), false));
        let counts = &record.counts[0];
        let number = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        assert_eq!((number(&counts.calls), number(&counts.errors), number(&counts.sum_us)), (1996, 1000, 19_960));
    }

    #[test]
    fn calls_are_counted_by_what_they_were_for_and_how_long_they_took() {
        let record = Record::default();
        record.ended(Trigger::Request, false, Duration::from_millis(2));
        record.ended(Trigger::Request, true, Duration::from_secs(3600));
        record.ended(Trigger::Schedule, false, Duration::ZERO);
        let [request, schedule] = &record.counts;
        let number = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        assert_eq!([&request.calls, &request.errors, &schedule.calls].map(number), [2, 1, 1]);
        assert_eq!([&request.times[1], &request.times[BOUNDS.len()], &schedule.times[0]].map(number), [1, 1, 1]);
    }

    #[test]
    fn only_so_many_functions_are_told_apart() {
        for n in 0..MAX_RECORDS {
            record(&format!("f{n}"));
        }
        let one_more = record("one more");
        one_more.log(Level::Error, b"lost");
        assert!(one_more.is_rest() && one_more.lines(1).0.is_empty());
        assert!(known("one more").is_none() && known("f0").is_some());
        keep(|id| id != "f0");
        assert!(!record("one more").is_rest(), "there is room again");
        keep(|_| false);
    }
}
