//! What `apisix.*` does for a plugin that somebody wrote: its modules on real requests.

use serde_json::{Value, json};

use crate::support::{Dir, Gateway, Upstream, eventually};

/// A gateway with plugins of these names and sources.
fn with_plugins(plugins: &[(&str, &str)]) -> Gateway {
    let dir = Dir::new();
    // One worker: what a test counts is one VM's.
    dir.configure(json!({"nginx_config": {"worker_processes": 1}}));
    for (name, source) in plugins {
        dir.write(&format!("plugins/{name}.lua"), source);
    }
    Gateway::in_dir(dir)
}

/// A plugin with these functions.
fn plugin(name: &str, priority: u32, body: &str) -> String {
    format!(
        "local core = require('apisix.core')
         local _M = {{ version = 0.1, priority = {priority}, name = '{name}', schema = {{ type = 'object' }} }}
         {body}
         return _M"
    )
}

#[test]
fn an_upstream_that_a_plugin_sets_is_balanced_over_requests() {
    let source = plugin(
        "chooser",
        5,
        "function _M.access(conf, ctx)
             local up = require('apisix.upstream')
             local made = { type = 'roundrobin', nodes = conf.nodes, parent = ctx.matched_route }
             local ok, err = up.set(ctx, 'roundrobin#route_' .. ctx.route_id, ctx.conf_version, made)
             if not ok then return 500, err end
         end",
    );
    let gw = with_plugins(&[("chooser", &source)]);
    let (a, b) = (Upstream::echo(), Upstream::echo());
    let node = |up: &Upstream| {
        let (host, port) = up.addr().rsplit_once(':').map(|(h, p)| (h.to_owned(), p.to_owned())).expect("an address");
        json!({"host": host, "port": port.parse::<u16>().expect("a port"), "weight": 1})
    };
    gw.route("1", "/get", &a, json!({"chooser": {"nodes": [node(&a), node(&b)]}}));
    for _ in 0..6 {
        let reply = gw.get("/get");
        assert_eq!(reply.status, 200, "{}", reply.text());
    }
    assert_eq!((a.seen().len(), b.seen().len()), (3, 3));
}

#[test]
fn plugins_that_hold_a_body_do_not_mix_theirs() {
    let holder = |name: &str, priority: u32| {
        plugin(
            name,
            priority,
            &format!(
                "function _M.header_filter() core.response.clear_header_as_body_modified() end
                 function _M.body_filter(conf, ctx)
                     local body = core.response.hold_body_chunk(ctx)
                     if body then ngx.arg[1] = body .. '{name}' end
                 end"
            ),
        )
    };
    let gw = with_plugins(&[("first", &holder("first", 6)), ("second", &holder("second", 5))]);
    let up = Upstream::answering(|_| "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nETag: \"x\"\r\n\r\nab".to_owned());
    gw.route("1", "/get", &up, json!({"first": {}, "second": {}}));
    let reply = gw.get("/get");
    assert_eq!(reply.text(), "abfirstsecond");
    assert_eq!(reply.header("etag"), None);
}

#[test]
fn scripts_know_which_servers_resolve_names() {
    let tell = "return function() return 200, require('apisix.core').utils.get_resolver() end";
    let of = |config: serde_json::Value| {
        let gw = Gateway::with(config);
        gw.route("1", "/t", &Upstream::echo(), json!({"serverless-pre-function": {"functions": [tell]}}));
        gw.get("/t").json()
    };
    assert_eq!(of(json!({"apisix": {"dns_resolver": ["127.0.0.1:5353"]}})), json!(["127.0.0.1:5353"]));
    let system = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let servers = system.lines().filter_map(|line| line.trim().strip_prefix("nameserver")).map(str::trim);
    assert_eq!(of(json!({})), json!(servers.collect::<Vec<_>>()));
}

