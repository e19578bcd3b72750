//! The runner on requests without sockets: what runs, in which order, and what a failure comes to.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::*;
use crate::lua::api::{How, context_name};
use crate::router::{Facts, Router};
use crate::{
    exchange::{Connection, Matched},
    model::{Keyring, Kind, ParseContext, Parsed, parse},
};

/// `t` writes down what runs; its conf says in which phases it answers, fails or waits.
const T: &str = r#"
    local _M = { version = 0.1, priority = 100, name = "t", schema = { type = "object" } }
    function _M.check_schema(conf) conf.default = conf.default or "filled" return true end
    local function note(conf, ctx, phase)
        ctx.seen = (ctx.seen or "") .. phase .. (conf.mark or "") .. " "
        if conf.fail == phase then error("boom in " .. phase) end
        if conf.wait == phase then ngx.sleep(0.001) end
        if conf.answer == phase then return conf.code, conf.body end
    end
    for _, phase in ipairs({ "rewrite", "access", "before_proxy", "header_filter", "body_filter", "log" }) do
        _M[phase] = function(conf, ctx)
            if phase == "log" then trace = ctx.seen .. "log" .. (conf.mark or "") end
            return note(conf, ctx, phase)
        end
    end
    return _M"#;

fn plugin(name: &str, priority: i64, extra: &str, body: &str) -> String {
    format!(
        "local _M = {{ version = 1, priority = {priority}, name = '{name}', schema = {{}}, {extra} }}
        function _M.check_schema() return true end
        {body}
        return _M"
    )
}

fn object<T>(id: &str, json: &Value, value: T) -> Arc<Object<T>> {
    Arc::new(Object {
        id: id.into(),
        uid: model::next_uid(),
        create_revision: 1,
        mod_revision: 7,
        json: json.to_string().into(),
        value,
    })
}

fn parsed(kind: Kind, id: &str, json: &Value) -> Parsed {
    parse(kind, id, &json.to_string(), &ParseContext::new(&Keyring::default())).expect("valid")
}

struct Scene {
    snapshot: Snapshot,
    route: Option<Arc<Object<model::Route>>>,
    service: Option<Arc<Object<model::Service>>>,
}

impl Scene {
    fn new() -> Scene {
        let snapshot = Snapshot { version: 1, plugins_generation: 1, ..Snapshot::default() };
        Scene { snapshot, route: None, service: None }.plugin("t", T)
    }

    fn plugin(mut self, name: &str, source: &str) -> Self {
        let value = model::PluginSource { source: source.into(), ..Default::default() };
        self.snapshot.plugin_sources.insert(name.into(), object(name, &json!({}), value));
        self
    }

    fn function(mut self, id: &str, source: &str) -> Self {
        let value = model::Function { source: source.into(), ..model::Function::default() };
        self.snapshot.functions.insert(id.into(), object(id, &json!({}), value));
        self
    }

    fn route(mut self, plugins: Value) -> Self {
        let json =
            json!({"uri": "/x", "plugins": plugins, "upstream": {"type": "roundrobin", "nodes": {"127.0.0.1:80": 1}}});
        let Parsed::Route(value) = parsed(Kind::Route, "1", &json) else { panic!("a route") };
        self.route = Some(object("1", &json, value));
        self
    }

    fn service(mut self, plugins: Value) -> Self {
        let json = json!({"plugins": plugins});
        let Parsed::Service(value) = parsed(Kind::Service, "s", &json) else { panic!("a service") };
        self.service = Some(object("s", &json, value));
        self
    }

    fn global_rule(mut self, id: &str, plugins: Value) -> Self {
        let json = json!({"plugins": plugins});
        let Parsed::GlobalRule(value) = parsed(Kind::GlobalRule, id, &json) else { panic!("a rule") };
        let mut rules = self.snapshot.global_rules.to_vec();
        rules.push(object(id, &json, value));
        self.snapshot.global_rules = rules.into();
        self.snapshot.global_rules_uid = model::next_uid();
        self
    }

    fn consumer(mut self, name: &str, plugins: Value) -> Self {
        let json = json!({"username": name, "plugins": plugins});
        let Parsed::Consumer(value) = parsed(Kind::Consumer, name, &json) else { panic!("a consumer") };
        self.snapshot.consumers.insert(name.into(), object(name, &json, value));
        self
    }

