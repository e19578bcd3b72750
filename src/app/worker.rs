//! One data thread: its runtime, plugins, proxy and connections, from its start to its drain.

use std::{
    cell::RefCell,
    net::{SocketAddr, UdpSocket},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    pin::Pin,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use tokio::{
    runtime::{Builder, LocalOptions},
    sync::{mpsc, watch},
    task::{JoinSet, spawn_local},
    time::{interval, sleep, timeout},
};

use super::{
    asking::Questions,
    ending::{Ending, Endings},
    listeners::{Bound, Http, Tcp, Unix},
    settings,
};
use crate::{
    admin,
    conf::Config,
    control::{PluginCall, PluginReply},
    dns::Resolver,
    error::{Error, Kind, Result},
    exchange::{Connection, Exchange, RequestBody, host::Doing},
    health::{Health, Watched},
    model::Upstream,
    net::{
        Drain, ExchangePool, Handler, Server,
        listener::{self, HandshakeScripts},
    },
    plugin::{Errand, Runner, Setup},
    proxy::{Proxy, handshake},
    store::Published,
    stream::{self, Streams},
    tcp, tls,
};

/// Address space for deep Lua and regex recursion; pages that are not touched cost nothing.
const STACK: usize = 8 << 20;
/// Between two looks at idle upstream connections.
const SWEEP_EVERY: Duration = Duration::from_secs(5);
/// Timers of plugins that run once more at the end (the last batch of a logger) get this long.
const TIMERS_PATIENCE: Duration = Duration::from_secs(5);
/// The same when the gateway is told to end at once, and what scripts of the end get at least.
const HASTE: Duration = Duration::from_millis(300);
/// Schedules' calls at once: requests of the worker come first, and a hundred functions at the same minute wait for
/// each other.
const ERRANDS_AT_ONCE: usize = 32;
/// Between two looks at plugins whose `init` waits.
const LOADING_PAUSE: Duration = Duration::from_millis(5);
/// Between two looks at those timers.
const TIMERS_PAUSE: Duration = Duration::from_millis(5);

/// What workers are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    Serve,
    /// End when the requests in flight are answered.
    Drain,
    /// End at once.
    Stop,
}

/// What a worker tells.
pub enum Report {
    /// The worker of that number accepts connections.
    Ready(usize),
    Ended(Result<()>),
}

/// What all workers are made from. A new one, after a reload, is for new requests.
#[derive(Clone)]
pub struct Blueprint {
    pub config: Arc<Config>,
    pub published: Arc<Published>,
    pub resolver: Arc<Resolver>,
    /// `None`: no upstream's nodes are checked.
    pub health: Option<Arc<Health>>,
    pub setup: Setup,
    pub endings: Endings,
    /// Counts the reloads.
    pub number: u64,
    /// True while the next one is made: the plugins of snapshots that come meanwhile are loaded with it.
    pub reloading: Arc<AtomicBool>,
}

/// The worker's end of the talk with the control thread. At most two reports per worker, so they need no bound.
pub struct Line {
    pub orders: watch::Receiver<Order>,
    /// Changes with each reload of the configuration file.
    pub blueprints: watch::Receiver<Blueprint>,
    pub reports: mpsc::UnboundedSender<Report>,
    /// The number of the last blueprint that the worker has taken over, or failed to.
    pub taken: watch::Sender<u64>,
    /// Changes when the VMs are to collect their garbage.
    pub collections: watch::Receiver<u64>,
    /// Changes with what conf/debug.yaml says.
    pub debug: watch::Receiver<u64>,
    /// Of what the VMs hold.
    pub questions: Questions,
    /// Functions to run that no client asks for.
    pub errands: mpsc::Receiver<Errand>,
}

/// Starts a worker on its thread. Its end is reported, whatever ends it.
pub fn spawn(worker: usize, blueprint: Blueprint, sockets: Bound, line: Line) -> Result<()> {
    let reports = line.reports.clone();
    let body = move || {
        if blueprint.config.cpu_affinity {
            pin(worker);
        }
        let run = AssertUnwindSafe(|| run(worker, blueprint, sockets, line));
        let ended = catch_unwind(run).unwrap_or_else(|_| {
            Err(Error::internal(Kind::Other)
                .context(format!("worker {worker} panicked; its last words are in error.log")))
        });
        // Nobody listens only when the process ends anyway.
        let _ = reports.send(Report::Ended(ended));
    };
    thread::Builder::new().name(format!("worker-{worker}")).stack_size(STACK).spawn(body)?;
    Ok(())
}

