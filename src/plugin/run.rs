//! Runs a request's plugins, phase by phase. What the proxy knows of Lua.
//!
//! One `Runner` per worker, made inside the worker's runtime. A request that meets no plugin gets an empty mask and
//! never enters a VM. Methods take the request alone: many run at once on one runner.
//!
//! A request keeps the VM generation and plan it began with; when the plugins change, a new VM is built beside the old
//! one, which ends with its last request.

use std::{
    borrow::Cow,
    cell::{Cell, RefCell},
    collections::{HashMap, HashSet},
    ffi::c_int,
    ops::RangeInclusive,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use mlua::ffi;

mod control;
mod counters;
mod discover;
mod end;
mod errand;
mod function;
pub mod function_trial;
mod hooks;
mod mock;
mod script;
mod secrets;
mod start;
#[cfg(test)]
mod tests;
pub mod trial;

use counters::Others;
pub use counters::VmState;
use end::{Alive, Ends};
pub use errand::Errand;
use function::{Call, Functions};
pub use mock::MockRequest;

use super::{
    PhaseMask, Watching, output,
    plan::{self, Key, Owner, Sources, Watched},
    registered,
    registry::{self, Broken, Plugins, Setup},
};
use crate::{
    balancer::group::Groups,
    conf::outgoing::Charset,
    error::Result,
    exchange::{Exchange, Phase, Source, asked::Asked, watch::Planned},
    lua::{
        Stack, Vm, VmConfig, limits, log_error,
        sched::{self, Outcome},
        vm::Purpose,
    },
    model::{self, Object, PluginConf},
    observe::log::{self, Level},
    store::Snapshot,
};

/// What the plugins of a phase decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Go on with the next phase.
    Next,
    /// The same, but the script has not said that it agrees (`ngx.exit(ngx.DECLINED)`).
    Declined,
    /// The gateway answers: status and headers stand in `response`, the body in `printed`.
    Answer,
    /// Lua has sent the answer itself, to its last byte.
    Sent,
    /// Close the connection without an answer (`ngx.exit(444)`).
    Close,
    /// A location's script sends the request to another one: `Exchange::jump`.
    Jump,
}

/// Plans kept per worker. Past it those that were not used since the last sweep go.
const MAX_PLANS: usize = 4096;

/// What no snapshot's version is.
const NO_SNAPSHOT: u64 = u64::MAX;

/// Requests between two looks at a VM's memory.
const MEMORY_CHECK_EVERY: u32 = 256;
/// Between two looks of a request that comes between two sets of plugins.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// The plugins of one worker.
pub struct Runner {
    setup: Setup,
    worker: usize,
    generation: RefCell<Rc<Generation>>,
    plans: RefCell<hashbrown::HashMap<Key, Rc<Plan>>>,
    /// The snapshot that plans were last made for.
    snapshot: Cell<u64>,
    /// The newest that came, whether or not its VM serves.
    newest: Cell<u64>,
    /// The VM that is to serve next, while it starts.
    renewal: RefCell<Option<start::Renewal>>,
    functions: Functions,
    /// VMs that still end, and those of one request. With those of the worker's runners before this one.
    others: Rc<Others>,
    /// Those whose end has not run, likewise.
    ends: Rc<Ends>,
    filters: RefCell<HashMap<u64, Option<c_int>>>,
    until_memory_check: Cell<u32>,
    /// How often the worker has loaded its plugins, its start included.
    loads: Cell<u64>,
    /// The upstreams of the worker's locations.
    groups: Rc<Groups>,
    charset: Option<Charset>,
}

/// One plugin VM, from a load of the plugins to the next.
struct Generation {
    vm: Rc<Vm>,
    /// `Snapshot::plugins_generation` that it was loaded for.
    number: u64,
    plugins: Plugins,
    broken: Broken,
    /// Whose requests cannot be served because of those, up to `MAX_PLANS`: each is told of once.
    refused: RefCell<HashSet<Key>>,
    entry: Entry,
    scripts: script::Compiled,
    /// Registry reference of `moongate.discovery`'s function, once a registry was asked.
    discover: Cell<Option<c_int>>,
    inherited: RefCell<discover::Inherited>,
    /// Registry reference of `moongate.secrets`'s function, once a reference was met.
    secrets: Cell<Option<c_int>>,
    /// Its end runs when this is dropped. `None`: made for one request (`lua_code_cache off`), it has none.
    alive: Option<Alive>,
    /// Its plugins' `destroy` has run before its end: those that take their place have begun.
    stepped_down: Rc<Cell<bool>>,
    /// Requests inside.
    runs: Cell<usize>,
    /// Those that are alive, kept or in use by a request.
    plans: Cell<usize>,
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
    /// Gives what a plugin's conf has for the case that it raises.
    raised: c_int,
    /// Gives a variable of a Lua module.
    registered_var: c_int,
    /// Every request has phases, by way of functions of `apisix` that somebody has replaced.
    for_all: bool,
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
    /// What is to run; empty where nobody watches.
    planned: Rc<[Planned]>,
    used: Cell<bool>,
}

