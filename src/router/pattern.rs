//! What a uri says: a path, a prefix, or a pattern with `:name` and `*name`.

use smallvec::SmallVec;

/// Steps that one match of a pattern may take. Several `*` in a row multiply their choices, and the path comes from the
/// network; no pattern that means something needs more.
const MAX_STEPS: u32 = 4096;

/// The name under which a `*` without a name captures.
const UNNAMED: &str = ":ext";

/// What stands in the path for a piece of a pattern, by the piece's number. Empty it is not allocated, and a match is small to move.
pub(super) type Captures = Vec<(u32, SmallVec<[u8; 32]>)>;

pub(super) enum Shape {
    Exact,
    /// The uri without its last byte, a star, is what the path must start with.
    Prefix,
    /// The path starts with what stands before the first mark and goes on as the pattern says.
    Pattern(Pattern),
}

/// What follows the fixed part. One piece is the rule, and lies in the rule itself.
pub(super) struct Pattern {
    pieces: SmallVec<[Piece; 1]>,
}

enum Piece {
    Text(Box<[u8]>),
    /// `:name`: a segment, not empty.
    Segment(Box<str>),
    /// `*name`: anything, slashes too, as much as possible.
    Rest(Box<str>),
}

impl Shape {
    /// The shape of a uri, and the part of it that a path must start with, or be. `params`: whether `:name` is a
    /// parameter. Both marks count only where a segment starts, and a star at the end.
    pub fn of(uri: &str, params: bool) -> (Shape, &str) {
        let mut marks = Marks { uri, at: 0, params };
        let end = uri.strip_suffix('*');
        match (marks.next(), end) {
            (None, None) => (Shape::Exact, uri),
            (None, Some(prefix)) => (Shape::Prefix, prefix),
            (Some(first), Some(prefix)) if first == prefix.len() => (Shape::Prefix, prefix),
            (Some(first), _) => {
                let pieces = pieces(&uri[first..], params);
                (Shape::Pattern(Pattern { pieces }), &uri[..first])
            }
        }
    }
}

/// Where segments start with a mark.
struct Marks<'a> {
    uri: &'a str,
    at: usize,
    params: bool,
}

impl Iterator for Marks<'_> {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let bytes = self.uri.as_bytes();
        while self.at < bytes.len() {
            let at = self.at;
            self.at += 1;
            let starts_segment = at == 0 || bytes[at - 1] == b'/';
            if starts_segment && (bytes[at] == b'*' || (self.params && bytes[at] == b':')) {
                return Some(at);
            }
        }
        None
    }
}

/// The pieces of what starts with a mark.
fn pieces(text: &str, params: bool) -> SmallVec<[Piece; 1]> {
    let mut pieces = SmallVec::new();
    let mut done = 0;
    for mark in (Marks { uri: text, at: 0, params }) {
        if mark > done {
            pieces.push(Piece::Text(text.as_bytes()[done..mark].into()));
        }
        done = text[mark..].find('/').map_or(text.len(), |slash| mark + slash);
        let name = &text[mark + 1..done];
        pieces.push(match (text.as_bytes()[mark], name) {
            (b'*', "") => Piece::Rest(UNNAMED.into()),
            (b'*', name) => Piece::Rest(name.into()),
            (_, name) => Piece::Segment(name.into()),
        });
    }
    match text[done..].strip_suffix('*') {
        Some(last) => {
            pieces.push(Piece::Text(last.as_bytes().into()));
            pieces.push(Piece::Rest(UNNAMED.into()));
        }
        None if done < text.len() => pieces.push(Piece::Text(text.as_bytes()[done..].into())),
        None => {}
    }
    pieces
}

/// A piece's number and where its capture lies.
type Spans = SmallVec<[(usize, usize, usize); 4]>;

impl Pattern {
    pub fn captures(&self, path: &[u8]) -> Option<Captures> {
        let mut spans = Spans::new();
        let mut steps = MAX_STEPS;
        if !matches(&self.pieces, 0, path, 0, &mut spans, &mut steps) {
            return None;
        }
        Some(spans.iter().map(|&(piece, from, to)| (piece as u32, SmallVec::from_slice(&path[from..to]))).collect())
    }

    /// The name of a piece that captures.
    pub fn name(&self, piece: u32) -> &str {
        match self.pieces.get(piece as usize) {
            Some(Piece::Segment(name) | Piece::Rest(name)) => name,
            Some(Piece::Text(_)) | None => "",
        }
    }
}

