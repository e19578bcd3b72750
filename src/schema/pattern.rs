//! `pattern`: PCRE, with short cuts for the shapes that stand in most schemas.
//!
//! `^[class]+$`, `^literal` and `.*` are decided without a regex engine; anything else is compiled on first use.

use std::{fmt, sync::OnceLock};

use pcre2::bytes::{Regex, RegexBuilder};

pub struct Pattern {
    pub source: Box<str>,
    matcher: Matcher,
}

enum Matcher {
    Always,
    Prefix(Box<[u8]>),
    /// One or more bytes of this set, from start to end.
    Class(Box<[bool; 256]>),
    Regex(OnceLock<Option<Regex>>),
}

impl Pattern {
    pub fn new(source: &str) -> Pattern {
        let matcher = shortcut(source).unwrap_or_else(|| Matcher::Regex(OnceLock::new()));
        Pattern { source: source.into(), matcher }
    }

    /// Compiles now, to learn whether it can be.
    pub fn verify(&self) -> Result<(), String> {
        match &self.matcher {
            Matcher::Regex(_) => regex(&self.source).map(|_| ()),
            _ => Ok(()),
        }
    }

    pub fn is_match(&self, text: &str) -> bool {
        match &self.matcher {
            Matcher::Always => true,
            Matcher::Prefix(prefix) => text.as_bytes().starts_with(prefix),
            Matcher::Class(class) => all_of(class, text.as_bytes()),
            Matcher::Regex(cell) => match cell.get_or_init(|| regex(&self.source).ok()) {
                // A match that breaks PCRE's limits is no match.
                Some(regex) => regex.is_match(text.as_bytes()).unwrap_or(false),
                None => false,
            },
        }
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.source)
    }
}

/// `$` of PCRE also matches before a last newline.
fn all_of(class: &[bool; 256], text: &[u8]) -> bool {
    let body = text.strip_suffix(b"\n").filter(|_| !class[b'\n' as usize]).unwrap_or(text);
    !body.is_empty() && body.iter().all(|b| class[*b as usize])
}

fn regex(source: &str) -> Result<Regex, String> {
    let unicode = source.contains("\\p") || source.contains("\\P") || !source.is_ascii();
    RegexBuilder::new()
        .utf(unicode)
        .ucp(unicode)
        .jit_if_available(true)
        .build(source)
        .map_err(|e| format!("invalid pattern \"{source}\": {e}"))
}

fn shortcut(source: &str) -> Option<Matcher> {
    if matches!(source, ".*" | "^.*$" | "^.*" | "") {
        return Some(Matcher::Always);
    }
    let rest = source.strip_prefix('^')?;
    if !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'/' | b'_' | b'=')) {
        return Some(Matcher::Prefix(rest.as_bytes().into()));
    }
    let class = rest.strip_suffix("+$")?;
    if class == "\\S" {
        return Some(Matcher::Class(Box::new(std::array::from_fn(|b| !is_space(b as u8)))));
    }
    let inner = class.strip_prefix('[')?.strip_suffix(']')?;
    simple_class(inner.as_bytes()).map(Matcher::Class)
}

fn is_space(b: u8) -> bool {
    matches!(b, b' ' | 9..=13)
}

/// The bytes of a class made of alphanumerics, ranges of them, `_`, `.`, `\-`, and a `-` that stands for itself.
fn simple_class(text: &[u8]) -> Option<Box<[bool; 256]>> {
    let mut set = Box::new([false; 256]);
    let mut i = 0;
    while i < text.len() {
        let b = text[i];
        if b == b'\\' && text.get(i + 1) == Some(&b'-') {
            set[b'-' as usize] = true;
            i += 2;
            continue;
        }
        if !(b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-')) {
            return None;
        }
        match (text.get(i + 1), text.get(i + 2)) {
            (Some(b'-'), Some(&to)) if b.is_ascii_alphanumeric() && to.is_ascii_alphanumeric() && b <= to => {
                set[b as usize..=to as usize].fill(true);
                i += 3;
            }
            (Some(b'-'), Some(_)) if b.is_ascii_alphanumeric() => return None,
            _ => {
                set[b as usize] = true;
                i += 1;
            }
        }
    }
    Some(set)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_cut_decides_as_the_regex_does() {
        let texts = ["", "a", "a-b_c.9", "a b", "abc\n", "\n", "a$", "function() end", "fun", "[", "ä", "-", "/x"];
        for source in ["^[a-zA-Z0-9-_.]+$", "^[a-zA-Z0-9_\\-]+$", "^[a-zA-Z0-9-_]+$", "^\\S+$", "^function", ".*"] {
            let pattern = Pattern::new(source);
            assert!(!matches!(pattern.matcher, Matcher::Regex(_)), "{source} has a short cut");
            let regex = regex(source).expect("a valid regex");
            for text in texts {
                let expected = regex.is_match(text.as_bytes()).expect("within limits");
                assert_eq!(pattern.is_match(text), expected, "{source} on {text:?}");
            }
        }
    }

    #[test]
    fn lookarounds_and_unicode_classes_work() {
        let label = Pattern::new("^[\\p{L}][\\p{L}\\p{N}_.:/-]*(?<!:)$");
        assert!(label.is_match("äb:c"));
        assert!(!label.is_match("ab:"));
        assert!(Pattern::new("(").verify().is_err());
    }
}
