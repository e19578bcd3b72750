//! What the Admin API asks of plugins and uploaded Lua, and the answers under `/plugins` and `/schema`.

use std::{collections::BTreeMap, future::Future, pin::Pin, rc::Rc, sync::Arc};

use serde_json::{Map, Value};

use super::http::{Answer, Call};
use crate::{
    model::PluginSource,
    plugin::{PluginTrial, Trial, Tried},
    schema,
    store::{PluginSchema, Refusal, Snapshot},
};

/// A trial under way.
pub type Trying<T = Value> = Pin<Box<dyn Future<Output = Result<T, String>>>>;

/// The control thread's VM, seen from the Admin API.
pub trait PluginHost {
    /// Checks a conf (plain, `_meta` included); may fill in defaults.
    fn check(&self, plugin: &str, conf: &mut Value, schema: PluginSchema) -> Result<(), Refusal>;

    /// Whether a function's source compiles; the text names file and line.
    fn compile_function(&self, id: &str, source: &str) -> Result<(), String>;

    /// Whether a chunk of Lua in a field (`filter_func`) compiles.
    fn compile_chunk(&self, source: &str) -> Result<(), String>;

    /// What cjson says is wrong with a text; `None` when it says nothing or there is no VM to ask.
    fn explain_json(&self, text: &[u8]) -> Option<String>;

    /// The same with other uploaded plugins, in a VM of its own; `None`: there is none to be had.
    fn with_sources(&self, sources: Vec<(String, PluginSource)>) -> Option<Rc<dyn PluginHost>>;

    /// Loads a plugin's source in a scratch VM and checks its contract.
    fn inspect_plugin(&self, name: &str, source: &PluginSource) -> Result<(), String>;

    /// Runs a mock request through a plugin, beside everything that serves: what came of it, or why there is nothing to run.
    fn try_plugin(&self, snapshot: Arc<Snapshot>, trial: PluginTrial) -> Trying;

    /// Runs a mock request through a function, in the same way.
    fn try_function(&self, snapshot: Arc<Snapshot>, trial: Trial) -> Trying<Tried>;

    /// The plugins that do not load here, and why.
    fn broken(&self) -> Vec<(String, String)>;

    /// The plugins that are loaded and whose `init` has failed in a worker, and why.
    fn failed_inits(&self) -> BTreeMap<String, String>;

    /// The plugins that the configuration file lists now.
    fn listed(&self) -> Option<Listed>;

    /// The loaded plugins of HTTP, highest priority first.
    fn list(&self) -> Vec<PluginInfo>;
}

/// The configuration's list of plugins.
#[derive(Clone, Debug, PartialEq)]
pub struct Listed {
    /// In the form of the store's list: `[{"name":"cors"},{"name":"mqtt-proxy","stream":true}]`.
    pub names: Value,
    /// Nobody has written it: it is APISIX's own.
    pub is_default: bool,
}

/// A loaded plugin, as `GET /plugins?all=true` shows it.
#[derive(Clone, Debug)]
pub struct PluginInfo {
    pub name: String,
    pub priority: i64,
    /// `schema`, `consumer_schema`, `metadata_schema`, `version`, `type`, `scope`.
    pub about: Map<String, Value>,
}

/// Knows the packed schemas and no Lua: for a gateway whose VM is not up, and for tests.
pub struct PackedPlugins;

impl PluginHost for PackedPlugins {
    fn check(&self, plugin: &str, conf: &mut Value, kind: PluginSchema) -> Result<(), Refusal> {
        let schemas = schema::plugin(plugin).ok_or(Refusal::Unknown)?;
        let schema = match kind {
            PluginSchema::Plugin => &schemas.schema,
            PluginSchema::Consumer => schemas.consumer_schema.as_ref().unwrap_or(&schemas.schema),
            PluginSchema::Metadata => match &schemas.metadata_schema {
                Some(schema) => schema,
                None => return Ok(()),
            },
        };
        schema.check(conf).map_err(Refusal::Invalid)
    }

    fn compile_function(&self, _: &str, _: &str) -> Result<(), String> {
        Ok(())
    }

    fn compile_chunk(&self, _: &str) -> Result<(), String> {
        Ok(())
    }

    fn with_sources(&self, _: Vec<(String, PluginSource)>) -> Option<Rc<dyn PluginHost>> {
        None
    }

