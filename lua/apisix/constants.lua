--- `apisix.constants`: names that modules share.
return {
    --- The directory that the gateway's own files are in; plugins find files by it.
    apisix_lua_home = require("moongate.native").prefix,
    --- Directories of the store, by whom they serve.
    HTTP_ETCD_DIRECTORY = {
        ["/upstreams"] = true, ["/plugins"] = true, ["/ssls"] = true, ["/plugin_configs"] = true,
        ["/consumers"] = true, ["/consumer_groups"] = true, ["/credentials"] = true, ["/global_rules"] = true,
        ["/protos"] = true, ["/plugin_metadata"] = true, ["/routes"] = true, ["/services"] = true, ["/secrets"] = true,
    },
    STREAM_ETCD_DIRECTORY = {
        ["/upstreams"] = true, ["/services"] = true, ["/plugins"] = true, ["/ssls"] = true, ["/stream_routes"] = true,
        ["/plugin_metadata"] = true,
    },
}
