//! Plugins that are there and do not load: what they kept out stays out, and somebody is told.

use serde_json::{Value, json};

use crate::support::{Dir, Gateway, Upstream, eventually, get, request, run};

const AUTH: &str = "
    local core = require('apisix.core')
    local lib = require('acme.lib')
    local _M = { version = 0.1, priority = 2500, name = 'acme-auth', schema = { type = 'object' } }
    function _M.rewrite(conf, ctx)
        if core.request.header(ctx, 'x-key') ~= lib.key then return 401, { message = lib.message } end
    end
    return _M";

const MARK: &str = "return { version = 0.1, priority = 1, name = 'acme-mark', schema = { type = 'object' },
    access = function() ngx.header['x-mark'] = 'yes' end }";

fn lib(dir: &Dir, message: &str) {
    dir.write("own/acme/lib.lua", format!("return {{ key = 'open', message = '{message}' }}"));
}

/// A directory whose `own` is in `extra_lua_path`, with `acme-auth` and `acme-mark`.
fn directory(settings: Value) -> Dir {
    let dir = Dir::new();
    for name in ["own/apisix/plugins", "own/acme"] {
        std::fs::create_dir_all(dir.join(name)).expect("a directory");
    }
    dir.write("own/apisix/plugins/acme-auth.lua", AUTH);
    dir.write("own/apisix/plugins/acme-mark.lua", MARK);
    lib(&dir, "first");
    let mut all = json!({"apisix": {"extra_lua_path": format!("{}/?.lua", dir.join("own").display())}});
    for (key, value) in settings.as_object().expect("a map") {
        all[key] = value.clone();
    }
    dir.configure(all);
    dir
}

fn refused_with(gw: &Gateway, message: &str) {
    let reply = gw.get("/auth");
    assert_eq!((reply.status, reply.json()["message"].as_str()), (401, Some(message)));
    assert_eq!(gw.send("GET", "/auth", &[("x-key", "open")], b"").status, 200);
}

fn errors(gw: &Gateway) -> Vec<(String, String)> {
    let list = get(&gw.control(), "/v1/config/errors").json()["errors"].as_array().expect("a list").clone();
    let text = |e: &Value, key: &str| e[key].as_str().expect("text").to_owned();
    list.iter().map(|e| (text(e, "key"), text(e, "error"))).collect()
}

#[test]
fn a_reload_in_which_a_plugin_breaks_changes_nothing_and_says_why() {
    let up = Upstream::echo();
    let gw = Gateway::in_dir(directory(json!({})));
    gw.route("1", "/auth", &up, json!({"acme-auth": {}, "acme-mark": {}}));
    refused_with(&gw, "first");
    let why = [
        ("own/apisix/plugins/acme-auth.lua", "acme-auth.lua:1: unexpected symbol near '<eof>'"),
        ("own/acme/lib.lua", "lib.lua:1: unexpected symbol near '<eof>'"),
    ];
    for (file, why) in why {
        let before = gw.dir.read(file);
        gw.dir.write(file, "return (");
        let told = |text: &str| {
            assert!(text.contains("plugin [acme-auth]") && text.contains(why), "{text}");
            assert!(!text.contains("traceback"), "{text}");
        };
        let reply = gw.admin("PUT", "/plugins/reload", ());
        assert_eq!(reply.status, 500, "{}", reply.text());
        told(reply.json()["error_msg"].as_str().expect("a reason"));
        refused_with(&gw, "first");
        let reply = request(&gw.control(), "PUT", "/v1/plugins/reload", &[], b"");
        assert_eq!(reply.status, 500, "{}", reply.text());
        told(&reply.text());
        refused_with(&gw, "first");
        let (key, text) = errors(&gw).pop().expect("an error");
        assert_eq!(key, "/moongate/plugins_reload");
        told(&text);
        let count = || gw.log().matches("the configuration was not reloaded, the old one goes on").count();
        let known = count();
        gw.signal(libc::SIGHUP);
        eventually("it says so", || (count() > known).then_some(()));
        told(gw.log().lines().rfind(|line| line.contains("was not reloaded")).expect("a line"));
        refused_with(&gw, "first");
        // An upload has every plugin loaded, too.
        let source = MARK.replace("acme-mark", "acme-new");
        let put = gw.admin_text("PUT", "/plugin_sources/acme-new", &source, "text/x-lua");
        assert!(put.status < 300, "{}", put.text());
        refused_with(&gw, "first");
        gw.dir.write(file, before);
        // Any reload mends it, one of the configuration with nothing new in it as well.
        if file.ends_with("lib.lua") {
            gw.signal(libc::SIGHUP);
            eventually("the error is gone", || errors(&gw).is_empty().then_some(()));
        } else {
            assert_eq!(gw.admin("PUT", "/plugins/reload", ()).text(), "done");
        }
        refused_with(&gw, "first");
        assert_eq!(errors(&gw), []);
    }
    // What loads is taken over as before; what is gone is gone.
    lib(&gw.dir, "second");
    assert_eq!(gw.admin("PUT", "/plugins/reload", ()).text(), "done");
    refused_with(&gw, "second");
    std::fs::remove_file(gw.dir.join("own/apisix/plugins/acme-mark.lua")).expect("removed");
    assert_eq!(gw.admin("PUT", "/plugins/reload", ()).text(), "done");
    refused_with(&gw, "second");
    assert_eq!(gw.send("GET", "/auth", &[("x-key", "open")], b"").header("x-mark"), None);
}

