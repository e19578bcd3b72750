//! The Admin API beside resources: the whole configuration as one document, forms of answers, TLS, roles.

use std::{
    io::{Read, Write},
    net::TcpStream,
    sync::Arc,
};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName};
use serde_json::{Value, json};

use crate::support::{DEADLINE, Dir, Gateway, Reply, Upstream, eventually, get, peers::Etcd, request};

/// A gateway whose configuration is one document.
fn standalone(extra: Value) -> Gateway {
    let mut settings = json!({"deployment": {"role": "traditional", "role_traditional": {"config_provider": "yaml"}}});
    settings.as_object_mut().expect("an object").extend(extra.as_object().cloned().unwrap_or_default());
    Gateway::with(settings)
}

/// `PUT /configs`.
fn replace(gw: &Gateway, digest: &str, document: impl Into<Value>) -> Reply {
    let key = gw.key();
    let headers = [("X-API-KEY", key.as_str()), ("X-Digest", digest)];
    request(&gw.admin_address(), "PUT", "/apisix/admin/configs", &headers, document.into().to_string().as_bytes())
}

fn error(reply: &Reply) -> String {
    reply.json()["error_msg"].as_str().unwrap_or_default().to_owned()
}

fn route(id: &str, uri: &str, up: &Upstream) -> Value {
    json!({"id": id, "uri": uri, "upstream": {"type": "roundrobin", "nodes": {up.addr(): 1}}})
}

#[test]
fn a_document_replaces_the_whole_configuration() {
    let up = Upstream::echo();
    let gw = standalone(json!({}));
    let empty = gw.admin("GET", "/configs", ());
    assert_eq!((empty.status, &empty.json()["routes_conf_version"]), (200, &json!(0)));
    assert_eq!((empty.header("x-digest"), empty.header("x-last-modified")), (None, None));
    let first = replace(&gw, "d1", json!({"routes": [route("r1", "/one", &up)]}));
    assert_eq!((first.status, first.header("x-digest"), first.text().as_str()), (202, Some("d1"), ""));
    assert!(first.header("x-last-modified").is_some_and(|at| at.parse::<u64>().is_ok_and(|at| at > 0)));
    assert_eq!(gw.get("/one").status, 200, "it is served when it is answered");
    assert_eq!(replace(&gw, "d1", json!({})).status, 204, "the same digest changes nothing");
    let told = gw.admin("HEAD", "/configs", ());
    assert_eq!((told.status, told.header("x-digest")), (200, Some("d1")));
    let shown = gw.admin("GET", "/configs", ()).json();
    assert_eq!((&shown["routes"][0]["id"], &shown["upstreams_conf_version"]), (&json!("r1"), &json!(1)));
    let key = gw.key();
    let yaml = format!("routes:\n- id: r2\n  uri: /two\n  upstream:\n    nodes:\n      \"{}\": 1\n", up.addr());
    let headers = [("X-API-KEY", key.as_str()), ("X-Digest", "d2"), ("Content-Type", "application/yaml")];
    let second = request(&gw.admin_address(), "PUT", "/apisix/admin/configs", &headers, yaml.as_bytes());
    assert_eq!(second.status, 202, "{}", second.text());
    assert_eq!((gw.get("/one").status, gw.get("/two").status), (404, 200));
    let headers = [("X-API-KEY", key.as_str()), ("Accept", "application/yaml")];
    let shown = request(&gw.admin_address(), "GET", "/apisix/admin/configs", &headers, b"");
    assert_eq!(shown.header("content-type"), Some("application/yaml"));
    assert!(shown.text().contains("id: r2\n") && shown.text().contains("routes_conf_version: 2\n"), "{}", shown.text());
}

