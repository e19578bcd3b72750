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
pub struct Found(pub Arc<Upstream>);

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

#[cfg(test)]
mod tests {
    use super::super::tests::check;

    /// `choose(uid)` over a registry that answers `nodes`; `reads` counts what the gateway had to read.
    const HEAD: &str = "
        local native = require('moongate.native').discovery
        time, nodes, reads = 1000, nil, 0
        ngx.now = function() return time end
        native.described = function() return 'mine', 's', nil end
        native.found = function() reads = reads + 1 return { reads } end
        native.choose = function(handle) chosen = handle end
        require('apisix.discovery.init').discovery.mine = { nodes = function() return nodes, 'none' end }
        local discovery = require('moongate.discovery')
        local function kept() return table.nkeys(discovery.handles()) end
        local function node(port, more)
            local node = { host = 'a', port = port, weight = 1 }
            for key, value in pairs(more or {}) do node[key] = value end
            return node
        end\n";

    #[test]
    fn only_what_has_changed_is_read_anew() {
        for (steps, reads) in [
            ("nodes[1].weight = 2", 1),
            ("nodes[3] = node(3)", 2),
            ("nodes = { node(1), node(2) }", 1),
            ("nodes = { node(2), node(1) }", 1),
            ("nodes = { node(1), node(2, { priority = 0 }) }", 1),
            ("nodes = { node(1), node(2, { priority = 1 }) }", 2),
            ("nodes = { node(1), node(2, { metadata = { a = 1 } }) }", 2),
            ("nodes = { node(1), node(3) }", 2),
            ("nodes = { node(1) }", 2),
            ("nodes = nil; discovery.choose(1); nodes = { node(1), node(2) }", 1),
        ] {
            let chunk = format!(
                "{HEAD} nodes = {{ node(1), node(2) }}
                 assert(discovery.choose(1) == nil)
                 {steps}
                 assert(discovery.choose(1) == nil and chosen)
                 assert(discovery.choose(1) == nil)
                 return tostring(reads)"
            );
            check(&chunk, &reads.to_string());
        }
        let in_turn = "for i = 1, 40 do nodes = { node(i % 16) } discovery.choose(1) end return tostring(reads)";
        check(&format!("{HEAD} {in_turn}"), "16");
        check(&format!("{HEAD} {}", in_turn.replace("% 16", "% 17")), "40");
        let equal = "nodes = { node(1, { metadata = { a = 1 } }) } discovery.choose(1)
            nodes = { node(1, { metadata = { a = 1 } }) } discovery.choose(1) return tostring(reads)";
        check(&format!("{HEAD} {equal}"), "1");
    }

    #[test]
    fn what_is_of_no_use_is_read_once_too() {
        let head = format!(
            "{HEAD} native.found = function(text)
                 reads = reads + 1
                 if text:find('\"weight\":\"', 1, true) then return nil, 'bad ' .. reads end
                 return {{ reads }}
             end
             local function choose(list) nodes = list return discovery.choose(1) or 'ok' end
             local function bad() return {{ node(1, {{ weight = '1' }}) }} end\n"
        );
        for (steps, expected) in [
            ("local list = bad() return choose(list) .. choose(list) .. reads", "bad 1bad 11"),
            ("return choose(bad()) .. choose(bad()) .. reads", "bad 1bad 11"),
            ("return choose(bad()) .. choose({ node(1) }) .. choose(bad()) .. reads", "bad 1okbad 12"),
            ("return choose({ node(1) }) .. choose(bad()) .. kept() .. reads", "okbad 212"),
        ] {
            check(&format!("{head} {steps}"), expected);
        }
    }

    #[test]
    fn metadata_count_among_the_bytes_of_nodes() {
        let chunk = "local function of(bytes)
                nodes = { node(1, { metadata = { a = ('m'):rep(bytes) } }) }
                return discovery.choose(1) or 'ok'
            end
            return of(4 * 1024 * 1024 - 64) .. reads .. ' ' .. of(4 * 1024 * 1024):gsub('%d+', 'N', 1) .. reads";
        let expected = "ok1 invalid nodes format: at least N bytes of nodes, more than 41943041";
        check(&format!("{HEAD} {chunk}"), expected);
    }

    #[test]
    fn upstreams_past_the_bound_are_read_each_time_until_others_are_idle() {
        let chunk = "nodes = { node(1) }
            for uid = 1, 4097 do discovery.choose(uid) end
            local full = kept()
            discovery.choose(4097)
            local again = reads
            time = time + 59
            discovery.choose(1)
            time = time + 1
            discovery.choose(4097)
            return table.concat({ full, again, kept() }, ' ')";
        check(&format!("{HEAD} {chunk}"), "4096 4098 2");
    }

    #[test]
    fn nodes_of_all_upstreams_are_bounded_too() {
        let chunk = "nodes = {}
            for port = 1, 10000 do nodes[port] = node(port) end
            for uid = 1, 21 do discovery.choose(uid) end
            local full = kept()
            for uid = 1, 20 do
                nodes = { node(uid) }
                discovery.choose(uid)
            end
            for uid = 21, 41 do discovery.choose(uid) end
            local grown = kept()
            nodes = {}
            for port = 1, 10000 do nodes[port] = node(port) end
            for uid = 1, 41 do discovery.choose(uid) end
            full = full .. ' ' .. grown .. ' ' .. kept()
            nodes[10001] = node(10001)
            return full .. ' ' .. discovery.choose(1)";
        let expected = "20 41 19 invalid nodes format: 10001 nodes, more than 10000";
        check(&format!("{HEAD} {chunk}"), expected);
    }
}
