//! Where configuration lives and how it reaches the workers.
//!
//! A `Store` reads and writes resources as JSON texts by key; four exist: embedded (redb), etcd, file, and one document that the
//! Admin API replaces. A store's changes go
//! through `pipeline` (parse, validate, skip what is invalid) into a new `Snapshot`, which `Published` hands to
//! every worker. Only this module knows where config came from.

pub mod builder;
mod digest;
mod disk;
pub mod embedded;
pub mod etcd;
pub mod file;
mod last_good;
mod parser;
pub mod pipeline;
pub mod published;
pub mod revisions;
pub mod snapshot;
pub mod source;
pub mod standalone;

use std::{future::Future, pin::Pin, sync::Arc};

pub use builder::{Item, Parser, PluginChecker, PluginSchema, RELOAD, Refusal};
pub use parser::parser;
pub use pipeline::{Handle, Pipeline, Setup, Started, start};
pub use published::Published;
pub use revisions::{Batch, Committed, Revision};
pub use snapshot::Snapshot;
pub use source::{SourceState, SourceStatus};
pub use standalone::Standalone;

use crate::{
    conf::Config,
    error::{Error, Kind, Result},
};

pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A stored text. `key` is relative to the prefix: `/routes/1`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub key: Arc<str>,
    pub value: Arc<str>,
    pub create_revision: i64,
    pub mod_revision: i64,
}

/// What must hold for a write to happen; else the write fails with `Kind::Conflict`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    Always,
    /// The key's `mod_revision`; 0: the key must not exist.
    Unmodified(i64),
}

/// A done write.
#[derive(Clone, Debug)]
pub struct Written {
    pub entry: Entry,
    /// What stood there before.
    pub previous: Option<Entry>,
    /// The store's revision after the write: `Published::reached` waits for it.
    pub revision: i64,
    /// What `Store::keep_alive` takes to renew the time of an entry that was given one.
    pub lease: Option<String>,
}

/// Where the embedded store and the last good state of the others live, relative to the prefix.
const EMBEDDED_FILE: &str = "data/moongate.redb";
const LAST_GOOD_FILE: &str = "data/last_good.redb";

/// Where the last good state is kept on disk.
pub fn last_good_path(config: &Config) -> std::path::PathBuf {
    config.prefix.join(LAST_GOOD_FILE)
}

/// What stands before keys where users see them, whatever the store: `deployment.etcd.prefix`.
pub fn shown_prefix(config: &serde_json::Value) -> String {
    let prefix = config.pointer("/deployment/etcd/prefix").and_then(serde_json::Value::as_str).unwrap_or("/apisix");
    prefix.trim_end_matches('/').to_owned()
}

/// The store that `deployment` names.
pub fn open(config: &Config) -> Result<Arc<dyn Store>> {
    let deployment = &config.json["deployment"];
    let role = deployment["role"].as_str().unwrap_or("traditional");
    let provider = deployment[format!("role_{role}")]["config_provider"].as_str().unwrap_or("embedded");
    tracing::info!("use config_provider: {provider}");
    Ok(match provider {
        "embedded" => {
            let bounds = revisions::Bounds::from_json(&config.json);
            embedded::Embedded::open_with(&config.prefix.join(EMBEDDED_FILE), bounds)?
        }
        "etcd" => etcd::Etcd::new(etcd::EtcdConfig::from_json(&config.json, &config.prefix)?),
        "yaml" if role == "traditional" => Standalone::with(revisions::Bounds::from_json(&config.json)),
        "yaml" => file::File::new(&config.prefix, file::Format::Yaml),
        "json" => file::File::new(&config.prefix, file::Format::Json),
        _ => {
            return Err(Error::config(Kind::Invalid).context(format!(
                "deployment.role_{role}.config_provider: {provider} is not known: use embedded, etcd, yaml or json"
            )));
        }
    })
}

