//! Calls of a real client to a real server, both by grpcio, through the gateway: with TLS and without, on either side.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use serde_json::{Value, json};

use super::{
    Gateway, Upstream,
    support::{Dir, run},
};

/// An authority, and who it vouches for. Each pair is a certificate and its key.
struct Pki {
    ca: String,
    front: (String, String),
    node: (String, String),
    gateway: (String, String),
}

impl Pki {
    fn new() -> Pki {
        let mut params = CertificateParams::new(Vec::new()).expect("parameters");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("a CA");
        let signed = |name: &str| {
            let key = KeyPair::generate().expect("a key");
            let mut params = CertificateParams::new([name.to_owned()]).expect("parameters");
            params.distinguished_name.push(DnType::CommonName, name);
            (params.signed_by(&key, &ca).expect("a certificate").pem(), key.serialize_pem())
        };
        Pki { ca: ca.pem(), front: signed("front.test"), node: signed("node.test"), gateway: signed("gateway.test") }
    }

    /// A gateway that serves TLS as front.test, and trusts the authority.
    fn gateway(&self) -> Gateway {
        let dir = Dir::new();
        dir.write("conf/ca.pem", &self.ca);
        dir.configure(json!({"apisix": {"ssl": {"ssl_trusted_certificate": dir.join("conf/ca.pem")}},
            "nginx_config": {"worker_processes": 1}}));
        let gw = Gateway::in_dir(dir);
        gw.put("/ssls/1", json!({"snis": ["front.test"], "cert": self.front.0, "key": self.front.1}));
        gw
    }
}

/// A server that ends with the value.
struct Server {
    child: Child,
    port: u16,
}

impl Server {
    /// With TLS it wants a certificate, too.
    fn start(gw: &Gateway, tls: Option<&Pki>) -> Server {
        let mut command = peer("serve");
        if let Some(pki) = tls {
            for (name, text) in [("key", &pki.node.1), ("cert", &pki.node.0), ("ca", &pki.ca)] {
                let path = gw.dir.join(&format!("node-{name}.pem"));
                fs::write(&path, text).expect("is written");
                command.arg(path);
            }
        }
        let mut child = command.stdout(Stdio::piped()).spawn().expect("python is installed");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("a line");
        let port = line.trim().parse().expect("its port (Debian: python3-grpcio)");
        Server { child, port }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Debian's own python has the module, and not one that comes before it on the path.
fn peer(command: &str) -> Command {
    let system = PathBuf::from("/usr/bin/python3");
    let mut python = Command::new(if system.exists() { system } else { "python3".into() });
    python.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/t/data/grpc_peer.py")).arg(command).stdin(Stdio::null());
    python
}

/// Every kind of call, through the listener without TLS or with it. What the server says of who has asked it.
#[track_caller]
fn ask(gw: &Gateway, pki: Option<&Pki>) -> String {
    let mut command = peer("ask");
    match pki {
        None => drop(command.arg(gw.proxy())),
        Some(_) => drop(command.arg(gw.proxy_tls()).arg(gw.dir.join("conf/ca.pem")).arg("front.test")),
    }
    let (status, text) = run(command);
    assert!(status.success(), "{text}");
    // Behind it comes what the library has to say of pages that are no calls.
    text.lines().next().unwrap_or_default().to_owned()
}

fn routes(gw: &Gateway, server: &Server, upstream: Value) {
    let to = |address: String, more: Value| {
        let mut to =
            json!({"type": "roundrobin", "nodes": {address: 1}, "pass_host": "rewrite", "upstream_host": "node.test"});
        for (key, value) in upstream.as_object().into_iter().chain(more.as_object()).flatten() {
            to[key] = value.clone();
        }
        to
    };
    let up = format!("127.0.0.1:{}", server.port);
    let short = json!({"timeout": {"connect": 30, "send": 30, "read": 0.3}});
    gw.put("/routes/1", json!({"uri": "/t.T/*", "upstream": to(up.clone(), json!({}))}));
    gw.put("/routes/2", json!({"uri": "/t.Dead/*", "upstream": to(Upstream::dead(), json!({}))}));
    let rewrite = json!({"proxy-rewrite": {"uri": "/t.T/slow"}});
    gw.put("/routes/3", json!({"uri": "/t.Slow/*", "plugins": rewrite, "upstream": to(up, short)}));
}

#[test]
fn every_kind_of_call_goes_through_without_tls() {
    let pki = Pki::new();
    let gw = pki.gateway();
    let server = Server::start(&gw, None);
    routes(&gw, &server, json!({"scheme": "grpc"}));
    assert_eq!(ask(&gw, None), "", "nobody has shown a certificate");
    assert_eq!(ask(&gw, Some(&pki)), "");
}

#[test]
fn every_kind_of_call_goes_through_to_a_server_that_wants_a_certificate() {
    let pki = Pki::new();
    let gw = pki.gateway();
    let server = Server::start(&gw, Some(&pki));
    let tls = json!({"client_cert": pki.gateway.0, "client_key": pki.gateway.1, "verify": true});
    routes(&gw, &server, json!({"scheme": "grpcs", "tls": tls}));
    assert_eq!(ask(&gw, None), "gateway.test");
    assert_eq!(ask(&gw, Some(&pki)), "gateway.test");
}

#[test]
fn a_server_is_not_asked_where_either_side_has_the_wrong_certificate() {
    let (pki, other) = (Pki::new(), Pki::new());
    let gw = pki.gateway();
    let server = Server::start(&gw, Some(&pki));
    let refused = |upstream: Value, line: &str| {
        routes(&gw, &server, upstream);
        assert_eq!(gw.send("POST", "/t.T/unary", &[("Content-Type", "application/grpc")], &[0; 5]).status, 502);
        gw.expect_log(line);
    };
    let own = |verify: bool| json!({"client_cert": pki.gateway.0, "client_key": pki.gateway.1, "verify": verify});
    refused(
        json!({"scheme": "grpcs", "tls": own(true), "upstream_host": "elsewhere.test"}),
        "upstream SSL certificate verify error",
    );
    let stranger = json!({"client_cert": other.gateway.0, "client_key": other.gateway.1});
    refused(json!({"scheme": "grpcs", "tls": stranger}), "while");
    refused(json!({"scheme": "grpcs"}), "while");
    routes(&gw, &server, json!({"scheme": "grpcs", "tls": own(false), "upstream_host": "elsewhere.test"}));
    assert_eq!(gw.send("POST", "/t.T/unary", &[("Content-Type", "application/grpc")], &[0; 5]).status, 200);
}
