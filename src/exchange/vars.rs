//! nginx's and APISIX's variables by name.
//!
//! A name is parsed once, where it is written (access log format, chash key, a Lua call site); reading a parsed variable
//! allocates nothing: the value lies in the exchange, or is written into the caller's scratch buffer. `None` is
//! nginx's "not found": `-` in a log, `nil` in Lua.

mod find;
mod text;

use std::{
    borrow::Cow,
    net::IpAddr,
    sync::OnceLock,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use hashbrown::HashMap;

pub use find::{arg, cookie};
use find::{field, proxy_protocol_tlv, remote_user, set_cookie};
pub use text::{address, hex, hostname, ip, number};
use text::{date, seconds, with_clock};

use super::{Exchange, Headers, RequestBody, TcpInfo, Try, Version, graphql, headers::append_all};
use crate::{
    conf::{
        directives::size,
        locations::{Piece, Template},
    },
    model::upstream::Scheme,
};

/// What `$nginx_version` says: the version whose contract is kept, since scripts compare it.
const NGINX_VERSION: &str = "1.27.1";

/// Variables of a request that scripts may make: a bound against a script that makes one per loop.
pub const MAX_CUSTOM: usize = 256;

/// `$server_name`, as of APISIX's server, which takes every request; and `$host` of one that names none.
pub const SERVER_NAME: &[u8] = b"_";

/// A variable, parsed once where it is written (access log format, `vars`, chash key, Lua).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Var {
    Known(Known),
    /// `http_x_y`: a request field, in lower case and with underscores.
    Http(Box<str>),
    SentHttp(Box<str>),
    UpstreamHttp(Box<str>),
    Arg(Box<str>),
    Cookie(Box<str>),
    /// `upstream_cookie_x`: of the upstream's `Set-Cookie`.
    UpstreamCookie(Box<str>),
    /// `proxy_protocol_tlv_x`
    ProxyProtocolTlv(Box<str>),
    /// `sent_trailer_x`, `upstream_trailer_x`: no trailer is passed on, so that none has a value.
    Trailer,
    /// `uri_param_x`: a `:x` of the route's uri.
    UriParam(Box<str>),
    /// `post_arg_x`: of a form body that was read for it.
    PostArg(Box<str>),
    /// `post_arg.x`: of a form, JSON or multipart body that was read for it.
    PostPath(Box<str>),
    Custom(Box<str>),
}

/// Why a variable was not set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// One of the server's own.
    NotChangeable,
    /// One of the handshake's.
    NotAssignable,
    /// It belongs to a family (`http_x`), or nothing has it.
    NotFound,
}

macro_rules! known {
    ($($variant:ident $name:literal,)*) => {
        /// The variables of a fixed name.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Known { $($variant,)* }

        const NAMES: &[(&str, Known)] = &[$(($name, Known::$variant),)*];
    };
}

known! {
    Args "args", QueryString "query_string", IsArgs "is_args", Uri "uri", DocumentUri "document_uri",
    RequestUri "request_uri", Request "request", RequestMethod "request_method", RequestTime "request_time",
    RequestLength "request_length", RequestBody "request_body", RequestBodyFile "request_body_file",
    RequestCompletion "request_completion", RequestId "request_id", ApisixRequestId "apisix_request_id",
    Host "host", ServerName "server_name", ServerAddr "server_addr", ServerPort "server_port",
    ServerProtocol "server_protocol", Scheme "scheme", Https "https",
    RemoteAddr "remote_addr", RemotePort "remote_port", RemoteUser "remote_user",
    BinaryRemoteAddr "binary_remote_addr", RealipRemoteAddr "realip_remote_addr",
    RealipRemotePort "realip_remote_port", ProxyProtocolAddr "proxy_protocol_addr",
    ProxyProtocolPort "proxy_protocol_port", ProxyProtocolServerAddr "proxy_protocol_server_addr",
    ProxyProtocolServerPort "proxy_protocol_server_port", ProxyAddXForwardedFor "proxy_add_x_forwarded_for",
    ContentLength "content_length", ContentType "content_type",
    Status "status", BytesSent "bytes_sent", BodyBytesSent "body_bytes_sent",
    Connection "connection", ConnectionRequests "connection_requests", ConnectionTime "connection_time", Pipe "pipe",
    TcpinfoRtt "tcpinfo_rtt", TcpinfoRttvar "tcpinfo_rttvar", TcpinfoSndCwnd "tcpinfo_snd_cwnd",
    TcpinfoRcvSpace "tcpinfo_rcv_space", Http2 "http2", Http3 "http3", LimitRate "limit_rate",
    Hostname "hostname", Pid "pid", NginxVersion "nginx_version",
    Msec "msec", TimeLocal "time_local", TimeIso8601 "time_iso8601", DateLocal "date_local", DateGmt "date_gmt",
    SslProtocol "ssl_protocol", SslCipher "ssl_cipher", SslServerName "ssl_server_name",
    SslSessionReused "ssl_session_reused", SslSessionId "ssl_session_id", SslEarlyData "ssl_early_data",
    SslAlpnProtocol "ssl_alpn_protocol", SslCiphers "ssl_ciphers", SslCurve "ssl_curve", SslCurves "ssl_curves",
    SslClientVerify "ssl_client_verify", SslClientRawCert "ssl_client_raw_cert", SslClientCert "ssl_client_cert",
    SslClientEscapedCert "ssl_client_escaped_cert", SslClientFingerprint "ssl_client_fingerprint",
    SslClientSerial "ssl_client_serial", SslClientSDn "ssl_client_s_dn", SslClientIDn "ssl_client_i_dn",
    SslClientSDnLegacy "ssl_client_s_dn_legacy", SslClientIDnLegacy "ssl_client_i_dn_legacy",
    SslClientVStart "ssl_client_v_start", SslClientVEnd "ssl_client_v_end", SslClientVRemain "ssl_client_v_remain",
    UpstreamAddr "upstream_addr", UpstreamStatus "upstream_status",
    UpstreamResponseTime "upstream_response_time", ApisixUpstreamResponseTime "apisix_upstream_response_time",
    UpstreamConnectTime "upstream_connect_time", UpstreamHeaderTime "upstream_header_time",
    UpstreamBytesSent "upstream_bytes_sent", UpstreamBytesReceived "upstream_bytes_received",
    UpstreamResponseLength "upstream_response_length", UpstreamCacheStatus "upstream_cache_status",
    UpstreamUri "upstream_uri", UpstreamHost "upstream_host", UpstreamScheme "upstream_scheme",
    UpstreamUnresolvedHost "upstream_unresolved_host", ProxyHost "proxy_host", ProxyPort "proxy_port",
    BalancerIp "balancer_ip", BalancerPort "balancer_port",
    ConsumerName "consumer_name", ConsumerGroupId "consumer_group_id",
    RouteId "route_id", RouteName "route_name", ServiceId "service_id", ServiceName "service_name",
    VarXForwardedProto "var_x_forwarded_proto", VarXForwardedHost "var_x_forwarded_host",
    VarXForwardedPort "var_x_forwarded_port",
    DocumentRoot "document_root", RealpathRoot "realpath_root", RequestFilename "request_filename",
    EchoRequestMethod "echo_request_method", EchoClientRequestMethod "echo_client_request_method",
    EchoRequestUri "echo_request_uri", EchoRequestBody "echo_request_body",
    EchoClientRequestHeaders "echo_client_request_headers",
    GraphqlOperation "graphql_operation", GraphqlName "graphql_name", GraphqlRootFields "graphql_root_fields",
}

