//! A page in Prometheus' text format: families by name, series by labels.

use std::{
    collections::BTreeMap,
    fmt::Write,
    sync::atomic::Ordering::Relaxed,
    time::{Duration, Instant},
};

use super::{
    Disabled, LABELS, Metric, STATUS_ONLY, Settings,
    cells::{Cell, Histogram},
    custom::Kind,
};

pub struct Page {
    prefix: String,
    families: BTreeMap<String, Family>,
}

struct Family {
    help: String,
    kind: Kind,
    /// By labels as text, so that equal ones meet and the order is the same at every scrape.
    series: BTreeMap<String, Value>,
}

#[derive(Clone)]
enum Value {
    Integer(u64),
    Float(f64),
    Histogram { bounds: Vec<f64>, counts: Histogram },
}

impl Page {
    pub(super) fn new(prefix: &str) -> Self {
        Page { prefix: prefix.into(), families: BTreeMap::new() }
    }

    pub fn gauge(&mut self, name: &str, help: &str, labels: &[(&str, &str)], value: f64) {
        self.put(Kind::Gauge, name, help, label_text(labels.iter().copied()), Value::Float(value));
    }

    pub fn counter(&mut self, name: &str, help: &str, labels: &[(&str, &str)], value: u64) {
        self.put(Kind::Counter, name, help, label_text(labels.iter().copied()), Value::Integer(value));
    }

    pub(super) fn float(&mut self, kind: Kind, name: &str, help: &str, labels: String, value: f64) {
        self.put(kind, name, help, labels, Value::Float(value));
    }

    pub(super) fn histogram(&mut self, name: &str, help: &str, labels: String, bounds: &[f64], counts: Histogram) {
        self.put(Kind::Histogram, name, help, labels, Value::Histogram { bounds: bounds.into(), counts });
    }

    /// `counts`: between the bounds, the last one above them all.
    pub fn histogram_of(
        &mut self,
        name: &str,
        help: &str,
        labels: &[(&str, &str)],
        bounds: &[f64],
        counts: &[u64],
        sum: f64,
    ) {
        let counts = Histogram { counts: counts.into(), sum };
        self.histogram(name, help, label_text(labels.iter().copied()), bounds, counts);
    }

    fn put(&mut self, kind: Kind, name: &str, help: &str, labels: String, value: Value) {
        let new = || Family { help: help.into(), kind, series: BTreeMap::new() };
        let family = self.families.entry(format!("{}{name}", self.prefix)).or_insert_with(new);
        family.series.insert(labels, value);
    }

    pub(super) fn write(&self, out: &mut String) {
        for (name, family) in &self.families {
            // Writing into a String cannot fail.
            let _ = writeln!(out, "# HELP {name} {}\n# TYPE {name} {}", family.help, family.kind.name());
            for (labels, value) in &family.series {
                let _ = value.write(name, labels, out);
            }
        }
    }
}

impl Value {
    fn write(&self, name: &str, labels: &str, out: &mut String) -> std::fmt::Result {
        let braces = if labels.is_empty() { String::new() } else { format!("{{{labels}}}") };
        match self {
            Value::Integer(value) => writeln!(out, "{name}{braces} {value}"),
            Value::Float(value) => writeln!(out, "{name}{braces} {value}"),
            Value::Histogram { bounds, counts } => {
                let comma = if labels.is_empty() { "" } else { "," };
                let mut total = 0;
                for (at, count) in counts.counts.iter().enumerate() {
                    total += count;
                    match bounds.get(at) {
                        Some(bound) => writeln!(out, "{name}_bucket{{{labels}{comma}le=\"{bound}\"}} {total}")?,
                        None => writeln!(out, "{name}_bucket{{{labels}{comma}le=\"+Inf\"}} {total}")?,
                    }
                }
                writeln!(out, "{name}_count{braces} {total}")?;
                writeln!(out, "{name}_sum{braces} {}", counts.sum)
            }
        }
    }
}

