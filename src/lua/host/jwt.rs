//! Signatures of JSON Web Tokens (RFC 7518): HS*, RS*, PS*, ES256, ES384, ES512, EdDSA. All but ES512, whose curve ring has not, by ring.

use p521::ecdsa::signature::{Signer, Verifier};
use ring::{rand::SystemRandom, rsa, signature};

use super::{Answer, crypto::hmac_bytes};
use crate::{
    error::Result,
    lua::api::{Api, Phases, Stack},
};

pub fn register(api: &mut Api) -> Result<()> {
    let any = Phases::ANY;
    api.func("native.jwt.sign", any, "sign(alg, secret or PEM, text): the signature; nil, err", sign)?;
    api.func(
        "native.jwt.verify",
        any,
        "verify(alg, secret or PEM, text, signature): whether it holds; nil, err",
        verify,
    )
}

/// The digest of an HS algorithm.
fn mac(alg: &[u8]) -> Option<&'static [u8]> {
    Some(match alg {
        b"HS256" => b"sha256",
        b"HS384" => b"sha384",
        b"HS512" => b"sha512",
        _ => return None,
    })
}

fn sign(s: &Stack) -> Answer {
    let (alg, key, text) = (s.arg_bytes(1)?, s.arg_bytes(2)?, s.arg_bytes(3)?);
    let signed = match mac(alg) {
        Some(digest) => hmac_bytes(digest, key, text).ok_or("unsupported algorithm"),
        None => sign_with_key(alg, key, text),
    };
    match signed {
        Ok(signature) => Ok(s.push_bytes(signature)),
        Err(why) => s.fail(why),
    }
}

fn verify(s: &Stack) -> Answer {
    let (alg, key, text, given) = (s.arg_bytes(1)?, s.arg_bytes(2)?, s.arg_bytes(3)?, s.arg_bytes(4)?);
    if let Some(digest) = mac(alg) {
        use subtle::ConstantTimeEq;
        let made = hmac_bytes(digest, key, text).unwrap_or_default();
        return Ok(s.push_bool(!made.is_empty() && made.ct_eq(given).into()));
    }
    if alg == b"ES512" {
        return match es512_key(key) {
            Some(key) => Ok(s.push_bool(es512_holds(&key, text, given))),
            None => s.fail("failed to load the public key"),
        };
    }
    match public_key(alg, key) {
        Ok((algorithm, der)) => {
            let holds = signature::UnparsedPublicKey::new(algorithm, der).verify(text, given).is_ok();
            Ok(s.push_bool(holds))
        }
        Err(why) => s.fail(why),
    }
}

fn sign_with_key(alg: &[u8], key: &[u8], text: &[u8]) -> std::result::Result<Vec<u8>, &'static str> {
    const BAD: &str = "failed to load the private key";
    let (label, der) = pem(key).ok_or(BAD)?;
    let random = SystemRandom::new();
    let ecdsa = |algorithm| {
        let pair = match label {
            "EC PRIVATE KEY" => {
                let (private, public) = sec1(&der).ok_or(BAD)?;
                signature::EcdsaKeyPair::from_private_key_and_public_key(algorithm, private, public, &random)
            }
            _ => signature::EcdsaKeyPair::from_pkcs8(algorithm, &der, &random),
        };
        let signed = pair.map_err(|_| BAD)?.sign(&random, text).map_err(|_| "failed to sign")?;
        Ok(signed.as_ref().to_vec())
    };
    let padding: &dyn signature::RsaEncoding = match alg {
        b"RS256" => &signature::RSA_PKCS1_SHA256,
        b"RS384" => &signature::RSA_PKCS1_SHA384,
        b"RS512" => &signature::RSA_PKCS1_SHA512,
        b"PS256" => &signature::RSA_PSS_SHA256,
        b"PS384" => &signature::RSA_PSS_SHA384,
        b"PS512" => &signature::RSA_PSS_SHA512,
        b"ES256" => return ecdsa(&signature::ECDSA_P256_SHA256_FIXED_SIGNING),
        b"ES384" => return ecdsa(&signature::ECDSA_P384_SHA384_FIXED_SIGNING),
        b"ES512" => {
            let private = ec_private(label, &der).and_then(|key| p521::ecdsa::SigningKey::from_slice(key).ok());
            let signed: p521::ecdsa::Signature = private.ok_or(BAD)?.try_sign(text).map_err(|_| "failed to sign")?;
            return Ok(signed.to_bytes().to_vec());
        }
        b"EdDSA" => {
            let pair = signature::Ed25519KeyPair::from_pkcs8_maybe_unchecked(&der).map_err(|_| BAD)?;
            return Ok(pair.sign(text).as_ref().to_vec());
        }
        _ => return Err("unsupported algorithm"),
    };
    let pair = match label {
        "RSA PRIVATE KEY" => rsa::KeyPair::from_der(&der),
        _ => rsa::KeyPair::from_pkcs8(&der),
    };
    let pair = pair.map_err(|_| BAD)?;
    let mut signed = vec![0; pair.public().modulus_len()];
    pair.sign(padding, &random, text, &mut signed).map_err(|_| "failed to sign")?;
    Ok(signed)
}

