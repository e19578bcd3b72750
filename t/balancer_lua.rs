//! Upstreams of locations on the real binary: nginx's server parameters and tries, `balancer_by_lua`, `ngx.balancer`, `ngx.upstream`.

mod support;

use std::{
    io::{BufReader, Write},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering},
    },
};

use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};
use support::{
    Dir, Gateway, Reply, Upstream, run,
    upstream::{Seen, read_request},
};

/// One worker: what is known of a server is a worker's own.
fn with(settings: Value) -> Gateway {
    let mut all = json!({"nginx_config": {"worker_processes": 1}});
    let (Some(into), Value::Object(from)) = (all.as_object_mut(), settings) else { panic!("maps") };
    into.extend(from);
    Gateway::with(all)
}

/// A gateway whose `/t` is passed on to the upstream `backend`. Each answer tells of its tries.
fn passing(backend: Value, options: Value) -> Gateway {
    with(json!({
        "lua_upstreams": {"backend": backend},
        "lua_locations": [
            {"location": "/t", "proxy_pass": "http://backend", "options": options, "header_filter_by_lua": TRIES},
            {"location": "= /peers", "content_by_lua": PEERS},
        ],
    }))
}

const TRIES: &str =
    "ngx.header['X-Tries'] = (ngx.var.upstream_addr or '-') .. ' | ' .. (ngx.var.upstream_status or '-')";

/// The peers of `backend`, or what setting one down answers.
const PEERS: &str = "local u = require('ngx.upstream')
    local cjson = require('cjson')
    if ngx.var.arg_down then
        return ngx.say(tostring(u.set_peer_down('backend', ngx.var.arg_backup ~= nil, tonumber(ngx.var.arg_id), ngx.var.arg_down == '1')))
    end
    ngx.say(cjson.encode(ngx.var.arg_backup and u.get_backup_peers('backend') or u.get_primary_peers('backend')))";

fn body(status: u16, text: &str) -> String {
    format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\n\r\n{text}", text.len())
}

/// A server that says its name.
fn named(name: &'static str) -> Upstream {
    Upstream::answering(move |_| body(200, name))
}

/// A server with the status that the test wants of it.
fn switchable(name: &'static str) -> (Upstream, Arc<AtomicU16>) {
    let status = Arc::new(AtomicU16::new(200));
    let now = status.clone();
    (Upstream::answering(move |_| body(now.load(Ordering::SeqCst), name)), status)
}

/// A server that takes requests and never answers.
fn silent() -> Upstream {
    Upstream::serving(|_, stream| {
        let mut stream = BufReader::new(stream);
        while read_request(&mut stream).is_some() {}
    })
}

/// A server that closes its connection once it has a request.
fn closing() -> Upstream {
    Upstream::serving(|_, stream| {
        let _ = read_request(&mut BufReader::new(stream));
    })
}

#[track_caller]
fn says(reply: &Reply, status: u16, text: &str) {
    assert_eq!((reply.status, reply.text().as_str()), (status, text));
}

#[track_caller]
fn tries(reply: &Reply, addresses: &[&str], statuses: &str) {
    let expected = format!("{} | {statuses}", addresses.join(", "));
    assert_eq!(reply.header("x-tries"), Some(expected.as_str()));
}

/// A `set_current_peer` to that address.
fn peer(address: &str) -> String {
    let (host, port) = address.rsplit_once(':').expect("an address");
    format!("assert(require('ngx.balancer').set_current_peer('{host}', {port}))")
}

#[test]
fn shares_follow_weights_and_servers_that_are_down_get_nothing() {
    let (a, b, c) = (named("a"), named("b"), named("c"));
    let gw = passing(json!([format!("{} weight=2", a.addr()), b.addr(), format!("{} down", c.addr())]), json!({}));
    let got: String = (0..6).map(|_| gw.get("/t").text()).collect();
    assert_eq!(got, "abaaba");
    assert!(c.seen().is_empty());
}

#[test]
fn a_server_that_fails_is_followed_by_the_next_and_rests() {
    let (dead, up) = (Upstream::dead(), named("up"));
    let gw = passing(json!([format!("{dead} fail_timeout=1h"), up.addr()]), json!({}));
    let first = gw.get("/t");
    says(&first, 200, "up");
    tries(&first, &[&dead, &up.addr()], "502, 200");
    gw.expect_log("connect() failed (111: Connection refused) while connecting to upstream");
    gw.expect_log("upstream server temporarily disabled while connecting to upstream");
    for _ in 0..4 {
        tries(&gw.get("/t"), &[&up.addr()], "200");
    }
    assert_eq!(gw.get("/peers").json()[0]["fails"], json!(1));
}

