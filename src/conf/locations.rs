//! `lua_locations` and its like: plain OpenResty locations, for people who bring Lua written for lua-nginx-module.
//!
//! A location holds what its block in nginx.conf held: `set`, `set_by_lua`, scripts by phase, `return`, `proxy_pass`,
//! `internal`, options by the names of nginx's directives. What the server level says holds for each location that does not
//! say it itself, as in nginx.

use std::{
    collections::{HashMap, HashSet},
    path::{Path, PathBuf},
    sync::Arc,
};

use ipnet::IpNet;
use pcre2::bytes::{Regex, RegexBuilder};
use serde_json::{Map, Value, json};

use super::{
    ciphers,
    directives::Directives,
    keys::at,
    outgoing::ErrorPage,
    upstreams::{self, Upstream},
};

/// Everything that config.yaml says beside routes and plugins about what Lua runs when.
#[derive(Clone, Debug, Default)]
pub struct Locations {
    pub list: Vec<Arc<Location>>,
    /// Where there are locations at all, what nginx does with every other path.
    pub rest: Option<Arc<Location>>,
    /// `rewrite` of the server: tried before a location is chosen.
    pub server_rewrites: Vec<Rewrite>,
    /// Run then, too.
    pub server_rewrite: Option<Arc<Script>>,
    pub init: Init,
    pub handshakes: Handshakes,
    /// `lua_upstreams`, by name.
    pub upstreams: Vec<Arc<Upstream>>,
    /// For `lua_package_path` and `lua_package_cpath`; `;;` stands for the default.
    pub package_path: String,
    pub package_cpath: String,
}

impl Locations {
    /// The scheme and the host that each `proxy_pass` names, as they stand there.
    pub fn proxied(&self) -> impl Iterator<Item = (&str, &str)> {
        self.list.iter().filter_map(|location| match &location.content {
            Content::Proxy(target) => target.origin(),
            _ => None,
        })
    }
}

/// What runs once per VM.
#[derive(Clone, Debug, Default)]
pub struct Init {
    pub init: Option<Arc<Script>>,
    pub init_worker: Option<Arc<Script>>,
    pub exit_worker: Option<Arc<Script>>,
}

/// What `lua_server` runs in the handshakes of all TLS listeners.
#[derive(Clone, Debug, Default)]
pub struct Handshakes {
    pub client_hello: Option<Arc<Script>>,
    pub certificate: Option<Arc<Script>>,
    pub session_fetch: Option<Arc<Script>>,
    pub session_store: Option<Arc<Script>>,
}

#[derive(Clone, Debug)]
pub struct Location {
    pub pattern: Pattern,
    /// That of `Pattern::Regex`.
    pub regex: Option<Regex>,
    /// For requests of the gateway's own making only: `ngx.exec`, subrequests.
    pub internal: bool,
    /// Variables and their values, which may hold `$variables`; in an order in which each comes after those it needs.
    pub set: Vec<(Box<str>, Template)>,
    pub set_by_lua: Vec<SetByLua>,
    pub rewrites: Vec<Rewrite>,
    /// `allow` and `deny`; the first that the client's address is in decides.
    pub rules: Vec<Rule>,
    pub rewrite: Option<Arc<Script>>,
    pub access: Option<Arc<Script>>,
    pub precontent: Option<Arc<Script>>,
    pub content: Content,
    pub header_filter: Option<Arc<Script>>,
    pub body_filter: Option<Arc<Script>>,
    pub log: Option<Arc<Script>>,
    pub directives: Directives,
    /// How scripts' sockets speak TLS; locations that say the same share it.
    pub socket_tls: Arc<SocketTls>,
    /// `root`: where nginx would look for files, `$document_root`.
    pub root: PathBuf,
    /// The variables that any location of the configuration sets: others than these are not for scripts to make.
    pub defined: Arc<HashSet<Box<str>>>,
    /// Where request bodies go that do not fit `client_body_buffer_size`.
    pub body_dir: PathBuf,
}

impl Location {
    /// The names of what it sets, by itself or as the captures of its patterns.
    fn variables(&self) -> impl Iterator<Item = Box<str>> {
        let captures = self.regex.iter().chain(self.rewrites.iter().map(|r| &r.regex)).flat_map(Regex::capture_names);
        let captures = captures.flatten().map(|name| name.to_ascii_lowercase().into());
        let set = self.set.iter().map(|(name, _)| name.clone());
        set.chain(self.set_by_lua.iter().map(|one| one.var.clone())).chain(captures)
    }
}

