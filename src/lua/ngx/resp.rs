//! The answer: `ngx.say`, `print`, `flush`, `exit`, `redirect`, `status`.
//!
//! Where a location serves the request, the first `ngx.print` settles the head, and what is printed goes out when it has grown,
//! is flushed or the phase ends. For plugins and functions it is kept in `Exchange::printed` until the phase's end.

use std::{
    borrow::Cow,
    ffi::{c_int, c_void},
};

use mlua::ffi;

use super::{Text, codec};
use crate::{
    error::Result,
    exchange::{Exchange, Phase, Source, Version, host::Sending},
    lua::{
        Op, Wait,
        api::{Api, Phases, Raise, Stack, request},
        fast,
        host::{Answer, cjson::write_number},
        limits,
        sched::Ask,
    },
    observe::log::Level,
};

/// A table within tables that `ngx.print` follows.
const MAX_DEPTH: usize = 100;

/// What one response may hold back before a flush: above it a script must flush (or the memory of the worker is its).
const MAX_PRINTED: usize = 256 << 20;

/// What a location has printed goes out once it has grown to this.
const SEND_AT: usize = 64 << 10;

const PRINT: Phases = Phases::BEFORE_HEAD;

pub fn register(api: &mut Api) -> Result<()> {
    let any = Phases::ANY;
    let request = Phases::REQUEST;
    api.wait("ngx.print", PRINT, "print(...): ok, err; adds to the body", |s| print(s, false))?;
    api.wait("ngx.say", PRINT, "say(...): ok, err; as print, and a newline", |s| print(s, true))?;
    api.wait("ngx.eof", PRINT, "eof(): ok, err; the body is complete; what follows runs on", eof)?;
    let doc = "flush(wait?): ok, err; sends what was printed. Plugins and functions: it goes out when the phase ends";
    api.wait("ngx.flush", PRINT, doc, flush)?;
    api.wait("ngx.send_headers", PRINT, "send_headers(): ok, err; the head is settled", send_headers)?;
    let doc = "exit(status): ends the phase or the request; ngx.ERROR ends a handshake";
    api.wait("ngx.exit", request | Phases::TIMER | Phases::SSL, doc, exit)?;
    api.wait("ngx.redirect", Phases::BEFORE_HEAD, "redirect(uri, status?): 302 by default", redirect)?;
    api.func(
        "native.resp.set_arg",
        Phases::of(Phase::Set),
        "set_arg(n): the nth argument of set_by_lua, or nil",
        |s| {
            let n = s.arg_number(1)?;
            let arg = if n >= 1.0 { self::request()?.lua.set_args.get(n as usize - 1) } else { None };
            Ok(arg.map_or_else(|| s.push_nil(), |arg| s.push_bytes(arg)))
        },
    )?;
    let doc = "set_status(status, reason): true; false and a line in error.log once the head is sent";
    api.func("native.resp.set_status", request, doc, set_status)?;
    let doc = "bypass_if_checks(): If-Modified-Since and its like do not turn the answer into a 304";
    api.func("native.resp.bypass_if_checks", request, doc, |s| {
        self::request()?.response.bypasses_if = true;
        s.set_top(0);
        Ok(0)
    })?;
    api.fast(
        "status",
        "int (void)",
        any,
        "the response's status, 0 before there is one, -1 without a request",
        status as *const c_void,
    )?;
    api.fast("status_set", "int (int)", any, "0: no request, -1: the head is sent", status_set as *const c_void)?;
    api.fast(
        "headers_sent",
        "int (void)",
        any,
        "1 when the head is on its way; -1: no request",
        headers_sent as *const c_void,
    )?;
    let doc = "the chunk of a body filter; 1 when it is the last, -1 outside of one";
    api.fast("chunk", "int (void *)", any, doc, chunk as *const c_void)?;
    let doc = "replaces the chunk of a body filter";
    api.fast("chunk_set", "int (const char *, size_t)", any, doc, chunk_set as *const c_void)?;
    api.fast("chunk_eof", "int (int)", any, "says whether the chunk is the last", chunk_eof as *const c_void)
}

