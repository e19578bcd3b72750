//! Secrets in the store: `encrypt_fields` of plugins and private keys, AES in CBC mode under the keyring.
//!
//! The bytes are APISIX's: the key (16 bytes: AES-128, 32: AES-256) is also the initialisation vector, padding is PKCS #7,
//! the text is base64. What does not decrypt under any key is taken as plain text.

use std::{
    collections::BTreeSet,
    sync::{Mutex, PoisonError},
};

use aes::{Aes128, Aes256, cipher::block_padding::Pkcs7};
use base64::{Engine, engine::general_purpose::STANDARD};
use cbc::cipher::{BlockModeDecrypt, BlockModeEncrypt, KeyIvInit};
use serde_json::{Map, Value};

pub use crate::schema::is_reference;
use crate::{
    error::{Error, Kind, Result},
    schema,
};

/// Fields that a line of the log has been about.
const MAX_NOTED: usize = 1024;

/// `apisix.data_encryption.keyring`: the first key encrypts, all decrypt.
#[derive(Clone, Default)]
pub struct Keyring {
    keys: Vec<Key>,
    /// `enable_encrypt_fields`: whether fields of plugins are encrypted; private keys are whenever there is a key.
    pub fields: bool,
}

#[derive(Clone)]
enum Key {
    Aes128([u8; 16]),
    Aes256([u8; 32]),
}

impl std::fmt::Debug for Keyring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Keyring({} keys)", self.keys.len())
    }
}

impl Keyring {
    /// Refuses a key that is neither 16 nor 32 bytes long.
    pub fn new<'a>(keys: impl IntoIterator<Item = &'a str>, fields: bool) -> Result<Keyring> {
        let keys = keys.into_iter().map(Key::new).collect::<Result<Vec<_>>>()?;
        Ok(Keyring { keys, fields })
    }

    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// The stored form of `text`; itself when there is no key.
    pub fn encrypt(&self, text: &str) -> String {
        match self.keys.first() {
            Some(key) => STANDARD.encode(key.encrypt(text.as_bytes())),
            None => text.to_owned(),
        }
    }

    /// The plain form of a stored text; `None` when no key fits.
    pub fn decrypt(&self, stored: &str) -> Option<String> {
        let bytes = STANDARD.decode(stored).ok()?;
        self.keys.iter().find_map(|key| String::from_utf8(key.decrypt(&bytes)?).ok())
    }

    /// The stored form of a private key. One that is no PEM is taken as encrypted already.
    pub fn encrypt_pkey(&self, text: &str) -> String {
        if text.starts_with("---") { self.encrypt(text) } else { text.to_owned() }
    }

    /// The plain form of a private key as stored; `None` when it is no PEM and no key fits.
    pub fn decrypt_pkey(&self, stored: &str) -> Option<String> {
        if stored.starts_with("---") { Some(stored.to_owned()) } else { self.decrypt(stored) }
    }
}

/// The first half of an AES-256 key.
fn iv_of(key: &[u8; 32]) -> [u8; 16] {
    std::array::from_fn(|at| key[at])
}

impl Key {
    fn new(text: &str) -> Result<Key> {
        let bytes = text.as_bytes();
        if let Ok(key) = bytes.try_into() {
            return Ok(Key::Aes128(key));
        }
        match bytes.try_into() {
            Ok(key) => Ok(Key::Aes256(key)),
            Err(_) => Err(Error::config(Kind::Invalid)
                .context(format!("expected a 16 byte (AES-128) or 32 byte (AES-256) key, got {} bytes", bytes.len()))),
        }
    }

    fn encrypt(&self, plain: &[u8]) -> Vec<u8> {
        match self {
            Key::Aes128(key) => {
                cbc::Encryptor::<Aes128>::new(key.into(), key.into()).encrypt_padded_vec::<Pkcs7>(plain)
            }
            Key::Aes256(key) => {
                cbc::Encryptor::<Aes256>::new(key.into(), &iv_of(key).into()).encrypt_padded_vec::<Pkcs7>(plain)
            }
        }
    }

    fn decrypt(&self, stored: &[u8]) -> Option<Vec<u8>> {
        match self {
            Key::Aes128(key) => {
                cbc::Decryptor::<Aes128>::new(key.into(), key.into()).decrypt_padded_vec::<Pkcs7>(stored).ok()
            }
            Key::Aes256(key) => {
                cbc::Decryptor::<Aes256>::new(key.into(), &iv_of(key).into()).decrypt_padded_vec::<Pkcs7>(stored).ok()
            }
        }
    }
}

