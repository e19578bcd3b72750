//! What the configuration files may say, and what is told of it: numbers for texts, variables, repeated keys, ports.

use serde_json::json;

use crate::support::{Gateway, request};

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
