//! What single calls of the Lua runtime cost within the process: `cargo bench`. `benches/lua_vs_nginx --pieces` measures the same
//! calls over HTTP, beside nginx with lua-nginx-module.
//!
//! Each call is repeated in a Lua loop on one VM, as JIT and interpreter find it when it is hot.

use std::{
    borrow::Cow,
    cell::RefCell,
    net::{IpAddr, SocketAddr},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use criterion::{Criterion, criterion_group, criterion_main};
use mlua::ffi;
use moongate::{
    exchange::{Connection, Exchange, Matched, Phase},
    lua::{
        Stack, Vm, VmConfig,
        sched::{self, Outcome},
    },
    model::{Keyring, Kind, Object, ParseContext, Parsed, PluginSource, Route, next_uid, parse},
    plugin::{Flow, Runner, Setup},
    router::{Facts, Router},
    store::Snapshot,
};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    runtime::{Builder, Runtime},
    task::{LocalSet, spawn_local},
};

/// Name, what comes before the loop, and the call.
const CALLS: &[(&str, &str, &str)] = &[
    ("ngx.var, get", "local var = ngx.var", "local v = var.request_method"),
    ("ngx.ctx, set and get", "", "ngx.ctx.a = i local v = ngx.ctx.a"),
    ("ngx.req.get_headers", "local get = ngx.req.get_headers", "local v = get()['X-User']"),
    ("ngx.req.set_header", "local set = ngx.req.set_header", "set('X-A', 'b')"),
    ("ngx.header, set", "local header = ngx.header", "header['X-A'] = 'b'"),
    ("ngx.header, get", "local header = ngx.header header['X-A'] = 'b'", "local v = header['X-A']"),
    (
        "ngx.re.match, jo",
        "local match, uri = ngx.re.match, ngx.var.uri",
        "local v = match(uri, [[^/(\\w+)]], 'jo') assert(v[1])",
    ),
    (
        "shared dict, get",
        "local counts = ngx.shared.counts counts:set('a', 'b')",
        "local v = counts:get('a') assert(v)",
    ),
    ("shared dict, incr", "local counts = ngx.shared.counts", "counts:incr('n', 1, 0)"),
    (
        "cjson of 2 KB, both ways",
        "local cjson = require('cjson') local t = {}
         for i = 1, 40 do t[i] = { id = i, name = 'name of ' .. i, tags = { 'a', 'b' } } end
         local text = cjson.encode(t)",
        "text = cjson.encode(cjson.decode(text))",
    ),
    (
        "cosocket, there and back",
        "local sock = ngx.socket.tcp() assert(sock:connect('127.0.0.1', PORT))",
        "assert(sock:send('ping')) assert(sock:receive(4) == 'ping')",
    ),
];

/// One of five in a chain: reads a variable, writes a header.
const PLUGIN: &str = r#"
    local core = require("apisix.core")
    local _M = { version = 1, priority = %d, name = "%s", schema = { type = "object" } }
    function _M.check_schema() return true end
    function _M.rewrite(conf, ctx) core.request.set_header(ctx, "X-Stage", ctx.var.uri) end
    return _M
"#;

fn runtime() -> (Runtime, LocalSet) {
    (Builder::new_current_thread().enable_all().build().expect("a runtime"), LocalSet::new())
}

fn connection() -> Rc<Connection> {
    let addr = SocketAddr::from(([127, 0, 0, 1], 1));
    Rc::new(Connection::new(1, addr, addr))
}

fn fill(x: &mut Exchange) {
    x.request.method.extend_from_slice(b"GET");
    x.request.target.extend_from_slice(b"/t/a?x=1");
    x.request.path.extend_from_slice(b"/t/a");
    x.request.host.extend_from_slice(b"localhost");
    for (name, value) in [("Host", "localhost"), ("X-User", "4711"), ("Accept", "*/*"), ("Cookie", "a=1; session=42")] {
        x.request.headers.append(name, value);
    }
}

