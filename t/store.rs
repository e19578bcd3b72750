//! The stores against the real thing: an etcd that is killed, stopped, compacted and replaced; a process that is killed
//! while it writes.

mod support;

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, SystemTime},
};

use moongate::{
    model::Keyring,
    router::RouterKind,
    store::{
        Change, Condition, Setup, Snapshot, Started, Store,
        embedded::Embedded,
        etcd::{Etcd, EtcdConfig},
        file::{File, Format},
        parser, start,
    },
};
use serde_json::json;
use support::{
    etcd::{DEADLINE, EtcdServer, store_at, until},
    ports::{dead_port, free_port},
};
use tokio::{
    io::copy_bidirectional,
    net::TcpStream,
    sync::{mpsc, watch},
    task::LocalSet,
    time::timeout,
};

async fn served(started: &Started, fact: &str, is_so: impl Fn(&Snapshot) -> bool) {
    let mut published = started.published.subscribe();
    let waited = timeout(DEADLINE, async {
        while !is_so(&started.published.load()) {
            let _ = timeout(Duration::from_millis(50), published.changed()).await;
        }
    });
    waited.await.unwrap_or_else(|_| panic!("never served: {fact}"));
}

async fn gateway(store: Arc<dyn Store>, dir: &Path) -> Started {
    let setup = Setup {
        parser: parser(Arc::new(Keyring::default()), None),
        checker: None,
        router: RouterKind::default(),
        shown_prefix: "/apisix".to_owned(),
        follows_plugin_list: true,
        last_good: Some(dir.join("last_good.redb")),
    };
    timeout(DEADLINE, start(store, setup)).await.expect("starts").unwrap()
}

fn route(uri: &str) -> String {
    json!({"uri": uri, "upstream": {"type": "roundrobin", "nodes": {"127.0.0.1:80": 1}}}).to_string()
}

async fn put(store: &dyn Store, key: &str, value: String) -> i64 {
    store.put(key, value, Condition::Always, None).await.unwrap().revision
}

#[tokio::test]
async fn reads_what_apisix_wrote_and_follows_the_changes_of_other_nodes() {
    let dir = tempfile::tempdir().unwrap();
    let etcd = EtcdServer::start(&dir.path().join("etcd"));
    let other = etcd.store().await;
    let mut raw = etcd.client().await;
    for directory in ["/apisix/routes/", "/apisix/routes", "/apisix/upstreams/"] {
        raw.put(directory, "init_dir", None).await.unwrap();
    }
    raw.put("/apisix/routes/1", route("/a"), None).await.unwrap();
    raw.put("/apisix/routes/bytes", vec![0xff, 0xfe], None).await.unwrap();
    raw.put("/elsewhere/routes/2", route("/b"), None).await.unwrap();
    LocalSet::new()
        .run_until(async {
            let node = gateway(etcd.store().await, dir.path()).await;
            let s = node.published.load();
            assert_eq!(s.routes.keys().map(|k| &**k).collect::<Vec<_>>(), ["1"]);
            assert_eq!(s.errors["/routes/bytes"].message, "the value is not UTF-8 text");
            assert!(node.source.load().connected);

            let revision = put(&*other, "/routes/2", route("/b")).await;
            timeout(DEADLINE, node.published.reached(revision)).await.expect("the write is served");
            let two = node.published.load().routes["2"].clone();
            assert_eq!((two.create_revision, two.mod_revision), (revision, revision));

            let again = other.put("/routes/2", route("/c"), Condition::Unmodified(revision), None).await.unwrap();
            assert_eq!(again.entry.create_revision, revision);
            assert_eq!(again.previous.unwrap().mod_revision, revision);
            let late = other.put("/routes/2", route("/d"), Condition::Unmodified(revision), None).await.unwrap_err();
            assert_eq!(late.kind(), moongate::error::Kind::Conflict);
            let late = other.delete("/routes/2", Condition::Unmodified(revision)).await.unwrap_err();
            assert_eq!(late.kind(), moongate::error::Kind::Conflict);

            let (gone, revision) = other.delete("/routes/2", Condition::Always).await.unwrap().unwrap();
            assert_eq!(gone.mod_revision, again.revision);
            timeout(DEADLINE, node.published.reached(revision)).await.expect("the delete is served");
            assert!(!node.published.load().routes.contains_key("2"));
            assert!(other.delete("/routes/2", Condition::Always).await.unwrap().is_none());

            other.put("/routes/short", route("/s"), Condition::Always, Some(1)).await.unwrap();
            served(&node, "the route with a ttl", |s| s.routes.contains_key("short")).await;
            served(&node, "that it expired", |s| !s.routes.contains_key("short")).await;
        })
        .await;
}

