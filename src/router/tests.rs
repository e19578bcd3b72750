use std::{borrow::Cow, net::IpAddr, time::Instant};

use serde_json::{Value, json};

use super::*;
use crate::model::{Keyring, Kind, ParseContext, Parsed, next_uid, parse};

/// A request, and which `filter_func`s let it pass.
struct Request {
    host: Vec<u8>,
    path: Vec<u8>,
    method: &'static str,
    remote: IpAddr,
    filter: bool,
}

impl Request {
    fn new(host: &str, path: &str) -> Self {
        let remote = IpAddr::from([127, 0, 0, 1]);
        Request { host: host.into(), path: path.into(), method: "GET", remote, filter: true }
    }
}

impl Facts for Request {
    fn host(&self) -> &[u8] {
        &self.host
    }
    fn path(&self) -> &[u8] {
        &self.path
    }
    fn method(&self) -> &[u8] {
        self.method.as_bytes()
    }
    fn remote(&self) -> IpAddr {
        self.remote
    }
    fn var(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        (name == "request_method").then(|| self.method.as_bytes().into())
    }
    fn filter(&self, _: &Arc<Object<Route>>) -> bool {
        self.filter
    }
}

fn boxed(list: &[&str]) -> Vec<Box<str>> {
    list.iter().map(|s| Box::from(*s)).collect()
}

/// A route whose id is also its place in the order of creation.
fn route_with(id: u32, uris: &[&str], hosts: &[&str], change: impl FnOnce(&mut Route)) -> Arc<Object<Route>> {
    let mut value = Route { enabled: true, hosts: boxed(hosts), ..Route::default() };
    value.uris = boxed(uris).into();
    change(&mut value);
    let (create_revision, mod_revision) = (i64::from(id), i64::from(id));
    Arc::new(Object {
        id: id.to_string().into(),
        uid: next_uid(),
        create_revision,
        mod_revision,
        json: "{}".into(),
        value,
    })
}

fn route(id: u32, uri: &str, host: &str) -> Arc<Object<Route>> {
    let hosts = if host.is_empty() { vec![] } else { vec![host] };
    route_with(id, &[uri], &hosts, |_| ())
}

fn router(kind: RouterKind, routes: impl IntoIterator<Item = Arc<Object<Route>>>) -> Router {
    let mut router = Router::new(kind);
    for route in routes {
        router.insert(route, &[]);
    }
    router
}

/// The id of the route found; 0 for none.
fn find(router: &Router, request: &Request) -> u32 {
    router.find(request).map_or(0, |found| found.route().id.parse().unwrap())
}

fn check(router: &Router, cases: &[(&str, &str, u32)]) {
    for (host, path, expected) in cases {
        assert_eq!(find(router, &Request::new(host, path)), *expected, "{host} {path}");
    }
}

use RouterKind::{RadixtreeHostUri, RadixtreeUri, RadixtreeUriWithParameter};
const KINDS: [RouterKind; 3] = [RadixtreeHostUri, RadixtreeUri, RadixtreeUriWithParameter];

#[test]
fn exact_before_prefix_and_longer_before_shorter() {
    let routes = [
        route(1, "/blog/foo/*", ""),
        route(2, "/blog/foo/a/*", ""),
        route(3, "/blog/foo/c/*", ""),
        route(4, "/blog/foo/bar", ""),
        route(5, "/pre*", ""),
    ];
    for kind in KINDS {
        let cases = [
            ("", "/blog/foo/bar", 4),
            ("", "/blog/foo/a/b/c", 2),
            ("", "/blog/foo/c/d", 3),
            ("", "/blog/foo/gloo", 1),
            ("", "/blog/foo/", 1),
            ("", "/blog/foo", 0),
            ("", "/blog/bar", 0),
            ("", "/pre", 5),
            ("", "/prefix/x", 5),
            ("", "/pr", 0),
            ("", "", 0),
        ];
        check(&router(kind, routes.clone()), &cases);
    }
}