#[test]
fn a_plugin_runs_a_list_of_plugins_and_sees_the_requests_own() {
    let source = plugin(
        "runner",
        5,
        "function _M.access(conf, ctx)
             local plugin = require('apisix.plugin')
             local names = {}
             for i = 1, #ctx.plugins, 2 do names[#names + 1] = ctx.plugins[i].name end
             ngx.req.set_header('X-Plugins', table.concat(names, ','))
             assert(plugin.check_schema(conf.inner, nil, true))
             local list = plugin.filter(ctx, { value = { plugins = conf.inner }, key = 'k', modifiedIndex = 7 })
             plugin.run_plugin('rewrite', list, ctx)
             plugin.run_plugin('access', list, ctx)
         end",
    );
    let gw = with_plugins(&[("runner", &source)]);
    let up = Upstream::echo();
    let inner = json!({"proxy-rewrite": {"headers": {"set": {"X-Inner": "yes"}}}, "nobody-knows": {}});
    gw.route("1", "/get", &up, json!({"runner": {"inner": inner}, "request-id": {}}));
    assert_eq!(gw.get("/get").status, 200);
    assert_eq!(up.last().header("x-inner"), Some("yes"));
    assert_eq!(up.last().header("x-plugins"), Some("request-id,runner"));

    let refusing = json!({"ip-restriction": {"blacklist": ["127.0.0.0/8"]}});
    gw.route("1", "/get", &up, json!({"runner": {"inner": refusing}}));
    assert_eq!(gw.get("/get").status, 403);
    assert_eq!(up.seen().len(), 1);
}

#[test]
fn a_registered_variable_counts_where_it_is_asked_for() {
    let source = plugin(
        "counter",
        20000,
        "core.ctx.register_var('a6_zone', function(ctx) return ctx.matched_route.value.labels.zone end)
         local n = 0
         core.ctx.register_var('a6_count', function() n = n + 1 return n end, { no_cacheable = true })
         function _M.rewrite(conf, ctx)
             ngx.req.set_header('X-Seen', ctx.var.a6_zone .. ctx.var.a6_count .. ctx.var.a6_count)
         end",
    );
    let gw = with_plugins(&[("counter", &source)]);
    let up = Upstream::echo();
    gw.put(
        "/routes/1",
        json!({"uri": "/get", "labels": {"zone": "north"}, "plugins": {"counter": {}},
               "upstream": {"type": "roundrobin", "nodes": {up.addr(): 1}}}),
    );
    assert_eq!(gw.get("/get").status, 200);
    assert_eq!(up.last().header("x-seen"), Some("north12"));
}

#[test]
fn a_pre_function_that_is_no_lua_is_refused() {
    let gw = Gateway::start();
    let conf = json!({"limit-count": {"count": 2, "time_window": 60, "_meta": {"pre_function": "not lua"}}});
    let refused = gw.admin("PUT", "/routes/1", json!({"uri": "/a", "plugins": conf}));
    assert_eq!(refused.status, 400);
    let text = "failed to load _meta.pre_function in plugin limit-count: [string \"meta pre_function\"]:1: unexpected symbol \
                near 'not'";
    assert_eq!(refused.json()["error_msg"], Value::from(text));
}

#[test]
fn a_clean_handler_runs_when_the_route_changes() {
    let source = plugin(
        "keeper",
        5,
        "local kept = {}
         function _M.access(conf, ctx)
             local route = ctx.matched_route
             if not kept[route.key] then
                 kept[route.key] = true
                 core.config_util.add_clean_handler(route, function(item)
                     kept[item.key] = nil
                     core.log.warn('cleaned ', item.key, ' of ', item.value.desc)
                 end)
             end
         end",
    );
    let gw = with_plugins(&[("keeper", &source)]);
    let up = Upstream::echo();
    let route = |desc: &str| {
        json!({"uri": "/get", "desc": desc, "plugins": {"keeper": {}},
               "upstream": {"type": "roundrobin", "nodes": {up.addr(): 1}}})
    };
    for (now, next) in [("first", Some("second")), ("second", None)] {
        gw.put("/routes/1", route(now));
        assert_eq!(gw.get("/get").status, 200);
        match next {
            Some(next) => drop(gw.put("/routes/1", route(next))),
            None => assert_eq!(gw.admin("DELETE", "/routes/1", json!({})).status, 200),
        }
        // A worker learns of a change with its next request.
        gw.get("/get");
        gw.expect_log(&format!("cleaned /apisix/routes/1 of {now}"));
    }
}

#[test]
fn what_plugins_keep_is_bounded() {
    let source = plugin(
        "keeper",
        5,
        "local util, timers = core.config_util, require('apisix.timers')
         function _M.access()
             for i = 1, 10000 do
                 assert(util.add_clean_handler({ key = '/apisix/routes/' .. i, modifiedIndex = 0 }, print))
             end
             local item = { key = '/apisix/routes/x', modifiedIndex = 0 }
             local id, err = util.add_clean_handler(item, print)
             assert(util.add_clean_handler({}, print), 'what is no object of the configuration is not watched')
             local sent, why = require('apisix.events'):post('s', 'e', ('x'):rep(65536))
             for i = 1, 1025 do timers.register_timer('t' .. i, function() end) end
             return 200, { tostring(id), err, tostring(sent), why }
         end",
    );
    let gw = with_plugins(&[("keeper", &source)]);
    let up = Upstream::echo();
    gw.route("1", "/get", &up, json!({"keeper": {}}));
    let expected =
        json!(["nil", "there are handlers for 10000 items already", "nil", "the event is longer than 65536 bytes"]);
    assert_eq!(gw.get("/get").json(), expected);
    gw.expect_log("failed to register the timer t1025: there are 1024 already");
}

