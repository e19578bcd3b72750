//! `checks` of an upstream: how its nodes' health is found out. Names and defaults are those of APISIX's schema and its health
//! check tutorial.

use std::time::Duration;

use serde_json::{Map, Value};

use super::super::parse::{boxed, flag, number, seconds, text};

/// What probes and requests tell of a node.
#[derive(Clone, Debug, PartialEq)]
pub struct Checks {
    pub active: Active,
    /// `None`: what comes of requests says nothing.
    pub passive: Option<Passive>,
}

/// Probes.
#[derive(Clone, Debug, PartialEq)]
pub struct Active {
    pub kind: Probe,
    /// For connecting, TLS and the status line together.
    pub timeout: Duration,
    /// Nodes that are probed at once.
    pub concurrency: usize,
    pub method: Box<str>,
    pub path: Box<str>,
    pub body: Box<str>,
    /// In the `Host` field and as TLS name. Unset: the node's own.
    pub host: Option<Box<str>>,
    /// Unset: the node's own.
    pub port: Option<u16>,
    pub verify: bool,
    /// Further fields of the head, `Name: value` each.
    pub headers: Box<[Box<str>]>,
    /// Between two probes of a healthy node, and of one that is not.
    pub intervals: [Duration; 2],
    pub limits: Limits,
    pub statuses: Statuses,
}

/// What a probe is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    Http,
    Https,
    Tcp,
}

/// What is made of the responses that requests get.
#[derive(Clone, Debug, PartialEq)]
pub struct Passive {
    /// Of `tcp`, statuses tell nothing.
    pub kind: Probe,
    pub limits: Limits,
    pub statuses: Statuses,
}

/// How many events of a kind change a node's state; 0: none do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    pub successes: u8,
    pub http_failures: u8,
    pub tcp_failures: u8,
    pub timeouts: u8,
}

/// Statuses that are a success, and those that are a failure. Others tell nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Statuses {
    pub healthy: Box<[u16]>,
    pub unhealthy: Box<[u16]>,
}

impl Checks {
    /// From JSON that its schema has checked and filled, as far as APISIX's fills: a group that is left out has its defaults, too.
    pub fn from_json(checks: &Map<String, Value>) -> Checks {
        let empty = Map::new();
        let active = group(checks, "active").unwrap_or(&empty);
        let [healthy, unhealthy] = ["healthy", "unhealthy"].map(|key| group(active, key).unwrap_or(&empty));
        Checks {
            active: Active {
                kind: Probe::of(active),
                timeout: active.get("timeout").and_then(seconds).filter(|t| !t.is_zero()).unwrap_or(SECOND),
                concurrency: number(active, "concurrency").and_then(|n| usize::try_from(n).ok()).unwrap_or(10).max(1),
                method: boxed(active, "http_method").unwrap_or_else(|| "GET".into()),
                path: boxed(active, "http_path").unwrap_or_else(|| "/".into()),
                body: boxed(active, "http_req_body").unwrap_or_default(),
                host: boxed(active, "host"),
                port: number(active, "port").and_then(|n| u16::try_from(n).ok()),
                verify: flag(active, "https_verify_certificate").unwrap_or(true),
                headers: texts(active.get("req_headers")),
                intervals: [interval(healthy), interval(unhealthy)],
                limits: Limits::of(
                    healthy,
                    unhealthy,
                    Limits { successes: 2, http_failures: 5, tcp_failures: 2, timeouts: 3 },
                ),
                statuses: Statuses::of(healthy, unhealthy, [&[200, 302], &[429, 404, 500, 501, 502, 503, 504, 505]]),
            },
            passive: group(checks, "passive").map(|passive| {
                let [healthy, unhealthy] = ["healthy", "unhealthy"].map(|key| group(passive, key).unwrap_or(&empty));
                let good =
                    [200, 201, 202, 203, 204, 205, 206, 207, 208, 226, 300, 301, 302, 303, 304, 305, 306, 307, 308];
                Passive {
                    kind: Probe::of(passive),
                    limits: Limits::of(
                        healthy,
                        unhealthy,
                        Limits { successes: 5, http_failures: 5, tcp_failures: 2, timeouts: 7 },
                    ),
                    statuses: Statuses::of(healthy, unhealthy, [&good, &[429, 500, 503]]),
                }
            }),
        }
    }
}

const SECOND: Duration = Duration::from_secs(1);