#[test]
fn a_document_that_is_wrong_changes_nothing() {
    let up = Upstream::echo();
    let gw = standalone(json!({}));
    let good = json!({"routes_conf_version": 10, "routes": [route("r1", "/one", &up)]});
    assert_eq!(replace(&gw, "d1", good).status, 202);
    let key = gw.key();
    let bare = request(&gw.admin_address(), "PUT", "/apisix/admin/configs", &[("X-API-KEY", &key)], b"{}");
    assert_eq!((bare.status, error(&bare).as_str()), (400, "missing digest header"));
    let twice = json!({"routes": [route("r1", "/two", &up), route("r1", "/two", &up)]});
    let credential = json!({"id": "jo/credentials/c", "plugins": {"key-auth": {"key": "k"}}});
    let jo = json!({"username": "jo"});
    for (document, told) in [
        (json!({"routes_conf_version": 9}), "routes_conf_version must be greater than or equal to (10)"),
        (json!({"routes_conf_version": "x"}), "routes_conf_version must be a number"),
        (twice, "found duplicate id r1 in routes"),
        (json!({"consumers": [jo, jo]}), "found duplicate username jo in consumers"),
        (
            json!({"consumers": [jo, credential, credential]}),
            "found duplicate credential id jo/credentials/c in consumers",
        ),
        (json!({"routes": [{"id": "r1", "uri": "/a", "plugins": {"nope": {}}}]}), "unknown plugin [nope]"),
        (
            json!({"routes": [{"id": "r1", "uri": 1}]}),
            "invalid configuration: property \"uri\" validation failed: wrong type: expected string, got number",
        ),
        (json!({"routes": 1}), "routes must be a list"),
        (json!({"routes_conf_version": 1e300}), "routes_conf_version must be a whole number up to 9007199254740992"),
        (
            json!({"routes": [{"id": "r1", "modifiedIndex": 1.5}]}),
            "modifiedIndex must be a whole number up to 9007199254740992",
        ),
        (
            json!({"consumers": [{"id": "a", "username": "jo"}, {"id": "b", "username": "jo"}]}),
            "found duplicate username jo in consumers",
        ),
    ] {
        let refused = replace(&gw, "d2", document);
        assert_eq!((refused.status, error(&refused).as_str()), (400, told));
    }
    let headers = [("X-API-KEY", key.as_str()), ("X-Digest", "d2")];
    for (body, told) in [
        ("", "invalid request body: empty request body"),
        ("{abcd", "invalid request body: Expected object key string but found invalid token at character 2"),
    ] {
        let refused = request(&gw.admin_address(), "PUT", "/apisix/admin/configs", &headers, body.as_bytes());
        assert_eq!((refused.status, error(&refused).as_str()), (400, told));
    }
    assert_eq!(gw.admin("HEAD", "/configs", ()).header("x-digest"), Some("d1"));
    assert_eq!(gw.get("/one").status, 200);
    let single = gw.admin("PUT", "/routes/r2", route("r2", "/two", &up));
    assert_eq!(single.status, 400);
    assert!(error(&single).contains("PUT /apisix/admin/configs"), "{}", single.text());
    assert_eq!(Gateway::start().admin("GET", "/configs", ()).status, 404, "where each object is stored by itself");
}

#[test]
fn a_document_that_is_taken_is_served_whole() {
    let up = Upstream::echo();
    let gw = standalone(json!({}));
    let refused = replace(&gw, "d1", json!({"consumers": [{"id": "a/credentials/b/c", "plugins": {}}]}));
    assert_eq!(refused.status, 400, "{}", refused.text());
    let mut plain = route("r1", "/one", &up);
    plain["plugins"] = json!({"key-auth": null});
    let document = json!({
        "routes": [plain],
        "services": [{"id": "s"}, {"id": "s/graphql_cost_decorations/d", "field_path": "A.b"}],
        "consumers": [{"id": "x", "username": "jo"}, {"id": "jo/credentials/c", "plugins": {"key-auth": {"key": "k"}}}],
    });
    let taken = replace(&gw, "d1", document);
    assert_eq!(taken.status, 202, "{}", taken.text());
    assert_eq!(get(&gw.control(), "/v1/config/errors").json()["errors"], json!([]));
    assert_eq!((gw.get("/one").status, gw.send("GET", "/one", &[("apikey", "k")], b"").status), (401, 200));
    assert_eq!(gw.admin("GET", "/services/s/graphql_cost_decorations/d", ()).status, 200);
}

#[test]
fn documents_come_one_after_the_other() {
    let gw = standalone(json!({}));
    // Checking so many routes gives way to the others in between.
    let document = |uri: &str| {
        let item = |n: u32| json!({"id": n, "uri": uri, "plugins": {"echo": {"body": uri}}});
        json!({"routes": (1..=500).map(item).collect::<Vec<_>>()})
    };
    let put = |digest: &str| replace(&gw, digest, document("/same")).status;
    let mut statuses = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| put("same"))).collect();
        threads.into_iter().map(|thread| thread.join().expect("is answered")).collect::<Vec<_>>()
    });
    statuses.sort_unstable();
    assert_eq!(statuses, [202, 204, 204, 204], "the others see the digest of the first");
    assert_eq!(gw.admin("GET", "/configs", ()).json()["routes_conf_version"], 1);
}

#[test]
fn a_viewer_reads_the_document_and_does_not_write_it() {
    let keys =
        json!([{"name": "a", "key": "k-admin", "role": "admin"}, {"name": "v", "key": "k-viewer", "role": "viewer"}]);
    let gw = standalone(json!({"deployment": {
        "role": "traditional", "role_traditional": {"config_provider": "yaml"}, "admin": {"admin_key": keys},
    }}));
    let headers = [("X-API-KEY", "k-viewer"), ("X-Digest", "d")];
    let ask = |method: &str, path: &str, body: &str| {
        request(&gw.admin_address(), method, &format!("/apisix/admin{path}"), &headers, body.as_bytes())
    };
    assert_eq!((ask("GET", "/configs", "").status, ask("HEAD", "/configs", "").status), (200, 200));
    for (method, path) in [("PUT", "/configs"), ("POST", "/configs/validate")] {
        let refused = ask(method, path, "{}");
        assert_eq!((refused.status, &refused.json()["description"]), (401, &json!("invalid method for role viewer")));
    }
    let told = ask("HEAD", "/configs", "");
    assert_eq!(told.header("x-digest"), None, "nothing was stored");
}

