//! Consumers, their credentials, and consumer_groups.

use serde_json::{Map, Value};

use super::{
    Id, Plugins, SchemaKind,
    parse::{ParseContext, id, invalid, text},
};
use crate::{error::Result, schema};

#[derive(Debug, Default)]
pub struct Consumer {
    pub username: Box<str>,
    pub group_id: Option<Id>,
    pub plugins: Plugins,
    /// `(plugin, key field, value)` of every auth plugin conf: what the consumer index is built from.
    pub auth_keys: Vec<AuthKey>,
}

/// `/consumers/{username}/credentials/{id}`.
#[derive(Debug, Default)]
pub struct Credential {
    pub username: Box<str>,
    pub plugins: Plugins,
    pub auth_keys: Vec<AuthKey>,
}

#[derive(Debug, Default)]
pub struct ConsumerGroup {
    pub plugins: Plugins,
}

/// A top-level string field of a plugin's conf, by which a plugin may look its consumer up.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AuthKey {
    pub plugin: Box<str>,
    pub field: Box<str>,
    pub value: Box<str>,
}

/// A longer value is no key that a request could carry: it is not indexed.
pub(super) const MAX_AUTH_KEY_BYTES: usize = 8192;

impl Consumer {
    pub(super) fn from_json(map: &mut Map<String, Value>, context: &ParseContext<'_>) -> Result<Consumer> {
        let plugins = Plugins::from_json(map, SchemaKind::Consumer, context)?;
        Ok(Consumer {
            username: text(map, "username").unwrap_or_default().into(),
            group_id: id(map, "group_id"),
            plugins,
            auth_keys: auth_keys(map),
        })
    }
}

impl Credential {
    /// `id` is the credential's place: `jack/credentials/c1`.
    pub(super) fn from_json(id: &str, map: &mut Map<String, Value>, context: &ParseContext<'_>) -> Result<Credential> {
        let Some((username, _)) = id.split_once("/credentials/") else {
            return Err(invalid("missing credential id"));
        };
        let plugins = Plugins::from_json(map, SchemaKind::Consumer, context)?;
        let foreign = |name: &str| schema::plugin(name).is_some_and(|schemas| !schemas.is_auth);
        if plugins.0.iter().any(|conf| foreign(&conf.name)) {
            return Err(invalid("only supports auth type plugins in consumer credential"));
        }
        Ok(Credential { username: username.into(), plugins, auth_keys: auth_keys(map) })
    }
}

/// Every string on the first level of an auth plugin's conf, decrypted. A plugin that the packed schemas do not know may be one.
fn auth_keys(owner: &Map<String, Value>) -> Vec<AuthKey> {
    let Some(Value::Object(plugins)) = owner.get("plugins") else {
        return Vec::new();
    };
    let auth = |name: &str| schema::plugin(name).is_none_or(|schemas| schemas.is_auth);
    let mut keys = Vec::new();
    for (plugin, conf) in plugins.iter().filter(|(name, _)| auth(name)) {
        for (field, value) in conf.as_object().into_iter().flatten() {
            if let Some(value) = value.as_str().filter(|v| v.len() <= MAX_AUTH_KEY_BYTES) {
                let (plugin, field) = (plugin.as_str().into(), field.as_str().into());
                keys.push(AuthKey { plugin, field, value: value.into() });
            }
        }
    }
    keys
}
