//! `ngx.run_worker_thread`: functions that compute for long or block, away from the threads that serve requests.
//!
//! A few threads for the whole process, each with a VM of its own, which it makes with its first task and anew when plugins were
//! uploaded. What goes in and comes out is copied. Such a function has no request, waits for nothing and starts no timers.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    rc::Rc,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use mlua::ffi;
use tokio::sync::oneshot;

use crate::{
    error::Result,
    lua::{
        Op, Value, Values, Wait,
        api::{Api, Phases, Raise, Stack, script},
        limits::{self, Limits},
        vm::{self, Purpose, Vm, VmConfig},
    },
};

/// More would take the processor from those who serve requests.
const THREADS: usize = 4;
/// Tasks that wait for a thread; more are refused.
const MAX_WAITING: usize = 1024;
/// How deep tables may stand within each other, which bounds those that hold themselves, and how many values there may be.
const MAX_DEPTH: usize = 100;
const MAX_VALUES: usize = 1 << 20;
/// Bytes of strings that one call may bring, or return: a string counts as often as it stands there, for it is copied each time,
/// and the VMs' limits do not see the copies.
const MAX_BYTES: usize = 64 << 20;
/// Bytes of strings that all tasks that wait for a thread may hold.
const MAX_WAITING_BYTES: usize = 256 << 20;
/// The stack of a thread, in bytes: as much as those who serve requests have, for the same libraries.
const STACK: usize = 8 << 20;
/// How much longer than a script between two waits (`lua.limits.cpu_ms`) a task may compute: 60 s by default.
const PATIENCE: u64 = 60;
/// The longest that a script waits for a task, the time in the queue included: five times what one may compute by default.
const LONGEST: Duration = if cfg!(test) { Duration::from_millis(300) } else { Duration::from_secs(300) };
/// A VM that holds more after a task is not used again.
const KEPT_MEMORY: usize = 64 << 20;

pub fn register(api: &mut Api) -> Result<()> {
    let doc = "run_worker_thread(pool, module, function, args…): true, results… | false, err; all pools are one. Not in functions";
    api.wait("ngx.run_worker_thread", Phases::BEFORE_HEAD, doc, run)
}

/// A value that goes from one VM to another.
#[derive(Debug, PartialEq)]
enum Plain {
    Nil,
    Bool(bool),
    Number(f64),
    Bytes(Vec<u8>),
    Table(Vec<(Plain, Plain)>),
}

/// What a VM is made of, as far as it may go to another thread. A VM makes it once, for all of its tasks.
pub struct Sources {
    prefix: PathBuf,
    lua_path: String,
    lua_cpath: String,
    package_path: String,
    package_cpath: String,
    config: Arc<serde_json::Value>,
    plugins: Vec<(Arc<str>, Arc<str>)>,
}

struct Task {
    sources: Arc<Sources>,
    module: Vec<u8>,
    function: Vec<u8>,
    args: Vec<Plain>,
    bytes: Waiting,
    done: oneshot::Sender<Outcome>,
}

/// The bytes of a task that waits, counted until it is taken.
struct Waiting(usize);

static WAITING_BYTES: AtomicUsize = AtomicUsize::new(0);

impl Waiting {
    fn take(bytes: usize) -> Option<Waiting> {
        let more = |held: usize| held.checked_add(bytes).filter(|sum| *sum <= MAX_WAITING_BYTES);
        WAITING_BYTES.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok().map(|_| Waiting(bytes))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        WAITING_BYTES.fetch_sub(self.0, Ordering::Relaxed);
    }
}

/// What the function has returned; the error is for the script.
type Outcome = std::result::Result<Vec<Plain>, String>;

