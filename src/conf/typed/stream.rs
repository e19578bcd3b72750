//! `apisix.stream_proxy`: where TCP connections and UDP datagrams are taken, and how.

use std::{
    io,
    net::{IpAddr, SocketAddr, ToSocketAddrs, UdpSocket},
    ops::RangeInclusive,
    path::Path,
    sync::mpsc,
    thread,
    time::Duration,
};

use serde_json::{Map, Value};

use super::Reader;
use crate::conf::{Stream, StreamListen, Warning};

/// What may be said of a TCP address.
const TCP_KEYS: [&str; 4] = ["addr", "tls", "proxy_protocol", "proxy_protocol_to_upstream"];

/// Ports of all entries, ranges included: each is a socket in each worker.
const MAX_PORTS: usize = 1024;

impl<'a> Reader<'a> {
    /// Whether HTTP is served, and what else is.
    pub(super) fn stream(&mut self, prefix: &Path, warnings: &mut Vec<Warning>) -> (bool, Stream) {
        const HTTP: u8 = 1;
        const STREAM: u8 = 2;
        let modes = [("http", HTTP), ("stream", STREAM), ("http&stream", HTTP | STREAM)];
        let mode = self.one_of("apisix.proxy_mode", &modes).unwrap_or(HTTP);
        let mut stream = Stream {
            real_ip_from: self.networks("nginx_config.stream.real_ip_from"),
            access_log: self.access_log(prefix, "nginx_config.stream"),
            ..Stream::default()
        };
        let path = "apisix.stream_proxy";
        match self.get(path) {
            Some(_) if mode & STREAM == 0 => {
                let text = format!("{path}: has no effect: apisix.proxy_mode is http; write http&stream or stream");
                warnings.push(Warning(text));
            }
            Some(_) => self.addresses(&mut stream, warnings),
            None if mode == STREAM => self.wrong(path, "is missing: without HTTP there is nothing to listen on"),
            None => {}
        }
        self.test_listen(&mut stream);
        if stream.tcp.len() + stream.udp.len() > MAX_PORTS {
            self.wrong(path, format!("names {} ports, more than {MAX_PORTS}", stream.tcp.len() + stream.udp.len()));
        }
        // Another node may be the one that listens.
        stream.enabled = mode & STREAM != 0 || !stream.tcp.is_empty() || !stream.udp.is_empty();
        (mode & HTTP != 0, stream)
    }

    fn addresses(&mut self, stream: &mut Stream, warnings: &mut Vec<Warning>) {
        let accept = self.flag("apisix.proxy_protocol.enable_tcp_pp");
        let send = self.flag("apisix.proxy_protocol.enable_tcp_pp_to_upstream");
        for (path, item) in self.items("apisix.stream_proxy.tcp") {
            let map = match item {
                Value::Object(map) => map.clone(),
                addr => Map::from_iter([("addr".to_owned(), addr.clone())]),
            };
            for key in map.keys().filter(|key| !TCP_KEYS.contains(&key.as_str())) {
                let known = TCP_KEYS.join(", ");
                warnings.push(Warning(format!("{path}.{key}: is not a known key; there are {known}")));
            }
            let flags = [("tls", false), ("proxy_protocol", accept), ("proxy_protocol_to_upstream", send)];
            let [tls, proxy_protocol, proxy_protocol_to_upstream] =
                flags.map(|(key, default)| self.own_flag(&path, &map, key, default));
            let all = self.ports(&path, map.get("addr").unwrap_or(&Value::Null));
            let listen = |addr| StreamListen { addr, tls, proxy_protocol, proxy_protocol_to_upstream };
            stream.tcp.extend(all.into_iter().map(listen));
        }
        for (path, item) in self.items("apisix.stream_proxy.udp") {
            stream.udp.extend(self.ports(&path, item));
        }
        if stream.tcp.is_empty() && stream.udp.is_empty() {
            self.wrong("apisix.stream_proxy", "names no address; list ports under tcp or udp");
        }
    }

    /// `test_node.stream_listen`, which APISIX's tests write into nginx.conf.
    fn test_listen(&mut self, stream: &mut Stream) {
        for (path, item) in self.items("test_node.stream_listen") {
            let tls = item.get("tls").and_then(Value::as_bool).unwrap_or(false);
            let all = self.ports(&path, item.get("port").unwrap_or(&Value::Null));
            let listen = |addr| StreamListen { addr, tls, proxy_protocol: false, proxy_protocol_to_upstream: false };
            stream.tcp.extend(all.into_iter().map(listen));
        }
    }

