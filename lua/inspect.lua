--- `inspect`: any value as text for people (inspect.lua's README).

local concat, floor, huge, rep, sort = table.concat, math.floor, math.huge, string.rep, table.sort
local getmetatable, ipairs, next, rawget, setmetatable, tostring, type =
    getmetatable, ipairs, next, rawget, setmetatable, tostring, type

local _M = { _VERSION = "inspect.lua 3.1.0" }

--- Marks in the path that `process` gets.
_M.KEY = setmetatable({}, { __tostring = function() return "inspect.KEY" end })
_M.METATABLE = setmetatable({}, { __tostring = function() return "inspect.METATABLE" end })

local escapes = { ["\a"] = "\\a", ["\b"] = "\\b", ["\f"] = "\\f", ["\n"] = "\\n", ["\r"] = "\\r", ["\t"] = "\\t",
    ["\v"] = "\\v", ["\127"] = "\\127" }

local function quoted(text)
    local quote = '"'
    if text:find('"', 1, true) and not text:find("'", 1, true) then quote = "'" end
    text = text:gsub("\\", "\\\\")
    if quote == '"' then text = text:gsub('"', '\\"') end
    text = text:gsub("(%c)(%d?)", function(c, digit)
        local byte = c:byte()
        local short = escapes[c]
        if short then return short .. digit end
        return (digit ~= "" and "\\%03d" or "\\%d"):format(byte) .. digit
    end)
    return quote .. text .. quote
end

local keywords = {}
for word in ("and break do else elseif end false for function goto if in local nil not or repeat return then true until while")
    :gmatch("%a+") do
    keywords[word] = true
end

local function is_name(key)
    return type(key) == "string" and key:find("^[%a_][%w_]*$") ~= nil and not keywords[key]
end

local order = { number = 1, boolean = 2, string = 3, table = 4, ["function"] = 5, userdata = 6, thread = 7 }

local function before(a, b)
    local ta, tb = type(a), type(b)
    if ta == tb and (ta == "string" or ta == "number") then return a < b end
    local oa, ob = order[ta] or 100, order[tb] or 100
    if oa ~= ob then return oa < ob end
    return tostring(a) < tostring(b)
end

local function length(t)
    local n = 0
    while rawget(t, n + 1) ~= nil do n = n + 1 end
    return n
end

-- Keys that are not of the sequence 1 to n, in order.
local function other_keys(t, n)
    local keys = {}
    for key in next, t do
        if type(key) ~= "number" or key < 1 or key > n or floor(key) ~= key then keys[#keys + 1] = key end
    end
    sort(keys, before)
    return keys
end

local function count(counts, value)
    if type(value) ~= "table" then return end
    if counts[value] then
        counts[value] = counts[value] + 1
        return
    end
    counts[value] = 1
    for key, item in next, value do
        count(counts, key)
        count(counts, item)
    end
    count(counts, getmetatable(value))
end

local function extended(path, ...)
    local longer, n = {}, #path
    for i = 1, n do longer[i] = path[i] end
    for i = 1, select("#", ...) do longer[n + i] = (select(i, ...)) end
    return longer
end

-- A copy in which `process` has changed what it wants.
local function processed(process, value, path, seen)
    if value == nil then return nil end
    if seen[value] then return seen[value] end
    local made = process(value, path)
    if type(made) ~= "table" then return made end
    local copy = {}
    seen[value] = copy
    for key, item in next, made do
        local new_key = processed(process, key, extended(path, key, _M.KEY), seen)
        if new_key ~= nil then copy[new_key] = processed(process, item, extended(path, new_key), seen) end
    end
    local mt = processed(process, getmetatable(made), extended(path, _M.METATABLE), seen)
    if type(mt) == "table" then setmetatable(copy, mt) end
    return copy
end

local Inspector = {}
Inspector.__index = Inspector

function Inspector:put(text)
    local out = self.out
    out[#out + 1] = text
end

function Inspector:line()
    self:put(self.newline .. rep(self.indent, self.level))
end

function Inspector:id(value)
    local kind = type(value)
    local ids = self.ids[kind] or { n = 0 }
    self.ids[kind] = ids
    if not ids[value] then
        ids.n = ids.n + 1
        ids[value] = ids.n
    end
    return ids[value]
end

function Inspector:key(key)
    if is_name(key) then return self:put(key) end
    self:put("[")
    self:value(key)
    self:put("]")
end

function Inspector:table(t)
    if self.known[t] then return self:put("<table " .. self:id(t) .. ">") end
    if self.level >= self.depth then return self:put("{...}") end
    if self.counts[t] > 1 then self:put("<" .. self:id(t) .. ">") end
    self.known[t] = true
    local n = length(t)
    local keys, mt = other_keys(t, n), getmetatable(t)
    self:put("{")
    self.level = self.level + 1
    local items = 0
    local function comma()
        if items > 0 then self:put(",") end
        items = items + 1
    end
    for i = 1, n do
        comma()
        self:put(" ")
        self:value(t[i])
    end
    for _, key in ipairs(keys) do
        comma()
        self:line()
        self:key(key)
        self:put(" = ")
        self:value(rawget(t, key))
    end
    if type(mt) == "table" then
        comma()
        self:line()
        self:put("<metatable> = ")
        self:value(mt)
    end
    self.level = self.level - 1
    if #keys > 0 or type(mt) == "table" then
        self:line()
    elseif n > 0 then
        self:put(" ")
    end
    self:put("}")
end

function Inspector:value(value)
    local kind = type(value)
    if kind == "string" then
        self:put(quoted(value))
    elseif kind == "number" then
        self:put(value == huge and "math.huge" or value == -huge and "-math.huge" or tostring(value))
    elseif kind == "boolean" or kind == "nil" or kind == "cdata" then
        self:put(tostring(value))
    elseif kind == "table" then
        self:table(value)
    else
        self:put("<" .. kind .. " " .. self:id(value) .. ">")
    end
end

--- @param value any
-- @param options table?: depth (math.huge by default), newline, indent, process = function(item, path): what to show, nil for nothing
-- @return string
function _M.inspect(value, options)
    options = options or {}
    if options.process then value = processed(options.process, value, {}, {}) end
    local counts = {}
    count(counts, value)
    local inspector = setmetatable({ out = {}, level = 0, ids = {}, known = {}, counts = counts,
        depth = options.depth or huge, newline = options.newline or "\n", indent = options.indent or "  " }, Inspector)
    inspector:value(value)
    return concat(inspector.out)
end

return setmetatable(_M, { __call = function(_, value, options) return _M.inspect(value, options) end })
