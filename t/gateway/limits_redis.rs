//! Limits that gateways share through a Redis, a Redis Cluster, a Redis behind Sentinels.

use std::{
    sync::{Mutex, mpsc},
    thread,
    time::Instant,
};

use serde_json::{Value, json};

use crate::support::{
    Client, Gateway, Reply, Upstream, eventually,
    peers::{self, Peer, redis_cli},
    ports,
};

/// One object over another.
fn with(mut base: Value, more: Value) -> Value {
    if let (Some(base), Value::Object(more)) = (base.as_object_mut(), more) {
        base.extend(more);
    }
    base
}

fn at(redis: &Peer) -> Value {
    json!({"policy": "redis", "redis_host": "127.0.0.1", "redis_port": redis.port, "redis_timeout": 5000})
}

fn in_cluster(nodes: &[Peer]) -> Value {
    json!({"policy": "redis-cluster", "redis_cluster_name": "c", "redis_timeout": 5000,
        "redis_cluster_nodes": nodes.iter().map(Peer::address).collect::<Vec<_>>()})
}

fn count(limit: u32, of: Value) -> Value {
    json!({"limit-count": with(json!({"count": limit, "time_window": 60, "key_type": "var", "key": "http_x_who"}), of)})
}

/// Requests for `/l` of somebody.
fn ask(gw: &Gateway, who: &str) -> Reply {
    gw.send("GET", "/l", &[("X-Who", who)], b"")
}

fn statuses(gw: &Gateway, who: &str, n: usize) -> Vec<u16> {
    (0..n).map(|_| ask(gw, who).status).collect()
}

/// Two gateways with the same route `/l`.
fn two(up: &Upstream, plugins: &Value) -> [Gateway; 2] {
    let gateways = [Gateway::start(), Gateway::start()];
    for gw in &gateways {
        gw.route("1", "/l", up, plugins.clone());
    }
    gateways
}

fn keys(port: u16) -> Vec<String> {
    redis_cli(port, &["keys", "*"]).lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
}

/// Takes the time of every key away, as if it had passed.
fn expire_all(port: u16) {
    for key in keys(port) {
        redis_cli(port, &["pexpire", &key, "1"]);
    }
    eventually("the keys are gone", || keys(port).is_empty().then_some(()));
}

#[test]
fn two_gateways_share_a_count_and_the_next_window_counts_anew() {
    let (up, redis) = (Upstream::echo(), peers::redis());
    let [one, other] = two(&up, &count(3, at(&redis)));
    let first = ask(&one, "a");
    assert_eq!((first.status, first.header("x-ratelimit-remaining")), (200, Some("2")));
    let second = ask(&other, "a");
    assert_eq!((second.status, second.header("x-ratelimit-remaining")), (200, Some("1")));
    let reset: f64 = second.header("x-ratelimit-reset").and_then(|text| text.parse().ok()).expect("seconds");
    assert!(reset > 0.0 && reset <= 60.0, "the Redis' own time to live: {reset}");
    assert_eq!(ask(&one, "a").status, 200);
    let refused = ask(&other, "a");
    assert_eq!((refused.status, refused.header("x-ratelimit-remaining")), (503, Some("0")));
    assert_eq!(ask(&one, "b").status, 200, "another key has its own count");

    let counters = keys(redis.port);
    assert!(counters.len() == 2 && counters.iter().all(|key| key.starts_with("plugin-limit-count:")), "{counters:?}");
    for key in &counters {
        let left: i64 = redis_cli(redis.port, &["pttl", key]).parse().expect("a time to live");
        assert!((1..=60_000).contains(&left), "{key}: {left}");
    }
    expire_all(redis.port);
    assert_eq!([&one, &other, &one, &other].map(|gw| ask(gw, "a").status), [200, 200, 200, 503]);
}

