//! Handshakes in which scripts have a say: `ssl_client_hello_by_lua`, `ssl_session_fetch_by_lua`, `ssl_certificate_by_lua`,
//! `ssl_session_store_by_lua`.
//!
//! Each runs between two steps of the TLS library and may wait. The configuration of the connection is made of what they decided
//! and of the object that its name has, if any.

use std::{
    cell::Cell,
    future::poll_fn,
    rc::Rc,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, HandshakeKind, ProtocolVersion, RootCertStore,
    ServerConfig, ServerConnection, SignatureAlgorithm, SignatureScheme, SupportedProtocolVersion,
    client::danger::HandshakeSignatureValid,
    crypto::CryptoProvider,
    server::{
        Acceptor, NoServerSessionStorage, ResolvesServerCert, StoresServerSessions, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::{CertifiedKey, Signer, SigningKey, SingleCertAndKey},
};
use rustls_pki_types::{CertificateDer, UnixTime};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{LazyConfigAcceptor, server::TlsStream};

use super::{
    hello::Hello,
    secrets::Secrets,
    server::{Bounded, Keys, Lax, Parts, Prepared, Server, Ssls, config_of, failed, info},
    versions,
};
use crate::{
    cert::{Lenient, verify_tls12_signature, verify_tls13_signature},
    error::{Error, Kind, Result},
    exchange::{
        Exchange, Phase, TlsInfo,
        handshake::{Handshake, VerifyClient},
        host::Doing,
    },
    model::{Object, Ssl},
};

/// As much as one record carries.
const MAX_RECORD: usize = 16_384;
/// Sessions that one handshake makes and that are told to a script: TLS 1.3 makes two.
const MAX_MADE: usize = 4;

/// The scripts of a worker that have a say in handshakes.
pub trait Scripts {
    /// Whether there is one for this phase.
    fn has(&self, phase: Phase) -> bool;

    /// Runs it. An error ends the handshake, and is in error.log already.
    fn run<'a>(&'a self, x: &'a mut Exchange, phase: Phase) -> Doing<'a, Result<()>>;

    /// The handshake is over. What its scripts leave in `ngx.ctx` is put into `x.lua.ctx`.
    fn end(&self, x: &mut Exchange);
}

/// A client's stream that can be watched while nobody reads from it.
pub trait Watched {
    /// Ready when the client has gone. What it has sent before that is kept, up to a bound, for the reads that follow.
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()>;
}

/// Sessions that a handshake has made, by what they are called: what `ssl_session_store_by_lua` is to keep.
pub type Made = Vec<(Vec<u8>, Vec<u8>)>;

/// Scripts of one worker that keep sessions at once, and how long each may take: connections do not wait for them, and what is
/// not kept is not resumed.
const MAX_STORING: usize = 1024;
const LONGEST_STORE: Duration = Duration::from_secs(10);

thread_local! {
    static STORING: Cell<usize> = const { Cell::new(0) };
}

/// Has a script keep what a handshake has made. `x` is the handshake's.
pub async fn store(scripts: Rc<dyn Scripts>, mut x: Exchange, made: Made) {
    struct Storing;
    impl Drop for Storing {
        fn drop(&mut self) {
            STORING.set(STORING.get() - 1);
        }
    }
    if STORING.get() >= MAX_STORING {
        tracing::warn!("ssl_session_store_by_lua: {MAX_STORING} run already: a session is not kept");
        return;
    }
    STORING.set(STORING.get() + 1);
    let _storing = Storing;
    let all = async {
        for (id, session) in made {
            let handshake = state(&mut x);
            (handshake.session_id, handshake.session) = (id, Some(session));
            // Its error is in the log.
            let _ = scripts.run(&mut x, Phase::SslSessionStore).await;
        }
    };
    if tokio::time::timeout(LONGEST_STORE, all).await.is_err() {
        tracing::error!("ssl_session_store_by_lua took more than {LONGEST_STORE:?}: a session is not kept");
    }
    scripts.end(&mut x);
}

impl Server {
    /// Does a handshake whose first message stands in `x.lua.handshake` and is still to be read from `stream`. Scripts that wait end
    /// with their client. The caller limits the time.
    pub async fn accept_scripted<S>(
        &self,
        stream: S,
        ssls: &Ssls,
        x: &mut Exchange,
        (scripts, secrets): (&dyn Scripts, &dyn Secrets),
    ) -> Result<(TlsStream<S>, TlsInfo, Made)>
    where
        S: AsyncRead + AsyncWrite + Watched + Unpin,
    {
        let mut start = LazyConfigAcceptor::new(Acceptor::default(), stream).await.map_err(failed)?;
        let sni = start.client_hello().server_name().map(str::to_ascii_lowercase);
        let decided = tokio::select! {
            biased;
            decided = self.decide(x, sni.as_deref(), ssls, (scripts, secrets)) => decided,
            () = poll_fn(|cx| start.io.poll_gone(cx)) => {
                return Err(Error::client(Kind::Closed).context("the client has gone while a script of its handshake waited"));
            }
        };
        let decided = match decided {
            Ok(decided) => decided,
            Err(e) => {
                self.refuse(start).await;
                return Err(e);
            }
        };
        let stream = start.into_stream(Arc::new(decided.config)).await.map_err(failed)?;
        let info = info(stream.get_ref().1, sni, decided.ssl, decided.verifier.as_deref());
        Ok((stream, info, decided.sessions.map(|s| s.made()).unwrap_or_default()))
    }

    /// Asks the scripts up to the point where the library can go on.
    async fn decide(
        &self,
        x: &mut Exchange,
        sni: Option<&str>,
        ssls: &Ssls,
        (scripts, secrets): (&dyn Scripts, &dyn Secrets),
    ) -> Result<Decided> {
        if scripts.has(Phase::SslClientHello) {
            scripts.run(x, Phase::SslClientHello).await?;
        }
        let (ssl, prepared) = match self.choose(sni, ssls, secrets).await {
            Ok((ssl, prepared)) => (Some(ssl), prepared),
            // An object that cannot be served may be one that keeps strangers out.
            Err(_) if self.find(sni, ssls).is_none() && scripts.has(Phase::Ssl) => (None, self.bare()),
            Err(e) => {
                tracing::error!("{e}");
                return Err(e);
            }
        };
        let prepared = &*prepared;
        let handshake = state(x);
        handshake.asks_already = prepared.verifier.is_some();
        if handshake.protocols.is_empty() {
            handshake.protocols = prepared.versions.iter().map(|v| name_of(v).into()).collect();
        }
        let (versions, _) = versions(handshake.protocols.iter().map(|n| &**n));
        let sessions = self.fetch(x, prepared, scripts).await?;
        let storage: Arc<dyn StoresServerSessions> = match &sessions {
            Some(sessions) => sessions.clone(),
            None => prepared.config.session_storage.clone(),
        };
        let base = Base { prepared, versions, storage, provider: self.provider() };
        let mut verifier = prepared.verifier.clone();
        let config = match scripts.has(Phase::Ssl) {
            false => base.config(prepared.config.cert_resolver.clone(), None)?,
            true => match base.resumption(state(x)) {
                Some(config) => config,
                None => {
                    scripts.run(x, Phase::Ssl).await?;
                    let asked = state(x).verify.take().filter(|_| prepared.verifier.is_none());
                    let asked = asked.map(|asked| verifier_of(self.provider(), asked)).transpose()?;
                    verifier = verifier.or(asked.clone());
                    base.config(self.keys(state(x), prepared)?, asked)?
                }
            },
        };
        let sessions = sessions.filter(|_| scripts.has(Phase::SslSessionStore));
        Ok(Decided { ssl, config, verifier, sessions })
    }

    /// Has a script look for the session that the client offers. `None`: no script has to do with sessions.
    async fn fetch(
        &self,
        x: &mut Exchange,
        prepared: &Prepared,
        scripts: &dyn Scripts,
    ) -> Result<Option<Arc<Sessions>>> {
        let fetches = scripts.has(Phase::SslSessionFetch);
        if !fetches && !scripts.has(Phase::SslSessionStore) {
            return Ok(None);
        }
        let handshake = state(x);
        let offered = Hello::parse(&handshake.hello).and_then(|hello| {
            let tls13 = agrees_on_13(&hello, &handshake.protocols);
            // With tickets the client keeps the session, and what it calls it means nothing here.
            let tickets = prepared.config.ticketer.enabled() && (tls13 || hello.brings_ticket());
            hello.resumed_session(tls13).filter(|_| !tickets).map(<[u8]>::to_vec)
        });
        let mut fetched = None;
        if let Some(id) = offered.filter(|_| fetches) {
            handshake.session_id.clone_from(&id);
            scripts.run(x, Phase::SslSessionFetch).await?;
            fetched = state(x).session.take().map(|session| (id, session));
        }
        let inner = prepared.config.session_storage.clone();
        Ok(Some(Arc::new(Sessions { inner, fetched, made: Mutex::default() })))
    }

    /// What the certificate script decided, else the object's certificates.
    fn keys(&self, handshake: &mut Handshake, prepared: &Prepared) -> Result<Arc<dyn ResolvesServerCert>> {
        let refused = |text: &str| {
            tracing::error!("ssl_certificate_by_lua: {text}");
            Error::client(Kind::Tls).context(text.to_owned())
        };
        let ocsp = handshake.ocsp.take();
        match (handshake.chain.take(), handshake.key.take()) {
            (Some(chain), Some(key)) => {
                let pair = CertifiedKey { cert: chain, key, ocsp };
                pair.keys_match().map_err(|e| refused(&format!("the certificate or its key cannot be used: {e}")))?;
                Ok(Arc::new(Keys(vec![Arc::new(pair)])))
            }
            (None, None) if handshake.cleared => Err(refused("the certificates were cleared and none was set")),
            (None, None) => Ok(match ocsp {
                None => prepared.config.cert_resolver.clone(),
                Some(ocsp) => Arc::new(prepared.keys.stapled(ocsp)),
            }),
            (Some(_), None) => Err(refused("a certificate was set without its private key")),
            (None, Some(_)) => Err(refused("a private key was set without its certificate")),
        }
    }
}

/// What the scripts came to.
struct Decided {
    /// The object of the client's name, if it has one.
    ssl: Option<Arc<Object<Ssl>>>,
    config: ServerConfig,
    verifier: Option<Arc<dyn ClientCertVerifier>>,
    /// Where new sessions stand, when a script wants to see them.
    sessions: Option<Arc<Sessions>>,
}

/// What a connection's configuration is made of beside its certificates.
struct Base<'a> {
    prepared: &'a Prepared,
    versions: Vec<&'static SupportedProtocolVersion>,
    storage: Arc<dyn StoresServerSessions>,
    provider: &'a Arc<CryptoProvider>,
}

