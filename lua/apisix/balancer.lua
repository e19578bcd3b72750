--- `apisix.balancer`: picks a server of an upstream's table. What the gateway forwards it balances by itself; this is for
-- plugins that send requests on their own. Never waits.
local core = require("apisix.core")
local error, ipairs, next, pcall, require = error, ipairs, next, pcall, require

local _M = {}

-- Pickers by upstream and version: a plugin's upstreams.
local pickers = core.lrucache.new({ ttl = 300, count = 256 })

local function module_of(kind)
    if not kind:find("^[%w_-]+$") then
        return nil, "invalid balancer type: " .. kind
    end
    local ok, module = pcall(require, "apisix.balancer." .. kind)
    if not ok then
        return nil, "invalid balancer type: " .. kind
    end
    return module
end

-- The servers by priority, as "host:port" with their weights, and which of them are names. A weight of 0 is passed over
-- unless there is no other.
local function grouped(nodes)
    local groups, count = {}, 0
    for _, node in ipairs(nodes) do
        local priority = node.priority or 0
        local group = groups[priority]
        if not group then
            group = {}
            groups[priority] = group
            count = count + 1
        end
        group[node.host .. ":" .. (node.port or 80)] = node.weight
    end
    return groups, count
end

local function create(conf)
    local kind = conf.type or "roundrobin"
    local module, err = module_of(kind)
    if not module then
        return nil, err
    end
    local groups, count = grouped(conf.nodes)
    if count > 1 then
        return require("apisix.balancer.priority").new(groups, conf, module)
    end
    local _, group = next(groups)
    return module.new(group, conf, 0)
end

local function only_server(node, ctx)
    ctx.balancer_ip, ctx.balancer_port = node.host, node.port
    return node
end

--- The next server for the request, of `ctx.upstream_conf` (an upstream's table, its nodes an array): `{ host, port }`, or nil
-- and the reason when each was tried. `ctx.upstream_key` and `ctx.upstream_version` name the picker: those who give the
-- same share it. Called once more for the same request it takes the last server for failed; `ctx.server_picker`'s
-- `after_balance(ctx, false)` ends the request.
function _M.pick_server(_, ctx)
    local conf = ctx.upstream_conf
    local nodes = conf.nodes
    if #nodes == 0 then
        return nil, "no valid upstream node"
    end
    if #nodes == 1 then
        return only_server(nodes[1], ctx)
    end
    ctx.balancer_try_count = (ctx.balancer_try_count or 0) + 1
    local picker = ctx.server_picker
    if picker and ctx.balancer_try_count > 1 and picker.after_balance then
        picker.after_balance(ctx, true)
    end
    local err
    if not picker then
        picker, err = pickers(ctx.upstream_key, ctx.upstream_version, create, conf)
        if not picker then
            return nil, "failed to fetch server picker: " .. (err or "")
        end
        ctx.server_picker = picker
    end
    local server
    server, err = picker.get(ctx)
    ctx.balancer_server = server
    if not server then
        return nil, "failed to find valid upstream server, " .. (err or "all upstream servers tried")
    end
    local host, port = core.utils.parse_addr(server)
    ctx.balancer_ip, ctx.balancer_port = host, port
    return { host = host, port = port }
end

--- What OpenResty's balancer phase does for APISIX. The gateway does it by itself: this raises.
function _M.run()
    error("the gateway balances what it forwards; choose an upstream with apisix.upstream in rewrite or access", 2)
end

return _M
