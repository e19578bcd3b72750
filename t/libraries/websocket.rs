//! resty.websocket. The client speaks to a server of the test's own and back; the server's raw connection, in the place
//! of ngx.req.socket(true), leads to the test.

use std::{
    fmt::Display,
    io::{Read, Write, copy},
    net::{Shutdown, TcpStream},
    sync::{Arc, Mutex},
    thread,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use serde_json::{Value, json};

use crate::{
    lua, lua_patching, port,
    support::{
        Gateway, Upstream, eventually,
        websocket::{Frame, HANDSHAKE, KEY, frame, read_frame},
    },
};

/// The answer to `KEY` in RFC 6455, 1.3.
const ACCEPT: &str = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

/// A server whose answer is what the script says, not 101.
const SERVER: &str = "
    ngx.send_headers, ngx.flush = function() return 1 end, function() return 1 end
    ngx.req.socket = function(raw)
        assert(raw == true)
        local sock = ngx.socket.tcp()
        local ok, err = sock:connect('127.0.0.1', tonumber(arg.port))
        if not ok then return nil, err end
        return sock
    end
    local function new(opts)
        local wb, err = require('resty.websocket.server'):new(opts)
        local accept, protocol = ngx.header['Sec-WebSocket-Accept'], ngx.header['Sec-WebSocket-Protocol']
        for _, name in ipairs({ 'Upgrade', 'Connection', 'Sec-WebSocket-Accept', 'Sec-WebSocket-Protocol' }) do
            ngx.header[name] = nil
        end
        return wb, err, accept, protocol
    end\n";

const CLIENT: &str = "
    local wb = require('resty.websocket.client'):new({ timeout = 5000 })
    local uri = 'ws://127.0.0.1:' .. arg.port\n";

fn serve(gw: &Gateway, peer: &Upstream, script: &str) -> Value {
    let addr = peer.addr();
    lua_patching(gw, &HANDSHAKE, &[("port", &port(&addr))], &format!("{SERVER}{script}"))
}

fn connect(gw: &Gateway, peer: &Upstream, script: &str) -> Value {
    let addr = peer.addr();
    lua(gw, &[("port", &port(&addr))], &format!("{CLIENT}{script}"))
}

/// A peer that sends these bytes first, then keeps every frame that comes.
fn frames(bytes: Vec<u8>) -> (Upstream, Arc<Mutex<Vec<Frame>>>) {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let into = seen.clone();
    let peer = Upstream::serving(move |_, mut stream| {
        let _ = stream.write_all(&bytes);
        while let Ok(frame) = read_frame(&mut stream) {
            into.lock().expect("not poisoned").push(frame);
        }
    });
    (peer, seen)
}

/// Reads a request's head and agrees to what it asks for; the head.
fn shake_hands(stream: &mut TcpStream) -> std::io::Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.extend(byte);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let key = head.lines().find_map(|line| line.strip_prefix("Sec-WebSocket-Key: ")).unwrap_or_default();
    let accept = format!("{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
    let accept = STANDARD.encode(digest(&SHA1_FOR_LEGACY_USE_ONLY, accept.as_bytes()));
    let answer = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade";
    stream.write_all(format!("{answer}\r\nsec-websocket-accept: {accept}\r\n\r\n").as_bytes())?;
    Ok(head)
}

#[test]
fn the_server_answers_the_handshake_and_reads_every_kind_of_frame() {
    let gw = Gateway::start();
    let wire = [
        frame(0x81, true, b"Hello"),
        frame(0x01, true, b"in "),
        frame(0x00, true, b"three "),
        frame(0x80, true, b"parts"),
        frame(0x82, true, &[0, 255, 1]),
        frame(0x82, true, &[7; 40_001]),
        frame(0x89, true, b"ping"),
        frame(0x8a, true, b""),
        frame(0x88, true, b"\x03\xe8bye"),
    ];
    let (peer, seen) = frames(wire.concat());
    let rows = serve(
        &gw,
        &peer,
        "local wb, err, accept, protocol = new({ timeout = 5000 })
        add(err, accept, protocol)
        for _ = 1, 4 do add(wb:recv_frame()) end
        local data, typ = wb:recv_frame()
        add(data:byte(1, -1))
        data, typ = wb:recv_frame()
        add(#data, data == ('\\7'):rep(40001), typ)
        for _ = 1, 3 do add(wb:recv_frame()) end
        add(wb:send_text('Hi'))
        add(wb:send_binary(('x'):rep(1000)))
        add(wb:send_ping('p'))
        add(wb:send_pong())
        add(wb:send_frame(false, 1, 'part'))
        add(wb:send_frame(true, 0, ('y'):rep(70000)))
        add(wb:send_ping(('x'):rep(126)))
        add(wb:send_frame(false, 9, 'x'))
        add(wb:send_close(70000, 'x'))
        add(wb:send_close(1000, 'enough'))
        add(wb:send_text('more'))
        wb:set_timeout(20)
        add(wb:recv_frame())
        add(wb:recv_frame())",
    );
    assert_eq!(
        rows,
        json!([
            ["nil", ACCEPT, "chat"],
            ["Hello", "text", "nil"],
            ["in ", "text", "again"],
            ["three ", "continuation", "again"],
            ["parts", "continuation", "nil"],
            [0, 255, 1],
            [40001, true, "binary"],
            ["ping", "ping", "nil"],
            ["", "pong", "nil"],
            ["bye", "close", 1000],
            [4],
            [1004],
            [3],
            [2],
            [6],
            ["nil", "payload too big"],
            ["nil", "too much payload for control frame"],
            ["nil", "fragmented control frame"],
            ["nil", "bad status code"],
            [10, "nil"],
            ["nil", "already closed"],
            ["nil", "nil", "failed to receive the first 2 bytes: timeout"],
            ["nil", "nil", "failed to receive the first 2 bytes: timeout"],
        ])
    );
    let sent: [(u8, Vec<u8>); 6] = [
        (0x81, b"Hi".to_vec()),
        (0x82, vec![b'x'; 1000]),
        (0x89, b"p".to_vec()),
        (0x8a, Vec::new()),
        (0x01, b"part".to_vec()),
        (0x88, b"\x03\xe8enough".to_vec()),
    ];
    let sent: Vec<_> = sent.into_iter().map(|(first, payload)| Frame { first, masked: false, payload }).collect();
    eventually("the frames arrive", || (seen.lock().expect("not poisoned").len() == 6).then_some(()));
    assert_eq!(*seen.lock().expect("not poisoned"), sent);
}

#[test]
fn a_handshake_that_is_none_is_refused() {
    let gw = Gateway::start();
    let (peer, _) = frames(Vec::new());
    let addr = peer.addr();
    let cases = [
        ("Upgrade", "h2c", "bad \"upgrade\" request header: h2c"),
        ("Connection", "close", "bad \"connection\" request header"),
        ("Sec-WebSocket-Key", "c2hvcnQ=", "bad \"sec-websocket-key\" request header"),
        ("Sec-WebSocket-Key", "?", "bad \"sec-websocket-key\" request header"),
        ("Sec-WebSocket-Version", "8", "bad \"sec-websocket-version\" request header"),
    ];
    for (name, value, error) in cases {
        let mut headers = HANDSHAKE;
        headers.iter_mut().filter(|(n, _)| *n == name).for_each(|header| header.1 = value);
        let rows = lua_patching(&gw, &headers, &[("port", &port(&addr))], &format!("{SERVER} add(new())"));
        assert_eq!(rows, json!([["nil", error, "nil", "nil"]]), "{name}");
    }
}

#[test]
fn frames_that_are_none_end_the_connection() {
    let gw = Gateway::start();
    let huge = [&[0x82, 0xff], &[0; 3][..], &[1, 0, 0, 0, 0]].concat();
    let cases: [(Vec<u8>, &str); 12] = [
        (frame(0x81, false, b"bare"), "frame unmasked"),
        (frame(0xc1, true, b"x"), "bad RSV1, RSV2, or RSV3 bits"),
        (frame(0x83, true, b"x"), "reserved non-control frames"),
        (frame(0x8b, true, b"x"), "reserved control frames"),
        (frame(0x09, true, b"x"), "fragmented control frame"),
        (frame(0x89, true, &[0; 126]), "too long payload for control frame"),
        (frame(0x88, true, b"x"), "close frame with a body must carry a 2-byte status code"),
        (frame(0x82, true, &[0; 101]), "exceeding max payload len"),
        (huge, "payload len too large"),
        (vec![0x82], "failed to receive the first 2 bytes: timeout"),
        (vec![0x82, 0xfe, 0], "failed to receive the 2 byte payload length: timeout"),
        (frame(0x82, true, b"half")[..7].to_vec(), "failed to read payload: timeout"),
    ];
    for (bytes, error) in cases {
        let (peer, _) = frames(bytes);
        let timeout = if error.ends_with("timeout") { 200 } else { 5000 };
        let rows = serve(
            &gw,
            &peer,
            &format!(
                "local wb = new({{ timeout = {timeout}, max_payload_len = 100 }})
                add(wb:recv_frame())
                add(wb:recv_frame())
                add(wb:send_text('x'))"
            ),
        );
        let fatal = "fatal error already happened";
        assert_eq!(rows, json!([["nil", "nil", error], ["nil", "nil", fatal], ["nil", fatal]]));
    }
    let gone = Upstream::serving(|_, _| {});
    let rows = serve(&gw, &gone, "local wb = new({ timeout = 5000 }) add(wb:recv_frame()) add(wb:recv_frame())");
    let closed = "failed to receive the first 2 bytes: closed";
    assert_eq!(rows, json!([["nil", "nil", closed], ["nil", "nil", "fatal error already happened"]]));
}

#[test]
fn the_client_shakes_hands_and_masks_what_it_sends() {
    let gw = Gateway::start();
    let (heads, seen) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(Vec::new())));
    let (into_heads, into_seen) = (heads.clone(), seen.clone());
    let peer = Upstream::serving(move |_, mut stream| {
        let Ok(head) = shake_hands(&mut stream) else { return };
        into_heads.lock().expect("not poisoned").push(head);
        while let Ok(got) = read_frame(&mut stream) {
            let answer = match got.first {
                0x89 => frame(0x8a, false, &got.payload),
                0x88 => frame(0x88, false, &got.payload),
                _ => frame(got.first, false, &[b"copy: ", &got.payload[..]].concat()),
            };
            into_seen.lock().expect("not poisoned").push(got);
            if stream.write_all(&answer).is_err() {
                return;
            }
        }
    });
    let rows = connect(
        &gw,
        &peer,
        "local opts = { protocols = { 'chat', 'more' }, origin = 'http://moon.test', headers = { 'X-Own: 1' },
            host = 'moon.test', key = 'dGhlIHNhbXBsZSBub25jZQ==' }
        local ok, err, head = wb:connect(uri .. '/s?a=1', opts)
        add(ok, err, head:match('^[^\\r]+'), head:lower():match('sec%-websocket%-accept: ') ~= nil, head:sub(-4))
        add(wb:send_text('Hello'))
        add(wb:recv_frame())
        add(wb:send_ping('are you there'))
        add(wb:recv_frame())
        add(wb:set_keepalive(10000, 10))
        add(wb:send_text('x'))
        ok, err, head = wb:connect(uri)
        add(ok, err, head)
        add(wb:send_binary('\\0\\1'))
        add(wb:recv_frame())
        add(wb:send_close(1000, 'bye'))
        add(wb:recv_frame())
        add(wb:set_keepalive())
        add(wb:close())
        add((wb:connect(uri)))
        add(wb:close())
        add(wb:close())",
    );
    assert_eq!(
        rows,
        json!([
            [1, "nil", "HTTP/1.1 101 Switching Protocols", true, "\r\n\r\n"],
            [11],
            ["copy: Hello", "text", "nil"],
            [19],
            ["are you there", "pong", "nil"],
            [1],
            ["nil", "failed to send frame: closed"],
            [1, "nil", "connection reused"],
            [8],
            ["copy: \0\u{1}", "binary", "nil"],
            [11, "nil"],
            ["bye", "close", 1000],
            ["nil", "closed"],
            [1, "nil"],
            [1],
            [1, "nil"],
            ["nil", "closed"],
        ])
    );
    let heads = eventually("both heads are kept", || {
        let heads = heads.lock().expect("not poisoned");
        (heads.len() == 2).then(|| heads.clone())
    });
    let mut lines: Vec<_> = heads[0].trim_end().split("\r\n").collect();
    lines.sort_unstable();
    let key = format!("Sec-WebSocket-Key: {KEY}");
    assert_eq!(
        lines,
        [
            "Connection: Upgrade",
            "GET /s?a=1 HTTP/1.1",
            "Host: moon.test",
            "Origin: http://moon.test",
            &key,
            "Sec-WebSocket-Protocol: chat,more",
            "Sec-WebSocket-Version: 13",
            "Upgrade: websocket",
            "X-Own: 1",
        ]
    );
    assert!(heads[1].starts_with("GET / HTTP/1.1\r\n") && heads[1].contains(&format!("Host: {}\r\n", peer.addr())));
    assert!(!heads[1].contains(KEY), "a key of its own");
    let seen = seen.lock().expect("not poisoned");
    assert!(seen.len() >= 4 && seen.iter().all(|frame| frame.masked));
}

