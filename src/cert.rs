//! Certificates that webpki refuses and OpenSSL takes, which nodes and clients of installations have: those of X.509 version 1, as
//! `openssl x509 -req` makes them, and ones that stand in the list of trusted authorities themselves.
//!
//! Everything else is the library's to judge: what stands here is asked only when it has refused.

use std::sync::Arc;

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    crypto::{self, CryptoProvider, WebPkiSupportedAlgorithms},
    server::danger::{ClientCertVerified, ClientCertVerifier},
    sign::{CertifiedKey, SingleCertAndKey},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, SignatureVerificationAlgorithm, UnixTime};
use x509_parser::{
    certificate::X509Certificate,
    oid_registry::{
        OID_PKCS1_RSASSAPSS, OID_PKCS1_SHA256WITHRSA, OID_PKCS1_SHA384WITHRSA, OID_PKCS1_SHA512WITHRSA,
        OID_SIG_ECDSA_WITH_SHA256, OID_SIG_ECDSA_WITH_SHA384, OID_SIG_ED25519, Oid,
    },
    prelude::FromDer,
    time::ASN1Time,
    x509::X509Version,
};

/// Whether the key is the certificate's, of version 1 too, which webpki does not read. Keys that do not say are taken.
pub fn keys_match(pair: &CertifiedKey) -> Result<(), rustls::Error> {
    match pair.keys_match() {
        Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::Unknown)) => Ok(()),
        Err(e @ rustls::Error::InvalidCertificate(_)) => {
            let cert = pair.end_entity_cert().ok().and_then(|cert| X509Certificate::from_der(cert).ok());
            let (Some((_, cert)), Some(key)) = (cert, pair.key.public_key()) else { return Err(e) };
            match cert.public_key().raw == &*key {
                true => Ok(()),
                false => Err(rustls::InconsistentKeys::KeyMismatch.into()),
            }
        }
        outcome => outcome,
    }
}

/// A certificate chain with its key, in a form that both sides' configurations take as their one.
pub fn pair(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    provider: &CryptoProvider,
) -> Result<Arc<SingleCertAndKey>, rustls::Error> {
    let pair = CertifiedKey::new(chain, provider.key_provider.load_private_key(key)?);
    keys_match(&pair)?;
    Ok(Arc::new(SingleCertAndKey::from(pair)))
}

/// Signatures that count.
const STRONG: [Oid<'static>; 7] = [
    OID_PKCS1_SHA256WITHRSA,
    OID_PKCS1_SHA384WITHRSA,
    OID_PKCS1_SHA512WITHRSA,
    OID_PKCS1_RSASSAPSS,
    OID_SIG_ECDSA_WITH_SHA256,
    OID_SIG_ECDSA_WITH_SHA384,
    OID_SIG_ED25519,
];

type Valid = Result<HandshakeSignatureValid, rustls::Error>;

/// As the library's function of that name, for certificates of version 1 too.
pub fn verify_tls12_signature(
    message: &[u8],
    cert: &CertificateDer<'_>,
    dss: &DigitallySignedStruct,
    algorithms: &WebPkiSupportedAlgorithms,
) -> Valid {
    let verified = crypto::verify_tls12_signature(message, cert, dss, algorithms);
    verified.or_else(|e| signed_by(message, cert, dss, algorithms.all_of(dss.scheme)).ok_or(e))
}

/// As the library's function of that name, for certificates of version 1 too.
pub fn verify_tls13_signature(
    message: &[u8],
    cert: &CertificateDer<'_>,
    dss: &DigitallySignedStruct,
    algorithms: &WebPkiSupportedAlgorithms,
) -> Valid {
    let verified = crypto::verify_tls13_signature(message, cert, dss, algorithms);
    // RFC 8446, section 4.2.3: no PKCS #1 v1.5, and a curve goes with its hash: the first one of the list.
    let is_old = matches!(
        dss.scheme,
        SignatureScheme::RSA_PKCS1_SHA256 | SignatureScheme::RSA_PKCS1_SHA384 | SignatureScheme::RSA_PKCS1_SHA512
    );
    let first = if is_old { &[] } else { algorithms.all_of(dss.scheme).get(..1).unwrap_or_default() };
    verified.or_else(|e| signed_by(message, cert, dss, first).ok_or(e))
}

