//! The test harness: a gateway of one's own per test, on free ports, with peers that tell what they saw.
//!
//! Tests are scenes: they start what they need, wait for facts with a deadline, and leave nothing behind: every process
//! and directory ends with the value that stands for it.
#![allow(dead_code, unused_imports, reason = "each test program uses a part of it")]

pub mod apisix;
pub mod etcd;
pub mod http;
pub mod http2;
pub mod peers;
pub mod ports;
pub mod upstream;
pub mod websocket;

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tempfile::TempDir;

pub use http::{Client, Reply, get, request};
pub use upstream::Upstream;

/// How long a fact may take. Far more than it ever should: the machine may be busy.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// A running gateway in a directory of its own.
pub struct Gateway {
    pub dir: Dir,
    child: Option<Child>,
    listen: Value,
}

/// The gateway's directory; kept alive across restarts.
pub struct Dir(TempDir);

impl Dir {
    pub fn new() -> Self {
        let dir = TempDir::new().expect("a temporary directory");
        for name in ["conf", "logs", "data", "plugins"] {
            fs::create_dir(dir.path().join(name)).expect("a directory in it");
        }
        Dir(dir)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn write(&self, name: &str, text: impl AsRef<[u8]>) {
        fs::write(self.join(name), text).expect("a written file");
    }

    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.join(name)).unwrap_or_default()
    }

    /// conf/config.yaml: the test's settings over free ports everywhere. JSON is YAML.
    pub fn configure(&self, settings: Value) {
        let mut config = json!({
            "apisix": {
                "node_listen": [{"ip": "127.0.0.1", "port": 0}],
                "ssl": {"listen": [{"ip": "127.0.0.1", "port": 0}]},
                "control": {"ip": "127.0.0.1", "port": 0},
            },
            "deployment": {"admin": {"admin_listen": {"ip": "127.0.0.1", "port": 0}}},
            "nginx_config": {"worker_processes": 2, "error_log_level": "info"},
            "plugin_attr": {"prometheus": {"export_addr": {"ip": "127.0.0.1", "port": 0}}},
        });
        merge(&mut config, settings);
        self.write("conf/config.yaml", config.to_string());
    }

    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_moongate"));
        command.arg("-p").arg(self.path()).current_dir(self.path()).stdin(Stdio::null());
        command
    }
}

impl Default for Dir {
    fn default() -> Self {
        Self::new()
    }
}

/// Maps merge, everything else is replaced.
fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from,
    }
}

impl Gateway {
    /// With the embedded store and default settings.
    pub fn start() -> Self {
        Self::with(json!({}))
    }

    /// With these settings over the defaults.
    pub fn with(settings: Value) -> Self {
        let dir = Dir::new();
        dir.configure(settings);
        Self::in_dir(dir)
    }

    /// In a directory that is set up already; without a configuration with default settings, but never on the default ports, which are
    /// somebody's.
    pub fn in_dir(dir: Dir) -> Self {
        let conf = fs::read_dir(dir.join("conf")).expect("a directory");
        if !conf.flatten().any(|file| file.file_name().to_string_lossy().starts_with("config")) {
            dir.configure(json!({}));
        }
        let mut gateway = Gateway { dir, child: None, listen: Value::Null };
        gateway.launch();
        gateway
    }

    /// Starts the process and waits until it listens.
    pub fn launch(&mut self) {
        let listen = self.dir.join("logs/listen.json");
        let _ = fs::remove_file(&listen);
        let out = fs::File::create(self.dir.join("logs/stdout")).expect("a file");
        let err = fs::File::create(self.dir.join("logs/stderr")).expect("a file");
        let child = self.dir.command().stdout(out).stderr(err).spawn().expect("the gateway starts");
        self.child = Some(child);
        self.listen = eventually("the gateway listens", || {
            if let Some(status) = self.child.as_mut().and_then(|c| c.try_wait().ok().flatten()) {
                panic!("the gateway ended with {status}:\n{}{}", self.dir.read("logs/stderr"), self.log());
            }
            serde_json::from_str(&fs::read_to_string(&listen).ok()?).ok()
        });
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("a running gateway").id()
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: a plain system call on a process that this value owns and has not reaped.
        unsafe { libc::kill(self.pid() as i32, signal) };
    }

    /// Waits for the process to end by itself.
    pub fn wait(&mut self) -> ExitStatus {
        let mut child = self.child.take().expect("a running gateway");
        eventually("the gateway ends", || child.try_wait().expect("its status"))
    }

