//! One uri of one route under one host: what a lookup ends at. And lists of them, in the order to try.

use std::{cmp::Ordering, net::IpAddr, sync::Arc};

use imbl::Vector;
use smallvec::SmallVec;

use super::{
    Facts, Part, Refused, depths,
    pattern::{Captures, Shape},
    prefetch,
};
use crate::model::{Object, Route, Upstream};

/// A uri of a route, compiled. What every lookup reads comes first, and C's layout keeps it: with ten thousand routes nothing of
/// it lies in a cache.
#[repr(C)]
pub(super) struct Rule {
    /// The uri up to where it is not fixed. A copy, so that a lookup needs not load the route.
    pub fixed: SmallVec<[u8; 32]>,
    /// Number of the `Scope` that the rule stands in.
    pub scope: u32,
    /// Whether a request of that path needs a further look at the route's own conditions.
    pub conditional: bool,
    /// The route is its upstream and nothing else: see `is_plain`.
    pub plain: bool,
    /// Whether the route has hosts and the rule does not stand under one of them.
    pub checks_host: bool,
    pub shape: Shape,
    /// The host that the rule stands under. Index into `hosts()`.
    pub host: Option<u32>,
    /// Index into the route's `uris`.
    pub uri: u32,
    /// The route's own upstream, so that both can be asked for at once: see `prefetch`.
    pub upstream: Option<Arc<Upstream>>,
    pub route: Arc<Object<Route>>,
    /// The service's hosts, for a route that has none of its own.
    pub service_hosts: Option<Arc<[Box<str>]>>,
}

impl Rule {
    pub fn uri(&self) -> &str {
        &self.route.value.uris[self.uri as usize]
    }

    /// The part of the index that holds it.
    pub fn part(&self) -> Part {
        match self.shape {
            Shape::Exact => Part::Exact(depths::of_path(&self.fixed)),
            _ => depths::of_folder(&self.fixed).map_or(Part::Tree, Part::Folder),
        }
    }

    pub fn is_exact_in(&self, scope: u32) -> bool {
        matches!(self.shape, Shape::Exact) && self.scope == scope
    }

    pub fn is_folder_in(&self, scope: u32) -> bool {
        !matches!(self.shape, Shape::Exact) && self.scope == scope
    }

    pub fn hosts(&self) -> &[Box<str>] {
        self.service_hosts.as_deref().unwrap_or(&self.route.value.hosts)
    }

    /// Why the request is not the rule's, apart from its path; `None`: it is. Cheap conditions first.
    pub fn refusal(&self, facts: &impl Facts) -> Option<Refused> {
        if !self.conditional {
            return None;
        }
        let route = &self.route.value;
        match () {
            () if !route.methods.allows(facts.method()) => Some(Refused::Methods),
            () if !remote_allowed(route, || facts.remote()) => Some(Refused::RemoteAddrs),
            () if !route.vars.as_ref().is_none_or(|vars| facts.vars(vars)) => Some(Refused::Vars),
            () if route.filter_func.is_some() && !facts.filter(&self.route) => Some(Refused::FilterFunc),
            () => None,
        }
    }

    /// The request is likely the rule's: what the proxy will look at first.
    pub fn prefetch(&self) {
        if !self.plain {
            prefetch::shared(&self.route);
        }
        if let Some(upstream) = &self.upstream {
            prefetch::shared(upstream);
        }
    }

    /// The index of the host pattern that `host` matches; for a rule that stands under no host but has some.
    pub fn host_matching(&self, host: &[u8]) -> Option<u32> {
        let matches = |pattern: &str| match pattern.strip_prefix('*') {
            Some(suffix) => host.ends_with(suffix.as_bytes()),
            None => host == pattern.as_bytes(),
        };
        self.hosts().iter().position(|p| matches(p)).map(|at| at as u32)
    }

    /// Whether `path`, whose fixed part is known to match, matches as a whole.
    pub fn captures(&self, path: &[u8]) -> Option<Captures> {
        match &self.shape {
            Shape::Exact | Shape::Prefix => Some(Captures::new()),
            Shape::Pattern(pattern) => pattern.captures(path.get(self.fixed.len()..)?),
        }
    }

