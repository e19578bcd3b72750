//! Request and response headers: `ngx.header`, `ngx.req.get_headers`, `ngx.resp.get_headers`.

use std::{
    borrow::Cow,
    ffi::{c_int, c_void},
};

use smallvec::SmallVec;

use super::{Text, codec, header_names::Names, scratch, with_scratch};
use crate::{
    error::Result,
    exchange::{
        Exchange, Headers, Version,
        headers::{lower, same_name, short_word},
    },
    lua::{
        api::{Api, Phases, Stack, request},
        fast,
        host::{Answer, cjson::write_number},
        vm,
    },
    observe::log::Level,
};

pub fn register(api: &mut Api) -> Result<()> {
    let any = Phases::ANY;
    let get = "int (const char *, size_t, unsigned, void *)";
    let set = "int (const char *, size_t, const char *, size_t, int)";
    let set_number = "int (const char *, size_t, double, int)";
    api.fast(
        "req_header",
        get,
        any,
        "n-th value of a request header: 1 when there is one, 2 when there are more",
        req_header as *const c_void,
    )?;
    api.fast("resp_header", get, any, "the same of a response header", resp_header as *const c_void)?;
    let doc = "changes a request header: 0 replaces, 1 adds, 2 removes, 4 more: the name is sound; 0 when there is no request";
    api.fast("req_header_set", set, any, doc, req_header_set as *const c_void)?;
    let doc = "changes a response header; 0 when there is no request, -1 when the head is sent";
    api.fast("resp_header_set", set, any, doc, resp_header_set as *const c_void)?;
    let doc = "as `req_header_set`, with a number's text as the value";
    api.fast("req_header_set_number", set_number, any, doc, req_header_set_number as *const c_void)?;
    let doc = "as `resp_header_set`, with a number's text as the value";
    api.fast("resp_header_set_number", set_number, any, doc, resp_header_set_number as *const c_void)?;
    api.func("native.req.headers", Phases::REQUEST, "headers(max, raw): table, \"truncated\"", |s| {
        push_headers(s, &request()?.request.headers, "request")
    })?;
    let doc = "keeps_underscores(): lua_transform_underscores_in_response_headers is off";
    api.func("native.resp.keeps_underscores", any, doc, |s| {
        let location = fast::exchange().and_then(|x| x.location.as_ref());
        Ok(s.push_bool(location.is_some_and(|l| !l.directives.lua_transform_underscores_in_response_headers)))
    })?;
    api.func("native.resp.headers", Phases::REQUEST, "headers(max, raw): table, \"truncated\"", |s| {
        let x = request()?;
        if x.location.is_none() {
            return push_headers(s, &x.response.headers, "response");
        }
        let mut all = x.response.headers.clone();
        built_in(x).into_iter().for_each(|(name, value)| all.append(name, value));
        push_headers(s, &all, "response")
    })
}

/// Pushes the fields as a table by lower-case name, or as they came when argument 2 is true.
fn push_headers(s: &Stack, headers: &Headers, kind: &str) -> Answer {
    let max = codec::limit(s, 1)?;
    let raw = s.boolean(2);
    let pushed = if raw {
        None
    } else {
        vm::with_current(|vm| push_fields(s, headers, kind, max, Name::Known(&vm.header_names)))
    };
    pushed.unwrap_or_else(|| push_fields(s, headers, kind, max, if raw { Name::Raw } else { Name::Made }))
}

/// How names become strings.
#[derive(Clone, Copy)]
enum Name<'a> {
    /// As they came.
    Raw,
    /// In lower case; where they are known already.
    Known(&'a Names),
    /// In lower case, outside of VMs that keep them.
    Made,
}

fn push_fields(s: &Stack, headers: &Headers, kind: &str, max: usize, how: Name) -> Answer {
    if let Name::Known(names) = how {
        names.begin(s);
    }
    let strings = s.top();
    s.push_table(0, headers.len());
    let table = s.top();
    // Bit `n` of the names' lengths that were seen.
    let mut lengths = 0u64;
    for (n, (name, value)) in headers.iter().enumerate() {
        if n == max {
            if let Some(x) = fast::exchange() {
                let text = format!("lua exceeding {kind} header limit {} > {max}", headers.len());
                x.log(Level::Debug, text.as_bytes());
            }
            s.push_bytes("truncated");
            return Ok(2);
        }
        let length = 1 << (name.len() % 64);
        let raw = matches!(how, Name::Raw);
        let same = |other: &[u8]| if raw { other == name } else { same_name(other, name) };
        if lengths & length != 0
            && headers
                .of_length(name.len())
                .take_while(|(other, _)| !std::ptr::eq(*other, name))
                .any(|(other, _)| same(other))
        {
            s.push_bytes(value);
            let shown = if raw { Cow::Borrowed(name) } else { Cow::Owned(name.to_ascii_lowercase()) };
            codec::add(s, table, &shown);
        } else {
            match how {
                Name::Known(names) => names.push(s, strings, name),
                Name::Raw => _ = s.push_bytes(name),
                Name::Made => _ = s.push_bytes(lower(name, &mut [0; 64])),
            }
            s.push_bytes(value);
            s.set_raw(table);
        }
        lengths |= length;
    }
    Ok(1)
}

