//! `moongate migrate check`: what of an APISIX installation runs here, what needs a change, and what cannot work.
//!
//! Reads a configuration file, a store and Lua files, and writes to none of them. The objects go through the gateway's own
//! pipeline with the user's plugins loaded in a VM that checks; loading a plugin runs the chunk of its file.

mod config;
mod lua;
mod objects;
mod references;
mod report;
mod snippet;
mod sources;
mod variables;

use std::{
    collections::BTreeSet,
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde_json::{Value, json};

pub use report::Report;
use report::Verdict::{Cannot, Change, Note};

use crate::{
    admin,
    app::plugins::Plugins,
    error::{Error, Kind, Result},
    model::PluginSource,
    plugin::{Setup, below_prefix},
    shdict,
    store::{
        Entry, Store,
        etcd::{Etcd, EtcdConfig},
        file::{self, Format},
    },
};
use config::Ground;
use sources::{Sources, read_text};

/// An apisix.yaml of a hundred thousand routes has some 50 MB.
const MAX_STORE_FILE: u64 = 256 << 20;

/// What is to be checked. At least one of them is given.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The gateway's own: its `plugins/` and `lua/` count as found.
    pub prefix: PathBuf,
    pub conf: Option<PathBuf>,
    /// Members of a cluster; empty: what `conf` says.
    pub etcd: Vec<String>,
    pub etcd_prefix: Option<String>,
    pub etcd_user: Option<String>,
    /// The name of the environment variable that holds the password.
    pub etcd_password_env: Option<String>,
    pub apisix_yaml: Option<PathBuf>,
    /// Roots as in `apisix.extra_lua_path`: `DIR/apisix/plugins/x.lua` is the plugin x.
    pub lua_path: Vec<PathBuf>,
    pub json: bool,
}

impl Options {
    /// Reads the words behind `migrate`. The error says what is wrong with them.
    pub fn parse(prefix: &Path, args: impl IntoIterator<Item = OsString>) -> Result<Options, String> {
        use lexopt::prelude::{Long, Value, ValueExt};
        let told = |e: lexopt::Error| e.to_string();
        let mut options = Options { prefix: prefix.to_owned(), ..Options::default() };
        let mut parser = lexopt::Parser::from_args(args);
        let mut checks = false;
        while let Some(arg) = parser.next().map_err(told)? {
            match arg {
                Value(word) if word == "check" && !checks => checks = true,
                Long("conf") => options.conf = Some(parser.value().map_err(told)?.into()),
                Long("etcd") => {
                    let urls = parser.value().and_then(|value| value.string()).map_err(told)?;
                    options.etcd.extend(urls.split(',').filter(|url| !url.is_empty()).map(str::to_owned));
                }
                Long("etcd-prefix") => options.etcd_prefix = Some(text(&mut parser)?),
                Long("etcd-user") => options.etcd_user = Some(text(&mut parser)?),
                Long("etcd-password-env") => options.etcd_password_env = Some(text(&mut parser)?),
                Long("apisix-yaml") => options.apisix_yaml = Some(parser.value().map_err(told)?.into()),
                Long("lua-path") => options.lua_path.push(parser.value().map_err(told)?.into()),
                Long("json") => options.json = true,
                other => return Err(other.unexpected().to_string()),
            }
        }
        if !checks {
            return Err("migrate has one verb: check".to_owned());
        }
        options.consistent()
    }

    /// Refuses what cannot be read: a name that is wrong is no finding about an APISIX.
    pub fn readable(self) -> Result<Options, String> {
        for dir in &self.lua_path {
            let told = |e| format!("--lua-path {}: {e}; give a directory that can be read", dir.display());
            std::fs::read_dir(dir).map_err(told)?;
        }
        if let Some(file) = &self.conf {
            let told = |why: String| format!("--conf {}: {why}; give a config.yaml that can be read", file.display());
            // Opening a pipe would wait for its other end.
            if !std::fs::metadata(file).map_err(|e| told(e.to_string()))?.is_file() {
                return Err(told("it is no file".to_owned()));
            }
            std::fs::File::open(file).map_err(|e| told(e.to_string()))?;
        }
        Ok(self)
    }

    fn consistent(self) -> Result<Options, String> {
        let credentials = self.etcd_prefix.is_some() || self.etcd_user.is_some() || self.etcd_password_env.is_some();
        if self.etcd.is_empty() && credentials {
            return Err("--etcd-prefix, --etcd-user and --etcd-password-env go with --etcd".to_owned());
        }
        if self.etcd_user.is_some() != self.etcd_password_env.is_some() {
            return Err("--etcd-user and --etcd-password-env go together".to_owned());
        }
        if let Some(name) = &self.etcd_password_env
            && env::var(name).is_err()
        {
            return Err(format!("--etcd-password-env: the environment has no {name} that is text"));
        }
        if !self.etcd.is_empty() && self.apisix_yaml.is_some() {
            return Err("--etcd and --apisix-yaml are two stores: give one of them".to_owned());
        }
        let nothing = self.etcd.is_empty() && self.apisix_yaml.is_none() && self.conf.is_none();
        if nothing && self.lua_path.is_empty() {
            return Err("nothing to check: give --etcd, --apisix-yaml, --conf or --lua-path".to_owned());
        }
        Ok(self)
    }
}

