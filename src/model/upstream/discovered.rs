//! Upstreams whose nodes a registry knows.

use std::{net::Ipv6Addr, sync::LazyLock};

use serde_json::{Map, Value, json};

use super::{Upstream, next_uid, nodes};
use crate::{
    error::Result,
    model::parse::{boxed, invalid},
    schema::Schema,
};

/// Which registry is asked for which nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Discovery {
    /// `discovery_type`: the registry's name.
    pub kind: Box<str>,
    /// `service_name`: what the registry knows the nodes by.
    pub service: Box<str>,
    /// `discovery_args` as JSON text.
    pub args: Option<Box<str>>,
    /// `Upstream::uid` of the upstream that says so; what is found has another one with each change.
    pub uid: u64,
}

/// What a registry's nodes must be: those of an upstream, as a list.
static NODES: LazyLock<Result<Schema, String>> = LazyLock::new(|| {
    Schema::compile(&json!({
        "type": "array",
        "items": {
            "type": "object",
            "properties": {
                "host": {"type": "string", "pattern": r"^\*$|^\*?[0-9a-zA-Z-._\[\]:]+$"},
                "port": {"type": "integer", "minimum": 1, "maximum": 65535},
                "weight": {"type": "integer", "minimum": 0},
                "priority": {"type": "integer"},
                "metadata": {"type": "object"},
            },
            "required": ["host", "weight"],
        },
    }))
});

impl Discovery {
    /// `None`: the upstream `uid` has nodes of its own.
    pub(super) fn of(upstream: &Map<String, Value>, uid: u64) -> Option<Discovery> {
        let (kind, service) = boxed(upstream, "discovery_type").zip(boxed(upstream, "service_name"))?;
        let args = upstream.get("discovery_args").filter(|args| args.is_object()).map(|args| args.to_string().into());
        Some(Discovery { kind, service, args, uid })
    }
}

impl Upstream {
    /// The same with the nodes that its registry knows, a list of `{host, port, weight, priority}`. An error says which node
    /// is none.
    pub fn discovered(&self, mut list: Value) -> Result<Upstream> {
        let schema = NODES.as_ref().map_err(invalid)?;
        schema.check_only(&mut list).map_err(|e| invalid(format!("invalid nodes format: {e}")))?;
        list.as_array_mut().into_iter().flatten().for_each(enclose);
        let nodes = nodes(Some(&list), self.scheme)?;
        Ok(Upstream { uid: next_uid(), nodes, ..self.clone() })
    }
}

/// Registries give IPv6 addresses as they have them, in brackets or without; upstreams have them in brackets.
fn enclose(node: &mut Value) {
    let Some(Value::String(host)) = node.get_mut("host") else { return };
    if host.parse::<Ipv6Addr>().is_ok() {
        *host = format!("[{host}]");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Keyring, ParseContext};

    fn written(mut json: Value) -> Upstream {
        let keyring = Keyring::default();
        let map = json.as_object_mut().expect("a map");
        Upstream::from_json(map, &ParseContext::new(&keyring)).expect("an upstream")
    }

    fn of_registry() -> Upstream {
        written(json!({
            "type": "least_conn", "scheme": "https", "discovery_type": "mine", "service_name": "s",
            "discovery_args": {"group_name": "g"}, "nodes": {"127.0.0.1:80": 1}, "retries": 3,
        }))
    }

    #[test]
    fn a_registry_takes_the_place_of_nodes() {
        let upstream = of_registry();
        assert!(upstream.nodes.is_empty());
        let discovery = upstream.discovery.as_deref().expect("a registry");
        assert_eq!((&*discovery.kind, &*discovery.service), ("mine", "s"));
        assert_eq!((discovery.args.as_deref(), discovery.uid), (Some(r#"{"group_name":"g"}"#), upstream.uid));
        let named = written(json!({"service_name": "s", "nodes": {"127.0.0.1:80": 1}}));
        assert!(named.discovery.is_none() && named.nodes.len() == 1, "a name alone is none");
    }

    #[test]
    fn what_is_found_is_the_same_upstream_with_nodes() {
        let upstream = of_registry();
        let list = json!([{"host": "[::1]", "port": 81, "weight": 2, "priority": -1}, {"host": "a.test", "weight": 0}, {"host": "::2", "weight": 1}]);
        let found = upstream.discovered(list).expect("nodes");
        let nodes: Vec<_> = found.nodes.iter().map(|n| (&*n.host, n.port, n.weight, n.priority)).collect();
        assert_eq!(nodes, [("::1", 81, 2, -1), ("a.test", 443, 0, 0), ("::2", 443, 1, 0)]);
        assert_eq!((found.retries, &found.balance), (Some(3), &upstream.balance));
        assert_ne!(found.uid, upstream.uid);
        assert_eq!(found.discovery, upstream.discovery);
    }

    #[test]
    fn what_is_no_node_is_told() {
        for (list, why) in [
            (json!({"a": 1}), "invalid nodes format: wrong type: expected array, got table"),
            (
                json!([{"host": "127.0.0.1", "port": 80, "weight": "0"}]),
                "invalid nodes format: failed to validate item 1: property \"weight\" validation failed: wrong type: \
                 expected integer, got string",
            ),
            (json!([{"host": "127.0.0.1", "weight": 1}, {"weight": 1}]), "failed to validate item 2"),
            (json!([{"host": "::1:80:", "weight": 1}]), "IPv6 address must be enclosed"),
            (json!([{"host": "a", "weight": 1, "port": 0}]), "property \"port\""),
        ] {
            let e = of_registry().discovered(list).expect_err("no nodes").to_string();
            assert!(e.contains(why), "{e}");
        }
    }
}
