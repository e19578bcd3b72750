//! `ngx.worker`: the process and its workers.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::{
    error::Result,
    lua::api::{Api, Phases},
};

static COUNT: AtomicUsize = AtomicUsize::new(1);

/// How many workers serve: `ngx.worker.count()`.
pub fn set_count(count: usize) {
    COUNT.store(count.max(1), Ordering::Relaxed);
}

pub fn register(api: &mut Api) -> Result<()> {
    let any = Phases::ANY;
    api.func("ngx.worker.pid", any, "pid(): of the process, which all workers share", |s| {
        Ok(s.push_number(std::process::id().into()))
    })?;
    api.func("ngx.worker.pids", any, "pids(): a list", |s| {
        s.push_table(1, 0);
        s.push_number(std::process::id().into());
        s.set_index(-2, 1);
        Ok(1)
    })?;
    api.func("ngx.worker.count", any, "count(): workers that serve", |s| {
        Ok(s.push_number(COUNT.load(Ordering::Relaxed) as f64))
    })
}
