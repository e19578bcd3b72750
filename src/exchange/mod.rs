//! The request in flight: its head, body, variables and phase. What `ngx.*` reads and the proxy drives.
//!
//! An Exchange lives on one worker and comes from that worker's pool: `reset` empties it and keeps its memory.
//! It owns the client's side of the connection while the request runs, so nothing here is shared or locked.
//! It knows no Lua: a VM keeps the request's `ctx` table under `lua.slot`.

pub mod asked;
pub mod body;
pub mod deadline;
pub mod framing;
pub mod graphql;
pub mod handshake;
pub mod headers;
pub mod host;
mod last_host;
mod log;
pub mod openssl;
pub mod posted;
mod random;
pub mod secrets;
mod ssl;
pub mod status;
pub mod vars;
pub mod watch;

use std::{
    any::Any,
    cell::{Cell, OnceCell},
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use smallvec::SmallVec;

pub use body::{Chunk, RequestBody, Spooled};
pub use headers::Headers;
use headers::append_all;
pub use last_host::LastHost;
pub use vars::{Known, SERVER_NAME, Var, hostname};

use crate::{
    conf::locations::Location,
    error::Result,
    model::{self, Object},
    observe::functions::Record,
    router::Found,
    store::Snapshot,
};

/// Everything about one request.
pub struct Exchange {
    /// `$connection`-independent serial of the request in this worker.
    pub serial: u64,
    /// `$request_id` before it is written in hex.
    pub id: [u8; 16],
    pub conn: Rc<Connection>,
    /// The client's side. `None` only while no request runs, and in requests made for tests.
    pub client: Option<Box<dyn Client>>,
    pub started: Instant,
    pub phase: Phase,

    pub request: Request,
    pub body: RequestBody,
    pub response: Response,
    /// What Lua has printed and nobody has sent yet (`ngx.print`, `return code, body`).
    pub printed: Vec<u8>,
    /// The response body's chunk that a body filter works on (`ngx.arg[1]`, `ngx.arg[2]`).
    pub chunk: Chunk,

    /// The configuration that this request keeps to its end.
    pub snapshot: Arc<Snapshot>,
    pub matched: Option<Matched>,
    /// Set by an auth plugin through `lua`: `(consumer, credential)`.
    pub consumer: Option<Arc<Object<model::Consumer>>>,
    pub credential: Option<Arc<Object<model::Credential>>>,
    pub upstream: UpstreamState,

    /// Variables that were set by name and belong to no module: `set $x`, `ctx.var.x = …`. Few, so a list.
    pub custom_vars: Vec<(Box<str>, Vec<u8>)>,
    /// What a GraphQL request is, once somebody has asked; empty where it is none.
    pub graphql: Option<Box<graphql::Operation>>,
    /// What the body says by name, once a route has asked.
    pub posted: Option<Box<posted::Posted>>,
    /// A script has asked for the whole body, or to do without it.
    pub body_read: bool,
    /// A script has taken `Content-Type` away: the default does not take its place.
    pub untyped: bool,
    /// The location that serves the request, instead of a route.
    pub location: Option<Arc<Location>>,
    /// Where a script sent the request, until the proxy goes there.
    pub jump: Option<Jump>,
    /// An error page serves the request: the status that it is answered with, 0 for its own.
    pub error_status: Option<u16>,
    /// Compresses the response.
    pub encoder: Option<Box<flate2::write::GzEncoder<Vec<u8>>>>,
    /// The status with which a location's header filter ended the response.
    pub filter_exit: Option<u16>,
    /// How often it was sent on, and whether by `ngx.exec` or as a subrequest: `ngx.req.is_internal`.
    pub jumps: u32,
    pub internal: bool,
    /// How many requests it is a subrequest within.
    pub depth: u32,
    /// Nobody wants more of the answer than its head.
    pub header_only: bool,
    pub lua: LuaState,
    /// What is noted of a request that is traced or debugged.
    pub watch: Option<Box<watch::Watch>>,
    /// Bytes sent to the client, head included (`$bytes_sent`), and of the body (`$body_bytes_sent`).
    pub bytes_sent: u64,
    pub body_bytes_sent: u64,
}

/// Where the request stands. The plugin phases of plugin-develop.md, plus the gateway's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Phase {
    Init = 0,
    Ssl,
    Rewrite,
    Access,
    BeforeProxy,
    Balancer,
    /// A function or `ngx.say` answers.
    Content,
    HeaderFilter,
    BodyFilter,
    DelayedBodyFilter,
    Log,
    Timer,
    /// The phases that only locations have: `set_by_lua`, `server_rewrite_by_lua`, `rewrite_by_lua`, `precontent_by_lua`.
    Set,
    ServerRewrite,
    RewriteByLua,
    Precontent,
    /// The phases of a handshake beside `Ssl`, which is `ssl_certificate_by_lua`.
    SslClientHello,
    SslSessionFetch,
    SslSessionStore,
    /// `init_by_lua`; `Init` is `init_worker_by_lua` and plugins' `init`.
    InitByLua,
    /// `exit_worker_by_lua`, and plugins' `destroy`.
    ExitWorker,
}