#[test]
fn the_client_refuses_what_is_no_handshake() {
    let gw = Gateway::start();
    let refused = "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n";
    let unproven = "HTTP/1.1 101 Switching\r\nSec-WebSocket-Accept: nonsense\r\n\r\n";
    let cases: [(&str, &str, Value); 4] = [
        (refused, "bad HTTP response status line: HTTP/1.1 403 Forbidden", json!(refused)),
        (unproven, "bad Sec-WebSocket-Accept response header", json!(unproven)),
        (&"x".repeat(70_000), "failed to receive response header: too long", json!("nil")),
        ("HTTP/1.1 101", "failed to receive response header: timeout", json!("nil")),
    ];
    for (answer, error, head) in cases {
        let peer = crate::saying(answer);
        let timeout = if error.ends_with("timeout") { 100 } else { 5000 };
        let rows = connect(&gw, &peer, &format!("wb:set_timeout({timeout}) add(wb:connect(uri))"));
        assert_eq!(rows, json!([["nil", error, head]]));
    }
    let peer = crate::saying("");
    let rows = connect(
        &gw,
        &peer,
        "add(wb:connect('http://127.0.0.1'))
        add(wb:connect('ws://127.0.0.1/a b'))
        add(wb:connect('ws://user@127.0.0.1/'))
        add(wb:connect(uri, { origin = 'x\\r\\nX-Bad: 1' }))
        add(wb:connect(uri, { headers = { 'a: 1', 'b: 2\\r\\nX-Bad: 1' } }))
        add(wb:connect('ws://127.0.0.1:1/'))
        wb:set_timeout(20)
        add((select(2, wb:connect((uri:gsub('ws:', 'wss:'))))))",
    );
    assert_eq!(
        rows,
        json!([
            ["nil", "bad websocket uri"],
            ["nil", "bad websocket uri"],
            ["nil", "bad websocket uri"],
            ["nil", "invalid connect option", "nil"],
            ["nil", "invalid custom header", "nil"],
            ["nil", "failed to connect: connection refused"],
            ["ssl handshake failed: timeout"],
        ])
    );
}

