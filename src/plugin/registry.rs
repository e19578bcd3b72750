//! The plugins that are loaded: which names, from where, what each says of itself; and asking them about confs.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    rc::Rc,
    sync::{Arc, Mutex, PoisonError},
};

use arc_swap::ArcSwap;
use serde_json::Value;

use super::{
    PhaseMask, Watching, natives,
    run::{
        function_trial::{self, Trial, Tried},
        trial::{self, PluginTrial},
    },
};
use crate::{
    conf::locations::Locations,
    error::{Error, Result},
    exchange::Phase,
    lua::{
        Stack, Vm, VmConfig,
        api::script,
        convert,
        vm::{self, Purpose},
    },
    model::PluginSource,
    store::{
        Snapshot,
        builder::{PluginChecker, PluginSchema, Refusal},
    },
};

/// What a plugin says of itself. Goes between threads.
#[derive(Clone, Debug, Default)]
pub struct PluginInfo {
    pub name: Box<str>,
    pub priority: i64,
    pub version: Value,
    /// `type = "auth"`: it works with consumers.
    pub auth: bool,
    /// `run_policy = "prefer_route"`: a global rule's instance steps back when the route has one.
    pub prefer_route: bool,
    /// The phases that it has functions for.
    pub phases: PhaseMask,
    /// The Lua tables as JSON: `schema`, `consumer_schema`, `metadata_schema`, `type`, `scope`, …
    pub json: Value,
}

/// Phases in the order of `moongate.plugins`' `phases`.
pub(super) const PHASES: [Phase; 7] = [
    Phase::Rewrite,
    Phase::Access,
    Phase::BeforeProxy,
    Phase::HeaderFilter,
    Phase::BodyFilter,
    Phase::DelayedBodyFilter,
    Phase::Log,
];

impl PluginInfo {
    fn from_json(json: Value) -> PluginInfo {
        let is = |key: &str, text: &str| json.get(key).and_then(Value::as_str) == Some(text);
        let mut phases = PhaseMask::default();
        for n in json.get("phases").and_then(Value::as_array).into_iter().flatten() {
            let n = n.as_u64().unwrap_or(0) as usize;
            if let Some(phase) = n.checked_sub(1).and_then(|i| PHASES.get(i)) {
                phases.add(*phase);
            }
        }
        PluginInfo {
            name: json.get("name").and_then(Value::as_str).unwrap_or_default().into(),
            priority: json.get("priority").and_then(Value::as_f64).unwrap_or(0.0) as i64,
            version: json.get("version").cloned().unwrap_or_default(),
            auth: is("type", "auth"),
            prefer_route: is("run_policy", "prefer_route"),
            phases,
            json,
        }
    }
}

/// The loaded plugins by name.
pub type Plugins = HashMap<Box<str>, Arc<PluginInfo>>;

/// Plugins that are there and do not load, and why. Few, and most often none.
#[derive(Clone, Debug, Default)]
pub struct Broken(Vec<(Box<str>, String)>);

impl Broken {
    /// Why the plugin of that name does not load.
    pub fn why(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(own, _)| **own == *name).map(|(_, why)| why.as_str())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// An error where one of them was loaded `before`: what it did for its routes, nothing would do any more.
    pub fn refuse_loss(&self, before: &Plugins) -> Result<()> {
        let lost = self.0.iter().filter(|(name, _)| before.contains_key(name));
        let lost: Vec<String> =
            lost.map(|(name, why)| format!("plugin [{name}]: {}", without_traceback(why))).collect();
        match lost.is_empty() {
            true => Ok(()),
            false => {
                Err(Error::script(lost.join("; ")).context("the plugins were not loaded anew, those of before go on"))
            }
        }
    }
}

/// The message of a Lua error alone, in one line.
fn without_traceback(text: &str) -> String {
    let message = text.split("\nstack traceback:").next().unwrap_or(text);
    message.lines().map(str::trim).collect::<Vec<_>>().join(" ")
}

