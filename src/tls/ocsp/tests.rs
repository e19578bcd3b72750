//! Chains that rcgen makes, and responses about them made by hand: OpenSSL makes none that are wrong in these ways (t/libraries/ocsp.rs
//! has those that it makes).

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CustomExtension, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SigningKey, date_time_ymd,
};

use super::*;

/// 2026-01-01: when the responses here are made.
const MADE: i64 = 1_767_225_600;
const DAY: i64 = 86_400;

const GOOD: &[u8] = &[0x80, 0];
const UNKNOWN: &[u8] = &[0x82, 0];

/// ecdsa-with-SHA256
const ECDSA: &[u8] = &[0x30, 0x0a, OID, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02];

/// Who has a certificate and its key.
struct Owner {
    params: CertificateParams,
    key: KeyPair,
    certificate: Certificate,
}

impl Owner {
    /// With a certificate of `by`, or one of its own; `change` is for its contents.
    fn new(name: &str, by: Option<&Owner>, change: impl FnOnce(&mut CertificateParams)) -> Owner {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.use_authority_key_identifier_extension = true;
        change(&mut params);
        let key = KeyPair::generate().expect("a key");
        let certificate = match by {
            Some(by) => params.signed_by(&key, &Issuer::from_params(&by.params, &by.key)),
            None => params.self_signed(&key),
        };
        Owner { certificate: certificate.expect("a certificate"), params, key }
    }

    fn authority(name: &str, by: Option<&Owner>) -> Owner {
        Owner::new(name, by, |params| {
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        })
    }

    /// May answer for `by`.
    fn responder(by: &Owner, change: impl FnOnce(&mut CertificateParams)) -> Owner {
        Owner::new("responder", Some(by), |params| {
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::OcspSigning];
            change(params);
        })
    }

    fn der(&self) -> &[u8] {
        self.certificate.der()
    }
}

/// Chains end in two authorities.
struct Pki {
    root: Owner,
    issuer: Owner,
    leaf: Owner,
}

impl Pki {
    fn new() -> Pki {
        Pki::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut CertificateParams)) -> Pki {
        let root = Owner::authority("root", None);
        let issuer = Owner::authority("issuer", Some(&root));
        let leaf = Owner::new("leaf", Some(&issuer), change);
        Pki { root, issuer, leaf }
    }

    fn chain(&self) -> Vec<u8> {
        [self.leaf.der(), self.issuer.der(), self.root.der()].concat()
    }
}

fn der(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let content = parts.concat();
    let len = u16::try_from(content.len()).expect("tests are short").to_be_bytes();
    [&[tag, 0x82], &len[..], &content].concat()
}

fn time(at: i64) -> Vec<u8> {
    let text = chrono::DateTime::from_timestamp(at, 0).expect("a time").format("%Y%m%d%H%M%SZ").to_string();
    der(0x18, &[text.as_bytes()])
}

/// The CertID of a chain's first certificate.
fn id(chain: &[u8]) -> Vec<u8> {
    let pair = Pair::of(chain).expect("a chain");
    pair.id(&pair.issuer_hashes()).to_der().expect("its DER")
}

/// A SingleResponse without extensions.
fn single(id: &[u8], status: &[u8], this_update: i64, next_update: Option<i64>) -> Vec<u8> {
    let next_update = next_update.map(|at| der(EXPLICIT_0, &[&time(at)])).unwrap_or_default();
    der(SEQUENCE, &[id, status, &time(this_update), &next_update])
}

/// A response that is about to be signed.
struct Draft<'a> {
    singles: Vec<Vec<u8>>,
    signer: &'a Owner,
    by_key: bool,
    certificates: Vec<&'a [u8]>,
    version: &'a [u8],
    kind: &'a [u8],
}

impl<'a> Draft<'a> {
    /// `chain` is good until the day after `MADE`, says `signer`.
    fn good(chain: &[u8], signer: &'a Owner) -> Self {
        Draft::of(single(&id(chain), GOOD, MADE, Some(MADE + DAY)), signer)
    }

    fn of(single: Vec<u8>, signer: &'a Owner) -> Self {
        Draft { singles: vec![single], signer, by_key: false, certificates: Vec::new(), version: &[], kind: BASIC }
    }

    fn with(mut self, certificate: &'a Owner) -> Self {
        self.certificates.push(certificate.der());
        self
    }

