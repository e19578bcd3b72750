//! A session: who, to where, how much; its lines in error.log and access_stream.log.

use std::{
    io::Write,
    net::SocketAddr,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use smallvec::SmallVec;

use crate::{
    conf,
    exchange::TlsInfo,
    model::Id,
    observe::log::{self, Level, LogFile, RequestContext},
};

/// A TCP connection or a UDP client.
pub(super) struct Session {
    pub serial: u64,
    /// `TCP` or `UDP`.
    pub protocol: &'static str,
    pub client: SocketAddr,
    /// The other end of the socket, where a PROXY protocol header has said who the client is.
    pub peer: SocketAddr,
    /// What the client has reached.
    pub server: SocketAddr,
    pub tls: Option<TlsInfo>,
    pub route: Option<Id>,
    /// What metrics call the route, where it has the prometheus plugin.
    pub counted: Option<Box<str>>,
    pub since: Instant,
    /// A node serves it, or has.
    pub established: bool,
    /// nginx's `$status`, once it is over.
    pub status: u16,
    /// Bytes from the client and to it.
    pub received: u64,
    pub sent: u64,
    /// At most `MAX_TRIES`.
    pub tries: SmallVec<[Try; 1]>,
}

/// One node that was asked.
pub(super) struct Try {
    pub addr: SocketAddr,
    pub begun: Instant,
    /// TLS and PROXY protocol included; `None`: it was not reached.
    pub connect_time: Option<Duration>,
    /// Until it has failed or the session was over.
    pub session_time: Option<Duration>,
    pub sent: u64,
    pub received: u64,
}

impl Try {
    pub fn new(addr: SocketAddr, begun: Instant) -> Self {
        Try { addr, begun, connect_time: None, session_time: None, sent: 0, received: 0 }
    }
}

impl Session {
    pub fn new(serial: u64, protocol: &'static str, client: SocketAddr, server: SocketAddr) -> Self {
        Session {
            serial,
            protocol,
            client,
            peer: client,
            server,
            tls: None,
            route: None,
            counted: None,
            since: Instant::now(),
            established: false,
            status: 0,
            received: 0,
            sent: 0,
            tries: SmallVec::new(),
        }
    }

    /// The name that a TLS client asks for, in lower case.
    pub fn sni(&self) -> Option<&str> {
        self.tls.as_ref()?.sni.as_deref()
    }

    /// The node has sent and got so many bytes, and the session is over.
    pub fn over(&mut self, from_client: u64, to_client: u64) {
        (self.received, self.sent) = (from_client, to_client);
        if let Some(last) = self.tries.last_mut() {
            (last.sent, last.received) = (from_client, to_client);
            last.session_time = Some(last.begun.elapsed());
        }
    }

    /// Writes a line of error.log.
    pub fn log(&self, level: Level, message: &str) {
        if !log::enabled(level) {
            return;
        }
        let upstream = self.tries.last().map(|last| last.addr.to_string());
        let context = RequestContext {
            connection: self.serial,
            client: &self.client.ip().to_string(),
            server: &self.server.to_string(),
            request: "",
            host: "",
            upstream: upstream.as_deref(),
        };
        log::line(level, message.as_bytes(), Some(&context));
    }

    /// Appends the value of one of nginx's stream variables; `None`: there is none.
    pub fn append_var(&self, name: &str, out: &mut Vec<u8>) -> Option<()> {
        let mut put = |value: &dyn std::fmt::Display| {
            let _ = write!(out, "{value}");
            Some(())
        };
        let tls = self.tls.as_ref();
        match name {
            "remote_addr" => put(&self.client.ip()),
            "remote_port" => put(&self.client.port()),
            "realip_remote_addr" => put(&self.peer.ip()),
            "realip_remote_port" => put(&self.peer.port()),
            "server_addr" => put(&self.server.ip()),
            "server_port" => put(&self.server.port()),
            "protocol" => put(&self.protocol),
            "connection" => put(&self.serial),
            "pid" => put(&std::process::id()),
            "route_id" => put(self.route.as_ref()?),
            "status" => put(&format_args!("{:03}", self.status)),
            "bytes_received" => put(&self.received),
            "bytes_sent" => put(&self.sent),
            "session_time" => put(&Seconds(self.since.elapsed())),
            "msec" => put(&Seconds(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())),
            "time_local" => put(&chrono::Local::now().format("%d/%b/%Y:%H:%M:%S %z")),
            "time_iso8601" => put(&chrono::Local::now().format("%Y-%m-%dT%H:%M:%S%:z")),
            "ssl_server_name" | "ssl_preread_server_name" => put(&tls?.sni.as_deref()?),
            "ssl_protocol" => put(&tls?.protocol),
            "ssl_cipher" => put(&tls?.cipher),
            "ssl_session_reused" => put(&if tls?.session_reused { "r" } else { "." }),
            "ssl_client_verify" => put(&tls?.client_verify),
            _ => self.append_of_tries(name, out),
        }
    }

    /// `a, b`: a value of each node that was asked.
    fn append_of_tries(&self, name: &str, out: &mut Vec<u8>) -> Option<()> {
        let start = out.len();
        for (at, one) in self.tries.iter().enumerate() {
            if at > 0 {
                out.extend_from_slice(b", ");
            }
            let mut time = |time: Option<Duration>| match time {
                Some(time) => write!(out, "{}", Seconds(time)),
                None => write!(out, "-"),
            };
            let _ = match name {
                "upstream_addr" => write!(out, "{}", one.addr),
                "upstream_connect_time" => time(one.connect_time),
                "upstream_session_time" => time(one.session_time),
                "upstream_bytes_sent" => write!(out, "{}", one.sent),
                "upstream_bytes_received" => write!(out, "{}", one.received),
                _ => {
                    out.truncate(start);
                    return None;
                }
            };
        }
        (out.len() > start).then_some(())
    }
}

/// `1.234`
struct Seconds(Duration);

impl std::fmt::Display for Seconds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{:03}", self.0.as_secs(), self.0.subsec_millis())
    }
}