#[test]
fn client_and_server_speak_to_each_other() {
    let gw = Gateway::start();
    // The first connection is the client's, the second the server's end of the same stream.
    let waiting: Arc<Mutex<Option<TcpStream>>> = Arc::default();
    let peer = Upstream::serving(move |up, mut stream| {
        if up.connections() == 1 {
            *waiting.lock().expect("not poisoned") = Some(stream.try_clone().expect("a second handle"));
            let _ = shake_hands(&mut stream);
            return;
        }
        let Some(client) = waiting.lock().expect("not poisoned").take() else { return };
        let pipe = |mut from: TcpStream, mut to: TcpStream| {
            let _ = copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Write);
        };
        let back = (stream.try_clone().expect("a handle"), client.try_clone().expect("a handle"));
        thread::spawn(move || pipe(back.0, back.1));
        pipe(client, stream);
    });
    let addr = peer.addr();
    let args: [(&str, &dyn Display); 1] = [("port", &port(&addr))];
    let script = "
        add((wb:connect(uri)))
        local server = new({ timeout = 5000, send_masked = true, max_send_len = 100000 })
        local long = ('moon '):rep(12000)
        add(wb:send_text(long))
        local data, typ = server:recv_frame()
        add(data == long, typ)
        add(server:send_binary('\\255\\0' .. long))
        data, typ = wb:recv_frame()
        add(data == '\\255\\0' .. long, typ)
        add(server:send_text(long .. long:sub(1, 10000)))
        add(wb:recv_frame())
        add(wb:recv_frame())";
    let rows = lua_patching(&gw, &HANDSHAKE, &args, &format!("{CLIENT}{SERVER}{script}"));
    assert_eq!(
        rows,
        json!([
            [1],
            [60008],
            [true, "text"],
            [60010],
            [true, "binary"],
            [70014],
            ["nil", "nil", "exceeding max payload len"],
            ["nil", "nil", "fatal error already happened"],
        ])
    );
}