    fn start(self) -> Started {
        self.try_start().expect("a runner")
    }

    fn try_start(self) -> Result<Started> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("rt");
        let local = tokio::task::LocalSet::new();
        let config = json!({"plugins": [], "lua": {"limits": {"cpu_ms": 100}}});
        let setup = Setup::new(Default::default(), config.into(), Default::default());
        let snapshot = Arc::new(self.snapshot);
        let runner = local.block_on(&runtime, Runner::new(setup, 0, &snapshot))?;
        Ok(Started { runtime, local, runner, snapshot, route: self.route, service: self.service })
    }
}

/// The request that all tests make.
struct Get;

impl Facts for Get {
    fn host(&self) -> &[u8] {
        b"localhost"
    }
    fn path(&self) -> &[u8] {
        b"/x"
    }
    fn method(&self) -> &[u8] {
        b"GET"
    }
    fn remote(&self) -> std::net::IpAddr {
        [127, 0, 0, 1].into()
    }
    fn var(&self, _: &str) -> Option<Cow<'_, [u8]>> {
        None
    }
    fn filter(&self, _: &Arc<Object<model::Route>>) -> bool {
        true
    }
}

struct Started {
    runtime: tokio::runtime::Runtime,
    local: tokio::task::LocalSet,
    runner: Runner,
    snapshot: Arc<Snapshot>,
    route: Option<Arc<Object<model::Route>>>,
    service: Option<Arc<Object<model::Service>>>,
}

impl Started {
    fn exchange(&self) -> Exchange {
        let addr = std::net::SocketAddr::from(([127, 0, 0, 1], 1));
        let conn = Connection::new(1, addr, addr);
        let mut x = Exchange::new(Rc::new(conn), self.snapshot.clone());
        x.request.method.extend_from_slice(b"GET");
        x.request.args.extend_from_slice(b"v=2");
        let mut router = Router::default();
        self.route.iter().for_each(|route| router.insert(route.clone(), &[]));
        x.matched = router.find(&Get).map(|found| Matched { found, service: self.service.clone() });
        x
    }

    fn block_on<T>(&self, f: impl Future<Output = T>) -> T {
        self.local.block_on(&self.runtime, f)
    }

    /// Runs all phases; how rewrite and access ended and what `t` saw until its log.
    fn request(&self) -> (Flow, u16, String, String) {
        let mut x = self.exchange();
        self.block_on(async {
            self.runner.begin(&mut x);
            let mut flow = self.runner.rewrite_access(&mut x).await;
            if flow == Flow::Next {
                flow = self.runner.before_proxy(&mut x).await;
            }
            self.runner.header_filter(&mut x).await.ok();
            self.runner.body_filter(&mut x).await.ok();
            self.runner.log(&mut x).await;
            let trace = self.global("trace");
            (flow, x.response.status, String::from_utf8_lossy(&x.printed).into_owned(), trace)
        })
    }

    fn global(&self, name: &str) -> String {
        let vm = self.runner.generation.borrow().vm.clone();
        vm.lua.globals().get::<Option<String>>(name).ok().flatten().unwrap_or_default()
    }
}

#[test]
fn no_plugin_means_an_empty_mask_and_no_lua() {
    let s = Scene::new().route(json!({})).start();
    let mut x = s.exchange();
    assert_eq!(s.runner.begin(&mut x), PhaseMask::default());
    assert!(x.lua.slot.is_none());
    assert_eq!(s.block_on(s.runner.rewrite_access(&mut x)), Flow::Next);
}

#[test]
fn phases_run_in_order_global_rules_first() {
    let s = Scene::new()
        .global_rule("g", json!({"t": {"mark": "G"}}))
        .route(json!({"t": {"mark": "R", "wait": "access"}}))
        .start();
    let (flow, .., trace) = s.request();
    assert_eq!(flow, Flow::Next);
    assert_eq!(
        trace,
        "rewriteG accessG rewriteR accessR before_proxyG before_proxyR header_filterG header_filterR body_filterG body_filterR logG logR"
    );
    assert!(s.runner.generation.borrow().vm.idle_coroutines() > 0);
}

