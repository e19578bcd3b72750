//! Lines of error.log that scripts may read: `lua_capture_error_log`, `ngx.errlog`.
//!
//! One buffer for the process. It never grows past its size: when it is full, a new line takes the place of the oldest.

use std::{
    collections::VecDeque,
    mem,
    sync::{
        Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use super::log::Level;

/// What a line costs beside its text.
const OVERHEAD: usize = mem::size_of::<Line>();

/// A line as error.log has it, without its newline.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    pub level: Level,
    /// Seconds since the epoch.
    pub time: f64,
    pub text: Vec<u8>,
}

struct Buffer {
    size: usize,
    /// The least severe that is kept.
    level: AtomicU8,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    lines: VecDeque<Line>,
    bytes: usize,
}

static BUFFER: OnceLock<Buffer> = OnceLock::new();

/// Keeps lines from now on, in so many bytes. The first call counts.
pub fn start(size: usize) {
    BUFFER.get_or_init(|| Buffer::new(size));
}

/// The least severe that is kept from now on; false without a buffer.
pub fn set_level(level: Level) -> bool {
    BUFFER.get().map(|buffer| buffer.level.store(level as u8, Ordering::Relaxed)).is_some()
}

/// Takes the oldest lines out, `max` at most (0: all); `None` without a buffer.
pub fn take(max: usize) -> Option<Vec<Line>> {
    BUFFER.get().map(|buffer| buffer.take(max))
}

/// Keeps a line, if there is a buffer and the line is severe enough.
pub(super) fn keep(level: Level, text: &[u8]) {
    if let Some(buffer) = BUFFER.get() {
        buffer.keep(level, text);
    }
}

impl Buffer {
    fn new(size: usize) -> Buffer {
        Buffer { size, level: AtomicU8::new(Level::Debug as u8), kept: Mutex::default() }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        // Nothing in here panics half way.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(&self, level: Level, text: &[u8]) {
        if level as u8 > self.level.load(Ordering::Relaxed) {
            return;
        }
        let text = text.strip_suffix(b"\n").unwrap_or(text);
        let text = text[..text.len().min(self.size.saturating_sub(OVERHEAD))].to_vec();
        let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_millis()) as f64 / 1e3;
        let mut kept = self.kept();
        kept.bytes += text.len() + OVERHEAD;
        kept.lines.push_back(Line { level, time, text });
        while kept.bytes > self.size
            && let Some(oldest) = kept.lines.pop_front()
        {
            kept.bytes -= oldest.text.len() + OVERHEAD;
        }
    }

    fn take(&self, max: usize) -> Vec<Line> {
        let mut kept = self.kept();
        let n = if max == 0 { kept.lines.len() } else { max.min(kept.lines.len()) };
        let taken: Vec<Line> = kept.lines.drain(..n).collect();
        kept.bytes -= taken.iter().map(|line| line.text.len() + OVERHEAD).sum::<usize>();
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(lines: &[Line]) -> Vec<String> {
        lines.iter().map(|line| String::from_utf8_lossy(&line.text).into_owned()).collect()
    }

    #[test]
    fn gives_each_line_once_oldest_first() {
        let buffer = Buffer::new(4096);
        for (level, text) in [(Level::Error, "one\n"), (Level::Info, "two"), (Level::Warn, "three\n")] {
            buffer.keep(level, text.as_bytes());
        }
        let first = buffer.take(1);
        assert_eq!((texts(&first), first[0].level), (vec!["one".to_owned()], Level::Error));
        assert!(first[0].time > 1e9);
        assert_eq!(texts(&buffer.take(0)), ["two", "three"]);
        assert!(buffer.take(0).is_empty() && buffer.kept().bytes == 0);
    }

    #[test]
    fn keeps_what_is_severe_enough_and_fits() {
        let buffer = Buffer::new(2 * (OVERHEAD + 10));
        buffer.level.store(Level::Warn as u8, Ordering::Relaxed);
        buffer.keep(Level::Notice, b"no");
        for n in 0..5 {
            buffer.keep(Level::Warn, format!("line {n}.....").as_bytes());
        }
        assert_eq!(texts(&buffer.take(0)), ["line 4....."], "two of eleven bytes do not fit");
        buffer.keep(Level::Warn, &[b'x'; 4096]);
        let cut = buffer.take(0);
        assert_eq!(cut[0].text.len(), OVERHEAD + 20, "a longer one is cut");
    }
}
