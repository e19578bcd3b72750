//! The command line: APISIX's verbs, and none at all to run in the foreground.
//!
//! Whether a gateway runs under a prefix is known by the lock on its pid file, not by the number in it: a number may have been
//! given to another process since.

use std::{
    env,
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::AsRawFd,
        unix::{fs::MetadataExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::{
    admin,
    app::banner::LISTEN_FILE,
    conf::{self, Config, Warning, admin_key},
    error::{Error, Kind, Result},
    lua, migrate,
    observe::{
        append,
        log::{self, Level},
    },
    plugin::{Checker, Setup},
    store::Snapshot,
};

/// Relative to the prefix.
const PID_FILE: &str = "logs/moongate.pid";
/// What a gateway in the background prints.
const OUTPUT_FILE: &str = "logs/moongate.out";

/// How long `start` waits for the gateway to serve: 100,000 routes and a dead etcd fit.
const START_PATIENCE: Duration = Duration::from_secs(60);
/// How long `stop` waits for the process to end.
const STOP_PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks at a process that starts or ends.
const PAUSE: Duration = Duration::from_millis(10);
/// What the last lines of the logs get at the end.
const FLUSH_PATIENCE: Duration = Duration::from_secs(1);

const HELP: &str = "\
Usage: moongate [-p DIR] [-c FILE] [VERB]

Without a verb: run in the foreground. Ctrl-C or SIGQUIT ends it when the requests in flight are answered.

Verbs:
  start     run in the background
  stop      end at once
  quit      end when the requests in flight are answered
  reload    read the configuration file again
  restart   stop, then start; with a broken configuration the old one goes on
  test      check the configuration and print every mistake in it
  init      make the directories, the configuration file and the admin key that are missing
  migrate   say what of an APISIX runs here: see below
  version   print the version
  help      print this

Options:
  -p, --prefix DIR    conf/, logs/, data/ and plugins/ are in it (default: the current directory)
  -c, --config FILE   the configuration (default: conf/config.yaml in DIR; with APISIX_PROFILE=dev in the environment
                      conf/config-dev.yaml)

moongate migrate check [OPTION]...
  reads an APISIX, changes nothing, and prints what runs as it is, what needs a change and what cannot work;
  its exit code is 0 when all runs, 1 when something needs a change, 2 when something cannot work, 64 for a wrong call

  --conf FILE               its config.yaml; also names the store and the keyring
  --etcd URL[,URL]...       the members of its etcd
  --etcd-prefix PREFIX      where in it (default: /apisix)
  --etcd-user USER --etcd-password-env NAME
                            who reads it; the password is in the environment variable NAME
  --apisix-yaml FILE        its objects in a file, YAML or JSON
  --lua-path DIR            its own Lua, as in extra_lua_path: DIR/apisix/plugins/x.lua; may be given again
  --json                    the report for tools
";

/// The file that `init` writes: the one that comes with the gateway.
const CONFIG: &str = include_str!("../conf/config.yaml");

/// What runs the gateway until it is told to end.
pub type Run = fn(Config, Vec<Warning>) -> Result<()>;

struct Options {
    prefix: PathBuf,
    config: Option<PathBuf>,
    verb: Verb,
    /// What follows `migrate`.
    rest: Vec<OsString>,
}

/// The exit code of a wrong call (sysexits.h).
const EX_USAGE: u8 = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verb {
    Run,
    Start,
    Stop,
    Quit,
    Reload,
    Restart,
    Test,
    Init,
    Migrate,
    Help,
    Version,
}

const VERBS: [(&str, Verb); 10] = [
    ("start", Verb::Start),
    ("stop", Verb::Stop),
    ("quit", Verb::Quit),
    ("reload", Verb::Reload),
    ("restart", Verb::Restart),
    ("test", Verb::Test),
    ("init", Verb::Init),
    ("migrate", Verb::Migrate),
    ("help", Verb::Help),
    ("version", Verb::Version),
];

/// Does what the command line says. What goes wrong is printed; the exit code is 1.
pub fn main(run: Run) -> ExitCode {
    let done = parse(env::args_os().skip(1)).and_then(|options| perform(&options, run));
    log::flush_all(FLUSH_PATIENCE);
    match done {
        Ok(code) => code,
        Err(e) => {
            let _ = writeln!(io::stderr(), "moongate: {}", e.to_string().trim_end());
            ExitCode::FAILURE
        }
    }
}

fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Options> {
    use lexopt::prelude::{Long, Short, Value};
    let mut options = Options { prefix: PathBuf::from("."), config: None, verb: Verb::Run, rest: Vec::new() };
    let mut parser = lexopt::Parser::from_args(args);
    while let Some(arg) = parser.next().map_err(usage)? {
        match arg {
            Short('p') | Long("prefix") => options.prefix = parser.value().map_err(usage)?.into(),
            Short('c') | Long("config") => options.config = Some(parser.value().map_err(usage)?.into()),
            Short('h') | Long("help") => options.verb = Verb::Help,
            Short('v' | 'V') | Long("version") => options.verb = Verb::Version,
            Value(word) if options.verb == Verb::Run => {
                let known = VERBS.iter().find(|(name, _)| word == *name);
                options.verb = known.ok_or_else(|| usage(format!("{} is not a verb", word.display())))?.1;
                if options.verb == Verb::Migrate {
                    options.rest = parser.raw_args().map_err(usage)?.collect();
                }
            }
            other => return Err(usage(other.unexpected())),
        }
    }
    options.prefix = std::path::absolute(&options.prefix)?;
    Ok(options)
}

fn usage(what: impl ToString) -> Error {
    Error::config(Kind::Invalid).context(format!("{}; see moongate help", what.to_string()))
}

fn perform(options: &Options, run: Run) -> Result<ExitCode> {
    let done = match options.verb {
        Verb::Run => foreground(options, run),
        Verb::Start => start(options),
        Verb::Stop => stop(&options.prefix, STOP_PATIENCE),
        Verb::Quit => signal(&options.prefix, libc::SIGQUIT).map(drop),
        Verb::Reload => {
            load_whole(options)?;
            signal(&options.prefix, libc::SIGHUP).map(drop)
        }
        Verb::Restart => restart(options),
        Verb::Test => test(options),
        Verb::Init => init(options),
        Verb::Migrate => return migrate(options),
        Verb::Help => say(HELP.trim_end()),
        Verb::Version => say(env!("CARGO_PKG_VERSION")),
    };
    done.map(|()| ExitCode::SUCCESS)
}

/// Its exit code is its verdict.
fn migrate(options: &Options) -> Result<ExitCode> {
    let asked = migrate::Options::parse(&options.prefix, options.rest.iter().cloned());
    let asked = match asked.and_then(migrate::Options::readable) {
        Ok(asked) => asked,
        Err(e) => {
            writeln!(io::stderr(), "moongate: {e}; see moongate help")?;
            return Ok(ExitCode::from(EX_USAGE));
        }
    };
    let report = migrate::check(&asked)?;
    match asked.json {
        true => say(&report.to_json().to_string())?,
        false => say(report.to_string().trim_end())?,
    }
    Ok(ExitCode::from(report.exit_code()))
}

fn say(text: &str) -> Result<()> {
    Ok(writeln!(io::stdout(), "{text}")?)
}

fn load(options: &Options) -> Result<(Config, Vec<Warning>)> {
    Ok(conf::load(&options.prefix, options.config.as_deref())?)
}

/// The same, with the files that the start reads besides.
fn load_whole(options: &Options) -> Result<(Config, Vec<Warning>)> {
    let (config, warnings) = load(options)?;
    if let Some(files) = config.admin.as_ref().and_then(|admin| admin.tls.as_ref()) {
        admin::tls::Tls::open(files)?;
    }
    Ok((config, warnings))
}

fn foreground(options: &Options, run: Run) -> Result<()> {
    let (mut config, warnings) = load(options)?;
    let Some(pid_file) = PidFile::create(&options.prefix)? else {
        return Err(Error::config(Kind::Conflict)
            .context(format!("a gateway runs already under {}; stop it first", options.prefix.display())));
    };
    // Addresses of an earlier run are no longer true.
    let _ = fs::remove_file(options.prefix.join(LISTEN_FILE));
    admin_key::ensure(&mut config)?;
    for (name, value) in &config.envs {
        // SAFETY: there is one thread so far; the log starts the first.
        unsafe { env::set_var(name, value) };
    }
    let level = Level::from_name(&config.error_log_level).unwrap_or(Level::Warn);
    log::init(&config.error_log, level)
        .map_err(|e| Error::config(Kind::Io).cause(e).context(config.error_log.display().to_string()))?;
    append::look_below(config.prefix.clone());
    raise_file_limit();
    for Warning(text) in &warnings {
        log::line(Level::Warn, text.as_bytes(), None);
        let _ = writeln!(io::stderr(), "moongate: warning: {text}");
    }
    let ended = run(config, warnings);
    if let Err(e) = &ended {
        log::line(Level::Emerg, e.to_string().as_bytes(), None);
    }
    drop(pid_file);
    ended
}

/// As many files as the system lets this process open: each request costs two.
fn raise_file_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls only read and write the struct that they are given.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 && limit.rlim_cur < limit.rlim_max {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        }
    }
}