/// What APISIX's nginx.conf sets before a request starts. Everything else is absent until it is set.
const DEFAULTS: &[(&str, &str)] = &[
    ("request_type", "traditional_http"),
    ("upstream_cache_zone", "off"),
    ("llm_time_to_first_token", "0"),
    ("llm_prompt_tokens", "0"),
    ("llm_completion_tokens", "0"),
    ("llm_total_tokens", "0"),
    ("llm_stream", "false"),
    ("llm_has_tool_calls", "false"),
    ("llm_tool_count", "0"),
    ("llm_cache_read_input_tokens", "0"),
    ("llm_cache_creation_input_tokens", "0"),
    ("llm_reasoning_tokens", "0"),
    ("request_llm_model", ""),
    ("llm_model", ""),
    ("llm_end_user_id", ""),
    ("llm_content_risk_level", ""),
    ("upstream_upgrade", ""),
    ("upstream_connection", ""),
    ("upstream_mirror_host", ""),
    ("upstream_mirror_uri", ""),
    ("upstream_cache_key", ""),
    ("upstream_cache_bypass", ""),
    ("upstream_no_cache", ""),
    ("request_line", ""),
];

/// Whether a variable has a value before a request starts.
pub fn is_preset(name: &str) -> bool {
    DEFAULTS.iter().any(|(preset, _)| *preset == name)
}

fn known_names() -> &'static HashMap<&'static str, Known> {
    static TABLE: OnceLock<HashMap<&'static str, Known>> = OnceLock::new();
    TABLE.get_or_init(|| NAMES.iter().copied().collect())
}

impl Known {
    fn is_of_tls(self) -> bool {
        NAMES.iter().any(|(name, known)| *known == self && name.starts_with("ssl_"))
    }

    /// A number that stands for the variable of that name, as long as the process lives.
    pub fn number(name: &str) -> Option<u16> {
        let known = known_names().get(name)?;
        NAMES.iter().position(|(_, other)| other == known).map(|at| at as u16)
    }

    pub fn numbered(number: u16) -> Option<Known> {
        NAMES.get(usize::from(number)).map(|(_, known)| *known)
    }
}

impl Var {
    /// Never fails: a name that nothing knows is a custom variable, absent until someone sets it.
    pub fn parse(name: &str) -> Var {
        if let Some(known) = known_names().get(name) {
            return Var::Known(*known);
        }
        match Family::of(name) {
            Family::Http(rest) => Var::Http(rest.into()),
            Family::SentHttp(rest) => Var::SentHttp(rest.into()),
            Family::UpstreamHttp(rest) => Var::UpstreamHttp(rest.into()),
            Family::Arg(rest) => Var::Arg(rest.into()),
            Family::Cookie(rest) => Var::Cookie(rest.into()),
            Family::UpstreamCookie(rest) => Var::UpstreamCookie(rest.into()),
            Family::ProxyProtocolTlv(rest) => Var::ProxyProtocolTlv(rest.into()),
            Family::Trailer => Var::Trailer,
            Family::UriParam(rest) => Var::UriParam(rest.into()),
            Family::PostArg(rest) => Var::PostArg(rest.into()),
            Family::PostPath(rest) => Var::PostPath(rest.into()),
            Family::Custom(name) => Var::Custom(name.into()),
        }
    }
}

