//! What of a head goes on: fields that are dropped, what is refused with it, types that are completed.

use bytes::Bytes;
use http::Request;
use http_body_util::Full;

use super::*;
use crate::support::http2;

fn with_http(http: Value) -> Gateway {
    Gateway::with(json!({"nginx_config": {"http": http}}))
}

/// A request over HTTP/2 with a body and fields.
fn over_http2(gw: &Gateway, method: &str, fields: &[(&str, &str)], body: &'static str) -> Reply {
    let mut request = Request::builder().method(method).uri(format!("http://{}/x", gw.proxy()));
    for (name, value) in fields {
        request = request.header(*name, *value);
    }
    http2::ask(&gw.proxy(), request.body(Full::new(Bytes::from_static(body.as_bytes()))).expect("a request"))
}

#[test]
fn fields_with_an_underscore_go_on_unless_they_are_off() {
    let up = Upstream::echo();
    let fields = [("x_y", "1"), ("x-z", "2"), ("content_length", "9"), ("_", "3")];
    for (off, passed) in [(false, vec!["x_y", "x-z", "content_length", "_"]), (true, vec!["x-z"])] {
        let gw = with_http(json!({"underscores_in_headers": if off { "off" } else { "on" }}));
        gw.route("1", "/x", &up, json!({}));
        let seen = || {
            let last = up.last();
            fields.map(|(name, _)| name).into_iter().filter(|name| last.header(name).is_some()).collect::<Vec<_>>()
        };
        assert_eq!(gw.send("POST", "/x", &fields, b"body").status, 200);
        assert_eq!((seen(), up.last().body), (passed.clone(), b"body".to_vec()));
        assert_eq!(over_http2(&gw, "POST", &fields, "body").status, 200);
        assert_eq!((seen(), up.last().body), (passed, b"body".to_vec()));
        let told = |field: &str| {
            let line = format!(
                "client sent invalid header line: \"{field}: ...\" while reading client request headers, client: "
            );
            gw.log().lines().filter(|l| l.contains("[info]") && l.contains(&line)).count()
        };
        let twice = if off { 2 } else { 0 };
        eventually("a line for each that was dropped", || {
            (["x_y", "content_length", "_"].map(told) == [twice; 3]).then_some(())
        });
        assert_eq!(told("x-z"), 0);
        assert!(!gw.log().contains("x_y: 1"), "its value is nobody's business");
    }
}

#[test]
fn a_body_that_says_that_it_is_too_large_is_an_error_of_the_log() {
    let gw = Gateway::with(json!({"nginx_config": {"error_log_level": "error", "http": {"client_max_body_size": 5}}}));
    let up = Upstream::echo();
    gw.route("1", "/x", &up, json!({}));
    assert_eq!((gw.send("POST", "/x", &[], b"12345").status, over_http2(&gw, "POST", &[], "12345").status), (200, 200));
    let told = || {
        let log = gw.log();
        log.lines()
            .filter(|l| l.contains("[error]") && l.contains("client intended to send too large body: 6 bytes, "))
            .count()
    };
    assert_eq!(told(), 0);
    assert_eq!(gw.send("POST", "/x", &[], b"123456").status, 413);
    eventually("the line", || (told() == 1).then_some(()));
    assert_eq!(over_http2(&gw, "POST", &[], "123456").status, 413);
    eventually("another line", || (told() == 2).then_some(()));
    assert_eq!(up.seen().len(), 2, "nothing of it went on");
}

/// Answers with the type that the query says, if any.
fn typed() -> Upstream {
    Upstream::answering(|seen| {
        let kind = seen.target.split_once('?').map(|(_, kind)| format!("Content-Type: {}\r\n", kind.replace('+', " ")));
        format!("HTTP/1.1 200 OK\r\n{}Content-Length: 2\r\n\r\nok", kind.unwrap_or_default())
    })
}

#[test]
fn texts_that_do_not_say_their_charset_have_the_configured_one() {
    let up = typed();
    for (charset, named) in [(json!("utf-8"), "; charset=utf-8"), (json!("gbk"), "; charset=gbk"), (json!("off"), "")] {
        let gw = with_http(json!({"charset": charset}));
        gw.route("plain", "/plain", &up, json!({}));
        gw.route("filtered", "/filtered", &up, json!({"response-rewrite": {"headers": {"set": {"X-A": "b"}}}}));
        gw.route("own", "/own", &up, json!({"response-rewrite": {"headers": {"set": {"Content-Type": "text/xml"}}}}));
        for path in ["/plain", "/filtered"] {
            let kind = |query: &str| {
                let reply = gw.get(&format!("{path}{query}"));
                assert_eq!((reply.status, reply.text().as_str()), (200, "ok"));
                reply.header("content-type").map(str::to_owned)
            };
            assert_eq!(kind("?text/html"), Some(format!("text/html{named}")), "{path}");
            for kept in ["text/html;+charset=latin1", "application/json", "image/png"] {
                assert_eq!(kind(&format!("?{kept}")), Some(kept.replace('+', " ")), "{path}");
            }
            assert_eq!(kind(""), None, "{path}");
        }
        assert_eq!(gw.get("/own").header("content-type"), Some(&*format!("text/xml{named}")));
        let reply = http2::get(&gw.proxy(), "/plain?text/plain");
        assert_eq!(reply.header("content-type"), Some(&*format!("text/plain{named}")));
        let reply = gw.get("/nowhere");
        assert_eq!((reply.status, reply.header("content-type")), (404, Some("text/plain; charset=utf-8")), "its own");
    }
}

#[test]
fn a_charset_is_taken_over_by_a_reload() {
    let mut gw = with_http(json!({}));
    let up = typed();
    gw.route("1", "/x", &up, json!({}));
    let kind = |gw: &Gateway| gw.get("/x?text/html").header("content-type").map(str::to_owned);
    assert_eq!(kind(&gw).as_deref(), Some("text/html; charset=utf-8"));
    gw.dir.configure(json!({"nginx_config": {"http": {"charset": "gbk"}}}));
    gw.signal(libc::SIGHUP);
    eventually("the new charset", || (kind(&gw).as_deref() == Some("text/html; charset=gbk")).then_some(()));
    assert!(gw.quit().success());
}
