//! The first message of a TLS client, in reads of any size. What the TLS library takes for a ClientHello must be one here, too: on
//! what is none no script runs.
#![no_main]

use std::{
    future::Future,
    io,
    pin::{Pin, pin},
    task::{Context, Poll, Waker},
};

use libfuzzer_sys::fuzz_target;
use moongate::tls::hello::{self, Hello};
use tokio::io::{AsyncRead, ReadBuf};

/// Gives so many bytes with each read.
struct Steps<'a>(&'a [u8], usize);

impl AsyncRead for Steps<'_> {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let n = self.1.min(self.0.len()).min(into.remaining());
        let (now, later) = self.0.split_at(n);
        into.put_slice(now);
        self.0 = later;
        Poll::Ready(Ok(()))
    }
}

fuzz_target!(|input: (u8, &[u8])| {
    let (step, bytes) = input;
    let mut stream = Steps(bytes, usize::from(step) + 1);
    let read = pin!(hello::read(&mut stream)).poll(&mut Context::from_waker(Waker::noop()));
    let Poll::Ready(Ok(opening)) = read else { panic!("nothing waits or fails here") };
    assert!(bytes.starts_with(&opening.bytes));
    let parsed = opening.hello.as_deref().and_then(Hello::parse);
    if let Some(hello) = &parsed {
        let _ = (hello.server_name(), hello.resumes(true), hello.resumes(false), hello.offers(0x304), hello.keep());
        let _ = (hello.resumed_session(true), hello.resumed_session(false), hello.supported_versions().map(Iterator::count));
        let _ = hello.ciphers().count() + hello.extensions().count();
    }
    let mut acceptor = rustls::server::Acceptor::default();
    let mut unread = bytes;
    while let Ok(1..) = acceptor.read_tls(&mut unread) {
        match acceptor.accept() {
            Ok(Some(_)) => return assert!(parsed.is_some(), "the library takes it for a ClientHello"),
            Ok(None) => {}
            Err(_) => return,
        }
    }
});
