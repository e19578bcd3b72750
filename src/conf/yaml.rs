//! YAML as JSON: merge keys are followed, tags that mean nothing here (`!!omap`, `!mine`) are passed over, keys become text.

use serde_json::{Map, Value};
use serde_norway::Value as Yaml;

/// Reads a document; the error says where it ends to be YAML.
pub fn read(text: &str) -> Result<Value, String> {
    let mut document: Yaml = serde_norway::from_str(text).map_err(|e| e.to_string())?;
    document.apply_merge().map_err(|e| e.to_string())?;
    json_of(document)
}

/// Keys become text, as in JSON: `nodes: {8080: 1}`.
fn json_of(value: Yaml) -> Result<Value, String> {
    Ok(match value {
        Yaml::Null => Value::Null,
        Yaml::Bool(b) => Value::Bool(b),
        Yaml::String(s) => Value::String(s),
        Yaml::Number(n) => serde_json::to_value(n).map_err(|e| e.to_string())?,
        Yaml::Sequence(items) => Value::Array(items.into_iter().map(json_of).collect::<Result<_, _>>()?),
        Yaml::Tagged(tagged) => json_of(tagged.value)?,
        Yaml::Mapping(pairs) => {
            let mut map = Map::new();
            for (key, value) in pairs {
                let key = match json_of(key)? {
                    Value::String(s) => s,
                    Value::Array(_) | Value::Object(_) => return Err("a key must be text".to_owned()),
                    plain => plain.to_string(),
                };
                map.insert(key, json_of(value)?);
            }
            Value::Object(map)
        }
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn reads_what_yaml_has_and_json_lacks() {
        let text =
            "a: &a {x: 1, 8080: 2}\nb:\n  <<: *a\n  x: 3\nc: !mine [1]\nd: !!omap [{e: 1}]\n~: 1\ntrue: 2\nf: 0x1F\n";
        let expected = json!({
            "a": {"x": 1, "8080": 2}, "b": {"x": 3, "8080": 2}, "c": [1], "d": [{"e": 1}], "null": 1, "true": 2, "f": 31,
        });
        assert_eq!(read(text), Ok(expected));
        assert_eq!(read("[a]: 1"), Err("a key must be text".to_owned()));
        assert!(read("a: [").is_err_and(|e| e.contains("line")));
    }
}
