//! Counters behind the prometheus plugin, with APISIX's names, labels and help texts.
//!
//! Each worker counts into its own store under a lock that only a scrape ever contends for, and a scrape holds it for some
//! microseconds at a time. A sample costs one hash lookup by its label values. Series are bounded: what comes after the
//! bound is counted without its labels, so totals stay right, and `metric_series_dropped_total` says how often.

mod cells;
mod custom;
mod page;
mod serve;
mod settings;
mod streams;
mod waiting;

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use self::{
    cells::{Cell, Cells},
    custom::Custom,
};
pub use self::{
    custom::{Change, Definition, Family, Kind, OWN_PAGE},
    page::Page,
    serve::serve,
    settings::{Extra, Settings},
    streams::{Active, Ends, Listening},
};
use super::functions;

/// Everything that is counted in this process.
pub struct Metrics {
    settings: Settings,
    workers: Mutex<Vec<Arc<Worker>>>,
    /// What workers that have ended counted.
    ended: Arc<Worker>,
    custom: Custom,
    listeners: streams::Listeners,
    waiting: waiting::Waiting,
    sources: Mutex<Vec<Source>>,
    disabled: Arc<Disabled>,
}

/// Adds what it knows to a page when it is asked for one.
pub type Source = Box<dyn Fn(&mut Page) + Send + Sync>;

/// One worker's counters.
#[derive(Default)]
struct Worker {
    cells: Mutex<Cells>,
    connections: Connections,
}

/// Which labels are blank, as bits of `Label`.
#[derive(Default)]
struct Disabled {
    status: AtomicU32,
    latency: AtomicU32,
    bandwidth: AtomicU32,
    /// In all three: they need not tell series apart.
    everywhere: AtomicU32,
}

/// The three metrics of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    Status,
    Latency,
    Bandwidth,
}

/// The labels of a request's metrics, `code` and `type` apart, in their order.
const LABELS: [&str; 10] = [
    "route",
    "matched_uri",
    "matched_host",
    "service",
    "consumer",
    "node",
    "request_type",
    "request_llm_model",
    "llm_model",
    "response_source",
];

/// The labels that only `http_status` has.
const STATUS_ONLY: u32 = 1 << 1 | 1 << 2 | 1 << 9;

/// What a request adds. Borrowed texts: they are copied when a series is new.
#[derive(Clone, Debug)]
pub struct RequestSample<'a> {
    pub status: u16,
    /// Id or, with `prefer_name`, name. Empty: no route.
    pub route: &'a str,
    pub matched_uri: &'a str,
    pub matched_host: &'a str,
    pub service: &'a str,
    pub consumer: &'a str,
    pub node: Node<'a>,
    /// `traditional_http`, `ai_chat`, `ai_stream`.
    pub request_type: &'a str,
    pub request_llm_model: &'a str,
    pub llm_model: &'a str,
    /// `apisix`, `nginx` or `upstream`.
    pub response_source: &'a str,
    /// The values of `Settings::extra`, in its order.
    pub extra: &'a [&'a [u8]],
    /// From the first byte of the request to the last of the response.
    pub request_time: Duration,
    /// Time spent waiting for the upstream.
    pub upstream_time: Option<Duration>,
    pub bytes_received: u64,
    pub bytes_sent: u64,
    pub now: Instant,
}

#[derive(Clone, Copy, Debug)]
pub enum Node<'a> {
    None,
    Ip(IpAddr),
    Name(&'a str),
}

/// A worker's handle. Not shared: made by `Metrics::recorder` for each worker.
pub struct Recorder {
    metrics: Arc<Metrics>,
    worker: Arc<Worker>,
}

/// Client connections of one worker, which alone counts them: others only read, so no count needs a locked operation.
#[derive(Default)]
pub struct Connections {
    accepted: AtomicU64,
    active: AtomicU64,
    writing: AtomicU64,
    requests: AtomicU64,
}

impl Connections {
    pub fn opened(&self) {
        add(&self.accepted, 1);
        add(&self.active, 1);
    }

    pub fn closed(&self) {
        add(&self.active, -1);
    }

