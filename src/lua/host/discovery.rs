//! `native.discovery`: upstreams whose nodes a registry knows, for `moongate.discovery`.

use std::sync::Arc;

use serde_json::Value;

use crate::{
    error::{Error, Kind, Result},
    exchange::Exchange,
    lua::{
        api::{Api, Phases, request, script},
        convert::push_json,
        fast,
    },
    model::Upstream,
    observe::log::{self, Level},
};

/// An upstream with the nodes that were found for it.
struct Found(Arc<Upstream>);

impl mlua::UserData for Found {}

pub(super) fn register(api: &mut Api) -> Result<()> {
    api.func(
        "native.discovery.described",
        Phases::ANY,
        "described() -> kind, service, args | nil: what the upstream of the request says of its registry.",
        |s| {
            let upstream = request()?.upstream.conf.clone();
            let Some(discovery) = upstream.as_ref().and_then(|u| u.discovery.as_ref()) else { return Ok(s.push_nil()) };
            s.push_bytes(discovery.kind.as_bytes());
            s.push_bytes(discovery.service.as_bytes());
            match discovery.args.as_deref().and_then(|args| serde_json::from_str::<Value>(args).ok()) {
                Some(args) => push_json(s, &args)?,
                None => drop(s.push_nil()),
            }
            Ok(3)
        },
    )?;
    let found = api.lua().create_function(|_, nodes: mlua::LuaString| {
        let found = fast::exchange().ok_or_else(no_request).and_then(|x| found(x, &nodes.as_bytes()));
        Ok(match found {
            Ok(upstream) => (Some(Found(upstream)), None),
            Err(e) => (None, Some(e.to_string())),
        })
    });
    api.value(
        "native.discovery.found",
        "found(json) -> handle | nil, err: the request's upstream with these nodes, an array of { host, port, weight, priority }.",
        found.map_err(script)?,
    )?;
    let choose = api.lua().create_function(|_, handle: mlua::UserDataRef<Found>| {
        if let Some(x) = fast::exchange() {
            x.upstream.conf = Some(handle.0.clone());
        }
        Ok(())
    });
    api.value(
        "native.discovery.choose",
        "choose(handle): the request goes to one of the nodes that were found.",
        choose.map_err(script)?,
    )
}

fn no_request() -> Error {
    Error::script("no request runs")
}

fn found(x: &Exchange, nodes: &[u8]) -> Result<Arc<Upstream>> {
    let upstream = x.upstream.conf.as_ref().ok_or_else(no_request)?;
    let list = serde_json::from_slice(nodes).map_err(|e| Error::config(Kind::Invalid).cause(e))?;
    let found = upstream.discovered(list)?;
    if log::enabled(Level::Info) {
        x.log(Level::Info, format!("upstream nodes: {}", shown(&found)).as_bytes());
    }
    Ok(Arc::new(found))
}

/// `{"host:port":weight,…}`, as nodes are written in an upstream.
fn shown(upstream: &Upstream) -> Value {
    let place = |host: &str, port: u16| match host.contains(':') {
        true => format!("[{host}]:{port}"),
        false => format!("{host}:{port}"),
    };
    upstream.nodes.iter().map(|n| (place(&n.host, n.port), Value::from(n.weight))).collect()
}
