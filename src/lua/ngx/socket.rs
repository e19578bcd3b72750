//! What all sockets of scripts share: whose they are, how names resolve, how system errors read.
//!
//! A socket belongs to the request (or the timer's run) that made it: no other may use it, and it is closed when its
//! owner ends, collected or not.

use std::{
    cell::{Cell, RefCell},
    io,
    net::{IpAddr, SocketAddr},
    rc::{Rc, Weak},
    sync::{Arc, OnceLock},
    time::Duration,
};

use hashbrown::HashMap;

use super::socket_pool::Pools;
use crate::{
    dns::Resolver,
    lua::{
        api::{Raise, Stack},
        fast, limits, vm,
    },
};

/// `lua_socket_connect_timeout`, `_send_timeout`, `_read_timeout`: the defaults of lua-nginx-module.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// The longest timeout that is taken as given: no sum of instants overflows.
const MAX_TIMEOUT_MS: f64 = 365.0 * 86_400_000.0;

/// Dead entries in an owner's list before it is swept.
const SWEEP_AT: usize = 64;

static RESOLVER: OnceLock<Arc<Resolver>> = OnceLock::new();

/// Names are resolved by this from now on; before, only addresses connect. The first one stays.
pub fn set_resolver(resolver: Arc<Resolver>) {
    let _ = RESOLVER.set(resolver);
}

#[cfg(not(test))]
fn resolver() -> Option<Arc<Resolver>> {
    RESOLVER.get().cloned()
}

#[cfg(test)]
thread_local! {
    /// Tests share the process and want to see what is without one, too.
    pub static TEST_RESOLVER: RefCell<Option<Arc<Resolver>>> = const { RefCell::new(None) };
}

#[cfg(test)]
fn resolver() -> Option<Arc<Resolver>> {
    TEST_RESOLVER.with_borrow(Clone::clone)
}

/// All addresses of `host`, or OpenResty's words for why there are none.
pub async fn addresses(host: &str) -> Result<crate::dns::Addrs, String> {
    if let Some(address) = literal(host) {
        return Ok(crate::dns::Addrs::from_slice(&[address]));
    }
    let resolver = resolver().ok_or_else(|| format!("no resolver defined to resolve \"{host}\""))?;
    resolver.resolve(host).await.map_err(|e| {
        let code = if e.to_string().ends_with("timeout") { "110: Operation timed out" } else { "3: Host not found" };
        format!("{host} could not be resolved ({code})")
    })
}

/// One of the addresses, at random among those of the first's family: nobody says whether a datagram arrived.
pub async fn address(host: &str, port: u16) -> Result<SocketAddr, String> {
    let all = addresses(host).await?;
    let first = all.first().ok_or_else(|| format!("{host} could not be resolved (3: Host not found)"))?;
    let mut same: crate::dns::Addrs = all.iter().filter(|a| a.is_ipv4() == first.is_ipv4()).copied().collect();
    shuffle(&mut same);
    Ok(SocketAddr::new(same.first().copied().unwrap_or(*first), port))
}

/// Begins anywhere, in the order of the answer from there.
pub fn shuffle(addresses: &mut [IpAddr]) {
    if addresses.len() > 1 {
        let at = random() as usize % addresses.len();
        addresses.rotate_left(at);
    }
}

pub fn literal(host: &str) -> Option<IpAddr> {
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    bare.parse().ok()
}

/// Spreads connections over addresses; nothing rests on its quality.
fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::hash::RandomState::new().build_hasher().finish()
}

/// A system error in LuaSocket's words: strerror in lower case.
pub fn error_text(e: &io::Error) -> String {
    let text = match (e.kind(), e.raw_os_error()) {
        (io::ErrorKind::TimedOut, None) => return "timeout".into(),
        (io::ErrorKind::UnexpectedEof, None) => return "closed".into(),
        _ => e.to_string(),
    };
    let end = text.find(" (os error").unwrap_or(text.len());
    text[..end].to_ascii_lowercase()
}

