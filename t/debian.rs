//! Plain Lua libraries as Debian packs them, found where they lie: `apisix.extra_lua_path` is `/usr/share/lua/5.1`. Each scene is an
//! example of the library's own documentation, or close to one.

mod support;

use serde_json::{Value, json};

use support::{Dir, Gateway, Upstream};

/// Where Debian's packages put Lua modules and those in C.
fn paths() -> Value {
    let arch = std::env::consts::ARCH;
    json!({
        "extra_lua_path": "/usr/share/lua/5.1/?.lua;/usr/share/lua/5.1/?/init.lua",
        "extra_lua_cpath": format!("/usr/lib/{arch}-linux-gnu/lua/5.1/?.so"),
    })
}

/// What a location with this content answers.
#[track_caller]
fn says(lua: &str, expected: &str) {
    let locations = json!([{"location": "= /t", "content_by_lua": lua}]);
    let gw = Gateway::with(json!({"apisix": paths(), "lua_locations": locations}));
    let reply = gw.get("/t");
    assert_eq!((reply.status, reply.text().as_str()), (200, expected));
}

#[test]
fn penlight_maps_templates_lexes_and_reckons_dates() {
    says(
        r##"
        local function here(name)
            return debug.getinfo(require(name).new or require(name).map or require(name).split, "S").source
        end
        local List, OrderedMap, Date = require("pl.List"), require("pl.OrderedMap"), require("pl.Date")
        local data, template, lexer, sip = require("pl.data"), require("pl.template"), require("pl.lexer"), require("pl.sip")
        ngx.say(here("pl.tablex"))
        ngx.say(tostring(List({10, 20, 30}):map("*", 2):reverse()))
        local map = OrderedMap()
        map:set("z", 1) map:set("a", 2) map:set("m", 3)
        ngx.say(table.concat(map:keys(), ","))
        local read = data.read(require("pl.stringio").open("x,y\n1,2\n3,4\n"))
        ngx.say(table.concat(read:column_by_name("y"), "+"))
        ngx.say((template.substitute("# for i = 1,3 do\n<$(i)>\n# end\n", {}):gsub("\n", "")))
        local kinds = {}
        for kind in lexer.lua("local x = 'y' -- z", {space = true}) do kinds[#kinds + 1] = kind end
        ngx.say(table.concat(kinds, " "))
        local res = {}
        ngx.say(tostring(sip.match("$v{host}:$d{port}", "localhost:9080", res)), " ", res.host, " ", res.port)
        ngx.say(Date.Format("yyyy-mm-dd"):tostring(Date({year = 2024, month = 2, day = 28}):add({day = 1})))
        local pretty = require("pl.pretty")
        ngx.say(pretty.write({1, 2, k = {true}}, ""))
        "##,
        r##"@/usr/share/lua/5.1/pl/tablex.lua
{60,40,20}
z,a,m
2+4
<1><2><3>
keyword iden = string - - iden
true localhost 9080
2024-02-29
{1,2,k={true}}
"##,
    );
}

#[test]
fn luaunit_runs_a_suite_that_waits_fails_and_skips() {
    says(
        r#"
        local lu = require("luaunit")
        local Suite = {}
        function Suite:setUp() self.list = {1, 2, three = 3} end
        function Suite:test_equal() lu.assertEquals(self.list, {1, 2, three = 3}) end
        function Suite:test_not_equal() lu.assertEquals(self.list, {1, 2, three = 4}) end
        function Suite:test_error() lu.assertErrorMsgContains("boom", function() error("boom") end) end
        function Suite:test_skipped() lu.skip("not today") end
        function Suite:test_sleeps() ngx.sleep(0.001) lu.assertAlmostEquals(1, 1.0001, 0.001) end
        function Suite:test_breaks() local no = nil; return no.field end
        local runner = lu.LuaUnit.new()
        runner:setOutputType("nil")
        local failed = runner:runSuiteByInstances({{"Suite", Suite}})
        ngx.say(failed, " of ", runner.result.runCount, " failed")
        for _, test in ipairs(runner.result.allTests) do ngx.say(test.testName, " ", test.status) end
        "#,
        r#"2 of 5 failed
Suite.test_breaks ERROR
Suite.test_equal SUCCESS
Suite.test_error SUCCESS
Suite.test_not_equal FAIL
Suite.test_skipped SKIP
Suite.test_sleeps SUCCESS
"#,
    );
}

#[test]
fn inspect_shows_tables_that_hold_themselves() {
    says(
        r#"
        local inspect = require("inspect")
        ngx.say(debug.getinfo(inspect.inspect, "S").source)
        local nested = {a = {b = {c = {}}}, 1, "two"}
        nested.me = nested
        ngx.say(inspect(nested))
        ngx.say(inspect({a = {b = {}}}, {depth = 1, newline = "", indent = ""}))
        ngx.say(inspect({user = "u", password = "p"}, {newline = "", indent = "", process = function(item, path)
            if path[#path] ~= "password" then return item end
        end}))
        "#,
        r#"@/usr/share/lua/5.1/inspect.lua
<1>{ 1, "two",
  a = {
    b = {
      c = {}
    }
  },
  me = <table 1>
}
{a = {...}}
{user = "u"}
"#,
    );
}

#[test]
fn basexx_reads_what_it_writes() {
    says(
        r#"
        local basexx = require("basexx")
        for _, name in ipairs({"bit", "hex", "base32", "crockford", "base64", "url64", "z85"}) do
            local text = name == "z85" and "12345678" or "any carnal pleas?>"
            local encoded = basexx["to_" .. name](text)
            ngx.say(name, " ", #encoded > 40 and #encoded or encoded, " ", tostring(basexx["from_" .. name](encoded) == text))
        end
        ngx.say(tostring(basexx.from_base32("1")))
        "#,
        r#"bit 144 true
hex 616E79206361726E616C20706C6561733F3E true
base32 MFXHSIDDMFZG4YLMEBYGYZLBOM7T4=== true
crockford C5Q7J833C5S6WRBC41R6RSB1ECZKW true
base64 YW55IGNhcm5hbCBwbGVhcz8+ true
url64 YW55IGNhcm5hbCBwbGVhcz8- true
z85 f!$Kwh8WxM true
nil
"#,
    );
}

#[test]
fn dkjson_orders_keys_and_names_mistakes() {
    says(
        r#"
        local json = require("dkjson")
        local tbl = {animals = {"dog", "cat", "aardvark"}, instruments = {"violin", "trombone", "theremin"},
            bugs = json.null, trees = nil}
        ngx.say(json.encode(tbl, {indent = false, keyorder = {"animals", "instruments", "bugs"}}))
        local str = '{"numbers":[2, 3, -20.23e+2, -4], "currency": "\\u20AC"}'
        local obj, pos, err = json.decode(str, 1, nil)
        ngx.say(obj.currency, " ", #obj.numbers, " ", obj.numbers[3], " ", pos, " ", tostring(err))
        ngx.say(select(3, json.decode('{"a":', 1, nil)))
        local quick = json.use_lpeg()
        ngx.say(quick.using_lpeg and quick.decode(str).currency)
        "#,
        r#"{"animals":["dog","cat","aardvark"],"instruments":["violin","trombone","theremin"],"bugs":null}
€ 4 -2023 56 nil
unterminated object at line 1, column 1
€
"#,
    );
}

#[test]
fn argparse_reads_commands_and_suggests() {
    says(
        r#"
        local argparse = require("argparse")
        local parser = argparse("script", "An example."):command_target("command")
        local install = parser:command("install i")
        install:argument("rock"):args("+")
        install:option("-f --from", "Source.", "http://rocks"):count("?")
        install:flag("-v --verbose"):count("0-2"):target("verbosity")
        parser:command("remove"):argument("rock")
        local args = parser:parse({"i", "a", "b", "--from=bar", "-vv"})
        ngx.say(args.command, " ", table.concat(args.rock, "+"), " ", args.from, " ", args.verbosity)
        ngx.say(select(2, parser:pparse({"instal"})))
        ngx.say((parser:get_usage():gsub("%s+", " ")))
        "#,
        r#"install a+b bar 2
unknown command 'instal'
Did you mean 'install'?
Usage: script [-h] <command> ...
"#,
    );
}

#[test]
fn say_and_luassert_speak_and_spy() {
    says(
        r#"
        local say = require("say")
        say:set_namespace("fr")
        say:set("so_much_money", "Tant d'argent!")
        say:set_namespace("en")
        say:set("money", "I have %s dollars")
        ngx.say(say("money", {1000}), " ", say.fr.so_much_money)
        local assert = require("luassert")
        local spy, stub, match = require("luassert.spy"), require("luassert.stub"), require("luassert.match")
        assert.are.same({1, {2}}, {1, {2}})
        assert.has_error(function() error("wrong") end, "wrong")
        local s = spy.new(function(a) return a end)
        s("x") s("y")
        assert.spy(s).was.called(2)
        assert.spy(s).was_called_with(match.is_string())
        local t = {f = function() return "real" end}
        stub(t, "f").returns("stubbed")
        ngx.print(t.f(), " ")
        t.f:revert()
        ngx.say(t.f())
        local ok, err = pcall(assert.are.equal, 1, 2)
        ngx.say(tostring(ok), " ", (tostring(err):gsub("^.-: ", ""):gsub("%s+", " ")))
        "#,
        r#"I have 1000 dollars Tant d'argent!
stubbed real
false Expected objects to be equal. Passed in: (number) 2 Expected: (number) 1
"#,
    );
}

#[test]
fn binaryheap_sorts_and_updates() {
    says(
        r#"
        local binaryheap = require("binaryheap")
        local heap = binaryheap.minUnique()
        for name, at in pairs({late = 30, soon = 5, later = 60, now = 1}) do heap:insert(at, name) end
        heap:update("late", 2)
        heap:remove("later")
        local order = {}
        while heap:size() > 0 do order[#order + 1] = (heap:pop()) end
        ngx.say(table.concat(order, " "))
        local max = binaryheap.maxHeap()
        for _, n in ipairs({3, 1, 4, 1, 5, 9, 2, 6}) do max:insert(n) end
        local numbers = {}
        for i = 1, 8 do numbers[i] = max:pop() end
        ngx.say(table.concat(numbers, " "))
        "#,
        r#"now late soon
9 6 5 4 3 2 1 1
"#,
    );
}

#[test]
fn messagepack_packs_and_streams() {
    says(
        r#"
        local mp = require("MessagePack")
        local hex = function(s) return (s:gsub(".", function(c) return ("%02x"):format(c:byte()) end)) end
        ngx.say(hex(mp.pack({compact = true, schema = 0})):len(), " ", hex(mp.pack({1, 2.5, "x", false})))
        local back = mp.unpack(mp.pack({list = {1, 2, {deep = true}}, big = 2 ^ 40, min = -5, text = ("x"):rep(300)}))
        ngx.say(back.list[3].deep and #back.text, " ", back.big, " ", back.min)
        local at = {}
        for _, value in mp.unpacker(mp.pack("a") .. mp.pack(300) .. mp.pack({})) do at[#at + 1] = type(value) end
        ngx.say(table.concat(at, " "), " ", (select(2, pcall(mp.unpack, "\146\1")):gsub("^.-: ", "")))
        "#,
        r#"36 9401cb4004000000000000a178c2
300 1099511627776 -5
string number table missing bytes
"#,
    );
}

#[test]
fn markdown_becomes_html() {
    says(
        r##"
        local markdown = require("markdown")
        ngx.say(markdown("# Title\n\nSome *emphasis*, `code` & a [link](http://example.com/ \"t\").\n\n* one\n* two\n\n> quoted"))
        "##,
        r##"
<h1>Title</h1>

<p>Some <em>emphasis</em>, <code>code</code> &amp; a <a href="http://example.com/" title="t">link</a>.</p>

<ul>
    <li>one</li>
    <li>two</li>
</ul>

<blockquote>
    <p>quoted</p>
</blockquote>

"##,
    );
}

#[test]
fn fifo_is_filled_by_a_light_thread() {
    says(
        r#"
        local fifo = require("fifo")
        local q = fifo("a", "b")
        q:push("c")
        q:insert(2, "x")
        ngx.say(q:length(), " ", q:peek(), " ", q:remove(3))
        ngx.thread.spawn(function() ngx.sleep(0.001) q:push("late") end)
        q:setempty(function() return "nothing" end)
        local out = {}
        while q:peek() ~= "late" do out[#out + 1] = q:length() > 0 and q:pop() or nil ngx.sleep(0) end
        ngx.say(table.concat(out, " "), " ", q:pop(), " ", q:pop())
        "#,
        r#"4 a b
a x c late nothing
"#,
    );
}

#[test]
fn moses_chains_and_composes() {
    says(
        r#"
        local M = require("moses")
        ngx.say(M.count({1, 1, 2, 3, 3, 3, 2, 4, 3, 2}, 2))
        ngx.say(table.concat(M.flatten({1, {2, {3, {4}}}}), " "), " ", table.concat(M.uniq({1, 1, 2, 2, 3}), " "))
        local total = M.chain({1, 2, 3, 4, 5, 6}):filter(function(v) return v % 2 == 0 end):map(function(v) return v * 2 end):sum():value()
        ngx.say(total, " ", M.isEqual({1, {2}}, {1, {2}}) and "equal")
        local fact = M.memoize(function(n) return n end)
        ngx.say(M.compose(function(x) return x + 1 end, function(x) return x * 2 end)(5), " ", fact(7))
        "#,
        r#"3
1 2 3 4 1 2 3
24 equal
11 7
"#,
    );
}

#[test]
fn uri_normalizes_and_resolves() {
    says(
        r#"
        local URI = require("uri")
        local uri = assert(URI:new("HTTP://Example.COM:80/a/%7Euser/../b?q=1#f"))
        ngx.say(tostring(uri), " ", uri:scheme(), " ", uri:host(), " ", uri:port(), " ", uri:path(), " ", uri:query())
        ngx.say(tostring(URI:new("../x", "http://h/a/b/c")), " ", tostring(URI:new("urn:ISBN:0-395-36341-1")))
        ngx.say(tostring(URI:new("http://h:port/")), " ", select(2, URI:new("http://h:port/")))
        "#,
        r#"http://example.com/a/b?q=1#f http example.com 80 /a/b q=1
http://h/a/x urn:isbn:0395363411
nil invalid host value 'h:port'
"#,
    );
}

#[test]
fn luasocket_takes_urls_apart_and_pumps() {
    says(
        r#"
        local url = require("socket.url")
        local parsed = url.parse("http://user:pw@www.example.com:8080/cgilua/index.lua;p?a=2#there")
        ngx.say(parsed.host, " ", parsed.port, " ", parsed.path, " ", parsed.params, " ", parsed.query, " ", parsed.fragment)
        ngx.say(url.build(parsed))
        for _, relative in ipairs({"g", "./g", "/g", "//g", "?y", "../../g", "g;x=1/../y"}) do
            ngx.print(url.absolute("http://a/b/c/d;p?q", relative), " ")
        end
        ngx.say(url.escape("a b/c"), " ", url.unescape("%41+b"), " ", table.concat(url.parse_path("/a%20b/c"), "|"))
        local ltn12 = require("ltn12")
        local out = {}
        ltn12.pump.all(ltn12.source.string(("x"):rep(5000)), (ltn12.sink.table(out)))
        ngx.say(#out, " ", #table.concat(out))
        "#,
        r#"www.example.com 8080 /cgilua/index.lua p a=2 there
http://user:pw@www.example.com:8080/cgilua/index.lua;p?a=2#there
http://a/b/c/g http://a/b/c/g http://a/g http://g http://a/b/c/d;p?y http://a/g http://a/b/c/y a%20b%2fc A+b a b|c
3 5000
"#,
    );
}

#[test]
fn lpeg_and_re_match_grammars() {
    says(
        r#"
        local re = require("re")
        ngx.say(re.gsub("hello World", "[A-Z]", "*"), " ", (re.find("the number 423 is odd", "[0-9]+")))
        local grammar = re.compile([[
            list <- {| item (',' item)* |} !.
            item <- %s* { [a-z]+ } %s*
        ]])
        ngx.say(table.concat(grammar:match("one, two ,three"), "|"), " ", tostring(grammar:match("one,,")))
        local balanced = re.compile("balanced <- '(' ([^()] / balanced)* ')'")
        ngx.say(balanced:match("(a(b)c)"), " ", tostring(balanced:match("(a(b")))
        "#,
        r#"hello *orld 12
one|two|three nil
8 nil
"#,
    );
}

#[test]
fn lpeg_patterns_know_addresses() {
    says(
        r#"
        local lpeg = require("lpeg")
        local EOF = lpeg.P(-1)
        local uri = require("lpeg_patterns.uri").uri * EOF
        local parsed = uri:match("https://user@example.com:8443/p/a?q=1#f")
        ngx.say(parsed.scheme, " ", parsed.host, " ", parsed.port, " ", parsed.path, " ", parsed.query, " ", parsed.fragment)
        local v4 = require("lpeg_patterns.IPv4").IPv4address * EOF
        ngx.say(tostring(v4:match("192.168.0.1")), " ", tostring(v4:match("192.168.0.256")))
        local email = require("lpeg_patterns.email").mailbox * EOF
        ngx.say(tostring(email:match("not mail")))
        "#,
        r#"https example.com 8443 /p/a q=1 f
192.168.0.1 nil
nil
"#,
    );
}

#[test]
fn what_is_built_into_the_gateway_is_not_taken_from_there() {
    let dir = Dir::new();
    std::fs::create_dir_all(dir.join("shared/ngx")).expect("a directory");
    dir.write("shared/ngx/errlog.lua", "require('ffi').cdef('int ngx_of_nginx(ngx_http_request_t *r)')");
    dir.write("shared/inspect.lua", "return function(what) return 'own ' .. what end");
    let path = format!("{}/?.lua", dir.join("shared").display());
    dir.configure(json!({"apisix": {"extra_lua_path": path}}));
    let gw = Gateway::in_dir(dir);
    let up = Upstream::echo();
    let function = "return function()
        ngx.req.set_header('X-Inspect', require('inspect')('copy') .. ' ' .. type(require('ngx.errlog').raw_log))
    end";
    gw.route("1", "/t", &up, json!({"serverless-pre-function": {"functions": [function]}}));
    assert_eq!(gw.get("/t").status, 200);
    assert_eq!(up.last().header("x-inspect"), Some("own copy function"));
    assert!(!gw.log().contains("failed to load plugin"), "{}", gw.log());
}
