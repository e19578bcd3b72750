//! `$ssl_*`: what a handshake came to and who the client is, in the forms of nginx and OpenSSL.
//!
//! What has to be read off the client's certificate is read each time it is asked for: few ask, and the TLS library
//! takes no certificate that is longer than one handshake message (64 KiB).

use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine;
use chrono::DateTime;
use sha1::{Digest, Sha1};
use x509_parser::{
    asn1_rs::{Any, Tag},
    certificate::X509Certificate,
    prelude::FromDer,
    x509::{AttributeTypeAndValue, X509Name},
};

use super::{
    Exchange, Known, TlsInfo, openssl,
    vars::{hex, number},
};

impl Exchange {
    pub(super) fn ssl<'a>(&'a self, known: Known, out: &'a mut Vec<u8>) -> Option<&'a [u8]> {
        let tls = self.conn.tls.as_ref()?;
        match known {
            Known::SslProtocol => return Some(tls.protocol.as_bytes()),
            Known::SslCipher => return Some(tls.cipher.as_bytes()),
            Known::SslServerName => return tls.sni.as_deref().map(str::as_bytes),
            Known::SslSessionReused => return Some([&b"."[..], b"r"][usize::from(tls.session_reused)]),
            Known::SslClientVerify => return Some(tls.client_verify.as_bytes()),
            Known::SslAlpnProtocol => return tls.alpn.as_deref(),
            Known::SslCurve => match openssl::group(tls.curve?) {
                Some(name) => return Some(name.as_bytes()),
                None => unnamed(tls.curve?, out),
            },
            Known::SslSessionId => hex(tls.session_id.as_deref()?, out),
            // 0-RTT is not offered: there is never early data.
            Known::SslEarlyData => return None,
            Known::SslCiphers => join(&tls.hello.as_ref()?.ciphers, openssl::cipher, out)?,
            Known::SslCurves => join(&tls.hello.as_ref()?.curves, openssl::group, out)?,
            _ => of_certificate(known, tls, out)?,
        }
        Some(out)
    }
}

/// A number that OpenSSL has no name for.
fn unnamed(n: u16, out: &mut Vec<u8>) {
    out.extend_from_slice(b"0x");
    hex(&n.to_be_bytes(), out);
}

/// `A:B:0x1a1a`
fn join(numbers: &[u16], name: impl Fn(u16) -> Option<&'static str>, out: &mut Vec<u8>) -> Option<()> {
    for (i, n) in numbers.iter().enumerate() {
        if i > 0 {
            out.push(b':');
        }
        match name(*n) {
            Some(name) => out.extend_from_slice(name.as_bytes()),
            None => unnamed(*n, out),
        }
    }
    (!numbers.is_empty()).then_some(())
}

fn of_certificate(known: Known, tls: &TlsInfo, out: &mut Vec<u8>) -> Option<()> {
    let der = tls.client_cert.as_deref()?;
    match known {
        Known::SslClientRawCert => pem(der, "\n", out),
        Known::SslClientCert => {
            pem(der, "\n\t", out);
            out.truncate(out.trim_ascii_end().len());
        }
        Known::SslClientEscapedCert => escaped(der, out),
        Known::SslClientFingerprint => hex(&Sha1::digest(der), out),
        _ => read(known, &X509Certificate::from_der(der).ok()?.1, out)?,
    }
    Some(())
}

fn read(known: Known, certificate: &X509Certificate<'_>, out: &mut Vec<u8>) -> Option<()> {
    let validity = certificate.validity();
    match known {
        Known::SslClientSerial => serial(certificate.raw_serial(), out),
        Known::SslClientSDn => rfc2253(certificate.subject(), out),
        Known::SslClientIDn => rfc2253(certificate.issuer(), out),
        Known::SslClientSDnLegacy => oneline(certificate.subject(), out),
        Known::SslClientIDnLegacy => oneline(certificate.issuer(), out),
        Known::SslClientVStart => time(validity.not_before.timestamp(), out)?,
        Known::SslClientVEnd => time(validity.not_after.timestamp(), out)?,
        Known::SslClientVRemain => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64);
            number((validity.not_after.timestamp() - now).max(0) as u64 / 86_400, out);
        }
        _ => return None,
    }
    Some(())
}

