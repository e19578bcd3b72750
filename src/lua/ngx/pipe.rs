//! `ngx.pipe`: processes that a script talks to through their standard streams. The face is lua/ngx/pipe.lua.
//!
//! A process belongs to the request (or the timer's run) that started it, as a socket does: it is killed, with all that it
//! started, when its owner ends or its object is collected. Nothing here blocks the worker.

use std::{
    cell::{Cell, RefCell},
    ffi::{OsStr, c_int},
    future::{Future, poll_fn},
    io,
    os::{fd::OwnedFd, unix::ffi::OsStrExt, unix::process::ExitStatusExt},
    pin::{Pin, pin},
    process::{ExitStatus, Stdio},
    rc::Rc,
    sync::atomic::{AtomicUsize, Ordering},
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::BytesMut;
use smallvec::smallvec;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::unix::pipe,
    process::{Child, ChildStdin, Command},
    time::timeout,
};

use super::{
    object,
    socket::{self, Owner, Shut},
};
use crate::{
    error::Result,
    lua::{
        Op, Value, Wait,
        api::{Api, Phases, Raise, Stack},
        fast,
        host::{Answer, lfs::words},
        sched::{Values, failed},
        vm::Purpose,
    },
};

/// Processes that scripts of this gateway may have at once: a bound for a loop that starts them.
const MAX_PROCESSES: usize = 1024;
/// Arguments, and variables of the environment, of one process.
const MAX_ARGUMENTS: usize = 1024;
/// What one read may gather: a process that never stops must not take the worker's memory.
const MAX_READ: usize = 64 << 20;
/// What one `buffer_size` may ask for.
const MAX_BUFFER: f64 = (1 << 20) as f64;
/// `buffer_size`
const BUFFER: f64 = 4096.0;
/// How long a wait may take when nobody sets a time.
const TIMEOUT: Duration = Duration::from_secs(10);
/// What 0 means, never: a year, so that no sum of instants overflows.
const NEVER: Duration = Duration::from_secs(365 * 86_400);

static PROCESSES: AtomicUsize = AtomicUsize::new(0);

/// Counts one process until it goes.
struct Place;