/// A change of location: `ngx.exec`, `ngx.req.set_uri(uri, true)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Jump {
    /// To a path: an internal redirect. `None`: without arguments.
    Exec { path: Vec<u8>, args: Option<Vec<u8>> },
    /// To `@name`.
    Named(Box<str>),
    /// The path was changed already: look for its location.
    Again,
}

/// What stays the same for all requests of a client's connection.
pub struct Connection {
    /// Unique in the process: `$connection`.
    pub serial: u64,
    /// The socket's other end, whatever a PROXY protocol header says.
    pub peer: SocketAddr,
    pub local: SocketAddr,
    pub tls: Option<TlsInfo>,
    /// What a PROXY protocol header says, for those who believe it: the client, and the address that it connected to.
    pub proxy: Option<(SocketAddr, SocketAddr)>,
    /// What else a PROXY protocol header of version 2 carried: type, length and value each.
    pub proxy_tlvs: Box<[u8]>,
    /// When it was accepted.
    pub since: Instant,
    pub last_host: LastHost,
    /// The `ngx.ctx` that the handshake's scripts have left, which each request begins with: the VM's own, opaque here.
    pub ctx: Option<Rc<dyn Any>>,
    /// The peer's address in words: each request writes it twice or more.
    peer_text: OnceCell<SmallVec<[u8; 40]>>,
}

impl Connection {
    /// Without TLS and PROXY protocol.
    pub fn new(serial: u64, peer: SocketAddr, local: SocketAddr) -> Self {
        Connection {
            serial,
            peer,
            local,
            tls: None,
            proxy: None,
            proxy_tlvs: Box::default(),
            since: Instant::now(),
            last_host: LastHost::default(),
            ctx: None,
            peer_text: OnceCell::new(),
        }
    }

    /// The peer's address without its port.
    pub fn peer_text(&self) -> &[u8] {
        self.peer_text.get_or_init(|| {
            let mut text = Vec::new();
            vars::ip(self.peer.ip(), &mut text);
            text.into()
        })
    }
}

#[derive(Debug)]
pub struct TlsInfo {
    pub sni: Option<Box<str>>,
    /// `TLSv1.3`
    pub protocol: &'static str,
    /// `TLS_AES_256_GCM_SHA384`
    pub cipher: Box<str>,
    pub session_reused: bool,
    /// DER of the client's certificate.
    pub client_cert: Option<Box<[u8]>>,
    /// `NONE`, `SUCCESS` or `FAILED:reason`: `$ssl_client_verify`.
    pub client_verify: Box<str>,
    /// The object whose certificate was served: what it asks of clients.
    pub ssl: Option<Arc<Object<model::Ssl>>>,
    pub hello: Option<ClientHello>,
    /// The agreed protocol of ALPN: `h2`.
    pub alpn: Option<Box<[u8]>>,
    /// The number of the group that the keys were exchanged in.
    pub curve: Option<u16>,
    /// What the client calls the session of TLS 1.2 that it has resumed: `$ssl_session_id`.
    pub session_id: Option<Box<[u8]>>,
}

