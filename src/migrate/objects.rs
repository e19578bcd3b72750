//! The objects of a store, parsed and checked as the gateway does it, and what of them it would not do.

use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

use serde_json::Value;

use super::{
    lua,
    references::{self, Known, Managers},
    report::{
        Report,
        Verdict::{Cannot, Change, Note},
    },
    variables,
};
use crate::{
    app::plugins::Plugins as Loaded,
    lua::vm,
    model::{Keyring, Kind, SchemaKind, crypt},
    plugin::Checker,
    router::RouterKind,
    schema,
    store::{self, Entry, builder::Builder},
};

/// Keys that a finding names; more are counted.
const MAX_NAMED: usize = 10;
/// Values in values: the JSON parser takes no deeper ones.
pub(super) const MAX_DEPTH: usize = 128;
/// AES works on blocks of so many bytes.
const BLOCK: usize = 16;

/// Where the plugins of an installation come from.
pub(super) struct Plugins<'a> {
    pub checker: &'a Checker,
    /// Names of the files below the user's directories.
    pub files: &'a BTreeSet<String>,
    /// Those of them that the configuration's list leaves out.
    pub unlisted: &'a BTreeSet<&'a str>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    Packed,
    /// The user's own.
    Own,
    /// A file of the user's that does not load.
    Broken,
    /// One that the configuration's list leaves out.
    Unlisted,
    /// APISIX has it, this gateway does not.
    Apisix,
    Nowhere,
}

impl Plugins<'_> {
    pub fn origin(&self, name: &str) -> Origin {
        match self.checker.get(name) {
            Some(_) if self.files.contains(name) || !is_packed(name) => Origin::Own,
            Some(_) => Origin::Packed,
            None if self.unlisted.contains(name) => Origin::Unlisted,
            None if self.files.contains(name) => Origin::Broken,
            None if schema::plugin_names().any(|known| known == name) => Origin::Apisix,
            None => Origin::Nowhere,
        }
    }
}

fn is_packed(name: &str) -> bool {
    vm::packed(&format!("apisix.plugins.{name}")).is_some()
}

/// The keys of objects that have something in common.
#[derive(Default)]
pub(super) struct Places {
    count: usize,
    named: Vec<Arc<str>>,
}

impl Places {
    pub fn add(&mut self, key: &Arc<str>) {
        self.count += 1;
        if self.named.len() < MAX_NAMED {
            self.named.push(key.clone());
        }
    }

    /// Adds those of another.
    pub fn merge(&mut self, other: &Places) {
        self.count += other.count;
        let room = MAX_NAMED.saturating_sub(self.named.len());
        self.named.extend(other.named.iter().take(room).cloned());
    }
}

impl fmt::Display for Places {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.named.join(", "))?;
        match self.count.saturating_sub(self.named.len()) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

/// What is counted over all objects.
#[derive(Default)]
struct Seen {
    plugins: BTreeMap<String, Places>,
    variables: BTreeMap<String, Places>,
    discovery: BTreeMap<String, Places>,
    schemes: BTreeMap<String, Places>,
    managers: Managers,
    undecryptable: Places,
    protos: Places,
    accepted: BTreeMap<&'static str, [usize; 2]>,
}

/// What a check of objects goes by.
pub(super) struct Checked<'a> {
    pub plugins: &'a Loaded,
    pub known: &'a Plugins<'a>,
    pub keyring: Arc<Keyring>,
    /// `file` refuses objects with unknown plugins, other stores serve them without.
    pub is_file: bool,
    /// Variables that the configuration and the Lua files define.
    pub defined: &'a BTreeSet<String>,
}

