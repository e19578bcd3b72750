//! `GET /v1/lua`: what VMs hold is counted, and is back to zero when it should be.

use std::io::Read;

use serde_json::{Value, json};

use crate::support::{Client, Gateway, Upstream, eventually, get, request};

/// Waits until somebody opens the gate of this name.
const GATE: &str = "local function pass(gate) while not ngx.shared.gates:get(gate) do ngx.sleep(0.001) end end\n";

/// A gateway with one worker, whose dictionary `gates` holds up what scripts want to see held up.
fn gated(locations: Value) -> Gateway {
    let open =
        json!({"location": "/open", "content_by_lua": "ngx.shared.gates:set(ngx.var.arg_gate, true) ngx.say('ok')"});
    let mut all = vec![open];
    all.extend(locations.as_array().cloned().unwrap_or_default());
    Gateway::with(json!({
        "nginx_config": {"worker_processes": 1},
        "lua_shared_dict": {"gates": "1m"},
        "lua_locations": all,
    }))
}

fn open(gw: &Gateway, gate: &str) {
    assert_eq!(gw.get(&format!("/open?gate={gate}")).status, 200);
}

/// All VMs of all workers.
fn vms(gw: &Gateway) -> Vec<Value> {
    let workers = get(&gw.control(), "/v1/lua").json()["workers"].as_array().cloned().expect("workers");
    workers.iter().flat_map(|worker| worker["vms"].as_array().cloned().expect("vms")).collect()
}

/// The sum of a number over all VMs.
fn sum(gw: &Gateway, pointer: &str) -> u64 {
    vms(gw).iter().map(|vm| vm.pointer(pointer).and_then(Value::as_u64).expect(pointer)).sum()
}

#[track_caller]
fn expect(gw: &Gateway, numbers: &[(&str, u64)]) {
    for (pointer, expected) in numbers {
        let what = format!("{pointer} is {expected}");
        eventually(&what, || (sum(gw, pointer) == *expected).then_some(()));
    }
}

/// Has the plugins loaded anew. The worker does it with the next request for a route.
fn reload(gw: &Gateway) {
    assert_eq!(gw.admin("PUT", "/plugins/reload", ()).status, 200);
    let up = Upstream::echo();
    gw.route("reload", "/reload", &up, json!({}));
    assert_eq!(gw.get("/reload").status, 200);
}

/// Everything that ends with whom it was made for.
const NOTHING: &[(&str, u64)] = &[
    ("/coroutines/in_use", 0),
    ("/light_threads", 0),
    ("/timers/pending", 0),
    ("/timers/running", 0),
    ("/sockets/open", 0),
    ("/requests", 0),
];

#[test]
fn every_vm_of_every_worker_tells_what_it_holds() {
    let gw = Gateway::start();
    gw.admin_text("PUT", "/functions/f", "return function() return 200, 'ok' end", "text/plain");
    gw.put("/routes/1", json!({"uri": "/f", "function_id": "f"}));
    assert_eq!(gw.get("/f").text(), "ok");
    let reply = get(&gw.control(), "/v1/lua");
    assert_eq!((reply.status, reply.header("content-type")), (200, Some("application/json")));
    let workers = reply.json()["workers"].as_array().cloned().expect("workers");
    let ids: Vec<_> = workers.iter().map(|worker| worker["id"].clone()).collect();
    assert_eq!(ids, [0, 1]);
    for worker in &workers {
        let vm = &worker["vms"][0];
        assert!(vm["memory_bytes"].as_u64().is_some_and(|bytes| bytes > 100_000), "{vm}");
        let mut rest = vm.clone();
        for key in ["memory_bytes", "coroutines"] {
            rest.as_object_mut().expect("a map").remove(key);
        }
        assert_eq!(
            rest,
            json!({
                "purpose": "plugins", "serving": true, "light_threads": 0,
                "timers": {"pending": 0, "running": 0}, "sockets": {"open": 0, "idle": 0},
                "requests": 0, "plans": 0, "scripts": 0, "functions": 0,
            })
        );
    }
    let functions: Vec<_> = vms(&gw).into_iter().filter(|vm| vm["purpose"] == "functions").collect();
    assert_eq!(functions.len(), 1, "made by the call");
    assert_eq!(
        (&functions[0]["functions"], &functions[0]["coroutines"]),
        (&json!(1), &json!({"idle": 1, "in_use": 0}))
    );
}

