//! Where variables find their values: fields, arguments, cookies, what a PROXY protocol header carries.

use base64::{
    Engine, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};

use super::text::number;
use crate::exchange::Headers;

/// The values of a field whose name matches `name`, where dashes read as underscores. Several are joined.
pub(super) fn field<'a>(headers: &'a Headers, name: &str, scratch: &'a mut Vec<u8>) -> Option<&'a [u8]> {
    if !headers.may_have_length(name.len()) {
        return None;
    }
    let same = |(a, b): (&u8, u8)| a.to_ascii_lowercase() == b || (*a == b'-' && b == b'_');
    let mut values =
        headers.of_length(name.len()).filter(|(n, _)| n.iter().zip(name.bytes()).all(same)).map(|(_, v)| v);
    let first = values.next()?;
    let Some(second) = values.next() else { return Some(first) };
    let comma: &[u8] = if name == "cookie" { b"; " } else { b", " };
    scratch.clear();
    scratch.extend_from_slice(first);
    for value in std::iter::once(second).chain(values) {
        scratch.extend_from_slice(comma);
        scratch.extend_from_slice(value);
    }
    Some(scratch)
}

/// The first argument of that name, undecoded; case does not matter, as in nginx.
pub fn arg<'a>(args: &'a [u8], name: &str) -> Option<&'a [u8]> {
    args.split(|b| *b == b'&').find_map(|pair| {
        let at = memchr::memchr(b'=', pair)?;
        pair[..at].eq_ignore_ascii_case(name.as_bytes()).then_some(&pair[at + 1..])
    })
}

/// The first cookie of that name. As nginx: a name may follow a comma, too; a value ends at a semicolon only.
pub fn cookie<'a>(headers: &'a Headers, name: &str) -> Option<&'a [u8]> {
    headers.get_all(b"cookie").find_map(|line| {
        let mut starts = std::iter::once(0).chain(memchr::memchr2_iter(b';', b',', line).map(|at| at + 1));
        starts.find_map(|start| cookie_value(&line[start..], name))
    })
}

/// The value, if `text` begins with the name and `=`.
fn cookie_value<'a>(text: &'a [u8], name: &str) -> Option<&'a [u8]> {
    let (found, rest) = text.trim_ascii_start().split_at_checked(name.len())?;
    if !found.eq_ignore_ascii_case(name.as_bytes()) {
        return None;
    }
    let value = rest.trim_ascii_start().strip_prefix(b"=")?;
    Some(value[..memchr::memchr(b';', value).unwrap_or(value.len())].trim_ascii_start())
}

/// The value of the cookie of that name that a response sets.
pub(super) fn set_cookie<'a>(headers: &'a Headers, name: &str) -> Option<&'a [u8]> {
    headers.get_all(b"set-cookie").find_map(|line| {
        let pair = line.split(|b| *b == b';').next()?;
        let at = memchr::memchr(b'=', pair)?;
        pair[..at].trim_ascii().eq_ignore_ascii_case(name.as_bytes()).then(|| pair[at + 1..].trim_ascii())
    })
}

/// A value that a PROXY protocol header of version 2 carries, by nginx's name for its type or by the number as `0x1f`; what
/// stands within the one about TLS begins with `ssl_`.
pub(super) fn proxy_protocol_tlv<'a>(tlvs: &'a [u8], name: &str, scratch: &'a mut Vec<u8>) -> Option<&'a [u8]> {
    const SSL: u8 = 0x20;
    let Some(within) = name.strip_prefix("ssl_") else { return tlv(tlvs, tlv_type(name)?) };
    // The client's flags, and whether its certificate was verified (the PROXY protocol, 2.2.6).
    let (head, within_ssl) = tlv(tlvs, SSL)?.split_at_checked(5)?;
    if within == "verify" {
        scratch.clear();
        number(u32::from_be_bytes([head[1], head[2], head[3], head[4]]).into(), scratch);
        return Some(scratch);
    }
    tlv(within_ssl, tlv_type(name)?)
}

fn tlv_type(name: &str) -> Option<u8> {
    let named = match name {
        "alpn" => 0x01,
        "authority" => 0x02,
        "unique_id" => 0x05,
        "ssl" => 0x20,
        "ssl_version" => 0x21,
        "ssl_cn" => 0x22,
        "ssl_cipher" => 0x23,
        "ssl_sig_alg" => 0x24,
        "ssl_key_alg" => 0x25,
        "netns" => 0x30,
        _ => return u8::from_str_radix(name.strip_prefix("ssl_").unwrap_or(name).strip_prefix("0x")?, 16).ok(),
    };
    Some(named)
}

/// The first value of that type; `None` also when lengths before it do not agree.
fn tlv(mut tlvs: &[u8], wanted: u8) -> Option<&[u8]> {
    while let [kind, high, low, rest @ ..] = tlvs {
        let (value, after) = rest.split_at_checked(usize::from(u16::from_be_bytes([*high, *low])))?;
        if *kind == wanted {
            return Some(value);
        }
        tlvs = after;
    }
    None
}

/// As nginx decodes: padding may be missing, and bits beyond the last byte do not matter.
const LENIENT: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);

pub(super) fn remote_user(headers: &Headers, out: &mut Vec<u8>) -> Option<()> {
    let value = headers.get("authorization")?;
    let (scheme, credentials) = value.split_at_checked(6)?;
    if !scheme.eq_ignore_ascii_case(b"basic ") {
        return None;
    }
    let credentials = credentials.trim_ascii();
    let padding = memchr::memchr(b'=', credentials).unwrap_or(credentials.len());
    LENIENT.decode_vec(&credentials[..padding], out).ok()?;
    let end = memchr::memchr(b':', out)?;
    out.truncate(end);
    (!out.is_empty()).then_some(())
}
