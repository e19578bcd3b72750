//! What a request's body says by name: the variables `post_arg_x` (of a form) and `post_arg.x` (of a form, JSON or multipart).

use serde_json::Value;

use crate::expr::path::Path;

/// Fields of a form or a multipart body: the rest is not looked at.
const MAX_FIELDS: usize = 1000;

/// A body, read for its names.
#[derive(Debug)]
pub enum Posted {
    /// Names and values, decoded, in their order.
    Form(Vec<(Vec<u8>, Vec<u8>)>),
    Multipart(Vec<(Vec<u8>, Vec<u8>)>),
    Json(Value),
    /// A body of another kind, or none.
    Nothing,
}

impl Posted {
    /// The value that `post_arg_NAME` has.
    pub fn field(&self, name: &str) -> Option<&[u8]> {
        match self {
            Posted::Form(fields) => find(fields, name),
            _ => None,
        }
    }

    /// The value that `post_arg.PATH` has.
    pub fn at(&self, path: &str) -> Option<Vec<u8>> {
        match self {
            Posted::Form(fields) | Posted::Multipart(fields) => find(fields, path).map(<[u8]>::to_vec),
            Posted::Json(json) => Path::parse(path)?.text(json),
            Posted::Nothing => None,
        }
    }
}

fn find<'a>(fields: &'a [(Vec<u8>, Vec<u8>)], name: &str) -> Option<&'a [u8]> {
    fields.iter().find(|(known, _)| known == name.as_bytes()).map(|(_, value)| &value[..])
}

/// `a=1&b=x+y`
pub fn form(body: &[u8]) -> Posted {
    let decode = |text: &[u8]| unescape(text);
    let pairs = body.split(|b| *b == b'&').filter(|pair| !pair.is_empty()).take(MAX_FIELDS);
    Posted::Form(
        pairs
            .map(|pair| match memchr::memchr(b'=', pair) {
                Some(at) => (decode(&pair[..at]), decode(&pair[at + 1..])),
                None => (decode(pair), Vec::new()),
            })
            .collect(),
    )
}

/// Decodes `%XX` and `+`; malformed escapes stay.
pub fn unescape(text: &[u8]) -> Vec<u8> {
    let digit = |at: usize| text.get(at).and_then(|b| (*b as char).to_digit(16));
    let mut out = Vec::with_capacity(text.len());
    let mut at = 0;
    while at < text.len() {
        match (text[at], digit(at + 1), digit(at + 2)) {
            (b'%', Some(high), Some(low)) => {
                out.push((high * 16 + low) as u8);
                at += 2;
            }
            (b'+', ..) => out.push(b' '),
            (b, ..) => out.push(b),
        }
        at += 1;
    }
    out
}

/// The fields of a `multipart/form-data` body (RFC 7578). Lines that end in a line feed alone are taken, too: nothing is passed on
/// that was made of them.
pub fn multipart(content_type: &str, body: &[u8]) -> Posted {
    let boundary = content_type.split(';').find_map(|part| part.trim().strip_prefix("boundary="));
    let Some(boundary) = boundary.map(|b| b.trim_matches('"')).filter(|b| !b.is_empty()) else {
        return Posted::Nothing;
    };
    let delimiter = format!("--{boundary}");
    let finder = memchr::memmem::Finder::new(delimiter.as_bytes());
    // A delimiter is a line of its own: what only looks like one within a value is the value's.
    let is_line = |at: &usize| {
        let begins = *at == 0 || body[at - 1] == b'\n';
        begins && matches!(body.get(at + delimiter.len()), None | Some(b'\r' | b'\n' | b'-' | b' ' | b'\t'))
    };
    let starts = finder.find_iter(body).filter(is_line).map(|at| at + delimiter.len());
    let mut starts = starts.take(MAX_FIELDS + 1).peekable();
    let mut fields = Vec::new();
    while let (Some(from), Some(next)) = (starts.next(), starts.peek()) {
        fields.extend(part(&body[from..next - delimiter.len()]));
    }
    Posted::Multipart(fields)
}