fn run(s: &Stack) -> std::result::Result<Wait, Raise> {
    s.arg_bytes(1)?;
    let (module, function) = (s.arg_bytes(2)?, s.arg_bytes(3)?);
    let vm = vm::current().ok_or("no VM runs")?;
    // The other VMs, those of threads and of checks, are never in one of the phases that this is for.
    if vm.config.purpose != Purpose::Plugins {
        return Ok(refuse(s, "not open to functions"));
    }
    let mut copying = Copying::default();
    let names = copying.bytes(module).and_then(|module| Ok((module, copying.bytes(function)?)));
    let given = names.and_then(|names| {
        let args: std::result::Result<Vec<Plain>, String> = (4..=s.top()).map(|i| copying.read(s, i, 0)).collect();
        Ok((names, args?))
    });
    let ((module, function), args) = match given {
        Ok(given) => given,
        Err(text) => return Ok(refuse(s, &text)),
    };
    let Some(bytes) = Waiting::take(copying.bytes) else {
        return Ok(refuse(s, "too much waits for a thread"));
    };
    let (done, outcome) = oneshot::channel();
    let sources = vm.sources.get_or_init(|| Arc::new(Sources::of(&vm.config))).clone();
    let Some(tasks) = pool() else { return Ok(refuse(s, "no thread can be started")) };
    if tasks.try_send(Task { sources, module, function, args, bytes, done }).is_err() {
        return Ok(refuse(s, "too many tasks wait for a thread"));
    }
    Ok(Wait::Park(Op::future(async move {
        let (ok, results) = match awaited(outcome).await {
            Ok(results) => (true, results),
            Err(text) => (false, vec![Plain::Bytes(text.into_bytes())]),
        };
        std::iter::once(Value::Bool(ok)).chain(results.into_iter().map(Value::from)).collect::<Values>()
    })))
}

async fn awaited(outcome: oneshot::Receiver<Outcome>) -> Outcome {
    match tokio::time::timeout(LONGEST, outcome).await {
        Ok(outcome) => outcome.unwrap_or_else(|_| Err("the task was given up".into())),
        // It may still run: what blocks in C cannot be stopped, and its thread is back when it ends.
        Err(_) => Err("timeout".into()),
    }
}

fn refuse(s: &Stack, text: &str) -> Wait {
    s.push_bool(false);
    s.push_bytes(text);
    Wait::Ready(2)
}

/// Where tasks go. `None`: no thread could be started.
fn pool() -> Option<&'static mpsc::SyncSender<Task>> {
    static POOL: OnceLock<Option<mpsc::SyncSender<Task>>> = OnceLock::new();
    let start = || {
        let (tasks, waiting) = mpsc::sync_channel(MAX_WAITING);
        let waiting = Arc::new(Mutex::new(waiting));
        let started = (0..THREADS).filter(|n| {
            let waiting = waiting.clone();
            thread::Builder::new()
                .name(format!("lua-thread-{n}"))
                .stack_size(STACK)
                .spawn(move || work(&waiting))
                .is_ok()
        });
        (started.count() > 0).then_some(tasks)
    };
    POOL.get_or_init(start).as_ref()
}

fn work(waiting: &Mutex<mpsc::Receiver<Task>>) {
    let mut vm = None;
    loop {
        let next = waiting.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(task) = next else { return };
        if task.done.is_closed() {
            continue;
        }
        drop(task.bytes);
        let (sources, call) = (task.sources, (task.module, task.function, task.args));
        let outcome = catch_unwind(AssertUnwindSafe(|| serve(&mut vm, &sources, call)));
        let outcome = outcome.unwrap_or_else(|_| Err("the thread has failed".into()));
        // Whoever has asked may have gone.
        let _ = task.done.send(outcome);
        if vm.as_ref().is_some_and(|vm: &Rc<Vm>| vm.lua.used_memory() > KEPT_MEMORY) {
            vm = None;
        }
    }
}

fn serve(kept: &mut Option<Rc<Vm>>, sources: &Sources, call: (Vec<u8>, Vec<u8>, Vec<Plain>)) -> Outcome {
    let vm = match kept.take().filter(|vm| sources.are_of(&vm.config)) {
        Some(vm) => vm,
        None => Vm::new(sources.config()).map_err(|e| e.to_string())?,
    };
    let outcome = called(&vm, call);
    *kept = Some(vm);
    outcome
}