#[test]
fn probes_are_told_whether_there_is_a_configuration() {
    let gw = standalone(json!({"apisix": {"status": {"ip": "127.0.0.1", "port": 0}}}));
    assert_eq!(get(&gw.status(), "/status").json(), json!({"status": "ok"}));
    let early = get(&gw.status(), "/status/ready");
    assert_eq!((early.status, &early.json()["status"]), (503, &json!("error")));
    assert_eq!(replace(&gw, "d", json!({})).status, 202);
    assert_eq!(get(&gw.status(), "/status/ready").status, 200);
    assert_eq!(get(&gw.status(), "/other").status, 404);
}

#[test]
fn a_document_is_checked_without_being_stored() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    let good = json!({"routes": [route("r1", "/a", &up), {"uri": "/b", "service_id": "not-there"}]});
    assert_eq!(gw.admin("POST", "/configs/validate", good).status, 200);
    assert_eq!(gw.admin("GET", "/routes/r1", ()).status, 404);
    let bad = json!({
        "routes": [{"id": "r1", "uri": 1}, route("r2", "/", &up), {"id": "r3", "uri": 2}],
        "upstreams": [{"id": "u", "type": "chash", "hash_on": "vars", "nodes": {"127.0.0.1:1": 1}}],
    });
    let reply = gw.admin("POST", "/configs/validate", bad);
    assert_eq!((reply.status, error(&reply).as_str()), (400, "Configuration validation failed"));
    let errors = reply.json()["errors"].clone();
    let places: Vec<_> = errors
        .as_array()
        .expect("a list")
        .iter()
        .map(|e| json!([e["resource_type"], e["index"], e["resource_id"]]))
        .collect();
    assert_eq!(places, [json!(["routes", 0, "r1"]), json!(["routes", 2, "r3"]), json!(["upstreams", 0, "u"])]);
    assert!(errors[2]["error"].as_str().is_some_and(|text| text.contains("missing key")), "{errors}");
    let empty = gw.admin_text("POST", "/configs/validate", "", "application/json");
    assert_eq!((empty.status, error(&empty).as_str()), (400, "invalid request body: empty request body"));
}

#[test]
fn answers_have_the_older_form_where_it_is_asked_for() {
    let up = Upstream::echo();
    let gw = Gateway::with(json!({"deployment": {"admin": {"admin_api_version": "v2"}}}));
    let put = gw.admin("PUT", "/routes/1", route("1", "/a", &up));
    assert_eq!((put.status, put.header("x-api-version")), (201, Some("v2")));
    assert_eq!((&put.json()["action"], &put.json()["node"]["key"]), (&json!("set"), &json!("/apisix/routes/1")));
    let one = gw.admin("GET", "/routes/1", ()).json();
    assert_eq!((&one["action"], &one["count"], &one["node"]["value"]["uri"]), (&json!("get"), &json!(1), &json!("/a")));
    let all = gw.admin("GET", "/routes", ()).json();
    assert_eq!((&all["node"]["key"], &all["node"]["dir"]), (&json!("/apisix/routes"), &json!(true)));
    assert_eq!((&all["count"], &all["node"]["nodes"][0]["key"]), (&json!(1), &json!("/apisix/routes/1")));
    assert_eq!(gw.admin("PATCH", "/routes/1", json!({"desc": "x"})).json()["action"], "compareAndSwap");
    let posted = gw.admin("POST", "/routes", json!({"uri": "/b", "upstream": {"nodes": {up.addr(): 1}}})).json();
    assert_eq!((&posted["action"], &posted["node"]["value"]["uri"]), (&json!("create"), &json!("/b")));
    let deleted = gw.admin("DELETE", "/routes/1", ()).json();
    assert_eq!(
        (&deleted["action"], &deleted["deleted"], &deleted["node"]),
        (&json!("delete"), &json!("1"), &json!({}))
    );
}

#[test]
fn the_server_field_names_the_version_of_the_api() {
    for (tokens, expected) in [(true, "APISIX/3.18.0"), (false, "APISIX")] {
        let gw = Gateway::with(json!({"apisix": {"enable_server_tokens": tokens}}));
        assert_eq!(gw.admin("GET", "/routes", ()).header("server"), Some(expected));
        assert_eq!(get(&gw.admin_address(), "/apisix/admin/routes").header("server"), Some(expected), "without a key");
        let served = gw.get("/").header("server").unwrap_or_default().to_owned();
        assert!(served.starts_with("moongate"), "{served}");
    }
}

