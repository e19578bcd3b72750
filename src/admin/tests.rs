//! Both APIs over sockets, on an embedded store with its pipeline, with the packed schemas for plugins.

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicUsize, Ordering},
};

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{Notify, oneshot},
    task::LocalSet,
};

use super::*;
use crate::{
    control, error,
    model::Keyring,
    router::RouterKind,
    store::{self, Setup, embedded::Embedded},
};

const KEY: &str = "edd1c9f034335f136f87ad84b625c8f1";
const VIEWER: &str = "4054f7cf07e344346cd3f287985e76a2";

struct Api {
    admin: SocketAddr,
    control: SocketAddr,
    store: Arc<dyn Store>,
    _dir: TempDir,
}

struct Reply {
    status: u16,
    head: String,
    text: String,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e}: {}", self.text))
    }

    fn error(&self) -> String {
        self.json()["error_msg"].as_str().unwrap_or_default().to_owned()
    }
}

async fn start() -> Api {
    start_on(|store| store).await
}

/// `between`: stands between the Admin API and the store.
async fn start_on(between: impl FnOnce(Arc<dyn Store>) -> Arc<dyn Store>) -> Api {
    let dir = tempfile::tempdir().expect("a directory");
    let store: Arc<dyn Store> = Embedded::open(&dir.path().join("moongate.redb")).expect("a store");
    let keyring = Keyring::new(["edd1c9f0985e76a2"], true).expect("a key");
    let parser = store::parser(Arc::new(keyring.clone()), None);
    let setup = Setup {
        parser,
        checker: None,
        router: RouterKind::default(),
        shown_prefix: String::new(),
        follows_plugin_list: true,
        last_good: None,
    };
    let started = store::start(store.clone(), setup).await.expect("a pipeline");
    let config = json!({"deployment": {"admin": {
        "admin_key": [{"key": KEY, "role": "admin"}, {"key": VIEWER, "role": "viewer"}, {"key": ""}],
        "allow_admin": ["127.0.0.0/24"],
    }}});
    let mut settings = Settings::from_config(&config, "APISIX/3.18.0").expect("settings");
    settings.keyring = keyring;
    let plugins: Rc<dyn PluginHost> = Rc::new(PackedPlugins);
    let state = State {
        settings,
        store: between(store.clone()),
        published: started.published.clone(),
        plugins: plugins.clone(),
        fields: None,
        pipeline: Some(started.handle),
        documents: Rc::default(),
        contest: Rc::default(),
        workers: None,
    };
    let listen = || async { TcpListener::bind("127.0.0.1:0").await.expect("a port") };
    let (admin, control) = (listen().await, listen().await);
    let places = (admin.local_addr().expect("bound"), control.local_addr().expect("bound"));
    tokio::task::spawn_local(serve(admin, None, Rc::new(state), std::future::pending()));
    let control_state = control::State {
        prefix: "/apisix".into(),
        reload: None,
        plugin_apis: None,
        trace: None,
        published: started.published,
        source: started.source,
        plugins,
        collect: None,
        health: None,
        lua: None,
    };
    tokio::task::spawn_local(control::serve(control, Rc::new(control_state), std::future::pending()));
    Api { admin: places.0, control: places.1, store, _dir: dir }
}

impl Api {
    async fn send(&self, to: SocketAddr, method: &str, path: &str, headers: &str, body: &str) -> Reply {
        let mut stream = TcpStream::connect(to).await.expect("connects");
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n"
        );
        stream.write_all((head + body).as_bytes()).await.expect("is sent");
        let mut reply = String::new();
        // A refused body may end in a reset after the answer.
        let _ = stream.read_to_string(&mut reply).await;
        let (head, text) = reply.split_once("\r\n\r\n").expect("a whole head");
        let status = head[9..12].parse().expect("a status");
        Reply { status, head: head.to_ascii_lowercase(), text: text.to_owned() }
    }

    async fn call(&self, method: &str, path: &str, body: impl Into<Option<Value>>) -> Reply {
        let body = body.into().map(|b| b.to_string()).unwrap_or_default();
        let path = format!("/apisix/admin{path}");
        self.send(self.admin, method, &path, &format!("X-API-KEY: {KEY}\r\n"), &body).await
    }

    async fn control(&self, path: &str) -> Reply {
        self.send(self.control, "GET", path, "", "").await
    }

    async fn stored(&self, key: &str) -> Value {
        let entry = self.store.get(key).await.expect("reads").expect("is there");
        serde_json::from_str(&entry.value).expect("JSON")
    }
}

/// Runs a scene on a control thread of its own.
fn scene<F: Future<Output = ()>>(play: impl FnOnce() -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(LocalSet::new().run_until(play()));
}