#[test]
fn it_is_only_to_be_read() {
    let gw = Gateway::start();
    for method in ["POST", "PUT", "DELETE"] {
        let reply = request(&gw.control(), method, "/v1/lua", &[], b"");
        assert_eq!((reply.status, reply.json()["error_msg"].as_str()), (404, Some("404 Not Found")), "{method}");
    }
    assert_eq!(get(&gw.control(), "/v1/lua/0").status, 404);
}

#[test]
fn a_parked_request_its_socket_and_its_light_thread_are_counted_until_it_ends() {
    let peer = Upstream::serving(|_, mut stream| {
        let _ = stream.read(&mut [0; 16]);
    });
    let script = format!(
        "{GATE} ngx.thread.spawn(pass, 'request')
         local sock = ngx.socket.tcp()
         assert(sock:connect('127.0.0.1', ngx.var.arg_port))
         pass('request')
         assert(sock:setkeepalive())
         pass('kept')
         ngx.say('done')"
    );
    let gw = gated(json!([{"location": "= /parked", "content_by_lua": script}]));
    let mut client = Client::connect(&gw.proxy());
    let address = peer.addr();
    let port = address.rsplit(':').next().expect("a port");
    client.send("GET", &format!("/parked?port={port}"), &[], b"");
    expect(
        &gw,
        &[
            ("/requests", 1),
            ("/coroutines/in_use", 2),
            ("/light_threads", 1),
            ("/sockets/open", 1),
            ("/sockets/idle", 0),
        ],
    );
    open(&gw, "request");
    expect(&gw, &[("/sockets/open", 0), ("/sockets/idle", 1), ("/requests", 1)]);
    open(&gw, "kept");
    assert_eq!(client.reply("GET").text(), "done\n");
    expect(&gw, NOTHING);
    expect(&gw, &[("/sockets/idle", 1), ("/scripts", 2)]);
}

#[test]
fn what_ends_with_an_error_or_an_exit_leaves_nothing() {
    let holds = "ngx.thread.spawn(function() ngx.sleep(3600) end)
         assert(ngx.socket.udp():setpeername('127.0.0.1', 9))
         local sock = ngx.socket.tcp() sock:settimeout(3600e3)
         ngx.thread.spawn(function() sock:connect('127.0.0.1', ngx.var.arg_port) sock:receive(1) end)\n";
    let gw = gated(json!([
        {"location": "= /error", "content_by_lua": format!("{holds} error('boom')")},
        {"location": "= /exit", "content_by_lua": format!("{holds} ngx.exit(204)")},
        {"location": "= /gone", "options": {"lua_check_client_abort": "on"},
         "content_by_lua": format!("{holds} ngx.sleep(3600)")},
    ]));
    let peer = Upstream::serving(|_, mut stream| {
        let _ = stream.read(&mut [0; 16]);
    });
    let address = peer.addr();
    let query = format!("?port={}", address.rsplit(':').next().expect("a port"));
    assert_eq!(gw.get(&format!("/error{query}")).status, 500);
    assert_eq!(gw.get(&format!("/exit{query}")).status, 204);
    expect(&gw, NOTHING);
    let mut client = Client::connect(&gw.proxy());
    client.send("GET", &format!("/gone{query}"), &[], b"");
    expect(&gw, &[("/requests", 1), ("/coroutines/in_use", 3), ("/light_threads", 2), ("/sockets/open", 2)]);
    drop(client);
    expect(&gw, NOTHING);
}

