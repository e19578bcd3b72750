//! What of a head goes on: fields that are dropped.

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
            let line =
                format!("client sent invalid header line: \"{field}\" while reading client request headers, client: ");
            gw.log().lines().filter(|l| l.contains("[info]") && l.contains(&line)).count()
        };
        let twice = if off { 2 } else { 0 };
        eventually("a line for each that was dropped", || {
            (["x_y: 1", "content_length: 9", "_: 3"].map(told) == [twice; 3]).then_some(())
        });
        assert_eq!(told("x-z: 2"), 0);
    }
}
