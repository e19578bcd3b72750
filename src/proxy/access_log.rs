//! access.log: nginx's format string, parsed once, one line per request.
//!
//! One per worker: lines gather in its buffer and go to the file, which all workers share, when the buffer is full,
//! and a second after its first line at the latest.

use std::{cell::RefCell, time::Duration};

use tokio::sync::Notify;

use crate::{
    conf,
    exchange::{Exchange, Var, vars::Known},
    observe::log::LogFile,
};

/// A line is in the file after this long at the latest.
const FLUSH_AFTER: Duration = Duration::from_secs(1);

/// The longest value that is written: a header of a client must not fill the disk faster than its bytes came.
const VALUE_MAX: usize = 64 * 1024;

/// Nearly all texts between variables are a few quotes and blanks.
const SHORT: usize = 16;

pub struct AccessLog {
    format: Vec<Segment>,
    escape: Escape,
    file: LogFile,
    /// The buffer's size; 0: each line goes at once.
    size: usize,
    state: RefCell<State>,
    begun: Notify,
}

#[derive(Default)]
struct State {
    buffer: Vec<u8>,
    scratch: Vec<u8>,
}

#[derive(Debug, PartialEq)]
enum Segment {
    Text(Box<str>),
    /// A text whose length is the last number: copied with the bytes behind it, which costs a third of a copy by length.
    Short([u8; SHORT], usize),
    /// Needs no escaping: goes straight into the line.
    Plain(Known),
    /// `$request`: goes there, too, and is looked at afterwards.
    Request,
    Var(Var),
}

/// `access_log_format_escape`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Escape {
    Default,
    Json,
    None,
}

impl AccessLog {
    pub fn new(config: &conf::AccessLog, file: LogFile) -> Self {
        let escape = match config.escape.as_str() {
            "json" => Escape::Json,
            "none" => Escape::None,
            _ => Escape::Default,
        };
        let (state, begun) = Default::default();
        AccessLog { format: parse(&config.format), escape, file, size: config.buffer, state, begun }
    }

    /// Writes the request's line.
    pub fn log(&self, x: &Exchange) {
        let State { buffer, scratch } = &mut *self.state.borrow_mut();
        let first = buffer.is_empty();
        for segment in &self.format {
            match segment {
                Segment::Text(text) => buffer.extend_from_slice(text.as_bytes()),
                Segment::Short(text, len) => {
                    let end = buffer.len() + len;
                    buffer.extend_from_slice(text);
                    buffer.truncate(end);
                }
                Segment::Plain(known) => {
                    let start = buffer.len();
                    if x.append_written(*known, buffer).is_none() {
                        self.write_value(None, buffer);
                    }
                    buffer.truncate(start + VALUE_MAX);
                }
                Segment::Request => self.write_request(x, scratch, buffer),
                Segment::Var(var) => self.write_value(x.var(var, scratch), buffer),
            }
        }
        buffer.push(b'\n');
        if buffer.len() >= self.size {
            self.file.write_soon(buffer);
            buffer.clear();
        } else if first {
            self.begun.notify_one();
        }
    }

    fn write_request(&self, x: &Exchange, scratch: &mut Vec<u8>, out: &mut Vec<u8>) {
        let start = out.len();
        let written = x.append_written(Known::Request, out).is_some();
        let line = &out[start..];
        if !written || line.len() > VALUE_MAX || line.iter().fold(false, |found, b| found | is_special(*b)) {
            out.truncate(start);
            self.write_value(x.var(&Var::Known(Known::Request), scratch), out);
        }
    }

    fn write_value(&self, value: Option<&[u8]>, out: &mut Vec<u8>) {
        let Some(value) = value else {
            // As nginx: a JSON string stays empty, else a dash stands for what is not there (not for what is empty).
            if self.escape == Escape::Default {
                out.push(b'-');
            }
            return;
        };
        let value = &value[..value.len().min(VALUE_MAX)];
        match self.escape {
            Escape::Default => escape(value, is_special, escape_hex, out),
            Escape::Json => escape(value, |b| (b == b'"') | (b == b'\\') | (b < 0x20), escape_json, out),
            Escape::None => out.extend_from_slice(value),
        }
    }