fn pem(der: &[u8], line_end: &str, out: &mut Vec<u8>) {
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let mut line = |text: &[u8]| {
        out.extend_from_slice(text);
        out.extend_from_slice(line_end.as_bytes());
    };
    line(b"-----BEGIN CERTIFICATE-----");
    text.as_bytes().chunks(64).for_each(&mut line);
    line(b"-----END CERTIFICATE-----");
}

/// The PEM text as a component of a URI.
fn escaped(der: &[u8], out: &mut Vec<u8>) {
    let mut text = Vec::new();
    pem(der, "\n", &mut text);
    for b in text {
        match b {
            b'-' => out.push(b),
            b if b.is_ascii_alphanumeric() => out.push(b),
            b => {
                out.push(b'%');
                upper_hex(b, out);
            }
        }
    }
}

fn upper_hex(b: u8, out: &mut Vec<u8>) {
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    out.extend_from_slice(&[DIGITS[usize::from(b >> 4)], DIGITS[usize::from(b & 15)]]);
}

/// As `i2a_ASN1_INTEGER`: a sign before what is negative, and a line goes on after 35 bytes.
fn serial(bytes: &[u8], out: &mut Vec<u8>) {
    let mut magnitude = bytes.to_vec();
    if bytes.first().is_some_and(|first| first & 0x80 != 0) {
        out.push(b'-');
        negate(&mut magnitude);
    }
    let bytes = magnitude;
    let start = bytes.iter().position(|b| *b != 0).unwrap_or(bytes.len());
    if start == bytes.len() {
        out.extend_from_slice(b"00");
    }
    for (i, b) in bytes[start..].iter().enumerate() {
        if i > 0 && i % 35 == 0 {
            out.extend_from_slice(b"\\\n");
        }
        upper_hex(*b, out);
    }
}

/// Of a number in two's complement, the last byte least.
fn negate(bytes: &mut [u8]) {
    let mut carries = true;
    for b in bytes.iter_mut().rev() {
        (*b, carries) = (!*b).overflowing_add(u8::from(carries));
    }
}

/// `Jan  5 01:02:03 2020 GMT`
fn time(seconds: i64, out: &mut Vec<u8>) -> Option<()> {
    let time = DateTime::from_timestamp(seconds, 0)?;
    out.extend_from_slice(time.format("%b %e %H:%M:%S %Y GMT").to_string().as_bytes());
    Some(())
}

/// As `X509_NAME_print_ex` with `XN_FLAG_RFC2253`: the last part first, and what is not ASCII escaped.
fn rfc2253(name: &X509Name<'_>, out: &mut Vec<u8>) {
    let parts: Vec<_> = name.iter_rdn().collect();
    for (i, part) in parts.iter().rev().enumerate() {
        let attributes: Vec<_> = part.iter().collect();
        for (j, attribute) in attributes.iter().rev().enumerate() {
            match (i, j) {
                (0, 0) => {}
                (_, 0) => out.push(b','),
                _ => out.push(b'+'),
            }
            let known = write_name(attribute, out);
            match text(attribute.attr_value()).filter(|_| known) {
                Some(text) => escape(&text, out),
                None => dump(attribute.attr_value(), out),
            }
        }
    }
}

/// As `X509_NAME_oneline`: `/C=DE/CN=x`, whatever the values' encodings are.
fn oneline(name: &X509Name<'_>, out: &mut Vec<u8>) {
    for part in name.iter_rdn() {
        for (j, attribute) in part.iter().enumerate() {
            out.push(if j == 0 { b'/' } else { b'+' });
            write_name(attribute, out);
            for b in plain(attribute.attr_value()) {
                match b {
                    b'/' | b'+' => out.extend_from_slice(&[b'\\', *b]),
                    b' '..=b'~' => out.push(*b),
                    b => {
                        out.extend_from_slice(b"\\x");
                        upper_hex(*b, out);
                    }
                }
            }
        }
    }
}

