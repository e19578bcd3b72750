//! A stream whose owner may leave bytes to be sent at the end of the worker's turn.
//!
//! A turn is what a worker does for all that was ready at once. Sending each request and each response when it is made has the
//! kernel's way out and the gateway's own code push each other out of the processor's caches, dozens of times per turn; sent
//! together they cost 2 to 3 % less (docs/decisions/0007), and nobody waits longer than the turn takes.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    io::{self, ErrorKind, IoSlice},
    net::Shutdown,
    os::fd::AsRawFd,
    rc::Rc,
    task::{Context, Poll, Waker, ready},
};

use socket2::SockRef;
use tokio::{
    io::{Interest, ReadBuf},
    net::TcpStream,
    task::coop,
};

/// Bytes that wait on a thread, past which they are sent: a dozen answers. More gain nothing, and would not stay in the first
/// cache until they are sent.
const WAITING_MAX: usize = 16 * 1024;
/// Bytes that may wait for one stream at a time: a head and a small body. The copy of a longer piece would cost more than its
/// own time.
const PIECE_MAX: usize = 8 * 1024;

thread_local! {
    /// `None`: this thread has no turns, so nothing waits.
    static WAITING: RefCell<Option<Waiting>> = const { RefCell::new(None) };
}

/// In one place: bytes that would wait in buffers of their own would push each other out of the caches, too.
#[derive(Default)]
struct Waiting {
    bytes: Vec<u8>,
    /// Where each one's bytes end. More than once, for more than one piece.
    streams: Vec<(Rc<Inner>, usize)>,
    /// `turns`.
    end: Option<Waker>,
}

/// Ends this thread's turns: a task that is woken by the first piece of a turn runs behind all that was ready then, and is reached
/// however much becomes ready meanwhile. Until it runs, and once it is dropped, nothing waits.
pub async fn turns() {
    struct End;
    impl Drop for End {
        fn drop(&mut self) {
            flush();
            WAITING.set(None);
        }
    }
    let _end = End;
    poll_fn(|cx| {
        flush();
        WAITING.with_borrow_mut(|waiting| waiting.get_or_insert_default().end = Some(cx.waker().clone()));
        Poll::Pending
    })
    .await
}

/// Sends what waits on this thread. To be called before anything that may take long.
pub fn flush() {
    let take = |waiting: &mut Option<Waiting>| match waiting {
        Some(some) if !some.streams.is_empty() => {
            Some((std::mem::take(&mut some.bytes), std::mem::take(&mut some.streams)))
        }
        _ => None,
    };
    let Some((mut bytes, mut streams)) = WAITING.with_borrow_mut(take) else { return };
    let mut start = 0;
    for (stream, end) in streams.drain(..) {
        stream.flush(&bytes[start..end]);
        start = end;
    }
    bytes.clear();
    // The room is for the next turn.
    WAITING.with_borrow_mut(|waiting| match waiting {
        Some(next) if next.streams.is_empty() => (next.bytes, next.streams) = (bytes, streams),
        _ => {}
    });
}

/// A TCP stream. Where its owner drops it with bytes that wait, they are sent before it is closed.
pub struct Stream(Rc<Inner>);

struct Inner {
    tcp: TcpStream,
    state: Cell<State>,
    late: RefCell<Late>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing waits.
    Settled,
    /// For the end of the turn.
    Queued,
    /// For the peer to take more: the owner's next read or write sends on.
    Stuck,
    Failed,
}

#[derive(Default)]
struct Late {
    /// What got stuck.
    bytes: Vec<u8>,
    sent: usize,
    /// Whom to tell of it.
    waker: Option<Waker>,
    /// Why it could not be sent, until somebody is told.
    error: Option<io::Error>,
}

impl Stream {
    pub fn new(tcp: TcpStream) -> Self {
        Stream(Rc::new(Inner { tcp, state: Cell::new(State::Settled), late: RefCell::default() }))
    }

    pub fn tcp(&self) -> &TcpStream {
        &self.0.tcp
    }

