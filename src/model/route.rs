//! Routes: which requests, which plugins, which upstream.

use std::{sync::Arc, time::Duration};

use ipnet::IpNet;
use serde_json::{Map, Value};
use smallvec::SmallVec;

use super::{
    Id, Plugins, SchemaKind, Upstream,
    parse::{ParseContext, boxed, enabled, flag, id, invalid, number, strings, text, timeouts},
};
use crate::{
    error::Result,
    expr::{self, Expr},
};

#[derive(Debug, Default)]
pub struct Route {
    pub name: Option<Box<str>>,
    /// As written: `/a`, `/a/*`, `/user/:id`.
    pub uris: SmallVec<[Box<str>; 1]>,
    /// Lower case; `*.foo.com` and `*` keep their star. Empty: any host.
    pub hosts: Vec<Box<str>>,
    /// Empty: any method.
    pub methods: MethodSet,
    pub remote_addrs: Vec<IpNet>,
    pub vars: Option<Box<Expr>>,
    /// Lua source, `function(vars) … end`.
    pub filter_func: Option<Box<str>>,
    pub priority: i64,
    /// `status` is 1.
    pub enabled: bool,
    pub plugins: Plugins,
    pub plugin_config_id: Option<Id>,
    pub service_id: Option<Id>,
    pub upstream_id: Option<Id>,
    pub upstream: Option<Arc<Upstream>>,
    pub function_id: Option<Id>,
    /// `script`: Lua source run instead of plugins.
    pub script: Option<Box<str>>,
    pub timeout: Option<Box<Timeouts>>,
    pub enable_websocket: Option<bool>,
}

/// `timeout` of a route or an upstream.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Timeouts {
    pub connect: Duration,
    pub send: Duration,
    pub read: Duration,
}

/// The methods that a route's schema allows, as bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MethodSet(pub u16);

/// In the order of their bits.
const METHODS: [&str; 10] = ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "CONNECT", "TRACE", "PURGE"];

impl MethodSet {
    /// Adds a method; says whether it is one that a route may name.
    pub fn insert(&mut self, method: &str) -> bool {
        let bit = METHODS.iter().position(|m| *m == method);
        self.0 |= bit.map_or(0, |bit| 1 << bit);
        bit.is_some()
    }

    /// Whether a request of that method is allowed. The empty set allows all.
    pub fn allows(self, method: &[u8]) -> bool {
        self.0 == 0 || METHODS.iter().position(|m| m.as_bytes() == method).is_some_and(|bit| self.0 & (1 << bit) != 0)
    }
}

impl Route {
    pub(super) fn from_json(map: &mut Map<String, Value>, context: &ParseContext<'_>) -> Result<Route> {
        let uris = one_or_many(map, "uri", "uris").map(Into::into).collect();
        let hosts = one_or_many(map, "host", "hosts").map(|host| host.to_ascii_lowercase().into()).collect();
        let remote_addrs = one_or_many(map, "remote_addr", "remote_addrs").map(network).collect::<Result<_>>()?;
        let mut methods = MethodSet::default();
        strings(map, "methods").for_each(|method| {
            methods.insert(method);
        });
        Ok(Route {
            name: boxed(map, "name"),
            uris,
            hosts,
            methods,
            remote_addrs,
            vars: vars(map)?,
            filter_func: boxed(map, "filter_func"),
            priority: number(map, "priority").unwrap_or(0),
            enabled: enabled(map),
            plugins: Plugins::from_json(map, SchemaKind::Route, context)?,
            plugin_config_id: id(map, "plugin_config_id"),
            service_id: id(map, "service_id"),
            upstream_id: id(map, "upstream_id"),
            upstream: Upstream::inline(map, context)?,
            function_id: id(map, "function_id"),
            script: boxed(map, "script"),
            timeout: timeouts(map).map(Box::new),
            enable_websocket: flag(map, "enable_websocket"),
        })
    }
}

fn one_or_many<'m>(map: &'m Map<String, Value>, one: &str, many: &str) -> impl Iterator<Item = &'m str> {
    text(map, one).into_iter().chain(strings(map, many))
}

fn network(text: &str) -> Result<IpNet> {
    expr::network(text).ok_or_else(|| invalid(format!("invalid ip address: {text}")))
}

fn vars(map: &Map<String, Value>) -> Result<Option<Box<Expr>>> {
    let Some(vars) = map.get("vars") else { return Ok(None) };
    let expr = Expr::compile(vars).map_err(|e| invalid(format!("failed to validate the 'vars' expression: {e}")))?;
    let empty = vars.as_array().is_none_or(Vec::is_empty);
    Ok((!empty).then(|| Box::new(expr)))
}
