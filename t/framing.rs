//! What a client may send. An ambiguous request is refused, never forwarded: each refusal goes over a socket, nothing of it
//! reaches the upstream, and the next request is served.

mod support;

use serde_json::json;
use support::{Client, Gateway, Upstream, http::raw};

const GOOD: &str = "GET /good HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";

fn gateway() -> (Gateway, Upstream) {
    let up = Upstream::echo();
    let gw = Gateway::start();
    gw.route("1", "/*", &up, json!({}));
    (gw, up)
}

/// Sends each text, expects its status and a closed connection, and a good request to be served afterwards.
fn refuses(cases: &[(&str, &str, u16)]) {
    let (gw, up) = gateway();
    for (what, bytes, status) in cases {
        let before = up.seen().len();
        let answer = raw(&gw.proxy(), bytes.as_bytes());
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{what}: {answer}");
        assert!(answer.contains("\r\nConnection: close\r\n"), "{what}: {answer}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{what}: {answer}");
        assert_eq!(up.seen().len(), before, "{what} reached the upstream");
        let answer = raw(&gw.proxy(), GOOD.as_bytes());
        assert!(answer.starts_with("HTTP/1.1 200 "), "after {what}: {answer}");
    }
}

fn with_host(text: &str) -> String {
    text.replacen("\r\n", "\r\nHost: a\r\n", 1)
}

/// The same for texts whose Host is written by `with_host`.
fn refuses_with_host(cases: &[(&str, &str, u16)]) {
    let texts: Vec<_> = cases.iter().map(|(what, text, status)| (*what, with_host(text), *status)).collect();
    refuses(&texts.iter().map(|(what, text, status)| (*what, text.as_str(), *status)).collect::<Vec<_>>());
}

