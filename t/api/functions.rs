//! Functions of `ngx.*` and of lua-resty-core: what they give and refuse, and in which phases.

use serde_json::{Value, json};

use crate::support::{Gateway, eventually};

/// What `content_by_lua` of one location answers to a POST with a body of `a=1&b=2&c`.
#[track_caller]
fn gives(lua: &str, expected: &str) {
    let gw =
        Gateway::with(json!({"lua_locations": [{"location": "= /t", "set": {"mine": ""}, "content_by_lua": lua}]}));
    let reply = gw.send("POST", "/t?a=1&b=2&a=3", &[("X-Two", "1"), ("X-Two", "2")], b"a=1&b=2&c");
    assert_eq!((reply.status, reply.text().trim_end()), (200, expected), "{lua}");
}

/// Says for each line of Lua what it gives, or how it is refused.
#[track_caller]
fn each(cases: &[(&str, &str)]) {
    let show = "local function show(ok, ...)
        local t = {}
        for i = 1, select('#', ...) do t[i] = tostring((select(i, ...))) end
        ngx.say(ok and '' or 'error: ', (table.concat(t, ' '):gsub('^content_by_lua:%d+: ', '')))
    end\n";
    let calls: String = cases.iter().map(|(lua, _)| format!("show(pcall(function() return {lua} end))\n")).collect();
    let expected: Vec<&str> = cases.iter().map(|(_, expected)| *expected).collect();
    gives(&format!("{show}{calls}"), &expected.join("\n"));
}

#[test]
fn texts_are_made_as_openresty_makes_them() {
    each(&[
        ("ngx.decode_base64mime('aGVs\\r\\nbG8=')", "hello"),
        ("ngx.decode_base64mime('aGV!s bG8')", "hello"),
        ("ngx.decode_base64mime('a')", "nil"),
        ("ngx.decode_base64mime(12)", "error: string argument only"),
        ("ngx.md5(nil), ngx.md5(true)", "d41d8cd98f00b204e9800998ecf8427e b326b5062b2f0e69046810717534cb09"),
        ("ngx.crc32_short(nil), ngx.crc32_long('hello')", "0 907060870"),
        ("ngx.encode_base64(), ngx.encode_base64(true)", " dHJ1ZQ=="),
        ("ngx.escape_uri(true), ngx.unescape_uri(nil)", "true "),
        ("ngx.http_time('x')", "error: number argument only"),
        ("ngx.cookie_time()", "error: number argument only"),
        ("ngx.parse_http_time()", "error: string argument only"),
        ("ngx.md5({})", "error: bad argument #1 to 'md5' (string expected, got table)"),
    ]);
}

#[test]
fn the_directives_of_set_misc_are_functions() {
    each(&[
        ("ndk.set_var.set_escape_uri('a/b')", "a%2Fb"),
        ("ndk.set_var.set_unescape_uri('a%2fb')", "a/b"),
        ("ndk.set_var.set_quote_sql_str(\"a'b\")", "'a\\'b'"),
        ("ndk.set_var.set_quote_pgsql_str(\"a'b\")", "E'a\\'b'"),
        ("ndk.set_var.set_quote_json_str('a\"\\\\\\n\\1é')", "\"a\\\"\\\\\\n\\u0001é\""),
        // An empty text is not quoted as one, which is how set_misc does it.
        ("ndk.set_var.set_quote_sql_str(''), ndk.set_var.set_quote_sql_str(nil)", "'' ''"),
        ("ndk.set_var.set_quote_pgsql_str(''), ndk.set_var.set_quote_pgsql_str(nil)", "'' ''"),
        ("ndk.set_var.set_quote_json_str(''), ndk.set_var.set_quote_json_str(nil)", "null null"),
        // Half a character must not take the quote that ends the literal for its other half.
        ("ndk.set_var.set_quote_pgsql_str('\\196\\227\\186\\195')", r"E'\\304\\343\\272\\303'"),
        ("ndk.set_var.set_quote_pgsql_str('a\\191')", r"E'a\\277'"),
        ("ndk.set_var.set_quote_pgsql_str('你\\26\\0\\b\\n\\r\\t\"\\\\')", "E'你\u{1a}\\000\\b\\n\\r\\t\\\"\\\\'"),
        ("ndk.set_var.set_encode_base32('abcde'), ndk.set_var.set_decode_base32('c5h66p35')", "c5h66p35 abcde"),
        ("ndk.set_var.set_encode_base32('abc'), ndk.set_var.set_decode_base32('c5h66===')", "c5h66=== abc"),
        ("ndk.set_var.set_encode_base32(''), ndk.set_var.set_decode_base32('c5h*')", " "),
        ("ndk.set_var.set_encode_base64('abcde'), ndk.set_var.set_decode_base64('YWJjZGU=')", "YWJjZGU= abcde"),
        ("ndk.set_var.set_decode_base64('a')", ""),
        ("ndk.set_var.set_encode_hex('abcde'), ndk.set_var.set_decode_hex('6162636465')", "6162636465 abcde"),
        ("ndk.set_var.set_decode_hex('6')", ""),
        ("ndk.set_var.set_sha1('hello')", "aaf4c61ddcc5e8a2dabede0f3b482cd9aea9434d"),
        ("ndk.set_var.set_md5('hello')", "5d41402abc4b2a76b9719d911017c592"),
        (
            "ndk.set_var.set_nothing('x')",
            "error: ndk.set_var: directive \"set_nothing\" not found or does not use ndk_set_var_value",
        ),
    ]);
}