#[test]
fn the_admin_api_on_a_nodes_port_keeps_its_server_field() {
    let gw = Gateway::with(json!({"test_node": {"serve_on_node": ["admin"]}}));
    let asked = gw.send("GET", "/apisix/admin/routes", &[("X-API-KEY", &gw.key())], b"");
    assert_eq!((asked.status, asked.header("server")), (200, Some("APISIX/3.18.0")));
}

#[test]
fn a_plugin_of_two_global_rules_runs_for_neither() {
    let up = Upstream::echo();
    let gw = standalone(json!({}));
    let rule =
        |id: u32, status: u32| json!({"id": id, "plugins": {"fault-injection": {"abort": {"http_status": status}}}});
    let document = |rules: Value| json!({"routes": [route("r1", "/a", &up)], "global_rules": rules});
    assert_eq!(replace(&gw, "d1", document(json!([rule(1, 418)]))).status, 202);
    assert_eq!(gw.get("/a").status, 418);
    assert_eq!(replace(&gw, "d2", document(json!([rule(1, 418), rule(2, 451)]))).status, 202);
    assert_eq!(gw.get("/a").status, 200);
    gw.expect_log("Found fault-injection configured across different global rules. Removing it from execution list");
}

#[test]
fn a_control_plane_serves_the_admin_api_alone() {
    let gw = Gateway::with(json!({
        "apisix": {"enable_admin": false},
        "deployment": {"role": "control_plane", "role_control_plane": {"config_provider": "embedded"}},
    }));
    assert_eq!(gw.admin("GET", "/routes", ()).status, 200);
    assert_eq!(gw.listening("proxy"), json!([]));
    assert_eq!(gw.listening("proxy_tls"), json!([]));
}

#[test]
fn cost_decorations_belong_to_a_service() {
    let gw = Gateway::start();
    let at = |id: &str| format!("/services/shop/graphql_cost_decorations/{id}");
    let products = json!({"field_path": "Query.products", "mul_arguments": ["first"]});
    let early = gw.admin("PUT", &at("d1"), products.clone());
    assert_eq!((early.status, error(&early).as_str()), (404, "service not found"));
    gw.put("/services/shop", json!({}));
    let put = gw.put(&at("d1"), products);
    assert_eq!(
        (&put["key"], &put["value"]["service_id"]),
        (&json!("/apisix/services/shop/graphql_cost_decorations/d1"), &json!("shop"))
    );
    for (method, id, body, told) in [
        (
            "PUT",
            "d2",
            json!({"field_path": "A.b", "service_id": "blog"}),
            "wrong service_id, it is taken from the path",
        ),
        (
            "PUT",
            "d2",
            json!({"field_path": "Query.products"}),
            "field_path Query.products is already decorated on this service by [d1]",
        ),
        ("PATCH", "d1", json!({"service_id": "blog"}), "service_id can not be patched"),
        ("PATCH", "d1/service_id", json!("blog"), "service_id can not be patched"),
    ] {
        let refused = gw.admin(method, &at(id), body);
        assert_eq!((refused.status, error(&refused).as_str()), (400, told));
    }
    assert_eq!(gw.admin("PUT", &at("d2"), json!({"field_path": "Query."})).status, 400);
    let posted = gw.admin("POST", "/services/shop/graphql_cost_decorations", json!({"field_path": "A.b"}));
    assert_eq!(posted.status, 201, "{}", posted.text());
    assert_eq!(gw.admin("PATCH", &at("d1"), json!({"add_value": 7})).json()["value"]["add_value"], 7);
    assert_eq!(gw.admin("GET", "/services/shop/graphql_cost_decorations", ()).json()["total"], 2);
    assert_eq!(gw.admin("GET", "/services", ()).json()["total"], 1, "a decoration is no service");
    gw.put("/routes/1", json!({"uri": "/", "service_id": "shop"}));
    assert_eq!(gw.admin("DELETE", "/services/shop", ()).status, 400);
    assert_eq!(gw.admin("GET", &at("d1"), ()).status, 200, "what stays keeps its decorations");
    assert_eq!(gw.admin("DELETE", "/services/shop?force=true", ()).status, 200);
    assert_eq!(gw.admin("GET", "/services/shop/graphql_cost_decorations", ()).status, 404);
    gw.put("/services/shop", json!({}));
    assert_eq!(gw.admin("GET", &at("d1"), ()).status, 404, "they went with their service");
}