impl Plan {
    /// Tells the request what those who do not know plans ask of them.
    fn shown_to(&self, x: &mut Exchange) {
        x.lua.phases = self.mask.0;
        x.lua.counted = self.prometheus;
        if let Some(watch) = &mut x.watch {
            watch.plan = self.planned.clone();
        }
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        self.generation.plans.set(self.generation.plans.get() - 1);
        self.generation.vm.release(self.anchor);
    }
}

/// What a request keeps of the runner: `Exchange::lua.run`. Its end frees the request's tables.
pub(super) struct Run {
    job: Job,
    slot: u32,
}

/// What runs for the request.
enum Job {
    Plan(RefCell<Rc<Plan>>),
    /// The scripts of `Exchange::location`.
    Location(Rc<Generation>),
}

impl Run {
    fn new(job: Job, slot: u32) -> Run {
        let run = Run { job, slot };
        let generation = run.generation();
        generation.runs.set(generation.runs.get() + 1);
        run
    }

    fn plan(&self) -> Option<Rc<Plan>> {
        match &self.job {
            Job::Plan(plan) => Some(plan.borrow().clone()),
            Job::Location(_) => None,
        }
    }

    fn generation(&self) -> Rc<Generation> {
        match &self.job {
            Job::Plan(plan) => plan.borrow().generation.clone(),
            Job::Location(generation) => generation.clone(),
        }
    }

    /// Whether the nth filter of the request's plan lets the plugin run, what it has asked of a body that nobody has looked into, and
    /// a registered variable that `given` does not know: name to value, or to none.
    pub(super) fn filter(
        x: &Exchange,
        n: i64,
        given: impl Fn(&str) -> Option<Option<Vec<u8>>>,
    ) -> (bool, Asked, Option<String>) {
        let (mut asked, mut wanted) = (Asked::default(), None);
        let Some(plan) = run_of(x).and_then(Run::plan) else { return (true, asked, wanted) };
        let conf = usize::try_from(n - 1).ok().and_then(|n| plan.filters.get(n));
        let filter = conf.and_then(|c| c.meta.filter.as_ref());
        let variable = &mut |name: &str| {
            asked.note(x, name);
            if let Some(value) = given(name) {
                return value.map(Cow::Owned);
            }
            let mut scratch = Vec::new();
            let value = x.var_by_name(name, &mut scratch).map(|value| Cow::Owned(value.to_vec()));
            if value.is_none() && registered::knows(name) {
                wanted.get_or_insert_with(|| name.to_owned());
            }
            value
        };
        let passed = filter.is_none_or(|f| f.eval(variable));
        (passed, asked, wanted)
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if matches!(self.job, Job::Location(_)) && log::enabled(Level::Debug) {
            let text = format!("lua release ngx.ctx at ref {}", self.slot);
            log::line(Level::Debug, text.as_bytes(), None);
        }
        let generation = self.generation();
        generation.runs.set(generation.runs.get() - 1);
        generation.vm.clear_slot(self.slot);
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        match self.alive {
            // Also where it has never served: its timers would keep it for ever.
            Some(_) => self.vm.close(),
            // What its request has left behind runs at its time.
            None => log::line(Level::Debug, b"lua close the global Lua VM", None),
        }
    }
}

fn run_of(x: &Exchange) -> Option<&Run> {
    x.lua.run.as_deref()?.downcast_ref()
}

impl Runner {
    /// Loads the plugins. Must be called inside the worker's runtime: `init` may start timers.
    pub async fn new(setup: Setup, worker: usize, snapshot: &Arc<Snapshot>) -> Result<Runner> {
        Self::with(setup, worker, snapshot, None, Default::default()).await
    }

