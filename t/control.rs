//! What operators ask a running gateway: plugins' own endpoints, reloads, the status API, the debug mode, traces.

mod support;

#[path = "control/contract.rs"]
mod contract;
#[path = "control/debug.rs"]
mod debug;
#[path = "control/objects.rs"]
mod objects;
#[path = "control/own_metrics.rs"]
mod own_metrics;
#[path = "control/plugins.rs"]
mod plugins;
#[path = "control/prometheus.rs"]
mod prometheus;
#[path = "control/status.rs"]
mod status;
#[path = "control/trace.rs"]
mod trace;
