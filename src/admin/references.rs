//! Who refers to whom: what a write may name, and what keeps an object from being deleted.

use serde_json::Value;

use super::{State, http::Answer};
use crate::{
    model::{Kind, Plugins, consumer::AuthKey},
    store::Snapshot,
};

/// The field of each auth plugin's consumer conf that no two consumers may share.
const UNIQUE_FIELDS: [(&str, &str); 7] = [
    ("key-auth", "key"),
    ("basic-auth", "username"),
    ("jwt-auth", "key"),
    ("jwe-decrypt", "key"),
    ("hmac-auth", "key_id"),
    ("ldap-auth", "user_dn"),
    ("ldap-auth-advanced", "user_dn"),
];

/// Fields that name another object: field, kind, and how APISIX speaks of it.
const ID_FIELDS: [(&str, Kind, &str); 5] = [
    ("upstream_id", Kind::Upstream, "upstream"),
    ("service_id", Kind::Service, "service"),
    ("plugin_config_id", Kind::PluginConfig, "plugin config"),
    ("group_id", Kind::ConsumerGroup, "consumer group"),
    ("function_id", Kind::Function, "function"),
];

/// Refuses a write that names an object which is not there, or takes what belongs to another.
pub(super) async fn check(state: &State, kind: Kind, id: &str, value: &Value) -> Result<(), Answer> {
    match kind {
        Kind::Credential => require_owner(state, kind, id).await?,
        Kind::GraphqlCostDecoration => {
            require_owner(state, kind, id).await?;
            unique_field_path(state, id, value).await?;
        }
        _ => {}
    }
    for (field, other, name) in ID_FIELDS {
        if let Some(wanted) = id_text(value.get(field)) {
            exists(state, other, name, &wanted).await?;
        }
    }
    for upstream in [Some(value).filter(|_| kind == Kind::Upstream), value.get("upstream")].into_iter().flatten() {
        if let Some(wanted) = id_text(upstream.pointer("/tls/client_cert_id")) {
            let ssl = exists(state, Kind::Ssl, "ssl", &wanted).await?;
            if ssl.get("type").and_then(Value::as_str) != Some("client") {
                return Err(Answer::refuse(
                    400,
                    format!("failed to fetch ssl info by ssl id [{wanted}], wrong ssl type"),
                ));
            }
        }
    }
    match kind {
        Kind::GlobalRule => unique_global_plugins(&state.published.load(), id, value),
        Kind::Consumer | Kind::Credential => unique_auth_keys(&state.published.load(), kind, id, value),
        _ => Ok(()),
    }
}

async fn exists(state: &State, kind: Kind, name: &str, id: &str) -> Result<Value, Answer> {
    let found = state.store.get(&kind.key(id)).await.map_err(|e| super::store_error(&e))?;
    match found {
        Some(entry) => Ok(serde_json::from_str(&entry.value).unwrap_or_default()),
        None => {
            let text = format!("failed to fetch {name} info by {name} id [{id}], response code: 404");
            Err(Answer::refuse(400, text))
        }
    }
}

/// The consumer of a credential, the service of a cost decoration. `id` may go on behind the owner's.
pub(super) async fn require_owner(state: &State, kind: Kind, id: &str) -> Result<(), Answer> {
    let Some(owner) = kind.owner() else { return Ok(()) };
    let name = id.split('/').next().unwrap_or_default();
    let found = state.store.get(&owner.key(name)).await.map_err(|e| super::store_error(&e))?;
    found.map(|_| ()).ok_or_else(|| Answer::refuse(404, format!("{} not found", owner.singular())))
}

