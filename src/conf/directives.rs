//! What a location's `options` say, read once into what a request asks for. Names, values and defaults are nginx's and
//! lua-nginx-module's.

use std::time::Duration;

use serde_json::{Map, Value};

use super::{
    locations::{Options, Template},
    outgoing::{Charset, ErrorPage, Gzip},
    typed,
};

/// A location's directives beside scripts, variables and what answers.
#[derive(Clone, Debug)]
pub struct Directives {
    /// `default_type`; empty: no type.
    pub default_type: Option<Box<str>>,
    pub lua_use_default_type: bool,
    pub lua_code_cache: bool,
    pub lua_need_request_body: bool,
    pub lua_check_client_abort: bool,
    pub lua_http10_buffering: bool,
    pub lua_transform_underscores_in_response_headers: bool,
    pub lua_socket_log_errors: bool,
    pub log_subrequest: bool,
    /// `client_body_in_file_only` is `on` or `clean`.
    pub client_body_in_file_only: bool,
    /// Bytes of a request body that stay in memory.
    pub client_body_buffer_size: Option<u64>,
    pub client_body_timeout: Option<Duration>,
    /// `client_max_body_size`; 0: no bound. Without it that of `nginx_config.http` holds, and it cannot be widened.
    pub client_max_body_size: Option<u64>,
    /// `lua_socket_{connect,send,read}_timeout`
    pub socket: Patience,
    /// `lua_socket_keepalive_timeout`; zero: until the peer closes.
    pub socket_keepalive: Option<Duration>,
    /// `lua_socket_pool_size`
    pub socket_pool_size: Option<usize>,
    /// `proxy_{connect,send,read}_timeout`
    pub proxy: Patience,
    /// `proxy_http_version 1.1`
    pub proxy_http11: bool,
    pub next_upstream: NextUpstream,
    /// `proxy_set_header name value`, in their order.
    pub proxy_set_header: Vec<(Box<str>, Template)>,
    /// `proxy_pass_header Server`: the upstream's own `Server` goes to the client.
    pub proxy_pass_server: bool,
    pub add_header: Vec<AddHeader>,
    /// `satisfy any`: one of `allow`, `auth_request` and `access_by_lua` lets a request in.
    pub satisfy_any: bool,
    /// `auth_request path`: a subrequest that says whether a request may come in.
    pub auth_request: Option<Box<str>>,
    pub error_page: Vec<ErrorPage>,
    pub charset: Option<Charset>,
    pub gzip: Option<Gzip>,
    /// `proxy_buffering`: what the upstream cut off within its first piece is not sent on.
    pub proxy_buffering: bool,
    /// `limit_rate` and `limit_rate_after`: sizes, or variables that hold some.
    pub limit_rate: Option<Template>,
    pub limit_rate_after: Option<Template>,
    /// `absolute_redirect`: nginx's own redirects name scheme and host.
    pub absolute_redirect: bool,
}

/// How long what is done with another host may take.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    pub connect: Option<Duration>,
    pub send: Option<Duration>,
    pub read: Option<Duration>,
}

/// `proxy_next_upstream`, `proxy_next_upstream_tries`, `proxy_next_upstream_timeout`: which tries are followed by another one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NextUpstream {
    pub error: bool,
    pub timeout: bool,
    pub invalid_header: bool,
    /// Also for requests that must not be acted on twice, once something of them was sent.
    pub non_idempotent: bool,
    /// Bits of `NEXT_STATUSES`.
    statuses: u8,
    /// Tries of a request in all; 0: no bound of its own.
    pub tries: u32,
    /// No further try begins past it. `None`: no bound.
    pub within: Option<Duration>,
}

/// The statuses that `http_…` may name.
const NEXT_STATUSES: [u16; 7] = [500, 502, 503, 504, 403, 404, 429];

/// What `proxy_next_upstream` may say.
const NEXT_WORDS: &str =
    "error, timeout, invalid_header, non_idempotent, off, or http_ with 500, 502, 503, 504, 403, 404 or 429";

impl NextUpstream {
    /// Whether an answer with this status is followed by another try.
    pub fn has_status(&self, status: u16) -> bool {
        NEXT_STATUSES.iter().position(|known| *known == status).is_some_and(|bit| self.statuses & (1 << bit) != 0)
    }

    /// The words of the directive. `off` stands alone.
    fn parse(text: &str) -> Option<NextUpstream> {
        let mut next = NextUpstream::default();
        let mut words = text.split_whitespace().peekable();
        words.peek()?;
        if text.trim() == "off" {
            return Some(next);
        }
        for word in words {
            match word {
                "error" => next.error = true,
                "timeout" => next.timeout = true,
                "invalid_header" => next.invalid_header = true,
                "non_idempotent" => next.non_idempotent = true,
                _ => {
                    let status: u16 = word.strip_prefix("http_")?.parse().ok()?;
                    next.statuses |= 1 << NEXT_STATUSES.iter().position(|known| *known == status)?;
                }
            }
        }
        Some(next)
    }
}

