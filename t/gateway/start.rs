//! Walk 1: one command, and it says where it is; the verbs; draining.

use std::os::unix::fs::PermissionsExt;

use serde_json::json;

use crate::support::{Client, Dir, Gateway, Upstream, eventually, get, http, run};

#[test]
fn starts_without_a_configuration_file_and_says_what_to_do_next() {
    let gw = Gateway::start();
    let banner = eventually("the banner", || Some(gw.dir.read("logs/stdout")).filter(|s| s.contains("X-API-KEY")));
    for expected in [gw.proxy(), gw.admin_address(), gw.control(), "embedded".into(), "data/admin_key".into()] {
        assert!(banner.contains(&expected), "{expected} in {banner}");
    }
    assert_eq!(gw.get("/").status, 404);
    assert_eq!(gw.get("/").json(), json!({"error_msg": "404 Route Not Found"}));
}

#[test]
fn memory_that_is_given_back_stays_with_the_kernel() {
    let gw = Gateway::start();
    let status = std::fs::read_to_string(format!("/proc/{}/status", gw.pid())).expect("a live process");
    assert!(status.contains("THP_enabled:\t0"), "huge pages would be filled up again: {status}");
}

#[test]
fn the_admin_key_is_generated_once_and_only_its_owner_reads_it() {
    let mut gw = Gateway::start();
    let key = gw.key();
    assert!(key.len() >= 32, "{key}");
    let mode = std::fs::metadata(gw.dir.join("data/admin_key")).expect("the key file").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    gw.quit();
    gw.launch();
    assert_eq!(gw.key(), key);
}

#[test]
fn test_prints_every_mistake_at_once_and_exits_1() {
    let dir = Dir::new();
    dir.write(
        "conf/config.yaml",
        "apisix:\n  node_listen: [99999]\n  router: {http: nonsense}\ndeployment:\n  role: king\nnginx_config:\n  \
         http_server_configuration_snippet: 'x y;'\n",
    );
    let mut command = dir.command();
    command.arg("test");
    let (status, text) = run(command);
    assert_eq!(status.code(), Some(1), "{text}");
    for path in ["apisix.node_listen", "apisix.router.http", "deployment.role", "http_server_configuration_snippet"] {
        assert!(text.contains(path), "{path} in {text}");
    }
}

#[test]
fn test_accepts_a_good_configuration() {
    let dir = Dir::new();
    dir.configure(json!({}));
    let mut command = dir.command();
    command.arg("test");
    let (status, text) = run(command);
    assert!(status.success(), "{text}");
}

#[test]
fn an_unsupported_key_becomes_a_warning_when_it_is_named() {
    let dir = Dir::new();
    dir.configure(json!({
        "apisix": {"allow_unsupported": ["nginx_config.http_server_configuration_snippet"]},
        "nginx_config": {"http_server_configuration_snippet": "x y;"},
    }));
    let mut command = dir.command();
    command.arg("test");
    let (status, text) = run(command);
    assert!(status.success(), "{text}");
    assert!(text.contains("http_server_configuration_snippet"), "{text}");
}

#[test]
fn version_and_help_say_what_they_should() {
    let dir = Dir::new();
    let mut command = dir.command();
    command.arg("version");
    let (status, text) = run(command);
    assert!(status.success() && text.contains(env!("CARGO_PKG_VERSION")), "{text}");
    let mut command = dir.command();
    command.arg("help");
    let (status, text) = run(command);
    assert!(status.success(), "{text}");
    for verb in ["start", "stop", "quit", "reload", "restart", "test", "version"] {
        assert!(text.contains(verb), "{verb} in {text}");
    }
}

