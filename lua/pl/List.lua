--- `pl.List`: lists with methods, as Python has them (Penlight's manual). Places are counted from 1, negative ones from the end.

local tablex = require("pl.tablex")
local utils = require("pl.utils")

local concat, getmetatable, insert, remove, setmetatable, sort, tostring, type =
    table.concat, getmetatable, table.insert, table.remove, setmetatable, table.sort, tostring, type

local List = utils.stdmt.List
List.__index = List

--- A list of a table's items, of an iterator's values, or an empty one.
function List.new(t)
    if type(t) == "table" and getmetatable(t) ~= List then
        local made = setmetatable({}, List)
        for i = 1, #t do made[i] = t[i] end
        return made
    elseif type(t) == "function" then
        return List.iterate_to_list(t)
    end
    local made = setmetatable({}, List)
    if t then made:extend(t) end
    return made
end

function List.iterate_to_list(iterator)
    local made = setmetatable({}, List)
    for value in iterator do made[#made + 1] = value end
    return made
end

local function place(self, i)
    return i < 0 and #self + i + 1 or i
end

function List:clone()
    return List.new(tablex.sub(self))
end

function List:append(value)
    self[#self + 1] = value
    return self
end
List.push = List.append

function List:extend(other)
    for i = 1, #other do self[#self + 1] = other[i] end
    return self
end

function List:insert(i, value)
    insert(self, place(self, i), value)
    return self
end

--- Puts a value before all.
function List:put(value)
    return self:insert(1, value)
end

--- Takes the ith out. @return the list
function List:remove(i)
    remove(self, place(self, i))
    return self
end

--- Takes the first equal value out. @return the list
function List:remove_value(value)
    local i = tablex.find(self, value)
    if i then remove(self, i) end
    return self
end

--- Takes the ith, the last by default, out. @return it
function List:pop(i)
    return remove(self, i and place(self, i) or #self)
end

List.get = function(self) return self:pop() end
List.index, List.find = tablex.find, tablex.find

function List:contains(value)
    return tablex.find(self, value) ~= nil
end

function List:count(value)
    local n = 0
    for i = 1, #self do
        if self[i] == value then n = n + 1 end
    end
    return n
end

--- Sorts in place. @param cmp function or operator?
function List:sort(cmp)
    sort(self, cmp and utils.function_arg(1, cmp) or nil)
    return self
end

function List:sorted(cmp)
    return self:clone():sort(cmp)
end

function List:reverse()
    local n = #self
    for i = 1, math.floor(n / 2) do self[i], self[n - i + 1] = self[n - i + 1], self[i] end
    return self
end

function List:minmax()
    local low, high = math.huge, -math.huge
    for i = 1, #self do low, high = math.min(low, self[i]), math.max(high, self[i]) end
    return low, high
end

function List:slice(first, last)
    return List.new(tablex.sub(self, first, last))
end

function List:clear()
    tablex.clear(self)
    return self
end

--- List.range(from, to, step?)
function List.range(from, to, step)
    if not to then from, to = 1, from end
    return List.new(tablex.range(from, to, step))
end

function List:len()
    return #self
end

--- Takes items i to j out.
function List:chop(i, j)
    return tablex.removevalues(self, i, j)
end

--- Puts a list's items in at a place.
function List:splice(i, other)
    return tablex.insertvalues(self, place(self, i), other)
end

function List:slice_assign(i, j, other)
    self:chop(i, j)
    return self:splice(i, other)
end

function List:join(separator)
    local texts = {}
    for i = 1, #self do texts[i] = tostring(self[i]) end
    return concat(texts, separator or "")
end
List.concat = List.join

function List:foreach(f, ...)
    tablex.foreachi(self, f, ...)
end

function List:map(f, ...)
    return tablex.imap(f, self, ...)
end

function List:transform(f, ...)
    return tablex.transform(f, self, ...)
end

function List:map2(f, other, ...)
    return List.new(tablex.imap2(f, self, other, ...))
end

function List:filter(pred, arg)
    return tablex.filter(self, pred, arg)
end

function List:reduce(f, start)
    return tablex.reduce(f, self, start)
end

--- Lists of the items by what a function says of them. @return table
function List:partition(f, ...)
    f = utils.function_arg(1, f)
    local made = {}
    for i = 1, #self do
        local key = f(self[i], ...)
        if key == nil then key = "<nil>" end
        made[key] = made[key] or List.new()
        made[key]:append(self[i])
    end
    return made
end

function List:iter()
    local i = 0
    return function()
        i = i + 1
        return self[i]
    end
end
List.iterate = List.iter

--- The pieces of a text. @param delim string?: a pattern, white space by default
function List.split(text, delim)
    return List.new(utils.split(text, delim))
end

function List.__tostring(self)
    return "{" .. self:map(tostring):join(",") .. "}"
end

function List.__concat(a, b)
    return List.new(a):extend(b)
end

function List.__eq(a, b)
    return tablex.compare(a, b)
end

return setmetatable(List, { __call = function(_, t) return List.new(t) end })
