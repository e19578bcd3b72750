//! `lua_upstreams`: what nginx's `upstream` blocks hold.
//!
//! Two forms: a list of servers, and a map of `servers` and `balancer_by_lua` (or `balancer_by_lua_file`). A server is written as
//! nginx writes it, address first, parameters behind it; names, defaults and meaning are those of nginx's `server` directive.

use std::{sync::Arc, time::Duration};

use serde_json::{Map, Value};

use super::{locations::Script, typed};

/// One of them.
#[derive(Clone, Debug)]
pub struct Upstream {
    /// What `proxy_pass` says in place of a host.
    pub name: Box<str>,
    /// In their order. May be empty where a script names the peers.
    pub servers: Vec<Server>,
    /// Asked before each try.
    pub balancer: Option<Arc<Script>>,
}

/// A server and what is known of it before anybody has asked it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// The address as it is written.
    pub name: Box<str>,
    /// An address or a name; IPv6 without brackets.
    pub host: Box<str>,
    pub port: u16,
    /// At least 1.
    pub weight: u32,
    /// So many failures within `fail_timeout` put the server aside for as long. 0: never.
    pub max_fails: u32,
    pub fail_timeout: Duration,
    /// Asked only when no primary server can be.
    pub backup: bool,
    pub down: bool,
}

const PORT: u16 = 80;
const WEIGHT: u32 = 1;
const MAX_FAILS: u32 = 1;
const FAIL_TIMEOUT: Duration = Duration::from_secs(10);

/// What may stand behind an address.
const PARAMETERS: &str = "weight=, max_fails=, fail_timeout=, backup and down";

/// What the map form may hold; `lines` is for messages, as in locations.
const KEYS: &[&str] = &["servers", "balancer_by_lua", "balancer_by_lua_file", "lines"];

impl Server {
    /// Reads `address[:port] parameter…`; an error says what is wrong with it.
    pub fn parse(text: &str) -> Result<Server, String> {
        let mut words = text.split_whitespace();
        let mut server = Server::at(words.next().unwrap_or_default(), PORT)?;
        for word in words {
            server.set(word)?;
        }
        Ok(server)
    }

    /// One without parameters. `port`: where the place names none.
    pub fn at(name: &str, port: u16) -> Result<Server, String> {
        let (host, written) = place(name)?;
        Ok(Server {
            name: name.into(),
            host: host.into(),
            port: written.unwrap_or(port),
            weight: WEIGHT,
            max_fails: MAX_FAILS,
            fail_timeout: FAIL_TIMEOUT,
            backup: false,
            down: false,
        })
    }

    fn set(&mut self, word: &str) -> Result<(), String> {
        let bad = |meant: &str| format!("{word:?} is not {meant}");
        let (name, value) = word.split_once('=').map_or((word, None), |(name, value)| (name, Some(value)));
        match (name, value) {
            ("weight", Some(value)) => {
                let weight = value.parse().ok().filter(|weight| *weight > 0);
                self.weight = weight.ok_or_else(|| bad("a weight of 1 or more; `down` takes a server out"))?;
            }
            ("max_fails", Some(value)) => self.max_fails = value.parse().map_err(|_| bad("a number of failures"))?,
            ("fail_timeout", Some(value)) => {
                self.fail_timeout = typed::duration(value).ok_or_else(|| bad("a time as 10s or 1m"))?;
            }
            ("backup", None) => self.backup = true,
            ("down", None) => self.down = true,
            _ => return Err(format!("{word:?} is no parameter of a server; known are {PARAMETERS}")),
        }
        Ok(())
    }
}

