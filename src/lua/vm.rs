//! One VM: made, filled with the API, booted.

use std::{path::PathBuf, rc::Rc, sync::Arc};

use mlua::ffi;

use super::{
    REGISTRARS,
    api::{Api, Entry, script},
    convert,
};
use crate::error::{Error, Result};

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
    /// Runs uploaded functions: no files, processes, FFI or debug library for them.
    Functions,
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
}

/// A live VM. Its state is closed when the last handle goes.
pub struct Vm {
    pub lua: mlua::Lua,
    main: *mut ffi::lua_State,
    pub config: VmConfig,
    entries: Vec<Entry>,
}

impl Vm {
    /// Makes a VM and runs `moongate.boot` in it.
    pub fn new(config: VmConfig) -> Result<Rc<Vm>> {
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
        for register in REGISTRARS {
            register(&mut table)?;
        }
        let (native, entries) = table.finish()?;
        boot(&lua, &native, &config)?;
        Ok(Rc::new(Vm { lua, main, config, entries }))
    }

    /// The table of what this VM offers to scripts.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The main state: for pushing on it between calls, never while a coroutine runs.
    pub fn main(&self) -> *mut ffi::lua_State {
        self.main
    }

    /// Runs a chunk to its end; for set-up, not for requests.
    pub fn run(&self, file: &str, source: &str) -> Result<mlua::MultiValue> {
        load(&self.lua, file, source.as_bytes())?.call(()).map_err(script)
    }
}

fn options() -> mlua::LuaOptions {
    mlua::LuaOptions::new().catch_rust_panics(false)
}

fn boot(lua: &mlua::Lua, native: &mlua::Table, config: &VmConfig) -> Result<()> {
    let set = |key: &str, value: &str| native.raw_set(key, value).map_err(script);
    set("lua_path", &config.lua_path)?;
    set("lua_cpath", &config.lua_cpath)?;
    set("prefix", &config.prefix.to_string_lossy())?;
    native.raw_set("purpose", format!("{:?}", config.purpose).to_lowercase()).map_err(script)?;
    let array_mt: mlua::Table =
        lua.named_registry_value(convert::ARRAY_MT.to_str().unwrap_or_default()).map_err(script)?;
    native.raw_set("array_mt", array_mt).map_err(script)?;
    native.raw_set("packed", lua.create_function(packed_loader).map_err(script)?).map_err(script)?;
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
}