fn run(worker: usize, blueprint: Blueprint, sockets: Bound, line: Line) -> Result<()> {
    // Local by itself, so that no `LocalSet` keeps a second list of tasks inside the runtime's.
    let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default())?;
    // A task of its own: what `block_on` gets itself is polled after every event of every connection.
    let ended = runtime.block_on(async {
        spawn_local(tcp::turns());
        match spawn_local(serve(worker, blueprint, sockets, line)).await {
            Ok(ended) => ended,
            Err(e) => match e.try_into_panic() {
                Ok(panic) => resume_unwind(panic),
                Err(e) => Err(Error::internal(Kind::Other).cause(e).context(format!("worker {worker}"))),
            },
        }
    });
    // The last turn has no end of its own.
    tcp::flush();
    ended
}

async fn serve(worker: usize, blueprint: Blueprint, sockets: Bound, line: Line) -> Result<()> {
    let Line { mut orders, blueprints, reports, taken, collections, debug, questions, errands } = line;
    let config = blueprint.config.clone();
    let ending = Rc::new(blueprint.endings.of_worker(&config));
    let serving = tokio::select! {
        made = new_proxy(worker, &blueprint, None, ending.clone()) => Serving::new(made?, &blueprint),
        // Plugins' init may wait, and nobody is served yet.
        () = ordered(&mut orders, |order| order != Order::Serve) => return Ok(()),
    };
    let counter = ending.clone();
    let drain = Drain::telling(move |opened| match opened {
        true => counter.recorder.connections().opened(),
        false => counter.recorder.connections().closed(),
    });
    let handler = Counted { serving: serving.clone(), ending: ending.clone() };
    let mut listeners = JoinSet::new();
    listen(&blueprint, &handler, &drain, (sockets.http, sockets.unix), &mut listeners);
    if blueprint.config.stream.enabled {
        stream(&blueprint, &drain, serving.clone(), (sockets.tcp, sockets.udp), &mut listeners)?;
    }
    let mut chores = chores(&serving, &ending, (collections, debug), questions);
    chores.spawn_local(follow(worker, serving.clone(), ending.clone(), (blueprints, taken)));
    chores.spawn_local(run_errands(serving.clone(), errands));
    let _ = reports.send(Report::Ready(worker));
    let ended = tokio::select! {
        () = ordered(&mut orders, |order| order != Order::Serve) => Ok(()),
        // A control plane has none.
        ended = listeners.join_next(), if !listeners.is_empty() => Err(too_early(worker, ended)),
    };
    if *orders.borrow() == Order::Stop {
        let runner = &serving.proxy().runner;
        close(runner, HASTE).await;
        end(runner, HASTE, &mut orders).await;
        ending.flush();
        return ended;
    }
    let until = Instant::now() + config.shutdown_timeout;
    drain.begin();
    while listeners.join_next().await.is_some() {}
    tokio::select! {
        () = drain.done() => close(&serving.proxy().runner, TIMERS_PATIENCE).await,
        () = sleep(config.shutdown_timeout) => {
            let (open, limit) = (drain.open(), config.shutdown_timeout);
            tracing::warn!("{open} connections are cut: worker_shutdown_timeout ({limit:?}) is over");
        }
        () = ordered(&mut orders, |order| order == Order::Stop) => {}
    }
    drop(chores);
    let runner = &serving.proxy().runner;
    close(runner, HASTE).await;
    end(runner, until.saturating_duration_since(Instant::now()).max(HASTE), &mut orders).await;
    ending.flush();
    ended
}

/// The proxy that requests which start now are for. One that a reload has replaced lives as long as its requests.
struct Serving {
    proxy: RefCell<Rc<Proxy>>,
    scripts: HandshakeScripts,
}

impl Serving {
    fn new(proxy: Proxy, blueprint: &Blueprint) -> Rc<Serving> {
        let serving = Serving { proxy: RefCell::new(Rc::new(proxy)), scripts: Rc::default() };
        serving.script(blueprint);
        Rc::new(serving)
    }

    fn proxy(&self) -> Rc<Proxy> {
        self.proxy.borrow().clone()
    }

    fn replace(&self, proxy: Proxy, blueprint: &Blueprint) -> Rc<Proxy> {
        let old = self.proxy.replace(Rc::new(proxy));
        self.script(blueprint);
        old
    }