/// What is kept of a client's first message.
#[derive(Debug, PartialEq, Eq)]
pub struct ClientHello {
    pub random: [u8; 32],
    /// What it calls the session that it would resume; up to 32 bytes.
    pub session_id: Box<[u8]>,
    /// Cipher suites and groups by their numbers, in the client's order.
    pub ciphers: Box<[u16]>,
    pub curves: Box<[u16]>,
}

/// The request's head. Vectors instead of strings: the network does not promise UTF-8.
#[derive(Debug, Default)]
pub struct Request {
    pub method: Vec<u8>,
    /// The client has asked with HEAD: the response has no body, whatever becomes of the method.
    pub is_head: bool,
    pub version: Version,
    /// The request-target without scheme and authority: `$request_uri`.
    pub target: Vec<u8>,
    /// The first line as it came, once the fields do not say it any more: `set_method`, an absolute target. Empty: they do.
    pub line: Vec<u8>,
    /// The path: decoded, dots and slashes merged: `$uri`.
    pub path: Vec<u8>,
    /// The query, undecoded, without `?`: `$args`.
    pub args: Vec<u8>,
    /// A script has set `args`: an empty one is `""` then, and not nothing.
    pub args_set: bool,
    /// Lower case, without port: `$host`.
    pub host: Vec<u8>,
    pub headers: Headers,
    /// In a subrequest: the head of the request that all of it is for.
    pub main: Option<Rc<MainHead>>,
    /// `path` or `args` were changed: what goes upstream is built from them instead of `target`.
    pub uri_changed: bool,
    /// Bytes of the head as received (`$request_length` counts them and the body).
    pub head_len: u64,
    /// Requests on this connection so far, this one included.
    pub nth: u64,
    /// An address that replaced the peer's (real-ip).
    pub real_ip: Option<SocketAddr>,
    pub keep_alive: bool,
    /// `Expect: 100-continue` that nobody has answered yet.
    pub expects_continue: bool,
    /// The protocol that an `Upgrade` asks for.
    pub upgrade: bool,
}

/// What a subrequest's variables say of the client's own request.
#[derive(Debug, Default)]
pub struct MainHead {
    pub method: Vec<u8>,
    pub headers: Headers,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    Http10,
    #[default]
    Http11,
    Http2,
}

/// The response's head as the filters see it.
#[derive(Debug, Default)]
pub struct Response {
    /// 0 until something decides it.
    pub status: u16,
    /// The upstream's or `ngx.status_line`'s text; empty: the standard one.
    pub reason: Vec<u8>,
    /// Without hop-by-hop fields. `Content-Length` stands here as a field: filters may remove it.
    pub headers: Headers,
    /// Fields that plugins set before the upstream was asked: they go out beside its own.
    pub early: Headers,
    pub source: Source,
    /// The head is on its way: `ngx.headers_sent`.
    pub head_sent: bool,
    /// Something was printed where nothing could be sent: the head is settled as it is, and goes out when it can.
    pub settled: bool,
    /// It goes out whole even to a client that has it (`ngx.resp.bypass_if_checks`).
    pub bypasses_if: bool,
    /// The body's last byte was handed to the client.
    pub ended: bool,
}

/// Who made the response (`core.response.get_response_source`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Source {
    /// moongate or a plugin in it.
    #[default]
    Gateway,
    Upstream,
}

/// What the router found.
#[derive(Clone, Debug)]
pub struct Matched {
    /// The route, the host and path patterns that matched, and the captures.
    pub found: Found,
    pub service: Option<Arc<Object<model::Service>>>,
}

impl Matched {
    pub fn route(&self) -> &Arc<Object<model::Route>> {
        self.found.route()
    }
}

