//! Scripts that have a say in TLS handshakes, with a real client: rustls.

#[path = "handshake/secrets.rs"]
mod secrets;
mod support;

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    process::Command,
    sync::{Arc, Mutex},
    time::Duration,
};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, CertifiedKey, IsCa, KeyPair};
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, HandshakeKind, SignatureScheme, StreamOwned,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature},
};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use serde_json::{Value, json};
use support::{DEADLINE, Dir, Gateway, Upstream, eventually, http2};

/// What the server has shown.
#[derive(Clone, Debug, Default)]
struct Shown {
    certificate: Vec<u8>,
    ocsp: Vec<u8>,
}

/// Trusts every certificate and remembers it; whether the server has its key is checked.
#[derive(Debug)]
struct Trusting {
    provider: Arc<CryptoProvider>,
    /// What it can check; empty: all that the library can.
    schemes: Vec<SignatureScheme>,
    shown: Arc<Mutex<Shown>>,
}

impl ServerCertVerifier for Trusting {
    fn verify_server_cert(
        &self,
        cert: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        *self.shown.lock().expect("no panic") = Shown { certificate: cert.to_vec(), ocsp: ocsp.to_vec() };
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        match self.schemes.is_empty() {
            true => self.provider.signature_verification_algorithms.supported_schemes(),
            false => self.schemes.clone(),
        }
    }
}

/// A client that keeps its sessions from connection to connection.
struct Browser {
    config: Arc<ClientConfig>,
    shown: Arc<Mutex<Shown>>,
}

const BOTH: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS12, &rustls::version::TLS13];

impl Browser {
    fn new() -> Self {
        Self::with(BOTH, None)
    }

    fn with(versions: &[&'static rustls::SupportedProtocolVersion], own: Option<&CertifiedKey<KeyPair>>) -> Self {
        Self::checking(Vec::new(), versions, own)
    }

    /// One that can check these signatures alone.
    fn checking(
        schemes: Vec<SignatureScheme>,
        versions: &[&'static rustls::SupportedProtocolVersion],
        own: Option<&CertifiedKey<KeyPair>>,
    ) -> Self {
        let provider = Arc::new(ring::default_provider());
        let shown = Arc::new(Mutex::default());
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(versions)
            .expect("versions")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Trusting { provider, schemes, shown: shown.clone() }));
        let mut config = match own {
            Some(pair) => builder
                .with_client_auth_cert(
                    vec![pair.cert.der().clone()],
                    PrivatePkcs8KeyDer::from(pair.signing_key.serialize_der()).into(),
                )
                .expect("a client's certificate"),
            None => builder.with_no_client_auth(),
        };
        config.resumption = Resumption::in_memory_sessions(16);
        Browser { config: Arc::new(config), shown }
    }

    /// Does the handshake; the error is what the client says of it.
    fn connect(&self, gw: &Gateway, name: &'static str) -> Result<Page, String> {
        let stream = TcpStream::connect(gw.proxy_tls()).map_err(|e| e.to_string())?;
        stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
        let name = ServerName::try_from(name).expect("a name");
        let connection = ClientConnection::new(self.config.clone(), name).expect("a client");
        let mut tls = StreamOwned::new(connection, stream);
        while tls.conn.is_handshaking() {
            tls.conn.complete_io(&mut tls.sock).map_err(|e| e.to_string())?;
        }
        let shown = self.shown.lock().expect("no panic").clone();
        Ok(Page { tls, shown })
    }

    /// The body of `/t` over a new connection.
    #[track_caller]
    fn get(&self, gw: &Gateway, name: &'static str) -> String {
        self.connect(gw, name).expect("a connection").get("/t", name).1
    }
}

struct Page {
    tls: StreamOwned<ClientConnection, TcpStream>,
    shown: Shown,
}

impl Page {
    /// Status and body of one request; the connection stays.
    fn get(&mut self, path: &str, host: &str) -> (u16, String) {
        write!(self.tls, "GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n").expect("sent");
        let (mut text, mut some) = (Vec::new(), [0; 4096]);
        loop {
            let all = String::from_utf8_lossy(&text).into_owned();
            if let Some((head, body)) = all.split_once("\r\n\r\n") {
                let length = head.to_ascii_lowercase().split_once("content-length: ").map(|(_, rest)| {
                    rest.split("\r\n").next().and_then(|n| n.parse::<usize>().ok()).expect("a length")
                });
                let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
                if length.is_some_and(|n| body.len() >= n) || (chunked && body.ends_with("0\r\n\r\n")) {
                    let status = head[9..12].parse().expect("a status");
                    let body = if chunked { body.split("\r\n").nth(1).unwrap_or_default() } else { body };
                    return (status, body.trim_end().to_owned());
                }
            }
            let n = self.tls.read(&mut some).expect("an answer");
            assert!(n > 0, "the connection ended after {all:?}");
            text.extend_from_slice(&some[..n]);
        }
    }

    fn resumed(&self) -> bool {
        self.tls.conn.handshake_kind() == Some(HandshakeKind::Resumed)
    }
}

fn pair(name: &str) -> CertifiedKey<KeyPair> {
    rcgen::generate_simple_self_signed([name.to_owned()]).expect("a certificate")
}

fn write_pair(dir: &Dir, name: &str, pair: &CertifiedKey<KeyPair>) {
    dir.write(&format!("conf/{name}.crt"), pair.cert.pem());
    dir.write(&format!("conf/{name}.key"), pair.signing_key.serialize_pem());
}

/// Reads `conf/NAME.crt` and `.key` and sets them.
const SET: &str = "
    local ssl = require('ngx.ssl')
    local function file(name)
        local f = assert(io.open(ngx.config.prefix() .. 'conf/' .. name))
        local text = f:read('*a')
        f:close()
        return text
    end
    local function set(name)
        assert(ssl.set_cert(assert(ssl.parse_pem_cert(file(name .. '.crt')))))
        assert(ssl.set_priv_key(assert(ssl.parse_pem_priv_key(file(name .. '.key')))))
    end
";

/// A gateway whose handshakes run `server`, with one location `/t` that runs `content`, and the certificate `any` in its conf/.
fn gateway(server: Value, content: &str) -> (Gateway, CertifiedKey<KeyPair>) {
    let dir = Dir::new();
    let any = pair("any.test");
    write_pair(&dir, "any", &any);
    let mut settings = json!({
        "lua_server": server,
        "lua_shared_dict": {"notes": "1m"},
        "lua_locations": [{"location": "= /t", "content_by_lua": content}],
    });
    if let Some(more) = settings["lua_server"].as_object_mut().and_then(|server| server.remove("settings")) {
        for (key, value) in more.as_object().expect("a map") {
            settings[key] = value.clone();
        }
    }
    dir.configure(settings);
    (Gateway::in_dir(dir), any)
}

