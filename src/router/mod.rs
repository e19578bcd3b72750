//! Finds the route of a request. Pure, immutable, incremental: a clone with a changed route shares all else.
//!
//! What is searched is a hash table of exact paths and of prefixes that end with a slash, and a radix tree of the other prefixes, per
//! host (`radixtree_host_uri`) or for all hosts.
//! An exact path wins over any prefix, a longer prefix over a shorter one, and priority decides among the routes of
//! one path. A route whose conditions refuse a request lets the next candidate try. With hosts in the index, an exact
//! host comes before a wildcard, the longer wildcard before the shorter one, and routes without a host come last.

mod depths;
mod index;
mod pattern;
mod prefetch;
mod radix;
mod rule;
pub mod streams;
#[cfg(test)]
mod tests;

use std::{cell::OnceCell, fmt, hash::BuildHasher, sync::Arc};

use hashbrown::DefaultHashBuilder;
use imbl::GenericHashMap;
use smallvec::SmallVec;

pub use self::streams::StreamRouter;
use self::{
    depths::{Depths, Slashes},
    index::Index,
    pattern::{Captures, Shape},
    radix::Radix,
    rule::{Rule, Rules},
};
use crate::{
    expr::Expr,
    model::{Id, Object, Route, Upstream},
};

/// `apisix.router.http`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RouterKind {
    #[default]
    RadixtreeHostUri,
    RadixtreeUri,
    RadixtreeUriWithParameter,
}

/// What the router asks of a request. `vars` and `filter` are called only for routes that need them.
pub trait Facts {
    /// Lower case, without port.
    fn host(&self) -> &[u8];
    fn path(&self) -> &[u8];
    fn method(&self) -> &[u8];
    fn remote(&self) -> std::net::IpAddr;
    /// A variable's value, for `vars`.
    fn var(&self, name: &str) -> Option<std::borrow::Cow<'_, [u8]>>;
    /// Whether the route's `vars` hold.
    fn vars(&self, vars: &Expr) -> bool {
        vars.eval(&mut |name| self.var(name))
    }
    /// Runs the route's `filter_func`.
    fn filter(&self, route: &Arc<Object<Route>>) -> bool;
    /// A route was looked at, whose uri begins as the path does, and what of it the request does not fulfil. For those who explain.
    fn looked_at(&self, _route: &Arc<Object<Route>>, _uri: &str, _refused: Option<Refused>) {}
}

/// What of a route a request does not fulfil.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    Host,
    Uri,
    Methods,
    RemoteAddrs,
    Vars,
    FilterFunc,
}

impl Refused {
    /// The field of the route.
    pub fn name(self) -> &'static str {
        match self {
            Refused::Host => "host",
            Refused::Uri => "uri",
            Refused::Methods => "methods",
            Refused::RemoteAddrs => "remote_addrs",
            Refused::Vars => "vars",
            Refused::FilterFunc => "filter_func",
        }
    }
}

/// A match. Cheap to make and to keep: a reference count, and the captures when the uri has parameters.
#[derive(Clone)]
pub struct Found {
    rule: Arc<Rule>,
    host: Option<u32>,
    captures: Captures,
}

impl Found {
    pub fn route(&self) -> &Arc<Object<Route>> {
        &self.rule.route
    }

    /// The upstream of a route that has nothing else: no service, plugin, function or timeout of its own.
    pub fn plain_upstream(&self) -> Option<&Arc<Upstream>> {
        self.rule.upstream.as_ref().filter(|_| self.rule.plain)
    }

    /// It will be dropped soon: asks for what that touches.
    pub fn expect_drop(&self) {
        prefetch::counts(&self.rule);
    }

    /// The route's uri that matched, as written: `curr_req_matched._path`.
    pub fn path_pattern(&self) -> &str {
        self.rule.uri()
    }

    /// `:name` and `*name` captures: names and values.
    pub fn params(&self) -> impl ExactSizeIterator<Item = (&str, &[u8])> {
        self.captures.iter().map(|(piece, value)| (self.rule.name(*piece), &value[..]))
    }

    /// The host that matched, in lower case: `curr_req_matched._host`.
    pub fn host_pattern(&self) -> Option<&str> {
        self.host.map(|at| &*self.rule.hosts()[at as usize])
    }
}

impl fmt::Debug for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "route {} by {:?} {}", self.route().id, self.host_pattern(), self.path_pattern())
    }
}

type Map<K, V, S> = GenericHashMap<K, V, S, imbl::shared_ptr::DefaultSharedPtr>;

