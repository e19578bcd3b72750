//! `ngx.balancer`: a script picks the node of the next try.

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

#[cfg(test)]
mod tests {
    use crate::lua::host::tests::serve;

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
}