    fn signed(&self) -> Vec<u8> {
        let (_, certificate) = X509Certificate::from_der(self.signer.der()).expect("a certificate");
        let responder = match self.by_key {
            true => der(EXPLICIT_2, &[&der(OCTETS, &[&key_hash(&certificate)])]),
            false => der(EXPLICIT_1, &[certificate.subject().as_raw()]),
        };
        let singles = der(SEQUENCE, &[&self.singles.concat()]);
        let data = der(SEQUENCE, &[self.version, &responder, &time(MADE), &singles]);
        let signature = self.signer.key.sign(&data).expect("signed");
        let certificates = match self.certificates.is_empty() {
            true => Vec::new(),
            false => der(EXPLICIT_0, &[&der(SEQUENCE, &self.certificates)]),
        };
        let basic = der(SEQUENCE, &[&data, ECDSA, &der(0x03, &[&[0], &signature]), &certificates]);
        let bytes = der(SEQUENCE, &[&der(OID, &[self.kind]), &der(OCTETS, &[&basic])]);
        der(SEQUENCE, &[&[ENUMERATED, 1, 0], &der(EXPLICIT_0, &[&bytes])])
    }
}

/// AccessDescriptions: method below 1.3.6.1.5.5.7.48, URL.
fn access(descriptions: &[(u8, &str)]) -> CustomExtension {
    let description = |&(method, url): &(u8, &str)| {
        let method = der(OID, &[&BASIC[..7], &[method]]);
        der(SEQUENCE, &[&method, &der(0x86, &[url.as_bytes()])])
    };
    let all: Vec<u8> = descriptions.iter().flat_map(description).collect();
    CustomExtension::from_oid_content(&[1, 3, 6, 1, 5, 5, 7, 1, 1], der(SEQUENCE, &[&all]))
}

#[test]
fn the_responder_is_the_first_ocsp_address() {
    for (descriptions, expected) in [
        (vec![(2, "http://ca/"), (1, ""), (1, "http://ocsp/a?b=c"), (1, "http://second/")], Some("http://ocsp/a?b=c")),
        (vec![(2, "http://ca/")], None),
        (vec![], None),
    ] {
        let pki = Pki::with(|params| {
            if !descriptions.is_empty() {
                params.custom_extensions.push(access(&descriptions));
            }
        });
        assert_eq!(responder_url(&pki.chain()), Ok(expected), "{descriptions:?}");
    }
}

#[test]
fn a_request_names_one_certificate() {
    let chain = Pki::with(|params| params.serial_number = Some(vec![0x7f; 200].into())).chain();
    let id = id(&chain);
    assert!(request(&chain).expect("a request").ends_with(&id));
    assert_eq!(
        CertId::parse(Elements(&id).take(SEQUENCE).expect("a sequence").content).expect("parsed").serial,
        [0x7f; 200]
    );
    assert_eq!(
        request(&Pki::with(|params| params.serial_number = Some(vec![4].into())).chain()).map(|r| r.len()),
        Ok(68)
    );
}

#[test]
fn a_chain_begins_with_a_certificate_and_its_issuer() {
    let pki = Pki::new();
    let (leaf, issuer, root) = (pki.leaf.der(), pki.issuer.der(), pki.root.der());
    // The same name with another key, and one that may not sign.
    let namesake = Owner::authority("issuer", Some(&pki.root));
    let servant = Owner::new("servant", Some(&pki.root), |p| p.key_usages = vec![KeyUsagePurpose::DigitalSignature]);
    let served = Owner::new("leaf", Some(&servant), |_| {});
    let long = [pki.chain(), vec![0; MAX_LEN]].concat();
    for (chain, expected) in [
        (&[leaf, issuer].concat()[..], None),
        (&[leaf, issuer, b"whatever"].concat(), None),
        (&long[..MAX_LEN], None),
        (&long[..MAX_LEN + 1], Some(Refusal::ChainTooLong)),
        (b"", Some(Refusal::Certificate)),
        (b"garbage", Some(Refusal::Certificate)),
        (&leaf[..leaf.len() - 1], Some(Refusal::Certificate)),
        (leaf, Some(Refusal::NoIssuer)),
        (&[leaf, b"garbage"].concat(), Some(Refusal::Certificate)),
        (&[leaf, root, issuer].concat(), Some(Refusal::IssuerElsewhere)),
        (&[leaf, leaf].concat(), Some(Refusal::IssuerElsewhere)),
        (&[leaf, namesake.der()].concat(), Some(Refusal::IssuerElsewhere)),
        (&[served.der(), servant.der()].concat(), Some(Refusal::IssuerElsewhere)),
    ] {
        assert_eq!(responder_url(chain).err(), expected);
        assert_eq!(request(chain).err(), expected);
        let validated = validate(&Draft::good(&pki.chain(), &pki.issuer).signed(), chain, MADE);
        assert_eq!(validated.err(), expected);
    }
}

