//! An etcd of Debian's for a test, and a store on it.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use moongate::store::{
    Store,
    etcd::{Etcd, EtcdConfig},
};
use serde_json::json;
use tokio::time::timeout;

use super::ports::free_port;

/// No fact takes this long to come true on a machine that works.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// An etcd of the test's own.
pub struct EtcdServer {
    child: Child,
    dir: PathBuf,
    ports: [u16; 2],
}

impl EtcdServer {
    pub fn start(dir: &Path) -> Self {
        Self::start_on(dir, [free_port(), free_port()])
    }

    pub fn start_on(dir: &Path, ports: [u16; 2]) -> Self {
        Self::start_with(dir, ports, "http", &[])
    }

    pub fn start_with(dir: &Path, ports: [u16; 2], scheme: &str, more: &[&str]) -> Self {
        let client = format!("{scheme}://127.0.0.1:{}", ports[0]);
        let peer = format!("http://127.0.0.1:{}", ports[1]);
        let mut command = Command::new("etcd");
        command
            .args(more)
            .args(["--data-dir", dir.to_str().unwrap(), "--log-level", "error"])
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut spawn = || command.spawn().expect("etcd (Debian: etcd-server) must be installed");
        let mut child = spawn();
        let end = Instant::now() + DEADLINE;
        let listens = |port: u16| std::net::TcpStream::connect(("127.0.0.1", port)).is_ok();
        // A port that was free a moment ago may be somebody's for a moment: etcd ends then.
        while !ports.into_iter().all(listens) || child.try_wait().unwrap().is_some() {
            assert!(Instant::now() < end, "etcd does not listen on {ports:?}");
            if child.try_wait().unwrap().is_some() {
                child = spawn();
            }
            std::thread::park_timeout(Duration::from_millis(5));
        }
        EtcdServer { child, dir: dir.to_owned(), ports }
    }

    pub fn port(&self) -> u16 {
        self.ports[0]
    }

    pub fn kill(mut self) -> (PathBuf, [u16; 2]) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        (self.dir.clone(), self.ports)
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: kill(2) on a child that has not been waited for.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, signal) }, 0);
    }

    pub async fn client(&self) -> etcd_client::Client {
        etcd_client::Client::connect([format!("127.0.0.1:{}", self.port())], None).await.unwrap()
    }

    /// A store on it, once it answers.
    pub async fn store(&self) -> Arc<Etcd> {
        let store = store_at(self.port());
        until("etcd answers", async || store.list("/").await.is_ok()).await;
        store
    }
}

impl Drop for EtcdServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn store_at(port: u16) -> Arc<Etcd> {
    let config = json!({"deployment": {"etcd": {"host": [format!("http://127.0.0.1:{port}")], "timeout": 5}}});
    Etcd::new(EtcdConfig::from_json(&config, Path::new("/")).unwrap())
}

/// Asks until it is so.
pub async fn until(fact: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let asked = timeout(DEADLINE, async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    asked.await.unwrap_or_else(|_| panic!("never: {fact}"));
}
