//! Stops what runs away: a script that never waits, a VM that eats the machine.
//!
//! One watchdog thread looks at every VM thread each `TICK`. A script found running over its CPU budget is condemned:
//! a signal to its own thread sets a hook (`lua_sethook` may be called from a signal handler), and the hook raises an
//! error at every instruction until the call has ended, so that no `pcall` can swallow it. The hook works in compiled
//! code because LuaJIT is built with LUAJIT_ENABLE_CHECKHOOK. Nothing is set while scripts behave: entering and
//! leaving a VM costs two stores and a look at the size of its heap.
//!
//! A VM is judged by what is live in it: its garbage is collected first. So that this is seldom needed, the collector begins its
//! cycles earlier in a VM that is more than half full (`Pace`).

use std::{
    cell::Cell,
    ffi::c_int,
    ptr,
    sync::{
        Arc, Mutex, Once,
        atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU8, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use mlua::ffi;

use super::{api::Raise, fast};
use crate::exchange::FunctionCall;

/// How often the watchdog looks. A script may overrun its budget by this much.
const TICK: Duration = Duration::from_millis(50);

/// Ignored by default and used by few programs: a stray one does nothing.
const SIGNAL: c_int = libc::SIGURG;

/// CPU time that a script may use without waiting (`lua.limits.cpu_ms`): far above what a plugin needs, far below
/// what a health check in front of the gateway tolerates.
pub const DEFAULT_CPU_MS: u64 = 1000;

/// Memory of one VM (`lua.limits.memory_mb`): a library with its caches fits, a leak does not take the machine.
pub const DEFAULT_MEMORY_MB: usize = 512;

/// The bounds of a VM.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub cpu_ms: u64,
    pub memory_mb: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { cpu_ms: DEFAULT_CPU_MS, memory_mb: DEFAULT_MEMORY_MB }
    }
}

impl Limits {
    fn memory_kb(&self) -> usize {
        self.memory_mb.saturating_mul(1024)
    }

    /// `lua.limits` of the configuration; 0 is no limit.
    pub fn from_config(config: &serde_json::Value) -> Limits {
        let read = |key: &str, default: u64| {
            let set = config.pointer("/lua/limits").and_then(|l| l.get(key)).and_then(|v| v.as_u64());
            if set == Some(0) { u64::MAX } else { set.unwrap_or(default) }
        };
        Limits {
            cpu_ms: read("cpu_ms", DEFAULT_CPU_MS),
            memory_mb: usize::try_from(read("memory_mb", DEFAULT_MEMORY_MB as u64)).unwrap_or(usize::MAX),
        }
    }
}

/// What the watchdog knows of one thread.
#[derive(Default)]
struct Beat {
    /// `libc::pthread_t` of the thread; valid while the beat is in `WATCHED`.
    thread: AtomicU64,
    /// Odd while a VM runs; each run has its own.
    serial: AtomicU64,
    /// The run that has to end.
    condemned: AtomicU64,
    state: AtomicPtr<ffi::lua_State>,
    /// The hook is set: the run's end clears it. Only the thread itself and its signal handler touch it.
    hooked: AtomicBool,
    depth: AtomicI32,
    cpu_ms: AtomicU64,
    memory_kb: AtomicUsize,
    /// The VM that was collected last because it was too large, and the kilobytes that were live in it.
    collected: AtomicPtr<ffi::lua_State>,
    live_kb: AtomicUsize,
    /// The run that was ended last for what its VM held: 0 for none.
    too_large: AtomicU64,
    /// The VM of a run that ended so, until somebody has collected what it left.
    spilled: AtomicPtr<ffi::lua_State>,
    /// The watchdog wants to know for whom a run computes: the handler is to write it here.
    asked: AtomicBool,
    route: RouteId,
}

/// A route's id, written by a signal handler and read by the watchdog: no lock, no allocation.
struct RouteId {
    /// 0: none is known.
    len: AtomicUsize,
    bytes: [AtomicU8; MAX_ROUTE_ID],
}

