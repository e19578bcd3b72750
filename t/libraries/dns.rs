//! resty.dns.resolver, against a name server of the test's own.

use std::{
    io::{Read, Write},
    net::{TcpListener, UdpSocket},
    thread,
};

use serde_json::{Value, json};

use crate::{
    lua,
    support::{Gateway, Upstream, ports::free_port},
};

const NEW: &str = "
    local resolver = require('resty.dns.resolver')
    local function new(more)
        local opts = { nameservers = { { '127.0.0.1', tonumber(arg.port) } }, timeout = 5000, retrans = 2 }
        for k, v in pairs(more or {}) do opts[k] = v end
        return resolver:new(opts)
    end
    local r = new()\n";

fn run(gw: &Gateway, port: u16, script: &str) -> Value {
    lua(gw, &[("port", &port)], &format!("{NEW}{script}"))
}

/// A name server over UDP and TCP: `answer` gets the question's name and the query, and whether it came over TCP.
fn server(answer: impl Fn(&str, &[u8], bool) -> Vec<Vec<u8>> + Send + Sync + 'static) -> u16 {
    let (udp, tcp) = (0..100)
        .find_map(|_| {
            let udp = UdpSocket::bind("127.0.0.1:0").expect("a free port");
            let tcp = TcpListener::bind(udp.local_addr().expect("an address")).ok()?;
            Some((udp, tcp))
        })
        .expect("a port that is free for both");
    let port = udp.local_addr().expect("an address").port();
    let answer = std::sync::Arc::new(answer);
    let over_tcp = answer.clone();
    thread::spawn(move || {
        let mut query = [0; 512];
        while let Ok((n, from)) = udp.recv_from(&mut query) {
            for message in answer(&name_of(&query[..n]), &query[..n], false) {
                udp.send_to(&message, from).expect("sent");
            }
        }
    });
    thread::spawn(move || {
        for mut stream in tcp.incoming().flatten() {
            let mut size = [0; 2];
            let mut query = vec![0; stream.read_exact(&mut size).map_or(0, |()| u16::from_be_bytes(size).into())];
            if stream.read_exact(&mut query).is_err() || query.is_empty() {
                continue;
            }
            for message in over_tcp(&name_of(&query), &query, true) {
                let size = u16::try_from(message.len()).expect("a message");
                let _ = stream.write_all(&[&size.to_be_bytes()[..], &message].concat());
            }
        }
    });
    port
}

fn name_of(query: &[u8]) -> String {
    let (mut at, mut labels) = (12, Vec::new());
    while query[at] > 0 {
        let end = at + 1 + usize::from(query[at]);
        labels.push(String::from_utf8_lossy(&query[at + 1..end]).into_owned());
        at = end;
    }
    labels.join(".")
}

fn encoded(name: &str) -> Vec<u8> {
    let labels = name.split('.').flat_map(|label| [&[label.len() as u8], label.as_bytes()].concat());
    labels.chain([0]).collect()
}

/// A record for the name that was asked for, as a pointer to the question.
fn record(kind: u16, data: &[u8]) -> Vec<u8> {
    record_of(b"\xc0\x0c", kind, data)
}

fn record_of(name: &[u8], kind: u16, data: &[u8]) -> Vec<u8> {
    let size = (data.len() as u16).to_be_bytes();
    [name, &kind.to_be_bytes(), &[0, 1, 0, 0, 1, 44], &size, data].concat()
}

/// An answer with this second byte of flags and records in its three sections.
fn reply(query: &[u8], flags: [u8; 2], sections: [&[Vec<u8>]; 3]) -> Vec<u8> {
    let counts = sections.map(|records| (records.len() as u16).to_be_bytes()).concat();
    [&query[..2], &[0x80 | flags[0], flags[1], 0, 1], &counts, &query[12..], &sections.concat().concat()].concat()
}

fn answers(query: &[u8], records: &[Vec<u8>]) -> Vec<Vec<u8>> {
    vec![reply(query, [0, 0], [records, &[], &[]])]
}

