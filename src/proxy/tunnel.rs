//! Bytes both ways after `101 Switching Protocols`: WebSocket.

use std::{
    cell::Cell,
    future::poll_fn,
    io,
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::sleep_until,
};

use crate::{
    error::{Error, Kind, Result},
    exchange::Exchange,
    net::into_tunnel,
    upstream::Conn,
};

/// Bytes passed on in one piece.
const PIECE: usize = 16 * 1024;

/// Passes bytes on until either side ends, or nothing moves for `idle` (nginx's `proxy_read_timeout`). Each direction goes on by itself: a
/// side that does not read for a while may have much to say.
pub(super) async fn run(x: &mut Exchange, conn: Box<Conn>, idle: Duration) -> Result<()> {
    let Some(mut client) = x.client.take() else { return Err(Error::client(Kind::Closed)) };
    poll_fn(|cx| client.poll_flush(cx)).await?;
    let head_bytes = client.bytes_sent();
    let Some(tunnel) = into_tunnel(client) else {
        return Err(Error::client(Kind::Other).context("only an HTTP/1 connection can switch protocols"));
    };
    let (received, written) = (conn.received(), conn.sent());
    let (upstream, from_upstream) = conn.into_tunnel();
    let (client_in, mut client_out) = tokio::io::split(tunnel.io);
    let (node_in, mut node_out) = tokio::io::split(upstream);
    let (up, down, moved) = (Cell::new(0), Cell::new(0), Cell::new(Instant::now()));
    let outcome = tokio::select! {
        ended = pass(client_in, &mut node_out, &tunnel.unread, &up, &moved) => ended,
        ended = pass(node_in, &mut client_out, &from_upstream, &down, &moved) => ended,
        () = stands_still(idle, &moved) => Err(io::ErrorKind::TimedOut.into()),
    };
    x.body_bytes_sent += down.get();
    x.bytes_sent = head_bytes + down.get();
    if let Some(last) = x.upstream.tries.last_mut() {
        last.response_length = down.get();
        // What came with the head is counted with it.
        last.bytes_received = received + down.get().saturating_sub(from_upstream.len() as u64);
        last.bytes_sent = written + up.get();
    }
    let _ = client_out.shutdown().await;
    let _ = node_out.shutdown().await;
    x.response.ended = true;
    outcome.or_else(|e: io::Error| {
        // How tunnels end when a side just goes away.
        tracing::info!("the tunnel ended: {e}");
        Ok(())
    })
}

/// One direction, to its end. `first`: what was read before. `count`: bytes that were passed on.
async fn pass(
    mut from: impl AsyncRead + Unpin,
    to: &mut (impl AsyncWrite + Unpin),
    first: &[u8],
    count: &Cell<u64>,
    moved: &Cell<Instant>,
) -> io::Result<()> {
    let mut piece = first.to_vec();
    let mut n = piece.len();
    piece.resize(n.max(PIECE), 0);
    loop {
        if n > 0 {
            to.write_all(&piece[..n]).await?;
            to.flush().await?;
            count.set(count.get() + n as u64);
            moved.set(Instant::now());
        }
        n = from.read(&mut piece).await?;
        if n == 0 {
            return Ok(());
        }
        moved.set(Instant::now());
    }
}

/// Ready when nothing has moved for so long.
async fn stands_still(idle: Duration, moved: &Cell<Instant>) {
    loop {
        let end = moved.get() + idle;
        if end <= Instant::now() {
            return;
        }
        sleep_until(end.into()).await;
    }
}