/// As long as an id may be.
const MAX_ROUTE_ID: usize = 64;

impl Default for RouteId {
    fn default() -> Self {
        RouteId { len: AtomicUsize::new(0), bytes: [const { AtomicU8::new(0) }; MAX_ROUTE_ID] }
    }
}

impl RouteId {
    fn set(&self, id: &str) {
        let len = id.len().min(MAX_ROUTE_ID);
        for (to, byte) in self.bytes.iter().zip(id.bytes()) {
            to.store(byte, Ordering::Relaxed);
        }
        self.len.store(len, Ordering::Release);
    }

    fn get(&self) -> Option<String> {
        let len = self.len.load(Ordering::Acquire);
        let bytes: Vec<u8> = self.bytes[..len].iter().map(|byte| byte.load(Ordering::Relaxed)).collect();
        (len > 0).then(|| String::from_utf8_lossy(&bytes).into_owned())
    }
}

impl Beat {
    /// Whether more than `limit_kb` is live in the VM of `main`. Garbage is collected first. That takes as long as there is much: what was
    /// found live before may grow by a quarter until it is done again, and so much may a VM hold beyond its limit.
    ///
    /// # Safety
    /// `l` is the coroutine of that VM that runs, or `main` itself where none does.
    unsafe fn holds_too_much(&self, main: *mut ffi::lua_State, l: *mut ffi::lua_State, limit_kb: usize) -> bool {
        let known = self.collected.load(Ordering::Relaxed) == main;
        // Measured under another bound, perhaps, than this run's.
        let live = if known { self.live_kb.load(Ordering::Relaxed).min(limit_kb) } else { 0 };
        // SAFETY: counting and collecting are allowed wherever Lua code could run; LuaJIT lets no finalizer raise.
        unsafe {
            if count_kb(l) <= limit_kb.max(live + live / 4) {
                return false;
            }
            ffi::lua_gc(l, ffi::LUA_GCCOLLECT, 0);
            let live = count_kb(l);
            self.collected.store(main, Ordering::Relaxed);
            // One that is too large is never taken for granted.
            self.live_kb.store(if live > limit_kb { 0 } else { live }, Ordering::Relaxed);
            live > limit_kb
        }
    }
}

/// Kilobytes that a VM holds, garbage included.
unsafe fn count_kb(l: *mut ffi::lua_State) -> usize {
    // SAFETY: the caller has a live state, and counting is allowed at any time.
    unsafe { ffi::lua_gc(l, ffi::LUA_GCCOUNT, 0) as usize }
}

static WATCHED: Mutex<Vec<Arc<Beat>>> = Mutex::new(Vec::new());

thread_local! {
    /// For the signal handler: no lazy initialization, no destructor.
    static BEAT: Cell<*const Beat> = const { Cell::new(ptr::null()) };
    static OWNER: Registration = Registration::new();
    static CALLED: Cell<Option<Called>> = const { Cell::new(None) };
}

/// Keeps this thread's beat in `WATCHED` as long as the thread lives.
struct Registration(Arc<Beat>);

impl Registration {
    fn new() -> Self {
        start();
        let beat = Arc::new(Beat::default());
        // SAFETY: pthread_self cannot fail.
        beat.thread.store(unsafe { libc::pthread_self() } as u64, Ordering::Relaxed);
        BEAT.set(Arc::as_ptr(&beat));
        lock().push(beat.clone());
        Registration(beat)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        BEAT.set(ptr::null());
        lock().retain(|b| !Arc::ptr_eq(b, &self.0));
    }
}

fn lock() -> std::sync::MutexGuard<'static, Vec<Arc<Beat>>> {
    WATCHED.lock().unwrap_or_else(|e| e.into_inner())
}