/// How the upstream is to be spoken to, and what came of it.
#[derive(Default)]
pub struct UpstreamState {
    /// Chosen by a plugin (traffic-split, `upstream.set`): wins over the route's.
    pub chosen: Option<Arc<model::Upstream>>,
    /// What the request is sent to: resolved by the proxy before `before_proxy`.
    pub conf: Option<Arc<model::Upstream>>,
    /// `$upstream_uri`; empty: the client's target as it came.
    pub uri: Vec<u8>,
    /// `$upstream_host`: empty until `pass_host` or a plugin decides.
    pub host: Vec<u8>,
    /// `$upstream_scheme`: empty: the upstream's.
    pub scheme: Vec<u8>,
    /// A plugin's own method for the upstream (proxy-rewrite's `method`).
    pub method: Vec<u8>,
    /// Node picked by Lua (`balancer.set_current_peer`): wins over the balancer, for one try.
    pub peer: Option<(Box<str>, u16)>,
    /// Tries beside the first, in place of the upstream's `retries` (`balancer.set_more_tries`).
    pub more_tries: Option<u32>,
    /// connect, send and read, where a script has set them (`balancer.set_timeouts`).
    pub timeouts: [Option<Duration>; 3],
    /// How long the connection may be idle and how many requests it may serve (`balancer.enable_keepalive`).
    pub keepalive: Option<(Duration, u64)>,
    /// What else `ngx.balancer` asks for or asks about. In a box of its own: ordinary requests have none.
    pub balancing: Option<Box<Balancing>>,
    pub tries: SmallVec<[Try; 1]>,
    /// Response bytes may be withheld in the gateway (`proxy_buffering`); off: each read is sent at once.
    pub buffering: bool,
    /// The next try is the first of another group of servers.
    pub another_group: bool,
    /// Fields as the upstream sent them (`$upstream_http_*`), kept only when something asks: see `vars`.
    pub headers: Headers,
}

/// The tries of a request as its `balancer_by_lua` sees them, and what a script says of the one that comes.
#[derive(Debug, Default)]
pub struct Balancing {
    /// The upstream that a location's `proxy_pass` names: `ngx.upstream`'s `current_upstream_name`.
    pub name: Box<str>,
    /// How the try before this one ended; `None` before the first.
    pub last_failure: Option<Failure>,
    /// Tries that may follow the one that comes, whatever a script asks for. `None`: as many as are ever allowed.
    pub most: Option<u32>,
    /// The name for TLS with the peer that the script has set: `set_current_peer`'s third argument.
    pub tls_name: Option<Box<str>>,
    /// Where connections come from (`bind_to_local_addr`); port 0: any.
    pub local: Option<SocketAddr>,
}

/// How a try ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The server is well, but the answer is not wanted (403, 404): `next`; else `failed`.
    pub is_next: bool,
    pub status: u16,
}

/// One attempt at a node: an element of `$upstream_addr`, `$upstream_status` and their like.
#[derive(Clone, Debug)]
pub struct Try {
    pub addr: SocketAddr,
    /// Index into the upstream's nodes.
    pub node: usize,
    /// The first of another group of servers than that of the try before it.
    pub another_group: bool,
    /// 0 until a status line came; 502 or 504 for one that failed, as in nginx.
    pub status: u16,
    pub connect_time: Option<Duration>,
    pub header_time: Option<Duration>,
    pub response_time: Option<Duration>,
    pub bytes_sent: u64,
    pub bytes_received: u64,
    /// Bytes of the response's body that have come so far: `$upstream_response_length`.
    pub response_length: u64,
    pub reused: bool,
}

/// What the VM of this worker keeps for the request.
#[derive(Default)]
pub struct LuaState {
    /// Index of the `ctx` table; `None` until a phase enters Lua.
    pub slot: Option<u32>,
    /// The VM generation and the plan that the request runs on: owned by `plugin::run`, opaque here.
    pub run: Option<Rc<dyn Any>>,
    /// The handshake whose scripts run, instead of a request.
    pub handshake: Option<Box<handshake::Handshake>>,
    /// The phases that the plan has something for, as `plugin::PhaseMask` counts them.
    pub phases: u32,
    /// Who serves the request, for scripts of locations.
    pub host: Option<Rc<dyn host::Host>>,
    /// What `ngx.arg` holds in `set_by_lua`.
    pub set_args: Vec<Vec<u8>>,
    /// Subrequests under way, once there was one.
    pub subrequests: Option<Rc<Cell<usize>>>,
    /// `ngx.on_abort`'s callback: the VM's own, opaque here.
    pub on_abort: Option<Rc<dyn Any>>,
    /// What `ngx.ctx` is to be in a subrequest: the VM's own, opaque here.
    pub ctx: Option<Rc<dyn Any>>,
    /// The plan holds the prometheus plugin: the request is counted, by names where they are preferred.
    pub counted: Option<bool>,
    /// The plugins of the request could not be prepared: it must not go on without them.
    pub unprepared: bool,
    /// The uploaded function that runs, while it does.
    pub function: Option<Rc<FunctionCall>>,
}

