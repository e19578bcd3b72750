//! The control thread: the store, the two APIs, the metrics page and the signals, so that none of them stands in a
//! request's way.

use std::{fs, io, net::SocketAddr, path::PathBuf, rc::Rc, sync::Arc, time::Duration};

use futures_util::future::join_all;
use tokio::{
    net::TcpListener,
    runtime::Handle,
    signal::unix::{Signal, SignalKind, signal},
    sync::{mpsc, oneshot, watch},
    task::{JoinSet, spawn_local},
    time::{sleep, timeout},
};

use super::{
    asking::Asking,
    banner::{self, Listening},
    debug::DebugFile,
    ending::Endings,
    functions::Keeper,
    gauges,
    listeners::{self, Sockets},
    plugins::Plugins,
    reload::Reload,
    settings,
    worker::{self, Blueprint, Line, Order, Report},
};
use crate::{
    admin,
    conf::{self, Config, admin_key},
    control::{
        self,
        status::{Readiness, Status},
    },
    dns::Resolver,
    error::{Error, Kind, Result},
    health::Health,
    observe::{log, metrics},
    plugin::{Errand, Setup, Watching},
    store::{self, Published, SourceState, Started, Store},
};

/// Workers that were told to end at once get this long: one may be inside a script.
const STOP_PATIENCE: Duration = Duration::from_secs(2);
/// Schedules' calls and dry runs that wait for the worker; one more is refused.
const ERRANDS: usize = 256;
/// What a drain may take beside `worker_shutdown_timeout`: timers of plugins, and the way there.
const DRAIN_MARGIN: Duration = Duration::from_secs(10);

pub async fn run(mut config: Config) -> Result<()> {
    let mut signals = Signals::new()?;
    let sockets = listeners::bind(&config)?;
    let mut ports = Ports::bind(&config).await?;
    let at = ports.listening(&sockets)?;
    let written = config.json.clone();
    conf::note_places(&mut config, &written, at.admin, at.control);
    let readiness = Readiness::new(config.workers);
    let status = Status::new(readiness.clone());
    let (gone, ended) = watch::channel(false);
    if let Some(listener) = ports.status.take() {
        spawn_local(control::status::serve(listener, status.clone(), over(ended)));
    }
    let watching = Watching::new(config.trace.clone());
    let debug = DebugFile::new(&config.prefix, watching.clone());
    let debug_changes = debug.changes();
    spawn_local(debug.follow());
    let setup = Setup::of(&config).watched(watching.clone());
    let plugins = Plugins::new(setup.clone(), config.file.clone())?;
    let mistakes = plugins.checker().registry_mistakes()?;
    if !mistakes.is_empty() {
        return Err(Error::config(Kind::Invalid).context(mistakes.join("\n")));
    }
    let store = store::open(&config)?;
    let started = tokio::select! {
        started = open(&config, &plugins, &store) => started?,
        // Nothing is served yet that could be drained.
        _ = signals.end() => return Ok(()),
    };
    plugins.tell_missing();
    let standalone = store.clone().standalone();
    let received = Box::new(move || standalone.as_ref().is_none_or(|store| store.is_loaded()));
    status.configured(started.published.clone(), started.source.clone(), received);
    let metrics = metrics::Metrics::new(metrics::Settings::from_attr(&config.json["plugin_attr"]["prometheus"]));
    metrics.install();
    gauges::add(&metrics, started.published.clone(), started.source.clone());
    let resolver = Arc::new(Resolver::new(&settings::dns(&config), Handle::current()));
    crate::lua::ngx::socket_tcp::set_resolver(resolver.clone());
    crate::lua::host::store::open_to_scripts(store.clone(), started.published.clone());
    let health =
        settings::checks_health(&config).then(|| Health::new(resolver.clone(), shown_prefix(&config, &started.source)));
    if let Some(health) = &health {
        gauges::add_health(&metrics, health.clone());
    }
    let blueprint = Blueprint {
        config: Arc::new(config.clone()),
        published: started.published.clone(),
        resolver,
        health: health.clone(),
        setup,
        endings: Endings::new(&config, metrics.clone())?,
        number: 0,
        reloading: Arc::default(),
    };
    let mut workers = Workers::start((blueprint, debug_changes), sockets, readiness)?;
    workers.ready().await?;
    let mut reload =
        Reload::new(&config, (at.admin, at.control), plugins.clone(), (started.handle.clone(), watching.clone()));
    let (finish, finished) = watch::channel(false);
    let (collect, asking) = (workers.collections.clone(), workers.asking.clone());
    let keeper = Keeper::new(store.clone(), started.published.clone(), workers.errands.take());
    let keeping = spawn_local(keeper.run());
    let probing = health.clone().map(|health| spawn_local(health.run(started.published.clone())));
    let (reloads, asked) = mpsc::channel(RELOADS);
    let apis = Apis {
        config: &config,
        plugins,
        store: store.clone(),
        started,
        metrics,
        finished,
        shared: (collect, asking),
        reloads,
        watching,
        health,
    };
    let mut serving = apis.serve(ports)?;
    announce(&config, &at, &*store)?;
    let ended = attend((&mut reload, asked), &mut signals, &mut workers).await;
    keeping.abort();
    if let Some(probing) = probing {
        probing.abort();
    }
    finish.send_replace(true);
    workers.end(&mut signals).await;
    let _ = timeout(STOP_PATIENCE, async { while serving.join_next().await.is_some() {} }).await;
    gone.send_replace(true);
    remove_listen_file(&config);
    ended
}

