//! What is left of a try, an answer or a refusal when an error page takes its place: nothing that is not the page's.

mod support;

use std::{
    io::{BufReader, Read, Write},
    net::TcpStream,
    sync::mpsc,
};

use serde_json::{Value, json};
use support::{
    Client, Gateway, Reply, Upstream, eventually,
    http::raw,
    upstream::{Seen, read_request},
};

#[track_caller]
fn says(reply: &Reply, status: u16, expected: &str) {
    assert_eq!((reply.status, reply.text().as_str()), (status, expected));
}

/// Options of a location that keeps its connections to the upstream.
fn keeping(mut options: Value) -> Value {
    options["proxy_http_version"] = json!("1.1");
    options["proxy_set_header"] = json!([["Connection", ""]]);
    options
}

/// A server that closes its connection once it has a request whole.
fn closing() -> Upstream {
    Upstream::serving(|_, stream| {
        let _ = read_request(&mut BufReader::new(stream));
    })
}

/// A server that answers with what it got: the target and the body.
fn telling() -> Upstream {
    Upstream::answering(|seen: &Seen| {
        let told = format!("{} {}", seen.target, String::from_utf8_lossy(&seen.body));
        format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{told}", told.len())
    })
}

fn proxied(name: &str, to: &Upstream, options: Value) -> Value {
    json!({"location": name, "proxy_pass": format!("http://{}", to.addr()), "options": keeping(options)})
}

#[test]
fn a_body_that_a_failed_try_has_taken_goes_to_the_page_whole() {
    let (first, second) = (closing(), telling());
    let garbage = Upstream::answering(|_| "nonsense\r\n\r\n");
    let gw = Gateway::with(json!({"lua_locations": [
        proxied("= /closed", &first, json!({"error_page": [["502", "=", "@second"]]})),
        proxied("= /garbage", &garbage, json!({"error_page": [["502", "=", "@second"]]})),
        proxied("= /lua", &first, json!({"error_page": [["502", "=200", "@lua"]]})),
        proxied("@second", &second, json!({})),
        {"location": "@lua", "content_by_lua": "ngx.req.read_body() ngx.print('lua ', ngx.req.get_body_data())"},
    ]}));
    for (path, expected) in [("/closed", "/closed hello"), ("/garbage", "/garbage hello"), ("/lua", "lua hello")] {
        says(&gw.send("POST", path, &[], b"hello"), 200, expected);
        let mut client = Client::connect(&gw.proxy());
        client.send("POST", path, &[("Transfer-Encoding", "chunked")], b"");
        client.write(b"3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n").expect("the body is written");
        says(&client.reply("POST"), 200, expected);
    }
    assert!(second.seen().iter().all(|seen| seen.header("content-length") == Some("5")));
}

#[test]
fn what_the_client_still_sends_goes_to_the_page_too() {
    let (told, begun) = mpsc::channel();
    let first = Upstream::serving(move |_, mut stream| {
        let (mut got, mut piece) = (Vec::new(), [0; 1024]);
        while !got.ends_with(b"\r\n\r\nhel") {
            let n = stream.read(&mut piece).expect("the request comes");
            got.extend_from_slice(&piece[..n]);
        }
        drop(stream);
        told.send(()).expect("the test waits");
    });
    let second = telling();
    let gw = Gateway::with(json!({"lua_locations": [
        proxied("= /t", &first, json!({"error_page": [["502", "=", "@second"]]})),
        proxied("= /lua", &first, json!({"error_page": [["502", "=200", "@lua"]]})),
        proxied("= /none", &first, json!({})),
        proxied("@second", &second, json!({})),
        {"location": "@lua", "content_by_lua": "ngx.req.read_body() ngx.print('lua ', ngx.req.get_body_data())"},
    ]}));
    for (path, expected) in [("/t", "/t hello"), ("/lua", "lua hello")] {
        let mut client = Client::connect(&gw.proxy());
        client.send("POST", path, &[("Content-Length", "5")], b"");
        client.write(b"hel").expect("a part is written");
        begun.recv().expect("it came");
        client.write(b"lo").expect("the rest is written");
        says(&client.reply("POST"), 200, expected);
    }
    let mut client = Client::connect(&gw.proxy());
    client.send("POST", "/none", &[("Content-Length", "5")], b"");
    client.write(b"hel").expect("a part is written");
    assert_eq!(client.reply("POST").status, 502, "nobody wants the rest: it is not waited for");
}

