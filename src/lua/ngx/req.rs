//! `ngx.req.*`: the request's line and body.

use std::{
    ffi::{c_int, c_void},
    future::Future,
    io::Write,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use tokio::time::{Sleep, sleep};

use super::{Text, codec, header::change_request};
use crate::{
    conf::locations::Location,
    error::{Error, Kind, Result},
    exchange::{Exchange, RequestBody, Spooled, Version, asked, framing::parse_decimal},
    lua::{
        Op, Values, Wait,
        api::{Api, Phases, Raise, Stack, request},
        fast,
        host::Answer,
        sched::failed,
    },
    observe::log::Level,
};

/// A body up to this stays in memory; a longer one goes to a file (`client_body_buffer_size` is smaller in nginx, and
/// plugins that read bodies meet files too often there).
const MEMORY_BODY: usize = 1 << 20;

/// What a file takes of a body where `client_max_body_size` is 0, which is no bound: beyond any upload that a script has to see as a
/// whole, and little enough that one client does not fill a disk.
const SPOOL_MAX: u64 = 4 << 30;

/// Bytes asked of the client at once.
const READ_CHUNK: usize = 64 << 10;

const BODY: Phases = Phases::BEFORE_HEAD;
const READ: Phases = Phases::REQUEST;
/// A `balancer_by_lua` may give each try a body of its own.
const REPLACE: Phases = Phases(BODY.0 | Phases::BALANCER.0);

pub fn register(api: &mut Api) -> Result<()> {
    api.fast("method", "int (void *)", READ, "the request's method; 0 without a request", method as *const c_void)?;
    api.fast("args", "int (void *)", READ, "the query; 0 without a request", args as *const c_void)?;
    api.func("ngx.req.get_uri_args", READ, "get_uri_args(max?): table, \"truncated\"", |s| {
        let max = codec::limit(s, 1)?;
        codec::push_args(s, &request()?.request.args, max)
    })?;
    api.func("ngx.req.get_post_args", READ, "get_post_args(max?): table, err", get_post_args)?;
    api.func("native.req.set_method", BODY | Phases::SET | Phases::HEADER_FILTER, "set_method(name)", |s| {
        let name = s.arg_bytes(1)?;
        let x = request()?;
        x.request.set_method(name);
        Ok(0)
    })?;
    let doc = "set_uri(uri, jump?, binary?): jump looks for the location anew and does not return";
    let uri = BODY | Phases::SET | Phases::HEADER_FILTER | Phases::BODY_FILTER;
    api.wait("ngx.req.set_uri", uri, doc, set_uri)?;
    api.func("ngx.req.set_uri_args", uri, "set_uri_args(text, number or table)", set_uri_args)?;
    api.func("ngx.req.http_version", READ, "http_version(): 1.0, 1.1 or 2.0", |s| {
        let version = match request()?.request.version {
            Version::Http10 => 1.0,
            Version::Http11 => 1.1,
            Version::Http2 => 2.0,
        };
        Ok(s.push_number(version))
    })?;
    api.func("ngx.req.start_time", READ, "start_time(): seconds since the epoch", |s| {
        let started = std::time::SystemTime::now().checked_sub(request()?.started.elapsed());
        let since = started.and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok()).unwrap_or_default();
        Ok(s.push_number(since.as_millis() as f64 / 1000.0))
    })?;
    api.func("ngx.req.raw_header", READ, "raw_header(no_request_line?)", raw_header)?;
    api.func("ngx.req.is_internal", READ, "is_internal(): whether it is a subrequest or came by ngx.exec", |s| {
        Ok(s.push_bool(request()?.internal))
    })?;
    api.wait("ngx.req.read_body", BODY, "read_body(): waits for the whole body", |_| read_body(Reading::new(true)))?;
    api.wait("ngx.req.discard_body", BODY, "discard_body(): reads the body and drops it", |_| {
        read_body(Reading::new(false))
    })?;
    api.func(
        "ngx.req.get_body_data",
        READ,
        "get_body_data(max?): the body, or nil when none or in a file",
        get_body_data,
    )?;
    api.func("ngx.req.get_body_file", READ, "get_body_file(): the body's file, or nil", |s| match &request()?.body {
        RequestBody::File { path, .. } => Ok(s.push_bytes(path.as_os_str().as_encoded_bytes())),
        _ => Ok(s.push_nil()),
    })?;
    api.func("ngx.req.set_body_data", REPLACE, "set_body_data(text): replaces the body", |s| {
        let data = Bytes::copy_from_slice(s.arg_bytes(1)?);
        let x = request()?;
        if let Some(why) = unreadable(x) {
            return Err(why.into());
        }
        replace_body(x, RequestBody::Memory(data.clone()), data.len() as u64);
        Ok(0)
    })?;
    api.func(
        "native.req.unreadable",
        BODY | Phases::SET,
        "unreadable(): why the body cannot be replaced, or nil",
        |s| {
            Ok(match unreadable(request()?) {
                Some(why) => s.push_bytes(why),
                None => s.push_nil(),
            })
        },
    )?;
    api.func(
        "native.req.replace_body",
        BODY | Phases::SET,
        "replace_body(text, size?): to a file when it is longer",
        replace_with,
    )?;
    api.func("ngx.req.set_body_file", REPLACE, "set_body_file(name, auto_clean?): replaces the body", |s| {
        let path: std::path::PathBuf = s.arg_str(1)?.into_owned().into();
        let x = request()?;
        if let Some(why) = unreadable(x) {
            return Err(why.into());
        }
        let length = std::fs::metadata(&path).map_err(|e| e.to_string())?.len();
        let path = if s.boolean(2) { Spooled::ours(path) } else { Spooled::theirs(path) };
        replace_body(x, RequestBody::File { path, length }, length);
        Ok(0)
    })
}

