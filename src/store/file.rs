//! conf/apisix.yaml as a store: read only.
