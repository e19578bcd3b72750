//! Runs a request's plugins, phase by phase. What the proxy knows of Lua.
//!
//! One `Runner` per worker, made inside the worker's `LocalSet`. A request that meets no plugin gets an empty mask and
//! never enters a VM. Methods take the request alone: many run at once on one runner.
//!
//! A request keeps the VM generation and plan it began with; when the plugins change, a new VM is built beside the old
//! one, which ends with its last request.

use std::{
    borrow::Cow,
    cell::{Cell, RefCell},
    collections::HashMap,
    ffi::c_int,
    rc::Rc,
    sync::Arc,
};

use mlua::ffi;

use super::{
    PhaseMask, natives,
    plan::{self, Key, Owner, Sources},
    registry::{self, Plugins, Setup},
};
use crate::{
    error::Result,
    exchange::{Exchange, Phase, Source},
    lua::{
        Stack, Vm, limits, log_error,
        sched::{self, Outcome},
        vm::{self, Purpose},
    },
    model::{self, Object, PluginConf},
    store::Snapshot,
};

/// What the plugins of a phase decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Go on with the next phase.
    Next,
    /// The gateway answers: status and headers stand in `response`, the body in `printed`.
    Answer,
    /// Lua has sent the answer itself, to its last byte.
    Sent,
    /// Close the connection without an answer (`ngx.exit(444)`).
    Close,
}

/// Plans kept per worker. Past it those that were not used since the last sweep go.
const MAX_PLANS: usize = 4096;

/// VMs for uploaded functions per worker: one that is cut off or replaced does not stop the others.
const FUNCTION_VMS: usize = 2;

/// Functions compiled per VM; past it the VM is replaced.
const MAX_FUNCTIONS: usize = 1024;

/// Requests between two looks at a VM's memory.
const MEMORY_CHECK_EVERY: u32 = 256;

/// The plugins of one worker.
pub struct Runner {
    setup: Setup,
    worker: usize,
    generation: RefCell<Rc<Generation>>,
    plans: RefCell<hashbrown::HashMap<Key, Rc<Plan>>>,
    /// The snapshot that plans were last made for.
    snapshot: Cell<u64>,
    functions: RefCell<Vec<Option<Rc<FunctionVm>>>>,
    next_function_vm: Cell<usize>,
    filters: RefCell<HashMap<u64, Option<c_int>>>,
    until_memory_check: Cell<u32>,
}

/// One plugin VM, from a load of the plugins to the next.
struct Generation {
    vm: Rc<Vm>,
    /// `Snapshot::plugins_generation` that it was loaded for.
    number: u64,
    plugins: Plugins,
    entry: Entry,
}

/// Registry references of `moongate.run`'s functions.
struct Entry {
    rewrite: c_int,
    access: c_int,
    before_proxy: c_int,
    header_filter: c_int,
    body_filter: c_int,
    delayed_body_filter: c_int,
    log: c_int,
    call_filter: c_int,
}

/// What runs for one combination of versions.
struct Plan {
    generation: Rc<Generation>,
    /// Registry reference of the Lua plan.
    anchor: c_int,
    mask: PhaseMask,
    /// A plugin of it may attach a consumer.
    auth: bool,
    filters: Vec<Arc<PluginConf>>,
    /// `prefer_name` of the prometheus plugin, when it is in the plan.
    prometheus: Option<bool>,
    used: Cell<bool>,
}

impl Plan {
    /// Tells the request what those who do not know plans ask of them.
    fn shown_to(&self, x: &mut Exchange) {
        x.lua.phases = self.mask.0;
        x.lua.counted = self.prometheus;
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        self.generation.vm.release(self.anchor);
    }
}

/// What a request keeps of the runner: `Exchange::lua.run`. Its end frees the request's tables.
pub(super) struct Run {
    plan: RefCell<Rc<Plan>>,
    slot: u32,
}

impl Run {
    /// Whether the nth filter of the request's plan lets the plugin run.
    pub(super) fn filter(x: &Exchange, n: i64) -> bool {
        let Some(run) = run_of(x) else { return true };
        let plan = run.plan.borrow().clone();
        let conf = usize::try_from(n - 1).ok().and_then(|n| plan.filters.get(n));
        let filter = conf.and_then(|c| c.meta.filter.as_ref());
        let variable = &mut |name: &str| {
            let mut scratch = Vec::new();
            x.var_by_name(name, &mut scratch).map(|value| Cow::Owned(value.to_vec()))
        };
        filter.is_none_or(|f| f.eval(variable))
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.plan.borrow().generation.vm.clear_slot(self.slot);
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        let destroyed: Result<()> = registry::call(&self.vm, "moongate.plugins", "destroy", ());
        if let Err(e) = destroyed {
            tracing::error!(target: "lua", "failed to end the plugins: {e}");
        }
    }
}

fn run_of(x: &Exchange) -> Option<&Run> {
    x.lua.run.as_deref()?.downcast_ref()
}

impl Runner {
    /// Loads the plugins. Must be called inside the worker's `LocalSet`: `init` may start timers.
    pub fn new(setup: Setup, worker: usize, snapshot: &Arc<Snapshot>) -> Result<Runner> {
        let generation = Generation::load(&setup, worker, snapshot)?;
        Ok(Runner {
            setup,
            worker,
            generation: RefCell::new(generation),
            plans: RefCell::default(),
            snapshot: Cell::new(snapshot.version),
            functions: RefCell::new(vec![None; FUNCTION_VMS]),
            next_function_vm: Cell::new(0),
            filters: RefCell::default(),
            until_memory_check: Cell::new(MEMORY_CHECK_EVERY),
        })
    }

    /// The loaded plugins.
    pub fn plugins(&self) -> Vec<Arc<registry::PluginInfo>> {
        self.generation.borrow().plugins.values().cloned().collect()
    }

    /// Finds what runs for the request, whose `snapshot` and `matched` are set. An empty mask: nothing does.
    pub fn begin(&self, x: &mut Exchange) -> PhaseMask {
        if x.snapshot.version != self.snapshot.get() {
            self.follow(&x.snapshot);
        }
        let sources = Sources::of(x);
        if sources.is_empty() {
            return PhaseMask::default();
        }
        let Some(plan) = self.plan(&sources) else {
            // One of them may be what keeps strangers out: rewrite_access answers, nobody passes.
            x.lua.unprepared = true;
            let mut mask = PhaseMask::default();
            mask.add(Phase::Rewrite);
            return mask;
        };
        let mask = plan.mask;
        plan.shown_to(x);
        if mask != PhaseMask::default() {
            let slot = plan.generation.vm.take_slot();
            x.lua.slot = Some(slot);
            x.lua.run = Some(Rc::new(Run { plan: RefCell::new(plan), slot }));
        }
        mask
    }

