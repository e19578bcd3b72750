//! `apisix.core.etcd` and `apisix.core.config`: scripts that read, write and follow the gateway's configuration.

use serde_json::{Value, json};

use crate::support::{Gateway, Upstream, eventually, peers::Etcd};

/// A gateway with these settings that runs the body of a POST to `/lua` as Lua and answers what it returns as JSON.
fn scripted(mut settings: Value) -> Gateway {
    let run = "ngx.req.read_body()
        local f = assert(loadstring(ngx.req.get_body_data()))
        local core, etcd = require('apisix.core'), require('apisix.core.etcd')
        ngx.say(core.json.encode({ f(core, etcd) }))";
    // One VM: an object of `core.config` belongs to the one that made it.
    settings["nginx_config"] = json!({"worker_processes": 1});
    settings["lua_locations"] = json!([{"location": "= /lua", "content_by_lua": run}]);
    Gateway::with(settings)
}

#[track_caller]
fn run(gw: &Gateway, lua: &str) -> Value {
    let reply = gw.send("POST", "/lua", &[], format!("local core, etcd = ... {lua}").as_bytes());
    assert_eq!(reply.status, 200, "{lua}\n{}\n{}", reply.text(), gw.log());
    reply.json()
}

fn on_etcd(etcd: &Etcd) -> Value {
    json!({"deployment": {"role": "traditional", "role_traditional": {"config_provider": "etcd"},
        "etcd": {"host": [etcd.url()], "prefix": "/apisix", "timeout": 5}}})
}

/// What holds whatever stores.
fn reads_and_writes(gw: &Gateway, up: &Upstream) {
    let missing = run(gw, "local res = etcd.get('/box/a') return res.status, res.body.message");
    assert_eq!(missing, json!([404, "Key not found"]));
    let made =
        run(gw, "local res = etcd.set('/box/a', { n = 1 }) return res.status, res.body.action, res.body.node.value.n");
    assert_eq!(made, json!([201, "set", 1]));
    let changed = run(
        gw,
        "local res = etcd.set('/box/a', { n = 2 }) local node = res.body.node
         return res.status, node.key, node.modifiedIndex > node.createdIndex",
    );
    assert_eq!(changed, json!([200, "/apisix/box/a", true]));
    let read = run(
        gw,
        "local res = etcd.get('/box/a') local node = res.body.node
         return res.status, res.body.action, node.value.n, node.key, node.modifiedIndex > node.createdIndex,
             tonumber(res.headers['X-Etcd-Index']) >= node.modifiedIndex",
    );
    assert_eq!(read, json!([200, "get", 2, "/apisix/box/a", true, true]));
    let listed = run(
        gw,
        "etcd.set('/box/b', 'text') local res = etcd.get('/box', true)
         return res.body.total, res.body.list[1].value.n, res.body.list[2].value, res.body.list[2].key",
    );
    assert_eq!(listed, json!([2, 2, "text", "/apisix/box/b"]));
    let guarded = run(
        gw,
        "local at = etcd.get('/box/a').body.node.modifiedIndex
         local res = etcd.atomic_set('/box/a', { n = 3 }, nil, at)
         local none, err = etcd.atomic_set('/box/a', { n = 4 }, nil, at)
         local new, exists = etcd.atomic_set('/box/a', { n = 5 })
         return res.status, tostring(none), err, tostring(new), exists, etcd.get('/box/a').body.node.value.n",
    );
    let refusal = "value changed before overwritten";
    assert_eq!(guarded, json!([200, "nil", refusal, "nil", refusal, 3]));
    let pushed = run(
        gw,
        "local res = etcd.push('/box', { x = 1 }) local id = res.body.node.value.id
         return res.status, res.body.action, #id, res.body.node.key == '/apisix/box/' .. id, etcd.delete('/box/' .. id).status",
    );
    assert_eq!(pushed, json!([201, "create", 20, true, 200]));
    let removed = run(
        gw,
        "local one = etcd.rmdir('/box/none') local all = etcd.rmdir('/box/', { prefix = true })
         return one.status, all.status, all.body.deleted, etcd.get('/box', true).status, etcd.delete('/box/a').status",
    );
    assert_eq!(removed, json!([404, 200, "2", 404, 404]));
    a_written_route_is_served(gw, up);
    leases_renew(gw);
    the_client_takes_whole_keys(gw);
}

