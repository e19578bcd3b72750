//! SIGHUP: the configuration file is read again. What can change in a running gateway does; of the rest the log says
//! that it waits for a restart.

use serde_json::Value;

use crate::{
    conf::{self, Config, Warning, admin_key},
    error::Result,
    observe::log::{self, Level},
};

/// Changed at once.
const LIVE: &str = "nginx_config.error_log_level";
/// Keys named in one line of the log.
const MAX_NAMED: usize = 20;

/// Takes over what can change. A file with mistakes changes nothing: each of them is logged.
pub fn reload(config: &mut Config) {
    let (mut next, warnings) = match conf::load(&config.prefix, config.file.as_deref()) {
        Ok(loaded) => loaded,
        Err(mistakes) => {
            for mistake in &mistakes.0 {
                tracing::error!("{mistake}");
            }
            tracing::error!("the configuration was not reloaded, the old one goes on");
            return;
        }
    };
    if let Err(e) = fill_in_key(&mut next) {
        tracing::error!("the configuration was not reloaded: {e}");
        return;
    }
    for Warning(text) in &warnings {
        tracing::warn!("{text}");
    }
    if let Some(level) = Level::from_name(&next.error_log_level) {
        log::set_level(level);
    }
    tell(&config.json, &next.json);
    config.error_log_level.clone_from(&next.error_log_level);
    set_level(std::sync::Arc::make_mut(&mut config.json), &next.error_log_level);
}

fn fill_in_key(next: &mut Config) -> Result<()> {
    admin_key::ensure(next).map(drop)
}

/// So that the next reload compares with what is in use.
fn set_level(json: &mut Value, level: &str) {
    if let Some(known) = json.pointer_mut("/nginx_config/error_log_level") {
        *known = level.into();
    }
}

fn tell(old: &Value, new: &Value) {
    let mut changed = Vec::new();
    differences(old, new, "", &mut changed);
    let waiting: Vec<&str> = changed.iter().map(String::as_str).filter(|path| *path != LIVE).collect();
    if waiting.is_empty() {
        return tracing::warn!("the configuration was reloaded");
    }
    tracing::warn!("the configuration was reloaded; these changes need a restart: {}", named(&waiting));
}

/// The first of them, and how many more there are.
fn named(waiting: &[&str]) -> String {
    match waiting.len().saturating_sub(MAX_NAMED) {
        0 => waiting.join(", "),
        more => format!("{} and {more} more", waiting[..MAX_NAMED].join(", ")),
    }
}

/// The paths whose values differ.
fn differences(old: &Value, new: &Value, path: &str, out: &mut Vec<String>) {
    let (Value::Object(a), Value::Object(b)) = (old, new) else {
        if old != new {
            out.push(path.to_owned());
        }
        return;
    };
    let below = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
    for (key, value) in a {
        differences(value, b.get(key).unwrap_or(&Value::Null), &below(key), out);
    }
    for key in b.keys().filter(|key| !a.contains_key(*key)) {
        out.push(below(key));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_differs_is_named_by_its_path() {
        let old = json!({"a": {"b": 1, "c": [1]}, "d": true});
        let new = json!({"a": {"b": 2, "c": [1], "e": {}}});
        let mut found = Vec::new();
        differences(&old, &new, "", &mut found);
        assert_eq!(found, ["a.b", "a.e", "d"]);
        found.clear();
        differences(&old, &old, "", &mut found);
        assert!(found.is_empty());
    }

    #[test]
    fn only_so_many_are_named() {
        let mut waiting = ["a"; MAX_NAMED].to_vec();
        let all = named(&waiting);
        assert_eq!(all.matches('a').count(), MAX_NAMED);
        waiting.extend(["b", "c"]);
        assert_eq!(named(&waiting), all + " and 2 more");
    }
}