pub(super) fn label_text<'a>(labels: impl Iterator<Item = (&'a str, &'a str)>) -> String {
    let mut text = String::new();
    for (name, value) in labels {
        if !text.is_empty() {
            text.push(',');
        }
        text.push_str(name);
        text.push_str("=\"");
        for c in value.chars() {
            match c {
                '\\' => text.push_str("\\\\"),
                '"' => text.push_str("\\\""),
                '\n' => text.push_str("\\n"),
                c => text.push(c),
            }
        }
        text.push('"');
    }
    text
}

/// The metrics of requests, all workers' together.
pub(super) struct Requests<'a> {
    settings: &'a Settings,
    blank: [u32; 3],
    status: BTreeMap<String, u64>,
    bandwidth: BTreeMap<String, u64>,
    latency: BTreeMap<String, Histogram>,
}

impl<'a> Requests<'a> {
    pub fn new(settings: &'a Settings, disabled: &Disabled) -> Self {
        let blank = [&disabled.status, &disabled.latency, &disabled.bandwidth].map(|mask| mask.load(Relaxed));
        Requests { settings, blank, status: BTreeMap::new(), bandwidth: BTreeMap::new(), latency: BTreeMap::new() }
    }

    pub fn add(&mut self, cell: &Cell) {
        let values = cell.values();
        let idle = Instant::now().saturating_duration_since(cell.used);
        if self.shows(Metric::Status, idle) {
            let code = cell.status().to_string();
            *self.status.entry(self.labels(Metric::Status, ("code", &code), &values)).or_default() += cell.count;
        }
        if self.shows(Metric::Bandwidth, idle) {
            for (kind, bytes) in [("egress", cell.sent), ("ingress", cell.received)] {
                *self.bandwidth.entry(self.labels(Metric::Bandwidth, ("type", kind), &values)).or_default() += bytes;
            }
        }
        if self.shows(Metric::Latency, idle) {
            for (kind, times) in [("apisix", &cell.own), ("request", &cell.request), ("upstream", &cell.upstream)] {
                if !times.counts.is_empty() {
                    self.latency.entry(self.labels(Metric::Latency, ("type", kind), &values)).or_default().add(times);
                }
            }
        }
    }

    pub fn write(self, page: &mut Page) {
        for (labels, value) in self.status {
            let help = "HTTP status codes per service in APISIX";
            page.put(Kind::Counter, "http_status", help, labels, Value::Integer(value));
        }
        for (labels, value) in self.bandwidth {
            let help = "Total bandwidth in bytes consumed per service in Apisix";
            page.put(Kind::Counter, "bandwidth", help, labels, Value::Integer(value));
        }
        for (labels, counts) in self.latency {
            let help = "HTTP request latency in milliseconds per service in APISIX";
            page.histogram("http_latency", help, labels, &self.settings.buckets, counts);
        }
    }

    fn shows(&self, metric: Metric, idle: Duration) -> bool {
        let expire = self.settings.expire[metric as usize];
        expire.is_zero() || idle <= expire
    }

    fn labels(&self, metric: Metric, first: (&str, &str), values: &[String]) -> String {
        let absent = if metric == Metric::Status { 0 } else { STATUS_ONLY };
        let blank = self.blank[metric as usize];
        let has = |mask: u32, at: usize| mask & (1 << at) != 0;
        let own = LABELS.iter().zip(values).enumerate().filter(|(at, _)| !has(absent, *at));
        let own = own.map(|(at, (name, value))| (*name, if has(blank, at) { "" } else { &**value }));
        let extra = self.settings.extra.iter().zip(values.get(LABELS.len()..).unwrap_or_default());
        let extra = extra.filter(|(e, _)| e.metric == metric).map(|(e, value)| (&*e.label, &**value));
        label_text([first].into_iter().chain(own).chain(extra))
    }
}
