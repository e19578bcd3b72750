//! The plugins that are loaded.