    /// The name of a piece of the pattern.
    pub fn name(&self, piece: u32) -> &str {
        match &self.shape {
            Shape::Exact | Shape::Prefix => "",
            Shape::Pattern(pattern) => pattern.name(piece),
        }
    }

    /// Priority decides; then the longer uri, then who was there first.
    fn order(&self, other: &Rule) -> Ordering {
        let (a, b) = (&self.route, &other.route);
        (b.value.priority.cmp(&a.value.priority))
            .then_with(|| other.uri().len().cmp(&self.uri().len()))
            .then_with(|| a.create_revision.cmp(&b.create_revision))
            // Ids are mostly numbers: 2 comes before 10.
            .then_with(|| a.id.len().cmp(&b.id.len()))
            .then_with(|| a.id.cmp(&b.id))
            .then_with(|| (self.uri, self.host).cmp(&(other.uri, other.host)))
            .then_with(|| self.scope.cmp(&other.scope))
    }
}

/// A route needs more than path and host.
pub(super) fn is_conditional(route: &Route) -> bool {
    route.methods != Default::default()
        || !route.remote_addrs.is_empty()
        || route.vars.is_some()
        || route.filter_func.is_some()
}

/// A route that sends what it matches to its own upstream, with no service, plugin, function or setting of its own: serving it
/// needs nothing else of it, and with ten thousand routes what is not looked at need not come from memory.
pub(super) fn is_plain(route: &Route) -> bool {
    route.upstream.as_ref().is_some_and(|upstream| upstream.discovery.is_none())
        && route.upstream_id.is_none()
        && route.service_id.is_none()
        && route.plugin_config_id.is_none()
        && route.plugins.is_empty()
        && route.function_id.is_none()
        && route.script.is_none()
        && route.timeout.is_none()
}

fn remote_allowed(route: &Route, remote: impl FnOnce() -> IpAddr) -> bool {
    if route.remote_addrs.is_empty() {
        return true;
    }
    let remote = remote().to_canonical();
    route.remote_addrs.iter().any(|net| net.contains(&remote))
}

/// The rules that one place of the index leads to, in the order to try. Nearly always one.
#[derive(Clone)]
pub(super) enum Rules {
    One(Arc<Rule>),
    /// Persistent: ten thousand routes of one uri change as cheaply as two.
    Many(Arc<Vector<Arc<Rule>>>),
}

impl Rules {
    pub fn add_to(slot: &mut Option<Rules>, rule: Arc<Rule>) {
        match slot {
            None => *slot = Some(Rules::One(rule)),
            Some(rules) => rules.add(rule),
        }
    }

    pub fn add(&mut self, rule: Arc<Rule>) {
        if let Rules::One(first) = self {
            *self = Rules::Many(Arc::new(Vector::unit(first.clone())));
        }
        if let Rules::Many(list) = self {
            let list = Arc::make_mut(list);
            let at = list.binary_search_by(|r| r.order(&rule)).unwrap_or_else(|at| at);
            list.insert(at, rule);
        }
    }

    /// Takes out the rule that is equal to `rule` in order. Says whether that leaves none.
    pub fn remove(&mut self, rule: &Rule) -> bool {
        match self {
            Rules::One(only) => only.order(rule).is_eq(),
            Rules::Many(list) => {
                let Ok(at) = list.binary_search_by(|r| r.order(rule)) else { return false };
                let list = Arc::make_mut(list);
                list.remove(at);
                match (list.len(), list.front()) {
                    (1, Some(last)) => *self = Rules::One(last.clone()),
                    _ => return list.is_empty(),
                }
                false
            }
        }
    }

    /// Asks for the memory of the rule that is tried first, where that is known without a wait.
    pub fn prefetch(&self) {
        if let Rules::One(rule) = self {
            prefetch::shared(rule);
        }
    }

    pub fn find_map<'a, R>(&'a self, mut look: impl FnMut(&'a Arc<Rule>) -> Option<R>) -> Option<R> {
        match self {
            Rules::One(rule) => {
                prefetch::shared(rule);
                look(rule)
            }
            Rules::Many(list) => list.iter().find_map(look),
        }
    }
}
