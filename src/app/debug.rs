//! conf/debug.yaml, or the profile's (debug-mode.md): read at the start, and again whenever it has changed.

use std::{fs, io, path::Path, sync::Arc, time::Duration};

use serde_json::{Value, json};
use tokio::{sync::watch, time::interval};

use crate::{
    conf::profile,
    plugin::{
        Watching,
        watch::{Debug, Hooks},
    },
    schema::Schema,
};

/// As often as APISIX looks.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A file that is longer names more functions than there are.
const MAX_BYTES: u64 = 1 << 20;
/// What follows is not read: whoever writes the file ends with it.
const END: &str = "#END";

/// The file, and what of it is in effect.
pub struct DebugFile {
    path: std::path::PathBuf,
    watching: Arc<Watching>,
    /// Told of each change, so that the workers' hooks follow.
    changes: watch::Sender<u64>,
    /// The text that was looked at last; `None`: there was no file.
    seen: Option<String>,
}

impl DebugFile {
    /// Reads it for the first time.
    pub fn new(prefix: &Path, watching: Arc<Watching>) -> DebugFile {
        let (changes, _) = watch::channel(0);
        let mut file = DebugFile { path: prefix.join(profile::file("debug", "yaml")), watching, changes, seen: None };
        file.look();
        file
    }

    /// Of what is in effect.
    pub fn changes(&self) -> watch::Sender<u64> {
        self.changes.clone()
    }

    /// Follows the file for ever.
    pub async fn follow(mut self) {
        let mut tick = interval(LOOK_EVERY);
        loop {
            tick.tick().await;
            self.look();
        }
    }

    /// A file with mistakes changes nothing; one that is gone ends the debug mode.
    fn look(&mut self) {
        let text = match read(&self.path) {
            Ok(text) => text,
            Err(e) => {
                let told = Some(format!("{e}"));
                if self.seen != told {
                    tracing::error!("{}: {e}", self.path.display());
                    self.seen = told;
                }
                return;
            }
        };
        if text == self.seen {
            return;
        }
        self.seen.clone_from(&text);
        match text.as_deref().map_or_else(|| Ok(Debug::default()), parse) {
            Ok(debug) if *self.watching.debug() == debug => {}
            Ok(debug) => {
                self.watching.set_debug(debug);
                self.changes.send_modify(|n| *n += 1);
            }
            // As the line of APISIX, which names its function.
            Err(e) => tracing::error!("read_debug_yaml(): failed to validate debug config {e}"),
        }
    }
}

/// The text up to its end. `None`: there is no file.
fn read(path: &Path) -> io::Result<Option<String>> {
    match fs::metadata(path) {
        Ok(about) if about.len() > MAX_BYTES => {
            return Err(io::Error::other(format!("longer than {MAX_BYTES} bytes")));
        }
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    }
    let mut text = fs::read_to_string(path)?;
    let end = text.match_indices(END).map(|(at, _)| at).find(|at| *at == 0 || text.as_bytes()[at - 1] == b'\n');
    if let Some(end) = end {
        text.truncate(end);
    }
    Ok(Some(text))
}

fn parse(text: &str) -> Result<Debug, String> {
    let mut file: Value = serde_norway::from_str(text).map_err(|e| e.to_string())?;
    if file.is_null() {
        return Ok(Debug::default());
    }
    Schema::compile(&schema(file.get("http_filter").is_some()))?.check(&mut file)?;
    let flag = |pointer: &str| file.pointer(pointer).and_then(Value::as_bool).unwrap_or(false);
    let text = |pointer: &str| file.pointer(pointer).and_then(Value::as_str).map(Box::<str>::from);
    let header = text("/http_filter/enable_header_name").filter(|_| flag("/http_filter/enable"));
    let hooks = match text("/hook_conf/name").filter(|_| flag("/hook_conf/enable")) {
        None => None,
        Some(name) => Some(Hooks {
            functions: file.get(&*name).cloned().ok_or_else(|| format!("property \"{name}\" is required"))?,
            level: text("/hook_conf/log_level").unwrap_or_else(|| "warn".into()),
            arguments: flag("/hook_conf/is_print_input_args"),
            results: flag("/hook_conf/is_print_return_value"),
        }),
    };
    Ok(Debug { basic: flag("/basic/enable"), header, hooks })
}

/// A file with nothing but `basic` is whole; one that speaks of the advanced mode needs all of that.
fn schema(advanced: bool) -> Value {
    let flag = |default: bool| json!({"type": "boolean", "default": default});
    let levels = ["debug", "info", "notice", "warn", "error", "crit", "alert", "emerg"];
    json!({
        "type": "object",
        "required": if advanced { vec!["hook_conf"] } else { Vec::new() },
        "properties": {
            "basic": {"type": "object", "properties": {"enable": {"type": "boolean"}}},
            "http_filter": {"type": "object", "required": ["enable", "enable_header_name"], "properties": {
                "enable": {"type": "boolean"},
                "enable_header_name": {"type": "string", "minLength": 1, "pattern": "^[A-Za-z0-9_-]+$"},
            }},
            "hook_conf": {"type": "object", "required": ["enable", "name"], "properties": {
                "enable": {"type": "boolean"},
                "name": {"type": "string", "minLength": 1},
                "log_level": {"type": "string", "enum": levels, "default": "warn"},
                "is_print_input_args": flag(true),
                "is_print_return_value": flag(true),
            }},
        },
        "additionalProperties": {
            "type": "object",
            "additionalProperties": {"type": "array", "items": {"type": "string", "minLength": 1}},
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_file_is_understood() {
        let debug = parse(
            "basic:\n  enable: true\nhttp_filter:\n  enable: true\n  enable_header_name: X-D\nhook_conf:\n  enable: true\n  \
             name: mine\n  is_print_return_value: false\nmine:\n  apisix:\n    - http_log_phase\n",
        );
        let hooks = Hooks {
            functions: json!({"apisix": ["http_log_phase"]}),
            level: "warn".into(),
            arguments: true,
            results: false,
        };
        assert_eq!(debug, Ok(Debug { basic: true, header: Some("X-D".into()), hooks: Some(hooks) }));
        assert_eq!(parse(""), Ok(Debug::default()));
        assert_eq!(parse("basic:\n  enable: true"), Ok(Debug { basic: true, ..Debug::default() }));
    }

    #[test]
    fn mistakes_are_told() {
        let filter = "http_filter: {enable: true, enable_header_name: X}\n";
        for (text, expected) in [
            (filter.to_owned(), "property \"hook_conf\" is required"),
            (format!("{filter}hook_conf: {{enable: true, name: gone}}"), "property \"gone\" is required"),
            ("basic: 1".into(), "property \"basic\" validation failed: wrong type: expected object, got number"),
        ] {
            assert_eq!(parse(&text).err().as_deref(), Some(expected), "{text}");
        }
        assert!(parse("a: [").is_err());
    }

    #[test]
    fn a_file_is_read_to_its_end_mark_and_not_when_it_is_too_long() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("debug.yaml");
        assert_eq!(read(&path).unwrap(), None);
        fs::write(&path, "a: '#END'\n#END\nb: 1\n").unwrap();
        assert_eq!(read(&path).unwrap().as_deref(), Some("a: '#END'\n"));
        fs::write(&path, " ".repeat(MAX_BYTES as usize)).unwrap();
        assert!(read(&path).is_ok());
        fs::write(&path, " ".repeat(MAX_BYTES as usize + 1)).unwrap();
        assert!(read(&path).is_err());
    }
}