/// What `Var` says of a name that is not one of the gateway's, without a copy of it.
enum Family<'a> {
    Http(Cow<'a, str>),
    SentHttp(Cow<'a, str>),
    UpstreamHttp(Cow<'a, str>),
    Arg(&'a str),
    Cookie(&'a str),
    UpstreamCookie(&'a str),
    ProxyProtocolTlv(&'a str),
    Trailer,
    UriParam(&'a str),
    PostArg(&'a str),
    PostPath(&'a str),
    Custom(&'a str),
}

impl<'a> Family<'a> {
    fn of(name: &'a str) -> Self {
        match name.split_once('_') {
            Some(("http", rest)) => Family::Http(lower(rest)),
            Some(("arg", rest)) => Family::Arg(rest),
            Some(("cookie", rest)) => Family::Cookie(rest),
            Some(("sent", rest)) if rest.starts_with("http_") => Family::SentHttp(lower(&rest[5..])),
            Some(("upstream", rest)) if rest.starts_with("http_") => Family::UpstreamHttp(lower(&rest[5..])),
            Some(("upstream", rest)) if rest.starts_with("cookie_") => Family::UpstreamCookie(&rest[7..]),
            Some(("sent" | "upstream", rest)) if rest.starts_with("trailer_") => Family::Trailer,
            Some(("proxy", rest)) if rest.starts_with("protocol_tlv_") => Family::ProxyProtocolTlv(&rest[13..]),
            Some(("uri", rest)) if rest.starts_with("param_") => Family::UriParam(&rest[6..]),
            Some(("post", rest)) if rest.starts_with("arg_") => Family::PostArg(&rest[4..]),
            Some(("post", rest)) if rest.starts_with("arg.") => Family::PostPath(&rest[4..]),
            _ => Family::Custom(name),
        }
    }
}

/// A field's name as a variable writes it.
fn lower(name: &str) -> Cow<'_, str> {
    match name.bytes().any(|b| b.is_ascii_uppercase() || b == b'-') {
        true => name.to_ascii_lowercase().replace('-', "_").into(),
        false => name.into(),
    }
}

impl Exchange {
    /// The variable's value: part of the exchange, or written into `scratch`.
    pub fn var<'a>(&'a self, var: &Var, scratch: &'a mut Vec<u8>) -> Option<&'a [u8]> {
        match var {
            Var::Known(known) => self.known(*known, scratch),
            Var::Http(name) => field(&self.request.headers, name, scratch),
            Var::SentHttp(name) => self.sent_field(name, scratch),
            Var::UpstreamHttp(name) => field(self.upstream_headers()?, name, scratch),
            Var::Arg(name) => arg(&self.request.args, name),
            Var::Cookie(name) => cookie(&self.request.headers, name),
            Var::UpstreamCookie(name) => set_cookie(self.upstream_headers()?, name),
            Var::ProxyProtocolTlv(name) => proxy_protocol_tlv(&self.conn.proxy_tlvs, name, scratch),
            Var::Trailer => None,
            Var::UriParam(name) => self.uri_param(name),
            Var::PostArg(name) => self.posted.as_ref()?.field(name),
            Var::PostPath(path) => self.posted_at(path, scratch),
            Var::Custom(name) => self.custom(name),
        }
    }

    pub fn var_by_name<'a>(&'a self, name: &str, scratch: &'a mut Vec<u8>) -> Option<&'a [u8]> {
        // nginx's names know no case; those of APISIX are written as they are.
        if self.location.is_some() && name.bytes().any(|b| b.is_ascii_uppercase()) {
            return self.var_by_name(&name.to_ascii_lowercase(), scratch);
        }
        if let Some(known) = known_names().get(name) {
            return self.known(*known, scratch);
        }
        if let Some(set) = self.set_by_name(name) {
            return Some(set);
        }
        match Family::of(name) {
            Family::Http(name) => field(&self.request.headers, &name, scratch),
            Family::SentHttp(name) => self.sent_field(&name, scratch),
            Family::UpstreamHttp(name) => field(self.upstream_headers()?, &name, scratch),
            Family::Arg(name) => arg(&self.request.args, name),
            Family::Cookie(name) => cookie(&self.request.headers, name),
            Family::UpstreamCookie(name) => set_cookie(self.upstream_headers()?, name),
            Family::ProxyProtocolTlv(name) => proxy_protocol_tlv(&self.conn.proxy_tlvs, name, scratch),
            Family::Trailer => None,
            Family::UriParam(name) => self.uri_param(name),
            Family::PostArg(name) => self.posted.as_ref()?.field(name),
            Family::PostPath(path) => self.posted_at(path, scratch),
            Family::Custom(name) => self.custom(name),
        }
    }

    /// Sets a variable that plugins may set, or one of their own.
    pub fn set_var(&mut self, name: &str, value: &[u8]) -> Result<(), Refused> {
        let place = match known_names().get(name) {
            Some(Known::Args) => {
                self.request.uri_changed = true;
                self.request.args_set = true;
                &mut self.request.args
            }
            Some(Known::UpstreamUri) => &mut self.upstream.uri,
            Some(Known::UpstreamHost) => &mut self.upstream.host,
            Some(Known::UpstreamScheme) => &mut self.upstream.scheme,
            Some(Known::LimitRate) => {
                // As nginx: what is no size changes nothing.
                let Some(rate) = size(value) else { return Ok(()) };
                let place = self.custom_place(name);
                place.clear();
                number(rate, place);
                self.keep_rate();
                return Ok(());
            }
            Some(Known::ApisixRequestId | Known::UpstreamUnresolvedHost | Known::ApisixUpstreamResponseTime) => {
                self.custom_place(name)
            }
            Some(known) if known.is_of_tls() => return Err(Refused::NotAssignable),
            Some(_) => return Err(Refused::NotChangeable),
            None => match Family::of(name) {
                Family::Custom(_) => self.custom_place(name),
                _ => return Err(Refused::NotFound),
            },
        };
        place.clear();
        place.extend_from_slice(value);
        Ok(())
    }

    /// `$limit_rate`, in bytes per second: what was set, else `limit_rate` of the location. 0: none.
    fn rate(&self) -> u64 {
        let set = self.set_by_name("limit_rate").and_then(size);
        set.or_else(|| self.size_of(self.location.as_ref()?.directives.limit_rate.as_ref()?)).unwrap_or(0)
    }

    /// What a template says as a size. What is none counts as not said, as in nginx.
    fn size_of(&self, template: &Template) -> Option<u64> {
        let mut text = Vec::new();
        self.fill(template, &mut text);
        size(&text)
    }

    /// Has the client's side keep to `$limit_rate` and `limit_rate_after` from now on.
    pub fn keep_rate(&mut self) {
        let after = self.location.as_ref().and_then(|l| self.size_of(l.directives.limit_rate_after.as_ref()?));
        let (rate, free) = (self.rate(), after.unwrap_or(0).saturating_sub(self.body_bytes_sent));
        if let Some(client) = &mut self.client {
            client.limit_rate(rate, free);
        }
    }

    /// Whether a script may make the variable, or it was made already: where a location serves, a name must stand somewhere in
    /// the configuration, as with nginx.
    pub fn is_defined(&self, name: &str) -> bool {
        self.location.as_ref().is_none_or(|location| location.defined.contains(name))
            || known_names().contains_key(name)
            || DEFAULTS.iter().any(|(n, _)| *n == name)
    }

    /// What a template says now. A variable that has no value is empty.
    pub fn fill(&self, template: &Template, out: &mut Vec<u8>) {
        let mut scratch = Vec::new();
        for piece in &template.0 {
            match piece {
                Piece::Text(text) => out.extend_from_slice(text.as_bytes()),
                Piece::Var(name) => {
                    scratch.clear();
                    out.extend_from_slice(self.var_by_name(name, &mut scratch).unwrap_or_default());
                }
            }
        }
    }

    fn custom_place(&mut self, name: &str) -> &mut Vec<u8> {
        let at = self.custom_vars.iter().position(|(n, _)| **n == *name).unwrap_or_else(|| {
            self.custom_vars.push((name.into(), Vec::new()));
            self.custom_vars.len() - 1
        });
        &mut self.custom_vars[at].1
    }

    /// Whether the variable was set before.
    pub fn is_made(&self, name: &str) -> bool {
        self.set_by_name(name).is_some()
    }

    fn set_by_name(&self, name: &str) -> Option<&[u8]> {
        self.custom_vars.iter().find(|(n, _)| **n == *name).map(|(_, v)| v.as_slice())
    }

    fn custom(&self, name: &str) -> Option<&[u8]> {
        let default = || DEFAULTS.iter().find(|(n, _)| *n == name).map(|(_, v)| v.as_bytes());
        self.set_by_name(name).or_else(default)
    }

    /// A field of the response; those that the protocol's codec adds are told from what it does.
    fn sent_field<'a>(&'a self, name: &str, scratch: &'a mut Vec<u8>) -> Option<&'a [u8]> {
        let r = &self.response;
        field(&r.headers, name, scratch).or_else(|| match (name, self.request.version) {
            (_, Version::Http2) => None,
            ("connection", _) if r.status == 101 => Some(&b"upgrade"[..]),
            ("connection", _) => Some(if self.request.keep_alive { b"keep-alive" } else { b"close" }),
            ("transfer_encoding", Version::Http11) => {
                let bodiless = matches!(r.status, 101..200 | 204 | 304) || self.request.method == b"HEAD";
                let chunked = r.head_sent && !bodiless && !r.headers.contains("content-length");
                chunked.then_some(&b"chunked"[..])
            }
            _ => None,
        })
    }

    /// The upstream's own fields; where nothing changed them, those of the response are still they.
    fn upstream_headers(&self) -> Option<&Headers> {
        let kept = !self.upstream.headers.is_empty();
        match self.response.source {
            _ if kept => Some(&self.upstream.headers),
            super::Source::Upstream => Some(&self.response.headers),
            super::Source::Gateway => None,
        }
    }

    /// The GraphQL operation, where the request is known to be one.
    fn graphql(&self) -> Option<&graphql::Operation> {
        self.graphql.as_deref().filter(|graphql| !graphql.kind.is_empty())
    }

    fn posted_at<'a>(&self, path: &str, scratch: &'a mut Vec<u8>) -> Option<&'a [u8]> {
        *scratch = self.posted.as_ref()?.at(path)?;
        Some(scratch)
    }

    fn uri_param(&self, name: &str) -> Option<&[u8]> {
        let mut params = self.matched.as_ref()?.found.params();
        params.find(|(n, _)| *n == name).map(|(_, value)| value)
    }

    fn known<'a>(&'a self, known: Known, scratch: &'a mut Vec<u8>) -> Option<&'a [u8]> {
        scratch.clear();
        let r = &self.request;
        match known {
            Known::Args | Known::QueryString if r.args_set => Some(&r.args),
            Known::Args | Known::QueryString => non_empty(&r.args),
            Known::IsArgs => Some(if r.args.is_empty() { b"" } else { b"?" }),
            Known::Uri | Known::DocumentUri | Known::EchoRequestUri => Some(&r.path),
            Known::RequestUri => Some(&r.target),
            Known::EchoRequestMethod => Some(&r.method),
            Known::RequestMethod | Known::EchoClientRequestMethod => Some(r.main_method()),
            // HTTP/1.0 may name none.
            Known::Host if r.host.is_empty() => Some(SERVER_NAME),
            Known::Host => Some(&r.host),
            Known::ServerName => Some(SERVER_NAME),
            Known::GraphqlOperation => self.graphql().map(|graphql| graphql.kind.as_bytes()),
            Known::GraphqlName => self.graphql().map(|graphql| graphql.name.as_bytes()),
            Known::GraphqlRootFields => self.graphql().map(|graphql| graphql.root_fields.as_bytes()),
            Known::ServerProtocol => Some(version(r.version)),
            Known::DocumentRoot => self.location.as_ref().map(|l| l.root.as_os_str().as_encoded_bytes()),
            Known::Http2 => Some(match (r.version, &self.conn.tls) {
                (Version::Http2, Some(_)) => b"h2",
                (Version::Http2, None) => b"h2c",
                _ => b"",
            }),
            Known::Http3 => Some(b""),
            Known::LimitRate if self.location.is_none() => self.set_by_name("limit_rate").or(Some(b"0")),
            Known::UpstreamCacheStatus => None,
            Known::Scheme | Known::VarXForwardedProto => Some(self.scheme().as_bytes()),
            Known::Https => Some(if self.conn.tls.is_some() { b"on" } else { b"" }),
            Known::ContentLength => r.headers.get("content-length"),
            Known::ContentType => r.headers.get("content-type"),
            Known::RequestBody | Known::EchoRequestBody => match &self.body {
                RequestBody::Memory(bytes) => Some(bytes),
                _ => None,
            },
            Known::RequestBodyFile => match &self.body {
                RequestBody::File { path, .. } => Some(path.as_os_str().as_encoded_bytes()),
                _ => None,
            },
            Known::RequestCompletion => Some(if self.response.ended { b"OK" } else { b"" }),
            Known::Pipe => Some(b"."),
            Known::Hostname => Some(hostname().as_bytes()),
            Known::NginxVersion => Some(NGINX_VERSION.as_bytes()),
            Known::ConsumerName => self.consumer.as_ref().map(|c| c.value.username.as_bytes()),
            Known::ConsumerGroupId => self.consumer.as_ref()?.value.group_id.as_deref().map(str::as_bytes),
            Known::RouteId => self.matched.as_ref().map(|m| m.route().id.as_bytes()),
            Known::RouteName => self.matched.as_ref()?.route().value.name.as_deref().map(str::as_bytes),
            Known::ServiceId => self.matched.as_ref()?.service.as_ref().map(|s| s.id.as_bytes()),
            Known::ServiceName => self.matched.as_ref()?.service.as_ref()?.value.name.as_deref().map(str::as_bytes),
            Known::SslProtocol
            | Known::SslCipher
            | Known::SslServerName
            | Known::SslSessionReused
            | Known::SslSessionId
            | Known::SslEarlyData
            | Known::SslAlpnProtocol
            | Known::SslCiphers
            | Known::SslCurve
            | Known::SslCurves
            | Known::SslClientVerify
            | Known::SslClientRawCert
            | Known::SslClientCert
            | Known::SslClientEscapedCert
            | Known::SslClientFingerprint
            | Known::SslClientSerial
            | Known::SslClientSDn
            | Known::SslClientIDn
            | Known::SslClientSDnLegacy
            | Known::SslClientIDnLegacy
            | Known::SslClientVStart
            | Known::SslClientVEnd
            | Known::SslClientVRemain => self.ssl(known, scratch),
            Known::UpstreamUri => Some(&self.upstream.uri),
            Known::UpstreamHost => non_empty(&self.upstream.host).or_else(|| r.headers.get("host")),
            Known::UpstreamScheme => Some(self.upstream_scheme().as_bytes()),
            Known::UpstreamUnresolvedHost => self.set_by_name("upstream_unresolved_host").or_else(|| self.node_host()),
            Known::ProxyHost => self.upstream.conf.is_some().then_some(b"apisix_backend"),
            Known::ApisixRequestId if !self.custom_vars.is_empty() => {
                self.set_by_name("apisix_request_id").or_else(|| self.written(known, scratch))
            }
            Known::ApisixUpstreamResponseTime if !self.custom_vars.is_empty() => {
                self.set_by_name("apisix_upstream_response_time").or_else(|| self.written(known, scratch))
            }
            Known::VarXForwardedHost => {
                r.headers.get("host").and_then(non_empty).or(non_empty(&r.host)).or(Some(SERVER_NAME))
            }
            _ => self.written(known, scratch),
        }
    }

    /// Appends a variable whose value must be put into words. `None`: it has no value, or is none of these.
    pub fn append_written(&self, known: Known, out: &mut Vec<u8>) -> Option<()> {
        self.written(known, out).map(|_| ())
    }

    /// What must be put into words.
    fn written<'a>(&'a self, known: Known, out: &'a mut Vec<u8>) -> Option<&'a [u8]> {
        let r = &self.request;
        match known {
            Known::Request => r.append_line(out),
            Known::EchoClientRequestHeaders => r.append_head(true, out),
            Known::RequestTime => seconds(self.started.elapsed(), out),
            Known::RequestLength => number(r.head_len + self.client.as_ref().map_or(0, |c| c.body_received()), out),
            Known::RequestId | Known::ApisixRequestId => hex(&self.id, out),
            Known::ServerAddr => ip(self.conn.local.ip(), out),
            Known::ServerPort => number(self.conn.local.port().into(), out),
            Known::RemoteAddr => self.append_remote(out),
            // nginx: a port that nobody told is an empty text.
            Known::RemotePort => match self.remote().port() {
                0 => {}
                port => number(port.into(), out),
            },
            Known::BinaryRemoteAddr => match self.remote().ip() {
                IpAddr::V4(a) => out.extend_from_slice(&a.octets()),
                IpAddr::V6(a) => out.extend_from_slice(&a.octets()),
            },
            Known::RealipRemoteAddr => out.extend_from_slice(self.conn.peer_text()),
            Known::RealipRemotePort => number(self.conn.peer.port().into(), out),
            Known::ProxyProtocolAddr => ip(self.conn.proxy?.0.ip(), out),
            Known::ProxyProtocolPort => number(self.conn.proxy?.0.port().into(), out),
            Known::ProxyProtocolServerAddr => ip(self.conn.proxy?.1.ip(), out),
            Known::ProxyProtocolServerPort => number(self.conn.proxy?.1.port().into(), out),
            Known::RemoteUser => remote_user(&r.headers, out)?,
            Known::ProxyAddXForwardedFor => self.forwarded_for(out),
            Known::VarXForwardedPort => self.forwarded_port(out),
            Known::Status => {
                let digit = |n: u16| b'0' + (n % 10) as u8;
                let status = self.response.status;
                out.extend_from_slice(&[digit(status / 100), digit(status / 10), digit(status)]);
            }
            Known::BytesSent => number(self.bytes_sent.max(self.client.as_ref().map_or(0, |c| c.bytes_sent())), out),
            Known::BodyBytesSent => number(self.body_bytes_sent, out),
            Known::LimitRate => number(self.rate(), out),
            Known::Connection => number(self.conn.serial, out),
            Known::ConnectionRequests => number(r.nth, out),
            Known::ConnectionTime => seconds(self.conn.since.elapsed(), out),
            Known::TcpinfoRtt => number(self.tcp_info()?.rtt.into(), out),
            Known::TcpinfoRttvar => number(self.tcp_info()?.rttvar.into(), out),
            Known::TcpinfoSndCwnd => number(self.tcp_info()?.snd_cwnd.into(), out),
            Known::TcpinfoRcvSpace => number(self.tcp_info()?.rcv_space.into(), out),
            Known::RealpathRoot => {
                let root = std::fs::canonicalize(&self.location.as_ref()?.root).ok()?;
                out.extend_from_slice(root.as_os_str().as_encoded_bytes());
            }
            Known::RequestFilename => {
                append_all(out, [self.location.as_ref()?.root.as_os_str().as_encoded_bytes(), &r.path]);
            }
            Known::Pid => number(std::process::id().into(), out),
            Known::Msec => seconds(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(), out),
            Known::TimeLocal => with_clock(|clock| out.extend_from_slice(clock.local.as_bytes())),
            Known::TimeIso8601 => with_clock(|clock| out.extend_from_slice(clock.iso.as_bytes())),
            Known::DateLocal => date(true, out)?,
            Known::DateGmt => date(false, out)?,
            Known::BalancerIp => ip(self.upstream.tries.last()?.addr.ip(), out),
            Known::BalancerPort | Known::ProxyPort => number(self.upstream.tries.last()?.addr.port().into(), out),
            _ => self.of_tries(known, out)?,
        }
        Some(out)
    }

    /// `$upstream_*` with one element per try: `127.0.0.1:1980, 127.0.0.1:1981 : 127.0.0.1:1982`, where the last is of another
    /// group of servers.
    fn of_tries(&self, known: Known, out: &mut Vec<u8>) -> Option<()> {
        let tries = &self.upstream.tries;
        if tries.is_empty() {
            return None;
        }
        for (i, t) in tries.iter().enumerate() {
            match i {
                0 => {}
                _ if t.another_group => out.extend_from_slice(b" : "),
                _ => out.extend_from_slice(b", "),
            }
            of_try(known, t, out)?;
        }
        Some(())
    }

    fn tcp_info(&self) -> Option<TcpInfo> {
        self.client.as_ref()?.tcp_info()
    }

    /// `http` or `https`, as the client came.
    pub fn scheme(&self) -> &'static str {
        if self.conn.tls.is_some() { "https" } else { "http" }
    }

    pub(super) fn upstream_scheme(&self) -> &str {
        match std::str::from_utf8(&self.upstream.scheme) {
            Ok(set) if !set.is_empty() => set,
            _ => self.upstream.conf.as_ref().map_or("http", |u| scheme_name(u.scheme)),
        }
    }

    fn node_host(&self) -> Option<&[u8]> {
        let node = self.upstream.tries.last()?.node;
        self.upstream.conf.as_ref()?.nodes.get(node).map(|n| n.host.as_bytes())
    }

    /// `X-Forwarded-For` with the client's address at the end.
    pub fn forwarded_for(&self, out: &mut Vec<u8>) {
        const NAME: &[u8] = b"x-forwarded-for";
        if self.request.headers.may_have_length(NAME.len()) {
            for value in self.request.headers.get_all(NAME) {
                append_all(out, [value, b", "]);
            }
        }
        self.append_remote(out);
    }

    /// Appends `$remote_addr`.
    pub fn append_remote(&self, out: &mut Vec<u8>) {
        match self.request.real_ip {
            Some(addr) => ip(addr.ip(), out),
            None => out.extend_from_slice(self.conn.peer_text()),
        }
    }

    /// The port of the Host field, or the listener's.
    pub fn forwarded_port(&self, out: &mut Vec<u8>) {
        self.port_of(self.request.headers.get("host").unwrap_or_default(), out);
    }

    /// The port that `host` names, or the listener's.
    pub fn port_of(&self, host: &[u8], out: &mut Vec<u8>) {
        let port = host.iter().rposition(|b| *b == b':').map(|at| &host[at + 1..]);
        match port.filter(|p| !p.is_empty() && p.iter().all(u8::is_ascii_digit)) {
            Some(port) => out.extend_from_slice(port),
            None => number(self.conn.local.port().into(), out),
        }
    }
}

/// The scheme's name as configuration and variables write it.
pub fn scheme_name(scheme: Scheme) -> &'static str {
    match scheme {
        Scheme::Http => "http",
        Scheme::Https => "https",
        Scheme::Grpc => "grpc",
        Scheme::Grpcs => "grpcs",
        Scheme::Tcp => "tcp",
        Scheme::Tls => "tls",
        Scheme::Udp => "udp",
        Scheme::Kafka => "kafka",
    }
}

fn of_try(known: Known, t: &Try, out: &mut Vec<u8>) -> Option<()> {
    let time = |d: Option<Duration>, out: &mut Vec<u8>| match d {
        Some(d) => seconds(d, out),
        None => out.push(b'-'),
    };
    match known {
        Known::UpstreamAddr => address(t.addr, out),
        Known::UpstreamStatus if t.status == 0 => out.push(b'-'),
        Known::UpstreamStatus => number(t.status.into(), out),
        Known::UpstreamResponseTime | Known::ApisixUpstreamResponseTime => time(t.response_time, out),
        Known::UpstreamConnectTime => time(t.connect_time, out),
        Known::UpstreamHeaderTime => time(t.header_time, out),
        Known::UpstreamBytesSent => number(t.bytes_sent, out),
        Known::UpstreamBytesReceived => number(t.bytes_received, out),
        Known::UpstreamResponseLength => number(t.response_length, out),
        _ => return None,
    }
    Some(())
}

fn non_empty(bytes: &[u8]) -> Option<&[u8]> {
    (!bytes.is_empty()).then_some(bytes)
}

/// `HTTP/1.1`, as nginx writes it.
pub fn version(version: Version) -> &'static [u8] {
    match version {
        Version::Http10 => b"HTTP/1.0",
        Version::Http11 => b"HTTP/1.1",
        Version::Http2 => b"HTTP/2.0",
    }
}

#[cfg(test)]
mod tests {
    use std::{rc::Rc, sync::Arc};

    use super::*;
    use crate::exchange::Connection;

    fn exchange() -> Exchange {
        let conn = Connection::new(7, "10.0.0.9:5000".parse().unwrap(), "[::1]:9080".parse().unwrap());
        let mut x = Exchange::new(Rc::new(conn), Arc::default());
        x.begin();
        x.request.method.extend_from_slice(b"GET");
        x.request.target.extend_from_slice(b"/a%20b?x=1&Y=2&x=3&z");
        x.request.path.extend_from_slice(b"/a b");
        x.request.args.extend_from_slice(b"x=1&Y=2&x=3&z");
        x.request.host.extend_from_slice(b"foo.com");
        for (n, v) in [
            ("Host", "Foo.com:8443"),
            ("Cookie", "a=1; B=2"),
            ("X-Two", "1"),
            ("x-two", "2"),
            ("Cookie", "c=3"),
            ("Authorization", "Basic amFjazpzZWNyZXQ="),
            ("X-Forwarded-For", "1.1.1.1"),
        ] {
            x.request.headers.append(n, v);
        }
        x
    }

    fn read(x: &Exchange, name: &str) -> Option<String> {
        let (mut a, mut b) = (Vec::new(), Vec::new());
        let parsed = x.var(&Var::parse(name), &mut a).map(<[u8]>::to_vec);
        assert_eq!(parsed.as_deref(), x.var_by_name(name, &mut b), "{name}: both ways give the same");
        parsed.map(|v| String::from_utf8(v).unwrap())
    }

    #[test]
    fn reads_the_request() {
        let x = exchange();
        for (name, value) in [
            ("request", "GET /a%20b?x=1&Y=2&x=3&z HTTP/1.1"),
            ("uri", "/a b"),
            ("is_args", "?"),
            ("arg_x", "1"),
            ("arg_y", "2"),
            ("http_host", "Foo.com:8443"),
            ("host", "foo.com"),
            ("http_x_two", "1, 2"),
            ("http_cookie", "a=1; B=2; c=3"),
            ("cookie_a", "1"),
            ("cookie_b", "2"),
            ("cookie_c", "3"),
            ("remote_user", "jack"),
            ("remote_addr", "10.0.0.9"),
            ("server_addr", "::1"),
            ("server_port", "9080"),
            ("proxy_add_x_forwarded_for", "1.1.1.1, 10.0.0.9"),
            ("var_x_forwarded_port", "8443"),
            ("connection", "7"),
            ("status", "000"),
            ("scheme", "http"),
            ("upstream_scheme", "http"),
            ("upstream_host", "Foo.com:8443"),
            ("llm_stream", "false"),
        ] {
            assert_eq!(read(&x, name).as_deref(), Some(value), "{name}");
        }
        for absent in
            ["arg_z", "arg_none", "cookie_none", "http_none", "upstream_addr", "route_id", "ssl_protocol", "nonsense"]
        {
            assert_eq!(read(&x, absent), None, "{absent}");
        }
        assert_eq!(read(&x, "request_id").unwrap().len(), 32);
        assert_eq!(read(&x, "time_local").unwrap().len(), 26);
        assert_eq!(read(&x, "time_iso8601").unwrap().len(), 25);
    }

    #[test]
    fn joins_what_several_tries_left() {
        let mut x = exchange();
        let one = |addr: &str, status, ms: Option<u64>| Try {
            addr: addr.parse().unwrap(),
            node: 0,
            another_group: false,
            status,
            connect_time: None,
            header_time: None,
            response_time: ms.map(Duration::from_millis),
            bytes_sent: 0,
            bytes_received: 0,
            response_length: ms.unwrap_or_default(),
            reused: false,
        };
        x.upstream.tries.push(one("127.0.0.1:1980", 502, Some(0)));
        x.upstream.tries.push(one("[::1]:1981", 200, Some(1234)));
        assert_eq!(read(&x, "upstream_addr").as_deref(), Some("127.0.0.1:1980, [::1]:1981"));
        assert_eq!(read(&x, "upstream_status").as_deref(), Some("502, 200"));
        assert_eq!(read(&x, "upstream_response_time").as_deref(), Some("0.000, 1.234"));
        assert_eq!(read(&x, "upstream_connect_time").as_deref(), Some("-, -"));
        assert_eq!(read(&x, "upstream_response_length").as_deref(), Some("0, 1234"));
        assert_eq!(read(&x, "balancer_port").as_deref(), Some("1981"));
        x.upstream.tries.push(Try { another_group: true, ..one("127.0.0.1:1982", 200, Some(7)) });
        assert_eq!(read(&x, "upstream_addr").as_deref(), Some("127.0.0.1:1980, [::1]:1981 : 127.0.0.1:1982"));
        assert_eq!(read(&x, "upstream_response_length").as_deref(), Some("0, 1234 : 7"));
    }

    /// The values are those of nginx 1.22.
    #[test]
    fn cookies_and_users_are_read_as_nginx_reads_them() {
        for (line, name, value) in [
            ("a=1, b=2", "b", Some("2")),
            ("a=1, b=2", "a", Some("1, b=2")),
            ("b= 2", "b", Some("2")),
            ("b = 2;c", "b", Some("2")),
            ("x,B=;b=3", "b", Some("")),
            ("ab=1; bb=2", "b", None),
            ("b", "b", None),
            ("", "b", None),
        ] {
            let mut x = exchange();
            x.request.headers.set("Cookie", line);
            assert_eq!(read(&x, &format!("cookie_{name}")).as_deref(), value, "{line}");
        }
        for (credentials, user) in [
            ("Basic amFjazpzZWNyZXQ=", Some("jack")),
            ("basic  amFjazpzZWNyZXQ", Some("jack")),
            ("Basic amFjazpzZWNyZXR=", Some("jack")),
            ("Basic amFjazpzZWNyZXQ=!", Some("jack")),
            ("Basic amFjazpzZW!yZXQ=", None),
            ("Basic amFjazpzZ", None),
            ("Basic amFjaw==", None),
            ("Basic OnNlY3JldA==", None),
            ("Basic =", None),
            ("Basic", None),
            ("Bearer amFjazpzZWNyZXQ=", None),
        ] {
            let mut x = exchange();
            x.request.headers.set("Authorization", credentials);
            assert_eq!(read(&x, "remote_user").as_deref(), user, "{credentials}");
        }
    }

    #[test]
    fn the_first_line_stays_as_it_came() {
        let mut x = exchange();
        x.request.set_method(b"PUT");
        x.request.set_method(b"DELETE");
        assert_eq!(read(&x, "request").as_deref(), Some("GET /a%20b?x=1&Y=2&x=3&z HTTP/1.1"));
        assert_eq!(read(&x, "request_method").as_deref(), Some("DELETE"));
        x.reset();
        x.request.target.extend_from_slice(b"no line");
        assert_eq!(read(&x, "request").as_deref(), Some("no line"), "that of the request before is gone");
        x.request.set_method(b"GET");
        assert_eq!(read(&x, "request").as_deref(), Some("no line"));
        assert_eq!(read(&x, "host").as_deref(), Some("_"), "the server's name, where the client gives none");
    }

    #[test]
    fn reads_what_the_protocol_around_the_request_says() {
        let mut x = exchange();
        for (name, value) in [
            ("http2", Some("")),
            ("http3", Some("")),
            ("limit_rate", Some("0")),
            ("sent_http_connection", Some("close")),
            ("sent_http_transfer_encoding", None),
            ("upstream_cache_status", None),
            ("upstream_cookie_u", None),
            ("upstream_trailer_x", None),
            ("sent_trailer_x", None),
            ("proxy_protocol_server_addr", None),
            ("proxy_protocol_tlv_alpn", None),
            ("tcpinfo_rtt", None),
            ("request_filename", None),
        ] {
            assert_eq!(read(&x, name).as_deref(), value, "{name}");
        }
        assert!(read(&x, "connection_time").is_some_and(|t| t.parse::<f64>().is_ok()));
        assert!(read(&x, "date_gmt").is_some_and(|t| t.ends_with(" GMT") && t.contains("day, ")));
        assert!(read(&x, "date_local").is_some_and(|t| t.contains("day, ")));
        x.request.keep_alive = true;
        x.response.head_sent = true;
        assert_eq!(read(&x, "sent_http_connection").as_deref(), Some("keep-alive"));
        assert_eq!(read(&x, "sent_http_transfer_encoding").as_deref(), Some("chunked"));
        x.response.headers.append("Content-Length", "5");
        assert_eq!(read(&x, "sent_http_transfer_encoding"), None);
        x.response.source = crate::exchange::Source::Upstream;
        x.response.headers.append("Set-Cookie", "w=1");
        x.response.headers.append("Set-Cookie", "u=uv=1; Path=/");
        assert_eq!(read(&x, "upstream_cookie_u").as_deref(), Some("uv=1"));
        assert_eq!(read(&x, "upstream_cookie_path"), None, "what follows the first pair is no cookie");
        x.request.version = Version::Http2;
        assert_eq!(read(&x, "http2").as_deref(), Some("h2c"));
        assert_eq!(read(&x, "sent_http_connection"), None);
    }

    #[test]
    fn reads_the_values_of_a_proxy_protocol_header() {
        let mut conn = Connection::new(7, "127.0.0.1:1".parse().unwrap(), "127.0.0.2:9181".parse().unwrap());
        conn.proxy = Some(("10.0.0.9:5000".parse().unwrap(), "10.0.0.1:443".parse().unwrap()));
        let ssl = [&[0x20, 0, 13, 1, 0, 0, 0, 3][..], &[0x22, 0, 5], b"a cn!"].concat();
        conn.proxy_tlvs =
            [&[1, 0, 2][..], b"h2", &ssl, &[0x30, 0, 0], &[0xea, 0, 1, b'x'], &[5, 0, 9, 1]].concat().into();
        let x = Exchange::new(Rc::new(conn), Arc::default());
        for (name, value) in [
            ("proxy_protocol_tlv_alpn", Some("h2")),
            ("proxy_protocol_tlv_0x01", Some("h2")),
            ("proxy_protocol_tlv_ssl_verify", Some("3")),
            ("proxy_protocol_tlv_ssl_cn", Some("a cn!")),
            ("proxy_protocol_tlv_ssl_0x22", Some("a cn!")),
            ("proxy_protocol_tlv_ssl_version", None),
            ("proxy_protocol_tlv_netns", Some("")),
            ("proxy_protocol_tlv_0xea", Some("x")),
            ("proxy_protocol_tlv_unique_id", None),
            ("proxy_protocol_tlv_0x1ff", None),
            ("proxy_protocol_tlv_x", None),
            ("proxy_protocol_addr", Some("10.0.0.9")),
            ("proxy_protocol_port", Some("5000")),
            ("proxy_protocol_server_addr", Some("10.0.0.1")),
            ("proxy_protocol_server_port", Some("443")),
            ("remote_addr", Some("127.0.0.1")),
            ("realip_remote_addr", Some("127.0.0.1")),
            ("server_addr", Some("127.0.0.2")),
            ("server_port", Some("9181")),
        ] {
            assert_eq!(read(&x, name).as_deref(), value, "{name}");
        }
        let mut scratch = Vec::new();
        for cut in 0..x.conn.proxy_tlvs.len() {
            for name in ["netns", "ssl_cn", "ssl_verify", "unique_id"] {
                let whole = proxy_protocol_tlv(&x.conn.proxy_tlvs[..cut], name, &mut scratch);
                assert!(whole.is_none_or(|value| matches!(value, b"" | b"a cn!" | b"3")), "{cut} {name}");
            }
        }
    }

    #[test]
    fn sets_what_may_be_set() {
        let mut x = exchange();
        for name in ["upstream_uri", "upstream_host", "my_own", "args", "apisix_request_id", "llm_model"] {
            assert_eq!(x.set_var(name, b"v=1"), Ok(()));
            assert_eq!(read(&x, name).as_deref(), Some("v=1"));
        }
        assert!(x.request.uri_changed);
        for name in ["status", "remote_addr", "http_x", "arg_x", "request_id"] {
            let why = if name.contains("_x") { Refused::NotFound } else { Refused::NotChangeable };
            assert_eq!(x.set_var(name, b"1"), Err(why), "{name}");
        }
        assert_eq!(x.set_var("ssl_cipher", b"1"), Err(Refused::NotAssignable));
        for (written, value) in [("4k", "4096"), ("1m", "1048576"), ("7", "7"), ("-1", "7"), ("x", "7"), ("", "7")] {
            assert_eq!(x.set_var("limit_rate", written.as_bytes()), Ok(()));
            assert_eq!(read(&x, "limit_rate").as_deref(), Some(value), "{written}");
        }
    }
}
