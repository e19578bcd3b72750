//! Real peers: etcd, redis, memcached and MariaDB, each in a directory of its own on free ports.

use std::{
    net::{TcpListener, TcpStream},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use tempfile::TempDir;

use super::{eventually, ports::free_port};

/// A process that ends with the value.
pub struct Peer {
    child: Child,
    pub port: u16,
    dir: TempDir,
}

impl Peer {
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A file in its directory.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: a plain system call on a process that this value owns and has not reaped.
        unsafe { libc::kill(self.pid() as i32, signal) };
    }

    /// SIGKILL; gone when it returns.
    pub fn kill(&mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("reaped");
    }

    /// Starts a redis that was killed again, on its port and without what it knew.
    pub fn restart_redis(&mut self) {
        self.child = redis_at(self.port, self.dir.path(), &[]);
        wait_for_port(self.port);
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An etcd whose data outlives its process: `stop` and `start` again.
pub struct Etcd {
    peer: Option<Peer>,
    dir: TempDir,
    port: u16,
    peer_port: u16,
}

impl Etcd {
    pub fn start() -> Self {
        let dir = TempDir::new().expect("a temporary directory");
        let mut etcd = Etcd { peer: None, dir, port: free_port(), peer_port: free_port() };
        etcd.restart();
        etcd
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub fn stop(&mut self) {
        self.peer = None;
    }

    pub fn restart(&mut self) {
        self.stop();
        let (client, peer) = (self.url(), format!("http://127.0.0.1:{}", self.peer_port));
        let data = self.dir.path().join("data");
        let mut command = Command::new("etcd");
        command
            .args(["--name", "t", "--data-dir", &data.to_string_lossy()])
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("t={peer}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut spawn = || command.spawn().expect("etcd is installed (Debian: etcd-server)");
        let mut child = spawn();
        let ports = [self.port, self.peer_port];
        // A port that was free a moment ago may be somebody's for a moment: etcd ends then.
        eventually("etcd listens", || {
            let listens = ports.into_iter().all(|port| TcpStream::connect(("127.0.0.1", port)).is_ok());
            let ended = child.try_wait().expect("its state").is_some();
            if ended {
                child = spawn();
            }
            (listens && !ended).then_some(())
        });
        self.peer = Some(Peer { child, port: self.port, dir: TempDir::new().expect("a directory") });
        eventually("etcd answers", || self.ctl(&["endpoint", "health"]).map(drop));
    }

    pub fn signal(&self, signal: i32) {
        self.peer.as_ref().expect("a running etcd").signal(signal);
    }

    pub fn put(&self, key: &str, value: &str) {
        self.ctl(&["put", key, value]).expect("a stored key");
    }

    pub fn delete(&self, key: &str) {
        self.ctl(&["del", key]).expect("a deleted key");
    }

    pub fn get(&self, key: &str) -> String {
        self.ctl(&["get", "--print-value-only", key]).expect("an answer").trim_end().to_owned()
    }

    /// The keys that start so.
    pub fn keys(&self, prefix: &str) -> Vec<String> {
        let listed = self.ctl(&["get", prefix, "--prefix", "--keys-only"]).unwrap_or_default();
        listed.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
    }

    /// Compacts the history up to now.
    pub fn compact(&self) {
        let status = self.ctl(&["endpoint", "status", "-w", "json"]).expect("a status");
        let revision = status.split("\"revision\":").nth(1).and_then(|s| s.split([',', '}']).next());
        self.ctl(&["compact", "--physical", revision.expect("a revision")]).expect("compacted");
    }

    /// What etcdctl prints, `None` when it fails.
    pub fn ctl(&self, args: &[&str]) -> Option<String> {
        let out = Command::new("etcdctl")
            .env("ETCDCTL_API", "3")
            .arg("--endpoints")
            .arg(self.url())
            .args(args)
            .output()
            .expect("etcdctl is installed (Debian: etcd-client)");
        out.status.success().then(|| String::from_utf8_lossy(&out.stdout).into_owned())
    }
}

pub fn redis() -> Peer {
    redis_with(|_| Vec::new())
}

/// redis with more arguments, which may name files in its directory. Also on the unix socket `redis.sock`.
pub fn redis_with(args: impl Fn(&Path) -> Vec<String>) -> Peer {
    on_a_free_port("redis.sock", |port, dir| redis_at(port, dir, &args(dir)))
}

fn redis_at(port: u16, dir: &Path, args: &[String]) -> Child {
    Command::new("redis-server")
        .args(["--port", &port.to_string(), "--save", "", "--dir", &dir.to_string_lossy()])
        .args(["--unixsocket", &dir.join("redis.sock").to_string_lossy()])
        .args(args)
        .stdout(Stdio::null())
        .spawn()
        .expect("redis is installed (Debian: redis-server)")
}

/// What redis-cli prints, of a command for the redis of that port; without the newline at its end.
pub fn redis_cli(port: u16, args: &[&str]) -> String {
    let out = Command::new("redis-cli")
        .args(["-h", "127.0.0.1", "-p", &port.to_string()])
        .args(args)
        .output()
        .expect("redis-cli is installed (Debian: redis-tools)");
    String::from_utf8_lossy(&out.stdout).trim_end().to_owned()
}

/// A Redis of a cluster, which has no slots yet, with more options.
pub fn redis_cluster_node(more: &[&str]) -> Peer {
    redis_with(|_| {
        // The bus is on a port of its own: by default ten thousand above, which may be somebody's, or none.
        let mut args =
            ["--cluster-enabled", "yes", "--cluster-port", &free_port().to_string()].map(String::from).to_vec();
        args.extend(more.iter().map(|arg| (*arg).to_owned()));
        args
    })
}

/// A Redis Cluster of three masters that serves.
pub fn redis_cluster() -> Vec<Peer> {
    let nodes: Vec<_> = (0..3).map(|_| redis_cluster_node(&[])).collect();
    let addresses: Vec<_> = nodes.iter().map(Peer::address).collect();
    let out = Command::new("redis-cli")
        .args(["--cluster", "create", "--cluster-yes"])
        .args(&addresses)
        .output()
        .expect("redis-cli is installed (Debian: redis-tools)");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
    for node in &nodes {
        eventually("all nodes know the cluster", || {
            redis_cli(node.port, &["cluster", "info"]).contains("cluster_state:ok").then_some(())
        });
    }
    nodes
}

/// A Sentinel that watches these masters by name, with more lines of its configuration.
pub fn sentinel(masters: &[(&str, u16)], lines: &str) -> Peer {
    on_a_free_port("redis.sock", |port, dir| {
        let mut conf = lines.to_owned();
        for (name, master) in masters {
            conf += &format!(
                "\nsentinel monitor {name} 127.0.0.1 {master} 1\nsentinel down-after-milliseconds {name} 1000\n"
            );
        }
        let file = dir.join("sentinel.conf");
        std::fs::write(&file, conf).expect("a written file");
        Command::new("redis-server")
            .args([&file.to_string_lossy(), "--sentinel", "--port", &port.to_string()])
            .args(["--unixsocket", &dir.join("redis.sock").to_string_lossy()])
            .stdout(Stdio::null())
            .spawn()
            .expect("redis is installed (Debian: redis-server)")
    })
}

/// A memcached with its defaults: values of up to one megabyte.
pub fn memcached() -> Peer {
    let dir = TempDir::new().expect("a temporary directory");
    let ports = dir.path().join("ports");
    // It chooses its port and tells.
    let child = Command::new("memcached")
        .args(["-l", "127.0.0.1", "-p", "-1", "-U", "0", "-t", "1", "-u", &user()])
        .env("MEMCACHED_PORT_FILENAME", &ports)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("memcached is installed (Debian: memcached)");
    let port = eventually("memcached tells its port", || {
        let told = std::fs::read_to_string(&ports).ok()?;
        told.lines().find_map(|line| line.strip_prefix("TCP INET: "))?.trim().parse().ok()
    });
    Peer { child, port, dir }
}

/// MariaDB whose root has no password, on a port and the unix socket `db.sock`, with more arguments.
pub fn mariadb_with(args: impl Fn(&Path) -> Vec<String>) -> Peer {
    on_a_free_port("db.sock", |port, dir| {
        let at = |name: &str| dir.join(name).to_string_lossy().into_owned();
        let (data, user) = (format!("--datadir={}", at("data")), format!("--user={}", user()));
        let installed = Command::new("mariadb-install-db")
            .args(["--no-defaults", &data, &user, "--auth-root-authentication-method=normal", "--skip-test-db"])
            // A server that starts clears away the temporary tables of others.
            .env("TMPDIR", dir)
            .output()
            .expect("MariaDB is installed (Debian: mariadb-server)");
        assert!(installed.status.success(), "{}", String::from_utf8_lossy(&installed.stderr));
        // A service's place is not on everybody's path.
        let place = if Path::new("/usr/sbin/mariadbd").exists() { "/usr/sbin/mariadbd" } else { "mariadbd" };
        Command::new(place)
            .args(["--no-defaults", &data, &user, "--bind-address=127.0.0.1", &format!("--port={port}")])
            .args([&format!("--socket={}", at("db.sock")), &format!("--pid-file={}", at("pid"))])
            .args(["--innodb-buffer-pool-size=8M", "--innodb-flush-log-at-trx-commit=0"])
            .args(args(dir))
            .env("TMPDIR", dir)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("MariaDB is installed (Debian: mariadb-server)")
    })
}

/// A peer that ends when somebody else has taken its port meanwhile, and opens this unix socket once it has the port.
fn on_a_free_port(socket: &str, spawn: impl Fn(u16, &Path) -> Child) -> Peer {
    for _ in 0..10 {
        let dir = TempDir::new().expect("a temporary directory");
        let port = free_port();
        let mut child = spawn(port, dir.path());
        let socket = dir.path().join(socket);
        let serves = eventually("the peer listens or ends", || {
            if child.try_wait().expect("its status").is_some() {
                return Some(false);
            }
            UnixStream::connect(&socket).ok().map(|_| true)
        });
        if serves {
            return Peer { child, port, dir };
        }
    }
    panic!("no port stays free");
}

/// A Prometheus with this configuration.
pub fn prometheus(config: &serde_json::Value) -> Peer {
    let dir = TempDir::new().expect("a temporary directory");
    let (port, file) = (free_port(), dir.path().join("prometheus.yml"));
    // JSON is YAML.
    std::fs::write(&file, config.to_string()).expect("a written file");
    let child = Command::new("prometheus")
        .arg(format!("--config.file={}", file.display()))
        .arg(format!("--storage.tsdb.path={}", dir.path().join("data").display()))
        .arg(format!("--web.listen-address=127.0.0.1:{port}"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("prometheus is installed (Debian: prometheus)");
    let peer = Peer { child, port, dir };
    wait_for_port(port);
    eventually("Prometheus is ready", || (super::get(&peer.address(), "/-/ready").status == 200).then_some(()));
    peer
}

/// Who runs the test: servers that refuse to be root want to hear it.
fn user() -> String {
    let out = Command::new("id").arg("-un").output().expect("id");
    String::from_utf8_lossy(&out.stdout).trim().to_owned()
}

fn wait_for_port(port: u16) {
    eventually("the peer listens", || TcpStream::connect(("127.0.0.1", port)).ok().map(drop));
}
