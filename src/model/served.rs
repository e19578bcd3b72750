//! Objects as they are in force: with the defaults of their schema, and their nodes as a list.

use std::net::IpAddr;

use serde_json::{Value, json};

use super::{Kind, check, with_whole_numbers};

/// An object that passed its check.
pub struct Served {
    pub value: Value,
    /// One of its nodes is a name.
    pub has_domain: bool,
}

impl Served {
    /// From its JSON as stored.
    pub fn of(kind: Kind, id: &str, json: &str) -> Served {
        Served::of_value(kind, id, serde_json::from_str(json).unwrap_or_default())
    }

    /// From its JSON in which plugins' confs may be decrypted.
    pub fn of_value(kind: Kind, id: &str, mut value: Value) -> Served {
        with_whole_numbers(&mut value);
        // What is served has passed this check.
        let _ = check(kind, id, &mut value);
        let mut served = Served { value, has_domain: false };
        let mut has_domain = false;
        served.each_nodes(|nodes| has_domain |= list_nodes(nodes));
        served.has_domain = has_domain;
        served
    }

    /// Every node says its priority, as scripts expect.
    pub fn with_priorities(mut self) -> Served {
        self.each_nodes(|nodes| {
            for node in nodes.as_array_mut().into_iter().flatten().filter_map(Value::as_object_mut) {
                node.entry("priority").or_insert(json!(0));
            }
        });
        self
    }

    fn each_nodes(&mut self, mut f: impl FnMut(&mut Value)) {
        for path in ["", "/upstream"] {
            if let Some(nodes) = self.value.pointer_mut(path).and_then(|upstream| upstream.get_mut("nodes")) {
                f(nodes);
            }
        }
    }
}

/// Makes a list of nodes written as a map; says whether one is a name.
fn list_nodes(nodes: &mut Value) -> bool {
    if let Value::Object(map) = nodes {
        let list = map.iter().map(|(place, weight)| match split(place) {
            (host, Some(port)) => json!({ "host": host, "port": port, "weight": weight }),
            (host, None) => json!({ "host": host, "weight": weight }),
        });
        *nodes = Value::Array(list.collect());
    }
    let hosts = nodes.as_array().into_iter().flatten().filter_map(|node| node.get("host")?.as_str());
    hosts.into_iter().any(|host| host.trim_matches(['[', ']']).parse::<IpAddr>().is_err())
}

/// `host:port`, brackets kept.
fn split(place: &str) -> (&str, Option<u16>) {
    match place.rsplit_once(':').map(|(host, port)| (host, port.parse())) {
        Some((host, Ok(port))) => (host, Some(port)),
        _ => (place, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_a_list_and_defaults_are_there() {
        let json = r#"{"uri": "/a", "upstream": {"nodes": {"127.0.0.1:80": 1, "[::1]:81": 2, "a.test": 0}}}"#;
        let served = Served::of(Kind::Route, "1", json);
        assert!(served.has_domain);
        let mut nodes = json!([
            {"host": "127.0.0.1", "port": 80, "weight": 1},
            {"host": "[::1]", "port": 81, "weight": 2},
            {"host": "a.test", "weight": 0},
        ]);
        assert_eq!(served.value["upstream"]["nodes"], nodes);
        let said = ["scheme", "pass_host", "hash_on", "type"].map(|name| &served.value["upstream"][name]);
        assert_eq!(said, ["http", "pass", "vars", "roundrobin"]);
        assert_eq!((&served.value["status"], &served.value["priority"]), (&json!(1), &json!(0)));
        nodes.as_array_mut().into_iter().flatten().for_each(|node| node["priority"] = json!(0));
        assert_eq!(served.with_priorities().value["upstream"]["nodes"], nodes);
    }

    #[test]
    fn what_is_written_stays() {
        let json = r#"{"scheme": "https", "nodes": [{"host": "::1", "weight": 1, "priority": -3}]}"#;
        let served = Served::of(Kind::Upstream, "u", json).with_priorities();
        assert!(!served.has_domain);
        assert_eq!(served.value["nodes"], json!([{"host": "::1", "weight": 1, "priority": -3}]));
        assert_eq!(served.value["scheme"], "https");
    }
}
