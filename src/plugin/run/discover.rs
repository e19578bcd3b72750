//! Nodes from registries (`apisix.discovery.*`): asked in the worker's own VM, where they keep what they know.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use hashbrown::HashMap;
use mlua::ffi;

use super::{Generation, Outcome, Run, Runner, mock::nobodys, registry, run_of};
use crate::{
    error::{Error, Kind, Result},
    exchange::{Exchange, Phase},
    lua::{Stack, host::discovery::Found, sched},
    model::Upstream,
};

/// For so long what the VM before has found counts where a registry does not know yet: one that is filled by a timer begins anew with
/// each VM, and plugins may change at any time. As long as most poll.
const INHERITED: Duration = Duration::from_secs(30);

/// What the VM before has found, by `Upstream::uid`.
#[derive(Clone, Default)]
pub(super) struct Inherited {
    found: HashMap<u64, Arc<Upstream>>,
    until: Option<Instant>,
}

impl Runner {
    /// The upstream with the nodes that its registry has, for what is no request. Errors as those of `discover`.
    pub async fn nodes_of(&self, upstream: Arc<Upstream>) -> Result<Arc<Upstream>> {
        let snapshot = self.generation.borrow().vm.snapshot();
        let mut x = nobodys(&snapshot);
        x.upstream.conf = Some(upstream.clone());
        self.discover(&mut x).await?;
        Ok(x.upstream.conf.take().unwrap_or(upstream))
    }

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
        let outcome = sched::call(vm, x, push, |s| s.bytes(1).map(|why| (why.to_vec(), s.boolean(2)))).await;
        x.phase = phase;
        if lent.is_some() {
            x.lua.slot = None;
            self.check_memory();
        }
        match outcome {
            Outcome::Done(None) => Ok(()),
            Outcome::Done(Some((why, is_unknown))) => {
                if let Some(found) = generation.inherited(upstream.uid).filter(|_| is_unknown) {
                    x.upstream.conf = Some(found);
                    return Ok(());
                }
                let why = String::from_utf8_lossy(&why).into_owned();
                Err(Error::upstream(Kind::NoNode).context(why))
            }
            Outcome::Exit(code) => Err(Error::script(format!("discovery: ngx.exit({code}) ends nothing here"))),
            Outcome::Failed(text) => Err(Error::script(text).context("failed to run discovery")),
        }
    }
}

impl Generation {
    /// Takes over what the VM before this one has found.
    pub(super) fn inherit(&self, before: &Generation) {
        if before.discover.get().is_none() {
            // It was asked nothing in its time: what it has inherited passes by it.
            *self.inherited.borrow_mut() = before.inherited.borrow().clone();
            return;
        }
        let handles: Result<mlua::Table> = registry::call(&before.vm, "moongate.discovery", "handles", ());
        let Ok(handles) = handles else { return };
        let found =
            handles.pairs::<f64, mlua::UserDataRef<Found>>().flatten().map(|(uid, f)| (uid as u64, f.0.clone()));
        let until = Instant::now() + INHERITED;
        *self.inherited.borrow_mut() = Inherited { found: found.collect(), until: Some(until) };
    }

    fn inherited(&self, uid: u64) -> Option<Arc<Upstream>> {
        let mut inherited = self.inherited.borrow_mut();
        if inherited.until? <= Instant::now() {
            *inherited = Inherited::default();
        }
        inherited.found.get(&uid).cloned()
    }

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
pub(super) struct Cleared<'a>(pub &'a Generation, pub u32);

impl Drop for Cleared<'_> {
    fn drop(&mut self) {
        self.0.vm.clear_slot(self.1);
    }
}
