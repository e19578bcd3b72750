//! `plugins` of a route, service, consumer, …: which plugins run with which conf.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::{
    SchemaKind, crypt, next_uid,
    parse::{ParseContext, flag, invalid, number},
};
use crate::{error::Result, expr::Expr};

/// One plugin's conf where it is used.
#[derive(Debug)]
pub struct PluginConf {
    pub name: Arc<str>,
    /// Unique per conf text and owner version: a VM caches the Lua table under it.
    pub uid: u64,
    /// The conf as JSON text, `_meta` included, decrypted.
    pub json: Arc<str>,
    pub meta: Meta,
}

/// `_meta`: what the plugin runner itself obeys (plugin-develop.md, plugin common configuration).
#[derive(Debug, Default)]
pub struct Meta {
    pub disable: bool,
    pub priority: Option<i64>,
    pub filter: Option<Expr>,
    /// True when `error_response` or `pre_function` is set: the Lua side reads them off the conf.
    pub has_hooks: bool,
}

/// The plugins of one owner, in the order of its JSON.
#[derive(Clone, Debug, Default)]
pub struct Plugins(pub Arc<[Arc<PluginConf>]>);

/// `/plugin_metadata/{name}`: settings of a plugin for the whole gateway.
#[derive(Debug)]
pub struct PluginMetadata {
    /// The metadata as JSON text, decrypted: what plugins read. The object's own text is as stored.
    pub json: Arc<str>,
}

impl PluginMetadata {
    pub(super) fn from_json(name: &str, map: &mut Map<String, Value>, context: &ParseContext<'_>) -> PluginMetadata {
        let mut value = Value::Object(std::mem::take(map));
        crypt::decrypt_fields(context.keyring, context.fields, name, SchemaKind::Metadata, &mut value);
        PluginMetadata { json: value.to_string().into() }
    }
}

impl Plugins {
    /// Takes `plugins` out of an owner's JSON. `kind` says which of a plugin's schemas they are written for.
    pub(super) fn from_json(
        owner: &mut Map<String, Value>,
        kind: SchemaKind,
        context: &ParseContext<'_>,
    ) -> Result<Plugins> {
        let Some(Value::Object(plugins)) = owner.get_mut("plugins") else {
            return Ok(Plugins::default());
        };
        let confs = plugins.iter_mut().map(|(name, conf)| {
            crypt::decrypt_fields(context.keyring, context.fields, name, kind, conf);
            PluginConf::from_json(name, conf).map(Arc::new)
        });
        confs.collect::<Result<Arc<[_]>>>().map(Plugins)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn get(&self, name: &str) -> Option<&Arc<PluginConf>> {
        self.0.iter().find(|conf| &*conf.name == name)
    }

    /// Their owner's stored JSON as plugins read it: with these confs, which are decrypted, in the place of the stored ones. A text that
    /// is no JSON reads as null.
    pub fn in_clear(&self, owner: &str) -> Value {
        let mut value: Value = serde_json::from_str(owner).unwrap_or_default();
        if let Some(Value::Object(stored)) = value.get_mut("plugins") {
            for conf in self.0.iter() {
                if let (Some(stored), Ok(clear)) = (stored.get_mut(&*conf.name), serde_json::from_str(&conf.json)) {
                    *stored = clear;
                }
            }
        }
        value
    }
}

impl PluginConf {
    fn from_json(name: &str, conf: &Value) -> Result<PluginConf> {
        let meta = match conf.get("_meta") {
            Some(Value::Object(meta)) => Meta::from_json(meta)?,
            _ => Meta::default(),
        };
        Ok(PluginConf { name: name.into(), uid: next_uid(), json: conf.to_string().into(), meta })
    }
}

impl Meta {
    fn from_json(meta: &Map<String, Value>) -> Result<Meta> {
        let filter = match meta.get("filter") {
            Some(vars) => Some(
                Expr::compile(vars).map_err(|e| invalid(format!("failed to validate the 'vars' expression: {e}")))?,
            ),
            None => None,
        };
        Ok(Meta {
            disable: flag(meta, "disable").unwrap_or(false),
            priority: number(meta, "priority"),
            filter,
            has_hooks: meta.contains_key("error_response") || meta.contains_key("pre_function"),
        })
    }
}
