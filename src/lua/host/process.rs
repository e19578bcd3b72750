//! Commands and signals: `resty.shell` and `resty.signal`. A command runs beside the worker, which goes on serving.

use std::{process::Stdio, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    process::Command,
};

use super::{Answer, lfs::words};
use crate::{
    error::Result,
    lua::{
        Op, Value, Wait,
        api::{Api, Phases, Raise, Stack},
        sched::{Values, failed},
    },
};

/// What a command may write to each of its two outputs when its caller sets no bound.
const MAX_OUTPUT: f64 = 128.0 * 1024.0;
/// How long a command may run when its caller sets no time, in milliseconds.
const TIMEOUT_MS: f64 = 10_000.0;
/// Arguments of one command.
const MAX_ARGUMENTS: usize = 1024;

pub fn register(api: &mut Api) -> Result<()> {
    let any = Phases::ANY;
    api.wait(
        "native.process.run",
        any,
        "run(text for sh or list of arguments, stdin?, timeout_ms?, max_bytes?) -> ok, stdout, stderr, reason, status",
        run,
    )?;
    api.func("native.process.kill", any, "kill(pid, signal number) -> true | nil, err", kill)?;
    api.func("native.process.signum", any, "signum(name) -> number | nil: INT, TERM and so on", signum)
}

fn run(s: &Stack) -> std::result::Result<Wait, Raise> {
    let mut command = command(s)?;
    let stdin = s.opt_bytes(2)?.unwrap_or_default().to_vec();
    let timeout_ms = s.opt_number(3)?.filter(|ms| *ms > 0.0).unwrap_or(TIMEOUT_MS).min(1e9);
    let max = s.opt_number(4)?.filter(|max| *max > 0.0).unwrap_or(MAX_OUTPUT).min(1e9) as u64;
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // A group of its own, so that what it started ends with it.
    command.process_group(0).kill_on_drop(true);
    Ok(Wait::Park(Op::future(watch(command, stdin, Duration::from_secs_f64(timeout_ms / 1e3), max))))
}

fn command(s: &Stack) -> std::result::Result<Command, Raise> {
    use std::{ffi::OsStr, os::unix::ffi::OsStrExt};
    if !s.is_table(1) {
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(OsStr::from_bytes(s.arg_bytes(1)?));
        return Ok(command);
    }
    let mut arguments = Vec::new();
    for n in 1..=s.len(1).min(MAX_ARGUMENTS) {
        s.get_index(1, n);
        let argument = s.bytes(-1).map(<[u8]>::to_vec);
        s.pop(1);
        arguments.push(argument.ok_or("bad argument #1 to 'run' (list of strings expected)")?);
    }
    let mut arguments = arguments.iter().map(|a| OsStr::from_bytes(a));
    let mut command = Command::new(arguments.next().ok_or("bad argument #1 to 'run' (empty list)")?);
    command.args(arguments);
    Ok(command)
}

/// Ends the command's whole group when it goes: the time is over, or nobody waits any more. 0 once the command has ended.
struct Group(i32);

impl Drop for Group {
    fn drop(&mut self) {
        if self.0 > 0 {
            // SAFETY: plain numbers go in; the group is the command's, which has not been waited for, so its number is not free.
            unsafe { libc::kill(-self.0, libc::SIGKILL) };
        }
    }
}

