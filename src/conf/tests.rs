use super::*;

fn ok(text: &str) -> (Config, Vec<Warning>) {
    parse(Path::new("/p"), text).unwrap_or_else(|e| panic!("{e}"))
}

fn mistakes(text: &str) -> Vec<String> {
    parse(Path::new("/p"), text).err().map(|e| e.0).unwrap_or_default()
}

#[test]
fn an_empty_file_is_the_defaults() {
    let (config, warnings) = ok("");
    assert_eq!(warnings, []);
    assert_eq!(config.listen[0].addr, "0.0.0.0:9080".parse().unwrap());
    assert_eq!(config.listen_tls[0].addr.port(), 9443);
    assert_eq!(config.admin.as_ref().unwrap().addr, "0.0.0.0:9180".parse().unwrap());
    assert_eq!(config.control, Some("127.0.0.1:9090".parse().unwrap()));
    assert_eq!(config.prometheus.addr, Some("127.0.0.1:9091".parse().unwrap()));
    assert_eq!(config.client.send_timeout, Duration::from_secs(10));
    assert!(config.shared_dicts.contains(&("plugin-limit-count".into(), 10 << 20)));
}

/// What differs from APISIX's published defaults is listed at the head of conf/config.default.yaml, and here.
#[test]
fn the_defaults_are_apisix_own_but_for_the_listed() {
    let mut theirs: Value = serde_json::from_str(include_str!("../../t/data/apisix-default-config.json")).unwrap();
    let mut ours = defaults().unwrap();
    ours["apisix"]["lru"]["secret"].as_object_mut().unwrap().remove("stale_ttl").unwrap();
    for own in ["allow_unsupported", "control", "enable_control", "normalize_uri_like_servlet"] {
        ours["apisix"].as_object_mut().unwrap().remove(own);
        theirs["apisix"].as_object_mut().unwrap().remove(own);
    }
    ours.as_object_mut().unwrap().remove("lua");
    ours["deployment"]["admin"].as_object_mut().unwrap().remove("revisions");
    for role in ["role_traditional", "role_data_plane", "role_control_plane"] {
        ours["deployment"].as_object_mut().unwrap().remove(role);
        theirs["deployment"].as_object_mut().unwrap().remove(role);
    }
    assert_eq!(ours, theirs);
}

#[test]
fn every_mistake_is_reported_at_once_with_its_path() {
    let found = mistakes(
        "apisix: {node_listen: [99999], router: {http: x}}\ndeployment: {role: king, admin: {allow_admin: [nowhere],\
         revisions: {max: 100001, max_mb: much}}}\nnginx_config: {http: {send_timeout: soon}}",
    );
    let wrong = [
        "node_listen[0]",
        "apisix.router.http",
        "deployment.role",
        "allow_admin[0]",
        "send_timeout",
        "admin.revisions.max: 100001 is not a whole number from 0 to 100000",
        "admin.revisions.max_mb",
    ];
    for path in wrong {
        assert!(found.iter().any(|m| m.contains(path)), "{path} in {found:?}");
    }
}

#[test]
fn captured_lines_have_a_size_that_holds_one() {
    assert_eq!(ok("").0.captured_log, 0);
    assert_eq!(ok("lua_options: {lua_capture_error_log: 100k}").0.captured_log, 100 << 10);
    assert!(mistakes("lua_options: {lua_capture_error_log: 4095}")[0].contains("do not hold a long line"));
    assert!(mistakes("lua_options: {lua_capture_error_log: much}")[0].contains("is not a size"));
    assert!(mistakes("lua: {preload: [1]}")[0].starts_with("lua.preload[0]: 1 is not a text"));
}

#[test]
fn a_key_without_meaning_stops_the_start_unless_it_is_named() {
    let snippet = "nginx_config: {http_server_configuration_snippet: 'a b;'}";
    let found = mistakes(snippet);
    assert!(found[0].contains("allow_unsupported"), "{found:?}");
    let allowed = format!("apisix: {{allow_unsupported: [nginx_config.http_server_configuration_snippet]}}\n{snippet}");
    let (_, warnings) = ok(&allowed);
    assert!(warnings[0].0.contains("http_server_configuration_snippet"));
}

