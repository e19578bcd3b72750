//! A request's head: bytes in, a `Request` out, or the reason to refuse it.
//!
//! Pure. Nothing is repaired: what two readers could understand in two ways is refused (RFC 9112, 3 and 5; where the
//! RFC leaves room, what nginx does). Request bodies' framing is `exchange::framing`'s.

use std::mem::MaybeUninit;

use httparse::Status;

use crate::{
    exchange::{
        Exchange, LastHost, Request, Version,
        framing::{BARE_LF, BodyFields, Framing, Refusal, ends_in_crlf},
        headers::same_name,
    },
    observe::log::{self, Level},
};

/// Fields of a head. Browsers send 20, and the block is bounded anyway: this bounds the work per byte.
const FIELDS_MAX: usize = 256;

/// Reads the head that `block` starts with into `request`, whose `head_len` says where it ends; the caller knows that all of it
/// is there. After a refusal `request` holds what was understood, for the log. `last`: the connection's.
pub fn parse(block: &[u8], last: &LastHost, request: &mut Request) -> Result<Framing, Refusal> {
    request.head_len = block.len() as u64;
    let mut fields = [const { MaybeUninit::uninit() }; FIELDS_MAX];
    let mut head = httparse::Request::new(&mut []);
    let parsed = head.parse_with_uninit_headers(block, &mut fields);
    if let Err(e) = parsed {
        salvage(block, request);
        return Err(refusal_of(e, block));
    }
    let (Some(method), Some(target), Some(minor)) = (head.method, head.path, head.version) else {
        salvage(block, request);
        return Err(Refusal::bad("incomplete head"));
    };
    request.method.extend_from_slice(method.as_bytes());
    request.is_head = method == "HEAD";
    request.target.extend_from_slice(target.as_bytes());
    request.version = if minor == 0 { Version::Http10 } else { Version::Http11 };
    let fields = &*head.headers;
    let block = match parsed {
        Ok(Status::Complete(len)) if !block.starts_with(b"\r") => &block[..len],
        _ => return Err(Refusal::bad("incomplete head")),
    };
    request.head_len = block.len() as u64;
    if !ends_in_crlf(block, fields.first().map(|f| f.name.as_bytes()), fields.iter().map(|f| f.value)) {
        return Err(BARE_LF);
    }
    request.headers.adopt(block, fields.iter().map(|f| (f.name.as_bytes(), f.value)));
    check_method(method.as_bytes())?;
    let said = read_fields(fields)?;
    let authority = split_target(request)?;
    let framing = said.body.of_request(request.version)?;
    read_host(authority, said.host, last, request)?;
    request.keep_alive = !said.close && (request.version == Version::Http11 || said.keep_alive);
    request.expects_continue = said.expects && framing != Framing::None && request.version == Version::Http11;
    request.upgrade = said.upgrade && said.upgrade_field && request.version == Version::Http11;
    Ok(framing)
}

/// `underscores_in_headers off`: leaves out the fields whose names have one, and logs each as nginx does.
pub(super) fn drop_underscored(x: &mut Exchange) {
    let is_underscored = |name: &[u8]| memchr::memchr(b'_', name).is_some();
    let headers = &x.request.headers;
    if !headers.iter().any(|(name, _)| is_underscored(name)) {
        return;
    }
    if log::enabled(Level::Info) {
        for (name, _) in headers.iter().filter(|(name, _)| is_underscored(name)) {
            // Without the value, which nginx shows: it may be a secret.
            let line =
                [&b"client sent invalid header line: \""[..], name, b": ...\" while reading client request headers"];
            x.log(Level::Info, &line.concat());
        }
    }
    x.request.headers.retain(|name, _| !is_underscored(name));
}

/// The path in a head that was not looked at yet, as the client spells it: what stands between the first two spaces.
pub fn raw_path(block: &[u8]) -> &[u8] {
    let target = memchr::memchr(b' ', block).map_or(&block[..0], |space| &block[space + 1..]);
    memchr::memchr2(b' ', b'?', target).map_or(&target[..0], |end| &target[..end])
}

/// Puts the first line into `request` as far as it can be told apart.
pub fn salvage(block: &[u8], request: &mut Request) {
    let line = block.split(|b| matches!(b, b'\r' | b'\n')).next().unwrap_or_default();
    let mut parts = line.split(|b| *b == b' ');
    request.method.clear();
    request.target.clear();
    match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some(method), Some(target), Some(version), None) if version.starts_with(b"HTTP/1.") => {
            request.version = if version == b"HTTP/1.0" { Version::Http10 } else { Version::Http11 };
            request.method.extend_from_slice(method);
            request.is_head = method == b"HEAD";
            request.target.extend_from_slice(target);
        }
        _ => request.target.extend_from_slice(line),
    }
}

