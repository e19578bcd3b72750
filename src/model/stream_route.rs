//! Stream routes: which TCP connections and UDP datagrams, and where they go.

use std::sync::Arc;

use ipnet::IpNet;
use serde_json::{Map, Value};

use super::{
    Id, Upstream,
    parse::{ParseContext, boxed, id, invalid, number, text},
};
use crate::{error::Result, expr, schema};

#[derive(Debug, Default)]
pub struct StreamRoute {
    pub name: Option<Box<str>>,
    /// Unset, each of the four holds for any connection.
    pub server_addr: Option<IpNet>,
    pub server_port: Option<u16>,
    pub remote_addr: Option<IpNet>,
    /// Lower case. `*.foo.com` stands for whatever ends with `.foo.com`.
    pub sni: Option<Box<str>>,
    pub upstream: Option<Arc<Upstream>>,
    pub upstream_id: Option<Id>,
    pub service_id: Option<Id>,
    /// It has the prometheus plugin, the only one of streams. `Some(true)`: counted by name.
    pub prometheus: Option<bool>,
}

impl StreamRoute {
    /// What the route is in metrics; `None`: it is not counted.
    pub fn counted_as(&self, id: &str) -> Option<Box<str>> {
        let name = self.name.as_deref().filter(|_| self.prometheus == Some(true));
        self.prometheus.map(|_| name.unwrap_or(id).into())
    }

    pub(super) fn from_json(map: &mut Map<String, Value>, context: &ParseContext<'_>) -> Result<StreamRoute> {
        // A route without what its plugins do would let in whom they keep out.
        let plugins = map.get("plugins").and_then(Value::as_object).cloned();
        if let Some(name) = plugins.as_ref().and_then(|plugins| plugins.keys().find(|name| *name != PROMETHEUS)) {
            return Err(invalid(format!("unknown plugin [{name}]")));
        }
        if let Some(protocol) = map.get("protocol").and_then(Value::as_object) {
            return Err(invalid(format!("unknown protocol [{}]", text(protocol, "name").unwrap_or_default())));
        }
        Ok(StreamRoute {
            name: boxed(map, "name"),
            server_addr: network(map, "server_addr")?,
            server_port: number(map, "server_port").and_then(|n| u16::try_from(n).ok()),
            remote_addr: network(map, "remote_addr")?,
            sni: text(map, "sni").map(|sni| sni.to_ascii_lowercase().into()),
            upstream: Upstream::inline(map, context)?,
            upstream_id: id(map, "upstream_id"),
            service_id: id(map, "service_id"),
            prometheus: plugins
                .as_ref()
                .and_then(|plugins| plugins.get(PROMETHEUS))
                .map(counting)
                .transpose()?
                .flatten(),
        })
    }
}

const PROMETHEUS: &str = "prometheus";

/// Whether a session is counted by the route's name; `None`: the plugin is disabled.
fn counting(conf: &Value) -> Result<Option<bool>> {
    let mut conf = conf.clone();
    if let Some(schemas) = schema::stream_plugin(PROMETHEUS) {
        let refused = |e| invalid(format!("failed to check the configuration of stream plugin [{PROMETHEUS}]: {e}"));
        schemas.schema.check(&mut conf).map_err(refused)?;
    }
    let disabled = conf["_meta"]["disable"] == true;
    Ok((!disabled).then_some(conf["prefer_name"] == true))
}

fn network(map: &Map<String, Value>, key: &str) -> Result<Option<IpNet>> {
    let of = |text| expr::network(text).ok_or_else(|| invalid(format!("invalid {key}: {text}")));
    text(map, key).map(of).transpose()
}