#[test]
fn an_unknown_key_names_its_nearest() {
    let (_, warnings) =
        ok("apisix: {node_listten: 1}\nplugin_attr: {own: {x: 1}}\nnginx_config: {http: {lua_shared_dict: {own: 1m}}}");
    assert_eq!(warnings, [Warning("apisix.node_listten: is not a known key; did you mean apisix.node_listen?".into())]);
}

#[test]
fn listeners_have_all_of_apisix_forms() {
    for (text, ports) in [
        ("9000", vec![9000, 9000]),
        ("[9000, 9001]", vec![9000, 9000, 9001, 9001]),
        ("[{port: 9000, enable_http2: true}, {ip: 127.0.0.2, port: 9001}]", vec![9000, 9000, 9001]),
    ] {
        let (config, _) = ok(&format!("apisix: {{node_listen: {text}}}"));
        assert_eq!(config.listen.iter().map(|l| l.addr.port()).collect::<Vec<_>>(), ports, "{text}");
    }
}

#[test]
fn times_and_sizes_read_as_in_nginx() {
    for (text, expected) in [
        ("60s", Some(60_000)),
        ("1h30m", Some(5_400_000)),
        ("100ms", Some(100)),
        ("5", Some(5000)),
        ("x", None),
        ("", None),
    ] {
        assert_eq!(typed::duration(text).map(|d| d.as_millis() as u64), expected, "{text}");
    }
    for (text, expected) in [("10m", Some(10 << 20)), ("1G", Some(1 << 30)), ("7", Some(7)), ("m", None), ("1x", None)]
    {
        assert_eq!(typed::size(text), expected, "{text}");
    }
}

#[test]
fn an_old_tls_version_beside_a_served_one_costs_a_warning() {
    let (config, warnings) = ok("apisix: {ssl: {ssl_protocols: TLSv1.1 TLSv1.3}}");
    assert_eq!(config.tls.protocols, ["TLSv1.1", "TLSv1.3"]);
    assert!(warnings.iter().any(|w| w.0.contains("TLSv1.1 is not served")), "{warnings:?}");
    assert!(mistakes("apisix: {ssl: {ssl_protocols: TLSv1.1}}")[0].contains("TLSv1.1 is not served"));
    assert!(mistakes("apisix: {ssl: {ssl_protocols: TLSv1.3 TLSv9}}")[0].contains("TLSv9"));
}

#[test]
fn an_admin_api_without_a_key_is_warned_about() {
    let (_, warnings) = ok("deployment: {admin: {admin_key_required: false}}");
    assert!(warnings.iter().any(|w| w.0.contains("Admin key is bypassed!")), "{warnings:?}");
}

/// Whether requests need an admin key, and the warnings that name the node's port.
fn test_node(admin: &str) -> (bool, usize) {
    let text = format!("test_node: {{serve_on_node: [admin]}}\ndeployment: {{admin: {{{admin}}}}}");
    let (config, warnings) = ok(&text);
    let told = warnings.iter().filter(|w| w.0.starts_with("test_node.serve_on_node: the Admin API is on")).count();
    (config.admin.expect("an Admin API").key_required, told)
}

