//! One VM: made, filled with the API, booted.

use std::{
    any::Any,
    cell::{Cell, OnceCell, RefCell},
    ffi::c_int,
    path::PathBuf,
    ptr,
    rc::Rc,
    sync::Arc,
};

use hashbrown::HashMap;
use mlua::ffi;

use super::{
    REGISTRARS,
    api::{Api, Entry, Stack, script},
    convert, host,
    limits::{self, Limits},
    ngx,
    sched::Coroutine,
    timers::Timers,
};
use crate::{
    balancer::group::Groups,
    conf::locations::{Script, Source},
    error::{Error, Result},
    store::Snapshot,
    tcp,
};

/// Idle coroutines kept: as many as requests are usually inside Lua at once on one worker.
const IDLE_COROUTINES: usize = 256;

/// A call on a coroutine starts with this much stack, so that arguments need no check.
const START_STACK: i32 = 32;

/// Modules that are part of the binary: `(module name, file name, source)`, sorted by module name.
pub static PACKED: &[(&str, &str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/packed.rs"));

/// What a VM is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Purpose {
    /// Runs plugins on a worker.
    #[default]
    Plugins,
    /// Checks plugins and configurations on the control thread: no timers, no `init`.
    Check,
    /// Runs one function after another for `ngx.run_worker_thread`: no requests, timers and waits.
    Thread,
    /// Runs uploaded functions: no files, processes, FFI or debug library for them.
    Functions,
    /// Runs uploaded functions that an administrator trusts as plugins are trusted.
    Trusted,
}

/// How to make a VM.
#[derive(Clone, Debug, Default)]
pub struct VmConfig {
    pub purpose: Purpose,
    /// `ngx.config.prefix()`; also where `plugins/` and `lua/` of the user's own lie.
    pub prefix: PathBuf,
    /// `apisix.extra_lua_path`, `apisix.extra_lua_cpath`: before everything else.
    pub lua_path: String,
    pub lua_cpath: String,
    /// The effective configuration: `core.config.local_conf()`.
    pub config: Arc<serde_json::Value>,
    /// `ngx.worker.id()`
    pub worker: usize,
    /// Uploaded plugins: name and source. They win over files.
    pub plugin_sources: Vec<(Arc<str>, Arc<str>)>,
    /// `lua_package_path`, `lua_package_cpath`: in place of the default path, which `;;` in them stands for.
    pub package_path: String,
    pub package_cpath: String,
    /// The upstreams of the worker's locations: `ngx.upstream`.
    pub groups: Rc<Groups>,
}

/// A live VM. Its state is closed when the last handle goes.
pub struct Vm {
    pub lua: mlua::Lua,
    main: *mut ffi::lua_State,
    pub config: VmConfig,
    /// What `require("moongate.native")` gives.
    native: mlua::Table,
    entries: Vec<Entry>,
    limits: Limits,
    pace: limits::Pace,
    /// Registry reference of `moongate.ctx`'s `clear`.
    clear: Cell<i32>,
    /// Of `moongate.request`'s `adopt`.
    adopt: Cell<i32>,
    /// Of its `inherit` and `left`.
    inherit: Cell<i32>,
    left: Cell<i32>,
    idle: RefCell<Vec<Coroutine>>,
    /// Coroutines made and not released: the idle ones and those in use.
    coroutines: Cell<usize>,
    slots: RefCell<Slots>,
    pub(super) timers: Timers,
    /// `ngx.socket`: whose sockets are open, and which are idle.
    pub(super) sockets: ngx::socket::Sockets,
    /// Names of headers as strings.
    pub(super) header_names: ngx::header_names::Names,
    /// Light threads: whether they have ended and nobody has waited for them yet.
    pub(super) light: RefCell<HashMap<usize, bool>>,
    /// Consumers that scripts attach by number.
    pub(super) consumers: host::apisix::KeptConsumers,
    /// What VMs of `ngx.run_worker_thread` are made of for this one.
    pub(super) sources: OnceCell<Arc<ngx::worker_thread::Sources>>,
    /// What timers and calls outside of requests see as the configuration.
    snapshot: RefCell<Arc<Snapshot>>,
    itself: std::rc::Weak<Vm>,
}

/// Numbers of the `ctx` tables in use; 0 is never one.
#[derive(Default)]
struct Slots {
    free: Vec<u32>,
    last: u32,
}

thread_local! {
    static CURRENT: Cell<*const Vm> = const { Cell::new(ptr::null()) };
}

/// What the scripts of a handshake have left in `ngx.ctx`.
struct LeftCtx {
    table: ngx::location::Kept,
    /// The same without functions and what else belongs to the VM, which may be replaced while the connection lives.
    plain: serde_json::Value,
}

/// The fields of the table at `i` that are plain values, or tables of such.
fn plain_of(s: &Stack, i: c_int) -> serde_json::Value {
    let mut plain = serde_json::Map::new();
    let _: std::result::Result<(), ()> = s.pairs(i, |s| {
        if s.kind(-2) == ffi::LUA_TSTRING
            && let Some(name) = s.bytes(-2)
            && let Ok(value) = convert::to_json(s, s.top())
        {
            plain.insert(String::from_utf8_lossy(name).into_owned(), value);
        }
        Ok(())
    });
    plain.into()
}

/// The VM that runs on this thread now.
pub fn current() -> Option<Rc<Vm>> {
    // SAFETY: `entered` sets the cell from a borrow of a live VM and restores it before the borrow ends.
    unsafe { CURRENT.get().as_ref() }.and_then(|vm| vm.itself.upgrade())
}

/// As `current`, for as long as `run` takes.
pub fn with_current<R>(run: impl FnOnce(&Vm) -> R) -> Option<R> {
    // SAFETY: as in `current`; the borrow ends before this returns.
    unsafe { CURRENT.get().as_ref() }.map(run)
}

impl Vm {
    /// Makes a VM and runs `moongate.boot` in it.
    pub fn new(config: VmConfig) -> Result<Rc<Vm>> {
        Self::with(config, &[])
    }

    /// As `new`; `more` adds what the layers above offer to scripts.
    pub fn with(config: VmConfig, more: &[fn(&mut Api) -> Result<()>]) -> Result<Rc<Vm>> {
        // SAFETY: scripts of the operator may use FFI and C modules, as on OpenResty; uploaded functions get an
        // environment without them (boot.lua).
        let lua = unsafe { mlua::Lua::unsafe_new_with(mlua::StdLib::ALL, options()) };
        let mut main = std::ptr::null_mut();
        // SAFETY: only reads the state and stores the array metatable in the registry.
        unsafe {
            lua.exec_raw::<()>((), |l| {
                main = l;
                ffi::lua_createtable(l, 0, 0);
                ffi::lua_setfield(l, ffi::LUA_REGISTRYINDEX, convert::ARRAY_MT.as_ptr());
            })
            .map_err(script)?;
        }
        let mut table = Api::new(&lua)?;
        for register in REGISTRARS.iter().chain(more) {
            register(&mut table)?;
        }
        let (native, entries) = table.finish()?;
        let limits = Limits::from_config(&config.config);
        let timers = Timers::from_config(&config.config);
        host::regex::limit_matches(host::regex::match_limit(&config.config));
        let vm = Rc::new_cyclic(|itself| Vm {
            lua,
            main,
            config,
            native: native.clone(),
            entries,
            limits,
            pace: limits::Pace::new(limits),
            clear: Cell::new(ffi::LUA_NOREF),
            adopt: Cell::new(ffi::LUA_NOREF),
            inherit: Cell::new(ffi::LUA_NOREF),
            left: Cell::new(ffi::LUA_NOREF),
            idle: RefCell::default(),
            coroutines: Cell::new(0),
            slots: RefCell::default(),
            timers,
            sockets: Default::default(),
            header_names: Default::default(),
            light: Default::default(),
            consumers: Default::default(),
            sources: OnceCell::new(),
            snapshot: RefCell::default(),
            itself: itself.clone(),
        });
        vm.entered(|| boot(&vm.lua, &native, &vm.config))?;
        vm.clear.set(vm.function("moongate.ctx", "clear")?);
        vm.adopt.set(vm.function("moongate.request", "adopt")?);
        vm.inherit.set(vm.function("moongate.request", "inherit")?);
        vm.left.set(vm.function("moongate.request", "left")?);
        Ok(vm)
    }

    pub fn limits(&self) -> Limits {
        self.limits
    }

    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.borrow().clone()
    }

    /// The configuration for what runs outside of requests from now on.
    pub fn set_snapshot(&self, snapshot: &Arc<Snapshot>) {
        *self.snapshot.borrow_mut() = snapshot.clone();
    }

    /// Makes this the VM that host functions find while `run` runs. A script may take long: what other requests have made goes
    /// out before it.
    #[inline]
    pub fn entered<R>(&self, run: impl FnOnce() -> R) -> R {
        struct Restore(*const Vm);
        impl Drop for Restore {
            fn drop(&mut self) {
                CURRENT.set(self.0);
            }
        }
        tcp::flush();
        let _restore = Restore(CURRENT.replace(self));
        let result = run();
        self.pace.keep(self);
        result
    }

    /// A registry reference of a module's function: for calls by `sched::call`.
    pub fn function(&self, module: &str, name: &str) -> Result<i32> {
        let require: mlua::Function = self.lua.globals().get("require").map_err(script)?;
        let module: mlua::Table = require.call(module).map_err(script)?;
        let function: mlua::Function = module.get(name).map_err(script)?;
        self.keep(function)
    }

    /// Keeps a value in the registry.
    pub fn keep(&self, value: impl mlua::IntoLua) -> Result<i32> {
        let mut anchor = ffi::LUA_NOREF;
        // SAFETY: one value is on the stack; luaL_ref pops it.
        unsafe {
            self.lua
                .exec_raw::<()>(value.into_lua(&self.lua).map_err(script)?, |l| {
                    anchor = ffi::luaL_ref(l, ffi::LUA_REGISTRYINDEX)
                })
                .map_err(script)?;
        }
        Ok(anchor)
    }

    /// Keeps the value on top of the main stack in the registry; pops it.
    pub fn anchor(&self) -> i32 {
        // SAFETY: callers have pushed a value on the main state.
        unsafe { ffi::luaL_ref(self.main, ffi::LUA_REGISTRYINDEX) }
    }

    pub fn release(&self, anchor: i32) {
        // SAFETY: `anchor` came from luaL_ref; LUA_NOREF is allowed.
        unsafe { ffi::luaL_unref(self.main, ffi::LUA_REGISTRYINDEX, anchor) }
    }

    #[inline]
    pub(super) fn take_coroutine(&self) -> Result<Coroutine> {
        if let Some(co) = self.idle.borrow_mut().pop() {
            return Ok(co);
        }
        // SAFETY: the main state is idle or below the running coroutine; one slot each is free by checkstack.
        unsafe {
            if ffi::lua_checkstack(self.main, 4) == 0 {
                return Err(Error::script("no room on the Lua stack"));
            }
            let l = ffi::lua_newthread(self.main);
            ffi::lua_checkstack(l, START_STACK);
            self.coroutines.set(self.coroutines.get() + 1);
            Ok(Coroutine { l, anchor: self.anchor() })
        }
    }

    /// A coroutine whose function has returned: it can run another.
    #[inline]
    pub(super) fn give_back(&self, co: Coroutine) {
        // SAFETY: the coroutine is idle.
        unsafe { ffi::lua_settop(co.l, 0) };
        let mut idle = self.idle.borrow_mut();
        if idle.len() < IDLE_COROUTINES {
            idle.push(co);
        } else {
            drop(idle);
            self.forget(co);
        }
    }

    /// A coroutine that cannot run again (dead, or parked for good): the collector takes it.
    pub(super) fn forget(&self, co: Coroutine) {
        self.coroutines.set(self.coroutines.get() - 1);
        self.release(co.anchor);
    }

    /// Coroutines that wait for a call.
    pub fn idle_coroutines(&self) -> usize {
        self.idle.borrow().len()
    }

    /// Those and the ones that are in a call.
    pub(super) fn coroutines(&self) -> usize {
        self.coroutines.get()
    }

    /// A number for a request's tables.
    pub fn take_slot(&self) -> u32 {
        let mut slots = self.slots.borrow_mut();
        slots.free.pop().unwrap_or_else(|| {
            slots.last += 1;
            slots.last
        })
    }

    /// Numbers that were taken and not cleared.
    pub(super) fn slots_in_use(&self) -> usize {
        let slots = self.slots.borrow();
        slots.last as usize - slots.free.len()
    }

    /// Empties a request's tables, closes its sockets and frees its number.
    pub fn clear_slot(&self, slot: u32) {
        self.sockets.end(slot);
        // SAFETY: the main state is idle; `clear` neither waits nor raises (it clears two tables).
        unsafe {
            ffi::lua_rawgeti_(self.main, ffi::LUA_REGISTRYINDEX, self.clear.get());
            ffi::lua_pushnumber(self.main, slot as f64);
            if ffi::lua_pcall(self.main, 1, 0, 0) != 0 {
                ffi::lua_pop(self.main, 1);
            }
        }
        self.slots.borrow_mut().free.push(slot);
    }

    /// Makes a table that a script gave along `ngx.ctx` of the request with these tables.
    pub fn adopt_ctx(&self, slot: u32, ctx: &dyn Any) {
        if let Some(kept) = ctx.downcast_ref::<ngx::location::Kept>().filter(|kept| kept.is_of(self)) {
            self.hand_ctx(self.adopt.get(), slot, |s| kept.push(s));
        }
    }

    /// Has `ngx.ctx` of the request with these tables begin with what its connection's handshake has left.
    pub fn inherit_ctx(&self, slot: u32, ctx: &dyn Any) {
        let Some(left) = ctx.downcast_ref::<LeftCtx>() else { return };
        match left.table.is_of(self) {
            true => self.hand_ctx(self.inherit.get(), slot, |s| left.table.push(s)),
            // The VM was replaced since: what is plain is handed over.
            false => self.hand_ctx(self.inherit.get(), slot, |s| {
                let top = s.top();
                if convert::push_json(s, &left.plain).is_err() {
                    s.set_top(top);
                    s.push_table(0, 0);
                }
            }),
        }
    }

    fn hand_ctx(&self, to: c_int, slot: u32, push: impl FnOnce(&Stack)) {
        // SAFETY: the main state is idle; the function sets a field of a plain table.
        unsafe {
            let s = Stack::new(self.main);
            s.get_index(ffi::LUA_REGISTRYINDEX, to as usize);
            s.push_number(f64::from(slot));
            push(&s);
            if ffi::lua_pcall(self.main, 2, 0, 0) != 0 {
                ffi::lua_pop(self.main, 1);
            }
        }
    }

    /// What `ngx.ctx` of these tables is, when a script has asked for it.
    pub fn kept_ctx(self: &Rc<Self>, slot: u32) -> Option<Rc<dyn Any>> {
        // SAFETY: the main state is idle; the function reads a field of a plain table, and what it returns is kept or popped.
        unsafe {
            let s = Stack::new(self.main);
            s.get_index(ffi::LUA_REGISTRYINDEX, self.left.get() as usize);
            s.push_number(f64::from(slot));
            let failed = ffi::lua_pcall(self.main, 1, 1, 0) != 0;
            if failed || !s.is_table(-1) {
                ffi::lua_pop(self.main, 1);
                return None;
            }
            let plain = plain_of(&s, s.top());
            let anchor = ffi::luaL_ref(self.main, ffi::LUA_REGISTRYINDEX);
            Some(Rc::new(LeftCtx { table: ngx::location::Kept::new(self, anchor), plain }))
        }
    }

    /// Ends timers early, as at the end of a worker: each runs once more with `premature`.
    pub fn close(&self) {
        self.timers.close();
    }

    /// Collects all garbage now.
    pub fn collect(&self) {
        if let Err(e) = self.lua.gc_collect() {
            tracing::error!(target: "lua", "failed to collect garbage: {e}");
        }
    }

    /// Timers that run or wait for their time.
    pub fn open_timers(&self) -> usize {
        let (running, pending) = self.timers.counts();
        running + pending
    }

    /// The table of what this VM offers to scripts.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The main state: for pushing on it between calls, never while a coroutine runs.
    pub fn main(&self) -> *mut ffi::lua_State {
        self.main
    }

    /// Runs `init_by_lua` to its end outside of requests; it cannot wait.
    pub fn run_init(&self, which: &Script) -> Result<()> {
        let chunk = load_script(&self.lua, which).map_err(Error::script)?;
        self.native.raw_set("stage", "init").map_err(script)?;
        let ran = self.entered(|| limits::bounded(self.main, self.limits, || chunk.call::<()>(())));
        self.native.raw_set("stage", mlua::Value::Nil).map_err(script)?;
        ran.map_err(script)
    }

    /// Runs a chunk to its end; for set-up, not for requests.
    pub fn run(&self, file: &str, source: &str) -> Result<mlua::MultiValue> {
        load(&self.lua, file, source.as_bytes())?.call(()).map_err(script)
    }
}

