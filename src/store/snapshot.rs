//! One immutable version of the whole configuration, compiled for serving.
//!
//! A new version shares everything that did not change with the one before (persistent maps and router), so a
//! change costs what changed, with a hundred thousand routes as with ten.

use std::sync::Arc;

use imbl::{HashMap, OrdMap};

use super::Entry;
use crate::{
    model::{
        self, Consumer, ConsumerGroup, Credential, Function, GlobalRule, Id, Kind, Object, PluginConfig,
        PluginMetadata, PluginSource, Route, Service, Ssl, StreamRoute, Upstream, consumer::AuthKey,
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
    /// What is stored under keys of no kind, and the list of plugins: for scripts.
    pub extra: OrdMap<Arc<str>, Entry>,
    /// Who answers to an auth plugin's key: consumer id, and credential id when it is a credential's.
    pub auth_index: HashMap<AuthKey, (Id, Option<Id>)>,
    /// `consumers` as plugins see them changed: `conf_version` of the consumer tables.
    pub consumers_uid: u64,
    pub router: Router,
    pub stream_router: Arc<StreamRouter>,
    /// Grows when plugins must be loaded anew: an upload, `plugins/reload`, the list of plugins.
    pub plugins_generation: u64,
    /// The names to load, when the store holds a list (`/plugins`) and this node follows it; else config.yaml's.
    pub plugin_names: Option<Arc<[Box<str>]>>,
    /// Objects that were refused, by key: `GET /v1/config/errors`.
    pub errors: HashMap<Arc<str>, Arc<ConfigError>>,
}

/// An object as it is stored.
#[derive(Clone, Copy, Debug)]
pub struct Stored<'a> {
    pub json: &'a Arc<str>,
    pub created: i64,
    pub modified: i64,
}

impl<'a, T> From<&'a Arc<Object<T>>> for Stored<'a> {
    fn from(o: &'a Arc<Object<T>>) -> Self {
        Stored { json: &o.json, created: o.create_revision, modified: o.mod_revision }
    }
}

impl<'a> From<&'a Entry> for Stored<'a> {
    fn from(e: &'a Entry) -> Self {
        Stored { json: &e.value, created: e.create_revision, modified: e.mod_revision }
    }
}

