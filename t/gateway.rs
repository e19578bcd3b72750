//! The walks of a user: start, routes, plugins, functions, uploads, stores. Each test is one scene on the real binary.

mod support;

#[path = "gateway/admin.rs"]
mod admin;
#[path = "gateway/broken.rs"]
mod broken;
#[path = "gateway/context.rs"]
mod context;
#[path = "gateway/contract.rs"]
mod contract;
#[path = "gateway/core_etcd.rs"]
mod core_etcd;
#[path = "gateway/counters.rs"]
mod counters;
#[path = "gateway/discovery.rs"]
mod discovery;
#[path = "gateway/functions.rs"]
mod functions;
#[path = "gateway/gcp.rs"]
mod gcp;
#[path = "gateway/limits_redis.rs"]
mod limits_redis;
#[path = "gateway/loggers.rs"]
mod loggers;
#[path = "gateway/memory.rs"]
mod memory;
#[path = "gateway/plugins.rs"]
mod plugins;
#[path = "gateway/pubsub.rs"]
mod pubsub;
#[path = "gateway/restrictions.rs"]
mod restrictions;
#[path = "gateway/routes.rs"]
mod routes;
#[path = "gateway/secrets.rs"]
mod secrets;
#[path = "gateway/settings.rs"]
mod settings;
#[path = "gateway/span.rs"]
mod span;
#[path = "gateway/start.rs"]
mod start;
#[path = "gateway/stores.rs"]
mod stores;
#[path = "gateway/uploads.rs"]
mod uploads;
#[path = "gateway/values.rs"]
mod values;
#[path = "gateway/workflow.rs"]
mod workflow;