impl Base<'_> {
    /// `asked`: a check of the client's certificate that a script wants. Such a connection leaves no session behind: on one that
    /// resumes it nobody would ask again.
    fn config(
        &self,
        resolver: Arc<dyn ResolvesServerCert>,
        asked: Option<Arc<dyn ClientCertVerifier>>,
    ) -> Result<ServerConfig> {
        let asks = asked.is_some();
        // The request decides what becomes of a client whose certificate is not good.
        let verifier = asked.map(|asked| Arc::new(Lax(asked)) as Arc<dyn ClientCertVerifier>);
        let verifier = verifier.or_else(|| self.prepared.asking.clone());
        let mut config = config_of(self.provider, Parts { versions: self.versions.clone(), verifier, resolver })?;
        let shared = &self.prepared.config;
        config.alpn_protocols.clone_from(&shared.alpn_protocols);
        if asks {
            config.session_storage = Arc::new(NoServerSessionStorage {});
            config.send_tls13_tickets = 0;
        } else {
            config.session_storage = self.storage.clone();
            config.ticketer = shared.ticketer.clone();
        }
        Ok(config)
    }

    /// A configuration for a client whose session will be resumed: no certificate is needed, and its script does not run. The
    /// library is asked by having it answer the first message once, with a key that signs nothing. The session is this connection's
    /// then.
    fn resumption(&self, handshake: &Handshake) -> Option<ServerConfig> {
        let hello = Hello::parse(&handshake.hello)?;
        let tls13 = agrees_on_13(&hello, &handshake.protocols);
        if !hello.resumes(tls13) {
            return None;
        }
        let flight = records(&handshake.hello);
        // The cipher suites of TLS 1.2 go with the kind of the key.
        let algorithms = if tls13 { &KEYS[..1] } else { &KEYS };
        let held = Arc::new(Held { inner: self.storage.clone(), found: Mutex::default() });
        algorithms.iter().find_map(|algorithm| {
            let pair = CertifiedKey::new(vec![CertificateDer::from(Vec::new())], Arc::new(Mute(*algorithm)));
            let mut config = self.config(Arc::new(SingleCertAndKey::from(pair)), None).ok()?;
            config.session_storage = held.clone();
            let mut trial = config.clone();
            trial.session_storage = Arc::new(Looking(held.clone()));
            let mut connection = ServerConnection::new(Arc::new(trial)).ok()?;
            let mut unread = &flight[..];
            while !unread.is_empty() {
                connection.read_tls(&mut unread).ok()?;
                connection.process_new_packets().ok()?;
            }
            (connection.handshake_kind() == Some(HandshakeKind::Resumed)).then_some(config)
        })
    }
}

