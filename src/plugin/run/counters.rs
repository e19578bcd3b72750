//! What the VMs of a worker hold, those that still end included.

use std::{
    cell::RefCell,
    rc::{Rc, Weak},
};

use serde::Serialize;

use super::{Generation, Runner, function::FunctionVm};
use crate::lua::{Counters, Vm, vm::Purpose};

/// One VM of a worker.
#[derive(Debug, Serialize)]
pub struct VmState {
    pub purpose: &'static str,
    /// Takes new requests. Else it ends with what runs in it.
    pub serving: bool,
    #[serde(flatten)]
    pub counters: Counters,
    /// Plans of plugins.
    pub plans: usize,
    /// Compiled scripts of locations and `filter_func`s.
    pub scripts: usize,
    /// Compiled uploaded functions.
    pub functions: usize,
}

impl VmState {
    pub fn of(vm: &Vm, serving: bool) -> VmState {
        let purpose = match vm.config.purpose {
            Purpose::Functions => "functions",
            Purpose::Trusted => "trusted_functions",
            Purpose::Plugins | Purpose::Check | Purpose::Thread => "plugins",
        };
        VmState { purpose, serving, counters: vm.counters(), plans: 0, scripts: 0, functions: 0 }
    }
}

impl Generation {
    fn state(&self, serving: bool) -> VmState {
        let (plans, scripts) = (self.plans.get(), self.scripts.len());
        VmState { plans, scripts, ..VmState::of(&self.vm, serving) }
    }
}

impl Runner {
    /// What each VM holds now: the plugins', the functions', then those that take no new requests.
    pub fn states(&self) -> Vec<VmState> {
        let mut plugins = self.generation.borrow().state(true);
        plugins.scripts += self.filters.borrow().values().flatten().count();
        let mut states = vec![plugins];
        states.extend(self.functions.states());
        states.extend(self.others.states());
        states
    }
}

/// VMs that take no new requests: each is there until the last request, timer or wait in it has ended.
#[derive(Default)]
pub(super) struct Others(RefCell<Vec<Other>>);

struct Other {
    /// A timer may outlive the owner.
    vm: Weak<Vm>,
    owner: Owner,
}

enum Owner {
    Plugins(Weak<Generation>),
    Functions(Weak<FunctionVm>),
}

impl Others {
    pub fn plugins(&self, generation: &Rc<Generation>) {
        self.push(&generation.vm, Owner::Plugins(Rc::downgrade(generation)));
    }

    pub fn functions(&self, functions: &Rc<FunctionVm>) {
        self.push(&functions.vm, Owner::Functions(Rc::downgrade(functions)));
    }

    fn push(&self, vm: &Rc<Vm>, owner: Owner) {
        let mut list = self.0.borrow_mut();
        list.retain(|other| other.vm.strong_count() > 0);
        list.push(Other { vm: Rc::downgrade(vm), owner });
    }

    pub fn each(&self, mut run: impl FnMut(&Vm)) {
        let live: Vec<_> = self.0.borrow().iter().filter_map(|other| other.vm.upgrade()).collect();
        live.iter().for_each(|vm| run(vm));
    }

    fn states(&self) -> Vec<VmState> {
        self.0.borrow().iter().filter_map(Other::state).collect()
    }
}

impl Other {
    fn state(&self) -> Option<VmState> {
        let vm = self.vm.upgrade()?;
        let owned = match &self.owner {
            Owner::Plugins(generation) => generation.upgrade().map(|generation| generation.state(false)),
            Owner::Functions(functions) => functions.upgrade().map(|functions| functions.state(false)),
        };
        Some(owned.unwrap_or_else(|| VmState::of(&vm, false)))
    }
}