#[test]
fn priority_decides_within_a_path_only() {
    let prior = |id, uri, priority| route_with(id, &[uri], &[], |r| r.priority = priority);
    for kind in KINDS {
        let routes = [prior(1, "/a", 1), prior(2, "/a", 3), prior(3, "/a", 2), prior(4, "/*", 9), prior(5, "/a*", -1)];
        check(&router(kind, routes), &[("", "/a", 2), ("", "/ab", 5), ("", "/b", 4)]);
        let same = [route(12, "/a", ""), route(3, "/a", ""), route(7, "/a", "")];
        check(&router(kind, same), &[("", "/a", 3)]);
    }
}

#[test]
fn hosts_lead_in_the_default_kind() {
    let routes = [
        route(1, "/*", "*.test.com"),
        route(2, "/server_port", ""),
        route(3, "/server_port", "www.test.com"),
        route(4, "/x", "*.a.test.com"),
        route(5, "/*", "*"),
    ];
    let cases = [
        ("www.test.com", "/server_port", 3),
        ("ww.test.com", "/server_port", 1),
        ("www.test.com", "/other", 1),
        (".test.com", "/other", 1),
        ("test.com", "/server_port", 5),
        ("b.a.test.com", "/x", 4),
        ("b.a.test.com", "/y", 1),
        ("", "/server_port", 5),
    ];
    check(&router(RadixtreeHostUri, routes.clone()), &cases);
    // With the uri as the only index the exact path comes first, whatever the host.
    let cases = [("ww.test.com", "/server_port", 2), ("www.test.com", "/server_port", 2), ("ww.test.com", "/o", 1)];
    check(&router(RadixtreeUri, routes), &cases);
}

#[test]
fn a_refused_candidate_leaves_the_turn_to_the_next() {
    let filtered = route_with(1, &["/*"], &["*.test.com"], |r| r.filter_func = Some("function() end".into()));
    let router = router(RadixtreeHostUri, [filtered, route(2, "/a", "")]);
    let mut request = Request::new("www.test.com", "/a");
    assert_eq!(find(&router, &request), 1);
    request.filter = false;
    assert_eq!(find(&router, &request), 2);
}

#[test]
fn vars_are_a_condition() {
    let vars = Expr::compile(&serde_json::json!([["request_method", "==", "POST"]])).unwrap();
    let post = route_with(1, &["/a"], &[], |r| r.vars = Some(Box::new(vars)));
    let router = router(RadixtreeHostUri, [post, route(2, "/*", "")]);
    let mut request = Request::new("", "/a");
    assert_eq!(find(&router, &request), 2);
    request.method = "POST";
    assert_eq!(find(&router, &request), 1);
}

#[test]
fn methods_and_addresses_are_conditions() {
    let get = route_with(1, &["/a"], &[], |r| assert!(r.methods.insert("GET")));
    let near = route_with(2, &["/a"], &[], |r| {
        r.remote_addrs =
            vec!["192.0.0.0/8".parse().unwrap(), "127.0.0.3/32".parse().unwrap(), "fd00::/8".parse().unwrap()]
    });
    for kind in KINDS {
        let router = router(kind, [get.clone(), near.clone()]);
        let mut request = Request::new("", "/a");
        assert_eq!(find(&router, &request), 1);
        for (method, remote, expected) in [
            ("HEAD", "192.168.1.100", 2),
            ("HEAD", "::ffff:127.0.0.3", 2),
            ("HEAD", "fd00::1", 2),
            ("HEAD", "127.0.0.1", 0),
            ("get", "127.0.0.1", 0),
            ("GET", "127.0.0.1", 1),
        ] {
            request.method = method;
            request.remote = remote.parse().unwrap();
            assert_eq!(find(&router, &request), expected, "{method} from {remote}");
        }
    }
}