/// What is the same for every VM of the process.
#[derive(Clone, Debug, Default)]
pub struct Setup {
    pub prefix: PathBuf,
    /// Shared: what `reread` takes over, all clones see.
    config: Arc<ArcSwap<Value>>,
    pub locations: Arc<Locations>,
    pub watching: Arc<Watching>,
    /// Shared as well: workers note it, the APIs tell.
    pub inits: Arc<Inits>,
}

/// The plugins of each worker's last load whose `init` has failed, and why.
#[derive(Debug, Default)]
pub struct Inits(Mutex<BTreeMap<usize, Vec<(String, String)>>>);

impl Inits {
    pub fn note(&self, worker: usize, failed: Vec<(String, String)>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(worker, failed);
    }

    /// Each plugin once, with what it has told the first worker that it failed in.
    fn failed(&self) -> BTreeMap<String, String> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut failed = BTreeMap::new();
        for (name, why) in all.values().flatten() {
            failed.entry(name.clone()).or_insert_with(|| without_traceback(why));
        }
        failed
    }
}

/// Why a function without a sandbox does not run.
pub const UNTRUSTED: &str = "lua.trusted_functions of config.yaml allows no function without a sandbox";

/// `lua.trusted_functions` of the effective configuration. Whoever may write functions may upload plugins, which can do as much: so
/// nothing is forbidden unless somebody says so.
pub fn trusts_functions(config: &Value) -> bool {
    config.pointer("/lua/trusted_functions").and_then(Value::as_bool).unwrap_or(true)
}

/// The keys that a reload of plugins reads again.
const REREAD: [&str; 3] = ["plugins", "stream_plugins", "plugin_attr"];

impl Setup {
    /// `config`: config.yaml with its defaults.
    pub fn new(prefix: PathBuf, config: Arc<Value>, locations: Arc<Locations>) -> Setup {
        let config = Arc::new(ArcSwap::new(config));
        Setup { prefix, config, locations, watching: Arc::default(), inits: Arc::default() }
    }

    /// The same, with who is watched.
    pub fn watched(self, watching: Arc<Watching>) -> Setup {
        Setup { watching, ..self }
    }

    /// Takes over which plugins there are and what they are told (`plugins`, `plugin_attr`) from a newer configuration. Gives
    /// the one before, for `put_back`.
    pub fn reread(&self, config: &Value) -> Arc<Value> {
        let mut next = Value::clone(&self.config.load());
        for key in REREAD {
            next[key] = config.get(key).cloned().unwrap_or_default();
        }
        self.config.swap(Arc::new(next))
    }

    pub fn put_back(&self, config: Arc<Value>) {
        self.config.store(config);
    }

    pub fn trusts_functions(&self) -> bool {
        trusts_functions(&self.config.load())
    }

    fn text(&self, key: &str) -> String {
        let config = self.config.load();
        config.pointer("/apisix").and_then(|a| a.get(key)).and_then(Value::as_str).unwrap_or_default().to_owned()
    }

    /// How a VM for `purpose` is made under this configuration.
    pub fn vm_config(&self, purpose: Purpose, worker: usize, snapshot: &Snapshot) -> VmConfig {
        let sources = snapshot.plugin_sources.values().flat_map(|o| o.value.chunks(&o.id));
        VmConfig {
            purpose,
            prefix: self.prefix.clone(),
            lua_path: self.text("extra_lua_path"),
            lua_cpath: self.text("extra_lua_cpath"),
            config: self.config.load_full(),
            worker,
            plugin_sources: sources.collect(),
            package_path: self.locations.package_path.clone(),
            package_cpath: self.locations.package_cpath.clone(),
            groups: Rc::default(),
        }
    }

