//! Uploaded functions as a product: their env, bounds, logs, metrics, revisions, canaries, schedules and dry runs, on the real binary.

mod support;

use std::collections::HashSet;

use serde_json::{Value, json};
use support::{Client, Dir, Gateway, Reply, Upstream, eventually, get, peers::Etcd, request};

const KEYRING: &str = "edd1c9f0985e76a2";

/// A gateway with one worker that answers `/hello` by the function `hello`.
fn with(function: Value) -> Gateway {
    with_settings(function, json!({}))
}

fn with_settings(function: Value, mut settings: Value) -> Gateway {
    settings["nginx_config"] = json!({"worker_processes": 1});
    let gw = Gateway::with(settings);
    gw.put("/functions/hello", function);
    gw.put("/routes/hello", json!({"uri": "/hello", "function_id": "hello"}));
    gw
}

fn source(text: &str) -> Value {
    json!({"source": text})
}

#[track_caller]
fn refused(reply: &Reply, status: u16, text: &str) {
    assert!(reply.status == status && reply.text().contains(text), "{} {}", reply.status, reply.text());
}

/// The function's lines as the Admin API shows them.
fn lines(gw: &Gateway, id: &str) -> Vec<String> {
    let shown = gw.admin("GET", &format!("/functions/{id}/logs?lines=500"), ()).json();
    let list = shown["list"].as_array().cloned().unwrap_or_default();
    list.iter().map(|line| format!("{} {}", line["level"], line["message"])).collect()
}

#[track_caller]
fn expect_line(gw: &Gateway, text: &str) {
    eventually(&format!("{text:?} among the function's lines"), || {
        lines(gw, "hello").iter().any(|line| line.contains(text)).then_some(())
    });
}

mod env {
    use super::*;

