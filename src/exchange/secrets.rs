//! Which fields and arguments hold what is nobody's business: of them a trace shows how long they are, and no more.

use super::posted::unescape;

/// Names of fields that carry credentials without saying so.
const FIELDS: [&str; 3] = ["cookie", "setcookie", "xforwardedclientcert"];

/// What the whole name is, or a part of it, in lower case and without `-`, `_`, `.`: `X-API-KEY`, `access_token`, `client-secret`.
const WHOLE: [&str; 10] = ["auth", "code", "key", "pass", "pin", "pwd", "sid", "sig", "sign", "state"];
const PARTS: [&str; 15] = [
    "accesskey",
    "apikey",
    "assertion",
    "authorization",
    "credential",
    "jwt",
    "otp",
    "passphrase",
    "passwd",
    "password",
    "privatekey",
    "secret",
    "session",
    "signature",
    "token",
];

/// Names of more of them, as config.yaml has them.
pub type Named = [Box<str>];

/// Whether the name of a header field or of an argument is that of a secret.
pub fn is_secret(name: &[u8], named: &Named) -> bool {
    let plain: String =
        name.iter().filter(|b| b.is_ascii_alphanumeric()).map(|b| char::from(b.to_ascii_lowercase())).collect();
    let is_named = || named.iter().any(|own| own.as_bytes().eq_ignore_ascii_case(name));
    WHOLE.contains(&&*plain) || FIELDS.contains(&&*plain) || PARTS.iter().any(|part| plain.contains(part)) || is_named()
}

/// A query without its secrets: `a=1&token=(8 bytes)`.
pub fn masked_query(query: &[u8], named: &Named) -> String {
    let argument = |text: &[u8]| {
        let shown = String::from_utf8_lossy(text);
        let Some(equals) = text.iter().position(|b| *b == b'=') else { return shown.into_owned() };
        let (name, value) = (&text[..equals], &text[equals + 1..]);
        // A key may stand in brackets, and a name be hidden by percents.
        match is_secret(&unescape(name), named) {
            true => format!("{}=({} bytes)", String::from_utf8_lossy(name), value.len()),
            false => shown.into_owned(),
        }
    };
    query.split(|b| *b == b'&').map(argument).collect::<Vec<_>>().join("&")
}

/// A path with a query, or a field's value that may be one, without the query's secrets and those of a user before a host.
pub fn masked_target(target: &[u8], named: &Named) -> String {
    let end = target.iter().position(|b| *b == b'?').unwrap_or(target.len());
    let path = without_user(&String::from_utf8_lossy(&target[..end]));
    match target.get(end + 1..) {
        Some(query) => format!("{path}?{}", masked_query(query, named)),
        None => path,
    }
}

/// `http://user:password@host/` without what stands before the `@`.
fn without_user(text: &str) -> String {
    let Some(start) = text.find("://").map(|at| at + 3) else { return text.into() };
    let end = text[start..].find('/').map_or(text.len(), |at| start + at);
    match text[start..end].rfind('@') {
        Some(at) => format!("{}({at} bytes){}", &text[..start], &text[start + at..]),
        None => text.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_what_is_secret() {
        for name in [
            "Authorization",
            "proxy-authorization",
            "X-API-KEY",
            "apikey",
            "api_key",
            "access_token",
            "X-Auth-Token",
            "client-secret",
            "Cookie",
            "set-cookie",
            "key",
            "sig",
            "X-Amz-Signature",
            "jwt",
            "user[password]",
            "PHPSESSIONID",
            "X-Mine",
        ] {
            assert!(is_secret(name.as_bytes(), &["x-mine".into()]), "{name}");
        }
        for name in ["host", "x-forwarded-for", "accept", "keyword", "author", "signal", "page", "", "x-mines"] {
            assert!(!is_secret(name.as_bytes(), &["x-mine".into()]), "{name}");
        }
    }

    #[test]
    fn queries_are_shown_without_values_of_secrets() {
        for (target, shown) in [
            ("/a", "/a"),
            ("/a?", "/a?"),
            ("/a?b=1&token=abc&c", "/a?b=1&token=(3 bytes)&c"),
            ("/a?%74oken=abc&apikey=", "/a?%74oken=(3 bytes)&apikey=(0 bytes)"),
            ("/a?token=a=b&&=x", "/a?token=(3 bytes)&&=x"),
            ("/a?b=1?token=2", "/a?b=1?token=2"),
            ("http://u:p@h/x?key=1", "http://(3 bytes)@h/x?key=(1 bytes)"),
            ("http://h/a@b", "http://h/a@b"),
        ] {
            assert_eq!(masked_target(target.as_bytes(), &[]), shown);
        }
    }
}
