//! Names to addresses: /etc/hosts, then DNS; answers kept for their TTL.
//!
//! One resolver per process, asked from every worker. What is known is answered on the spot; what is not is looked up on
//! the runtime that the resolver was made with, once for all who ask, and goes on when they give up. When DNS fails,
//! addresses that have run out stand in for a bounded time. Literal addresses never get here.

mod cache;

use std::{
    future::Future,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::{Duration, Instant},
};

use hashbrown::HashMap;
use hickory_resolver::{
    Name, TokioResolver,
    config::{LookupIpStrategy, NameServerConfig, ResolverConfig, ResolverOpts},
    name_server::TokioConnectionProvider,
    proto::xfer::Protocol,
};
use smallvec::SmallVec;
use tokio::{runtime::Handle, sync::watch};

use self::cache::{Cache, Known};
use crate::error::{Error, Kind, Result};

/// Addresses of a name, in the order of the answer. Never empty.
pub type Addrs = SmallVec<[IpAddr; 4]>;

/// Names that are looked up at the same time. A plugin that resolves what clients send must not open sockets without end.
const MAX_LOOKUPS: usize = 256;

/// RFC 1035, 2.3.4.
const MAX_NAME: usize = 253;

/// `apisix.dns_resolver` and its neighbours.
#[derive(Clone, Debug)]
pub struct Config {
    /// `dns_resolver`. Empty: /etc/resolv.conf.
    pub servers: Vec<SocketAddr>,
    /// `dns_resolver_valid`: instead of the TTL of the records.
    pub valid: Option<Duration>,
    /// `resolver_timeout`: for a lookup as a whole.
    pub timeout: Duration,
    /// `enable_resolv_search_opt`.
    pub search: bool,
}

impl Default for Config {
    fn default() -> Self {
        Config { servers: Vec::new(), valid: None, timeout: Duration::from_secs(5), search: true }
    }
}

/// Cheap to clone.
#[derive(Clone)]
pub struct Resolver {
    shared: Arc<Shared>,
}

struct Shared {
    source: Box<dyn Source>,
    valid: Option<Duration>,
    timeout: Duration,
    /// Where lookups run: the sockets of a lookup belong to a runtime, and workers come and go.
    runtime: Handle,
    cache: RwLock<Cache>,
    running: Mutex<HashMap<Box<str>, Waiting>>,
}

/// What those who wait for a lookup watch; `None` until it has ended.
type Waiting = watch::Receiver<Option<Outcome>>;
type Outcome = Result<Addrs, Box<str>>;

/// Addresses and their TTL.
type Answer<'a> = Pin<Box<dyn Future<Output = Result<(Addrs, Duration), String>> + Send + 'a>>;

/// Who is asked for what the cache does not know.
trait Source: Send + Sync {
    fn lookup(&self, name: Arc<str>) -> Answer<'_>;
}

impl Resolver {
    /// `runtime`: the control thread's.
    pub fn new(config: &Config, runtime: Handle) -> Self {
        Self::with_source(Box::new(Dns::new(config)), config, runtime)
    }

    fn with_source(source: Box<dyn Source>, config: &Config, runtime: Handle) -> Self {
        let (valid, timeout) = (config.valid, config.timeout);
        let (cache, running) = Default::default();
        Resolver { shared: Arc::new(Shared { source, valid, timeout, runtime, cache, running }) }
    }

    /// The addresses of `host`, if they can be told without waiting.
    pub fn known(&self, host: &str) -> Option<Addrs> {
        if let Some(addr) = literal(host) {
            return Some(Addrs::from_slice(&[addr]));
        }
        self.shared.cached(&normal(host)?)?.ok()
    }

    /// The addresses of `host`: a name, or an address as text.
    pub async fn resolve(&self, host: &str) -> Result<Addrs> {
        if let Some(addr) = literal(host) {
            return Ok(Addrs::from_slice(&[addr]));
        }
        let outcome = match normal(host) {
            Some(name) => self.lookup(&name).await,
            None => Err("not a name".into()),
        };
        let failed = |why| Error::upstream(Kind::Resolve).context(format!("failed to resolve {host}: {why}"));
        outcome.map_err(failed)
    }

    async fn lookup(&self, name: &str) -> Outcome {
        if let Some(known) = self.shared.cached(name) {
            return known;
        }
        let mut waiting = self.join(name)?;
        // An error says that the lookup's task is gone, which is the end of its runtime.
        let ended = waiting.wait_for(Option::is_some).await;
        ended.ok().and_then(|outcome| outcome.clone()).unwrap_or_else(|| Err("the resolver has stopped".into()))
    }

