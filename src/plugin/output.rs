//! Sends a response made or filtered by plugins.
