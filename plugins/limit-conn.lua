--- Limits how many requests of a key are under way at once; up to `burst` more wait a little.
local core = require("apisix.core")
local limit_conn = require("resty.limit.conn")
local limit_conn_redis = require("apisix.plugins.limit-conn.limit-conn-redis")
local redis_script = require("apisix.utils.redis-script")
local sleep = ngx.sleep
local resolve_var = core.utils.resolve_var
local floor = math.floor
local ipairs, tonumber, type = ipairs, tonumber, type

local name = "limit-conn"
local DICT = "plugin-limit-conn"
local cache = core.lrucache.new({ type = "plugin", count = 512 })

local _M = {
    version = 0.1,
    priority = 1003,
    name = name,
    schema = core.schema.of_plugin(name).schema,
}

function _M.check_schema(conf)
    return core.schema.check(_M.schema, conf)
end

-- A number or a text with variables.
local function resolved_number(value, ctx)
    if type(value) == "number" then
        return value
    end
    return tonumber((resolve_var(value, ctx.var)))
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
    return key
end

-- The limits that hold for this request: `{ conn, burst, key }` each.
local function limits_of(conf, ctx)
    if not conf.rules then
        return { { conn = conf.conn, burst = conf.burst, key = key_of(conf, ctx) } }
    end
    local out = {}
    for _, rule in ipairs(conf.rules) do
        local key, err, count = resolve_var(rule.key, ctx.var)
        if not err and count > 0 then
            out[#out + 1] = { conn = rule.conn, burst = rule.burst, key = key }
        end
    end
    return out
end

local function create(conf, conn, burst)
    if redis_script.is_remote(conf.policy) then
        return limit_conn_redis.new(conn, burst, conf.default_conn_delay)
    end
    return limit_conn.new(DICT, conn, burst, conf.default_conn_delay)
end

local function limiter_for(conf, ctx, limit)
    local conn, burst = resolved_number(limit.conn, ctx), resolved_number(limit.burst, ctx)
    if not conn or conn <= 0 or not burst or burst < 0 then
        return nil, "conn and burst must resolve to numbers"
    end
    local id = conn .. ":" .. burst .. ":" .. conf.default_conn_delay .. ":" .. (conf.policy or "local")
    return core.lrucache.plugin_ctx(cache, ctx, id, create, conf, conn, burst)
end

local function reject(conf)
    if conf.rejected_msg then
        return conf.rejected_code, { error_msg = conf.rejected_msg }
    end
    return conf.rejected_code
end

local function failed(conf, err)
    core.log.error("failed to limit conn: ", err)
    return not conf.allow_degradation and 500 or nil
end

-- Parent and version keep the counters of different confs apart. Gateways that share a Redis need not share the versions of their
-- objects.
local function counter_key(conf, ctx, value)
    local meta = conf._meta
    local parent = meta and meta.parent
    if parent then
        local version = redis_script.is_remote(conf.policy) and redis_script.identity(conf) or parent.resource_version
        local key = parent.resource_key .. ":" .. version .. ":" .. value
        return meta.workflow_rule and key .. ":" .. meta.workflow_rule or key
    end
    return ctx.conf_type .. ctx.conf_version .. ":" .. value
end

local function enter(conf, ctx, limit)
    local limiter, err = limiter_for(conf, ctx, limit)
    if not limiter then
        return failed(conf, err)
    end
    local key = counter_key(conf, ctx, limit.key)
    core.log.info("limit key: ", key)
    local delay, place
    delay, err, place = limiter:incoming(key, true, conf)
    if not delay then
        if err == "rejected" then
            return reject(conf)
        end
        return failed(conf, err)
    end
    if limiter:is_committed() then
        ctx.limit_conn = ctx.limit_conn or {}
        core.table.insert(ctx.limit_conn, { limiter = limiter, key = key, place = place, delay = delay, conf = conf })
    end
    if delay >= 0.001 then
        sleep(delay)
    end
end

function _M.access(conf, ctx)
    for _, limit in ipairs(limits_of(conf, ctx)) do
        local code, body = enter(conf, ctx, limit)
        if code then
            return code, body
        end
    end
end

-- How long the request really took teaches the limiter how long the next has to wait.
local function latency(ctx)
    local upstream = tonumber(ctx.var.upstream_response_time)
    return upstream or tonumber(ctx.var.request_time)
end

function _M.log(_, ctx)
    local entered = ctx.limit_conn
    ctx.limit_conn = nil
    for _, entry in ipairs(entered or {}) do
        local took
        if not entry.conf.only_use_default_delay then
            took = latency(ctx)
            took = took and took - floor(entry.delay)
        end
        core.log.debug("request latency is ", took)
        local _, err = entry.limiter:leaving(entry.key, took, entry.place)
        if err then
            core.log.error("failed to record the connection leaving request: ", err)
        end
    end
end

--- For the workflow plugin: runs this plugin as an action.
function _M.workflow_handler()
    return { check_schema = _M.check_schema, handler = _M.access, log = _M.log }
end

return _M
