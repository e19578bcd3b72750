//! Endpoints that plugins offer in the control API (`control_api`), run in a worker's own VM: they see what its plugins keep.

use std::{ffi::c_int, rc::Rc};

use mlua::ffi;

use super::{Flow, Runner, read_answer, settle};
use crate::{
    exchange::{Exchange, Phase},
    lua::{Stack, Vm, log_error, sched},
};

/// What a call has of its VM.
struct Lent {
    vm: Rc<Vm>,
    slot: u32,
    entry: c_int,
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.vm.clear_slot(self.slot);
        self.vm.release(self.entry);
    }
}

impl Runner {
    /// Answers the request, whose status, headers and `printed` it fills. False: no plugin has an endpoint there.
    pub async fn control(&self, x: &mut Exchange) -> bool {
        if x.snapshot.version != self.snapshot.get() {
            self.follow(&x.snapshot);
        }
        let generation = self.generation.borrow().clone();
        let vm = &generation.vm;
        let entry = match vm.function("apisix.control.router", "serve") {
            Ok(entry) => entry,
            Err(e) => {
                log_error(x, &format!("endpoints of plugins: {e}"));
                return false;
            }
        };
        x.phase = Phase::Content;
        // Given back also where whoever asked has gone, and this is dropped half way.
        let lent = Lent { vm: vm.clone(), slot: vm.take_slot(), entry };
        let slot = lent.slot;
        x.lua.slot = Some(slot);
        let push = |s: &Stack| {
            s.get_index(ffi::LUA_REGISTRYINDEX, entry as usize);
            s.push_number(f64::from(slot));
            1
        };
        let outcome = sched::call(vm, x, push, read_answer).await;
        x.lua.slot = None;
        drop(lent);
        settle(x, outcome) != Flow::Next
    }
}