/// `CN=`, or the identifier of what OpenSSL has no name for; says whether it has one.
fn write_name(attribute: &AttributeTypeAndValue<'_>, out: &mut Vec<u8>) -> bool {
    let oid = dotted(attribute.attr_type().as_bytes());
    let name = openssl::attribute(&oid);
    out.extend_from_slice(name.unwrap_or(&oid).as_bytes());
    out.push(b'=');
    name.is_some()
}

/// `2.5.4.3` (X.690, 8.19.4). What does not end, or has a part that is no `u128` (the largest that is in use: UUIDs below
/// 2.25), stands there in hexadecimal.
fn dotted(oid: &[u8]) -> String {
    parts(oid).unwrap_or_else(|| {
        let mut text = Vec::new();
        hex(oid, &mut text);
        String::from_utf8_lossy(&text).into_owned()
    })
}

fn parts(oid: &[u8]) -> Option<String> {
    let mut text = String::new();
    let mut part = 0_u128;
    for b in oid {
        part = part.checked_mul(128)? | u128::from(b & 0x7f);
        if b & 0x80 != 0 {
            continue;
        }
        match text.is_empty() {
            // The first two in one, of which the first is at most 2.
            true => {
                let first = (part / 40).min(2);
                text = format!("{first}.{}", part - first * 40);
            }
            false => text.push_str(&format!(".{part}")),
        }
        part = 0;
    }
    oid.last().filter(|last| **last & 0x80 == 0).map(|_| text)
}

/// A value's bytes; those of a bit string without the number of bits that are not used.
fn plain<'a>(value: &'a Any<'_>) -> &'a [u8] {
    let bytes = value.as_bytes();
    if value.tag() == Tag::BitString { bytes.get(1..).unwrap_or_default() } else { bytes }
}

/// A value in UTF-8; one that says that it is in UTF-8 is taken as it is, byte by byte. `None`: it is none of those strings that
/// OpenSSL reads.
fn text(value: &Any<'_>) -> Option<Vec<u8>> {
    let bytes = value.as_bytes();
    let wide = |n: usize| bytes.len().is_multiple_of(n).then(|| bytes.chunks_exact(n));
    let text: Option<String> = match value.tag() {
        Tag::Utf8String => return Some(bytes.to_vec()),
        Tag::NumericString
        | Tag::PrintableString
        | Tag::T61String
        | Tag::Ia5String
        | Tag::UtcTime
        | Tag::GeneralizedTime
        | Tag::VisibleString => Some(bytes.iter().map(|b| char::from(*b)).collect()),
        Tag::BmpString => wide(2)?.map(|c| char::from_u32(u16::from_be_bytes([c[0], c[1]]).into())).collect(),
        Tag::UniversalString => {
            wide(4)?.map(|c| char::from_u32(u32::from_be_bytes([c[0], c[1], c[2], c[3]]))).collect()
        }
        _ => None,
    };
    text.map(String::into_bytes)
}

/// RFC 2253, 2.4; control characters and bytes above ASCII as `\C3`.
fn escape(text: &[u8], out: &mut Vec<u8>) {
    let last = text.len().saturating_sub(1);
    for (i, &b) in text.iter().enumerate() {
        let special = match b {
            b',' | b'+' | b'"' | b'\\' | b'<' | b'>' | b';' => true,
            b' ' => i == 0 || i == last,
            b'#' => i == 0 && i != last,
            _ => false,
        };
        match b {
            _ if special => out.extend_from_slice(&[b'\\', b]),
            b' '..=b'~' => out.push(b),
            _ => {
                out.push(b'\\');
                upper_hex(b, out);
            }
        }
    }
}