#[test]
fn parameters_are_captured_and_others_get_their_turn() {
    let routes = [
        route(1, "/name/:name/bar", ""),
        route(2, "/name/*", ""),
        route(3, "/name/json/bar", ""),
        route(4, "/u/:user/*action", "*.test.com"),
    ];
    let router = router(RadixtreeUriWithParameter, routes);
    let cases = [("", "/name/x/bar", 1), ("", "/name/x/baz", 2), ("", "/name/json/bar", 3), ("", "/u/a/b", 0)];
    check(&router, &cases);
    let found = router.find(&Request::new("www.test.com", "/u/jo/get/it")).unwrap();
    assert_eq!((found.path_pattern(), found.host_pattern()), ("/u/:user/*action", Some("*.test.com")));
    let params: Vec<_> = found.params().map(|(name, value)| (name, std::str::from_utf8(value).unwrap())).collect();
    assert_eq!(params, [("user", "jo"), ("action", "get/it")]);
}

#[test]
fn patterns_that_matched_are_told() {
    for kind in KINDS {
        let both = route_with(1, &["/a", "/b/*"], &["foo.com", "*.bar.com"], |_| ());
        let router = router(kind, [both, route(2, "/c", "")]);
        let patterns = |host, path| {
            let found = router.find(&Request::new(host, path)).unwrap();
            (found.path_pattern().to_owned(), found.host_pattern().map(str::to_owned))
        };
        assert_eq!(patterns("foo.com", "/a"), ("/a".into(), Some("foo.com".into())));
        assert_eq!(patterns("x.bar.com", "/b/c"), ("/b/*".into(), Some("*.bar.com".into())));
        assert_eq!(patterns("x.bar.com", "/c"), ("/c".into(), None));
    }
}

#[test]
fn hosts_of_the_service_hold_for_routes_without() {
    for kind in KINDS {
        let mut router = Router::new(kind);
        router.insert(route(1, "/a", ""), &boxed(&["Bar.com"]));
        router.insert(route(2, "/a", "foo.com"), &boxed(&["bar.com"]));
        check(&router, &[("bar.com", "/a", 1), ("foo.com", "/a", 2), ("x.com", "/a", 0)]);
        router.insert(route(1, "/a", ""), &boxed(&["x.com"]));
        check(&router, &[("bar.com", "/a", 0), ("foo.com", "/a", 2), ("x.com", "/a", 1)]);
    }
}

#[test]
fn a_disabled_route_is_not_found() {
    let mut router = router(RadixtreeHostUri, [route(1, "/a", "")]);
    router.insert(route_with(1, &["/a"], &[], |r| r.enabled = false), &[]);
    check(&router, &[("", "/a", 0)]);
    assert!(router.is_empty() && !router.remove("1"));
}

#[test]
fn any_bytes_may_ask() {
    let routes = [route(1, "/a/:x/*y", ""), route(2, "/*", "*.com"), route(3, "/a", "a.com")];
    let mut random = Random(7);
    for kind in KINDS {
        let router = router(kind, routes.clone());
        for _ in 0..5_000 {
            let mut bytes = |start: &[u8]| {
                let length = random.below(40);
                start.iter().copied().chain((0..length).map(|_| random.next() as u8)).collect::<Vec<_>>()
            };
            let mut request = Request::new("", "");
            request.path = bytes(b"/a/");
            request.host = bytes(b"");
            request.host.extend_from_slice(b".com");
            assert!(router.find(&request).is_some() || kind != RadixtreeHostUri);
        }
        let long = "/a/".repeat(10_000);
        let _ = router.find(&Request::new(&"a.".repeat(10_000), &long));
    }
}

/// xorshift64*: the same numbers for the same seed, everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 16
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn one_of<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.below(of.len() as u64) as usize]
    }
}

