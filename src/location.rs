//! Chooses the location for a path, by nginx's rules: an exact one; else the longest prefix, if it says `^~`; else the first
//! regular expression that matches; else that longest prefix. Pure.

use std::{collections::HashMap, sync::Arc};

use crate::conf::locations::{Content, Location, Pattern};

/// The locations of config.yaml, ordered for choosing.
#[derive(Debug, Default)]
pub struct Chooser {
    exact: HashMap<Box<str>, Arc<Location>>,
    /// The longest first.
    prefixes: Vec<(Box<str>, bool, Arc<Location>)>,
    regexes: Vec<Arc<Location>>,
    named: HashMap<Box<str>, Arc<Location>>,
    rest: Option<Arc<Location>>,
}

/// A location, and what the groups of its regular expression captured, `$1` first.
#[derive(Debug)]
pub struct Chosen {
    pub location: Arc<Location>,
    pub captures: Vec<(Box<str>, Vec<u8>)>,
}

impl Chooser {
    /// `rest`: for paths that no location of the list is for.
    pub fn new(list: &[Arc<Location>], rest: Option<Arc<Location>>) -> Chooser {
        let mut chooser = Chooser { rest, ..Chooser::default() };
        for location in list {
            let own = location.clone();
            match &location.pattern {
                Pattern::Exact(path) => drop(chooser.exact.insert(path.clone(), own)),
                Pattern::Prefix { prefix, last_word } => chooser.prefixes.push((prefix.clone(), *last_word, own)),
                Pattern::Regex { .. } => chooser.regexes.push(own),
                Pattern::Named(name) => drop(chooser.named.insert(name.clone(), own)),
            }
        }
        chooser.prefixes.sort_by_key(|(prefix, ..)| std::cmp::Reverse(prefix.len()));
        chooser
    }

    pub fn is_empty(&self) -> bool {
        self.exact.is_empty() && self.prefixes.is_empty() && self.regexes.is_empty() && self.named.is_empty()
    }

    /// The location that is passed on and whose name is the path with a slash behind it: nginx sends the client there.
    pub fn folder(&self, path: &[u8]) -> Option<&Arc<Location>> {
        let with_slash = [path, b"/"].concat();
        let passes = |l: &Arc<Location>| matches!(l.content, Content::Proxy(_));
        let exact = std::str::from_utf8(&with_slash).ok().and_then(|path| self.exact.get(path));
        let prefix = self.prefixes.iter().find(|(prefix, ..)| prefix.as_bytes() == with_slash).map(|(.., l)| l);
        exact.or(prefix).filter(|l| passes(l))
    }

    pub fn rest(&self) -> Option<&Arc<Location>> {
        self.rest.as_ref()
    }

    pub fn named(&self, name: &str) -> Option<Arc<Location>> {
        self.named.get(name).cloned()
    }

    pub fn choose(&self, path: &[u8]) -> Option<Chosen> {
        self.choose_telling(path, |_, _| {})
    }

    /// The same; `tell` hears of each location that is asked, in the order in which they are, and whether it fits. Of those that
    /// are found by their name or prefix, only the one that fits is asked.
    pub fn choose_telling(&self, path: &[u8], mut tell: impl FnMut(&Location, bool)) -> Option<Chosen> {
        let plain = |location: &Arc<Location>| Chosen { location: location.clone(), captures: Vec::new() };
        let exact = std::str::from_utf8(path).ok().and_then(|path| self.exact.get(path));
        if let Some(location) = exact {
            tell(location, true);
            return Some(plain(location));
        }
        let prefix = self.prefixes.iter().find(|(prefix, ..)| path.starts_with(prefix.as_bytes()));
        if let Some((.., location)) = prefix {
            tell(location, true);
        }
        if let Some((_, true, location)) = prefix {
            return Some(plain(location));
        }
        let matching = self.regexes.iter().find_map(|location| {
            let found = captures(location, path);
            tell(location, found.is_some());
            found
        });
        matching.or_else(|| prefix.map(|(.., location)| plain(location)))
    }
}

fn captures(location: &Arc<Location>, path: &[u8]) -> Option<Chosen> {
    let regex = location.regex.as_ref()?;
    // A pattern that gives up (its match limit) is one that does not match.
    let found = regex.captures(path).ok()??;
    let mut captures = Vec::new();
    for (at, name) in regex.capture_names().iter().enumerate().skip(1) {
        let Some(group) = found.get(at) else { continue };
        captures.push((at.to_string().into(), group.as_bytes().to_vec()));
        if let Some(name) = name {
            captures.push((name.as_str().into(), group.as_bytes().to_vec()));
        }
    }
    Some(Chosen { location: location.clone(), captures })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;

    fn chooser(written: &[&str]) -> Chooser {
        let list: Vec<_> = written.iter().map(|w| json!({"location": w})).collect();
        let text = json!({"lua_locations": list}).to_string();
        let (config, _) = crate::conf::parse(Path::new("/"), &text).expect("a good configuration");
        Chooser::new(&config.locations.list, None)
    }

    #[test]
    fn nginx_rules_decide() {
        let chooser =
            chooser(&["/", "= /a", "/a", "/a/b", "^~ /static/", "~ \\.php$", "~* ^/(?<who>A+)/(\\d+)", "@named"]);
        for (path, expected) in [
            ("/a", "Exact"),
            ("/ab", "Prefix { prefix: \"/a\""),
            ("/a/bc", "Prefix { prefix: \"/a/b\""),
            ("/static/x.php", "last_word: true"),
            ("/a/x.php", "\\\\.php$"),
            ("/aa/12", "who"),
            ("/zzz", "prefix: \"/\""),
        ] {
            let chosen = chooser.choose(path.as_bytes()).expect("a location");
            let text = format!("{:?}", chosen.location.pattern);
            assert!(text.contains(expected), "{path}: {text}");
        }
        let captures = chooser.choose(b"/aa/12").expect("a location").captures;
        let captures: Vec<_> =
            captures.iter().map(|(name, v)| (&**name, std::str::from_utf8(v).expect("text"))).collect();
        assert_eq!(captures, [("1", "aa"), ("who", "aa"), ("2", "12")]);
        assert!(chooser.named("@named").is_some() && chooser.named("@other").is_none());
    }

    #[test]
    fn what_is_asked_is_told_in_order() {
        let chooser = chooser(&["/", "= /a", "/a", "^~ /static/", "~ b$", "~* A+"]);
        let told = |path: &str| {
            let mut told = Vec::new();
            chooser.choose_telling(path.as_bytes(), |location, fits| told.push((location.pattern.to_string(), fits)));
            told.iter().map(|(text, fits)| format!("{text} {fits}")).collect::<Vec<_>>()
        };
        assert_eq!(told("/a"), ["= /a true"]);
        assert_eq!(told("/ac"), ["/a true", "~ b$ false", "~* A+ true"]);
        assert_eq!(told("/x"), ["/ true", "~ b$ false", "~* A+ false"]);
        assert_eq!(told("/static/b"), ["^~ /static/ true"]);
    }

    #[test]
    fn a_path_may_have_no_location() {
        assert!(chooser(&["/a"]).choose(b"/b").is_none());
        assert!(chooser(&["/a"]).choose(b"\xff").is_none());
        assert!(chooser(&[]).is_empty());
    }
}