#[test]
fn a_test_node_without_a_word_of_keys_is_open_to_its_own_machine() {
    let default = "admin_key: [{name: admin, key: '', role: admin}]";
    for open in ["", "admin_key: ", default, "admin_key_required: false", "admin_key_required: false, admin_key: []"] {
        assert_eq!(test_node(open), (false, 1), "{open}");
    }
    let unset = "admin_key: [{name: admin, key: '${{NO_SUCH_ADMIN_KEY:=}}', role: admin}]";
    let chosen = "admin_key: [{name: admin, key: chosen, role: admin}]";
    for closed in [unset, chosen, "admin_key: []", "admin_key_required: true", "admin_key_required: true, admin_key: "]
    {
        assert_eq!(test_node(closed), (true, 0), "{closed}");
    }
    let (config, _) = ok("test_node: {}");
    let listen: Vec<_> = config.listen.iter().map(|listen| listen.addr.to_string()).collect();
    assert_eq!(listen, ["127.0.0.1:1984"]);
    let charset = |text: &str| ok(text).0.json["nginx_config"]["http"]["charset"].clone();
    assert_eq!(charset("{}"), "utf-8");
    assert_eq!(charset("test_node: {}"), "off");
    assert_eq!(charset("{test_node: {}, nginx_config: {http: {charset: utf-8}}}"), "utf-8", "as it is written");
    let (config, _) = ok("{test_node: {}, apisix: {node_listen: 1984}}");
    assert_eq!(config.listen[0].addr.to_string(), "0.0.0.0:1984", "as it is written");
    let (_, warnings) = ok("{test_node: {serve_on_node: [admin]}, apisix: {enable_admin: false}}");
    assert!(warnings.iter().all(|w| !w.0.contains("serve_on_node")), "{warnings:?}");
}

#[test]
fn the_admin_api_over_tls_needs_a_certificate_and_its_key() {
    let found = mistakes("deployment: {admin: {https_admin: true, admin_api_mtls: {admin_ssl_ca_cert: ca.pem}}}");
    for key in ["admin_ssl_cert", "admin_ssl_cert_key"] {
        let told = format!("deployment.admin.admin_api_mtls.{key}: is missing");
        assert!(found.iter().any(|m| m.starts_with(&told)), "{key} in {found:?}");
    }
    let mtls = "{admin_ssl_cert: ../t/a.pem, admin_ssl_cert_key: /etc/a.key}";
    let (config, warnings) = ok(&format!("deployment: {{admin: {{https_admin: true, admin_api_mtls: {mtls}}}}}"));
    let tls = config.admin.unwrap().tls.unwrap();
    assert_eq!((tls.cert, tls.key, tls.client_ca), ("/p/conf/../t/a.pem".into(), "/etc/a.key".into(), None));
    assert_eq!(warnings, []);
    assert!(ok(&format!("deployment: {{admin: {{admin_api_mtls: {mtls}}}}}")).0.admin.unwrap().tls.is_none());
}

#[test]
fn roles_serve_the_admin_api_or_requests_or_both() {
    for (text, admin, requests) in [
        ("", true, true),
        ("apisix: {enable_admin: false}", false, true),
        ("deployment: {role: data_plane}", false, true),
        ("{apisix: {enable_admin: false}, deployment: {role: control_plane}}", true, false),
    ] {
        let (config, _) = ok(text);
        assert_eq!((config.admin.is_some(), !config.listen.is_empty()), (admin, requests), "{text}");
        assert_eq!(!config.listen_tls.is_empty(), requests, "{text}");
    }
    assert_eq!(ok("").0.status, None);
    assert_eq!(ok("apisix: {status: {ip: 127.0.0.1, port: 7085}}").0.status, Some("127.0.0.1:7085".parse().unwrap()));
}

#[test]
fn mistakes_of_etcd_and_listeners_are_all_told() {
    let mistakes = mistakes(
        r#"{"apisix": {"ssl": {"listen": [{"port": "x"}, {"ip": "nope", "port": 1}, "foo"]}},
            "deployment": {"role": "traditional", "role_traditional": {"config_provider": "etcd"}, "etcd": {
                "host": ["http://127.0.0.1:2379", "https://etcd.example", "ftp://x:1", "nohost", "http://127.0.0.1:99999", 5],
                "timeout": "soon", "prefix": [5], "tls": {"verify": "maybe", "cert": "/no/such.pem"}}}}"#,
    );
    for path in [
        "apisix.ssl.listen[0]: ",
        "apisix.ssl.listen[1]: ",
        "apisix.ssl.listen[2]: ",
        "deployment.etcd.host[2]: ",
        "deployment.etcd.host[3]: ",
        "deployment.etcd.host[4]: ",
        "deployment.etcd.host[5]: ",
        "deployment.etcd.timeout: ",
        "deployment.etcd.prefix: ",
        "deployment.etcd.tls.verify: ",
        "deployment.etcd.tls: cert and key",
        "deployment.etcd.tls.cert: /no/such.pem",
    ] {
        assert!(mistakes.iter().any(|m| m.contains(path)), "{path} in {mistakes:#?}");
    }
    assert_eq!(mistakes.len(), 12, "{mistakes:#?}");
    ok(
        "deployment: {role: traditional, role_traditional: {config_provider: embedded}, etcd: {host: [nohost], tls: {cert: /no/such.pem}}}",
    );
    ok("deployment: {role: traditional, role_traditional: {config_provider: etcd}, etcd: {prefix: '', timeout: '30'}}");
    let (_, warnings) = ok("apisix: {node_listen: [{port: 1, prot: 5}]}");
    assert!(warnings.iter().any(|w| w.0.contains("apisix.node_listen[0].prot")), "{warnings:?}");
}

