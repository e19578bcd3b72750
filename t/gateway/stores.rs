//! Walks 7 and 8: what is written stays; etcd; one file.

use serde_json::json;

use crate::support::{Dir, Gateway, Upstream, eventually, get, peers::Etcd};

fn on_etcd(etcd: &Etcd) -> serde_json::Value {
    json!({"deployment": {"role": "traditional", "role_traditional": {"config_provider": "etcd"},
        "etcd": {"host": [etcd.url()], "prefix": "/apisix", "timeout": 5}}})
}

fn route_json(uri: &str, up: &Upstream) -> String {
    json!({"uri": uri, "upstream": {"type": "roundrobin", "nodes": {up.addr(): 1}}}).to_string()
}

fn served(gw: &Gateway, path: &str) {
    eventually(&format!("{path} is served"), || (gw.get(path).status == 200).then_some(()));
}

fn gone(gw: &Gateway, path: &str) {
    eventually(&format!("{path} is gone"), || (gw.get(path).status == 404).then_some(()));
}

#[test]
fn everything_is_there_after_a_restart() {
    let up = Upstream::echo();
    let mut gw = Gateway::start();
    gw.route("1", "/kept", &up, json!({"key-auth": {}}));
    gw.put("/consumers", json!({"username": "jack", "plugins": {"key-auth": {"key": "k"}}}));
    assert!(gw.quit().success());
    gw.launch();
    assert_eq!(gw.get("/kept").status, 401);
    assert_eq!(gw.send("GET", "/kept", &[("apikey", "k")], b"").status, 200);
}

#[test]
fn an_acknowledged_write_survives_sigkill_at_any_moment() {
    let mut gw = Gateway::start();
    let route = |n: u32| json!({"uri": format!("/r{n}"), "upstream": {"nodes": {"127.0.0.1:1": 1}}});
    let mut acknowledged = 0;
    for round in 0..50 {
        let (admin, key) = (gw.admin_address(), gw.key());
        let pid = gw.pid();
        // Kills while writes are under way, a little later in each round.
        let killer = std::thread::spawn(move || {
            std::thread::park_timeout(std::time::Duration::from_micros(400 * round));
            // SAFETY: the process lives until `kill` below reaps it.
            unsafe { libc::kill(pid as i32, libc::SIGKILL) };
        });
        for _ in 0..200 {
            let n = acknowledged;
            let written = std::panic::catch_unwind(|| {
                let headers = [("X-API-KEY", key.as_str())];
                let body = route(n).to_string();
                crate::support::request(&admin, "PUT", &format!("/apisix/admin/routes/{n}"), &headers, body.as_bytes())
            });
            match written {
                Ok(reply) if reply.status == 201 || reply.status == 200 => acknowledged += 1,
                _ => break,
            }
        }
        killer.join().expect("the killer ends");
        gw.kill();
        gw.launch();
        if acknowledged > 0 {
            let last = gw.admin("GET", &format!("/routes/{}", acknowledged - 1), ());
            assert_eq!(last.status, 200, "round {round}: write {} was acknowledged", acknowledged - 1);
        }
    }
    let list = gw.admin("GET", "/routes", ()).json();
    assert!(
        list["total"].as_u64() >= Some(acknowledged.into()),
        "{acknowledged} acknowledged, {} there",
        list["total"]
    );
    assert!(acknowledged > 0, "some writes were acknowledged");
}

#[test]
fn etcd_data_is_served_and_changes_show_on_every_node() {
    let (etcd, up) = (Etcd::start(), Upstream::echo());
    etcd.put("/apisix/routes/", "init_dir");
    etcd.put("/apisix/routes/1", &route_json("/from-etcd", &up));
    let (a, b) = (Gateway::with(on_etcd(&etcd)), Gateway::with(on_etcd(&etcd)));
    served(&a, "/from-etcd");
    served(&b, "/from-etcd");
    a.route("2", "/from-a", &up, json!({}));
    assert_eq!(a.get("/from-a").status, 200, "the writer serves its own write at once");
    served(&b, "/from-a");
    assert!(etcd.get("/apisix/routes/2").contains("/from-a"));
    etcd.delete("/apisix/routes/1");
    gone(&a, "/from-etcd");
    gone(&b, "/from-etcd");
}