/// `lua_ssl_…`: texts in PEM, and what else is said.
#[derive(Debug, PartialEq, Eq)]
pub struct SocketTls {
    /// `lua_ssl_trusted_certificate`: whom certificates must chain to, where a script verifies.
    pub trusted: Option<Box<str>>,
    /// `lua_ssl_crl`
    pub crl: Option<Box<str>>,
    /// `lua_ssl_certificate` and `lua_ssl_certificate_key`: what is shown to servers that ask.
    pub pair: Option<(Box<str>, Box<str>)>,
    /// `lua_ssl_protocols`; empty: whatever there is.
    pub protocols: Vec<Box<str>>,
    /// `lua_ssl_ciphers`: suites of TLS 1.2 by their numbers, the best first. `None`: all.
    pub ciphers: Option<Vec<u16>>,
    /// `lua_ssl_verify_depth`: intermediates that may stand between a certificate and whom it is trusted for.
    pub depth: usize,
}

/// lua-nginx-module's.
const VERIFY_DEPTH: usize = 1;

/// `allow network` or `deny network`
#[derive(Clone, Debug)]
pub struct Rule {
    pub allow: bool,
    /// None for `all`.
    pub network: Option<IpNet>,
}

/// `rewrite regex replacement [flag]`
#[derive(Clone, Debug)]
pub struct Rewrite {
    pub regex: Regex,
    /// The replacement up to its `?`, and what follows that: a `?` in a capture is none.
    pub path: Template,
    pub args: Option<Template>,
    pub flag: Flag,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flag {
    /// Go on with the next one.
    None,
    /// Look for the location of the new path.
    Last,
    /// Stay, and look at no further ones.
    Break,
    /// Send the client there: 302 or 301.
    Redirect(u16),
}

/// How nginx writes which paths a location is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// `= /x`
    Exact(Box<str>),
    /// `/x`; with `^~` regular expressions are not asked.
    Prefix { prefix: Box<str>, last_word: bool },
    /// `~ re`, `~* re`
    Regex { text: Box<str>, ignore_case: bool },
    /// `@name`
    Named(Box<str>),
}

/// As it is written.
impl std::fmt::Display for Pattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Pattern::Exact(path) => write!(f, "= {path}"),
            Pattern::Prefix { prefix, last_word: true } => write!(f, "^~ {prefix}"),
            Pattern::Prefix { prefix, last_word: false } => f.write_str(prefix),
            Pattern::Regex { text, ignore_case: true } => write!(f, "~* {text}"),
            Pattern::Regex { text, ignore_case: false } => write!(f, "~ {text}"),
            Pattern::Named(name) => f.write_str(name),
        }
    }
}

/// `set_by_lua $var code args…`
#[derive(Clone, Debug)]
pub struct SetByLua {
    pub var: Box<str>,
    pub script: Arc<Script>,
    pub args: Vec<Template>,
}

/// What answers.
#[derive(Clone, Debug)]
pub enum Content {
    /// Nothing is said: nginx would look for a file, the gateway has none.
    Nothing,
    Lua(Arc<Script>),
    Return {
        status: u16,
        body: Template,
    },
    /// `http://host:port$uri`
    Proxy(Template),
}

/// A chunk of Lua and what it is called in messages.
#[derive(Debug)]
pub struct Script {
    pub source: Source,
    /// As Lua takes it: `=content_by_lua(nginx.conf:41)`, `@/path/of/a/file.lua`.
    pub name: Box<str>,
}

#[derive(Debug)]
pub enum Source {
    Inline(Box<str>),
    File(PathBuf),
    /// A file whose name holds variables.
    Varying(Template),
}

/// Text with `$variables`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Template(pub Vec<Piece>);

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    Text(Box<str>),
    Var(Box<str>),
}

/// Directives by name, words joined by a space; those that may stand several times hold a line for each.
#[derive(Clone, Debug, Default)]
pub(super) struct Options(HashMap<Box<str>, Vec<Box<str>>>);

