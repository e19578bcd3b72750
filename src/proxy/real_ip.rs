//! nginx's `real_ip_*`: a peer that is trusted says where the request comes from, in a field or by PROXY protocol.

use std::net::{IpAddr, SocketAddr};

use crate::{
    conf::{RealIp, RealIpHeader},
    exchange::{Exchange, Headers},
};

/// Replaces the request's address when its peer may do so.
pub(super) fn apply(settings: &RealIp, x: &mut Exchange) {
    if !is_trusted(settings, x.conn.peer.ip()) {
        return;
    }
    let said = match &settings.header {
        RealIpHeader::Field(name) => found(settings, name, &x.request.headers),
        RealIpHeader::ProxyProtocol => x.conn.proxy.map(|(client, _)| client),
    };
    if said.is_some() {
        x.request.real_ip = said;
    }
}

fn is_trusted(settings: &RealIp, ip: IpAddr) -> bool {
    settings.from.iter().any(|net| net.contains(&ip))
}

/// The last address of the field; with `recursive` the last that is not itself trusted.
fn found(settings: &RealIp, name: &str, headers: &Headers) -> Option<SocketAddr> {
    let value = headers.get(name)?;
    let mut addresses = value.rsplit(|b| *b == b',').map(|part| address(part.trim_ascii()));
    let last = addresses.next()??;
    if !settings.recursive || !is_trusted(settings, last.ip()) {
        return Some(last);
    }
    let mut outermost = last;
    for next in addresses {
        let Some(next) = next else { break };
        outermost = next;
        if !is_trusted(settings, next.ip()) {
            break;
        }
    }
    Some(outermost)
}

/// `1.2.3.4`, `1.2.3.4:80`, `::1`, `[::1]:80`; a port that is not said is 0.
fn address(text: &[u8]) -> Option<SocketAddr> {
    let text = std::str::from_utf8(text).ok()?;
    let ip = |t: &str| t.trim_matches(['[', ']']).parse::<IpAddr>().ok().map(|ip| SocketAddr::new(ip, 0));
    text.parse().ok().or_else(|| ip(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_address_counts_or_the_last_untrusted_one() {
        const FIELD: &str = "X-Forwarded-For";
        let settings = |recursive| RealIp {
            header: FIELD.into(),
            from: vec!["10.0.0.0/8".parse().expect("a network")],
            recursive,
        };
        for (value, once, all) in [
            ("1.1.1.1, 2.2.2.2", Some("2.2.2.2:0"), Some("2.2.2.2:0")),
            ("1.1.1.1, 10.0.0.2", Some("10.0.0.2:0"), Some("1.1.1.1:0")),
            ("[::1]:90", Some("[::1]:90"), Some("[::1]:90")),
            ("nonsense", None, None),
        ] {
            let mut headers = Headers::new();
            headers.append(FIELD, value);
            let text = |recursive| found(&settings(recursive), FIELD, &headers).map(|a| a.to_string());
            assert_eq!((text(false).as_deref(), text(true).as_deref()), (once, all), "{value}");
        }
    }
}
