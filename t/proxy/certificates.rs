//! Certificates of X.509 version 1, as `openssl x509 -req` makes them: of nodes, of clients, the gateway's own.

use std::{
    io::Write,
    net::TcpStream,
    process::{Child, Command, Stdio},
};

use rustls_pki_types::pem::PemObject;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{Dir, Gateway, Reply, eventually, ports::free_port};

/// Two authorities (`ca`, `other`), and certificates of version 1 that they have signed.
struct Pki(TempDir);

impl Pki {
    fn new() -> Pki {
        let pki = Pki(TempDir::new().expect("a directory"));
        for ca in ["ca", "other"] {
            pki.run(&format!(
                "req -x509 -newkey rsa:2048 -nodes -keyout {ca}.key -out {ca}.crt -subj /CN={ca} -days 30"
            ));
        }
        pki
    }

    fn run(&self, words: &str) {
        let out = Command::new("openssl").args(words.split(' ')).current_dir(self.0.path()).output();
        let out = out.expect("openssl is installed (Debian: openssl)");
        assert!(out.status.success(), "openssl {words}: {}", String::from_utf8_lossy(&out.stderr));
    }

    /// `name.crt` and `name.key`. `key`: `rsa:2048`, or `ec` with a curve.
    fn issue(&self, name: &str, ca: &str, key: &str) {
        self.run(&format!("req -newkey {key} -nodes -keyout {name}.key -out {name}.csr -subj /CN=test.com"));
        self.run(&format!(
            "x509 -req -in {name}.csr -CA {ca}.crt -CAkey {ca}.key -CAcreateserial -days 30 -out {name}.crt"
        ));
        let der =
            rustls_pki_types::CertificateDer::from_pem_file(self.path(&format!("{name}.crt"))).expect("a certificate");
        let (_, cert) = x509_parser::parse_x509_certificate(&der).expect("a certificate");
        assert_eq!(cert.version(), x509_parser::x509::X509Version::V1, "what this is about");
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    fn text(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).expect("a file")
    }

