--- `apisix.consumer_group`: consumer groups as items (`{ value, key, modifiedIndex }`). All phases.
local items = require("apisix.http.items")
local core = require("apisix.core")

local _M = {}

--- The consumer group of that id, or nil.
function _M.get(id)
    return items("consumer_groups", id)
end

--- Every consumer group: an array of items and its version.
function _M.consumer_groups()
    return core.config.fetch_created_obj("/consumer_groups")
end

return _M
