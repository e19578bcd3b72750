//! A redb file of entries: what the embedded store and the last good state are kept in.
//!
//! One file, one process: a second opener is refused. A commit that returned is on the disk; a process that is
//! killed at any moment leaves the last commit. The page cache is small: the texts live in the snapshot.

use std::{
    fs,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
};

use redb::{
    Database, DatabaseError, ReadOnlyTable, ReadTransaction, ReadableDatabase, ReadableTable, ReadableTableMetadata,
    StorageError, Table, TableDefinition, WriteTransaction,
};

use super::{
    Entry,
    revisions::{Bounds, Packed, Page, Query, Revision, tag_of},
};
use crate::error::{Error, Kind, Result};

/// Pages kept in memory. The file is read once at start; after that only the pages of a change and the branches
/// above them are touched.
const CACHE_BYTES: usize = 8 << 20;

/// Key -> (create_revision, mod_revision, expiry in ms since the epoch or 0, text).
const ENTRIES: TableDefinition<&str, Row<'_>> = TableDefinition::new("entries");
/// (expiry in ms, key): what expires next stands first.
const EXPIRY: TableDefinition<(u64, &str), ()> = TableDefinition::new("expiry");
const NUMBERS: TableDefinition<&str, i64> = TableDefinition::new("numbers");
const NAMES: TableDefinition<&str, &str> = TableDefinition::new("names");

/// Number -> (tag, what a list tells of the revision), the oldest first.
const REVISIONS: TableDefinition<i64, (u32, &[u8])> = TableDefinition::new("revisions");
/// Number -> the texts of a revision that are long.
const REVISION_TEXTS: TableDefinition<i64, &[u8]> = TableDefinition::new("revision_texts");

const REVISION: &str = "revision";
/// Of all kept revisions together.
const REVISION_BYTES: &str = "revision_bytes";
const SAVED_AT_MS: &str = "saved_at_ms";
const SOURCE: &str = "source";

type Row<'a> = (i64, i64, u64, &'a str);
/// Any of redb's errors, on their way to becoming ours.
type Raw<T> = std::result::Result<T, redb::Error>;

/// An open file.
pub(super) struct Disk {
    /// `None` only when it could not be opened again after an I/O error.
    db: RwLock<Option<Database>>,
    path: PathBuf,
}

/// What the file says about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Label {
    pub revision: i64,
    /// When it was last written, in ms since the epoch; only the last good state keeps it.
    pub saved_at_ms: i64,
    /// Which source it is a copy of; only the last good state keeps it.
    pub source: String,
}

impl Disk {
    /// Opens or creates the file, readable by its owner alone: it holds keys and secrets.
    pub fn open(path: &Path) -> Result<Disk> {
        Ok(Disk { db: RwLock::new(Some(Self::open_file(path)?)), path: path.to_owned() })
    }

    fn open_file(path: &Path) -> Result<Database> {
        if let Some(dir) = path.parent() {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(dir)
                .map_err(|e| Error::config(Kind::Io).cause(e).context(format!("create {}", dir.display())))?;
        }
        let file = fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
        drop(file.map_err(|e| Error::config(Kind::Io).cause(e).context(format!("open {}", path.display())))?);
        // redb reads a damaged header with assertions: a panic here means the same as `Corrupted`.
        let opened = catch_unwind(AssertUnwindSafe(|| Self::open_checked(path)));
        match opened {
            Ok(Ok(db)) => Ok(db),
            Ok(Err(e)) => Err(open_error(path, e)),
            Err(_) => Err(damaged(path)),
        }
    }

    fn open_checked(path: &Path) -> std::result::Result<Database, DatabaseError> {
        let db = Database::builder().set_cache_size(CACHE_BYTES).create(path)?;
        Self::create_tables(&db).map_err(|e| match e {
            redb::Error::Io(e) => DatabaseError::Storage(StorageError::Io(e)),
            other => DatabaseError::Storage(StorageError::Corrupted(other.to_string())),
        })?;
        Ok(db)
    }