#[test]
fn quit_finishes_the_request_in_flight_and_refuses_new_ones() {
    let (release, hold) = std::sync::mpsc::channel::<()>();
    let hold = std::sync::Mutex::new(hold);
    let up = Upstream::answering(move |_| {
        hold.lock().expect("one request").recv().expect("released");
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfinal"
    });
    let mut gw = Gateway::start();
    gw.route("1", "/slow", &up, json!({}));
    let proxy = gw.proxy();
    let mut client = Client::connect(&proxy);
    client.send("GET", "/slow", &[], b"");
    eventually("the upstream has it", || (!up.seen().is_empty()).then_some(()));
    gw.signal(libc::SIGQUIT);
    eventually("new connections are refused", || std::net::TcpStream::connect(&proxy).err());
    release.send(()).expect("the upstream waits");
    let reply = client.reply("GET");
    assert_eq!((reply.status, reply.text().as_str()), (200, "final"));
    assert!(gw.wait().success());
}

#[test]
fn usr1_reopens_the_logs() {
    let gw = Gateway::start();
    gw.get("/before");
    eventually("access.log is written", || gw.dir.read("logs/access.log").contains("/before").then_some(()));
    std::fs::rename(gw.dir.join("logs/access.log"), gw.dir.join("logs/access.log.1")).expect("rotated");
    gw.signal(libc::SIGUSR1);
    eventually("access.log is there again", || {
        gw.get("/after");
        gw.dir.read("logs/access.log").contains("/after").then_some(())
    });
    assert!(!gw.dir.read("logs/access.log").contains("/before"));
}

#[test]
fn terminate_ends_at_once_and_cleans_up() {
    let up = Upstream::answering(|_| {
        std::thread::park();
        ""
    });
    let mut gw = Gateway::start();
    gw.route("1", "/never", &up, json!({}));
    let mut client = Client::connect(&gw.proxy());
    client.send("GET", "/never", &[], b"");
    eventually("the upstream has it", || (!up.seen().is_empty()).then_some(()));
    gw.signal(libc::SIGTERM);
    assert!(gw.wait().success());
    assert!(!gw.dir.join("logs/moongate.pid").exists() && !gw.dir.join("logs/listen.json").exists());
}

#[test]
fn a_second_interrupt_does_not_wait_for_the_requests_in_flight() {
    let up = Upstream::answering(|_| {
        std::thread::park();
        ""
    });
    let mut gw = Gateway::start();
    gw.route("1", "/never", &up, json!({}));
    let proxy = gw.proxy();
    let mut client = Client::connect(&proxy);
    client.send("GET", "/never", &[], b"");
    eventually("the upstream has it", || (!up.seen().is_empty()).then_some(()));
    gw.signal(libc::SIGINT);
    eventually("new connections are refused", || std::net::TcpStream::connect(&proxy).err());
    gw.signal(libc::SIGINT);
    assert!(gw.wait().success());
}

#[test]
fn a_drain_ends_with_worker_shutdown_timeout() {
    let up = Upstream::answering(|_| {
        std::thread::park();
        ""
    });
    let mut gw = Gateway::with(json!({"nginx_config": {"worker_shutdown_timeout": "1s", "worker_processes": 1}}));
    gw.route("1", "/never", &up, json!({}));
    let mut client = Client::connect(&gw.proxy());
    client.send("GET", "/never", &[], b"");
    eventually("the upstream has it", || (!up.seen().is_empty()).then_some(()));
    gw.signal(libc::SIGQUIT);
    assert!(gw.wait().success());
    gw.expect_log("1 connections are cut: worker_shutdown_timeout (1s) is over");
    assert!(client.closed());
}

/// A gateway whose worker is inside a script that does not end.
fn busy(nginx_config: serde_json::Value) -> Gateway {
    let gw = Gateway::with(json!({
        "lua": {"limits": {"cpu_ms": 3_600_000}},
        "nginx_config": nginx_config,
        "lua_locations": [{"location": "= /busy", "content_by_lua": "ngx.log(ngx.WARN, 'busy now') while true do end"}],
    }));
    Client::connect(&gw.proxy()).send("GET", "/busy", &[], b"");
    gw.expect_log("busy now");
    gw
}

#[test]
fn a_stop_waits_only_so_long_for_a_worker_inside_a_script() {
    let mut gw = busy(json!({"worker_processes": 1}));
    gw.signal(libc::SIGTERM);
    gw.wait();
    gw.expect_log("1 workers are cut off");
}