#[test]
fn a_body_too_long_to_be_kept_goes_to_no_second_upstream() {
    let (first, second) = (closing(), telling());
    let gw = Gateway::with(json!({"lua_locations": [
        proxied("= /t", &first, json!({"error_page": [["502", "=", "@second"]]})),
        proxied("= /lua", &first, json!({"error_page": [["502", "=200", "@lua"]]})),
        proxied("= /sub", &first, json!({"error_page": [["502", "=200", "@sub"]]})),
        proxied("@second", &second, json!({})),
        proxied("= /second", &second, json!({})),
        {"location": "@lua", "content_by_lua": "ngx.req.read_body() ngx.print(tostring(ngx.req.get_body_data()))"},
        {"location": "@sub", "content_by_lua": r#"
            ngx.print(ngx.location.capture("/second", {method = ngx.HTTP_POST, always_forward_body = true}).status)"#},
    ]}));
    let (most, more) = (vec![b'x'; 64 << 10], vec![b'x'; (64 << 10) + 1]);
    assert_eq!(gw.send("POST", "/t", &[], &most).body.len(), "/t ".len() + most.len());
    let refused = gw.send("POST", "/t", &[], &more);
    assert_eq!(refused.status, 502);
    assert_eq!(second.seen().len(), 1);
    gw.expect_log("is too long to be sent once more");
    says(&gw.send("POST", "/lua", &[], &more), 200, "nil");
    says(&gw.send("POST", "/sub", &[], &more), 200, "502");
    assert_eq!(second.seen().len(), 1);
}

#[test]
fn a_page_under_a_path_of_its_own_goes_without_a_body_that_is_lost() {
    let (first, second) = (closing(), telling());
    let page = |name: &str, page: &str| proxied(name, &first, json!({"error_page": [["502", page]]}));
    let gw = Gateway::with(json!({"lua_locations": [
        page("= /t", "/page"),
        page("= /lua", "/page/lua"),
        page("= /sub", "/page/sub"),
        page("= /named", "@second"),
        proxied("= /page", &second, json!({})),
        proxied("@second", &second, json!({})),
        {"location": "= /page/lua", "content_by_lua": "ngx.req.read_body() ngx.print(tostring(ngx.req.get_body_data()))"},
        {"location": "= /page/sub", "content_by_lua": r#"
            ngx.print(ngx.location.capture("/page", {method = ngx.HTTP_POST, always_forward_body = true}).status)"#},
    ]}));
    let long = vec![b'x'; (64 << 10) + 1];
    says(&gw.send("POST", "/t", &[], &long), 502, "/page ");
    let mut client = Client::connect(&gw.proxy());
    client.send("POST", "/t", &[("Transfer-Encoding", "chunked")], b"");
    let chunked = [format!("{:x}\r\n", long.len()).as_bytes(), &long, b"\r\n0\r\n\r\n"].concat();
    client.write(&chunked).expect("the body is written");
    says(&client.reply("POST"), 502, "/page ");
    let seen = second.seen();
    assert!(seen.iter().all(|seen| seen.method == "GET" && seen.header("transfer-encoding").is_none()), "{seen:?}");
    assert_eq!(seen.iter().map(|seen| seen.header("content-length")).collect::<Vec<_>>(), [Some("0"), None]);
    // What is kept goes along, as ever.
    says(&gw.send("POST", "/t", &[], b"hello"), 502, "/page hello");
    says(&gw.send("POST", "/lua", &[], &long), 502, "nil");
    says(&gw.send("POST", "/sub", &[], &long), 502, "502");
    assert_eq!(gw.send("POST", "/named", &[], &long).status, 502);
    assert_eq!(second.seen().len(), 3, "no other request goes to an upstream as if it had had no body");
}

#[test]
fn a_page_cannot_let_in_whom_auth_request_keeps_out() {
    let guarded = |name: &str, auth: &str| json!({"location": name, "options": {"auth_request": auth, "error_page": []}, "content_by_lua": "ngx.say('in')"});
    let gw = Gateway::with(json!({
        "lua_options": {"error_page": [["401", "/login"], ["403", "@named"], ["404", "=200", "/login"], ["410", "/deep"]]},
        "lua_locations": [
            {"location": "= /login", "return": {"status": 200}},
            {"location": "@named", "return": {"status": 204}},
            {"location": "= /deep", "return": {"status": 403}},
            {"location": "= /auth/return", "return": {"status": 401}},
            {"location": "= /auth/exit", "content_by_lua": "ngx.exit(401)"},
            {"location": "= /auth/named", "return": {"status": 403}},
            {"location": "= /auth/given", "return": {"status": 404}},
            {"location": "= /auth/deep", "return": {"status": 410}},
            {"location": "= /auth/script", "options": {"error_page": [["404", "=200", "@exits"]]}, "return": {"status": 404}},
            {"location": "= /auth/broken", "options": {"error_page": [["404", "=200", "@fails"]]}, "return": {"status": 404}},
            {"location": "@exits", "content_by_lua": "ngx.exit(403)"},
            {"location": "@fails", "content_by_lua": "error('no')"},
            guarded("= /f", "/auth/script"),
            guarded("= /g", "/auth/broken"),
            guarded("= /a", "/auth/return"),
            guarded("= /b", "/auth/exit"),
            guarded("= /c", "/auth/named"),
            guarded("= /d", "/auth/given"),
            guarded("= /e", "/auth/deep"),
        ],
    }));
    for (path, status) in [("/a", 401), ("/b", 401), ("/c", 403), ("/e", 403), ("/f", 403), ("/g", 500)] {
        let reply = gw.get(path);
        assert_eq!(reply.status, status, "{path}: {}", reply.text());
    }
    says(&gw.get("/d"), 200, "in\n");
}

#[test]
fn an_error_within_a_page_has_its_own_status() {
    let dead = format!("http://{}", Upstream::dead());
    let gw = Gateway::with(json!({"lua_locations": [
        {"location": "= /given", "options": {"error_page": [["404", "=200", "@dead"]]}, "return": {"status": 404}},
        {"location": "= /same", "options": {"error_page": [["404", "@dead"]]}, "return": {"status": 404}},
        {"location": "= /moved", "options": {"error_page": [["404", "@moved"]]}, "return": {"status": 404}},
        {"location": "@dead", "proxy_pass": dead},
        {"location": "@moved", "return": {"status": 302, "body": "/there"}},
    ]}));
    for path in ["/given", "/same"] {
        let reply = gw.get(path);
        assert_eq!(reply.status, 502, "{path}");
        assert!(reply.text().contains("502 Bad Gateway"), "{}", reply.text());
    }
    assert_eq!(gw.get("/moved").status, 302);
}

#[test]
fn a_second_upstream_is_asked_as_if_it_were_the_first() {
    let (closed, told) = (closing(), telling());
    let late = |from: &str| json!({"error_page": [["502", "=", from]]});
    let gw = Gateway::with(json!({
        "lua_upstreams": {"two": [closed.addr(), told.addr()]},
        "lua_locations": [
            {"location": "/path/", "proxy_pass": format!("http://{}/of/first", closed.addr()), "options": late("@plain")},
            {"location": "= /tries", "proxy_pass": format!("http://{}", closed.addr()), "options": late("@two")},
            {"location": "@plain", "proxy_pass": format!("http://{}", told.addr())},
            {"location": "@two", "proxy_pass": "http://two", "options": {"proxy_next_upstream_tries": 2}},
        ],
    }));
    says(&gw.get("/path/a?b"), 200, "/path/a?b ");
    for _ in 0..2 {
        says(&gw.get("/tries"), 200, "/tries ");
    }
}

#[test]
fn nothing_of_a_failed_upstreams_head_goes_out_with_the_page() {
    let up = Upstream::answering(
        |_| "HTTP/1.1 200 Splendid\r\nContent-Encoding: br\r\nETag: \"e\"\r\nSet-Cookie: a=b\r\nContent-Length: 2\r\n\r\nok",
    );
    let dead = format!("http://{}", Upstream::dead());
    let mine = "ngx.header['X-Mine'] = 'mine'";
    let gw = Gateway::with(json!({"lua_locations": [
        {"location": "= /filter", "proxy_pass": format!("http://{}", up.addr()), "rewrite_by_lua": mine,
         "header_filter_by_lua": "error('no')", "options": {"error_page": [["500", "/page"]]}},
        {"location": "= /dead", "proxy_pass": dead, "rewrite_by_lua": mine, "options": {"error_page": [["502", "/page"]]}},
        {"location": "= /plain", "proxy_pass": dead, "rewrite_by_lua": mine},
        {"location": "= /reason", "options": {"error_page": [["404", "@up"]]}, "return": {"status": 404}},
        {"location": "= /page", "internal": true, "content_by_lua": "ngx.say('page')"},
        {"location": "@up", "proxy_pass": format!("http://{}", up.addr())},
    ]}));
    for (path, status) in [("/filter", 500), ("/dead", 502)] {
        let page = gw.get(path);
        says(&page, status, "page\n");
        assert_eq!(page.header("x-mine"), Some("mine"), "{path}");
        for gone in ["content-encoding", "etag", "set-cookie"] {
            assert_eq!(page.header(gone), None, "{path}: {gone}");
        }
    }
    assert_eq!(gw.get("/plain").header("x-mine"), Some("mine"));
    for (path, line) in
        [("/filter", "HTTP/1.1 500 Internal Server Error\r\n"), ("/reason", "HTTP/1.1 404 Not Found\r\n")]
    {
        let text = raw(&gw.proxy(), format!("GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n").as_bytes());
        assert!(text.starts_with(line), "{path}: {text}");
    }
}

#[test]
fn a_page_is_not_compressed_because_what_it_stands_for_was_to_be() {
    let long = "d".repeat(50);
    let gw = Gateway::with(json!({"lua_locations": [
        {"location": "= /page/of", "return": {"status": 200, "body": long}, "body_filter_by_lua": "error('no')",
         "options": {"gzip": "on", "gzip_types": "*", "error_page": [["500", "/page"]]}},
        {"location": "= /plain", "return": {"status": 200, "body": long},
         "body_filter_by_lua": "if not ngx.ctx.once then ngx.ctx.once = true error('no') end",
         "options": {"gzip": "on", "gzip_types": "*"}},
        {"location": "= /page", "internal": true, "content_by_lua": "ngx.say('page')"},
    ]}));
    let accepting = [("Accept-Encoding", "gzip")];
    let page = gw.send("GET", "/page/of", &accepting, b"");
    says(&page, 500, "page\n");
    assert_eq!(page.header("content-encoding"), None);
    let plain = gw.send("GET", "/plain", &accepting, b"");
    assert_eq!((plain.status, plain.header("content-encoding")), (500, None));
    assert!(plain.text().contains("<h1>500 Internal Server Error</h1>"), "{}", plain.text());
}

#[test]
fn a_status_of_a_balancers_script_has_its_page() {
    let gw = Gateway::with(json!({
        "lua_upstreams": {"asked": {"balancer_by_lua": "ngx.exit(tonumber(ngx.var.arg_status))"}},
        "lua_locations": [
            {"location": "= /t", "proxy_pass": "http://asked", "rewrite_by_lua": "ngx.header['X-Mine'] = 'mine'",
             "options": {"error_page": [["403", "@why"], ["404", "=200", "@why"]]}},
            {"location": "@why", "content_by_lua": "ngx.req.read_body() ngx.say('why ', ngx.req.get_body_data())"},
        ],
    }));
    for (status, answered) in [(403, 403), (404, 200)] {
        let page = gw.send("POST", &format!("/t?status={status}"), &[], b"hello");
        says(&page, answered, "why hello\n");
        assert_eq!(page.header("x-mine"), Some("mine"));
    }
    let plain = gw.get("/t?status=405");
    assert_eq!((plain.status, plain.header("x-mine")), (405, Some("mine")));
    assert!(plain.text().contains("<h1>405 "), "{}", plain.text());
    assert_eq!(raw(&gw.proxy(), b"GET /t?status=444 HTTP/1.1\r\nHost: h\r\n\r\n"), "");
}

#[test]
fn a_page_for_no_request_knows_where_that_came_from() {
    let gw = Gateway::with(json!({
        "nginx_config": {"http": {"real_ip_from": ["127.0.0.1"]}},
        "lua_options": {"error_page": [["400", "/why"]]},
        "lua_locations": [{"location": "= /why", "content_by_lua": "ngx.say('from ', ngx.var.remote_addr)"}],
    }));
    let reply = raw(&gw.proxy(), b"GeT / HTTP/1.1\r\nHost: h\r\nX-Real-IP: 192.0.2.9\r\n\r\n");
    assert!(reply.starts_with("HTTP/1.1 400 ") && reply.contains("from 192.0.2.9\n"), "{reply}");
}

#[test]
fn a_page_that_nobody_has_is_an_error() {
    let gw = Gateway::with(json!({"lua_locations": [
        {"location": "= /page", "options": {"error_page": [["404", "@$arg_name"]]}, "return": {"status": 404}},
        {"location": "= /exec", "content_by_lua": "ngx.exec('@gone')"},
        {"location": "@there", "content_by_lua": "ngx.say('there')"},
    ]}));
    says(&gw.get("/page?name=there"), 404, "there\n");
    for path in ["/page?name=gone", "/exec"] {
        assert_eq!(gw.get(path).status, 500, "{path}");
        gw.expect_log("could not find named location \"@gone\"");
    }
}

#[test]
fn a_page_promises_no_body_that_its_upstream_does_not_send() {
    let up = Upstream::answering(|seen: &Seen| {
        let status = seen.target.trim_start_matches('/').to_owned();
        format!(
            "HTTP/1.1 {status} X\r\nETag: \"e\"\r\nContent-Length: {}\r\n\r\n",
            if status == "304" { 10 } else { 0 }
        )
    });
    let gw = Gateway::with(json!({"lua_locations": [
        {"location": "/", "options": {"error_page": [["404", "@up"]]}, "return": {"status": 404}},
        {"location": "@up", "proxy_pass": format!("http://{}", up.addr())},
    ]}));
    let mut client = Client::connect(&gw.proxy());
    for path in ["/304", "/200", "/304"] {
        client.send("GET", path, &[], b"");
        let reply = client.reply("GET");
        assert_eq!((reply.status, reply.text().as_str()), (404, ""), "{path}");
        assert_ne!(reply.header("content-length"), Some("10"), "{path}");
    }
}

/// An HTTP/2 connection with one request. `window`: bytes that the client takes of the answer.
fn ask_http2(address: &str, path: &str, window: u32) -> TcpStream {
    const HEADERS: u8 = 1;
    const SETTINGS: u8 = 4;
    let frame = |kind: u8, flags: u8, stream: u8, payload: &[u8]| {
        let length = u8::try_from(payload.len()).expect("a short one");
        [&[0, 0, length, kind, flags, 0, 0, 0, stream], payload].concat()
    };
    let path = [&[4, u8::try_from(path.len()).expect("a short one")], path.as_bytes()].concat();
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream.set_read_timeout(Some(support::DEADLINE)).expect("a timeout");
    let sent = [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        // SETTINGS_INITIAL_WINDOW_SIZE
        frame(SETTINGS, 0, 0, &[&[0, 4][..], &window.to_be_bytes()].concat()),
        // `:method: GET`, `:scheme: http`, the path, `:authority: h`
        frame(HEADERS, 5, 1, &[&[0x82, 0x86][..], &path, &[1, 1, b'h']].concat()),
    ];
    stream.write_all(&sent.concat()).expect("it is sent");
    stream
}

/// The body of its answer, up to the reset of the stream.
fn body_until_reset(mut stream: TcpStream) -> Vec<u8> {
    const DATA: u8 = 0;
    const RESET: u8 = 3;
    let mut body = Vec::new();
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).expect("a frame, in time");
        let mut payload = vec![0; usize::from(u16::from_be_bytes([head[1], head[2]]))];
        stream.read_exact(&mut payload).expect("its payload");
        match (head[3], head[8]) {
            (DATA, 1) => body.extend(payload),
            (RESET, 1) => return body,
            _ => {}
        }
    }
}

