//! The snapshot under construction: applies what a store says to the tables, the router and the indexes.
//!
//! Pure but for the log. A change costs what it changes. An object that is refused is remembered and shown as an
//! error, and the last valid version of it goes on serving; when plugins are loaded anew it is tried again.

use std::{
    collections::{BTreeSet, HashMap, HashSet, hash_map::RandomState},
    hash::BuildHasher,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    thread,
};

use serde_json::Value;

use super::{Entry, NOT_UTF8, Snapshot, snapshot::ConfigError};
use crate::{
    error::Result,
    model::{
        Consumer, ConsumerGroup, Credential, Function, GlobalRule, Id, Kind, Object, PluginConfig, PluginMetadata,
        PluginSource, Plugins, Route, Service, Ssl, StreamRoute, Upstream, consumer::AuthKey, next_uid,
    },
    router::{Router, RouterKind, StreamRouter},
};

/// Fewer objects than this are parsed where they are: threads would cost more than they save.
const PARALLEL_FROM: usize = 512;
/// Remembered verdicts on plugin confs. A hundred thousand routes seldom have more distinct ones.
const MAX_CHECKED: usize = 65_536;
/// Refused objects that get their own log line in one change; the errors list has all of them.
const MAX_LOGGED: usize = 100;
/// Keys that are no resource's and the bytes of their values that are kept for scripts. Each snapshot shares them with the one
/// before.
const MAX_EXTRA: usize = 16_384;
const MAX_EXTRA_BYTES: usize = 32 << 20;
/// Characters of a refused value in the log.
const MAX_SHOWN: usize = 200;
/// The key of the list of plugins.
const PLUGINS: &str = "/plugins";
/// What the gateway itself keeps in the store beside resources.
const OWN: &str = "/moongate/";
/// Written by a node whose plugins are to be loaded anew, so that the others load theirs too. Not a resource: APISIX
/// passes it over.
pub const RELOAD: &str = "/moongate/plugins_reload";

/// A valid object, ready to be served.
#[derive(Clone, Debug)]
pub enum Item {
    Route(Arc<Object<Route>>),
    Service(Arc<Object<Service>>),
    Upstream(Arc<Object<Arc<Upstream>>>),
    Consumer(Arc<Object<Consumer>>),
    Credential(Arc<Object<Credential>>),
    ConsumerGroup(Arc<Object<ConsumerGroup>>),
    PluginConfig(Arc<Object<PluginConfig>>),
    GlobalRule(Arc<Object<GlobalRule>>),
    PluginMetadata(Arc<Object<PluginMetadata>>),
    Ssl(Arc<Object<Ssl>>),
    Function(Arc<Object<Function>>),
    PluginSource(Arc<Object<PluginSource>>),
    StreamRoute(Arc<Object<StreamRoute>>),
    Other(Kind, Arc<Object<()>>),
}

impl Item {
    /// The plugins in it and the schema that their confs follow.
    fn plugins(&self) -> Option<(&Plugins, PluginSchema)> {
        match self {
            Item::Route(o) => Some((&o.value.plugins, PluginSchema::Plugin)),
            Item::Service(o) => Some((&o.value.plugins, PluginSchema::Plugin)),
            Item::ConsumerGroup(o) => Some((&o.value.plugins, PluginSchema::Plugin)),
            Item::PluginConfig(o) => Some((&o.value.plugins, PluginSchema::Plugin)),
            Item::GlobalRule(o) => Some((&o.value.plugins, PluginSchema::Plugin)),
            Item::Consumer(o) => Some((&o.value.plugins, PluginSchema::Consumer)),
            Item::Credential(o) => Some((&o.value.plugins, PluginSchema::Consumer)),
            _ => None,
        }
    }
}

/// Makes an `Item` of a stored text, or says what is wrong with it. Called on several threads at once.
pub type Parser = Arc<dyn Fn(Kind, &str, &Entry) -> Result<Item> + Send + Sync>;

/// Which of a plugin's schemas a conf is checked against.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PluginSchema {
    Plugin,
    /// A consumer's or a credential's: plugins that know no consumer schema use their own.
    Consumer,
    Metadata,
}

impl PluginSchema {
    /// The schema of the confs that objects of a kind have.
    pub fn of(kind: Kind) -> PluginSchema {
        match kind {
            Kind::Consumer | Kind::Credential => PluginSchema::Consumer,
            Kind::PluginMetadata => PluginSchema::Metadata,
            _ => PluginSchema::Plugin,
        }
    }
}

