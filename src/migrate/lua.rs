//! Lua text read without running it: which modules it needs, which variables, which functions that are not there.
//!
//! A reader of words, not of programs: a name that a file gives to two things is not followed, and what is put together when
//! the program runs is not seen.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    path::Path,
};

use super::{
    report::{
        Report,
        Verdict::{self, Cannot, Change, Note},
    },
    sources::{MAX_LUA, Sources, read},
    variables,
};
use crate::plugin::Checker;

/// Different findings of one text; a file that has more is not made for this gateway anyway.
const MAX_OF_TEXT: usize = 200;

/// Members that are there and do not do what OpenResty's and APISIX's do: module, member, verdict, what to do.
const LIMITED: &[(&str, &str, Verdict, &str)] = &[
    ("ngx.ssl", "get_server_random", Cannot, "the TLS library is not OpenSSL: it answers nil and why"),
    ("ngx.ssl", "get_session_master_key", Cannot, "the TLS library is not OpenSSL: it answers nil and why"),
    ("ngx.ssl", "get_req_ssl_pointer", Cannot, "the TLS library is not OpenSSL: it answers nil and why"),
    ("ngx.ssl", "get_upstream_ssl_pointer", Cannot, "the TLS library is not OpenSSL: it answers nil and why"),
    ("ngx.process", "enable_privileged_agent", Change, "there is none: use the worker whose ngx.worker.id() is 0"),
    ("resty.core.base", "get_request", Cannot, "there is no request of nginx's to point to: use ngx.* and ngx.var"),
    ("ndk", "set_var.set_encrypt_session", Change, "use resty.aes"),
    ("ndk", "set_var.set_decrypt_session", Change, "use resty.aes"),
    (
        "apisix.balancer",
        "run",
        Change,
        "it raises: the gateway balances by itself; choose an upstream in rewrite or access",
    ),
    (
        "apisix.router",
        "router_http.match",
        Change,
        "it raises: ctx.matched_route is the route that the gateway has found",
    ),
    (
        "apisix.ssl.router.radixtree_sni",
        "match_and_set",
        Change,
        "it raises: the gateway picks certificates; ngx.ssl.set_cert in lua_server.ssl_certificate_by_lua takes another",
    ),
];

/// Members of `ngx` that only a script of `lua_locations` may call, and what a plugin does in their place.
const OF_LOCATIONS: &[(&str, &str)] = &[
    ("location.capture", "ask the other server with resty.http"),
    ("location.capture_multi", "ask the other servers with resty.http, each in a thread of ngx.thread.spawn"),
    ("exec", "set another path with ngx.req.set_uri or core.request, or answer with a code and a body"),
];

const PICK: &str = "have a plugin pick: apisix.upstream.set in access, or ctx.picked_server in before_proxy";
const NO_STREAMS: &str = "no script runs for TCP and UDP: docs/stream.md";

/// Functions of APISIX's that the gateway never calls: one put in their place runs for nobody. Module, member, what to do; a name that
/// ends in `_` stands for all that begin so.
const REPLACED: &[(&str, &str, &str)] = &[
    ("apisix", "http_ssl_", "write a script of lua_server: docs/locations.md"),
    ("apisix", "http_balancer_phase", PICK),
    ("apisix", "http_admin", "write a plugin with api()"),
    ("apisix", "http_control", "write a plugin with control_api()"),
    ("apisix", "stream_preread_phase", NO_STREAMS),
    ("apisix", "stream_balancer_phase", NO_STREAMS),
    ("apisix", "stream_log_phase", NO_STREAMS),
    (
        "apisix.plugin",
        "run_",
        "write a plugin, of a priority that comes before or after the others, or _meta.pre_function",
    ),
    (
        "apisix.plugin",
        "filter",
        "write a plugin that a global rule runs; _meta.filter says for which requests one runs",
    ),
    ("apisix.plugin", "merge_", "the gateway merges plugins by itself: configure what is to run"),
    ("apisix.upstream", "set_by_route", "write a plugin that calls apisix.upstream.set in access"),
    ("apisix.balancer", "run", PICK),
    ("apisix.balancer", "pick_server", PICK),
    ("apisix.router", "router_http", "write routes: the gateway matches them by itself"),
    ("apisix.ssl.router.radixtree_sni", "match_and_set", "write a script of lua_server.ssl_certificate_by_lua"),
];