#[test]
fn a_drain_waits_only_so_long_for_a_worker_inside_a_script() {
    let mut gw = busy(json!({"worker_shutdown_timeout": "1s", "worker_processes": 1}));
    gw.signal(libc::SIGQUIT);
    gw.wait();
    gw.expect_log("1 workers do not end");
    gw.expect_log("1 workers are cut off");
}

/// A timer that is told to end, and does not.
const STUBBORN: &str = "
    local function stay(premature) ngx.log(ngx.WARN, 'premature: ', premature) while true do ngx.sleep(1) end end
    assert(ngx.timer.at(3600, stay)) ngx.say('set')";

#[test]
fn timers_that_do_not_end_are_cut_off() {
    for signal in [libc::SIGTERM, libc::SIGQUIT] {
        let mut gw = Gateway::with(json!({
            "nginx_config": {"worker_processes": 1},
            "lua_locations": [{"location": "= /set", "content_by_lua": STUBBORN}],
        }));
        assert_eq!(gw.get("/set").text(), "set\n");
        gw.signal(signal);
        assert!(gw.wait().success());
        gw.expect_log("premature: true");
        gw.expect_log("1 timers of plugins are cut off");
    }
}

#[test]
fn hang_up_reads_the_configuration_again_and_refuses_a_broken_one() {
    let gw = Gateway::start();
    gw.dir.write("conf/config.yaml", "apisix: {node_listen: [99999]}\n");
    gw.signal(libc::SIGHUP);
    gw.expect_log("apisix.node_listen");
    gw.expect_log("the old one goes on");
    gw.dir.configure(json!({"apisix": {"enable_http2": false}, "nginx_config": {"error_log_level": "debug"}}));
    gw.signal(libc::SIGHUP);
    gw.expect_log("need a restart: apisix.enable_http2\n");
    assert_eq!(gw.get("/").status, 404);
}

#[test]
fn hang_up_brings_locations_plugins_and_dictionaries_while_requests_run() {
    let upstream = Upstream::echo();
    let location = |text: &str| {
        let count = format!("ngx.say('{text} ', ngx.shared.kept:incr('n', 1, 0), ' ', ngx.shared.new ~= nil)");
        let wait = "ngx.say('first') ngx.flush(true) while not ngx.shared.kept:get('go') do ngx.sleep(0.005) end ngx.say('last')";
        json!([
            {"location": "= /t", "content_by_lua": count},
            {"location": "= /go", "content_by_lua": "ngx.shared.kept:set('go', true) ngx.say('ok')"},
            {"location": "= /wait", "content_by_lua": wait},
        ])
    };
    let settings = |text: &str| {
        json!({"plugins": ["key-auth"], "nginx_config": {"worker_processes": 1},
            "lua_shared_dict": {"kept": "1m"}, "lua_locations": location(text)})
    };
    let gw = Gateway::with(settings("old"));
    assert_eq!(gw.get("/t").text(), "old 1 false\n");
    let refused = gw.admin("PUT", "/routes/1", json!({"uri": "/echo", "plugins": {"mine": {}}, "upstream": {"type": "roundrobin", "nodes": {upstream.addr(): 1}}}));
    assert_eq!((refused.status, refused.text().contains("unknown plugin [mine]")), (400, true), "{}", refused.text());
    let mut slow = Client::connect(&gw.proxy());
    slow.send("GET", "/wait", &[], b"");
    slow.head();
    assert_eq!(slow.chunk().unwrap(), b"first\n");
    gw.dir.write(
        "plugins/mine.lua",
        "return { version = 1, priority = 1, name = 'mine', schema = { type = 'object' },
            access = function() return 200, 'mine' end }",
    );
    let mut next = settings("new");
    next["plugins"] = json!(["key-auth", "mine"]);
    next["lua_shared_dict"]["new"] = json!("1m");
    gw.dir.configure(next);
    gw.signal(libc::SIGHUP);
    let seen = eventually("the new location", || Some(gw.get("/t").text()).filter(|text| text.starts_with("new")));
    assert!(seen.ends_with(" true\n") && seen != "new 1 true\n", "the dictionary was kept, and one is new: {seen}");
    gw.put("/routes/1", json!({"uri": "/echo", "plugins": {"mine": {}}, "upstream": {"type": "roundrobin", "nodes": {upstream.addr(): 1}}}));
    assert_eq!(gw.get("/echo").text(), "mine");
    assert!(matches!(serving(&gw)[..], [true, false, ..]), "the old VM is there as long as its request");
    assert_eq!(gw.get("/go").text(), "ok\n");
    assert_eq!(slow.chunk().unwrap(), b"last\n", "what ran before the reload ends as it began");
    // Its VM goes with it.
    eventually("one VM of plugins", || (serving(&gw) == [true]).then_some(()));
    let broken = "ngx.timer.every(3600, function(early) ngx.log(ngx.WARN, 'left behind: ', early) end) error('broken')";
    gw.dir.configure(json!({"lua_init": {"init_by_lua": broken}, "lua_locations": location("broken")}));
    gw.signal(libc::SIGHUP);
    gw.expect_log("what was loaded before goes on");
    assert!(gw.get("/t").text().starts_with("new"));
    // The timers of a VM that never served end with it.
    gw.expect_log("left behind: true");
}