/// Why a plugin conf is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// No such plugin is loaded.
    Unknown,
    Invalid(String),
}

impl Refusal {
    /// What APISIX says of the plugin of that name. What is wrong with `_meta` names the plugin itself.
    pub fn words(&self, plugin: &str) -> String {
        match self {
            Refusal::Unknown => format!("unknown plugin [{plugin}]"),
            Refusal::Invalid(text) if text.starts_with("failed to load _meta.") => text.clone(),
            Refusal::Invalid(text) => format!("failed to check the configuration of plugin {plugin} err: {text}"),
        }
    }
}

/// Asks the plugins themselves: their `check_schema`. Lives on the thread of the pipeline.
pub trait PluginChecker {
    fn check(&self, plugin: &str, conf: &str, schema: PluginSchema) -> std::result::Result<(), Refusal>;

    /// Whether an uploaded plugin can be one: it compiles, loads and says what a plugin must; why not, else.
    fn inspect(&self, name: &str, source: &PluginSource) -> std::result::Result<(), String>;

    /// Loads the plugins anew: `snapshot.plugin_sources`, `snapshot.plugin_names` and the files may have changed. After an error
    /// those of before go on.
    fn reload(&self, snapshot: &Snapshot) -> Result<()>;
}

/// What a batch changed, for the last good state.
#[derive(Debug)]
pub enum Journal {
    /// Everything that is valid; keys in `keep` stay as they are in the journal.
    Replace {
        entries: Vec<Entry>,
        keep: HashSet<Arc<str>>,
        revision: i64,
    },
    Changes {
        changes: Vec<(Arc<str>, Option<Entry>)>,
        revision: i64,
    },
}

pub struct Builder {
    next: Snapshot,
    parser: Parser,
    checker: Option<Box<dyn PluginChecker>>,
    /// An object that uses an unknown plugin is refused; else it serves without that plugin.
    strict_plugins: bool,
    checked: HashMap<u128, std::result::Result<(), Refusal>>,
    seeds: [RandomState; 2],
    /// The texts that were refused, newest version each.
    rejected: HashMap<Arc<str>, Entry>,
    routes_of_service: HashMap<Id, HashSet<Id>>,
    /// Auth keys that more than one consumer or credential claims, with all who do: the oldest has it.
    contested: HashMap<AuthKey, BTreeSet<Claim>>,
    dirty: bool,
    /// The router of stream routes is to be made anew: once for all that changed together.
    streams_changed: bool,
    plugins_changed: bool,
    /// `mod_revision` and text of the list of plugins.
    plugin_list: Option<Entry>,
    /// `mod_revision` of `RELOAD`, once everything has been read.
    reload_seen: Option<i64>,
    /// Stands before keys in the log: `/apisix`.
    pub shown_prefix: String,
    /// The store's list of plugins says which ones are loaded; else it is one for scripts to read, and for other nodes.
    pub follows_plugin_list: bool,
    /// Of the values in `next.extra`.
    extra_bytes: usize,
    /// It has been logged that not all fits.
    extra_told: bool,
    /// Keys that differ from the snapshot taken before.
    touched: Vec<Arc<str>>,
}

/// Who claims an auth key; the smallest wins, so that all nodes agree.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Claim {
    create_revision: i64,
    consumer: Id,
    credential: Option<Id>,
}

impl Builder {
    pub fn new(
        parser: Parser,
        checker: Option<Box<dyn PluginChecker>>,
        router: RouterKind,
        strict_plugins: bool,
    ) -> Self {
        let next = Snapshot { router: Router::new(router), plugins_generation: 1, ..Snapshot::default() };
        Builder {
            next,
            parser,
            checker,
            strict_plugins,
            checked: HashMap::new(),
            seeds: [RandomState::new(), RandomState::new()],
            rejected: HashMap::new(),
            routes_of_service: HashMap::new(),
            contested: HashMap::new(),
            dirty: true,
            streams_changed: false,
            plugins_changed: false,
            plugin_list: None,
            reload_seen: None,
            shown_prefix: String::new(),
            follows_plugin_list: true,
            extra_bytes: 0,
            extra_told: false,
            touched: Vec::new(),
        }
    }

    pub fn plugins_generation(&self) -> u64 {
        self.next.plugins_generation
    }

    pub fn routes(&self) -> usize {
        self.next.routes.len()
    }