/// Kinds of keys that a session may have been made with.
const KEYS: [SignatureAlgorithm; 2] = [SignatureAlgorithm::ECDSA, SignatureAlgorithm::RSA];

/// Whether both sides have TLS 1.3, and so will use it.
fn agrees_on_13(hello: &Hello, protocols: &[Box<str>]) -> bool {
    hello.offers(0x304) && protocols.iter().any(|p| **p == *"TLSv1.3")
}

/// The state that scripts work on; the listener has put it there.
fn state(x: &mut Exchange) -> &mut Handshake {
    x.lua.handshake.get_or_insert_default()
}

fn name_of(version: &SupportedProtocolVersion) -> &'static str {
    if version.version == ProtocolVersion::TLSv1_2 { "TLSv1.2" } else { "TLSv1.3" }
}

/// A ClientHello as records: what the client has sent, or the same in other pieces.
fn records(hello: &[u8]) -> Vec<u8> {
    let len = (hello.len() as u32).to_be_bytes();
    let message = [&[1, len[1], len[2], len[3]], hello].concat();
    let mut records = Vec::with_capacity(message.len() + 8);
    for part in message.chunks(MAX_RECORD) {
        records.extend([22, 3, 1]);
        records.extend((part.len() as u16).to_be_bytes());
        records.extend(part);
    }
    records
}

