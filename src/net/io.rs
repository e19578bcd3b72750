//! A client's byte stream: TCP, or TLS over it.

use std::{
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::fd::AsRawFd,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::server::TlsStream;

use crate::{
    exchange::TcpInfo,
    tcp::{self, buffers},
    tls::Watched,
};

/// What is read at once from a client that is only watched.
const PIECE: usize = 4096;

/// A TCP stream from which something was read too early (after a PROXY protocol header).
pub struct Socket {
    unread: Vec<u8>,
    tcp: tcp::Stream,
}

/// What a connection is read from and written to.
pub enum Io {
    Tcp(Socket),
    Tls(Box<TlsStream<Socket>>),
}

impl Socket {
    pub fn new(tcp: TcpStream, unread: Vec<u8>) -> Self {
        Socket { unread, tcp: tcp::Stream::new(tcp) }
    }

    /// The next reads give `bytes` first.
    pub fn put_back(&mut self, mut bytes: Vec<u8>) {
        bytes.append(&mut self.unread);
        self.unread = bytes;
    }

    /// The stream below what was read too early.
    pub fn stream(&self) -> &tcp::Stream {
        &self.tcp
    }

    /// Whether a read may find something.
    pub fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.unread.is_empty() { self.tcp.poll_readable(cx) } else { Poll::Ready(Ok(())) }
    }
}

impl Watched for Socket {
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut piece = [MaybeUninit::uninit(); PIECE];
        loop {
            // A client that sends far ahead is not looked at further: its bytes would have to be kept.
            let room = buffers::SIZE.saturating_sub(self.unread.len()).min(PIECE);
            if room == 0 {
                return Poll::Pending;
            }
            let mut buf = ReadBuf::uninit(&mut piece[..room]);
            match ready!(self.tcp.poll_read(cx, &mut buf)) {
                Ok(()) if !buf.filled().is_empty() => self.unread.extend_from_slice(buf.filled()),
                _ => return Poll::Ready(()),
            }
        }
    }
}

impl Io {
    /// The stream below TLS and what was read too early.
    pub fn stream(&self) -> &tcp::Stream {
        match self {
            Io::Tcp(s) => &s.tcp,
            Io::Tls(s) => &s.get_ref().0.tcp,
        }
    }

    /// What the kernel knows of the connection.
    pub fn tcp_info(&self) -> Option<TcpInfo> {
        let mut len = size_of::<libc::tcp_info>() as libc::socklen_t;
        let fd = self.stream().tcp().as_raw_fd();
        // SAFETY: plain old data, for which zeros are valid; the kernel writes at most `len` bytes of it.
        let (failed, info) = unsafe {
            let mut info: libc::tcp_info = std::mem::zeroed();
            let into = (&raw mut info).cast();
            (libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, into, &mut len), info)
        };
        (failed == 0).then_some(TcpInfo {
            rtt: info.tcpi_rtt,
            rttvar: info.tcpi_rttvar,
            snd_cwnd: info.tcpi_snd_cwnd,
            rcv_space: info.tcpi_rcv_space,
        })
    }

    /// See `Client::export_keying_material`.
    pub fn export_keying_material(
        &self,
        out: &mut [u8],
        label: &[u8],
        context: Option<&[u8]>,
    ) -> Option<Result<(), String>> {
        let Io::Tls(stream) = self else { return None };
        let exported = stream.get_ref().1.export_keying_material(out, label, context);
        Some(exported.map(|_| ()).map_err(|e| e.to_string()))
    }

    /// Appends what there is to `into`, at most `max` bytes and never past its capacity. `Ready(Ok(0))` is the end.
    pub fn poll_read_into(&mut self, cx: &mut Context<'_>, into: &mut Vec<u8>, max: usize) -> Poll<io::Result<usize>> {
        let spare = into.spare_capacity_mut();
        let room = spare.len().min(max);
        let mut buf = ReadBuf::uninit(&mut spare[..room]);
        ready!(Pin::new(self).poll_read(cx, &mut buf))?;
        let n = buf.filled().len();
        // SAFETY: the first `n` bytes of the spare capacity were just filled.
        unsafe { into.set_len(into.len() + n) };
        Poll::Ready(Ok(n))
    }
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if !self.unread.is_empty() {
            let n = self.unread.len().min(buf.remaining());
            buf.put_slice(&self.unread[..n]);
            self.unread.drain(..n);
            if self.unread.is_empty() {
                self.unread = Vec::new();
            }
            return Poll::Ready(Ok(()));
        }
        self.tcp.poll_read(cx, buf)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.tcp.poll_write(cx, data)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.tcp.poll_write_vectored(cx, data)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.tcp.poll_settled(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.tcp.poll_shutdown(cx)
    }
}

impl AsyncRead for Io {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Io::Tcp(s) => Pin::new(s).poll_read(cx, buf),
            Io::Tls(s) => Pin::new(s.as_mut()).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Io {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        match &mut *self {
            Io::Tcp(s) => Pin::new(s).poll_write(cx, data),
            Io::Tls(s) => Pin::new(s.as_mut()).poll_write(cx, data),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut *self {
            Io::Tcp(s) => Pin::new(s).poll_write_vectored(cx, data),
            Io::Tls(s) => Pin::new(s.as_mut()).poll_write_vectored(cx, data),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Io::Tcp(s) => Pin::new(s).poll_flush(cx),
            Io::Tls(s) => Pin::new(s.as_mut()).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Io::Tcp(s) => Pin::new(s).poll_shutdown(cx),
            Io::Tls(s) => Pin::new(s.as_mut()).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, io::Write};

    use tokio::io::AsyncReadExt;

    use super::*;

    /// A client and its connection on the gateway's side.
    async fn connected() -> (std::net::TcpStream, Socket) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let client = std::net::TcpStream::connect(listener.local_addr().expect("an address")).expect("connected");
        let (tcp, _) = listener.accept().await.expect("accepted");
        (client, Socket::new(tcp, b"early, ".to_vec()))
    }

    /// Watches until so many bytes are kept; the client is there.
    async fn watched(socket: &mut Socket, kept: usize) {
        let until = |cx: &mut Context<'_>| {
            assert!(socket.poll_gone(cx).is_pending());
            if socket.unread.len() == kept { Poll::Ready(()) } else { Poll::Pending }
        };
        poll_fn(until).await;
    }

    #[tokio::test]
    async fn what_a_watched_client_sends_is_kept() {
        let (mut client, mut socket) = connected().await;
        client.write_all(b"then more").expect("sent");
        watched(&mut socket, b"early, then more".len()).await;
        client.write_all(b", and the end").expect("sent");
        drop(client);
        poll_fn(|cx| socket.poll_gone(cx)).await;
        let mut all = Vec::new();
        socket.read_to_end(&mut all).await.expect("read");
        assert_eq!(all, b"early, then more, and the end");
    }

    #[tokio::test]
    async fn so_much_of_a_watched_client_is_kept_and_no_more() {
        let (mut client, mut socket) = connected().await;
        let sent = vec![b'x'; buffers::SIZE];
        client.write_all(&sent).expect("sent");
        watched(&mut socket, buffers::SIZE).await;
        drop(client);
        watched(&mut socket, buffers::SIZE).await;
        let mut all = Vec::new();
        socket.read_to_end(&mut all).await.expect("read");
        assert_eq!(all, [b"early, ", &sent[..]].concat());
    }
}