#[tokio::test]
async fn lists_more_than_a_page() {
    let dir = tempfile::tempdir().unwrap();
    let etcd = EtcdServer::start(&dir.path().join("etcd"));
    let store = etcd.store().await;
    let mut raw = etcd.client().await;
    for chunk in 0..50 {
        let puts: Vec<_> = (0..100)
            .map(|i| etcd_client::TxnOp::put(format!("/apisix/routes/{:05}", chunk * 100 + i), route("/a"), None))
            .collect();
        raw.txn(etcd_client::Txn::new().and_then(puts)).await.unwrap();
    }
    let (entries, revision) = store.list("/routes/").await.unwrap();
    assert_eq!((entries.len(), revision), (5000, 51));
    assert!(entries.windows(2).all(|w| w[0].key < w[1].key));
}

/// More bytes than one message from etcd may have.
#[tokio::test]
async fn lists_and_follows_more_than_one_message_holds() {
    const OBJECTS: usize = 80;
    let dir = tempfile::tempdir().unwrap();
    let etcd = EtcdServer::start(&dir.path().join("etcd"));
    let direct = etcd.store().await;
    put(&*direct, "/routes/1", route("/a")).await;
    let (port, open) = gate(etcd.port()).await;
    LocalSet::new()
        .run_until(async {
            let node = gateway(store_at(port), dir.path()).await;
            open.send(false).unwrap();
            until("the loss is noticed", async || !node.source.load().connected).await;
            let mut revision = 0;
            for i in 0..OBJECTS {
                let function = json!({"source": format!("-- {}", "x".repeat(900_000))});
                revision = put(&*direct, &format!("/functions/f{i}"), function.to_string()).await;
            }
            let (all, at) = direct.list("/functions/").await.unwrap();
            let bytes: usize = all.iter().map(|entry| entry.value.len()).sum();
            assert_eq!((all.len(), at), (OBJECTS, revision));
            assert!(bytes > 64 << 20, "{bytes}");
            open.send(true).unwrap();
            timeout(DEADLINE, node.published.reached(revision)).await.expect("caught up");
            assert_eq!(node.published.load().functions.len(), OBJECTS);
            let next = put(&*direct, "/routes/2", route("/b")).await;
            timeout(DEADLINE, node.published.reached(next)).await.expect("goes on");
        })
        .await;
}

/// A cluster whose requests may take a minute: what ends these waits is their own bound.
fn patient_store_at(port: u16) -> Arc<Etcd> {
    let config = json!({"deployment": {"etcd": {"host": [format!("http://127.0.0.1:{port}")], "timeout": 60}}});
    Etcd::new(EtcdConfig::from_json(&config, Path::new("/")).unwrap())
}

