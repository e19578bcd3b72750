//! nginx configuration in a snippet: its directives line by line, and what takes their place.

use super::report::Verdict::{self, Cannot, Change, Note};

/// A directive that is not inside a block of another one.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Directive {
    /// From 1, within the snippet.
    pub line: usize,
    pub name: String,
    pub args: Vec<String>,
}

/// The directives of a snippet, and of the blocks in it but those of Lua, in their order. Text that is no configuration
/// makes odd directives, never an error.
pub(super) fn directives(text: &str) -> Vec<Directive> {
    let mut reader = Reader { text: text.as_bytes(), at: 0, line: 1 };
    let (mut found, mut words, mut start) = (Vec::new(), Vec::<String>::new(), 1);
    while let Some(token) = reader.next() {
        match token {
            Token::Word(word) => {
                if words.is_empty() {
                    start = reader.line;
                }
                words.push(word);
            }
            Token::End | Token::Open => {
                let opened = words.first().cloned().filter(|_| token == Token::Open).unwrap_or_default();
                if !words.is_empty() {
                    let name = words.remove(0);
                    found.push(Directive { line: start, name, args: std::mem::take(&mut words) });
                }
                if opened.ends_with("_by_lua_block") {
                    reader.skip_lua();
                } else if OF_DATA.contains(&&*opened) {
                    reader.skip_block();
                }
            }
            Token::Close => words.clear(),
        }
    }
    if !words.is_empty() {
        let name = words.remove(0);
        found.push(Directive { line: start, name, args: words });
    }
    found
}

/// Blocks that hold values, not directives.
const OF_DATA: [&str; 5] = ["map", "geo", "split_clients", "types", "upstream"];

#[derive(Debug, PartialEq, Eq)]
enum Token {
    Word(String),
    End,
    Open,
    Close,
}

struct Reader<'a> {
    text: &'a [u8],
    at: usize,
    line: usize,
}

impl Reader<'_> {
    fn next(&mut self) -> Option<Token> {
        loop {
            match *self.text.get(self.at)? {
                b'\n' => {
                    self.line += 1;
                    self.at += 1;
                }
                c if c.is_ascii_whitespace() => self.at += 1,
                b'#' => {
                    while self.text.get(self.at).is_some_and(|c| *c != b'\n') {
                        self.at += 1;
                    }
                }
                c @ (b';' | b'{' | b'}') => {
                    self.at += 1;
                    return Some(match c {
                        b';' => Token::End,
                        b'{' => Token::Open,
                        _ => Token::Close,
                    });
                }
                c @ (b'"' | b'\'') => return Some(Token::Word(self.quoted(c))),
                _ => return Some(Token::Word(self.bare())),
            }
        }
    }

    fn quoted(&mut self, quote: u8) -> String {
        self.at += 1;
        let mut word = Vec::new();
        while let Some(&c) = self.text.get(self.at) {
            self.at += 1;
            match c {
                b'\\' if self.text.get(self.at) == Some(&quote) => {
                    word.push(quote);
                    self.at += 1;
                }
                c if c == quote => break,
                c => {
                    self.line += usize::from(c == b'\n');
                    word.push(c);
                }
            }
        }
        String::from_utf8_lossy(&word).into_owned()
    }

    fn bare(&mut self) -> String {
        let start = self.at;
        while let Some(&c) = self.text.get(self.at) {
            // `${name}` is part of a word.
            let variable = c == b'{' && self.text[..self.at].ends_with(b"$");
            if variable {
                while self.text.get(self.at).is_some_and(|c| !matches!(c, b'}' | b'\n')) {
                    self.at += 1;
                }
                self.at += usize::from(self.text.get(self.at) == Some(&b'}'));
                continue;
            }
            if c.is_ascii_whitespace() || matches!(c, b';' | b'{' | b'}') {
                break;
            }
            self.at += 1;
        }
        String::from_utf8_lossy(&self.text[start..self.at]).into_owned()
    }

    /// To the end of a block.
    fn skip_block(&mut self) {
        let mut depth = 1;
        while depth > 0 {
            match self.next() {
                Some(Token::Open) => depth += 1,
                Some(Token::Close) => depth -= 1,
                Some(_) => {}
                None => return,
            }
        }
    }

    /// To the end of a block of Lua: braces count outside of short strings and comments.
    fn skip_lua(&mut self) {
        let mut depth = 1;
        while let Some(&c) = self.text.get(self.at) {
            match c {
                b'\n' => self.line += 1,
                b'-' if self.text[self.at..].starts_with(b"--") => {
                    while self.text.get(self.at).is_some_and(|c| *c != b'\n') {
                        self.at += 1;
                    }
                    continue;
                }
                b'"' | b'\'' => {
                    self.quoted(c);
                    continue;
                }
                b'{' => depth += 1,
                b'}' => depth -= 1,
                _ => {}
            }
            self.at += 1;
            if depth == 0 {
                return;
            }
        }
    }
}

