//! `native.plugin.upstream*`: what of a request's upstream and its tries the plugins' `ctx` shows, when it is asked.

use std::{ffi::c_int, sync::Arc};

use serde_json::{Value, json};

use crate::{
    error::Result,
    exchange::Exchange,
    lua::{Api, Phases, Raise, Stack, convert::push_json, fast},
    model::{Id, Upstream, upstream::Node},
};

type Answer = Result<c_int, Raise>;

pub(super) fn register(api: &mut Api) -> Result<()> {
    let any = Phases::ANY;
    api.func(
        "native.plugin.choose_upstream",
        Phases::REQUEST,
        "choose_upstream(id) -> boolean: the request goes to `/upstreams/{id}`; false: there is none.",
        |s| {
            let id = s.arg_str(1)?;
            let Some(x) = fast::exchange() else { return Ok(s.push_bool(false)) };
            let found = x.snapshot.upstreams.get(&*id).map(|upstream| upstream.value.clone());
            let is_there = found.is_some();
            if is_there {
                x.upstream.chosen = found;
            }
            Ok(s.push_bool(is_there))
        },
    )?;
    api.func(
        "native.plugin.upstream",
        any,
        "upstream() -> uid, kind, id, apart | nil: what the request is sent to. Of kind `upstream` it is `/upstreams/{id}`; it stands \
         in the matched `route` or `service`, else; a `plugin` has made it, else. `apart`: its nodes are others than those written \
         there (`upstream_nodes`).",
        upstream,
    )?;
    api.func(
        "native.plugin.upstream_nodes",
        any,
        "upstream_nodes() -> array of { host, port, weight, priority } | nil: the nodes that the request may be sent to.",
        |s| match fast::exchange().and_then(|x| x.upstream.conf.as_ref()) {
            Some(conf) => push_json(s, &conf.nodes.iter().map(shown).collect()).map(|()| 1),
            None => Ok(s.push_nil()),
        },
    )?;
    api.func(
        "native.plugin.picked",
        any,
        "picked() -> ip, port, name | nil, tries: the node of the last try, its name where it is written as one, and how many tries \
         there were.",
        picked,
    )
}

fn upstream(s: &Stack) -> Answer {
    let Some((x, conf)) = fast::exchange().and_then(|x| Some((&*x, x.upstream.conf.as_ref()?))) else {
        return Ok(s.push_nil());
    };
    let (kind, id) = origin(x, conf);
    s.push_number(conf.uid as f64);
    s.push_bytes(kind.as_bytes());
    match id {
        Some(id) => s.push_bytes(id.as_bytes()),
        None => s.push_nil(),
    };
    s.push_bool(conf.discovery.is_some() || conf.nodes.iter().any(|node| !node.explicit_port));
    Ok(4)
}

fn origin<'a>(x: &Exchange, conf: &'a Arc<Upstream>) -> (&'static str, Option<&'a Id>) {
    if conf.id.is_some() {
        return ("upstream", conf.id.as_ref());
    }
    let kind = match (&x.upstream.chosen, &x.matched) {
        (Some(_), _) | (None, None) => "plugin",
        (None, Some(matched)) if matched.route().value.upstream.is_some() => "route",
        (None, Some(_)) => "service",
    };
    (kind, None)
}

fn shown(node: &Node) -> Value {
    let host = match node.host.contains(':') {
        true => format!("[{}]", node.host),
        false => node.host.to_string(),
    };
    json!({"host": host, "port": node.port, "weight": node.weight, "priority": node.priority})
}

fn picked(s: &Stack) -> Answer {
    let Some((x, last)) = fast::exchange().and_then(|x| Some((&*x, x.upstream.tries.last()?))) else {
        return Ok(s.push_nil());
    };
    let node = x.upstream.conf.as_ref().and_then(|conf| conf.nodes.get(last.node)).filter(|node| node.ip.is_none());
    s.push_bytes(last.addr.ip().to_string().as_bytes());
    s.push_number(last.addr.port().into());
    match node {
        Some(node) => s.push_bytes(node.host.as_bytes()),
        None => s.push_nil(),
    };
    s.push_number(x.upstream.tries.len() as f64);
    Ok(4)
}