#[tokio::test]
async fn a_start_does_not_wait_for_an_etcd_that_hangs() {
    let dir = tempfile::tempdir().unwrap();
    let etcd = EtcdServer::start(&dir.path().join("etcd"));
    let revision = put(&*etcd.store().await, "/routes/1", route("/a")).await;
    LocalSet::new()
        .run_until(async {
            let node = gateway(patient_store_at(etcd.port()), dir.path()).await;
            timeout(DEADLINE, node.published.reached(revision)).await.expect("served");
        })
        .await;
    etcd.signal(libc::SIGSTOP);
    LocalSet::new()
        .run_until(async {
            let node = gateway(patient_store_at(etcd.port()), dir.path()).await;
            assert_eq!(node.published.load().routes.len(), 1);
            assert!(!node.source.load().connected);
            etcd.signal(libc::SIGCONT);
            until("etcd is found", async || node.source.load().connected).await;
        })
        .await;
}

#[tokio::test]
async fn a_reload_of_plugins_does_not_wait_for_an_etcd_that_hangs() {
    let dir = tempfile::tempdir().unwrap();
    let etcd = EtcdServer::start(&dir.path().join("etcd"));
    put(&*etcd.store().await, "/routes/1", route("/a")).await;
    LocalSet::new()
        .run_until(async {
            let node = gateway(patient_store_at(etcd.port()), dir.path()).await;
            etcd.signal(libc::SIGSTOP);
            let reload = timeout(DEADLINE, node.handle.reload_plugins()).await.expect("within its bound");
            assert_eq!(reload.unwrap(), 2, "this node alone");
            etcd.signal(libc::SIGCONT);
        })
        .await;
}

#[tokio::test]
async fn goes_on_while_etcd_is_dead_and_catches_up() {
    let dir = tempfile::tempdir().unwrap();
    let etcd = EtcdServer::start(&dir.path().join("etcd"));
    put(&*etcd.store().await, "/routes/1", route("/a")).await;
    LocalSet::new()
        .run_until(async {
            let node = gateway(store_at(etcd.port()), dir.path()).await;
            let uid = node.published.load().routes["1"].uid;
            let (data, ports) = etcd.kill();
            until("the loss is noticed", async || !node.source.load().connected).await;
            assert_eq!(node.published.load().routes["1"].uid, uid);
            let status = node.source.load();
            assert!(status.stale_since.is_some() && status.last_error.is_some());
            let refused = store_at(ports[0]).put("/routes/9", route("/"), Condition::Always, None).await.unwrap_err();
            assert_eq!(refused.kind(), moongate::error::Kind::Unavailable);

            let etcd = EtcdServer::start_on(&data, ports);
            let revision = put(&*etcd.store().await, "/routes/2", route("/b")).await;
            timeout(DEADLINE, node.published.reached(revision)).await.expect("caught up");
            let s = node.published.load();
            assert_eq!((s.routes.len(), s.routes["1"].uid), (2, uid));
            until("it is known to be back", async || node.source.load().stale_since.is_none()).await;
        })
        .await;
}

#[tokio::test]
async fn starts_from_the_last_good_state_while_etcd_is_dead() {
    let dir = tempfile::tempdir().unwrap();
    let etcd = EtcdServer::start(&dir.path().join("etcd"));
    let store = etcd.store().await;
    put(&*store, "/routes/1", route("/a")).await;
    put(&*store, "/routes/2", route("/b")).await;
    LocalSet::new()
        .run_until(async {
            let node = gateway(store_at(etcd.port()), dir.path()).await;
            // The valid version is what is kept.
            let revision = put(&*store, "/routes/2", "{}".to_owned()).await;
            timeout(DEADLINE, node.published.reached(revision)).await.unwrap();
            assert!(node.published.load().routes.contains_key("2"));
        })
        .await;
    // The set is gone, and with it the node.
    let (data, ports) = etcd.kill();
    LocalSet::new()
        .run_until(async {
            let node = gateway(store_at(ports[0]), dir.path()).await;
            assert_eq!(node.published.load().routes.len(), 2);
            let status = node.source.load();
            assert!(!status.connected);
            assert!(status.stale_since.unwrap() <= SystemTime::now());

            let etcd = EtcdServer::start_on(&data, ports);
            let revision = put(&*etcd.store().await, "/routes/3", route("/c")).await;
            timeout(DEADLINE, node.published.reached(revision)).await.expect("caught up");
            let s = node.published.load();
            assert_eq!((s.routes.len(), s.errors.len()), (3, 1), "the refused version does not replace the good one");
        })
        .await;
}