/// Of each VM of the only worker, whether it takes new requests.
fn serving(gw: &Gateway) -> Vec<bool> {
    let state = http::get(&gw.control(), "/v1/lua").json();
    let vms = state["workers"][0]["vms"].as_array().expect("a list");
    vms.iter().map(|vm| vm["serving"] == true).collect()
}

#[test]
fn what_a_reload_has_replaced_ends_before_the_worker_does() {
    let flush = "assert(ngx.timer.at(3600, function(early) ngx.log(ngx.WARN, 'flush begins') ngx.sleep(0.5) \
        ngx.log(ngx.WARN, 'flushed: ', early) end)) ngx.say('set')";
    let settings = |text: &str| {
        json!({
            "nginx_config": {"worker_processes": 1},
            "lua_init": {"exit_worker_by_lua": format!("ngx.log(ngx.WARN, 'bye of the {text}')")},
            "lua_locations": [{"location": "= /set", "content_by_lua": flush},
                {"location": "= /t", "content_by_lua": format!("ngx.say('{text}')")}],
        })
    };
    let mut gw = Gateway::with(settings("old"));
    assert_eq!(gw.get("/set").text(), "set\n");
    gw.dir.configure(settings("new"));
    gw.signal(libc::SIGHUP);
    eventually("the new location", || (gw.get("/t").text() == "new\n").then_some(()));
    gw.expect_log("flush begins");
    gw.signal(libc::SIGQUIT);
    assert!(gw.wait().success());
    for told in ["flushed: true", "bye of the old", "bye of the new"] {
        assert!(gw.log().contains(told), "{told}");
    }
}

#[test]
fn environment_variables_of_the_configuration_are_there_for_scripts_and_secrets() {
    let gw = Gateway::with(json!({
        "nginx_config": {"envs": ["PATH", "OF_THE_FILE=a=b"]},
        "lua_locations": [{"location": "= /t", "content_by_lua": "ngx.say(os.getenv('OF_THE_FILE'), ' ', os.getenv('PATH') ~= nil)"}],
    }));
    assert_eq!(gw.get("/t").text(), "a=b true\n");
}

#[test]
fn a_test_node_has_the_apis_on_its_own_port() {
    let settings = json!({
        "deployment": {"admin": {"admin_key": null}},
        "test_node": {"serve_on_node": ["admin", "control"]},
    });
    let gw = Gateway::with(settings);
    let body = r#"{"uri": "/x", "plugins": {"mocking": {"response_example": "hi"}}}"#;
    let put = gw.send("PUT", "/apisix/admin/routes/1", &[("Content-Type", "application/json")], body.as_bytes());
    assert_eq!(put.status, 201, "{}", put.text());
    assert_eq!(gw.get("/x").text(), "hi");
    assert_eq!(gw.get("/v1/schema").status, 200);
    assert_eq!(gw.get("/else").json()["error_msg"], "404 Route Not Found");
    gw.expect_log("test_node.serve_on_node: the Admin API is on the node's own port, and open");
    let closed = Gateway::with(json!({"test_node": {"serve_on_node": []}}));
    assert_eq!(closed.get("/apisix/admin/routes").status, 404);
    assert_eq!(closed.get("/v1/schema").status, 404);
}

