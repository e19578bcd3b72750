//! What of docs/architecture.md a machine can check: who imports whom, and rules that clippy and luacheck do not know.

#[path = "tidy/contract.rs"]
mod contract;

use std::{
    fs,
    path::{Path, PathBuf},
};

/// From the bottom up. A module imports from the lines above its own, never from its own line or below.
const LAYERS: &[&[&str]] = &[
    &["error"],
    &["observe", "expr", "schema", "conf", "shdict", "tcp", "cert"],
    &["model", "dns"],
    &["router", "balancer", "location"],
    &["store"],
    &["exchange"],
    &["tls"],
    &["net", "upstream"],
    &["health"],
    &["lua"],
    &["plugin"],
    &["proxy", "stream"],
    &["admin", "control"],
    &["app"],
    &["migrate"],
    &["cli"],
];

/// Importer, imported, and why it may.
const EXCEPTIONS: &[(&str, &str, &str)] =
    &[("control", "admin", "the two APIs have one HTTP server, and the control API shows what the Admin API keeps")];

/// May write to standard output: they speak to who started the gateway.
const PRINTS: &[&str] = &["src/cli.rs", "src/main.rs", "src/app"];

/// Everybody else speaks to scripts through these.
const NAME_MLUA: &[&str] = &["lua", "plugin"];

/// A file that is longer holds two things.
const MAX_LINES: usize = 1500;

#[test]
fn imports_go_downwards() {
    let mut found = Vec::new();
    for file in rust_sources() {
        let Some(from) = file.module() else { continue };
        for (line, to) in file.imports() {
            if layer(&to) >= layer(&from) && to != from && !excepted(&from, &to) {
                found.push(format!("{}:{line}: {from} must not import {to}", file.path));
            }
        }
    }
    report(found);
}

#[test]
fn every_module_has_its_layer_and_every_exception_its_use() {
    let mut found = Vec::new();
    let mut used = Vec::new();
    for file in rust_sources() {
        let Some(from) = file.module() else { continue };
        if !LAYERS.concat().contains(&from.as_str()) {
            found.push(format!("{}: {from} is not in LAYERS", file.path));
        }
        used.extend(file.imports().into_iter().map(|(_, to)| (from.clone(), to)));
    }
    for (from, to, _) in EXCEPTIONS {
        if !used.iter().any(|(a, b)| a == from && b == to) {
            found.push(format!("the exception {from} -> {to} is not needed"));
        }
    }
    report(found);
}

#[test]
fn rust_sources_keep_the_rules() {
    let mut found = Vec::new();
    for file in rust_sources() {
        if !file.text.starts_with("//!") {
            found.push(format!("{}:1: starts with a //! comment that says what it is for", file.path));
        }
        found.extend(file.lines_with(".unwrap()", "unwrap is for tests: return the error, or expect() with a reason"));
        if !PRINTS.iter().any(|p| file.path.starts_with(p)) {
            found.extend(file.lines_with("println!", "standard output belongs to cli and app"));
            found.extend(file.lines_with("print!", "standard output belongs to cli and app"));
        }
        if !file.module().is_some_and(|module| NAME_MLUA.contains(&module.as_str())) {
            found.extend(file.lines_with("mlua::", "only lua and plugin know the VM; everybody else asks them"));
        }
    }
    found.sort();
    found.dedup();
    report(found);
}

/// Clippy wants a reason at each unsafe block; the exports of an `export!` have theirs or share one above it.
#[test]
fn exports_say_what_lua_owes_them() {
    let mut found = Vec::new();
    for file in rust_sources() {
        for (at, start) in file.text.match_indices("export! {\n") {
            let block = file.text[at + start.len()..].split("\n}").next().unwrap_or_default();
            let comment =
                file.text[..at].trim_end_matches("crate::").lines().rev().take_while(|line| line.starts_with("//"));
            if block.contains("unsafe")
                && !block.contains("// SAFETY")
                && !comment.into_iter().any(|line| line.starts_with("// SAFETY"))
            {
                found.push(format!("{}:{}: a SAFETY comment", file.path, file.text[..at].lines().count()));
            }
        }
    }
    report(found);
}