fn beat() -> Option<&'static Beat> {
    if BEAT.get().is_null() {
        // Fails only while the thread ends: then nobody watches, and nothing long runs any more.
        OWNER.try_with(|_| ()).ok()?;
    }
    // SAFETY: the registration keeps the beat alive until it sets the cell to null, on this thread.
    unsafe { BEAT.get().as_ref() }
}

/// Runs `run`, which resumes or calls the VM of `main`, within `limits`.
#[inline]
pub fn bounded<R>(main: *mut ffi::lua_State, limits: Limits, run: impl FnOnce() -> R) -> R {
    let _run = beat().map(|b| Run::new(b, main, limits));
    run()
}

struct Run(&'static Beat);

impl Run {
    #[inline]
    fn new(beat: &'static Beat, main: *mut ffi::lua_State, limits: Limits) -> Run {
        let depth = beat.depth.load(Ordering::Relaxed);
        beat.depth.store(depth + 1, Ordering::Relaxed);
        // A VM entered from within another's run counts as part of that.
        if depth == 0 {
            beat.state.store(main, Ordering::Relaxed);
            beat.cpu_ms.store(limits.cpu_ms, Ordering::Relaxed);
            beat.memory_kb.store(limits.memory_kb(), Ordering::Relaxed);
            beat.serial.store(beat.serial.load(Ordering::Relaxed) + 1, Ordering::Release);
        }
        Run(beat)
    }
}

impl Drop for Run {
    #[inline]
    fn drop(&mut self) {
        let beat = self.0;
        let depth = beat.depth.load(Ordering::Relaxed) - 1;
        beat.depth.store(depth, Ordering::Relaxed);
        if depth > 0 {
            return;
        }
        // From here on the handler sees an even serial and leaves the VM alone.
        beat.serial.store(beat.serial.load(Ordering::Relaxed) + 1, Ordering::Release);
        if beat.hooked.swap(false, Ordering::Relaxed) {
            // SAFETY: the state was entered by this run and is alive; removing a hook is always allowed.
            unsafe { ffi::lua_sethook(beat.state.load(Ordering::Relaxed), None, 0, 0) };
        }
    }
}

/// Kilobytes that the VM holds, garbage included.
#[inline]
pub fn memory_kb(vm: &super::Vm) -> usize {
    // SAFETY: the state is live as long as the VM.
    unsafe { count_kb(vm.main()) }
}

/// Whether more is live in the VM than it may hold. Nothing of it runs now.
pub fn is_too_large(vm: &super::Vm) -> bool {
    let main = vm.main();
    // SAFETY: the state is live as long as the VM, and idle.
    beat().is_some_and(|b| unsafe { b.holds_too_much(main, main, vm.limits().memory_kb()) })
}

/// Collects what a run has left that was ended because its VM held too much: true for the first who asks.
pub fn collect_spilled(vm: &super::Vm) -> bool {
    let Some(beat) = beat().filter(|b| b.spilled.load(Ordering::Relaxed) == vm.main()) else { return false };
    beat.spilled.store(ptr::null_mut(), Ordering::Relaxed);
    // SAFETY: as in `is_too_large`.
    unsafe { ffi::lua_gc(vm.main(), ffi::LUA_GCCOLLECT, 0) };
    true
}

/// How early the collector begins a cycle in one VM. By itself it waits until the heap is twice as large as what was live, which in a
/// VM that is more than half full is beyond its limit.
pub(super) struct Pace {
    limit_kb: usize,
    /// The heap has to be looked at from this size on.
    from_kb: Cell<usize>,
    /// Pause and step multiplier as they were, while they are others.
    own: Cell<Option<(c_int, c_int)>>,
    /// A cycle was begun because of the heap's size; it has not become smaller since.
    begun: Cell<bool>,
}

/// In percent. A cycle that ends begins anew when the heap has grown by this much at least: one that is nearly full would collect
/// without end.
const SHORTEST_PAUSE: usize = 110;
/// LuaJIT's own.
const LONGEST_PAUSE: usize = 200;
/// In percent of what is allocated meanwhile: a cycle that begins at three quarters of the limit ends below it.
const FAST_STEPS: c_int = 800;

impl Pace {
    pub fn new(limits: Limits) -> Pace {
        let limit_kb = limits.memory_kb();
        Pace { limit_kb, from_kb: Cell::new(limit_kb / 2), own: Cell::default(), begun: Cell::default() }
    }

    /// Looks at the heap after a run.
    #[inline]
    pub fn keep(&self, vm: &super::Vm) {
        let kb = memory_kb(vm);
        if kb > self.from_kb.get() {
            self.set(vm.main(), kb);
        }
    }

    #[cold]
    fn set(&self, main: *mut ffi::lua_State, kb: usize) {
        // SAFETY: the VM is live; these calls set numbers of its collector and run nothing.
        let gc = |what, data| unsafe { ffi::lua_gc(main, what, data) };
        if kb <= self.limit_kb / 2 {
            if let Some((pause, steps)) = self.own.take() {
                gc(ffi::LUA_GCSETPAUSE, pause);
                gc(ffi::LUA_GCSETSTEPMUL, steps);
            }
            self.begun.set(false);
            return self.from_kb.set(self.limit_kb / 2);
        }
        // Also the end of it is to be seen.
        self.from_kb.set(0);
        // What is live is no more than this.
        let pause = (self.limit_kb / 8 * 7 * 100 / kb).clamp(SHORTEST_PAUSE, LONGEST_PAUSE);
        let own = (gc(ffi::LUA_GCSETPAUSE, pause as c_int), gc(ffi::LUA_GCSETSTEPMUL, FAST_STEPS));
        self.own.set(self.own.get().or(Some(own)));
        let is_large = kb > self.limit_kb / 4 * 3;
        if is_large && !self.begun.get() {
            gc(ffi::LUA_GCRESTART, 0);
        }
        self.begun.set(is_large);
    }
}

/// Has `run` go by the bounds of a function's call in a VM that holds `held_kb` now: its own, and never more memory than the VM's.
/// An error at one that is the function's own names the function.
pub fn within_call<R>(vm: &super::Vm, call: &FunctionCall, held_kb: usize, run: impl FnOnce(Limits) -> R) -> R {
    let limits = vm.limits();
    let memory_mb = (held_kb + call.left_kb.get()).div_ceil(1024).min(limits.memory_mb);
    let called = Called { id: call.record.id(), cpu: call.cpu_ms.is_some(), memory: memory_mb < limits.memory_mb };
    let _called = Within(CALLED.replace(Some(called)));
    run(Limits { cpu_ms: call.cpu_ms.unwrap_or(limits.cpu_ms), memory_mb })
}

/// The function whose call runs, and which bounds are its own.
#[derive(Clone, Copy)]
struct Called {
    /// Alive as long as the call: `within_call` takes the value away before it returns.
    id: *const str,
    cpu: bool,
    memory: bool,
}

/// Puts back what was there before.
struct Within(Option<Called>);

impl Drop for Within {
    fn drop(&mut self) {
        CALLED.set(self.0);
    }
}

/// A bound that a script has gone beyond.
#[derive(Clone, Copy)]
enum Bound {
    Cpu,
    Memory,
}

impl Bound {
    /// What to say of it, in pieces: without one of them being made, as a hook raises past destructors.
    fn told(self) -> [&'static str; 4] {
        let own = CALLED.get().filter(|called| match self {
            Bound::Cpu => called.cpu,
            Bound::Memory => called.memory,
        });
        // SAFETY: the call is under way, and its record with it.
        let of = own.map(|called| unsafe { &*called.id });
        let setting = match (self, of) {
            (Bound::Cpu, None) => "lua.limits.cpu_ms",
            (Bound::Cpu, Some("")) => "limits.cpu_ms of the function",
            (Bound::Cpu, Some(_)) => "limits.cpu_ms of function ",
            (Bound::Memory, None) => "lua.limits.memory_mb",
            (Bound::Memory, Some("")) => "limits.memory_mb of the function",
            (Bound::Memory, Some(_)) => "limits.memory_mb of function ",
        };
        let (start, end) = match self {
            Bound::Cpu => ("the script ran longer than ", " allows without waiting"),
            Bound::Memory => ("the VM holds more memory than ", " allows"),
        };
        [start, setting, of.unwrap_or_default(), end]
    }
}

/// Charges the call with what the VM has grown by in a run of it. Garbage counts until the call has used up what it may: then
/// it is collected, and counts no more.
pub fn charge(vm: &super::Vm, call: &FunctionCall, held_kb: usize) {
    let grown = memory_kb(vm).saturating_sub(held_kb);
    call.left_kb.set(call.left_kb.get().saturating_sub(grown));
    if call.left_kb.get() == 0 {
        vm.collect();
        let allowed = call.held_kb.get().saturating_add(call.memory_kb);
        call.left_kb.set(allowed.saturating_sub(memory_kb(vm)));
    }
}

/// Starts the watchdog once per process.
fn start() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the handler is async-signal-safe (atomics and lua_sethook); SA_RESTART keeps system calls going.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_signal as *const () as usize;
            action.sa_flags = libc::SA_RESTART;
            libc::sigemptyset(&mut action.sa_mask);
            libc::sigaction(SIGNAL, &action, ptr::null_mut());
        }
        // Without a watchdog scripts run unbounded, which is what OpenResty does: not worth failing the start.
        let _ = std::thread::Builder::new().name("lua-watchdog".into()).spawn(watch);
    });
}