/// `host`, `host:port`, `[v6]`, `[v6]:port`
fn place(text: &str) -> Result<(&str, Option<u16>), String> {
    let bad = || format!("{text:?} is no address; write 127.0.0.1:1980, [::1]:1980 or a name and a port");
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']').ok_or_else(bad)?;
            host.parse::<std::net::Ipv6Addr>().map_err(|_| bad())?;
            (host, if rest.is_empty() { None } else { Some(rest.strip_prefix(':').ok_or_else(bad)?) })
        }
        None => text.split_once(':').map_or((text, None), |(host, port)| (host, Some(port))),
    };
    let named = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b':');
    if host.is_empty() || !host.bytes().all(named) {
        return Err(bad());
    }
    match port {
        None => Ok((host, None)),
        Some(port) => Ok((host, Some(port.parse().ok().filter(|port| *port > 0).ok_or_else(bad)?))),
    }
}

/// Reads them all; `script` reads the one of a map.
pub(super) fn read(
    map: Option<&Value>,
    mistakes: &mut Vec<String>,
    script: impl Fn(&Map<String, Value>) -> Option<Arc<Script>>,
) -> Vec<Arc<Upstream>> {
    let named = match map {
        None | Some(Value::Null) => return Vec::new(),
        Some(Value::Object(map)) => map,
        Some(_) => {
            mistakes.push("lua_upstreams: is not a map of names and servers".into());
            return Vec::new();
        }
    };
    let mut all = Vec::with_capacity(named.len());
    for (name, value) in named {
        let path = format!("lua_upstreams.{name}");
        let (list, path_of_list, balancer) = match value {
            Value::Object(map) => {
                unknown(map, &path, mistakes);
                (map.get("servers"), format!("{path}.servers"), script(map))
            }
            list => (Some(list), path.clone(), None),
        };
        let servers = servers(list, &path_of_list, mistakes);
        if list.is_some_and(|list| list.as_array().is_none_or(|list| list.len() != servers.len())) {
            continue;
        }
        if balancer.is_none() && servers.iter().all(|server| server.backup) {
            mistakes.push(format!("{path}: has no server that is not a backup; add one, or a balancer_by_lua"));
            continue;
        }
        all.push(Arc::new(Upstream { name: name.as_str().into(), servers, balancer }));
    }
    all
}

fn unknown(map: &Map<String, Value>, path: &str, mistakes: &mut Vec<String>) {
    for key in map.keys().filter(|key| !KEYS.contains(&key.as_str())) {
        mistakes.push(format!("{path}.{key}: is not a known key; known are {}", KEYS[..3].join(", ")));
    }
    for key in ["balancer_by_lua", "balancer_by_lua_file"] {
        if map.get(key).is_some_and(|value| !value.is_string()) {
            mistakes.push(format!("{path}.{key}: is not a text"));
        }
    }
}