#[test]
fn a_script_that_the_redis_forgot_is_sent_again() {
    let (up, redis) = (Upstream::echo(), peers::redis());
    let gw = Gateway::start();
    gw.route("1", "/l", &up, count(9, at(&redis)));
    assert_eq!(ask(&gw, "a").status, 200);
    let noted = || {
        gw.log()
            .matches("redis evalsha failed: NOSCRIPT No matching script. Please use EVAL.. Falling back to eval")
            .count()
    };
    eventually("it was sent once", || (noted() == 1).then_some(()));
    assert_eq!(statuses(&gw, "a", 2), [200, 200]);
    redis_cli(redis.port, &["script", "flush"]);
    let remaining = ask(&gw, "a");
    assert_eq!(remaining.header("x-ratelimit-remaining"), Some("5"));
    eventually("it was sent again", || (noted() == 2).then_some(()));
}

#[test]
fn without_its_redis_a_limit_fails_or_lets_pass_and_counts_again_when_it_is_back() {
    let (up, mut redis) = (Upstream::echo(), peers::redis());
    let gw = Gateway::start();
    gw.route("1", "/l", &up, count(2, at(&redis)));
    gw.route("2", "/pass", &up, count(2, with(at(&redis), json!({"allow_degradation": true}))));
    let req = with(json!({"rate": 100, "burst": 9, "key": "http_x_who"}), at(&redis));
    gw.route("3", "/req", &up, json!({"limit-req": req}));
    let conn = with(json!({"conn": 9, "burst": 1, "default_conn_delay": 0.1, "key": "http_x_who"}), at(&redis));
    gw.route("4", "/conn", &up, json!({"limit-conn": conn}));
    let status = |path: &str| gw.get(path).status;
    for path in ["/l", "/pass", "/req", "/conn"] {
        assert_eq!(status(path), 200, "{path}");
    }
    redis.kill();
    assert_eq!(ask(&gw, "a").json(), json!({"error_msg": "failed to limit count"}));
    assert_eq!([status("/l"), status("/req"), status("/conn")], [500, 500, 500]);
    assert_eq!((0..3).map(|_| status("/pass")).collect::<Vec<_>>(), [200; 3]);
    for plugin in ["count", "req", "conn"] {
        gw.expect_log(&format!("failed to limit {plugin}: connection refused"));
    }
    redis.restart_redis();
    assert_eq!(statuses(&gw, "a", 3), [200, 200, 503]);
    assert_eq!([status("/req"), status("/conn")], [200, 200]);
}

#[test]
fn users_and_databases_do_not_share_connections() {
    let up = Upstream::echo();
    let redis = peers::redis_with(|_| ["--user", "alice", "on", ">secret", "~*", "+@all"].map(String::from).to_vec());
    let gw = Gateway::with(json!({"nginx_config": {"envs": ["REDIS_PASSWORD=secret", "REDIS_HOST=127.0.0.1"]}}));
    let user = |password: &str| with(at(&redis), json!({"redis_username": "alice", "redis_password": password}));
    gw.route("1", "/right", &up, count(9, user("secret")));
    gw.route("2", "/wrong", &up, count(9, user("guessed")));
    gw.route(
        "3",
        "/req",
        &up,
        json!({"limit-req": with(json!({"rate": 9, "burst": 9, "key": "uri"}), user("guessed"))}),
    );
    let conn = json!({"conn": 9, "burst": 1, "default_conn_delay": 0.1, "key": "uri"});
    gw.route("4", "/conn", &up, json!({"limit-conn": with(conn, user("guessed"))}));
    gw.route(
        "5",
        "/env",
        &up,
        count(9, with(user("$env://REDIS_PASSWORD"), json!({"redis_host": "$ENV://REDIS_HOST"}))),
    );
    for database in [1, 2, 999] {
        let conf = count(9, with(at(&redis), json!({"redis_database": database})));
        gw.route(&format!("db{database}"), &format!("/db{database}"), &up, conf);
    }
    for _ in 0..2 {
        let status = |path: &str| gw.get(path).status;
        assert_eq!(["/right", "/wrong", "/req", "/conn", "/env"].map(status), [200, 500, 500, 500, 200]);
        assert_eq!(["/db1", "/db2", "/db999"].map(status), [200, 200, 500]);
    }
    for plugin in ["count", "req", "conn"] {
        gw.expect_log(&format!(
            "failed to limit {plugin}: WRONGPASS invalid username-password pair or user is disabled."
        ));
    }
    gw.expect_log("failed to limit count: failed to change redis db, err: ERR DB index is out of range");
    for database in ["1", "2"] {
        let kept = redis_cli(redis.port, &["-n", database, "keys", "plugin-limit-count:*"]);
        assert_eq!(redis_cli(redis.port, &["-n", database, "get", &kept]), "2", "{kept}");
    }
}

