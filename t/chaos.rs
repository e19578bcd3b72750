//! A cluster of three etcd members that is killed, frozen, compacted, wiped, led by another, closed to strangers and slow: requests
//! go on all the time, and five seconds after it is well again the gateway serves what it holds.

mod support;

use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use support::{Client, Gateway, Upstream, eventually, get, ports::free_port};
use tempfile::TempDir;

/// What a cluster that has recovered gets until its state is served.
const RECOVERY: Duration = Duration::from_secs(5);

const MEMBERS: usize = 3;

/// Three members with data of their own, on ports that stay the same.
struct Cluster {
    dir: TempDir,
    clients: [u16; MEMBERS],
    peers: [u16; MEMBERS],
    running: [Option<Child>; MEMBERS],
}

impl Cluster {
    fn start() -> Self {
        // Ports that were free a moment ago may be somebody's: then another try has others.
        eventually("a cluster of three", || {
            let (clients, peers) = ([(); MEMBERS].map(|()| free_port()), [(); MEMBERS].map(|()| free_port()));
            let dir = TempDir::new().expect("a directory");
            let mut cluster = Cluster { dir, clients, peers, running: [const { None }; MEMBERS] };
            cluster.launch();
            let up = |c: &mut Cluster| {
                c.running.iter_mut().flatten().all(|child| child.try_wait().expect("a state").is_none())
            };
            let until = Instant::now() + Duration::from_secs(10);
            while !cluster.is_healthy() {
                if !up(&mut cluster) || Instant::now() > until {
                    return None;
                }
                thread::yield_now();
            }
            Some(cluster)
        })
    }

    fn url(&self, i: usize) -> String {
        format!("http://127.0.0.1:{}", self.clients[i])
    }

    fn urls(&self) -> Vec<String> {
        (0..MEMBERS).map(|i| self.url(i)).collect()
    }

    fn launch(&mut self) {
        (0..MEMBERS).for_each(|i| self.revive(i));
    }

    fn revive(&mut self, i: usize) {
        let at = |port: u16| format!("http://127.0.0.1:{port}");
        let cluster: Vec<String> = (0..MEMBERS).map(|i| format!("m{i}={}", at(self.peers[i]))).collect();
        let child = Command::new("etcd")
            .args(["--name", &format!("m{i}"), "--data-dir", &self.dir.path().join(format!("m{i}")).to_string_lossy()])
            .args(["--listen-client-urls", &self.url(i), "--advertise-client-urls", &self.url(i)])
            .args(["--listen-peer-urls", &at(self.peers[i]), "--initial-advertise-peer-urls", &at(self.peers[i])])
            .args(["--initial-cluster", &cluster.join(","), "--heartbeat-interval", "50", "--election-timeout", "500"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("etcd is installed (Debian: etcd-server)");
        self.running[i] = Some(child);
    }

    fn kill(&mut self, i: usize) {
        if let Some(mut child) = self.running[i].take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    fn signal(&self, signal: i32) {
        for child in self.running.iter().flatten() {
            // SAFETY: a plain system call on a process that this value owns and has not reaped.
            unsafe { libc::kill(child.id() as i32, signal) };
        }
    }

    /// What etcdctl prints, `None` when it fails.
    fn ctl(&self, args: &[&str]) -> Option<String> {
        let out = Command::new("etcdctl")
            .env("ETCDCTL_API", "3")
            .args(["--endpoints", &self.urls().join(","), "--command-timeout", "3s"])
            .args(args)
            .output()
            .expect("etcdctl is installed (Debian: etcd-client)");
        out.status.success().then(|| String::from_utf8_lossy(&out.stdout).into_owned())
    }

    /// A majority answers reads that go through it.
    fn is_healthy(&self) -> bool {
        self.ctl(&["get", "--prefix", "/none"]).is_some()
    }

    fn well(&self) {
        eventually("the cluster is well", || self.is_healthy().then_some(()));
    }

    fn put(&self, key: &str, value: &Value) {
        let text = value.to_string();
        eventually("a stored key", || self.ctl(&["put", key, &text]).map(drop));
    }

    /// Each member's state as `etcdctl endpoint status` has it.
    fn states(&self) -> Vec<Value> {
        let text = self.ctl(&["endpoint", "status", "-w", "json"]).unwrap_or_default();
        serde_json::from_str(&text).unwrap_or_default()
    }

    /// The place of the leader in the list.
    fn leader(&self) -> usize {
        eventually("a leader", || {
            let leads = |state: &Value| {
                let status = &state["Status"];
                status["leader"].as_u64() == status["header"]["member_id"].as_u64()
            };
            let leader = self.states().into_iter().find(leads)?;
            (0..MEMBERS).find(|i| leader["Endpoint"] == json!(self.url(*i)))
        })
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // A member that is stopped dies as well.
        (0..MEMBERS).for_each(|i| self.kill(i));
    }
}

/// A way to a member that can be shut, or made slow.
struct Gate {
    port: u16,
    open: Arc<AtomicBool>,
    delay_ms: Arc<AtomicU64>,
}

impl Gate {
    fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let gate = Gate {
            port: listener.local_addr().expect("its address").port(),
            open: Arc::new(AtomicBool::new(true)),
            delay_ms: Arc::default(),
        };
        let (open, delay) = (gate.open.clone(), gate.delay_ms.clone());
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(member) = TcpStream::connect(("127.0.0.1", port)) else { continue };
                for (from, to) in [(&client, &member), (&member, &client)] {
                    let (from, to) = (from.try_clone().expect("a handle"), to.try_clone().expect("a handle"));
                    let (open, delay) = (open.clone(), delay.clone());
                    thread::spawn(move || copy(from, to, &open, &delay));
                }
            }
        });
        gate
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }
}