#[test]
fn lua_requires_go_downwards() {
    // Where a file lies, and what it must not require.
    let rules: &[(&str, &[&str])] = &[
        ("lua/resty/", &["apisix."]),
        ("lua/ngx/", &["apisix."]),
        ("lua/apisix/core/", &["apisix.plugins.", "apisix.utils.", "apisix.plugin\""]),
        ("lua/apisix/", &["apisix.plugins."]),
    ];
    let mut found = Vec::new();
    for file in sources(&["lua", "plugins"], "lua") {
        if !file.text.starts_with("---") {
            found.push(format!("{}:1: starts with a --- comment that says what it is for", file.path));
        }
        let above = rules.iter().filter(|(dir, _)| file.path.starts_with(dir)).flat_map(|(_, names)| *names);
        for name in above {
            let (call, bare) = (format!("require(\"{name}"), format!("require \"{name}"));
            for (number, line) in file.text.lines().enumerate() {
                if line.contains(&call) || line.contains(&bare) {
                    found.push(format!("{}:{}: must not require {name}*", file.path, number + 1));
                }
            }
        }
    }
    report(found);
}

/// Files that compile text themselves: each refuses bytecode and says which globals the text has.
const COMPILE_TEXT: [&str; 3] = ["lua/moongate/boot.lua", "lua/moongate/chunk.lua", "lua/moongate/functions.lua"];

#[test]
fn lua_compiles_text_in_one_place() {
    let mut found = Vec::new();
    for file in sources(&["lua", "plugins"], "lua") {
        if COMPILE_TEXT.contains(&file.path.as_str()) {
            continue;
        }
        let own_load = file.text.contains("local function load(");
        for (number, line) in file.text.lines().enumerate() {
            if compiles_text(line, own_load) {
                found.push(format!("{}:{}: use load of moongate.chunk", file.path, number + 1));
            }
        }
    }
    report(found);
}

/// Whether a line of Lua calls a global that compiles text, or gives it another name. `own_load`: the file has a function `load`.
fn compiles_text(line: &str, own_load: bool) -> bool {
    let code: String = line.split(['"', '\'']).step_by(2).collect::<Vec<_>>().join(" ");
    let code = code.split("--").next().unwrap_or_default();
    let names = |code: &str| -> Vec<String> {
        code.split(|c: char| !(c.is_alphanumeric() || "_.:".contains(c))).map(str::to_owned).collect()
    };
    let is_load = |word: &String| matches!(word.as_str(), "load" | "_G.load");
    let called = code.match_indices('(').any(|(at, _)| names(&code[..at]).last().is_some_and(is_load));
    let given = |after: &str| after.split(',').any(|value| is_load(&value.trim().to_owned()));
    let renamed = code.split_once('=').is_some_and(|(before, after)| before.contains("local") && given(after));
    let others = ["loadstring", "loadfile", "dofile", "_G.loadstring", "_G.loadfile", "_G.dofile"];
    names(code).iter().any(|word| others.contains(&word.as_str()))
        || (called || renamed) && !own_load && !code.contains("function load(")
}

#[test]
fn what_compiles_text_is_seen() {
    for line in ["local f = loadstring(text)", "return load(text, name)", "local a, make = 1, load", "_G.load(x)"] {
        assert!(compiles_text(line, false), "{line}");
    }
    assert!(compiles_text("return dofile(path)", true));
    for line in
        ["-- loadstring", "return nil, \"failed to loadstring: \" .. err", "chunk.load(text)", "function _M.load(text)"]
    {
        assert!(!compiles_text(line, false), "{line}");
    }
    assert!(!compiles_text("return load(key)", true));
}

#[test]
fn every_file_is_finished() {
    // In two parts, so that this file does not find itself.
    let marks = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X:")];
    let mut found = Vec::new();
    for extension in ["rs", "lua", "md", "yaml", "toml"] {
        for file in sources(&["src", "t", "benches", "lua", "plugins", "conf", "docs", "README.md"], extension) {
            let lines = file.text.lines().count();
            if lines > MAX_LINES && !file.path.ends_with(".md") {
                found.push(format!("{}: {lines} lines, more than {MAX_LINES}", file.path));
            }
            for (number, line) in file.text.lines().enumerate() {
                if line.ends_with([' ', '\t', '\r']) {
                    found.push(format!("{}:{}: ends with white space", file.path, number + 1));
                }
                if marks.iter().any(|mark| line.contains(mark)) {
                    found.push(format!("{}:{}: do it, or open an issue", file.path, number + 1));
                }
            }
        }
    }
    report(found);
}

#[test]
fn the_map_names_every_folder() {
    let map = read("docs/architecture.md");
    let mut found = Vec::new();
    for module in LAYERS.concat() {
        if !map.contains(&format!("`src/{module}`")) && !map.contains(&format!("`src/{module}.rs`")) {
            found.push(format!("docs/architecture.md does not name `src/{module}`"));
        }
    }
    report(found);
}