#[test]
fn a_plugin_answers_with_a_table() {
    let conf = json!({"t": {"answer": "access", "code": 403, "body": {"message": "no"}}});
    let s = Scene::new().route(conf).start();
    let (flow, status, body, trace) = s.request();
    assert_eq!((flow, status, body.as_str()), (Flow::Answer, 403, "{\"message\":\"no\"}\n"));
    assert!(trace.starts_with("rewrite access header_filter"), "{trace}");
}

#[test]
fn a_request_whose_plugins_cannot_be_prepared_is_refused() {
    for check in ["while true do end", "error('no memory')", "return false, 'no'"] {
        let source = plugin("sick", 1, "", &format!("function _M.check_schema(conf) {check} end"));
        let s = Scene::new().plugin("sick", &source).route(json!({"sick": {}})).start();
        let (flow, status, ..) = s.request();
        assert_eq!((flow, status), (Flow::Answer, 500), "{check}");
    }
}

#[test]
fn a_status_out_of_range_is_an_error() {
    for code in [0, 99, 1000, 99999] {
        let s = Scene::new().route(json!({"t": {"answer": "access", "code": code}})).start();
        let (flow, status, ..) = s.request();
        assert_eq!((flow, status), (Flow::Answer, 500), "{code}");
    }
}

#[test]
fn error_response_replaces_the_body() {
    let conf = json!({"t": {"answer": "rewrite", "code": 401, "body": "x", "_meta": {"error_response": {"e": 1}}}});
    let (_, status, body, _) = Scene::new().route(conf).start().request();
    assert_eq!((status, body.as_str()), (401, "{\"e\":1}\n"));
}

#[test]
fn a_failing_plugin_answers_500_and_the_next_request_works() {
    let s = Scene::new().route(json!({"t": {"fail": "access"}})).start();
    for _ in 0..3 {
        let (flow, status, ..) = s.request();
        assert_eq!((flow, status), (Flow::Answer, 500));
    }
}

#[test]
fn a_plugin_that_never_ends_answers_500() {
    let source =
        plugin("spin", 1, "", "function _M.access() while true do pcall(function() while true do end end) end end");
    let s = Scene::new().plugin("spin", &source).route(json!({"spin": {}})).start();
    let (flow, status, ..) = s.request();
    assert_eq!((flow, status), (Flow::Answer, 500));
}

