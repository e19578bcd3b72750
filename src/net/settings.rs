//! The bounds and time limits of client connections, with nginx's names and defaults.

use std::time::Duration;

use crate::exchange::framing::HeadLimits;

#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// `large_client_header_buffers`: the longest line, and all of them together.
    pub head: HeadLimits,
    /// `client_header_timeout`: for the whole head.
    pub header_timeout: Duration,
    /// `client_body_timeout`: between two reads of the body.
    pub body_timeout: Duration,
    /// `send_timeout`: between two writes of the response.
    pub send_timeout: Duration,
    /// `keepalive_timeout`: without a request. Zero: no keep-alive.
    pub keepalive_timeout: Duration,
    /// `keepalive_requests`: then the connection is closed.
    pub keepalive_requests: u64,
    /// `client_max_body_size`; 0: no bound.
    pub max_body: u64,
    /// `worker_connections`, of clients only: those past it are closed at once.
    pub max_connections: usize,
    /// `lingering_timeout` and `lingering_time`: how long a client may go on sending to a connection that we end, so that
    /// it reads our answer before a reset destroys it; between two reads, and in all.
    pub linger_idle: Duration,
    pub linger_max: Duration,
    /// How long an HTTP/2 connection without streams has to go after it was told to.
    pub goodbye: Duration,
    /// HTTP/2 with prior knowledge on listeners without TLS.
    pub http2: bool,
    /// `underscores_in_headers`: off, fields whose names have one are left out.
    pub underscores: bool,
}

impl Settings {
    /// A bound of bodies for one request; 0: none of its own. It never widens the server's.
    pub fn tighter(&self, max: u64) -> u64 {
        match (max, self.max_body) {
            (0, all) => all,
            (max, 0) => max,
            (max, all) => max.min(all),
        }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            head: HeadLimits { line: 8 * 1024, total: 32 * 1024 },
            header_timeout: Duration::from_secs(60),
            body_timeout: Duration::from_secs(60),
            send_timeout: Duration::from_secs(10),
            keepalive_timeout: Duration::from_secs(60),
            keepalive_requests: 1000,
            max_body: 0,
            max_connections: 10620,
            linger_idle: Duration::from_secs(5),
            linger_max: Duration::from_secs(30),
            goodbye: Duration::from_secs(5),
            http2: true,
            underscores: true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_of_one_request_never_widens_the_server_s() {
        for (server, own, held) in [(0, 0, 0), (0, 5, 5), (10, 0, 10), (10, 5, 5), (10, 20, 10)] {
            let settings = Settings { max_body: server, ..Settings::default() };
            assert_eq!(settings.tighter(own), held, "{server} {own}");
        }
    }
}