    fn script(&self, blueprint: &Blueprint) {
        *self.scripts.borrow_mut() = handshake::scripts(&self.proxy(), &blueprint.config.locations.handshakes);
    }
}

impl stream::Registries for Serving {
    fn nodes(&self, upstream: Arc<Upstream>) -> Pin<Box<dyn Future<Output = Result<Arc<Upstream>>> + '_>> {
        let proxy = self.proxy();
        Box::pin(async move { proxy.runner.nodes_of(upstream).await })
    }
}

impl tls::Secrets for Serving {
    fn fetch<'a>(&'a self, reference: &'a str) -> Doing<'a, Result<Box<str>>> {
        let proxy = self.proxy();
        Box::pin(async move { proxy.fetch(reference).await })
    }
}

/// Has the worker keep up: a new proxy, with new VMs, for each new blueprint; a new VM at once for a snapshot with other plugins, whose
/// timers are due without a request, too.
async fn follow(
    worker: usize,
    serving: Rc<Serving>,
    ending: Rc<Ending>,
    (mut blueprints, taken): (watch::Receiver<Blueprint>, watch::Sender<u64>),
) {
    let (published, reloading) = {
        let blueprint = blueprints.borrow();
        (blueprint.published.clone(), blueprint.reloading.clone())
    };
    let mut news = published.subscribe();
    let mut behind = true;
    loop {
        let changed = tokio::select! {
            biased;
            changed = blueprints.changed() => changed.map(|()| true),
            changed = news.changed() => changed.map(|()| false),
            () = sleep(LOADING_PAUSE), if behind => Ok(false),
        };
        match changed {
            Ok(true) => {
                let blueprint = blueprints.borrow_and_update().clone();
                take_over(worker, &serving, &ending, &blueprint).await;
                taken.send_replace(blueprint.number);
            }
            Ok(false) => {}
            Err(_) => return,
        }
        // What a blueprint brings is loaded once, with it: it is there before the flag falls.
        let is_coming = reloading.load(Ordering::Acquire) || blueprints.has_changed().unwrap_or(false);
        behind = is_coming || !serving.proxy().runner.has_plugins_of(&published.load());
    }
}

/// Where that fails, what was there before goes on.
async fn take_over(worker: usize, serving: &Serving, ending: &Rc<Ending>, blueprint: &Blueprint) {
    // In APISIX's words, which people look for.
    tracing::info!("start to hot reload plugins");
    let before = serving.proxy();
    match new_proxy(worker, blueprint, Some(&before.runner), ending.clone()).await {
        // Its requests go on without its timers, as those of an nginx worker that is shutting down. What these still do, the
        // worker's end waits for.
        Ok(proxy) => {
            let loads = proxy.runner.loads();
            serving.replace(proxy, blueprint).runner.retire();
            // The first load counts, too.
            tracing::info!("load plugin times: {loads}");
        }
        Err(e) => tracing::error!("{e}; what was loaded before goes on"),
    }
}

/// `before`: the runner whose place it is to take.
async fn new_proxy(worker: usize, blueprint: &Blueprint, before: Option<&Runner>, ending: Rc<Ending>) -> Result<Proxy> {
    let (snapshot, setup) = (blueprint.published.load(), blueprint.setup.clone());
    let runner = match before {
        None => Runner::new(setup, worker, &snapshot).await,
        Some(before) => before.anew(setup, &snapshot).await,
    };
    let runner = runner.map_err(|e| e.context(format!("worker {worker}: load the plugins")))?;
    Ok(Proxy::new(
        settings::proxy(&blueprint.config),
        blueprint.published.clone(),
        runner,
        &blueprint.config.locations,
        blueprint.resolver.clone(),
        Watched::new(blueprint.health.clone()),
        Box::new(ending),
    ))
}

