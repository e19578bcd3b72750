//! `apisix.proxy_protocol`: ports whose connections begin with a PROXY protocol header. What it says of streams is read with these.

use serde_json::json;

use super::Reader;
use crate::conf::{Listen, Warning};

const PATH: &str = "apisix.proxy_protocol";
const HTTP: &str = "listen_http_port";
const HTTPS: &str = "listen_https_port";

impl Reader<'_> {
    /// Adds the two ports to the listeners there are, on every address, as ports of `node_listen` and `ssl.listen` are.
    pub(super) fn proxy_protocol(
        &mut self,
        plain: &mut Vec<Listen>,
        tls: &mut Vec<Listen>,
        warnings: &mut Vec<Warning>,
    ) {
        let (http, mut https) = (self.port_with_header(HTTP), self.port_with_header(HTTPS));
        if !https.is_empty() && !self.flag("apisix.ssl.enable") {
            warnings.push(Warning(format!("{PATH}.{HTTPS}: has no effect: apisix.ssl.enable is false")));
            https.clear();
        }
        plain.extend_from_slice(&http);
        tls.extend_from_slice(&https);
        for (key, own) in [(HTTP, http), (HTTPS, https)] {
            // Two sockets of one gateway may share an address: each would get a part of the connections, and one not what it expects.
            let all = || plain.iter().chain(&*tls).map(|listen| listen.addr);
            let twice = |own: &Listen| own.addr.port() != 0 && all().filter(|addr| *addr == own.addr).count() > 1;
            if own.iter().any(twice) {
                self.wrong(&format!("{PATH}.{key}"), "another listener has the same port; it needs one of its own");
            }
        }
    }

    fn port_with_header(&mut self, key: &str) -> Vec<Listen> {
        let path = format!("{PATH}.{key}");
        let mut out = Vec::new();
        if let Some(port) = self.get(&path) {
            let http2 = self.flag("apisix.enable_http2");
            self.listener(&path, &json!({"port": port, "proxy_protocol": true}), http2, &mut out);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::conf::{self, Listen, Mistakes};

    fn told(listen: &[Listen]) -> Vec<String> {
        let all = listen.iter().filter(|l| l.proxy_protocol);
        all.map(|l| format!("{}{}", l.addr, if l.http2 { " h2" } else { "" })).collect()
    }

    #[test]
    fn the_ports_are_listeners_on_every_address() {
        let read = |text: &str| conf::parse(Path::new("/x"), text).unwrap();
        let (config, warnings) =
            read("apisix: {proxy_protocol: {listen_http_port: 9181, listen_https_port: \"9182\"}}");
        assert!(warnings.is_empty(), "{warnings:?}");
        assert_eq!(told(&config.listen), ["0.0.0.0:9181 h2", "[::]:9181 h2"]);
        assert_eq!(told(&config.listen_tls), ["0.0.0.0:9182 h2", "[::]:9182 h2"]);
        let (config, _) = read(
            "apisix: {enable_ipv6: false, enable_http2: false, proxy_protocol: {listen_http_port: 1, listen_https_port: 2}}",
        );
        assert_eq!(
            (told(&config.listen), told(&config.listen_tls)),
            (vec!["0.0.0.0:1".into()], vec!["0.0.0.0:2".into()])
        );
        let (config, _) = read("apisix: {proxy_protocol: {enable_tcp_pp: true}}");
        assert!(told(&config.listen).is_empty() && told(&config.listen_tls).is_empty());
    }

    #[test]
    fn what_has_no_effect_or_cannot_be_is_told() {
        let (config, warnings) = conf::parse(
            Path::new("/x"),
            "apisix: {ssl: {enable: false}, proxy_protocol: {listen_https_port: 9182, listen_htp_port: 1}}",
        )
        .unwrap();
        assert!(config.listen_tls.is_empty());
        let warnings: Vec<_> = warnings.into_iter().map(|warning| warning.0).collect();
        assert_eq!(warnings.len(), 2, "{warnings:?}");
        assert!(
            warnings[0].starts_with("apisix.proxy_protocol.listen_htp_port: is not a known key; did you mean apisix.proxy_protocol.listen_http_port?")
        );
        assert_eq!(warnings[1], "apisix.proxy_protocol.listen_https_port: has no effect: apisix.ssl.enable is false");
        for (text, mistake) in [
            (
                "{listen_http_port: x}",
                "apisix.proxy_protocol.listen_http_port: port \"x\" is not a number from 0 to 65535",
            ),
            ("{listen_https_port: 65536}", "apisix.proxy_protocol.listen_https_port: port 65536 is not a number"),
            ("{listen_http_port: 9080}", "apisix.proxy_protocol.listen_http_port: another listener has the same port"),
            ("{listen_http_port: 9443}", "apisix.proxy_protocol.listen_http_port: another listener has the same port"),
            ("{listen_http_port: 1, listen_https_port: 1}", "apisix.proxy_protocol.listen_http_port: another listener"),
        ] {
            let Err(Mistakes(lines)) = conf::parse(Path::new("/x"), &format!("apisix: {{proxy_protocol: {text}}}"))
            else {
                panic!("{text} is taken");
            };
            assert!(lines[0].starts_with(mistake), "{text}: {lines:?}");
        }
    }
}