/// Compiles a script of config.yaml; the error names the file or the directive, and the line.
///
/// The script becomes the body of a function, as lua-nginx-module makes it: the JIT begins no trace at a chunk, whose arguments
/// vary. One that reads its arguments stays a chunk.
pub fn load_script(lua: &mlua::Lua, script: &Script) -> std::result::Result<mlua::Function, String> {
    let (text, what) = match &script.source {
        Source::Inline(text) => (text.as_bytes().to_vec(), "inlined Lua code".to_owned()),
        Source::File(path) => {
            let what = format!("external Lua file \"{}\"", path.display());
            let text = std::fs::read(path)
                .map_err(|e| format!("failed to load {what}: cannot open {}: {e}", path.display()))?;
            (text, what)
        }
        Source::Varying(_) => return Err("a file whose name holds variables has no meaning here".into()),
    };
    let load =
        |text: &[u8]| lua.load(text).set_name(&*script.name).set_mode(mlua::chunk::ChunkMode::Text).into_function();
    // By itself first: what is no chunk must not become one by what is put around it.
    let chunk = load(&text).map_err(|e| match e {
        mlua::Error::SyntaxError { message, .. } => format!("failed to load {what}: {message}"),
        e => format!("failed to load {what}: {e}"),
    })?;
    let body = [b"return function() ", &text[..], b"\nend"].concat();
    Ok(load(&body).and_then(|made| made.call(())).unwrap_or(chunk))
}

