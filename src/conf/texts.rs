//! The keys of config.yaml that are texts, whatever they look like: a password of digits is no number.

use serde_json::Value;

/// `[]` stands for each item of a list. Where a list may be a single text, both are here.
const TEXTS: &[&str] = &[
    "apisix.data_encryption.keyring",
    "apisix.data_encryption.keyring[]",
    "apisix.extra_lua_cpath",
    "apisix.extra_lua_path",
    "apisix.id",
    "apisix.lua_module_hook",
    "apisix.proxy_cache.zones[].name",
    "apisix.ssl.fallback_sni",
    "apisix.ssl.ssl_trusted_certificate",
    "apisix.trace.header",
    "apisix.trace.key",
    "apisix.trace.secrets[]",
    "deployment.admin.admin_api_mtls.admin_ssl_ca_cert",
    "deployment.admin.admin_api_mtls.admin_ssl_cert",
    "deployment.admin.admin_api_mtls.admin_ssl_cert_key",
    "deployment.admin.admin_key[].key",
    "deployment.admin.admin_key[].name",
    "deployment.admin.admin_key[].role",
    "deployment.etcd.host",
    "deployment.etcd.host[]",
    "deployment.etcd.password",
    "deployment.etcd.prefix",
    "deployment.etcd.tls.cert",
    "deployment.etcd.tls.key",
    "deployment.etcd.tls.sni",
    "deployment.etcd.user",
    "nginx_config.envs[]",
    "nginx_config.error_log",
    "nginx_config.http.access_log",
    "nginx_config.http.access_log_format",
    "nginx_config.http.real_ip_header",
    "nginx_config.stream.access_log",
    "nginx_config.stream.access_log_format",
    "plugin_attr.prometheus.export_uri",
    "plugin_attr.prometheus.metric_prefix",
    "plugins[]",
    "stream_plugins[]",
];

/// Whether the key at `a.b[0].c` is a text.
pub(super) fn has(path: &str) -> bool {
    let shape: String = match path.contains('[') {
        true => path
            .split('[')
            .map(|part| part.trim_start_matches(|c: char| c.is_ascii_digit()))
            .collect::<Vec<_>>()
            .join("["),
        false => path.to_owned(),
    };
    TEXTS.contains(&shape.as_str())
}

/// The text of a whole number. Another number may be written in many ways, and which it was is no longer known.
pub(super) fn of(value: &Value) -> Result<String, String> {
    match value {
        Value::Number(n) if n.is_u64() || n.is_i64() => Ok(n.to_string()),
        // Not what it is: it may be a secret.
        Value::Number(_) => Err("a number with a fraction is not a text; put it in quotes".to_owned()),
        Value::Bool(_) => Err("true or false is not a text; put it in quotes".to_owned()),
        _ => Err("what stands here is not a text".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_known_with_any_index() {
        for path in ["deployment.admin.admin_key[12].key", "apisix.data_encryption.keyring[0]", "deployment.etcd.user"]
        {
            assert!(has(path), "{path}");
        }
        for path in ["deployment.admin.admin_key[1]", "deployment.etcd.timeout", "nginx_config.worker_processes", ""] {
            assert!(!has(path), "{path}");
        }
    }
}
