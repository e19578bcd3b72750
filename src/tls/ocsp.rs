//! OCSP (RFC 6960): a request about the first certificate of a chain, and whether a response says that it is good.
//!
//! Pure: bytes in, bytes out; the time is an argument. It trusts the chain that it is given and nothing else: a response counts when
//! the certificate's issuer signed it, or a responder that the issuer made one (section 4.2.2.2). SHA-1 names certificates here
//! (section 4.3), it protects nothing.

use std::fmt;

use sha1::{Digest, Sha1};
use x509_parser::{
    asn1_rs::{Any, BitString, GeneralizedTime, Integer, OctetString, Sequence, ToDer},
    certificate::X509Certificate,
    extensions::{GeneralName, ParsedExtension},
    oid_registry::OID_PKIX_ACCESS_DESCRIPTOR_OCSP,
    prelude::FromDer,
    time::ASN1Time,
    verify::verify_signature,
    x509::AlgorithmIdentifier,
};

/// A chain of three certificates has 5 KB, a response with a certificate 2 KB: a longer text is neither, and reading one stays short.
pub const MAX_LEN: usize = 1 << 20;

/// Seconds by which a responder's clock and ours may differ: what nginx grants.
const SKEW: i64 = 300;

/// Why there is no request, or why a response does not count. Displayed in the words of nginx and OpenResty, which scripts compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Longer than `MAX_LEN`.
    ChainTooLong,
    /// The first certificate, or the one after it, is none.
    Certificate,
    NoIssuer,
    /// The second certificate did not issue the first.
    IssuerElsewhere,
    /// Longer than `MAX_LEN`.
    ResponseTooLong,
    /// Not an OCSPResponse.
    Response,
    /// The responder refused: an OCSPResponseStatus.
    NotSuccessful(u8),
    /// Not a BasicOCSPResponse.
    Basic,
    /// Nobody who may speak for the issuer signed it.
    Unverified,
    /// It is about other certificates.
    NotFound,
    Revoked,
    Unknown,
    /// It does not hold yet, or no longer.
    Untimely,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Refusal::ChainTooLong => return write!(f, "the certificate chain is longer than {MAX_LEN} bytes"),
            Refusal::Certificate => "d2i_X509_bio() failed",
            Refusal::NoIssuer => "no issuer certificate in chain",
            Refusal::IssuerElsewhere => "issuer certificate not next to leaf",
            Refusal::ResponseTooLong => return write!(f, "the OCSP response is longer than {MAX_LEN} bytes"),
            Refusal::Response => "d2i_OCSP_RESPONSE() failed",
            Refusal::NotSuccessful(status) => {
                return write!(f, "OCSP response not successful ({status}: {})", status_name(*status));
            }
            Refusal::Basic => "OCSP_response_get1_basic() failed",
            Refusal::Unverified => "OCSP_basic_verify() failed",
            Refusal::NotFound => "certificate status not found in the OCSP response",
            Refusal::Revoked => "certificate status \"revoked\" in the OCSP response",
            Refusal::Unknown => "certificate status \"unknown\" in the OCSP response",
            Refusal::Untimely => "OCSP_check_validity() failed",
        };
        f.write_str(text)
    }
}

/// OCSPResponseStatus (section 4.2.1) as OpenSSL writes it.
fn status_name(status: u8) -> &'static str {
    match status {
        1 => "malformedrequest",
        2 => "internalerror",
        3 => "trylater",
        5 => "sigrequired",
        6 => "unauthorized",
        _ => "(UNKNOWN)",
    }
}

