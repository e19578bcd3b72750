//! error.log, line by line as nginx writes it, and the files that any log goes to.
//!
//! ```text
//! 2026/11/23 10:00:00 [warn] 71#74: *5 message, client: 10.0.0.9, server: _, request: "GET / HTTP/1.1", host: "a.b"
//! ```
//!
//! Each file has a thread that writes it and a bounded buffer in front of it. A line of severity `error` or worse waits until
//! the kernel has it, so that a crash does not lose it, but no longer than `MAX_WAIT`, and not at all while the disk is known to be
//! slow: logging never stalls a worker for long. What does not fit is counted and the count is logged.

use std::{
    cell::Cell,
    fmt::{self, Write as _},
    fs::{File, OpenOptions},
    io::{self, Write},
    mem,
    path::{Path, PathBuf},
    process,
    sync::{
        Arc, Condvar, LazyLock, Mutex, MutexGuard, OnceLock, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use tracing::{Event, Metadata, Subscriber, field, span};

use super::{append, capture};

/// Bytes that may wait for one file: some seconds of heavy logging.
const MAX_WAITING: usize = 4 << 20;

/// What an `error` line waits for the disk. A healthy one takes microseconds.
const MAX_WAIT: Duration = Duration::from_millis(10);

/// Lines that nobody waits for gather up to so many bytes, or for so long, before the thread that writes them is woken: each
/// time it runs it may take a worker's core, and at tens of thousands of requests a second it would all the time.
const GATHERED: usize = 256 << 10;
const GATHER_FOR: Duration = Duration::from_millis(100);

/// Longest message: a deep traceback fits, a body logged by mistake does not.
const MAX_MESSAGE: usize = 16 << 10;

/// Severities with the numbers that `ngx.log` gives them: the smaller, the worse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Level {
    Stderr,
    Emerg,
    Alert,
    Crit,
    Error,
    Warn,
    Notice,
    Info,
    Debug,
}

const NAMES: [(&str, Level); 9] = [
    ("stderr", Level::Stderr),
    ("emerg", Level::Emerg),
    ("alert", Level::Alert),
    ("crit", Level::Crit),
    ("error", Level::Error),
    ("warn", Level::Warn),
    ("notice", Level::Notice),
    ("info", Level::Info),
    ("debug", Level::Debug),
];

impl Level {
    pub fn name(self) -> &'static str {
        NAMES[self as usize].0
    }

    pub fn from_name(name: &str) -> Option<Level> {
        NAMES.iter().find(|(known, _)| *known == name).map(|(_, level)| *level)
    }

    /// `ngx.ERR` is 4.
    pub fn from_number(number: u8) -> Option<Level> {
        NAMES.get(usize::from(number)).map(|(_, level)| *level)
    }

    fn of(level: &tracing::Level) -> Level {
        match *level {
            tracing::Level::ERROR => Level::Error,
            tracing::Level::WARN => Level::Warn,
            tracing::Level::INFO => Level::Info,
            _ => Level::Debug,
        }
    }
}

/// The request that a line is about.
#[derive(Clone, Copy, Debug, Default)]
pub struct RequestContext<'a> {
    /// Serial number of the connection.
    pub connection: u64,
    pub client: &'a str,
    pub server: &'a str,
    /// `GET / HTTP/1.1`; empty when there is none yet.
    pub request: &'a str,
    pub host: &'a str,
    /// `http://127.0.0.1:8080/`, once a node is chosen.
    pub upstream: Option<&'a str>,
}

/// What error.log takes now: changed by a reload.
static LEVEL: AtomicU8 = AtomicU8::new(Level::Warn as u8);
static ERROR_LOG: OnceLock<LogFile> = OnceLock::new();

/// Opens error.log at `target` and sends `tracing` events there. Once per process.
pub fn init(target: &Path, level: Level) -> io::Result<()> {
    let log = LogFile::open(target)?;
    set_level(level);
    if ERROR_LOG.set(log).is_err() {
        return Err(io::Error::other("error.log is open already"));
    }
    // Another subscriber is one that a test has set: it sees the events then.
    let _ = tracing::subscriber::set_global_default(ErrorLog);
    panics();
    Ok(())
}