fn a_written_route_is_served(gw: &Gateway, up: &Upstream) {
    let lua = format!(
        "local res = etcd.set('/routes/9', {{ uri = '/nine', upstream = {{ type = 'roundrobin', nodes = {{ ['{}'] = 1 }} }} }})
         return res.status",
        up.addr()
    );
    assert_eq!(run(gw, &lua), json!([201]));
    assert_eq!(gw.get("/nine").status, 200, "served when the write is answered");
    assert_eq!(gw.admin("GET", "/routes/9", ()).json()["value"]["uri"], "/nine");
    assert_eq!(run(gw, "return etcd.delete('/routes/9').status"), json!([200]));
    assert_eq!(gw.get("/nine").status, 404);
}

fn leases_renew(gw: &Gateway) {
    let made = run(
        gw,
        "local res = etcd.set('/box/brief', 1, 60) local id = res.body.lease_id
         local alive = etcd.keepalive(id)
         local before = etcd.get('/box/brief').body.node.modifiedIndex
         etcd.delete('/box/brief')
         return type(id), alive.body.result.TTL, before == res.body.node.modifiedIndex",
    );
    assert_eq!(made, json!(["string", "60", true]));
    let gone = run(gw, "local ok, err = etcd.keepalive('12345') return tostring(ok), err");
    assert_eq!(gone, json!(["nil", "lease not found: 12345"]));
    run(gw, "etcd.set('/box/brief', 1, 1)");
    eventually("the key is gone", || (run(gw, "return etcd.get('/box/brief').status") == json!([404])).then_some(()));
}

fn the_client_takes_whole_keys(gw: &Gateway) {
    let seen = run(
        gw,
        "local cli, prefix = etcd.new()
         local first = cli:setnx(prefix .. '/box/c', { n = 1 }).body.succeeded
         local second = cli:setnx(prefix .. '/box/c', { n = 2 }).body.succeeded
         local third = cli:setx(prefix .. '/box/c', { n = 3 }).body.succeeded
         local missing = cli:setx(prefix .. '/box/d', 1).body.succeeded
         local kv = cli:get(prefix .. '/box/c').body.kvs[1]
         local _, outside = cli:get('/other/c')
         local deleted = cli:delete(prefix .. '/box/c').body.deleted
         return prefix, first, second, third, missing, kv.key, kv.value.n, outside, deleted,
             type(etcd.server_version(cli).body.etcdserver)",
    );
    let outside = "key /other/c is not under the prefix /apisix";
    assert_eq!(seen, json!(["/apisix", true, false, true, false, "/apisix/box/c", 3, outside, "1", "string"]));
}

#[test]
fn scripts_read_and_write_the_embedded_store() {
    let up = Upstream::echo();
    let gw = scripted(json!({}));
    reads_and_writes(&gw, &up);
    let refused = run(&gw, "return pcall(etcd.set, '/box/' .. ('x'):rep(5000), 1)");
    assert_eq!(refused[0], json!(false));
    let long = run(&gw, "local _, err = etcd.set('/box/long', ('x'):rep(1572863)) return err");
    assert_eq!(long, json!(["/box/long: the value is longer than 1572864 bytes"]));
    assert_eq!(run(&gw, "return etcd.set('/box/long', ('x'):rep(1572862)).status"), json!([201]), "quotes included");
}