/// One task per socket. Two servers at most: with HTTP/2 on plain connections and without.
fn listen(
    blueprint: &Blueprint,
    handler: &Counted,
    drain: &Drain,
    (tcp, unix): (Vec<Http>, Vec<Unix>),
    listeners: &mut JoinSet<Result<()>>,
) {
    let server = |http2| {
        Rc::new(Server {
            handler: handler.clone(),
            settings: settings::net(&blueprint.config, http2),
            pool: ExchangePool::new(),
            drain: drain.clone(),
        })
    };
    let (with_http2, without) = (server(true), server(false));
    let scripts = &handler.serving.scripts;
    let published = &blueprint.published;
    let tls_of = |server| listener::Tls {
        server,
        published: published.clone(),
        scripts: scripts.clone(),
        secrets: handler.serving.clone(),
    };
    let server = |http2| if http2 { with_http2.clone() } else { without.clone() };
    for Http { socket, proxy_protocol, http2, tls } in tcp {
        let listener = listener::Listener { socket, proxy_protocol, tls: tls.map(tls_of) };
        listeners.spawn_local(listener::run(server(http2), listener));
    }
    for Unix { socket, proxy_protocol, http2, tls } in unix {
        listeners.spawn_local(listener::run_unix(server(http2), socket, proxy_protocol, tls.map(tls_of)));
    }
}

/// What is proxied as it is.
fn stream(
    blueprint: &Blueprint,
    drain: &Drain,
    serving: Rc<Serving>,
    (tcp, udp): (Vec<Tcp>, Vec<UdpSocket>),
    listeners: &mut JoinSet<Result<()>>,
) -> Result<()> {
    let Blueprint { config, published, resolver, health, endings, .. } = blueprint;
    let log = endings.of_streams(config);
    let mut settings = settings::stream(config);
    settings.udp_listeners = udp.iter().filter_map(|socket| socket.local_addr().ok()).collect();
    let streams = Rc::new(Streams::new(
        settings,
        (published.clone(), resolver.clone(), Watched::new(health.clone())),
        drain.clone(),
        (log, serving.clone()),
        endings.metrics.clone(),
    )?);
    for Tcp { socket, proxy_protocol, proxy_protocol_to_upstream: to_upstream, tls } in tcp {
        let tls = tls.map(|server| listener::Tls {
            server,
            published: published.clone(),
            scripts: Rc::default(),
            secrets: serving.clone(),
        });
        let listener = stream::tcp::Listener { socket, proxy_protocol, tls, to_upstream };
        listeners.spawn_local(stream::tcp::run(streams.clone(), listener));
    }
    for socket in udp {
        listeners.spawn_local(stream::udp::run(streams.clone(), socket));
    }
    Ok(())
}

/// Waits until the order is one that `meant` says yes to. An absent control thread means stop.
async fn ordered(orders: &mut watch::Receiver<Order>, meant: impl Fn(Order) -> bool) {
    let _ = orders.wait_for(|order| meant(*order)).await;
}

/// A listener ends before anybody told it to: an error, or a panic.
fn too_early(worker: usize, ended: Option<Result<Result<()>, tokio::task::JoinError>>) -> Error {
    match ended {
        Some(Ok(Err(e))) => e.context(format!("worker {worker}")),
        Some(Err(e)) => Error::internal(Kind::Other).cause(e).context(format!("worker {worker}: a listener ended")),
        _ => Error::internal(Kind::Other).context(format!("worker {worker}: nothing to listen on")),
    }
}

/// The proxy, with its requests counted.
#[derive(Clone)]
struct Counted {
    serving: Rc<Serving>,
    ending: Rc<Ending>,
}

impl Handler for Counted {
    fn expect<'a>(&self, path: impl FnOnce() -> &'a [u8]) {
        self.serving.proxy.borrow().expect(path);
    }

    async fn handle(&self, x: Box<Exchange>) -> Box<Exchange> {
        let _running = Running::new(&self.ending);
        self.serving.proxy().handle(x).await
    }

    async fn reject(&self, x: Box<Exchange>, why: &'static str) -> Box<Exchange> {
        let _running = Running::new(&self.ending);
        self.serving.proxy().reject(x, why).await
    }
}

/// A request that is counted as running; an HTTP/2 stream that is reset drops it half way.
struct Running<'a>(&'a Ending);

impl<'a> Running<'a> {
    fn new(ending: &'a Ending) -> Self {
        ending.recorder.connections().request_started();
        Running(ending)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.recorder.connections().request_ended();
    }
}

/// What a worker does beside requests, until the result is dropped.
fn chores(
    serving: &Rc<Serving>,
    ending: &Rc<Ending>,
    (collections, debug): (watch::Receiver<u64>, watch::Receiver<u64>),
    questions: Questions,
) -> JoinSet<()> {
    let mut chores = JoinSet::new();
    chores.spawn_local(sweep(serving.clone()));
    chores.spawn_local(collect(serving.clone(), collections));
    chores.spawn_local(follow_debug(serving.clone(), debug));
    let asked = serving.clone();
    let (endpoints, followers) = (serving.clone(), serving.clone());
    chores.spawn_local(questions.answer(
        move || asked.proxy().runner.states(),
        move |revision| followers.proxy().serves(revision),
        move |call| endpoint(endpoints.proxy(), call),
    ));
    let ending = ending.clone();
    chores.spawn_local(async move { ending.flush_in_time().await });
    chores
}

