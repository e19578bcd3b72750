//! What a script asks of whoever serves the request: to send what it has printed, and subrequests.

use std::{any::Any, future::Future, pin::Pin, rc::Rc};

use bytes::Bytes;

use super::{Exchange, Headers, RequestBody};
use crate::error::Result;

/// The server of a request, as its scripts reach it. It may run scripts of the same request meanwhile (its filters).
pub trait Host {
    /// Sends the head, if it is not out, and what `x.printed` holds.
    fn send<'a>(&'a self, x: &'a mut Exchange, what: Sending) -> Doing<'a, Result<()>>;

    /// Makes subrequests, which run all at once beside the request.
    fn subrequests(&self, x: &Exchange, list: Vec<Subrequest>) -> Doing<'static, Answered>;
}

pub type Doing<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// How far `Host::send` goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sending {
    /// The head goes through its filters and is settled; it may wait for the first bytes of the body.
    Head,
    /// Everything printed so far is the client's, as far as the kernel takes it.
    Flush,
    /// The body is complete.
    End,
}

/// `ngx.location.capture(uri, options)`
pub struct Subrequest {
    pub method: Vec<u8>,
    pub path: Vec<u8>,
    pub args: Vec<u8>,
    /// `None`: there is none, unless the request's own goes along.
    pub body: Option<Bytes>,
    pub forward_body: bool,
    /// `vars`: set in the subrequest.
    pub vars: Vec<(Box<str>, Vec<u8>)>,
    /// `copy_all_vars`, `share_all_vars`
    pub copy_vars: bool,
    pub share_vars: bool,
    /// `ctx`: the VM's own, opaque here.
    pub ctx: Option<Rc<dyn Any>>,
    /// Only the head of the answer is asked for: the body is thrown away, and an upstream's not waited for.
    pub header_only: bool,
}

/// What subrequests answered, in the order of their list.
#[derive(Default)]
pub struct Answered {
    pub list: Vec<Captured>,
    /// What the request's variables are now, when one shared them.
    pub vars: Option<Vec<(Box<str>, Vec<u8>)>>,
}

/// What a subrequest answered.
#[derive(Debug, Default)]
pub struct Captured {
    pub status: u16,
    pub headers: Headers,
    pub body: Vec<u8>,
    /// The body ended before its time.
    pub truncated: bool,
    /// A body filter failed: the request that asked ends, too.
    pub failed: bool,
}

impl RequestBody {
    /// The same body for a subrequest; one that nobody has read stays where it is.
    pub fn lent(&self) -> RequestBody {
        match self {
            RequestBody::Memory(data) => RequestBody::Memory(data.clone()),
            RequestBody::File { path, length } => {
                RequestBody::File { path: super::Spooled::theirs(path.to_path_buf()), length: *length }
            }
            // To be refused, not to be left out.
            RequestBody::Lost | RequestBody::Forgone => RequestBody::Lost,
            RequestBody::TooLong { came } => RequestBody::TooLong { came: *came },
            RequestBody::None | RequestBody::Streaming { .. } | RequestBody::Consumed => RequestBody::None,
        }
    }
}