/// What a directive of nginx needs here. A name that ends with `*` stands for all that begin so; the first that fits counts.
const ADVICE: &[(&str, Verdict, &str)] = &[
    ("lua_shared_dict", Change, "write `name: size` under nginx_config.http.custom_lua_shared_dict"),
    ("lua_package_path", Change, "write it as lua_package_path, or apisix.extra_lua_path"),
    ("lua_package_cpath", Change, "write it as lua_package_cpath, or apisix.extra_lua_cpath"),
    ("init_by_lua*", Change, "write it under lua_init (docs/locations.md)"),
    ("init_worker_by_lua*", Change, "write it under lua_init (docs/locations.md)"),
    ("exit_worker_by_lua*", Change, "write it under lua_init (docs/locations.md)"),
    ("ssl_certificate_by_lua*", Change, "write it under lua_server (docs/locations.md)"),
    ("ssl_client_hello_by_lua*", Change, "write it under lua_server (docs/locations.md)"),
    ("ssl_session_*_by_lua*", Change, "write it under lua_server (docs/locations.md)"),
    ("balancer_by_lua*", Change, "write it under lua_upstreams (docs/locations.md)"),
    ("set_by_lua*", Change, "write it under lua_locations or lua_server (docs/locations.md)"),
    ("rewrite_by_lua*", Change, "write it as a function of serverless-pre-function, or under lua_locations"),
    ("access_by_lua*", Change, "write it as a function of serverless-pre-function, or under lua_locations"),
    ("content_by_lua*", Change, "write it under lua_locations (docs/locations.md)"),
    ("header_filter_by_lua*", Change, "write it as a function of serverless-post-function, or under lua_locations"),
    ("body_filter_by_lua*", Change, "write it as a function of serverless-post-function, or under lua_locations"),
    ("log_by_lua*", Change, "write it as a function of serverless-post-function, or under lua_locations"),
    ("lua_code_cache", Note, "leave it out: code is always kept, and read again on a reload"),
    ("lua_max_*_timers", Change, "write it under lua_options"),
    ("lua_*", Change, "write it under lua_options (docs/locations.md says which have an effect)"),
    ("server", Change, "what it listens on goes to apisix.node_listen or lua_listen, its locations to lua_locations"),
    ("listen", Change, "write the address under apisix.node_listen or lua_listen"),
    ("server_name", Change, "write it as hosts of the routes"),
    ("location", Change, "write it under lua_locations, or as a route (docs/locations.md)"),
    ("upstream", Change, "write it as an upstream object, or under lua_upstreams"),
    ("proxy_pass", Change, "write it as proxy_pass of a location under lua_locations, or as a route's upstream"),
    ("if", Change, "write the condition as vars of a route, or in a function of serverless-pre-function"),
    ("rewrite", Change, "write it as regex_uri of proxy-rewrite or redirect, or under lua_options"),
    ("return", Change, "write it as `return` of a location, or with redirect, mocking or fault-injection"),
    ("set", Change, "write it under `set` of lua_server or lua_locations; a function sets ngx.var.x as it likes"),
    ("map", Change, "write it as a function of serverless-pre-function that sets ngx.var.x"),
    ("geo", Change, "write it as a function of serverless-pre-function with resty.ipmatcher that sets ngx.var.x"),
    ("split_clients", Change, "write it as weighted_upstreams of traffic-split"),
    ("set_real_ip_from", Change, "write the networks under nginx_config.http.real_ip_from"),
    ("real_ip_header", Change, "write it as nginx_config.http.real_ip_header"),
    ("real_ip_recursive", Change, "write it as nginx_config.http.real_ip_recursive"),
    ("log_format", Change, "write the format as nginx_config.http.access_log_format"),
    ("access_log", Change, "write it as nginx_config.http.access_log, or use file-logger or http-logger"),
    ("error_log", Change, "write it as nginx_config.error_log and nginx_config.error_log_level"),
    ("add_header", Change, "write it as headers.add of response-rewrite in a global rule"),
    ("more_set_headers", Change, "write it as headers.set of response-rewrite in a global rule"),
    ("more_clear_headers", Change, "write it as headers.remove of response-rewrite in a global rule"),
    ("more_set_input_headers", Change, "write it as headers.set of proxy-rewrite in a global rule"),
    ("proxy_set_header", Change, "write it as headers.set of proxy-rewrite in a global rule"),
    ("proxy_hide_header", Change, "write it as headers.remove of response-rewrite in a global rule"),
    ("proxy_connect_timeout", Change, "write it as timeout.connect of the upstreams or routes"),
    ("proxy_send_timeout", Change, "write it as timeout.send of the upstreams or routes"),
    ("proxy_read_timeout", Change, "write it as timeout.read of the upstreams or routes"),
    ("proxy_next_upstream*", Change, "write it as retries and retry_timeout of the upstreams"),
    ("proxy_ssl_*", Change, "write it as tls of the upstreams"),
    ("proxy_cache*", Cannot, "there is no cache of answers: keep a cache before or behind the gateway"),
    ("proxy_buffer*", Note, "leave it out: bodies are streamed both ways"),
    ("proxy_busy_buffers_size", Note, "leave it out: bodies are streamed both ways"),
    ("proxy_request_buffering", Note, "leave it out: bodies are streamed both ways"),
    ("proxy_max_temp_file_size", Note, "leave it out: bodies are streamed both ways"),
    ("proxy_http_version", Note, "leave it out: upstreams are spoken to in HTTP/1.1"),
    ("client_max_body_size", Change, "write it as nginx_config.http.client_max_body_size"),
    ("client_body_timeout", Change, "write it as nginx_config.http.client_body_timeout"),
    ("client_header_timeout", Change, "write it as nginx_config.http.client_header_timeout"),
    ("client_body_buffer_size", Note, "leave it out: bodies are streamed unless a plugin reads them"),
    ("send_timeout", Change, "write it as nginx_config.http.send_timeout"),
    ("keepalive_timeout", Change, "write it as nginx_config.http.keepalive_timeout"),
    ("underscores_in_headers", Change, "write it as nginx_config.http.underscores_in_headers"),
    ("server_tokens", Change, "write it as apisix.enable_server_tokens"),
    ("resolver", Change, "write the servers under apisix.dns_resolver"),
    ("resolver_timeout", Change, "write it as apisix.resolver_timeout"),
    ("ssl_protocols", Change, "write it as apisix.ssl.ssl_protocols"),
    ("ssl_certificate*", Change, "write certificate and key as an object of ssls"),
    ("ssl_client_certificate", Change, "write it as client.ca of the object in ssls"),
    ("ssl_verify_client", Change, "write the authorities as client.ca of the object in ssls"),
    ("ssl_session_tickets", Change, "write it as apisix.ssl.ssl_session_tickets"),
    ("ssl_*", Note, "leave it out: the TLS library chooses"),
    ("limit_req*", Change, "use the limit-req plugin"),
    ("limit_conn*", Change, "use the limit-conn plugin"),
    ("limit_rate*", Change, "write it under lua_options, or set ngx.var.limit_rate in a function"),
    ("allow", Change, "use the ip-restriction plugin"),
    ("deny", Change, "use the ip-restriction plugin"),
    ("auth_basic*", Change, "use the basic-auth plugin"),
    ("auth_request*", Change, "write it under options of a location (docs/locations.md), or ask in a function"),
    ("gzip*", Change, "write it under lua_options: it holds for locations; routes do not compress"),
    ("brotli*", Cannot, "there is no brotli: let the upstream compress"),
    ("error_page", Change, "write it under options of a location (docs/locations.md)"),
    ("charset", Change, "write it as nginx_config.http.charset, for locations under lua_options"),
    ("charset_types", Change, "write it under lua_options: it holds for locations"),
    ("charset*", Cannot, "bodies are not converted: let the upstream do it"),
    ("root", Change, "write it under lua_options: what no route is for is looked up there"),
    ("default_type", Change, "write it under lua_options"),
    ("env", Change, "write it under nginx_config.envs"),
    ("worker_rlimit_nofile", Note, "leave it out: the gateway opens as many files as the system lets it"),
    ("worker_connections", Change, "write it as nginx_config.event.worker_connections"),
    ("worker_shutdown_timeout", Change, "write it as nginx_config.worker_shutdown_timeout"),
    ("include", Change, "put the text of the file in its place and check again"),
    ("load_module", Cannot, "nginx's modules are not loaded: write what it does in Lua"),
    ("js_*", Cannot, "there is no njs: write the script in Lua"),
    ("perl*", Cannot, "there is no Perl: write the script in Lua"),
    ("grpc_*", Change, "write it as an upstream whose scheme is grpc or grpcs"),
    ("fastcgi_*", Cannot, "FastCGI is not spoken: put a web server before the application"),
    ("uwsgi_*", Cannot, "uwsgi is not spoken: let the application speak HTTP"),
    ("scgi_*", Cannot, "SCGI is not spoken: let the application speak HTTP"),
    ("memcached_pass", Cannot, "use resty.memcached in a function or a location"),
    ("sub_filter*", Change, "write it as filters of response-rewrite"),
    ("aio", Note, "leave it out"),
    ("sendfile", Note, "leave it out"),
    ("tcp_*", Note, "leave it out"),
    ("reset_timedout_connection", Note, "leave it out"),
    ("large_client_header_buffers", Note, "leave it out: heads have bounds of their own"),
    ("client_header_buffer_size", Note, "leave it out: heads have bounds of their own"),
    ("variables_hash_*", Note, "leave it out"),
    ("map_hash_*", Note, "leave it out"),
    ("types_hash_*", Note, "leave it out"),
    ("server_names_hash_*", Note, "leave it out"),
    ("proxy_headers_hash_*", Note, "leave it out"),
];

