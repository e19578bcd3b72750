//! Appends lines to files by path, off the workers' threads: what file-logger writes.
//!
//! One thread, one bounded queue. A slow disk costs lines (counted in the error, never silently), not requests.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io::Write,
    sync::{
        LazyLock,
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread,
};

/// Lines that may wait for the disk: a second of heavy logging; about 8 MiB of typical entries.
const MAX_WAITING: usize = 8192;

/// Files kept open; past it all are closed and opened again on demand.
const MAX_OPEN: usize = 256;

enum Job {
    Line { path: Box<str>, text: Box<[u8]> },
    Reopen,
}

static WRITER: LazyLock<Option<SyncSender<Job>>> = LazyLock::new(|| {
    let (jobs, waiting) = sync_channel(MAX_WAITING);
    thread::Builder::new().name("append".into()).spawn(move || write_all(&waiting)).ok().map(|_| jobs)
});

/// Queues `text` (with its newline) for the file at `path`. An error says why it was not taken.
pub fn line(path: &str, text: &[u8]) -> Result<(), &'static str> {
    match send(Job::Line { path: path.into(), text: text.into() }) {
        Ok(()) => Ok(()),
        Err(TrySendError::Full(_)) => Err("the disk is too slow: too many lines are waiting"),
        Err(TrySendError::Disconnected(_)) => Err("the writer has ended"),
    }
}

/// Closes every file, so that the next line opens what a log rotation put in its place.
pub fn reopen() {
    // A full queue will reach its files soon enough; rotation tools keep the old file meanwhile.
    let _ = send(Job::Reopen);
}

fn send(job: Job) -> Result<(), TrySendError<Job>> {
    match &*WRITER {
        Some(jobs) => jobs.try_send(job),
        None => Err(TrySendError::Disconnected(job)),
    }
}

fn write_all(jobs: &Receiver<Job>) {
    let mut open: HashMap<Box<str>, File> = HashMap::new();
    while let Ok(job) = jobs.recv() {
        match job {
            Job::Reopen => open.clear(),
            Job::Line { path, text } => {
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
    let mut file = OpenOptions::new().create(true).append(true).open(path)?;
    file.write_all(text)?;
    open.insert(path.into(), file);
    Ok(())
}