// SAFETY (all exports): Lua passes strings with their lengths and its own buffer for the answer.
crate::export! {
    fn status() -> c_int, 0 => {
        fast::request().map_or(-1, |x| x.response.status.into())
    }

    fn status_set(code: c_int) -> c_int, 0 => {
        let Some(x) = fast::request() else { return 0 };
        if x.response.head_sent || x.response.settled {
            return -1;
        }
        x.set_status(code.clamp(0, 999) as u16);
        x.response.reason.clear();
        1
    }

    fn headers_sent() -> c_int, 0 => {
        fast::request().map_or(-1, |x| c_int::from(x.response.head_sent || x.response.settled))
    }

    fn chunk(out: *mut Text) -> c_int, -1 => {
        let Some(x) = fast::exchange().filter(|x| Phases::BODY_FILTER.has(x.phase)) else { return -1 };
        unsafe { (*out).set(&x.chunk.data) };
        c_int::from(x.chunk.eof)
    }

    fn chunk_set(text: *const u8, len: usize) -> c_int, -1 => {
        let Some(x) = fast::exchange().filter(|x| Phases::BODY_FILTER.has(x.phase)) else { return -1 };
        x.chunk.data.clear();
        x.chunk.data.extend_from_slice(unsafe { fast::bytes(text, len) });
        0
    }

    fn chunk_eof(eof: c_int) -> c_int, -1 => {
        let Some(x) = fast::exchange().filter(|x| Phases::BODY_FILTER.has(x.phase)) else { return -1 };
        x.chunk.eof = eof != 0;
        0
    }
}

/// A longer one is no phrase.
const MAX_REASON: usize = 1024;

fn set_status(s: &Stack) -> Answer {
    let (status, reason) = (s.arg_number(1)?, s.arg_bytes(2)?);
    if !(0.0..=999.0).contains(&status) {
        return Err(s.argument_error(1, "bad status"));
    }
    // It is sent as it is: what ends a line would begin a header.
    if reason.len() > MAX_REASON || reason.iter().any(|b| (*b < b' ' && *b != b'\t') || *b == 0x7f) {
        return Err(s.argument_error(2, "bad reason"));
    }
    let x = self::request()?;
    if x.response.head_sent || x.response.settled {
        x.log(Level::Error, b"attempt to set ngx.status after sending out response headers");
        return Ok(s.push_bool(false));
    }
    x.set_status(status as u16);
    x.response.reason.clear();
    x.response.reason.extend_from_slice(reason);
    Ok(s.push_bool(true))
}

/// The gateway answers; without a status it is 200, as when nginx sends the head.
fn answered(x: &mut Exchange) {
    x.response.source = Source::Gateway;
    if x.response.status == 0 {
        x.response.status = 200;
    }
}

/// What a host function that sends answers.
type Sent = std::result::Result<Wait, Raise>;

fn ready(answer: Answer) -> Sent {
    answer.map(Wait::Ready)
}

/// Why nothing can be sent any more, in OpenResty's words.
fn refusal(x: &Exchange) -> Option<&'static str> {
    match () {
        () if x.response.ended => Some("seen eof"),
        () if x.response.head_sent && x.request.method == b"HEAD" => Some("header only"),
        () => None,
    }
}

/// Held back to the end, so that its length is known: HTTP/1.0 has no chunks (`lua_http10_buffering`).
fn is_buffered(x: &Exchange) -> bool {
    !x.response.head_sent
        && x.request.version == Version::Http10
        && !x.response.headers.contains("content-length")
        && x.location.as_ref().is_none_or(|l| l.directives.lua_http10_buffering)
}

/// Asks for sending, where somebody does that before the phase ends.
fn send(s: &Stack, x: &Exchange, what: Sending) -> Sent {
    match x.lua.host {
        Some(_) => Ok(Wait::Park(Op::Ask(Ask::Send(what)))),
        None => Ok(Wait::Ready(s.push_number(1.0))),
    }
}

fn print(s: &Stack, newline: bool) -> Sent {
    print_up_to(s, newline, MAX_PRINTED)
}

fn print_up_to(s: &Stack, newline: bool, max: usize) -> Sent {
    let x = request()?;
    if let Some(why) = refusal(x) {
        return ready(s.fail(why));
    }
    let before = x.printed.len();
    for i in 1..=s.top() {
        let Err(e) = append(s, i, &mut x.printed, max, 0) else { continue };
        x.printed.truncate(before);
        return match e {
            Unprintable::Kind(kind) => Err(s.argument_error(i, &kind)),
            Unprintable::Late(late) => Err(late),
        };
    }
    if newline {
        x.printed.push(b'\n');
    }
    if x.printed.len() > max {
        x.printed.truncate(max);
        return ready(s.fail("no memory"));
    }
    answered(x);
    if is_buffered(x) {
        return Ok(Wait::Ready(s.push_number(1.0)));
    }
    let what = match x.response.head_sent {
        _ if x.printed.len() >= SEND_AT => Sending::Flush,
        // A plugin's answer is whole when its phase ends, and has a length then.
        false if x.location.is_none() => return Ok(Wait::Ready(s.push_number(1.0))),
        false => Sending::Head,
        true => return Ok(Wait::Ready(s.push_number(1.0))),
    };
    if x.lua.host.is_some() && !s.may_yield() {
        // Inside `require`, `table.sort` or a callback of `gsub`.
        x.response.settled = true;
        return Ok(Wait::Ready(s.push_number(1.0)));
    }
    send(s, x, what)
}

