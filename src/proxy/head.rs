//! The request's head as the upstream gets it.

use crate::{
    conf::locations::Location,
    error::{Error, Result},
    exchange::{
        Exchange, Headers,
        headers::{append_all, has_break, same_name},
    },
    model::upstream::{Node, PassHost, Upstream},
};

/// How the body that follows is framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BodyFraming {
    None,
    Length(u64),
    Chunked,
}

/// Writes the head. `websocket`: the upgrade goes on to the node.
///
/// A line break in what a plugin set would be a field, or a request, of its own: such a head is refused.
pub(super) fn write(x: &Exchange, node: &Node, body: BodyFraming, websocket: bool, out: &mut Vec<u8>) -> Result<()> {
    if let Some(location) = x.location.clone() {
        return write_for_location(x, &location, body, out);
    }
    let start = out.len();
    let request = &x.request;
    let method = if x.upstream.method.is_empty() { &request.method } else { &x.upstream.method };
    append_all(out, [method, b" "]);
    target(x, out);
    let line = out.len();
    out.extend_from_slice(b" HTTP/1.1\r\nHost: ");
    let host_at = out.len();
    host(x, node, out);
    if has_break(&out[start..line]) || has_break(&out[host_at..]) {
        out.truncate(start);
        return Err(Error::script("refused to send a line break or a NUL inside the request's head to the upstream"));
    }
    out.extend_from_slice(b"\r\nX-Real-IP: ");
    x.append_remote(out);
    out.extend_from_slice(b"\r\nX-Forwarded-For: ");
    x.forwarded_for(out);
    out.extend_from_slice(b"\r\n");
    fields(&request.headers, websocket, out);
    match body {
        BodyFraming::None => {}
        BodyFraming::Length(n) => {
            append_all(out, [b"Content-Length: ", itoa::Buffer::new().format(n).as_bytes(), b"\r\n"]);
        }
        BodyFraming::Chunked => out.extend_from_slice(b"Transfer-Encoding: chunked\r\n"),
    }
    if websocket {
        out.extend_from_slice(b"Connection: upgrade\r\n");
    }
    out.extend_from_slice(b"\r\n");
    Ok(())
}

/// As nginx's proxy_pass has it: HTTP/1.0 and no connection kept unless the location says so, no field of our own.
fn write_for_location(x: &Exchange, location: &Location, body: BodyFraming, out: &mut Vec<u8>) -> Result<()> {
    let start = out.len();
    let own = |name: &str| location.directives.proxy_set_header.iter().any(|(own, _)| own.eq_ignore_ascii_case(name));
    // HTTP/1.0 has no chunks.
    let http11 = location.directives.proxy_http11 || body == BodyFraming::Chunked;
    append_all(out, [&x.request.method, b" "]);
    target(x, out);
    let line = out.len();
    out.extend_from_slice(if http11 { b" HTTP/1.1\r\n" } else { b" HTTP/1.0\r\n" });
    let mut sound = !has_break(&out[start..line]);
    let mut put = |name: &str, value: &[u8]| {
        sound &= !has_break(name.as_bytes()) && !has_break(value);
        if sound && !value.is_empty() {
            append_all(out, [name.as_bytes(), b": ", value, b"\r\n"]);
        }
    };
    if !own("host") {
        put("Host", &x.upstream.host);
    }
    if !own("connection") {
        put("Connection", b"close");
    }
    for (name, value) in &location.directives.proxy_set_header {
        let mut text = Vec::new();
        x.fill(value, &mut text);
        put(name, &text);
    }
    if !sound {
        out.truncate(start);
        return Err(Error::script("refused to send a line break or a NUL inside the request's head to the upstream"));
    }
    match body {
        BodyFraming::None => {}
        BodyFraming::Length(n) => {
            append_all(out, [b"Content-Length: ", itoa::Buffer::new().format(n).as_bytes(), b"\r\n"]);
        }
        BodyFraming::Chunked => out.extend_from_slice(b"Transfer-Encoding: chunked\r\n"),
    }
    x.request.headers.write_to(out, |name, value| {
        let named = std::str::from_utf8(name).is_ok_and(own);
        !named && (!is_dropped(name, value, false) || matches!(name.len(), 9 | 15))
    });
    out.extend_from_slice(b"\r\n");
    Ok(())
}

/// A plugin's URI, a URI that Lua changed, or the client's as it came.
fn target(x: &Exchange, out: &mut Vec<u8>) {
    let request = &x.request;
    if !x.upstream.uri.is_empty() {
        return safe(&x.upstream.uri, out);
    }
    if request.uri_changed {
        escape_path(&request.path, out);
        if !request.args.is_empty() {
            out.push(b'?');
            safe(&request.args, out);
        }
        return;
    }
    out.extend_from_slice(origin_form(&request.target));
}

/// `http://host/path` becomes `/path` (RFC 9112, 3.2.2): the host goes in its field.
fn origin_form(target: &[u8]) -> &[u8] {
    if target.starts_with(b"/") || target == b"*" {
        return target;
    }
    let Some(scheme) = target.windows(3).position(|w| w == b"://") else { return target };
    let rest = &target[scheme + 3..];
    match rest.iter().position(|b| matches!(b, b'/' | b'?')) {
        Some(at) if rest[at] == b'/' => &rest[at..],
        _ => b"/",
    }
}