    /// A node with the certificate `name` that answers every GET with 200, until it is dropped.
    fn node(&self, name: &str, more: &[&str]) -> Node {
        let port = free_port();
        let child = Command::new("openssl")
            .args(["s_server", "-quiet", "-www", "-accept", &format!("127.0.0.1:{port}")])
            .args(["-cert", &format!("{name}.crt"), "-key", &format!("{name}.key")])
            .args(more)
            .current_dir(self.0.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("openssl is installed (Debian: openssl)");
        let node = Node { child, port };
        eventually("the node listens", || TcpStream::connect(("127.0.0.1", port)).ok());
        node
    }

    /// What a client of openssl with the certificate `name` reads from there.
    fn ask(&self, address: &str, name: &str, more: &[&str]) -> String {
        let mut child = Command::new("openssl")
            .args(["s_client", "-quiet", "-ign_eof", "-servername", "test.com", "-connect", address])
            .args(["-cert", &format!("{name}.crt"), "-key", &format!("{name}.key")])
            .args(more)
            .current_dir(self.0.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("openssl is installed (Debian: openssl)");
        let mut stdin = child.stdin.take().expect("a pipe");
        // It may have gone by then.
        let _ = stdin.write_all(b"GET /x HTTP/1.1\r\nHost: test.com\r\nConnection: close\r\n\r\n");
        let out = child.wait_with_output().expect("ends");
        String::from_utf8_lossy(&out.stdout).into_owned()
    }
}

struct Node {
    child: Child,
    port: u16,
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn upstream(node: &Node) -> Value {
    json!({"scheme": "https", "nodes": {format!("127.0.0.1:{}", node.port): 1}})
}

fn error(reply: &Reply) -> String {
    reply.json()["error_msg"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn nodes_may_have_certificates_of_version_1() {
    let pki = Pki::new();
    pki.issue("rsa", "ca", "rsa:2048");
    pki.issue("ec", "ca", "ec -pkeyopt ec_paramgen_curve:P-256");
    let gw = Gateway::start();
    for name in ["rsa", "ec"] {
        for version in ["-tls1_2", "-tls1_3"] {
            let node = pki.node(name, &[version]);
            gw.put("/routes/1", json!({"uri": "/x", "upstream": upstream(&node)}));
            assert_eq!(gw.get("/x").status, 200, "{name} {version}: {}", gw.log());
        }
    }
}

#[test]
fn nodes_that_ask_for_a_certificate_get_one_of_version_1() {
    let pki = Pki::new();
    pki.issue("node", "ca", "rsa:2048");
    pki.issue("mine", "ca", "rsa:2048");
    let gw = Gateway::start();
    for version in ["-tls1_2", "-tls1_3"] {
        let node = pki.node("node", &[version, "-Verify", "1", "-verify_return_error", "-CAfile", "ca.crt"]);
        let mut upstream = upstream(&node);
        gw.put("/routes/1", json!({"uri": "/x", "upstream": upstream}));
        assert_eq!(gw.get("/x").status, 502, "without one");
        upstream["tls"] = json!({"client_cert": pki.text("mine.crt"), "client_key": pki.text("mine.key")});
        gw.put("/routes/1", json!({"uri": "/x", "upstream": upstream}));
        assert_eq!(gw.get("/x").status, 200, "{version}: {}", gw.log());
    }
}

#[test]
fn clients_and_the_gateway_may_have_certificates_of_version_1() {
    let pki = Pki::new();
    for (name, ca) in [("server", "ca"), ("client", "ca"), ("stranger", "other")] {
        pki.issue(name, ca, "rsa:2048");
    }
    let gw = Gateway::start();
    let up = crate::support::Upstream::echo();
    gw.route("1", "/x", &up, json!({}));
    let mut ssl = json!({"sni": "test.com", "cert": pki.text("server.crt"), "key": pki.text("client.key")});
    let refused = gw.admin("PUT", "/ssls/1", ssl.clone());
    assert_eq!((refused.status, &*error(&refused)), (400, "failed to parse key: key and certificate do not match"));
    ssl["key"] = pki.text("server.key").into();
    ssl["client"] = json!({"ca": pki.text("ca.crt")});
    gw.put("/ssls/1", ssl.clone());
    for version in ["-tls1_2", "-tls1_3"] {
        let ask = |name: &str| pki.ask(&gw.proxy_tls(), name, &[version]);
        assert!(ask("client").starts_with("HTTP/1.1 200"), "{version}: {}", gw.log());
        assert_eq!(ask("stranger"), "", "another authority's: {version}");
        // The authority's name is not enough, its signature counts.
        pki.run("req -x509 -newkey rsa:2048 -nodes -keyout false.key -out false.crt -subj /CN=ca -days 30");
        pki.issue("impostor", "false", "rsa:2048");
        assert_eq!(ask("impostor"), "", "{version}");
    }
    // An authority that is its own client.
    assert!(pki.ask(&gw.proxy_tls(), "ca", &[]).starts_with("HTTP/1.1 200"), "{}", gw.log());
    assert_eq!(pki.ask(&gw.proxy_tls(), "other", &[]), "");
}

#[test]
fn the_admin_api_may_have_a_certificate_of_version_1() {
    let pki = Pki::new();
    for (name, ca) in [("server", "ca"), ("client", "ca"), ("stranger", "other")] {
        pki.issue(name, ca, "rsa:2048");
    }
    let dir = Dir::new();
    let mtls = json!({"admin_ssl_cert": pki.path("server.crt"), "admin_ssl_cert_key": pki.path("server.key"),
        "admin_ssl_ca_cert": pki.path("ca.crt")});
    dir.configure(json!({"deployment": {"admin": {"https_admin": true, "admin_api_mtls": mtls}}}));
    let gw = Gateway::in_dir(dir);
    let served = pki.ask(&gw.admin_address(), "client", &[]);
    assert!(served.starts_with("HTTP/1.1 401"), "without a key: {served} {}", gw.log());
    assert_eq!(pki.ask(&gw.admin_address(), "stranger", &[]), "");
}
