//! The health of one node: pure, as the tutorial of APISIX describes it. A node begins healthy. Failures in a row, of one kind,
//! make it unhealthy; successes in a row make it healthy again.

use crate::model::upstream::checks::Limits;

/// What a probe or a request tells of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    Success,
    /// A status that is a failure.
    Http,
    /// No connection, or a broken one.
    Tcp,
    Timeout,
}

/// A node's state and what was counted since it changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    pub unhealthy: bool,
    pub success: u8,
    pub http_failure: u8,
    pub tcp_failure: u8,
    pub timeout_failure: u8,
}

/// What an event has counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counted {
    pub count: u8,
    pub limit: u8,
    /// The state is another one since.
    pub changed: bool,
}

impl State {
    /// Takes an event. `None`: it counts nothing, being what the state says anyway, or of a kind that is switched off.
    pub fn take(&mut self, event: Event, limits: &Limits) -> Option<Counted> {
        let limit = match event {
            Event::Success => limits.successes,
            Event::Http => limits.http_failures,
            Event::Tcp => limits.tcp_failures,
            Event::Timeout => limits.timeouts,
        };
        let failures = [self.http_failure, self.tcp_failure, self.timeout_failure];
        let is_known = match event {
            Event::Success => !self.unhealthy && failures == [0; 3],
            _ => self.unhealthy && self.success == 0,
        };
        if limit == 0 || is_known {
            return None;
        }
        let counter = match event {
            Event::Success => &mut self.success,
            Event::Http => &mut self.http_failure,
            Event::Tcp => &mut self.tcp_failure,
            Event::Timeout => &mut self.timeout_failure,
        };
        *counter = counter.saturating_add(1);
        let count = *counter;
        match event {
            Event::Success => (self.http_failure, self.tcp_failure, self.timeout_failure) = (0, 0, 0),
            _ => self.success = 0,
        }
        let becomes_unhealthy = event != Event::Success;
        let changed = count >= limit && self.unhealthy != becomes_unhealthy;
        if changed {
            self.unhealthy = becomes_unhealthy;
        }
        Some(Counted { count, limit, changed })
    }

    /// As the control API names it.
    pub fn name(&self) -> &'static str {
        let has_failed = self.http_failure > 0 || self.tcp_failure > 0 || self.timeout_failure > 0;
        match self.unhealthy {
            false if has_failed => "mostly_healthy",
            false => "healthy",
            true if self.success > 0 => "mostly_unhealthy",
            true => "unhealthy",
        }
    }
}

impl Event {
    /// In the lines of error.log.
    pub fn name(self) -> &'static str {
        match self {
            Event::Success => "SUCCESS",
            Event::Http => "HTTP",
            Event::Tcp => "TCP",
            Event::Timeout => "TIMEOUT",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { successes: 2, http_failures: 3, tcp_failures: 2, timeouts: 0 };

    /// The names of the states that these events lead through; `.` where one counts nothing.
    fn names(events: &[Event]) -> Vec<&'static str> {
        let mut state = State::default();
        events.iter().map(|event| state.take(*event, &LIMITS).map_or(".", |_| state.name())).collect()
    }

    #[test]
    fn failures_in_a_row_make_it_unhealthy_and_successes_healthy() {
        use Event::{Http, Success, Tcp};
        assert_eq!(names(&[Success, Success]), [".", "."], "what was well is well");
        assert_eq!(names(&[Http, Http, Http, Http]), ["mostly_healthy", "mostly_healthy", "unhealthy", "."]);
        assert_eq!(
            names(&[Http, Http, Success, Http]),
            ["mostly_healthy", "mostly_healthy", "healthy", "mostly_healthy"]
        );
        assert_eq!(names(&[Http, Tcp, Tcp]), ["mostly_healthy", "mostly_healthy", "unhealthy"], "each kind by itself");
        assert_eq!(
            names(&[Tcp, Tcp, Success, Tcp, Success, Success]),
            ["mostly_healthy", "unhealthy", "mostly_unhealthy", "unhealthy", "mostly_unhealthy", "healthy"]
        );
    }

    #[test]
    fn a_limit_of_none_counts_nothing() {
        assert_eq!(names(&[Event::Timeout; 3]), ["."; 3]);
    }

    #[test]
    fn what_is_counted_is_told() {
        let mut state = State::default();
        let counted = |count, changed| Some(Counted { count, limit: 2, changed });
        assert_eq!(state.take(Event::Tcp, &LIMITS), counted(1, false));
        assert_eq!(state.take(Event::Tcp, &LIMITS), counted(2, true));
        assert_eq!(state.take(Event::Success, &LIMITS), counted(1, false));
    }
}
