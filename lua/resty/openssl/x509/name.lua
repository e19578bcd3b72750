--- lua-resty-openssl's x509.name (its README), to be read.

local _M = { _VERSION = "1.5.1" }
local mt = { __index = _M }

--- Of an array of { name, value, oid }.
function _M.of(entries)
    return setmetatable({ entries = entries }, mt)
end

function _M.istype(object)
    return getmetatable(object) == mt
end

local function entry(raw)
    return { sn = raw[1], ln = raw[1], id = raw[3], blob = raw[2] }
end

--- for name, entry in x509_name:each(): entry has sn, id, blob
function _M:each()
    local i = 0
    return function()
        i = i + 1
        local raw = self.entries[i]
        if raw then return raw[1], entry(raw) end
    end
end
_M.iter = _M.each

--- @param wanted string: CN, O, … or an oid @return entry, place; nil
function _M:find(wanted, after)
    for i = (after or 0) + 1, #self.entries do
        local raw = self.entries[i]
        if raw[1] == wanted or raw[3] == wanted then return entry(raw), i end
    end
end

--- CN=a/O=b
function _M:tostring()
    local parts = {}
    for i, raw in ipairs(self.entries) do parts[i] = raw[1] .. "=" .. raw[2] end
    return table.concat(parts, "/")
end
mt.__tostring = _M.tostring
mt.__len = function(self) return #self.entries end

return _M
