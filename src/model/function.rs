//! Uploaded Lua: functions, which answer requests, and plugin sources, which become plugins.

use std::sync::Arc;

/// `/functions/{id}`: `{"source": "…lua…", …}`.
#[derive(Debug)]
pub struct Function {
    pub source: Arc<str>,
}

/// `/plugin_sources/{name}`: the text of an ordinary plugin file.
#[derive(Debug)]
pub struct PluginSource {
    pub source: Arc<str>,
}
