//! observe

pub mod append;
pub mod metrics;
