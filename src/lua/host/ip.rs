//! `resty.ipmatcher`: sets of addresses and networks, reached through FFI.

use std::{
    collections::HashMap,
    ffi::{c_int, c_void},
    net::IpAddr,
};

use ipnet::IpNet;

use crate::{
    error::Result,
    lua::{
        api::{Api, Phases},
        fast,
    },
};

/// Networks by prefix length, longest first, each with the number it was added under.
#[derive(Default)]
pub struct Matcher {
    v4: Lengths<u32>,
    v6: Lengths<u128>,
}

type Lengths<A> = Vec<(u8, HashMap<A, u32>)>;

impl Matcher {
    fn add(&mut self, net: IpNet, number: u32) {
        match net {
            IpNet::V4(net) => add(&mut self.v4, net.prefix_len(), net.network().to_bits(), number),
            IpNet::V6(net) => add(&mut self.v6, net.prefix_len(), net.network().to_bits(), number),
        }
    }

    /// The number of the most specific network that holds `ip`.
    fn find(&self, ip: IpAddr) -> Option<u32> {
        match ip {
            IpAddr::V4(ip) => {
                let ip = ip.to_bits();
                self.v4.iter().find_map(|(len, nets)| {
                    nets.get(&(ip & u32::MAX.checked_shl(32 - u32::from(*len)).unwrap_or(0))).copied()
                })
            }
            IpAddr::V6(ip) => {
                let ip = ip.to_bits();
                self.v6.iter().find_map(|(len, nets)| {
                    nets.get(&(ip & u128::MAX.checked_shl(128 - u32::from(*len)).unwrap_or(0))).copied()
                })
            }
        }
    }
}

fn add<A: std::hash::Hash + Eq>(lengths: &mut Lengths<A>, len: u8, net: A, number: u32) {
    let at = match lengths.binary_search_by(|(l, _)| len.cmp(l)) {
        Ok(at) => at,
        Err(at) => {
            lengths.insert(at, (len, HashMap::new()));
            at
        }
    };
    lengths[at].1.entry(net).or_insert(number);
}

fn parse(text: &[u8]) -> Option<IpNet> {
    let text = std::str::from_utf8(text).ok()?;
    crate::expr::network(text)
}

fn address(text: &[u8]) -> Option<IpAddr> {
    let text = std::str::from_utf8(text).ok()?;
    text.trim_start_matches('[').trim_end_matches(']').parse().ok()
}

// SAFETY (all exports): a matcher came from `ip_new` and Lua keeps it alive; texts come with their lengths.
crate::export! {
    fn ip_new() -> *mut Matcher, std::ptr::null_mut() => {
        Box::into_raw(Box::default())
    }

    fn ip_free(matcher: *mut Matcher) -> c_int, 0 => {
        if !matcher.is_null() {
            drop(unsafe { Box::from_raw(matcher) });
        }
        0
    }

    /// Adds an address or a network under a number from 1; 0 when it is neither.
    fn ip_add(matcher: *mut Matcher, text: *const u8, len: usize, number: c_int) -> c_int, 0 => {
        let Some(net) = parse(unsafe { fast::bytes(text, len) }) else { return 0 };
        unsafe { (*matcher).add(net, number as u32) };
        1
    }

    /// The number of what holds the address; 0: nothing does, -1: no address.
    fn ip_match(matcher: *const Matcher, text: *const u8, len: usize) -> c_int, -1 => {
        let Some(ip) = address(unsafe { fast::bytes(text, len) }) else { return -1 };
        unsafe { (*matcher).find(ip).map_or(0, |n| n as c_int) }
    }

    /// 4 or 6 for an address, 0 for anything else.
    fn ip_kind(text: *const u8, len: usize) -> c_int, 0 => {
        match address(unsafe { fast::bytes(text, len) }) {
            Some(IpAddr::V4(_)) => 4,
            Some(IpAddr::V6(_)) => 6,
            None => 0,
        }
    }
}

pub fn register(api: &mut Api) -> Result<()> {
    let any = Phases::ANY;
    api.fast("ip_new", "void *(void)", any, "an empty set of networks", ip_new as *const c_void)?;
    api.fast("ip_free", "int (void *)", any, "frees it", ip_free as *const c_void)?;
    let doc = "adds a network under a number: 0 when it is none";
    api.fast("ip_add", "int (void *, const char *, size_t, int)", any, doc, ip_add as *const c_void)?;
    let doc = "number of what holds an address; 0 none, -1 no address";
    api.fast("ip_match", "int (void *, const char *, size_t)", any, doc, ip_match as *const c_void)?;
    api.fast("ip_kind", "int (const char *, size_t)", any, "4, 6 or 0", ip_kind as *const c_void)
}

#[cfg(test)]
mod tests {
    use super::super::tests::check;

    #[test]
    fn matches_addresses_and_networks() {
        let prelude = "local ipm = require('resty.ipmatcher')
            local m = assert(ipm.new({'127.0.0.1', '10.1.0.0/16', '::1', 'fe80::/32', '192.168.0.0/16'})) ";
        for (ip, expected) in [
            ("127.0.0.1", "true"),
            ("127.0.0.2", "false"),
            ("10.1.255.3", "true"),
            ("10.2.0.0", "false"),
            ("::1", "true"),
            ("fe80::1:2", "true"),
            ("fe81::1", "false"),
        ] {
            check(&format!("{prelude} return tostring(m:match('{ip}'))"), expected);
        }
        check(
            &format!("{prelude} local ok, e = m:match('x') return tostring(ok) .. e"),
            "falseinvalid ip address, not ipv4 and ipv6",
        );
        check(
            &format!("{prelude} local m, e = ipm.new({{'1.2.3.400'}}) return tostring(m) .. e"),
            "nilinvalid ip address: 1.2.3.400",
        );
        check(
            &format!(
                "{prelude} local m = ipm.new_with_value({{['10.0.0.0/8'] = 'a', ['10.1.0.0/16'] = 'b'}}) return m:match('10.1.2.3') .. m:match('10.2.3.4') .. tostring(m:match('1.1.1.1'))"
            ),
            "bafalse",
        );
        check(&format!("{prelude} local m = ipm.new({{'0.0.0.0/0'}}) return tostring(m:match('8.8.8.8'))"), "true");
    }
}