#[test]
fn numbers_and_sizes_are_bounded() {
    let workers = |n: u32| format!("nginx_config: {{worker_processes: {n}}}");
    assert_eq!(ok(&workers(512)).0.workers, 512);
    for n in [0, 513] {
        let told = mistakes(&workers(n));
        assert!(told[0].ends_with(&format!("{n} is not a whole number from 1 to 512")), "{told:?}");
    }
    let body = |size: &str| format!("nginx_config: {{http: {{client_max_body_size: {size}}}}}");
    ok(&body("1024g"));
    let told = mistakes(&body("1025g"));
    assert!(told[0].contains("is not a size"), "{told:?}");
}

/// The configuration with variables in `nginx_config.envs`, which count before the process's own.
fn with_envs(envs: &str, text: &str) -> Result<Config, Mistakes> {
    parse(Path::new("/p"), &format!("{text}\nnginx_config: {{envs: [{envs}]}}")).map(|(config, _)| config)
}

#[test]
fn keys_that_are_texts_take_numbers_as_they_stand() {
    let text = r#"
apisix:
  data_encryption: {keyring: [1234567890123456, "${{KR}}"]}
  ssl: {fallback_sni: 5}
deployment:
  admin: {admin_key: [{name: 7, key: 12345678, role: admin}, {name: "${{NAME}}", key: "${{AK}}", role: viewer}]}
  etcd: {user: 1, password: "${{AK}}", prefix: "${{AK}}", tls: {sni: 2}}
plugin_attr: {prometheus: {metric_prefix: 9}, own: {number: "${{N}}", flag: "${{F}}"}}
"#;
    let config = with_envs("AK=0012345, NAME=true, KR=0000000000000001, N=5, F=false", text).unwrap();
    let keys: Vec<_> = config.admin.unwrap().keys.into_iter().map(|k| (k.name, k.key)).collect();
    assert_eq!(keys, [("7".into(), "12345678".into()), ("true".into(), "0012345".into())]);
    assert_eq!(config.keyring, ["1234567890123456", "0000000000000001"]);
    assert_eq!((config.tls.fallback_sni.as_deref(), &*config.prometheus.prefix), (Some("5"), "9"));
    let etcd = &config.json["deployment"]["etcd"];
    assert_eq!(etcd["tls"]["sni"], "2");
    let user_and_password = ["user", "password", "prefix"].map(|key| etcd[key].clone());
    assert_eq!(user_and_password, ["1", "0012345", "0012345"]);
    assert_eq!(config.json["plugin_attr"]["own"], json!({"number": 5, "flag": false}));
    let wrong =
        "deployment: {admin: {admin_key: [{name: a, key: 1.50, role: admin}]}, etcd: {password: true, user: 1e3}}";
    let told = mistakes(wrong);
    let (number, flag) = ("a number with a fraction", "true or false");
    for (path, what) in [("admin.admin_key[0].key", number), ("etcd.password", flag), ("etcd.user", number)] {
        let line = format!("deployment.{path}: {what} is not a text; put it in quotes");
        assert!(told.contains(&line), "{line} in {told:?}");
    }
    assert_eq!(told.len(), 3, "{told:?}");
}