#[test]
fn a_server_is_back_after_its_rest() {
    let ((shaky, status), up) = (switchable("shaky"), named("up"));
    let servers = json!([format!("{} max_fails=2 fail_timeout=2s", shaky.addr()), format!("{} backup", up.addr())]);
    let gw = passing(servers, json!({"proxy_next_upstream": "http_503"}));
    says(&gw.get("/t"), 200, "shaky");
    status.store(503, Ordering::SeqCst);
    for _ in 0..2 {
        tries(&gw.get("/t"), &[&shaky.addr(), &up.addr()], "503, 200");
    }
    // It would fail still, and nobody asks it.
    tries(&gw.get("/t"), &[&up.addr()], "200");
    status.store(200, Ordering::SeqCst);
    support::eventually("the server is asked again", || (gw.get("/t").text() == "shaky").then_some(()));
    says(&gw.get("/t"), 200, "shaky");
    assert_eq!(gw.get("/peers").json()[0]["fails"], json!(0));
}

#[test]
fn where_nobody_is_left_the_answer_is_502() {
    let (dead, other) = (Upstream::dead(), Upstream::dead());
    let gw = passing(json!([format!("{dead} fail_timeout=1h"), format!("{other} fail_timeout=1h")]), json!({}));
    let first = gw.get("/t");
    assert_eq!(first.status, 502);
    tries(&first, &[&dead, &other], "502, 502");
    assert_eq!(gw.get("/t").status, 502);
    gw.expect_log("no live upstreams while connecting to upstream");
    let only = passing(json!([dead]), json!({}));
    for _ in 0..3 {
        tries(&only.get("/t"), &[&dead], "502");
    }
    assert!(!only.log().contains("no live upstreams"), "the only server never rests");
}

#[test]
fn backups_serve_when_no_primary_can() {
    let (up, spare) = (named("up"), named("spare"));
    let gw = passing(json!([format!("{} backup", spare.addr()), up.addr()]), json!({}));
    says(&gw.get("/t"), 200, "up");
    says(&gw.get("/peers?down=1&id=0"), 200, "true\n");
    says(&gw.get("/t"), 200, "spare");
    assert_eq!(gw.get("/peers").json()[0]["down"], json!(true));
    says(&gw.get("/peers?down=1&id=0&backup=1"), 200, "true\n");
    assert_eq!(gw.get("/t").status, 502);
    says(&gw.get("/peers?down=0&id=0"), 200, "true\n");
    says(&gw.get("/t"), 200, "up");
    says(&gw.get("/peers?down=1&id=1"), 200, "nil\n");
}

#[test]
fn what_is_tried_again_is_said_by_the_location() {
    let ((shaky, status), up, closing, silent) = (switchable("shaky"), named("up"), closing(), silent());
    // Who answers gets the time that it takes.
    let quickly = |mut options: Value| {
        options["proxy_read_timeout"] = json!("50ms");
        options
    };
    let scene = |first: &Upstream, said: Value, method: &str| {
        let servers = json!([format!("{} weight=1000 max_fails=0", first.addr()), up.addr()]);
        passing(servers, said).send(method, "/t", &[], b"")
    };
    // An answer is passed on as it is unless its status is listed.
    status.store(500, Ordering::SeqCst);
    says(&scene(&shaky, json!({}), "GET"), 500, "shaky");
    says(&scene(&shaky, json!({"proxy_next_upstream": "error http_500"}), "GET"), 200, "up");
    says(
        &scene(&shaky, json!({"proxy_next_upstream": "http_500", "proxy_next_upstream_tries": 1}), "GET"),
        500,
        "shaky",
    );
    says(&scene(&shaky, json!({"proxy_next_upstream": "http_500"}), "POST"), 500, "shaky");
    says(&scene(&shaky, json!({"proxy_next_upstream": "http_500 non_idempotent"}), "POST"), 200, "up");
    // `error timeout` is the default; what was sent and must not be acted on twice goes nowhere else.
    says(&scene(&closing, json!({}), "GET"), 200, "up");
    assert_eq!(scene(&closing, json!({}), "POST").status, 502);
    says(&scene(&closing, json!({"proxy_next_upstream": ["error", "non_idempotent"]}), "POST"), 200, "up");
    assert_eq!(scene(&closing, json!({"proxy_next_upstream": "timeout"}), "GET").status, 502);
    assert_eq!(scene(&closing, json!({"proxy_next_upstream": "off"}), "GET").status, 502);
    says(&scene(&silent, quickly(json!({})), "GET"), 200, "up");
    assert_eq!(scene(&silent, quickly(json!({"proxy_next_upstream": "error"})), "GET").status, 504);
    assert_eq!(
        scene(&silent, quickly(json!({"proxy_next_upstream_timeout": "10ms"})), "GET").status,
        504,
        "it is over by then"
    );
    // Nothing of it was sent: it may go anywhere.
    let gw = passing(json!([Upstream::dead(), up.addr()]), json!({}));
    says(&gw.send("POST", "/t", &[], b"body"), 200, "up");
    let garbled = Upstream::answering(|_| "SPDY/9\r\n\r\n");
    assert_eq!(scene(&garbled, json!({}), "GET").status, 502);
    says(&scene(&garbled, json!({"proxy_next_upstream": "invalid_header"}), "GET"), 200, "up");
}

