//! `${{NAME}}` and `${{NAME:=default}}` in the file's texts (APISIX, deployment with environment variables).

use std::collections::HashMap;

use serde_json::Value;

/// Replaces every reference in the file. A text that is one reference becomes a number or boolean when its value reads as one.
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
}

fn fill_under(value: &mut Value, path: &str, lookup: &impl Fn(&str) -> Option<String>, mistakes: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
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
            Ok(filled) => *value = typed(filled),
            Err(what) => mistakes.push(format!("{path}: {what}")),
        },
        _ => {}
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

fn reference(inner: &str, lookup: &impl Fn(&str) -> Option<String>) -> Result<String, String> {
    let (name, default) = match inner.split_once(":=") {
        Some((name, default)) => (name.trim(), Some(default)),
        None => (inner.trim(), None),
    };
    match (lookup(name), default) {
        (Some(value), _) => Ok(value),
        (None, Some(default)) => Ok(default.trim().to_owned()),
        (None, None) => {
            Err(format!("the environment variable {name} is not set; set it, or write ${{{{{name}:=default}}}}"))
        }
    }
}

fn typed(text: String) -> Value {
    match text.as_str() {
        "true" => Value::Bool(true),
        "false" => Value::Bool(false),
        _ => match text.parse::<i64>() {
            Ok(n) => Value::from(n),
            Err(_) => Value::String(text),
        },
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
        assert_eq!(typed("1.2.3.4".into()), Value::from("1.2.3.4"));
    }
}