async fn watch(mut command: Command, stdin: Vec<u8>, timeout: Duration, max: u64) -> Values {
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(e) => return failed_with(words(&e)),
    };
    let mut group = Group(child.id().map_or(0, |pid| pid as i32));
    let (input, out, err) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let work = async {
        let feed = async {
            if let Some(mut input) = input {
                // A command need not read what it is given.
                input.write_all(&stdin).await.unwrap_or_default();
            }
        };
        let (_, whole_out, whole_err) = tokio::join!(feed, read(out, &mut stdout, max), read(err, &mut stderr, max));
        match whole_out && whole_err {
            true => child.wait().await.map(Some),
            false => Ok(None),
        }
    };
    let (ok, reason, status) = match tokio::time::timeout(timeout, work).await {
        Err(_) => (false, "timeout".to_owned(), Value::Nil),
        Ok(Err(e)) => (false, words(&e), Value::Nil),
        Ok(Ok(None)) => (false, "too much data".to_owned(), Value::Nil),
        Ok(Ok(Some(status))) => {
            group.0 = 0;
            use std::os::unix::process::ExitStatusExt;
            match status.code() {
                Some(code) => (code == 0, "exit".to_owned(), Value::Number(code.into())),
                None => (false, "signal".to_owned(), Value::Number(status.signal().unwrap_or_default().into())),
            }
        }
    };
    let ok = if ok { Value::Bool(true) } else { Value::Nil };
    smallvec::smallvec![ok, Value::Bytes(stdout), Value::Bytes(stderr), Value::text(reason), status]
}

fn failed_with(reason: String) -> Values {
    let mut values = failed("");
    values.extend([Value::text(""), Value::text(reason)]);
    values
}

/// Reads to the end; whether the bound was enough.
async fn read(from: Option<impl AsyncRead + Unpin>, into: &mut Vec<u8>, max: u64) -> bool {
    let Some(from) = from else { return true };
    let done = from.take(max + 1).read_to_end(into).await;
    let whole = done.is_ok() && into.len() as u64 <= max;
    into.truncate(max as usize);
    whole
}

fn kill(s: &Stack) -> Answer {
    let (pid, signal) = (s.arg_number(1)?, s.arg_number(2)?);
    // 0 and less are groups, which nobody means here.
    if !(1.0..=f64::from(i32::MAX)).contains(&pid) || !(0.0..=64.0).contains(&signal) {
        return s.fail("invalid argument");
    }
    // SAFETY: plain numbers go in and out.
    match unsafe { libc::kill(pid as i32, signal as i32) } {
        0 => Ok(s.push_bool(true)),
        _ => s.fail(words(&std::io::Error::last_os_error())),
    }
}

fn signum(s: &Stack) -> Answer {
    let name = s.arg_bytes(1)?;
    let known: [(&[u8], i32); 31] = [
        (b"NONE", 0),
        (b"HUP", libc::SIGHUP),
        (b"INT", libc::SIGINT),
        (b"QUIT", libc::SIGQUIT),
        (b"ILL", libc::SIGILL),
        (b"TRAP", libc::SIGTRAP),
        (b"ABRT", libc::SIGABRT),
        (b"BUS", libc::SIGBUS),
        (b"FPE", libc::SIGFPE),
        (b"KILL", libc::SIGKILL),
        (b"USR1", libc::SIGUSR1),
        (b"SEGV", libc::SIGSEGV),
        (b"USR2", libc::SIGUSR2),
        (b"PIPE", libc::SIGPIPE),
        (b"ALRM", libc::SIGALRM),
        (b"TERM", libc::SIGTERM),
        (b"CHLD", libc::SIGCHLD),
        (b"CONT", libc::SIGCONT),
        (b"STOP", libc::SIGSTOP),
        (b"TSTP", libc::SIGTSTP),
        (b"TTIN", libc::SIGTTIN),
        (b"TTOU", libc::SIGTTOU),
        (b"URG", libc::SIGURG),
        (b"XCPU", libc::SIGXCPU),
        (b"XFSZ", libc::SIGXFSZ),
        (b"VTALRM", libc::SIGVTALRM),
        (b"PROF", libc::SIGPROF),
        (b"WINCH", libc::SIGWINCH),
        (b"IO", libc::SIGIO),
        (b"SYS", libc::SIGSYS),
        (b"POLL", libc::SIGIO),
    ];
    let found = known.iter().find(|(known, _)| *known == name);
    Ok(found.map_or_else(|| s.push_nil(), |(_, number)| s.push_number((*number).into())))
}
