--- `resty.roundrobin`: weighted round robin over named nodes (lua-resty-balancer's interface).
--
-- Smooth: a node of weight 3 beside one of weight 1 is not picked three times in a row. Never waits.
local pairs, setmetatable, tonumber = pairs, setmetatable, tonumber

local _M = {}
local mt = { __index = _M }

local function start(self, nodes)
    local list, total = {}, 0
    for id, weight in pairs(nodes) do
        weight = tonumber(weight)
        if weight > 0 then
            list[#list + 1] = { id = id, weight = weight, current = 0 }
            total = total + weight
        end
    end
    self.nodes, self.list, self.total = nodes, list, total
end

--- A balancer for `nodes`: id -> weight.
function _M.new(_, nodes)
    local self = setmetatable({}, mt)
    start(self, nodes)
    return self
end

--- The next node's id, or nil when every weight is 0.
function _M.find(self)
    local best
    for _, node in ipairs(self.list) do
        node.current = node.current + node.weight
        if not best or node.current > best.current then
            best = node
        end
    end
    if not best then
        return nil
    end
    best.current = best.current - self.total
    return best.id
end
_M.next = _M.find

--- Starts again with other nodes.
function _M.reinit(self, nodes)
    start(self, nodes)
end

--- Gives a node another weight.
function _M.set(self, id, weight)
    self.nodes[id] = weight
    start(self, self.nodes)
end

function _M.delete(self, id)
    self.nodes[id] = nil
    start(self, self.nodes)
end

function _M.incr(self, id, by)
    _M.set(self, id, (self.nodes[id] or 0) + (by or 1))
end

function _M.decr(self, id, by)
    _M.set(self, id, (self.nodes[id] or 0) - (by or 1))
end

return _M
