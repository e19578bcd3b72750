//! Lines of error.log about a request, with what nginx says of it behind the message.

use super::{Exchange, Phase, vars};
use crate::observe::log::{self, Level, RequestContext};

impl Exchange {
    /// Writes a line, if its severity is asked for: `*5 message, client: …, server: _, request: "…", upstream: "…", host: "…"`. What
    /// runs outside of requests (a timer) has only the message.
    pub fn log(&self, level: Level, message: &[u8]) {
        // What is for those who look into the gateway itself would drive a function's own lines out.
        if let Some(function) = self.lua.function.as_ref().filter(|_| level <= Level::Info) {
            function.record.log(level, message);
        }
        if !log::enabled(level) {
            return;
        }
        if self.request.method.is_empty() && self.request.target.is_empty() {
            return match self.handshake_phase() {
                Some(phase) => self.log_handshake(level, message, phase),
                None => log::line(level, message, None),
            };
        }
        let text = |write: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = Vec::new();
            write(&mut bytes);
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let client = text(&|out| self.append_remote(out));
        let request = text(&|out| self.append_written(vars::Known::Request, out).unwrap_or_default());
        let upstream = self.upstream.tries.last().map(|last| {
            let uri = if self.upstream.uri.is_empty() { &self.request.target } else { &self.upstream.uri };
            format!("{}://{}{}", self.upstream_scheme(), last.addr, String::from_utf8_lossy(uri))
        });
        let host = self.request.headers.get("host").map(String::from_utf8_lossy).unwrap_or_default();
        let context = RequestContext {
            connection: self.conn.serial,
            client: &client,
            server: "_",
            request: &request,
            host: &host,
            upstream: upstream.as_deref(),
        };
        log::line(level, message, Some(&context));
    }

    /// nginx's words for the phase of a handshake.
    fn handshake_phase(&self) -> Option<&'static str> {
        match self.phase {
            Phase::Ssl => Some("ssl_certificate_by_lua*"),
            Phase::SslClientHello => Some("ssl_client_hello_by_lua*"),
            Phase::SslSessionFetch => Some("ssl_session_fetch_by_lua*"),
            Phase::SslSessionStore => Some("ssl_session_store_by_lua*"),
            _ => None,
        }
    }

    /// `*5 message, context: ssl_certificate_by_lua*, client: …, server: 127.0.0.1:9443`
    fn log_handshake(&self, level: Level, message: &[u8], phase: &str) {
        let message = [message, b", context: ", phase.as_bytes()].concat();
        let context = RequestContext {
            connection: self.conn.serial,
            client: &self.conn.peer.ip().to_string(),
            server: &self.conn.local.to_string(),
            request: "",
            host: "",
            upstream: None,
        };
        log::line(level, &message, Some(&context));
    }
}