#[test]
fn events_reach_every_worker() {
    let dir = Dir::new();
    dir.configure(json!({"nginx_config": {"worker_processes": 2}}));
    let source = plugin(
        "teller",
        5,
        "local events = require('apisix.events')
         function _M.init()
             events:register(function(data) core.log.warn('worker ', ngx.worker.id(), ' was told ', data.word) end, 'teller', 'said')
         end
         function _M.access() assert(events:post('teller', 'said', { word = 'moon' })) return 204 end",
    );
    dir.write("plugins/teller.lua", source);
    let gw = Gateway::in_dir(dir);
    let up = Upstream::echo();
    gw.route("1", "/get", &up, json!({"teller": {}}));
    assert_eq!(gw.get("/get").status, 204);
    gw.expect_log("worker 0 was told moon");
    gw.expect_log("worker 1 was told moon");
}

#[test]
fn an_upstream_by_its_id_is_the_same_table_until_it_changes() {
    let up = Upstream::echo();
    let gw = Gateway::with(json!({"nginx_config": {"worker_processes": 1}}));
    let source = "return function(_, ctx) \
        local upstream = require('apisix.upstream') \
        local got, same = upstream.get_by_id('u'), upstream.get_by_id('u') \
        local seen = rawget(_G, 'seen_upstream') rawset(_G, 'seen_upstream', got) \
        return 200, { desc = got.desc, id = got.id, same = got == same, as_before = got == seen, none = upstream.get_by_id('v') == nil } \
        end";
    gw.put("/upstreams/u", json!({"nodes": {up.addr(): 1}, "desc": "one"}));
    gw.route("1", "/x", &up, json!({"serverless-pre-function": {"functions": [source]}}));
    let answer = |desc: &str, as_before: bool| json!({"desc": desc, "id": "u", "same": true, "as_before": as_before, "none": true});
    assert_eq!((gw.get("/x").json(), gw.get("/x").json()), (answer("one", false), answer("one", true)));
    gw.put("/upstreams/other", json!({"nodes": {up.addr(): 1}}));
    assert_eq!(gw.get("/x").json(), answer("one", true), "another's change is none of this one");
    gw.put("/upstreams/u", json!({"nodes": {up.addr(): 1}, "desc": "two"}));
    assert_eq!((gw.get("/x").json(), gw.get("/x").json()), (answer("two", false), answer("two", true)));
}

#[test]
fn timers_read_metadata_and_objects_too() {
    let up = Upstream::echo();
    let source = "local seen = 'nothing'\n\
        local _M = { version = 1, priority = 10, name = 'teller', schema = { type = 'object' }, metadata_schema = { type = 'object' } }\n\
        local function look()\n\
            local metadata = require('apisix.plugin').plugin_metadata('teller')\n\
            local found = require('apisix.upstream').get_by_id('u')\n\
            seen = (metadata and metadata.value.word or 'no metadata') .. ', ' .. (found and found.desc or 'no upstream')\n\
        end\n\
        function _M.access(_, ctx)\n\
            if ctx.var.arg_look then ngx.timer.at(0, look) end\n\
            return 200, seen\n\
        end\n\
        return _M\n";
    let gw = with_plugins(&[("teller", source)]);
    gw.route("1", "/x", &up, json!({"teller": {}}));
    for (word, desc) in [("one", "red"), ("two", "blue")] {
        gw.put("/plugin_metadata/teller", json!({"word": word}));
        gw.put("/upstreams/u", json!({"nodes": {up.addr(): 1}, "desc": desc}));
        gw.get("/x?look=1");
        let expected = format!("{word}, {desc}");
        eventually("what the timer saw", || (gw.get("/x").text() == expected).then_some(()));
    }
}

