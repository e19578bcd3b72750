//! resty.memcached.

use serde_json::{Value, json};

use crate::{
    closing, lua, port, saying,
    support::{Gateway, Upstream, peers},
};

/// A client that is connected to `arg.port`.
const CONNECTED: &str = "
    local memcached = require('resty.memcached')
    local memc = memcached:new()
    add(memc:set_timeout(5000))
    add(memc:connect('127.0.0.1', tonumber(arg.port)))\n";

fn run(gw: &Gateway, port: u16, script: &str) -> Value {
    let rows = lua(gw, &[("port", &port)], &format!("{CONNECTED}{script}"));
    let rows = rows.as_array().expect("rows");
    assert_eq!(json!(rows[..2]), json!([[1], [1]]), "connected");
    json!(rows[2..])
}

#[test]
fn values_are_stored_and_found() {
    let (gw, memcached) = (Gateway::start(), peers::memcached());
    let rows = run(
        &gw,
        memcached.port,
        "add(memc:set('dog', 32))
        add(memc:get('dog'))
        add(memc:get('nodog'))
        add(memc:set('dog', { 'a ', { 'kind of' }, ' animal' }, 0, 5))
        add(memc:get('dog'))
        add(memc:add('dog', 'again'))
        add(memc:add('cat', 'first'))
        add(memc:replace('cat', 'second'))
        add(memc:replace('nocat', 'second'))
        add(memc:append('cat', ' and more'))
        add(memc:prepend('cat', 'so: '))
        add(memc:append('nocat', 'x'))
        add(memc:get('cat'))
        add(memc:set('with space\\r\\nand lines', 'v'))
        add(memc:get('with space\\r\\nand lines'))
        add(memc:set('bytes', '\\0\\r\\nEND\\r\\n\\255'))
        add((memc:get('bytes')) == '\\0\\r\\nEND\\r\\n\\255')
        add(memc:set('empty', ''))
        add(memc:get('empty'))
        add(memc:set('past', 'v', -1))
        add(memc:get('past'))
        add(memc:delete('cat'))
        add(memc:delete('cat'))
        add(memc:touch('dog', 100))
        add(memc:touch('cat', 100))
        add(memc:flush_all())
        add(memc:get('dog'))",
    );
    assert_eq!(
        rows,
        json!([
            [1],
            ["32", "0"],
            ["nil", "nil"],
            [1],
            ["a kind of animal", "5"],
            ["nil", "NOT_STORED"],
            [1],
            [1],
            ["nil", "NOT_STORED"],
            [1],
            [1],
            ["nil", "NOT_STORED"],
            ["so: second and more", "0"],
            [1],
            ["v", "0"],
            [1],
            [true],
            [1],
            ["", "0"],
            [1],
            ["nil", "nil"],
            [1],
            ["nil", "NOT_FOUND"],
            [1],
            ["nil", "NOT_FOUND"],
            [1],
            ["nil", "nil"],
        ])
    );
}

#[test]
fn several_keys_are_asked_for_at_once() {
    let (gw, memcached) = (Gateway::start(), peers::memcached());
    let rows = run(
        &gw,
        memcached.port,
        "memc:set('a b', 1)
        memc:set('c', 2, 0, 7)
        add(memc:get({ 'a b', 'none', 'c' }))
        add(memc:get({}))
        local results = memc:gets({ 'a b', 'none', 'c' })
        add(results['a b'][1], results['a b'][3]:match('^%d+$') ~= nil, results.none, results.c[2])",
    );
    assert_eq!(rows, json!([[{"a b": ["1", "0"], "c": ["2", "7"]}], [{}], ["1", true, "nil", "7"]]));
}

#[test]
fn cas_stores_what_nobody_has_changed() {
    let (gw, memcached) = (Gateway::start(), peers::memcached());
    let rows = run(
        &gw,
        memcached.port,
        "memc:set('dog', 1)
        local value, flags, unique, err = memc:gets('dog')
        add(value, flags, type(unique), err)
        add(memc:cas('dog', 2, unique, 0, 3))
        add(memc:cas('dog', 3, unique))
        add(memc:cas('nodog', 3, unique))
        add(memc:cas('dog', 3, 'x\\r\\nflush_all'))
        add(memc:get('dog'))
        add(memc:gets('nodog'))",
    );
    assert_eq!(
        rows,
        json!([
            ["1", "0", "string", "nil"],
            [1],
            ["nil", "EXISTS"],
            ["nil", "NOT_FOUND"],
            ["nil", "invalid cas_unique"],
            ["2", "3"],
            ["nil", "nil", "nil"],
        ])
    );
}

