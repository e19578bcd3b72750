//! Services, plugin_configs and global_rules: plugins and upstreams that routes share.

use std::sync::Arc;

use super::{Id, Plugins, Upstream};

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
