//! Revisions in etcd: beside the objects' prefix (`/apisix-revisions/`), where no node's watch or list reads them.
//!
//! A revision's number is that of its transaction, which nobody knows beforehand: its key holds the time, a random number, its
//! size and the tag of what it changed, so that keys alone are enough to find and to drop it.

use std::{
    collections::hash_map::RandomState,
    hash::{BuildHasher, Hasher},
    time::{SystemTime, UNIX_EPOCH},
};

use etcd_client::{
    Compare, CompareOp, GetOptions, KeyValue, PutOptions, ResponseHeader, SortOrder, SortTarget, Txn, TxnOp,
    TxnOpResponse, TxnResponse,
};
use tokio::sync::Mutex;

use super::{Batch, Committed, Condition, Entry, Etcd, Failure, Outcome, Page, Query, conflict, kv};
use crate::{
    error::Result,
    store::revisions::{self, Changed, Packed, Revision, Write, tag_of},
};

/// Tries of a batch that other writers get in the way of.
const MAX_TRIES: usize = 8;
/// What etcd takes in one request by default (`--max-request-bytes`), but for room for keys.
const REQUEST_BYTES: usize = 1_572_864 - 16_384;
/// Revisions that one write drops: more than one, so that a smaller bound is reached soon, and few enough for a transaction, where each
/// is two keys.
const MAX_DROPPED: usize = 31;
/// Own writes after which the keys are read again: other nodes keep revisions, too. Until then each node may keep so many too many.
const RECOUNT_EVERY: usize = 64;
/// Revisions read at once: of the largest ones that is what one message may hold.
const READ_AT_ONCE: usize = 32;
/// Below the range of revisions: long texts, under the names of theirs. Names are digits, so that no list of them takes these in.
const TEXTS: &str = "texts/";

/// What this node knows of the revisions that are kept.
#[derive(Default)]
pub(super) struct History(Mutex<Option<Known>>);

struct Known {
    /// The oldest first.
    kept: Vec<Kept>,
    writes: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Kept {
    key: String,
    number: i64,
    bytes: u64,
    tag: u32,
}

impl Kept {
    /// `None`: not a key that we write.
    fn of(kv: &KeyValue) -> Option<Kept> {
        let key = std::str::from_utf8(kv.key()).ok()?.to_owned();
        let mut parts = key.rsplit('/').next()?.split('-').skip(2);
        let bytes = parts.next()?.parse().ok()?;
        let tag = u32::from_str_radix(parts.next()?, 16).ok()?;
        Some(Kept { number: kv.create_revision(), bytes, tag, key })
    }
}

/// A revision on its way into a transaction.
struct Record {
    key: String,
    packed: Packed,
    tag: u32,
    dropped: Vec<String>,
}

impl Etcd {
    /// Where revisions stand: a range of its own, which `{prefix}/` does not take in.
    fn range(&self) -> String {
        format!("{}-revisions/", self.config.prefix)
    }

    /// Where the long texts of the revision with this key stand.
    fn texts_key(&self, key: &str) -> String {
        let range = self.range();
        format!("{range}{TEXTS}{}", key.strip_prefix(&range).unwrap_or(key))
    }

    pub(super) async fn commit_batch(&self, mut batch: Batch) -> Result<Committed> {
        let failed = |e: Failure| e.into_error("commit");
        let mut found = Vec::with_capacity(batch.writes.len());
        for write in &mut batch.writes {
            found.push(match (write.seen.take(), write.on) {
                (Some(seen), _) => seen,
                // What is not to be there need not be looked for: the transaction finds out.
                (None, Condition::Unmodified(0)) => None,
                (None, _) => self.read(&write.key).await.map_err(failed)?,
            });
        }
        let mut record = true;
        for _ in 0..MAX_TRIES {
            let moved = batch.writes.iter().zip(&found).find(|(write, found)| {
                matches!(write.on, Condition::Unmodified(n) if n != found.as_ref().map_or(0, |e| e.mod_revision))
            });
            if let Some((write, _)) = moved {
                return Err(conflict(&write.key));
            }
            if batch.writes.iter().zip(&found).all(|(write, found)| write.value.is_none() && found.is_none()) {
                return Ok(Committed {
                    done: found.into_iter().map(|f| (f, None)).collect(),
                    revision: 0,
                    lease: None,
                });
            }
            match self.try_commit(&batch, &found, record).await {
                Ok(Ok(committed)) => return Ok(committed),
                Ok(Err(now)) => found = now,
                Err(e) if record && e.message.contains("permission denied") => {
                    tracing::error!(
                        "etcd: writes are not kept as revisions unless the user may write {}: {}",
                        self.range(),
                        e.message
                    );
                    record = false;
                }
                Err(e) => return Err(failed(e)),
            }
        }
        Err(conflict(batch.writes.first().map_or("", |write| &write.key)))
    }

