//! A TLS handshake as its scripts see it: what the client said, and what they decide.

use std::sync::Arc;

use rustls::sign::SigningKey;
use rustls_pki_types::CertificateDer;

/// State of one handshake, from the client's first message to the end of `ssl_session_store_by_lua`.
#[derive(Default)]
pub struct Handshake {
    /// The ClientHello without its record and message headers (RFC 8446, 4.1.2).
    pub hello: Vec<u8>,
    /// Names of the versions that may be agreed on: what a script has set, or else, once the name's object is known, the
    /// configuration's.
    pub protocols: Vec<Box<str>>,
    /// A script has taken the configuration's certificate away.
    pub cleared: bool,
    /// The certificate that a script has set, and those that stand above it.
    pub chain: Option<Vec<CertificateDer<'static>>>,
    pub key: Option<Arc<dyn SigningKey>>,
    /// What is stapled to the certificate.
    pub ocsp: Option<Vec<u8>>,
    pub verify: Option<VerifyClient>,
    /// The configuration asks for the client's certificate by itself, and no script changes how.
    pub asks_already: bool,
    /// What the client offers to resume, or what the session is that was made.
    pub session_id: Vec<u8>,
    /// A session in the gateway's own form: found by `ssl_session_fetch_by_lua`, or to be kept by `ssl_session_store_by_lua`.
    pub session: Option<Vec<u8>>,
}

/// What a script asks of the client's certificate.
pub struct VerifyClient {
    /// Named to the client, and trusted.
    pub authorities: Vec<CertificateDer<'static>>,
    /// Trusted, not named.
    pub trusted: Vec<CertificateDer<'static>>,
    /// How many certificates may stand between the client's and the authority's.
    pub depth: u8,
}
