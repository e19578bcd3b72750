//! The hooks of conf/debug.yaml: functions of modules in a worker's VM that tell of their calls.

use serde_json::json;

use super::{Generation, Runner};
use crate::plugin::{registry, watch::Debug};

impl Runner {
    /// Puts the hooks where the debug mode now wants them.
    pub fn follow_debug(&self) {
        self.generation.borrow().hook(&self.setup.watching.debug());
    }
}

impl Generation {
    /// Takes all hooks off and puts those of `debug` on.
    pub(super) fn hook(&self, debug: &Debug) {
        let hooks = debug.hooks.as_ref().map(|hooks| {
            json!({
                "functions": hooks.functions,
                "level": hooks.level,
                "arguments": hooks.arguments,
                "results": hooks.results,
                "dynamic": debug.header.is_some(),
            })
            .to_string()
        });
        let hooked: crate::error::Result<()> = registry::call(&self.vm, "moongate.hooks", "apply", hooks);
        if let Err(e) = hooked {
            tracing::error!(target: "lua", "conf/debug.yaml: {e}");
        }
    }
}