/// Runs itself in a session of its own, and returns when that serves, or says why it does not.
fn start(options: &Options) -> Result<()> {
    load_whole(options)?;
    if let Some(pid) = running(&options.prefix)? {
        return Err(Error::config(Kind::Conflict).context(format!("a gateway runs already: process {pid}")));
    }
    let output = options.prefix.join(OUTPUT_FILE);
    fs::create_dir_all(options.prefix.join("logs"))?;
    let out = File::create(&output)?;
    let mut command = Command::new(env::current_exe()?);
    // Whoever calls may leave the directory; names of files in plugins are those of the prefix then.
    command.current_dir(&options.prefix);
    command.arg("-p").arg(&options.prefix).stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
    if let Some(config) = &options.config {
        command.arg("-c").arg(std::path::absolute(config)?);
    }
    // SAFETY: setsid is async-signal-safe and touches no memory of this process.
    unsafe {
        command.pre_exec(|| match libc::setsid() {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    let mut child = command.spawn()?;
    wait_until_it_serves(&mut child, &options.prefix, &output, START_PATIENCE)
}

fn wait_until_it_serves(child: &mut Child, prefix: &Path, output: &Path, patience: Duration) -> Result<()> {
    let end = Instant::now() + patience;
    while Instant::now() < end {
        if let Some(status) = child.try_wait()? {
            let said = fs::read_to_string(output).unwrap_or_default();
            return Err(Error::internal(Kind::Other).context(format!("the gateway ended with {status}\n{said}")));
        }
        if serving_process(prefix) == Some(child.id().into()) {
            let _ = io::stdout().write_all(&fs::read(output).unwrap_or_default());
            return Ok(());
        }
        thread::sleep(PAUSE);
    }
    Err(Error::internal(Kind::Other).context(format!(
        "process {} does not serve after {} seconds; see logs/error.log",
        child.id(),
        patience.as_secs()
    )))
}

/// The process that wrote logs/listen.json.
fn serving_process(prefix: &Path) -> Option<u64> {
    let text = fs::read(prefix.join(LISTEN_FILE)).ok()?;
    serde_json::from_slice::<serde_json::Value>(&text).ok()?.get("pid")?.as_u64()
}

/// SIGTERM, and wait for the end.
fn stop(prefix: &Path, patience: Duration) -> Result<()> {
    let pid = signal(prefix, libc::SIGTERM)?;
    let end = Instant::now() + patience;
    while running(prefix)? == Some(pid) {
        if Instant::now() >= end {
            return Err(Error::internal(Kind::Other)
                .context(format!("process {pid} has not ended after {} seconds", patience.as_secs())));
        }
        thread::sleep(PAUSE);
    }
    Ok(())
}

fn restart(options: &Options) -> Result<()> {
    load_whole(options).map_err(|e| e.context("the configuration is broken, nothing was restarted"))?;
    if running(&options.prefix)?.is_some() {
        stop(&options.prefix, STOP_PATIENCE)?;
    }
    start(options)
}

fn test(options: &Options) -> Result<()> {
    let failed = |e: Error| Error::config(Kind::Invalid).context(format!("configuration test failed\n{e}"));
    let (config, warnings) = load_whole(options).map_err(failed)?;
    lua::preload::preload(&config.preload).map_err(failed)?;
    for Warning(text) in warnings {
        writeln!(io::stderr(), "warning: {text}")?;
    }
    test_plugins(&config).map_err(failed)?;
    say("configuration test is successful")
}

/// Loads the plugins that the configuration and the user's directories name, as the gateway would, and lets go of them.
fn test_plugins(config: &Config) -> Result<()> {
    let broken = Checker::new(Setup::of(config), &Snapshot::default())?.broken();
    let lines: Vec<String> = broken.iter().map(|(name, why)| format!("plugin [{name}] does not load: {why}")).collect();
    match lines.is_empty() {
        true => Ok(()),
        false => Err(Error::config(Kind::Invalid).context(lines.join("\n"))),
    }
}

fn init(options: &Options) -> Result<()> {
    for dir in ["conf", "logs", "data", "plugins"] {
        fs::create_dir_all(options.prefix.join(dir))?;
    }
    let path = options.prefix.join(conf::profile::file("config", "yaml"));
    if options.config.is_none() {
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(mut file) => file.write_all(CONFIG.as_bytes())?,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e.into()),
        }
    }
    let (mut config, _) = load(options)?;
    match admin_key::ensure(&mut config)? {
        Some(key) => say(&format!("the admin key is in {}", key.display())),
        None => Ok(()),
    }
}

/// Sends a signal to the gateway under `prefix`.
fn signal(prefix: &Path, signal: i32) -> Result<i32> {
    let Some(pid) = running(prefix)? else {
        return Err(Error::config(Kind::NotFound).context(format!("no gateway runs under {}", prefix.display())));
    };
    // SAFETY: a plain system call.
    match unsafe { libc::kill(pid, signal) } {
        0 => Ok(pid),
        _ => Err(Error::internal(Kind::Io).cause(io::Error::last_os_error()).context(format!("signal process {pid}"))),
    }
}

/// The process that holds the pid file's lock.
fn running(prefix: &Path) -> Result<Option<i32>> {
    let mut file = match File::open(prefix.join(PID_FILE)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    if lock(&file, libc::LOCK_SH)? {
        return Ok(None);
    }
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    // Its owner locks it before it writes: an empty file is that of a gateway which starts right now.
    text.trim().parse().map(Some).map_err(|_| {
        Error::config(Kind::Conflict).context(format!("{PID_FILE} is locked but names no process; try again"))
    })
}

/// The pid file of this process, locked while it lives.
struct PidFile {
    path: PathBuf,
    _locked: File,
}

impl PidFile {
    /// `None` when another process has it.
    fn create(prefix: &Path) -> Result<Option<PidFile>> {
        let path = prefix.join(PID_FILE);
        let at = |e: io::Error| Error::config(Kind::Io).cause(e).context(path.display().to_string());
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).map_err(at)?;
        }
        loop {
            let mut options = OpenOptions::new();
            let mut file = options.read(true).write(true).create(true).truncate(false).open(&path).map_err(at)?;
            if !lock(&file, libc::LOCK_EX)? {
                return Ok(None);
            }
            // The owner before may have removed the file between open and lock: then this lock guards nothing.
            let same = fs::metadata(&path).is_ok_and(|m| file.metadata().is_ok_and(|f| f.ino() == m.ino()));
            if same {
                file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).map_err(at)?;
                return Ok(Some(PidFile { path, _locked: file }));
            }
        }
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Without waiting: whether the lock is had.
fn lock(file: &File, how: i32) -> Result<bool> {
    // SAFETY: a plain system call on an open descriptor.
    if unsafe { libc::flock(file.as_raw_fd(), how | libc::LOCK_NB) } == 0 {
        return Ok(true);
    }
    match io::Error::last_os_error() {
        e if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
        e => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(args: &[&str]) -> Result<Options> {
        parse(args.iter().map(OsString::from))
    }

    #[test]
    fn options_and_verbs_come_in_any_order() {
        for args in [&["-p", "/x", "-c", "f", "test"][..], &["test", "-p/x", "--config=f"]] {
            let o = options(args).unwrap();
            assert_eq!((o.verb, o.prefix, o.config), (Verb::Test, "/x".into(), Some("f".into())));
        }
        assert_eq!(options(&[]).unwrap().verb, Verb::Run);
        assert!(options(&[]).unwrap().prefix.is_absolute());
        for (name, verb) in VERBS {
            assert_eq!(options(&[name]).unwrap().verb, verb);
            assert!(HELP.contains(&format!("\n  {name} ")), "{name}");
        }
        for bad in [&["fly"][..], &["--fast"], &["-p"], &["stop", "start"]] {
            assert!(options(bad).is_err_and(|e| e.to_string().contains("moongate help")), "{bad:?}");
        }
    }

    #[test]
    fn a_prefix_belongs_to_one_process_and_a_pid_file_left_behind_to_none() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(running(dir.path()).unwrap(), None);
        let held = PidFile::create(dir.path()).unwrap().unwrap();
        assert_eq!(running(dir.path()).unwrap(), Some(std::process::id() as i32));
        assert!(PidFile::create(dir.path()).unwrap().is_none());
        drop(held);
        assert!(!dir.path().join(PID_FILE).exists());
        fs::write(dir.path().join(PID_FILE), "1\n").unwrap();
        assert_eq!(running(dir.path()).unwrap(), None);
        assert!(stop(dir.path(), STOP_PATIENCE).unwrap_err().to_string().contains("no gateway runs"));
        assert!(PidFile::create(dir.path()).unwrap().is_some());
    }

    /// A process that says when it runs, ignores SIGTERM, and ends with its standard input.
    fn stubborn() -> Child {
        let script = "trap '' TERM; echo; read -r _";
        let mut command = Command::new("sh");
        let mut child = command.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdout.take().unwrap().read_exact(&mut [0]).unwrap();
        child
    }

    #[test]
    fn a_process_that_does_not_end_is_not_waited_for_any_longer() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = stubborn();
        let _held = PidFile::create(dir.path()).unwrap().unwrap();
        fs::write(dir.path().join(PID_FILE), format!("{}\n", child.id())).unwrap();
        let error = stop(dir.path(), Duration::from_millis(50)).unwrap_err().to_string();
        assert!(error.contains(&format!("process {} has not ended after", child.id())), "{error}");
        drop(child.stdin.take());
        child.wait().unwrap();
    }

    #[test]
    fn a_process_that_does_not_serve_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("out");
        let mut child = stubborn();
        let mut wait = || {
            let waited = wait_until_it_serves(&mut child, dir.path(), &output, Duration::from_millis(50));
            (waited.unwrap_err().to_string(), child.stdin.take())
        };
        let (error, _) = wait();
        assert!(error.contains("does not serve after") && error.contains("logs/error.log"), "{error}");
        fs::write(&output, "port 9080 is taken").unwrap();
        child.wait().unwrap();
        let error = wait_until_it_serves(&mut child, dir.path(), &output, START_PATIENCE).unwrap_err().to_string();
        assert!(error.contains("the gateway ended with") && error.contains("port 9080 is taken"), "{error}");
    }
}
