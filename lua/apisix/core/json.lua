--- `core.json`: JSON through the native cjson. All phases.
local setmetatable = setmetatable
local tostring = tostring
local type = type
local pairs = pairs
local next = next

local cjson = require("cjson.safe")

local encode = cjson.encode
cjson.decode_array_with_array_mt(true)

local _M = {
    array_mt = cjson.array_mt,
    empty_array_mt = cjson.empty_array_mt,
    decode = cjson.decode,
}

-- What JSON cannot say becomes its name, so that a context or a conf can be logged whole.
local function printable(value, seen)
    local kind = type(value)
    if kind == "function" or kind == "thread" or kind == "cdata" or (kind == "userdata" and value ~= cjson.null) then
        return tostring(value)
    end
    if kind ~= "table" then
        return value
    end
    if seen[value] then
        return tostring(value)
    end
    seen[value] = true
    local out = {}
    for k, v in pairs(value) do
        out[type(k) == "number" and k or tostring(k)] = printable(v, seen)
    end
    seen[value] = nil
    return out
end

--- The JSON text of `data`, or nil and the error. `force`: functions, userdata and cycles become their names.
function _M.encode(data, force)
    if force then
        data = printable(data, {})
    end
    return encode(data)
end

local function canonical(value)
    if type(value) ~= "table" then
        return encode(value)
    end
    if next(value) == nil then
        return encode(value)
    end
    local parts = {}
    if #value > 0 then
        for i = 1, #value do
            parts[i] = canonical(value[i])
        end
        return "[" .. table.concat(parts, ",") .. "]"
    end
    local keys = {}
    for k in pairs(value) do
        keys[#keys + 1] = k
    end
    table.sort(keys, function(a, b)
        return tostring(a) < tostring(b)
    end)
    for i, k in ipairs(keys) do
        parts[i] = encode(tostring(k)) .. ":" .. canonical(value[k])
    end
    return "{" .. table.concat(parts, ",") .. "}"
end

--- JSON text with object keys in order: equal tables give equal texts.
function _M.stably_encode(data)
    return canonical(data)
end
_M.canonical_encode = _M.stably_encode

local delayed_mt = {
    __tostring = function(self)
        local text, err = _M.encode(self.data, self.force)
        return text or tostring(err)
    end,
}
local delayed = setmetatable({}, delayed_mt)

--- An argument for `core.log.*` that is encoded only when the line is written. One is alive at a time.
function _M.delay_encode(data, force)
    delayed.data, delayed.force = data, force
    return delayed
end

return _M