#[test]
fn counters_count() {
    let (gw, memcached) = (Gateway::start(), peers::memcached());
    let rows = run(
        &gw,
        memcached.port,
        "memc:set('n', 10)
        add(memc:incr('n', 32))
        add(memc:decr('n', 40))
        add(memc:decr('n', 40))
        add(memc:incr('none', 1))
        memc:set('text', 'abc')
        add(memc:incr('text', 1))
        add(memc:incr('n', 'many'))
        add(memc:incr('n', 1))",
    );
    let text = "CLIENT_ERROR cannot increment or decrement non-numeric value";
    assert_eq!(
        rows,
        json!([["42"], ["2"], ["0"], ["nil", "NOT_FOUND"], ["nil", text], ["nil", "invalid delta"], ["1"]])
    );
}

#[test]
fn the_server_tells_of_itself_and_quits() {
    let (gw, memcached) = (Gateway::start(), peers::memcached());
    let rows = run(
        &gw,
        memcached.port,
        "add((memc:version()):match('^%d+%.%d+%.%d+$') ~= nil)
        local lines = memc:stats()
        add(#lines > 10, lines[1]:match('^STAT pid %d+$') ~= nil)
        memc:set('a', 1)
        add((memc:stats('items')[1]):match('^STAT items:') ~= nil)
        add(memc:stats('x\\r\\nflush_all'))
        add(memc:verbosity(0))
        add(memc:verbosity('loud'))
        add(memc:get('a'))
        add(memc:flush_all(1000))
        add(memc:get('a'))
        add(memc:quit())
        add(memc:get('a'))
        add(memc:set_keepalive())",
    );
    assert_eq!(
        rows,
        json!([
            [true],
            [true, true],
            [true],
            ["nil", "invalid argument"],
            [1],
            ["nil", "invalid level"],
            ["1", "0"],
            [1],
            ["1", "0"],
            [1],
            ["nil", "nil", "closed"],
            ["nil", "closed"],
        ])
    );
}

#[test]
fn what_could_end_a_command_early_is_not_sent() {
    let (gw, memcached) = (Gateway::start(), peers::memcached());
    let rows = run(
        &gw,
        memcached.port,
        "add(memc:set(('k'):rep(251), 1))
        add(memc:get(('k'):rep(251)))
        add(memc:get({ 'a', ('k'):rep(251) }))
        add(memc:set('', 1))
        add(memc:set('k', nil))
        add(memc:set('k', 1, '0 0 1\\r\\nx'))
        add(memc:set('k', 1, 0, 'x'))
        add(memc:set('k', ('x'):rep(2000000)))
        add(memc:set('k', 'fits'))
        add(memc:get('k'))
        local loop = {}
        loop[1] = loop
        add(memc:set('k', loop))
        local same = function(key) return key end
        local bare = memcached:new({ key_transform = { same, same } })
        add(bare:connect('127.0.0.1', tonumber(arg.port)))
        add(bare:set('a b', 1))
        add(bare:set('a%20b', 1))
        add(bare:get('a%20b'))
        add(memc:get('a b'))
        add(memcached:new({ key_transform = {} }))",
    );
    assert_eq!(
        rows,
        json!([
            ["nil", "invalid key"],
            ["nil", "nil", "invalid key"],
            ["nil", "invalid key"],
            ["nil", "invalid key"],
            ["nil", "invalid value"],
            ["nil", "invalid exptime"],
            ["nil", "invalid flags"],
            ["nil", "SERVER_ERROR object too large for cache"],
            [1],
            ["fits", "0"],
            ["nil", "value nested too deeply"],
            [1],
            ["nil", "invalid key"],
            [1],
            ["1", "0"],
            ["1", "0"],
            ["nil", "key_transform needs two functions"],
        ])
    );
}

#[test]
fn pipelines_are_committed_or_cancelled() {
    let (gw, memcached) = (Gateway::start(), peers::memcached());
    let rows = run(
        &gw,
        memcached.port,
        "add(memc:commit_pipeline())
        memc:init_pipeline(4)
        memc:set('dog', 32)
        memc:incr('dog', 10)
        memc:get('dog')
        memc:get('nodog')
        memc:add('dog', 1)
        memc:get({ 'dog', 'cat' })
        add(memc:commit_pipeline())
        memc:init_pipeline()
        memc:set('dog', 'cancelled')
        memc:cancel_pipeline()
        add(memc:get('dog'))",
    );
    assert_eq!(
        rows,
        json!([
            ["nil", "no more cmds"],
            [[1, "42", ["42", "0"], {}, [false, "NOT_STORED"], {"dog": ["42", "0"]}]],
            ["42", "0"],
        ])
    );
}

#[test]
fn connections_come_from_the_pool() {
    let (gw, memcached) = (Gateway::start(), peers::memcached());
    let rows = run(
        &gw,
        memcached.port,
        "add(memc:get_reused_times())
        add(memc:set_keepalive(10000, 10))
        add(memc:get('a'))
        add(memc:connect('127.0.0.1', tonumber(arg.port)))
        add(memc:get_reused_times())
        add(memc:set('a', 1))
        add(memc:close())
        add(memc:close())
        add(memc:set_timeouts(1000, 1000, 1000))
        add(memc:connect('127.0.0.1', 1))
        add(memc:connect('unix:/nowhere/at/all'))",
    );
    assert_eq!(
        rows,
        json!([
            [0],
            [1],
            ["nil", "nil", "closed"],
            [1],
            [1],
            [1],
            [1],
            ["nil", "closed"],
            [1],
            ["nil", "connection refused"],
            ["nil", "no such file or directory"],
        ])
    );
}

#[test]
fn what_is_no_answer_closes_the_connection() {
    let gw = Gateway::start();
    let long = "x".repeat(10_000);
    let cases: [(&str, &str, &str); 10] = [
        ("memc:get('a')", "what\r\n", "bad line: what"),
        ("memc:get('a')", "VALUE a 0\r\n", "bad line: VALUE a 0"),
        ("memc:get('a')", "VALUE a 0 99999999999999999999\r\n", "answer too large"),
        ("memc:get('a')", "VALUE a 0 70000000\r\n", "too much data"),
        ("memc:get('a')", "VALUE a 0 1\r\nabc\r\nEND\r\n", "value without its end"),
        ("memc:get('a')", "VALUE a 0 1\r\na\r\nVALUE b 0 1\r\nb\r\nEND\r\n", "more values than keys"),
        ("memc:get('a')", &long, "line too long"),
        ("memc:get('a')", "VALUE a 0 5\r\nab", "timeout"),
        ("memc:get('a')", "", "timeout"),
        ("memc:stats()", "STAT a 1\r\n", "timeout"),
    ];
    for (call, answer, error) in cases {
        let peer = saying(answer);
        let timeout = if error == "timeout" { 50 } else { 5000 };
        let script = format!(
            "memc:set_timeout({timeout})
            local n = 0
            local function last(...) n = select('#', ...) return (select(n, ...)) end
            add(last({call}))
            add(last(memc:get('a')))
            add(memc:set_keepalive())"
        );
        let rows = run(&gw, port(&peer.addr()).parse().expect("a port"), &script);
        assert_eq!(rows, json!([[error], ["closed"], ["nil", "closed"]]), "{answer:.40}");
    }
    let port_of = |peer: &Upstream| port(&peer.addr()).parse().expect("a port");
    let rows = run(&gw, port_of(&saying("HTTP/1.1 400\r\n")), "add(memc:set('a', 1)) add(memc:set('a', 1))");
    assert_eq!(rows, json!([["nil", "HTTP/1.1 400"], ["nil", "closed"]]));
    let rows = run(&gw, port_of(&closing()), "add(memc:set('a', 1))");
    assert_eq!(rows, json!([["nil", "closed"]]));
    let half = saying("STORED\r\n");
    let script = "memc:set_timeout(20) memc:init_pipeline() memc:set('a', 1) memc:set('b', 1)
        add(memc:commit_pipeline()) add(memc:set('a', 1))";
    assert_eq!(run(&gw, port_of(&half), script), json!([["nil", "timeout"], ["nil", "closed"]]));
}
