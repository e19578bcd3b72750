--- lua-resty-openssl's digest: new(name), update(...), final(text?), reset.

local crypto = require("moongate.native").crypto

local _M = { _VERSION = "1.5.1" }
local mt = { __index = _M }

function _M.new(name)
    name = name or "sha1"
    if not crypto.digest(name, "") then
        return nil, "digest.new: invalid digest type \"" .. tostring(name) .. "\""
    end
    return setmetatable({ name = name, parts = {} }, mt)
end

function _M.istype(object)
    return getmetatable(object) == mt
end

function _M:update(...)
    for i = 1, select("#", ...) do
        self.parts[#self.parts + 1] = (select(i, ...))
    end
    return true
end

function _M:final(s)
    return crypto.digest(self.name, table.concat(self.parts) .. (s or ""))
end

function _M:reset()
    self.parts = {}
    return true
end

return _M
