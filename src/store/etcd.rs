//! etcd as a store: APISIX's layout under its prefix.
