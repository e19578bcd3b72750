//! Digests, HMAC, AES, base64, CRC, random bytes: what `ngx.md5`, `resty.sha256`, `resty.aes` and their like stand on.

use aes::cipher::{
    BlockCipherDecrypt, BlockCipherEncrypt, BlockModeDecrypt, BlockModeEncrypt, KeyInit, KeyIvInit,
    block_padding::Pkcs7,
};
use base64::{
    Engine, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use md5::{Digest, Md5};
use ring::{aead, digest, hmac, rand::SecureRandom};
use sha2::Sha224;

use super::Answer;
use crate::{
    error::Result,
    lua::api::{Api, Phases, Stack},
};

/// The longest run of random bytes that one call gives: more is a mistake in a script.
const MAX_RANDOM: usize = 1 << 20;

/// As nginx decodes: padding may be there or not, bits beyond the last byte do not matter.
const LENIENT: GeneralPurposeConfig = GeneralPurposeConfig::new()
    .with_decode_padding_mode(DecodePaddingMode::Indifferent)
    .with_decode_allow_trailing_bits(true);

const STANDARD: GeneralPurpose = GeneralPurpose::new(&alphabet::STANDARD, LENIENT);
const STANDARD_BARE: GeneralPurpose = GeneralPurpose::new(&alphabet::STANDARD, LENIENT.with_encode_padding(false));
const URL: GeneralPurpose = GeneralPurpose::new(&alphabet::URL_SAFE, LENIENT.with_encode_padding(false));

pub fn register(api: &mut Api) -> Result<()> {
    let any = Phases::ANY;
    api.func(
        "native.crypto.digest",
        any,
        "digest(name, text): md5, sha1, sha224, sha256, sha384, sha512; binary",
        digest_of,
    )?;
    api.func("native.crypto.hmac", any, "hmac(name, key, text): binary; nil, err for an unknown digest", hmac_of)?;
    api.func("native.crypto.hex", any, "hex(text): lower-case hexadecimal", hex)?;
    api.func("native.crypto.unhex", any, "unhex(text): nil when it is not hexadecimal", unhex)?;
    api.func("native.crypto.random", any, "random(n): n bytes from the system", random)?;
    api.func(
        "native.crypto.aes",
        any,
        "aes(encrypt, mode, key, iv, text, padding, aad?): nil, err on failure",
        aes_crypt,
    )?;
    api.func(
        "native.crypto.pbkdf2",
        any,
        "pbkdf2(digest, password, salt, iterations, length): nil, err on failure",
        pbkdf2,
    )?;
    api.func("native.crypto.hkdf", any, "hkdf(digest, key, salt, info, length): nil, err on failure", hkdf)?;
    api.func("native.crypto.equal", any, "equal(a, b): in constant time", equal)?;
    api.func("ngx.md5", any, "md5(text): hexadecimal", md5_hex)?;
    api.func("ngx.md5_bin", any, "md5_bin(text)", md5_bin)?;
    api.func("ngx.sha1_bin", any, "sha1_bin(text)", sha1_bin)?;
    api.func("ngx.hmac_sha1", any, "hmac_sha1(key, text): binary", hmac_sha1)?;
    api.func("ngx.crc32_short", any, "crc32_short(text)", crc32)?;
    api.func("ngx.crc32_long", any, "crc32_long(text)", crc32)?;
    api.func("ngx.encode_base64", any, "encode_base64(text, no_padding?)", encode_base64)?;
    api.func("ngx.decode_base64", any, "decode_base64(text): nil when malformed", decode_base64)?;
    let doc =
        "decode_base64mime(text): characters outside of the alphabet are passed over (RFC 2045); nil when malformed";
    api.func("ngx.decode_base64mime", any, doc, decode_base64mime)?;
    api.func("native.crypto.encode_base64url", any, "encode_base64url(text): without padding", encode_base64url)?;
    api.func("native.crypto.decode_base64url", any, "decode_base64url(text): nil when malformed", decode_base64url)
}

fn algorithm(name: &[u8]) -> Option<&'static digest::Algorithm> {
    Some(match name {
        b"sha1" => &digest::SHA1_FOR_LEGACY_USE_ONLY,
        b"sha256" => &digest::SHA256,
        b"sha384" => &digest::SHA384,
        b"sha512" => &digest::SHA512,
        _ => return None,
    })
}

