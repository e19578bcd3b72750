//! Files under a location's `root`, for locations in which nothing else answers: what people who bring an OpenResty
//! configuration have beside their Lua. Small ones; one range of them, and no conditions but `If-Modified-Since`.

use std::{
    io,
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

use super::{Proxy, location, rescue};
use crate::{
    conf::locations::Location,
    error::Result,
    exchange::{Exchange, status},
    observe::log::Level,
    plugin::{Flow, output},
};

/// The largest file that is served: it is read into memory whole.
const MAX_FILE: u64 = 16 << 20;

/// Types by the ends of names; anything else is `application/octet-stream`.
const TYPES: &[(&str, &str)] = &[
    ("html", "text/html"),
    ("htm", "text/html"),
    ("txt", "text/plain"),
    ("css", "text/css"),
    ("js", "application/javascript"),
    ("json", "application/json"),
    ("xml", "text/xml"),
    ("svg", "image/svg+xml"),
    ("png", "image/png"),
    ("jpg", "image/jpeg"),
    ("gif", "image/gif"),
    ("ico", "image/x-icon"),
];

/// Answers with the file that the path names; a folder has its `index.html`.
pub(super) async fn serve(p: &Proxy, x: &mut Exchange, location: &Location) -> Result<Flow> {
    if !matches!(&x.request.method[..], b"GET" | b"HEAD") {
        return location::refuse(p, x, 405).await;
    }
    let Some(path) = path_of(x, location) else { return location::refuse(p, x, 404).await };
    let meta = match tokio::fs::metadata(&path).await {
        Ok(meta) => meta,
        Err(e) => return refuse(p, x, &path, &e).await,
    };
    if meta.is_dir() {
        return location::to_folder(p, x).await;
    }
    if meta.len() > MAX_FILE {
        return refuse(p, x, &path, &io::Error::other("it is too large to be served")).await;
    }
    let text = match tokio::fs::read(&path).await {
        Ok(text) => text,
        Err(e) => return refuse(p, x, &path, &e).await,
    };
    let modified = meta.modified().ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
    let modified = status::format_date(modified.as_secs());
    let known = match x.request.headers.get("if-modified-since") {
        Some(since) => *since == modified && x.depth == 0 && !x.response.bypasses_if,
        None => false,
    };
    x.response.status = match (x.error_status, known) {
        (Some(status @ 1..), _) => status,
        (_, true) => 304,
        (_, false) => 200,
    };
    x.response.headers.set("Content-Type", content_type(&path, location));
    x.response.headers.set("Last-Modified", modified);
    rescue::stamp(p, x);
    location::add_headers(x);
    if x.response.status != 304 {
        x.printed = text;
    }
    if output::answer_with(x, &p.runner, cut).await? {
        return Ok(Flow::Sent);
    }
    location::refuse(p, x, 416).await
}

/// Leaves the range of the body that the request asks for (RFC 9110, 14.2). Several at once, or what cannot be read: all of it.
/// `false`: there is nothing in it, which is an error, and the head says so.
fn cut(x: &mut Exchange) -> bool {
    if x.depth > 0 || x.response.status != 200 || x.response.headers.contains("content-encoding") {
        return true;
    }
    x.response.headers.set("Accept-Ranges", "bytes");
    let modified = x.response.headers.get("last-modified");
    let current = x.request.headers.get("if-range").is_none_or(|since| Some(since) == modified);
    let Some(asked) = x.request.headers.get("range").filter(|_| current) else { return true };
    let length = x.printed.len();
    match range(asked, length) {
        Range::All => {}
        Range::Part(part) => {
            x.response.status = 206;
            let place = format!("bytes {}-{}/{length}", part.start, part.end - 1);
            x.response.headers.set("Content-Range", place);
            x.printed.truncate(part.end);
            x.printed.drain(..part.start);
        }
        Range::None => {
            x.response.headers.remove("accept-ranges");
            x.response.headers.remove("last-modified");
            x.response.headers.set("Content-Range", format!("bytes */{length}"));
            return false;
        }
    }
    true
}

#[derive(Debug, PartialEq, Eq)]
enum Range {
    All,
    Part(std::ops::Range<usize>),
    /// Nothing of the body is in it.
    None,
}

/// `bytes=first-last`, `bytes=first-`, `bytes=-count`
fn range(asked: &[u8], length: usize) -> Range {
    let bounds = std::str::from_utf8(asked).ok().and_then(|text| text.trim().strip_prefix("bytes="));
    let Some((first, last)) = bounds.and_then(|text| text.trim().split_once('-')) else { return Range::All };
    let number = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        // One that is too long for a number is past every end.
        digits.then(|| text.parse().unwrap_or(usize::MAX))
    };
    let part = match (number(first), number(last)) {
        (Some(first), Some(last)) if first <= last => first..last.saturating_add(1).min(length),
        (Some(first), None) if last.is_empty() => first..length,
        (None, Some(count)) if first.is_empty() => length.saturating_sub(count)..length,
        _ => return Range::All,
    };
    if part.start >= part.end { Range::None } else { Range::Part(part) }
}

/// `None`: a path that leads out of the root, or is no text.
fn path_of(x: &Exchange, location: &Location) -> Option<PathBuf> {
    let path = std::str::from_utf8(&x.request.path).ok()?;
    let inside = path.split('/').all(|part| part != "..") && !path.contains('\0');
    let mut file = location.root.join(path.trim_start_matches('/'));
    if path.ends_with('/') {
        file.push("index.html");
    }
    inside.then_some(file)
}

fn content_type<'l>(path: &Path, location: &'l Location) -> &'l str {
    let end = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    let known = TYPES.iter().find(|(name, _)| *name == end).map(|(_, kind)| *kind);
    known.or(location.directives.default_type.as_deref()).unwrap_or("application/octet-stream")
}

async fn refuse(p: &Proxy, x: &mut Exchange, path: &Path, e: &io::Error) -> Result<Flow> {
    let (status, number) = match e.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => (404, 2),
        io::ErrorKind::PermissionDenied => (403, 13),
        _ => (500, e.raw_os_error().unwrap_or(0)),
    };
    let why = e.to_string();
    let why = why.split(" (os error").next().unwrap_or_default();
    x.log(Level::Error, format!("open() \"{}\" failed ({number}: {why})", path.display()).as_bytes());
    location::refuse(p, x, status).await
}

#[cfg(test)]
mod tests {
    use super::{Range, range};

    #[test]
    fn one_range_is_taken_as_it_is_written() {
        for (asked, expected) in [
            ("bytes=0-4", Range::Part(0..5)),
            ("bytes=3-", Range::Part(3..10)),
            ("bytes=-4", Range::Part(6..10)),
            ("bytes=-40", Range::Part(0..10)),
            ("bytes=8-99999999999999999999999", Range::Part(8..10)),
            ("bytes=10-", Range::None),
            ("bytes=99999999999999999999999-", Range::None),
            ("bytes=-0", Range::None),
            ("bytes=4-3", Range::All),
            ("bytes=0-1,3-4", Range::All),
            ("bytes=+1-2", Range::All),
            ("bytes=-", Range::All),
            ("lines=0-4", Range::All),
        ] {
            assert_eq!(range(asked.as_bytes(), 10), expected, "{asked}");
        }
    }
}
