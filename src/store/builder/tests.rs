use std::{cell::Cell, net::IpAddr, rc::Rc, time::Instant};

use serde_json::json;

use super::*;
use crate::{error::Error, model::Keyring, router::Facts, store::parser};

/// Knows the plugins `key-auth` and, once loaded, what stands in plugin_sources; refuses confs with `bad`, and all of a plugin whose
/// source is `strict`.
#[derive(Default)]
struct Checker {
    checks: Rc<Cell<usize>>,
    uploaded: std::cell::RefCell<HashSet<String>>,
    strict: std::cell::RefCell<HashSet<String>>,
    /// No plugin loads.
    fails: Rc<Cell<bool>>,
}

impl PluginChecker for Checker {
    fn check(&self, plugin: &str, conf: &str, _: PluginSchema) -> Result<(), Refusal> {
        self.checks.set(self.checks.get() + 1);
        match plugin {
            _ if conf.contains("bad") => Err(Refusal::Invalid("bad is not good".to_owned())),
            _ if self.strict.borrow().contains(plugin) => Err(Refusal::Invalid("strict".to_owned())),
            "key-auth" | "http-logger" => Ok(()),
            _ if self.uploaded.borrow().contains(plugin) => Ok(()),
            _ => Err(Refusal::Unknown),
        }
    }

    fn inspect(&self, _: &str, source: &PluginSource) -> Result<(), String> {
        if source.source.contains("broken") { Err("broken is no plugin".to_owned()) } else { Ok(()) }
    }

    fn reload(&self, snapshot: &Snapshot) -> Result<()> {
        if self.fails.get() {
            return Err(Error::script("plugin [mine]: mine.lua:1: why"));
        }
        *self.uploaded.borrow_mut() = snapshot.plugin_sources.keys().map(|id| id.to_string()).collect();
        let strict = snapshot.plugin_sources.values().filter(|o| o.value.source.contains("strict"));
        *self.strict.borrow_mut() = strict.map(|o| o.id.to_string()).collect();
        Ok(())
    }
}

fn builder() -> (Builder, Rc<Cell<usize>>) {
    let checker = Checker::default();
    let checks = checker.checks.clone();
    let parser = parser(Arc::new(Keyring::default()), None);
    (Builder::new(parser, Some(Box::new(checker)), RouterKind::default(), true), checks)
}

fn entry(key: &str, revision: i64, value: serde_json::Value) -> Entry {
    Entry { key: key.into(), value: value.to_string().into(), create_revision: revision, mod_revision: revision }
}

fn put(b: &mut Builder, key: &str, revision: i64, value: serde_json::Value) -> Journal {
    b.change(vec![(key.into(), Some(entry(key, revision, value)))], revision)
}

fn delete(b: &mut Builder, key: &str, revision: i64) {
    b.change(vec![(key.into(), None)], revision);
}

fn upstream() -> serde_json::Value {
    json!({"type": "roundrobin", "nodes": {"127.0.0.1:80": 1}})
}

fn route(uri: &str) -> serde_json::Value {
    json!({"uri": uri, "upstream": upstream()})
}

