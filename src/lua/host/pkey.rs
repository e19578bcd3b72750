//! Asymmetric keys: what `resty.rsa` and `resty.openssl.pkey` stand on. RSA of 1024 to 8192 bits, EC on P-256 and P-384, Ed25519.
//!
//! A key is parsed once and kept as an object. RSA's private operations are blinded and in constant time.

use std::rc::Rc;

use md5::Md5;
use ring::{
    rand::{SecureRandom, SystemRandom},
    signature::{self, KeyPair},
};
use rsa::{
    Oaep, Pkcs1v15Encrypt, Pkcs1v15Sign, PrivateKey, Pss, PublicKey,
    pkcs1::{DecodeRsaPrivateKey, DecodeRsaPublicKey, EncodeRsaPrivateKey, EncodeRsaPublicKey},
    pkcs8::{
        DecodePrivateKey, DecodePublicKey, EncodePrivateKey, EncodePublicKey, EncryptedPrivateKeyInfoRef,
        SecretDocument,
    },
    rand_core::{TryCryptoRng, TryRng},
    traits::{PrivateKeyParts, PublicKeyParts},
};
use sha1::Sha1;
use sha2::{Digest, Sha224, Sha256, Sha384, Sha512};

use super::{Answer, jwt};
use crate::{
    error::Result,
    exchange::Phase,
    lua::{
        Op, Value, Wait,
        api::{Api, Phases, Raise, Stack},
        fast,
        ngx::object,
        sched::{Values, failed},
    },
};

/// A longer text is no key.
const MAX_KEY: usize = 64 * 1024;

pub fn register(api: &mut Api) -> Result<()> {
    let any = Phases::ANY;
    api.func("native.pkey.load", any, "load(PEM or DER, password?) -> key | nil, err", load)?;
    api.wait(
        "native.pkey.generate",
        any,
        "generate(\"RSA\", bits) or (\"EC\", curve) or (\"Ed25519\") -> key | nil, err",
        generate,
    )?;
    api.func("native.pkey.info", any, "info(key) -> kind, bits or curve, whether it is private", info)?;
    api.func(
        "native.pkey.export",
        any,
        "export(key, private, traditional, der) -> text | nil, err: PKCS #8 and SubjectPublicKeyInfo, or PKCS #1",
        export,
    )?;
    api.func("native.pkey.parameters", any, "parameters(key) -> table of binary numbers", parameters)?;
    api.func("native.pkey.encrypt", any, "encrypt(key, padding, digest, text) -> bytes | nil, err", encrypt)?;
    api.func("native.pkey.decrypt", any, "decrypt(key, padding, digest, bytes) -> text | nil, err", decrypt)?;
    api.func("native.pkey.sign", any, "sign(key, padding, digest, text) -> bytes | nil, err", sign)?;
    api.func("native.pkey.verify", any, "verify(key, padding, digest, text, signature) -> boolean | nil, err", verify)
}

enum Key {
    RsaPrivate(Box<PrivateKey>),
    RsaPublic(PublicKey),
    Ec { curve: &'static Curve, private: Option<Vec<u8>>, public: Vec<u8> },
    Ed25519 { seed: Option<Vec<u8>>, public: Vec<u8> },
}

struct Curve {
    name: &'static str,
    oid: &'static [u8],
    bytes: usize,
    sign: &'static signature::EcdsaSigningAlgorithm,
    verify: [(&'static str, &'static signature::EcdsaVerificationAlgorithm); 2],
    digest: &'static str,
}

static CURVES: [Curve; 2] = [
    Curve {
        name: "prime256v1",
        oid: &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07],
        bytes: 32,
        sign: &signature::ECDSA_P256_SHA256_ASN1_SIGNING,
        verify: [("sha256", &signature::ECDSA_P256_SHA256_ASN1), ("sha384", &signature::ECDSA_P256_SHA384_ASN1)],
        digest: "sha256",
    },
    Curve {
        name: "secp384r1",
        oid: &[0x2b, 0x81, 0x04, 0x00, 0x22],
        bytes: 48,
        sign: &signature::ECDSA_P384_SHA384_ASN1_SIGNING,
        verify: [("sha256", &signature::ECDSA_P384_SHA256_ASN1), ("sha384", &signature::ECDSA_P384_SHA384_ASN1)],
        digest: "sha384",
    },
];

