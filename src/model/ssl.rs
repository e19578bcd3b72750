//! `ssls`: certificates by SNI, and client certificates for upstreams.

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
