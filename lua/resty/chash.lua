--- `resty.chash`: consistent hashing over named nodes (lua-resty-balancer's README). Never waits.

local floor, ipairs, max, tostring = math.floor, ipairs, math.max, tostring
local char, sort = string.char, table.sort
local crc32 = ngx.crc32_long

-- Points on the circle per unit of weight, as nginx's `hash consistent` has.
local POINTS = 160
-- Points in all: more take memory and make no difference to the spread.
local MAX_POINTS = 160 * 1024

local function gcd(a, b)
    while b ~= 0 do a, b = b, a % b end
    return a
end

local _M = require("moongate.weighted")(function(self, ids)
    local nodes, unit, total = self.nodes, 0, 0
    for _, id in ipairs(ids) do unit, total = gcd(unit, nodes[id]), total + nodes[id] end
    local scale = unit > 0 and 1 / unit or 0
    if total * scale * POINTS > MAX_POINTS then scale = MAX_POINTS / POINTS / total end
    local points = {}
    for order, id in ipairs(ids) do
        -- Each point is made of the name and the point before, so that an id `host\0port` has the points that nginx gives it.
        local name, hash = tostring(id), 0
        for _ = 1, max(1, floor(nodes[id] * scale * POINTS)) do
            hash = crc32(name .. char(hash % 0x100, floor(hash / 0x100) % 0x100, floor(hash / 0x10000) % 0x100,
                                      floor(hash / 0x1000000)))
            points[#points + 1] = { hash = hash, id = id, order = order }
        end
    end
    sort(points, function(a, b)
        if a.hash ~= b.hash then return a.hash < b.hash end
        return a.order < b.order
    end)
    self.points = points
end)

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

return _M