    /// So that a reader always finds them.
    fn create_tables(db: &Database) -> Raw<()> {
        if db.begin_read()?.open_table(REVISION_TEXTS).is_ok() {
            return Ok(());
        }
        let txn = db.begin_write()?;
        txn.open_table(ENTRIES)?;
        txn.open_table(EXPIRY)?;
        txn.open_table(NUMBERS)?;
        txn.open_table(NAMES)?;
        txn.open_table(REVISIONS)?;
        txn.open_table(REVISION_TEXTS)?;
        txn.commit()?;
        Ok(())
    }

    pub fn label(&self) -> Result<Label> {
        self.read(|txn| {
            let numbers = txn.open_table(NUMBERS)?;
            let number = |name| -> Raw<i64> { Ok(numbers.get(name)?.map_or(0, |v| v.value())) };
            let source = txn.open_table(NAMES)?.get(SOURCE)?.map_or_else(String::new, |v| v.value().to_owned());
            Ok(Label { revision: number(REVISION)?, saved_at_ms: number(SAVED_AT_MS)?, source })
        })
    }

    pub fn get(&self, key: &str) -> Result<Option<Entry>> {
        self.read(|txn| Ok(txn.open_table(ENTRIES)?.get(key)?.map(|row| entry(key, row.value()))))
    }

    /// Entries whose key starts with `prefix`, in key order, and the revision they were read at.
    pub fn list(&self, prefix: &str) -> Result<(Vec<Entry>, i64)> {
        self.read(|txn| {
            let revision = txn.open_table(NUMBERS)?.get(REVISION)?.map_or(0, |v| v.value());
            Ok((scan(&txn.open_table(ENTRIES)?, prefix)?, revision))
        })
    }

    /// When the next entry expires, in ms since the epoch.
    pub fn next_expiry(&self) -> Result<Option<u64>> {
        self.read(|txn| Ok(txn.open_table(EXPIRY)?.iter()?.next().transpose()?.map(|(k, _)| k.value().0)))
    }

    /// Kept revisions, the newest first.
    pub fn revisions(&self, query: &Query) -> Result<Page> {
        self.read(|txn| {
            let (table, texts) = (txn.open_table(REVISIONS)?, txn.open_table(REVISION_TEXTS)?);
            let only = |n: Option<i64>| n.map_or(i64::MIN..=i64::MAX, |n| n..=n);
            let wanted = query.key.as_deref().map(tag_of);
            let mut page = Page::default();
            for row in table.range(only(query.number))?.rev() {
                let (number, row) = row?;
                let (tag, head) = row.value();
                let number = number.value();
                if wanted.is_some_and(|wanted| tag != wanted && tag != 0) {
                    continue;
                }
                // Tags may be shared: whether a revision is about a key shows when its head is read.
                if let Some(key) = &query.key {
                    match Revision::decode_head(number, head) {
                        Ok(revision) if !revision.concerns(key) => continue,
                        Ok(_) => {}
                        Err(e) => return Ok(Err(e)),
                    }
                }
                if page.total >= query.skip && page.list.len() < query.take {
                    let apart = if query.heads { None } else { texts.get(number)? };
                    let read = match query.heads {
                        true => Revision::decode_head(number, head),
                        false => Revision::decode(number, head, apart.as_ref().map(|texts| texts.value())),
                    };
                    match read {
                        Ok(revision) => page.list.push(revision),
                        Err(e) => return Ok(Err(e)),
                    }
                }
                page.total += 1;
            }
            Ok(Ok(page))
        })?
    }

    fn read<T>(&self, f: impl FnOnce(&ReadTransaction) -> Raw<T>) -> Result<T> {
        self.with("read", |db| f(&db.begin_read()?))
    }