/// No two cost decorations of a service may weigh the same place.
async fn unique_field_path(state: &State, id: &str, value: &Value) -> Result<(), Answer> {
    let (prefix, _) = id.rsplit_once('/').unwrap_or_default();
    let key = Kind::GraphqlCostDecoration.key(&format!("{prefix}/"));
    let (entries, _) = state.store.list(&key).await.map_err(|e| super::store_error(&e))?;
    for entry in entries {
        let other = entry.key.strip_prefix(&*key).unwrap_or_default();
        let same = || {
            let stored: Value = serde_json::from_str(&entry.value).unwrap_or_default();
            stored.get("field_path") == value.get("field_path")
        };
        if !id.ends_with(&format!("/{other}")) && same() {
            let path = value.get("field_path").and_then(Value::as_str).unwrap_or_default();
            let text = format!("field_path {path} is already decorated on this service by [{other}]");
            return Err(Answer::refuse(400, text));
        }
    }
    Ok(())
}

pub(super) fn id_text(value: Option<&Value>) -> Option<String> {
    match value? {
        Value::String(s) => Some(s.clone()),
        Value::Number(n) => Some(n.to_string()),
        _ => None,
    }
}

fn unique_global_plugins(snapshot: &Snapshot, id: &str, value: &Value) -> Result<(), Answer> {
    for name in value.get("plugins").and_then(Value::as_object).into_iter().flat_map(|plugins| plugins.keys()) {
        let taken = snapshot.global_rules.iter().find(|r| &*r.id != id && r.value.plugins.get(name).is_some());
        if let Some(rule) = taken {
            let text = format!("plugin '{name}' already exists in global rule with id '{}'", rule.id);
            return Err(Answer::refuse(400, text));
        }
    }
    Ok(())
}

fn unique_auth_keys(snapshot: &Snapshot, kind: Kind, id: &str, value: &Value) -> Result<(), Answer> {
    for (plugin, field) in UNIQUE_FIELDS {
        let conf = value.get("plugins").and_then(|plugins| plugins.get(plugin));
        let Some(text) = conf.and_then(|conf| conf.get(field)).and_then(Value::as_str) else { continue };
        let key = AuthKey { plugin: plugin.into(), field: field.into(), value: text.into() };
        let Some((consumer, credential)) = snapshot.auth_index.get(&key) else { continue };
        let refuse = |whose: String| {
            Err(Answer::refuse(400, format!("duplicate {field} of plugin {plugin} found with {whose}")))
        };
        match credential {
            Some(full) if kind == Kind::Credential && &**full == id => {}
            Some(full) => {
                let short = full.rsplit('/').next().unwrap_or(full);
                return refuse(format!("credential: {short} of consumer: {consumer}"));
            }
            None if kind == Kind::Consumer && &**consumer == id => {}
            None => return refuse(format!("consumer: {consumer}")),
        }
    }
    Ok(())
}

/// Why an object may not be deleted.
pub(super) fn in_use(snapshot: &Snapshot, kind: Kind, id: &str) -> Option<String> {
    let user = match kind {
        Kind::Upstream => upstream_user(snapshot, id),
        Kind::Service => route_with(snapshot, |r| r.service_id.as_deref() == Some(id))
            .or_else(|| stream_route_with(snapshot, |r| r.service_id.as_deref() == Some(id))),
        Kind::PluginConfig => route_with(snapshot, |r| r.plugin_config_id.as_deref() == Some(id)),
        Kind::Function => route_with(snapshot, |r| r.function_id.as_deref() == Some(id)),
        Kind::ConsumerGroup => {
            let user = snapshot.consumers.values().find(|c| c.value.group_id.as_deref() == Some(id));
            user.map(|consumer| format!("consumer [{}]", consumer.id))
        }
        Kind::Proto => proto_user(snapshot, id),
        Kind::Ssl => ssl_user(snapshot, id),
        _ => None,
    }?;
    let what = match kind {
        Kind::Service => "service directly",
        Kind::PluginConfig => "plugin config",
        Kind::ConsumerGroup => "consumer group",
        other => other.singular(),
    };
    Some(format!("can not delete this {what}, {user} is still using it now"))
}

