//! The Admin API over TLS (mtls.md): one certificate, and clients that must have one of a CA where `admin_ssl_ca_cert` names it.

use std::{fs, path::Path, sync::Arc};

use rustls::{RootCertStore, ServerConfig, crypto::ring, server::WebPkiClientVerifier};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use crate::{
    cert::{self, Lenient},
    conf::AdminTls,
    error::{Error, Kind, Result},
    tls::{certificates, private_key},
};

/// What a client without a certificate reads, as nginx says it, and one that speaks no TLS.
pub(super) const NO_CERTIFICATE: &str = "No required SSL certificate was sent";
pub(super) const PLAIN: &str = "The plain HTTP request was sent to HTTPS port";
/// The first byte of a TLS connection: a record of the handshake (RFC 8446, section 5.1).
const HANDSHAKE: u8 = 22;

pub(super) fn page(why: &str) -> String {
    format!(
        "<html>\r\n<head><title>400 {why}</title></head>\r\n<body>\r\n<center><h1>400 Bad Request</h1></center>\r\n\
         <center>{why}</center>\r\n</body>\r\n</html>\r\n"
    )
}

/// Whether a client begins as TLS does; waits for its first byte. The caller limits the time.
pub(super) async fn begins(stream: &TcpStream) -> std::io::Result<bool> {
    let mut first = [0];
    Ok(stream.peek(&mut first).await? == 1 && first[0] == HANDSHAKE)
}

/// Answers handshakes.
#[derive(Clone)]
pub struct Tls {
    acceptor: TlsAcceptor,
    /// Clients must have a certificate.
    mutual: bool,
}

impl Tls {
    /// Reads the files.
    pub fn open(files: &AdminTls) -> Result<Tls> {
        let provider = Arc::new(ring::default_provider());
        let broken = |e: rustls::Error| Error::config(Kind::Tls).cause(e).context(at("admin_ssl_cert", &files.cert));
        let chain = certificates(&text("admin_ssl_cert", &files.cert)?)
            .map_err(|e| e.context(at("admin_ssl_cert", &files.cert)))?;
        let key = private_key(&text("admin_ssl_cert_key", &files.key)?)
            .map_err(|e| e.context(at("admin_ssl_cert_key", &files.key)))?;
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(broken)?;
        let builder = match &files.client_ca {
            None => builder.with_no_client_auth(),
            Some(ca) => {
                let wrong = |e: Error| e.context(at("admin_ssl_ca_cert", ca));
                let (mut roots, mut trusted) = (RootCertStore::empty(), Vec::new());
                for certificate in certificates(&text("admin_ssl_ca_cert", ca)?).map_err(wrong)? {
                    roots.add(certificate.clone()).map_err(|e| wrong(Error::config(Kind::Tls).cause(e)))?;
                    trusted.push(certificate);
                }
                // One without a certificate is told so over HTTP, as nginx does.
                let algorithms = provider.signature_verification_algorithms;
                let inner = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
                    .allow_unauthenticated()
                    .build()
                    .map_err(|e| wrong(Error::config(Kind::Tls).cause(e)))?;
                builder.with_client_cert_verifier(Arc::new(Lenient { inner, trusted, algorithms }))
            }
        };
        let config = builder.with_cert_resolver(cert::pair(chain, key, &provider).map_err(broken)?);
        Ok(Tls { acceptor: TlsAcceptor::from(Arc::new(config)), mutual: files.client_ca.is_some() })
    }

    /// Does the handshake. The caller limits its time.
    pub(super) async fn accept(&self, stream: TcpStream) -> std::io::Result<TlsStream<TcpStream>> {
        self.acceptor.accept(stream).await
    }

    /// Whether the client has shown what it must.
    pub(super) fn lets_in(&self, stream: &TlsStream<TcpStream>) -> bool {
        !self.mutual || stream.get_ref().1.peer_certificates().is_some_and(|chain| !chain.is_empty())
    }
}

fn at(key: &str, path: &Path) -> String {
    format!("deployment.admin.admin_api_mtls.{key}: {}", path.display())
}

fn text(key: &str, path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|e| Error::config(Kind::Io).cause(e).context(at(key, path)))
}
