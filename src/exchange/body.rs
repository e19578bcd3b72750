//! The request's body as the phases see it, and the response's chunk that a filter works on.

use bytes::Bytes;

/// Where the request body is.
#[derive(Debug, Default)]
pub enum RequestBody {
    /// The head promised none.
    #[default]
    None,
    /// Still with the client; `Some` is what `Content-Length` said.
    Streaming { length: Option<u64> },
    /// Read, or set by a plugin.
    Memory(Bytes),
    /// Read, and too large for memory.
    File { path: std::path::PathBuf, length: u64 },
    /// Given to an upstream or thrown away.
    Consumed,
}

/// One chunk of the response body in a body filter.
#[derive(Debug, Default)]
pub struct Chunk {
    /// `ngx.arg[1]`
    pub data: Vec<u8>,
    /// `ngx.arg[2]`: the last chunk.
    pub eof: bool,
}