/// Reads and writes of the Admin API. A write that was answered survives SIGKILL.
pub trait Store: Send + Sync + 'static {
    /// `embedded`, `etcd`, `file` or `standalone`: for messages.
    fn name(&self) -> &'static str;

    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Entry>>>;

    /// Entries whose key starts with `prefix` (`/routes/`), in key order, and the store's revision.
    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<(Vec<Entry>, i64)>>;

    /// `ttl_secs`: the entry disappears after so many seconds.
    fn put<'a>(
        &'a self,
        key: &'a str,
        value: String,
        on: Condition,
        ttl_secs: Option<u64>,
    ) -> BoxFuture<'a, Result<Written>>;

    /// The entry that was deleted (its `mod_revision` before) and the store's revision after; `None` when there was none.
    fn delete<'a>(&'a self, key: &'a str, on: Condition) -> BoxFuture<'a, Result<Option<(Entry, i64)>>>;

    /// Does all of the batch, and keeps it as a revision in the same transaction; or nothing when a condition does not hold
    /// (`Kind::Conflict`). A store that keeps no revisions does one write after the other.
    fn commit<'a>(&'a self, batch: Batch) -> BoxFuture<'a, Result<Committed>> {
        Box::pin(async move { revisions::one_by_one(self, batch).await })
    }

    /// The revisions that are kept; `None`: this store keeps none.
    fn revisions<'a>(&'a self, _: revisions::Query) -> BoxFuture<'a, Result<Option<revisions::Page>>> {
        Box::pin(async move { Ok(None) })
    }

    /// An entry lives its whole time from now on: the seconds it has; `None` when it is gone, or was written since by
    /// somebody else.
    fn keep_alive<'a>(&'a self, _lease: &'a str) -> BoxFuture<'a, Result<Option<u64>>> {
        Box::pin(async { Ok(None) })
    }

    /// The version of the server that stores.
    fn version(&self) -> BoxFuture<'_, Result<String>> {
        Box::pin(async { Ok(env!("CARGO_PKG_VERSION").to_owned()) })
    }

    /// Which source this is (`etcd http://a:2379 /apisix`), for a store whose last good state is kept on disk beside it.
    fn identity(&self) -> Option<String> {
        None
    }

    /// The store as one document, if it is one: what `/apisix/admin/configs` works with.
    fn standalone(self: Arc<Self>) -> Option<Arc<Standalone>> {
        None
    }

    /// Feeds `changes` until the process ends: first everything, then each change as it happens. Reconnects and
    /// reloads by itself; never returns because a peer is down.
    fn watch(self: Arc<Self>, changes: ChangeSink) -> BoxFuture<'static, ()>;
}

/// What a store tells the pipeline.
#[derive(Debug)]
pub enum Change {
    /// Everything at this revision: replaces what was known.
    All { entries: Vec<Entry>, revision: i64 },
    /// Changes that became visible together.
    Some { changes: Vec<(Arc<str>, Option<Entry>)>, revision: i64 },
    /// The store cannot be reached, since when it is so and why; the last good config goes on.
    Lost { reason: String },
    /// It can again.
    Found,
    /// Something that is no object is wrong with the source (`conf/apisix.yaml` does not parse), or is no longer.
    Refused { key: Arc<str>, message: Option<String> },
    /// What somebody should know of a source that is served all the same, or that there is nothing any more.
    Noted { key: Arc<str>, message: Option<String> },
}

/// Stands for a value that is not text: refused with a message that says so.
pub(crate) const NOT_UTF8: &str = "\u{FFFF}not UTF-8";

pub type ChangeSink = tokio::sync::mpsc::Sender<Change>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_config_picks_the_store() {
        let dir = tempfile::tempdir().unwrap();
        for (role, provider, expected) in [
            ("traditional", "embedded", Some("embedded")),
            ("traditional", "etcd", Some("etcd")),
            ("traditional", "yaml", Some("standalone")),
            ("data_plane", "yaml", Some("file")),
            ("data_plane", "json", Some("file")),
            ("traditional", "zookeeper", None),
        ] {
            let text = format!("deployment:\n  role: {role}\n  role_{role}:\n    config_provider: {provider}\n");
            let opened = crate::conf::parse(dir.path(), &text).map(|(config, _)| open(&config));
            match opened {
                Ok(Ok(store)) => assert_eq!(Some(store.name()), expected, "{text}"),
                Ok(Err(e)) => {
                    assert!(e.to_string().contains("config_provider"), "{e}");
                    assert_eq!(None, expected, "{text}");
                }
                // The file's own checks may know it already.
                Err(_) => assert_eq!(None, expected, "{text}"),
            }
        }
        let (config, _) = crate::conf::parse(dir.path(), "").map_err(|_| "mistakes in an empty file").unwrap();
        assert_eq!(open(&config).unwrap().name(), "embedded", "nothing to install, nothing to configure");
    }
}
