//! resty.mysql: against MariaDB, and against a server of the test's own for what MariaDB does not do.

use std::{
    fmt::Display,
    io::{Read, Write},
    net::TcpStream,
    process::{Command, Stdio},
    sync::Arc,
};

use ring::digest::{SHA256, digest};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    lua, port,
    support::{Gateway, Upstream, peers},
};

const NEW: &str = "
    local mysql = require('resty.mysql')
    local db = mysql:new()
    db:set_timeout(5000)
    local to = { host = '127.0.0.1', port = tonumber(arg.port), user = 'root' }
    local function with(more)
        local all = {}
        for k, v in pairs(to) do all[k] = v end
        for k, v in pairs(more) do all[k] = v end
        return all
    end\n";

fn run(gw: &Gateway, port: u16, script: &str) -> Value {
    lua(gw, &[("port", &port)], &format!("{NEW}{script}"))
}

#[test]
fn queries_give_rows_counts_and_errors() {
    let (gw, db) = (Gateway::start(), peers::mariadb_with(|_| Vec::new()));
    let rows = run(
        &gw,
        db.port,
        "add(db:server_ver())
        add(db:query('select 1'))
        add(db:connect(to))
        add(db:server_ver():match('MariaDB'))
        add(db:query('create database moon; use moon') ~= nil, db:read_result() ~= nil)
        add(db:query('create table cats (id serial primary key, name varchar(5), weight decimal(5,2), legs int) charset utf8mb4') ~= nil)
        add(db:query(\"insert into cats (name, weight, legs) values ('Bob', 4.25, 4), ('', null, 3), (null, -1, 0)\"))
        add(db:query('select * from cats order by id', 3))
        add(db:query('select * from cats where id > 99'))
        add(db:query('update cats set legs = 4'))
        add(db:query('selec 1'))
        add(db:query('select * from dogs'))
        add(db:query(\"insert into cats (name) values ('much too long')\"))
        db:set_compact_arrays(true)
        add(db:query(\"select 7 tiny, 2e3 as dbl, 18446744073709551615 as big, cast('2020-01-02' as date) as d, null n, 'x' s, 1.50 p\"))
        add(db:query('select name, legs from cats order by id'))
        db:set_compact_arrays(false)
        add(#db:query(\"select repeat('x', 300) a, repeat('y', 70000) b\")[1].b)
        add(db:query({ 'select ', \"'joined' as j\" }))",
    );
    let syntax = "You have an error in your SQL syntax; check the manual that corresponds to your MariaDB server \
                  version for the right syntax to use near 'selec 1' at line 1";
    assert_eq!(
        rows,
        json!([
            ["nil"],
            ["nil", "failed to send query: closed"],
            [1],
            ["MariaDB"],
            [true, true],
            [true],
            [{"affected_rows": 3, "insert_id": 1, "server_status": 2, "warning_count": 0,
              "message": "Records: 3  Duplicates: 0  Warnings: 0"}],
            [[
                {"id": "1", "name": "Bob", "weight": 4.25, "legs": 4},
                {"id": "2", "name": "", "weight": null, "legs": 3},
                {"id": "3", "name": null, "weight": -1, "legs": 0},
            ]],
            [{}],
            [{"affected_rows": 3, "insert_id": 0, "server_status": 34, "warning_count": 0,
              "message": "Rows matched: 3  Changed: 2  Warnings: 0"}],
            ["nil", syntax, 1064, "42000"],
            ["nil", "Table 'moon.dogs' doesn't exist", 1146, "42S02"],
            ["nil", "Data too long for column 'name' at row 1", 1406, "22001"],
            [[[7, 2000, "18446744073709551615", "2020-01-02", null, "x", 1.5]]],
            [[["Bob", 4], ["", 4], [null, 4]]],
            [70000],
            [[{"j": "joined"}]],
        ])
    );
}

#[test]
fn several_results_come_one_after_another() {
    let (gw, db) = (Gateway::start(), peers::mariadb_with(|_| Vec::new()));
    let rows = run(
        &gw,
        db.port,
        "add(db:connect(to))
        add(db:query('select 1 a; select 2 a; do 1; select 3 a; bad'))
        add(db:query('select 1'))
        add(db:send_query('select 1'))
        add(db:set_keepalive())
        add(db:read_result())
        add((db:read_result()).affected_rows)
        add(db:read_result())
        add((db:read_result()))
        add(db:read_result())
        add(db:send_query('select 4 a'))
        add(db:read_result(1))
        add(db:set_keepalive(1000, 10))
        add(db:read_result())
        add(db:connect(to))
        add(db:get_reused_times(), db:server_ver())
        add(db:query('select 5 a'))
        add(db:close())
        add(db:close())
        add(db:query('select 5 a'))
        add(db:connect(with({ max_packet_size = 1000 })))
        add(db:query(\"select repeat('x', 2000)\"))
        add(db:query('select 1'))",
    );
    let waiting = "cannot send query in the current context: query sent";
    assert_eq!(
        rows,
        json!([
            [1],
            [[{"a": 1}], "again"],
            ["nil", format!("failed to send query: {waiting}")],
            ["nil", waiting],
            ["nil", "cannot be reused in the current connection state: query sent"],
            [[{"a": 2}], "again"],
            [0],
            [[{"a": 3}], "again"],
            ["nil"],
            ["nil", "cannot read result in the current context: idle"],
            [15],
            [[{"a": 4}]],
            [1],
            ["nil", "closed"],
            [1],
            [1, "nil"],
            [[{"a": 5}]],
            [1],
            ["nil", "closed"],
            ["nil", "failed to send query: closed"],
            [1],
            ["nil", "packet size too big: 2003", "nil", "nil"],
            ["nil", "failed to send query: closed"],
        ])
    );
}

#[test]
fn mariadb_lets_in_whom_it_knows() {
    let gw = Gateway::start();
    let signed = rcgen::generate_simple_self_signed(["db.test".to_owned()]).expect("a certificate");
    let db = peers::mariadb_with(|dir| {
        std::fs::write(dir.join("cert.pem"), signed.cert.pem()).expect("a written file");
        std::fs::write(dir.join("key.pem"), signed.signing_key.serialize_pem()).expect("a written file");
        ["cert", "key"].map(|name| format!("--ssl-{name}={}", dir.join(name).with_extension("pem").display())).to_vec()
    });
    let plain = peers::mariadb_with(|_| vec!["--skip-ssl".into()]);
    let script = "add(db:connect(to))
        add(db:query(\"create user moon@'%' identified by 'secret'\") ~= nil)
        add(db:query(\"create user sealed@'%' identified by 'secret' require ssl\") ~= nil)
        add(db:query(\"install soname 'auth_ed25519'\") ~= nil)
        add(db:query(\"create user ed@'%' identified via ed25519 using password('secret')\") ~= nil)
        add(db:close())
        add(db:connect(with({ user = 'moon', password = 'wrong' })))
        add(db:connect(with({ user = 'moon' })))
        add(db:connect(with({ user = 'moon', password = 'secret', database = 'nowhere' })))
        add(db:connect(with({ user = 'moon', password = 'secret', charset = 'utf8mb4' })))
        add(db:query('select current_user() u, @@character_set_client c'))
        add(db:set_keepalive(1000, 1))
        add(db:connect(with({ user = 'sealed', password = 'secret' })))
        add(db:connect(with({ user = 'sealed', password = 'secret', ssl = true })))
        add(db:query(\"show status like 'Ssl_cipher'\")[1].Value:match('%u') ~= nil)
        add(db:set_keepalive(1000, 1))
        local ok, err = db:connect(with({ ssl = true, ssl_verify = true }))
        add(ok, err:match('^failed to do ssl handshake: .') ~= nil)
        add(db:connect(with({ user = 'ed', password = 'secret' })))
        add(db:query('select current_user() u'))
        add(db:connect(with({ user = 'ed', password = 'wrong', pool = 'own' })))
        add(db:connect({ path = arg.socket, user = 'root', database = 'mysql' }))
        add(db:query('select database() d'))
        add(db:connect({ host = '127.0.0.1', port = tonumber(arg.plain), user = 'root', ssl = true }))
        add(db:connect({ user = 'root' }))
        add(db:connect(with({ charset = 'klingon' })))
        add(db:connect(with({ user = 'ro\\0ot' })))
        add(db:connect({ host = '127.0.0.1', port = 1 }))";
    let socket = db.file("db.sock");
    let args: [(&str, &dyn Display); 3] = [("port", &db.port), ("plain", &plain.port), ("socket", &socket.display())];
    let rows = lua(&gw, &args, &format!("{NEW}{script}"));
    let denied =
        |user: &str, with: &str| format!("Access denied for user '{user}'@'localhost' (using password: {with})");
    assert_eq!(
        rows,
        json!([
            [1],
            [true],
            [true],
            [true],
            [true],
            [1],
            ["nil", denied("moon", "YES"), 1045, "28000"],
            ["nil", denied("moon", "NO"), 1045, "28000"],
            ["nil", "Access denied for user 'moon'@'%' to database 'nowhere'", 1044, "42000"],
            [1],
            [[{"u": "moon@%", "c": "utf8mb4"}]],
            [1],
            ["nil", denied("sealed", "YES"), 1045, "28000"],
            [1],
            [true],
            [1],
            ["nil", true],
            [1],
            [[{"u": "ed@%"}]],
            ["nil", denied("ed", "YES"), 1045, "28000"],
            [1],
            [[{"d": "mysql"}]],
            ["nil", "ssl disabled on server", "nil", "nil"],
            ["nil", "neither \"host\" nor \"path\" options are specified"],
            ["nil", "charset 'klingon' is not supported"],
            ["nil", "bad user option: a zero byte in it"],
            ["nil", "failed to connect: connection refused"],
        ])
    );
}

// A server of the test's own -----------------------------------------------------------------------------------------

const NONCE: &[u8; 20] = b"0123456789abcdefghij";
const OK: &[u8] = &[0, 0, 0, 2, 0, 0, 0];
const SSL: u32 = 0x800;

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

/// One connection, in packets. Errors end the connection: the client may have gone.
struct Wire {
    stream: Box<dyn Stream>,
    no: u8,
}

impl Wire {
    fn new(stream: impl Stream + 'static) -> Self {
        Wire { stream: Box::new(stream), no: 0 }
    }

    fn send(&mut self, payload: &[u8]) -> std::io::Result<()> {
        let mut packet = (payload.len() as u32).to_le_bytes().to_vec();
        packet[3] = self.no;
        self.no = self.no.wrapping_add(1);
        packet.extend(payload);
        self.stream.write_all(&packet)
    }

    fn receive(&mut self) -> std::io::Result<Vec<u8>> {
        let mut head = [0; 4];
        self.stream.read_exact(&mut head)?;
        self.no = head[3].wrapping_add(1);
        let mut payload = vec![0; u32::from_le_bytes([head[0], head[1], head[2], 0]) as usize];
        self.stream.read_exact(&mut payload)?;
        Ok(payload)
    }

    /// Greets, and gives what the client answers with: the proof is the part before the plugin's name.
    fn greet(&mut self, plugin: &str, flags: u32) -> std::io::Result<Vec<u8>> {
        self.send(&greeting(plugin, flags))?;
        self.receive()
    }

    /// Waits for the client to leave.
    fn rest(&mut self) {
        while self.stream.read(&mut [0; 1024]).is_ok_and(|n| n > 0) {}
    }
}

fn greeting(plugin: &str, flags: u32) -> Vec<u8> {
    let flags = (0x000a_ff00 | 0xf7ff & !SSL | flags).to_le_bytes();
    let mut payload = b"\x0a8.0.99-moon\0\x01\0\0\0".to_vec();
    payload.extend(&NONCE[..8]);
    payload.extend([0, flags[0], flags[1], 33, 2, 0, flags[2], flags[3], 21]);
    payload.extend([0; 10]);
    payload.extend(&NONCE[8..]);
    payload.push(0);
    payload.extend(plugin.as_bytes());
    payload.push(0);
    payload
}

/// A server that has each connection served so.
fn server(serve: impl Fn(&mut Wire) -> std::io::Result<()> + Send + Sync + 'static) -> Upstream {
    Upstream::serving(move |_, stream: TcpStream| {
        let mut wire = Wire::new(stream);
        let _ = serve(&mut wire);
        wire.rest();
    })
}

fn port_of(server: &Upstream) -> u16 {
    port(&server.addr()).parse().expect("a port")
}

fn sha256(parts: &[&[u8]]) -> Vec<u8> {
    digest(&SHA256, &parts.concat()).as_ref().to_vec()
}

fn xor(a: &[u8], b: &[u8]) -> Vec<u8> {
    a.iter().zip(b.iter().cycle()).map(|(a, b)| a ^ b).collect()
}

/// caching_sha2_password's proof.
fn scrambled(password: &[u8]) -> Vec<u8> {
    let once = sha256(&[password]);
    xor(&once, &sha256(&[&sha256(&[&once]), NONCE]))
}

const LOG_IN: &str =
    "add(db:connect(with({ user = 'u', password = arg.password or 'secret', ssl = arg.ssl and true })))";

fn answer(wire: &mut Wire, proven: bool) -> std::io::Result<()> {
    wire.send(if proven { OK } else { b"\xff\x15\x04#28000Access denied" })
}

fn ends_with_proof(response: &[u8], proof: &[u8], plugin: &str) -> bool {
    response.ends_with(&[&[proof.len() as u8], proof, plugin.as_bytes(), &[0]].concat())
}

#[test]
fn caching_sha2_password_proves_by_digest() {
    let gw = Gateway::start();
    let cached = server(|wire| {
        let response = wire.greet("caching_sha2_password", 0)?;
        let proven = ends_with_proof(&response, &scrambled(b"secret"), "caching_sha2_password");
        if proven {
            wire.send(&[1, 3])?;
        }
        answer(wire, proven)
    });
    assert_eq!(run(&gw, port_of(&cached), LOG_IN), json!([[1]]));
    let wrong = lua(&gw, &[("port", &port_of(&cached)), ("password", &"wrong")], &format!("{NEW}{LOG_IN}"));
    assert_eq!(wrong, json!([["nil", "Access denied", 1045, "28000"]]));
    let switched = server(|wire| {
        wire.greet("mysql_native_password", 0)?;
        wire.send(&[b"\xfecaching_sha2_password\0", &NONCE[..], b"\0"].concat())?;
        let proven = wire.receive()? == scrambled(b"secret");
        answer(wire, proven)
    });
    assert_eq!(run(&gw, port_of(&switched), LOG_IN), json!([[1]]));
}

/// A key pair: the private one in a file, the public one as PEM.
fn rsa_key() -> (TempDir, Vec<u8>) {
    let dir = TempDir::new().expect("a temporary directory");
    let openssl = |args: &[&str]| {
        let out = Command::new("openssl").args(args).current_dir(dir.path()).output().expect("openssl is installed");
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        out.stdout
    };
    openssl(&["genrsa", "-out", "key.pem", "2048"]);
    let public = openssl(&["rsa", "-in", "key.pem", "-pubout"]);
    (dir, public)
}

fn decrypted(dir: &TempDir, sealed: &[u8]) -> Vec<u8> {
    let mut openssl = Command::new("openssl")
        .args(["pkeyutl", "-decrypt", "-inkey", "key.pem", "-pkeyopt", "rsa_padding_mode:oaep"])
        .current_dir(dir.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("openssl is installed");
    openssl.stdin.take().expect("piped").write_all(sealed).expect("written");
    openssl.wait_with_output().expect("its output").stdout
}

#[test]
fn a_password_is_encrypted_where_others_can_listen() {
    let gw = Gateway::start();
    let (dir, public) = rsa_key();
    let key = Arc::new((dir, public));
    // Both plugins: asked for the password, the client asks for the key.
    for (plugin, ask) in [("caching_sha2_password", 2), ("sha256_password", 1)] {
        let key = key.clone();
        let full = server(move |wire| {
            let mut asked = wire.greet(plugin, 0)?;
            if plugin == "caching_sha2_password" {
                wire.send(&[1, 4])?;
                asked = wire.receive()?;
            } else {
                asked = asked[asked.len() - plugin.len() - 2..][..1].to_vec();
            }
            if asked != [ask] {
                return wire.send(b"\xff\x01\x00#HY000asked for something else");
            }
            wire.send(&[&[1], &key.1[..]].concat())?;
            let sealed = wire.receive()?;
            let password = xor(&decrypted(&key.0, &sealed), NONCE);
            answer(wire, password == b"secret\0")
        });
        assert_eq!(run(&gw, port_of(&full), LOG_IN), json!([[1]]), "{plugin}");
    }
    for key in ["no key at all", "-----BEGIN PUBLIC KEY-----\nMAMwAQ==\n-----END PUBLIC KEY-----\n"] {
        let bad = server(move |wire| {
            wire.greet("sha256_password", 0)?;
            wire.send(&[&[1], key.as_bytes()].concat())
        });
        let error = "failed to encrypt the password: failed to load the key";
        assert_eq!(run(&gw, port_of(&bad), LOG_IN), json!([["nil", error, "nil", "nil"]]));
    }
}

#[test]
fn a_password_goes_over_tls_as_it_is() {
    let gw = Gateway::start();
    let signed = rcgen::generate_simple_self_signed(["db.test".to_owned()]).expect("a certificate");
    let (cert, key) = (signed.cert.der().clone(), signed.signing_key.serialize_der());
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![cert], rustls_pki_types::PrivatePkcs8KeyDer::from(key).into())
        .expect("a configuration");
    let config = Arc::new(config);
    for plugin in ["caching_sha2_password", "sha256_password"] {
        let config = config.clone();
        let sealed = Upstream::serving(move |_, stream: TcpStream| {
            let serve = || -> std::io::Result<()> {
                let mut wire = Wire::new(stream.try_clone()?);
                let request = wire.greet(plugin, SSL)?;
                assert_eq!(request.len(), 32, "an SSL request says nothing of the user");
                let tls = rustls::ServerConnection::new(config.clone()).map_err(std::io::Error::other)?;
                let mut wire = Wire::new(rustls::StreamOwned::new(tls, stream.try_clone()?));
                let response = wire.receive()?;
                let proven = if plugin == "caching_sha2_password" {
                    wire.send(&[1, 4])?;
                    wire.receive()? == b"secret\0"
                } else {
                    ends_with_proof(&response, b"secret\0", plugin)
                };
                answer(&mut wire, proven)?;
                wire.rest();
                Ok(())
            };
            let _ = serve();
        });
        let rows = lua(&gw, &[("port", &port_of(&sealed)), ("ssl", &1)], &format!("{NEW}{LOG_IN}"));
        assert_eq!(rows, json!([[1]]), "{plugin}");
    }
}

#[test]
fn a_greeting_that_is_none_is_refused() {
    let gw = Gateway::start();
    let mut short = greeting("mysql_native_password", 0);
    short.truncate(30);
    let cases: [(&[u8], Value); 4] = [
        (b"\xff\x10\x04Too many connections", json!(["nil", "Too many connections", 1040, "nil"])),
        (b"\x09old\0", json!(["nil", "unsupported protocol version: 9", "nil", "nil"])),
        (&short, json!(["nil", "malformed greeting", "nil", "nil"])),
        (b"", json!(["nil", "empty packet", "nil", "nil"])),
    ];
    for (greeting, answer) in cases {
        let greeting = greeting.to_vec();
        let peer = server(move |wire| wire.send(&greeting));
        assert_eq!(run(&gw, port_of(&peer), LOG_IN), json!([answer]));
    }
    let silent = server(|_| Ok(()));
    let rows = run(&gw, port_of(&silent), "db:set_timeout(20) add(db:connect(to))");
    assert_eq!(rows, json!([["nil", "failed to receive packet header: timeout", "nil", "nil"]]));
    // What a plugin may ask for, and how often.
    let asking: [(&[u8], &str); 6] = [
        (b"\xfe", "old pre-4.1 authentication protocol not supported"),
        (b"\xfeclient_ed25519\0shorter than 32 bytes", "malformed authentication switch"),
        (b"\xfemysql_clear_password\0x\0", "authentication plugin not supported: mysql_clear_password"),
        (b"\xfemysql_native_password", "malformed authentication switch"),
        (b"\x01\x04", "unexpected data of mysql_native_password"),
        (b"\x42", "bad packet type: 66"),
    ];
    for (ask, error) in asking {
        let peer = server(move |wire| {
            wire.greet("mysql_native_password", 0)?;
            wire.send(ask)
        });
        assert_eq!(run(&gw, port_of(&peer), LOG_IN), json!([["nil", error, "nil", "nil"]]));
    }
    let endless = server(|wire| {
        wire.greet("mysql_native_password", 0)?;
        loop {
            wire.send(&[b"\xfemysql_native_password\0", &NONCE[..], b"\0"].concat())?;
            wire.receive()?;
        }
    });
    let rows = run(&gw, port_of(&endless), LOG_IN);
    assert_eq!(rows, json!([["nil", "authentication does not end", "nil", "nil"]]));
}

#[test]
fn a_result_that_is_none_closes_the_connection() {
    let gw = Gateway::start();
    let column = b"\x03def\0\0\0\x01a\0\x0c\x21\0\0\0\0\0\xfd\0\0\0\0\0";
    let (eof, one): (&[u8], &[u8]) = (b"\xfe\0\0\x02\0", b"\x01");
    let cases: [(&[&[u8]], &str); 10] = [
        (&[b"\xfb/etc/passwd"], "LOCAL INFILE is not supported"),
        (&[b"\0"], "malformed ok packet"),
        (&[b"\0\xfc\x01"], "malformed ok packet"),
        (&[b"\xfd\xff\xff\xff"], "too many columns"),
        (&[b"\xfc\x01"], "unexpected packet type 252"),
        (&[one, b"\x03def"], "malformed column definition"),
        (&[one, column, one], "unexpected packet type 1 while eof packet is expected"),
        (&[one, column, eof, b"\x05abc"], "malformed row"),
        (&[one, column, eof, b"\xfe\xff\xff\xff\xff\xff\xff\xff\xff"], "malformed row"),
        (&[one, column, eof, b"\x01x"], "failed to receive packet header: timeout"),
    ];
    for (packets, error) in cases {
        let packets: Vec<Vec<u8>> = packets.iter().map(|packet| packet.to_vec()).collect();
        let peer = server(move |wire| {
            wire.greet("mysql_native_password", 0)?;
            wire.send(OK)?;
            wire.receive()?;
            packets.iter().try_for_each(|packet| wire.send(packet))
        });
        let timeout = if error.ends_with("timeout") { 50 } else { 5000 };
        let script = format!(
            "add(db:connect(to)) db:set_timeout({timeout})
            local ok, err = db:query('x')
            add(ok, err)
            add(db:query('x'))
            add(db:set_keepalive())"
        );
        let rows = run(&gw, port_of(&peer), &script);
        let closed = json!(["nil", "failed to send query: closed"]);
        assert_eq!(rows, json!([[1], ["nil", error], closed, ["nil", "closed"]]));
    }
    let out_of_order = server(|wire| {
        wire.greet("mysql_native_password", 0)?;
        wire.send(OK)?;
        wire.receive()?;
        wire.no += 1;
        wire.send(OK)
    });
    let rows = run(&gw, port_of(&out_of_order), "db:connect(to) add(db:query('x'))");
    assert_eq!(rows, json!([["nil", "packets out of order", "nil", "nil"]]));
    let gone = Upstream::serving(|_, stream: TcpStream| {
        let mut wire = Wire::new(stream);
        let _ = wire.greet("mysql_native_password", 0).and_then(|_| wire.send(OK)).and_then(|()| wire.receive());
    });
    let rows = run(&gw, port_of(&gone), "db:connect(to) add(db:query('x'))");
    assert_eq!(rows, json!([["nil", "failed to receive packet header: closed", "nil", "nil"]]));
}