    /// The next snapshot, if it differs from the one taken before.
    pub fn take(&mut self) -> Option<Snapshot> {
        if !std::mem::take(&mut self.dirty) {
            return None;
        }
        if std::mem::take(&mut self.streams_changed) {
            self.next.stream_router = Arc::new(StreamRouter::new(self.next.stream_routes.values().cloned()));
        }
        self.next.version += 1;
        Some(self.next.clone())
    }

    /// The keys whose state in the snapshot taken last is another one than before it.
    pub fn take_touched(&mut self) -> Vec<Arc<str>> {
        std::mem::take(&mut self.touched)
    }

    /// Takes `entries` for everything there is. What did not change keeps its `Arc` and uid.
    pub fn replace(&mut self, entries: Vec<Entry>, revision: i64) -> Journal {
        self.remove_absent(&entries);
        let reload = entries.iter().find(|e| &*e.key == RELOAD).map_or(0, |e| e.mod_revision);
        self.plugins_changed |= self.reload_seen.replace(reload).is_some_and(|seen| seen != reload);
        let changed = entries.iter().filter(|e| !self.knows(e)).cloned().collect();
        self.apply(changed);
        self.set_revision(revision);
        let keep: HashSet<Arc<str>> = self.rejected.keys().cloned().collect();
        let entries = entries.into_iter().filter(|e| is_kept(&e.key) && !keep.contains(&e.key)).collect();
        Journal::Replace { entries, keep, revision }
    }

    pub fn change(&mut self, changes: Vec<(Arc<str>, Option<Entry>)>, revision: i64) -> Journal {
        let mut changed = Vec::new();
        let mut journal = Vec::new();
        for (key, entry) in changes {
            match entry {
                Some(e) if &*e.key == RELOAD => {
                    self.plugins_changed |= self.reload_seen.replace(e.mod_revision) != Some(e.mod_revision);
                }
                Some(e) if !self.knows(&e) => changed.push(e),
                Some(_) => {}
                None => {
                    self.remove(&key);
                    if is_kept(&key) {
                        journal.push((key, None));
                    }
                }
            }
        }
        let accepted = self.apply(changed);
        let revision = revision.max(self.next.revision);
        self.set_revision(revision);
        journal.extend(accepted.into_iter().map(|e| (e.key.clone(), Some(e))));
        Journal::Changes { changes: journal, revision }
    }

    /// As if every plugin had changed: a new generation, and what was refused is tried again.
    pub fn reload_plugins(&mut self) -> Journal {
        self.plugins_changed = true;
        let accepted = self.apply(Vec::new());
        let changes = accepted.into_iter().map(|e| (e.key.clone(), Some(e))).collect();
        Journal::Changes { changes, revision: self.next.revision }
    }

    /// An error of the source itself, or that there is none any more.
    pub fn note(&mut self, key: &Arc<str>, error: Option<String>) {
        let noted = self.next.errors.get(key).map(|e| e.message.clone());
        if noted == error {
            return;
        }
        self.dirty = true;
        match error {
            Some(message) => self.set_error(key, self.next.revision, message),
            None => drop(self.next.errors.remove(key)),
        }
    }

    fn set_revision(&mut self, revision: i64) {
        self.dirty |= self.next.revision != revision;
        self.next.revision = revision;
    }

    /// Whether this very version was seen before.
    fn knows(&self, e: &Entry) -> bool {
        let same = |revision: i64, text: &str| revision == e.mod_revision && text == &*e.value;
        if let Some(r) = self.rejected.get(&e.key) {
            return same(r.mod_revision, &r.value);
        }
        if &*e.key == PLUGINS {
            return self.plugin_list.as_ref().is_some_and(|l| same(l.mod_revision, &l.value));
        }
        match Kind::of_key(&e.key) {
            Some((kind, id)) => self.next.stored(kind, id).is_some_and(|o| same(o.modified, o.json)),
            // What nodes tell each other, and revisions of functions: large, and nothing that is served.
            None if e.key.starts_with(OWN) => true,
            None => self.next.extra.get(&e.key).is_some_and(|o| same(o.mod_revision, &o.value)),
        }
    }

    fn remove_absent(&mut self, entries: &[Entry]) {
        if self.is_empty() {
            return;
        }
        let present: HashSet<&str> = entries.iter().map(|e| &*e.key).collect();
        let mut absent: Vec<String> = self.rejected.keys().map(|k| k.to_string()).collect();
        if self.plugin_list.is_some() {
            absent.push(PLUGINS.to_owned());
        }
        absent.extend(self.next.extra.keys().map(|k| k.to_string()));
        for kind in Kind::ALL {
            self.next.ids(kind, &mut |id| absent.push(kind.key(id)));
        }
        absent.retain(|key| !present.contains(&**key));
        for key in absent {
            self.remove(&key);
        }
    }

