//! config.yaml of an APISIX: what of it works here.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::{
    objects::{Origin, Plugins},
    report::{
        Report,
        Verdict::{Cannot, Change, Note},
    },
    snippet,
    sources::read_text,
    variables,
};
use crate::{
    admin,
    conf::{self, Config, Survey, Warning},
    error::{Error, Kind, Result},
    plugin::{Checker, below_prefix},
};

/// A config.yaml is some kilobytes; one with large snippets some more.
const MAX_CONFIG: u64 = 16 << 20;

/// What the rest of the check goes by.
pub(super) struct Ground {
    pub config: Config,
    /// As written; null without a file.
    pub written: Value,
    /// What file names in the configuration are relative to.
    pub prefix: PathBuf,
}

/// Directives whose arguments name new variables.
const DEFINES: [&str; 4] = ["map", "geo", "set", "split_clients"];

/// Reads `file`, and tells what of it does not work; the defaults without a file, or when it cannot be read.
pub(super) fn read(file: Option<&Path>, prefix: &Path, report: &mut Report) -> Result<Ground> {
    let defaults = || {
        let (config, _) = conf::parse(prefix, "")?;
        Ok(Ground { config, written: Value::Null, prefix: prefix.to_owned() })
    };
    let Some(file) = file else { return defaults() };
    let shown = file.display().to_string();
    report.read.push(shown.clone());
    let base = base_of(file);
    let survey = read_text(file, MAX_CONFIG).and_then(|text| conf::survey(&base, &text));
    match survey {
        Ok(survey) => {
            tell(&survey, report);
            let mut ground = defaults()?;
            ground.config = match survey.config {
                Some(config) => config,
                None => Config { json: survey.effective.into(), ..ground.config },
            };
            Ok(Ground { written: survey.written, prefix: base, ..ground })
        }
        Err(e) => {
            let advice = "repair it; the rest was checked with the default configuration";
            report.add(Change, "config", shown, e, advice);
            defaults()
        }
    }
}

/// `conf/config.yaml` lies below the prefix, another file in it.
fn base_of(file: &Path) -> PathBuf {
    let file = std::path::absolute(file).unwrap_or_else(|_| file.to_owned());
    let dir = file.parent().unwrap_or(Path::new("/"));
    match dir.file_name().is_some_and(|name| name == "conf") {
        true => dir.parent().unwrap_or(dir).to_owned(),
        false => dir.to_owned(),
    }
}

fn tell(survey: &Survey, report: &mut Report) {
    for (path, way_out) in &survey.unsupported {
        if let Some(text) = at(&survey.written, path).and_then(Value::as_str) {
            tell_snippet(path, text, report);
        } else {
            report.add(Cannot, "config", *path, "cannot be honoured", *way_out);
        }
    }
    for mistake in &survey.mistakes {
        let (place, what) = mistake.split_once(": ").unwrap_or(("", mistake));
        report.add(Change, "config", place, what, "the start stops at this");
    }
    for Warning(text) in &survey.warnings {
        let (place, what) = text.split_once(": ").unwrap_or(("", text));
        report.add(Note, "config", place, what, "");
    }
    let admin = survey.config.as_ref().and_then(|config| config.admin.as_ref());
    if let Some(Err(e)) = admin.and_then(|admin| admin.tls.as_ref()).map(admin::tls::Tls::open) {
        let told = e.to_string();
        let (place, what) = told.split_once(": ").unwrap_or(("deployment.admin.admin_api_mtls", &told));
        report.add(Change, "config", place, what, "the start stops at this");
    }
    tell_provider(survey, report);
    tell_formats(survey, report);
    if at(&survey.written, "stream_plugins")
        .and_then(Value::as_array)
        .is_some_and(|names| names.iter().any(|name| name != "prometheus"))
    {
        let advice = "stream routes that use another one are refused: docs/stream.md";
        report.add(Note, "config", "stream_plugins", "no plugin but prometheus runs for TCP and UDP", advice);
    }
    let told = report.findings().filter(|finding| finding.area == "config" && finding.verdict != Note).count();
    let unknown = survey.warnings.iter().any(|Warning(text)| text.contains(conf::UNKNOWN_KEY));
    if told == 0 && !unknown {
        report.runs.push(("config", "every key that was written is honoured or has no effect".into()));
    }
}

/// Registries below `discovery` that could not serve.
pub(super) fn tell_registries(checker: &Checker, report: &mut Report) -> Result<()> {
    for mistake in checker.registry_mistakes()? {
        let (place, what) = mistake.split_once(": ").unwrap_or(("discovery", &mistake));
        let verdict = if what.starts_with("there is no module") { Cannot } else { Change };
        report.add(verdict, "config", place, what, "the start stops at this: docs/discovery.md");
    }
    Ok(())
}