    /// The names to load: the store's list or config.yaml's, uploaded sources, and files in the user's directories.
    pub fn names(&self, snapshot: &Snapshot) -> Vec<Box<str>> {
        let mut names: Vec<Box<str>> = match &snapshot.plugin_names {
            Some(listed) => listed.to_vec(),
            None => match self.config.load().get("plugins").and_then(Value::as_array) {
                Some(listed) => listed.iter().filter_map(Value::as_str).map(Box::from).collect(),
                None => packed_plugins().map(Box::from).collect(),
            },
        };
        names.extend(snapshot.plugin_sources.keys().map(|id| Box::from(&**id)));
        plugin_files(&self.prefix.join("plugins"), &mut names);
        for pattern in self.text("extra_lua_path").split(';') {
            if let Some(dir) = pattern.strip_suffix("/?.lua") {
                plugin_files(&Path::new(dir).join("apisix/plugins"), &mut names);
            }
        }
        let mut seen = std::collections::HashSet::new();
        names.retain(|n| seen.insert(n.clone()));
        names
    }
}

/// Names of the plugins that are part of the binary.
fn packed_plugins() -> impl Iterator<Item = &'static str> {
    vm::PACKED
        .iter()
        .filter(|(_, file, _)| file.starts_with("plugins/"))
        .filter_map(|(module, ..)| module.strip_prefix("apisix.plugins."))
        .filter(|name| !name.contains('.'))
}

fn plugin_files(dir: &Path, names: &mut Vec<Box<str>>) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    let mut found: Vec<Box<str>> =
        entries.flatten().filter_map(|e| e.file_name().to_string_lossy().strip_suffix(".lua").map(Box::from)).collect();
    found.sort();
    names.append(&mut found);
}

/// A VM that plugins can be loaded in.
pub fn vm(config: VmConfig) -> Result<Rc<Vm>> {
    Vm::with(config, &[natives::register])
}

/// Loads the plugins. What does not load is logged and left out; the second result says what of it is there, an uploaded source
/// that was refused included.
pub fn load(vm: &Rc<Vm>, setup: &Setup, snapshot: &Snapshot) -> (Plugins, Broken) {
    run_user_hook(vm);
    let (mut plugins, mut broken) = (Plugins::new(), Vec::new());
    for name in &setup.names(snapshot) {
        match load_one(vm, name) {
            Ok(info) => {
                plugins.insert(name.clone(), Arc::new(info));
            }
            // config.yaml's default list names plugins of APISIX that this build does not have.
            Err(Refused::Missing) => tracing::debug!(target: "lua", "plugin [{name}] not found"),
            Err(Refused::Broken(text)) => {
                tracing::error!(target: "lua", "failed to load plugin [{name}] err: {text}");
                broken.push((name.clone(), text));
            }
        }
    }
    for error in snapshot.errors.values() {
        if let Some(name) = error.key.strip_prefix("/plugin_sources/")
            && !plugins.contains_key(name)
            && broken.iter().all(|(own, _)| **own != *name)
        {
            broken.push((name.into(), error.message.clone()));
        }
    }
    (plugins, Broken(broken))
}

/// Lists them in error.log, as APISIX does in its debug mode.
pub fn tell(plugins: &Plugins) {
    let mut all: Vec<_> = plugins.values().collect();
    all.sort_by(|a, b| b.priority.cmp(&a.priority).then_with(|| a.name.cmp(&b.name)));
    for plugin in all {
        tracing::info!(target: "lua", "loaded plugin and sort by priority: {} name: {}", plugin.priority, plugin.name);
    }
}

/// `apisix.lua_module_hook`. One that fails is told, and plugins are loaded as they are.
fn run_user_hook(vm: &Rc<Vm>) {
    let hook =
        vm.config.config.pointer("/apisix/lua_module_hook").and_then(Value::as_str).filter(|name| !name.is_empty());
    let Some(name) = hook else { return };
    let called = call::<(Option<String>, Option<String>)>(vm, "moongate.plugins", "run_user_hook", name);
    let (failed, in_vain) = called.unwrap_or_else(|e| (Some(e.to_string()), None));
    // Once is enough: the first worker's VM stands for all.
    if let Some(names) = in_vain.filter(|_| vm.config.purpose == Purpose::Plugins && vm.config.worker == 0) {
        tracing::warn!(
            target: "lua",
            "apisix.lua_module_hook: module [{name}] replaces {names}: no effect on requests, which the gateway serves itself"
        );
    }
    if let Some(why) = failed {
        tracing::error!(target: "lua", "apisix.lua_module_hook: failed to load module [{name}]: {why}");
    }
}