/// A number of milliseconds: `None` for nil and 0, which leave the default.
pub fn timeout(s: &Stack, i: std::ffi::c_int) -> Result<Option<Duration>, Raise> {
    match s.opt_number(i)? {
        None => Ok(None),
        Some(ms) if ms < 0.0 || ms.is_nan() => Err("bad timeout value".into()),
        Some(ms) if ms < 1.0 => Ok(None),
        Some(ms) => Ok(Some(Duration::from_secs_f64(ms.min(MAX_TIMEOUT_MS) / 1000.0))),
    }
}

/// The path of `unix:/path`.
pub fn unix_path(host: &str) -> Option<&str> {
    host.strip_prefix("unix:")
}

/// A port argument, or the text of `nil, text`.
pub fn port(s: &Stack, i: std::ffi::c_int) -> Result<Result<u16, String>, Raise> {
    if s.is_nil(i) {
        return Ok(Err("missing the port number".into()));
    }
    let port = s.arg_int(i)?;
    Ok(u16::try_from(port).map_err(|_| format!("bad port number: {port}")))
}

/// The most that one call sends: one table may hold the same long string any number of times.
const MAX_SENT: usize = 256 << 20;

/// Flattens a string, a number or a nested array of them.
pub fn gather(s: &Stack, i: std::ffi::c_int, into: &mut Vec<u8>) -> Result<(), Raise> {
    gather_up_to(s, i, into, MAX_SENT)
}

fn gather_up_to(s: &Stack, i: std::ffi::c_int, into: &mut Vec<u8>, max: usize) -> Result<(), Raise> {
    match s.kind(i) {
        mlua::ffi::LUA_TTABLE => gather_table(s, i, into, max, 0),
        mlua::ffi::LUA_TBOOLEAN => {
            into.extend_from_slice(if s.boolean(i) { b"true" } else { b"false" });
            Ok(())
        }
        mlua::ffi::LUA_TNIL => {
            into.extend_from_slice(b"nil");
            Ok(())
        }
        mlua::ffi::LUA_TSTRING | mlua::ffi::LUA_TNUMBER => {
            into.extend_from_slice(s.bytes(i).unwrap_or_default());
            Ok(())
        }
        _ => Err(s.argument_error(
            1,
            &format!("string, number, boolean, nil, or array table expected, got {}", s.kind_name(i)),
        )),
    }
}

/// Tables in tables: a bound for one that holds itself.
const MAX_DEPTH: usize = 64;

fn gather_table(s: &Stack, table: std::ffi::c_int, into: &mut Vec<u8>, max: usize, depth: usize) -> Result<(), Raise> {
    if depth > MAX_DEPTH {
        return Err(s.argument_error(1, "table nested too deeply"));
    }
    limits::check()?;
    s.reserve(4)?;
    for n in 1..=highest_index(s, table)? {
        s.get_index(table, n);
        let top = s.top();
        match s.kind(top) {
            mlua::ffi::LUA_TSTRING | mlua::ffi::LUA_TNUMBER => into.extend_from_slice(s.bytes(top).unwrap_or_default()),
            mlua::ffi::LUA_TTABLE => gather_table(s, top, into, max, depth + 1)?,
            _ => return Err(s.argument_error(1, &format!("bad data type {} found", s.kind_name(top)))),
        }
        if into.len() > max {
            return Err(s.argument_error(1, "too much data"));
        }
        s.pop(1);
    }
    Ok(())
}

/// Arrays with holes are refused at the hole, so the highest index counts, not the border that `#` finds.
fn highest_index(s: &Stack, table: std::ffi::c_int) -> Result<usize, Raise> {
    let mut highest = 0usize;
    s.pairs(table, |s| {
        let key = if s.kind(-2) == mlua::ffi::LUA_TNUMBER { s.number(-2) } else { None };
        match key {
            Some(n) if n >= 1.0 && n.fract() == 0.0 && n <= f64::from(i32::MAX) => {
                highest = highest.max(n as usize);
                Ok(())
            }
            _ => Err(s.argument_error(1, "non-array table found")),
        }
    })?;
    Ok(highest)
}

/// What its owner's end closes.
pub trait Shut {
    fn shut(&self);
    /// Has a connection, or is about to.
    fn holds_connection(&self) -> bool;
}