#[test]
fn a_script_is_asked_before_each_try() {
    let (missing, closing, up) = (Upstream::answering(|_| body(404, "")), closing(), named("up"));
    let script = format!(
        "local b = require('ngx.balancer')
        ngx.ctx.n = (ngx.ctx.n or 0) + 1
        ngx.ctx.seen = (ngx.ctx.seen or '') .. ngx.get_phase() .. ':' .. table.concat({{tostring((b.get_last_failure())),
            tostring((select(2, b.get_last_failure()))), select('#', b.get_last_failure())}}, ',') .. ' '
        if ngx.ctx.n == 1 then b.set_more_tries(2) {} elseif ngx.ctx.n == 2 then {} else {} end",
        peer(&missing.addr()),
        peer(&closing.addr()),
        peer(&up.addr())
    );
    let gw = with(json!({
        "lua_upstreams": {"backend": {"balancer_by_lua": script}},
        "lua_locations": [{
            "location": "/t", "proxy_pass": "http://backend", "options": {"proxy_next_upstream": "error http_404"},
            "header_filter_by_lua": format!("{TRIES} ngx.header['X-Seen'] = ngx.ctx.seen"),
        }],
    }));
    let reply = gw.get("/t");
    says(&reply, 200, "up");
    tries(&reply, &[&missing.addr(), &closing.addr(), &up.addr()], "404, 502, 200");
    let seen = reply.header("x-seen").map(str::trim);
    assert_eq!(seen, Some("balancer:nil,nil,1 balancer:next,404,2 balancer:failed,502,2"));
}

#[test]
fn tries_are_used_up() {
    let dead = Upstream::dead();
    let script = format!(
        "local b = require('ngx.balancer')
        ngx.ctx.n = (ngx.ctx.n or 0) + 1
        local _, warning = b.set_more_tries(ngx.ctx.n < 4 and tonumber(ngx.var.arg_more) or 0)
        ngx.log(ngx.WARN, 'try ', ngx.ctx.n, ': ', warning)
        {}",
        peer(&dead)
    );
    let scene = |more: u32, options: Value| {
        let gw = passing(json!({"balancer_by_lua": script}), options);
        let reply = gw.get(&format!("/t?more={more}"));
        assert_eq!(reply.status, 502);
        (reply.header("x-tries").expect("tries").matches("502").count(), gw)
    };
    assert_eq!(scene(0, json!({})).0, 1);
    assert_eq!(scene(1, json!({})).0, 4, "each script allows another one");
    let (count, gw) = scene(1, json!({"proxy_next_upstream_tries": 2}));
    assert_eq!(count, 2);
    gw.expect_log("try 1: nil");
    gw.expect_log("try 2: reduced tries due to limit");
    let (count, gw) = scene(1000, json!({"proxy_next_upstream_tries": 3}));
    assert_eq!(count, 3);
    gw.expect_log("try 1: reduced tries due to limit");
}

