//! One probe of a node: connect, and for HTTP ask and read the status.

use std::net::SocketAddr;

use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::{Instant, timeout_at},
};

use super::state::Event;
use crate::{
    error::{Error, Kind, Result},
    model::upstream::checks::{Active, Probe},
    tls,
    upstream::{self, Stream, Tls},
};

/// Bytes that are read in search of the status: its line has a version, three digits and a phrase.
const MAX_STATUS_LINE: usize = 1024;

/// What a probe of the node at `addr` tells, and the words for error.log when it fails. `None`: a status that tells nothing.
pub async fn probe(
    addr: SocketAddr,
    host: &str,
    active: &Active,
    pair: Option<(&str, &str)>,
) -> (Option<Event>, String) {
    match ask(addr, host, active, pair).await {
        Ok(None) => (Some(Event::Success), String::new()),
        Ok(Some(status)) if active.statuses.healthy.contains(&status) => (Some(Event::Success), String::new()),
        Ok(Some(status)) if active.statuses.unhealthy.contains(&status) => {
            (Some(Event::Http), format!("status {status}"))
        }
        Ok(Some(_)) => (None, String::new()),
        Err(e) => (Some(Event::of(&e).unwrap_or(Event::Tcp)), e.to_string()),
    }
}

impl Event {
    /// What the failure of a try at a node tells of that node. `None`: it was not the node that failed.
    pub fn of(e: &Error) -> Option<Event> {
        match e.kind() {
            Kind::ConnectTimeout | Kind::ReadTimeout | Kind::WriteTimeout => Some(Event::Timeout),
            Kind::ConnectRefused | Kind::Closed | Kind::Tls | Kind::Malformed | Kind::TooLarge => Some(Event::Tcp),
            _ => None,
        }
    }
}

/// The status; `None` for a probe that only connects.
async fn ask(addr: SocketAddr, host: &str, active: &Active, pair: Option<(&str, &str)>) -> Result<Option<u16>> {
    let until = Instant::now() + active.timeout;
    let tls = match active.kind {
        Probe::Https => Some(tls_of(host, active, pair)?),
        Probe::Http | Probe::Tcp => None,
    };
    let mut stream = upstream::open(addr, None, &[], tls.as_ref(), active.timeout).await?;
    if active.kind == Probe::Tcp {
        return Ok(None);
    }
    let late = |_| Error::upstream(Kind::ReadTimeout).context("no status line in time");
    timeout_at(until, status_of(&mut stream, &request(addr, host, active))).await.map_err(late)?.map(Some)
}

fn tls_of(host: &str, active: &Active, pair: Option<(&str, &str)>) -> Result<Tls> {
    let config = tls::client_config(active.verify, pair, &[])?;
    let name = host.rsplit_once(':').filter(|(name, _)| !name.contains(':')).map_or(host, |(name, _)| name);
    let name = ServerName::try_from(name.to_owned())
        .map_err(|e| Error::upstream(Kind::Tls).cause(e).context(format!("{name} is no name for TLS")))?;
    Ok(Tls { config, name })
}

/// Without line breaks that a configuration might have put where they would begin another field.
fn request(addr: SocketAddr, host: &str, active: &Active) -> Vec<u8> {
    let plain = |text: &str| text.replace(['\r', '\n'], "");
    let host = match (host, addr) {
        ("", SocketAddr::V6(addr)) => format!("[{}]", addr.ip()),
        ("", SocketAddr::V4(addr)) => addr.ip().to_string(),
        _ => plain(host),
    };
    let mut text = format!("{} {} HTTP/1.1\r\nConnection: close\r\n", plain(&active.method), plain(&active.path));
    let is_host = |field: &str| field.split(':').next().is_some_and(|name| name.trim().eq_ignore_ascii_case("host"));
    if !active.headers.iter().any(|field| is_host(field)) {
        text.push_str(&format!("Host: {host}\r\n"));
    }
    for field in &active.headers {
        text.push_str(&plain(field));
        text.push_str("\r\n");
    }
    if !active.body.is_empty() {
        text.push_str(&format!("Content-Length: {}\r\n", active.body.len()));
    }
    text.push_str("\r\n");
    text.push_str(&active.body);
    text.into_bytes()
}