#[derive(Clone, Default)]
pub struct Router {
    pub kind: RouterKind,
    /// Rules of exact paths and of folders.
    hashed: Index,
    hash: DefaultHashBuilder,
    /// Rules without a host, and all rules when the kind does not index hosts.
    any: Scope,
    hosts: Map<Arc<[u8]>, Arc<Scope>, DefaultHashBuilder>,
    /// By what follows the star, last byte first: `*.foo.com` is `moc.oof.`.
    wildcards: Radix<Arc<Scope>>,
    /// Grows with each scope; 0 is `any`.
    last_scope: u32,
    placed: Map<Id, Placed, DefaultHashBuilder>,
}

/// What belongs to one host.
#[derive(Clone, Default)]
struct Scope {
    number: u32,
    /// How many rules there are, exact ones included.
    rules: usize,
    /// Of the rules of exact paths, and of folders.
    exact: Depths,
    folders: Depths,
    /// Those that are no folders.
    prefixes: Radix<Rules>,
}

/// The part of the index that holds a rule.
#[derive(Clone, Copy)]
enum Part {
    /// With its depth.
    Exact(usize),
    Folder(usize),
    Tree,
}

/// How a route went in, so that it can be taken out again.
#[derive(Clone)]
struct Placed {
    route: Arc<Object<Route>>,
    service_hosts: Option<Arc<[Box<str>]>>,
}

/// Where a rule goes.
enum Place<'a> {
    Any,
    Host(&'a str),
    Wildcard(&'a str),
}

/// A request's path, and what of it a lookup may need more than once.
struct Path<'a> {
    bytes: &'a [u8],
    hash: OnceCell<u64>,
    slashes: OnceCell<Slashes>,
}

impl Path<'_> {
    fn slashes(&self) -> &Slashes {
        self.slashes.get_or_init(|| Slashes::of(self.bytes))
    }
}

/// Fewer rules than this stay in a cache, and asking for them costs more than they would.
const MANY: usize = 1000;

/// Candidates on the way down a tree; few paths have more prefixes than this.
type Chain<T> = SmallVec<[T; 16]>;

impl Router {
    pub fn new(kind: RouterKind) -> Self {
        Router { kind, ..Self::default() }
    }

    /// How many routes can be found.
    pub fn len(&self) -> usize {
        self.placed.len()
    }

    pub fn is_empty(&self) -> bool {
        self.placed.is_empty()
    }

    /// Puts a route in, in place of the one of that id. `service_hosts` are those of its service, if it has one: a route
    /// without hosts takes them.
    pub fn insert(&mut self, route: Arc<Object<Route>>, service_hosts: &[Box<str>]) {
        self.remove(&route.id);
        if !route.value.enabled {
            return;
        }
        let inherits = route.value.hosts.is_empty() && !service_hosts.is_empty();
        let service_hosts = inherits.then(|| service_hosts.iter().map(|h| h.to_ascii_lowercase().into()).collect());
        let placed = Placed { route, service_hosts };
        for rule in self.rules_of(&placed) {
            self.add(rule);
        }
        self.placed.insert(placed.route.id.clone(), placed);
    }

    /// Takes a route out; says whether there was one.
    pub fn remove(&mut self, id: &str) -> bool {
        let Some(placed) = self.placed.remove(id) else { return false };
        for rule in self.rules_of(&placed) {
            self.take_out(rule);
        }
        true
    }