const EC_OID: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01];
const ED25519_OID: &[u8] = &[0x2b, 0x65, 0x70];

/// ring's randomness in the words of the rsa crate.
struct System(SystemRandom);

fn system() -> System {
    System(SystemRandom::new())
}

impl TryRng for System {
    type Error = std::io::Error;

    fn try_next_u32(&mut self) -> std::result::Result<u32, Self::Error> {
        let mut bytes = [0; 4];
        self.try_fill_bytes(&mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn try_next_u64(&mut self) -> std::result::Result<u64, Self::Error> {
        let mut bytes = [0; 8];
        self.try_fill_bytes(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn try_fill_bytes(&mut self, dest: &mut [u8]) -> std::result::Result<(), Self::Error> {
        self.0.fill(dest).map_err(|_| std::io::ErrorKind::Other.into())
    }
}

impl TryCryptoRng for System {}

type Failure = &'static str;
const BAD_KEY: Failure = "failed to load the key";

fn load(s: &Stack) -> Answer {
    let (text, password) = (s.arg_bytes(1)?, s.opt_bytes(2)?);
    if text.len() > MAX_KEY {
        return s.fail(BAD_KEY);
    }
    match parse(text, password) {
        Ok(key) => Ok(object::push(s, Rc::new(key))),
        Err(why) => s.fail(why),
    }
}

fn parse(text: &[u8], password: Option<&[u8]>) -> std::result::Result<Key, Failure> {
    let Some((label, der)) = jwt::pem(text) else { return parse_der(text).ok_or(BAD_KEY) };
    match label {
        "ENCRYPTED PRIVATE KEY" => {
            let password = password.ok_or("the key needs a password")?;
            let der = decrypted(&der, password).ok_or("failed to decrypt the key")?;
            parse_der(der.as_bytes()).ok_or(BAD_KEY)
        }
        "CERTIFICATE" => jwt::certificate_key(&der).and_then(|spki| parse_der(&spki)).ok_or(BAD_KEY),
        _ => parse_der(&der).ok_or(BAD_KEY),
    }
}

/// The PKCS #8 of an encrypted one (RFC 8018); `None` when the password is not its own.
pub(in crate::lua) fn decrypted(der: &[u8], password: &[u8]) -> Option<SecretDocument> {
    EncryptedPrivateKeyInfoRef::try_from(der).ok()?.decrypt(password).ok()
}

/// Any of PKCS #8, SubjectPublicKeyInfo, PKCS #1 and SEC 1.
fn parse_der(der: &[u8]) -> Option<Key> {
    let private = PrivateKey::from_pkcs8_der(der).ok().or_else(|| PrivateKey::from_pkcs1_der(der).ok());
    if let Some(key) = private {
        return Some(Key::RsaPrivate(Box::new(key)));
    }
    let public = PublicKey::from_public_key_der(der).ok().or_else(|| PublicKey::from_pkcs1_der(der).ok());
    public.map(Key::RsaPublic).or_else(|| parse_spki(der)).or_else(|| parse_pkcs8(der)).or_else(|| parse_sec1(der))
}

/// Content of the next element, which must have this tag, and what follows it.
fn expect(der: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (found, content, rest) = jwt::element(der)?;
    (found == tag).then_some((content, rest))
}

fn curve_of(algorithm: &[u8]) -> Option<&'static Curve> {
    let (oid, rest) = expect(algorithm, OID)?;
    let (curve, _) = expect(rest, OID)?;
    CURVES.iter().find(|c| oid == EC_OID && c.oid == curve)
}

fn is_ed25519(algorithm: &[u8]) -> bool {
    expect(algorithm, OID).is_some_and(|(oid, _)| oid == ED25519_OID)
}

fn parse_spki(der: &[u8]) -> Option<Key> {
    let (body, _) = expect(der, jwt::SEQUENCE)?;
    let (algorithm, _) = expect(body, jwt::SEQUENCE)?;
    let public = jwt::spki_key(der)?;
    if is_ed25519(algorithm) {
        return (public.len() == 32).then_some(Key::Ed25519 { seed: None, public });
    }
    let curve = curve_of(algorithm)?;
    (public.len() == 2 * curve.bytes + 1 && public[0] == 4).then_some(Key::Ec { curve, private: None, public })
}

fn parse_pkcs8(der: &[u8]) -> Option<Key> {
    let (body, _) = expect(der, jwt::SEQUENCE)?;
    let (_, rest) = expect(body, INTEGER)?;
    let (algorithm, rest) = expect(rest, jwt::SEQUENCE)?;
    let (key, _) = expect(rest, jwt::OCTETS)?;
    if is_ed25519(algorithm) {
        let (seed, _) = expect(key, jwt::OCTETS)?;
        return ed25519(seed);
    }
    ec(curve_of(algorithm)?, key)
}

fn parse_sec1(der: &[u8]) -> Option<Key> {
    let (private, _) = jwt::sec1(der)?;
    ec(CURVES.iter().find(|c| c.bytes == private.len())?, der)
}

/// ring tells whether private and public key belong together.
fn ec(curve: &'static Curve, sec1: &[u8]) -> Option<Key> {
    let (private, public) = jwt::sec1(sec1)?;
    ec_pair(curve, private, public)?;
    Some(Key::Ec { curve, private: Some(private.to_vec()), public: public.to_vec() })
}

fn ec_pair(curve: &Curve, private: &[u8], public: &[u8]) -> Option<signature::EcdsaKeyPair> {
    signature::EcdsaKeyPair::from_private_key_and_public_key(curve.sign, private, public, &SystemRandom::new()).ok()
}

fn ed25519(seed: &[u8]) -> Option<Key> {
    let pair = signature::Ed25519KeyPair::from_seed_unchecked(seed).ok()?;
    Some(Key::Ed25519 { seed: Some(seed.to_vec()), public: pair.public_key().as_ref().to_vec() })
}

/// RSA keys take their time: they are made off the worker's thread.
fn generate(s: &Stack) -> std::result::Result<Wait, Raise> {
    let kind = s.arg_str(1)?;
    let made = match &*kind {
        "RSA" => {
            let bits = s.opt_number(2)?.unwrap_or(2048.0);
            if !(1024.0..=8192.0).contains(&bits) {
                return s.fail("bits must be 1024 to 8192").map(Wait::Ready);
            }
            let make = move || PrivateKey::new(&mut system(), bits as usize).map(|k| Key::RsaPrivate(Box::new(k))).ok();
            if fast::phase() != Phase::Init {
                return Ok(Wait::Park(Op::future(generated(make))));
            }
            make()
        }
        "EC" => {
            let name = s.opt_bytes(2)?.unwrap_or(b"prime256v1");
            let name: &[u8] = if name == b"P-256" || name == b"secp256r1" { b"prime256v1" } else { name };
            let name: &[u8] = if name == b"P-384" { b"secp384r1" } else { name };
            let Some(curve) = CURVES.iter().find(|c| c.name.as_bytes() == name) else {
                return s.fail("unsupported curve").map(Wait::Ready);
            };
            let document = signature::EcdsaKeyPair::generate_pkcs8(curve.sign, &SystemRandom::new()).ok();
            document.and_then(|document| parse_pkcs8(document.as_ref()))
        }
        "Ed25519" => {
            let mut seed = [0; 32];
            SystemRandom::new().fill(&mut seed).ok().and_then(|()| ed25519(&seed))
        }
        _ => return s.fail("unsupported key type").map(Wait::Ready),
    };
    Ok(Wait::Ready(match made {
        Some(key) => object::push(s, Rc::new(key)),
        None => s.fail("failed to generate a key")?,
    }))
}

async fn generated(make: impl FnOnce() -> Option<Key> + Send + 'static) -> Values {
    match tokio::task::spawn_blocking(make).await {
        Ok(Some(key)) => smallvec::smallvec![Value::Push(Box::new(move |s| {
            object::push(s, Rc::new(key));
        }))],
        _ => failed("failed to generate a key"),
    }
}

fn info(s: &Stack) -> Answer {
    match &*object::get::<Key>(s, 1)? {
        Key::RsaPrivate(key) => Ok(s.push_bytes("RSA") + s.push_number(rsa_bits(&**key)) + s.push_bool(true)),
        Key::RsaPublic(key) => Ok(s.push_bytes("RSA") + s.push_number(rsa_bits(key)) + s.push_bool(false)),
        Key::Ec { curve, private, .. } => {
            Ok(s.push_bytes("EC") + s.push_bytes(curve.name) + s.push_bool(private.is_some()))
        }
        Key::Ed25519 { seed, .. } => Ok(s.push_bytes("Ed25519") + s.push_number(256.0) + s.push_bool(seed.is_some())),
    }
}

fn rsa_bits(key: &impl PublicKeyParts) -> f64 {
    (key.n_bytes().len() * 8 - key.n_bytes().first().map_or(0, |b| b.leading_zeros() as usize)) as f64
}

const INTEGER: u8 = 0x02;
const OID: u8 = 0x06;

/// A DER element.
fn der(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let content = parts.concat();
    let mut out = vec![tag];
    match content.len() {
        len @ ..0x80 => out.push(len as u8),
        len @ ..0x100 => out.extend([0x81, len as u8]),
        len => out.extend([0x82, (len >> 8) as u8, len as u8]),
    }
    out.extend(content);
    out
}

fn export(s: &Stack) -> Answer {
    let key = object::get::<Key>(s, 1)?;
    let (private, traditional, as_der) = (s.boolean(2), s.boolean(3), s.boolean(4));
    let encoded = if private { private_der(&key, traditional) } else { public_der(&key, traditional) };
    let Some((label, bytes)) = encoded else { return s.fail("the key cannot be written so") };
    Ok(if as_der { s.push_bytes(bytes) } else { s.push_bytes(pem_of(label, &bytes)) })
}

fn pem_of(label: &str, bytes: &[u8]) -> String {
    use base64::Engine;
    let text = base64::engine::general_purpose::STANDARD.encode(bytes);
    let lines: Vec<&str> = text.as_bytes().chunks(64).filter_map(|line| std::str::from_utf8(line).ok()).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

type Encoded = Option<(&'static str, Vec<u8>)>;

fn private_der(key: &Key, traditional: bool) -> Encoded {
    match key {
        Key::RsaPrivate(key) if traditional => Some(("RSA PRIVATE KEY", key.to_pkcs1_der().ok()?.as_bytes().to_vec())),
        Key::RsaPrivate(key) => Some(("PRIVATE KEY", key.to_pkcs8_der().ok()?.as_bytes().to_vec())),
        Key::Ec { curve, private: Some(private), public } => {
            let bits = der(jwt::BITS, &[&[0], public]);
            let mut parts = vec![der(INTEGER, &[&[1]]), der(jwt::OCTETS, &[private])];
            if traditional {
                parts.push(der(0xa0, &[&der(OID, &[curve.oid])]));
            }
            parts.push(der(0xa1, &[&bits]));
            let sec1 = der(jwt::SEQUENCE, &[&parts.concat()]);
            if traditional {
                return Some(("EC PRIVATE KEY", sec1));
            }
            let algorithm = der(jwt::SEQUENCE, &[&der(OID, &[EC_OID]), &der(OID, &[curve.oid])]);
            Some(("PRIVATE KEY", pkcs8(&algorithm, &sec1)))
        }
        Key::Ed25519 { seed: Some(seed), .. } if !traditional => {
            let algorithm = der(jwt::SEQUENCE, &[&der(OID, &[ED25519_OID])]);
            Some(("PRIVATE KEY", pkcs8(&algorithm, &der(jwt::OCTETS, &[seed]))))
        }
        _ => None,
    }
}

fn pkcs8(algorithm: &[u8], key: &[u8]) -> Vec<u8> {
    der(jwt::SEQUENCE, &[&der(INTEGER, &[&[0]]), algorithm, &der(jwt::OCTETS, &[key])])
}

fn public_der(key: &Key, traditional: bool) -> Encoded {
    let rsa = |key: &PublicKey| -> Encoded {
        match traditional {
            true => Some(("RSA PUBLIC KEY", key.to_pkcs1_der().ok()?.as_bytes().to_vec())),
            false => Some(("PUBLIC KEY", key.to_public_key_der().ok()?.as_bytes().to_vec())),
        }
    };
    let (oids, public) = match key {
        Key::RsaPrivate(key) => return rsa(key.as_public_key()),
        Key::RsaPublic(key) => return rsa(key),
        Key::Ec { curve, public, .. } => ([der(OID, &[EC_OID]), der(OID, &[curve.oid])].concat(), public),
        Key::Ed25519 { public, .. } => (der(OID, &[ED25519_OID]), public),
    };
    let bits = der(jwt::BITS, &[&[0], public]);
    Some(("PUBLIC KEY", der(jwt::SEQUENCE, &[&der(jwt::SEQUENCE, &[&oids]), &bits])))
}

fn parameters(s: &Stack) -> Answer {
    let key = object::get::<Key>(s, 1)?;
    s.push_table(0, 8);
    let put = |name: &str, bytes: &[u8]| {
        s.push_bytes(bytes);
        s.set(-2, name);
    };
    match &*key {
        Key::RsaPublic(key) => {
            put("n", &key.n_bytes());
            put("e", &key.e_bytes());
        }
        Key::RsaPrivate(key) => {
            put("n", &key.n_bytes());
            put("e", &key.e_bytes());
            put("d", &key.d().to_be_bytes_trimmed_vartime());
            for (name, prime) in ["p", "q"].iter().zip(key.primes()) {
                put(name, &prime.to_be_bytes_trimmed_vartime());
            }
        }
        Key::Ec { curve, private, public } => {
            put("x", &public[1..=curve.bytes]);
            put("y", &public[curve.bytes + 1..]);
            put("public", public);
            private.iter().for_each(|private| put("private", private));
        }
        Key::Ed25519 { seed, public } => {
            put("public", public);
            seed.iter().for_each(|seed| put("private", seed));
        }
    }
    Ok(1)
}

/// Runs `$body` with `$D` as the digest's type.
macro_rules! with_digest {
    ($name:expr, $D:ident => $body:expr) => {
        match $name {
            b"md5" => {
                type $D = Md5;
                $body
            }
            b"sha1" => {
                type $D = Sha1;
                $body
            }
            b"sha224" => {
                type $D = Sha224;
                $body
            }
            b"sha256" => {
                type $D = Sha256;
                $body
            }
            b"sha384" => {
                type $D = Sha384;
                $body
            }
            b"sha512" => {
                type $D = Sha512;
                $body
            }
            _ => Err("unsupported digest"),
        }
    };
}

fn answer(s: &Stack, done: std::result::Result<Vec<u8>, Failure>) -> Answer {
    match done {
        Ok(bytes) => Ok(s.push_bytes(bytes)),
        Err(why) => s.fail(why),
    }
}

fn encrypt(s: &Stack) -> Answer {
    let key = object::get::<Key>(s, 1)?;
    let (padding, digest, text) = (s.arg_bytes(2)?, s.arg_bytes(3)?, s.arg_bytes(4)?);
    let key = match &*key {
        Key::RsaPrivate(key) => key.as_public_key(),
        Key::RsaPublic(key) => key,
        _ => return s.fail("only RSA keys encrypt"),
    };
    const FAILED: Failure = "failed to encrypt: the text is too long for the key";
    answer(
        s,
        match padding {
            b"pkcs1" => key.encrypt(&mut system(), Pkcs1v15Encrypt, text).map_err(|_| FAILED),
            b"oaep" => {
                with_digest!(digest, D => key.encrypt(&mut system(), Oaep::<D>::new(), text).map_err(|_| FAILED))
            }
            _ => Err("unsupported padding"),
        },
    )
}

fn decrypt(s: &Stack) -> Answer {
    let key = object::get::<Key>(s, 1)?;
    let (padding, digest, text) = (s.arg_bytes(2)?, s.arg_bytes(3)?, s.arg_bytes(4)?);
    let Key::RsaPrivate(key) = &*key else { return s.fail("only private RSA keys decrypt") };
    const FAILED: Failure = "failed to decrypt";
    answer(
        s,
        match padding {
            b"pkcs1" => key.decrypt_blinded(&mut system(), Pkcs1v15Encrypt, text).map_err(|_| FAILED),
            b"oaep" => with_digest!(digest, D => {
                key.decrypt_blinded(&mut system(), Oaep::<D>::new(), text).map_err(|_| FAILED)
            }),
            _ => Err("unsupported padding"),
        },
    )
}

fn sign(s: &Stack) -> Answer {
    let key = object::get::<Key>(s, 1)?;
    let (padding, digest, text) = (s.arg_bytes(2)?, s.arg_bytes(3)?, s.arg_bytes(4)?);
    const FAILED: Failure = "failed to sign";
    let signed = match &*key {
        Key::RsaPrivate(key) => with_digest!(digest, D => {
            let hashed = D::digest(text);
            let signed = match padding {
                b"pss" => key.sign_with_rng(&mut system(), Pss::<D>::new_blinded(), &hashed),
                _ => key.sign_with_rng(&mut system(), Pkcs1v15Sign::new::<D>(), &hashed),
            };
            signed.map_err(|_| FAILED)
        }),
        Key::Ec { curve, private: Some(private), public } if digest == curve.digest.as_bytes() => {
            let signed = ec_pair(curve, private, public).and_then(|p| p.sign(&SystemRandom::new(), text).ok());
            signed.map(|signature| signature.as_ref().to_vec()).ok_or(FAILED)
        }
        Key::Ec { private: Some(_), .. } => Err("the curve signs with its own digest only"),
        Key::Ed25519 { seed: Some(seed), .. } => {
            let pair = signature::Ed25519KeyPair::from_seed_unchecked(seed).map_err(|_| FAILED);
            pair.map(|pair| pair.sign(text).as_ref().to_vec())
        }
        _ => Err("only private keys sign"),
    };
    answer(s, signed)
}

fn verify(s: &Stack) -> Answer {
    let key = object::get::<Key>(s, 1)?;
    let (padding, digest, text, given) = (s.arg_bytes(2)?, s.arg_bytes(3)?, s.arg_bytes(4)?, s.arg_bytes(5)?);
    let rsa = |key: &PublicKey| {
        with_digest!(digest, D => {
            let hashed = D::digest(text);
            Ok(match padding {
                b"pss" => key.verify(Pss::<D>::new(), &hashed, given),
                _ => key.verify(Pkcs1v15Sign::new::<D>(), &hashed, given),
            }
            .is_ok())
        })
    };
    let holds = match &*key {
        Key::RsaPrivate(key) => rsa(key.as_public_key()),
        Key::RsaPublic(key) => rsa(key),
        Key::Ec { curve, public, .. } => {
            let algorithm = curve.verify.iter().find(|(name, _)| name.as_bytes() == digest);
            algorithm
                .ok_or("unsupported digest")
                .map(|(_, algorithm)| signature::UnparsedPublicKey::new(*algorithm, public).verify(text, given).is_ok())
        }
        Key::Ed25519 { public, .. } => {
            Ok(signature::UnparsedPublicKey::new(&signature::ED25519, public).verify(text, given).is_ok())
        }
    };
    match holds {
        Ok(holds) => Ok(s.push_bool(holds)),
        Err(why) => s.fail(why),
    }
}