#[test]
fn variables_stand_in_keys_too() {
    let text = "apisix: {custom_lua_shared_dict: {\"${{DICT}}_a\": 1m, \"${{DEF:=own}}\": 2m}}";
    let config = with_envs("DICT=env", text).unwrap();
    for (name, size) in [("env_a", 1 << 20), ("own", 2 << 20)] {
        assert!(config.shared_dicts.contains(&(name.into(), size)), "{name} in {:?}", config.shared_dicts);
    }
    assert!(!config.json.to_string().contains("${{"), "no key is left as it was");
    let told = mistakes("apisix: {custom_lua_shared_dict: {\"${{NO_SUCH_DICT}}\": 1m}}");
    assert!(
        told[0].ends_with("can't find environment variable NO_SUCH_DICT: set it, or write ${{NO_SUCH_DICT:=default}}"),
        "{told:?}"
    );
}

#[test]
fn of_a_repeated_key_the_last_counts_with_a_warning() {
    let (config, warnings) = ok("apisix:\n  node_listen: 9000\n  node_listen: 9001\n");
    assert_eq!(config.listen[0].addr.port(), 9001);
    let told = "apisix.node_listen: is written more than once, again in line 3; the last one counts";
    assert_eq!(warnings, [Warning(told.into())]);
}

#[test]
fn a_typo_is_told_wherever_it_is() {
    for (text, path, meant) in [
        ("deployment: {etcd: {hosts: []}}", "deployment.etcd.hosts", "deployment.etcd.host"),
        ("deployment: {etcd: {prefxi: /a}}", "deployment.etcd.prefxi", "deployment.etcd.prefix"),
        ("deployment: {etcd: {tls: {crt: a}}}", "deployment.etcd.tls.crt", "deployment.etcd.tls.cert"),
        ("deployment: {etcd: {usr: a}}", "deployment.etcd.usr", "deployment.etcd.user"),
        (
            "nginx_config: {http: {keepalive_timout: 1s}}",
            "nginx_config.http.keepalive_timout",
            "nginx_config.http.keepalive_timeout",
        ),
        (
            "nginx_config: {http: {upstream: {keepalives: 1}}}",
            "nginx_config.http.upstream.keepalives",
            "nginx_config.http.upstream.keepalive",
        ),
        (
            "nginx_config: {stream: {real_ip_form: []}}",
            "nginx_config.stream.real_ip_form",
            "nginx_config.stream.real_ip_from",
        ),
        ("apisix: {control: {prt: 1}}", "apisix.control.prt", "apisix.control.port"),
        ("apisix: {status: {prt: 1}}", "apisix.status.prt", "apisix.status.port"),
        (
            "apisix: {proxy_protocol: {enable_tcp: true}}",
            "apisix.proxy_protocol.enable_tcp",
            "apisix.proxy_protocol.enable_tcp_pp",
        ),
        (
            "apisix: {proxy_mode: http&stream, stream_proxy: {tpc: [1], udp: [9]}}",
            "apisix.stream_proxy.tpc",
            "apisix.stream_proxy.tcp",
        ),
        (
            "deployment: {role_data_plane: {config_providr: yaml}}",
            "deployment.role_data_plane.config_providr",
            "deployment.role_data_plane.config_provider",
        ),
        (
            "deployment: {role_control_plane: {config_providr: etcd}}",
            "deployment.role_control_plane.config_providr",
            "deployment.role_control_plane.config_provider",
        ),
        (
            "deployment: {role_traditional: {config_providr: etcd}}",
            "deployment.role_traditional.config_providr",
            "deployment.role_traditional.config_provider",
        ),
        (
            "deployment: {admin: {admin_api_mtls: {admin_ssl_crt: a}}}",
            "deployment.admin.admin_api_mtls.admin_ssl_crt",
            "deployment.admin.admin_api_mtls.admin_ssl_cert",
        ),
        ("discovery: {dns: {server: []}}", "discovery.dns.server", "discovery.dns.servers"),
    ] {
        let (_, warnings) = ok(text);
        assert_eq!(warnings, [Warning(format!("{path}: is not a known key; did you mean {meant}?"))], "{text}");
    }
    let (_, warnings) = ok(
        "discovery: {mine: {any: 1}, dns: {servers: [\"127.0.0.1:53\"]}}\nnginx_config: {http: {custom_lua_shared_dict: {a: 1m}}}",
    );
    assert_eq!(warnings, [], "what a registry takes is its own matter");
}