/// Where to ask about the first certificate of `chain` (certificates in DER, one behind the other): the first OCSP address of its
/// authority information access (RFC 5280, 4.2.2.1); `None` when it has none.
pub fn responder_url(chain: &[u8]) -> Result<Option<&str>, Refusal> {
    let leaf = Pair::of(chain)?.leaf;
    let accesses = leaf.extensions().iter().filter_map(|e| match e.parsed_extension() {
        ParsedExtension::AuthorityInfoAccess(access) => Some(&access.accessdescs),
        _ => None,
    });
    Ok(accesses.flatten().find_map(|access| match access.access_location {
        GeneralName::URI(url) if access.access_method == OID_PKIX_ACCESS_DESCRIPTOR_OCSP && !url.is_empty() => {
            Some(url)
        }
        _ => None,
    }))
}

/// An OCSPRequest in DER about the first certificate of `chain`, with neither nonce nor signature.
pub fn request(chain: &[u8]) -> Result<Vec<u8>, Refusal> {
    let pair = Pair::of(chain)?;
    let hashes = pair.issuer_hashes();
    let id = pair.id(&hashes).to_der().ok_or(Refusal::Certificate)?;
    // OCSPRequest, tbsRequest, requestList and Request have one part each.
    let wrapped = (0..4).try_fold(id, |der, _| sequence(&[&der]));
    wrapped.ok_or(Refusal::Certificate)
}

/// Whether `response` (an OCSPResponse in DER) says at `now` (seconds since the epoch) that the first certificate of `chain` is good.
/// The time at which the responder will know more, where it says one.
pub fn validate(response: &[u8], chain: &[u8], now: i64) -> Result<Option<i64>, Refusal> {
    let pair = Pair::of(chain)?;
    let basic = Basic::of(response)?;
    if !basic.is_authorized(&pair.issuer, now) {
        return Err(Refusal::Unverified);
    }
    let hashes = pair.issuer_hashes();
    let id = pair.id(&hashes);
    let single = basic.singles.iter().find(|single| single.id == id).ok_or(Refusal::NotFound)?;
    match single.status {
        Status::Good if single.is_timely(now) => Ok(single.next_update),
        Status::Good => Err(Refusal::Untimely),
        Status::Revoked => Err(Refusal::Revoked),
        Status::Unknown => Err(Refusal::Unknown),
    }
}

/// Whether `response` (an OCSPResponse in DER) says something of `certificate` (DER): by serial number and, where SHA-1 tells, the
/// issuer's name. Nothing else of it is checked.
pub fn is_about(response: &[u8], certificate: &[u8]) -> bool {
    let (Ok(basic), Ok((_, certificate))) = (Basic::of(response), X509Certificate::from_der(certificate)) else {
        return false;
    };
    let name: [u8; 20] = Sha1::digest(certificate.issuer().as_raw()).into();
    let mut ids = basic.singles.iter().map(|single| &single.id);
    ids.any(|id| id.serial == certificate.raw_serial() && (id.digest != SHA1 || id.name == name))
}

/// A certificate and who issued it.
struct Pair<'a> {
    leaf: X509Certificate<'a>,
    issuer: X509Certificate<'a>,
}

impl<'a> Pair<'a> {
    /// The first two certificates of a chain.
    fn of(chain: &'a [u8]) -> Result<Self, Refusal> {
        if chain.len() > MAX_LEN {
            return Err(Refusal::ChainTooLong);
        }
        let (rest, leaf) = X509Certificate::from_der(chain).map_err(|_| Refusal::Certificate)?;
        if rest.is_empty() {
            return Err(Refusal::NoIssuer);
        }
        let (_, issuer) = X509Certificate::from_der(rest).map_err(|_| Refusal::Certificate)?;
        let pair = Pair { leaf, issuer };
        if pair.belongs_together() { Ok(pair) } else { Err(Refusal::IssuerElsewhere) }
    }

    /// What can be told without the signature: names, key identifiers, and that the issuer may sign certificates.
    fn belongs_together(&self) -> bool {
        let signs = self.issuer.key_usage().is_ok_and(|usage| usage.is_none_or(|usage| usage.value.key_cert_sign()));
        signs && self.leaf.issuer().as_raw() == self.issuer.subject().as_raw() && self.identifies_issuer()
    }

