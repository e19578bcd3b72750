--- lua-resty-openssl's x509.altname (its README), to be read.

local _M = { _VERSION = "1.5.1" }
local mt = { __index = _M }

--- Of an array of { kind, value }: kind is DNS, IP, URI, email.
function _M.of(entries)
    for _, entry in ipairs(entries) do
        if entry[1] == "IP" and #entry[2] == 4 then
            entry[2] = ("%d.%d.%d.%d"):format(entry[2]:byte(1, 4))
        elseif entry[1] == "IP" and #entry[2] == 16 then
            entry[2] = entry[2]:gsub("(.)(.)", function(a, b) return ("%x:"):format(a:byte() * 256 + b:byte()) end):sub(1, -2)
        end
    end
    return setmetatable({ entries = entries }, mt)
end

function _M.istype(object)
    return getmetatable(object) == mt
end

--- for kind, value in altname:each()
function _M:each()
    local i = 0
    return function()
        i = i + 1
        local entry = self.entries[i]
        if entry then return entry[1], entry[2] end
    end
end
_M.iter = _M.each

--- DNS:a/IP:b
function _M:tostring()
    local parts = {}
    for i, entry in ipairs(self.entries) do parts[i] = entry[1] .. ":" .. entry[2] end
    return table.concat(parts, "/")
end
mt.__tostring = _M.tostring
mt.__len = function(self) return #self.entries end

return _M
