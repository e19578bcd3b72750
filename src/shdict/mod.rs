//! `ngx.shared`: named dictionaries that all VMs of the process share.
//!
//! A dictionary is bounded by bytes; when it is full the least recently used entries go. Every operation takes the
//! time as an argument (`now`, milliseconds), so that tests and simulations decide what has expired. One lock per shard, held
//! for the operation alone; small dictionaries have one shard, so that their order of eviction is exact.

mod pages;
mod shard;

use std::{
    collections::HashMap,
    hash::BuildHasher,
    sync::{Mutex, MutexGuard, OnceLock, PoisonError, RwLock},
};

use shard::Shard;
pub use shard::Value;

/// Milliseconds on whatever clock the caller uses; only differences matter.
pub type Millis = u64;

/// Smallest piece of a dictionary worth its own lock: splitting smaller ones would refuse values that fit the whole.
const SHARD_BYTES: usize = 4 << 20;

/// More locks than this do not lessen contention among as many threads as a machine has cores for a gateway.
const MAX_SHARDS: usize = 16;

/// Longest key, as in nginx (its length is kept in 16 bits there).
pub const MAX_KEY: usize = 65535;

/// Why an operation was not done. `text` is what Lua sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    NotFound,
    Exists,
    NoMemory,
    NotANumber,
    NotAList,
    IsAList,
}

impl Refusal {
    pub fn text(self) -> &'static str {
        match self {
            Refusal::NotFound => "not found",
            Refusal::Exists => "exists",
            Refusal::NoMemory => "no memory",
            Refusal::NotANumber => "not a number",
            Refusal::NotAList => "value not a list",
            Refusal::IsAList => "value is a list",
        }
    }
}

/// How a value is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Set,
    Add,
    Replace,
}

/// Which end of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Left,
    Right,
}

/// What a write may do to others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pressure {
    /// Entries in use may be evicted.
    Evict,
    /// `safe_set`, `safe_add`: refuse with "no memory" instead.
    Safe,
}

/// A value as read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Read<'a> {
    pub value: &'a Value,
    pub flags: u32,
    /// It had expired (`get_stale`).
    pub stale: bool,
}

/// One dictionary.
pub struct Dict {
    name: Box<str>,
    capacity: usize,
    hasher: hashbrown::DefaultHashBuilder,
    shards: Box<[Mutex<Shard>]>,
}

