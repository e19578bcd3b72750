--- A leaky bucket in a Redis, for all gateways that share it: one script per request, in the Redis' own time. A bucket expires when it
--- would be empty, which is the same. Waits.
local redis_script = require("apisix.utils.redis-script")
local float = redis_script.float
local setmetatable, tonumber = setmetatable, tonumber

local _M = {}
local mt = { __index = _M }

-- KEYS[1]: a hash of how many requests were too many (`excess`) and when, in milliseconds (`last`). ARGV: requests per second, burst.
-- No expiry is longer than 30 years, which Redis takes.
local bucket = redis_script.new([[
local time = redis.call('TIME')
local now = time[1] * 1000 + time[2] / 1000
local rate, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
local kept = redis.call('HMGET', KEYS[1], 'excess', 'last')
local excess = 0
if kept[1] then
    excess = math.max(tonumber(kept[1]) - rate * math.abs(now - tonumber(kept[2])) / 1000 + 1, 0)
    if excess > burst then
        return { 0, string.format('%.17g', excess) }
    end
end
redis.call('HSET', KEYS[1], 'excess', string.format('%.17g', excess), 'last', string.format('%.3f', now))
redis.call('PEXPIRE', KEYS[1], string.format('%.0f', math.min(math.ceil((excess + 1) / rate * 1000) + 1, 1e12)))
return { 1, string.format('%.17g', excess) }
]])

--- A limiter with `rate` (per second) and `burst` of a conf of limit-req whose policy is one of Redis.
function _M.new(conf)
    return setmetatable({ conf = conf }, mt)
end

--- Counts a request: the seconds that it has to wait and how many requests are too many; nil and "rejected" over the burst; nil and
-- the reason.
function _M:incoming(key)
    local conf = self.conf
    local reply, err = bucket:run(conf, "limit_req:" .. key, float(conf.rate), float(conf.burst))
    if not reply then
        return nil, err
    end
    if reply[1] == 0 then
        return nil, "rejected"
    end
    local excess = tonumber(reply[2])
    return excess / conf.rate, excess
end

return _M
