//! From a resource's JSON text to its typed value: schema first, then what a schema cannot say.
//!
//! Errors carry APISIX's texts as the Admin API answers them.

use std::{sync::Arc, time::Duration};

use serde_json::{Map, Value};

use super::{
    Consumer, ConsumerGroup, Credential, Function, GlobalRule, Id, Keyring, Kind, PluginConfig, PluginMetadata,
    PluginSource, Route, Service, Ssl, StreamRoute, Upstream,
    crypt::{self, EncryptFields, SchemaKind},
    route::Timeouts,
    ssl,
};
use crate::{
    error::{self, Error, Result},
    schema::{self, Schema},
};

/// A float below 2^53 is exactly the number that it looks like.
const MAX_EXACT: f64 = 9_007_199_254_740_992.0;

/// What parsing needs beside the text.
#[derive(Clone, Copy)]
pub struct ParseContext<'a> {
    /// Decrypts `encrypt_fields` and private keys.
    pub keyring: &'a Keyring,
    /// Fields of plugins that the packed schemas do not know.
    pub fields: Option<&'a dyn EncryptFields>,
}

impl<'a> ParseContext<'a> {
    pub fn new(keyring: &'a Keyring) -> Self {
        ParseContext { keyring, fields: None }
    }
}

/// A resource's typed value.
#[derive(Debug)]
pub enum Parsed {
    Route(Route),
    Service(Service),
    Upstream(Arc<Upstream>),
    Consumer(Consumer),
    Credential(Credential),
    ConsumerGroup(ConsumerGroup),
    PluginConfig(PluginConfig),
    GlobalRule(GlobalRule),
    PluginMetadata(PluginMetadata),
    Ssl(Ssl),
    Function(Function),
    PluginSource(PluginSource),
    StreamRoute(StreamRoute),
    /// Protos, secrets, cost decorations: checked, kept as text.
    Other,
}

/// So much of what is no object is told: it may be anything.
const MAX_SHOWN: usize = 256;

/// Parses what a store holds under `/<kind>/<id>`.
pub fn parse(kind: Kind, id: &str, json: &str, context: &ParseContext<'_>) -> Result<Parsed> {
    let mut value: Value = serde_json::from_str(json).map_err(|e| invalid(format!("invalid JSON: {e}")))?;
    if !value.is_object() {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let shown: String = text.chars().take(MAX_SHOWN).collect();
        let key = format!("/apisix/{}/{id}", kind.plural());
        return Err(invalid(format!("invalid item data of [{key}], val: {shown}, it should be an object")));
    }
    // The typed values know the defaults themselves: filling them in would cost a third of a load's time.
    let map = checked(kind, id, &mut value, Schema::check_only)?;
    Ok(match kind {
        Kind::Route => Parsed::Route(Route::from_json(map, context)?),
        Kind::Service => Parsed::Service(Service::from_json(map, context)?),
        Kind::Upstream => {
            let mut upstream = Upstream::from_json(map, context)?;
            upstream.id = Some(id.into());
            Parsed::Upstream(Arc::new(upstream))
        }
        Kind::Consumer => Parsed::Consumer(Consumer::from_json(map, context)?),
        Kind::Credential => Parsed::Credential(Credential::from_json(id, map, context)?),
        Kind::ConsumerGroup => Parsed::ConsumerGroup(ConsumerGroup {
            plugins: super::Plugins::from_json(map, SchemaKind::Route, context)?,
        }),
        Kind::PluginConfig => {
            Parsed::PluginConfig(PluginConfig { plugins: super::Plugins::from_json(map, SchemaKind::Route, context)? })
        }
        Kind::GlobalRule => {
            Parsed::GlobalRule(GlobalRule { plugins: super::Plugins::from_json(map, SchemaKind::Route, context)? })
        }
        Kind::PluginMetadata => Parsed::PluginMetadata(PluginMetadata::from_json(id, map, context)),
        Kind::Ssl => Parsed::Ssl(Ssl::from_json(map, context)?),
        Kind::Function => Parsed::Function(Function::from_json(map, context)?),
        Kind::PluginSource => Parsed::PluginSource(PluginSource::from_json(map)?),
        Kind::StreamRoute => Parsed::StreamRoute(StreamRoute::from_json(map, context)?),
        Kind::Proto | Kind::Secret | Kind::GraphqlCostDecoration => Parsed::Other,
    })
}

/// Checks a resource against its schema, writing defaults into it, and what holds between its fields.
pub fn check<'v>(kind: Kind, id: &str, value: &'v mut Value) -> Result<&'v mut Map<String, Value>> {
    checked(kind, id, value, Schema::check)
}