#[test]
fn scripts_read_and_write_etcd() {
    let (mut etcd, up) = (Etcd::start(), Upstream::echo());
    let gw = scripted(on_etcd(&etcd));
    reads_and_writes(&gw, &up);
    run(&gw, "etcd.set('/box/seen', { n = 1 })");
    assert!(etcd.get("/apisix/box/seen").contains(r#"{"n":1}"#));
    etcd.stop();
    let failed = run(&gw, "local res, err = etcd.get('/box/seen') return tostring(res), err");
    assert_eq!(failed[0], "nil");
    assert!(failed[1].as_str().is_some_and(|text| text.starts_with("etcd: get: ")), "{failed}");
}

#[test]
fn init_may_use_the_store_and_functions_may_not() {
    let gw = Gateway::with(json!({"lua_init": {"init_by_lua":
        "local etcd = require('apisix.core.etcd')
         assert(etcd.set('/box/init', 'from init'))
         ngx.log(ngx.WARN, 'init read ', etcd.get('/box/init').body.node.value)"}}));
    gw.expect_log("init read from init");
    let source = "return function() local _, err = pcall(require, 'apisix.core.etcd') return 200, tostring(err) end";
    gw.put("/functions/f", json!({"source": source}));
    gw.put("/routes/1", json!({"uri": "/f", "function_id": "f"}));
    assert!(
        gw.get("/f").text().contains("module 'apisix.core.etcd' is not open to functions"),
        "{}",
        gw.get("/f").text()
    );
    let source = "return function() return 200, tostring(require('apisix.core').etcd.set) end";
    gw.put("/functions/f", json!({"source": source}));
    assert_eq!(gw.get("/f").text(), "nil");
}

/// Makes an object that notes what its callbacks are given, in a global of the VM.
const FOLLOW_BOX: &str = "seen = { filtered = {} }
    seen.object = assert(core.config.new('/box', {
        automatic = true,
        item_schema = { type = 'object', properties = { n = { type = 'integer' }, kind = { default = 'plain' } } },
        checker = function(value) if value.n == 13 then return false, 'unlucky' end return true end,
        filter = function(item, old) table.insert(seen.filtered, item.value.id .. (old and ' again' or '')) end,
    })) ";

/// What a script says once it says so.
fn eventually_runs(gw: &Gateway, lua: &str, expected: Value) {
    let mut said = Value::Null;
    let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        eventually("the script says it", || {
            said = run(gw, lua);
            (said == expected).then_some(())
        });
    }));
    assert!(ended.is_ok(), "{lua}: {said}, not {expected}\n{}", gw.log());
}

fn an_object_follows_a_directory(gw: &Gateway) {
    run(gw, "etcd.set('/box/a', { n = 1 }) etcd.set('/boxes/x', { n = 1 })");
    let first = run(
        gw,
        &format!(
            "{FOLLOW_BOX} local item = seen.object:get('a')
             return #seen.object.values, item.key, item.value.n, item.value.kind, item.value.id, seen.object.conf_version,
                 item.modifiedIndex == seen.object.prev_index, core.config.fetch_created_obj('/box') == seen.object"
        ),
    );
    assert_eq!(first, json!([1, "/apisix/box/a", 1, "plain", "a", 1, true, true]));
    run(gw, "etcd.set('/box/b', { n = 2 }) etcd.set('/box/a', { n = 3 }) etcd.set('/boxes/y', { n = 4 })");
    let state = "local o = seen.object local a, b = o:get('a'), o:get('b')
        return o.conf_version, a and a.value.n or 0, b and b.value.n or 0, table.concat(seen.filtered, ', ')";
    eventually_runs(gw, state, json!([3, 3, 2, "a, b, a again"]));

    run(
        gw,
        "etcd.set('/box/a', { n = 'text' }) etcd.set('/box/b', { n = 13, password = 'hush' })
         etcd.set('/box/c', 'no object')",
    );
    gw.expect_log("failed to check item data of [/apisix/box] err:property \"n\" validation failed");
    gw.expect_log("failed to check item data of [/apisix/box] err:unlucky ,key: /apisix/box/b");
    gw.expect_log("invalid item data of [/apisix/box/c], val: no object, it should be an object");
    assert!(!gw.log().contains("hush"), "what a refused object holds is not logged");
    eventually_runs(gw, state, json!([3, 3, 2, "a, b, a again"]));

    run(
        gw,
        "core.config_util.add_clean_handler(seen.object:get('a'), function() seen.cleaned = true end) etcd.delete('/box/a')",
    );
    let left = "local names = {} for _, item in core.config_util.iterate_values(seen.object.values) do
            names[#names + 1] = item.value.id end
        return table.concat(names, ' '), #seen.object.values, seen.cleaned, seen.object.conf_version";
    eventually_runs(gw, left, json!(["b", 2, true, 4]));

    run(gw, "seen.object:close() etcd.set('/box/b', { n = 5 }) other = core.config.new('/box', { automatic = true })");
    assert_eq!(run(gw, "return other:get('b').value.n, seen.object:get('b').value.n"), json!([5, 2]));
}

#[test]
fn objects_follow_a_directory_of_the_embedded_store() {
    let up = Upstream::echo();
    let mut gw = scripted(json!({}));
    an_object_follows_a_directory(&gw);
    let routes = "local routes, n = core.config.fetch_created_obj('/routes'), 0
        for _, item in core.config_util.iterate_values(routes.values) do n = n + item.value.priority end return n";
    assert_eq!(run(&gw, routes), json!([0]));
    let route = |uri: &str| json!({"uri": uri, "priority": 7, "upstream": {"nodes": {up.addr(): 1}}});
    gw.put("/routes/1", route("/one"));
    eventually_runs(&gw, routes, json!([7]));
    gw.put("/routes/2", route("/two"));
    eventually_runs(&gw, routes, json!([14]));
    gw.admin("DELETE", "/routes/1", ());
    eventually_runs(&gw, routes, json!([7]));
    let read = run(
        &gw,
        "local o = core.config.new() return o:getkey('/routes/').body.count, o:getkey('/routes/2').body.kvs[1].value.uri,
             o:getkey('/none').status, o:getkey('/none/').body.count",
    );
    assert_eq!(read, json!(["2", "/two", 404, "1"]));
    assert_eq!(
        run(&gw, "return core.config.new('routes')")[1],
        json!("the key of a configuration object begins with a slash")
    );
    let last = run(
        &gw,
        "local n, o, err = 0 repeat o, err = core.config.new('/x', { automatic = true }) n = n + 1 until not o return n, err",
    );
    assert_eq!(last, json!([255, "more than 256 configuration objects"]), "two follow already");
    assert!(gw.quit().success());
    assert!(!gw.log().contains("cut off"), "who waits for changes holds up no end");
}

#[test]
fn objects_follow_a_directory_of_etcd() {
    let etcd = Etcd::start();
    etcd.put("/apisix/box/", "init_dir");
    let gw = scripted(on_etcd(&etcd));
    let directory = run(&gw, "return etcd.set('/crate/', 1).body.node.key, etcd.get('/crate/a').status");
    assert_eq!(directory, json!(["/apisix/crate/", 404]));
    assert!(!gw.log().contains("is stored but not served"), "the revision of a directory's own key is served, too");
    an_object_follows_a_directory(&gw);
    etcd.put("/apisix/box/other", r#"{"n":9}"#);
    eventually_runs(&gw, "local item = other:get('other') return item and item.value.n or 0", json!([9]));
    let list = "list = list or core.config.new('/plugins', { automatic = true, single_item = true })
        return list.values[1] and list.values[1].value[1].name or 0";
    assert_eq!(run(&gw, list), json!([0]));
    // Another list of plugins starts the scripts anew, and their objects with them.
    etcd.put("/apisix/plugins", r#"[{"name":"key-auth"}]"#);
    eventually_runs(&gw, list, json!(["key-auth"]));
}
