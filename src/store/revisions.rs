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
/// A revision smaller than this is kept as it is: compressing it takes longer than writing it.
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changed {
    pub key: String,
    /// `None`: it was not there.
    pub before: Option<String>,
    /// `None`: it is gone.
    pub after: Option<String>,
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
}

/// Which revisions are asked for, the newest first.
#[derive(Clone, Debug, Default)]
pub struct Query {
    /// Only this one.
    pub number: Option<i64>,
    /// Only those that changed the object with this key.
    pub key: Option<String>,
    pub skip: usize,
    pub take: usize,
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
        Revision { number: 0, time_ms, who, action, refers_to: note.refers_to, changes, omitted: false }
    }

    /// As it is stored, in at most `room` bytes if that is possible at all: without the texts when they do not fit.
    pub fn encode(mut self, room: usize) -> Result<Vec<u8>> {
        let texts = |c: &Changed| c.before.as_ref().map_or(0, String::len) + c.after.as_ref().map_or(0, String::len);
        if self.changes.iter().map(texts).sum::<usize>() <= MAX_TEXT_BYTES {
            let packed = pack(serde_json::to_vec(&self).map_err(unfit)?)?;
            if packed.len() <= room {
                return Ok(packed);
            }
        }
        self.omitted = true;
        for change in &mut self.changes {
            (change.before, change.after) = (None, None);
        }
        pack(serde_json::to_vec(&self).map_err(unfit)?)
    }

    pub fn decode(number: i64, bytes: &[u8]) -> Result<Revision> {
        let read: Revision = serde_json::from_slice(&unpack(bytes)?).map_err(unfit)?;
        Ok(Revision { number, ..read })
    }

    pub fn concerns(&self, key: &str) -> bool {
        self.changes.iter().any(|change| change.key == key)
    }
}

/// For a store without revisions.
pub(super) async fn one_by_one<S: Store + ?Sized>(store: &S, batch: Batch) -> Result<Committed> {
    let mut committed = Committed { done: Vec::new(), revision: 0 };
    for Write { key, value, on, ttl_secs, .. } in batch.writes {
        let done = match value {
            Some(value) => {
                let written = store.put(&key, value.to_string(), on, ttl_secs).await?;
                committed.revision = written.revision;
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

/// JSON starts with a brace, zlib does not.
fn pack(json: Vec<u8>) -> Result<Vec<u8>> {
    if json.len() < PLAIN_BYTES {
        return Ok(json);
    }
    let mut encoder = ZlibEncoder::new(Vec::with_capacity(json.len() / 4), Compression::fast());
    encoder.write_all(&json)?;
    Ok(encoder.finish()?)
}

fn unpack(bytes: &[u8]) -> Result<Vec<u8>> {
    /// Texts as JSON strings may take six bytes for one.
    const LONGEST: usize = 6 * MAX_TEXT_BYTES + (1 << 20);
    if bytes.first() == Some(&b'{') {
        return Ok(bytes.to_vec());
    }
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
        Revision::of(&note, vec![Changed { key: "/routes/1".into(), before: text(before), after: text(after) }])
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
            let bytes = kept.clone().encode(usize::MAX).unwrap();
            assert_eq!(Revision::decode(0, &bytes).unwrap(), kept, "{size}");
            assert!(size < PLAIN_BYTES || bytes.len() < size / 2, "compressed");
            let short = Revision::decode(7, &kept.clone().encode(bytes.len() - 1).unwrap()).unwrap();
            assert_eq!((short.number, short.omitted, short.action), (7, true, Action::Update));
            assert_eq!((&short.changes[0].key, &short.changes[0].before), (&kept.changes[0].key, &None));
        }
        let most = revision(Some(&"x".repeat(MAX_TEXT_BYTES)), None);
        assert!(!Revision::decode(0, &most.encode(usize::MAX).unwrap()).unwrap().omitted);
        let more = revision(Some(&"x".repeat(MAX_TEXT_BYTES)), Some("x"));
        assert!(Revision::decode(0, &more.encode(usize::MAX).unwrap()).unwrap().omitted);
    }

    #[test]
    fn what_is_no_revision_is_an_error() {
        for bytes in [&b""[..], b"{", b"{}", b"x\x9c nonsense"] {
            assert!(Revision::decode(1, bytes).is_err(), "{bytes:?}");
        }
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
