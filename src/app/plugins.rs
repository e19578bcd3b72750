//! The control thread's plugin VM, as the store and the Admin API want to see it.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    rc::Rc,
    sync::{Arc, PoisonError, RwLock},
};

use serde_json::{Value, json};

use crate::{
    admin::{Listed, PluginHost, PluginInfo, plugins::Trying},
    conf,
    error::Result,
    model::{Id, Object, PluginSource, SchemaKind, crypt::EncryptFields, next_uid},
    plugin::{Checker, PluginTrial, Setup, Trial, Tried, registry},
    schema,
    store::{PluginChecker, PluginSchema, Refusal, Snapshot},
};

/// Asks the plugins themselves. One for the control thread; clones share it.
#[derive(Clone)]
pub struct Plugins {
    checker: Rc<Checker>,
    /// The configuration file, where the command line names one.
    file: Option<PathBuf>,
    /// Whether a reload reads that file again.
    rereads: bool,
    /// The plugins without a module that were told last.
    told: Rc<RefCell<Vec<Box<str>>>>,
    pub fields: Arc<Fields>,
}

impl Plugins {
    /// Loads the plugins of the binary and the disk; those of the store come with `reload`.
    pub fn new(setup: Setup, file: Option<PathBuf>) -> Result<Plugins> {
        let checker = Rc::new(Checker::new(setup, &Snapshot::default())?);
        let plugins = Plugins { checker, file, rereads: true, told: Rc::default(), fields: Arc::default() };
        plugins.note_fields();
        Ok(plugins)
    }

    /// The same, by this configuration for good: it is no gateway's that runs.
    pub fn fixed(setup: Setup) -> Result<Plugins> {
        Ok(Plugins { rereads: false, ..Plugins::new(setup, None)? })
    }

    pub fn checker(&self) -> &Checker {
        &self.checker
    }

    /// Which plugins there are, and what they are told, may have changed in the configuration file. One with mistakes changes
    /// nothing. Gives the configuration of before, where it changed.
    fn reread(&self) -> Option<Arc<registry::Configured>> {
        let setup = self.checker.setup();
        match conf::load(&setup.prefix, self.file.as_deref()) {
            Ok((config, _)) => Some(setup.reread(&config)),
            Err(mistakes) => {
                for mistake in &mistakes.0 {
                    tracing::error!("plugins are loaded anew by the configuration before: {mistake}");
                }
                None
            }
        }
    }

    /// Logs which plugins somebody has listed that have no module: those that nobody knows as errors, and APISIX's that are not
    /// there yet, of the configuration's own list, in one line. As long as they are the same, once.
    pub fn tell_missing(&self) {
        let missing = self.checker.missing();
        if *self.told.borrow() == missing {
            return;
        }
        let known = |name: &str| schema::plugin_names().any(|known| known == name);
        let (theirs, nobodys): (Vec<_>, Vec<_>) = missing.iter().map(|name| &**name).partition(|name| known(name));
        for name in nobodys {
            tracing::error!(target: "lua", "failed to load plugin [{name}] err: module 'apisix.plugins.{name}' not found");
        }
        if !theirs.is_empty() && self.checker.setup().lists_plugins() {
            tracing::warn!(
                "plugins: this build does not have {}: objects that use them run without",
                theirs.join(", ")
            );
        }
        *self.told.borrow_mut() = missing;
    }

    /// How plugins are loaded from the next reload on.
    pub fn set_up(&self, setup: Setup) {
        self.checker.set_up(setup);
    }

    fn note_fields(&self) {
        let all = self.checker.list().into_iter().map(|plugin| (plugin.name.clone(), Encrypted::of(&plugin.json)));
        let all = all.filter(|(_, encrypted)| !encrypted.is_empty()).collect();
        *self.fields.0.write().unwrap_or_else(PoisonError::into_inner) = all;
    }
}

impl PluginChecker for Plugins {
    fn check(&self, plugin: &str, conf: &str, schema: PluginSchema) -> Result<(), Refusal> {
        PluginChecker::check(&*self.checker, plugin, conf, schema)
    }

    fn inspect(&self, name: &str, source: &PluginSource) -> Result<(), String> {
        PluginChecker::inspect(&*self.checker, name, source)
    }

    fn reload(&self, snapshot: &Snapshot) -> Result<()> {
        let before = if self.rereads { self.reread() } else { None };
        let reloaded = PluginChecker::reload(&*self.checker, snapshot);
        match (&reloaded, before) {
            (Ok(()), _) => self.note_fields(),
            (Err(_), Some(before)) => self.checker.setup().put_back(before),
            (Err(_), None) => {}
        }
        self.tell_missing();
        reloaded
    }
}

impl PluginHost for Plugins {
    fn check(&self, plugin: &str, conf: &mut Value, schema: PluginSchema) -> Result<(), Refusal> {
        self.checker.check_conf(plugin, conf, schema)
    }

    fn compile_function(&self, id: &str, source: &str) -> Result<(), String> {
        self.checker.compile_function(id, source)
    }

    fn compile_chunk(&self, source: &str) -> Result<(), String> {
        self.checker.compile_chunk(source)
    }

