--- `pl.types`: what a value is (Penlight's manual).

local utils = require("pl.utils")

local math_floor, pairs, tostring, type = math.floor, pairs, tostring, type

local _M = { is_callable = utils.is_callable, is_type = utils.is_type }

--- The type's name; of a class its own, of a file "file".
function _M.type(value)
    local mt = getmetatable(value)
    if type(mt) == "table" and mt._name then return mt._name end
    if io and type(value) == "userdata" and io.type(value) then return "file" end
    return type(value)
end

function _M.is_integer(value)
    return type(value) == "number" and math_floor(value) == value
end

--- Whether nothing is in it: nil, "", {}; with `ignore_spaces` also white space.
function _M.is_empty(value, ignore_spaces)
    if value == nil then return true end
    if type(value) == "table" then return next(value) == nil end
    if type(value) == "string" then return value == "" or ignore_spaces == true and value:find("^%s+$") ~= nil end
    return true
end

local function can(value, method)
    local mt = getmetatable(value)
    return type(mt) == "table" and mt[method] ~= nil
end

function _M.is_indexable(value)
    return type(value) == "table" or can(value, "__len") and can(value, "__index")
end

function _M.is_iterable(value)
    return type(value) == "table" or can(value, "__pairs")
end

function _M.is_writeable(value)
    return type(value) == "table" or can(value, "__newindex")
end

local truths = { yes = true, y = true, ["true"] = true, t = true, ["1"] = true }

--- Whether a value means yes. @param more table?: other texts that do @param by_contents boolean?: also of a table's contents
function _M.to_bool(value, more, by_contents)
    if type(value) == "boolean" then return value end
    if type(value) == "string" then
        local text = value:lower()
        if truths[text] then return true end
        for _, word in pairs(more or {}) do
            if text == tostring(word):lower() then return true end
        end
        return false
    end
    if type(value) == "number" then return value ~= 0 end
    if type(value) == "table" then return not by_contents or next(value) ~= nil end
    return value ~= nil
end

return _M