#[test]
fn the_matched_route_is_merged_with_all_that_its_request_goes_by() {
    let source = plugin(
        "acme-mut",
        5,
        "local seen = {}
         function _M.access(conf, ctx)
             local route = ctx.matched_route
             local names = {}
             for name, own in pairs(route.value.plugins) do
                 local same = name ~= 'acme-mut' or own == conf
                 names[#names + 1] = same and name or name .. ' of another'
             end
             table.sort(names)
             local upstream = route.value.upstream
             local again = seen[tostring(route)]
             seen[tostring(route)] = route
             return 200, { plugins = table.concat(names, ' '), labels = route.value.labels, id = route.value.id, key = route.key,
                 node = upstream and upstream.nodes[1].port, again = again ~= nil, text = conf.text, name = route.value.name,
                 version = route.modifiedIndex == ctx.conf_version }
         end",
    );
    let gw = with_plugins(&[("acme-mut", &source)]);
    let up = Upstream::echo();
    let port: u16 = up.addr().rsplit(':').next().and_then(|p| p.parse().ok()).expect("a port");
    let upstream = json!({"type": "roundrobin", "nodes": {up.addr(): 1}});
    let of = |path: &str| gw.get(path).json();
    gw.put("/services/sm", json!({"plugins": {"acme-mut": {"text": "service"}}, "upstream": upstream, "name": "s"}));
    gw.put("/routes/2", json!({"uri": "/mut2", "service_id": "sm", "labels": {"version": "v2"}}));
    let seen = of("/mut2");
    assert_eq!(seen["plugins"], "acme-mut", "{seen}");
    assert_eq!((&seen["node"], &seen["labels"]["version"]), (&json!(port), &json!("v2")));
    assert_eq!((&seen["id"], &seen["key"], &seen["name"]), (&json!("2"), &json!("/apisix/routes/2"), &json!("s")));
    assert_eq!((&seen["version"], &seen["again"]), (&json!(true), &json!(false)));
    // A request of the same versions has the same table.
    gw.get("/mut2");
    let seen: Vec<_> = (0..8).map(|_| of("/mut2")["again"] == true).collect();
    assert!(seen.contains(&true), "{seen:?}");
    // The plugin config stands between the service and the route.
    gw.put(
        "/plugin_configs/c",
        json!({"plugins": {"acme-mut": {"text": "config"}, "ip-restriction": {"blacklist": ["1.1.1.1"]}}}),
    );
    gw.put(
        "/routes/2",
        json!({"uri": "/mut2", "service_id": "sm", "plugin_config_id": "c", "plugins": {"key-auth": {}}}),
    );
    gw.put("/consumers", json!({"username": "jack", "plugins": {"key-auth": {"key": "k"}, "cors": {}}}));
    let seen = gw.send("GET", "/mut2", &[("apikey", "k")], b"").json();
    assert_eq!(seen["plugins"], "acme-mut cors ip-restriction key-auth", "{seen}");
    assert_eq!((&seen["text"], &seen["node"]), (&json!("config"), &json!(port)));
    // The service changes: so does what is made of it.
    gw.put("/services/sm", json!({"plugins": {"acme-mut": {}}, "upstream": upstream, "name": "t"}));
    let seen = gw.send("GET", "/mut2", &[("apikey", "k")], b"").json();
    assert_eq!((&seen["name"], &seen["text"]), (&json!("t"), &json!("config")));
    // An upstream of the route's own is in place of the service's; without any of them the route is as it is.
    let other = json!({"type": "roundrobin", "nodes": {"127.0.0.1:1": 1}});
    gw.put("/routes/2", json!({"uri": "/mut2", "service_id": "sm", "upstream": other}));
    assert_eq!(of("/mut2")["node"], 1);
    gw.put("/routes/2", json!({"uri": "/mut2", "plugins": {"acme-mut": {}}, "upstream": other}));
    let seen = of("/mut2");
    assert_eq!((&seen["plugins"], &seen["name"]), (&json!("acme-mut"), &json!(null)));
}

#[test]
fn a_clean_handler_runs_when_the_service_of_a_route_changes() {
    let source = plugin(
        "keeper",
        5,
        "local added
         function _M.access(conf, ctx)
             if added then return end
             added = true
             core.config_util.add_clean_handler(ctx.matched_route, function(item) core.log.warn('cleaned ', item.value.name) end)
         end",
    );
    let gw = with_plugins(&[("keeper", &source)]);
    let up = Upstream::echo();
    let service = |name: &str| json!({"name": name, "upstream": {"type": "roundrobin", "nodes": {up.addr(): 1}}});
    gw.put("/services/s", service("first"));
    gw.put("/routes/1", json!({"uri": "/get", "service_id": "s", "plugins": {"keeper": {}}}));
    assert_eq!(gw.get("/get").status, 200);
    gw.put("/services/s", service("second"));
    gw.get("/get");
    gw.expect_log("cleaned first");
}
