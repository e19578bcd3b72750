//! config.yaml's values in the terms of the layers that obey them.

use std::sync::Arc;

use serde_json::Value;

use crate::{
    conf::{Config, Router},
    dns,
    error::Result,
    model, net, proxy,
    router::RouterKind,
    stream, tls,
};

/// The `Server` field.
pub fn server(config: &Config) -> String {
    match config.enable_server_tokens {
        true => concat!("moongate/", env!("CARGO_PKG_VERSION")).to_owned(),
        false => "moongate".to_owned(),
    }
}

/// The `Server` field of the Admin API: APISIX's, since its tools read from it which version of the API they speak to.
pub fn admin_server(config: &Config) -> String {
    match config.enable_server_tokens {
        true => format!("APISIX/{}", crate::admin::APISIX_VERSION),
        false => "APISIX".to_owned(),
    }
}

pub fn router(config: &Config) -> RouterKind {
    match config.router {
        Router::HostUri => RouterKind::RadixtreeHostUri,
        Router::Uri => RouterKind::RadixtreeUri,
        Router::UriWithParameter => RouterKind::RadixtreeUriWithParameter,
    }
}

/// For listeners without TLS, which know HTTP/2 only by `http2`.
pub fn net(config: &Config, http2: bool) -> net::Settings {
    net::Settings {
        header_timeout: config.client.header_timeout,
        body_timeout: config.client.body_timeout,
        send_timeout: config.client.send_timeout,
        keepalive_timeout: config.client.keepalive_timeout,
        max_body: config.client.max_body,
        max_connections: config.worker_connections,
        http2,
        underscores: config.client.underscores_in_headers,
        ..net::Settings::default()
    }
}

pub fn proxy(config: &Config) -> proxy::Settings {
    let timeout = proxy::DEFAULT_TIMEOUT;
    proxy::Settings {
        server: server(config),
        delete_uri_tail_slash: config.delete_uri_tail_slash,
        normalize_uri_like_servlet: config.normalize_uri_like_servlet,
        match_uri_encoded_slash: config.match_uri_encoded_slash,
        graphql_max: config.graphql_max,
        posted_max: config.posted_max,
        show_upstream_status: config.show_upstream_status,
        keepalive: keepalive(config),
        timeout: model::route::Timeouts { connect: timeout, send: timeout, read: timeout },
        trusted: config.trusted_addresses.clone(),
        real_ip: config.real_ip.clone(),
    }
}

pub fn stream(config: &Config) -> stream::Settings {
    stream::Settings {
        max_connections: config.worker_connections,
        real_ip_from: config.stream.real_ip_from.clone(),
        fallback_sni: config.tls.fallback_sni.as_deref().map(Box::from),
        // Known once they are bound.
        udp_listeners: Vec::new(),
    }
}

pub fn keepalive(config: &Config) -> model::upstream::Keepalive {
    let keepalive = &config.upstream_keepalive;
    model::upstream::Keepalive { size: keepalive.size, idle_timeout: keepalive.timeout, requests: keepalive.requests }
}

/// Whether nodes of upstreams are checked: `apisix.disable_upstream_healthcheck`.
pub fn checks_health(config: &Config) -> bool {
    let disabled = config.json.pointer("/apisix/disable_upstream_healthcheck").and_then(Value::as_bool) == Some(true);
    if disabled {
        tracing::info!("disabled upstream healthcheck");
    }
    !disabled
}

pub fn dns(config: &Config) -> dns::Config {
    dns::Config {
        servers: config.resolver.servers.clone(),
        valid: config.resolver.valid,
        timeout: config.resolver.timeout,
        search: config.json.pointer("/apisix/enable_resolv_search_opt").and_then(Value::as_bool).unwrap_or(true),
    }
}

/// What answers handshakes, for listeners that speak one of these (`tls::ServerOptions::alpn`).
pub fn tls(config: &Config, alpn: &'static [&'static [u8]]) -> Result<Arc<tls::Server>> {
    let options = tls::ServerOptions {
        protocols: config.tls.protocols.iter().map(|name| name.as_str().into()).collect(),
        session_tickets: config.tls.session_tickets,
        fallback_sni: config.tls.fallback_sni.as_deref().map(Box::from),
        alpn,
    };
    tls::Server::new(options).map(Arc::new)
}