#[test]
fn requests_are_read_and_changed() {
    each(&[
        (
            "(function() local t = {old = 1} local got = ngx.req.get_uri_args(0, t) return got == t, t.a[2], t.b, t.old end)()",
            "true 3 2 nil",
        ),
        ("select(2, ngx.req.get_uri_args(1, {}))", "truncated"),
        ("ngx.req.get_uri_args(0, 'x')", "error: bad argument #2 to 'get_uri_args' (table expected, got string)"),
        ("ngx.req.set_header(nil, 'x')", "error: bad 'name' argument: string expected, got nil"),
        ("ngx.req.set_method('GET')", "error: bad method number"),
        ("ngx.req.set_uri('/x', 'y')", "error: bad argument #2 to 'set_uri' (boolean expected, got string)"),
        ("ngx.req.set_uri('/x', nil, 'y')", "error: bad argument #3 to 'set_uri' (boolean expected, got string)"),
        ("ngx.req.set_uri('/a\\0b', false, true), ngx.var.uri == '/a\\0b'", "nil true"),
        ("ngx.req.get_post_args()", "error: no request body found; maybe you should turn on lua_need_request_body?"),
        ("ngx.req.read_body()", ""),
        ("ngx.req.get_post_args().c, select(2, ngx.req.get_post_args(2))", "true truncated"),
        // A body that was read is not discarded any more.
        ("ngx.req.discard_body(), ngx.req.get_body_data()", "nil a=1&b=2&c"),
        ("ngx.req.get_body_data(3)", "a=1"),
        ("require('ngx.req').add_header('X-Two', {'3', '4'}), #ngx.req.get_headers()['X-Two']", "nil 4"),
        ("require('ngx.req').add_header('User-Agent', {'a', 'b'}), ngx.req.get_headers()['User-Agent']", "nil b"),
        ("require('ngx.req').add_header('X-A', nil)", "error: bad 'value' argument: string or table expected, got nil"),
        ("require('ngx.req').add_header('X-A', {})", "error: bad 'value' argument: non-empty table expected"),
    ]);
}

#[test]
fn the_rest_answers_as_documented() {
    each(&[
        ("ngx.timer.at(1000, print)", "1"),
        ("ngx.timer.every(0, print)", "error: delay cannot be zero"),
        ("ngx.thread.kill(ngx.thread.spawn(ngx.sleep, 9))", "1"),
        ("ngx.flush('x')", "error: bad argument #1 to 'flush' (boolean expected, got string)"),
        ("ngx.log('x', 'y')", "error: bad argument #1 to 'log' (number expected, got string)"),
        ("ngx.log(99, 'y')", "error: bad argument #1 to 'log' (bad log level: 99)"),
        ("(function() ngx.ctx = 1 end)()", "error: ctx should be a table while getting a number"),
        ("ngx.re.match(nil, 'x')", "nil"),
        ("ngx.re.find(true, 'ru')", "2 3"),
        ("require('ngx.re').opt('jit_stack_size', 200 * 1024)", ""),
        ("require('ngx.re').opt('nonsense', 1)", "error: unrecognized option name"),
        ("require('ngx.semaphore').new():post(0)", "error: positive number required"),
        ("require('ngx.semaphore').wait(1, 1)", "error: not a semaphore instance"),
        (
            "(function() local t = require('resty.core.time') return math.abs(t.monotonic_time() * 1000 - t.monotonic_msec()) < 1000,
                t.monotonic_msec() % 1 end)()",
            "true 0",
        ),
    ]);
}