    /// The leaf's authority key identifier says nothing that is not so.
    fn identifies_issuer(&self) -> bool {
        let named = self.leaf.extensions().iter().find_map(|e| match e.parsed_extension() {
            ParsedExtension::AuthorityKeyIdentifier(named) => Some(named),
            _ => None,
        });
        let own_key = self.issuer.extensions().iter().find_map(|e| match e.parsed_extension() {
            ParsedExtension::SubjectKeyIdentifier(key) => Some(key),
            _ => None,
        });
        named.is_none_or(|named| {
            let same_key = named.key_identifier.as_ref().zip(own_key).is_none_or(|(named, own)| named == own);
            same_key && named.authority_cert_serial.is_none_or(|serial| serial == self.issuer.raw_serial())
        })
    }

    /// SHA-1 of the issuer's name and of its key.
    fn issuer_hashes(&self) -> [[u8; 20]; 2] {
        [Sha1::digest(self.leaf.issuer().as_raw()).into(), key_hash(&self.issuer)]
    }

    /// The CertID that a responder knows the leaf by.
    fn id<'b>(&'b self, [name, key]: &'b [[u8; 20]; 2]) -> CertId<'b> {
        CertId { digest: SHA1, name, key, serial: self.leaf.raw_serial() }
    }
}

/// SHA-1 of the bits of a certificate's key.
fn key_hash(certificate: &X509Certificate) -> [u8; 20] {
    Sha1::digest(&certificate.public_key().subject_public_key.data).into()
}

/// What names a certificate (section 4.1.1): the contents of its elements.
#[derive(PartialEq)]
struct CertId<'a> {
    /// An object identifier.
    digest: &'a [u8],
    name: &'a [u8],
    key: &'a [u8],
    serial: &'a [u8],
}

/// 1.3.14.3.2.26
const SHA1: &[u8] = &[0x2b, 0x0e, 0x03, 0x02, 0x1a];

/// The AlgorithmIdentifier of SHA-1 with the NULL that OpenSSL writes behind it.
const SHA1_ALGORITHM: &[u8] = &[0x30, 0x09, OID, 0x05, 0x2b, 0x0e, 0x03, 0x02, 0x1a, 0x05, 0x00];

/// id-pkix-ocsp-basic, 1.3.6.1.5.5.7.48.1.1
const BASIC: &[u8] = &[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x30, 0x01, 0x01];

impl<'a> CertId<'a> {
    fn to_der(&self) -> Option<Vec<u8>> {
        let octets = |bytes| OctetString::new(bytes).to_der_vec().ok();
        let serial = Integer::new(self.serial).to_der_vec().ok()?;
        sequence(&[SHA1_ALGORITHM, &octets(self.name)?, &octets(self.key)?, &serial])
    }

    fn parse(content: &'a [u8]) -> Option<Self> {
        let mut parts = Elements(content);
        let digest = parts.take(SEQUENCE)?.inside().take(OID)?.content;
        let name = parts.take(OCTETS)?.content;
        let key = parts.take(OCTETS)?.content;
        let serial = parts.take(INTEGER)?.content;
        parts.is_empty().then_some(CertId { digest, name, key, serial })
    }
}

fn sequence(parts: &[&[u8]]) -> Option<Vec<u8>> {
    Sequence::new(parts.concat().into()).to_der_vec().ok()
}

/// A BasicOCSPResponse (section 4.2.1).
struct Basic<'a> {
    responder: Responder<'a>,
    singles: Vec<Single<'a>>,
    /// The ResponseData that the signature is about.
    signed: &'a [u8],
    algorithm: AlgorithmIdentifier<'a>,
    signature: BitString<'a>,
    /// Certificates one behind the other.
    certificates: Elements<'a>,
}

/// How the signer calls itself.
enum Responder<'a> {
    /// Its name in DER.
    Name(&'a [u8]),
    /// SHA-1 of the bits of its key.
    Key(&'a [u8]),
}

/// What a response says of one certificate.
struct Single<'a> {
    id: CertId<'a>,
    status: Status,
    /// Seconds since the epoch, as is `next_update`.
    this_update: i64,
    next_update: Option<i64>,
}

