//! The form of answers: version 3's, or the one before it (`deployment.admin.admin_api_version`).
//!
//! Version 2 says `action`, `node` and `count` where version 3 has their content at the top (the upgrade guide to APISIX 3.0).

use serde_json::{Value, json};

use super::{State, http::Answer, list::Shown, settings::ApiVersion};
use crate::store::Entry;

/// What version 2 calls a write.
#[derive(Clone, Copy, Debug)]
pub(super) enum Action {
    Set,
    Create,
    CompareAndSwap,
}

impl Action {
    fn name(self) -> &'static str {
        match self {
            Action::Set => "set",
            Action::Create => "create",
            Action::CompareAndSwap => "compareAndSwap",
        }
    }
}

fn node(shown: &Shown) -> Value {
    json!({
        "key": shown.key, "value": shown.value, "createdIndex": shown.created, "modifiedIndex": shown.modified,
    })
}

fn is_old(state: &State) -> bool {
    state.settings.version == ApiVersion::V2
}

pub(super) fn one(state: &State, shown: &Shown) -> Answer {
    let node = node(shown);
    let body = if is_old(state) { json!({ "action": "get", "count": 1, "node": node }) } else { node };
    Answer::json(200, &body)
}

/// `place` is relative to the prefix: `/routes`. Version 3: `{"list": […], "total": n}`, `total` counts all pages.
pub(super) fn list(state: &State, place: &str, page: &[Shown], total: usize) -> Answer {
    let nodes: Vec<Value> = page.iter().map(node).collect();
    let body = if is_old(state) {
        let key = format!("{}{place}", state.settings.prefix);
        json!({ "action": "get", "count": total, "node": { "key": key, "dir": true, "nodes": nodes } })
    } else {
        json!({ "list": nodes, "total": total })
    };
    Answer::json(200, &body)
}

/// The value as it is stored.
pub(super) fn written(state: &State, status: u16, action: Action, entry: &Entry) -> Answer {
    let key = json!(format!("{}{}", state.settings.prefix, entry.key));
    let node = format!("{{\"key\":{key},\"value\":{}}}", entry.value);
    let text = if is_old(state) { format!("{{\"action\":\"{}\",\"node\":{node}}}", action.name()) } else { node };
    Answer::json_text(status, text)
}

pub(super) fn deleted(state: &State, key: &str) -> Answer {
    let mut body = json!({ "deleted": "1", "key": format!("{}{key}", state.settings.prefix) });
    if is_old(state) {
        body["action"] = "delete".into();
        body["node"] = json!({});
    }
    Answer::json(200, &body)
}