/// Of `ngx`: tables that a request or the configuration fills, and values that only a request has.
const NOT_MEMBERS: [&str; 8] = ["shared", "ctx", "header", "arg", "status", "is_subrequest", "headers_sent", "var"];

/// Scripts that are scanned one after another, and what they need together.
pub(super) struct Scripts<'a> {
    checker: &'a Checker,
    sources: &'a Sources,
    /// Names of the dictionaries that the configuration declares.
    dicts: BTreeSet<String>,
    /// Variables that some script or the configuration gives a value.
    pub defined: BTreeSet<String>,
    /// Variables that are read and that nothing knows, with the first place of each.
    read: BTreeMap<String, (String, usize)>,
    members: HashMap<(String, String), bool>,
    /// Files that are told as plugins that do not load: why they do not compile is told there.
    broken: BTreeSet<String>,
    modules: BTreeMap<String, Origin>,
    texts: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Origin {
    Ours,
    Beside,
    /// In a file of this machine that no `--lua-path` names.
    Elsewhere(String),
    Missing,
}

impl<'a> Scripts<'a> {
    pub fn new(
        checker: &'a Checker,
        sources: &'a Sources,
        (dicts, defined): (BTreeSet<String>, BTreeSet<String>),
        broken: BTreeSet<String>,
    ) -> Scripts<'a> {
        let (read, members, modules) = Default::default();
        Scripts { checker, sources, dicts, defined, read, members, broken, modules, texts: 0 }
    }

    /// Scans every file; one that cannot be read or compiled is told, and the rest goes on.
    pub fn files(&mut self, report: &mut Report) {
        let sources = self.sources;
        let mut replaced = 0;
        for (path, module) in &sources.files {
            if self.is_replaced(module) {
                replaced += 1;
                continue;
            }
            let shown = path.display().to_string();
            match read(path, MAX_LUA) {
                Err(e) => report.add(Change, "lua", shown, e, "it was not looked at"),
                Ok(bytes) if bytes.starts_with(b"\x1bLJ") => {
                    report.add(Change, "lua", shown, "is bytecode, which is not loaded", "give its text");
                }
                Ok(bytes) => {
                    let runs = if module.starts_with("apisix.plugins.") { Runs::ForRoutes } else { Runs::Wherever };
                    self.scan(&shown, &String::from_utf8_lossy(&bytes), runs, report);
                }
            }
        }
        if replaced > 0 {
            let what = format!("{replaced} files are a copy of lua-resty-core, which speaks to nginx's insides");
            report.add(Note, "lua", "ngx.*, resty.core", what, "the gateway's own modules are loaded in their place");
        }
    }

    /// Modules of OpenResty's that are the gateway's whatever the path says.
    fn is_replaced(&self, module: &str) -> bool {
        let theirs = module.starts_with("ngx.") || module == "resty.core" || module.starts_with("resty.core.");
        theirs && self.checker.find_module(module).is_some_and(|place| is_ours(&place))
    }

    /// Scans the text of an object. `place`: the object and the field that hold it.
    pub fn text(&mut self, place: &str, text: &str, report: &mut Report) {
        self.scan(place, text, Runs::ForRoutes, report);
    }

    /// `place` is its file, or the object and field that hold it.
    fn scan(&mut self, place: &str, text: &str, runs: Runs, report: &mut Report) {
        self.texts += 1;
        if let Err(e) = self.checker.compile_function("text", text)
            && !self.broken.contains(place)
        {
            let why = e.strip_prefix("functions/text.lua:").unwrap_or(&e);
            report.add(Change, "lua", place, format!("does not compile: line {why}"), "repair it");
        }
        let tokens = tokens(text);
        let names = Names::of(&tokens);
        let mut found: BTreeMap<(String, String), (Verdict, usize, usize)> = BTreeMap::new();
        let mut left = 0;
        let mut tell = |verdict, line, what: String, advice: String| {
            let key = (what, advice);
            if found.len() < MAX_OF_TEXT || found.contains_key(&key) {
                found.entry(key).or_insert((verdict, line, 0)).2 += 1;
            } else {
                left += 1;
            }
        };
        for (at, module, optional) in requires(&tokens) {
            self.module(module, optional, tokens[at].line, &mut tell);
        }
        for used in uses(&tokens, &names) {
            self.used((place, runs), &used, &mut tell);
        }
        if left > 0 {
            let what = format!("has {left} more of these; the first {MAX_OF_TEXT} different ones are told");
            report.add(Change, "lua", place, what, "");
        }
        let mut found: Vec<_> = found.into_iter().collect();
        found.sort_by_key(|(_, (_, line, _))| *line);
        for ((what, advice), (verdict, line, times)) in found {
            let times = if times > 1 { format!(" ({times} times)") } else { String::new() };
            report.add(verdict, "lua", format!("{place}:{line}"), format!("{what}{times}"), advice);
        }
    }

    fn origin(&mut self, module: &str) -> Origin {
        if let Some(known) = self.modules.get(module) {
            return known.clone();
        }
        let own = self.sources.modules.contains(module) && !self.is_replaced(module);
        let origin = match self.checker.find_module(module) {
            _ if own => Origin::Beside,
            Some(place) if is_ours(&place) => Origin::Ours,
            Some(file) => Origin::Elsewhere(file),
            None => Origin::Missing,
        };
        self.modules.insert(module.to_owned(), origin.clone());
        origin
    }

    fn module(
        &mut self,
        module: &str,
        optional: bool,
        line: usize,
        tell: &mut impl FnMut(Verdict, usize, String, String),
    ) {
        match self.origin(module) {
            Origin::Ours | Origin::Beside => {}
            Origin::Elsewhere(file) => {
                let advice = "see that the gateway's machine has it, and that its path is in apisix.extra_lua_path";
                tell(Note, line, format!("needs {module}, which is at {file}"), advice.to_owned());
            }
            Origin::Missing => {
                let theirs = ["apisix.", "ngx.", "resty.core."].iter().any(|start| module.starts_with(start));
                let (verdict, advice) = match (optional, theirs) {
                    (true, _) => (Note, "the script asks whether it is there"),
                    (_, true) => (Cannot, "it is part of APISIX or OpenResty and not here: do without it"),
                    _ => (Change, "put the library beside the plugin, where apisix.extra_lua_path finds it"),
                };
                tell(verdict, line, format!("needs the module {module}, which is missing"), advice.to_owned());
            }
        }
    }

    fn used(&mut self, (place, runs): (&str, Runs), used: &Use, tell: &mut impl FnMut(Verdict, usize, String, String)) {
        let path: Vec<&str> = used.path.iter().map(String::as_str).collect();
        match (used.root.as_str(), path.as_slice()) {
            ("_G", ["ngx" | "ctx" | "api_ctx", "var", name, ..]) => self.variable(place, name, used),
            ("_G", ["ngx", "shared", name, ..]) if !self.dicts.contains(*name) => {
                let advice = "declare it: nginx_config.http.custom_lua_shared_dict";
                tell(Change, used.line, format!("ngx.shared.{name} is not declared"), advice.to_owned());
            }
            ("_G", ["ngx", first, ..]) if NOT_MEMBERS.contains(first) => {}
            ("_G", ["ngx", rest @ ..]) if of_locations(rest).is_some() => {
                let (member, advice) = of_locations(rest).unwrap_or_default();
                let (verdict, what) = match runs {
                    Runs::ForRoutes => (Change, "raises in plugins: no location serves their requests"),
                    Runs::Wherever => (Note, "raises in plugins, and works in lua_locations"),
                };
                tell(verdict, used.line, format!("ngx.{member} {what}"), advice.to_owned());
            }
            ("_G", ["ngx" | "ndk", ..]) if path.len() > 1 => self.member("_G", &path, used, tell),
            ("ffi", ["C", symbol, ..]) if symbol.starts_with("ngx_") => {
                let advice = "there is no nginx whose functions could be called: use what ngx.* and resty.* offer";
                tell(Cannot, used.line, format!("ffi.C.{symbol} is a function of nginx's insides"), advice.to_owned());
            }
            ("_G" | "ffi", _) => {}
            (module, path) if !path.is_empty() => {
                let module = module.to_owned();
                if self.origin(&module) == Origin::Ours || module == "resty.core.base" {
                    self.member(&module, path, used, tell);
                }
            }
            _ => {}
        }
    }

    fn variable(&mut self, place: &str, name: &str, used: &Use) {
        if used.written {
            self.defined.insert(name.to_owned());
        } else if !variables::is_known(name) && !self.read.contains_key(name) {
            self.read.insert(name.to_owned(), (place.to_owned(), used.line));
        }
    }

    fn member(
        &mut self,
        module: &str,
        path: &[&str],
        used: &Use,
        tell: &mut impl FnMut(Verdict, usize, String, String),
    ) {
        // A table that the script adds to has what it adds.
        if used.written {
            if let Some((member, advice)) = replaced(module, path) {
                let what = format!("replaces {module}.{member}, which the gateway does not call: it has no effect");
                tell(Change, used.line, what, advice.to_owned());
            }
            return;
        }
        let (limit_of, rest) = if module == "_G" { (path[0], &path[1..]) } else { (module, path) };
        let member = rest.join(".");
        let limited = LIMITED.iter().find(|(module, name, ..)| *module == limit_of && *name == member);
        if let Some((_, _, verdict, advice)) = limited {
            tell(*verdict, used.line, format!("{limit_of}.{member} is not to be had"), (*advice).to_owned());
            return;
        }
        let key = (module.to_owned(), path.join("."));
        let checker = self.checker;
        let there = *self.members.entry(key).or_insert_with_key(|(module, member)| checker.has_member(module, member));
        if !there {
            let advice = "do without it; docs/lua-api.md and docs/compatibility.md tell what there is";
            tell(Change, used.line, format!("{limit_of}.{member} does not exist here"), advice.to_owned());
        }
    }

    /// Tells what all texts together leave open, and what they found.
    pub fn tell(self, report: &mut Report) {
        for (name, (place, line)) in self.read.iter().filter(|(name, _)| !self.defined.contains(*name)) {
            let what = format!("the variable {name} is not the gateway's, and no script sets it");
            report.add(Change, "lua", format!("{place}:{line}"), what, variables::ADVICE);
        }
        if self.texts > 0 {
            let count = |origin: &Origin| self.modules.values().filter(|found| *found == origin).count();
            report.runs.push((
                "lua",
                format!(
                    "{} texts were read; of the modules that they need, {} are the gateway's, {} beside them",
                    self.texts,
                    count(&Origin::Ours),
                    count(&Origin::Beside)
                ),
            ));
        }
    }
}

