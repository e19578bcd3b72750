//! Plugins: which exist (`registry`), which run for a request (`plan`), and running them (`run`).

mod late;
mod natives;
pub mod output;
pub mod plan;
mod registered;
pub mod registry;
pub mod run;
mod upstream;
pub mod watch;

pub use registry::{Checker, PluginInfo, Setup, below_prefix};
pub use run::{
    Errand, Flow, MockRequest, Runner, VmState,
    function_trial::{Trial, Tried},
    trial::{MockResponse, PluginTrial},
};
pub use watch::Watching;

use crate::exchange::Phase;

/// A set of phases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PhaseMask(pub u32);

impl PhaseMask {
    pub fn has(self, phase: Phase) -> bool {
        self.0 & (1 << phase as u32) != 0
    }

    pub fn add(&mut self, phase: Phase) {
        self.0 |= 1 << phase as u32;
    }
}
