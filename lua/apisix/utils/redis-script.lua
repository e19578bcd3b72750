--- `apisix.utils.redis-script`: runs Lua in the Redis of a plugin's conf, in one round trip, as limits need it that several
-- gateways share. Waits.
--
-- `local script = redis_script.new("return redis.call('INCR', KEYS[1])")`, then `script:run(conf, key, ...)`. `conf.policy` says
-- what Redis it is: `redis`, `redis-cluster` or `redis-sentinel`. A script has one key, so that a cluster needs no hash tags.
local core = require("apisix.core")
local redis = require("apisix.utils.redis")
local rediscluster = require("apisix.utils.rediscluster")
local redissentinel = require("apisix.utils.redissentinel")
local sha1_bin, null = ngx.sha1_bin, ngx.null
local sub, gsub, format, byte = string.sub, string.gsub, string.format, string.byte
local setmetatable, tostring, type = setmetatable, tostring, type

local _M = {}
local mt = { __index = _M }

-- Idle connections of a conf that says nothing of it (APISIX's defaults): milliseconds, and how many per server and worker.
local KEEPALIVE_TIMEOUT, KEEPALIVE_POOL = 10000, 100
local SENTINEL_KEEPALIVE_TIMEOUT = 60000

-- Clients of clusters: one per conf, which is the same table until something of it changes.
local clusters = core.lrucache.new({ type = "plugin", count = 256 })

local function hex(bytes)
    return (gsub(bytes, ".", function(c) return format("%02x", byte(c)) end))
end

--- A script of one key.
function _M.new(text)
    return setmetatable({ text = text, sha = hex(sha1_bin(text)) }, mt)
end

-- The reply; nil or false and what went wrong. A server that has restarted does not know the script any more.
local function evaluate(self, red, key, ...)
    local reply, err = red:evalsha(self.sha, 1, key, ...)
    if not reply and type(err) == "string" and sub(err, 1, 8) == "NOSCRIPT" then
        core.log.warn("redis evalsha failed: ", err, ". Falling back to eval")
        reply, err = red:eval(self.text, 1, key, ...)
    end
    if reply == null then
        return nil, "the script gave nothing"
    end
    return reply, err
end

local function on_single(self, conf, key, ...)
    local red, err = redis.new(conf)
    if not red then
        return nil, err
    end
    local reply
    reply, err = evaluate(self, red, key, ...)
    -- After nil the connection is closed already.
    if reply ~= nil then
        red:set_keepalive(conf.redis_keepalive_timeout or KEEPALIVE_TIMEOUT, conf.redis_keepalive_pool or KEEPALIVE_POOL)
    end
    return reply, err
end

--- The client of resty.rediscluster that scripts use for this conf; nil and the reason.
function _M.cluster_of(conf)
    return clusters(conf, nil, rediscluster.new, conf)
end

local function on_cluster(self, conf, key, ...)
    local client, err = _M.cluster_of(conf)
    if not client then
        return nil, err
    end
    return evaluate(self, client, key, ...)
end

local function on_sentinel(self, conf, key, ...)
    local red, err = redissentinel.new(conf)
    if not red then
        return nil, err
    end
    local reply
    reply, err = evaluate(self, red, key, ...)
    if reply then
        red:set_keepalive(conf.redis_keepalive_timeout or SENTINEL_KEEPALIVE_TIMEOUT, KEEPALIVE_POOL)
        return reply
    end
    red:close()
    redissentinel.forget(conf)
    return nil, err
end

local by_policy = { redis = on_single, ["redis-cluster"] = on_cluster, ["redis-sentinel"] = on_sentinel }

--- Whether a policy counts in a Redis.
function _M.is_remote(policy)
    return by_policy[policy] ~= nil
end

--- Runs the script for a key with further arguments (strings and integers): its reply as resty.redis gives it; nil and the reason,
-- which is the server's text when it refuses.
function _M.run(self, conf, key, ...)
    local run = by_policy[conf.policy]
    if not run then
        return nil, "policy " .. tostring(conf.policy) .. " has no Redis"
    end
    local reply, err = run(self, conf, key, ...)
    if not reply then
        return nil, tostring(err)
    end
    return reply
end

-- conf -> what `identity` gives; goes with the conf.
local identities = setmetatable({}, { __mode = "k" })

--- What a conf says, as a number (CRC-32) for keys and as a text (MD5), the same on all gateways. Does not wait.
function _M.identity(conf)
    local known = identities[conf]
    if not known then
        local own = core.table.clone(conf)
        own._meta = nil
        local text = core.json.stably_encode(own)
        known = { ngx.crc32_long(text), ngx.md5(text) }
        identities[conf] = known
    end
    return known[1], known[2]
end

--- A number of milliseconds or a count as scripts read it: an integer without an exponent.
function _M.integer(number)
    return format("%.0f", number)
end

--- A number with all its digits.
function _M.float(number)
    return format("%.17g", number)
end

return _M