#[test]
fn tries_without_end_come_to_one() {
    let dead = Upstream::dead();
    let script = format!("require('ngx.balancer').set_more_tries(9) {}", peer(&dead));
    let gw = passing(json!({"balancer_by_lua": script}), json!({}));
    let reply = gw.get("/t");
    assert_eq!((reply.status, reply.header("x-tries").map(|t| t.matches("502").count())), (502, Some(256)));
}

#[test]
fn a_script_that_sets_no_peer_leaves_it_to_the_servers() {
    let (a, b) = (named("a"), named("b"));
    let servers = json!({"servers": [a.addr(), b.addr()], "balancer_by_lua": "ngx.log(ngx.WARN, 'asked')"});
    let gw = passing(servers, json!({}));
    let got: String = (0..4).map(|_| gw.get("/t").text()).collect();
    assert_eq!(got, "abab");
    gw.expect_log("asked");
    let none = passing(json!({"balancer_by_lua": "local nothing"}), json!({}));
    assert_eq!(none.get("/t").status, 500);
    none.expect_log("lua balancer: no peer set");
}

#[test]
fn a_script_may_wait() {
    let (cache, up) = (named("which\n"), named("up"));
    let (host, port) = {
        let addr = cache.addr();
        let (h, p) = addr.rsplit_once(':').expect("an address");
        (h.to_owned(), p.to_owned())
    };
    let script = format!(
        "ngx.sleep(0.001)
        local sock = ngx.socket.tcp()
        assert(sock:connect('{host}', {port}))
        assert(sock:send('GET / HTTP/1.0\\r\\n\\r\\n'))
        local line = assert(sock:receive('*l'))
        sock:close()
        local t = ngx.thread.spawn(function() ngx.sleep(0.001) return line end)
        local _, got = ngx.thread.wait(t)
        assert(got == 'HTTP/1.1 200 X', got)
        {}",
        peer(&up.addr())
    );
    let gw = passing(json!({"balancer_by_lua": script}), json!({}));
    says(&gw.get("/t"), 200, "up");
    assert_eq!(cache.seen().len(), 1);
}

#[test]
fn a_script_that_fails_or_exits_answers() {
    let up = named("up");
    let script = format!("{} loadstring(ngx.unescape_uri(ngx.var.arg_do), '=script')()", peer(&up.addr()));
    let gw = passing(json!({"balancer_by_lua": script}), json!({}));
    for (what, status, text) in [
        ("error('boom')", 500, Some("failed to run balancer_by_lua*: script:1: boom")),
        ("ngx.exit(ngx.ERROR)", 500, Some("balancer_by_lua* has ended the request with ngx.exit(-1)")),
        ("ngx.exit(500)", 500, None),
        ("ngx.exit(403)", 403, None),
        ("ngx.exit(ngx.OK)", 200, None),
        ("ngx.say('x')", 500, Some("script:1: API disabled in the context of balancer_by_lua*")),
        ("require('ngx.balancer').set_timeouts(0, 1, 1)", 500, Some("bad connect timeout")),
        ("require('ngx.balancer').set_timeouts('1', 1, 1)", 500, Some("bad connect timeout")),
    ] {
        let reply = gw.get(&format!("/t?do={}", what.replace(' ', "%20")));
        assert_eq!(reply.status, status, "{what}");
        if let Some(text) = text {
            gw.expect_log(text);
        }
    }
    assert_eq!(support::http::raw(&gw.proxy(), b"GET /t?do=ngx.exit(444) HTTP/1.1\r\nHost: h\r\n\r\n"), "");
    assert_eq!(up.seen().len(), 1, "only ngx.OK went on");
    let syntax = passing(json!({"balancer_by_lua": "oops oops", "lines": {"balancer_by_lua": 27}}), json!({}));
    assert_eq!(syntax.get("/t").status, 500);
    syntax.expect_log("failed to load inlined Lua code: balancer_by_lua(nginx.conf:27):1:");
}

#[test]
fn a_script_may_stand_in_a_file() {
    let up = named("up");
    let dir = Dir::new();
    dir.write("conf/balancer.lua", peer(&up.addr()));
    dir.configure(json!({
        "lua_upstreams": {"backend": {"balancer_by_lua_file": "conf/balancer.lua"}},
        "lua_locations": [{"location": "/t", "proxy_pass": "http://backend"}],
    }));
    let gw = Gateway::in_dir(dir);
    says(&gw.get("/t"), 200, "up");
}

