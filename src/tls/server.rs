//! The server's side: which certificate answers a name, and who the client is.
//!
//! One `Server` per process, so that sessions resume on any worker. Each `ssls` object has its own rustls
//! configuration and session store: a session of one object never resumes on another with other client checks. Names without an
//! object, whose certificates scripts bring, share one; the library resumes a session for the name alone that it was made for.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use imbl::HashMap as Table;
use moka::sync::Cache;
use pcre2::bytes::Regex;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, HandshakeKind, ProtocolVersion, RootCertStore,
    ServerConfig, ServerConnection, SignatureScheme, SupportedProtocolVersion,
    client::danger::HandshakeSignatureValid,
    crypto::{CryptoProvider, ring},
    server::{
        Acceptor, ClientHello, ResolvesServerCert, ServerSessionMemoryCache, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
};
use rustls_pki_types::{CertificateDer, UnixTime};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{LazyConfigAcceptor, StartHandshake, server::TlsStream};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use super::{
    certificates, ocsp, private_key,
    secrets::{self, Secrets},
    versions,
};
use crate::{
    cert::{Lenient, keys_match},
    error::{Error, Kind, Result},
    exchange::{TlsInfo, openssl},
    model::{Id, Object, Ssl},
};

/// Parsed certificates kept; the rest is parsed again when its name is asked for.
const CONFIGS_KEPT: u64 = 10_000;
/// Sessions kept per certificate for clients without tickets.
const SESSIONS_KEPT: usize = 1024;

pub(super) type Ssls = Table<Id, Arc<Object<Ssl>>>;

/// `apisix.ssl` of config.yaml.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// `ssl_protocols`; what rustls does not know is ignored (`versions` says what).
    pub protocols: Vec<Box<str>>,
    /// `ssl_session_tickets`
    pub session_tickets: bool,
    /// For clients that name no host.
    pub fallback_sni: Option<Box<str>>,
    /// What may be spoken, the best first. Empty: nothing is said of it, and whatever the client names goes.
    pub alpn: &'static [&'static [u8]],
}

/// Answers handshakes.
pub struct Server {
    options: ServerOptions,
    provider: Arc<CryptoProvider>,
    configs: Cache<Made, Option<Arc<Prepared>>>,
    /// By the object's uid, of objects that refer to managers of secrets: what served last. It goes on where what a manager says now
    /// cannot, such as a certificate that is renewed already beside a key that is not.
    last_good: Cache<u64, Arc<Prepared>>,
    /// `client.skip_mtls_uri_regex`, by the object's uid; `None`: one of them is no expression.
    skips: Cache<u64, Option<Arc<[Regex]>>>,
    /// The names of the `ssls` seen last.
    index: Mutex<Option<Arc<Index>>>,
    /// Has no certificate: a handshake with it ends with an alert, unless a script brings one.
    bare: Arc<Prepared>,
}

/// What a configuration is made of: the object's uid (one that changed gets a new one), and what managers of secrets have said of its
/// references.
type Made = (u64, Box<[Box<str>]>);

/// An object made ready.
pub(super) struct Prepared {
    pub config: Arc<ServerConfig>,
    pub versions: Vec<&'static SupportedProtocolVersion>,
    pub keys: Arc<Keys>,
    /// Set when the object asks for client certificates: `$ssl_client_verify` is what it says.
    pub verifier: Option<Arc<dyn ClientCertVerifier>>,
    /// What the handshake says of them; it may let all pass.
    pub asking: Option<Arc<dyn ClientCertVerifier>>,
}

/// What a configuration of the TLS library is made of.
pub(super) struct Parts {
    pub versions: Vec<&'static SupportedProtocolVersion>,
    pub verifier: Option<Arc<dyn ClientCertVerifier>>,
    pub resolver: Arc<dyn ResolvesServerCert>,
}

/// Objects by name; of several, the one changed last.
struct Index {
    of: Ssls,
    names: HashMap<Box<str>, Arc<Object<Ssl>>>,
}