extern "C" fn on_signal(_: c_int) {
    // SAFETY: as in `beat`; the handler runs on the thread that owns the cell.
    let Some(beat) = (unsafe { BEAT.get().as_ref() }) else { return };
    if beat.serial.load(Ordering::Acquire) % 2 == 1 {
        if beat.asked.swap(false, Ordering::Relaxed) {
            // SAFETY: `place` is null or a request that lives as long as the run, which this thread is inside. Whatever the signal has
            // interrupted changes other fields of it: what a request has matched is settled before its scripts run.
            let matched = unsafe { fast::place().as_ref() }.and_then(|x| x.matched.as_ref());
            beat.route.set(matched.map_or("", |m| &m.route().id));
        }
        beat.hooked.store(true, Ordering::Relaxed);
        // SAFETY: LuaJIT allows lua_sethook from a signal handler; the state is being run by this very thread.
        unsafe { ffi::lua_sethook(beat.state.load(Ordering::Relaxed), Some(on_hook), ffi::LUA_MASKCOUNT, 1) };
    }
}

/// Runs at every instruction of a VM that the watchdog has looked at twice in one run.
unsafe extern "C-unwind" fn on_hook(l: *mut ffi::lua_State, _: *mut ffi::lua_Debug) {
    // SAFETY: as in `on_signal`; no Rust value with a destructor lives when the error is raised.
    unsafe {
        let Some(beat) = BEAT.get().as_ref() else { return };
        let serial = beat.serial.load(Ordering::Relaxed);
        if beat.condemned.load(Ordering::Relaxed) != serial {
            let main = beat.state.load(Ordering::Relaxed);
            if !beat.holds_too_much(main, l, beat.memory_kb.load(Ordering::Relaxed)) {
                ffi::lua_sethook(l, None, 0, 0);
                return;
            }
            beat.too_large.store(serial, Ordering::Relaxed);
            beat.spilled.store(main, Ordering::Relaxed);
            beat.condemned.store(serial, Ordering::Relaxed);
        }
        match beat.too_large.load(Ordering::Relaxed) == serial {
            true => raise(l, Bound::Memory.told()),
            false => raise(l, Bound::Cpu.told()),
        }
    }
}