    fn is_empty(&self) -> bool {
        let mut any = self.plugin_list.is_some() || !self.rejected.is_empty() || !self.next.extra.is_empty();
        for kind in Kind::ALL {
            self.next.ids(kind, &mut |_| any = true);
        }
        !any
    }

    /// Plugins first, so that the rest is checked by the new ones; services before the routes that take their hosts.
    /// Returns what is valid.
    fn apply(&mut self, entries: Vec<Entry>) -> Vec<Entry> {
        let (mut plugins, mut rest): (Vec<_>, Vec<_>) = entries.into_iter().partition(|e| is_plugin_key(&e.key));
        let mut logged = 0;
        let reloaded = self.plugins_changed;
        if reloaded {
            // What a source lacked may be there now.
            let again = self.rejected.values().filter(|e| is_plugin_key(&e.key));
            let fresh: HashSet<Arc<str>> = plugins.iter().map(|e| e.key.clone()).collect();
            plugins.extend(again.filter(|e| !fresh.contains(&e.key)).cloned().collect::<Vec<_>>());
        }
        let mut accepted = self.apply_parsed(plugins, &mut logged);
        let mut stale = None;
        if std::mem::take(&mut self.plugins_changed) && self.take_plugins_over() {
            stale = self.changed_plugins(reloaded, &accepted);
            let fresh: HashSet<&str> = rest.iter().map(|e| &*e.key).collect();
            let again: Vec<Entry> = self
                .rejected
                .values()
                .filter(|e| !is_plugin_key(&e.key) && !fresh.contains(&*e.key))
                .cloned()
                .collect();
            rest.extend(again);
        }
        rest.sort_by_key(|e| e.key.starts_with("/routes/"));
        accepted.extend(self.apply_parsed(rest, &mut logged));
        if let Some(changed) = stale {
            self.check_again(&changed, &mut logged);
        }
        if logged > MAX_LOGGED {
            tracing::error!("{} more objects were refused: see /v1/config/errors", logged - MAX_LOGGED);
        }
        accepted
    }

    /// Loads the plugins anew for whoever checks confs. False: they do not load, and nobody gets other ones.
    fn take_plugins_over(&mut self) -> bool {
        let reloaded = self.checker.as_ref().map_or(Ok(()), |checker| checker.reload(&self.next));
        let failure = reloaded.err().map(|e| e.to_string());
        if let Some(text) = &failure {
            tracing::error!(target: "lua", "{text}");
        }
        let loaded = failure.is_none();
        self.note(&RELOAD.into(), failure);
        if loaded {
            self.next.plugins_generation += 1;
            self.dirty = true;
            self.checked.clear();
        }
        loaded
    }

    /// Whose confs are to be checked again; nothing where there are none yet.
    fn changed_plugins(&self, reloaded: bool, accepted: &[Entry]) -> Option<ChangedPlugins> {
        let mut any = false;
        for kind in Kind::ALL.into_iter().filter(|kind| !matches!(kind, Kind::PluginSource)) {
            any |= self.next.has(kind);
        }
        if !any {
            return None;
        }
        let name = |e: &Entry| Kind::of_key(&e.key).map(|(_, id)| Box::from(id));
        // `None`: the list of plugins.
        let names: Option<HashSet<Box<str>>> = accepted.iter().map(name).collect();
        Some(names.filter(|_| !reloaded).map_or(ChangedPlugins::All, ChangedPlugins::These))
    }

    /// Confs that the plugins of now refuse: their owners go on as far as they can, and are told of. Those with a newer version that was
    /// refused have been.
    fn check_again(&mut self, changed: &ChangedPlugins, logged: &mut usize) {
        let now = self.next.clone();
        let mut refused: HashMap<Arc<str>, (Kind, Id, String)> = HashMap::new();
        now.each_conf(|kind, id, plugin, conf| {
            if changed.have(plugin)
                && let Err(message) = self.check_plugin(plugin, conf, PluginSchema::of(kind))
            {
                refused.entry(kind.key(id).into()).or_insert_with(|| (kind, Id::from(id), message));
            }
        });
        for (key, (kind, id, message)) in refused {
            let Some(stored) = now.stored(kind, &id).filter(|_| !self.rejected.contains_key(&key)) else { continue };
            let entry = Entry {
                key,
                value: stored.json.clone(),
                create_revision: stored.created,
                mod_revision: stored.modified,
            };
            self.refuse(entry, message, logged);
        }
    }