fn digest_of(s: &Stack) -> Answer {
    let (name, text) = (s.arg_bytes(1)?, s.arg_bytes(2)?);
    match name {
        b"md5" => return Ok(s.push_bytes(Md5::digest(text))),
        b"sha224" => return Ok(s.push_bytes(Sha224::digest(text))),
        _ => {}
    }
    match algorithm(name) {
        Some(algorithm) => Ok(s.push_bytes(digest::digest(algorithm, text))),
        None => s.fail("unknown digest"),
    }
}

/// HMAC of `text`; `None` for a digest that is not known.
pub fn hmac_bytes(name: &[u8], key: &[u8], text: &[u8]) -> Option<Vec<u8>> {
    let algorithm = match name {
        b"md5" => return Some(hmac_over::<Md5>(key, text)),
        b"sha224" => return Some(hmac_over::<Sha224>(key, text)),
        b"sha1" => hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY,
        b"sha256" => hmac::HMAC_SHA256,
        b"sha384" => hmac::HMAC_SHA384,
        b"sha512" => hmac::HMAC_SHA512,
        _ => return None,
    };
    Some(hmac::sign(&hmac::Key::new(algorithm, key), text).as_ref().to_vec())
}

/// RFC 2104 over a digest that ring has not; both of these have blocks of 64 bytes.
fn hmac_over<D: Digest>(key: &[u8], text: &[u8]) -> Vec<u8> {
    const BLOCK: usize = 64;
    let mut padded = [0_u8; BLOCK];
    if key.len() > BLOCK {
        let short = D::digest(key);
        padded[..short.len()].copy_from_slice(&short);
    } else {
        padded[..key.len()].copy_from_slice(key);
    }
    let inner = D::new().chain_update(padded.map(|b| b ^ 0x36)).chain_update(text).finalize();
    D::new().chain_update(padded.map(|b| b ^ 0x5c)).chain_update(inner).finalize().to_vec()
}

fn hmac_of(s: &Stack) -> Answer {
    match hmac_bytes(s.arg_bytes(1)?, s.arg_bytes(2)?, s.arg_bytes(3)?) {
        Some(mac) => Ok(s.push_bytes(mac)),
        None => s.fail("unknown digest"),
    }
}

/// Lower-case hexadecimal.
pub fn to_hex(bytes: &[u8]) -> Vec<u8> {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes.iter().flat_map(|b| [DIGITS[(b >> 4) as usize], DIGITS[(b & 15) as usize]]).collect()
}

fn hex(s: &Stack) -> Answer {
    Ok(s.push_bytes(to_hex(s.arg_bytes(1)?)))
}

fn unhex(s: &Stack) -> Answer {
    let text = s.arg_bytes(1)?;
    let digit = |b: &u8| (*b as char).to_digit(16).map(|d| d as u8);
    let bytes: Option<Vec<u8>> = text.chunks(2).map(|p| Some(digit(&p[0])? << 4 | digit(p.get(1)?)?)).collect();
    Ok(bytes.map_or_else(|| s.push_nil(), |b| s.push_bytes(b)))
}

fn random(s: &Stack) -> Answer {
    let len = s.arg_number(1)?;
    if !(0.0..=MAX_RANDOM as f64).contains(&len) {
        return s.fail("length out of range");
    }
    let mut bytes = vec![0; len as usize];
    match ring::rand::SystemRandom::new().fill(&mut bytes) {
        Ok(()) => Ok(s.push_bytes(bytes)),
        Err(_) => s.fail("no randomness available"),
    }
}

fn equal(s: &Stack) -> Answer {
    use subtle::ConstantTimeEq;
    let (a, b) = (s.arg_bytes(1)?, s.arg_bytes(2)?);
    Ok(s.push_bool(a.ct_eq(b).into()))
}

fn md5_hex(s: &Stack) -> Answer {
    Ok(s.push_bytes(to_hex(&Md5::digest(s.text(1)?))))
}

fn md5_bin(s: &Stack) -> Answer {
    Ok(s.push_bytes(Md5::digest(s.text(1)?)))
}

fn sha1_bin(s: &Stack) -> Answer {
    Ok(s.push_bytes(digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, s.text(1)?)))
}

fn hmac_sha1(s: &Stack) -> Answer {
    let mac = hmac_bytes(b"sha1", s.arg_bytes(1)?, s.arg_bytes(2)?).unwrap_or_default();
    Ok(s.push_bytes(mac))
}

fn crc32(s: &Stack) -> Answer {
    Ok(s.push_number(crc32fast::hash(s.text(1)?).into()))
}

fn encode_base64(s: &Stack) -> Answer {
    let text = s.text(1)?;
    if !s.is_nil(2) && s.kind(2) != mlua::ffi::LUA_TBOOLEAN {
        return Err(s.bad_argument(2, "boolean"));
    }
    let engine = if s.boolean(2) { &STANDARD_BARE } else { &STANDARD };
    Ok(s.push_bytes(engine.encode(text)))
}