    /// The phases of the request now: a consumer's plugins may have joined since `begin`.
    pub fn mask(&self, x: &Exchange) -> PhaseMask {
        PhaseMask(x.lua.phases)
    }

    /// `prefer_name` of the prometheus plugin when the request has it.
    pub fn prometheus(&self, x: &Exchange) -> Option<bool> {
        x.lua.counted
    }

    /// Rewrite and access: global rules, the route, and the consumer's plugins when one was attached.
    pub async fn rewrite_access(&self, x: &mut Exchange) -> Flow {
        if x.lua.unprepared {
            return failed(x);
        }
        let Some(run) = run_of(x) else { return Flow::Next };
        let (mut plan, slot) = (run.plan.borrow().clone(), run.slot);
        x.phase = Phase::Rewrite;
        let entry = plan.generation.entry.rewrite;
        let flow = self.answering(x, &plan, entry, slot, plan.auth).await;
        if flow != Flow::Next || !plan.auth {
            return flow;
        }
        x.phase = Phase::Access;
        let sources = Sources::of(x);
        let joined = sources.consumer_joins(&plan.generation.plugins);
        if joined {
            let Some(next) = self.plan_in(&plan.generation, &sources) else { return failed(x) };
            plan = next;
            if let Some(run) = run_of(x) {
                *run.plan.borrow_mut() = plan.clone();
            }
            plan.shown_to(x);
        }
        if !joined && !plan.mask.has(Phase::Access) {
            return Flow::Next;
        }
        let entry = plan.generation.entry.access;
        self.answering(x, &plan, entry, slot, joined).await
    }

    pub async fn before_proxy(&self, x: &mut Exchange) -> Flow {
        let Some((plan, slot)) = self.at(x, Phase::BeforeProxy) else { return Flow::Next };
        let entry = plan.generation.entry.before_proxy;
        self.answering(x, &plan, entry, slot, false).await
    }

    /// Works on `x.response`. An error: the answer can no longer be trusted, and is logged.
    pub async fn header_filter(&self, x: &mut Exchange) -> Result<()> {
        let Some((plan, slot)) = self.at(x, Phase::HeaderFilter) else { return Ok(()) };
        let entry = plan.generation.entry.header_filter;
        self.filtering(x, &plan, entry, slot).await
    }

    /// Works on `x.chunk`.
    pub async fn body_filter(&self, x: &mut Exchange) -> Result<()> {
        let Some((plan, slot)) = self.at(x, Phase::BodyFilter) else { return Ok(()) };
        let entry = plan.generation.entry.body_filter;
        self.filtering(x, &plan, entry, slot).await
    }

    /// Sees `x.chunk` after all body filters.
    pub async fn delayed_body_filter(&self, x: &mut Exchange) -> Result<()> {
        let Some((plan, slot)) = self.at(x, Phase::DelayedBodyFilter) else { return Ok(()) };
        let entry = plan.generation.entry.delayed_body_filter;
        self.filtering(x, &plan, entry, slot).await
    }

    /// The log phase, and the end of what the request kept here. Call it for every request that `begin` was called for.
    pub async fn log(&self, x: &mut Exchange) {
        if let Some((plan, slot)) = self.at(x, Phase::Log) {
            let entry = plan.generation.entry.log;
            // Logged where it happened; the answer is out already.
            let _ = self.filtering(x, &plan, entry, slot).await;
        }
        if x.lua.run.take().is_some() {
            x.lua.slot = None;
            x.lua.phases = 0;
            self.check_memory();
        }
    }

    /// Whether a route's `filter_func` lets the request in. An error counts as no.
    pub fn filter(&self, x: &Exchange, route: &Arc<Object<model::Route>>) -> bool {
        let Some(source) = &route.value.filter_func else { return true };
        let generation = self.generation.borrow().clone();
        let Some(function) = self.compiled_filter(&generation, route.uid, source, x) else { return false };
        // The router only lends the request; the function gets a copy of what it can ask about.
        let mut copy = copy_of(x);
        let passed = crate::lua::fast::enter(&mut copy, || call_filter(&generation, function));
        match passed {
            Ok(passed) => passed,
            Err(text) => {
                log_error(x, &format!("failed to run filter_func of route {}: {text}", route.id));
                false
            }
        }
    }

    /// Answers by an uploaded function. `None`: there is no such function.
    pub async fn function(&self, x: &mut Exchange, id: &str) -> Option<Flow> {
        let function = x.snapshot.functions.get(id)?.clone();
        x.phase = Phase::Content;
        let at = self.next_function_vm.get() % FUNCTION_VMS;
        self.next_function_vm.set(at + 1);
        let called = match self.function_vm(at, &function, x) {
            Ok((vm, callable)) => {
                vm.vm.set_snapshot(&x.snapshot);
                let flow = vm.call(x, callable).await;
                if limits::last_run_condemned() || limits::memory_mb(&vm.vm) > vm.vm.limits().memory_mb {
                    self.replace_function_vm(at, &vm);
                }
                flow
            }
            Err(e) => {
                log_error(x, &format!("function {id}: {e}"));
                failed(x)
            }
        };
        Some(if called == Flow::Next { Flow::Answer } else { called })
    }

    /// Ends timers early: the worker stops.
    pub fn close(&self) {
        self.generation.borrow().vm.close();
        for vm in self.functions.borrow().iter().flatten() {
            vm.vm.close();
        }
    }

    /// Collects garbage in every VM of the worker.
    pub fn collect(&self) {
        self.generation.borrow().vm.collect();
        for vm in self.functions.borrow().iter().flatten() {
            vm.vm.collect();
        }
    }

    /// Timers of scripts that have not ended.
    pub fn timers(&self) -> usize {
        let functions: usize = self.functions.borrow().iter().flatten().map(|vm| vm.vm.open_timers()).sum();
        self.generation.borrow().vm.open_timers() + functions
    }

    /// The request's plan when it has something for `phase`.
    fn at(&self, x: &mut Exchange, phase: Phase) -> Option<(Rc<Plan>, u32)> {
        if !self.mask(x).has(phase) {
            return None;
        }
        x.phase = phase;
        let run = run_of(x)?;
        Some((run.plan.borrow().clone(), run.slot))
    }