    fn apply_parsed(&mut self, entries: Vec<Entry>, logged: &mut usize) -> Vec<Entry> {
        let mut accepted = Vec::with_capacity(entries.len());
        let parsed = parse_all(&self.parser, &entries);
        for (entry, item) in entries.into_iter().zip(parsed) {
            let valid = match item {
                Parsed::Item(item) => self.check_plugins(&item).map(|()| self.place(item)),
                Parsed::PluginList(names) => {
                    if self.follows_plugin_list {
                        self.next.plugin_names = Some(names);
                        self.plugins_changed = true;
                    }
                    self.plugin_list = Some(entry.clone());
                    self.keep_extra(&entry);
                    Ok(())
                }
                Parsed::Skipped => {
                    self.keep_extra(&entry);
                    self.touched.push(entry.key);
                    self.dirty = true;
                    continue;
                }
                Parsed::Refused(message) => Err(message),
            };
            match valid {
                Ok(()) => {
                    self.accept(&entry.key);
                    self.touched.push(entry.key.clone());
                    accepted.push(entry);
                }
                Err(message) => self.refuse(entry, message, logged),
            }
            self.dirty = true;
        }
        accepted
    }

    /// What is no resource's is kept for the scripts that ask for it, within bounds.
    fn keep_extra(&mut self, e: &Entry) {
        if e.value.len() > MAX_EXTRA_BYTES || &*e.value == NOT_UTF8 {
            return self.drop_extra(&e.key);
        }
        let old = self.next.extra.get(&e.key).map(|old| old.value.len());
        let bytes = self.extra_bytes - old.unwrap_or(0) + e.value.len();
        if bytes > MAX_EXTRA_BYTES || (old.is_none() && self.next.extra.len() >= MAX_EXTRA) {
            if !std::mem::replace(&mut self.extra_told, true) {
                tracing::warn!(
                    "{} and what comes after it are not shown to scripts: at most {MAX_EXTRA} keys and {MAX_EXTRA_BYTES} bytes \
                     of no kind of resource are",
                    e.key
                );
            }
            return self.drop_extra(&e.key);
        }
        self.extra_bytes = bytes;
        self.next.extra.insert(e.key.clone(), e.clone());
    }

    fn drop_extra(&mut self, key: &str) {
        if let Some(old) = self.next.extra.remove(key) {
            self.extra_bytes -= old.value.len();
        }
    }

    fn accept(&mut self, key: &Arc<str>) {
        if self.rejected.remove(key).is_some() {
            self.next.errors.remove(key);
        }
    }

    fn refuse(&mut self, entry: Entry, message: String, logged: &mut usize) {
        *logged += 1;
        if *logged <= MAX_LOGGED {
            self.log_refused(&entry, &message);
        }
        self.set_error(&entry.key, entry.mod_revision, message);
        self.rejected.insert(entry.key.clone(), entry);
    }

    fn log_refused(&self, e: &Entry, message: &str) {
        let plain =
            serde_json::from_str::<Value>(&e.value).ok().filter(|value| !value.is_object() && &*e.key != PLUGINS);
        let Some(plain) = plain else {
            let plural = Kind::of_key(&e.key).map_or("plugins", |(kind, _)| kind.plural());
            return tracing::error!("failed to check item data of [{plural}] err:{message}, key: {}", e.key);
        };
        let text: String = plain.as_str().map_or_else(|| plain.to_string(), str::to_owned);
        let text: String = text.chars().take(MAX_SHOWN).collect();
        tracing::error!("invalid item data of [{}{}], val: {text}, it should be an object", self.shown_prefix, e.key);
    }

    fn set_error(&mut self, key: &Arc<str>, revision: i64, message: String) {
        let error = Arc::new(ConfigError { key: key.clone(), revision, message });
        self.next.errors.insert(key.clone(), error);
    }

    fn check_plugins(&mut self, item: &Item) -> std::result::Result<(), String> {
        if self.checker.is_none() {
            return Ok(());
        }
        if let (Item::PluginSource(o), Some(checker)) = (item, &self.checker) {
            return checker.inspect(&o.id, &o.value);
        }
        if let Item::PluginMetadata(o) = item {
            return self.check_plugin(&o.id, &o.json, PluginSchema::Metadata);
        }
        let Some((plugins, schema)) = item.plugins() else { return Ok(()) };
        plugins.0.iter().try_for_each(|p| self.check_plugin(&p.name, &p.json, schema))
    }

