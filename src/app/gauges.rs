//! What a scrape tells beside counters: the node, the store of configuration, shared memory. Asked for when somebody scrapes.

use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;

use crate::{
    admin::APISIX_VERSION,
    exchange::hostname,
    health::Health,
    model::{Kind, Object},
    observe::metrics::{Metrics, Page},
    shdict,
    store::{Published, Snapshot, SourceState},
};

/// Has `metrics` tell of them.
pub fn add(metrics: &Metrics, published: Arc<Published>, source: Arc<SourceState>) {
    metrics.add_source(Box::new(node));
    metrics.add_source(Box::new(dictionaries));
    let indexes = Indexes::default();
    metrics.add_source(Box::new(move |page| {
        let source = source.load();
        // As in APISIX, a file has none of this. The embedded store has what etcd has: revisions, and a way to be lost.
        if matches!(source.name, "etcd" | "embedded") {
            let help = "Config server etcd reachable from APISIX, 0 is unreachable";
            page.gauge("etcd_reachable", help, &[], if source.connected { 1.0 } else { 0.0 });
            indexes.write(page, &published.load(), source.revision);
        }
    }));
}

/// Has `metrics` tell which nodes are up, of upstreams with checks that have served requests.
pub fn add_health(metrics: &Metrics, health: Arc<Health>) {
    metrics.add_source(Box::new(move |page| {
        for checker in health.list() {
            for node in checker["nodes"].as_array().into_iter().flatten() {
                upstream_status(page, &checker["name"], node);
            }
        }
    }));
}

fn upstream_status(page: &mut Page, name: &Value, node: &Value) {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let (name, ip, port) = (text(name), text(&node["ip"]), text(&node["port"]));
    // `mostly_healthy` has failed lately, and still gets requests.
    let up = matches!(node["status"].as_str(), Some("healthy" | "mostly_healthy"));
    let labels = [("name", &*name), ("ip", &*ip), ("port", &*port)];
    page.gauge("upstream_status", "upstream status from health check", &labels, if up { 1.0 } else { 0.0 });
}

fn node(page: &mut Page) {
    let labels = [("hostname", hostname()), ("version", APISIX_VERSION)];
    page.gauge("node_info", "Info of APISIX node", &labels, 1.0);
}

fn dictionaries(page: &mut Page) {
    for dict in shdict::store().all() {
        let labels = [("name", dict.name())];
        let help = "The capacity of each nginx shared DICT since APISIX start";
        page.gauge("shared_dict_capacity_bytes", help, &labels, dict.capacity() as f64);
        let help = "The free space of each nginx shared DICT since APISIX start";
        page.gauge("shared_dict_free_space_bytes", help, &labels, dict.free_space() as f64);
    }
}

/// The kinds that APISIX tells of.
const KINDS: [Kind; 8] = [
    Kind::Consumer,
    Kind::GlobalRule,
    Kind::Proto,
    Kind::Route,
    Kind::Service,
    Kind::Ssl,
    Kind::StreamRoute,
    Kind::Upstream,
];

/// The highest revision of each kind's objects, kept for the snapshot of that version: a look at all of them takes a while.
#[derive(Default)]
struct Indexes(Mutex<Option<(u64, [i64; KINDS.len()])>>);

impl Indexes {
    /// `seen`: the last revision that the store has told of.
    fn write(&self, page: &mut Page, snapshot: &Snapshot, seen: i64) {
        let highest = self.of(snapshot);
        let mut put = |key: &str, index: i64| {
            page.gauge("etcd_modify_indexes", "Etcd modify index for APISIX keys", &[("key", key)], index as f64);
        };
        for (kind, index) in KINDS.iter().zip(highest) {
            put(kind.plural(), index);
        }
        put("max_modify_index", highest.into_iter().max().unwrap_or(0));
        put("prev_index", snapshot.revision);
        put("x_etcd_index", seen.max(snapshot.revision));
    }

    fn of(&self, snapshot: &Snapshot) -> [i64; KINDS.len()] {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, highest)) = kept.filter(|(version, _)| *version == snapshot.version) {
            return highest;
        }
        let highest = KINDS.map(|kind| highest(snapshot, kind));
        *kept = Some((snapshot.version, highest));
        highest
    }
}

/// 0: there is no object of the kind.
fn highest(s: &Snapshot, kind: Kind) -> i64 {
    match kind {
        Kind::Consumer => last(s.consumers.values()).max(last(s.credentials.values())),
        Kind::GlobalRule => last(s.global_rules.iter()),
        Kind::Route => last(s.routes.values()),
        Kind::Service => last(s.services.values()),
        Kind::Ssl => last(s.ssls.values()),
        Kind::StreamRoute => last(s.stream_routes.values()),
        Kind::Upstream => last(s.upstreams.values()),
        _ => last(s.others.iter().filter(|((other, _), _)| *other == kind).map(|(_, object)| object)),
    }
}

fn last<'a, T: 'a>(objects: impl Iterator<Item = &'a Arc<Object<T>>>) -> i64 {
    objects.map(|object| object.mod_revision).max().unwrap_or(0)
}
