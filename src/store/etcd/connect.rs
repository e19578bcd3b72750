//! Connections to a member of the cluster: TCP or TLS, HTTP/2 pings, authentication.

use std::{
    future::Future,
    io,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use etcd_client::{Channel, Client, ConnectOptions};
use http::Uri;
use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, ring},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject};
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::TlsConnector;
use tonic::transport::Endpoint;
use tower_service::Service;

use crate::{
    cert,
    error::{Error, Kind, Result},
};

/// Of TCP and TLS.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// etcd closes a connection that pings more often than every 5 s (`--grpc-keepalive-min-time`), or that pings
/// while no request is open. A member that hangs is noticed after the sum of the two.
const PING_INTERVAL: Duration = Duration::from_secs(6);
const PING_TIMEOUT: Duration = Duration::from_secs(4);
/// Bytes in flight per stream and connection: a list of 100,000 routes is some 50 MB.
const WINDOW: u32 = 4 << 20;
/// Where Linux distributions keep the certificate authorities that the system trusts.
const SYSTEM_ROOTS: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// `deployment.etcd.tls`, and `apisix.ssl.ssl_trusted_certificate`.
#[derive(Clone, Debug)]
pub(super) struct Tls {
    pair: Option<(PathBuf, PathBuf)>,
    verify: bool,
    sni: Option<String>,
    /// Empty: the system's.
    roots: Vec<PathBuf>,
}

impl Tls {
    pub fn from_json(config: &Value, dir: &Path) -> Result<Self> {
        let null = Value::Null;
        let tls = config.pointer("/deployment/etcd/tls").unwrap_or(&null);
        let file = |v: &Value| v.as_str().filter(|s| !s.is_empty()).map(|s| dir.join(s));
        let pair = match (file(&tls["cert"]), file(&tls["key"])) {
            (Some(cert), Some(key)) => Some((cert, key)),
            (None, None) => None,
            _ => {
                return Err(Error::config(Kind::Invalid)
                    .context("deployment.etcd.tls: cert and key go together: set both or neither"));
            }
        };
        let roots = match config.pointer("/apisix/ssl/ssl_trusted_certificate").and_then(Value::as_str) {
            None => Vec::new(),
            // `system,/path/ca.pem` names several.
            Some(list) => {
                let named = list.split(',').map(str::trim).filter(|s| !s.is_empty());
                named.flat_map(|s| if s == "system" { system_roots() } else { vec![dir.join(s)] }).collect()
            }
        };
        let sni = tls["sni"].as_str().filter(|s| !s.is_empty()).map(str::to_owned);
        Ok(Tls { pair, verify: tls["verify"].as_bool().unwrap_or(true), sni, roots })
    }

    fn client_config(&self) -> Result<ClientConfig> {
        let provider = Arc::new(ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|e| Error::config(Kind::Tls).cause(e))?;
        let builder = if self.verify {
            builder.with_root_certificates(self.root_store()?)
        } else {
            builder.dangerous().with_custom_certificate_verifier(Arc::new(Unverified(provider.clone())))
        };
        let mut config = match &self.pair {
            None => builder.with_no_client_auth(),
            Some((cert, key)) => {
                let chain = read_certificates(cert)?;
                let key = PrivateKeyDer::from_pem_file(key).map_err(|e| unreadable(key, e))?;
                builder.with_client_cert_resolver(cert::pair(chain, key, &provider).map_err(|e| unreadable(cert, e))?)
            }
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }

    fn root_store(&self) -> Result<RootCertStore> {
        let mut store = RootCertStore::empty();
        let files = if self.roots.is_empty() { system_roots() } else { self.roots.clone() };
        for file in files {
            store.add_parsable_certificates(read_certificates(&file)?);
        }
        Ok(store)
    }
}

fn system_roots() -> Vec<PathBuf> {
    SYSTEM_ROOTS.iter().map(PathBuf::from).find(|p| p.exists()).into_iter().collect()
}

fn read_certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let certificates = CertificateDer::pem_file_iter(file).map_err(|e| unreadable(file, e))?;
    certificates.collect::<std::result::Result<_, _>>().map_err(|e| unreadable(file, e))
}

fn unreadable(file: &Path, e: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::config(Kind::Tls).cause(e).context(format!("deployment.etcd.tls: {}", file.display()))
}

/// A client of one member. Connects when it is used, but for the authentication.
pub(super) async fn dial(
    host: &str,
    tls: &Tls,
    user: Option<(String, String)>,
) -> std::result::Result<Client, etcd_client::Error> {
    let host = if host.contains("://") { host.to_owned() } else { format!("http://{host}") };
    let uri: Uri = host.parse()?;
    let secure = uri.scheme_str() == Some("https");
    let invalid = |e: Error| etcd_client::Error::InvalidArgs(e.to_string());
    let connector = Connector {
        tls: secure
            .then(|| tls.client_config().map(|c| TlsConnector::from(Arc::new(c))))
            .transpose()
            .map_err(invalid)?,
        sni: tls.sni.clone(),
    };
    // The connector does TLS itself (an own verifier, own roots): tonic must not want to do it too, but requests say
    // https all the same.
    let plain = host.replacen("https://", "http://", 1);
    let channel = Endpoint::from_shared(plain)
        .map_err(etcd_client::Error::from)?
        .origin(uri)
        .http2_keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(false)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .connect_with_connector_lazy(connector);
    let mut options = ConnectOptions::new().with_require_leader(true).with_auto_token_refresh(true);
    if let Some((name, password)) = user {
        options = options.with_user(name, password);
    }
    Client::from_channel(Channel::Tonic(channel), Some(options)).await
}

#[derive(Clone)]
struct Connector {
    tls: Option<TlsConnector>,
    sni: Option<String>,
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

type Io = TokioIo<Box<dyn Stream>>;

impl Service<Uri> for Connector {
    type Response = Io;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Io>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connector = self.clone();
        Box::pin(async move {
            let connected = timeout(CONNECT_TIMEOUT, connector.connect(uri)).await;
            connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        })
    }
}

impl Connector {
    async fn connect(self, uri: Uri) -> io::Result<Io> {
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
        let tcp = TcpStream::connect((host, uri.port_u16().unwrap_or(2379))).await?;
        tcp.set_nodelay(true)?;
        let Some(tls) = self.tls else { return Ok(TokioIo::new(Box::new(tcp))) };
        let name = self.sni.unwrap_or_else(|| host.to_owned());
        let name = ServerName::try_from(name).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
        Ok(TokioIo::new(Box::new(tls.connect(name, tcp).await?)))
    }
}

/// `verify: false`: any certificate will do, as the operator asked. Signatures are checked all the same.
#[derive(Debug)]
struct Unverified(Arc<CryptoProvider>);

impl ServerCertVerifier for Unverified {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        cert::verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        cert::verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