    /// Takes all of `piece` to send it at the end of the turn; `false`: it is to be written now. Where it cannot be sent then,
    /// `waker` is told, and reads and writes go on with it.
    pub fn send_later(&self, piece: &[u8], waker: Option<&Waker>) -> bool {
        let Inner { state, late, .. } = &*self.0;
        if matches!(state.get(), State::Stuck | State::Failed) || piece.len() > PIECE_MAX {
            return false;
        }
        let full = WAITING.with_borrow_mut(|waiting| {
            let Waiting { bytes, streams, end } = waiting.as_mut()?;
            if streams.is_empty()
                && let Some(end) = end
            {
                end.wake_by_ref();
            }
            bytes.extend_from_slice(piece);
            streams.push((self.0.clone(), bytes.len()));
            Some(bytes.len() >= WAITING_MAX)
        });
        let Some(full) = full else { return false };
        state.set(State::Queued);
        if let Some(waker) = waker {
            match &mut late.borrow_mut().waker {
                Some(old) => old.clone_from(waker),
                none => *none = Some(waker.clone()),
            }
        }
        if full {
            flush();
        }
        true
    }

    /// Nothing waits to be sent, or could not be.
    pub fn is_settled(&self) -> bool {
        self.0.state.get() == State::Settled
    }

    /// The peer did not take what waited.
    pub fn is_stuck(&self) -> bool {
        self.0.state.get() == State::Stuck
    }

    /// Sends what waits now, as far as the peer takes it.
    pub fn flush(&self) {
        if self.0.state.get() == State::Queued {
            flush();
        }
    }

    /// Ready when nothing waits any more.
    pub fn poll_settled(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.flush();
        if self.is_settled() { Poll::Ready(Ok(())) } else { self.0.poll_send(cx) }
    }

    /// For a wait that has nothing to do with writing: goes on with what got stuck.
    fn poll_stuck(&self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.0.state.get() {
            State::Settled | State::Queued => Ok(()),
            State::Stuck | State::Failed => match self.0.poll_send(cx) {
                Poll::Ready(sent) => sent,
                Poll::Pending => Ok(()),
            },
        }
    }

    pub fn poll_read(&self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.poll_stuck(cx)?;
        super::poll_read(&self.0.tcp, cx, buf)
    }

    /// Whether a read may find something.
    pub fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_stuck(cx)?;
        self.0.tcp.poll_read_ready(cx)
    }

    pub fn poll_write(&self, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_settled(cx))?;
        super::poll_write(&self.0.tcp, cx, data)
    }

    pub fn poll_write_vectored(&self, cx: &mut Context<'_>, data: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        ready!(self.poll_settled(cx))?;
        let budget = ready!(coop::poll_proceed(cx));
        loop {
            match self.0.tcp.try_write_vectored(data) {
                Err(e) if e.kind() == ErrorKind::WouldBlock => ready!(self.0.tcp.poll_write_ready(cx))?,
                done => {
                    budget.made_progress();
                    return Poll::Ready(done);
                }
            }
        }
    }

    /// Sends what waits, and then no more.
    pub fn poll_shutdown(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_settled(cx))?;
        Poll::Ready(SockRef::from(&self.0.tcp).shutdown(Shutdown::Write))
    }
}

