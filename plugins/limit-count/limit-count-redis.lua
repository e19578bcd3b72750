--- Counting in windows in one Redis, for other plugins.
--
-- `local lim = require("apisix.plugins.limit-count.limit-count-redis").new("plugin-limit-count", 10, 60, conf)`, then
-- `lim:incoming(key, cost)`; `conf` has the `redis_*` fields of limit-count's.
local windows = require("apisix.plugins.limit-count.redis-windows")

local _M = {}

--- A limiter of `limit` per `window` seconds; `plugin_name` begins the keys.
function _M.new(plugin_name, limit, window, conf)
    return windows.new("redis", plugin_name, limit, window, conf)
end

return _M