    /// The lookup of `name` that runs, or a new one.
    fn join(&self, name: &str) -> Result<Waiting, Box<str>> {
        let mut running = self.shared.running();
        if let Some(waiting) = running.get(name) {
            return Ok(waiting.clone());
        }
        if running.len() >= MAX_LOOKUPS {
            return Err("too many lookups at once".into());
        }
        let (outcome, waiting) = watch::channel(None);
        running.insert(name.into(), waiting.clone());
        let (shared, name) = (self.shared.clone(), Arc::from(name));
        self.shared.runtime.spawn(async move {
            let result = shared.ask(&name).await;
            shared.running().remove(&*name);
            outcome.send_replace(Some(result));
        });
        Ok(waiting)
    }
}

impl Shared {
    fn cached(&self, name: &str) -> Option<Outcome> {
        match self.cache.read().unwrap_or_else(PoisonError::into_inner).get(name, Instant::now()) {
            Known::Addrs(addrs) => Some(Ok(addrs.clone())),
            Known::Failed(error) => Some(Err(error.into())),
            Known::Nothing => None,
        }
    }

    async fn ask(&self, name: &Arc<str>) -> Outcome {
        let answer = tokio::time::timeout(self.timeout, self.source.lookup(name.clone())).await;
        let answer = answer.unwrap_or_else(|_| Err("timeout".into()));
        let mut cache = self.cache.write().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        match answer {
            Ok((addrs, ttl)) if !addrs.is_empty() => {
                cache.learned(name, addrs.clone(), self.valid.unwrap_or(ttl), now);
                Ok(addrs)
            }
            Ok(_) => cache.failed(name, "no address", now).ok_or_else(|| "no address".into()),
            Err(error) => cache.failed(name, &error, now).ok_or_else(|| error.into()),
        }
    }

    fn running(&self) -> MutexGuard<'_, HashMap<Box<str>, Waiting>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn literal(host: &str) -> Option<IpAddr> {
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    bare.parse().ok()
}

/// The name as the cache knows it; `None` for what cannot be one.
fn normal(host: &str) -> Option<std::borrow::Cow<'_, str>> {
    if host.is_empty() || host.len() > MAX_NAME {
        return None;
    }
    let has_upper = host.bytes().any(|b| b.is_ascii_uppercase());
    Some(if has_upper { host.to_ascii_lowercase().into() } else { host.into() })
}

/// /etc/hosts and DNS servers.
struct Dns {
    resolver: TokioResolver,
    search: bool,
}

impl Dns {
    fn new(config: &Config) -> Self {
        // Without a readable resolv.conf /etc/hosts still works; lookups of other names fail and say so.
        let system = hickory_resolver::system_conf::read_system_conf();
        let (mut servers, mut options) = system.unwrap_or_else(|_| (ResolverConfig::new(), ResolverOpts::default()));
        if !config.servers.is_empty() {
            let (domain, search) = (servers.domain().cloned(), servers.search().to_vec());
            servers = ResolverConfig::from_parts(domain, search, name_servers(&config.servers));
        }
        let asked: Vec<String> = servers.name_servers().iter().map(|server| server.socket_addr.to_string()).collect();
        tracing::info!("init_resolver(): dns resolver {asked:?}");
        // The cache in front of this one knows about failures, too.
        options.cache_size = 0;
        // A server that does not answer leaves time for the next.
        options.timeout = config.timeout / 2;
        options.ip_strategy = LookupIpStrategy::Ipv4thenIpv6;
        let provider = TokioConnectionProvider::default();
        let resolver = TokioResolver::builder_with_config(servers, provider).with_options(options).build();
        Dns { resolver, search: config.search }
    }
}

fn name_servers(addrs: &[SocketAddr]) -> Vec<NameServerConfig> {
    let both = |addr: &SocketAddr| [Protocol::Udp, Protocol::Tcp].map(|p| NameServerConfig::new(*addr, p));
    addrs.iter().flat_map(both).collect()
}

