//! Bodies that conditions of routes ask about: read before a route is found, and only for a request that has met a route which asks.

use bytes::Bytes;

use super::Proxy;
use crate::{
    error::Result,
    exchange::{
        Exchange, RequestBody,
        asked::{self, About, Asked, BodyText},
    },
};

/// Reads what is asked for. What cannot be had is logged and stays unknown: the route that asks does not match. An error is one
/// of the client's connection.
pub(super) async fn read(p: &Proxy, x: &mut Exchange, asked: Asked) -> Result<()> {
    for about in asked.each() {
        let most = match about {
            About::Graphql => p.settings.graphql_max,
            About::Posted => p.settings.posted_max,
        };
        let body = if about.is_in_body(x) { body(p, x, most).await? } else { Ok(Bytes::new()) };
        about.learn(x, body);
    }
    Ok(())
}

/// The whole body, or why it is not for us. `most`: bytes.
async fn body(p: &Proxy, x: &mut Exchange, most: u64) -> Result<Result<Bytes, String>> {
    if let RequestBody::Streaming { length: Some(n) } = x.body
        && n > most
    {
        return Ok(Err(asked::too_long(n, most)));
    }
    p.runner.read_body(x).await?;
    Ok(match asked::read_body(&x.body, most) {
        None => Ok(Bytes::new()),
        Some(Err(why)) => Err(why),
        Some(Ok(BodyText::Here(bytes))) => Ok(bytes),
        Some(Ok(BodyText::At(path))) => {
            tokio::fs::read(path).await.map(Bytes::from).map_err(|e| format!("read {}: {e}", path.display()))
        }
    })
}
