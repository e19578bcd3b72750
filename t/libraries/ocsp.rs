//! ngx.ocsp: requests that `openssl ocsp` reads, and what it answers about a CA that openssl made.

use std::{
    fs::{self, File},
    path::Path,
    process::{Child, Command, Stdio},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    lua,
    support::{Gateway, eventually},
};

/// A CA with an index of what it issued, and those who answer for it, in files.
struct Authority(TempDir);

/// Serial numbers that the index knows, and one that it does not.
const VALID: &str = "1001";
const REVOKED: &str = "1002";
const FORGOTTEN: &str = "1003";

/// Number, name and extensions of those who answer.
const RESPONDERS: [(&str, &str, &str); 2] =
    [("2001", "responder", "extendedKeyUsage=OCSPSigning"), ("2002", "server", "extendedKeyUsage=serverAuth")];

impl Authority {
    fn new() -> Self {
        let authority = Authority(TempDir::new().expect("a temporary directory"));
        authority.self_signed("ca");
        authority.self_signed("orphan");
        for (serial, name, extensions) in RESPONDERS {
            authority.issue(serial, name, extensions);
        }
        let line = |kind: &str, revoked: &str, serial: &str| {
            format!("{kind}\t400101000000Z\t{revoked}\t{serial}\tunknown\t/CN={serial}\n")
        };
        let index = line("V", "", VALID) + &line("R", "200101000000Z", REVOKED);
        authority.write("index.txt", index);
        authority
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.path().join(name), bytes).expect("a written file");
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path().join(name)).expect("a file")
    }

    fn pem(&self, name: &str) -> String {
        String::from_utf8(self.read(&format!("{name}.pem"))).expect("PEM")
    }

    fn command(&self) -> Command {
        let mut command = Command::new("openssl");
        command.current_dir(self.path()).stdin(Stdio::null());
        command
    }

    /// Runs openssl with these words.
    #[track_caller]
    fn openssl(&self, words: &str) {
        let out = self.command().args(words.split_whitespace()).output().expect("openssl is installed");
        assert!(out.status.success(), "{words}: {}", String::from_utf8_lossy(&out.stderr));
    }

    fn self_signed(&self, name: &str) {
        self.openssl(&format!(
            "req -x509 -newkey rsa:2048 -nodes -keyout {name}.key -out {name}.pem -subj /CN={name} -days 30"
        ));
    }

    /// `<name>.pem` and its key.
    fn issue(&self, serial: &str, name: &str, extensions: &str) {
        self.write("extensions", extensions);
        self.openssl(&format!(
            "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout {name}.key -out {name}.csr -subj /CN={name}"
        ));
        self.openssl(&format!(
            "x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -set_serial 0x{serial} -days 30 -extfile extensions \
             -out {name}.pem"
        ));
    }

    /// What openssl answers to a request when `signer` signs, with these further words.
    fn answer(&self, request: &[u8], signer: &str, words: &str) -> Vec<u8> {
        self.write("request", request);
        self.openssl(&format!(
            "ocsp -index index.txt -CA ca.pem -rsigner {signer}.pem -rkey {signer}.key -reqin request -respout response {words}"
        ));
        self.read("response")
    }

    /// A responder on a port of its own.
    fn serve(&self) -> Responder {
        let out = self.path().join("responder.out");
        let words = "ocsp -port 0 -index index.txt -CA ca.pem -rsigner responder.pem -rkey responder.key -nmin 60";
        let child = self
            .command()
            .args(words.split_whitespace())
            .stdout(File::create(&out).expect("a file"))
            .stderr(Stdio::null())
            .spawn()
            .expect("openssl is installed");
        let mut responder = Responder { child, port: 0 };
        // ACCEPT [::]:35533 PID=24648
        responder.port = eventually("the responder listens", || {
            let said = fs::read_to_string(&out).ok()?;
            said.split_once(" PID=")?.0.rsplit(':').next()?.parse().ok()
        });
        responder
    }
}

/// A process that ends with the value.
struct Responder {
    child: Child,
    port: u16,
}

