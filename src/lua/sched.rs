//! Drives coroutines: resumes them, waits for what they wait for, ends them.
//!
//! A phase call runs in a recycled coroutine. A host function that must wait hands the driver an operation and
//! yields; user coroutines pass such a yield outwards (boot.lua), so that it reaches the driver from any depth. Light
//! threads (`ngx.thread.spawn`) run in the same call; the call ends when all of them have. `ngx.exit` ends it at once.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    ffi::{c_char, c_int, c_void},
    future::Future,
    pin::Pin,
    ptr,
    rc::Rc,
    task::{Context, Poll, ready},
    time::Duration,
};

use mlua::ffi;
use smallvec::SmallVec;

use super::{
    api::{Api, Phases, Raise, Stack, Wait},
    fast, limits,
    vm::{self, Vm},
};
use crate::{
    error::Result,
    exchange::{
        Connection, Exchange, Phase,
        host::{Sending, Subrequest},
    },
    observe::log::{self, Level},
};

/// What an operation gives back to the coroutine: the results of the function that waited.
pub type Values = SmallVec<[Value; 3]>;

/// One result.
pub enum Value {
    Nil,
    Bool(bool),
    Number(f64),
    Bytes(Vec<u8>),
    /// Whatever else; pushes exactly one value.
    Push(Box<dyn FnOnce(&Stack)>),
    /// The first of them: the call ends, as by `ngx.exit` with this number.
    Exit(i64),
}

impl Value {
    pub fn text(text: impl Into<Vec<u8>>) -> Value {
        Value::Bytes(text.into())
    }

    fn push(self, stack: &Stack) {
        match self {
            Value::Nil | Value::Exit(_) => stack.push_nil(),
            Value::Bool(b) => stack.push_bool(b),
            Value::Number(n) => stack.push_number(n),
            Value::Bytes(b) => stack.push_bytes(b),
            Value::Push(f) => {
                f(stack);
                1
            }
        };
    }
}

/// `nil, text` as results.
pub fn failed(text: impl Into<Vec<u8>>) -> Values {
    smallvec::smallvec![Value::Nil, Value::text(text)]
}

