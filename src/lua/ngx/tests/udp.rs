//! `ngx.socket.udp`, `ngx.semaphore`, `resty.lock` and the resolver of scripts.

use tokio::net::UdpSocket;

use super::*;

#[test]
fn datagrams_go_both_ways_and_errors_are_told() {
    let got = on_a_worker(async {
        let peer = UdpSocket::bind("127.0.0.1:0").await.expect("bound");
        let port = peer.local_addr().expect("an address").port();
        tokio::task::spawn_local(async move {
            let mut data = [0; 64];
            while let Ok((n, from)) = peer.recv_from(&mut data).await {
                peer.send_to(&data[..n], from).await.unwrap_or_default();
            }
        });
        let source = "
            local udp = ngx.socket.udp()
            local out = show(udp:send('x')) .. '|' .. show(udp:receive()) .. '|' .. show(udp:close())
            out = out .. '|' .. show(udp:setpeername('127.0.0.1')) .. '|' .. show(udp:setpeername('some.name', 1))
            assert(udp:setpeername('127.0.0.1', PORT))
            out = out .. '|' .. show(udp:send({ 'pi', { 'n', 6 } }), udp:receive())
            udp:send('longer') out = out .. '|' .. show(udp:receive(3))
            udp:settimeout(20) out = out .. '|' .. show(udp:receive())
            assert(udp:setpeername('127.0.0.1', 1)) udp:send('x') ngx.sleep(0.01)
            return out .. '|' .. show(udp:receive()) .. '|' .. show(udp:close())";
        run(&vm(), &unconnected(port, source)).await
    });
    assert_eq!(
        got,
        "nil closed|nil closed|nil closed|nil missing the port number|nil no resolver defined to resolve \"some.name\"\
        |1 pin6|lon|nil timeout|nil connection refused|1"
    );
}

#[test]
fn a_unix_datagram_socket_is_answered() {
    let got = on_a_worker(async {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("d.sock");
        let peer = std::os::unix::net::UnixDatagram::bind(&path).expect("bound");
        std::thread::spawn(move || {
            let mut data = [0; 64];
            let (n, from) = peer.recv_from(&mut data).expect("a datagram");
            peer.send_to_addr(&data[..n], &from).expect("sent");
        });
        let source = format!(
            "local udp = ngx.socket.udp() assert(udp:setpeername('unix:{}')) udp:send('hi') return show(udp:receive())",
            path.display()
        );
        run(&vm(), &unconnected(0, &source)).await
    });
    assert_eq!(got, "hi");
}

#[test]
fn a_udp_socket_belongs_to_its_request() {
    let got = on_a_worker(async {
        let vm = vm();
        run(&vm, "kept = ngx.socket.udp() kept:setpeername('127.0.0.1', 1)").await;
        run(&vm, "return select(2, pcall(kept.send, kept, 'x'))").await
    });
    assert!(got.ends_with("bad request"), "{got}");
}

#[test]
fn semaphores_wake_in_order_across_requests() {
    let got = on_a_worker(async {
        let vm = vm();
        run(&vm, "sem, order = require('ngx.semaphore').new(1), {}").await;
        let waiter =
            |name: &str| format!("local ok = sem:wait(5) order[#order + 1] = '{name}' .. tostring(ok) return ''");
        let (a, b, c) = (waiter("a"), waiter("b"), waiter("c"));
        let post = "while sem:count() > -2 do ngx.sleep(0) end
            local count = sem:count() assert(sem:post(2)) ngx.sleep(0.01)
            return count .. table.concat(order, ' ') .. select(2, sem:wait(0)) .. select(2, sem:wait(0.01)) .. sem:count()
                .. tostring(pcall(sem.wait, sem, -1)) .. tostring(pcall(sem.post, sem, 0))";
        let all = futures_util::future::join4(run(&vm, &a), run(&vm, &b), run(&vm, &c), run(&vm, post)).await;
        all.3
    });
    assert_eq!(got, "-2atrue btrue ctruetimeouttimeout0falsefalse");
}

#[test]
fn locks_exclude_expire_and_say_why() {
    crate::shdict::store().declare("sock-test-locks", 1 << 20);
    let source = "
        local lock = require('resty.lock')
        local a = assert(lock:new('sock-test-locks', { exptime = 0.05 }))
        local b = assert(lock:new('sock-test-locks', { timeout = 0 }))
        local out = show(a:unlock()) .. '|' .. show(a:expire()) .. '|' .. show(a:lock('k')) .. '|' .. show(a:lock('k'))
            .. '|' .. show(b:lock('k'))
        local c = assert(lock:new('sock-test-locks', { timeout = 1, step = 0.005 }))
        local waited = c:lock('k')
        out = out .. '|' .. tostring(waited > 0.02 and waited < 0.5) .. '|' .. show(c:expire(10)) .. '|' .. show(b:lock('k'))
            .. '|' .. show(c:unlock()) .. '|' .. show(b:lock('k')) .. '|' .. show(b:unlock())
        return out .. '|' .. show(lock:new('no-such'))";
    let got = on_a_worker(async { run(&vm(), &unconnected(0, source)).await });
    assert_eq!(
        got,
        "nil unlocked|nil unlocked|0|nil locked|nil timeout|true|true|nil timeout|1|0|1|nil dictionary not found"
    );
}

#[test]
fn scripts_resolve_names() {
    let got = on_a_worker(async {
        let config = crate::dns::Config::default();
        let resolver = crate::dns::Resolver::new(&config, tokio::runtime::Handle::current());
        crate::lua::ngx::socket::TEST_RESOLVER.set(Some(resolver.into()));
        let source = "local resolve = require('moongate.native').apisix.resolve
            local found = assert(resolve('localhost'))
            return show(resolve('10.1.2.3')[1], found[1] == '127.0.0.1' or found[1] == '::1', resolve('not a name'))";
        run(&vm(), &unconnected(0, source)).await
    });
    assert_eq!(got, "10.1.2.3 true nil not a name could not be resolved (3: Host not found)");
}

#[test]
fn one_post_adds_only_so_much() {
    let source = "local new = require('ngx.semaphore').new
        local function text(...) return (tostring(select(2, pcall(...))):gsub('^.-: ', '')) end
        local sem = new(1000000)
        assert(sem:post(1000000))
        return sem:count() .. '|' .. text(sem.post, sem, 1000001) .. '|' .. text(new, 1000001) .. '|' .. sem:count()";
    let got = on_a_worker(async { run(&vm(), source).await });
    assert_eq!(got, "2000000|bad argument #2 to 'post' (out of range)|bad argument #1 to 'new' (out of range)|2000000");
}

#[test]
fn a_datagram_is_received_up_to_a_size() {
    let got = on_a_worker(async {
        let peer = UdpSocket::bind("127.0.0.1:0").await.expect("bound");
        let port = peer.local_addr().expect("an address").port();
        tokio::task::spawn_local(async move {
            while let Ok((_, from)) = peer.recv_from(&mut [0; 8]).await {
                peer.send_to(&[b'x'; 9000], from).await.unwrap_or_default();
            }
        });
        let source = "
            local udp = ngx.socket.udp()
            assert(udp:setpeername('127.0.0.1', PORT))
            local out = {}
            for i, size in ipairs({ 8192, 8191, 100000 }) do udp:send('x') out[i] = #udp:receive(size) end
            udp:send('x') out[4] = #udp:receive()
            return table.concat(out, ' ')";
        run(&vm(), &unconnected(port, source)).await
    });
    assert_eq!(got, "8192 8191 8192 8192");
}