/// A call of an uploaded function: where its lines go, and its bounds.
pub struct FunctionCall {
    pub record: Arc<Record>,
    /// CPU time between two waits; `None`: as every script.
    pub cpu_ms: Option<u64>,
    /// By how much it may make its VM grow.
    pub memory_kb: usize,
    /// What the VM held when it began.
    pub held_kb: Cell<usize>,
    /// What is left of `memory_kb`.
    pub left_kb: Cell<usize>,
}

impl FunctionCall {
    pub fn new(record: Arc<Record>, limits: &model::FunctionLimits) -> FunctionCall {
        let memory_kb = limits.memory_mb.saturating_mul(1024);
        let (held_kb, left_kb) = (Cell::new(0), Cell::new(memory_kb));
        FunctionCall { record, cpu_ms: limits.cpu_ms, memory_kb, held_kb, left_kb }
    }

    /// What goes on behind a call: only its lines are of interest.
    pub fn unbounded(record: Arc<Record>) -> FunctionCall {
        let memory_kb = usize::MAX / 4;
        FunctionCall { record, cpu_ms: None, memory_kb, held_kb: Cell::new(0), left_kb: Cell::new(memory_kb) }
    }
}

impl LuaState {
    /// Whether subrequests are under way.
    pub fn has_subrequests(&self) -> bool {
        self.subrequests.as_ref().is_some_and(|count| count.get() > 0)
    }
}

/// The client's side of one request: where the body comes from and the response goes. HTTP/1 and HTTP/2
/// implement it; the proxy and Lua drive it.
///
/// All waits are poll functions, so that one task can watch both directions.
pub trait Client {
    /// The next piece of the request body; `Ready(Ok(0))` is its end. Appends to `into`, at most `max` bytes.
    /// Sends `100 Continue` first when the client waits for it.
    fn poll_read_body(&mut self, cx: &mut Context<'_>, into: &mut Vec<u8>, max: usize) -> Poll<Result<usize>>;

    /// Bounds the body anew, in bytes; 0: no bound (`client_max_body_size` of a location). One that says its length is the
    /// caller's to refuse.
    fn limit_body(&mut self, _max: u64) {}

    /// From now on the body leaves at `rate` bytes per second, after `free` bytes more; 0: as fast as it can (`$limit_rate`).
    fn limit_rate(&mut self, _rate: u64, _free: u64) {}

    /// Queues the head. Adds the framing that the protocol and `length` need, `Date`, and `Connection`.
    fn start(&mut self, request: &Request, response: &Response, length: BodyLength) -> Result<()>;

    /// Queues an interim `1xx` head.
    fn interim(&mut self, status: u16, headers: &Headers) -> Result<()>;

    /// Takes some of `data`, at once when it fits the buffer. How many bytes of it were taken.
    fn poll_write(&mut self, cx: &mut Context<'_>, data: &[u8]) -> Poll<Result<usize>>;

    /// Everything queued has been given to the kernel.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>>;

    /// Queues fields to be sent behind the body, where the protocol has a place for them that clients look at (HTTP/2).
    fn trailers(&mut self, _fields: &Headers) {}

    /// Ends the body (the last chunk, END_STREAM) and flushes.
    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>>;

    /// Ready when the client has gone away. Never consumes bytes of a next request.
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()>;

    /// Cuts the connection (HTTP/1) or resets the stream: what a truncated response needs.
    fn abort(&mut self);

    /// Bytes given to the kernel for this response, heads and framing included (`$bytes_sent`).
    fn bytes_sent(&self) -> u64 {
        0
    }

    /// Bytes of the request body as received, framing included (`$request_length` adds the head's).
    fn body_received(&self) -> u64 {
        0
    }

    /// What the kernel knows of the connection; `None`: it is gone, or there is none.
    fn tcp_info(&self) -> Option<TcpInfo> {
        None
    }

    /// Fills `out` with what only the two ends of the TLS connection can derive (RFC 5705). `None`: there is no TLS; an error is
    /// for the script.
    fn export_keying_material(
        &self,
        _out: &mut [u8],
        _label: &[u8],
        _context: Option<&[u8]>,
    ) -> Option<std::result::Result<(), String>> {
        None
    }

    /// Takes the connection for a tunnel (WebSocket) after a 101.
    fn as_any(&mut self) -> &mut dyn Any;
}

/// `$tcpinfo_*`: times in microseconds, the window in segments, the space in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpInfo {
    pub rtt: u32,
    pub rttvar: u32,
    pub snd_cwnd: u32,
    pub rcv_space: u32,
}

/// How long the response body is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyLength {
    /// HEAD, 204, 304: the head may claim a length, no byte follows.
    None,
    Known(u64),
    Unknown,
}

