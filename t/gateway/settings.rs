//! What the configuration files may say, and what is told of it: numbers for texts, variables, repeated keys, ports.

use serde_json::{Value, json};

use crate::support::{Dir, Gateway, Reply, Upstream, eventually, get, request, run};

fn admin(gw: &Gateway, key: &str) -> u16 {
    request(&gw.admin_address(), "GET", "/apisix/admin/routes", &[("X-API-KEY", key)], b"").status
}

#[test]
fn an_admin_key_may_be_a_number() {
    let keys = json!([
        {"name": "a", "key": 12_345_678, "role": "admin"},
        {"name": "b", "key": "${{FROM_ENV}}", "role": "viewer"},
    ]);
    let envs = ["FROM_ENV=0012345"];
    let gw = Gateway::with(json!({"deployment": {"admin": {"admin_key": keys}}, "nginx_config": {"envs": envs}}));
    for (key, status) in [("12345678", 200), ("0012345", 200), ("12345", 401), ("", 401)] {
        assert_eq!(admin(&gw, key), status, "{key}");
    }
}

/// A data plane with this file.
fn data_plane(provider: &str, text: &str, envs: &[&str]) -> Gateway {
    let dir = Dir::new();
    dir.configure(json!({
        "deployment": {"role": "data_plane", "role_data_plane": {"config_provider": provider}},
        "nginx_config": {"envs": envs},
    }));
    dir.write(&format!("conf/apisix.{provider}"), text);
    Gateway::in_dir(dir)
}

fn errors(gw: &Gateway) -> String {
    get(&gw.control(), "/v1/config/errors").text()
}

fn with_key(gw: &Gateway, key: &str) -> Reply {
    gw.send("GET", "/key", &[("apikey", key)], b"")
}

const OF_VARIABLES: [(&str, &str); 2] = [
    (
        "yaml",
        r#"
routes:
  - {id: 1, uri: /key, plugins: {"${{PLUGIN}}": {}}, upstream: {nodes: {"${{NODE}}": ${{WEIGHT}}}}}
  - id: 2
    uri: /flag
    plugins: {fault-injection: {abort: {http_status: ${{STATUS:=202}}, body: "${{FLAG}}"}}}
  - id: 3
    uri: /evil
    plugins: {fault-injection: {abort: {http_status: 200, body: ${{EVIL}}}}}
consumers:
  - {username: u, plugins: {key-auth: {key: "${{KEY}}"}}}
#END
"#,
    ),
    (
        "json",
        r#"{
    "routes": [
        {"id": 1, "uri": "/key", "plugins": {"${{PLUGIN}}": {}}, "upstream": {"nodes": {"${{NODE}}": ${{WEIGHT}}}}},
        {"id": 2, "uri": "/flag", "plugins": {"fault-injection": {"abort": {
            "http_status": ${{STATUS:=202}}, "body": "${{FLAG}}"}}}},
        {"id": 3, "uri": "/evil", "plugins": {"fault-injection": {"abort": {"http_status": 200, "body": ${{EVIL}}}}}}
    ],
    "consumers": [{"username": "u", "plugins": {"key-auth": {"key": "${{KEY}}"}}}]
}"#,
    ),
];