#[test]
fn a_script_brings_the_certificate_and_may_wait_for_it() {
    let upstream =
        Upstream::answering(|_| "HTTP/1.0 200 OK\r\nConnection: close\r\nContent-Length: 9\r\n\r\nfrom afar");
    let port = upstream.addr().rsplit(':').next().expect("a port").to_owned();
    let script = format!(
        "{SET}
        local sock = ngx.socket.tcp()
        assert(sock:connect('127.0.0.1', {port}))
        assert(sock:send('GET / HTTP/1.0\\r\\nHost: a\\r\\n\\r\\n'))
        local answer = assert(sock:receive('*a'))
        ngx.sleep(0.001)
        ngx.ctx.found = answer:match('from afar')
        ngx.ctx.phase = ngx.get_phase()
        ngx.log(ngx.WARN, 'asked for ', (ssl.server_name()))
        set('any')"
    );
    let content = "local ctx = ngx.ctx ngx.say(ctx.found, ' ', ctx.phase, ' ', tostring(ctx.mine)) ctx.mine = 1";
    let (gw, any) = gateway(json!({"ssl_certificate_by_lua": script}), content);
    let mut page = Browser::new().connect(&gw, "some.test").expect("a connection");
    assert_eq!(page.shown.certificate, any.cert.der().as_ref());
    assert_eq!(page.get("/t", "some.test"), (200, "from afar ssl_cert nil".into()));
    assert_eq!(page.get("/t", "some.test").1, "from afar ssl_cert nil", "what a request sets is its own");
    gw.expect_log("asked for some.test, context: ssl_certificate_by_lua*, client: 127.0.0.1, server: 127.0.0.1:");
}

#[test]
fn names_with_an_object_keep_its_certificate_unless_the_script_says_otherwise() {
    let script = format!("{SET} if ssl.server_name() == 'mine.test' then set('any') end");
    let (gw, any) = gateway(json!({"ssl_certificate_by_lua": script}), "ngx.say('ok')");
    let own = pair("own.test");
    for (id, name) in [("1", "own.test"), ("2", "mine.test")] {
        let object = json!({"snis": [name], "cert": own.cert.pem(), "key": own.signing_key.serialize_pem()});
        gw.put(&format!("/ssls/{id}"), object);
    }
    let browser = Browser::new();
    let show = |name| browser.connect(&gw, name).expect("a connection").shown.certificate;
    assert_eq!(show("own.test"), own.cert.der().as_ref());
    assert_eq!(show("mine.test"), any.cert.der().as_ref());
    assert!(browser.connect(&gw, "none.test").is_err(), "neither has one");
}

#[test]
fn a_script_that_fails_ends_the_handshake_and_no_other() {
    let script = format!(
        "{SET} local name = ssl.server_name()
        if name == 'raise.test' then error('on purpose') end
        if name == 'exit.test' then return ngx.exit(ngx.ERROR) end
        if name == 'endless.test' then while true do end end
        if name == 'bad.test' then
            local chain, err = ssl.parse_pem_cert('no certificate')
            local der, err2 = ssl.parse_der_cert('no certificate')
            local key, err3 = ssl.parse_pem_priv_key('no key')
            local der_key, err4 = ssl.parse_der_priv_key('no key')
            ngx.log(ngx.ERR, tostring(chain or der or key or der_key), ' ', err, ' ', err2, ' ', err3, ' ', err4)
            return
        end
        set('any')
        if name == 'cleared.test' then ssl.clear_certs() end
        if name == 'other.test' then assert(ssl.set_priv_key(assert(ssl.parse_pem_priv_key(file('other.key'))))) end
        if name == 'fine.test' then return ngx.exit(ngx.OK) end"
    );
    let server = json!({"ssl_certificate_by_lua": script, "settings": {"lua": {"limits": {"cpu_ms": 100}}}});
    let (gw, _) = gateway(server, "ngx.say('ok')");
    write_pair(&gw.dir, "other", &pair("other.test"));
    let browser = Browser::new();
    for (name, log) in [
        ("raise.test", "lua entry thread aborted: runtime error: ssl_certificate_by_lua:"),
        ("exit.test", "ssl_certificate_by_lua*: lua exit with code -1, context: ssl_certificate_by_lua*"),
        ("endless.test", "the script ran longer than lua.limits.cpu_ms allows"),
        ("cleared.test", "the certificates were cleared and none was set"),
        ("other.test", "the certificate or its key cannot be used"),
        (
            "bad.test",
            "nil PEM_read_bio_X509_AUX() failed d2i_X509_bio() failed PEM_read_bio_PrivateKey() failed d2i_PrivateKey_bio() failed",
        ),
    ] {
        assert!(browser.connect(&gw, name).is_err(), "{name}");
        gw.expect_log(log);
        assert_eq!(browser.get(&gw, "fine.test"), "ok", "after {name}");
    }
    assert_eq!(gw.send("GET", "/t", &[], b"").status, 200, "plain connections have no handshake");
}

#[test]
fn a_handshake_waits_no_longer_than_a_head() {
    let server = json!({
        "ssl_client_hello_by_lua": "ngx.sleep(3600)",
        "settings": {"nginx_config": {"http": {"client_header_timeout": "300ms"}}},
    });
    let (gw, _) = gateway(server, "ngx.say('ok')");
    assert!(Browser::new().connect(&gw, "any.test").is_err());
    gw.expect_log("handshake timed out");
}

#[test]
fn the_first_message_is_there_for_a_script() {
    let hello = "
        local hello = require('ngx.ssl.clienthello')
        local name = hello.get_client_hello_server_name()
        local function has(list, what)
            for _, one in ipairs(list) do if one == what then return true end end
            return false
        end
        if name == 'refused.test' then return ngx.exit(ngx.ERROR) end
        if name == 'old.test' then assert(hello.set_protocols({'TLSv1.1', 'TLSv1.2'})) end
        local ok, err = hello.set_protocols({'TLSv9'})
        local ok2, err2 = hello.set_protocols(name == 'old.test' and {'TLSv1.2'} or {'TLSv1.2', 'TLSv1.3'})
        ngx.ctx.seen = table.concat({ name, ngx.get_phase(), tostring(ok), tostring(err), tostring(ok2),
            tostring(has(hello.get_supported_versions(), 'TLSv1.3')), tostring(has(hello.get_client_hello_ciphers(), 0x1301)),
            tostring(has(hello.get_client_hello_ext_present(), 0)), #hello.get_client_hello_ext(0),
            tostring(hello.get_client_hello_ext(9999)), tostring(hello.get_client_hello_ext(-1)) }, ' ')";
    let certificate = format!("{SET} ngx.ctx.version = ssl.get_tls1_version_str() set('any')");
    let content = "local ssl = require('ngx.ssl')
        local _, err = pcall(require('ngx.ssl.clienthello').get_client_hello_ciphers)
        ngx.say(ngx.ctx.seen, ' ', ngx.ctx.version, ' ', ssl.get_tls1_version_str(), ' ', err)";
    let (gw, _) = gateway(json!({"ssl_client_hello_by_lua": hello, "ssl_certificate_by_lua": certificate}), content);
    let seen = "ssl_client_hello nil invalid protocols failed true true true true";
    let disabled = "API disabled in the context of content_by_lua*";
    let browser = Browser::new();
    assert_eq!(browser.get(&gw, "new.test"), format!("new.test {seen} 13 nil nil TLSv1.3 TLSv1.3 {disabled}"));
    assert_eq!(browser.get(&gw, "old.test"), format!("old.test {seen} 13 nil nil TLSv1.2 TLSv1.2 {disabled}"));
    assert!(browser.connect(&gw, "refused.test").is_err());
}