#[tokio::test]
async fn starts_empty_when_there_is_no_last_good_state_either() {
    let dir = tempfile::tempdir().unwrap();
    LocalSet::new()
        .run_until(async {
            let node = gateway(store_at(dead_port()), dir.path()).await;
            assert!(node.published.load().routes.is_empty());
            assert!(!node.source.load().connected);
        })
        .await;
}

/// Forwards to a port, until it is told not to.
async fn gate(to: u16) -> (u16, watch::Sender<bool>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (open, is_open) = watch::channel(true);
    tokio::spawn(async move {
        loop {
            let Ok((mut from, _)) = listener.accept().await else { return };
            let mut is_open = is_open.clone();
            tokio::spawn(async move {
                if !*is_open.borrow() {
                    return;
                }
                let Ok(mut to) = TcpStream::connect(("127.0.0.1", to)).await else { return };
                tokio::select! {
                    _ = copy_bidirectional(&mut from, &mut to) => {}
                    _ = is_open.wait_for(|open| !open) => {}
                }
            });
        }
    });
    (port, open)
}

#[tokio::test]
async fn reads_everything_again_when_what_it_missed_is_compacted() {
    let dir = tempfile::tempdir().unwrap();
    let etcd = EtcdServer::start(&dir.path().join("etcd"));
    let direct = etcd.store().await;
    put(&*direct, "/routes/1", route("/a")).await;
    put(&*direct, "/routes/2", route("/b")).await;
    let (port, open) = gate(etcd.port()).await;
    LocalSet::new()
        .run_until(async {
            let node = gateway(store_at(port), dir.path()).await;
            let uid = node.published.load().routes["1"].uid;
            open.send(false).unwrap();
            until("the loss is noticed", async || !node.source.load().connected).await;
            direct.delete("/routes/2", Condition::Always).await.unwrap();
            put(&*direct, "/routes/3", route("/c")).await;
            let revision = put(&*direct, "/routes/4", route("/d")).await;
            etcd.client().await.compact(revision, None).await.unwrap();
            open.send(true).unwrap();
            timeout(DEADLINE, node.published.reached(revision)).await.expect("caught up");
            let s = node.published.load();
            let mut ids: Vec<_> = s.routes.keys().map(|k| &**k).collect();
            ids.sort_unstable();
            assert_eq!(ids, ["1", "3", "4"]);
            assert_eq!(s.routes["1"].uid, uid, "what did not change is not built anew");
        })
        .await;
}

#[tokio::test]
async fn notices_a_cluster_that_was_set_back() {
    let dir = tempfile::tempdir().unwrap();
    let etcd = EtcdServer::start(&dir.path().join("etcd"));
    let store = etcd.store().await;
    for i in 0..10 {
        put(&*store, "/routes/old", route(&format!("/{i}"))).await;
    }
    LocalSet::new()
        .run_until(async {
            let node = gateway(store_at(etcd.port()), dir.path()).await;
            let (_, ports) = etcd.kill();
            let etcd = EtcdServer::start_on(&dir.path().join("another"), ports);
            put(&*etcd.store().await, "/routes/new", route("/n")).await;
            served(&node, "the new cluster's routes", |s| s.routes.contains_key("new")).await;
            assert_eq!(node.published.load().routes.len(), 1);
        })
        .await;
}

