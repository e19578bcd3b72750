--- Counting in windows in a Redis Cluster, for other plugins; as `limit-count-redis`, with the fields of a conf whose policy is
--- `redis-cluster`.
local windows = require("apisix.plugins.limit-count.redis-windows")
local redis_script = require("apisix.utils.redis-script")

local _M = {}

--- A limiter of `limit` per `window` seconds; `plugin_name` begins the keys. `red_cli` in it is the client of resty.rediscluster. nil and
-- the reason when no node of the cluster tells of its slots. Waits.
function _M.new(plugin_name, limit, window, conf)
    local limiter = windows.new("redis-cluster", plugin_name, limit, window, conf)
    local err
    limiter.red_cli, err = redis_script.cluster_of(limiter.conf)
    if not limiter.red_cli then
        return nil, err
    end
    return limiter
end

return _M