    pub fn request_started(&self) {
        add(&self.requests, 1);
        add(&self.writing, 1);
    }

    pub fn request_ended(&self) {
        add(&self.writing, -1);
    }
}

/// For a count with one writer.
fn add(count: &AtomicU64, n: i64) {
    count.store(count.load(Relaxed).wrapping_add_signed(n), Relaxed);
}

impl Recorder {
    pub fn record(&self, sample: &RequestSample<'_>) {
        let blank = self.metrics.disabled.everywhere.load(Relaxed);
        lock(&self.worker.cells).record(sample, blank, &self.metrics.settings.buckets);
    }

    pub fn connections(&self) -> &Connections {
        &self.worker.connections
    }

    pub fn settings(&self) -> &Settings {
        &self.metrics.settings
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.metrics.retire(&self.worker);
    }
}

static PROCESS: OnceLock<Arc<Metrics>> = OnceLock::new();

/// The process's metrics, once it serves: what scripts add to and scrape.
pub fn process() -> Option<&'static Arc<Metrics>> {
    PROCESS.get()
}

impl Metrics {
    /// Makes these the process's. Only the first ones become it.
    pub fn install(self: &Arc<Self>) {
        let _ = PROCESS.set(self.clone());
    }

    pub fn new(settings: Settings) -> Arc<Self> {
        Arc::new(Metrics {
            settings,
            workers: Default::default(),
            ended: Default::default(),
            custom: Custom::default(),
            listeners: Default::default(),
            waiting: Default::default(),
            sources: Default::default(),
            disabled: Default::default(),
        })
    }

    pub fn recorder(self: &Arc<Self>) -> Recorder {
        let worker = Arc::new(Worker::default());
        lock(&self.workers).push(worker.clone());
        Recorder { metrics: self.clone(), worker }
    }

    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Has `source` asked at each scrape: for gauges that something else knows.
    pub fn add_source(&self, source: Source) {
        lock(&self.sources).push(source);
    }

    /// A metric of the gateway's that is counted by labels, made on first use. `name` goes without the prefix.
    pub fn counter(&self, name: &str, help: &str, labels: &[&str]) -> crate::error::Result<Arc<Family>> {
        let labels = labels.iter().map(|label| (*label).to_owned()).collect();
        let definition = Definition { kind: Kind::Counter, help: help.to_owned(), labels, bounds: Vec::new() };
        let number = self.custom.define(OWN_PAGE, name, definition)?;
        self.custom.family(number).map_err(crate::error::Error::script)
    }

    /// The number of a script's own metric on the page with that name; that of the gateway's own page is empty, and its names go without
    /// the prefix. One that is defined anew with other labels or of another kind starts again.
    pub fn define(&self, page: &str, name: &str, definition: Definition) -> crate::error::Result<usize> {
        custom::is_free(page, name)?;
        self.custom.define(page, name, definition)
    }

    /// Changes a series of a script's own metric; why it does not, which is counted in `nginx_metric_errors_total`.
    pub fn change(&self, number: usize, values: &[&[u8]], change: Change) -> Result<(), String> {
        self.custom.change(number, values, change)
    }

    /// Forgets all series of a script's own metric.
    pub fn reset(&self, number: usize) {
        self.custom.reset(number);
    }

    /// Writes a page of scripts' own, as `scrape`.
    pub fn page(&self, name: &str, out: &mut String) {
        let mut page = Page::new("");
        self.custom.write(name, &mut page);
        page.write(out);
    }

    /// The counts of a listener of streams.
    pub fn listening(&self, addr: SocketAddr) -> Arc<Listening> {
        self.listeners.at(addr)
    }

    /// Where the entries that wait in a batch processor of this name, route and address are counted; `None`: there are too many.
    pub fn waiting_slot(&self, name: &str, route_id: &str, server_addr: &str) -> Option<usize> {
        self.waiting.slot([name, route_id, server_addr])
    }

    /// So many more entries wait there, or, below 0, fewer. False: the slot went to another meanwhile, as nothing had waited in it.
    pub fn add_waiting(&self, slot: usize, entries: i64) -> bool {
        self.waiting.add(slot, entries)
    }