enum Refused {
    Missing,
    Broken(String),
}

fn load_one(vm: &Rc<Vm>, name: &str) -> Result<PluginInfo, Refused> {
    let broken = |e: Error| Refused::Broken(e.to_string());
    let (info, reason, missing): (mlua::Value, Option<String>, Option<String>) =
        call(vm, "moongate.plugins", "load", name).map_err(broken)?;
    match (info, missing) {
        (mlua::Value::Table(t), _) => json_of(vm, t).map(PluginInfo::from_json).map_err(broken),
        (_, Some(_)) => Err(Refused::Missing),
        _ => Err(Refused::Broken(reason.unwrap_or_default())),
    }
}

/// Calls a Lua module's function outside of any request.
pub fn call<R: mlua::FromLuaMulti>(vm: &Rc<Vm>, module: &str, name: &str, args: impl mlua::IntoLuaMulti) -> Result<R> {
    vm.entered(|| {
        let require: mlua::Function = vm.lua.globals().get("require").map_err(script)?;
        let module: mlua::Table = require.call(module).map_err(script)?;
        let function: mlua::Function = module.get(name).map_err(script)?;
        crate::lua::limits::bounded(vm.main(), vm.limits(), || function.call(args)).map_err(script)
    })
}

/// A Lua table as JSON.
fn json_of(vm: &Rc<Vm>, table: mlua::Table) -> Result<Value> {
    let mut json = Err("empty".into());
    // SAFETY: the table is the only value on the stack; reading it raises nothing.
    unsafe { vm.lua.exec_raw::<()>(table, |l| json = convert::to_json(&Stack::new(l), 1)).map_err(script)? };
    json.map_err(|raise| Error::script(raise.0))
}

/// A JSON value as a Lua table.
fn lua_of(vm: &Rc<Vm>, json: &Value) -> Result<mlua::Value> {
    let mut pushed = Ok(());
    // SAFETY: pushes exactly one value when it succeeds; what a failure left is dropped with the results.
    let value =
        unsafe { vm.lua.exec_raw::<mlua::MultiValue>((), |l| pushed = convert::push_json(&Stack::new(l), json)) };
    pushed.map_err(|raise| Error::script(raise.0))?;
    Ok(value.map_err(script)?.into_iter().next().unwrap_or(mlua::Value::Nil))
}

/// Answers for the plugins on the control thread: one VM that never serves.
pub struct Checker {
    setup: RefCell<Setup>,
    state: RefCell<Option<Loaded>>,
    generation: Cell<u64>,
}

#[derive(Clone)]
struct Loaded {
    vm: Rc<Vm>,
    plugins: Rc<Plugins>,
    broken: Rc<Broken>,
}

impl Checker {
    pub fn new(setup: Setup, snapshot: &Snapshot) -> Result<Checker> {
        let checker = Checker { setup: RefCell::new(setup), state: RefCell::default(), generation: Cell::new(0) };
        checker.load(snapshot)?;
        Ok(checker)
    }

    fn load(&self, snapshot: &Snapshot) -> Result<()> {
        let loaded = self.attempt(snapshot)?;
        *self.state.borrow_mut() = Some(loaded);
        self.generation.set(self.generation.get() + 1);
        Ok(())
    }

    /// What the plugins of now come to. An error, too, where one that is loaded does not load any more.
    fn attempt(&self, snapshot: &Snapshot) -> Result<Loaded> {
        let setup = self.setup.borrow().clone();
        let vm = vm(setup.vm_config(Purpose::Check, 0, snapshot))?;
        let (plugins, broken) = load(&vm, &setup, snapshot);
        if let Some(before) = self.loaded() {
            broken.refuse_loss(&before.plugins)?;
        }
        Ok(Loaded { vm, plugins: Rc::new(plugins), broken: Rc::new(broken) })
    }

    /// Whether the plugins would load: nothing changes by it.
    pub fn would_load(&self, snapshot: &Snapshot) -> Result<()> {
        self.attempt(snapshot).map(drop)
    }