impl Options {
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).and_then(|lines| lines.last()).map(|line| &**line)
    }

    pub fn all(&self, name: &str) -> &[Box<str>] {
        self.0.get(name).map_or(&[], |lines| lines)
    }

    pub(super) fn read(map: Option<&Map<String, Value>>, base: &Options) -> Options {
        let mut options = base.clone();
        for (name, value) in map.into_iter().flatten() {
            let lines = match value {
                Value::Array(lines) => lines.iter().map(words).collect(),
                one => vec![words(one)],
            };
            options.0.insert(name.as_str().into(), lines);
        }
        options
    }
}

fn words(value: &Value) -> Box<str> {
    match value {
        Value::Array(words) => words.iter().map(|w| text(w).into_owned()).collect::<Vec<_>>().join(" ").into(),
        one => text(one).into(),
    }
}

fn text(value: &Value) -> std::borrow::Cow<'_, str> {
    match value {
        Value::String(text) => text.into(),
        other => other.to_string().into(),
    }
}

impl Template {
    /// `$name`, `${name}`; a `$` that no name follows stands for itself.
    pub fn parse(text: &str) -> Template {
        let mut pieces = Vec::new();
        let mut rest = text;
        let mut literal = String::new();
        while let Some(at) = rest.find('$') {
            literal.push_str(&rest[..at]);
            let after = &rest[at + 1..];
            let braced = after.starts_with('{').then(|| after[1..].split_once('}')).flatten();
            let (name, left) = match braced {
                Some((name, left)) => (name, left),
                None => {
                    after.split_at(after.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(after.len()))
                }
            };
            rest = left;
            if name.is_empty() {
                literal.push('$');
                continue;
            }
            if !literal.is_empty() {
                pieces.push(Piece::Text(std::mem::take(&mut literal).into()));
            }
            // nginx's names know no case.
            pieces.push(Piece::Var(name.to_ascii_lowercase().into()));
        }
        literal.push_str(rest);
        if !literal.is_empty() {
            pieces.push(Piece::Text(literal.into()));
        }
        Template(pieces)
    }

    pub fn has_variables(&self) -> bool {
        self.0.iter().any(|piece| matches!(piece, Piece::Var(_)))
    }

    /// The scheme of a URL, and its host and port, where they are text and no variable: `http`, `backend` of `http://backend/$uri`.
    pub fn origin(&self) -> Option<(&str, &str)> {
        let [Piece::Text(text), more @ ..] = self.0.as_slice() else { return None };
        let (scheme, rest) = text.split_once("://")?;
        match rest.find(['/', '?']) {
            Some(end) => Some((scheme, &rest[..end])),
            // What follows may be part of it.
            None => Some((scheme, rest)).filter(|_| more.is_empty()),
        }
    }

    fn needs(&self, name: &str) -> bool {
        self.0.iter().any(|piece| matches!(piece, Piece::Var(var) if **var == *name))
    }
}

/// Tells of the `@names` that error pages go to and no location has.
fn unknown_pages(said: &[Value], list: &[Location], shared: &Directives, mistakes: &mut Vec<String>) {
    // Where a location could not be read, that is told already, and its name is not known.
    if said.len() != list.len() {
        return;
    }
    let known = |name: &str| list.iter().any(|l| matches!(&l.pattern, Pattern::Named(known) if **known == *name));
    let mut look = |path: &str, directives: &Directives| {
        for name in directives.error_page.iter().filter_map(ErrorPage::named).filter(|name| !known(name)) {
            mistakes.push(format!("{path}.error_page: no location is called {name}"));
        }
    };
    look("lua_options", shared);
    let own = |one: &Value| one.pointer("/options/error_page").is_some();
    for (i, (_, location)) in said.iter().zip(list).enumerate().filter(|(_, (one, _))| own(one)) {
        look(&format!("lua_locations[{i}].options"), &location.directives);
    }
}