impl Server {
    pub fn new(options: ServerOptions) -> Result<Self> {
        let provider = Arc::new(ring::default_provider());
        let (known, unknown) = versions(options.protocols.iter().map(|p| &**p));
        if known.is_empty() {
            let text = format!("apisix.ssl.ssl_protocols: none of {unknown:?} is available; name TLSv1.2 or TLSv1.3");
            return Err(Error::config(Kind::Tls).context(text));
        }
        if !unknown.is_empty() {
            tracing::warn!("apisix.ssl.ssl_protocols: {unknown:?} are not available and ignored");
        }
        let keys = Arc::new(Keys(Vec::new()));
        let parts = Parts { versions: known.clone(), verifier: None, resolver: keys.clone() };
        let config = Arc::new(with_sessions(config_of(&provider, parts)?, &options)?);
        let bare = Prepared { config, versions: known, keys, verifier: None, asking: None };
        Ok(Server {
            options,
            provider,
            configs: Cache::new(CONFIGS_KEPT),
            last_good: Cache::new(CONFIGS_KEPT),
            skips: Cache::new(CONFIGS_KEPT),
            index: Mutex::new(None),
            bare: Arc::new(bare),
        })
    }

    /// Does the handshake. `secrets` is asked for what the name's object refers to. The caller limits its time.
    pub async fn accept<S>(&self, stream: S, ssls: &Ssls, secrets: &dyn Secrets) -> Result<(TlsStream<S>, TlsInfo)>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let start = LazyConfigAcceptor::new(Acceptor::default(), stream).await.map_err(failed)?;
        let sni = start.client_hello().server_name().map(str::to_ascii_lowercase);
        let (ssl, prepared) = match self.choose(sni.as_deref(), ssls, secrets).await {
            Ok(found) => found,
            Err(e) => {
                tracing::error!("{e}");
                self.refuse(start).await;
                return Err(e);
            }
        };
        let stream = start.into_stream(prepared.config.clone()).await.map_err(failed)?;
        let info = info(stream.get_ref().1, sni, Some(ssl), prepared.verifier.as_deref());
        Ok((stream, info))
    }

    /// Ends a handshake with an alert. The error that it gives is one that the caller knows already.
    pub(super) async fn refuse<S: AsyncRead + AsyncWrite + Unpin>(&self, start: StartHandshake<S>) {
        let _ = start.into_stream(self.bare.config.clone()).await;
    }

    /// Whether a request for `host` and `uri` may be served on a connection that began as `info` says; the error is for
    /// the log, the answer is 400. A certificate checked for one name is none for another whose object asks for its own.
    pub fn check_client(&self, info: &TlsInfo, host: &[u8], uri: &[u8], ssls: &Ssls) -> Result<(), String> {
        let sni = info.sni.as_deref().unwrap_or_default();
        let host = std::str::from_utf8(host).unwrap_or_default();
        let asks = |id: Option<&Id>| match self.index(ssls).find(host) {
            Some(other) if other.value.client_ca.is_some() && Some(&other.id) != id => {
                Err(format!("client certificate verified with SNI {sni}, but the host is {host}"))
            }
            _ => Ok(()),
        };
        // A script has brought the certificate.
        let Some(ssl) = &info.ssl else { return asks(None) };
        if ssl.value.client_ca.is_some() && &*info.client_verify != "SUCCESS" && !self.skips(ssl, uri) {
            return Err(match &*info.client_verify {
                "NONE" => "client certificate was not present".into(),
                failed => format!("client certificate verification is not passed: {failed}"),
            });
        }
        if host == sni { Ok(()) } else { asks(Some(&ssl.id)) }
    }

    fn skips(&self, ssl: &Arc<Object<Ssl>>, uri: &[u8]) -> bool {
        // A match that fails (a limit was hit) does not skip.
        self.skips_of(ssl).is_some_and(|skips| skips.iter().any(|r| r.is_match(uri).unwrap_or(false)))
    }

    fn skips_of(&self, ssl: &Arc<Object<Ssl>>) -> Option<Arc<[Regex]>> {
        self.skips.get_with(ssl.uid, || {
            let compiled: Result<Arc<[Regex]>, _> =
                ssl.value.skip_mtls_uri_regex.iter().map(|r| Regex::new(r)).collect();
            compiled.inspect_err(|e| tracing::error!("ssls/{}: client.skip_mtls_uri_regex: {e}", ssl.id)).ok()
        })
    }

    /// `name`: the one that was asked for, for the log.
    fn prepared(&self, ssl: &Arc<Object<Ssl>>, fetched: Box<[Box<str>]>, name: &str) -> Option<Arc<Prepared>> {
        let made: Made = (ssl.uid, fetched);
        if let Some(known) = self.configs.get(&made) {
            return known;
        }
        let prepare = || {
            tracing::info!("parsing cert for sni: {name}");
            tracing::info!("parsing priv key for sni: {name}");
            self.skips_of(ssl)?;
            match self.prepare(&ssl.value, &made.1).map(Arc::new) {
                Ok(prepared) if made.1.is_empty() => Some(prepared),
                Ok(prepared) => {
                    self.last_good.insert(ssl.uid, prepared.clone());
                    Some(prepared)
                }
                Err(e) => {
                    let last = self.last_good.get(&ssl.uid);
                    let goes_on = if last.is_some() { "; what was served before goes on" } else { "" };
                    tracing::error!("ssls/{}: {e}{goes_on}", ssl.id);
                    last
                }
            }
        };
        self.configs.get_with_by_ref(&made, prepare)
    }

    /// What answers a name. Waits only where a manager of secrets has to be asked.
    pub(super) async fn choose(
        &self,
        sni: Option<&str>,
        ssls: &Ssls,
        secrets: &dyn Secrets,
    ) -> Result<(Arc<Object<Ssl>>, Arc<Prepared>)> {
        let no = |text: String| Error::client(Kind::Tls).context(text);
        let name = sni.or(self.options.fallback_sni.as_deref()).ok_or_else(|| {
            no("failed to find SNI: please check if the client requests via IP or uses an outdated protocol. \
                If you need to report an issue, provide a packet capture file of the TLS handshake."
                .into())
        })?;
        let index = self.index(ssls);
        let ssl = index.find(name).ok_or_else(|| no(format!("failed to match any SSL certificate by SNI: {name}")))?;
        let fetched = secrets::fetched(texts(&ssl.value), secrets).await;
        let fetched = fetched.map_err(|e| e.context(format!("ssls/{} cannot be served", ssl.id)))?;
        let prepared = self.prepared(&ssl, fetched, name);
        let prepared = prepared.ok_or_else(|| no(format!("ssls/{} cannot be served", ssl.id)))?;
        Ok((ssl, prepared))
    }

    /// The object that a name has, whether or not it can be served.
    pub(super) fn find(&self, sni: Option<&str>, ssls: &Ssls) -> Option<Arc<Object<Ssl>>> {
        self.index(ssls).find(sni.or(self.options.fallback_sni.as_deref())?)
    }

    fn index(&self, ssls: &Ssls) -> Arc<Index> {
        // Nothing in here panics; if it did, the index would still be whole.
        let mut kept = self.index.lock().unwrap_or_else(|e| e.into_inner());
        match &*kept {
            Some(index) if index.of.ptr_eq(ssls) => index.clone(),
            _ => kept.insert(Arc::new(Index::of(ssls))).clone(),
        }
    }

    /// `fetched`: what managers of secrets have said of those among its texts that refer to them, in their order.
    fn prepare(&self, ssl: &Ssl, fetched: &[Box<str>]) -> Result<Prepared> {
        let mut fetched = fetched.iter();
        let texts: Vec<&str> = texts(ssl)
            .map(|text| if secrets::is_managed(text) { fetched.next().map_or(text, |f| &**f) } else { text })
            .collect();
        let (pairs, ca) = texts.split_at(ssl.pairs.len() * 2);
        let keys = pairs.chunks_exact(2).map(|pair| self.key_pair(pair[0], pair[1])).collect::<Result<Vec<_>>>()?;
        let versions = self.versions(ssl)?;
        let ca = ca.first().zip(ssl.client_ca.as_ref());
        let verifier = ca.map(|(ca, (_, depth))| self.verifier(ca, *depth, ssl)).transpose()?;
        let asking = verifier.clone().map(|verifier| match ssl.skip_mtls_uri_regex.is_empty() {
            true => verifier,
            // The path decides whether a certificate is needed, and it comes later.
            false => Arc::new(Lax(verifier)),
        });
        let keys = Arc::new(Keys(keys));
        let parts = Parts { versions: versions.clone(), verifier: asking.clone(), resolver: keys.clone() };
        let config = Arc::new(with_sessions(config_of(&self.provider, parts)?, &self.options)?);
        Ok(Prepared { config, versions, keys, verifier, asking })
    }

    fn versions(&self, ssl: &Ssl) -> Result<Vec<&'static SupportedProtocolVersion>> {
        let names = if ssl.protocols.is_empty() { &self.options.protocols } else { &ssl.protocols };
        let (known, unknown) = versions(names.iter().map(|n| &**n));
        if known.is_empty() {
            let text = format!("none of {unknown:?} is available: only TLSv1.2 and TLSv1.3 are");
            return Err(Error::config(Kind::Tls).context(text));
        }
        if !ssl.protocols.is_empty() && !unknown.is_empty() {
            tracing::warn!("ssl_protocols {unknown:?} are not available and ignored: only TLSv1.2 and TLSv1.3 are");
        }
        Ok(known)
    }

    /// For names that no object is for.
    pub(super) fn bare(&self) -> Arc<Prepared> {
        self.bare.clone()
    }

    pub(super) fn provider(&self) -> &Arc<CryptoProvider> {
        &self.provider
    }

    fn key_pair(&self, cert: &str, key: &str) -> Result<Arc<CertifiedKey>> {
        let key = self.provider.key_provider.load_private_key(private_key(key)?);
        let key = key.map_err(|e| Error::config(Kind::Tls).cause(e).context("load a private key"))?;
        let pair = CertifiedKey::new(certificates(cert)?, key);
        match keys_match(&pair) {
            // Those of an object belong together when it is stored; what references stand for is seen here first.
            Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::KeyMismatch)) => {
                Err(Error::config(Kind::Tls).context("key and certificate do not match"))
            }
            _ => Ok(Arc::new(pair)),
        }
    }

    fn verifier(&self, ca: &str, depth: u8, ssl: &Ssl) -> Result<Arc<dyn ClientCertVerifier>> {
        let (mut roots, trusted) = (RootCertStore::empty(), certificates(ca)?);
        for cert in &trusted {
            roots.add(cert.clone()).map_err(|e| Error::config(Kind::Tls).cause(e).context("client.ca"))?;
        }
        let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), self.provider.clone());
        let builder = if ssl.skip_mtls_uri_regex.is_empty() { builder } else { builder.allow_unauthenticated() };
        let inner = builder.build().map_err(|e| Error::config(Kind::Tls).cause(e).context("client.ca"))?;
        let algorithms = self.provider.signature_verification_algorithms;
        Ok(Arc::new(Bounded { inner: Arc::new(Lenient { inner, trusted, algorithms }), depth }))
    }
}

