--- Makes the class of a balancer over named nodes with weights: lua-resty-balancer's roundrobin, swrr and chash.

local error, pairs, setmetatable, tonumber, tostring, type = error, pairs, setmetatable, tonumber, tostring, type
local sort = table.sort

-- The ids in a steady order, so that all workers go the same way.
local function ids_of(nodes)
    local ids = {}
    for id, weight in pairs(nodes) do
        if weight > 0 then ids[#ids + 1] = id end
    end
    sort(ids, function(a, b) return tostring(a) < tostring(b) end)
    return ids
end

--- @param rebuild function(self, ids): after each change of `self.nodes`; ids of what has a weight, in order
-- @return class: new, reinit, set, delete, incr, decr
return function(rebuild)
    local _M = { _VERSION = "0.05" }
    local mt = { __index = _M }

    local function changed(self)
        rebuild(self, ids_of(self.nodes))
    end

    local function weight_of(id, weight)
        weight = tonumber(weight)
        if not weight or weight < 0 or weight % 1 ~= 0 then
            error("the weight of " .. tostring(id) .. " must be a whole number from 0", 0)
        end
        return weight
    end

    --- Starts again with other nodes. @param nodes table: id -> whole weight from 0; raises for another weight
    function _M:reinit(nodes)
        local own = {}
        for id, weight in pairs(nodes) do own[id] = weight_of(id, weight) end
        self.nodes = own
        changed(self)
    end

    --- A balancer. @param nodes table: id -> weight, which is copied
    function _M.new(_, nodes)
        if type(nodes) ~= "table" then error("bad argument #1 to 'new' (table expected, got " .. type(nodes) .. ")", 2) end
        local self = setmetatable({}, mt)
        self:reinit(nodes)
        return self
    end

    --- Gives a node another weight. @param weight number, 1 by default
    function _M:set(id, weight)
        self.nodes[id] = weight_of(id, weight or 1)
        changed(self)
    end

    --- Takes a node out.
    function _M:delete(id)
        self.nodes[id] = nil
        changed(self)
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
end
