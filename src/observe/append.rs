//! Appends lines to files by path, off the workers' threads: what file-logger writes.
//!
//! One thread, one bounded queue. A slow disk costs lines (counted in the error, never silently), not requests.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
    sync::{
        Arc, LazyLock, OnceLock,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread,
};

/// Lines that may wait for the disk: a second of heavy logging; about 8 MiB of typical entries.
const MAX_WAITING: usize = 8192;

/// What those lines may hold in all: an entry may have a whole body in it.
const MAX_BYTES: usize = 64 << 20;

/// Files kept open; past it all are closed and opened again on demand.
const MAX_OPEN: usize = 256;

const TOO_SLOW: &str = "the disk is too slow: too many lines are waiting";

enum Job {
    Line { path: Box<str>, text: Box<[u8]>, _held: Held },
    Reopen,
}

/// Bytes of a line that waits.
struct Held {
    bytes: usize,
    waiting: Arc<AtomicUsize>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.waiting.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

struct Queue {
    jobs: SyncSender<Job>,
    waiting: Arc<AtomicUsize>,
    max_bytes: usize,
}

impl Queue {
    fn new(max_lines: usize, max_bytes: usize) -> (Queue, Receiver<Job>) {
        let (jobs, waiting) = sync_channel(max_lines);
        (Queue { jobs, waiting: Arc::default(), max_bytes }, waiting)
    }

    fn line(&self, path: &str, text: &[u8]) -> Result<(), &'static str> {
        let held = Held { bytes: text.len(), waiting: self.waiting.clone() };
        // One line alone may be longer than that: it has nobody to wait for.
        let before = self.waiting.fetch_add(held.bytes, Ordering::Relaxed);
        if before > 0 && before + held.bytes > self.max_bytes {
            return Err(TOO_SLOW);
        }
        match self.jobs.try_send(Job::Line { path: path.into(), text: text.into(), _held: held }) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(_)) => Err(TOO_SLOW),
            Err(TrySendError::Disconnected(_)) => Err("the writer has ended"),
        }
    }
}

static WRITER: LazyLock<Option<Queue>> = LazyLock::new(|| {
    let (queue, waiting) = Queue::new(MAX_WAITING, MAX_BYTES);
    thread::Builder::new().name("append".into()).spawn(move || write_all(&waiting)).ok().map(|_| queue)
});

/// Where relative paths lead that lead nowhere in the working directory.
static PREFIX: OnceLock<PathBuf> = OnceLock::new();

/// Has paths whose directory is not below the working directory lead below `prefix`. The first call counts.
pub fn look_below(prefix: PathBuf) {
    let _ = PREFIX.set(prefix);
}

/// Queues `text` (with its newline) for the file at `path`. An error says why it was not taken.
pub fn line(path: &str, text: &[u8]) -> Result<(), &'static str> {
    WRITER.as_ref().ok_or("the writer has ended")?.line(path, text)
}

/// Closes every file, so that the next line opens what a log rotation put in its place.
pub fn reopen() {
    if let Some(queue) = &*WRITER {
        // A full queue will reach its files soon enough; rotation tools keep the old file meanwhile.
        let _ = queue.jobs.try_send(Job::Reopen);
    }
}

fn write_all(jobs: &Receiver<Job>) {
    let mut open: HashMap<Box<str>, File> = HashMap::new();
    while let Ok(job) = jobs.recv() {
        match job {
            Job::Reopen => open.clear(),
            Job::Line { path, text, .. } => {
                if let Err(e) = append(&mut open, &path, &text) {
                    tracing::error!("failed to open file: {path}, error info: {e}");
                    open.remove(&path);
                }
            }
        }
    }
}

fn append(open: &mut HashMap<Box<str>, File>, path: &str, text: &[u8]) -> std::io::Result<()> {
    if let Some(file) = open.get_mut(path) {
        return file.write_all(text);
    }
    if open.len() >= MAX_OPEN {
        open.clear();
    }
    let mut file = open_file(path, PREFIX.get().map(PathBuf::as_path))?;
    file.write_all(text)?;
    open.insert(path.into(), file);
    Ok(())
}

fn open_file(path: &str, prefix: Option<&Path>) -> std::io::Result<File> {
    let open = |path: &Path| OpenOptions::new().create(true).append(true).open(path);
    let opened = open(Path::new(path));
    match (&opened, prefix) {
        (Err(e), Some(prefix)) if e.kind() == ErrorKind::NotFound => open(&prefix.join(path)).or(opened),
        _ => opened,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_working_directory_does_not_have_is_below_the_prefix() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("no-such-logs")).unwrap();
        open_file("no-such-logs/a", Some(dir.path())).unwrap();
        assert!(dir.path().join("no-such-logs/a").exists());
        for (path, prefix) in
            [("no-such-logs/a", None), ("no-such/a", Some(dir.path())), ("/no-such/a", Some(dir.path()))]
        {
            assert_eq!(open_file(path, prefix).unwrap_err().kind(), ErrorKind::NotFound, "{path}");
        }
    }

    #[test]
    fn lines_that_wait_are_bounded_in_number_and_bytes() {
        let (queue, waiting) = Queue::new(2, 10);
        let next = || waiting.try_recv().map(|job| matches!(job, Job::Line { .. }));
        queue.line("a", b"1").unwrap();
        queue.line("a", b"2").unwrap();
        assert_eq!(queue.line("a", b"3"), Err("the disk is too slow: too many lines are waiting"));
        assert_eq!(next(), Ok(true));
        queue.line("a", b"123456789").unwrap();
        assert_eq!((next(), next()), (Ok(true), Ok(true)));
        queue.line("a", b"123456789").unwrap();
        assert_eq!(queue.line("a", b"12"), Err("the disk is too slow: too many lines are waiting"));
        queue.line("a", b"1").unwrap();
        assert_eq!((next(), next()), (Ok(true), Ok(true)));
        queue.line("a", &[b'x'; 100]).expect("it alone may be longer");
        assert_eq!(queue.waiting.load(Ordering::Relaxed), 100);
        drop(waiting);
        assert_eq!(queue.waiting.load(Ordering::Relaxed), 0);
        assert_eq!(queue.line("a", b"1"), Err("the writer has ended"));
    }

    #[test]
    fn files_kept_open_are_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = |i: usize| dir.path().join(i.to_string()).to_str().unwrap().to_owned();
        let mut open = HashMap::new();
        for i in 0..MAX_OPEN {
            append(&mut open, &path(i), b"one\n").unwrap();
        }
        append(&mut open, &path(0), b"two\n").unwrap();
        assert_eq!(open.len(), MAX_OPEN);
        append(&mut open, &path(MAX_OPEN), b"one\n").unwrap();
        assert_eq!(open.len(), 1);
        append(&mut open, &path(0), b"three\n").unwrap();
        assert_eq!(std::fs::read_to_string(path(0)).unwrap(), "one\ntwo\nthree\n");
    }
}