fn text(parser: &mut lexopt::Parser) -> Result<String, String> {
    use lexopt::ValueExt;
    parser.value().and_then(|value| value.string()).map_err(|e| e.to_string())
}

/// Checks it all. Fails only when the gateway's own parts cannot be made; everything else is a finding.
pub fn check(options: &Options) -> Result<Report> {
    let mut report = Report::default();
    let mut ground = config::read(options.conf.as_deref(), &options.prefix, &mut report)?;
    let roots = roots(options, &ground);
    let sources = Sources::find(&roots, &mut report);
    report.read.extend(roots.iter().map(|root| format!("Lua under {}", root.display())));
    set_lua_path(&mut ground, &roots);
    for (name, size) in &ground.config.shared_dicts {
        shdict::store().declare(name, *size);
    }
    let plugins = Plugins::fixed(Setup::of(&ground.config).under(options.prefix.clone()))?;
    let unlisted = config::unlisted(&ground, &sources.plugins);
    let broken = tell_idle_plugins((&plugins, &unlisted), &sources, &roots, &mut report);
    let known = objects::Plugins { checker: plugins.checker(), files: &sources.plugins, unlisted: &unlisted };
    config::tell_plugins(&ground, &known, &mut report);
    config::tell_registries(plugins.checker(), &mut report)?;
    let dicts = ground.config.shared_dicts.iter().map(|(name, _)| name.clone()).collect();
    let mut defined = config::defined_variables(&ground.config.json);
    defined.extend(sources.files.iter().flat_map(|(file, _)| lua::defined_in(file)));
    let mut scripts = lua::Scripts::new(plugins.checker(), &sources, (dicts, defined.clone()), broken);
    scripts.files(&mut report);
    check_store(options, &ground, (&plugins, &known), &defined, &mut scripts, &mut report)?;
    scripts.tell(&mut report);
    Ok(report)
}

/// The roots of the user's Lua files: those that are named, then those of the configuration.
fn roots(options: &Options, ground: &Ground) -> Vec<PathBuf> {
    let mut roots: Vec<PathBuf> = Vec::new();
    let named = options.lua_path.iter().map(|dir| sources::root_of(dir));
    for root in named.chain(config::lua_dirs(ground)) {
        if !roots.contains(&root) {
            roots.push(root);
        }
    }
    roots
}

fn set_lua_path(ground: &mut Ground, roots: &[PathBuf]) {
    let json = Arc::make_mut(&mut ground.config.json);
    let mut put = |key: &str, patterns: &[&str]| {
        let named = roots.iter().flat_map(|root| patterns.iter().map(|p| format!("{}/{p}", root.display())));
        let mut all: Vec<String> = named.collect();
        let written = json["apisix"][key].as_str().filter(|text| !text.is_empty());
        all.extend(written.map(|path| below_prefix(path, &ground.prefix)));
        json["apisix"][key] = all.join(";").into();
    };
    put("extra_lua_path", &["?.lua", "?/init.lua"]);
    put("extra_lua_cpath", &["?.so"]);
}

/// Plugins of the user's that do not run, with the reason: those that do not load, and the `unlisted`. Gives their files.
fn tell_idle_plugins(
    (plugins, unlisted): (&Plugins, &BTreeSet<&str>),
    sources: &Sources,
    roots: &[PathBuf],
    report: &mut Report,
) -> BTreeSet<String> {
    let mut told = BTreeSet::new();
    for name in sources.plugins.iter().filter(|name| plugins.checker().get(name).is_none()) {
        let files = roots.iter().map(|root| root.join(format!("apisix/plugins/{name}.lua")));
        for file in files.filter(|file| file.exists()).take(1) {
            let shown = file.display().to_string();
            if unlisted.contains(&**name) {
                let what = format!("{name} is not on the list of plugins: it does not run, on APISIX neither");
                report.add(Note, "plugin", &*shown, what, "put it on the list if it should");
                continue;
            }
            let why = read_text(&file, sources::MAX_LUA)
                .map(|text| PluginSource { source: text.into(), modules: Vec::new() })
                .and_then(|source| plugins.checker().inspect_plugin(name, &source))
                .map_or_else(|why| why, |_| "another file of its name is in its place".to_owned());
            let first = why.lines().next().unwrap_or_default();
            let advice = "repair it: requests that would run it are answered with 500";
            report.add(Change, "plugin", &*shown, format!("does not load: {first}"), advice);
            told.insert(shown);
        }
    }
    told
}

