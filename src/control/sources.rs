//! `GET /v1/plugin_sources`: which version of each uploaded plugin this node has, and what is wrong with it.

use serde_json::{Value, json};

use super::State;
use crate::{admin::http::Answer, store::Snapshot};

/// `[{"name", "modifiedIndex", "loaded", "error"}]`, by name. An error beside a version: a newer one was refused, or this one does not
/// load here, or its `init` has failed.
pub(super) fn list(state: &State, snapshot: &Snapshot) -> Answer {
    let (broken, failed) = (state.plugins.broken(), state.plugins.failed_inits());
    let loaded: Vec<String> = state.plugins.list().into_iter().map(|plugin| plugin.name).collect();
    let refused = |name: &str| snapshot.errors.get(format!("/plugin_sources/{name}").as_str());
    let mut names: Vec<&str> = snapshot.plugin_sources.keys().map(|id| &**id).collect();
    names.extend(snapshot.errors.keys().filter_map(|key| key.strip_prefix("/plugin_sources/")));
    names.sort_unstable();
    names.dedup();
    let status = |name: &str| {
        let error = refused(name).map(|e| e.message.clone());
        let error = error.or_else(|| broken.iter().find(|(own, _)| own == name).map(|(_, text)| text.clone()));
        let error = error.or_else(|| failed.get(name).map(|text| format!("init: {text}")));
        json!({
            "name": name,
            "modifiedIndex": snapshot.plugin_sources.get(name).map(|object| object.mod_revision),
            "loaded": loaded.iter().any(|own| own == name),
            "error": error,
        })
    };
    let list: Vec<Value> = names.into_iter().map(status).collect();
    Answer::json(200, &Value::Array(list))
}