impl Sources {
    fn of(config: &VmConfig) -> Sources {
        Sources {
            prefix: config.prefix.clone(),
            lua_path: config.lua_path.clone(),
            lua_cpath: config.lua_cpath.clone(),
            package_path: config.package_path.clone(),
            package_cpath: config.package_cpath.clone(),
            config: config.config.clone(),
            plugins: config.plugin_sources.clone(),
        }
    }

    fn config(&self) -> VmConfig {
        VmConfig {
            purpose: Purpose::Thread,
            prefix: self.prefix.clone(),
            lua_path: self.lua_path.clone(),
            lua_cpath: self.lua_cpath.clone(),
            package_path: self.package_path.clone(),
            package_cpath: self.package_cpath.clone(),
            config: self.config.clone(),
            plugin_sources: self.plugins.clone(),
            ..VmConfig::default()
        }
    }

    /// Whether the modules that a script finds, and what they find configured, are those of a VM. A reload changes both.
    fn are_of(&self, config: &VmConfig) -> bool {
        let (a, b) = (&self.plugins, &config.plugin_sources);
        let places = self.prefix == config.prefix
            && self.lua_path == config.lua_path
            && self.lua_cpath == config.lua_cpath
            && self.package_path == config.package_path
            && self.package_cpath == config.package_cpath;
        places
            && Arc::ptr_eq(&self.config, &config.config)
            && a.len() == b.len()
            && a.iter().zip(b).all(|(a, b)| a.0 == b.0 && Arc::ptr_eq(&a.1, &b.1))
    }
}

fn called(vm: &Vm, (module, function, args): (Vec<u8>, Vec<u8>, Vec<Plain>)) -> Outcome {
    let run = || -> Result<mlua::MultiValue> {
        let require: mlua::Function = vm.lua.globals().get("require").map_err(script)?;
        let face: mlua::Table = require.call("moongate.worker_thread").map_err(script)?;
        let run: mlua::Function = face.get("run").map_err(script)?;
        let names = [Plain::Bytes(module), Plain::Bytes(function)];
        let given: mlua::Result<mlua::MultiValue> =
            names.into_iter().chain(args).map(|value| value.into_lua(&vm.lua)).collect();
        run.call(given.map_err(script)?).map_err(script)
    };
    let Limits { cpu_ms, memory_mb } = vm.limits();
    let limits = Limits { cpu_ms: cpu_ms.saturating_mul(PATIENCE), memory_mb };
    let results = vm.entered(|| limits::bounded(vm.main(), limits, run)).map_err(|e| e.to_string())?;
    let mut copying = Copying::default();
    let results: std::result::Result<Vec<Plain>, String> = results.iter().map(|value| copying.take(value, 0)).collect();
    let mut results = results?.into_iter();
    match results.next() {
        Some(Plain::Bool(true)) => Ok(results.collect()),
        _ => Err(match results.next() {
            Some(Plain::Bytes(text)) => String::from_utf8_lossy(&text).into_owned(),
            _ => "the function has failed".into(),
        }),
    }
}

/// Counts what is copied.
#[derive(Default)]
struct Copying {
    values: usize,
    bytes: usize,
}

impl Copying {
    fn count(&mut self, depth: usize) -> std::result::Result<(), String> {
        self.values += 1;
        match () {
            () if depth > MAX_DEPTH => Err(format!("tables stand within each other more than {MAX_DEPTH} times")),
            () if self.values > MAX_VALUES => Err(format!("more than {MAX_VALUES} values")),
            () => Ok(()),
        }
    }

    /// A string of a script's.
    fn bytes(&mut self, text: &[u8]) -> std::result::Result<Vec<u8>, String> {
        self.bytes = self.bytes.saturating_add(text.len());
        match self.bytes > MAX_BYTES {
            true => Err(format!("too large: more than {MAX_BYTES} bytes of strings")),
            false => Ok(text.to_vec()),
        }
    }

