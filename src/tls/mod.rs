//! TLS on both sides: certificates by SNI for clients (`server`), configurations for upstreams (`client`); what an issuer says of a
//! certificate (`ocsp`).
//!
//! rustls with ring: TLS 1.2 and 1.3. What is parsed is kept by the version of the object it came from.

pub mod client;
pub mod hello;
pub mod ocsp;
pub mod scripted;
pub mod server;

use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};

pub use client::{ChainTooLong, client_config, client_config_of, client_config_trusting};
pub use scripted::{Scripts, Watched, store};
pub use server::{Server, ServerOptions};

use crate::error::{Error, Kind, Result};

/// The versions that `names` (`TLSv1.2`) allow and that exist here, and the names that do not.
pub fn versions<'a>(
    names: impl IntoIterator<Item = &'a str>,
) -> (Vec<&'static rustls::SupportedProtocolVersion>, Vec<&'a str>) {
    let (mut known, mut unknown) = (Vec::new(), Vec::new());
    for name in names {
        match name {
            "TLSv1.2" => known.push(&rustls::version::TLS12),
            "TLSv1.3" => known.push(&rustls::version::TLS13),
            other => unknown.push(other),
        }
    }
    (known, unknown)
}

/// The certificates of a PEM text; at least one.
pub(crate) fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    match chain {
        Ok(chain) if chain.is_empty() => Err(Error::config(Kind::Tls).context("no certificate in the PEM text")),
        Ok(chain) => Ok(chain),
        Err(e) => Err(Error::config(Kind::Tls).cause(e).context("parse a certificate")),
    }
}

pub(crate) fn private_key(pem: &str) -> Result<PrivateKeyDer<'static>> {
    PrivateKeyDer::from_pem_slice(pem.as_bytes())
        .map_err(|e| Error::config(Kind::Tls).cause(e).context("parse a private key"))
}