trait AllOf {
    /// The algorithms of a scheme.
    fn all_of(&self, scheme: SignatureScheme) -> &'static [&'static dyn SignatureVerificationAlgorithm];
}

impl AllOf for WebPkiSupportedAlgorithms {
    fn all_of(&self, scheme: SignatureScheme) -> &'static [&'static dyn SignatureVerificationAlgorithm] {
        self.mapping.iter().find(|(known, _)| *known == scheme).map_or(&[], |(_, algorithms)| algorithms)
    }
}

/// Whether the key of a certificate of version 1 has signed the message. A key of another kind than the algorithm's cannot be read by it.
fn signed_by(
    message: &[u8],
    cert: &CertificateDer<'_>,
    dss: &DigitallySignedStruct,
    algorithms: &[&dyn SignatureVerificationAlgorithm],
) -> Option<HandshakeSignatureValid> {
    let cert = first_version(cert)?;
    let key = &cert.public_key().subject_public_key.data;
    let signed = algorithms.iter().any(|algorithm| algorithm.verify_signature(key, message, dss.signature()).is_ok());
    signed.then(HandshakeSignatureValid::assertion)
}

fn first_version<'a>(cert: &'a CertificateDer<'_>) -> Option<X509Certificate<'a>> {
    let (_, cert) = X509Certificate::from_der(cert).ok()?;
    (cert.version() == X509Version::V1).then_some(cert)
}

/// Takes what `inner` takes; and clients' certificates of version 1 that a trusted authority has signed itself, and those that are trusted by
/// name.
#[derive(Debug)]
pub struct Lenient {
    pub inner: Arc<dyn ClientCertVerifier>,
    pub trusted: Vec<CertificateDer<'static>>,
    pub algorithms: WebPkiSupportedAlgorithms,
}

impl Lenient {
    fn takes(&self, der: &CertificateDer<'_>, now: UnixTime) -> bool {
        let Ok((_, cert)) = X509Certificate::from_der(der) else { return false };
        let now = i64::try_from(now.as_secs()).ok().and_then(|now| ASN1Time::from_timestamp(now).ok());
        if !now.is_some_and(|now| cert.validity().is_valid_at(now)) {
            return false;
        }
        self.trusted.iter().any(|ca| ca == der) || cert.version() == X509Version::V1 && self.has_signed(&cert)
    }

    fn has_signed(&self, cert: &X509Certificate<'_>) -> bool {
        // What is signed names the algorithm, too: nobody has put another one behind it.
        let (said, signed) = (&cert.signature_algorithm.algorithm, &cert.tbs_certificate.signature.algorithm);
        if said != signed || !STRONG.contains(said) {
            return false;
        }
        self.trusted.iter().filter_map(|ca| X509Certificate::from_der(ca).ok()).any(|(_, ca)| {
            ca.subject().as_raw() == cert.issuer().as_raw()
                && (ca.version() == X509Version::V1 || ca.is_ca())
                && cert.verify_signature(Some(ca.public_key())).is_ok()
        })
    }
}