// SAFETY (all exports): Lua passes its own buffer for the answer.
crate::export! {
    fn method(out: *mut Text) -> c_int, 0 => {
        let Some(x) = fast::request() else { return 0 };
        unsafe { (*out).set(&x.request.method) };
        1
    }

    fn args(out: *mut Text) -> c_int, 0 => {
        let Some(x) = fast::request() else { return 0 };
        unsafe { (*out).set(&x.request.args) };
        1
    }
}

fn get_post_args(s: &Stack) -> Answer {
    let max = codec::limit(s, 1)?;
    match &request()?.body {
        RequestBody::Memory(data) => codec::push_args(s, data, max),
        RequestBody::File { .. } => s.fail("request body in temp file not supported"),
        RequestBody::Streaming { .. } => {
            Err("no request body found; maybe you should turn on lua_need_request_body?".into())
        }
        _ => Ok(s.push_table(0, 0)),
    }
}

fn set_uri(s: &Stack) -> std::result::Result<Wait, Raise> {
    let uri = s.arg_bytes(1)?;
    if uri.is_empty() {
        return Err("attempt to use zero-length uri".into());
    }
    for i in [2, 3] {
        if !s.is_nil(i) && s.kind(i) != mlua::ffi::LUA_TBOOLEAN {
            return Err(s.bad_argument(i, "boolean"));
        }
    }
    if !s.boolean(3)
        && let Some(at) = uri.iter().position(|b| is_unsafe(*b))
    {
        let shown: String =
            uri.iter().map(|b| if is_unsafe(*b) { format!("\\x{b:02X}") } else { char::from(*b).into() }).collect();
        let hint = "(maybe you want to set the 'binary' argument?)";
        return Err(format!("unsafe byte \"0x{:02x}\" in uri \"{shown}\" {hint}", uri[at]).into());
    }
    let x = request()?;
    if s.boolean(2) {
        super::location::again(x)?;
        x.log(Level::Debug, format!("lua set uri jump to \"{}\"", String::from_utf8_lossy(uri)).as_bytes());
    }
    x.request.path.clear();
    x.request.path.extend_from_slice(uri);
    x.request.uri_changed = true;
    Ok(match s.boolean(2) {
        true => Wait::Park(Op::Exit(0)),
        false => Wait::Ready(0),
    })
}

/// What would end a line, or is never part of one.
fn is_unsafe(b: u8) -> bool {
    (b < 0x20 && b != b'\t') || b == 0x7f
}

fn set_uri_args(s: &Stack) -> Answer {
    let mut out = Vec::new();
    if s.is_table(1) {
        codec::write_args(s, 1, &mut out)?;
    } else {
        let text = s.bytes(1).ok_or_else(|| {
            s.argument_error(1, &format!("string, number, or table expected, but got {}", s.kind_name(1)))
        })?;
        codec::escape_into(&mut out, text, |b| b > 0x20 && b != 0x7f);
    }
    let x = request()?;
    x.request.args = out;
    x.request.args_set = true;
    x.request.uri_changed = true;
    Ok(0)
}