/// Takes the entries over as the gateway would, and tells what is refused and what would have no effect. Scripts in objects are
/// handed to `scripts`.
pub(super) fn check(entries: &[Entry], by: &Checked<'_>, scripts: &mut lua::Scripts<'_>, report: &mut Report) {
    let parser = store::parser(by.keyring.clone(), Some(by.plugins.fields.clone()));
    let checker = Box::new(by.plugins.clone());
    // Unknown plugins are told by name with all who use them, not by the first object that does.
    let mut builder = Builder::new(parser, Some(checker), RouterKind::default(), false);
    builder.replace(entries.to_vec(), 1);
    let errors = builder.take().map(|snapshot| snapshot.errors).unwrap_or_default();
    let (mut seen, known) = (Seen::default(), Known::of(entries));
    for entry in entries {
        let Some((kind, id)) = Kind::of_key(&entry.key) else {
            if let Some(error) = errors.get(&entry.key) {
                report.add(Change, "object", &*entry.key, &*error.message, "correct it");
            }
            continue;
        };
        let counts = seen.accepted.entry(kind.plural()).or_default();
        counts[1] += 1;
        let value = serde_json::from_str::<Value>(&entry.value).ok();
        let dangling = value.as_ref().map(|value| known.dangling(kind, value)).unwrap_or_default();
        match errors.get(&entry.key) {
            Some(error) => refused(entry, &error.message, report),
            None => counts[0] += usize::from(dangling.is_empty()),
        }
        for (field, other, id) in dangling {
            let what = format!("{field} is {id}, and there is no object {}", other.key(&id));
            report.add(Change, "object", &*entry.key, what, references::ADVICE);
        }
        if let Some(value) = value {
            Looker { key: &entry.key, by, seen: &mut seen, scripts: &mut *scripts, report: &mut *report }
                .object(kind, id, value);
        }
    }
    tell(&seen, &known, by, report);
}

fn refused(entry: &Entry, message: &str, report: &mut Report) {
    let of_stream = entry.key.starts_with("/stream_routes/");
    let (verdict, advice) = match message {
        m if of_stream && (m.contains("unknown plugin") || m.contains("unknown protocol")) => {
            (Cannot, "no plugin and no protocol runs for TCP and UDP: keep this route on APISIX, or take it off")
        }
        m if m.contains("failed to decrypt") => (Change, "give the keyring that encrypted it: --conf config.yaml"),
        _ => (Change, "correct it: the gateway passes over what it refuses"),
    };
    report.add(verdict, "object", &*entry.key, format!("is refused: {message}"), advice);
}

/// Looks at one object.
struct Looker<'a, 'b> {
    key: &'a Arc<str>,
    by: &'a Checked<'a>,
    seen: &'a mut Seen,
    scripts: &'a mut lua::Scripts<'b>,
    report: &'a mut Report,
}

impl Looker<'_, '_> {
    fn object(&mut self, kind: Kind, id: &str, mut value: Value) {
        self.seen.managers.note(self.key, &value);
        match kind {
            Kind::Upstream => self.upstream(&value),
            Kind::Proto => self.seen.protos.add(self.key),
            Kind::PluginMetadata => {
                self.formats(id, &value);
                self.stored_secrets(id, SchemaKind::Metadata, &mut value);
                return;
            }
            Kind::Function | Kind::PluginSource => self.script("source", value.get("source")),
            _ => {}
        }
        if let Some(upstream) = value.get("upstream") {
            self.upstream(upstream);
        }
        self.expression(value.get("vars"), MAX_DEPTH);
        if let Some(text) = value.get("filter_func").and_then(Value::as_str) {
            self.scripts.text(&format!("{} filter_func", self.key), &format!("return {text}"), self.report);
        }
        self.script("script", value.get("script"));
        let schema = match kind {
            Kind::Consumer | Kind::Credential => SchemaKind::Consumer,
            // What they use is told as a refusal.
            Kind::StreamRoute => return,
            _ => SchemaKind::Route,
        };
        if let Some(Value::Object(plugins)) = value.get_mut("plugins") {
            plugins.iter_mut().for_each(|(name, conf)| self.plugin(name, schema, conf));
        }
    }

    fn plugin(&mut self, name: &str, schema: SchemaKind, conf: &mut Value) {
        if conf.pointer("/_meta/disable") == Some(&Value::Bool(true)) {
            return;
        }
        self.seen.plugins.entry(name.to_owned()).or_default().add(self.key);
        self.stored_secrets(name, schema, conf);
        self.formats(name, conf);
        self.expression(conf.pointer("/_meta/filter"), MAX_DEPTH);
        self.script(&format!("plugins.{name}._meta.pre_function"), conf.pointer("/_meta/pre_function"));
        for (i, function) in list(conf.get("functions")).enumerate() {
            self.script(&format!("plugins.{name}.functions[{i}]"), Some(function));
        }
        for rule in list(conf.get("rules")) {
            list(rule.get("weighted_upstreams")).filter_map(|w| w.get("upstream")).for_each(|u| self.upstream(u));
        }
    }