/// Where the script of a text may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Runs {
    /// For requests of routes.
    ForRoutes,
    /// A library, which scripts of locations may use, too.
    Wherever,
}

/// What only scripts of locations may call, and what to do in its place. `path` is behind `ngx`.
fn of_locations(path: &[&str]) -> Option<(&'static str, &'static str)> {
    let member = path.join(".");
    OF_LOCATIONS.iter().find(|(name, _)| *name == member).copied()
}

/// What a script has put something in the place of, where that has no effect, and what to do.
fn replaced<'p>(module: &str, path: &[&'p str]) -> Option<(&'p str, &'static str)> {
    let member = *path.first()?;
    let is_it = |name: &str| if name.ends_with('_') { member.starts_with(name) } else { member == name };
    REPLACED.iter().find(|(of, name, _)| *of == module && is_it(name)).map(|(.., advice)| (member, *advice))
}

/// Whether `Checker::find_module` has found it in the binary.
fn is_ours(place: &str) -> bool {
    matches!(place, "packed" | "built in")
}

#[derive(Debug, PartialEq, Eq)]
enum Kind<'a> {
    Name(&'a str),
    Text(&'a str),
    /// Any other character; numbers are `0`, `..` and `...` are `~`, `==` and its like `?`.
    Mark(u8),
}

#[derive(Debug, PartialEq, Eq)]
struct Token<'a> {
    kind: Kind<'a>,
    line: usize,
}

