//! How variables are written: numbers, addresses, times.

use std::{
    cell::RefCell,
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
    sync::OnceLock,
    time::Duration,
};

/// `Thursday, 26-Nov-2026 02:53:09 GMT`: what server-side includes show when nothing else is configured.
pub(super) fn date(local: bool, out: &mut Vec<u8>) -> Option<()> {
    let now = crate::exchange::status::coarse_seconds() as libc::time_t;
    let mut text = [0u8; 128];
    // SAFETY: plain old data, for which zeros are valid; the buffers are as long as said and outlive the calls.
    let len = unsafe {
        let mut parts: libc::tm = std::mem::zeroed();
        let broken = if local { libc::localtime_r(&now, &mut parts) } else { libc::gmtime_r(&now, &mut parts) };
        if broken.is_null() {
            return None;
        }
        let format = if local { c"%A, %d-%b-%Y %H:%M:%S %Z" } else { c"%A, %d-%b-%Y %H:%M:%S GMT" };
        libc::strftime(text.as_mut_ptr().cast(), text.len(), format.as_ptr(), &parts)
    };
    out.extend_from_slice(text.get(..len)?);
    Some(())
}

/// Appends decimal digits.
pub fn number(n: u64, out: &mut Vec<u8>) {
    out.extend_from_slice(itoa::Buffer::new().format(n).as_bytes());
}

/// Appends `1.234`.
pub(super) fn seconds(d: Duration, out: &mut Vec<u8>) {
    number(d.as_secs(), out);
    let ms = d.subsec_millis();
    let digit = |n: u32| b'0' + (n % 10) as u8;
    out.extend_from_slice(&[b'.', digit(ms / 100), digit(ms / 10), digit(ms)]);
}

/// Appends an address; IPv6 in its short form, without brackets.
pub fn ip(addr: IpAddr, out: &mut Vec<u8>) {
    match addr {
        IpAddr::V4(a) => {
            let (mut text, mut at) = ([0; 16], 0);
            let mut put = |b| {
                text[at & 15] = b;
                at += 1;
            };
            for octet in a.octets() {
                if octet >= 100 {
                    put(b'0' + octet / 100);
                }
                if octet >= 10 {
                    put(b'0' + octet / 10 % 10);
                }
                put(b'0' + octet % 10);
                put(b'.');
            }
            // Without the last dot.
            out.extend_from_slice(&text[..(at - 1).min(15)]);
        }
        IpAddr::V6(a) => {
            let _ = std::io::Write::write_fmt(out, format_args!("{a}"));
        }
    }
}

/// Appends `1.2.3.4:80` or `[::1]:80`.
pub fn address(addr: SocketAddr, out: &mut Vec<u8>) {
    match addr.ip() {
        v4 @ IpAddr::V4(_) => ip(v4, out),
        v6 => {
            out.push(b'[');
            ip(v6, out);
            out.push(b']');
        }
    }
    out.push(b':');
    number(addr.port().into(), out);
}

/// Appends lower-case hexadecimal.
pub fn hex(bytes: &[u8], out: &mut Vec<u8>) {
    for b in bytes {
        out.push(b"0123456789abcdef"[usize::from(b >> 4)]);
        out.push(b"0123456789abcdef"[usize::from(b & 15)]);
    }
}

/// The machine's name, in lower case: `$hostname`.
pub fn hostname() -> &'static str {
    static NAME: OnceLock<String> = OnceLock::new();
    NAME.get_or_init(|| {
        let mut name = [0u8; 256];
        // SAFETY: the buffer is as long as said.
        let failed = unsafe { libc::gethostname(name.as_mut_ptr().cast(), name.len()) } != 0;
        let end = if failed { 0 } else { name.iter().position(|b| *b == 0).unwrap_or(name.len()) };
        String::from_utf8_lossy(&name[..end]).to_lowercase()
    })
}

/// The second and its texts, written once a second.
#[derive(Default)]
pub(super) struct Clock {
    second: u64,
    pub local: String,
    pub iso: String,
}

pub(super) fn with_clock<R>(read: impl FnOnce(&Clock) -> R) -> R {
    thread_local! {
        static CLOCK: RefCell<Clock> = RefCell::default();
    }
    let now = crate::exchange::status::coarse_seconds();
    CLOCK.with_borrow_mut(|clock| {
        if clock.second != now {
            let time = chrono::DateTime::from_timestamp(now as i64, 0).unwrap_or_default();
            let time = time.with_timezone(&chrono::Local);
            clock.second = now;
            clock.local.clear();
            clock.iso.clear();
            let _ = write!(clock.local, "{}", time.format("%d/%b/%Y:%H:%M:%S %z"));
            let _ = write!(clock.iso, "{}", time.format("%Y-%m-%dT%H:%M:%S%:z"));
        }
        read(clock)
    })
}
