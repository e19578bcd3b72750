//! Wires it all: configuration to listeners, workers, the two APIs; runs it; drains it.

pub mod banner;
