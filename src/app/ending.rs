//! What is left of a request when it is over: its counters and its line in access.log.

use std::{cell::RefCell, rc::Rc, sync::Arc, time::Instant};

use smallvec::SmallVec;

use crate::{
    conf::Config,
    error::{Error, Kind, Result},
    exchange::{Exchange, Var},
    observe::{
        log::LogFile,
        metrics::{Metrics, Node, Recorder, RequestSample},
    },
    plugin::Runner,
    proxy::{self, access_log::AccessLog},
    stream,
};

/// What all workers count and log into.
#[derive(Clone)]
pub struct Endings {
    pub metrics: Arc<Metrics>,
    access_log: Option<LogFile>,
    stream_log: Option<LogFile>,
}

impl Endings {
    pub fn new(config: &Config, metrics: Arc<Metrics>) -> Result<Endings> {
        let open = |log: &crate::conf::AccessLog| {
            let failed = |e| Error::config(Kind::Io).cause(e).context(log.path.display().to_string());
            LogFile::open(&log.path).map_err(failed)
        };
        Ok(Endings {
            metrics,
            access_log: config.access_log.as_ref().map(open).transpose()?,
            stream_log: config.stream.access_log.as_ref().filter(|_| config.stream.enabled).map(open).transpose()?,
        })
    }

    /// The log of a worker's sessions.
    pub fn of_streams(&self, config: &Config) -> Option<stream::Log> {
        Some(stream::Log::new(config.stream.access_log.as_ref()?, self.stream_log.clone()?))
    }

    pub fn of_worker(&self, config: &Config) -> Ending {
        let recorder = self.metrics.recorder();
        let extra = recorder.settings().extra.iter().map(|label| Var::parse(&label.variable)).collect();
        let access_log = match (&config.access_log, &self.access_log) {
            (Some(log), Some(file)) => Some(AccessLog::new(log, file.clone())),
            _ => None,
        };
        Ending { access_log, recorder, extra, scratch: RefCell::default() }
    }
}

/// One worker's.
pub struct Ending {
    pub access_log: Option<AccessLog>,
    pub recorder: Recorder,
    /// The variables of `extra_labels`.
    extra: Vec<Var>,
    scratch: RefCell<Vec<u8>>,
}

impl proxy::Ending for Rc<Ending> {
    fn ended(&self, x: &Exchange, runner: &Runner) {
        if let Some(prefer_name) = runner.prometheus(x) {
            self.count(x, prefer_name);
        }
        if let Some(access_log) = &self.access_log {
            access_log.log(x);
        }
    }
}

impl Ending {
    /// Hands the last lines of access.log to its file.
    pub fn flush(&self) {
        if let Some(access_log) = &self.access_log {
            access_log.flush();
        }
    }

    /// Writes access.log in time, until it is dropped.
    pub async fn flush_in_time(&self) {
        if let Some(access_log) = &self.access_log {
            access_log.flush_in_time().await;
        }
    }

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
            response_source: x.source_name(),
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
    // A route of no service is told by its host.
    let host = || if let [host] = &route.value.hosts[..] { host } else { "" };
    let service_id = route.value.service_id.as_deref().unwrap_or_else(host);
    (route_name.unwrap_or(&route.id), service_name.unwrap_or(service_id))
}