fn eof(s: &Stack) -> Sent {
    let x = request()?;
    if x.response.ended {
        return ready(s.fail("seen eof"));
    }
    answered(x);
    send(s, x, Sending::End)
}

fn flush(s: &Stack) -> Sent {
    if !s.is_nil(1) && s.kind(1) != mlua::ffi::LUA_TBOOLEAN {
        return Err(s.bad_argument(1, "boolean"));
    }
    let x = request()?;
    if let Some(why) = refusal(x) {
        return ready(s.fail(why));
    }
    if x.lua.host.is_some() && is_buffered(x) && !x.printed.is_empty() {
        return ready(s.fail("buffering"));
    }
    if x.lua.host.is_some() && !x.response.head_sent && (x.location.is_some() || x.printed.is_empty()) {
        return ready(s.fail("nothing to flush"));
    }
    send(s, x, Sending::Flush)
}

fn send_headers(s: &Stack) -> Sent {
    let x = request()?;
    answered(x);
    if x.response.head_sent || is_buffered(x) {
        return Ok(Wait::Ready(s.push_number(1.0)));
    }
    send(s, x, Sending::Head)
}

enum Unprintable {
    /// What is wrong with the argument.
    Kind(Cow<'static, str>),
    /// The script's time is up.
    Late(Raise),
}

/// Appends a value as `ngx.print` writes it. Of a table no more is read once `out` is longer than `max`.
fn append(s: &Stack, i: c_int, out: &mut Vec<u8>, max: usize, depth: usize) -> std::result::Result<(), Unprintable> {
    match s.kind(i) {
        ffi::LUA_TSTRING => out.extend_from_slice(s.bytes(i).unwrap_or_default()),
        ffi::LUA_TNUMBER => write_number(out, s.number(i).unwrap_or_default(), 14),
        ffi::LUA_TNIL => out.extend_from_slice(b"nil"),
        ffi::LUA_TBOOLEAN => out.extend_from_slice(if s.boolean(i) { b"true" } else { b"false" }),
        // SAFETY: the value is a lightuserdata.
        ffi::LUA_TLIGHTUSERDATA if unsafe { ffi::lua_touserdata(s.raw(), i) }.is_null() => {
            out.extend_from_slice(b"null")
        }
        ffi::LUA_TTABLE if depth < MAX_DEPTH && s.reserve(2).is_ok() => {
            limits::check().map_err(Unprintable::Late)?;
            let len = s.len(i);
            let table = s.absolute(i);
            for n in 1..=len {
                s.get_index(table, n);
                let done = append(s, -1, out, max, depth + 1);
                s.pop(1);
                match done {
                    Err(Unprintable::Kind(_)) => {
                        return Err(Unprintable::Kind("bad data type in the array table".into()));
                    }
                    done => done?,
                }
                if out.len() > max {
                    return Ok(());
                }
            }
            // Other keys than 1..#t are not an array's.
            let mut keys = 0;
            let _ = s.pairs::<()>(table, |_| {
                keys += 1;
                Ok(())
            });
            if keys > len {
                return Err(Unprintable::Kind("non-array table found".into()));
            }
        }
        _ => {
            let kind = s.kind_name(i);
            let text = format!("string, number, boolean, nil, ngx.null, or array table expected, but got {kind}");
            return Err(Unprintable::Kind(text.into()));
        }
    }
    Ok(())
}

/// `exit(status)`: from 200 on it is the answer, unless something has been printed under a status already.
fn exit(s: &Stack) -> std::result::Result<Wait, Raise> {
    let code = s.arg_number(1)? as i64;
    if matches!(code, -2 | -4) {
        return Err("bad argument to 'ngx.exit': does not accept NGX_AGAIN or NGX_DONE".into());
    }
    if let Some(x) = fast::exchange() {
        if x.lua.has_subrequests() && !matches!(code, -1 | 408 | 444 | 499) {
            return Err("attempt to abort with pending subrequests".into());
        }
        if x.response.head_sent && code >= 300 && code != i64::from(x.response.status) {
            let text = format!(
                "attempt to set status {code} via ngx.exit after sending out the response status {}",
                x.response.status
            );
            x.log(Level::Error, text.as_bytes());
        }
        let sent = x.response.head_sent || !x.printed.is_empty();
        if code == 204 {
            x.printed.clear();
        }
        if (200..1000).contains(&code) && (!sent || code == 204 || x.response.status == 0) && !x.response.head_sent {
            x.response.status = code as u16;
            x.response.source = Source::Gateway;
        }
    }
    Ok(Wait::Park(Op::Exit(code)))
}

fn redirect(s: &Stack) -> std::result::Result<Wait, Raise> {
    let uri = s.arg_bytes(1)?;
    let code = s.opt_number(2)?.unwrap_or(302.0) as u16;
    if !matches!(code, 301 | 302 | 303 | 307 | 308) {
        return Err("only ngx.HTTP_MOVED_TEMPORARILY, ngx.HTTP_MOVED_PERMANENTLY, ngx.HTTP_PERMANENT_REDIRECT, \
                    ngx.HTTP_SEE_OTHER, and ngx.HTTP_TEMPORARY_REDIRECT are allowed"
            .into());
    }
    if let Some(bad) = uri.iter().find(|b| !super::header::in_value(**b) || **b == b'\t') {
        let mut shown = Vec::new();
        codec::escape_into(&mut shown, uri, |b| b > 0x20 && b != 0x7f);
        let shown = String::from_utf8_lossy(&shown).into_owned();
        return Err(format!("unsafe byte \"0x{bad:02x}\" in redirect uri \"{shown}\"").into());
    }
    let x = request()?;
    if x.lua.has_subrequests() {
        return Err("attempt to abort with pending subrequests".into());
    }
    if x.response.head_sent || !x.printed.is_empty() {
        return Err("attempt to call ngx.redirect after sending out the headers".into());
    }
    x.response.headers.set("Location", uri);
    x.response.status = code;
    x.response.source = Source::Gateway;
    Ok(Wait::Park(Op::Exit(code.into())))
}

#[cfg(test)]
mod tests {
    use super::MAX_DEPTH;
    use crate::{
        exchange::Phase,
        lua::{
            Wait,
            host::tests::{serve, serve_with},
        },
    };