fn refusal_of(e: httparse::Error, block: &[u8]) -> Refusal {
    use httparse::Error::*;
    match e {
        HeaderName => Refusal::bad("invalid header name"),
        HeaderValue => Refusal::bad("invalid header value"),
        NewLine => Refusal::bad("invalid line end"),
        TooManyHeaders => Refusal::bad("too many headers"),
        Version if later_version(block) => Refusal::with(505, "unsupported HTTP version"),
        Version => Refusal::bad("invalid HTTP version"),
        Status | Token => Refusal::bad("invalid request line"),
    }
}

/// `HTTP/2.0` and later, as against something that is no version at all.
fn later_version(block: &[u8]) -> bool {
    let line = block.split(|b| *b == b'\r').next().unwrap_or_default();
    let version = line.rsplit(|b| *b == b' ').next().unwrap_or_default();
    matches!(version, [b'H', b'T', b'T', b'P', b'/', b'2'..=b'9', b'.', b'0'..=b'9'])
}

/// nginx's rule: capitals, `_` and `-`. The two methods that a gateway must not pass on are its own to refuse.
pub(super) fn check_method(method: &[u8]) -> Result<(), Refusal> {
    if !method.iter().all(|b| b.is_ascii_uppercase() || matches!(b, b'_' | b'-')) {
        return Err(Refusal::bad("invalid method"));
    }
    match method {
        b"CONNECT" | b"TRACE" => Err(Refusal::with(405, "method not allowed")),
        _ => Ok(()),
    }
}

/// What the fields that concern the connection say.
#[derive(Default)]
struct Said<'a> {
    host: Option<&'a [u8]>,
    body: BodyFields,
    close: bool,
    keep_alive: bool,
    expects: bool,
    upgrade: bool,
    upgrade_field: bool,
}

fn read_fields<'a>(fields: &[httparse::Header<'a>]) -> Result<Said<'a>, Refusal> {
    let mut said = Said::default();
    for f in fields {
        // The length sorts out nearly all others with one comparison.
        let is = |name: &str| same_name(f.name.as_bytes(), name.as_bytes());
        match f.name.len() {
            4 if is("host") && said.host.is_some() => return Err(Refusal::bad("several Host")),
            4 if is("host") => said.host = Some(f.value),
            6 if is("expect") => {
                if !f.value.eq_ignore_ascii_case(b"100-continue") {
                    return Err(Refusal::with(417, "unknown expectation"));
                }
                said.expects = true;
            }
            7 if is("upgrade") => said.upgrade_field = true,
            10 if is("connection") => read_connection(f.value, &mut said),
            14 if is("content-length") => said.body.content_length(f.value)?,
            17 if is("transfer-encoding") => said.body.transfer_encoding(f.value)?,
            _ => {}
        }
    }
    Ok(said)
}

fn read_connection(value: &[u8], said: &mut Said<'_>) {
    for option in value.split(|b| *b == b',').map(<[u8]>::trim_ascii) {
        said.close |= option.eq_ignore_ascii_case(b"close");
        said.keep_alive |= option.eq_ignore_ascii_case(b"keep-alive");
        said.upgrade |= option.eq_ignore_ascii_case(b"upgrade");
    }
}

/// Splits the target into path and query; the authority of an absolute one is cut off it and returned.
pub(super) fn split_target(request: &mut Request) -> Result<Option<Vec<u8>>, Refusal> {
    let mut authority = None;
    match request.target.first() {
        Some(b'/') => {}
        _ if request.target == b"*" && request.method == b"OPTIONS" => {
            request.path.extend_from_slice(b"*");
            return Ok(None);
        }
        _ => {
            request.keep_line();
            authority = Some(cut_authority(&mut request.target)?);
        }
    }
    let target = &request.target;
    // A fragment is never sent; some readers cut it off and some do not.
    if memchr::memchr(b'#', target).is_some() {
        return Err(Refusal::bad("fragment in the target"));
    }
    let query = memchr::memchr(b'?', target);
    let path = &target[..query.unwrap_or(target.len())];
    normalize_path(path, &mut request.path)?;
    if let Some(at) = query {
        request.args.extend_from_slice(&target[at + 1..]);
    }
    Ok(authority)
}