type Algorithm = &'static dyn signature::VerificationAlgorithm;

/// The number of a private EC key, in SEC 1's form or in PKCS #8's around it.
fn ec_private<'a>(label: &str, der: &'a [u8]) -> Option<&'a [u8]> {
    if label == "EC PRIVATE KEY" {
        return sec1(der).map(|(private, _)| private);
    }
    let (SEQUENCE, body, _) = element(der)? else { return None };
    let (_, _, rest) = element(body)?;
    let (SEQUENCE, _, rest) = element(rest)? else { return None };
    let (OCTETS, key, _) = element(rest)? else { return None };
    sec1(key).map(|(private, _)| private)
}

fn es512_key(text: &[u8]) -> Option<p521::ecdsa::VerifyingKey> {
    let (label, der) = pem(text)?;
    p521::ecdsa::VerifyingKey::from_sec1_bytes(&public_bytes(label, der)?).ok()
}

fn es512_holds(key: &p521::ecdsa::VerifyingKey, text: &[u8], given: &[u8]) -> bool {
    p521::ecdsa::Signature::from_slice(given).is_ok_and(|given| key.verify(text, &given).is_ok())
}

/// The bits of the key in a PEM block.
fn public_bytes(label: &str, der: Vec<u8>) -> Option<Vec<u8>> {
    match label {
        "RSA PUBLIC KEY" => Some(der),
        "CERTIFICATE" => certificate_key(&der).and_then(|spki| spki_key(&spki)),
        _ => spki_key(&der),
    }
}

/// The algorithm and the key as ring wants it.
fn public_key(alg: &[u8], key: &[u8]) -> std::result::Result<(Algorithm, Vec<u8>), &'static str> {
    let algorithm: Algorithm = match alg {
        // Keys of 1024 bits are weak, and there are consumers that have them.
        b"RS256" => &signature::RSA_PKCS1_1024_8192_SHA256_FOR_LEGACY_USE_ONLY,
        b"RS384" => &signature::RSA_PKCS1_2048_8192_SHA384,
        b"RS512" => &signature::RSA_PKCS1_1024_8192_SHA512_FOR_LEGACY_USE_ONLY,
        b"PS256" => &signature::RSA_PSS_2048_8192_SHA256,
        b"PS384" => &signature::RSA_PSS_2048_8192_SHA384,
        b"PS512" => &signature::RSA_PSS_2048_8192_SHA512,
        b"ES256" => &signature::ECDSA_P256_SHA256_FIXED,
        b"ES384" => &signature::ECDSA_P384_SHA384_FIXED,
        b"EdDSA" => &signature::ED25519,
        _ => return Err("unsupported algorithm"),
    };
    let (label, der) = pem(key).ok_or("failed to load the public key")?;
    Ok((algorithm, public_bytes(label, der).ok_or("failed to load the public key")?))
}

/// The first PEM block: its label and bytes.
pub(in crate::lua) fn pem(text: &[u8]) -> Option<(&str, Vec<u8>)> {
    use base64::Engine;
    let text = std::str::from_utf8(text).ok()?;
    let rest = &text[text.find("-----BEGIN ")? + 11..];
    let (label, rest) = rest.split_once("-----")?;
    let body = &rest[..rest.find("-----END ")?];
    let body: String = body.chars().filter(|c| !c.is_ascii_whitespace()).collect();
    Some((label, base64::engine::general_purpose::STANDARD.decode(body).ok()?))
}

/// Tag, content and what follows of a DER element.
pub(super) fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = der.split_first()?;
    let (&first, mut rest) = rest.split_first()?;
    let len = if first < 0x80 {
        first as usize
    } else {
        let count = (first & 0x7f) as usize;
        if count == 0 || count > 4 || count > rest.len() {
            return None;
        }
        let len = rest[..count].iter().fold(0, |n, b| n << 8 | *b as usize);
        rest = &rest[count..];
        len
    };
    (len <= rest.len()).then(|| (tag, &rest[..len], &rest[len..]))
}

