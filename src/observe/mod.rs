//! observe

pub mod append;
pub mod capture;
pub mod log;
pub mod metrics;