/// `test_node.serve_on_node`: locations of the node's listeners that pass on to the Admin and the control API, where these are on.
fn node_apis(json: &Value) -> Vec<Value> {
    let wanted = at(json, "test_node.serve_on_node").and_then(Value::as_array);
    let place = |path: &str| {
        let port = at(json, &format!("{path}.port"))?;
        Some(format!("{}:{}", text(at(json, &format!("{path}.ip"))?).replace("0.0.0.0", "127.0.0.1"), text(port)))
    };
    let api = |name: &Value| {
        let (prefix, place) = match name.as_str()? {
            "admin" if super::serves_admin(json) => ("/apisix/admin", place("deployment.admin.admin_listen")?),
            "control" if at(json, "apisix.enable_control") == Some(&Value::Bool(true)) => {
                ("/v1/", place("apisix.control")?)
            }
            _ => return None,
        };
        let options = json!({
            "proxy_set_header": [["Host", "$http_host"]], "proxy_pass_header": "Server", "client_max_body_size": "0",
        });
        Some(json!({"location": format!("^~ {prefix}"), "proxy_pass": format!("http://{place}"), "options": options}))
    };
    wanted.into_iter().flatten().filter_map(api).collect()
}

/// Reads it all; mistakes are noted with their path.
pub(super) fn read(json: &Value, prefix: &Path, mistakes: &mut Vec<String>) -> Locations {
    let mut r = Reader { prefix, mistakes, socket_tls: Vec::new() };
    let server = at(json, "lua_server").and_then(Value::as_object).cloned().unwrap_or_default();
    let everywhere = at(json, "lua_options").and_then(Value::as_object);
    let options = Options::read(everywhere, &Options::default());
    // Told once, and not with each location that has them.
    let shared = Directives::read(&options, "lua_options", everywhere, r.mistakes);
    let said = at(json, "lua_locations").and_then(Value::as_array).map_or(&[][..], |list| list);
    let apis = node_apis(json);
    let list = said
        .iter()
        .enumerate()
        .filter_map(|(i, one)| r.location(&format!("lua_locations[{i}]"), one, &server, &options));
    let mut list: Vec<_> = list.collect();
    unknown_pages(said, &list, &shared, r.mistakes);
    list.extend(apis.iter().filter_map(|api| r.location("test_node.serve_on_node", api, &Map::new(), &options)));
    // What the server runs, it runs for every path.
    let everywhere = |l: &Location| matches!(&l.pattern, Pattern::Prefix { prefix, .. } if **prefix == *"/");
    let serves = PHASES.iter().any(|p| server.contains_key(*p) || server.contains_key(&format!("{p}_file")));
    if serves && !list.iter().any(everywhere) {
        let implied = json!({"location": "/"});
        list.extend(r.location("lua_server", &implied, &server, &options));
    }
    let implied = json!({"location": "/"});
    // A node with APISIX's own APIs on it has routes for the rest, and APISIX's 404.
    let mut rest = if list.is_empty() || !apis.is_empty() {
        None
    } else {
        r.location("lua_locations", &implied, &server, &options)
    };
    let defined: Arc<HashSet<_>> = Arc::new(list.iter().flat_map(Location::variables).collect());
    list.iter_mut().chain(&mut rest).for_each(|location| location.defined = defined.clone());
    let init = at(json, "lua_init").and_then(Value::as_object).cloned().unwrap_or_default();
    let mut wrong = Vec::new();
    let upstreams = upstreams::read(at(json, "lua_upstreams"), &mut wrong, |map| r.script(map, "balancer_by_lua"));
    r.mistakes.append(&mut wrong);
    let line = |key: &str| at(json, key).map(|v| text(v).into_owned()).unwrap_or_default();
    Locations {
        list: list.into_iter().map(Arc::new).collect(),
        rest: rest.map(Arc::new),
        server_rewrites: r.rewrites("lua_options", &options),
        server_rewrite: r.script(&server, "server_rewrite_by_lua"),
        init: Init {
            init: r.script(&init, "init_by_lua"),
            init_worker: r.script(&init, "init_worker_by_lua"),
            exit_worker: r.script(&init, "exit_worker_by_lua"),
        },
        handshakes: Handshakes {
            client_hello: r.script(&server, "ssl_client_hello_by_lua"),
            certificate: r.script(&server, "ssl_certificate_by_lua"),
            session_fetch: r.script(&server, "ssl_session_fetch_by_lua"),
            session_store: r.script(&server, "ssl_session_store_by_lua"),
        },
        upstreams,
        package_path: line("lua_package_path"),
        package_cpath: line("lua_package_cpath"),
    }
}

struct Reader<'a> {
    prefix: &'a Path,
    mistakes: &'a mut Vec<String>,
    /// All that differ: each comes to a configuration of the TLS library of its own.
    socket_tls: Vec<Arc<SocketTls>>,
}

