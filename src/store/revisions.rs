//! Revisions: what each write of the Admin API found and what it left, who wrote it and when. A store keeps them beside its
//! objects, in the same transaction as the write, and drops the oldest ones as new ones come.
//!
//! Pure: what a revision is, its bytes, its bounds. The stores read and write them.

use std::{
    io::{Read, Write as _},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use flate2::{Compression, read::ZlibDecoder, write::ZlibEncoder};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Condition, Entry, Store};
use crate::error::{Error, Kind, Result};

/// Revisions that are kept (`deployment.admin.revisions.max`): some weeks of people at work, or the last deployments of a
/// pipeline that writes a few hundred objects each time.
pub const DEFAULT_MAX: usize = 1000;
/// Megabytes of them (`deployment.admin.revisions.max_mb`): large uploads must not make a store of some kilobytes one of
/// gigabytes; etcd's own bound on all it holds is 2 GB.
pub const DEFAULT_MAX_MB: u64 = 64;
/// Objects that one revision may have changed: beside the revision itself and what is dropped they fit etcd's 128 operations in a
/// transaction.
pub const MAX_CHANGES: usize = 64;
/// Texts shorter than this stand with what a list tells: compressing them takes longer than writing them, and a page of 500 stays
/// under two megabytes.
const PLAIN_BYTES: usize = 4096;
/// A revision whose texts take more than this is kept without them.
const MAX_TEXT_BYTES: usize = 32 << 20;

/// How much is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    pub count: usize,
    pub bytes: u64,
}

impl Default for Bounds {
    fn default() -> Self {
        Bounds { count: DEFAULT_MAX, bytes: DEFAULT_MAX_MB << 20 }
    }
}

impl Bounds {
    /// `deployment.admin.revisions` of the effective configuration. 0: none are kept.
    pub fn from_json(config: &Value) -> Bounds {
        let revisions = config.pointer("/deployment/admin/revisions").unwrap_or(&Value::Null);
        // From the environment a number may come as text.
        let number = |value: &Value| value.as_u64().or_else(|| value.as_str()?.parse().ok());
        let set = |key: &str| revisions.get(key).and_then(number);
        let count = set("max").map_or(DEFAULT_MAX, |n| usize::try_from(n).unwrap_or(usize::MAX));
        Bounds { count, bytes: set("max_mb").unwrap_or(DEFAULT_MAX_MB).saturating_mul(1 << 20) }
    }

    pub fn keeps_any(&self) -> bool {
        self.count > 0 && self.bytes > 0
    }

    /// The most bytes that one may have.
    pub fn room(&self) -> usize {
        usize::try_from(self.bytes).unwrap_or(usize::MAX)
    }

    /// Whether so many revisions of so many bytes are too much.
    pub fn exceeded(&self, count: usize, bytes: u64) -> bool {
        count > self.count || bytes > self.bytes
    }
}

/// Who writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// The name or the role of the key.
    pub who: Arc<str>,
    /// The revision that this write takes back.
    pub refers_to: Option<i64>,
}

/// One write of a batch.
#[derive(Clone, Debug)]
pub struct Write {
    pub key: Arc<str>,
    /// `None`: the object goes.
    pub value: Option<Arc<str>>,
    pub on: Condition,
    pub ttl_secs: Option<u64>,
    /// The entry as the writer has read it just now: spares a store that cannot look inside its transaction a round trip.
    pub seen: Option<Option<Entry>>,
}

impl Write {
    /// Takes away what has been read just now.
    pub fn deletion_of(entry: Entry) -> Write {
        Write { key: entry.key.clone(), value: None, on: Condition::Always, ttl_secs: None, seen: Some(Some(entry)) }
    }
}

/// Writes that happen together or not at all: no two of one key, at most `MAX_CHANGES`.
#[derive(Clone, Debug)]
pub struct Batch {
    pub writes: Vec<Write>,
    pub note: Note,
}

/// A done batch.
#[derive(Clone, Debug)]
pub struct Committed {
    /// For each write, in order, what stood there and what stands there now.
    pub done: Vec<(Option<Entry>, Option<Entry>)>,
    /// The store's revision after it: the number under which it is kept.
    pub revision: i64,
    /// What `Store::keep_alive` takes for the last of the writes, when that was given a time.
    pub lease: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    Create,
    Update,
    Delete,
    Rollback,
}

