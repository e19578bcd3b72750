//! `ngx.var`: what can be read in each phase, and what can be written.

use serde_json::{Value, json};

use crate::support::{Client, Gateway, Reply, Upstream, eventually, http::raw, http2};

fn with(locations: Value) -> Gateway {
    Gateway::with(json!({"lua_locations": locations}))
}

#[track_caller]
fn says(reply: &Reply, expected: &str) {
    assert_eq!((reply.status, reply.text().as_str()), (200, expected));
}

/// Writes each of the names and says what came of it.
const WRITE: &str = r#"
    for name in ngx.var.arg_names:gmatch("[^,]+") do
        local ok, err = pcall(function() ngx.var[name] = "4" end)
        ngx.say(name, " ", ok and tostring(ngx.var[name]) or err:match("variable .*"))
    end
"#;

#[test]
fn a_location_writes_what_the_configuration_defines() {
    let gw = with(json!([
        {"location": "= /t", "set": {"mine": "x"}, "content_by_lua": WRITE},
        {"location": "~ ^/other(?<Captured>.*)", "set": {"others": ""}, "return": {"status": 200},
         "set_by_lua": [{"var": "by_lua", "lua": "return 1"}], "options": {"rewrite": "^/no(?<part>.*) /x"}},
    ]));
    let names = ["mine", "Mine", "others", "by_lua", "captured", "part", "llm_model", "upstream_uri", "limit_rate"];
    let written: String = names.iter().map(|name| format!("{name} 4\n")).collect();
    says(&gw.get(&format!("/t?names={}", names.join(","))), &written);
    let strangers = [
        "undefined",
        "http_x",
        "arg_x",
        "cookie_x",
        "sent_http_x",
        "upstream_http_x",
        "upstream_cookie_x",
        "sent_trailer_x",
    ];
    let refused = |name: &&str| {
        format!(
            "{name} variable \"{name}\" not found for writing; maybe it is a built-in variable that is not changeable or you \
             forgot to use \"set ${name} '';\" in the config file to define it first\n"
        )
    };
    says(&gw.get(&format!("/t?names={}", strangers.join(","))), &strangers.iter().map(refused).collect::<String>());
}

#[test]
fn what_is_the_servers_own_is_not_written() {
    let gw = with(json!([{"location": "= /t", "content_by_lua": WRITE}]));
    let names = [
        "status",
        "uri",
        "request_uri",
        "query_string",
        "host",
        "remote_addr",
        "request_method",
        "request_id",
        "connection_time",
        "tcpinfo_rtt",
        "http2",
        "upstream_addr",
        "upstream_cache_status",
        "proxy_protocol_server_addr",
        "date_gmt",
        "scheme",
    ];
    let refused: String = names.iter().map(|name| format!("{name} variable \"{name}\" not changeable\n")).collect();
    says(&gw.get(&format!("/t?names={}", names.join(","))), &refused);
    says(&gw.get("/t?names=ssl_cipher"), "ssl_cipher variable \"ssl_cipher\" cannot be assigned a value\n");
    says(&gw.get("/t?names=args"), "args 4\n");
}