fn upstream() -> Value {
    json!({"nodes": {"127.0.0.1:8080": 1}, "type": "roundrobin"})
}

#[test]
fn a_route_is_written_read_changed_and_deleted() {
    scene(|| async {
        let api = start().await;
        let route = json!({"uri": "/get", "upstream": upstream()});
        let reply = api.call("PUT", "/routes/1", route.clone()).await;
        assert_eq!(reply.status, 201, "{}", reply.text);
        let mut value = reply.json();
        assert_eq!(value["key"], "/apisix/routes/1");
        assert!(value["value"]["create_time"].is_number() && value["value"]["update_time"].is_number());
        value["value"].as_object_mut().expect("an object").retain(|name, _| !name.ends_with("_time"));
        assert_eq!(
            value["value"],
            json!({"uri": "/get", "upstream": upstream(), "id": "1"}),
            "defaults are not stored"
        );
        assert_eq!(api.control("/v1/route/1").await.json()["value"]["priority"], 0, "it is served, defaults filled in");
        assert_eq!(api.call("PUT", "/routes/1", route).await.status, 200);

        let read = api.call("GET", "/routes/1", None).await.json();
        assert_eq!((&read["key"], &read["value"]["uri"]), (&json!("/apisix/routes/1"), &json!("/get")));
        assert!(read["createdIndex"].as_i64() < read["modifiedIndex"].as_i64());

        let patched = api
            .call("PATCH", "/routes/1", json!({"upstream": {"nodes": {"127.0.0.1:8080": null, "b.com:1": 2}}}))
            .await;
        assert_eq!((patched.status, &patched.json()["value"]["upstream"]["nodes"]), (200, &json!({"b.com:1": 2})));
        let patched = api.call("PATCH", "/routes/1/methods", json!(["POST"])).await;
        assert_eq!(patched.json()["value"]["methods"], json!(["POST"]));
        assert_eq!(api.call("PATCH", "/routes/9", json!({})).await.json(), json!({"message": "Key not found"}));

        let posted = api.call("POST", "/routes", json!({"uri": "/b", "upstream": upstream()})).await;
        assert_eq!(posted.status, 201);
        let id = posted.json()["value"]["id"].as_str().expect("an id").to_owned();
        assert_eq!(id.len(), 20);
        let list = api.call("GET", "/routes", None).await.json();
        assert_eq!((&list["total"], &list["list"][1]["value"]["uri"]), (&json!(2), &json!("/b")));

        let deleted = api.call("DELETE", "/routes/1", None).await;
        assert_eq!((deleted.status, deleted.json()), (200, json!({"deleted": "1", "key": "/apisix/routes/1"})));
        assert_eq!(api.call("DELETE", "/routes/1", None).await.status, 404);
        assert_eq!(api.control("/v1/route/1").await.status, 404);
    });
}