    fn check_plugin(&mut self, name: &str, conf: &str, schema: PluginSchema) -> std::result::Result<(), String> {
        let Some(checker) = &self.checker else { return Ok(()) };
        let [high, low] = [0, 1].map(|i| u128::from(self.seeds[i].hash_one((name, conf, schema))));
        let verdict = match self.checked.get(&(high << 64 | low)) {
            Some(known) => known.clone(),
            None => {
                let verdict = checker.check(name, conf, schema);
                if self.checked.len() >= MAX_CHECKED {
                    self.checked.clear();
                }
                self.checked.insert(high << 64 | low, verdict.clone());
                verdict
            }
        };
        match verdict {
            Ok(()) => Ok(()),
            // The metadata of a plugin that is not loaded harms nobody.
            Err(Refusal::Unknown) if !self.strict_plugins || schema == PluginSchema::Metadata => Ok(()),
            Err(refusal) => Err(refusal.words(name)),
        }
    }

    fn place(&mut self, item: Item) {
        let s = &mut self.next;
        match item {
            Item::Route(o) => self.place_route(o),
            Item::Service(o) => self.place_service(o),
            Item::Upstream(o) => drop(s.upstreams.insert(o.id.clone(), o)),
            Item::Consumer(o) => self.place_consumer(o),
            Item::Credential(o) => self.place_credential(o),
            Item::ConsumerGroup(o) => drop(s.consumer_groups.insert(o.id.clone(), o)),
            Item::PluginConfig(o) => drop(s.plugin_configs.insert(o.id.clone(), o)),
            Item::GlobalRule(o) => self.place_global_rule(&o.id.clone(), Some(o)),
            Item::PluginMetadata(o) => drop(s.plugin_metadata.insert(o.id.clone(), o)),
            Item::Ssl(o) => drop(s.ssls.insert(o.id.clone(), o)),
            Item::Function(o) => drop(s.functions.insert(o.id.clone(), o)),
            Item::PluginSource(o) => {
                self.plugins_changed = true;
                drop(s.plugin_sources.insert(o.id.clone(), o));
            }
            Item::StreamRoute(o) => {
                self.streams_changed = true;
                drop(s.stream_routes.insert(o.id.clone(), o));
            }
            Item::Other(kind, o) => drop(s.others.insert((kind, o.id.clone()), o)),
        }
    }

    fn place_route(&mut self, route: Arc<Object<Route>>) {
        let id = route.id.clone();
        let service = route.value.service_id.clone();
        let old = self.next.routes.insert(id.clone(), route.clone());
        if let Some(old) = old.and_then(|o| o.value.service_id.clone()).filter(|old| service.as_ref() != Some(old)) {
            self.unlink(&old, &id);
        }
        if let Some(service) = service {
            self.routes_of_service.entry(service).or_default().insert(id);
        }
        self.route_in(route);
    }

    fn unlink(&mut self, service: &Id, route: &str) {
        if let Some(routes) = self.routes_of_service.get_mut(service) {
            routes.remove(route);
            if routes.is_empty() {
                self.routes_of_service.remove(service);
            }
        }
    }

    fn route_in(&mut self, route: Arc<Object<Route>>) {
        let service = route.value.service_id.as_ref().and_then(|id| self.next.services.get(id)).cloned();
        let hosts = service.as_ref().map_or(&[][..], |s| &s.value.hosts);
        self.next.router.insert(route, hosts);
    }

    fn place_service(&mut self, service: Arc<Object<Service>>) {
        let id = service.id.clone();
        let old = self.next.services.insert(id.clone(), service.clone());
        let old_hosts = old.as_ref().map_or(&[][..], |s| &s.value.hosts);
        if old_hosts != service.value.hosts {
            self.reroute(&id);
        }
    }

    /// Puts the routes that take this service's hosts in anew.
    fn reroute(&mut self, service: &str) {
        let Some(ids) = self.routes_of_service.get(service) else { return };
        let routes: Vec<_> = ids
            .iter()
            .filter_map(|id| self.next.routes.get(id))
            .filter(|r| r.value.hosts.is_empty())
            .cloned()
            .collect();
        routes.into_iter().for_each(|r| self.route_in(r));
    }

    fn place_consumer(&mut self, o: Arc<Object<Consumer>>) {
        let claim = Claim { create_revision: o.create_revision, consumer: o.id.clone(), credential: None };
        let old = self.next.consumers.insert(o.id.clone(), o.clone());
        if let Some(old) = old {
            self.disclaim(&old.value.auth_keys, &Claim { create_revision: old.create_revision, ..claim.clone() });
        }
        self.claim(&o.value.auth_keys, claim);
    }