#[test]
fn records_of_every_known_type_are_read() {
    let port = server(|name, query, _| {
        let mx = [&[0, 10][..], &encoded("mail.test")].concat();
        let srv = [&[0, 1, 0, 2, 31, 144][..], b"\x04node\xc0\x10"].concat();
        let soa = [encoded("ns.test"), encoded("who.test"), (1..=20).collect()].concat();
        let records = match name {
            "a.test" => vec![record(1, &[192, 0, 2, 1]), record(1, &[192, 0, 2, 255])],
            "aaaa.test" => vec![record(28, &[0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xab])],
            "cname.test" => vec![record(5, b"\x04real\xc0\x12"), record_of(b"\xc0\x28", 1, &[192, 0, 2, 2])],
            "mx.test" => vec![record(15, &mx)],
            "txt.test" => vec![record(16, b"\x05hello"), record(16, b"\x01a\x00\x02bc")],
            "spf.test" => vec![record(99, b"\x06v=spf1")],
            "srv.test" => vec![record(33, &srv)],
            "ns.test" => vec![record(2, &encoded("ns1.test"))],
            "soa.test" => vec![record(6, &soa)],
            "dot.test" => vec![record(5, b"\x03a.b\x04test\0")],
            "1.2.0.192.in-addr.arpa" => vec![record(12, &encoded("host.test"))],
            _ => vec![record(257, b"\x01\x02")],
        };
        answers(query, &records)
    });
    let gw = Gateway::start();
    let rows = run(
        &gw,
        port,
        "add((r:query('a.test')))
        add(r:query('A.TEST.', { qtype = r.TYPE_A }) ~= nil)
        add(r:query('aaaa.test', { qtype = r.TYPE_AAAA })[1].address)
        local cnames = r:query('cname.test')
        add(cnames[1].cname, cnames[2].name, cnames[2].address)
        local mx = r:query('mx.test', { qtype = r.TYPE_MX })[1]
        add(mx.preference, mx.exchange)
        local txt = r:query('txt.test', { qtype = r.TYPE_TXT })
        add(txt[1].txt, txt[2].txt)
        add(r:query('spf.test', { qtype = r.TYPE_SPF })[1].spf)
        local srv = r:query('srv.test', { qtype = r.TYPE_SRV })[1]
        add(srv.priority, srv.weight, srv.port, srv.target)
        add(r:query('ns.test', { qtype = r.TYPE_NS })[1].nsdname)
        local soa = r:query('soa.test', { qtype = r.TYPE_SOA })[1]
        add(soa.mname, soa.rname, soa.serial, soa.refresh, soa.retry, soa.expire, soa.minimum)
        add(r:query('dot.test')[1].cname)
        add(r:reverse_query('192.0.2.1')[1].ptrdname)
        local other = r:query('other.test', { qtype = 257 })[1]
        add(other.type, other.rdata:byte(1, -1))",
    );
    let a =
        |address: &str| json!({"name": "a.test", "type": 1, "class": 1, "ttl": 300, "section": 1, "address": address});
    assert_eq!(
        rows,
        json!([
            [[a("192.0.2.1"), a("192.0.2.255")]],
            [true],
            ["2001:db8:0:0:0:0:0:ab"],
            ["real.test", "real.test", "192.0.2.2"],
            [10, "mail.test"],
            ["hello", ["a", "", "bc"]],
            ["v=spf1"],
            [1, 2, 8080, "node.test"],
            ["ns1.test"],
            ["ns.test", "who.test", 0x0102_0304, 0x0506_0708, 0x090a_0b0c, 0x0d0e_0f10, 0x1112_1314],
            ["a\\.b.test"],
            ["host.test"],
            [257, 1, 2],
        ])
    );
}