/// `#` and the value as it is encoded.
fn dump(value: &Any<'_>, out: &mut Vec<u8>) {
    let bytes = value.as_bytes();
    let constructed = if value.header.is_constructed() { 0x20 } else { 0 };
    out.push(b'#');
    upper_hex(value.tag().0 as u8 | constructed, out);
    let length = bytes.len().to_be_bytes();
    let length = &length[length.iter().position(|b| *b != 0).unwrap_or(length.len() - 1)..];
    if bytes.len() > 127 {
        upper_hex(0x80 | length.len() as u8, out);
    }
    length.iter().chain(bytes).for_each(|b| upper_hex(*b, out));
}

#[cfg(test)]
mod tests {
    use std::{rc::Rc, sync::Arc};

    use rustls_pki_types::{CertificateDer, pem::PemObject};

    use super::*;
    use crate::exchange::{ClientHello, Connection, Var};

    /// Names of every kind of string and with every sign that is escaped; the issuer's holds all attributes that have a name.
    const ODD: &str = "\
-----BEGIN CERTIFICATE-----
MIIFvjCCBWWgAwIBAgIJAPHi08S1ppeIMAoGCCqGSM49BAMCMIIDYjEKMAgGA1UE
AwwBdjEKMAgGA1UEBAwBdjEKMAgGA1UEBQwBdjEKMAgGA1UEBgwBdjEKMAgGA1UE
BwwBdjEKMAgGA1UECAwBdjEKMAgGA1UECQwBdjEKMAgGA1UECgwBdjEKMAgGA1UE
CwwBdjEKMAgGA1UEDAwBdjEKMAgGA1UEDQwBdjEKMAgGA1UEDgwBdjEKMAgGA1UE
DwwBdjEKMAgGA1UEEAwBdjEKMAgGA1UEEQwBdjEKMAgGA1UEEgwBdjEKMAgGA1UE
EwwBdjEKMAgGA1UEFAwBdjEKMAgGA1UEFwwBdjEKMAgGA1UEGgwBdjEKMAgGA1UE
HwwBdjEKMAgGA1UEIAwBdjEKMAgGA1UEIQwBdjEKMAgGA1UEIgwBdjEKMAgGA1UE
KQwBdjEKMAgGA1UEKgwBdjEKMAgGA1UEKwwBdjEKMAgGA1UELAwBdjEKMAgGA1UE
LQwBdjEKMAgGA1UELgwBdjEKMAgGA1UEMQwBdjEKMAgGA1UEMgwBdjEKMAgGA1UE
MwwBdjEKMAgGA1UENgwBdjEKMAgGA1UEQQwBdjEKMAgGA1UESAwBdjEKMAgGA1UE
YQwBdjEKMAgGA1UEYgwBdjEKMAgGA1UEYwwBdjEKMAgGA1UEZAwBdjERMA8GCgmS
JomT8ixkAQEMAXYxETAPBgoJkiaJk/IsZAEDDAF2MREwDwYKCZImiZPyLGQBGQwB
djEQMA4GCSqGSIb3DQEJAQwBdjEQMA4GCSqGSIb3DQEJAgwBdjEQMA4GCSqGSIb3
DQEJBwwBdjEQMA4GCSqGSIb3DQEJCAwBdjESMBAGCysGAQQBgjc8AgEBDAF2MRIw
EAYLKwYBBAGCNzwCAQIMAXYxEjAQBgsrBgEEAYI3PAIBAwwBdjESMBAGCysGAQQB
gjc8AgEDDAF2MRAwDgYJKwYBBAGCNxEBDAF2MQ8wDQYIKoUDA4EDAQEMAXYxDDAK
BgUqhQNkAQwBdjEMMAoGBSqFA2QDDAF2MREwDwYKCZImiZPyLGQBAgwBdjERMA8G
CgmSJomT8ixkAQQMAXYxETAPBgoJkiaJk/IsZAEFDAF2MREwDwYKCZImiZPyLGQB
LAwBdjERMA8GCgmSJomT8ixkAS0MAXYxETAPBgoJkiaJk/IsZAE8DAF2MCAXDTIw
MDEwNTAxMDIwM1oYDzIxMjYwMTA1MDEwMjAzWjCCAWIxCzAJBgNVBAYTAkRFMR0w
GwYDVQQIDBRLw7ZsbiwgInF1b3RlZCI7IDx4PjERMA8GA1UEBwwIIyBhIGhhc2gx
EjAQBgNVBAoMCSBhK2I9Y1xkIDEhMBEGA1UECwwKZmlyc3QvdW5pdDAMBgNVBAMM
BW11bHRpMQ0wCwYDVQQLFARU6WzpMRMwEQYDVQQLHgpl5WcsACAgrAB4MREwDwYD
VQQLHAgAAAD8AAHRHjEJMAcGA1UECwwAMREwDwYDVQQNDAhkZQl0YWJ/ATESMBAG
CSsGAQQBho0fAQwDb3duMR0wGwYJKoZIhvcNAQkBFg5tZUBleGFtcGxlLm9yZzEL
MAkGA1UEBQMCAAUxDTALBgNVBAUSBDEyIDMxFzAVBgoJkiaJk/IsZAEZFgdleGFt
cGxlMQowCAYDVQQDDAEjMQowCAYDVQQDDAEgMRUwEwYDVQQDDAzml6XmnKwg4oKs
ICAwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAARTJqEvgo0HDMoCzLqT4a2x+uF+
peK0+/6RfKkbEYCBeT0W3kjiB1ytJ70Olzj02OG84kvX3QVYw8IhwP/EbKiiMAoG
CCqGSM49BAMCA0cAMEQCIGF3te3/HTyY0UlcMKjZDB7Do7p/vQ0PsD672JezK2P/
AiBGG6p/bcFd4Qb+MZQzw2XssKATMBnjmF0n50cg/VENaw==
-----END CERTIFICATE-----
";
    /// A serial number of 40 bytes, and a year 9999.
    const LONG: &str = "\
-----BEGIN CERTIFICATE-----
MIIBMTCB2KADAgECAigBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEB
AQEBAQEBMAoGCCqGSM49BAMCMA0xCzAJBgNVBAMMAmNhMCAXDTIwMDEwNTAxMDIw
M1oYDzk5OTkxMjMxMjM1OTU5WjAPMQ0wCwYDVQQDEwRsb25nMFkwEwYHKoZIzj0C
AQYIKoZIzj0DAQcDQgAEUyahL4KNBwzKAsy6k+GtsfrhfqXitPv+kXypGxGAgXk9
Ft5I4gdcrSe9Dpc49NjhvOJL190FWMPCIcD/xGyoojAKBggqhkjOPQQDAgNIADBF
AiADwLqZEdxY8RguPAL3JPOA6BU7u9JL0zdihjBkVKkxmQIhAMZgudiqMD+lvvS+
zZjUIIVYqHCKFA07mk4WpTzOfpzD
-----END CERTIFICATE-----
";

