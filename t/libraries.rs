//! OpenResty's libraries as scripts see them, against the real servers they speak to and against peers that misbehave.

mod support;

#[path = "libraries/dns.rs"]
mod dns;
#[path = "libraries/memcached.rs"]
mod memcached;
#[path = "libraries/mysql.rs"]
mod mysql;
#[path = "libraries/ocsp.rs"]
mod ocsp;
#[path = "libraries/redis.rs"]
mod redis;
#[path = "libraries/rediscluster.rs"]
mod rediscluster;
#[path = "libraries/upload.rs"]
mod upload;
#[path = "libraries/websocket.rs"]
mod websocket;

use std::{
    fmt::Display,
    io::{Read, Write},
};

use serde_json::{Value, json};

use support::{Gateway, Upstream};

/// Before each script: `add(...)` notes values, of which nil reads "nil" and ngx.null reads null.
const PRELUDE: &str = "return function(ctx)
    local arg, out = ngx.req.get_uri_args(), {}
    local function add(...)
        local row = { ... }
        for i = 1, select('#', ...) do
            if row[i] == nil then row[i] = 'nil' end
        end
        out[#out + 1] = row
    end
    local function script()\n";

const END: &str = "\nend script() return 200, out end";

/// Runs a script as an uploaded function; what it noted. `args` are fields of its `arg`.
#[track_caller]
fn lua(gw: &Gateway, args: &[(&str, &dyn Display)], script: &str) -> Value {
    run(gw, &[], args, json!({"source": format!("{PRELUDE}{script}{END}")}))
}

/// The same, for a request with these headers, for a script that puts functions of its own in the place of the gateway's: libraries use
/// them, as in a plugin.
#[track_caller]
fn lua_patching(gw: &Gateway, headers: &[(&str, &str)], args: &[(&str, &dyn Display)], script: &str) -> Value {
    run(gw, headers, args, json!({"source": format!("{PRELUDE}{script}{END}"), "trusted": true}))
}

#[track_caller]
fn run(gw: &Gateway, headers: &[(&str, &str)], args: &[(&str, &dyn Display)], function: Value) -> Value {
    gw.put("/functions/script", function);
    gw.put("/routes/script", json!({"uri": "/script", "function_id": "script"}));
    let args: Vec<_> = args.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let reply = gw.send("GET", &format!("/script?{}", args.join("&")), headers, b"");
    assert_eq!(reply.status, 200, "{}", reply.text());
    reply.json()
}

/// The port of an address.
fn port(address: &str) -> &str {
    address.rsplit(':').next().expect("a port")
}

/// A peer that answers the first bytes with these and then waits for the other side to leave.
fn saying(answer: impl Into<Vec<u8>>) -> Upstream {
    let answer = answer.into();
    Upstream::serving(move |_, mut stream| {
        let mut some = [0; 4096];
        if stream.read(&mut some).is_ok_and(|n| n > 0) && stream.write_all(&answer).is_ok() {
            while stream.read(&mut some).is_ok_and(|n| n > 0) {}
        }
    })
}

/// A peer that reads something and closes.
fn closing() -> Upstream {
    Upstream::serving(|_, mut stream| {
        let _ = stream.read(&mut [0; 4096]);
    })
}
