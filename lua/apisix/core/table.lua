--- `core.table`: table functions. None of them waits; all phases.
local ipairs = ipairs
local pairs = pairs
local select = select
local setmetatable = setmetatable
local getmetatable = getmetatable
local concat = table.concat
local next = next
local null = ngx.null
local sub = string.sub
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

-- `at`: the path of `value` from "self" on; nil when no path is asked for.
local function is_shared(at, opts)
    if opts.paths[at] then
        return true
    end
    local prefix = opts.prefix
    return prefix and sub(at, 1, #prefix) == prefix
end

local function copy(value, seen, at, opts)
    if type(value) ~= "table" then
        return value
    end
    if seen[value] then
        return seen[value]
    end
    local out = newtab(#value, 0)
    seen[value] = out
    for k, v in pairs(value) do
        local inner = at and at .. "." .. tostring(k)
        if inner and type(v) == "table" and is_shared(inner, opts) then
            out[k] = v
        else
            out[k] = copy(v, seen, inner, opts)
        end
    end
    return setmetatable(out, getmetatable(value))
end

--- A copy that shares no table with `value`, metatables excepted; a table that is in it twice is copied once.
-- `opts.shallows` lists paths (`"self.a.b"`) of tables that are to be shared; `opts.shallow_prefix` (`"self.plugins"`)
-- shares every table below that path.
function _M.deepcopy(value, opts)
    if not opts then
        return copy(value, {})
    end
    local paths = {}
    for _, path in ipairs(opts.shallows or {}) do
        paths[path] = true
    end
    local prefix = opts.shallow_prefix and opts.shallow_prefix .. "."
    return copy(value, {}, "self", { paths = paths, prefix = prefix })
end

--- Merges `from` into `into` and returns `into`: `from` wins, objects are merged, arrays replaced, and null
-- (`ngx.null`) takes a field out: what PATCH of the Admin API does.
function _M.merge(into, from)
    for k, v in pairs(from) do
        local old = into[k]
        if v == null then
            into[k] = nil
        elseif type(v) == "table" and type(old) == "table" and not (next(old) ~= nil and isarray(old)) then
            _M.merge(old, v)
        else
            into[k] = v
        end
    end
    return into
end

--- Replaces what is at a path of `object`, such as `"upstream/nodes"`; objects on the way are made. nil, nil and the
-- object, or 400 and the reason when something on the way is no object.
function _M.patch(object, path, value)
    local names = {}
    for name in path:gmatch("[^/]+") do
        names[#names + 1] = name
    end
    if #names == 0 then
        return nil, nil, value
    end
    local owner = object
    for i = 1, #names - 1 do
        local name = names[i]
        if owner[name] == nil then
            owner[name] = {}
        end
        owner = owner[name]
        if type(owner) ~= "table" then
            return 400, "invalid sub-path: /" .. concat(names, "/", 1, i)
        end
    end
    owner[names[#names]] = value
    return nil, nil, object
end

--- `try_read_attr(tab, "a", "b")`: what is at `tab.a.b`, or nil when there is no such table on the way.
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

--- Whether two tables have the same keys, whatever is at them.
function _M.set_eq(a, b)
    if nkeys(a) ~= nkeys(b) then
        return false
    end
    for k in pairs(a) do
        if b[k] == nil then
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
