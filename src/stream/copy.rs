//! Bytes both ways between a client and a node, until both directions have ended.
//!
//! One buffer per direction, which is read into only when it is empty: who does not read is not sent more, and keeps the other side
//! from sending. An end is passed on while the other direction goes on. All of it is polled by one task.

use std::{
    future::poll_fn,
    io::{self, ErrorKind},
    mem,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::{
    error::{Error, Kind, Result},
    exchange::deadline::Deadline,
    observe::metrics::Listening,
    tcp::buffers,
};

/// How long nothing may move.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// While bytes wait for a side that does not take them.
    pub send: Duration,
    pub read: Duration,
}

/// Bytes that were passed on, also where it ends with an error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    pub from_client: u64,
    pub to_client: u64,
}

/// Passes bytes on until both sides have ended theirs.
///
/// What moves is counted while it does: a session may last for days.
pub async fn both<C, N>(
    client: &mut C,
    node: &mut N,
    limits: Limits,
    counts: &Listening,
    moved: &mut Moved,
) -> Result<()>
where
    C: AsyncRead + AsyncWrite + Unpin,
    N: AsyncRead + AsyncWrite + Unpin,
{
    let (mut up, mut down) = (Pipe::default(), Pipe::default());
    let deadline = Deadline::new();
    let mut begun = false;
    let outcome = poll_fn(|cx| {
        let before = up.moves + down.moves;
        let ended = poll_both(cx, client, node, &mut up, &mut down);
        let (from_client, to_node) = up.uncounted();
        counts.up(from_client, to_node);
        let (from_node, to_client) = down.uncounted();
        counts.down(from_node, to_client);
        if let Some(ended) = ended {
            return Poll::Ready(ended);
        }
        if !begun || up.moves + down.moves != before {
            begun = true;
            let stuck = up.is_full() || down.is_full();
            deadline.start(if stuck { limits.send } else { limits.read }, cx);
        } else if deadline.poll_expired(cx) {
            let late = Error::client(Kind::ReadTimeout).context("connection timed out: nothing was sent or taken");
            return Poll::Ready(Err(late));
        }
        Poll::Pending
    })
    .await;
    *moved = Moved { from_client: up.passed, to_client: down.passed };
    outcome
}

fn poll_both<C, N>(
    cx: &mut Context<'_>,
    client: &mut C,
    node: &mut N,
    up: &mut Pipe,
    down: &mut Pipe,
) -> Option<Result<()>>
where
    C: AsyncRead + AsyncWrite + Unpin,
    N: AsyncRead + AsyncWrite + Unpin,
{
    match up.poll(cx, client, node) {
        Poll::Ready(Err(Fault::Read(e))) => return Some(Err(lost(Error::client, "the client", e))),
        // A node that takes no more may have said why: what it sends is passed on to its end.
        Poll::Ready(_) | Poll::Pending => {}
    }
    match down.poll(cx, node, client) {
        Poll::Ready(Err(Fault::Read(e))) => Some(Err(lost(Error::upstream, "the upstream", e))),
        Poll::Ready(Err(Fault::Write(e))) => Some(Err(lost(Error::client, "the client", e))),
        Poll::Ready(Ok(())) if up.is_done() => Some(Ok(())),
        Poll::Ready(Ok(())) | Poll::Pending => None,
    }
}

fn lost(of: fn(Kind) -> Error, who: &str, e: io::Error) -> Error {
    of(Kind::Closed).cause(e).context(format!("the connection to {who} broke"))
}

/// One direction.
#[derive(Default)]
struct Pipe {
    buffer: Vec<u8>,
    /// `buffer[at..]` waits to be written.
    at: usize,
    stage: Stage,
    /// TLS may hold back some of what was written.
    unflushed: bool,
    /// Bytes that were written.
    passed: u64,
    read: u64,
    /// Of `read` and `passed`, what was counted.
    counted: (u64, u64),
    /// Grows with each read, write and flush.
    moves: u64,
}

#[derive(Default)]
enum Stage {
    #[default]
    Open,
    /// All was read: the other side is to be told.
    Ending,
    /// Reading has failed: what was written before is to leave.
    Broken(io::Error),
    Done,
}

/// Which side has failed.
enum Fault {
    Read(io::Error),
    Write(io::Error),
}

impl Pipe {
    fn is_full(&self) -> bool {
        self.at < self.buffer.len() || self.unflushed
    }

    /// Bytes that were read and written since it was asked last.
    fn uncounted(&mut self) -> (u64, u64) {
        let before = mem::replace(&mut self.counted, (self.read, self.passed));
        (self.read - before.0, self.passed - before.1)
    }

    fn is_done(&self) -> bool {
        matches!(self.stage, Stage::Done)
    }

