//! `ngx.balancer`: a script picks the node of the first try, and says how the request may be tried. It runs before the first try
//! only (before_proxy and what comes before it): none is asked between tries.

use std::time::Duration;

use crate::{
    error::Result,
    lua::{
        api::{Api, Phases, Stack, request},
        host::Answer,
    },
};

pub fn register(api: &mut Api) -> Result<()> {
    let phases = Phases::BALANCER | Phases::ACCESS | Phases::REWRITE;
    api.func("native.balancer.set_peer", phases, "set_peer(address, port): true; nil, err", set_peer)?;
    let doc = "set_more_tries(count): true, warning?; in place of the upstream's retries";
    api.func("native.balancer.set_more_tries", phases, doc, set_more_tries)?;
    let doc = "set_timeouts(connect?, send?, read?): true; seconds for this request; nil: as configured";
    api.func("native.balancer.set_timeouts", phases, doc, set_timeouts)?;
    let doc = "enable_keepalive(idle seconds?, requests?): true; 60 and 100 by default, 0: no limit";
    api.func("native.balancer.enable_keepalive", phases, doc, enable_keepalive)?;
    api.func(
        "native.balancer.set_upstream_tls",
        phases,
        "set_upstream_tls(on): true; TLS to the node or none",
        set_tls,
    )?;
    api.func("native.balancer.last_failure", phases, "last_failure(): nil, or \"failed\" and a status", |s| {
        match request()?.upstream.tries.last() {
            Some(last) if last.status >= 500 || last.status == 0 => {
                s.push_bytes("failed");
                s.push_number(last.status.into());
                Ok(2)
            }
            _ => Ok(s.push_nil()),
        }
    })
}

fn set_peer(s: &Stack) -> Answer {
    let (host, port) = (s.arg_str(1)?, s.arg_number(2)?);
    if host.trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_err() {
        return s.fail("no host allowed");
    }
    if !(1.0..65536.0).contains(&port) {
        return s.fail("bad port");
    }
    request()?.upstream.peer = Some((host.trim_matches(['[', ']']).into(), port as u16));
    Ok(s.push_bool(true))
}

/// nginx's own bound would be `proxy_next_upstream_tries`.
const MAX_MORE_TRIES: u32 = 255;

fn set_more_tries(s: &Stack) -> Answer {
    let count = s.arg_number(1)?;
    if !(0.0..).contains(&count) {
        return Err(s.argument_error(1, "bad count"));
    }
    let upstream = &mut request()?.upstream;
    upstream.more_tries = Some(count.min(f64::from(MAX_MORE_TRIES)) as u32);
    s.push_bool(true);
    if count <= f64::from(MAX_MORE_TRIES) {
        return Ok(1);
    }
    s.push_bytes("reduced tries due to limit");
    Ok(2)
}

/// The longest time that is taken as given: no sum of instants overflows.
const MAX_SECS: f64 = 365.0 * 86_400.0;

fn set_timeouts(s: &Stack) -> Answer {
    let mut timeouts = [None; 3];
    for ((i, name), timeout) in (1..).zip(["connect", "send", "read"]).zip(&mut timeouts) {
        *timeout = match s.opt_number(i)? {
            None => None,
            Some(secs) if secs > 0.0 => Some(Duration::from_secs_f64(secs.min(MAX_SECS))),
            Some(_) => return Err(format!("bad {name} timeout").into()),
        };
    }
    request()?.upstream.timeouts = timeouts;
    Ok(s.push_bool(true))
}

/// What lua-resty-core takes where nothing is given.
const IDLE_SECS: f64 = 60.0;
const REQUESTS: f64 = 100.0;

