//! From an entry to an item, by `model::parse`.

use std::sync::Arc;

use super::{Entry, Item, Parser};
use crate::{
    error::Result,
    model::{self, Id, Keyring, Kind, Object, ParseContext, Parsed, crypt::EncryptFields, next_uid},
};

/// The parser of the gateway. `fields` tells of the encrypted fields of plugins that the packed schemas do not know.
pub fn parser(keyring: Arc<Keyring>, fields: Option<Arc<dyn EncryptFields + Send + Sync>>) -> Parser {
    Arc::new(move |kind, id, entry| {
        let fields = fields.as_deref().map(|f| f as &dyn EncryptFields);
        parse(kind, id, entry, &ParseContext { keyring: &keyring, fields })
    })
}

fn parse(kind: Kind, id: &str, entry: &Entry, context: &ParseContext<'_>) -> Result<Item> {
    Ok(match model::parse(kind, id, &entry.value, context)? {
        Parsed::Route(v) => Item::Route(object(id, entry, v)),
        Parsed::Service(v) => Item::Service(object(id, entry, v)),
        Parsed::Upstream(v) => Item::Upstream(object(id, entry, v)),
        Parsed::Consumer(v) => Item::Consumer(object(id, entry, v)),
        Parsed::Credential(v) => Item::Credential(object(id, entry, v)),
        Parsed::ConsumerGroup(v) => Item::ConsumerGroup(object(id, entry, v)),
        Parsed::PluginConfig(v) => Item::PluginConfig(object(id, entry, v)),
        Parsed::GlobalRule(v) => Item::GlobalRule(object(id, entry, v)),
        Parsed::PluginMetadata(v) => Item::PluginMetadata(object(id, entry, v)),
        Parsed::Ssl(v) => Item::Ssl(object(id, entry, v)),
        Parsed::Function(v) => Item::Function(object(id, entry, v)),
        Parsed::PluginSource(v) => Item::PluginSource(object(id, entry, v)),
        Parsed::StreamRoute(v) => Item::StreamRoute(object(id, entry, v)),
        Parsed::Other => Item::Other(kind, object(id, entry, ())),
    })
}

fn object<T>(id: &str, entry: &Entry, value: T) -> Arc<Object<T>> {
    Arc::new(Object {
        id: Id::from(id),
        uid: next_uid(),
        create_revision: entry.create_revision,
        mod_revision: entry.mod_revision,
        json: entry.value.clone(),
        value,
    })
}
