//! The functions that scripts may call: one table entry each, from which registration, docs/lua-api.md and the phase
//! test come.
//!
//! An entry's name says where it appears: `ngx.req.set_uri` in the global `ngx`, `native.json.decode` in
//! `require("moongate.native").json`, a `fast` one as a C function pointer in `require("moongate.native").fast`.
//!
//! A host function gets a `Stack`, whose methods never raise, and returns how many results it pushed or a `Raise`; the
//! Lua error is thrown outside of all Rust frames, and a panic becomes a Lua error too.

use std::{
    borrow::Cow,
    ffi::{CString, c_int, c_void},
    panic::{AssertUnwindSafe, catch_unwind},
    ptr,
};

use mlua::ffi;

use super::{fast, sched::Op};
use crate::{
    error::{Kind, Result},
    exchange::{Exchange, Phase},
};

/// Phases in which a function may be called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Phases(pub u32);

impl Phases {
    /// The start of a VM, and its end.
    pub const INIT: Phases =
        Phases(Phases::of(Phase::Init).0 | Phases::of(Phase::InitByLua).0 | Phases::of(Phase::ExitWorker).0);
    /// The four phases of a handshake.
    pub const SSL: Phases = Phases(
        Phases::of(Phase::Ssl).0
            | Phases::of(Phase::SslClientHello).0
            | Phases::of(Phase::SslSessionFetch).0
            | Phases::of(Phase::SslSessionStore).0,
    );
    /// nginx's rewrite and access are one for plugins: both of their phases run there.
    pub const REWRITE: Phases =
        Phases(Phases::of(Phase::Rewrite).0 | Phases::of(Phase::ServerRewrite).0 | Phases::of(Phase::RewriteByLua).0);
    pub const ACCESS: Phases =
        Phases(Phases::of(Phase::Access).0 | Phases::of(Phase::BeforeProxy).0 | Phases::of(Phase::Precontent).0);
    /// `set_by_lua`
    pub const SET: Phases = Phases::of(Phase::Set);
    pub const BALANCER: Phases = Phases::of(Phase::Balancer);
    pub const CONTENT: Phases = Phases::of(Phase::Content);
    pub const HEADER_FILTER: Phases = Phases::of(Phase::HeaderFilter);
    pub const BODY_FILTER: Phases = Phases(Phases::of(Phase::BodyFilter).0 | Phases::of(Phase::DelayedBodyFilter).0);
    pub const LOG: Phases = Phases::of(Phase::Log);
    pub const TIMER: Phases = Phases::of(Phase::Timer);
    pub const ANY: Phases = Phases(u32::MAX);
    /// Every phase of a request.
    pub const REQUEST: Phases = Phases(!(Self::INIT.0 | Self::TIMER.0 | Self::SSL.0));
    /// Before the response's head: where a request may still be answered.
    pub const BEFORE_HEAD: Phases = Phases(Self::REWRITE.0 | Self::ACCESS.0 | Self::CONTENT.0);

    pub const fn of(phase: Phase) -> Phases {
        Phases(1 << phase as u32)
    }

    pub const fn has(self, phase: Phase) -> bool {
        self.0 & Phases::of(phase).0 != 0
    }
}

impl std::ops::BitOr for Phases {
    type Output = Phases;

    fn bitor(self, other: Phases) -> Phases {
        Phases(self.0 | other.0)
    }
}

/// A phase in OpenResty's words, as its error texts use them.
pub fn context_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Init => "init_worker_by_lua*",
        Phase::InitByLua => "init_by_lua*",
        Phase::ExitWorker => "exit_worker_by_lua*",
        Phase::Ssl => "ssl_certificate_by_lua*",
        Phase::Rewrite | Phase::Access | Phase::BeforeProxy => "access_by_lua*",
        Phase::Balancer => "balancer_by_lua*",
        Phase::Content => "content_by_lua*",
        Phase::HeaderFilter => "header_filter_by_lua*",
        Phase::BodyFilter | Phase::DelayedBodyFilter => "body_filter_by_lua*",
        Phase::Log => "log_by_lua*",
        Phase::Timer => "ngx.timer",
        Phase::Set => "set_by_lua*",
        Phase::ServerRewrite => "server_rewrite_by_lua*",
        Phase::RewriteByLua => "rewrite_by_lua*",
        Phase::Precontent => "precontent_by_lua*",
        Phase::SslClientHello => "ssl_client_hello_by_lua*",
        Phase::SslSessionFetch => "ssl_session_fetch_by_lua*",
        Phase::SslSessionStore => "ssl_session_store_by_lua*",
    }
}