#[test]
fn what_is_in_quotes_in_a_file_stays_a_text() {
    let up = Upstream::echo();
    let node = format!("NODE={}", up.addr());
    let evil = "a\"} #: [";
    let evil_env = format!("EVIL={evil}");
    let envs = ["PLUGIN=key-auth", &node, "WEIGHT=1", "FLAG=true", "KEY=12345", &evil_env];
    for (provider, text) in OF_VARIABLES {
        let gw = data_plane(provider, text, &envs);
        eventually("the consumer is known", || (with_key(&gw, "12345").status == 200).then_some(()));
        assert_eq!(with_key(&gw, "1").status, 401, "{provider}");
        let flag = gw.get("/flag");
        assert_eq!((flag.status, flag.text().as_str()), (202, "true"), "{provider}");
        assert_eq!(gw.get("/evil").text(), evil, "{provider}");
        assert!(errors(&gw).contains(r#""errors":[]"#), "{provider}: {}", errors(&gw));
    }
}

#[test]
fn a_variable_that_is_missing_in_a_file_is_named() {
    let gw = data_plane("yaml", "routes:\n  - {uri: \"${{NOT_SET_ANYWHERE}}\"}\n#END\n", &[]);
    gw.expect_log("can't find environment variable NOT_SET_ANYWHERE");
}

#[test]
fn what_stands_twice_in_a_file_is_told_and_the_last_counts() {
    let up = Upstream::echo();
    let node = up.addr();
    let route = |id, uri| format!("  - {{id: {id}, uri: {uri}, upstream: {{nodes: {{\"{node}\": 1}}}}}}\n");
    let first = format!(
        "  - id: 1\n    uri: /first\n    uri: /second\n    upstream: {{nodes: {{\"{node}\": 1, \"{node}\": 2}}}}\n"
    );
    let gw = data_plane("yaml", &format!("routes:\n{first}{}{}#END\n", route(2, "/a"), route(2, "/b")), &[]);
    for (path, status) in [("/second", 200), ("/first", 404), ("/b", 200), ("/a", 404)] {
        eventually(path, || (gw.get(path).status == status).then_some(()));
    }
    let told = eventually("it is told", || Some(errors(&gw)).filter(|errors| errors.contains("conf/apisix.yaml")));
    let key = "routes[0].uri: is written more than once, again in line 4";
    let id = "/routes/2: stands in the file more than once";
    for what in [key, id] {
        assert!(told.contains(what), "{what} in {told}");
        gw.expect_log(what);
    }
    let mut command = gw.dir.command();
    command.args(["migrate", "check", "--apisix-yaml", "conf/apisix.yaml"]);
    let (status, report) = run(command);
    assert_eq!(status.code(), Some(1), "{report}");
    assert!(report.contains(key) && report.contains(id), "{report}");

    gw.dir.write("conf/apisix.yaml", format!("routes:\n{}#END\n", route(2, "/c")));
    eventually("the edit is served", || (gw.get("/c").status == 200).then_some(()));
    eventually("there is nothing to tell", || (!errors(&gw).contains("conf/apisix.yaml")).then_some(()));
}

#[test]
fn a_document_in_yaml_may_repeat_a_key() {
    let up = Upstream::echo();
    let node = up.addr();
    let gw = Gateway::with(json!({"deployment": {"role_traditional": {"config_provider": "yaml"}}}));
    let key = gw.key();
    let headers = [("X-API-KEY", key.as_str()), ("X-Digest", "1"), ("Content-Type", "application/yaml")];
    let upstream = format!("{{type: roundrobin, nodes: {{\"{node}\": 1, \"{node}\": 1}}}}");
    let text = format!("routes:\n  - {{id: r, uri: /a, uri: /b, upstream: {upstream}}}\n");
    let reply = request(&gw.admin_address(), "PUT", "/apisix/admin/configs", &headers, text.as_bytes());
    assert_eq!(reply.status, 202, "{}", reply.text());
    assert_eq!((gw.get("/b").status, gw.get("/a").status), (200, 404));
    gw.expect_log("PUT /apisix/admin/configs: routes[0].uri: is written more than once, again in line 2; the last one");
}

/// What `test` and `migrate check` say of a configuration.
fn tested(dir: &Dir) -> [(Option<i32>, String); 2] {
    [&["test"][..], &["migrate", "check", "--conf", "conf/config.yaml"]].map(|words| {
        let mut command = dir.command();
        command.args(words);
        let (status, text) = run(command);
        (status.code(), text)
    })
}

#[test]
fn what_would_stop_the_start_is_told_before() {
    let dir = Dir::new();
    let told = |settings: &Value, what: &str| {
        dir.configure(settings.clone());
        for (code, text) in tested(&dir) {
            assert!(code == Some(1) && text.contains(what), "{what} in {code:?} {text}");
        }
    };
    let provider = json!({"config_provider": "embedded"});
    let ports = json!({
        "apisix": {"node_listen": 9990, "control": {"ip": "127.0.0.1", "port": 9990}},
        "deployment": {"role_traditional": provider},
    });
    told(&ports, "http listen port 9990 conflicts with control");
    let mtls = json!({"admin_ssl_cert": "cert.pem", "admin_ssl_cert_key": "key.pem"});
    let admin = json!({"https_admin": true, "admin_api_mtls": mtls});
    let https = json!({"deployment": {"role_traditional": provider, "admin": admin}});
    told(&https, "cert.pem");
    let signed = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    dir.write("conf/cert.pem", signed.cert.pem());
    dir.write("conf/key.pem", "no key");
    told(&https, "admin_ssl_cert_key");
    dir.write("conf/key.pem", signed.signing_key.serialize_pem());
    for (code, text) in tested(&dir) {
        assert_eq!(code, Some(0), "{text}");
    }
}

#[test]
fn a_key_that_nobody_knows_is_no_key_that_is_honoured() {
    let dir = Dir::new();
    dir.write("conf/config.yaml", "deployment: {role_traditional: {config_provider: embedded}, etcd: {hosts: [a]}}\n");
    let [(code, tested), (checked, report)] = tested(&dir);
    assert_eq!((code, checked), (Some(0), Some(0)), "{tested}{report}");
    for text in [&tested, &report] {
        assert!(text.contains("did you mean deployment.etcd.host?"), "{text}");
    }
    assert!(!report.contains("every key that was written is honoured"), "{report}");
}
