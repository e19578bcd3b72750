--- `pl.tablex`: work with tables (Penlight's manual).

local utils = require("pl.utils")

local function_arg, stdmt = utils.function_arg, utils.stdmt
local getmetatable, next, pairs, setmetatable, sort, type = getmetatable, next, pairs, setmetatable, table.sort, type

local _M = {}

local function list(t)
    return setmetatable(t or {}, stdmt.List)
end

-- The class of a table goes on to what is made of it.
local function like(made, t)
    -- A text's metatable is everybody's.
    local mt = type(t) == "table" and getmetatable(t)
    return setmetatable(made, type(mt) == "table" and mt or nil)
end

--- Copies the pairs of `from` into `t`. @return t
function _M.update(t, from)
    for key, value in pairs(from) do t[key] = value end
    return t
end

function _M.size(t)
    local n = 0
    for _ in pairs(t) do n = n + 1 end
    return n
end

--- A copy of the table itself.
function _M.copy(t)
    return _M.update({}, t)
end

--- A copy with copies of all that is inside; what is there twice, or in itself, stays so.
function _M.deepcopy(t)
    local seen = {}
    local function copy(value)
        if type(value) ~= "table" then return value end
        if seen[value] then return seen[value] end
        local made = {}
        seen[value] = made
        for key, item in next, value do made[copy(key)] = copy(item) end
        return setmetatable(made, getmetatable(value))
    end
    return copy(t)
end

--- Whether two values are the same all through. @param ignore_mt boolean?: not asked by `__eq` @param eps number?: for numbers
function _M.deepcompare(a, b, ignore_mt, eps)
    local seen = {}
    local function same(x, y)
        if type(x) ~= type(y) then return false end
        if type(x) ~= "table" then
            if eps and type(x) == "number" then return math.abs(x - y) < eps end
            return x == y
        end
        local mt = getmetatable(x)
        if not ignore_mt and type(mt) == "table" and mt.__eq then return x == y end
        if seen[x] == y then return true end
        seen[x] = y
        for key in pairs(x) do
            if y[key] == nil then return false end
        end
        for key, value in pairs(y) do
            if x[key] == nil or not same(x[key], value) then return false end
        end
        return true
    end
    return same(a, b)
end

--- Whether two lists have equal items in order. @param cmp function?
function _M.compare(a, b, cmp)
    if #a ~= #b then return false end
    cmp = function_arg(3, cmp or "==")
    for i = 1, #a do
        if not cmp(a[i], b[i]) then return false end
    end
    return true
end

--- As `compare`, in any order.
function _M.compare_no_order(a, b, cmp)
    if #a ~= #b then return false end
    cmp = function_arg(3, cmp or "==")
    local taken = {}
    for i = 1, #a do
        local found
        for j = 1, #b do
            if not taken[j] and cmp(a[i], b[j]) then
                found = j
                break
            end
        end
        if not found then return false end
        taken[found] = true
    end
    return true
end

--- The place of a value in a list. @return number or nil
function _M.find(t, value, from)
    from = from or 1
    if from < 0 then from = #t + from + 1 end
    for i = from, #t do
        if t[i] == value then return i end
    end
end

function _M.rfind(t, value, from)
    from = from or #t
    if from < 0 then from = #t + from + 1 end
    for i = from, 1, -1 do
        if t[i] == value then return i end
    end
end

--- The first place whose `cmp(item, value)` holds. @return place, what cmp said
function _M.find_if(t, cmp, value)
    cmp = function_arg(2, cmp)
    for i = 1, #t do
        local found = cmp(t[i], value)
        if found then return i, found end
    end
end

--- The key of a value. @param cmp function?
function _M.search(t, value)
    for key, item in pairs(t) do
        if item == value then return key end
    end
end

--- f(value, ...) of each pair, by key.
function _M.map(f, t, ...)
    f = function_arg(1, f)
    local made = {}
    for key, value in pairs(t) do made[key] = f(value, ...) end
    return like(made, t)
end

--- f(item, ...) of each item of a list.
function _M.imap(f, t, ...)
    f = function_arg(1, f)
    local made = {}
    for i = 1, #t do
        local value = f(t[i], ...)
        made[i] = value == nil and false or value
    end
    return like(made, t)
end

--- The method `name` of each item.
function _M.map_named_method(name, t, ...)
    local made = {}
    for i = 1, #t do made[i] = t[i][name](t[i], ...) end
    return list(made)
end

--- `map`, in place.
function _M.transform(f, t, ...)
    f = function_arg(1, f)
    for key, value in pairs(t) do t[key] = f(value, ...) end
    return t
end

--- f(a, b) of the pairs of two tables, by the keys of the first.
function _M.map2(f, a, b, ...)
    f = function_arg(1, f)
    local made = {}
    for key, value in pairs(a) do made[key] = f(value, b[key], ...) end
    return like(made, a)
end

function _M.imap2(f, a, b, ...)
    f = function_arg(1, f)
    local made = {}
    for i = 1, math.min(#a, #b) do made[i] = f(a[i], b[i], ...) end
    return made
end

--- f over lists side by side.
function _M.mapn(f, ...)
    f = function_arg(1, f)
    local lists, made, n = { ... }, {}, math.huge
    for i = 1, #lists do n = math.min(n, #lists[i]) end
    for i = 1, n do
        local row = {}
        for j = 1, #lists do row[j] = lists[j][i] end
        made[i] = f(unpack(row, 1, #lists))
    end
    return made
end

--- The lists side by side as rows.
function _M.zip(...)
    return _M.mapn(function(...) return { ... } end, ...)
end

--- f(key, value) of each pair gives a value and a key, or a value for a list.
function _M.pairmap(f, t, ...)
    f = function_arg(1, f)
    local made = {}
    for key, value in pairs(t) do
        local item, name = f(key, value, ...)
        if name ~= nil then made[name] = item else made[#made + 1] = item end
    end
    return made
end

--- f(f(a, b), c) and so on. @param memo any?: the start @return nil for an empty list without one
function _M.reduce(f, t, memo)
    f = function_arg(1, f)
    local from = 1
    if memo == nil then memo, from = t[1], 2 end
    for i = from, #t do memo = f(memo, t[i]) end
    return memo
end

--- f(value, key, ...) for each pair.
function _M.foreach(t, f, ...)
    f = function_arg(2, f)
    for key, value in pairs(t) do f(value, key, ...) end
end

function _M.foreachi(t, f, ...)
    f = function_arg(2, f)
    for i = 1, #t do f(t[i], i, ...) end
end

--- The items that `pred` holds for.
function _M.filter(t, pred, arg)
    pred = function_arg(2, pred)
    local made = {}
    for i = 1, #t do
        if pred(t[i], arg) then made[#made + 1] = t[i] end
    end
    return like(made, t)
end

function _M.keys(t)
    local made = {}
    for key in pairs(t) do made[#made + 1] = key end
    return list(made)
end

function _M.values(t)
    local made = {}
    for _, value in pairs(t) do made[#made + 1] = value end
    return list(made)
end

--- value -> place
function _M.index_map(t)
    local made = {}
    for i = 1, #t do made[t[i]] = i end
    return setmetatable(made, stdmt.Map)
end

--- value -> true
function _M.makeset(t)
    local made = {}
    for i = 1, #t do made[t[i]] = true end
    return setmetatable(made, stdmt.Set)
end

--- The pairs of both tables, or, with `dup`, of either.
function _M.merge(a, b, dup)
    local made = {}
    for key, value in pairs(a) do
        if dup or b[key] ~= nil then made[key] = value end
    end
    if dup then _M.update(made, b) end
    return like(made, a)
end

--- Both. @return table
function _M.union(a, b)
    return _M.merge(a, b, true)
end

--- What both have. @return table
function _M.intersection(a, b)
    return _M.merge(a, b, false)
end

--- What the first has alone, or, with `symmetric`, either.
function _M.difference(a, b, symmetric)
    local made = {}
    for key, value in pairs(a) do
        if b[key] == nil then made[key] = value end
    end
    if symmetric then
        for key, value in pairs(b) do
            if a[key] == nil then made[key] = value end
        end
    end
    return like(made, a)
end

--- value -> how often it is in the list. @param cmp function?
function _M.count_map(t, cmp)
    local made = {}
    for i = 1, #t do
        local key = t[i]
        if cmp then
            for known in pairs(made) do
                if cmp(known, key) then
                    key = known
                    break
                end
            end
        end
        made[key] = (made[key] or 0) + 1
    end
    return setmetatable(made, stdmt.Map)
end

local function bounds(t, first, last)
    first, last = first or 1, last or -1
    if first < 0 then first = #t + first + 1 end
    if last < 0 then last = #t + last + 1 end
    return first, last
end

--- Items first to last; negative: from the end.
function _M.sub(t, first, last)
    first, last = bounds(t, first, last)
    local made = {}
    for i = first, last do made[#made + 1] = t[i] end
    return like(made, t)
end

--- Sets items first to last to a value, or to what a function of the place gives.
function _M.set(t, value, first, last)
    first, last = first or 1, last or #t
    for i = first, last do
        if utils.is_callable(value) then t[i] = value(i) else t[i] = value end
    end
end

--- A list of n values. @return list
function _M.new(n, value)
    local made = {}
    _M.set(made, value, 1, n)
    return made
end

--- Empties a list from a place on.
function _M.clear(t, from)
    for i = #t, from or 1, -1 do t[i] = nil end
end

--- Appends lists to the first. @return the first
function _M.insertvalues(t, ...)
    local place, values = ...
    if values == nil then place, values = #t + 1, place end
    local n = #values
    for i = #t, place, -1 do t[i + n] = t[i] end
    for i = 1, n do t[place + i - 1] = values[i] end
    return t
end

function _M.removevalues(t, first, last)
    first, last = bounds(t, first, last)
    for _ = first, last do table.remove(t, first) end
    return t
end

--- Copies items of a list over another's.
function _M.icopy(dest, src, idest, isrc, nsrc)
    idest, isrc = idest or 1, isrc or 1
    local n = nsrc or #src
    for i = 0, n - 1 do
        if src[isrc + i] == nil then break end
        dest[idest + i] = src[isrc + i]
    end
    for i = #dest, idest + n, -1 do
        if nsrc == nil then dest[i] = nil end
    end
    return dest
end

--- Whether nothing is in it.
function _M.isempty(t)
    return next(t) == nil
end

--- from, from + step, … to
function _M.range(from, to, step)
    local made = {}
    if from == to then return { from } end
    for i = from, to, step or (to >= from and 1 or -1) do made[#made + 1] = i end
    return made
end

--- for key, value in tablex.sort(t, f?): in the order of the keys
function _M.sort(t, f)
    local keys, i = _M.keys(t), 0
    sort(keys, f)
    return function()
        i = i + 1
        return keys[i], t[keys[i]]
    end
end

--- for key, value in tablex.sortv(t, f?): in the order of the values
function _M.sortv(t, f)
    f = function_arg(2, f or "<")
    local keys, i = _M.keys(t), 0
    sort(keys, function(a, b) return f(t[a], t[b]) end)
    return function()
        i = i + 1
        return keys[i], t[keys[i]]
    end
end

--- A view of a table that refuses to be written.
function _M.readonly(t)
    return setmetatable({}, {
        __index = t, __len = function() return #t end, __pairs = function() return pairs(t) end,
        __newindex = function() error("Attempt to modify read-only table", 2) end, __metatable = false,
    })
end

return _M