/// The sessions of one connection: what a script has found stands before the shared ones, and new ones are noted.
#[derive(Debug)]
struct Sessions {
    inner: Arc<dyn StoresServerSessions>,
    fetched: Option<(Vec<u8>, Vec<u8>)>,
    made: Mutex<Made>,
}

impl Sessions {
    fn made(&self) -> Made {
        std::mem::take(&mut *self.made.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn found(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.fetched.as_ref().filter(|(id, _)| id == key).map(|(_, session)| session.clone())
    }
}

impl StoresServerSessions for Sessions {
    fn put(&self, key: Vec<u8>, value: Vec<u8>) -> bool {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if made.len() < MAX_MADE {
            made.push((key.clone(), value.clone()));
        }
        self.inner.put(key, value)
    }

    fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.found(key).or_else(|| self.inner.get(key))
    }

    fn take(&self, key: &[u8]) -> Option<Vec<u8>> {
        // Not to be used twice, wherever it was found.
        let kept = self.inner.take(key);
        self.found(key).or(kept)
    }

    fn can_cache(&self) -> bool {
        true
    }
}

/// The sessions of one connection, of which the one that it resumes is looked for twice. What was found once is found again: another
/// connection may offer the same session at the same time, and this one has no certificate to go on with.
#[derive(Debug)]
struct Held {
    inner: Arc<dyn StoresServerSessions>,
    /// Some of those that the client offers.
    found: Mutex<Made>,
}

impl Held {
    fn find(&self, key: &[u8], look: impl FnOnce() -> Option<Vec<u8>>) -> Option<Vec<u8>> {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, session)) = found.iter().find(|(id, _)| id == key) {
            return Some(session.clone());
        }
        let session = look()?;
        found.push((key.to_vec(), session.clone()));
        Some(session)
    }
}

impl StoresServerSessions for Held {
    fn put(&self, key: Vec<u8>, value: Vec<u8>) -> bool {
        self.inner.put(key, value)
    }

    fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.find(key, || self.inner.get(key))
    }

    fn take(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.find(key, || self.inner.take(key))
    }

    fn can_cache(&self) -> bool {
        self.inner.can_cache()
    }
}

/// Sessions to which a trial adds none.
#[derive(Debug)]
struct Looking(Arc<Held>);

impl StoresServerSessions for Looking {
    fn put(&self, _key: Vec<u8>, _value: Vec<u8>) -> bool {
        true
    }

    fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.0.get(key)
    }

    fn take(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.0.take(key)
    }

    fn can_cache(&self) -> bool {
        self.0.can_cache()
    }
}

/// A key that signs nothing: enough for a handshake that resumes a session.
#[derive(Debug)]
struct Mute(SignatureAlgorithm);

impl SigningKey for Mute {
    fn choose_scheme(&self, _offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        None
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        self.0
    }
}

/// Checks a client's certificate as a script asks for it.
fn verifier_of(provider: &Arc<CryptoProvider>, asked: VerifyClient) -> Result<Arc<dyn ClientCertVerifier>> {
    let bad = |e: rustls::Error| {
        tracing::error!("ssl_certificate_by_lua: verify_client: {e}");
        Error::client(Kind::Tls).cause(e)
    };
    let mut roots = RootCertStore::empty();
    for cert in &asked.authorities {
        roots.add(cert.clone()).map_err(bad)?;
    }
    let named = roots.subjects();
    for cert in &asked.trusted {
        roots.add(cert.clone()).map_err(bad)?;
    }
    if roots.is_empty() {
        return Ok(Arc::new(Nobody(provider.clone())));
    }
    let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone());
    let builder = builder.allow_unauthenticated().clear_root_hint_subjects().add_root_hint_subjects(named);
    let inner = builder.build().map_err(|e| bad(rustls::Error::General(e.to_string())))?;
    let trusted = asked.authorities.into_iter().chain(asked.trusted).collect();
    let algorithms = provider.signature_verification_algorithms;
    Ok(Arc::new(Bounded { inner: Arc::new(Lenient { inner, trusted, algorithms }), depth: asked.depth }))
}