/// The rules of the documentation, applied to one route after the other.
fn naive(kind: RouterKind, routes: &[Arc<Object<Route>>], request: &Request) -> u32 {
    let host = String::from_utf8(request.host.clone()).unwrap();
    let path = String::from_utf8(request.path.clone()).unwrap();
    let mut best: Option<(Vec<i64>, u32)> = None;
    for route in routes.iter().filter(|r| r.value.enabled && r.value.methods.allows(request.method.as_bytes())) {
        let hosts = match route.value.hosts.is_empty() {
            true => vec![0],
            false => route.value.hosts.iter().filter_map(|p| naive_host(p, &host)).collect(),
        };
        for host_rank in hosts {
            for (path_rank, length) in route.value.uris.iter().filter_map(|uri| naive_path(kind, uri, &path)) {
                let host_rank = if kind == RadixtreeHostUri { host_rank } else { 0 };
                let id: i64 = route.id.parse().unwrap();
                let rank = vec![host_rank, path_rank, route.value.priority, length, -id];
                if best.as_ref().is_none_or(|(known, _)| rank > *known) {
                    best = Some((rank, id as u32));
                }
            }
        }
    }
    best.map_or(0, |(_, id)| id)
}

fn naive_host(pattern: &str, host: &str) -> Option<i64> {
    match pattern.strip_prefix('*') {
        Some(suffix) => host.ends_with(suffix).then_some(1 + suffix.len() as i64),
        None => (pattern == host).then_some(1000),
    }
}

/// How specific a match is, and the uri's length, which counts after priority.
fn naive_path(kind: RouterKind, uri: &str, path: &str) -> Option<(i64, i64)> {
    let length = uri.len() as i64;
    if kind == RadixtreeUriWithParameter && uri.contains(':') {
        let (wanted, given): (Vec<_>, Vec<_>) = (uri.split('/').collect(), path.split('/').collect());
        let fits = |(w, g): (&&str, &&str)| if w.starts_with(':') { !g.is_empty() } else { w == g };
        let matches = wanted.len() == given.len() && wanted.iter().zip(&given).all(fits);
        return matches.then_some((uri.find(':')? as i64, length));
    }
    match uri.strip_suffix('*') {
        Some(prefix) => path.starts_with(prefix).then_some((prefix.len() as i64, length)),
        None => (uri == path).then_some((1000, length)),
    }
}

fn random_route(random: &mut Random) -> Arc<Object<Route>> {
    const HOSTS: [&str; 7] = ["a.com", "b.a.com", "*.a.com", "*.b.a.com", "*.com", "c.com", "*com"];
    const SEGMENTS: [&str; 5] = ["a", "b", "ab", ":p", ":q"];
    let id = 1 + random.below(200) as u32;
    let uris: Vec<String> = (0..1 + random.below(2))
        .map(|_| {
            let mut uri: String = (0..1 + random.below(3)).map(|_| format!("/{}", random.one_of(&SEGMENTS))).collect();
            if !uri.contains(':') {
                uri.push_str(random.one_of(&["", "", "*", "/*"]));
            }
            uri
        })
        .collect();
    let uris: Vec<&str> = uris.iter().map(String::as_str).collect();
    let hosts: Vec<&str> = (0..random.below(3)).map(|_| random.one_of(&HOSTS)).collect();
    route_with(id, &uris, &hosts, |r| {
        r.priority = random.below(3) as i64;
        r.enabled = random.below(10) > 0;
        if random.below(3) == 0 {
            r.methods.insert(random.one_of(&["GET", "POST"]));
        }
    })
}

fn random_request(random: &mut Random) -> Request {
    let path: String =
        (0..1 + random.below(4)).map(|_| format!("/{}", random.one_of(&["a", "b", "ab", "", ":p"]))).collect();
    let host = random.one_of(&["a.com", "b.a.com", "x.b.a.com", "c.com", "d.com", "", "com"]);
    let mut request = Request::new(host, &path);
    request.method = random.one_of(&["GET", "POST", "HEAD"]);
    request
}