/// Which schema of a plugin a conf is written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SchemaKind {
    Route,
    Consumer,
    Metadata,
}

/// Says which fields of a plugin's conf are stored encrypted: for plugins that the packed schemas do not know.
pub trait EncryptFields {
    fn encrypt_fields(&self, plugin: &str, kind: SchemaKind) -> Vec<Box<str>>;
}

/// Decrypts the secret fields of a plugin's conf in place.
pub fn decrypt_fields(
    keyring: &Keyring,
    custom: Option<&dyn EncryptFields>,
    plugin: &str,
    kind: SchemaKind,
    conf: &mut Value,
) {
    if keyring.fields && !keyring.is_empty() {
        with_fields(custom, plugin, kind, conf, &|field, text| {
            let plain = keyring.decrypt(text);
            if plain.is_none() && !is_reference(text) {
                note_plain(plugin, field);
            }
            plain
        });
    }
}

/// Plugins and fields.
type Noted = BTreeSet<(Box<str>, Box<str>)>;

fn is_new(noted: &mut Noted, plugin: &str, field: &str) -> bool {
    noted.len() < MAX_NOTED && noted.insert((plugin.into(), field.into()))
}

/// Says once per field that the store has a text there that no key decrypts: it is taken as it stands, be it plain or of a key that
/// is not in the keyring.
fn note_plain(plugin: &str, field: &str) {
    static NOTED: Mutex<Noted> = Mutex::new(BTreeSet::new());
    if is_new(&mut NOTED.lock().unwrap_or_else(PoisonError::into_inner), plugin, field) {
        tracing::info!("failed to decrypt the conf of plugin [{plugin}] key [{field}], err: decrypt failed");
    }
}

/// Encrypts the secret fields of a plugin's conf in place. References (`$env://…`, `$secret://…`) stay readable.
pub fn encrypt_fields(
    keyring: &Keyring,
    custom: Option<&dyn EncryptFields>,
    plugin: &str,
    kind: SchemaKind,
    conf: &mut Value,
) {
    let encrypt = |_: &str, text: &str| match is_reference(text) {
        true => None,
        false => Some(keyring.encrypt(text)),
    };
    if keyring.fields && !keyring.is_empty() {
        with_fields(custom, plugin, kind, conf, &encrypt);
    }
}

/// Decrypts the values of a function's `env` in place.
pub fn decrypt_env(keyring: &Keyring, env: &mut Value) {
    if keyring.fields && !keyring.is_empty() {
        leaves(env, &|text| keyring.decrypt(text));
    }
}

/// Looks at the secret fields of a plugin's conf, as they are stored.
pub fn look_at_fields(
    custom: Option<&dyn EncryptFields>,
    plugin: &str,
    kind: SchemaKind,
    conf: &mut Value,
    look: &dyn Fn(&str),
) {
    with_fields(custom, plugin, kind, conf, &|_, text| {
        look(text);
        None
    });
}

/// Encrypts them. References stay readable.
pub fn encrypt_env(keyring: &Keyring, env: &mut Value) {
    if keyring.fields && !keyring.is_empty() {
        leaves(env, &|text| (!is_reference(text)).then(|| keyring.encrypt(text)));
    }
}

/// Field and text to the text that takes its place; `None` leaves it.
pub type Change<'a> = &'a dyn Fn(&str, &str) -> Option<String>;

/// Changes the secret fields of a plugin's conf in place, whatever stands in them.
pub fn with_fields(
    custom: Option<&dyn EncryptFields>,
    plugin: &str,
    kind: SchemaKind,
    conf: &mut Value,
    change: Change,
) {
    let known = schema::plugin(plugin).map(|schemas| match kind {
        SchemaKind::Route => &schemas.encrypt_fields,
        SchemaKind::Consumer => &schemas.consumer_encrypt_fields,
        SchemaKind::Metadata => &schemas.metadata_encrypt_fields,
    });
    let named;
    let fields = match (known, custom) {
        (Some(fields), _) => fields,
        (None, Some(custom)) => {
            named = custom.encrypt_fields(plugin, kind);
            &named
        }
        (None, None) => return,
    };
    for field in fields {
        at_path(conf, field, &|text| change(field, text));
    }
}

