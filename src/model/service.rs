//! Services, plugin_configs and global_rules: plugins and upstreams that routes share.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::{
    Id, Plugins, SchemaKind, Upstream,
    parse::{ParseContext, boxed, flag, id, strings},
};
use crate::error::Result;

#[derive(Debug, Default)]
pub struct Service {
    pub name: Option<Box<str>>,
    pub hosts: Vec<Box<str>>,
    pub plugins: Plugins,
    pub upstream: Option<Arc<Upstream>>,
    pub upstream_id: Option<Id>,
    /// Lua source.
    pub script: Option<Box<str>>,
    pub enable_websocket: Option<bool>,
}

#[derive(Debug, Default)]
pub struct PluginConfig {
    pub plugins: Plugins,
}

#[derive(Debug, Default)]
pub struct GlobalRule {
    pub plugins: Plugins,
}

impl Service {
    pub(super) fn from_json(map: &mut Map<String, Value>, context: &ParseContext<'_>) -> Result<Service> {
        Ok(Service {
            name: boxed(map, "name"),
            hosts: strings(map, "hosts").map(|host| host.to_ascii_lowercase().into()).collect(),
            plugins: Plugins::from_json(map, SchemaKind::Route, context)?,
            upstream: Upstream::inline(map, context)?,
            upstream_id: id(map, "upstream_id"),
            script: boxed(map, "script"),
            enable_websocket: flag(map, "enable_websocket"),
        })
    }
}