    fn exchange(pem: &str) -> Exchange {
        let der = CertificateDer::from_pem_slice(pem.as_bytes()).expect("a certificate");
        let mut conn = Connection::new(1, "127.0.0.1:1".parse().unwrap(), "127.0.0.1:2".parse().unwrap());
        conn.tls = Some(TlsInfo {
            sni: None,
            protocol: "TLSv1.2",
            cipher: "ECDHE-ECDSA-AES256-GCM-SHA384".into(),
            session_reused: true,
            client_cert: Some(der.as_ref().into()),
            client_verify: "SUCCESS".into(),
            ssl: None,
            hello: Some(ClientHello {
                random: [0; 32],
                session_id: [1, 0xab].into(),
                ciphers: [0x1a1a, 0x1302, 0xc02c, 0x009e, 0x00ff].into(),
                curves: [0x2a2a, 0x11ec, 29, 23, 256].into(),
            }),
            alpn: Some((*b"h2").into()),
            curve: Some(23),
            session_id: Some([1, 0xab].into()),
        });
        Exchange::new(Rc::new(conn), Arc::default())
    }

    fn read(x: &Exchange, name: &str) -> Option<String> {
        let mut scratch = Vec::new();
        x.var(&Var::parse(name), &mut scratch).map(|v| String::from_utf8(v.to_vec()).expect("ASCII"))
    }