    /// The inner error: what stands there instead of `found`.
    async fn try_commit(
        &self,
        batch: &Batch,
        found: &[Option<Entry>],
        record: bool,
    ) -> Outcome<std::result::Result<Committed, Vec<Option<Entry>>>> {
        let record = if record { self.record(batch, found).await? } else { None };
        let again = batch.writes.iter().all(|w| w.on == Condition::Always && w.value.is_some());
        let mut leases = Vec::with_capacity(batch.writes.len());
        for write in &batch.writes {
            leases.push(match write.ttl_secs {
                Some(ttl) if write.value.is_some() => Some(self.lease(ttl).await?),
                _ => None,
            });
        }
        let txn = self.transaction(batch, found, &leases, record.as_ref());
        let answer = self
            .call(again, move |client| {
                let txn = txn.clone();
                Box::pin(async move { kv(&client).txn(txn).await })
            })
            .await?;
        if !answer.succeeded() {
            return Ok(Err(self.stands_there(batch, &answer)));
        }
        let revision = answer.header().map_or(0, ResponseHeader::revision);
        if let Some(record) = record {
            self.note(record, revision).await;
        }
        let lease = leases.last().copied().flatten().map(|id| id.to_string());
        Ok(Ok(Committed { lease, ..committed(batch, found, revision) }))
    }

    fn transaction(
        &self,
        batch: &Batch,
        found: &[Option<Entry>],
        leases: &[Option<i64>],
        record: Option<&Record>,
    ) -> Txn {
        let (mut compares, mut ops, mut gets) = (Vec::new(), Vec::new(), Vec::new());
        for ((write, found), lease) in batch.writes.iter().zip(found).zip(leases) {
            let key = self.full_key(&write.key);
            let revision = found.as_ref().map_or(0, |e| e.mod_revision);
            compares.push(Compare::mod_revision(key.as_str(), CompareOp::Equal, revision));
            gets.push(TxnOp::get(key.as_str(), None));
            match &write.value {
                Some(value) => {
                    let options = lease.map(|id| PutOptions::new().with_lease(id));
                    ops.push(TxnOp::put(key, value.as_bytes(), options));
                }
                None if found.is_some() => ops.push(TxnOp::delete(key, None)),
                None => {}
            }
        }
        if let Some(record) = record {
            ops.push(TxnOp::put(record.key.as_str(), record.packed.head.as_slice(), None));
            if let Some(texts) = &record.packed.texts {
                ops.push(TxnOp::put(self.texts_key(&record.key), texts.as_slice(), None));
            }
            let both = record.dropped.iter().flat_map(|key| [key.clone(), self.texts_key(key)]);
            ops.extend(both.map(|key| TxnOp::delete(key, None)));
        }
        Txn::new().when(compares).and_then(ops).or_else(gets)
    }

    fn stands_there(&self, batch: &Batch, answer: &TxnResponse) -> Vec<Option<Entry>> {
        let mut now: Vec<_> = answer
            .op_responses()
            .into_iter()
            .map(|op| match op {
                TxnOpResponse::Get(get) => get.kvs().first().and_then(|kv| self.entry(kv)),
                _ => None,
            })
            .collect();
        now.resize(batch.writes.len(), None);
        now
    }

    /// What is to be kept of the batch, if it is, and what goes for it.
    async fn record(&self, batch: &Batch, found: &[Option<Entry>]) -> Outcome<Option<Record>> {
        let bounds = self.config.revisions;
        if !bounds.keeps_any() {
            return Ok(None);
        }
        let changes: Vec<Changed> = batch
            .writes
            .iter()
            .zip(found)
            .filter(|(write, found)| write.value.is_some() || found.is_some())
            .map(|(write, found)| Changed::of(write, found.as_ref()))
            .collect();
        let objects: usize = batch.writes.iter().filter_map(|w| w.value.as_ref()).map(|v| v.len()).sum();
        let tag = revisions::tag(&changes);
        let room = REQUEST_BYTES.saturating_sub(objects).min(bounds.room());
        let encoded = Revision::of(&batch.note, changes).encode(room);
        let packed = encoded.map_err(|e| Failure {
            unreachable: false,
            unsent: true,
            too_large: false,
            message: e.to_string(),
        })?;
        let random = RandomState::new().build_hasher().finish();
        let time_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis());
        let key = format!("{}{time_ms:015}-{random:016x}-{}-{tag:08x}", self.range(), packed.bytes());
        let dropped = self.surplus(packed.bytes() as u64).await?;
        Ok(Some(Record { key, packed, tag, dropped }))
    }