#[test]
fn a_test_node_with_a_key_asks_for_it_on_its_own_port() {
    let key = json!([{"name": "admin", "key": "chosen", "role": "admin"}]);
    for admin in [json!({"admin_key": key}), json!({"admin_key": null, "admin_key_required": true})] {
        let gw = Gateway::with(json!({"deployment": {"admin": admin}, "test_node": {"serve_on_node": ["admin"]}}));
        assert_eq!(gw.get("/apisix/admin/routes").status, 401);
        assert_eq!(gw.send("GET", "/apisix/admin/routes", &[("X-API-KEY", "wrong")], b"").status, 401);
        let key = if admin["admin_key"].is_null() { gw.key() } else { "chosen".into() };
        assert_eq!(gw.send("GET", "/apisix/admin/routes", &[("X-API-KEY", &key)], b"").status, 200);
    }
}

#[test]
fn which_apis_a_test_node_has_on_its_port_is_decided_at_the_start() {
    let settings = |apis: serde_json::Value, text: &str| {
        json!({
            "test_node": {"serve_on_node": apis},
            "nginx_config": {"worker_processes": 1},
            "lua_locations": [{"location": "= /t", "content_by_lua": format!("ngx.say('{text}')")}],
        })
    };
    let gw = Gateway::with(settings(json!(["control"]), "old"));
    let reload = |apis, text: &str| {
        gw.dir.configure(settings(apis, text));
        gw.signal(libc::SIGHUP);
        eventually("the new location", || (gw.get("/t").text() == format!("{text}\n")).then_some(()));
    };
    reload(json!(["admin"]), "new");
    assert_eq!((gw.get("/apisix/admin/routes").status, gw.get("/v1/schema").status), (404, 200));
    gw.expect_log("need a restart: ");
    reload(json!([]), "newer");
    assert_eq!((gw.get("/apisix/admin/routes").status, gw.get("/v1/schema").status), (404, 200));
}

#[test]
fn the_verbs_find_the_gateway_by_its_directory() {
    let dir = Dir::new();
    dir.configure(json!({}));
    let verb = |verb: &str| {
        let mut command = dir.command();
        command.arg(verb);
        run(command)
    };
    let (status, text) = verb("stop");
    assert!(!status.success() && text.contains("no gateway runs"), "{text}");
    let (status, text) = verb("start");
    assert!(status.success() && text.contains("X-API-KEY"), "{text}");
    let _stopped = Stopped(&dir);
    let pid = dir.read("logs/moongate.pid");
    let (status, text) = verb("start");
    assert!(!status.success() && text.contains(pid.trim()), "{text}");
    let (status, text) = verb("reload");
    assert!(status.success(), "{text}");
    let (status, text) = verb("restart");
    assert!(status.success(), "{text}");
    assert_ne!(dir.read("logs/moongate.pid"), pid);
    let (status, text) = verb("quit");
    assert!(status.success(), "{text}");
    eventually("the gateway ends", || (!dir.join("logs/moongate.pid").exists()).then_some(()));
}

/// Ends a gateway in the background, whatever becomes of the test.
struct Stopped<'a>(&'a Dir);

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        let mut command = self.0.command();
        command.arg("stop");
        run(command);
    }
}

