//! `${{NAME}}` and `${{NAME:=default}}` in the file's texts and keys (APISIX, deployment with environment variables).

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::texts;

/// Members of etcd (APISIX, `conf/config.yaml.example` and its tests of the command line).
const ETCD_HOST: &str = "APISIX_DEPLOYMENT_ETCD_HOST";
/// Workers, for containers that see all CPUs of their machine.
const WORKERS: &str = "APISIX_WORKER_PROCESSES";

/// Whole numbers that Lua's numbers hold exactly: what is not below it stays a text.
const MAX_EXACT: f64 = 9_007_199_254_740_992.0;

/// Replaces every reference in the file. A text that has one becomes a number or boolean when the outcome reads as one, but where
/// the key wants a text: such a key takes a whole number that was written as its text, too.
/// What `nginx_config.envs` sets (`NAME=value`) counts before the process's environment.
pub(super) fn fill(written: &mut Value, mistakes: &mut Vec<String>) {
    let set = super::keys::at(written, "nginx_config.envs").and_then(Value::as_array);
    let set: HashMap<String, String> = set
        .into_iter()
        .flatten()
        .filter_map(|env| env.as_str()?.split_once('='))
        .map(|(name, value)| (name.trim().to_owned(), value.to_owned()))
        .collect();
    let lookup = |name: &str| set.get(name).cloned().or_else(|| std::env::var(name).ok());
    fill_under(written, "", &lookup, mistakes);
    reserved(written, &lookup, mistakes);
}

/// Variables that count before what the file says: members of etcd as a JSON list, and the number of workers.
fn reserved(written: &mut Value, lookup: &impl Fn(&str) -> Option<String>, mistakes: &mut Vec<String>) {
    if let Some(text) = lookup(ETCD_HOST) {
        match serde_json::from_str::<Vec<String>>(&text) {
            Ok(hosts) => super::keys::merge(written, json!({"deployment": {"etcd": {"host": hosts}}})),
            // Not what it is: an address may have a password in it.
            Err(_) => mistakes.push(format!("{ETCD_HOST}: not a JSON list of texts: [\"http://127.0.0.1:2379\"]")),
        }
    }
    if let Some(text) = lookup(WORKERS) {
        match text.trim().parse::<u32>() {
            Ok(workers) => super::keys::merge(written, json!({"nginx_config": {"worker_processes": workers}})),
            Err(_) => mistakes.push(format!("{WORKERS}: {text:?} is not a whole number")),
        }
    }
}

fn fill_under(value: &mut Value, path: &str, lookup: &impl Fn(&str) -> Option<String>, mistakes: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            fill_keys(map, path, lookup, mistakes);
            for (key, inner) in map.iter_mut() {
                fill_under(inner, &super::keys::join(path, key), lookup, mistakes);
            }
        }
        Value::Array(items) => {
            for (i, inner) in items.iter_mut().enumerate() {
                fill_under(inner, &format!("{path}[{i}]"), lookup, mistakes);
            }
        }
        Value::String(text) if text.contains("${{") => match expand(text, lookup) {
            Ok(filled) if texts::has(path) => *value = Value::String(filled),
            Ok(filled) => *value = typed(filled),
            Err(what) => mistakes.push(format!("{path}: {what}")),
        },
        Value::Number(_) | Value::Bool(_) if texts::has(path) => match texts::of(value) {
            Ok(text) => *value = Value::String(text),
            Err(what) => mistakes.push(format!("{path}: {what}")),
        },
        _ => {}
    }
}

/// A key that two names come to is the last one's.
fn fill_keys(
    map: &mut Map<String, Value>,
    path: &str,
    lookup: &impl Fn(&str) -> Option<String>,
    mistakes: &mut Vec<String>,
) {
    let named: Vec<String> = map.keys().filter(|key| key.contains("${{")).cloned().collect();
    for key in named {
        let Some(value) = map.remove(&key) else { continue };
        match expand(&key, lookup) {
            Ok(filled) => drop(map.insert(filled, value)),
            Err(what) => mistakes.push(format!("{}: {what}", super::keys::join(path, &key))),
        }
    }
}

fn expand(text: &str, lookup: impl Fn(&str) -> Option<String>) -> Result<String, String> {
    let mut out = String::new();
    let mut rest = text;
    while let Some(start) = rest.find("${{") {
        out.push_str(&rest[..start]);
        let Some(end) = rest[start..].find("}}") else {
            return Err(format!("{text:?} opens ${{{{ and does not close it with }}}}"));
        };
        out.push_str(&reference(&rest[start + 3..start + end], &lookup)?);
        rest = &rest[start + end + 2..];
    }
    out.push_str(rest);
    Ok(out)
}

/// What `NAME` or `NAME:=default` stands for.
pub(super) fn reference(inner: &str, lookup: impl Fn(&str) -> Option<String>) -> Result<String, String> {
    let (name, default) = match inner.split_once(":=") {
        Some((name, default)) => (name.trim(), Some(default)),
        None => (inner.trim(), None),
    };
    match (lookup(name), default) {
        (Some(value), _) => Ok(value),
        (None, Some(default)) => Ok(default.trim().to_owned()),
        (None, None) => {
            Err(format!("can't find environment variable {name}: set it, or write ${{{{{name}:=default}}}}"))
        }
    }
}

/// A boolean, a number, or the text itself.
pub(super) fn typed(text: String) -> Value {
    match text.as_str() {
        "true" => return Value::Bool(true),
        "false" => return Value::Bool(false),
        _ => {}
    }
    let exact = text.parse::<f64>().is_ok_and(|n| n.is_finite() && n.abs() < MAX_EXACT);
    match serde_json::from_str(&text) {
        Ok(Value::Number(n)) if exact => Value::Number(n),
        _ => Value::String(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fills_references_and_reports_the_missing() {
        let lookup = |name: &str| (name == "HOST").then(|| "moon".to_owned());
        assert_eq!(expand("http://${{HOST}}:${{ PORT := 80 }}/", lookup).as_deref(), Ok("http://moon:80/"));
        assert_eq!(expand("${{A:=}}", lookup).as_deref(), Ok(""));
        assert!(expand("${{MISSING}}", lookup).unwrap_err().contains("MISSING"));
        assert!(expand("${{OPEN", lookup).unwrap_err().contains("close"));
        assert_eq!(typed("9080".into()), Value::from(9080));
        assert_eq!(typed("true".into()), Value::Bool(true));
        assert_eq!(typed("0.5".into()), Value::from(0.5));
        for text in ["1.2.3.4", "0012345", "356002209726529540", "9007199254740992", " 1", "0x10", "null", "[1]"] {
            assert_eq!(typed(text.into()), Value::from(text));
        }
    }
}
