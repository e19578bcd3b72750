//! JSON Schema as APISIX checks with it: same subset, same filling of defaults, same error texts.
//!
//! A schema is compiled once into a tree of rules (`compile`), which then checks any number of values (`check`).
//! The schemas of APISIX's resources and plugins are packed into the binary (`facts`). Checking writes defaults into the
//! value, also from branches of `oneOf` and the like: what plugins of the field rely on.
//!
//! A reference to a secret (`$env://…`, `$secret://…`) passes wherever a value may stand.
//!
//! Promises: no recursion deeper than the schema; a pattern that cannot be compiled refuses the schema.

mod check;
mod compile;
mod facts;
mod pattern;

use serde_json::Value;

pub use facts::{PluginSchemas, all_json, plugin, plugin_json, plugin_names, resource, resource_json, stream_plugin};

/// `$env://NAME`, `$secret://manager/id/key`: resolved when used.
pub fn is_reference(text: &str) -> bool {
    let prefix = |p: &str| text.get(..p.len()).is_some_and(|head| head.eq_ignore_ascii_case(p));
    prefix("$env://") || prefix("$secret://")
}

/// A compiled schema.
#[derive(Debug)]
pub struct Schema {
    root: compile::Node,
}

impl Schema {
    /// Compiles a schema; the text says what is wrong with it.
    pub fn compile(schema: &Value) -> Result<Schema, String> {
        Ok(Schema { root: compile::root(schema, compile::Patterns::Verified)? })
    }

    /// A packed schema: a test has compiled its patterns, so each waits for its first use.
    fn packed(schema: &Value) -> Result<Schema, String> {
        Ok(Schema { root: compile::root(schema, compile::Patterns::Lazy)? })
    }

    /// Checks `value` and fills in the defaults it lacks. The text is the one APISIX gives.
    pub fn check(&self, value: &mut Value) -> Result<(), String> {
        check::check(&self.root, value, check::Mode { text: true, fill: true })
    }

    /// As `check`, but leaves `value` as it is: it is lent mutably only because the work is the same.
    pub fn check_only(&self, value: &mut Value) -> Result<(), String> {
        check::check(&self.root, value, check::Mode { text: true, fill: false })
    }
}

#[cfg(test)]
mod tests;