/// What happened to one object: the texts as stored, secrets encrypted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changed {
    pub key: String,
    /// `None`: it was not there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<String>,
    /// `None`: it is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// The `modifiedIndex` of what was there; 0: nothing, or it is not known.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub found: i64,
    /// When what was left goes by itself, in ms since the epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_ms: Option<u64>,
}

fn is_zero(n: &i64) -> bool {
    *n == 0
}

impl Changed {
    /// What a write has found and left.
    pub fn of(write: &Write, before: Option<&Entry>) -> Changed {
        let lives = write.ttl_secs.filter(|_| write.value.is_some());
        Changed {
            key: write.key.to_string(),
            before: before.map(|e| e.value.to_string()),
            after: write.value.as_ref().map(|v| v.to_string()),
            found: before.map_or(0, |e| e.mod_revision),
            expires_ms: lives.map(|secs| now_ms().saturating_add(secs.saturating_mul(1000))),
        }
    }
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

/// What is left of the time that was given to this version of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeLeft {
    /// It stays, or nobody knows that it does not: its write is no revision that is kept.
    Forever,
    Secs(u64),
    /// It would be gone by now.
    Over,
}

impl TimeLeft {
    /// What a write gives to an object that is there now, for it to end when it would have.
    pub fn of_what_is_there(self) -> Option<u64> {
        match self {
            TimeLeft::Forever => None,
            TimeLeft::Secs(secs) => Some(secs),
            // Whoever drops it is about to.
            TimeLeft::Over => Some(1),
        }
    }
}

/// Asks the revision that wrote the version.
pub async fn time_left(store: &dyn Store, key: &str, mod_revision: i64) -> Result<TimeLeft> {
    if mod_revision == 0 {
        return Ok(TimeLeft::Forever);
    }
    let query = Query { number: Some(mod_revision), take: 1, heads: true, ..Query::default() };
    let page = store.revisions(query).await?.unwrap_or_default();
    let change = page.list.into_iter().next().and_then(|r| r.changes.into_iter().find(|c| c.key == key));
    Ok(match change.and_then(|change| change.expires_ms) {
        None => TimeLeft::Forever,
        // The whole seconds that stores count in: none is an end.
        Some(at) => match at.saturating_sub(now_ms()).div_ceil(1000) {
            0 => TimeLeft::Over,
            secs => TimeLeft::Secs(secs),
        },
    })
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revision {
    /// The store's revision of the write: `modifiedIndex` of the objects that it left.
    #[serde(skip)]
    pub number: i64,
    /// Since the epoch.
    pub time_ms: u64,
    pub who: String,
    pub action: Action,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refers_to: Option<i64>,
    pub changes: Vec<Changed>,
    /// The texts were too large to be kept: `before` and `after` are `None`, whatever they were.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub omitted: bool,
    /// The texts stand apart, and are not here.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    apart: bool,
}

/// A revision as a store keeps it. What is long stands apart, so that a list of revisions reads none of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed {
    pub head: Vec<u8>,
    pub texts: Option<Vec<u8>>,
}

impl Packed {
    pub fn bytes(&self) -> usize {
        self.head.len() + self.texts.as_ref().map_or(0, Vec::len)
    }
}

/// `before` and `after` of each change.
type Texts = Vec<(Option<String>, Option<String>)>;

/// Which revisions are asked for, the newest first.
#[derive(Clone, Debug, Default)]
pub struct Query {
    /// Only this one.
    pub number: Option<i64>,
    /// Only those that changed the object with this key.
    pub key: Option<String>,
    pub skip: usize,
    pub take: usize,
    /// Without the objects' texts.
    pub heads: bool,
}

/// The answer to a query.
#[derive(Debug, Default)]
pub struct Page {
    pub list: Vec<Revision>,
    /// On all pages.
    pub total: usize,
}

impl Revision {
    /// What a batch has done. Its number is the store's to say.
    pub fn of(note: &Note, changes: Vec<Changed>) -> Revision {
        // Several at once only go together when their owner goes, or come back together.
        let last = changes.last();
        let action = match (note.refers_to, last.map(|c| (&c.before, &c.after))) {
            (Some(_), _) => Action::Rollback,
            (None, Some((_, None))) => Action::Delete,
            (None, Some((None, _))) => Action::Create,
            _ => Action::Update,
        };
        let time_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
        let who = note.who.to_string();
        Revision { number: 0, time_ms, who, action, refers_to: note.refers_to, changes, omitted: false, apart: false }
    }

