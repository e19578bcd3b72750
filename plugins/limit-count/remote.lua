--- The policies of limit-count that count in a Redis: what of their confs the schema cannot say, and counting, at once or in step
--- with `sync_interval`.
local core = require("apisix.core")
local redis_script = require("apisix.utils.redis-script")
local windows = require("apisix.plugins.limit-count.redis-windows")
local delayed_syncer = require("apisix.plugins.limit-count.delayed-syncer")
local ipairs, type = ipairs, type

local _M = {}

-- Seconds: below, one could as well ask each time.
local MIN_SYNC_INTERVAL = 0.1

-- Syncers of the confs and limits that are in use; one that is made anew goes on with what lies in the dictionary.
local syncers = core.lrucache.new({ type = "plugin", count = 512 })

local function is_delayed(conf)
    return conf.sync_interval and conf.sync_interval ~= -1
end

local function check_window(conf, time_window)
    if type(time_window) == "number" and conf.sync_interval >= time_window then
        return false, "sync_interval should be smaller than time_window"
    end
    return true
end

--- Whether a conf that passed the schema can be worked with: true, or false and why not.
function _M.check(conf)
    if not redis_script.is_remote(conf.policy) or not is_delayed(conf) then
        return true
    end
    if conf.sync_interval < MIN_SYNC_INTERVAL then
        return false, "sync_interval should be -1 or at least " .. MIN_SYNC_INTERVAL
    end
    for _, rule in ipairs(conf.rules or {}) do
        local ok, err = check_window(conf, rule.time_window)
        if not ok then
            return false, err
        end
    end
    return check_window(conf, conf.time_window)
end

local function new_syncer(name, limit, window, conf)
    local limiter = windows.new(conf.policy, "plugin-" .. name, limit, window, conf)
    return delayed_syncer.new("plugin-limit-count", limit, window, conf, limiter)
end

local function count_delayed(key, cost, limit, window, conf, name)
    -- Workers share a queue, and confs that say the same.
    local _, digest = redis_script.identity(conf)
    local queue = name .. ":" .. digest .. ":" .. limit .. ":" .. window
    local syncer = syncers(queue, nil, new_syncer, name, limit, window, conf)
    local remaining, reset, err = syncer:delayed_sync(key, cost, queue)
    if not remaining then
        return nil, err
    end
    return remaining, reset
end

--- Counts `cost` in the window of `key`: what is left of `limit` (negative: refused) and the seconds until the window ends; nil and the
-- reason. `name` is the plugin's, whose counters are apart from those of others. Waits.
function _M.count(key, cost, limit, window, conf, name)
    if is_delayed(conf) then
        return count_delayed(key, cost, limit, window, conf, name)
    end
    return windows.count(conf, windows.key_in("plugin-" .. name, key), cost, limit, window)
end

return _M
