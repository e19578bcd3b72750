//! moongate: an API gateway that runs Apache APISIX Lua plugins on a Rust core. docs/architecture.md is the map.

pub mod admin;
pub mod app;
pub mod balancer;
pub mod cli;
pub mod conf;
pub mod control;
pub mod dns;
pub mod error;
pub mod exchange;
pub mod expr;
pub mod location;
pub mod lua;
pub mod migrate;
pub mod model;
pub mod net;
pub mod observe;
pub mod plugin;
pub mod proxy;
pub mod router;
pub mod schema;
pub mod shdict;
pub mod store;
pub mod stream;
pub mod tcp;
pub mod tls;
pub mod upstream;