#[test]
fn what_is_stored_compiles_and_references_stand_for_certificates() {
    let gw = Gateway::start();
    let proto = gw.admin(
        "PUT",
        "/protos/1",
        json!({"content": "syntax = \"proto3\"; message A { int32 a = 1; int32 b = 1; }"}),
    );
    assert_eq!(proto.status, 400);
    assert!(error(&proto).starts_with("invalid content: "), "{}", proto.text());
    let filter = json!({"uri": "/", "filter_func": "function(vars) ", "upstream": {"nodes": {"127.0.0.1:1": 1}}});
    let told =
        "failed to load 'filter_func' string: [string \"return function(vars) \"]:1: 'end' expected near '<eof>'";
    assert_eq!(error(&gw.admin("PUT", "/routes/1", filter)), told);
    assert_eq!(error(&gw.admin("PATCH", "/secrets/vault", json!({}))), "no secret id");
    let names = json!({"sni": "a.com", "cert": "$secret://vault/1/a/cert", "key": "$ENV://KEY", "certs": ["$env://C"], "keys": ["$env://K"]});
    assert_eq!(gw.put("/ssls/1", names)["value"]["certs"][0], "$env://C");
    let short = json!({"sni": "a.com", "cert": "$env://CERT", "key": "$env://KEY", "certs": ["https://a"], "keys": ["$env://K"]});
    let told = "invalid configuration: property \"certs\" validation failed: failed to validate item 1: string too short, expected at least 128, got 9";
    assert_eq!(error(&gw.admin("PUT", "/ssls/1", short)), told);
    let cert = rcgen::generate_simple_self_signed(["a.com".to_owned()]).expect("a certificate").cert.pem();
    let junk =
        format!("-----BEGIN RSA PRIVATE KEY-----\n{}\n-----END RSA PRIVATE KEY-----\n", "MIIEowIBAAKCAQEA".repeat(8));
    let refused = gw.admin("PUT", "/ssls/1", json!({"sni": "a.com", "cert": cert, "key": junk}));
    assert_eq!(error(&refused), "failed to parse key: PEM_read_bio_PrivateKey() failed");
}

/// A CA with certificates for the server and a client.
struct Pki {
    ca: String,
    server: (String, String),
    client: (CertificateDer<'static>, PrivatePkcs8KeyDer<'static>),
}

impl Pki {
    fn new() -> Pki {
        let mut params = CertificateParams::new(Vec::new()).expect("parameters");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("a CA");
        let signed = |name: &str| {
            let key = KeyPair::generate().expect("a key");
            let params = CertificateParams::new([name.to_owned()]).expect("parameters");
            (params.signed_by(&key, &ca).expect("a certificate"), key)
        };
        let (server, client) = (signed("admin.test"), signed("client.test"));
        Pki {
            ca: ca.pem(),
            server: (server.0.pem(), server.1.serialize_pem()),
            client: (client.0.der().clone(), client.1.serialize_der().into()),
        }
    }

    /// The answer to a request over TLS, with the client's certificate or without.
    fn ask(&self, gw: &Gateway, with_certificate: bool) -> String {
        use rustls_pki_types::pem::PemObject;
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.ca.as_bytes()).expect("a CA")).expect("a root");
        let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots);
        let config = if with_certificate {
            let (cert, key) = &self.client;
            builder.with_client_auth_cert(vec![cert.clone()], key.clone_key().into()).expect("a certificate")
        } else {
            builder.with_no_client_auth()
        };
        let name = ServerName::try_from("admin.test").expect("a name");
        let connection = ClientConnection::new(Arc::new(config), name).expect("a connection");
        let socket = TcpStream::connect(gw.admin_address()).expect("connects");
        socket.set_read_timeout(Some(DEADLINE)).expect("a timeout");
        let mut stream = StreamOwned::new(connection, socket);
        let key = gw.key();
        let head =
            format!("GET /apisix/admin/routes HTTP/1.1\r\nHost: a\r\nX-API-KEY: {key}\r\nConnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).expect("is sent");
        let mut reply = Vec::new();
        // The peer may close without a word.
        let _ = stream.read_to_end(&mut reply);
        String::from_utf8_lossy(&reply).into_owned()
    }

    fn gateway(&self, mutual: bool) -> Gateway {
        let dir = Dir::new();
        dir.write("conf/ca.pem", &self.ca);
        dir.write("conf/cert.pem", &self.server.0);
        dir.write("conf/key.pem", &self.server.1);
        let mut mtls = json!({"admin_ssl_cert": "cert.pem", "admin_ssl_cert_key": "../conf/key.pem"});
        if mutual {
            mtls["admin_ssl_ca_cert"] = "ca.pem".into();
        }
        dir.configure(json!({"deployment": {"admin": {
            "https_admin": true, "admin_api_mtls": mtls,
        }}}));
        Gateway::in_dir(dir)
    }
}

#[test]
fn the_admin_api_speaks_tls() {
    let pki = Pki::new();
    let gw = pki.gateway(false);
    assert!(pki.ask(&gw, false).starts_with("HTTP/1.1 200"));
    let plain = crate::support::http::raw(&gw.admin_address(), b"GET /apisix/admin/routes HTTP/1.0\r\n\r\n");
    assert!(
        plain.starts_with("HTTP/1.0 400") && plain.contains("The plain HTTP request was sent to HTTPS port"),
        "{plain}"
    );
}