/// Waits for the first snapshot.
async fn open(config: &Config, plugins: &Plugins, store: &Arc<dyn Store>) -> Result<Started> {
    let keyring = Arc::new(admin::keyring(&config.json)?);
    let setup = store::Setup {
        parser: store::parser(keyring, Some(plugins.fields.clone())),
        checker: Some(Box::new(plugins.clone())),
        router: settings::router(config),
        shown_prefix: store::shown_prefix(&config.json),
        follows_plugin_list: follows_plugin_list(config, &**store),
        last_good: Some(store::last_good_path(config)),
    };
    store::start(store.clone(), setup).await
}

/// The list of plugins that a cluster shares is for nodes without an Admin API. One that has it loads what its own configuration
/// lists, which it shares: another node that starts with a shorter list must not switch plugins off here. What comes as one
/// document brings its list along.
fn follows_plugin_list(config: &Config, store: &dyn Store) -> bool {
    config.admin.is_none() || matches!(store.name(), "file" | "standalone")
}

/// Reloads of plugins that may wait for the one that is done.
const RELOADS: usize = 16;
/// How long whoever asks for a reload waits for the workers. One may be inside a script, and plugins' `init` may wait.
const RELOAD_PATIENCE: Duration = Duration::from_secs(10);

/// Whoever asked for a reload of plugins, and is told how it went.
type Asked = oneshot::Sender<Result<(), String>>;

/// Hears signals, workers and the control API until the gateway is to end.
async fn attend(
    (reload, mut asked): (&mut Reload, mpsc::Receiver<Asked>),
    signals: &mut Signals,
    workers: &mut Workers,
) -> Result<()> {
    loop {
        let heard = tokio::select! {
            heard = signals.next() => heard,
            Some(who) = asked.recv() => {
                let number = reload.reload(&workers.blueprints, true).await;
                workers.tell_when_taken(number, who);
                continue;
            }
            report = workers.reports.recv() => {
                let ended = match report {
                    Some(Report::Ended(ended)) => ended,
                    Some(Report::Ready(_)) => continue,
                    None => Ok(()),
                };
                workers.left = workers.left.saturating_sub(1);
                let e = ended.err().unwrap_or_else(|| Error::internal(Kind::Other).context("a worker has ended"));
                tracing::error!("{e}; the gateway ends when the requests in flight are answered");
                workers.tell(Order::Drain);
                return Err(e);
            }
        };
        match heard {
            Heard::Drain => {
                workers.tell(Order::Drain);
                return Ok(());
            }
            Heard::Stop => {
                workers.tell(Order::Stop);
                return Ok(());
            }
            Heard::Reload => drop(reload.reload(&workers.blueprints, false).await),
            Heard::Reopen => log::reopen_all(),
        }
    }
}

