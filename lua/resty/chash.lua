--- `resty.chash`: consistent hashing over named nodes (lua-resty-balancer's README). Never waits.

local error, floor, ipairs, max, pairs, setmetatable, tonumber, tostring, type =
    error, math.floor, ipairs, math.max, pairs, setmetatable, tonumber, tostring, type
local sort = table.sort
local crc32 = ngx.crc32_long

-- Points on the circle per unit of weight, as nginx's `hash consistent` has.
local POINTS = 160
-- Points in all: more take memory and make no difference to the spread.
local MAX_POINTS = 160 * 4096

local _M = { _VERSION = "0.05" }
local mt = { __index = _M }

local function weight_of(id, weight)
    weight = tonumber(weight)
    if not weight or weight < 0 or weight % 1 ~= 0 then
        error("the weight of " .. tostring(id) .. " must be a whole number from 0", 0)
    end
    return weight
end

local function gcd(a, b)
    while b ~= 0 do a, b = b, a % b end
    return a
end

local function rebuild(self)
    local ids, unit, total = {}, 0, 0
    for id, weight in pairs(self.nodes) do
        if weight > 0 then
            ids[#ids + 1] = id
            unit, total = gcd(unit, weight), total + weight
        end
    end
    sort(ids, function(a, b) return tostring(a) < tostring(b) end)
    local scale = unit > 0 and 1 / unit or 0
    if total * scale * POINTS > MAX_POINTS then scale = MAX_POINTS / POINTS / total end
    local points = {}
    for order, id in ipairs(ids) do
        local name, hash = tostring(id), 0
        for i = 1, max(1, floor(self.nodes[id] * scale * POINTS)) do
            hash = crc32(name .. "\0" .. hash .. "\0" .. i)
            points[#points + 1] = { hash = hash, id = id, order = order }
        end
    end
    sort(points, function(a, b)
        if a.hash ~= b.hash then return a.hash < b.hash end
        return a.order < b.order
    end)
    self.points = points
end

--- Starts again with other nodes. @param nodes table: id -> whole weight from 0; raises for another weight
function _M:reinit(nodes)
    local own = {}
    for id, weight in pairs(nodes) do own[id] = weight_of(id, weight) end
    self.nodes = own
    rebuild(self)
end

--- A circle. @param nodes table: id -> weight, which is copied
function _M.new(_, nodes)
    if type(nodes) ~= "table" then error("bad argument #1 to 'new' (table expected, got " .. type(nodes) .. ")", 2) end
    local self = setmetatable({}, mt)
    self:reinit(nodes)
    return self
end

--- The node of a key. @param key string or number @return id, index; nil when there is no node
function _M:find(key)
    local points = self.points
    local n = #points
    if n == 0 then return nil end
    local hash = crc32(tostring(key))
    local low, high = 1, n + 1
    while low < high do
        local mid = floor((low + high) / 2)
        if points[mid].hash < hash then low = mid + 1 else high = mid end
    end
    if low > n then low = 1 end
    return points[low].id, low
end

--- The point behind one that `find` or `next` gave. @param index number @return id, index
function _M:next(index)
    local points = self.points
    local n = #points
    if n == 0 then return nil end
    index = index % n + 1
    return points[index].id, index
end

--- Gives a node another weight. @param weight number, 1 by default
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
