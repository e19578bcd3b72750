//! Writes response heads. Pure.
//!
//! What concerns the connection is decided by the codec, never by a field that a plugin or an upstream set.

use crate::exchange::{
    Headers, Response,
    headers::{append_all, same_name},
    status,
};

/// What the head says about the body's length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Length {
    Claimed(u64),
    Chunked,
    /// The body ends with the connection.
    Absent,
    /// There is no body: `Content-Length` stands if a field says it (HEAD, 304).
    AsStands,
}

/// What the head says about the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Closing {
    Stays,
    Closes,
    Upgrade,
}

/// Appends the head. `false`: the response's own `Connection: close` was honoured, so the connection must end.
pub(super) fn write_head(out: &mut Vec<u8>, response: &Response, length: Length, closing: Closing) -> bool {
    let closing = if closing == Closing::Stays && asks_to_close(&response.headers) { Closing::Closes } else { closing };
    write_status(out, response.status, &response.reason);
    let mut dated = false;
    response.headers.write_to(out, |name, _| match name.len() {
        4 => {
            dated |= same_name(name, b"date");
            true
        }
        7 => closing == Closing::Upgrade || !same_name(name, b"upgrade"),
        10 => !same_name(name, b"connection") && !same_name(name, b"keep-alive"),
        14 => keeps_length(response.status, length) || !same_name(name, b"content-length"),
        17 => !same_name(name, b"transfer-encoding"),
        _ => true,
    });
    if !dated {
        append_all(out, [b"Date: ", &status::date(), b"\r\n"]);
    }
    write_length(out, response.status, length);
    out.extend_from_slice(match closing {
        Closing::Stays => b"Connection: keep-alive\r\n\r\n",
        Closing::Closes => &b"Connection: close\r\n\r\n"[..],
        Closing::Upgrade => b"Connection: upgrade\r\n\r\n",
    });
    closing == Closing::Stays
}

/// Appends a `1xx` head.
pub(super) fn write_interim(out: &mut Vec<u8>, status: u16, headers: &Headers) {
    write_status(out, status, b"");
    headers.write_to(out, |_, _| true);
    out.extend_from_slice(b"\r\n");
}

fn write_length(out: &mut Vec<u8>, status: u16, length: Length) {
    match length {
        // RFC 9110, 8.6: never in these.
        Length::Claimed(_) if matches!(status, 100..=199 | 204) => {}
        Length::Claimed(n) => {
            append_all(out, [b"Content-Length: ", itoa::Buffer::new().format(n).as_bytes(), b"\r\n"]);
        }
        Length::Chunked => out.extend_from_slice(b"Transfer-Encoding: chunked\r\n"),
        Length::Absent | Length::AsStands => {}
    }
}

fn keeps_length(status: u16, length: Length) -> bool {
    length == Length::AsStands && !matches!(status, 100..=199 | 204)
}

/// `reason` is what a parser has read, so it is sound.
fn write_status(out: &mut Vec<u8>, status: u16, reason: &[u8]) {
    if status == 200 && (reason == b"OK" || reason.is_empty()) {
        return out.extend_from_slice(b"HTTP/1.1 200 OK\r\n");
    }
    let reason = if reason.is_empty() { status::reason(status).as_bytes() } else { reason };
    append_all(out, [b"HTTP/1.1 ", itoa::Buffer::new().format(status).as_bytes(), b" ", reason, b"\r\n"]);
}

fn asks_to_close(headers: &Headers) -> bool {
    headers.get("Connection").is_some_and(|v| v.eq_ignore_ascii_case(b"close"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(status: u16, fields: &[(&str, &str)], length: Length, closing: Closing) -> (String, bool) {
        let mut response = Response { status, ..Response::default() };
        fields.iter().for_each(|(n, v)| response.headers.append(n, v));
        let mut out = Vec::new();
        let stays = write_head(&mut out, &response, length, closing);
        (String::from_utf8(out).unwrap(), stays)
    }

    #[test]
    fn writes_a_head_whose_framing_is_the_codecs() {
        let fields = [
            ("Date", "now"),
            ("content-length", "99"),
            ("Transfer-Encoding", "gzip"),
            ("Keep-Alive", "1"),
            ("Upgrade", "x"),
            ("X", "y"),
        ];
        let (text, stays) = head(200, &fields, Length::Claimed(3), Closing::Stays);
        let want = "HTTP/1.1 200 OK\r\nDate: now\r\nX: y\r\nContent-Length: 3\r\nConnection: keep-alive\r\n\r\n";
        assert_eq!((text.as_str(), stays), (want, true));
    }

    #[test]
    fn honours_close_and_upgrade() {
        let (text, stays) = head(200, &[("Connection", "close")], Length::Chunked, Closing::Stays);
        assert!(!stays && text.contains("Connection: close\r\n") && text.contains("Transfer-Encoding: chunked\r\n"));
        let (text, _) = head(101, &[("Upgrade", "websocket")], Length::AsStands, Closing::Upgrade);
        assert!(text.contains("Upgrade: websocket\r\n") && text.ends_with("Connection: upgrade\r\n\r\n"));
    }

    #[test]
    fn says_no_length_where_none_may_stand() {
        assert!(!head(204, &[], Length::Claimed(0), Closing::Stays).0.contains("Length"));
        assert!(!head(204, &[("Content-Length", "5")], Length::AsStands, Closing::Stays).0.contains("Length"));
        assert!(head(304, &[("Content-Length", "5")], Length::AsStands, Closing::Stays).0.contains("Length: 5\r\n"));
    }

    #[test]
    fn a_line_break_in_a_field_cannot_split_the_response() {
        let (text, _) = head(200, &[("X", "a\r\nSet-Cookie: b"), ("Y\n", "\r")], Length::Absent, Closing::Stays);
        assert!(text.contains("X: a  Set-Cookie: b\r\nY :  \r\n"), "{text}");
    }
}
