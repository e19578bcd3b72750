//! core.pubsub on a real connection: commands and their answers, and what is none.

use std::fs;

use serde_json::json;

use crate::support::{
    Client, Gateway, eventually,
    websocket::{Frame, HANDSHAKE, frame, read_frame},
};

/// Answers pings whose state is "test" with it, "wait" after a turn; a fetch with what it was asked for.
const SERVER: &str = "return function(conf, ctx)
    local core = require('apisix.core')
    local pubsub, err = core.pubsub.new({ idle_ms = tonumber(ctx.var.arg_idle), max_request = 1000 })
    if not pubsub then
        core.log.error('no pubsub: ', err)
        return core.response.exit(400)
    end
    pubsub:on('cmd_ping', function(params)
        local state = params.state
        if state == 'wait' then ngx.sleep(0) end
        if state == 'test' or state == 'wait' then return { pong_resp = { state = state } } end
        if state == 'code' then return nil, 'with a code', 7 end
        if state == 'big' then return { pong_resp = { state = ('x'):rep(5 * 1024 * 1024) } } end
        if state == 'odd' then return { no_such_field = 1 } end
        if state == 'bad' then return { pong_resp = 1 } end
        if state == 'text' then return 'text' end
        return nil, 'error'
    end)
    pubsub:on('cmd_kafka_fetch', function(params)
        return { kafka_fetch_resp = { messages = { { offset = params.offset, key = params.topic, value = 'v' } } } }
    end)
    core.log.warn('pubsub ended with ', tostring(pubsub:wait()))
    ngx.exit(0)
end";

fn gateway() -> Gateway {
    let gw = Gateway::start();
    let plugin = json!({"phase": "access", "functions": [SERVER]});
    gw.put("/routes/1", json!({"uri": "/pubsub", "plugins": {"serverless-pre-function": plugin}}));
    gw
}

fn connect(gw: &Gateway, target: &str) -> Client {
    let mut client = Client::connect(&gw.proxy());
    client.send("GET", target, &HANDSHAKE, b"");
    assert_eq!(client.head().status, 101);
    client
}

fn send(client: &mut Client, payload: &[u8]) {
    client.write(&frame(0x82, true, payload)).expect("written");
}

/// The payload of the next binary message.
#[track_caller]
fn answer(client: &mut Client) -> Vec<u8> {
    let got = read_frame(client).expect("a frame");
    assert_eq!((got.first, got.masked), (0x82, false));
    got.payload
}

/// Of a protobuf field with a length, or a number below 128.
fn field(number: u8, payload: &[u8]) -> Vec<u8> {
    let key = u16::from(number) << 3 | 2;
    let key = if key < 128 { vec![key as u8] } else { vec![key as u8 | 0x80, (key >> 7) as u8] };
    [&key[..], &[u8::try_from(payload.len()).expect("a short one")], payload].concat()
}

/// `PubSubReq` with this sequence and cmd_ping = { state }.
fn ping(sequence: u8, state: &[u8]) -> Vec<u8> {
    [&[8, sequence], &field(32, &field(1, state))[..]].concat()
}

/// `PubSubResp` with pong_resp.
fn pong(sequence: u8, state: &[u8]) -> Vec<u8> {
    ping(sequence, state)
}

/// `PubSubResp` with error_resp.
fn error(sequence: u8, code: u8, message: &str) -> Vec<u8> {
    let code = if code == 0 { vec![] } else { vec![8, code] };
    [&[8, sequence], &field(31, &[code, field(2, message.as_bytes())].concat())[..]].concat()
}

fn close(code: u16, message: &str) -> Frame {
    Frame { first: 0x88, masked: false, payload: [&code.to_be_bytes()[..], message.as_bytes()].concat() }
}

#[test]
fn commands_are_answered_one_after_the_other() {
    let gw = gateway();
    let mut client = connect(&gw, "/pubsub");
    for (n, state) in [(1, "test"), (2, "wait"), (3, "test")] {
        send(&mut client, &ping(n, state.as_bytes()));
    }
    for (n, state) in [(1, "test"), (2, "wait"), (3, "test")] {
        assert_eq!(answer(&mut client), pong(n, state.as_bytes()));
    }
    // Offset 2^53 + 1 is no number of Lua's.
    let offset = [0x18, 0x81, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x10];
    let fetch = [field(1, b"topic"), offset.to_vec()].concat();
    send(&mut client, &[&[8, 4], &field(33, &fetch)[..]].concat());
    let message = [&[8], &offset[1..], &field(3, b"topic"), &field(4, b"v")].concat();
    assert_eq!(answer(&mut client), [&[8, 4], &field(33, &field(1, &message))[..]].concat());

    let whole = ping(5, b"test");
    let parts = [frame(0x02, true, &whole[..3]), frame(0x89, true, b"?"), frame(0x80, true, &whole[3..])];
    client.write(&parts.concat()).expect("written");
    assert_eq!(read_frame(&mut client).expect("a pong").first, 0x8a);
    assert_eq!(answer(&mut client), pong(5, b"test"), "a message in two frames, with a ping between");

    client.write(&frame(0x88, true, b"\x03\xe8bye")).expect("written");
    assert_eq!(read_frame(&mut client).expect("a frame").first, 0x88);
    assert!(client.closed());
    gw.expect_log("pubsub ended with nil");
    assert!(!gw.log().contains("fatal error in pubsub"));
}

