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

/// What is inherited is bounded as what a VM remembers itself (`moongate.discovery`): upstreams, and nodes of all of them.
const MAX_UPSTREAMS: usize = 4096;
const MAX_NODES: usize = 200_000;

type Nodes = HashMap<u64, Arc<Upstream>>;

/// What the VM before has found, by `Upstream::uid`.
#[derive(Clone, Default)]
pub(super) struct Inherited {
    found: Nodes,
    until: Option<Instant>,
}

impl Inherited {
    /// What the next VM inherits: what this one has `found` itself, else what it has inherited and still counts. That counts anew: where
    /// plugins change twice while a registry is asked once, the VM between them has found nothing.
    fn handed_on(&self, mut found: Nodes, now: Instant) -> Inherited {
        let older = self.until.is_some_and(|until| now < until).then_some(&self.found);
        let mut nodes: usize = found.values().map(|upstream| upstream.nodes.len()).sum();
        for (uid, upstream) in older.into_iter().flatten() {
            if found.contains_key(uid) {
                continue;
            }
            nodes += upstream.nodes.len();
            if found.len() >= MAX_UPSTREAMS || nodes > MAX_NODES {
                break;
            }
            found.insert(*uid, upstream.clone());
        }
        let until = (!found.is_empty()).then(|| now + INHERITED);
        Inherited { found, until }
    }

    fn let_go(&mut self, now: Instant) {
        if self.until.is_some_and(|until| until <= now) {
            *self = Inherited::default();
        }
    }
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
        generation.let_go();
        let push = |s: &Stack| {
            s.get_index(ffi::LUA_REGISTRYINDEX, entry as usize);
            s.push_number(upstream.uid as f64);
            1
        };
        let lent = Lent::to(&generation, x);
        let is_lent = lent.slot.is_some();
        let outcome = sched::call(vm, lent.x, push, |s| s.bytes(1).map(|why| (why.to_vec(), s.boolean(2)))).await;
        drop(lent);
        if is_lent {
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
    /// Takes over what the VM before this one has found or inherited.
    pub(super) fn inherit(&self, before: &Generation) {
        let found = before.found();
        *self.inherited.borrow_mut() = before.inherited.borrow().handed_on(found, Instant::now());
    }

    /// What this VM itself has found.
    fn found(&self) -> Nodes {
        if self.discover.get().is_none() {
            return Nodes::default();
        }
        let handles: Result<mlua::Table> = registry::call(&self.vm, "moongate.discovery", "handles", ());
        let Ok(handles) = handles else { return Nodes::default() };
        let pairs = handles.pairs::<f64, mlua::UserDataRef<Found>>().flatten();
        pairs.map(|(uid, found)| (uid as u64, found.0.clone())).collect()
    }

    /// Forgets what is inherited once its time is over.
    pub(super) fn let_go(&self) {
        if self.inherited.borrow().until.is_some() {
            self.inherited.borrow_mut().let_go(Instant::now());
        }
    }

    fn inherited(&self, uid: u64) -> Option<Arc<Upstream>> {
        self.let_go();
        self.inherited.borrow().found.get(&uid).cloned()
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

/// A request while a registry is asked for it: in the access phase and, where no plugin runs for it, with a number, since scripts keep
/// what is a request's by its number. Gives both back also where the request is dropped half way.
struct Lent<'a> {
    generation: &'a Generation,
    x: &'a mut Exchange,
    phase: Phase,
    slot: Option<u32>,
}

impl<'a> Lent<'a> {
    fn to(generation: &'a Generation, x: &'a mut Exchange) -> Lent<'a> {
        let slot = x.lua.slot.is_none().then(|| generation.vm.take_slot());
        x.lua.slot = x.lua.slot.or(slot);
        let phase = std::mem::replace(&mut x.phase, Phase::Access);
        Lent { generation, x, phase, slot }
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        self.x.phase = self.phase;
        if let Some(slot) = self.slot {
            self.x.lua.slot = None;
            self.generation.vm.clear_slot(slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::upstream::Node;

    fn of_nodes(count: usize) -> Arc<Upstream> {
        let node = Node { host: "a".into(), ip: None, port: 80, explicit_port: true, weight: 1, priority: 0 };
        Arc::new(Upstream::of_nodes(std::iter::repeat_n(node, count)))
    }

    #[test]
    fn what_was_inherited_is_handed_on_while_it_counts() {
        let (start, old, new) = (Instant::now(), of_nodes(1), of_nodes(1));
        let first = Inherited::default().handed_on([(1, old.clone()), (2, old.clone())].into(), start);
        let just = start + INHERITED - Duration::from_millis(1);
        let mut second = first.handed_on([(2, new.clone())].into(), just);
        assert!(Arc::ptr_eq(&second.found[&1], &old) && Arc::ptr_eq(&second.found[&2], &new));
        second.let_go(start + INHERITED);
        assert_eq!(second.found.len(), 2, "it counts anew");
        second.let_go(just + INHERITED);
        assert!(second.found.is_empty() && second.until.is_none());
        let late = first.handed_on([(2, new)].into(), start + INHERITED);
        assert_eq!(late.found.keys().collect::<Vec<_>>(), [&2]);
    }

    #[test]
    fn what_is_handed_on_is_bounded() {
        let (now, one) = (Instant::now(), of_nodes(1));
        let all: Nodes = (0..MAX_UPSTREAMS as u64).map(|uid| (uid, one.clone())).collect();
        let full = Inherited::default().handed_on(all, now);
        let next = full.handed_on([(u64::MAX, one.clone())].into(), now);
        assert!(next.found.len() == MAX_UPSTREAMS && next.found.contains_key(&u64::MAX));
        let next = full.handed_on([(u64::MAX, of_nodes(MAX_NODES - 1))].into(), now);
        assert_eq!(next.found.len(), 2, "room for one more node");
    }
}
