//! Stops what runs away.
