//! The resources: JSON in, a value that cannot be invalid out. One file per resource.
//!
//! Everything here is immutable, `Send`, and shared by `Arc`. A resource keeps the JSON text it came from
//! (`Object::json`): what Lua and the Admin API read; the typed value is what the request path reads.

pub mod consumer;
pub mod cron;
pub mod crypt;
pub mod function;
mod parse;
pub mod plugin_conf;
pub mod plugin_source;
pub mod proto;
pub mod route;
mod served;
pub mod service;
pub mod ssl;
pub mod stream_route;
pub mod upstream;

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

pub use consumer::{Consumer, ConsumerGroup, Credential};
pub use crypt::{Keyring, SchemaKind};
pub use function::{Function, FunctionLimits, Variant};
pub use parse::{ParseContext, Parsed, check, parse, with_whole_numbers};
pub use plugin_conf::{PluginConf, PluginMetadata, Plugins};
pub use plugin_source::PluginSource;
pub use route::Route;
pub use served::Served;
pub use service::{GlobalRule, PluginConfig, Service};
pub use ssl::Ssl;
pub use stream_route::StreamRoute;
pub use upstream::Upstream;

/// A resource's id as it stands in its key: `1`, `my-route`, for a credential `jack/credentials/c1`.
pub type Id = Arc<str>;

/// The kinds of resources, as named in keys (`/routes/1`) and Admin API paths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    Route,
    Service,
    Upstream,
    Consumer,
    Credential,
    ConsumerGroup,
    PluginConfig,
    GlobalRule,
    PluginMetadata,
    Ssl,
    Proto,
    Secret,
    StreamRoute,
    Function,
    PluginSource,
    GraphqlCostDecoration,
}

impl Kind {
    pub const ALL: [Kind; 16] = [
        Kind::Route,
        Kind::Service,
        Kind::Upstream,
        Kind::Consumer,
        Kind::Credential,
        Kind::ConsumerGroup,
        Kind::PluginConfig,
        Kind::GlobalRule,
        Kind::PluginMetadata,
        Kind::Ssl,
        Kind::Proto,
        Kind::Secret,
        Kind::StreamRoute,
        Kind::Function,
        Kind::PluginSource,
        Kind::GraphqlCostDecoration,
    ];

    /// The plural that stands in keys and paths. Credentials live under their consumer, cost decorations under their service.
    pub fn plural(self) -> &'static str {
        match self {
            Kind::Route => "routes",
            Kind::Service => "services",
            Kind::Upstream => "upstreams",
            Kind::Consumer => "consumers",
            Kind::Credential => "credentials",
            Kind::ConsumerGroup => "consumer_groups",
            Kind::PluginConfig => "plugin_configs",
            Kind::GlobalRule => "global_rules",
            Kind::PluginMetadata => "plugin_metadata",
            Kind::Ssl => "ssls",
            Kind::Proto => "protos",
            Kind::Secret => "secrets",
            Kind::StreamRoute => "stream_routes",
            Kind::Function => "functions",
            Kind::PluginSource => "plugin_sources",
            Kind::GraphqlCostDecoration => "graphql_cost_decorations",
        }
    }

    /// The name of its schema and of its Admin API errors: `route`. Empty where APISIX has no schema.
    pub fn singular(self) -> &'static str {
        match self {
            Kind::Route => "route",
            Kind::Service => "service",
            Kind::Upstream => "upstream",
            Kind::Consumer => "consumer",
            Kind::Credential => "credential",
            Kind::ConsumerGroup => "consumer_group",
            Kind::PluginConfig => "plugin_config",
            Kind::GlobalRule => "global_rule",
            Kind::PluginMetadata => "plugin_metadata",
            Kind::Ssl => "ssl",
            Kind::Proto => "proto",
            Kind::Secret => "secret",
            Kind::StreamRoute => "stream_route",
            Kind::Function => "function",
            Kind::PluginSource => "plugin_source",
            Kind::GraphqlCostDecoration => "graphql_cost_decoration",
        }
    }

    /// The kind that objects of this kind live under, and its owner's segment in keys: `/consumers/jack/credentials/c1`.
    pub fn owner(self) -> Option<Kind> {
        match self {
            Kind::Credential => Some(Kind::Consumer),
            Kind::GraphqlCostDecoration => Some(Kind::Service),
            _ => None,
        }
    }

    /// The key of an object, relative to the prefix.
    pub fn key(self, id: &str) -> String {
        format!("/{}/{id}", self.owner().unwrap_or(self).plural())
    }

    /// Splits a key relative to the prefix: `/routes/1` is `(Route, "1")`, `/consumers/jack/credentials/c1` is
    /// `(Credential, "jack/credentials/c1")`. `None` for what is not a resource.
    pub fn of_key(key: &str) -> Option<(Kind, &str)> {
        let (plural, id) = key.strip_prefix('/')?.split_once('/')?;
        if id.is_empty() {
            return None;
        }
        let kind = Kind::ALL.into_iter().find(|k| k.owner().is_none() && k.plural() == plural)?;
        Some((kind.within(id), id))
    }

    /// The kind of what has this id among `self`'s keys: `jack/credentials/c1` among the consumers is a credential.
    pub fn within(self, id: &str) -> Kind {
        let part = id.split('/').nth(1);
        Kind::ALL.into_iter().find(|k| k.owner() == Some(self) && part == Some(k.plural())).unwrap_or(self)
    }
}

/// One version of one resource.
#[derive(Debug)]
pub struct Object<T> {
    pub id: Id,
    /// Unique in this process for each version of each object: what caches key on. Never reused.
    pub uid: u64,
    pub create_revision: i64,
    /// `modifiedIndex` in the Admin API; APISIX's `conf_version`.
    pub mod_revision: i64,
    /// The JSON text as stored.
    pub json: Arc<str>,
    pub value: T,
}

/// A number that no other caller in this process gets.
pub fn next_uid() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}
