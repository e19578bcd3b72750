//! config.yaml: as written -> every mistake at once -> a typed `Config`.

/// The configuration in use. Built by `load`; nothing outside `conf` sees the file's shape.
#[derive(Clone, Debug)]
pub struct Config {
    /// conf/, logs/ and data/ are relative to it.
    pub prefix: std::path::PathBuf,
    /// The whole effective configuration, defaults filled in: what Lua sees as `local_conf`.
    pub json: std::sync::Arc<serde_json::Value>,
}