fn options() -> mlua::LuaOptions {
    // `true` leaves LuaJIT's own pcall in place, which yields pass; panics are caught in the host functions.
    mlua::LuaOptions::new().catch_rust_panics(true)
}

/// Keys below `apisix` that uploaded functions see.
const OPEN_TO_FUNCTIONS: &[&str] = &[
    "dns_resolver",
    "dns_resolver_valid",
    "enable_ipv6",
    "enable_resolv_search_opt",
    "id",
    "max_post_args_readable_size",
    "resolver_timeout",
];

/// config.yaml as functions see it: keys of the Admin API, of encrypted fields and of stores are not theirs to read.
fn open_config(config: &serde_json::Value) -> serde_json::Value {
    let open = |key: &&str| Some(((*key).to_owned(), config.get("apisix")?.get(*key)?.clone()));
    let apisix: serde_json::Map<_, _> = OPEN_TO_FUNCTIONS.iter().filter_map(open).collect();
    serde_json::json!({ "apisix": apisix, "graphql": config.get("graphql") })
}

fn boot(lua: &mlua::Lua, native: &mlua::Table, config: &VmConfig) -> Result<()> {
    let set = |key: &str, value: &str| native.raw_set(key, value).map_err(script);
    set("lua_path", &config.lua_path)?;
    set("lua_cpath", &config.lua_cpath)?;
    set("package_path", &config.package_path)?;
    set("package_cpath", &config.package_cpath)?;
    set("prefix", &config.prefix.to_string_lossy())?;
    native.raw_set("worker", config.worker).map_err(script)?;
    let seen = match config.purpose {
        Purpose::Functions => open_config(&config.config).to_string(),
        _ => config.config.to_string(),
    };
    set("config_json", &seen)?;
    native.raw_set("purpose", format!("{:?}", config.purpose).to_lowercase()).map_err(script)?;
    let array_mt: mlua::Table =
        lua.named_registry_value(convert::ARRAY_MT.to_str().unwrap_or_default()).map_err(script)?;
    native.raw_set("array_mt", array_mt).map_err(script)?;
    native.raw_set("packed", lua.create_function(packed_loader).map_err(script)?).map_err(script)?;
    let sources = lua.create_table().map_err(script)?;
    for (name, source) in &config.plugin_sources {
        let chunk = load_chunk(lua, &format!("plugins/{name}.lua"), source.as_bytes());
        // One that does not compile is reported when the plugin is loaded.
        match chunk {
            Ok(f) => sources.raw_set(&**name, f),
            Err(e) => sources.raw_set(&**name, e.to_string()),
        }
        .map_err(script)?;
    }
    native.raw_set("plugin_sources", sources).map_err(script)?;
    native.raw_set("marker", mlua::LightUserData(super::sched::marker())).map_err(script)?;
    let (file, source) = packed("moongate.boot")
        .ok_or_else(|| Error::internal(crate::error::Kind::NotFound).context("moongate.boot is not packed"))?;
    load(lua, file, source)?.call::<()>(native).map_err(script)
}