#[test]
fn a_client_of_the_admin_api_shows_its_certificate() {
    let pki = Pki::new();
    let gw = pki.gateway(true);
    let served = pki.ask(&gw, true);
    assert!(served.starts_with("HTTP/1.1 200"), "{served}");
    let refused = pki.ask(&gw, false);
    assert!(
        refused.starts_with("HTTP/1.1 400") && refused.contains("No required SSL certificate was sent"),
        "{refused}"
    );
    let stranger = Pki { client: Pki::new().client, ..pki };
    assert_eq!(stranger.ask(&gw, true), "", "another CA's");
}

#[test]
fn a_reload_of_plugins_reads_the_configuration_again() {
    let dir = Dir::new();
    let plugin = |name: &str| {
        format!(
            "local plugin = require(\"apisix.plugin\")\n\
             local attr = plugin.plugin_attr(\"{name}\") or {{}}\n\
             local _M = {{ version = 0.1, priority = 10, name = \"{name}\", schema = {{ type = \"object\" }} }}\n\
             function _M.check_schema() return true end\n\
             function _M.access() return 200, \"told \" .. tostring(attr.word) end\n\
             return _M\n"
        )
    };
    std::fs::create_dir_all(dir.join("lua/apisix/plugins")).expect("a directory");
    dir.write("lua/apisix/plugins/told.lua", plugin("told"));
    let path = format!("{}/lua/?.lua", dir.path().display());
    let settings = |word: &str| json!({"apisix": {"extra_lua_path": path}, "plugin_attr": {"told": {"word": word}}});
    dir.configure(settings("one"));
    let gw = Gateway::in_dir(dir);
    gw.put("/routes/1", json!({"uri": "/a", "plugins": {"told": {}}}));
    assert_eq!(gw.get("/a").text(), "told one");
    gw.dir.configure(settings("two"));
    assert_eq!(gw.get("/a").text(), "told one");
    assert_eq!(gw.admin("PUT", "/plugins/reload", ()).status, 200);
    assert_eq!(gw.get("/a").text(), "told two");
    gw.dir.configure(settings("three"));
    assert_eq!(get(&gw.control(), "/v1/plugins/reload").status, 404, "it is no question");
    let reloaded = request(&gw.control(), "PUT", "/v1/plugins/reload", &[], b"");
    assert_eq!((reloaded.status, reloaded.text().as_str()), (200, "done"));
    assert_eq!(gw.get("/a").text(), "told three");
    gw.dir.write("conf/config.yaml", "apisix: [");
    assert_eq!(gw.admin("PUT", "/plugins/reload", ()).status, 200);
    gw.expect_log("plugins are loaded anew by the configuration before");
    assert_eq!(gw.get("/a").text(), "told three", "a file with mistakes changes nothing");
}