pub(super) const SEQUENCE: u8 = 0x30;
pub(super) const OCTETS: u8 = 0x04;
pub(super) const BITS: u8 = 0x03;

/// The key inside a SubjectPublicKeyInfo.
pub(super) fn spki_key(der: &[u8]) -> Option<Vec<u8>> {
    let (SEQUENCE, info, _) = element(der)? else { return None };
    let (SEQUENCE, _, rest) = element(info)? else { return None };
    let (BITS, bits, _) = element(rest)? else { return None };
    // The first byte counts unused bits.
    bits.split_first().map(|(_, key)| key.to_vec())
}

/// The SubjectPublicKeyInfo of a certificate: the first element of its body that is a sequence of a sequence and bits.
pub(super) fn certificate_key(der: &[u8]) -> Option<Vec<u8>> {
    let (SEQUENCE, certificate, _) = element(der)? else { return None };
    let (SEQUENCE, mut body, _) = element(certificate)? else { return None };
    while !body.is_empty() {
        let start = body;
        let (tag, _, rest) = element(body)?;
        let whole = &start[..start.len() - rest.len()];
        if tag == SEQUENCE && spki_key(whole).is_some() {
            return Some(whole.to_vec());
        }
        body = rest;
    }
    None
}

/// Private and public key of a SEC 1 ECPrivateKey.
pub(super) fn sec1(der: &[u8]) -> Option<(&[u8], &[u8])> {
    let (SEQUENCE, body, _) = element(der)? else { return None };
    let (_, _, rest) = element(body)?;
    let (OCTETS, private, mut rest) = element(rest)? else { return None };
    while !rest.is_empty() {
        let (tag, content, after) = element(rest)?;
        if tag == 0xa1 {
            let (BITS, bits, _) = element(content)? else { return None };
            return Some((private, bits.get(1..)?));
        }
        rest = after;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::tests::check;

    #[test]
    fn secrets_sign_and_verify() {
        check(
            "local j = require('moongate.native').jwt
             local text = 'eyJhbGciOiJIUzI1NiJ9.eyJhIjoxfQ'
             local sig = j.sign('HS256', 'secret', text)
             return tostring(j.verify('HS256', 'secret', text, sig)) .. tostring(j.verify('HS256', 'other', text, sig))
                 .. tostring(j.verify('HS512', 'secret', text, sig)) .. select(2, j.sign('none', 'x', 'y'))",
            "truefalsefalsefailed to load the private key",
        );
    }

    #[test]
    fn keys_sign_and_verify() {
        for (kind, alg) in [
            (&rcgen::PKCS_ECDSA_P256_SHA256, "ES256"),
            (&rcgen::PKCS_ECDSA_P384_SHA384, "ES384"),
            (&rcgen::PKCS_ED25519, "EdDSA"),
        ] {
            let key = rcgen::KeyPair::generate_for(kind).expect("a key");
            let (private, public) = (key.serialize_pem(), key.public_key_pem());
            check(
                &format!(
                    "local j = require('moongate.native').jwt
                     local sig = assert(j.sign('{alg}', [[{private}]], 'text'))
                     return tostring(j.verify('{alg}', [[{public}]], 'text', sig))
                         .. tostring(j.verify('{alg}', [[{public}]], 'texu', sig))"
                ),
                "truefalse",
            );
        }
    }

    /// Keys and signature are OpenSSL's.
    #[test]
    fn es512_is_the_one_of_openssl() {
        let (private, public) = (include_str!("testdata/p521.pem"), include_str!("testdata/p521_public.pem"));
        let signature = include_str!("testdata/p521.sig");
        check(
            &format!(
                "local j = require('moongate.native').jwt
                 local given, sig = ngx.decode_base64('{signature}'), assert(j.sign('ES512', [[{private}]], 'text'))
                 local function holds(...) return tostring(j.verify('ES512', [[{public}]], ...)) end
                 return holds('text', given) .. holds('text', sig) .. holds('texu', sig) .. holds('text', 'short')
                     .. #sig .. select(2, j.sign('ES512', [[{public}]], 'text'))"
            ),
            "truetruefalsefalse132failed to load the private key",
        );
    }

    #[test]
    fn a_broken_key_is_an_error() {
        check(
            "local ok, e = require('moongate.native').jwt.verify('RS256', 'no pem', 'a', 'b') return tostring(ok) .. e",
            "nilfailed to load the public key",
        );
    }
}
