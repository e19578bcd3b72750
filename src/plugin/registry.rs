//! The plugins that are loaded: which names, from where, what each says of itself; and asking them about confs.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, HashMap, HashSet},
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
    conf::{Config, locations::Locations, outgoing::Charset},
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

/// Plugins that do not load. Few, and most often none.
#[derive(Clone, Debug, Default)]
pub struct Broken {
    /// Those that are there, and why they do not.
    there: Vec<(Box<str>, String)>,
    /// Those that are listed and have no module.
    missing: Vec<Box<str>>,
}

impl Broken {
    /// Why the plugin of that name does not load.
    pub fn why(&self, name: &str) -> Option<&str> {
        self.there.iter().find(|(own, _)| **own == *name).map(|(_, why)| why.as_str())
    }

    /// Whether all that are there load.
    pub fn is_empty(&self) -> bool {
        self.there.is_empty()
    }

    /// An error where one of them was loaded `before`: what it did for its routes, nothing would do any more.
    pub fn refuse_loss(&self, before: &Plugins) -> Result<()> {
        let lost = self.there.iter().filter(|(name, _)| before.contains_key(name));
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
    config: Arc<ArcSwap<Configured>>,
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

/// What the configuration says.
#[derive(Clone, Debug, Default)]
pub struct Configured {
    /// config.yaml with its defaults.
    json: Arc<Value>,
    /// Somebody has written `plugins`: it is not the default one.
    lists_plugins: bool,
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
    /// `json`: config.yaml with its defaults, of which `plugins` is one.
    pub fn new(prefix: PathBuf, json: Arc<Value>, locations: Arc<Locations>) -> Setup {
        let config = Arc::new(ArcSwap::from_pointee(Configured { json, lists_plugins: false }));
        Setup { prefix, config, locations, watching: Arc::default(), inits: Arc::default() }
    }

    /// As the configuration says.
    pub fn of(config: &Config) -> Setup {
        let setup = Setup::new(config.prefix.clone(), config.json.clone(), config.locations.clone());
        setup.reread(config);
        setup
    }

    /// The same, with another prefix.
    pub fn under(self, prefix: PathBuf) -> Setup {
        Setup { prefix, ..self }
    }

    /// The same, with who is watched.
    pub fn watched(self, watching: Arc<Watching>) -> Setup {
        Setup { watching, ..self }
    }

    /// Takes over which plugins there are and what they are told (`plugins`, `plugin_attr`) from a newer configuration. Gives
    /// what it was before, for `put_back`.
    pub fn reread(&self, config: &Config) -> Arc<Configured> {
        let mut json = Value::clone(&self.config.load().json);
        for key in REREAD {
            json[key] = config.json.get(key).cloned().unwrap_or_default();
        }
        let lists_plugins = !config.plugins_are_default;
        self.config.swap(Arc::new(Configured { json: json.into(), lists_plugins }))
    }

    pub fn put_back(&self, before: Arc<Configured>) {
        self.config.store(before);
    }

    /// `nginx_config.http.charset`
    pub fn charset(&self) -> Option<Charset> {
        Charset::of_routes(&self.config.load().json)
    }

    pub fn trusts_functions(&self) -> bool {
        trusts_functions(&self.config.load().json)
    }

    /// Whether somebody has written `plugins` into the configuration.
    pub fn lists_plugins(&self) -> bool {
        self.config.load().lists_plugins
    }

    /// `apisix.extra_lua_path`, `extra_lua_cpath`.
    fn lua_path(&self, key: &str) -> String {
        let config = self.config.load();
        let path = config.json.pointer("/apisix").and_then(|a| a.get(key)).and_then(Value::as_str).unwrap_or_default();
        below_prefix(path, &self.prefix)
    }

    /// How a VM for `purpose` is made under this configuration.
    pub fn vm_config(&self, purpose: Purpose, worker: usize, snapshot: &Snapshot) -> VmConfig {
        let sources = snapshot.plugin_sources.values().flat_map(|o| o.value.chunks(&o.id));
        VmConfig {
            purpose,
            prefix: self.prefix.clone(),
            lua_path: self.lua_path("extra_lua_path"),
            lua_cpath: self.lua_path("extra_lua_cpath"),
            config: self.config.load().json.clone(),
            worker,
            plugin_sources: sources.collect(),
            package_path: self.locations.package_path.clone(),
            package_cpath: self.locations.package_cpath.clone(),
            groups: Rc::default(),
        }
    }

    /// The names to load: those that are listed, uploaded sources, and files in `<prefix>/plugins`.
    pub fn names(&self, snapshot: &Snapshot) -> Vec<Box<str>> {
        let mut names = self.listed(snapshot);
        names.extend(snapshot.plugin_sources.keys().map(|id| Box::from(&**id)));
        plugin_files(&self.prefix.join("plugins"), &mut names);
        let mut seen = HashSet::new();
        names.retain(|n| seen.insert(n.clone()));
        names
    }

    /// The store's list where it is followed, or else config.yaml's. Where nobody has written one the user's files are on it, too: one
    /// that a list leaves out is switched off, as under APISIX.
    fn listed(&self, snapshot: &Snapshot) -> Vec<Box<str>> {
        if let Some(listed) = &snapshot.plugin_names {
            return listed.to_vec();
        }
        let config = self.config.load();
        let mut names: Vec<Box<str>> = match config.json.get("plugins").and_then(Value::as_array) {
            Some(listed) => listed.iter().filter_map(Value::as_str).map(Box::from).collect(),
            None => packed_plugins().map(Box::from).collect(),
        };
        if !config.lists_plugins {
            names.append(&mut self.files_of_lua_path());
        }
        names
    }

    /// Names of the plugin files in the directories of `apisix.extra_lua_path`.
    pub fn files_of_lua_path(&self) -> Vec<Box<str>> {
        let mut names = Vec::new();
        for dir in self.lua_path("extra_lua_path").split(';').filter_map(|pattern| pattern.strip_suffix("/?.lua")) {
            plugin_files(&Path::new(dir).join("apisix/plugins"), &mut names);
        }
        names
    }
}

/// A Lua path with `$prefix` and `${prefix}` replaced, as in nginx's `lua_package_path`.
pub fn below_prefix(path: &str, prefix: &Path) -> String {
    let prefix = prefix.to_string_lossy();
    path.replace("${prefix}", &prefix).replace("$prefix", &prefix)
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

/// Loads the plugins. What does not load is logged and left out; the second result says what that is, an uploaded source that was
/// refused included.
pub fn load(vm: &Rc<Vm>, setup: &Setup, snapshot: &Snapshot) -> (Plugins, Broken) {
    run_user_hook(vm);
    let (mut plugins, mut failed) = (Plugins::new(), Broken::default());
    for name in &setup.names(snapshot) {
        match load_one(vm, name) {
            Ok(info) => {
                plugins.insert(name.clone(), Arc::new(info));
            }
            // The default list names plugins of APISIX that this build does not have: who cares asks for them.
            Err(Refused::Missing) => failed.missing.push(name.clone()),
            Err(Refused::Broken(text)) => {
                tracing::error!(target: "lua", "failed to load plugin [{name}] err: {text}");
                failed.there.push((name.clone(), text));
            }
        }
    }
    for error in snapshot.errors.values() {
        if let Some(name) = error.key.strip_prefix("/plugin_sources/")
            && !plugins.contains_key(name)
            && failed.why(name).is_none()
        {
            failed.there.push((name.into(), error.message.clone()));
        }
    }
    (plugins, failed)
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
    /// The list that they were loaded by, and whether it is one that other nodes share.
    listed: Rc<Vec<Box<str>>>,
    follows: bool,
}

impl Loaded {
    /// Plugins that ran by the list before this one and are off now.
    fn switched_off<'a>(&self, before: &'a Loaded) -> Vec<&'a str> {
        let ran = before.listed.iter().filter(|name| before.plugins.contains_key(*name));
        let mut off: Vec<&str> = ran.filter(|name| !self.plugins.contains_key(*name)).map(|name| &**name).collect();
        off.retain(|name| self.broken.why(name).is_none());
        off
    }
}

impl Checker {
    pub fn new(setup: Setup, snapshot: &Snapshot) -> Result<Checker> {
        let checker = Checker { setup: RefCell::new(setup), state: RefCell::default(), generation: Cell::new(0) };
        checker.load(snapshot)?;
        Ok(checker)
    }

    fn load(&self, snapshot: &Snapshot) -> Result<()> {
        let now = self.attempt(snapshot)?;
        if let Some(before) = self.loaded().filter(|before| before.follows || now.follows) {
            tell_switched_off(&now.switched_off(&before));
        }
        *self.state.borrow_mut() = Some(now);
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
        let (listed, follows) = (Rc::new(setup.listed(snapshot)), snapshot.plugin_names.is_some());
        Ok(Loaded { vm, plugins: Rc::new(plugins), broken: Rc::new(broken), listed, follows })
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
        self.loaded().map(|l| l.broken.there.iter().map(shown).collect()).unwrap_or_default()
    }

    /// The plugins that are listed and have no module.
    pub fn missing(&self) -> Vec<Box<str>> {
        self.loaded().map(|l| l.broken.missing.clone()).unwrap_or_default()
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

/// A shared list may have come from anybody who writes to the store, and a route whose authentication is off serves everyone.
fn tell_switched_off(names: &[&str]) {
    if !names.is_empty() {
        tracing::warn!(
            "the list of plugins that the nodes share has switched off what ran here before: {}",
            names.join(", ")
        );
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
