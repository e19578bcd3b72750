//! Uploaded functions: sandboxed VMs of their own, so that one which is cut off takes no plugin with it.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    ffi::c_int,
    rc::Rc,
};

use mlua::ffi;

use super::{
    super::{natives, registry},
    Flow,
    counters::{Others, VmState},
    read_answer, settle,
};
use crate::{
    error::Result,
    exchange::Exchange,
    lua::{Stack, Vm, VmConfig, limits, sched},
    model::{self, Object},
};

/// VMs per worker: one that is cut off or replaced does not stop the others.
const VMS: usize = 2;

/// Functions compiled per VM; past it the VM is replaced.
const MAX_FUNCTIONS: usize = 1024;

/// The VMs of one worker, which take turns.
pub(super) struct Functions {
    vms: RefCell<[Option<Rc<FunctionVm>>; VMS]>,
    turn: Cell<usize>,
    /// Where those go that end.
    others: Rc<Others>,
}

/// A function in the VM whose turn it is.
pub(super) struct Ready {
    at: usize,
    vm: Rc<FunctionVm>,
    callable: c_int,
}

impl Functions {
    pub fn new(others: Rc<Others>) -> Self {
        Functions { vms: RefCell::default(), turn: Cell::new(0), others }
    }

    /// Compiles the function where that was not done before. `config`: how to make a VM.
    pub fn prepare(&self, config: impl FnOnce() -> VmConfig, function: &Object<model::Function>) -> Result<Ready> {
        let at = self.turn.get() % VMS;
        self.turn.set(at + 1);
        let existing = self.vms.borrow()[at].clone().filter(|vm| vm.compiled.borrow().len() < MAX_FUNCTIONS);
        let vm = match existing {
            Some(vm) => vm,
            None => {
                let vm = Rc::new(FunctionVm::new(config())?);
                if let Some(old) = self.vms.borrow_mut()[at].replace(vm.clone()) {
                    self.end(&old);
                }
                vm
            }
        };
        let callable = vm.callable(function)?;
        Ok(Ready { at, vm, callable })
    }

    /// Runs it. A VM that was cut off or holds too much afterwards is replaced.
    pub async fn call(&self, ready: Ready, x: &mut Exchange) -> Flow {
        let Ready { at, vm, callable } = ready;
        vm.vm.set_snapshot(&x.snapshot);
        let flow = vm.call(x, callable).await;
        if limits::last_run_condemned() || limits::memory_mb(&vm.vm) > vm.vm.limits().memory_mb {
            self.drop_vm(at, &vm);
        }
        flow
    }

    pub fn each(&self, mut run: impl FnMut(&Vm)) {
        self.vms.borrow().iter().flatten().for_each(|vm| run(&vm.vm));
    }

    pub fn each_owner(&self, run: impl FnMut(&Rc<FunctionVm>)) {
        self.vms.borrow().iter().flatten().for_each(run);
    }

    fn drop_vm(&self, at: usize, broken: &Rc<FunctionVm>) {
        let mut vms = self.vms.borrow_mut();
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
        self.vms.borrow().iter().flatten().map(|vm| vm.state(true)).collect()
    }
}

/// A sandboxed VM for uploaded functions.
pub(super) struct FunctionVm {
    pub(super) vm: Rc<Vm>,
    call: c_int,
    /// uid of a function's version -> registry reference of what to call.
    compiled: RefCell<HashMap<u64, c_int>>,
}

impl Drop for FunctionVm {
    fn drop(&mut self) {
        // One that a request has made after its runner was replaced: nobody else does.
        self.vm.close();
    }
}

impl FunctionVm {
    fn new(config: VmConfig) -> Result<FunctionVm> {
        let vm = Vm::with(config, &[natives::register])?;
        let call = vm.function("moongate.run", "call_function")?;
        Ok(FunctionVm { vm, call, compiled: RefCell::default() })
    }

    pub(super) fn state(&self, serving: bool) -> VmState {
        VmState { functions: self.compiled.borrow().len(), ..VmState::of(&self.vm, serving) }
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
    use super::*;
    use crate::lua::{sched::background, vm::Purpose};

    fn config() -> VmConfig {
        VmConfig { purpose: Purpose::Functions, ..VmConfig::default() }
    }

    fn function(n: usize) -> Object<model::Function> {
        let source = format!("return function() return 200, '{n}' end").into();
        let (id, json) = ("f".into(), "{}".into());
        Object { id, uid: n as u64, create_revision: 1, mod_revision: 1, json, value: model::Function { source } }
    }

    #[test]
    fn a_vm_full_of_functions_is_replaced_and_its_calls_go_on() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
        tokio::task::LocalSet::new().block_on(&runtime, async {
            let functions = Functions::new(Rc::default());
            let prepare = |n| functions.prepare(config, &function(n)).expect("compiles");
            let known = |at: usize| functions.vms.borrow()[at].as_ref().map(|vm| vm.compiled.borrow().len());
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
                assert_eq!(functions.call(ready, &mut x).await, Flow::Answer);
                assert_eq!((x.response.status, &*x.printed), (200, body.as_bytes()));
            }
            assert_eq!(known(0), Some(1), "the end of a call in the old one leaves the new one alone");
        });
    }
}
