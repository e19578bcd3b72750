//! `ssls`: certificates by SNI, and client certificates for upstreams.

use rustls::{crypto::ring, sign::CertifiedKey};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use serde_json::{Map, Value};

use super::{
    crypt,
    parse::{ParseContext, boxed, decrypt_key, enabled, invalid, number, strings, text},
};
use crate::{cert::keys_match, error::Result};

#[derive(Debug)]
pub struct Ssl {
    /// Lower case, wildcards (`*.foo.com`) included. Empty for a client certificate.
    pub snis: Vec<Box<str>>,
    /// PEM pairs `(certificate chain, private key)`; keys decrypted with the keyring.
    pub pairs: Vec<(Box<str>, Box<str>)>,
    /// PEM of the CA that client certificates must chain to (mTLS), and its depth.
    pub client_ca: Option<(Box<str>, u8)>,
    pub skip_mtls_uri_regex: Vec<Box<str>>,
    /// Empty: what config.yaml allows.
    pub protocols: Vec<Box<str>>,
    pub enabled: bool,
    /// `type: client`: used towards upstreams, never served.
    pub is_client: bool,
}

impl Ssl {
    pub(super) fn from_json(map: &mut Map<String, Value>, context: &ParseContext<'_>) -> Result<Ssl> {
        let pairs = pairs(map, context)?;
        let client = map.get("client").and_then(Value::as_object);
        let client_ca = client.and_then(|client| {
            let depth = number(client, "depth").map_or(1, |n| u8::try_from(n).unwrap_or(u8::MAX));
            boxed(client, "ca").map(|ca| (ca, depth))
        });
        if let Some((ca, _)) = &client_ca
            && !crypt::is_reference(ca)
        {
            certificates(ca).map_err(|e| invalid(format!("failed to validate client_cert: {e}")))?;
        }
        Ok(Ssl {
            snis: text(map, "sni")
                .into_iter()
                .chain(strings(map, "snis"))
                .map(|s| s.to_ascii_lowercase().into())
                .collect(),
            pairs,
            client_ca,
            skip_mtls_uri_regex: client
                .into_iter()
                .flat_map(|c| strings(c, "skip_mtls_uri_regex"))
                .map(Into::into)
                .collect(),
            protocols: strings(map, "ssl_protocols").map(Into::into).collect(),
            enabled: enabled(map),
            is_client: text(map, "type") == Some("client"),
        })
    }
}

/// `cert` and `key`, then `certs` and `keys` side by side; keys decrypted.
fn pairs(map: &Map<String, Value>, context: &ParseContext<'_>) -> Result<Vec<(Box<str>, Box<str>)>> {
    let mut pairs = Vec::new();
    if let Some((cert, key)) = text(map, "cert").zip(text(map, "key")) {
        pairs.push(pair(cert, key, context).map_err(invalid)?);
    }
    let (certs, keys): (Vec<_>, Vec<_>) = (strings(map, "certs").collect(), strings(map, "keys").collect());
    if certs.len() != keys.len() {
        return Err(invalid("mismatched number of certs and keys"));
    }
    for (i, (cert, key)) in certs.into_iter().zip(keys).enumerate() {
        let failed = |e| invalid(format!("failed to handle cert-key pair[{}]: {e}", i + 1));
        pairs.push(pair(cert, key, context).map_err(failed)?);
    }
    Ok(pairs)
}

fn pair(cert: &str, key: &str, context: &ParseContext<'_>) -> Result<(Box<str>, Box<str>), String> {
    if !crypt::is_reference(cert) {
        certificates(cert)?;
    }
    let key = decrypt_key(key, context)?;
    check_pair(cert, &key)?;
    Ok((cert.into(), key))
}

/// Whether certificate and key can be read and belong together. References are resolved when used, so they pass here.
pub(super) fn check_pair(cert: &str, key: &str) -> Result<(), String> {
    if crypt::is_reference(cert) || crypt::is_reference(key) {
        return Ok(());
    }
    let chain = certificates(cert)?;
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes())
        .map_err(|_| "failed to parse key: PEM_read_bio_PrivateKey() failed".to_owned())?;
    let key = ring::sign::any_supported_type(&key).map_err(|_| unusable(&key))?;
    match keys_match(&CertifiedKey::new(chain, key)) {
        Err(rustls::Error::InconsistentKeys(_)) => Err("failed to parse key: key and certificate do not match".into()),
        Err(_) => Err("failed to parse cert: PEM_read_bio_X509_AUX() failed".into()),
        Ok(()) => Ok(()),
    }
}

/// Has `check` look at an object whose references (`$secret://…`) are as long as what they stand for.
pub(super) fn without_references(
    value: &mut Value,
    check: &mut dyn FnMut(&mut Value) -> Result<(), String>,
) -> Result<(), String> {
    /// Longer than the schema's `minLength`s.
    const LONG_ENOUGH: usize = 128;
    let mut references = Vec::new();
    for_each_text(value, &mut |text| {
        if crypt::is_reference(text) {
            references.push(std::mem::replace(text, "-".repeat(LONG_ENOUGH)));
        } else {
            references.push(String::new());
        }
    });
    let outcome = check(value);
    let mut references = references.into_iter();
    for_each_text(value, &mut |text| {
        if let Some(reference) = references.next().filter(|reference| !reference.is_empty()) {
            *text = reference;
        }
    });
    outcome
}

/// Certificates and keys, in one order.
fn for_each_text(value: &mut Value, visit: &mut dyn FnMut(&mut String)) {
    for name in ["cert", "key", "certs", "keys"] {
        match value.get_mut(name) {
            Some(Value::String(text)) => visit(text),
            Some(Value::Array(items)) => {
                for item in items {
                    if let Value::String(text) = item {
                        visit(text);
                    }
                }
            }
            _ => {}
        }
    }
}

/// Why a key that is DER by its label cannot sign.
fn unusable(key: &PrivateKeyDer<'_>) -> String {
    use x509_parser::der_parser::der::parse_der_sequence;
    match parse_der_sequence(key.secret_der()) {
        Ok(([], _)) => "failed to parse key: only RSA, P-256, P-384 and Ed25519 keys can be used".to_owned(),
        _ => "failed to parse key: PEM_read_bio_PrivateKey() failed".to_owned(),
    }
}

fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    match chain {
        Ok(chain) if !chain.is_empty() => Ok(chain),
        _ => Err("failed to parse cert: PEM_read_bio_X509_AUX() failed".into()),
    }
}
