//! TLS with the client: what `ngx.ssl`, `ngx.ssl.clienthello` and `ngx.ssl.session` (lua-resty-core) stand on.

use std::{ffi::c_int, net::IpAddr};

use super::{
    object,
    ssl::{Chain, Key},
};
use crate::{
    error::Result,
    exchange::{
        Exchange, Phase,
        handshake::{Handshake, VerifyClient},
    },
    lua::{
        Raise,
        api::{Api, Phases, Stack},
        fast,
    },
    tls::hello::{Hello, is_grease},
};

type Answer = std::result::Result<c_int, Raise>;

/// Longer ones are refused: an OCSP response has some 2 KB, a session with a client's certificates some 10.
const MAX_OCSP: usize = 64 * 1024;
const MAX_SESSION: usize = 64 * 1024;
/// Bytes of key material: 255 times the shorter of the digests (RFC 8446, 7.1).
const MAX_EXPORT: usize = 255 * 32;
/// What a session begins with outside of the gateway: that it is one, and of which form.
const SESSION: &[u8] = b"moongate-session-1:";

/// Versions by their numbers, oldest first.
const VERSIONS: [(u16, &str); 5] =
    [(0x300, "SSLv3"), (0x301, "TLSv1"), (0x302, "TLSv1.1"), (0x303, "TLSv1.2"), (0x304, "TLSv1.3")];

pub fn register(api: &mut Api) -> Result<()> {
    let any = Phases::ANY;
    let hello = Phases::of(Phase::SslClientHello);
    let certificate = Phases::of(Phase::Ssl);
    let fetch = Phases::of(Phase::SslSessionFetch);
    let store = Phases::of(Phase::SslSessionStore);
    api.func(
        "native.ssl.server_name",
        any,
        "server_name(): the host that the client asked for, in lower case, or nil",
        server_name,
    )?;
    api.func("native.ssl.version", any, "version(): 0x304 for TLS 1.3 | nil, err", version)?;
    api.func("native.ssl.address", any, "address(of the client?): bytes, inet or inet6 | nil, nil, err", address)?;
    api.func("native.ssl.port", any, "port(): the server's | nil, err", |s| match fast::exchange() {
        Some(x) => Ok(s.push_number(x.conn.local.port().into())),
        None => s.fail("no request found"),
    })?;
    api.func("native.ssl.client_random", any, "client_random(): 32 bytes | nil, err", client_random)?;
    let doc = "export(length, label, context?): bytes that the client can derive too | nil, err; over HTTP/1";
    api.func("native.ssl.export", Phases::REQUEST, doc, export)?;
    let doc = "shared_ciphers(GREASE too?): numbers that both sides know | nil, err";
    api.func("native.ssl.shared_ciphers", any, doc, shared_ciphers)?;
    api.func("native.ssl.hello_versions", hello, "hello_versions(): names, as the client lists them, or nil", |s| {
        with_hello(s, |s, hello| match hello.supported_versions() {
            Some(versions) => push_list(s, versions.filter_map(version_name), |s, name| s.push_bytes(name)),
            None => s.push_nil(),
        })
    })?;
    api.func("native.ssl.hello_ciphers", hello, "hello_ciphers(): numbers in the client's order", |s| {
        with_hello(s, |s, hello| push_numbers(s, hello.ciphers().filter(|c| !is_grease(*c))))
    })?;
    api.func("native.ssl.hello_extensions", hello, "hello_extensions(): numbers in the client's order", |s| {
        with_hello(s, |s, hello| push_numbers(s, hello.extensions().map(|(n, _)| n).filter(|n| !is_grease(*n))))
    })?;
    api.func("native.ssl.hello_extension", hello, "hello_extension(number): its bytes, or nil", |s| {
        let number = s.arg_int(1)?;
        with_hello(s, |s, hello| {
            let data = u16::try_from(number).ok().and_then(|number| hello.extension(number));
            data.map_or_else(|| s.push_nil(), |data| s.push_bytes(data))
        })
    })?;
    api.func("native.ssl.set_protocols", hello, "set_protocols({\"TLSv1.3\"}): true | nil, err", set_protocols)?;
    api.func("native.ssl.clear_certs", certificate, "clear_certs(): true", |s| {
        let handshake = state()?;
        handshake.cleared = true;
        (handshake.chain, handshake.key) = (None, None);
        Ok(s.push_bool(true))
    })?;
    api.func("native.ssl.set_chain", certificate, "set_chain(chain): true | nil, err", |s| {
        state()?.chain = Some(object::get::<Chain>(s, 1)?.certificates.clone());
        Ok(s.push_bool(true))
    })?;
    api.func("native.ssl.set_key", certificate, "set_key(key): true | nil, err", |s| {
        state()?.key = Some(object::get::<Key>(s, 1)?.signing.clone());
        Ok(s.push_bool(true))
    })?;
    let doc = "verify_client(authorities?, depth?, trusted?): true | nil, err; the request sees $ssl_client_verify";
    api.func("native.ssl.verify_client", certificate, doc, verify_client)?;
    api.func("native.ssl.set_ocsp", certificate, "set_ocsp(response): true, warning? | nil, err", set_ocsp)?;
    api.func(
        "native.ssl.session_id",
        fetch | store,
        "session_id(): bytes",
        |s| Ok(s.push_bytes(&state()?.session_id)),
    )?;
    api.func("native.ssl.session", store, "session(): bytes | nil, err", |s| match &state()?.session {
        Some(session) => Ok(s.push_bytes([SESSION, session].concat())),
        None => s.fail("bad session in lua context"),
    })?;
    api.func("native.ssl.set_session", fetch, "set_session(bytes): true | nil, err", |s| {
        let session = s.arg_bytes(1)?;
        match session.strip_prefix(SESSION).filter(|_| session.len() <= MAX_SESSION) {
            Some(session) => {
                state()?.session = Some(session.to_vec());
                Ok(s.push_bool(true))
            }
            None => s.fail("failed to de-serialize session"),
        }
    })
}

