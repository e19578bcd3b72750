//! Uploaded functions, which answer requests.

use std::sync::Arc;

/// `/functions/{id}`: `{"source": "…lua…", …}`.
#[derive(Debug)]
pub struct Function {
    pub source: Arc<str>,
}