/// Raises with the position of the function that runs.
unsafe fn raise(l: *mut ffi::lua_State, text: [&str; 4]) -> ! {
    // SAFETY: the caller is a hook on a live state, which has room for LUA_MINSTACK values.
    unsafe {
        ffi::luaL_where(l, 0);
        for piece in text {
            ffi::lua_pushlstring_(l, piece.as_ptr().cast(), piece.len());
        }
        ffi::lua_concat(l, 1 + text.len() as c_int);
        ffi::lua_error(l)
    }
}

/// Whether the run that is under way on this thread has used up its time: for host functions that work for long.
pub fn is_condemned() -> bool {
    beat().is_some_and(|b| {
        let serial = b.serial.load(Ordering::Relaxed);
        // Even: no run is under way.
        serial % 2 == 1 && b.condemned.load(Ordering::Relaxed) == serial
    })
}

/// Fails once that is so. Whoever follows a script's tables asks at each: a few of them can lead to each other in more ways
/// than anyone lives to see, however deep they are allowed to nest.
pub fn check() -> Result<(), Raise> {
    if !is_condemned() {
        return Ok(());
    }
    let is_large = beat().is_some_and(|b| b.too_large.load(Ordering::Relaxed) == b.serial.load(Ordering::Relaxed));
    let bound = if is_large { Bound::Memory } else { Bound::Cpu };
    Err(bound.told().concat().into())
}