/// What may stand in a field's value; the rest is percent-encoded, as OpenResty does, so that no script splits a head.
pub fn in_value(b: u8) -> bool {
    ((b >= 0x20) & (b != 0x7f)) | (b == b'\t')
}

fn in_name(b: u8) -> bool {
    (b > 0x20) & (b < 0x7f) & (b != b':')
}

/// One in each byte of a word.
const EACH: u64 = 0x0101_0101_0101_0101;
const HIGH: u64 = 0x80 * EACH;

/// A bit where there are bytes below `n`; nothing where there is none.
fn below(word: u64, n: u8) -> u64 {
    word.wrapping_sub(u64::from(n) * EACH) & !word & HIGH
}

/// A bit where a byte is `b`; nothing where none is.
fn is(word: u64, b: u8) -> u64 {
    below(word ^ (u64::from(b) * EACH), 1)
}

/// What `in_value` refuses, and the tab.
fn odd_in_value(word: u64) -> u64 {
    below(word, 0x20) | is(word, 0x7f)
}

/// What `in_name` refuses.
fn odd_in_name(word: u64) -> u64 {
    below(word, 0x21) | is(word, 0x7f) | is(word, b':') | (word & HIGH)
}

/// The bits of as many bytes as `short_word` fills.
fn whole(len: usize) -> u64 {
    if len < 4 { (1 << (len * 8)) - 1 } else { u64::MAX }
}

/// `bad`: a bit for each byte of a word that may have to be escaped. Nearly all texts have none.
fn safe(text: &[u8], bad: impl Fn(u64) -> u64, keep: impl Fn(u8) -> bool) -> Cow<'_, [u8]> {
    let sound = match (text.last_chunk(), text.as_chunks().0) {
        // The last word overlaps those before it.
        (Some(last), words) => {
            words.iter().chain([last]).fold(0, |all, word| all | bad(u64::from_le_bytes(*word))) == 0
        }
        (None, _) if text.is_empty() => true,
        // Some bytes are there twice.
        (None, _) => bad(short_word(text)) & whole(text.len()) == 0,
    };
    if sound {
        return text.into();
    }
    let mut out = Vec::with_capacity(text.len() + 8);
    codec::escape_into(&mut out, text, keep);
    out.into()
}

/// Added to what is done with a field: its name was looked at before and needs no escapes.
const SOUND: c_int = 4;

fn change(headers: &mut Headers, name: &[u8], value: &[u8], how: c_int) {
    let name = if how & SOUND != 0 { Cow::Borrowed(name) } else { safe(name, odd_in_name, in_name) };
    match how & !SOUND {
        0 => headers.set_sound(&name, &safe(value, odd_in_value, in_value)),
        1 => headers.append(&*name, &*safe(value, odd_in_value, in_value)),
        _ => {
            headers.remove(&*name);
        }
    }
}

/// Sets, adds (`1`) or removes (`2`) a request header, and what follows from it.
pub fn change_request(x: &mut Exchange, name: &[u8], value: &[u8], how: c_int) {
    change(&mut x.request.headers, name, value, how);
    if how & !SOUND == 0 && name.eq_ignore_ascii_case(b"host") {
        x.request.host.clear();
        x.request.host.extend(without_port(value).iter().map(u8::to_ascii_lowercase));
    }
}

/// `[::1]:80` is `[::1]`, `a:80` is `a`.
fn without_port(host: &[u8]) -> &[u8] {
    let from = memchr::memchr(b']', host).unwrap_or(0);
    memchr::memchr(b':', &host[from..]).map_or(host, |at| &host[..from + at])
}

/// What is read most stays small: what else a name may mean is asked for elsewhere.
#[inline(always)]
fn nth(headers: &Headers, name: &[u8], n: u32, out: &mut Text) -> c_int {
    match headers.nth(name, n as usize) {
        Some((value, more)) => {
            out.set(value);
            1 + c_int::from(more)
        }
        None => nth_dashed(headers, name, n, out),
    }
}