    async fn with(
        setup: Setup,
        worker: usize,
        snapshot: &Arc<Snapshot>,
        before: Option<Rc<Generation>>,
        (others, ends): (Rc<Others>, Rc<Ends>),
    ) -> Result<Runner> {
        if worker == 0 && setup.locations.list.iter().any(|l| !l.directives.lua_code_cache) {
            let text = b"lua_code_cache is off; this will hurt performance";
            log::line(Level::Alert, text, None);
        }
        let groups = Rc::new(Groups::new(&setup.locations));
        let shared = (groups.clone(), ends.clone());
        let generation = Generation::started(setup.clone(), worker, snapshot.clone(), before, shared).await?;
        let (trusts, charset) = (setup.trusts_functions(), setup.charset());
        Ok(Runner {
            groups,
            setup,
            worker,
            generation: RefCell::new(generation),
            plans: RefCell::default(),
            snapshot: Cell::new(snapshot.version),
            newest: Cell::new(snapshot.version),
            renewal: RefCell::default(),
            functions: Functions::new(others.clone(), trusts),
            others,
            ends,
            filters: RefCell::default(),
            until_memory_check: Cell::new(MEMORY_CHECK_EVERY),
            loads: Cell::new(1),
            charset,
        })
    }

    /// What is named of responses that are no location's.
    pub fn charset(&self) -> Option<&Charset> {
        self.charset.as_ref()
    }

    /// The upstreams of locations, as this worker's scripts and its proxy know them.
    pub fn groups(&self) -> &Rc<Groups> {
        &self.groups
    }

    /// Who is watched.
    pub fn watching(&self) -> &Arc<Watching> {
        &self.setup.watching
    }

    /// The loaded plugins.
    pub fn plugins(&self) -> Vec<Arc<registry::PluginInfo>> {
        self.generation.borrow().plugins.values().cloned().collect()
    }

    /// Another of the same worker, which is to take its place.
    pub async fn anew(&self, setup: Setup, snapshot: &Arc<Snapshot>) -> Result<Runner> {
        let (before, shared) = (self.generation.borrow().clone(), (self.others.clone(), self.ends.clone()));
        // Requests ask anew whether these plugins still serve.
        self.snapshot.set(NO_SNAPSHOT);
        let next = Self::with(setup, self.worker, snapshot, Some(before), shared).await?;
        next.generation.borrow().inherit(&self.generation.borrow());
        next.loads.set(self.loads.get() + 1);
        Ok(next)
    }

    /// How often the worker has loaded its plugins, its start included.
    pub fn loads(&self) -> u64 {
        self.loads.get()
    }

    /// It takes no requests any more. Its VMs are among those of the one in its place from now on.
    pub fn retire(&self) {
        self.close();
        self.others.plugins(&self.generation.borrow());
        self.functions.each_owner(|vm| self.others.functions(vm));
    }