/// Runs what it is sent, so much at once. What still runs ends with the worker.
async fn run_errands(serving: Rc<Serving>, mut errands: mpsc::Receiver<Errand>) {
    let mut running = JoinSet::new();
    while let Some(errand) = errands.recv().await {
        while running.try_join_next().is_some() {}
        if running.len() >= ERRANDS_AT_ONCE {
            running.join_next().await;
        }
        let proxy = serving.proxy();
        running.spawn_local(async move { proxy.runner.errand(errand, proxy.snapshot()).await });
    }
}

/// Answers by a plugin's own endpoint of the control API.
async fn endpoint(proxy: Rc<Proxy>, call: PluginCall) -> Option<PluginReply> {
    let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
    let mut x = Exchange::new(Rc::new(Connection::new(0, nowhere, nowhere)), proxy.snapshot());
    x.begin();
    x.request.method.extend_from_slice(call.method.as_bytes());
    x.request.path.extend_from_slice(admin::http::decode_path(&call.path).as_bytes());
    x.request.args.extend_from_slice(call.args.as_bytes());
    x.request.target.extend_from_slice(call.path.as_bytes());
    if !call.args.is_empty() {
        x.request.target.push(b'?');
        x.request.target.extend_from_slice(call.args.as_bytes());
    }
    for (name, value) in &call.headers {
        x.request.headers.append(name, value);
    }
    if !call.body.is_empty() {
        x.body = RequestBody::Memory(call.body);
    }
    if !proxy.runner.control(&mut x).await {
        return None;
    }
    let content_type = x.response.headers.get("content-type").unwrap_or(b"text/plain");
    let content_type = String::from_utf8_lossy(content_type).into_owned();
    Some(PluginReply { status: x.response.status, content_type, body: std::mem::take(&mut x.printed) })
}

/// Collects the garbage of scripts whenever it is asked for.
async fn collect(serving: Rc<Serving>, mut collections: watch::Receiver<u64>) {
    while collections.changed().await.is_ok() {
        serving.proxy().runner.collect();
    }
}

/// Keeps the hooks of the debug mode where conf/debug.yaml has them.
async fn follow_debug(serving: Rc<Serving>, mut changes: watch::Receiver<u64>) {
    while changes.changed().await.is_ok() {
        serving.proxy().runner.follow_debug();
    }
}

/// Closes upstream connections that were idle for too long or that their node has closed.
async fn sweep(serving: Rc<Serving>) {
    let mut tick = interval(SWEEP_EVERY);
    loop {
        tick.tick().await;
        serving.proxy().pool.sweep(Instant::now());
        serving.proxy().http2.sweep(Instant::now());
    }
}

/// Ends the timers of plugins: each runs once more, told that it is early.
async fn close(runner: &Runner, patience: Duration) {
    runner.close();
    let over = async {
        while runner.timers() > 0 {
            sleep(TIMERS_PAUSE).await;
        }
    };
    if timeout(patience, over).await.is_err() {
        tracing::warn!("{} timers of plugins are cut off", runner.timers());
    }
}

/// Runs `exit_worker_by_lua` and plugins' `destroy`: with a drain for as long as that may still take.
async fn end(runner: &Runner, patience: Duration, orders: &mut watch::Receiver<Order>) {
    let hurried = async {
        ordered(orders, |order| order == Order::Stop).await;
        sleep(HASTE).await;
    };
    tokio::select! {
        () = runner.end() => return,
        () = sleep(patience) => {}
        () = hurried => {}
    }
    tracing::error!("exit_worker_by_lua or a plugin's destroy still waits: it is cut off");
}

/// One worker per processor, as far as they go.
fn pin(worker: usize) {
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    // SAFETY: the set is plain memory, zero is its empty value, the index is bounded, and pid 0 is this thread.
    let result = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET((worker % cpus) % libc::CPU_SETSIZE as usize, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set)
    };
    if result != 0 {
        let e = std::io::Error::last_os_error();
        tracing::warn!("nginx_config.enable_cpu_affinity: worker {worker} is not bound to a processor: {e}");
    }
}