    async fn answering(&self, x: &mut Exchange, plan: &Plan, entry: c_int, slot: u32, flag: bool) -> Flow {
        let push = |s: &Stack| push_call(s, entry, plan.anchor, slot, flag);
        let outcome = sched::call(&plan.generation.vm, x, push, read_answer).await;
        settle(x, outcome)
    }

    async fn filtering(&self, x: &mut Exchange, plan: &Plan, entry: c_int, slot: u32) -> Result<()> {
        let push = |s: &Stack| push_call(s, entry, plan.anchor, slot, false);
        match sched::call(&plan.generation.vm, x, push, |_| ()).await {
            Outcome::Done(()) | Outcome::Exit(_) => Ok(()),
            Outcome::Failed(text) => {
                log_error(x, &format!("failed to run {}: {text}", crate::lua::api::context_name(x.phase)));
                Err(crate::error::Error::script(text))
            }
        }
    }

    /// Takes a new snapshot in: a new generation when the plugins changed.
    fn follow(&self, snapshot: &Arc<Snapshot>) {
        let newest = snapshot.version > self.snapshot.get();
        if !newest {
            return;
        }
        self.snapshot.set(snapshot.version);
        let changed = self.generation.borrow().number != snapshot.plugins_generation;
        if changed {
            self.renew(snapshot);
        }
        self.generation.borrow().vm.set_snapshot(snapshot);
    }

    /// Builds a VM beside the one that serves; requests under way keep theirs.
    fn renew(&self, snapshot: &Arc<Snapshot>) {
        match Generation::load(&self.setup, self.worker, snapshot) {
            Ok(next) => {
                self.plans.borrow_mut().clear();
                self.filters.borrow_mut().clear();
                let old = self.generation.replace(next);
                old.vm.close();
            }
            Err(e) => tracing::error!(target: "lua", "failed to load the plugins anew, the old ones go on: {e}"),
        }
    }

    fn plan(&self, sources: &Sources<'_>) -> Option<Rc<Plan>> {
        let generation = self.generation.borrow().clone();
        self.plan_in(&generation, sources)
    }

    fn plan_in(&self, generation: &Rc<Generation>, sources: &Sources<'_>) -> Option<Rc<Plan>> {
        let key = sources.key();
        if let Some(plan) = self.plans.borrow().get(&key).filter(|p| Rc::ptr_eq(&p.generation, generation)) {
            plan.used.set(true);
            return Some(plan.clone());
        }
        let owners = sources.owners(&generation.plugins);
        let plan = match generation.build(&owners) {
            Ok(plan) => Rc::new(plan),
            Err(e) => {
                tracing::error!(target: "lua", "failed to prepare plugins: {e}");
                return None;
            }
        };
        // A request of an old generation must not put its plan before the new one's.
        if Rc::ptr_eq(&self.generation.borrow(), generation) {
            let mut plans = self.plans.borrow_mut();
            if plans.len() >= MAX_PLANS {
                plans.retain(|_, p| p.used.replace(false));
                if plans.len() >= MAX_PLANS {
                    plans.clear();
                }
            }
            plans.insert(key, plan.clone());
        }
        Some(plan)
    }

    fn check_memory(&self) {
        let left = self.until_memory_check.get() - 1;
        if left > 0 {
            return self.until_memory_check.set(left);
        }
        self.until_memory_check.set(MEMORY_CHECK_EVERY);
        let vm = self.generation.borrow().vm.clone();
        let limit = vm.limits().memory_mb;
        if limits::memory_mb(&vm) > limit {
            tracing::error!(target: "lua", "the plugin VM holds more than lua.limits.memory_mb ({limit}): it is replaced");
            self.renew(&vm.snapshot());
        }
    }

    fn compiled_filter(&self, generation: &Generation, uid: u64, source: &str, x: &Exchange) -> Option<c_int> {
        if let Some(known) = self.filters.borrow().get(&uid) {
            return *known;
        }
        let compiled: Result<(Option<mlua::Function>, Option<String>)> =
            registry::call(&generation.vm, "moongate.run", "compile_filter", source);
        let anchor = match compiled {
            Ok((Some(function), _)) => generation.vm.keep(function).ok(),
            Ok((None, reason)) => {
                log_error(x, &format!("failed to load filter_func: {}", reason.unwrap_or_default()));
                None
            }
            Err(e) => {
                log_error(x, &format!("failed to load filter_func: {e}"));
                None
            }
        };
        let mut filters = self.filters.borrow_mut();
        if filters.len() >= MAX_PLANS {
            filters.drain().filter_map(|(_, anchor)| anchor).for_each(|a| generation.vm.release(a));
        }
        filters.insert(uid, anchor);
        anchor
    }

    /// The VM that is to run the function, and the function in it.
    fn function_vm(
        &self,
        at: usize,
        function: &Object<model::Function>,
        x: &Exchange,
    ) -> Result<(Rc<FunctionVm>, c_int)> {
        let existing = self.functions.borrow()[at].clone().filter(|vm| vm.compiled.borrow().len() < MAX_FUNCTIONS);
        let vm = match existing {
            Some(vm) => vm,
            None => {
                let config = self.setup.vm_config(Purpose::Functions, self.worker, &x.snapshot);
                let vm = Rc::new(FunctionVm::new(config)?);
                if let Some(old) = self.functions.borrow_mut()[at].replace(vm.clone()) {
                    old.vm.close();
                }
                vm
            }
        };
        let callable = vm.callable(function)?;
        Ok((vm, callable))
    }

    fn replace_function_vm(&self, at: usize, broken: &Rc<FunctionVm>) {
        let mut vms = self.functions.borrow_mut();
        if vms[at].as_ref().is_some_and(|vm| Rc::ptr_eq(vm, broken)) {
            vms[at] = None;
            broken.vm.close();
        }
    }
}

impl Generation {
    fn load(setup: &Setup, worker: usize, snapshot: &Arc<Snapshot>) -> Result<Rc<Generation>> {
        let config = setup.vm_config(Purpose::Plugins, worker, snapshot);
        let (vm, plugins) = registry::load(config, &setup.names(snapshot))?;
        vm.set_snapshot(snapshot);
        let errors: HashMap<String, String> = registry::call(&vm, "moongate.plugins", "init", ())?;
        for (name, text) in errors {
            tracing::error!(target: "lua", "failed to init plugin [{name}]: {text}");
        }
        let entry = Entry::of(&vm)?;
        Ok(Rc::new(Generation { vm, number: snapshot.plugins_generation, plugins, entry }))
    }

