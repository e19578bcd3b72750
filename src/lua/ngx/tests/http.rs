//! `resty.http` against servers that answer what a test says.

use std::{cell::RefCell, collections::VecDeque, rc::Rc};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

/// Answers each request with the next text, keeps what came; an answer that ends with `CLOSE` closes.
async fn answers(texts: &[&str]) -> (u16, Rc<RefCell<String>>) {
    let texts: VecDeque<String> = texts.iter().map(|t| (*t).to_owned()).collect();
    let (texts, seen) = (Rc::new(RefCell::new(texts)), Rc::new(RefCell::new(String::new())));
    let all = seen.clone();
    let port = server(move |mut stream| {
        let (texts, seen) = (texts.clone(), seen.clone());
        async move {
            let mut got = Vec::new();
            while stream.read_buf(&mut got).await.is_ok_and(|n| n > 0) {
                if !is_whole(&got) {
                    continue;
                }
                seen.borrow_mut().push_str(&String::from_utf8_lossy(&got));
                got.clear();
                let Some(text) = texts.borrow_mut().pop_front() else { return };
                let (text, close) = text.strip_suffix("CLOSE").map_or((&*text, false), |t| (t, true));
                stream.write_all(text.as_bytes()).await.unwrap_or_default();
                if close {
                    return;
                }
            }
        }
    })
    .await;
    (port, all)
}

/// Whether a request's head and the body that its length tells are there.
fn is_whole(got: &[u8]) -> bool {
    let text = String::from_utf8_lossy(got).to_lowercase();
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return false };
    let length = head.split("content-length: ").nth(1).and_then(|l| l.lines().next()?.parse().ok());
    body.len() >= length.unwrap_or(0)
}

/// What the chunk returns and what the server saw.
#[track_caller]
fn exchange(texts: &[&str], source: &str) -> (String, String) {
    let head = "local http = require('resty.http') local client = http.new()
        local uri = 'http://127.0.0.1:' .. PORT ";
    on_a_worker(async {
        let (port, seen) = answers(texts).await;
        let got = run(&vm(), &unconnected(port, &format!("{head}{source}"))).await;
        let seen = seen.borrow().clone();
        (got, seen)
    })
}

#[track_caller]
fn gives(texts: &[&str], source: &str, expected: &str) {
    assert_eq!(exchange(texts, source).0, expected, "{source}");
}

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Two: a\r\nx-two: b\r\n\r\nhello";

#[test]
fn request_uri_gives_the_whole_response_and_keeps_the_connection() {
    let (got, seen) = exchange(
        &[OK, OK],
        "local res = assert(client:request_uri(uri .. '/p/a th?q=1', { method = 'POST', body = 'data', headers = { ['x-A'] = { 1, 2 } } }))
         local h = res.headers
         local again = assert(client:request_uri(uri, { query = { a = 'b c' } }))
         assert(client:connect({ scheme = 'http', host = '127.0.0.1', port = PORT }))
         return show(res.status, res.reason, res.body, res.has_body, h['content-length'], h.CONTENT_LENGTH, table.concat(h['X-TWO'], '+'),
            again.body, client:get_reused_times())",
    );
    assert_eq!(got, "200 OK hello true 5 5 a+b hello 2");
    let heads: Vec<&str> = seen.split("\r\n\r\n").collect();
    assert!(heads[0].starts_with("POST /p/a%20th?q=1 HTTP/1.1\r\n"), "{seen}");
    for line in ["x-A: 1", "x-A: 2", "Content-Length: 4", "User-Agent: lua-resty-http/"] {
        assert!(heads[0].contains(&format!("\r\n{line}")), "{line}: {seen}");
    }
    assert!(heads[1].starts_with("dataGET /?a=b%20c HTTP/1.1\r\n"), "{seen}");
    assert!(heads[1].contains("\r\nHost: 127.0.0.1:") && !heads[1].contains("Content-Length"), "{seen}");
}