    #[test]
    fn prints_what_lua_has() {
        let x = serve(
            |_| {},
            "ngx.print('a', 1, nil, true, ngx.null, {'b', {2.5}}) return ngx.say('x') .. ngx.status",
            "1200",
        );
        assert_eq!(String::from_utf8_lossy(&x.printed), "a1niltruenullb2.5x\n");
    }

    #[test]
    fn refuses_what_cannot_be_printed() {
        for (chunk, expected) in [
            ("ngx.print({a = 1})", "bad argument #1 to 'print' (non-array table found)"),
            (
                "ngx.say('a', print)",
                "bad argument #2 to 'say' (string, number, boolean, nil, ngx.null, or array table expected, but got function)",
            ),
        ] {
            let chunk = format!("local _, e = pcall(function() {chunk} end) return (e:gsub('^.-: ', ''))");
            serve(|_| {}, &chunk, expected);
        }
    }

    #[test]
    fn a_body_filter_sees_and_changes_its_chunk() {
        let x = serve(
            |x| {
                x.phase = Phase::BodyFilter;
                x.chunk.data = b"abc".to_vec();
            },
            "local was = ngx.arg[1] .. tostring(ngx.arg[2]) ngx.arg[1] = {was, '!'} ngx.arg[2] = true return was",
            "abcfalse",
        );
        assert_eq!((&x.chunk.data[..], x.chunk.eof), (&b"abcfalse!"[..], true));
    }

    #[test]
    fn status_is_a_number_that_can_be_set() {
        let x = serve(|_| {}, "ngx.status = 404 return tostring(ngx.status) .. tostring(ngx.headers_sent)", "404false");
        assert_eq!(x.response.status, 404);
    }

    #[test]
    fn what_is_printed_is_bounded() {
        let x = serve_with(
            |s| match super::print_up_to(s, false, 10)? {
                Wait::Ready(n) => Ok(n),
                Wait::Park(_) => Err("nobody is there to send it".into()),
            },
            "local long = {'abc', {'def', {'ghi'}}}
             assert(f(long) == 1)
             local _, e = f('jklm') assert(e == 'no memory')
             -- Held back are the first ten bytes, and of a table no more is read than that takes.
             for i = 4, 1e5 do long[i] = ('x'):rep(100) end
             return tostring(f(long)) .. select(2, f(long))",
            "nilno memory",
        );
        assert_eq!(x.printed, b"abcdefghij");
    }

    #[test]
    fn tables_are_followed_only_so_deep() {
        let nested = |levels: usize| format!("local t = 'x' for _ = 1, {levels} do t = {{t}} end ");
        let x = serve(|_| {}, &format!("{} return tostring(ngx.print(t))", nested(MAX_DEPTH)), "1");
        assert_eq!(x.printed, b"x");
        let refused = "bad argument #1 to 'print' (bad data type in the array table)";
        let chunk = format!("{} return (select(2, pcall(ngx.print, t)):gsub('^.-: ', ''))", nested(MAX_DEPTH + 1));
        serve(|_| {}, &chunk, refused);
    }
}
