//! Finds the route of a request. Pure, immutable, incremental: a clone with a changed route shares all else.

use std::sync::Arc;

use crate::model::{Object, Route};

/// `apisix.router.http`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RouterKind {
    #[default]
    RadixtreeHostUri,
    RadixtreeUri,
    RadixtreeUriWithParameter,
}

#[derive(Clone, Default)]
pub struct Router {
    pub kind: RouterKind,
}

/// What the router asks of a request. `var` and `filter` are called only for routes that need them.
pub trait Facts {
    /// Lower case, without port.
    fn host(&self) -> &[u8];
    fn path(&self) -> &[u8];
    fn method(&self) -> &[u8];
    fn remote(&self) -> std::net::IpAddr;
    /// A variable's value, for `vars`.
    fn var(&self, name: &str) -> Option<std::borrow::Cow<'_, [u8]>>;
    /// Runs the route's `filter_func`.
    fn filter(&self, route: &Arc<Object<Route>>) -> bool;
}