    fn explain_json(&self, text: &[u8]) -> Option<String> {
        self.checker.explain_json(text)
    }

    fn with_sources(&self, sources: Vec<(String, PluginSource)>) -> Option<Rc<dyn PluginHost>> {
        let object = |(id, value): (String, PluginSource)| {
            let (id, json): (Id, _) = (id.into(), "{}".into());
            let (create_revision, mod_revision) = (0, 0);
            (id.clone(), Arc::new(Object { id, uid: next_uid(), create_revision, mod_revision, json, value }))
        };
        let snapshot = Snapshot { plugin_sources: sources.into_iter().map(object).collect(), ..Snapshot::default() };
        let checker = Checker::new(self.checker.setup(), &snapshot);
        let checker = checker.inspect_err(|e| tracing::error!("uploaded plugins are not checked: {e}")).ok()?;
        Some(Rc::new(Plugins { checker: Rc::new(checker), rereads: false, ..self.clone() }))
    }

    fn inspect_plugin(&self, name: &str, source: &PluginSource) -> Result<(), String> {
        self.checker.inspect_plugin(name, source).map(drop)
    }

    fn try_plugin(&self, snapshot: Arc<Snapshot>, trial: PluginTrial) -> Trying {
        Box::pin(self.checker.try_plugin(snapshot, trial))
    }

    fn try_function(&self, snapshot: Arc<Snapshot>, trial: Trial) -> Trying<Tried> {
        Box::pin(self.checker.try_function(snapshot, trial))
    }

    fn broken(&self) -> Vec<(String, String)> {
        self.checker.broken()
    }

    fn failed_inits(&self) -> BTreeMap<String, String> {
        self.checker.failed_inits()
    }

    fn listed(&self) -> Option<Listed> {
        let (config, _) = conf::load(&self.checker.setup().prefix, self.file.as_deref()).ok()?;
        let names = |key: &str| config.json.get(key).and_then(Value::as_array).cloned().unwrap_or_default();
        let http: Vec<Value> = names("plugins").into_iter().map(|name| json!({ "name": name })).collect();
        let stream = names("stream_plugins").into_iter().map(|name| json!({ "name": name, "stream": true }));
        let is_default = config.plugins_are_default;
        // Without a list the user's own files run here: so they do where this one is followed.
        let own = if is_default { self.checker.setup().files_of_lua_path() } else { Vec::new() };
        let own = own.into_iter().map(|name| json!({ "name": &*name })).filter(|own| !http.contains(own));
        let own: Vec<Value> = own.collect();
        Some(Listed { names: http.into_iter().chain(own).chain(stream).collect(), is_default })
    }

    fn list(&self) -> Vec<PluginInfo> {
        let info = |plugin: Arc<crate::plugin::PluginInfo>| PluginInfo {
            name: plugin.name.to_string(),
            priority: plugin.priority,
            about: plugin.json.as_object().cloned().unwrap_or_default(),
        };
        self.checker.list().into_iter().map(info).collect()
    }
}

/// Which fields of the plugins' confs are stored encrypted. Read by the threads that parse the store's objects.
#[derive(Default)]
pub struct Fields(RwLock<HashMap<Box<str>, Encrypted>>);

/// Paths of one plugin's secret fields, by schema.
#[derive(Clone, Debug, Default)]
struct Encrypted {
    route: Vec<Box<str>>,
    consumer: Vec<Box<str>>,
    metadata: Vec<Box<str>>,
}

impl Encrypted {
    fn of(plugin: &Value) -> Encrypted {
        let fields = |schema: &str| {
            let listed = plugin.get(schema).and_then(|s| s.get("encrypt_fields")).and_then(Value::as_array);
            listed.into_iter().flatten().filter_map(Value::as_str).map(Box::from).collect()
        };
        Encrypted { route: fields("schema"), consumer: fields("consumer_schema"), metadata: fields("metadata_schema") }
    }

    fn is_empty(&self) -> bool {
        self.route.is_empty() && self.consumer.is_empty() && self.metadata.is_empty()
    }
}

impl EncryptFields for Fields {
    fn encrypt_fields(&self, plugin: &str, kind: SchemaKind) -> Vec<Box<str>> {
        let all = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let Some(encrypted) = all.get(plugin) else { return Vec::new() };
        match kind {
            SchemaKind::Route => encrypted.route.clone(),
            SchemaKind::Consumer => encrypted.consumer.clone(),
            SchemaKind::Metadata => encrypted.metadata.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secret_fields_of_own_plugins_are_known_by_schema() {
        let json = json!({
            "schema": {"encrypt_fields": ["a", "b.c"]},
            "consumer_schema": {"encrypt_fields": ["d"]},
        });
        let fields = Fields::default();
        fields.0.write().unwrap().insert("mine".into(), Encrypted::of(&json));
        assert_eq!(fields.encrypt_fields("mine", SchemaKind::Route), ["a".into(), "b.c".into()]);
        assert_eq!(fields.encrypt_fields("mine", SchemaKind::Consumer), ["d".into()]);
        assert!(fields.encrypt_fields("mine", SchemaKind::Metadata).is_empty());
        assert!(fields.encrypt_fields("other", SchemaKind::Route).is_empty());
    }
}