pub fn set_level(level: Level) {
    LEVEL.store(level as u8, Ordering::Relaxed);
}

/// The least severe that is written.
pub fn level() -> u8 {
    LEVEL.load(Ordering::Relaxed)
}

/// Whether a line of this severity is written: asked before a message is put together.
pub fn enabled(level: Level) -> bool {
    level as u8 <= LEVEL.load(Ordering::Relaxed)
}

/// Writes one line, if its severity is asked for.
pub fn line(level: Level, message: &[u8], request: Option<&RequestContext>) {
    if !enabled(level) {
        return;
    }
    let text = format_line(level, message, request);
    capture::keep(level, &text);
    match ERROR_LOG.get() {
        Some(log) => {
            log.write(&text, level <= Level::Error);
        }
        // Before error.log is open: what the terminal shows is all there is.
        None => {
            let _ = io::stderr().write_all(&text);
        }
    }
}

/// Makes every log open its file anew: after a rotation has moved it away.
pub fn reopen_all() {
    for log in live() {
        log.ask(|state| state.reopen = true);
    }
    append::reopen();
}

/// Waits until every log has written what it holds, or `longest` has passed: the last thing that a process does.
pub fn flush_all(longest: Duration) {
    let end = Instant::now() + longest;
    for log in live() {
        log.flush(end);
    }
}

fn format_line(level: Level, message: &[u8], request: Option<&RequestContext>) -> Vec<u8> {
    let mut text = Vec::with_capacity(message.len().min(MAX_MESSAGE) + 256);
    let now = chrono::Local::now().format("%Y/%m/%d %H:%M:%S");
    // nginx has no name for the highest.
    let name = if level == Level::Stderr { "" } else { level.name() };
    let _ = write!(text, "{now} [{name}] {}#{}: ", process::id(), thread_id());
    if let Some(request) = request {
        let _ = write!(text, "*{} ", request.connection);
    }
    text.extend_from_slice(&message[..message.len().min(MAX_MESSAGE)]);
    if let Some(request) = request {
        context(&mut text, request);
    }
    text.push(b'\n');
    text
}

fn context(text: &mut Vec<u8>, request: &RequestContext) {
    let _ = write!(text, ", client: {}, server: {}", Clean(request.client), Clean(request.server));
    if !request.request.is_empty() {
        let _ = write!(text, ", request: \"{}\"", Clean(request.request));
    }
    if let Some(upstream) = request.upstream {
        let _ = write!(text, ", upstream: \"{}\"", Clean(upstream));
    }
    if !request.host.is_empty() {
        let _ = write!(text, ", host: \"{}\"", Clean(request.host));
    }
}

/// What a client sent cannot start a line of its own.
struct Clean<'a>(&'a str);

impl fmt::Display for Clean<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|c| match c.is_control() {
            true => write!(f, "{}", c.escape_default()),
            false => f.write_char(c),
        })
    }
}

fn thread_id() -> i64 {
    thread_local!(static ID: Cell<i64> = const { Cell::new(0) });
    ID.with(|id| {
        if id.get() == 0 {
            // SAFETY: gettid takes no argument, touches no memory and cannot fail.
            id.set(unsafe { libc::syscall(libc::SYS_gettid) });
        }
        id.get()
    })
}

/// A panic is a line of severity `alert` before it is anything else.
fn panics() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        line(Level::Alert, format!("panic: {info}").as_bytes(), None);
        before(info);
    }));
}

/// `tracing` events as lines.
struct ErrorLog;

impl Subscriber for ErrorLog {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> tracing::subscriber::Interest {
        // The level may change at any time; what is not ours never passes below `warn`, and is not asked about again.
        match is_ours(metadata.target()) || *metadata.level() <= tracing::Level::WARN {
            true => tracing::subscriber::Interest::sometimes(),
            false => tracing::subscriber::Interest::never(),
        }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && enabled(Level::of(metadata.level()))
    }

    fn event(&self, event: &Event<'_>) {
        let mut text = EventText::default();
        event.record(&mut text);
        let message = text.message + &text.fields;
        line(Level::of(event.metadata().level()), message.as_bytes(), None);
    }