/// A request or a timer's run, while it has sockets.
pub struct Owner {
    /// The number of the request's tables.
    slot: u32,
    ended: Cell<bool>,
    sockets: RefCell<Vec<Weak<dyn Shut>>>,
}

impl Owner {
    /// The request is over; what it left open is closed.
    pub fn has_ended(&self) -> bool {
        self.ended.get()
    }

    /// Closes `socket` with this owner's end.
    pub fn adopt(&self, socket: Weak<dyn Shut>) {
        let mut sockets = self.sockets.borrow_mut();
        if sockets.len() >= SWEEP_AT && sockets.len().is_power_of_two() {
            sockets.retain(|s| s.strong_count() > 0);
        }
        sockets.push(socket);
    }
}

/// The sockets of one VM: owners by the number of their tables, and idle connections.
#[derive(Default)]
pub struct Sockets {
    owners: RefCell<HashMap<u32, Rc<Owner>>>,
    pub pools: Rc<Pools>,
}

impl Sockets {
    fn owner(&self, slot: u32) -> Rc<Owner> {
        let new = || Rc::new(Owner { slot, ended: Cell::new(false), sockets: RefCell::default() });
        self.owners.borrow_mut().entry(slot).or_insert_with(new).clone()
    }

    /// Sockets that hold a connection or are about to.
    pub fn open(&self) -> usize {
        let owners = self.owners.borrow();
        let open = |owner: &Rc<Owner>| {
            let sockets = owner.sockets.borrow();
            sockets.iter().filter_map(Weak::upgrade).filter(|s| s.holds_connection()).count()
        };
        owners.values().map(open).sum()
    }

    /// The request with this number has ended: closes what it left open.
    pub fn end(&self, slot: u32) {
        if self.owners.borrow().is_empty() {
            return;
        }
        let Some(owner) = self.owners.borrow_mut().remove(&slot) else { return };
        owner.ended.set(true);
        let sockets = owner.sockets.take();
        sockets.iter().filter_map(Weak::upgrade).for_each(|s| s.shut());
    }
}

fn slot() -> Result<u32, Raise> {
    fast::exchange().and_then(|x| x.lua.slot).ok_or_else(|| "no request found".into())
}

pub fn current_vm() -> Result<Rc<vm::Vm>, Raise> {
    vm::current().ok_or_else(|| "no VM runs".into())
}

/// Whoever runs now, as an owner.
pub fn current_owner() -> Result<Rc<Owner>, Raise> {
    Ok(current_vm()?.sockets.owner(slot()?))
}

/// Refuses a socket of another request. One that has the same number came later, and this one's had ended.
pub fn check_owner(owner: &Rc<Owner>) -> Result<(), Raise> {
    let own = !owner.ended.get() && owner.slot == slot()?;
    if own { Ok(()) } else { Err("bad request".into()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lua::host::tests::serve_with;

    #[track_caller]
    fn gathers(argument: &str, expected: &str) {
        let gather = |s: &Stack| {
            let mut all = Vec::new();
            gather_up_to(s, 1, &mut all, 10)?;
            Ok(s.push_bytes(all))
        };
        let chunk = format!(
            "local function nested(levels) local t = {{'x'}} for _ = 1, levels do t = {{t}} end return t end
             return (select(2, pcall(f, {argument})):gsub('^.-: ', ''))"
        );
        serve_with(gather, &chunk, expected);
    }

    #[test]
    fn what_is_sent_is_bounded_in_depth_and_length() {
        gathers("{'abc', {'def', {1234}}}", "abcdef1234");
        gathers("{'abc', {'def', {1234}}, 'x'}", "bad argument #1 to 'f' (too much data)");
        gathers(&format!("nested({MAX_DEPTH})"), "x");
        gathers(&format!("nested({})", MAX_DEPTH + 1), "bad argument #1 to 'f' (table nested too deeply)");
    }

    #[test]
    fn timeouts_are_cut_at_a_year() {
        let read = |s: &Stack| {
            let limit = timeout(s, 1)?;
            Ok(s.push_number(limit.map_or(0.0, |limit| limit.as_secs_f64())))
        };
        serve_with(read, "return f(1e300) .. ' ' .. f(20) .. ' ' .. f(0) .. ' ' .. f()", "31536000 0.02 0 0");
    }
}
