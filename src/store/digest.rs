//! A digest of the whole configuration: the same in two gateways that serve the same.

use sha2::{Digest, Sha256};

use super::Snapshot;
use crate::model::Kind;

impl Snapshot {
    /// SHA-256, in hex, of all objects as they are stored, in the order of their kinds and ids. Reads everything: not for a thread
    /// that serves.
    pub fn digest(&self) -> String {
        let mut all: Vec<(&str, &str, &str)> = Vec::new();
        macro_rules! tables {
            ($($kind:ident: $table:ident),*) => {
                $(all.extend(self.$table.values().map(|o| (Kind::$kind.plural(), &*o.id, &*o.json)));)*
            };
        }
        tables!(Route: routes, Service: services, Upstream: upstreams, Consumer: consumers, Credential: credentials,
            ConsumerGroup: consumer_groups, PluginConfig: plugin_configs, PluginMetadata: plugin_metadata, Ssl: ssls,
            Function: functions, PluginSource: plugin_sources, StreamRoute: stream_routes);
        all.extend(self.global_rules.iter().map(|o| (Kind::GlobalRule.plural(), &*o.id, &*o.json)));
        all.extend(self.others.iter().map(|((kind, _), o)| (kind.plural(), &*o.id, &*o.json)));
        all.sort_unstable();
        let mut hash = Sha256::new();
        let mut add = |text: &str| {
            // With its length, so that no two lists of texts are the same bytes.
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text);
        };
        for (kind, id, json) in all {
            [kind, id, json].into_iter().for_each(&mut add);
        }
        self.plugin_names.iter().flat_map(|names| names.iter()).for_each(|name| add(name));
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::model::{Function, Object};

    fn holding(functions: &[(&str, &str)]) -> Snapshot {
        let mut snapshot = Snapshot::default();
        for (uid, (id, json)) in functions.iter().enumerate() {
            let value = Function::default();
            let (create_revision, mod_revision) = (uid as i64, 10 + uid as i64);
            let object = Object {
                id: (*id).into(),
                uid: uid as u64,
                create_revision,
                mod_revision,
                json: (*json).into(),
                value,
            };
            snapshot.functions.insert((*id).into(), Arc::new(object));
        }
        snapshot
    }

    #[test]
    fn the_same_objects_have_the_same_digest_and_others_another_one() {
        let one = holding(&[("a", "{}"), ("b", "{\"x\":1}")]);
        assert_eq!(one.digest().len(), 64);
        assert_eq!(one.digest(), holding(&[("b", "{\"x\":1}"), ("a", "{}")]).digest());
        for other in [&[("a", "{}")][..], &[("a", "{}"), ("b", "{\"x\":2}")], &[("a", "{}{\"x\":1}"), ("b", "")]] {
            assert_ne!(one.digest(), holding(other).digest());
        }
        assert_ne!(one.digest(), Snapshot { plugin_names: Some(["p".into()].into()), ..one.clone() }.digest());
    }
}