/// A function whose clients get back what they say, in capitals.
const SHOUTING: &str = "return function()
    local wb, err = require('resty.websocket.server'):new({ timeout = 5000 })
    if not wb then
        ngx.log(ngx.WARN, 'no websocket: ', err)
        return 400, err
    end
    while true do
        local data, typ, err = wb:recv_frame()
        if not data then ngx.log(ngx.WARN, 'over: ', err) return end
        if typ == 'close' then
            wb:send_close(1000, 'bye')
            ngx.log(ngx.WARN, 'closed with ', err)
            return
        end
        wb:send_text(data:upper())
    end
end";

fn shouting() -> Gateway {
    let gw = Gateway::start();
    assert_eq!(gw.admin_text("PUT", "/functions/shout", SHOUTING, "text/plain").status, 201);
    gw.put("/routes/1", json!({"uri": "/shout", "function_id": "shout"}));
    gw
}

#[test]
fn a_function_serves_websockets_on_the_gateways_own_port() {
    let gw = shouting();
    let mut stream = TcpStream::connect(gw.proxy()).expect("connected");
    let fields: String = HANDSHAKE.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    // The first frame comes right behind the request.
    let mut request = format!("GET /shout HTTP/1.1\r\nHost: h\r\n{fields}\r\n").into_bytes();
    request.extend(frame(0x81, true, b"early"));
    stream.write_all(&request).expect("sent");
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).expect("a head");
        head.extend(byte);
    }
    let head = String::from_utf8(head).expect("text");
    assert!(head.starts_with("HTTP/1.1 101 Switching Protocols\r\n"), "{head}");
    assert!(head.contains(&format!("Sec-WebSocket-Accept: {ACCEPT}\r\n")), "{head}");
    let lower = head.to_ascii_lowercase();
    assert!(!lower.contains("content-length") && !lower.contains("transfer-encoding"), "{head}");
    let text = |payload: &[u8]| Frame { first: 0x81, masked: false, payload: payload.to_vec() };
    assert_eq!(read_frame(&mut stream).expect("a frame"), text(b"EARLY"));
    stream.write_all(&frame(0x81, true, b"late")).expect("sent");
    assert_eq!(read_frame(&mut stream).expect("a frame"), text(b"LATE"));
    stream.write_all(&frame(0x88, true, &[3, 232])).expect("sent");
    let closing = read_frame(&mut stream).expect("a frame");
    assert_eq!((closing.first, &closing.payload[..]), (0x88, &b"\x03\xe8bye"[..]));
    assert_eq!(stream.read(&mut [0]).expect("readable"), 0, "the connection ends with its script");
    gw.expect_log("closed with 1000");
}

#[test]
fn what_is_no_handshake_is_answered_as_a_request() {
    let gw = shouting();
    let refused = gw.get("/shout");
    assert_eq!((refused.status, refused.text().as_str()), (400, "bad \"upgrade\" request header: nil"));
}
