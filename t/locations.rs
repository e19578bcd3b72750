//! Plain OpenResty locations in config.yaml: chosen and run as nginx would, on the real binary.

mod support;

use std::{fs, process::ExitStatus};

use serde_json::{Value, json};
use support::{Client, Dir, Gateway, Reply, Upstream, http::raw, run};

/// A gateway with these locations.
fn with(locations: Value) -> Gateway {
    Gateway::with(json!({"lua_locations": locations}))
}

/// One location `/t` whose content is `lua`.
fn content(lua: &str) -> Gateway {
    with(json!([{"location": "= /t", "content_by_lua": lua}]))
}

#[track_caller]
fn says(reply: &Reply, expected: &str) {
    assert_eq!((reply.status, reply.text().as_str()), (200, expected));
}

#[test]
fn the_phases_run_in_nginx_order() {
    let gw = with(json!([{
        "location": "/t",
        "set": {"seen": "set", "copy": "$seen $arg_a"},
        "set_by_lua": [{"var": "sum", "lua": "return ngx.get_phase() .. (ngx.arg[1] + 1)", "args": ["$arg_a"]}],
        "rewrite_by_lua": "ngx.ctx.seen = ngx.var.copy .. ' ' .. ngx.var.sum .. ' ' .. ngx.get_phase()",
        "access_by_lua": "ngx.ctx.seen = ngx.ctx.seen .. ' ' .. ngx.get_phase()",
        "content_by_lua": "ngx.say(ngx.ctx.seen, ' ', ngx.get_phase())",
        "header_filter_by_lua": "ngx.header['X-Phase'] = ngx.get_phase()",
        "body_filter_by_lua": "ngx.arg[1] = ngx.arg[1]:upper()",
        "log_by_lua": "ngx.log(ngx.WARN, 'in ', ngx.get_phase(), ' after ', ngx.ctx.seen)",
        "lines": {"log_by_lua": 41},
    }]));
    let reply = gw.get("/t?a=1");
    says(&reply, "SET 1 SET2 REWRITE ACCESS CONTENT\n");
    assert_eq!(reply.header("x-phase"), Some("header_filter"));
    gw.expect_log("[lua] log_by_lua(nginx.conf:41):1: in log after set 1 set2 rewrite access");
}

#[test]
fn the_server_says_what_holds_for_every_location() {
    let gw = Gateway::with(json!({
        "lua_server": {
            "server_rewrite_by_lua":
                "ngx.ctx.first = ngx.get_phase() if ngx.var.arg_to then ngx.req.set_uri('/' .. ngx.var.arg_to) end",
            "rewrite_by_lua": "ngx.header['X-Rewrite'] = ngx.get_phase()",
            "set": {"mine": "server"},
        },
        "lua_locations": [
            {"location": "= /a", "content_by_lua": "ngx.say('a ', ngx.ctx.first, ' ', ngx.var.mine)"},
            {"location": "= /b", "rewrite_by_lua": "", "content_by_lua": "ngx.say('b ', ngx.ctx.first)"},
        ],
    }));
    let a = gw.get("/a");
    says(&a, "a server_rewrite server\n");
    assert_eq!(a.header("x-rewrite"), Some("rewrite"));
    let b = gw.get("/a?to=b");
    says(&b, "b server_rewrite\n");
    assert_eq!(b.header("x-rewrite"), None, "its own, empty one stands in its place");
    assert_eq!(gw.get("/missing").status, 404);
}

#[test]
fn what_no_location_is_for_goes_to_the_routes() {
    let upstream = Upstream::echo();
    let gw = with(json!([{"location": "= /t", "return": {"status": 200, "body": "$uri of ${request_method}\n"}}]));
    gw.route("1", "/*", &upstream, json!({}));
    says(&gw.get("/t"), "/t of GET\n");
    assert_eq!(gw.get("/other").status, 200);
    assert_eq!(upstream.seen().len(), 1);
}

#[test]
fn a_request_is_sent_from_location_to_location() {
    let gw = with(json!([
        {"location": "/exec", "content_by_lua": "ngx.ctx.a = 1 ngx.exec('/end', {b = 'c d'})"},
        {"location": "/named", "content_by_lua": "return ngx.exec('@end')"},
        {"location": "/jump", "rewrite_by_lua": "ngx.req.set_uri('/end', true)"},
        {"location": "/late", "content_by_lua": "ngx.say(pcall(ngx.req.set_uri, '/end', true))"},
        {"location": "/loop", "rewrite_by_lua": "ngx.req.set_uri('/loop', true)"},
        {"location": "/sent", "content_by_lua": "ngx.say('x') ngx.exec('/end')"},
        {"location": "= /end", "internal": true,
         "content_by_lua": "ngx.say(ngx.var.uri, '?', ngx.var.args, ' ', ngx.req.is_internal(), ' ', ngx.ctx.a)"},
        {"location": "@end", "content_by_lua": "ngx.say('named ', ngx.var.uri)"},
    ]));
    says(&gw.get("/exec?x=1"), "/end?b=c%20d true nil\n");
    says(&gw.get("/named"), "named /named\n");
    assert_eq!(gw.get("/jump").status, 404, "an internal location is not for a jump");
    assert_eq!(gw.get("/end").status, 404);
    let late = gw.get("/late").text();
    assert!(late.starts_with("falseAPI disabled in the context of content_by_lua*"), "{late}");
    assert_eq!(gw.get("/loop").status, 500);
    gw.expect_log("rewrite or internal redirection cycle while processing \"/loop\"");
    let sent = raw(&gw.proxy(), b"GET /sent HTTP/1.1\r\nHost: h\r\n\r\n");
    assert!(!sent.contains("0\r\n\r\n"), "the error cuts the answer off: {sent}");
    gw.expect_log("attempt to call ngx.exec after sending out response headers");
}