impl Snapshot {
    /// The object that is served.
    pub fn stored(&self, kind: Kind, id: &str) -> Option<Stored<'_>> {
        match kind {
            Kind::Route => self.routes.get(id).map(Stored::from),
            Kind::Service => self.services.get(id).map(Stored::from),
            Kind::Upstream => self.upstreams.get(id).map(Stored::from),
            Kind::Consumer => self.consumers.get(id).map(Stored::from),
            Kind::Credential => self.credentials.get(id).map(Stored::from),
            Kind::ConsumerGroup => self.consumer_groups.get(id).map(Stored::from),
            Kind::PluginConfig => self.plugin_configs.get(id).map(Stored::from),
            Kind::GlobalRule => self.global_rules.iter().find(|r| &*r.id == id).map(Stored::from),
            Kind::PluginMetadata => self.plugin_metadata.get(id).map(Stored::from),
            Kind::Ssl => self.ssls.get(id).map(Stored::from),
            Kind::Function => self.functions.get(id).map(Stored::from),
            Kind::PluginSource => self.plugin_sources.get(id).map(Stored::from),
            Kind::StreamRoute => self.stream_routes.get(id).map(Stored::from),
            Kind::Proto | Kind::Secret | Kind::GraphqlCostDecoration => {
                self.others.get(&(kind, Id::from(id))).map(Stored::from)
            }
        }
    }

    /// Whether there are objects of a kind.
    pub fn has(&self, kind: Kind) -> bool {
        match kind {
            Kind::Route => !self.routes.is_empty(),
            Kind::Service => !self.services.is_empty(),
            Kind::Upstream => !self.upstreams.is_empty(),
            Kind::Consumer => !self.consumers.is_empty(),
            Kind::Credential => !self.credentials.is_empty(),
            Kind::ConsumerGroup => !self.consumer_groups.is_empty(),
            Kind::PluginConfig => !self.plugin_configs.is_empty(),
            Kind::GlobalRule => !self.global_rules.is_empty(),
            Kind::PluginMetadata => !self.plugin_metadata.is_empty(),
            Kind::Ssl => !self.ssls.is_empty(),
            Kind::Function => !self.functions.is_empty(),
            Kind::PluginSource => !self.plugin_sources.is_empty(),
            Kind::StreamRoute => !self.stream_routes.is_empty(),
            Kind::Proto | Kind::Secret | Kind::GraphqlCostDecoration => self.others.keys().any(|(k, _)| *k == kind),
        }
    }

    /// Visits the ids of a kind's objects, in no order.
    pub fn ids(&self, kind: Kind, visit: &mut dyn FnMut(&str)) {
        match kind {
            Kind::Route => self.routes.keys().for_each(|id| visit(id)),
            Kind::Service => self.services.keys().for_each(|id| visit(id)),
            Kind::Upstream => self.upstreams.keys().for_each(|id| visit(id)),
            Kind::Consumer => self.consumers.keys().for_each(|id| visit(id)),
            Kind::Credential => self.credentials.keys().for_each(|id| visit(id)),
            Kind::ConsumerGroup => self.consumer_groups.keys().for_each(|id| visit(id)),
            Kind::PluginConfig => self.plugin_configs.keys().for_each(|id| visit(id)),
            Kind::GlobalRule => self.global_rules.iter().for_each(|r| visit(&r.id)),
            Kind::PluginMetadata => self.plugin_metadata.keys().for_each(|id| visit(id)),
            Kind::Ssl => self.ssls.keys().for_each(|id| visit(id)),
            Kind::Function => self.functions.keys().for_each(|id| visit(id)),
            Kind::PluginSource => self.plugin_sources.keys().for_each(|id| visit(id)),
            Kind::StreamRoute => self.stream_routes.keys().for_each(|id| visit(id)),
            Kind::Proto | Kind::Secret | Kind::GraphqlCostDecoration => {
                self.others.keys().filter(|(k, _)| *k == kind).for_each(|(_, id)| visit(id));
            }
        }
    }

    /// Visits the plugin confs in use: their owner's kind and id, the plugin, and the conf as JSON (decrypted). Metadata is its own
    /// owner's.
    pub fn each_conf(&self, mut visit: impl FnMut(Kind, &str, &str, &Arc<str>)) {
        let mut all = |kind: Kind, id: &str, plugins: &model::Plugins| {
            plugins.0.iter().for_each(|conf| visit(kind, id, &conf.name, &conf.json));
        };
        self.routes.values().for_each(|o| all(Kind::Route, &o.id, &o.value.plugins));
        self.services.values().for_each(|o| all(Kind::Service, &o.id, &o.value.plugins));
        self.plugin_configs.values().for_each(|o| all(Kind::PluginConfig, &o.id, &o.value.plugins));
        self.consumers.values().for_each(|o| all(Kind::Consumer, &o.id, &o.value.plugins));
        self.credentials.values().for_each(|o| all(Kind::Credential, &o.id, &o.value.plugins));
        self.consumer_groups.values().for_each(|o| all(Kind::ConsumerGroup, &o.id, &o.value.plugins));
        self.global_rules.iter().for_each(|o| all(Kind::GlobalRule, &o.id, &o.value.plugins));
        self.plugin_metadata.values().for_each(|o| visit(Kind::PluginMetadata, &o.id, &o.id, &o.value.json));
    }

    /// What is under a key, whether a resource that is served or a key of no kind.
    pub fn at(&self, key: &str) -> Option<Stored<'_>> {
        match Kind::of_key(key) {
            Some((kind, id)) => self.stored(kind, id),
            None => self.extra.get(key).map(Stored::from),
        }
    }

    /// The keys in a directory (`/routes`), in order; a directory that is a key itself has this one.
    pub fn keys_in(&self, dir: &str) -> Vec<Arc<str>> {
        let mut keys: Vec<Arc<str>> = Vec::new();
        let first = dir.strip_prefix('/').and_then(|rest| rest.split('/').next());
        for kind in Kind::ALL.into_iter().filter(|kind| first == Some(kind.owner().unwrap_or(*kind).plural())) {
            self.ids(kind, &mut |id| {
                let key = kind.key(id);
                if is_in(&key, dir) {
                    keys.push(key.into());
                }
            });
        }
        let from: Arc<str> = dir.into();
        let extra = self.extra.range(from..).take_while(|(key, _)| key.starts_with(dir));
        keys.extend(extra.map(|(key, _)| key).filter(|key| is_in(key, dir)).cloned());
        keys.sort_unstable();
        keys
    }
}

/// Whether a key is a directory or in it.
pub fn is_in(key: &str, dir: &str) -> bool {
    key.strip_prefix(dir).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Why an object is not served.
#[derive(Debug, Clone)]
pub struct ConfigError {
    pub key: Arc<str>,
    pub revision: i64,
    pub message: String,
}
