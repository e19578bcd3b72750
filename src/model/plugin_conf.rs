//! `plugins` of a route, service, consumer, …: which plugins run with which conf.

use std::sync::Arc;

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
    pub filter: Option<crate::expr::Expr>,
    /// True when `error_response` or `pre_function` is set: the Lua side reads them off the conf.
    pub has_hooks: bool,
}

/// The plugins of one owner, in the order of its JSON.
#[derive(Clone, Debug, Default)]
pub struct Plugins(pub Arc<[Arc<PluginConf>]>);

/// `/plugin_metadata/{name}`: settings of a plugin for the whole gateway. The object's JSON is all there is to it.
#[derive(Debug)]
pub struct PluginMetadata;