#[test]
fn route_wins_over_service_and_priority_sorts() {
    let a = plugin("a", 1, "", "function _M.access(conf, ctx) ctx.seen = (ctx.seen or '') .. 'a' .. conf.n end");
    let b = plugin("b", 2, "", "function _M.access(conf, ctx) ctx.seen = (ctx.seen or '') .. 'b' .. conf.n end
        function _M.log(conf, ctx) trace = ctx.seen .. ctx.conf_type .. ctx.conf_id .. ctx.conf_version .. conf._meta.parent.resource_key end");
    let scene = || Scene::new().plugin("a", &a).plugin("b", &b).service(json!({"a": {"n": 1}, "b": {"n": 1}}));
    let s = scene().route(json!({"a": {"n": 2}})).start();
    assert_eq!(s.request().3, "b1a2route&service1&s7&7/apisix/services/s");
    let s = scene().route(json!({"a": {"n": 2, "_meta": {"priority": 9}}})).start();
    assert_eq!(s.request().3, "a2b1route&service1&s7&7/apisix/services/s");
    let s = scene().route(json!({"a": {"_meta": {"disable": true}}})).start();
    assert_eq!(s.request().3, "b1route&service1&s7&7/apisix/services/s");
}

#[test]
fn a_filter_decides_whether_a_plugin_runs() {
    let with = |v: &str| {
        let conf = json!({"t": {"answer": "access", "code": 204, "_meta": {"filter": [["arg_v", "==", v]]}}});
        Scene::new().route(conf).start().request().0
    };
    assert_eq!(with("2"), Flow::Answer);
    assert_eq!(with("3"), Flow::Next);
}

#[test]
fn a_consumer_brings_its_plugins() {
    let auth = plugin(
        "who",
        2500,
        "type = 'auth'",
        "function _M.rewrite(conf, ctx) require('moongate.native').apisix.attach_consumer('jack') end",
    );
    let s = Scene::new()
        .plugin("who", &auth)
        .consumer("jack", json!({"t": {"mark": "C"}}))
        .route(json!({"who": {}}))
        .start();
    let (flow, .., trace) = s.request();
    assert_eq!(flow, Flow::Next);
    assert_eq!(trace, "rewriteC accessC before_proxyC header_filterC body_filterC logC");
}

#[test]
fn a_plan_leaves_out_phases_in_which_a_conf_has_nothing_to_do() {
    let source = plugin(
        "once",
        1,
        "",
        "function _M.idle_in(conf, phase) return conf.phase ~= phase end
        for _, phase in ipairs({ 'rewrite', 'header_filter', 'body_filter', 'log' }) do
            _M[phase] = function() trace = (trace or '') .. phase .. ' ' end
        end",
    );
    let run = |conf: Value| {
        let s = Scene::new().plugin("once", &source).route(json!({"once": conf})).start();
        let mask = s.runner.begin(&mut s.exchange());
        (mask, s.request().3)
    };
    let mut log = PhaseMask::default();
    log.add(Phase::Log);
    assert_eq!(run(json!({"phase": "log"})), (log, "log ".into()));
    assert_eq!(run(json!({"phase": "none"})), (PhaseMask::default(), "".into()));
    // A hook runs before the plugin in every phase that it has.
    let hook = "return function() trace = (trace or '') .. 'hook ' end";
    let (_, trace) = run(json!({"phase": "log", "_meta": {"pre_function": hook}}));
    assert_eq!(trace, "hook rewrite hook header_filter hook body_filter hook log ");
}

#[test]
fn a_consumer_without_plugins_changes_no_plan() {
    let auth = plugin(
        "who",
        2500,
        "type = 'auth'",
        "function _M.rewrite(conf, ctx) require('moongate.native').apisix.attach_consumer('jack') end",
    );
    let look = plugin(
        "look",
        1,
        "",
        "function _M.access(conf, ctx) trace = ctx.conf_type .. ' ' .. tostring(ctx.var.consumer_name) end",
    );
    let request = |consumer: Value| {
        let scene = Scene::new().plugin("who", &auth).plugin("look", &look).consumer("jack", consumer);
        scene.route(json!({"who": {}, "look": {}})).start().request().3
    };
    assert_eq!(request(json!({})), "route jack");
    assert_eq!(request(json!({"who": {}})), "route jack", "what it authenticates with is not run");
    assert_eq!(request(json!({"look": {}})), "route&consumer jack");
}

#[test]
fn a_consumer_is_attached_by_number_until_consumers_change() {
    let auth = plugin(
        "who",
        2500,
        "type = 'auth', consumer_schema = {}",
        "local consumers = require('apisix.consumer')
        function _M.rewrite(conf, ctx)
            local jack, found = consumers.find_consumer('who', 'key', 'k')
            kept = kept or jack
            if not jack then return 401 end
            consumers.attach_consumer(ctx, conf.old and kept or jack, found)
        end",
    );
    let scene = |old: bool| {
        let mut s = Scene::new().plugin("who", &auth).consumer("jack", json!({"who": {"key": "k"}}));
        let key = model::consumer::AuthKey { plugin: "who".into(), field: "key".into(), value: "k".into() };
        s.snapshot.auth_index.insert(key, ("jack".into(), None));
        s.snapshot.consumers_uid = model::next_uid();
        s.route(json!({"who": {"old": old}})).start()
    };
    let attached = |s: &Started| {
        let mut x = s.exchange();
        for forged in ["X-Consumer-Username", "X-Credential-Identifier", "X-Consumer-Custom-Id"] {
            x.request.headers.append(forged, "root");
        }
        s.runner.begin(&mut x);
        s.block_on(s.runner.rewrite_access(&mut x));
        s.block_on(s.runner.log(&mut x));
        assert!(!x.request.headers.contains("x-credential-identifier"));
        assert!(!x.request.headers.contains("x-consumer-custom-id"));
        let told = x.request.headers.get("x-consumer-username").map(<[u8]>::to_vec);
        assert_eq!(told.as_deref(), x.consumer.as_ref().map(|_| &b"jack"[..]));
        x.consumer.map(|c| c.uid)
    };
    for old in [false, true] {
        let mut s = scene(old);
        let first = attached(&s);
        assert!(first.is_some() && attached(&s) == first);
        let mut next = Snapshot::clone(&s.snapshot);
        (next.version, next.consumers_uid) = (2, model::next_uid());
        let jack = next.consumers.get("jack").expect("there").clone();
        let json: Value = serde_json::from_str(&jack.json).expect("valid");
        let Parsed::Consumer(value) = parsed(Kind::Consumer, "jack", &json) else { panic!("a consumer") };
        let anew = object("jack", &json, value);
        next.consumers.insert("jack".into(), anew.clone());
        s.snapshot = Arc::new(next);
        // Also a table that a plugin kept is the consumer of now, never another's number.
        assert_eq!(attached(&s), Some(anew.uid));
        assert_eq!(attached(&s), Some(anew.uid));
    }
}

#[test]
fn new_plugins_build_a_vm_beside_the_old_one() {
    let mut s = Scene::new()
        .plugin("v", &plugin("v", 1, "", "function _M.access() return 201 end function _M.destroy() end"))
        .route(json!({"v": {}}))
        .start();
    let mut old = s.exchange();
    s.runner.begin(&mut old);
    let mut next = Snapshot::clone(&s.snapshot);
    (next.version, next.plugins_generation) = (2, 2);
    let source = plugin("v", 1, "", "function _M.access() return 202 end");
    next.plugin_sources.insert(
        "v".into(),
        object("v", &json!({}), model::PluginSource { source: source.into(), ..Default::default() }),
    );
    s.snapshot = Arc::new(next);
    assert_eq!(s.request().1, 202);
    s.block_on(s.runner.rewrite_access(&mut old));
    assert_eq!(old.response.status, 201);
    s.block_on(s.runner.log(&mut old));
}

#[test]
fn the_end_of_a_replaced_vm_may_wait_so_long() {
    for (destroy, ends) in [("ngx.sleep(0.001)", "at once"), ("ngx.sleep(3600)", "at the bound")] {
        let old =
            plugin("v", 1, "", &format!("function _M.access() return 201 end function _M.destroy() {destroy} end"));
        let mut s = Scene::new().plugin("v", &old).route(json!({"v": {}})).start();
        assert_eq!(s.request().1, 201);
        s.snapshot = with_plugin(&s, 2, "v", &plugin("v", 1, "", "function _M.access() return 202 end"));
        // The new one begins when the old one has ended, or has had its time.
        assert_eq!(s.request().1, 201, "{ends}");
        while s.request().1 != 202 {
            s.block_on(async { tokio::time::sleep(Duration::from_millis(1)).await });
        }
        s.block_on(async {
            while s.runner.ends.open() > 1 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            s.runner.end().await;
        });
        assert_eq!(s.runner.ends.open(), 0);
    }
}

/// The same scene with another text of a plugin.
fn with_plugin(s: &Started, version: u64, name: &str, source: &str) -> Arc<Snapshot> {
    let mut next = Snapshot::clone(&s.snapshot);
    (next.version, next.plugins_generation) = (version, version);
    next.plugin_sources.insert(
        name.into(),
        object(name, &json!({}), model::PluginSource { source: source.into(), ..Default::default() }),
    );
    Arc::new(next)
}

/// Answers with this status; `init` runs first.
fn slow(status: u16, init: &str) -> String {
    plugin("v", 1, "", &format!("function _M.init() {init} end function _M.access() return {status} end"))
}

#[test]
fn the_old_vm_serves_until_the_new_one_has_waited_for_its_start() {
    let mut s = Scene::new().plugin("v", &slow(201, "ngx.sleep(0.001)")).route(json!({"v": {}})).start();
    assert_eq!(s.request().1, 201);
    s.snapshot = with_plugin(&s, 2, "v", &slow(202, "ngx.sleep(0.02)"));
    assert_eq!(s.request().1, 201, "the new one sleeps");
    // One that comes meanwhile takes its place.
    s.snapshot = with_plugin(&s, 3, "v", &slow(203, "ngx.sleep(0.02)"));
    let mut answers = Vec::new();
    while answers.last() != Some(&203) {
        answers.push(s.request().1);
        s.block_on(tokio::task::yield_now());
        assert!(answers.len() < 1_000_000);
    }
    assert!(answers.iter().all(|status| matches!(status, 201 | 203)), "{answers:?}");
    s.snapshot = with_plugin(&s, 4, "v", &slow(204, ""));
    assert_eq!(s.request().1, 204, "what waits for nothing serves at once");
}

#[test]
fn a_start_that_waits_too_long_fails() {
    let mut s = Scene::new().plugin("v", &slow(201, "")).route(json!({"v": {}})).start();
    s.snapshot = with_plugin(&s, 2, "v", &slow(202, "ngx.sleep(3600)"));
    assert_eq!(s.request().1, 201);
    s.block_on(async {
        while s.runner.renewal.borrow().as_ref().is_some_and(|r| !r.has_ended()) {
            tokio::task::yield_now().await;
        }
    });
    assert_eq!(s.request().1, 201, "the old one goes on");
    assert!(s.runner.renewal.borrow().is_none() && s.runner.snapshot.get() == 2, "and nobody tries again");
    let scene = Scene::new().plugin("v", &slow(201, "ngx.sleep(3600)")).route(json!({"v": {}}));
    let refused = scene.try_start().err().expect("no runner").to_string();
    assert!(refused.contains("waited for more than"), "{refused}");
}

#[test]
fn plans_are_bounded_and_those_in_use_stay() {
    let s = Scene::new().route(json!({"t": {"answer": "access", "code": 201}})).start();
    let (mut held, mut x) = (s.exchange(), s.exchange());
    s.runner.begin(&mut held);
    // Each version of the global rules makes another plan.
    let mut plan = |rules: usize| {
        x.snapshot = Snapshot { global_rules_uid: 1 + rules as u64, ..Snapshot::clone(&s.snapshot) }.into();
        s.runner.plan(&Sources::of(&x)).expect("a plan")
    };
    let count = || s.runner.plans.borrow().len();
    let first = plan(0);
    (2..MAX_PLANS).for_each(|rules| drop(plan(rules)));
    assert!(Rc::ptr_eq(&first, &plan(0)));
    assert_eq!(count(), MAX_PLANS);
    plan(MAX_PLANS);
    assert!(Rc::ptr_eq(&first, &plan(0)), "it was used since it was made");
    assert_eq!(count(), 2, "the others were not");
    // Where all are in use all are made again.
    (1..MAX_PLANS - 1).for_each(|rules| drop(plan(rules)));
    assert_eq!(count(), MAX_PLANS);
    s.runner.plans.borrow().values().for_each(|plan| plan.used.set(true));
    plan(MAX_PLANS + 1);
    assert_eq!(count(), 1);
    assert!(!Rc::ptr_eq(&first, &plan(0)));
    s.block_on(s.runner.rewrite_access(&mut held));
    assert_eq!(held.response.status, 201, "a request goes on with the plan it has");
    s.block_on(s.runner.log(&mut held));
}

#[test]
fn functions_answer_in_a_sandbox() {
    let s = Scene::new()
        .function("hello", "n = (n or 0) return function(ctx) n = n + 1 return 200, {n = n, t = type(ctx.var)} end")
        .function("out", "return function() return 200, io.open('/etc/passwd') end")
        .function("ffi", "return function() return 200, require('ffi') end")
        .function("spin", "while true do end")
        .function("slow", "return function() ngx.sleep(0.001) return 'text' end")
        .start();
    let call = |id: &str| {
        let mut x = s.exchange();
        let flow = s.block_on(s.runner.function(&mut x, id));
        (flow, x.response.status, String::from_utf8_lossy(&x.printed).into_owned())
    };
    let (flow, status, body) = call("hello");
    assert_eq!((flow, status), (Some(Flow::Answer), 200));
    assert_eq!(serde_json::from_str::<Value>(&body).expect("JSON"), json!({"n": 1, "t": "table"}));
    assert_eq!(call("slow"), (Some(Flow::Answer), 200, "text".into()));
    for id in ["out", "ffi", "spin"] {
        assert_eq!(call(id).1, 500, "{id}");
    }
    assert_eq!(call("absent").0, None);
}

#[test]
fn a_filter_func_sees_no_error_as_yes() {
    let s = Scene::new().start();
    let with = |f: &str| {
        let json = json!({"uri": "/x", "filter_func": f, "upstream": {"type": "roundrobin", "nodes": {"a:80": 1}}});
        let Parsed::Route(value) = parsed(Kind::Route, "1", &json) else { panic!("a route") };
        s.runner.filter(&s.exchange(), &object("1", &json, value))
    };
    assert!(with("function(vars) return type(vars) == 'table' end"));
    assert!(!with("function(vars) return false end"));
    assert!(!with("function(vars) return nil + 1 end"));
    assert!(!with("function(vars) while true do end end"));
}

#[test]
fn filter_funcs_that_are_kept_are_bounded() {
    let s = Scene::new().start();
    let json = json!({"uri": "/x", "filter_func": "function(vars) return vars.arg_v == '2' end",
        "upstream": {"type": "roundrobin", "nodes": {"a:80": 1}}});
    let Parsed::Route(value) = parsed(Kind::Route, "1", &json) else { panic!("a route") };
    let (x, mut route) = (s.exchange(), object("1", &json, value));
    let mut ask = |times: usize| {
        for _ in 0..times {
            assert!(s.runner.filter(&x, &route));
            Arc::get_mut(&mut route).expect("the only one").uid = model::next_uid();
        }
        s.runner.filters.borrow().len()
    };
    assert_eq!(ask(MAX_PLANS), MAX_PLANS);
    assert_eq!(ask(1), 1, "all are compiled again on demand");
}

#[test]
fn the_checker_inspects_and_checks() {
    let config = json!({"plugins": []});
    let setup = Setup::new(Default::default(), config.into(), Default::default());
    let picky = plugin(
        "picky",
        1,
        "",
        "function _M.check_schema(conf) if conf.ok then return true end return false, 'not ok' end",
    );
    let scene = Scene::new().plugin("picky", &picky);
    let checker = registry::Checker::new(setup, &scene.snapshot).expect("a checker");
    use crate::store::builder::{PluginSchema::Plugin, Refusal};
    let source = |text: &str| model::PluginSource { source: text.into(), ..Default::default() };
    assert_eq!(checker.check_conf("picky", &json!({"ok": true}), Plugin), Ok(()));
    assert_eq!(checker.check_conf("picky", &json!({}), Plugin), Err(Refusal::Invalid("not ok".into())));
    assert_eq!(checker.check_conf("absent", &json!({}), Plugin), Err(Refusal::Unknown));
    let info = checker.inspect_plugin("t", &source(T)).expect("a plugin");
    assert_eq!(
        (info.priority, info.phases.has(Phase::Access), info.phases.has(Phase::DelayedBodyFilter)),
        (100, true, false)
    );
    let broken = checker.inspect_plugin("t", &source("local a = 1\nreturn {")).unwrap_err();
    assert!(broken.starts_with("plugins/t.lua:2:"), "{broken}");
    let raising = checker.inspect_plugin("t", &source("\n\nerror('at load')")).unwrap_err();
    assert!(raising.starts_with("plugins/t.lua:3: at load"), "{raising}");
    assert!(
        checker.inspect_plugin("t", &source("return { priority = 1 }")).unwrap_err().contains("missing field: version")
    );
    let broken = checker.compile_function("f", "return function( oops").unwrap_err();
    assert!(broken.starts_with("functions/f.lua:1:"), "{broken}");
}

#[test]
fn every_bundled_plugin_loads() {
    let setup = Setup::new(Default::default(), json!({}).into(), Default::default());
    let names = setup.names(&Snapshot::default());
    assert!(names.len() > 20, "{names:?}");
    let config = setup.vm_config(Purpose::Check, 0, &Snapshot::default());
    let vm = registry::vm(config).expect("a VM");
    let mut failed = Vec::new();
    for name in &names {
        let (info, reason): (mlua::Value, Option<String>) =
            registry::call(&vm, "moongate.plugins", "load", &**name).expect("called");
        if !info.is_table() {
            failed.push(format!("{name}: {}", reason.unwrap_or_default()));
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

#[test]
fn a_panic_in_the_host_answers_500_and_nothing_else_breaks() {
    let source = plugin(
        "panic",
        1,
        "",
        "function _M.access(conf, ctx)
        if ctx.var.arg_v == '2' then pcall(require('moongate.native').test_panic) end return 200 end",
    );
    let s = Scene::new().plugin("panic", &source).route(json!({"panic": {}})).start();
    let vm = s.runner.generation.borrow().vm.clone();
    let mut api = crate::lua::Api::new(&vm.lua).expect("api");
    api.func("native.test_panic", crate::lua::Phases::ANY, "", |_| panic!("on purpose")).expect("registered");
    let f = api.native().get::<mlua::Function>("test_panic").expect("there");
    let native: mlua::Table = vm.lua.load("return require('moongate.native')").eval().expect("native");
    native.raw_set("test_panic", f).expect("set");
    for _ in 0..2 {
        let (flow, status, ..) = s.request();
        assert_eq!((flow, status), (Flow::Answer, 500));
    }
}

#[test]
fn the_documented_api_is_the_registered_one() {
    let setup = Setup::new(Default::default(), json!({}).into(), Default::default());
    let config = setup.vm_config(Purpose::Check, 0, &Snapshot::default());
    let vm = Vm::with(config, &[crate::plugin::natives::register]).expect("a VM");
    let text = crate::lua::api::document(vm.entries());
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/lua-api.md");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(path, &text).expect("written");
    }
    let written = std::fs::read_to_string(path).unwrap_or_default();
    assert!(written == text, "docs/lua-api.md is not what is registered: run this test with UPDATE_DOCS=1");
}

#[test]
fn functions_refuse_phases_that_are_not_theirs() {
    let s = Scene::new().start();
    let vm = s.runner.generation.borrow().vm.clone();
    let mut x = s.exchange();
    let mut checked = 0;
    for entry in vm.entries() {
        if !matches!(entry.how, How::Func | How::Wait) {
            continue;
        }
        let expression = entry.name.replace("native.", "require('moongate.native').");
        for phase in ALL_PHASES.into_iter().filter(|p| !entry.phases.has(*p)) {
            let f: mlua::Value = vm.lua.load(format!("return {expression}")).eval().expect("evaluates");
            // A Lua face stands before some; the host function behind it is what is checked.
            let mlua::Value::Function(f) = f else { continue };
            x.phase = phase;
            let refused = vm.entered(|| crate::lua::fast::enter(&mut x, || f.call::<()>(())));
            let text = refused.expect_err(&entry.name).to_string();
            let disabled = format!("API disabled in the context of {}", context_name(phase));
            if f.info().what == "C" {
                assert!(text.contains(&disabled), "{} in {phase:?}: {text}", entry.name);
                checked += 1;
            }
        }
    }
    assert!(checked > 0);
}

const ALL_PHASES: [Phase; 17] = [
    Phase::Init,
    Phase::Ssl,
    Phase::Rewrite,
    Phase::Access,
    Phase::BeforeProxy,
    Phase::Balancer,
    Phase::Content,
    Phase::HeaderFilter,
    Phase::BodyFilter,
    Phase::DelayedBodyFilter,
    Phase::Log,
    Phase::Timer,
    Phase::SslClientHello,
    Phase::SslSessionFetch,
    Phase::SslSessionStore,
    Phase::InitByLua,
    Phase::ExitWorker,
];

#[test]
#[ignore = "prints a measurement"]
fn cost_of_one_plugin_in_access_and_log() {
    let source = plugin(
        "h",
        1,
        "",
        "function _M.access(conf, ctx) ctx.a = ctx.var.arg_v ngx.req.set_header('X-A', conf.n) end
        function _M.log(conf, ctx) ctx.b = ctx.a end",
    );
    let s = Scene::new().plugin("h", &source).route(json!({"h": {"n": 1}})).start();
    let mut x = s.exchange();
    s.block_on(async {
        for round in 0..5 {
            let n = 200_000;
            let start = Instant::now();
            for _ in 0..n {
                s.runner.begin(&mut x);
                s.runner.rewrite_access(&mut x).await;
                s.runner.log(&mut x).await;
            }
            let each: Duration = start.elapsed() / n;
            println!("round {round}: {each:?} per request (begin, access, log)");
        }
    });
}
