//! What `ngx.ssl` parses: certificates and keys, which `sock:setclientcert` and a handshake with the client take.

use std::{rc::Rc, sync::Arc};

use base64::Engine;
use rustls::sign::SigningKey;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use super::object;
use crate::{
    error::Result,
    lua::{
        Raise,
        api::{Api, Phases, Stack},
        host::{jwt, pkey},
    },
};

/// A longer text is neither a certificate chain nor a key.
const MAX_TEXT: usize = 256 * 1024;

/// Certificates, the owner's first.
pub struct Chain {
    pub pem: Box<str>,
    pub certificates: Vec<CertificateDer<'static>>,
}

/// A private key.
pub struct Key {
    pub pem: Box<str>,
    pub signing: Arc<dyn SigningKey>,
}

pub fn register(api: &mut Api) -> Result<()> {
    let any = Phases::ANY;
    api.func("native.ssl.chain", any, "chain(PEM or DER) -> certificates, the owner's first | nil", |s| {
        match text(s)?.and_then(chain) {
            Some(chain) => Ok(object::push(s, Rc::new(chain))),
            None => Ok(s.push_nil()),
        }
    })?;
    api.func("native.ssl.key", any, "key(PEM or DER, passphrase?) -> a private key | nil", |s| {
        let passphrase = s.opt_bytes(2)?;
        match text(s)?.and_then(|text| key(text, passphrase)) {
            Some(key) => Ok(object::push(s, Rc::new(key))),
            None => Ok(s.push_nil()),
        }
    })?;
    api.func("native.ssl.chain_der", any, "chain_der(certificates): one behind the other", |s| {
        let chain = object::get::<Chain>(s, 1)?;
        let ders: Vec<&[u8]> = chain.certificates.iter().map(|der| &**der).collect();
        Ok(s.push_bytes(ders.concat()))
    })?;
    api.func("native.ssl.key_der", any, "key_der(key): PKCS #8, PKCS #1 or SEC 1", |s| {
        let key = object::get::<Key>(s, 1)?;
        let parsed = PrivateKeyDer::from_pem_slice(key.pem.as_bytes()).map_err(|e| e.to_string())?;
        Ok(s.push_bytes(parsed.secret_der()))
    })
}

fn text(s: &Stack) -> std::result::Result<Option<&[u8]>, Raise> {
    s.arg_bytes(1).map(|text| Some(text).filter(|text| text.len() <= MAX_TEXT))
}

fn is_pem(text: &[u8]) -> bool {
    memchr::memmem::find(text, b"-----BEGIN ").is_some()
}

fn chain(text: &[u8]) -> Option<Chain> {
    let ders: Vec<Vec<u8>> = match is_pem(text) {
        true => CertificateDer::pem_slice_iter(text).map(|c| c.map(|c| c.to_vec())).collect::<Result<_, _>>().ok()?,
        false => {
            let (mut rest, mut all) = (text, Vec::new());
            while !rest.is_empty() {
                let (after, _) = X509Certificate::from_der(rest).ok()?;
                all.push(rest[..rest.len() - after.len()].to_vec());
                rest = after;
            }
            all
        }
    };
    let sound = !ders.is_empty() && ders.iter().all(|der| X509Certificate::from_der(der).is_ok());
    sound.then(|| Chain {
        pem: ders.iter().map(|der| pem("CERTIFICATE", der)).collect::<String>().into(),
        certificates: ders.into_iter().map(CertificateDer::from).collect(),
    })
}

fn key(text: &[u8], passphrase: Option<&[u8]>) -> Option<Key> {
    let encrypted = jwt::pem(text).filter(|(label, _)| *label == "ENCRYPTED PRIVATE KEY");
    let der = match (is_pem(text), encrypted) {
        (_, Some((_, der))) => PrivateKeyDer::try_from(pkey::decrypted(&der, passphrase?)?.as_bytes().to_vec()).ok()?,
        (true, None) => PrivateKeyDer::from_pem_slice(text).ok()?,
        (false, None) => PrivateKeyDer::try_from(text.to_vec()).ok()?,
    };
    // What nobody could sign with is no key.
    let signing = rustls::crypto::ring::sign::any_supported_type(&der).ok()?;
    let label = match &der {
        PrivateKeyDer::Pkcs1(_) => "RSA PRIVATE KEY",
        PrivateKeyDer::Sec1(_) => "EC PRIVATE KEY",
        _ => "PRIVATE KEY",
    };
    Some(Key { pem: pem(label, der.secret_der()).into(), signing })
}

fn pem(label: &str, der: &[u8]) -> String {
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    format!("-----BEGIN {label}-----\n{text}\n-----END {label}-----\n")
}

/// What a client shows of itself.
pub(super) type Pair = (Rc<Chain>, Rc<Key>);

/// The objects at 2 and 3 as a client's certificate; `None` where both are nil. The error is for the script.
pub(super) fn client_pair(s: &Stack) -> std::result::Result<Option<Pair>, String> {
    let given = |i| !s.is_nil(i) && (s.kind(i) != mlua::ffi::LUA_TBOOLEAN || s.boolean(i));
    match (given(2), given(3)) {
        (false, false) => return Ok(None),
        (true, true) => {}
        _ => return Err("client certificate must be supplied with corresponding private key".into()),
    }
    let chain = object::get::<Chain>(s, 2).map_err(|_| format!("bad cert arg: cdata expected, got {}", s.kind_name(2)));
    let key = object::get::<Key>(s, 3).map_err(|_| format!("bad pkey arg: cdata expected, got {}", s.kind_name(3)));
    Ok(Some((chain?, key?)))
}