/// `http://host:1/path` becomes `/path`; returns `host:1`.
fn cut_authority(target: &mut Vec<u8>) -> Result<Vec<u8>, Refusal> {
    let starts = |scheme: &[u8]| target.len() > scheme.len() && target[..scheme.len()].eq_ignore_ascii_case(scheme);
    let start = [&b"http://"[..], b"https://"].into_iter().find(|s| starts(s)).map(<[u8]>::len);
    let start = start.ok_or(Refusal::bad("invalid target"))?;
    let end = target[start..].iter().position(|b| matches!(b, b'/' | b'?' | b'#'));
    let end = end.map_or(target.len(), |at| start + at);
    let authority = target[start..end].to_vec();
    target.drain(..end);
    if target.first() != Some(&b'/') {
        target.insert(0, b'/');
    }
    Ok(authority)
}

/// Decides `$host`. An absolute target wins over the Host field and replaces it (RFC 9112, 3.2.2), so that whoever is next
/// sees one host.
fn read_host(
    authority: Option<Vec<u8>>,
    field: Option<&[u8]>,
    last: &LastHost,
    request: &mut Request,
) -> Result<(), Refusal> {
    if field.is_none() && request.version == Version::Http11 {
        return Err(Refusal::bad("no Host"));
    }
    if let Some(value) = field {
        name_of(value, last, &mut request.host)?;
    }
    if let Some(value) = authority {
        parse_host(&value, &mut request.host)?;
        request.headers.set("Host", value);
    }
    Ok(())
}

/// As `parse_host`, for an empty `host`; what the connection said before needs no second look.
pub(super) fn name_of(value: &[u8], last: &LastHost, host: &mut Vec<u8>) -> Result<(), Refusal> {
    if !last.name(value, host) {
        parse_host(value, host)?;
        last.remember(value, host);
    }
    Ok(())
}

/// Puts the name of `value` (`Name:port`) into `host`: lower case, without port and final dot.
pub fn parse_host(value: &[u8], host: &mut Vec<u8>) -> Result<(), Refusal> {
    const INVALID: Refusal = Refusal::bad("invalid Host");
    let (name, port) = match value.first() {
        Some(b'[') => {
            let end = memchr::memchr(b']', value).ok_or(INVALID)? + 1;
            value.split_at(end)
        }
        _ => value.split_at(memchr::memchr(b':', value).unwrap_or(value.len())),
    };
    if !valid_name(name) || !valid_port(port) {
        return Err(INVALID);
    }
    host.clear();
    host.extend_from_slice(name.strip_suffix(b".").unwrap_or(name));
    host.make_ascii_lowercase();
    Ok(())
}

fn valid_name(name: &[u8]) -> bool {
    if let Some(address) = name.strip_prefix(b"[") {
        let address = address.strip_suffix(b"]").and_then(|a| std::str::from_utf8(a).ok());
        return address.is_some_and(|a| a.parse::<std::net::Ipv6Addr>().is_ok());
    }
    // As nginx: a dot may come first.
    let mut last = 0;
    let sound = name.iter().all(|&b| {
        let dots = b == b'.' && last == b'.';
        last = b;
        REG_NAME[usize::from(b)] && !dots
    });
    sound && !name.is_empty() && name != b"."
}

/// RFC 3986's reg-name without the comma, which is what two Host fields look like when a relay has merged them.
static REG_NAME: [bool; 256] = {
    let mut table = [false; 256];
    let mut b = 0u8;
    while b < 128 {
        table[b as usize] = b.is_ascii_alphanumeric()
            || matches!(
                b,
                b'-' | b'.' | b'_' | b'~' | b'%' | b'!' | b'$' | b'&' | b'\'' | b'(' | b')' | b'*' | b'+' | b';' | b'='
            );
        b += 1;
    }
    table
};

/// Empty, or a colon and up to five digits.
fn valid_port(port: &[u8]) -> bool {
    match port.split_first() {
        None => true,
        Some((b':', digits)) => digits.len() <= 5 && digits.iter().all(u8::is_ascii_digit),
        Some(_) => false,
    }
}

/// The path as routes and plugins see it, as nginx makes `$uri`: `%XX` decoded, `//` merged, dots resolved. Refuses what
/// climbs above the root, and escapes that are none or hide a NUL.
pub fn normalize_path(raw: &[u8], out: &mut Vec<u8>) -> Result<(), Refusal> {
    out.clear();
    if is_plain(raw) {
        out.extend_from_slice(raw);
        return Ok(());
    }
    out.push(b'/');
    let mut segment = 1;
    let mut rest = raw.get(1..).unwrap_or_default();
    while let Some((&b, tail)) = rest.split_first() {
        rest = tail;
        let b = match b {
            b'%' => {
                let (decoded, tail) = decode_escape(rest)?;
                rest = tail;
                decoded
            }
            b => b,
        };
        if b == b'/' {
            end_segment(out, &mut segment, true)?;
        } else {
            out.push(b);
        }
    }
    end_segment(out, &mut segment, false)
}