    /// The values are those that nginx 1.22 with OpenSSL 3.0 gives for the same certificates.
    #[test]
    fn a_certificate_reads_as_nginx_reads_it() {
        let x = exchange(ODD);
        for (name, value) in [
            ("ssl_client_raw_cert", ODD.to_owned()),
            ("ssl_client_cert", ODD.trim_end().replace('\n', "\n\t")),
            ("ssl_client_fingerprint", "a15b13ff58fdcf9c4c1b2a4ddae0d179623008d6".into()),
            ("ssl_client_serial", "F1E2D3C4B5A69788".into()),
            (
                "ssl_client_s_dn",
                r#"CN=\E6\97\A5\E6\9C\AC \E2\82\AC \ ,CN=\ ,CN=#,DC=example,serialNumber=12 3,serialNumber=#03020005,"#
                    .to_owned()
                    + r#"emailAddress=me@example.org,1.3.6.1.4.1.99999.1=#0C036F776E,description=de\09tab\7F\01,OU=,"#
                    + r#"OU=\C3\BC\F0\9D\84\9E,OU=\E6\97\A5\E6\9C\AC \E2\82\ACx,OU=T\C3\A9l\C3\A9,CN=multi+OU=first/unit,"#
                    + r#"O=\ a\+b=c\\d\ ,L=\# a hash,ST=K\C3\B6ln\, \"quoted\"\; \<x\>,C=DE"#,
            ),
            (
                "ssl_client_s_dn_legacy",
                r#"/C=DE/ST=K\xC3\xB6ln, "quoted"; <x>/L=# a hash/O= a\+b=c\d /OU=first\/unit+CN=multi/OU=T\xE9l\xE9"#
                    .to_owned()
                    + r#"/OU=e\xE5g,\x00  \xAC\x00x/OU=\x00\x00\x00\xFC\x00\x01\xD1\x1E/OU=/description=de\x09tab\x7F\x01"#
                    + r#"/1.3.6.1.4.1.99999.1=own/emailAddress=me@example.org/serialNumber=\x05/serialNumber=12 3/DC=example"#
                    + r#"/CN=#/CN= /CN=\xE6\x97\xA5\xE6\x9C\xAC \xE2\x82\xAC  "#,
            ),
            ("ssl_client_v_start", "Jan  5 01:02:03 2020 GMT".into()),
            ("ssl_client_v_end", "Jan  5 01:02:03 2126 GMT".into()),
        ] {
            assert_eq!(read(&x, name).as_deref(), Some(&*value), "{name}");
        }
        let escaped = read(&x, "ssl_client_escaped_cert").expect("there");
        assert!(escaped.starts_with(
            "-----BEGIN%20CERTIFICATE-----%0AMIIFvjCCBWWgAwIBAgIJAPHi08S1ppeIMAoGCCqGSM49BAMCMIIDYjEKMAgGA1UE%0A"
        ));
        assert!(escaped.ends_with("VENaw%3D%3D%0A-----END%20CERTIFICATE-----%0A") && escaped.contains("k%2FIsZ"));
        let issuer = read(&x, "ssl_client_i_dn").expect("there");
        assert!(issuer.starts_with("0.9.2342.19200300.100.1.60=#0C0176,organizationalStatus=v,uid=v,"), "{issuer}");
        assert!(issuer.ends_with("OU=v,O=v,street=v,ST=v,L=v,C=v,serialNumber=v,SN=v,CN=v"), "{issuer}");
        assert_eq!(issuer.matches("=v").count() + 1, issuer.split(',').count(), "one has no name: {issuer}");
        let legacy = read(&x, "ssl_client_i_dn_legacy").expect("there");
        assert!(legacy.starts_with("/CN=v/SN=v/") && legacy.ends_with("/0.9.2342.19200300.100.1.60=v"), "{legacy}");
        let end = read(&x, "ssl_client_v_end").expect("there");
        let end = chrono::NaiveDateTime::parse_from_str(&end, "%b %e %H:%M:%S %Y GMT").expect("a time").and_utc();
        let days = || (end - chrono::Utc::now()).num_days().to_string();
        let (before, said, after) = (days(), read(&x, "ssl_client_v_remain").expect("there"), days());
        assert!(said == before || said == after, "{said} is neither {before} nor {after}");
    }