    /// The oldest keys that have to go when one of `bytes` comes.
    async fn surplus(&self, bytes: u64) -> Outcome<Vec<String>> {
        let mut known = self.history.0.lock().await;
        let known = match &mut *known {
            Some(known) if known.writes < RECOUNT_EVERY => known,
            stale => stale.insert(Known { kept: self.kept(None).await?, writes: 0 }),
        };
        let mut held = known.kept.iter().map(|k| k.bytes).sum::<u64>() + bytes;
        let mut count = known.kept.len() + 1;
        let mut dropped = Vec::new();
        for old in known.kept.iter().take(MAX_DROPPED) {
            if !self.config.revisions.exceeded(count, held) {
                break;
            }
            dropped.push(old.key.clone());
            held = held.saturating_sub(old.bytes);
            count -= 1;
        }
        Ok(dropped)
    }

    /// The record is kept.
    async fn note(&self, record: Record, number: i64) {
        if let Some(known) = &mut *self.history.0.lock().await {
            known.kept.retain(|k| !record.dropped.contains(&k.key));
            known.kept.push(Kept { number, bytes: record.packed.bytes() as u64, tag: record.tag, key: record.key });
            known.writes += 1;
        }
    }

    /// What is kept, the oldest first: the keys alone. `number`: only that one.
    async fn kept(&self, number: Option<i64>) -> Outcome<Vec<Kept>> {
        let range = self.range();
        let answer = self
            .call(true, move |client| {
                // From the first digit to what comes behind the last one.
                let (range, end) = (format!("{range}0"), format!("{range}:"));
                let mut options =
                    GetOptions::new().with_range(end).with_keys_only().with_sort(SortTarget::Create, SortOrder::Ascend);
                if let Some(n) = number {
                    options = options.with_min_create_revision(n).with_max_create_revision(n);
                }
                Box::pin(async move { kv(&client).get(range, Some(options)).await })
            })
            .await?;
        Ok(answer.kvs().iter().filter_map(Kept::of).collect())
    }

    pub(super) async fn history_page(&self, query: &Query) -> Result<Page> {
        let failed = |e: Failure| e.into_error("revisions");
        let mut kept = self.kept(query.number).await.map_err(failed)?;
        kept.reverse();
        let Some(key) = &query.key else {
            let total = kept.len();
            let wanted: Vec<Kept> = kept.into_iter().skip(query.skip).take(query.take).collect();
            return Ok(Page { list: self.read_kept(&wanted, query.heads).await?, total });
        };
        let tag = tag_of(key);
        kept.retain(|k| k.tag == tag || k.tag == 0);
        // Tags may be shared: whether a revision is about the key shows when it is read.
        let mut list = self.read_kept(&kept, true).await?;
        list.retain(|revision| revision.concerns(key));
        let total = list.len();
        let list: Vec<Revision> = list.into_iter().skip(query.skip).take(query.take).collect();
        if query.heads {
            return Ok(Page { list, total });
        }
        kept.retain(|k| list.iter().any(|revision| revision.number == k.number));
        Ok(Page { list: self.read_kept(&kept, false).await?, total })
    }

    /// Reads revisions, in the order asked for; those that have gone meanwhile are left out.
    async fn read_kept(&self, wanted: &[Kept], heads: bool) -> Result<Vec<Revision>> {
        let mut read = Vec::with_capacity(wanted.len());
        for some in wanted.chunks(if heads { READ_AT_ONCE } else { READ_AT_ONCE / 2 }) {
            let keys = some.iter().flat_map(|k| [Some(k.key.clone()), (!heads).then(|| self.texts_key(&k.key))]);
            let gets: Vec<TxnOp> = keys.flatten().map(|key| TxnOp::get(key, None)).collect();
            let answer = self
                .call(true, move |client| {
                    let txn = Txn::new().and_then(gets.clone());
                    Box::pin(async move { kv(&client).txn(txn).await })
                })
                .await
                .map_err(|e| e.into_error("revisions"))?;
            let mut found = answer.op_responses().into_iter().map(|op| match op {
                TxnOpResponse::Get(get) => get.kvs().first().cloned(),
                _ => None,
            });
            while let Some(head) = found.next() {
                let texts = if heads { None } else { found.next().flatten() };
                let Some(head) = head else { continue };
                let number = head.create_revision();
                read.push(match heads {
                    true => Revision::decode_head(number, head.value())?,
                    false => Revision::decode(number, head.value(), texts.as_ref().map(KeyValue::value))?,
                });
            }
        }
        Ok(read)
    }
}

fn committed(batch: &Batch, found: &[Option<Entry>], revision: i64) -> Committed {
    let entry = |write: &Write, previous: Option<&Entry>| {
        write.value.as_ref().map(|value| Entry {
            key: write.key.clone(),
            value: value.clone(),
            create_revision: previous.map_or(revision, |p| p.create_revision),
            mod_revision: revision,
        })
    };
    let done = batch.writes.iter().zip(found).map(|(write, found)| (found.clone(), entry(write, found.as_ref())));
    Committed { done: done.collect(), revision, lease: None }
}
