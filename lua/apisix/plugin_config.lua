--- `apisix.plugin_config`: plugin configs as items (`{ value, key, modifiedIndex }`). All phases.
local items = require("apisix.http.items")
local core = require("apisix.core")

local _M = {}

--- The plugin config of that id, or nil.
function _M.get(id)
    return items("plugin_configs", id)
end

--- Every plugin config: an array of items and its version.
function _M.plugin_configs()
    return core.config.fetch_created_obj("/plugin_configs")
end

return _M