/// `native.packed(module)`: the loaded chunk of a packed module and its file name, or nil.
fn packed_loader(lua: &mlua::Lua, module: mlua::LuaString) -> mlua::Result<(Option<mlua::Function>, Option<String>)> {
    let Some((file, source)) = packed(&module.to_str()?) else { return Ok((None, None)) };
    Ok((Some(load_chunk(lua, file, source)?), Some(file.to_owned())))
}

/// File name and source of a packed module.
pub fn packed(module: &str) -> Option<(&'static str, &'static [u8])> {
    let at = PACKED.binary_search_by(|(name, ..)| (*name).cmp(module)).ok()?;
    Some((PACKED[at].1, PACKED[at].2))
}

fn load(lua: &mlua::Lua, file: &str, source: &[u8]) -> Result<mlua::Function> {
    load_chunk(lua, file, source).map_err(script)
}

/// Compiles text under a file's name, so that messages say `plugins/x.lua:12:`. Bytecode is refused.
pub fn load_chunk(lua: &mlua::Lua, file: &str, source: &[u8]) -> mlua::Result<mlua::Function> {
    lua.load(source).set_name(format!("@{file}")).set_mode(mlua::chunk::ChunkMode::Text).into_function()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boots_and_runs_text() {
        let vm = Vm::new(VmConfig::default()).expect("a VM");
        let out = vm.run("x.lua", "return jit.status(), require('table.nkeys')({1, a = 2})").expect("runs");
        assert_eq!(out[0], mlua::Value::Boolean(true));
        assert_eq!(out[1].to_string().ok().as_deref(), Some("2"));
    }

    #[test]
    fn an_error_names_file_and_line() {
        let vm = Vm::new(VmConfig::default()).expect("a VM");
        let e = vm.run("plugins/x.lua", "\nlocal a = nil + 1").unwrap_err().to_string();
        assert!(e.contains("plugins/x.lua:2:"), "{e}");
    }

    #[test]
    fn coroutines_are_kept_up_to_a_number() {
        let vm = Vm::new(VmConfig::default()).expect("a VM");
        let taken: Vec<_> = (0..=IDLE_COROUTINES).map(|_| vm.take_coroutine().expect("a coroutine")).collect();
        taken.into_iter().for_each(|co| vm.give_back(co));
        assert_eq!(vm.idle_coroutines(), IDLE_COROUTINES);
    }
}