/// The data threads.
struct Workers {
    orders: watch::Sender<Order>,
    blueprints: watch::Sender<Blueprint>,
    /// Counts requests to collect garbage.
    collections: watch::Sender<u64>,
    asking: Asking,
    /// To the worker that runs functions which no client asks for.
    errands: Option<mpsc::Sender<Errand>>,
    /// What each has taken over of the blueprints.
    taken: Vec<watch::Receiver<u64>>,
    readiness: Arc<Readiness>,
    reports: mpsc::UnboundedReceiver<Report>,
    /// Those that have not ended.
    left: usize,
    drain_limit: Duration,
}

impl Workers {
    fn start(
        (blueprint, debug): (Blueprint, watch::Sender<u64>),
        sockets: Sockets,
        readiness: Arc<Readiness>,
    ) -> Result<Workers> {
        let (orders, _) = watch::channel(Order::Serve);
        let (sender, reports) = mpsc::unbounded_channel();
        let drain_limit = blueprint.config.shutdown_timeout + DRAIN_MARGIN;
        let (collections, _) = watch::channel(0);
        let asking = Asking::default();
        let (blueprints, _) = watch::channel(blueprint.clone());
        let (errands, taken) = (None, Vec::new());
        let mut workers = Workers {
            orders,
            blueprints,
            collections,
            asking,
            errands,
            taken,
            readiness,
            reports,
            left: 0,
            drain_limit,
        };
        for (id, sockets) in sockets.workers.into_iter().enumerate() {
            let (orders, collections) = (workers.orders.subscribe(), workers.collections.subscribe());
            let questions = workers.asking.worker();
            let blueprints = workers.blueprints.subscribe();
            let (errand, errands) = mpsc::channel(ERRANDS);
            // The first one runs them all: what must happen once happens in one place.
            workers.errands.get_or_insert(errand);
            let (sender_taken, taken) = watch::channel(0);
            workers.taken.push(taken);
            let (reports, debug) = (sender.clone(), debug.subscribe());
            let taken = sender_taken;
            let line = Line { orders, blueprints, collections, debug, reports, taken, questions, errands };
            worker::spawn(id, blueprint.clone(), sockets, line)?;
            workers.left += 1;
        }
        Ok(workers)
    }

    /// Waits until all accept connections.
    async fn ready(&mut self) -> Result<()> {
        for _ in 0..self.left {
            match self.reports.recv().await {
                Some(Report::Ready(worker)) => self.readiness.set(worker, true),
                Some(Report::Ended(Err(e))) => return Err(e),
                _ => return Err(Error::internal(Kind::Other).context("a worker ended while the gateway started")),
            }
        }
        Ok(())
    }

    /// Tells who asked for a reload that every worker has taken it over.
    fn tell_when_taken(&self, number: Result<u64, String>, who: Asked) {
        let number = match number {
            Ok(number) => number,
            Err(why) => {
                let _ = who.send(Err(why));
                return;
            }
        };
        let mut taken = self.taken.clone();
        spawn_local(async move {
            let all = join_all(taken.iter_mut().map(|one| one.wait_for(|taken| *taken >= number)));
            let told = match timeout(RELOAD_PATIENCE, all).await {
                Ok(_) => Ok(()),
                Err(_) => Err(format!("not every worker has loaded the plugins within {RELOAD_PATIENCE:?}")),
            };
            let _ = who.send(told);
        });
    }

    fn tell(&self, order: Order) {
        if order != Order::Serve {
            crate::lua::ngx::worker::set_exiting();
            self.readiness.end();
        }
        self.orders.send_replace(order);
    }

    /// Waits for all to end. A second signal to end makes the drain a stop.
    async fn end(&mut self, signals: &mut Signals) {
        if *self.orders.borrow() == Order::Drain {
            let limit = self.drain_limit;
            tokio::select! {
                () = self.ended() => return,
                _ = signals.end() => {}
                () = sleep(limit) => tracing::error!("{} workers do not end", self.left),
            }
            self.tell(Order::Stop);
        }
        if timeout(STOP_PATIENCE, self.ended()).await.is_err() {
            tracing::error!("{} workers are cut off", self.left);
        }
    }

    async fn ended(&mut self) {
        while self.left > 0 {
            match self.reports.recv().await {
                Some(Report::Ready(_)) => {}
                Some(Report::Ended(ended)) => {
                    self.left -= 1;
                    if let Err(e) = ended {
                        tracing::error!("{e}");
                    }
                }
                None => return,
            }
        }
    }
}

