//! `ngx.var`: reading and writing variables by name.

use std::{
    ffi::{c_int, c_void},
    io::Write,
};

use smallvec::SmallVec;

use super::{Text, codec, scratch};
use crate::{
    error::Result,
    exchange::{Exchange, Version},
    lua::{
        api::{Api, Phases},
        fast,
    },
};

/// Variables of a request that scripts may make: a bound against a script that makes one per loop.
const MAX_CUSTOM: usize = 256;

pub fn register(api: &mut Api) -> Result<()> {
    let doc = "a variable's value: 1 when it has one, -1 without a request";
    let signature = "int (const char *, size_t, void *)";
    api.fast("var_get", signature, Phases::ANY, doc, var_get as *const c_void)?;
    let doc = "sets a variable; a null value unsets it; 0: it cannot be changed, -1: no request";
    let signature = "int (const char *, size_t, const char *, size_t)";
    api.fast("var_set", signature, Phases::ANY, doc, var_set as *const c_void)
}

// SAFETY (all exports): Lua passes strings with their lengths and its own buffer for the answer.
crate::export! {
    fn var_get(name: *const u8, len: usize, out: *mut Text) -> c_int, 0 => {
        let Some(x) = fast::exchange() else { return -1 };
        unsafe { c_int::from(read(x, fast::bytes(name, len), &mut *out)) }
    }

    fn var_set(name: *const u8, len: usize, value: *const u8, value_len: usize) -> c_int, 0 => {
        let Some(x) = fast::exchange() else { return -1 };
        let name = unsafe { fast::bytes(name, len) };
        let value = (!value.is_null()).then(|| unsafe { fast::bytes(value, value_len) });
        c_int::from(write(x, name, value))
    }
}

/// Points `out` at the value: first what lies in the exchange as it is.
fn read(x: &Exchange, name: &[u8], out: &mut Text) -> bool {
    if let Some((_, value)) = x.custom_vars.iter().find(|(n, _)| n.as_bytes() == name) {
        out.set(value);
        return true;
    }
    let request = &x.request;
    let value = match name {
        b"uri" | b"document_uri" => &request.path,
        b"args" | b"query_string" => &request.args,
        b"request_uri" => &request.target,
        b"request_method" => &request.method,
        b"host" => &request.host,
        b"upstream_uri" => &x.upstream.uri,
        b"upstream_host" => &x.upstream.host,
        b"upstream_scheme" => &x.upstream.scheme,
        _ => return read_prefixed(x, name, out) || read_computed(x, name, out),
    };
    out.set(value);
    !(value.is_empty() && matches!(name, b"args" | b"query_string"))
}

fn read_prefixed(x: &Exchange, name: &[u8], out: &mut Text) -> bool {
    let dashed =
        |rest: &[u8]| -> SmallVec<[u8; 48]> { rest.iter().map(|b| if *b == b'_' { b'-' } else { *b }).collect() };
    if let Some(rest) = name.strip_prefix(b"arg_") {
        let found = codec::pairs(&x.request.args).find(|(n, _)| n.eq_ignore_ascii_case(rest));
        return found.and_then(|(_, v)| v).map(|v| out.set(v)).is_some();
    }
    if let Some(rest) = name.strip_prefix(b"http_") {
        return joined(x.request.headers.get_all(&dashed(rest)), out);
    }
    if let Some(rest) = name.strip_prefix(b"sent_http_") {
        return joined(x.response.headers.get_all(&dashed(rest)), out);
    }
    if let Some(rest) = name.strip_prefix(b"upstream_http_") {
        return joined(x.upstream.headers.get_all(&dashed(rest)), out);
    }
    if let Some(rest) = name.strip_prefix(b"cookie_") {
        let cookies = x.request.headers.get_all(b"cookie").flat_map(|v| v.split(|b| *b == b';'));
        let found = cookies.map(<[u8]>::trim_ascii).find_map(|c| c.strip_prefix(rest)?.strip_prefix(b"="));
        return found.map(|v| out.set(v)).is_some();
    }
    false
}

/// Several fields of one name are one value, as nginx joins them.
fn joined<'a>(mut values: impl Iterator<Item = &'a [u8]>, out: &mut Text) -> bool {
    let Some(first) = values.next() else { return false };
    let Some(second) = values.next() else {
        out.set(first);
        return true;
    };
    scratch(out, |buffer| {
        buffer.extend_from_slice(first);
        for value in std::iter::once(second).chain(values) {
            buffer.extend_from_slice(b", ");
            buffer.extend_from_slice(value);
        }
    });
    true
}

fn read_computed(x: &Exchange, name: &[u8], out: &mut Text) -> bool {
    let mut found = true;
    scratch(out, |b| {
        // Writing to a vector cannot fail.
        let _ = match name {
            b"remote_addr" => write!(b, "{}", x.remote().ip()),
            b"remote_port" => write!(b, "{}", x.remote().port()),
            b"realip_remote_addr" => write!(b, "{}", x.conn.peer.ip()),
            b"server_addr" => write!(b, "{}", x.conn.local.ip()),
            b"server_port" => write!(b, "{}", x.conn.local.port()),
            b"scheme" => b.write_all(if x.conn.tls.is_some() { b"https" } else { b"http" }),
            b"https" => b.write_all(if x.conn.tls.is_some() { b"on" } else { b"" }),
            b"connection" => write!(b, "{}", x.conn.serial),
            b"connection_requests" => write!(b, "{}", x.request.nth),
            b"status" => write!(b, "{:03}", x.response.status),
            b"is_args" => b.write_all(if x.request.args.is_empty() { b"" } else { b"?" }),
            b"request_time" => write!(b, "{:.3}", x.started.elapsed().as_secs_f64()),
            b"request_length" => write!(b, "{}", x.request.head_len),
            b"bytes_sent" => write!(b, "{}", x.bytes_sent),
            b"body_bytes_sent" => write!(b, "{}", x.body_bytes_sent),
            b"content_type" => b.write_all(x.request.headers.get("content-type").unwrap_or_default()),
            b"content_length" => b.write_all(x.request.headers.get("content-length").unwrap_or_default()),
            b"server_protocol" => b.write_all(match x.request.version {
                Version::Http10 => b"HTTP/1.0",
                Version::Http11 => b"HTTP/1.1",
                Version::Http2 => b"HTTP/2.0",
            }),
            _ => {
                found = false;
                Ok(())
            }
        };
    });
    found
}

fn write(x: &mut Exchange, name: &[u8], value: Option<&[u8]>) -> bool {
    let field = match name {
        b"args" => &mut x.request.args,
        b"upstream_uri" => &mut x.upstream.uri,
        b"upstream_host" => &mut x.upstream.host,
        b"upstream_scheme" => &mut x.upstream.scheme,
        _ => return write_custom(x, name, value),
    };
    field.clear();
    field.extend_from_slice(value.unwrap_or_default());
    true
}

fn write_custom(x: &mut Exchange, name: &[u8], value: Option<&[u8]>) -> bool {
    let at = x.custom_vars.iter().position(|(n, _)| n.as_bytes() == name);
    match (at, value) {
        (Some(at), Some(value)) => {
            let slot = &mut x.custom_vars[at].1;
            slot.clear();
            slot.extend_from_slice(value);
        }
        (Some(at), None) => drop(x.custom_vars.swap_remove(at)),
        (None, Some(value)) if x.custom_vars.len() < MAX_CUSTOM => {
            let Ok(name) = std::str::from_utf8(name) else { return false };
            x.custom_vars.push((name.into(), value.to_vec()));
        }
        (None, Some(_)) => return false,
        (None, None) => {}
    }
    true
}
