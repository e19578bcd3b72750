//! Finds the route of a TCP connection or a UDP client. Pure and immutable.
//!
//! A route with the name that a TLS client asks for comes first, then those with a wildcard, the longer one before the shorter one,
//! then those without a name. Among them, the oldest whose addresses and port agree. Unlike the router of requests it is made anew for
//! each change: there are as many stream routes as a gateway has ports and names, not a hundred thousand.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;

use crate::model::{Object, StreamRoute};

type Found = Arc<Object<StreamRoute>>;

/// What a route is found by.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    pub client: IpAddr,
    /// The address and port that the client has reached.
    pub server: SocketAddr,
    /// Lower case.
    pub sni: Option<&'a str>,
}

#[derive(Debug, Default)]
pub struct StreamRouter {
    named: HashMap<Box<str>, Routes>,
    /// What stands behind the star of a wildcard.
    endings: HashMap<Box<str>, Routes>,
    /// The lengths of `endings`, from the longest.
    lengths: Vec<usize>,
    nameless: Routes,
}

/// In their order, by the port that they name.
#[derive(Debug, Default)]
struct Routes {
    of_port: HashMap<u16, Vec<(usize, Found)>>,
    of_any: Vec<(usize, Found)>,
}

impl StreamRouter {
    pub fn new(routes: impl Iterator<Item = Found>) -> Self {
        let mut all: Vec<Found> = routes.collect();
        all.sort_by(|a, b| (a.create_revision, &a.id).cmp(&(b.create_revision, &b.id)));
        let mut router = StreamRouter::default();
        for (order, route) in all.into_iter().enumerate() {
            let of_name = match route.value.sni.as_deref().map(|sni| (sni.strip_prefix('*'), sni)) {
                None => &mut router.nameless,
                Some((Some(ending), _)) => router.endings.entry(ending.into()).or_default(),
                Some((None, name)) => router.named.entry(name.into()).or_default(),
            };
            let of_port = match route.value.server_port {
                Some(port) => of_name.of_port.entry(port).or_default(),
                None => &mut of_name.of_any,
            };
            of_port.push((order, route));
        }
        router.lengths = router.endings.keys().map(|ending| ending.len()).collect();
        router.lengths.sort_unstable_by(|a, b| b.cmp(a));
        router.lengths.dedup();
        router
    }

    pub fn find<'a>(&'a self, at: &Place<'a>) -> Option<&'a Found> {
        let by_name = at.sni.and_then(|name| {
            let exact = self.named.get(name).and_then(|routes| routes.find(at));
            exact.or_else(|| self.endings_of(name).find_map(|routes| routes.find(at)))
        });
        by_name.or_else(|| self.nameless.find(at))
    }

    /// The wildcards that stand for this name.
    fn endings_of<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Routes> {
        let ending = |length: &usize| name.len().checked_sub(*length).and_then(|start| name.get(start..));
        self.lengths.iter().filter_map(ending).filter_map(|ending| self.endings.get(ending))
    }
}

impl Routes {
    fn find(&self, at: &Place<'_>) -> Option<&Found> {
        let first = |routes: &'_ [(usize, Found)]| routes.iter().position(|(_, route)| holds(&route.value, at));
        let of_port = self.of_port.get(&at.server.port()).and_then(|routes| Some(&routes[first(routes)?]));
        let of_any = first(&self.of_any).map(|found| &self.of_any[found]);
        let oldest = [of_port, of_any].into_iter().flatten().min_by_key(|(order, _)| *order);
        oldest.map(|(_, route)| route)
    }
}

fn holds(route: &StreamRoute, at: &Place<'_>) -> bool {
    let within = |net: &Option<IpNet>, ip: IpAddr| net.is_none_or(|net| net.contains(&ip.to_canonical()));
    within(&route.remote_addr, at.client) && within(&route.server_addr, at.server.ip())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::next_uid;

    fn route(id: &str, create_revision: i64, value: StreamRoute) -> Found {
        Arc::new(Object {
            id: id.into(),
            uid: next_uid(),
            create_revision,
            mod_revision: create_revision,
            json: "{}".into(),
            value,
        })
    }

    fn net(text: &str) -> Option<IpNet> {
        crate::expr::network(text)
    }

    #[track_caller]
    fn finds(router: &StreamRouter, client: &str, server: &str, sni: Option<&str>, wanted: Option<&str>) {
        let at = Place { client: client.parse().unwrap(), server: server.parse().unwrap(), sni };
        assert_eq!(router.find(&at).map(|route| &*route.id), wanted, "{at:?}");
    }

    #[test]
    fn the_oldest_whose_addresses_and_port_agree_is_found() {
        let routes = [
            route("z", 1, StreamRoute { server_port: Some(91), remote_addr: net("10.0.0.0/8"), ..Default::default() }),
            route("a", 2, StreamRoute { server_addr: net("127.0.0.1"), ..Default::default() }),
            route("b", 3, StreamRoute { server_port: Some(91), ..Default::default() }),
            route("c", 4, StreamRoute { remote_addr: net("::1"), ..Default::default() }),
        ];
        let router = StreamRouter::new(routes.into_iter().rev());
        finds(&router, "10.1.1.1", "127.0.0.1:91", None, Some("z"));
        finds(&router, "11.1.1.1", "127.0.0.1:91", None, Some("a"));
        finds(&router, "11.1.1.1", "127.0.0.2:91", None, Some("b"));
        finds(&router, "11.1.1.1", "127.0.0.2:92", None, None);
        finds(&router, "::1", "[::1]:92", None, Some("c"));
        // An address of IPv4 that a socket of IPv6 shows.
        finds(&router, "::ffff:10.1.1.1", "[::1]:91", None, Some("z"));
    }

    #[test]
    fn names_come_before_wildcards_and_those_before_none() {
        let named = |sni: &str| StreamRoute { sni: Some(sni.into()), ..Default::default() };
        let routes = [
            route("none", 1, StreamRoute::default()),
            route("any", 2, named("*")),
            route("short", 3, named("*.test")),
            route("long", 4, named("*.a.test")),
            route("exact", 5, named("x.a.test")),
            route("elsewhere", 6, StreamRoute { remote_addr: net("10.0.0.1"), ..named("y.a.test") }),
        ];
        let router = StreamRouter::new(routes.into_iter());
        let cases = [
            (Some("x.a.test"), "exact"),
            (Some("y.a.test"), "long"),
            (Some("z.z.a.test"), "long"),
            (Some("a.test"), "short"),
            (Some("test"), "any"),
            (Some("é"), "any"),
            (None, "none"),
        ];
        for (sni, wanted) in cases {
            finds(&router, "127.0.0.1", "127.0.0.1:1", sni, Some(wanted));
        }
        finds(&router, "10.0.0.1", "127.0.0.1:1", Some("y.a.test"), Some("elsewhere"));
    }
}