#[test]
fn a_dead_etcd_leaves_the_last_good_config_serving_and_it_catches_up() {
    let (mut etcd, up) = (Etcd::start(), Upstream::echo());
    etcd.put("/apisix/routes/1", &route_json("/one", &up));
    let mut gw = Gateway::with(on_etcd(&etcd));
    served(&gw, "/one");
    etcd.stop();
    for _ in 0..5 {
        assert_eq!(gw.get("/one").status, 200);
    }
    gw.quit();
    gw.launch();
    assert_eq!(gw.get("/one").status, 200, "started without etcd from the last good config");
    gw.expect_log("last good");
    etcd.restart();
    etcd.put("/apisix/routes/2", &route_json("/two", &up));
    served(&gw, "/two");
    etcd.stop();
    etcd.restart();
    for n in 0..20 {
        etcd.put("/apisix/routes/3", &route_json(&format!("/three{n}"), &up));
    }
    etcd.delete("/apisix/routes/1");
    etcd.compact();
    served(&gw, "/three19");
    gone(&gw, "/one");
}

#[test]
fn an_invalid_object_is_skipped_and_shown_and_the_rest_serves() {
    let (etcd, up) = (Etcd::start(), Upstream::echo());
    etcd.put("/apisix/routes/1", &route_json("/good", &up));
    etcd.put("/apisix/routes/2", "{\"uri\": 5}");
    etcd.put("/apisix/routes/3", "not json");
    let gw = Gateway::with(on_etcd(&etcd));
    served(&gw, "/good");
    let errors = get(&gw.control(), "/v1/config/errors").text();
    assert!(errors.contains("/routes/2") && errors.contains("/routes/3"), "{errors}");
    etcd.put("/apisix/routes/1", "{\"uri\": 5}");
    eventually("the error shows", || {
        get(&gw.control(), "/v1/config/errors").text().contains("/routes/1").then_some(())
    });
    assert_eq!(gw.get("/good").status, 200, "a bad config never replaces a good one");
}

#[test]
fn a_file_is_served_and_its_changes_are_picked_up() {
    let up = Upstream::echo();
    let dir = Dir::new();
    dir.configure(json!({"deployment": {"role": "data_plane", "role_data_plane": {"config_provider": "yaml"}}}));
    let file = |uri: &str| {
        format!("routes:\n  - id: 1\n    uri: {uri}\n    upstream:\n      nodes:\n        \"{}\": 1\n#END\n", up.addr())
    };
    dir.write("conf/apisix.yaml", file("/first"));
    let gw = Gateway::in_dir(dir);
    served(&gw, "/first");
    gw.dir.write("conf/apisix.yaml", file("/second"));
    served(&gw, "/second");
    assert_eq!(gw.get("/first").status, 404);
    gw.dir.write("conf/apisix.yaml", "routes: [ this is not: yaml\n#END\n");
    gw.expect_log("apisix.yaml");
    assert_eq!(gw.get("/second").status, 200);
}

#[test]
fn a_long_section_is_loaded_without_waiting_for_a_change() {
    let items: String = (0..1001).map(|n| format!("  - {{id: i{n}, n: {n}}}\n")).collect();
    // Something is followed already when the object for the long section is made.
    let gw = from_file(&format!(
        "own_section:\n  - {{id: a, n: 1}}\n  - {{n: 2}}\nown_table: {{n: 3}}\nlong:\n{items}#END\n"
    ));
    eventually("the configuration is served", || (gw.get("/own").status == 200).then_some(()));
    eventually("the long section is loaded", || (gw.get("/long").text() == "1001\n").then_some(()));
}

