//! Reads and writes of a TCP stream: what tokio's do, with less around each.
//!
//! A proxied request is two of both, and next to the kernel's share of them the rest should not show. The kernel is asked
//! first and a wait is prepared only when it says no, and it is asked directly: glibc's `send` and `recv` are prepared for
//! threads that are cancelled, which costs each call two atomic operations in a program with threads.

pub mod buffers;
mod stream;

use std::{
    io::{self, ErrorKind},
    mem::MaybeUninit,
    os::fd::{AsRawFd, RawFd},
    ptr,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{Interest, ReadBuf},
    net::TcpStream,
    task::coop,
};

pub use stream::{Stream, flush, turns};

/// `AsyncRead::poll_read`.
pub fn poll_read(tcp: &TcpStream, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
    // A peer that always has more must not keep the thread from everybody else.
    let budget = ready!(coop::poll_proceed(cx));
    loop {
        match read_now(tcp, buf) {
            Err(e) if e.kind() == ErrorKind::WouldBlock => ready!(tcp.poll_read_ready(cx))?,
            done => {
                budget.made_progress();
                return Poll::Ready(done);
            }
        }
    }
}

/// `AsyncWrite::poll_write`.
pub fn poll_write(tcp: &TcpStream, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
    // Nor one that takes whatever comes (a file that is sent to it).
    let budget = ready!(coop::poll_proceed(cx));
    loop {
        match tcp.try_io(Interest::WRITABLE, || send(tcp.as_raw_fd(), data)) {
            Err(e) if e.kind() == ErrorKind::WouldBlock => ready!(tcp.poll_write_ready(cx))?,
            done => {
                budget.made_progress();
                return Poll::Ready(done);
            }
        }
    }
}

fn read_now(tcp: &TcpStream, buf: &mut ReadBuf<'_>) -> io::Result<()> {
    let mut got = None;
    // SAFETY: only bytes that were received are written, and nothing is made uninitialized.
    let room = unsafe { buf.unfilled_mut() };
    let tried = tcp.try_io(Interest::READABLE, || {
        let n = receive(tcp.as_raw_fd(), room)?;
        got = Some(n);
        // Less than there is room for: nothing is left, and epoll will tell of what comes next. Said now, it saves the
        // read that would find out.
        if n > 0 && n < room.len() { Err(ErrorKind::WouldBlock.into()) } else { Ok(()) }
    });
    let Some(n) = got else { return tried };
    // SAFETY: the kernel has written the first `n` bytes.
    unsafe { buf.assume_init(n) };
    buf.advance(n);
    Ok(())
}

fn receive(fd: RawFd, room: &mut [MaybeUninit<u8>]) -> io::Result<usize> {
    let nobody: *mut libc::c_void = ptr::null_mut();
    // SAFETY: the kernel writes at most `room.len()` bytes to `room`; no address is asked for.
    counted(|| unsafe { libc::syscall(libc::SYS_recvfrom, fd, room.as_mut_ptr(), room.len(), 0, nobody, nobody) })
}

fn send(fd: RawFd, data: &[u8]) -> io::Result<usize> {
    let nobody: *const libc::c_void = ptr::null();
    let flags = libc::MSG_NOSIGNAL;
    // SAFETY: the kernel reads at most `data.len()` bytes of `data`; no address is given.
    counted(|| unsafe { libc::syscall(libc::SYS_sendto, fd, data.as_ptr(), data.len(), flags, nobody, 0) })
}

