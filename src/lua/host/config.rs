//! `native.config`: the configuration that is served now, by key, for `apisix.core.config`.
//!
//! Not the running request's: an object of `core.config.new` belongs to the VM and follows what is published.

use std::{sync::Arc, time::Duration};

use smallvec::smallvec;

use super::{Answer, store::published};
use crate::{
    error::Result,
    lua::{
        api::{Api, Phases, Raise, Stack, Wait},
        sched::{Op, Value},
        vm,
    },
    store::snapshot::is_in,
};

/// A wait for a change ends after so long without one; whoever waits begins anew.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

pub(super) fn register(api: &mut Api) -> Result<()> {
    let doc = "keys(dir) -> array of keys, version: what is stored in a directory, in order; no key before the store is open.";
    api.func("native.config.keys", Phases::ANY, doc, keys)?;
    let doc = "entry(key) -> value, created, modified | nil: the stored text of what is served under a key.";
    api.func("native.config.entry", Phases::ANY, doc, entry)?;
    api.func(
        "native.config.changed",
        Phases::ANY,
        "changed(dir, version) -> array of keys | nil, version: what changed in a directory after that version; nil: look at all.",
        changed,
    )?;
    let doc =
        "wait(version) -> version | nil: until another version is served, at most a minute; nil: the VM is to end.";
    api.wait("native.config.wait", Phases::TIMER, doc, wait)
}

fn keys(s: &Stack) -> Answer {
    let dir = s.arg_str(1)?;
    let now = published().map(|p| p.load());
    push_keys(s, now.as_ref().map_or_else(Vec::new, |now| now.keys_in(&dir)).iter());
    s.push_number(now.map_or(0, |now| now.version) as f64);
    Ok(2)
}

fn push_keys<'a>(s: &Stack, keys: impl Iterator<Item = &'a Arc<str>>) {
    s.push_table(0, 0);
    for (i, key) in keys.enumerate() {
        s.push_bytes(key.as_bytes());
        s.set_index(-2, i + 1);
    }
}

fn entry(s: &Stack) -> Answer {
    let key = s.arg_str(1)?;
    let now = published().map(|p| p.load());
    let Some(stored) = now.as_ref().and_then(|now| now.at(&key)) else { return Ok(s.push_nil()) };
    s.push_bytes(stored.json.as_bytes());
    s.push_number(stored.created as f64);
    s.push_number(stored.modified as f64);
    Ok(3)
}

fn changed(s: &Stack) -> Answer {
    let (dir, version) = (s.arg_str(1)?, s.arg_number(2)?);
    let Some(published) = published() else {
        push_keys(s, std::iter::empty());
        s.push_number(version);
        return Ok(2);
    };
    let (now, keys) = published.changed_since(version as u64);
    match keys {
        Some(keys) => push_keys(s, keys.iter().filter(|key| is_in(key, &dir))),
        None => drop(s.push_nil()),
    }
    s.push_number(now.version as f64);
    Ok(2)
}

fn wait(s: &Stack) -> Result<Wait, Raise> {
    let seen = s.arg_number(1)? as u64;
    let vm = vm::current().ok_or("no VM runs")?;
    let Some(published) = published() else { return Ok(Wait::Ready(s.push_nil())) };
    Ok(Wait::Park(Op::future(async move {
        // Before the look, so that no change falls between.
        let mut changes = published.subscribe();
        let other = async { while published.version() == seen && changes.changed().await.is_ok() {} };
        tokio::select! {
            () = vm.timers.closed() => return smallvec![Value::Nil],
            _ = tokio::time::timeout(LONGEST_WAIT, other) => {}
        }
        smallvec![Value::Number(published.version() as f64)]
    })))
}