impl Drop for Responder {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a script that has the module as `ocsp` and a chain of these certificates as `chain`; the values it noted at once.
#[track_caller]
fn run(gw: &Gateway, chain: &[&str], script: &str) -> Value {
    let pem = chain.concat();
    let head = format!(
        "local ocsp = require('ngx.ocsp')
        local chain = assert(require('ngx.ssl').cert_pem_to_der([[{pem}]]))\n"
    );
    lua(gw, &[], &(head + script))[0].clone()
}

#[track_caller]
fn validated(gw: &Gateway, chain: &[&str], response: &[u8]) -> Value {
    let response = STANDARD.encode(response);
    run(gw, chain, &format!("add(ocsp.validate_ocsp_response(ngx.decode_base64('{response}'), chain))"))
}

#[track_caller]
fn request(gw: &Gateway, chain: &[&str]) -> Vec<u8> {
    let request = run(gw, chain, "add(ngx.encode_base64(assert(ocsp.create_ocsp_request(chain))))");
    STANDARD.decode(request[0].as_str().expect("a text")).expect("base64")
}

#[test]
fn a_request_is_the_one_of_openssl() {
    let (gw, authority) = (Gateway::start(), Authority::new());
    let ca = authority.pem("ca");
    // The highest bit of a serial number is not its sign.
    for serial in ["01", "80", "ff00112233445566778899aabbccddeeff001122"] {
        authority.issue(serial, "leaf", "basicConstraints=CA:FALSE");
        authority.openssl("ocsp -issuer ca.pem -cert leaf.pem -no_nonce -reqout expected");
        let made = request(&gw, &[&authority.pem("leaf"), &ca]);
        assert_eq!(made, authority.read("expected"), "{serial}");
        let leaf = authority.pem("leaf");
        let short = made.len() - 1;
        let limits =
            format!("add(#ocsp.create_ocsp_request(chain, {}), ocsp.create_ocsp_request(chain, {short}))", made.len());
        let error = format!("output buffer too small: {} > {short}", made.len());
        assert_eq!(run(&gw, &[&leaf, &ca], &limits), json!([made.len(), "nil", error]));
    }
}

#[test]
fn what_openssl_answers_is_understood() {
    let (gw, authority) = (Gateway::start(), Authority::new());
    let ca = authority.pem("ca");
    authority.issue(VALID, "valid", "basicConstraints=CA:FALSE");
    authority.issue(REVOKED, "revoked", "authorityKeyIdentifier=keyid:always,issuer:always");
    authority.issue(FORGOTTEN, "forgotten", "basicConstraints=CA:FALSE");
    let valid = authority.pem("valid");
    let asked = request(&gw, &[&valid, &ca]);
    for (signer, words) in [
        ("ca", ""),
        ("ca", "-resp_key_id"),
        ("ca", "-resp_no_certs"),
        ("ca", "-rmd sha384"),
        ("ca", "-rmd sha512 -rsigopt rsa_padding_mode:pss -rsigopt rsa_pss_saltlen:digest"),
        ("responder", ""),
        ("responder", "-resp_key_id"),
    ] {
        let response = authority.answer(&asked, signer, words);
        assert_eq!(validated(&gw, &[&valid, &ca], &response), json!([true, "nil"]), "{signer} {words}");
    }
    let until = validated(&gw, &[&valid, &ca], &authority.answer(&asked, "ca", "-ndays 2"));
    let now = std::time::UNIX_EPOCH.elapsed().expect("a time").as_secs_f64();
    let ahead = until[1].as_f64().expect("a time") - now;
    assert!(until[0] == true && (2.0 * 86_400.0 - 300.0..=2.0 * 86_400.0).contains(&ahead), "{until}");

    let unverified = "OCSP_basic_verify() failed";
    for (signer, words, expected) in [
        ("ca", "-badsig", unverified),
        ("responder", "-resp_no_certs", unverified),
        ("server", "", unverified),
        ("orphan", "", unverified),
        ("orphan", "-resp_no_certs", unverified),
        ("ca", "-rcid sha256", "certificate status not found in the OCSP response"),
    ] {
        let response = authority.answer(&asked, signer, words);
        assert_eq!(validated(&gw, &[&valid, &ca], &response), json!(["nil", expected]), "{signer} {words}");
    }
    for (name, expected) in [
        ("revoked", "certificate status \"revoked\" in the OCSP response"),
        ("forgotten", "certificate status \"unknown\" in the OCSP response"),
    ] {
        let leaf = authority.pem(name);
        let response = authority.answer(&request(&gw, &[&leaf, &ca]), "responder", "-nmin 5");
        assert_eq!(validated(&gw, &[&leaf, &ca], &response), json!(["nil", expected]));
        let other = validated(&gw, &[&valid, &ca], &response);
        assert_eq!(other, json!(["nil", "certificate status not found in the OCSP response"]));
    }
}

#[test]
fn chains_that_do_not_hold_are_errors() {
    let (gw, authority) = (Gateway::start(), Authority::new());
    authority.issue(VALID, "leaf", "authorityInfoAccess=OCSP;URI:http://ocsp.test/a?b=c");
    authority.issue(REVOKED, "bound", "authorityKeyIdentifier=keyid:always,issuer:always");
    authority.openssl("req -x509 -key ca.key -out again.pem -subj /CN=ca -days 30");
    let (leaf, ca, orphan) = (authority.pem("leaf"), authority.pem("ca"), authority.pem("orphan"));
    let (bound, again) = (authority.pem("bound"), authority.pem("again"));
    let whole = "add(ocsp.get_ocsp_responder_from_der_chain(chain))";
    assert_eq!(run(&gw, &[&leaf, &ca], whole), json!(["http://ocsp.test/a?b=c", "nil"]));
    let part = "add(ocsp.get_ocsp_responder_from_der_chain(chain, 6))";
    assert_eq!(run(&gw, &[&leaf, &ca], part), json!(["http:/", "truncated"]));
    assert_eq!(run(&gw, &[&authority.pem("server"), &ca], whole), json!(["nil", "nil"]), "no address is no error");
    for (chain, expected) in [
        (&[&leaf[..]][..], "no issuer certificate in chain"),
        (&[&leaf, &orphan, &ca], "issuer certificate not next to leaf"),
        // The issuer's name and key, but not the certificate whose number the leaf gives.
        (&[&bound, &again], "issuer certificate not next to leaf"),
    ] {
        for call in ["get_ocsp_responder_from_der_chain(", "create_ocsp_request(", "validate_ocsp_response('', "] {
            assert_eq!(run(&gw, chain, &format!("add(ocsp.{call}chain))")), json!(["nil", expected]), "{call}");
        }
    }
    let script = "add(select(2, ocsp.create_ocsp_request('')), select(2, ocsp.validate_ocsp_response('x', chain)),
            select(2, ocsp.validate_ocsp_response('x', chain, 4)),
            select(2, ocsp.create_ocsp_request(chain .. ('x'):rep(2 ^ 20))),
            select(2, ocsp.validate_ocsp_response(('x'):rep(2 ^ 20 + 1), chain)), (pcall(ocsp.create_ocsp_request)))";
    assert_eq!(
        run(&gw, &[&leaf, &ca], script),
        json!([
            "d2i_X509_bio() failed",
            "d2i_OCSP_RESPONSE() failed",
            "d2i_",
            "the certificate chain is longer than 1048576 bytes",
            "the OCSP response is longer than 1048576 bytes",
            false,
        ])
    );
}