fn route_with(snapshot: &Snapshot, test: impl Fn(&crate::model::Route) -> bool) -> Option<String> {
    // The smallest id, so that the answer does not depend on the order of a hash map.
    let ids = snapshot.routes.values().filter(|route| test(&route.value)).map(|route| &route.id);
    ids.min().map(|id| format!("route [{id}]"))
}

fn stream_route_with(snapshot: &Snapshot, test: impl Fn(&crate::model::StreamRoute) -> bool) -> Option<String> {
    let ids = snapshot.stream_routes.values().filter(|route| test(&route.value)).map(|route| &route.id);
    ids.min().map(|id| format!("stream_route [{id}]"))
}

fn upstream_user(snapshot: &Snapshot, id: &str) -> Option<String> {
    route_with(snapshot, |r| r.upstream_id.as_deref() == Some(id))
        .or_else(|| {
            let user = snapshot.services.values().find(|s| s.value.upstream_id.as_deref() == Some(id))?;
            Some(format!("service [{}]", user.id))
        })
        .or_else(|| stream_route_with(snapshot, |r| r.upstream_id.as_deref() == Some(id)))
        .or_else(|| plugin_user(snapshot, |plugins| splits_to(plugins, id)))
}

/// Whether a `traffic-split` among these sends to upstream `id`.
fn splits_to(plugins: &Plugins, id: &str) -> bool {
    let Some(conf) = plugins.get("traffic-split") else { return false };
    let conf: Value = serde_json::from_str(&conf.json).unwrap_or_default();
    let list = |value: &Value, key: &str| value.get(key).and_then(Value::as_array).cloned().unwrap_or_default();
    list(&conf, "rules")
        .iter()
        .flat_map(|rule| list(rule, "weighted_upstreams"))
        .any(|upstream| id_text(upstream.get("upstream_id")).as_deref() == Some(id))
}

fn proto_user(snapshot: &Snapshot, id: &str) -> Option<String> {
    let uses = |plugins: &Plugins| {
        plugins.get("grpc-transcode").is_some_and(|conf| {
            let conf: Value = serde_json::from_str(&conf.json).unwrap_or_default();
            id_text(conf.get("proto_id")).as_deref() == Some(id)
        })
    };
    route_with(snapshot, |r| uses(&r.plugins)).or_else(|| plugin_user(snapshot, uses))
}

fn ssl_user(snapshot: &Snapshot, id: &str) -> Option<String> {
    let uses = |u: &crate::model::Upstream| u.tls.as_ref().is_some_and(|tls| tls.client_cert_id.as_deref() == Some(id));
    let upstream = snapshot.upstreams.values().find(|u| uses(&u.value)).map(|u| format!("upstream [{}]", u.id));
    upstream
        .or_else(|| route_with(snapshot, |r| r.upstream.as_deref().is_some_and(uses)))
        .or_else(|| stream_route_with(snapshot, |r| r.upstream.as_deref().is_some_and(uses)))
}

/// Who has such a plugin conf: `plugin in route [1]`.
fn plugin_user(snapshot: &Snapshot, test: impl Fn(&Plugins) -> bool) -> Option<String> {
    let user = |what: &str, id: &str| Some(format!("plugin in {what} [{id}]"));
    if let Some(o) = snapshot.routes.values().find(|o| test(&o.value.plugins)) {
        return user("route", &o.id);
    }
    if let Some(o) = snapshot.services.values().find(|o| test(&o.value.plugins)) {
        return user("service", &o.id);
    }
    if let Some(o) = snapshot.plugin_configs.values().find(|o| test(&o.value.plugins)) {
        return user("plugin_config", &o.id);
    }
    if let Some(o) = snapshot.consumers.values().find(|o| test(&o.value.plugins)) {
        return user("consumer", &o.id);
    }
    if let Some(o) = snapshot.consumer_groups.values().find(|o| test(&o.value.plugins)) {
        return user("consumer_group", &o.id);
    }
    let rule = snapshot.global_rules.iter().find(|o| test(&o.value.plugins))?;
    user("global_rules", &rule.id)
}