/// A Lua error that a host function raises; the position of the caller is put in front.
#[derive(Debug)]
pub struct Raise(pub Cow<'static, str>);

impl<T: Into<Cow<'static, str>>> From<T> for Raise {
    fn from(text: T) -> Self {
        Raise(text.into())
    }
}

/// What a waiting function decides.
pub enum Wait {
    /// Nothing to wait for: so many results are on the stack.
    Ready(c_int),
    /// Parks the coroutine until the operation has its results.
    Park(Op),
}

/// How a function is reached from Lua.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    Func,
    Wait,
    Fast,
    /// A value that is no function, or one made with mlua.
    Value,
}

/// One line of the table.
#[derive(Clone, Debug)]
pub struct Entry {
    pub name: Cow<'static, str>,
    pub phases: Phases,
    pub how: How,
    pub doc: &'static str,
}

/// The table while a VM is built. See the module's text.
pub struct Api<'lua> {
    lua: &'lua mlua::Lua,
    ngx: mlua::Table,
    native: mlua::Table,
    entries: Vec<Entry>,
}

/// A host function: results pushed, or an error to raise.
pub trait HostFn: Fn(&Stack) -> Result<c_int, Raise> + Copy + 'static {}
impl<F: Fn(&Stack) -> Result<c_int, Raise> + Copy + 'static> HostFn for F {}

/// A waiting host function.
pub trait HostWait: Fn(&Stack) -> Result<Wait, Raise> + Copy + 'static {}
impl<F: Fn(&Stack) -> Result<Wait, Raise> + Copy + 'static> HostWait for F {}

impl<'lua> Api<'lua> {
    pub fn new(lua: &'lua mlua::Lua) -> Result<Self> {
        let (ngx, native) = (table(lua)?, table(lua)?);
        native.raw_set("fast", table(lua)?).map_err(script)?;
        Ok(Api { lua, ngx, native, entries: Vec::new() })
    }

