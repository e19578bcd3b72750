//! Metrics of plugins' own: counters, gauges and histograms by name and labels.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use super::{
    cells::{Histogram, MAX_VALUE},
    lock,
    page::{Page, label_text},
};
use crate::error::{self, Error, Result};

/// A script that makes up names must not fill memory.
pub(super) const MAX_FAMILIES: usize = 256;

/// Nor one that puts what clients send into labels.
pub(super) const MAX_SERIES: usize = 10_000;

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

#[derive(Default)]
pub(super) struct Custom {
    families: Mutex<BTreeMap<String, Arc<Family>>>,
    errors: Arc<AtomicU64>,
}

/// A metric and its series.
pub struct Family {
    kind: Kind,
    help: String,
    labels: Vec<String>,
    bounds: Vec<f64>,
    series: Mutex<BTreeMap<Vec<Box<str>>, Value>>,
    errors: Arc<AtomicU64>,
}

#[derive(Default)]
struct Value {
    number: f64,
    histogram: Histogram,
}

impl Custom {
    pub fn family(&self, kind: Kind, name: &str, help: &str, labels: &[&str], bounds: &[f64]) -> Result<Arc<Family>> {
        let mut families = lock(&self.families);
        if let Some(known) = families.get(name) {
            let same = known.kind == kind && known.labels.iter().map(String::as_str).eq(labels.iter().copied());
            return if same { Ok(known.clone()) } else { Err(refused(name, "is there with other labels or kind")) };
        }
        if !is_name(name) || !labels.iter().all(|label| is_name(label)) {
            return Err(refused(name, "has a character that Prometheus does not allow in names"));
        }
        if families.len() >= MAX_FAMILIES {
            return Err(refused(name, "is one metric too many"));
        }
        let family = Arc::new(Family {
            kind,
            help: help.replace(['\n', '\r'], " "),
            labels: labels.iter().map(|l| (*l).into()).collect(),
            bounds: bounds.into(),
            series: Mutex::default(),
            errors: self.errors.clone(),
        });
        families.insert(name.into(), family.clone());
        Ok(family)
    }

    pub fn errors(&self) -> u64 {
        self.errors.load(Relaxed)
    }

    pub fn write(&self, page: &mut Page) {
        for (name, family) in lock(&self.families).iter() {
            for (values, value) in lock(&family.series).iter() {
                let labels = label_text(family.labels.iter().map(String::as_str).zip(values.iter().map(|v| &**v)));
                match family.kind {
                    Kind::Histogram => {
                        page.histogram(name, &family.help, labels, &family.bounds, value.histogram.clone())
                    }
                    kind => page.float(kind, name, &family.help, labels, value.number),
                }
            }
        }
    }
}

impl Family {
    /// Adds to a counter or gauge.
    pub fn inc(&self, values: &[&str], by: f64) {
        let allowed = by.is_finite() && (self.kind == Kind::Gauge || (self.kind == Kind::Counter && by >= 0.0));
        self.change(values, allowed, |value| value.number += by);
    }

    pub fn set(&self, values: &[&str], to: f64) {
        self.change(values, self.kind == Kind::Gauge, |value| value.number = to);
    }

    pub fn observe(&self, values: &[&str], seen: f64) {
        let allowed = self.kind == Kind::Histogram && seen.is_finite();
        self.change(values, allowed, |value| value.histogram.observe(seen, &self.bounds));
    }

    /// Forgets one series.
    pub fn remove(&self, values: &[&str]) {
        lock(&self.series).remove(&owned(values));
    }

    fn change(&self, values: &[&str], allowed: bool, change: impl FnOnce(&mut Value)) {
        let mut series = lock(&self.series);
        let key = owned(values);
        let has_room = series.len() < MAX_SERIES || series.contains_key(&key);
        if !allowed || !has_room || values.len() != self.labels.len() {
            self.errors.fetch_add(1, Relaxed);
            return;
        }
        change(series.entry(key).or_default());
    }
}

fn owned(values: &[&str]) -> Vec<Box<str>> {
    values.iter().map(|v| Box::from(cut(v))).collect()
}

/// At a character that still fits whole.
pub(super) fn cut(value: &str) -> &str {
    let fits = |end: &usize| value.is_char_boundary(*end);
    &value[..(0..=value.len().min(MAX_VALUE)).rev().find(fits).unwrap_or_default()]
}

fn is_name(name: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    !name.is_empty() && name.chars().all(fits) && !name.starts_with(|c: char| c.is_ascii_digit())
}

fn refused(name: &str, why: &str) -> Error {
    Error::new(error::Origin::Script, error::Kind::Invalid).context(format!("metric {name:?} {why}"))
}