    /// Makes the Lua lists of `owners`.
    fn build(self: &Rc<Self>, owners: &[Owner]) -> Result<Plan> {
        let mut filters = Vec::new();
        let described = self.describe(owners, &mut filters)?;
        let (plan, has): (mlua::Table, String) = registry::call(&self.vm, "moongate.run", "build", described)?;
        let names = plan::names(owners);
        let auth = names.iter().any(|n| self.plugins.get(*n).is_some_and(|p| p.auth));
        let mask = mask_of(&has);
        let prometheus = owners.iter().flat_map(|o| &o.items).find(|i| &*i.conf.name == "prometheus").map(|i| {
            let conf: serde_json::Value = serde_json::from_str(&i.conf.json).unwrap_or_default();
            conf.get("prefer_name").and_then(|v| v.as_bool()).unwrap_or(false)
        });
        let anchor = self.vm.keep(plan)?;
        let used = Cell::new(true);
        Ok(Plan { generation: self.clone(), anchor, mask, auth, filters, prometheus, used })
    }

    fn describe(&self, owners: &[Owner], filters: &mut Vec<Arc<PluginConf>>) -> Result<mlua::Table> {
        let lua = &self.vm.lua;
        let mut make = || -> mlua::Result<mlua::Table> {
            let list = lua.create_table()?;
            for owner in owners {
                let t = lua.create_table()?;
                t.raw_set("global", owner.global)?;
                t.raw_set("conf_type", owner.conf_type.as_str())?;
                t.raw_set("conf_id", owner.conf_id.as_str())?;
                t.raw_set("conf_version", owner.conf_version.as_str())?;
                let items = lua.create_table()?;
                for item in &owner.items {
                    let i = lua.create_table()?;
                    i.raw_set("name", &*item.conf.name)?;
                    i.raw_set("uid", item.conf.uid)?;
                    i.raw_set("json", &*item.conf.json)?;
                    i.raw_set("key", item.key.as_str())?;
                    i.raw_set("version", item.version.to_string())?;
                    i.raw_set("consumer", item.consumer_schema)?;
                    i.raw_set("consumer_only", item.consumer_only)?;
                    if item.conf.meta.filter.is_some() {
                        filters.push(item.conf.clone());
                        i.raw_set("filter", filters.len())?;
                    }
                    items.raw_push(i)?;
                }
                t.raw_set("items", items)?;
                list.raw_push(t)?;
            }
            Ok(list)
        };
        make().map_err(crate::lua::api::script)
    }
}

impl Entry {
    fn of(vm: &Vm) -> Result<Entry> {
        let f = |name| vm.function("moongate.run", name);
        Ok(Entry {
            rewrite: f("rewrite")?,
            access: f("access")?,
            before_proxy: f("before_proxy")?,
            header_filter: f("header_filter")?,
            body_filter: f("body_filter")?,
            delayed_body_filter: f("delayed_body_filter")?,
            log: f("log")?,
            call_filter: f("call_filter")?,
        })
    }
}

/// `build`'s second result: which of rewrite, consumer, access, before_proxy, … have plugins.
fn mask_of(has: &str) -> PhaseMask {
    const ORDER: [Phase; 8] = [
        Phase::Rewrite,
        Phase::Rewrite,
        Phase::Access,
        Phase::BeforeProxy,
        Phase::HeaderFilter,
        Phase::BodyFilter,
        Phase::DelayedBodyFilter,
        Phase::Log,
    ];
    let mut mask = PhaseMask::default();
    ORDER.iter().zip(has.bytes()).filter(|(_, b)| *b == b'1').for_each(|(phase, _)| mask.add(*phase));
    mask
}

/// Pushes `entry(plan, slot, flag)`.
fn push_call(s: &Stack, entry: c_int, plan: c_int, slot: u32, flag: bool) -> c_int {
    s.get_index(ffi::LUA_REGISTRYINDEX, entry as usize);
    s.get_index(ffi::LUA_REGISTRYINDEX, plan as usize);
    s.push_number(f64::from(slot));
    s.push_bool(flag);
    3
}

/// `status, body` of a phase that may answer.
fn read_answer(s: &Stack) -> Option<(u16, Vec<u8>)> {
    let status = s.number(1)? as u16;
    Some((status, s.bytes(2).unwrap_or_default().to_vec()))
}

/// What a call's end means for the request.
fn settle(x: &mut Exchange, outcome: Outcome<Option<(u16, Vec<u8>)>>) -> Flow {
    match outcome {
        Outcome::Done(None) if x.response.ended => Flow::Sent,
        Outcome::Done(None) if x.response.head_sent || !x.printed.is_empty() => Flow::Answer,
        Outcome::Done(None) => Flow::Next,
        Outcome::Done(Some((status, _))) if !(100..=999).contains(&status) => {
            log_error(x, &format!("{} answered with status {status}", crate::lua::api::context_name(x.phase)));
            failed(x)
        }
        Outcome::Done(Some((status, body))) => {
            answer(x, status);
            x.printed.extend_from_slice(&body);
            Flow::Answer
        }
        Outcome::Exit(status) => exit(x, status),
        Outcome::Failed(text) => {
            log_error(x, &format!("failed to run {}: {text}", crate::lua::api::context_name(x.phase)));
            failed(x)
        }
    }
}

/// A plugin has answered with this status.
fn answer(x: &mut Exchange, status: u16) {
    x.response.status = status;
    x.response.source = Source::Gateway;
    if status >= 400 && !x.response.headers.contains("content-type") {
        x.response.headers.append("Content-Type", "text/html; charset=utf-8");
    }
}

/// `ngx.exit(status)`
fn exit(x: &mut Exchange, status: i64) -> Flow {
    /// nginx closes the connection without a word.
    const CLOSE: i64 = 444;
    let begun = x.response.head_sent || !x.printed.is_empty();
    match status {
        _ if x.response.ended => Flow::Sent,
        CLOSE => Flow::Close,
        // ngx.OK ends the phase only, unless something was printed.
        0 if !begun => Flow::Next,
        _ if begun => {
            if x.response.status == 0 {
                x.response.status = 200;
            }
            Flow::Answer
        }
        100..=999 => {
            x.response.status = status as u16;
            x.response.source = Source::Gateway;
            Flow::Answer
        }
        _ => failed(x),
    }
}

fn failed(x: &mut Exchange) -> Flow {
    x.printed.clear();
    x.response.status = 500;
    x.response.source = Source::Gateway;
    if x.response.head_sent { Flow::Close } else { Flow::Answer }
}