/// Texts and variables in turn.
pub(super) struct Format(Vec<Part>);

#[derive(Debug, PartialEq)]
enum Part {
    Text(Box<str>),
    Var(Box<str>),
}

impl Format {
    /// `$name` and `${name}` are variables, all else is text.
    pub fn parse(format: &str) -> Format {
        let (mut parts, mut text, mut rest) = (Vec::new(), String::new(), format);
        while let Some(at) = rest.find('$') {
            text.push_str(&rest[..at]);
            rest = &rest[at + 1..];
            let (name, after) = match rest.strip_prefix('{').and_then(|braced| braced.split_once('}')) {
                Some(found) => found,
                None => {
                    rest.split_at(rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len()))
                }
            };
            if name.is_empty() {
                text.push('$');
                continue;
            }
            if !text.is_empty() {
                parts.push(Part::Text(std::mem::take(&mut text).into()));
            }
            parts.push(Part::Var(name.into()));
            rest = after;
        }
        text.push_str(rest);
        if !text.is_empty() {
            parts.push(Part::Text(text.into()));
        }
        Format(parts)
    }

    /// `absent` stands for a variable without a value.
    pub fn append(&self, session: &Session, absent: &[u8], out: &mut Vec<u8>) {
        for part in &self.0 {
            match part {
                Part::Text(text) => out.extend_from_slice(text.as_bytes()),
                Part::Var(name) => {
                    if session.append_var(name, out).is_none() {
                        out.extend_from_slice(absent);
                    }
                }
            }
        }
    }
}

/// access_stream.log: a line for each session that is over.
pub struct Log {
    format: Format,
    absent: &'static [u8],
    file: LogFile,
}

impl Log {
    pub fn new(config: &conf::AccessLog, file: LogFile) -> Log {
        // As in access.log. Nothing that a client sends needs an escape here: a name is one of DNS.
        let absent: &[u8] = if config.escape == "default" { b"-" } else { b"" };
        Log { format: Format::parse(config.format.trim_end()), absent, file }
    }

    pub(super) fn write(&self, session: &Session) {
        let mut line = Vec::with_capacity(128);
        self.format.append(session, self.absent, &mut line);
        line.push(b'\n');
        self.file.write_soon(&line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session() -> Session {
        let mut session = Session::new(7, "TCP", "10.0.0.1:5".parse().unwrap(), "[::1]:91".parse().unwrap());
        let now = Instant::now();
        session
            .tries
            .push(Try { session_time: Some(Duration::from_millis(5)), ..Try::new("10.0.0.2:1".parse().unwrap(), now) });
        session
            .tries
            .push(Try { connect_time: Some(Duration::from_millis(1234)), ..Try::new("[::2]:2".parse().unwrap(), now) });
        session
    }

    fn text(format: &str) -> String {
        let mut out = Vec::new();
        Format::parse(format).append(&session(), b"-", &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn formats_are_texts_and_variables() {
        assert_eq!(text("$remote_addr:${remote_port}x $ $$protocol ${server_addr"), "10.0.0.1:5x $ $TCP ${server_addr");
        assert_eq!(text("$none $ssl_server_name|$route_id"), "- -|-");
        assert_eq!(text("$status $bytes_sent $connection"), "000 0 7");
        assert_eq!(text(""), "");
    }

    #[test]
    fn each_node_that_was_asked_has_its_value() {
        assert_eq!(text("$upstream_addr|$upstream_connect_time"), "10.0.0.2:1, [::2]:2|-, 1.234");
        assert_eq!(text("$upstream_session_time|$upstream_bytes_sent|$upstream_none"), "0.005, -|0, 0|-");
    }

    #[test]
    fn the_last_node_has_what_was_passed_on() {
        let mut session = session();
        session.over(3, 4);
        let last = session.tries.last().unwrap();
        assert_eq!((session.received, session.sent, last.sent, last.received), (3, 4, 3, 4));
        assert!(last.session_time.is_some() && session.tries[0].sent == 0);
    }
}
