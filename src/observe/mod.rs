//! observe

pub mod append;
