//! `moongate migrate check`: what it says of an APISIX, on the real binary; and a data set of APISIX's that loads whole.

mod support;

use std::{fs, process::Stdio};

use serde_json::{Value, json};
use support::{
    Dir, Gateway, Upstream,
    apisix::{self, COUNT, KEY, SERVED},
    etcd::EtcdServer,
    get, run,
};

/// The exit code, and what was printed.
fn check(dir: &Dir, args: &[&str]) -> (i32, String) {
    check_with(dir, args, &[])
}

fn check_with(dir: &Dir, args: &[&str], envs: &[(&str, &str)]) -> (i32, String) {
    let mut command = dir.command();
    command.args(["migrate", "check"]).args(args).envs(envs.iter().copied()).stderr(Stdio::null());
    let done = command.output().expect("it runs");
    (done.status.code().expect("an exit code"), String::from_utf8(done.stdout).expect("text"))
}

/// The report for tools.
fn report(dir: &Dir, args: &[&str]) -> (i32, Value) {
    let (code, text) = check(dir, &[args, &["--json"]].concat());
    (code, serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}")))
}

/// The finding at a place that says so.
#[track_caller]
fn told<'r>(report: &'r Value, verdict: &str, place: &str, what: &str) -> &'r Value {
    let findings = report["findings"].as_array().expect("findings");
    let is_it = |f: &&Value| {
        f["verdict"] == verdict
            && f["place"].as_str().unwrap().contains(place)
            && f["what"].as_str().unwrap().contains(what)
    };
    findings.iter().find(is_it).unwrap_or_else(|| panic!("no {verdict} at {place} that says {what}: {report:#}"))
}

fn etcd(dir: &Dir) -> (EtcdServer, String) {
    let etcd = EtcdServer::start(&dir.join("etcd"));
    let url = format!("http://127.0.0.1:{}", etcd.port());
    (etcd, url)
}

/// Writes as APISIX does, directories included.
async fn write(etcd: &EtcdServer, prefix: &str, objects: &[(String, Value)]) {
    let store = etcd.store().await;
    drop(store);
    let mut client = etcd.client().await;
    client.put(format!("{prefix}/routes/"), "init_dir", None).await.unwrap();
    for chunk in objects.chunks(100) {
        let put =
            |(key, value): &(String, Value)| etcd_client::TxnOp::put(format!("{prefix}{key}"), value.to_string(), None);
        let puts: Vec<_> = chunk.iter().map(put).collect();
        client.txn(etcd_client::Txn::new().and_then(puts)).await.unwrap();
    }
}

fn upstream() -> Value {
    json!({"type": "roundrobin", "nodes": {"127.0.0.1:80": 1}})
}