    /// The certificate with other bytes of the same length in it; nobody looks at its signature here.
    fn patched(pem: &str, from: &[u8], to: &[u8]) -> Exchange {
        let mut x = exchange(pem);
        let tls = Rc::get_mut(&mut x.conn).and_then(|conn| conn.tls.as_mut()).expect("there");
        let der = tls.client_cert.as_mut().expect("there");
        let at = der.windows(from.len()).position(|found| found == from).expect("it holds that");
        der[at..at + from.len()].copy_from_slice(to);
        x
    }

    #[test]
    fn what_is_no_utf8_shows_its_bytes() {
        let dn = |to: &[u8]| read(&patched(ODD, b"K\xc3\xb6ln", to), "ssl_client_s_dn").expect("there");
        assert!(dn(b"K\xffoln").contains(r"ST=K\FFoln\,"), "{}", dn(b"K\xffoln"));
        assert!(dn(b"K\xfeoln").contains(r"ST=K\FEoln\,"));
        assert!(dn(b"\xc3oln\xff").contains(r"ST=\C3oln\FF\,"));
        let legacy = read(&patched(ODD, b"K\xc3\xb6ln", b"K\xffoln"), "ssl_client_s_dn_legacy");
        assert!(legacy.expect("there").contains(r"/ST=K\xFFoln,"));
    }

    #[test]
    fn a_negative_serial_number_has_a_sign() {
        let x = patched(LONG, &[0x02, 0x28, 0x01, 0x01], &[0x02, 0x28, 0xfe, 0x01]);
        assert_eq!(
            read(&x, "ssl_client_serial"),
            Some(format!("-01{}\\\n{}FF", "FE".repeat(34), "FE".repeat(4))),
            "a line goes on after 35 bytes, the sign aside"
        );
        for (bytes, text) in [
            (&[0xff, 0x21, 0x52, 0x41, 0x11][..], "-DEADBEEF"),
            (&[0xff], "-01"),
            (&[0x80], "-80"),
            (&[0x80, 0], "-8000"),
            (&[0, 0x80], "80"),
            (&[], "00"),
        ] {
            let mut out = Vec::new();
            serial(bytes, &mut out);
            assert_eq!(out, text.as_bytes());
        }
    }

    #[test]
    fn what_has_no_name_is_told_by_its_numbers() {
        let own = [0x2b, 0x06, 0x01, 0x04, 0x01, 0x86, 0x8d, 0x1f, 0x01];
        let x = patched(ODD, &own, &[0x88, 0x37, 0x01, 0x04, 0x01, 0x86, 0x8d, 0x1f, 0x01]);
        let dn = read(&x, "ssl_client_s_dn").expect("there");
        assert!(dn.contains(",2.999.1.4.1.99999.1=#0C036F776E,"), "{dn}");
        let most = [&[0x69, 0x83][..], &[0xff; 17], &[0x7f]].concat();
        for (oid, text) in [
            (&[0x88, 0x37, 0x01][..], "2.999.1"),
            (&[0x27], "0.39"),
            (&[0x28], "1.0"),
            (&[0x4f], "1.39"),
            (&[0x50], "2.0"),
            (&[0x55, 0x04, 0x03], "2.5.4.3"),
            (&most, "2.25.340282366920938463463374607431768211455"),
            (&[&[0x69, 0x84][..], &[0x80; 17], &[0]].concat(), "6984808080808080808080808080808080808000"),
            (&[0x55, 0x04, 0x03, 0x83], "55040383"),
            (&[], ""),
        ] {
            assert_eq!(dotted(oid), text);
        }
    }

