//! Uploaded plugins: the text of an ordinary plugin file, and modules beside it.

use std::sync::Arc;

use serde_json::{Map, Value};

use crate::error::{Error, Kind, Result};

/// Modules beside one plugin: a library with its parts, not a package manager.
const MAX_MODULES: usize = 64;

/// `/plugin_sources/{name}`: `{"source": "…lua…", "modules": {"my/helper": "…lua…"}}`.
#[derive(Clone, Debug, Default)]
pub struct PluginSource {
    pub source: Arc<str>,
    /// Name as in `require("apisix.plugins.<plugin>.my.helper")` after the plugin's (`my.helper`), and text.
    pub modules: Vec<(Box<str>, Arc<str>)>,
}

impl PluginSource {
    /// From an object that its schema has passed. `source` may be missing elsewhere.
    pub fn from_json(map: &Map<String, Value>) -> Result<PluginSource> {
        let invalid = |text: String| Error::config(Kind::Invalid).context(format!("invalid configuration: {text}"));
        let source = map.get("source").and_then(Value::as_str);
        let source = source.ok_or_else(|| invalid("property \"source\" is required".to_owned()))?.into();
        let listed = map.get("modules").and_then(Value::as_object);
        let mut modules = Vec::new();
        for (path, text) in listed.into_iter().flatten() {
            let wrong = |why: &str| invalid(format!("property \"modules\" validation failed: {path:?} {why}"));
            let text = text.as_str().ok_or_else(|| wrong("is no text"))?;
            let name = module_name(path).ok_or_else(|| wrong("is no name of a module: use one like my/helper"))?;
            if modules.len() == MAX_MODULES {
                return Err(wrong(&format!("is one too many: {MAX_MODULES} are allowed")));
            }
            modules.push((name, text.into()));
        }
        modules.sort();
        if let Some(twice) = modules.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(invalid(format!(
                "property \"modules\" validation failed: {:?} stands there twice",
                twice[0].0
            )));
        }
        Ok(PluginSource { source, modules })
    }

    /// Everything that a VM loads for the plugin `name`: what follows `apisix.plugins.` in `require`, and the text.
    pub fn chunks(&self, name: &str) -> impl Iterator<Item = (Arc<str>, Arc<str>)> + use<> {
        let module = |(module, text): &(Box<str>, Arc<str>)| (format!("{name}.{module}").into(), text.clone());
        let mut chunks = vec![(Arc::from(name), self.source.clone())];
        chunks.extend(self.modules.iter().map(module));
        chunks.into_iter()
    }
}

/// `my/helper`, `my.helper`, `my/helper.lua` -> `my.helper`.
fn module_name(path: &str) -> Option<Box<str>> {
    let name = path.strip_suffix(".lua").unwrap_or(path).replace('/', ".");
    let is_part =
        |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'));
    (name.len() <= 128 && name.split('.').all(is_part)).then(|| name.into())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(value: Value) -> Result<PluginSource, String> {
        PluginSource::from_json(value.as_object().unwrap()).map_err(|e| e.to_string())
    }

    #[test]
    fn modules_are_required_under_the_plugins_name() {
        let source = read(json!({"source": "s", "modules": {"my/helper": "h", "b.lua": "b"}})).unwrap();
        let chunks: Vec<_> = source.chunks("mine").map(|(n, t)| (n.to_string(), t.to_string())).collect();
        let expected = [("mine", "s"), ("mine.b", "b"), ("mine.my.helper", "h")];
        assert_eq!(chunks, expected.map(|(n, t)| (n.to_owned(), t.to_owned())));
    }

    #[test]
    fn what_is_no_module_is_refused() {
        for bad in ["", "/", "a//b", "../a", "a b", &"a".repeat(129)] {
            let refused = read(json!({"source": "s", "modules": {bad: "x"}})).unwrap_err();
            assert!(refused.contains("name of a module"), "{bad}: {refused}");
        }
        assert!(read(json!({"source": "s", "modules": {"a": 1}})).unwrap_err().contains("is no text"));
        let twice = read(json!({"source": "s", "modules": {"a/b": "1", "a.b": "2"}})).unwrap_err();
        assert!(twice.contains("twice"), "{twice}");
        let many = |n: usize| (0..n).map(|i| (format!("m{i}"), json!("x"))).collect::<Map<_, _>>();
        assert_eq!(read(json!({"source": "s", "modules": many(MAX_MODULES)})).unwrap().modules.len(), MAX_MODULES);
        let refused = read(json!({"source": "s", "modules": many(MAX_MODULES + 1)})).unwrap_err();
        assert!(refused.contains("one too many"), "{refused}");
    }
}