/// Answers everything with itself; its port.
async fn echo() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let port = listener.local_addr().expect("an address").port();
    spawn_local(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let _ = socket.set_nodelay(true);
            spawn_local(async move {
                let mut bytes = [0; 64];
                while let Ok(n @ 1..) = socket.read(&mut bytes).await {
                    if socket.write_all(&bytes[..n]).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    port
}

/// Makes the call so often, and says how long that took.
async fn run(vm: &Rc<Vm>, before: &str, call: &str, port: u16, times: u64) -> Duration {
    let source = format!("local PORT, n = {port}, {times} {before}\nfor i = 1, n do {call} end");
    let f: mlua::Function = vm.lua.load(source).set_name("@bench.lua").into_function().expect("compiles");
    let f = vm.keep(f).expect("kept");
    let mut x = sched::background(vm);
    fill(&mut x);
    x.phase = Phase::Content;
    let push = |s: &Stack| {
        s.get_index(ffi::LUA_REGISTRYINDEX, f as usize);
        0
    };
    let begun = Instant::now();
    let outcome = sched::call(vm, &mut x, push, |_| ()).await;
    let took = begun.elapsed();
    sched::end_background(vm, &mut x);
    vm.release(f);
    match outcome {
        Outcome::Done(()) => took,
        Outcome::Exit(status) => panic!("{call} exits with {status}"),
        Outcome::Failed(why) => panic!("{call}: {why}"),
    }
}

fn calls(c: &mut Criterion) {
    moongate::shdict::store().declare("counts", 1 << 20);
    let (runtime, local) = runtime();
    // A loop of a second is no script that does not end.
    let config = VmConfig { config: Arc::new(json!({"lua": {"limits": {"cpu_ms": 0}}})), ..VmConfig::default() };
    let vm = Vm::new(config).expect("a VM");
    let port = local.block_on(&runtime, echo());
    for (name, before, call) in CALLS {
        c.bench_function(name, |b| {
            b.iter_custom(|times| local.block_on(&runtime, run(&vm, before, call, port, times)));
        });
    }
}

/// The request that finds the route.
struct Get;

impl Facts for Get {
    fn host(&self) -> &[u8] {
        b"localhost"
    }
    fn path(&self) -> &[u8] {
        b"/t/a"
    }
    fn method(&self) -> &[u8] {
        b"GET"
    }
    fn remote(&self) -> IpAddr {
        [127, 0, 0, 1].into()
    }
    fn var(&self, _: &str) -> Option<Cow<'_, [u8]>> {
        None
    }
    fn filter(&self, _: &Arc<Object<Route>>) -> bool {
        true
    }
}

fn object<T>(id: &str, value: T) -> Arc<Object<T>> {
    let (id, json) = (id.into(), "{}".into());
    Arc::new(Object { id, uid: next_uid(), create_revision: 1, mod_revision: 1, json, value })
}

/// The rewrite phase of a route with so many plugins.
fn chain(c: &mut Criterion, title: &str, plugins: usize) {
    let names: Vec<String> = (1..=plugins).map(|i| format!("p{i}")).collect();
    let mut snapshot = Snapshot { version: 1, plugins_generation: 1, ..Snapshot::default() };
    for (i, name) in names.iter().enumerate() {
        let source = PLUGIN.replace("%d", &i.to_string()).replace("%s", name);
        snapshot.plugin_sources.insert(name.as_str().into(), object(name, PluginSource { source: source.into() }));
    }
    let confs: serde_json::Map<_, _> = names.iter().map(|name| (name.clone(), json!({}))).collect();
    let route =
        json!({"uri": "/t/*", "plugins": confs, "upstream": {"type": "roundrobin", "nodes": {"127.0.0.1:80": 1}}});
    let parsed = parse(Kind::Route, "1", &route.to_string(), &ParseContext::new(&Keyring::default()));
    let Ok(Parsed::Route(route)) = parsed else { panic!("a route") };
    let mut router = Router::default();
    router.insert(object("1", route), &[]);
    let snapshot = Arc::new(snapshot);
    let (runtime, local) = runtime();
    let setup = Setup::new(Default::default(), json!({"plugins": []}).into(), Default::default());
    let runner = local.block_on(&runtime, Runner::new(setup, 0, &snapshot)).expect("a runner");
    let kept = RefCell::new(Some(Exchange::new(connection(), snapshot)));
    let request = async |times: u64| {
        let mut x = kept.take().expect("one runs at a time");
        let begun = Instant::now();
        for _ in 0..times {
            x.begin();
            fill(&mut x);
            x.matched = router.find(&Get).map(|found| Matched { found, service: None });
            runner.begin(&mut x);
            assert_eq!(runner.rewrite_access(&mut x).await, Flow::Next);
            assert!(x.request.headers.contains("x-stage"));
            runner.log(&mut x).await;
            x.reset();
        }
        let took = begun.elapsed();
        kept.replace(Some(x));
        took
    };
    c.bench_function(title, |b| b.iter_custom(|times| local.block_on(&runtime, request(times))));
}

fn phases(c: &mut Criterion) {
    chain(c, "a phase call: one plugin", 1);
    chain(c, "a chain of five plugins", 5);
}

criterion_group!(benches, phases, calls);
criterion_main!(benches);