#[test]
fn request_lines_are_strict() {
    refuses_with_host(&[
        ("a method in small letters", "get / HTTP/1.1\r\n\r\n", 400),
        ("a method that is no token", "G@T / HTTP/1.1\r\n\r\n", 400),
        ("no version", "GET /\r\n\r\n", 400),
        ("two spaces before the target", "GET  / HTTP/1.1\r\n\r\n", 400),
        ("two spaces after the target", "GET /  HTTP/1.1\r\n\r\n", 400),
        ("a space in the target", "GET /a b HTTP/1.1\r\n\r\n", 400),
        ("a tab between the parts", "GET\t/ HTTP/1.1\r\n\r\n", 400),
        ("a control byte in the target", "GET /\x01 HTTP/1.1\r\n\r\n", 400),
        ("a NUL in the target", "GET /\0 HTTP/1.1\r\n\r\n", 400),
        ("an unknown protocol", "GET / HTTX/1.1\r\n\r\n", 400),
        ("an unknown minor version", "GET / HTTP/1.9\r\n\r\n", 400),
        ("a version to come", "GET / HTTP/3.0\r\n\r\n", 505),
        ("a carriage return alone", "GET / HTTP/1.1\rHost: a\r\n\r\n", 400),
        ("a line feed alone", "GET / HTTP/1.1\nX: y\r\n\r\n", 400),
    ]);
    refuses(&[
        ("bytes that are no request", "\x16\x03\x01\x02\0", 400),
        ("two empty lines first", "\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ]);
}

#[test]
fn targets_are_strict() {
    refuses_with_host(&[
        ("a target without a slash", "GET a HTTP/1.1\r\n\r\n", 400),
        ("a star that is no OPTIONS", "GET * HTTP/1.1\r\n\r\n", 400),
        ("another scheme", "GET ftp://a/ HTTP/1.1\r\n\r\n", 400),
        ("an absolute target without a host", "GET http:///x HTTP/1.1\r\n\r\n", 400),
        ("credentials in the target", "GET http://u@a/ HTTP/1.1\r\n\r\n", 400),
        ("CONNECT", "CONNECT a:443 HTTP/1.1\r\n\r\n", 405),
        ("TRACE", "TRACE / HTTP/1.1\r\n\r\n", 405),
        ("a fragment", "GET /#x HTTP/1.1\r\n\r\n", 400),
        ("half an escape", "GET /%2 HTTP/1.1\r\n\r\n", 400),
        ("an escape that is none", "GET /%zz HTTP/1.1\r\n\r\n", 400),
        ("an escaped NUL", "GET /%00 HTTP/1.1\r\n\r\n", 400),
        ("a path above the root", "GET /a/../../b HTTP/1.1\r\n\r\n", 400),
        ("an escaped path above the root", "GET /%2e%2e/b HTTP/1.1\r\n\r\n", 400),
    ]);
}

#[test]
fn hosts_are_strict() {
    refuses(&[
        ("no Host", "GET / HTTP/1.1\r\n\r\n", 400),
        ("two Hosts", "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        ("two equal Hosts", "GET / HTTP/1.1\r\nHost: a\r\nhost: a\r\n\r\n", 400),
        ("an empty Host", "GET / HTTP/1.1\r\nHost:\r\n\r\n", 400),
        ("a space in Host", "GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
        ("a path in Host", "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
        ("a user in Host", "GET / HTTP/1.1\r\nHost: u@a\r\n\r\n", 400),
        ("a list in Host", "GET / HTTP/1.1\r\nHost: a, b\r\n\r\n", 400),
        ("two dots in Host", "GET / HTTP/1.1\r\nHost: a..b\r\n\r\n", 400),
        ("a port that is none", "GET / HTTP/1.1\r\nHost: a:b\r\n\r\n", 400),
        ("half an IPv6 address", "GET / HTTP/1.1\r\nHost: [::1\r\n\r\n", 400),
    ]);
}

#[test]
fn fields_are_strict() {
    refuses_with_host(&[
        ("a folded line", "GET / HTTP/1.1\r\nX: a\r\n b\r\n\r\n", 400),
        ("a line folded with a tab", "GET / HTTP/1.1\r\nX: a\r\n\tb: c\r\n\r\n", 400),
        ("a space before the colon", "GET / HTTP/1.1\r\nX : a\r\n\r\n", 400),
        ("no colon", "GET / HTTP/1.1\r\nX\r\n\r\n", 400),
        ("no name", "GET / HTTP/1.1\r\n: a\r\n\r\n", 400),
        ("a name that is no token", "GET / HTTP/1.1\r\nX(y): a\r\n\r\n", 400),
        ("a carriage return in a value", "GET / HTTP/1.1\r\nX: a\rb\r\n\r\n", 400),
        ("a line feed alone after a value", "GET / HTTP/1.1\r\nX: a\nY: b\r\n\r\n", 400),
        ("a NUL in a value", "GET / HTTP/1.1\r\nX: a\0b\r\n\r\n", 400),
        ("a control byte in a value", "GET / HTTP/1.1\r\nX: a\x01b\r\n\r\n", 400),
        ("DEL in a value", "GET / HTTP/1.1\r\nX: a\x7fb\r\n\r\n", 400),
        ("an unknown expectation", "GET / HTTP/1.1\r\nExpect: the unexpected\r\n\r\n", 417),
    ]);
}

#[test]
fn bounds_hold() {
    let long = "x".repeat(9 * 1024);
    let target = format!("GET /{long} HTTP/1.1\r\nHost: a\r\n\r\n");
    let field = format!("GET / HTTP/1.1\r\nHost: a\r\nX: {long}\r\n\r\n");
    let block = format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", format!("X: {}\r\n", &long[..4000]).repeat(9));
    let count = format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "X: y\r\n".repeat(1000));
    refuses(&[
        ("a long target", &target, 414),
        ("a long field", &field, 400),
        ("a long head", &block, 400),
        ("many fields", &count, 400),
    ]);
}

#[test]
fn lengths_are_strict() {
    refuses_with_host(&[
        (
            "a length and chunks",
            "POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
        ),
        (
            "chunks and a length",
            "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
            400,
        ),
        ("two lengths", "POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400),
        ("two equal lengths", "POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\na", 400),
        ("a list of lengths", "POST / HTTP/1.1\r\nContent-Length: 1, 1\r\n\r\na", 400),
        ("a plus", "POST / HTTP/1.1\r\nContent-Length: +1\r\n\r\na", 400),
        ("a minus", "POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\na", 400),
        ("hex", "POST / HTTP/1.1\r\nContent-Length: 0x1\r\n\r\na", 400),
        ("no digits", "POST / HTTP/1.1\r\nContent-Length:\r\n\r\na", 400),
        ("too many digits", "POST / HTTP/1.1\r\nContent-Length: 18446744073709551616\r\n\r\na", 400),
        ("another coding", "POST / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        ("a coding before chunked", "POST / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
        ("chunked twice in one field", "POST / HTTP/1.1\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", 501),
        (
            "chunked twice",
            "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
        ),
        ("chunked with a vertical tab", "POST / HTTP/1.1\r\nTransfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n", 400),
        ("almost chunked", "POST / HTTP/1.1\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 501),
        ("identity", "POST / HTTP/1.1\r\nTransfer-Encoding: identity\r\n\r\n", 501),
        ("chunks in HTTP/1.0", "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    ]);
}

#[test]
fn chunks_are_strict() {
    let (gw, _up) = gateway();
    let long = format!("1;{}\r\na\r\n0\r\n\r\n", "x".repeat(2000));
    let trailers = format!("0\r\n{}\r\n", "T: v\r\n".repeat(2000));
    for (what, body) in [
        ("a size that is none", "x\r\n\r\n"),
        ("no size", "\r\na\r\n0\r\n\r\n"),
        ("a sign", "+1\r\na\r\n0\r\n\r\n"),
        ("a prefix", "0x1\r\na\r\n0\r\n\r\n"),
        ("a space before the size", " 1\r\na\r\n0\r\n\r\n"),
        ("a space after the size", "1 \r\na\r\n0\r\n\r\n"),
        ("a size past 64 bits", "11111111111111111\r\na\r\n0\r\n\r\n"),
        ("a line feed alone after the size", "1\na\r\n0\r\n\r\n"),
        ("data longer than its size", "1\r\nab\r\n0\r\n\r\n"),
        ("a line feed alone after the data", "1\r\na\n0\r\n\r\n"),
        ("a line feed in an extension", "1;a\nb\r\na\r\n0\r\n\r\n"),
        ("a NUL in an extension", "1;\0\r\na\r\n0\r\n\r\n"),
        ("a long extension", long.as_str()),
        ("a trailer without a colon", "0\r\nno colon\r\n\r\n"),
        ("a folded trailer", "0\r\nT: v\r\n w\r\n\r\n"),
        ("long trailers", trailers.as_str()),
    ] {
        let request = format!("POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{body}{GOOD}");
        let answer = raw(&gw.proxy(), request.as_bytes());
        assert!(answer.starts_with("HTTP/1.1 400 "), "{what}: {answer}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{what} must end the connection: {answer}");
        let answer = raw(&gw.proxy(), GOOD.as_bytes());
        assert!(answer.starts_with("HTTP/1.1 200 "), "after {what}: {answer}");
    }
}

#[test]
fn garbage_after_a_request_is_refused_and_the_request_is_not() {
    let (gw, up) = gateway();
    let answer = raw(&gw.proxy(), b"GET /first HTTP/1.1\r\nHost: a\r\n\r\n\x01\x02garbage\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("HTTP/1.1 400 "), "{answer}");
    assert_eq!(up.seen().len(), 1);
}

#[test]
fn what_is_fine_passes() {
    let (gw, up) = gateway();
    let mut client = Client::connect(&gw.proxy());
    for (text, target, body) in [
        ("\r\nGET /one-empty-line-first HTTP/1.1\r\nHost: a\r\n\r\n", "/one-empty-line-first", ""),
        ("GET /x?a=%zz HTTP/1.1\r\nHost: A.b:80\r\nX_y: 1\r\nEmpty:\r\n\r\n", "/x?a=%zz", ""),
        ("POST /l HTTP/1.1\r\nHost: [::1]:80\r\nContent-Length: 005\r\n\r\nhello", "/l", "hello"),
        (
            "POST /c HTTP/1.1\r\nHost: a\r\ntransfer-encoding: Chunked\r\n\r\n2\r\nhe\r\n03;n=v\r\nllo\r\n0\r\nT: v\r\n\r\n",
            "/c",
            "hello",
        ),
    ] {
        client.write(text.as_bytes()).expect("is open");
        assert_eq!(client.reply("GET").status, 200, "{text}");
        let seen = up.last();
        assert_eq!((seen.target.as_str(), seen.body.as_slice()), (target, body.as_bytes()));
    }
}

#[test]
fn a_client_that_waits_for_continue_gets_it() {
    let (gw, up) = gateway();
    let mut client = Client::connect(&gw.proxy());
    client.write(b"POST /x HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n").expect("is open");
    assert_eq!(client.head().status, 100);
    client.write(b"hi").expect("is open");
    assert_eq!(client.reply("POST").status, 200);
    assert_eq!(up.last().body, b"hi");
}

#[test]
fn a_client_that_is_too_slow_is_let_go() {
    let up = Upstream::echo();
    let gw = Gateway::with(json!({"nginx_config": {"http": {
        "client_header_timeout": "1s", "client_body_timeout": "1s", "keepalive_timeout": "1s"
    }}}));
    gw.route("1", "/*", &up, json!({}));
    assert_eq!(raw(&gw.proxy(), b"GET / HT"), "");
    assert!(raw(&gw.proxy(), b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n").starts_with("HTTP/1.1 200 "));
    assert_eq!(raw(&gw.proxy(), b""), "");
}