enum Status {
    Good,
    Revoked,
    Unknown,
}

impl<'a> Basic<'a> {
    /// Of an OCSPResponse.
    fn of(response: &'a [u8]) -> Result<Self, Refusal> {
        if response.len() > MAX_LEN {
            return Err(Refusal::ResponseTooLong);
        }
        match response_parts(response).ok_or(Refusal::Response)? {
            (0, bytes) => bytes.and_then(Self::parse).ok_or(Refusal::Basic),
            (status, _) => Err(Refusal::NotSuccessful(status)),
        }
    }

    /// Of ResponseBytes.
    fn parse(mut bytes: Elements<'a>) -> Option<Self> {
        let mut bytes = bytes.take(SEQUENCE)?.inside();
        let is_basic = bytes.take(OID)?.content == BASIC;
        let mut body = bytes.take(OCTETS)?.inside().take(SEQUENCE)?.inside();
        let data = body.take(SEQUENCE)?;
        let (algorithm, signature) = (body.read()?, body.read()?);
        let certificates = match body.take(EXPLICIT_0) {
            Some(certificates) => certificates.inside().take(SEQUENCE)?.inside(),
            None => Elements(&[]),
        };
        let (responder, singles) = response_data(data.inside())?;
        let all = is_basic && body.is_empty();
        all.then_some(Basic { responder, singles, signed: data.whole, algorithm, signature, certificates })
    }

    /// Whether the issuer signed, or somebody to whom it gave a certificate for that, which is in the response (section 4.2.2.2).
    /// One signer is looked at: the first that has the responder's name or key.
    fn is_authorized(&self, issuer: &X509Certificate, now: i64) -> bool {
        if self.responder.is(issuer) {
            return self.is_signed_by(issuer);
        }
        let mut certificates = std::iter::successors(next(self.certificates), |(rest, _)| next(*rest));
        let signer = certificates.find(|(_, certificate)| self.responder.is(certificate));
        signer.is_some_and(|(_, signer)| is_delegated(&signer, issuer, now) && self.is_signed_by(&signer))
    }

    fn is_signed_by(&self, signer: &X509Certificate) -> bool {
        verify_signature(signer.public_key(), &self.algorithm, &self.signature, self.signed).is_ok()
    }
}

/// The next certificate and what follows it.
fn next(mut certificates: Elements) -> Option<(Elements, X509Certificate)> {
    let certificate = certificates.read()?;
    Some((certificates, certificate))
}

/// Whether a certificate makes its owner a responder for what `issuer` issued.
fn is_delegated(certificate: &X509Certificate, issuer: &X509Certificate, now: i64) -> bool {
    let for_ocsp =
        certificate.extended_key_usage().is_ok_and(|usage| usage.is_some_and(|usage| usage.value.ocsp_signing));
    let understood = !certificate.extensions().iter().any(|e| e.critical && e.parsed_extension().unsupported());
    for_ocsp
        && understood
        && ASN1Time::from_timestamp(now).is_ok_and(|now| certificate.validity().is_valid_at(now))
        && certificate.issuer().as_raw() == issuer.subject().as_raw()
        && certificate.verify_signature(Some(issuer.public_key())).is_ok()
}

impl Responder<'_> {
    fn is(&self, certificate: &X509Certificate) -> bool {
        match self {
            Responder::Name(name) => *name == certificate.subject().as_raw(),
            Responder::Key(hash) => *hash == key_hash(certificate),
        }
    }
}

impl<'a> Single<'a> {
    fn parse(single: Element<'a>) -> Option<Self> {
        let mut single = single.inside();
        let id = CertId::parse(single.take(SEQUENCE)?.content)?;
        let status = single.take_any()?;
        let status = match status.tag {
            0x80 => Status::Good,
            0xa1 => Status::Revoked,
            0x82 => Status::Unknown,
            _ => return None,
        };
        let this_update = single.time()?;
        let next_update = match single.take(EXPLICIT_0) {
            Some(time) => Some(time.inside().time()?),
            None => None,
        };
        single.take(EXPLICIT_1);
        single.is_empty().then_some(Single { id, status, this_update, next_update })
    }