#[test]
fn refusals_read_as_in_apisix() {
    scene(|| async {
        let api = start().await;
        let route = |extra: Value| {
            let mut value = json!({"uri": "/a", "upstream": upstream()});
            value.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
            value
        };
        for (method, path, body, status, text) in [
            ("PUT", "/routs/1", json!({}), 404, "Unsupported resource type: routs"),
            ("PUT", "/routes", route(json!({})), 400, "missing route id"),
            ("PUT", "/routes/1", route(json!({"id": 3})), 400, "wrong route id"),
            ("POST", "/routes/1", route(json!({})), 400, "wrong route id, do not need it"),
            (
                "PUT",
                "/routes",
                route(json!({"id": -100})),
                400,
                "invalid configuration: property \"id\" validation failed: object matches none of the required",
            ),
            (
                "PUT",
                "/routes/1",
                route(json!({"service_id": "99"})),
                400,
                "failed to fetch service info by service id [99], response code: 404",
            ),
            (
                "PUT",
                "/routes/1",
                route(json!({"plugin_config_id": "not_found"})),
                400,
                "failed to fetch plugin config info by plugin config id [not_found], response code: 404",
            ),
            ("PUT", "/routes/1", route(json!({"plugins": {"nope": {}}})), 400, "unknown plugin [nope]"),
            (
                "PUT",
                "/routes/1",
                route(json!({"plugins": {"limit-count": {}}})),
                400,
                "failed to check the configuration of plugin limit-count err: value should match only one schema, but matches none",
            ),
            ("PUT", "/routes/1?ttl=x", route(json!({})), 400, "invalid argument ttl: should be a number"),
            (
                "PUT",
                "/routes/1?ttl=0.5",
                route(json!({})),
                400,
                "invalid argument ttl: should be 0 (for ever) or at least 1 second",
            ),
            (
                "PUT",
                "/routes/1?ttl=-1",
                route(json!({})),
                400,
                "invalid argument ttl: should be 0 (for ever) or at least 1 second",
            ),
            ("PUT", "/routes/1", route(json!({"create_time": 1})), 400, "the property is forbidden: create_time"),
            ("POST", "/consumers", json!({"username": "a"}), 405, "not supported `POST` method for consumer"),
            ("PUT", "/consumers/x", json!({"username": "y"}), 400, "wrong username"),
            ("PUT", "/consumers", json!({}), 400, "invalid configuration: property \"username\" is required"),
            (
                "PUT",
                "/consumers/none/credentials/1",
                json!({"plugins": {"key-auth": {"key": "k"}}}),
                404,
                "consumer not found",
            ),
            ("PUT", "/consumers/none/credentials", json!({"plugins": {}}), 400, "missing credential id"),
            ("PUT", "/plugin_metadata", json!({}), 400, "missing plugin name"),
            ("PUT", "/plugin_metadata/nope", json!({}), 400, "invalid plugin name"),
            (
                "PUT",
                "/plugin_metadata/example-plugin",
                json!({"skey": "x"}),
                400,
                "invalid configuration: property \"ikey\" is required",
            ),
            ("PUT", "/secrets/vault", json!({}), 400, "no secret id"),
            (
                "PUT",
                "/secrets/vault/1",
                json!({"uri": "http://a", "prefix": "p"}),
                400,
                "invalid configuration: property \"token\" is required",
            ),
            (
                "PUT",
                "/secrets/vault/1",
                json!({"uri": "http://a", "prefix": 1, "token": "t"}),
                400,
                "invalid configuration: property \"prefix\" validation failed: wrong type: expected string, got number",
            ),
            (
                "PUT",
                "/secrets/aws/1",
                json!({"access_key_id": "a"}),
                400,
                "invalid configuration: property \"secret_access_key\" is required",
            ),
            (
                "PUT",
                "/secrets/gcp/1",
                json!({}),
                400,
                "invalid configuration: value should match only one schema, but matches none",
            ),
            ("GET", "/plugins/asdf", json!({}), 404, "plugin not found in subsystem http"),
            ("GET", "/plugins?subsystem=asdf", json!({}), 400, "unsupported subsystem: asdf"),
            (
                "POST",
                "/schema/validate/routes",
                json!({"uri": 666, "plugins": {}}),
                400,
                "property \"uri\" validation failed: wrong type: expected string, got number",
            ),
        ] {
            let reply = api.call(method, path, body).await;
            assert_eq!((reply.status, reply.error().as_str()), (status, text), "{method} {path}");
        }
        let relative = api.call("PUT", "/secrets/vault/1", json!({"uri": "/get", "prefix": "p", "token": "t"})).await;
        let text = "invalid configuration: property \"uri\" validation failed: failed to match pattern ";
        assert!(relative.status == 400 && relative.error().starts_with(text), "{}", relative.text);
        let broken = api.send(api.admin, "PUT", "/apisix/admin/routes/1", &format!("X-API-KEY: {KEY}\r\n"), "{").await;
        assert!(broken.status == 400 && broken.error().starts_with("invalid request body: "), "{}", broken.text);
        let large = api.call("PUT", "/routes/1", json!({"desc": "a".repeat(1_600_000)})).await;
        assert!(large.error().ends_with("is greater than the maximum size 1572864 allowed"), "{}", large.text);
        for kind in ["/routes", "/secrets"] {
            assert_eq!(api.call("GET", kind, None).await.json()["total"], 0, "nothing was stored");
        }
    });
}

#[test]
fn only_a_key_opens_and_a_viewer_only_reads() {
    scene(|| async {
        let api = start().await;
        let path = "/apisix/admin/routes";
        let missing = api.send(api.admin, "GET", path, "", "").await;
        assert_eq!((missing.status, missing.error().as_str()), (401, "failed to check token"));
        assert!(missing.head.contains("server: apisix/") && !missing.head.contains("x-api-version"));
        assert_eq!(api.send(api.admin, "GET", path, "X-API-KEY: wrong\r\n", "").await.status, 401);
        assert_eq!(api.send(api.admin, "GET", path, &format!("X-API-KEY: {VIEWER}\r\n"), "").await.status, 200);
        assert_eq!(api.send(api.admin, "PUT", path, &format!("X-API-KEY: {VIEWER}\r\n"), "{}").await.status, 401);
        assert_eq!(
            api.send(api.admin, "GET", path, &format!("Cookie: a=b; x_api_key={KEY}\r\n"), "").await.status,
            200
        );
        assert_eq!(api.send(api.admin, "GET", path, "X-API-KEY: \r\n", "").await.status, 401, "an empty key is no key");
        let good = api.send(api.admin, "GET", &format!("{path}?api_key={KEY}"), "", "").await;
        assert!(good.status == 200 && good.head.contains("x-api-version: v3"), "{}", good.head);
        assert!(good.head.contains("access-control-allow-origin: *"), "{}", good.head);
        let asked = api
            .send(api.admin, "OPTIONS", "/apisix/admin/routes/1", "Access-Control-Request-Headers: if-match\r\n", "")
            .await;
        let allowed = "access-control-allow-headers: content-type, x-api-key, if-match, if-none-match, x-digest";
        assert!(asked.status == 200 && asked.head.contains(allowed), "{}", asked.head);
    });
}