async fn status_of(stream: &mut Stream, request: &[u8]) -> Result<u16> {
    let broken = |e: std::io::Error| Error::upstream(Kind::Closed).cause(e).context("the connection broke");
    stream.write_all(request).await.map_err(broken)?;
    stream.flush().await.map_err(broken)?;
    let mut line = [0; MAX_STATUS_LINE];
    let mut filled = 0;
    loop {
        if let Some(end) = memchr::memchr(b'\n', &line[..filled]) {
            return status(&line[..end]);
        }
        match stream.read(&mut line[filled..]).await.map_err(broken)? {
            0 if filled == MAX_STATUS_LINE => return Err(no_status(&line)),
            0 => return Err(Error::upstream(Kind::Closed).context("closed before the status line was whole")),
            n => filled += n,
        }
    }
}

/// Of `HTTP/1.1 200 OK`.
fn status(line: &[u8]) -> Result<u16> {
    let words: Vec<&[u8]> = line.splitn(3, |b| *b == b' ').collect();
    let digits = words.get(1).filter(|_| words[0].starts_with(b"HTTP/")).and_then(|word| word.get(..3));
    let status = digits.and_then(|digits| std::str::from_utf8(digits).ok()).and_then(|digits| digits.parse().ok());
    status.ok_or_else(|| no_status(line))
}

fn no_status(line: &[u8]) -> Error {
    const SHOWN: usize = 64;
    let start = line[..line.len().min(SHOWN)].escape_ascii();
    Error::upstream(Kind::Malformed).context(format!("{start} is no status line"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::upstream::checks::Checks;

    fn active(json: serde_json::Value) -> Active {
        Checks::from_json(json!({"active": json}).as_object().expect("a map")).active
    }

    #[test]
    fn what_fails_here_tells_nothing_of_the_node() {
        for (kind, event) in [
            (Kind::ConnectRefused, Some(Event::Tcp)),
            (Kind::ReadTimeout, Some(Event::Timeout)),
            (Kind::Busy, None),
            (Kind::NoNode, None),
            (Kind::Other, None),
        ] {
            assert_eq!(Event::of(&Error::upstream(kind)), event, "{kind:?}");
        }
    }

    #[test]
    fn status_lines_are_read_and_others_refused() {
        assert_eq!(status(b"HTTP/1.1 200 OK\r").unwrap(), 200);
        assert_eq!(status(b"HTTP/1.0 503\r").unwrap(), 503);
        for line in ["", "HTTP/1.1", "HTTP/1.1 2", "SSH-2.0-x 200 y", "HTTP/1.1 abc"] {
            assert!(status(line.as_bytes()).is_err(), "{line}");
        }
    }

    #[test]
    fn the_request_is_what_the_checks_say_and_no_field_begins_another() {
        let addr = SocketAddr::from(([127, 0, 0, 1], 80));
        let checks = active(json!({"http_path": "/a\r\nX: y", "req_headers": ["A: b\r\nC: d"], "http_req_body": "xy"}));
        let text = String::from_utf8(request(addr, "h.test", &checks)).unwrap();
        assert_eq!(
            text,
            "GET /aX: y HTTP/1.1\r\nConnection: close\r\nHost: h.test\r\nA: bC: d\r\nContent-Length: 2\r\n\r\nxy"
        );
        let own = active(json!({"req_headers": ["host: mine"], "http_method": "HEAD"}));
        let text = String::from_utf8(request(addr, "h.test", &own)).unwrap();
        assert_eq!(text, "HEAD / HTTP/1.1\r\nConnection: close\r\nhost: mine\r\n\r\n");
    }
}
