--- `apisix.core.config_yaml`: `core.config` under the name that it has in APISIX with a file.
return require("apisix.core.config")