#[test]
fn what_a_script_changes_goes_with_the_try() {
    let (refusing, echo) = (Upstream::answering(|_| body(503, "")), Upstream::echo());
    let script = format!(
        "local b = require('ngx.balancer')
        ngx.ctx.n = (ngx.ctx.n or 0) + 1
        ngx.var.mine = 'try ' .. ngx.ctx.n
        ngx.req.set_header('X-Own', ngx.ctx.n)
        ngx.req.set_body_data(ngx.req.get_body_data() .. string.rep('+', ngx.ctx.n))
        assert(b.recreate_request())
        if ngx.ctx.n == 1 then b.set_more_tries(1) {} else {} end",
        peer(&refusing.addr()),
        peer(&echo.addr())
    );
    let gw = with(json!({
        "lua_upstreams": {"backend": {"balancer_by_lua": script}},
        "lua_locations": [{"location": "/t", "set": {"mine": ""}, "proxy_pass": "http://backend", "options": {
            "proxy_next_upstream": "http_503", "proxy_set_header": [["X-Mine", "$mine"]]}}],
    }));
    assert_eq!(gw.send("PUT", "/t", &[], b"body").status, 200);
    let told = |seen: &Seen| {
        let header = |name| seen.header(name).unwrap_or_default().to_owned();
        (header("x-mine"), header("x-own"), String::from_utf8_lossy(&seen.body).into_owned())
    };
    let of_try = |n: &str, body: &str| (format!("try {n}"), n.to_owned(), body.to_owned());
    assert_eq!(told(&refusing.last()), of_try("1", "body+"));
    assert_eq!(told(&echo.last()), of_try("2", "body+++"));
}

#[test]
fn a_long_body_goes_to_each_server_whole() {
    let (refusing, echo) = (Upstream::answering(|_| body(503, "")), named("up"));
    let script = format!(
        "ngx.ctx.n = (ngx.ctx.n or 0) + 1 require('ngx.balancer').set_more_tries(2 - ngx.ctx.n)
        if ngx.ctx.n == 1 then {} else {} end",
        peer(&refusing.addr()),
        peer(&echo.addr())
    );
    let gw = passing(json!({"balancer_by_lua": script}), json!({"proxy_next_upstream": "http_503"}));
    let long = vec![b'x'; 3 << 20];
    says(&gw.send("PUT", "/t", &[], &long), 200, "up");
    assert!(refusing.last().body == long && echo.last().body == long);
}

#[test]
fn timeouts_are_the_scripts() {
    let silent = silent();
    let script = format!("{} require('ngx.balancer').set_timeouts(1, 1, 0.05)", peer(&silent.addr()));
    let gw = passing(json!({"balancer_by_lua": script}), json!({"proxy_read_timeout": "1h"}));
    let reply = gw.get("/t");
    assert_eq!(reply.status, 504);
    tries(&reply, &[&silent.addr()], "504");
}

#[test]
fn connections_are_kept_as_the_script_says() {
    let options = json!({"proxy_http_version": "1.1", "proxy_set_header": [["Connection", ""]]});
    let connections = |keepalive: &str| {
        let up = named("up");
        let script = format!("{} local b = require('ngx.balancer') {keepalive}", peer(&up.addr()));
        let gw = passing(json!({"balancer_by_lua": script}), options.clone());
        (0..6).for_each(|_| says(&gw.get("/t"), 200, "up"));
        up.connections()
    };
    assert_eq!(connections("assert(b.enable_keepalive(60, 100))"), 1);
    assert_eq!(connections("assert(b.enable_keepalive(60, 3))"), 2);
    assert_eq!(connections("assert(b.enable_keepalive(60, 1))"), 6);
    let from = "ngx.ctx.from = '127.0.0.' .. (2 + (_G.n or 0) % 2) _G.n = (_G.n or 0) + 1";
    assert_eq!(
        connections(&format!("assert(b.enable_keepalive()) {from} assert(b.bind_to_local_addr(ngx.ctx.from))")),
        2
    );
}