#[test]
fn finds_what_a_linear_search_finds_also_after_changes() {
    for kind in KINDS {
        for seed in 1..=20 {
            let mut random = Random(seed);
            let mut router = Router::new(kind);
            let mut routes: Vec<Arc<Object<Route>>> = Vec::new();
            for round in 0..150 {
                let _keeps_the_old_version = router.clone();
                let new = random_route(&mut random);
                routes.retain(|r| r.id != new.id);
                if random.below(4) == 0 {
                    router.remove(&new.id);
                } else {
                    router.insert(new.clone(), &[]);
                    routes.push(new);
                }
                let rebuilt = self::router(kind, routes.iter().cloned());
                assert_eq!(router.len(), rebuilt.len());
                for _ in 0..10 {
                    let request = random_request(&mut random);
                    let expected = naive(kind, &routes, &request);
                    let scene = format!("{kind:?} seed {seed} round {round} {request:?}");
                    assert_eq!(find(&router, &request), expected, "{scene}");
                    assert_eq!(find(&rebuilt, &request), expected, "{scene}, rebuilt");
                }
            }
            for route in &routes {
                router.remove(&route.id);
            }
            assert!(router.hashed.len() == 0 && router.hosts.is_empty() && router.wildcards.is_empty());
            assert!(
                router.any.prefixes.is_empty()
                    && router.any.folders.is_empty()
                    && router.any.exact.is_empty()
                    && router.any.rules == 0
            );
        }
    }
}

#[test]
fn an_old_version_serves_on_unchanged() {
    let routes = || (1..=300).map(|i| route(i, &format!("/r{i}/*"), if i % 2 == 0 { "a.com" } else { "*.b.com" }));
    let old = router(RadixtreeHostUri, routes());
    let mut new = old.clone();
    for i in 1..=300 {
        new.remove(&i.to_string());
    }
    assert!(new.is_empty());
    for i in 1..=300 {
        let request = Request::new(if i % 2 == 0 { "a.com" } else { "x.b.com" }, &format!("/r{i}/x"));
        assert_eq!((find(&old, &request), find(&new, &request)), (i, 0));
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = String::from_utf8_lossy;
        write!(f, "{} {} {}", self.method, text(&self.host), text(&self.path))
    }
}

#[test]
#[ignore = "a measurement, for release builds: prints nanoseconds"]
fn measure() {
    for count in [10_000, 100_000] {
        for kind in KINDS {
            measure_kind(kind, count);
        }
    }
}

fn measure_kind(kind: RouterKind, count: u32) {
    let uri = |i: u32| match i % 3 {
        0 => format!("/service{}/items/{i}", i % 100),
        1 => format!("/service{}/files/{i}/*", i % 100),
        _ if kind == RadixtreeUriWithParameter => format!("/service{}/users{i}/:id", i % 100),
        _ => format!("/service{}/users/{i}", i % 100),
    };
    let host = |i: u32| match i % 4 {
        0 => format!("h{}.example.com", i % 1000),
        1 => format!("*.w{}.example.com", i % 50),
        _ => String::new(),
    };
    let routes: Vec<_> = (1..=count).map(|i| route(i, &uri(i), &host(i))).collect();
    let requests: Vec<_> = (1..=count)
        .map(|i| Request::new(&host(i).replace('*', "x"), &uri(i).replace('*', "some/file.txt").replace(":id", "42")))
        .collect();
    let resident = || {
        std::fs::read_to_string("/proc/self/statm").unwrap().split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
    };
    let before = resident();
    let started = Instant::now();
    let mut router = self::router(kind, routes.iter().cloned());
    println!("resident {} KB", (resident() - before) / 1024);
    let built = started.elapsed();
    let mut random = Random(1);
    let order: Vec<usize> = (0..1_000_000).map(|_| random.below(count.into()) as usize).collect();
    let started = Instant::now();
    let found = order.iter().filter(|i| router.find(&requests[**i]).is_some()).count();
    let lookup = started.elapsed() / 1_000_000;
    assert_eq!(found, order.len());
    let started = Instant::now();
    let hot = (0..1_000_000).filter(|i| router.find(&requests[i % 64]).is_some()).count();
    let hot = (hot == order.len()).then(|| started.elapsed() / 1_000_000);
    let started = Instant::now();
    for i in &order[..1000] {
        let old = router.clone();
        router.insert(routes[*i].clone(), &[]);
        drop(old);
    }
    let change = started.elapsed() / 1000;
    println!("{kind:?} {count}: build {built:?}, lookup {lookup:?}, of 64 {hot:?}, change {change:?}");
}

