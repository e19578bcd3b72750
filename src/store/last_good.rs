//! The last good state on disk: what a gateway serves when it starts and its source cannot be reached.
//!
//! Valid objects only, kept up by a thread of its own that writes what changed, at most once per `WRITE_INTERVAL`.
//! Losing the last second of it costs nothing but age: the source has the truth.

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::Path,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::{
    Entry,
    builder::Journal,
    disk::{Disk, Draft},
};
use crate::error::{Kind, Result};

/// Between two writes: a burst of changes costs one, and fsync never runs hot.
const WRITE_INTERVAL: Duration = Duration::from_secs(1);

pub(super) struct LastGood {
    disk: Arc<Disk>,
    source: String,
    queue: Arc<Queue>,
    writer: Option<thread::JoinHandle<()>>,
}

/// What was found on disk.
pub(super) struct Saved {
    pub entries: Vec<Entry>,
    pub revision: i64,
    pub at: SystemTime,
}

impl LastGood {
    /// `source` says whose state it is: a copy of another source's is not served.
    pub fn open(path: &Path, source: String) -> Result<Self> {
        let disk = Arc::new(open_or_start_over(path)?);
        let queue = Arc::<Queue>::default();
        let writer = Writer { disk: disk.clone(), queue: queue.clone(), source: source.clone() };
        let thread = thread::Builder::new().name("last-good".to_owned()).spawn(move || writer.run())?;
        Ok(LastGood { disk, source, queue, writer: Some(thread) })
    }

    /// The saved state, if there is one of this source.
    pub fn load(&self) -> Result<Option<Saved>> {
        let label = self.disk.label()?;
        if label.source != self.source {
            return Ok(None);
        }
        let (entries, revision) = self.disk.list("/")?;
        let at = UNIX_EPOCH + Duration::from_millis(label.saved_at_ms.max(0) as u64);
        Ok(Some(Saved { entries, revision, at }))
    }

    /// Has the writer take these changes over; returns at once.
    pub fn save(&self, journal: Journal) {
        let mut work = self.queue.lock();
        match journal {
            Journal::Replace { entries, keep, revision } => {
                work.replace = Some((entries, keep));
                work.changes.clear();
                work.revision = Some(revision);
            }
            Journal::Changes { changes, revision } => {
                work.changes.extend(changes);
                work.revision = Some(revision);
            }
        }
        drop(work);
        self.queue.ready.notify_one();
    }
}

impl Drop for LastGood {
    fn drop(&mut self) {
        self.queue.lock().stop = true;
        self.queue.ready.notify_one();
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

/// A damaged copy is set aside: the source has what was in it.
fn open_or_start_over(path: &Path) -> Result<Disk> {
    match Disk::open(path) {
        Err(e) if e.kind() == Kind::Malformed => {
            let aside = path.with_extension("redb.damaged");
            tracing::warn!("{e}; it is only a copy: set aside as {}", aside.display());
            fs::rename(path, &aside)?;
            Disk::open(path)
        }
        opened => opened,
    }
}

/// What is yet to be written: at most one version of each key.
#[derive(Default)]
struct Queue {
    work: Mutex<Work>,
    ready: Condvar,
}

#[derive(Default)]
struct Work {
    replace: Option<(Vec<Entry>, HashSet<Arc<str>>)>,
    changes: HashMap<Arc<str>, Option<Entry>>,
    revision: Option<i64>,
    stop: bool,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Writer {
    disk: Arc<Disk>,
    queue: Arc<Queue>,
    source: String,
}

impl Writer {
    fn run(self) {
        loop {
            let waiting = self.queue.lock();
            let mut work = self
                .queue
                .ready
                .wait_while(waiting, |w| w.revision.is_none() && !w.stop)
                .unwrap_or_else(PoisonError::into_inner);
            let stop = work.stop;
            let taken = std::mem::take(&mut *work);
            work.stop = stop;
            drop(work);
            if let Some(revision) = taken.revision
                && let Err(e) = self.write(taken, revision)
            {
                tracing::error!("the last good state was not saved: {e}");
            }
            if stop {
                return;
            }
            let pause = self.queue.lock();
            let _ = self.queue.ready.wait_timeout_while(pause, WRITE_INTERVAL, |w| !w.stop);
        }
    }

    fn write(&self, work: Work, revision: i64) -> Result<()> {
        let now_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as i64);
        self.disk.write(|draft| {
            if let Some((entries, keep)) = work.replace {
                replace(draft, entries, &keep)?;
            }
            for (key, entry) in work.changes {
                match entry {
                    Some(e) => draft.put(&e, 0)?,
                    None => draft.remove(&key)?,
                }
            }
            draft.set_revision(revision)?;
            draft.set_origin(&self.source, now_ms)
        })
    }
}

/// Writes what differs only.
fn replace(draft: &mut Draft<'_>, entries: Vec<Entry>, keep: &HashSet<Arc<str>>) -> Result<(), redb::Error> {
    let wanted: HashSet<&str> = entries.iter().map(|e| &*e.key).collect();
    draft.retain(|key| wanted.contains(key) || keep.contains(key))?;
    for e in &entries {
        if draft.get(&e.key)?.as_ref() != Some(e) {
            draft.put(e, 0)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(key: &str, value: &str, revision: i64) -> Entry {
        Entry { key: key.into(), value: value.into(), create_revision: 1, mod_revision: revision }
    }

    #[test]
    fn keeps_what_was_valid_across_a_restart_and_only_for_its_own_source() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("last_good.redb");
        let good = LastGood::open(&path, "etcd a".to_owned()).unwrap();
        assert!(good.load().unwrap().is_none());
        let entries = vec![entry("/routes/1", "a", 3), entry("/routes/2", "b", 4)];
        good.save(Journal::Replace { entries, keep: HashSet::new(), revision: 7 });
        drop(good);

        let good = LastGood::open(&path, "etcd a".to_owned()).unwrap();
        let keep = HashSet::from(["/routes/2".into()]);
        good.save(Journal::Replace { entries: vec![entry("/routes/3", "c", 8)], keep, revision: 8 });
        good.save(Journal::Changes {
            changes: vec![("/routes/4".into(), Some(entry("/routes/4", "d", 9)))],
            revision: 9,
        });
        drop(good);

        let good = LastGood::open(&path, "etcd a".to_owned()).unwrap();
        let saved = good.load().unwrap().unwrap();
        let keys: Vec<_> = saved.entries.iter().map(|e| &*e.key).collect();
        assert_eq!((keys, saved.revision), (vec!["/routes/2", "/routes/3", "/routes/4"], 9));
        assert!(saved.at.elapsed().unwrap() < Duration::from_secs(60));
        drop(good);
        assert!(LastGood::open(&path, "etcd b".to_owned()).unwrap().load().unwrap().is_none());
    }

    #[test]
    fn a_damaged_copy_is_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("last_good.redb");
        fs::write(&path, "junk").unwrap();
        assert!(LastGood::open(&path, "etcd a".to_owned()).unwrap().load().unwrap().is_none());
        assert_eq!(fs::read(dir.path().join("last_good.redb.damaged")).unwrap(), b"junk");
    }
}