#[test]
fn bodies_come_in_every_framing() {
    let chunked =
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nA;x=y\r\n0123456789\r\n0\r\nX-End: t\r\n\r\n";
    gives(
        &[chunked],
        "client:connect('127.0.0.1', PORT)
         local res = assert(client:request({ path = '/' }))
         local body = res:read_body()
         return show(body, res:read_trailers()['x-end'], client:set_keepalive())",
        "abc0123456789 t 1",
    );
    gives(
        &[chunked],
        "client:connect('127.0.0.1', PORT)
         local res, out = assert(client:request({ path = '/' })), {}
         for piece in res.body_reader, 4 do out[#out + 1] = piece end
         return table.concat(out, '|')",
        "abc|0123|4567|89",
    );
    gives(
        &["HTTP/1.0 200 OK\r\n\r\nto the endCLOSE"],
        "local res = assert(client:request_uri(uri)) return show(res.body, client:get_reused_times())",
        "to the end nil closed",
    );
    gives(
        &["HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n"],
        "local res = client:request_uri(uri) return show(res.status, res.has_body, '[' .. res.body .. ']')",
        "200 true []",
    );
    for (method, head) in [
        ("HEAD", "200 OK\r\nContent-Length: 5"),
        ("GET", "204 No Content"),
        ("GET", "304 Not Modified\r\nContent-Length: 5"),
    ] {
        gives(
            &[&format!("HTTP/1.1 {head}\r\n\r\n"), OK],
            &format!(
                "client:connect('127.0.0.1', PORT)
                 local res = assert(client:request({{ method = '{method}', path = '/' }}))
                 local body, err = res:read_body()
                 return show(res.has_body, body, err, client:set_keepalive())"
            ),
            "false nil no body to be read 1",
        );
    }
    gives(
        &["HTTP/1.1 103 Early\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"],
        "local res = client:request_uri(uri) return show(res.status, res.body, res.headers.link)",
        "200 hi nil",
    );
}

#[test]
fn interim_responses_are_passed_over_only_so_often() {
    for (interim, expected) in [(15, "200 hello"), (16, "nil too many interim responses")] {
        let early = "HTTP/1.1 103 Early\r\n\r\n".repeat(interim);
        gives(
            &[&format!("{early}{OK}")],
            "local res, err = client:request_uri(uri) return show(res and res.status, res and res.body or err)",
            expected,
        );
    }
}

#[test]
fn heads_and_bodies_are_bounded() {
    let ask = "local res, err = client:request_uri(uri) return show(res and #res.body, err)";
    let fields = |n: usize| format!("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n{}\r\nhi", "X: y\r\n".repeat(n - 1));
    gives(&[&fields(1000)], ask, "2 nil");
    gives(&[&fields(1001)], ask, "nil too many response headers");
    let head = |len: usize| format!("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX: {}\r\n\r\nhi", "y".repeat(len));
    let most = 256 * 1024 - "Content-Length: 2X: ".len();
    gives(&[&head(most)], ask, "2 nil");
    gives(&[&head(most + 1)], ask, "nil response headers too large");
    let body = |len: usize| format!("HTTP/1.1 200 OK\r\nContent-Length: {len}\r\n\r\n{}", "y".repeat(len));
    gives(&[&body((64 << 20) + 1)], ask, "nil response body too large");
}

#[test]
fn a_response_that_can_be_read_in_two_ways_is_refused() {
    for (head, expected) in [
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked",
            "response with Transfer-Encoding and Content-Length",
        ),
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6", "response with several lengths"),
        ("HTTP/1.1 200 OK\r\nContent-Length: -5", "invalid Content-Length in response"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 5, 5", "invalid Content-Length in response"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked", "unsupported transfer encoding"),
        ("HTTP/1.1 200 OK\r\nbad header: x", "invalid response header"),
        ("HTTP/1.1 200 OK\r\na: b\r\n folded", "folded response header"),
        ("HTTP/2 200 OK", "couldn't parse HTTP version from response status line: HTTP/2 200 OK"),
    ] {
        gives(&[&format!("{head}\r\n\r\nhello")], "return show(client:request_uri(uri))", &format!("nil {expected}"));
    }
    for (body, expected) in
        [("xyz\r\n", "unable to read chunksize"), ("3\r\nabcd\r\n", "unexpected data after a chunk")]
    {
        let text = format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{body}");
        gives(&[&text], "return show(client:request_uri(uri))", &format!("nil {expected}"));
    }
    gives(
        &["HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshortCLOSE"],
        "return show(client:request_uri(uri))",
        "nil closed",
    );
}

#[test]
fn nothing_slips_into_a_request() {
    for (params, expected) in [
        ("{ headers = { A = 'b\\r\\nC: d' } }", "invalid value of header A"),
        ("{ headers = { ['A b'] = 'c' } }", "invalid header name"),
        ("{ method = 'GET /x' }", "invalid method"),
        ("{ body = function() end }", "a body from an iterator needs Content-Length or Transfer-Encoding: chunked"),
        (
            "{ method = 'PUT', body = function() end, headers = { ['Content-Length'] = 3 } }",
            "body is shorter than Content-Length",
        ),
    ] {
        gives(&[OK], &format!("return show(client:request_uri(uri, {params}))"), &format!("nil {expected}"));
    }
    let (_, seen) = exchange(
        &[OK],
        "return show(client:request_uri(uri, { path = '/a\\r\\nX: y', headers = { ['content-length'] = 99, ['Transfer-Encoding'] = 'chunked' }, body = 'x' }))",
    );
    assert!(seen.starts_with("GET /a%0D%0AX:%20y HTTP/1.1\r\n") && seen.contains("ontent-length: 1\r\n"), "{seen}");
    assert!(!seen.contains("hunked"), "{seen}");
}

