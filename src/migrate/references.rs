//! What objects name: other objects by their ids, and secrets by their managers.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::{
    objects::{MAX_DEPTH, Places, list},
    report::{
        Report,
        Verdict::{Cannot, Change},
    },
};
use crate::{
    model::{Id, Kind},
    plugin::Checker,
    store::Entry,
};

/// What a reference to a secret begins with.
const SECRET: &str = "$secret://";

/// Fields of an object that name another one.
const ID_FIELDS: [(&str, Kind); 5] = [
    ("upstream_id", Kind::Upstream),
    ("service_id", Kind::Service),
    ("plugin_config_id", Kind::PluginConfig),
    ("group_id", Kind::ConsumerGroup),
    ("function_id", Kind::Function),
];

/// The objects that there are.
pub(super) struct Known<'e>(BTreeSet<(&'static str, &'e str)>);

impl<'e> Known<'e> {
    pub fn of(entries: &'e [Entry]) -> Known<'e> {
        let known = entries.iter().filter_map(|entry| Kind::of_key(&entry.key));
        Known(known.map(|(kind, id)| (kind.plural(), id)).collect())
    }

    fn has(&self, kind: Kind, id: &str) -> bool {
        self.0.contains(&(kind.plural(), id))
    }

    /// What an object names that is not there: the path of each field, kind and id.
    pub fn dangling(&self, kind: Kind, value: &Value) -> Vec<(String, Kind, String)> {
        let mut named: Vec<(String, Kind, &Value)> = Vec::new();
        for (field, other) in ID_FIELDS {
            named.extend(value.get(field).map(|id| (field.to_owned(), other, id)));
        }
        let own = Some(value).filter(|_| kind == Kind::Upstream).map(|value| ("", value));
        let inline = value.get("upstream").map(|upstream| ("upstream.", upstream));
        for (path, upstream) in own.into_iter().chain(inline) {
            let id = upstream.pointer("/tls/client_cert_id");
            named.extend(id.map(|id| (format!("{path}tls.client_cert_id"), Kind::Ssl, id)));
        }
        for (i, rule) in list(value.pointer("/plugins/traffic-split/rules")).enumerate() {
            for (j, weighted) in list(rule.get("weighted_upstreams")).enumerate() {
                let path = format!("plugins.traffic-split.rules[{i}].weighted_upstreams[{j}].upstream_id");
                named.extend(weighted.get("upstream_id").map(|id| (path, Kind::Upstream, id)));
            }
        }
        let text = |(path, kind, id): (String, Kind, &Value)| match id {
            Value::String(id) => Some((path, kind, id.clone())),
            Value::Number(id) => Some((path, kind, id.to_string())),
            _ => None,
        };
        named.into_iter().filter_map(text).filter(|(_, kind, id)| !self.has(*kind, id)).collect()
    }
}

/// What to do about a field that names what is not there.
pub(super) const ADVICE: &str = "write that object, or take the field out: requests that need it are refused";

/// `manager/id` of each `$secret://manager/id/key`, with the objects that have it; without the id where none is written.
#[derive(Default)]
pub(super) struct Managers(BTreeMap<String, Places>);

impl Managers {
    /// Notes what the object of that key refers to.
    pub fn note(&mut self, key: &Id, value: &Value) {
        let mut found = BTreeSet::new();
        managers(value, MAX_DEPTH, &mut found);
        for manager in found {
            self.0.entry(manager).or_default().add(key);
        }
    }

    /// Tells managers without a module, and those that no object configures.
    pub fn tell(&self, checker: &Checker, known: &Known<'_>, report: &mut Report) {
        let mut missing: BTreeMap<&str, Places> = BTreeMap::new();
        for (path, places) in &self.0 {
            let (manager, id) = path.split_once('/').unwrap_or((path, ""));
            if checker.find_module(&format!("apisix.secret.{manager}")).is_none() {
                missing.entry(manager).or_default().merge(places);
            } else if id.is_empty() {
                let what = format!("refers to a secret without saying where ({SECRET}{path})");
                report.add(Change, "object", places.to_string(), what, "write $secret://manager/id/key");
            } else if !known.has(Kind::Secret, path) {
                let what = format!("refers to {SECRET}{path}/, and no object /secrets/{path} says where that is");
                let advice =
                    "write that object: until then plugins see the reference itself, and certificates are not served";
                report.add(Change, "object", places.to_string(), what, advice);
            }
        }
        for (manager, places) in missing {
            let what = format!("refers to a secret manager that there is not ({SECRET}{manager}/)");
            let advice = "write the value itself, which is stored encrypted, or $env://NAME";
            report.add(Cannot, "object", places.to_string(), what, advice);
        }
    }
}

fn managers(value: &Value, depth: usize, found: &mut BTreeSet<String>) {
    match value {
        _ if depth == 0 => {}
        Value::String(text) => {
            let start = text.get(..SECRET.len()).filter(|start| start.eq_ignore_ascii_case(SECRET));
            found.extend(start.map(|_| manager_of(&text[SECRET.len()..])));
        }
        Value::Array(items) => items.iter().for_each(|item| managers(item, depth - 1, found)),
        Value::Object(map) => map.values().for_each(|item| managers(item, depth - 1, found)),
        _ => {}
    }
}

/// `manager/id` of `manager/id/key`; the manager alone where what follows is not both.
fn manager_of(rest: &str) -> String {
    let mut parts = rest.splitn(3, '/');
    let manager = parts.next().unwrap_or_default();
    match (parts.next(), parts.next()) {
        (Some(id), Some(key)) if !id.is_empty() && !key.is_empty() => format!("{manager}/{id}"),
        _ => manager.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn managers_are_named_with_their_ids() {
        let mut found = BTreeSet::new();
        let value = json!({
            "a": ["$secret://vault/1/a/b", "$SECRET://aws/x/k"],
            "b": {"c": "$secret://vault", "d": "$secret://vault/1", "e": "$env://A", "f": "$secret://gcp/1/"},
        });
        managers(&value, MAX_DEPTH, &mut found);
        assert_eq!(found.into_iter().collect::<Vec<_>>(), ["aws/x", "gcp", "vault", "vault/1"]);
    }
}
