//! Metrics of plugins' own: counters, gauges and histograms by name and labels.
//!
//! All VMs of the process count into the same ones. Those of the gateway's own page, and pages of plugins' own beside it, each with a name.

use std::sync::{
    Arc, Mutex, RwLock,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use hashbrown::HashMap;
use smallvec::SmallVec;

use super::{
    cells::{Histogram, MAX_VALUE},
    lock,
    page::{Page, label_text},
};
use crate::error::{self, Error, Result};

/// Of all pages: a script that makes up names must not fill memory.
pub(super) const MAX_FAMILIES: usize = 256;

/// Of one family. Nor one that puts what clients send into labels.
pub(super) const MAX_SERIES: usize = 10_000;

/// Of one family.
pub(super) const MAX_LABELS: usize = 32;

/// Of one histogram: each is a number in every series.
pub(super) const MAX_BOUNDS: usize = 128;

/// The page of the gateway's own metrics.
pub const OWN_PAGE: &str = "";

/// What the gateway's own page has without plugins.
const TAKEN: [&str; 14] = [
    "bandwidth",
    "batch_process_entries",
    "etcd_modify_indexes",
    "etcd_reachable",
    "http_latency",
    "http_requests_total",
    "http_status",
    "metric_series_dropped_total",
    "nginx_http_current_connections",
    "nginx_metric_errors_total",
    "node_info",
    "shared_dict_capacity_bytes",
    "shared_dict_free_space_bytes",
    "upstream_status",
];

/// And what begins so.
const TAKEN_BY: [&str; 2] = ["function_", "stream_"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Counter,
    Gauge,
    Histogram,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        }
    }
}

/// What a metric is.
#[derive(Debug, PartialEq)]
pub struct Definition {
    pub kind: Kind,
    pub help: String,
    pub labels: Vec<String>,
    /// A histogram's upper bounds, ascending, without infinity.
    pub bounds: Vec<f64>,
}

/// What is done to one series.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Change {
    /// Adds to a counter or gauge.
    Inc(f64),
    /// Sets a gauge.
    Set(f64),
    /// Counts in a histogram.
    Observe(f64),
    /// Forgets the series.
    Remove,
}

#[derive(Default)]
pub(super) struct Custom {
    families: RwLock<Vec<Arc<Family>>>,
    errors: AtomicU64,
}

/// A metric and its series.
pub struct Family {
    page: Box<str>,
    name: Box<str>,
    definition: Definition,
    /// By their values: see `key`.
    series: Mutex<HashMap<Vec<u8>, Value>>,
}

#[derive(Default)]
struct Value {
    number: f64,
    histogram: Histogram,
}

impl Custom {
    /// The number of a metric, which is made when there is none of that name. One that is defined anew with other labels or of another kind,
    /// as by the next version of a plugin, starts again.
    pub fn define(&self, page: &str, name: &str, definition: Definition) -> Result<usize> {
        check(name, &definition)?;
        let mut families = self.families.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        let at = families.iter().position(|known| *known.page == *page && *known.name == *name);
        if let Some(at) = at.filter(|at| families[*at].definition.is_like(&definition)) {
            return Ok(at);
        }
        if at.is_none() && families.len() >= MAX_FAMILIES {
            return Err(refused(name, &format!("is one too many: there are {MAX_FAMILIES}")));
        }
        let (page, help) = (page.into(), definition.help.replace(['\n', '\r'], " "));
        let definition = Definition { help, ..definition };
        let family = Arc::new(Family { page, name: name.into(), definition, series: Mutex::default() });
        match at {
            Some(at) => families[at] = family,
            None => families.push(family),
        }
        Ok(at.unwrap_or(families.len() - 1))
    }

    /// Changes the series with these values of a metric; why it does not, which is counted.
    pub fn change(&self, number: usize, values: &[&[u8]], change: Change) -> std::result::Result<(), String> {
        let changed = self.family(number).and_then(|family| family.change(values, change));
        if changed.is_err() {
            self.errors.fetch_add(1, Relaxed);
        }
        changed
    }

    /// Forgets all series of a metric.
    pub fn reset(&self, number: usize) {
        if let Ok(family) = self.family(number) {
            lock(&family.series).clear();
        }
    }

    pub fn errors(&self) -> u64 {
        self.errors.load(Relaxed)
    }

    /// Writes the metrics of the page with that name.
    pub fn write(&self, name: &str, page: &mut Page) {
        let families = self.all();
        families.iter().filter(|family| *family.page == *name).for_each(|family| family.write(page));
    }

