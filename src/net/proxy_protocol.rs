//! PROXY protocol, versions 1 and 2: who a load balancer says the client is.
//!
//! Pure and strict: a listener that expects the header accepts nothing else, since the header decides addresses that
//! access rules trust. Whether a peer's word counts is for those who ask (`real_ip_from`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// What a header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// `(client, the address it connected to)`; `None` when the balancer speaks for itself (health checks).
    pub addresses: Option<(SocketAddr, SocketAddr)>,
    /// Where the values behind the addresses begin (2.2 of the specification); they end where the header does.
    pub tlvs: usize,
    /// Bytes that it takes.
    pub len: usize,
}

/// A version 1 line (the specification's own bound).
const V1_MAX: usize = 107;
/// A version 2 header with its TLVs: the largest known ones (TLS certificates of cloud balancers) stay under it.
const V2_MAX: usize = 4096;
/// Two addresses and two ports.
const V4_ADDRESSES: usize = 12;
const V6_ADDRESSES: usize = 36;
const V2_SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";

/// `Ok(None)`: more bytes are needed. The error is for the log.
pub fn parse(input: &[u8]) -> Result<Option<Header>, &'static str> {
    let common = input.len().min(V2_SIGNATURE.len());
    if input[..common] == V2_SIGNATURE[..common] {
        return parse_v2(input);
    }
    let common = input.len().min(6);
    if input[..common] != b"PROXY "[..common] {
        return Err("no PROXY protocol header");
    }
    let window = &input[..input.len().min(V1_MAX)];
    match memchr::memchr(b'\n', window) {
        Some(lf) => parse_v1(&input[..lf]).map(|addresses| Some(Header { addresses, tlvs: lf + 1, len: lf + 1 })),
        None if input.len() < V1_MAX => Ok(None),
        None => Err("PROXY protocol line too long"),
    }
}

/// `line` is without its final `\n`.
fn parse_v1(line: &[u8]) -> Result<Option<(SocketAddr, SocketAddr)>, &'static str> {
    const BAD: &str = "bad PROXY protocol line";
    let line = line.strip_suffix(b"\r").and_then(|l| std::str::from_utf8(l).ok()).ok_or(BAD)?;
    let mut words = line.split(' ').skip(1);
    let v6 = match words.next() {
        Some("UNKNOWN") => return Ok(None),
        Some("TCP4") => false,
        Some("TCP6") => true,
        _ => return Err(BAD),
    };
    let mut address = || words.next()?.parse::<IpAddr>().ok().filter(|ip| ip.is_ipv6() == v6);
    let (from, to) = (address().ok_or(BAD)?, address().ok_or(BAD)?);
    let mut port = || words.next().filter(|p| is_port(p))?.parse::<u16>().ok();
    let (from_port, to_port) = (port().ok_or(BAD)?, port().ok_or(BAD)?);
    match words.next() {
        None => Ok(Some((SocketAddr::new(from, from_port), SocketAddr::new(to, to_port)))),
        Some(_) => Err(BAD),
    }
}

/// Digits without sign and leading zero.
fn is_port(text: &str) -> bool {
    text == "0" || (!text.starts_with('0') && text.bytes().all(|b| b.is_ascii_digit()))
}

fn parse_v2(input: &[u8]) -> Result<Option<Header>, &'static str> {
    let Some(&[command, family, high, low]) = input.get(12..16) else { return Ok(None) };
    let local = match command {
        0x20 => true,
        0x21 => false,
        _ => return Err("bad PROXY protocol version or command"),
    };
    let body = usize::from(u16::from_be_bytes([high, low]));
    let len = 16 + body;
    if len > V2_MAX {
        return Err("PROXY protocol header too long");
    }
    let Some(body) = input.get(16..len) else { return Ok(None) };
    let addresses = match family {
        _ if local => None,
        0x11 => Some(addresses_v4(body).ok_or(SHORT)?),
        0x21 => Some(addresses_v6(body).ok_or(SHORT)?),
        // Unspecified, or a Unix socket: the header stands, the addresses say nothing.
        0x00 | 0x31 => None,
        _ => return Err("PROXY protocol for something that is not TCP"),
    };
    let tlvs = match (family, addresses) {
        (_, None) => len,
        (0x11, _) => 16 + V4_ADDRESSES,
        _ => 16 + V6_ADDRESSES,
    };
    Ok(Some(Header { addresses, tlvs, len }))
}

const SHORT: &str = "PROXY protocol header without its addresses";