/// Cargo does not look for tests by itself here: a program that is not named would never run.
#[test]
fn every_test_program_is_named_in_cargo_toml() {
    let manifest = read("Cargo.toml");
    let programs =
        sources(&["t"], "rs").into_iter().map(|file| file.path).filter(|path| path.matches('/').count() == 1);
    report(programs.filter(|path| !manifest.contains(&format!("path = \"{path}\""))).collect());
}

#[test]
fn the_makefile_has_what_the_readme_names() {
    let (makefile, readme) = (read("Makefile"), read("README.md"));
    let named: Vec<String> =
        readme.lines().filter_map(|line| line.strip_prefix("make ")).flat_map(first_names).collect();
    assert!(named.iter().any(|target| target == "test"), "the README names its commands: {named:?}");
    report(named.into_iter().filter(|target| !makefile.contains(&format!("\n{target}:"))).collect());
}

#[test]
fn the_reader_of_sources_sees_code_only() {
    let text = r####"
        use crate::{error::Error, model::{self, Route}};
        // use crate::app;
        /* /* crate::app::x */ crate::app::x */
        let s = "crate::app::x \" crate::app"; let r = r#"crate::app::"x"#; let c = '"'; fn f<'a>(x: &'a str) {}
        fn g() { crate::dns::look() }
        #[cfg(test)]
        mod tests { use crate::cli::x; fn f() { "}" } }
        #[cfg(test)]
        mod more;
        use super::tls;
    "####;
    let file = Source::new("src/net/mod.rs".into(), text.into());
    let names: Vec<_> = file.imports().into_iter().map(|(line, name)| format!("{line} {name}")).collect();
    assert_eq!(names, ["2 error", "2 model", "6 dns", "11 tls"]);
}

fn report(found: Vec<String>) {
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

/// Higher is nearer to the command line. A module that has no layer is reported by its own test.
fn layer(module: &str) -> usize {
    LAYERS.iter().position(|line| line.contains(&module)).unwrap_or(LAYERS.len())
}

fn excepted(from: &str, to: &str) -> bool {
    EXCEPTIONS.iter().any(|(a, b, _)| *a == from && *b == to)
}

struct Source {
    path: String,
    text: String,
    /// The text without comments, literals and what is compiled for tests only, line by line as in `text`.
    code: String,
}

impl Source {
    fn new(path: String, text: String) -> Self {
        let code = if path.ends_with(".rs") { without_tests(without_literals(&text)) } else { String::new() };
        Source { path, text, code }
    }

    /// The folder or file right below src that this file is part of; `None` for the crate's roots.
    fn module(&self) -> Option<String> {
        let name = self.path.strip_prefix("src/")?.split('/').next()?.trim_end_matches(".rs");
        (name != "lib" && name != "main").then(|| name.to_owned())
    }

    /// The crate's modules that this file names, with the line of each.
    fn imports(&self) -> Vec<(usize, String)> {
        let mut found = Vec::new();
        // In the file at the top of a module, `super` is the crate.
        let top = self.path.ends_with("/mod.rs") || self.path.matches('/').count() == 1;
        let top = top && self.path.matches('/').count() <= 2;
        for root in ["crate::", "super::"].into_iter().take(1 + usize::from(top)) {
            for (at, _) in self.code.match_indices(root) {
                let line = self.code[..at].matches('\n').count() + 1;
                let names = first_names(&self.code[at + root.len()..]);
                found.extend(names.into_iter().map(|name| (line, name)));
            }
        }
        let known = LAYERS.concat();
        found.retain(|(_, name)| known.contains(&name.as_str()));
        found
    }

    fn lines_with<'a>(&'a self, what: &'a str, rule: &'a str) -> impl Iterator<Item = String> + 'a {
        let lines = self.code.lines().enumerate().filter(move |(_, line)| line.contains(what));
        lines.map(move |(number, _)| format!("{}:{}: {rule}", self.path, number + 1))
    }
}

/// `a::b` is a; `{a::b, c::{d, e}}` is a and c.
fn first_names(path: &str) -> Vec<String> {
    let name =
        |text: &str| -> String { text.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect() };
    let Some(group) = path.strip_prefix('{') else { return vec![name(path)] };
    let (mut depth, mut names, mut start) = (0, Vec::new(), 0);
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' | '}' if depth == 0 => {
                names.push(name(&group[start..at]));
                start = at + 1;
                if c == '}' {
                    break;
                }
            }
            _ => {}
        }
    }
    names
}