#[test]
fn the_issuer_may_say_that_a_certificate_is_good() {
    let pki = Pki::new();
    let chain = pki.chain();
    let other = Pki::new();
    let good = || Draft::good(&chain, &pki.issuer);
    let about_two = vec![single(&id(&other.chain()), UNKNOWN, MADE, None), good().singles.remove(0)];
    for draft in [
        good(),
        Draft { by_key: true, ..good() },
        good().with(&pki.issuer),
        good().with(&other.issuer),
        Draft { version: &[EXPLICIT_0, 3, INTEGER, 1, 0], ..good() },
        Draft { singles: about_two, ..good() },
    ] {
        assert_eq!(validate(&draft.signed(), &chain, MADE), Ok(Some(MADE + DAY)));
    }
    let endless = Draft::of(single(&id(&chain), GOOD, MADE, None), &pki.issuer);
    assert_eq!(validate(&endless.signed(), &chain, MADE + 1000 * DAY), Ok(None));
}

#[test]
fn a_response_tells_which_certificate_it_is_about() {
    let serial = |params: &mut CertificateParams| params.serial_number = Some(7.into());
    let (pki, other) = (Pki::with(serial), Pki::new());
    let chain = pki.chain();
    let response = Draft::good(&chain, &pki.issuer).signed();
    assert!(is_about(&response, &chain) && !is_about(&response, &other.chain()));
    // Another issuer has given the same number.
    let elsewhere = Owner::new("leaf", Some(&Owner::authority("elsewhere", None)), serial);
    assert!(!is_about(&response, elsewhere.der()));
    assert!(!is_about(b"no response", &chain) && !is_about(&response, b"no certificate"));
    let two = vec![single(&id(&other.chain()), GOOD, MADE, None), single(&id(&chain), GOOD, MADE, None)];
    let two = Draft { singles: two, ..Draft::good(&chain, &pki.issuer) }.signed();
    assert!(is_about(&two, &chain) && is_about(&two, &other.chain()));
}

#[test]
fn nobody_else_may_but_whom_the_issuer_names() {
    let pki = Pki::new();
    let chain = pki.chain();
    let named = Owner::responder(&pki.issuer, |_| {});
    let good = || Draft::good(&chain, &named).with(&named);
    for draft in [good(), Draft { by_key: true, ..good() }, Draft::good(&chain, &named).with(&pki.root).with(&named)] {
        assert_eq!(validate(&draft.signed(), &chain, MADE), Ok(Some(MADE + DAY)));
    }
    let unnamed = Owner::new("server", Some(&pki.issuer), |_| {});
    let other_use =
        Owner::responder(&pki.issuer, |p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]);
    let expired = Owner::responder(&pki.issuer, |p| p.not_after = date_time_ymd(2025, 12, 31));
    let future = Owner::responder(&pki.issuer, |p| p.not_before = date_time_ymd(2026, 1, 2));
    let strange = Owner::responder(&pki.issuer, |params| {
        let mut extension = CustomExtension::from_oid_content(&[1, 2, 3, 4], vec![5, 0]);
        extension.set_criticality(true);
        params.custom_extensions.push(extension);
    });
    let of_root = Owner::responder(&pki.root, |_| {});
    let impostor = Owner::authority("issuer", None);
    let of_impostor = Owner::responder(&impostor, |_| {});
    let orphan = Owner::new("orphan", None, |p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::OcspSigning]);
    for signer in [
        &unnamed,
        &other_use,
        &expired,
        &future,
        &strange,
        &of_root,
        &impostor,
        &of_impostor,
        &orphan,
        &pki.leaf,
        &pki.root,
    ] {
        let draft = Draft::good(&chain, signer).with(signer);
        assert_eq!(validate(&draft.signed(), &chain, MADE), Err(Refusal::Unverified), "{:?}", signer.params);
    }
    let mut absent = Draft::good(&chain, &named);
    assert_eq!(validate(&absent.signed(), &chain, MADE), Err(Refusal::Unverified), "its certificate is not there");
    absent.certificates = vec![b"\x30\x01\x00", named.der()];
    assert_eq!(validate(&absent.signed(), &chain, MADE), Err(Refusal::Unverified), "the one before it cannot be read");
    // The first that has the name is the signer.
    let namesakes = Draft::good(&chain, &named).with(&expired).with(&named);
    assert_eq!(validate(&namesakes.signed(), &chain, MADE), Err(Refusal::Unverified));
}