fn decode(s: &Stack, engine: &GeneralPurpose) -> Answer {
    let text = s.arg_bytes(1)?;
    // nginx stops at the first padding character.
    let end = memchr::memchr(b'=', text).unwrap_or(text.len());
    match engine.decode(&text[..end]) {
        Ok(bytes) => Ok(s.push_bytes(bytes)),
        Err(_) => Ok(s.push_nil()),
    }
}

fn decode_base64(s: &Stack) -> Answer {
    if s.kind(1) != mlua::ffi::LUA_TSTRING {
        return Err("string argument only".into());
    }
    decode(s, &STANDARD)
}

fn decode_base64mime(s: &Stack) -> Answer {
    if s.kind(1) != mlua::ffi::LUA_TSTRING {
        return Err("string argument only".into());
    }
    let text = s.arg_bytes(1)?;
    let end = memchr::memchr(b'=', text).unwrap_or(text.len());
    let digits = text[..end].iter().copied().filter(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'/'));
    match STANDARD.decode(digits.collect::<Vec<u8>>()) {
        Ok(bytes) => Ok(s.push_bytes(bytes)),
        Err(_) => Ok(s.push_nil()),
    }
}

fn encode_base64url(s: &Stack) -> Answer {
    Ok(s.push_bytes(URL.encode(s.arg_bytes(1)?)))
}

fn decode_base64url(s: &Stack) -> Answer {
    decode(s, &URL)
}

/// `(encrypt, mode, key, iv, text, padding)`; the key's length says which AES.
fn aes_crypt(s: &Stack) -> Answer {
    let encrypt = s.boolean(1);
    let (mode, key, iv, text) =
        (s.arg_bytes(2)?, s.arg_bytes(3)?, s.opt_bytes(4)?.unwrap_or_default(), s.arg_bytes(5)?);
    let padding = s.is_nil(6) || s.boolean(6);
    let done = match mode {
        b"cbc" => cbc(encrypt, key, iv, text, padding),
        b"ecb" => ecb(encrypt, key, text, padding),
        b"gcm" => match key.len() {
            16 => sealed(&aead::AES_128_GCM, encrypt, key, iv, text, s.opt_bytes(7)?.unwrap_or_default()),
            32 => sealed(&aead::AES_256_GCM, encrypt, key, iv, text, s.opt_bytes(7)?.unwrap_or_default()),
            _ => None,
        },
        b"chacha20-poly1305" => {
            sealed(&aead::CHACHA20_POLY1305, encrypt, key, iv, text, s.opt_bytes(7)?.unwrap_or_default())
        }
        b"ctr" | b"ofb" | b"cfb128" | b"cfb8" => stream(mode, encrypt, key, iv, text),
        _ => return s.fail("unsupported cipher"),
    };
    match done {
        Some(bytes) => Ok(s.push_bytes(bytes)),
        None => s.fail(if encrypt { "failed to encrypt" } else { "failed to decrypt" }),
    }
}

macro_rules! with_aes {
    ($key:expr, $aes:ident => $body:expr) => {
        match $key.len() {
            16 => {
                type $aes = aes::Aes128;
                $body
            }
            24 => {
                type $aes = aes::Aes192;
                $body
            }
            32 => {
                type $aes = aes::Aes256;
                $body
            }
            _ => None,
        }
    };
}

fn cbc(encrypt: bool, key: &[u8], iv: &[u8], text: &[u8], padding: bool) -> Option<Vec<u8>> {
    use aes::cipher::block_padding::NoPadding;
    if !padding && !text.len().is_multiple_of(16) {
        return None;
    }
    with_aes!(key, A => {
        if encrypt {
            let cipher = cbc::Encryptor::<A>::new_from_slices(key, iv).ok()?;
            Some(if padding { cipher.encrypt_padded_vec::<Pkcs7>(text) } else { cipher.encrypt_padded_vec::<NoPadding>(text) })
        } else {
            let cipher = cbc::Decryptor::<A>::new_from_slices(key, iv).ok()?;
            if padding { cipher.decrypt_padded_vec::<Pkcs7>(text).ok() } else { cipher.decrypt_padded_vec::<NoPadding>(text).ok() }
        }
    })
}

