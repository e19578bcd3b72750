//! The client's side: configurations for https upstreams, made once per (verify, client certificate, ALPN).

use std::{
    path::Path,
    sync::{Arc, LazyLock, OnceLock},
};

use moka::sync::Cache;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, OtherError, RootCertStore, SignatureScheme,
    SupportedCipherSuite,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring},
};
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, ServerName, UnixTime, pem::PemObject};

use super::{certificates, private_key, versions};
use crate::{
    cert::{self, verify_tls12_signature, verify_tls13_signature},
    conf::locations::SocketTls,
    error::{Error, Kind, Result},
};

/// Client certificates in use at once; more are parsed again.
const CONFIGS_KEPT: u64 = 1024;

/// Where distributions keep the certificates that everybody trusts.
const SYSTEM_BUNDLES: [&str; 5] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    verify: bool,
    /// PEM of the authorities that are trusted in place of the configuration's.
    roots: Option<Box<str>>,
    /// PEM of certificate and key.
    pair: Option<(Box<str>, Box<str>)>,
    alpn: Box<[&'static [u8]]>,
    /// A location's `lua_ssl_…`, by address: `Known` keeps it from being another's.
    own: usize,
}

/// A configuration, and what its key has the address of: a reload frees the locations, and an address may be taken again.
#[derive(Clone)]
struct Known {
    config: Arc<ClientConfig>,
    _own: Option<Arc<SocketTls>>,
}

static CONFIGS: LazyLock<Cache<Key, Known>> = LazyLock::new(|| Cache::new(CONFIGS_KEPT));
static TRUSTED: OnceLock<Arc<RootCertStore>> = OnceLock::new();

/// Whom upstreams' certificates must chain to: `ssl_trusted_certificate`, a path or `system`; several with
/// commas. Once, before the first request; without it the system's. Says how many certificates there are.
pub fn trust(paths: &str) -> Result<usize> {
    let mut store = RootCertStore::empty();
    for path in paths.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        match path {
            "system" => add_system(&mut store),
            path => add_bundle(&mut store, Path::new(path))?,
        }
    }
    let len = store.len();
    let _ = TRUSTED.set(Arc::new(store));
    Ok(len)
}

fn trusted() -> Arc<RootCertStore> {
    let system = || {
        let mut store = RootCertStore::empty();
        add_system(&mut store);
        Arc::new(store)
    };
    TRUSTED.get_or_init(system).clone()
}

fn add_system(store: &mut RootCertStore) {
    if let Some(path) = SYSTEM_BUNDLES.iter().map(Path::new).find(|p| p.exists())
        && let Err(e) = add_bundle(store, path)
    {
        tracing::warn!("{e}");
    }
}

fn add_bundle(store: &mut RootCertStore, path: &Path) -> Result<()> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let certs = read
        .map_err(|e| Error::config(Kind::Tls).cause(e).context(format!("read certificates of {}", path.display())))?;
    store.add_parsable_certificates(certs);
    Ok(())
}

