//! The request's body as the phases see it, and the response's chunk that a filter works on.

use std::path::{Path, PathBuf};

use bytes::Bytes;

use crate::error::{Error, Kind};

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
    File { path: Spooled, length: u64 },
    /// Given to an upstream or thrown away.
    Consumed,
    /// Given to an upstream that failed, and too long to have been kept for another one.
    Lost,
    /// Lost, and what is asked for since is an error page under a path of its own, by GET: a request that goes without.
    Forgone,
}

/// A file that holds a request body. The gateway's own goes when the request lets go of it; a plugin's own stays.
#[derive(Debug)]
pub struct Spooled {
    path: PathBuf,
    is_ours: bool,
}

impl Spooled {
    /// A file that the gateway made.
    pub fn ours(path: PathBuf) -> Self {
        Spooled { path, is_ours: true }
    }

    /// A file that a plugin named.
    pub fn theirs(path: PathBuf) -> Self {
        Spooled { path, is_ours: false }
    }
}

impl std::ops::Deref for Spooled {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.path
    }
}

impl Drop for Spooled {
    fn drop(&mut self) {
        if self.is_ours {
            // Nobody else knows the file; a failure leaves what a restart of the machine cleans.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// One chunk of the response body in a body filter.
#[derive(Debug, Default)]
pub struct Chunk {
    /// `ngx.arg[1]`
    pub data: Vec<u8>,
    /// `ngx.arg[2]`: the last chunk.
    pub eof: bool,
}

impl RequestBody {
    /// Why one that is `Lost` cannot be sent.
    pub fn unsendable() -> Error {
        let what = "the request body went to an upstream that failed, and is too long to be sent once more";
        Error::upstream(Kind::Other).context(what)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_files_go_with_the_request_and_theirs_stay() {
        let dir = std::env::temp_dir();
        for (ours, name) in [(true, "moongate-spool-ours"), (false, "moongate-spool-theirs")] {
            let path = dir.join(format!("{name}-{}", std::process::id()));
            std::fs::write(&path, "body").expect("a file");
            let spooled = if ours { Spooled::ours(path.clone()) } else { Spooled::theirs(path.clone()) };
            drop(RequestBody::File { path: spooled, length: 4 });
            assert_eq!(path.exists(), !ours);
            let _ = std::fs::remove_file(path);
        }
    }
}
