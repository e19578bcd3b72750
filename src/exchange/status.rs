//! Reason phrases and the Date field.

use std::cell::Cell;

/// The text after a status: nginx's where it has one of its own, since clients and tests compare it.
pub fn reason(status: u16) -> &'static str {
    match status {
        302 => "Moved Temporarily",
        405 => "Not Allowed",
        408 => "Request Time-out",
        413 => "Request Entity Too Large",
        414 => "Request-URI Too Large",
        416 => "Requested Range Not Satisfiable",
        503 => "Service Temporarily Unavailable",
        504 => "Gateway Time-out",
        _ => http::StatusCode::from_u16(status).ok().and_then(|s| s.canonical_reason()).unwrap_or(""),
    }
}

/// `Mon, 23 Nov 2026 19:00:00 GMT`
pub type Date = [u8; 29];

thread_local! {
    /// The second and its text: written once a second instead of once a response.
    static DATE: Cell<(u64, Date)> = const { Cell::new((u64::MAX, [b' '; 29])) };
}

/// Now, as HTTP writes it (RFC 9110, 5.6.7).
pub fn date() -> Date {
    let now = coarse_seconds();
    let (second, text) = DATE.get();
    if second == now {
        return text;
    }
    let text = format_date(now);
    DATE.set((now, text));
    text
}

/// Seconds since the epoch, by the clock that moves every 1 to 10 ms and costs a quarter of the exact one.
pub fn coarse_seconds() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid timespec to write to. The clock exists on every Linux; were it to fail, the time is 1970.
    unsafe { libc::clock_gettime(libc::CLOCK_REALTIME_COARSE, &mut now) };
    u64::try_from(now.tv_sec).unwrap_or_default()
}

/// That second, as HTTP writes it.
pub fn format_date(secs: u64) -> Date {
    let mut text = [b' '; 29];
    let time = chrono::DateTime::from_timestamp(secs as i64, 0).unwrap_or_default();
    let formatted = time.format("%a, %d %b %Y %H:%M:%S GMT").to_string();
    // A year past 9999 does not fit; no clock shows one.
    if formatted.len() == text.len() {
        text.copy_from_slice(formatted.as_bytes());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_dates_and_reasons() {
        assert_eq!(&format_date(784_111_777), b"Sun, 06 Nov 1994 08:49:37 GMT");
        assert!(date().ends_with(b" GMT"));
        assert_eq!((reason(200), reason(503), reason(599)), ("OK", "Service Temporarily Unavailable", ""));
    }
}