    // Spans are not recorded: the lines stand alone.
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

/// Libraries tell of every frame at `debug`.
fn is_ours(target: &str) -> bool {
    let top = target.split("::").next().unwrap_or_default();
    matches!(top, "moongate" | "lua")
}

#[derive(Default)]
struct EventText {
    message: String,
    fields: String,
}

impl field::Visit for EventText {
    fn record_debug(&mut self, field: &field::Field, value: &dyn fmt::Debug) {
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, ", {name}: {value:?}"),
        };
    }
}

/// A file that is appended to by a thread of its own. Clones share it; the last one to go ends the thread.
#[derive(Clone)]
pub struct LogFile(Arc<Handle>);

struct Handle {
    shared: Arc<Shared>,
}

struct Shared {
    path: PathBuf,
    state: Mutex<State>,
    /// There is something to do for the thread.
    work: Condvar,
    /// Something has been written.
    done: Condvar,
    /// The last line that waited did so in vain.
    slow: AtomicBool,
}

#[derive(Default)]
struct State {
    waiting: Vec<u8>,
    /// Bytes that were ever accepted, and how many of them the kernel has, or has refused.
    accepted: u64,
    settled: u64,
    dropped: u64,
    /// What waits is to be written now.
    urgent: bool,
    reopen: bool,
    closed: bool,
}

static LIVE: LazyLock<Mutex<Vec<Weak<Shared>>>> = LazyLock::new(Mutex::default);

fn live() -> Vec<Arc<Shared>> {
    let mut all = lock(&LIVE);
    all.retain(|log| log.strong_count() > 0);
    all.iter().filter_map(Weak::upgrade).collect()
}

/// What the lock guards is whole at every point, even where a thread has panicked.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl LogFile {
    /// `stderr`, `/dev/stderr` and `/dev/stdout` are streams, all else are files, made with their directory where they are missing.
    pub fn open(path: &Path) -> io::Result<LogFile> {
        let out = Out::open(path, true)?;
        let shared = Arc::new(Shared {
            path: path.to_owned(),
            state: Mutex::default(),
            work: Condvar::new(),
            done: Condvar::new(),
            slow: AtomicBool::new(false),
        });
        let writer = shared.clone();
        thread::Builder::new().name("log".into()).spawn(move || writer.run(out))?;
        lock(&LIVE).push(Arc::downgrade(&shared));
        Ok(LogFile(Arc::new(Handle { shared })))
    }

    /// Takes whole lines, or refuses and counts them when too much waits already. With `wait`, returns once the kernel has
    /// them, or after `MAX_WAIT`.
    pub fn write(&self, lines: &[u8], wait: bool) -> bool {
        self.0.shared.write(lines, true, wait)
    }

    /// As `write`, for lines that may reach the file up to `GATHER_FOR` later.
    pub fn write_soon(&self, lines: &[u8]) -> bool {
        self.0.shared.write(lines, false, false)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.ask(|state| state.closed = true);
    }
}

impl Shared {
    fn ask(&self, change: impl FnOnce(&mut State)) {
        change(&mut lock(&self.state));
        self.work.notify_one();
    }

    fn write(&self, lines: &[u8], urgent: bool, wait: bool) -> bool {
        let mut state = lock(&self.state);
        if state.waiting.len() + lines.len() > MAX_WAITING {
            state.dropped += 1;
            return false;
        }
        let asleep = state.waiting.is_empty();
        state.waiting.extend_from_slice(lines);
        state.accepted += lines.len() as u64;
        let mine = state.accepted;
        let urgent = urgent || state.waiting.len() >= GATHERED;
        if asleep || (urgent && !state.urgent) {
            self.work.notify_one();
        }
        state.urgent |= urgent;
        if wait && !self.slow.load(Ordering::Relaxed) {
            let (state, timeout) = self
                .done
                .wait_timeout_while(state, MAX_WAIT, |state| state.settled < mine)
                .unwrap_or_else(PoisonError::into_inner);
            drop(state);
            self.slow.store(timeout.timed_out(), Ordering::Relaxed);
        }
        true
    }

