//! resty.upload. The body comes from a peer of the test's own, in the place of ngx.req.socket().

use std::io::Write;

use serde_json::{Value, json};

use crate::{
    lua_patching, port,
    support::{Gateway, Upstream},
};

const FORM: &str = "--xyz\r\n\
    Content-Disposition: form-data; name=\"file1\"; filename=\"a.txt\"\r\n\
    Content-Type: text/plain\r\n\
    \r\n\
    Hello, world\r\n\
    --xyz\r\n\
    Content-Disposition: form-data; name=\"test\"\r\n\
    \r\n\
    value\r\n\r\n\
    --xyz--\r\n";

/// Reads all pieces with the body as `ngx.req.socket()` would give it.
const READ: &str = "
    ngx.req.socket = function()
        local sock = ngx.socket.tcp()
        local ok, err = sock:connect('127.0.0.1', tonumber(arg.port))
        if not ok then return nil, err end
        return sock
    end
    local upload = require('resty.upload')
    local form, err = upload:new(tonumber(arg.chunk), tonumber(arg.line), arg.preserve ~= nil)
    if not form then
        add('new', err)
        return
    end
    form:set_timeout(tonumber(arg.timeout) or 2000)
    for _ = 1, 1000 do
        local typ, res, err = form:read()
        if not typ then
            add('failed', err)
            break
        end
        add(typ, res)
        if typ == 'eof' then break end
    end
    add(form:read())
    if arg.preserve then add(ngx.req.get_body_data()) end";

/// A peer that says this in pieces of so many bytes and closes.
fn body(text: &str, pieces: usize) -> Upstream {
    let text = text.as_bytes().to_vec();
    Upstream::serving(move |_, mut stream| {
        for piece in text.chunks(pieces) {
            if stream.write_all(piece).is_err() {
                return;
            }
        }
    })
}

fn read_as(content_type: &str, body: &Upstream, args: &[(&str, &str)]) -> Value {
    let gw = Gateway::start();
    let addr = body.addr();
    let port = port(&addr);
    let mut all: Vec<(&str, &dyn std::fmt::Display)> = vec![("port", &port)];
    all.extend(args.iter().map(|(name, value)| (*name, value as &dyn std::fmt::Display)));
    lua_patching(&gw, &[("Content-Type", content_type)], &all, READ)
}

fn read(body: &Upstream, args: &[(&str, &str)]) -> Value {
    read_as("multipart/form-data; boundary=xyz", body, args)
}

fn header(key: &str, value: &str) -> Value {
    json!(["header", [key, value, format!("{key}: {value}")]])
}

#[test]
fn parts_come_as_headers_and_pieces() {
    let expected = json!([
        header("Content-Disposition", "form-data; name=\"file1\"; filename=\"a.txt\""),
        header("Content-Type", "text/plain"),
        ["body", "Hello"],
        ["body", ", wor"],
        ["body", "ld"],
        ["part_end", "nil"],
        header("Content-Disposition", "form-data; name=\"test\""),
        ["body", "value"],
        ["body", "\r\n"],
        ["part_end", "nil"],
        ["eof", "nil"],
        ["eof", "nil", "nil"],
    ]);
    for pieces in [1, 7, 1000] {
        assert_eq!(read(&body(FORM, pieces), &[("chunk", "5")]), expected, "in pieces of {pieces}");
    }
}

#[test]
fn what_stands_around_the_parts_is_passed_over() {
    let text =
        "a preamble\r\n--x y\t \r\n\r\n--x\r\nno boundary\r\n--x y\r\nno field\r\n\r\n\r\n--x y--\r\nan epilogue";
    let rows = read_as("Multipart/Form-Data; charset=utf-8; Boundary=\"x y\"", &body(text, 3), &[]);
    assert_eq!(
        rows,
        json!([
            ["body", "--x\r\nno boundary"],
            ["part_end", "nil"],
            ["header", "no field"],
            ["part_end", "nil"],
            ["eof", "nil"],
            ["eof", "nil", "nil"],
        ])
    );
}

#[test]
fn the_body_is_preserved_when_asked_for() {
    let text = format!("before\r\n{FORM}after");
    let rows = read(&body(&text, 11), &[("preserve", "1"), ("chunk", "4")]);
    assert_eq!(rows.as_array().and_then(|rows| rows.last()), Some(&json!([text])));
}

#[test]
fn what_is_no_form_is_refused() {
    let failed = |error: &str| json!([["failed", error], ["nil", "nil", error]]);
    assert_eq!(read_as("text/plain", &body(FORM, 9), &[]), json!([["new", "no boundary defined in Content-Type"]]));
    assert_eq!(read(&body("no form at all", 9), &[]), failed("closed"));
    assert_eq!(read(&body("x--xyz\r\n\r\n", 9), &[]), failed("invalid boundary line"));
    assert_eq!(read(&body("--xyzzy\r\n\r\n", 9), &[]), failed("invalid boundary line"));
    assert_eq!(read(&body("--xyz\r\nX: 1\r\n", 9), &[])[1], json!(["failed", "closed"]));
    let long = format!("--xyz\r\nX: {}\r\n\r\n", "x".repeat(600));
    let line = format!("line too long: X: {}x...", "x".repeat(509));
    assert_eq!(read(&body(&long, 100), &[]), failed(&line));
    assert_eq!(read(&body(&long, 100), &[("line", "1000")])[0][0], json!("header"));
    assert_eq!(read(&body("--xyz\r\nX: 1\r\n\r\n", 9), &[("line", "4")])[0][1][0], json!("X"));
    assert_eq!(
        read(&body("--xyz\r\nX: 12\r\n\r\n", 9), &[("line", "4")])[0],
        json!(["failed", "line too long: X: 12..."])
    );
    let cut = read(&body("--xyz\r\n\r\nhalf a bo", 9), &[("chunk", "4")]);
    assert_eq!(cut[0], json!(["body", "half"]));
    assert_eq!(cut[2], json!(["failed", "closed"]));
    let silent = Upstream::serving(|_, mut stream| {
        let _ = stream.write_all(b"--xyz\r\nX: ");
        let _ = std::io::Read::read(&mut stream, &mut [0]);
    });
    assert_eq!(read(&silent, &[("timeout", "20")]), failed("timeout"));
}

#[test]
fn a_form_is_read_from_the_request_that_runs() {
    let gw = Gateway::start();
    let source = "return function()
        local form = assert(require('resty.upload'):new(7))
        local out = {}
        repeat
            local typ, res = form:read()
            out[#out + 1] = { typ, type(res) == 'table' and res[2] or res or 'nil' }
        until typ == 'eof' or not typ
        return 200, out
    end";
    assert_eq!(gw.admin_text("PUT", "/functions/form", source, "text/plain").status, 201);
    gw.put("/routes/1", json!({"uri": "/form", "function_id": "form"}));
    let body = "--xyz\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\nHello, moon\r\n--xyz--\r\n";
    let headers = [("Content-Type", "multipart/form-data; boundary=xyz")];
    let read = gw.send("POST", "/form", &headers, body.as_bytes()).json();
    let expected = json!([
        ["header", "form-data; name=\"a\""],
        ["body", "Hello, "],
        ["body", "moon"],
        ["part_end", "nil"],
        ["eof", "nil"],
    ]);
    assert_eq!(read, expected);
    assert_eq!(gw.send("POST", "/form", &headers, b"").status, 500, "there is no body to read");
    gw.expect_log("no body");
}
