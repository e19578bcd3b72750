//! A node's byte stream: TCP, or TLS over it.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::client::TlsStream;

use crate::tcp;

pub enum Stream {
    Tcp(tcp::Stream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Stream {
    /// Nothing waits to be sent at the end of the turn.
    pub fn is_settled(&self) -> bool {
        match self {
            Stream::Tcp(s) => s.is_settled(),
            Stream::Tls(_) => true,
        }
    }

    /// Appends what there is to `into`, never past its capacity. `Ready(Ok(0))` is the end.
    pub fn poll_read_into(&mut self, cx: &mut Context<'_>, into: &mut Vec<u8>) -> Poll<io::Result<usize>> {
        let mut buf = ReadBuf::uninit(into.spare_capacity_mut());
        ready!(Pin::new(self).poll_read(cx, &mut buf))?;
        let n = buf.filled().len();
        // SAFETY: the first `n` bytes of the spare capacity were just filled.
        unsafe { into.set_len(into.len() + n) };
        Poll::Ready(Ok(n))
    }
}

impl AsyncRead for Stream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Stream::Tcp(s) => s.poll_read(cx, buf),
            Stream::Tls(s) => Pin::new(s.as_mut()).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        match &mut *self {
            Stream::Tcp(s) => s.poll_write(cx, data),
            Stream::Tls(s) => Pin::new(s.as_mut()).poll_write(cx, data),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Stream::Tcp(s) => s.poll_settled(cx),
            Stream::Tls(s) => Pin::new(s.as_mut()).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Stream::Tcp(s) => s.poll_shutdown(cx),
            Stream::Tls(s) => Pin::new(s.as_mut()).poll_shutdown(cx),
        }
    }
}
