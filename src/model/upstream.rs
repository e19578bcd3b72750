//! Upstreams: the nodes, how one is picked, and how it is spoken to.

use std::time::Duration;

use super::{Id, route::Timeouts};

#[derive(Debug)]
pub struct Upstream {
    /// As `Object::uid`; an upstream inside a route has its own.
    pub uid: u64,
    /// Set when it is `/upstreams/{id}`.
    pub id: Option<Id>,
    pub name: Option<Box<str>>,
    pub nodes: Vec<Node>,
    pub balance: Balance,
    pub scheme: Scheme,
    pub pass_host: PassHost,
    /// Further tries after the first. Unset: as many as there are other nodes.
    pub retries: Option<u32>,
    /// No new try starts past this. Zero or unset: no limit.
    pub retry_timeout: Option<Duration>,
    pub timeout: Option<Timeouts>,
    pub keepalive: Option<Keepalive>,
    pub tls: Option<Box<UpstreamTls>>,
    /// `(discovery_type, service_name)` when the nodes come from a registry.
    pub discovery: Option<(Box<str>, Box<str>)>,
    /// `checks` as JSON text.
    pub checks: Option<Box<str>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// An address or a name; IPv6 without brackets.
    pub host: Box<str>,
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
