--- Limits the rate of requests per key with a leaky bucket: up to `burst` more wait their turn or pass at once (`nodelay`).
local core = require("apisix.core")
local limit_req = require("resty.limit.req")
local limit_req_redis = require("apisix.plugins.limit-req.limit-req-redis")
local redis_script = require("apisix.utils.redis-script")
local sleep = ngx.sleep
local resolve_var = core.utils.resolve_var

local name = "limit-req"
local DICT = "plugin-limit-req"
local cache = core.lrucache.new({ type = "plugin", count = 512 })

local _M = {
    version = 0.1,
    priority = 1001,
    name = name,
    schema = core.schema.of_plugin(name).schema,
}

function _M.check_schema(conf)
    return core.schema.check(_M.schema, conf)
end

local function create(conf)
    return limit_req.new(DICT, conf.rate, conf.burst)
end

local function limiter_for(conf, ctx)
    if redis_script.is_remote(conf.policy) then
        return limit_req_redis.new(conf)
    end
    return core.lrucache.plugin_ctx(cache, ctx, nil, create, conf)
end

local function key_of(conf, ctx)
    local key
    if conf.key_type == "var_combination" then
        local err, count
        key, err, count = resolve_var(conf.key, ctx.var)
        if err then
            core.log.error("could not resolve vars in ", conf.key, " error: ", err)
        end
        if count == 0 then
            key = nil
        end
    else
        key = ctx.var[conf.key]
    end
    if key == nil then
        core.log.info("The value of the configured key is empty, use client IP instead")
        key = ctx.var.remote_addr
    end
    -- Whose conf it is keeps the counters of different confs apart, and those of one conf together, whoever asks.
    local parent = conf._meta and conf._meta.parent
    if parent then
        -- Gateways that share a Redis need not share the versions of their objects.
        local version = redis_script.is_remote(conf.policy) and redis_script.identity(conf) or parent.resource_version
        return key .. ":" .. parent.resource_key .. ":" .. version
    end
    return key .. ctx.conf_type .. ctx.conf_version
end

local function reject(conf)
    if conf.rejected_msg then
        return conf.rejected_code, { error_msg = conf.rejected_msg }
    end
    return conf.rejected_code
end

function _M.access(conf, ctx)
    local limiter, create_err = limiter_for(conf, ctx)
    if not limiter then
        core.log.error("failed to create the limiter: ", create_err)
        return not conf.allow_degradation and 500 or nil
    end
    local key = key_of(conf, ctx)
    core.log.info("limit key: ", key)
    local delay, err = limiter:incoming(key, true)
    if not delay then
        if err == "rejected" then
            return reject(conf)
        end
        core.log.error("failed to limit req: ", err)
        if conf.allow_degradation then
            return
        end
        return 500
    end
    if delay >= 0.001 and not conf.nodelay then
        sleep(delay)
    end
end

return _M