/// Trusts nobody: what a script asks for that names no authority.
#[derive(Debug)]
struct Nobody(Arc<CryptoProvider>);

impl ClientCertVerifier for Nobody {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _cert: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Err(CertificateError::UnknownIssuer.into())
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

    fn client_auth_mandatory(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use rustls::{ClientConfig, ClientConnection};
    use rustls_pki_types::{PrivatePkcs8KeyDer, ServerName};

    use super::*;
    use crate::tls::ServerOptions;

    /// A server without tickets, and the certificate of `a.test`.
    fn server() -> (Server, CertifiedKey, RootCertStore) {
        let pair = rcgen::generate_simple_self_signed(["a.test".to_owned()]).expect("a certificate");
        let protocols = vec!["TLSv1.2".into(), "TLSv1.3".into()];
        let options = ServerOptions { protocols, session_tickets: false, fallback_sni: None, alpn: &[b"http/1.1"] };
        let server = Server::new(options).expect("valid");
        let key = PrivatePkcs8KeyDer::from(pair.signing_key.serialize_der());
        let key = server.provider().key_provider.load_private_key(key.into()).expect("a key");
        let mut roots = RootCertStore::empty();
        roots.add(pair.cert.der().clone()).expect("a root");
        (server, CertifiedKey::new(vec![pair.cert.der().clone()], key), roots)
    }

    fn client(config: &Arc<ClientConfig>) -> ClientConnection {
        ClientConnection::new(config.clone(), ServerName::try_from("a.test").expect("a name")).expect("a client")
    }

    /// Gives what one side has written to the other, until both are silent.
    fn talk(client: &mut ClientConnection, server: &mut ServerConnection) -> Result<(), rustls::Error> {
        while client.wants_write() || server.wants_write() {
            let mut bytes = Vec::new();
            client.write_tls(&mut bytes).expect("written");
            server.read_tls(&mut &bytes[..]).expect("read");
            server.process_new_packets()?;
            bytes.clear();
            server.write_tls(&mut bytes).expect("written");
            client.read_tls(&mut &bytes[..]).expect("read");
            client.process_new_packets()?;
        }
        Ok(())
    }

    /// The first message of a client, as scripts know it.
    fn hello(client: &mut ClientConnection, protocol: &str) -> (Vec<u8>, Handshake) {
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).expect("written");
        // Of a record and of a message.
        let hello = bytes[5 + 4..].to_vec();
        (bytes, Handshake { hello, protocols: vec![protocol.into()], ..Handshake::default() })
    }

    #[test]
    fn a_session_that_two_offer_at_once_is_resumed_or_is_none() {
        for (version, name, resumes_twice) in
            [(&rustls::version::TLS12, "TLSv1.2", true), (&rustls::version::TLS13, "TLSv1.3", false)]
        {
            let (server, pair, roots) = server();
            let prepared = server.bare();
            let storage = prepared.config.session_storage.clone();
            let base = Base { prepared: &prepared, versions: vec![version], storage, provider: server.provider() };
            let config = ClientConfig::builder_with_provider(server.provider().clone())
                .with_protocol_versions(&[version])
                .expect("versions");
            let config = Arc::new(config.with_root_certificates(roots).with_no_client_auth());
            let full = base.config(Arc::new(Keys(vec![Arc::new(pair)])), None).expect("valid");
            let mut first = ServerConnection::new(Arc::new(full)).expect("a server");
            talk(&mut client(&config), &mut first).expect("a handshake");

            let mut one = client(&config);
            let (bytes, hello) = hello(&mut one, name);
            let resuming = base.resumption(&hello).expect("it resumes");
            // Another connection offers the same, and is as far, before this one goes on.
            assert_eq!(base.resumption(&hello).is_some(), resumes_twice, "{name}");
            let mut connection = ServerConnection::new(Arc::new(resuming)).expect("a server");
            connection.read_tls(&mut &bytes[..]).expect("read");
            connection.process_new_packets().expect("no alert");
            talk(&mut one, &mut connection).expect("a handshake");
            assert_eq!(connection.handshake_kind(), Some(HandshakeKind::Resumed), "{name}");
        }
    }
}
