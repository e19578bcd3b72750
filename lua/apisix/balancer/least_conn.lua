--- `apisix.balancer.least_conn`: the server with the least (requests in flight + 1) / weight, for plugins that pick by
-- themselves. Counts are this worker's. Never waits.
local lrucache = require("resty.lrucache")
local tried_of = require("apisix.balancer.tried")
local pairs, setmetatable = pairs, setmetatable

local _M = {}

-- Upstreams whose counts are kept. One that is left out begins at zero.
local MAX_UPSTREAMS = 1024

local kept = lrucache.new(MAX_UPSTREAMS)

-- server -> requests in flight: of an upstream with a `resource_key` the same for every picker of it.
local function counts_of(upstream, priority)
    local key = upstream and upstream.resource_key
    if not key then
        return {}
    end
    key = key .. "#" .. (priority or 0)
    local counts = kept:get(key)
    if not counts then
        counts = {}
        kept:set(key, counts)
    end
    return counts
end

--- A picker over `nodes`. As `apisix.balancer.roundrobin`'s; `after_balance` gives a request's place free.
function _M.new(nodes, upstream, priority)
    local counts, names = counts_of(upstream, priority), tried_of.servers(nodes)
    -- A server that has gone and comes back begins anew.
    for server in pairs(counts) do
        if not nodes[server] then
            counts[server] = nil
        end
    end
    return setmetatable({
        upstream = upstream,
        get = function(ctx)
            local tried = ctx.balancer_tried_servers
            local best, least
            for i = 1, #names do
                local server = names[i]
                if not (tried and tried[server]) then
                    local load = ((counts[server] or 0) + 1) / nodes[server]
                    if not least or load < least then
                        best, least = server, load
                    end
                end
            end
            if not best then
                return nil, "all upstream servers tried"
            end
            counts[best] = (counts[best] or 0) + 1
            return best
        end,
        after_balance = function(ctx, before_retry)
            local server = ctx.balancer_server
            local count = server and counts[server]
            if count then
                counts[server] = count > 1 and count - 1 or nil
            end
            tried_of.after_balance(ctx, before_retry)
        end,
    }, tried_of)
end

return _M