    /// As it is stored, in at most `room` bytes if that is possible at all: without the texts when they do not fit.
    pub fn encode(mut self, room: usize) -> Result<Packed> {
        let length = |c: &Changed| c.before.as_ref().map_or(0, String::len) + c.after.as_ref().map_or(0, String::len);
        let bytes = self.changes.iter().map(length).sum::<usize>();
        if bytes < PLAIN_BYTES {
            let head = serde_json::to_vec(&self).map_err(unfit)?;
            if head.len() <= room {
                return Ok(Packed { head, texts: None });
            }
        }
        let texts = self.take_texts();
        if bytes <= MAX_TEXT_BYTES {
            self.apart = true;
            let head = serde_json::to_vec(&self).map_err(unfit)?;
            let packed = Packed { head, texts: Some(pack(&serde_json::to_vec(&texts).map_err(unfit)?)?) };
            if packed.bytes() <= room {
                return Ok(packed);
            }
        }
        (self.apart, self.omitted) = (false, true);
        Ok(Packed { head: serde_json::to_vec(&self).map_err(unfit)?, texts: None })
    }

    fn take_texts(&mut self) -> Texts {
        self.changes.iter_mut().map(|change| (change.before.take(), change.after.take())).collect()
    }

    /// Without the texts, which a short one has with it.
    pub fn decode_head(number: i64, head: &[u8]) -> Result<Revision> {
        let mut read = Self::read(number, head)?;
        read.take_texts();
        Ok(read)
    }

    /// With the texts. What stands apart must be given.
    pub fn decode(number: i64, head: &[u8], texts: Option<&[u8]>) -> Result<Revision> {
        let mut read = Self::read(number, head)?;
        if !std::mem::take(&mut read.apart) {
            return Ok(read);
        }
        let missing = || Error::config(Kind::Malformed).context(format!("revision {number}: its texts are gone"));
        let texts: Texts = serde_json::from_slice(&unpack(texts.ok_or_else(missing)?)?).map_err(unfit)?;
        for (change, (before, after)) in read.changes.iter_mut().zip(texts) {
            (change.before, change.after) = (before, after);
        }
        Ok(read)
    }

    fn read(number: i64, head: &[u8]) -> Result<Revision> {
        // One that was kept before texts stood apart is compressed as a whole when it is long.
        let read = match head.first() {
            Some(b'{') => serde_json::from_slice(head),
            _ => serde_json::from_slice(&unpack(head)?),
        };
        Ok(Revision { number, ..read.map_err(unfit)? })
    }

    pub fn concerns(&self, key: &str) -> bool {
        self.changes.iter().any(|change| change.key == key)
    }
}

/// For a store without revisions.
pub(super) async fn one_by_one<S: Store + ?Sized>(store: &S, batch: Batch) -> Result<Committed> {
    let mut committed = Committed { done: Vec::new(), revision: 0, lease: None };
    for Write { key, value, on, ttl_secs, .. } in batch.writes {
        let done = match value {
            Some(value) => {
                let written = store.put(&key, value.to_string(), on, ttl_secs).await?;
                (committed.revision, committed.lease) = (written.revision, written.lease);
                (written.previous, Some(written.entry))
            }
            None => match store.delete(&key, on).await? {
                Some((previous, revision)) => {
                    committed.revision = revision;
                    (Some(previous), None)
                }
                None => (None, None),
            },
        };
        committed.done.push(done);
    }
    Ok(committed)
}

/// What a store can find a revision by without reading it: a hash of the one key that it changed, 0 for several.
pub fn tag(changes: &[Changed]) -> u32 {
    match changes {
        [one] => tag_of(&one.key),
        _ => 0,
    }
}

/// The tag of revisions that changed this key alone.
pub fn tag_of(key: &str) -> u32 {
    crc32fast::hash(key.as_bytes()).max(1)
}

fn unfit(e: serde_json::Error) -> Error {
    Error::config(Kind::Malformed).cause(e).context("a revision")
}

fn pack(json: &[u8]) -> Result<Vec<u8>> {
    let mut encoder = ZlibEncoder::new(Vec::with_capacity(json.len() / 4), Compression::fast());
    encoder.write_all(json)?;
    Ok(encoder.finish()?)
}