impl Index {
    fn of(ssls: &Ssls) -> Self {
        let mut names: HashMap<Box<str>, Arc<Object<Ssl>>> = HashMap::new();
        for ssl in ssls.values().filter(|s| s.value.enabled && !s.value.is_client) {
            for sni in &ssl.value.snis {
                let older = names.get(sni).is_none_or(|other| other.mod_revision < ssl.mod_revision);
                if older {
                    names.insert(sni.clone(), ssl.clone());
                }
            }
        }
        Index { of: ssls.clone(), names }
    }

    /// `www.foo.com`, else `*.foo.com`, which stands for one label, else `*`.
    fn find(&self, name: &str) -> Option<Arc<Object<Ssl>>> {
        let wildcard = || self.names.get(&*format!("*.{}", name.split_once('.')?.1));
        self.names.get(name).or_else(wildcard).or_else(|| self.names.get("*")).cloned()
    }
}

/// What of an object may be a reference: its pairs, then the authority of its clients.
fn texts(ssl: &Ssl) -> impl Iterator<Item = &str> {
    let pairs = ssl.pairs.iter().flat_map(|(cert, key)| [&**cert, &**key]);
    pairs.chain(ssl.client_ca.iter().map(|(ca, _)| &**ca))
}

/// A configuration without sessions and protocols.
pub(super) fn config_of(provider: &Arc<CryptoProvider>, parts: Parts) -> Result<ServerConfig> {
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&parts.versions)
        .map_err(|e| Error::config(Kind::Tls).cause(e))?;
    let builder = match parts.verifier {
        Some(verifier) => builder.with_client_cert_verifier(verifier),
        None => builder.with_no_client_auth(),
    };
    Ok(builder.with_cert_resolver(parts.resolver))
}