impl Dict {
    pub fn new(name: &str, capacity: usize) -> Dict {
        let count = (capacity / SHARD_BYTES).clamp(1, MAX_SHARDS);
        let count = if count.is_power_of_two() { count } else { count.next_power_of_two() / 2 };
        let shards = (0..count).map(|_| Mutex::new(Shard::new(capacity / count))).collect();
        Dict { name: name.into(), capacity, hasher: Default::default(), shards }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes that the dictionary was declared with.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Bytes of pages that no entry is in.
    pub fn free_space(&self) -> usize {
        self.shards.iter().map(|s| lock(s).free()).sum()
    }

    /// Reads `key` under the lock: `f` gets `None` when there is none, or when it expired and `stale` is not asked for.
    pub fn get<R>(&self, key: &[u8], now: Millis, stale: bool, f: impl FnOnce(Option<Read<'_>>) -> R) -> R {
        let (hash, mut shard) = self.shard(key);
        f(shard.get(hash, key, now, stale))
    }

    /// Stores `value`; `ttl` 0 means for ever. `Ok(true)`: entries in use had to go for it.
    #[allow(clippy::too_many_arguments)]
    pub fn store(
        &self,
        mode: Mode,
        key: &[u8],
        value: Value,
        ttl: Millis,
        flags: u32,
        pressure: Pressure,
        now: Millis,
    ) -> Result<bool, Refusal> {
        let (hash, mut shard) = self.shard(key);
        shard.store(mode, hash, key, value, expiry(ttl, now), flags, pressure, now)
    }

    /// Removes `key`; says whether it was there.
    pub fn delete(&self, key: &[u8]) -> bool {
        let (hash, mut shard) = self.shard(key);
        shard.delete(hash, key)
    }

    /// Adds `by` to a number. An absent or expired key starts at `init` (with `init_ttl`) when that is given. The new
    /// number, and whether entries in use had to go.
    pub fn incr(
        &self,
        key: &[u8],
        by: f64,
        init: Option<f64>,
        init_ttl: Millis,
        now: Millis,
    ) -> Result<(f64, bool), Refusal> {
        let (hash, mut shard) = self.shard(key);
        shard.incr(hash, key, by, init, expiry(init_ttl, now), now)
    }

    /// Pushes onto a list, making it; the new length. Never evicts, as in nginx.
    pub fn push(&self, end: End, key: &[u8], value: Value, now: Millis) -> Result<usize, Refusal> {
        let (hash, mut shard) = self.shard(key);
        shard.push(end, hash, key, value, now)
    }

    /// Takes an element off a list; `None` when there is no list. The last one taken removes the key.
    pub fn pop(&self, end: End, key: &[u8], now: Millis) -> Result<Option<Value>, Refusal> {
        let (hash, mut shard) = self.shard(key);
        shard.pop(end, hash, key, now)
    }

    /// Elements of a list, 0 when there is none.
    pub fn llen(&self, key: &[u8], now: Millis) -> Result<usize, Refusal> {
        let (hash, mut shard) = self.shard(key);
        shard.llen(hash, key, now)
    }

    /// Milliseconds left; `None` inside when the key never expires. Expired keys are not found.
    pub fn ttl(&self, key: &[u8], now: Millis) -> Result<Option<Millis>, Refusal> {
        let (hash, mut shard) = self.shard(key);
        shard.ttl(hash, key, now)
    }

    /// Gives `key` a new lifetime; 0 means for ever.
    pub fn expire(&self, key: &[u8], ttl: Millis, now: Millis) -> Result<(), Refusal> {
        let (hash, mut shard) = self.shard(key);
        shard.expire(hash, key, expiry(ttl, now), now)
    }

    /// Marks everything expired; memory is freed as entries are replaced or `flush_expired`.
    pub fn flush_all(&self) {
        for shard in &self.shards {
            lock(shard).flush_all();
        }
    }

    /// Frees at most `max` expired entries (0: all); how many.
    pub fn flush_expired(&self, max: usize, now: Millis) -> usize {
        let mut freed = 0;
        for shard in &self.shards {
            if max != 0 && freed >= max {
                break;
            }
            freed += lock(shard).flush_expired(if max == 0 { 0 } else { max - freed }, now);
        }
        freed
    }

    /// Keys in use, most recently used first, at most `max` (0: all).
    pub fn keys(&self, max: usize, now: Millis) -> Vec<Box<[u8]>> {
        let mut out = Vec::new();
        for shard in &self.shards {
            if max != 0 && out.len() >= max {
                break;
            }
            lock(shard).keys(max, now, &mut out);
        }
        out
    }

    fn shard(&self, key: &[u8]) -> (u64, MutexGuard<'_, Shard>) {
        let hash = self.hasher.hash_one(key);
        // The table inside uses the low and the top seven bits; these are others.
        let at = (hash >> 32) as usize & (self.shards.len() - 1);
        (hash, lock(&self.shards[at]))
    }
}

/// A thread that panicked inside left the shard between two whole operations at worst with a wrong byte count, so
/// its data stays in use.
fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

fn expiry(ttl: Millis, now: Millis) -> Millis {
    if ttl == 0 { 0 } else { now.saturating_add(ttl).max(1) }
}

/// The dictionaries of this process by name.
#[derive(Default)]
pub struct Store {
    dicts: RwLock<HashMap<Box<str>, &'static Dict>>,
}

impl Store {
    /// Declares a dictionary. One that exists stays as it is: its entries outlive a change of the configuration.
    /// Dictionaries live as long as the process, because VMs hold plain pointers to them.
    pub fn declare(&self, name: &str, capacity: usize) -> &'static Dict {
        let mut dicts = self.dicts.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(dict) = dicts.get(name) {
            return dict;
        }
        let dict: &'static Dict = Box::leak(Box::new(Dict::new(name, capacity)));
        dicts.insert(name.into(), dict);
        dict
    }

    pub fn get(&self, name: &str) -> Option<&'static Dict> {
        self.dicts.read().unwrap_or_else(PoisonError::into_inner).get(name).copied()
    }