fn state() -> std::result::Result<&'static mut Handshake, Raise> {
    fast::exchange().and_then(|x| x.lua.handshake.as_deref_mut()).ok_or_else(|| "no TLS handshake found".into())
}

/// The client's first message, while the handshake lasts.
fn of_handshake(x: &Exchange) -> Option<Hello<'_>> {
    Hello::parse(&x.lua.handshake.as_deref()?.hello)
}

fn with_hello(s: &Stack, push: impl FnOnce(&Stack, &Hello) -> c_int) -> Answer {
    match Hello::parse(&state()?.hello) {
        Some(hello) => Ok(push(s, &hello)),
        None => s.fail("the ClientHello cannot be read"),
    }
}

fn push_list<T>(s: &Stack, list: impl Iterator<Item = T>, push: impl Fn(&Stack, T) -> c_int) -> c_int {
    s.push_table(0, 0);
    let table = s.top();
    for (i, one) in list.enumerate() {
        push(s, one);
        s.set_index(table, i + 1);
    }
    1
}

fn push_numbers(s: &Stack, numbers: impl Iterator<Item = u16>) -> c_int {
    push_list(s, numbers, |s, n| s.push_number(n.into()))
}

fn version_name(number: u16) -> Option<&'static str> {
    VERSIONS.iter().find(|(n, _)| *n == number).map(|(_, name)| *name)
}

fn server_name(s: &Stack) -> Answer {
    let Some(x) = fast::exchange() else { return s.fail("no request found") };
    // In lower case, as certificates are looked up and as `conn.tls` has it: else `A.test` would get around what is for `a.test`.
    let name = match &x.conn.tls {
        Some(tls) => tls.sni.as_deref().map(str::to_owned),
        None => of_handshake(x).and_then(|hello| hello.server_name()).map(str::to_ascii_lowercase),
    };
    Ok(name.map_or_else(|| s.push_nil(), |name| s.push_bytes(name)))
}

/// Before the library has chosen: the newest that both sides have.
fn version(s: &Stack) -> Answer {
    let Some(x) = fast::exchange() else { return s.fail("no request found") };
    let number = match &x.conn.tls {
        Some(tls) => VERSIONS.iter().find(|(_, name)| *name == tls.protocol).map(|(n, _)| *n),
        None => of_handshake(x).and_then(|hello| {
            let allowed = &x.lua.handshake.as_deref()?.protocols;
            let allows = |name: &str| allowed.iter().any(|allowed| **allowed == *name);
            VERSIONS.iter().rev().find(|(n, name)| allows(name) && hello.offers(*n)).map(|(n, _)| *n)
        }),
    };
    match number {
        Some(number) => Ok(s.push_number(number.into())),
        None => s.fail("bad ssl conn"),
    }
}

fn address(s: &Stack) -> Answer {
    let Some(x) = fast::exchange() else {
        s.push_nil();
        return s.fail("no request found").map(|_| 3);
    };
    let of = if s.boolean(1) { x.conn.peer } else { x.conn.local };
    let kind = match of.ip() {
        IpAddr::V4(ip) => (s.push_bytes(ip.octets()), "inet").1,
        IpAddr::V6(ip) => (s.push_bytes(ip.octets()), "inet6").1,
    };
    s.push_bytes(kind);
    Ok(2)
}