#[test]
fn a_drain_waits_for_the_request_in_flight_and_takes_no_new_one() {
    scene(|| async {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let place = listener.local_addr().expect("bound");
        let (entered, mut in_handler) = tokio::sync::mpsc::channel(1);
        let release = Rc::new(tokio::sync::Notify::new());
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        let held = release.clone();
        let handler = move |_: Incomplete| {
            let (entered, held) = (entered.clone(), held.clone());
            async move {
                let _ = entered.send(()).await;
                held.notified().await;
                Answer::text(200, "whole")
            }
        };
        let served =
            tokio::task::spawn_local(http::serve(listener, None, Rc::new(handler), async { drop(ended.await) }));
        let mut stream = TcpStream::connect(place).await.expect("connects");
        stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.expect("is sent");
        in_handler.recv().await.expect("is in the handler");
        end.send(()).expect("is told to end");
        // The listener is dropped before the wait for connections begins.
        while TcpStream::connect(place).await.is_ok() {
            tokio::task::yield_now().await;
        }
        assert!(!served.is_finished(), "a request is in flight");
        release.notify_one();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).await.expect("is answered, then closed");
        assert!(reply.ends_with("whole"), "{reply}");
        served.await.expect("ends");
    });
}

#[test]
fn an_address_that_is_not_allowed_is_refused() {
    let config = json!({"deployment": {"admin": {"allow_admin": ["127.0.0.0/24", "::1"]}}});
    let settings = Settings::from_config(&config, "x").expect("settings");
    for (address, allowed) in [("127.0.0.9", true), ("127.0.1.1", false), ("::1", true), ("::ffff:127.0.0.1", true)] {
        assert_eq!(settings.allows(address.parse().expect("an address")), allowed, "{address}");
    }
    for (list, allowed) in [(json!([]), true), (json!(["unix:"]), false)] {
        let config = json!({"deployment": {"admin": {"allow_admin": list}}});
        let settings = Settings::from_config(&config, "x").expect("settings");
        assert_eq!(settings.allows("192.0.2.1".parse().expect("an address")), allowed, "{config}");
    }
}

#[test]
fn what_is_in_use_is_deleted_only_by_force() {
    scene(|| async {
        let api = start().await;
        for (path, body) in [
            ("/upstreams/1", upstream()),
            ("/services/1", json!({"upstream": upstream()})),
            ("/plugin_configs/1", json!({"plugins": {}})),
            ("/consumer_groups/g", json!({"plugins": {}})),
            ("/routes/1", json!({"uri": "/a", "upstream_id": 1, "service_id": 1, "plugin_config_id": 1})),
            ("/consumers", json!({"username": "foobar", "group_id": "g"})),
        ] {
            let reply = api.call("PUT", path, body).await;
            assert_eq!(reply.status, 201, "{path}: {}", reply.text);
        }
        for (path, text) in [
            ("/upstreams/1", "can not delete this upstream, route [1] is still using it now"),
            ("/upstreams/1?force=anyvalue", "can not delete this upstream, route [1] is still using it now"),
            ("/services/1", "can not delete this service directly, route [1] is still using it now"),
            ("/plugin_configs/1", "can not delete this plugin config, route [1] is still using it now"),
            ("/consumer_groups/g", "can not delete this consumer group, consumer [foobar] is still using it now"),
        ] {
            let reply = api.call("DELETE", path, None).await;
            assert_eq!((reply.status, reply.error().as_str()), (400, text), "{path}");
        }
        assert_eq!(api.call("DELETE", "/upstreams/1?force=true", None).await.status, 200);
        let split = json!({"rules": [{"weighted_upstreams": [{"upstream_id": 2, "weight": 1}]}]});
        api.call("PUT", "/upstreams/2", upstream()).await;
        api.call("PUT", "/routes/2", json!({"uri": "/b", "service_id": 1, "plugins": {"traffic-split": split}})).await;
        let reply = api.call("DELETE", "/upstreams/2", None).await;
        assert_eq!(reply.error(), "can not delete this upstream, plugin in route [2] is still using it now");
    });
}

