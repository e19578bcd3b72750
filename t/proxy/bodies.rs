//! Request bodies that do not say their length: how much of them is read, and what becomes of those that are longer.

use bytes::Bytes;
use http::Request;
use serde_json::json;

use super::{
    Gateway, Upstream, eventually,
    grpc::{self, Pieces, rest},
    support::{Client, http2},
};

/// More than stays in memory.
const MAX: usize = 2 << 20;

/// Sends so many bytes in chunks, and says that these were all only where they are not too many.
fn http1(gw: &Gateway, length: usize) -> (u16, Vec<u8>) {
    let mut client = Client::connect(&gw.proxy());
    client.send("POST", "/", &[("Transfer-Encoding", "chunked")], b"");
    for piece in pieces(length) {
        client.write(format!("{:x}\r\n", piece.len()).as_bytes()).expect("is sent");
        client.write(&piece).expect("is sent");
        client.write(b"\r\n").expect("is sent");
    }
    if length <= MAX {
        client.write(b"0\r\n\r\n").expect("is sent");
    }
    let reply = client.reply("POST");
    (reply.status, reply.body)
}

fn http2(gw: &Gateway, length: usize) -> (u16, Vec<u8>) {
    http2::runtime().block_on(async {
        let mut sender = grpc::client(gw).await;
        let (give, taken) = tokio::sync::mpsc::channel(64);
        let request = Request::post(format!("http://{}/", gw.proxy())).body(Pieces(taken)).expect("a request");
        let answered = sender.send_request(request);
        for piece in pieces(length) {
            give.send(piece).await.expect("is taken");
        }
        let open = (length > MAX).then_some(give);
        let response = answered.await.expect("an answer");
        let (head, mut body) = response.into_parts();
        let (body, _) = rest(&mut body).await;
        drop(open);
        (head.status.as_u16(), body)
    })
}

/// `{xx…}`, a document of GraphQL, that ends with a piece of one byte.
fn pieces(length: usize) -> impl Iterator<Item = Bytes> {
    let mut text = vec![b'x'; length];
    (text[0], text[length - 1]) = (b'{', b'}');
    let (most, last) = text.split_at(length - 1);
    let pieces: Vec<Bytes> = most.chunks(64 << 10).chain([last]).map(Bytes::copy_from_slice).collect();
    pieces.into_iter()
}

fn no_file_is_left(gw: &Gateway) {
    let ours = format!("moongate-body-{}-", gw.pid());
    eventually("no file is left", || {
        let mut files = std::fs::read_dir(std::env::temp_dir()).expect("a directory").flatten();
        (!files.any(|file| file.file_name().to_string_lossy().starts_with(&ours))).then_some(())
    });
}

/// Says how much came.
fn counting() -> Upstream {
    Upstream::answering(|seen| {
        let text = seen.body.len().to_string();
        format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{text}", text.len())
    })
}

/// Exactly the bound passes; one byte more is refused as soon as it is there, although the client has not ended.
fn holds_the_bound(gw: &Gateway, up: &Upstream) {
    for send in [http1, http2] {
        let before = up.seen().len();
        assert_eq!(send(gw, MAX), (200, MAX.to_string().into_bytes()));
        let (status, page) = send(gw, MAX + 1);
        assert!(status == 413 && page.starts_with(b"<html>"), "{status} {}", page.escape_ascii());
        assert_eq!(up.seen().len() - before, 1, "the other was sent to nobody");
    }
    no_file_is_left(gw);
}

#[test]
fn a_body_is_read_as_far_as_the_gateways_bound() {
    let gw = Gateway::with(json!({"nginx_config": {"http": {"client_max_body_size": MAX}}}));
    let up = counting();
    let read = "return function() ngx.req.read_body() assert(ngx.req.get_body_file()) end";
    gw.route("1", "/*", &up, json!({"serverless-pre-function": {"phase": "access", "functions": [read]}}));
    holds_the_bound(&gw, &up);
    gw.expect_log("client sent too large chunked body");
}

/// Whoever looks into a body has a bound of its own: past it the value is unknown, and the request goes on whole.
fn goes_on_past_the_bound(gw: &Gateway) {
    for (length, known) in [(MAX, true), (MAX + 1, false)] {
        let mut client = Client::connect(&gw.proxy());
        client.send("POST", "/", &[("Transfer-Encoding", "chunked")], b"");
        for piece in pieces(length) {
            client.write(format!("{:x}\r\n", piece.len()).as_bytes()).expect("is sent");
            client.write(&piece).expect("is sent");
            client.write(b"\r\n").expect("is sent");
        }
        client.write(b"0\r\n\r\n").expect("is sent");
        let reply = client.reply("POST");
        let shown = (reply.status, reply.text(), reply.header("Known").map(str::to_owned));
        assert_eq!(shown, (200, length.to_string(), Some(known.to_string())));
    }
    no_file_is_left(gw);
}

#[test]
fn a_plugin_takes_a_body_as_far_as_its_bound_and_the_request_goes_on() {
    let gw = Gateway::start();
    let read = format!(
        "return function()
            local core = require('apisix.core')
            local body, err = core.request.get_body({MAX})
            if not body then core.log.error('refused: ', err) end
            ngx.header.Known = tostring(body ~= nil)
        end"
    );
    gw.route("1", "/*", &counting(), json!({"serverless-pre-function": {"phase": "access", "functions": [read]}}));
    goes_on_past_the_bound(&gw);
    gw.expect_log(&format!("refused: request size {} is greater than the maximum size {MAX} allowed", MAX + 1));
}

#[test]
fn a_variable_is_known_of_a_body_as_far_as_its_bound_and_the_request_goes_on() {
    let gw = Gateway::with(json!({"graphql": {"max_size": MAX}}));
    let ask = "return function(_, ctx) ngx.header.Known = tostring(ctx.var.graphql_operation ~= nil) end";
    let plugins = json!({"serverless-pre-function": {"phase": "access", "functions": [ask]}});
    let upstream = json!({"type": "roundrobin", "nodes": {counting().addr(): 1}});
    gw.put("/routes/1", json!({"uri": "/*", "plugins": plugins, "upstream": upstream}));
    goes_on_past_the_bound(&gw);
    // Asked for by the condition of a route.
    let vars = json!([["graphql_operation", "~=", "mutation"]]);
    gw.put("/routes/1", json!({"uri": "/*", "vars": vars, "plugins": plugins, "upstream": upstream}));
    goes_on_past_the_bound(&gw);
    gw.expect_log(&format!("request size {} is greater than the maximum size {MAX} allowed", MAX + 1));
}