fn copy(mut from: TcpStream, mut to: TcpStream, open: &AtomicBool, delay: &AtomicU64) {
    let mut buffer = [0; 16384];
    let _ = from.set_read_timeout(Some(Duration::from_millis(20)));
    loop {
        let read = from.read(&mut buffer);
        let waits =
            |e: &std::io::Error| matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut);
        let n = match read {
            _ if !open.load(Ordering::Relaxed) => break,
            Err(e) if waits(&e) => continue,
            Ok(n) if n > 0 => n,
            _ => break,
        };
        // What is slow is the subject of the test, and nothing is waited for here.
        thread::park_timeout(Duration::from_millis(delay.load(Ordering::Relaxed)));
        if to.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

/// Requests for `/steady`, one after the other, until it is dropped.
struct Traffic {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    thread: Option<thread::JoinHandle<Duration>>,
}

impl Traffic {
    fn start(gw: &Gateway) -> Self {
        let (stop, address) = (Arc::new(AtomicBool::new(false)), gw.proxy());
        let (stopped, answers) = (stop.clone(), Arc::new(AtomicU64::new(0)));
        let counted = answers.clone();
        let ask = move || {
            let mut client = Client::connect(&address);
            let (mut answered, mut longest) = (0, Duration::ZERO);
            while !stopped.load(Ordering::Relaxed) {
                // A connection is for a thousand requests, as nginx's.
                if answered % 500 == 499 {
                    client = Client::connect(&address);
                }
                let started = Instant::now();
                client.send("GET", "/steady", &[], b"");
                let reply = client.reply("GET");
                assert_eq!(reply.status, 200, "traffic stopped: {}", reply.text());
                longest = longest.max(started.elapsed());
                answered += 1;
                counted.store(answered, Ordering::Relaxed);
            }
            longest
        };
        Traffic { stop, answered: answers, thread: Some(thread::spawn(ask)) }
    }

    /// None of them was lost, and none waited for the cluster.
    fn went_on(mut self) {
        let thread = self.thread.take().expect("once");
        // A busy machine may have let few through until now: more come, or the thread has failed.
        eventually("twenty requests", || {
            (thread.is_finished() || self.answered.load(Ordering::Relaxed) > 20).then_some(())
        });
        self.stop.store(true, Ordering::Relaxed);
        let longest = thread.join().expect("every answer was good");
        assert!(longest < Duration::from_secs(2), "a request took {longest:?}");
    }
}

struct Scene {
    cluster: Cluster,
    gw: Gateway,
    up: Upstream,
    written: u32,
    tasks: u64,
}

impl Scene {
    /// A gateway on these members (all) that serves `/steady`.
    fn on(hosts: impl Fn(&Cluster) -> Vec<String>) -> Self {
        let cluster = Cluster::start();
        let (up, hosts) = (Upstream::echo(), hosts(&cluster));
        let route = json!({"uri": "/steady", "upstream": {"type": "roundrobin", "nodes": {up.addr(): 1}}});
        cluster.put("/apisix/routes/steady", &route);
        let gw = Gateway::with(json!({"deployment": {
            "role": "traditional", "role_traditional": {"config_provider": "etcd"},
            "etcd": {"host": hosts, "prefix": "/apisix", "timeout": 5},
        }}));
        let mut scene = Scene { cluster, gw, up, written: 0, tasks: 0 };
        eventually("/steady is served", || (scene.gw.get("/steady").status == 200).then_some(()));
        scene.converges("at first");
        scene.tasks = scene.tasks_now();
        scene
    }

    fn tasks_now(&self) -> u64 {
        get(&self.gw.control(), "/v1/lua").json()["control"]["tasks"].as_u64().expect("a number")
    }

    fn write(&mut self) -> String {
        self.written += 1;
        let path = format!("/w{}", self.written);
        let route = json!({"uri": path, "upstream": {"type": "roundrobin", "nodes": {self.up.addr(): 1}}});
        // One object: the version before is gone with the next.
        self.cluster.put("/apisix/routes/written", &route);
        path
    }

    /// What is written to the cluster from now on is served soon.
    fn converges(&mut self, when: &str) {
        let path = self.write();
        let started = Instant::now();
        eventually(&format!("{path} is served {when}"), || (self.gw.get(&path).status == 200).then_some(()));
        assert!(started.elapsed() < RECOVERY, "{when}: it took {:?}", started.elapsed());
        let before = format!("/w{}", self.written - 1);
        assert_eq!(self.gw.get(&before).status, 404, "{when}: one version of an object is served");
        eventually("the source is told to be well", || self.source()["connected"].as_bool().filter(|well| *well));
    }

    fn source(&self) -> Value {
        get(&self.gw.control(), "/v1/config/errors").json()["source"].clone()
    }

    /// The gateway has noticed, says why, and since when what it serves may be old.
    fn is_lost(&self) {
        eventually("the source is told to be lost", || {
            let source = self.source();
            (source["connected"] == false && source["stale_since"].is_u64() && source["last_error"].is_string())
                .then_some(())
        });
    }

    /// Whatever a fault has started has ended.
    fn leaks_nothing(&self) {
        eventually("no more tasks than before", || (self.tasks_now() <= self.tasks).then_some(()));
    }
}

#[test]
fn the_leader_is_killed_and_another_leads() {
    let mut s = Scene::on(Cluster::urls);
    let traffic = Traffic::start(&s.gw);
    for _ in 0..MEMBERS {
        let leader = s.cluster.leader();
        s.cluster.kill(leader);
        s.cluster.well();
        s.converges("with two members");
        s.cluster.revive(leader);
        eventually("three members", || (s.cluster.states().len() == MEMBERS).then_some(()));
        s.converges("with three members again");
    }
    traffic.went_on();
    s.leaks_nothing();
}

#[test]
fn the_lead_moves() {
    let mut s = Scene::on(Cluster::urls);
    let traffic = Traffic::start(&s.gw);
    for _ in 0..2 {
        let leader = s.cluster.leader();
        let id = |i: usize| {
            let states = s.cluster.states();
            let state = states.iter().find(|state| state["Endpoint"] == json!(s.cluster.url(i)))?;
            Some(format!("{:x}", state["Status"]["header"]["member_id"].as_u64()?))
        };
        let next = eventually("the id of another member", || id((leader + 1) % MEMBERS));
        eventually("the lead moves", || s.cluster.ctl(&["move-leader", &next]).map(drop));
        s.converges("with another leader");
    }
    traffic.went_on();
    s.leaks_nothing();
}

#[test]
fn all_members_are_killed_and_come_back() {
    let mut s = Scene::on(Cluster::urls);
    let traffic = Traffic::start(&s.gw);
    (0..MEMBERS).for_each(|i| s.cluster.kill(i));
    s.is_lost();
    let refused = s.gw.admin("PUT", "/routes/n", json!({"uri": "/n", "upstream": {"nodes": {"127.0.0.1:1": 1}}}));
    assert_eq!(refused.status, 503, "{}", refused.text());
    s.cluster.launch();
    s.cluster.well();
    s.converges("after all were killed");
    traffic.went_on();
    s.leaks_nothing();
}

#[test]
fn all_members_freeze_and_go_on() {
    let mut s = Scene::on(Cluster::urls);
    let traffic = Traffic::start(&s.gw);
    s.cluster.signal(libc::SIGSTOP);
    s.is_lost();
    s.cluster.signal(libc::SIGCONT);
    s.cluster.well();
    s.converges("after a freeze");
    traffic.went_on();
    s.leaks_nothing();
}

#[test]
fn everything_is_wiped_and_written_anew() {
    let mut s = Scene::on(Cluster::urls);
    let traffic = Traffic::start(&s.gw);
    (0..MEMBERS).for_each(|i| s.cluster.kill(i));
    s.is_lost();
    for i in 0..MEMBERS {
        fs::remove_dir_all(s.cluster.dir.path().join(format!("m{i}"))).expect("its data");
    }
    // What was there when nobody looked is served until the cluster says otherwise.
    assert_eq!(s.gw.get("/steady").status, 200);
    traffic.went_on();
    s.cluster.launch();
    s.cluster.well();
    eventually("the empty cluster is believed", || (s.gw.get("/steady").status == 404).then_some(()));
    s.converges("after a wipe");
    s.leaks_nothing();
}

#[test]
fn what_was_missed_is_compacted() {
    let gate: std::cell::OnceCell<Gate> = std::cell::OnceCell::new();
    let mut s = Scene::on(|cluster| vec![gate.get_or_init(|| Gate::to(cluster.clients[0])).url()]);
    let gate = gate.into_inner().expect("made");
    let traffic = Traffic::start(&s.gw);
    gate.open.store(false, Ordering::Relaxed);
    s.is_lost();
    (0..20).for_each(|_| drop(s.write()));
    let last = s.write();
    let revision = s.cluster.states()[0]["Status"]["header"]["revision"].as_u64().expect("a revision");
    s.cluster.ctl(&["compact", "--physical", &revision.to_string()]).expect("compacted");
    gate.open.store(true, Ordering::Relaxed);
    let started = Instant::now();
    eventually("what was written meanwhile is served", || (s.gw.get(&last).status == 200).then_some(()));
    assert!(started.elapsed() < RECOVERY, "it took {:?}", started.elapsed());
    s.converges("after a compaction");
    traffic.went_on();
    s.leaks_nothing();
}

#[test]
fn strangers_are_shut_out_and_let_in_again() {
    let mut s = Scene::on(Cluster::urls);
    let traffic = Traffic::start(&s.gw);
    let root = ["--user", "root:pw"];
    for args in [&["user", "add", "root:pw"][..], &["user", "grant-role", "root", "root"], &["auth", "enable"]] {
        s.cluster.ctl(args).expect("etcdctl");
    }
    // A watch that is open stays; a new one is refused.
    for i in 0..MEMBERS {
        s.cluster.kill(i);
        s.cluster.revive(i);
        eventually("the member is back", || s.cluster.ctl(&[&root[..], &["get", "/none"]].concat()).map(drop));
    }
    s.is_lost();
    eventually("why it is lost is told", || {
        s.source()["last_error"].as_str().filter(|why| why.contains("user name is empty")).map(drop)
    });
    s.cluster.ctl(&[&root[..], &["auth", "disable"]].concat()).expect("etcdctl");
    s.converges("after it was let in again");
    traffic.went_on();
    s.leaks_nothing();
}

#[test]
fn answers_come_slowly() {
    let gate: std::cell::OnceCell<Gate> = std::cell::OnceCell::new();
    let mut s = Scene::on(|cluster| vec![gate.get_or_init(|| Gate::to(cluster.clients[0])).url()]);
    let gate = gate.into_inner().expect("made");
    let traffic = Traffic::start(&s.gw);
    gate.delay_ms.store(300, Ordering::Relaxed);
    s.converges("though the cluster is slow");
    let route = json!({"uri": "/slow", "upstream": {"type": "roundrobin", "nodes": {s.up.addr(): 1}}});
    s.gw.put("/routes/slow", route);
    assert_eq!(s.gw.get("/slow").status, 200, "what was answered is served");
    gate.delay_ms.store(0, Ordering::Relaxed);
    s.converges("at full speed");
    traffic.went_on();
    s.leaks_nothing();
}
