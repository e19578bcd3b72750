//! TCP and UDP proxying by stream routes.

mod support;

#[path = "stream/admin.rs"]
mod admin;
#[path = "stream/tcp.rs"]
mod tcp;
#[path = "stream/tls.rs"]
mod tls;
#[path = "stream/udp.rs"]
mod udp;

use serde_json::{Value, json};

use support::{Gateway, Upstream};

/// Settings with these TCP and UDP addresses.
fn listening(tcp: Value, udp: Value) -> Value {
    json!({"apisix": {"proxy_mode": "http&stream", "stream_proxy": {"tcp": tcp, "udp": udp}}})
}

/// A gateway with one plain TCP address.
fn gateway() -> Gateway {
    Gateway::with(listening(json!(["127.0.0.1:0"]), json!([])))
}

/// An upstream of one node.
fn to(address: impl Into<String>) -> Value {
    json!({"type": "roundrobin", "nodes": {address.into(): 1}})
}

/// A node that reads to the end, and answers with its name and what it has read.
fn node(name: &'static str) -> Upstream {
    Upstream::serving(move |_, mut stream| {
        let mut text = name.to_owned() + " ";
        let _ = std::io::Read::read_to_string(&mut stream, &mut text);
        let _ = std::io::Write::write_all(&mut stream, text.as_bytes());
    })
}