/// The words of a text, without comments.
fn tokens(text: &str) -> Vec<Token<'_>> {
    let bytes = text.as_bytes();
    let (mut tokens, mut at, mut line) = (Vec::new(), 0, 1);
    while let Some(&c) = bytes.get(at) {
        let start = at;
        let word = |c: &u8| c.is_ascii_alphanumeric() || *c == b'_';
        let mut push = |kind| tokens.push(Token { kind, line });
        match c {
            b'-' if bytes[at..].starts_with(b"--") => {
                at = match long_bracket(bytes, at + 2) {
                    Some((_, _, after)) => after,
                    None => bytes[at..].iter().position(|c| *c == b'\n').map_or(bytes.len(), |n| at + n),
                };
            }
            b'[' if long_bracket(bytes, at).is_some() => {
                if let Some((from, to, after)) = long_bracket(bytes, at) {
                    push(Kind::Text(text.get(from..to).unwrap_or_default()));
                    at = after;
                }
            }
            b'"' | b'\'' => {
                at += 1;
                while bytes.get(at).is_some_and(|b| *b != c && *b != b'\n') {
                    at += if bytes[at] == b'\\' { 2 } else { 1 };
                }
                let end = at.min(bytes.len());
                push(Kind::Text(text.get(start + 1..end).unwrap_or_default()));
                at = end + usize::from(bytes.get(end) == Some(&c));
            }
            b'0'..=b'9' => {
                at += bytes[at..].iter().take_while(|c| word(c) || **c == b'.').count();
                push(Kind::Mark(b'0'));
            }
            c if word(&c) => {
                at += bytes[at..].iter().take_while(|c| word(c)).count();
                push(Kind::Name(&text[start..at]));
            }
            b'.' if bytes.get(at + 1) == Some(&b'.') => {
                at += bytes[at..].iter().take_while(|c| **c == b'.').count();
                push(Kind::Mark(b'~'));
            }
            b'=' | b'~' | b'<' | b'>' if bytes.get(at + 1) == Some(&b'=') => {
                at += 2;
                push(Kind::Mark(b'?'));
            }
            c => {
                at += 1;
                if !c.is_ascii_whitespace() {
                    push(Kind::Mark(c));
                }
            }
        }
        line += bytes[start..at.min(bytes.len())].iter().filter(|c| **c == b'\n').count();
    }
    tokens
}

