//! Walk 1: one command, and it says where it is; the verbs; draining.

use std::os::unix::fs::PermissionsExt;

use serde_json::json;

use crate::support::{Client, Dir, Gateway, Upstream, eventually, run};

#[test]
fn starts_without_a_configuration_file_and_says_what_to_do_next() {
    let gw = Gateway::start();
    let banner = eventually("the banner", || Some(gw.dir.read("logs/stdout")).filter(|s| s.contains("X-API-KEY")));
    for expected in [gw.proxy(), gw.admin_address(), gw.control(), "embedded".into(), "data/admin_key".into()] {
        assert!(banner.contains(&expected), "{expected} in {banner}");
    }
    assert_eq!(gw.get("/").status, 404);
    assert_eq!(gw.get("/").json(), json!({"error_msg": "404 Route Not Found"}));
}

#[test]
fn the_admin_key_is_generated_once_and_only_its_owner_reads_it() {
    let mut gw = Gateway::start();
    let key = gw.key();
    assert!(key.len() >= 32, "{key}");
    let mode = std::fs::metadata(gw.dir.join("data/admin_key")).expect("the key file").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    gw.quit();
    gw.launch();
    assert_eq!(gw.key(), key);
}

#[test]
fn test_prints_every_mistake_at_once_and_exits_1() {
    let dir = Dir::new();
    dir.write(
        "conf/config.yaml",
        "apisix:\n  node_listen: [99999]\n  router: {http: nonsense}\ndeployment:\n  role: king\nnginx_config:\n  \
         http_server_configuration_snippet: 'x y;'\n",
    );
    let mut command = dir.command();
    command.arg("test");
    let (status, text) = run(command);
    assert_eq!(status.code(), Some(1), "{text}");
    for path in ["apisix.node_listen", "apisix.router.http", "deployment.role", "http_server_configuration_snippet"] {
        assert!(text.contains(path), "{path} in {text}");
    }
}

#[test]
fn test_accepts_a_good_configuration() {
    let dir = Dir::new();
    dir.configure(json!({}));
    let mut command = dir.command();
    command.arg("test");
    let (status, text) = run(command);
    assert!(status.success(), "{text}");
}

#[test]
fn an_unsupported_key_becomes_a_warning_when_it_is_named() {
    let dir = Dir::new();
    dir.configure(json!({
        "apisix": {"allow_unsupported": ["nginx_config.http_server_configuration_snippet"]},
        "nginx_config": {"http_server_configuration_snippet": "x y;"},
    }));
    let mut command = dir.command();
    command.arg("test");
    let (status, text) = run(command);
    assert!(status.success(), "{text}");
    assert!(text.contains("http_server_configuration_snippet"), "{text}");
}

#[test]
fn version_and_help_say_what_they_should() {
    let dir = Dir::new();
    let mut command = dir.command();
    command.arg("version");
    let (status, text) = run(command);
    assert!(status.success() && text.contains(env!("CARGO_PKG_VERSION")), "{text}");
    let mut command = dir.command();
    command.arg("help");
    let (status, text) = run(command);
    assert!(status.success(), "{text}");
    for verb in ["start", "stop", "quit", "reload", "restart", "test", "version"] {
        assert!(text.contains(verb), "{verb} in {text}");
    }
}

#[test]
fn quit_finishes_the_request_in_flight_and_refuses_new_ones() {
    let (release, hold) = std::sync::mpsc::channel::<()>();
    let hold = std::sync::Mutex::new(hold);
    let up = Upstream::answering(move |_| {
        hold.lock().expect("one request").recv().expect("released");
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfinal"
    });
    let mut gw = Gateway::start();
    gw.route("1", "/slow", &up, json!({}));
    let proxy = gw.proxy();
    let mut client = Client::connect(&proxy);
    client.send("GET", "/slow", &[], b"");
    eventually("the upstream has it", || (!up.seen().is_empty()).then_some(()));
    gw.signal(libc::SIGQUIT);
    eventually("new connections are refused", || std::net::TcpStream::connect(&proxy).err());
    release.send(()).expect("the upstream waits");
    let reply = client.reply("GET");
    assert_eq!((reply.status, reply.text().as_str()), (200, "final"));
    assert!(gw.wait().success());
}

#[test]
fn usr1_reopens_the_logs() {
    let gw = Gateway::start();
    gw.get("/before");
    eventually("access.log is written", || gw.dir.read("logs/access.log").contains("/before").then_some(()));
    std::fs::rename(gw.dir.join("logs/access.log"), gw.dir.join("logs/access.log.1")).expect("rotated");
    gw.signal(libc::SIGUSR1);
    eventually("access.log is there again", || {
        gw.get("/after");
        gw.dir.read("logs/access.log").contains("/after").then_some(())
    });
    assert!(!gw.dir.read("logs/access.log").contains("/before"));
}