fn unpack(bytes: &[u8]) -> Result<Vec<u8>> {
    /// Texts as JSON strings may take six bytes for one.
    const LONGEST: usize = 6 * MAX_TEXT_BYTES + (1 << 20);
    let mut json = Vec::new();
    ZlibDecoder::new(bytes).take(LONGEST as u64 + 1).read_to_end(&mut json)?;
    if json.len() > LONGEST {
        return Err(Error::config(Kind::TooLarge).context("a revision"));
    }
    Ok(json)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn revision(before: Option<&str>, after: Option<&str>) -> Revision {
        let note = Note { who: "jane".into(), refers_to: None };
        let text = |t: Option<&str>| t.map(str::to_owned);
        let key = "/routes/1".into();
        Revision::of(&note, vec![Changed { key, before: text(before), after: text(after), ..Changed::default() }])
    }

    #[test]
    fn what_happened_is_seen_from_before_and_after() {
        for (before, after, action) in [
            (None, Some("a"), Action::Create),
            (Some("a"), Some("b"), Action::Update),
            (Some("a"), None, Action::Delete),
        ] {
            assert_eq!(revision(before, after).action, action);
        }
        let undone = Revision::of(&Note { who: "x".into(), refers_to: Some(3) }, Vec::new());
        assert_eq!((undone.action, undone.refers_to), (Action::Rollback, Some(3)));
    }

    #[test]
    fn it_is_read_as_it_was_kept_and_without_texts_where_they_do_not_fit() {
        for size in [1, PLAIN_BYTES, 1 << 20] {
            let kept = revision(Some(&"x".repeat(size)), Some("{}"));
            let packed = kept.clone().encode(usize::MAX).unwrap();
            let decode = |p: &Packed| Revision::decode(0, &p.head, p.texts.as_deref()).unwrap();
            assert_eq!(decode(&packed), kept, "{size}");
            assert_eq!(packed.texts.is_some(), size >= PLAIN_BYTES);
            assert!(packed.head.len() < PLAIN_BYTES && packed.bytes() < PLAIN_BYTES + size / 2, "compressed");
            let head = Revision::decode_head(7, &packed.head).unwrap();
            assert_eq!((head.number, head.omitted, head.action), (7, false, Action::Update));
            assert_eq!((&head.changes[0].key, &head.changes[0].before), (&kept.changes[0].key, &None));
            let short = kept.clone().encode(packed.bytes() - 1).unwrap();
            assert!(short.texts.is_some() || decode(&short).omitted);
            let none = decode(&kept.clone().encode(0).unwrap());
            assert!(none.omitted && none.changes[0].before.is_none() && none.changes[0].key == kept.changes[0].key);
        }
        let most = revision(Some(&"x".repeat(MAX_TEXT_BYTES)), None);
        assert!(most.encode(usize::MAX).unwrap().texts.is_some());
        let more = revision(Some(&"x".repeat(MAX_TEXT_BYTES)), Some("x"));
        let more = more.encode(usize::MAX).unwrap();
        assert!(more.texts.is_none() && Revision::decode(0, &more.head, None).unwrap().omitted);
    }

    #[test]
    fn one_that_was_kept_as_a_whole_is_still_read() {
        let kept = revision(Some(&"x".repeat(1 << 20)), Some("{}"));
        let whole = pack(&serde_json::to_vec(&kept).unwrap()).unwrap();
        assert_eq!(Revision::decode(0, &whole, None).unwrap(), kept);
        assert_eq!(Revision::decode_head(3, &whole).unwrap().changes[0].before, None);
    }

    #[test]
    fn what_is_no_revision_is_an_error() {
        for bytes in [&b""[..], b"{", b"{}", b"x\x9c nonsense"] {
            assert!(Revision::decode(1, bytes, None).is_err(), "{bytes:?}");
        }
        let long = revision(Some(&"x".repeat(PLAIN_BYTES)), None).encode(usize::MAX).unwrap();
        assert!(Revision::decode(1, &long.head, None).unwrap_err().to_string().contains("its texts are gone"));
        assert!(Revision::decode(1, &long.head, Some(b"x\x9c nonsense")).is_err());
    }

    #[test]
    fn the_configuration_bounds_them() {
        assert_eq!(Bounds::from_json(&json!({})), Bounds { count: 1000, bytes: 64 << 20 });
        let set = Bounds::from_json(&json!({"deployment": {"admin": {"revisions": {"max": 2, "max_mb": 1}}}}));
        assert_eq!(set, Bounds { count: 2, bytes: 1 << 20 });
        assert!(!set.exceeded(2, 1 << 20) && set.exceeded(3, 0) && set.exceeded(1, (1 << 20) + 1));
        assert!(!Bounds { count: 0, ..set }.keeps_any() && !Bounds { bytes: 0, ..set }.keeps_any());
    }
}