#[tokio::test]
async fn notices_an_etcd_that_hangs_without_closing_its_connections() {
    let dir = tempfile::tempdir().unwrap();
    let etcd = EtcdServer::start(&dir.path().join("etcd"));
    put(&*etcd.store().await, "/routes/1", route("/a")).await;
    LocalSet::new()
        .run_until(async {
            let node = gateway(store_at(etcd.port()), dir.path()).await;
            etcd.signal(libc::SIGSTOP);
            until("the hang is noticed", async || !node.source.load().connected).await;
            assert_eq!(node.published.load().routes.len(), 1);
            etcd.signal(libc::SIGCONT);
            let revision = put(&*etcd.store().await, "/routes/2", route("/b")).await;
            timeout(DEADLINE, node.published.reached(revision)).await.expect("caught up");
        })
        .await;
}

#[tokio::test]
async fn a_watch_ends_when_nobody_listens() {
    let (tx, rx) = mpsc::channel::<Change>(1);
    drop(rx);
    timeout(DEADLINE, store_at(dead_port()).watch(tx)).await.expect("ends");
}

#[tokio::test]
async fn speaks_tls_and_authenticates() {
    let dir = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let [cert, key] = ["cert.pem", "key.pem"].map(|name| dir.path().join(name).display().to_string());
    std::fs::write(&cert, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let ports = [free_port(), free_port()];
    let tls = ["--cert-file", &cert, "--key-file", &key, "--trusted-ca-file", &cert, "--client-cert-auth"];
    let _etcd = EtcdServer::start_with(&dir.path().join("etcd"), ports, "https", &tls);
    let store = |tls: serde_json::Value, roots: &str, password: &str| {
        let host = format!("https://127.0.0.1:{}", ports[0]);
        let etcd = json!({"host": host, "tls": tls, "user": "root", "password": password, "timeout": 5});
        let config = json!({
            "deployment": {"etcd": etcd},
            "apisix": {"ssl": {"ssl_trusted_certificate": roots}},
        });
        Etcd::new(EtcdConfig::from_json(&config, dir.path()).unwrap())
    };
    let open = || store(json!({"cert": "cert.pem", "key": "key.pem", "verify": false}), "system", "");
    until("etcd answers", async || {
        let answer = open().list("/").await;
        // There are no users yet.
        answer.is_ok() || answer.is_err_and(|e| e.to_string().contains("authentication is not enabled"))
    })
    .await;
    let ca = etcd_client::Certificate::from_pem(made.cert.pem());
    let identity = etcd_client::Identity::from_pem(made.cert.pem(), made.signing_key.serialize_pem());
    let options = etcd_client::ConnectOptions::new()
        .with_tls(etcd_client::TlsOptions::new().ca_certificate(ca).identity(identity));
    let mut raw =
        etcd_client::Client::connect([format!("https://127.0.0.1:{}", ports[0])], Some(options)).await.unwrap();
    raw.role_add("root").await.unwrap();
    raw.user_add("root", "secret", None).await.unwrap();
    raw.user_grant_role("root", "root").await.unwrap();
    raw.auth_enable().await.unwrap();

    let pair = json!({"cert": "cert.pem", "key": "key.pem"});
    let good = store(pair.clone(), "cert.pem", "secret");
    assert_eq!(put(&*good, "/routes/1", route("/a")).await, 2);
    assert_eq!(good.list("/").await.unwrap().0.len(), 1);
    let (tx, mut rx) = mpsc::channel(4);
    tokio::spawn(good.watch(tx));
    assert!(matches!(timeout(DEADLINE, rx.recv()).await, Ok(Some(Change::All { .. }))));

    let wrong = store(pair.clone(), "cert.pem", "wrong").list("/").await.unwrap_err().to_string();
    assert!(wrong.contains("authentication failed"), "{wrong}");
    let unknown = store(pair, "system", "secret").list("/").await.unwrap_err().to_string();
    assert!(unknown.to_lowercase().contains("certificate"), "{unknown}");
    assert!(store(json!({}), "cert.pem", "secret").list("/").await.is_err(), "etcd wants a client certificate");
}

#[tokio::test]
async fn plugins_reload_is_a_new_generation_that_is_served() {
    let dir = tempfile::tempdir().unwrap();
    LocalSet::new()
        .run_until(async {
            let store = Embedded::open(&dir.path().join("moongate.redb")).unwrap();
            let node = gateway(store.clone(), dir.path()).await;
            assert_eq!(node.published.load().plugins_generation, 1);
            assert_eq!(node.handle.reload_plugins().await.unwrap(), 2);
            assert_eq!(node.published.load().plugins_generation, 2);
            let revision = put(&*store, "/plugin_sources/mine", json!({"source": "return {}"}).to_string()).await;
            timeout(DEADLINE, node.published.reached(revision)).await.unwrap();
            assert_eq!(node.published.load().plugins_generation, 3);
        })
        .await;
}

#[tokio::test]
async fn reloads_that_come_together_wait_for_their_turn() {
    const RELOADS: u64 = 200;
    let dir = tempfile::tempdir().unwrap();
    LocalSet::new()
        .run_until(async {
            let store = Embedded::open(&dir.path().join("moongate.redb")).unwrap();
            let node = gateway(store, dir.path()).await;
            let reloads = (0..RELOADS).map(|_| node.handle.reload_plugins());
            let all = timeout(DEADLINE, futures_util::future::join_all(reloads)).await.expect("all have their turn");
            let mut generations: Vec<u64> = all.into_iter().map(Result::unwrap).collect();
            generations.sort_unstable();
            assert_eq!(generations, (2..2 + RELOADS).collect::<Vec<_>>());
        })
        .await;
}

#[tokio::test]
async fn starts_from_the_last_good_state_while_the_file_is_broken() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("conf/apisix.yaml");
    std::fs::create_dir(dir.path().join("conf")).unwrap();
    let upstream = "upstream: {type: roundrobin, nodes: {\"127.0.0.1:80\": 1}}";
    std::fs::write(&path, format!("routes:\n  - {{id: 1, uri: /a, {upstream}}}\n#END\n")).unwrap();
    let start_here = || gateway(File::new(dir.path(), Format::Yaml), dir.path());
    let uri_of = |node: &Started| node.published.load().routes.get("1").map(|r| r.value.uris[0].to_string());
    LocalSet::new()
        .run_until(async {
            let node = start_here().await;
            assert_eq!(uri_of(&node).as_deref(), Some("/a"));
            std::fs::write(&path, format!("routes:\n  - {{id: 1, uri: /b, {upstream}}}\n#END\n")).unwrap();
            served(&node, "the edit", |s| s.routes["1"].value.uris[0] == "/b".into()).await;
            std::fs::write(&path, "routes: [\n#END\n").unwrap();
            served(&node, "the error", |s| s.errors.contains_key("conf/apisix.yaml")).await;
            assert_eq!(uri_of(&node).as_deref(), Some("/b"));
        })
        .await;
    LocalSet::new()
        .run_until(async {
            let node = start_here().await;
            assert_eq!(uri_of(&node).as_deref(), Some("/b"));
            assert!(node.published.load().errors.contains_key("conf/apisix.yaml"));
            std::fs::write(&path, format!("routes:\n  - {{id: 1, uri: /c, {upstream}}}\n#END\n")).unwrap();
            served(&node, "the repair", |s| s.routes["1"].value.uris[0] == "/c".into()).await;
            assert!(node.published.load().errors.is_empty());
            assert!(node.source.load().connected);
        })
        .await;
}

