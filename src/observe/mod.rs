//! observe

pub mod append;
pub mod log;
pub mod metrics;