    /// `disabled_labels` of the plugin's metadata; `None` when it has none.
    pub fn disable_labels(&self, metadata: Option<&serde_json::Value>) {
        let mask = |metric: &str| {
            let names = metadata.and_then(|m| m["disabled_labels"][metric].as_array());
            let names = names.into_iter().flatten().filter_map(|name| name.as_str());
            names.filter_map(|name| LABELS.iter().position(|l| *l == name)).fold(0, |mask, at| mask | 1 << at)
        };
        let (status, latency, bandwidth) = (mask("http_status"), mask("http_latency"), mask("bandwidth"));
        self.disabled.status.store(status, Relaxed);
        self.disabled.latency.store(latency, Relaxed);
        self.disabled.bandwidth.store(bandwidth, Relaxed);
        let everywhere = status & (latency | STATUS_ONLY) & (bandwidth | STATUS_ONLY);
        self.disabled.everywhere.store(everywhere, Relaxed);
    }

    /// Writes everything in Prometheus' text format. Takes milliseconds with thousands of series: not for a data thread.
    pub fn scrape(&self, out: &mut String) {
        let mut page = Page::new(&self.settings.prefix);
        self.requests(&mut page);
        self.connections(&mut page);
        self.custom.write(OWN_PAGE, &mut page);
        self.listeners.write(&mut page);
        self.waiting.write(&mut page);
        functions::write(&mut page);
        for source in lock(&self.sources).iter() {
            source(&mut page);
        }
        page.write(out);
    }

    fn all_workers(&self) -> Vec<Arc<Worker>> {
        let workers = lock(&self.workers);
        workers.iter().chain([&self.ended]).cloned().collect()
    }

    fn requests(&self, page: &mut Page) {
        let mut merged = page::Requests::new(&self.settings, &self.disabled);
        let mut dropped = 0;
        for worker in self.all_workers() {
            dropped += lock(&worker.cells).dropped();
            let mut from = 0;
            loop {
                // In parts, so that the worker waits no longer than it takes to copy one.
                let part: Vec<Cell> = lock(&worker.cells).part(from);
                if part.is_empty() {
                    break;
                }
                from += part.len();
                part.iter().for_each(|cell| merged.add(cell));
            }
            if let Some(idle) = self.settings.expires() {
                lock(&worker.cells).drop_idle(idle);
            }
        }
        merged.write(page);
        let errors = self.custom.errors() + self.waiting.refused();
        page.counter("metric_series_dropped_total", "Samples counted without labels for want of series", &[], dropped);
        page.counter("nginx_metric_errors_total", "Number of nginx-lua-prometheus errors", &[], errors);
    }

    fn connections(&self, page: &mut Page) {
        let (mut accepted, mut active, mut writing, mut requests) = (0, 0, 0, 0);
        for worker in self.all_workers() {
            let c = &worker.connections;
            accepted += c.accepted.load(Relaxed);
            active += c.active.load(Relaxed);
            writing += c.writing.load(Relaxed);
            requests += c.requests.load(Relaxed);
        }
        let states = [
            ("accepted", accepted),
            ("active", active),
            ("handled", accepted),
            // A head is read in one go: the moment is too short to count.
            ("reading", 0),
            ("waiting", active.saturating_sub(writing)),
            ("writing", writing),
        ];
        for (state, count) in states {
            let (name, help) = ("nginx_http_current_connections", "Number of HTTP connections");
            page.gauge(name, help, &[("state", state)], count as f64);
        }
        let help = "The total number of client requests since APISIX started";
        page.gauge("http_requests_total", help, &[], requests as f64);
    }

    /// Keeps what a worker counted when it ends.
    fn retire(&self, worker: &Arc<Worker>) {
        lock(&self.workers).retain(|w| !Arc::ptr_eq(w, worker));
        lock(&self.ended.cells).take_all(&mut lock(&worker.cells));
        let (from, to) = (&worker.connections, &self.ended.connections);
        to.accepted.fetch_add(from.accepted.load(Relaxed), Relaxed);
        to.requests.fetch_add(from.requests.load(Relaxed), Relaxed);
    }
}

/// A panic elsewhere does not end the counting.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