fn group<'m>(of: &'m Map<String, Value>, key: &str) -> Option<&'m Map<String, Value>> {
    of.get(key).and_then(Value::as_object)
}

fn interval(group: &Map<String, Value>) -> Duration {
    group.get("interval").and_then(seconds).map_or(SECOND, |interval| interval.max(SECOND))
}

fn texts(list: Option<&Value>) -> Box<[Box<str>]> {
    list.and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).map(Box::from).collect()
}

impl Probe {
    fn of(map: &Map<String, Value>) -> Probe {
        match text(map, "type") {
            Some("https") => Probe::Https,
            Some("tcp") => Probe::Tcp,
            _ => Probe::Http,
        }
    }

    /// As `type` says it.
    pub fn name(self) -> &'static str {
        match self {
            Probe::Http => "http",
            Probe::Https => "https",
            Probe::Tcp => "tcp",
        }
    }
}

impl Limits {
    fn of(healthy: &Map<String, Value>, unhealthy: &Map<String, Value>, default: Limits) -> Limits {
        let count = |of: &Map<String, Value>, key: &str, default| {
            number(of, key).and_then(|n| u8::try_from(n).ok()).unwrap_or(default)
        };
        Limits {
            successes: count(healthy, "successes", default.successes),
            http_failures: count(unhealthy, "http_failures", default.http_failures),
            tcp_failures: count(unhealthy, "tcp_failures", default.tcp_failures),
            timeouts: count(unhealthy, "timeouts", default.timeouts),
        }
    }
}

impl Statuses {
    fn of(healthy: &Map<String, Value>, unhealthy: &Map<String, Value>, default: [&[u16]; 2]) -> Statuses {
        let list = |of: &Map<String, Value>, default: &[u16]| match of.get("http_statuses").and_then(Value::as_array) {
            Some(list) => list.iter().filter_map(Value::as_u64).filter_map(|n| u16::try_from(n).ok()).collect(),
            None => default.into(),
        };
        Statuses { healthy: list(healthy, default[0]), unhealthy: list(unhealthy, default[1]) }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn checks(json: Value) -> Checks {
        Checks::from_json(json.as_object().expect("a map"))
    }

    #[test]
    fn what_is_left_out_has_its_default() {
        let Checks { active, passive } = checks(json!({"active": {}}));
        assert_eq!((active.kind, active.timeout, active.concurrency), (Probe::Http, SECOND, 10));
        assert_eq!((&*active.method, &*active.path, active.port, active.verify), ("GET", "/", None, true));
        assert_eq!(active.intervals, [SECOND, SECOND]);
        assert_eq!(active.limits, Limits { successes: 2, http_failures: 5, tcp_failures: 2, timeouts: 3 });
        assert!(active.statuses.unhealthy.contains(&404) && passive.is_none());
        let passive =
            checks(json!({"active": {}, "passive": {"unhealthy": {"http_failures": 0}}})).passive.expect("passive");
        assert_eq!(passive.limits, Limits { successes: 5, http_failures: 0, tcp_failures: 2, timeouts: 7 });
        assert!(passive.statuses.healthy.contains(&308) && !passive.statuses.unhealthy.contains(&404));
    }

    #[test]
    fn what_is_written_counts() {
        let active = checks(json!({"active": {
            "type": "https", "timeout": 0.5, "concurrency": 3, "http_method": "HEAD", "http_path": "/up", "http_req_body": "x",
            "host": "a.test", "port": 8443, "https_verify_certificate": false, "req_headers": ["A: b"],
            "healthy": {"interval": 7, "successes": 1, "http_statuses": [204]},
            "unhealthy": {"interval": 9, "timeouts": 4, "tcp_failures": 5, "http_failures": 6, "http_statuses": [500]},
        }}))
        .active;
        assert_eq!((active.kind.name(), active.timeout.as_millis(), active.concurrency), ("https", 500, 3));
        assert_eq!((&*active.method, &*active.path, &*active.body), ("HEAD", "/up", "x"));
        assert_eq!((active.host.as_deref(), active.port, active.verify), (Some("a.test"), Some(8443), false));
        assert_eq!((active.headers.len(), active.intervals.map(|i| i.as_secs())), (1, [7, 9]));
        assert_eq!(active.limits, Limits { successes: 1, http_failures: 6, tcp_failures: 5, timeouts: 4 });
        assert_eq!((&*active.statuses.healthy, &*active.statuses.unhealthy), (&[204][..], &[500][..]));
    }
}
