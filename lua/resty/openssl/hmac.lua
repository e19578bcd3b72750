--- lua-resty-openssl's hmac: new(key, digest), update(...), final(text?), reset.

local crypto = require("moongate.native").crypto

local _M = { _VERSION = "1.5.1" }
local mt = { __index = _M }

function _M.new(key, digest)
    digest = digest or "sha1"
    if not crypto.hmac(digest, "", "") then
        return nil, "hmac.new: invalid digest type \"" .. tostring(digest) .. "\""
    end
    return setmetatable({ key = key, digest = digest, parts = {} }, mt)
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
    return crypto.hmac(self.digest, self.key, table.concat(self.parts) .. (s or ""))
end

function _M:reset()
    self.parts = {}
    return true
end

return _M
