--- tablepool: tables by tag, used again.

local clear, new = require("table.clear"), require("table.new")

-- Tables kept per tag: as many as requests are usually inside a VM at once.
local MAX_KEPT = 200

local pools = {}
local _M = { _VERSION = "0.03" }

--- A table of the pool `tag`, or a new one with room.
function _M.fetch(tag, narr, nrec)
    local pool = pools[tag]
    if not pool then
        pools[tag] = { n = 0 }
    elseif pool.n > 0 then
        local n = pool.n
        local t = pool[n]
        pool[n], pool.n = nil, n - 1
        return t
    end
    return new(narr or 0, nrec or 0)
end

--- Gives a table back, emptied unless `no_clear`.
function _M.release(tag, t, no_clear)
    if not t then error("object empty", 2) end
    local pool = pools[tag]
    if not pool then
        pool = { n = 0 }
        pools[tag] = pool
    end
    if not no_clear then
        setmetatable(t, nil)
        clear(t)
    end
    if pool.n < MAX_KEPT then
        pool.n = pool.n + 1
        pool[pool.n] = t
    end
end

return _M