#[test]
fn connections_come_from_where_the_script_says() {
    let up = Upstream::serving(|_, stream| {
        let from = stream.peer_addr().expect("an address").ip().to_string();
        let mut stream = BufReader::new(stream);
        if read_request(&mut stream).is_some() {
            let _ = stream.get_mut().write_all(body(200, &from).as_bytes());
        }
    });
    let script = format!("{} assert(require('ngx.balancer').bind_to_local_addr(ngx.var.arg_from))", peer(&up.addr()));
    let gw = passing(json!({"balancer_by_lua": script}), json!({}));
    says(&gw.get("/t?from=127.0.0.9"), 200, "127.0.0.9");
    assert_eq!(gw.get("/t?from=192.0.2.1").status, 500, "it is nobody's here");
    gw.expect_log("bind(192.0.2.1:0) failed");
    assert_eq!(gw.get("/t?from=nowhere").status, 500);
    gw.expect_log("\"nowhere\" is no address");
}

#[test]
fn an_address_that_cannot_be_connected_from_is_no_fault_of_the_server() {
    let (up, spare) = (named("up"), named("spare"));
    let addr: SocketAddr = up.addr().parse().expect("an address");
    let held = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    held.set_reuse_address(true).expect("an option");
    held.bind(&SocketAddr::from(([127, 0, 0, 9], 0)).into()).expect("bound");
    held.connect(&addr.into()).expect("connected");
    let taken = held.local_addr().ok().and_then(|a| a.as_socket()).expect("an address");
    let script = "local b, args = require('ngx.balancer'), ngx.req.get_uri_args()
        if args.peer then assert(b.set_current_peer(args.peer, 1)) end
        if args.from then assert(b.bind_to_local_addr(args.from)) end";
    let servers = [format!("{addr} max_fails=1 fail_timeout=1h"), format!("{} backup", spare.addr())];
    let gw = passing(json!({"servers": servers, "balancer_by_lua": script}), json!({}));
    let failed = |args: String, from: &str| {
        assert_eq!(gw.get(&format!("/t?{args}")).status, 500, "{args}");
        gw.expect_log(&format!("connect from {from} failed"));
    };
    failed(format!("from={taken}"), &taken.to_string());
    failed("from=127.0.0.1&peer=::1".into(), "127.0.0.1:0");
    says(&gw.get("/t"), 200, "up");
    says(&gw.get("/t?from=127.0.0.9"), 200, "up");
    assert!(spare.seen().is_empty());
}

#[test]
fn tls_to_a_peer_is_the_scripts() {
    let node = with(json!({"lua_locations": [
        {"location": "/name", "return": {"status": 200, "body": "$scheme $ssl_server_name"}},
    ]}));
    let names = ["a.test".to_owned(), "b.test".to_owned(), "backend".to_owned()];
    let pair = rcgen::generate_simple_self_signed(names.clone()).expect("a certificate");
    node.put("/ssls/1", json!({"snis": names, "cert": pair.cert.pem(), "key": pair.signing_key.serialize_pem()}));
    let script = format!(
        "local b = require('ngx.balancer')
        local plain = ngx.var.arg_plain ~= nil
        assert(b.set_current_peer('127.0.0.1', plain and {} or {}, ngx.var.arg_name))
        assert(b.enable_keepalive() and b.set_upstream_tls(not plain))",
        node.proxy().rsplit(':').next().expect("a port"),
        node.proxy_tls().rsplit(':').next().expect("a port")
    );
    let gw = with(json!({
        "lua_upstreams": {"backend": {"balancer_by_lua": script}},
        "lua_locations": [{"location": "/t", "proxy_pass": "https://backend/name",
            "options": {"proxy_http_version": "1.1", "proxy_set_header": [["Connection", ""]]}}],
    }));
    // Connections are kept: none of another name is taken.
    for _ in 0..2 {
        says(&gw.get("/t?name=a.test"), 200, "https a.test");
        says(&gw.get("/t?name=b.test"), 200, "https b.test");
        says(&gw.get("/t"), 200, "https backend");
        says(&gw.get("/t?plain=1"), 200, "http ");
    }
}

#[test]
fn the_functions_say_where_they_mean_nothing() {
    let up = named("up");
    let call = "local b = require('ngx.balancer')
        local function why(...) return (select(select('#', ...), ...)) end
        local said = table.concat({why(b.set_current_peer('127.0.0.1', 80)), why(b.set_more_tries(1)), why(b.set_timeouts(1, 1, 1)),
            why(b.enable_keepalive()), why(b.recreate_request()), why(b.get_last_failure())}, '; ')";
    let gw = with(json!({
        "lua_upstreams": {"backend": {"balancer_by_lua": peer(&up.addr())}},
        "lua_locations": [
            {"location": "= /none", "content_by_lua": format!("{call} ngx.say(said)")},
            {"location": "= /late", "proxy_pass": "http://backend", "log_by_lua": format!("{call} ngx.log(ngx.WARN, said)")},
        ],
    }));
    says(&gw.get("/none"), 200, &format!("{}\n", ["no upstream found"; 6].join("; ")));
    says(&gw.get("/late"), 200, "up");
    gw.expect_log(&["API disabled in the current context"; 6].join("; "));
}