#[test]
fn a_wrong_call_is_told_and_has_its_own_exit_code() {
    let dir = Dir::new();
    for args in [&[][..], &["--etcd"], &["--nothing"], &["--etcd", "http://127.0.0.1:1", "--apisix-yaml", "x"]] {
        assert_eq!(check(&dir, args).0, 64, "{args:?}");
    }
    dir.write("file", "");
    for (args, why) in [
        (["--lua-path", "nowhere"], "--lua-path nowhere: No such file or directory"),
        (["--lua-path", "file"], "--lua-path file: Not a directory"),
        (["--conf", "conf/nowhere.yaml"], "--conf conf/nowhere.yaml: No such file or directory"),
        (["--conf", "conf"], "--conf conf: it is no file"),
    ] {
        let mut command = dir.command();
        command.args(["migrate", "check"]).args(args);
        let (status, said) = run(command);
        assert_eq!(status.code(), Some(64), "{args:?}: {said}");
        assert!(said.contains(why), "{said}");
    }
    let mut command = dir.command();
    command.arg("migrate");
    let (status, said) = run(command);
    assert_eq!(status.code(), Some(64));
    assert!(said.contains("one verb: check"), "{said}");
    let mut command = dir.command();
    command.arg("help");
    assert!(run(command).1.contains("moongate migrate check"));
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_of_an_etcd_are_checked_and_none_is_touched() {
    let dir = Dir::new();
    let (etcd, url) = etcd(&dir);
    let bare = "Iqoldy+LnQrMnmtSrjC4MQ==";
    let objects = [
        ("/routes/good".to_owned(), json!({"uri": "/a", "plugins": {"key-auth": {}}, "upstream": upstream()})),
        (
            "/routes/bad".to_owned(),
            json!({"uri": "/b", "plugins": {"key-auth": {"header": 1}}, "upstream": upstream()}),
        ),
        ("/routes/no-uri".to_owned(), json!({"upstream": upstream()})),
        ("/routes/theirs".to_owned(), json!({"uri": "/c", "plugins": {"csrf": {"key": "k"}}, "upstream": upstream()})),
        (
            "/routes/off".to_owned(),
            json!({"uri": "/d", "plugins": {"zipkin": {"_meta": {"disable": true}}}, "upstream": upstream()}),
        ),
        ("/routes/whose".to_owned(), json!({"uri": "/e", "plugins": {"whose": {}}, "upstream": upstream()})),
        (
            "/routes/vars".to_owned(),
            json!({"uri": "/f", "vars": [["geoip_country", "==", "x"]], "upstream": upstream()}),
        ),
        (
            "/routes/script".to_owned(),
            json!({"uri": "/g", "upstream": upstream(), "plugins": {"serverless-pre-function": {
            "functions": ["return function() return ngx.var.one end", "local C = require('ffi').C\nreturn function() C.ngx_crc() end"]}}}),
        ),
        ("/upstreams/1".to_owned(), json!({"type": "roundrobin", "discovery_type": "nacos", "service_name": "x"})),
        ("/upstreams/4".to_owned(), json!({"type": "roundrobin", "discovery_type": "dns", "service_name": "x"})),
        ("/upstreams/2".to_owned(), json!({"nodes": {"a:1": 1}, "checks": {"active": {"http_path": "/"}}})),
        ("/upstreams/3".to_owned(), json!({"nodes": {"a:1": 1}, "scheme": "kafka"})),
        ("/consumers/jack".to_owned(), json!({"username": "jack", "plugins": {"key-auth": {"key": bare}}})),
        (
            "/consumers/jill".to_owned(),
            json!({"username": "jill", "plugins": {"key-auth": {"key": "$secret://hashi/1/jill/key"}}}),
        ),
        ("/stream_routes/1".to_owned(), json!({"plugins": {"mqtt-proxy": {}}, "upstream": upstream()})),
    ];
    write(&etcd, "/gw", &objects).await;
    let before = etcd.client().await.get("x", None).await.unwrap().header().unwrap().revision();
    let (code, report) = report(&dir, &["--etcd", &url, "--etcd-prefix", "/gw"]);
    assert_eq!((code, &report["verdict"]), (2, &json!("cannot")));
    told(&report, "change", "/routes/bad", "key-auth");
    told(&report, "change", "/routes/no-uri", "invalid configuration");
    let theirs = told(&report, "cannot", "csrf", "used by 1 object: /routes/theirs");
    assert!(theirs["advice"].as_str().unwrap().contains("served without it"));
    told(&report, "change", "whose", "is found nowhere");
    told(&report, "change", "/routes/vars", "$geoip_country");
    told(&report, "change", "/routes/script plugins.serverless-pre-function.functions[0]:1", "the variable one");
    told(&report, "cannot", "/routes/script plugins.serverless-pre-function.functions[1]:2", "ffi.C.ngx_crc");
    told(&report, "cannot", "/upstreams/1", "nacos");
    told(&report, "cannot", "/upstreams/3", "kafka");
    told(&report, "change", "/consumers/jack", "looks encrypted");
    told(&report, "cannot", "/consumers/jill", "$secret://hashi/");
    told(&report, "cannot", "/stream_routes/1", "mqtt-proxy");
    assert!(!report.to_string().contains("zipkin"), "what is disabled is not missed");
    for well in ["/routes/good", "/upstreams/2"] {
        assert!(!report.to_string().contains(well), "{report:#}");
    }
    assert_eq!(
        report["runs"]["objects"],
        json!(["consumers: 2 of 2", "routes: 6 of 8", "stream_routes: 0 of 1", "upstreams: 4 of 4"])
    );

    // The revision is that of the cluster: nothing was written, anywhere.
    let after = etcd.client().await.get("x", None).await.unwrap().header().unwrap().revision();
    assert_eq!(after, before);
    assert!(fs::read_dir(dir.join("data")).unwrap().next().is_none(), "nor to the disk");
    assert!(fs::read_dir(dir.join("logs")).unwrap().next().is_none());

    // With the key that jack's was encrypted by, it opens.
    dir.write("conf/theirs.yaml", "apisix:\n  data_encryption:\n    keyring: [0123456789abcdef]\n");
    let text = check(&dir, &["--etcd", &url, "--etcd-prefix", "/gw", "--conf", "conf/theirs.yaml"]).1;
    assert!(text.contains("looks encrypted"), "another key does not: {text}");
    let key = moongate::model::Keyring::new(["0123456789abcdef"], true).unwrap();
    let jack = json!({"username": "jack", "plugins": {"key-auth": {"key": key.encrypt("jacks-key")}}});
    write(&etcd, "/gw", &[("/consumers/jack".to_owned(), jack)]).await;
    let text = check(&dir, &["--etcd", &url, "--etcd-prefix", "/gw", "--conf", "conf/theirs.yaml"]).1;
    assert!(!text.contains("looks encrypted"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_asks_for_a_password() {
    let dir = Dir::new();
    let (etcd, url) = etcd(&dir);
    write(&etcd, "/apisix", &[("/routes/1".to_owned(), json!({"uri": "/a", "upstream": upstream()}))]).await;
    let mut client = etcd.client().await;
    client.user_add("root", "s3cret", None).await.unwrap();
    client.user_grant_role("root", "root").await.unwrap();
    client.auth_enable().await.unwrap();
    let args = ["--etcd", &url, "--etcd-user", "root", "--etcd-password-env", "ETCD_PASSWORD"];
    assert_eq!(check(&dir, &args).0, 64, "the environment has none");
    let (code, text) = check_with(&dir, &args, &[("ETCD_PASSWORD", "s3cret")]);
    assert_eq!(code, 0, "{text}");
    let (code, text) = check_with(&dir, &args, &[("ETCD_PASSWORD", "wrong")]);
    assert_eq!(code, 2, "{text}");
    assert!(text.contains("none was checked") && !text.contains("wrong"), "{text}");
    assert_eq!(check(&dir, &["--etcd", &url]).0, 2, "nobody is let in without");
}

#[test]
fn a_configuration_is_told_line_by_line() {
    let dir = Dir::new();
    dir.write(
        "conf/theirs.yaml",
        r#"
apisix:
  node_listen: 9080
  extra_lua_path: /no/such/dir/?.lua
  nod_listen: 1
plugins: [key-auth, csrf, nobodys]
stream_plugins: [mqtt-proxy]
discovery: {dns: {servers: ["127.0.0.1:53"]}, eureka: {host: ["http://127.0.0.1:8761"]}}
wasm: {plugins: [{name: x, file: y}]}
nginx_config:
  worker_processes: many
  http_configuration_snippet: |
    # ours
    lua_shared_dict mine 10m;
    proxy_cache_path /tmp/cache keys_zone=a:1m;
    proxy_buffers 8 16k;
  http:
    access_log_format: '$remote_addr $geoip_city'
deployment:
  role: traditional
  role_traditional: {config_provider: yaml}
"#,
    );
    dir.write(
        "conf/apisix.yaml",
        "routes:\n  - {id: 1, uri: /a, plugins: {csrf: {key: k}}, upstream: {nodes: {\"a:1\": 1}}}\n#END\n",
    );
    let (code, report) = report(&dir, &["--conf", "conf/theirs.yaml"]);
    assert_eq!(code, 2);
    told(&report, "cannot", "discovery.eureka", "there is no module apisix.discovery.eureka");
    assert!(!report.to_string().contains("discovery.dns"), "{report}");
    told(&report, "cannot", "wasm", "cannot be honoured");
    told(&report, "change", "nginx_config.worker_processes", "many");
    told(&report, "note", "apisix.nod_listen", "did you mean");
    told(&report, "note", "stream_plugins", "TCP");
    told(&report, "note", "plugins", "csrf");
    told(&report, "change", "plugins", "nobodys");
    told(&report, "change", "/no/such/dir", "cannot be read");
    let snippet = "nginx_config.http_configuration_snippet";
    told(&report, "change", snippet, "3 directives");
    let dict = told(&report, "change", &format!("{snippet}:2"), "lua_shared_dict mine 10m");
    assert!(dict["advice"].as_str().unwrap().contains("custom_lua_shared_dict"));
    told(&report, "cannot", &format!("{snippet}:3"), "proxy_cache_path");
    told(&report, "note", &format!("{snippet}:4"), "proxy_buffers");
    told(&report, "change", "nginx_config.http.access_log_format", "$geoip_city");
    let csrf = told(&report, "cannot", "csrf", "/routes/1");
    assert!(csrf["advice"].as_str().unwrap().contains("are refused"), "a file's objects are: {csrf}");

    dir.write("conf/none.yaml", "nginx_config: {worker_processes: 1}\n");
    let (code, report) = self::report(&dir, &["--conf", "conf/none.yaml", "--apisix-yaml", "conf/nowhere.yaml"]);
    assert_eq!(code, 2);
    told(&report, "change", "deployment.role_traditional.config_provider", "APISIX reads etcd");
    told(&report, "cannot", "objects", "nowhere.yaml");
    dir.write("conf/broken.yaml", "a: [\n");
    let (code, report) = self::report(&dir, &["--conf", "conf/broken.yaml", "--apisix-yaml", "conf/apisix.yaml"]);
    assert_eq!(code, 2);
    told(&report, "change", "conf/broken.yaml", "not YAML");
    told(&report, "cannot", "csrf", "/routes/1");
}

#[test]
fn plugins_of_their_own_are_loaded_and_read() {
    let dir = Dir::new();
    fs::create_dir_all(dir.join("lua/apisix/plugins")).unwrap();
    fs::create_dir_all(dir.join("lua/helpers")).unwrap();
    dir.write(
        "lua/apisix/plugins/tenant.lua",
        r#"local core = require("apisix.core")
local words = require("helpers.words")
local schema = { type = "object", properties = { name = { type = "string" } }, required = { "name" },
    encrypt_fields = { "name" } }
local _M = { version = 0.1, priority = 10, name = "tenant", schema = schema }
function _M.check_schema(conf) return core.schema.check(schema, conf) end
function _M.access(conf, ctx)
    ctx.var.tenant = words.lower(conf.name)
    core.log.info(ctx.var.uri, ctx.var.tenant)
    return 200, ngx.req.get_headers()
end
return _M
"#,
    );
    dir.write("lua/helpers/words.lua", "return { lower = string.lower }\n");
    dir.write(
        "objects.yaml",
        "routes:\n  - {id: 1, uri: /a, vars: [[tenant, \"==\", a]], plugins: {tenant: {name: a}}, upstream: {nodes: {\"a:1\": 1}}}\n#END\n",
    );
    let args = ["--lua-path", "lua", "--apisix-yaml", "objects.yaml"];
    let (code, text) = check(&dir, &args);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("tenant (1, your own)") && text.contains("verdict: everything runs"), "{text}");
    // The gateway's own are loaded whatever the path says: what is in these does not matter.
    fs::create_dir_all(dir.join("lua/ngx")).unwrap();
    dir.write("lua/ngx/balancer.lua", "return require('ffi').C.ngx_http_lua_ffi_balancer_set_current_peer\n");
    let (code, text) = check(&dir, &args);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("1 files are a copy of lua-resty-core"), "{text}");
    let (code, text) = check(&dir, &["--lua-path", "lua/apisix/plugins", "--apisix-yaml", "objects.yaml"]);
    assert_eq!(code, 0, "the directory of the plugins will do: {text}");
    let (code, text) = check(&dir, &["--apisix-yaml", "objects.yaml"]);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("tenant: is found nowhere"), "{text}");

    dir.write(
        "lua/apisix/plugins/odd.lua",
        "local ssl = require('ngx.ssl')\nlocal more = require('no.such')\nlocal ok, zip = pcall(require, 'zip')\n\
         local base = require('resty.core.base')\nlocal _M = {}\n\
         function _M.log(conf, ctx)\n  ssl.get_session_master_key()\n  ngx.log(ngx.ERR, ngx.var.modern_browser)\n\
         ngx.shared.undeclared:get('x')\n  ngx.nothing()\n  base.get_request()\nend\nreturn _M\n",
    );
    dir.write("lua/apisix/plugins/broken.lua", "local x = = 1\n");
    dir.write("lua/helpers/code.lua", b"\x1bLJ\x02");
    let many: String = (0..250).map(|n| format!("require('missing.m{n}')\n")).collect();
    dir.write("lua/helpers/many.lua", many);
    dir.write("lua/helpers/large.lua", vec![b'-'; (8 << 20) + 1]);
    let (code, report) = report(&dir, &args);
    assert_eq!(code, 2);
    let odd = "lua/apisix/plugins/odd.lua";
    told(&report, "change", odd, "does not load");
    told(&report, "change", &format!("{odd}:2"), "no.such");
    told(&report, "note", &format!("{odd}:3"), "zip");
    told(&report, "cannot", &format!("{odd}:7"), "get_session_master_key");
    told(&report, "change", &format!("{odd}:8"), "modern_browser");
    told(&report, "change", &format!("{odd}:9"), "undeclared");
    told(&report, "change", &format!("{odd}:10"), "ngx.nothing");
    told(&report, "cannot", &format!("{odd}:11"), "get_request");
    told(&report, "change", "lua/apisix/plugins/broken.lua", "does not load");
    assert_eq!(report.to_string().matches("plugins/broken.lua").count(), 2, "place and reason, once: {report:#}");
    told(&report, "change", "lua/helpers/code.lua", "bytecode");
    told(&report, "change", "lua/helpers/many.lua", "has 50 more");
    assert_eq!(report.to_string().matches("many.lua:").count(), 200);
    told(&report, "change", "lua/helpers/large.lua", "more than 8388608 bytes");
    assert!(!report.to_string().contains("tenant.lua"), "what is right is not told: {report:#}");
}

#[test]
fn files_that_a_list_leaves_out_are_told() {
    let dir = Dir::new();
    fs::create_dir_all(dir.join("example/apisix/plugins")).unwrap();
    for name in ["listed", "left-out"] {
        let source = format!(
            "local _M = {{ version = 0.1, priority = 1, name = '{name}', schema = {{ type = 'object' }} }}\nreturn _M\n"
        );
        dir.write(&format!("example/apisix/plugins/{name}.lua"), source);
    }
    let config = |list: &str| {
        format!(
            "apisix:\n  extra_lua_path: '$prefix/example/?.lua'\n{list}deployment:\n  role: traditional\n  \
             role_traditional: {{config_provider: yaml}}\n"
        )
    };
    dir.write("conf/config.yaml", config("plugins: [key-auth, file-logger, listed]\n"));
    dir.write(
        "conf/apisix.yaml",
        "routes:\n  - {id: 1, uri: /a, plugins: {listed: {}, file-logger: {path: a, log_format: {b: $resp_body}}}, \
         upstream: {nodes: {\"a:1\": 1}}}\n  - {id: 2, uri: /b, plugins: {left-out: {}}, \
         upstream: {nodes: {\"a:1\": 1}}}\n#END\n",
    );
    let (_, found) = report(&dir, &["--conf", "conf/config.yaml"]);
    told(&found, "note", "example/apisix/plugins/left-out.lua", "not on the list of plugins");
    told(&found, "note", "left-out", "used by 1 object: /routes/2");
    assert!(!found.to_string().contains("resp_body is no variable"), "{found:#}");
    let (_, text) = check(&dir, &["--conf", "conf/config.yaml"]);
    assert!(text.contains("listed (1, your own)"), "{text}");
    dir.write("conf/config.yaml", config(""));
    let (_, text) = check(&dir, &["--conf", "conf/config.yaml"]);
    assert!(text.contains("left-out (1, your own), listed (1, your own)"), "{text}");
}

#[test]
fn what_points_nowhere_is_told_and_does_not_run() {
    let dir = Dir::new();
    dir.write(
        "objects.yaml",
        r#"
routes:
  - {id: 1, uri: /a, upstream: {nodes: {"a:1": 1}}}
  - {id: 2, uri: /b, upstream_id: nope}
  - {id: 3, uri: /c, service_id: 7, plugin_config_id: pc}
  - {id: 4, uri: /d, upstream_id: 1, plugins: {proxy-rewrite: {uri: "$secret://vault/7/a/b"}}}
  - {id: 5, uri: /e, upstream: {nodes: {"a:1": 1}, scheme: https, tls: {client_cert_id: own}}}
  - {id: 6, uri: /f, upstream_id: 1, plugins: {traffic-split: {rules: [{weighted_upstreams: [{upstream_id: 9}]}]}}}
services: [{id: 1, upstream_id: away}]
upstreams: [{id: 1, nodes: {"a:1": 1}}]
consumers: [{username: jack, group_id: friends}]
ssls:
  - {id: here, sni: a.test, cert: "$secret://vault/1/tls/cert", key: "$secret://vault/1/tls/key"}
  - {id: there, sni: b.test, cert: "$secret://vault/8/tls/cert", key: "$secret://vault"}
secrets: [{id: vault/1, uri: "http://127.0.0.1:1", prefix: kv, token: root}]
#END
"#,
    );
    let (code, report) = report(&dir, &["--apisix-yaml", "objects.yaml"]);
    assert_eq!(code, 1, "{report:#}");
    let nowhere = told(&report, "change", "/routes/2", "upstream_id is nope, and there is no object /upstreams/nope");
    assert!(nowhere["advice"].as_str().unwrap().contains("write that object"));
    told(&report, "change", "/routes/3", "service_id is 7, and there is no object /services/7");
    told(&report, "change", "/routes/3", "plugin_config_id is pc, and there is no object /plugin_configs/pc");
    told(&report, "change", "/routes/5", "upstream.tls.client_cert_id is own, and there is no object /ssls/own");
    told(&report, "change", "/routes/6", "weighted_upstreams[0].upstream_id is 9");
    told(&report, "change", "/services/1", "/upstreams/away");
    told(&report, "change", "/consumers/jack", "/consumer_groups/friends");
    let manager = told(&report, "change", "/routes/4", "$secret://vault/7/, and no object /secrets/vault/7");
    assert!(manager["advice"].as_str().unwrap().contains("write that object"));
    told(&report, "change", "/ssls/there", "$secret://vault/8/, and no object /secrets/vault/8");
    told(&report, "change", "/ssls/there", "without saying where ($secret://vault)");
    assert!(!report["findings"].to_string().contains("/ssls/here"), "{report:#}");
    let runs = report["runs"]["objects"].to_string();
    assert!(runs.contains("routes: 2 of 6") && runs.contains("services: 0 of 1"), "{runs}");
}

#[test]
fn calls_that_raise_and_functions_that_nobody_calls_are_told() {
    let dir = Dir::new();
    fs::create_dir_all(dir.join("lua/apisix/plugins")).unwrap();
    dir.write(
        "lua/apisix/plugins/raises.lua",
        r#"local balancer = require("apisix.balancer")
local router = require("apisix.router")
local sni = require("apisix.ssl.router.radixtree_sni")
local _M = { version = 0.1, priority = 10, name = "raises", schema = { type = "object" } }
function _M.access(conf, ctx)
    balancer.run()
    router.router_http.match(ctx)
    sni.match_and_set(ctx)
    ngx.location.capture("/x")
    ngx.location.capture_multi({})
    ngx.exec("/x")
    balancer.pick_server({}, ctx)
end
return _M
"#,
    );
    dir.write(
        "lua/hook.lua",
        r#"local apisix = require("apisix")
local plugin, upstream = require("apisix.plugin"), require("apisix.upstream")
local old = apisix.http_access_phase
apisix.http_access_phase = function(...) return old(...) end apisix.http_balancer_phase = old
function plugin.run_plugin() end
upstream.set_by_route = function() end
require("apisix.core").request.mine = ngx.location.capture
"#,
    );
    let (code, report) = report(&dir, &["--lua-path", "lua", "--lua-path", "lua/../lua"]);
    assert_eq!(code, 1, "{report:#}");
    for (line, what) in [
        (6, "apisix.balancer.run"),
        (7, "apisix.router.router_http.match"),
        (8, "apisix.ssl.router.radixtree_sni.match_and_set"),
        (9, "ngx.location.capture raises in plugins"),
        (10, "ngx.location.capture_multi raises in plugins"),
        (11, "ngx.exec raises in plugins"),
    ] {
        let finding = told(&report, "change", &format!("apisix/plugins/raises.lua:{line}"), what);
        assert!(!finding["advice"].as_str().unwrap().is_empty());
    }
    told(&report, "change", "hook.lua:4", "replaces apisix.http_balancer_phase, which the gateway does not call");
    told(&report, "change", "hook.lua:5", "replaces apisix.plugin.run_plugin");
    told(&report, "change", "hook.lua:6", "replaces apisix.upstream.set_by_route");
    told(&report, "note", "hook.lua:7", "ngx.location.capture raises in plugins, and works in lua_locations");
    assert_eq!(report["findings"].as_array().unwrap().len(), 10, "each once, and nothing else: {report:#}");
}

/// The whole of what an APISIX keeps in etcd, as its documents and schemas have it.
#[tokio::test(flavor = "multi_thread")]
async fn five_thousand_objects_of_apisix_load_whole() {
    let dir = Dir::new();
    let (etcd, url) = etcd(&dir);
    let peer = Upstream::echo();
    let objects = apisix::objects(20_261_126, &peer.addr());
    assert_eq!(objects.len(), COUNT);
    let stored = serde_json::to_string(&objects).unwrap();
    assert!(!stored.contains(KEY) && !stored.contains("PRIVATE KEY"), "secrets are stored encrypted");
    write(&etcd, "/apisix", &objects).await;

    let (code, text) = check(&dir, &["--etcd", &url]);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("routes: 2497 of 2497") && text.contains("consumers: 350 of 350"), "{text}");

    let gw = Gateway::with(json!({
        "deployment": {"role_traditional": {"config_provider": "etcd"}, "etcd": {"host": [url]}},
        "apisix": {"proxy_mode": "http&stream", "stream_proxy": {"tcp": [{"addr": "127.0.0.1:0"}]}},
    }));
    let errors = get(&gw.control(), "/v1/config/errors").json();
    assert_eq!(errors["errors"], json!([]), "none is refused");
    for n in 0..SERVED {
        let path = format!("/served/{n}");
        let answer = if n % 3 == 0 {
            assert_eq!(gw.get(&path).status, 401, "{path} wants a key");
            gw.send("GET", &path, &[("apikey", KEY)], b"")
        } else {
            gw.get(&path)
        };
        assert_eq!(answer.status, 200, "{path}: {}", answer.text());
        assert_eq!(answer.header("X-Served"), Some(n.to_string().as_str()), "{path}");
        assert!(answer.header("X-Request-Id").is_some(), "a global rule runs");
    }
    assert_eq!(gw.get("/not/there").status, 404);
}
