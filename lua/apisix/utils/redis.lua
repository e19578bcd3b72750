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

--- Logs a new connection in, where there is a password: true; nil and the reason.
function _M.log_in(red, username, password)
    if not password or password == "" then
        return true
    end
    if username then
        return red:auth(username, password)
    end
    return red:auth(password)
end

--- Goes to `conf.redis_database`: true; nil and the reason.
function _M.select(red, conf)
    if (conf.redis_database or 0) == 0 then
        return true
    end
    local ok, err = red:select(conf.redis_database)
    if not ok then
        return nil, "failed to change redis db, err: " .. err
    end
    return true
end

--- Has `prepare(red, conf)` make a connection ready that is new, and not one from the pool: the connection; nil and the reason, and
-- it is closed.
function _M.ready(red, conf, prepare)
    local count, err = red:get_reused_times()
    if not count then
        return nil, err
    end
    core.log.debug("redis connection reused times: ", count)
    if count > 0 then
        return red
    end
    local ok
    ok, err = prepare(red, conf)
    if not ok then
        red:close()
        return nil, err
    end
    return red
end

local function prepare(red, conf)
    local ok, err = _M.log_in(red, conf.redis_username, conf.redis_password)
    if not ok then
        return nil, err
    end
    return _M.select(red, conf)
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
    return _M.ready(red, conf, prepare)
end

return _M
