//! What a start says: to people on the terminal, to programs in logs/listen.json.

use std::{
    fs,
    io::{self, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    process,
};

use serde_json::json;

use crate::conf::Config;

/// Relative to the prefix. With port 0 only this tells which ports they are.
pub const LISTEN_FILE: &str = "logs/listen.json";

/// The addresses that are really bound.
#[derive(Clone, Debug, Default)]
pub struct Listening {
    pub proxy: Vec<SocketAddr>,
    pub proxy_tls: Vec<SocketAddr>,
    pub tcp: Vec<SocketAddr>,
    pub udp: Vec<SocketAddr>,
    pub admin: Option<SocketAddr>,
    pub control: Option<SocketAddr>,
    pub status: Option<SocketAddr>,
    pub prometheus: Option<SocketAddr>,
}

/// Writes logs/listen.json under `prefix`, whole or not at all. Call it when requests are served: others wait for it.
pub fn write_listen_json(prefix: &Path, at: &Listening) -> io::Result<()> {
    let text = json!({
        "pid": process::id(),
        "proxy": at.proxy,
        "proxy_tls": at.proxy_tls,
        "tcp": at.tcp,
        "udp": at.udp,
        "admin": at.admin,
        "control": at.control,
        "status": at.status,
        "prometheus": at.prometheus,
    });
    let path = prefix.join(LISTEN_FILE);
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    let aside = path.with_extension(format!("{}.new", process::id()));
    fs::write(&aside, format!("{text}\n"))?;
    fs::rename(&aside, &path)
}

/// Says where the gateway listens, which store it uses, where the admin key is, and what to try next.
///
/// `store` names it with its place (`embedded (data/moongate.redb)`); `key_file` is there when the key was generated.
pub fn print_banner(
    out: &mut dyn Write,
    config: &Config,
    at: &Listening,
    store: &str,
    key_file: Option<&PathBuf>,
) -> io::Result<()> {
    writeln!(out, "moongate {}", env!("CARGO_PKG_VERSION"))?;
    let several = |all: &[SocketAddr]| all.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let rows = [
        ("proxy", several(&at.proxy)),
        ("proxy, TLS", several(&at.proxy_tls)),
        ("TCP", several(&at.tcp)),
        ("UDP", several(&at.udp)),
        ("Admin API", several(at.admin.as_slice())),
        ("control API", several(at.control.as_slice())),
        ("status API", several(at.status.as_slice())),
        ("metrics", at.prometheus.map(|a| format!("{a}{}", config.prometheus.uri)).unwrap_or_default()),
        ("store", store.to_owned()),
        ("admin key", key_file.map(|path| path.display().to_string()).unwrap_or_default()),
    ];
    for (name, value) in rows.iter().filter(|(_, value)| !value.is_empty()) {
        writeln!(out, "  {name:<12} {value}")?;
    }
    if let (Some(admin), Some(proxy)) = (at.admin, at.proxy.first()) {
        let tls = config.admin.as_ref().is_some_and(|admin| admin.tls.is_some());
        next(out, if tls { "https" } else { "http" }, &local(admin), &local(*proxy), key_file)?;
    }
    out.flush()
}

/// Two commands to paste: a function that answers needs no upstream.
fn next(out: &mut dyn Write, scheme: &str, admin: &str, proxy: &str, key_file: Option<&PathBuf>) -> io::Result<()> {
    let key = match key_file {
        Some(path) => format!("$(cat '{}')", path.display()),
        None => "$ADMIN_KEY".to_owned(),
    };
    let api = format!("{scheme}://{admin}/apisix/admin");
    writeln!(out, "\nTry:\n  KEY=\"{key}\"")?;
    writeln!(out, "  curl {api}/functions/hello -H \"X-API-KEY: $KEY\" -X PUT --data-binary 'ngx.say(\"hello\")'")?;
    writeln!(
        out,
        "  curl {api}/routes/1 -H \"X-API-KEY: $KEY\" -X PUT -d '{{\"uri\":\"/hello\",\"function_id\":\"hello\"}}'"
    )?;
    writeln!(out, "  curl http://{proxy}/hello\n")
}

/// An address that a client on this machine can use.
fn local(addr: SocketAddr) -> String {
    let ip = match addr.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, addr.port()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conf;

    fn listening() -> Listening {
        Listening {
            proxy: vec!["0.0.0.0:81".parse().unwrap(), "[::]:81".parse().unwrap()],
            admin: "127.0.0.1:82".parse().ok(),
            ..Listening::default()
        }
    }

    #[test]
    fn the_banner_says_where_everything_is_and_nothing_that_is_not() {
        let (config, _) = conf::parse(Path::new("/p"), "").unwrap();
        let mut out = Vec::new();
        let key = PathBuf::from("/p/data/admin_key");
        print_banner(&mut out, &config, &listening(), "embedded", Some(&key)).unwrap();
        let text = String::from_utf8(out).unwrap();
        for part in ["0.0.0.0:81, [::]:81", "embedded", "/p/data/admin_key", "http://127.0.0.1:81/hello", "X-API-KEY"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(!text.contains("metrics") && !text.contains("TLS"), "{text}");
    }

    #[test]
    fn listen_json_has_every_address() {
        let dir = tempfile::tempdir().unwrap();
        write_listen_json(dir.path(), &listening()).unwrap();
        let read: serde_json::Value = serde_json::from_slice(&fs::read(dir.path().join(LISTEN_FILE)).unwrap()).unwrap();
        assert_eq!(read["proxy"], json!(["0.0.0.0:81", "[::]:81"]));
        assert_eq!((&read["admin"], &read["control"]), (&json!("127.0.0.1:82"), &json!(null)));
        assert_eq!(fs::read_dir(dir.path().join("logs")).unwrap().count(), 1);
    }
}