    /// How plugins are loaded from the next time on.
    pub fn set_up(&self, setup: Setup) {
        *self.setup.borrow_mut() = setup;
    }

    /// How plugins are loaded.
    pub fn setup(&self) -> Setup {
        self.setup.borrow().clone()
    }

    fn loaded(&self) -> Option<Loaded> {
        self.state.borrow().clone()
    }

    /// The loaded plugins.
    pub fn list(&self) -> Vec<Arc<PluginInfo>> {
        let mut all: Vec<_> = self.loaded().map(|l| l.plugins.values().cloned().collect()).unwrap_or_default();
        all.sort_by(|a, b| b.priority.cmp(&a.priority).then_with(|| a.name.cmp(&b.name)));
        all
    }

    /// The plugins that are there and do not load, and why.
    pub fn broken(&self) -> Vec<(String, String)> {
        let shown = |(name, why): &(Box<str>, String)| (name.to_string(), without_traceback(why));
        self.loaded().map(|l| l.broken.0.iter().map(shown).collect()).unwrap_or_default()
    }

    /// The plugins whose `init` has failed in a worker, and why, by name.
    pub fn failed_inits(&self) -> BTreeMap<String, String> {
        self.setup.borrow().inits.failed()
    }

    pub fn get(&self, name: &str) -> Option<Arc<PluginInfo>> {
        self.loaded()?.plugins.get(name).cloned()
    }

    /// Runs the plugin's `check_schema` on a `conf` that nothing has stored: it leaves nothing behind.
    pub fn check_conf(&self, plugin: &str, conf: &Value, schema: PluginSchema) -> Result<(), Refusal> {
        self.run_check(plugin, conf, schema, false)
    }

    fn run_check(&self, plugin: &str, conf: &Value, schema: PluginSchema, stored: bool) -> Result<(), Refusal> {
        let invalid = |e: Error| Refusal::Invalid(e.to_string());
        let Some(Loaded { vm, plugins, .. }) = self.loaded() else { return Err(Refusal::Unknown) };
        if !plugins.contains_key(plugin) {
            return Err(Refusal::Unknown);
        }
        let kind = match schema {
            PluginSchema::Plugin => None,
            PluginSchema::Consumer => Some(1),
            PluginSchema::Metadata => Some(2),
        };
        let conf = lua_of(&vm, conf).map_err(invalid)?;
        let (ok, reason): (Option<bool>, Option<String>) =
            call(&vm, "moongate.plugins", "check", (plugin, conf, kind, stored)).map_err(invalid)?;
        if ok == Some(true) { Ok(()) } else { Err(Refusal::Invalid(reason.unwrap_or_default())) }
    }

    /// What the text of a plugin file says of itself, found in a VM of its own; or why it cannot be a plugin, with file
    /// and line.
    pub fn inspect_plugin(&self, name: &str, source: &PluginSource) -> Result<PluginInfo, String> {
        let mut config = self.setup.borrow().vm_config(Purpose::Check, 0, &Snapshot::default());
        config.plugin_sources.extend(source.chunks(name));
        let vm = vm(config).map_err(|e| e.to_string())?;
        // A module that is required later must compile, too.
        for (module, text) in source.chunks(name).skip(1) {
            vm::load_chunk(&vm.lua, &format!("plugins/{module}.lua"), text.as_bytes()).map_err(plain)?;
        }
        let chunk = vm::load_chunk(&vm.lua, &format!("plugins/{name}.lua"), source.source.as_bytes()).map_err(plain)?;
        let (info, reason): (mlua::Value, Option<String>) =
            call(&vm, "moongate.plugins", "inspect", (chunk, name)).map_err(|e| e.to_string())?;
        match info {
            mlua::Value::Table(t) => json_of(&vm, t).map(PluginInfo::from_json).map_err(|e| e.to_string()),
            _ => Err(reason.unwrap_or_default()),
        }
    }

    /// Runs a mock request through a plugin, beside everything that serves.
    pub fn try_plugin(
        &self,
        snapshot: Arc<Snapshot>,
        trial: PluginTrial,
    ) -> impl Future<Output = Result<Value, String>> + use<> {
        trial::run(self.setup.borrow().clone(), snapshot, trial)
    }