/// A `[[…]]` or `[==[…]==]` at `at`: where its text begins and ends, and what is after it.
fn long_bracket(bytes: &[u8], at: usize) -> Option<(usize, usize, usize)> {
    let rest = bytes.get(at..)?;
    let level = rest.get(1..)?.iter().take_while(|c| **c == b'=').count();
    if rest.first() != Some(&b'[') || rest.get(level + 1) != Some(&b'[') {
        return None;
    }
    let from = at + level + 2;
    let mut close = vec![b'='; level + 2];
    (close[0], close[level + 1]) = (b']', b']');
    let to = memchr::memmem::find(&bytes[from..], &close).map_or(bytes.len(), |n| from + n);
    Some((from, to, (to + close.len()).min(bytes.len())))
}

fn mark(tokens: &[Token<'_>], at: usize, wanted: u8) -> bool {
    tokens.get(at).is_some_and(|token| token.kind == Kind::Mark(wanted))
}

fn name<'a>(tokens: &[Token<'a>], at: usize) -> Option<&'a str> {
    match tokens.get(at)?.kind {
        Kind::Name(name) => Some(name),
        _ => None,
    }
}

fn text<'a>(tokens: &[Token<'a>], at: usize) -> Option<&'a str> {
    match tokens.get(at)?.kind {
        Kind::Text(text) => Some(text),
        _ => None,
    }
}

/// Where a module is required by its name: place, module, and whether the script copes without it.
fn requires<'a>(tokens: &[Token<'a>]) -> impl Iterator<Item = (usize, &'a str, bool)> {
    (0..tokens.len()).filter_map(|at| {
        if name(tokens, at) != Some("require") || (at > 0 && (mark(tokens, at - 1, b'.') || mark(tokens, at - 1, b':')))
        {
            return None;
        }
        let (module, next) = required(tokens, at)?;
        // The start of a name that is put together.
        let whole = !mark(tokens, next, b'~') && !module.is_empty();
        let optional = mark(tokens, at + 1, b',');
        whole.then_some((at, module, optional))
    })
}

