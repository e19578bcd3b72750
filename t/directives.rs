//! nginx's own directives beside Lua in locations: who may come in, error pages, charset, compression, ranges, rewrites.

mod support;

use std::{
    io::{Read, Write},
    process::ExitStatus,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use support::{Client, Dir, Gateway, Reply, Upstream, http::raw, http2, run};

#[track_caller]
fn says(reply: &Reply, status: u16, expected: &str) {
    assert_eq!((reply.status, reply.text().as_str()), (status, expected));
}

fn unzip(body: &[u8]) -> String {
    let mut text = String::new();
    flate2::read::GzDecoder::new(body).read_to_string(&mut text).expect("gzip");
    text
}

#[test]
fn with_satisfy_any_one_that_agrees_is_enough() {
    let location = |name: &str, satisfy: &str, rule: &str, lua: &str| {
        json!({"location": name, "options": {"satisfy": satisfy, rule: [["all"]]}, "access_by_lua": lua,
            "content_by_lua": "ngx.say('in')"})
    };
    let gw = Gateway::with(json!({"lua_locations": [
        location("= /allowed", "any", "allow", "ngx.exit(403)"),
        location("= /denied", "any", "deny", "ngx.exit(403)"),
        location("= /agreed", "any", "deny", "return"),
        location("= /agreed/ok", "any", "deny", "ngx.sleep(0) ngx.exit(ngx.OK)"),
        location("= /declined", "any", "deny", "ngx.exit(ngx.DECLINED)"),
        location("= /asked", "any", "deny", "ngx.header['WWW-Authenticate'] = 'Basic' ngx.exit(401)"),
        location("= /broken", "any", "deny", "ngx.exit(500)"),
        location("= /words", "any", "deny", "ngx.status = 403 ngx.say('no') ngx.exit(403)"),
        location("= /all/denied", "all", "deny", "return"),
        location("= /all/refused", "all", "allow", "ngx.exit(403)"),
        location("= /all", "all", "allow", "ngx.exit(ngx.DECLINED)"),
    ]}));
    for (path, status) in [
        ("/allowed", 200),
        ("/denied", 403),
        ("/agreed", 200),
        ("/agreed/ok", 200),
        ("/declined", 403),
        ("/asked", 401),
        ("/broken", 500),
        ("/all/denied", 403),
        ("/all/refused", 403),
        ("/all", 200),
    ] {
        assert_eq!(gw.get(path).status, status, "{path}");
    }
    assert_eq!(gw.get("/asked").header("www-authenticate"), Some("Basic"));
    says(&gw.get("/words"), 403, "no\n");
    gw.expect_log("access forbidden by rule");
}

#[test]
fn with_satisfy_any_a_401_is_withdrawn_by_who_agrees_and_by_no_other() {
    let location = |name: &str, options: Value, lua: &str| {
        let mut all = json!({"satisfy": "any", "auth_request": "/auth"});
        all.as_object_mut().expect("a map").extend(options.as_object().expect("a map").clone());
        json!({"location": name, "options": all, "access_by_lua": lua, "content_by_lua": "ngx.say('in')"})
    };
    let gw = Gateway::with(json!({"lua_locations": [
        {"location": "= /auth", "content_by_lua": "ngx.header['WWW-Authenticate'] = 'Basic' ngx.exit(401)"},
        location("= /agreed", json!({}), "return"),
        location("= /refused", json!({}), "ngx.exit(403)"),
        location("= /denied", json!({"deny": [["all"]]}), "ngx.exit(ngx.DECLINED)"),
    ]}));
    let agreed = gw.get("/agreed");
    says(&agreed, 200, "in\n");
    assert_eq!(agreed.header("www-authenticate"), None);
    for path in ["/refused", "/denied"] {
        let refused = gw.get(path);
        assert_eq!((refused.status, refused.header("www-authenticate")), (401, Some("Basic")), "{path}");
    }
}

#[test]
fn a_subrequest_says_who_may_come_in() {
    let api = |name: &str, options: Value| {
        json!({"location": name, "set": {"user": "$arg_user"}, "options": options,
        "content_by_lua": "ngx.say('hello ', ngx.var.user, ' ', ngx.var.seen)"})
    };
    let gw = Gateway::with(json!({"lua_locations": [
        {"location": "= /auth", "set": {"seen": "yes"}, "content_by_lua": r#"
            local status = ({a = 200, b = 403, c = 401, d = 302})[ngx.var.user]
            ngx.header["WWW-Authenticate"] = "Basic realm=x"
            ngx.exit(status)"#},
        api("= /api", json!({"auth_request": "/auth"})),
        api("= /any", json!({"auth_request": "/auth", "satisfy": "any", "deny": [["all"]]})),
        api("= /off", json!({"auth_request": "off"})),
    ]}));
    says(&gw.get("/api?user=a"), 200, "hello a yes\n");
    says(&gw.get("/any?user=a"), 200, "hello a yes\n");
    for (path, status, asks) in [
        ("/api?user=b", 403, None),
        ("/api?user=c", 401, Some("Basic realm=x")),
        ("/api?user=d", 500, None),
        ("/any?user=b", 403, None),
        ("/off?user=b", 200, None),
    ] {
        let reply = gw.get(path);
        assert_eq!((reply.status, reply.header("www-authenticate")), (status, asks), "{path}");
    }
    gw.expect_log("auth request unexpected status: 302");
}

#[test]
fn error_pages_stand_in_for_nginx_own() {
    let dead = "http://127.0.0.1:1/";
    let dir = Dir::new();
    std::fs::create_dir_all(dir.join("html")).expect("a directory");
    dir.write("html/404.html", "not here\n");
    dir.configure(json!({
        "lua_options": {"error_page": [["404", "/404.html"], ["403", "=200", "@kind"], ["502", "504", "/down?why=$uri"],
            ["410", "=", "/own"], ["409", "http://other.test/"], ["408", "=303", "http://other.test/$arg_a"],
            ["401", "/twice"], ["400", "=", "/own"]]},
        "lua_locations": [
            {"location": "= /exit", "content_by_lua": "ngx.exit(tonumber(ngx.var.arg_status))"},
            {"location": "= /return", "return": {"status": 404}},
            {"location": "= /access", "access_by_lua": "ngx.exit(404)", "content_by_lua": "ngx.say('no')"},
            {"location": "= /dead", "proxy_pass": dead},
            {"location": "= /words", "content_by_lua": "ngx.status = 404 ngx.say('mine')"},
            {"location": "= /sub", "content_by_lua": r#"
                local res = ngx.location.capture("/return") ngx.print(res.status, ' ', res.body)"#},
            {"location": "@kind", "content_by_lua": "ngx.say('kind ', ngx.var.uri)"},
            {"location": "= /down", "internal": true,
             "content_by_lua": "ngx.say('down ', ngx.var.arg_why, ' ', ngx.req.get_method(), ' ', ngx.status)"},
            {"location": "= /own", "content_by_lua": "if ngx.var.arg_a then ngx.status = 299 end ngx.say('own')"},
            {"location": "= /twice", "content_by_lua": "ngx.exit(404)"},
            {"location": "= /plain", "options": {"error_page": []}, "return": {"status": 404}},
        ],
    }));
    let gw = Gateway::in_dir(dir);
    for (path, status, text) in [
        ("/exit?status=404", 404, "not here\n"),
        ("/return", 404, "not here\n"),
        ("/access", 404, "not here\n"),
        ("/missing", 404, "not here\n"),
        ("/exit?status=403", 200, "kind /exit\n"),
        ("/exit?status=410", 410, "own\n"),
        ("/words", 404, "mine\n"),
        ("/sub", 200, "404 not here\n"),
    ] {
        says(&gw.get(path), status, text);
    }
    says(&gw.send("POST", "/dead", &[], b"x"), 502, "down /dead GET 502\n");
    for (path, status, place) in
        [("/exit?status=409", 302, "http://other.test/"), ("/exit?status=408&a=b", 303, "http://other.test/b")]
    {
        let reply = gw.get(path);
        assert_eq!((reply.status, reply.header("location")), (status, Some(place)), "{path}");
    }
    // An error within a page is not sent to another one.
    let twice = gw.get("/exit?status=401");
    assert_eq!(twice.status, 404);
    assert!(twice.text().contains("<h1>404 Not Found</h1>"), "{}", twice.text());
    assert!(gw.get("/plain").text().contains("<h1>404 Not Found</h1>"));
    assert!(gw.get("/exit?status=405").text().contains("<h1>405 Not Allowed</h1>"));
    says(&gw.get("/down"), 404, "not here\n");
    let refused = raw(&gw.proxy(), b"GeT / HTTP/1.1\r\nHost: h\r\n\r\n");
    assert!(refused.starts_with("HTTP/1.1 200 OK\r\n") && refused.contains("own\n"), "{refused}");
}

#[test]
fn a_charset_is_named_where_none_is() {
    let typed = |name: &str, kind: &str| {
        json!({"location": name, "content_by_lua":
        format!("ngx.header.content_type = '{kind}' ngx.say('x')")})
    };
    let gw = Gateway::with(json!({
        "lua_options": {"charset": "GBK"},
        "lua_locations": [
            typed("= /plain", "text/plain"),
            typed("= /named", "text/plain; charset=utf-8"),
            typed("= /image", "image/png"),
            {"location": "= /page", "return": {"status": 404}},
            {"location": "= /json", "options": {"charset": "utf-8", "charset_types": "application/json",
                "default_type": "application/json"}, "content_by_lua": "ngx.say('{}')"},
            {"location": "= /off", "options": {"charset": "off"}, "content_by_lua": "ngx.say('x')"},
        ],
    }));
    for (path, kind) in [
        ("/plain", "text/plain; charset=GBK"),
        ("/named", "text/plain; charset=utf-8"),
        ("/image", "image/png"),
        ("/page", "text/html; charset=GBK"),
        ("/json", "application/json; charset=utf-8"),
        ("/off", "text/plain"),
    ] {
        assert_eq!(gw.get(path).header("content-type"), Some(kind), "{path}");
    }
}

#[test]
fn responses_are_compressed_behind_the_filters_of_lua() {
    let page = format!("HTTP/1.1 200 OK\r\nContent-Type: text/css\r\nContent-Length: 50\r\n\r\n{}", "e".repeat(50));
    let upstream = Upstream::answering(move |_| page.clone());
    let dir = Dir::new();
    std::fs::create_dir_all(dir.join("html")).expect("a directory");
    dir.write("html/long.txt", "long ".repeat(100));
    dir.configure(json!({
        "lua_options": {"gzip": "on", "gzip_types": "text/plain", "gzip_vary": "on", "gzip_comp_level": "9"},
        "lua_locations": [
            {"location": "= /lua", "header_filter_by_lua": "ngx.header.etag = '\"x\"' ngx.header.content_length = nil",
             "body_filter_by_lua": "ngx.arg[1] = ngx.arg[1]:upper()",
             "content_by_lua": "ngx.print('abc') ngx.flush(true) ngx.print(('d'):rep(50))"},
            {"location": "= /short", "return": {"status": 200, "body": "0123456789"}},
            {"location": "= /status", "content_by_lua": "ngx.status = 500 ngx.print(('d'):rep(50))"},
            {"location": "= /done", "content_by_lua":
                "ngx.header.content_encoding = 'br' ngx.print(('d'):rep(50))"},
            {"location": "= /type", "content_by_lua": "ngx.header.content_type = 'image/png' ngx.print(('d'):rep(50))"},
            {"location": "= /passed", "proxy_pass": format!("http://{}/", upstream.addr()),
             "options": {"gzip_types": "*"}},
            {"location": "= /off", "options": {"gzip": "off"}, "return": {"status": 200, "body": "d".repeat(50)}},
        ],
    }));
    let gw = Gateway::in_dir(dir);
    let accepting = [("Accept-Encoding", "br, gzip")];
    for (path, text) in
        [("/lua", format!("ABC{}", "D".repeat(50))), ("/long.txt", "long ".repeat(100)), ("/passed", "e".repeat(50))]
    {
        says(&gw.get(path), 200, &text);
        let reply = gw.send("GET", path, &accepting, b"");
        assert_eq!((reply.status, reply.header("content-encoding")), (200, Some("gzip")), "{path}");
        assert_eq!(reply.header("vary"), Some("Accept-Encoding"), "{path}");
        assert_eq!(unzip(&reply.body), text, "{path}");
    }
    let mut client = Client::connect(&gw.proxy());
    client.send("GET", "/lua", &accepting, b"");
    assert_eq!(client.head().header("etag"), Some("W/\"x\""));
    let first = client.chunk().expect("a chunk");
    let mut decoder = flate2::write::GzDecoder::new(Vec::new());
    decoder.write_all(&first).and_then(|()| decoder.flush()).expect("gzip");
    assert_eq!(decoder.get_ref(), b"ABC", "what is flushed does not wait for the rest");
    for path in ["/short", "/status", "/done", "/type", "/off"] {
        let reply = gw.send("GET", path, &accepting, b"");
        assert_ne!(reply.header("content-encoding"), Some("gzip"), "{path}");
    }
    for headers in [&[("Accept-Encoding", "gzip;q=0")][..], &[], &[accepting[0], ("Via", "1.1 other")]] {
        let reply = gw.send("GET", "/long.txt", headers, b"");
        assert_eq!(reply.header("content-encoding"), None, "{headers:?}");
        assert_eq!(reply.header("vary"), Some("Accept-Encoding"), "it might have been");
    }
    assert_eq!(gw.send("HEAD", "/long.txt", &accepting, b"").header("content-encoding"), None);
    let old = raw(&gw.proxy(), b"GET /long.txt HTTP/1.0\r\nAccept-Encoding: gzip\r\n\r\n");
    assert!(!old.contains("Content-Encoding"), "{old}");
}

#[test]
fn a_file_is_sent_in_ranges() {
    let dir = Dir::new();
    std::fs::create_dir_all(dir.join("html")).expect("a directory");
    dir.write("html/a.txt", "0123456789");
    std::fs::create_dir_all(dir.join("html/paged")).expect("a directory");
    dir.write("html/paged/a.txt", "0123456789");
    dir.configure(json!({"lua_locations": [
        {"location": "/", "header_filter_by_lua": "ngx.header.x = ngx.status"},
        {"location": "/paged/", "options": {"root": "html", "error_page": [["416", "@paged"]]}},
        {"location": "@paged", "content_by_lua": "ngx.say('paged')"},
        {"location": "= /sub", "content_by_lua": "ngx.print(ngx.location.capture('/a.txt').body)"},
    ]}));
    let gw = Gateway::in_dir(dir);
    let ask = |range: &str| gw.send("GET", "/a.txt", &[("Range", range)], b"");
    let part = ask("bytes=2-4");
    says(&part, 206, "234");
    assert_eq!((part.header("content-range"), part.header("x")), (Some("bytes 2-4/10"), Some("200")));
    says(&ask("bytes=-2"), 206, "89");
    says(&ask("bytes=0-1,3-4"), 200, "0123456789");
    let none = ask("bytes=10-");
    assert_eq!((none.status, none.header("content-range")), (416, Some("bytes */10")));
    assert!(none.text().contains("<h1>416 "), "{}", none.text());
    let paged = gw.send("GET", "/paged/a.txt", &[("Range", "bytes=10-")], b"");
    says(&paged, 416, "paged\n");
    assert_eq!((paged.header("content-range"), paged.header("last-modified")), (Some("bytes */10"), None));
    let whole = gw.get("/a.txt");
    assert_eq!(whole.header("accept-ranges"), Some("bytes"));
    let since = whole.header("last-modified").expect("a date").to_owned();
    let asked = |since: &str| gw.send("GET", "/a.txt", &[("Range", "bytes=0-0"), ("If-Range", since)], b"");
    says(&asked(&since), 206, "0");
    says(&asked("Thu, 01 Jan 1970 00:00:00 GMT"), 200, "0123456789");
    says(&gw.send("GET", "/sub", &[("Range", "bytes=0-0")], b""), 200, "0123456789");
}

#[test]
fn the_servers_rewrites_come_before_a_location_is_chosen() {
    let gw = Gateway::with(json!({
        "lua_options": {"rewrite": [["^/old/(.*)$", "/new/$1"], ["^/gone$", "/gone/", "permanent"]]},
        "lua_locations": [
            {"location": "/new/", "content_by_lua": "ngx.say(ngx.var.uri)"},
            {"location": "/old/", "content_by_lua": "ngx.say('old')"},
            {"location": "= /sub", "content_by_lua": r#"
                local moved, new = ngx.location.capture("/gone"), ngx.location.capture("/old/b")
                ngx.print(moved.status, ' ', moved.header.Location, ' ', new.body)"#},
        ],
    }));
    says(&gw.get("/old/a"), 200, "/new/a\n");
    says(&gw.get("/sub"), 200, "301 /gone/ /new/b\n");
    let gone = gw.get("/gone");
    let there = format!("http://{}/gone/", gw.proxy());
    assert_eq!((gone.status, gone.header("location")), (301, Some(&*there)));
}

#[test]
fn the_servers_rewrites_leave_a_subrequest_the_ctx_that_it_was_given() {
    let gw = Gateway::with(json!({
        "lua_options": {"rewrite": [["^/old/(.*)$", "/new/$1"]]},
        "lua_locations": [
            {"location": "/new/", "content_by_lua": "ngx.ctx.seen = ngx.ctx.given"},
            {"location": "= /t", "content_by_lua": r#"
                for _, path in ipairs({"/new/a", "/old/a"}) do
                    local ctx = {given = "g"}
                    ngx.location.capture(path, {ctx = ctx})
                    ngx.print(tostring(ctx.seen), " ")
                end"#},
        ],
    }));
    says(&gw.get("/t"), 200, "g g ");
}

#[test]
fn auth_request_asks_for_the_head_only() {
    let (told, left) = std::sync::mpsc::channel();
    // A body without end, of which the gateway may take what it likes.
    let upstream = Upstream::serving(move |_, mut stream| {
        let mut reader = std::io::BufReader::new(stream.try_clone().expect("a handle"));
        let Some(seen) = support::upstream::read_request(&mut reader) else { return };
        let status = seen.target.rsplit('=').next().expect("a status").to_owned();
        let _ = stream.write_all(format!("HTTP/1.1 {status} X\r\nContent-Length: 1000000000000\r\n\r\nx").as_bytes());
        let ended = reader.read(&mut [0]);
        told.send(matches!(ended, Ok(0) | Err(_))).expect("the test waits");
    });
    let guarded = |name: &str, auth: &str| json!({"location": name, "options": {"auth_request": auth}, "content_by_lua": "ngx.say('in')"});
    let asked = |name: &str, status: &str| json!({"location": name, "proxy_pass": format!("http://{}/auth?status={status}", upstream.addr())});
    let gw = Gateway::with(json!({
        "lua_shared_dict": {"done": "1m"},
        "lua_locations": [
            guarded("= /in", "/auth/in"), guarded("= /out", "/auth/out"), guarded("= /lua", "/auth/lua"),
            asked("= /auth/in", "200"), asked("= /auth/out", "403"),
            {"location": "= /auth/lua", "content_by_lua":
                "ngx.say(('x'):rep(100000)) ngx.flush(true) ngx.sleep(0) ngx.shared.done:set('done', 1)"},
            {"location": "= /done", "content_by_lua": "ngx.print(ngx.shared.done:get('done'))"},
        ],
    }));
    says(&gw.get("/in"), 200, "in\n");
    assert!(left.recv().expect("it is told"), "the connection is closed");
    assert_eq!(gw.get("/out").status, 403);
    assert!(left.recv().expect("it is told"));
    says(&gw.get("/lua"), 200, "in\n");
    says(&gw.get("/done"), 200, "1");
}

#[test]
fn a_redirect_is_relative_for_filters_and_where_nothing_else_is_wanted() {
    let gw = Gateway::with(json!({"lua_locations": [
        {"location": "= /to", "return": {"status": 302, "body": "/there"},
         "header_filter_by_lua": "ngx.header.seen = ngx.header.location"},
        {"location": "= /own", "return": {"status": 302, "body": "/there"},
         "header_filter_by_lua": "ngx.header.location = '/mine'"},
        {"location": "= /relative", "options": {"absolute_redirect": "off"}, "return": {"status": 302, "body": "/there"}},
    ]}));
    let to = gw.get("/to");
    let there = format!("http://{}/there", gw.proxy());
    assert_eq!((to.header("location"), to.header("seen")), (Some(&*there), Some("/there")));
    assert_eq!(gw.get("/own").header("location"), Some("/mine"));
    assert_eq!(gw.get("/relative").header("location"), Some("/there"));
    // HTTP/1.0 need not name a host: the address that was reached stands for it.
    let reply = raw(&gw.proxy(), b"GET /to HTTP/1.0\r\n\r\n");
    assert!(reply.contains(&format!("\r\nLocation: {there}\r\n")), "{reply}");
}

#[test]
fn what_is_long_is_compressed_bit_by_bit() {
    let dir = Dir::new();
    std::fs::create_dir_all(dir.join("html")).expect("a directory");
    dir.write("html/long.txt", vec![b'x'; 16 << 20]);
    dir.configure(json!({
        "nginx_config": {"worker_processes": 1},
        "lua_shared_dict": {"state": "1m"},
        "lua_locations": [
            {"location": "= /long.txt", "options": {"gzip": "on", "gzip_types": "*", "gzip_comp_level": "9"},
             "header_filter_by_lua": "ngx.shared.state:set('is', 'begun')",
             "log_by_lua": "ngx.shared.state:set('is', 'ended')"},
            {"location": "= /state", "content_by_lua": "ngx.print(tostring(ngx.shared.state:get('is')))"},
        ],
    }));
    let gw = Gateway::in_dir(dir);
    let mut client = Client::connect(&gw.proxy());
    client.send("GET", "/long.txt", &[("Accept-Encoding", "gzip")], b"");
    let state = support::eventually("the worker begins", || {
        let state = gw.get("/state").text();
        (state != "nil").then_some(state)
    });
    assert_eq!(state, "begun", "the worker has time for others meanwhile");
    assert_eq!(unzip(&client.reply("GET").body).len(), 16 << 20);
}

#[test]
fn a_shorter_answer_than_promised_goes_out_before_the_connection_ends() {
    let gw = Gateway::with(json!({"lua_locations": [
        {"location": "= /big", "content_by_lua": "ngx.header.content_length = 8589934591 ngx.say('hi')"},
    ]}));
    let cut = raw(&gw.proxy(), b"GET /big HTTP/1.1\r\nHost: h\r\n\r\n");
    assert!(cut.contains("Content-Length: 8589934591\r\n") && cut.ends_with("\r\n\r\nhi\n"), "{cut}");
}

#[test]
fn a_body_filter_that_returns_an_error_cuts_the_response_off() {
    let gw = Gateway::with(json!({"lua_locations": [
        {"location": "= /error", "content_by_lua": "ngx.say('x')", "body_filter_by_lua": "return ngx.ERROR"},
        {"location": "= /ok", "content_by_lua": "ngx.say('x')", "body_filter_by_lua": "return ngx.OK"},
        {"location": "= /file", "return": {"status": 200, "body": "x"}, "body_filter_by_lua": "return 500"},
        {"location": "= /sub", "content_by_lua": "ngx.say(ngx.location.capture('/error').status)"},
        {"location": "= /subs", "content_by_lua": "ngx.say(ngx.location.capture('/ok').body)"},
    ]}));
    for path in ["/error", "/file", "/sub"] {
        let got = raw(&gw.proxy(), format!("GET {path} HTTP/1.1\r\nHost: h\r\n\r\n").as_bytes());
        assert_eq!(got, "", "{path}");
    }
    says(&gw.get("/ok"), 200, "x\n");
    says(&gw.get("/subs"), 200, "x\n\n");
}

#[test]
fn a_body_is_as_long_as_a_script_says_before_it_is_read() {
    let read = "ngx.req.set_header('Content-Length', 3) ngx.req.read_body()";
    let gw = Gateway::with(json!({"lua_locations": [
        {"location": "= /memory", "content_by_lua": format!("{read} ngx.print(ngx.req.get_body_data())")},
        {"location": "= /file", "options": {"client_body_in_file_only": "on"},
         "content_by_lua": format!("{read} ngx.print(io.open(ngx.req.get_body_file()):read('*a'))")},
    ]}));
    for path in ["/memory", "/file"] {
        says(&gw.send("POST", path, &[], b"abcdef"), 200, "abc");
        says(&gw.send("POST", path, &[], b"ab"), 200, "ab");
    }
}

#[test]
fn sockets_are_there_where_openresty_has_none() {
    let up = Upstream::answering(|_| "HTTP/1.0 200 OK\r\nConnection: close\r\nContent-Length: 4\r\n\r\nthis");
    let port = up.addr().rsplit(':').next().expect("a port").to_owned();
    let ask = format!(
        "local sock = ngx.socket.tcp() assert(sock:connect('127.0.0.1', {port})) assert(sock:send('GET / HTTP/1.0\\r\\n\\r\\n'))
        local said = assert(sock:receive('*a')):match('this') assert(sock:close())"
    );
    let gw = Gateway::with(json!({"lua_locations": [{
        "location": "= /t", "content_by_lua": "ngx.print(ngx.var.set, ' ')",
        "set_by_lua": [{"var": "set", "lua": format!("{ask} return said")}],
        "header_filter_by_lua": format!("{ask} ngx.header.x = said"),
        "body_filter_by_lua": format!("if ngx.arg[2] then {ask} ngx.arg[1] = ngx.arg[1] .. said end"),
        "log_by_lua": format!("{ask} ngx.log(ngx.WARN, said, ' in ', ngx.get_phase())"),
    }]}));
    let reply = gw.get("/t");
    says(&reply, 200, "this this");
    assert_eq!(reply.header("x"), Some("this"));
    gw.expect_log("this in log");
}

#[test]
fn bodies_are_as_large_as_a_location_lets_them_be() {
    let up = Upstream::echo();
    let gw = Gateway::with(json!({"lua_options": {"client_max_body_size": "5"}, "lua_locations": [
        {"location": "= /read", "content_by_lua": "ngx.req.read_body() ngx.print(ngx.req.get_body_data())"},
        {"location": "= /proxied", "proxy_pass": format!("http://{}", up.addr()), "options": {"proxy_http_version": "1.1"}},
        {"location": "= /any", "options": {"client_max_body_size": "0"},
         "content_by_lua": "ngx.req.read_body() ngx.print(ngx.req.get_body_data())"},
    ]}));
    let chunked = |path: &str, body: &str| {
        let head =
            format!("POST {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n");
        raw(&gw.proxy(), format!("{head}{:x}\r\n{body}\r\n0\r\n\r\n", body.len()).as_bytes())
    };
    for path in ["/read", "/proxied", "/any"] {
        assert_eq!(gw.send("POST", path, &[], b"12345").status, 200, "{path}");
        assert!(chunked(path, "12345").starts_with("HTTP/1.1 200"), "{path}");
    }
    for path in ["/read", "/proxied"] {
        assert_eq!(gw.send("POST", path, &[], b"123456").status, 413, "{path}");
        assert!(chunked(path, "123456").starts_with("HTTP/1.1 413"), "{path}");
    }
    says(&gw.send("POST", "/any", &[], b"123456"), 200, "123456");
    gw.expect_log("client intended to send too large body: 6 bytes");
}

#[test]
fn values_that_cannot_be_read_stop_the_start() {
    let told = |settings: Value| -> (ExitStatus, String) {
        let dir = Dir::new();
        dir.configure(settings);
        let mut command = dir.command();
        command.arg("test");
        run(command)
    };
    let (status, text) = told(json!({
        "lua_options": {"lua_regex_match_limit": "far", "rewrite": [["(", "/x"]]},
        "lua_locations": [{"location": "/x", "options": {
            "satisfy": "some", "auth_request": "auth", "error_page": [["x", "/y"]], "gzip": "maybe", "gzip_comp_level": "0",
        }}],
    }));
    assert_eq!(status.code(), Some(1));
    let (pages, named) = told(json!({
        "lua_options": {"error_page": [["404", "@here"], ["502", "@nowhere"], ["503", "@$arg_a"]]},
        "lua_locations": [
            {"location": "@here"},
            {"location": "= /a", "options": {"error_page": [["404", "=", "@gone"]]}},
            {"location": "= /b", "options": {"error_page": [["404", "=100", "/x"], ["200", "/x"]]}},
        ],
    }));
    assert_eq!(pages.code(), Some(1));
    for mistake in [
        "lua_options.error_page: no location is called @nowhere",
        "lua_locations[1].options.error_page: no location is called @gone",
        "lua_locations[2].options.error_page: \"404 =100 /x\"",
        "lua_locations[2].options.error_page: \"200 /x\"",
    ] {
        assert!(named.contains(mistake), "{mistake}: {named}");
    }
    assert!(!named.contains("called @here") && !named.contains("called @$"), "{named}");
    for path in [
        "lua_options.lua_regex_match_limit: \"far\"",
        "lua_options.rewrite: \"(\"",
        "lua_locations[0].options.satisfy: \"some\"",
        "lua_locations[0].options.auth_request: \"auth\"",
        "lua_locations[0].options.error_page: \"x /y\"",
        "lua_locations[0].options.gzip: \"maybe\"",
        "lua_locations[0].options.gzip_comp_level: \"0\"",
    ] {
        assert!(text.contains(path), "{path}: {text}");
    }
}

/// The bytes of a body, and how many of them leave in a second: with a piece less than all of them it takes 0.9 s.
const RATED: usize = 16 << 10;

fn rated_body() -> String {
    "0123456789abcdef".repeat(RATED / 16)
}

/// An upstream whose answers have that body.
fn rated_upstream() -> Upstream {
    Upstream::answering(|_| format!("HTTP/1.1 200 OK\r\nContent-Length: {RATED}\r\n\r\n{}", rated_body()))
}

/// Asks for each path over both protocols, all at once, and says how long each of them took.
fn times(gw: &Gateway, paths: &[&str]) -> Vec<(String, Duration)> {
    let timed = |name: String, get: &dyn Fn() -> Reply| {
        let begun = Instant::now();
        let reply = get();
        assert_eq!((reply.status, reply.body.len()), (200, RATED), "{name}");
        (name, begun.elapsed())
    };
    thread::scope(|scope| {
        let asked = paths.iter().flat_map(|path| {
            [
                scope.spawn(move || timed(format!("{path} by HTTP/1"), &|| gw.get(path))),
                scope.spawn(move || timed(format!("{path} by HTTP/2"), &|| http2::get(&gw.proxy(), path))),
            ]
        });
        let asked: Vec<_> = asked.collect();
        asked.into_iter().map(|one| one.join().expect("an answer")).collect()
    })
}

#[test]
fn a_response_leaves_at_its_rate() {
    let upstream = rated_upstream();
    let proxied = format!("http://{}", upstream.addr());
    let print = format!("ngx.print(('x'):rep({RATED}))");
    let print = print.as_str();
    let content = |path: &str, options: Value, before: &str| json!({"location": path, "options": options, "access_by_lua": before, "content_by_lua": print});
    let limited = json!({"limit_rate": "16k"});
    let dir = Dir::new();
    std::fs::create_dir(dir.join("html")).expect("a directory");
    dir.write("html/file.txt", rated_body());
    dir.configure(json!({"lua_locations": [
        content("= /option", limited.clone(), ""),
        {"location": "= /set", "set": {"limit_rate": "16k"}, "content_by_lua": print},
        content("= /written", json!({}), "ngx.var.limit_rate = '16k'"),
        {"location": "= /filter", "content_by_lua": print, "header_filter_by_lua": "ngx.var.limit_rate = 16384"},
        {"location": "= /chunked", "options": limited, "content_by_lua": format!("ngx.send_headers() {print}")},
        {"location": "= /pieces", "options": limited,
         "content_by_lua": format!("for i = 1, 8 do ngx.print(('x'):rep({RATED} / 8)) ngx.flush(true) end")},
        {"location": "= /file.txt", "options": {"limit_rate": "$arg_rate"}},
        {"location": "= /proxied", "options": limited, "proxy_pass": proxied},
        {"location": "= /filtered", "options": limited, "proxy_pass": proxied,
         "body_filter_by_lua": "ngx.arg[1] = ngx.arg[1]:upper()"},
        content("= /late", json!({}), &format!(
            "ngx.print(('x'):rep(1)) ngx.flush(true) ngx.var.limit_rate = '16k' ngx.print(('x'):rep({RATED} - 1)) ngx.exit(200)")),
        content("= /after", json!({"limit_rate": "4k", "limit_rate_after": "12k"}), ""),

        content("= /free", json!({}), ""),
        content("= /zero", json!({"limit_rate": 0}), ""),
        content("= /lifted", json!({"limit_rate": 1}), "ngx.var.limit_rate = 0"),
        content("= /unreadable", json!({"limit_rate": "$arg_rate"}), ""),
        content("= /all", json!({"limit_rate": 1, "limit_rate_after": "$arg_after"}), ""),
        {"location": "= /proxied/free", "proxy_pass": proxied},
    ]}));
    let gw = Gateway::in_dir(dir);
    let plugin = |code: &str| json!({"serverless-pre-function": {"phase": "access", "functions": [code]}});
    gw.route("1", "/route", &upstream, plugin("return function() ngx.var.limit_rate = '16k' end"));
    gw.route(
        "2",
        "/route/own",
        &upstream,
        plugin(&format!("return function() ngx.var.limit_rate = '16k' {print} end")),
    );
    gw.route("3", "/route/free", &upstream, json!({}));
    let slow = [
        "/option",
        "/set",
        "/written",
        "/filter",
        "/chunked",
        "/pieces",
        "/file.txt?rate=16k",
        "/proxied",
        "/filtered",
        "/late",
        "/route",
        "/route/own",
    ];
    for (name, time) in times(&gw, &slow) {
        assert!(time >= Duration::from_millis(900), "{name}: {time:?}");
    }
    for (name, time) in times(&gw, &["/after"]) {
        assert!(time >= Duration::from_millis(800), "{name}: {time:?}");
    }
    let free = ["/free", "/zero", "/lifted", "/unreadable?rate=fast", "/all?after=16k", "/proxied/free", "/route/free"];
    for path in free {
        // Three times, since the machine may be busy with something else.
        let swift = (0..3).any(|_| times(&gw, &[path]).iter().all(|(_, time)| *time < Duration::from_millis(900)));
        assert!(swift, "{path}");
    }
}

#[test]
fn the_rate_is_of_one_request_and_is_told() {
    let gw = Gateway::with(json!({"lua_locations": [
        {"location": "= /slow", "options": {"limit_rate": "1k"}, "content_by_lua": "ngx.print(ngx.var.limit_rate)"},
        {"location": "= /own", "options": {"limit_rate": "1k"},
         "content_by_lua": "ngx.var.limit_rate = '2k' ngx.print(ngx.var.limit_rate)"},
        {"location": "= /free", "content_by_lua": format!("ngx.print(ngx.var.limit_rate, ('x'):rep({RATED} - 1))")},
    ]}));
    let mut client = Client::connect(&gw.proxy());
    let mut get = |path: &str| {
        client.send("GET", path, &[], b"");
        client.reply("GET").text()
    };
    assert_eq!(get("/slow"), "1024");
    assert_eq!(get("/own"), "2048");
    let begun = Instant::now();
    assert!(get("/free").starts_with("0x"));
    assert!(
        begun.elapsed() < Duration::from_secs(RATED as u64 / 1024 - 1),
        "the next request of the connection has none"
    );
}

#[test]
fn a_wait_for_the_rate_is_nobodys_timeout() {
    let upstream = Upstream::answering(|_| "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc");
    let gw = Gateway::with(json!({
        "nginx_config": {"http": {"send_timeout": "300ms"}},
        "lua_locations": [
            {"location": "= /own", "options": {"limit_rate": 1}, "content_by_lua": "ngx.print('abc')"},
            {"location": "= /proxied", "options": {"limit_rate": 1, "proxy_read_timeout": "300ms"},
             "proxy_pass": format!("http://{}", upstream.addr())},
        ],
    }));
    thread::scope(|scope| {
        for path in ["/own", "/proxied"] {
            scope.spawn(|| assert_eq!(gw.get(path).text(), "abc"));
            scope.spawn(|| assert_eq!(http2::get(&gw.proxy(), path).text(), "abc"));
        }
    });
}

/// A preface and a request for `/t` over HTTP/2, fields as RFC 7541 has them in its static table.
const ASK_HTTP2: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00\
    \x00\x00\x0a\x01\x05\x00\x00\x00\x01\x82\x86\x44\x02/t\x41\x02h1";

#[test]
fn a_client_that_goes_away_ends_its_slow_response() {
    let log = "ngx.log(ngx.WARN, 'ended ', ngx.var.server_protocol, ' ', ngx.var.body_bytes_sent)";
    let gw = Gateway::with(json!({"lua_locations": [{
        "location": "= /t", "options": {"limit_rate": 100}, "content_by_lua": "ngx.print(('x'):rep(1000000))", "log_by_lua": log,
    }]}));
    for (protocol, ask) in [("HTTP/1.1", &b"GET /t HTTP/1.1\r\nHost: h\r\n\r\n"[..]), ("HTTP/2.0", ASK_HTTP2)] {
        let mut client = Client::connect(&gw.proxy());
        client.write(ask).expect("sent");
        let mut seen = Vec::new();
        while !seen.contains(&b'x') {
            let some = client.some();
            assert!(!some.is_empty(), "{protocol} answers");
            seen.extend(some);
        }
        drop(client);
        gw.expect_log(&format!("ended {protocol} "));
    }
}

#[test]
fn a_slow_response_holds_its_upstream_back() {
    const BODY: usize = 64 << 20;
    let written = Arc::new(AtomicUsize::new(0));
    let count = written.clone();
    let upstream = Upstream::serving(move |_, mut stream| {
        let _ = stream.read(&mut [0; 4096]);
        let _ = write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {BODY}\r\n\r\n");
        while count.load(Ordering::SeqCst) < BODY && stream.write_all(&[b'x'; 1 << 16]).is_ok() {
            count.fetch_add(1 << 16, Ordering::SeqCst);
        }
    });
    let gw = Gateway::with(json!({"lua_locations": [
        {"location": "= /t", "options": {"limit_rate": "16k"}, "proxy_pass": format!("http://{}", upstream.addr())},
    ]}));
    let mut client = Client::connect(&gw.proxy());
    client.send("GET", "/t", &[], b"");
    assert_eq!(client.head().status, 200);
    let mut got = 0;
    while got < 8 << 10 {
        got += client.some().len();
    }
    // What the kernel's buffers take on both sides is some megabytes.
    assert!(written.load(Ordering::SeqCst) < BODY / 2, "{}", written.load(Ordering::SeqCst));
}