    /// For what mlua makes better (userdata, cold closures): see `value`.
    pub fn lua(&self) -> &'lua mlua::Lua {
        self.lua
    }

    /// A raw C function. `f` must capture nothing.
    pub fn func<F: HostFn>(&mut self, name: &'static str, phases: Phases, doc: &'static str, _f: F) -> Result<()> {
        const { assert!(size_of::<F>() == 0, "a host function captures nothing") };
        self.c_function(name, phases, How::Func, doc, as_lua(call_host::<F>))
    }

    /// A function that may park the coroutine. `f` must capture nothing.
    pub fn wait<F: HostWait>(&mut self, name: &'static str, phases: Phases, doc: &'static str, _f: F) -> Result<()> {
        const { assert!(size_of::<F>() == 0, "a host function captures nothing") };
        self.c_function(name, phases, How::Wait, doc, as_lua(wait_host::<F>))
    }

    /// An `extern "C"` function of `fast` for LuaJIT's FFI: `signature` is the C type of the function,
    /// `int (const char *, size_t)`. It must not raise, yield, re-enter the VM or panic (`fast::export!`).
    pub fn fast(
        &mut self,
        name: &'static str,
        signature: &'static str,
        phases: Phases,
        doc: &'static str,
        address: *const c_void,
    ) -> Result<()> {
        let fast: mlua::Table = self.native.raw_get("fast").map_err(script)?;
        // boot.lua casts it: an address as a number is what `ffi.cast` compiles.
        let pair = self.lua.create_sequence_from([
            mlua::Value::Number(address as usize as f64),
            mlua::Value::String(self.lua.create_string(signature).map_err(script)?),
        ]);
        fast.raw_set(name, pair.map_err(script)?).map_err(script)?;
        self.entries.push(Entry { name: Cow::Owned(format!("fast.{name}")), phases, how: How::Fast, doc });
        Ok(())
    }

    /// A constant, a table, userdata, or a function made with mlua (off the hot path only).
    pub fn value(&mut self, name: &'static str, doc: &'static str, value: impl mlua::IntoLua) -> Result<()> {
        let value = value.into_lua(self.lua).map_err(script)?;
        self.put(name, value)?;
        self.entries.push(Entry { name: name.into(), phases: Phases::ANY, how: How::Value, doc });
        Ok(())
    }

    /// What `require("moongate.native")` gives.
    pub fn native(&self) -> &mlua::Table {
        &self.native
    }

    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Sets the global `ngx` and returns the native table and the entries.
    pub(super) fn finish(self) -> Result<(mlua::Table, Vec<Entry>)> {
        self.lua.globals().raw_set("ngx", self.ngx).map_err(script)?;
        Ok((self.native, self.entries))
    }

    fn c_function(
        &mut self,
        name: &'static str,
        phases: Phases,
        how: How,
        doc: &'static str,
        f: ffi::lua_CFunction,
    ) -> Result<()> {
        let text = self.lua.create_string(name).map_err(script)?;
        // SAFETY: pushes one closure over the two arguments on the stack; exec_raw protects the call.
        let function: mlua::Function =
            unsafe { self.lua.exec_raw((phases.0, text), |l| ffi::lua_pushcclosure(l, f, 2)).map_err(script)? };
        self.put(name, mlua::Value::Function(function))?;
        self.entries.push(Entry { name: name.into(), phases, how, doc });
        Ok(())
    }

    fn put(&self, name: &str, value: mlua::Value) -> Result<()> {
        let mut parts = name.split('.').peekable();
        let mut at = match parts.next() {
            Some("ngx") => self.ngx.clone(),
            Some("native") => self.native.clone(),
            _ => return Err(crate::error::Error::internal(Kind::Other).context(format!("API name {name}"))),
        };
        while let Some(part) = parts.next() {
            if parts.peek().is_none() {
                return at.raw_set(part, value).map_err(script);
            }
            at = match at.raw_get(part).map_err(script)? {
                mlua::Value::Table(t) => t,
                _ => {
                    let t = table(self.lua)?;
                    at.raw_set(part, &t).map_err(script)?;
                    t
                }
            };
        }
        Ok(())
    }
}

fn table(lua: &mlua::Lua) -> Result<mlua::Table> {
    lua.create_table().map_err(script)
}

/// An mlua error as ours.
pub fn script(e: mlua::Error) -> crate::error::Error {
    crate::error::Error::script(e.to_string())
}

/// The stack of a running function: arguments from 1, results pushed. No method raises or calls metamethods.
pub struct Stack {
    l: *mut ffi::lua_State,
}

impl Stack {
    /// # Safety
    /// `l` must be a live state of this thread and outlive the value.
    pub unsafe fn new(l: *mut ffi::lua_State) -> Stack {
        Stack { l }
    }

    pub fn raw(&self) -> *mut ffi::lua_State {
        self.l
    }

    /// Whether the running coroutine can wait: not inside a C function that calls back.
    pub fn may_yield(&self) -> bool {
        // SAFETY: `l` is live.
        unsafe { lua_isyieldable(self.l) != 0 }
    }

    /// The number of arguments.
    pub fn top(&self) -> c_int {
        // SAFETY: `l` is live.
        unsafe { ffi::lua_gettop(self.l) }
    }

    /// `ffi::LUA_T…`
    pub fn kind(&self, i: c_int) -> c_int {
        // SAFETY: any index is valid for lua_type.
        unsafe { ffi::lua_type(self.l, i) }
    }