/// Whether the pieces from `next` on match `path[at..]`.
fn matches(pieces: &[Piece], mut next: usize, path: &[u8], mut at: usize, spans: &mut Spans, steps: &mut u32) -> bool {
    while let Some(piece) = pieces.get(next) {
        if *steps == 0 {
            return false;
        }
        *steps -= 1;
        match piece {
            Piece::Text(text) if path[at..].starts_with(text) => at += text.len(),
            Piece::Text(_) => return false,
            Piece::Segment(_) => {
                let end = memchr::memchr(b'/', &path[at..]).map_or(path.len(), |slash| at + slash);
                if end == at {
                    return false;
                }
                spans.push((next, at, end));
                at = end;
            }
            Piece::Rest(_) => return matches_rest(pieces, next, path, at, spans, steps),
        }
        next += 1;
    }
    at == path.len()
}

/// Gives the star all that is left, and less and less until what follows it fits. That starts with a slash.
fn matches_rest(pieces: &[Piece], star: usize, path: &[u8], at: usize, spans: &mut Spans, steps: &mut u32) -> bool {
    let mut end = path.len();
    let known = spans.len();
    while *steps > 0 {
        *steps -= 1;
        spans.push((star, at, end));
        if matches(pieces, star + 1, path, end, spans, steps) {
            return true;
        }
        spans.truncate(known);
        match memchr::memrchr(b'/', &path[at..end]) {
            Some(slash) => end = at + slash,
            None => return false,
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The captures as `name=value,…`; `-` for no match.
    fn try_match(uri: &str, path: &str) -> String {
        let (shape, fixed) = Shape::of(uri, true);
        let captures = match &shape {
            Shape::Exact => (path == uri).then(Captures::new),
            Shape::Prefix => path.starts_with(fixed).then(Captures::new),
            Shape::Pattern(pattern) => path.strip_prefix(fixed).and_then(|rest| pattern.captures(rest.as_bytes())),
        };
        match captures {
            None => "-".into(),
            Some(all) => {
                let name = |piece| if let Shape::Pattern(pattern) = &shape { pattern.name(piece) } else { "" };
                let shown = all.iter().map(|(piece, value)| format!("{}={}", name(*piece), value.escape_ascii()));
                shown.collect::<Vec<_>>().join(",")
            }
        }
    }

    #[test]
    fn patterns_capture() {
        let cases = [
            ("/a", "/a", ""),
            ("/a", "/ab", "-"),
            ("/a*", "/ab", ""),
            ("/a/*", "/a/", ""),
            ("/a/*", "/a", "-"),
            ("/name/:name/bar", "/name/json/bar", "name=json"),
            ("/name/:name/bar", "/name//bar", "-"),
            ("/name/:name/bar", "/name/json/", "-"),
            ("/name/:name/bar", "/name/json/bar/x", "-"),
            ("/:name/foo", "/json/foo", "name=json"),
            ("/:name/foo", "/json/bbb/foo", "-"),
            ("/blog/:name", "/blog/a%2Fb", "name=a%2Fb"),
            ("/u/:user/*action", "/u/jo/get/all", "user=jo,action=get/all"),
            ("/u/:user/*action", "/u/jo/", "user=jo,action="),
            ("/u/:user/*", "/u/jo/x", "user=jo,:ext=x"),
            ("/u/:user/x*", "/u/jo/xyz", "user=jo,:ext=yz"),
            ("/*all/end", "/a/b/end", "all=a/b"),
            ("/*all/end", "/a/end/b", "-"),
            ("/*a/x/*b", "/1/x/2/x/3", "a=1/x/2,b=3"),
            ("/file:list", "/file:list", ""),
            ("/file:list", "/file:x", "-"),
        ];
        for (uri, path, expected) in cases {
            assert_eq!(try_match(uri, path), expected, "{uri} against {path}");
        }
    }

    #[test]
    fn a_colon_is_text_without_parameters() {
        assert!(matches!(Shape::of("/do/:x", false), (Shape::Exact, "/do/:x")));
        assert!(matches!(Shape::of("/do/*/x", false), (Shape::Pattern(_), "/do/")));
    }

    #[test]
    fn many_stars_end_soon() {
        let path = "/a".repeat(2000);
        assert_eq!(try_match("/*a/a/*b/a/*c/a/*d/a/*e/b", &path), "-");
    }
}
