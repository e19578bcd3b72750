//! `ngx.socket.tcp`: what it gives and each text that it fails with.

use std::future::Future;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::*;
use crate::lua::ngx::socket_pool::MAX_POOLS;

/// Says `text` and closes.
async fn says(text: &'static str) -> u16 {
    server(move |mut s| async move { s.write_all(text.as_bytes()).await.unwrap_or_default() }).await
}

async fn echo(mut stream: TcpStream) {
    let mut buf = vec![0; 65536];
    while let Ok(n @ 1..) = stream.read(&mut buf).await {
        if stream.write_all(&buf[..n]).await.is_err() {
            return;
        }
    }
}

/// Says `text` and stays silent.
async fn stalls(text: &'static str) -> u16 {
    server(move |mut s| async move {
        s.write_all(text.as_bytes()).await.unwrap_or_default();
        let mut rest = [0; 64];
        while let Ok(1..) = s.read(&mut rest).await {}
    })
    .await
}

#[track_caller]
fn check(port: impl Future<Output = u16>, source: &str, expected: &str) {
    let got = on_a_worker(async { run(&vm(), &connected(port.await, source)).await });
    assert_eq!(got, expected, "{source}");
}

#[track_caller]
fn check_unconnected(source: &str, expected: &str) {
    let got = on_a_worker(async { run(&vm(), &unconnected(0, source)).await });
    assert_eq!(got, expected, "{source}");
}

