--- `apisix.balancer.roundrobin`: weighted round robin over servers, for plugins that pick by themselves. Never waits.
local roundrobin = require("resty.roundrobin")
local nkeys = require("table.nkeys")
local setmetatable = setmetatable

local _M = {}

-- A pick goes past servers that were tried: so often at most for each there is.
local MAX_ROUNDS = 10

--- A picker over `nodes` (`{ ["host:port"] = weight }`): `picker.get(ctx)` gives a server that this request has not tried, or
-- nil and the reason; `picker.after_balance(ctx, before_retry)` tells what has become of it.
function _M.new(nodes, upstream)
    local picker = roundrobin:new(nodes)
    local count = nkeys(nodes)
    return setmetatable({
        upstream = upstream,
        get = function(ctx)
            local tried = ctx.balancer_tried_servers
            if not tried then
                return picker:find()
            end
            for _ = 1, count * MAX_ROUNDS do
                local server = picker:find()
                if server and not tried[server] then
                    return server
                end
            end
            return nil, "all upstream servers tried"
        end,
    }, require("apisix.balancer.tried"))
end

return _M
