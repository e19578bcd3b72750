//! What the control API shows of objects: as they are served.

use serde_json::json;

use crate::support::{Dir, Gateway, get};

#[test]
fn objects_are_shown_with_their_keys_and_all_defaults() {
    let gw = Gateway::start();
    let upstream = json!({"type": "roundrobin", "nodes": {"foo.test:80": 1}});
    let plugins = json!({"limit-count": {"count": 2, "time_window": 60}});
    gw.put("/services/200", json!({"plugins": plugins, "upstream": upstream}));
    gw.put("/routes/1", json!({"uri": "/a", "service_id": "200"}));
    let service = get(&gw.control(), "/v1/service/200").json();
    assert_eq!((&service["key"], &service["has_domain"]), (&json!("/apisix/services/200"), &json!(true)));
    let shown = &service["value"]["plugins"]["limit-count"];
    assert_eq!((&shown["_meta"], &shown["policy"], &shown["count"]), (&json!({}), &json!("local"), &json!(2)));
    assert_eq!(service["value"]["upstream"]["nodes"], json!([{"host": "foo.test", "port": 80, "weight": 1}]));
    assert!(service["orig_modifiedIndex"].is_null(), "{service}");
    let route = get(&gw.control(), "/v1/route/1").json();
    assert_eq!((&route["key"], &route["value"]["status"]), (&json!("/apisix/routes/1"), &json!(1)));
    assert!(route["modifiedIndex"].is_u64() && route["orig_modifiedIndex"] == route["modifiedIndex"], "{route}");
    assert_eq!(get(&gw.control(), "/v1/routes").json(), json!([route]));
    // What the Admin API shows is what is stored.
    let stored = gw.admin("GET", "/services/200", ()).json();
    assert_eq!(stored["value"]["plugins"], plugins);
}

#[test]
fn objects_of_a_file_have_no_prefix() {
    let dir = Dir::new();
    dir.configure(json!({"deployment": {"role": "data_plane", "role_data_plane": {"config_provider": "yaml"}}}));
    dir.write("conf/apisix.yaml", "routes:\n  - {id: 1, uri: /a, upstream: {nodes: {\"127.0.0.1:1\": 1}}}\n#END\n");
    let gw = Gateway::in_dir(dir);
    let route = get(&gw.control(), "/v1/route/1").json();
    assert_eq!((&route["key"], &route["has_domain"]), (&json!("/routes/1"), &json!(false)));
}

#[test]
fn streams_have_the_schema_of_the_plugin_that_they_may_have() {
    let gw = Gateway::start();
    let schema = gw.admin("GET", "/plugins/prometheus?subsystem=stream", ());
    assert_eq!((schema.status, &schema.json()["properties"]["prefer_name"]["type"]), (200, &json!("boolean")));
    assert!(gw.admin("GET", "/plugins?all=true&subsystem=stream", ()).json()["prometheus"]["priority"] == 500);
    assert!(get(&gw.control(), "/v1/schema").json()["stream_plugins"]["prometheus"]["schema"].is_object());
}