fn addresses_v4(body: &[u8]) -> Option<(SocketAddr, SocketAddr)> {
    let ip = |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(body.get(at..at + 4)?).ok()?));
    Some((SocketAddr::new(ip(0)?.into(), port(body, 8)?), SocketAddr::new(ip(4)?.into(), port(body, 10)?)))
}

fn addresses_v6(body: &[u8]) -> Option<(SocketAddr, SocketAddr)> {
    let ip = |at: usize| Some(Ipv6Addr::from(<[u8; 16]>::try_from(body.get(at..at + 16)?).ok()?));
    Some((SocketAddr::new(ip(0)?.into(), port(body, 32)?), SocketAddr::new(ip(16)?.into(), port(body, 34)?)))
}

fn port(body: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(body.get(at..at + 2)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v2(command: u8, family: u8, body: &[u8]) -> Vec<u8> {
        let len = (body.len() as u16).to_be_bytes();
        [&V2_SIGNATURE[..], &[command, family], &len, body].concat()
    }

    fn pair(from: &str, to: &str) -> Option<(SocketAddr, SocketAddr)> {
        Some((from.parse().unwrap(), to.parse().unwrap()))
    }

    #[test]
    fn reads_both_versions_however_they_are_cut() {
        let v4 = [10, 0, 0, 1, 10, 0, 0, 2, 0x12, 0x34, 0, 80, 0xff, 0, 0];
        let mut v6 = [0u8; 36];
        (v6[15], v6[31], v6[33], v6[35]) = (1, 2, 7, 8);
        let cases = [
            (b"PROXY TCP4 1.2.3.4 5.6.7.8 9 10\r\n".to_vec(), pair("1.2.3.4:9", "5.6.7.8:10")),
            (b"PROXY TCP6 ::1 ::2 1 65535\r\n".to_vec(), pair("[::1]:1", "[::2]:65535")),
            (b"PROXY UNKNOWN whatever\r\n".to_vec(), None),
            (v2(0x21, 0x11, &v4), pair("10.0.0.1:4660", "10.0.0.2:80")),
            (v2(0x21, 0x21, &v6), pair("[::1]:7", "[::2]:8")),
            (v2(0x20, 0x11, &[]), None),
            (v2(0x21, 0x00, &[1, 2, 3]), None),
        ];
        for (header, addresses) in cases {
            for cut in 0..header.len() {
                assert_eq!(parse(&header[..cut]), Ok(None), "{}", header[..cut].escape_ascii());
            }
            let len = header.len();
            // The first of the two v4 addresses has values behind it.
            let tlvs = if header.ends_with(&[0xff, 0, 0]) { len - 3 } else { len };
            assert_eq!(parse(&[&header[..], b"GET /\n"].concat()), Ok(Some(Header { addresses, tlvs, len })));
        }
    }

    #[test]
    fn refuses_everything_else() {
        let bad = [
            b"GET / HTTP/1.1\r\n".to_vec(),
            b"PROXY TCP4 1.2.3.4 5.6.7.8 9 10\n".to_vec(),
            b"PROXY TCP4 1.2.3.4 5.6.7.8 9\r\n".to_vec(),
            b"PROXY TCP4 1.2.3.4 5.6.7.8 9 10 11\r\n".to_vec(),
            b"PROXY TCP4 ::1 ::2 9 10\r\n".to_vec(),
            b"PROXY TCP4 1.2.3.4 5.6.7.8 +9 10\r\n".to_vec(),
            b"PROXY TCP4 1.2.3.4 5.6.7.8 09 10\r\n".to_vec(),
            b"PROXY TCP4 1.2.3.4 5.6.7.8 9 65536\r\n".to_vec(),
            b"PROXY TCP4  1.2.3.4 5.6.7.8 9 10\r\n".to_vec(),
            b"PROXY UDP4 1.2.3.4 5.6.7.8 9 10\r\n".to_vec(),
            [b"PROXY UNKNOWN ".to_vec(), vec![b'a'; V1_MAX]].concat(),
            v2(0x31, 0x11, &[0; 12]),
            v2(0x22, 0x11, &[0; 12]),
            v2(0x21, 0x12, &[0; 12]),
            v2(0x21, 0x11, &[0; 11]),
            v2(0x21, 0x21, &[0; 35]),
            v2(0x21, 0x11, &[0; V2_MAX]),
        ];
        for header in bad {
            assert!(parse(&header).is_err(), "{}", header.escape_ascii());
        }
    }
}
