--- `apisix.balancer.chash`: consistent hashing of a request's key over servers, for plugins that pick by themselves. Never
-- waits.
local chash = require("resty.chash")
local core = require("apisix.core")
local nkeys = require("table.nkeys")
local pairs, setmetatable, tostring, type = pairs, setmetatable, tostring, type

local _M = {}

local function raw_key(ctx, upstream)
    local hash_on, key = upstream.hash_on or "vars", upstream.key
    if hash_on == "consumer" then
        return ctx.consumer_name
    end
    if hash_on == "vars_combinations" then
        local text, _, found = core.utils.resolve_var(key, ctx.var)
        return found and found > 0 and text or nil
    end
    if hash_on == "header" then
        return ctx.var["http_" .. key]
    end
    if hash_on == "cookie" then
        return ctx.var["cookie_" .. key]
    end
    return core.utils.var_text(ctx.var[key])
end

local function key_of(ctx, upstream)
    if ctx.chash_key then
        return ctx.chash_key
    end
    local key = raw_key(ctx, upstream)
    if key == nil then
        key = ctx.var.remote_addr
        core.log.warn("chash_key fetch is nil, use default chash_key remote_addr: ", key)
    end
    core.log.info("upstream key: ", upstream.key, " hash_on: ", upstream.hash_on, " chash_key: ", key)
    return type(key) == "string" and key or tostring(key)
end

-- Points are made of the host, a zero byte and the port, as nginx makes them: a key meets the server here that the gateway sends it to.
local function id_of(server)
    local host, port = server:match("^(.*):(%d+)$")
    return host and host .. "\0" .. port or server
end

--- A picker over `nodes`; `upstream` says what the key is (`hash_on`, `key`). As `apisix.balancer.roundrobin`'s.
function _M.new(nodes, upstream)
    local weights, servers = {}, {}
    for server, weight in pairs(nodes) do
        local id = id_of(server)
        weights[id], servers[id] = weight, server
    end
    local picker = chash:new(weights)
    local count = nkeys(nodes)
    return setmetatable({
        upstream = upstream,
        get = function(ctx)
            local id, server, index
            local tried = ctx.balancer_tried_servers
            if not tried or not ctx.chash_last_server_index then
                id, index = picker:find(key_of(ctx, upstream))
                server = servers[id]
            else
                index = ctx.chash_last_server_index
            end
            -- The points of one server stand beside each other as often as chance has it: all are gone round once.
            local left = tried and #picker.points or 0
            while left > 0 and (not server or tried[server]) do
                if nkeys(tried) >= count then
                    return nil, "all upstream servers tried"
                end
                id, index = picker:next(index)
                server = servers[id]
                left = left - 1
            end
            if not server or tried and tried[server] then
                return nil, "all upstream servers tried"
            end
            ctx.chash_last_server_index = index
            return server
        end,
        after_balance = function(ctx, before_retry)
            require("apisix.balancer.tried").after_balance(ctx, before_retry)
            if not before_retry then
                ctx.chash_last_server_index = nil
            end
        end,
    }, require("apisix.balancer.tried"))
end

return _M