    fn inspect_plugin(&self, _: &str, _: &PluginSource) -> Result<(), String> {
        Ok(())
    }

    fn try_plugin(&self, _: Arc<Snapshot>, _: PluginTrial) -> Trying {
        Box::pin(async { Err("there is no VM to try it in".to_owned()) })
    }

    fn try_function(&self, _: Arc<Snapshot>, _: Trial) -> Trying<Tried> {
        Box::pin(async { Err("there is no VM to try it in".to_owned()) })
    }

    fn broken(&self) -> Vec<(String, String)> {
        Vec::new()
    }

    fn failed_inits(&self) -> BTreeMap<String, String> {
        BTreeMap::new()
    }

    fn explain_json(&self, _: &[u8]) -> Option<String> {
        None
    }

    fn listed(&self) -> Option<Listed> {
        None
    }

    fn list(&self) -> Vec<PluginInfo> {
        let info = |name: &str| {
            let Ok(Value::Object(about)) = serde_json::from_str(schema::plugin_json(name)?) else { return None };
            let priority = about.get("priority").and_then(Value::as_i64).unwrap_or(0);
            Some(PluginInfo { name: name.to_owned(), priority, about })
        };
        let mut list: Vec<PluginInfo> = schema::plugin_names().filter_map(info).collect();
        list.sort_by(|a, b| b.priority.cmp(&a.priority).then_with(|| a.name.cmp(&b.name)));
        list
    }
}

/// `GET /plugins…`.
pub(super) fn get(host: &dyn PluginHost, call: &Call, name: Option<&str>) -> Answer {
    let subsystem = call.arg("subsystem").unwrap_or("http");
    if !matches!(subsystem, "http" | "stream") {
        return Answer::refuse(400, format!("unsupported subsystem: {subsystem}"));
    }
    match name {
        Some("list") => {
            let names = host.list().into_iter().map(|plugin| Value::String(plugin.name));
            Answer::json(200, &Value::Array(names.collect()))
        }
        Some(name) => match schema_of(host, name, subsystem, call.arg("schema_type")) {
            Some(schema) => Answer::json(200, &schema),
            None => Answer::refuse(404, format!("plugin not found in subsystem {subsystem}")),
        },
        None if call.arg("all") == Some("true") => all(host, subsystem),
        None => Answer::refuse(400, "not found"),
    }
}

fn all(host: &dyn PluginHost, subsystem: &str) -> Answer {
    if subsystem == "stream" {
        let packed: Result<Value, _> = serde_json::from_str(schema::all_json());
        let stream = packed.ok().and_then(|mut all| all.get_mut("stream_plugins").map(Value::take));
        return Answer::json(200, &stream.unwrap_or_default());
    }
    let plugins: Map<String, Value> =
        host.list().into_iter().map(|plugin| (plugin.name, Value::Object(plugin.about))).collect();
    Answer::json(200, &Value::Object(plugins))
}

fn schema_of(host: &dyn PluginHost, name: &str, subsystem: &str, kind: Option<&str>) -> Option<Value> {
    if subsystem == "stream" {
        schema::stream_plugin(name)?;
        let all: Value = serde_json::from_str(schema::all_json()).ok()?;
        return all.get("stream_plugins")?.get(name)?.get("schema").cloned();
    }
    let mut about = host.list().into_iter().find(|plugin| plugin.name == name)?.about;
    let key = match kind {
        Some("consumer") => "consumer_schema",
        Some("metadata") => "metadata_schema",
        _ => "schema",
    };
    about.remove(key).or_else(|| about.remove("schema"))
}

/// `GET /schema/{resource}`, `GET /schema/plugins/{name}`.
pub(super) fn get_schema(host: &dyn PluginHost, call: &Call, place: &[&str]) -> Answer {
    let schema = match place {
        ["plugins", name] => {
            let subsystem = call.arg("subsystem").unwrap_or("http");
            schema_of(host, name, subsystem, call.arg("schema_type"))
        }
        [resource] => {
            return match schema::resource_json(resource) {
                Some(text) => Answer::json_text(200, text),
                None => Answer::refuse(400, "not found schema"),
            };
        }
        _ => None,
    };
    match schema {
        Some(schema) => Answer::json(200, &schema),
        None => Answer::refuse(400, "not found schema"),
    }
}