#[test]
fn a_script_asks_the_responder_that_a_certificate_names() {
    let authority = Authority::new();
    let responder = authority.serve();
    let address = format!("authorityInfoAccess=OCSP;URI:http://127.0.0.1:{}/ocsp", responder.port);
    authority.issue(VALID, "valid", &address);
    authority.issue(REVOKED, "revoked", &address);
    let location = |name: &str| {
        let pem = authority.pem(name) + &authority.pem("ca");
        let script = format!(
            r#"
            local ocsp = require("ngx.ocsp")
            local chain = assert(require("ngx.ssl").cert_pem_to_der([[{pem}]]))
            local url = assert(ocsp.get_ocsp_responder_from_der_chain(chain))
            local host, port, path = url:match("^http://([^:/]+):(%d+)(/.*)$")
            local request = assert(ocsp.create_ocsp_request(chain))
            local sock = ngx.socket.tcp()
            sock:settimeout(10000)
            assert(sock:connect(host, tonumber(port)))
            assert(sock:send({{ "POST ", path, " HTTP/1.0\r\nContent-Type: application/ocsp-request\r\nContent-Length: ",
                #request, "\r\n\r\n", request }}))
            local head, response = assert(sock:receive("*a")):match("^(.-)\r\n\r\n(.*)$")
            assert(head:find("200 OK", 1, true), head)
            local ok, next_update = ocsp.validate_ocsp_response(response, chain)
            ngx.say(ok, " ", ok and math.ceil((next_update - ngx.time()) / 60) or next_update)
            "#
        );
        json!({"location": format!("= /{name}"), "content_by_lua": script})
    };
    let gw = Gateway::with(json!({"lua_locations": [location("valid"), location("revoked")]}));
    let said = gw.get("/valid").text();
    // openssl counts whole seconds from when it answered.
    assert!(said == "true 60\n" || said == "true 59\n", "{said}");
    assert_eq!(gw.get("/revoked").text(), "nil certificate status \"revoked\" in the OCSP response\n");
}