#[test]
fn a_redis_over_tls_counts_and_is_verified_when_asked_for() {
    let signed = rcgen::generate_simple_self_signed(["redis.test".to_owned()]).expect("a certificate");
    let tls = std::cell::Cell::new(0);
    let redis = peers::redis_with(|dir| {
        std::fs::write(dir.join("cert.pem"), signed.cert.pem()).expect("a written file");
        std::fs::write(dir.join("key.pem"), signed.signing_key.serialize_pem()).expect("a written file");
        let file = |name: &str| dir.join(name).to_string_lossy().into_owned();
        tls.set(ports::free_port());
        let args = ["--tls-port".into(), tls.get().to_string(), "--tls-cert-file".into(), file("cert.pem")];
        let more = ["--tls-key-file".into(), file("key.pem"), "--tls-auth-clients".into(), "no".into()];
        args.into_iter().chain(more).chain(["--tls-ca-cert-file".into(), file("cert.pem")]).collect()
    });
    let (up, gw) = (Upstream::echo(), Gateway::start());
    let over_tls = |verify: bool| {
        with(at(&redis), json!({"redis_port": tls.get(), "redis_ssl": true, "redis_ssl_verify": verify}))
    };
    gw.route("1", "/l", &up, count(2, over_tls(false)));
    gw.route("2", "/verified", &up, count(2, over_tls(true)));
    assert_eq!(statuses(&gw, "a", 3), [200, 200, 503]);
    assert_eq!(gw.get("/verified").status, 500, "a connection that nobody verified is none for it");
    gw.expect_log("failed to limit count: failed to do ssl handshake");
}

#[test]
fn a_sliding_window_carries_over_what_is_still_inside() {
    let (up, redis) = (Upstream::echo(), peers::redis());
    let sliding = with(at(&redis), json!({"window_type": "sliding", "time_window": 1_000_000}));
    let [one, other] = two(&up, &count(4, sliding));
    assert_eq!([&one, &other, &one, &other, &one].map(|gw| ask(gw, "a").status), [200, 200, 200, 200, 503]);
    let key = keys(redis.port).pop().expect("a counter");
    let field = |name: &str| redis_cli(redis.port, &["hget", &key, name]);
    assert_eq!((field("current"), field("previous")), ("4".into(), "0".into()), "what was refused is not counted");
    // The window before was full, and this one has not begun: as much is free as has gone of it.
    let window: i64 = field("window").parse().expect("a number");
    redis_cli(redis.port, &["hset", &key, "window", &(window - 1).to_string(), "current", "1000000"]);
    assert_eq!(ask(&one, "a").status, 503);
    // Two windows ago is outside.
    redis_cli(redis.port, &["hset", &key, "window", &(window - 2).to_string()]);
    let first = ask(&other, "a");
    assert_eq!((first.status, first.header("x-ratelimit-remaining")), (200, Some("3")));
    let left: i64 = redis_cli(redis.port, &["pttl", &key]).parse().expect("a time to live");
    assert!((1_000_000_000..=2_000_000_000).contains(&left), "this window and the next: {left}");
}

#[test]
fn with_a_sync_interval_a_gateway_counts_by_itself_and_tells_the_redis() {
    let (up, redis) = (Upstream::echo(), peers::redis());
    for window_type in ["fixed", "sliding"] {
        redis_cli(redis.port, &["flushall"]);
        let often = with(at(&redis), json!({"sync_interval": 0.1, "window_type": window_type, "time_window": 100_000}));
        let [one, other] = two(&up, &count(5, often));
        let left = |gw: &Gateway| ask(gw, "a").header("x-ratelimit-remaining").map(str::to_owned);
        assert_eq!([left(&one), left(&one), left(&one)].map(Option::unwrap_or_default), ["4", "3", "2"]);
        eventually("the Redis knows of three", || {
            let key = keys(redis.port).pop()?;
            let (of_fixed, of_sliding) = (["get", &key], ["hget", &key, "current"]);
            let known = redis_cli(redis.port, if window_type == "fixed" { &of_fixed[..] } else { &of_sliding });
            (known == "3").then_some(())
        });
        assert_eq!(left(&other).as_deref(), Some("1"), "{window_type}");
        eventually("the first hears of the fourth", || (statuses(&one, "a", 1) == [503]).then_some(()));
        assert_eq!(ask(&one, "b").status, 200);
    }
}