/// What a script wrote must not end the line.
fn safe(text: &[u8], out: &mut Vec<u8>) {
    for b in text {
        match b {
            0..=0x20 | 0x7f => escape(*b, out),
            b => out.push(*b),
        }
    }
}

/// A decoded path as it stands in a target.
pub(super) fn escape_path(path: &[u8], out: &mut Vec<u8>) {
    for b in path {
        match b {
            b'/' | b'-' | b'.' | b'_' | b'~' | b'!' | b'$' | b'&' | b'\'' | b'(' | b')' | b'*' | b'+' | b',' | b';'
            | b'=' | b':' | b'@' => out.push(*b),
            b if b.is_ascii_alphanumeric() => out.push(*b),
            b => escape(*b, out),
        }
    }
}

fn escape(b: u8, out: &mut Vec<u8>) {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    out.extend_from_slice(&[b'%', HEX[usize::from(b >> 4)], HEX[usize::from(b & 15)]]);
}

/// A plugin's host, or what `pass_host` says.
fn host(x: &Exchange, node: &Node, out: &mut Vec<u8>) {
    if !x.upstream.host.is_empty() {
        return safe(&x.upstream.host, out);
    }
    match x.upstream.conf.as_deref().map(|u: &Upstream| (&u.pass_host, u.scheme)) {
        Some((PassHost::Rewrite(host), _)) => out.extend_from_slice(host.as_bytes()),
        Some((PassHost::Node, scheme)) => {
            let is_v6 = node.host.contains(':');
            out.extend_from_slice(if is_v6 { b"[" } else { b"" });
            out.extend_from_slice(node.host.as_bytes());
            out.extend_from_slice(if is_v6 { b"]" } else { b"" });
            if node.explicit_port && node.port != scheme.default_port() {
                out.push(b':');
                out.extend_from_slice(itoa::Buffer::new().format(node.port).as_bytes());
            }
        }
        _ => out.extend_from_slice(client_host(x)),
    }
}

/// The Host field as it came; HTTP/2 and HTTP/1.0 may bring it elsewhere or not at all.
fn client_host(x: &Exchange) -> &[u8] {
    x.request.headers.get("host").unwrap_or(&x.request.host)
}

/// The client's fields, without those that are about its own connection (RFC 9110, 7.6.1) or written anew.
fn fields(headers: &Headers, websocket: bool, out: &mut Vec<u8>) {
    let lists = headers.get("connection").is_some_and(|list| !names_nothing(list));
    headers.write_to(out, |name, value| {
        !(is_dropped(name, value, websocket) || lists && is_listed(headers, name, websocket))
    });
}

fn is_dropped(name: &[u8], value: &[u8], websocket: bool) -> bool {
    let is = |other: &str| same_name(name, other.as_bytes());
    match name.len() {
        2 => is("te") && !value.eq_ignore_ascii_case(b"trailers"),
        4 => is("host"),
        6 => is("expect"),
        7 => is("upgrade") && !websocket,
        9 => is("x-real-ip"),
        10 => is("connection") || is("keep-alive"),
        14 => is("content-length"),
        15 => is("x-forwarded-for"),
        16 => is("proxy-connection"),
        17 => is("transfer-encoding"),
        _ => false,
    }
}

fn names_nothing(connection: &[u8]) -> bool {
    connection.eq_ignore_ascii_case(b"keep-alive") || connection.eq_ignore_ascii_case(b"close")
}

/// Whether `Connection` names the field. Those that the gateway vouches for stay whatever a client says.
fn is_listed(headers: &Headers, name: &[u8], websocket: bool) -> bool {
    let stays = name.get(..12).is_some_and(|start| start.eq_ignore_ascii_case(b"x-forwarded-"))
        || (websocket && name.eq_ignore_ascii_case(b"upgrade"));
    let mut tokens = headers.get_all(b"connection").flat_map(|list| list.split(|b| *b == b','));
    !stays && tokens.any(|token| token.trim_ascii().eq_ignore_ascii_case(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_become_origin_form() {
        for (target, expected) in [
            (&b"/a?b"[..], &b"/a?b"[..]),
            (b"*", b"*"),
            (b"http://h/a?b", b"/a?b"),
            (b"http://h", b"/"),
            (b"http://h?x", b"/"),
        ] {
            assert_eq!(origin_form(target), expected);
        }
    }

    #[test]
    fn what_scripts_write_cannot_end_the_line() {
        let mut out = Vec::new();
        safe(b"/a b\r\nX: y", &mut out);
        assert_eq!(out, b"/a%20b%0D%0AX:%20y");
        out.clear();
        escape_path("/ä b?".as_bytes(), &mut out);
        assert_eq!(out, b"/%C3%A4%20b%3F");
    }

    #[test]
    fn fields_of_the_connection_stay_behind() {
        let mut headers = Headers::new();
        for (name, value) in
            [("Host", "h"), ("Connection", "close, X-Hop"), ("X-Hop", "1"), ("TE", "trailers"), ("X-Keep", "2")]
        {
            headers.append(name, value);
        }
        let mut out = Vec::new();
        headers.append("Connection", "X-Late, X-Forwarded-Proto");
        headers.append("X-Late", "1");
        headers.append("X-Forwarded-Proto", "http");
        fields(&headers, false, &mut out);
        assert_eq!(out, b"TE: trailers\r\nX-Keep: 2\r\nX-Forwarded-Proto: http\r\n");
    }
}
