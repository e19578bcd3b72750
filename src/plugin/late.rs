//! What nginx's own filters do to a location's response behind those of Lua: the status of an error page, the charset, compression,
//! the rate. Of these the charset is every response's.

use std::io::Write;

use flate2::{Compression, write::GzEncoder};
use smallvec::SmallVec;

use crate::{
    conf::outgoing::{Charset, Gzip},
    error::{Error, Kind, Result},
    exchange::{Exchange, Headers, Version},
};

/// The head, once the filters are through with it. `length`: of the body, where the head does not say it.
pub(super) fn head(x: &mut Exchange, length: Option<u64>) {
    // That of a head that was thrown away.
    x.encoder = None;
    let Some(location) = x.location.clone() else { return };
    if x.depth > 0 {
        return;
    }
    let directives = &location.directives;
    if directives.limit_rate.is_some() || directives.limit_rate_after.is_some() {
        x.keep_rate();
    }
    if let Some(charset) = &location.directives.charset {
        name_charset(&mut x.response.headers, charset);
    }
    if let Some(gzip) = &location.directives.gzip {
        compress(x, gzip, length);
    }
}

/// The status that an error page has, whatever answered in its place.
pub(super) fn status(x: &mut Exchange) {
    let Some(status @ 1..) = x.error_status else { return };
    x.response.reason.clear();
    let bodiless = |status| matches!(status, 204 | 304);
    if status != x.response.status && (bodiless(status) || bodiless(x.response.status)) {
        // It has promised a body that does not come, or none is to come.
        x.response.headers.remove("content-length");
    }
    x.response.status = status;
}

/// Names the charset of a text that does not say its own. A type with any parameter is left as it is, as nginx leaves it.
pub(super) fn name_charset(headers: &mut Headers, charset: &Charset) {
    let Some(kind) = headers.get("content-type").filter(|kind| charset.types.has(kind)) else { return };
    if memchr::memchr(b';', kind).is_some() || headers.contains("content-encoding") {
        return;
    }
    let mut named: SmallVec<[u8; 64]> = SmallVec::from_slice(kind);
    named.extend_from_slice(b"; charset=");
    named.extend_from_slice(charset.name.as_bytes());
    headers.set("Content-Type", &named);
}

fn compress(x: &mut Exchange, gzip: &Gzip, length: Option<u64>) {
    let headers = &x.response.headers;
    let said = headers.get("content-length").and_then(crate::exchange::framing::parse_decimal);
    let candidate = matches!(x.response.status, 200 | 403 | 404)
        && !headers.contains("content-encoding")
        && said.or(length).is_none_or(|n| n >= gzip.min_length)
        && headers.get("content-type").is_some_and(|kind| gzip.types.has(kind))
        && x.request.method != b"HEAD";
    if !candidate {
        return;
    }
    if gzip.vary {
        x.response.headers.append("Vary", "Accept-Encoding");
    }
    let old = x.request.version == Version::Http10 && !gzip.http10;
    let by_proxy = x.request.headers.contains("via") && !gzip.proxied;
    if old || by_proxy || !x.request.headers.get("accept-encoding").is_some_and(accepts_gzip) {
        return;
    }
    let headers = &mut x.response.headers;
    headers.set("Content-Encoding", "gzip");
    headers.remove("content-length");
    headers.remove("accept-ranges");
    // Other bytes than those it was made for: nginx weakens it.
    if let Some(etag) = headers.get("etag").filter(|etag| !etag.starts_with(b"W/")).map(<[u8]>::to_vec) {
        headers.set("ETag", [b"W/", &etag[..]].concat());
    }
    x.encoder = Some(Box::new(GzEncoder::new(Vec::new(), Compression::new(gzip.level))));
}

/// RFC 9110, 12.5.3: `gzip` is among the codings, and not with a weight of 0.
fn accepts_gzip(field: &[u8]) -> bool {
    field.split(|b| *b == b',').any(|coding| {
        let mut parts = coding.split(|b| *b == b';').map(<[u8]>::trim_ascii);
        let named = parts.next().is_some_and(|name| name.eq_ignore_ascii_case(b"gzip"));
        let refused = parts.any(|part| {
            let weight = part.strip_prefix(b"q=").or_else(|| part.strip_prefix(b"Q="));
            weight.is_some_and(|weight| weight.iter().all(|b| matches!(b, b'0' | b'.')))
        });
        named && !refused
    })
}

/// Bytes that are compressed in one go, some milliseconds at the highest level: the worker's other requests wait for no more.
const PIECE: usize = 64 * 1024;

/// Compresses `x.chunk`, whole: what is flushed, or comes from an upstream bit by bit, is not to wait for the rest.
pub(super) async fn chunk(x: &mut Exchange) -> Result<()> {
    let Some(encoder) = x.encoder.as_mut().filter(|_| x.chunk.eof || !x.chunk.data.is_empty()) else { return Ok(()) };
    let failed = |e| Error::internal(Kind::Other).cause(e).context("gzip");
    for (at, piece) in x.chunk.data.chunks(PIECE).enumerate() {
        if at > 0 {
            tokio::task::yield_now().await;
        }
        encoder.write_all(piece).map_err(failed)?;
    }
    x.chunk.data.clear();
    match x.chunk.eof {
        true => encoder.try_finish().map_err(failed)?,
        false => encoder.flush().map_err(failed)?,
    }
    x.chunk.data.append(encoder.get_mut());
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_charset_is_named_of_texts_that_do_not_say_it() {
        let charset = Charset::of_routes(&json!({"nginx_config": {"http": {"charset": "utf-8"}}})).expect("a charset");
        for (kind, encoding, sent) in [
            ("text/html", "", "text/html; charset=utf-8"),
            ("Text/Plain", "", "Text/Plain; charset=utf-8"),
            ("text/plain; version=0.0.4", "", "text/plain; version=0.0.4"),
            ("application/javascript", "", "application/javascript; charset=utf-8"),
            ("application/rss+xml", "", "application/rss+xml; charset=utf-8"),
            ("text/vnd.wap.wml", "", "text/vnd.wap.wml; charset=utf-8"),
            ("text/html; Charset=ISO-8859-1", "", "text/html; Charset=ISO-8859-1"),
            ("text/html", "gzip", "text/html"),
            ("application/json", "", "application/json"),
            ("text/css", "", "text/css"),
            ("text/htm", "", "text/htm"),
            ("", "", ""),
        ] {
            let mut headers = Headers::new();
            headers.append("content-type", kind);
            if !encoding.is_empty() {
                headers.append("content-encoding", encoding);
            }
            name_charset(&mut headers, &charset);
            let got = headers.get_all(b"content-type").map(String::from_utf8_lossy).collect::<Vec<_>>();
            assert_eq!(got, [sent], "{kind}");
        }
        let mut none = Headers::new();
        name_charset(&mut none, &charset);
        assert!(none.is_empty());
    }

    #[test]
    fn codings_are_weighed() {
        for (field, accepted) in [
            ("gzip", true),
            ("deflate, GZIP;q=0.1", true),
            ("br,gzip ; q=1", true),
            ("gzip;q=0", false),
            ("gzip;q=0.00", false),
            ("x-gzip, deflate", false),
            ("", false),
        ] {
            assert_eq!(accepts_gzip(field.as_bytes()), accepted, "{field}");
        }
    }
}