#[test]
fn connections_requests_and_garbage_are_accounted_for() {
    let gw = Gateway::start();
    let mut client = Client::connect(&gw.proxy());
    for _ in 0..3 {
        client.send("GET", "/", &[], b"");
        assert_eq!(client.reply("GET").status, 404);
    }
    let lines = [
        "apisix_nginx_http_current_connections{state=\"accepted\"} 1",
        "apisix_nginx_http_current_connections{state=\"active\"} 1",
        "apisix_nginx_http_current_connections{state=\"writing\"} 0",
        "apisix_http_requests_total 3",
    ];
    // The last answer is there a moment before its request has ended.
    eventually("the counters say what was", || {
        let text = crate::support::get(&gw.prometheus(), "/apisix/prometheus/metrics").text();
        lines.iter().all(|line| text.lines().any(|l| l == *line)).then_some(())
    });
    let reply = crate::support::request(&gw.control(), "POST", "/v1/gc", &[], b"");
    assert_eq!(reply.status, 200);
    client.send("GET", "/", &[], b"");
    assert_eq!(client.reply("GET").status, 404);
}

#[test]
fn a_taken_port_is_said_at_start_and_nothing_is_served() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = taken.local_addr().expect("an address").port();
    for (what, settings) in [
        ("node_listen", json!({"apisix": {"node_listen": [{"ip": "127.0.0.1", "port": port}]}})),
        ("admin", json!({"deployment": {"admin": {"admin_listen": {"ip": "127.0.0.1", "port": port}}}})),
        ("control", json!({"apisix": {"control": {"ip": "127.0.0.1", "port": port}}})),
    ] {
        let dir = Dir::new();
        dir.configure(settings);
        let (status, text) = run(dir.command());
        assert_eq!(status.code(), Some(1), "{what}: {text}");
        assert!(text.contains(&format!("127.0.0.1:{port}")) && text.contains("in use"), "{what}: {text}");
    }
}

/// conf/config-dev.yaml and what goes with it, for a data plane with a file.
fn with_profile() -> Dir {
    let dir = Dir::new();
    dir.configure(json!({
        "deployment": {"role": "data_plane", "role_data_plane": {"config_provider": "yaml"}},
        "apisix": {"enable_control": true},
    }));
    std::fs::rename(dir.join("conf/config.yaml"), dir.join("conf/config-dev.yaml")).expect("a renamed file");
    let routes = |answer: &str| {
        let returned = format!("return function() ngx.say('{answer}') ngx.exit(200) end");
        let plugin = json!({"serverless-pre-function": {"functions": [returned]}});
        let route = json!({"id": "1", "uri": "/x", "plugins": plugin, "upstream": {"type": "roundrobin", "nodes": {"127.0.0.1:1": 1}}});
        format!("{}\n#END\n", json!({ "routes": [route] }))
    };
    dir.write("conf/apisix-dev.yaml", routes("of the profile"));
    dir.write("conf/apisix.yaml", routes("of none"));
    dir
}

fn verb(dir: &Dir, profile: &str, words: &[&str]) -> (bool, String) {
    let mut command = dir.command();
    command.env("APISIX_PROFILE", profile).args(words);
    let (status, said) = run(command);
    (status.success(), said)
}

#[test]
fn a_profile_has_files_of_its_own() {
    let dir = with_profile();
    dir.write("conf/debug-dev.yaml", "basic:\n  enable: true\n#END\n");
    assert_eq!(verb(&dir, "dev", &["test"]), (true, "configuration test is successful\n".into()));
    let (started, said) = verb(&dir, "dev", &["start"]);
    assert!(started, "{said}");
    let listen: serde_json::Value = serde_json::from_str(&dir.read("logs/listen.json")).expect("JSON");
    let address = listen["proxy"][0].as_str().expect("an address").to_owned();
    let text = eventually("it serves", || Some(get(&address, "/x")).filter(|r| r.status == 200)).text();
    let debugs = dir.read("logs/error.log").contains("loaded plugin and sort by priority");
    let (reloaded, told) = verb(&dir, "dev", &["reload"]);
    let (stopped, why) = verb(&dir, "dev", &["stop"]);
    assert!(reloaded && stopped, "{told}{why}");
    assert_eq!((&*text, debugs), ("of the profile\n", true));
    let conf = dir.join("conf/config-dev.yaml").display().to_string();
    let (_, report) = verb(&dir, "dev", &["migrate", "check", "--conf", &conf]);
    assert!(report.contains("conf/apisix-dev.yaml"), "{report}");
}