#[test]
fn the_list_of_plugins_is_shared_through_etcd() {
    let etcd = Etcd::start();
    etcd.put("/apisix/plugins", r#"[{"name":"key-auth"}]"#);
    let settings = |plugins: Option<Value>| {
        let mut settings = json!({"deployment": {"role": "traditional", "role_traditional": {"config_provider": "etcd"},
            "etcd": {"host": [etcd.url()], "prefix": "/apisix", "timeout": 5}}});
        if let Some(plugins) = plugins {
            settings["plugins"] = plugins;
        }
        settings
    };
    let gw = Gateway::with(settings(None));
    eventually("APISIX's own list is shared", || etcd.get("/apisix/plugins").contains("limit-count").then_some(()));
    let route = |plugin: &str| json!({"uri": "/", "plugins": {plugin: {}}, "upstream": {"nodes": {"127.0.0.1:1": 1}}});
    eventually("cors is known", || (gw.admin("PUT", "/routes/1", route("cors")).status < 300).then_some(()));
    gw.dir.configure(settings(Some(json!(["key-auth"]))));
    assert_eq!(gw.admin("PUT", "/plugins/reload", ()).status, 200);
    let shared = etcd.get("/apisix/plugins");
    assert!(shared.contains("key-auth") && !shared.contains("limit-count"), "{shared}");
    let refused = gw.admin("PUT", "/routes/2", route("cors"));
    assert_eq!((refused.status, error(&refused).as_str()), (400, "unknown plugin [cors]"));
    assert_eq!(gw.admin("PUT", "/routes/2", route("key-auth")).status, 201);
}

#[test]
fn a_list_that_others_share_switches_off_plugins_of_nodes_without_an_admin_api_only() {
    let etcd = Etcd::start();
    let up = Upstream::echo();
    let settings = |with_admin: bool, plugins: Option<Value>| {
        let mut settings = json!({"apisix": {"enable_admin": with_admin},
            "deployment": {"role": "traditional", "role_traditional": {"config_provider": "etcd"},
                "etcd": {"host": [etcd.url()], "prefix": "/apisix", "timeout": 5}}});
        if let Some(plugins) = plugins {
            settings["plugins"] = plugins;
        }
        settings
    };
    let first = Gateway::with(settings(true, None));
    let follower = Gateway::with(settings(false, None));
    first.route("1", "/closed", &up, json!({"basic-auth": {}}));
    assert_eq!(first.get("/closed").status, 401);
    eventually("the follower has the route", || (follower.get("/closed").status == 401).then_some(()));

    let second = Gateway::with(settings(true, Some(json!(["key-auth"]))));
    eventually("the second node's list is shared", || etcd.get("/apisix/plugins").contains("key-auth").then_some(()));
    eventually("the follower goes by it", || (follower.get("/closed").status == 200).then_some(()));
    follower.expect_log("the list of plugins that the nodes share has switched off what ran here before: ");
    let told = follower.log().lines().find(|line| line.contains("has switched off")).unwrap_or_default().to_owned();
    assert!(told.contains("[warn]") && told.contains("basic-auth") && !told.contains("key-auth"), "{told}");
    assert_eq!(second.get("/closed").status, 200, "it lists no basic-auth itself");
    // What the store says after the list is served: so the list was read, too.
    first.route("2", "/next", &up, json!({"cors": {}}));
    assert_eq!((first.get("/next").status, first.get("/closed").status), (200, 401), "{}", first.log());

    etcd.put("/apisix/plugins", r#"[{"name":"cors"}]"#);
    first.route("3", "/last", &up, json!({"basic-auth": {}}));
    assert_eq!((first.get("/last").status, first.get("/closed").status), (401, 401), "whoever writes it");
    assert!(!first.log().contains("switched off"), "{}", first.log());
    etcd.put("/apisix/plugins", r#"[{"name":"basic-auth"},{"name":"nobodys"}]"#);
    eventually("it is on again", || (follower.get("/closed").status == 401).then_some(()));
    follower.expect_log("failed to load plugin [nobodys] err: ");
}

/// `/configs` with a wait.
fn waiting(gw: &Gateway, method: &str, query: &str, headers: &[(&str, &str)], body: &Value) -> Reply {
    let key = gw.key();
    let mut all = vec![("X-API-KEY", key.as_str())];
    all.extend(headers);
    let text = if body.is_null() { String::new() } else { body.to_string() };
    request(&gw.admin_address(), method, &format!("/apisix/admin/configs{query}"), &all, text.as_bytes())
}

fn uploaded(init: &str) -> String {
    format!(
        "local core = require('apisix.core')
         local _M = {{version = 0.1, priority = 1, name = 'mine', schema = {{type = 'object', required = {{'word'}}}}}}
         function _M.check_schema(conf) return core.schema.check(_M.schema, conf) end
         function _M.init() {init} end
         function _M.access(conf) return 200, conf.word end
         return _M"
    )
}

#[test]
fn one_document_brings_a_plugin_and_what_uses_it() {
    let gw = standalone(json!({}));
    let document = |source: Value, conf: Value| json!({"plugin_sources": source, "routes": [{"id": "1", "uri": "/mine", "plugins": {"mine": conf}}]});
    let source = json!([{"id": "mine", "source": uploaded("")}]);
    let refused = replace(&gw, "d", document(json!([]), json!({"word": "x"})));
    assert!(refused.status == 400 && error(&refused).contains("unknown plugin [mine]"), "{}", refused.text());
    let refused = replace(&gw, "d", document(source.clone(), json!({})));
    assert!(refused.status == 400 && error(&refused).contains("property \"word\" is required"), "{}", refused.text());
    let broken = replace(&gw, "d", document(json!([{"id": "mine", "source": "return {"}]), json!({"word": "x"})));
    assert!(broken.status == 400 && error(&broken).contains("plugins/mine.lua:1:"), "{}", broken.text());
    assert_eq!(gw.get("/mine").status, 404, "nothing of it is taken");
    let valid = gw.admin("POST", "/configs/validate", document(source.clone(), json!({"word": "x"})));
    assert_eq!(valid.status, 200, "{}", valid.text());
    let done = replace(&gw, "d1", document(source, json!({"word": "hello"})));
    assert_eq!(done.status, 202, "{}", done.text());
    assert_eq!(gw.get("/mine").text(), "hello");
    // Nor may it go before what uses it.
    let gone = replace(&gw, "d2", document(json!([]), json!({"word": "x"})));
    assert!(gone.status == 400 && error(&gone).contains("unknown plugin [mine]"), "{}", gone.text());
    assert_eq!(replace(&gw, "d3", json!({})).status, 202);
    assert_eq!(gw.get("/mine").status, 404);
}

#[test]
fn a_put_may_wait_until_every_worker_serves_the_document() {
    let up = Upstream::echo();
    let gw = standalone(json!({"nginx_config": {"worker_processes": 2}}));
    let put =
        |query: &str, digest: &str, document: &Value| waiting(&gw, "PUT", query, &[("X-Digest", digest)], document);
    let plain = json!({"routes": [route("r1", "/one", &up)]});
    let done = put("?wait=5000", "d1", &plain);
    assert_eq!((done.status, &done.json()["served"], done.header("x-digest")), (200, &json!(true), Some("d1")));
    assert_eq!(gw.get("/one").status, 200);
    assert_eq!(put("?wait=5000", "d1", &plain).status, 204, "it is served already");
    assert_eq!(put("", "d2", &plain).status, 202, "who does not wait is answered as ever");
    // A plugin that takes its time to start: until then the plugins before it serve.
    let slow = json!({
        "plugin_sources": [{"id": "mine", "source": uploaded("ngx.sleep(1)")}],
        "routes": [{"id": "1", "uri": "/mine", "plugins": {"mine": {"word": "hello"}}}],
    });
    let early = put("?wait=1", "d3", &slow);
    assert_eq!((early.status, &early.json()["served"]), (202, &json!(false)), "{}", early.text());
    assert!(
        early.json()["message"].as_str().is_some_and(|text| text.contains("not every worker serves it after 1 ms"))
    );
    assert_eq!(early.header("x-digest"), Some("d3"), "it is stored");
    let late = put("?wait=30000", "d3", &slow);
    assert_eq!(late.status, 204, "{}", late.text());
    for _ in 0..8 {
        assert_eq!(gw.get("/mine").text(), "hello");
    }
    for wrong in ["?wait=", "?wait=-1", "?wait=soon", "?wait=1.5", "?wait=+1"] {
        for method in ["GET", "PUT"] {
            let refused = waiting(&gw, method, wrong, &[("X-Digest", "d9")], &plain);
            assert_eq!(refused.status, 400, "{method} {wrong}");
            assert!(refused.text().contains("invalid argument wait"), "{}", refused.text());
        }
    }
    assert_eq!(gw.admin("HEAD", "/configs", ()).header("x-digest"), Some("d3"), "what is refused is not stored");
}

#[test]
fn a_get_may_wait_for_another_document_than_is_known() {
    let mut gw = standalone(json!({}));
    let get = |query: &str, headers: &[(&str, &str)]| waiting(&gw, "GET", query, headers, &Value::Null);
    assert_eq!(get("?wait=60000", &[("X-Digest", "d1")]).status, 200, "there is none yet");
    assert_eq!(replace(&gw, "d1", json!({"routes": []})).status, 202);
    // What is not known is told at once.
    for headers in [&[][..], &[("X-Digest", "d0")], &[("If-None-Match", "\"d0\"")]] {
        let told = get("?wait=60000", headers);
        assert_eq!((told.status, told.header("etag")), (200, Some("\"d1\"")), "{headers:?}");
    }
    // What is known is not told again when the time is over.
    for headers in [("X-Digest", "d1"), ("If-None-Match", "\"d1\""), ("If-None-Match", "\"x\", W/\"d1\"")] {
        let same = get("?wait=20", &[headers]);
        assert_eq!((same.status, same.header("x-digest"), same.text().as_str()), (304, Some("d1"), ""), "{headers:?}");
    }
    assert_eq!(waiting(&gw, "HEAD", "?wait=20", &[("X-Digest", "d1")], &Value::Null).status, 304);
    assert_eq!(get("", &[("X-Digest", "d1")]).status, 200, "without a wait it is as ever");
    assert_eq!(get("", &[("If-None-Match", "\"d1\"")]).status, 304);
    // A hundred and twenty-eight wait at most.
    let wait_for_another_than = |digest: &str| -> Vec<TcpStream> {
        let head = format!(
            "GET /apisix/admin/configs?wait=60000 HTTP/1.1\r\nHost: a\r\nX-API-KEY: {}\r\nX-Digest: {digest}\r\n\
             Connection: close\r\n\r\n",
            gw.key()
        );
        let clients = (0..128).map(|_| {
            let mut client = TcpStream::connect(gw.admin_address()).expect("a connection");
            client.write_all(head.as_bytes()).expect("is sent");
            client
        });
        let clients = clients.collect();
        let full = eventually("no place is left", || {
            let reply = get("?wait=1", &[("X-Digest", digest)]);
            (reply.status == 503).then_some(reply)
        });
        assert_eq!(full.header("retry-after"), Some("1"));
        clients
    };
    let answers = |clients: Vec<TcpStream>| {
        clients.into_iter().map(|mut client| {
            let mut text = String::new();
            client.read_to_string(&mut text).expect("an answer");
            text
        })
    };
    let clients = wait_for_another_than("d1");
    assert_eq!(replace(&gw, "d2", json!({"routes": []})).status, 202);
    for text in answers(clients) {
        assert!(text.starts_with("HTTP/1.1 200 ") && text.contains("x-digest: d2"), "{text}");
    }
    // The end of the gateway ends the wait.
    let clients = wait_for_another_than("d2");
    assert!(gw.quit().success());
    for text in answers(clients) {
        assert!(text.starts_with("HTTP/1.1 304 "), "{text}");
    }
}
