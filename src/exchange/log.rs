//! Lines of error.log about a request, with what nginx says of it behind the message.

use super::{Exchange, vars};
use crate::observe::log::{self, Level, RequestContext};

impl Exchange {
    /// Writes a line, if its severity is asked for: `*5 message, client: …, server: _, request: "…", upstream: "…", host: "…"`. What
    /// runs outside of requests (a timer) has only the message.
    pub fn log(&self, level: Level, message: &[u8]) {
        if !log::enabled(level) {
            return;
        }
        if self.request.method.is_empty() && self.request.target.is_empty() {
            return log::line(level, message, None);
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
}