    fn all(&self) -> Vec<Arc<Family>> {
        self.families.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    pub fn family(&self, number: usize) -> std::result::Result<Arc<Family>, String> {
        let families = self.families.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        families.get(number).cloned().ok_or_else(|| format!("there is no metric {number}"))
    }
}

impl Definition {
    fn is_like(&self, other: &Definition) -> bool {
        self.kind == other.kind && self.labels == other.labels && self.bounds == other.bounds
    }
}

impl Family {
    pub fn change(&self, values: &[&[u8]], change: Change) -> std::result::Result<(), String> {
        let told = |why: &str| Err(format!("{}: {why}", self.name));
        let expected = self.definition.labels.len();
        if values.len() != expected {
            return told(&format!("inconsistent labels count, expected {expected}, got {}", values.len()));
        }
        if let Err(why) = self.allows(change) {
            return told(why);
        }
        let key = key(values);
        let mut series = lock(&self.series);
        if change == Change::Remove {
            series.remove(&key[..]);
            return Ok(());
        }
        if series.len() >= MAX_SERIES && !series.contains_key(&key[..]) {
            return told(&format!("there are {MAX_SERIES} series"));
        }
        let value = series.entry_ref(&key[..]).or_default();
        match change {
            Change::Inc(by) => value.number += by,
            Change::Set(to) => value.number = to,
            Change::Observe(seen) => value.histogram.observe(seen, &self.definition.bounds),
            Change::Remove => {}
        }
        Ok(())
    }

    fn allows(&self, change: Change) -> std::result::Result<(), &'static str> {
        let kind = self.definition.kind;
        match change {
            Change::Inc(n) | Change::Set(n) | Change::Observe(n) if !n.is_finite() => Err("the value is no number"),
            Change::Inc(by) if kind == Kind::Counter && by < 0.0 => Err("the value of a counter does not fall"),
            Change::Inc(_) if kind == Kind::Histogram => Err("a histogram has no inc"),
            Change::Set(_) if kind != Kind::Gauge => Err("only gauges have set"),
            Change::Observe(_) if kind != Kind::Histogram => Err("only histograms have observe"),
            _ => Ok(()),
        }
    }

    fn write(&self, page: &mut Page) {
        let (name, definition) = (&*self.name, &self.definition);
        for (key, value) in lock(&self.series).iter() {
            let values: Vec<_> = key.split(|b| *b == END).map(String::from_utf8_lossy).collect();
            let labels = label_text(definition.labels.iter().map(String::as_str).zip(values.iter().map(|v| &**v)));
            match definition.kind {
                Kind::Histogram => {
                    page.histogram(name, &definition.help, labels, &definition.bounds, value.histogram.clone());
                }
                kind => page.float(kind, name, &definition.help, labels, value.number),
            }
        }
    }
}

/// No byte of UTF-8: values are cut there when they have one.
const END: u8 = 0xff;

/// The values, with an end behind each.
fn key(values: &[&[u8]]) -> SmallVec<[u8; 128]> {
    let mut key = SmallVec::new();
    for value in values {
        let end = value.iter().position(|b| *b == END).unwrap_or(value.len()).min(MAX_VALUE);
        key.extend_from_slice(&value[..whole(value, end)]);
        key.push(END);
    }
    key
}

/// Where a character ends, at most at `end`.
fn whole(text: &[u8], end: usize) -> usize {
    let is_inside = |at: &usize| text.get(*at).is_some_and(|b| b & 0xc0 == 0x80);
    // A character has four bytes at most; what has more is no text.
    (0..=end).rev().take(4).find(|at| !is_inside(at)).unwrap_or(end)
}

/// Whether a script may have a metric of that name on that page.
pub(super) fn is_free(page: &str, name: &str) -> Result<()> {
    let is_taken = page == OWN_PAGE && (TAKEN.contains(&name) || TAKEN_BY.iter().any(|by| name.starts_with(by)));
    if is_taken { Err(refused(name, "is one of the gateway's own")) } else { Ok(()) }
}

fn check(name: &str, definition: &Definition) -> Result<()> {
    let labels = &definition.labels;
    let ascends =
        definition.bounds.iter().is_sorted_by(|a, b| a < b) && definition.bounds.iter().all(|b| b.is_finite());
    let why = if !is_name(name) || !labels.iter().all(|label| is_name(label) && !label.contains(':')) {
        "has a character that Prometheus does not allow in names"
    } else if labels.len() > MAX_LABELS {
        "has more than 32 labels"
    } else if labels.iter().enumerate().any(|(at, label)| label == "le" || labels[..at].contains(label)) {
        "has a label twice, or one that histograms have by themselves (le)"
    } else if definition.kind == Kind::Histogram && (definition.bounds.is_empty() || !ascends) {
        "has bounds that are not ascending numbers"
    } else if definition.bounds.len() > MAX_BOUNDS {
        "has more than 128 bounds"
    } else {
        return Ok(());
    };
    Err(refused(name, why))
}

/// At a character that still fits whole.
pub(super) fn cut(value: &str) -> &str {
    &value[..whole(value.as_bytes(), value.len().min(MAX_VALUE))]
}

fn is_name(name: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    !name.is_empty()
        && name.len() <= MAX_VALUE
        && name.chars().all(fits)
        && !name.starts_with(|c: char| c.is_ascii_digit())
}

fn refused(name: &str, why: &str) -> Error {
    Error::new(error::Origin::Script, error::Kind::Invalid).context(format!("metric {name:?} {why}"))
}