    fn script(&mut self, field: &str, source: Option<&Value>) {
        if let Some(text) = source.and_then(Value::as_str) {
            self.scripts.text(&format!("{} {field}", self.key), text, self.report);
        }
    }

    fn upstream(&mut self, upstream: &Value) {
        if let Some(kind) = upstream.get("discovery_type").and_then(Value::as_str) {
            self.seen.discovery.entry(kind.to_owned()).or_default().add(self.key);
        }
        let scheme = upstream.get("scheme").and_then(Value::as_str).unwrap_or("http");
        if scheme == "kafka" {
            self.seen.schemes.entry(scheme.to_owned()).or_default().add(self.key);
        }
        let hash_on = upstream.get("hash_on").and_then(Value::as_str);
        if let (true, Some(key)) = (hash_on == Some("vars"), upstream.get("key").and_then(Value::as_str)) {
            self.variable(key);
        }
    }

    /// Values of a log format, and what limits count by.
    fn formats(&mut self, plugin: &str, conf: &Value) {
        for field in ["log_format", "log_format_extra"] {
            self.format(conf.get(field).unwrap_or(&Value::Null), MAX_DEPTH);
        }
        let Some(key) = conf.get("key").and_then(Value::as_str).filter(|_| plugin.starts_with("limit-")) else {
            return;
        };
        match conf.get("key_type").and_then(Value::as_str) {
            None | Some("var") => self.variable(key),
            Some("var_combination") => variables::unknown_in(key).for_each(|name| self.variable(&name)),
            _ => {}
        }
    }

    fn format(&mut self, value: &Value, depth: usize) {
        match value {
            _ if depth == 0 => {}
            Value::String(text) => variables::unknown_in(text).for_each(|name| self.variable(&name)),
            Value::Object(map) => map.values().for_each(|value| self.format(value, depth - 1)),
            Value::Array(items) => items.iter().for_each(|value| self.format(value, depth - 1)),
            _ => {}
        }
    }

    /// The variables that `vars` compare: `[["arg_x", "==", "y"], "OR", …]`.
    fn expression(&mut self, expression: Option<&Value>, depth: usize) {
        let Some(Value::Array(items)) = expression else { return };
        if depth == 0 {
            return;
        }
        match items.first() {
            Some(Value::String(name)) if items.len() > 1 && !items[1].is_array() => self.variable(name),
            _ => items.iter().for_each(|item| self.expression(Some(item), depth - 1)),
        }
    }

    fn variable(&mut self, name: &str) {
        if !variables::is_known(name) && !self.by.defined.contains(name) {
            self.seen.variables.entry(name.to_owned()).or_default().add(self.key);
        }
    }

    /// Fields that look encrypted and that no key opens.
    fn stored_secrets(&mut self, plugin: &str, kind: SchemaKind, conf: &mut Value) {
        if !self.by.keyring.fields {
            return;
        }
        let failed = Cell::new(false);
        crypt::look_at_fields(Some(&*self.by.plugins.fields), plugin, kind, conf, &|text| {
            failed.set(failed.get() || (looks_encrypted(text) && self.by.keyring.decrypt(text).is_none()));
        });
        if failed.get() {
            self.seen.undecryptable.add(self.key);
        }
    }
}

pub(super) fn list(value: Option<&Value>) -> impl Iterator<Item = &Value> {
    value.and_then(Value::as_array).into_iter().flatten()
}

/// Base64 of whole blocks. Hexadecimal secrets may be that, too, by their length alone.
fn looks_encrypted(text: &str) -> bool {
    use base64::{Engine, engine::general_purpose::STANDARD};
    let whole = STANDARD.decode(text).is_ok_and(|bytes| !bytes.is_empty() && bytes.len() % BLOCK == 0);
    whole && !text.bytes().all(|b| b.is_ascii_hexdigit())
}