    /// A request for `path` is being read: asks for the memory with which its lookup starts. A path that is not
    /// decoded yet does: this only saves time.
    pub fn expect<'a>(&self, path: impl FnOnce() -> &'a [u8]) {
        if self.hashed.len() >= MANY {
            self.ahead(&self.any, path(), |key| self.hashed.prefetch(key));
        }
    }

    /// A lookup is near: asks for the memory of the rule that it is likely to end at.
    pub fn expect_soon(&self, host: &[u8], path: &[u8]) {
        if self.hashed.len() < MANY {
            return;
        }
        let scope = self.hosts.get(host).map_or(&self.any, |scope| scope);
        self.ahead(scope, path, |key| {
            if let Some(rules) = self.hashed.get(key) {
                rules.prefetch();
            }
        });
    }

    /// Names the keys that a lookup tries first.
    fn ahead(&self, scope: &Scope, path: &[u8], key: impl Fn(u64)) {
        let slashes = Slashes::of(path);
        if scope.exact.have(&slashes) {
            key(scope.key(self.hash.hash_one(path)));
        }
        if let Some(end) = scope.folders.folders(&slashes).next() {
            key(scope.folder_key(self.hash.hash_one(&path[..end])));
        }
    }

    pub fn find(&self, facts: &impl Facts) -> Option<Found> {
        let path = &Path { bytes: facts.path(), hash: OnceCell::new(), slashes: OnceCell::new() };
        if self.kind == RouterKind::RadixtreeHostUri
            && let Some(found) = self.find_by_host(path, facts)
        {
            return Some(found);
        }
        self.find_in(&self.any, path, facts)
    }

    fn find_by_host(&self, path: &Path, facts: &impl Facts) -> Option<Found> {
        let host = facts.host();
        if let Some(scope) = self.hosts.get(host)
            && let Some(found) = self.find_in(scope, path, facts)
        {
            return Some(found);
        }
        if self.wildcards.is_empty() {
            return None;
        }
        let reversed: SmallVec<[u8; 64]> = host.iter().rev().copied().collect();
        let mut scopes = Chain::new();
        self.wildcards.visit_prefixes(&reversed, |_, scope| scopes.push(scope));
        scopes.iter().rev().find_map(|scope| self.find_in(scope, path, facts))
    }

    fn find_in(&self, scope: &Scope, path: &Path, facts: &impl Facts) -> Option<Found> {
        if scope.rules == 0 {
            return None;
        }
        let only_exact = scope.folders.is_empty() && scope.prefixes.is_empty();
        if (only_exact || scope.exact.have(path.slashes()))
            && let Some(found) = self.find_exact(scope, path, facts)
        {
            return Some(found);
        }
        match scope.prefixes.is_empty() {
            _ if only_exact => None,
            true => scope.folders.folders(path.slashes()).find_map(|end| self.find_folder(scope, end, path, facts)),
            false => self.find_prefix(scope, path, facts),
        }
    }

    fn find_exact(&self, scope: &Scope, path: &Path, facts: &impl Facts) -> Option<Found> {
        let hash = *path.hash.get_or_init(|| self.hash.hash_one(path.bytes));
        self.hashed.get(scope.key(hash))?.find_map(|rule| match rule.is_exact_in(scope.number) {
            true if rule.fixed[..] == *path.bytes => accept(rule, path, facts),
            _ => None,
        })
    }

    /// Among the rules of the folder that is the path's first `end` bytes.
    fn find_folder(&self, scope: &Scope, end: usize, path: &Path, facts: &impl Facts) -> Option<Found> {
        let folder = &path.bytes[..end];
        let hash = self.hash.hash_one(folder);
        self.hashed.get(scope.folder_key(hash))?.find_map(|rule| match rule.is_folder_in(scope.number) {
            true if rule.fixed[..] == *folder => accept(rule, path, facts),
            _ => None,
        })
    }

    /// Folders and other prefixes of a path, from the longest to the shortest.
    fn find_prefix(&self, scope: &Scope, path: &Path, facts: &impl Facts) -> Option<Found> {
        let mut others = Chain::new();
        scope.prefixes.visit_prefixes(path.bytes, |length, rules| others.push((length, rules)));
        let mut folders = scope.folders.folders(path.slashes()).peekable();
        loop {
            let found = match (others.last().copied(), folders.peek().copied()) {
                (Some((length, rules)), folder) if folder.is_none_or(|end| length > end) => {
                    others.pop();
                    rules.find_map(|rule| accept(rule, path, facts))
                }
                (_, Some(end)) => {
                    folders.next();
                    self.find_folder(scope, end, path, facts)
                }
                _ => return None,
            };
            if found.is_some() {
                return found;
            }
        }
    }

    fn rules_of(&self, placed: &Placed) -> SmallVec<[Rule; 1]> {
        let route = &placed.route.value;
        let hosts = placed.service_hosts.as_ref().map_or(route.hosts.len(), |hosts| hosts.len()) as u32;
        let by_host = self.kind == RouterKind::RadixtreeHostUri && hosts > 0;
        let (conditional, plain) = (rule::is_conditional(route), rule::is_plain(route));
        let mut rules = SmallVec::new();
        for (at, uri) in route.uris.iter().enumerate() {
            let rule = |host: Option<u32>| {
                let (shape, fixed) = Shape::of(uri, self.kind == RouterKind::RadixtreeUriWithParameter);
                Rule {
                    route: placed.route.clone(),
                    upstream: route.upstream.clone(),
                    service_hosts: placed.service_hosts.clone(),
                    uri: at as u32,
                    host,
                    scope: 0,
                    conditional,
                    plain,
                    checks_host: hosts > 0 && !by_host,
                    shape,
                    fixed: SmallVec::from_slice(fixed.as_bytes()),
                }
            };
            match by_host {
                true => rules.extend((0..hosts).map(|host| rule(Some(host)))),
                false => rules.push(rule(None)),
            }
        }
        rules
    }

    fn add(&mut self, mut rule: Rule) {
        let scope = match place(&rule) {
            Place::Any => &mut self.any,
            Place::Host(host) => {
                let scope = self.hosts.entry(host.as_bytes().into()).or_default();
                numbered(scope, &mut self.last_scope)
            }
            Place::Wildcard(suffix) => {
                let key: SmallVec<[u8; 64]> = suffix.bytes().rev().collect();
                numbered(self.wildcards.slot(&key).get_or_insert_default(), &mut self.last_scope)
            }
        };
        rule.scope = scope.number;
        scope.rules += 1;
        let hash = self.hash.hash_one(&rule.fixed[..]);
        let key = match rule.part() {
            Part::Exact(depth) => {
                scope.exact.add(depth);
                scope.key(hash)
            }
            Part::Folder(depth) => {
                scope.folders.add(depth);
                scope.folder_key(hash)
            }
            Part::Tree => return Rules::add_to(scope.prefixes.slot(&rule.fixed), Arc::new(rule)),
        };
        self.hashed.add(key, Arc::new(rule));
    }

    /// The reverse of `add`. A scope that this leaves empty goes.
    fn take_out(&mut self, mut rule: Rule) {
        let hash = self.hash.hash_one(&rule.fixed[..]);
        let key = match place(&rule) {
            Place::Any => self.any.take_out(&mut rule, hash),
            Place::Host(host) => {
                let host: SmallVec<[u8; 64]> = host.bytes().collect();
                let Some(scope) = self.hosts.get_mut(&host[..]) else { return };
                let scope = Arc::make_mut(scope);
                let key = scope.take_out(&mut rule, hash);
                if scope.rules == 0 {
                    self.hosts.remove(&host[..]);
                }
                key
            }
            Place::Wildcard(suffix) => {
                let name: SmallVec<[u8; 64]> = suffix.bytes().rev().collect();
                let mut key = None;
                self.wildcards.change(&name, |slot| {
                    let Some(scope) = slot.as_mut().map(Arc::make_mut) else { return };
                    key = scope.take_out(&mut rule, hash);
                    if scope.rules == 0 {
                        *slot = None;
                    }
                });
                key
            }
        };
        if let Some(key) = key {
            self.hashed.remove(key, &rule);
        }
    }
}