#[test]
fn consumers_and_credentials_keep_their_keys_apart_and_secret() {
    scene(|| async {
        let api = start().await;
        let consumer = json!({"username": "jack", "plugins": {"basic-auth": {"username": "jack", "password": "bar"}}});
        assert_eq!(api.call("PUT", "/consumers", consumer).await.status, 201);
        let stored = api.stored("/consumers/jack").await;
        assert_eq!(stored["plugins"]["basic-auth"]["password"], "77+NmbYqNfN+oLm0aX5akg==");
        let read = api.call("GET", "/consumers/jack", None).await.json();
        assert_eq!(read["value"]["plugins"]["basic-auth"]["password"], "bar");

        let credential = json!({"plugins": {"key-auth": {"key": "one"}}});
        let reply = api.call("PUT", "/consumers/jack/credentials/c1", credential.clone()).await;
        assert_eq!((reply.status, &reply.json()["key"]), (201, &json!("/apisix/consumers/jack/credentials/c1")));
        assert_eq!(reply.json()["value"]["id"], "c1");
        assert_eq!(
            api.call("PUT", "/consumers/jack/credentials/c1", credential.clone()).await.status,
            200,
            "its own key"
        );
        let taken = api.call("PUT", "/consumers", json!({"username": "bob", "plugins": credential["plugins"]})).await;
        assert_eq!(taken.error(), "duplicate key of plugin key-auth found with credential: c1 of consumer: jack");
        let taken = json!({"username": "bob", "plugins": {"basic-auth": {"username": "jack", "password": "x"}}});
        let taken = api.call("PUT", "/consumers", taken).await;
        assert_eq!(taken.error(), "duplicate username of plugin basic-auth found with consumer: jack");
        assert_eq!(api.call("GET", "/consumers", None).await.json()["total"], 1, "credentials are not consumers");
        assert_eq!(api.call("GET", "/consumers/jack/credentials", None).await.json()["total"], 1);
        assert_eq!(api.call("DELETE", "/consumers/jack", None).await.status, 200);
        assert_eq!(
            api.call("GET", "/consumers/jack/credentials/c1", None).await.status,
            404,
            "deleted with its consumer"
        );
    });
}

#[test]
fn lists_are_filtered_then_paged() {
    scene(|| async {
        let api = start().await;
        for i in 1..=11 {
            let label = format!("l{i}");
            let route = json!({"uri": format!("/hello{i}"), "name": i.to_string(), "labels": {label: "x"}, "upstream": upstream()});
            assert_eq!(api.call("PUT", &format!("/routes/{i}"), route).await.status, 201);
        }
        for (query, total, listed) in [
            ("", 11, 11),
            ("?page=1&page_size=10", 11, 10),
            ("?page=2&page_size=10", 11, 1),
            ("?page=3&page_size=10", 11, 0),
            ("?page=-1&page_size=10", 11, 10),
            ("?name=1", 3, 3),
            ("?label=l1", 1, 1),
            ("?label=x", 0, 0),
            ("?label=", 0, 0),
            ("?uri=hello1", 3, 3),
            ("?uri=hello1&name=0", 1, 1),
            ("?filter=service_id%3D1", 0, 0),
        ] {
            let list = api.call("GET", &format!("/routes{query}"), None).await.json();
            let seen = (list["total"].as_i64(), list["list"].as_array().map(Vec::len));
            assert_eq!(seen, (Some(total), Some(listed)), "{query}");
        }
    });
}

#[test]
fn lua_is_taken_as_it_is_or_in_json() {
    scene(|| async {
        let api = start().await;
        let headers = format!("X-API-KEY: {KEY}\r\nContent-Type: application/x-www-form-urlencoded\r\n");
        let reply = api.send(api.admin, "PUT", "/apisix/admin/functions/hello", &headers, "ngx.say('hi')").await;
        assert_eq!((reply.status, &reply.json()["value"]["source"]), (201, &json!("ngx.say('hi')")), "{}", reply.text);
        assert_eq!(api.call("PUT", "/functions/hello", json!({"source": "return 1"})).await.status, 200);
        let route = json!({"uri": "/hello", "function_id": "hello"});
        assert_eq!(api.call("PUT", "/routes/2", route).await.status, 201);
        let reply = api.call("DELETE", "/functions/hello", None).await;
        assert_eq!(reply.error(), "can not delete this function, route [2] is still using it now");
    });
}