/// Follows a dotted path, through every item of a list on the way, to strings, or to the strings of a map or list.
fn at_path(value: &mut Value, path: &str, change: &dyn Fn(&str) -> Option<String>) {
    let (head, rest) = match path.split_once('.') {
        Some((head, rest)) => (head, Some(rest)),
        None => (path, None),
    };
    match value {
        Value::Array(items) => items.iter_mut().for_each(|item| at_path(item, path, change)),
        Value::Object(map) => match (map.get_mut(head), rest) {
            (Some(inner), Some(rest)) => at_path(inner, rest, change),
            (Some(inner), None) => leaves(inner, change),
            (None, _) => {}
        },
        _ => {}
    }
}

fn leaves(value: &mut Value, change: &dyn Fn(&str) -> Option<String>) {
    match value {
        Value::String(text) => {
            if let Some(changed) = change(text) {
                *text = changed;
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| leaves(item, change)),
        Value::Object(map) => map.values_mut().for_each(|item| leaves(item, change)),
        _ => {}
    }
}

/// Every private key of an `ssls` object or an upstream's `tls`, changed in place; `None` from `change` leaves it.
pub fn with_private_keys(object: &mut Map<String, Value>, change: &mut dyn FnMut(&str) -> Option<String>) {
    let mut one = |value: &mut Value| {
        if let Value::String(text) = value
            && let Some(changed) = change(text)
        {
            *text = changed;
        }
    };
    for name in ["key", "client_key"] {
        if let Some(value) = object.get_mut(name) {
            one(value);
        }
    }
    if let Some(Value::Array(keys)) = object.get_mut("keys") {
        keys.iter_mut().for_each(one);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ring(keys: &[&str]) -> Keyring {
        Keyring::new(keys.iter().copied(), true).expect("valid keys")
    }

    #[test]
    fn fields_are_noted_once_and_up_to_a_number() {
        let mut noted = Noted::new();
        assert!(is_new(&mut noted, "key-auth", "key") && !is_new(&mut noted, "key-auth", "key"));
        assert!((1..MAX_NOTED).all(|n| is_new(&mut noted, "p", &n.to_string())));
        assert!(!is_new(&mut noted, "q", "key"));
        assert_eq!(noted.len(), MAX_NOTED);
    }

    #[test]
    fn the_bytes_are_those_of_apisix() {
        let ring = ring(&["edd1c9f0985e76a2"]);
        assert_eq!(ring.encrypt("bar"), "77+NmbYqNfN+oLm0aX5akg==");
        assert_eq!(ring.decrypt("77+NmbYqNfN+oLm0aX5akg==").as_deref(), Some("bar"));
        assert_eq!(ring.decrypt("bar"), None, "plain text");
    }

    #[test]
    fn an_old_key_still_reads() {
        let old = ring(&["qeddd145sfvddff3"]).encrypt("hello world");
        let both = ring(&["qeddd145sfvddff3qeddd145sfvddff3", "qeddd145sfvddff3"]);
        assert_eq!(both.decrypt(&old).as_deref(), Some("hello world"));
        assert_ne!(both.encrypt("hello world"), old);
        assert!(Keyring::new(["short"], true).is_err_and(|e| e.to_string().ends_with("got 5 bytes")));
    }

    #[test]
    fn fields_are_found_by_their_paths() {
        let ring = ring(&["edd1c9f0985e76a2"]);
        let mut conf = json!({"username": "foo", "password": "bar"});
        encrypt_fields(&ring, None, "basic-auth", SchemaKind::Consumer, &mut conf);
        assert_eq!(conf, json!({"username": "foo", "password": "77+NmbYqNfN+oLm0aX5akg=="}));
        decrypt_fields(&ring, None, "basic-auth", SchemaKind::Consumer, &mut conf);
        assert_eq!(conf["password"], "bar");
        let mut conf = json!({"brokers": [{"sasl_config": {"user": "u", "password": "p"}}]});
        encrypt_fields(&ring, None, "kafka-logger", SchemaKind::Route, &mut conf);
        assert_ne!(conf["brokers"][0]["sasl_config"]["password"], "p");
        let mut conf = json!({"password": "$env://PASSWORD"});
        encrypt_fields(&ring, None, "basic-auth", SchemaKind::Consumer, &mut conf);
        assert_eq!(conf["password"], "$env://PASSWORD");
    }
}
