--- `pb`: Protocol Buffers (lua-protobuf's README). The work is native (src/lua/host/pb.rs).
--
-- Types are known by `.package.Name` or `package.Name`. What is wrong with a type's name or a value is raised.

local native = require("moongate.native").pb
local chunk = require("moongate.chunk")

local error, ipairs, pairs, setmetatable, tostring = error, ipairs, pairs, setmetatable, tostring

local _M = { _VERSION = "0.5.2" }

local function new_state()
    return { types = native.new(), options = { defaults = "auto" } }
end

local current = new_state()

--- The types and options that are in use. @param state any?: one of an earlier call to use from now on; nil: a new one
-- @return what was in use before
function _M.state(state)
    local before = current
    current = state or new_state()
    return before
end

--- Forgets all types, or takes no notice of the name of one. @return nil
function _M.clear(name)
    if name == nil then current.types = native.new() end
end

--- Takes types in. @param bytes string: a FileDescriptorSet as protoc writes it @return true, length; false, err
function _M.load(bytes)
    local ok, err = native.load(current.types, bytes)
    if not ok then return false, err end
    return true, #bytes + 1
end

--- As `load`, from a file. Not open to uploaded functions.
function _M.loadfile(path)
    if chunk.sandboxed then return false, "files are not open to functions" end
    local file, err = io.open(path, "rb")
    if not file then return false, err end
    local bytes = file:read("*a")
    file:close()
    return _M.load(bytes)
end

--- @param name string: a message's @param value table @return bytes
function _M.encode(name, value)
    return native.encode(current.types, name, value)
end

--- @param name string: a message's @param bytes string? @param into table?: gets the fields
-- @return table
function _M.decode(name, bytes, into)
    local made = native.decode(current.types, name, bytes or "", current.options)
    if not into then return made end
    for key, value in pairs(made) do into[key] = value end
    return into
end

local function dotted(name)
    return name:sub(1, 1) == "." and name or "." .. name
end

--- for name, basename, kind in pb.types(): kind is message, enum or map.
function _M.types()
    local all, i = native.types(current.types), 0
    return function()
        i = i + 1
        local one = all[i]
        if one then return one[1], one[2], one[3] end
    end
end

--- @return name, basename, kind; nil when it is not known
function _M.type(name)
    name = dotted(name)
    for known, basename, kind in _M.types() do
        if known == name then return known, basename, kind end
    end
end

local function described(field)
    return field.name, field.number, field.type, field.default, field.label, field.oneof, field.oneof_index
end

--- for name, number, type, default, label, oneof, oneof_index in pb.fields(type)
function _M.fields(name)
    local all, i = native.fields(current.types, name) or {}, 0
    return function()
        i = i + 1
        if all[i] then return described(all[i]) end
    end
end

--- One field of a message. @param which string or number @return as `fields`; nil when there is none
function _M.field(name, which)
    for _, field in ipairs(native.fields(current.types, name) or {}) do
        if field.name == which or field.number == which then return described(field) end
    end
end

--- The number of an enum's name, the name of its number. @return nil when there is none
function _M.enum(name, which)
    return native.enum(current.types, name, which)
end

local function defaults_of(name)
    return native.decode(current.types, name, "", { defaults = "always", int64 = current.options.int64,
        enum_as_value = current.options.enum_as_value })
end

--- A table of a message's default values.
function _M.defaults(name)
    return defaults_of(name)
end

local settings = {
    enum_as_name = { "enum_as_value", false }, enum_as_value = { "enum_as_value", true },
    int64_as_number = { "int64", "number" }, int64_as_string = { "int64", "string" }, int64_as_hexstring = { "int64", "hex" },
    auto_default_values = { "defaults", "auto" }, no_default_values = { "defaults", "never" },
    use_default_values = { "defaults", "always" }, use_default_metatable = { "defaults", "always" },
    decode_default_array = { "arrays", true }, no_decode_default_array = { "arrays", false },
    -- What holds anyhow.
    disable_hooks = {}, disable_enchooks = {}, no_encode_default_values = {}, no_decode_default_message = {}, no_encode_order = {},
    encode_order = {},
}

--- Sets an option: enum_as_*, int64_as_*, *_default_values, decode_default_array. Raises for one that is not there.
function _M.option(name)
    local setting = settings[name]
    if not setting then error("bad argument #1 to 'option' (invalid option '" .. tostring(name) .. "')", 2) end
    if setting[1] then current.options[setting[1]] = setting[2] end
end

--- The hexadecimal text of bytes, in pairs. @return string
function _M.tohex(bytes)
    return (bytes:gsub(".", function(c) return ("%02X "):format(c:byte()) end):sub(1, -2))
end

--- The bytes of a hexadecimal text. @return string
function _M.fromhex(text)
    return (text:gsub("[^%x]", ""):gsub("%x%x", function(pair) return string.char(tonumber(pair, 16)) end))
end

return setmetatable(_M, { __index = function(_, name)
    if name == "hook" or name == "encode_hook" then
        return function() error("pb." .. name .. " is not supported", 2) end
    end
end })
