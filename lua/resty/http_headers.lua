--- Header tables whose names match in any case, with `_` for `-`.

local pairs, rawget, rawset, setmetatable, type = pairs, rawget, rawset, setmetatable, type

local _M = { _VERSION = "0.17.2" }

-- table -> plain name -> the name that its value is stored under. Weak: it must not keep tables alive.
local names_of = setmetatable({}, { __mode = "k" })

local function plain(name)
    return (name:lower():gsub("_", "-"))
end

local mt = {
    __index = function(headers, name)
        if type(name) ~= "string" then return nil end
        local stored = names_of[headers][plain(name)]
        return stored and rawget(headers, stored)
    end,
    __newindex = function(headers, name, value)
        if type(name) ~= "string" then
            rawset(headers, name, value)
            return
        end
        local names, key = names_of[headers], plain(name)
        local stored = names[key]
        if not stored then
            stored = name:gsub("_", "-")
            names[key] = stored
        end
        rawset(headers, stored, value)
    end,
}

--- An empty table of headers; with `from` a copy of it.
function _M.new(from)
    local headers = setmetatable({}, mt)
    names_of[headers] = {}
    if from then
        for name, value in pairs(from) do headers[name] = value end
    end
    return headers
end

return _M
