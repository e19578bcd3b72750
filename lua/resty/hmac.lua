--- lua-resty-hmac (its README): HMAC of a text in pieces.

local crypto = require("moongate.native").crypto

local _M = require("moongate.hashing")(function(self, text) return crypto.hmac(self.algorithm, self.key, text) end)
_M._VERSION = "0.06"

_M.ALGOS = { MD5 = "md5", SHA1 = "sha1", SHA224 = "sha224", SHA256 = "sha256", SHA384 = "sha384", SHA512 = "sha512" }

--- @param key string @param algorithm of ALGOS, MD5 by default @return object
function _M.new(_, key, algorithm)
    return _M.make({ key = key, algorithm = algorithm or _M.ALGOS.MD5 })
end

local final = _M.final

--- @param s string?: one text more @param hex boolean?: hexadecimal @return bytes or text
function _M:final(s, hex)
    local mac, err = final(self, s)
    if mac and hex then return crypto.hex(mac) end
    return mac, err
end

return _M
