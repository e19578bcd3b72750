--- Counting in windows in a Redis, for all gateways that share it: one script per request, in the Redis' own time, so that the clocks
--- of the gateways do not matter. A counter expires with its window. Waits.
local core = require("apisix.core")
local redis_script = require("apisix.utils.redis-script")
local integer, float = redis_script.integer, redis_script.float
local max = math.max
local setmetatable, tonumber = setmetatable, tonumber

local _M = {}
local mt = { __index = _M }

-- KEYS[1]: what was counted. ARGV: cost, window in milliseconds. The expiry is set before anything is counted: a window that Redis
-- refuses leaves no key that stays.
local fixed = redis_script.new([[
redis.call('SET', KEYS[1], 0, 'NX', 'PX', ARGV[2])
local used = redis.call('INCRBY', KEYS[1], ARGV[1])
local left = redis.call('PTTL', KEYS[1])
if left < 0 then
    redis.call('PEXPIRE', KEYS[1], ARGV[2])
    left = tonumber(ARGV[2])
end
return { used, left }
]])

-- KEYS[1]: a hash of the number of the window, what was counted in it and in the one before. ARGV: cost, window in milliseconds, limit,
-- and whether to count what is over it, too. The window before counts by the share of it that is still inside.
local sliding = redis_script.new([[
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local cost, window, limit = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local index = math.floor(now / window)
local left = window - now % window
local kept = redis.call('HMGET', KEYS[1], 'window', 'current', 'previous')
local then_index = tonumber(kept[1])
local current, previous = 0, 0
if then_index == index then
    current, previous = tonumber(kept[2]), tonumber(kept[3])
elseif then_index == index - 1 then
    previous = tonumber(kept[2])
end
local used = previous * left / window + current
if used + cost > limit and ARGV[4] ~= 'always' then
    return { 0, math.floor(limit - used), left }
end
redis.call('HSET', KEYS[1], 'window', string.format('%.0f', index), 'current', string.format('%.0f', current + cost),
    'previous', string.format('%.0f', previous))
redis.call('PEXPIRE', KEYS[1], string.format('%.0f', left + window))
return { 1, math.floor(limit - used - cost), left }
]])

-- Milliseconds, of which Redis takes whole ones.
local function window_ms(window)
    return integer(max(window * 1000, 1))
end

local function count_fixed(conf, key, cost, limit, window)
    local reply, err = fixed:run(conf, key, integer(cost), window_ms(window))
    if not reply then
        return nil, err
    end
    return limit - reply[1], reply[2] / 1000
end

local function run_sliding(conf, key, cost, limit, window, always)
    local reply, err = sliding:run(conf, key .. ":sliding", integer(cost), window_ms(window), float(limit), always)
    if not reply then
        return nil, err
    end
    return reply[1] == 1, reply[2], reply[3] / 1000
end

local function count_sliding(conf, key, cost, limit, window)
    local counted, remaining, reset = run_sliding(conf, key, cost, limit, window, "within")
    if counted == nil then
        return nil, remaining
    end
    return counted and remaining or -1, reset
end

--- Counts `cost` in the window of `key`: what is left of `limit` (negative: refused; a sliding window has not counted it then) and
-- the seconds until the window ends; nil and the reason. `conf`: a conf of limit-count whose policy is one of Redis.
function _M.count(conf, key, cost, limit, window)
    return (conf.window_type == "sliding" and count_sliding or count_fixed)(conf, key, cost, limit, window)
end

--- Counts what was let through already, be it over the limit or not: as `count`.
function _M.commit_to(conf, key, cost, limit, window)
    if conf.window_type ~= "sliding" then
        return count_fixed(conf, key, cost, limit, window)
    end
    local counted, remaining, reset = run_sliding(conf, key, cost, limit, window, "always")
    if counted == nil then
        return nil, remaining
    end
    return remaining, reset
end

--- How a counter's key begins in Redis, for a plugin's dictionary (`plugin-limit-count`).
function _M.key_in(plugin_name, key)
    return plugin_name .. ":" .. key
end

--- A limiter of `limit` per `window` seconds of the Redis that `conf` names by the fields of `policy`.
function _M.new(policy, plugin_name, limit, window, conf)
    local own = core.table.clone(conf)
    own.policy = policy
    return setmetatable({ conf = own, plugin_name = plugin_name, limit = limit, window = window }, mt)
end

local function outcome(remaining, reset)
    if not remaining then
        return nil, reset, 0
    end
    if remaining < 0 then
        return nil, "rejected", reset
    end
    return 0, remaining, reset
end

--- Counts `cost` (1) for `key`: 0, what is left and the seconds until the window ends; nil, "rejected" and those seconds; nil, the
-- reason and 0.
function _M:incoming(key, cost)
    return outcome(_M.count(self.conf, _M.key_in(self.plugin_name, key), tonumber(cost) or 1, self.limit, self.window))
end

--- Counts what was let through already: 0, what is left (negative: over the limit) and the seconds until the window ends; nil, the
-- reason and 0.
function _M:commit(key, cost)
    local remaining, reset = _M.commit_to(self.conf, _M.key_in(self.plugin_name, key), cost, self.limit, self.window)
    if not remaining then
        return nil, reset, 0
    end
    return 0, remaining, reset
end

return _M