    pub fn kind_name(&self, i: c_int) -> &'static str {
        match self.kind(i) {
            ffi::LUA_TNONE => "no value",
            ffi::LUA_TNIL => "nil",
            ffi::LUA_TBOOLEAN => "boolean",
            ffi::LUA_TNUMBER => "number",
            ffi::LUA_TSTRING => "string",
            ffi::LUA_TTABLE => "table",
            ffi::LUA_TFUNCTION => "function",
            ffi::LUA_TTHREAD => "thread",
            ffi::LUA_TCDATA => "cdata",
            _ => "userdata",
        }
    }

    pub fn is_nil(&self, i: c_int) -> bool {
        self.kind(i) <= ffi::LUA_TNIL
    }

    pub fn is_table(&self, i: c_int) -> bool {
        self.kind(i) == ffi::LUA_TTABLE
    }

    pub fn is_function(&self, i: c_int) -> bool {
        self.kind(i) == ffi::LUA_TFUNCTION
    }

    pub fn boolean(&self, i: c_int) -> bool {
        // SAFETY: any index is valid for lua_toboolean.
        unsafe { ffi::lua_toboolean(self.l, i) != 0 }
    }

    /// The text of what functions of OpenResty take that turn their argument into one: nil and none are empty.
    pub fn text(&self, i: c_int) -> Result<&[u8], Raise> {
        match self.kind(i) {
            ffi::LUA_TNIL | ffi::LUA_TNONE => Ok(b""),
            ffi::LUA_TBOOLEAN => Ok(if self.boolean(i) { b"true" } else { b"false" }),
            _ => self.arg_bytes(i),
        }
    }

    /// A number, or a string that reads as one.
    pub fn number(&self, i: c_int) -> Option<f64> {
        // SAFETY: both take any acceptable index.
        unsafe { (ffi::lua_isnumber(self.l, i) != 0).then(|| ffi::lua_tonumber(self.l, i)) }
    }

    /// A string, or a number's text (the value on the stack becomes that string). Valid while it stays on the stack.
    pub fn bytes(&self, i: c_int) -> Option<&[u8]> {
        let mut len = 0;
        // SAFETY: lua_tolstring gives null or `len` bytes that live as long as the value is on the stack.
        unsafe {
            let p = ffi::lua_tolstring(self.l, i, &mut len);
            (!p.is_null()).then(|| std::slice::from_raw_parts(p.cast(), len))
        }
    }

    /// As `bytes`, or `bad argument`.
    pub fn arg_bytes(&self, i: c_int) -> Result<&[u8], Raise> {
        self.bytes(i).ok_or_else(|| self.bad_argument(i, "string"))
    }

    pub fn arg_str(&self, i: c_int) -> Result<Cow<'_, str>, Raise> {
        self.arg_bytes(i).map(String::from_utf8_lossy)
    }

    pub fn arg_number(&self, i: c_int) -> Result<f64, Raise> {
        self.number(i).ok_or_else(|| self.bad_argument(i, "number"))
    }

    pub fn arg_int(&self, i: c_int) -> Result<i64, Raise> {
        self.arg_number(i).map(|n| n as i64)
    }

    /// `None` for nil and none.
    pub fn opt_number(&self, i: c_int) -> Result<Option<f64>, Raise> {
        if self.is_nil(i) { Ok(None) } else { self.arg_number(i).map(Some) }
    }

    pub fn opt_bytes(&self, i: c_int) -> Result<Option<&[u8]>, Raise> {
        if self.is_nil(i) { Ok(None) } else { self.arg_bytes(i).map(Some) }
    }

    pub fn arg_table(&self, i: c_int) -> Result<(), Raise> {
        if self.is_table(i) { Ok(()) } else { Err(self.bad_argument(i, "table")) }
    }

    pub fn arg_function(&self, i: c_int) -> Result<(), Raise> {
        if self.is_function(i) { Ok(()) } else { Err(self.bad_argument(i, "function")) }
    }

    /// `bad argument #1 to 'name' (string expected, got nil)`
    pub fn bad_argument(&self, i: c_int, expected: &str) -> Raise {
        self.argument_error(i, &format!("{expected} expected, got {}", self.kind_name(i)))
    }

    /// `bad argument #1 to 'name' (what)`
    pub fn argument_error(&self, i: c_int, what: &str) -> Raise {
        let name = self.function_name();
        Raise(Cow::Owned(format!("bad argument #{i} to '{name}' ({what})")))
    }

    fn function_name(&self) -> String {
        // The second upvalue of every host function is its full name; scripts know it by the last part.
        // SAFETY: an upvalue index is acceptable whether or not the upvalue exists.
        let name = self.bytes(unsafe { ffi_upvalue(2) }).map(String::from_utf8_lossy);
        name.map_or_else(|| "?".into(), |n| n.rsplit('.').next().unwrap_or("?").to_owned())
    }

    pub fn push_nil(&self) -> c_int {
        // SAFETY: Lua grants a C function 20 free slots; more is asked for with `reserve`.
        unsafe { ffi::lua_pushnil(self.l) };
        1
    }

    pub fn push_bool(&self, b: bool) -> c_int {
        // SAFETY: as push_nil.
        unsafe { ffi::lua_pushboolean(self.l, b as c_int) };
        1
    }

    pub fn push_number(&self, n: f64) -> c_int {
        // SAFETY: as push_nil.
        unsafe { ffi::lua_pushnumber(self.l, n) };
        1
    }

    pub fn push_bytes(&self, s: impl AsRef<[u8]>) -> c_int {
        let s = s.as_ref();
        // SAFETY: as push_nil; Lua copies the bytes.
        unsafe { ffi::lua_pushlstring_(self.l, s.as_ptr().cast(), s.len()) };
        1
    }

    /// `cjson.null`, `ngx.null`.
    pub fn push_null(&self) -> c_int {
        // SAFETY: as push_nil.
        unsafe { ffi::lua_pushlightuserdata(self.l, ptr::null_mut()) };
        1
    }

    pub fn push_table(&self, array: usize, hash: usize) -> c_int {
        // SAFETY: as push_nil.
        unsafe { ffi::lua_createtable(self.l, array.min(1 << 20) as c_int, hash.min(1 << 20) as c_int) };
        1
    }

    pub fn push_copy(&self, i: c_int) -> c_int {
        // SAFETY: `i` is an acceptable index of the caller.
        unsafe { ffi::lua_pushvalue(self.l, i) };
        1
    }

    /// `nil, text`
    pub fn fail(&self, text: impl AsRef<[u8]>) -> Result<c_int, Raise> {
        self.push_nil();
        self.push_bytes(text);
        Ok(2)
    }

    /// Pushes `table[key]`.
    pub fn get(&self, table: c_int, key: impl AsRef<[u8]>) -> c_int {
        let table = self.absolute(table);
        self.push_bytes(key);
        // SAFETY: callers pass the index of a table; raw access calls nothing.
        unsafe { ffi::lua_rawget_(self.l, table) };
        1
    }

    pub fn get_index(&self, table: c_int, n: usize) -> c_int {
        // SAFETY: as get.
        unsafe { ffi::lua_rawgeti_(self.l, table, n as c_int) };
        1
    }

    /// The key on top becomes `table[key]`.
    pub fn get_raw(&self, table: c_int) {
        // SAFETY: as get.
        unsafe { ffi::lua_rawget_(self.l, table) };
    }

    /// `table[key] = value`, which lie on top in that order and go.
    pub fn set_raw(&self, table: c_int) {
        // SAFETY: as get.
        unsafe { ffi::lua_rawset(self.l, table) };
    }

    /// The two values on top change places.
    pub fn swap(&self) {
        // SAFETY: callers have pushed two values.
        unsafe { ffi::lua_insert(self.l, -2) };
    }

    /// `table[key] = ` the value on top, which it pops.
    pub fn set(&self, table: c_int, key: impl AsRef<[u8]>) {
        let table = self.absolute(table);
        self.push_bytes(key);
        // SAFETY: as get; key and value are swapped into the order that rawset wants.
        unsafe {
            ffi::lua_insert(self.l, -2);
            ffi::lua_rawset(self.l, table);
        }
    }

    /// `table[n] = ` the value on top, which it pops.
    pub fn set_index(&self, table: c_int, n: usize) {
        // SAFETY: as get.
        unsafe { ffi::lua_rawseti_(self.l, table, n as c_int) }
    }

    pub fn len(&self, i: c_int) -> usize {
        // SAFETY: raw length of any value.
        unsafe { ffi::lua_objlen(self.l, i) }
    }

    pub fn is_empty(&self, i: c_int) -> bool {
        self.len(i) == 0
    }

    pub fn pop(&self, n: c_int) {
        // SAFETY: callers pop what they pushed.
        unsafe { ffi::lua_pop(self.l, n) }
    }

    pub fn set_top(&self, n: c_int) {
        // SAFETY: as pop.
        unsafe { ffi::lua_settop(self.l, n) }
    }

    /// Room for `n` more values.
    pub fn reserve(&self, n: usize) -> Result<(), Raise> {
        // SAFETY: `l` is live.
        let ok = n < 100_000 && unsafe { ffi::lua_checkstack(self.l, n as c_int) } != 0;
        if ok { Ok(()) } else { Err("too many results".into()) }
    }

    /// Visits a table's pairs: key at -2, value at -1. The visitor leaves the stack as it found it and must not turn
    /// a number key into a string (`bytes` on -2 only when it is a string).
    pub fn pairs<E>(&self, table: c_int, mut visit: impl FnMut(&Stack) -> Result<(), E>) -> Result<(), E> {
        let table = self.absolute(table);
        self.push_nil();
        // SAFETY: `table` is a table; lua_next cannot fail while the visitor keeps the key.
        while unsafe { ffi::lua_next(self.l, table) } != 0 {
            if let Err(e) = visit(self) {
                self.pop(2);
                return Err(e);
            }
            self.pop(1);
        }
        Ok(())
    }

    pub fn absolute(&self, i: c_int) -> c_int {
        if i < 0 && i > ffi::LUA_REGISTRYINDEX { self.top() + i + 1 } else { i }
    }
}

