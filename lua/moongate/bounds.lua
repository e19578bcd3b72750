--- What of Lua's own libraries can take all memory in one call: in VMs of functions its result is measured first
-- (`limits.memory_mb`). Loaded before anything else keeps these functions.

local call_memory = require("moongate.native").fast.call_memory
local error, find, max, require, select, tonumber, type = error, string.find, math.max, require, select, tonumber, type
local raw_rep, raw_format, raw_concat, raw_new = string.rep, string.format, table.concat, require("table.new")

local _M = {}

-- Bytes of a slot in the array part of a table, and of one in its hash part.
local SLOT, NODE = 8, 24
-- Characters that a number has at most, and one that `%q` or a width may make of one.
local NUMBER, WIDEST = 32, 4

-- Garbage does not count here: it goes when there is need. No number at all is no result that fits.
local function check(bytes, most, what)
    if bytes > most or bytes ~= bytes then
        error(what .. ": the result is larger than limits.memory_mb allows", 3)
    end
end

local function length(value)
    local kind = type(value)
    return kind == "string" and #value or kind == "number" and NUMBER or nil
end

--- string.rep
function _M.rep(s, n, sep)
    local most, times = call_memory(), tonumber(n)
    if most >= 0 and times then check(((length(s) or 0) + (length(sep) or 0)) * max(0, times), most, "string.rep") end
    return raw_rep(s, n, sep)
end

--- string.format
function _M.format(template, ...)
    local most = call_memory()
    if most < 0 then return raw_format(template, ...) end
    local bytes = length(template) or 0
    for i = 1, select("#", ...) do bytes = bytes + (length((select(i, ...))) or 0) end
    -- Most of what is formatted is far from the bound.
    if bytes * WIDEST > most then check(find(template, "%q", 1, true) and bytes * WIDEST or bytes, most, "string.format") end
    return raw_format(template, ...)
end

--- table.concat
function _M.concat(list, sep, from, to)
    local most = call_memory()
    if most < 0 or type(list) ~= "table" then return raw_concat(list, sep, from, to) end
    local bytes, gap = 0, length(sep) or 0
    for at = from or 1, to or #list do
        -- What is no text ends it, with an error.
        local size = length(list[at])
        if not size then break end
        bytes = bytes + size + gap
    end
    check(bytes, most, "table.concat")
    return raw_concat(list, sep, from, to)
end

--- table.new
function _M.new(slots, nodes)
    local array, hash, most = tonumber(slots) or 0, tonumber(nodes) or 0, call_memory()
    if most >= 0 then check(max(0, array) * SLOT + max(0, hash) * NODE, most, "table.new") end
    return raw_new(array, hash)
end

--- Puts them in the place of Lua's own.
function _M.install()
    string.rep, string.format, table.concat, table.new = _M.rep, _M.format, _M.concat, _M.new
    package.loaded["table.new"] = _M.new
    -- LuaJIT's own puts its `table.new` back when it is loaded once more.
    package.preload["table.new"] = function() return _M.new end
end

return _M
