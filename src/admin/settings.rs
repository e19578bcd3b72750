//! `deployment.admin` and what else of the configuration the Admin API obeys.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;
use subtle::ConstantTimeEq;

use crate::{error::Result, expr, model::Keyring, plugin::registry, store};

#[derive(Clone, Debug)]
pub struct Settings {
    pub keys: Vec<AdminKey>,
    /// `admin_key_required`: false lets anyone in that `allow` lets in.
    pub key_required: bool,
    /// `allow_admin`: empty lets every address in.
    pub allow: Vec<IpNet>,
    /// `allow_admin` is not there, or empty.
    pub allows_all: bool,
    pub cors: bool,
    /// `admin_api_version`: the form of answers.
    pub version: ApiVersion,
    /// Sent as `Server`.
    pub server: String,
    /// Stands before keys in answers: `/apisix`.
    pub prefix: String,
    pub keyring: Keyring,
    /// Stream routes may be written: something listens for what they match.
    pub stream: bool,
    /// Functions without a sandbox may be written.
    pub trusted_functions: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApiVersion {
    /// APISIX 2's.
    V2,
    V3,
}

impl ApiVersion {
    /// As `X-API-VERSION` has it.
    pub fn name(self) -> &'static str {
        match self {
            ApiVersion::V2 => "v2",
            ApiVersion::V3 => "v3",
        }
    }
}

#[derive(Clone, Debug)]
pub struct AdminKey {
    /// Who it belongs to, for revisions; empty: the role stands for it.
    pub name: String,
    pub key: String,
    pub role: Role,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Admin,
    /// May only read.
    Viewer,
}

impl Settings {
    /// From the effective configuration, defaults filled in. Keys that are empty are left out. `stream` is the caller's to say.
    pub fn from_config(config: &Value, server: &str) -> Result<Settings> {
        let admin = config.pointer("/deployment/admin").unwrap_or(&Value::Null);
        let flag = |name: &str| admin.get(name).and_then(Value::as_bool).unwrap_or(true);
        let strings = |value: Option<&Value>| -> Vec<String> {
            value.and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
        };
        let keys =
            admin.get("admin_key").and_then(Value::as_array).into_iter().flatten().filter_map(AdminKey::from_json);
        // `default`, or anything else, is the older form.
        let version = match admin.get("admin_api_version").and_then(Value::as_str) {
            Some("v3") | None => ApiVersion::V3,
            Some(_) => ApiVersion::V2,
        };
        Ok(Settings {
            keys: keys.collect(),
            key_required: flag("admin_key_required"),
            // A list that names nobody who comes over TCP allows nobody.
            allows_all: strings(admin.get("allow_admin")).is_empty(),
            allow: strings(admin.get("allow_admin")).iter().filter_map(|text| expr::network(text)).collect(),
            cors: flag("enable_admin_cors"),
            version,
            server: server.to_owned(),
            prefix: store::shown_prefix(config),
            keyring: keyring(config)?,
            stream: false,
            trusted_functions: registry::trusts_functions(config),
        })
    }

    pub fn allows(&self, peer: IpAddr) -> bool {
        let peer = peer.to_canonical();
        self.allows_all || self.allow.iter().any(|net| net.contains(&peer))
    }

    /// The role of a key.
    pub fn role_of(&self, given: &str) -> Option<Role> {
        self.known(given).map(|key| key.role)
    }

    /// The name of a key, or its role when it has none.
    pub fn name_of(&self, given: &str) -> Option<String> {
        let role = |role| if role == Role::Admin { "admin" } else { "viewer" };
        self.known(given).map(|key| if key.name.is_empty() { role(key.role).to_owned() } else { key.name.clone() })
    }

    /// Every key is compared, in constant time, whichever matches.
    fn known(&self, given: &str) -> Option<&AdminKey> {
        let mut known = None;
        for key in &self.keys {
            if bool::from(key.key.as_bytes().ct_eq(given.as_bytes())) {
                known = Some(key);
            }
        }
        known
    }
}

impl AdminKey {
    fn from_json(value: &Value) -> Option<AdminKey> {
        let key = value.get("key")?.as_str().filter(|key| !key.is_empty())?;
        let viewer = value.get("role").and_then(Value::as_str) == Some("viewer");
        let name = value.get("name").and_then(Value::as_str).unwrap_or_default().to_owned();
        Some(AdminKey { name, key: key.to_owned(), role: if viewer { Role::Viewer } else { Role::Admin } })
    }
}

/// `apisix.data_encryption`: one key or a list.
pub fn keyring(config: &Value) -> Result<Keyring> {
    let encryption = config.pointer("/apisix/data_encryption").unwrap_or(&Value::Null);
    let keys: Vec<&str> = match encryption.get("keyring") {
        Some(Value::String(key)) => vec![key],
        Some(Value::Array(keys)) => keys.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    let fields = encryption.get("enable_encrypt_fields").and_then(Value::as_bool).unwrap_or(true);
    Keyring::new(keys, fields)
}
