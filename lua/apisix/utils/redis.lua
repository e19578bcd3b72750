--- `apisix.utils.redis`: a connection to the Redis of a plugin's conf (`apisix.utils.redis-schema`). Waits.
local redis = require("resty.redis")
local core = require("apisix.core")

local _M = {}

-- A connection is used again by those who speak for the same user of the same database.
local function pool_of(conf)
    return conf.redis_host .. ":" .. (conf.redis_port or 6379) .. "#" .. (conf.redis_database or 0) .. "#"
        .. (conf.redis_username or "") .. "#" .. (conf.redis_password and ngx.md5(conf.redis_password) or "")
        .. (conf.redis_ssl and (conf.redis_ssl_verify and "#tls verified" or "#tls") or "")
end

local function log_in(red, conf)
    if not conf.redis_password or conf.redis_password == "" then
        return true
    end
    if conf.redis_username then
        return red:auth(conf.redis_username, conf.redis_password)
    end
    return red:auth(conf.redis_password)
end

local function prepare(red, conf)
    local ok, err = log_in(red, conf)
    if not ok then
        return nil, err
    end
    if (conf.redis_database or 0) == 0 then
        return true
    end
    ok, err = red:select(conf.redis_database)
    if not ok then
        return nil, "failed to change redis db, err: " .. err
    end
    return true
end

--- A connected client of lua-resty-redis, logged in, at its database; nil and the reason. Give it back with
-- `red:set_keepalive(conf.redis_keepalive_timeout, conf.redis_keepalive_pool)`.
function _M.new(conf)
    local red = redis:new()
    red:set_timeout(conf.redis_timeout or 1000)
    local ok, err = red:connect(conf.redis_host, conf.redis_port or 6379, {
        ssl = conf.redis_ssl, ssl_verify = conf.redis_ssl_verify, pool = pool_of(conf),
        pool_size = conf.redis_keepalive_pool,
    })
    if not ok then
        core.log.error(" redis connect error, error: ", err)
        return nil, err
    end
    local count
    count, err = red:get_reused_times()
    if not count then
        return nil, err
    end
    core.log.debug("redis connection reused times: ", count)
    if count == 0 then
        ok, err = prepare(red, conf)
        if not ok then
            red:close()
            return nil, err
        end
    end
    return red
end

return _M