/// What becomes of a directive, and what to do.
pub(super) fn advice(name: &str) -> (Verdict, &'static str) {
    let known = ADVICE.iter().find(|(pattern, ..)| fits(pattern, name));
    known.map_or(
        (Change, "there is no nginx that could read it: express it by routes, plugins or Lua (docs/locations.md)"),
        |(_, verdict, advice)| (*verdict, *advice),
    )
}

/// `*` in `pattern` stands for anything.
fn fits(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = name.strip_prefix(first) else { return false };
    if !pattern.contains('*') {
        return rest.is_empty();
    }
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    pattern.ends_with('*') || rest.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directives_are_found_with_their_lines() {
        let text = "# a comment; not {one}\nlua_shared_dict cache 10m;\n\nmap $http_x $y {\n  default \"a;b\";\n  ~^v 1;\n}\n\
                    init_by_lua_block {\n  local s = \"}\" -- }\n  x = { 1 }\n}\naccess_log /var/log/a.log ${main}x";
        let found = directives(text);
        let told: Vec<_> = found.iter().map(|d| format!("{} {} {}", d.line, d.name, d.args.join("|"))).collect();
        assert_eq!(
            told,
            [
                "2 lua_shared_dict cache|10m",
                "4 map $http_x|$y",
                "8 init_by_lua_block ",
                "12 access_log /var/log/a.log|${main}x",
            ]
        );
    }

    #[test]
    fn what_is_no_configuration_does_no_harm() {
        for text in
            ["", "{", "}}}", ";;;", "\"", "a_by_lua_block {", "${", "a ${b", "\u{e9}{\u{e9};", "init_by_lua_block { '"]
        {
            directives(text);
        }
    }

    #[test]
    fn the_advice_fits_the_name() {
        assert_eq!(advice("lua_shared_dict").0, Change);
        assert!(advice("init_worker_by_lua_block").1.contains("lua_init"));
        assert!(advice("ssl_session_fetch_by_lua_file").1.contains("lua_server"));
        assert_eq!(advice("proxy_cache_path").0, Cannot);
        assert_eq!(advice("proxy_buffers").0, Note);
        assert_eq!(advice("set").1, advice("set").1);
        assert!(advice("set_unheard_of").1.contains("docs/locations.md"), "a prefix is no name");
        assert!(advice("made_up").1.starts_with("there is no nginx"));
    }
}