#[test]
fn subrequests_answer_their_script() {
    let gw = with(json!([
        {"location": "= /t", "set": {"shared": "mine"}, "content_by_lua": r#"
            local res = ngx.location.capture("/other?a=1", {
                method = ngx.HTTP_PUT, args = {b = "2"}, body = "hello", vars = {given = "g"},
                ctx = {from = "above"}, share_all_vars = true,
            })
            ngx.print(res.status, " ", res.header["X-Own"], " ", tostring(res.truncated), " ", res.body)
            ngx.say(ngx.var.shared)
            local a, b = ngx.location.capture_multi({{"/other"}, {"/missing"}})
            ngx.say(a.status, " ", b.status)
            ngx.say(pcall(ngx.location.capture, ""))
        "#},
        {"location": "= /other", "set": {"shared": "$shared", "given": "$given"}, "content_by_lua": r#"
            ngx.req.read_body()
            ngx.header["X-Own"] = tostring(ngx.is_subrequest)
            ngx.status = 201
            ngx.print(ngx.req.get_method(), " ", ngx.var.args, " ", ngx.req.get_body_data(), " ")
            ngx.print(ngx.var.given, " ", ngx.ctx.from, " ", ngx.var.http_x_of_client, " ")
            ngx.var.shared = "changed"
        "#},
    ]));
    let reply = gw.send("GET", "/t", &[("X-Of-Client", "c")], b"");
    let text = reply.text();
    assert!(text.starts_with("201 true false PUT a=1&b=2 hello g above c changed\n201 404\nfalse"), "{text}");
    assert!(text.contains("The uri argument is an empty string"), "{text}");
}

#[test]
fn subrequests_run_beside_light_threads() {
    let gw = Gateway::with(json!({
        "lua_shared_dict": {"gate": "1m"},
        "lua_locations": [
            {"location": "= /t", "content_by_lua": r#"
                local order = {}
                local t = ngx.thread.spawn(function()
                    ngx.location.capture("/slow")
                    order[#order + 1] = "slow"
                end)
                ngx.location.capture("/quick")
                order[#order + 1] = "quick"
                ngx.shared.gate:set("open", true)
                ngx.thread.wait(t)
                ngx.say(table.concat(order, " "))
            "#},
            {"location": "= /slow",
             "content_by_lua": "while not ngx.shared.gate:get('open') do ngx.sleep(0.001) end"},
            {"location": "= /quick", "content_by_lua": "ngx.say('q')"},
        ],
    }));
    says(&gw.get("/t"), "quick slow\n");
}

#[test]
fn subrequests_go_only_so_deep() {
    let gw = with(json!([{"location": "= /t", "content_by_lua": r#"
        local deep = tonumber(ngx.var.arg_n or 0)
        local res = ngx.location.capture("/t?n=" .. deep + 1)
        ngx.print(res.status == 500 and deep or res.body)
    "#}]));
    says(&gw.get("/t"), "50");
    gw.expect_log("lua subrequests cycle while processing \"/t\"");
}

#[test]
fn what_is_printed_goes_out_when_it_is_flushed() {
    let gw = Gateway::with(json!({
        "lua_shared_dict": {"gate": "1m"},
        "lua_locations": [
            {"location": "= /t", "content_by_lua": r#"
                ngx.say("first ", tostring(ngx.headers_sent))
                ngx.header["X-Late"] = "1"
                ngx.flush(true)
                while not ngx.shared.gate:get("open") do ngx.sleep(0.001) end
                ngx.say("second ", tostring(ngx.headers_sent))
                ngx.eof()
                ngx.log(ngx.WARN, "say after eof: ", select(2, ngx.say("third")))
            "#},
            {"location": "= /open", "content_by_lua": "ngx.shared.gate:set('open', true) ngx.say('ok')"},
        ],
    }));
    let mut client = Client::connect(&gw.proxy());
    client.send("GET", "/t", &[], b"");
    let head = client.head();
    assert_eq!((head.status, head.header("x-late")), (200, None));
    assert_eq!(client.chunk().as_deref(), Some(&b"first false\n"[..]), "before anything else was asked for");
    says(&gw.get("/open"), "ok\n");
    assert_eq!(client.chunk().as_deref(), Some(&b"second true\n"[..]));
    assert_eq!(client.chunk(), None);
    gw.expect_log("attempt to set ngx.header.HEADER after sending out response headers");
    gw.expect_log("say after eof: seen eof");
}

#[test]
fn http_1_0_gets_a_length() {
    let gw = content("ngx.say('hello') ngx.say(select(2, ngx.flush()))");
    let answer = raw(&gw.proxy(), b"GET /t HTTP/1.0\r\n\r\n");
    assert!(answer.contains("Content-Length: 16\r\n") && answer.ends_with("hello\nbuffering\n"), "{answer}");
}

#[test]
fn statuses_and_pages_are_nginx_ones() {
    let gw = with(json!([
        {"location": "= /404", "content_by_lua": "ngx.exit(404)"},
        {"location": "= /own", "content_by_lua": "ngx.status = 404 ngx.say('own')"},
        {"location": "= /302", "content_by_lua": "ngx.redirect('/there')"},
        {"location": "= /444", "content_by_lua": "ngx.exit(444)"},
        {"location": "= /filter", "content_by_lua": "ngx.say('x')", "header_filter_by_lua": "ngx.exit(403)"},
        {"location": "= /error", "content_by_lua": "error('boom')"},
        {"location": "= /syntax", "content_by_lua": "oops oops"},
        {"location": "= /file", "content_by_lua_file": "conf/missing.lua"},
        {"location": "= /again", "content_by_lua": "ngx.exit(ngx.AGAIN)"},
        {"location": "= /bad-filter", "content_by_lua": "ngx.say('x')", "header_filter_by_lua": "error('broken')"},
    ]));
    let page = gw.get("/404");
    assert_eq!((page.status, page.text().contains("<h1>404 Not Found</h1>")), (404, true));
    let own = gw.get("/own");
    assert_eq!((own.status, own.text().as_str()), (404, "own\n"));
    let moved = gw.get("/302");
    assert_eq!((moved.status, moved.header("location")), (302, Some("/there")));
    assert_eq!(raw(&gw.proxy(), b"GET /444 HTTP/1.1\r\nHost: h\r\n\r\n"), "");
    assert_eq!(gw.get("/filter").status, 403);
    for (path, status, text) in [
        ("/error", 500, "lua entry thread aborted: runtime error: content_by_lua:1: boom"),
        ("/syntax", 500, "failed to load inlined Lua code: content_by_lua:1:"),
        ("/file", 404, "failed to load external Lua file"),
        ("/again", 500, "bad argument to 'ngx.exit': does not accept NGX_AGAIN or NGX_DONE"),
    ] {
        assert_eq!(gw.get(path).status, status, "{path}");
        gw.expect_log(text);
    }
    assert_eq!(raw(&gw.proxy(), b"GET /bad-filter HTTP/1.1\r\nHost: h\r\n\r\n"), "", "no head is left to be sent");
    gw.expect_log("failed to run header_filter_by_lua*: header_filter_by_lua:1: broken");
}

#[test]
fn a_body_is_read_as_a_socket_or_into_a_file() {
    let gw = with(json!([
        {"location": "= /socket", "content_by_lua": r#"
            local sock = assert(ngx.req.socket())
            local first = sock:receive(3)
            local line = sock:receive("*l")
            local rest, err, partial = sock:receive(100)
            ngx.say(first, "|", line, "|", tostring(rest), "|", err, "|", partial)
            ngx.say(select(2, ngx.req.socket()))
        "#},
        {"location": "= /none", "content_by_lua": "ngx.say(select(2, ngx.req.socket()))"},
        {"location": "= /file", "options": {"client_body_buffer_size": "4"}, "content_by_lua": r#"
            ngx.req.read_body()
            local file = ngx.req.get_body_file()
            ngx.say(tostring(ngx.req.get_body_data()), " ", file:match("client_body_temp/%d+$") ~= nil)
            ngx.print(io.open(file):read("*a"))
        "#},
        {"location": "= /own", "content_by_lua": r#"
            ngx.say((select(2, pcall(ngx.req.init_body)):gsub("^.-: ", "")))
            ngx.req.read_body()
            ngx.req.init_body(4)
            ngx.req.append_body("hel") ngx.req.append_body("lo")
            ngx.req.finish_body()
            ngx.say(ngx.var.http_content_length, " ", tostring(ngx.req.get_body_data()), " ",
                io.open(ngx.req.get_body_file()):read("*a"))
        "#},
    ]));
    says(&gw.send("POST", "/socket", &[], b"abcde\nrest"), "abc|de|nil|closed|rest\nrequest body already exists\n");
    says(&gw.get("/none"), "no body\n");
    says(&gw.send("POST", "/file", &[], b"hello"), "nil true\nhello");
    assert_eq!(gw.send("POST", "/file", &[], b"four").status, 500, "what fits is in no file");
    gw.expect_log("attempt to index local 'file' (a nil value)");
    says(&gw.send("POST", "/own", &[], b"x"), "request body not read yet\n5 nil hello\n");
}

#[test]
fn a_client_that_goes_away_is_noticed() {
    let gw = with(json!([
        {"location": "= /end", "options": {"lua_check_client_abort": "on"},
         "content_by_lua": "ngx.log(ngx.WARN, 'asleep') ngx.sleep(3600)",
         "log_by_lua": "ngx.log(ngx.WARN, 'ended with ', ngx.status)"},
        {"location": "= /told", "options": {"lua_check_client_abort": "on"}, "content_by_lua": r#"
            local function gone() ngx.log(ngx.WARN, "told") ngx.exit(499) end
            ngx.log(ngx.WARN, tostring(ngx.on_abort(gone)), " ", select(2, ngx.on_abort(gone)))
            ngx.sleep(3600)
        "#},
        {"location": "= /off", "content_by_lua": "ngx.say(select(2, ngx.on_abort(function() end)))"},
    ]));
    for (path, asleep, after) in [("/end", "asleep", "ended with 499"), ("/told", "1 duplicate call", "told")] {
        let mut client = Client::connect(&gw.proxy());
        client.send("GET", path, &[], b"");
        gw.expect_log(asleep);
        drop(client);
        gw.expect_log(after);
    }
    gw.expect_log("client prematurely closed connection");
    says(&gw.get("/off"), "lua_check_client_abort is off\n");
}

#[test]
fn scripts_of_the_start_and_their_modules_are_there() {
    let dir = Dir::new();
    dir.write("plugins/own.lua", "return { name = 'own' }");
    let path = format!("{}/plugins/?.lua;;", dir.path().display());
    dir.configure(json!({
        "lua_package_path": path,
        "lua_shared_dict": {"kept": "1m"},
        "lua_init": {
            "init_by_lua": "own = require('own') own.also = require('resty.lock') ~= nil",
            "init_worker_by_lua": "ngx.timer.at(0, function() ngx.shared.kept:incr('timers', 1, 0) end)",
        },
        "lua_locations": [{"location": "= /t", "content_by_lua": r#"
            while (ngx.shared.kept:get("timers") or 0) < 2 do ngx.sleep(0.001) end
            ngx.say(own.name, " ", tostring(own.also))
        "#}],
    }));
    let gw = Gateway::in_dir(dir);
    says(&gw.get("/t"), "own true\n");
}

#[test]
fn pools_of_sockets_are_as_large_as_a_location_says() {
    let up = Upstream::echo();
    let content = format!(
        "local function sock()
            local sock = ngx.socket.tcp()
            assert(sock:connect('127.0.0.1', {}))
            return sock
        end
        local a, b = sock(), sock()
        assert(a:setkeepalive())
        assert(b:setkeepalive())
        a, b = sock(), sock()
        ngx.print(a:getreusedtimes(), ' ', b:getreusedtimes())",
        up.addr().rsplit(':').next().expect("a port")
    );
    let dir = Dir::new();
    let location =
        |path: &str, options: Value| json!({"location": path, "content_by_lua": content, "options": options});
    let locations = json!([location("= /usual", json!({})), location("= /one", json!({"lua_socket_pool_size": "1"}))]);
    dir.configure(json!({"lua_locations": locations}));
    says(&Gateway::in_dir(dir).get("/usual"), "1 1");
    says(&with(locations).get("/one"), "1 0");
    let dir = Dir::new();
    dir.configure(json!({"lua_options": {"lua_socket_pool_size": "0", "lua_socket_keepalive_timeout": "soon"}}));
    let mut command = dir.command();
    command.arg("test");
    let (status, said) = run(command);
    assert!(!status.success());
    for mistake in
        ["lua_options.lua_socket_pool_size: \"0\" is not", "lua_options.lua_socket_keepalive_timeout: \"soon\" is not"]
    {
        assert!(said.contains(mistake), "{said}");
    }
}

#[test]
fn scripts_of_the_start_may_wait() {
    let up = Upstream::answering(|_| "HTTP/1.0 200 OK\r\nConnection: close\r\nContent-Length: 4\r\n\r\nthis");
    let port = up.addr().rsplit(':').next().expect("a port").to_owned();
    let ask = |name: &str| {
        format!(
            "local sock = ngx.socket.tcp()
            assert(sock:connect('127.0.0.1', {port}))
            assert(sock:send('GET / HTTP/1.0\\r\\nHost: a\\r\\n\\r\\n'))
            ngx.sleep(0.001)
            {name} = assert(sock:receive('*a')):match('this') .. ' in ' .. ngx.get_phase()"
        )
    };
    let dir = Dir::new();
    let plugin = "local _M = { version = 0.1, priority = 1, name = 'asks', schema = { type = 'object' } }
        function _M.init() ASK end
        return _M";
    dir.write("plugins/asks.lua", plugin.replace("ASK", &ask("of_plugin")));
    dir.configure(json!({
        "lua_init": {"init_by_lua": ask("first"), "init_worker_by_lua": ask("second")},
        "lua_locations": [{"location": "= /t", "content_by_lua": "ngx.say(first, ', ', of_plugin, ', ', second)"}],
    }));
    let gw = Gateway::in_dir(dir);
    says(&gw.get("/t"), "this in init, this in init_worker, this in init_worker\n");
}

#[test]
fn scripts_of_the_end_may_wait() {
    let up = Upstream::answering(|_| "HTTP/1.0 200 OK\r\nConnection: close\r\nContent-Length: 4\r\n\r\nthis");
    let port = up.addr().rsplit(':').next().expect("a port").to_owned();
    let leave = |name: &str| {
        format!(
            "local sock = ngx.socket.tcp()
            assert(sock:connect('127.0.0.1', {port}))
            ngx.sleep(0.001)
            assert(sock:send('GET /{name} HTTP/1.0\\r\\nHost: a\\r\\n\\r\\n'))
            local _, err = ngx.timer.at(0, print)
            ngx.log(ngx.WARN, '{name} left ', sock:receive('*a'):match('this'), ' in ', ngx.get_phase(), ': ', err)"
        )
    };
    let plugin = "local _M = { version = VERSION, priority = 1, name = 'leaves', schema = { type = 'object' } }
        function _M.destroy() LEAVE end
        return _M";
    let plugin = |version: &str| plugin.replace("VERSION", version).replace("LEAVE", &leave("plugin"));
    let dir = Dir::new();
    dir.configure(json!({
        "nginx_config": {"worker_processes": 1},
        "lua_init": {"init_by_lua": "mine = 1", "exit_worker_by_lua": leave("worker")},
    }));
    let mut gw = Gateway::in_dir(dir);
    let put = |gw: &Gateway, version| {
        let reply = gw.admin_text("PUT", "/plugin_sources/leaves", &plugin(version), "text/plain");
        assert!(matches!(reply.status, 200 | 201), "{}", reply.text());
    };
    put(&gw, "1");
    put(&gw, "2");
    gw.put(
        "/routes/1",
        json!({"uri": "/t", "plugins": {"leaves": {}}, "upstream": {"type": "roundrobin", "nodes": {up.addr(): 1}}}),
    );
    assert_eq!(gw.get("/t").status, 200);
    gw.expect_log("worker left this in exit_worker: process exiting");
    let before = gw.log().matches("worker left").count();
    assert!(gw.quit().success());
    assert_eq!(gw.log().matches("worker left this in exit_worker").count(), before + 1, "once for each VM");
    gw.expect_log("plugin left this in exit_worker: process exiting");
    assert!(!gw.log().contains("writing a global Lua variable"), "init_by_lua races with nobody");
}

#[test]
fn a_script_of_the_end_that_waits_for_ever_is_cut_off() {
    let mut gw = Gateway::with(json!({
        "nginx_config": {"worker_processes": 1, "worker_shutdown_timeout": "400ms"},
        "lua_init": {"exit_worker_by_lua": "ngx.log(ngx.WARN, 'leaves') ngx.sleep(3600) ngx.log(ngx.WARN, 'left')"},
    }));
    for signal in [libc::SIGQUIT, libc::SIGTERM] {
        gw.signal(signal);
        assert!(gw.wait().success());
        gw.expect_log("exit_worker_by_lua or a plugin's destroy still waits: it is cut off");
        assert!(gw.log().contains("leaves") && !gw.log().contains("left"));
        gw.dir.write("logs/error.log", "");
        gw.launch();
    }
}

#[test]
fn a_location_may_pass_on_rewrite_and_refuse() {
    let upstream = Upstream::echo();
    let gw = Gateway::with(json!({
        "lua_upstreams": {"backend": [format!("{} weight=2", upstream.addr())]},
        "lua_locations": [
            {"location": "/pass/", "proxy_pass": "http://backend/to$uri", "set": {"mine": "v"},
             "header_filter_by_lua": "ngx.header['X-Filter'] = ngx.status",
             "options": {"proxy_set_header": [["X-Mine", "$mine"]], "add_header": [["X-Added", "$mine"]]}},
            {"location": "/old/", "options": {"rewrite": [["^/old/(.*)$", "/new/$1?n=1", "last"]]}},
            {"location": "/new/", "content_by_lua": "ngx.say(ngx.var.uri, '?', ngx.var.args)"},
            {"location": "/moved", "options": {"rewrite": [["^", "/new/", "permanent"]]}},
            {"location": "/closed", "options": {"deny": [["all"]]}, "content_by_lua": "ngx.say('in')"},
            {"location": "~ ^/re/(?<name>\\w+)/(\\d+)$", "content_by_lua": "ngx.say(ngx.var.name, ' ', ngx.var[2])"},
        ],
    }));
    let reply = gw.get("/pass/x?a=1");
    assert_eq!((reply.status, reply.header("x-filter"), reply.header("x-added")), (200, Some("200"), Some("v")));
    let seen = &upstream.seen()[0];
    assert_eq!(
        (&*seen.target, seen.header("host"), seen.header("x-mine")),
        ("/to/pass/x?a=1", Some("backend"), Some("v"))
    );
    let own = seen.headers.iter().find(|(name, _)| name.starts_with("X-Forwarded") || name == "X-Real-IP");
    assert_eq!(own, None, "nginx adds nothing of its own");
    says(&gw.get("/old/a?b=2"), "/new/a?n=1&b=2\n");
    let moved = gw.get("/moved");
    assert_eq!((moved.status, moved.header("location")), (301, Some(&*format!("http://{}/new/", gw.proxy()))));
    assert_eq!(gw.get("/closed").status, 403);
    says(&gw.get("/re/abc/12"), "abc 12\n");
    assert_eq!(gw.get("/re/abc/x").status, 404);
}

#[test]
fn what_a_client_says_does_not_end_a_header() {
    let upstream = Upstream::echo();
    let gw = Gateway::with(json!({
        "lua_upstreams": {"backend": [upstream.addr()]},
        "lua_locations": [
            {"location": "/pass/", "proxy_pass": "http://backend",
             "options": {"proxy_set_header": [["X-Uri", "$uri"]]}},
            {"location": "= /t",
             "content_by_lua": "if not pcall(ngx.location.capture, ngx.var.arg_to) then ngx.exec(ngx.var.arg_to) end"},
        ],
    }));
    assert_eq!(gw.get("/pass/a%0d%0aX-Injected:%201").status, 500);
    assert_eq!(upstream.seen().len(), 0);
    assert_eq!(gw.get("/pass/a%20b").status, 200);
    assert_eq!(upstream.seen()[0].header("x-uri"), Some("/pass/a b"));
    for unsafe_uri in ["/pass/%2e%2e/%2e%2e/x", "/pass/../x"] {
        assert_eq!(gw.get(&format!("/t?to={unsafe_uri}")).status, 500, "{unsafe_uri}");
    }
    gw.expect_log("unsafe uri");
    assert_eq!(upstream.seen().len(), 1, "nothing unsafe was passed on");
}

#[test]
fn a_filter_ends_what_another_server_answers() {
    let upstream = Upstream::echo();
    let gw = Gateway::with(json!({
        "lua_upstreams": {"backend": [upstream.addr()]},
        "lua_locations": [
            {"location": "/pass/", "proxy_pass": "http://backend", "header_filter_by_lua": "ngx.exit(403)"},
            {"location": "= /t", "content_by_lua": "ngx.exec('/missing')",
             "header_filter_by_lua": "ngx.header['X-Filter'] = 'of t'"},
        ],
    }));
    assert_eq!(gw.get("/pass/x").status, 403);
    let missing = gw.get("/t");
    assert_eq!((missing.status, missing.header("x-filter")), (404, None));
    assert_eq!(gw.get("/pass/x").status, 403, "and the gateway goes on");
}

#[test]
fn light_threads_without_end_leave_the_worker_to_others() {
    let gw = Gateway::with(json!({
        "nginx_config": {"worker_processes": 1},
        "lua_shared_dict": {"gate": "1m"},
        "lua_locations": [
            {"location": "= /t", "content_by_lua": r#"
                repeat ngx.thread.wait(ngx.thread.spawn(function() end)) until ngx.shared.gate:get("open")
                ngx.say("done")
            "#},
            {"location": "= /open", "content_by_lua": "ngx.shared.gate:set('open', true) ngx.say('ok')"},
        ],
    }));
    let mut client = Client::connect(&gw.proxy());
    client.send("GET", "/t", &[], b"");
    says(&gw.get("/open"), "ok\n");
    assert_eq!(client.head().status, 200);
    assert_eq!(client.chunk().as_deref(), Some(&b"done\n"[..]));
}

#[test]
fn the_narrowest_network_decides_who_may_come_in() {
    let open = |options: Value| json!({"location": "/", "options": options, "content_by_lua": "ngx.print('in')"});
    for (options, status) in [
        (json!({"allow": [["127.0.0.1"]], "deny": [["all"]]}), 200),
        (json!({"allow": [["127.0.0.0/8"]], "deny": [["127.0.0.1"], ["all"]]}), 403),
        (json!({"allow": [["127.0.0.1"]], "deny": [["127.0.0.0/8"]]}), 200),
        (json!({"allow": [["all"]], "deny": [["10.0.0.0/8"]]}), 200),
        (json!({"allow": [["all"]], "deny": [["all"]]}), 403),
        (json!({"allow": [["10.0.0.0/8"]]}), 200),
    ] {
        assert_eq!(with(json!([open(options.clone())])).get("/").status, status, "{options}");
    }
}

#[test]
fn files_answer_where_nothing_else_does() {
    let dir = Dir::new();
    std::fs::create_dir_all(dir.join("html/sub")).expect("a directory");
    dir.write("html/index.html", "index");
    dir.write("html/sub/a.txt", "text");
    dir.write("secret", "secret");
    dir.configure(json!({"lua_locations": [{"location": "/", "header_filter_by_lua": "ngx.header.x = 'y'"}]}));
    let gw = Gateway::in_dir(dir);
    let index = gw.get("/");
    says(&index, "index");
    assert_eq!((index.header("content-type"), index.header("x")), (Some("text/html"), Some("y")));
    let text = gw.get("/sub/a.txt");
    says(&text, "text");
    let since = text.header("last-modified").expect("a date").to_owned();
    assert_eq!(gw.send("GET", "/sub/a.txt", &[("If-Modified-Since", &since)], b"").status, 304);
    let folder = gw.get("/sub");
    let port = gw.proxy().rsplit(':').next().map(str::to_owned).expect("a port");
    let there = format!("http://127.0.0.1:{port}/sub/");
    assert_eq!((folder.status, folder.header("location")), (301, Some(&*there)));
    for (method, path, status) in
        [("GET", "/none", 404), ("GET", "/sub/", 404), ("GET", "/..%2fsecret", 400), ("POST", "/", 405)]
    {
        assert_eq!(gw.send(method, path, &[], b"").status, status, "{method} {path}");
    }
    gw.expect_log("html/none\" failed (2: No such file or directory)");
}

#[test]
fn without_a_code_cache_a_changed_file_counts_at_once() {
    let dir = Dir::new();
    dir.write("conf/t.lua", "n = (n or 0) + 1 ngx.say(n)");
    let options = json!({"lua_code_cache": "off"});
    dir.configure(json!({"lua_locations": [
        {"location": "= /off", "content_by_lua_file": "conf/t.lua", "options": options},
        {"location": "= /on", "content_by_lua_file": "conf/t.lua"},
    ], "nginx_config": {"worker_processes": 1}}));
    let gw = Gateway::in_dir(dir);
    says(&gw.get("/on"), "1\n");
    says(&gw.get("/on"), "2\n");
    says(&gw.get("/off"), "1\n");
    gw.dir.write("conf/t.lua", "ngx.say('changed ', n)");
    says(&gw.get("/off"), "changed nil\n");
    says(&gw.get("/on"), "3\n");
    gw.expect_log("lua_code_cache is off; this will hurt performance");
}

#[test]
fn who_holds_a_worker_is_named() {
    let gw = with(json!([
        {"location": "= /command", "content_by_lua": "ngx.say((os.execute('sleep 0.03')))", "lines": {"content_by_lua": 7}},
        {"location": "= /pipe", "content_by_lua": r#"
            local pipe = io.popen("sleep 0.03; echo out")
            ngx.print(pipe:read("*a"), tostring(pipe:close()))
        "#},
    ]));
    says(&gw.get("/command"), "true\n");
    says(&gw.get("/pipe"), "out\ntrue");
    gw.expect_log("os.execute held the worker for ");
    gw.expect_log("called at content_by_lua(nginx.conf:7):1");
    gw.expect_log("file:read held the worker for ");
}

#[test]
fn mistakes_stop_the_start() {
    let told = |settings: Value| -> (ExitStatus, String) {
        let dir = Dir::new();
        dir.configure(settings);
        let mut command = dir.command();
        command.arg("test");
        run(command)
    };
    let (status, text) = told(json!({
        "lua_locations": [
            {"location": "! /x"}, {"location": "~ ("}, {"content_by_lua": "x"},
            {"location": "/x", "options": {"deny": [["10.0.0.300"]]}},
        ],
        "lua_listen": ["no port"],
    }));
    assert_eq!(status.code(), Some(1));
    for path in [
        "lua_locations[0].location",
        "lua_locations[1].location",
        "lua_locations[2].location",
        "lua_locations[3].options.deny: \"10.0.0.300\" is no address",
        "lua_listen[0]",
    ] {
        assert!(text.contains(path), "{path}: {text}");
    }
    let (status, text) = told(json!({"lua_locations": [{"location": "/x", "return": {"status": 200}}]}));
    assert!(status.success(), "{text}");
}

#[test]
fn plugins_that_change_are_there_for_locations_at_once() {
    let gw = with(json!([{"location": "= /t", "content_by_lua": "ngx.say(require('apisix.plugins.mine').version)"}]));
    for version in ["0.1", "0.2"] {
        let source = format!(
            "local schema = {{type = 'object'}}
             return {{version = {version}, priority = 1, name = 'mine', schema = schema,
                 check_schema = function(conf) return require('apisix.core').schema.check(schema, conf) end}}"
        );
        let reply = gw.admin_text("PUT", "/plugin_sources/mine", &source, "text/plain");
        assert!(matches!(reply.status, 200 | 201), "{}", reply.text());
        for _ in 0..8 {
            says(&gw.get("/t"), &format!("{version}\n"));
        }
    }
}

#[test]
fn the_status_phrase_and_whole_answers_are_the_scripts() {
    let gw = with(json!([
        {"location": "= /phrase", "content_by_lua": "require('ngx.resp').set_status(299, 'Quite Fine') ngx.say('x')"},
        {"location": "= /fresh", "content_by_lua": r#"
            ngx.header["Last-Modified"] = "Thu, 01 Jan 2026 00:00:00 GMT"
            if ngx.var.arg_whole then require("ngx.resp").bypass_if_checks() end
            ngx.say("body")
        "#},
    ]));
    let text = raw(&gw.proxy(), b"GET /phrase HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n");
    assert!(text.starts_with("HTTP/1.1 299 Quite Fine\r\n"), "{text}");
    let since = [("If-Modified-Since", "Thu, 01 Jan 2026 00:00:00 GMT")];
    assert_eq!(gw.send("GET", "/fresh", &since, b"").status, 304);
    says(&gw.send("GET", "/fresh?whole=1", &since, b""), "body\n");
}

#[test]
fn lines_of_the_error_log_are_captured_when_the_configuration_says_so() {
    let gw = Gateway::with(json!({
        "lua_options": {"lua_capture_error_log": "64k"},
        "lua_init": {"init_by_lua": "assert(require('ngx.errlog').set_filter_level(ngx.WARN))"},
        "lua_locations": [{"location": "= /t", "content_by_lua": r#"
            local errlog = require("ngx.errlog")
            errlog.get_logs()
            ngx.log(ngx.INFO, "less") ngx.log(ngx.WARN, "enough")
            local logs = errlog.get_logs()
            ngx.say(#logs / 3, " ", logs[1], " ", logs[3]:match("enough, client: [%d.]+"))
        "#}],
    }));
    says(&gw.get("/t"), "1 5 enough, client: 127.0.0.1\n");
}

#[test]
fn a_script_lets_the_gateway_drain() {
    let mut gw = with(json!([
        {"location": "= /t", "content_by_lua": r#"
            ngx.print(tostring(ngx.worker.exiting()), " ")
            assert(require("ngx.process").signal_graceful_exit())
            while not ngx.worker.exiting() do ngx.sleep(0.001) end
            ngx.say("answered")
        "#},
    ]));
    says(&gw.get("/t"), "false answered\n");
    assert!(gw.wait().success());
}

/// Compiles C to a shared object in the gateway's directory, without any header.
fn compile(dir: &Dir, name: &str, source: &str) {
    dir.write(&format!("{name}.c"), source);
    let (from, to) = (dir.join(&format!("{name}.c")), dir.join(&format!("{name}.so")));
    let mut cc = std::process::Command::new("cc");
    cc.args(["-shared", "-fPIC", "-o"]).arg(to).arg(from);
    let (status, text) = run(cc);
    assert!(status.success(), "{text}");
}

#[test]
fn c_modules_find_the_lua_of_the_binary() {
    let dir = Dir::new();
    let source = |answer: &str| {
        let prototypes = "typedef struct lua_State lua_State; void lua_pushinteger(lua_State *, long);
            void lua_createtable(lua_State *, int, int); void lua_setfield(lua_State *, int, const char *);
            const char *luaL_checklstring(lua_State *, int, unsigned long *);
            void lua_pushcclosure(lua_State *, int (*)(lua_State *), int);";
        format!(
            "{prototypes} static int len(lua_State *L) {{
                unsigned long n; luaL_checklstring(L, 1, &n); lua_pushinteger(L, (long)n); return 1;
            }}
            int luaopen_{answer}(lua_State *L) {{
                lua_createtable(L, 0, 1); lua_pushcclosure(L, len, 0); lua_setfield(L, -2, \"len\"); return 1;
            }}"
        )
    };
    fs::create_dir(dir.join("extra")).unwrap();
    compile(&dir, "own", &source("own"));
    compile(&dir, "extra/more", &source("more"));
    let own = dir.path().display().to_string();
    dir.configure(json!({
        "apisix": {"extra_lua_cpath": format!("{own}/extra/?.so")},
        "lua_package_cpath": format!("{own}/?.so;;"),
        "lua_locations": [{"location": "= /t", "content_by_lua":
            "ngx.say(require('own').len('four'), ' ', require('more').len(''), ' ', pcall(require('own').len))"}],
    }));
    let gw = Gateway::in_dir(dir);
    let text = gw.get("/t").text();
    assert!(text.starts_with("4 0 falsebad argument #1 to '?' (string expected, got no value)"), "{text}");
}

#[test]
fn preloaded_libraries_are_in_reach_of_ffi() {
    let dir = Dir::new();
    compile(&dir, "own", "int own_answer(int n) { return n + 1; }");
    let library = dir.join("own.so").display().to_string();
    let location = json!([{"location": "= /t", "content_by_lua": r#"
        local ffi = require("ffi")
        pcall(ffi.cdef, "int own_answer(int n);")
        ngx.say(pcall(function() return ffi.C.own_answer(41) end))
    "#}]);
    dir.configure(json!({"lua": {"preload": [library]}, "lua_locations": location.clone()}));
    let mut gw = Gateway::in_dir(dir);
    says(&gw.get("/t"), "true42\n");
    gw.quit();
    gw.dir.configure(json!({"lua_locations": location}));
    gw.launch();
    let without = gw.get("/t").text();
    assert!(without.contains("own_answer"), "not without the preload: {without}");
    gw.quit();
    gw.dir.configure(json!({"lua": {"preload": ["libc.so.6", "/no/such/lib.so"]}}));
    let (status, text) = run(gw.dir.command());
    assert!(!status.success());
    for part in ["lua.preload[1]: /no/such/lib.so: cannot open shared object file", "take it off the list"] {
        assert!(text.contains(part), "{text}");
    }
}

/// Says of each call whether it is compiled, ends its trace, or is left to the interpreter.
const CLASSIFY: &str = r#"
    local util = require("jit.util")
    local function classify(f)
        local seen = "interpreted"
        local function on(what, trace)
            if what ~= "stop" then return end
            if util.traceinfo(trace).linktype == "stitch" then
                seen = "stitched"
            elseif seen == "interpreted" then
                seen = "compiled"
            end
        end
        -- What the first call does is done once.
        jit.off()
        f()
        jit.on()
        jit.flush()
        jit.attach(on, "trace")
        for _ = 1, 500 do f() end
        jit.attach(on)
        return seen
    end
    local told = {}
    for call in ngx.var.arg_calls:gmatch("[^;]+") do
        call = ngx.unescape_uri(call)
        local f = loadstring("return function() local x = " .. call .. " return x end")
            or assert(loadstring("return function() " .. call .. " end"))
        told[#told + 1] = call .. ": " .. classify(f())
    end
    ngx.print(table.concat(told, "\n"))
"#;

#[test]
fn calls_are_compiled_as_documented() {
    let page = include_str!("../docs/performance.md");
    let gw = Gateway::with(json!({
        "lua_shared_dict": {"counts": "1m"},
        "lua_locations": [{"location": "= /t", "content_by_lua": CLASSIFY}],
    }));
    for (start, kind) in [("\nCompiled: ", "compiled"), ("\nStitched: ", "stitched")] {
        let list = page.split(start).nth(1).and_then(|rest| rest.split("\n\n").next()).expect("the list is there");
        let calls: Vec<&str> = list.split('`').skip(1).step_by(2).collect();
        assert!(calls.len() > 20, "{calls:?}");
        let escaped = |call: &&str| call.bytes().map(|b| format!("%{b:02x}")).collect::<String>();
        let calls_arg: Vec<String> = calls.iter().map(escaped).collect();
        let reply = gw.get(&format!("/t?calls={}", calls_arg.join(";")));
        let expected: Vec<String> = calls.iter().map(|call| format!("{call}: {kind}")).collect();
        assert_eq!((reply.status, reply.text()), (200, expected.join("\n")));
    }
}

/// Says what begins a trace and cannot end it: LuaJIT's error 8, "leaving loop in root trace".
const LEAVING: &str = r#"
    local left = {}
    jit.attach(function(what, _, f, _, e)
        local info = what == "abort" and e == 8 and require("jit.util").funcinfo(f)
        if info then left[info.source .. ":" .. info.linedefined] = true end
    end, "trace")
    local calls = {}
    for call in ngx.var.arg_calls:gmatch("[^;]+") do
        call = ngx.unescape_uri(call)
        calls[#calls + 1] = assert(loadstring("local x = " .. call) or loadstring(call))
    end
    -- In turn, so that what several of them call gets hot before they do.
    for _ = 1, 500 do
        for i = 1, #calls do calls[i]() end
    end
    for place in pairs(left) do ngx.say(place) end
"#;

/// A function whose last call is a tail call of no Lua function is tried ever again, and in the end never.
#[test]
fn what_is_compiled_begins_no_trace_in_vain() {
    let page = include_str!("../docs/performance.md");
    let list = page.split("\nCompiled: ").nth(1).and_then(|rest| rest.split("\n\n").next()).expect("the list is there");
    let calls: Vec<&str> = list.split('`').skip(1).step_by(2).collect();
    let gw = Gateway::with(json!({
        "lua_shared_dict": {"counts": "1m"},
        "lua_locations": [{"location": "= /t", "content_by_lua": format!("jit.off(true)\n{LEAVING}")}],
    }));
    let escaped = |call: &&str| call.bytes().map(|b| format!("%{b:02x}")).collect::<String>();
    let calls: Vec<String> = calls.iter().map(escaped).collect();
    let reply = gw.get(&format!("/t?calls={}", calls.join(";")));
    assert_eq!((reply.status, reply.text().as_str()), (200, ""));
}