/// Comments and the insides of literals become spaces; line ends stay.
fn without_literals(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut code = String::with_capacity(text.len());
    let mut at = 0;
    while at < chars.len() {
        let end = literal_end(&chars, at);
        code.extend(chars[at..end.max(at + 1)].iter().map(|&c| if end > at && c != '\n' { ' ' } else { c }));
        at = end.max(at + 1);
    }
    code
}

/// Where the comment or literal that starts at `at` ends; `at` when none starts there.
fn literal_end(chars: &[char], at: usize) -> usize {
    let next = |n: usize| chars.get(at + n).copied().unwrap_or('\0');
    let word_before = at > 0 && (chars[at - 1].is_alphanumeric() || chars[at - 1] == '_');
    match (chars[at], next(1)) {
        ('/', '/') => (at..chars.len()).find(|&i| chars[i] == '\n').unwrap_or(chars.len()),
        ('/', '*') => block_comment_end(chars, at),
        ('r', '"' | '#') if !word_before || chars[at - 1] == 'b' => raw_string_end(chars, at),
        ('"', _) => quoted_end(chars, at, '"'),
        // A lifetime has no closing quote after one character.
        ('\'', '\\') => quoted_end(chars, at, '\''),
        ('\'', _) if next(2) == '\'' => at + 3,
        _ => at,
    }
}

fn quoted_end(chars: &[char], start: usize, quote: char) -> usize {
    let mut at = start + 1;
    while at < chars.len() && chars[at] != quote {
        at += if chars[at] == '\\' { 2 } else { 1 };
    }
    (at + 1).min(chars.len())
}

fn block_comment_end(chars: &[char], start: usize) -> usize {
    let (mut depth, mut at) = (0, start);
    while at + 1 < chars.len() {
        match (chars[at], chars[at + 1]) {
            ('/', '*') => (depth, at) = (depth + 1, at + 2),
            ('*', '/') if depth == 1 => return at + 2,
            ('*', '/') => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
    }
    chars.len()
}

/// `start` when it is a name that begins with r#, not a string.
fn raw_string_end(chars: &[char], start: usize) -> usize {
    let hashes = chars[start + 1..].iter().take_while(|c| **c == '#').count();
    let open = start + 1 + hashes;
    if chars.get(open) != Some(&'"') {
        return start;
    }
    let closes = |i: &usize| chars[*i] == '"' && chars[i + 1..].iter().take_while(|c| **c == '#').count() >= hashes;
    (open + 1..chars.len()).find(closes).map_or(chars.len(), |i| i + 1 + hashes)
}

/// Items under `#[cfg(test)]` become spaces.
fn without_tests(mut code: String) -> String {
    while let Some(start) = code.find("#[cfg(test)]") {
        let (mut depth, mut end) = (0, code.len());
        for (at, c) in code[start..].char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth == 1 => end = start + at + 1,
                '}' => depth -= 1,
                ';' if depth == 0 => end = start + at + 1,
                _ => continue,
            }
            if end < code.len() {
                break;
            }
        }
        let blank: String = code[start..end].chars().map(|c| if c == '\n' { '\n' } else { ' ' }).collect();
        code.replace_range(start..end, &blank);
    }
    code
}

/// The crate's sources but for files of tests.
fn rust_sources() -> Vec<Source> {
    let mut files = sources(&["src"], "rs");
    files.retain(|file| !file.path.ends_with("/tests.rs") && !file.path.contains("/tests/"));
    files
}

fn sources(places: &[&str], extension: &str) -> Vec<Source> {
    let mut paths = Vec::new();
    for place in places {
        collect(&root().join(place), extension, &mut paths);
    }
    paths.sort();
    let read = |path: &PathBuf| {
        let name = path.strip_prefix(root()).expect("below the root").to_string_lossy().into_owned();
        Source::new(name, fs::read_to_string(path).expect("a text file"))
    };
    let files: Vec<_> = paths.iter().map(read).collect();
    assert!(!files.is_empty() || extension == "toml", "no .{extension} file in {places:?}");
    files
}

fn collect(path: &Path, extension: &str, into: &mut Vec<PathBuf>) {
    if let Ok(entries) = fs::read_dir(path) {
        entries.flatten().for_each(|entry| collect(&entry.path(), extension, into));
    } else if path.extension().is_some_and(|e| e == extension) {
        into.push(path.to_owned());
    }
}

fn read(name: &str) -> String {
    fs::read_to_string(root().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}
