--- Counting in windows in a Redis that Sentinels watch, for other plugins; as `limit-count-redis`, with the fields of a conf whose
--- policy is `redis-sentinel`.
local windows = require("apisix.plugins.limit-count.redis-windows")

local _M = {}

--- A limiter of `limit` per `window` seconds; `plugin_name` begins the keys.
function _M.new(plugin_name, limit, window, conf)
    return windows.new("redis-sentinel", plugin_name, limit, window, conf)
end

return _M