#[test]
fn a_sync_interval_has_bounds() {
    let (up, redis) = (Upstream::echo(), peers::redis());
    let gw = Gateway::start();
    let put = |interval: f64, window: Value| {
        let conf = json!({"sync_interval": interval, "time_window": window});
        let plugins = count(2, with(at(&redis), conf));
        gw.admin("PUT", "/routes/1", json!({"uri": "/l", "plugins": plugins, "upstream": {"nodes": {up.addr(): 1}}}))
    };
    for (interval, window, text) in [
        (0.05, json!(60), "sync_interval should be -1 or at least 0.1"),
        (-2.0, json!(60), "sync_interval should be -1 or at least 0.1"),
        (60.0, json!(60), "sync_interval should be smaller than time_window"),
    ] {
        let refused = put(interval, window);
        assert_eq!(refused.status, 400);
        assert!(refused.text().contains(text), "{}", refused.text());
    }
    for (interval, window) in [(-1.0, json!(60)), (0.1, json!(60)), (60.0, json!("$http_x_window"))] {
        let taken = put(interval, window);
        assert!(taken.status < 300, "{}", taken.text());
    }
}

#[test]
fn a_redis_that_is_away_is_told_later_what_was_let_through() {
    let (up, mut redis) = (Upstream::echo(), peers::redis());
    let gw = Gateway::start();
    let slowly = with(at(&redis), json!({"sync_interval": 1, "time_window": 1000}));
    gw.route("1", "/l", &up, count(9, slowly));
    assert_eq!(statuses(&gw, "a", 2), [200, 200]);
    redis.kill();
    gw.expect_log("it is tried again: connection refused");
    redis.restart_redis();
    eventually("the Redis hears of the second", || {
        let key = keys(redis.port).pop()?;
        (redis_cli(redis.port, &["get", &key]) == "1").then_some(())
    });
}

/// What a function of a plugin says, run in a request.
fn script(gw: &Gateway, up: &Upstream, lua: &str) -> Value {
    let source = format!("return function(conf, ctx) {lua} end");
    gw.route("script", "/script", up, json!({"serverless-pre-function": {"phase": "access", "functions": [source]}}));
    let reply = gw.get("/script");
    assert_eq!(reply.status, 200, "{}", reply.text());
    reply.json()
}

#[test]
fn the_queue_of_delayed_sync_is_bounded_and_requests_count_without_a_place_in_it() {
    let (up, gw) = (Upstream::echo(), Gateway::start());
    let told = script(
        &gw,
        &up,
        "local dict = ngx.shared['plugin-limit-count']
        local asked = 0
        local limiter = {}
        function limiter:incoming() asked = asked + 1 return 0, 8, 60 end
        function limiter:commit() return 0, 8, 60 end
        local syncer = require('apisix.plugins.limit-count.delayed-syncer')
            .new('plugin-limit-count', 9, 60, { sync_interval = 50 }, limiter)
        local queue = syncer:key_local_delta_keys('q')
        for i = 1, 9999 do dict:lpush(queue, 'key' .. i) end
        syncer:delayed_sync('a', 1, 'q') syncer:delayed_sync('b', 1, 'q')
        local out = { (syncer:delayed_sync('a', 1, 'q')), dict:llen(queue), (syncer:delayed_sync('b', 1, 'q')), dict:llen(queue) }
        out[5] = asked
        dict:delete(queue)
        syncer:delayed_sync('c', 0, 'q') syncer:delayed_sync('c', 0, 'q')
        out[6] = dict:llen(queue)
        return 200, out",
    );
    assert_eq!(told, json!([7, 10000, 7, 10000, 2, 0]), "a look at a key (cost 0) is nothing to tell");
    gw.expect_log("delayed-sync queue saturated, skipping enqueue of b");
    assert!(!gw.log().contains("skipping enqueue of a"));
}