    /// Whether `now` is between the two updates, give or take the skew. Without the second it holds until a newer one is there.
    fn is_timely(&self, now: i64) -> bool {
        let begun = self.this_update <= now.saturating_add(SKEW);
        begun && self.next_update.is_none_or(|next| next >= now.saturating_sub(SKEW) && next >= self.this_update)
    }
}

/// OCSPResponseStatus and ResponseBytes of an OCSPResponse.
fn response_parts(response: &[u8]) -> Option<(u8, Option<Elements<'_>>)> {
    let mut all = Elements(response);
    let mut body = all.take(SEQUENCE)?.inside();
    let &[status] = body.take(ENUMERATED)?.content else { return None };
    let bytes = body.take(EXPLICIT_0).map(Element::inside);
    (all.is_empty() && body.is_empty()).then_some((status, bytes))
}

/// Who answers, and what, of a ResponseData of version 1.
fn response_data(mut data: Elements) -> Option<(Responder, Vec<Single>)> {
    let version = data.take(EXPLICIT_0).map_or(V1, |version| version.content);
    let responder = data.take_any()?;
    let responder = match responder.tag {
        EXPLICIT_1 => Responder::Name(responder.content),
        EXPLICIT_2 => Responder::Key(responder.inside().take(OCTETS)?.content),
        _ => return None,
    };
    let _produced_at = data.time()?;
    let mut rest = data.take(SEQUENCE)?.inside();
    let mut singles = Vec::new();
    while !rest.is_empty() {
        singles.push(Single::parse(rest.take(SEQUENCE)?)?);
    }
    data.take(EXPLICIT_1);
    (version == V1 && data.is_empty()).then_some((responder, singles))
}

/// The INTEGER 0.
const V1: &[u8] = &[INTEGER, 1, 0];

const INTEGER: u8 = 0x02;
const OCTETS: u8 = 0x04;
const OID: u8 = 0x06;
const ENUMERATED: u8 = 0x0a;
const SEQUENCE: u8 = 0x30;
const EXPLICIT_0: u8 = 0xa0;
const EXPLICIT_1: u8 = 0xa1;
const EXPLICIT_2: u8 = 0xa2;

/// DER elements one behind the other.
#[derive(Clone, Copy)]
struct Elements<'a>(&'a [u8]);

#[derive(Clone, Copy)]
struct Element<'a> {
    /// The first byte.
    tag: u8,
    content: &'a [u8],
    whole: &'a [u8],
}

impl<'a> Element<'a> {
    fn inside(self) -> Elements<'a> {
        Elements(self.content)
    }
}

impl<'a> Elements<'a> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next one, whatever it is.
    fn take_any(&mut self) -> Option<Element<'a>> {
        let before = self.0;
        let any: Any = self.read()?;
        Some(Element { tag: *before.first()?, content: any.data, whole: &before[..before.len() - self.0.len()] })
    }

    /// The next one if it begins with this byte; otherwise it stays the next one.
    fn take(&mut self, tag: u8) -> Option<Element<'a>> {
        if *self.0.first()? == tag { self.take_any() } else { None }
    }

    /// The next one as a `T`.
    fn read<T: FromDer<'a, E>, E>(&mut self) -> Option<T> {
        let (rest, value) = T::from_der(self.0).ok()?;
        self.0 = rest;
        Some(value)
    }

    /// A GeneralizedTime in seconds since the epoch.
    fn time(&mut self) -> Option<i64> {
        let time: GeneralizedTime = self.read()?;
        Some(time.utc_datetime().ok()?.unix_timestamp())
    }
}

#[cfg(test)]
mod tests;