/// The rest of a rule's conditions, its place in the index apart.
fn accept(rule: &Arc<Rule>, path: &Path, facts: &impl Facts) -> Option<Found> {
    rule.prefetch();
    let accepted = fits(rule, path, facts);
    facts.looked_at(&rule.route, rule.uri(), accepted.as_ref().err().copied());
    accepted.ok()
}

#[inline(always)]
fn fits(rule: &Arc<Rule>, path: &Path, facts: &impl Facts) -> Result<Found, Refused> {
    let host = match rule.checks_host {
        true => Some(rule.host_matching(facts.host()).ok_or(Refused::Host)?),
        false => rule.host,
    };
    let captures = rule.captures(path.bytes).ok_or(Refused::Uri)?;
    match rule.refusal(facts) {
        None => Ok(Found { rule: rule.clone(), host, captures }),
        Some(refused) => Err(refused),
    }
}

impl Scope {
    /// Spreads one path's hash over the scopes that have the path.
    fn key(&self, path_hash: u64) -> u64 {
        path_hash ^ u64::from(self.number).wrapping_mul(0x9E37_79B9_7F4A_7C15)
    }

    /// An exact path and a folder may be spelled alike.
    fn folder_key(&self, path_hash: u64) -> u64 {
        self.key(path_hash).rotate_left(32)
    }

    /// Takes a rule out; the key under which the map has it, if that is where it stands.
    fn take_out(&mut self, rule: &mut Rule, hash: u64) -> Option<u64> {
        rule.scope = self.number;
        self.rules -= 1;
        match rule.part() {
            Part::Exact(depth) => {
                self.exact.remove(depth);
                Some(self.key(hash))
            }
            Part::Folder(depth) => {
                self.folders.remove(depth);
                Some(self.folder_key(hash))
            }
            Part::Tree => {
                self.prefixes.change(&rule.fixed, |slot| {
                    if slot.as_mut().is_some_and(|rules| rules.remove(rule)) {
                        *slot = None;
                    }
                });
                None
            }
        }
    }
}

fn place(rule: &Rule) -> Place<'_> {
    match rule.host {
        None => Place::Any,
        Some(at) => {
            let host = &*rule.hosts()[at as usize];
            host.strip_prefix('*').map_or(Place::Host(host), Place::Wildcard)
        }
    }
}

/// Gives a scope that was just made its number.
fn numbered<'a>(scope: &'a mut Arc<Scope>, last: &mut u32) -> &'a mut Scope {
    let scope = Arc::make_mut(scope);
    if scope.number == 0 {
        *last += 1;
        scope.number = *last;
    }
    scope
}
