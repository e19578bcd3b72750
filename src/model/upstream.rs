//! Upstreams: the nodes, how one is picked, and how it is spoken to.

pub mod checks;
mod discovered;
mod shared;

use std::{net::IpAddr, sync::Arc, time::Duration};

pub use discovered::Discovery;
use serde_json::{Map, Value};
use smallvec::SmallVec;

use super::{
    Id, next_uid,
    parse::{ParseContext, boxed, decrypt_keys, flag, id, integer, invalid, number, seconds, text, timeouts},
    route::Timeouts,
};
use crate::{
    error::Result,
    schema::{self, Schema},
};

/// In the order in which a request asks for it, and C's layout keeps it: what comes first shares three cache lines.
#[derive(Clone, Debug)]
#[repr(C)]
pub struct Upstream {
    /// One is the rule: it lies in the upstream itself.
    pub nodes: SmallVec<[Node; 1]>,
    pub scheme: Scheme,
    pub balance: Balance,
    pub pass_host: PassHost,
    /// In boxes of their own, what is rarely there: an upstream has as few cache lines as can be.
    pub timeout: Option<Box<Timeouts>>,
    pub keepalive: Option<Box<Keepalive>>,
    /// Further tries after the first. Unset: as many as there are other nodes.
    pub retries: Option<u32>,
    /// As `Object::uid`; an upstream inside a route has its own, or that of all routes whose upstream says the same.
    pub uid: u64,
    /// No new try starts past this. Zero or unset: no limit.
    pub retry_timeout: Option<Duration>,
    pub tls: Option<Box<UpstreamTls>>,
    /// Set when it is `/upstreams/{id}`.
    pub id: Option<Id>,
    pub name: Option<Box<str>>,
    /// Set when the nodes come from a registry: there are none, until it is asked.
    pub discovery: Option<Box<Discovery>>,
    /// How the health of its nodes is found out; `None`: it is not.
    pub checks: Option<Box<checks::Checks>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// An address or a name; IPv6 without brackets.
    pub host: Box<str>,
    /// `host` where it is an address, so that no request parses it.
    pub ip: Option<IpAddr>,
    /// As written, or the scheme's own.
    pub port: u16,
    /// Whether the port was written: `pass_host: node` sends it then.
    pub explicit_port: bool,
    /// 0 drains the node.
    pub weight: u32,
    /// Nodes of a lower priority are used when none of a higher one is left.
    pub priority: i64,
}

