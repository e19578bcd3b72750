--- What the pickers of `apisix.balancer.*` have in common: `ctx.balancer_tried_servers`, the servers that a request has tried.
local pairs, sort = pairs, table.sort

local _M = {}
_M.__index = _M

--- The servers of `nodes` (`{ ["host:port"] = weight }`) that have a weight, in order.
function _M.servers(nodes)
    local names = {}
    for server, weight in pairs(nodes) do
        if weight > 0 then
            names[#names + 1] = server
        end
    end
    sort(names)
    return names
end

--- The last server has failed (`before_retry`), or the request is over.
function _M.after_balance(ctx, before_retry)
    if not before_retry then
        ctx.balancer_tried_servers = nil
        return
    end
    if not ctx.balancer_server then
        return
    end
    local tried = ctx.balancer_tried_servers
    if not tried then
        tried = {}
        ctx.balancer_tried_servers = tried
    end
    tried[ctx.balancer_server] = true
end

--- The next priority's servers have not been tried.
function _M.before_retry_next_priority(ctx)
    ctx.balancer_tried_servers = nil
end

return _M