#[test]
fn sockets_have_what_the_documents_list() {
    each(&[
        ("ngx.socket.tcp():getsslsession()", "nil closed"),
        ("ngx.socket.tcp():getsslpointer()", "nil closed"),
        ("ngx.socket.tcp():settrustedstore(nil)", "nil closed"),
        ("ngx.socket.tcp():bind('nonsense')", "nil bad address"),
        ("ngx.socket.udp():bind('127.0.0.1')", "1"),
    ]);
}

/// Functions that a script of the named phases may call, whether or not there is something to do for them.
const IN_SET: &str = "ngx.req.set_method(ngx.HTTP_PUT) ngx.req.set_uri('/changed') ngx.req.set_uri_args('x=1')
    ngx.req.set_header('X-Set', 'set') return ngx.req.get_method() .. ngx.var.uri .. '?' .. ngx.var.args";

#[test]
fn a_set_script_changes_the_request() {
    let gw = Gateway::with(json!({"lua_locations": [{
        "location": "= /t",
        "set_by_lua": [
            {"var": "seen", "lua": IN_SET},
            {"var": "jump", "lua": "return (select(2, pcall(ngx.req.set_uri, '/x', true)):match('API disabled.*'))"},
            {"var": "body", "lua": "return (select(2, pcall(ngx.req.init_body)):match('request body.*'))"},
        ],
        "content_by_lua": "ngx.say(ngx.var.seen, ' ', ngx.req.get_headers()['x-set'], ' ', ngx.var.jump, ' ', ngx.var.body)",
        "body_filter_by_lua": "if ngx.arg[2] then ngx.req.set_uri_args('from=filter') end",
        "log_by_lua": "ngx.log(ngx.WARN, 'args in log: ', ngx.var.args)",
    }]}));
    let reply = gw.send("POST", "/t", &[], b"x");
    let expected = "PUT/changed?x=1 set API disabled in the context of set_by_lua* request body not read yet\n";
    assert_eq!((reply.status, reply.text().as_str()), (200, expected));
    gw.expect_log("args in log: from=filter");
}

/// Calls that need a client's request.
const OF_REQUESTS: [&str; 16] = [
    "ngx.var.uri",
    "ngx.header.x",
    "ngx.status",
    "ngx.headers_sent",
    "ngx.req.get_method()",
    "ngx.req.get_headers()",
    "ngx.req.get_uri_args()",
    "ngx.req.set_header('a', 'b')",
    "ngx.req.clear_header('a')",
    "ngx.resp.get_headers()",
    "ngx.req.read_body()",
    "ngx.req.socket()",
    "ngx.location.capture('/x')",
    "ngx.say('x')",
    "ngx.exec('/x')",
    "ngx.redirect('/x')",
];

#[test]
fn timers_and_the_start_of_a_worker_have_no_request() {
    let calls: String =
        OF_REQUESTS.iter().map(|call| format!("check([[{call}]], pcall(function() local _ = {call} end))\n")).collect();
    let all = format!(
        "local refused, wrong = 0, ''
         local function check(name, ok, err)
             if not ok and tostring(err):find('API disabled in the', 1, true) then refused = refused + 1 else
                 wrong = wrong .. ' ' .. name .. ' ' .. tostring(err) end
         end
         {calls}
         for _, write in ipairs({{function() ngx.var.mine = 1 end, function() ngx.header.x = 1 end, function() ngx.status = 200 end}}) do
             check('a write', pcall(write))
         end
         ngx.log(ngx.WARN, ngx.get_phase(), ' refused ', refused, wrong, ';')"
    );
    let none: Value = json!([
        {"location": "= /t", "set": {"mine": ""}, "content_by_lua": format!("ngx.timer.at(0, function() {all} end) ngx.say('x')")},
    ]);
    let gw = Gateway::with(json!({
        "lua_locations": none,
        "lua_init": {"init_by_lua": all, "init_worker_by_lua": all, "exit_worker_by_lua": "ngx.log(ngx.WARN, 'leaving in ', ngx.get_phase())"},
    }));
    let n = OF_REQUESTS.len() + 3;
    gw.expect_log(&format!("init refused {n};"));
    gw.expect_log(&format!("init_worker refused {n};"));
    gw.get("/t");
    gw.expect_log(&format!("timer refused {n};"));
    let mut gw = gw;
    gw.quit();
    gw.expect_log("leaving in exit_worker");
}

