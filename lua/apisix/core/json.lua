--- `core.json`: JSON through the native cjson. All phases; none of these waits.
--
-- Loading it sets cjson as APISIX does, for whoever requires `cjson` in the same VM, too: slashes are not escaped, and an
-- empty array stays an array when it is decoded and encoded again.
local getmetatable = getmetatable
local ipairs = ipairs
local next = next
local pairs = pairs
local setmetatable = setmetatable
local sort = table.sort
local concat = table.concat
local tostring = tostring
local type = type

local cjson = require("cjson.safe")
local isarray = require("table.isarray")

-- Sets one module's own instance, and each that is made of it.
local function set_up(module)
    module.decode_array_with_array_mt(true)
    module.encode_escape_forward_slash(false)
    local new = module.new
    function module.new()
        return set_up(new())
    end
    return module
end

set_up(cjson)
set_up(require("cjson"))

local encode, decode, null = cjson.encode, cjson.decode, cjson.null

local _M = {
    array_mt = cjson.array_mt,
    empty_array_mt = cjson.empty_array_mt,
    null = null,
}

-- Fields that are null go. What JSON nests is bounded by the decoder.
local function without_nulls(value)
    if value == null then
        return nil
    end
    if type(value) == "table" then
        for key, item in pairs(value) do
            if item == null then
                value[key] = nil
            else
                without_nulls(item)
            end
        end
    end
    return value
end

--- The value of a JSON text, or nil and why it has none. `opts.null_as_nil`: null is nil, not `core.json.null`.
function _M.decode(text, opts)
    local value, err = decode(text)
    if opts and opts.null_as_nil then
        value = without_nulls(value)
    end
    return value, err
end

-- What JSON cannot say becomes its name, so that a context or a conf can be logged whole. `open`: the tables around, but
-- for the outermost, which is shown once more where it is in itself.
local function printable(value, open)
    local kind = type(value)
    if kind == "function" or kind == "thread" or kind == "cdata" or (kind == "userdata" and value ~= null) then
        return tostring(value)
    end
    if kind ~= "table" then
        return value
    end
    if open and open[value] then
        return tostring(value)
    end
    local inner = open or {}
    inner[value] = open and true
    local out = {}
    for k, v in pairs(value) do
        out[type(k) == "number" and k or tostring(k)] = printable(v, inner)
    end
    inner[value] = nil
    local mt = getmetatable(value)
    return mt == cjson.array_mt and setmetatable(out, mt) or out
end

--- The JSON text of `data`, or nil and the error. `force`: functions, userdata and cycles become their names.
function _M.encode(data, force)
    if force then
        data = printable(data)
    end
    return encode(data)
end

local function by_text(a, b)
    return tostring(a) < tostring(b)
end

-- As deep as cjson goes, which knows cycles by it.
local MAX_DEPTH = 1000

local canonical

local function canonical_array(value, depth)
    local parts = {}
    for i, item in ipairs(value) do
        local text, err = canonical(item, depth + 1)
        if not text then
            return nil, err
        end
        parts[i] = text
    end
    return "[" .. concat(parts, ",") .. "]"
end

local function canonical_object(value, depth)
    local keys, parts = {}, {}
    for k in pairs(value) do
        keys[#keys + 1] = k
    end
    sort(keys, by_text)
    for i, k in ipairs(keys) do
        local text, err = canonical(value[k], depth + 1)
        if not text then
            return nil, err
        end
        parts[i] = encode(tostring(k)) .. ":" .. text
    end
    return "{" .. concat(parts, ",") .. "}"
end

function canonical(value, depth)
    if type(value) ~= "table" or next(value) == nil then
        return encode(value)
    end
    if depth > MAX_DEPTH then
        return nil, "Cannot serialise, excessive depth (" .. depth .. ")"
    end
    return (isarray(value) and canonical_array or canonical_object)(value, depth)
end

--- JSON text with object keys in order: equal tables give equal texts. nil and the reason for what JSON cannot say.
function _M.stably_encode(data)
    return canonical(data, 1)
end
_M.canonical_encode = _M.stably_encode

local delayed_mt = {
    __tostring = function(self)
        local text, err = _M.encode(self.data, self.force)
        return text or tostring(err)
    end,
}

-- As many as one log line may hold; the oldest is used again, so that a level that is off costs no table.
local MAX_DELAYED = 16
local delayed, last = {}, 0
for i = 1, MAX_DELAYED do
    delayed[i] = setmetatable({}, delayed_mt)
end

--- An argument for `core.log.*` that is encoded only when the line is written. 16 are alive at a time.
function _M.delay_encode(data, force)
    last = last % MAX_DELAYED + 1
    local slot = delayed[last]
    slot.data, slot.force = data, force
    return slot
end

return _M
