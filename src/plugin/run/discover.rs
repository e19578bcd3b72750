//! Nodes from registries (`apisix.discovery.*`): asked in the worker's own VM, where they keep what they know.

use mlua::ffi;

use super::{Generation, Outcome, Run, Runner, run_of};
use crate::{
    error::{Error, Kind, Result},
    exchange::{Exchange, Phase},
    lua::{Stack, sched},
};

impl Runner {
    /// Has the registry that `x.upstream.conf` names say which nodes it has; they stand there then. An error of origin `Script`
    /// when the registry's code fails, of kind `NoNode` when it knows of none.
    pub async fn discover(&self, x: &mut Exchange) -> Result<()> {
        let Some(upstream) = x.upstream.conf.clone() else { return Ok(()) };
        let generation = run_of(x).map_or_else(|| self.generation.borrow().clone(), Run::generation);
        let vm = &generation.vm;
        let entry = generation.discover()?;
        // Scripts keep what is a request's by its number. One that no plugin runs for has none yet.
        let lent = x.lua.slot.is_none().then(|| vm.take_slot());
        let _clear = lent.map(|slot| Cleared(&generation, slot));
        let phase = std::mem::replace(&mut x.phase, Phase::Access);
        x.lua.slot = x.lua.slot.or(lent);
        let push = |s: &Stack| {
            s.get_index(ffi::LUA_REGISTRYINDEX, entry as usize);
            s.push_number(upstream.uid as f64);
            1
        };
        let outcome = sched::call(vm, x, push, |s| s.bytes(1).map(<[u8]>::to_vec)).await;
        x.phase = phase;
        if lent.is_some() {
            x.lua.slot = None;
            self.check_memory();
        }
        match outcome {
            Outcome::Done(None) => Ok(()),
            Outcome::Done(Some(why)) => {
                let why = String::from_utf8_lossy(&why).into_owned();
                Err(Error::upstream(Kind::NoNode).context(why))
            }
            Outcome::Exit(code) => Err(Error::script(format!("discovery: ngx.exit({code}) ends nothing here"))),
            Outcome::Failed(text) => Err(Error::script(text).context("failed to run discovery")),
        }
    }
}

impl Generation {
    /// Registry reference of what asks registries, found when it is first needed: most gateways have none.
    fn discover(&self) -> Result<i32> {
        if let Some(entry) = self.discover.get() {
            return Ok(entry);
        }
        let entry = self.vm.function("moongate.discovery", "choose")?;
        self.discover.set(Some(entry));
        Ok(entry)
    }
}

/// Clears a number also where the request is dropped half way.
struct Cleared<'a>(&'a Generation, u32);

impl Drop for Cleared<'_> {
    fn drop(&mut self) {
        self.0.vm.clear_slot(self.1);
    }
}
