//! The schemas of APISIX's resources and plugins, packed into the binary and compiled when first asked for.
//!
//! The packed text is scanned once into slices; no parsed value of the whole is ever held.

use std::{collections::HashMap, sync::OnceLock};

use serde::Deserialize;
use serde_json::{Value, json, value::RawValue};

use super::Schema;

const FACTS: &str = include_str!("apisix.json");
/// Resources that APISIX does not have, and those its control API does not show.
const OWN: &str = include_str!("own.json");

/// What is known of a plugin without its code.
#[derive(Debug)]
pub struct PluginSchemas {
    pub schema: Schema,
    pub consumer_schema: Option<Schema>,
    pub metadata_schema: Option<Schema>,
    pub priority: i64,
    /// `type` is `auth`: may stand in a consumer's credential.
    pub is_auth: bool,
    pub scope: Option<Box<str>>,
    /// Dotted paths of fields that are stored encrypted, in the conf of a route, a consumer, the metadata.
    pub encrypt_fields: Vec<Box<str>>,
    pub consumer_encrypt_fields: Vec<Box<str>>,
    pub metadata_encrypt_fields: Vec<Box<str>>,
}

struct Entry {
    json: &'static RawValue,
    compiled: OnceLock<Option<PluginSchemas>>,
}

struct Facts {
    resources: HashMap<&'static str, &'static RawValue>,
    plugins: HashMap<&'static str, Entry>,
    stream_plugins: HashMap<&'static str, Entry>,
}

/// The whole reply of `GET /v1/schema`.
pub fn all_json() -> &'static str {
    FACTS.trim_end()
}

/// A resource's schema by its singular name (`route`), compiled.
pub fn resource(name: &str) -> Option<&'static Schema> {
    static COMPILED: OnceLock<HashMap<&'static str, Schema>> = OnceLock::new();
    COMPILED.get_or_init(compile_resources).get(name)
}

/// A resource's schema as JSON text.
pub fn resource_json(name: &str) -> Option<&'static str> {
    facts().resources.get(name).or_else(|| own().get(name)).map(|raw| raw.get())
}

fn own() -> &'static HashMap<&'static str, &'static RawValue> {
    static PARSED: OnceLock<HashMap<&'static str, &'static RawValue>> = OnceLock::new();
    // As above.
    PARSED.get_or_init(|| serde_json::from_str(OWN).unwrap_or_default())
}

pub fn plugin(name: &str) -> Option<&'static PluginSchemas> {
    compiled(facts().plugins.get(name)?)
}

pub fn stream_plugin(name: &str) -> Option<&'static PluginSchemas> {
    compiled(facts().stream_plugins.get(name)?)
}

/// `{"schema":…,"consumer_schema":…,"priority":…}` of a plugin as JSON text.
pub fn plugin_json(name: &str) -> Option<&'static str> {
    facts().plugins.get(name).map(|entry| entry.json.get())
}

pub fn plugin_names() -> impl Iterator<Item = &'static str> {
    facts().plugins.keys().copied()
}

fn facts() -> &'static Facts {
    static PARSED: OnceLock<Facts> = OnceLock::new();
    PARSED.get_or_init(|| {
        #[derive(Deserialize, Default)]
        struct Packed {
            #[serde(borrow)]
            main: HashMap<&'static str, &'static RawValue>,
            #[serde(borrow)]
            plugins: HashMap<&'static str, &'static RawValue>,
            #[serde(borrow)]
            stream_plugins: HashMap<&'static str, &'static RawValue>,
        }
        // Part of the binary: a test parses it, so the default is never met.
        let packed: Packed = serde_json::from_str(FACTS).unwrap_or_default();
        let entries = |map: HashMap<&'static str, &'static RawValue>| {
            map.into_iter().map(|(name, json)| (name, Entry { json, compiled: OnceLock::new() })).collect()
        };
        Facts {
            resources: packed.main,
            plugins: entries(packed.plugins),
            stream_plugins: entries(packed.stream_plugins),
        }
    })
}

fn compiled(entry: &'static Entry) -> Option<&'static PluginSchemas> {
    let compile = || {
        let value: Value = serde_json::from_str(entry.json.get()).ok()?;
        let schema = |key: &str| value.get(key).and_then(|schema| Schema::packed(schema).ok());
        let text = |key: &str| value.get(key).and_then(Value::as_str);
        Some(PluginSchemas {
            schema: schema("schema")?,
            consumer_schema: schema("consumer_schema"),
            metadata_schema: schema("metadata_schema"),
            priority: value.get("priority").and_then(Value::as_i64).unwrap_or(0),
            is_auth: text("type") == Some("auth"),
            scope: text("scope").map(Into::into),
            encrypt_fields: encrypt_fields(value.get("schema")),
            consumer_encrypt_fields: encrypt_fields(value.get("consumer_schema")),
            metadata_encrypt_fields: encrypt_fields(value.get("metadata_schema")),
        })
    };
    entry.compiled.get_or_init(compile).as_ref()
}

/// A schema's own list of fields that are stored encrypted.
pub fn encrypt_fields(schema: Option<&Value>) -> Vec<Box<str>> {
    let list = schema.and_then(|s| s.get("encrypt_fields")).and_then(Value::as_array);
    list.into_iter().flatten().filter_map(Value::as_str).map(Into::into).collect()
}

fn compile_resources() -> HashMap<&'static str, Schema> {
    let mut compiled = HashMap::new();
    for (name, raw) in &facts().resources {
        let Ok(mut value) = serde_json::from_str::<Value>(raw.get()) else { continue };
        extend(name, &mut value);
        if let Ok(schema) = Schema::packed(&value) {
            compiled.insert(*name, schema);
        }
    }
    let own: Value = serde_json::from_str(OWN).unwrap_or_default();
    let names =
        ["credential", "function", "function_test", "plugin_source", "secret/aws", "secret/gcp", "secret/vault"];
    for name in names {
        let reference = json!({ "$ref": format!("#/{}", name.replace('/', "~1")) });
        if let Some(schema) = own_schema(&own, &reference) {
            compiled.insert(name, schema);
        }
    }
    compiled
}

/// Compiles `reference` with the whole of `own` in reach of its `$ref`s.
fn own_schema(own: &Value, reference: &Value) -> Option<Schema> {
    let mut root = own.clone();
    root.as_object_mut()?.extend(reference.as_object()?.clone());
    Schema::packed(&root).ok()
}

/// What moongate adds to APISIX's resources: a route may be answered by a function.
fn extend(name: &str, schema: &mut Value) {
    if name != "route" {
        return;
    }
    let id = schema.pointer("/properties/service_id").cloned();
    if let (Some(id), Some(properties)) = (id, schema.get_mut("properties").and_then(Value::as_object_mut)) {
        properties.insert("function_id".into(), id);
    }
    if let Some(any) = schema.get_mut("anyOf").and_then(Value::as_array_mut) {
        any.push(json!({"required": ["function_id", "uri"]}));
        any.push(json!({"required": ["function_id", "uris"]}));
    }
}
