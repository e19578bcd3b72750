//! Bytes both ways after `101 Switching Protocols`: WebSocket.

use std::{future::poll_fn, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};

use crate::{
    error::{Error, Kind, Result},
    exchange::Exchange,
    net::into_tunnel,
    upstream::Conn,
};

/// Bytes passed on in one piece.
const PIECE: usize = 16 * 1024;

/// Passes bytes on until either side ends, or nothing moves for `idle` (nginx's `proxy_read_timeout`).
pub(super) async fn run(x: &mut Exchange, conn: Box<Conn>, idle: Duration) -> Result<()> {
    let Some(mut client) = x.client.take() else { return Err(Error::client(Kind::Closed)) };
    poll_fn(|cx| client.poll_flush(cx)).await?;
    let Some(tunnel) = into_tunnel(client) else {
        return Err(Error::client(Kind::Other).context("only an HTTP/1 connection can switch protocols"));
    };
    let (upstream, from_upstream) = conn.into_tunnel();
    let (mut client_in, mut client_out) = tokio::io::split(tunnel.io);
    let (mut node_in, mut node_out) = tokio::io::split(upstream);
    let sent = &mut x.body_bytes_sent;
    let outcome = async {
        node_out.write_all(&tunnel.unread).await?;
        client_out.write_all(&from_upstream).await?;
        let (mut up, mut down) = (vec![0; PIECE], vec![0; PIECE]);
        loop {
            let moved = timeout(idle, async {
                tokio::select! {
                    n = client_in.read(&mut up) => n.map(|n| (true, n)),
                    n = node_in.read(&mut down) => n.map(|n| (false, n)),
                }
            });
            match moved.await {
                Err(_) => return Err(std::io::ErrorKind::TimedOut.into()),
                Ok(Err(e)) => return Err(e),
                Ok(Ok((_, 0))) => return Ok(()),
                Ok(Ok((true, n))) => {
                    timeout(idle, node_out.write_all(&up[..n])).await??;
                    timeout(idle, node_out.flush()).await??;
                }
                Ok(Ok((false, n))) => {
                    timeout(idle, client_out.write_all(&down[..n])).await??;
                    timeout(idle, client_out.flush()).await??;
                    *sent += n as u64;
                }
            }
        }
    }
    .await;
    let _ = client_out.shutdown().await;
    let _ = node_out.shutdown().await;
    x.response.ended = true;
    outcome.or_else(|e: std::io::Error| {
        // How tunnels end when a side just goes away.
        tracing::info!("the tunnel ended: {e}");
        Ok(())
    })
}