#[test]
fn timers_are_counted_and_end_with_their_vm() {
    let script = format!(
        "{GATE} assert(ngx.timer.at(3600, function() end))
         assert(ngx.timer.at(0, function(premature) pass('timer') end))
         ngx.say('ok')"
    );
    let gw = gated(json!([{"location": "= /timers", "content_by_lua": script}]));
    assert_eq!(gw.get("/timers").status, 200);
    expect(&gw, &[("/timers/pending", 1), ("/timers/running", 1), ("/requests", 1)]);
    reload(&gw);
    let ending = || vms(&gw).into_iter().find(|vm| vm["serving"] == false);
    let old = eventually("the old VM ends", || ending().filter(|vm| vm["timers"]["pending"] == 0));
    assert_eq!((&old["purpose"], &old["timers"]), (&json!("plugins"), &json!({"pending": 0, "running": 1})));
    open(&gw, "timer");
    eventually("the old VM is gone", || ending().is_none().then_some(()));
    expect(&gw, NOTHING);
}

#[test]
fn plans_are_counted_and_a_parked_request_keeps_its_old_vm() {
    let up = Upstream::echo();
    let gw = gated(json!([{"location": "= /none", "content_by_lua": "ngx.say('')"}]));
    let held = format!("{GATE} return function() pass('plugin') end");
    gw.put(
        "/routes/1",
        json!({"uri": "/route", "plugins": {"serverless-pre-function": {"functions": [held]}},
               "upstream": {"nodes": {up.addr(): 1}}}),
    );
    // Paths of no location are the routes'.
    let mut client = Client::connect(&gw.proxy());
    client.send("GET", "/route", &[], b"");
    expect(&gw, &[("/plans", 1), ("/requests", 1)]);
    reload(&gw);
    let old = vms(&gw).into_iter().find(|vm| vm["serving"] == false).expect("the old VM");
    assert_eq!((&old["plans"], &old["requests"], &old["coroutines"]["in_use"]), (&json!(1), &json!(1), &json!(1)));
    open(&gw, "plugin");
    assert_eq!(client.reply("GET").status, 200);
    eventually("the old VM is gone", || vms(&gw).iter().all(|vm| vm["serving"] == true).then_some(()));
    expect(&gw, NOTHING);
}

#[test]
fn a_function_that_waits_is_counted_in_its_own_vm() {
    let gw = gated(json!([{"location": "= /none", "content_by_lua": "ngx.say('')"}]));
    let source = format!("{GATE} return function() pass('function') return 200, 'done' end");
    gw.admin_text("PUT", "/functions/f", &source, "text/plain");
    gw.put("/routes/1", json!({"uri": "/f", "function_id": "f"}));
    let mut client = Client::connect(&gw.proxy());
    client.send("GET", "/f", &[], b"");
    expect(&gw, &[("/requests", 1), ("/functions", 1)]);
    let own: Vec<_> = vms(&gw).into_iter().filter(|vm| vm["purpose"] == "functions").collect();
    assert_eq!((own.len(), &own[0]["requests"], &own[0]["coroutines"]["in_use"]), (1, &json!(1), &json!(1)));
    open(&gw, "function");
    assert_eq!(client.reply("GET").text(), "done");
    expect(&gw, NOTHING);
}

#[test]
fn a_worker_that_a_script_keeps_busy_is_named() {
    let gw = Gateway::with(json!({
        "lua": {"limits": {"cpu_ms": 3_600_000}},
        "nginx_config": {"worker_processes": 1},
        "lua_locations": [{"location": "= /busy", "content_by_lua": "ngx.log(ngx.WARN, 'busy now') while true do end"}],
    }));
    let mut client = Client::connect(&gw.proxy());
    client.send("GET", "/busy", &[], b"");
    gw.expect_log("busy now");
    let told = get(&gw.control(), "/v1/lua").json();
    // Beside them stands what the control thread does, which is another matter.
    assert_eq!(told["workers"], json!([{"id": 0, "error": "no answer within 2s: a script keeps it busy"}]));
}
