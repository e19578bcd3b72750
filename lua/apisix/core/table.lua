--- `core.table`: table functions. None of them waits; all phases.
local ipairs = ipairs
local pairs = pairs
local select = select
local setmetatable = setmetatable
local getmetatable = getmetatable
local tostring = tostring
local type = type

local newtab = require("table.new")
local nkeys = require("table.nkeys")
local isarray = require("table.isarray")

local _M = {
    new = newtab,
    clear = require("table.clear"),
    nkeys = nkeys,
    isarray = isarray,
    isempty = require("table.isempty"),
    clone = require("table.clone"),
    insert = table.insert,
    concat = table.concat,
    sort = table.sort,
    remove = table.remove,
    unpack = unpack,
    pack = function(...)
        return { n = select("#", ...), ... }
    end,
    empty_tab = setmetatable({}, {
        __newindex = function()
            error("empty_tab can not be changed", 2)
        end,
    }),
    -- cjson encodes a table with this metatable as an array, also when it is empty.
    array_mt = require("cjson.safe").array_mt,
}
setmetatable(_M, { __index = table })

--- Appends every argument to `tab`; returns how many.
function _M.insert_tail(tab, ...)
    local at = #tab
    local n = select("#", ...)
    for i = 1, n do
        tab[at + i] = (select(i, ...))
    end
    return at + n
end

--- Stores the arguments from index 1 on; returns how many.
function _M.set(tab, ...)
    local n = select("#", ...)
    for i = 1, n do
        tab[i] = (select(i, ...))
    end
    return n
end

--- The index of the array's element that equals `value`, or nil.
function _M.array_find(array, value)
    if type(array) ~= "table" then
        return nil
    end
    for i, v in ipairs(array) do
        if v == value then
            return i
        end
    end
    return nil
end

--- Makes `mt.__gc` run when `tab` is collected; Lua 5.1 knows it for userdata only.
function _M.setmt__gc(tab, mt)
    local guard = newproxy(true)
    getmetatable(guard).__gc = function()
        mt.__gc(tab)
    end
    tab[guard] = true
    return setmetatable(tab, mt)
end

local function copy(value, seen, path, shallow)
    if type(value) ~= "table" then
        return value
    end
    if seen[value] then
        return seen[value]
    end
    local out = newtab(#value, 0)
    seen[value] = out
    for k, v in pairs(value) do
        local at = path == "" and tostring(k) or path .. "." .. tostring(k)
        if shallow[at] then
            out[k] = v
        else
            out[k] = copy(v, seen, at, shallow)
        end
    end
    return setmetatable(out, getmetatable(value))
end

--- A copy that shares no table with `value`, metatables excepted. `opts.shallows` lists paths (`"self.a.b"`)
-- that are to be shared.
function _M.deepcopy(value, opts)
    local shallow = {}
    for _, path in ipairs(opts and opts.shallows or {}) do
        shallow[path] = true
    end
    return copy(value, {}, next(shallow) and "self" or "", shallow)
end

--- Merges `from` into `into`, tables recursively; `from` wins. Returns `into`.
function _M.merge(into, from)
    for k, v in pairs(from) do
        if type(v) == "table" and type(into[k]) == "table" then
            _M.merge(into[k], v)
        else
            into[k] = v
        end
    end
    return into
end

--- Replaces the contents of `into` by those of `from`: a patch of sub-tables, arrays as a whole.
function _M.patch(into, from)
    for k, v in pairs(from) do
        if type(v) == "table" and type(into[k]) == "table" and not isarray(v) then
            _M.patch(into[k], v)
        else
            into[k] = v
        end
    end
    return into
end

--- The first of `keys` that `tab` has: its value and the key.
function _M.try_read_attr(tab, ...)
    for i = 1, select("#", ...) do
        if type(tab) ~= "table" then
            return nil
        end
        tab = tab[(select(i, ...))]
    end
    return tab
end

--- Whether two values are equal, tables by contents.
function _M.deep_eq(a, b)
    if type(a) ~= "table" or type(b) ~= "table" then
        return a == b
    end
    if a == b then
        return true
    end
    if nkeys(a) ~= nkeys(b) then
        return false
    end
    for k, v in pairs(a) do
        if not _M.deep_eq(v, b[k]) then
            return false
        end
    end
    return true
end

--- A table of those keys of `obj` that `filter` has.
function _M.pick(obj, filter)
    local out = {}
    for k, v in pairs(obj) do
        if filter[k] then
            out[k] = v
        end
    end
    return out
end

return _M
