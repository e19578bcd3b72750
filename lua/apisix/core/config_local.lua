--- `core.config_local`: config.yaml with the defaults filled in.
local native = require("moongate.native")
local select, type = select, type

local _M = {}
local conf

--- The configuration as a table; it belongs to everyone, so do not change it.
function _M.local_conf()
    if not conf then
        local written = require("cjson.safe").decode(native.config_json)
        -- A VM of its own may have none.
        conf = type(written) == "table" and written or {}
        -- Where plugins look for the store's addresses.
        conf.etcd = conf.etcd or conf.deployment and conf.deployment.etcd
    end
    return conf
end

--- `try_read_attr(conf, "plugin_attr", "prometheus")`: a nested field or nil.
function _M.try_read_attr(tab, ...)
    for i = 1, select("#", ...) do
        if type(tab) ~= "table" then
            return nil
        end
        tab = tab[(select(i, ...))]
    end
    return tab
end

--- Has the next call read the configuration anew.
function _M.clear_cache()
    conf = nil
end

return _M