    /// SIGQUIT, then waits.
    pub fn quit(&mut self) -> ExitStatus {
        self.signal(libc::SIGQUIT);
        self.wait()
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("a running gateway");
        child.kill().expect("killed");
        child.wait().expect("reaped");
    }

    fn address(&self, what: &str) -> String {
        let at = &self.listen[what];
        let at = at.as_array().and_then(|list| list.first()).unwrap_or(at);
        at.as_str().unwrap_or_else(|| panic!("no {what} address in {}", self.listen)).to_owned()
    }

    pub fn proxy(&self) -> String {
        self.address("proxy")
    }

    pub fn proxy_tls(&self) -> String {
        self.address("proxy_tls")
    }

    /// The first address of TCP connections that are proxied as they are.
    pub fn tcp(&self) -> String {
        self.address("tcp")
    }

    /// The same for UDP.
    pub fn udp(&self) -> String {
        self.address("udp")
    }

    /// All addresses of a kind, in the order of the configuration.
    pub fn addresses(&self, what: &str) -> Vec<String> {
        let list = self.listen[what].as_array().into_iter().flatten();
        list.filter_map(|at| at.as_str().map(str::to_owned)).collect()
    }

    pub fn admin_address(&self) -> String {
        self.address("admin")
    }

    pub fn control(&self) -> String {
        self.address("control")
    }

    /// Of the status API, which a test's settings turn on.
    pub fn status(&self) -> String {
        self.address("status")
    }

    /// All addresses of that name in logs/listen.json.
    pub fn listening(&self, what: &str) -> Value {
        self.listen[what].clone()
    }

    pub fn prometheus(&self) -> String {
        self.address("prometheus")
    }

    pub fn key(&self) -> String {
        self.dir.read("data/admin_key").trim().to_owned()
    }

    /// One Admin API request: `gw.admin("PUT", "/routes/1", json!({…}))`.
    pub fn admin(&self, method: &str, path: &str, body: impl Into<Value>) -> Reply {
        let body = body.into();
        let text = if body.is_null() { String::new() } else { body.to_string() };
        self.admin_text(method, path, &text, "application/json")
    }

    /// The same with a body as it is: Lua sources.
    pub fn admin_text(&self, method: &str, path: &str, body: &str, content_type: &str) -> Reply {
        let key = self.key();
        let headers = [("X-API-KEY", key.as_str()), ("Content-Type", content_type)];
        request(&self.admin_address(), method, &format!("/apisix/admin{path}"), &headers, body.as_bytes())
    }

    /// A write that must succeed.
    #[track_caller]
    pub fn put(&self, path: &str, body: impl Into<Value>) -> Value {
        let reply = self.admin("PUT", path, body);
        assert!(reply.status == 200 || reply.status == 201, "PUT {path}: {} {}", reply.status, reply.text());
        reply.json()
    }

    /// A route `id` for `uri` to `upstream`, with plugins.
    #[track_caller]
    pub fn route(&self, id: &str, uri: &str, upstream: &Upstream, plugins: Value) {
        self.put(
            &format!("/routes/{id}"),
            json!({"uri": uri, "plugins": plugins, "upstream": {"type": "roundrobin", "nodes": {upstream.addr(): 1}}}),
        );
    }

    pub fn get(&self, path: &str) -> Reply {
        get(&self.proxy(), path)
    }

    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
        request(&self.proxy(), method, path, headers, body)
    }

    /// error.log so far.
    pub fn log(&self) -> String {
        self.dir.read("logs/error.log")
    }

    /// Waits until error.log holds `text`.
    #[track_caller]
    pub fn expect_log(&self, text: &str) {
        eventually(&format!("{text:?} in error.log"), || self.log().contains(text).then_some(()));
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if thread::panicking() {
            eprintln!("--- error.log\n{}--- stderr\n{}", self.log(), self.dir.read("logs/stderr"));
        }
    }
}

/// Polls for a fact until it holds. The pause between two looks is no wait for time: what is waited for is the fact.
#[track_caller]
pub fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "waited {DEADLINE:?} for: {what}");
        thread::park_timeout(Duration::from_millis(2));
    }
}

/// What a command prints and how it ends.
pub fn run(mut command: Command) -> (ExitStatus, String) {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    let mut text = String::new();
    child.stdout.take().expect("piped").read_to_string(&mut text).expect("readable");
    child.stderr.take().expect("piped").read_to_string(&mut text).expect("readable");
    (child.wait().expect("reaped"), text)
}

/// Resident memory of a process, in KiB.
pub fn rss_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("a live process");
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).expect("VmRSS");
    line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number")
}