const TASKS: &str = r#"
    local loads = 0
    return {
        add = function(a, b) return a + b, "sum" end,
        echo = function(...) return ... end,
        raise = function() error("on purpose") end,
        give = function(what) return what == "function" and print or ngx.null end,
        where = function() return ngx.get_phase(), require("ngx.process").type(), pcall(function() return ngx.var.uri end) end,
        waits = function() return pcall(ngx.sleep, 1) end,
        timer = function() return ngx.timer.at(0, print) end,
        hash = function() return ngx.md5("hello"), ngx.encode_args({a = 1}), ngx.shared.dogs:get("seen") end,
        nested = function() return pcall(ngx.run_worker_thread, "pool", "tasks", "add", 1, 2) end,
        long = function(n) return ("x"):rep(n) end,
        until_told = function() while not ngx.shared.dogs:get("go") do end return "told" end,
    }
"#;

#[test]
fn threads_run_functions_of_modules() {
    let content = r##"
        ngx.shared.dogs:set("seen", "shared")
        local function show(...)
            local t = {}
            for i = 1, select("#", ...) do
                local v = select(i, ...)
                t[i] = type(v) == "table" and "{" .. tostring(v[1]) .. "," .. tostring(v.a and v.a.b) .. "}" or tostring(v)
            end
            ngx.say((table.concat(t, " "):gsub("\n.*", ""):gsub("^false .-tasks.lua", "false tasks.lua")))
        end
        local run = ngx.run_worker_thread
        show(run("pool", "tasks", "add", 1, 2))
        show(run("pool", "tasks", "echo", nil, true, "a\0b", { 7, a = { b = 8 } }))
        show(run("pool", "tasks", "raise"))
        show(run("pool", "tasks", "nothing"))
        show(run("pool", "no_such_module", "f"))
        show(run("pool", "tasks", "echo", print))
        local own = {}
        own.own = own
        show(run("pool", "tasks", "echo", own))
        local long = ("x"):rep(2^20)
        local shared = {}
        for i = 1, 64 do shared[i] = long end
        show(run("pool", "tasks", "echo", shared))
        show(run("pool", long, "echo", shared))
        show(run("pool", "tasks", "long", 2^26 + 1))
        show(run("pool", "tasks", "give", "function"))
        show(run("pool", "tasks", "where"))
        show(run("pool", "tasks", "waits"))
        show(run("pool", "tasks", "nested"))
        show(run("pool", "tasks", "timer"))
        show(run("pool", "tasks", "hash"))
        show(pcall(run))
    "##;
    let dir = crate::support::Dir::new();
    dir.write("conf/tasks.lua", TASKS);
    dir.configure(json!({
        "nginx_config": {"worker_processes": 1},
        "lua_shared_dict": {"dogs": "1m"},
        "lua_package_path": "$prefix/conf/?.lua;;",
        "lua_locations": [
            {"location": "= /t", "content_by_lua": content,
             "header_filter_by_lua": "ngx.header['X-Filter'] = select(2, pcall(ngx.run_worker_thread, 'p', 'tasks', 'add')):match('API.*')"},
            {"location": "= /wait", "content_by_lua": "ngx.say(ngx.run_worker_thread('p', 'tasks', 'until_told'))"},
            {"location": "= /go", "content_by_lua": "ngx.shared.dogs:set('go', true) ngx.say('going')"},
        ],
    }));
    let gw = Gateway::in_dir(dir);
    let reply = gw.get("/t");
    let expected = [
        "true 3 sum",
        "true nil true a\0b {7,8}",
        "false tasks.lua:6: on purpose",
        "false module 'tasks' has no function 'nothing'",
        ": module 'no_such_module' not found:",
        "false unsupported Lua type: function",
        "false tables stand within each other more than 100 times",
        "false too large: more than 67108864 bytes of strings",
        "false too large: more than 67108864 bytes of strings",
        "false too large: more than 67108864 bytes of strings",
        "false unsupported Lua type: function",
        "tasks.lua:8: API disabled in the current context",
        "boundary",
        "true false API disabled in the context of init_worker_by_lua*",
        "true nil no timers in a worker thread",
        "true 5d41402abc4b2a76b9719d911017c592 a=1 shared",
        "false bad argument #1 to 'run_worker_thread' (string expected, got no value)",
    ];
    let text = reply.text();
    for (line, expected) in text.lines().zip(expected) {
        assert!(line.ends_with(expected), "{line:?} is not {expected:?}");
    }
    assert_eq!(text.lines().count(), expected.len(), "{text}");
    assert!(text.contains("true init_worker worker false "), "{text}");
    assert_eq!(reply.header("x-filter"), Some("API disabled in the context of header_filter_by_lua*"));
    // The only worker serves others while a thread computes.
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| gw.get("/wait").text());
        assert_eq!(gw.get("/go").text(), "going\n");
        assert_eq!(waiting.join().expect("an answer"), "truetold\n");
    });
}

