//! Runs a request's plugins, phase by phase. What the proxy knows of Lua.

/// What the plugins of a phase decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Go on with the next phase.
    Next,
    /// The gateway answers: status and headers stand in `response`, the body in `printed`.
    Answer,
    /// Lua has sent the answer itself, to its last byte.
    Sent,
    /// Close the connection without an answer (`ngx.exit(444)`).
    Close,
}