    /// Finds what runs for the request, whose `snapshot` and `matched` are set. An empty mask: nothing does.
    pub fn begin(&self, x: &mut Exchange) -> PhaseMask {
        if x.snapshot.version != self.snapshot.get() {
            self.follow(&x.snapshot);
        }
        let plain = x.matched.as_ref().is_some_and(|m| m.found.plain_upstream().is_some());
        // What no route takes is a location's, where there are any.
        let for_all =
            self.generation.borrow().entry.for_all && (x.matched.is_some() || self.setup.locations.rest.is_none());
        if plain && x.snapshot.global_rules.is_empty() && x.watch.is_none() && !for_all {
            return PhaseMask::default();
        }
        let sources = Sources::of(x);
        if sources.is_empty() && !for_all {
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
            if let Some(ctx) = &x.conn.ctx {
                plan.generation.vm.inherit_ctx(slot, &**ctx);
            }
            x.lua.slot = Some(slot);
            x.lua.run = Some(Rc::new(Run::new(Job::Plan(RefCell::new(plan)), slot)));
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
        let Some((run, mut plan)) = run_of(x).and_then(|run| Some((run, run.plan()?))) else { return Flow::Next };
        let slot = run.slot;
        x.phase = Phase::Rewrite;
        let entry = plan.generation.entry.rewrite;
        let flow = self.answering(x, &plan, entry, slot, plan.auth).await;
        if flow != Flow::Next || !plan.auth {
            return flow;
        }
        x.phase = Phase::Access;
        let sources = Sources::of(x);
        let joined = sources.consumer_joins(&plan.generation.plugins, &plan.generation.broken);
        if joined {
            let Some(next) = self.plan_in(&plan.generation, &sources) else { return failed(x) };
            plan = next;
            if let Some(Run { job: Job::Plan(kept), .. }) = run_of(x) {
                *kept.borrow_mut() = plan.clone();
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
        if x.location.is_some() {
            return self.location_filter(x, Phase::HeaderFilter).await;
        }
        let Some((plan, slot)) = self.at(x, Phase::HeaderFilter) else { return Ok(()) };
        let entry = plan.generation.entry.header_filter;
        self.filtering(x, &plan, entry, slot).await
    }

    /// Works on `x.chunk`.
    pub async fn body_filter(&self, x: &mut Exchange) -> Result<()> {
        if x.location.is_some() {
            return self.location_filter(x, Phase::BodyFilter).await;
        }
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
        if x.location.is_some() {
            // Logged where it happened, as below.
            let _ = self.location_filter(x, Phase::Log).await;
        }
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
        let entry = generation.entry.call_filter;
        let push = |s: &Stack| s.get_index(ffi::LUA_REGISTRYINDEX, function as usize);
        let call = || call_once(&generation, entry, push, |s| s.boolean(-1));
        let passed = crate::lua::fast::enter(&mut copy, call);
        match passed {
            Ok(passed) => passed,
            Err(text) => {
                log_error(x, &format!("failed to run filter_func of route {}: {text}", route.id));
                false
            }
        }
    }

    /// Whether a Lua module of this worker gives a variable of that name.
    pub fn gives(&self, name: &str) -> bool {
        registered::knows(name)
    }

    /// A variable that a Lua module gives, for a condition of a route.
    pub fn registered(&self, x: &Exchange, name: &str) -> Option<Vec<u8>> {
        let generation = self.generation.borrow().clone();
        let mut copy = copy_of(x);
        let entry = generation.entry.registered_var;
        let call = || {
            let push = |s: &Stack| s.push_bytes(name);
            call_once(&generation, entry, push, |s| s.bytes(-1).map(<[u8]>::to_vec))
        };
        crate::lua::fast::enter(&mut copy, call).unwrap_or_else(|text| {
            log_error(x, &format!("failed to get the variable {name}: {text}"));
            None
        })
    }

    /// Answers by an uploaded function. `None`: there is no such function.
    pub async fn function(&self, x: &mut Exchange, id: &str) -> Option<Flow> {
        let function = x.snapshot.functions.get(id)?.clone();
        x.phase = Phase::Content;
        let call = Call::new(&function, self.functions.record(&function), roll(x));
        if !call.admits(x) {
            x.log(Level::Error, format!("the body is longer than limits.max_body of function {id} allows").as_bytes());
            return Some(function::ended_with(x, 413));
        }
        let snapshot = x.snapshot.clone();
        let called = self.functions.run(|| self.function_vm(call.purpose(), &snapshot), &call, x).await;
        Some(if called == Flow::Next { Flow::Answer } else { called })
    }

    fn function_vm(&self, purpose: Purpose, snapshot: &Snapshot) -> VmConfig {
        VmConfig { groups: self.groups.clone(), ..self.setup.vm_config(purpose, self.worker, snapshot) }
    }

    /// Ends timers early: the worker stops, or another runner takes over.
    pub fn close(&self) {
        self.generation.borrow().vm.close();
        self.functions.each(|vm| vm.close());
        self.others.each(|vm| vm.close());
    }

    /// Collects garbage in every VM of the worker.
    pub fn collect(&self) {
        self.generation.borrow().vm.collect();
        self.functions.each(|vm| vm.collect());
        self.others.each(|vm| vm.collect());
    }

    /// Timers of scripts that have not ended, in VMs that take no requests any more as well.
    pub fn timers(&self) -> usize {
        let mut open = self.generation.borrow().vm.open_timers();
        self.functions.each(|vm| open += vm.open_timers());
        self.others.each(|vm| open += vm.open_timers());
        open
    }

    /// The request's plan when it has something for `phase`.
    fn at(&self, x: &mut Exchange, phase: Phase) -> Option<(Rc<Plan>, u32)> {
        if !self.mask(x).has(phase) {
            return None;
        }
        let run = run_of(x)?;
        let (plan, slot) = (run.plan()?, run.slot);
        x.phase = phase;
        Some((plan, slot))
    }

    async fn answering(&self, x: &mut Exchange, plan: &Plan, entry: c_int, slot: u32, flag: bool) -> Flow {
        let push = |s: &Stack| push_call(s, entry, plan.anchor, slot, flag);
        let outcome = sched::call(&plan.generation.vm, x, push, read_answer).await;
        let raised = matches!(outcome, Outcome::Failed(_));
        let flow = settle(x, outcome);
        if raised && flow == Flow::Answer {
            self.answer_raised(x, plan, slot);
        }
        flow
    }

    /// A plugin has raised: its `_meta.error_response`, when it has one, is the body.
    fn answer_raised(&self, x: &mut Exchange, plan: &Plan, slot: u32) {
        let generation = &plan.generation;
        let push = |s: &Stack| {
            s.push_number(f64::from(slot));
            1
        };
        match call_once(generation, generation.entry.raised, push, |s| s.bytes(-1).map(<[u8]>::to_vec)) {
            Ok(None) => {}
            Ok(Some(body)) => {
                x.response.source = Source::Gateway;
                x.printed.extend_from_slice(&body);
                output::default_type(x, output::LUA_TYPE);
            }
            Err(text) => log_error(x, &format!("_meta.error_response: {text}")),
        }
    }

    async fn filtering(&self, x: &mut Exchange, plan: &Plan, entry: c_int, slot: u32) -> Result<()> {
        let push = |s: &Stack| push_call(s, entry, plan.anchor, slot, false);
        // A function that sends has the request meanwhile, with the number of its own VM.
        let lent = (x.lua.slot.replace(slot), x.lua.function.take());
        let outcome = sched::call(&plan.generation.vm, x, push, |_| ()).await;
        (x.lua.slot, x.lua.function) = lent;
        match outcome {
            Outcome::Done(()) | Outcome::Exit(_) => Ok(()),
            Outcome::Failed(text) => {
                log_error(x, &format!("failed to run {}: {text}", crate::lua::api::context_name(x.phase)));
                Err(crate::error::Error::script(text).told())
            }
        }
    }

    /// Takes a new snapshot in: a new generation when the plugins changed.
    fn follow(&self, snapshot: &Arc<Snapshot>) {
        if snapshot.version < self.newest.get() || snapshot.version == self.snapshot.get() {
            return;
        }
        self.newest.set(snapshot.version);
        let changed = self.generation.borrow().number != snapshot.plugins_generation;
        let followed = (!changed || self.renew(snapshot)) && !self.generation.borrow().stepped_down.get();
        // Else the next request asks again.
        self.snapshot.set(if followed { snapshot.version } else { NO_SNAPSHOT });
        self.generation.borrow().vm.set_snapshot(snapshot);
    }

    /// Whether the request comes between the plugins that have stepped down and those that follow them: it is to wait (`settled`).
    pub fn is_between(&self, x: &Exchange) -> bool {
        if x.snapshot.version == self.snapshot.get() {
            return false;
        }
        self.follow(&x.snapshot);
        self.generation.borrow().stepped_down.get()
    }

    /// Waits until the new plugins serve, or the old ones do again; so long that it would be worse, and no longer.
    pub async fn settled(&self, x: &Exchange) {
        let begun = Instant::now();
        while self.is_between(x) && begun.elapsed() < end::LONGEST_STEP {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Takes a snapshot over, as a request would, and says whether its plugins are those that run.
    pub fn keeps_up(&self, snapshot: &Arc<Snapshot>) -> bool {
        self.follow(snapshot);
        self.snapshot.get() == snapshot.version
    }

    /// The same for a snapshot whose plugins are other ones; with any other the next request is early enough.
    pub fn has_plugins_of(&self, snapshot: &Arc<Snapshot>) -> bool {
        let (loaded, tried) = (self.generation.borrow().number, self.snapshot.get() == snapshot.version);
        loaded == snapshot.plugins_generation || tried || self.keeps_up(snapshot)
    }

    /// Has another VM serve; requests under way keep theirs.
    fn install(&self, next: Rc<Generation>) {
        self.plans.borrow_mut().clear();
        self.filters.borrow_mut().clear();
        next.inherit(&self.generation.borrow());
        let old = self.generation.replace(next);
        old.vm.close();
        self.others.plugins(&old);
        self.loads.set(self.loads.get() + 1);
        tracing::info!("load plugin times: {}", self.loads.get());
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
        if !generation.broken.is_empty() && generation.refuses(&key, sources) {
            return None;
        }
        let owners = sources.owners(&generation.plugins);
        let plan = match generation.build(&owners, key.watched) {
            Ok(plan) => Rc::new(plan),
            Err(e) => {
                tracing::error!(target: "lua", "failed to prepare plugins: {e}");
                return None;
            }
        };
        if let Some(owner) = owners.last().filter(|owner| !owner.items.is_empty()) {
            let (kinds, ids, version) = (&owner.conf_type, &owner.conf_id, &owner.conf_version);
            tracing::info!(
                "plugins of {kinds} {ids}, conf_version: {version}, by priority: {}",
                plan::names(&owners).join(" ")
            );
        }
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
        let spilled = limits::collect_spilled(&self.generation.borrow().vm);
        let left = self.until_memory_check.get() - 1;
        if left > 0 && !spilled {
            return self.until_memory_check.set(left);
        }
        self.until_memory_check.set(MEMORY_CHECK_EVERY);
        self.generation.borrow().let_go();
        let vm = self.generation.borrow().vm.clone();
        if limits::is_too_large(&vm) {
            let limit = vm.limits().memory_mb;
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
}

/// A VM until it can serve. When its start fails, or is given up, the timers that it has begun end.
struct Starting {
    vm: Rc<Vm>,
    done: bool,
}

impl Starting {
    fn new(vm: Rc<Vm>) -> Starting {
        Starting { vm, done: false }
    }

    fn done(mut self) -> Rc<Vm> {
        self.done = true;
        self.vm.clone()
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        if !self.done {
            self.vm.close();
        }
    }
}

impl Generation {
    async fn load(
        setup: &Setup,
        worker: usize,
        snapshot: &Arc<Snapshot>,
        before: Option<&Rc<Generation>>,
        (groups, ends): (&Rc<Groups>, &Ends),
    ) -> Result<Rc<Generation>> {
        let config = VmConfig { groups: groups.clone(), ..setup.vm_config(Purpose::Plugins, worker, snapshot) };
        let starting = Starting::new(registry::vm(config)?);
        let vm = &starting.vm;
        vm.set_snapshot(snapshot);
        let init = &setup.locations.init;
        if let Some(script) = &init.init {
            start::script(vm, script, Phase::InitByLua).await.map_err(|e| e.context("init_by_lua error"))?;
        }
        let (plugins, broken) = registry::load(vm, setup, snapshot);
        if let Some(before) = before {
            broken.refuse_loss(&before.plugins)?;
        }
        if setup.watching.debug().basic {
            registry::tell(&plugins);
        }
        if let Some(before) = before {
            before.step_down().await;
        }
        let failed = start::init_plugins(vm).await?;
        for (name, text) in &failed {
            tracing::error!(target: "lua", "failed to init plugin [{name}]: {text}");
        }
        setup.inits.note(worker, failed);
        if let Some(script) = &init.init_worker
            && let Err(e) = start::script(vm, script, Phase::Init).await
        {
            tracing::error!("init_worker_by_lua error: {e}");
        }
        let entry = Entry::of(vm)?;
        let scripts = script::Compiled::default();
        let stepped_down = Rc::new(Cell::new(false));
        let alive = Some(ends.after(vm, init.exit_worker.clone(), stepped_down.clone()));
        let number = snapshot.plugins_generation;
        let plans = Cell::new(0);
        let vm = starting.done();
        let generation = Generation {
            vm,
            number,
            plugins,
            broken,
            refused: RefCell::default(),
            entry,
            scripts,
            discover: Cell::default(),
            inherited: RefCell::default(),
            secrets: Cell::default(),
            alive,
            stepped_down,
            runs: Cell::new(0),
            plans,
        };
        let debug = setup.watching.debug();
        if debug.hooks.is_some() {
            generation.hook(&debug);
        }
        Ok(Rc::new(generation))
    }

    /// A VM without plugins, for scripts that are loaded anew for each request. Its `init_by_lua` cannot wait.
    fn bare(setup: &Setup, worker: usize, snapshot: &Arc<Snapshot>, groups: &Rc<Groups>) -> Result<Rc<Generation>> {
        let config = VmConfig { groups: groups.clone(), ..setup.vm_config(Purpose::Plugins, worker, snapshot) };
        let (starting, plugins) = (Starting::new(registry::vm(config)?), Plugins::new());
        let vm = &starting.vm;
        vm.set_snapshot(snapshot);
        if let Some(script) = &setup.locations.init.init {
            vm.run_init(script).map_err(|e| e.context("init_by_lua error"))?;
        }
        let entry = Entry::of(vm)?;
        let (scripts, number) = (script::Compiled::default(), snapshot.plugins_generation);
        let plans = Cell::new(0);
        let vm = starting.done();
        Ok(Rc::new(Generation {
            vm,
            number,
            plugins,
            broken: Broken::default(),
            refused: RefCell::default(),
            entry,
            scripts,
            discover: Cell::default(),
            inherited: RefCell::default(),
            secrets: Cell::default(),
            alive: None,
            stepped_down: Rc::default(),
            runs: Cell::new(0),
            plans,
        }))
    }

    /// Whether a plugin of these is there and does not load. It may be what keeps strangers out.
    fn refuses(&self, key: &Key, sources: &Sources<'_>) -> bool {
        if self.refused.borrow().contains(key) {
            return true;
        }
        let Some((name, owner)) = sources.first_broken(&self.plugins, &self.broken) else { return false };
        tracing::error!(target: "lua", "plugin [{name}] of {owner} does not load: requests for it are answered with 500");
        let mut refused = self.refused.borrow_mut();
        if refused.len() >= MAX_PLANS {
            refused.clear();
        }
        refused.insert(*key)
    }

    /// Makes the Lua lists of `owners`.
    fn build(self: &Rc<Self>, owners: &[Owner], watched: Watched) -> Result<Plan> {
        let mut filters = Vec::new();
        let described = self.describe(owners, &mut filters)?;
        let Watched { noted, hooked, dynamic } = watched;
        let (plan, has): (mlua::Table, String) =
            registry::call(&self.vm, "moongate.run", "build", (described, noted, hooked, dynamic))?;
        let planned = if noted { plan::planned(owners, &self.plugins) } else { Rc::default() };
        let names = plan::names(owners);
        let auth = names.iter().any(|n| self.plugins.get(*n).is_some_and(|p| p.auth));
        let mask = mask_of(&has);
        let prometheus = owners.iter().flat_map(|o| &o.items).find(|i| &*i.conf.name == "prometheus").map(|i| {
            let conf: serde_json::Value = serde_json::from_str(&i.conf.json).unwrap_or_default();
            conf.get("prefer_name").and_then(|v| v.as_bool()).unwrap_or(false)
        });
        let anchor = self.vm.keep(plan)?;
        // Not before it is found a second time: else all plans would be in use at the first sweep.
        let used = Cell::new(false);
        self.plans.set(self.plans.get() + 1);
        Ok(Plan { generation: self.clone(), anchor, mask, auth, filters, prometheus, planned, used })
    }

    fn describe(&self, owners: &[Owner], filters: &mut Vec<Arc<PluginConf>>) -> Result<mlua::Table> {
        let lua = &self.vm.lua;
        let mut make = || -> mlua::Result<mlua::Table> {
            let list = lua.create_table()?;
            for owner in owners {
                let t = lua.create_table()?;
                t.raw_set("global", owner.global)?;
                t.raw_set("name", owner.name())?;
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
    fn of(vm: &Rc<Vm>) -> Result<Entry> {
        // It changes some of the functions.
        let for_all = registry::call(vm, "moongate.run", "go_through", ())?;
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
            raised: f("raised")?,
            registered_var: f("registered_var")?,
            for_all,
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

/// What a function has returned to answer with.
struct Said {
    status: u16,
    body: Vec<u8>,
    /// It is JSON, and says so where nothing else is said.
    json: bool,
}

/// `status, body, is JSON` of a phase that may answer.
fn read_answer(s: &Stack) -> Option<Said> {
    let status = s.number(1)? as u16;
    Some(Said { status, body: s.bytes(2).unwrap_or_default().to_vec(), json: s.boolean(3) })
}

/// nginx closes the connection without a word.
const CLOSE: u16 = 444;

/// What a call's end means for the request.
fn settle(x: &mut Exchange, outcome: Outcome<Option<Said>>) -> Flow {
    let json = matches!(&outcome, Outcome::Done(Some(said)) if said.json);
    let flow = decide(x, outcome);
    if flow == Flow::Answer && !x.response.head_sent && !x.printed.is_empty() {
        output::default_type(x, if json { "application/json" } else { output::LUA_TYPE });
    }
    flow
}

fn decide(x: &mut Exchange, outcome: Outcome<Option<Said>>) -> Flow {
    match outcome {
        Outcome::Done(None) if x.response.ended => Flow::Sent,
        Outcome::Done(None) if x.response.head_sent || !x.printed.is_empty() => Flow::Answer,
        Outcome::Done(None) => Flow::Next,
        Outcome::Done(Some(Said { status: CLOSE, .. })) => exit(x, CLOSE.into()),
        Outcome::Done(Some(Said { status, .. })) if !FINAL.contains(&status) => no_answer(x, status.into()),
        // nginx's own page, as for `ngx.exit(503)`: the proxy makes it where there is no type.
        Outcome::Done(Some(Said { status, body, .. })) if status >= 400 && body.is_empty() && x.printed.is_empty() => {
            x.response.status = status;
            x.response.source = Source::Gateway;
            Flow::Answer
        }
        Outcome::Done(Some(Said { status, body, .. })) => {
            x.response.status = status;
            x.response.source = Source::Gateway;
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

/// Statuses that end a request: behind a 1xx the client waits for another one.
const FINAL: RangeInclusive<u16> = 200..=999;

fn no_answer(x: &mut Exchange, status: i64) -> Flow {
    log_error(x, &format!("{} answered with status {status}", crate::lua::api::context_name(x.phase)));
    failed(x)
}

/// `ngx.exit(status)`
fn exit(x: &mut Exchange, status: i64) -> Flow {
    let begun = x.response.head_sent || !x.printed.is_empty();
    match status {
        _ if x.response.ended => Flow::Sent,
        _ if status == i64::from(CLOSE) => Flow::Close,
        // ngx.OK ends the phase only, unless something was printed.
        0 if !begun => Flow::Next,
        _ if begun => {
            if x.response.status == 0 {
                x.response.status = 200;
            }
            Flow::Answer
        }
        200..=999 => {
            x.response.status = status as u16;
            x.response.source = Source::Gateway;
            Flow::Answer
        }
        100..=199 => no_answer(x, status),
        _ => failed(x),
    }
}

fn failed(x: &mut Exchange) -> Flow {
    x.printed.clear();
    x.response.status = 500;
    x.response.source = Source::Gateway;
    if x.response.head_sent { Flow::Close } else { Flow::Answer }
}

/// Calls a function that is kept in the registry with what `push` pushes, one value, outside a request's coroutine.
fn call_once<T>(
    generation: &Generation,
    entry: c_int,
    push: impl FnOnce(&Stack) -> c_int,
    take: impl FnOnce(&Stack) -> T,
) -> Result<T, String> {
    let vm = &generation.vm;
    let main = vm.main();
    vm.entered(|| {
        // SAFETY: a function kept in the registry is called under lua_pcall; the result is popped.
        limits::bounded(main, vm.limits(), || unsafe {
            let s = Stack::new(main);
            s.get_index(ffi::LUA_REGISTRYINDEX, entry as usize);
            push(&s);
            let rc = ffi::lua_pcall(main, 1, 1, 0);
            let result = match rc {
                ffi::LUA_OK => Ok(take(&s)),
                _ => Err(String::from_utf8_lossy(s.bytes(-1).unwrap_or(b"error")).into_owned()),
            };
            s.pop(1);
            result
        })
    })
}

/// A number that no request can foresee: its id is random.
fn roll(x: &Exchange) -> u32 {
    u32::from_le_bytes([x.id[0], x.id[1], x.id[2], x.id[3]])
}

/// The request's head, for a function that only looks.
fn copy_of(x: &Exchange) -> Exchange {
    let mut copy = Exchange::new(x.conn.clone(), x.snapshot.clone());
    copy.phase = Phase::Access;
    let (from, to) = (&x.request, &mut copy.request);
    to.method.clone_from(&from.method);
    to.target.clone_from(&from.target);
    to.line.clone_from(&from.line);
    to.path.clone_from(&from.path);
    to.args.clone_from(&from.args);
    to.args_set = from.args_set;
    to.host.clone_from(&from.host);
    to.headers.clone_from(&from.headers);
    to.version = from.version;
    to.real_ip = from.real_ip;
    copy
}