impl Inner {
    /// A piece's turn has ended.
    fn flush(&self, piece: &[u8]) {
        match self.state.get() {
            State::Settled | State::Queued => {}
            State::Stuck => return self.late.borrow_mut().bytes.extend_from_slice(piece),
            State::Failed => return,
        }
        let mut sent = 0;
        let late = match self.send(piece, &mut sent) {
            Ok(()) => return self.state.set(State::Settled),
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                let mut late = self.late.borrow_mut();
                late.bytes.extend_from_slice(&piece[sent..]);
                self.state.set(State::Stuck);
                late
            }
            Err(e) => {
                let mut late = self.late.borrow_mut();
                self.fail(&mut late, e);
                late
            }
        };
        if let Some(waker) = &late.waker {
            waker.wake_by_ref();
        }
    }

    /// Goes on with what got stuck.
    fn poll_send(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let late = &mut *self.late.borrow_mut();
        if self.state.get() == State::Failed {
            return Poll::Ready(Err(late.error.take().unwrap_or_else(|| ErrorKind::BrokenPipe.into())));
        }
        loop {
            match self.send(&late.bytes, &mut late.sent) {
                Ok(()) => {
                    (late.bytes, late.sent) = (Vec::new(), 0);
                    self.state.set(State::Settled);
                    return Poll::Ready(Ok(()));
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => ready!(self.tcp.poll_write_ready(cx))?,
                Err(e) => {
                    let told = e.kind();
                    self.fail(late, e);
                    return Poll::Ready(Err(late.error.take().unwrap_or_else(|| told.into())));
                }
            }
        }
    }

    /// All of `piece` behind `sent`, or an error: `WouldBlock` when the peer takes no more now.
    fn send(&self, piece: &[u8], sent: &mut usize) -> io::Result<()> {
        while *sent < piece.len() {
            match self.tcp.try_io(Interest::WRITABLE, || super::send(self.tcp.as_raw_fd(), &piece[*sent..]))? {
                0 => return Err(ErrorKind::WriteZero.into()),
                n => *sent += n,
            }
        }
        Ok(())
    }

    fn fail(&self, late: &mut Late, e: io::Error) {
        (late.bytes, late.sent, late.error) = (Vec::new(), 0, Some(e));
        self.state.set(State::Failed);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::poll_fn,
        io::{Read, Write},
        net::TcpStream as StdStream,
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        },
        task::Wake,
    };

    use super::*;

    /// Turns that the test ends.
    fn begin_turns() {
        WAITING.set(Some(Waiting::default()));
    }

    /// A stream of this worker and its peer, which does not wait.
    async fn pair() -> (Stream, StdStream) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (peer, own) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        let own = own.unwrap().0;
        own.writable().await.unwrap();
        (Stream::new(own), peer.unwrap().into_std().unwrap())
    }

    fn has(peer: &mut StdStream) -> Vec<u8> {
        let mut bytes = vec![0; 1 << 16];
        match peer.read(&mut bytes) {
            Ok(n) => bytes.truncate(n),
            Err(e) if e.kind() == ErrorKind::WouldBlock => bytes.clear(),
            Err(e) => panic!("{e}"),
        }
        bytes
    }

    /// All of what comes up to the end.
    fn rest(mut peer: StdStream) -> Vec<u8> {
        peer.set_nonblocking(false).unwrap();
        let mut bytes = Vec::new();
        peer.read_to_end(&mut bytes).unwrap();
        bytes
    }

    fn later(stream: &Stream, text: &[u8]) -> bool {
        stream.send_later(text, None)
    }

    #[derive(Default)]
    struct Told(AtomicUsize);

    impl Wake for Told {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Takes what the kernel does of endless bytes; how many.
    async fn fill(stream: &Stream) -> usize {
        let data = vec![b'.'; 1 << 20];
        let mut sent = 0;
        poll_fn(|cx| {
            loop {
                match stream.poll_write(cx, &data) {
                    Poll::Ready(n) => sent += n.unwrap(),
                    Poll::Pending => return Poll::Ready(()),
                }
            }
        })
        .await;
        sent
    }

    #[tokio::test]
    async fn without_turns_nothing_waits() {
        let (own, _peer) = pair().await;
        assert!(!later(&own, b"now"));
        assert!(own.is_settled());
    }

    #[tokio::test]
    async fn bytes_wait_for_the_end_of_the_turn() {
        begin_turns();
        let ((a, mut to_a), (b, mut to_b)) = (pair().await, pair().await);
        assert!(later(&a, b"one") && later(&b, b"two"));
        assert!(has(&mut to_a).is_empty() && has(&mut to_b).is_empty() && !a.is_settled());
        flush();
        assert_eq!((has(&mut to_a), has(&mut to_b)), (b"one".to_vec(), b"two".to_vec()));
        assert!(a.is_settled() && b.is_settled());
        flush();
        assert!(later(&a, b"three"));
        flush();
        assert_eq!(has(&mut to_a), b"three");
    }

    #[tokio::test]
    async fn a_turn_ends_on_a_thread_that_always_has_something_to_do() {
        let ((own, mut peer), local) = (pair().await, tokio::task::LocalSet::new());
        let sent = local.run_until(async {
            let turns = tokio::task::spawn_local(turns());
            tokio::task::spawn_local(async {
                loop {
                    tokio::task::yield_now().await;
                }
            });
            while !later(&own, b"x") {
                tokio::task::yield_now().await;
            }
            assert!(has(&mut peer).is_empty());
            let mut looks = 0;
            while !own.is_settled() && looks < 1000 {
                looks += 1;
                tokio::task::yield_now().await;
            }
            assert!(looks < 1000, "it waits for a thread that is idle");
            turns.abort();
            assert!(turns.await.is_err_and(|e| e.is_cancelled()));
            has(&mut peer)
        });
        assert_eq!(sent.await, b"x");
        assert!(!later(&own, b"y"), "nobody ends a turn any more");
    }

    #[tokio::test]
    async fn what_is_written_meanwhile_comes_behind_it() {
        begin_turns();
        let (own, mut peer) = pair().await;
        assert!(later(&own, b"first, ") && later(&own, b"second, "));
        assert!(!later(&own, &[b'x'; PIECE_MAX + 1]), "it is too long");
        assert_eq!(poll_fn(|cx| own.poll_write(cx, b"third, ")).await.unwrap(), 7);
        assert!(own.is_settled());
        assert!(later(&own, b"fourth, "));
        assert_eq!(
            poll_fn(|cx| own.poll_write_vectored(cx, &[IoSlice::new(b"fif"), IoSlice::new(b"th")])).await.unwrap(),
            5
        );
        assert!(later(&own, b", end"));
        poll_fn(|cx| own.poll_shutdown(cx)).await.unwrap();
        flush();
        assert_eq!(has(&mut peer), b"first, second, third, fourth, fifth, end");
        assert_eq!(rest(peer), b"");
    }

    #[tokio::test]
    async fn so_many_bytes_wait_and_no_more() {
        begin_turns();
        let piece = [b'x'; PIECE_MAX];
        let mut pairs = Vec::new();
        for _ in 0..WAITING_MAX / PIECE_MAX {
            pairs.push(pair().await);
        }
        let (last, others) = pairs.split_last_mut().unwrap();
        for (own, peer) in &mut *others {
            assert!(later(own, &piece) && has(peer).is_empty());
        }
        assert!(later(&last.0, &piece));
        assert!(pairs.iter_mut().all(|(own, peer)| own.is_settled() && has(peer) == piece));
    }

    #[tokio::test]
    async fn what_is_dropped_is_sent_before_it_is_closed() {
        begin_turns();
        let (own, peer) = pair().await;
        assert!(later(&own, b"goodbye"));
        drop(own);
        flush();
        assert_eq!(rest(peer), b"goodbye");
    }

    #[tokio::test]
    async fn a_peer_that_takes_no_more_is_waited_for() {
        begin_turns();
        let (own, peer) = pair().await;
        let filled = fill(&own).await;
        let told = Arc::new(Told::default());
        assert!(own.send_later(b"late", Some(&Waker::from(told.clone()))));
        assert_eq!(told.0.load(Ordering::Relaxed), 0);
        flush();
        assert_eq!((told.0.load(Ordering::Relaxed), own.0.state.get()), (1, State::Stuck));
        assert!(!later(&own, b"more"), "it has to wait");
        let reading = std::thread::spawn(move || rest(peer));
        // Who waits for something to read drives it.
        let mut byte = [0];
        poll_fn(|cx| match own.poll_read(cx, &mut ReadBuf::new(&mut byte)) {
            Poll::Pending if own.is_settled() => Poll::Ready(()),
            Poll::Pending => Poll::Pending,
            Poll::Ready(read) => panic!("{read:?}"),
        })
        .await;
        drop(own);
        let got = reading.join().unwrap();
        assert_eq!((got.len(), &got[filled..]), (filled + 4, &b"late"[..]));
    }

    #[tokio::test]
    async fn a_peer_that_is_gone_is_an_error_for_who_comes_next() {
        begin_turns();
        let (own, mut peer) = pair().await;
        poll_fn(|cx| own.poll_write(cx, b"unread")).await.unwrap();
        peer.write_all(b"x").unwrap();
        own.tcp().readable().await.unwrap();
        // Unread bytes make a reset of the close.
        drop(peer);
        let told = Arc::new(Told::default());
        loop {
            let queued = own.send_later(b"y", Some(&Waker::from(told.clone())));
            flush();
            if !queued || !own.is_settled() {
                break;
            }
        }
        assert_eq!((told.0.load(Ordering::Relaxed), own.0.state.get()), (1, State::Failed));
        assert!(!later(&own, b"z"));
        let mut byte = [0];
        let read = poll_fn(|cx| own.poll_read(cx, &mut ReadBuf::new(&mut byte))).await.map_err(|e| e.kind());
        assert!(matches!(read, Err(ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)), "{read:?}");
        let wrote = poll_fn(|cx| own.poll_write(cx, b"z")).await.map_err(|e| e.kind());
        assert_eq!(wrote, Err(ErrorKind::BrokenPipe));
    }
}
