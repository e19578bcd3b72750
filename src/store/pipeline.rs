//! From stored texts to a snapshot: parse, decrypt, validate, skip what is invalid, publish, keep the last good state.

use std::sync::Arc;

use super::Published;

/// Runs on the control thread; owns the snapshot under construction.
pub struct Pipeline {
    pub published: Arc<Published>,
}