/// The request that runs, or the error that OpenResty raises outside of one.
///
/// The borrow must end before the function returns to Lua or calls it.
pub fn request<'a>() -> Result<&'a mut Exchange, Raise> {
    fast::request().ok_or_else(|| "no request found".into())
}

unsafe extern "C-unwind" {
    /// LuaJIT's, which mlua does not name.
    fn lua_isyieldable(l: *mut ffi::lua_State) -> c_int;
}

/// The index of a C closure's `n`th upvalue.
const unsafe fn ffi_upvalue(n: c_int) -> c_int {
    ffi::lua_upvalueindex(n)
}

/// A `lua_CFunction` as LuaJIT takes it: on x86-64 its interpreter computes with the whole register that holds the
/// number of results, while the ABI lets a callee that returns an `int` leave anything in the upper half.
pub(crate) type HostEntry = unsafe extern "C-unwind" fn(*mut ffi::lua_State) -> usize;

pub(crate) const fn as_lua(f: HostEntry) -> ffi::lua_CFunction {
    // SAFETY: the two types differ in the width of the result only, and both are returned in the same register; the
    // lower half is the `int` that every caller reads.
    unsafe { std::mem::transmute::<HostEntry, ffi::lua_CFunction>(f) }
}

pub(crate) fn widened(results: c_int) -> usize {
    results as u32 as usize
}

