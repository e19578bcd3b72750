//! Consumers, their credentials, and consumer_groups.

use super::{Id, Plugins};

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