    /// Runs a mock request through a function, in the same way.
    pub fn try_function(
        &self,
        snapshot: Arc<Snapshot>,
        trial: Trial,
    ) -> impl Future<Output = Result<Tried, String>> + use<> {
        function_trial::run(self.setup.borrow().clone(), snapshot, trial)
    }

    /// Why registries below `discovery` in config.yaml cannot serve: the key of each, and what to do.
    pub fn registry_mistakes(&self) -> Result<Vec<String>> {
        match self.loaded().filter(|l| l.vm.config.config.get("discovery").is_some_and(Value::is_object)) {
            Some(Loaded { vm, .. }) => call(&vm, "apisix.discovery.init", "mistakes", ()),
            None => Ok(Vec::new()),
        }
    }

    /// Where the checking VM has a module from: `packed`, `built in` or a file; nothing when it finds none.
    pub fn find_module(&self, module: &str) -> Option<String> {
        call(&self.loaded()?.vm, "moongate.survey", "find", module).ok()?
    }

    /// Whether a module that is the gateway's own, or the global `ngx` for `_G`, has a member (`request.header`). True where
    /// only a request could tell.
    pub fn has_member(&self, module: &str, member: &str) -> bool {
        let Some(Loaded { vm, .. }) = self.loaded() else { return true };
        call(&vm, "moongate.survey", "has", (module, member)).unwrap_or(true)
    }

    /// Whether the text of a function compiles; if not: file, line and why.
    pub fn compile_function(&self, id: &str, source: &str) -> Result<(), String> {
        let Some(Loaded { vm, .. }) = self.loaded() else { return Err("no VM".into()) };
        vm::load_chunk(&vm.lua, &format!("functions/{id}.lua"), source.as_bytes()).map(|_| ()).map_err(plain)
    }

    /// Whether Lua in a field compiles; if not, as `loadstring` says it.
    pub fn compile_chunk(&self, source: &str) -> Result<(), String> {
        let Some(Loaded { vm, .. }) = self.loaded() else { return Err("no VM".into()) };
        vm.lua.load(source).set_name(source).into_function().map(|_| ()).map_err(plain)
    }

    /// What cjson says is wrong with a text.
    pub fn explain_json(&self, text: &[u8]) -> Option<String> {
        let vm = self.loaded()?.vm;
        let text = vm.lua.create_string(text).ok()?;
        let (_, why): (mlua::Value, Option<String>) = call(&vm, "cjson.safe", "decode", text).ok()?;
        why
    }
}

/// A compile error without mlua's prefix.
fn plain(e: mlua::Error) -> String {
    match e {
        mlua::Error::SyntaxError { message, .. } => message,
        e => e.to_string(),
    }
}

impl PluginChecker for Checker {
    fn check(&self, plugin: &str, conf: &str, schema: PluginSchema) -> Result<(), Refusal> {
        // An object without it would be open. As it stands it is served, and answers that it cannot be.
        if self.loaded().is_some_and(|l| l.broken.why(plugin).is_some()) {
            return Ok(());
        }
        let conf = serde_json::from_str(conf).map_err(|e| Refusal::Invalid(e.to_string()))?;
        self.run_check(plugin, &conf, schema, true)
    }

    fn inspect(&self, name: &str, source: &PluginSource) -> Result<(), String> {
        self.inspect_plugin(name, source).map(drop)
    }

    fn reload(&self, snapshot: &Snapshot) -> Result<()> {
        self.load(snapshot)
    }
}

impl PluginChecker for Rc<Checker> {
    fn check(&self, plugin: &str, conf: &str, schema: PluginSchema) -> Result<(), Refusal> {
        Checker::check(self, plugin, conf, schema)
    }

    fn inspect(&self, name: &str, source: &PluginSource) -> Result<(), String> {
        PluginChecker::inspect(&**self, name, source)
    }

    fn reload(&self, snapshot: &Snapshot) -> Result<()> {
        PluginChecker::reload(&**self, snapshot)
    }
}
