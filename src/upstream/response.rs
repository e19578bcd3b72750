//! A response's head: bytes in, a `Response` out, or the reason to answer 502.
//!
//! Pure. What concerns only the connection to the node stays here; what nginx keeps from clients (`X-Accel-*`) does too.

use std::mem::MaybeUninit;

use crate::exchange::{
    Response,
    framing::{BARE_LF, BodyFields, Framing, HeadLimits, Refusal, ends_in_crlf},
    headers::same_name,
};

/// A node's head: as long as a request's may be, twice over, since nodes set cookies that clients then send back.
pub const LIMITS: HeadLimits = HeadLimits { line: 32 * 1024, total: 64 * 1024 };

/// Fields of a head: bounds the work per byte.
const FIELDS_MAX: usize = 256;

/// What a head says about the message and the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    pub status: u16,
    pub framing: Framing,
    /// The connection may serve another request.
    pub keep_alive: bool,
}

impl Head {
    /// `1xx`: the final head is still to come. 101 is final.
    pub fn is_interim(&self) -> bool {
        matches!(self.status, 100 | 102..=199)
    }
}

/// Reads the head that `input` starts with into `into`, if all of it is there: what it says, and its length. `to_head`: it
/// answers a HEAD request.
pub fn parse(input: &[u8], to_head: bool, into: &mut Response) -> Result<Option<(Head, usize)>, Refusal> {
    let mut fields = [const { MaybeUninit::uninit() }; FIELDS_MAX];
    let mut head = httparse::Response::new(&mut []);
    let parsed = httparse::ParserConfig::default().parse_response_with_uninit_headers(&mut head, input, &mut fields);
    let block = match parsed {
        Ok(httparse::Status::Complete(len)) => &input[..len],
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(Refusal::bad("too many headers")),
        Err(_) => return Err(Refusal::bad("invalid header")),
    };
    let (Some(status), Some(minor)) = (head.code, head.version) else { return Err(Refusal::bad("incomplete head")) };
    if !(100..=999).contains(&status) {
        return Err(Refusal::bad("invalid status"));
    }
    let fields = &*head.headers;
    if !block.starts_with(b"H") {
        return Err(Refusal::bad("something before the status line"));
    }
    if !ends_in_crlf(block, fields.first().map(|f| f.name.as_bytes()), fields.iter().map(|f| f.value)) {
        return Err(BARE_LF);
    }
    let said = read_fields(fields)?;
    into.status = status;
    into.reason.clear();
    into.reason.extend_from_slice(head.reason.unwrap_or_default().as_bytes());
    let upgrade = status == 101;
    let passed = fields.iter().filter(|f| !is_withheld(f.name.as_bytes(), upgrade));
    into.headers.adopt(block, passed.map(|f| (f.name.as_bytes(), f.value)));
    if said.lists {
        remove_listed(fields, into);
    }
    let framing = if upgrade { Framing::None } else { said.body.of_response(status, to_head)? };
    let keep_alive = !said.close && (minor == 1 || said.keep_alive) && framing != Framing::UntilClose && !upgrade;
    Ok(Some((Head { status, framing, keep_alive }, block.len())))
}

#[derive(Default)]
struct Said {
    body: BodyFields,
    close: bool,
    keep_alive: bool,
    /// `Connection` names fields.
    lists: bool,
}

fn read_fields(fields: &[httparse::Header<'_>]) -> Result<Said, Refusal> {
    let mut said = Said::default();
    for f in fields {
        match f.name.len() {
            10 if same_name(f.name.as_bytes(), b"connection") => tokens(f.value).for_each(|token| {
                match () {
                    () if token.eq_ignore_ascii_case(b"close") => said.close = true,
                    () if token.eq_ignore_ascii_case(b"keep-alive") => said.keep_alive = true,
                    () => said.lists = true,
                };
            }),
            14 if same_name(f.name.as_bytes(), b"content-length") => said.body.content_length(f.value)?,
            17 if same_name(f.name.as_bytes(), b"transfer-encoding") => said.body.transfer_encoding(f.value)?,
            _ => {}
        }
    }
    Ok(said)
}

fn tokens(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|b| *b == b',').map(<[u8]>::trim_ascii).filter(|t| !t.is_empty())
}

