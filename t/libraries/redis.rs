//! resty.redis.

use std::cell::Cell;

use serde_json::{Value, json};

use crate::{
    closing, lua, port, saying,
    support::{Gateway, peers, ports},
};

/// A client that is connected to `arg.port`.
const CONNECTED: &str = "
    local redis = require('resty.redis')
    local red = redis:new()
    red:set_timeouts(5000, 5000, 5000)
    add(red:connect('127.0.0.1', tonumber(arg.port)))\n";

fn run(gw: &Gateway, port: u16, script: &str) -> Value {
    let mut rows = lua(gw, &[("port", &port)], &format!("{CONNECTED}{script}"));
    let connected = rows.as_array_mut().expect("rows").remove(0);
    assert_eq!(connected, json!([1]));
    rows
}

#[test]
fn commands_give_strings_numbers_null_arrays_and_errors() {
    let (gw, redis) = (Gateway::start(), peers::redis());
    let rows = run(
        &gw,
        redis.port,
        "add(red:set('dog', 'an animal'))
        add(red:get('dog'))
        add(red:get('nodog'))
        add(red:set('bytes', '\\0\\r\\n\\255'))
        add(#red:get('bytes'), red:get('bytes') == '\\0\\r\\n\\255')
        add(red:set('big', ('x'):rep(300000)))
        add(#red:get('big'))
        add(red:incrby('n', 41) + 1)
        add(red:lpop('dog'))
        add(red:rpush('list', 1, 'two', 3.5))
        add(red:lrange('list', 0, -1))
        add(red:lrange('nolist', 0, -1))
        add(red:blpop('nolist', 0.01))
        add(red:client('setname', 'moon'))
        add(red:client('getname'))
        add(red:nosuchcommand('a'))
        add(red:PING())
        add(redis.add_commands('strlen', 'echo').echo ~= nil, red:echo('there'))",
    );
    assert_eq!(
        rows,
        json!([
            ["OK"],
            ["an animal"],
            [null],
            ["OK"],
            [4, true],
            ["OK"],
            [300000],
            [42],
            [false, "WRONGTYPE Operation against a key holding the wrong kind of value"],
            [3],
            [["1", "two", "3.5"]],
            [{}],
            [null],
            ["OK"],
            ["moon"],
            [false, "ERR unknown command 'nosuchcommand', with args beginning with: 'a' "],
            ["PONG"],
            [true, "there"],
        ])
    );
}

#[test]
fn hashes_go_in_as_tables_and_come_out_as_tables() {
    let (gw, redis) = (Gateway::start(), peers::redis());
    let rows = run(
        &gw,
        redis.port,
        "add(red:hmset('h', { a = 1, b = 'two' }))
        add(red:hmset('h', 'c', 3, 'd', 4))
        add(red:hmget('h', { 'd', 'none', 'a' }))
        add(red:hmget('h', 'b', 'c'))
        add(red:array_to_hash(red:hgetall('h')))",
    );
    assert_eq!(
        rows,
        json!([
            ["OK"],
            ["OK"],
            [["4", null, "1"]],
            [["two", "3"]],
            [{"a": "1", "b": "two", "c": "3", "d": "4"}],
        ])
    );
}

#[test]
fn pipelines_are_committed_or_cancelled() {
    let (gw, redis) = (Gateway::start(), peers::redis());
    let rows = run(
        &gw,
        redis.port,
        "add(red:commit_pipeline())
        red:init_pipeline(4)
        add(select('#', red:set('a', 1)))
        red:incr('a')
        red:lpop('a')
        red:mget('a', 'none')
        add(red:commit_pipeline())
        red:init_pipeline()
        red:set('a', 'cancelled')
        red:cancel_pipeline()
        add(red:get('a'))
        red:init_pipeline()
        add(red:commit_pipeline())",
    );
    let wrong = json!([false, "WRONGTYPE Operation against a key holding the wrong kind of value"]);
    assert_eq!(
        rows,
        json!([["nil", "no pipeline"], [0], [["OK", 2, wrong, ["2", null]]], ["2"], [{}]]),
        "an empty table encodes as an object"
    );
}

#[test]
fn a_transaction_holds_the_connection() {
    let (gw, redis) = (Gateway::start(), peers::redis());
    let rows = run(
        &gw,
        redis.port,
        "add(red:multi())
        add(red:set('a', 'abc'))
        add(red:lpop('a'))
        add(red:set_keepalive())
        add(red:exec())
        add(red:multi())
        add(red:discard())
        add(red:exec())
        add(red:set_keepalive(1000, 10))",
    );
    let wrong = json!([false, "WRONGTYPE Operation against a key holding the wrong kind of value"]);
    assert_eq!(
        rows,
        json!([
            ["OK"],
            ["QUEUED"],
            ["QUEUED"],
            ["nil", "in transaction"],
            [["OK", wrong]],
            ["OK"],
            ["OK"],
            [false, "ERR EXEC without MULTI"],
            [1],
        ])
    );
}

#[test]
fn messages_come_while_subscribed() {
    let (gw, redis) = (Gateway::start(), peers::redis());
    let rows = run(
        &gw,
        redis.port,
        "local red2 = redis:new()
        add(red2:connect('127.0.0.1', tonumber(arg.port)))
        add(red:read_reply())
        add(red:subscribe('dog', 'cat'))
        add(red:read_reply())
        add(red:set_keepalive())
        red:set_timeout(20)
        add(red:read_reply())
        red:set_timeout(5000)
        add(red2:publish('cat', 'Hello'))
        add(red:read_reply())
        add(red:psubscribe('d*'))
        add(red2:publish('dog', '1'))
        add(red:read_reply())
        add(red:read_reply())
        add(red:get('dog'))
        add(red:unsubscribe())
        add(red:read_reply())
        add(red:punsubscribe('d*'))
        add(red:read_reply())
        add(red:get('dog'))
        add(red:set_keepalive())",
    );
    let rows = rows.as_array().expect("rows");
    let mut unsubscribed = [&rows[13][0][1], &rows[14][0][1]].map(|name| name.as_str().unwrap_or_default());
    unsubscribed.sort_unstable();
    assert_eq!(unsubscribed, ["cat", "dog"]);
    assert_eq!(
        json!(rows[..13]),
        json!([
            [1],
            ["nil", "not subscribed"],
            [["subscribe", "dog", 1]],
            [["subscribe", "cat", 2]],
            ["nil", "subscribed state"],
            ["nil", "timeout"],
            [1],
            [["message", "cat", "Hello"]],
            [["psubscribe", "d*", 3]],
            [2],
            [["message", "dog", "1"]],
            [["pmessage", "d*", "dog", "1"]],
            [
                false,
                "ERR Can't execute 'get': only (P|S)SUBSCRIBE / (P|S)UNSUBSCRIBE / PING / QUIT / RESET are allowed \
                 in this context"
            ],
        ])
    );
    assert_eq!(json!(rows[15..]), json!([[["punsubscribe", "d*", 0]], ["nil", "not subscribed"], [null], [1]]));
}

#[test]
fn connections_are_kept_apart_by_who_they_are() {
    let gw = Gateway::start();
    let redis = peers::redis_with(|_| ["--requirepass", "secret"].map(String::from).to_vec());
    let rows = lua(
        &gw,
        &[("port", &redis.port), ("socket", &redis.file("redis.sock").display())],
        "local redis = require('resty.redis')
        local red = redis:new()
        red:set_timeout(5000)
        add(red:get_reused_times())
        add(red:get('x'))
        local port = tonumber(arg.port)
        add(red:connect('127.0.0.1', port))
        add(red:get('x'))
        add(red:auth('wrong'))
        add(red:auth('secret'))
        add(red:set_keepalive(10000, 10))
        add(red:get('x'))
        add(red:set_keepalive())
        add(red:connect('127.0.0.1', port))
        add(red:get_reused_times())
        add(red:get('x'))
        add(red:close())
        add(red:close())
        local opts = { password = 'secret', db = 3, tcp_keepalive = true }
        add(red:connect('127.0.0.1', port, opts))
        add(red:get_reused_times())
        add(red:set('x', 'in 3'))
        add(red:set_keepalive(10000, 10))
        add(red:connect('127.0.0.1', port, { password = 'secret' }))
        add(red:get_reused_times(), red:get('x'))
        add(red:connect('127.0.0.1', port, opts))
        add(red:get_reused_times(), red:get('x'))
        add(red:connect('127.0.0.1', port, { password = 'wrong' }))
        add(red:connect('127.0.0.1', port, { password = 'secret', db = 99 }))
        add(red:connect('127.0.0.1', port, { password = 'secret', username = 'nobody' }))
        add(red:connect('unix:' .. arg.socket, { password = 'secret', pool = 'own' }))
        add(red:get('x'))
        add(red:close())
        add(red:connect('127.0.0.1', 1))
        add(red:connect('127.0.0.1', port, { pool_size = 1, backlog = 0, pool = 'small', password = 'secret' }))
        local more = redis:new()
        add(more:connect('127.0.0.1', port, { pool_size = 1, backlog = 0, pool = 'small' }))",
    );
    let wrong = "WRONGPASS invalid username-password pair or user is disabled.";
    assert_eq!(
        rows,
        json!([
            ["nil", "closed"],
            ["nil", "closed"],
            [1],
            [false, "NOAUTH Authentication required."],
            [false, wrong],
            ["OK"],
            [1],
            ["nil", "closed"],
            ["nil", "closed"],
            [1],
            [1],
            [null],
            [1],
            ["nil", "closed"],
            [1],
            [0],
            ["OK"],
            [1],
            [1],
            [0, null],
            [1],
            [1, "in 3"],
            ["nil", format!("failed to authenticate: {wrong}")],
            ["nil", "failed to select database 99: ERR DB index is out of range"],
            ["nil", format!("failed to authenticate: {wrong}")],
            [1],
            [null],
            [1],
            ["nil", "connection refused"],
            [1],
            ["nil", "too many waiting connect operations"],
        ])
    );
}

#[test]
fn tls_is_verified_when_asked_for() {
    let gw = Gateway::start();
    let signed = rcgen::generate_simple_self_signed(["redis.test".to_owned()]).expect("a certificate");
    // Another one for each try.
    let tls_port = Cell::new(0);
    let redis = peers::redis_with(|dir| {
        std::fs::write(dir.join("cert.pem"), signed.cert.pem()).expect("a written file");
        std::fs::write(dir.join("key.pem"), signed.signing_key.serialize_pem()).expect("a written file");
        let file = |name: &str| dir.join(name).to_string_lossy().into_owned();
        let (cert, key) = (file("cert.pem"), file("key.pem"));
        tls_port.set(ports::free_port());
        let args = ["--tls-port", &tls_port.get().to_string(), "--tls-cert-file", &cert, "--tls-key-file", &key];
        let args = args.into_iter().chain(["--tls-ca-cert-file", &cert, "--tls-auth-clients", "no"]);
        args.map(String::from).collect()
    });
    let rows = lua(
        &gw,
        &[("port", &redis.port), ("tls", &tls_port.get())],
        "local red = require('resty.redis'):new()
        red:set_timeout(5000)
        local opts = { ssl = true, server_name = 'redis.test' }
        add(red:connect('127.0.0.1', tonumber(arg.tls), opts))
        add(red:set('over', 'tls'))
        add(red:set_keepalive())
        add(red:connect('127.0.0.1', tonumber(arg.tls), opts))
        add(red:get_reused_times(), red:get('over'))
        add(red:set_keepalive())
        local ok, err = red:connect('127.0.0.1', tonumber(arg.tls), { ssl = true, server_name = 'redis.test', ssl_verify = true })
        add(ok, err:match('^failed to do ssl handshake: ') ~= nil)
        red:set_timeout(20)
        add(red:connect('127.0.0.1', tonumber(arg.port), opts))",
    );
    let plain = "failed to do ssl handshake: timeout";
    assert_eq!(rows, json!([[1], ["OK"], [1], [1], [1, "tls"], [1], ["nil", true], ["nil", plain]]));
}

#[test]
fn a_module_prefix_goes_before_one_command() {
    let gw = Gateway::start();
    let peer = saying("+OK\r\n");
    let rows = lua(
        &gw,
        &[("port", &port(&peer.addr()))],
        "local redis = require('resty.redis')
        redis.register_module_prefix('bf')
        local red = redis:new()
        add(red:connect('127.0.0.1', tonumber(arg.port)))
        add(red:bf():add('dog', 1))",
    );
    assert_eq!(rows, json!([[1], ["OK"]]));
    let (gw, redis) = (Gateway::start(), peers::redis());
    let rows = run(&gw, redis.port, "redis.register_module_prefix('bf') add(red:bf():add('dog', 1)) add(red:get('a'))");
    assert_eq!(rows, json!([[false, "ERR unknown command 'bf.add', with args beginning with: 'dog' '1' "], [null]]));
}

#[test]
fn what_is_no_reply_closes_the_connection() {
    let gw = Gateway::start();
    let long = format!("+{}\r\n", "x".repeat(70_000));
    let deep = format!("{}:1\r\n", "*1\r\n".repeat(100));
    let cases: [(&str, &str); 13] = [
        ("?what\r\n", "unknown prefix: \"?\""),
        ("\r\n", "empty reply"),
        (":abc\r\n", "bad integer reply"),
        ("$abc\r\n", "bad bulk reply length"),
        ("$\r\n", "bad bulk reply length"),
        ("$1\r\nabc", "bulk reply without its end"),
        ("$99999999999999\r\n", "reply too large"),
        ("$70000000\r\n", "too much data"),
        ("*99999999999999\r\n", "reply too large"),
        ("*x\r\n", "bad multi-bulk reply length"),
        ("*2\r\n:1\r\n~\r\n", "unknown prefix: \"~\""),
        (&long, "line too long"),
        (&deep, "reply nested too deeply"),
    ];
    for (answer, error) in cases {
        let peer = saying(answer);
        let port = port(&peer.addr()).parse().expect("a port");
        let rows = run(&gw, port, "add(red:get('a')) add(red:get('a')) add(red:set_keepalive())");
        assert_eq!(rows, json!([["nil", error], ["nil", "closed"], ["nil", "closed"]]), "{answer:.40}");
    }
}

#[test]
fn a_peer_that_is_silent_or_gone_is_an_error() {
    let gw = Gateway::start();
    let silent = saying("");
    let port_of = |peer: &crate::support::Upstream| port(&peer.addr()).parse().expect("a port");
    let rows =
        run(&gw, port_of(&silent), "red:set_timeout(20) add(red:get('a')) add(red:get('a')) add(red:set_keepalive())");
    assert_eq!(rows, json!([["nil", "timeout"], ["nil", "closed"], ["nil", "closed"]]));
    let rows = run(
        &gw,
        port_of(&silent),
        "red:set_timeout(20) red:init_pipeline() red:get('a') add(red:commit_pipeline()) add(red:commit_pipeline())",
    );
    assert_eq!(rows, json!([["nil", "timeout"], ["nil", "no pipeline"]]));
    let rows = run(&gw, port_of(&closing()), "add(red:get('a'))");
    assert_eq!(rows, json!([["nil", "closed"]]));
    let half = saying("*2\r\n$1\r\na\r\n");
    let rows = run(&gw, port_of(&half), "red:set_timeout(20) add(red:get('a')) add(red:get('a'))");
    assert_eq!(rows, json!([["nil", "timeout"], ["nil", "closed"]]));
    // While subscribed, a message of which only a part came cannot be read again from its start.
    let part = saying("*3\r\n$9\r\nsubscribe\r\n$1\r\na\r\n:1\r\n*3\r\n$7\r\nmess");
    let rows = run(
        &gw,
        port_of(&part),
        "add(red:subscribe('a')) red:set_timeout(200) add(red:read_reply()) add(red:read_reply())",
    );
    assert_eq!(rows, json!([[["subscribe", "a", 1]], ["nil", "timeout"], ["nil", "closed"]]));
}
