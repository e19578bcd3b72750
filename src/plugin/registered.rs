//! Variables that Lua modules give (`core.ctx.register_var`): their names, so that conditions know whom to ask for them.

use std::{cell::RefCell, collections::HashSet};

/// Names of one worker. A plugin has a few; a name made anew for each request is a mistake, and past this it is none for conditions.
const MAX_NAMES: usize = 10_000;
/// Bytes of a name.
const MAX_NAME: usize = 256;

thread_local! {
    static NAMES: RefCell<HashSet<Box<str>>> = RefCell::default();
}

/// From here on some VM of this worker may give the variable. It stays when that VM ends: the others are asked in vain.
pub(super) fn add(name: &str) {
    NAMES.with_borrow_mut(|names| {
        if names.len() < MAX_NAMES && name.len() <= MAX_NAME {
            names.insert(name.into());
        } else if !names.contains(name) {
            let start: String = name.chars().take(MAX_NAME).collect();
            tracing::error!(
                "the variable {start} is not known to conditions: there are too many, or its name is too long"
            );
        }
    });
}

/// Whether the worker's VMs are to be asked for it.
pub(super) fn knows(name: &str) -> bool {
    NAMES.with_borrow(|names| names.contains(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_known_up_to_the_bound() {
        for n in 0..=MAX_NAMES {
            add(&format!("v{n}"));
        }
        add(&"x".repeat(MAX_NAME + 1));
        assert!(!knows(&"x".repeat(MAX_NAME + 1)));
        assert!(knows("v0") && !knows(&format!("v{MAX_NAMES}")) && !knows("host"));
    }
}