#[test]
fn places_that_wait_to_be_given_back_are_bounded() {
    let (up, gw) = (Upstream::echo(), Gateway::start());
    let told = script(
        &gw,
        &up,
        "local conf = { policy = 'redis', redis_host = '127.0.0.1', redis_port = 1 }
        local limiter = require('apisix.plugins.limit-conn.limit-conn-redis').new(1, 0, 0.1)
        local ends = ngx.now() + 2
        for i = 1, 10001 do
            limiter:leaving('k', nil, { conf = conf, key = 'place' .. i, id = 'x', ends = ends })
        end
        return 200, {}",
    );
    assert_eq!(told, json!({}));
    gw.expect_log("too many places of limit-conn wait to be given back, one is left to expire: place10001");
    gw.expect_log("failed to record the connection leaving request: connection refused");
    assert!(!gw.log().contains("left to expire: place10000"));
}

#[test]
fn plugins_of_ones_own_count_by_the_same_modules() {
    let (up, redis, gw) = (Upstream::echo(), peers::redis(), Gateway::start());
    let nodes = peers::redis_cluster();
    let told = script(
        &gw,
        &up,
        &format!(
            "local single = require('apisix.plugins.limit-count.limit-count-redis')
            local lim = single.new('plugin-own', 3, 60, {{ redis_host = '127.0.0.1', redis_port = {} }})
            local out = {{}}
            for i = 1, 2 do
                local delay, remaining, reset = lim:incoming('k', 2)
                out[i] = {{ tostring(delay), remaining, reset > 0 and reset <= 60 }}
            end
            local cluster = require('apisix.plugins.limit-count.limit-count-redis-cluster')
            lim = cluster.new('plugin-own', 3, 60, {{ redis_cluster_name = 'own', redis_cluster_nodes = {{ '{}' }},
                redis_keepalive_timeout = 10000, redis_keepalive_pool = 7 }})
            local _, remaining = lim:incoming('k', 2)
            out[3] = {{ remaining, lim.red_cli.config.keepalive_timeout, lim.red_cli.config.keepalive_cons }}
            return 200, out",
            redis.port,
            nodes[0].address()
        ),
    );
    assert_eq!(told, json!([["0", 1, true], ["nil", "rejected", true], [1, 10000, 7]]));
}

#[test]
fn a_cluster_shares_the_counts_of_all_three_plugins() {
    let (up, nodes) = (Upstream::echo(), peers::redis_cluster());
    let [one, other] = two(&up, &count(2, in_cluster(&nodes)));
    // Keys of several nodes.
    for who in ["a", "b", "c", "d", "e"] {
        assert_eq!([&one, &other, &one].map(|gw| ask(gw, who).status), [200, 200, 503], "{who}");
    }
    let req = with(json!({"rate": 0.001, "burst": 0, "key": "http_x_who"}), in_cluster(&nodes));
    let conn = with(json!({"conn": 1, "burst": 0, "default_conn_delay": 0.1, "key": "http_x_who"}), in_cluster(&nodes));
    for gw in [&one, &other] {
        gw.route("1", "/l", &up, json!({"limit-req": req, "limit-conn": conn}));
    }
    assert_eq!([&one, &other].map(|gw| ask(gw, "a").status), [200, 503]);
    let used = nodes.iter().filter(|node| !keys(node.port).is_empty()).count();
    assert!(used > 1, "keys lie on the nodes that they belong to");
    eventually("the place is free again", || {
        nodes.iter().all(|node| keys(node.port).iter().all(|key| !key.starts_with("limit_conn:"))).then_some(())
    });

    let gw = Gateway::start();
    let dead = json!({"policy": "redis-cluster", "redis_cluster_name": "d", "redis_cluster_nodes": [Upstream::dead()]});
    gw.route("1", "/l", &up, count(2, dead.clone()));
    gw.route("2", "/pass", &up, count(2, with(dead, json!({"allow_degradation": true}))));
    assert_eq!((ask(&gw, "a").status, gw.get("/pass").status), (500, 200));
    gw.expect_log("failed to limit count: failed to fetch slots: connection refused");
}