    /// Ready when the direction has ended; again and again with `Ok` from then on.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut (impl AsyncRead + Unpin),
        to: &mut (impl AsyncWrite + Unpin),
    ) -> Poll<Result<(), Fault>> {
        loop {
            if let Err(e) = ready!(self.poll_empty(cx, to)) {
                self.finish();
                return Poll::Ready(Err(Fault::Write(e)));
            }
            match &self.stage {
                Stage::Open => match self.poll_fill(cx, from) {
                    Poll::Ready(()) => {}
                    Poll::Pending => return self.poll_flushed(cx, to),
                },
                Stage::Ending => {
                    let ended = ready!(Pin::new(&mut *to).poll_shutdown(cx));
                    self.finish();
                    self.moves += 1;
                    return Poll::Ready(ended.map_err(Fault::Write));
                }
                Stage::Broken(_) => {
                    let _ = ready!(Pin::new(&mut *to).poll_flush(cx));
                    let Stage::Broken(e) = mem::replace(&mut self.stage, Stage::Done) else { continue };
                    return Poll::Ready(Err(Fault::Read(e)));
                }
                Stage::Done => return Poll::Ready(Ok(())),
            }
        }
    }

    /// Writes what waits.
    fn poll_empty(&mut self, cx: &mut Context<'_>, to: &mut (impl AsyncWrite + Unpin)) -> Poll<io::Result<()>> {
        while self.at < self.buffer.len() {
            let n = ready!(Pin::new(&mut *to).poll_write(cx, &self.buffer[self.at..]))?;
            if n == 0 {
                return Poll::Ready(Err(ErrorKind::WriteZero.into()));
            }
            self.at += n;
            self.passed += n as u64;
            self.moves += 1;
            self.unflushed = true;
        }
        self.buffer.clear();
        self.at = 0;
        Poll::Ready(Ok(()))
    }

    /// Reads into the empty buffer, or finds the end.
    fn poll_fill(&mut self, cx: &mut Context<'_>, from: &mut (impl AsyncRead + Unpin)) -> Poll<()> {
        if self.buffer.capacity() == 0 {
            self.buffer = buffers::take();
        }
        let read = poll_read(cx, from, &mut self.buffer);
        if !matches!(read, Poll::Ready(Ok(1..))) {
            // Idle connections hold none.
            buffers::put(mem::take(&mut self.buffer));
        }
        match ready!(read) {
            Ok(n @ 1..) => self.read += n as u64,
            Ok(0) => self.stage = Stage::Ending,
            // A TLS peer that went without a goodbye, as most do; protocols know where their messages end.
            Err(e) if e.kind() == ErrorKind::UnexpectedEof => self.stage = Stage::Ending,
            Err(e) => self.stage = Stage::Broken(e),
        }
        self.moves += 1;
        Poll::Ready(())
    }

    /// Nothing is there to read: what TLS holds back leaves meanwhile.
    fn poll_flushed(&mut self, cx: &mut Context<'_>, to: &mut (impl AsyncWrite + Unpin)) -> Poll<Result<(), Fault>> {
        if self.unflushed {
            match ready!(Pin::new(to).poll_flush(cx)) {
                Ok(()) => {
                    self.unflushed = false;
                    // Nothing waits for a side any more: another limit holds from now on.
                    self.moves += 1;
                }
                Err(e) => {
                    self.finish();
                    return Poll::Ready(Err(Fault::Write(e)));
                }
            }
        }
        Poll::Pending
    }

    fn finish(&mut self) {
        self.stage = Stage::Done;
        self.at = 0;
        self.unflushed = false;
        buffers::put(mem::take(&mut self.buffer));
    }
}

/// Appends to `into`, never past its capacity.
fn poll_read(cx: &mut Context<'_>, from: &mut (impl AsyncRead + Unpin), into: &mut Vec<u8>) -> Poll<io::Result<usize>> {
    let mut buf = ReadBuf::uninit(into.spare_capacity_mut());
    ready!(Pin::new(from).poll_read(cx, &mut buf))?;
    let n = buf.filled().len();
    // SAFETY: the first `n` bytes of the spare capacity were just filled.
    unsafe { into.set_len(into.len() + n) };
    Poll::Ready(Ok(n))
}

impl Drop for Pipe {
    fn drop(&mut self) {
        buffers::put(mem::take(&mut self.buffer));
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
        task::{LocalSet, spawn_local},
    };

    use super::*;

    const LONG: Limits = Limits { send: Duration::from_secs(60), read: Duration::from_secs(60) };

    /// A session between two streams in memory: the client's end, the node's, and how it ends.
    fn session(limits: Limits) -> (DuplexStream, DuplexStream, tokio::task::JoinHandle<(Result<()>, Moved)>) {
        let ((client, mut from_client), (node, mut to_node)) = (duplex(64), duplex(64));
        let ended = spawn_local(async move {
            let mut moved = Moved::default();
            (both(&mut from_client, &mut to_node, limits, &Listening::default(), &mut moved).await, moved)
        });
        (client, node, ended)
    }