unsafe extern "C-unwind" fn call_host<F: HostFn>(l: *mut ffi::lua_State) -> usize {
    // SAFETY: Lua calls this with a live state; F is a zero-sized function item, so any aligned pointer reads as one.
    let (stack, f) = unsafe { (Stack::new(l), ptr::NonNull::<F>::dangling().as_ptr().read()) };
    if allowed(&stack) {
        match catch_unwind(AssertUnwindSafe(|| f(&stack))) {
            Ok(Ok(results)) => return widened(results),
            Ok(Err(raise)) => push_raise(&stack, raise),
            Err(panic) => push_panic(&stack, panic),
        }
    }
    // SAFETY: the message is on top and no Rust value with a destructor is alive.
    unsafe { ffi::lua_error(l) }
}

unsafe extern "C-unwind" fn wait_host<F: HostWait>(l: *mut ffi::lua_State) -> usize {
    // SAFETY: as call_host.
    let (stack, f) = unsafe { (Stack::new(l), ptr::NonNull::<F>::dangling().as_ptr().read()) };
    if allowed(&stack) {
        match catch_unwind(AssertUnwindSafe(|| f(&stack))) {
            Ok(Ok(Wait::Ready(results))) => return widened(results),
            Ok(Ok(Wait::Park(op))) => {
                super::sched::park(op);
                stack.push_nil();
                // SAFETY: the marker tells resumers on the way out that this is the host's, not a script's, yield.
                unsafe {
                    ffi::lua_pop(l, 1);
                    ffi::lua_pushlightuserdata(l, super::sched::marker());
                    return widened(ffi::lua_yield(l, 1));
                }
            }
            Ok(Err(raise)) => push_raise(&stack, raise),
            Err(panic) => push_panic(&stack, panic),
        }
    }
    // SAFETY: as call_host.
    unsafe { ffi::lua_error(l) }
}