fn check_store(
    options: &Options,
    ground: &Ground,
    (plugins, known): (&Plugins, &objects::Plugins<'_>),
    defined: &BTreeSet<String>,
    scripts: &mut lua::Scripts<'_>,
    report: &mut Report,
) -> Result<()> {
    let Stored { place, is_file, entries, repeated } = match read_store(options, ground) {
        Ok(None) => return Ok(()),
        Ok(Some(read)) => read,
        Err(e) => {
            report.add(Cannot, "store", "objects", e.to_string(), "none was checked: see that it can be read");
            return Ok(());
        }
    };
    for what in repeated {
        report.add(
            Change,
            "object",
            &*place,
            what,
            "take the others out: APISIX goes by one of them, too, and says nothing",
        );
    }
    report.read.push(place);
    let keyring = match admin::keyring(&ground.config.json) {
        Ok(keyring) => keyring,
        Err(e) => {
            let advice = "objects were checked without decrypting them";
            report.add(Change, "config", "apisix.data_encryption.keyring", e.to_string(), advice);
            Default::default()
        }
    };
    let by = objects::Checked { plugins, known, keyring: Arc::new(keyring), is_file, defined };
    objects::check(&entries, &by, scripts, report);
    Ok(())
}

struct Stored {
    place: String,
    is_file: bool,
    entries: Vec<Entry>,
    /// What stands in a file more than once.
    repeated: Vec<String>,
}

/// Everything in the store; nothing when none is named.
fn read_store(options: &Options, ground: &Ground) -> Result<Option<Stored>> {
    if let Some(path) = &options.apisix_yaml {
        let json = path.extension().is_some_and(|extension| extension == "json");
        return read_file(path, if json { Format::Json } else { Format::Yaml }).map(Some);
    }
    if !options.etcd.is_empty() {
        return read_etcd(&with_etcd(options, &ground.config.json), &ground.prefix).map(Some);
    }
    if options.conf.is_none() {
        return Ok(None);
    }
    match config::provider(ground)? {
        "etcd" => read_etcd(&ground.config.json, &ground.prefix).map(Some),
        "yaml" => read_file(&ground.prefix.join(Format::Yaml.file()), Format::Yaml).map(Some),
        "json" => read_file(&ground.prefix.join(Format::Json.file()), Format::Json).map(Some),
        _ => Ok(None),
    }
}

fn read_file(path: &Path, format: Format) -> Result<Stored> {
    let shown = path.display().to_string();
    let invalid = |why: String| Error::config(Kind::Invalid).context(format!("{shown} {why}"));
    let text = read_text(path, MAX_STORE_FILE).map_err(invalid)?;
    let (entries, repeated) = file::entries(&text, format).map_err(|e| e.context(shown.clone()))?;
    Ok(Stored { place: shown, is_file: true, entries, repeated })
}

/// The configuration with the cluster of the command line in place of its own.
fn with_etcd(options: &Options, json: &Value) -> Value {
    let mut json = json.clone();
    let etcd = &mut json["deployment"]["etcd"];
    if !etcd.is_object() {
        *etcd = json!({});
    }
    etcd["host"] = json!(options.etcd);
    if let Some(prefix) = &options.etcd_prefix {
        etcd["prefix"] = prefix.as_str().into();
    }
    if let (Some(user), Some(name)) = (&options.etcd_user, &options.etcd_password_env) {
        etcd["user"] = user.as_str().into();
        etcd["password"] = env::var(name).unwrap_or_default().into();
    }
    json
}

fn read_etcd(json: &Value, prefix: &Path) -> Result<Stored> {
    let etcd = Etcd::new(EtcdConfig::from_json(json, prefix)?);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (entries, _) = runtime.block_on(etcd.list("/"))?;
    let place = etcd.identity().unwrap_or_default();
    Ok(Stored { place, is_file: false, entries, repeated: Vec::new() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Options, String> {
        Options::parse(Path::new("/p"), args.iter().map(OsString::from))
    }

    #[test]
    fn the_words_of_the_command_line() {
        let options =
            parse(&["check", "--etcd", "http://a:1,http://b:2", "--etcd-prefix=/x", "--lua-path", "l", "--json"]);
        let options = options.unwrap();
        assert_eq!(options.etcd, ["http://a:1", "http://b:2"]);
        assert_eq!((options.etcd_prefix.as_deref(), options.json), (Some("/x"), true));
        assert_eq!((options.lua_path, options.prefix), (vec!["l".into()], "/p".into()));
        for (bad, why) in [
            (&[][..], "one verb"),
            (&["check"], "nothing to check"),
            (&["check", "check", "--json"], "unexpected"),
            (&["check", "--etcd", "http://a", "--apisix-yaml", "b"], "two stores"),
            (&["check", "--conf", "a", "--etcd-user", "b"], "go with --etcd"),
            (&["check", "--etcd", "http://a", "--etcd-user", "b"], "go together"),
            (&["check", "--etcd", "a", "--etcd-user", "b", "--etcd-password-env", "NO_SUCH_"], "NO_SUCH_"),
            (&["check", "--write"], "--write"),
        ] {
            let e = parse(bad).unwrap_err();
            assert!(e.contains(why), "{bad:?}: {e}");
        }
    }
}