#[test]
fn sections_come_when_asked_for() {
    let port = server(|_, query, _| {
        let authority = [record(2, &encoded("ns.test"))];
        let additional = [record_of(&encoded("ns.test"), 1, &[192, 0, 2, 9])];
        vec![reply(query, [0, 0], [&[record(1, &[192, 0, 2, 1])], &authority, &additional])]
    });
    let gw = Gateway::start();
    let rows = run(
        &gw,
        port,
        "local function sections(opts)
            local all = {}
            for _, record in ipairs(r:query('a.test', opts)) do all[#all + 1] = record.section end
            return unpack(all)
        end
        add(sections())
        add(sections({ authority_section = true }))
        add(sections({ additional_section = true }))
        add(sections({ authority_section = true, additional_section = true }))",
    );
    assert_eq!(rows, json!([[1], [1, 2], [1, 3], [1, 2, 3]]));
}

#[test]
fn what_does_not_fit_comes_over_tcp() {
    let port = server(|name, query, over_tcp| match (name, over_tcp) {
        ("many.test", false) => vec![reply(query, [2, 0], [&[], &[], &[]])],
        ("id.test", true) => {
            let mut other = answers(query, &[]);
            other[0][0] ^= 1;
            other
        }
        ("half.test", true) => vec![],
        (_, true) => answers(query, &vec![record(1, &[192, 0, 2, 1]); 200]),
        _ => vec![],
    });
    let gw = Gateway::start();
    let rows = run(
        &gw,
        port,
        "add(#r:query('many.test'))
        add(#r:tcp_query('tcp.test', { qtype = r.TYPE_A }))
        add(r:tcp_query('id.test'))
        local _, err = r:tcp_query('half.test')
        add((err:gsub('%d+$', '')))",
    );
    let gone = format!("failed to receive the reply length field from TCP server 127.0.0.1:{port}: closed");
    assert_eq!(rows, json!([[200], [200], ["nil", "id mismatch", "nil"], [gone]]));
}

#[test]
fn strangers_answers_are_passed_over() {
    let port = server(|name, query, _| {
        let right = answers(query, &[record(1, &[192, 0, 2, 1])]).remove(0);
        let mut wrong_id = answers(query, &[record(1, &[192, 0, 2, 66])]).remove(0);
        wrong_id[1] ^= 1;
        let mut wrong_name = answers(query, &[record(1, &[192, 0, 2, 67])]).remove(0);
        wrong_name[13] ^= 1;
        let mut no_answer = right.clone();
        no_answer[2] &= 0x7f;
        let strays = vec![wrong_id, wrong_name, no_answer, vec![1, 2, 3]];
        if name == "only.test" { strays } else { [strays, vec![right]].concat() }
    });
    let gw = Gateway::start();
    let rows = run(
        &gw,
        port,
        "add(r:query('stray.test')[1].address)
        local short = new({ timeout = 200 })
        local answers, err, tries = short:query('only.test', nil, {})
        add(answers, err, #tries)",
    );
    let silent = format!("failed to receive reply from UDP server 127.0.0.1:{port}: timeout");
    assert_eq!(rows, json!([["192.0.2.1"], ["nil", silent, 2]]));
}

#[test]
fn servers_are_tried_in_turn() {
    let failing = server(|_, query, _| vec![reply(query, [0, 2], [&[], &[], &[]])]);
    let mute = server(|_, _, _| vec![]);
    let port = server(|name, query, _| match name {
        "nx.test" => vec![reply(query, [0, 3], [&[], &[], &[]])],
        _ => answers(query, &[record(1, &[192, 0, 2, 1])]),
    });
    let gw = Gateway::start();
    let rows = lua(
        &gw,
        &[("port", &port), ("failing", &failing), ("mute", &mute)],
        &format!(
            "{NEW}
            local function at(port) return {{ '127.0.0.1', tonumber(port) }} end
            local nx = r:query('nx.test')
            add(nx.errcode, nx.errstr, #nx)
            local three = new({{ nameservers = {{ at(arg.failing), at(arg.mute), at(arg.port) }}, timeout = 200, retrans = 5, no_random = true }})
            local answers, err, tries = three:query('a.test', nil, {{}})
            add(answers[1].address, err, #tries, tries[1])
            add(three:query('a.test')[1].address)
            local failing = new({{ nameservers = {{ at(arg.failing) }} }})
            answers, err = failing:query('a.test')
            add(answers.errcode, answers.errstr, err)
            three:set_timeout(2000)
            three:destroy()
            add(three:query('a.test'))
            add((resolver:new()))
            add(resolver:new({{ nameservers = {{}} }}))
            local dead = new({{ nameservers = {{ {{ '127.0.0.1', 1 }} }} }})
            add(dead:query('a.test'))
            add((dead:tcp_query('a.test')))"
        ),
    );
    let refused = "failed to receive reply from UDP server 127.0.0.1:1: connection refused";
    assert_eq!(
        rows,
        json!([
            [3, "name error", 0],
            ["192.0.2.1", "nil", 2, "server returned error code: 2: server failure"],
            ["192.0.2.1"],
            [2, "server failure", "nil"],
            ["nil", "not initialized"],
            ["nil"],
            ["nil", "no nameservers specified"],
            ["nil", refused, "nil"],
            ["nil"],
        ])
    );
}

#[test]
fn malformed_answers_are_refused() {
    let port = server(|name, query, over_tcp| {
        // The first record begins behind the question: at 12 + 5 + 4 + 5 for `loop.test`.
        let here = [0xc0, (query.len()) as u8];
        let mut long = record(16, b"\x05hello");
        long[11] = 200;
        let records = match name {
            "a.test" => vec![record(1, &[192, 0, 2])],
            "aaaa.test" => vec![record(28, &[0; 17])],
            "cname.test" => vec![record(5, b"\x01a\0rest")],
            "loop.test" => vec![record_of(&here, 1, &[192, 0, 2, 1])],
            "ahead.test" => vec![record_of(b"\xff\xff", 1, &[192, 0, 2, 1])],
            "label.test" => vec![record_of(b"\x80\0", 1, &[192, 0, 2, 1])],
            "name.test" => vec![record_of(&vec![63; 400], 1, &[192, 0, 2, 1])],
            "mx.test" => vec![record(15, &[0, 1])],
            "srv.test" => vec![record(33, &[0; 6])],
            "soa.test" => vec![record(6, &[0, 0, 1])],
            "txt.test" => vec![record(16, b"\x09short")],
            "long.test" => vec![long],
            _ if !over_tcp => {
                let mut counts = answers(query, &[]).remove(0);
                counts[4..6].copy_from_slice(&[0, 9]);
                return vec![counts];
            }
            _ => vec![],
        };
        answers(query, &records)
    });
    let gw = Gateway::start();
    let cases = [
        ("a", "bad A record value length: 3"),
        ("aaaa", "bad AAAA record value length: 17"),
        ("cname", "bad cname record length"),
        ("loop", "bad name pointer"),
        ("ahead", "bad name pointer"),
        ("label", "bad label"),
        ("name", "name too long"),
        ("mx", "bad MX record value length: 2"),
        ("srv", "bad SRV record value length: 6"),
        ("soa", "bad SOA record length"),
        ("txt", "bad TXT record value length"),
        // What seems to be cut off is asked for again over TCP.
        ("long", "truncated"),
        ("questions", "bad number of questions in the DNS response: 9"),
    ];
    for (name, error) in cases {
        let rows = run(&gw, port, &format!("add(r:query('{name}.test'))"));
        assert_eq!(rows, json!([["nil", error, "nil"]]), "{name}");
    }
    let rows = run(
        &gw,
        port,
        "add(r:query('.test'))
        add(r:query('a..test'))
        add(r:query(''))
        add(r:query(('x'):rep(64) .. '.test'))
        add(r:query(('x.'):rep(130)))
        add(r:query('a.test', { qtype = 70000 }))",
    );
    let bad = json!(["nil", "bad name", "nil"]);
    assert_eq!(rows, json!([bad, bad, bad, bad, bad, ["nil", "bad type", "nil"]]));
}

#[test]
fn addresses_are_compressed_expanded_and_reversed() {
    let gw = Gateway::start();
    let rows = run(
        &gw,
        free_port(),
        "for _, address in ipairs({ 'FF01:0:0:0:0:0:0:101', '0:0:0:0:0:0:0:1', '1:0:0:2:0:0:0:3', '1:0:2:3:4:5:6:7',
            '1:2:3:4:5:6:0:0', 'FF01::101', '0:0:0:0:0:0:0:0' }) do
            add(resolver.compress_ipv6_addr(address))
        end
        for _, address in ipairs({ 'FF01::101', '::', '::1', '1::', '1:2:3:4:5:6:7:8' }) do
            add(resolver.expand_ipv6_addr(address))
        end
        add(resolver.arpa_str('1.2.3.4'))
        add(resolver.arpa_str('FF01::101'))",
    );
    assert_eq!(
        rows,
        json!([
            ["FF01::101"],
            ["::1"],
            ["1:0:0:2::3"],
            ["1:0:2:3:4:5:6:7"],
            ["1:2:3:4:5:6::"],
            ["FF01::101"],
            ["::"],
            ["FF01:0:0:0:0:0:0:101"],
            ["0:0:0:0:0:0:0:0"],
            ["0:0:0:0:0:0:0:1"],
            ["1:0:0:0:0:0:0:0"],
            ["1:2:3:4:5:6:7:8"],
            ["4.3.2.1.in-addr.arpa"],
            ["1.0.1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.1.0.F.F.ip6.arpa"],
        ])
    );
}

#[test]
fn discovery_serves_what_dns_says() {
    let up = Upstream::echo();
    let port: u16 = up.addr().rsplit_once(':').expect("a port").1.parse().expect("a port");
    let srv = |priority: u16, weight: u16, port: u16, target: &str| {
        let numbers = [priority, weight, port].map(u16::to_be_bytes).concat();
        record(33, &[numbers, encoded(target)].concat())
    };
    let server = server(move |name, query, _| {
        let kind = query[query.len() - 3];
        let records = match (name, kind) {
            ("two.test", 1) => vec![record(1, &[127, 0, 0, 1]), record(1, &[127, 0, 0, 2])],
            ("split.test", 33) => vec![srv(10, 100, port, "one.test"), srv(20, 0, 0, "two.test")],
            ("one.test", 1) => vec![record(1, &[127, 0, 0, 1])],
            ("alias.test", 33) => vec![record(5, b"\x05split\xc0\x12")],
            ("gone.test", 33) => vec![srv(1, 1, 80, "nowhere.test")],
            _ => return vec![reply(query, [0, 3], [&[], &[], &[]])],
        };
        answers(query, &records)
    });
    let gw = Gateway::with(json!({"discovery": {"dns": {"servers": [format!("127.0.0.1:{server}")]}}}));
    let routes = [
        ("two", format!("two.test:{port}")),
        ("split", "split.test".into()),
        ("alias", "alias.test".into()),
        ("gone", "gone.test".into()),
        ("none", "none.test".into()),
        ("hosts", "localhost".into()),
    ];
    for (id, name) in &routes {
        let upstream = json!({"type": "roundrobin", "discovery_type": "dns", "service_name": name});
        gw.put(&format!("/routes/{id}"), json!({"uri": format!("/{id}"), "upstream": upstream}));
    }
    assert_eq!(gw.get("/two").status, 200);
    gw.expect_log(&format!("\"127.0.0.1:{port}\":1,\"127.0.0.2:{port}\":1"));
    assert_eq!(gw.get("/split").status, 200, "the lowest priority is asked first");
    let nodes = [format!("\"127.0.0.1:{port}\":200"), "\"127.0.0.1:80\":1,\"127.0.0.2:80\":1".into()];
    nodes.iter().for_each(|part| gw.expect_log(part));
    assert_eq!(gw.get("/alias").status, 200, "aliases are followed");
    for path in ["/gone", "/none", "/hosts"] {
        assert_eq!(gw.get(path).status, 503, "{path}");
    }
    gw.expect_log("no valid upstream node: failed to query the DNS server: name error");
}
