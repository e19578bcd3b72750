//! `ngx.balancer`: a script picks the peer of a try, and says how the request may be tried.
//!
//! Two kinds of scripts may: a location's `balancer_by_lua`, before each try, and plugins in what runs before the first one (rewrite,
//! access, before_proxy), where no try has failed yet. Elsewhere the functions answer `nil` and why, as lua-resty-core's do.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use mlua::ffi;

use crate::{
    error::Result,
    exchange::{Exchange, Phase},
    lua::{
        api::{Api, Phases, Raise, Stack, request},
        host::Answer,
    },
};

pub fn register(api: &mut Api) -> Result<()> {
    let any = Phases::ANY;
    let doc = "set_current_peer(address, port, name?): true; nil, err; name: for TLS, balancer_by_lua only";
    api.func("native.balancer.set_current_peer", any, doc, set_current_peer)?;
    let doc = "set_more_tries(count): true, warning?; nil, err; in place of the upstream's retries";
    api.func("native.balancer.set_more_tries", any, doc, set_more_tries)?;
    let doc = "set_timeouts(connect?, send?, read?): true; nil, err; seconds for this request; nil: as configured";
    api.func("native.balancer.set_timeouts", any, doc, set_timeouts)?;
    let doc = "enable_keepalive(idle seconds?, requests?): true; nil, err; 60 and 100 by default, 0: no limit";
    api.func("native.balancer.enable_keepalive", any, doc, enable_keepalive)?;
    let doc = "set_upstream_tls(on): true; nil, err; TLS to the node or none";
    api.func("native.balancer.set_upstream_tls", any, doc, set_tls)?;
    let doc = "bind_to_local_addr(address): true; nil, err; where connections come from, a port may follow";
    api.func("native.balancer.bind_to_local_addr", any, doc, bind)?;
    let doc = "recreate_request(): true; nil, err; each try is written anew anyway";
    api.func("native.balancer.recreate_request", any, doc, |s| match ahead()? {
        Ok(_) => Ok(s.push_bool(true)),
        Err(why) => s.fail(why),
    })?;
    let doc = "last_failure(): nil; \"next\" or \"failed\" and a status; nil, nil, err";
    api.func("native.balancer.last_failure", any, doc, last_failure)
}

/// The request, if a try of it is still ahead that the script may decide about; else why not.
fn ahead<'a>() -> Result<Result<&'a mut Exchange, &'static str>, Raise> {
    let x = request()?;
    let of_plugin = x.location.is_none() && (Phases::REWRITE | Phases::ACCESS).has(x.phase);
    Ok(match x.upstream.conf {
        _ if x.phase == Phase::Balancer || of_plugin => Ok(x),
        None => Err("no upstream found"),
        Some(_) => Err("API disabled in the current context"),
    })
}

fn set_current_peer(s: &Stack) -> Answer {
    let (host, port) = (s.arg_str(1)?, s.arg_number(2)?);
    let name = match s.kind(3) {
        ffi::LUA_TNONE | ffi::LUA_TNIL => None,
        ffi::LUA_TSTRING => Some(s.arg_str(3)?),
        _ => return Err(s.bad_argument(3, "string")),
    };
    let x = match ahead()? {
        Ok(x) => x,
        Err(why) => return s.fail(why),
    };
    let host = host.trim_matches(['[', ']']);
    if host.parse::<IpAddr>().is_err() {
        return s.fail("no host allowed");
    }
    if !(1.0..65536.0).contains(&port) {
        return s.fail("bad port");
    }
    x.upstream.peer = Some((host.into(), port as u16));
    if x.phase == Phase::Balancer {
        x.upstream.balancing.get_or_insert_default().tls_name = name.filter(|n| !n.is_empty()).map(|n| (*n).into());
    }
    Ok(s.push_bool(true))
}

/// More than this is asked of no request.
const MAX_MORE_TRIES: u32 = 255;

