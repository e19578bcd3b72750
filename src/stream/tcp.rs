//! TCP connections: PROXY protocol and TLS from the client, a node, PROXY protocol and TLS to it, and bytes both ways.

use std::{
    net::{IpAddr, SocketAddr, TcpListener},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use rustls::pki_types::ServerName;
use tokio::{net::TcpStream, task::spawn_local};

use super::{Streams, TCP_IDLE, Target, copy, session::Session, timeouts};
use crate::{
    error::{Error, Kind, Result},
    model::upstream::{Scheme, Upstream},
    net::{
        Io,
        drain::Open,
        listener::{self, Way},
    },
    observe::metrics::Listening,
    store::Snapshot,
    tls,
    upstream::{self, Tls},
};

/// nginx's `ssl_handshake_timeout`: for PROXY protocol and TLS together.
const HANDSHAKE: Duration = Duration::from_secs(60);

/// What a node is told when the client named nothing: APISIX's.
const UNNAMED: &str = "apisix_backend";

/// A listening socket with what is spoken on it.
pub struct Listener {
    pub socket: TcpListener,
    pub proxy_protocol: bool,
    pub tls: Option<listener::Tls>,
    /// Connections to nodes begin with a PROXY protocol header.
    pub to_upstream: bool,
}

/// What the connections of a listener share.
struct Desk {
    way: Way,
    listening: Arc<Listening>,
    to_upstream: bool,
}

/// Accepts until the worker drains. One task per connection, on the calling thread.
pub async fn run(streams: Rc<Streams>, listener: Listener) -> Result<()> {
    let Listener { socket, proxy_protocol, tls, to_upstream } = listener;
    let way = Way { local: socket.local_addr()?, proxy_protocol, tls };
    let desk = Rc::new(Desk { listening: streams.metrics.listening(way.local), way, to_upstream });
    let (drain, max) = (streams.drain.clone(), streams.settings.max_connections);
    let serve = |tcp, peer, open| {
        spawn_local(connection(streams.clone(), desk.clone(), (tcp, peer), open));
    };
    listener::accept(socket, &drain, max, serve).await
}

async fn connection(streams: Rc<Streams>, desk: Rc<Desk>, (tcp, peer): (TcpStream, SocketAddr), _open: Open) {
    let Desk { way, listening, to_upstream } = &*desk;
    let active = listening.session();
    let Some((mut client, conn)) = listener::open_within(HANDSHAKE, tcp, peer, way).await else { return };
    let peer_ip = peer.ip().to_canonical();
    let trusted = || streams.settings.real_ip_from.iter().any(|net| net.contains(&peer_ip));
    let from = conn.proxy.filter(|_| trusted()).map_or(peer, |(client, _)| client);
    // A PROXY protocol header says whom the client meant to reach; routes are about this gateway.
    let mut session = Session::new(conn.serial, "TCP", from, conn.local);
    (session.peer, session.tls) = (peer, conn.tls);
    let outcome = proxy(&streams, &mut session, &mut client, (*to_upstream, active.listening())).await;
    streams.ended(&mut session, way.local, outcome);
}

/// `to_upstream`: the node is told of the client by a PROXY protocol header.
async fn proxy(
    streams: &Streams,
    session: &mut Session,
    client: &mut Io,
    (to_upstream, counts): (bool, &Listening),
) -> Result<()> {
    check_certificate(session)?;
    let Target { snapshot, upstream, health } = streams.target(session).await?;
    let times = timeouts(&upstream, TCP_IDLE);
    let tls = tls_to(&upstream, &snapshot, session.sni(), &*streams.registries).await?;
    let first = if to_upstream { proxy_header(session.client, session.server) } else { String::new() };
    let open = async |addr| upstream::open(addr, None, first.as_bytes(), tls.as_ref(), times.connect).await;
    let (mut node, _lease) = streams.reach(session, (&upstream, health.as_deref()), open).await?;
    // The configuration that has been replaced meanwhile is not held for as long as the session lasts.
    drop((snapshot, upstream));
    session.established = true;
    let mut moved = copy::Moved::default();
    let limits = copy::Limits { send: times.send, read: times.read };
    let outcome = copy::both(client, &mut node, limits, counts, &mut moved).await;
    session.over(moved.from_client, moved.to_client);
    outcome
}

/// Whether the client has shown the certificate that its name's object asks for. No path can excuse it (`skip_mtls_uri_regex`).
fn check_certificate(session: &Session) -> Result<()> {
    let Some(info) = &session.tls else { return Ok(()) };
    let asks = info.ssl.as_ref().is_some_and(|ssl| ssl.value.client_ca.is_some());
    if !asks || &*info.client_verify == "SUCCESS" {
        return Ok(());
    }
    let text = format!("client certificate verification is not passed: {}", info.client_verify);
    Err(Error::client(Kind::Tls).context(text))
}

/// `scheme: tls`. A client's SNI is passed on.
async fn tls_to(
    upstream: &Upstream,
    snapshot: &Snapshot,
    sni: Option<&str>,
    secrets: &dyn tls::Secrets,
) -> Result<Option<Tls>> {
    if upstream.scheme != Scheme::Tls {
        return Ok(None);
    }
    let settings = upstream.tls.as_deref();
    let of_id = || snapshot.ssls.get(settings?.client_cert_id.as_ref()?)?.value.pairs.first();
    let pair = settings.and_then(|tls| tls.client_pair.as_ref()).or_else(of_id);
    let fetched = tls::secrets::fetched_pair(pair, secrets).await?;
    let pair = fetched.as_ref().or(pair).map(|(cert, key)| (&**cert, &**key));
    let config = tls::client_config(settings.is_some_and(|tls| tls.verify), pair, &[])?;
    let name = ServerName::try_from(sni.unwrap_or(UNNAMED).to_owned())
        .map_err(|e| Error::upstream(Kind::Tls).cause(e).context("server name for TLS to the upstream"))?;
    Ok(Some(Tls { config, name }))
}

/// Version 1, as nginx sends it.
fn proxy_header(client: SocketAddr, server: SocketAddr) -> String {
    let (from, to) = (client.ip().to_canonical(), server.ip().to_canonical());
    let family = match (from, to) {
        (IpAddr::V4(_), IpAddr::V4(_)) => "TCP4",
        (IpAddr::V6(_), IpAddr::V6(_)) => "TCP6",
        // A client of the other family, as a header of its own said: the line has no room for both.
        _ => return "PROXY UNKNOWN\r\n".to_owned(),
    };
    format!("PROXY {family} {from} {to} {} {}\r\n", client.port(), server.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_name_both_ends_when_they_are_of_one_family() {
        let header = |client: &str, server: &str| proxy_header(client.parse().unwrap(), server.parse().unwrap());
        assert_eq!(header("1.2.3.4:5", "6.7.8.9:10"), "PROXY TCP4 1.2.3.4 6.7.8.9 5 10\r\n");
        assert_eq!(header("[::ffff:1.2.3.4]:5", "6.7.8.9:10"), "PROXY TCP4 1.2.3.4 6.7.8.9 5 10\r\n");
        assert_eq!(header("[::1]:5", "[::2]:10"), "PROXY TCP6 ::1 ::2 5 10\r\n");
        assert_eq!(header("[::1]:5", "6.7.8.9:10"), "PROXY UNKNOWN\r\n");
    }
}
