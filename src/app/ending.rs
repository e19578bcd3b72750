//! What is left of a request when it is over: its counters and its line in access.log.

use std::{cell::RefCell, sync::Arc, time::Instant};

use smallvec::SmallVec;

use crate::{
    conf,
    exchange::{Exchange, Source, Var},
    observe::log::LogFile,
    observe::metrics::{Metrics, Node, Recorder, RequestSample},
    plugin::Runner,
    proxy::{self, access_log::AccessLog},
};

/// What all workers count and log into.
#[derive(Clone)]
pub struct Endings {
    pub metrics: Arc<Metrics>,
    /// Its format and its file, which all workers write to.
    pub access_log: Option<(conf::AccessLog, LogFile)>,
}

impl Endings {
    pub fn of_worker(&self) -> Ending {
        let recorder = self.metrics.recorder();
        let extra = recorder.settings().extra.iter().map(|label| Var::parse(&label.variable)).collect();
        let access_log = self.access_log.as_ref().map(|(format, file)| AccessLog::new(format, file.clone()));
        Ending { recorder, access_log, extra, scratch: RefCell::default() }
    }
}

/// One worker's.
pub struct Ending {
    recorder: Recorder,
    access_log: Option<AccessLog>,
    /// The variables of `extra_labels`.
    extra: Vec<Var>,
    scratch: RefCell<Vec<u8>>,
}

impl proxy::Ending for Ending {
    fn ended(&self, x: &Exchange, runner: &Runner) {
        if let Some(prefer_name) = runner.prometheus(x) {
            self.count(x, prefer_name);
        }
        if let Some(log) = &self.access_log {
            log.log(x);
        }
    }

    fn flush(&self) {
        if let Some(log) = &self.access_log {
            log.flush();
        }
    }
}

impl Ending {
    fn count(&self, x: &Exchange, prefer_name: bool) {
        let values = self.extra_values(x);
        let extra: SmallVec<[&[u8]; 8]> = values.iter().map(Vec::as_slice).collect();
        let now = Instant::now();
        let (route, service) = names(x, prefer_name);
        let found = x.matched.as_ref().map(|matched| &matched.found);
        let tries = &x.upstream.tries;
        self.recorder.record(&RequestSample {
            status: x.response.status,
            route,
            matched_uri: found.map_or("", |found| found.path_pattern()),
            matched_host: found.and_then(|found| found.host_pattern()).unwrap_or(""),
            service,
            consumer: x.consumer.as_ref().map_or("", |consumer| &consumer.value.username),
            node: tries.last().map_or(Node::None, |last| Node::Ip(last.addr.ip())),
            request_type: "traditional_http",
            request_llm_model: "",
            llm_model: "",
            response_source: if x.response.source == Source::Upstream { "upstream" } else { "apisix" },
            extra: &extra,
            request_time: now.duration_since(x.started),
            upstream_time: match tries.is_empty() {
                true => None,
                false => Some(tries.iter().filter_map(|t| t.response_time).sum()),
            },
            bytes_received: x.request.head_len + x.client.as_ref().map_or(0, |client| client.body_received()),
            bytes_sent: x.bytes_sent,
            now,
        });
    }

    fn extra_values(&self, x: &Exchange) -> SmallVec<[Vec<u8>; 8]> {
        let mut scratch = self.scratch.borrow_mut();
        let value = |var: &Var| {
            scratch.clear();
            x.var(var, &mut scratch).map_or_else(Vec::new, <[u8]>::to_vec)
        };
        self.extra.iter().map(value).collect()
    }
}

/// Ids, or names where they exist and are preferred, of the route and the service.
fn names(x: &Exchange, prefer_name: bool) -> (&str, &str) {
    let Some(matched) = &x.matched else { return ("", "") };
    let route = matched.route();
    let route_name = route.value.name.as_deref().filter(|_| prefer_name);
    let service = matched.service.as_ref();
    let service_name = service.and_then(|s| s.value.name.as_deref()).filter(|_| prefer_name);
    let service_id = route.value.service_id.as_deref().unwrap_or("");
    (route_name.unwrap_or(&route.id), service_name.unwrap_or(service_id))
}