fn call_filter(generation: &Generation, function: c_int) -> Result<bool, String> {
    let vm = &generation.vm;
    let main = vm.main();
    vm.entered(|| {
        // SAFETY: two functions kept in the registry are called under lua_pcall; the results are popped.
        limits::bounded(main, vm.limits(), || unsafe {
            let s = Stack::new(main);
            s.get_index(ffi::LUA_REGISTRYINDEX, generation.entry.call_filter as usize);
            s.get_index(ffi::LUA_REGISTRYINDEX, function as usize);
            let rc = ffi::lua_pcall(main, 1, 1, 0);
            let result = match rc {
                ffi::LUA_OK => Ok(s.boolean(-1)),
                _ => Err(String::from_utf8_lossy(s.bytes(-1).unwrap_or(b"error")).into_owned()),
            };
            s.pop(1);
            result
        })
    })
}

/// The request's head, for a function that only looks.
fn copy_of(x: &Exchange) -> Exchange {
    let mut copy = Exchange::new(x.conn.clone(), x.snapshot.clone());
    copy.phase = Phase::Access;
    let (from, to) = (&x.request, &mut copy.request);
    to.method.clone_from(&from.method);
    to.target.clone_from(&from.target);
    to.path.clone_from(&from.path);
    to.args.clone_from(&from.args);
    to.host.clone_from(&from.host);
    to.headers.clone_from(&from.headers);
    to.version = from.version;
    to.real_ip = from.real_ip;
    copy
}

/// A sandboxed VM for uploaded functions.
struct FunctionVm {
    vm: Rc<Vm>,
    call: c_int,
    /// uid of a function's version -> registry reference of what to call.
    compiled: RefCell<HashMap<u64, c_int>>,
}

impl FunctionVm {
    fn new(config: vm::VmConfig) -> Result<FunctionVm> {
        let vm = Vm::with(config, &[natives::register])?;
        let call = vm.function("moongate.run", "call_function")?;
        Ok(FunctionVm { vm, call, compiled: RefCell::default() })
    }

    fn callable(&self, function: &Object<model::Function>) -> Result<c_int> {
        if let Some(known) = self.compiled.borrow().get(&function.uid) {
            return Ok(*known);
        }
        let source = &*function.value.source;
        let (chunk, reason): (Option<mlua::Function>, Option<String>) =
            registry::call(&self.vm, "moongate.functions", "load", (&*function.id, source))?;
        let Some(chunk) = chunk else { return Err(crate::error::Error::script(reason.unwrap_or_default())) };
        let callable: mlua::Function = registry::call(&self.vm, "moongate.functions", "callable", chunk)?;
        let anchor = self.vm.keep(callable)?;
        self.compiled.borrow_mut().insert(function.uid, anchor);
        Ok(anchor)
    }

    async fn call(&self, x: &mut Exchange, callable: c_int) -> Flow {
        let lent = Lent::new(x, &self.vm);
        let slot = lent.slot;
        let call = self.call;
        let push = |s: &Stack| {
            s.get_index(ffi::LUA_REGISTRYINDEX, call as usize);
            s.get_index(ffi::LUA_REGISTRYINDEX, callable as usize);
            s.push_number(f64::from(slot));
            2
        };
        let outcome = sched::call(&self.vm, lent.x, push, read_answer).await;
        let flow = settle(lent.x, outcome);
        let x = &mut *lent.x;
        if flow == Flow::Next && x.response.status == 0 {
            x.response.status = 200;
        }
        flow
    }
}

/// While a function VM has the request, its tables are that VM's.
struct Lent<'x> {
    x: &'x mut Exchange,
    vm: Rc<Vm>,
    slot: u32,
    own: Option<u32>,
}