fn servers(list: Option<&Value>, path: &str, mistakes: &mut Vec<String>) -> Vec<Server> {
    let Some(list) = list else { return Vec::new() };
    let Some(list) = list.as_array() else {
        mistakes.push(format!("{path}: is not a list of servers as \"127.0.0.1:1980 weight=2\""));
        return Vec::new();
    };
    let mut servers = Vec::with_capacity(list.len());
    for (i, value) in list.iter().enumerate() {
        match value.as_str().map_or_else(|| Err(format!("{value} is not a text")), Server::parse) {
            Ok(server) => servers.push(server),
            Err(why) => mistakes.push(format!("{path}[{i}]: {why}")),
        }
    }
    servers
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read_all(json: Value) -> (Vec<Arc<Upstream>>, Vec<String>) {
        let mut mistakes = Vec::new();
        let script = |map: &Map<String, Value>| {
            let source = map.get("balancer_by_lua")?.as_str()?;
            let source = super::super::locations::Source::Inline(source.into());
            Some(Arc::new(Script { source, name: "=balancer_by_lua".into() }))
        };
        (read(Some(&json), &mut mistakes, script), mistakes)
    }

    #[test]
    fn servers_have_the_defaults_of_nginx() {
        let plain = Server::parse("10.0.0.1").unwrap();
        assert_eq!((&*plain.host, plain.port, plain.weight, plain.max_fails), ("10.0.0.1", 80, 1, 1));
        assert_eq!((plain.fail_timeout, plain.backup, plain.down), (Duration::from_secs(10), false, false));
        let all = Server::parse("a.test:81 weight=2 max_fails=0 fail_timeout=1m backup down").unwrap();
        assert_eq!((&*all.name, &*all.host, all.port, all.weight, all.max_fails), ("a.test:81", "a.test", 81, 2, 0));
        assert_eq!((all.fail_timeout, all.backup, all.down), (Duration::from_secs(60), true, true));
        assert_eq!(Server::parse("b fail_timeout=53").unwrap().fail_timeout, Duration::from_secs(53));
        let v6 = Server::parse("[::1]:8080").unwrap();
        assert_eq!((&*v6.host, v6.port), ("::1", 8080));
        assert_eq!(Server::parse("[::1]").unwrap().port, 80);
    }

    #[test]
    fn what_is_wrong_with_a_server_is_told() {
        for (text, part) in [
            ("", "is no address"),
            ("127.0.0.1:0", "is no address"),
            ("127.0.0.1:x", "is no address"),
            ("::1", "is no address"),
            ("[::1", "is no address"),
            ("[a]:1", "is no address"),
            ("unix:/tmp/s", "is no address"),
            ("a weight=0", "is not a weight of 1 or more"),
            ("a weight=-1", "is not a weight of 1 or more"),
            ("a max_fails=many", "is not a number of failures"),
            ("a fail_timeout=soon", "is not a time as 10s or 1m"),
            ("a backup=1", "known are weight=, max_fails=, fail_timeout=, backup and down"),
            ("a wait=2", "\"wait=2\" is no parameter of a server"),
        ] {
            let why = Server::parse(text).unwrap_err();
            assert!(why.contains(part), "{text}: {why}");
        }
    }

    #[test]
    fn both_forms_are_read() {
        let (all, mistakes) = read_all(json!({
            "list": ["127.0.0.1:1980", "127.0.0.1:1980 weight=2"],
            "map": {"servers": ["a:1", "b:2 backup"], "balancer_by_lua": "x()"},
            "dynamic": {"balancer_by_lua": "x()"},
        }));
        assert!(mistakes.is_empty(), "{mistakes:?}");
        let found: Vec<_> = all.iter().map(|u| (&*u.name, u.servers.len(), u.balancer.is_some())).collect();
        assert_eq!(found, [("dynamic", 0, true), ("list", 2, false), ("map", 2, true)]);
    }

    #[test]
    fn every_mistake_is_told_with_its_path() {
        let (all, mistakes) = read_all(json!({
            "a": ["127.0.0.1:1980 slow", "b:1 weight=x"],
            "b": {"servers": ["x y"], "balance": "least_conn"},
            "c": [],
            "d": "127.0.0.1",
            "e": {"servers": ["a backup"]},
            "f": {"balancer_by_lua": 1},
            "g": [1],
        }));
        assert!(all.is_empty(), "{all:?}");
        let starts = [
            "lua_upstreams.a[0]: \"slow\" is no parameter",
            "lua_upstreams.a[1]: \"weight=x\" is not",
            "lua_upstreams.b.balance: is not a known key; known are servers, balancer_by_lua, balancer_by_lua_file",
            "lua_upstreams.b.servers[0]: \"y\" is no parameter",
            "lua_upstreams.c: has no server",
            "lua_upstreams.d: is not a list",
            "lua_upstreams.e: has no server that is not a backup",
            "lua_upstreams.f.balancer_by_lua: is not a text",
            "lua_upstreams.f: has no server",
            "lua_upstreams.g[0]: 1 is not a text",
        ];
        assert_eq!(mistakes.len(), starts.len(), "{mistakes:?}");
        for (mistake, start) in mistakes.iter().zip(starts) {
            assert!(mistake.starts_with(start), "{mistake}");
        }
        assert!(read_all(json!([])).1[0].contains("lua_upstreams: is not a map"));
        assert!(read_all(Value::Null).1.is_empty());
    }
}