/// Lua writes `content_type` for `Content-Type`.
#[inline(never)]
fn nth_dashed(headers: &Headers, name: &[u8], n: u32, out: &mut Text) -> c_int {
    if memchr::memchr(b'_', name).is_none() {
        return 0;
    }
    let dashed: SmallVec<[u8; 64]> = name.iter().map(|b| if *b == b'_' { b'-' } else { *b }).collect();
    let Some((value, more)) = headers.nth(&dashed, n as usize) else { return 0 };
    scratch(out, |buffer| buffer.extend_from_slice(value));
    1 + c_int::from(more)
}

// SAFETY (all exports): Lua passes strings with their lengths and its own buffer for the answer.
crate::export! {
    fn req_header(name: *const u8, len: usize, n: u32, out: *mut Text) -> c_int, 0 => {
        let Some(x) = fast::request() else { return -1 };
        unsafe { nth(&x.request.headers, fast::bytes(name, len), n, &mut *out) }
    }

    fn resp_header(name: *const u8, len: usize, n: u32, out: *mut Text) -> c_int, 0 => {
        let Some(x) = fast::request() else { return -1 };
        let name = unsafe { fast::bytes(name, len) };
        let found = unsafe { nth(&x.response.headers, name, n, &mut *out) };
        if found == 0 && n == 0 && x.location.is_some() {
            return unsafe { built_in_field(x, name, &mut *out) };
        }
        found
    }

    fn req_header_set(name: *const u8, len: usize, value: *const u8, value_len: usize, how: c_int) -> c_int, 0 => {
        let Some(x) = fast::request() else { return 0 };
        let (name, value) = unsafe { (fast::bytes(name, len), fast::bytes(value, value_len)) };
        change_request(x, name, value, how);
        1
    }

    fn resp_header_set(name: *const u8, len: usize, value: *const u8, value_len: usize, how: c_int) -> c_int, 0 => {
        let Some(x) = fast::request() else { return 0 };
        if x.response.head_sent || x.response.settled {
            return -1;
        }
        let (name, value) = unsafe { (fast::bytes(name, len), fast::bytes(value, value_len)) };
        let is_type = name.eq_ignore_ascii_case(b"content-type");
        if how & !SOUND == 2 && is_type {
            x.untyped = true;
        }
        // As nginx spells it, `ngx.header.content_type` or not.
        let name = if is_type { b"Content-Type" } else { name };
        change(&mut x.response.headers, name, value, how);
        1
    }

    fn req_header_set_number(name: *const u8, len: usize, value: f64, how: c_int) -> c_int, 0 => {
        let Some(x) = fast::request() else { return 0 };
        let name = unsafe { fast::bytes(name, len) };
        with_text(value, |text| change_request(x, name, text, how));
        1
    }

    fn resp_header_set_number(name: *const u8, len: usize, value: f64, how: c_int) -> c_int, 0 => {
        let Some(x) = fast::request() else { return 0 };
        if x.response.head_sent || x.response.settled {
            return -1;
        }
        let name = unsafe { fast::bytes(name, len) };
        with_text(value, |text| change(&mut x.response.headers, name, text, how));
        1
    }
}

/// The fields that are about the client's connection, which the connection itself writes.
fn built_in(x: &Exchange) -> impl IntoIterator<Item = (&'static str, &'static str)> {
    let connection = ("Connection", if x.request.keep_alive { "keep-alive" } else { "close" });
    let chunked = x.request.version == Version::Http11 && !x.response.headers.contains("content-length");
    let encoding = (chunked && x.response.head_sent).then_some(("Transfer-Encoding", "chunked"));
    [Some(connection), encoding].into_iter().flatten()
}

#[inline(never)]
fn built_in_field(x: &Exchange, name: &[u8], out: &mut Text) -> c_int {
    let field = built_in(x).into_iter().find(|(own, _)| own.as_bytes().eq_ignore_ascii_case(name));
    let Some((_, value)) = field else { return 0 };
    out.set(value.as_bytes());
    1
}

/// Calls `run` with the number as Lua's `tostring` writes it: here it takes a fifth of the time that LuaJIT needs.
fn with_text<R>(number: f64, run: impl FnOnce(&[u8]) -> R) -> R {
    with_scratch(|text| {
        write_number(text, number, LUA_DIGITS);
        run(text)
    })
}

/// `LUAI_NUMFFORMAT` is `%.14g`.
const LUA_DIGITS: c_int = 14;

#[cfg(test)]
mod tests {
    use crate::lua::host::tests::serve;