    /// Runs `f` in one transaction. When this returns, what `f` wrote is on the disk; when `f` or the disk fails,
    /// nothing of it is.
    pub fn write<T>(&self, f: impl FnOnce(&mut Draft<'_>) -> Raw<T>) -> Result<T> {
        self.with("write", |db| {
            let txn = db.begin_write()?;
            let done = f(&mut Draft::new(&txn)?)?;
            txn.commit()?;
            Ok(done)
        })
    }

    fn with<T>(&self, what: &str, f: impl FnOnce(&Database) -> Raw<T>) -> Result<T> {
        let db = self.db.read().unwrap_or_else(PoisonError::into_inner);
        let run = || match &*db {
            Some(db) => f(db),
            None => Err(redb::Error::PreviousIo),
        };
        // redb asserts what it finds in a page: a damaged one must not end the thread.
        let done = catch_unwind(AssertUnwindSafe(run));
        drop(db);
        match done {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(e)) => {
                if matches!(e, redb::Error::Io(_) | redb::Error::PreviousIo) {
                    self.reopen();
                }
                Err(self.failed(what, e))
            }
            Err(_) => {
                self.reopen();
                Err(damaged(&self.path))
            }
        }
    }

    /// After an I/O error (a full disk) redb refuses everything until the file is opened anew.
    fn reopen(&self) {
        let mut db = self.db.write().unwrap_or_else(PoisonError::into_inner);
        // Closed first: one process, one opener.
        *db = None;
        match Self::open_file(&self.path) {
            Ok(opened) => *db = Some(opened),
            Err(e) => tracing::error!("{e}"),
        }
    }

    fn failed(&self, what: &str, e: redb::Error) -> Error {
        if matches!(e, redb::Error::Corrupted(_)) {
            return damaged(&self.path).cause(e);
        }
        Error::config(Kind::Io).cause(e).context(format!("{what} {}", self.path.display()))
    }
}

/// The file inside a write transaction.
pub(super) struct Draft<'t> {
    entries: Table<'t, &'static str, Row<'static>>,
    expiry: Table<'t, (u64, &'static str), ()>,
    numbers: Table<'t, &'static str, i64>,
    names: Table<'t, &'static str, &'static str>,
    revisions: Table<'t, i64, (u32, &'static [u8])>,
    texts: Table<'t, i64, &'static [u8]>,
}

impl<'t> Draft<'t> {
    fn new(txn: &'t WriteTransaction) -> Raw<Self> {
        Ok(Draft {
            entries: txn.open_table(ENTRIES)?,
            expiry: txn.open_table(EXPIRY)?,
            numbers: txn.open_table(NUMBERS)?,
            names: txn.open_table(NAMES)?,
            revisions: txn.open_table(REVISIONS)?,
            texts: txn.open_table(REVISION_TEXTS)?,
        })
    }

    pub fn revision(&self) -> Raw<i64> {
        Ok(self.numbers.get(REVISION)?.map_or(0, |v| v.value()))
    }

    pub fn set_revision(&mut self, revision: i64) -> Raw<()> {
        self.numbers.insert(REVISION, revision)?;
        Ok(())
    }

    /// Keeps a revision, and drops the oldest ones that are too many or too much with it.
    pub fn keep(&mut self, number: i64, tag: u32, packed: &Packed, bounds: Bounds) -> Raw<()> {
        let held = self.numbers.get(REVISION_BYTES)?.map_or(0, |v| v.value());
        let mut held = u64::try_from(held).unwrap_or(0) + packed.bytes() as u64;
        self.revisions.insert(number, (tag, &*packed.head))?;
        if let Some(texts) = &packed.texts {
            self.texts.insert(number, &**texts)?;
        }
        let mut count = self.revisions.len()?;
        while bounds.exceeded(usize::try_from(count).unwrap_or(usize::MAX), held) {
            let Some((number, dropped)) = self.revisions.pop_first()? else { break };
            let texts = self.texts.remove(number.value())?.map_or(0, |texts| texts.value().len());
            held = held.saturating_sub((dropped.value().1.len() + texts) as u64);
            count -= 1;
        }
        self.numbers.insert(REVISION_BYTES, i64::try_from(held).unwrap_or(i64::MAX))?;
        Ok(())
    }

    pub fn set_origin(&mut self, source: &str, saved_at_ms: i64) -> Raw<()> {
        self.numbers.insert(SAVED_AT_MS, saved_at_ms)?;
        self.names.insert(SOURCE, source)?;
        Ok(())
    }

    pub fn get(&self, key: &str) -> Raw<Option<Entry>> {
        Ok(self.entries.get(key)?.map(|row| entry(key, row.value())))
    }