/// Nothing to decode, merge or resolve: nearly all paths.
fn is_plain(raw: &[u8]) -> bool {
    let Some((first, rest)) = raw.split_first() else { return true };
    // All bytes at once, by vector instructions, rather than up to the first that matters.
    let pairs = raw.iter().zip(rest);
    let odd = pairs.fold(false, |odd, (a, b)| odd | (*b == b'%') | ((*a == b'/') & ((*b == b'/') | (*b == b'.'))));
    *first != b'%' && !odd
}

fn decode_escape(rest: &[u8]) -> Result<(u8, &[u8]), Refusal> {
    let digit = |at: usize| rest.get(at).and_then(|b| (*b as char).to_digit(16));
    match (digit(0), digit(1)) {
        (Some(0), Some(0)) => Err(Refusal::bad("NUL in the path")),
        (Some(high), Some(low)) => Ok(((high << 4 | low) as u8, &rest[2..])),
        _ => Err(Refusal::bad("invalid escape in the path")),
    }
}

/// `out[segment..]` is a whole segment; `slash`: one follows.
fn end_segment(out: &mut Vec<u8>, segment: &mut usize, slash: bool) -> Result<(), Refusal> {
    match &out[*segment..] {
        b"" => {}
        b"." => out.truncate(*segment),
        b".." => {
            let parent = out[..*segment - 1].iter().rposition(|b| *b == b'/');
            let parent = parent.ok_or(Refusal::bad("path climbs above the root"))?;
            out.truncate(parent + 1);
        }
        _ if slash => out.push(b'/'),
        _ => {}
    }
    *segment = out.len();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_raw_path_is_what_stands_between_the_first_spaces() {
        let raw = |block: &str| String::from_utf8_lossy(raw_path(block.as_bytes())).into_owned();
        assert_eq!(raw("GET /a/%41?x=1 HTTP/1.1\r\nHost: b c\r\n\r\n"), "/a/%41");
        assert_eq!(raw("GET /a HTTP/1.1\r\n\r\n"), "/a");
        assert!(["", "GET", "GET ", "GET /a", " "].iter().all(|block| raw(block).is_empty()));
    }

    fn read(head: &str) -> Result<(Request, Framing), u16> {
        let mut request = Request::default();
        let framing = parse(head.as_bytes(), &LastHost::default(), &mut request).map_err(|r| r.status)?;
        Ok((request, framing))
    }

    #[test]
    fn reads_a_head() {
        let (r, framing) = read(
            "POST /a%20b/../c?x=1&y HTTP/1.1\r\nhOST: Example.COM:8080\r\nX_y:  v \r\nE:\r\nContent-Length: 3\r\n\r\n",
        )
        .unwrap();
        assert_eq!((&r.method[..], r.version), (&b"POST"[..], Version::Http11));
        assert_eq!(r.target, b"/a%20b/../c?x=1&y");
        assert_eq!((&r.path[..], &r.args[..], &r.host[..]), (&b"/c"[..], &b"x=1&y"[..], &b"example.com"[..]));
        let fields: Vec<_> = r.headers.iter().collect();
        assert_eq!(fields[0], (&b"hOST"[..], &b"Example.COM:8080"[..]));
        assert_eq!(fields[1], (&b"X_y"[..], &b"v"[..]));
        assert_eq!(fields[2], (&b"E"[..], &b""[..]));
        assert_eq!(framing, Framing::Length(3));
        assert!(r.keep_alive && !r.upgrade && !r.expects_continue);
    }

    #[test]
    fn knows_when_a_connection_stays() {
        let keep = |version: &str, field: &str| read(&format!("GET / {version}\r\nHost: a\r\n{field}\r\n")).unwrap().0;
        assert!(keep("HTTP/1.1", "").keep_alive);
        assert!(!keep("HTTP/1.1", "Connection: foo , Close\r\n").keep_alive);
        assert!(!keep("HTTP/1.0", "").keep_alive);
        assert!(keep("HTTP/1.0", "Connection: Keep-Alive\r\n").keep_alive);
        assert!(keep("HTTP/1.1", "Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n").upgrade);
        assert!(!keep("HTTP/1.1", "Upgrade: websocket\r\n").upgrade);
    }

    #[test]
    fn takes_the_host_of_an_absolute_target() {
        let (r, _) = read("GET http://B.example:81?q HTTP/1.1\r\nHost: a\r\nX: 1\r\n\r\n").unwrap();
        assert_eq!((&r.host[..], &r.target[..], &r.path[..]), (&b"b.example"[..], &b"/?q"[..], &b"/"[..]));
        assert!(r.line.starts_with(b"GET http://") && r.line.ends_with(b"?q HTTP/1.1"), "the line stays as it came");
        assert_eq!(r.headers.get("host"), Some(&b"B.example:81"[..]));
        let (r, _) = read("OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
        assert_eq!(r.path, b"*");
        let (r, _) = read("GET / HTTP/1.0\r\n\r\n").unwrap();
        assert!(r.host.is_empty());
    }

    #[test]
    fn refuses_what_is_ambiguous() {
        let cases: &[(&str, u16)] = &[
            ("GET / HTTP/1.1\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost:\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: u@a\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a,b\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a..b\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: .\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a:b\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a:123456\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: [::1\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: [::1]x\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: [a.b]\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\n Host: a\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a\r\n\tfolded: x\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a\r\nX: a\x01b\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a\r\nX: a\x7fb\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a\r\nno colon\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a\r\n: empty\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a\r\nX(y): 1\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a\r\nX\0: 1\r\n\r\n", 400),
            ("GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("GET /  HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("GET /\x01 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("GET /\x7f HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("GET /#f HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("GET /\r\nHost: a\r\n\r\n", 400),
            ("GET / HTTP/1.2\r\nHost: a\r\n\r\n", 400),
            ("GET / HTTX/1.1\r\nHost: a\r\n\r\n", 400),
            ("GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
            ("get / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("G@T / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("GET a HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("GET * HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("GET http:///x HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("GET http://u@a/x HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n", 405),
            ("TRACE / HTTP/1.1\r\nHost: a\r\n\r\n", 405),
            ("GET / HTTP/1.1\r\nHost: a\r\nExpect: more\r\n\r\n", 417),
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\n", 400),
            ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
            ("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        ];
        for (head, status) in cases {
            assert_eq!(read(head).map(|_| ()), Err(*status), "{}", head.escape_debug());
        }
        let many = "X: 1\r\n".repeat(FIELDS_MAX);
        assert_eq!(read(&format!("GET / HTTP/1.1\r\nHost: a\r\n{many}\r\n")).map(|_| ()), Err(400));
    }

    #[test]
    fn keeps_the_first_line_of_what_it_refuses() {
        let line = |head: &str| {
            let mut request = Request::default();
            assert!(parse(head.as_bytes(), &LastHost::default(), &mut request).is_err());
            (String::from_utf8(request.method).unwrap(), String::from_utf8(request.target).unwrap())
        };
        assert_eq!(line("GET /x HTTP/1.1\r\nbad\r\n\r\n"), ("GET".into(), "/x".into()));
        assert_eq!(line("GET /x y HTTP/1.1\r\n\r\n"), ("".into(), "GET /x y HTTP/1.1".into()));
    }

    #[test]
    fn normalizes_paths_as_nginx() {
        let ok = [
            ("/", "/"),
            ("/a/b", "/a/b"),
            ("/a//b///", "/a/b/"),
            ("/a/./b/.", "/a/b/"),
            ("/a/../b", "/b"),
            ("/a/b/..", "/a/"),
            ("/a/..", "/"),
            ("/a/%2e%2E/b", "/b"),
            ("/a%2fb", "/a/b"),
            ("/a%2f..%2fb", "/b"),
            ("/%25%3f%23", "/%?#"),
            ("/...", "/..."),
            ("/.a/..b/c.", "/.a/..b/c."),
            ("/%e4", "/\u{e4}"),
        ];
        for (raw, path) in ok {
            let mut out = Vec::new();
            normalize_path(raw.as_bytes(), &mut out).unwrap();
            let want: Vec<u8> = path.chars().map(|c| c as u8).collect();
            assert_eq!(out, want, "{raw}");
        }
        for raw in ["/..", "/../a", "/a/../../b", "/a/%2e%2e/%2e%2e", "/%", "/%2", "/%zz", "/a%00", "//.."] {
            assert!(normalize_path(raw.as_bytes(), &mut Vec::new()).is_err(), "{raw}");
        }
    }
}