fn from_file(text: &str) -> Gateway {
    let dir = Dir::new();
    dir.configure(json!({"deployment": {"role": "data_plane", "role_data_plane": {"config_provider": "yaml"}},
        "nginx_config": {"worker_processes": 1},
        "lua_locations": [{"location": "= /long", "content_by_lua":
            "local core = require('apisix.core')
             long = long or core.config.new('/long', { automatic = true })
             ngx.say(#long.values)"
        }, {"location": "= /own", "content_by_lua":
            "local core = require('apisix.core')
             own = own or core.config.new('/own_section', { automatic = true })
             local single = core.config.new('/own_table', { automatic = true, single_item = true })
             local _, err = core.etcd.set('/routes/1', {})
             ngx.say(core.config.type, ' ', own:get('a').value.n, ' ', own:get('arr_2').value.n, ' ', single.values[1].value.n, ' ', err)"
        }]}));
    dir.write("conf/apisix.yaml", text);
    Gateway::in_dir(dir)
}

#[test]
fn a_request_is_refused_when_what_its_route_names_is_not_there() {
    let up = Upstream::echo();
    let upstream = format!("upstream: {{nodes: {{\"{}\": 1}}}}", up.addr());
    let gw = from_file(&format!(
        "routes:
  - {{id: 1, uri: /service, service_id: no}}
  - {{id: 2, uri: /config, plugin_config_id: bad, {upstream}}}
  - {{id: 3, uri: /group, plugins: {{key-auth: {{}}}}, {upstream}}}
  - {{id: 4, uri: /fine, {upstream}}}
plugin_configs:
  - {{id: bad, plugins: {{key-auth: {{header: 1}}}}}}
plugin_metadata:
  - {{id: not-loaded, log_format: {{a: b}}}}
consumers:
  - {{username: jack, group_id: none, plugins: {{key-auth: {{key: k}}}}}}
  - {{username: rose}}
  - {{id: rose/credentials/one, name: one, plugins: {{key-auth: {{key: r}}}}}}
#END
"
    ));
    served(&gw, "/fine");
    assert_eq!(gw.get("/service").status, 404);
    assert!(gw.get("/service").text().contains("404 Not Found"));
    gw.expect_log("failed to fetch service configuration by id: no");
    assert_eq!(gw.get("/config").status, 503);
    gw.expect_log("failed to fetch plugin config by id: bad");
    assert_eq!(gw.get("/group").status, 401);
    assert_eq!(gw.send("GET", "/group", &[("apikey", "k")], b"").status, 503);
    gw.expect_log("failed to fetch consumer group config by id: none");
    assert_eq!(gw.send("GET", "/group", &[("apikey", "r")], b"").status, 200);
    assert!(!gw.log().contains("plugin_metadata"), "{}", gw.log());
}

#[test]
fn a_file_lists_plugins_and_holds_sections_of_scripts() {
    let up = Upstream::echo();
    let file = |plugins: &str| {
        format!(
            "routes:
  - {{id: 1, uri: /echo, plugins: {{echo: {{body: hi}}}}, upstream: {{nodes: {{\"{}\": 1}}}}}}
  - just a text
own_section:
  - {{id: a, n: 1}}
  - {{n: 2}}
own_table: {{n: 3}}
plugins:{plugins}
#END
",
            up.addr()
        )
    };
    let gw = from_file(&file("\n  - name: echo"));
    assert_eq!(gw.get("/echo").text(), "hi");
    gw.expect_log("invalid item data of [/apisix/routes/arr_2], val: just a text, it should be an object");
    let own = gw.get("/own").text();
    assert!(own.starts_with("yaml 1 2 3 ") && own.contains("edit that file"), "{own}");
    gw.dir.write("conf/apisix.yaml", file("\n  - name: echo\n    stream: text"));
    gw.expect_log(
        "failed to validate item 1: property \"stream\" validation failed: wrong type: expected boolean, got string",
    );
    assert_eq!(gw.get("/echo").text(), "hi", "the list before goes on");
    // A list without names: none is loaded, and what needs one is not served.
    let gw = from_file(&file(""));
    assert_eq!(gw.get("/echo").status, 404);
    gw.expect_log("failed to check item data of [routes] err:unknown plugin [echo]");
}