#[test]
fn what_a_plugin_that_is_broken_at_the_start_kept_out_stays_out() {
    let up = Upstream::echo();
    let mut gw = Gateway::in_dir(directory(json!({})));
    gw.route("1", "/auth", &up, json!({"acme-auth": {}}));
    gw.route("2", "/off", &up, json!({"acme-auth": {"_meta": {"disable": true}}}));
    gw.route("3", "/key", &up, json!({"key-auth": {}}));
    gw.put("/consumers", json!({"username": "jack", "plugins": {"key-auth": {"key": "k"}, "acme-auth": {}}}));
    refused_with(&gw, "first");
    gw.quit();
    gw.dir.write("own/apisix/plugins/acme-auth.lua", "\nreturn (");
    gw.launch();
    let reached = up.seen().len();
    for _ in 0..2 {
        assert_eq!(gw.send("GET", "/auth", &[("x-key", "open")], b"").status, 500);
        assert_eq!(gw.send("GET", "/key", &[("apikey", "k")], b"").status, 500);
        assert_eq!(gw.get("/key").status, 401);
    }
    assert_eq!(up.seen().len(), reached, "none of them has come through");
    assert_eq!(gw.get("/off").status, 200);
    gw.expect_log("plugin [acme-auth] of /routes/1 does not load: requests for it are answered with 500");
    gw.expect_log("plugin [acme-auth] of /consumers/jack does not load: requests for it are answered with 500");
    let (key, text) = errors(&gw).pop().expect("an error");
    assert_eq!(key, "/plugins/acme-auth");
    assert!(text.contains("acme-auth.lua:2:"), "{text}");
    gw.dir.write("own/apisix/plugins/acme-auth.lua", AUTH);
    assert_eq!(gw.admin("PUT", "/plugins/reload", ()).text(), "done");
    assert_eq!(gw.get("/auth").status, 401);
    assert_eq!(errors(&gw), []);
}

#[test]
fn objects_of_a_file_are_not_open_either() {
    let up = Upstream::echo();
    let dir = directory(json!({"deployment": {"role": "data_plane", "role_data_plane": {"config_provider": "yaml"}}}));
    let objects = json!({
        "global_rules": [{"id": "1", "plugins": {"acme-auth": {}}}],
        "routes": [{"id": "1", "uri": "/open", "upstream": {"type": "roundrobin", "nodes": {up.addr(): 1}}}],
    });
    dir.write("conf/apisix.yaml", format!("{objects}\n#END\n"));
    dir.write("own/apisix/plugins/acme-auth.lua", "error('not today')");
    let gw = Gateway::in_dir(dir);
    assert_eq!(gw.get("/open").status, 500);
    assert!(up.seen().is_empty());
    gw.expect_log("plugin [acme-auth] of /global_rules/1 does not load");
}

#[test]
fn the_test_of_a_configuration_loads_the_plugins() {
    let dir = directory(json!({"plugins": ["key-auth", "acme-absent", "acme-auth"]}));
    let test = || {
        let mut command = dir.command();
        command.arg("test");
        run(command)
    };
    let (status, text) = test();
    assert!(status.success(), "{text}");
    dir.write("own/acme/lib.lua", "return (");
    let (status, text) = test();
    assert_eq!(status.code(), Some(1), "{text}");
    assert!(text.contains("plugin [acme-auth] does not load:") && text.contains("lib.lua:1:"), "{text}");
    assert!(!text.contains("acme-absent"), "{text}");
}
