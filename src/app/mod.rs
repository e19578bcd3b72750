//! Wires it all: configuration to listeners, workers, the two APIs; runs it; drains it.
//!
//! The thread that calls `run` becomes the control thread (`control`): it watches the store, serves the Admin and control
//! APIs and the metrics page, and hears signals. `worker` is one data thread; `listeners` binds what it accepts on. A
//! connection's panic ends that connection; a worker's own ends the process with an error, after a drain: a supervisor
//! starts a whole gateway again, which is better than one that goes on with fewer workers than it was given.

mod asking;
pub mod banner;
mod control;
mod debug;
mod ending;
mod functions;
mod gauges;
mod listeners;
pub mod plugins;
mod reload;
mod settings;
mod worker;

use std::fs;

use tokio::{runtime::Builder, task::LocalSet};

use crate::{
    conf::{Config, Warning},
    error::{Error, Kind, Result},
    lua::{self, ngx},
    observe::capture,
    shdict, tls,
};

/// What is left of the control thread's blocking work when it ends gets this long.
const LAST_WORK: std::time::Duration = std::time::Duration::from_millis(500);

/// Runs the gateway until a signal ends it.
pub fn run(config: Config, _warnings: Vec<Warning>) -> Result<()> {
    refuse_huge_pages();
    for dir in ["data", "logs"] {
        let path = config.prefix.join(dir);
        fs::create_dir_all(&path)
            .map_err(|e| Error::config(Kind::Io).cause(e).context(format!("make {}", path.display())))?;
    }
    for (name, size) in &config.shared_dicts {
        shdict::store().declare(name, *size);
    }
    if config.captured_log > 0 {
        capture::start(config.captured_log);
    }
    lua::preload::preload(&config.preload)?;
    trust(&config)?;
    ngx::worker::set_count(config.workers);
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let ended = LocalSet::new().block_on(&runtime, control::run(config));
    runtime.shutdown_timeout(LAST_WORK);
    ended
}

/// The allocator asks for transparent huge pages. It gives memory back in pieces of 64 KB, and the kernel fills the holes
/// again when it next looks for pages to merge: memory that nobody uses comes back in steps of 2 MB. Requests gain nothing
/// by them (docs/performance.md).
fn refuse_huge_pages() {
    // SAFETY: takes no pointer. Where it is not allowed, memory has steps.
    unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0) };
}

/// Whom upstreams' certificates must chain to. The system's are read when they are needed.
fn trust(config: &Config) -> Result<()> {
    if let Some(path) = &config.tls.trusted_certificate {
        tls::client::trust(&path.to_string_lossy()).map_err(|e| e.context("apisix.ssl.ssl_trusted_certificate"))?;
    }
    Ok(())
}