    async fn local<T>(test: impl Future<Output = T>) -> T {
        LocalSet::new().run_until(test).await
    }

    #[tokio::test]
    async fn an_end_is_passed_on_and_the_other_direction_goes_on() {
        local(async {
            let (mut client, mut node, ended) = session(LONG);
            client.write_all(b"question").await.unwrap();
            client.shutdown().await.unwrap();
            let mut text = String::new();
            node.read_to_string(&mut text).await.unwrap();
            assert_eq!(text, "question");
            let answer = spawn_local(async move {
                let mut all = Vec::new();
                client.read_to_end(&mut all).await.map(|_| all.len())
            });
            node.write_all(&[b'a'; 1001]).await.unwrap();
            drop(node);
            assert_eq!(answer.await.unwrap().unwrap(), 1001);
            let (outcome, moved) = ended.await.unwrap();
            outcome.unwrap();
            assert_eq!(moved, Moved { from_client: 8, to_client: 1001 });
        })
        .await;
    }

    #[tokio::test]
    async fn a_side_that_does_not_read_is_waited_for_as_long_as_the_limit_says() {
        local(async {
            let limits = Limits { send: Duration::from_millis(50), ..LONG };
            let (mut client, _node, ended) = session(limits);
            let mut sent = 0;
            // The node's pipe, a buffer, and the client's pipe.
            while let Ok(n) = client.write(&[0; 1024]).await {
                sent += n;
                assert!(sent <= buffers::KEPT_SIZE + 128, "no more is taken than fits");
            }
            let (outcome, moved) = ended.await.unwrap();
            assert_eq!(outcome.unwrap_err().kind(), Kind::ReadTimeout);
            assert_eq!(moved, Moved { from_client: 64, to_client: 0 });
        })
        .await;
    }

    #[tokio::test]
    async fn without_a_byte_it_ends_after_the_limit() {
        local(async {
            let limits = Limits { read: Duration::from_millis(50), ..LONG };
            let (_client, _node, ended) = session(limits);
            assert_eq!(ended.await.unwrap().0.unwrap_err().kind(), Kind::ReadTimeout);
        })
        .await;
    }

    /// Takes its time to flush: so many polls.
    struct Slow(DuplexStream, u8);

    impl AsyncRead for Slow {
        fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_read(cx, buf)
        }
    }

    impl AsyncWrite for Slow {
        fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
            Pin::new(&mut self.0).poll_write(cx, data)
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            match self.1.checked_sub(1) {
                None => return Poll::Ready(Ok(())),
                Some(left) => self.1 = left,
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_shutdown(cx)
        }
    }

    #[tokio::test]
    async fn what_was_taken_in_the_end_is_waited_for_no_more() {
        local(async {
            let ((mut client, mut from_client), (_node, to_node)) = (duplex(64), duplex(64));
            client.write_all(b"hello").await.unwrap();
            let limits = Limits { send: Duration::from_millis(50), read: Duration::from_millis(500) };
            let begun = std::time::Instant::now();
            let outcome =
                both(&mut from_client, &mut Slow(to_node, 3), limits, &Listening::default(), &mut Moved::default())
                    .await;
            assert_eq!(outcome.unwrap_err().kind(), Kind::ReadTimeout);
            assert!(begun.elapsed() >= limits.read, "{:?}", begun.elapsed());
        })
        .await;
    }

    /// Fails to be written to, and has something to say.
    struct Deaf(Rc<std::cell::Cell<usize>>);

    impl AsyncRead for Deaf {
        fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            let left = self.0.get();
            let n = left.min(buf.remaining());
            buf.put_slice(&vec![b'x'; n]);
            self.0.set(left - n);
            Poll::Ready(Ok(()))
        }
    }

    impl AsyncWrite for Deaf {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
            Poll::Ready(Err(ErrorKind::BrokenPipe.into()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Err(ErrorKind::NotConnected.into()))
        }
    }

    #[tokio::test]
    async fn a_node_that_takes_nothing_is_heard_to_its_end() {
        local(async {
            let (mut client, mut from_client) = duplex(1 << 20);
            client.write_all(b"hello").await.unwrap();
            let mut moved = Moved::default();
            let mut node = Deaf(Rc::new(std::cell::Cell::new(100_000)));
            both(&mut from_client, &mut node, LONG, &Listening::default(), &mut moved).await.unwrap();
            assert_eq!(moved, Moved { from_client: 0, to_client: 100_000 });
            drop(from_client);
            let mut all = Vec::new();
            client.read_to_end(&mut all).await.unwrap();
            assert_eq!(all.len(), 100_000);
        })
        .await;
    }
}