fn tell_snippet(path: &str, text: &str, report: &mut Report) {
    let found = snippet::directives(text);
    let advice = "when each of its directives has its place, empty it";
    let what = format!("a snippet of {} directives stops the start: there is no nginx that could read it", found.len());
    report.add(Change, "config", path, what, advice);
    for directive in found {
        let (verdict, advice) = snippet::advice(&directive.name);
        let args = directive.args.iter().map(|arg| format!(" {arg}")).collect::<String>();
        let place = format!("{path}:{}", directive.line);
        report.add(verdict, "config", &place, format!("{}{args}", directive.name), advice);
        if DEFINES.contains(&&*directive.name) {
            continue;
        }
        let unknown: BTreeSet<_> = directive.args.iter().flat_map(|arg| variables::unknown_in(arg)).collect();
        for name in unknown {
            report.add(Note, "config", &place, format!("${name} is no variable of the gateway's"), variables::ADVICE);
        }
    }
}

/// Where nothing is written APISIX reads etcd, and this gateway its own store.
fn tell_provider(survey: &Survey, report: &mut Report) {
    let role = at(&survey.effective, "deployment.role").and_then(Value::as_str).unwrap_or("traditional");
    let path = format!("deployment.role_{role}.config_provider");
    if at(&survey.written, &path).is_none() {
        let what = "is not written: APISIX reads etcd then, this gateway its embedded store";
        report.add(Change, "config", &path, what, "write config_provider: etcd");
    }
}

fn tell_formats(survey: &Survey, report: &mut Report) {
    let path = "nginx_config.http.access_log_format";
    let format = at(&survey.written, path).and_then(Value::as_str).unwrap_or_default();
    for name in variables::unknown_in(format).collect::<BTreeSet<_>>() {
        report.add(Change, "config", path, format!("${name} is no variable of the gateway's"), variables::ADVICE);
    }
}

/// The plugins list against what is loaded.
pub(super) fn tell_plugins(ground: &Ground, known: &Plugins<'_>, report: &mut Report) {
    let Some(listed) = ground.written.get("plugins").and_then(Value::as_array) else { return };
    let mut runs = [0, 0];
    for name in listed.iter().filter_map(Value::as_str) {
        match known.origin(name) {
            Origin::Packed => runs[0] += 1,
            Origin::Own => runs[1] += 1,
            // Its file is told.
            Origin::Broken | Origin::Unlisted => {}
            Origin::Apisix => {
                let what = format!("{name} is listed and not there yet");
                report.add(Note, "config", "plugins", what, "objects that use it are told on their own");
            }
            Origin::Nowhere => {
                let what = format!("{name} is listed, and neither here nor under --lua-path");
                let advice = "give the directory that holds apisix/plugins/ with --lua-path, or take it off the list";
                report.add(Change, "config", "plugins", what, advice);
            }
        }
    }
    report.runs.push(("config", format!("plugins: {} of the gateway's, {} of your own", runs[0], runs[1])));
}

/// The `files` that a list of the configuration's leaves out.
pub(super) fn unlisted<'f>(ground: &Ground, files: &'f BTreeSet<String>) -> BTreeSet<&'f str> {
    let Some(listed) = ground.written.get("plugins").and_then(Value::as_array) else { return BTreeSet::new() };
    let listed: BTreeSet<&str> = listed.iter().filter_map(Value::as_str).collect();
    files.iter().map(String::as_str).filter(|name| !listed.contains(name)).collect()
}

/// The directories of `apisix.extra_lua_path`.
pub(super) fn lua_dirs(ground: &Ground) -> Vec<PathBuf> {
    let path = at(&ground.config.json, "apisix.extra_lua_path").and_then(Value::as_str).unwrap_or_default();
    let path = below_prefix(path, &ground.prefix);
    path.split(';').filter_map(|pattern| pattern.strip_suffix("/?.lua")).map(PathBuf::from).collect()
}

/// Variables that locations and the server of the configuration define.
pub(super) fn defined_variables(json: &Value) -> BTreeSet<String> {
    let locations = json.get("lua_locations").and_then(Value::as_array);
    let places = locations.into_iter().flatten().chain(json.get("lua_server"));
    let sets = places.filter_map(|place| place.get("set").and_then(Value::as_object));
    sets.flat_map(|set| set.keys().cloned()).collect()
}

/// Which store the configuration names, for APISIX as for this gateway: `etcd`, `yaml`, `json` or `embedded`.
pub(super) fn provider(ground: &Ground) -> Result<&str> {
    let json = &ground.config.json;
    let role = at(json, "deployment.role").and_then(Value::as_str).unwrap_or("traditional");
    let path = format!("deployment.role_{role}.config_provider");
    match at(&ground.written, &path) {
        None => Ok("etcd"),
        Some(provider) => provider
            .as_str()
            .ok_or_else(|| Error::config(Kind::Invalid).context(format!("{path}: {provider} is not a text"))),
    }
}

/// The value at `a.b.c`.
pub(super) fn at<'v>(value: &'v Value, path: &str) -> Option<&'v Value> {
    path.split('.').try_fold(value, |value, key| value.get(key)).filter(|value| !value.is_null())
}