#[test]
fn a_response_that_is_cut_off_waits_for_no_slow_client() {
    // As much as the gateway takes for a stream whose client takes nothing.
    let came = "x".repeat(50_000);
    let cut = format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 50001\r\n\r\n{came}");
    let up = Upstream::answering(move |_| cut.clone());
    let gw = Gateway::with(json!({
        "nginx_config": {"http": {"send_timeout": "60s"}},
        "lua_shared_dict": {"ended": "1m"},
        "lua_locations": [
            {"location": "/cut/", "proxy_pass": format!("http://{}", up.addr()),
             "log_by_lua": "ngx.shared.ended:set(ngx.var.uri, ngx.status)"},
            {"location": "= /ended", "content_by_lua": "ngx.print(tostring(ngx.shared.ended:get(ngx.var.arg_uri)))"},
        ],
    }));
    let cut = raw(&gw.proxy(), b"GET /cut/1 HTTP/1.1\r\nHost: h\r\n\r\n");
    assert!(cut.ends_with(&format!("\r\n\r\n{came}")), "{}", cut.len());
    let body = body_until_reset(ask_http2(&gw.proxy(), "/cut/2", 65_535));
    assert_eq!(body.len(), came.len(), "what came before is the client's");
    let slow = ask_http2(&gw.proxy(), "/cut/slow", 0);
    eventually("the request ends", || (gw.get("/ended?uri=/cut/slow").text() == "200").then_some(()));
    drop(slow);
}

#[test]
fn a_page_that_the_client_has_is_not_sent_empty() {
    let date = "Thu, 01 Jan 1970 00:00:00 GMT";
    let gw = Gateway::with(json!({
        "lua_options": {"error_page": [["404", "@page"], ["403", "=200", "@page"]]},
        "lua_locations": [
            {"location": "= /404", "return": {"status": 404}},
            {"location": "= /403", "return": {"status": 403}},
            {"location": "@page", "content_by_lua": format!("ngx.header.last_modified = '{date}' ngx.say('page')")},
        ],
    }));
    let asked = |path: &str| gw.send("GET", path, &[("If-Modified-Since", date)], b"");
    says(&asked("/404"), 404, "page\n");
    says(&asked("/403"), 304, "");
    says(&gw.get("/403"), 200, "page\n");
}