#[test]
fn a_connection_is_kept_only_after_a_whole_response() {
    gives(
        &[OK],
        "client:connect('127.0.0.1', PORT) client:request({ path = '/' }) return show(client:set_keepalive())",
        "2 connection must be closed",
    );
    gives(
        &["HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"],
        "client:connect('127.0.0.1', PORT) client:request({ path = '/' }) return show(client:set_keepalive())",
        "2 connection must be closed",
    );
    gives(
        &[OK, OK],
        "client:request_uri(uri, { keepalive = false })
         assert(client:connect({ host = '127.0.0.1', port = PORT, scheme = 'http' }))
         return show(client:get_reused_times())",
        "0",
    );
}

#[test]
fn pipelined_responses_are_read_in_order() {
    let both = format!("{OK}HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno");
    gives(
        &[&both],
        "client:connect('127.0.0.1', PORT)
         local all = assert(client:request_pipeline({ { path = '/a' }, { path = '/b' } }))
         return show(all[1].status, all[1]:read_body(), all[2].status, all[2]:read_body())",
        "200 hello 404 no",
    );
}

#[test]
fn a_body_waits_for_100_continue() {
    let got = on_a_worker(async {
        let port = server(|mut stream| async move {
            let mut got = Vec::new();
            while !got.ends_with(b"\r\n\r\n") && stream.read_buf(&mut got).await.is_ok_and(|n| n > 0) {}
            stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.unwrap_or_default();
            let mut body = [0; 4];
            stream.read_exact(&mut body).await.unwrap_or_default();
            let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n{}", String::from_utf8_lossy(&body));
            stream.write_all(answer.as_bytes()).await.unwrap_or_default();
        })
        .await;
        let source = "local res = assert(require('resty.http').new():request_uri('http://127.0.0.1:' .. PORT,
            { method = 'PUT', body = 'data', headers = { Expect = '100-continue' } }))
            return show(res.status, res.body)";
        run(&vm(), &unconnected(port, source)).await
    });
    assert_eq!(got, "200 data");
}

#[test]
fn uris_are_taken_apart() {
    for (uri, expected) in [
        ("http://h/p?q", "http h 80 /p?q q"),
        ("https://h", "https h 443 / "),
        ("http://[::1]:81?x=1", "http [::1] 81 /?x=1 x=1"),
        ("http://h:8080/a#frag", "http h 8080 /a "),
    ] {
        gives(&[], &format!("return show(unpack(client:parse_uri('{uri}')))"), expected);
    }
    gives(&[], "return show(unpack(client:parse_uri('http://h/p?q', false)))", "http h 80 /p q");
    for uri in ["ftp://h/", "h/p", "http://", "http://a@b/", "http://a b/"] {
        gives(&[], &format!("return show(client:parse_uri('{uri}'))"), &format!("nil bad uri: {uri}"));
    }
}

#[test]
fn a_proxy_gets_the_whole_target() {
    let (got, seen) = exchange(
        &[OK],
        "client:set_proxy_options({ http_proxy = uri, http_proxy_authorization = 'Basic x', no_proxy = 'local.test,other' })
         return show(client:request_uri('http://some.test:81/p').body) .. show(client:request_uri('http://a.local.test:81/p'))",
    );
    assert_eq!(got, "hellonil no resolver defined to resolve \"a.local.test\"");
    assert!(seen.starts_with("GET http://some.test:81/p HTTP/1.1\r\n"), "{seen}");
    assert!(seen.contains("Proxy-Authorization: Basic x\r\n") && seen.contains("Host: some.test:81\r\n"), "{seen}");
}

#[test]
fn says_why_it_fails() {
    gives(
        &[],
        "client:set_timeout(20) return show(client:request_uri('http://127.0.0.1:1/'))",
        "nil connection refused",
    );
    gives(&[], "return show(client:request({ path = '/' })) .. show(client:close())", "nil closednil closed");
    gives(
        &["HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nslow"],
        "client:set_timeouts(20, 20, 20) return show(client:request_uri(uri))",
        "nil timeout",
    );
}