/// Whether the run that ended last on this thread was cut off.
pub fn last_run_condemned() -> bool {
    beat().is_some_and(|b| b.condemned.load(Ordering::Relaxed) + 1 == b.serial.load(Ordering::Relaxed))
}

/// What the watchdog saw of a thread at its last look.
struct Seen {
    thread: u64,
    serial: u64,
    cpu: Duration,
    told: Told,
}

/// How far the watchdog is with telling that a condemned run does not end.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Told {
    Nothing,
    Asked,
    All,
}

/// What a run may use beyond its CPU time until it is told of: Lua code ends at its next instruction, a call of a C function may just
/// take long.
const PATIENCE: Duration = Duration::from_secs(1);

fn watch() {
    let mut seen: Vec<Seen> = Vec::new();
    loop {
        std::thread::sleep(TICK);
        // The lock keeps the threads from ending between the look and the signal.
        let watched = lock();
        seen.retain(|s| watched.iter().any(|b| b.thread.load(Ordering::Relaxed) == s.thread));
        for beat in watched.iter() {
            look(beat, &mut seen);
        }
    }
}

fn look(beat: &Beat, seen: &mut Vec<Seen>) {
    let serial = beat.serial.load(Ordering::Acquire);
    let thread = beat.thread.load(Ordering::Relaxed);
    if serial.is_multiple_of(2) {
        return;
    }
    let Some(cpu) = cpu_time(thread) else { return };
    let Some(s) = seen.iter_mut().find(|s| s.thread == thread) else {
        return seen.push(Seen { thread, serial, cpu, told: Told::Nothing });
    };
    if s.serial != serial {
        *s = Seen { thread, serial, cpu, told: Told::Nothing };
        return;
    }
    let (used, allowed) = (cpu.saturating_sub(s.cpu), Duration::from_millis(beat.cpu_ms.load(Ordering::Relaxed)));
    if used >= allowed {
        beat.condemned.store(serial, Ordering::Relaxed);
    }
    if used >= allowed.saturating_add(PATIENCE) {
        s.told = tell(beat, s.told, used);
    }
    // SAFETY: the thread is in WATCHED, whose lock the caller holds: it has not ended.
    unsafe { libc::pthread_kill(thread as libc::pthread_t, SIGNAL) };
}

