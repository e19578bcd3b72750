//! Files under a location's `root`, for locations in which nothing else answers: what people who bring an OpenResty
//! configuration have beside their Lua. Small ones: no ranges, no conditions but `If-Modified-Since`.

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
    plugin::output,
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
pub(super) async fn serve(p: &Proxy, x: &mut Exchange, location: &Location) -> Result<()> {
    if !matches!(&x.request.method[..], b"GET" | b"HEAD") {
        rescue::page(p, x, 405);
        return output::answer(x, &p.runner).await;
    }
    let Some(path) = path_of(x, location) else { return location::not_found(p, x).await };
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
    x.response.status = match x.request.headers.get("if-modified-since") {
        Some(since) if *since == modified && x.depth == 0 && !x.response.bypasses_if => 304,
        _ => 200,
    };
    x.response.headers.set("Content-Type", content_type(&path, location));
    x.response.headers.set("Last-Modified", modified);
    rescue::stamp(p, x);
    location::add_headers(x);
    if x.response.status == 200 {
        x.printed = text;
    }
    output::answer(x, &p.runner).await
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

async fn refuse(p: &Proxy, x: &mut Exchange, path: &Path, e: &io::Error) -> Result<()> {
    let (status, number) = match e.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => (404, 2),
        io::ErrorKind::PermissionDenied => (403, 13),
        _ => (500, e.raw_os_error().unwrap_or(0)),
    };
    let why = e.to_string();
    let why = why.split(" (os error").next().unwrap_or_default();
    x.log(Level::Error, format!("open() \"{}\" failed ({number}: {why})", path.display()).as_bytes());
    rescue::page(p, x, status);
    output::answer(x, &p.runner).await
}