#[test]
fn connections_of_a_cluster_are_only_for_those_with_the_same_password() {
    let up = Upstream::echo();
    let node = peers::redis_cluster_node(&["--requirepass", "secret"]);
    let cli = |args: &[&str]| redis_cli(node.port, &[&["-a", "secret", "--no-auth-warning"], args].concat());
    eventually("the node takes the slots", || {
        cli(&["cluster", "addslotsrange", "0", "16383"]);
        (cli(&["set", "x", "1"]) == "OK").then_some(())
    });
    let gw = Gateway::start();
    let of = |password: &str| with(in_cluster(std::slice::from_ref(&node)), json!({"redis_password": password}));
    gw.route("1", "/l", &up, count(9, of("secret")));
    gw.route("2", "/wrong", &up, count(9, of("guessed")));
    for _ in 0..4 {
        assert_eq!((ask(&gw, "a").status, gw.get("/wrong").status), (200, 500));
    }
    gw.expect_log("failed to limit count: failed to fetch slots: WRONGPASS");
}

fn behind(sentinel: &Peer, more: Value) -> Value {
    let base = json!({"policy": "redis-sentinel", "redis_master_name": "mymaster",
        "redis_sentinels": [{"host": "127.0.0.1", "port": sentinel.port}]});
    with(base, more)
}

#[test]
fn sentinels_tell_where_the_master_is_also_after_a_failover() {
    let (up, mut master) = (Upstream::echo(), peers::redis());
    let main_port = master.port;
    let replica = peers::redis_with(|_| {
        ["--replicaof", &format!("127.0.0.1 {main_port}"), "--repl-diskless-sync-delay", "0"].map(String::from).to_vec()
    });
    let sentinel = peers::sentinel(&[("mymaster", master.port)], "");
    eventually("the sentinel knows of the replica", || {
        let known = redis_cli(sentinel.port, &["sentinel", "replicas", "mymaster"]);
        (known.contains(&replica.port.to_string()) && known.contains("master-link-status\nok")).then_some(())
    });
    let [one, other] = two(&up, &count(2, behind(&sentinel, json!({"redis_database": 1}))));
    assert_eq!([&one, &other, &one].map(|gw| ask(gw, "a").status), [200, 200, 503]);
    assert_eq!(redis_cli(master.port, &["-n", "1", "dbsize"]), "1");
    master.kill();
    eventually("the replica is the master, for the gateways, too", || (ask(&one, "b").status == 200).then_some(()));
    assert!(redis_cli(replica.port, &["role"]).starts_with("master"));
    assert_eq!([&other, &one].map(|gw| ask(gw, "b").status), [200, 503]);
}

#[test]
fn what_sentinels_refuse_is_told() {
    let (up, redis, gw) = (Upstream::echo(), peers::redis(), Gateway::start());
    let sentinel = peers::sentinel(&[("mymaster", redis.port)], "requirepass secret");
    let dead = {
        let addr = Upstream::dead();
        addr.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok()).expect("a port")
    };
    let nowhere =
        json!({"redis_sentinels": [{"host": "127.0.0.1", "port": dead}, {"host": "127.0.0.1", "port": dead}]});
    let password = json!({"sentinel_password": "secret"});
    for (more, status, text) in [
        (nowhere, 500, "no hosts available, previous_errors: connection refused, connection refused"),
        (json!({}), 500, "NOAUTH Authentication required"),
        (password.clone(), 200, ""),
        (with(password.clone(), json!({"redis_master_name": "other"})), 500, "no master is known as other"),
        (with(password.clone(), json!({"redis_username": "no", "redis_password": "no"})), 500, "WRONGPASS"),
        (with(password, json!({"redis_role": "slave"})), 500, "no replica of mymaster is up"),
    ] {
        gw.route("1", "/l", &up, count(9, behind(&sentinel, more)));
        assert_eq!(ask(&gw, "a").status, status, "{text}");
        if status == 500 {
            gw.expect_log(&format!("failed to limit count: redis connection failed, err: {text}"));
        }
    }
}