#[test]
fn each_subrequest_has_its_own_tries() {
    let up = named("up");
    let script =
        format!("ngx.ctx.n = (ngx.ctx.n or 0) + 1 ngx.log(ngx.WARN, 'count ', ngx.ctx.n) {}", peer(&up.addr()));
    let gw = with(json!({
        "lua_upstreams": {"backend": {"balancer_by_lua": script}},
        "lua_locations": [
            {"location": "= /t", "content_by_lua": "for _ = 1, 2 do ngx.print(ngx.location.capture('/main').body) end"},
            {"location": "= /main", "proxy_pass": "http://backend"},
        ],
    }));
    says(&gw.get("/t"), 200, "upup");
    gw.expect_log("count 1");
    assert!(!gw.log().contains("count 2"));
}

#[test]
fn upstreams_tell_of_themselves() {
    let (up, other) = (named("up"), Upstream::dead());
    let gw = with(json!({
        "lua_upstreams": {
            "a:1": [format!("{} fail_timeout=53 weight=4 max_fails=100", up.addr()), "some.test:81 backup", "127.0.0.2 down"],
            "b": ["[::1]:9"],
        },
        "lua_init": {"init_worker_by_lua": "names = table.concat(require('ngx.upstream').get_upstreams(), ' ')
            ngx.timer.at(0, function() timed = #require('ngx.upstream').get_servers('b') end)"},
        "lua_locations": [
            {"location": "= /t", "content_by_lua": "local u, cjson = require('ngx.upstream'), require('cjson')
                local f = u[ngx.var.arg_f]
                local args = cjson.decode(ngx.unescape_uri(ngx.var.arg_args or '[]'))
                ngx.say(cjson.encode({f(unpack(args))}))"},
            {"location": "= /names", "content_by_lua": "while not timed do ngx.sleep(0.001) end ngx.say(names, ' ', timed)"},
            {"location": "/passed", "proxy_pass": "http://a:1/", "log_by_lua": CURRENT},
            {"location": "/other", "proxy_pass": format!("http://{other}/x"), "log_by_lua": CURRENT},
            {"location": "= /not", "content_by_lua": "ngx.say(tostring(require('ngx.upstream').current_upstream_name()))"},
        ],
    }));
    let ask =
        |f: &str, args: &str| gw.get(&format!("/t?f={f}&args={}", args.replace('"', "%22").replace(' ', "%20"))).json();
    says(&gw.get("/names"), 200, &format!("a:1 b {other} 1\n"));
    assert_eq!(ask("get_upstreams", "[]"), json!([["a:1", "b", other]]));
    let up_addr = up.addr();
    assert_eq!(
        ask("get_servers", r#"["a:1"]"#),
        json!([[
            {"addr": up_addr, "name": up_addr, "weight": 4, "max_fails": 100, "fail_timeout": 53},
            {"addr": "some.test:81", "name": "some.test:81", "weight": 1, "max_fails": 1, "fail_timeout": 10, "backup": true},
            {"addr": "127.0.0.2:80", "name": "127.0.0.2", "weight": 1, "max_fails": 1, "fail_timeout": 10, "down": true},
        ]])
    );
    let implicit = json!([[{"addr": other, "weight": 0, "max_fails": 0, "fail_timeout": 0}]]);
    assert_eq!(ask("get_servers", &json!([other]).to_string()), implicit);
    let fresh = |id: u32, name: &str, weight: u32| {
        json!({"id": id, "name": name, "weight": weight, "current_weight": 0, "effective_weight": weight, "max_fails": 1,
            "fail_timeout": 10, "fails": 0, "conns": 0})
    };
    assert_eq!(ask("get_primary_peers", r#"["b"]"#), json!([[fresh(0, "[::1]:9", 1)]]));
    assert_eq!(ask("get_backup_peers", r#"["a:1"]"#), json!([[fresh(0, "some.test:81", 1)]]));
    for f in ["get_servers", "get_primary_peers", "get_backup_peers"] {
        assert_eq!(ask(f, r#"["blah"]"#), json!([null, "upstream not found"]), "{f}");
    }
    assert_eq!(ask("set_peer_down", r#"["blah",false,0,true]"#), json!([null, "upstream not found"]));
    for id in ["2", "-1", "0.5"] {
        assert_eq!(ask("set_peer_down", &format!(r#"["a:1",false,{id},true]"#)), json!([null, "bad peer id"]), "{id}");
    }
    assert_eq!(ask("set_peer_down", r#"["a:1",false,1,false]"#), json!([true]));
    assert_eq!(ask("get_primary_peers", r#"["a:1"]"#)[0][1], fresh(1, "127.0.0.2:80", 1));
    assert_eq!(gw.get("/t?f=set_peer_down&args=[%22a:1%22,0,0,true]").status, 500);
    gw.expect_log("bad argument #2 to 'set_peer_down' (boolean expected, got number)");
    says(&gw.get("/passed"), 200, "up");
    gw.expect_log("current is a:1");
    let accessed = ask("get_primary_peers", r#"["a:1"]"#)[0][0]["accessed"].as_f64().expect("a time");
    assert!(accessed > 1.7e9, "{accessed}");
    assert_eq!(gw.get("/other").status, 502);
    gw.expect_log(&format!("current is {other}"));
    says(&gw.get("/not"), 200, "nil\n");
}

const CURRENT: &str = "ngx.log(ngx.WARN, 'current is ', require('ngx.upstream').current_upstream_name())";

#[test]
fn connections_under_way_are_counted() {
    let silent = silent();
    let gw = passing(json!([silent.addr()]), json!({}));
    let mut client = support::Client::connect(&gw.proxy());
    client.send("GET", "/t", &[], b"");
    let conns = |n: u32| {
        support::eventually("the count", || (gw.get("/peers").json()[0]["conns"] == json!(n)).then_some(()));
    };
    conns(1);
    drop(client);
    conns(0);
}

#[test]
fn plugins_keep_what_they_have() {
    let (up, other) = (named("up"), named("other"));
    let gw = with(json!({"lua_upstreams": {"backend": ["127.0.0.1:9"]}}));
    let lua = format!("return function() {} end", peer(&other.addr()));
    gw.route("1", "/*", &up, json!({"serverless-pre-function": {"phase": "before_proxy", "functions": [lua]}}));
    says(&gw.get("/x"), 200, "other");
    let named = "return function() ngx.log(ngx.WARN, 'goes to ', require('ngx.upstream').current_upstream_name()) end";
    gw.route("1", "/*", &up, json!({"serverless-post-function": {"phase": "log", "functions": [named]}}));
    says(&gw.get("/x"), 200, "up");
    gw.expect_log("goes to apisix_backend");
}

#[test]
fn mistakes_stop_the_start() {
    let dir = Dir::new();
    dir.configure(json!({
        "lua_upstreams": {
            "a": ["127.0.0.1:1980 weight=2 slow_start=30s"],
            "b": {"servers": ["127.0.0.1:1980 fail_timeout=soon"], "ip_hash": true},
            "c": [],
        },
        "lua_locations": [{"location": "/t", "proxy_pass": "http://a", "options": {
            "proxy_next_upstream": "sometimes", "proxy_next_upstream_tries": "few", "proxy_next_upstream_timeout": "long"}}],
    }));
    let (status, said) = run(dir.command());
    assert!(!status.success());
    for part in [
        "lua_upstreams.a[0]: \"slow_start=30s\" is no parameter of a server; known are weight=, max_fails=, fail_timeout=, backup and down",
        "lua_upstreams.b.servers[0]: \"fail_timeout=soon\" is not a time as 10s or 1m",
        "lua_upstreams.b.ip_hash: is not a known key; known are servers, balancer_by_lua, balancer_by_lua_file",
        "lua_upstreams.c: has no server",
        "lua_locations[0].options.proxy_next_upstream: \"sometimes\" is not error, timeout",
        "lua_locations[0].options.proxy_next_upstream_tries: \"few\" is not a number of tries",
        "lua_locations[0].options.proxy_next_upstream_timeout: \"long\" is not a time",
    ] {
        assert!(said.contains(part), "{part} in {said}");
    }
}