    #[test]
    fn damaged_certificates_are_read_as_far_as_they_go_in_printable_signs() {
        let whole = CertificateDer::from_pem_slice(ODD.as_bytes()).expect("a certificate").to_vec();
        let mut x = exchange(ODD);
        let (mut scratch, mut read, mut unread) = (Vec::new(), 0, 0);
        for (at, bits) in (0..whole.len()).step_by(5).zip([0x01, 0x80, 0xff].into_iter().cycle()) {
            let mut damaged = whole.clone();
            damaged[at] ^= bits;
            let conn = Rc::get_mut(&mut x.conn).expect("its own");
            conn.tls.as_mut().expect("there").client_cert = Some(damaged.into());
            for name in ["s_dn", "i_dn", "s_dn_legacy", "serial", "v_start", "v_end", "v_remain", "escaped_cert"] {
                scratch.clear();
                let Some(value) = x.var_by_name(&format!("ssl_client_{name}"), &mut scratch) else {
                    unread += 1;
                    continue;
                };
                read += 1;
                let printable = value.iter().all(|b| matches!(b, b' '..=b'~') || (name == "serial" && *b == b'\n'));
                assert!(printable, "{name} with byte {at} changed: {value:?}");
            }
        }
        assert!(read > unread && unread > 0, "{read} were read and {unread} were not");
    }

    #[test]
    fn a_long_serial_number_goes_on_in_a_second_line() {
        let x = exchange(LONG);
        assert_eq!(read(&x, "ssl_client_serial"), Some(format!("{}\\\n{}", "01".repeat(35), "01".repeat(5))));
        assert_eq!(read(&x, "ssl_client_v_end").as_deref(), Some("Dec 31 23:59:59 9999 GMT"));
        let mut out = Vec::new();
        serial(&[0, 0], &mut out);
        assert_eq!(out, b"00");
    }

    #[test]
    fn a_handshake_reads_as_nginx_reads_it() {
        let mut x = exchange(LONG);
        for (name, value) in [
            ("ssl_alpn_protocol", "h2"),
            (
                "ssl_ciphers",
                "0x1a1a:TLS_AES_256_GCM_SHA384:ECDHE-ECDSA-AES256-GCM-SHA384:DHE-RSA-AES128-GCM-SHA256:\
                TLS_EMPTY_RENEGOTIATION_INFO_SCSV",
            ),
            ("ssl_curve", "prime256v1"),
            ("ssl_curves", "0x2a2a:0x11ec:X25519:prime256v1:ffdhe2048"),
            ("ssl_session_id", "01ab"),
            ("ssl_session_reused", "r"),
        ] {
            assert_eq!(read(&x, name).as_deref(), Some(value), "{name}");
        }
        assert_eq!(read(&x, "ssl_early_data"), None);
        let conn = Rc::get_mut(&mut x.conn).expect("its own");
        conn.tls.as_mut().expect("there").client_cert = Some((*b"no certificate").into());
        assert_eq!(read(&x, "ssl_client_s_dn"), None, "what cannot be read has no name");
        Rc::get_mut(&mut x.conn).expect("its own").tls = None;
        for name in ["ssl_protocol", "ssl_ciphers", "ssl_client_cert", "ssl_client_v_remain"] {
            assert_eq!(read(&x, name), None, "{name}");
        }
    }
}