/// `type`, with `hash_on` and `key` for chash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Balance {
    RoundRobin,
    Chash {
        on: HashOn,
        key: Box<str>,
    },
    Ewma,
    LeastConn,
    /// The name of a balancer module of the user's own.
    Other(Box<str>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HashOn {
    Vars,
    Header,
    Cookie,
    Consumer,
    VarsCombinations,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scheme {
    #[default]
    Http,
    Https,
    Grpc,
    Grpcs,
    Tcp,
    Tls,
    Udp,
    Kafka,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PassHost {
    /// The client's Host.
    Pass,
    /// The node's own name.
    Node,
    /// `upstream_host`.
    Rewrite(Box<str>),
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Keepalive {
    pub size: usize,
    pub idle_timeout: Duration,
    pub requests: u64,
}

#[derive(Clone, Debug, Default)]
pub struct UpstreamTls {
    pub verify: bool,
    /// PEM.
    pub client_pair: Option<(Box<str>, Box<str>)>,
    pub client_cert_id: Option<Id>,
}

impl Upstream {
    /// The upstream that stands inside a route or a service.
    pub(super) fn inline(owner: &mut Map<String, Value>, context: &ParseContext<'_>) -> Result<Option<Arc<Upstream>>> {
        match owner.get_mut("upstream") {
            Some(Value::Object(map)) => {
                let upstream = Upstream::from_json(map, context)?;
                Ok(Some(shared::share(upstream, map)))
            }
            _ => Ok(None),
        }
    }

    /// One that only names its nodes.
    pub fn of_nodes(nodes: impl IntoIterator<Item = Node>) -> Upstream {
        Upstream {
            uid: next_uid(),
            id: None,
            name: None,
            nodes: nodes.into_iter().collect(),
            balance: Balance::RoundRobin,
            scheme: Scheme::Http,
            pass_host: PassHost::Pass,
            retries: None,
            retry_timeout: None,
            timeout: None,
            keepalive: None,
            tls: None,
            discovery: None,
            checks: None,
        }
    }

    /// From JSON that its schema has checked and filled.
    pub(super) fn from_json(map: &mut Map<String, Value>, context: &ParseContext<'_>) -> Result<Upstream> {
        let scheme = Scheme::of(text(map, "scheme").unwrap_or("http"));
        let uid = next_uid();
        let discovery = Discovery::of(map, uid);
        // Checked in any case, as by the schema.
        let nodes = nodes(map.get("nodes"), scheme)?;
        Ok(Upstream {
            uid,
            id: None,
            name: boxed(map, "name"),
            nodes: if discovery.is_some() { SmallVec::new() } else { nodes },
            balance: balance(map)?,
            scheme,
            pass_host: pass_host(map)?,
            retries: number(map, "retries").map(|n| u32::try_from(n).unwrap_or(u32::MAX)),
            retry_timeout: map.get("retry_timeout").and_then(seconds).filter(|d| !d.is_zero()),
            timeout: timeouts(map).map(Box::new),
            keepalive: keepalive(map).map(Box::new),
            discovery: discovery.map(Box::new),
            checks: map
                .get("checks")
                .and_then(Value::as_object)
                .map(|checks| Box::new(checks::Checks::from_json(checks))),
            tls: tls(map, context)?,
        })
    }
}

impl Scheme {
    fn of(name: &str) -> Scheme {
        match name {
            "https" => Scheme::Https,
            "grpc" => Scheme::Grpc,
            "grpcs" => Scheme::Grpcs,
            "tcp" => Scheme::Tcp,
            "tls" => Scheme::Tls,
            "udp" => Scheme::Udp,
            "kafka" => Scheme::Kafka,
            _ => Scheme::Http,
        }
    }

    /// The port of a node that names none.
    pub fn default_port(self) -> u16 {
        match self {
            Scheme::Https | Scheme::Grpcs | Scheme::Tls => 443,
            Scheme::Kafka => 9092,
            _ => 80,
        }
    }
}

fn nodes(value: Option<&Value>, scheme: Scheme) -> Result<SmallVec<[Node; 1]>> {
    match value {
        Some(Value::Object(map)) => map.iter().map(|(place, weight)| node_of_entry(place, weight, scheme)).collect(),
        Some(Value::Array(list)) => {
            list.iter().filter_map(Value::as_object).map(|node| node_of_object(node, scheme)).collect()
        }
        _ => Ok(SmallVec::new()),
    }
}

/// `"127.0.0.1:8080": 1`. What has several colons and no brackets is taken, as in APISIX, which then fails to connect: one such node
/// must not cost the others of its upstream.
fn node_of_entry(place: &str, weight: &Value, scheme: Scheme) -> Result<Node> {
    let is_bare = !place.starts_with('[') && place.bytes().filter(|b| *b == b':').count() > 1;
    let (host, port) = if is_bare { (place, None) } else { split_place(place)? };
    let weight = weight.as_number().and_then(integer).unwrap_or(0);
    Ok(node(host, port, scheme, weight, 0))
}

fn node_of_object(map: &Map<String, Value>, scheme: Scheme) -> Result<Node> {
    let (host, port) = split_place(text(map, "host").unwrap_or_default())?;
    let written = number(map, "port").and_then(|n| u16::try_from(n).ok());
    let weight = number(map, "weight").unwrap_or(0);
    Ok(node(host, written.or(port), scheme, weight, number(map, "priority").unwrap_or(0)))
}

fn node(host: &str, port: Option<u16>, scheme: Scheme, weight: i64, priority: i64) -> Node {
    Node {
        host: host.into(),
        ip: host.parse().ok(),
        port: port.unwrap_or(scheme.default_port()),
        explicit_port: port.is_some(),
        weight: u32::try_from(weight).unwrap_or(u32::MAX),
        priority,
    }
}

/// `host`, `host:port`, `[v6]`, `[v6]:port`.
fn split_place(place: &str) -> Result<(&str, Option<u16>)> {
    let bad_port = |port: &str| invalid(format!("invalid port {port}"));
    let parse = |port: &str| port.parse::<u16>().ok().filter(|p| *p != 0).map(Some).ok_or_else(|| bad_port(port));
    if let Some(rest) = place.strip_prefix('[') {
        let (host, rest) = rest.split_once(']').ok_or_else(unenclosed)?;
        return match rest.strip_prefix(':') {
            Some(port) => Ok((host, parse(port)?)),
            None if rest.is_empty() => Ok((host, None)),
            None => Err(bad_port(rest)),
        };
    }
    match place.split_once(':') {
        Some((_, port)) if port.contains(':') => Err(unenclosed()),
        Some((host, port)) => Ok((host, parse(port)?)),
        None => Ok((place, None)),
    }
}

fn unenclosed() -> crate::error::Error {
    invalid("invalid configuration: IPv6 address must be enclosed with '[' and ']'")
}

fn balance(map: &Map<String, Value>) -> Result<Balance> {
    match text(map, "type").unwrap_or("roundrobin") {
        "roundrobin" => Ok(Balance::RoundRobin),
        "chash" => chash(map),
        "ewma" => Ok(Balance::Ewma),
        "least_conn" => Ok(Balance::LeastConn),
        other => Ok(Balance::Other(other.into())),
    }
}

fn chash(map: &Map<String, Value>) -> Result<Balance> {
    let (on, schema) = match text(map, "hash_on").unwrap_or("vars") {
        "header" => (HashOn::Header, schema::resource("upstream_hash_header_schema")),
        "cookie" => (HashOn::Cookie, cookie_schema()),
        "consumer" => (HashOn::Consumer, None),
        "vars_combinations" => (HashOn::VarsCombinations, None),
        _ => (HashOn::Vars, schema::resource("upstream_hash_vars_schema")),
    };
    let key = text(map, "key").unwrap_or_default();
    if key.is_empty() && on != HashOn::Consumer {
        return Err(invalid("missing key"));
    }
    if let Some(schema) = schema {
        schema.check(&mut key.into()).map_err(|e| invalid(format!("invalid configuration: {e}")))?;
    }
    Ok(Balance::Chash { on, key: key.into() })
}

/// The packed facts hold no schema for it; the admin tests show that it is the header's.
fn cookie_schema() -> Option<&'static Schema> {
    schema::resource("upstream_hash_header_schema")
}

fn pass_host(map: &Map<String, Value>) -> Result<PassHost> {
    match text(map, "pass_host") {
        Some("node") => Ok(PassHost::Node),
        Some("rewrite") => match boxed(map, "upstream_host").filter(|host| !host.is_empty()) {
            Some(host) => Ok(PassHost::Rewrite(host)),
            None => Err(invalid("`upstream_host` can't be empty when `pass_host` is `rewrite`")),
        },
        _ => Ok(PassHost::Pass),
    }
}

/// What `keepalive_pool` leaves out, as in its schema.
const KEEPALIVE_SIZE: usize = 320;
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_REQUESTS: u64 = 1000;

fn keepalive(map: &Map<String, Value>) -> Option<Keepalive> {
    let Some(Value::Object(pool)) = map.get("keepalive_pool") else {
        return None;
    };
    Some(Keepalive {
        size: number(pool, "size").and_then(|n| usize::try_from(n).ok()).unwrap_or(KEEPALIVE_SIZE),
        idle_timeout: pool.get("idle_timeout").and_then(seconds).unwrap_or(KEEPALIVE_IDLE),
        requests: number(pool, "requests").and_then(|n| u64::try_from(n).ok()).unwrap_or(KEEPALIVE_REQUESTS),
    })
}

fn tls(map: &mut Map<String, Value>, context: &ParseContext<'_>) -> Result<Option<Box<UpstreamTls>>> {
    let Some(Value::Object(tls)) = map.get_mut("tls") else {
        return Ok(None);
    };
    decrypt_keys(tls, context)?;
    let client_pair = boxed(tls, "client_cert").zip(boxed(tls, "client_key"));
    if let Some((cert, key)) = &client_pair {
        super::ssl::check_pair(cert, key).map_err(|e| invalid(format!("failed to validate client_cert: {e}")))?;
    }
    Ok(Some(Box::new(UpstreamTls {
        verify: flag(tls, "verify").unwrap_or(false),
        client_pair,
        client_cert_id: id(tls, "client_cert_id"),
    })))
}
