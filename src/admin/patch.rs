//! PATCH: merging an object into another, or putting a value at a path inside one.

use serde_json::{Map, Value};

/// How deep a path may lead.
const MAX_PATH: usize = 32;

/// Takes over what `patch` says; `null` deletes; lists are replaced whole.
pub(super) fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(target) = target else { return };
    for (name, value) in patch {
        match value {
            Value::Null => {
                target.remove(name);
            }
            value => merge(target.entry(name.as_str()).or_insert(Value::Null), value),
        }
    }
}

/// Puts `value` at `path` (`upstream/nodes`), making objects on the way. `null` deletes.
pub(super) fn put_at(target: &mut Value, path: &str, value: Value) -> Result<(), String> {
    let names: Vec<&str> = path.split('/').filter(|name| !name.is_empty()).collect();
    let Some((last, way)) = names.split_last() else {
        merge(target, &value);
        return Ok(());
    };
    if way.len() >= MAX_PATH {
        return Err("invalid sub-path: too deep".into());
    }
    let mut place = target;
    for name in way {
        place = step(place, name).ok_or_else(|| format!("invalid sub-path: {name}"))?;
    }
    if value.is_null()
        && let Value::Object(map) = place
    {
        map.remove(*last);
        return Ok(());
    }
    *step(place, last).ok_or_else(|| format!("invalid sub-path: {last}"))? = value;
    Ok(())
}

/// Items of lists are counted from 1, as in Lua.
fn step<'v>(place: &'v mut Value, name: &str) -> Option<&'v mut Value> {
    match place {
        Value::Object(map) => {
            let next = map.entry(name).or_insert(Value::Null);
            Some(next)
        }
        Value::Array(items) => items.get_mut(name.parse::<usize>().ok()?.checked_sub(1)?),
        Value::Null => {
            *place = Value::Object(Map::new());
            step(place, name)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn null_deletes_and_lists_are_replaced() {
        let mut route =
            json!({"methods": ["PUT"], "desc": "x", "upstream": {"nodes": {"a:1": 1}, "type": "roundrobin"}});
        merge(&mut route, &json!({"methods": ["GET"], "desc": null, "upstream": {"nodes": {"a:1": null, "b:1": 1}}}));
        assert_eq!(route, json!({"methods": ["GET"], "upstream": {"nodes": {"b:1": 1}, "type": "roundrobin"}}));
    }

    #[test]
    fn a_path_leads_to_a_value() {
        let mut route = json!({"uri": "/a"});
        put_at(&mut route, "methods", json!(["POST"])).expect("a new field");
        put_at(&mut route, "upstream/nodes", json!({"a:1": 1})).expect("objects are made");
        put_at(&mut route, "methods/1", json!("GET")).expect("an item");
        put_at(&mut route, "uri", Value::Null).expect("deletes");
        assert_eq!(route, json!({"methods": ["GET"], "upstream": {"nodes": {"a:1": 1}}}));
        assert!(put_at(&mut route, "methods/x/y", json!(1)).is_err());
    }

    #[test]
    fn a_path_leads_only_so_deep() {
        let path = |depth: usize| vec!["a"; depth].join("/");
        let mut value = json!({});
        put_at(&mut value, &path(MAX_PATH), json!(1)).expect("is no deeper than that");
        assert_eq!(value.pointer(&format!("/{}", path(MAX_PATH))), Some(&json!(1)));
        let before = value.clone();
        let refused = put_at(&mut value, &path(MAX_PATH + 1), json!(1)).expect_err("is deeper");
        assert_eq!((refused.as_str(), value), ("invalid sub-path: too deep", before));
    }
}
