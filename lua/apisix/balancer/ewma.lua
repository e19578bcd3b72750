--- `apisix.balancer.ewma`: of two servers at random the one with the lower moving average of its response times, for plugins
-- that pick by themselves. Averages are this worker's. Never waits.
local tried_of = require("apisix.balancer.tried")
local exp, max, random = math.exp, math.max, math.random
local setmetatable, tonumber, tostring = setmetatable, tonumber, tostring

local _M = {}

-- Seconds after which an answer counts a third.
local DECAY = 10

local function decayed(entry, now)
    return entry.value * exp(-max(now - entry.at, 0) / DECAY)
end

-- An answer's time in seconds joins the average.
local function learn(averages, server, seconds)
    local now = ngx.now()
    local entry = averages[server]
    if not entry then
        averages[server] = { value = seconds, at = now }
        return
    end
    local weight = exp(-max(now - entry.at, 0) / DECAY)
    entry.value, entry.at = entry.value * weight + seconds * (1 - weight), now
end

local function candidates(names, tried)
    local out = {}
    for i = 1, #names do
        if not (tried and tried[names[i]]) then
            out[#out + 1] = names[i]
        end
    end
    return out
end

local function score(averages, server)
    local entry = averages[server]
    return entry and decayed(entry, ngx.now()) or 0
end

local function last_of(text)
    return tonumber((tostring(text or ""):match("([%d.]+)%s*$")))
end

--- A picker over `nodes`. As `apisix.balancer.roundrobin`'s; `after_balance` reads `$upstream_response_time`.
function _M.new(nodes, upstream)
    local averages, names = {}, tried_of.servers(nodes)
    return setmetatable({
        upstream = upstream,
        get = function(ctx)
            local left = candidates(names, ctx.balancer_tried_servers)
            if #left == 0 then
                return nil, "all upstream servers tried"
            end
            local i = random(#left)
            local j = (i + random(max(#left - 1, 1)) - 1) % #left + 1
            return score(averages, left[i]) <= score(averages, left[j]) and left[i] or left[j]
        end,
        after_balance = function(ctx, before_retry)
            local seconds = not before_retry and ctx.var and last_of(ctx.var.upstream_response_time)
            if seconds and ctx.balancer_server then
                learn(averages, ctx.balancer_server, seconds)
            end
            tried_of.after_balance(ctx, before_retry)
        end,
    }, tried_of)
end

return _M
