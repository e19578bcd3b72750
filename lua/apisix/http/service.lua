--- `apisix.http.service`: services as items (`{ value, key, modifiedIndex }`). All phases.
local items = require("apisix.http.items")
local core = require("apisix.core")

local _M = {}

--- The service of that id, or nil.
function _M.get(id)
    return items("services", id)
end

--- Every service: an array of items and its version.
function _M.services()
    return core.config.fetch_created_obj("/services")
end

return _M