/// `require "x"`, `require("x")` and `pcall(require, "x")`: the module, and the token after its name.
fn required<'a>(tokens: &[Token<'a>], at: usize) -> Option<(&'a str, usize)> {
    let skip = usize::from(mark(tokens, at + 1, b'(') || mark(tokens, at + 1, b','));
    Some((text(tokens, at + 1 + skip)?, at + 2 + skip))
}

/// What a local name stands for: members of a module, or of the globals (`_G`).
#[derive(Clone, Debug, PartialEq, Eq)]
struct Meaning {
    root: String,
    path: Vec<String>,
}

/// Local names that mean one thing in the whole text; those that mean several are `None`.
#[derive(Default)]
struct Names<'a> {
    meanings: HashMap<&'a str, Option<Meaning>>,
    /// The tokens that declare a local name: they use nothing.
    declaring: HashSet<usize>,
}

impl<'a> Names<'a> {
    fn of(tokens: &[Token<'a>]) -> Names<'a> {
        let mut names = Names::default();
        for at in 0..tokens.len() {
            match name(tokens, at) {
                Some("local") if name(tokens, at + 1) == Some("function") => {
                    name(tokens, at + 2).into_iter().for_each(|local| names.note(local, None));
                }
                Some("local") => names.declared(tokens, at + 1),
                Some("function") => names.parameters(tokens, at + 1),
                Some("for") => {
                    let mut at = at + 1;
                    while let Some(local) = name(tokens, at).filter(|word| *word != "in") {
                        names.note(local, None);
                        at += 1 + usize::from(mark(tokens, at + 1, b','));
                    }
                }
                _ => {}
            }
        }
        names
    }

    fn note(&mut self, local: &'a str, meaning: Option<Meaning>) {
        let known = self.meanings.entry(local).or_insert_with(|| meaning.clone());
        if *known != meaning {
            *known = None;
        }
    }

    fn parameters(&mut self, tokens: &[Token<'a>], mut at: usize) {
        while !mark(tokens, at, b'(')
            && at < tokens.len()
            && (name(tokens, at).is_some() || mark(tokens, at, b'.') || mark(tokens, at, b':'))
        {
            at += 1;
        }
        while let Some(local) = name(tokens, at + 1) {
            // `ctx` is what plugins call the request's own table, wherever they are given it.
            if local != "ctx" && local != "api_ctx" {
                self.note(local, None);
            }
            at += 2;
            if !mark(tokens, at, b',') {
                break;
            }
        }
    }

    /// `local a, b = x.y, require "z"`.
    fn declared(&mut self, tokens: &[Token<'a>], mut at: usize) {
        let mut locals = Vec::new();
        while let Some(local) = name(tokens, at) {
            locals.push(local);
            self.declaring.insert(at);
            at += 1;
            if !mark(tokens, at, b',') {
                break;
            }
            at += 1;
        }
        let valued = mark(tokens, at, b'=');
        let mut expressions = valued;
        at += 1;
        for local in locals {
            let meaning = expressions.then(|| self.expression(tokens, &mut at)).flatten();
            // What comes after an expression that is no plain name cannot be told.
            expressions &= meaning.is_some() && mark(tokens, at, b',');
            at += usize::from(expressions);
            if !matches!(local, "ctx" | "api_ctx") {
                self.note(local, meaning);
            }
        }
    }

    /// A chain of names that is the whole expression.
    fn expression(&self, tokens: &[Token<'a>], at: &mut usize) -> Option<Meaning> {
        let chain = chain(tokens, *at, self)?;
        let after = tokens.get(chain.end).map(|token| &token.kind);
        let goes_on = match after {
            Some(Kind::Mark(c)) => !matches!(c, b',' | b';' | b')' | b'}'),
            Some(Kind::Text(_)) => true,
            Some(Kind::Name(word)) => matches!(*word, "or" | "and"),
            None => false,
        };
        if goes_on {
            return None;
        }
        *at = chain.end;
        Some(chain.meaning)
    }
}

struct Chain {
    meaning: Meaning,
    end: usize,
}

/// `a.b.c`, `a["b"]`, `a:b`, `require("x").y` at `at`, with local names replaced by what they stand for.
fn chain(tokens: &[Token<'_>], at: usize, names: &Names<'_>) -> Option<Chain> {
    let first = name(tokens, at)?;
    let (mut meaning, mut end) = match first {
        "require" => {
            let (module, next) = required(tokens, at)?;
            let meaning = Meaning { root: module.to_owned(), path: Vec::new() };
            (meaning, next + usize::from(mark(tokens, at + 1, b'(') && mark(tokens, next, b')')))
        }
        _ => match names.meanings.get(first) {
            Some(Some(meaning)) => (meaning.clone(), at + 1),
            Some(None) => return None,
            None => (Meaning { root: "_G".to_owned(), path: vec![first.to_owned()] }, at + 1),
        },
    };
    loop {
        let member = if mark(tokens, end, b'.') || mark(tokens, end, b':') {
            name(tokens, end + 1).map(|member| (member, end + 2))
        } else if mark(tokens, end, b'[') && mark(tokens, end + 2, b']') {
            text(tokens, end + 1).map(|member| (member, end + 3))
        } else {
            None
        };
        let Some((member, next)) = member else { break };
        meaning.path.push(member.to_owned());
        end = next;
        // What a method or a call gives is another thing.
        if mark(tokens, end, b'(') {
            break;
        }
    }
    Some(Chain { meaning, end })
}

/// A member that a text reads, calls or writes.
#[derive(Debug)]
struct Use {
    root: String,
    path: Vec<String>,
    line: usize,
    written: bool,
}

/// Every member of a module or a global that is named, and variables that are registered.
fn uses<'t>(tokens: &'t [Token<'_>], names: &'t Names<'_>) -> impl Iterator<Item = Use> + 't {
    (0..tokens.len()).filter_map(|at| {
        let word = name(tokens, at)?;
        let line = tokens[at].line;
        if at > 0 && (mark(tokens, at - 1, b'.') || mark(tokens, at - 1, b':')) {
            // `core.ctx.register_var("x", …)` and `ctx.var.x` of any table's: `self.ctx.var.x`.
            return match word {
                "register_var" => registered(tokens, at),
                "ctx" | "api_ctx" => variable_of(tokens, at, line),
                _ => None,
            };
        }
        if matches!(word, "ctx" | "api_ctx") {
            return variable_of(tokens, at, line);
        }
        if names.declaring.contains(&at) {
            return None;
        }
        // `function a.b()` writes it.
        let defined = at > 0 && name(tokens, at - 1) == Some("function");
        let Chain { meaning, end } = chain(tokens, at, names)?;
        (!meaning.path.is_empty()).then(|| Use {
            root: meaning.root,
            path: meaning.path,
            line,
            written: defined || mark(tokens, end, b'='),
        })
    })
}

fn registered(tokens: &[Token<'_>], at: usize) -> Option<Use> {
    let variable = text(tokens, at + 2).filter(|_| mark(tokens, at + 1, b'('))?;
    let path = ["ngx", "var", variable].map(str::to_owned).to_vec();
    Some(Use { root: "_G".to_owned(), path, line: tokens[at].line, written: true })
}

/// `ctx.var.x` and `ctx.var["x"]`.
fn variable_of(tokens: &[Token<'_>], at: usize, line: usize) -> Option<Use> {
    if !mark(tokens, at + 1, b'.') || name(tokens, at + 2) != Some("var") {
        return None;
    }
    let (variable, end) = if mark(tokens, at + 3, b'.') {
        (name(tokens, at + 4)?, at + 5)
    } else if mark(tokens, at + 3, b'[') && mark(tokens, at + 5, b']') {
        (text(tokens, at + 4)?, at + 6)
    } else {
        return None;
    };
    let path = ["ctx", "var", variable].map(str::to_owned).to_vec();
    Some(Use { root: "_G".to_owned(), path, line, written: mark(tokens, end, b'=') })
}

/// The variables that the files of a directory define, for objects that read them.
pub(super) fn defined_in(path: &Path) -> Vec<String> {
    let Ok(bytes) = read(path, MAX_LUA) else { return Vec::new() };
    let text = String::from_utf8_lossy(&bytes);
    let tokens = tokens(&text);
    let names = Names::of(&tokens);
    let is_variable =
        |used: &Use| used.written && used.root == "_G" && used.path.get(1).is_some_and(|word| word == "var");
    uses(&tokens, &names).filter(is_variable).filter_map(|mut used| used.path.pop()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn used(text: &str) -> Vec<String> {
        let tokens = tokens(text);
        let names = Names::of(&tokens);
        let shown = |used: Use| {
            format!(
                "{}{}:{}{}",
                used.line,
                if used.written { "=" } else { "" },
                used.root,
                used.path.iter().map(|p| format!(".{p}")).collect::<String>()
            )
        };
        uses(&tokens, &names)
            .map(shown)
            .filter(|shown| !shown.contains(":_G.") || [":_G.ngx", ":_G.ctx"].iter().any(|start| shown.contains(start)))
            .collect()
    }

    #[test]
    fn modules_are_found_however_they_are_required() {
        let text = "local a = require('a.b')\nlocal b = require \"c\" -- require 'no'\nlocal ok, d = pcall(require, 'd')\n\
                    require('x.' .. name) --[[ require 'no' ]] local e = [[require 'no']] x.require('no') require [=[e]=]";
        let tokens = tokens(text);
        let found: Vec<_> =
            requires(&tokens).map(|(at, module, optional)| (tokens[at].line, module, optional)).collect();
        assert_eq!(found, [(1, "a.b", false), (2, "c", false), (3, "d", true), (4, "e", false)]);
    }

    #[test]
    fn members_are_followed_through_local_names() {
        let text = "local core = require('apisix.core')\nlocal log, v = core.log, ngx.var\nlog.error(v.uri)\n\
                    v.mine = 1\nlocal C = require('ffi').C\nC.ngx_http_x(1)\nngx.req.get_headers()['a'].b()\n\
                    require('ngx.ssl').server_name()";
        assert_eq!(
            used(text),
            [
                "2:apisix.core.log",
                "2:_G.ngx.var",
                "3:apisix.core.log.error",
                "3:_G.ngx.var.uri",
                "4=:_G.ngx.var.mine",
                "5:ffi.C",
                "6:ffi.C.ngx_http_x",
                "7:_G.ngx.req.get_headers",
                "8:ngx.ssl.server_name",
            ]
        );
    }

    #[test]
    fn names_that_mean_several_things_are_not_followed() {
        let text = "local http = require('resty.http')\nlocal function f(http) return http.nothing end\n\
                    local x = ngx.var\nfor x in y do z(x.no) end\nlocal a = ngx.re or {}\na.b()";
        assert_eq!(used(text), ["3:_G.ngx.var", "5:_G.ngx.re"]);
        assert_eq!(used("local a, mine = b, ngx.var.mine"), ["1:_G.ngx.var.mine"], "a declaration sets no variable");
    }

    #[test]
    fn variables_are_found_in_ctx_and_where_they_are_registered() {
        let text = "function _M.access(conf, ctx)\nlocal u = ctx.var.uri_x, ctx.var['arg_y'], ctx.var['http_' .. n]\n\
                    ctx.var.set_here = 1\nif ctx.var.a == 1 then end\ncore.ctx.register_var('made', f)\nself.ctx.var.deep()\nend";
        assert_eq!(
            used(text),
            [
                "2:_G.ctx.var.uri_x",
                "2:_G.ctx.var.arg_y",
                "3=:_G.ctx.var.set_here",
                "4:_G.ctx.var.a",
                "5=:_G.ngx.var.made",
                "6:_G.ctx.var.deep"
            ]
        );
    }

    #[test]
    fn what_is_no_lua_does_no_harm() {
        for text in [
            "",
            "\"",
            "'\\",
            "[[",
            "[==[",
            "--[[",
            "--",
            "local",
            "local a,",
            "function",
            "for",
            "require",
            "require(",
            "a.",
            "a[",
            "a['b'",
            "\u{e9}'\u{e9}\\",
            "local a = ",
            "...",
            "ctx.var",
            "x.register_var(",
        ] {
            used(text);
            requires(&tokens(text)).count();
        }
    }
}
