use serde_json::json;

use super::*;
use crate::model::upstream::{Balance, HashOn, Node, PassHost};

fn parsed(kind: Kind, id: &str, value: Value) -> Result<Parsed> {
    let keyring = Keyring::new(["edd1c9f0985e76a2"], true).expect("a key");
    parse(kind, id, &value.to_string(), &ParseContext::new(&keyring))
}

fn refusal(kind: Kind, value: Value) -> String {
    parsed(kind, "1", value).expect_err("must be refused").to_string()
}

fn route(value: Value) -> Route {
    match parsed(Kind::Route, "1", value) {
        Ok(Parsed::Route(route)) => route,
        other => panic!("{other:?}"),
    }
}

fn upstream(value: Value) -> Arc<Upstream> {
    match parsed(Kind::Upstream, "1", value) {
        Ok(Parsed::Upstream(upstream)) => upstream,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_place_that_nobody_can_read_does_not_cost_the_other_nodes() {
    let upstream = upstream(json!({"nodes": {"127.0.0.1:80": 1, "::1:1980": 1}}));
    let places: Vec<_> = upstream.nodes.iter().map(|node| (&*node.host, node.port)).collect();
    assert_eq!(places, [("127.0.0.1", 80), ("::1:1980", 80)]);
}

fn node(host: &str, port: u16, explicit_port: bool, weight: u32) -> Node {
    Node { host: host.into(), ip: host.parse().ok(), port, explicit_port, weight, priority: 0 }
}

#[test]
fn a_route_is_read_with_all_its_fields() {
    let route = route(json!({
        "id": 1,
        "uris": ["/a", "/b/*"],
        "hosts": ["Foo.com", "*.Bar.com"],
        "methods": ["GET", "PUT"],
        "remote_addr": "10.0.0.0/8",
        "vars": [["arg_a", "==", "b"]],
        "priority": 3,
        "status": 0,
        "service_id": 7,
        "upstream_id": "u-1",
        "timeout": {"connect": 1, "send": 2.5, "read": 3},
        "plugins": {"key-auth": {"_meta": {"disable": true, "priority": 9}}, "cors": {}},
    }));
    assert_eq!(route.uris.iter().map(|u| &**u).collect::<Vec<_>>(), ["/a", "/b/*"]);
    assert_eq!(route.hosts, ["foo.com".into(), "*.bar.com".into()]);
    assert!(route.methods.allows(b"PUT") && !route.methods.allows(b"POST"));
    assert_eq!(route.remote_addrs, ["10.0.0.0/8".parse().expect("a network")]);
    assert!(route.vars.is_some() && !route.enabled);
    assert_eq!(
        (route.priority, route.service_id.as_deref(), route.upstream_id.as_deref()),
        (3, Some("7"), Some("u-1"))
    );
    assert_eq!(route.timeout.as_deref().map(|t| t.send), Some(Duration::from_millis(2500)));
    let auth = route.plugins.get("key-auth").expect("is there");
    assert!(auth.meta.disable && auth.meta.priority == Some(9));
    assert_eq!(&*route.plugins.get("cors").expect("is there").json, "{}");
}

#[test]
fn nodes_are_read_in_both_forms() {
    let map = upstream(json!({"nodes": {"127.0.0.1:8080": 1, "[::1]:81": 2, "foo.com": 0}, "type": "roundrobin"}));
    assert_eq!(
        map.nodes[..],
        [node("127.0.0.1", 8080, true, 1), node("::1", 81, true, 2), node("foo.com", 80, false, 0)]
    );
    assert_eq!((map.id.as_deref(), &map.balance, &map.pass_host), (Some("1"), &Balance::RoundRobin, &PassHost::Pass));
    let list = upstream(json!({"scheme": "https", "nodes": [
        {"host": "[::1]", "port": 80, "weight": 1}, {"host": "foo.com", "weight": 1, "priority": -1}
    ]}));
    let second = Node { priority: -1, ..node("foo.com", 443, false, 1) };
    assert_eq!(list.nodes[..], [node("::1", 80, true, 1), second]);
    assert!(upstream(json!({"nodes": []})).nodes.is_empty());
}

#[test]
fn what_is_left_out_has_the_defaults_of_the_schema() {
    let mut value = json!({"nodes": {}, "keepalive_pool": {}});
    let bare = upstream(value.clone());
    check(Kind::Upstream, "1", &mut value).expect("valid");
    let filled = upstream(value);
    assert_eq!(bare.keepalive, filled.keepalive);
    assert_eq!((&bare.balance, &bare.pass_host, bare.scheme), (&filled.balance, &filled.pass_host, filled.scheme));
    assert_eq!(bare.keepalive.as_deref().map(|k| k.size), Some(320));
}

#[test]
fn a_hash_needs_its_key() {
    let chash = |extra: Value| {
        let mut value = json!({"type": "chash", "nodes": {"127.0.0.1:80": 1}});
        value.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
        value
    };
    let on = |on, key: &str| Balance::Chash { on, key: key.into() };
    assert_eq!(upstream(chash(json!({"key": "remote_addr"}))).balance, on(HashOn::Vars, "remote_addr"));
    assert_eq!(upstream(chash(json!({"hash_on": "consumer"}))).balance, on(HashOn::Consumer, ""));
    assert_eq!(refusal(Kind::Upstream, chash(json!({}))), "missing key");
    assert_eq!(refusal(Kind::Upstream, chash(json!({"hash_on": "header"}))), "missing key");
    assert_eq!(
        refusal(Kind::Upstream, chash(json!({"hash_on": "header", "key": "$#^@"}))),
        "invalid configuration: failed to match pattern \"^[a-zA-Z0-9-_]+$\" with \"$#^@\""
    );
    assert!(refusal(Kind::Upstream, chash(json!({"key": "not_support"}))).ends_with("with \"not_support\""));
}

#[test]
fn refusals_read_as_in_apisix() {
    let upstream = json!({"nodes": {"127.0.0.1:8080": 1}, "type": "roundrobin"});
    for (kind, value, text) in [
        (
            Kind::Route,
            json!({"uri": "/a", "upstream": upstream, "host": "a.com", "hosts": ["b.com"]}),
            "only one of host or hosts is allowed",
        ),
        (
            Kind::Route,
            json!({"uri": "/a", "upstream": upstream, "vars": [["remote_addr", "=", "127.0.0.1"]]}),
            "failed to validate the 'vars' expression: invalid operator '='",
        ),
        (
            Kind::Route,
            json!({"uri": "/a", "methods": ["invalid_method"]}),
            "invalid configuration: property \"methods\" validation failed: failed to validate item 1: matches none of the enum values",
        ),
        (
            Kind::Upstream,
            json!({"nodes": [{"host": "::1", "port": 80, "weight": 1}]}),
            "invalid configuration: IPv6 address must be enclosed with '[' and ']'",
        ),
        (
            Kind::Upstream,
            json!({"nodes": {"127.0.0.1:80": 1}, "pass_host": "rewrite"}),
            "`upstream_host` can't be empty when `pass_host` is `rewrite`",
        ),
        (Kind::Consumer, json!({}), "invalid configuration: property \"username\" is required"),
        (Kind::GlobalRule, json!({}), "invalid configuration: property \"plugins\" is required"),
        (Kind::Ssl, json!({"sni": "a.com"}), "invalid configuration: then clause did not match"),
    ] {
        assert_eq!(refusal(kind, value.clone()), text, "{value}");
    }
    assert!(parse(Kind::Route, "1", "{", &ParseContext::new(&Keyring::default())).is_err());
}

#[test]
fn consumers_index_their_decrypted_keys() {
    let value = json!({"username": "foo", "group_id": 5, "plugins": {
        "basic-auth": {"username": "foo", "password": "77+NmbYqNfN+oLm0aX5akg=="}, "limit-count": {"key": "x"}
    }});
    let Ok(Parsed::Consumer(consumer)) = parsed(Kind::Consumer, "foo", value) else { panic!("a consumer") };
    let keys: Vec<_> = consumer.auth_keys.iter().map(|k| (&*k.plugin, &*k.field, &*k.value)).collect();
    assert_eq!(keys, [("basic-auth", "password", "bar"), ("basic-auth", "username", "foo")]);
    assert_eq!(consumer.group_id.as_deref(), Some("5"));
    assert!(consumer.plugins.get("basic-auth").is_some_and(|conf| conf.json.contains("\"bar\"")));
}

#[test]
fn metadata_is_decrypted_for_plugins() {
    let keyring = Keyring::new(["edd1c9f0985e76a2"], true).expect("a key");
    let value = json!({"master_apikey": keyring.encrypt("secret")});
    let Ok(Parsed::PluginMetadata(metadata)) = parsed(Kind::PluginMetadata, "azure-functions", value) else {
        panic!("metadata")
    };
    assert_eq!(&*metadata.json, r#"{"master_apikey":"secret"}"#);
}

#[test]
fn credentials_hold_one_auth_plugin() {
    let id = "jack/credentials/c1";
    let good = parsed(Kind::Credential, id, json!({"plugins": {"key-auth": {"key": "k"}}}));
    assert!(matches!(good, Ok(Parsed::Credential(c)) if &*c.username == "jack" && c.auth_keys.len() == 1));
    let foreign = parsed(Kind::Credential, id, json!({"plugins": {"limit-count": {}}}));
    assert_eq!(foreign.expect_err("refused").to_string(), "only supports auth type plugins in consumer credential");
    let two = parsed(Kind::Credential, id, json!({"plugins": {"key-auth": {}, "basic-auth": {}}}));
    assert!(two.is_err_and(|e| e.to_string().ends_with("expect object to have at most 1 properties")));
}

#[test]
fn certificates_are_read_and_matched_with_their_keys() {
    let pair = |name: &str| {
        let made = rcgen::generate_simple_self_signed(vec![name.to_owned()]).expect("a certificate");
        (made.cert.pem(), made.signing_key.serialize_pem())
    };
    let ((cert, key), (_, other_key)) = (pair("a.com"), pair("b.com"));
    let keyring = Keyring::new(["edd1c9f0985e76a2"], true).expect("a key");
    let value = json!({"snis": ["A.com"], "cert": cert, "key": keyring.encrypt_pkey(&key)});
    let Ok(Parsed::Ssl(ssl)) = parsed(Kind::Ssl, "1", value) else { panic!("a certificate") };
    assert_eq!(ssl.snis, ["a.com".into()]);
    assert_eq!(&*ssl.pairs[0].1, key);
    assert!(ssl.enabled && !ssl.is_client);
    let mismatch = refusal(Kind::Ssl, json!({"sni": "a.com", "cert": cert, "key": other_key}));
    assert!(mismatch.contains("do not match"), "{mismatch}");
    let broken = "-".repeat(200);
    assert_eq!(
        refusal(Kind::Ssl, json!({"sni": "a.com", "cert": broken, "key": key})),
        "failed to parse cert: PEM_read_bio_X509_AUX() failed"
    );
    assert_eq!(
        refusal(Kind::Ssl, json!({"sni": "a.com", "cert": cert, "key": broken})),
        "failed to parse key: PEM_read_bio_PrivateKey() failed"
    );
    assert_eq!(
        refusal(Kind::Ssl, json!({"sni": "a.com", "cert": cert, "key": "x".repeat(100)})),
        "failed to decrypt previous encrypted key"
    );
}

#[test]
fn keys_past_the_bound_are_not_indexed_and_times_are_cut() {
    let keys = |len: usize| {
        let value = json!({"username": "jack", "plugins": {"key-auth": {"key": "k".repeat(len)}}});
        match parsed(Kind::Consumer, "jack", value) {
            Ok(Parsed::Consumer(consumer)) => consumer.auth_keys.len(),
            other => panic!("{other:?}"),
        }
    };
    let bound = crate::model::consumer::MAX_AUTH_KEY_BYTES;
    assert_eq!((keys(bound), keys(bound + 1)), (1, 0));
    assert_eq!(seconds(&json!(1e300)), Some(Duration::from_secs(1_000_000_000)));
    assert_eq!(seconds(&json!(-1)), Some(Duration::ZERO));
}

#[test]
fn what_is_no_object_is_told_in_part() {
    let long = "x".repeat(MAX_SHOWN + 1);
    for (value, shown) in [(json!("me"), "me"), (json!([1]), "[1]"), (json!(long), &long[..MAX_SHOWN])] {
        let told = format!("invalid item data of [/apisix/routes/1], val: {shown}, it should be an object");
        assert_eq!(refusal(Kind::Route, value), told);
    }
}

#[test]
fn floats_without_a_fraction_are_whole_numbers() {
    for (text, expected) in [
        (r#"{"a": [1.0, 1e3, {"b": -2.0}], "c": "1.0"}"#, r#"{"a":[1,1000,{"b":-2}],"c":"1.0"}"#),
        ("[-0.0, 0.5, 1e-3, 7]", "[0,0.5,0.001,7]"),
        (
            "[900719925474099.0, 9007199254740992.0, -900719925474099.0]",
            "[900719925474099,9007199254740992.0,-900719925474099]",
        ),
        ("[1e300, 18446744073709551615]", "[1e+300,18446744073709551615]"),
    ] {
        let mut value = serde_json::from_str(text).expect("JSON");
        with_whole_numbers(&mut value);
        assert_eq!(value.to_string(), expected);
    }
}