impl ClientCertVerifier for Lenient {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        cert: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        match self.inner.verify_client_cert(cert, intermediates, now) {
            // These two have no name in the library's errors.
            Err(rustls::Error::InvalidCertificate(CertificateError::Other(_))) if self.takes(cert, now) => {
                Ok(ClientCertVerified::assertion())
            }
            verdict => verdict,
        }
    }

    fn verify_tls12_signature(&self, message: &[u8], cert: &CertificateDer<'_>, dss: &DigitallySignedStruct) -> Valid {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(&self, message: &[u8], cert: &CertificateDer<'_>, dss: &DigitallySignedStruct) -> Valid {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.inner.client_auth_mandatory()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rustls::{RootCertStore, crypto::ring, server::WebPkiClientVerifier};
    use rustls_pki_types::pem::PemObject;

    use super::*;

    // Made by `openssl req -x509` and `openssl x509 -req` with P-256, for a hundred years from 2026.
    const CA: &str = "-----BEGIN CERTIFICATE-----
MIIBcTCCARegAwIBAgIUYUN9sODbQqkwO1vlYTcjmXHY3acwCgYIKoZIzj0EAwIw
DTELMAkGA1UEAwwCY2EwIBcNMjYxMTI2MTMyNzUwWhgPMjEyNjExMDIxMzI3NTBa
MA0xCzAJBgNVBAMMAmNhMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAECCu7hiby
1wOD4cnmhjrv5cghYPgydBTknReqwzth5cRCQmOeBNWqCKZ54uxv06BmTWbGsCFo
XTx3DTfSHlCKM6NTMFEwHQYDVR0OBBYEFIvt5Q+rj27d8DvA3GRNqoxB8On5MB8G
A1UdIwQYMBaAFIvt5Q+rj27d8DvA3GRNqoxB8On5MA8GA1UdEwEB/wQFMAMBAf8w
CgYIKoZIzj0EAwIDSAAwRQIgOh4aItzxhuBj9kt6Rsc+DFYBTtWalQsCK5zXyUjU
F1QCIQC44wixq7U3wJM+CCSGnuQgfVXaZS0Ao6jbctMSRlDpHQ==
-----END CERTIFICATE-----";
    const OLD: &str = "-----BEGIN CERTIFICATE-----
MIIBFzCBvgIUBkx1NYD7Hp+NvHx1w9ukIcu48v8wCgYIKoZIzj0EAwIwDTELMAkG
A1UEAwwCY2EwIBcNMjYxMTI2MTMyNzUwWhgPMjEyNjExMDIxMzI3NTBaMA4xDDAK
BgNVBAMMA29sZDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABHbvCC/rl0il/19Y
atD6w9tTVQhq/M1WFTNZ/jWn0dIdiYRrhlMYkWFIDZqSQdQdg0gp3kRCesgsqYYK
HY6mOL4wCgYIKoZIzj0EAwIDSAAwRQIhAN33BnTDsbxrhmCZdOIMeTApLAz4wCB5
ftfvPBGgyGwGAiAE80M0XGRJKWbJXOY4YjNrwpbUbmLzGlLwL3q1RBjzzw==
-----END CERTIFICATE-----";

    #[test]
    fn certificates_of_version_1_are_valid_for_their_time() {
        let [ca, old] = [CA, OLD].map(|pem| CertificateDer::from_pem_slice(pem.as_bytes()).expect("a certificate"));
        let provider = Arc::new(ring::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone()).expect("an authority");
        let inner =
            WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone()).build().expect("a verifier");
        let algorithms = provider.signature_verification_algorithms;
        let verifier = Lenient { inner: inner.clone(), trusted: vec![ca.clone()], algorithms };
        let at = |year: u64| UnixTime::since_unix_epoch(Duration::from_secs((year - 1970) * 31_556_952));
        let takes = |cert: &CertificateDer<'_>, year| verifier.verify_client_cert(cert, &[], at(year)).is_ok();
        assert!(takes(&old, 2030) && takes(&ca, 2030));
        assert!(!takes(&old, 2020) && !takes(&old, 2200) && !takes(&ca, 2200));
        assert!(inner.verify_client_cert(&old, &[], at(2030)).is_err(), "what this is about");
        let nobody = Lenient { inner, trusted: Vec::new(), algorithms };
        assert!(nobody.verify_client_cert(&old, &[], at(2030)).is_err());
    }
}
