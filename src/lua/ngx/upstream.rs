//! `ngx.upstream`: the upstreams of locations, as this worker knows them (lua-upstream-nginx-module's README).

use std::{
    rc::Rc,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use mlua::ffi;

use crate::{
    balancer::group::{Group, Groups, Peer},
    error::Result,
    lua::{
        api::{Api, Phases, Raise, Stack, request},
        host::Answer,
        vm,
    },
};

const NOT_FOUND: &str = "upstream not found";

pub fn register(api: &mut Api) -> Result<()> {
    let any = Phases::ANY;
    api.func("native.upstream.names", any, "names(): array", |s| {
        s.push_table(0, 0);
        for (i, group) in groups()?.iter().enumerate() {
            s.push_bytes(group.name.as_bytes());
            s.set_index(-2, i + 1);
        }
        Ok(1)
    })?;
    let doc = "servers(name): array of {addr, name, weight, max_fails, fail_timeout, backup?, down?}; nil, err";
    api.func("native.upstream.servers", any, doc, servers)?;
    let doc = "primary(name): array of peers: {id, name, weight, current_weight, effective_weight, fails, conns, …}; nil, err";
    api.func("native.upstream.primary", any, doc, |s| peers(s, false))?;
    api.func("native.upstream.backup", any, "backup(name): as primary, of the backup servers", |s| peers(s, true))?;
    let doc = "set_peer_down(name, is_backup, id, down): true; nil, err; for this worker";
    api.func("native.upstream.set_peer_down", any, doc, set_peer_down)?;
    let doc = "current(): the name of the upstream that the request is proxied to, or nil";
    api.func("native.upstream.current", Phases::REQUEST, doc, current)
}

fn groups() -> Result<Rc<Groups>, Raise> {
    Ok(vm::current().ok_or("no VM runs")?.config.groups.clone())
}

fn group(s: &Stack) -> Result<Option<Rc<Group>>, Raise> {
    let name = s.arg_str(1)?;
    Ok(groups()?.get(&name).cloned())
}

fn servers(s: &Stack) -> Answer {
    let Some(group) = group(s)? else { return s.fail(NOT_FOUND) };
    s.push_table(group.peers().len(), 0);
    for (i, peer) in group.peers().iter().enumerate() {
        let server = &peer.server;
        s.push_table(0, 8);
        text(s, "addr", &address(peer));
        // nginx keeps nothing else of one that only a proxy_pass names.
        let (weight, fails, secs) = match group.implicit.is_some() {
            true => (0, 0, 0.0),
            false => (server.weight, server.max_fails, server.fail_timeout.as_secs_f64()),
        };
        number(s, "weight", weight.into());
        number(s, "max_fails", fails.into());
        number(s, "fail_timeout", secs);
        if group.implicit.is_none() {
            text(s, "name", &server.name);
        }
        flag(s, "backup", server.backup);
        flag(s, "down", server.down);
        s.set_index(-2, i + 1);
    }
    Ok(1)
}

fn peers(s: &Stack, backup: bool) -> Answer {
    let Some(group) = group(s)? else { return s.fail(NOT_FOUND) };
    s.push_table(group.level(backup).len(), 0);
    for (id, peer) in group.level(backup).enumerate() {
        let server = &peer.server;
        s.push_table(0, 12);
        number(s, "id", id as f64);
        text(s, "name", &address(peer));
        number(s, "weight", server.weight.into());
        number(s, "current_weight", peer.current_weight.get() as f64);
        number(s, "effective_weight", peer.effective_weight.get() as f64);
        number(s, "max_fails", server.max_fails.into());
        number(s, "fail_timeout", server.fail_timeout.as_secs_f64());
        number(s, "fails", peer.fails.get().into());
        number(s, "conns", peer.conns.get() as f64);
        for (key, at) in [("accessed", &peer.accessed), ("checked", &peer.checked)] {
            if let Some(at) = at.get() {
                number(s, key, seconds(at));
            }
        }
        flag(s, "down", peer.down.get());
        s.set_index(-2, id + 1);
    }
    Ok(1)
}

fn set_peer_down(s: &Stack) -> Answer {
    let group = group(s)?;
    for i in [2, 4] {
        if s.kind(i) != ffi::LUA_TBOOLEAN {
            return Err(s.bad_argument(i, "boolean"));
        }
    }
    let id = s.arg_number(3)?;
    // What is uploaded for some paths decides nothing for all others.
    if vm::current().is_none_or(|vm| vm.config.purpose == vm::Purpose::Functions) {
        return s.fail("not open to functions");
    }
    let Some(group) = group else { return s.fail(NOT_FOUND) };
    // Anything but a whole number from 0 is nobody's.
    let peer = if id >= 0.0 && id.fract() == 0.0 { group.level(s.boolean(2)).nth(id as usize) } else { None };
    let Some(peer) = peer else { return s.fail("bad peer id") };
    peer.down.set(s.boolean(4));
    Ok(s.push_bool(true))
}

fn current(s: &Stack) -> Answer {
    let upstream = &request()?.upstream;
    Ok(match (&upstream.balancing, &upstream.conf) {
        (_, None) => s.push_nil(),
        (Some(balancing), _) if !balancing.name.is_empty() => s.push_bytes(balancing.name.as_bytes()),
        // What APISIX calls the upstream of every route.
        _ => s.push_bytes("apisix_backend"),
    })
}

fn address(peer: &Peer) -> String {
    let (host, port) = (&peer.server.host, peer.server.port);
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// Whole seconds since the epoch.
fn seconds(at: Instant) -> f64 {
    let then = SystemTime::now().checked_sub(at.elapsed()).unwrap_or(UNIX_EPOCH);
    then.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() as f64
}

fn text(s: &Stack, key: &str, value: &str) {
    s.push_bytes(value.as_bytes());
    s.set(-2, key);
}

fn number(s: &Stack, key: &str, value: f64) {
    s.push_number(value);
    s.set(-2, key);
}

/// Only what is true is there.
fn flag(s: &Stack, key: &str, value: bool) {
    if value {
        s.push_bool(true);
        s.set(-2, key);
    }
}

#[cfg(test)]
mod tests {
    use crate::{
        balancer::group::Groups,
        lua::{Vm, VmConfig, vm::Purpose},
    };

    /// What a chunk returns as text, in a VM for `purpose` with one upstream.
    fn run(purpose: Purpose, chunk: &str) -> String {
        let config = "lua_upstreams: {u: [\"10.0.0.1:80\"]}";
        let (config, _) = crate::conf::parse(std::path::Path::new("/"), config).expect("a configuration");
        let groups = Groups::new(&config.locations).into();
        let vm = Vm::new(VmConfig { purpose, groups, ..VmConfig::default() }).expect("a VM");
        let chunk = format!("local u = require('ngx.upstream') {chunk}");
        let values = vm.entered(|| vm.run("t.lua", &chunk)).expect("runs");
        values.iter().map(|value| value.to_string().expect("a text")).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn upstreams_are_known_outside_of_requests() {
        assert_eq!(run(Purpose::Plugins, "return u.get_upstreams()[1], u.get_servers('u')[1].addr"), "u 10.0.0.1:80");
        let down = "return u.set_peer_down('u', false, 0, true), u.get_primary_peers('u')[1].down";
        assert_eq!(run(Purpose::Plugins, down), "true true");
    }

    #[test]
    fn an_uploaded_function_takes_no_server_out() {
        let down = "local ok, err = u.set_peer_down('u', false, 0, true)
            return tostring(ok), err, tostring(u.get_primary_peers('u')[1].down)";
        assert_eq!(run(Purpose::Functions, down), "nil not open to functions nil");
    }
}