/// `add_header name value [always]`
#[derive(Clone, Debug)]
pub struct AddHeader {
    pub name: Box<str>,
    pub value: Template,
    /// Whatever the status; else only with those that nginx lists.
    pub always: bool,
}

impl Directives {
    /// `said`: the map at `path` that says some of `options`, and is told of what is wrong with those.
    pub(super) fn read(
        options: &Options,
        path: &str,
        said: Option<&Map<String, Value>>,
        mistakes: &mut Vec<String>,
    ) -> Directives {
        let mut r = Reader { options, path, said, mistakes };
        // For the VM, which reads it itself.
        r.value("lua_regex_match_limit", "a number", |text| text.parse::<u32>().ok());
        Directives {
            default_type: options.get("default_type").map(Box::from),
            lua_use_default_type: r.on("lua_use_default_type", true),
            lua_code_cache: r.on("lua_code_cache", true),
            lua_need_request_body: r.on("lua_need_request_body", false),
            lua_check_client_abort: r.on("lua_check_client_abort", false),
            lua_http10_buffering: r.on("lua_http10_buffering", true),
            lua_transform_underscores_in_response_headers: r.on("lua_transform_underscores_in_response_headers", true),
            lua_socket_log_errors: r.on("lua_socket_log_errors", true),
            log_subrequest: r.on("log_subrequest", false),
            client_body_in_file_only: matches!(options.get("client_body_in_file_only"), Some("on" | "clean")),
            client_body_buffer_size: r.value("client_body_buffer_size", "a size as 8k", typed::size),
            client_body_timeout: r.duration("client_body_timeout"),
            client_max_body_size: r.value("client_max_body_size", "a size as 1m", typed::size),
            socket: r.patience("lua_socket"),
            socket_keepalive: r.duration("lua_socket_keepalive_timeout"),
            socket_pool_size: r.value("lua_socket_pool_size", "a number from 1", |n| n.parse().ok().filter(|n| *n > 0)),
            proxy: r.patience("proxy"),
            proxy_http11: options.get("proxy_http_version") == Some("1.1"),
            next_upstream: r.next_upstream(),
            proxy_set_header: options.all("proxy_set_header").iter().map(|line| field(line)).collect(),
            proxy_pass_server: options
                .all("proxy_pass_header")
                .iter()
                .any(|name| name.trim().eq_ignore_ascii_case("server")),
            add_header: options.all("add_header").iter().map(|line| added(line)).collect(),
            satisfy_any: r.value("satisfy", "all or any", any).unwrap_or(false),
            auth_request: r.value("auth_request", "off or a path as /auth", path_or_off).flatten(),
            error_page: ErrorPage::read_all(&mut r),
            charset: Charset::read(&r),
            gzip: Gzip::read(&mut r),
            proxy_buffering: r.on("proxy_buffering", true),
            limit_rate: r.value("limit_rate", "a size as 4k, per second", rate),
            limit_rate_after: r.value("limit_rate_after", "a size as 4k", rate),
            absolute_redirect: r.on("absolute_redirect", true),
        }
    }
}

pub(super) struct Reader<'a> {
    pub options: &'a Options,
    path: &'a str,
    said: Option<&'a Map<String, Value>>,
    mistakes: &'a mut Vec<String>,
}

impl Reader<'_> {
    pub fn on(&mut self, name: &str, default: bool) -> bool {
        let read = |text: &str| match text {
            "on" => Some(true),
            "off" => Some(false),
            _ => None,
        };
        self.value(name, "on or off", read).unwrap_or(default)
    }

    fn duration(&mut self, name: &str) -> Option<Duration> {
        self.value(name, "a time as 60s or 100ms", typed::duration)
    }

    fn patience(&mut self, of: &str) -> Patience {
        let mut duration = |what: &str| self.duration(&format!("{of}_{what}_timeout"));
        Patience { connect: duration("connect"), send: duration("send"), read: duration("read") }
    }

    fn next_upstream(&mut self) -> NextUpstream {
        let usual = NextUpstream { error: true, timeout: true, ..NextUpstream::default() };
        NextUpstream {
            tries: self.value("proxy_next_upstream_tries", "a number of tries", |n| n.parse().ok()).unwrap_or(0),
            within: self.duration("proxy_next_upstream_timeout").filter(|limit| !limit.is_zero()),
            ..self.words("proxy_next_upstream", NEXT_WORDS, NextUpstream::parse).unwrap_or(usual)
        }
    }

    /// Of a directive that is one list of words: `[error, timeout]` is that, not two directives.
    fn words<T>(&mut self, name: &str, meant: &str, read: impl FnOnce(&str) -> Option<T>) -> Option<T> {
        let lines = self.options.all(name);
        if lines.is_empty() { None } else { self.read(name, &lines.join(" "), meant, read) }
    }

    pub fn value<T>(&mut self, name: &str, meant: &str, read: impl FnOnce(&str) -> Option<T>) -> Option<T> {
        let text = self.options.get(name)?;
        self.read(name, text, meant, read)
    }

    fn read<T>(&mut self, name: &str, text: &str, meant: &str, read: impl FnOnce(&str) -> Option<T>) -> Option<T> {
        let value = read(text);
        if value.is_none() {
            self.mistake(name, text, meant);
        }
        value
    }

    /// Tells of a value, if it was said here and not for all locations.
    pub fn mistake(&mut self, name: &str, text: &str, meant: &str) {
        if self.said.is_some_and(|said| said.contains_key(name)) {
            self.mistakes.push(format!("{}.{name}: {text:?} is not {meant}", self.path));
        }
    }
}