/// Polled with the request that waits.
pub type PollWithExchange = Box<dyn FnMut(&mut Context<'_>, &mut Exchange) -> Poll<Values>>;

/// What a parked coroutine waits for. Whoever makes one bounds its time.
pub enum Op {
    /// Needs nothing of the request.
    Future(Pin<Box<dyn Future<Output = Values>>>),
    /// Is polled with the request (its body, its client).
    Exchange(PollWithExchange),
    /// Asks whoever serves the request. Nothing else of the call runs meanwhile.
    Ask(Ask),
    /// `ngx.exit` and its like: the coroutine is not resumed, all light threads of the call end. The host function
    /// has put what is to be answered into the exchange; the number is what it was called with.
    Exit(i64),
    /// A coroutine of the top level yields: others run, then it goes on.
    Yield,
    /// `ngx.thread.spawn`: the new coroutine, function and arguments on its stack, kept by a registry reference.
    Spawn(NewThread),
    /// `ngx.thread.wait`: the first of these that ends.
    Join(SmallVec<[*mut ffi::lua_State; 2]>),
    /// `ngx.thread.kill`
    Kill(*mut ffi::lua_State),
}

/// What `Exchange::lua.host` is asked for.
pub enum Ask {
    Send(Sending),
    Subrequests(Vec<Subrequest>),
}

/// Sends what was printed; the results of the function that asked for it.
async fn send(x: &mut Exchange, what: Sending) -> Values {
    let Some(host) = x.lua.host.clone() else { return failed("nobody serves the request") };
    let phase = x.phase;
    let sent = host.send(x, what).await;
    x.phase = phase;
    match sent {
        Ok(()) => smallvec::smallvec![Value::Number(1.0)],
        Err(e) => {
            tracing::debug!("the response was not sent: {e}");
            failed("nginx output filter error")
        }
    }
}

/// Starts subrequests: they run while the coroutine waits, and others of the call with them.
fn subrequests(x: &mut Exchange, list: Vec<Subrequest>) -> Op {
    let Some(host) = x.lua.host.clone() else {
        return Op::future(std::future::ready(failed("nobody serves the request")));
    };
    let mut running = host.subrequests(x, list);
    let pending = Pending::new(x.lua.subrequests.get_or_insert_default());
    Op::Exchange(Box::new(move |cx, x| {
        let answered = ready!(running.as_mut().poll(cx));
        pending.done();
        if let Some(vars) = answered.vars {
            x.custom_vars = vars;
        }
        if let Some(client) = x.client.as_mut().filter(|_| answered.list.iter().any(|one| one.failed)) {
            client.abort();
        }
        Poll::Ready(answered.list.into_iter().map(super::ngx::location::answer).collect())
    }))
}

/// Counts a call's subrequests as under way until it has their answers, or is dropped.
struct Pending(Cell<Option<Rc<Cell<usize>>>>);

impl Pending {
    fn new(count: &Rc<Cell<usize>>) -> Self {
        count.set(count.get() + 1);
        Pending(Cell::new(Some(count.clone())))
    }

    fn done(&self) {
        if let Some(count) = self.0.take() {
            count.set(count.get() - 1);
        }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.done();
    }
}

/// A coroutine that has not run yet.
pub struct NewThread {
    vm: Rc<Vm>,
    co: Option<Coroutine>,
    args: c_int,
}

impl NewThread {
    /// Takes the function at index 1 and the arguments above it off `s`.
    pub(super) fn new(s: &Stack) -> Result<NewThread, Raise> {
        let vm = vm::current().ok_or("no VM runs")?;
        let co = vm.take_coroutine().map_err(|e| e.to_string())?;
        let n = s.top();
        // SAFETY: the values go from a running state to an idle one of the same VM, which has room for them.
        unsafe {
            ffi::lua_checkstack(co.l, n + 1);
            ffi::lua_xmove(s.raw(), co.l, n);
        }
        Ok(NewThread { vm, co: Some(co), args: n - 1 })
    }

    fn take(&mut self) -> Option<Coroutine> {
        self.co.take()
    }
}

impl Drop for NewThread {
    fn drop(&mut self) {
        if let Some(co) = self.co.take() {
            self.vm.forget(co);
        }
    }
}

impl Op {
    pub fn future(f: impl Future<Output = Values> + 'static) -> Op {
        Op::Future(Box::pin(f))
    }
}

thread_local! {
    static PARKED: RefCell<Option<Op>> = const { RefCell::new(None) };
}

static MARKER: u8 = 0;

/// The value that a host's yield carries.
pub(super) fn marker() -> *mut c_void {
    (&raw const MARKER).cast_mut().cast()
}

/// Leaves the operation for the driver, which the coming yield reaches.
pub(super) fn park(op: Op) {
    PARKED.with_borrow_mut(|p| *p = Some(op));
}

pub fn register(api: &mut Api) -> Result<()> {
    let anywhere = Phases::ANY;
    api.wait("ngx.sleep", anywhere, "sleeps for so many seconds", sleep)?;
    api.wait("ngx.thread.spawn", anywhere, "starts a light thread", |s| {
        s.arg_function(1)?;
        Ok(Wait::Park(Op::Spawn(NewThread::new(s)?)))
    })?;
    api.wait("ngx.thread.wait", anywhere, "waits for the first of these light threads to end", |s| {
        if s.top() == 0 {
            return Err("at least one coroutine should be specified".into());
        }
        let of = (1..=s.top()).map(|i| thread_argument(s, i)).collect::<Result<_, _>>()?;
        Ok(Wait::Park(Op::Join(of)))
    })?;
    let doc = "state(coroutine): of a light thread 1 while it lives, 2 until somebody waits for it; else 0";
    api.func("native.thread.state", anywhere, doc, |s| {
        let l = thread_argument(s, 1)?;
        let ended = vm::current().and_then(|vm| vm.light.borrow().get(&(l as usize)).copied());
        Ok(s.push_number(ended.map_or(0.0, |ended| if ended { 2.0 } else { 1.0 })))
    })?;
    api.wait("ngx.thread.kill", anywhere, "ends a light thread", |s| Ok(Wait::Park(Op::Kill(thread_argument(s, 1)?))))
}

fn thread_argument(s: &Stack, i: c_int) -> Result<*mut ffi::lua_State, Raise> {
    // SAFETY: any index is acceptable.
    let l = unsafe { ffi::lua_tothread(s.raw(), i) };
    if l.is_null() { Err(s.argument_error(i, "lua thread expected")) } else { Ok(l) }
}

/// An exchange without a client, for what runs outside of requests.
pub fn background(vm: &Vm) -> Exchange {
    let nowhere = std::net::SocketAddr::from(([0, 0, 0, 0], 0));
    let conn = Connection::new(0, nowhere, nowhere);
    let mut x = Exchange::new(Rc::new(conn), vm.snapshot());
    x.begin();
    x.phase = Phase::Timer;
    x.lua.slot = Some(vm.take_slot());
    x
}

/// Gives back what `background` took.
pub fn end_background(vm: &Rc<Vm>, x: &mut Exchange) {
    if let Some(slot) = x.lua.slot.take() {
        vm.clear_slot(slot);
    }
}

/// The longest that one `ngx.sleep` takes: a year, so that no sum of instants overflows.
const MAX_SLEEP_SECS: f64 = 365.0 * 86_400.0;

fn sleep(s: &Stack) -> Result<Wait, Raise> {
    let secs = s.arg_number(1)?;
    if secs < 0.0 {
        return Err(s.argument_error(1, &format!("invalid sleep duration \"{secs}\"")));
    }
    let time = seconds(secs);
    if let Some(x) = fast::exchange().filter(|_| log::enabled(Level::Debug)) {
        x.log(Level::Debug, format!("lua ready to sleep for {} ms", time.as_millis()).as_bytes());
    }
    Ok(Wait::Park(Op::future(async move {
        tokio::time::sleep(time).await;
        if let Some(x) = fast::exchange().filter(|_| log::enabled(Level::Debug)) {
            let text = String::from_utf8_lossy;
            let uri = format!("{}?{}", text(&x.request.path), text(&x.request.args));
            x.log(Level::Debug, format!("lua sleep timer expired: \"{uri}\"").as_bytes());
        }
        Values::new()
    })))
}

/// A script's seconds as a time within bounds.
pub(super) fn seconds(secs: f64) -> Duration {
    if secs > 0.0 { Duration::from_secs_f64(secs.min(MAX_SLEEP_SECS)) } else { Duration::ZERO }
}

/// How a call ended.
#[derive(Debug)]
pub enum Outcome<T> {
    /// The entry function returned.
    Done(T),
    /// `ngx.exit` with this number.
    Exit(i64),
    /// A Lua error: message and traceback.
    Failed(String),
}

/// A coroutine of the VM and the registry reference that keeps it.
pub(super) struct Coroutine {
    pub l: *mut ffi::lua_State,
    pub anchor: c_int,
}

/// What one resume came to.
enum Step {
    /// Results are on the coroutine's stack.
    Finished,
    Parked(Op),
    /// The error value is on top of the coroutine's stack.
    Failed,
}

/// Calls a function in a coroutine of `vm` and waits for whatever it waits for. `push` puts the function and its
/// arguments on the stack and says how many arguments; `read` takes the results.
///
/// Dropping the future ends the coroutine and its light threads.
pub async fn call<T>(
    vm: &Rc<Vm>,
    x: &mut Exchange,
    push: impl FnOnce(&Stack) -> c_int,
    read: impl FnOnce(&Stack) -> T,
) -> Outcome<T> {
    let co = match vm.take_coroutine() {
        Ok(co) => co,
        Err(e) => return Outcome::Failed(e.to_string()),
    };
    // SAFETY: the coroutine is anchored until it is given back or dropped.
    let stack = unsafe { Stack::new(co.l) };
    let args = push(&stack);
    match step(vm, co.l, x, args) {
        Step::Finished => {
            let result = read(&stack);
            vm.give_back(co);
            Outcome::Done(result)
        }
        Step::Failed => {
            let text = error_text(vm, co.l);
            vm.forget(co);
            Outcome::Failed(text)
        }
        Step::Parked(op) => {
            let mut threads = Threads::new(vm.clone(), co);
            let end = match threads.apply(0, op, x) {
                Some(exit) => Outcome::Exit(exit),
                None => threads.run(x).await,
            };
            match end {
                Outcome::Done(()) => Outcome::Done(threads.results(read)),
                Outcome::Exit(n) => Outcome::Exit(n),
                Outcome::Failed(text) => Outcome::Failed(text),
            }
        }
    }
}

/// Resumes once, with the request in reach and the watchdog on.
fn step(vm: &Rc<Vm>, l: *mut ffi::lua_State, x: &mut Exchange, args: c_int) -> Step {
    let rc = match x.lua.function.clone() {
        None => resume(vm, l, x, args, vm.limits()),
        Some(call) => {
            let held = limits::memory_kb(vm);
            let rc = limits::within_call(vm, &call, held, |own| resume(vm, l, x, args, own));
            limits::charge(vm, &call, held);
            rc
        }
    };
    let parked = PARKED.with_borrow_mut(Option::take);
    if fast::take_panic() {
        // SAFETY: one string on a stack that nobody runs.
        unsafe { Stack::new(l).push_bytes("a host function panicked") };
        return Step::Failed;
    }
    match rc {
        ffi::LUA_OK => Step::Finished,
        ffi::LUA_YIELD => {
            // SAFETY: the yielded values are of no use once the marker was recognized; resume wants its arguments only.
            let ours = unsafe {
                let ours = ffi::lua_tolightuserdata(l, 1) == marker();
                ffi::lua_settop(l, 0);
                ours
            };
            match parked {
                Some(op) if ours => Step::Parked(op),
                _ => Step::Parked(Op::Yield),
            }
        }
        _ => Step::Failed,
    }
}

#[inline]
fn resume(vm: &Vm, l: *mut ffi::lua_State, x: &mut Exchange, args: c_int, limits: limits::Limits) -> c_int {
    vm.entered(|| {
        fast::enter(x, || {
            // SAFETY: `l` is a coroutine of this VM with a function (or a pending yield) and `args` arguments.
            limits::bounded(vm.main(), limits, || unsafe { ffi::lua_resume_(l, args) })
        })
    })
}

/// The error value on top of a failed coroutine, with the traceback of that coroutine.
fn error_text(vm: &Rc<Vm>, l: *mut ffi::lua_State) -> String {
    let message = value_text(vm, l);
    let main = vm.main();
    // SAFETY: both states are live; the traceback is one string on `main`, popped again.
    unsafe {
        luaL_traceback(main, l, ptr::null(), 0);
        let stack = Stack::new(main);
        let trace = String::from_utf8_lossy(stack.bytes(-1).unwrap_or_default()).into_owned();
        stack.pop(1);
        if trace.lines().count() > 1 { format!("{message}\n{trace}") } else { message }
    }
}

/// The value on top of `l` as `tostring` gives it.
fn value_text(vm: &Rc<Vm>, l: *mut ffi::lua_State) -> String {
    // SAFETY: the value is moved to the main state and read there; tostring may call a metamethod, hence mlua's pcall.
    unsafe {
        let stack = Stack::new(l);
        if let Some(text) = stack.bytes(-1) {
            return String::from_utf8_lossy(text).into_owned();
        }
        if stack.is_nil(-1) {
            return "unknown reason".into();
        }
        let kind = stack.kind_name(-1);
        let value: mlua::Result<mlua::Value> = vm.lua.exec_raw((), |main| {
            ffi::lua_pushvalue(l, -1);
            ffi::lua_xmove(l, main, 1);
        });
        // The metamethod is the script's: it may not end either.
        let text = value.and_then(|v| vm.entered(|| limits::bounded(vm.main(), vm.limits(), || v.to_string())));
        text.unwrap_or_else(|_| format!("(error object is a {kind} value)"))
    }
}

unsafe extern "C-unwind" {
    /// LuaJIT's own; mlua's is a replacement for Lua 5.1.
    fn luaL_traceback(l: *mut ffi::lua_State, of: *mut ffi::lua_State, message: *const c_char, level: c_int);
}

/// The parent of threads whose own has ended.
const NOBODY: usize = usize::MAX;

/// What nginx logs for a client that did not wait.
const CLIENT_CLOSED: i64 = 499;

/// Resumes of a call's coroutines, none of which had to wait, before other requests of the worker get their turn: the time
/// limit counts each resume by itself.
const MAX_TURNS: usize = 128;

/// Light threads that one call may have at once: a bound for a loop that spawns.
const MAX_THREADS: usize = 1024;

/// The coroutines of a call that had to wait: the entry (index 0) and its light threads.
struct Threads {
    vm: Rc<Vm>,
    list: SmallVec<[Thread; 1]>,
    ready: VecDeque<usize>,
    /// Resumes since the call last let others run.
    turns: usize,
    /// The entry function has returned.
    entry_done: bool,
    /// What ended the call before its time.
    ended: Option<Outcome<()>>,
    /// Who waits for what was printed to be sent. Nothing else of the call runs meanwhile.
    sending: Option<(usize, Sending)>,
    /// Ends the call when its client goes away (`lua_check_client_abort`).
    watches_client: bool,
}

struct Thread {
    /// `None` once it is over and its results are taken.
    co: Option<Coroutine>,
    state: State,
    parent: usize,
}

enum State {
    /// To be resumed with so many arguments, which are on its stack.
    Ready(c_int),
    Waiting(Op),
    /// Until all of it is sent: see `Threads::sending`.
    Sending,
    Joining(SmallVec<[*mut ffi::lua_State; 2]>),
    /// Ended and not waited for yet: whether well, and how many values are on its stack.
    Zombie(bool, c_int),
    Over,
}

impl Threads {
    fn new(vm: Rc<Vm>, entry: Coroutine) -> Threads {
        let mut list = SmallVec::new();
        list.push(Thread { co: Some(entry), state: State::Ready(0), parent: 0 });
        Threads {
            vm,
            list,
            ready: VecDeque::new(),
            turns: 0,
            entry_done: false,
            ended: None,
            sending: None,
            watches_client: false,
        }
    }

    async fn run(&mut self, x: &mut Exchange) -> Outcome<()> {
        self.watches_client = x.location.as_ref().is_some_and(|l| l.directives.lua_check_client_abort);
        loop {
            if let Some((i, what)) = self.sending.take() {
                let values = send(x, what).await;
                self.wake(i, values);
                // It has not waited, for what scripts can tell: it goes on before the others.
                if let Some(last) = self.ready.pop_back() {
                    self.ready.push_front(last);
                }
            }
            if let Some(end) = std::future::poll_fn(|cx| self.poll(cx, x)).await {
                return end;
            }
        }
    }

    /// `None`: a coroutine asks for what needs the whole request.
    fn poll(&mut self, cx: &mut Context<'_>, x: &mut Exchange) -> Poll<Option<Outcome<()>>> {
        loop {
            if let Some(end) = self.ended.take() {
                return Poll::Ready(Some(end));
            }
            while let Some(i) = self.ready.pop_front() {
                if self.turns >= MAX_TURNS {
                    self.ready.push_front(i);
                    self.turns = 0;
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                self.turns += 1;
                self.resume(i, x);
                if let Some(end) = self.ended.take() {
                    return Poll::Ready(Some(end));
                }
                if self.sending.is_some() {
                    return Poll::Ready(None);
                }
            }
            if self.sending.is_some() {
                return Poll::Ready(None);
            }
            if self.entry_done && !self.list.iter().skip(1).any(Thread::is_alive) {
                return Poll::Ready(Some(Outcome::Done(())));
            }
            if self.poll_waits(cx, x) {
                continue;
            }
            if !self.poll_client(cx, x) {
                self.turns = 0;
                return Poll::Pending;
            }
        }
    }

    /// Looks whether the client went away: then the request's `ngx.on_abort` runs, or the call ends. Says whether it did.
    fn poll_client(&mut self, cx: &mut Context<'_>, x: &mut Exchange) -> bool {
        let gone = self.watches_client && x.client.as_mut().is_some_and(|client| client.poll_gone(cx).is_ready());
        if !gone {
            return false;
        }
        self.watches_client = false;
        x.log(Level::Info, b"client prematurely closed connection");
        match x.lua.on_abort.take() {
            Some(callback) => self.start(&*callback),
            None => self.ended = Some(Outcome::Exit(CLIENT_CLOSED)),
        }
        true
    }

    /// Runs a kept function as a light thread of the entry.
    fn start(&mut self, function: &dyn std::any::Any) {
        let Some(kept) = function.downcast_ref::<super::ngx::location::Kept>() else { return };
        let Ok(co) = self.vm.take_coroutine() else { return };
        // SAFETY: a fresh coroutine of this VM; one value is pushed on its stack.
        let stack = unsafe { Stack::new(co.l) };
        kept.push(&stack);
        self.list.push(Thread { co: Some(co), state: State::Over, parent: 0 });
        self.set_ready(self.list.len() - 1, 0);
    }

    /// Polls what the coroutines wait for; says whether one can go on.
    fn poll_waits(&mut self, cx: &mut Context<'_>, x: &mut Exchange) -> bool {
        for i in 0..self.list.len() {
            let State::Waiting(op) = &mut self.list[i].state else { continue };
            let done = match op {
                // What reads the request's body finds it by the request that runs.
                Op::Future(f) => fast::enter(x, || f.as_mut().poll(cx)),
                Op::Exchange(f) => f(cx, x),
                // The others never become a state.
                _ => Poll::Ready(Values::new()),
            };
            match done {
                Poll::Ready(values) => match values.first() {
                    Some(Value::Exit(code)) => {
                        self.ended = Some(Outcome::Exit(*code));
                        return true;
                    }
                    _ => self.wake(i, values),
                },
                Poll::Pending => {}
            }
        }
        !self.ready.is_empty()
    }

    /// Puts a wait's results on the coroutine's stack and marks it ready.
    fn wake(&mut self, i: usize, values: Values) {
        let Some(stack) = self.stack(i) else { return };
        let n = values.len();
        if stack.reserve(n + 1).is_ok() {
            values.into_iter().for_each(|v| v.push(&stack));
        }
        self.set_ready(i, n as c_int);
    }

    fn set_ready(&mut self, i: usize, args: c_int) {
        self.list[i].state = State::Ready(args);
        self.ready.push_back(i);
    }

    fn stack(&self, i: usize) -> Option<Stack> {
        // SAFETY: a thread's coroutine is anchored as long as it is in the list.
        self.list[i].co.as_ref().map(|co| unsafe { Stack::new(co.l) })
    }

    fn resume(&mut self, i: usize, x: &mut Exchange) {
        let State::Ready(args) = self.list[i].state else { return };
        let Some(l) = self.list[i].co.as_ref().map(|co| co.l) else { return };
        match step(&self.vm, l, x, args) {
            Step::Parked(op) => {
                if let Some(exit) = self.apply(i, op, x) {
                    self.ended = Some(Outcome::Exit(exit));
                }
            }
            Step::Finished if i == 0 => {
                self.entry_done = true;
                self.list[0].state = State::Over;
            }
            Step::Failed if i == 0 => self.ended = Some(Outcome::Failed(error_text(&self.vm, l))),
            Step::Finished => {
                // SAFETY: the coroutine has ended: its stack holds its results.
                let n = unsafe { ffi::lua_gettop(l) };
                self.finish(i, true, n);
            }
            Step::Failed => {
                let text = error_text(&self.vm, l);
                let short = value_text(&self.vm, l);
                super::log_error(x, &format!("lua user thread aborted: runtime error: {text}"));
                // SAFETY: one value on the stack of a dead coroutine.
                unsafe {
                    ffi::lua_settop(l, 0);
                    Stack::new(l).push_bytes(short);
                }
                self.finish(i, false, 1);
            }
        }
    }

    /// Does what a coroutine has yielded for. `Some`: the call ends with that `ngx.exit`.
    fn apply(&mut self, i: usize, op: Op, x: &mut Exchange) -> Option<i64> {
        match op {
            Op::Exit(n) => return Some(n),
            Op::Yield => self.set_ready(i, 0),
            Op::Spawn(new) => self.spawn(i, new),
            Op::Join(of) => self.join(i, of),
            Op::Kill(l) => self.kill(i, l),
            Op::Ask(Ask::Send(what)) => {
                self.list[i].state = State::Sending;
                self.sending = Some((i, what));
            }
            Op::Ask(Ask::Subrequests(list)) => self.list[i].state = State::Waiting(subrequests(x, list)),
            op => self.list[i].state = State::Waiting(op),
        }
        None
    }

    /// The new thread runs first, then its parent goes on with it as the result.
    fn spawn(&mut self, parent: usize, mut new: NewThread) {
        let alive = self.list.iter().filter(|t| t.is_alive()).count();
        if alive > MAX_THREADS {
            return self.wake(parent, failed("too many light threads"));
        }
        let Some(co) = new.take() else { return self.wake(parent, failed("no memory")) };
        let l = co.l;
        let args = new.args;
        self.vm.light.borrow_mut().insert(l as usize, false);
        let at = self.list.iter().skip(1).position(|t| t.co.is_none()).map(|p| p + 1);
        let thread = Thread { co: Some(co), state: State::Over, parent };
        let at = match at {
            Some(at) => {
                self.list[at] = thread;
                at
            }
            None => {
                self.list.push(thread);
                self.list.len() - 1
            }
        };
        if let Some(stack) = self.stack(parent) {
            push_thread(l, &stack);
        }
        self.set_ready(parent, 1);
        // Before whoever waits for a turn.
        self.list[at].state = State::Ready(args);
        self.ready.push_front(at);
    }

    fn join(&mut self, i: usize, of: SmallVec<[*mut ffi::lua_State; 2]>) {
        let mut any_alive = false;
        for l in &of {
            match self.find(*l) {
                // Else two threads could wait for each other for ever.
                Some(t) if t == i || self.list[t].parent != i => {
                    return self.wake(i, failed("only the parent coroutine can wait on the thread"));
                }
                Some(t) if matches!(self.list[t].state, State::Zombie(..)) => {
                    self.list[i].state = State::Joining(SmallVec::new());
                    return self.deliver(t, i);
                }
                Some(t) => any_alive |= self.list[t].is_alive(),
                None => {}
            }
        }
        if any_alive {
            self.list[i].state = State::Joining(of);
        } else {
            self.wake(i, failed("already waited or killed"));
        }
    }

    fn kill(&mut self, i: usize, l: *mut ffi::lua_State) {
        let Some(t) = self.find(l) else { return self.wake(i, failed("already waited or killed")) };
        if self.list[t].parent != i {
            return self.wake(i, failed("killer not parent"));
        }
        if matches!(self.list[t].state, State::Zombie(..)) {
            return self.wake(i, failed("already terminated"));
        }
        self.ready.retain(|r| *r != t);
        self.drop_thread(t);
        self.wake(i, smallvec::smallvec![Value::Number(1.0)]);
    }

    /// A light thread has ended: whoever waits for it goes on.
    fn finish(&mut self, t: usize, ok: bool, n: c_int) {
        let Some(l) = self.list[t].co.as_ref().map(|co| co.l) else { return };
        self.list[t].state = State::Zombie(ok, n);
        self.vm.light.borrow_mut().insert(l as usize, true);
        let waiter = self.list.iter().position(|w| matches!(&w.state, State::Joining(of) if of.contains(&l)));
        if let Some(waiter) = waiter {
            self.deliver(t, waiter);
        }
    }

    /// Moves the ended thread `t`'s results to `to`, which waits.
    fn deliver(&mut self, t: usize, to: usize) {
        let State::Zombie(ok, n) = self.list[t].state else { return };
        let (Some(from), Some(into)) = (self.stack(t), self.stack(to)) else { return };
        let mut args = 1;
        into.push_bool(ok);
        if into.reserve(n as usize + 1).is_ok() {
            // SAFETY: `n` values lie on top of `from`, `into` has room for them; both are of one VM.
            unsafe { ffi::lua_xmove(from.raw(), into.raw(), n) };
            args += n;
        }
        self.drop_thread(t);
        self.set_ready(to, args);
    }

    fn drop_thread(&mut self, t: usize) {
        self.list[t].state = State::Over;
        // Its place may go to another, which is no parent of these.
        self.list.iter_mut().filter(|child| child.parent == t).for_each(|child| child.parent = NOBODY);
        if let Some(co) = self.list[t].co.take() {
            self.vm.light.borrow_mut().remove(&(co.l as usize));
            self.vm.forget(co);
        }
    }

    fn find(&self, l: *mut ffi::lua_State) -> Option<usize> {
        self.list.iter().position(|t| t.co.as_ref().is_some_and(|co| co.l == l))
    }

    /// Reads the entry's results and gives its coroutine back.
    fn results<T>(mut self, read: impl FnOnce(&Stack) -> T) -> T {
        let co = self.list[0].co.take();
        // SAFETY: the entry is anchored until it is given back.
        let stack = unsafe { Stack::new(co.as_ref().map_or(self.vm.main(), |co| co.l)) };
        let result = read(&stack);
        if let Some(co) = co {
            self.vm.give_back(co);
        }
        result
    }
}

impl Thread {
    fn is_alive(&self) -> bool {
        matches!(self.state, State::Ready(_) | State::Waiting(_) | State::Sending | State::Joining(_))
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        for thread in &mut self.list {
            if let Some(co) = thread.co.take() {
                self.vm.light.borrow_mut().remove(&(co.l as usize));
                self.vm.forget(co);
            }
        }
    }
}

/// Pushes the coroutine `l` as a value on `onto`.
fn push_thread(l: *mut ffi::lua_State, onto: &Stack) {
    // SAFETY: both belong to one VM; a coroutine may be moved off its own stack.
    unsafe {
        ffi::lua_pushthread(l);
        ffi::lua_xmove(l, onto.raw(), 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lua::{Vm, VmConfig};

    fn vm() -> Rc<Vm> {
        let config = serde_json::json!({"lua": {"limits": {"cpu_ms": 100}}});
        Vm::new(VmConfig { config: config.into(), ..Default::default() }).expect("a VM")
    }

    /// Runs `source` as a function of a request's phase; the first result as text.
    fn run(source: &str) -> Outcome<String> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("rt");
        tokio::task::LocalSet::new().block_on(&runtime, run_in(&vm(), source))
    }

    async fn run_in(vm: &Rc<Vm>, source: &str) -> Outcome<String> {
        let f: mlua::Function = vm.lua.load(source).set_name("@plugins/t.lua").into_function().expect("compiles");
        let f = vm.keep(f).expect("kept");
        let mut x = background(vm);
        call(
            vm,
            &mut x,
            |s| {
                s.get_index(ffi::LUA_REGISTRYINDEX, f as usize);
                0
            },
            |s| String::from_utf8_lossy(s.bytes(1).unwrap_or(b"nil")).into_owned(),
        )
        .await
    }

    #[track_caller]
    fn gives(source: &str, expected: &str) {
        match run(source) {
            Outcome::Done(text) => assert_eq!(text, expected),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn light_threads_of_a_call_are_bounded() {
        let source = "local n, err = 0, nil
             for i = 1, LIMIT + 10 do
                 local t, e = ngx.thread.spawn(function() ngx.sleep(0.01) end)
                 if t then n = n + 1 else err = e end
             end
             return n .. ' ' .. tostring(err)";
        gives(&source.replace("LIMIT", &MAX_THREADS.to_string()), &format!("{MAX_THREADS} too many light threads"));
    }

    #[test]
    fn timers_that_wait_are_bounded() {
        let config = serde_json::json!({"nginx_config": {"max_pending_timers": 3}});
        let vm = Vm::new(VmConfig { config: config.into(), ..Default::default() }).expect("a VM");
        let source = "local out = {}
             for i = 1, 5 do
                 local ok, err = ngx.timer.at(3600, function() end)
                 out[i] = tostring(ok or err)
             end
             return table.concat(out, ' ') .. ' ' .. ngx.timer.pending_count()";
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("rt");
        let outcome = tokio::task::LocalSet::new().block_on(&runtime, run_in(&vm, source));
        let Outcome::Done(text) = outcome else { panic!("{outcome:?}") };
        assert_eq!(text, "1 1 1 too many pending timers too many pending timers 3");
    }

    #[test]
    fn returns_without_waiting() {
        gives("return 1 + 1", "2");
    }

    #[test]
    fn waits_at_the_top_and_inside_pcall() {
        gives("ngx.sleep(0.001) return select(2, pcall(function() ngx.sleep(0.001) return 'slept' end))", "slept");
    }

    #[test]
    fn a_user_coroutine_passes_host_waits_outwards() {
        gives(
            r#"
            local out = {}
            local co = coroutine.wrap(function(a)
                ngx.sleep(0.001)
                local inner = coroutine.create(function() ngx.sleep(0.001) coroutine.yield("y") return "z" end)
                local _, y = coroutine.resume(inner)
                local b = coroutine.yield(a .. y)
                return b .. select(2, coroutine.resume(inner))
            end)
            return co("a") .. co("b")"#,
            "aybz",
        );
    }

    #[test]
    fn exit_ends_from_any_depth_and_past_pcall() {
        // ngx.exit itself belongs to the request API: any parked Exit does the same.
        let vm = vm();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("rt");
        let mut api = Api::new(&vm.lua).expect("api");
        api.wait("native.exit", Phases::ANY, "", |s| Ok(Wait::Park(Op::Exit(s.arg_int(1)?)))).expect("registered");
        let (native, _) = api.finish().expect("table");
        vm.lua.globals().raw_set("exit", native.get::<mlua::Function>("exit").expect("fn")).expect("set");
        let source = "pcall(function() coroutine.wrap(function() pcall(exit, 403) end)() end) return 'went on'";
        match runtime.block_on(run_in(&vm, source)) {
            Outcome::Exit(403) => {}
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn light_threads_run_and_are_waited_for() {
        gives(
            r#"
            local may_end = false
            local function late(n) while not may_end do ngx.sleep(0.001) end return n end
            local function soon(n) ngx.sleep(0.001) return n, "done" end
            local a, b = ngx.thread.spawn(late, 2), ngx.thread.spawn(soon, 1)
            local ok, n, text = ngx.thread.wait(a, b)
            may_end = true
            local ok2, n2 = ngx.thread.wait(a)
            local ok3, err = ngx.thread.wait(a)
            return tostring(ok) .. n .. text .. n2 .. tostring(ok3) .. err"#,
            "true1done2nilalready waited or killed",
        );
    }

    #[test]
    fn the_call_ends_when_all_light_threads_have() {
        gives(
            r#"
            log = {}
            ngx.thread.spawn(function() ngx.sleep(0.005) log[1] = "late" end)
            local t = ngx.thread.spawn(function() ngx.sleep(50) log[2] = "never" end)
            local killed = ngx.thread.kill(t)
            local again, err = ngx.thread.kill(t)
            return tostring(killed) .. tostring(again) .. err"#,
            "1nilalready waited or killed",
        );
    }

    #[test]
    fn a_failing_light_thread_gives_its_error_to_the_waiter() {
        gives(
            "local ok, err = ngx.thread.wait(ngx.thread.spawn(function() error('boom') end)) return tostring(ok) .. err",
            "falseplugins/t.lua:1: boom",
        );
    }

    #[test]
    fn an_error_carries_file_line_and_traceback() {
        match run("local function f() local a = nil; return a.b end\n\nf() return 1") {
            Outcome::Failed(text) => {
                assert!(text.starts_with("plugins/t.lua:1: attempt to index"), "{text}");
                assert!(text.contains("stack traceback:") && text.contains("plugins/t.lua:3:"), "{text}");
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_error_object_that_is_a_table_is_named() {
        match run("error(setmetatable({}, {__tostring = function() return 'custom' end}))") {
            Outcome::Failed(text) => assert!(text.starts_with("custom"), "{text}"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_error_object_whose_text_never_ends_is_cut_off() {
        match run("error(setmetatable({}, {__tostring = function() while true do end end}))") {
            Outcome::Failed(text) => assert!(text.starts_with("(error object is a table value)"), "{text}"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_endless_loop_is_cut_off_even_inside_pcall() {
        for source in [
            "while true do end",
            "while true do pcall(function() while true do end end) end",
            "local f = coroutine.wrap(function() while true do pcall(string.rep, 'x', 10) end end) pcall(f) pcall(f) while true do end",
        ] {
            let vm = vm();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("rt");
            match runtime.block_on(run_in(&vm, source)) {
                Outcome::Failed(text) => assert!(text.contains("plugins/t.lua:1: the script ran longer"), "{text}"),
                other => panic!("{other:?}"),
            }
            match runtime.block_on(run_in(&vm, "local n = 0 for i = 1, 1e6 do n = n + i end return 'fine'")) {
                Outcome::Done(text) => assert_eq!(text, "fine"),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn timers_fire_and_end_prematurely() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("rt");
        let vm = vm();
        tokio::task::LocalSet::new().block_on(&runtime, async {
            let source = r#"
                fired, every = {}, 0
                local function note(text) fired[#fired + 1] = text end
                assert(ngx.timer.at(0.001, function(premature, a, b) note(tostring(premature) .. a .. b) end, "x", 1))
                assert(ngx.timer.every(0.002, function(premature)
                    every = every + 1
                    if premature then note("every " .. tostring(premature)) end
                end))
                assert(ngx.timer.at(3600, function(premature) note("end " .. tostring(premature)) end))
                return ngx.timer.pending_count()"#;
            assert!(matches!(run_in(&vm, source).await, Outcome::Done(n) if n == "3"));
            let again = "while every < 3 or not fired[1] do ngx.sleep(0.001) end return fired[1]";
            assert!(matches!(run_in(&vm, again).await, Outcome::Done(text) if text == "falsex1"));
            vm.close();
            let rest =
                run_in(&vm, "while #fired < 3 do ngx.sleep(0) end table.sort(fired) return table.concat(fired, ' ')")
                    .await;
            let Outcome::Done(text) = rest else { panic!("{rest:?}") };
            assert_eq!(text, "end true every true falsex1");
            let refused = run_in(&vm, "return select(2, ngx.timer.at(0, print))").await;
            assert!(matches!(refused, Outcome::Done(text) if text == "process exiting"));
        });
    }

    #[test]
    fn timers_that_run_are_bounded() {
        let config = serde_json::json!({"nginx_config": {"max_running_timers": 2}});
        let vm = Vm::new(VmConfig { config: config.into(), ..Default::default() }).expect("a VM");
        let source = "local sem, ran = require('ngx.semaphore').new(0), 0
             local function start() assert(ngx.timer.at(0, function() ran = ran + 1 sem:wait(60) end)) end
             for _ = 1, 4 do start() end
             while ngx.timer.pending_count() > 0 do ngx.sleep(0) end
             local out = ran .. ' of ' .. ngx.timer.running_count()
             sem:post(2)
             while ngx.timer.running_count() > 0 do ngx.sleep(0) end
             start()
             while ran < 3 do ngx.sleep(0) end
             return out .. ', later ' .. ran .. ' of ' .. ngx.timer.running_count()";
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("rt");
        let outcome = tokio::task::LocalSet::new().block_on(&runtime, run_in(&vm, source));
        let Outcome::Done(text) = outcome else { panic!("{outcome:?}") };
        assert_eq!(text, "2 of 2, later 3 of 1");
    }

    #[test]
    fn a_sleep_is_cut_at_a_year() {
        assert_eq!(seconds(f64::INFINITY), Duration::from_secs_f64(MAX_SLEEP_SECS));
        assert_eq!((seconds(f64::NAN), seconds(-1.0)), (Duration::ZERO, Duration::ZERO));
        assert!(std::time::Instant::now().checked_add(seconds(1e300)).is_some());
    }
}
