//! One immutable version of the whole configuration, compiled for serving.
//!
//! A new version shares everything that did not change with the one before (persistent maps and router), so a
//! change costs what changed, with a hundred thousand routes as with ten.

use std::sync::Arc;

use imbl::HashMap;

use crate::{
    model::{
        self, Consumer, ConsumerGroup, Credential, Function, GlobalRule, Id, Object, PluginConfig, PluginMetadata,
        PluginSource, Route, Service, Ssl, StreamRoute, Upstream, consumer::AuthKey,
    },
    router::{Router, StreamRouter},
};

pub type Table<T> = HashMap<Id, Arc<Object<T>>>;

#[derive(Clone, Default)]
pub struct Snapshot {
    /// Counts the snapshots of this process.
    pub version: u64,
    /// The store's revision that it shows.
    pub revision: i64,
    pub routes: Table<Route>,
    pub services: Table<Service>,
    pub upstreams: Table<Arc<Upstream>>,
    pub consumers: Table<Consumer>,
    pub credentials: Table<Credential>,
    pub consumer_groups: Table<ConsumerGroup>,
    pub plugin_configs: Table<PluginConfig>,
    /// In order of creation: they run in this order.
    pub global_rules: Arc<[Arc<Object<GlobalRule>>]>,
    /// Unique for each state of `global_rules`; 0 when there is none.
    pub global_rules_uid: u64,
    pub plugin_metadata: Table<PluginMetadata>,
    pub ssls: Table<Ssl>,
    pub functions: Table<Function>,
    pub plugin_sources: Table<PluginSource>,
    pub stream_routes: Table<StreamRoute>,
    /// Protos, secrets: kept as text until something reads them.
    pub others: HashMap<(model::Kind, Id), Arc<Object<()>>>,
    /// Who answers to an auth plugin's key: consumer id, and credential id when it is a credential's.
    pub auth_index: HashMap<AuthKey, (Id, Option<Id>)>,
    /// `consumers` as plugins see them changed: `conf_version` of the consumer tables.
    pub consumers_uid: u64,
    pub router: Router,
    pub stream_router: Arc<StreamRouter>,
    /// Grows when plugins must be loaded anew: an upload, `plugins/reload`, the list of plugins.
    pub plugins_generation: u64,
    /// The names to load, when the store holds a list (`/plugins`); else config.yaml's.
    pub plugin_names: Option<Arc<[Box<str>]>>,
    /// Objects that were refused, by key: `GET /v1/config/errors`.
    pub errors: HashMap<Arc<str>, Arc<ConfigError>>,
}

/// Why an object is not served.
#[derive(Debug, Clone)]
pub struct ConfigError {
    pub key: Arc<str>,
    pub revision: i64,
    pub message: String,
}
