//! `APISIX_PROFILE`: which of several sets of configuration files is in use (profile.md). With `dev` they are conf/config-dev.yaml,
//! conf/apisix-dev.yaml and conf/debug-dev.yaml; without, or empty, those without a suffix.

use std::{env, path::Path};

use serde_json::Value;

use super::keys;

const VARIABLE: &str = "APISIX_PROFILE";

/// The profile's name, when there is one.
pub fn current() -> Option<String> {
    env::var_os(VARIABLE).map(|name| name.to_string_lossy().into_owned()).filter(|name| !name.is_empty())
}

/// Relative to the prefix: `conf/config-dev.yaml` for `config` and `yaml`.
pub fn file(name: &str, extension: &str) -> String {
    file_of(current().as_deref(), name, extension)
}

fn file_of(profile: Option<&str>, name: &str, extension: &str) -> String {
    match profile {
        Some(profile) => format!("conf/{name}-{profile}.{extension}"),
        None => format!("conf/{name}.{extension}"),
    }
}

/// The name stands in the names of files: no other directory can be meant.
pub(super) fn check() -> Result<(), String> {
    match current() {
        Some(name) if name.contains(['/', '\0']) => {
            Err(format!("{VARIABLE}: {name:?} is no part of a file's name: use one like dev"))
        }
        _ => Ok(()),
    }
}

/// What to say of a file that the profile names and nobody has made.
pub(super) fn missing(path: &Path) -> Option<String> {
    let profile = current()?;
    Some(format!(
        "{}: there is no such file, and {VARIABLE} is {profile}: make it, or unset the variable",
        path.display()
    ))
}

/// The same of the file with the objects, where the configuration says that they are in one.
pub(super) fn missing_store(prefix: &Path, json: &Value) -> Option<String> {
    let role = keys::at(json, "deployment.role").and_then(Value::as_str).unwrap_or("traditional");
    let provider = keys::at(json, &format!("deployment.role_{role}.config_provider")).and_then(Value::as_str);
    let extension = match provider? {
        "yaml" if role != "traditional" => "yaml",
        "json" => "json",
        _ => return None,
    };
    let path = prefix.join(file("apisix", extension));
    if path.exists() { None } else { missing(&path) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_have_the_profile_in_their_names() {
        assert_eq!(file_of(Some("dev"), "config", "yaml"), "conf/config-dev.yaml");
        assert_eq!(file_of(None, "apisix", "json"), "conf/apisix.json");
    }
}