#[test]
fn what_has_no_effect_is_told_where_it_says_something_else_than_the_default() {
    for (text, path) in [
        ("nginx_config: {http: {proxy_ssl_server_name: false}}", "nginx_config.http.proxy_ssl_server_name"),
        ("deployment: {etcd: {watch_timeout: 5}}", "deployment.etcd.watch_timeout"),
        ("deployment: {etcd: {resync_delay: 5}}", "deployment.etcd.resync_delay"),
        ("deployment: {certs: {cert: a}}", "deployment.certs"),
        ("apisix: {enable_reuseport: false}", "apisix.enable_reuseport"),
    ] {
        assert_eq!(ok(text).1, [Warning(format!("{path}: has no effect here"))], "{text}");
    }
    assert_eq!(ok("nginx_config: {http: {proxy_ssl_server_name: true}}\ndeployment: {etcd: {startup_retry: 2}}").1, []);
}

#[test]
fn what_apisix_2_called_otherwise_is_told() {
    let (config, warnings) =
        ok("apisix: {admin_key: [{name: a, key: k, role: admin}], port_admin: 1}\netcd: {host: a}");
    let keys = ["apisix.admin_key", "apisix.port_admin", "etcd"];
    assert_eq!(warnings.len(), keys.len(), "{warnings:?}");
    for (Warning(text), key) in warnings.iter().zip(keys) {
        assert!(
            text.starts_with(&format!("{key}: is not a known key, and has no effect: it is deployment.")),
            "{text}"
        );
    }
    assert_eq!(config.admin.unwrap().keys[0].key, "");
    assert_eq!(ok("apisix: {admin_key: null}").1, []);
}

#[test]
fn the_mode_for_developers_has_one_worker() {
    let (config, warnings) = ok("apisix: {enable_dev_mode: true}\nnginx_config: {worker_processes: 4}");
    assert_eq!((config.workers, warnings.len()), (1, 0));
}

#[test]
fn a_name_server_with_a_zone_is_passed_over() {
    let (config, warnings) = ok("apisix: {dns_resolver: [\"fe80::21c:42ff:fe00:18%eth0\", \"[::1]:5353\", 1.1.1.1]}");
    assert_eq!(config.resolver.servers, ["[::1]:5353".parse().unwrap(), "1.1.1.1:53".parse().unwrap()]);
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].0.starts_with("apisix.dns_resolver[0]: fe80::21c:42ff:fe00:18%eth0 has a zone"));
}

#[test]
fn reserved_variables_count_before_the_file() {
    let etcd = "deployment: {etcd: {host: [\"http://127.0.0.1:2333\"]}}";
    let hosts = r#"'APISIX_DEPLOYMENT_ETCD_HOST=["http://a:1", "http://b:2"]'"#;
    let config = with_envs(&format!("{hosts}, APISIX_WORKER_PROCESSES=8"), etcd).unwrap();
    assert_eq!(config.json["deployment"]["etcd"]["host"], json!(["http://a:1", "http://b:2"]));
    assert_eq!(config.json["deployment"]["etcd"]["prefix"], "/apisix");
    assert_eq!(config.workers, 8);
    let told = with_envs("APISIX_DEPLOYMENT_ETCD_HOST=http://a:1, APISIX_WORKER_PROCESSES=many", etcd).unwrap_err().0;
    assert!(told[0].starts_with("APISIX_DEPLOYMENT_ETCD_HOST: not a JSON list of texts"), "{told:?}");
    assert_eq!(told[1], "APISIX_WORKER_PROCESSES: \"many\" is not a whole number");
    let told = with_envs("APISIX_WORKER_PROCESSES=0", etcd).unwrap_err().0;
    assert!(told[0].contains("0 is not a whole number from 1 to 512"), "{told:?}");
}