#[test]
fn plugins_and_schemas_are_shown() {
    scene(|| async {
        let api = start().await;
        let names = api.call("GET", "/plugins/list", None).await.json();
        assert_eq!(names.as_array().map(Vec::len), Some(107));
        assert_eq!(names[0], "real-ip");
        let schema = api.call("GET", "/plugins/basic-auth?schema_type=consumer", None).await.json();
        assert_eq!(schema["required"], json!(["username", "password"]));
        assert_eq!(api.call("GET", "/plugins?all=true", None).await.json()["key-auth"]["type"], "auth");
        assert!(api.call("GET", "/schema/route", None).await.json()["properties"]["uri"].is_object());
        assert_eq!(api.call("POST", "/schema/validate/routes", json!({"uri": "/a", "plugins": {}})).await.status, 200);
        assert_eq!(api.call("PUT", "/plugins/reload", None).await.text, "done");
        assert!(api.control("/v1/schema").await.json()["main"]["route"].is_object());
    });
}

#[test]
fn the_control_api_tells_what_is_wrong() {
    scene(|| async {
        let api = start().await;
        assert_eq!(api.control("/v1/config/errors").await.json()["errors"], json!([]));
        let mut list = api.control("/v1/routes").await;
        assert_eq!((list.status, list.json()), (200, json!([])));
        // Another writer puts what the Admin API would refuse.
        let bad = api.store.put("/routes/bad", "{\"uri\": 1}".into(), crate::store::Condition::Always, None).await;
        let revision = bad.expect("is stored").revision;
        api.call("PUT", "/routes/good", json!({"uri": "/a", "upstream": {"nodes": {"foo.com:1": 1}}})).await;
        let errors = api.control("/v1/config/errors").await.json();
        assert_eq!(
            (&errors["errors"][0]["key"], &errors["errors"][0]["modifiedIndex"]),
            (&json!("/routes/bad"), &json!(revision))
        );
        assert_eq!(errors["source"]["connected"], true);
        list = api.control("/v1/routes").await;
        assert_eq!(list.json()[0]["value"]["upstream"]["nodes"], json!([{"host": "foo.com", "port": 1, "weight": 1}]));
        assert_eq!(list.json()[0]["has_domain"], true);
        assert_eq!(list.json()[0]["key"], "/apisix/routes/good");
        assert_eq!(list.json()[0]["orig_modifiedIndex"], list.json()[0]["modifiedIndex"]);
        assert_eq!(api.control("/v1/healthcheck").await.json(), json!({}));
        assert_eq!(api.control("/v1/healthcheck/route/1").await.error(), "invalid src type route");
        assert_eq!(api.control("/v1/healthcheck/routes/1").await.error(), "routes[1] not found");
        assert_eq!(api.send(api.control, "POST", "/v1/gc", "", "").await.status, 200);
    });
}

/// Who asks for `/hold` waits: for the test to know that it came, and for the server until it may go.
#[derive(Default)]
struct Gate {
    came: Notify,
    go: Notify,
}

/// Answers what it is sent.
async fn serve_gate(limits: http::Limits, listener: TcpListener, gate: Rc<Gate>, ended: oneshot::Receiver<()>) {
    let handler = move |request: http::Incomplete| {
        let gate = gate.clone();
        async move {
            if request.head.uri.path() == "/hold" {
                gate.came.notify_one();
                gate.go.notified().await;
            }
            match request.complete(10).await {
                Ok(call) => http::Answer::text(200, call.body),
                Err(refusal) => refusal,
            }
        }
    };
    http::serve_within(limits, listener, None, Rc::new(handler), async { drop(ended.await) }).await;
}

async fn asks(stream: &mut TcpStream, path: &str) {
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes()).await.expect("is sent");
}

async fn is_answered(stream: &mut TcpStream) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        assert!(stream.read_buf(&mut head).await.expect("reads") > 0, "closed");
    }
    assert!(head.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&head));
}

#[test]
fn connections_past_the_bound_wait_for_a_place() {
    scene(|| async {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let addr = listener.local_addr().expect("bound");
        let gate = Rc::<Gate>::default();
        let (end, ended) = oneshot::channel();
        let served = tokio::task::spawn_local(serve_gate(http::LIMITS, listener, gate.clone(), ended));
        let mut held = Vec::new();
        for _ in 0..http::LIMITS.connections {
            let mut stream = TcpStream::connect(addr).await.expect("connects");
            asks(&mut stream, "/").await;
            is_answered(&mut stream).await;
            held.push(stream);
        }
        let mut late = TcpStream::connect(addr).await.expect("waits in the kernel");
        asks(&mut late, "/").await;
        // Whoever has a place is still answered, whoever has none is not.
        for stream in &mut held {
            asks(stream, "/").await;
            is_answered(stream).await;
        }
        assert_eq!(late.try_read(&mut [0; 1]).expect_err("no answer").kind(), std::io::ErrorKind::WouldBlock);
        held.pop();
        is_answered(&mut late).await;
        // The end waits for who is being served, not for who could ask again.
        asks(&mut late, "/hold").await;
        gate.came.notified().await;
        end.send(()).expect("is served");
        for stream in &mut held {
            assert_eq!(stream.read(&mut [0; 1]).await.expect("an end"), 0);
        }
        assert!(!served.is_finished());
        gate.go.notify_one();
        is_answered(&mut late).await;
        served.await.expect("ends");
    });
}