#[test]
fn keys_of_no_kind_are_kept_for_scripts_within_bounds() {
    let (mut b, _) = builder();
    put(&mut b, "/box/a", 1, json!({"n": 1}));
    put(&mut b, "/boxes/a", 2, json!({"n": 2}));
    put(&mut b, "/box", 3, json!("itself"));
    put(&mut b, "/plugins", 4, json!([{"name": "key-auth"}]));
    let s = b.take().unwrap();
    let keys = |dir| s.keys_in(dir).iter().map(|key| key.to_string()).collect::<Vec<_>>();
    assert_eq!((keys("/box"), keys("/plugins")), (vec!["/box".into(), "/box/a".into()], vec!["/plugins".into()]));
    assert_eq!(s.at("/box/a").map(|o| (&**o.json, o.modified)), Some((r#"{"n":1}"#, 1)));
    assert_eq!(b.take_touched().len(), 4);
    assert!(b.take_touched().is_empty());

    let long = |len: usize| Value::from("x".repeat(len - 2));
    put(&mut b, "/box/long", 5, long(MAX_EXTRA_BYTES));
    assert!(b.take().unwrap().at("/box/long").is_none(), "the others have some of the bytes");
    let rest = MAX_EXTRA_BYTES - b.extra_bytes;
    put(&mut b, "/box/long", 6, long(rest));
    assert!(b.take().unwrap().at("/box/long").is_some());
    put(&mut b, "/box/a", 7, json!({"n": 10}));
    assert!(b.take().unwrap().at("/box/a").is_none(), "an older version is not shown for a newer one");
    delete(&mut b, "/box/long", 8);
    let room = MAX_EXTRA - b.next.extra.len();
    (0..=room).for_each(|n| drop(put(&mut b, &format!("/box/{n}"), 9, json!(n))));
    let s = b.take().unwrap();
    assert_eq!((s.extra.len(), s.at(&format!("/box/{room}")).is_none()), (MAX_EXTRA, true));
    put(&mut b, "/box/0", 10, json!("again"));
    assert_eq!(b.take().unwrap().at("/box/0").map(|o| o.modified), Some(10), "a known key may change");
    b.replace(vec![entry("/box/new", 11, json!(1))], 11);
    let s = b.take().unwrap();
    assert_eq!((s.keys_in("/box").len(), b.extra_bytes), (1, 1));
    put(&mut b, "/moongate/function_revisions/f/0000000001", 12, json!("source"));
    assert_eq!((b.next.extra.len(), b.extra_bytes), (1, 1), "the gateway's own keys are not shown");
}

#[test]
fn a_directory_holds_what_lives_under_its_objects_too() {
    let (mut b, _) = builder();
    let credential = json!({"plugins": {"key-auth": {"key": "k"}}});
    for (key, value) in [
        ("/services/s", json!({})),
        ("/services/s/graphql_cost_decorations/d", json!({"field_path": "A.b"})),
        ("/consumers/jack", json!({"username": "jack"})),
        ("/consumers/jack/credentials/c", credential.clone()),
        ("/consumers/jacky/credentials/c", credential),
        ("/secrets/vault/1", json!({"uri": "http://127.0.0.1:1", "prefix": "p", "token": "t"})),
        ("/protos/1", json!({"content": "syntax = \"proto3\"; message A {}"})),
    ] {
        put(&mut b, key, 1, value);
    }
    let s = b.take().unwrap();
    assert!(s.errors.is_empty(), "{:?}", s.errors);
    for (dir, expected) in [
        ("/services", "/services/s /services/s/graphql_cost_decorations/d"),
        ("/consumers", "/consumers/jack /consumers/jack/credentials/c /consumers/jacky/credentials/c"),
        ("/consumers/jack/credentials", "/consumers/jack/credentials/c"),
        ("/secrets/vault", "/secrets/vault/1"),
        ("/protos/1", "/protos/1"),
        ("/credentials", ""),
    ] {
        assert_eq!(s.keys_in(dir).join(" "), expected, "{dir}");
    }
}

#[test]
fn secret_managers_are_checked_as_the_admin_api_does() {
    let (mut b, _) = builder();
    let vault = json!({"uri": "http://127.0.0.1:1", "prefix": "p", "token": "t"});
    put(&mut b, "/secrets/vault/1", 1, vault);
    put(&mut b, "/secrets/vault/2", 2, json!({"uri": "http://127.0.0.1:1", "prefix": "p"}));
    put(&mut b, "/secrets/aws/1", 3, json!({"access_key_id": "a", "secret_access_key": 1}));
    let s = b.take().unwrap();
    let refused: Vec<_> = s.errors.values().map(|e| (&*e.key, e.message.as_str())).collect();
    assert_eq!(refused.len(), 2, "{refused:?}");
    assert!(refused.contains(&("/secrets/vault/2", "invalid configuration: property \"token\" is required")));
    assert_eq!(s.keys_in("/secrets").join(" "), "/secrets/vault/1");
}

struct Asked<'a>(&'a str, &'a str);

impl Facts for Asked<'_> {
    fn host(&self) -> &[u8] {
        self.0.as_bytes()
    }
    fn path(&self) -> &[u8] {
        self.1.as_bytes()
    }
    fn method(&self) -> &[u8] {
        b"GET"
    }
    fn remote(&self) -> IpAddr {
        [127, 0, 0, 1].into()
    }
    fn var(&self, _: &str) -> Option<std::borrow::Cow<'_, [u8]>> {
        None
    }
    fn vars(&self, _: &crate::expr::Expr) -> bool {
        true
    }
    fn filter(&self, _: &Arc<Object<Route>>) -> bool {
        true
    }
}

fn found(s: &Snapshot, host: &str, path: &str) -> Option<String> {
    s.router.find(&Asked(host, path)).map(|f| f.route().id.to_string())
}

#[test]
fn what_did_not_change_keeps_its_uid_across_a_reload() {
    let (mut b, _) = builder();
    let entries = vec![entry("/routes/1", 1, route("/a")), entry("/routes/2", 2, route("/b"))];
    b.replace(entries.clone(), 2);
    let one = b.take().unwrap();
    assert_eq!((one.version, one.revision, one.routes.len()), (1, 2, 2));
    assert!(b.take().is_none(), "nothing new");
    b.replace(entries, 2);
    assert!(b.take().is_none(), "still nothing new");
    b.replace(vec![entry("/routes/1", 1, route("/a")), entry("/routes/3", 5, route("/c"))], 5);
    let two = b.take().unwrap();
    assert_eq!(one.routes["1"].uid, two.routes["1"].uid);
    assert_eq!(found(&two, "x", "/a").as_deref(), Some("1"));
    assert_eq!(found(&two, "x", "/b"), None);
    assert_eq!(found(&two, "x", "/c").as_deref(), Some("3"));
    assert_eq!(found(&one, "x", "/b").as_deref(), Some("2"), "an old snapshot stays as it was");
}

#[test]
fn an_invalid_version_leaves_the_last_valid_one_serving_and_shows_as_an_error() {
    let (mut b, _) = builder();
    put(&mut b, "/routes/1", 1, route("/a"));
    put(&mut b, "/routes/1", 2, json!({"uri": 7}));
    put(&mut b, "/routes/2", 3, json!({"nonsense": true}));
    put(&mut b, "/routes/3", 4, json!({"uri": "/c", "upstream": upstream(), "plugins": {"nope": {}}}));
    let not_text = Entry { value: NOT_UTF8.into(), ..entry("/routes/4", 5, json!(null)) };
    let journal = b.change(vec![("/routes/4".into(), Some(not_text))], 5);
    assert!(matches!(journal, Journal::Changes { changes, .. } if changes.is_empty()));
    let s = b.take().unwrap();
    assert_eq!(found(&s, "x", "/a").as_deref(), Some("1"));
    assert_eq!(s.routes.len(), 1);
    let mut errors: Vec<_> = s.errors.values().map(|e| (&*e.key, e.revision, e.message.as_str())).collect();
    errors.sort_unstable();
    assert_eq!(errors.len(), 4);
    assert_eq!(errors[2], ("/routes/3", 4, "unknown plugin [nope]"));
    assert_eq!(errors[3], ("/routes/4", 5, "the value is not UTF-8 text"));

    put(&mut b, "/routes/1", 6, route("/a2"));
    delete(&mut b, "/routes/2", 7);
    let s = b.take().unwrap();
    assert_eq!(found(&s, "x", "/a2").as_deref(), Some("1"));
    assert_eq!(s.errors.len(), 2);
}

#[test]
fn routes_follow_the_hosts_of_their_service() {
    let (mut b, _) = builder();
    put(&mut b, "/routes/1", 1, json!({"uri": "/a", "service_id": "s"}));
    put(&mut b, "/routes/2", 2, json!({"uri": "/b", "service_id": "s", "host": "own.com"}));
    put(&mut b, "/services/s", 3, json!({"hosts": ["one.com"], "upstream": upstream()}));
    let s = b.take().unwrap();
    assert_eq!(found(&s, "one.com", "/a").as_deref(), Some("1"));
    assert_eq!(found(&s, "two.com", "/a"), None);
    assert_eq!(found(&s, "own.com", "/b").as_deref(), Some("2"));
    put(&mut b, "/services/s", 4, json!({"hosts": ["two.com"], "upstream": upstream()}));
    let s = b.take().unwrap();
    assert_eq!(found(&s, "one.com", "/a"), None);
    assert_eq!(found(&s, "two.com", "/a").as_deref(), Some("1"));
    delete(&mut b, "/services/s", 5);
    assert_eq!(found(&b.take().unwrap(), "any.com", "/a").as_deref(), Some("1"));
    put(&mut b, "/routes/1", 6, route("/a"));
    delete(&mut b, "/routes/2", 7);
    assert!(b.routes_of_service.is_empty());
    assert!(b.take().unwrap().router.len() == 1);
}

#[test]
fn an_uploaded_plugin_lets_in_what_was_refused_for_want_of_it() {
    let (mut b, _) = builder();
    let user = json!({"uri": "/a", "upstream": upstream(), "plugins": {"mine": {}}});
    put(&mut b, "/routes/1", 1, user);
    let s = b.take().unwrap();
    assert_eq!((s.errors.len(), s.plugins_generation), (1, 1));
    let journal = put(&mut b, "/plugin_sources/mine", 2, json!({"source": "return {}"}));
    assert!(matches!(journal, Journal::Changes { changes, .. } if changes.len() == 2));
    let s = b.take().unwrap();
    assert_eq!((s.errors.len(), s.plugins_generation, s.routes.len()), (0, 2, 1));
    b.reload_plugins();
    assert_eq!(b.take().unwrap().plugins_generation, 3);
    put(&mut b, "/plugins", 4, json!([{"name": "key-auth"}, {"name": "mqtt-proxy", "stream": true}]));
    let s = b.take().unwrap();
    assert_eq!(s.plugin_names.as_deref(), Some(&["key-auth".into()][..]));
    assert_eq!(s.plugins_generation, 4);
    delete(&mut b, "/plugins", 5);
    let s = b.take().unwrap();
    assert_eq!((s.plugin_names, s.plugins_generation), (None, 5));
}

#[test]
fn a_source_that_refuses_confs_in_use_has_their_owners_told_of_until_it_is_another() {
    let (mut b, checks) = builder();
    let source = |text: &str| json!({ "source": text });
    put(&mut b, "/plugin_sources/mine", 1, source("return {}"));
    put(&mut b, "/routes/1", 2, json!({"uri": "/a", "upstream": upstream(), "plugins": {"mine": {}}}));
    put(&mut b, "/routes/2", 3, json!({"uri": "/b", "upstream": upstream(), "plugins": {"key-auth": {}}}));
    put(&mut b, "/plugin_metadata/mine", 4, json!({"x": 1}));
    let before = checks.get();
    let journal = put(&mut b, "/plugin_sources/mine", 5, source("strict"));
    assert!(matches!(journal, Journal::Changes { changes, .. } if changes.len() == 1));
    assert_eq!(checks.get() - before, 2, "key-auth is the same as before");
    let s = b.take().unwrap();
    let mut told: Vec<_> = s.errors.keys().map(|key| key.to_string()).collect();
    told.sort();
    assert_eq!(told, ["/plugin_metadata/mine", "/routes/1"]);
    assert_eq!((s.routes.len(), s.errors["/routes/1"].revision), (2, 2), "what is served is the same");
    // Asked again, and still refused; a newer version has an error of its own.
    b.reload_plugins();
    assert_eq!(b.take().unwrap().errors.len(), 2);
    put(&mut b, "/routes/1", 6, json!({"uri": "/a", "upstream": upstream(), "plugins": {"mine": {"y": 1}}}));
    assert_eq!(b.take().unwrap().errors["/routes/1"].revision, 6);
    put(&mut b, "/plugin_sources/mine", 7, source("return {}"));
    let s = b.take().unwrap();
    assert!(s.errors.is_empty() && s.routes["1"].mod_revision == 6);
}

#[test]
fn a_source_that_is_no_plugin_leaves_the_one_before_and_is_tried_again_by_a_reload() {
    let (mut b, _) = builder();
    put(&mut b, "/plugin_sources/mine", 1, json!({"source": "return {}"}));
    let generation = b.take().unwrap().plugins_generation;
    put(&mut b, "/plugin_sources/mine", 2, json!({"source": "broken"}));
    let s = b.take().unwrap();
    assert_eq!((&*s.plugin_sources["mine"].value.source, s.plugins_generation), ("return {}", generation));
    assert_eq!(s.errors["/plugin_sources/mine"].message, "broken is no plugin");
    b.reload_plugins();
    assert_eq!(b.take().unwrap().errors.len(), 1);
    delete(&mut b, "/plugin_sources/mine", 3);
    let s = b.take().unwrap();
    assert!(s.errors.is_empty() && s.plugin_sources.is_empty());
}

#[test]
fn the_same_conf_is_checked_once_per_generation() {
    let (mut b, checks) = builder();
    for i in 0..10 {
        let r = json!({"uri": format!("/{i}"), "upstream": upstream(), "plugins": {"key-auth": {}}});
        put(&mut b, &format!("/routes/{i}"), i + 1, r);
    }
    assert_eq!(checks.get(), 1);
    put(&mut b, "/plugin_metadata/http-logger", 11, json!({"log_format": {"bad": "x"}}));
    assert_eq!(checks.get(), 2);
    let s = b.take().unwrap();
    let error = &s.errors["/plugin_metadata/http-logger"].message;
    assert!(error.contains("failed to check the configuration of plugin http-logger err: bad"), "{error}");
}

#[test]
fn the_oldest_claim_to_an_auth_key_wins_and_is_inherited() {
    let (mut b, _) = builder();
    let jack = json!({"username": "jack", "plugins": {"key-auth": {"key": "k"}}});
    let rose = json!({"username": "rose", "plugins": {"key-auth": {"key": "k"}}});
    let key = AuthKey { plugin: "key-auth".into(), field: "key".into(), value: "k".into() };
    let owner = |b: &mut Builder| {
        let s = b.take().unwrap();
        s.auth_index.get(&key).map(|(consumer, credential)| (consumer.to_string(), credential.is_some()))
    };
    put(&mut b, "/consumers/rose", 2, rose);
    assert_eq!(owner(&mut b), Some(("rose".to_owned(), false)));
    put(&mut b, "/consumers/jack", 1, jack);
    assert_eq!(owner(&mut b), Some(("jack".to_owned(), false)), "jack is older");
    put(&mut b, "/consumers/rose/credentials/c", 3, json!({"plugins": {"key-auth": {"key": "k"}}}));
    assert_eq!(owner(&mut b), Some(("jack".to_owned(), false)));
    delete(&mut b, "/consumers/jack", 4);
    assert_eq!(owner(&mut b), Some(("rose".to_owned(), false)));
    delete(&mut b, "/consumers/rose", 5);
    assert_eq!(owner(&mut b), Some(("rose".to_owned(), true)));
    delete(&mut b, "/consumers/rose/credentials/c", 6);
    assert_eq!(owner(&mut b), None);
    assert!(b.contested.is_empty());
}

#[test]
fn global_rules_stand_in_order_of_creation_and_odd_keys_are_ignored() {
    let (mut b, _) = builder();
    for (id, revision) in [("b", 2), ("a", 3), ("c", 1)] {
        put(&mut b, &format!("/global_rules/{id}"), revision, json!({"plugins": {"key-auth": {}}}));
    }
    put(&mut b, "/data_plane/server_info/x", 4, json!({}));
    let s = b.take().unwrap();
    let ids: Vec<_> = s.global_rules.iter().map(|r| &*r.id).collect();
    assert_eq!((ids, s.errors.len()), (vec!["c", "b", "a"], 0));
    assert_ne!(s.global_rules_uid, 0);
    b.replace(Vec::new(), 5);
    assert_eq!(b.take().unwrap().global_rules_uid, 0);
}

#[test]
fn a_parser_that_panics_refuses_the_object() {
    let parser: Parser = Arc::new(|_, _, _| panic!("overlooked"));
    let mut b = Builder::new(parser, None, RouterKind::default(), false);
    put(&mut b, "/routes/1", 1, route("/a"));
    assert_eq!(b.take().unwrap().errors.len(), 1);
}

fn rss_kb() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
#[ignore = "measurement: cargo test --release --lib store::builder -- --ignored --nocapture"]
fn loads_100_000_routes() {
    let entries: Vec<_> = (0..100_000)
        .map(|i| entry(&format!("/routes/{i}"), i + 1, route(&format!("/api/v1/{}/{i}", i % 100))))
        .collect();
    let (mut b, _) = builder();
    let (before, start) = (rss_kb(), Instant::now());
    drop(parse_all(&b.parser, &entries));
    println!(
        "parsing alone: {:?}; a route is {} bytes, an upstream {}",
        start.elapsed(),
        size_of::<Object<Route>>(),
        size_of::<Upstream>()
    );
    let start = Instant::now();
    drop(b.replace(entries, 100_000));
    let s = b.take().unwrap();
    let took = start.elapsed();
    assert_eq!(s.routes.len(), 100_000);
    println!("100,000 routes: {took:?}, {} KB more RSS", rss_kb() - before);
    let start = Instant::now();
    for i in 0..1000 {
        put(&mut b, "/routes/5", 200_000 + i, route("/api/v1/changed"));
        b.take().unwrap();
    }
    println!("one change: {:?}", start.elapsed() / 1000);
}

#[test]
fn verdicts_are_remembered_up_to_a_number() {
    let (mut b, checks) = builder();
    for i in 0..MAX_CHECKED {
        b.check_plugin("key-auth", &i.to_string(), PluginSchema::Plugin).unwrap();
    }
    b.check_plugin("key-auth", "0", PluginSchema::Plugin).unwrap();
    assert_eq!((checks.get(), b.checked.len()), (MAX_CHECKED, MAX_CHECKED));
    let refused = b.check_plugin("key-auth", "bad", PluginSchema::Plugin).unwrap_err();
    assert_eq!(refused, "failed to check the configuration of plugin key-auth err: bad is not good");
    assert_eq!(b.checked.len(), 1);
    b.check_plugin("key-auth", "0", PluginSchema::Plugin).unwrap();
    assert_eq!(checks.get(), MAX_CHECKED + 2, "asked again");
}

/// What is logged on this thread.
#[derive(Clone, Default)]
struct Lines(Arc<std::sync::Mutex<Vec<String>>>);

impl tracing::field::Visit for Lines {
    fn record_debug(&mut self, _: &tracing::field::Field, value: &dyn std::fmt::Debug) {
        self.0.lock().unwrap().push(format!("{value:?}"));
    }
}

impl tracing::Subscriber for Lines {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        event.record(&mut self.clone());
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

#[test]
fn refusals_are_logged_up_to_a_number_and_all_are_shown() {
    let bad = |n: usize| (0..n).map(|i| entry(&format!("/routes/{i}"), 1, json!({"uri": 5}))).collect::<Vec<_>>();
    for more in [0, 2] {
        let (lines, (mut b, _)) = (Lines::default(), builder());
        tracing::subscriber::with_default(lines.clone(), || b.replace(bad(MAX_LOGGED + more), 1));
        let lines = lines.0.lock().unwrap();
        let refused = lines.iter().filter(|l| l.starts_with("failed to check item data of [routes]")).count();
        assert_eq!(refused, MAX_LOGGED, "{lines:?}");
        let rest = lines.iter().filter(|l| **l == "2 more objects were refused: see /v1/config/errors").count();
        assert_eq!((rest, lines.len()), (more / 2, MAX_LOGGED + more / 2), "{lines:?}");
        assert_eq!(b.take().unwrap().errors.len(), MAX_LOGGED + more);
    }
}

#[test]
fn plugins_that_do_not_load_any_more_are_nobodys_new_plugins() {
    let (checker, parser) = (Checker::default(), parser(Arc::new(Keyring::default()), None));
    let fails = checker.fails.clone();
    let mut b = Builder::new(parser, Some(Box::new(checker)), RouterKind::default(), true);
    put(&mut b, "/plugin_sources/mine", 1, json!({"source": "good"}));
    let loaded = b.plugins_generation();
    fails.set(true);
    b.reload_plugins();
    assert_eq!(b.plugins_generation(), loaded);
    let error = b.next.errors.get(RELOAD).map(|e| e.message.clone());
    assert!(error.as_ref().is_some_and(|e| e.contains("plugin [mine]: mine.lua:1: why")), "{error:?}");
    fails.set(false);
    b.reload_plugins();
    assert_eq!((b.plugins_generation(), b.next.errors.len()), (loaded + 1, 0));
}