fn enable_keepalive(s: &Stack) -> Answer {
    let (idle, requests) = (s.opt_number(1)?.unwrap_or(IDLE_SECS), s.opt_number(2)?.unwrap_or(REQUESTS));
    if !(0.0..).contains(&idle) {
        return Err(s.argument_error(1, "bad idle timeout"));
    }
    if !(0.0..).contains(&requests) {
        return Err(s.argument_error(2, "bad number of requests"));
    }
    // 0 is no limit.
    let idle = if idle == 0.0 { MAX_SECS } else { idle.min(MAX_SECS) };
    let requests = if requests == 0.0 { u64::MAX } else { requests as u64 };
    request()?.upstream.keepalive = Some((Duration::from_secs_f64(idle), requests));
    Ok(s.push_bool(true))
}

fn set_tls(s: &Stack) -> Answer {
    let scheme: &[u8] = if s.boolean(1) { b"https" } else { b"http" };
    request()?.upstream.scheme = scheme.to_vec();
    Ok(s.push_bool(true))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{exchange::Phase, lua::host::tests::serve};

    #[test]
    fn picks_a_node_by_address() {
        let x = serve(|_| {}, "return tostring(require('ngx.balancer').set_current_peer('10.0.0.1', 80))", "true");
        assert_eq!(x.upstream.peer, Some(("10.0.0.1".into(), 80)));
        let x = serve(
            |_| {},
            "return select(2, require('ngx.balancer').set_current_peer('a.name', 80))",
            "no host allowed",
        );
        assert_eq!(x.upstream.peer, None);
    }

    #[test]
    fn tries_limits_and_keepalive_are_the_requests_own() {
        let x = serve(
            |_| {},
            "local b = require('ngx.balancer')
             assert(b.set_more_tries(2) and b.set_timeouts(0.5, nil, 3) and b.enable_keepalive() and b.recreate_request())
             assert(b.set_upstream_tls(true))
             return tostring(b.get_last_failure()) .. ' ' .. select('#', b.get_last_failure())",
            "nil 1",
        );
        let u = &x.upstream;
        assert_eq!((u.more_tries, u.keepalive), (Some(2), Some((Duration::from_secs(60), 100))));
        assert_eq!(u.timeouts, [Some(Duration::from_millis(500)), None, Some(Duration::from_secs(3))]);
        assert_eq!(u.scheme, b"https");
        let many = "local b = require('ngx.balancer') b.enable_keepalive(0, 0)
            local ok, err = b.set_more_tries(1e9) return tostring(ok) .. ' ' .. err";
        let x = serve(|_| {}, many, "true reduced tries due to limit");
        assert_eq!(x.upstream.more_tries, Some(MAX_MORE_TRIES));
        assert_eq!(x.upstream.keepalive, Some((Duration::from_secs_f64(MAX_SECS), u64::MAX)));
    }

    #[test]
    fn says_what_is_wrong_and_where_it_is_too_late() {
        for (call, expected) in [
            ("set_timeouts(0)", "bad connect timeout"),
            ("set_timeouts(nil, -1)", "bad send timeout"),
            ("set_timeouts(1, 1, 0/0)", "bad read timeout"),
            ("set_more_tries(-1)", "bad argument #1 to 'set_more_tries' (bad count)"),
            ("enable_keepalive(-1)", "bad argument #1 to 'enable_keepalive' (bad idle timeout)"),
            ("enable_keepalive(1, -1)", "bad argument #2 to 'enable_keepalive' (bad number of requests)"),
        ] {
            let (name, arguments) = call.split_once('(').expect("a call");
            let chunk =
                format!("return (select(2, pcall(require('ngx.balancer').{name}, {arguments}):gsub('^.-: ', ''))");
            serve(|_| {}, &chunk, expected);
        }
        let late = "return (select(2, pcall(require('ngx.balancer').set_more_tries, 1)):gsub('^.-: ', ''))";
        serve(|x| x.phase = Phase::Log, late, "API disabled in the context of log_by_lua*");
        serve(|_| {}, "return select(2, require('ngx.balancer').bind_to_local_addr('127.0.0.1'))", "not supported");
    }
}