/// Checks the phase; leaves OpenResty's message on the stack when the function is not for it.
fn allowed(stack: &Stack) -> bool {
    // SAFETY: every host function has its mask as first upvalue.
    let mask = unsafe { ffi::lua_tointeger_(stack.l, ffi_upvalue(1)) } as u32;
    let phase = fast::phase();
    if Phases(mask).has(phase) {
        return true;
    }
    push_raise(stack, Raise(Cow::Owned(format!("API disabled in the context of {}", context_name(phase)))));
    false
}

fn push_raise(stack: &Stack, raise: Raise) {
    // SAFETY: luaL_where pushes one string; concat joins it with the message.
    unsafe {
        ffi::luaL_where(stack.l, 1);
        stack.push_bytes(raise.0.as_bytes());
        ffi::lua_concat(stack.l, 2);
    }
}

fn push_panic(stack: &Stack, panic: Box<dyn std::any::Any + Send>) {
    let text = panic_text(&*panic);
    push_raise(stack, Raise(Cow::Owned(format!("host function panicked: {text}"))));
    fast::note_panic();
}

/// What a panic said.
pub fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(s), _) => s,
        (_, Some(s)) => s,
        _ => "unknown panic",
    }
}

/// docs/lua-api.md: the table as text.
pub fn document(entries: &[Entry]) -> String {
    let mut lines: Vec<String> = entries
        .iter()
        .map(|e| {
            let how = match e.how {
                How::Func => "function",
                How::Wait => "function, may wait",
                How::Fast => "FFI",
                How::Value => "value",
            };
            format!("| `{}` | {how} | {} | {} |\n", e.name, phase_names(e.phases), e.doc.replace('|', "\\|"))
        })
        .collect();
    lines.sort();
    let head = "# What scripts may call\n\nThe host's side of the Lua API: made from the table in `lua::api`, held by a test. `ngx.*` entries \
        with a face in Lua (lua/moongate/ngx.lua) appear there; `native.*` is `require(\"moongate.native\").*`.\n\n\
        | name | kind | phases | what it does |\n|--|--|--|--|\n";
    format!("{head}{}", lines.concat())
}

fn phase_names(phases: Phases) -> String {
    const NAMES: [(Phases, &str); 10] = [
        (Phases::INIT, "init"),
        (Phases::SSL, "ssl"),
        (Phases::REWRITE, "rewrite"),
        (Phases::ACCESS, "access"),
        (Phases::BALANCER, "balancer"),
        (Phases::CONTENT, "function"),
        (Phases::HEADER_FILTER, "header_filter"),
        (Phases::BODY_FILTER, "body_filter"),
        (Phases::LOG, "log"),
        (Phases::TIMER, "timer"),
    ];
    let in_all = NAMES.iter().all(|(p, _)| phases.0 & p.0 == p.0);
    if in_all {
        return "any".into();
    }
    let names: Vec<&str> = NAMES.iter().filter(|(p, _)| phases.0 & p.0 != 0).map(|(_, name)| *name).collect();
    names.join(", ")
}

/// A chunk name as Lua wants it: `@plugins/x.lua` prints as `plugins/x.lua`.
pub fn chunk_name(file: &str) -> CString {
    CString::new(format!("@{file}")).unwrap_or_default()
}