    /// Hands what was gathered to the file.
    pub fn flush(&self) {
        let state = &mut *self.state.borrow_mut();
        if !state.buffer.is_empty() {
            self.file.write_soon(&state.buffer);
            state.buffer.clear();
        }
    }

    /// Flushes in time until it is dropped. To be run beside the worker's requests; sleeps while there are none.
    pub async fn flush_in_time(&self) {
        loop {
            self.begun.notified().await;
            tokio::time::sleep(FLUSH_AFTER).await;
            self.flush();
        }
    }
}

impl Drop for AccessLog {
    fn drop(&mut self) {
        self.flush();
    }
}

/// `$name` and `${name}` are variables, all else is text.
fn parse(format: &str) -> Vec<Segment> {
    let mut segments = Vec::new();
    let mut text = String::new();
    let mut rest = format;
    while let Some(at) = rest.find('$') {
        text.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let (name, after) = match rest.strip_prefix('{').and_then(|braced| braced.split_once('}')) {
            Some(found) => found,
            None => rest.split_at(rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len())),
        };
        if name.is_empty() {
            text.push('$');
            continue;
        }
        if !text.is_empty() {
            segments.push(Segment::text(&text));
            text.clear();
        }
        segments.push(match Var::parse(name) {
            Var::Known(known) if is_plain(known) => Segment::Plain(known),
            Var::Known(Known::Request) => Segment::Request,
            var => Segment::Var(var),
        });
        rest = after;
    }
    text.push_str(rest);
    if !text.is_empty() {
        segments.push(Segment::text(&text));
    }
    segments
}

impl Segment {
    fn text(text: &str) -> Segment {
        let mut short = [0; SHORT];
        match short.get_mut(..text.len()) {
            Some(start) => {
                start.copy_from_slice(text.as_bytes());
                Segment::Short(short, text.len())
            }
            None => Segment::Text(text.into()),
        }
    }
}

/// Times, numbers and addresses.
fn is_plain(known: Known) -> bool {
    use Known::*;
    matches!(
        known,
        RemoteAddr
            | RemotePort
            | TimeLocal
            | TimeIso8601
            | Msec
            | Status
            | BytesSent
            | BodyBytesSent
            | RequestTime
            | RequestLength
            | RequestId
            | Connection
            | ConnectionRequests
            | ServerAddr
            | ServerPort
            | UpstreamAddr
            | UpstreamStatus
            | UpstreamResponseTime
            | UpstreamConnectTime
            | UpstreamHeaderTime
            | UpstreamBytesSent
            | UpstreamBytesReceived
            | UpstreamResponseLength
    )
}

/// Copies whole stretches between the bytes that need another form.
fn escape(value: &[u8], is_special: impl Fn(u8) -> bool, write: impl Fn(u8, &mut Vec<u8>), out: &mut Vec<u8>) {
    // Nearly all values are copied as they are: whether one is, is asked of all bytes at once, by vector instructions.
    if !value.iter().fold(false, |found, b| found | is_special(*b)) {
        return out.extend_from_slice(value);
    }
    let mut rest = value;
    while let Some(at) = rest.iter().position(|b| is_special(*b)) {
        out.extend_from_slice(&rest[..at]);
        write(rest[at], out);
        rest = &rest[at + 1..];
    }
    out.extend_from_slice(rest);
}

/// What could end the value's quotes or its line, or is no ASCII text.
fn is_special(b: u8) -> bool {
    (b == b'"') | (b == b'\\') | !(0x20..0x7f).contains(&b)
}

fn escape_hex(b: u8, out: &mut Vec<u8>) {
    let digit = |n: u8| b"0123456789ABCDEF"[usize::from(n)];
    out.extend_from_slice(&[b'\\', b'x', digit(b >> 4), digit(b & 15)]);
}