fn tell(seen: &Seen, known: &Known<'_>, by: &Checked<'_>, report: &mut Report) {
    for (kind, [accepted, all]) in &seen.accepted {
        report.runs.push(("objects", format!("{kind}: {accepted} of {all}")));
    }
    tell_plugins(seen, by, report);
    for (name, places) in &seen.variables {
        let what = format!("${name} is no variable of the gateway's");
        report.add(Change, "object", places.to_string(), what, variables::ADVICE);
    }
    for (kind, places) in &seen.discovery {
        if by.plugins.checker().find_module(&format!("apisix.discovery.{kind}")).is_none() {
            let what = format!("nodes come from discovery ({kind}), and there is no module apisix.discovery.{kind}");
            let advice =
                "write one of your own (docs/discovery.md), list the nodes in the upstream, or name them by DNS";
            report.add(Cannot, "object", places.to_string(), what, advice);
        }
    }
    for (scheme, places) in &seen.schemes {
        let what = format!("{scheme} is not spoken to upstreams yet");
        report.add(Cannot, "object", places.to_string(), what, "keep these on APISIX");
    }
    let mut one = |places: &Places, verdict, what: &str, advice: &str| {
        if places.count > 0 {
            report.add(verdict, "object", places.to_string(), what, advice);
        }
    };
    one(
        &seen.undecryptable,
        Change,
        "a field looks encrypted, and no key of the keyring opens it",
        "give the keyring that encrypted it: --conf config.yaml; without it the text counts as it stands",
    );
    one(&seen.protos, Note, "is kept, and only grpc-transcode, which is not there yet, reads it", "");
    seen.managers.tell(by.plugins.checker(), known, report);
}

fn tell_plugins(seen: &Seen, by: &Checked<'_>, report: &mut Report) {
    let mut runs = Vec::new();
    for (name, places) in &seen.plugins {
        let plural = if places.count == 1 { "" } else { "s" };
        let used = format!("used by {} object{plural}: {places}", places.count);
        match by.known.origin(name) {
            Origin::Packed => runs.push(format!("{name} ({})", places.count)),
            Origin::Own => runs.push(format!("{name} ({}, your own)", places.count)),
            Origin::Broken => {
                let advice = "repair it: these objects are not checked against it";
                report.add(Change, "plugin", name, format!("does not load; {used}"), advice);
            }
            // APISIX does the same.
            origin if origin == Origin::Unlisted || origin == Origin::Apisix && is_packed(name) => {
                let advice = "it does not run, on APISIX neither: put it on the list if it should";
                report.add(Note, "plugin", name, format!("is not on the list of plugins; {used}"), advice);
            }
            Origin::Apisix => {
                let advice = match by.is_file {
                    true => "these objects are refused: take the plugin off, or keep them on APISIX",
                    false => "these objects are served without it: take the plugin off, or keep them on APISIX",
                };
                report.add(Cannot, "plugin", name, format!("is APISIX's and not there yet; {used}"), advice);
            }
            Origin::Unlisted | Origin::Nowhere => {
                let advice =
                    "give the directory that holds apisix/plugins/ with --lua-path, or upload the plugin's text";
                report.add(Change, "plugin", name, format!("is found nowhere; {used}"), advice);
            }
        }
    }
    if !runs.is_empty() {
        report.runs.push(("plugins", runs.join(", ")));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ciphertext_is_told_from_plain_secrets() {
        assert!(looks_encrypted("77+NmbYqNfN+oLm0aX5akg=="));
        for plain in
            ["", "secret", "s3cr3t!", "auth-one", "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"]
        {
            assert!(!looks_encrypted(plain), "{plain}");
        }
    }

    #[test]
    fn places_are_named_up_to_a_number() {
        let mut places = Places::default();
        for n in 0..=MAX_NAMED {
            places.add(&format!("/r/{n}").into());
        }
        assert!(places.to_string().starts_with("/r/0, /r/1, ") && places.to_string().ends_with("/r/9 and 1 more"));
    }
}