#[test]
fn requests_know_their_handshake() {
    let certificate = format!("{SET} ngx.ctx.random = ssl.get_client_random() set('any')");
    let content = "local ssl = require('ngx.ssl')
        local function shown(bytes, kind) return table.concat({ bytes:byte(1, -1) }, '.') .. ' ' .. kind end
        local ciphers = ssl.get_req_shared_ssl_ciphers()
        local none, why = ssl.get_req_ssl_pointer()
        ngx.say(shown(ssl.raw_client_addr()), ' ', shown(ssl.raw_server_addr()), ' ',
            ssl.server_port() == tonumber(ngx.var.server_port), ' ', ssl.get_tls1_version(), ' ', #ssl.get_client_random(),
            ' ', ssl.get_client_random() == ngx.ctx.random, ' ', ssl.get_client_random(0), ' ', #ssl.get_client_random(5), ' ',
            #ciphers > 3, ' ', ssl.server_name(), ' ', tostring(none), ' ', why)";
    let (gw, _) = gateway(json!({"ssl_certificate_by_lua": certificate}), content);
    assert_eq!(
        Browser::new().get(&gw, "a.test"),
        "127.0.0.1 inet 127.0.0.1 inet true 772 32 true 32 5 true a.test nil not supported: the TLS library is not OpenSSL"
    );
}

/// An authority and a certificate that it has signed.
fn signed(name: &str) -> (String, CertifiedKey<KeyPair>) {
    let mut params = CertificateParams::new([]).expect("parameters");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("an authority");
    let signing_key = KeyPair::generate().expect("a key");
    let params = CertificateParams::new([name.to_owned()]).expect("parameters");
    let cert = params.signed_by(&signing_key, &issuer).expect("a certificate");
    (issuer.pem(), CertifiedKey { cert, signing_key })
}

#[test]
fn a_script_asks_for_the_certificate_of_the_client() {
    let certificate = format!(
        "{SET} set('any')
        if ssl.server_name() == 'nobody.test' then assert(ssl.verify_client()) return end
        local ca = assert(ssl.parse_pem_cert(file('ca.crt')))
        local ok, err = ssl.verify_client(ca, 1)
        if not ok then ngx.log(ngx.ERR, 'not asked: ', err) end"
    );
    let (gw, _) = gateway(json!({"ssl_certificate_by_lua": certificate}), "ngx.say(ngx.var.ssl_client_verify)");
    let (authority, friend) = signed("friend");
    gw.dir.write("conf/ca.crt", &authority);
    let stranger = pair("stranger");
    assert_eq!(Browser::with(BOTH, Some(&friend)).get(&gw, "a.test"), "SUCCESS");
    assert_eq!(Browser::with(BOTH, None).get(&gw, "a.test"), "NONE");
    for versions in [&[&rustls::version::TLS12][..], &[&rustls::version::TLS13]] {
        let said = Browser::with(versions, Some(&stranger)).get(&gw, "a.test");
        assert!(said.starts_with("FAILED:"), "{said}");
    }
    assert!(Browser::with(BOTH, Some(&friend)).get(&gw, "nobody.test").starts_with("FAILED:"));
    let browser = Browser::with(BOTH, Some(&friend));
    assert_eq!(browser.get(&gw, "a.test"), "SUCCESS");
    let mut again = browser.connect(&gw, "a.test").expect("a connection");
    assert_eq!((again.get("/t", "a.test").1.as_str(), again.resumed()), ("SUCCESS", false), "asked each time");

    let own = pair("strict.test");
    gw.put(
        "/ssls/1",
        json!({"snis": ["strict.test"], "cert": own.cert.pem(), "key": own.signing_key.serialize_pem(), "client": {"ca": own.cert.pem()}}),
    );
    let old = Browser::with(&[&rustls::version::TLS12], None);
    eventually("the object counts", || old.connect(&gw, "strict.test").err());
    gw.expect_log("not asked: the certificate's object has client.ca");
    let (status, _) = Browser::new().connect(&gw, "a.test").expect("a connection").get("/t", "strict.test");
    assert_eq!(status, 400, "no way around the object's check by another name");
}

#[test]
fn an_ocsp_response_goes_along_with_either_certificate() {
    let certificate = format!(
        "{SET} if ssl.server_name() ~= 'own.test' then set('any') end
        local ocsp = require('ngx.ocsp')
        local _, err = ocsp.set_ocsp_status_resp(('x'):rep(65537))
        ngx.log(ngx.WARN, err)
        local ok, warning = ocsp.set_ocsp_status_resp('a response')
        ngx.log(ngx.WARN, 'stapled: ', tostring(ok), ' ', tostring(warning))"
    );
    let (gw, _) = gateway(json!({"ssl_certificate_by_lua": certificate}), "ngx.say('ok')");
    let own = pair("own.test");
    gw.put("/ssls/1", json!({"snis": ["own.test"], "cert": own.cert.pem(), "key": own.signing_key.serialize_pem()}));
    for name in ["a.test", "own.test"] {
        assert_eq!(Browser::new().connect(&gw, name).expect("a connection").shown.ocsp, b"a response", "{name}");
    }
    gw.expect_log("an OCSP response has 1 to 65536 bytes");
    gw.expect_log("stapled: true nil");
}

/// Runs openssl with these words, in `conf/`.
#[track_caller]
fn openssl(dir: &Dir, words: &str) {
    let mut command = Command::new("openssl");
    let out = command.current_dir(dir.join("conf")).args(words.split_whitespace()).output();
    let out = out.expect("openssl is installed");
    assert!(out.status.success(), "{words}: {}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn an_ocsp_response_goes_along_with_the_certificate_that_it_is_about() {
    let dir = Dir::new();
    let make = |words: &str| openssl(&dir, words);
    make("req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -subj /CN=ca -days 30");
    dir.write("conf/extensions", "subjectAltName=DNS:a.test");
    dir.write("conf/index", "V\t400101000000Z\t\t1001\tunknown\t/CN=rsa\nV\t400101000000Z\t\t1002\tunknown\t/CN=ec\n");
    for (name, serial, key) in [("rsa", "1001", "rsa:2048"), ("ec", "1002", "ec -pkeyopt ec_paramgen_curve:P-256")] {
        make(&format!("req -newkey {key} -nodes -keyout {name}.key -out {name}.csr -subj /CN={name}"));
        make(&format!(
            "x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -set_serial 0x{serial} -days 30 -extfile extensions -out {name}.pem"
        ));
        make(&format!(
            "ocsp -index index -CA ca.pem -rsigner ca.pem -rkey ca.key -issuer ca.pem -cert {name}.pem -respout {name}.test"
        ));
    }
    dir.write("conf/none.test", "no response");
    let read = |name: &str| dir.read(&format!("conf/{name}"));
    let object = json!({"snis": ["*.test"], "cert": read("rsa.pem"), "key": read("rsa.key"),
        "certs": [read("ec.pem")], "keys": [read("ec.key")]});
    let script = format!("{SET} assert(require('ngx.ocsp').set_ocsp_status_resp(file(ssl.server_name())))");
    dir.configure(json!({"lua_server": {"ssl_certificate_by_lua": script}}));
    let gw = Gateway::in_dir(dir);
    gw.put("/ssls/1", object);
    for versions in [&[&rustls::version::TLS12][..], &[&rustls::version::TLS13]] {
        let stapled = |scheme, name| {
            let browser = Browser::checking(vec![scheme], versions, None);
            !browser.connect(&gw, name).expect("a connection").shown.ocsp.is_empty()
        };
        for (name, with_rsa, with_ec) in
            [("rsa.test", true, false), ("ec.test", false, true), ("none.test", true, false)]
        {
            assert_eq!(stapled(SignatureScheme::RSA_PSS_SHA256, name), with_rsa, "{name} {versions:?}");
            assert_eq!(stapled(SignatureScheme::ECDSA_NISTP256_SHA256, name), with_ec, "{name} {versions:?}");
        }
    }
}

#[test]
fn handshakes_count_for_the_memory_of_their_vm() {
    let script = format!(
        "leak = leak or {{}}
        leak[#leak + 1] = ('x'):rep(256 * 1024) .. #leak
        {SET} if ssl.server_name() == 'fails.test' then return ngx.exit(ngx.ERROR) end
        set('any')"
    );
    let server = json!({
        "ssl_certificate_by_lua": script,
        "settings": {"lua": {"limits": {"memory_mb": 40}}, "nginx_config": {"worker_processes": 1}},
    });
    let (gw, _) = gateway(server, "ngx.say(#leak)");
    let full = |browser: &Browser| browser.get(&gw, "a.test").parse::<usize>().expect("a number");
    let browser = Browser::with(BOTH, None);
    assert_eq!(full(&browser), 1);
    // Those that fail count as well; one VM is looked at every 256 of them.
    for _ in 0..256 {
        assert!(browser.connect(&gw, "fails.test").is_err());
    }
    gw.expect_log("the plugin VM holds more than lua.limits.memory_mb (40): it is replaced");
    assert!(full(&Browser::new()) < 10);
}

/// Sessions in files: they outlive the process.
const SESSIONS: &str = "
    local session = require('ngx.ssl.session')
    local id = assert(session.get_session_id())
    local name = ngx.config.prefix() .. 'data/' .. ngx.md5(id)
";

#[test]
fn sessions_live_where_scripts_keep_them() {
    for versions in [&[&rustls::version::TLS12][..], &[&rustls::version::TLS13]] {
        let store = format!(
            "{SESSIONS} local f = assert(io.open(name, 'wb'))
            f:write(assert(session.get_serialized_session()))
            f:close()
            ngx.log(ngx.WARN, 'kept in ', ngx.get_phase())"
        );
        let fetch = format!(
            "{SESSIONS} local f = io.open(name, 'rb')
            if not f then return end
            local text = f:read('*a')
            f:close()
            ngx.sleep(0.001)
            local ok, err = session.set_serialized_session('moongate-session-2:' .. text)
            ngx.log(ngx.WARN, 'another form: ', tostring(ok), ' ', err)
            assert(session.set_serialized_session(text))
            ngx.log(ngx.WARN, 'found in ', ngx.get_phase())"
        );
        let certificate = format!("{SET} set('any') ngx.log(ngx.WARN, 'a full handshake')");
        let server = json!({
            "ssl_session_store_by_lua": store, "ssl_session_fetch_by_lua": fetch, "ssl_certificate_by_lua": certificate,
            "settings": {"apisix": {
                "node_listen": [{"ip": "127.0.0.1", "port": 0}],
                "control": {"ip": "127.0.0.1", "port": 0},
                "ssl": {"listen": [{"ip": "127.0.0.1", "port": 0}], "ssl_session_tickets": false},
            }},
        });
        let (mut gw, _) = gateway(server, "ngx.say(ngx.var.ssl_session_reused)");
        let browser = Browser::with(versions, None);
        assert_eq!(browser.get(&gw, "a.test"), ".");
        gw.expect_log("kept in ssl_session_store, context: ssl_session_store_by_lua*");
        gw.kill();
        gw.launch();
        let mut page = browser.connect(&gw, "a.test").expect("a connection");
        assert_eq!((page.get("/t", "a.test").1.as_str(), page.resumed()), ("r", true), "{versions:?}");
        gw.expect_log("found in ssl_session_fetch, context: ssl_session_fetch_by_lua*");
        gw.expect_log("another form: nil failed to de-serialize session");
        assert_eq!(gw.log().matches("a full handshake").count(), 1, "a session needs no certificate");
        assert_eq!(Browser::with(versions, None).get(&gw, "a.test"), ".");
        eventually("the line of the second full handshake", || {
            (gw.log().matches("a full handshake").count() == 2).then_some(())
        });
    }
}

#[test]
fn a_ticket_needs_no_certificate_either() {
    for versions in [&[&rustls::version::TLS12][..], &[&rustls::version::TLS13]] {
        let certificate = format!("{SET} set('any') ngx.log(ngx.WARN, 'a full handshake')");
        let (gw, _) = gateway(json!({"ssl_certificate_by_lua": certificate}), "ngx.say(ngx.var.ssl_session_reused)");
        let browser = Browser::with(versions, None);
        assert_eq!(browser.get(&gw, "a.test"), ".");
        let mut page = browser.connect(&gw, "a.test").expect("a connection");
        assert_eq!((page.get("/t", "a.test").1.as_str(), page.resumed()), ("r", true), "{versions:?}");
        gw.expect_log("a full handshake");
        assert_eq!(gw.log().matches("a full handshake").count(), 1);
    }
}

#[test]
fn what_is_no_handshake_is_refused_as_ever() {
    let (gw, _) = gateway(json!({"ssl_client_hello_by_lua": "ngx.log(ngx.WARN, 'ran')"}), "ngx.say('ok')");
    let mut stream = TcpStream::connect(gw.proxy_tls()).expect("a connection");
    stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
    stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").expect("sent");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("the end");
    assert!(answer.first().is_none_or(|kind| *kind == 21), "an alert or nothing: {answer:?}");
    gw.expect_log("while SSL handshaking");
    assert!(!gw.log().contains("ran"));
    assert!(Browser::new().connect(&gw, "a.test").is_err(), "no certificate for the name");
    gw.expect_log("failed to match any SSL certificate by SNI: a.test");
    gw.expect_log("ran");
}

#[test]
fn requests_do_not_wait_for_what_keeps_sessions() {
    let server = json!({
        "ssl_session_store_by_lua": "ngx.log(ngx.WARN, 'waits') ngx.sleep(3600)",
        "ssl_certificate_by_lua": format!("{SET} set('any')"),
        "settings": {"nginx_config": {"http": {"client_header_timeout": "300ms"}}},
    });
    let (gw, _) = gateway(server, "ngx.say('ok')");
    let mut page = Browser::with(&[&rustls::version::TLS12], None).connect(&gw, "a.test").expect("a connection");
    gw.expect_log("waits");
    assert_eq!(page.get("/t", "a.test"), (200, "ok".into()));
}

#[test]
fn what_belongs_to_requests_is_refused_before_there_is_one() {
    let calls = [
        "return ngx.var.host",
        "ngx.var.foo = 1",
        "ngx.header['X-A'] = 'b'",
        "ngx.status = 403",
        "return ngx.status",
        "return ngx.req.get_headers()",
        "return ngx.req.get_method()",
        "ngx.req.set_header('X-A', 'b')",
        "ngx.say('x')",
        "return ngx.req.get_uri_args()",
        "return ngx.location.capture('/t')",
    ];
    let tried: Vec<_> = calls.iter().map(|call| format!("refused(function() {call} end)")).collect();
    let script = format!(
        "{SET} set('any')
        local n, answered = 0, {{}}
        local function refused(f)
            n = n + 1
            if pcall(f) then answered[#answered + 1] = n end
        end
        {}
        ngx.log(ngx.WARN, 'answered of ', n, ': ', table.concat(answered, ' '), ';')",
        tried.join("\n")
    );
    let (gw, _) = gateway(json!({"ssl_certificate_by_lua": script}), "ngx.say('ok')");
    assert_eq!(Browser::new().get(&gw, "a.test"), "ok");
    gw.expect_log(&format!("answered of {}: ;", calls.len()));
}

#[test]
fn a_name_that_gets_an_object_is_checked_on_old_connections_too() {
    let (gw, _) = gateway(json!({"ssl_certificate_by_lua": format!("{SET} set('any')")}), "ngx.say('ok')");
    let mut page = Browser::new().connect(&gw, "late.test").expect("a connection");
    assert_eq!(page.get("/t", "late.test").0, 200);
    let own = pair("late.test");
    gw.put(
        "/ssls/1",
        json!({"snis": ["late.test"], "cert": own.cert.pem(), "key": own.signing_key.serialize_pem(), "client": {"ca": own.cert.pem()}}),
    );
    assert_eq!(page.get("/t", "late.test").0, 400);
}

#[test]
fn what_a_handshake_left_outlives_its_vm_as_far_as_it_is_plain() {
    let script = format!(
        "{SET} set('any')
        ngx.ctx.verdict, ngx.ctx.list, ngx.ctx.f = 'limited', {{ 1, 2 }}, function() return 'called' end"
    );
    let content = "local ctx = ngx.ctx ngx.say(ctx.verdict, ' ', #ctx.list, ' ', ctx.f and ctx.f() or 'gone')";
    let (gw, _) = gateway(json!({"ssl_certificate_by_lua": script}), content);
    let mut page = Browser::new().connect(&gw, "a.test").expect("a connection");
    assert_eq!(page.get("/t", "a.test").1, "limited 2 called");
    let source = "local _M = { version = 0.1, priority = 1, name = 'new', schema = { type = 'object' } } return _M";
    assert_eq!(gw.admin_text("PUT", "/plugin_sources/new", source, "text/plain").status, 201);
    eventually("another VM serves", || (page.get("/t", "a.test").1 == "limited 2 gone").then_some(()));
}

/// A client's memory that offers whatever session it has to every name.
#[derive(Debug)]
struct Careless(rustls::client::ClientSessionMemoryCache);

fn one_name() -> ServerName<'static> {
    ServerName::try_from("one.test").expect("a name")
}

impl rustls::client::ClientSessionStore for Careless {
    fn set_kx_hint(&self, _: ServerName<'static>, _: rustls::NamedGroup) {}

    fn kx_hint(&self, _: &ServerName<'_>) -> Option<rustls::NamedGroup> {
        None
    }

    fn set_tls12_session(&self, _: ServerName<'static>, value: rustls::client::Tls12ClientSessionValue) {
        self.0.set_tls12_session(one_name(), value);
    }

    fn tls12_session(&self, _: &ServerName<'_>) -> Option<rustls::client::Tls12ClientSessionValue> {
        self.0.tls12_session(&one_name())
    }

    fn remove_tls12_session(&self, _: &ServerName<'static>) {}

    fn insert_tls13_ticket(&self, _: ServerName<'static>, value: rustls::client::Tls13ClientSessionValue) {
        self.0.insert_tls13_ticket(one_name(), value);
    }

    fn take_tls13_ticket(&self, _: &ServerName<'static>) -> Option<rustls::client::Tls13ClientSessionValue> {
        self.0.take_tls13_ticket(&one_name())
    }
}

#[test]
fn sessions_are_for_their_name_and_their_checks() {
    let script = format!("{SET} set('any') if ssl.server_name() == 'asked.test' then assert(ssl.verify_client()) end");
    let (gw, _) = gateway(json!({"ssl_certificate_by_lua": script}), "ngx.say(ngx.var.ssl_client_verify)");
    for versions in [&[&rustls::version::TLS12][..], &[&rustls::version::TLS13]] {
        let mut browser = Browser::with(versions, None);
        let config = Arc::get_mut(&mut browser.config).expect("its own");
        config.resumption = Resumption::store(Arc::new(Careless(rustls::client::ClientSessionMemoryCache::new(16))));
        let resumed = |name| {
            let mut page = browser.connect(&gw, name).expect("a connection");
            page.get("/t", name);
            page.resumed()
        };
        assert_eq!([resumed("a.test"), resumed("a.test"), resumed("b.test")], [false, true, false], "{versions:?}");
        assert_eq!([resumed("asked.test"), resumed("asked.test")], [false, false], "{versions:?}");
    }
}

#[test]
fn a_handshake_that_is_given_up_leaves_nothing() {
    let server = json!({
        "ssl_client_hello_by_lua": "ngx.log(ngx.WARN, 'waits') ngx.sleep(3600)",
        "settings": {"nginx_config": {"http": {"client_header_timeout": "100ms"}, "worker_processes": 1}},
    });
    let (gw, _) = gateway(server, "ngx.say('ok')");
    for _ in 0..10 {
        assert!(Browser::new().connect(&gw, "a.test").is_err());
    }
    leaves_nothing(&gw);
    assert!(gw.log().matches("] ssl_client_hello_by_lua:1: waits").count() >= 10);
}

/// Waits until nothing runs in the gateway's VMs.
#[track_caller]
fn leaves_nothing(gw: &Gateway) {
    let vms = || {
        let workers = support::get(&gw.control(), "/v1/lua").json()["workers"].as_array().cloned().expect("workers");
        workers.iter().flat_map(|w| w["vms"].as_array().cloned().expect("vms")).collect::<Vec<_>>()
    };
    eventually("nothing is left", || {
        let left = |vm: &Value| vm["coroutines"]["in_use"] == 0 && vm["requests"] == 0 && vm["light_threads"] == 0;
        vms().iter().all(left).then_some(())
    });
}

/// A gateway whose certificate script waits for a word of the peer at the listener.
fn waiting_for_a_peer() -> (Gateway, TcpListener) {
    let peer = TcpListener::bind("127.0.0.1:0").expect("a port");
    let script = format!(
        "{SET} local sock = ngx.socket.tcp()
        assert(sock:connect('127.0.0.1', {}))
        sock:settimeout(3600000)
        assert(sock:receive())
        set('any')",
        peer.local_addr().expect("an address").port()
    );
    let server = json!({"ssl_certificate_by_lua": script, "settings": {"nginx_config": {"worker_processes": 1}}});
    (gateway(server, "ngx.say('ok')").0, peer)
}

/// A client of TLS 1.3 that has sent its first message.
fn begun(gw: &Gateway) -> (ClientConnection, TcpStream) {
    let config = Browser::with(&[&rustls::version::TLS13], None).config;
    let name = ServerName::try_from("a.test").expect("a name");
    let mut conn = ClientConnection::new(config, name).expect("a client");
    let mut stream = TcpStream::connect(gw.proxy_tls()).expect("a connection");
    stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
    conn.write_tls(&mut stream).expect("sent");
    (conn, stream)
}

#[test]
fn a_script_that_waits_ends_with_its_client() {
    let (gw, listener) = waiting_for_a_peer();
    for resets in [false, true] {
        let (_, client) = begun(&gw);
        let (mut peer, _) = listener.accept().expect("the script comes");
        if resets {
            socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO)).expect("an option");
        }
        drop(client);
        peer.set_read_timeout(Some(DEADLINE)).expect("a timeout");
        let ended = peer.read(&mut [0]);
        assert!(ended.as_ref().is_ok_and(|n| *n == 0), "the script's socket is closed: {ended:?}");
    }
    eventually("both are told of", || {
        let told = gw.log().matches("the client has gone while a script of its handshake waited").count();
        (told == 2).then_some(())
    });
    leaves_nothing(&gw);
}

#[test]
fn what_a_client_sends_while_a_script_waits_is_not_lost() {
    const CHANGE_CIPHER_SPEC: [u8; 6] = [20, 3, 3, 0, 1, 1];
    let (gw, listener) = waiting_for_a_peer();
    let (mut conn, mut stream) = begun(&gw);
    let (mut peer, _) = listener.accept().expect("the script comes");
    // The client's next message begins with this, whatever the gateway answers (RFC 8446, D.4).
    let (early, rest) = CHANGE_CIPHER_SPEC.split_at(3);
    stream.write_all(early).expect("sent");
    peer.write_all(b"go on\n").expect("sent");
    let mut second = Vec::new();
    while conn.is_handshaking() {
        conn.read_tls(&mut stream).expect("an answer");
        conn.process_new_packets().expect("a valid one");
        while conn.wants_write() {
            conn.write_tls(&mut second).expect("written");
        }
    }
    assert!(second.starts_with(&CHANGE_CIPHER_SPEC));
    stream.write_all(rest).expect("sent");
    stream.write_all(&second[CHANGE_CIPHER_SPEC.len()..]).expect("sent");
    let mut page = Page { tls: StreamOwned::new(conn, stream), shown: Shown::default() };
    assert_eq!(page.get("/t", "a.test"), (200, "ok".into()));
}

/// A client's certificate with everything fixed but its key.
fn client_pair() -> CertifiedKey<KeyPair> {
    let mut params = CertificateParams::new(Vec::new()).expect("parameters");
    params.serial_number = Some(vec![0x0a, 0xbc, 0xde].into());
    (params.not_before, params.not_after) = (rcgen::date_time_ymd(2020, 1, 5), rcgen::date_time_ymd(2126, 1, 5));
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::CountryName, "DE");
    params.distinguished_name.push(rcgen::DnType::OrganizationName, "a+b, \"Köln\"");
    params.distinguished_name.push(rcgen::DnType::CommonName, "# one/two ");
    let signing_key = KeyPair::generate().expect("a key");
    let cert = params.self_signed(&signing_key).expect("a certificate");
    CertifiedKey { cert, signing_key }
}

#[test]
fn requests_know_the_handshake_and_the_clients_certificate() {
    let script = format!("{SET} set('any') assert(ssl.verify_client())");
    let content = "
        local out = {}
        for name in ngx.var.arg_names:gmatch('[^,]+') do out[#out + 1] = tostring(ngx.var['ssl_' .. name]) end
        ngx.print(table.concat(out, '|'))";
    let (gw, _) = gateway(json!({"ssl_certificate_by_lua": script}), content);
    let own = client_pair();
    let mut page = Browser::with(BOTH, Some(&own)).connect(&gw, "any.test").expect("a connection");
    let mut is = |names: &str, expected: &str| {
        assert_eq!(page.get(&format!("/t?names={names}"), "any.test").1, expected, "{names}");
    };
    is("client_serial", "0ABCDE");
    is("client_s_dn", r#"CN=\# one/two\ ,O=a\+b\, \"K\C3\B6ln\",C=DE"#);
    is("client_i_dn_legacy", r#"/C=DE/O=a\+b, "K\xC3\xB6ln"/CN=# one\/two"#);
    is("client_v_start,client_v_end", "Jan  5 00:00:00 2020 GMT|Jan  5 00:00:00 2126 GMT");
    is("client_verify", "FAILED:self-signed certificate");
    is("protocol,curve,session_reused,session_id", "TLSv1.3|X25519|.|nil");
    is("server_name,early_data,alpn_protocol", "any.test|nil|nil");
    is("client_raw_cert", own.cert.pem().replace("\r\n", "\n").trim_end());
    let ciphers = page.get("/t?names=ciphers", "any.test").1;
    assert!(
        ciphers.contains("TLS_AES_256_GCM_SHA384:") && ciphers.contains("ECDHE-ECDSA-AES128-GCM-SHA256"),
        "{ciphers}"
    );
    let curves = page.get("/t?names=curves", "any.test").1;
    assert!(curves.starts_with("X25519:prime256v1:secp384r1"), "{curves}");
    let none = Browser::new().connect(&gw, "any.test").expect("a connection");
    let mut none = none;
    let names = "client_verify,client_serial,client_s_dn,client_fingerprint,client_cert,client_v_remain";
    assert_eq!(none.get(&format!("/t?names={names}"), "any.test").1, "NONE|nil|nil|nil|nil|nil");
}

#[test]
fn a_resumed_session_of_tls_12_has_the_id_that_the_client_sent() {
    let script = format!("{SET} set('any')");
    let content = "ngx.print(ngx.var.ssl_session_reused, ' ', tostring(ngx.var.ssl_session_id))";
    let server =
        json!({"ssl_certificate_by_lua": script, "settings": {"apisix": {"ssl": {"ssl_session_tickets": false}}}});
    let (gw, _) = gateway(server, content);
    let browser = Browser::with(&[&rustls::version::TLS12], None);
    assert_eq!(browser.get(&gw, "any.test"), ". nil");
    let resumed = browser.get(&gw, "any.test");
    let id = resumed.strip_prefix("r ").expect("resumed");
    assert!(id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit()), "{resumed}");
}

#[test]
fn both_ends_derive_the_same_key_material() {
    let script = format!("{SET} set('any')");
    let content = "
        local ssl = require('ngx.ssl')
        local function show(key, err) return key and ngx.encode_base64(key) or 'nil ' .. err end
        ngx.print(table.concat({
            show(ssl.export_keying_material(16, 'EXPERIMENTAL my label', '\\0\\1\\2\\3')),
            show(ssl.export_keying_material(40, 'EXPERIMENTAL my label')),
            show(ssl.export_keying_material(8160, 'EXPERIMENTAL long')):sub(1, 8),
            show(ssl.export_keying_material(0, 'x')),
            show(ssl.export_keying_material(8161, 'x')),
            show(ssl.export_keying_material_early(16, 'x')),
        }, '|'))";
    let (gw, _) = gateway(json!({"ssl_certificate_by_lua": script}), content);
    for version in BOTH {
        let mut page = Browser::with(&[version], None).connect(&gw, "any.test").expect("a connection");
        let key = |len: usize, label: &[u8], context: Option<&[u8]>| {
            let key = page.tls.conn.export_keying_material(vec![0u8; len], label, context).expect("a key");
            base64::Engine::encode(&base64::engine::general_purpose::STANDARD, key)
        };
        let mine = key(16, b"EXPERIMENTAL my label", Some(&[0, 1, 2, 3]));
        let bare = key(40, b"EXPERIMENTAL my label", None);
        let long = key(8160, b"EXPERIMENTAL long", None)[..8].to_owned();
        let bounds =
            "nil the length is 1 to 8160|nil the length is 1 to 8160|nil there is no early data: 0-RTT is not offered";
        assert_eq!(page.get("/t", "any.test").1, format!("{mine}|{bare}|{long}|{bounds}"), "{version:?}");
    }
    let shared = http2::runtime().block_on(async {
        let mut config = ClientConfig::clone(&Browser::new().config);
        config.alpn_protocols = vec![b"h2".to_vec()];
        let tcp = tokio::net::TcpStream::connect(gw.proxy_tls()).await.expect("a connection");
        let name = ServerName::try_from("any.test").expect("a name");
        let tls = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, tcp).await.expect("a handshake");
        let context = Some(&[0, 1, 2, 3][..]);
        let key = tls.get_ref().1.export_keying_material([0u8; 16], b"EXPERIMENTAL my label", context).expect("a key");
        let mine = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, key);
        (mine, http2::get_over(tls, "https://any.test/t").await.text())
    });
    assert_eq!(shared.1.split('|').next(), Some(&*shared.0), "over HTTP/2");
    let plain = gw.send("GET", "/t", &[], b"").text();
    assert!(plain.starts_with("nil bad ssl conn|nil bad ssl conn"), "{plain}");
}

#[test]
fn a_socket_trusts_the_authorities_that_a_script_names() {
    let content = format!(
        "{SET}
        local function try(store, name, verify)
            local sock = ngx.socket.tcp()
            assert(sock:connect('127.0.0.1', ngx.var.server_port))
            if store ~= nil then assert(sock:settrustedstore(store)) end
            local session, err = sock:sslhandshake(nil, name or 'any.test', verify ~= false)
            return session and 'trusted' or err, sock
        end
        local x509 = require('resty.openssl.x509')
        local own, other = assert(ssl.parse_pem_cert(file('any.crt'))), assert(ssl.parse_pem_cert(file('other.crt')))
        local store = require('resty.openssl.x509.store').new()
        local empty = pcall(function() return store.ctx end)
        assert(store:add(assert(x509.new(file('other.crt')))))
        local wrong = store.ctx
        assert(store:add(assert(x509.new(file('any.crt')))))
        local first, sock = try(own)
        local session, pointer = sock:getsslsession(), select(2, sock:getsslpointer())
        local bad, err = sock:settrustedstore('x')
        assert(sock:settrustedstore(nil))
        local plain = ngx.socket.tcp()
        plain:connect('127.0.0.1', ngx.var.server_port)
        ngx.print(table.concat({{ first, (try(own, 'none.test')), (try(nil)), (try(other)), (try(other, nil, false)), (try(wrong)),
            (try(store.ctx)), tostring(empty), type(session), pointer, tostring(bad), err,
            select(2, plain:getsslsession()) }}, '|'))"
    );
    let (gw, _) = gateway(json!({"ssl_certificate_by_lua": format!("{SET} set('any')")}), &content);
    write_pair(&gw.dir, "other", &pair("other.test"));
    let unknown = "20: unable to get local issuer certificate";
    // It has the same name.
    let wrong = "7: certificate signature failure";
    assert_eq!(
        Browser::new().get(&gw, "any.test"),
        format!(
            "trusted|certificate host mismatch|{unknown}|{wrong}|trusted|{wrong}|trusted|false|cdata|\
             not supported: the TLS library is not OpenSSL|nil|bad store arg: cdata expected, got string|not an SSL connection"
        )
    );
}

/// A TLS server with this certificate that asks for the client's and answers with its length.
fn asking(pair: &CertifiedKey<KeyPair>) -> Upstream {
    telling(asking_config(pair))
}

/// A server's configuration that asks for the client's certificate and takes any.
fn asking_config(pair: &CertifiedKey<KeyPair>) -> rustls::ServerConfig {
    #[derive(Debug)]
    struct Any(Arc<CryptoProvider>);
    impl rustls::server::danger::ClientCertVerifier for Any {
        fn root_hint_subjects(&self) -> &[rustls::DistinguishedName] {
            &[]
        }
        fn client_auth_mandatory(&self) -> bool {
            false
        }
        fn verify_client_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: UnixTime,
        ) -> Result<rustls::server::danger::ClientCertVerified, rustls::Error> {
            Ok(rustls::server::danger::ClientCertVerified::assertion())
        }
        fn verify_tls12_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
        }
        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
        }
        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.0.signature_verification_algorithms.supported_schemes()
        }
    }
    let provider = Arc::new(ring::default_provider());
    let key = PrivatePkcs8KeyDer::from(pair.signing_key.serialize_der()).into();
    rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(BOTH)
        .expect("versions")
        .with_client_cert_verifier(Arc::new(Any(provider)))
        .with_single_cert(vec![pair.cert.der().clone()], key)
        .expect("a certificate")
}