/// What a signal asks for.
enum Heard {
    Drain,
    Stop,
    Reload,
    Reopen,
}

struct Signals {
    interrupt: Signal,
    quit: Signal,
    terminate: Signal,
    hang_up: Signal,
    user1: Signal,
}

impl Signals {
    fn new() -> Result<Signals> {
        Ok(Signals {
            interrupt: signal(SignalKind::interrupt())?,
            quit: signal(SignalKind::quit())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
            user1: signal(SignalKind::user_defined1())?,
        })
    }

    async fn next(&mut self) -> Heard {
        tokio::select! {
            _ = self.interrupt.recv() => Heard::Drain,
            _ = self.quit.recv() => Heard::Drain,
            _ = self.terminate.recv() => Heard::Stop,
            _ = self.hang_up.recv() => Heard::Reload,
            _ = self.user1.recv() => Heard::Reopen,
        }
    }

    /// The next one that asks for an end.
    async fn end(&mut self) {
        loop {
            match self.next().await {
                Heard::Drain | Heard::Stop => return,
                Heard::Reopen => log::reopen_all(),
                Heard::Reload => {}
            }
        }
    }
}

/// The control thread's own sockets.
struct Ports {
    admin: Option<TcpListener>,
    control: Option<TcpListener>,
    status: Option<TcpListener>,
    prometheus: Option<TcpListener>,
}

impl Ports {
    async fn bind(config: &Config) -> Result<Ports> {
        let admin = config.admin.as_ref().map(|admin| admin.addr);
        Ok(Ports {
            admin: bind("deployment.admin.admin_listen", admin).await?,
            control: bind("apisix.control", config.control).await?,
            status: bind("apisix.status", config.status).await?,
            prometheus: bind("plugin_attr.prometheus.export_addr", config.prometheus.addr).await?,
        })
    }

    fn listening(&self, sockets: &Sockets) -> Result<Listening> {
        let address = |listener: &Option<TcpListener>| -> io::Result<Option<SocketAddr>> {
            listener.as_ref().map(TcpListener::local_addr).transpose()
        };
        Ok(Listening {
            proxy: sockets.plain.clone(),
            proxy_tls: sockets.tls.clone(),
            tcp: sockets.tcp.clone(),
            udp: sockets.udp.clone(),
            admin: address(&self.admin)?,
            control: address(&self.control)?,
            status: address(&self.status)?,
            prometheus: address(&self.prometheus)?,
        })
    }
}

async fn bind(key: &str, addr: Option<SocketAddr>) -> Result<Option<TcpListener>> {
    let Some(addr) = addr else { return Ok(None) };
    let bound = TcpListener::bind(addr).await;
    bound.map(Some).map_err(|e| Error::config(Kind::Io).cause(e).context(format!("{key}: listen on {addr}")))
}

/// What the APIs and the metrics page answer from.
struct Apis<'a> {
    config: &'a Config,
    plugins: Plugins,
    store: Arc<dyn Store>,
    started: Started,
    metrics: Arc<metrics::Metrics>,
    /// True: accept no more.
    finished: watch::Receiver<bool>,
    shared: (watch::Sender<u64>, Asking),
    reloads: mpsc::Sender<Asked>,
    watching: Arc<Watching>,
    health: Option<Arc<Health>>,
}