impl<'x> Lent<'x> {
    fn new(x: &'x mut Exchange, vm: &Rc<Vm>) -> Lent<'x> {
        let slot = vm.take_slot();
        let own = x.lua.slot.replace(slot);
        Lent { x, vm: vm.clone(), slot, own }
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        self.x.lua.slot = self.own;
        self.vm.clear_slot(self.slot);
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use serde_json::{Value, json};

    use super::*;
    use crate::lua::api::{How, context_name};
    use crate::router::{Facts, Router};
    use crate::{
        exchange::{Connection, Matched},
        model::{Keyring, Kind, ParseContext, Parsed, parse},
    };

    /// `t` writes down what runs; its conf says in which phases it answers, fails or waits.
    const T: &str = r#"
        local _M = { version = 0.1, priority = 100, name = "t", schema = { type = "object" } }
        function _M.check_schema(conf) conf.default = conf.default or "filled" return true end
        local function note(conf, ctx, phase)
            ctx.seen = (ctx.seen or "") .. phase .. (conf.mark or "") .. " "
            if conf.fail == phase then error("boom in " .. phase) end
            if conf.wait == phase then ngx.sleep(0.001) end
            if conf.answer == phase then return conf.code, conf.body end
        end
        for _, phase in ipairs({ "rewrite", "access", "before_proxy", "header_filter", "body_filter", "log" }) do
            _M[phase] = function(conf, ctx)
                if phase == "log" then trace = ctx.seen .. "log" .. (conf.mark or "") end
                return note(conf, ctx, phase)
            end
        end
        return _M"#;

    fn plugin(name: &str, priority: i64, extra: &str, body: &str) -> String {
        format!(
            "local _M = {{ version = 1, priority = {priority}, name = '{name}', schema = {{}}, {extra} }}
            function _M.check_schema() return true end
            {body}
            return _M"
        )
    }

    fn object<T>(id: &str, json: &Value, value: T) -> Arc<Object<T>> {
        Arc::new(Object {
            id: id.into(),
            uid: model::next_uid(),
            create_revision: 1,
            mod_revision: 7,
            json: json.to_string().into(),
            value,
        })
    }

    fn parsed(kind: Kind, id: &str, json: &Value) -> Parsed {
        parse(kind, id, &json.to_string(), &ParseContext::new(&Keyring::default())).expect("valid")
    }

    struct Scene {
        snapshot: Snapshot,
        route: Option<Arc<Object<model::Route>>>,
        service: Option<Arc<Object<model::Service>>>,
    }

    impl Scene {
        fn new() -> Scene {
            let snapshot = Snapshot { version: 1, plugins_generation: 1, ..Snapshot::default() };
            Scene { snapshot, route: None, service: None }.plugin("t", T)
        }

        fn plugin(mut self, name: &str, source: &str) -> Self {
            let value = model::PluginSource { source: source.into() };
            self.snapshot.plugin_sources.insert(name.into(), object(name, &json!({}), value));
            self
        }

        fn function(mut self, id: &str, source: &str) -> Self {
            let value = model::Function { source: source.into() };
            self.snapshot.functions.insert(id.into(), object(id, &json!({}), value));
            self
        }

        fn route(mut self, plugins: Value) -> Self {
            let json = json!({"uri": "/x", "plugins": plugins, "upstream": {"type": "roundrobin", "nodes": {"127.0.0.1:80": 1}}});
            let Parsed::Route(value) = parsed(Kind::Route, "1", &json) else { panic!("a route") };
            self.route = Some(object("1", &json, value));
            self
        }

        fn service(mut self, plugins: Value) -> Self {
            let json = json!({"plugins": plugins});
            let Parsed::Service(value) = parsed(Kind::Service, "s", &json) else { panic!("a service") };
            self.service = Some(object("s", &json, value));
            self
        }

        fn global_rule(mut self, id: &str, plugins: Value) -> Self {
            let json = json!({"plugins": plugins});
            let Parsed::GlobalRule(value) = parsed(Kind::GlobalRule, id, &json) else { panic!("a rule") };
            let mut rules = self.snapshot.global_rules.to_vec();
            rules.push(object(id, &json, value));
            self.snapshot.global_rules = rules.into();
            self.snapshot.global_rules_uid = model::next_uid();
            self
        }

        fn consumer(mut self, name: &str, plugins: Value) -> Self {
            let json = json!({"username": name, "plugins": plugins});
            let Parsed::Consumer(value) = parsed(Kind::Consumer, name, &json) else { panic!("a consumer") };
            self.snapshot.consumers.insert(name.into(), object(name, &json, value));
            self
        }

        fn start(self) -> Started {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("rt");
            let local = tokio::task::LocalSet::new();
            let config = json!({"plugins": [], "lua": {"limits": {"cpu_ms": 100}}});
            let setup = Setup { prefix: Default::default(), config: config.into() };
            let snapshot = Arc::new(self.snapshot);
            let runner = local.block_on(&runtime, async { Runner::new(setup, 0, &snapshot) }).expect("a runner");
            Started { runtime, local, runner, snapshot, route: self.route, service: self.service }
        }
    }

    /// The request that all tests make.
    struct Get;

    impl Facts for Get {
        fn host(&self) -> &[u8] {
            b"localhost"
        }
        fn path(&self) -> &[u8] {
            b"/x"
        }
        fn method(&self) -> &[u8] {
            b"GET"
        }
        fn remote(&self) -> std::net::IpAddr {
            [127, 0, 0, 1].into()
        }
        fn var(&self, _: &str) -> Option<Cow<'_, [u8]>> {
            None
        }
        fn filter(&self, _: &Arc<Object<model::Route>>) -> bool {
            true
        }
    }

    struct Started {
        runtime: tokio::runtime::Runtime,
        local: tokio::task::LocalSet,
        runner: Runner,
        snapshot: Arc<Snapshot>,
        route: Option<Arc<Object<model::Route>>>,
        service: Option<Arc<Object<model::Service>>>,
    }

    impl Started {
        fn exchange(&self) -> Exchange {
            let addr = std::net::SocketAddr::from(([127, 0, 0, 1], 1));
            let conn = Connection::new(1, addr, addr);
            let mut x = Exchange::new(Rc::new(conn), self.snapshot.clone());
            x.request.method.extend_from_slice(b"GET");
            x.request.args.extend_from_slice(b"v=2");
            let mut router = Router::default();
            self.route.iter().for_each(|route| router.insert(route.clone(), &[]));
            x.matched = router.find(&Get).map(|found| Matched { found, service: self.service.clone() });
            x
        }

        fn block_on<T>(&self, f: impl Future<Output = T>) -> T {
            self.local.block_on(&self.runtime, f)
        }

        /// Runs all phases; how rewrite and access ended and what `t` saw until its log.
        fn request(&self) -> (Flow, u16, String, String) {
            let mut x = self.exchange();
            self.block_on(async {
                self.runner.begin(&mut x);
                let mut flow = self.runner.rewrite_access(&mut x).await;
                if flow == Flow::Next {
                    flow = self.runner.before_proxy(&mut x).await;
                }
                self.runner.header_filter(&mut x).await.ok();
                self.runner.body_filter(&mut x).await.ok();
                self.runner.log(&mut x).await;
                let trace = self.global("trace");
                (flow, x.response.status, String::from_utf8_lossy(&x.printed).into_owned(), trace)
            })
        }

        fn global(&self, name: &str) -> String {
            let vm = self.runner.generation.borrow().vm.clone();
            vm.lua.globals().get::<Option<String>>(name).ok().flatten().unwrap_or_default()
        }
    }

    #[test]
    fn no_plugin_means_an_empty_mask_and_no_lua() {
        let s = Scene::new().route(json!({})).start();
        let mut x = s.exchange();
        assert_eq!(s.runner.begin(&mut x), PhaseMask::default());
        assert!(x.lua.slot.is_none());
        assert_eq!(s.block_on(s.runner.rewrite_access(&mut x)), Flow::Next);
    }

    #[test]
    fn phases_run_in_order_global_rules_first() {
        let s = Scene::new()
            .global_rule("g", json!({"t": {"mark": "G"}}))
            .route(json!({"t": {"mark": "R", "wait": "access"}}))
            .start();
        let (flow, .., trace) = s.request();
        assert_eq!(flow, Flow::Next);
        assert_eq!(
            trace,
            "rewriteG accessG rewriteR accessR before_proxyG before_proxyR header_filterG header_filterR body_filterG body_filterR logG logR"
        );
        assert!(s.runner.generation.borrow().vm.idle_coroutines() > 0);
    }

    #[test]
    fn a_plugin_answers_with_a_table() {
        let conf = json!({"t": {"answer": "access", "code": 403, "body": {"message": "no"}}});
        let s = Scene::new().route(conf).start();
        let (flow, status, body, trace) = s.request();
        assert_eq!((flow, status, body.as_str()), (Flow::Answer, 403, "{\"message\":\"no\"}\n"));
        assert!(trace.starts_with("rewrite access header_filter"), "{trace}");
    }

    #[test]
    fn a_request_whose_plugins_cannot_be_prepared_is_refused() {
        for check in ["while true do end", "error('no memory')", "return false, 'no'"] {
            let source = plugin("sick", 1, "", &format!("function _M.check_schema(conf) {check} end"));
            let s = Scene::new().plugin("sick", &source).route(json!({"sick": {}})).start();
            let (flow, status, ..) = s.request();
            assert_eq!((flow, status), (Flow::Answer, 500), "{check}");
        }
    }

    #[test]
    fn a_status_out_of_range_is_an_error() {
        for code in [0, 99, 1000, 99999] {
            let s = Scene::new().route(json!({"t": {"answer": "access", "code": code}})).start();
            let (flow, status, ..) = s.request();
            assert_eq!((flow, status), (Flow::Answer, 500), "{code}");
        }
    }

    #[test]
    fn error_response_replaces_the_body() {
        let conf = json!({"t": {"answer": "rewrite", "code": 401, "body": "x", "_meta": {"error_response": {"e": 1}}}});
        let (_, status, body, _) = Scene::new().route(conf).start().request();
        assert_eq!((status, body.as_str()), (401, "{\"e\":1}\n"));
    }

    #[test]
    fn a_failing_plugin_answers_500_and_the_next_request_works() {
        let s = Scene::new().route(json!({"t": {"fail": "access"}})).start();
        for _ in 0..3 {
            let (flow, status, ..) = s.request();
            assert_eq!((flow, status), (Flow::Answer, 500));
        }
    }

    #[test]
    fn a_plugin_that_never_ends_answers_500() {
        let source =
            plugin("spin", 1, "", "function _M.access() while true do pcall(function() while true do end end) end end");
        let s = Scene::new().plugin("spin", &source).route(json!({"spin": {}})).start();
        let (flow, status, ..) = s.request();
        assert_eq!((flow, status), (Flow::Answer, 500));
    }

    #[test]
    fn route_wins_over_service_and_priority_sorts() {
        let a = plugin("a", 1, "", "function _M.access(conf, ctx) ctx.seen = (ctx.seen or '') .. 'a' .. conf.n end");
        let b = plugin("b", 2, "", "function _M.access(conf, ctx) ctx.seen = (ctx.seen or '') .. 'b' .. conf.n end
            function _M.log(conf, ctx) trace = ctx.seen .. ctx.conf_type .. ctx.conf_id .. ctx.conf_version .. conf._meta.parent.resource_key end");
        let scene = || Scene::new().plugin("a", &a).plugin("b", &b).service(json!({"a": {"n": 1}, "b": {"n": 1}}));
        let s = scene().route(json!({"a": {"n": 2}})).start();
        assert_eq!(s.request().3, "b1a2route&service1&s7&7/services/s");
        let s = scene().route(json!({"a": {"n": 2, "_meta": {"priority": 9}}})).start();
        assert_eq!(s.request().3, "a2b1route&service1&s7&7/services/s");
        let s = scene().route(json!({"a": {"_meta": {"disable": true}}})).start();
        assert_eq!(s.request().3, "b1route&service1&s7&7/services/s");
    }

    #[test]
    fn a_filter_decides_whether_a_plugin_runs() {
        let with = |v: &str| {
            let conf = json!({"t": {"answer": "access", "code": 204, "_meta": {"filter": [["arg_v", "==", v]]}}});
            Scene::new().route(conf).start().request().0
        };
        assert_eq!(with("2"), Flow::Answer);
        assert_eq!(with("3"), Flow::Next);
    }

    #[test]
    fn a_consumer_brings_its_plugins() {
        let auth = plugin(
            "who",
            2500,
            "type = 'auth'",
            "function _M.rewrite(conf, ctx) require('moongate.native').apisix.attach_consumer('jack') end",
        );
        let s = Scene::new()
            .plugin("who", &auth)
            .consumer("jack", json!({"t": {"mark": "C"}}))
            .route(json!({"who": {}}))
            .start();
        let (flow, .., trace) = s.request();
        assert_eq!(flow, Flow::Next);
        assert_eq!(trace, "rewriteC accessC before_proxyC header_filterC body_filterC logC");
    }

    #[test]
    fn new_plugins_build_a_vm_beside_the_old_one() {
        let mut s = Scene::new()
            .plugin("v", &plugin("v", 1, "", "function _M.access() return 201 end function _M.destroy() end"))
            .route(json!({"v": {}}))
            .start();
        let mut old = s.exchange();
        s.runner.begin(&mut old);
        let mut next = Snapshot::clone(&s.snapshot);
        (next.version, next.plugins_generation) = (2, 2);
        let source = plugin("v", 1, "", "function _M.access() return 202 end");
        next.plugin_sources.insert("v".into(), object("v", &json!({}), model::PluginSource { source: source.into() }));
        s.snapshot = Arc::new(next);
        assert_eq!(s.request().1, 202);
        s.block_on(s.runner.rewrite_access(&mut old));
        assert_eq!(old.response.status, 201);
        s.block_on(s.runner.log(&mut old));
    }

    #[test]
    fn functions_answer_in_a_sandbox() {
        let s = Scene::new()
            .function("hello", "n = (n or 0) return function(ctx) n = n + 1 return 200, {n = n, t = type(ctx.var)} end")
            .function("out", "return function() return 200, io.open('/etc/passwd') end")
            .function("ffi", "return function() return 200, require('ffi') end")
            .function("spin", "while true do end")
            .function("slow", "return function() ngx.sleep(0.001) return 'text' end")
            .start();
        let call = |id: &str| {
            let mut x = s.exchange();
            let flow = s.block_on(s.runner.function(&mut x, id));
            (flow, x.response.status, String::from_utf8_lossy(&x.printed).into_owned())
        };
        let (flow, status, body) = call("hello");
        assert_eq!((flow, status), (Some(Flow::Answer), 200));
        assert_eq!(serde_json::from_str::<Value>(&body).expect("JSON"), json!({"n": 1, "t": "table"}));
        assert_eq!(call("slow"), (Some(Flow::Answer), 200, "text".into()));
        for id in ["out", "ffi", "spin"] {
            assert_eq!(call(id).1, 500, "{id}");
        }
        assert_eq!(call("absent").0, None);
    }

    #[test]
    fn a_filter_func_sees_no_error_as_yes() {
        let s = Scene::new().start();
        let with = |f: &str| {
            let json = json!({"uri": "/x", "filter_func": f, "upstream": {"type": "roundrobin", "nodes": {"a:80": 1}}});
            let Parsed::Route(value) = parsed(Kind::Route, "1", &json) else { panic!("a route") };
            s.runner.filter(&s.exchange(), &object("1", &json, value))
        };
        assert!(with("function(vars) return type(vars) == 'table' end"));
        assert!(!with("function(vars) return false end"));
        assert!(!with("function(vars) return nil + 1 end"));
        assert!(!with("function(vars) while true do end end"));
    }

    #[test]
    fn the_checker_inspects_and_checks() {
        let config = json!({"plugins": []});
        let setup = Setup { prefix: Default::default(), config: config.into() };
        let picky = plugin(
            "picky",
            1,
            "",
            "function _M.check_schema(conf) if conf.ok then return true end return false, 'not ok' end",
        );
        let scene = Scene::new().plugin("picky", &picky);
        let checker = registry::Checker::new(setup, &scene.snapshot).expect("a checker");
        use crate::store::builder::{PluginSchema::Plugin, Refusal};
        assert_eq!(checker.check_conf("picky", &json!({"ok": true}), Plugin), Ok(()));
        assert_eq!(checker.check_conf("picky", &json!({}), Plugin), Err(Refusal::Invalid("not ok".into())));
        assert_eq!(checker.check_conf("absent", &json!({}), Plugin), Err(Refusal::Unknown));
        let info = checker.inspect_plugin("t", T).expect("a plugin");
        assert_eq!(
            (info.priority, info.phases.has(Phase::Access), info.phases.has(Phase::DelayedBodyFilter)),
            (100, true, false)
        );
        let broken = checker.inspect_plugin("t", "local a = 1\nreturn {").unwrap_err();
        assert!(broken.starts_with("plugins/t.lua:2:"), "{broken}");
        let raising = checker.inspect_plugin("t", "\n\nerror('at load')").unwrap_err();
        assert!(raising.starts_with("plugins/t.lua:3: at load"), "{raising}");
        assert!(checker.inspect_plugin("t", "return { priority = 1 }").unwrap_err().contains("missing field: version"));
        let broken = checker.compile_function("f", "return function( oops").unwrap_err();
        assert!(broken.starts_with("functions/f.lua:1:"), "{broken}");
    }

    #[test]
    fn every_bundled_plugin_loads() {
        let setup = Setup { prefix: Default::default(), config: json!({}).into() };
        let names = setup.names(&Snapshot::default());
        assert!(names.len() > 20, "{names:?}");
        let config = setup.vm_config(Purpose::Check, 0, &Snapshot::default());
        let (vm, plugins) = registry::load(config, &[]).expect("a VM");
        assert!(plugins.is_empty());
        let mut failed = Vec::new();
        for name in &names {
            let (info, reason): (mlua::Value, Option<String>) =
                registry::call(&vm, "moongate.plugins", "load", &**name).expect("called");
            if !info.is_table() {
                failed.push(format!("{name}: {}", reason.unwrap_or_default()));
            }
        }
        assert!(failed.is_empty(), "{failed:#?}");
    }

    #[test]
    fn a_panic_in_the_host_answers_500_and_nothing_else_breaks() {
        let source = plugin(
            "panic",
            1,
            "",
            "function _M.access(conf, ctx)
            if ctx.var.arg_v == '2' then pcall(require('moongate.native').test_panic) end return 200 end",
        );
        let s = Scene::new().plugin("panic", &source).route(json!({"panic": {}})).start();
        let vm = s.runner.generation.borrow().vm.clone();
        let mut api = crate::lua::Api::new(&vm.lua).expect("api");
        api.func("native.test_panic", crate::lua::Phases::ANY, "", |_| panic!("on purpose")).expect("registered");
        let f = api.native().get::<mlua::Function>("test_panic").expect("there");
        let native: mlua::Table = vm.lua.load("return require('moongate.native')").eval().expect("native");
        native.raw_set("test_panic", f).expect("set");
        for _ in 0..2 {
            let (flow, status, ..) = s.request();
            assert_eq!((flow, status), (Flow::Answer, 500));
        }
    }

    #[test]
    fn the_documented_api_is_the_registered_one() {
        let setup = Setup { prefix: Default::default(), config: json!({}).into() };
        let config = setup.vm_config(Purpose::Check, 0, &Snapshot::default());
        let vm = Vm::with(config, &[natives::register]).expect("a VM");
        let text = crate::lua::api::document(vm.entries());
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/lua-api.md");
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(path, &text).expect("written");
        }
        let written = std::fs::read_to_string(path).unwrap_or_default();
        assert!(written == text, "docs/lua-api.md is not what is registered: run this test with UPDATE_DOCS=1");
    }

    #[test]
    fn functions_refuse_phases_that_are_not_theirs() {
        let s = Scene::new().start();
        let vm = s.runner.generation.borrow().vm.clone();
        let mut x = s.exchange();
        let mut checked = 0;
        for entry in vm.entries() {
            if !matches!(entry.how, How::Func | How::Wait) {
                continue;
            }
            let expression = entry.name.replace("native.", "require('moongate.native').");
            for phase in ALL_PHASES.into_iter().filter(|p| !entry.phases.has(*p)) {
                let f: mlua::Value = vm.lua.load(format!("return {expression}")).eval().expect("evaluates");
                // A Lua face stands before some; the host function behind it is what is checked.
                let mlua::Value::Function(f) = f else { continue };
                x.phase = phase;
                let refused = vm.entered(|| crate::lua::fast::enter(&mut x, || f.call::<()>(())));
                let text = refused.expect_err(&entry.name).to_string();
                let disabled = format!("API disabled in the context of {}", context_name(phase));
                if f.info().what == "C" {
                    assert!(text.contains(&disabled), "{} in {phase:?}: {text}", entry.name);
                    checked += 1;
                }
            }
        }
        assert!(checked > 0);
    }

    const ALL_PHASES: [Phase; 12] = [
        Phase::Init,
        Phase::Ssl,
        Phase::Rewrite,
        Phase::Access,
        Phase::BeforeProxy,
        Phase::Balancer,
        Phase::Content,
        Phase::HeaderFilter,
        Phase::BodyFilter,
        Phase::DelayedBodyFilter,
        Phase::Log,
        Phase::Timer,
    ];

    #[test]
    #[ignore = "prints a measurement"]
    fn cost_of_one_plugin_in_access_and_log() {
        let source = plugin(
            "h",
            1,
            "",
            "function _M.access(conf, ctx) ctx.a = ctx.var.arg_v ngx.req.set_header('X-A', conf.n) end
            function _M.log(conf, ctx) ctx.b = ctx.a end",
        );
        let s = Scene::new().plugin("h", &source).route(json!({"h": {"n": 1}})).start();
        let mut x = s.exchange();
        s.block_on(async {
            for round in 0..5 {
                let n = 200_000;
                let start = Instant::now();
                for _ in 0..n {
                    s.runner.begin(&mut x);
                    s.runner.rewrite_access(&mut x).await;
                    s.runner.log(&mut x).await;
                }
                let each: Duration = start.elapsed() / n;
                println!("round {round}: {each:?} per request (begin, access, log)");
            }
        });
    }
}