/// A pooled exchange keeps its buffers up to this size: enough for nearly all heads, and a thousand idle
/// exchanges cannot hold a gigabyte after a burst of large bodies.
const KEPT_BYTES: usize = 16 * 1024;

fn reuse(buffer: &mut Vec<u8>) {
    buffer.clear();
    if buffer.capacity() > KEPT_BYTES {
        buffer.shrink_to(KEPT_BYTES);
    }
}

impl Request {
    /// Keeps the first line as it came: before a part of it changes.
    pub fn keep_line(&mut self) {
        if self.line.is_empty() {
            let mut line = std::mem::take(&mut self.line);
            self.append_line(&mut line);
            self.line = line;
        }
    }

    /// Changes the method, and not what the client is said to have asked for.
    pub fn set_method(&mut self, name: &[u8]) {
        self.keep_line();
        self.method.clear();
        self.method.extend_from_slice(name);
    }

    /// Appends `GET /path HTTP/1.1`, as it came.
    pub fn append_line(&self, out: &mut Vec<u8>) {
        match () {
            () if !self.line.is_empty() => out.extend_from_slice(&self.line),
            // A line that was none stands in the target.
            () if self.method.is_empty() => out.extend_from_slice(&self.target),
            () => append_all(out, [&self.method, b" ", &self.target, b" ", vars::version(self.version)]),
        }
    }

    /// The client's method, also in a subrequest with one of its own.
    pub fn main_method(&self) -> &[u8] {
        self.main.as_ref().map_or(&self.method, |main| &main.method)
    }

    /// Appends the client's head, also in a subrequest: the first line, if it is asked for, and the fields.
    pub fn append_head(&self, with_line: bool, out: &mut Vec<u8>) {
        if with_line {
            self.append_line(out);
            out.extend_from_slice(b"\r\n");
        }
        self.main.as_ref().map_or(&self.headers, |main| &main.headers).write_to(out, |_, _| true);
        out.extend_from_slice(b"\r\n");
    }

    fn reset(&mut self) {
        for buffer in
            [&mut self.method, &mut self.target, &mut self.line, &mut self.path, &mut self.args, &mut self.host]
        {
            reuse(buffer);
        }
        self.args_set = false;
        self.is_head = false;
        self.main = None;
        self.version = Version::default();
        self.headers.clear();
        self.uri_changed = false;
        self.head_len = 0;
        self.nth = 0;
        self.real_ip = None;
        self.keep_alive = false;
        self.expects_continue = false;
        self.upgrade = false;
    }
}

impl Response {
    fn reset(&mut self) {
        self.status = 0;
        self.reason.clear();
        self.headers.clear();
        self.early.clear();
        self.source = Source::Gateway;
        self.head_sent = false;
        self.settled = false;
        self.bypasses_if = false;
        self.ended = false;
    }
}

impl UpstreamState {
    fn reset(&mut self) {
        self.chosen = None;
        self.conf = None;
        for buffer in [&mut self.uri, &mut self.host, &mut self.scheme, &mut self.method] {
            buffer.clear();
        }
        self.peer = None;
        self.more_tries = None;
        self.timeouts = [None; 3];
        self.keepalive = None;
        self.balancing = None;
        self.tries.clear();
        self.another_group = false;
        self.buffering = true;
        self.headers.clear();
    }
}