#[test]
fn the_index_grows_and_shrinks_with_its_rules() {
    let count = 5000;
    let mut router = router(RadixtreeHostUri, (1..=count).map(|i| route(i, &format!("/r{i}"), "")));
    let (pages, groups) = router.hashed.size();
    assert!(
        (count as usize / 16..count as usize / 4).contains(&pages) && groups == pages.div_ceil(128),
        "{pages} {groups}"
    );
    let full = router.clone();
    for i in 1..count {
        assert!(router.remove(&i.to_string()));
        if i % 500 == 0 {
            let at = |i: u32| Request::new("a.com", &format!("/r{i}"));
            assert_eq!((find(&router, &at(i)), find(&router, &at(i + 1)), find(&full, &at(i))), (0, i + 1, i));
        }
    }
    assert!(router.hashed.size().0 <= 2 && router.hashed.size().1 == 1 && router.hashed.len() == 1);
    assert_eq!(find(&router, &Request::new("a.com", "/r5000")), 5000);
    assert!(full.hashed.size() == (pages, groups) && (1..=count).all(|i| full.clone().remove(&i.to_string())));
}

#[test]
fn what_is_expected_may_not_be_there() {
    let routes = (1..=2 * MANY as u32).map(|i| route(i, &format!("/r{i}/:id"), if i % 3 == 0 { "a.com" } else { "" }));
    for kind in KINDS {
        let router = router(kind, routes.clone().chain([route(9999, "/x", "a.com")]));
        for path in ["", "*", "/", "/x", "/r2/5", "/r3/5", "//////", "/%2e%2e/\u{0}", &"/a".repeat(5000)] {
            router.expect(|| path.as_bytes());
            router.expect_soon(b"a.com", path.as_bytes());
            router.expect_soon(b"", path.as_bytes());
        }
        Router::new(kind).expect(|| b"/x");
    }
}

/// What a route's JSON says.
fn parsed(json: &Value) -> Parsed {
    let keyring = Keyring::default();
    parse(Kind::Route, "1", &json.to_string(), &ParseContext::new(&keyring)).unwrap_or_else(|_| panic!("{json}"))
}

#[test]
fn a_route_is_plain_when_it_has_nothing_but_its_upstream() {
    let upstream = json!({"type": "roundrobin", "nodes": {"127.0.0.1:80": 1}});
    let plain = |more: Value| {
        let mut json = json!({"uri": "/x", "upstream": upstream});
        for (key, value) in more.as_object().expect("a map") {
            json[key] = value.clone();
        }
        let Parsed::Route(value) = parsed(&json) else { panic!("{json}") };
        rule::is_plain(&value)
    };
    assert!(plain(json!({})));
    assert!(plain(json!({"methods": ["GET"], "hosts": ["a.com"], "priority": 5, "name": "n"})));
    for more in [
        json!({"service_id": "1"}),
        json!({"upstream_id": "1"}),
        json!({"plugin_config_id": "1"}),
        json!({"plugins": {"echo": {"body": "x"}}}),
        json!({"timeout": {"connect": 1, "send": 1, "read": 1}}),
        json!({"script": "local _M = {} return _M"}),
        json!({"function_id": "f"}),
        json!({"upstream": {"type": "roundrobin", "discovery_type": "dns", "service_name": "a"}}),
    ] {
        assert!(!plain(more.clone()), "{more}");
    }
}
