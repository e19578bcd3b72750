//! The request on its way to the node: head, then body, as fast as both sides take it.

use std::{
    fs::File,
    io::Read,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;

use super::head::BodyFraming;
use crate::{
    error::{Error, Kind, Result},
    exchange::{
        Client, RequestBody,
        framing::{LAST_CHUNK, write_chunk_size},
    },
    tcp::buffers,
    upstream::Conn,
};

/// Body bytes taken from the client in one piece.
const PIECE: usize = 16 * 1024;
/// Body bytes kept, so that the request can go to another node: most API calls fit, and it bounds what a request costs.
pub(super) const REPLAY_MAX: usize = 64 * 1024;
/// Room in front of a piece for its chunk size.
const CHUNK_HEAD: usize = 20;

/// A request being sent.
pub(super) struct Upload {
    /// Framed bytes; those before `sent` are gone.
    out: Vec<u8>,
    sent: usize,
    source: Source,
    chunked: bool,
    flushed: bool,
    may_wait: bool,
    pub total: u64,
    /// Bytes that the client still owes of a body whose length the head has promised.
    owed: u64,
    /// The body so far, unframed, for another try; `None` once it was too long.
    kept: Option<Vec<u8>>,
    piece: Vec<u8>,
}

/// What an upload has taken of the client's body.
pub(super) enum Taken {
    Nothing,
    /// The start of it; the rest is with the client.
    Some(Vec<u8>),
    All(Vec<u8>),
    /// More than is kept.
    Lost,
}

enum Source {
    Done,
    /// Still with the client.
    Client,
    Memory {
        body: Bytes,
        at: usize,
    },
    /// Spooled to disk. Read where it is: the page cache has it.
    File {
        file: File,
        left: u64,
    },
}

impl Upload {
    /// For a request whose body is `body`. The head is written to `head_mut` next. `may_wait`: a request without a body may leave at
    /// the end of the worker's turn.
    pub fn new(body: &RequestBody, may_wait: bool) -> Result<(Upload, BodyFraming)> {
        let (source, framing) = match body {
            RequestBody::None | RequestBody::Consumed | RequestBody::Forgone => (Source::Done, BodyFraming::None),
            RequestBody::Lost => return Err(RequestBody::unsendable()),
            RequestBody::Streaming { length: Some(n) } => (Source::Client, BodyFraming::Length(*n)),
            RequestBody::Streaming { length: None } => (Source::Client, BodyFraming::Chunked),
            RequestBody::Memory(bytes) => {
                (Source::Memory { body: bytes.clone(), at: 0 }, BodyFraming::Length(bytes.len() as u64))
            }
            RequestBody::File { path, length } => {
                let file = File::open(&**path).map_err(|e| {
                    Error::internal(Kind::Io).cause(e).context(format!("request body in {}", path.display()))
                })?;
                (Source::File { file, left: *length }, BodyFraming::Length(*length))
            }
        };
        Ok((
            Upload {
                out: buffers::take(),
                sent: 0,
                chunked: framing == BodyFraming::Chunked,
                flushed: false,
                may_wait: may_wait && matches!(source, Source::Done),
                total: 0,
                owed: if let RequestBody::Streaming { length: Some(n) } = body { *n } else { 0 },
                kept: Some(Vec::new()),
                piece: if matches!(source, Source::Client) { buffers::take() } else { Vec::new() },
                source,
            },
            framing,
        ))
    }

    /// Where the head goes, before anything is sent.
    pub fn head_mut(&mut self) -> &mut Vec<u8> {
        &mut self.out
    }

    pub fn is_done(&self) -> bool {
        self.flushed
    }

    /// Whether anything went to the node.
    pub fn has_started(&self) -> bool {
        self.total > 0
    }

    /// What is no longer with the client of a body that was to be streamed. The upload is of no use behind it.
    pub fn taken(&mut self) -> Taken {
        let whole = matches!(self.source, Source::Done);
        match self.kept.take() {
            None => Taken::Lost,
            Some(kept) if whole => Taken::All(kept),
            Some(kept) if kept.is_empty() => Taken::Nothing,
            Some(kept) => Taken::Some(kept),
        }
    }

    /// Starts again for another node; false when the body is no longer there to be sent. The head is to be written anew.
    pub fn rewind(&mut self, body: &RequestBody) -> bool {
        let kept = match (&self.source, body) {
            (_, RequestBody::Memory(bytes)) => {
                self.source = Source::Memory { body: bytes.clone(), at: 0 };
                &mut Vec::new()
            }
            (_, RequestBody::File { path, length }) => {
                let Ok(file) = File::open(&**path) else { return false };
                self.source = Source::File { file, left: *length };
                &mut Vec::new()
            }
            _ => match &mut self.kept {
                Some(kept) => kept,
                None => return false,
            },
        };
        self.piece.clear();
        self.piece.extend_from_slice(kept);
        self.out.clear();
        self.sent = 0;
        self.total = 0;
        self.flushed = false;
        true
    }

    /// After `rewind` and the new head: what was taken from the client before goes again.
    pub fn resend_kept(&mut self) {
        if self.piece.is_empty() {
            if self.chunked && matches!(self.source, Source::Done) {
                self.out.extend_from_slice(LAST_CHUNK);
            }
            return;
        }
        let piece = std::mem::take(&mut self.piece);
        self.frame(&piece);
        self.piece = piece;
        self.piece.clear();
        if self.chunked && matches!(self.source, Source::Done) {
            self.out.extend_from_slice(LAST_CHUNK);
        }
    }

    /// Sends on until everything is with the kernel. `limit` bounds the wait for the node to take more.
    pub fn poll(
        &mut self,
        cx: &mut Context<'_>,
        conn: &mut Conn,
        client: &mut Option<Box<dyn Client>>,
        limit: Duration,
    ) -> Poll<Result<()>> {
        if self.may_wait && self.total == 0 && conn.send_later(&self.out) {
            self.total = self.out.len() as u64;
            self.out.clear();
            self.flushed = true;
            return Poll::Ready(Ok(()));
        }
        loop {
            while self.sent < self.out.len() {
                let n = ready!(conn.poll_write(cx, &self.out[self.sent..], limit))?;
                self.sent += n;
                self.total += n as u64;
            }
            self.out.clear();
            self.sent = 0;
            match &mut self.source {
                Source::Done => {
                    ready!(conn.poll_flush(cx))?;
                    self.flushed = true;
                    return Poll::Ready(Ok(()));
                }
                Source::Client => ready!(self.poll_client(cx, client))?,
                Source::Memory { body, at } => {
                    if *at == body.len() {
                        self.source = Source::Done;
                        continue;
                    }
                    let n = ready!(conn.poll_write(cx, &body[*at..], limit))?;
                    *at += n;
                    self.total += n as u64;
                }
                Source::File { file, left } => {
                    if *left == 0 {
                        self.source = Source::Done;
                        continue;
                    }
                    let wanted = PIECE.min(usize::try_from(*left).unwrap_or(PIECE));
                    self.out.resize(wanted, 0);
                    let n = file.read(&mut self.out)?;
                    if n == 0 {
                        return Poll::Ready(Err(Error::internal(Kind::Io).context("the spooled body is cut short")));
                    }
                    self.out.truncate(n);
                    *left -= n as u64;
                }
            }
        }
    }

    /// Takes the next piece from the client and frames it.
    fn poll_client(&mut self, cx: &mut Context<'_>, client: &mut Option<Box<dyn Client>>) -> Poll<Result<()>> {
        let Some(client) = client else {
            return Poll::Ready(Err(Error::client(Kind::Closed)));
        };
        self.piece.clear();
        self.piece.reserve(PIECE);
        let n = ready!(client.poll_read_body(cx, &mut self.piece, PIECE))?;
        if n == 0 && self.owed > 0 {
            // The node waits for as much as the head says: whatever comes next would be taken for it.
            let what = "the request body is shorter than its Content-Length";
            return Poll::Ready(Err(Error::internal(Kind::Io).context(what)));
        }
        self.owed = self.owed.saturating_sub(n as u64);
        if n == 0 {
            self.source = Source::Done;
            if self.chunked {
                self.out.extend_from_slice(LAST_CHUNK);
            }
            return Poll::Ready(Ok(()));
        }
        self.keep();
        let piece = std::mem::take(&mut self.piece);
        self.frame(&piece);
        self.piece = piece;
        Poll::Ready(Ok(()))
    }

    fn frame(&mut self, piece: &[u8]) {
        if !self.chunked {
            return self.out.extend_from_slice(piece);
        }
        self.out.reserve(piece.len() + CHUNK_HEAD);
        write_chunk_size(piece.len() as u64, &mut self.out);
        self.out.extend_from_slice(piece);
        self.out.extend_from_slice(b"\r\n");
    }

    fn keep(&mut self) {
        if let Some(kept) = &mut self.kept {
            if kept.len() + self.piece.len() > REPLAY_MAX {
                self.kept = None;
            } else {
                kept.extend_from_slice(&self.piece);
            }
        }
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        buffers::put(std::mem::take(&mut self.out));
        buffers::put(std::mem::take(&mut self.piece));
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;
    use crate::proxy::capture;

    #[test]
    fn a_body_that_ends_before_its_length_is_an_error() {
        let mut cx = Context::from_waker(Waker::noop());
        let mut poll = |length| {
            let body = RequestBody::Streaming { length };
            let (mut upload, _) = Upload::new(&body, false).expect("an upload");
            let polled = upload.poll_client(&mut cx, &mut Some(capture::without_body()));
            (polled.map_err(|e| e.to_string()), matches!(upload.source, Source::Done))
        };
        let (Poll::Ready(Err(e)), false) = poll(Some(1)) else { panic!("it is an error, and not the end") };
        assert!(e.contains("shorter than its Content-Length"), "{e}");
        assert_eq!(poll(Some(0)), (Poll::Ready(Ok(())), true));
        assert_eq!(poll(None), (Poll::Ready(Ok(())), true), "of chunks nobody knows the number");
    }

    #[test]
    fn what_was_given_to_a_failed_upstream_and_not_kept_goes_to_no_other() {
        let refused = Upload::new(&RequestBody::Lost, true).err().expect("refused");
        assert_eq!(refused.origin(), crate::error::Origin::Upstream);
        let (_, framing) = Upload::new(&RequestBody::Forgone, true).expect("an error page goes without");
        assert_eq!(framing, BodyFraming::None);
    }
}