impl Exchange {
    /// Who made the response, in APISIX's terms.
    pub fn source_name(&self) -> &'static str {
        match self.response.source {
            Source::Upstream => "upstream",
            // A try that failed was answered by the proxy itself.
            Source::Gateway if !self.upstream.tries.is_empty() => "nginx",
            Source::Gateway => "apisix",
        }
    }

    /// An empty exchange; `begin` makes it a request's.
    pub fn new(conn: Rc<Connection>, snapshot: Arc<Snapshot>) -> Self {
        Exchange {
            serial: 0,
            id: [0; 16],
            conn,
            client: None,
            started: Instant::now(),
            phase: Phase::Init,
            request: Request::default(),
            body: RequestBody::None,
            response: Response::default(),
            printed: Vec::new(),
            chunk: Chunk::default(),
            snapshot,
            matched: None,
            consumer: None,
            credential: None,
            upstream: UpstreamState::default(),
            custom_vars: Vec::new(),
            graphql: None,
            posted: None,
            body_read: false,
            untyped: false,
            location: None,
            jump: None,
            error_status: None,
            encoder: None,
            filter_exit: None,
            jumps: 0,
            internal: false,
            depth: 0,
            header_only: false,
            lua: LuaState::default(),
            watch: None,
            bytes_sent: 0,
            body_bytes_sent: 0,
        }
    }

    /// Stamps an empty exchange with what every request gets: its times, serial and id.
    pub fn begin(&mut self) {
        self.started = Instant::now();
        (self.serial, self.id) = random::request_id();
        self.phase = Phase::Init;
    }

    /// Forgets the request and keeps the memory, up to `KEPT_BYTES` per buffer. `conn` and `snapshot` stay as they
    /// are: the pool's owner replaces them when they are no longer the ones to use.
    pub fn reset(&mut self) {
        self.client = None;
        self.phase = Phase::Init;
        self.request.reset();
        self.body = RequestBody::None;
        self.response.reset();
        reuse(&mut self.printed);
        reuse(&mut self.chunk.data);
        self.chunk.eof = false;
        self.matched = None;
        self.consumer = None;
        self.credential = None;
        self.upstream.reset();
        self.custom_vars.clear();
        self.graphql = None;
        self.posted = None;
        self.body_read = false;
        self.untyped = false;
        self.location = None;
        self.jump = None;
        self.error_status = None;
        self.encoder = None;
        self.filter_exit = None;
        self.jumps = 0;
        self.internal = false;
        self.depth = 0;
        self.header_only = false;
        self.lua = LuaState::default();
        self.watch = None;
        self.bytes_sent = 0;
        self.body_bytes_sent = 0;
    }

    /// Decides the status, also that of an error page.
    pub fn set_status(&mut self, status: u16) {
        self.response.status = status;
        self.error_status = self.error_status.map(|_| 0);
    }

    /// The address that the request is taken to come from: `$remote_addr`.
    pub fn remote(&self) -> SocketAddr {
        self.request.real_ip.unwrap_or(self.conn.peer)
    }

    /// The try that is under way or was the last.
    pub fn last_try(&mut self) -> Option<&mut Try> {
        self.upstream.tries.last_mut()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pooled_exchange_forgets_and_keeps_little_memory() {
        let addr = SocketAddr::from(([127, 0, 0, 1], 1));
        let mut x = Exchange::new(Rc::new(Connection::new(1, addr, addr)), Arc::default());
        for buffer in
            [&mut x.printed, &mut x.chunk.data, &mut x.request.target, &mut x.request.line, &mut x.request.args]
        {
            buffer.resize(KEPT_BYTES * 10, b'x');
        }
        x.request.headers.append("A", "b".repeat(KEPT_BYTES * 10));
        x.custom_vars.push(("a".into(), b"b".to_vec()));
        x.lua.phases = 1;
        x.reset();
        assert!(
            x.printed.is_empty()
                && x.request.target.is_empty()
                && x.request.line.is_empty()
                && x.request.headers.is_empty()
        );
        assert!(x.custom_vars.is_empty() && x.lua.phases == 0);
        for buffer in [&x.printed, &x.chunk.data, &x.request.target, &x.request.line, &x.request.args] {
            assert!(buffer.capacity() <= KEPT_BYTES * 2, "{}", buffer.capacity());
        }
    }
}