/// A part, from behind its delimiter to the next one.
fn part(text: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let text = line_end(text).map_or(text, |n| &text[n..]);
    let (head, body) = ["\r\n\r\n", "\n\n"].iter().find_map(|end| {
        let at = memchr::memmem::find(text, end.as_bytes())?;
        Some((&text[..at], &text[at + end.len()..]))
    })?;
    let head = String::from_utf8_lossy(head);
    let disposition = head.lines().find(|line| line.to_ascii_lowercase().starts_with("content-disposition:"))?;
    let name = disposition.split(';').find_map(|item| item.trim().strip_prefix("name="))?.trim_matches('"');
    let body = body.strip_suffix(b"\n").unwrap_or(body);
    Some((name.into(), body.strip_suffix(b"\r").unwrap_or(body).to_vec()))
}

fn line_end(text: &[u8]) -> Option<usize> {
    ["\r\n", "\n"].iter().find(|end| text.starts_with(end.as_bytes())).map(|end| end.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_are_decoded_and_the_first_of_a_name_counts() {
        let form = form(b"a=1&b+c=x%2fy%&a=2&&d");
        assert_eq!(form.field("a"), Some(&b"1"[..]));
        assert_eq!(form.at("b c").as_deref(), Some(&b"x/y%"[..]));
        assert_eq!(form.field("d"), Some(&b""[..]));
        assert_eq!(form.field("e"), None);
    }

    #[test]
    fn multipart_fields_are_found() {
        let body = |nl: &str| {
            [
                "--B",
                "Content-Disposition: form-data; name=\"m\"",
                "",
                "one\ntwo",
                "--B",
                "content-disposition: form-data; \
              name=f; filename=\"x\"",
                "Content-Type: text/plain",
                "",
                "",
                "--B--",
                "",
            ]
            .join(nl)
        };
        for nl in ["\r\n", "\n"] {
            let posted = multipart("multipart/form-data; boundary=\"B\"", body(nl).as_bytes());
            assert_eq!(posted.at("m").as_deref(), Some(&b"one\ntwo"[..]));
            assert_eq!(posted.at("f").as_deref(), Some(&b""[..]));
            assert_eq!((posted.at("x"), posted.field("m")), (None, None));
        }
        for kind in ["multipart/form-data", "multipart/form-data; boundary="] {
            assert!(matches!(multipart(kind, body("\n").as_bytes()), Posted::Nothing));
        }
        // Nothing within a value begins a part, whatever it looks like.
        let sly = "--B\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\nx--B\r\nContent-Disposition: form-data; \
                   name=\"role\"\r\n\r\nadmin\r\n--Bfoo\r\n--B--\r\n";
        let posted = multipart("m; boundary=B", sly.as_bytes());
        assert!(posted.at("a").is_some_and(|a| a.starts_with(b"x--B")) && posted.at("role").is_none());
        assert!(matches!(multipart("m; boundary=B", b"--B"), Posted::Multipart(fields) if fields.is_empty()));
    }

    #[test]
    fn only_so_many_fields_are_read() {
        let names: Vec<String> = (0..=MAX_FIELDS).map(|n| format!("n{n}=1")).collect();
        let posted = form(names.join("&").as_bytes());
        let last = MAX_FIELDS - 1;
        assert!(posted.field(&format!("n{last}")).is_some() && posted.field(&format!("n{MAX_FIELDS}")).is_none());
        let part = |n: usize| format!("--B\r\nContent-Disposition: form-data; name=\"n{n}\"\r\n\r\nv\r\n");
        let body: String = (0..=MAX_FIELDS).map(part).collect();
        let posted = multipart("m; boundary=B", format!("{body}--B--").as_bytes());
        assert!(posted.at(&format!("n{last}")).is_some() && posted.at(&format!("n{MAX_FIELDS}")).is_none());
    }
}