    fn flush(&self, end: Instant) {
        let mut state = lock(&self.state);
        let mine = state.accepted;
        state.urgent = true;
        self.work.notify_one();
        let longest = end.saturating_duration_since(Instant::now());
        let waited = self.done.wait_timeout_while(state, longest, |state| state.settled < mine);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    fn run(&self, mut out: Out) {
        let mut spare = Vec::new();
        let mut failing = false;
        loop {
            let idle = |s: &mut State| s.waiting.is_empty() && !s.reopen && !s.closed && s.dropped == 0;
            let state = self.work.wait_while(lock(&self.state), idle).unwrap_or_else(PoisonError::into_inner);
            let gathers = |s: &mut State| !s.urgent && !s.reopen && !s.closed;
            let gathered = self.work.wait_timeout_while(state, GATHER_FOR, gathers);
            let mut state = gathered.unwrap_or_else(PoisonError::into_inner).0;
            state.urgent = false;
            mem::swap(&mut state.waiting, &mut spare);
            let (reopen, closed) = (mem::take(&mut state.reopen), state.closed);
            let dropped = mem::take(&mut state.dropped);
            drop(state);
            let written = out.write_all(&spare);
            self.complain(&mut failing, &written);
            let mut state = lock(&self.state);
            state.settled += spare.len() as u64;
            let caught_up = state.waiting.is_empty();
            drop(state);
            if caught_up {
                self.slow.store(false, Ordering::Relaxed);
            }
            self.done.notify_all();
            spare.clear();
            if dropped > 0 {
                tracing::warn!("{}: {dropped} writes were dropped, the disk is too slow", self.path.display());
            }
            if reopen {
                match Out::open(&self.path, false) {
                    Ok(fresh) => out = fresh,
                    Err(e) => tracing::error!("{} is not opened again: {e}", self.path.display()),
                }
            }
            // What came in meanwhile is still written.
            if closed && caught_up {
                return;
            }
        }
    }

    /// Says once that a log cannot be written, where it can be said: there may be no other log.
    fn complain(&self, failing: &mut bool, written: &io::Result<()>) {
        if let Err(e) = written {
            if !mem::replace(failing, true) {
                let _ = writeln!(io::stderr(), "moongate: {} is not written: {e}", self.path.display());
            }
        } else {
            *failing = false;
        }
    }
}

enum Out {
    File(File),
    Stderr,
    Stdout,
}

impl Out {
    fn open(path: &Path, make_dir: bool) -> io::Result<Out> {
        match path.to_str() {
            Some("stderr" | "/dev/stderr") => return Ok(Out::Stderr),
            Some("/dev/stdout") => return Ok(Out::Stdout),
            _ => {}
        }
        if let Some(dir) = path.parent().filter(|_| make_dir) {
            std::fs::create_dir_all(dir)?;
        }
        OpenOptions::new().create(true).append(true).open(path).map(Out::File)
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Out::File(file) => file.write_all(bytes),
            Out::Stderr => io::stderr().write_all(bytes),
            Out::Stdout => io::stdout().write_all(bytes).and_then(|()| io::stdout().flush()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    fn flush(log: &LogFile) {
        log.0.shared.flush(Instant::now() + SOON);
    }

    #[test]
    fn lines_look_like_nginx_s() {
        let request = RequestContext {
            connection: 5,
            client: "10.0.0.9",
            server: "_",
            request: "GET /a\nb HTTP/1.1",
            host: "a.b",
            upstream: None,
        };
        let line = String::from_utf8(format_line(Level::Warn, b"[lua] x.lua:1: oops", Some(&request))).unwrap();
        let (time, rest) = line.split_at(19);
        assert!(chrono::NaiveDateTime::parse_from_str(time, "%Y/%m/%d %H:%M:%S").is_ok(), "{time}");
        let ids = format!(" [warn] {}#{}: ", process::id(), thread_id());
        let context = r#"client: 10.0.0.9, server: _, request: "GET /a\nb HTTP/1.1", host: "a.b""#;
        assert_eq!(rest, format!("{ids}*5 [lua] x.lua:1: oops, {context}\n"));
        let upstream = RequestContext { upstream: Some("http://127.0.0.1:1/"), ..RequestContext::default() };
        let line = String::from_utf8(format_line(Level::Error, b"m", Some(&upstream))).unwrap();
        assert!(line.ends_with("*0 m, client: , server: , upstream: \"http://127.0.0.1:1/\"\n"), "{line}");
        let long = format_line(Level::Info, &[b'x'; 2 * MAX_MESSAGE], None);
        assert!(long.len() < MAX_MESSAGE + 256 && long.ends_with(b"x\n"));
    }

    #[test]
    fn levels_have_nginx_s_names_and_numbers() {
        for (number, (name, level)) in NAMES.iter().enumerate() {
            assert_eq!((level.name(), *level as usize), (*name, number));
            assert_eq!(Level::from_name(name), Some(*level));
            assert_eq!(Level::from_number(number as u8), Some(*level));
        }
        assert_eq!((Level::from_name("loud"), Level::from_number(9)), (None, None));
    }

    #[test]
    fn a_line_that_waits_is_in_the_file_and_a_reopened_file_is_a_new_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("logs/error.log");
        let log = LogFile::open(&path).unwrap();
        assert!(log.write(b"one\n", false));
        flush(&log);
        assert_eq!(fs::read_to_string(&path).unwrap(), "one\n");
        let moved = path.with_extension("1");
        fs::rename(&path, &moved).unwrap();
        log.write(b"two\n", false);
        flush(&log);
        assert_eq!(fs::read_to_string(&moved).unwrap(), "one\ntwo\n");
        reopen_all();
        let end = Instant::now() + SOON;
        while !path.exists() {
            assert!(Instant::now() < end, "reopened");
            thread::yield_now();
        }
        log.write(b"three\n", false);
        flush(&log);
        assert_eq!(fs::read_to_string(&path).unwrap(), "three\n");
        log.write(b"last\n", false);
        drop(log);
        while !fs::read_to_string(&path).unwrap().ends_with("last\n") {
            assert!(Instant::now() < end, "written before the thread ends");
            thread::yield_now();
        }
    }

    #[test]
    fn lines_that_nobody_waits_for_gather_and_still_arrive() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("access.log");
        let log = LogFile::open(&path).unwrap();
        let end = Instant::now() + SOON;
        let arrived = |len: u64| {
            while fs::metadata(&path).unwrap().len() < len {
                assert!(Instant::now() < end, "{len} bytes");
                thread::yield_now();
            }
        };
        // Alone, at the bound, and behind what waits already.
        assert!(log.write_soon(b"one\n"));
        arrived(4);
        let many = vec![b'x'; GATHERED];
        assert!(log.write_soon(&many));
        arrived(4 + GATHERED as u64);
        assert!(log.write_soon(b"two\n") && log.write(b"three\n", true));
        assert!(fs::read_to_string(&path).unwrap().ends_with("xtwo\nthree\n"));
    }

    #[test]
    fn a_disk_that_does_not_answer_costs_lines_and_bounded_time() {
        // A pipe that nobody reads takes 64 KiB and then blocks its writer: the slowest disk there is.
        let (reader, writer) = io::pipe().unwrap();
        let shared = Arc::new(Shared {
            path: "pipe".into(),
            state: Mutex::default(),
            work: Condvar::new(),
            done: Condvar::new(),
            slow: AtomicBool::new(false),
        });
        let out = Out::File(File::from(std::os::fd::OwnedFd::from(writer)));
        let run = shared.clone();
        let thread = thread::spawn(move || run.run(out));
        let line = [b'x'; 256 << 10];
        assert!(shared.write(&line, true, true), "taken, though not written in time");
        assert!(shared.slow.load(Ordering::Relaxed), "nobody waits for it again");
        let mut taken = 1;
        while shared.write(&line, true, true) {
            taken += 1;
            assert!(taken <= 2 * MAX_WAITING / line.len(), "bounded");
        }
        assert!(lock(&shared.state).dropped > 0);
        drop(reader);
        shared.ask(|state| state.closed = true);
        thread.join().unwrap();
    }
}
