--- `resty.roundrobin`: weighted round robin over named nodes (lua-resty-balancer's README).
--
-- Smooth: a node of weight 3 beside one of weight 1 is not picked three times in a row. Never waits.

local error, pairs, setmetatable, tonumber, tostring, type = error, pairs, setmetatable, tonumber, tostring, type
local sort = table.sort

local _M = { _VERSION = "0.05" }
local mt = { __index = _M }

local function weight_of(id, weight)
    weight = tonumber(weight)
    if not weight or weight < 0 then error("the weight of " .. tostring(id) .. " must be a number from 0", 0) end
    return weight
end

-- In the order of the ids, so that all workers that start together go the same way.
local function rebuild(self)
    local list, total = {}, 0
    for id, weight in pairs(self.nodes) do
        if weight > 0 then
            list[#list + 1] = { id = id, weight = weight, current = 0 }
            total = total + weight
        end
    end
    sort(list, function(a, b) return tostring(a.id) < tostring(b.id) end)
    self.list, self.total = list, total
end

--- Starts again with other nodes. @param nodes table: id -> weight from 0; raises for another weight
function _M:reinit(nodes)
    local own = {}
    for id, weight in pairs(nodes) do own[id] = weight_of(id, weight) end
    self.nodes = own
    rebuild(self)
end

--- A balancer. @param nodes table: id -> weight from 0, which is copied
function _M.new(_, nodes)
    if type(nodes) ~= "table" then error("bad argument #1 to 'new' (table expected, got " .. type(nodes) .. ")", 2) end
    local self = setmetatable({}, mt)
    self:reinit(nodes)
    return self
end

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

--- Gives a node another weight. @param id any @param weight number, 1 by default
function _M:set(id, weight)
    self.nodes[id] = weight_of(id, weight or 1)
    rebuild(self)
end

--- Takes a node out.
function _M:delete(id)
    self.nodes[id] = nil
    rebuild(self)
end

--- Adds to a node's weight. @param by number, 1 by default
function _M:incr(id, by)
    self:set(id, (self.nodes[id] or 0) + (by or 1))
end

--- Takes from a node's weight; one that comes to 0 goes. @param by number, 1 by default
function _M:decr(id, by)
    local weight = self.nodes[id]
    if not weight then return end
    if weight <= (by or 1) then return self:delete(id) end
    self:set(id, weight - (by or 1))
end

return _M
