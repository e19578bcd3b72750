--- `resty.roundrobin`: weighted round robin over named nodes (lua-resty-balancer's README).
--
-- Smooth: a node of weight 3 beside one of weight 1 is not picked three times in a row. Never waits.

local ipairs = ipairs

local _M = require("moongate.weighted")(function(self, ids)
    local list, total = {}, 0
    for i, id in ipairs(ids) do
        local weight = self.nodes[id]
        list[i] = { id = id, weight = weight, current = 0 }
        total = total + weight
    end
    self.list, self.total = list, total
end)

--- The next node's id, or nil when every weight is 0.
function _M:find()
    local best
    local list = self.list
    for i = 1, #list do
        local node = list[i]
        node.current = node.current + node.weight
        if not best or node.current > best.current then best = node end
    end
    if not best then return nil end
    best.current = best.current - self.total
    return best.id
end
_M.next = _M.find

return _M
