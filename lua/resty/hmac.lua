--- lua-resty-hmac: new(key, algorithm), update, final(text?, hex?), reset.

local crypto = require("moongate.native").crypto

local _M = { _VERSION = "0.06" }
local mt = { __index = _M }

_M.ALGOS = { MD5 = "md5", SHA1 = "sha1", SHA224 = "sha224", SHA256 = "sha256", SHA384 = "sha384", SHA512 = "sha512" }

function _M.new(_, key, algorithm)
    return setmetatable({ key = key, algorithm = algorithm or _M.ALGOS.MD5, parts = {} }, mt)
end

function _M:update(s)
    self.parts[#self.parts + 1] = s
    return true
end

function _M:final(s, hex)
    local mac = crypto.hmac(self.algorithm, self.key, table.concat(self.parts) .. (s or ""))
    if mac and hex then return crypto.hex(mac) end
    return mac
end

function _M:reset()
    self.parts = {}
    return true
end

return _M