    fn items(&mut self, path: &str) -> Vec<(String, &'a Value)> {
        let items = match self.get(path) {
            None => return Vec::new(),
            Some(Value::Array(items)) => items,
            Some(other) => {
                self.wrong(path, format!("{other} is not a list"));
                return Vec::new();
            }
        };
        items.iter().enumerate().map(|(i, item)| (format!("{path}[{i}]"), item)).collect()
    }

    fn own_flag(&mut self, path: &str, map: &Map<String, Value>, key: &str, default: bool) -> bool {
        match map.get(key) {
            None => default,
            Some(Value::Bool(on)) => *on,
            Some(other) => {
                self.wrong(&format!("{path}.{key}"), format!("{other} is not a boolean; write true or false"));
                default
            }
        }
    }

    /// `9100`, `"127.0.0.1:9100"`, `"9100-9110"`, `"[::]:9100-9110"`, `"localhost:9100"`: a name is asked for now, and stands for all
    /// of its addresses, as in nginx.
    fn ports(&mut self, path: &str, written: &Value) -> Vec<SocketAddr> {
        let text = match written {
            Value::Number(port) => port.to_string(),
            Value::String(text) => text.trim().to_owned(),
            _ => String::new(),
        };
        let Some((host, ports)) = range(&text) else {
            self.wrong(path, format!("{written} is not a port, an address with a port, or a range of ports"));
            return Vec::new();
        };
        if ports.size_hint().0 > MAX_PORTS {
            self.wrong(path, format!("{text} names more than {MAX_PORTS} ports"));
            return Vec::new();
        }
        match addresses_of(host) {
            Ok(ips) => ips.iter().flat_map(|ip| ports.clone().map(|port| SocketAddr::new(*ip, port))).collect(),
            Err(why) => {
                self.wrong(path, format!("{host} is neither an address nor a name that has one: {why}"));
                Vec::new()
            }
        }
    }
}

/// The host and its ports; without one: of IPv4, all addresses, as in APISIX.
fn range(text: &str) -> Option<(&str, RangeInclusive<u16>)> {
    let (host, ports) = match text.rsplit_once(':') {
        Some((host, ports)) => (host.trim_matches(['[', ']']), ports),
        None => ("0.0.0.0", text),
    };
    let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
    let (first, last): (u16, u16) = (first.parse().ok()?, last.parse().ok()?);
    (first <= last && !host.is_empty()).then_some((host, first..=last))
}

/// How long a name may take: a reload reads the configuration where everything else waits.
const LOOKUP_PATIENCE: Duration = Duration::from_secs(3);

fn looked_up(host: &str) -> Result<Vec<IpAddr>, String> {
    let (found, wanted) = mpsc::channel();
    let name = host.to_owned();
    // Left to itself when it takes too long: the system's resolver has a bound of its own.
    thread::spawn(move || found.send((&*name, 0).to_socket_addrs().map(|all| all.map(|addr| addr.ip()).collect())));
    let answer: io::Result<Vec<IpAddr>> =
        wanted.recv_timeout(LOOKUP_PATIENCE).map_err(|_| format!("no answer within {LOOKUP_PATIENCE:?}"))?;
    answer.map_err(|e| e.to_string())
}

