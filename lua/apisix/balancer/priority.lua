--- `apisix.balancer.priority`: servers of several priorities: those of the highest first, the next when all of them have been
-- tried. Never waits.
local core = require("apisix.core")
local ipairs, pairs, setmetatable = ipairs, pairs, setmetatable

local _M = {}

local function sorted(nodes)
    local out = {}
    for priority in pairs(nodes) do
        out[#out + 1] = priority
    end
    core.table.sort(out, function(a, b)
        return a > b
    end)
    return out
end

--- A picker over `nodes` (`{ [priority] = { ["host:port"] = weight } }`) of pickers that `module.new` makes.
function _M.new(nodes, upstream, module)
    local pickers = {}
    for i, priority in ipairs(sorted(nodes)) do
        pickers[i] = module.new(nodes[priority], upstream, priority)
    end
    return setmetatable({
        upstream = upstream,
        get = function(ctx)
            for i = ctx.priority_balancer_picker_at or 1, #pickers do
                local server = pickers[i].get(ctx)
                if server then
                    ctx.priority_balancer_picker_at = i
                    return server
                end
                if i < #pickers and pickers[i].before_retry_next_priority then
                    pickers[i].before_retry_next_priority(ctx)
                end
            end
            return nil, "all servers tried"
        end,
        after_balance = function(ctx, before_retry)
            local picker = pickers[ctx.priority_balancer_picker_at or 1]
            if picker and picker.after_balance then
                picker.after_balance(ctx, before_retry)
            end
            if not before_retry then
                ctx.priority_balancer_picker_at = nil
            end
        end,
    }, require("apisix.balancer.tried"))
end

return _M
