//! Routes: which requests, which plugins, which upstream.

use std::{sync::Arc, time::Duration};

use ipnet::IpNet;
use smallvec::SmallVec;

use super::{Id, Plugins, Upstream};
use crate::expr::Expr;

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
    pub timeout: Option<Timeouts>,
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