/// Those of a name that this machine has: `localhost` may stand for one of IPv6 where there is no IPv6.
fn addresses_of(host: &str) -> Result<Vec<IpAddr>, String> {
    if let Ok(ip) = host.parse() {
        return Ok(vec![ip]);
    }
    let mut ips = looked_up(host)?;
    ips.sort_unstable();
    ips.dedup();
    ips.retain(|ip| ip.is_ipv4() || UdpSocket::bind((*ip, 0)).is_ok());
    match ips.is_empty() {
        true => Err("it has none of this machine's".to_owned()),
        false => Ok(ips),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> (crate::conf::Config, Vec<String>) {
        let (config, warnings) = crate::conf::parse(Path::new("/p"), text).unwrap_or_else(|e| panic!("{e}"));
        (config, warnings.into_iter().map(|warning| warning.0).collect())
    }

    fn tcp(config: &crate::conf::Config) -> Vec<String> {
        let mark = |on, mark| if on { mark } else { "" };
        let text = |l: &StreamListen| {
            let (tls, takes) = (mark(l.tls, " tls"), mark(l.proxy_protocol, " takes"));
            format!("{}{tls}{takes}{}", l.addr, mark(l.proxy_protocol_to_upstream, " sends"))
        };
        config.stream.tcp.iter().map(text).collect()
    }

    #[test]
    fn addresses_are_ports_ranges_and_maps() {
        let (config, warnings) = read(
            "apisix: {proxy_mode: http&stream, proxy_protocol: {enable_tcp_pp: true}, stream_proxy: {tcp: [9100, \"127.0.0.1:9101\", \
             {addr: \"9200-9201\", tls: true, proxy_protocol: false}, {addr: \"[::1]:93\", proxy_protocol_to_upstream: true, \
             tsl: 1}], udp: [53, \"127.0.0.1:54-55\"]}}",
        );
        let expected = [
            "0.0.0.0:9100 takes",
            "127.0.0.1:9101 takes",
            "0.0.0.0:9200 tls",
            "0.0.0.0:9201 tls",
            "[::1]:93 takes sends",
        ];
        assert_eq!(tcp(&config), expected);
        let udp: Vec<String> = config.stream.udp.iter().map(ToString::to_string).collect();
        assert_eq!(udp, ["0.0.0.0:53", "127.0.0.1:54", "127.0.0.1:55"]);
        assert!(config.stream.enabled && !config.listen.is_empty() && config.stream.access_log.is_none());
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].starts_with("apisix.stream_proxy.tcp[3].tsl: is not a known key"), "{warnings:?}");
    }

    #[test]
    fn the_mode_decides_what_is_served() {
        let (config, warnings) = read("apisix: {stream_proxy: {tcp: [9100]}}");
        assert!(!config.stream.enabled && config.stream.tcp.is_empty() && warnings[0].contains("has no effect"));
        let (config, _) = read("apisix: {proxy_mode: stream, stream_proxy: {tcp: [9100]}}");
        assert!(config.stream.enabled && config.listen.is_empty() && config.listen_tls.is_empty());
        let (config, _) = read("apisix: {proxy_mode: http&stream}");
        assert!(config.stream.enabled && config.stream.tcp.is_empty() && !config.listen.is_empty());
        let (config, warnings) = read("test_node: {stream_listen: [{port: 1985}, {port: 2005, tls: true}]}");
        assert_eq!((tcp(&config).join(","), warnings.len()), ("0.0.0.0:1985,0.0.0.0:2005 tls".to_owned(), 0));
        let refused = |text| crate::conf::parse(Path::new("/p"), text).err().map_or(Vec::new(), |e| e.0).join(",");
        assert!(refused("apisix: {proxy_mode: stream}").contains("apisix.stream_proxy: is missing"));
        assert!(refused("apisix: {proxy_mode: tcp}").contains("apisix.proxy_mode: \"tcp\" is not one of"));
    }

    #[test]
    fn a_name_stands_for_its_addresses() {
        let (config, _) = read(
            "apisix: {proxy_mode: stream, stream_proxy: {tcp: [\"localhost:9100-9101\"], udp: [\"localhost:53\"]}}",
        );
        let listens = tcp(&config);
        assert!(
            listens.contains(&"127.0.0.1:9100".to_owned()) && listens.contains(&"127.0.0.1:9101".to_owned()),
            "{listens:?}"
        );
        assert!(config.stream.udp.iter().all(|addr| addr.ip().is_loopback() && addr.port() == 53));
        let refused = |name| {
            let text = format!("apisix: {{proxy_mode: stream, stream_proxy: {{tcp: [\"{name}:9100\"]}}}}");
            crate::conf::parse(Path::new("/p"), &text).err().map_or(Vec::new(), |e| e.0).join(",")
        };
        assert!(refused("no such name").contains("stream_proxy.tcp[0]: no such name is neither an address nor a name"));
        assert!(refused("").contains("is not a port, an address with a port"));
    }

    #[test]
    fn ports_are_bounded() {
        let with = |last| format!("apisix: {{proxy_mode: stream, stream_proxy: {{udp: [\"1-{last}\"]}}}}");
        assert_eq!(read(&with(MAX_PORTS)).0.stream.udp.len(), MAX_PORTS);
        let refused = crate::conf::parse(Path::new("/p"), &with(MAX_PORTS + 1)).expect_err("one too many");
        assert!(refused.0[0].contains("names more than 1024 ports"), "{refused}");
    }
}
