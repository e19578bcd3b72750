//! `ngx.location.capture`, `ngx.exec`: from location to location. Their options are read in lua/moongate/location.lua.

use std::{
    any::Any,
    ffi::c_int,
    rc::{Rc, Weak},
};

use bytes::Bytes;
use mlua::ffi;

use super::codec;
use crate::{
    error::Result,
    exchange::{
        Exchange, Jump,
        host::{Captured, Subrequest},
    },
    lua::{
        Op, Value, Vm, Wait,
        api::{Api, Phases, Raise, Stack, context_name, request},
        host::Answer,
        sched::Ask,
        vm,
    },
    observe::log::Level,
};

/// Subrequests of one call: a bound for a list that a script builds.
const MAX_LIST: usize = 1000;

const PHASES: Phases = Phases::BEFORE_HEAD;

pub fn register(api: &mut Api) -> Result<()> {
    api.wait("native.location.capture", PHASES, "capture(list): one table per subrequest", capture)?;
    api.wait("native.location.exec", PHASES, "exec(path, args?): goes there and does not return", exec)?;
    api.func("ngx.on_abort", PHASES, "on_abort(callback): ok, err; runs it when the client goes away", on_abort)?;
    api.func("native.location.is_subrequest", Phases::REQUEST, "is_subrequest(): boolean", |s| {
        Ok(s.push_bool(request()?.depth > 0))
    })
}

/// A value of the VM that a subrequest brings along.
pub struct Kept {
    /// Not kept alive: a connection may outlive the VM that its handshake ran in.
    vm: Weak<Vm>,
    anchor: c_int,
}

impl Kept {
    /// `anchor` is a registry reference of `vm`, released with the value.
    pub fn new(vm: &Rc<Vm>, anchor: c_int) -> Self {
        Kept { vm: Rc::downgrade(vm), anchor }
    }

    /// Whether it is a value of this VM.
    pub fn is_of(&self, vm: &Vm) -> bool {
        std::ptr::eq(self.vm.as_ptr(), vm)
    }

    /// Pushes it.
    pub fn push(&self, s: &Stack) {
        s.get_index(ffi::LUA_REGISTRYINDEX, self.anchor as usize);
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        if let Some(vm) = self.vm.upgrade() {
            vm.release(self.anchor);
        }
    }
}

fn capture(s: &Stack) -> std::result::Result<Wait, Raise> {
    s.arg_table(1)?;
    let n = s.len(1);
    if n > MAX_LIST {
        return Err(format!("too many subrequests: {n}, and {MAX_LIST} at most").into());
    }
    let x = request()?;
    if x.location.is_none() {
        return Err("ngx.location.capture is not supported here: no location serves the request; use resty.http".into());
    }
    let mut list = Vec::with_capacity(n);
    for i in 1..=n {
        s.get_index(1, i);
        let one = subrequest(s, s.top())?;
        if let Some((name, _)) = one.vars.iter().find(|(name, _)| !x.is_defined(name)) {
            let why = "cannot be assigned a value (maybe you forgot to define it first?)";
            x.log(Level::Error, format!("variable \"{name}\" {why}").as_bytes());
            return Err("failed to adjust the subrequest: -1".into());
        }
        list.push(one);
        s.pop(1);
    }
    Ok(Wait::Park(Op::Ask(Ask::Subrequests(list))))
}

/// A path that a script gave, decoded. One that leads upwards could leave the place that its start names.
fn decoded(path: &[u8]) -> std::result::Result<Vec<u8>, Raise> {
    let path = codec::unescape_uri(path, false);
    match path.contains(&0) || path.split(|b| *b == b'/').any(|part| part == b"..") {
        true => Err("unsafe uri".into()),
        false => Ok(path),
    }
}