#[test]
fn a_body_is_read_up_to_its_bound() {
    scene(|| async {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let addr = listener.local_addr().expect("bound");
        let (_end, ended) = oneshot::channel();
        tokio::task::spawn_local(serve_gate(http::LIMITS, listener, Rc::default(), ended));
        let told = "invalid request body: request size 11 is greater than the maximum size 10 allowed";
        for (body, expected) in [
            ("Content-Length: 10\r\n\r\n0123456789", "0123456789"),
            ("Content-Length: 11\r\n\r\n0123456789a", told),
            ("Transfer-Encoding: chunked\r\n\r\na\r\n0123456789\r\n0\r\n\r\n", "0123456789"),
            ("Transfer-Encoding: chunked\r\n\r\na\r\n0123456789\r\n1\r\na\r\n0\r\n\r\n", told),
            // It asks first, and is told before it has sent anything.
            ("Content-Length: 11\r\nExpect: 100-continue\r\n\r\n", told),
        ] {
            let mut stream = TcpStream::connect(addr).await.expect("connects");
            let request = format!("PUT / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{body}");
            stream.write_all(request.as_bytes()).await.expect("is sent");
            let mut reply = String::new();
            stream.read_to_string(&mut reply).await.expect("an answer to its end");
            let (head, text) = reply.split_once("\r\n\r\n").expect("a whole head");
            assert_eq!(head.starts_with("HTTP/1.1 400"), expected == told, "{reply}");
            assert!(text.contains(expected), "{reply}");
        }
    });
}

#[test]
fn a_document_is_bounded_and_so_is_what_is_told_of_it() {
    scene(|| async {
        let api = start().await;
        let (key, path) = (format!("X-API-KEY: {KEY}\r\n"), "/apisix/admin/configs/validate");
        let of_size = |size: usize| format!("{{}}{}", " ".repeat(size - 2));
        let fits = api.send(api.admin, "POST", path, &key, &of_size(configs::MAX_BODY_BYTES)).await;
        assert_eq!(fits.status, 200, "{}", fits.text);
        for path in ["/apisix/admin/configs", "/apisix/admin/configs/other", "/apisix/admin/configsx"] {
            let refused = api.send(api.admin, "PUT", path, &key, &of_size(MAX_BODY_BYTES + 1)).await;
            assert!(
                refused.error().ends_with("than the maximum size 1572864 allowed"),
                "no document: {}",
                refused.text
            );
        }
        let refused = api.send(api.admin, "POST", path, &key, &of_size(configs::MAX_BODY_BYTES + 1)).await;
        assert!(refused.error().ends_with("is greater than the maximum size 67108864 allowed"), "{}", refused.text);
        for (wrong, told) in
            [(configs::MAX_FAULTS, configs::MAX_FAULTS), (configs::MAX_FAULTS + 1, configs::MAX_FAULTS)]
        {
            let routes = vec![json!({"uri": 1}); wrong];
            let refused = api.call("POST", "/configs/validate", json!({ "routes": routes })).await;
            assert_eq!(refused.json()["errors"].as_array().map(Vec::len), Some(told));
        }
    });
}

#[test]
fn bodies_of_both_apis_are_bounded() {
    scene(|| async {
        let api = start().await;
        for (to, bound) in [(api.admin, MAX_BODY_BYTES), (api.control, control::MAX_BODY_BYTES)] {
            let key = format!("X-API-KEY: {KEY}\r\n");
            let fits = api.send(to, "PUT", "/apisix/admin/routes/1", &key, &" ".repeat(bound)).await;
            assert!(!fits.text.contains("greater than"), "{}", fits.text);
            let refused = api.send(to, "PUT", "/apisix/admin/routes/1", &key, &" ".repeat(bound + 1)).await;
            let size = bound + 1;
            let told =
                format!("invalid request body: request size {size} is greater than the maximum size {bound} allowed");
            assert_eq!((refused.status, refused.error()), (400, told));
        }
    });
}

/// A store whose writes do not go as the Admin API would like.
struct Unkind {
    inner: Arc<dyn Store>,
    how: Unkindness,
}

enum Unkindness {
    /// Another writer is always quicker; the tries are counted.
    Contended(Arc<AtomicUsize>),
    /// A write says that it is further ahead than what it will show.
    Lagging,
}