/// Adds what connections share, and what is spoken on them.
fn with_sessions(mut config: ServerConfig, options: &ServerOptions) -> Result<ServerConfig> {
    config.alpn_protocols = options.alpn.iter().map(|protocol| protocol.to_vec()).collect();
    config.session_storage = ServerSessionMemoryCache::new(SESSIONS_KEPT);
    if options.session_tickets {
        config.ticketer = ring::Ticketer::new().map_err(|e| Error::config(Kind::Tls).cause(e))?;
    }
    Ok(config)
}

/// In the words of nginx and OpenSSL, where they have some: people look for them in error.log.
pub(super) fn failed(e: std::io::Error) -> Error {
    let text = match e.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::NoCertificatesPresented) => "peer did not return a certificate".to_owned(),
        Some(rustls::Error::InvalidCertificate(why)) => format!("certificate verify failed: {why}"),
        Some(why) => why.to_string(),
        None if e.kind() == std::io::ErrorKind::UnexpectedEof => {
            return Error::client(Kind::Tls).context("peer closed connection in SSL handshake while SSL handshaking");
        }
        None => e.to_string(),
    };
    Error::client(Kind::Tls).context(format!("SSL_do_handshake() failed (SSL: {text}) while SSL handshaking"))
}

/// The key pairs of one object: the first that the client can check.
#[derive(Debug)]
pub(super) struct Keys(pub Vec<Arc<CertifiedKey>>);