fn escape_json(b: u8, out: &mut Vec<u8>) {
    match b {
        b'"' | b'\\' => out.extend_from_slice(&[b'\\', b]),
        b'\n' => out.extend_from_slice(b"\\n"),
        b'\r' => out.extend_from_slice(b"\\r"),
        b'\t' => out.extend_from_slice(b"\\t"),
        0x08 => out.extend_from_slice(b"\\b"),
        0x0c => out.extend_from_slice(b"\\f"),
        b => {
            let digit = |n: u8| b"0123456789ABCDEF"[usize::from(n)];
            out.extend_from_slice(b"\\u00");
            out.extend_from_slice(&[digit(b >> 4), digit(b & 15)]);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{rc::Rc, sync::Arc};

    use super::*;
    use crate::exchange::Connection;

    fn log(dir: &tempfile::TempDir, format: &str, escape: &str, buffer: usize) -> AccessLog {
        let path = dir.path().join("access.log");
        let file = LogFile::open(&path).unwrap();
        AccessLog::new(&conf::AccessLog { path, format: format.into(), escape: escape.into(), buffer }, file)
    }

    fn exchange() -> Exchange {
        let addr = "10.0.0.9:5000".parse().unwrap();
        let conn = Connection::new(1, addr, addr);
        let mut x = Exchange::new(Rc::new(conn), Arc::default());
        x.request.method.extend_from_slice(b"GET");
        x.request.target.extend_from_slice(b"/");
        x.request.headers.append("User-Agent", b"a\"b\\c\t\xc3\xa9");
        x.response.status = 200;
        x
    }

    fn gathered(log: &AccessLog) -> String {
        String::from_utf8(log.state.borrow().buffer.clone()).unwrap()
    }

    #[test]
    fn parses_text_and_variables() {
        let got = parse("a $status\"${host}_x\" $ 1$");
        let text = |t: &str| Segment::text(t);
        let var = |n| Segment::Var(Var::parse(n));
        assert_eq!(got, [text("a "), Segment::Plain(Known::Status), text("\""), var("host"), text("_x\" $ 1$")]);
    }

    #[test]
    fn escapes_as_nginx_does() {
        let dir = tempfile::tempdir().unwrap();
        for (escape, want) in [
            ("default", "\"a\\x22b\\x5Cc\\x09\\xC3\\xA9\" - GET / HTTP/1.1 200\n"),
            ("json", "\"a\\\"b\\\\c\\té\"  GET / HTTP/1.1 200\n"),
            ("none", "\"a\"b\\c\té\"  GET / HTTP/1.1 200\n"),
        ] {
            let log = log(&dir, "\"$http_user_agent\" $http_referer $request $status", escape, 4096);
            log.log(&exchange());
            assert_eq!(gathered(&log), want, "{escape}");
        }
    }

    #[test]
    fn a_value_is_cut_at_its_bound() {
        let dir = tempfile::tempdir().unwrap();
        let log = log(&dir, "$http_user_agent|$request", "default", 1 << 20);
        let mut x = exchange();
        x.request.headers.set("User-Agent", "a".repeat(VALUE_MAX + 10));
        x.request.target = [b"/".to_vec(), vec![b'b'; VALUE_MAX + 10]].concat();
        log.log(&x);
        let line = gathered(&log);
        let (agent, request) = line.trim_end().split_once('|').unwrap();
        assert_eq!((agent.len(), request.len()), (VALUE_MAX, VALUE_MAX));
        x.request.target.truncate(VALUE_MAX - "GET  HTTP/1.1".len());
        log.log(&x);
        assert!(gathered(&log).trim_end().ends_with("b HTTP/1.1"));
    }

    #[test]
    fn gathers_up_to_its_size_and_writes_the_rest_when_it_ends() {
        let dir = tempfile::tempdir().unwrap();
        let log = log(&dir, "12345678", "default", 20);
        log.log(&exchange());
        log.log(&exchange());
        assert_eq!(gathered(&log).len(), 18);
        log.log(&exchange());
        assert_eq!(gathered(&log), "");
        log.log(&exchange());
        let file = log.file.clone();
        drop(log);
        file.write(b"", true);
        let text = std::fs::read_to_string(dir.path().join("access.log")).unwrap();
        assert_eq!(text, "12345678\n".repeat(4));
    }
}
