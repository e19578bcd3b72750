//! Uploaded functions: VMs of their own, so that one which is cut off takes no plugin with it.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    ffi::c_int,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use mlua::ffi;
use tokio::time::timeout;

use super::{
    super::{natives, registry},
    Flow,
    counters::{Others, VmState},
    failed, read_answer, settle,
};
use crate::{
    error::{Error, Kind, Result},
    exchange::{Exchange, FunctionCall, RequestBody},
    lua::{Stack, Vm, VmConfig, limits, log_error, sched, vm::Purpose},
    model::{self, Object, Variant},
    observe::functions::{self, Record, Trigger},
};

/// VMs per worker, and as many for trusted functions: one that is cut off or replaced does not stop the others.
const VMS: usize = 2;

/// Functions compiled per VM; past it the VM is replaced.
const MAX_FUNCTIONS: usize = 1024;

/// A call of a function: which text of it runs, within which bounds, and where that is noted.
pub(super) struct Call<'f> {
    pub id: &'f str,
    pub function: &'f model::Function,
    pub variant: Variant,
    pub record: Arc<Record>,
    pub trigger: Trigger,
    /// When it was to run, in seconds since the epoch: a schedule's call.
    pub scheduled_at: Option<i64>,
}

impl<'f> Call<'f> {
    /// Of the text that is chosen by chance: `roll` is a random number.
    pub fn new(function: &'f Object<model::Function>, record: Arc<Record>, roll: u32) -> Call<'f> {
        let variant = function.value.choose(function.uid, roll);
        let trigger = Trigger::Request;
        Call { id: &function.id, function: &function.value, variant, record, trigger, scheduled_at: None }
    }

    /// What kind of VM it runs in.
    pub fn purpose(&self) -> Purpose {
        if self.function.trusted { Purpose::Trusted } else { Purpose::Functions }
    }

    /// Refuses a request's body that is too long, and bounds one that does not say how long it is.
    pub fn admits(&self, x: &mut Exchange) -> bool {
        let max = self.function.limits.max_body;
        let length = match &x.body {
            RequestBody::Streaming { length: None } => {
                if let Some(client) = &mut x.client {
                    client.limit_body(max);
                }
                return true;
            }
            RequestBody::Streaming { length: Some(length) } | RequestBody::File { length, .. } => *length,
            RequestBody::Memory(data) => data.len() as u64,
            _ => 0,
        };
        length <= max
    }

    /// Notes how it ended.
    fn ended(&self, x: &Exchange, took: Duration) {
        let failed = x.response.status >= 500;
        self.record.ended(self.trigger, failed, took);
        if let Some(trial) = &self.variant.canary {
            trial.tried(self.id, failed);
        }
    }
}

/// Functions whose records a worker has at hand.
const MAX_RECORDS: usize = 4096;

/// The VMs of one worker, of either kind.
pub(super) struct Functions {
    /// By the uid of the function's version.
    records: RefCell<HashMap<u64, Arc<Record>>>,
    sandboxed: Pool,
    trusted: Pool,
    /// Functions without a sandbox may run.
    trusts: bool,
    /// Where those go that end.
    others: Rc<Others>,
}

/// VMs that take turns.
#[derive(Default)]
struct Pool {
    vms: RefCell<[Option<Rc<FunctionVm>>; VMS]>,
    turn: Cell<usize>,
}

/// A function in the VM whose turn it is.
pub(super) struct Ready {
    at: usize,
    vm: Rc<FunctionVm>,
    callable: c_int,
}

impl Functions {
    pub fn new(others: Rc<Others>, trusts: bool) -> Self {
        Functions { records: RefCell::default(), sandboxed: Pool::default(), trusted: Pool::default(), trusts, others }
    }

    /// Where a function's calls are noted. Asking for it by name takes a lock that all workers share.
    pub fn record(&self, function: &Object<model::Function>) -> Arc<Record> {
        let mut records = self.records.borrow_mut();
        if records.len() >= MAX_RECORDS {
            records.clear();
        }
        records.entry(function.uid).or_insert_with(|| functions::record(&function.id)).clone()
    }

    fn pool(&self, call: &Call<'_>) -> &Pool {
        if call.function.trusted { &self.trusted } else { &self.sandboxed }
    }

    /// Runs a call to its end and notes what came of it. `config`: how to make a VM.
    pub async fn run(&self, config: impl FnOnce() -> VmConfig, call: &Call<'_>, x: &mut Exchange) -> Flow {
        let begun = Instant::now();
        let noted = x.lua.function.replace(Rc::new(FunctionCall::new(call.record.clone(), &call.function.limits)));
        let flow = match self.prepare(config, call) {
            Ok(ready) => self.call(ready, call, x).await,
            Err(e) => {
                log_error(x, &format!("function {}: {e}", call.id));
                failed(x)
            }
        };
        x.lua.function = noted;
        call.ended(x, begun.elapsed());
        flow
    }