#[test]
fn receives_lines_sizes_and_the_rest() {
    check(
        says("one\r\nt\rwo\nfivesREST\r\nmore"),
        "local a, b, c, d = sock:receive(), sock:receive('*l'), sock:receive('5'), sock:receive(0)
         local rest = sock:receive('*a')
         return show(a, b, c, '[' .. d .. ']', #rest, sock:receive('*l')) .. ' ' .. show(sock:close()) .. ' ' .. show(sock:close())",
        "one two fives [] 10 nil closed 1 nil closed",
    );
}

#[test]
fn an_end_gives_what_there_was_and_the_writing_half_stays() {
    check(
        says("par\rt"),
        "local line, err, partial = sock:receive()
         return show(line, err, partial) .. '|' .. show(sock:receive()) .. '|' .. show(sock:setkeepalive())
            .. '|' .. show(sock:close())",
        "nil closed part|nil closed|nil closed|nil closed",
    );
    check(
        says("abc"),
        "local data, err, partial = sock:receive(5) return show(data, err, partial, sock:close())",
        "nil closed abc 1",
    );
}

#[test]
fn a_timeout_gives_what_there_was_and_does_not_close() {
    check(
        stalls("abcd"),
        "sock:settimeout(20)
         local data, err, partial = sock:receive(10)
         local again = show(sock:receive('*a'))
         return show(data, err, partial) .. '|' .. again .. '|' .. show(sock:receiveany(5)) .. '|' .. show(sock:close())",
        "nil timeout abcd|nil timeout |nil timeout |1",
    );
    check(
        stalls("x--"),
        "sock:settimeouts(1000, 1000, 20)
         local read = sock:receiveuntil('--end')
         local a, err, partial = read()
         local _, _, rest = sock:receive(10)
         return show(a, err, partial, rest)",
        "nil timeout x --",
    );
}

#[test]
fn receiveany_gives_what_comes() {
    check(
        stalls("abcdef"),
        "return show(sock:receiveany(4), sock:receiveany(10)) .. show(pcall(sock.receiveany, sock))",
        "abcd effalse expecting 2 arguments (including the object), but got 1",
    );
    check(
        stalls(""),
        "return show(pcall(sock.receiveany, sock, -1))",
        "false bad argument #2 to 'receiveany' (bad max argument)",
    );
}

#[test]
fn receiveuntil_reads_up_to_the_pattern() {
    let stream = "hello, world! -agentzh\r\n--abcedhb blah blah";
    check(
        says(stream),
        "local read = sock:receiveuntil('\\r\\n--abcedhb') return show(read()) .. '|' .. show(read())",
        "hello, world! -agentzh|nil closed  blah blah",
    );
    check(
        says(stream),
        "local read, out = sock:receiveuntil('\\r\\n--abcedhb'), {}
         while true do
            local data, err, partial = read(4)
            if not data then out[#out + 1] = show(err) break end
            out[#out + 1] = data
         end
         return table.concat(out, '|') .. sock:receive(5)",
        "hell|o, w|orld|! -a|gent|zh|nil blah",
    );
    check(
        says("hello world _END_ blah"),
        "local read = sock:receiveuntil('_END_', { inclusive = true }) return show(read()) .. '|' .. show(sock:receive(5))",
        "hello world _END_| blah",
    );
    check(
        says("abc_END_x"),
        "local read, out = sock:receiveuntil('_END_', { inclusive = true }), {}
         for data in read, 2 do out[#out + 1] = data end
         return table.concat(out, '|') .. sock:receive(1)",
        "ab|c_END_x",
    );
    // An empty line is a line.
    check(
        says("\r\nx\r\n"),
        "local r = sock:receiveuntil('\\r\\n') return show(r(5)) .. '|' .. show(r(5)) .. '|' .. show(r(5)) .. '|' .. show(r(5))",
        "|nil|x|nil",
    );
    check(says(""), "return show(sock:receiveuntil(''))", "nil pattern is empty");
}

#[test]
fn patterns_that_overlap_themselves_are_found() {
    check(
        says("abcabcabdabcabdx"),
        "local r = sock:receiveuntil('abcabd') return show(r(), r(), sock:receive(1))",
        "abc  x",
    );
    // Byte by byte, so that every split of the pattern is seen.
    let slow = server(|mut s| async move {
        for byte in b"ababcabcabdz" {
            s.write_all(&[*byte]).await.unwrap_or_default();
            tokio::task::yield_now().await;
        }
    });
    check(slow, "local r = sock:receiveuntil('abcabd') return show(r(), sock:receive(1))", "ababc z");
}

#[test]
fn sends_strings_numbers_and_nested_tables() {
    check(
        server(echo),
        "local n = sock:send({'a', {1, {'b'}}, 2.5}) + sock:send('x') + sock:send(7) + sock:send(true) + sock:send(nil)
         return show(n, sock:send(''), sock:receive(n))",
        "15 0 a1b2.5x7truenil",
    );
    for (data, text) in [
        ("{'a', nil, 'b'}", "bad data type nil found"),
        ("{'a', true}", "bad data type boolean found"),
        ("{ngx.null}", "bad data type userdata found"),
        ("{a = 1}", "non-array table found"),
    ] {
        let got = on_a_worker(async {
            run(&vm(), &unconnected(0, &format!("return show(pcall(sock.send, sock, {data}))"))).await
        });
        assert_eq!(got, format!("false bad argument #1 to 'send' ({text})"));
    }
}

#[test]
fn much_data_passes_both_ways_at_once() {
    check(
        server(echo),
        "local data = string.rep('0123456789abcdef', 262144)
         local writer = ngx.thread.spawn(function() return sock:send(data) end)
         local got = sock:receive(#data)
         local _, sent = ngx.thread.wait(writer)
         return show(sent == #data, got == data)",
        "true true",
    );
}

#[test]
fn says_why_it_cannot_connect() {
    let refused = on_a_worker(async {
        // Bound and not listening: nobody else gets the port meanwhile.
        let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
        socket.bind("127.0.0.1:0".parse().expect("an address")).expect("bound");
        let port = socket.local_addr().expect("an address").port();
        run(
            &vm(),
            &unconnected(
                port,
                "return show(sock:connect('127.0.0.1', PORT)) .. '|' .. show(ngx.socket.connect('127.0.0.1', PORT))",
            ),
        )
        .await
    });
    assert_eq!(refused, "nil connection refused|nil connection refused");
    for (call, expected) in [
        ("sock:connect('127.0.0.1')", "nil missing the port number"),
        ("sock:connect('127.0.0.1', 65536)", "nil bad port number: 65536"),
        ("sock:connect('agentzh.org', 80)", "nil no resolver defined to resolve \"agentzh.org\""),
        ("sock:connect('unix:/nowhere/at.all')", "nil no such file or directory"),
        (
            "pcall(sock.connect, sock, '::1', 1, { pool_size = 0 })",
            "false bad argument #3 to 'connect' (bad \"pool_size\" option value: 0)",
        ),
        (
            "pcall(sock.connect, sock, '::1', 1, { pool_size = 'a' })",
            "false bad argument #3 to 'connect' (bad \"pool_size\" option type: string)",
        ),
        (
            "pcall(sock.connect, sock, '::1', 1, { backlog = -1 })",
            "false bad argument #3 to 'connect' (bad \"backlog\" option value: -1)",
        ),
        (
            "pcall(sock.connect, sock, '::1', 1, { pool = {} })",
            "false bad argument #3 to 'connect' (bad \"pool\" option type: table)",
        ),
        ("pcall(sock.settimeout, sock, -1)", "false bad timeout value"),
        ("pcall(sock.receive, 'x')", "false bad argument #1 to 'receive' (table expected, got string)"),
        ("pcall(sock.receive, { io.stdout })", "false bad argument #1 to 'receive' (socket expected)"),
        ("sock:close()", "nil closed"),
        ("sock:send('x')", "nil closed"),
        ("sock:receive()", "nil closed"),
        ("sock:getreusedtimes()", "nil closed"),
        ("sock:setkeepalive()", "nil closed"),
        ("sock:sslhandshake()", "nil closed"),
        ("sock:setoption('keepalive', true)", "nil closed"),
    ] {
        check_unconnected(&format!("return show({call})"), expected);
    }
}

#[test]
fn a_name_resolves_or_says_that_it_does_not() {
    let got = on_a_worker(async {
        let config =
            crate::dns::Config { servers: vec!["127.0.0.1:1".parse().expect("an address")], ..Default::default() };
        let resolver = crate::dns::Resolver::new(&config, tokio::runtime::Handle::current());
        crate::lua::ngx::socket::TEST_RESOLVER.set(Some(resolver.into()));
        let port = says("hi").await;
        run(&vm(), &unconnected(port, "assert(sock:connect('localhost', PORT)) return sock:receive('*a') .. show(sock:connect('no.such.invalid', 80)):sub(1, 39)")).await
    });
    assert_eq!(got, "hinil no.such.invalid could not be resolv");
}

#[test]
fn connecting_gives_up_in_time() {
    let got = on_a_worker(async {
        // A queue of one that nobody empties.
        let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
        socket.bind("127.0.0.1:0".parse().expect("an address")).expect("bound");
        let listener = socket.listen(1).expect("listens");
        let address = listener.local_addr().expect("an address");
        let fill: Vec<_> = (0..8).map(|_| tokio::task::spawn_local(TcpStream::connect(address))).collect();
        tokio::task::yield_now().await;
        let text = run(
            &vm(),
            &unconnected(address.port(), "sock:settimeout(30) return show(sock:connect('127.0.0.1', PORT))"),
        )
        .await;
        fill.iter().for_each(|f| f.abort());
        text
    });
    assert_eq!(got, "nil timeout");
}

#[test]
fn a_unix_socket_is_a_stream_too() {
    let got = on_a_worker(async {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("s.sock");
        let listener = tokio::net::UnixListener::bind(&path).expect("bound");
        tokio::task::spawn_local(async move {
            while let Ok((mut s, _)) = listener.accept().await {
                s.write_all(b"unix\n").await.unwrap_or_default();
                s.read_u8().await.unwrap_or_default();
            }
        });
        let source = format!(
            "local path = 'unix:{}'
             assert(sock:connect(path)) local a = sock:receive() assert(sock:setkeepalive())
             local again = assert(ngx.socket.connect(path))
             return show(a, again:getreusedtimes())",
            path.display()
        );
        run(&vm(), &unconnected(0, &source)).await
    });
    assert_eq!(got, "unix 1");
}

#[test]
fn idle_connections_are_used_again() {
    check(
        server(echo),
        "assert(sock:getreusedtimes() == 0)
         local ok = sock:setkeepalive(1000, 2)
         local gone = show(sock:send('x'))
         local out = {}
         for i = 1, 2 do
            assert(sock:connect('127.0.0.1', PORT))
            sock:send('ping') assert(sock:receive(4) == 'ping')
            out[i] = sock:getreusedtimes()
            sock:setkeepalive()
         end
         assert(sock:connect('127.0.0.1', PORT, { pool = 'other' }))
         return show(ok, gone, out[1], out[2], sock:getreusedtimes())",
        "1 nil closed 1 2 0",
    );
}

#[test]
fn a_connection_with_unread_data_is_not_kept() {
    check(
        stalls("abc"),
        "sock:receive(1) return show(sock:setkeepalive()) .. '|' .. show(sock:connect('127.0.0.1', PORT)) .. show(sock:getreusedtimes())",
        "nil unread data in buffer|10",
    );
    check(stalls("abc"), "ngx.sleep(0.02) return show(sock:setkeepalive())", "nil connection in dubious state");
    check(says(""), "ngx.sleep(0.02) return show(sock:setkeepalive())", "nil closed");
}

#[test]
fn an_idle_connection_ends_with_its_time_or_its_peer() {
    let got = on_a_worker(async {
        let vm = vm();
        let port = server(echo).await;
        let keep = connected(port, "assert(sock:setkeepalive(10)) return 'kept'");
        assert_eq!(run(&vm, &keep).await, "kept");
        assert_eq!(vm.sockets.pools.count(), 1);
        let later = connected(port, "");
        let source = format!("ngx.sleep(0.05) {later} return show(sock:getreusedtimes())");
        let reused = run(&vm, &source).await;
        (reused, vm.sockets.pools.count())
    });
    assert_eq!(got, ("0".to_owned(), 0));
}

#[test]
fn a_pool_bounds_idle_and_with_backlog_open_connections() {
    check(
        server(echo),
        "local function open() return assert(ngx.socket.connect('127.0.0.1', PORT, { pool = 'p', pool_size = 1 })) end
         local a, b = open(), open()
         assert(a:setkeepalive() and b:setkeepalive())
         local c, d = open(), open()
         return show(c:getreusedtimes(), d:getreusedtimes())",
        "1 0",
    );
    check(
        server(echo),
        "local opts = { pool = 'q', pool_size = 1, backlog = 1 }
         local a = assert(ngx.socket.connect('127.0.0.1', PORT, opts))
         local waiter = ngx.thread.spawn(function()
            local s = assert(ngx.socket.connect('127.0.0.1', PORT, opts))
            return s:getreusedtimes()
         end)
         local refused = show(ngx.socket.connect('127.0.0.1', PORT, opts))
         a:setkeepalive()
         local _, reused = ngx.thread.wait(waiter)
         return show(refused, reused)",
        "nil too many waiting connect operations 1",
    );
    check(
        server(echo),
        "local opts = { pool = 'q', pool_size = 1, backlog = 1 }
         local a = assert(ngx.socket.connect('127.0.0.1', PORT, opts))
         sock:settimeout(20)
         local late = show(sock:connect('127.0.0.1', PORT, opts))
         a:close()
         return late .. '|' .. show(sock:connect('127.0.0.1', PORT, opts))",
        "nil timeout|1",
    );
}

#[test]
fn two_light_threads_do_not_do_the_same_at_once() {
    check(
        stalls(""),
        "local t = ngx.thread.spawn(function() return sock:receive(1) end)
         local read = sock:receiveuntil('x')
         local out = show(sock:receive(1)) .. '|' .. show(read()) .. '|' .. show(sock:send('a')) .. '|' .. show(sock:close())
            .. '|' .. show(sock:setkeepalive()) .. '|' .. show(sock:connect('127.0.0.1', PORT))
         ngx.thread.kill(t)
         return out .. '|' .. show(sock:close())",
        "nil socket busy reading|nil socket busy reading|1|nil socket busy reading|nil socket busy reading|nil socket busy reading|1",
    );
    check(
        stalls(""),
        "local t = ngx.thread.spawn(function() return sock:send(string.rep('x', 64 * 1024 * 1024)) end)
         local out = show(sock:send('a')) .. '|' .. show(sock:close())
         ngx.thread.kill(t)
         return out",
        "nil socket busy writing|nil socket busy writing",
    );
    check_unconnected(
        "local t = ngx.thread.spawn(function() return sock:connect('127.0.0.1', 1) end)
         local out = {}
         for i, method in ipairs({ 'receive', 'send', 'close', 'setkeepalive' }) do
            out[i] = show(sock[method](sock, method == 'send' and 'x' or nil))
         end
         ngx.thread.wait(t)
         return table.concat(out, '|')",
        &["nil socket busy connecting"; 4].join("|"),
    );
}

#[test]
fn a_socket_belongs_to_its_request_and_ends_with_it() {
    let (closed, other) = on_a_worker(async {
        let vm = vm();
        let (ended, mut end) = tokio::sync::mpsc::unbounded_channel();
        let port = server(move |mut s| {
            let ended = ended.clone();
            async move {
                let n = s.read(&mut [0; 1]).await.unwrap_or(0);
                ended.send(n).unwrap_or_default();
            }
        })
        .await;
        run(&vm, &connected(port, "kept, iterator = sock, sock:receiveuntil('x')")).await;
        // The peer sees the end though the script still holds the object.
        let closed = end.recv().await;
        let mut other = Vec::new();
        for (call, says) in [
            ("kept:receive()", "closed"),
            ("kept:send('x')", "closed"),
            ("iterator()", "closed"),
            ("kept:close()", "bad request"),
            ("kept:connect('127.0.0.1', 1)", "bad request"),
            ("kept:setkeepalive()", "bad request"),
        ] {
            let chunk = format!("return select(-1, pcall(function() return select(-1, {call}) end))");
            other.push((run(&vm, &chunk).await, says));
        }
        (closed, other)
    });
    assert_eq!(closed, Some(0));
    assert!(other.iter().all(|(text, says)| text.ends_with(says)), "{other:?}");
}

#[test]
fn options_are_the_systems() {
    check(
        server(echo),
        "return show(sock:setoption('keepalive', true), sock:setoption('tcp-nodelay', 1), sock:setoption('sndbuf', 10240),
            sock:setoption('rcvbuf', 10240), sock:setoption('reuseaddr', 0)) .. show(sock:setoption('nonsense', 1))
            .. show(sock:setoption('sndbuf')) .. show(type(sock:getfd()))",
        "true true true true truenil unsupported option: nonsensenil missing the \"value\" argumentnumber",
    );
    check_unconnected("return show(sock:bind('127.0.0.1'), sock:bind('nonsense'))", "1 nil bad address");
}

#[test]
fn speaks_tls_and_says_why_it_does_not() {
    let pair = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    let key = rustls_pki_types::PrivateKeyDer::try_from(pair.signing_key.serialize_der()).expect("a key");
    let config = rustls::ServerConfig::builder_with_provider(rustls::crypto::ring::default_provider().into())
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![pair.cert.der().clone()], key)
        .expect("a configuration");
    let acceptor = tokio_rustls::TlsAcceptor::from(std::sync::Arc::new(config));
    let got = on_a_worker(async {
        let port = server(move |s| {
            let acceptor = acceptor.clone();
            async move {
                let Ok(mut s) = acceptor.accept(s).await else { return };
                let mut buf = [0; 1024];
                while let Ok(n @ 1..) = s.read(&mut buf).await {
                    s.write_all(&buf[..n]).await.unwrap_or_default();
                }
            }
        })
        .await;
        let source = "
            local session = sock:sslhandshake(nil, 'localhost', false)
            sock:send('secret')
            local out = show(type(session), sock:receive(6), sock:sslhandshake(false))
            assert(sock:setkeepalive())
            assert(sock:connect('127.0.0.1', PORT))
            out = out .. ' ' .. show(sock:getreusedtimes(), sock:sslhandshake(false), sock:send('x'), sock:receive(1))
            sock:close()
            assert(sock:connect('127.0.0.1', PORT))
            return out .. '|' .. show(sock:sslhandshake(nil, 'localhost', true)) .. '|' .. show(sock:send('x'))";
        run(&vm(), &connected(port, source)).await
    });
    assert_eq!(got, "cdata secret true 1 true 1 x|nil 20: unable to get local issuer certificate|nil closed");
    check(
        says("not TLS at all\r\n\r\n"),
        "return show(sock:sslhandshake(nil, 'localhost', false))",
        "nil handshake failed",
    );
    check(stalls(""), "sock:settimeout(20) return show(sock:sslhandshake())", "nil timeout");
}

#[test]
fn pools_past_the_bound_are_refused_and_connections_without_one_not_kept() {
    let got = on_a_worker(async {
        let (vm, port) = (vm(), server(echo).await);
        let pools = vm.sockets.pools.clone();
        let open = |n: usize| pools.open(n.to_string().as_bytes(), 1, None).expect("a pool").try_lease();
        let mut held: Vec<_> = (0..MAX_POOLS).map(open).collect();
        let source = connected(
            port,
            "local plain = show(sock:setkeepalive())
             assert(sock:connect('127.0.0.1', PORT))
             return plain .. '|' .. show(sock:getreusedtimes()) .. '|' .. show(sock:connect('127.0.0.1', PORT, { pool_size = 1 }))",
        );
        let full = run(&vm, &source).await;
        held.pop();
        full + "/" + &run(&vm, &source).await
    });
    assert_eq!(got, "1|0|nil too many connection pools/1|1|1");
}

#[test]
fn what_is_received_at_once_is_bounded() {
    let endless = || {
        server(|mut s| async move {
            let piece = vec![b'x'; 1 << 20];
            while s.write_all(&piece).await.is_ok() {}
        })
    };
    check(
        endless(),
        "return show(sock:receive(64 * 1024 * 1024 + 1)) .. '|' .. show(#sock:receive(3)) .. '|' .. show(sock:receive('*a'))
            .. '|' .. show(sock:receive(1))",
        "nil too much data|3|nil too much data |nil closed",
    );
    check(
        endless(),
        "return show(sock:receive('*l')) .. '|' .. show(sock:receive(1))",
        "nil too much data |nil closed",
    );
}

/// A server that asks for a certificate of `client`, and says how many it was given.
async fn asks_for(client: rustls_pki_types::CertificateDer<'static>) -> u16 {
    let pair = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    let key = rustls_pki_types::PrivateKeyDer::try_from(pair.signing_key.serialize_der()).expect("a key");
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(client).expect("a root");
    let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_client_cert_verifier(verifier.build().expect("a verifier"))
        .with_single_cert(vec![pair.cert.der().clone()], key)
        .expect("a configuration");
    let acceptor = tokio_rustls::TlsAcceptor::from(std::sync::Arc::new(config));
    server(move |s| {
        let acceptor = acceptor.clone();
        async move {
            let Ok(mut s) = acceptor.accept(s).await else { return };
            let given = s.get_ref().1.peer_certificates().map_or(0, <[_]>::len);
            s.write_all(format!("{given} given\n").as_bytes()).await.unwrap_or_default();
            s.read_u8().await.unwrap_or_default();
        }
    })
    .await
}

#[test]
fn a_client_certificate_is_sent_when_it_is_set() {
    let make = || rcgen::generate_simple_self_signed(["client".to_owned()]).expect("a certificate");
    let (client, other) = (make(), make());
    let parsed = format!(
        "local ssl = require('ngx.ssl')
         local cert = assert(ssl.parse_pem_cert([[{}{}]]))
         local key = assert(ssl.parse_pem_priv_key([[{}]]))
         local der_key = assert(ssl.parse_der_priv_key(ssl.priv_key_pem_to_der([[{}]])))
         local function again() sock:close() assert(sock:connect('127.0.0.1', PORT)) end
         local function answer() return show(sock:sslhandshake(false, 'localhost', false)) .. ' ' .. show(sock:receive()) end ",
        client.cert.pem(),
        other.cert.pem(),
        client.signing_key.serialize_pem(),
        other.signing_key.serialize_pem(),
    );
    let runs = |source: &str| {
        let port = asks_for(client.cert.der().clone());
        on_a_worker(async { run(&vm(), &connected(port.await, &(parsed.clone() + source))).await })
    };
    assert_eq!(runs("return show(sock:setclientcert(cert, key)) .. ' ' .. answer()"), "true true 2 given");
    // Set once, it stays for the next connection, until it is taken back.
    let kept = runs(
        "assert(sock:setclientcert(cert, key)) local first = answer() again() local second = answer()
         again() assert(sock:setclientcert(nil, nil)) return first .. '|' .. second .. '|' .. tostring(answer():find('given'))",
    );
    assert_eq!(kept, "true 2 given|true 2 given|nil");
    assert!(!runs("return answer()").contains("given"), "the server wants one");
    let wrong =
        runs("assert(sock:setclientcert(cert, der_key)) return show(sock:sslhandshake(false, 'localhost', false))");
    assert!(wrong.starts_with("nil "), "the key is another's: {wrong}");
    let both = "nil client certificate must be supplied with corresponding private key";
    for (arguments, expected) in [
        ("cert", both),
        ("nil, key", both),
        ("'cert', key", "nil bad cert arg: cdata expected, got string"),
        ("cert, 'key'", "nil bad pkey arg: cdata expected, got string"),
        ("key, cert", "nil bad cert arg: cdata expected, got userdata"),
    ] {
        assert_eq!(runs(&format!("return show(sock:setclientcert({arguments}))")), expected, "{arguments}");
    }
}