impl Keys {
    /// The same with an OCSP response beside the certificate that it is about; the first where none can be told.
    pub fn stapled(&self, ocsp: Vec<u8>) -> Keys {
        let mut keys = self.0.clone();
        let is_about = |pair: &Arc<CertifiedKey>| pair.cert.first().is_some_and(|cert| ocsp::is_about(&ocsp, cert));
        let at = keys.iter().position(is_about).unwrap_or_default();
        if let Some(pair) = keys.get_mut(at) {
            *pair = Arc::new(CertifiedKey { ocsp: Some(ocsp), ..(**pair).clone() });
        }
        Keys(keys)
    }
}

impl ResolvesServerCert for Keys {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.iter().find(|k| k.key.choose_scheme(hello.signature_schemes()).is_some()).cloned()
    }
}

/// Limits how many certificates stand between the client's and the CA's (`client.depth`).
#[derive(Debug)]
pub(super) struct Bounded {
    pub inner: Arc<dyn ClientCertVerifier>,
    pub depth: u8,
}

/// Asks for a certificate and lets every answer pass: what it is worth is decided later. The proof that the client has the key is still required.
#[derive(Debug)]
pub(super) struct Lax(pub Arc<dyn ClientCertVerifier>);

macro_rules! forward {
    ($inner:tt) => {
        fn root_hint_subjects(&self) -> &[DistinguishedName] {
            self.$inner.root_hint_subjects()
        }

        fn verify_tls12_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            self.$inner.verify_tls12_signature(message, cert, dss)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            self.$inner.verify_tls13_signature(message, cert, dss)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.$inner.supported_verify_schemes()
        }

        fn client_auth_mandatory(&self) -> bool {
            self.$inner.client_auth_mandatory()
        }
    };
}

impl ClientCertVerifier for Bounded {
    forward!(inner);

    fn verify_client_cert(
        &self,
        cert: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        if intermediates.len() > usize::from(self.depth) {
            return Err(rustls::Error::General("certificate chain too long".into()));
        }
        self.inner.verify_client_cert(cert, intermediates, now)
    }
}

impl ClientCertVerifier for Lax {
    forward!(0);

    fn verify_client_cert(
        &self,
        _cert: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }
}