/// Reads the table at `i`.
fn subrequest(s: &Stack, i: c_int) -> std::result::Result<Subrequest, Raise> {
    let bytes = |key: &str| {
        s.get(i, key);
        let value = s.bytes(-1).map(<[u8]>::to_vec);
        s.pop(1);
        value
    };
    let flag = |key: &str| {
        s.get(i, key);
        let value = s.boolean(-1);
        s.pop(1);
        value
    };
    let mut vars = Vec::new();
    s.get(i, "vars");
    if s.is_table(-1) {
        s.pairs::<Raise>(-1, |s| {
            if s.kind(-2) == ffi::LUA_TSTRING {
                // As nginx: names know no case.
                let name = String::from_utf8_lossy(s.bytes(-2).unwrap_or_default()).to_ascii_lowercase().into();
                vars.push((name, s.bytes(-1).unwrap_or_default().to_vec()));
            }
            Ok(())
        })?;
    }
    s.pop(1);
    s.get(i, "ctx");
    let ctx = match (s.is_table(-1), vm::current()) {
        (true, Some(vm)) => {
            // SAFETY: the table is on top; luaL_ref pops it.
            let anchor = unsafe { ffi::luaL_ref(s.raw(), ffi::LUA_REGISTRYINDEX) };
            Some(Rc::new(Kept::new(&vm, anchor)) as Rc<dyn Any>)
        }
        _ => {
            s.pop(1);
            None
        }
    };
    Ok(Subrequest {
        method: bytes("method").unwrap_or_else(|| b"GET".to_vec()),
        path: decoded(&bytes("path").unwrap_or_default())?,
        args: bytes("args").unwrap_or_default(),
        body: bytes("body").map(Bytes::from),
        forward_body: flag("forward_body"),
        vars,
        copy_vars: flag("copy_all_vars"),
        share_vars: flag("share_all_vars"),
        ctx,
        header_only: false,
    })
}

fn on_abort(s: &Stack) -> Answer {
    s.arg_function(1)?;
    let x = request()?;
    match &x.location {
        // A plugin's request ends by itself when its client goes away.
        None => return Ok(s.push_number(1.0)),
        Some(location) if !location.directives.lua_check_client_abort => {
            return s.fail("lua_check_client_abort is off");
        }
        Some(_) if x.lua.on_abort.is_some() => return s.fail("duplicate call"),
        Some(_) => {}
    }
    let vm = vm::current().ok_or("no VM runs")?;
    s.push_copy(1);
    // SAFETY: the function is on top; luaL_ref pops it.
    let anchor = unsafe { ffi::luaL_ref(s.raw(), ffi::LUA_REGISTRYINDEX) };
    x.lua.on_abort = Some(Rc::new(Kept::new(&vm, anchor)));
    Ok(s.push_number(1.0))
}

/// What a subrequest answered, as the table that scripts get.
pub(in crate::lua) fn answer(captured: Captured) -> Value {
    Value::Push(Box::new(move |s| {
        s.push_table(0, 4);
        let table = s.top();
        s.push_number(captured.status.into());
        s.set(table, "status");
        s.push_bytes(&captured.body);
        s.set(table, "body");
        s.push_bool(captured.truncated);
        s.set(table, "truncated");
        s.push_table(0, captured.headers.len());
        let headers = s.top();
        for (name, value) in captured.headers.iter() {
            s.push_bytes(value);
            codec::add(s, headers, name);
        }
        s.set(table, "header");
    }))
}

fn exec(s: &Stack) -> std::result::Result<Wait, Raise> {
    let path = s.arg_bytes(1)?;
    let args = s.opt_bytes(2)?.map(<[u8]>::to_vec);
    let jump = match path.strip_prefix(b"@") {
        Some(_) => Jump::Named(String::from_utf8_lossy(path).into()),
        None => Jump::Exec { path: decoded(path)?, args },
    };
    let x = request()?;
    if x.location.is_none() {
        return Err("ngx.exec is not supported here: no location serves the request".into());
    }
    if x.lua.has_subrequests() {
        return Err("attempt to abort with pending subrequests".into());
    }
    if x.response.head_sent {
        return Err("attempt to call ngx.exec after sending out response headers".into());
    }
    x.jump = Some(jump);
    Ok(Wait::Park(Op::Exit(0)))
}

/// `set_uri(…, true)`
pub(super) fn again(x: &mut Exchange) -> std::result::Result<(), Raise> {
    if x.location.is_none() {
        return Err("ngx.req.set_uri with jump is not supported: routes are not matched again".into());
    }
    if !Phases::REWRITE.has(x.phase) {
        return Err(format!("API disabled in the context of {}", context_name(x.phase)).into());
    }
    x.jump = Some(Jump::Again);
    Ok(())
}