    #[test]
    fn no_name_splits_a_head_the_second_time_either() {
        for (name, shown) in
            [("X-A\\r\\nB", "X-A%0D%0AB"), ("X: y", "X%3A%20y"), ("X-\\0", "X-%00"), ("\\127", "%7F"), ("\\200", "%C8")]
        {
            let set = format!("local n = '{name}' for _ = 1, 3 do ngx.header[n] = 'v' ngx.req.set_header(n, 1) end");
            let read = "local h = ngx.resp.get_headers(0, true) local r = ngx.req.get_headers(0, true)";
            let chunk = format!("{set} {read} return tostring(next(h)) .. tostring(next(r))");
            serve(|_| {}, &chunk, &format!("{shown}{shown}"));
        }
    }

    #[test]
    fn every_byte_is_kept_or_escaped_wherever_it_stands() {
        for len in [1, 7, 8, 9, 16, 21] {
            for (at, b) in (0..len).flat_map(|at| (0..=255).map(move |b| (at, b))) {
                let mut text = vec![b'a'; len];
                text[at] = b;
                for (odd, keep) in [
                    (super::odd_in_name as fn(u64) -> u64, super::in_name as fn(u8) -> bool),
                    (super::odd_in_value, super::in_value),
                ] {
                    let kept = super::safe(&text, odd, keep);
                    let expected = if keep(b) { len } else { len + 2 };
                    assert_eq!(kept.len(), expected, "{b:#x} at {at} of {len}");
                }
            }
        }
    }

    #[test]
    fn response_headers_are_set_read_and_removed() {
        for (chunk, expected) in [
            ("ngx.header.content_type = 'text/x' return ngx.header['Content-Type']", "text/x"),
            ("ngx.header['X-A'] = {'a', 'b'} return table.concat(ngx.header.x_a, '|')", "a|b"),
            ("ngx.header['X-A'] = 'a' ngx.header['x-a'] = nil return tostring(ngx.header['X-A'])", "nil"),
            ("ngx.header['X-A'] = {} return tostring(ngx.header['X-A'])", "nil"),
            ("ngx.header['Content-Type'] = {'a', 'b'} return ngx.header.content_type", "b"),
            ("ngx.header['X-A'] = 'a\\r\\nX-B: b' return ngx.header['X-A']", "a%0D%0AX-B: b"),
            ("ngx.header['X-N'] = 5 return ngx.header['X-N'] .. ngx.resp.get_headers()['x-n']", "55"),
            (
                "local got = {}
                 for i, n in ipairs({ 0, -7, 59.98, 1e14, 1e15, 0.1 + 0.2, 1/0, 2^53 }) do
                     ngx.header['X-N'] = n
                     if ngx.header['X-N'] ~= tostring(n) then got[#got + 1] = ngx.header['X-N'] end
                 end
                 return table.concat(got, ' ')",
                "",
            ),
        ] {
            serve(|_| {}, chunk, expected);
        }
    }

    #[test]
    fn a_sent_head_stays_as_it_is() {
        let x =
            serve(|x| x.response.head_sent = true, "ngx.header['X-A'] = 'a' ngx.status = 500 return 'done'", "done");
        assert!(x.response.headers.is_empty());
        assert_eq!(x.response.status, 0);
    }

    #[test]
    fn request_headers_by_any_name() {
        let prepare = |x: &mut crate::exchange::Exchange| {
            x.request.headers.append("Host", "a");
            x.request.headers.append("X-Foo", "1");
            x.request.headers.append("x-foo", "2");
        };
        for (chunk, expected) in [
            ("local h = ngx.req.get_headers() return h.host .. table.concat(h['x-foo'], '|')", "a1|2"),
            ("local h = ngx.req.get_headers() return h.X_Foo[1] .. h['X-FOO'][2]", "12"),
            ("local h = ngx.req.get_headers(0, true) return h['X-Foo'] .. h['x-foo'] .. tostring(h.host)", "12nil"),
            ("local _, e = ngx.req.get_headers(1) return e", "truncated"),
            ("ngx.req.set_header('X-foo', 'z') return ngx.var.http_x_foo", "z"),
            ("ngx.req.set_header('X_Bar', 'z') return ngx.req.get_headers(0, true)['X_Bar']", "z"),
            ("ngx.req.clear_header('x-foo') return tostring(ngx.var.http_x_foo)", "nil"),
            ("ngx.req.set_header('Host', 'B.com:80') return ngx.var.host .. ngx.var.http_host", "b.comB.com:80"),
            ("return ngx.var.http_x_foo", "1, 2"),
        ] {
            serve(prepare, chunk, expected);
        }
    }
}