/// As many as there are threads, and as may wait for one.
const THREADS: usize = 4;
const MAX_WAITING: usize = 1024;

#[test]
fn tasks_that_wait_for_a_thread_are_bounded() {
    let tasks = "local ffi = require('ffi')
        ffi.cdef('int usleep(unsigned)')
        return {
            add = function(a, b) return a + b end,
            hold = function()
                ngx.shared.dogs:incr('held', 1, 0)
                while not ngx.shared.dogs:get('go') do ffi.C.usleep(1000) end
            end,
        }";
    let fill = "local threads, done = {}, 0
        local function run(name)
            local ok = ngx.run_worker_thread('p', 'tasks', name, 1, 2)
            if ok then done = done + 1 end
        end
        local n = tonumber(ngx.var.arg_n)
        for i = 1, n do threads[i] = assert(ngx.thread.spawn(run, ngx.var.arg_name)) end
        ngx.shared.dogs:incr('asked', n, 0)
        for i = 1, n do ngx.thread.wait(threads[i]) end
        ngx.print(done)";
    let dir = crate::support::Dir::new();
    dir.write("conf/tasks.lua", tasks);
    dir.configure(json!({
        "nginx_config": {"worker_processes": 1},
        "lua_shared_dict": {"dogs": "1m"},
        "lua_package_path": "$prefix/conf/?.lua;;",
        "lua_locations": [
            {"location": "= /fill", "content_by_lua": fill},
            {"location": "= /seen", "content_by_lua": "ngx.print(ngx.shared.dogs:get(ngx.var.arg_name) or 0)"},
            {"location": "= /one", "content_by_lua": "ngx.say(ngx.run_worker_thread('p', 'tasks', 'add', 1, 2))"},
            {"location": "= /go", "content_by_lua": "ngx.shared.dogs:set('go', true) ngx.say('going')"},
        ],
    }));
    let gw = Gateway::in_dir(dir);
    let seen = |name: &str, n: usize| {
        eventually(name, || (gw.get(&format!("/seen?name={name}")).text() == n.to_string()).then_some(()));
    };
    let fill = |name: &str, n: usize| gw.get(&format!("/fill?name={name}&n={n}")).text();
    std::thread::scope(|scope| {
        let holding = scope.spawn(|| fill("hold", THREADS));
        seen("held", THREADS);
        let waiting = [0; 2].map(|_| scope.spawn(|| fill("add", MAX_WAITING / 2)));
        seen("asked", THREADS + MAX_WAITING);
        assert_eq!(gw.get("/one").text(), "falsetoo many tasks wait for a thread\n");
        assert_eq!(gw.get("/go").text(), "going\n");
        assert_eq!(holding.join().expect("an answer"), THREADS.to_string());
        for one in waiting {
            assert_eq!(one.join().expect("an answer"), (MAX_WAITING / 2).to_string(), "all that waited have run");
        }
        assert_eq!(gw.get("/one").text(), "true3\n");
    });
}

#[test]
fn uploaded_functions_have_no_threads() {
    let gw = Gateway::start();
    let source = "return function() return 200, tostring(select(2, ngx.run_worker_thread('p', 'os', 'time'))) end";
    gw.admin_text("PUT", "/functions/hello", source, "text/plain");
    gw.put("/routes/1", json!({"uri": "/hello", "function_id": "hello"}));
    assert_eq!(gw.get("/hello").text(), "not open to functions");
}

#[test]
fn uploaded_functions_quote() {
    let gw = Gateway::start();
    let source = r#"return function()
        local meta = pcall(function() getmetatable(ndk.set_var).__index = nil end)
        ndk.set_var = ndk.set_var or nil
        return 200, ndk.set_var.set_quote_json_str("a") .. tostring(meta)
    end"#;
    gw.admin_text("PUT", "/functions/hello", source, "text/plain");
    gw.put("/routes/1", json!({"uri": "/hello", "function_id": "hello"}));
    assert_eq!(gw.get("/hello").text(), "\"a\"false");
}