impl Store for Unkind {
    fn name(&self) -> &'static str {
        "unkind"
    }

    fn get<'a>(&'a self, key: &'a str) -> store::BoxFuture<'a, error::Result<Option<store::Entry>>> {
        self.inner.get(key)
    }

    fn list<'a>(&'a self, prefix: &'a str) -> store::BoxFuture<'a, error::Result<(Vec<store::Entry>, i64)>> {
        self.inner.list(prefix)
    }

    fn put<'a>(
        &'a self,
        key: &'a str,
        value: String,
        on: store::Condition,
        ttl: Option<u64>,
    ) -> store::BoxFuture<'a, error::Result<store::Written>> {
        Box::pin(async move {
            match &self.how {
                Unkindness::Contended(tries) => {
                    self.inner.put(key, value.clone(), store::Condition::Always, None).await?;
                    tries.fetch_add(1, Ordering::Relaxed);
                    self.inner.put(key, value, on, ttl).await
                }
                Unkindness::Lagging => {
                    let written = self.inner.put(key, value, on, ttl).await?;
                    Ok(store::Written { revision: written.revision + 1000, ..written })
                }
            }
        })
    }

    fn delete<'a>(
        &'a self,
        key: &'a str,
        on: store::Condition,
    ) -> store::BoxFuture<'a, error::Result<Option<(store::Entry, i64)>>> {
        self.inner.delete(key, on)
    }

    fn watch(self: Arc<Self>, changes: store::ChangeSink) -> store::BoxFuture<'static, ()> {
        self.inner.clone().watch(changes)
    }
}

#[test]
fn a_write_that_is_stored_is_answered_though_it_is_not_served() {
    scene(|| async {
        let api = start_on(|inner| Arc::new(Unkind { inner, how: Unkindness::Lagging })).await;
        let began = std::time::Instant::now();
        let put = api.call("PUT", "/routes/1", json!({"uri": "/a", "upstream": upstream()})).await;
        assert_eq!(put.status, 201);
        assert!(began.elapsed() >= SERVED_PATIENCE, "it does wait");
        assert_eq!(api.stored("/routes/1").await["uri"], "/a");
    });
}

#[test]
fn a_write_gives_way_to_others_only_so_often() {
    scene(|| async {
        let tries = Arc::new(AtomicUsize::new(0));
        let counted = tries.clone();
        let api = start_on(|inner| Arc::new(Unkind { inner, how: Unkindness::Contended(counted) })).await;
        let route = json!({"id": "1", "uri": "/a", "upstream": upstream()});
        api.store.put("/routes/1", route.to_string(), store::Condition::Always, None).await.expect("is stored");
        let patched = api.call("PATCH", "/routes/1", json!({"desc": "x"})).await;
        assert_eq!((patched.status, patched.error().as_str()), (409, "value changed before overwritten"));
        assert_eq!(tries.swap(0, Ordering::Relaxed), contest::MAX_TRIES);
        let posted = api.call("POST", "/routes", json!({"uri": "/b", "upstream": upstream()})).await;
        assert_eq!(
            (posted.status, posted.error().as_str()),
            (503, "other writers took all 64 ids that were tried: try again")
        );
        assert_eq!(tries.load(Ordering::Relaxed), contest::MAX_TRIES);
    });
}

#[test]
fn who_is_too_slow_is_let_go() {
    scene(|| async {
        let short = Duration::from_millis(50);
        let limits = http::Limits {
            head_patience: short,
            body_patience: short,
            drain_patience: short,
            discard: 100_000,
            ..http::LIMITS
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let addr = listener.local_addr().expect("bound");
        let gate = Rc::<Gate>::default();
        let (end, ended) = oneshot::channel();
        let served = tokio::task::spawn_local(serve_gate(limits, listener, gate.clone(), ended));
        let told = "invalid request body: request size 1000000 is greater than the maximum size 10 allowed";
        for (request, expected) in [
            ("GET / HT".to_owned(), ""),
            ("PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n1".to_owned(), "invalid request body: timeout"),
            // Of what is too long so much is read, and for so long; then the refusal is sent.
            ("PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n".to_owned() + &"x".repeat(200_000), told),
            ("PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n1".to_owned(), told),
        ] {
            let mut stream = TcpStream::connect(addr).await.expect("connects");
            // A body that is not read to its end meets a reset after the refusal.
            let _ = stream.write_all(request.as_bytes()).await;
            let mut reply = Vec::new();
            let _ = stream.read_to_end(&mut reply).await;
            let reply = String::from_utf8_lossy(&reply);
            assert!(reply.contains(expected) && reply.is_empty() == expected.is_empty(), "{reply}");
        }
        let mut held = TcpStream::connect(addr).await.expect("connects");
        asks(&mut held, "/hold").await;
        gate.came.notified().await;
        end.send(()).expect("is served");
        served.await.expect("does not wait for one that never ends");
    });
}