#[tokio::test]
async fn plugins_reload_reaches_every_node_of_a_cluster() {
    let dir = tempfile::tempdir().unwrap();
    let etcd = EtcdServer::start(&dir.path().join("etcd"));
    etcd.store().await;
    LocalSet::new()
        .run_until(async {
            let one = gateway(store_at(etcd.port()), &dir.path().join("one")).await;
            let two = gateway(store_at(etcd.port()), &dir.path().join("two")).await;
            assert_eq!(one.handle.reload_plugins().await.unwrap(), 2);
            served(&two, "the reload", |s| s.plugins_generation == 2).await;
            let three = gateway(store_at(etcd.port()), &dir.path().join("three")).await;
            assert_eq!(three.published.load().plugins_generation, 1, "an old reload is none");
            etcd.kill();
            assert_eq!(one.handle.reload_plugins().await.unwrap(), 3);
        })
        .await;
}

/// Not a test: runs out of disk, as far as it can tell, and then has space again.
#[tokio::test]
#[ignore = "started by another test"]
async fn full_disk_process() {
    let Ok(file) = std::env::var(WRITER_FILE) else { return };
    let limit = |bytes| {
        let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
        // SAFETY: plain system calls of this process, which is the test's own.
        unsafe {
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &limit), 0);
        }
    };
    let store = Embedded::open(Path::new(&file)).unwrap();
    put(&*store, "/routes/1", "x".repeat(100_000)).await;
    limit(300_000);
    let mut refused = 0;
    for i in 0..10 {
        let written = store.put(&format!("/routes/a{i}"), "x".repeat(100_000), Condition::Always, None).await;
        refused += usize::from(written.is_err());
    }
    assert!(refused > 0, "the disk is full");
    assert!(store.get("/routes/1").await.unwrap().is_some(), "reads go on");
    limit(libc::RLIM_INFINITY);
    put(&*store, "/routes/2", "x".repeat(100_000)).await;
    assert!(store.get("/routes/1").await.unwrap().is_some());
    println!("wrote again");
}