/// A TLS server that says the length of the client's certificate and the version, and then the cipher suite.
fn telling(config: rustls::ServerConfig) -> Upstream {
    let config = Arc::new(config);
    Upstream::serving(move |_, stream| {
        let mut tls = StreamOwned::new(rustls::ServerConnection::new(config.clone()).expect("a server"), stream);
        if tls.conn.complete_io(&mut tls.sock).is_ok() {
            let shown = tls.conn.peer_certificates().map_or(0, |certs| certs[0].len());
            let version = tls.conn.protocol_version();
            let suite = tls.conn.negotiated_cipher_suite().map(|suite| suite.suite());
            let _ = writeln!(tls, "{shown} {version:?}\n{suite:?}");
            let _ = tls.read(&mut [0]);
        }
    })
}

#[test]
fn sockets_of_a_location_speak_tls_as_it_says() {
    let issuer = {
        let mut params = CertificateParams::new([]).expect("parameters");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign, rcgen::KeyUsagePurpose::CrlSign];
        CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("an authority")
    };
    let server = {
        let signing_key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(["peer.test".to_owned()]).expect("parameters");
        params.serial_number = Some(7.into());
        CertifiedKey { cert: params.signed_by(&signing_key, &issuer).expect("a certificate"), signing_key }
    };
    let revoked = |serial: u64| {
        let one = rcgen::RevokedCertParams {
            serial_number: serial.into(),
            revocation_time: rcgen::date_time_ymd(2020, 1, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let params = rcgen::CertificateRevocationListParams {
            this_update: rcgen::date_time_ymd(2020, 1, 1),
            next_update: rcgen::date_time_ymd(2120, 1, 1),
            crl_number: 1.into(),
            issuing_distribution_point: None,
            revoked_certs: vec![one],
            key_identifier_method: rcgen::KeyIdMethod::Sha256,
        };
        params.signed_by(&issuer).expect("a list").pem().expect("a text")
    };
    let peer = asking(&server);
    let own = pair("client.test");
    let dir = Dir::new();
    dir.write("conf/ca.pem", issuer.pem());
    dir.write("conf/this.crl", revoked(7));
    dir.write("conf/other.crl", revoked(8));
    write_pair(&dir, "own", &own);
    let content = format!(
        "local sock = ngx.socket.tcp()
        assert(sock:connect('127.0.0.1', {}))
        local ok, err = sock:sslhandshake(nil, 'peer.test', true)
        ngx.print(ok and sock:receive() or err)",
        peer.addr().rsplit(':').next().expect("a port")
    );
    let location =
        |path: &str, options: Value| json!({"location": path, "content_by_lua": content, "options": options});
    dir.configure(json!({"lua_locations": [
        location("= /none", json!({})),
        location("= /ca", json!({"lua_ssl_trusted_certificate": "ca.pem"})),
        location("= /revoked", json!({"lua_ssl_trusted_certificate": "ca.pem", "lua_ssl_crl": "this.crl"})),
        location("= /valid", json!({"lua_ssl_trusted_certificate": "ca.pem", "lua_ssl_crl": "other.crl"})),
        location("= /own", json!({
            "lua_ssl_trusted_certificate": "ca.pem", "lua_ssl_protocols": "TLSv1.1 TLSv1.2",
            "lua_ssl_certificate": "own.crt", "lua_ssl_certificate_key": "own.key",
        })),
    ]}));
    let gw = Gateway::in_dir(dir);
    let got = |path: &str| gw.get(path).text();
    assert_eq!(got("/none"), "20: unable to get local issuer certificate");
    assert_eq!(got("/ca"), "0 Some(TLSv1_3)");
    assert_ne!(got("/revoked"), "0 Some(TLSv1_3)");
    assert_eq!(got("/valid"), "0 Some(TLSv1_3)");
    assert_eq!(got("/own"), format!("{} Some(TLSv1_2)", own.cert.der().len()));

    let dir = Dir::new();
    dir.write("conf/no.pem", "no certificate");
    dir.configure(json!({
        "lua_options": {"lua_ssl_trusted_certificate": "missing.pem"},
        "lua_locations": [location("= /a", json!({"lua_ssl_crl": "no.pem"})), location("= /b", json!({}))],
    }));
    let mut command = dir.command();
    command.arg("test");
    let (status, said) = support::run(command);
    assert!(!status.success());
    assert!(
        said.contains("lua_locations[0].options.lua_ssl_crl: ") && said.contains("no.pem holds nothing in PEM"),
        "{said}"
    );
    assert_eq!(said.matches("lua_options.lua_ssl_trusted_certificate: ").count(), 1, "{said}");
}

/// A root, and as many authorities below it as said, each the issuer of the next; the last of them comes last.
fn authorities(below: usize) -> Vec<CertifiedIssuer<'static, KeyPair>> {
    let params = |name: String| {
        let mut params = CertificateParams::new([]).expect("parameters");
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
        params
    };
    let key = || KeyPair::generate().expect("a key");
    let mut all = vec![CertifiedIssuer::self_signed(params("root".into()), key()).expect("a root")];
    for i in 0..below {
        let next = CertifiedIssuer::signed_by(params(format!("below {i}")), key(), &all[i]).expect("an authority");
        all.push(next);
    }
    all
}

