//! `normalize_uri_like_servlet`: a segment's `;parameters` are no part of the path that routes and plugins see. The node
//! gets the target as it came.

/// Cuts the parameters off. `false`: the path is one that servlet containers refuse, since `/..;/` would mean different
/// places before and after.
pub(super) fn normalize(path: &mut Vec<u8>) -> bool {
    if memchr::memchr(b';', path).is_none() {
        return true;
    }
    let mut out = Vec::with_capacity(path.len());
    let mut segments = path.strip_prefix(b"/").unwrap_or(path).split(|b| *b == b'/').peekable();
    while let Some(segment) = segments.next() {
        out.push(b'/');
        let Some(at) = memchr::memchr(b';', segment) else {
            out.extend_from_slice(segment);
            continue;
        };
        let name = &segment[..at];
        if matches!(name, b"." | b"..") || (name.is_empty() && segments.peek().is_some()) {
            return false;
        }
        out.extend_from_slice(name);
    }
    *path = out;
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_parameters_and_refuses_what_is_ambiguous() {
        for (path, want) in [
            ("/a/b", Some("/a/b")),
            ("/hello;world", Some("/hello")),
            ("/hello;a=b/world;a/;", Some("/hello/world/")),
            ("/;/a", None),
            ("/b/;/c", None),
            ("/.;", None),
            ("/..;", None),
        ] {
            let mut bytes = path.as_bytes().to_vec();
            let got = normalize(&mut bytes).then(|| String::from_utf8(bytes).unwrap());
            assert_eq!(got.as_deref(), want, "{path}");
        }
    }
}