#[test]
fn writes_again_once_a_full_disk_has_space() {
    let dir = tempfile::tempdir().unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "full_disk_process", "--ignored", "--nocapture"])
        .env(WRITER_FILE, dir.path().join("moongate.redb"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("wrote again"), "{said}");
}

const WRITER_FILE: &str = "MOONGATE_TEST_WRITER_FILE";
const WRITER_ROUND: &str = "MOONGATE_TEST_WRITER_ROUND";

/// Not a test: the process that `an_acknowledged_write_survives_sigkill` kills.
#[tokio::test]
#[ignore = "started by another test"]
async fn writer_process() {
    let Ok(file) = std::env::var(WRITER_FILE) else { return };
    let round = std::env::var(WRITER_ROUND).unwrap();
    let store = Embedded::open(Path::new(&file)).unwrap();
    for i in 0_u64.. {
        let (a, b) = (format!("/routes/{round}a{i}"), format!("/routes/{round}b{i}"));
        let both = tokio::join!(
            store.put(&a, i.to_string(), Condition::Always, None),
            store.put(&b, i.to_string(), Condition::Always, None)
        );
        both.0.unwrap();
        both.1.unwrap();
        println!("acknowledged {i}");
    }
}

#[tokio::test]
async fn an_acknowledged_write_survives_sigkill() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("moongate.redb");
    for round in 0..50_u64 {
        let mut writer = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "writer_process", "--ignored", "--nocapture"])
            .env(WRITER_FILE, &path)
            .env(WRITER_ROUND, round.to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(writer.stdout.take().unwrap()).lines();
        let mut acknowledged = None;
        for line in lines.map_while(Result::ok) {
            let Some(i) = line.split("acknowledged ").nth(1) else { continue };
            acknowledged = i.parse::<u64>().ok();
            // Killed at a different moment each time; lines that are still in the pipe count too.
            if acknowledged == Some(round % 13) {
                writer.kill().unwrap();
            }
        }
        writer.wait().unwrap();
        let last = acknowledged.expect("the writer wrote");
        let store = Embedded::open(&path).unwrap();
        for i in 0..=last {
            for key in [format!("/routes/{round}a{i}"), format!("/routes/{round}b{i}")] {
                let entry = store.get(&key).await.unwrap().unwrap_or_else(|| panic!("{key} lost in round {round}"));
                assert_eq!(*entry.value, *i.to_string());
            }
        }
    }
}