#[test]
fn a_bucket_in_a_redis_delays_and_refuses_for_all_gateways() {
    let (up, redis) = (Upstream::echo(), peers::redis());
    let conf = with(json!({"rate": 2, "burst": 1, "key": "http_x_who"}), at(&redis));
    let [one, other] = two(&up, &json!({"limit-req": conf}));
    let started = Instant::now();
    assert_eq!(ask(&one, "a").status, 200);
    assert_eq!(ask(&other, "a").status, 200);
    assert!(started.elapsed().as_millis() >= 400, "the second waits for its turn: {:?}", started.elapsed());
    let key = keys(redis.port).pop().expect("a bucket");
    assert!(key.starts_with("limit_req:a:"), "{key}");
    let left: i64 = redis_cli(redis.port, &["pttl", &key]).parse().expect("a time to live");
    assert!((0..=1_001).contains(&left), "until it would be empty: {left}");

    let strict = with(
        json!({"rate": 0.001, "burst": 1, "nodelay": true, "key": "http_x_who", "rejected_code": 429}),
        at(&redis),
    );
    for gw in [&one, &other] {
        gw.route("1", "/l", &up, json!({"limit-req": strict}));
    }
    assert_eq!([&one, &other, &one, &other].map(|gw| ask(gw, "b").status), [200, 200, 429, 429]);
    // However many come at once, a bucket of one takes one.
    let single = with(strict, json!({"burst": 0}));
    one.route("1", "/l", &up, json!({"limit-req": single}));
    let served = thread::scope(|scope| {
        let asked: Vec<_> = (0..8).map(|_| scope.spawn(|| ask(&one, "c").status)).collect();
        asked.into_iter().filter_map(|status| status.join().ok()).filter(|status| *status == 200).count()
    });
    assert_eq!(served, 1);
    expire_all(redis.port);
    assert_eq!(ask(&one, "b").status, 200, "an empty bucket");
}

/// An upstream that answers when it is told to.
fn held() -> (mpsc::Sender<()>, Upstream) {
    let (release, hold) = mpsc::channel::<()>();
    let hold = Mutex::new(hold);
    let up = Upstream::answering(move |_| {
        let _ = hold.lock().expect("one at a time").recv();
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    });
    (release, up)
}

#[test]
fn places_in_a_redis_are_shared_and_given_back_also_by_gateways_that_die() {
    let redis = peers::redis();
    let (release, up) = held();
    let conf = json!({"conn": 1, "burst": 0, "default_conn_delay": 0.1, "key": "http_x_who", "key_ttl": 100});
    let [one, mut other] = two(&up, &json!({"limit-conn": with(conf, at(&redis))}));
    for round in 1..=2 {
        let mut first = Client::connect(&other.proxy());
        first.send("GET", "/l", &[("X-Who", "a")], b"");
        eventually("it is under way", || (up.seen().len() == round).then_some(()));
        assert_eq!(ask(&one, "a").status, 503);
        release.send(()).expect("the upstream waits");
        assert_eq!(first.reply("GET").status, 200);
        eventually("the place is given back", || keys(redis.port).is_empty().then_some(()));
    }

    // A Redis that is away when a request ends is told when it is back.
    let mut first = Client::connect(&other.proxy());
    first.send("GET", "/l", &[("X-Who", "a")], b"");
    eventually("it is under way", || (up.seen().len() == 3).then_some(()));
    redis.signal(libc::SIGSTOP);
    release.send(()).expect("the upstream waits");
    assert_eq!(first.reply("GET").status, 200);
    redis.signal(libc::SIGCONT);
    eventually("the place is given back", || keys(redis.port).is_empty().then_some(()));

    // The place of a gateway that dies expires.
    let mut first = Client::connect(&other.proxy());
    first.send("GET", "/l", &[("X-Who", "a")], b"");
    eventually("it is under way", || (up.seen().len() == 4).then_some(()));
    other.kill();
    assert_eq!(ask(&one, "a").status, 503);
    let key = keys(redis.port).pop().expect("a key");
    assert!(key.starts_with("limit_conn:"), "{key}");
    let left: i64 = redis_cli(redis.port, &["pttl", &key]).parse().expect("a time to live");
    assert!((1..=100_000).contains(&left), "{left}");
    // As if key_ttl had passed for it.
    let id = redis_cli(redis.port, &["zrange", &key, "0", "-1"]);
    redis_cli(redis.port, &["zadd", &key, "1", &id]);
    release.send(()).expect("the upstream still waits for the dead");
    release.send(()).expect("the upstream waits");
    assert_eq!(ask(&one, "a").status, 200);
}
