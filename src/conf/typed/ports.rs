//! Ports that two listeners would take.

use std::{collections::HashSet, net::SocketAddr};

use super::Reader;

/// What listens, as messages call it, and where its addresses are configured. Any port may be 0: the system chooses another one
/// for each.
pub(super) struct Taker {
    pub name: &'static str,
    pub path: &'static str,
    pub addrs: Vec<SocketAddr>,
    /// For requests: beside a listener on all addresses one on a single address has its own.
    pub of_workers: bool,
}

impl Taker {
    fn collides(&self, other: &Taker) -> Option<u16> {
        let mut mine = self.addrs.iter().filter(|addr| addr.port() != 0);
        let taken = match self.of_workers && other.of_workers {
            true => {
                let others: HashSet<&SocketAddr> = other.addrs.iter().collect();
                mine.find(|addr| others.contains(addr))
            }
            false => mine.find(|addr| other.addrs.iter().any(|other| overlap(**addr, *other))),
        };
        taken.map(SocketAddr::port)
    }
}

impl Reader<'_> {
    /// Tells each port that two would take.
    pub(super) fn conflicts(&mut self, takers: &[Taker]) {
        for (i, taker) in takers.iter().enumerate() {
            for other in &takers[i + 1..] {
                if let Some(port) = taker.collides(other) {
                    self.wrong(taker.path, format!("{} port {port} conflicts with {}", taker.name, other.name));
                }
            }
        }
    }
}

/// Whether both cannot be bound: an address that stands for all takes those of its family.
fn overlap(a: SocketAddr, b: SocketAddr) -> bool {
    let (one, other) = (a.ip(), b.ip());
    let alike = one == other || one.is_ipv4() == other.is_ipv4() && (one.is_unspecified() || other.is_unspecified());
    a.port() == b.port() && alike
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    fn told(text: &str) -> String {
        crate::conf::parse(Path::new("/p"), text).err().map_or_else(String::new, |e| e.0.join("; "))
    }

    #[test]
    fn a_port_that_two_would_take_is_told() {
        let export = |port| format!("plugin_attr: {{prometheus: {{export_addr: {{ip: 127.0.0.1, port: {port}}}}}}}");
        let stream = "proxy_mode: http&stream, stream_proxy: {tcp: [9180, 9080], udp: [9090]}";
        for (text, expected) in [
            (
                "apisix: {node_listen: 9090}".to_owned(),
                "apisix.node_listen: http listen port 9090 conflicts with control",
            ),
            (
                "apisix: {node_listen: 9443}".into(),
                "apisix.node_listen: http listen port 9443 conflicts with https listen",
            ),
            (
                "apisix: {ssl: {listen: [{port: 9180}]}}".into(),
                "apisix.ssl.listen: https listen port 9180 conflicts with admin",
            ),
            ("apisix: {status: {port: 9090}}".into(), "apisix.status: status port 9090 conflicts with control"),
            (export(9090), "plugin_attr.prometheus.export_addr: prometheus port 9090 conflicts with control"),
            (
                format!("apisix: {{node_listen: 9092}}\n{}", export(9092)),
                "apisix.node_listen: http listen port 9092 conflicts with prometheus",
            ),
            (
                "deployment: {admin: {admin_listen: {port: 9090}}}".into(),
                "deployment.admin.admin_listen: admin port 9090 conflicts with control",
            ),
            (
                format!("apisix: {{{stream}}}"),
                "apisix.node_listen: http listen port 9080 conflicts with stream; apisix.stream_proxy.tcp: stream port 9180 conflicts with admin",
            ),
        ] {
            assert_eq!(told(&text), expected, "{text}");
        }
    }

    #[test]
    fn what_has_another_address_or_does_not_listen_is_no_conflict() {
        for text in [
            "apisix: {node_listen: [{ip: 127.0.0.2, port: 9090}]}",
            "apisix: {node_listen: [9080, {ip: 127.0.0.1, port: 9080}]}",
            "apisix: {node_listen: 9090, enable_control: false}",
            "apisix: {node_listen: 9180, enable_admin: false}",
            "apisix: {node_listen: 9443, ssl: {enable: false}}",
            "{apisix: {node_listen: 9180}, deployment: {role: data_plane}}",
            "{apisix: {node_listen: 9180}, deployment: {role: control_plane}}",
            "apisix: {node_listen: 0, ssl: {listen: [{port: 0}]}, control: {port: 0}}",
            "apisix: {proxy_mode: http&stream, stream_proxy: {udp: [9080, 9090]}}",
        ] {
            assert_eq!(told(text), "", "{text}");
        }
    }
}