impl Apis<'_> {
    fn admin_settings(&self) -> Result<admin::Settings> {
        let settings = admin::Settings::from_config(&self.config.json, &settings::admin_server(self.config))?;
        Ok(admin::Settings { stream: self.config.stream.enabled, ..settings })
    }

    fn serve(self, ports: Ports) -> Result<JoinSet<()>> {
        let (collections, asking) = self.shared.clone();
        let workers = asking.clone();
        let mut serving = JoinSet::new();
        let plugins: Rc<dyn admin::PluginHost> = Rc::new(self.plugins.clone());
        if let Some(listener) = ports.admin {
            let state = Rc::new(admin::State {
                settings: self.admin_settings()?,
                store: self.store.clone(),
                published: self.started.published.clone(),
                plugins: plugins.clone(),
                fields: Some(self.plugins.fields.clone()),
                pipeline: Some(self.started.handle.clone()),
                documents: Rc::default(),
                contest: Rc::default(),
                workers: Some(Rc::new(move |revision| Box::pin(workers.clone().serving(revision)))),
            });
            let tls =
                self.config.admin.as_ref().and_then(|admin| admin.tls.as_ref()).map(admin::Tls::open).transpose()?;
            serving.spawn_local(admin::serve(listener, tls, state, over(self.finished.clone())));
        }
        if let Some(listener) = ports.control {
            let (endpoints, watching) = (asking.clone(), self.watching.clone());
            let state = Rc::new(control::State {
                prefix: shown_prefix(self.config, &self.started.source),
                published: self.started.published.clone(),
                source: self.started.source.clone(),
                plugins,
                collect: Some(Box::new(move || collections.send_modify(|n| *n += 1))),
                health: self.health.map(|health| -> Box<dyn Fn() -> Vec<_>> { Box::new(move || health.list()) }),
                lua: Some(Box::new(move || Box::pin(asking.clone().ask()))),
                reload: Some(Box::new(move || Box::pin(reload(self.reloads.clone())))),
                plugin_apis: Some(Box::new(move |call| Box::pin(endpoints.clone().endpoint(call)))),
                trace: Some(Box::new(move |id| watching.trace(id))),
            });
            serving.spawn_local(control::serve(listener, state, over(self.finished.clone())));
        }
        if let Some(listener) = ports.prometheus {
            let page = metrics::serve(listener, self.metrics.clone(), self.config.prometheus.uri.as_str().into());
            let finished = over(self.finished.clone());
            serving.spawn_local(async move {
                tokio::select! {
                    () = page => {}
                    () = finished => {}
                }
            });
        }
        spawn_local(follow_labels(self.started.published.clone(), self.metrics));
        Ok(serving)
    }
}

/// What stands before keys in the control API.
fn shown_prefix(config: &Config, source: &SourceState) -> String {
    match source.load().name {
        "etcd" | "embedded" => store::shown_prefix(&config.json),
        _ => String::new(),
    }
}

/// Has the plugins loaded anew.
async fn reload(reloads: mpsc::Sender<Asked>) -> Result<(), String> {
    let (who, told) = oneshot::channel();
    let ends = |_| "the gateway is ending".to_owned();
    reloads.send(who).await.map_err(|_| ends(()))?;
    told.await.map_err(|_| ends(()))?
}

async fn over(mut finished: watch::Receiver<bool>) {
    let _ = finished.wait_for(|finished| *finished).await;
}

/// Keeps `disabled_labels` as the metadata of the prometheus plugin has them.
async fn follow_labels(published: Arc<Published>, metrics: Arc<metrics::Metrics>) {
    let mut revisions = published.subscribe();
    loop {
        let snapshot = published.load();
        let text = snapshot.plugin_metadata.get("prometheus").map(|object| object.json.clone());
        let metadata = text.and_then(|text| serde_json::from_str(&text).ok());
        metrics.disable_labels(metadata.as_ref());
        if revisions.changed().await.is_err() {
            return;
        }
    }
}

/// Says where it listens, on the terminal and in logs/listen.json: from now on requests are served.
fn announce(config: &Config, at: &Listening, store: &dyn Store) -> Result<()> {
    let place = match (store.name(), store.identity()) {
        ("embedded", _) => format!("embedded ({})", config.prefix.join("data").display()),
        (_, Some(identity)) => identity,
        (name, None) => name.to_owned(),
    };
    // A terminal that is gone is no reason to end.
    let _ = banner::print_banner(&mut io::stdout(), config, at, &place, generated_key(config).as_ref());
    banner::write_listen_json(&config.prefix, at)
        .map_err(|e| Error::config(Kind::Io).cause(e).context(format!("write {}", banner::LISTEN_FILE)))
}

/// The file of the admin key, when the key in use is the one in it.
fn generated_key(config: &Config) -> Option<PathBuf> {
    let path = config.prefix.join(admin_key::FILE);
    let text = fs::read_to_string(&path).ok()?;
    let keys = &config.admin.as_ref()?.keys;
    keys.iter().any(|key| key.key == text.trim()).then_some(path)
}

fn remove_listen_file(config: &Config) {
    let _ = fs::remove_file(config.prefix.join(banner::LISTEN_FILE));
}
