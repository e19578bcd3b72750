//! What a VM holds now, counted when somebody asks: a leak shows as a number that does not come back to zero.
//!
//! Nothing is counted on the way of a request; the few numbers that cannot be read off are kept where coroutines are made.

use mlua::ffi;
use serde::Serialize;

use super::Vm;

/// What one VM holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Counters {
    /// Strings, tables and code of scripts, garbage that is not collected yet included.
    pub memory_bytes: usize,
    pub coroutines: Coroutines,
    /// `ngx.thread.spawn`: those that run, and those that have ended and nobody has waited for.
    pub light_threads: usize,
    pub timers: Timers,
    pub sockets: Sockets,
    /// Numbers of requests' tables in use: requests whose plugins run, calls of functions, runs of timers.
    pub requests: usize,
}

/// Coroutines that calls run in; those that scripts make themselves are memory only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Coroutines {
    pub idle: usize,
    pub in_use: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Timers {
    pub pending: usize,
    pub running: usize,
}

/// `ngx.socket`: open ones, and idle connections in the pools.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Sockets {
    pub open: usize,
    pub idle: usize,
}

impl Vm {
    pub fn counters(&self) -> Counters {
        let idle = self.idle_coroutines();
        let (running, pending) = self.timers.counts();
        Counters {
            memory_bytes: self.memory_bytes(),
            coroutines: Coroutines { idle, in_use: self.coroutines() - idle },
            light_threads: self.light.borrow().len(),
            timers: Timers { pending, running },
            sockets: Sockets { open: self.sockets.open(), idle: self.sockets.pools.idle() },
            requests: self.slots_in_use(),
        }
    }

    pub fn memory_bytes(&self) -> usize {
        let count = |what| {
            // SAFETY: the state is live as long as the VM, and counting is allowed at any time.
            unsafe { ffi::lua_gc(self.main(), what, 0) as usize }
        };
        count(ffi::LUA_GCCOUNT) * 1024 + count(ffi::LUA_GCCOUNTB)
    }
}

#[cfg(test)]
mod tests {
    use crate::lua::{Vm, VmConfig};

    #[test]
    fn coroutines_are_in_use_until_they_are_given_back_or_forgotten() {
        let vm = Vm::new(VmConfig::default()).expect("a VM");
        let counted = || {
            let coroutines = vm.counters().coroutines;
            (coroutines.idle, coroutines.in_use)
        };
        assert_eq!(counted(), (0, 0));
        let (a, b) = (vm.take_coroutine().expect("one"), vm.take_coroutine().expect("another"));
        assert_eq!(counted(), (0, 2));
        vm.give_back(a);
        assert_eq!(counted(), (1, 1));
        vm.forget(b);
        assert_eq!(counted(), (1, 0));
    }

    #[test]
    fn slots_are_in_use_until_they_are_cleared() {
        let vm = Vm::new(VmConfig::default()).expect("a VM");
        let slots = [vm.take_slot(), vm.take_slot()];
        assert_eq!(vm.counters().requests, 2);
        slots.into_iter().for_each(|slot| vm.clear_slot(slot));
        assert_eq!(vm.counters().requests, 0);
    }
}
