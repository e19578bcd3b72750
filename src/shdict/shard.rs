//! The part of a dictionary behind one lock: a hash table of indices into a slab whose entries form the list of use.

use std::collections::VecDeque;

use hashbrown::HashTable;

use super::{
    End, Millis, Mode, Pressure, Read, Refusal,
    pages::{Pages, same_size},
};

/// What nginx's entry takes beside its key and value, and an element of a list beside its bytes.
const ENTRY_BYTES: usize = 68;
const ELEMENT_BYTES: usize = 21;

/// What a list takes in its entry, whatever its elements.
const LIST_BYTES: usize = 16;

/// Entries in use that one write may evict ("tens", says the documentation): a huge value must not empty the dictionary of counters.
/// Enough for a page: at most 31, 15, 7, 3 and 1 can go of the five sizes before a page of them is empty.
pub(super) const MAX_EVICTIONS: usize = 64;

/// Expired entries looked for at the end of the list when a write makes a new entry.
const EXPIRED_PER_WRITE: usize = 2;

const NONE: u32 = u32::MAX;

/// A value in a dictionary.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Bool(bool),
    Num(f64),
    Str(Box<[u8]>),
    /// Elements are numbers and strings.
    List(VecDeque<Value>),
}

impl Value {
    /// What it takes in its entry, as nginx stores it.
    fn bytes(&self) -> usize {
        match self {
            Value::Bool(_) => 1,
            Value::Num(_) => 8,
            Value::Str(s) => s.len(),
            Value::List(_) => LIST_BYTES,
        }
    }

    /// What each of its elements takes beside the entry.
    fn elements(&self) -> impl Iterator<Item = usize> {
        let list = if let Value::List(list) = self { Some(list) } else { None };
        list.into_iter().flatten().map(element_bytes)
    }
}

struct Entry {
    hash: u64,
    key: Box<[u8]>,
    value: Value,
    flags: u32,
    /// 0: never.
    expires: Millis,
    /// Towards more recently used.
    newer: u32,
    /// Towards less recently used; in a free slot the next free one.
    older: u32,
}

/// `flush_all` marks entries with this: it is in the past for every clock that counts from 1.
const LONG_AGO: Millis = 1;

pub(super) struct Shard {
    pages: Pages,
    table: HashTable<u32>,
    slab: Vec<Entry>,
    free: u32,
    newest: u32,
    oldest: u32,
}

impl Shard {
    pub(super) fn new(capacity: usize) -> Shard {
        let (table, slab) = (HashTable::new(), Vec::new());
        Shard { pages: Pages::new(capacity), table, slab, free: NONE, newest: NONE, oldest: NONE }
    }

    pub(super) fn free(&self) -> usize {
        self.pages.free()
    }

