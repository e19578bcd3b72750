//! `X-Forwarded-*`: what the gateway saw itself, unless the peer is one whose word counts (`apisix.trusted_addresses`).
//!
//! Done before the router and any plugin look at the request, so that all of them see values that can be believed, and
//! what a plugin sets afterwards reaches the node. What the client sent stays in `$original_x_forwarded_*`.

use ipnet::IpNet;
use smallvec::SmallVec;

use crate::exchange::{Exchange, SERVER_NAME};

/// The fields, in lower case, and where what the client sent is kept.
const FIELDS: [(&str, &str); 5] = [
    ("x-forwarded-for", "original_x_forwarded_for"),
    ("x-forwarded-proto", "original_x_forwarded_proto"),
    ("x-forwarded-host", "original_x_forwarded_host"),
    ("x-forwarded-port", "original_x_forwarded_port"),
    ("forwarded", "original_forwarded"),
];

/// `trusted`: empty when nobody is told apart; then `X-Forwarded-For` is kept and added to, as APISIX always did.
pub(super) fn apply(trusted: &[IpNet], x: &mut Exchange) {
    let peer = x.conn.peer.ip();
    let vouched = trusted.iter().any(|net| net.contains(&peer));
    if FIELDS.iter().any(|(name, _)| x.request.headers.contains(name)) {
        keep_originals(x);
        let keeps_for = trusted.is_empty();
        x.request.headers.retain(|name, value| match field(name) {
            None => true,
            Some(_) if vouched => !value.is_empty(),
            Some(at) => at == 0 && keeps_for,
        });
        if vouched {
            return complete(x);
        }
    }
    add_all(x);
}

/// All of them, nearly always the same as for the connection's last request.
fn add_all(x: &mut Exchange) {
    if x.conn.last_host.forward(&mut x.request.headers) {
        return;
    }
    let before = x.request.headers.len();
    add(x, [true; 3]);
    let headers = &x.request.headers;
    if let Some(field) = headers.get("host") {
        x.conn.last_host.remember_forwarded(field, headers.iter().skip(before));
    }
}

/// Adds what a trusted peer did not say.
fn complete(x: &mut Exchange) {
    let missing = [1, 2, 3].map(|at: usize| !x.request.headers.contains(FIELDS[at].0));
    add(x, missing);
}

/// Adds scheme, host and port as the gateway sees them, where `missing` says so.
fn add(x: &mut Exchange, missing: [bool; 3]) {
    if missing[0] {
        let scheme = x.scheme();
        x.request.headers.append("X-Forwarded-Proto", scheme);
    }
    let non_empty = |host: &&[u8]| !host.is_empty();
    let host = x.request.headers.get("host").filter(non_empty).or(Some(&x.request.host[..]).filter(non_empty));
    // What `$host` is, then.
    let host: SmallVec<[u8; 64]> = SmallVec::from_slice(host.unwrap_or(SERVER_NAME));
    if missing[1] {
        x.request.headers.append("X-Forwarded-Host", &host);
    }
    if missing[2] {
        // Nothing is printed yet: the buffer is free.
        let mut port = std::mem::take(&mut x.printed);
        port.clear();
        x.port_of(&host, &mut port);
        x.request.headers.append("X-Forwarded-Port", &port);
        port.clear();
        x.printed = port;
    }
}

fn field(name: &[u8]) -> Option<usize> {
    if !matches!(name.len(), 9 | 15..=17) {
        return None;
    }
    FIELDS.iter().position(|(known, _)| name.eq_ignore_ascii_case(known.as_bytes()))
}

fn keep_originals(x: &mut Exchange) {
    for (name, variable) in FIELDS {
        if let Some(value) = x.request.headers.get(name) {
            x.custom_vars.push((variable.into(), value.to_vec()));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{rc::Rc, sync::Arc};

    use super::*;
    use crate::exchange::{Connection, Var};

    fn applied(trusted: &[&str], fields: &[(&str, &str)]) -> Exchange {
        let conn = Connection::new(1, "127.0.0.1:5000".parse().unwrap(), "127.0.0.1:1984".parse().unwrap());
        let mut x = Exchange::new(Rc::new(conn), Arc::default());
        x.request.host.extend_from_slice(b"localhost");
        fields.iter().for_each(|(n, v)| x.request.headers.append(n, v));
        let trusted: Vec<IpNet> = trusted.iter().map(|t| t.parse().unwrap()).collect();
        apply(&trusted, &mut x);
        x
    }

    fn seen(x: &Exchange) -> String {
        FIELDS
            .iter()
            .map(|(n, _)| format!("{:?} ", x.request.headers.get(n).map(|v| v.escape_ascii().to_string())))
            .collect()
    }

    const SENT: [(&str, &str); 5] = [
        ("X-Forwarded-For", "1.2.3.4"),
        ("X-Forwarded-Proto", "https"),
        ("X-Forwarded-Host", "example.com"),
        ("X-Forwarded-Port", "8443"),
        ("Forwarded", "for=1.2.3.4"),
    ];

    #[test]
    fn without_trust_only_the_list_of_addresses_is_kept() {
        let x = applied(&[], &SENT);
        assert_eq!(seen(&x), r#"Some("1.2.3.4") Some("http") Some("localhost") Some("1984") None "#);
        let original = x.var(&Var::parse("original_x_forwarded_proto"), &mut Vec::new()).map(<[u8]>::to_vec);
        assert_eq!(original.as_deref(), Some(&b"https"[..]));
    }

    #[test]
    fn a_peer_outside_of_the_trusted_loses_all_and_one_inside_nothing() {
        let x = applied(&["10.0.0.0/8"], &SENT);
        assert_eq!(seen(&x), r#"None Some("http") Some("localhost") Some("1984") None "#);
        let original = x.var(&Var::parse("original_x_forwarded_for"), &mut Vec::new()).map(<[u8]>::to_vec);
        assert_eq!(original.as_deref(), Some(&b"1.2.3.4"[..]));
        let x = applied(&["10.0.0.0/8", "127.0.0.0/24"], &SENT);
        assert_eq!(seen(&x), r#"Some("1.2.3.4") Some("https") Some("example.com") Some("8443") Some("for=1.2.3.4") "#);
    }

    #[test]
    fn a_request_without_a_host_came_to_the_servers_name() {
        let mut x = applied(&[], &[]);
        x.request.headers.retain(|_, _| false);
        x.request.host.clear();
        apply(&[], &mut x);
        assert_eq!(seen(&x), r#"None Some("http") Some("_") Some("1984") None "#);
    }

    #[test]
    fn a_trusted_peer_that_says_nothing_gets_what_was_seen() {
        let x = applied(&["127.0.0.1/32"], &[("Host", "Example.COM:8443"), ("X-Forwarded-Proto", "")]);
        assert_eq!(seen(&x), r#"None Some("http") Some("Example.COM:8443") Some("8443") None "#);
    }
}
