//! Certificates: what `resty.openssl.x509` stands on.

use x509_parser::{
    certificate::X509Certificate,
    extensions::{GeneralName, ParsedExtension},
    objects::{oid_registry, oid2abbrev, oid2sn},
    prelude::FromDer,
    x509::X509Name,
};

use super::{Answer, jwt};
use crate::{
    error::Result,
    lua::api::{Api, Phases, Stack},
};

/// A longer text is no certificate.
const MAX_CERTIFICATE: usize = 256 * 1024;

pub fn register(api: &mut Api) -> Result<()> {
    api.func(
        "native.x509.parse",
        Phases::ANY,
        "parse(PEM or DER) -> { der, version, serial, not_before, not_after, subject, issuer, public_key, signature, signed, \
         signature_oid, ca, alt_names } | nil, err",
        parse,
    )
}

fn parse(s: &Stack) -> Answer {
    let text = s.arg_bytes(1)?;
    if text.len() > MAX_CERTIFICATE {
        return s.fail("failed to load the certificate");
    }
    let der = match jwt::pem(text) {
        Some((_, der)) => der,
        None => text.to_vec(),
    };
    let Ok((_, certificate)) = X509Certificate::from_der(&der) else {
        return s.fail("failed to load the certificate");
    };
    s.push_table(0, 16);
    describe(s, &certificate);
    s.push_bytes(&der);
    s.set(-2, "der");
    Ok(1)
}

fn describe(s: &Stack, certificate: &X509Certificate) {
    let put = |key: &str, bytes: &[u8]| {
        s.push_bytes(bytes);
        s.set(-2, key);
    };
    put("serial", certificate.tbs_certificate.raw_serial());
    put("public_key", certificate.public_key().raw);
    put("signature", &certificate.signature_value.data);
    put("signed", certificate.tbs_certificate.as_ref());
    put("signature_oid", certificate.signature_algorithm.algorithm.to_id_string().as_bytes());
    for (key, number) in [
        ("version", f64::from(certificate.version().0) + 1.0),
        ("not_before", certificate.validity().not_before.timestamp() as f64),
        ("not_after", certificate.validity().not_after.timestamp() as f64),
    ] {
        s.push_number(number);
        s.set(-2, key);
    }
    s.push_bool(certificate.is_ca());
    s.set(-2, "ca");
    for (key, name) in [("subject", certificate.subject()), ("issuer", certificate.issuer())] {
        push_name(s, name);
        s.set(-2, key);
    }
    push_alt_names(s, certificate);
    s.set(-2, "alt_names");
}

/// An array of `{ name, value, oid }`.
fn push_name(s: &Stack, name: &X509Name) {
    s.push_table(4, 0);
    for (i, attribute) in name.iter_attributes().enumerate() {
        let oid = attribute.attr_type();
        let known = oid2abbrev(oid, oid_registry()).or_else(|_| oid2sn(oid, oid_registry()));
        let known = known.map_or_else(|_| oid.to_id_string(), str::to_owned);
        s.push_table(3, 0);
        for (n, bytes) in [known.as_bytes(), attribute.as_slice(), oid.to_id_string().as_bytes()].iter().enumerate() {
            s.push_bytes(bytes);
            s.set_index(-2, n + 1);
        }
        s.set_index(-2, i + 1);
    }
}

/// An array of `{ kind, value }`.
fn push_alt_names(s: &Stack, certificate: &X509Certificate) {
    s.push_table(4, 0);
    let extensions = certificate.extensions().iter().filter_map(|e| match e.parsed_extension() {
        ParsedExtension::SubjectAlternativeName(names) => Some(&names.general_names),
        _ => None,
    });
    for (i, name) in extensions.flatten().enumerate() {
        let (kind, value) = match name {
            GeneralName::DNSName(name) => ("DNS", name.as_bytes()),
            GeneralName::RFC822Name(name) => ("email", name.as_bytes()),
            GeneralName::URI(name) => ("URI", name.as_bytes()),
            GeneralName::IPAddress(address) => ("IP", *address),
            _ => ("other", &b""[..]),
        };
        s.push_table(2, 0);
        s.push_bytes(kind);
        s.set_index(-2, 1);
        s.push_bytes(value);
        s.set_index(-2, 2);
        s.set_index(-2, i + 1);
    }
}