    /// All of them, by name.
    pub fn all(&self) -> Vec<&'static Dict> {
        let mut all: Vec<_> = self.dicts.read().unwrap_or_else(PoisonError::into_inner).values().copied().collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }
}

/// The process's dictionaries.
pub fn store() -> &'static Store {
    static STORE: OnceLock<Store> = OnceLock::new();
    STORE.get_or_init(Store::default)
}

/// Parses nginx's sizes: `10m`, `512k`, `1g`, `4096`.
pub fn parse_size(text: &str) -> Option<usize> {
    let text = text.trim();
    let (digits, unit) = match text.as_bytes().last()? {
        b'k' | b'K' => (&text[..text.len() - 1], 1 << 10),
        b'm' | b'M' => (&text[..text.len() - 1], 1 << 20),
        b'g' | b'G' => (&text[..text.len() - 1], 1 << 30),
        _ => (text, 1),
    };
    digits.parse::<usize>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dict() -> Dict {
        Dict::new("d", 64 << 10)
    }

    fn text(s: &str) -> Value {
        Value::Str(s.as_bytes().into())
    }

    fn set(d: &Dict, key: &str, value: Value, ttl: Millis, now: Millis) -> Result<bool, Refusal> {
        d.store(Mode::Set, key.as_bytes(), value, ttl, 0, Pressure::Evict, now)
    }

    fn get(d: &Dict, key: &str, now: Millis) -> Option<Value> {
        d.get(key.as_bytes(), now, false, |r| r.map(|r| r.value.clone()))
    }

    #[test]
    fn keeps_each_type_and_the_flags() {
        let d = dict();
        for (key, value) in [("s", text("x")), ("n", Value::Num(1.5)), ("b", Value::Bool(true)), ("e", text(""))] {
            d.store(Mode::Set, key.as_bytes(), value.clone(), 0, 7, Pressure::Evict, 1).unwrap();
            assert!(d.get(key.as_bytes(), 1, false, |r| r.is_some_and(|r| *r.value == value && r.flags == 7)), "{key}");
        }
        assert!(d.delete(b"s"));
        assert!(!d.delete(b"s"));
        assert_eq!(get(&d, "s", 1), None);
    }

    #[test]
    fn expires_to_the_millisecond_and_keeps_the_stale() {
        let d = dict();
        set(&d, "k", text("v"), 10, 1000).unwrap();
        assert!(get(&d, "k", 1009).is_some());
        assert_eq!(get(&d, "k", 1010), None);
        assert_eq!(d.get(b"k", 1010, true, |r| r.map(|r| r.stale)), Some(true));
        assert_eq!(d.ttl(b"k", 1004), Ok(Some(6)));
        assert_eq!(d.ttl(b"k", 1010), Err(Refusal::NotFound));
        assert_eq!(d.expire(b"k", 0, 1010), Err(Refusal::NotFound));
        d.expire(b"k", 0, 1009).unwrap();
        assert_eq!(d.ttl(b"k", 9999), Ok(None));
    }

    #[test]
    fn add_and_replace_look_at_what_is_there() {
        let d = dict();
        let put = |mode, now| d.store(mode, b"k", text("v"), 5, 0, Pressure::Evict, now);
        assert_eq!(put(Mode::Replace, 1), Err(Refusal::NotFound));
        assert_eq!(put(Mode::Add, 1), Ok(false));
        assert_eq!(put(Mode::Add, 1), Err(Refusal::Exists));
        assert_eq!(put(Mode::Replace, 1), Ok(false));
        assert_eq!(put(Mode::Replace, 6), Err(Refusal::NotFound), "expired");
        assert_eq!(put(Mode::Add, 6), Ok(false), "expired");
    }

    #[test]
    fn incr_starts_where_told_and_keeps_the_expiry() {
        let d = dict();
        assert_eq!(d.incr(b"n", 1.0, None, 0, 1), Err(Refusal::NotFound));
        assert_eq!(d.incr(b"n", 1.0, Some(10.0), 100, 1), Ok((11.0, false)));
        assert_eq!(d.incr(b"n", -2.5, Some(10.0), 100, 50), Ok((8.5, false)));
        assert_eq!(d.ttl(b"n", 51), Ok(Some(50)));
        assert_eq!(d.incr(b"n", 1.0, Some(0.0), 100, 101), Ok((1.0, false)), "expired");
        set(&d, "s", text("5"), 0, 1).unwrap();
        assert_eq!(d.incr(b"s", 1.0, Some(0.0), 0, 1), Err(Refusal::NotANumber));
    }

    #[test]
    fn lists_work_at_both_ends() {
        let d = dict();
        assert_eq!(d.push(End::Right, b"l", text("b"), 1), Ok(1));
        assert_eq!(d.push(End::Left, b"l", text("a"), 1), Ok(2));
        assert_eq!(d.push(End::Right, b"l", Value::Num(3.0), 1), Ok(3));
        assert_eq!(d.llen(b"l", 1), Ok(3));
        assert!(matches!(get(&d, "l", 1), Some(Value::List(_))));
        assert_eq!(d.pop(End::Left, b"l", 1), Ok(Some(text("a"))));
        assert_eq!(d.pop(End::Right, b"l", 1), Ok(Some(Value::Num(3.0))));
        assert_eq!(d.pop(End::Right, b"l", 1), Ok(Some(text("b"))));
        assert_eq!(d.pop(End::Right, b"l", 1), Ok(None));
        assert_eq!(d.llen(b"l", 1), Ok(0));
        set(&d, "s", text("5"), 0, 1).unwrap();
        assert_eq!(d.push(End::Left, b"s", text("x"), 1), Err(Refusal::NotAList));
        assert_eq!(d.pop(End::Left, b"s", 1), Err(Refusal::NotAList));
        assert_eq!(d.llen(b"s", 1), Err(Refusal::NotAList));
    }

    #[test]
    fn evicts_the_least_recently_used_and_says_so() {
        let d = dict();
        let mut n = 0;
        while set(&d, &format!("k{n}"), text(&"x".repeat(100)), 0, 1) == Ok(false) {
            n += 1;
            get(&d, "k0", 1);
            assert!(n < 1000);
        }
        assert!(get(&d, "k0", 1).is_some(), "it was used");
        assert_eq!(get(&d, "k1", 1), None);
        assert!(d.free_space() < 400);
    }

    #[test]
    fn safe_writes_refuse_instead_but_reuse_what_expired() {
        let d = dict();
        let put = |n: i32, now| {
            d.store(Mode::Set, format!("k{n}").as_bytes(), text(&"x".repeat(100)), 50, 0, Pressure::Safe, now)
        };
        let full = (0..1000).find(|n| put(*n, 1).is_err()).unwrap();
        assert_eq!(put(full, 1), Err(Refusal::NoMemory));
        assert_eq!(put(full, 60), Ok(false));
        assert_eq!(set(&d, "huge", text(&"x".repeat(70 << 10)), 0, 60), Err(Refusal::NoMemory));
    }

    #[test]
    fn a_changed_size_is_counted() {
        let d = dict();
        let free = d.free_space();
        set(&d, "k", text(&"x".repeat(9000)), 0, 1).unwrap();
        set(&d, "k", text(&"y".repeat(200)), 0, 1).unwrap();
        assert_eq!(free - d.free_space(), 4096, "one page for a piece of 512");
        assert_eq!(set(&d, "k", text(&"x".repeat(64 << 10)), 0, 1), Err(Refusal::NoMemory));
        assert_eq!(free - d.free_space(), 4096, "it is still what it was");
        d.delete(b"k");
        assert_eq!(d.free_space(), free);
        let long = "x".repeat(3000);
        d.push(End::Left, b"l", text(&long), 1).unwrap();
        d.push(End::Left, b"l", text(&long), 1).unwrap();
        assert_eq!(free - d.free_space(), 2 * 4096);
        d.pop(End::Left, b"l", 1).unwrap();
        set(&d, "l", Value::Bool(true), 0, 1).unwrap();
        assert_eq!(d.free_space(), free, "its elements are gone");
    }

    #[test]
    fn flushes_and_lists_keys() {
        let d = dict();
        for k in ["a", "b", "c"] {
            set(&d, k, text("v"), if k == "b" { 5 } else { 0 }, 1).unwrap();
        }
        let keys =
            |max, now| d.keys(max, now).iter().map(|k| String::from_utf8_lossy(k).into_owned()).collect::<Vec<_>>();
        assert_eq!(keys(0, 1), ["c", "b", "a"]);
        assert_eq!(keys(2, 1), ["c", "b"]);
        assert_eq!(keys(0, 6), ["c", "a"]);
        assert_eq!(d.flush_expired(0, 6), 1);
        d.flush_all();
        assert!(keys(0, 6).is_empty());
        assert_eq!(d.flush_expired(1, 6), 1);
        assert_eq!(d.flush_expired(0, 6), 1);
    }

    #[test]
    fn random_operations_never_exceed_the_bound() {
        let d = Dict::new("r", 32 << 10);
        let empty = d.free_space();
        let mut seed = 0x9E37_79B9_7F4A_7C15_u64;
        let mut rnd = |n: u64| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % n
        };
        for now in 1..20_000 {
            let key = format!("k{}", rnd(300));
            let value = text(&"v".repeat(rnd(400) as usize));
            match rnd(6) {
                0 => drop(set(&d, &key, value, rnd(50), now)),
                1 => drop(d.store(Mode::Add, key.as_bytes(), value, rnd(50), 0, Pressure::Safe, now)),
                2 => drop(d.incr(key.as_bytes(), 1.0, Some(0.0), rnd(50), now)),
                3 => drop(d.push(End::Left, format!("l{}", rnd(5)).as_bytes(), value, now)),
                4 => drop(d.pop(End::Right, format!("l{}", rnd(5)).as_bytes(), now)),
                _ => drop(d.delete(key.as_bytes())),
            }
            assert!(d.free_space() <= empty);
        }
        d.flush_all();
        d.flush_expired(0, 20_000);
        assert_eq!(d.free_space(), empty);
    }

    #[test]
    fn sizes_are_read_as_nginx_does() {
        for (text, size) in
            [("10m", Some(10 << 20)), ("512k", Some(512 << 10)), ("1g", Some(1 << 30)), ("7", Some(7)), ("x", None)]
        {
            assert_eq!(parse_size(text), size, "{text}");
        }
    }

    #[test]
    fn one_write_evicts_only_so_many() {
        let d = dict();
        let mut n = 0;
        while set(&d, &format!("k{n}"), text("x"), 0, 1) == Ok(false) {
            n += 1;
        }
        assert!(n > 4 * shard::MAX_EVICTIONS, "{n}");
        let before = d.keys(0, 1).len();
        assert_eq!(set(&d, "long", text(&"x".repeat(40 << 10)), 0, 1), Err(Refusal::NoMemory));
        assert_eq!(before - d.keys(0, 1).len(), shard::MAX_EVICTIONS, "what was evicted is gone");
        assert_eq!(set(&d, "page", text(&"x".repeat(3000)), 0, 1), Ok(false), "they have left a page");
    }

    /// Whatever sizes they have: so many entries hold a whole page.
    #[test]
    fn a_page_is_always_to_be_had() {
        let d = dict();
        for n in 0..2000_usize {
            let (size, longer) = (60 << (n % 5), 100 << (n % 7));
            for (key, size) in [(format!("a{n}"), size), (format!("b{n}"), longer.min(4000))] {
                assert!(set(&d, &key, text(&"x".repeat(size)), 0, 1).is_ok(), "{n}: {size}");
            }
        }
    }

    #[test]
    fn a_dictionary_has_only_so_many_parts() {
        for (capacity, parts) in
            [(1, 1), (2 * SHARD_BYTES, 2), (MAX_SHARDS * SHARD_BYTES, MAX_SHARDS), (1 << 30, MAX_SHARDS)]
        {
            assert_eq!(Dict::new("d", capacity).shards.len(), parts, "{capacity}");
        }
    }
}
