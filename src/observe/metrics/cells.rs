//! One worker's counts, by label values.

use std::{
    hash::BuildHasher,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use hashbrown::{DefaultHashBuilder, HashTable};
use smallvec::SmallVec;

use super::{Node, RequestSample};

/// Combinations of label values that a worker tells apart: about half a kilobyte each.
pub(super) const MAX_CELLS: usize = 20_000;

/// Further ones for samples without labels, which differ by status only.
pub(super) const MAX_BLANK: usize = 1000;

/// Cells copied under one hold of the lock: some ten microseconds.
const PART: usize = 128;

/// Longer values are cut: some come from clients.
pub(super) const MAX_VALUE: usize = 1024;

/// The models' names come from clients; APISIX cuts them here.
pub(super) const MAX_MODEL: usize = 128;

/// Where `node` stands among the values.
const NODE: usize = 5;

#[derive(Default)]
pub(super) struct Cells {
    hash: DefaultHashBuilder,
    index: HashTable<u32>,
    cells: Vec<Cell>,
    dropped: u64,
    /// The key of the sample at hand.
    scratch: Vec<u8>,
}

#[derive(Clone)]
pub(super) struct Cell {
    /// Status, then each value after its length: see `Values`.
    key: Arc<[u8]>,
    pub used: Instant,
    pub count: u64,
    pub received: u64,
    pub sent: u64,
    pub request: Histogram,
    pub upstream: Histogram,
    pub own: Histogram,
}

/// Counts between bounds, the last one without an upper bound. As many as the default has fit without allocation.
#[derive(Clone, Default)]
pub(super) struct Histogram {
    pub counts: SmallVec<[u64; 16]>,
    pub sum: f64,
}

impl Histogram {
    pub fn observe(&mut self, value: f64, bounds: &[f64]) {
        if self.counts.is_empty() {
            self.counts.resize(bounds.len() + 1, 0);
        }
        let at = bounds.iter().position(|bound| value <= *bound).unwrap_or(bounds.len());
        self.counts[at] += 1;
        self.sum += value;
    }

    pub fn add(&mut self, other: &Histogram) {
        if self.counts.len() < other.counts.len() {
            self.counts.resize(other.counts.len(), 0);
        }
        self.counts.iter_mut().zip(&other.counts).for_each(|(to, from)| *to += from);
        self.sum += other.sum;
    }
}

impl Cells {
    pub fn record(&mut self, sample: &RequestSample<'_>, blank: u32, bounds: &[f64]) {
        let mut key = std::mem::take(&mut self.scratch);
        write_key(&mut key, sample, blank);
        let mut at = self.find(&key);
        if at.is_none() && self.cells.len() >= MAX_CELLS {
            self.dropped += 1;
            write_key(&mut key, sample, u32::MAX);
            at = self.find(&key);
        }
        if at.is_none() && self.cells.len() < MAX_CELLS + MAX_BLANK {
            at = Some(self.add(Cell::new(&key, sample.now)));
        }
        self.scratch = key;
        if let Some(at) = at {
            self.cells[at].record(sample, bounds);
        }
    }

    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    pub fn part(&self, from: usize) -> Vec<Cell> {
        self.cells.iter().skip(from).take(PART).cloned().collect()
    }

    pub fn drop_idle(&mut self, idle: Duration) {
        let before = self.cells.len();
        self.cells.retain(|cell| cell.used.elapsed() <= idle);
        if before != self.cells.len() {
            self.rebuild();
        }
    }

    /// Adds another worker's counts to these. What is past the bound is dropped.
    pub fn take_all(&mut self, other: &mut Cells) {
        self.dropped += std::mem::take(&mut other.dropped);
        other.index.clear();
        for cell in other.cells.drain(..) {
            match self.find(&cell.key) {
                Some(at) => self.cells[at].merge(&cell),
                None if self.cells.len() < MAX_CELLS => {
                    self.add(cell);
                }
                None => self.dropped += cell.count,
            }
        }
    }

    fn find(&self, key: &[u8]) -> Option<usize> {
        let hash = self.hash.hash_one(key);
        self.index.find(hash, |at| *self.cells[*at as usize].key == *key).map(|at| *at as usize)
    }

    fn add(&mut self, cell: Cell) -> usize {
        let (at, hash) = (self.cells.len(), self.hash.hash_one(&*cell.key));
        self.cells.push(cell);
        let (cells, hasher) = (&self.cells, &self.hash);
        self.index.insert_unique(hash, at as u32, |at| hasher.hash_one(&*cells[*at as usize].key));
        at
    }

    fn rebuild(&mut self) {
        self.index.clear();
        for cell in std::mem::take(&mut self.cells) {
            self.add(cell);
        }
    }
}

impl Cell {
    fn new(key: &[u8], now: Instant) -> Self {
        let [request, upstream, own] = Default::default();
        Cell { key: key.into(), used: now, count: 0, received: 0, sent: 0, request, upstream, own }
    }

    fn record(&mut self, sample: &RequestSample<'_>, bounds: &[f64]) {
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        self.used = sample.now;
        self.count += 1;
        self.received += sample.bytes_received;
        self.sent += sample.bytes_sent;
        self.request.observe(ms(sample.request_time), bounds);
        if let Some(upstream) = sample.upstream_time {
            self.upstream.observe(ms(upstream), bounds);
        }
        let own = sample.request_time.saturating_sub(sample.upstream_time.unwrap_or_default());
        self.own.observe(ms(own), bounds);
    }

    fn merge(&mut self, other: &Cell) {
        self.used = self.used.max(other.used);
        self.count += other.count;
        self.received += other.received;
        self.sent += other.sent;
        self.request.add(&other.request);
        self.upstream.add(&other.upstream);
        self.own.add(&other.own);
    }

    pub fn status(&self) -> u16 {
        u16::from_le_bytes([self.key[0], self.key[1]])
    }

    /// The values of `LABELS`, then the extra ones.
    pub fn values(&self) -> Vec<String> {
        let mut rest = &self.key[2..];
        let mut values = Vec::new();
        while let Some((length, after)) = rest.split_first_chunk::<2>() {
            let (value, after) = after.split_at(usize::from(u16::from_le_bytes(*length)).min(after.len()));
            values.push(match values.len() {
                NODE => node_text(value),
                _ => String::from_utf8_lossy(value).into_owned(),
            });
            rest = after;
        }
        values
    }
}

fn write_key(key: &mut Vec<u8>, sample: &RequestSample<'_>, blank: u32) {
    key.clear();
    key.extend_from_slice(&sample.status.to_le_bytes());
    let mut value = |at: usize, value: &[u8], max: usize| {
        let value = if blank & (1 << at) != 0 { &[] } else { &value[..value.len().min(max)] };
        key.extend_from_slice(&(value.len() as u16).to_le_bytes());
        key.extend_from_slice(value);
    };
    value(0, sample.route.as_bytes(), MAX_VALUE);
    value(1, sample.matched_uri.as_bytes(), MAX_VALUE);
    value(2, sample.matched_host.as_bytes(), MAX_VALUE);
    value(3, sample.service.as_bytes(), MAX_VALUE);
    value(4, sample.consumer.as_bytes(), MAX_VALUE);
    match sample.node {
        Node::None => value(NODE, &[], 0),
        // A tag tells four bytes of an address from a name of four letters.
        Node::Ip(IpAddr::V4(ip)) => value(NODE, &tagged::<5>(&ip.octets()), MAX_VALUE),
        Node::Ip(IpAddr::V6(ip)) => value(NODE, &tagged::<17>(&ip.octets()), MAX_VALUE),
        Node::Name(name) => value(NODE, name.as_bytes(), MAX_VALUE),
    }
    value(6, sample.request_type.as_bytes(), MAX_VALUE);
    value(7, sample.request_llm_model.as_bytes(), MAX_MODEL);
    value(8, sample.llm_model.as_bytes(), MAX_MODEL);
    value(9, sample.response_source.as_bytes(), MAX_VALUE);
    for extra in sample.extra {
        // All extra labels go together, by a bit that no label has.
        value(31, extra, MAX_VALUE);
    }
}

/// A name cannot start with this byte.
const IP: u8 = 0;

fn tagged<const N: usize>(octets: &[u8]) -> [u8; N] {
    let mut out = [IP; N];
    out[1..].copy_from_slice(octets);
    out
}

fn node_text(value: &[u8]) -> String {
    let ip = value.strip_prefix(&[IP]).and_then(|octets| match octets.len() {
        4 => <[u8; 4]>::try_from(octets).ok().map(IpAddr::from),
        _ => <[u8; 16]>::try_from(octets).ok().map(IpAddr::from),
    });
    ip.map_or_else(|| String::from_utf8_lossy(value).into_owned(), |ip| ip.to_string())
}
