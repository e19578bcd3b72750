//! What of the architecture a machine can hold: who imports whom, who may name mlua, which tests run, what stays out of the code.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// From the bottom up. A module imports only from the lines below its own.
const LAYERS: &[&[&str]] = &[
    &["error"],
    &["observe", "expr", "schema", "conf", "shdict"],
    &["model", "dns"],
    &["router", "balancer"],
    &["store"],
    &["exchange"],
    &["tls"],
    &["net", "upstream"],
    &["health"],
    &["lua"],
    &["plugin"],
    &["proxy", "stream", "admin"],
    // Shares the HTTP side of the Admin API.
    &["control"],
    &["app"],
    &["cli"],
];

/// Everything else speaks to scripts through these.
const MAY_NAME_MLUA: &[&str] = &["lua", "plugin"];

/// What a finished program does not have.
const UNFINISHED: &[&str] = &["todo!(", "unimplemented!(", "dbg!("];

struct Source {
    path: PathBuf,
    /// `src/a/b.rs` and `src/a.rs` belong to `a`.
    module: String,
    /// Without comments, literals and unit tests.
    code: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(name: &str) -> String {
    fs::read_to_string(root().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
        let path = entry.expect("a directory entry").path();
        match path.is_dir() {
            true => files(&path, found),
            false if path.extension().is_some_and(|e| e == "rs") => found.push(path),
            false => {}
        }
    }
}

/// The library's modules and main.rs, without files that hold only tests.
fn sources() -> Vec<Source> {
    let src = root().join("src");
    let mut paths = Vec::new();
    files(&src, &mut paths);
    let sources = paths.into_iter().filter_map(|path| {
        let inner = path.strip_prefix(&src).expect("it was found under src").to_owned();
        if inner.components().any(|c| c.as_os_str().to_string_lossy().trim_end_matches(".rs").starts_with("test")) {
            return None;
        }
        let module = inner.components().next()?.as_os_str().to_string_lossy().trim_end_matches(".rs").to_owned();
        let code = code_of(&fs::read_to_string(&path).expect("a readable source"));
        Some(Source { path: inner, module, code })
    });
    sources.collect()
}

/// Blanks comments and literals, then cuts the unit tests off: they stand at the bottom.
fn code_of(text: &str) -> String {
    let text = blank(text);
    let tests = text.find("#[cfg(test)]\nmod tests {").unwrap_or(text.len());
    text[..tests].to_owned()
}

/// A scanner, not a parser: enough to tell code from what only looks like it. Line breaks stay.
fn blank(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut i = 0;
    while i < chars.len() {
        let end = match chars[i] {
            '/' if chars.get(i + 1) == Some(&'/') => find(&chars, i, &['\n']),
            '/' if chars.get(i + 1) == Some(&'*') => find(&chars, i + 2, &['*', '/']) + 2,
            '"' => string_end(&chars, i),
            'r' if !i.checked_sub(1).is_some_and(|b| is_word(chars[b]) && chars[b] != 'b') => raw_string_end(&chars, i),
            '\'' => char_end(&chars, i),
            _ => i,
        }
        .min(chars.len());
        if end <= i {
            out.push(chars[i]);
            i += 1;
        } else {
            out.extend(chars[i..end].iter().filter(|c| **c == '\n'));
            i = end;
        }
    }
    out
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Where `what` starts, at `from` or later.
fn find(chars: &[char], from: usize, what: &[char]) -> usize {
    (from..chars.len()).find(|&i| chars[i..].starts_with(what)).unwrap_or(chars.len())
}

fn string_end(chars: &[char], start: usize) -> usize {
    let mut i = start + 1;
    while i < chars.len() && chars[i] != '"' {
        i += if chars[i] == '\\' { 2 } else { 1 };
    }
    i + 1
}

/// `start` when no raw string begins there.
fn raw_string_end(chars: &[char], start: usize) -> usize {
    let hashes = chars[start + 1..].iter().take_while(|c| **c == '#').count();
    if chars.get(start + 1 + hashes) != Some(&'"') {
        return start;
    }
    let close: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
    find(chars, start + 2 + hashes, &close) + close.len()
}

/// `start` when it is a lifetime.
fn char_end(chars: &[char], start: usize) -> usize {
    match (chars.get(start + 1), chars.get(start + 2)) {
        (Some('\\'), _) => find(chars, start + 3, &['\'']) + 1,
        (Some(_), Some('\'')) => start + 3,
        _ => start,
    }
}

/// First segments of `crate::a::…`, `crate::{a, b::{…}}` and, in main.rs, of `moongate::…`.
fn imports(code: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for start in ["crate::", "moongate::"] {
        for (at, _) in code.match_indices(start) {
            let rest = &code[at + start.len()..];
            match rest.strip_prefix('{') {
                Some(group) => found.extend(heads(group)),
                None => found.extend(head(rest)),
            }
        }
    }
    found
}

/// The first segments inside a group, without what its inner groups hold.
fn heads(group: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut depth = 0usize;
    let mut item = String::new();
    for c in group.chars() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => found.extend(head(&std::mem::take(&mut item))),
            c if depth == 0 => item.push(c),
            _ => {}
        }
    }
    found.extend(head(&item));
    found
}