impl Reader<'_> {
    fn location(
        &mut self,
        path: &str,
        value: &Value,
        server: &Map<String, Value>,
        options: &Options,
    ) -> Option<Location> {
        let Some(own) = value.as_object() else {
            self.mistakes.push(format!("{path}: is not a map with `location` and what belongs to it"));
            return None;
        };
        let Some(written) = own.get("location").and_then(Value::as_str) else {
            self.mistakes.push(format!("{path}.location: is missing; write what nginx would have, `/x` or `= /x`"));
            return None;
        };
        let compiled = pattern(written).and_then(|pattern| Ok((compile(&pattern)?, pattern)));
        let (regex, pattern) = match compiled {
            Ok(both) => both,
            Err(e) => {
                self.mistakes.push(format!("{path}.location: {e}"));
                return None;
            }
        };
        // What the server says and the location does not.
        let mut map = server.clone();
        map.remove("lines");
        for phase in PHASES {
            if own.contains_key(*phase) || own.contains_key(&format!("{phase}_file")) {
                map.remove(*phase);
                map.remove(&format!("{phase}_file"));
            }
        }
        let server_set = map.remove("set");
        map.extend(own.clone());
        let sets = [server_set.as_ref(), own.get("set")];
        let sets = sets.into_iter().flatten().filter_map(Value::as_object).flatten();
        let set = in_order(
            sets.map(|(name, value)| (name.to_ascii_lowercase().into(), Template::parse(&text(value)))).collect(),
        );
        let said = own.get("options").and_then(Value::as_object);
        let options = Options::read(said, options);
        let lua_sets = map.get("set_by_lua").and_then(Value::as_array).cloned().unwrap_or_default();
        Some(Location {
            pattern,
            regex,
            internal: map.get("internal").and_then(Value::as_bool).unwrap_or(false),
            set,
            set_by_lua: lua_sets.iter().enumerate().filter_map(|(i, s)| self.set_by_lua(path, i, s)).collect(),
            // Those of the server are not inherited: they have been tried before.
            rewrites: self.rewrites(&format!("{path}.options"), &Options::read(said, &Options::default())),
            rules: self.rules(path, &options),
            rewrite: self.script(&map, "rewrite_by_lua"),
            access: self.script(&map, "access_by_lua"),
            precontent: self.script(&map, "precontent_by_lua"),
            content: self.content(path, &map),
            header_filter: self.script(&map, "header_filter_by_lua"),
            body_filter: self.script(&map, "body_filter_by_lua"),
            log: self.script(&map, "log_by_lua"),
            root: self.prefix.join(options.get("root").unwrap_or("html")),
            defined: Arc::default(),
            body_dir: self.prefix.join("client_body_temp"),
            directives: Directives::read(&options, &format!("{path}.options"), said, self.mistakes),
            socket_tls: self.socket_tls(path, &options, said),
        })
    }

    /// `said`: those of `options` that the location says itself.
    fn socket_tls(&mut self, path: &str, options: &Options, said: Option<&Map<String, Value>>) -> Arc<SocketTls> {
        let mut mistake = |name: &str, e: String| {
            let own = said.is_some_and(|said| said.contains_key(name));
            let text = if own { format!("{path}.options.{name}: {e}") } else { format!("lua_options.{name}: {e}") };
            // What all locations inherit is told once.
            if !self.mistakes.contains(&text) {
                self.mistakes.push(text);
            }
        };
        let mut file = |name: &str| {
            let place = self.prefix.join("conf").join(options.get(name)?);
            let text = std::fs::read_to_string(&place).map_err(|e| format!("{}: {e}", place.display()));
            let text = text.and_then(|text| match text.contains("-----BEGIN ") {
                true => Ok(text),
                false => Err(format!("{} holds nothing in PEM", place.display())),
            });
            text.map_err(|e| mistake(name, e)).ok().map(Box::from)
        };
        let (trusted, crl) = (file("lua_ssl_trusted_certificate"), file("lua_ssl_crl"));
        let pair = (file("lua_ssl_certificate"), file("lua_ssl_certificate_key"));
        let protocols =
            options.get("lua_ssl_protocols").unwrap_or_default().split_whitespace().map(Box::from).collect();
        let ciphers = options.get("lua_ssl_ciphers").map(|list| {
            let read = ciphers::suites(list);
            read.map_err(|e| mistake("lua_ssl_ciphers", format!("{list:?} is not {e}"))).unwrap_or_default()
        });
        let depth = options.get("lua_ssl_verify_depth").map(|text| {
            let read = text.parse().map_err(|_| format!("{text:?} is not a number of certificates"));
            read.map_err(|e| mistake("lua_ssl_verify_depth", e)).unwrap_or_default()
        });
        let depth = depth.unwrap_or(VERIFY_DEPTH);
        let tls = SocketTls { trusted, crl, pair: pair.0.zip(pair.1), protocols, ciphers, depth };
        let known = self.socket_tls.iter().find(|known| ***known == tls).cloned();
        known.unwrap_or_else(|| {
            let new = Arc::new(tls);
            self.socket_tls.push(new.clone());
            new
        })
    }

    /// Options are a map, so the order in which nginx would read the two directives is not known. Of a list in which each line
    /// can have an effect at all, the narrowest network is the first to match: they are put in that order, `deny` first.
    fn rules(&mut self, path: &str, options: &Options) -> Vec<Rule> {
        let mut rules = Vec::new();
        for (directive, allow) in [("deny", false), ("allow", true)] {
            for line in options.all(directive) {
                match (&**line, super::typed::network(line)) {
                    ("all", _) => rules.push(Rule { allow, network: None }),
                    // No connection comes in over a Unix socket.
                    ("unix:", _) => {}
                    (_, Some(network)) => rules.push(Rule { allow, network: Some(network) }),
                    (other, None) => self.mistakes.push(format!(
                        "{path}.options.{directive}: {other:?} is no address; write `all`, an address or a network as 10.0.0.0/8"
                    )),
                }
            }
        }
        rules.sort_by_key(|rule| std::cmp::Reverse(rule.network.map(|network| network.prefix_len())));
        rules
    }

    fn rewrites(&mut self, path: &str, options: &Options) -> Vec<Rewrite> {
        let mut rewrites = Vec::new();
        for line in options.all("rewrite") {
            let mut words = line.split_whitespace();
            let (regex, replacement) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            let flag = match words.next() {
                Some("last") => Flag::Last,
                Some("break") => Flag::Break,
                Some("redirect") => Flag::Redirect(302),
                Some("permanent") => Flag::Redirect(301),
                _ if ["http://", "https://", "$scheme"].iter().any(|s| replacement.starts_with(s)) => {
                    Flag::Redirect(302)
                }
                _ => Flag::None,
            };
            match RegexBuilder::new().jit_if_available(true).build(regex) {
                Ok(regex) => {
                    let (path, args) = replacement.split_once('?').map_or((replacement, None), |(p, a)| (p, Some(a)));
                    let (path, args) = (Template::parse(path), args.map(Template::parse));
                    rewrites.push(Rewrite { regex, path, args, flag });
                }
                Err(e) => self.mistakes.push(format!("{path}.rewrite: {regex:?} is no regular expression: {e}")),
            }
        }
        rewrites
    }

    fn set_by_lua(&mut self, path: &str, i: usize, value: &Value) -> Option<SetByLua> {
        let var = value.get("var").and_then(Value::as_str);
        let file = value.get("file").and_then(Value::as_str);
        let inline = value.get("lua").and_then(Value::as_str);
        let script = match (file, inline) {
            (Some(file), _) => Some(self.file(file)),
            (None, Some(lua)) => Some(inline_script(lua, "=set_by_lua".into())),
            (None, None) => None,
        };
        let (Some(var), Some(script)) = (var, script) else {
            self.mistakes.push(format!("{path}.set_by_lua[{i}]: needs `var`, and `lua` or `file`"));
            return None;
        };
        let args = value.get("args").and_then(Value::as_array).into_iter().flatten();
        Some(SetByLua {
            var: var.to_ascii_lowercase().into(),
            script,
            args: args.map(|a| Template::parse(&text(a))).collect(),
        })
    }

    fn content(&mut self, path: &str, map: &Map<String, Value>) -> Content {
        if let Some(script) = self.script(map, "content_by_lua") {
            return Content::Lua(script);
        }
        if let Some(answer) = map.get("return") {
            let status = answer.get("status").and_then(Value::as_u64).filter(|s| (1..=999).contains(s));
            let Some(status) = status else {
                self.mistakes.push(format!("{path}.return.status: is not a status"));
                return Content::Nothing;
            };
            let body = answer.get("body").map(|b| Template::parse(&text(b))).unwrap_or_default();
            return Content::Return { status: status as u16, body };
        }
        match map.get("proxy_pass").and_then(Value::as_str) {
            Some(target) => Content::Proxy(Template::parse(target)),
            None => Content::Nothing,
        }
    }

    fn script(&self, map: &Map<String, Value>, phase: &str) -> Option<Arc<Script>> {
        if let Some(file) = map.get(&format!("{phase}_file")).and_then(Value::as_str) {
            return Some(self.file(file));
        }
        let source = map.get(phase).and_then(Value::as_str)?;
        let line = map.get("lines").and_then(|lines| lines.get(phase)).and_then(Value::as_u64);
        let name = line.map_or_else(|| format!("={phase}"), |line| format!("={phase}(nginx.conf:{line})"));
        Some(inline_script(source, name))
    }

    fn file(&self, file: &str) -> Arc<Script> {
        let template = Template::parse(file);
        if template.0.iter().any(|piece| matches!(piece, Piece::Var(_))) {
            return Arc::new(Script { name: format!("@{file}").into(), source: Source::Varying(template) });
        }
        let path = self.prefix.join(file);
        Arc::new(Script { name: format!("@{}", path.display()).into(), source: Source::File(path) })
    }
}

