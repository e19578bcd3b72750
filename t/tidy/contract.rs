//! docs/apisix-lua-api.md: made of the comments of the modules that plugins require as `apisix.*`.

use std::fmt::Write as _;

use super::{Source, read, report, root, sources};

const DOCUMENT: &str = "docs/apisix-lua-api.md";

const HEAD: &str = "# What plugins may require of `apisix.*`\n\nMade of the comments of the modules in `lua/apisix`, held by a test. \
                    `core.x` is `require(\"apisix.core\").x`, or `require(\"apisix.core.x\")`. Functions that wait say so; the others \
                    never do. [plugin-develop.md of APISIX](https://apisix.apache.org/docs/apisix/plugin-develop/) says how a \
                    plugin is written, [compatibility.md](compatibility.md) what differs.\n";

#[test]
fn the_contract_is_documented() {
    let (mut text, mut found) = (HEAD.to_owned(), Vec::new());
    let mut files = sources(&["lua/apisix"], "lua");
    files.sort_by_cached_key(|file| name_of(&file.path));
    for file in files {
        module(&file, &mut text, &mut found);
    }
    report(found);
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(root().join(DOCUMENT), &text).expect("a written document");
    }
    assert!(read(DOCUMENT) == text, "{DOCUMENT} is not what the modules say: run this test with UPDATE_DOCS=1");
}

/// What a script requires the file by.
fn name_of(path: &str) -> String {
    let name = path.trim_start_matches("lua/").trim_end_matches(".lua").replace('/', ".");
    name.trim_end_matches(".init").to_owned()
}

/// Adds a module's section. A public function without a comment is a finding.
fn module(file: &Source, text: &mut String, found: &mut Vec<String>) {
    let lines: Vec<&str> = file.text.lines().collect();
    let name = name_of(&file.path);
    let head: Vec<&str> = lines.iter().take_while(|line| line.starts_with("--")).copied().collect();
    let _ = writeln!(text, "\n## `{name}`\n\n{}", without_name(&joined(&head)));
    let mut first = true;
    for (at, line) in lines.iter().enumerate() {
        let Some(signature) = line.strip_prefix("function _M.").or_else(|| line.strip_prefix("function _M:")) else {
            continue;
        };
        let signature = signature.split_inclusive(')').next().unwrap_or(signature);
        let begin = lines[..at].iter().rposition(|line| !line.starts_with("--")).map_or(0, |n| n + 1);
        let comment = &lines[begin..at];
        if !comment.first().is_some_and(|line| line.starts_with("---")) {
            found.push(format!("{}:{}: a --- comment that says what {signature} does", file.path, at + 1));
            continue;
        }
        let _ = writeln!(text, "{}* `{signature}`: {}", if first { "\n" } else { "" }, joined(comment));
        first = false;
    }
}

/// The text of comment lines.
fn joined(lines: &[&str]) -> String {
    let words = lines.iter().map(|line| line.trim_start_matches('-').trim());
    words.filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ")
}

/// A module's comment begins with its own name, which stands above it already.
fn without_name(text: &str) -> String {
    let rest = match text.starts_with('`') {
        true => text.split_once("`: ").map_or(text, |(_, rest)| rest),
        false => text,
    };
    let mut letters = rest.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}