fn checked<'v>(
    kind: Kind,
    id: &str,
    value: &'v mut Value,
    by: fn(&Schema, &mut Value) -> Result<(), String>,
) -> Result<&'v mut Map<String, Value>> {
    if kind == Kind::Route {
        exclusive(value, "host", "hosts")?;
        exclusive(value, "remote_addr", "remote_addrs")?;
    }
    // Stored by other writers, an object need not repeat the id that stands in its key.
    let needs_id = matches!(kind, Kind::ConsumerGroup | Kind::PluginConfig | Kind::GlobalRule);
    if let (true, Value::Object(map)) = (needs_id, &mut *value)
        && !map.contains_key("id")
    {
        map.insert("id".into(), id.into());
    }
    let schema = match (kind, id.split_once('/')) {
        // Each manager has its own.
        (Kind::Secret, Some((manager, _))) => schema::resource(&format!("secret/{manager}")),
        _ => schema::resource(kind.singular()),
    };
    let mut checks = |value: &mut Value| schema.map_or(Ok(()), |schema| by(schema, value));
    let outcome = if kind == Kind::Ssl { ssl::without_references(value, &mut checks) } else { checks(value) };
    outcome.map_err(|e| invalid(format!("invalid configuration: {e}")))?;
    match value {
        Value::Object(map) => Ok(map),
        _ => Err(invalid("invalid configuration: wrong type: expected object")),
    }
}

fn exclusive(value: &Value, one: &str, other: &str) -> Result<()> {
    match (value.get(one), value.get(other)) {
        (Some(_), Some(_)) => Err(invalid(format!("only one of {one} or {other} is allowed"))),
        _ => Ok(()),
    }
}

pub(super) fn invalid(text: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::config(error::Kind::Invalid).context(text)
}

pub(super) fn text<'m>(map: &'m Map<String, Value>, key: &str) -> Option<&'m str> {
    map.get(key).and_then(Value::as_str)
}

pub(super) fn required<'m>(map: &'m Map<String, Value>, key: &str) -> Result<&'m str> {
    text(map, key).ok_or_else(|| invalid(format!("invalid configuration: property \"{key}\" is required")))
}

pub(super) fn boxed(map: &Map<String, Value>, key: &str) -> Option<Box<str>> {
    text(map, key).map(Into::into)
}

/// An id, which may be written as a number.
pub(super) fn id(map: &Map<String, Value>, key: &str) -> Option<Id> {
    match map.get(key)? {
        Value::String(s) => Some(s.as_str().into()),
        Value::Number(n) => Some(integer(n).map_or_else(|| n.to_string(), |n| n.to_string()).into()),
        _ => None,
    }
}

/// Writes `1.0` and `1e3` as `1` and `1000`, as cjson does with all that Lua's numbers hold exactly: clients read them into integers.
pub fn with_whole_numbers(value: &mut Value) {
    match value {
        Value::Number(n) if n.is_f64() => {
            if let Some(whole) = n.as_f64().filter(|f| f.fract() == 0.0 && f.abs() < MAX_EXACT) {
                *value = (whole as i64).into();
            }
        }
        Value::Array(items) => items.iter_mut().for_each(with_whole_numbers),
        Value::Object(map) => map.values_mut().for_each(with_whole_numbers),
        _ => {}
    }
}

/// Whole numbers may be written `1.0` or `1e3`.
pub(super) fn integer(n: &serde_json::Number) -> Option<i64> {
    n.as_i64().or_else(|| n.as_f64().filter(|f| f.fract() == 0.0).map(|f| f as i64))
}

pub(super) fn number(map: &Map<String, Value>, key: &str) -> Option<i64> {
    map.get(key).and_then(Value::as_number).and_then(integer)
}

pub(super) fn flag(map: &Map<String, Value>, key: &str) -> Option<bool> {
    map.get(key).and_then(Value::as_bool)
}

/// The strings of a list.
pub(super) fn strings<'m>(map: &'m Map<String, Value>, key: &str) -> impl Iterator<Item = &'m str> {
    map.get(key).and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str)
}

/// `status`: 1, and unset, is enabled.
pub(super) fn enabled(map: &Map<String, Value>) -> bool {
    number(map, "status") != Some(0)
}

/// Longest time that a duration may be: what `Instant` can add without a thought.
const MAX_SECONDS: f64 = 1e9;

pub(super) fn seconds(value: &Value) -> Option<Duration> {
    let seconds = value.as_f64()?;
    Some(Duration::from_secs_f64(seconds.clamp(0.0, MAX_SECONDS)))
}

pub(super) fn timeouts(map: &Map<String, Value>) -> Option<Timeouts> {
    let timeout = map.get("timeout")?;
    let of = |key| timeout.get(key).and_then(seconds);
    Some(Timeouts { connect: of("connect")?, send: of("send")?, read: of("read")? })
}

/// Plain forms of the private keys in `object`.
pub(super) fn decrypt_keys(object: &mut Map<String, Value>, context: &ParseContext<'_>) -> Result<()> {
    let mut failed = None;
    crypt::with_private_keys(object, &mut |stored| match decrypt_key(stored, context) {
        Ok(plain) => Some(plain.into()),
        Err(e) => {
            failed = Some(e);
            None
        }
    });
    failed.map_or(Ok(()), |e| Err(invalid(e)))
}

/// The plain form of a private key, or why there is none. A reference stays: it is resolved when the certificate is used.
pub(super) fn decrypt_key(stored: &str, context: &ParseContext<'_>) -> Result<Box<str>, &'static str> {
    if crypt::is_reference(stored) {
        return Ok(stored.into());
    }
    context.keyring.decrypt_pkey(stored).map(Into::into).ok_or_else(|| {
        tracing::error!(
            "decrypt ssl key failed: it is encrypted with a key that data_encryption.keyring does not hold"
        );
        "failed to decrypt previous encrypted key"
    })
}

#[cfg(test)]
mod tests;