/// The configuration for an upstream. `pair`: PEM of a client certificate and its key. Blocking and slow only when it
/// is not cached.
pub fn client_config(verify: bool, pair: Option<(&str, &str)>, alpn: &[&'static [u8]]) -> Result<Arc<ClientConfig>> {
    let key = Key { verify, roots: None, pair: pair.map(|(c, k)| (c.into(), k.into())), alpn: alpn.into(), own: 0 };
    cached(key, pair, None)
}

/// One for sockets of scripts of a location that says how they speak TLS. `pair`: a script's own, in place of the location's.
pub fn client_config_of(own: &Arc<SocketTls>, verify: bool, pair: Option<(&str, &str)>) -> Result<Arc<ClientConfig>> {
    let pair_key = pair.map(|(c, k)| (c.into(), k.into()));
    let key = Key { verify, roots: None, pair: pair_key, alpn: [].into(), own: Arc::as_ptr(own) as usize };
    cached(key, pair.or(own.pair.as_ref().map(|(c, k)| (&**c, &**k))), Some(own))
}

/// One that verifies against these authorities, in PEM, and no others. `own`: what a location says beside that.
pub fn client_config_trusting(
    roots: &str,
    own: Option<&Arc<SocketTls>>,
    pair: Option<(&str, &str)>,
) -> Result<Arc<ClientConfig>> {
    let pair_key = pair.map(|(c, k)| (c.into(), k.into()));
    let address = own.map_or(0, |own| Arc::as_ptr(own) as usize);
    let key = Key { verify: true, roots: Some(roots.into()), pair: pair_key, alpn: [].into(), own: address };
    let pair = pair.or(own.and_then(|own| own.pair.as_ref()).map(|(c, k)| (&**c, &**k)));
    cached(key, pair, own)
}

fn cached(key: Key, pair: Option<(&str, &str)>, own: Option<&Arc<SocketTls>>) -> Result<Arc<ClientConfig>> {
    if let Some(known) = CONFIGS.get(&key) {
        return Ok(known.config);
    }
    let roots = key.roots.as_deref().or(own.and_then(|own| own.trusted.as_deref()));
    let roots = roots.map(store_of).transpose()?.unwrap_or_else(trusted);
    // Its list is one of the authorities that the location trusts.
    let crl = own.and_then(|own| own.crl.as_deref()).filter(|_| key.roots.is_none());
    let config = Arc::new(build(key.verify.then_some(roots), crl, pair, &key.alpn, own.map(|own| &**own))?);
    CONFIGS.insert(key, Known { config: config.clone(), _own: own.cloned() });
    Ok(config)
}

fn store_of(pem: &str) -> Result<Arc<RootCertStore>> {
    let mut store = RootCertStore::empty();
    for cert in certificates(pem)? {
        store.add(cert).map_err(|e| Error::config(Kind::Tls).cause(e).context("a trusted certificate"))?;
    }
    Ok(Arc::new(store))
}

/// `roots`: whom certificates must chain to; without them each is taken. `crl`: what they have revoked, in PEM.
fn build(
    roots: Option<Arc<RootCertStore>>,
    crl: Option<&str>,
    pair: Option<(&str, &str)>,
    alpn: &[&'static [u8]],
    own: Option<&SocketTls>,
) -> Result<ClientConfig> {
    let provider = Arc::new(provider(own.and_then(|own| own.ciphers.as_deref())));
    let failed = |e: rustls::Error| Error::config(Kind::Tls).cause(e).context("TLS to the upstream");
    let builder = ClientConfig::builder_with_provider(provider.clone());
    let named = own.map(|own| &own.protocols[..]).filter(|named| !named.is_empty());
    let builder = match named {
        None => builder.with_safe_default_protocol_versions(),
        Some(named) => builder.with_protocol_versions(&versions(named.iter().map(|name| &**name)).0),
    };
    let builder = builder.map_err(failed)?;
    let depth = own.map(|own| own.depth);
    let builder = match roots {
        // Nobody is trusted: nothing else matters.
        Some(roots) if roots.is_empty() || (crl.is_none() && depth.is_none()) => builder.with_root_certificates(roots),
        Some(roots) => {
            let inner = verifier(roots.clone(), crl, &provider)?;
            let algorithms = provider.signature_verification_algorithms;
            let verifier = Shallow { inner, roots, algorithms, depth: depth.unwrap_or(usize::MAX) };
            builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier))
        }
        None => builder.dangerous().with_custom_certificate_verifier(Arc::new(Anyone(provider))),
    };
    let mut config = match pair {
        Some((cert, key)) => {
            let own = cert::pair(certificates(cert)?, private_key(key)?, builder.crypto_provider()).map_err(failed)?;
            builder.with_client_cert_resolver(own)
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    Ok(config)
}

/// What the library has, or of TLS 1.2 only suites of these numbers, in their order.
fn provider(ciphers: Option<&[u16]>) -> CryptoProvider {
    let mut provider = ring::default_provider();
    if let Some(ciphers) = ciphers {
        let place = |suite: &SupportedCipherSuite| ciphers.iter().position(|n| *n == u16::from(suite.suite()));
        provider.cipher_suites.retain(|suite| suite.tls13().is_some() || place(suite).is_some());
        provider.cipher_suites.sort_by_key(place);
    }
    provider
}

fn verifier(
    roots: Arc<RootCertStore>,
    crl: Option<&str>,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<WebPkiServerVerifier>> {
    let failed = "lua_ssl_crl";
    let mut builder = WebPkiServerVerifier::builder_with_provider(roots, provider.clone());
    if let Some(crl) = crl {
        let revoked = CertificateRevocationListDer::pem_slice_iter(crl.as_bytes()).collect::<Result<Vec<_>, _>>();
        let revoked = revoked.map_err(|e| Error::config(Kind::Tls).cause(e).context(failed))?;
        // As OpenSSL does for the server's own certificate: those above it are the authorities'.
        builder = builder.with_crls(revoked).only_check_end_entity_revocation();
    }
    builder.build().map_err(|e| Error::config(Kind::Tls).cause(e).context(failed))
}

/// The way from a certificate to an authority that is trusted is longer than `lua_ssl_verify_depth`.
#[derive(Debug)]
pub struct ChainTooLong;

impl std::fmt::Display for ChainTooLong {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("certificate chain too long")
    }
}

impl std::error::Error for ChainTooLong {}

/// Verifies as the library does, and then how many intermediates stand between a certificate and an authority: at most `depth`,
/// neither of the two counted (OpenSSL's SSL_CTX_set_verify_depth).
#[derive(Debug)]
struct Shallow {
    inner: Arc<WebPkiServerVerifier>,
    roots: Arc<RootCertStore>,
    algorithms: WebPkiSupportedAlgorithms,
    depth: usize,
}

impl Shallow {
    /// Whether some way is short enough. The library tells no way that it has found, so they are looked for once more.
    fn has_short_way(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<bool, webpki::Error> {
        let short = |path: &webpki::VerifiedPath<'_>| match path.intermediate_certificates().count() <= self.depth {
            true => Ok(()),
            false => Err(webpki::Error::MaximumPathDepthExceeded),
        };
        let cert = webpki::EndEntityCert::try_from(end_entity)?;
        let usage = webpki::KeyUsage::server_auth();
        let (all, roots) = (self.algorithms.all, &self.roots.roots);
        let way = cert.verify_for_usage(all, roots, intermediates, now, usage, None, Some(&short));
        Ok(way.is_ok())
    }
}

impl ServerCertVerifier for Shallow {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let verified = self.inner.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)?;
        // No way has more of them than the server has sent.
        let short =
            intermediates.len() <= self.depth || self.has_short_way(end_entity, intermediates, now).unwrap_or(false);
        match short {
            true => Ok(verified),
            false => Err(CertificateError::Other(OtherError(Arc::new(ChainTooLong))).into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// Takes any certificate: `tls.verify` is off unless it is asked for, as in APISIX and nginx.
#[derive(Debug)]
struct Anyone(Arc<CryptoProvider>);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{conf::ciphers, exchange::openssl};

    #[test]
    fn lists_of_ciphers_know_the_suites_of_the_library() {
        let of_12 = |provider: &CryptoProvider| {
            let suites = provider.cipher_suites.iter().filter(|suite| suite.tls13().is_none());
            suites.map(|suite| u16::from(suite.suite())).collect::<Vec<_>>()
        };
        let all = ring::default_provider();
        let numbers = of_12(&all);
        assert_eq!(ciphers::suites("ALL").expect("a list").len(), numbers.len());
        for number in numbers.iter().rev() {
            let name = openssl::cipher(*number).expect("a name");
            assert_eq!(ciphers::suites(name), Ok(vec![*number]), "{name}");
        }
        let backwards: Vec<_> = numbers.iter().rev().copied().collect();
        let chosen = provider(Some(&backwards[1..]));
        assert_eq!(of_12(&chosen), backwards[1..]);
        assert_eq!(
            chosen.cipher_suites.len() + 1,
            all.cipher_suites.len(),
            "those of TLS 1.3 are not the list's to choose"
        );
        assert!(chosen.cipher_suites[0].tls13().is_some());
    }

    #[test]
    fn an_address_in_a_key_stays_that_of_its_location() {
        let (trusted, crl, pair, protocols, ciphers) = Default::default();
        let own = Arc::new(SocketTls { trusted, crl, pair, protocols, ciphers, depth: 1 });
        let first = Arc::downgrade(&own);
        let config = client_config_of(&own, true, None).expect("a configuration");
        drop(own);
        let kept = first.upgrade().expect("nobody else gets its address");
        assert!(Arc::ptr_eq(&config, &client_config_of(&kept, true, None).expect("the same")));
    }

    #[test]
    fn configurations_are_kept_up_to_a_number() {
        let config = client_config(false, None, &[]).expect("a configuration");
        assert!(Arc::ptr_eq(&config, &client_config(false, None, &[]).expect("the same")));
        for i in 0..CONFIGS_KEPT + 100 {
            let key = Key {
                verify: false,
                roots: None,
                pair: Some((i.to_string().into(), "".into())),
                alpn: [].into(),
                own: 0,
            };
            CONFIGS.insert(key, Known { config: config.clone(), _own: None });
        }
        CONFIGS.run_pending_tasks();
        let kept = CONFIGS.entry_count();
        assert!((1..=CONFIGS_KEPT).contains(&kept), "{kept}");
        client_config(true, None, &[b"h2"]).expect("one more is made, kept or not");
    }
}