fn head(path: &str) -> Option<String> {
    let name: String = path.trim_start().chars().take_while(|c| is_word(*c)).collect();
    Some(name).filter(|name| !name.is_empty())
}

fn layer(module: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&module))
}

#[track_caller]
fn none(what: &str, found: Vec<String>) {
    assert!(found.is_empty(), "{what}:\n  {}", found.join("\n  "));
}

#[test]
fn imports_go_downwards() {
    let mut wrong = Vec::new();
    for source in sources() {
        if matches!(source.module.as_str(), "lib" | "main") {
            continue;
        }
        let Some(own) = layer(&source.module) else {
            wrong.push(format!("{}: module {} has no layer in t/tidy.rs", source.path.display(), source.module));
            continue;
        };
        for import in imports(&source.code).iter().filter(|i| **i != source.module) {
            // What is no module is a macro or an item of the crate's root.
            if layer(import).is_some_and(|theirs| theirs >= own) {
                wrong.push(format!("{}: {} must not import {import}", source.path.display(), source.module));
            }
        }
    }
    none("imports that go upwards or sideways (docs/architecture.md, LAYERS in t/tidy.rs)", wrong);
}

#[test]
fn every_module_of_the_library_has_a_layer() {
    let lib = code_of(&read("src/lib.rs"));
    let modules = lib.split("pub mod ").skip(1).filter_map(head);
    none("modules without a layer", modules.filter(|m| layer(m).is_none()).collect());
}

#[test]
fn only_lua_and_plugin_name_mlua() {
    let found = sources().into_iter().filter(|s| !MAY_NAME_MLUA.contains(&s.module.as_str()));
    let found = found.filter(|s| s.code.contains("mlua::")).map(|s| s.path.display().to_string());
    none("files that name mlua", found.collect());
}

#[test]
fn nothing_panics_for_want_of_a_reason_and_nothing_is_left_to_do() {
    let mut found = Vec::new();
    for source in sources() {
        for (number, line) in source.code.lines().enumerate() {
            let at = format!("{}:{}", source.path.display(), number + 1);
            if line.contains(".unwrap()") {
                found.push(format!("{at}: unwrap(); return an error, or say with expect() why it cannot fail"));
            }
            found.extend(UNFINISHED.iter().filter(|u| line.contains(**u)).map(|u| format!("{at}: {u}…)")));
        }
    }
    none("not fit for production", found);
}

#[test]
fn every_module_says_what_it_is_for() {
    let mut paths = Vec::new();
    files(&root().join("src"), &mut paths);
    files(&root().join("t"), &mut paths);
    let bare = paths.into_iter().filter(|path| {
        let text = fs::read_to_string(path).expect("a readable source");
        let tests = path.to_string_lossy().ends_with("tests.rs");
        !tests && !text.starts_with("//!")
    });
    none("files without a module comment", bare.map(|p| p.display().to_string()).collect());
}

/// Cargo does not look for tests by itself here: one that is not named would never run.
#[test]
fn every_test_program_is_named_in_cargo_toml() {
    let manifest = read("Cargo.toml");
    let mut missing = Vec::new();
    for entry in fs::read_dir(root().join("t")).expect("t/") {
        let path = entry.expect("a directory entry").path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.ends_with(".rs") && !manifest.contains(&format!("path = \"t/{name}\"")) {
            missing.push(format!("t/{name}"));
        }
    }
    none("test programs that are not in Cargo.toml", missing);
}

#[test]
fn the_readme_s_commands_exist() {
    let makefile = read("Makefile");
    let readme = read("README.md");
    let named = readme.lines().filter_map(|line| line.strip_prefix("make ")).filter_map(head);
    let named: BTreeSet<String> = named.collect();
    assert!(named.contains("run") && named.contains("test"), "the README names its two commands: {named:?}");
    none(
        "targets that the Makefile lacks",
        named.into_iter().filter(|t| !makefile.contains(&format!("\n{t}:"))).collect(),
    );
}

#[test]
fn the_scanner_tells_code_from_what_looks_like_it() {
    let text = "use crate::{a, b::{c, d}, e as f}; // crate::g\nlet s = \"crate::h \\\" {\"; let r = r#\"crate::i\"#;\n\
                let c = '\"'; fn x<'a>() { crate::j::k(); $crate::l!() }\n#[cfg(test)]\nmod tests { use crate::m; }";
    let found: Vec<String> = imports(&code_of(text)).into_iter().collect();
    assert_eq!(found, ["a", "b", "e", "j", "l"]);
    assert_eq!(blank("a /* x\n y */ b"), "a \n b");
}