    const SHOW: &str = "return function()
        local names = {}
        for name, value in pairs(env) do names[#names + 1] = name .. '=' .. value end
        table.sort(names)
        return 200, table.concat(names, ' ') .. ' ' .. tostring(env.none)
    end";

    #[test]
    fn names_have_their_texts_and_references_are_resolved() {
        let env = json!({"PLAIN": "a b", "FROM": "$env://PATH", "GONE": "$env://MOONGATE_HAS_NO_SUCH_NAME"});
        let gw = with(json!({"source": "return function() return 200,
            {env.PLAIN, env.FROM, tostring(env.GONE), tostring(pcall(function() env.X = 1 end))} end", "env": env}));
        let path = std::env::var("PATH").expect("a path");
        assert_eq!(gw.get("/hello").json(), json!(["a b", path, "nil", "false"]));
        expect_line(&gw, "failed to fetch secret value of env.GONE");
        gw.put("/functions/hello", json!({"source": SHOW, "env": {"A": "1", "B": "2"}}));
        assert_eq!(gw.get("/hello").text(), "A=1 B=2 nil");
    }

    #[test]
    fn a_manager_of_secrets_is_asked_and_stays_closed_to_the_function() {
        let vault = Upstream::answering(|seen| {
            let opened = seen.header("x-vault-token") == Some("root");
            let body =
                if opened { json!({"data": {"token": "opened"}}) } else { json!({"errors": ["no"]}) }.to_string();
            format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())
        });
        let gw = Gateway::with(json!({"nginx_config": {"worker_processes": 1}}));
        let uri = format!("http://{}", vault.addr());
        gw.put("/secrets/vault/1", json!({"uri": uri, "prefix": "kv/apisix", "token": "root"}));
        let text = "return function()
            return 200, {env.KEY, tostring(env.NONE), tostring((pcall(require, 'apisix.secret.vault')))}
        end";
        let env = json!({"KEY": "$secret://vault/1/gateway/token", "NONE": "$secret://nobody/1/a/b"});
        gw.put("/functions/hello", json!({"source": text, "env": env}));
        gw.put("/routes/hello", json!({"uri": "/hello", "function_id": "hello"}));
        for _ in 0..4 {
            assert_eq!(gw.get("/hello").json(), json!(["opened", "nil", "false"]));
        }
        assert!(vault.seen().len() <= 2, "once for each VM");
        expect_line(&gw, "failed to fetch secret value of env.NONE");
        gw.put("/functions/hello", json!({"source": text, "env": env, "trusted": true}));
        assert_eq!(gw.get("/hello").json(), json!(["opened", "nil", "true"]));
    }

    #[test]
    fn values_are_encrypted_at_rest_and_readable_in_the_api() {
        let etcd = Etcd::start();
        let settings = json!({
            "apisix": {"data_encryption": {"enable_encrypt_fields": true, "keyring": [KEYRING]}},
            "deployment": {"role": "traditional", "role_traditional": {"config_provider": "etcd"},
                "etcd": {"host": [etcd.url()], "prefix": "/apisix", "timeout": 5}},
        });
        let gw = with_settings(json!({"source": SHOW, "env": {"A": "bar", "B": "$env://B"}}), settings);
        let stored = || etcd.get("/apisix/functions/hello");
        assert!(stored().contains("77+NmbYqNfN+oLm0aX5akg==") && !stored().contains("\"bar\""), "{}", stored());
        assert!(stored().contains("$env://B"), "a reference stays readable");
        assert_eq!(gw.admin("GET", "/functions/hello", ()).json()["value"]["env"]["A"], "bar");
        // A PATCH of something else leaves it as it was.
        assert_eq!(gw.admin("PATCH", "/functions/hello", json!({"env": {"B": null}})).status, 200);
        assert!(stored().contains("77+NmbYqNfN+oLm0aX5akg=="), "{}", stored());
        assert_eq!(gw.get("/hello").text(), "A=bar nil");
    }

    #[test]
    fn what_is_no_name_or_text_is_refused_and_so_is_one_too_many() {
        let gw = Gateway::start();
        let put = |env: Value| gw.admin("PUT", "/functions/f", json!({"source": "return", "env": env}));
        refused(&put(json!({"a-b": "x"})), 400, "invalid configuration: property \\\"env\\\" validation failed");
        refused(&put(json!({"A": 1})), 400, "wrong type: expected string, got number");
        let many = |n: usize| Value::Object((0..n).map(|i| (format!("N{i}"), "x".into())).collect());
        assert_eq!(put(many(64)).status, 201);
        refused(&put(many(65)), 400, "property \\\"env\\\" validation failed");
        let name = |n: usize| json!({"A".repeat(n): "x"});
        assert_eq!(put(name(64)).status, 200);
        refused(&put(name(65)), 400, "property \\\"env\\\" validation failed");
        let long = |n: usize| json!({"A": "x".repeat(n)});
        assert_eq!(put(long(8192)).status, 200);
        refused(&put(long(8193)), 400, "too long");
    }

    #[test]
    fn the_environment_of_the_process_is_closed_to_the_function_itself() {
        let gw = with(source(
            "return function()
                local tried = {}
                for _, name in ipairs({'apisix.core.env', 'apisix.secret', 'apisix.secret.vault'}) do
                    tried[#tried + 1] = tostring((pcall(require, name)))
                end
                local open = require('apisix.core').env
                tried[#tried + 1] = tostring(type(open) == 'table' and open.fetch_by_uri or nil)
                return 200, tried
            end",
        ));
        assert_eq!(gw.get("/hello").json(), json!(["false", "false", "false", "nil"]));
    }
}

mod limits {
    use super::*;

    #[test]
    fn a_call_that_waits_too_long_is_a_504_and_the_next_one_is_served() {
        let gw = with(json!({"limits": {"timeout_ms": 100}, "source":
            "return function(ctx) if ctx.var.arg_wait then ngx.sleep(60) end return 200, 'in time' end"}));
        assert_eq!(gw.get("/hello?wait=1").status, 504);
        expect_line(&gw, "function hello took longer than limits.timeout_ms (100) allows");
        assert_eq!(gw.get("/hello").text(), "in time");
    }

    #[test]
    fn a_call_that_computes_too_long_is_cut_off() {
        let spin = "return function() while true do end end";
        let gw = with(json!({"source": spin, "limits": {"cpu_ms": 50}}));
        assert_eq!(gw.get("/hello").status, 500);
        expect_line(&gw, "the script ran longer than limits.cpu_ms of function hello allows without waiting");
        // Where its time is over first, that is what it ends by.
        gw.put("/functions/hello", json!({"source": spin, "limits": {"cpu_ms": 500, "timeout_ms": 100}}));
        assert_eq!(gw.get("/hello").status, 504);
    }

    #[test]
    fn a_body_is_taken_up_to_the_bound_and_refused_past_it() {
        let gw = with(json!({"limits": {"max_body": 10}, "source":
            "return function() ngx.req.read_body() return 200, tostring(ngx.req.get_body_data()) end"}));
        assert_eq!(gw.send("POST", "/hello", &[], b"0123456789").text(), "0123456789");
        let long = gw.send("POST", "/hello", &[], b"0123456789a");
        assert_eq!(long.status, 413, "{}", long.text());
        let chunked = |body: &str| {
            let mut client = Client::connect(&gw.proxy());
            client.send("POST", "/hello", &[("Transfer-Encoding", "chunked")], b"");
            client.write(format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len()).as_bytes()).expect("is sent");
            client.reply("POST")
        };
        assert_eq!(chunked("0123456789").text(), "0123456789");
        assert_eq!(chunked("0123456789a").status, 413);
    }

    #[test]
    fn a_function_that_takes_too_much_memory_fails_and_its_vm_is_replaced() {
        // What it keeps would be there for the next call, if its VM were.
        let gw = with(json!({"limits": {"memory_mb": 8}, "source":
            "local kept = {}
             return function(ctx)
                local n = tonumber(ctx.var.arg_mb)
                for i = 1, n do kept[#kept + 1] = string.rep(string.char(64 + i % 26), 1048576) .. #kept end
                return 200, tostring(#kept)
             end"}));
        // Two VMs take turns.
        assert_eq!([gw.get("/hello?mb=4").text(), gw.get("/hello?mb=4").text()], ["4", "4"]);
        for _ in 0..2 {
            assert_eq!(gw.get("/hello?mb=20").status, 500);
        }
        expect_line(&gw, "function hello took more memory than limits.memory_mb (8) allows");
        assert_eq!([gw.get("/hello?mb=1").text(), gw.get("/hello?mb=1").text()], ["1", "1"], "both are new");
    }

    #[test]
    fn a_call_that_takes_ever_more_memory_is_cut_off() {
        let grow = "return function() local t = {} while true do t[#t + 1] = {#t} end end";
        let gw = with(json!({"limits": {"memory_mb": 8}, "source": grow}));
        assert_eq!(gw.get("/hello").status, 500);
        expect_line(&gw, "the VM holds more memory than limits.memory_mb of function hello allows");
    }

    #[test]
    fn one_call_of_a_library_cannot_take_all_memory() {
        let gw = with(json!({"limits": {"memory_mb": 8}, "source":
            "return function()
                local long, list = ('x'):rep(1048576), {}
                for i = 1, 1000 do list[i] = long end
                local function why(f, ...) return (select(2, pcall(f, ...))) end
                return 200, {
                    why(string.rep, 'x', 1e12), #('ab'):rep(3, '-'), #(5 .. ''):rep(2),
                    why(table.concat, list), table.concat({1, 'b'}, '-'), table.concat({1, 2, 3}, ',', 2, 3),
                    (pcall(table.concat, {1, {}})), (pcall(table.concat, {1}, '', 1, 2)),
                    why(require('table.new'), 1e8, 0), why(table.new, -1e9, 6e7), why(table.new, 0/0, 6e7),
                    type(require('table.new')(2, 2)), type(table.new(-1, 1)),
                    why(string.format, ('%s'):rep(200), unpack(list, 1, 200)), ('%s-%d'):format('a', 7),
                    why(ngx.re.gsub, ('x'):rep(1000), 'x', long, 'jo'),
                    (pcall(table.concat, {setmetatable({}, {__tostring = function() return 'x' end})})),
                }
             end"}));
        let text = |of: &str| format!("{of}: the result is larger than limits.memory_mb allows");
        assert_eq!(
            gw.get("/hello").json(),
            json!([
                text("string.rep"),
                8,
                2,
                text("table.concat"),
                "1-b",
                "2,3",
                false,
                false,
                text("table.new"),
                text("table.new"),
                text("table.new"),
                "table",
                "table",
                text("string.format"),
                "a-7",
                format!("lua/moongate/re.lua:336: {}", text("table.concat")),
                false
            ])
        );
    }

    #[test]
    fn garbage_that_can_be_collected_is_no_offence() {
        let gw = with(json!({"limits": {"memory_mb": 8}, "source":
            "return function()
                local n = 0
                for i = 1, 40 do
                    n = n + #(string.rep(string.char(64 + i % 26), 1048576) .. i)
                    ngx.sleep(0)
                end
                return 200, tostring(n > 0)
             end"}));
        assert_eq!(gw.get("/hello").text(), "true");
    }
}

mod trust {
    use super::*;

    const OUT: &str = "return function()
        return 200, {type(io.open), type(require('ffi').cast), type(debug.getregistry), type(os.getenv('PATH'))}
    end";

    #[test]
    fn a_trusted_function_has_what_plugins_have_and_others_do_not() {
        let gw = with(json!({"source": OUT, "trusted": true}));
        assert_eq!(gw.get("/hello").json(), json!(["function", "function", "function", "string"]));
        gw.put("/functions/hello", json!({"source": OUT}));
        assert_eq!(gw.get("/hello").status, 500);
        let vms = get(&gw.control(), "/v1/lua").text();
        assert!(vms.contains("\"trusted_functions\"") && vms.contains("\"functions\""), "{vms}");
    }

    #[test]
    fn the_configuration_may_forbid_trust() {
        let gw = Gateway::with(json!({"lua": {"trusted_functions": false}}));
        let trusted = json!({"source": OUT, "trusted": true});
        let text = "lua.trusted_functions of config.yaml allows no function without a sandbox";
        refused(&gw.admin("PUT", "/functions/f", trusted.clone()), 400, text);
        refused(&gw.admin("POST", "/functions", trusted.clone()), 400, text);
        refused(&gw.admin("POST", "/functions/f/test", trusted.clone()), 400, text);
        refused(
            &gw.admin("POST", "/configs/validate", json!({"functions": [{"id": "f", "source": OUT, "trusted": true}]})),
            400,
            text,
        );
        gw.put("/functions/f", json!({"source": "return 200"}));
        refused(&gw.admin("PATCH", "/functions/f", json!({"trusted": true})), 400, text);
        // Who writes past the Admin API does not get by, either.
        let dir = Dir::new();
        dir.configure(json!({
            "deployment": {"role": "data_plane", "role_data_plane": {"config_provider": "yaml"}},
            "lua": {"trusted_functions": false},
        }));
        let routes = json!([{"id": 1, "uri": "/f", "function_id": "f"}]);
        let config = json!({"functions": [{"id": "f", "source": OUT, "trusted": true}], "routes": routes});
        dir.write("conf/apisix.yaml", format!("{config}\n#END\n"));
        let gw = Gateway::in_dir(dir);
        assert_eq!(gw.get("/f").status, 500);
        gw.expect_log(text);
    }

    /// One function does its worst to what libraries show, the other is asked whether it notices.
    #[test]
    fn what_a_function_changes_of_a_library_is_its_own() {
        let worst = "
            local evil = function() return 'evil' end
            local function spoil(t) for name, f in pairs(t) do if type(f) == 'function' then t[name] = evil end end end
            local core, cjson, shared = require('apisix.core'), require('cjson'), ngx.shared.limits
            local mt = getmetatable(ngx.shared.limits).__index
            local instance = getmetatable(require('resty.http').new())
            mt.get = evil
            shared.get, shared.incr = evil, evil
            if type(instance.__index) == 'table' then spoil(instance.__index) end
            _G.tostring = evil
            pcall(function() cjson.array_mt.__index = evil end)
            pcall(rawset, cjson.array_mt, '__tostring', evil)
            pcall(table.insert, cjson.array_mt, evil)
            pcall(table.clear, cjson.array_mt)
            pcall(setmetatable, cjson.array_mt, {__index = evil})
            for _, name in ipairs({'resty.http', 'cjson.safe', 'ngx.re', 'resty.string', 'string', 'table', 'math', 'pl.stringx'}) do
                spoil(require(name))
            end
            for _, t in ipairs({cjson, core, core.json, core.string, core.table, core.request, core.log, core.utils, ngx, ngx.req,
                ngx.resp, ngx.re, ngx.socket, ngx.timer, ngx.location, string, table, math, coroutine, os, bit}) do
                spoil(t)
            end
            local globals = getmetatable(_G)
            if globals then globals.__index = evil end
            return function() return 200, ngx.md5('x') .. string.format('y') .. cjson.encode({}) .. core.json.encode({}) end";
        let checks = "
            local core, cjson, http = require('apisix.core'), require('cjson'), require('resty.http')
            return function()
                ngx.shared.limits:set('k', 7)
                ngx.header['X-A'] = 'b'
                ngx.status = 201
                ngx.ctx.x = 1
                ngx.say(table.concat({ngx.md5('x'), string.format('%d', 3), ('%d'):format(4), cjson.encode({1}), core.json.encode({2}),
                    cjson.encode(setmetatable({}, cjson.array_mt)), core.string.has_prefix('ab', 'a') and 'yes' or 'no',
                    tostring(ngx.shared.limits:get('k')), tostring(cjson.array_mt.__index) .. #cjson.array_mt, type(http.new().connect), tostring(ngx.ctx.x),
                    ngx.re.match('abc', 'b')[0], type(require('resty.string').to_hex('a')), ngx.var.uri, math.floor(1.5)}, ' '))
            end";
        let gw = Gateway::with(json!({
            "nginx_config": {"worker_processes": 1, "http": {"custom_lua_shared_dict": {"limits": "1m"}}},
        }));
        for (id, text) in [("worst", worst), ("checks", checks)] {
            gw.put(&format!("/functions/{id}"), source(text));
            gw.put(&format!("/routes/{id}"), json!({"uri": format!("/{id}"), "function_id": id}));
        }
        let expected = "9dd4e461268c8034f5c8564e155c67a6 3 4 [1] [2] [] yes 7 nil0 function 1 b string /checks 1\n";
        // In either of the VMs, before and after.
        for _ in 0..4 {
            let checked = gw.get("/checks");
            assert_eq!((checked.status, checked.text().as_str()), (201, expected));
            assert_eq!(checked.header("x-a"), Some("b"));
            let spoilt = gw.get("/worst");
            assert_eq!((spoilt.status, spoilt.text().as_str()), (200, "evilevilevilevil"), "{}", gw.log());
        }
    }
}

mod observed {
    use super::*;

    #[test]
    fn the_last_lines_of_a_function_are_shown() {
        let gw = with_settings(
            source(
                "return function(ctx)
                print('printed ', 1)
                ngx.log(ngx.ERR, 'logged')
                ngx.timer.at(0, function() ngx.log(ngx.WARN, 'from a timer') end)
                if ctx.var.arg_fail then local x = nil + 1 end
                return 200
            end",
            ),
            json!({}),
        );
        assert_eq!(gw.get("/hello?fail=1").status, 500);
        expect_line(&gw, "from a timer");
        let all = lines(&gw, "hello").join("\n");
        let holds =
            |parts: [&str; 2]| lines(&gw, "hello").iter().any(|line| parts.iter().all(|part| line.contains(part)));
        for parts in [["\"notice\" \"[lua] hello.lua:2: ", "printed 1"], ["\"error\" \"[lua] hello.lua:3: ", "logged"]]
        {
            assert!(holds(parts), "{parts:?} in {all}");
        }
        assert!(all.contains("functions/hello.lua:5:"), "{all}");
        let shown = gw.admin("GET", "/functions/hello/logs?lines=1", ()).json();
        assert_eq!(shown["list"].as_array().map(Vec::len), Some(1));
        assert!(shown["list"][0]["time"].as_f64().is_some_and(|time| time > 1e9) && shown["total"].as_u64() > Some(2));
        for wrong in ["0", "501", "x"] {
            let reply = gw.admin("GET", &format!("/functions/hello/logs?lines={wrong}"), ());
            refused(&reply, 400, "invalid argument lines: should be a number from 1 to 500");
        }
        refused(&gw.admin("GET", "/functions/other/logs", ()), 404, "Key not found");
    }

    #[test]
    fn calls_errors_and_times_are_on_the_metrics_page() {
        let gw = with(source("return function(ctx) return tonumber(ctx.var.arg_status) end"));
        for status in [200, 404, 500] {
            assert_eq!(gw.get(&format!("/hello?status={status}")).status, status);
        }
        let page = get(&gw.prometheus(), "/apisix/prometheus/metrics").text();
        for line in [
            "apisix_function_calls_total{function=\"hello\",trigger=\"request\"} 3",
            "apisix_function_errors_total{function=\"hello\",trigger=\"request\"} 1",
            "apisix_function_latency_count{function=\"hello\",trigger=\"request\"} 3",
            "# TYPE apisix_function_latency histogram",
        ] {
            assert!(page.contains(line), "{line} in {page}");
        }
        assert_eq!(gw.admin("DELETE", "/functions/hello?force=true", ()).status, 200);
        eventually("a deleted function is forgotten", || {
            let page = get(&gw.prometheus(), "/apisix/prometheus/metrics").text();
            (!page.contains("function=\"hello\"")).then_some(())
        });
    }
}

mod revisions {
    use super::*;

    fn says(text: &str) -> Value {
        source(&format!("return function() return 200, '{text}' end"))
    }

    /// Numbers, the live one and the canary.
    fn known(gw: &Gateway) -> (Vec<u64>, Option<u64>, Option<u64>) {
        let shown = gw.admin("GET", "/functions/hello/revisions", ()).json();
        let list = shown["list"].as_array().cloned().expect("a list");
        assert_eq!(shown["total"], list.len());
        let number = |one: &Value| one["revision"].as_u64().expect("a number");
        let that = |key: &str| list.iter().find(|one| one[key] == true).map(number);
        (list.iter().map(number).collect(), that("live"), that("canary"))
    }

    #[test]
    fn each_new_source_is_one_and_one_can_be_gone_back_to() {
        let gw = with(says("one"));
        assert_eq!(known(&gw), (vec![1], Some(1), None));
        gw.put("/functions/hello", json!({"source": says("one")["source"], "desc": "the same"}));
        assert_eq!(known(&gw).0, [1], "no new source");
        gw.put("/functions/hello", says("two"));
        assert_eq!(gw.admin("PATCH", "/functions/hello", says("three")).status, 200);
        assert_eq!(known(&gw), (vec![1, 2, 3], Some(3), None));
        assert_eq!(gw.admin("GET", "/functions/hello/revisions/2", ()).json()["source"], says("two")["source"]);
        assert_eq!(gw.admin("POST", "/functions/hello/rollback", ()).status, 200);
        assert_eq!((gw.get("/hello").text(), known(&gw).1), ("two".into(), Some(2)));
        assert_eq!(gw.admin("POST", "/functions/hello/rollback", json!({"revision": 3})).status, 200);
        assert_eq!((gw.get("/hello").text(), known(&gw).1), ("three".into(), Some(3)));
        let rollback = |body: Value| gw.admin("POST", "/functions/hello/rollback", body);
        refused(&rollback(json!({"revision": 9})), 404, "failed to fetch revision info by revision [9]");
        refused(&rollback(json!({"revision": "x"})), 400, "wrong type: expected integer");
        assert_eq!(rollback(json!({"revision": 1})).status, 200);
        refused(&rollback(Value::Null), 400, "function [hello] has no revision before 1");
        gw.put("/functions/hello", says("four"));
        assert_eq!(known(&gw), (vec![1, 2, 3, 4], Some(4), None), "numbers are not used again");
        refused(&gw.admin("GET", "/functions/hello/revisions/9", ()), 404, "Key not found");
        refused(&gw.admin("DELETE", "/functions/hello/revisions", ()), 405, "not supported `DELETE` method");
    }

    #[test]
    fn only_the_last_twenty_are_kept_and_none_outlives_its_function() {
        let gw = with(says("0"));
        assert_eq!(gw.admin("POST", "/functions/hello/revisions", says("candidate")).status, 201);
        assert_eq!(gw.admin("PATCH", "/functions/hello", json!({"canary": {"revision": 2, "weight": 0}})).status, 200);
        for n in 1..=25 {
            assert_eq!(gw.admin("PATCH", "/functions/hello", says(&n.to_string())).status, 200);
        }
        let (numbers, live, canary) = known(&gw);
        assert_eq!((numbers.len(), live, canary), (20, Some(27), Some(2)), "the canary's stays");
        assert_eq!(gw.admin("DELETE", "/functions/hello?force=true", ()).status, 200);
        gw.put("/functions/hello", says("new"));
        assert_eq!(known(&gw).0, [1]);
    }

    #[test]
    fn a_canary_gets_its_share_and_is_promoted() {
        let gw = with(says("old"));
        let added = gw.admin("POST", "/functions/hello/revisions", says("new"));
        assert_eq!((added.status, added.json()), (201, json!({"revision": 2})));
        assert_eq!(gw.get("/hello").text(), "old", "nobody is served by it yet");
        let canary = |weight: u64| {
            let reply = gw.admin("PATCH", "/functions/hello", json!({"canary": {"revision": 2, "weight": weight}}));
            assert_eq!(reply.status, 200, "{}", reply.text());
        };
        let new = || (0..200).filter(|_| gw.get("/hello").text() == "new").count();
        canary(50);
        // One in 10^20 that it is neither.
        assert!((20..180).contains(&new()));
        canary(0);
        assert_eq!(new(), 0);
        canary(100);
        assert_eq!((new(), known(&gw)), (200, (vec![1, 2], Some(1), Some(2))));
        let shown = gw.admin("GET", "/functions/hello", ()).json()["value"].clone();
        assert_eq!(shown["canary"], json!({"revision": 2, "weight": 100}), "its source is not the reader's");
        assert_eq!(gw.admin("POST", "/functions/hello/promote", ()).status, 200);
        assert_eq!((gw.get("/hello").text(), known(&gw)), ("new".into(), (vec![1, 2], Some(2), None)));
        refused(&gw.admin("POST", "/functions/hello/promote", ()), 400, "function [hello] has no canary");
        let wrong = |canary: Value| gw.admin("PATCH", "/functions/hello", json!({"canary": canary}));
        refused(&wrong(json!({"revision": 9, "weight": 1})), 400, "failed to fetch revision info by revision [9]");
        refused(&wrong(json!({"weight": 1})), 400, "property \\\"revision\\\" is required");
        refused(&wrong(json!({"revision": 1, "weight": 101})), 400, "expected 101 to be at most 100");
        refused(&wrong(json!({"revision": 1, "weight": 1, "min_calls": 0})), 400, "min_calls");
    }

    #[test]
    fn a_revision_that_does_not_compile_is_none() {
        let gw = with(says("old"));
        let reply = gw.admin_text("POST", "/functions/hello/revisions", "return function( oops", "text/plain");
        refused(&reply, 400, "functions/hello.lua:1:");
        assert_eq!(known(&gw).0, [1]);
    }

    #[test]
    fn a_canary_that_fails_too_often_is_taken_back_on_every_node() {
        let etcd = Etcd::start();
        let settings = json!({"deployment": {"role": "traditional", "role_traditional": {"config_provider": "etcd"},
            "etcd": {"host": [etcd.url()], "prefix": "/apisix", "timeout": 5}}});
        let gw = with_settings(says("old"), settings.clone());
        let other = Gateway::with(settings);
        let bad = source("return function() error('broken canary') end");
        assert_eq!(gw.admin("POST", "/functions/hello/revisions", bad).status, 201);
        let canary = json!({"revision": 2, "weight": 100, "min_calls": 5, "max_error_rate": 0.5});
        assert_eq!(gw.admin("PATCH", "/functions/hello", json!({"canary": canary})).status, 200);
        eventually("the other node has the canary", || (other.get("/hello").status == 500).then_some(()));
        let failed: Vec<u16> = (0..6).map(|_| gw.get("/hello").status).collect();
        assert_eq!(failed, [500, 500, 500, 500, 500, 200], "where it failed it is left alone at once");
        eventually("the other node is served by the live revision", || {
            (other.get("/hello").text() == "old").then_some(())
        });
        let words = "the canary, revision 2, is backed out: 5 of 5 calls failed, more than max_error_rate 0.5 allows";
        gw.expect_log(words);
        expect_line(&gw, words);
        let shown = other.admin("GET", "/functions/hello", ());
        let value = if shown.status == 200 { shown.json()["value"].clone() } else { Value::Null };
        let value =
            if value.is_null() { gw.admin("GET", "/functions/hello", ()).json()["value"].clone() } else { value };
        assert_eq!((&value["backed_out"]["revision"], &value["backed_out"]["errors"]), (&json!(2), &json!(5)));
        assert!(value.get("canary").is_none());
        // Another try starts from nothing.
        assert_eq!(gw.admin("PATCH", "/functions/hello", json!({"canary": canary_of(100)})).status, 200);
        assert_eq!(gw.get("/hello").status, 500);
    }

    fn canary_of(weight: u64) -> Value {
        json!({"revision": 2, "weight": weight, "min_calls": 5})
    }
}

#[test]
fn a_file_has_functions_with_all_they_have_and_a_canary_that_fails_is_left_alone() {
    let dir = Dir::new();
    dir.configure(json!({
        "deployment": {"role": "data_plane", "role_data_plane": {"config_provider": "yaml"}},
        "nginx_config": {"worker_processes": 1},
    }));
    let (good, bad) = ("return function() return 200, env.A end", "return function() error('bad') end");
    let canary = json!({"revision": 2, "weight": 100, "source": bad, "min_calls": 2});
    let config = json!({
        "functions": [
            {"id": "hello", "source": good, "env": {"A": "live"}, "canary": canary},
            {"id": "tick", "source": "return function() ngx.log(ngx.WARN, 'it ran') end", "schedule": "* * * * * *"},
        ],
        "routes": [{"id": 1, "uri": "/hello", "function_id": "hello"}],
    });
    dir.write("conf/apisix.yaml", format!("{config}\n#END\n"));
    let gw = Gateway::in_dir(dir);
    let answers: Vec<u16> = (0..3).map(|_| gw.get("/hello").status).collect();
    assert_eq!((answers, gw.get("/hello").text()), (vec![500, 500, 200], "live".into()));
    gw.expect_log("the canary is left alone here, but stays in the store");
    gw.expect_log("it ran");
}

#[test]
fn a_canary_is_judged_by_its_own_calls_however_many_functions_there_are() {
    let dir = Dir::new();
    dir.configure(json!({
        "deployment": {"role": "data_plane", "role_data_plane": {"config_provider": "yaml"}},
        "nginx_config": {"worker_processes": 1},
    }));
    let ids: Vec<String> = (0..1000).map(|n| format!("f{n}")).collect();
    let plain = |id: &String| json!({"id": id, "source": "return function() return 200 end"});
    let route = |id: &str| json!({"id": id, "uri": format!("/{id}"), "function_id": id});
    let bad = json!({"revision": 2, "weight": 100, "source": "return function() error('bad') end", "min_calls": 2});
    let mut functions: Vec<Value> = ids.iter().map(plain).collect();
    functions.push(json!({"id": "last", "source": "return function() return 200, 'live' end", "canary": bad}));
    functions.push(json!({"id": "other", "source": "return function() return 200, 'live' end", "canary": bad}));
    let mut routes: Vec<Value> = ids.iter().map(|id| route(id)).collect();
    routes.extend([route("last"), route("other")]);
    dir.write("conf/apisix.yaml", format!("{}\n#END\n", json!({"functions": functions, "routes": routes})));
    let gw = Gateway::in_dir(dir);
    let mut client = Client::connect(&gw.proxy());
    for id in &ids {
        client.send("GET", &format!("/{id}"), &[], b"");
        assert_eq!(client.reply("GET").status, 200, "{id}");
    }
    // Both are counted where all are that are one too many.
    let turns: Vec<[u16; 2]> = (0..3).map(|_| [gw.get("/last").status, gw.get("/other").status]).collect();
    assert_eq!(turns, [[500, 500], [500, 500], [200, 200]]);
    assert_eq!((gw.get("/last").text(), gw.get("/other").text()), ("live".into(), "live".into()));
}

mod schedules {
    use super::*;

    const TICK: &str = "return function(ctx)
        ngx.log(ngx.NOTICE, 'ran for ', ctx.scheduled_at, ' with ', env.WHO)
        if env.FAIL then error('a failed run') end
    end";

    /// The times that a function ran for, as its lines have them.
    fn runs(gw: &Gateway) -> Vec<String> {
        let of =
            |line: &String| line.split("ran for ").nth(1).and_then(|rest| rest.split(' ').next()).map(str::to_owned);
        lines(gw, "tick").iter().filter_map(of).collect()
    }

    #[test]
    fn a_schedule_calls_the_function_and_is_logged_and_counted() {
        let gw = Gateway::start();
        let env = json!({"WHO": "me", "FAIL": "1"});
        gw.put("/functions/tick", json!({"source": TICK, "schedule": "* * * * * *", "env": env}));
        eventually("it ran twice", || (runs(&gw).len() >= 2).then_some(()));
        let all = lines(&gw, "tick").join("\n");
        assert!(
            all.contains("with me") && all.contains("a failed run") && all.contains("functions/tick.lua:3:"),
            "{all}"
        );
        let page = get(&gw.prometheus(), "/apisix/prometheus/metrics").text();
        for name in ["apisix_function_calls_total", "apisix_function_errors_total"] {
            assert!(page.contains(&format!("{name}{{function=\"tick\",trigger=\"schedule\"}}")), "{page}");
        }
        gw.put("/functions/tick", json!({"source": TICK, "schedule": "0 0 1 1 *"}));
        assert_eq!(gw.admin("GET", "/functions/tick", ()).json()["value"]["schedule"], "0 0 1 1 *");
    }

    #[test]
    fn one_that_still_runs_is_not_started_again() {
        let gw = Gateway::start();
        let slow = "return function() ngx.log(ngx.NOTICE, 'began') ngx.sleep(60) end";
        gw.put("/functions/tick", json!({"source": slow, "schedule": "* * * * * *"}));
        gw.expect_log("function tick: its last scheduled call has not ended: this one is left out");
        assert_eq!(lines(&gw, "tick").len(), 1);
    }

    #[test]
    fn of_the_nodes_on_an_etcd_exactly_one_runs_it() {
        let etcd = Etcd::start();
        let settings = json!({"deployment": {"role": "traditional", "role_traditional": {"config_provider": "etcd"},
            "etcd": {"host": [etcd.url()], "prefix": "/apisix", "timeout": 5}}});
        let nodes: Vec<Gateway> = (0..2).map(|_| Gateway::with(settings.clone())).collect();
        nodes[0].put("/functions/tick", json!({"source": TICK, "schedule": "* * * * * *", "env": {"WHO": "one"}}));
        let all = || nodes.iter().flat_map(runs).collect::<Vec<_>>();
        eventually("it ran four times", || (all().len() >= 4).then_some(()));
        let all = all();
        assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len(), "{all:?}");
        let turns = || etcd.keys("/apisix/moongate/function_runs/");
        assert_eq!(turns().len(), 1, "{:?}", turns());
        assert_eq!(nodes[1].admin("DELETE", "/functions/tick", ()).status, 200);
        eventually("nothing of it is left", || turns().is_empty().then_some(()));
    }

    #[test]
    fn a_schedule_that_is_none_is_refused_with_its_field() {
        let gw = Gateway::start();
        for (schedule, text) in [
            ("*/5 * * *", "five fields are expected"),
            ("61 * * * *", "minute \\\"61\\\": numbers from 0 to 59 are expected"),
            ("0 0 31 2 *", "no such day ever comes"),
        ] {
            let reply = gw.admin("PUT", "/functions/f", json!({"source": "return", "schedule": schedule}));
            refused(&reply, 400, "invalid configuration: property \\\"schedule\\\" validation failed: ");
            refused(&reply, 400, text);
        }
    }
}

mod dry_run {
    use super::*;

    const ECHO: &str = "return function(ctx)
        ngx.req.read_body()
        ngx.log(ngx.ERR, 'tried')
        ngx.header['X-Method'] = ngx.req.get_method()
        ngx.header['X-Two'] = {'a', 'b'}
        return 201, {ngx.var.uri, ctx.var.arg_a, ngx.req.get_headers()['x-in'], tostring(ngx.req.get_body_data()), env.A or 'none'}
    end";

    #[test]
    fn the_stored_source_answers_a_made_up_request() {
        let gw = with(json!({"source": ECHO, "env": {"A": "stored"}}));
        let request = json!({"method": "POST", "uri": "/made%20up?a=1", "headers": {"X-In": "in"}, "body": "text"});
        let tried = gw.admin("POST", "/functions/hello/test", request).json();
        assert_eq!((&tried["status"], &tried["headers"]["X-Method"]), (&json!(201), &json!("POST")));
        assert_eq!(tried["headers"]["X-Two"], json!(["a", "b"]));
        let body: Value = serde_json::from_str(tried["body"].as_str().expect("a text")).expect("JSON");
        assert_eq!(body, json!(["/made up", "1", "in", "text", "stored"]));
        assert!(
            tried["logs"][0]["message"]
                .as_str()
                .is_some_and(|line| line.contains("hello.lua:3: ") && line.contains("tried")),
            "{tried}"
        );
        assert!(tried["time_ms"].as_f64().is_some_and(|ms| ms > 0.0));
        assert!(lines(&gw, "hello").is_empty(), "nobody was served");
        let page = get(&gw.prometheus(), "/apisix/prometheus/metrics").text();
        assert!(!page.contains("function_calls_total{"), "{page}");
    }

    #[test]
    fn a_given_source_runs_before_it_is_stored_within_its_bounds() {
        let gw = Gateway::start();
        let test = |body: Value| gw.admin("POST", "/functions/new/test", body);
        let answered = test(json!({"source": "ngx.say(env.B)", "env": {"B": "given"}})).json();
        assert_eq!((&answered["status"], &answered["body"]), (&json!(200), &json!("given\n")));
        refused(&gw.admin("GET", "/functions/new", ()), 404, "Key not found");
        let slow = test(json!({"source": "ngx.sleep(60)", "limits": {"timeout_ms": 50}})).json();
        assert_eq!(slow["status"], 504);
        let failed = test(json!({"source": "return function() error('boom') end"})).json();
        assert_eq!(failed["status"], 500);
        assert!(failed["logs"].to_string().contains("functions/new.lua:1: boom"), "{failed}");
        let long = test(json!({"source": "return", "limits": {"max_body": 3}, "body": "four"})).json();
        assert_eq!(long["status"], 413);
        let binary = test(json!({"source": "ngx.print('\\255')"})).json();
        assert_eq!(binary["body_base64"], "/w==");
        let cut = test(json!({"source": "ngx.print(string.rep('x', 1048577))"})).json();
        assert_eq!((cut["body"].as_str().map(str::len), &cut["body_truncated"]), (Some(1_048_576), &json!(true)));
    }

    #[test]
    fn a_plus_sign_in_a_path_is_one_and_in_arguments_a_space() {
        let gw = Gateway::start();
        let source = "return function(ctx) return 200, ngx.var.uri .. ' ' .. ngx.var.request_uri .. ' ' .. ngx.req.get_uri_args().x end";
        let tried = gw.admin("POST", "/functions/new/test", json!({"source": source, "uri": "/a+b%2Bc?x=1+2"})).json();
        assert_eq!(tried["body"], "/a+b+c /a+b%2Bc?x=1+2 1 2", "{tried}");
    }

    /// A function that never ends was stopped after its time; where the machine has other things to do, it was given up by then.
    fn assert_ended(tried: &Reply) {
        let stopped = (tried.status, &tried.json()["status"]) == (200, &json!(504));
        assert!(stopped || tried.status == 504, "{}", tried.text());
    }

    #[test]
    fn no_request_and_no_schedule_waits_for_a_dry_run() {
        let gw = with(source("return function() return 200, 'served' end"));
        let tick = "return function() ngx.log(ngx.NOTICE, 'ran') end";
        gw.put("/functions/tick", json!({"source": tick, "schedule": "* * * * * *"}));
        // Long enough for a tick.
        let spin = json!({"source": "while true do end", "limits": {"cpu_ms": 2500, "timeout_ms": 2500}});
        let ask = || {
            eventually("a place", || {
                let tried = gw.admin("POST", "/functions/hello/test", spin.clone());
                (tried.status != 503).then_some(tried)
            })
        };
        std::thread::scope(|scope| {
            let two: Vec<_> = (0..2).map(|_| scope.spawn(ask)).collect();
            let third = eventually("both places are taken", || {
                let quick = gw.admin("POST", "/functions/hello/test", json!({"source": "return 200"}));
                (quick.status == 503).then_some(quick)
            });
            refused(&third, 503, "2 functions are on trial already");
            assert_eq!(third.header("retry-after"), Some("5"));
            let before = lines(&gw, "tick").len();
            eventually("its schedule is kept", || (lines(&gw, "tick").len() > before).then_some(()));
            assert_eq!(gw.get("/hello").text(), "served");
            assert!(two.iter().all(|one| !one.is_finished()), "the one worker serves meanwhile");
            for one in two {
                assert_ended(&one.join().expect("an answer"));
            }
        });
        assert_ended(&ask());
    }

    #[test]
    fn what_is_no_request_is_refused() {
        let gw = Gateway::start();
        let test = |body: Value| gw.admin("POST", "/functions/new/test", body);
        refused(&test(json!({})), 404, "Key not found");
        refused(&test(json!({"source": "return function("})), 400, "functions/new.lua:1:");
        refused(&test(json!({"source": "return", "uri": "x"})), 400, "property \\\"uri\\\" validation failed");
        refused(&test(json!({"source": "return", "path": "/"})), 400, "additional properties forbidden, found path");
        refused(&test(json!({"source": "return", "headers": {"A": 1}})), 400, "property \\\"headers\\\"");
        let key = gw.key();
        let text =
            request(&gw.admin_address(), "POST", "/apisix/admin/functions/new/test", &[("X-API-KEY", &key)], b"{");
        refused(&text, 400, "invalid request body");
    }
}