impl Source for Dns {
    fn lookup(&self, name: Arc<str>) -> Answer<'_> {
        Box::pin(async move {
            let mut wanted = Name::from_utf8(&*name).map_err(|e| e.to_string())?;
            if !self.search {
                wanted.set_fqdn(true);
            }
            let found = self.resolver.lookup_ip(wanted).await.map_err(|e| e.to_string())?;
            let ttl = found.valid_until().saturating_duration_since(Instant::now());
            Ok((found.iter().collect(), ttl))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::{net::UdpSocket, sync::Semaphore};

    use super::*;

    /// Answers what the test says, when the test says so.
    struct Script {
        asked: AtomicUsize,
        go: Semaphore,
        answer: Result<(Addrs, Duration), String>,
    }

    impl Source for Arc<Script> {
        fn lookup(&self, _: Arc<str>) -> Answer<'_> {
            self.asked.fetch_add(1, Ordering::SeqCst);
            Box::pin(async {
                self.go.acquire().await.unwrap().forget();
                self.answer.clone()
            })
        }
    }

    fn scripted(answer: Result<(Addrs, Duration), String>, permits: usize) -> (Arc<Script>, Resolver) {
        let script = Arc::new(Script { asked: AtomicUsize::new(0), go: Semaphore::new(permits), answer });
        let resolver = Resolver::with_source(Box::new(script.clone()), &Config::default(), Handle::current());
        (script, resolver)
    }

    fn addr(text: &str) -> Addrs {
        Addrs::from_slice(&[text.parse().unwrap()])
    }

    #[tokio::test]
    async fn one_lookup_serves_all_who_ask_and_those_who_come_later() {
        let (script, resolver) = scripted(Ok((addr("10.0.0.1"), Duration::from_secs(60))), 0);
        assert_eq!(resolver.known("a.test"), None);
        let askers: Vec<_> =
            (0..20).map(|_| resolver.clone()).map(|r| async move { r.resolve("A.test").await }).collect();
        let askers = tokio::spawn(futures_util::future::join_all(askers));
        while script.asked.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        script.go.add_permits(1);
        for found in askers.await.unwrap() {
            assert_eq!(found.unwrap(), addr("10.0.0.1"));
        }
        assert_eq!(resolver.resolve("a.test").await.unwrap(), addr("10.0.0.1"));
        assert_eq!(resolver.known("a.test"), Some(addr("10.0.0.1")));
        assert_eq!(script.asked.load(Ordering::SeqCst), 1);
        assert!(resolver.shared.running().is_empty());
    }

    #[tokio::test]
    async fn a_failure_is_told_and_remembered() {
        let (script, resolver) = scripted(Err("no such name".into()), 9);
        for _ in 0..3 {
            let error = resolver.resolve("a.test").await.unwrap_err();
            assert_eq!(error.kind(), Kind::Resolve);
            assert_eq!(error.to_string(), "failed to resolve a.test: no such name");
        }
        assert_eq!(script.asked.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn literals_and_impossible_names_ask_nobody() {
        let (script, resolver) = scripted(Err("asked".into()), 0);
        for text in ["10.1.2.3", "::1", "[::1]"] {
            assert_eq!(resolver.resolve(text).await.unwrap().len(), 1);
            assert!(resolver.known(text).is_some());
        }
        let long = "a".repeat(300);
        for name in ["", &*long] {
            assert!(resolver.resolve(name).await.is_err());
        }
        assert_eq!(script.asked.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn names_are_bounded_in_length() {
        assert!(normal(&"a".repeat(MAX_NAME)).is_some());
        assert!(normal(&"a".repeat(MAX_NAME + 1)).is_none());
    }

    #[tokio::test]
    async fn lookups_at_once_are_bounded() {
        let (script, resolver) = scripted(Err("asked".into()), 0);
        let waiting: Vec<_> = (0..MAX_LOOKUPS).map(|i| resolver.join(&format!("n{i}.test")).unwrap()).collect();
        let error = resolver.resolve("one.too.many").await.unwrap_err();
        assert!(error.to_string().ends_with("too many lookups at once"), "{error}");
        script.go.add_permits(MAX_LOOKUPS);
        for mut waiting in waiting {
            waiting.wait_for(Option::is_some).await.unwrap();
        }
    }

    #[test]
    fn a_worker_asks_from_its_own_runtime() {
        let build = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let control = build();
        let (_, resolver) = control.block_on(async { scripted(Ok((addr("10.0.0.2"), Duration::from_secs(9))), 9) });
        let worker = std::thread::spawn(move || build().block_on(resolver.resolve("b.test")));
        let found = control.block_on(async {
            while !worker.is_finished() {
                tokio::task::yield_now().await;
            }
            worker.join().unwrap()
        });
        assert_eq!(found.unwrap(), addr("10.0.0.2"));
    }

    /// A DNS server for one question: A records get 10.9.8.7, everything else nothing.
    async fn answer_one(socket: UdpSocket) {
        let mut query = [0; 512];
        let (length, from) = socket.recv_from(&mut query).await.unwrap();
        let name_end = 12 + query[12..length].iter().position(|b| *b == 0).unwrap() + 1;
        let mut answer = query[..name_end + 4].to_vec();
        answer[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
        answer.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 10, 9, 8, 7]);
        socket.send_to(&answer, from).await.unwrap();
    }

    #[tokio::test]
    async fn asks_the_server_it_is_told_to() {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let servers = vec![socket.local_addr().unwrap()];
        let server = tokio::spawn(answer_one(socket));
        let config = Config { servers, search: false, ..Config::default() };
        let resolver = Resolver::new(&config, Handle::current());
        assert_eq!(resolver.resolve("node.example").await.unwrap(), addr("10.9.8.7"));
        server.await.unwrap();
        assert!(resolver.known("node.example").is_some());
    }

    #[tokio::test]
    async fn knows_the_hosts_file() {
        let config = Config { servers: vec!["127.0.0.1:9".parse().unwrap()], ..Config::default() };
        let found = Resolver::new(&config, Handle::current()).resolve("localhost").await.unwrap();
        assert!(found[0].is_loopback());
    }
}