/// nginx's sizes: `512`, `4k`, `1m`.
pub fn size(text: &[u8]) -> Option<u64> {
    let (digits, factor) = match text.split_last()? {
        (b'k' | b'K', digits) => (digits, 1 << 10),
        (b'm' | b'M', digits) => (digits, 1 << 20),
        _ => (text, 1),
    };
    // No sign and no spaces.
    let plain = digits.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(digits).ok().filter(|_| plain)?.parse::<u64>().ok()?.checked_mul(factor)
}

/// A size, or a text with variables: those are read when a response begins.
fn rate(text: &str) -> Option<Template> {
    let template = Template::parse(text);
    (template.has_variables() || size(text.as_bytes()).is_some()).then_some(template)
}

fn any(text: &str) -> Option<bool> {
    match text {
        "all" => Some(false),
        "any" => Some(true),
        _ => None,
    }
}

fn path_or_off(text: &str) -> Option<Option<Box<str>>> {
    match text {
        "off" => Some(None),
        path => path.starts_with('/').then(|| Some(path.into())),
    }
}

fn field(line: &str) -> (Box<str>, Template) {
    let (name, value) = line.split_once(' ').unwrap_or((line, ""));
    (name.into(), Template::parse(value))
}

fn added(line: &str) -> AddHeader {
    let (name, value) = line.split_once(' ').unwrap_or((line, ""));
    let (value, always) = value.strip_suffix(" always").map_or((value, false), |value| (value, true));
    AddHeader { name: name.into(), value: Template::parse(value), always }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(said: Value) -> (Directives, Vec<String>) {
        let mut mistakes = Vec::new();
        let options = Options::read(said.as_object(), &Options::default());
        (Directives::read(&options, "lua_locations[0].options", said.as_object(), &mut mistakes), mistakes)
    }

    #[test]
    fn defaults_are_those_of_the_modules() {
        let (d, mistakes) = read(json!({}));
        assert!(mistakes.is_empty());
        assert!(d.lua_use_default_type && d.lua_code_cache && d.lua_http10_buffering && d.lua_socket_log_errors);
        assert!(d.lua_transform_underscores_in_response_headers && !d.proxy_http11 && !d.client_body_in_file_only);
        assert!(!d.lua_need_request_body && !d.lua_check_client_abort && !d.log_subrequest);
        assert!(!d.satisfy_any && d.auth_request.is_none() && d.error_page.is_empty() && d.charset.is_none());
        assert!(d.gzip.is_none() && d.proxy_buffering && d.absolute_redirect);
        assert!(d.default_type.is_none() && d.client_body_buffer_size.is_none() && d.socket.connect.is_none());
    }

    #[test]
    fn values_are_read_once() {
        let (d, mistakes) = read(json!({
            "lua_code_cache": "off", "client_body_buffer_size": "8k", "proxy_read_timeout": "100ms",
            "lua_socket_connect_timeout": "3s", "client_body_in_file_only": "clean", "proxy_http_version": 1.1,
            "limit_rate": "4k", "limit_rate_after": "$arg_after",
            "proxy_set_header": [["X-A", "$uri"], "Host a.test", ["Accept-Encoding", ""]],
            "add_header": [["X-B", "1", "always"], ["X-C", "two words"], ["X-D", "always"]],
        }));
        assert!(mistakes.is_empty(), "{mistakes:?}");
        assert!(!d.lua_code_cache && d.client_body_in_file_only && d.proxy_http11);
        assert_eq!(d.client_body_buffer_size, Some(8192));
        assert_eq!(d.limit_rate, Some(Template::parse("4k")));
        assert!(d.limit_rate_after.is_some_and(|after| after.has_variables()));
        assert_eq!((d.proxy.read, d.proxy.send), (Some(Duration::from_millis(100)), None));
        assert_eq!(d.socket.connect, Some(Duration::from_secs(3)));
        let names: Vec<_> = d.proxy_set_header.iter().map(|(name, value)| (&**name, value.clone())).collect();
        let expected = [
            ("X-A", Template::parse("$uri")),
            ("Host", Template::parse("a.test")),
            ("Accept-Encoding", Template::default()),
        ];
        assert_eq!(names, expected);
        let added: Vec<_> = d.add_header.iter().map(|a| (&*a.name, a.value.clone(), a.always)).collect();
        let text = Template::parse;
        assert_eq!(
            added,
            [("X-B", text("1"), true), ("X-C", text("two words"), false), ("X-D", text("always"), false)]
        );
    }

    #[test]
    fn which_tries_are_followed_by_another() {
        let next = |said: Value| {
            let (d, mistakes) = read(said);
            assert!(mistakes.is_empty(), "{mistakes:?}");
            d.next_upstream
        };
        let usual = next(json!({}));
        assert!(usual.error && usual.timeout && !usual.invalid_header && !usual.non_idempotent);
        assert_eq!((usual.tries, usual.within, usual.has_status(502)), (0, None, false));
        let all = next(json!({
            "proxy_next_upstream": "invalid_header http_404 http_500 non_idempotent", "proxy_next_upstream_tries": 3,
            "proxy_next_upstream_timeout": "2s",
        }));
        assert!(all.invalid_header && all.non_idempotent && !all.error && !all.timeout);
        assert!(all.has_status(404) && all.has_status(500) && !all.has_status(403) && !all.has_status(200));
        assert_eq!((all.tries, all.within), (3, Some(Duration::from_secs(2))));
        for list in [json!([["http_429", "error"]]), json!(["http_429", "error"])] {
            let next = next(json!({"proxy_next_upstream": list}));
            assert!(next.has_status(429) && next.error && !next.timeout);
        }
        let off = next(json!({"proxy_next_upstream": "off", "proxy_next_upstream_timeout": "0"}));
        assert_eq!(off, NextUpstream::default());
        for bad in ["http_200", "off error", "", "errors"] {
            let (_, mistakes) = read(json!({"proxy_next_upstream": bad}));
            let start = format!("lua_locations[0].options.proxy_next_upstream: {bad:?} is not error, timeout,");
            assert!(mistakes.len() == 1 && mistakes[0].starts_with(&start), "{mistakes:?}");
        }
        let (_, mistakes) = read(json!({"proxy_next_upstream_tries": "many"}));
        assert_eq!(
            mistakes,
            [r#"lua_locations[0].options.proxy_next_upstream_tries: "many" is not a number of tries"#]
        );
    }

    #[test]
    fn what_cannot_be_read_is_told_with_its_path() {
        let (_, mistakes) = read(json!({
            "lua_code_cache": "never", "client_body_buffer_size": "big", "proxy_send_timeout": "soon",
            "satisfy": "some", "auth_request": "auth", "error_page": [["404", "/x"], ["missing", "/y"]],
            "gzip": "yes", "gzip_comp_level": "10", "gzip_min_length": "-1", "gzip_proxied": "expired",
            "gzip_http_version": "2", "lua_regex_match_limit": "far", "limit_rate": "4g", "limit_rate_after": "+1",
        }));
        assert_eq!(
            mistakes,
            [
                r#"lua_locations[0].options.lua_regex_match_limit: "far" is not a number"#,
                r#"lua_locations[0].options.lua_code_cache: "never" is not on or off"#,
                r#"lua_locations[0].options.client_body_buffer_size: "big" is not a size as 8k"#,
                r#"lua_locations[0].options.proxy_send_timeout: "soon" is not a time as 60s or 100ms"#,
                r#"lua_locations[0].options.satisfy: "some" is not all or any"#,
                r#"lua_locations[0].options.auth_request: "auth" is not off or a path as /auth"#,
                "lua_locations[0].options.error_page: \"missing /y\" is not statuses from 300 to 599 and a path, @name or \
                 URL, as 404 /missing.html or 502 503 =200 @later",
                r#"lua_locations[0].options.gzip: "yes" is not on or off"#,
                r#"lua_locations[0].options.gzip_min_length: "-1" is not a size as 1k"#,
                r#"lua_locations[0].options.gzip_comp_level: "10" is not a level from 1 to 9"#,
                r#"lua_locations[0].options.gzip_http_version: "2" is not 1.0 or 1.1"#,
                r#"lua_locations[0].options.gzip_proxied: "expired" is not off or any"#,
                r#"lua_locations[0].options.limit_rate: "4g" is not a size as 4k, per second"#,
                r#"lua_locations[0].options.limit_rate_after: "+1" is not a size as 4k"#,
            ]
        );
    }
}