pub(super) fn info(
    connection: &ServerConnection,
    sni: Option<String>,
    ssl: Option<Arc<Object<Ssl>>>,
    verifier: Option<&dyn ClientCertVerifier>,
) -> TlsInfo {
    let chain = connection.peer_certificates().unwrap_or_default();
    TlsInfo {
        sni: sni.map(Into::into),
        protocol: match connection.protocol_version() {
            Some(ProtocolVersion::TLSv1_2) => "TLSv1.2",
            _ => "TLSv1.3",
        },
        cipher: connection
            .negotiated_cipher_suite()
            .and_then(|s| openssl::cipher(s.suite().into()))
            .unwrap_or("")
            .into(),
        session_reused: connection.handshake_kind() == Some(HandshakeKind::Resumed),
        client_cert: chain.first().map(|c| c.as_ref().into()),
        client_verify: client_verify(chain, verifier),
        ssl,
        hello: None,
        alpn: connection.alpn_protocol().map(Into::into),
        curve: connection.negotiated_key_exchange_group().map(|group| group.name().into()),
        session_id: None,
    }
}

/// `$ssl_client_verify`. Checked here once more, since a lax handshake and a resumed one did not.
fn client_verify(chain: &[CertificateDer<'_>], verifier: Option<&dyn ClientCertVerifier>) -> Box<str> {
    let (Some((cert, intermediates)), Some(verifier)) = (chain.split_first(), verifier) else { return "NONE".into() };
    match verifier.verify_client_cert(cert, intermediates, UnixTime::now()) {
        Ok(_) => "SUCCESS".into(),
        Err(e) => format!("FAILED:{}", reason(&e, cert)).into(),
    }
}

/// Why a certificate is not good, in OpenSSL's words where it has them.
fn reason(e: &rustls::Error, cert: &[u8]) -> String {
    let text = match e {
        rustls::Error::InvalidCertificate(e) => match e {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => "certificate has expired",
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                "certificate is not yet valid"
            }
            CertificateError::UnknownIssuer if is_self_issued(cert) => "self-signed certificate",
            CertificateError::UnknownIssuer => "unable to verify the first certificate",
            CertificateError::BadSignature => "certificate signature failure",
            CertificateError::Revoked => "certificate revoked",
            CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
                "unsupported certificate purpose"
            }
            _ => return e.to_string(),
        },
        rustls::Error::General(text) => text,
        _ => return e.to_string(),
    };
    text.to_owned()
}

fn is_self_issued(cert: &[u8]) -> bool {
    X509Certificate::from_der(cert).is_ok_and(|(_, cert)| cert.subject().as_raw() == cert.issuer().as_raw())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server() -> Server {
        let protocols = vec!["TLSv1.3".into()];
        Server::new(ServerOptions { protocols, session_tickets: false, fallback_sni: None, alpn: &[b"http/1.1"] })
            .expect("valid")
    }

    #[test]
    fn objects_made_ready_are_kept_up_to_a_number() {
        let server = server();
        for uid in 0..CONFIGS_KEPT + 100 {
            server.configs.insert((uid, Box::default()), None);
        }
        server.configs.run_pending_tasks();
        assert_eq!(server.configs.entry_count(), CONFIGS_KEPT);
    }

    #[test]
    fn sessions_are_kept_up_to_a_number_and_the_newest_stay() {
        let pair = rcgen::generate_simple_self_signed(["a.test".to_owned()]).expect("a certificate");
        let ssl = Ssl {
            snis: vec!["a.test".into()],
            pairs: vec![(pair.cert.pem().into(), pair.signing_key.serialize_pem().into())],
            client_ca: None,
            skip_mtls_uri_regex: vec![],
            protocols: vec![],
            enabled: true,
            is_client: false,
        };
        let sessions = server().prepare(&ssl, &[]).expect("valid").config.session_storage.clone();
        let key = |n: usize| n.to_be_bytes().to_vec();
        let all = SESSIONS_KEPT * 2;
        assert!((0..all).all(|n| sessions.put(key(n), b"session".to_vec())));
        assert!(sessions.get(&key(all - 1)).is_some() && sessions.get(&key(0)).is_none());
        let kept = (0..all).filter(|n| sessions.get(&key(*n)).is_some()).count();
        assert!((1..=SESSIONS_KEPT).contains(&kept), "{kept}");
    }
}