const PHASES: &[&str] = &[
    "rewrite_by_lua",
    "access_by_lua",
    "precontent_by_lua",
    "content_by_lua",
    "header_filter_by_lua",
    "body_filter_by_lua",
    "log_by_lua",
];

fn inline_script(source: &str, name: String) -> Arc<Script> {
    Arc::new(Script { source: Source::Inline(source.into()), name: name.into() })
}

fn pattern(written: &str) -> Result<Pattern, String> {
    let (mark, rest) =
        written.trim().split_once(char::is_whitespace).map_or(("", written.trim()), |(m, r)| (m, r.trim()));
    let mark_and_rest = match mark {
        "" => ["^~", "~*", "=", "~"].iter().find_map(|m| rest.strip_prefix(m).map(|r| (*m, r))).unwrap_or(("", rest)),
        _ => (mark, rest),
    };
    match mark_and_rest {
        ("=", path) => Ok(Pattern::Exact(path.into())),
        ("^~", prefix) => Ok(Pattern::Prefix { prefix: prefix.into(), last_word: true }),
        ("~", re) => Ok(Pattern::Regex { text: re.into(), ignore_case: false }),
        ("~*", re) => Ok(Pattern::Regex { text: re.into(), ignore_case: true }),
        ("", name) if name.starts_with('@') => Ok(Pattern::Named(name.into())),
        ("", prefix) => Ok(Pattern::Prefix { prefix: prefix.into(), last_word: false }),
        (mark, _) => Err(format!("{mark:?} is none of nginx's marks =, ^~, ~ and ~*")),
    }
}