    fn place_credential(&mut self, o: Arc<Object<Credential>>) {
        let claim = credential_claim(&o);
        let old = self.next.credentials.insert(o.id.clone(), o.clone());
        if let Some(old) = old {
            self.disclaim(&old.value.auth_keys, &credential_claim(&old));
        }
        self.claim(&o.value.auth_keys, claim);
    }

    fn claim(&mut self, keys: &[AuthKey], claim: Claim) {
        self.next.consumers_uid = next_uid();
        for key in keys {
            let holder = self.next.auth_index.get(key).cloned();
            if let Some((consumer, credential)) = holder {
                if consumer == claim.consumer && credential == claim.credential {
                    continue;
                }
                let create_revision = self.created(&consumer, credential.as_ref());
                let claims = self.contested.entry(key.clone()).or_default();
                claims.insert(Claim { create_revision, consumer, credential });
                claims.insert(claim.clone());
                if claims.first() != Some(&claim) {
                    continue;
                }
            }
            self.next.auth_index.insert(key.clone(), (claim.consumer.clone(), claim.credential.clone()));
        }
    }

    fn created(&self, consumer: &Id, credential: Option<&Id>) -> i64 {
        let s = &self.next;
        match credential {
            None => s.consumers.get(consumer).map_or(0, |o| o.create_revision),
            Some(id) => s.credentials.get(id).map_or(0, |o| o.create_revision),
        }
    }

    fn disclaim(&mut self, keys: &[AuthKey], claim: &Claim) {
        self.next.consumers_uid = next_uid();
        for key in keys {
            let mut heir = None;
            if let Some(claims) = self.contested.get_mut(key) {
                claims.remove(claim);
                heir = claims.first().cloned();
                if claims.len() < 2 {
                    self.contested.remove(key);
                }
            }
            match heir {
                Some(c) => drop(self.next.auth_index.insert(key.clone(), (c.consumer, c.credential))),
                None => drop(self.next.auth_index.remove(key)),
            }
        }
    }

    fn place_global_rule(&mut self, id: &str, rule: Option<Arc<Object<GlobalRule>>>) {
        let mut rules: Vec<_> = self.next.global_rules.iter().filter(|r| &*r.id != id).cloned().collect();
        rules.extend(rule);
        rules.sort_by(|a, b| (a.create_revision, &a.id).cmp(&(b.create_revision, &b.id)));
        self.next.global_rules_uid = if rules.is_empty() { 0 } else { next_uid() };
        self.next.global_rules = rules.into();
    }

    fn remove(&mut self, key: &str) {
        self.dirty = true;
        self.touched.push(key.into());
        self.drop_extra(key);
        if self.rejected.remove(key).is_some() {
            self.next.errors.remove(key);
        }
        if key == PLUGINS {
            self.plugins_changed |= self.plugin_list.take().is_some() && self.follows_plugin_list;
            self.next.plugin_names = None;
            return;
        }
        let Some((kind, id)) = Kind::of_key(key) else { return };
        let s = &mut self.next;
        match kind {
            Kind::Route => self.remove_route(id),
            Kind::Service => {
                if s.services.remove(id).is_some_and(|o| !o.value.hosts.is_empty()) {
                    self.reroute(id);
                }
            }
            Kind::Upstream => drop(s.upstreams.remove(id)),
            Kind::Consumer => {
                if let Some(o) = s.consumers.remove(id) {
                    let claim = Claim { create_revision: o.create_revision, consumer: o.id.clone(), credential: None };
                    self.disclaim(&o.value.auth_keys, &claim);
                }
            }
            Kind::Credential => {
                if let Some(o) = s.credentials.remove(id) {
                    self.disclaim(&o.value.auth_keys, &credential_claim(&o));
                }
            }
            Kind::ConsumerGroup => drop(s.consumer_groups.remove(id)),
            Kind::PluginConfig => drop(s.plugin_configs.remove(id)),
            Kind::GlobalRule => self.place_global_rule(id, None),
            Kind::PluginMetadata => drop(s.plugin_metadata.remove(id)),
            Kind::Ssl => drop(s.ssls.remove(id)),
            Kind::Function => drop(s.functions.remove(id)),
            Kind::PluginSource => self.plugins_changed |= s.plugin_sources.remove(id).is_some(),
            Kind::StreamRoute => self.streams_changed |= s.stream_routes.remove(id).is_some(),
            Kind::Proto | Kind::Secret | Kind::GraphqlCostDecoration => drop(s.others.remove(&(kind, Id::from(id)))),
        }
    }