#[test]
fn what_is_refused_is_answered_with_an_error() {
    let gw = gateway();
    let mut client = connect(&gw, "/pubsub");
    let cases: [(Vec<u8>, u8, &str); 7] = [
        (ping(0, b"other"), 0, "error"),
        (ping(0, b"code"), 7, "with a code"),
        (ping(0, b"odd"), 0, "internal error"),
        (ping(0, b"bad"), 0, "internal error"),
        (ping(0, b"text"), 0, "internal error"),
        (ping(0, b"big"), 0, "internal error"),
        (field(31, b""), 0, "unknown command"),
    ];
    for (request, code, message) in cases {
        send(&mut client, &request);
        // A sequence of 0 is not on the wire.
        assert_eq!(answer(&mut client), error(0, code, message)[2..], "{message}");
    }
    gw.expect_log("pubsub callback handler not registered for the command, command: cmd_empty");
    gw.expect_log("the answer of a pubsub handler cannot be sent, command: cmd_ping, err: it is bigger than");

    let reply = gw.get("/pubsub");
    assert_eq!(reply.status, 400);
    gw.expect_log("no pubsub: bad \"upgrade\" request header: nil");
}

#[test]
fn what_is_no_command_is_passed_over() {
    let gw = gateway();
    let mut client = connect(&gw, "/pubsub");
    let long = "text".repeat(100);
    client.write(&frame(0x81, true, long.as_bytes())).expect("written");
    gw.expect_log(&format!("pubsub server receive non-binary data, type: text, data: {}, client:", &long[..128]));
    for bytes in [&b""[..], b"\x08\x01", b"!@#$%^&*"] {
        send(&mut client, bytes);
    }
    send(&mut client, &ping(9, b"test"));
    assert_eq!(answer(&mut client), pong(9, b"test"), "the connection goes on");
    eventually("three lines of the log", || {
        (gw.log().matches("pubsub server receives empty command").count() == 3).then_some(())
    });
}

#[test]
fn frames_that_are_none_or_too_big_end_the_connection() {
    let gw = gateway();
    let part = |first: u8, n: usize| frame(first, true, &vec![0; n]);
    let cases: [(Vec<u8>, Option<Frame>, &str); 5] = [
        (part(0x82, 1001), None, "exceeding max payload len"),
        (
            [part(0x02, 600), part(0x80, 401)].concat(),
            Some(close(1009, "message too big")),
            "message too big: more than 1000 bytes",
        ),
        ([part(0x02, 0), part(0x00, 0).repeat(1024)].concat(), Some(close(1009, "message too big")), "or 1024 frames"),
        (part(0x80, 1), None, "fragments out of order"),
        (frame(0x82, false, b"bare"), None, "frame unmasked"),
    ];
    for (bytes, last, logged) in cases {
        let mut client = connect(&gw, "/pubsub");
        client.write(&bytes).expect("written");
        gw.expect_log(logged);
        if let Some(last) = last {
            assert_eq!(read_frame(&mut client).expect("a close frame"), last);
        }
        assert!(client.closed(), "{logged}");
    }
    let mut client = connect(&gw, "/pubsub");
    let state = [b'x'; 100];
    let filler = field(2, &[0; 100]).repeat(8);
    send(&mut client, &[ping(1, &state), filler].concat());
    assert_eq!(answer(&mut client), error(1, 0, "error"), "what is within the bound is read");
}

#[test]
fn a_silent_client_is_asked_and_then_left() {
    let gw = gateway();
    let mut client = connect(&gw, "/pubsub?idle=50");
    let ask = read_frame(&mut client).expect("a ping");
    assert_eq!(ask.first, 0x89);
    assert_eq!(read_frame(&mut client).expect("a close frame"), close(1001, "idle"));
    assert!(client.closed());
    gw.expect_log("fatal error in pubsub websocket server, err: failed to receive the first 2 bytes: timeout");

    let mut client = connect(&gw, "/pubsub?idle=1000");
    assert_eq!(read_frame(&mut client).expect("a ping").first, 0x89);
    client.write(&frame(0x8a, true, b"")).expect("written");
    assert_eq!(read_frame(&mut client).expect("another").first, 0x89, "one that answers stays");
    send(&mut client, &ping(1, b"test"));
    assert_eq!(answer(&mut client), pong(1, b"test"));
    drop(client);
    gw.expect_log("fatal error in pubsub websocket server, err: failed to receive the first 2 bytes: closed");
}

#[test]
fn the_documented_protocol_is_the_one_spoken() {
    let module = fs::read_to_string("lua/apisix/core/pubsub.lua").expect("the module");
    assert!(module.contains(include_str!("../../docs/pubsub.proto")), "docs/pubsub.proto and PROTO differ");
}