#[test]
fn an_undefined_variable_is_not_unset_either() {
    let gw = with(json!([{"location": "= /t", "set": {"mine": "x"}, "content_by_lua": r#"
        ngx.var.mine = nil
        ngx.say(ngx.var.mine)
        ngx.say((select(2, pcall(function() ngx.var.undefined = nil end)):match("not found for writing")))
        ngx.say((select(2, pcall(function() ngx.var[1] = "x" end)):match("bad variable name")))
        ngx.say((select(2, pcall(function() return ngx.var[true] end)):match("bad variable name")))
        ngx.var.args = "b=2"
        ngx.say(ngx.var.arg_b, " ", ngx.var.query_string, " ", ngx.req.get_uri_args().b)
        ngx.var.limit_rate = "5k"
        ngx.say(ngx.var.limit_rate)
        ngx.var.limit_rate = "abc"
        ngx.say(ngx.var.limit_rate)
    "#}]));
    says(&gw.get("/t"), "nil\nnot found for writing\nbad variable name\nbad variable name\n2 b=2 2\n5120\n5120\n");
}

#[test]
fn plugins_make_variables_of_their_own() {
    let upstream = Upstream::echo();
    let gw = Gateway::start();
    let write = r#"return function(conf, ctx)
        ngx.var.my_own = "mine"
        local ok, err = pcall(function() ngx.var.http_x = "1" end)
        ngx.header["X-Seen"] = ngx.var.my_own .. " " .. err:match("variable .* for writing")
    end"#;
    gw.route("1", "/*", &upstream, json!({"serverless-post-function": {"phase": "access", "functions": [write]}}));
    let reply = gw.get("/x");
    assert_eq!(reply.header("x-seen"), Some("mine variable \"http_x\" not found for writing"));
}

/// What a script in each phase of a proxied request says of these variables.
fn in_phases(names: &[&str]) -> Value {
    let list =
        names.iter().map(|name| format!("{name}=' .. tostring(ngx.var.{name}) .. '")).collect::<Vec<_>>().join(" ");
    let log = format!(
        "if ngx.arg == nil or ngx.get_phase() ~= 'body_filter' or ngx.arg[2] then ngx.log(ngx.WARN, ngx.get_phase() .. ': {list};') end"
    );
    json!({"access_by_lua": log, "header_filter_by_lua": log, "body_filter_by_lua": log, "log_by_lua": log})
}

fn merged(mut base: Value, more: Value) -> Value {
    if let (Value::Object(base), Value::Object(more)) = (&mut base, more) {
        base.extend(more);
    }
    base
}

#[test]
fn each_phase_sees_what_is_known_by_then() {
    let upstream = Upstream::answering(|_| {
        b"HTTP/1.1 200 OK\r\nSet-Cookie: u=uv; Path=/\r\nX-Up: 1\r\nContent-Length: 5\r\n\r\nhello"
    });
    let names = [
        "upstream_addr",
        "upstream_status",
        "upstream_response_length",
        "upstream_bytes_received",
        "upstream_http_x_up",
        "upstream_cookie_u",
        "status",
        "sent_http_x_up",
        "sent_http_connection",
        "request_completion",
    ];
    let location = json!({"location": "/t", "proxy_pass": format!("http://{}", upstream.addr())});
    let gw = with(json!([merged(location, in_phases(&names))]));
    assert_eq!(gw.get("/t").text(), "hello");
    let addr = upstream.addr();
    let whole = "HTTP/1.1 200 OK\r\nSet-Cookie: u=uv; Path=/\r\nX-Up: 1\r\nContent-Length: 5\r\n\r\nhello".len();
    gw.expect_log(
        "access: upstream_addr=nil upstream_status=nil upstream_response_length=nil upstream_bytes_received=nil \
         upstream_http_x_up=nil upstream_cookie_u=nil status=000 sent_http_x_up=nil",
    );
    gw.expect_log(&format!(
        "header_filter: upstream_addr={addr} upstream_status=200 upstream_response_length=0 upstream_bytes_received={whole} \
         upstream_http_x_up=1 upstream_cookie_u=uv status=200 sent_http_x_up=1"
    ));
    gw.expect_log(&format!("body_filter: upstream_addr={addr} upstream_status=200 upstream_response_length=5 "));
    gw.expect_log(&format!(
        "log: upstream_addr={addr} upstream_status=200 upstream_response_length=5 upstream_bytes_received={whole} \
         upstream_http_x_up=1 upstream_cookie_u=uv status=200 sent_http_x_up=1"
    ));
    gw.expect_log("request_completion=OK;");
}

#[test]
fn every_try_has_its_place_in_the_upstreams_variables() {
    let upstream = Upstream::echo();
    let gw = Gateway::start();
    let log = "return function() ngx.log(ngx.WARN, 'tries: ', ngx.var.upstream_addr, '; ', ngx.var.upstream_status, '; ',
        ngx.var.upstream_response_length, '; ', ngx.var.upstream_bytes_received, '; ', ngx.var.upstream_connect_time) end";
    let port: u16 = upstream.addr().rsplit(':').next().and_then(|port| port.parse().ok()).expect("a port");
    // Nobody listens on the first: its priority has it asked first.
    let nodes = json!([
        {"host": "127.0.0.1", "port": 1, "weight": 1, "priority": 1},
        {"host": "127.0.0.1", "port": port, "weight": 1, "priority": 0},
    ]);
    gw.put(
        "/routes/1",
        json!({"uri": "/t", "upstream": {"type": "roundrobin", "nodes": nodes},
               "plugins": {"serverless-post-function": {"phase": "log", "functions": [log]}}}),
    );
    let body = gw.get("/t").body;
    gw.expect_log(&format!("tries: 127.0.0.1:1, {}; 502, 200; 0, {}; 0, ", upstream.addr(), body.len()));
    assert!(gw.log().contains("; -, 0."), "no connection, no time: {}", gw.log());
}

/// A gateway whose access.log has lines of this format.
fn logging(format: &str, locations: Value) -> Gateway {
    Gateway::with(json!({
        "nginx_config": {"http": {"access_log_format": format, "access_log_buffer": 0}},
        "lua_locations": locations,
    }))
}

#[track_caller]
fn logged(gw: &Gateway, line: &str) {
    eventually(&format!("{line:?} in access.log"), || {
        gw.dir.read("logs/access.log").lines().any(|l| l == line).then_some(())
    });
}

/// As nginx 1.22 with Lua does it.
#[test]
fn the_request_is_told_as_it_came() {
    let gw = logging(
        "$request ($request_method)",
        json!([
            {"location": "= /t", "content_by_lua": r#"
                ngx.req.set_method(ngx.HTTP_PUT)
                ngx.say(ngx.var.request, " ", ngx.var.request_method, " ", ngx.req.get_method(), " ", ngx.var.host)
                ngx.say(ngx.var.request_uri, " ", (ngx.req.raw_header():match("^[^\r]+")))
                ngx.log(ngx.WARN, "told")
            "#},
            {"location": "= /missing", "options": {"error_page": [["404", "/page"]]}, "return": {"status": 404}},
            {"location": "= /page", "return": {"status": 200, "body": "$request_method of $request\n"}},
        ]),
    );
    says(&gw.get("/t?a"), "GET /t?a HTTP/1.1 PUT PUT 127.0.0.1\n/t?a GET /t?a HTTP/1.1\n");
    logged(&gw, "GET /t?a HTTP/1.1 (PUT)");
    gw.expect_log("request: \"GET /t?a HTTP/1.1\"");
    let absolute = raw(&gw.proxy(), b"GET http://h.x/t?a HTTP/1.1\r\nHost: y\r\nConnection: close\r\n\r\n");
    let told = "GET http://h.x/t?a HTTP/1.1 PUT PUT h.x\n";
    assert!(absolute.contains(told) && absolute.contains("/t?a GET http://h.x/t?a HTTP/1.1\n"), "{absolute}");
    logged(&gw, "GET http://h.x/t?a HTTP/1.1 (PUT)");
    gw.expect_log("request: \"GET http://h.x/t?a HTTP/1.1\"");
    let old = raw(&gw.proxy(), b"GET /t HTTP/1.0\r\n\r\n");
    assert!(old.contains("GET /t HTTP/1.0 PUT PUT _\n"), "{old}");
    let reply = gw.send("POST", "/missing", &[], b"");
    assert_eq!((reply.status, reply.text().as_str()), (404, "GET of POST /missing HTTP/1.1\n"));
    logged(&gw, "POST /missing HTTP/1.1 (GET)");
}

/// As nginx 1.22 with Lua does it.
#[test]
fn a_subrequest_tells_of_the_request_that_made_it() {
    let gw = with(json!([
        {"location": "= /t", "content_by_lua": r#"
            if ngx.var.arg_put then ngx.req.set_method(ngx.HTTP_PUT) end
            ngx.print(ngx.location.capture("/sub", {method = ngx.HTTP_POST, body = "xyz"}).body)
        "#},
        {"location": "= /sub", "content_by_lua": r#"
            local v = ngx.var
            ngx.say(v.request_method, " ", v.echo_client_request_method, " ", v.echo_request_method, " ", v.request)
            ngx.req.set_method(ngx.HTTP_DELETE)
            ngx.say(v.request_method, " ", v.echo_request_method, " ", v.http_content_length, " ", v.uri)
            ngx.say((v.echo_client_request_headers == ngx.req.raw_header()), " ", (ngx.req.raw_header():gsub("\r\n", "|")))
            if v.uri ~= "/deep" then ngx.print(ngx.location.capture("/deep").body) end
        "#},
        {"location": "= /deep", "content_by_lua":
            "ngx.say(ngx.var.request_method, ' ', ngx.var.echo_request_method, ' ', ngx.var.request)"},
    ]));
    let ask = |target: &str| {
        let head = format!("GET {target} HTTP/1.1\r\nHost: h\r\nX-A: 1\r\nConnection: close\r\n\r\n");
        let text = raw(&gw.proxy(), head.as_bytes());
        text.lines().filter(|line| line.contains(" /") || line.contains('|')).map(String::from).collect::<Vec<_>>()
    };
    for (target, method) in [("/t", "GET"), ("/t?put=1", "PUT")] {
        assert_eq!(
            ask(target),
            [
                format!("{method} {method} POST GET {target} HTTP/1.1"),
                format!("{method} DELETE 3 /sub"),
                format!("true GET {target} HTTP/1.1|Host: h|X-A: 1|Connection: close||"),
                format!("{method} GET GET {target} HTTP/1.1"),
            ]
        );
    }
}

/// As nginx 1.22 with Lua does it: `/t?` has no arguments, while a script may set none.
#[test]
fn arguments_that_a_script_has_emptied_are_there() {
    let gw = with(json!([
        {"location": "= /t", "content_by_lua": r#"
            local function show() ngx.say(tostring(ngx.var.args), " ", tostring(ngx.var.query_string), " ", ngx.var.is_args) end
            show()
            ngx.req.set_uri_args("") show()
            ngx.var.args = nil show()
            ngx.var.args = "" show()
            ngx.req.set_uri_args({}) show()
        "#},
        {"location": "= /u", "content_by_lua": "ngx.req.set_uri_args('') ngx.exec('/e')"},
        {"location": "= /e", "content_by_lua": "ngx.say(tostring(ngx.var.args))"},
    ]));
    for target in ["/t", "/t?"] {
        says(&gw.get(target), "nil nil \n  \nnil nil \n  \n  \n");
    }
    says(&gw.get("/u"), "nil\n");
}

#[test]
fn groups_of_servers_are_told_apart() {
    let second = Upstream::answering(|_| b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello");
    let gw = logging(
        "$uri $status $upstream_addr; $upstream_status; $upstream_response_length",
        json!([
            {"location": "= /t", "proxy_pass": "http://127.0.0.1:1", "options": {"error_page": [["502", "=", "@second"]]}},
            {"location": "= /once", "proxy_pass": format!("http://{}", second.addr())},
            {"location": "@second", "proxy_pass": format!("http://{}", second.addr())},
        ]),
    );
    let addr = second.addr();
    says(&gw.get("/t"), "hello");
    logged(&gw, &format!("/t 200 127.0.0.1:1 : {addr}; 502 : 200; 0 : 5"));
    says(&gw.get("/once"), "hello");
    logged(&gw, &format!("/once 200 {addr}; 200; 5"));
}

/// As nginx 1.22 with Lua does it.
#[test]
fn a_subrequest_is_given_variables_of_the_configuration_only() {
    let gw = with(json!([
        {"location": "= /t", "set": {"mine": ""}, "content_by_lua": r#"
            for _, name in ipairs({"mine", "MINE", "limit_rate", "undefined", "http_x", "arg_x"}) do
                local ok, answer = pcall(ngx.location.capture, "/sub", {vars = {[name] = "g"}})
                ngx.say(name, " ", ok and answer.body or answer)
            end
        "#},
        {"location": "= /sub", "content_by_lua": "ngx.print(ngx.var.mine)"},
    ]));
    let refused = |name: &str| format!("{name} failed to adjust the subrequest: -1\n");
    let expected = ["undefined", "http_x", "arg_x"].map(refused).concat();
    says(&gw.get("/t"), &format!("mine g\nMINE g\nlimit_rate nil\n{expected}"));
    gw.expect_log("variable \"undefined\" cannot be assigned a value (maybe you forgot to define it first?)");
}

#[test]
fn the_connection_and_its_framing_are_told() {
    let gw = with(json!([{"location": "= /t", "options": {"root": "html"}, "content_by_lua": r#"
        ngx.say("x")
        for _, name in ipairs({"sent_http_connection", "sent_http_transfer_encoding", "http2", "connection_requests"}) do
            ngx.say(name, "=", tostring(ngx.var[name]))
        end
        for _, name in ipairs({"tcpinfo_rtt", "tcpinfo_rttvar", "tcpinfo_snd_cwnd", "tcpinfo_rcv_space", "connection_time"}) do
            ngx.say(name, " ", tonumber(ngx.var[name]) ~= nil)
        end
        ngx.say(ngx.var.request_filename == ngx.var.document_root .. "/t", " ", ngx.var.realpath_root)
    "#}]));
    let lines = "sent_http_connection=keep-alive\nsent_http_transfer_encoding=chunked\nhttp2=\nconnection_requests=1\n\
                 tcpinfo_rtt true\ntcpinfo_rttvar true\ntcpinfo_snd_cwnd true\ntcpinfo_rcv_space true\nconnection_time true\n\
                 true nil\n";
    let mut client = Client::connect(&gw.proxy());
    client.send("GET", "/t", &[], b"");
    says(&client.reply("GET"), &format!("x\n{lines}"));
    let text = raw(&gw.proxy(), b"GET /t HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n");
    assert!(text.contains("sent_http_connection=close"), "{text}");
    let shared = http2::get(&gw.proxy(), "/t").text();
    let lines = lines.replace("=keep-alive", "=nil").replace("=chunked", "=nil").replace("http2=\n", "http2=h2c\n");
    assert_eq!(shared, format!("x\n{lines}"));
}