    /// What stands at `i` of a stack.
    fn read(&mut self, s: &Stack, i: std::ffi::c_int, depth: usize) -> std::result::Result<Plain, String> {
        self.count(depth)?;
        Ok(match s.kind(i) {
            ffi::LUA_TNIL => Plain::Nil,
            ffi::LUA_TBOOLEAN => Plain::Bool(s.boolean(i)),
            ffi::LUA_TNUMBER => Plain::Number(s.number(i).unwrap_or_default()),
            ffi::LUA_TSTRING => Plain::Bytes(self.bytes(s.bytes(i).unwrap_or_default())?),
            ffi::LUA_TTABLE => {
                s.reserve(8).map_err(|e| e.0.into_owned())?;
                let mut entries = Vec::new();
                s.pairs(i, |s| {
                    let (key, value) = (s.absolute(-2), s.absolute(-1));
                    entries.push((self.read(s, key, depth + 1)?, self.read(s, value, depth + 1)?));
                    Ok(())
                })
                .map_err(|text: String| text)?;
                Plain::Table(entries)
            }
            _ => return Err(format!("unsupported Lua type: {}", s.kind_name(i))),
        })
    }

    fn take(&mut self, value: &mlua::Value, depth: usize) -> std::result::Result<Plain, String> {
        self.count(depth)?;
        Ok(match value {
            mlua::Value::Nil => Plain::Nil,
            mlua::Value::Boolean(b) => Plain::Bool(*b),
            mlua::Value::Integer(n) => Plain::Number(*n as f64),
            mlua::Value::Number(n) => Plain::Number(*n),
            mlua::Value::String(text) => Plain::Bytes(self.bytes(&text.as_bytes())?),
            mlua::Value::Table(table) => {
                let mut entries = Vec::new();
                for entry in table.pairs::<mlua::Value, mlua::Value>() {
                    let (key, value) = entry.map_err(|e| e.to_string())?;
                    entries.push((self.take(&key, depth + 1)?, self.take(&value, depth + 1)?));
                }
                Plain::Table(entries)
            }
            other => return Err(format!("unsupported Lua type: {}", other.type_name())),
        })
    }
}

/// How many entries have a place in the array part of a table.
fn in_array(entries: &[(Plain, Plain)]) -> usize {
    let is_index = |key: &Plain| matches!(key, Plain::Number(n) if *n >= 1.0 && n.fract() == 0.0);
    entries.iter().filter(|(key, _)| is_index(key)).count()
}

impl Plain {
    fn into_lua(self, lua: &mlua::Lua) -> mlua::Result<mlua::Value> {
        Ok(match self {
            Plain::Nil => mlua::Value::Nil,
            Plain::Bool(b) => mlua::Value::Boolean(b),
            Plain::Number(n) => mlua::Value::Number(n),
            Plain::Bytes(bytes) => mlua::Value::String(lua.create_string(bytes)?),
            Plain::Table(entries) => {
                let array = in_array(&entries);
                let table = lua.create_table_with_capacity(array, entries.len() - array)?;
                for (key, value) in entries {
                    table.raw_set(key.into_lua(lua)?, value.into_lua(lua)?)?;
                }
                mlua::Value::Table(table)
            }
        })
    }

    fn push(self, s: &Stack) {
        match self {
            Plain::Nil => s.push_nil(),
            Plain::Bool(b) => s.push_bool(b),
            Plain::Number(n) => s.push_number(n),
            Plain::Bytes(bytes) => s.push_bytes(bytes),
            Plain::Table(entries) => {
                let array = in_array(&entries);
                s.push_table(array, entries.len() - array);
                // A stack that cannot grow leaves the table empty; MAX_DEPTH keeps that from happening.
                if s.reserve(8).is_ok() {
                    let table = s.top();
                    for (key, value) in entries {
                        key.push(s);
                        value.push(s);
                        s.set_raw(table);
                    }
                }
                1
            }
        };
    }
}