fn compile(pattern: &Pattern) -> Result<Option<Regex>, String> {
    let Pattern::Regex { text, ignore_case } = pattern else { return Ok(None) };
    let regex = RegexBuilder::new().caseless(*ignore_case).jit_if_available(true).build(text);
    regex.map(Some).map_err(|e| format!("{text:?} is no regular expression: {e}"))
}

/// Values after those that they need; a circle stays as it is.
fn in_order(mut sets: Vec<(Box<str>, Template)>) -> Vec<(Box<str>, Template)> {
    let mut ordered = Vec::with_capacity(sets.len());
    while !sets.is_empty() {
        let names: Vec<_> = sets.iter().map(|(name, _)| name.clone()).collect();
        let free = sets.iter().position(|(own, value)| !names.iter().any(|name| name != own && value.needs(name)));
        ordered.push(sets.remove(free.unwrap_or(0)));
    }
    ordered
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read_all(json: Value) -> (Locations, Vec<String>) {
        let mut mistakes = Vec::new();
        (read(&json, Path::new("/p"), &mut mistakes), mistakes)
    }

    #[test]
    fn patterns_are_read_as_nginx_reads_them() {
        for (written, expected) in [
            ("= /t", Pattern::Exact("/t".into())),
            ("=/t", Pattern::Exact("/t".into())),
            ("/t", Pattern::Prefix { prefix: "/t".into(), last_word: false }),
            ("^~ /t", Pattern::Prefix { prefix: "/t".into(), last_word: true }),
            ("~ ^/a(.)$", Pattern::Regex { text: "^/a(.)$".into(), ignore_case: false }),
            ("~* /A", Pattern::Regex { text: "/A".into(), ignore_case: true }),
            ("@me", Pattern::Named("@me".into())),
        ] {
            assert_eq!(pattern(written), Ok(expected), "{written}");
        }
        assert!(pattern("! /x").unwrap_err().contains("marks"));
    }

    #[test]
    fn templates_find_their_variables() {
        let var = |name: &str| Piece::Var(name.into());
        let literal = |text: &str| Piece::Text(text.into());
        assert_eq!(Template::parse("a${b}c$d-$").0, [literal("a"), var("b"), literal("c"), var("d"), literal("-$")]);
        assert!(Template::parse("").0.is_empty());
        for (target, origin) in [
            ("http://b", Some(("http", "b"))),
            ("https://b:1/$uri", Some(("https", "b:1"))),
            ("http://b?$args", Some(("http", "b"))),
            ("http://b$uri", None),
            ("http://$b/", None),
            ("$all", None),
            ("b", None),
        ] {
            assert_eq!(Template::parse(target).origin(), origin, "{target}");
        }
    }

    #[test]
    fn a_location_has_what_the_server_says_unless_it_says_so_itself() {
        let (read, mistakes) = read_all(json!({
            "lua_server": {"rewrite_by_lua": "server", "log_by_lua": "log", "set": {"a": "1"}},
            "lua_options": {"default_type": "text/plain", "lua_need_request_body": "on"},
            "lua_locations": [{
                "location": "/t", "rewrite_by_lua_file": "conf/r.lua", "content_by_lua": "x()",
                "lines": {"content_by_lua": 41}, "set": {"b": "$c", "c": "$a"},
                "options": {"default_type": "text/html", "proxy_set_header": [["A", "b"], ["C", "d"]]},
            }],
        }));
        assert!(mistakes.is_empty(), "{mistakes:?}");
        let one = &read.list[0];
        assert_eq!(&*one.rewrite.as_ref().unwrap().name, "@/p/conf/r.lua");
        assert_eq!(&*one.log.as_ref().unwrap().name, "=log_by_lua");
        let Content::Lua(script) = &one.content else { panic!("no Lua") };
        assert_eq!(&*script.name, "=content_by_lua(nginx.conf:41)");
        assert_eq!(one.set.iter().map(|(name, _)| &**name).collect::<Vec<_>>(), ["a", "c", "b"]);
        assert_eq!(
            (one.directives.default_type.as_deref(), one.directives.lua_need_request_body),
            (Some("text/html"), true)
        );
        assert_eq!(one.directives.proxy_set_header.len(), 2);
    }

    #[test]
    fn a_mistake_is_told_once_and_where_it_was_written() {
        let (_, mistakes) = read_all(json!({
            "lua_options": {"lua_code_cache": "never", "proxy_read_timeout": "soon"},
            "lua_locations": [{"location": "/a", "options": {"proxy_read_timeout": "late"}}, {"location": "/b"}],
        }));
        assert_eq!(
            mistakes,
            [
                r#"lua_options.lua_code_cache: "never" is not on or off"#,
                r#"lua_options.proxy_read_timeout: "soon" is not a time as 60s or 100ms"#,
                r#"lua_locations[0].options.proxy_read_timeout: "late" is not a time as 60s or 100ms"#,
            ]
        );
    }

    #[test]
    fn every_mistake_is_told() {
        let (_, mistakes) = read_all(json!({"lua_locations": [
            1, {}, {"location": "! /x"}, {"location": "/y", "return": {}}, {"location": "/z", "set_by_lua": [{"var": "x"}]},
            {"location": "~ ("},
        ]}));
        assert_eq!(mistakes.len(), 6, "{mistakes:?}");
        assert!(mistakes[1].starts_with("lua_locations[1].location:"), "{mistakes:?}");
    }
}