fn set_more_tries(s: &Stack) -> Answer {
    let count = s.arg_number(1)?;
    if !(0.0..).contains(&count) {
        return Err(s.argument_error(1, "bad count"));
    }
    let upstream = match ahead()? {
        Ok(x) => &mut x.upstream,
        Err(why) => return s.fail(why),
    };
    let most = upstream.balancing.as_ref().and_then(|b| b.most).unwrap_or(MAX_MORE_TRIES);
    upstream.more_tries = Some(count.min(f64::from(most)) as u32);
    s.push_bool(true);
    if count <= f64::from(most) {
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
        let secs = if s.kind(i) == ffi::LUA_TNUMBER { s.number(i) } else { None };
        *timeout = match secs {
            None if s.is_nil(i) => None,
            Some(secs) if secs > 0.0 => Some(Duration::from_secs_f64(secs.min(MAX_SECS))),
            _ => return Err(format!("bad {name} timeout").into()),
        };
    }
    match ahead()? {
        Ok(x) => x.upstream.timeouts = timeouts,
        Err(why) => return s.fail(why),
    }
    Ok(s.push_bool(true))
}

/// What lua-resty-core takes where nothing is given.
const IDLE_SECS: f64 = 60.0;
const REQUESTS: f64 = 100.0;

fn enable_keepalive(s: &Stack) -> Answer {
    let limit = |n, default: f64| match s.opt_number(n)?.unwrap_or(default) {
        given if given >= 0.0 => Ok(given),
        _ => Err(s.argument_error(n, "expected >= 0")),
    };
    let (idle, requests) = (limit(1, IDLE_SECS)?, limit(2, REQUESTS)?);
    let x = match ahead()? {
        Ok(x) if x.phase == Phase::Balancer && x.upstream.peer.is_none() => return s.fail("no current peer set"),
        Ok(x) => x,
        Err(why) => return s.fail(why),
    };
    // 0 is no limit.
    let idle = if idle == 0.0 { MAX_SECS } else { idle.min(MAX_SECS) };
    let requests = if requests == 0.0 { u64::MAX } else { requests as u64 };
    x.upstream.keepalive = Some((Duration::from_secs_f64(idle), requests));
    Ok(s.push_bool(true))
}

fn set_tls(s: &Stack) -> Answer {
    let scheme: &[u8] = if s.boolean(1) { b"https" } else { b"http" };
    match ahead()? {
        Ok(x) => x.upstream.scheme = scheme.to_vec(),
        Err(why) => return s.fail(why),
    }
    Ok(s.push_bool(true))
}

fn bind(s: &Stack) -> Answer {
    let text = s.arg_str(1)?;
    let x = match ahead()? {
        Ok(x) => x,
        Err(why) => return s.fail(why),
    };
    let address = text.trim_matches(['[', ']']).parse().map(|ip: IpAddr| SocketAddr::new(ip, 0));
    match address.or_else(|_| text.parse()) {
        Ok(local) => x.upstream.balancing.get_or_insert_default().local = Some(local),
        Err(_) => return s.fail(format!("{text:?} is no address")),
    }
    Ok(s.push_bool(true))
}

