//! The key of the Admin API that nobody chose: generated once, kept in data/admin_key for its owner alone.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use ring::rand::{SecureRandom, SystemRandom};
use serde_json::{Value, json};

use super::{AdminKey, Config};
use crate::error::{Error, Kind, Result};

/// Relative to the prefix.
pub const FILE: &str = "data/admin_key";

const ADMIN: &str = "admin";

/// Random bytes in a key: nobody guesses 128 bits.
const KEY_BYTES: usize = 16;

/// Longest key file that is read.
const MAX_KEY: usize = 4096;

/// Fills in the generated key where the first admin's is empty, and says which file it is in.
pub fn ensure(config: &mut Config) -> Result<Option<PathBuf>> {
    let Some(admin) = config.admin.as_mut().filter(|admin| admin.key_required) else { return Ok(None) };
    let chosen = admin.keys.iter().any(|k| k.role == ADMIN && !k.key.is_empty());
    if chosen {
        return Ok(None);
    }
    let path = config.prefix.join(FILE);
    let key = read_or_create(&path).map_err(|e| {
        Error::config(Kind::Io).cause(e).context(format!("the generated admin key in {}", path.display()))
    })?;
    match admin.keys.iter_mut().find(|k| k.role == ADMIN) {
        Some(empty) => empty.key.clone_from(&key),
        None => admin.keys.push(AdminKey { name: ADMIN.into(), key: key.clone(), role: ADMIN.into() }),
    }
    fill_in(Arc::make_mut(&mut config.json), &key);
    Ok(Some(path))
}

fn read_or_create(path: &Path) -> io::Result<String> {
    if let Some(key) = read(path)? {
        return Ok(key);
    }
    let key = generate()?;
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    // Written aside and linked into place: another process sees no key or a whole one, and the first one wins.
    let aside = path.with_extension(format!("{}.new", std::process::id()));
    let written = write(&aside, &key).and_then(|()| fs::hard_link(&aside, path));
    let removed = fs::remove_file(&aside);
    match written {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            read(path)?.ok_or_else(|| io::Error::other("the file is empty; remove it to have a key generated"))
        }
        Err(e) => Err(e),
        Ok(()) => removed.map(|()| key),
    }
}

/// `None` when there is no file. A key that others can read is not kept secret: that is put right, or refused.
fn read(path: &Path) -> io::Result<Option<String>> {
    let text = match fs::read_to_string(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        read => read?,
    };
    if fs::metadata(path)?.mode() & 0o077 != 0 {
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    }
    match text.trim() {
        "" => Err(io::Error::other("the file is empty; remove it to have a key generated")),
        key if key.len() > MAX_KEY => Err(io::Error::other(format!("the key is longer than {MAX_KEY} bytes"))),
        key => Ok(Some(key.to_owned())),
    }
}

fn generate() -> io::Result<String> {
    let mut bytes = [0; KEY_BYTES];
    SystemRandom::new().fill(&mut bytes).map_err(|_| io::Error::other("the system has no random bytes"))?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

fn write(path: &Path, key: &str) -> io::Result<()> {
    let _ = fs::remove_file(path);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    writeln!(file, "{key}")?;
    file.sync_all()
}

/// What Lua and the Admin API see as configured.
fn fill_in(json: &mut Value, key: &str) {
    let Some(Value::Object(admin)) = json.pointer_mut("/deployment/admin") else { return };
    let keys = admin.entry("admin_key").or_insert(Value::Null);
    if !keys.is_array() {
        *keys = json!([]);
    }
    let Some(keys) = keys.as_array_mut() else { return };
    match keys.iter_mut().find(|k| k["role"] == ADMIN) {
        Some(entry) => entry["key"] = key.into(),
        None => keys.push(json!({"name": ADMIN, "key": key, "role": ADMIN})),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conf;

    #[test]
    fn a_key_is_made_once_for_its_owner_alone() {
        let dir = tempfile::tempdir().unwrap();
        let load = || conf::parse(dir.path(), "").unwrap().0;
        let key_of = |config: &Config| config.admin.as_ref().unwrap().keys[0].key.clone();
        let mut config = load();
        assert_eq!(key_of(&config), "");
        let path = ensure(&mut config).unwrap().unwrap();
        let key = key_of(&config);
        assert_eq!(key.len(), 2 * KEY_BYTES);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(config.json["deployment"]["admin"]["admin_key"][0]["key"], key);
        assert_eq!(fs::read_dir(dir.path().join("data")).unwrap().count(), 1);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let mut again = load();
        ensure(&mut again).unwrap();
        assert_eq!(key_of(&again), key);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        fs::write(&path, "").unwrap();
        assert!(ensure(&mut load()).unwrap_err().to_string().contains("empty"));
    }

    #[test]
    fn a_key_that_was_chosen_stays_and_no_file_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let text = "deployment: {admin: {admin_key: [{name: a, key: chosen, role: admin}]}}";
        let (mut config, _) = conf::parse(dir.path(), text).unwrap();
        assert_eq!(ensure(&mut config).unwrap(), None);
        assert!(!dir.path().join("data").exists());
        let (mut config, _) = conf::parse(dir.path(), "deployment: {admin: {admin_key: }}").unwrap();
        ensure(&mut config).unwrap().unwrap();
        assert_eq!(config.json["deployment"]["admin"]["admin_key"][0]["role"], "admin");
    }

    #[test]
    fn a_key_is_read_up_to_a_length() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        fs::write(&path, "k".repeat(MAX_KEY) + "\n").unwrap();
        assert_eq!(read(&path).unwrap().unwrap().len(), MAX_KEY);
        fs::write(&path, "k".repeat(MAX_KEY + 1)).unwrap();
        assert_eq!(read(&path).unwrap_err().to_string(), "the key is longer than 4096 bytes");
    }
}