    /// Compiles the function where that was not done before.
    pub fn prepare(&self, config: impl FnOnce() -> VmConfig, call: &Call<'_>) -> Result<Ready> {
        if call.function.trusted && !self.trusts {
            return Err(Error::config(Kind::Invalid).context(registry::UNTRUSTED));
        }
        let pool = self.pool(call);
        let at = pool.turn.get() % VMS;
        pool.turn.set(at + 1);
        let existing = pool.vms.borrow()[at].clone().filter(|vm| vm.compiled.borrow().len() < MAX_FUNCTIONS);
        let vm = match existing {
            Some(vm) => vm,
            None => {
                let vm = Rc::new(FunctionVm::new(config())?);
                if let Some(old) = pool.vms.borrow_mut()[at].replace(vm.clone()) {
                    self.end(&old);
                }
                vm
            }
        };
        let callable = vm.callable(call)?;
        Ok(Ready { at, vm, callable })
    }

    /// Runs it. A VM that was cut off or holds too much afterwards is replaced.
    pub async fn call(&self, ready: Ready, call: &Call<'_>, x: &mut Exchange) -> Flow {
        let Ready { at, vm, callable } = ready;
        vm.vm.set_snapshot(&x.snapshot);
        let (flow, broken) = vm.run(x, callable, call).await;
        if broken {
            self.drop_vm(self.pool(call), at, &vm);
        }
        flow
    }

    pub fn each(&self, mut run: impl FnMut(&Vm)) {
        for pool in [&self.sandboxed, &self.trusted] {
            pool.vms.borrow().iter().flatten().for_each(|vm| run(&vm.vm));
        }
    }

    pub fn each_owner(&self, mut run: impl FnMut(&Rc<FunctionVm>)) {
        for pool in [&self.sandboxed, &self.trusted] {
            pool.vms.borrow().iter().flatten().for_each(&mut run);
        }
    }

    fn drop_vm(&self, pool: &Pool, at: usize, broken: &Rc<FunctionVm>) {
        let mut vms = pool.vms.borrow_mut();
        if vms[at].as_ref().is_some_and(|vm| Rc::ptr_eq(vm, broken)) {
            vms[at] = None;
            self.end(broken);
        }
    }

    /// It takes no calls any more; those that run in it go on.
    fn end(&self, old: &Rc<FunctionVm>) {
        old.vm.close();
        self.others.functions(old);
    }

    /// What the VMs hold that take calls.
    pub fn states(&self) -> Vec<VmState> {
        let mut states = Vec::new();
        for pool in [&self.sandboxed, &self.trusted] {
            states.extend(pool.vms.borrow().iter().flatten().map(|vm| vm.state(true)));
        }
        states
    }
}

/// A VM for uploaded functions.
pub(super) struct FunctionVm {
    pub(super) vm: Rc<Vm>,
    call: c_int,
    /// uid of a function's text -> registry reference of what to call.
    compiled: RefCell<HashMap<u64, c_int>>,
}

impl Drop for FunctionVm {
    fn drop(&mut self) {
        // One that a request has made after its runner was replaced: nobody else does.
        self.vm.close();
    }
}

impl FunctionVm {
    pub(super) fn new(config: VmConfig) -> Result<FunctionVm> {
        let vm = Vm::with(config, &[natives::register])?;
        let call = vm.function("moongate.run", "call_function")?;
        Ok(FunctionVm { vm, call, compiled: RefCell::default() })
    }

    pub(super) fn state(&self, serving: bool) -> VmState {
        VmState { functions: self.compiled.borrow().len(), ..VmState::of(&self.vm, serving) }
    }

    pub(super) fn callable(&self, call: &Call<'_>) -> Result<c_int> {
        if let Some(known) = self.compiled.borrow().get(&call.variant.uid) {
            return Ok(*known);
        }
        let source = &*call.variant.source;
        let env = call.function.env.iter().map(|(name, value)| (&**name, &**value));
        let env = self.vm.lua.create_table_from(env).map_err(crate::lua::api::script)?;
        let (chunk, reason): (Option<mlua::Function>, Option<String>) =
            registry::call(&self.vm, "moongate.functions", "load", (call.id, source, env))?;
        let Some(chunk) = chunk else { return Err(Error::script(reason.unwrap_or_default())) };
        let callable: mlua::Function = registry::call(&self.vm, "moongate.functions", "callable", chunk)?;
        let anchor = self.vm.keep(callable)?;
        self.compiled.borrow_mut().insert(call.variant.uid, anchor);
        Ok(anchor)
    }