fn client_random(s: &Stack) -> Answer {
    let Some(x) = fast::exchange() else { return s.fail("no request found") };
    let kept = x.conn.tls.as_ref().and_then(|tls| tls.hello.as_ref()).map(|hello| hello.random);
    let random = kept.or_else(|| of_handshake(x).and_then(|hello| hello.random.try_into().ok()));
    match random {
        Some(random) => Ok(s.push_bytes(random)),
        None => s.fail("bad ssl conn"),
    }
}

fn shared_ciphers(s: &Stack) -> Answer {
    let grease_too = s.boolean(1);
    let Some(x) = fast::exchange() else { return s.fail("no request found") };
    let kept = x.conn.tls.as_ref().and_then(|tls| tls.hello.as_ref()).map(|hello| hello.ciphers.to_vec());
    let Some(offered) = kept.or_else(|| of_handshake(x).map(|hello| hello.ciphers().collect())) else {
        return s.fail("bad ssl conn");
    };
    let known = |c: &u16| rustls::crypto::ring::ALL_CIPHER_SUITES.iter().any(|suite| u16::from(suite.suite()) == *c);
    Ok(push_numbers(s, offered.into_iter().filter(|c| known(c) || (grease_too && is_grease(*c)))))
}

fn export(s: &Stack) -> Answer {
    let (length, label, context) = (s.arg_number(1)?, s.arg_bytes(2)?, s.opt_bytes(3)?);
    if !(1.0..=MAX_EXPORT as f64).contains(&length) {
        return s.fail(format!("the length is 1 to {MAX_EXPORT}"));
    }
    let Some(x) = fast::exchange() else { return s.fail("no request found") };
    if x.conn.tls.is_none() {
        return s.fail("bad ssl conn");
    }
    let mut out = vec![0; length as usize];
    match x.client.as_ref().and_then(|client| client.export_keying_material(&mut out, label, context)) {
        Some(Ok(())) => Ok(s.push_bytes(out)),
        Some(Err(text)) => s.fail(text),
        None => s.fail("not supported where requests share a connection"),
    }
}

fn set_protocols(s: &Stack) -> Answer {
    s.arg_table(1)?;
    let mut names: Vec<Box<str>> = Vec::new();
    // More than there are versions can only be mistakes.
    for i in 1..=s.len(1).min(VERSIONS.len() * 2) {
        s.get_index(1, i);
        let name = s.bytes(-1).map(|name| String::from_utf8_lossy(name).into_owned()).unwrap_or_default();
        s.pop(1);
        if !VERSIONS.iter().any(|(_, known)| *known == name) && name != "SSLv2" {
            return s.fail("invalid protocols failed");
        }
        names.push(name.into());
    }
    let (known, _) = crate::tls::versions(names.iter().map(|name| &**name));
    if known.is_empty() {
        return s.fail("none of the protocols is available: only TLSv1.2 and TLSv1.3 are");
    }
    state()?.protocols = names;
    Ok(s.push_bool(true))
}

fn verify_client(s: &Stack) -> Answer {
    let given = |i| match s.is_nil(i) {
        true => Ok(Vec::new()),
        false => object::get::<Chain>(s, i).map(|chain| chain.certificates.clone()),
    };
    let (authorities, trusted) = (given(1)?, given(3)?);
    // nginx's default of ssl_verify_depth.
    let depth = s.opt_number(2)?.unwrap_or(1.0).clamp(0.0, 255.0) as u8;
    let handshake = state()?;
    if handshake.asks_already {
        return s.fail("the certificate's object has client.ca, which decides about the client's certificate");
    }
    handshake.verify = Some(VerifyClient { authorities, trusted, depth });
    Ok(s.push_bool(true))
}

fn set_ocsp(s: &Stack) -> Answer {
    const STATUS_REQUEST: u16 = 5;
    let response = s.arg_bytes(1)?;
    if response.is_empty() || response.len() > MAX_OCSP {
        return s.fail(format!("an OCSP response has 1 to {MAX_OCSP} bytes"));
    }
    let handshake = state()?;
    let asked = Hello::parse(&handshake.hello).is_some_and(|hello| hello.extension(STATUS_REQUEST).is_some());
    s.push_bool(true);
    if !asked {
        s.push_bytes("no status req");
        return Ok(2);
    }
    handshake.ocsp = Some(response.to_vec());
    Ok(1)
}