fn ecb(encrypt: bool, key: &[u8], text: &[u8], padding: bool) -> Option<Vec<u8>> {
    const BLOCK: usize = 16;
    let mut bytes = text.to_vec();
    if encrypt && padding {
        let fill = BLOCK - bytes.len() % BLOCK;
        bytes.resize(bytes.len() + fill, fill as u8);
    }
    if !bytes.len().is_multiple_of(BLOCK) {
        return None;
    }
    with_aes!(key, A => {
        let cipher = A::new_from_slice(key).ok()?;
        for block in bytes.chunks_exact_mut(BLOCK) {
            let block = block.try_into().ok()?;
            if encrypt { cipher.encrypt_block(block) } else { cipher.decrypt_block(block) }
        }
        Some(())
    })?;
    if !encrypt && padding {
        let fill = *bytes.last()? as usize;
        if fill == 0 || fill > BLOCK || !bytes.ends_with(&vec![fill as u8; fill]) {
            return None;
        }
        bytes.truncate(bytes.len() - fill);
    }
    Some(bytes)
}

/// CTR, OFB and CFB: the block cipher makes a stream that is added to the text.
fn stream(mode: &[u8], encrypt: bool, key: &[u8], iv: &[u8], text: &[u8]) -> Option<Vec<u8>> {
    let mut register: [u8; 16] = iv.try_into().ok()?;
    let step = if mode == b"cfb8" { 1 } else { 16 };
    let mut out = Vec::with_capacity(text.len());
    with_aes!(key, A => {
        let cipher = A::new_from_slice(key).ok()?;
        for piece in text.chunks(step) {
            let mut block = register.into();
            cipher.encrypt_block(&mut block);
            let made: Vec<u8> = piece.iter().zip(block).map(|(a, b)| a ^ b).collect();
            let feedback = if encrypt { &made[..] } else { piece };
            match mode {
                b"ctr" => register = u128::from_be_bytes(register).wrapping_add(1).to_be_bytes(),
                b"ofb" => register = block.into(),
                _ => {
                    register.copy_within(feedback.len().., 0);
                    register[16 - feedback.len()..].copy_from_slice(feedback);
                }
            }
            out.extend(made);
        }
        Some(())
    })?;
    Some(out)
}

/// The tag stands after the text.
fn sealed(
    algorithm: &'static aead::Algorithm,
    encrypt: bool,
    key: &[u8],
    iv: &[u8],
    text: &[u8],
    aad: &[u8],
) -> Option<Vec<u8>> {
    let key = aead::LessSafeKey::new(aead::UnboundKey::new(algorithm, key).ok()?);
    let nonce = aead::Nonce::try_assume_unique_for_key(iv).ok()?;
    let mut bytes = text.to_vec();
    if encrypt {
        key.seal_in_place_append_tag(nonce, aead::Aad::from(aad), &mut bytes).ok()?;
        return Some(bytes);
    }
    let len = key.open_in_place(nonce, aead::Aad::from(aad), &mut bytes).ok()?.len();
    bytes.truncate(len);
    Some(bytes)
}

/// Rounds of PBKDF2: a second of work.
const MAX_ROUNDS: f64 = 1e6;
/// Bytes that are derived from a key.
const MAX_DERIVED: f64 = 65536.0;

fn pbkdf2(s: &Stack) -> Answer {
    use ring::pbkdf2;
    let algorithm = match s.arg_bytes(1)? {
        b"sha1" => pbkdf2::PBKDF2_HMAC_SHA1,
        b"sha256" => pbkdf2::PBKDF2_HMAC_SHA256,
        b"sha384" => pbkdf2::PBKDF2_HMAC_SHA384,
        b"sha512" => pbkdf2::PBKDF2_HMAC_SHA512,
        _ => return s.fail("unknown digest"),
    };
    let (password, salt, rounds, length) = (s.arg_bytes(2)?, s.arg_bytes(3)?, s.arg_number(4)?, s.arg_number(5)?);
    let rounds = std::num::NonZeroU32::new(rounds.min(MAX_ROUNDS) as u32).filter(|_| rounds <= MAX_ROUNDS);
    let Some(rounds) = rounds.filter(|_| (1.0..=MAX_DERIVED).contains(&length)) else {
        return s.fail("iterations or length out of range");
    };
    let mut out = vec![0; length as usize];
    pbkdf2::derive(algorithm, rounds, salt, password, &mut out);
    Ok(s.push_bytes(out))
}

