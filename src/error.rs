//! The one error type: what went wrong, whose fault it is, and whether trying again can help.
//!
//! Imports nothing of the crate. Only `proxy::rescue` chooses a status for an `Error`.

use std::{borrow::Cow, error, fmt};

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Whose fault an error is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The peer that sent the request.
    Client,
    /// The node that should have answered it.
    Upstream,
    /// config.yaml, a resource, or the store that holds them.
    Config,
    /// A plugin or a function.
    Script,
    /// moongate itself, or the machine it runs on.
    Internal,
}

/// What went wrong, in terms that decide the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The bytes break the protocol.
    Malformed,
    /// A header block, URI or body past its bound.
    TooLarge,
    /// A value that the schema or the model refuses.
    Invalid,
    NotFound,
    /// The store holds something newer than the writer saw.
    Conflict,
    ConnectRefused,
    ConnectTimeout,
    /// The gateway's own places with the peer are taken: nothing is known of the peer.
    Busy,
    ReadTimeout,
    WriteTimeout,
    /// The peer closed the connection before the message was whole.
    Closed,
    /// No node is left to try.
    NoNode,
    /// The name does not resolve.
    Resolve,
    Tls,
    /// The store or another service of the gateway cannot be reached.
    Unavailable,
    /// A script raised an error or broke a limit.
    Script,
    Io,
    Other,
}

/// Whether the same request may be sent once more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Retry {
    #[default]
    Never,
    /// Nothing of the request reached the peer.
    Safe,
    /// The peer may have acted on it: only an idempotent request may go again.
    Idempotent,
}

/// An error with its kind, origin, retry advice, context (outermost first) and cause. One pointer wide.
pub struct Error(Box<Inner>);

struct Inner {
    kind: Kind,
    origin: Origin,
    retry: Retry,
    told: bool,
    context: Vec<Cow<'static, str>>,
    cause: Option<Box<dyn error::Error + Send + Sync>>,
}

impl Error {
    pub fn new(origin: Origin, kind: Kind) -> Self {
        Error(Box::new(Inner { kind, origin, retry: Retry::Never, told: false, context: Vec::new(), cause: None }))
    }

    pub fn client(kind: Kind) -> Self {
        Self::new(Origin::Client, kind)
    }

    pub fn upstream(kind: Kind) -> Self {
        Self::new(Origin::Upstream, kind)
    }

    pub fn config(kind: Kind) -> Self {
        Self::new(Origin::Config, kind)
    }

    pub fn script(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Origin::Script, Kind::Script).context(message)
    }

    pub fn internal(kind: Kind) -> Self {
        Self::new(Origin::Internal, kind)
    }

    /// Says what was being done; the outermost context is printed first.
    #[must_use]
    pub fn context(mut self, what: impl Into<Cow<'static, str>>) -> Self {
        self.0.context.push(what.into());
        self
    }

    #[must_use]
    pub fn cause(mut self, cause: impl Into<Box<dyn error::Error + Send + Sync>>) -> Self {
        self.0.cause = Some(cause.into());
        self
    }

    #[must_use]
    pub fn retry(mut self, retry: Retry) -> Self {
        self.0.retry = retry;
        self
    }

    /// It is in the log already, where it happened.
    #[must_use]
    pub fn told(mut self) -> Self {
        self.0.told = true;
        self
    }

    pub fn is_told(&self) -> bool {
        self.0.told
    }

    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    pub fn origin(&self) -> Origin {
        self.0.origin
    }

    pub fn retry_advice(&self) -> Retry {
        self.0.retry
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = self.0.context.iter().rev();
        match parts.next() {
            Some(first) => f.write_str(first)?,
            None => write!(f, "{:?} error: {:?}", self.0.origin, self.0.kind)?,
        }
        for part in parts {
            write!(f, ": {part}")?;
        }
        if let Some(cause) = &self.0.cause {
            write!(f, ": {cause}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}/{:?} {self}", self.0.origin, self.0.kind)
    }
}

impl error::Error for Error {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        self.0.cause.as_deref().map(|e| e as _)
    }
}

impl From<std::io::Error> for Error {
    fn from(e: std::io::Error) -> Self {
        Error::internal(Kind::Io).cause(e)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_the_outermost_context_first_and_the_cause_last() {
        let cause = std::io::Error::other("disk full");
        let e = Error::config(Kind::Io).cause(cause).context("write data/moongate.redb").context("routes/1");
        assert_eq!(e.to_string(), "routes/1: write data/moongate.redb: disk full");
        assert_eq!(e.origin(), Origin::Config);
        assert_eq!(e.retry_advice(), Retry::Never);
        assert_eq!(std::mem::size_of::<Error>(), std::mem::size_of::<usize>());
    }
}