fn raw_header(s: &Stack) -> Answer {
    let x = request()?;
    if x.request.version == Version::Http2 {
        return Err("http2 requests not supported yet".into());
    }
    let mut out = Vec::with_capacity(x.request.head_len as usize);
    x.request.append_head(!s.boolean(1), &mut out);
    Ok(s.push_bytes(out))
}

fn get_body_data(s: &Stack) -> Answer {
    let max = s.opt_number(1)?.map_or(usize::MAX, |n| n as usize);
    let x = request()?;
    match &x.body {
        RequestBody::Memory(data) if !data.is_empty() => Ok(s.push_bytes(&data[..data.len().min(max)])),
        _ => Ok(s.push_nil()),
    }
}

/// Why the body cannot be replaced.
fn unreadable(x: &Exchange) -> Option<&'static str> {
    let of_location = x.location.is_some();
    match x.body {
        RequestBody::Streaming { .. } => Some("request body not read yet"),
        // A subrequest has read what there is; plugins may make a body where none was.
        RequestBody::None if of_location && x.depth == 0 && !x.body_read => Some("request body not read yet"),
        RequestBody::Consumed | RequestBody::Lost | RequestBody::Forgone if of_location => {
            Some("request body already discarded")
        }
        _ => None,
    }
}

fn replace_with(s: &Stack) -> Answer {
    let data = s.arg_bytes(1)?;
    let x = request()?;
    let limit = s.opt_number(2)?.map_or_else(|| memory_limit(x.location.as_deref()), |n| n as usize);
    let length = data.len() as u64;
    if data.len() <= limit && limit > 0 {
        replace_body(x, RequestBody::Memory(Bytes::copy_from_slice(data)), length);
        return Ok(0);
    }
    let (path, mut file) = temp_file(x.location.as_deref()).map_err(|e| e.to_string())?;
    note_file(x, &path);
    let path = Spooled::ours(path);
    file.write_all(data).map_err(|e| e.to_string())?;
    replace_body(x, RequestBody::File { path, length }, length);
    Ok(0)
}

/// nginx's word on a body that goes to a file.
fn note_file(x: &Exchange, path: &std::path::Path) {
    if x.location.is_some() {
        let text = format!("a client request body is buffered to a temporary file {}", path.display());
        x.log(Level::Warn, text.as_bytes());
    }
}

/// Puts another body in the place of the client's.
fn replace_body(x: &mut Exchange, body: RequestBody, length: u64) {
    x.body = body;
    asked::forget(x);
    change_request(x, b"transfer-encoding", b"", 2);
    change_request(x, b"content-length", length.to_string().as_bytes(), 0);
}

/// What `read_body` has so far.
struct Reading {
    memory: Vec<u8>,
    file: Option<(std::path::PathBuf, std::fs::File)>,
    length: u64,
    /// What is read is for someone: else it is dropped.
    keep: bool,
    /// `client_body_timeout` of the location, since the last bytes.
    patience: Option<Pin<Box<Sleep>>>,
}

impl Reading {
    fn new(keep: bool) -> Self {
        Reading { memory: Vec::new(), file: None, length: 0, keep, patience: None }
    }

    /// There is more than may be kept.
    fn is_over(&self) -> bool {
        self.keep && self.length > SPOOL_MAX
    }

    /// Moves what is in memory to the file when it has grown too long.
    fn spill(&mut self, location: Option<&Location>) -> std::io::Result<()> {
        if self.file.is_none() {
            if self.memory.len() <= memory_limit(location) {
                return Ok(());
            }
            self.file = Some(temp_file(location)?);
        }
        if let Some((_, file)) = &mut self.file {
            file.write_all(&self.memory)?;
            self.memory.clear();
        }
        Ok(())
    }