#[test]
fn a_profile_without_its_files_does_not_start_with_others() {
    let dir = with_profile();
    for words in [&["test"][..], &["start"], &[]] {
        let (done, said) = verb(&dir, "prod", words);
        assert!(
            !done && said.contains("conf/config-prod.yaml: there is no such file, and APISIX_PROFILE is prod"),
            "{said}"
        );
    }
    std::fs::remove_file(dir.join("conf/apisix-dev.yaml")).expect("a removed file");
    let (done, said) = verb(&dir, "dev", &["test"]);
    assert!(!done && said.contains("conf/apisix-dev.yaml: there is no such file"), "{said}");
    let (done, said) = verb(&dir, "../dev", &["test"]);
    assert!(!done && said.contains("is no part of a file's name"), "{said}");
    // The command line names the one file that it names.
    dir.configure(json!({}));
    let (done, said) = verb(&dir, "prod", &["-c", "conf/config.yaml", "test"]);
    assert!(done, "{said}");
    assert!(verb(&dir, "", &["test"]).0, "an empty profile is none");
}

#[test]
fn names_of_files_are_below_the_prefix_wherever_it_was_started() {
    let dir = Dir::new();
    dir.configure(json!({"deployment": {"role": "data_plane", "role_data_plane": {"config_provider": "yaml"}}}));
    dir.write("conf/word.txt", "found");
    dir.write(
        "conf/apisix.yaml",
        "routes:\n  - id: 1\n    uri: /*\n    plugins:\n      file-logger: {path: logs/file.log}\n      \
         serverless-pre-function:\n        functions: [\"return function() ngx.say((assert(io.open('conf/word.txt')):read('*a'))) \
         ngx.exit(200) end\"]\n    upstream: {nodes: {\"127.0.0.1:1\": 1}}\n#END\n",
    );
    // The configuration is named relative to where each command is called.
    let verb = |word: &str, at: &str, file: &str| {
        let mut command = dir.command();
        command.current_dir(dir.join(at)).args(["-c", file, word]);
        run(command)
    };
    let asked = || {
        let listen: serde_json::Value = serde_json::from_str(&dir.read("logs/listen.json")).expect("JSON");
        get(listen["proxy"][0].as_str().expect("an address"), "/x").text()
    };
    let (done, said) = verb("start", "data", "../conf/config.yaml");
    assert!(done.success(), "{said}");
    let stopped = Stopped(&dir);
    assert_eq!(asked(), "found\n", "{}", dir.read("logs/error.log"));
    eventually("the entry is written", || dir.read("logs/file.log").contains("\"/x\"").then_some(()));
    let (done, said) = verb("reload", "conf", "config.yaml");
    assert!(done.success(), "{said}");
    eventually("it is reloaded", || {
        dir.read("logs/error.log").contains("the configuration was reloaded").then_some(())
    });
    let (done, said) = verb("restart", "conf", "config.yaml");
    assert!(done.success(), "{said}");
    assert_eq!(asked(), "found\n");
    drop(stopped);

    // In the foreground the working directory is the caller's, and the prefix has what that has not.
    std::fs::create_dir_all(dir.join("data/conf")).expect("a directory");
    std::fs::remove_file(dir.join("logs/file.log")).expect("a removed file");
    let mut child =
        dir.command().current_dir(dir.join("data")).stdout(std::process::Stdio::null()).spawn().expect("it starts");
    let _stopped = Stopped(&dir);
    eventually("it listens", || dir.read("logs/listen.json").contains(&format!(":{}", child.id())).then_some(()));
    assert_eq!(asked(), "found\n", "{}", dir.read("logs/error.log"));
    eventually("the entry is written", || dir.read("logs/file.log").contains("\"/x\"").then_some(()));
    dir.write("data/conf/word.txt", "of the caller's");
    assert_eq!(asked(), "of the caller's\n");
    let (done, said) = verb("stop", "data", "../conf/config.yaml");
    assert!(done.success() && child.wait().is_ok(), "{said}");
}
