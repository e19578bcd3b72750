//! resty.rediscluster, against a cluster of one real node and against one that sends commands elsewhere.

use std::io::{Read, Write};

use serde_json::json;

use crate::{
    lua,
    support::{Gateway, Upstream, eventually, peers},
};

/// A client of the cluster at `arg.port`.
const CONNECTED: &str = "
    local cluster = require('resty.rediscluster')
    local red, err = cluster:new({ name = 'c' .. arg.port, serv_list = { { ip = '127.0.0.1', port = tonumber(arg.port) } },
        max_redirection = 3 })
    if not red then add(err) return end\n";

/// A node that has all slots.
fn cluster() -> peers::Peer {
    let node = peers::redis_cluster_node(&[]);
    let gw = Gateway::start();
    eventually("the node takes the slots", || {
        let script = "
            local red = require('resty.redis'):new()
            red:connect('127.0.0.1', tonumber(arg.port))
            red:cluster('addslotsrange', 0, 16383)
            add(red:set('x', 1))";
        (lua(&gw, &[("port", &node.port)], script) == json!([["OK"]])).then_some(())
    });
    node
}

#[test]
fn commands_and_scripts_go_to_the_node_of_their_key() {
    let (gw, node) = (Gateway::start(), cluster());
    let rows = lua(
        &gw,
        &[("port", &node.port)],
        &format!(
            "{CONNECTED}
            add(red:set('dog', 'an animal'))
            add(red:get('dog'))
            add(red:get('nodog'))
            add(red:eval('return {{ KEYS[1], ARGV[1] }}', 1, 'k', 'v'))
            add(red:lpop('dog'))
            add(red:get('dog'))
            add(cluster.keyslot('123456789'), cluster.keyslot('foo{{}}{{bar}}'), cluster.keyslot('{{user1000}}.a') == cluster.keyslot('{{user1000}}.b'))
            add(pcall(function() return red:multi() end))"
        ),
    );
    assert_eq!(rows[0], json!(["OK"]));
    assert_eq!(rows[1], json!(["an animal"]));
    assert_eq!(rows[2], json!([null]));
    assert_eq!(rows[3], json!([["k", "v"]]));
    let wrong = "WRONGTYPE Operation against a key holding the wrong kind of value";
    assert_eq!(rows[4], json!(["nil", wrong]));
    assert_eq!(rows[5], json!(["an animal"]), "the connection goes on after a refusal");
    assert_eq!(rows[6], json!([0x31c3, 8363, true]));
    let refusal = rows[7][1].as_str().expect("an error");
    assert!(
        refusal.ends_with("resty.rediscluster has no multi: its commands may belong to several nodes"),
        "{refusal}"
    );
}

/// Says that it has all slots, and answers every other command with this.
fn elsewhere(answer: impl Fn() -> String + Send + Sync + 'static) -> Upstream {
    Upstream::serving(move |me, mut stream| {
        let mut bytes = [0; 4096];
        while let Ok(n) = stream.read(&mut bytes) {
            if n == 0 {
                return;
            }
            let asked = String::from_utf8_lossy(&bytes[..n]).to_ascii_lowercase();
            let port = me.addr().rsplit_once(':').map(|(_, port)| port.to_owned()).unwrap_or_default();
            let reply = match asked.contains("slots") {
                true => format!("*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$9\r\n127.0.0.1\r\n:{port}\r\n"),
                false => answer(),
            };
            if stream.write_all(reply.as_bytes()).is_err() {
                return;
            }
        }
    })
}

#[test]
fn moved_and_ask_are_followed_so_many_times() {
    let (gw, node) = (Gateway::start(), cluster());
    let real = node.port;
    for kind in ["MOVED", "ASK"] {
        let up = elsewhere(move || format!("-{kind} 5474 127.0.0.1:{real}\r\n"));
        let port = up.addr().rsplit_once(':').map(|(_, port)| port.to_owned()).expect("a port");
        let script = format!("{CONNECTED} add(red:set('cat', '{kind}')) add(red:get('cat'))");
        let rows = lua(&gw, &[("port", &port)], &script);
        assert_eq!(rows, json!([["OK"], [kind]]));
    }
    let up = elsewhere(|| "-MOVED 5474 :0\r\n".into());
    let port = up.addr().rsplit_once(':').map(|(_, port)| port.to_owned()).expect("a port");
    let rows = lua(&gw, &[("port", &port)], &format!("{CONNECTED} add(red:get('cat'))"));
    let (nil, reason) = (&rows[0][0], rows[0][1].as_str().unwrap_or_default());
    assert_eq!(nil, "nil");
    assert!(!reason.is_empty(), "{rows}");
}

#[test]
fn a_cluster_that_is_not_there_is_told() {
    let gw = Gateway::start();
    let addr = Upstream::dead();
    let port = addr.rsplit_once(':').map(|(_, port)| port.to_owned()).expect("a port");
    let rows = lua(&gw, &[("port", &port)], CONNECTED);
    assert_eq!(rows, json!([["failed to fetch slots: connection refused"]]));
}