/// Fields that `Connection` names belong to the connection (RFC 9110, 7.6.1). The body's length is no such field.
fn remove_listed(fields: &[httparse::Header<'_>], into: &mut Response) {
    let connection = fields.iter().filter(|f| f.name.eq_ignore_ascii_case("connection"));
    for token in connection.flat_map(|f| tokens(f.value)) {
        if !token.eq_ignore_ascii_case(b"content-length") && !token.eq_ignore_ascii_case(b"upgrade") {
            into.headers.remove(token);
        }
    }
}

fn is_withheld(name: &[u8], upgrade: bool) -> bool {
    let is = |other: &[u8]| same_name(name, other);
    match name.len() {
        2 => is(b"te"),
        7 => (!upgrade && is(b"upgrade")) || is(b"trailer"),
        10 => is(b"connection") || is(b"keep-alive"),
        15 => is(b"x-accel-expires") || is(b"x-accel-charset"),
        16 => is(b"proxy-connection") || is(b"x-accel-redirect"),
        17 => is(b"transfer-encoding") || is(b"x-accel-buffering"),
        18 => is(b"x-accel-limit-rate"),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(block: &str, to_head: bool) -> Result<(Head, Response), Refusal> {
        let mut response = Response::default();
        let (head, len) = parse(block.as_bytes(), to_head, &mut response)?.ok_or(Refusal::bad("incomplete"))?;
        assert_eq!(len, block.len());
        Ok((head, response))
    }

    #[test]
    fn reads_a_head_and_keeps_what_is_the_connections() {
        let block = "HTTP/1.1 200 Fine\r\nServer: x\r\nConnection: X-Hop, keep-alive\r\nX-Hop: 1\r\nKeep-Alive: 5\r\n\
                     X-Accel-Redirect: /a\r\nContent-Length: 3\r\nSet-Cookie: a\r\nset-cookie: b\r\n\r\n";
        let (head, response) = read(block, false).unwrap();
        assert_eq!(head, Head { status: 200, framing: Framing::Length(3), keep_alive: true });
        assert_eq!(response.reason, b"Fine");
        let names: Vec<_> = response.headers.iter().map(|(n, _)| n.escape_ascii().to_string()).collect();
        assert_eq!(names, ["Server", "Content-Length", "Set-Cookie", "set-cookie"]);
    }

    #[test]
    fn knows_where_the_body_ends_and_whether_the_connection_lives() {
        let table = [
            ("HTTP/1.1 200\r\n\r\n", false, Framing::UntilClose, false),
            ("HTTP/1.1 204 No\r\n\r\n", false, Framing::None, true),
            ("HTTP/1.1 304 No\r\nContent-Length: 5\r\n\r\n", false, Framing::None, true),
            ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", true, Framing::None, true),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", false, Framing::Chunked, true),
            ("HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\n", false, Framing::Length(5), false),
            ("HTTP/1.0 200 OK\r\nContent-Length: 5\r\nConnection: Keep-Alive\r\n\r\n", false, Framing::Length(5), true),
            ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\n", false, Framing::Length(5), false),
            ("HTTP/1.1 101 S\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n", false, Framing::None, false),
        ];
        for (block, to_head, framing, keep_alive) in table {
            let (head, _) = read(block, to_head).unwrap();
            assert_eq!((head.framing, head.keep_alive), (framing, keep_alive), "{block}");
        }
        assert!(read("HTTP/1.1 103 Early\r\n\r\n", false).unwrap().0.is_interim());
    }

    #[test]
    fn refuses_what_can_be_read_in_two_ways() {
        for block in [
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
            "HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n",
            "HTTP/1.1 200 OK\r\nA : b\r\n\r\n",
            "HTTP/2.0 200 OK\r\n\r\n",
            "HTTP/1.1 099 OK\r\n\r\n",
            "ICY 200 OK\r\n\r\n",
            "HTTP/1.1 200 OK\nA: b\r\n\r\n",
            "HTTP/1.1 200 OK\r\nA: b\nB: c\r\n\r\n",
            "HTTP/1.1 200 OK\r\nA: b \nB: c\r\n\r\n",
            "HTTP/1.1 200 OK\r\nA:\nB: c\r\n\r\n",
            "HTTP/1.1 200 OK\r\nA: b\r\n\n",
            "HTTP/1.1 200 OK\r\nA: b\n\r\n",
            "\nHTTP/1.1 200 OK\r\n\r\n",
        ] {
            assert!(read(block, false).is_err(), "{block}");
        }
    }

    #[test]
    fn fields_are_bounded() {
        let head = |n: usize| format!("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n{}\r\n", "X: 1\r\n".repeat(n - 1));
        assert_eq!(read(&head(FIELDS_MAX), false).unwrap().1.headers.len(), FIELDS_MAX);
        let refused = read(&head(FIELDS_MAX + 1), false).err().unwrap();
        assert_eq!(refused.why, "too many headers");
    }
}