/// Says, once, that a run is inside a C function that nothing can cut off. For whom it runs its own thread has to say.
fn tell(beat: &Beat, told: Told, used: Duration) -> Told {
    match told {
        Told::Nothing => {
            beat.route.set("");
            beat.asked.store(true, Ordering::Relaxed);
            Told::Asked
        }
        Told::Asked => {
            let route = beat.route.get().map_or_else(|| "no route is known".into(), |id| format!("route {id}"));
            tracing::error!(
                target: "lua",
                "{} has not come back from a script for {} ms of CPU time ({route}): it is inside a C function, such as a Lua pattern \
                 that has to try very many ways, which lua.limits.cpu_ms cannot end; its other requests wait",
                thread_name(beat.thread.load(Ordering::Relaxed)),
                used.as_millis(),
            );
            Told::All
        }
        Told::All => Told::All,
    }
}

fn thread_name(thread: u64) -> String {
    // The kernel's names are no longer.
    let mut name = [0u8; 16];
    // SAFETY: as in `look`; the call writes no more than the buffer has.
    let rc = unsafe { libc::pthread_getname_np(thread as libc::pthread_t, name.as_mut_ptr().cast(), name.len()) };
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    if rc == 0 { String::from_utf8_lossy(&name[..end]).into_owned() } else { "a thread".into() }
}

/// CPU time that the thread has used: waiting for a busy machine is not the script's fault.
fn cpu_time(thread: u64) -> Option<Duration> {
    // SAFETY: as in `look`; both calls only write to the locals.
    unsafe {
        let mut clock = 0;
        let mut t: libc::timespec = std::mem::zeroed();
        let ok = libc::pthread_getcpuclockid(thread as libc::pthread_t, &mut clock) == 0
            && libc::clock_gettime(clock, &mut t) == 0;
        ok.then(|| Duration::new(t.tv_sec as u64, t.tv_nsec as u32))
    }
}

#[cfg(test)]
mod tests {
    use crate::{
        exchange::Phase,
        lua::{
            Vm, VmConfig, fast, limits,
            sched::{background, end_background},
        },
    };

    /// Forty tables that lead to each other in a million million ways.
    const FAN: &str = "local t = {} for _ = 1, 40 do t = {t, t} end ";

    #[test]
    fn without_limits_scripts_run_as_long_as_they_want() {
        let config = serde_json::json!({"lua": {"limits": {"cpu_ms": 0, "memory_mb": 0}}});
        let vm = Vm::new(VmConfig { config: config.into(), ..Default::default() }).expect("a VM");
        // The watchdog looks at it four times.
        let chunk = "local begun, n = os.clock(), 0 while os.clock() - begun < 0.2 do n = n + 1 end return 'ended'";
        let f = vm.lua.load(chunk).into_function().expect("compiles");
        let ended = vm.entered(|| limits::bounded(vm.main(), vm.limits(), || f.call::<String>(())));
        assert_eq!(ended.map_err(|e| e.to_string()).as_deref(), Ok("ended"));
    }

    #[test]
    fn host_functions_that_follow_tables_are_cut_off() {
        let config = serde_json::json!({"lua": {"limits": {"cpu_ms": 50}}});
        let vm = Vm::new(VmConfig { config: config.into(), ..Default::default() }).expect("a VM");
        for call in [
            "ngx.print(t)",
            "require('cjson').encode(t)",
            "require('jsonschema').generate_validator({type = 'array'})(t)",
            "require('jsonschema').generate_validator({enum = t})",
            "ngx.socket.udp():send(t)",
        ] {
            let mut x = background(&vm);
            x.phase = Phase::Access;
            let chunk = format!("{FAN} return tostring({call})");
            let f = vm.lua.load(chunk).into_function().expect("compiles");
            let run = || vm.entered(|| limits::bounded(vm.main(), vm.limits(), || f.call::<String>(())));
            let text = fast::enter(&mut x, run).unwrap_or_else(|e| e.to_string());
            end_background(&vm, &mut x);
            assert!(text.contains("lua.limits.cpu_ms"), "{call}: {text}");
        }
    }
}