fn hkdf(s: &Stack) -> Answer {
    use ring::hkdf;
    struct Length(usize);
    impl hkdf::KeyType for Length {
        fn len(&self) -> usize {
            self.0
        }
    }
    let algorithm = match s.arg_bytes(1)? {
        b"sha1" => hkdf::HKDF_SHA1_FOR_LEGACY_USE_ONLY,
        b"sha256" => hkdf::HKDF_SHA256,
        b"sha384" => hkdf::HKDF_SHA384,
        b"sha512" => hkdf::HKDF_SHA512,
        _ => return s.fail("unknown digest"),
    };
    let (key, salt, info, length) = (s.arg_bytes(2)?, s.arg_bytes(3)?, s.arg_bytes(4)?, s.arg_number(5)?);
    let mut out = vec![0; length.clamp(0.0, MAX_DERIVED) as usize];
    let done = hkdf::Salt::new(algorithm, salt)
        .extract(key)
        .expand(&[info], Length(out.len()))
        .and_then(|okm| okm.fill(&mut out));
    match done {
        Ok(()) => Ok(s.push_bytes(out)),
        Err(_) => s.fail("length out of range"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::check;
    use super::MAX_RANDOM;

    #[test]
    fn known_digests() {
        for (lua, expected) in [
            ("ngx.md5('hello')", "5d41402abc4b2a76b9719d911017c592"),
            ("c.hex(ngx.md5_bin('hello'))", "5d41402abc4b2a76b9719d911017c592"),
            ("c.hex(ngx.sha1_bin('hello'))", "aaf4c61ddcc5e8a2dabede0f3b482cd9aea9434d"),
            (
                "c.hex(ngx.hmac_sha1('Jefe', 'what do ya want for nothing?'))",
                "effcdf6ae5eb2fa2d27416d5f184df9c259a7c79",
            ),
            ("c.hex(c.hmac('md5', 'Jefe', 'what do ya want for nothing?'))", "750c783e6ab0b503eaa86e310a5db738"),
            ("c.hex(c.digest('sha256', ''))", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
            ("tostring(ngx.crc32_long('hello'))", "907060870"),
            ("ngx.encode_base64('hello')", "aGVsbG8="),
            ("ngx.encode_base64('hello', true)", "aGVsbG8"),
            ("ngx.decode_base64('aGVsbG8=')", "hello"),
            ("ngx.decode_base64('aGVsbG8')", "hello"),
            ("tostring(ngx.decode_base64('a$b'))", "nil"),
            ("require('ngx.base64').encode_base64url('\\255\\254')", "__4"),
            ("c.unhex(c.hex('abc'))", "abc"),
            ("tostring(#c.random(16))", "16"),
        ] {
            check(&format!("local c = require('moongate.native').crypto return {lua}"), expected);
        }
    }

    #[test]
    fn libraries_hash_in_pieces() {
        check(
            "local h = require('resty.sha256'):new() h:update('a') h:update('bc') return require('resty.string').to_hex(h:final())",
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        );
        check(
            "local m = require('resty.hmac') local h = m:new('Jefe', m.ALGOS.MD5) return h:final('what do ya want for nothing?', true)",
            "750c783e6ab0b503eaa86e310a5db738",
        );
        check(
            "local h = require('resty.openssl.hmac').new('k', 'sha256') h:update('a') return require('resty.string').to_hex(h:final('b'))
                == require('resty.string').to_hex(require('moongate.native').crypto.hmac('sha256', 'k', 'ab')) and 'same' or 'other'",
            "same",
        );
    }

    #[test]
    fn aes_round_trips() {
        for (mode, key, iv) in [("cbc", 16, 16), ("cbc", 32, 16), ("ecb", 24, 0), ("gcm", 32, 12)] {
            check(
                &format!(
                    "local c = require('moongate.native').crypto
                     local k, iv = ('k'):rep({key}), ('i'):rep({iv})
                     local e = assert(c.aes(true, '{mode}', k, iv, 'some text'))
                     return c.aes(false, '{mode}', k, iv, e)"
                ),
                "some text",
            );
        }
        check(
            "local aes = require('resty.aes') local a = aes:new('secretkeysecret1', nil, aes.cipher(128, 'cbc'), {iv = '1234567890123456'})
             return a:decrypt(a:encrypt('hello'))",
            "hello",
        );
        check(
            "local _, e = require('moongate.native').crypto.aes(false, 'cbc', ('k'):rep(16), ('i'):rep(16), 'short') return e",
            "failed to decrypt",
        );
    }

    #[test]
    fn random_bytes_are_bounded() {
        for (lua, expected) in [
            (format!("#random({MAX_RANDOM})"), MAX_RANDOM.to_string()),
            (format!("select(2, random({MAX_RANDOM} + 1))"), "length out of range".into()),
            ("select(2, random(-1))".into(), "length out of range".into()),
        ] {
            check(
                &format!("local random = require('moongate.native').crypto.random return tostring({lua})"),
                &expected,
            );
        }
    }
}
