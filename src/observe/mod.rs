//! observe

pub mod append;
pub mod capture;
pub mod functions;
pub mod log;
pub mod metrics;