    fn remove_route(&mut self, id: &str) {
        let Some(old) = self.next.routes.remove(id) else { return };
        self.next.router.remove(id);
        if let Some(service) = &old.value.service_id {
            self.unlink(service, id);
        }
    }
}

/// Plugins that may have another schema than before.
enum ChangedPlugins {
    All,
    These(HashSet<Box<str>>),
}

impl ChangedPlugins {
    fn have(&self, plugin: &str) -> bool {
        match self {
            ChangedPlugins::All => true,
            ChangedPlugins::These(names) => names.contains(plugin),
        }
    }
}

fn credential_claim(o: &Object<Credential>) -> Claim {
    let consumer = Id::from(&*o.value.username);
    Claim { create_revision: o.create_revision, consumer, credential: Some(o.id.clone()) }
}

/// Whether a key is a resource's or the list of plugins, and so belongs in the last good state.
fn is_kept(key: &str) -> bool {
    key == PLUGINS || Kind::of_key(key).is_some()
}

fn is_plugin_key(key: &str) -> bool {
    key == PLUGINS || key.starts_with("/plugin_sources/")
}

enum Parsed {
    Item(Item),
    PluginList(Arc<[Box<str>]>),
    /// Not a resource.
    Skipped,
    Refused(String),
}

/// In the order of `entries`, on all cores when there are many.
fn parse_all(parser: &Parser, entries: &[Entry]) -> Vec<Parsed> {
    let cores = thread::available_parallelism().map_or(1, |n| n.get());
    if entries.len() < PARALLEL_FROM || cores == 1 {
        return entries.iter().map(|e| parse(parser, e)).collect();
    }
    let share = entries.len().div_ceil(cores);
    thread::scope(|scope| {
        let threads: Vec<_> = entries
            .chunks(share)
            .map(|chunk| (chunk, scope.spawn(move || chunk.iter().map(|e| parse(parser, e)).collect::<Vec<_>>())))
            .collect();
        let mut all = Vec::with_capacity(entries.len());
        for (chunk, thread) in threads {
            match thread.join() {
                Ok(parsed) => all.extend(parsed),
                Err(_) => all.extend(chunk.iter().map(|e| parse(parser, e))),
            }
        }
        all
    })
}

fn parse(parser: &Parser, e: &Entry) -> Parsed {
    if &*e.key != PLUGINS && Kind::of_key(&e.key).is_none() {
        return Parsed::Skipped;
    }
    if &*e.value == NOT_UTF8 {
        return Parsed::Refused("the value is not UTF-8 text".to_owned());
    }
    if &*e.key == PLUGINS {
        return match plugin_names(&e.value) {
            Ok(names) => Parsed::PluginList(names),
            Err(message) => Parsed::Refused(message),
        };
    }
    let Some((kind, id)) = Kind::of_key(&e.key) else { return Parsed::Skipped };
    // A config must not take the process down, whatever a parser overlooked.
    match catch_unwind(AssertUnwindSafe(|| parser(kind, id, e))) {
        Ok(Ok(item)) => Parsed::Item(item),
        Ok(Err(error)) => Parsed::Refused(error.to_string()),
        Err(_) => Parsed::Refused("internal error: the parser failed".to_owned()),
    }
}

/// `[{"name": "key-auth"}, {"name": "mqtt-proxy", "stream": true}]`: the names of those for HTTP.
fn plugin_names(text: &str) -> std::result::Result<Arc<[Box<str>]>, String> {
    let list: Vec<Value> = serde_json::from_str(text).map_err(|e| format!("invalid list of plugins: {e}"))?;
    let mut names: Vec<Box<str>> = Vec::new();
    for (i, plugin) in list.iter().enumerate() {
        let wrong = |key: &str, expected: &str| {
            let got = type_name(&plugin[key]);
            let what = format!("property \"{key}\" validation failed: wrong type: expected {expected}, got {got}");
            format!("failed to validate item {}: {what}", i + 1)
        };
        let name = plugin["name"].as_str().ok_or_else(|| wrong("name", "string"))?;
        match &plugin["stream"] {
            Value::Null | Value::Bool(false) => names.push(name.into()),
            Value::Bool(true) => {}
            _ => return Err(wrong("stream", "boolean")),
        }
    }
    Ok(names.into())
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

#[cfg(test)]
mod tests;