    pub(super) fn get(&mut self, hash: u64, key: &[u8], now: Millis, want_stale: bool) -> Option<Read<'_>> {
        let at = self.find(hash, key)?;
        let stale = self.expired(at, now);
        if stale && !want_stale {
            return None;
        }
        self.touch(at);
        let entry = &self.slab[at as usize];
        Some(Read { value: &entry.value, flags: entry.flags, stale })
    }

    #[allow(clippy::too_many_arguments)]
    pub(super) fn store(
        &mut self,
        mode: Mode,
        hash: u64,
        key: &[u8],
        value: Value,
        expires: Millis,
        flags: u32,
        pressure: Pressure,
        now: Millis,
    ) -> Result<bool, Refusal> {
        let found = self.find(hash, key);
        let live = found.is_some_and(|at| !self.expired(at, now));
        match mode {
            Mode::Add if live => return Err(Refusal::Exists),
            Mode::Replace if !live => return Err(Refusal::NotFound),
            _ => {}
        }
        let Some(at) = found else {
            let forced = self.reserve(size(key, &value), pressure, now, NONE)?;
            self.insert(hash, key, value, expires, flags);
            return Ok(forced);
        };
        self.touch(at);
        let forced = self.resize(at, size(key, &value), pressure, now)?;
        let entry = &mut self.slab[at as usize];
        (entry.value, entry.expires, entry.flags) = (value, expires, flags);
        Ok(forced)
    }

    pub(super) fn delete(&mut self, hash: u64, key: &[u8]) -> bool {
        let found = self.find(hash, key);
        found.inspect(|at| self.remove(*at)).is_some()
    }

    pub(super) fn incr(
        &mut self,
        hash: u64,
        key: &[u8],
        by: f64,
        init: Option<f64>,
        init_expires: Millis,
        now: Millis,
    ) -> Result<(f64, bool), Refusal> {
        let found = self.find(hash, key);
        if let Some(at) = found.filter(|at| !self.expired(*at, now)) {
            self.touch(at);
            let Value::Num(n) = &mut self.slab[at as usize].value else { return Err(Refusal::NotANumber) };
            *n += by;
            return Ok((*n, false));
        }
        let n = init.ok_or(Refusal::NotFound)? + by;
        if let Some(at) = found {
            self.remove(at);
        }
        let forced = self.reserve(size(key, &Value::Num(n)), Pressure::Evict, now, NONE)?;
        self.insert(hash, key, Value::Num(n), init_expires, 0);
        Ok((n, forced))
    }

    pub(super) fn push(
        &mut self,
        end: End,
        hash: u64,
        key: &[u8],
        value: Value,
        now: Millis,
    ) -> Result<usize, Refusal> {
        let bytes = element_bytes(&value);
        let found = self.live(hash, key, now);
        let Some(at) = found else {
            self.delete(hash, key);
            self.push_first(hash, key, value, now)?;
            return Ok(1);
        };
        if !matches!(self.slab[at as usize].value, Value::List(_)) {
            return Err(Refusal::NotAList);
        }
        self.touch(at);
        self.reserve(bytes, Pressure::Safe, now, at)?;
        self.pages.take(bytes);
        let Value::List(list) = &mut self.slab[at as usize].value else { return Err(Refusal::NotAList) };
        match end {
            End::Left => list.push_front(value),
            End::Right => list.push_back(value),
        }
        Ok(list.len())
    }

    /// Makes a list of one element: two blocks, of which the second must find room beside the first.
    fn push_first(&mut self, hash: u64, key: &[u8], value: Value, now: Millis) -> Result<(), Refusal> {
        let list = Value::List(VecDeque::new());
        self.reserve(size(key, &list), Pressure::Safe, now, NONE)?;
        self.insert(hash, key, list, 0, 0);
        let (at, bytes) = (self.newest, element_bytes(&value));
        if let Err(e) = self.reserve(bytes, Pressure::Safe, now, at) {
            self.remove(at);
            return Err(e);
        }
        self.pages.take(bytes);
        if let Value::List(list) = &mut self.slab[at as usize].value {
            list.push_back(value);
        }
        Ok(())
    }

    pub(super) fn pop(&mut self, end: End, hash: u64, key: &[u8], now: Millis) -> Result<Option<Value>, Refusal> {
        let Some(at) = self.live(hash, key, now) else { return Ok(None) };
        let Value::List(list) = &mut self.slab[at as usize].value else { return Err(Refusal::NotAList) };
        let value = match end {
            End::Left => list.pop_front(),
            End::Right => list.pop_back(),
        };
        let empty = list.is_empty();
        if let Some(value) = &value {
            self.pages.give(element_bytes(value));
        }
        if empty {
            self.remove(at);
        } else {
            self.touch(at);
        }
        Ok(value)
    }

    pub(super) fn llen(&mut self, hash: u64, key: &[u8], now: Millis) -> Result<usize, Refusal> {
        let Some(at) = self.live(hash, key, now) else { return Ok(0) };
        self.touch(at);
        match &self.slab[at as usize].value {
            Value::List(list) => Ok(list.len()),
            _ => Err(Refusal::NotAList),
        }
    }

    pub(super) fn ttl(&mut self, hash: u64, key: &[u8], now: Millis) -> Result<Option<Millis>, Refusal> {
        let at = self.live(hash, key, now).ok_or(Refusal::NotFound)?;
        let expires = self.slab[at as usize].expires;
        Ok((expires != 0).then(|| expires - now))
    }

    pub(super) fn expire(&mut self, hash: u64, key: &[u8], expires: Millis, now: Millis) -> Result<(), Refusal> {
        let at = self.live(hash, key, now).ok_or(Refusal::NotFound)?;
        self.slab[at as usize].expires = expires;
        Ok(())
    }

    pub(super) fn flush_all(&mut self) {
        let mut at = self.newest;
        while at != NONE {
            let entry = &mut self.slab[at as usize];
            entry.expires = LONG_AGO;
            at = entry.older;
        }
    }

    pub(super) fn flush_expired(&mut self, max: usize, now: Millis) -> usize {
        let (mut at, mut freed) = (self.oldest, 0);
        while at != NONE && (max == 0 || freed < max) {
            let newer = self.slab[at as usize].newer;
            if self.expired(at, now) {
                self.remove(at);
                freed += 1;
            }
            at = newer;
        }
        freed
    }

    pub(super) fn keys(&self, max: usize, now: Millis, out: &mut Vec<Box<[u8]>>) {
        let mut at = self.newest;
        while at != NONE && (max == 0 || out.len() < max) {
            if !self.expired(at, now) {
                out.push(self.slab[at as usize].key.clone());
            }
            at = self.slab[at as usize].older;
        }
    }

    fn find(&self, hash: u64, key: &[u8]) -> Option<u32> {
        let slab = &self.slab;
        self.table.find(hash, |at| *slab[*at as usize].key == *key).copied()
    }

    fn live(&self, hash: u64, key: &[u8], now: Millis) -> Option<u32> {
        self.find(hash, key).filter(|at| !self.expired(*at, now))
    }

    fn expired(&self, at: u32, now: Millis) -> bool {
        let expires = self.slab[at as usize].expires;
        expires != 0 && expires <= now
    }

    /// Makes room for a block of `bytes`. Expired entries go first, then, if allowed, the least recently used; never `keep`.
    fn reserve(&mut self, bytes: usize, pressure: Pressure, now: Millis, keep: u32) -> Result<bool, Refusal> {
        if keep == NONE {
            self.drop_old(EXPIRED_PER_WRITE, now);
        }
        if !self.pages.could_hold(bytes) {
            return Err(Refusal::NoMemory);
        }
        let mut forced = 0;
        while !self.pages.has_room(bytes) {
            let at = self.oldest;
            if at == NONE || at == keep {
                return Err(Refusal::NoMemory);
            }
            if !self.expired(at, now) {
                if pressure == Pressure::Safe || forced == MAX_EVICTIONS {
                    return Err(Refusal::NoMemory);
                }
                forced += 1;
            }
            self.remove(at);
        }
        Ok(forced > 0)
    }

    /// Counts entry `at` as one of `new` bytes without elements, as its next value has it; on a refusal it stays what it is.
    fn resize(&mut self, at: u32, new: usize, pressure: Pressure, now: Millis) -> Result<bool, Refusal> {
        let entry = &self.slab[at as usize];
        let old = size(&entry.key, &entry.value);
        entry.value.elements().for_each(|bytes| self.pages.give(bytes));
        if same_size(old, new) {
            return Ok(false);
        }
        self.pages.give(old);
        match self.reserve(new, pressure, now, at) {
            Ok(forced) => {
                self.pages.take(new);
                Ok(forced)
            }
            Err(e) => {
                self.pages.take(old);
                self.slab[at as usize].value.elements().for_each(|bytes| self.pages.take(bytes));
                Err(e)
            }
        }
    }

    fn drop_old(&mut self, max: usize, now: Millis) {
        for _ in 0..max {
            let at = self.oldest;
            if at == NONE || !self.expired(at, now) {
                return;
            }
            self.remove(at);
        }
    }

    fn insert(&mut self, hash: u64, key: &[u8], value: Value, expires: Millis, flags: u32) {
        self.pages.take(size(key, &value));
        let entry = Entry { hash, key: key.into(), value, flags, expires, newer: NONE, older: NONE };
        let at = if self.free == NONE {
            self.slab.push(entry);
            (self.slab.len() - 1) as u32
        } else {
            let at = self.free;
            self.free = self.slab[at as usize].older;
            self.slab[at as usize] = entry;
            at
        };
        self.link(at);
        let slab = &self.slab;
        self.table.insert_unique(hash, at, |at| slab[*at as usize].hash);
    }

    fn remove(&mut self, at: u32) {
        self.unlink(at);
        let entry = &mut self.slab[at as usize];
        self.pages.give(size(&entry.key, &entry.value));
        entry.value.elements().for_each(|bytes| self.pages.give(bytes));
        (entry.key, entry.value) = (Box::default(), Value::Bool(false));
        entry.older = self.free;
        self.free = at;
        if let Ok(found) = self.table.find_entry(entry.hash, |other| *other == at) {
            found.remove();
        }
    }

    fn touch(&mut self, at: u32) {
        if self.newest != at {
            self.unlink(at);
            self.link(at);
        }
    }

    fn link(&mut self, at: u32) {
        let newest = std::mem::replace(&mut self.newest, at);
        let entry = &mut self.slab[at as usize];
        (entry.newer, entry.older) = (NONE, newest);
        match newest {
            NONE => self.oldest = at,
            _ => self.slab[newest as usize].newer = at,
        }
    }

    fn unlink(&mut self, at: u32) {
        let Entry { newer, older, .. } = self.slab[at as usize];
        match newer {
            NONE => self.newest = older,
            _ => self.slab[newer as usize].older = older,
        }
        match older {
            NONE => self.oldest = newer,
            _ => self.slab[older as usize].newer = newer,
        }
    }
}

/// Bytes of an entry, without the elements of a list.
fn size(key: &[u8], value: &Value) -> usize {
    ENTRY_BYTES + key.len() + value.bytes()
}

fn element_bytes(value: &Value) -> usize {
    ELEMENT_BYTES + value.bytes()
}
