--- `apisix.balancer`: picks a node of an upstream, for plugins and scripts that send requests themselves.
--
-- What the gateway itself forwards is balanced natively and does not come here. Phases: all; never waits.
local core = require("apisix.core")
local roundrobin = require("resty.roundrobin")
local chash = require("resty.chash")

local ipairs, tostring = ipairs, tostring

-- Pickers kept per VM: one for each upstream in use, for as long as its version is the same.
local pickers = core.lrucache.new({ ttl = 300, count = 256 })

local _M = { version = 0.3 }

-- The nodes that take part: of the highest priority that has a weight.
local function nodes_of(upstream)
    local weights, by_name, best = {}, {}, nil
    for _, node in ipairs(upstream.nodes) do
        local priority = node.priority or 0
        if (node.weight or 1) > 0 and (not best or priority > best) then best = priority end
    end
    for _, node in ipairs(upstream.nodes) do
        if (node.priority or 0) == best then
            local name = node.host .. ":" .. tostring(node.port or "")
            weights[name] = node.weight or 1
            by_name[name] = node
        end
    end
    return weights, by_name
end

-- What `upstream.key` says of the request, as `hash_on` reads it.
local function hash_key(upstream, ctx)
    local on, key = upstream.hash_on or "vars", upstream.key
    local value
    if on == "consumer" then
        value = ctx.consumer_name
    elseif on == "vars" then
        value = ctx.var[key]
    elseif on == "header" then
        value = ctx.var["http_" .. key]
    elseif on == "cookie" then
        value = ctx.var["cookie_" .. key]
    elseif on == "vars_combinations" then
        value = core.utils.resolve_var(key, ctx.var)
    end
    return value or ctx.var.remote_addr
end

local function new_picker(upstream)
    local weights, by_name = nodes_of(upstream)
    local kind = upstream.type or "roundrobin"
    if kind ~= "roundrobin" and kind ~= "chash" then
        return nil, "failed to fetch server picker: type " .. kind .. " is balanced natively only"
    end
    local class = kind == "chash" and chash or roundrobin
    return { upstream = upstream, by_name = by_name, ring = class:new(weights), hashes = kind == "chash" }
end

--- A node for the request.
-- @param _ table: the route, which has no say
-- @param ctx table: `upstream_conf` (`nodes` a list, `type` roundrobin or chash, `key`, `hash_on`), `upstream_key` and
--   `upstream_version`, which name the picker that is kept, `var`; `server_picker` is kept in it for the request's next try,
--   `balancer_ip` and `balancer_port` say what was picked
-- @return table, the node of `nodes`; nil and why: no node has a weight, or the type is balanced natively only
function _M.pick_server(_, ctx)
    local upstream = ctx.upstream_conf
    local node, err
    if #upstream.nodes == 1 then
        node = upstream.nodes[1]
    else
        local picker = ctx.server_picker
        if not picker then
            picker, err = pickers(ctx.upstream_key, ctx.upstream_version, new_picker, upstream)
            if not picker then return nil, err end
            ctx.server_picker = picker
        end
        local name = picker.ring:find(picker.hashes and hash_key(picker.upstream, ctx) or nil)
        node = name and picker.by_name[name]
        if not node then return nil, "failed to find valid upstream server" end
    end
    ctx.balancer_ip, ctx.balancer_port = node.host, node.port
    return node
end

return _M