    /// A script may have said that the body is shorter (`Content-Length`): what is beyond that is dropped.
    fn cut(&mut self, length: Option<u64>) -> std::io::Result<()> {
        let Some(length) = length.filter(|length| *length < self.length) else { return Ok(()) };
        self.length = length;
        match &self.file {
            Some((_, file)) => file.set_len(length),
            None => {
                self.memory.truncate(length as usize);
                Ok(())
            }
        }
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        if let Some((path, _)) = &self.file {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// How much of a body stays in memory: `client_body_buffer_size`, nothing with `client_body_in_file_only`.
fn memory_limit(location: Option<&Location>) -> usize {
    let Some(location) = location else { return MEMORY_BODY };
    match location.directives.client_body_in_file_only {
        true => 0,
        false => location.directives.client_body_buffer_size.map_or(MEMORY_BODY, |n| n as usize),
    }
}

fn temp_file(location: Option<&Location>) -> std::io::Result<(std::path::PathBuf, std::fs::File)> {
    let uid = crate::model::next_uid();
    let path = match location {
        None => std::env::temp_dir().join(format!("moongate-body-{}-{uid}", std::process::id())),
        Some(location) => {
            std::fs::create_dir_all(&location.body_dir)?;
            location.body_dir.join(format!("{}{uid:010}", std::process::id()))
        }
    };
    let file = std::fs::OpenOptions::new().write(true).create_new(true).open(&path)?;
    Ok((path, file))
}

fn read_body(mut reading: Reading) -> Result<Wait, Raise> {
    let x = request()?;
    x.body_read = true;
    if !matches!(x.body, RequestBody::Streaming { .. }) {
        return Ok(Wait::Ready(0));
    }
    Ok(Wait::Park(Op::Exchange(Box::new(move |cx, x| poll_body(cx, x, &mut reading)))))
}

/// As in nginx the script does not go on: its client has broken the bound of bodies.
fn refuse(x: &mut Exchange) -> Values {
    x.log(Level::Error, TOO_LARGE.as_bytes());
    x.response.status = 413;
    smallvec::smallvec![crate::lua::Value::Exit(413)]
}

/// nginx's word on a body that has not said its length.
const TOO_LARGE: &str = "client sent too large chunked body";

fn poll_body(cx: &mut Context<'_>, x: &mut Exchange, reading: &mut Reading) -> Poll<Values> {
    loop {
        let Some(client) = x.client.as_mut() else { return Poll::Ready(failed("no client")) };
        let read = client.poll_read_body(cx, &mut reading.memory, READ_CHUNK);
        if read.is_pending()
            && let Some(limit) = x.location.as_ref().and_then(|l| l.directives.client_body_timeout)
        {
            let patience = reading.patience.get_or_insert_with(|| Box::pin(sleep(limit)));
            if patience.as_mut().poll(cx).is_ready() {
                client.abort();
                x.log(Level::Info, b"client timed out");
                return Poll::Ready(failed("timeout"));
            }
        }
        let read = ready!(read);
        reading.patience = None;
        match read {
            Ok(0) => break,
            Ok(n) => reading.length += n as u64,
            Err(e) if e.kind() == Kind::TooLarge => return Poll::Ready(refuse(x)),
            Err(e) => return Poll::Ready(failed(e.to_string())),
        }
        if reading.is_over() {
            return Poll::Ready(refuse(x));
        }
        if !reading.keep {
            reading.memory.clear();
        } else if let Err(e) = reading.spill(x.location.as_deref()) {
            return Poll::Ready(failed(e.to_string()));
        }
    }
    let length = x.request.headers.get("content-length").and_then(parse_decimal);
    if reading.keep
        && let Err(e) = reading.cut(length)
    {
        return Poll::Ready(failed(e.to_string()));
    }
    x.body = match (reading.keep, reading.file.take()) {
        (false, _) => RequestBody::Consumed,
        (true, Some((path, _))) => {
            note_file(x, &path);
            RequestBody::File { path: Spooled::ours(path), length: reading.length }
        }
        (true, None) => RequestBody::Memory(Bytes::from(std::mem::take(&mut reading.memory))),
    };
    Poll::Ready(Values::new())
}

/// Reads the whole body, as `ngx.req.read_body` does.
pub async fn read_all(x: &mut Exchange) -> Result<()> {
    x.body_read = true;
    if !matches!(x.body, RequestBody::Streaming { .. }) {
        return Ok(());
    }
    read(x, Reading::new(true)).await
}

/// Reads what follows `begun`, which was taken from the client before.
pub async fn read_rest(x: &mut Exchange, begun: Vec<u8>) -> Result<()> {
    let mut reading = Reading::new(true);
    reading.length = begun.len() as u64;
    reading.memory = begun;
    read(x, reading).await
}

async fn read(x: &mut Exchange, mut reading: Reading) -> Result<()> {
    let values = std::future::poll_fn(|cx| poll_body(cx, x, &mut reading)).await;
    match values.last() {
        Some(crate::lua::Value::Bytes(text)) => {
            Err(Error::client(Kind::Io).context(String::from_utf8_lossy(text).into_owned()))
        }
        Some(crate::lua::Value::Exit(_)) => Err(Error::client(Kind::TooLarge).context(TOO_LARGE)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::{MEMORY_BODY, Reading, SPOOL_MAX};
    use crate::{
        exchange::{Exchange, RequestBody},
        lua::host::tests::serve,
    };

    fn prepare(x: &mut Exchange) {
        x.request.method = b"POST".to_vec();
        x.request.target = b"/a%20b?x=1&y".to_vec();
        x.request.path = b"/a b".to_vec();
        x.request.args = b"x=1&y".to_vec();
        x.body = RequestBody::Memory(Bytes::from_static(b"k=v&k=w"));
    }

    #[test]
    fn reads_the_request() {
        for (chunk, expected) in [
            ("return ngx.req.get_method() .. ngx.req.http_version()", "POST1.1"),
            ("local a = ngx.req.get_uri_args() return a.x .. tostring(a.y)", "1true"),
            ("return ngx.req.get_post_args().k[2]", "w"),
            ("return ngx.req.get_body_data() .. ngx.req.get_body_data(1)", "k=v&k=wk"),
            ("ngx.req.read_body() return tostring(ngx.req.get_body_file())", "nil"),
            ("return ngx.var.uri .. ngx.var.arg_x .. ngx.var.request_uri", "/a b1/a%20b?x=1&y"),
            ("return ngx.get_phase() .. ngx.var.remote_addr .. tostring(ngx.var.nothing)", "access127.0.0.1nil"),
            ("ngx.var.mine = 5 return ngx.var.mine", "5"),
            ("ngx.ctx.a = 1 return tostring(ngx.ctx.a)", "1"),
            ("return (ngx.req.raw_header():gsub('\\r\\n.*', ''))", "POST /a%20b?x=1&y HTTP/1.1"),
        ] {
            serve(prepare, chunk, expected);
        }
    }

    #[test]
    fn changes_the_request() {
        let x = serve(prepare, "ngx.req.set_method(ngx.HTTP_PUT) ngx.req.set_uri('/c d') return ngx.var.uri", "/c d");
        assert_eq!((x.request.method, x.request.path), (b"PUT".to_vec(), b"/c d".to_vec()));
        assert!(x.request.uri_changed);
        let x = serve(prepare, "ngx.req.set_uri_args({z = 'a b'}) return ngx.var.args", "z=a%20b");
        assert!(x.request.uri_changed);
        let x = serve(prepare, "ngx.req.set_body_data('hello') return ngx.req.get_body_data()", "hello");
        assert_eq!(x.request.headers.get("content-length"), Some(&b"5"[..]));
        let chunk = "ngx.req.init_body() ngx.req.append_body('a') ngx.req.append_body('b') ngx.req.finish_body()
                     return ngx.req.get_body_data()";
        serve(prepare, chunk, "ab");
    }

    #[test]
    fn a_body_that_is_too_long_for_memory_goes_to_a_file_which_ends_with_its_reader() {
        let mut reading = Reading::new(true);
        reading.memory.resize(MEMORY_BODY, b'x');
        reading.spill(None).expect("stays");
        assert!(reading.file.is_none() && reading.memory.len() == MEMORY_BODY);
        for more in [b"y", b"z"] {
            reading.memory.extend_from_slice(more);
            reading.spill(None).expect("is written");
            assert!(reading.memory.is_empty());
        }
        let path = reading.file.as_ref().expect("a file").0.clone();
        let written = std::fs::read(&path).expect("is there");
        assert!(written.len() == MEMORY_BODY + 2 && written.ends_with(b"xyz"));
        drop(reading);
        assert!(!path.exists());
    }

    #[test]
    fn what_is_kept_of_a_body_is_bounded_where_nothing_else_bounds_it() {
        let mut reading = Reading::new(true);
        for (length, over) in [(SPOOL_MAX, false), (SPOOL_MAX + 1, true)] {
            reading.length = length;
            assert_eq!(reading.is_over(), over);
        }
        reading.keep = false;
        assert!(!reading.is_over(), "what is dropped needs no room");
    }
}