fn last_failure(s: &Stack) -> Answer {
    let x = match ahead()? {
        Ok(x) => x,
        Err(why) => {
            s.push_nil();
            return s.fail(why).map(|pushed| pushed + 1);
        }
    };
    let Some(failure) = x.upstream.balancing.as_ref().and_then(|b| b.last_failure) else { return Ok(s.push_nil()) };
    s.push_bytes(if failure.is_next { "next" } else { "failed" });
    s.push_number(failure.status.into());
    Ok(2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{exchange::Balancing, lua::host::tests::serve};

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
    fn says_what_is_wrong_with_an_argument() {
        for (call, expected) in [
            ("set_timeouts(0)", "bad connect timeout"),
            ("set_timeouts(nil, -1)", "bad send timeout"),
            ("set_timeouts(1, 1, 0/0)", "bad read timeout"),
            ("set_more_tries(-1)", "bad argument #1 to 'set_more_tries' (bad count)"),
            ("enable_keepalive(-1)", "bad argument #1 to 'enable_keepalive' (expected >= 0)"),
            ("enable_keepalive(1, -1)", "bad argument #2 to 'enable_keepalive' (expected >= 0)"),
            ("enable_keepalive(true)", "bad argument #1 to 'enable_keepalive' (number expected, got boolean)"),
            ("set_timeouts('1.2', 1, 1)", "bad connect timeout"),
            (
                "set_current_peer('127.0.0.1', 80, true)",
                "bad argument #3 to 'set_current_peer' (string expected, got boolean)",
            ),
            (
                "set_current_peer('127.0.0.1', 80, 0)",
                "bad argument #3 to 'set_current_peer' (string expected, got number)",
            ),
        ] {
            let (name, arguments) = call.split_once('(').expect("a call");
            let chunk =
                format!("return (select(2, pcall(require('ngx.balancer').{name}, {arguments}):gsub('^.-: ', ''))");
            serve(|_| {}, &chunk, expected);
        }
    }

    /// Each function, with arguments that are well.
    const CALLS: [&str; 8] = [
        "set_current_peer('127.0.0.1', 80)",
        "set_more_tries(1)",
        "set_timeouts(1, 1, 1)",
        "enable_keepalive()",
        "set_upstream_tls(true)",
        "bind_to_local_addr('127.0.0.1')",
        "recreate_request()",
        "get_last_failure()",
    ];

    #[test]
    fn where_no_try_is_ahead_they_say_why() {
        for call in CALLS {
            let chunk = format!(
                "local all = {{require('ngx.balancer').{call}}}
                 for i = 1, 3 do if type(all[i]) == 'string' then return tostring(all[1]) .. ' ' .. all[i] end end"
            );
            serve(|x| x.phase = Phase::Content, &chunk, "nil no upstream found");
            let late = |x: &mut Exchange| {
                x.phase = Phase::Log;
                x.upstream.conf = Some(crate::model::Upstream::of_nodes([]).into());
            };
            serve(late, &chunk, "nil API disabled in the current context");
            let of_location = |x: &mut Exchange| x.location = Some(location());
            serve(of_location, &chunk, "nil no upstream found");
        }
    }

    fn location() -> std::sync::Arc<crate::conf::locations::Location> {
        let config = "lua_locations: [{location: /t}]";
        let (config, _) = crate::conf::parse(std::path::Path::new("/"), config).expect("a configuration");
        config.locations.list[0].clone()
    }

    #[test]
    fn a_balancer_script_says_what_its_try_is() {
        let balancing = |x: &mut Exchange| {
            x.phase = Phase::Balancer;
            x.location = Some(location());
            let failure = crate::exchange::Failure { is_next: true, status: 404 };
            x.upstream.balancing =
                Some(Balancing { last_failure: Some(failure), most: Some(2), ..Balancing::default() }.into());
        };
        let x = serve(
            balancing,
            "local b = require('ngx.balancer')
             local state, status = b.get_last_failure()
             local early = select(2, b.enable_keepalive())
             assert(b.set_current_peer('[::1]:81', nil, 'a.test') and b.enable_keepalive())
             assert(b.bind_to_local_addr('127.0.0.1:9999') and b.recreate_request() and b.set_upstream_tls(false))
             return table.concat({state, status, early, select(2, b.set_more_tries(3)), select(2, b.bind_to_local_addr('x'))}, '|')",
            "next|404|no current peer set|reduced tries due to limit|\"x\" is no address",
        );
        let u = &x.upstream;
        assert_eq!((&u.peer, u.more_tries, &u.scheme[..]), (&Some(("::1".into(), 81)), Some(2), &b"http"[..]));
        let balancing = u.balancing.as_ref().expect("it is there");
        assert_eq!(balancing.tls_name.as_deref(), Some("a.test"));
        assert_eq!(balancing.local, "127.0.0.1:9999".parse().ok());
    }
}