/// Sends a script of a location to `peer.test` on `upstream`, which tells what it has got.
fn visit(upstream: &Upstream, path: &str, options: Value) -> Value {
    let port = upstream.addr().rsplit(':').next().expect("a port").to_owned();
    let content = format!(
        "local sock = ngx.socket.tcp()
        assert(sock:connect('127.0.0.1', {port}))
        if ngx.var.arg_store then
            local file = assert(io.open(ngx.config.prefix() .. 'conf/ca.pem'))
            assert(sock:settrustedstore(assert(require('ngx.ssl').parse_pem_cert(file:read('*a')))))
        end
        local ok, err = sock:sslhandshake(nil, 'peer.test', ngx.var.arg_verify ~= 'no')
        if not ok then return ngx.print(err) end
        sock:receive()
        ngx.print(sock:receive())"
    );
    json!({"location": path, "content_by_lua": content, "options": options})
}

#[test]
fn a_chain_is_as_long_as_a_location_says() {
    let all = authorities(2);
    let signing_key = KeyPair::generate().expect("a key");
    let params = CertificateParams::new(["peer.test".to_owned()]).expect("parameters");
    let cert = params.signed_by(&signing_key, &all[2]).expect("a certificate");
    let chain = vec![cert.der().clone(), all[2].der().clone(), all[1].der().clone()];
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(BOTH)
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(chain, PrivatePkcs8KeyDer::from(signing_key.serialize_der()).into())
        .expect("a certificate");
    let peer = telling(config);
    let dir = Dir::new();
    dir.write("conf/ca.pem", all[0].pem());
    dir.write("conf/both.pem", all[0].pem() + &all[1].pem());
    let trusting =
        |file: &str, depth: Value| json!({"lua_ssl_trusted_certificate": file, "lua_ssl_verify_depth": depth});
    dir.configure(json!({"lua_options": {"lua_ssl_protocols": "TLSv1.3"}, "lua_locations": [
        visit(&peer, "= /usual", json!({"lua_ssl_trusted_certificate": "ca.pem"})),
        visit(&peer, "= /none", trusting("ca.pem", json!(0))),
        visit(&peer, "= /one", trusting("ca.pem", json!("1"))),
        visit(&peer, "= /two", trusting("ca.pem", json!(2))),
        visit(&peer, "= /near", trusting("both.pem", json!(1))),
        visit(&peer, "= /unknown", json!({"lua_ssl_verify_depth": 5})),
    ]}));
    let gw = Gateway::in_dir(dir);
    let got = |path: &str| gw.get(path).text();
    let too_long = "22: certificate chain too long";
    for path in ["/usual", "/none", "/one", "/usual?store=own", "/one?store=own"] {
        assert_eq!(got(path), too_long, "{path}");
    }
    for path in ["/two", "/near", "/two?store=own", "/unknown?store=own", "/none?verify=no"] {
        assert_eq!(got(path), "Some(TLS13_AES_256_GCM_SHA384)", "{path}");
    }
    assert_eq!(got("/unknown"), "20: unable to get local issuer certificate");
}