    /// Runs a call within its bounds; says whether the VM must not take another one.
    pub(super) async fn run(&self, x: &mut Exchange, callable: c_int, call: &Call<'_>) -> (Flow, bool) {
        let bounds = x.lua.function.clone();
        if let Some(bounds) = &bounds {
            bounds.held_kb.set(limits::memory_kb(&self.vm));
        }
        let (begun, longest) = (Instant::now(), call.function.limits.timeout);
        let called = timeout(longest, self.call(x, callable, call)).await;
        let condemned = limits::last_run_condemned();
        let greedy = bounds.is_some_and(|bounds| bounds.left_kb.get() == 0);
        let late = called.is_err() || condemned && begun.elapsed() >= longest;
        let flow = match called {
            _ if late => {
                let ms = longest.as_millis();
                log_error(x, &format!("function {} took longer than limits.timeout_ms ({ms}) allows", call.id));
                ended_with(x, 504)
            }
            Ok(_) if greedy && !condemned => {
                let mb = call.function.limits.memory_mb;
                log_error(x, &format!("function {} took more memory than limits.memory_mb ({mb}) allows", call.id));
                ended_with(x, 500)
            }
            Ok(flow) => flow,
            // Late, and so met above.
            Err(_) => failed(x),
        };
        (flow, condemned || greedy || limits::is_too_large(&self.vm))
    }

    async fn call(&self, x: &mut Exchange, callable: c_int, call: &Call<'_>) -> Flow {
        let lent = Lent::new(x, &self.vm);
        let slot = lent.slot;
        let push = |s: &Stack| {
            s.get_index(ffi::LUA_REGISTRYINDEX, self.call as usize);
            s.get_index(ffi::LUA_REGISTRYINDEX, callable as usize);
            s.push_number(f64::from(slot));
            s.push_bytes(call.id);
            s.push_number(call.variant.revision as f64);
            match call.scheduled_at {
                Some(at) => s.push_number(at as f64),
                None => s.push_nil(),
            };
            5
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

/// What came of the call is not the answer: this status is, where one can still be given.
pub(super) fn ended_with(x: &mut Exchange, status: u16) -> Flow {
    let flow = failed(x);
    x.response.status = status;
    flow
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
    use super::*;
    use crate::lua::sched::background;

    fn config() -> VmConfig {
        VmConfig { purpose: Purpose::Functions, ..VmConfig::default() }
    }

    fn function(n: usize) -> Object<model::Function> {
        let source = format!("return function() return 200, '{n}' end").into();
        let (id, json) = ("f".into(), "{}".into());
        let value = model::Function { source, ..model::Function::default() };
        Object { id, uid: n as u64, create_revision: 1, mod_revision: 1, json, value }
    }

    #[test]
    fn records_at_hand_are_bounded() {
        let functions = Functions::new(Rc::default(), true);
        (0..MAX_RECORDS).for_each(|n| drop(functions.record(&function(n))));
        assert_eq!(functions.records.borrow().len(), MAX_RECORDS);
        functions.record(&function(MAX_RECORDS));
        assert_eq!(functions.records.borrow().len(), 1);
    }

    #[test]
    fn a_vm_full_of_functions_is_replaced_and_its_calls_go_on() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
        tokio::task::LocalSet::new().block_on(&runtime, async {
            let functions = Functions::new(Rc::default(), true);
            let prepare = |n| functions.prepare(config, &Call::new(&function(n), Arc::default(), 0)).expect("compiles");
            let known = |at: usize| functions.sandboxed.vms.borrow()[at].as_ref().map(|vm| vm.compiled.borrow().len());
            let old = prepare(0);
            // The VMs take turns.
            for n in 1..VMS * MAX_FUNCTIONS {
                prepare(n);
            }
            assert_eq!((0..VMS).map(known).collect::<Vec<_>>(), [Some(MAX_FUNCTIONS); VMS]);
            let new = prepare(VMS * MAX_FUNCTIONS);
            assert!(!Rc::ptr_eq(&old.vm, &new.vm));
            assert_eq!((known(0), known(1)), (Some(1), Some(MAX_FUNCTIONS)));
            for (ready, body) in [(old, "0"), (new, "2048")] {
                let mut x = background(&ready.vm.vm);
                let function = function(0);
                assert_eq!(functions.call(ready, &Call::new(&function, Arc::default(), 0), &mut x).await, Flow::Answer);
                assert_eq!((x.response.status, &*x.printed), (200, body.as_bytes()));
            }
            assert_eq!(known(0), Some(1), "the end of a call in the old one leaves the new one alone");
        });
    }
}