impl Place {
    fn take() -> Option<Place> {
        let more = |n: usize| (n < MAX_PROCESSES).then_some(n + 1);
        PROCESSES.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok().map(|_| Place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        PROCESSES.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One stream of a process, and who waits on it.
struct End<T> {
    /// `None` once it is closed.
    io: RefCell<Option<T>>,
    busy: Cell<bool>,
    /// `shutdown` closed it while somebody waited.
    aborted: Cell<bool>,
    waker: RefCell<Option<Waker>>,
    limit: Cell<Duration>,
}

type Output = Box<dyn AsyncRead + Unpin>;

impl<T> End<T> {
    fn new(io: Option<T>, limit: Duration) -> End<T> {
        let (busy, aborted) = (Cell::new(false), Cell::new(false));
        End { io: RefCell::new(io), busy, aborted, waker: RefCell::default(), limit: Cell::new(limit) }
    }

    /// Closes it; whoever waits on it waits no more.
    fn close(&self) {
        let io = self.io.take();
        self.aborted.set(self.busy.get() && io.is_some());
        drop(io);
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    fn is_open(&self) -> bool {
        self.io.borrow().is_some()
    }

    /// Polls the stream; `None` when it is closed.
    fn poll<R>(&self, cx: &mut Context<'_>, poll: impl FnOnce(&mut T, &mut Context<'_>) -> Poll<R>) -> Poll<Option<R>> {
        *self.waker.borrow_mut() = Some(cx.waker().clone());
        match &mut *self.io.borrow_mut() {
            Some(io) => poll(io, cx).map(Some),
            None => Poll::Ready(None),
        }
    }

    /// Why a wait found the stream closed.
    fn why_closed(&self) -> &'static str {
        if self.aborted.take() { "aborted" } else { "closed" }
    }
}

struct Process {
    /// `None` for one that belongs to the worker: started outside of requests.
    owner: Option<Rc<Owner>>,
    pid: i32,
    /// `None` once the process has been killed because its owner ended.
    child: RefCell<Option<Child>>,
    place: Cell<Option<Place>>,
    /// Its end was told to a `wait`.
    told: Cell<bool>,
    waits: Cell<bool>,
    wait_limit: Cell<Duration>,
    stdin: End<ChildStdin>,
    outputs: [End<Output>; 2],
    /// What was read and not asked for yet.
    read: [RefCell<BytesMut>; 2],
    merged: bool,
    buffer: usize,
}

impl Shut for Process {
    fn holds_connection(&self) -> bool {
        false
    }

    fn shut(&self) {
        self.kill();
        self.stdin.close();
        self.outputs.iter().for_each(End::close);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Process {
    /// Ends the process and what it started, unless it has ended. tokio reaps what was not waited for.
    fn kill(&self) {
        if !self.is_over() {
            // SAFETY: plain numbers go in; the group is that of a process that is not reaped, so its number is not free.
            unsafe { libc::kill(-self.pid, libc::SIGKILL) };
        }
        drop(self.child.take());
        drop(self.place.take());
    }

    fn busy(&self, with: usize) -> &Cell<bool> {
        match with {
            WAIT => &self.waits,
            STDIN => &self.stdin.busy,
            output => &self.outputs[output].busy,
        }
    }

    fn poll_end(&self, cx: &mut Context<'_>) -> Poll<io::Result<ExitStatus>> {
        let mut child = self.child.borrow_mut();
        let Some(child) = child.as_mut() else { return Poll::Ready(Err(io::ErrorKind::NotFound.into())) };
        // What it waits with lies in the child: a new future goes on where the last one was.
        let ended = ready!(pin!(child.wait()).poll(cx));
        drop(self.place.take());
        Poll::Ready(ended)
    }

    /// Whether the process has ended.
    fn is_over(&self) -> bool {
        let over = self.child.borrow_mut().as_mut().is_none_or(|child| !matches!(child.try_wait(), Ok(None)));
        if over {
            drop(self.place.take());
        }
        over
    }
}

/// What can be waited on beside the two outputs, 0 and 1.
const STDIN: usize = 2;
const WAIT: usize = 3;

/// Keeps other light threads off while one waits; ends with the wait, however it ends.
struct Busy {
    process: Rc<Process>,
    with: usize,
}

impl Busy {
    fn new(process: Rc<Process>, with: usize) -> Busy {
        process.busy(with).set(true);
        Busy { process, with }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.process.busy(self.with).set(false);
    }
}

pub fn register(api: &mut Api) -> Result<()> {
    let any = Phases::ANY;
    let doc = "spawn(text for sh or list, merge_stderr, buffer_size?, environ?, write, stdout, stderr and wait timeouts?) -> \
        object | nil, err. Not in functions";
    api.func("native.pipe.spawn", any, doc, spawn)?;
    api.func(
        "native.pipe.set_timeouts",
        any,
        "set_timeouts(object, write?, stdout?, stderr?, wait?): ms; 0: never",
        |s| {
            let process = this(s)?;
            set_timeouts(s, &process, 2)?;
            Ok(0)
        },
    )?;
    api.wait("native.pipe.wait", any, "wait(object) -> ok, \"exit\" or \"signal\", status | nil, err", wait)?;
    api.func("native.pipe.pid", any, "pid(object) -> number", |s| Ok(s.push_number(this(s)?.pid.into())))?;
    api.func("native.pipe.kill", any, "kill(object, signal) -> true | nil, err", kill)?;
    let doc = "shutdown(object, \"stdin\", \"stdout\" or \"stderr\") -> true | nil, err";
    api.func("native.pipe.shutdown", any, doc, shutdown)?;
    api.wait("native.pipe.write", any, "write(object, text, number or list) -> bytes | nil, err", write)?;
    let doc = "read(object, 1 for stdout or 2 for stderr, \"all\", \"line\", \"bytes\" or \"any\", n?) -> data | nil, err, partial";
    api.wait("native.pipe.read", any, doc, read)
}

/// The process, if it belongs to whoever runs.
fn this(s: &Stack) -> Result<Rc<Process>, Raise> {
    let process = object::get::<Process>(s, 1)?;
    if let Some(owner) = &process.owner {
        socket::check_owner(owner)?;
    }
    Ok(process)
}

fn refuse(s: &Stack, text: &str) -> Result<Wait, Raise> {
    s.fail(text).map(Wait::Ready)
}

fn spawn(s: &Stack) -> Answer {
    let vm = socket::current_vm()?;
    match vm.config.purpose {
        Purpose::Plugins | Purpose::Trusted => {}
        Purpose::Functions => return s.fail("not open to functions"),
        Purpose::Thread => return s.fail("no processes in a worker thread"),
        Purpose::Check => return s.fail("no processes while a plugin is checked"),
    }
    let mut command = command(s)?;
    let merged = s.boolean(2);
    let buffer = s.opt_number(3)?.unwrap_or(BUFFER);
    if !(1.0..=MAX_BUFFER).contains(&buffer) {
        return Err("bad buffer_size option".into());
    }
    if s.is_table(4) {
        command.env_clear();
        for variable in strings(s, 4, "environ option")? {
            let at = variable.iter().position(|b| *b == b'=').filter(|at| *at > 0);
            let at = at.ok_or("bad environ option: name=value expected")?;
            command.env(OsStr::from_bytes(&variable[..at]), OsStr::from_bytes(&variable[at + 1..]));
        }
    }
    let owner = match fast::exchange().and_then(|x| x.lua.slot) {
        Some(_) => Some(socket::current_owner()?),
        None => None,
    };
    let Some(place) = Place::take() else { return s.fail("too many processes") };
    let process = match start(command, merged) {
        Ok((child, stdin, outputs)) => Rc::new(Process {
            owner,
            pid: child.id().map_or(0, |pid| pid as i32),
            child: RefCell::new(Some(child)),
            place: Cell::new(Some(place)),
            told: Cell::new(false),
            waits: Cell::new(false),
            wait_limit: Cell::new(TIMEOUT),
            stdin: End::new(stdin, TIMEOUT),
            outputs: outputs.map(|output| End::new(output, TIMEOUT)),
            read: Default::default(),
            merged,
            buffer: buffer as usize,
        }),
        Err(e) => return s.fail(words(&e)),
    };
    set_timeouts(s, &process, 5)?;
    if let Some(owner) = &process.owner {
        let weak: std::rc::Weak<Process> = Rc::downgrade(&process);
        owner.adopt(weak);
    }
    Ok(object::push(s, process))
}

type Started = (Child, Option<ChildStdin>, [Option<Output>; 2]);

fn start(mut command: Command, merged: bool) -> io::Result<Started> {
    // A group of its own, so that what it started ends with it, and a terminal's signals do not reach it.
    command.process_group(0).kill_on_drop(true).stdin(Stdio::piped());
    let together = match merged {
        true => {
            let (reader, writer) = io::pipe()?;
            command.stdout(writer.try_clone()?).stderr(writer);
            Some(pipe::Receiver::from_owned_fd(OwnedFd::from(reader))?)
        }
        false => {
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
            None
        }
    };
    let mut child = command.spawn()?;
    let stdin = child.stdin.take();
    let stdout = match together {
        Some(together) => Some(Box::new(together) as Output),
        None => child.stdout.take().map(|out| Box::new(out) as Output),
    };
    let stderr = child.stderr.take().map(|err| Box::new(err) as Output);
    Ok((child, stdin, [stdout, stderr]))
}

fn command(s: &Stack) -> Result<Command, Raise> {
    if !s.is_table(1) {
        let text = s.bytes(1).ok_or_else(|| format!("bad args arg: table expected, got {}", s.kind_name(1)))?;
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(OsStr::from_bytes(text));
        return Ok(command);
    }
    let arguments = strings(s, 1, "args arg")?;
    let mut arguments = arguments.iter().map(|a| OsStr::from_bytes(a));
    let mut command = Command::new(arguments.next().ok_or("bad args arg: non-empty table expected")?);
    command.args(arguments);
    Ok(command)
}

/// A list of strings; numbers are taken for their text.
fn strings(s: &Stack, table: c_int, what: &str) -> Result<Vec<Vec<u8>>, Raise> {
    let n = s.len(table);
    if n > MAX_ARGUMENTS {
        return Err(format!("bad {what}: more than {MAX_ARGUMENTS} strings").into());
    }
    let mut all = Vec::with_capacity(n);
    for i in 1..=n {
        s.get_index(table, i);
        let (text, kind) = (s.bytes(-1).map(<[u8]>::to_vec), s.kind_name(-1));
        s.pop(1);
        all.push(text.ok_or_else(|| format!("bad {what}: table of strings expected, got {kind}"))?);
    }
    Ok(all)
}

/// Four numbers of milliseconds from index `first`; nil leaves what was set, 0 is no limit.
fn set_timeouts(s: &Stack, process: &Process, first: c_int) -> Result<(), Raise> {
    let limits = [&process.stdin.limit, &process.outputs[0].limit, &process.outputs[1].limit, &process.wait_limit];
    for (i, limit) in (first..).zip(limits) {
        match s.opt_number(i).map_err(|_| "bad timeout value")? {
            None => {}
            Some(0.0) => limit.set(NEVER),
            Some(ms) if ms > 0.0 => limit.set(Duration::from_secs_f64((ms / 1e3).min(NEVER.as_secs_f64()))),
            Some(_) => return Err("bad timeout value".into()),
        }
    }
    Ok(())
}

fn wait(s: &Stack) -> Result<Wait, Raise> {
    let process = this(s)?;
    if process.told.get() {
        return refuse(s, "exited");
    }
    if process.busy(WAIT).get() {
        return refuse(s, "pipe busy waiting");
    }
    let busy = Busy::new(process, WAIT);
    Ok(Wait::Park(Op::future(async move {
        let process = &busy.process;
        match timeout(process.wait_limit.get(), poll_fn(|cx| process.poll_end(cx))).await {
            Err(_) => failed("timeout"),
            Ok(Err(e)) if e.kind() == io::ErrorKind::NotFound => failed("exited"),
            Ok(Err(e)) => failed(words(&e)),
            Ok(Ok(status)) => {
                process.told.set(true);
                let (reason, number) = match status.code() {
                    Some(code) => ("exit", code),
                    None => ("signal", status.signal().unwrap_or_default()),
                };
                smallvec![Value::Bool(status.success()), Value::text(reason), Value::Number(number.into())]
            }
        }
    })))
}

fn kill(s: &Stack) -> Answer {
    let process = this(s)?;
    let signal = match s.kind(2) {
        mlua::ffi::LUA_TNUMBER => s.arg_number(2)?,
        _ => return Err(format!("bad signal arg: number expected, got {}", s.kind_name(2)).into()),
    };
    if process.is_over() {
        return s.fail("exited");
    }
    if !(0.0..=64.0).contains(&signal) {
        return s.fail("invalid signal");
    }
    // SAFETY: plain numbers go in; the process is not reaped, so its number is not free.
    if unsafe { libc::kill(process.pid, signal as c_int) } == 0 {
        return Ok(s.push_bool(true));
    }
    let e = io::Error::last_os_error();
    match e.raw_os_error() {
        Some(libc::EINVAL) => s.fail("invalid signal"),
        Some(libc::ESRCH) => s.fail("exited"),
        _ => s.fail(words(&e)),
    }
}

fn shutdown(s: &Stack) -> Answer {
    let process = this(s)?;
    let direction = match s.kind(2) {
        mlua::ffi::LUA_TSTRING => s.arg_str(2)?.into_owned(),
        _ => return Err(format!("bad shutdown arg: string expected, got {}", s.kind_name(2)).into()),
    };
    let known = ["stdin", "stdout", "stderr"].iter().position(|known| *known == direction);
    let Some(which) = known else { return Err(format!("bad shutdown arg: {direction}").into()) };
    if which == 2 && process.merged {
        return s.fail("merged to stdout");
    }
    if process.is_over() {
        return s.fail("closed");
    }
    match which {
        0 => process.stdin.close(),
        _ => process.outputs[which - 1].close(),
    }
    Ok(s.push_bool(true))
}

fn write(s: &Stack) -> Result<Wait, Raise> {
    let process = this(s)?;
    let mut data = Vec::new();
    socket::gather(s, 2, &mut data)?;
    if process.stdin.busy.get() {
        return refuse(s, "pipe busy writing");
    }
    if !process.stdin.is_open() || process.is_over() {
        return refuse(s, "closed");
    }
    let busy = Busy::new(process, STDIN);
    Ok(Wait::Park(Op::future(async move {
        let stdin = &busy.process.stdin;
        let mut rest = &data[..];
        let limit = stdin.limit.get();
        while !rest.is_empty() {
            let write = poll_fn(|cx| stdin.poll(cx, |io, cx| Pin::new(io).poll_write(cx, rest)));
            match timeout(limit, write).await {
                Err(_) => return failed("timeout"),
                Ok(None) => return failed(stdin.why_closed()),
                Ok(Some(Ok(n @ 1..))) => rest = &rest[n..],
                Ok(Some(e)) => {
                    stdin.io.take();
                    return match e {
                        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => failed(words(&e)),
                        _ => failed("closed"),
                    };
                }
            }
        }
        smallvec![Value::Number(data.len() as f64)]
    })))
}

/// What a read waits to see.
enum Want {
    All,
    /// Without its end; the number says how far there is none.
    Line(usize),
    Bytes(usize),
    Any(usize),
}

impl Want {
    /// Takes what is wanted, if it is there.
    fn take(&mut self, buf: &mut BytesMut) -> Option<Vec<u8>> {
        match self {
            Want::Line(seen) => match memchr::memchr(b'\n', &buf[*seen..]) {
                Some(at) => {
                    let line = buf.split_to(*seen + at + 1);
                    let line = &line[..line.len() - 1];
                    Some(line.strip_suffix(b"\r").unwrap_or(line).to_vec())
                }
                None => {
                    *seen = buf.len();
                    None
                }
            },
            Want::Bytes(n) if buf.len() >= *n => Some(buf.split_to(*n).to_vec()),
            Want::Any(max) if !buf.is_empty() => Some(buf.split_to((*max).min(buf.len())).to_vec()),
            _ => None,
        }
    }
}

fn read(s: &Stack) -> Result<Wait, Raise> {
    let process = this(s)?;
    let which = if s.arg_number(2)? == 2.0 { 1 } else { 0 };
    let number = |name: &str, least: f64| {
        match s.kind(4) {
            mlua::ffi::LUA_TNUMBER => s.number(4).filter(|n| *n >= least).map(|n| n as usize),
            _ => None,
        }
        .ok_or_else(|| Raise::from(format!("bad {name} arg: number expected, got {}", s.kind_name(4))))
    };
    let mut want = match s.arg_bytes(3)? {
        b"line" => Want::Line(0),
        b"bytes" => Want::Bytes(number("len", 0.0)?),
        b"any" => Want::Any(number("max", 1.0)?),
        _ => Want::All,
    };
    if which == 1 && process.merged {
        return refuse(s, "merged to stdout");
    }
    let end = &process.outputs[which];
    if end.busy.get() {
        return refuse(s, "pipe busy reading");
    }
    if matches!(want, Want::Bytes(n) if n > MAX_READ) {
        return refuse(s, "too much data");
    }
    if let Some(data) = want.take(&mut process.read[which].borrow_mut()) {
        return Ok(Wait::Ready(s.push_bytes(data)));
    }
    if !end.is_open() {
        return refuse(s, "closed");
    }
    let busy = Busy::new(process.clone(), which);
    Ok(Wait::Park(Op::future(read_more(busy, which, want))))
}

async fn read_more(busy: Busy, which: usize, mut want: Want) -> Values {
    let process = &busy.process;
    let (end, read) = (&process.outputs[which], &process.read[which]);
    let limit = end.limit.get();
    loop {
        let filled = timeout(limit, poll_fn(|cx| poll_fill(process, which, cx))).await;
        let mut buf = read.borrow_mut();
        let (text, ended) = match filled {
            Err(_) => ("timeout".to_owned(), false),
            Ok(None) => {
                buf.clear();
                return failed(end.why_closed());
            }
            Ok(Some(Ok(0))) if matches!(want, Want::All) => {
                end.io.take();
                return smallvec![Value::Bytes(buf.split().to_vec())];
            }
            Ok(Some(Ok(0))) => ("closed".to_owned(), true),
            Ok(Some(Ok(_))) => match want.take(&mut buf) {
                Some(data) => return smallvec![Value::Bytes(data)],
                None if buf.len() <= MAX_READ => continue,
                None => {
                    buf.clear();
                    ("too much data".to_owned(), true)
                }
            },
            Ok(Some(Err(e))) => (words(&e), true),
        };
        if ended {
            end.io.take();
        }
        let mut values = failed(text);
        if !matches!(want, Want::Any(_)) {
            values.push(Value::Bytes(buf.split().to_vec()));
        }
        return values;
    }
}

/// Reads once into the buffer; 0 is the end.
fn poll_fill(process: &Process, which: usize, cx: &mut Context<'_>) -> Poll<Option<io::Result<usize>>> {
    let mut buf = process.read[which].borrow_mut();
    buf.reserve(process.buffer);
    let len = buf.len();
    process.outputs[which].poll(cx, |io, cx| {
        let spare = buf.spare_capacity_mut();
        let room = spare.len().min(process.buffer);
        let mut room = ReadBuf::uninit(&mut spare[..room]);
        ready!(Pin::new(io).poll_read(cx, &mut room))?;
        let n = room.filled().len();
        // SAFETY: the first `n` bytes of the spare capacity were just filled.
        unsafe { buf.set_len(len + n) };
        Poll::Ready(Ok(n))
    })
}

#[cfg(test)]
mod tests {
    use super::{
        super::tests::{on_a_worker, run, vm},
        *,
    };

    #[test]
    fn processes_past_the_bound_are_refused_until_one_goes() {
        let mut places: Vec<_> = std::iter::from_fn(Place::take).collect();
        assert_eq!(places.len(), MAX_PROCESSES);
        let spawn = "local p, err = require('ngx.pipe').spawn('exit') return tostring(err)";
        assert_eq!(on_a_worker(async { run(&vm(), spawn).await }), "too many processes");
        places.pop();
        assert_eq!(on_a_worker(async { run(&vm(), spawn).await }), "nil");
        drop(places);
        assert_eq!(PROCESSES.load(Ordering::Relaxed), 0, "the request is over, and its process with it");
    }
}