impl From<Plain> for Value {
    fn from(value: Plain) -> Value {
        match value {
            Plain::Nil => Value::Nil,
            Plain::Bool(b) => Value::Bool(b),
            Plain::Number(n) => Value::Number(n),
            Plain::Bytes(bytes) => Value::Bytes(bytes),
            table => Value::Push(Box::new(move |s| table.push(s))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(config: VmConfig, source: &str, args: Vec<Plain>) -> Outcome {
        let vm = Vm::new(VmConfig { purpose: Purpose::Thread, ..config }).expect("a VM");
        vm.run("t.lua", source).expect("it runs");
        called(&vm, (b"t".to_vec(), b"f".to_vec(), args))
    }

    #[test]
    fn values_go_both_ways_up_to_a_number_and_a_depth() {
        let echo = "package.preload.t = function() return { f = function(...) return ... end } end";
        let nested = |depth: usize| {
            (0..depth).fold(Plain::Bool(true), |inner, _| Plain::Table(vec![(Plain::Number(1.0), inner)]))
        };
        let args = || vec![Plain::Nil, Plain::Number(1.5), Plain::Bytes(vec![0, 255]), nested(MAX_DEPTH)];
        assert_eq!(outcome(VmConfig::default(), echo, args()), Ok(args()));
        let deep = outcome(VmConfig::default(), echo, vec![nested(MAX_DEPTH + 1)]);
        assert_eq!(deep, Err("tables stand within each other more than 100 times".into()));
        let many = |n: usize| {
            format!(
                "package.preload.t = function() return {{ f = function() local t = {{}} for i = 1, {n} do t[i] = i end return t end }} end"
            )
        };
        // The answer itself, the table, and two for each element.
        let most = (MAX_VALUES - 2) / 2;
        assert!(outcome(VmConfig::default(), &many(most), Vec::new()).is_ok());
        let more = outcome(VmConfig::default(), &many(most + 1), Vec::new());
        assert_eq!(more, Err("more than 1048576 values".into()));
    }

    #[test]
    fn strings_go_both_ways_up_to_a_number_of_bytes() {
        let shared = |n: usize| {
            format!(
                "package.preload.t = function() return {{ f = function() local s, t = ('x'):rep(2^20), {{}} for i = 1, {n} do t[i] = s end return t end }} end"
            )
        };
        let most = MAX_BYTES >> 20;
        assert!(outcome(VmConfig::default(), &shared(most), Vec::new()).is_ok());
        let refusal = Err("too large: more than 67108864 bytes of strings".into());
        assert_eq!(outcome(VmConfig::default(), &shared(most + 1), Vec::new()), refusal);
    }

    #[test]
    fn a_vm_is_kept_for_the_same_paths_configuration_and_plugins_only() {
        let plugin: (Arc<str>, Arc<str>) = ("p".into(), "return {}".into());
        let config = || VmConfig { plugin_sources: vec![plugin.clone()], ..VmConfig::default() };
        let first = config();
        let sources = Sources::of(&first);
        let same = || VmConfig { config: first.config.clone(), ..config() };
        assert!(sources.are_of(&same()));
        let other = || "/other/?.lua".to_owned();
        let changed = [
            ("prefix", VmConfig { prefix: "/other".into(), ..same() }),
            ("lua_path", VmConfig { lua_path: other(), ..same() }),
            ("lua_cpath", VmConfig { lua_cpath: other(), ..same() }),
            ("package_path", VmConfig { package_path: other(), ..same() }),
            ("package_cpath", VmConfig { package_cpath: other(), ..same() }),
            ("config", VmConfig { config: Arc::default(), ..same() }),
            ("plugins", VmConfig { plugin_sources: Vec::new(), ..same() }),
        ];
        for (what, config) in changed {
            assert!(!sources.are_of(&config), "{what}");
        }
    }

    #[test]
    fn what_waits_is_bounded_in_bytes() {
        let most = Waiting::take(MAX_WAITING_BYTES).expect("room");
        assert!(Waiting::take(1).is_none() && Waiting::take(usize::MAX).is_none());
        assert!(Waiting::take(0).is_some());
        drop(most);
        assert!(Waiting::take(1).is_some());
    }

    #[test]
    fn a_task_that_nobody_waits_for_does_not_run() {
        let dir = tempfile::tempdir().expect("a directory");
        let (tasks, waiting) = mpsc::sync_channel(2);
        let write = |name: &str| {
            let (done, outcome) = oneshot::channel();
            let path = dir.path().join(name).display().to_string().into_bytes();
            let task = Task {
                sources: Sources::of(&VmConfig::default()).into(),
                module: b"io".to_vec(),
                function: b"open".to_vec(),
                args: vec![Plain::Bytes(path), Plain::Bytes(b"w".to_vec())],
                bytes: Waiting::take(1).expect("room"),
                done,
            };
            tasks.try_send(task).expect("room");
            outcome
        };
        drop(write("given_up"));
        let outcome = write("waited_for");
        drop(tasks);
        work(&Mutex::new(waiting));
        assert_eq!(outcome.blocking_recv(), Ok(Err("unsupported Lua type: userdata".into())));
        assert!(dir.path().join("waited_for").exists() && !dir.path().join("given_up").exists());
        assert!(Waiting::take(MAX_WAITING_BYTES).is_some(), "neither of them waits any more");
    }

    #[test]
    fn an_array_arrives_in_the_array_part() {
        let number = |n: f64| (Plain::Number(n), Plain::Nil);
        assert_eq!(in_array(&[number(1.0), number(2.0), number(0.0), number(-1.0), number(1.5), number(f64::NAN)]), 2);
        assert_eq!(in_array(&[(Plain::Bytes(b"a".to_vec()), Plain::Nil)]), 0);
    }

    #[test]
    fn nobody_waits_for_a_task_for_ever() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
        let wait = |outcome| runtime.block_on(awaited(outcome));
        let (unanswered, outcome) = oneshot::channel();
        assert_eq!(wait(outcome), Err("timeout".into()));
        drop(unanswered);
        let (given_up, outcome) = oneshot::channel();
        drop(given_up);
        assert_eq!(wait(outcome), Err("the task was given up".into()));
        let (done, outcome) = oneshot::channel();
        done.send(Ok(vec![Plain::Bool(true)])).expect("somebody waits");
        assert_eq!(wait(outcome), Ok(vec![Plain::Bool(true)]));
    }

    #[test]
    fn a_task_that_never_ends_is_stopped() {
        let endless = "package.preload.t = function() return { f = function() while true do pcall(function() while true do end end) end end } end";
        let config = serde_json::json!({"lua": {"limits": {"cpu_ms": 2}}});
        let stopped = outcome(VmConfig { config: config.into(), ..VmConfig::default() }, endless, Vec::new());
        assert!(stopped.is_err_and(|text| text.contains("longer than lua.limits.cpu_ms allows")));
    }

    #[test]
    fn a_vm_is_kept_for_the_same_sources_only() {
        let config: Arc<serde_json::Value> = Arc::default();
        let with = |sources: &[(&Arc<str>, &Arc<str>)]| VmConfig {
            config: config.clone(),
            plugin_sources: sources.iter().map(|(a, b)| ((*a).clone(), (*b).clone())).collect(),
            ..VmConfig::default()
        };
        let (name, old, new): (Arc<str>, Arc<str>, Arc<str>) = ("a".into(), "return 1".into(), "return 2".into());
        assert!(Sources::of(&with(&[(&name, &old)])).are_of(&with(&[(&name, &old)])));
        assert!(!Sources::of(&with(&[(&name, &old)])).are_of(&with(&[(&name, &new)])));
        assert!(!Sources::of(&with(&[])).are_of(&with(&[(&name, &new)])));
    }
}
