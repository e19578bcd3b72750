//! What managers of secrets have (`apisix.secret`): asked for in the worker's own VM, where what they say is kept.

use std::sync::Arc;

use mlua::ffi;

use super::{Generation, Outcome, Runner, discover::Cleared, mock::nobodys};
use crate::{
    error::{Error, Kind, Result},
    exchange::Phase,
    lua::{Stack, sched},
    store::Snapshot,
};

impl Runner {
    /// The text that a reference stands for, for what is no request. What is known costs a call; else its manager is asked, which
    /// waits. The error says why there is none: of kind `NotFound` when the manager has none or cannot be asked, of origin `Script` when
    /// its code fails.
    pub async fn secret(&self, reference: &str, snapshot: &Arc<Snapshot>) -> Result<Box<str>> {
        if snapshot.version != self.snapshot.get() {
            self.follow(snapshot);
        }
        let generation = self.generation.borrow().clone();
        let entry = generation.secrets()?;
        let slot = generation.vm.take_slot();
        let _clear = Cleared(&generation, slot);
        let mut x = nobodys(snapshot);
        (x.phase, x.lua.slot) = (Phase::Timer, Some(slot));
        let push = |s: &Stack| {
            s.get_index(ffi::LUA_REGISTRYINDEX, entry as usize);
            s.push_bytes(reference.as_bytes());
            1
        };
        let read = |s: &Stack| (s.bytes(1).map(<[u8]>::to_vec), s.bytes(2).unwrap_or_default().to_vec());
        let outcome = sched::call(&generation.vm, &mut x, push, read).await;
        self.check_memory();
        match outcome {
            Outcome::Done((Some(text), _)) => {
                String::from_utf8(text).map(Into::into).map_err(|_| none("it is not UTF-8"))
            }
            Outcome::Done((None, why)) => Err(none(&String::from_utf8_lossy(&why))),
            Outcome::Exit(code) => Err(Error::script(format!("ngx.exit({code}) ends nothing here"))),
            Outcome::Failed(text) => Err(Error::script(text)),
        }
    }
}

fn none(why: &str) -> Error {
    Error::config(Kind::NotFound).context(why.to_owned())
}

impl Generation {
    /// Registry reference of what asks, found when it is first needed: most gateways have no such reference in a certificate.
    fn secrets(&self) -> Result<i32> {
        if let Some(entry) = self.secrets.get() {
            return Ok(entry);
        }
        let entry = self.vm.function("moongate.secrets", "text")?;
        self.secrets.set(Some(entry));
        Ok(entry)
    }
}