/// The result of a system call that counts bytes, made again when a signal came between.
fn counted(mut call: impl FnMut() -> libc::c_long) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(n) => return Ok(n),
            Err(_) => match io::Error::last_os_error() {
                e if e.kind() == ErrorKind::Interrupted => {}
                e => return Err(e),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, io::Write, pin::pin, task::Waker};

    use tokio::io::AsyncWriteExt;

    use super::*;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (a, b) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        (a.unwrap(), b.unwrap().0)
    }

    async fn read(tcp: &TcpStream, max: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; max];
        let mut buf = ReadBuf::new(&mut bytes);
        poll_fn(|cx| poll_read(tcp, cx, &mut buf)).await?;
        let n = buf.filled().len();
        bytes.truncate(n);
        Ok(bytes)
    }

    #[tokio::test]
    async fn reads_what_comes_until_the_end() {
        let (mut a, b) = pair().await;
        a.write_all(b"hello").await.unwrap();
        assert_eq!(read(&b, 3).await.unwrap(), b"hel");
        assert_eq!(read(&b, 3).await.unwrap(), b"lo");
        {
            let mut late = pin!(read(&b, 3));
            assert!(late.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
            a.write_all(b"x").await.unwrap();
            assert_eq!(late.await.unwrap(), b"x");
        }
        // The end comes with the last bytes: it is seen although the read before it was short.
        a.write_all(b"y").await.unwrap();
        drop(a);
        assert_eq!(read(&b, 3).await.unwrap(), b"y");
        assert_eq!(read(&b, 3).await.unwrap(), b"");
        assert_eq!(read(&b, 3).await.unwrap(), b"");
    }

    #[tokio::test]
    async fn writes_until_the_peer_takes_no_more_and_goes_on_when_it_does() {
        let (a, b) = pair().await;
        let data = vec![7; 1 << 20];
        let mut sent = 0;
        let full = poll_fn(|cx| {
            loop {
                match poll_write(&a, cx, &data) {
                    Poll::Ready(n) => sent += n.unwrap(),
                    Poll::Pending => return Poll::Ready(()),
                }
            }
        });
        full.await;
        assert!(sent > 0);
        let mut more = pin!(poll_fn(|cx| poll_write(&a, cx, b"end")));
        let mut received = 0;
        let sent = loop {
            tokio::select! {
                biased;
                n = &mut more => break sent + n.unwrap(),
                got = read(&b, 1 << 16) => received += got.unwrap().len(),
            }
        };
        while received < sent {
            received += read(&b, 1 << 16).await.unwrap().len();
        }
        assert_eq!(received, sent);
    }

    #[tokio::test]
    async fn a_peer_that_is_gone_is_an_error_and_no_signal() {
        let (a, b) = pair().await;
        // Unread bytes make a reset of the close.
        let mut a = a.into_std().unwrap();
        a.write_all(b"x").unwrap();
        b.readable().await.unwrap();
        drop(b);
        let a = TcpStream::from_std(a).unwrap();
        let failed = loop {
            if let Err(e) = poll_fn(|cx| poll_write(&a, cx, b"y")).await {
                break e.kind();
            }
        };
        assert!(matches!(failed, ErrorKind::BrokenPipe | ErrorKind::ConnectionReset), "{failed}");
    }

    #[tokio::test]
    async fn one_that_always_has_more_lets_others_run() {
        let (mut a, b) = pair().await;
        tokio::spawn(async move {
            let data = vec![1; 1 << 16];
            while a.write_all(&data).await.is_ok() {}
        });
        let reader = tokio::spawn(async move { while read(&b, 1).await.is_ok_and(|got| !got.is_empty()) {} });
        // On one thread: without a budget the reader never lets this go on.
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        reader.abort();
    }

    #[tokio::test]
    async fn one_that_takes_everything_lets_others_run() {
        let (a, b) = pair().await;
        let mut b = b.into_std().unwrap();
        b.set_nonblocking(false).unwrap();
        // Reads on a thread of its own, faster than single bytes are written.
        let reading = std::thread::spawn(move || io::copy(&mut b, &mut io::sink()));
        let writer = tokio::spawn(async move { while poll_fn(|cx| poll_write(&a, cx, b"x")).await.is_ok() {} });
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        writer.abort();
        assert!(writer.await.unwrap_err().is_cancelled());
        assert!(reading.join().unwrap().unwrap() > 0);
    }
}