#[test]
fn ciphers_are_those_that_a_location_lists() {
    let own = pair("peer.test");
    let speaking = |suites: &[rustls::CipherSuite], versions: &[&'static rustls::SupportedProtocolVersion]| {
        let mut provider = ring::default_provider();
        provider.cipher_suites.retain(|suite| suites.contains(&suite.suite()));
        // The client's order counts.
        let mut config = rustls::ServerConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(versions)
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(
                vec![own.cert.der().clone()],
                PrivatePkcs8KeyDer::from(own.signing_key.serialize_der()).into(),
            )
            .expect("a certificate");
        config.ignore_client_order = false;
        telling(config)
    };
    use rustls::CipherSuite::*;
    let (aes, chacha) = (TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256);
    let one = speaking(&[aes], &[&rustls::version::TLS12]);
    let two = speaking(&[aes, chacha], &[&rustls::version::TLS12]);
    let new = speaking(&[TLS13_AES_128_GCM_SHA256], &[&rustls::version::TLS13]);
    let listing = |list: &str| json!({"lua_ssl_ciphers": list});
    let gw = Gateway::with(json!({"lua_options": {"lua_ssl_ciphers": "CHACHA20"}, "lua_locations": [
        visit(&one, "= /inherited", json!({})),
        visit(&one, "= /without", listing("HIGH:!AES128")),
        visit(&one, "= /with", listing("ECDHE-ECDSA-AES128-GCM-SHA256")),
        visit(&two, "= /first", listing("AES128:CHACHA20")),
        visit(&two, "= /second", listing("AES128:CHACHA20:+AES128")),
        visit(&new, "= /new", listing("CHACHA20")),
    ]}));
    for (path, expected) in [
        ("/inherited", "handshake failed".to_owned()),
        ("/without", "handshake failed".to_owned()),
        ("/with", format!("{:?}", Some(aes))),
        ("/first", format!("{:?}", Some(aes))),
        ("/second", format!("{:?}", Some(chacha))),
        ("/new", format!("{:?}", Some(TLS13_AES_128_GCM_SHA256))),
    ] {
        assert_eq!(gw.get(&format!("{path}?verify=no")).text(), expected, "{path}");
    }

    let dir = Dir::new();
    dir.configure(json!({"lua_options": listing("AES128-SHA"), "lua_locations": [
        visit(&one, "= /a", json!({"lua_ssl_ciphers": "HIGH:!", "lua_ssl_verify_depth": "deep"})),
        visit(&one, "= /b", json!({})),
        visit(&one, "= /c", json!({})),
    ]}));
    let mut command = dir.command();
    command.arg("test");
    let (status, said) = support::run(command);
    assert!(!status.success());
    for text in [
        "lua_locations[0].options.lua_ssl_ciphers: \"HIGH:!\" is not one of OpenSSL's cipher lists: \"!\" is no cipher",
        "lua_locations[0].options.lua_ssl_verify_depth: \"deep\" is not a number of certificates",
        "lua_options.lua_ssl_ciphers: \"AES128-SHA\" is not a cipher list that leaves any suite of TLS 1.2: there are ECDHE-",
    ] {
        assert_eq!(said.matches(text).count(), 1, "{text}: {said}");
    }
}
