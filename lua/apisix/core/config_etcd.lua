--- `apisix.core.config_etcd`: `core.config` under the name that it has in APISIX with etcd.
return require("apisix.core.config")