#[test]
fn only_a_good_certificate_is_good() {
    let pki = Pki::new();
    let (chain, other) = (pki.chain(), id(&Pki::new().chain()));
    let sibling = Owner::new("sibling", Some(&pki.issuer), |_| {});
    let sibling = id(&[sibling.der(), pki.issuer.der()].concat());
    let revoked = der(0xa1, &[&time(MADE)]);
    let id = id(&chain);
    // The same hashes, said to be of another digest than 1.3.14.3.2.26.
    let mut renamed = id.clone();
    renamed[10] += 1;
    let cases = [
        (single(&id, &revoked, MADE, None), Refusal::Revoked),
        (single(&id, UNKNOWN, MADE, None), Refusal::Unknown),
        (single(&other, GOOD, MADE, None), Refusal::NotFound),
        (single(&sibling, GOOD, MADE, None), Refusal::NotFound),
        (single(&renamed, GOOD, MADE, None), Refusal::NotFound),
        (Vec::new(), Refusal::NotFound),
    ];
    for (single, expected) in cases {
        let draft = Draft::of(single, &pki.issuer);
        assert_eq!(validate(&draft.signed(), &chain, MADE), Err(expected));
    }
}

#[test]
fn a_response_holds_from_one_update_to_the_next() {
    let pki = Pki::new();
    let chain = pki.chain();
    let at = |next_update: Option<i64>, now: i64| {
        let draft = Draft::of(single(&id(&chain), GOOD, MADE, next_update), &pki.issuer);
        validate(&draft.signed(), &chain, now)
    };
    let end = MADE + DAY;
    for now in [MADE - SKEW, MADE, end, end + SKEW] {
        assert_eq!(at(Some(end), now), Ok(Some(end)), "{now}");
    }
    for now in [i64::MIN, 0, MADE - SKEW - 1, end + SKEW + 1, i64::MAX] {
        assert_eq!(at(Some(end), now), Err(Refusal::Untimely), "{now}");
    }
    assert_eq!(at(None, MADE - SKEW - 1), Err(Refusal::Untimely));
    assert_eq!(at(Some(MADE - 1), MADE), Err(Refusal::Untimely), "the next before this one");
}

#[test]
fn what_is_no_response_is_refused() {
    let pki = Pki::new();
    let chain = pki.chain();
    let response = Draft::good(&chain, &pki.issuer).signed();
    let status = |status: u8| der(SEQUENCE, &[&[ENUMERATED, 1, status]]);
    let none = Draft { kind: &BASIC[..8], ..Draft::good(&chain, &pki.issuer) }.signed();
    let future = Draft { version: &[EXPLICIT_0, 3, INTEGER, 1, 1], ..Draft::good(&chain, &pki.issuer) }.signed();
    let mut long = response.clone();
    long.resize(MAX_LEN, 0);
    assert_eq!(validate(&long, &chain, MADE), Err(Refusal::Response));
    long.push(0);
    for (response, expected) in [
        (&b""[..], "d2i_OCSP_RESPONSE() failed"),
        (b"garbage", "d2i_OCSP_RESPONSE() failed"),
        (&[&response[..], &[0]].concat(), "d2i_OCSP_RESPONSE() failed"),
        (&long, "the OCSP response is longer than 1048576 bytes"),
        (&status(6), "OCSP response not successful (6: unauthorized)"),
        (&status(3), "OCSP response not successful (3: trylater)"),
        (&status(4), "OCSP response not successful (4: (UNKNOWN))"),
        (&status(0), "OCSP_response_get1_basic() failed"),
        (&none, "OCSP_response_get1_basic() failed"),
        (&future, "OCSP_response_get1_basic() failed"),
    ] {
        let refusal = validate(response, &chain, MADE).expect_err("no response");
        assert_eq!(refusal.to_string(), expected);
    }
}

/// Whatever happens to a byte or to the end of a response, it says what was signed or nothing; and nothing panics.
#[test]
fn damage_is_refused() {
    let pki = Pki::with(|params| params.custom_extensions.push(access(&[(1, "http://ocsp/")])));
    let chain = pki.chain();
    let named = Owner::responder(&pki.issuer, |_| {});
    for draft in [Draft::good(&chain, &pki.issuer), Draft::good(&chain, &named).with(&named)] {
        let response = draft.signed();
        for cut in 0..response.len() {
            assert!(validate(&response[..cut], &chain, MADE).is_err(), "{cut}");
        }
        for bit in 0..8 * response.len() {
            let mut damaged = response.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let said = validate(&damaged, &chain, MADE);
            assert!(said.is_err() || said == Ok(Some(MADE + DAY)), "{bit}: {said:?}");
        }
    }
    let response = Draft::good(&chain, &pki.issuer).signed();
    let pair = pki.leaf.der().len() + pki.issuer.der().len();
    for cut in 0..pair {
        assert!(request(&chain[..cut]).is_err() && responder_url(&chain[..cut]).is_err(), "{cut}");
    }
    for at in 0..pair {
        let mut damaged = chain.clone();
        damaged[at] ^= 1 << (at % 8);
        let _ = (request(&damaged), responder_url(&damaged), validate(&response, &damaged, MADE));
    }
}