    /// `expires_ms` 0: never.
    pub fn put(&mut self, e: &Entry, expires_ms: u64) -> Raw<()> {
        let old = self
            .entries
            .insert(&*e.key, (e.create_revision, e.mod_revision, expires_ms, &*e.value))?
            .map_or(0, |row| row.value().2);
        self.reschedule(&e.key, old, expires_ms)
    }

    pub fn remove(&mut self, key: &str) -> Raw<()> {
        let old = self.entries.remove(key)?.map_or(0, |row| row.value().2);
        self.reschedule(key, old, 0)
    }

    fn reschedule(&mut self, key: &str, old_ms: u64, new_ms: u64) -> Raw<()> {
        if old_ms != 0 {
            self.expiry.remove((old_ms, key))?;
        }
        if new_ms != 0 {
            self.expiry.insert((new_ms, key), ())?;
        }
        Ok(())
    }

    /// A key that has expired by `now_ms`.
    pub fn expired(&self, now_ms: u64) -> Raw<Option<Arc<str>>> {
        let first = self.expiry.iter()?.next().transpose()?;
        Ok(first.and_then(|(k, _)| {
            let (at, key) = k.value();
            (at <= now_ms).then(|| key.into())
        }))
    }

    /// Removes every entry that `keep` does not want.
    pub fn retain(&mut self, mut keep: impl FnMut(&str) -> bool) -> Raw<()> {
        self.entries.retain(|key, _| keep(key))?;
        Ok(())
    }
}

fn scan(entries: &ReadOnlyTable<&'static str, Row<'static>>, prefix: &str) -> Raw<Vec<Entry>> {
    let mut found = Vec::new();
    for row in entries.range(prefix..)? {
        let (key, row) = row?;
        if !key.value().starts_with(prefix) {
            break;
        }
        found.push(entry(key.value(), row.value()));
    }
    Ok(found)
}

fn entry(key: &str, (create_revision, mod_revision, _, value): Row<'_>) -> Entry {
    Entry { key: key.into(), value: value.into(), create_revision, mod_revision }
}

fn open_error(path: &Path, e: DatabaseError) -> Error {
    let path_shown = path.display();
    match e {
        DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch => Error::config(Kind::Conflict)
            .context(format!(
                "{path_shown} is in use by another process: stop that one, or start this one with another prefix \
                 (-p DIR)"
            )),
        DatabaseError::Storage(StorageError::Io(e)) if e.kind() != std::io::ErrorKind::InvalidData => {
            Error::config(Kind::Io).cause(e).context(format!("open {path_shown}"))
        }
        other => damaged(path).cause(other),
    }
}

fn damaged(path: &Path) -> Error {
    let path = path.display();
    Error::config(Kind::Malformed).context(format!(
        "{path} is damaged or not a moongate data file: put a backup in its place, or move it away to start with an \
         empty configuration"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_page_is_an_error_and_never_a_panic() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.redb");
        let disk = Disk::open(&path).unwrap();
        disk.write(|draft| {
            for i in 0..2000 {
                let key = format!("/routes/{i}").into();
                let value = "x".repeat(100).into();
                draft.put(&Entry { key, value, create_revision: 1, mod_revision: 1 }, 0)?;
            }
            draft.set_revision(1)
        })
        .unwrap();
        drop(disk);
        let whole = fs::read(&path).unwrap();
        let mut refused = 0;
        // A page in every sixteen, from the header on, at once zeroed and at once all ones.
        for (n, page) in (0..whole.len() / 4096).step_by(16).chain([0, 1, 2]).enumerate() {
            let mut damaged = whole.clone();
            damaged[page * 4096..(page + 1) * 4096].fill(if n % 2 == 0 { 0 } else { 0xff });
            fs::write(&path, &damaged).unwrap();
            let read = Disk::open(&path).and_then(|disk| disk.list("/").map(|_| ()));
            if let Err(e) = read {
                refused += 1;
                assert!(e.to_string().contains(&path.display().to_string()), "{e}");
            }
        }
        assert!(refused > 0);
    }
}
