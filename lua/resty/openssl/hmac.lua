--- lua-resty-openssl's hmac: HMAC over the digests of `resty.openssl.digest` (its README).

local crypto = require("moongate.native").crypto
local plain_name = require("resty.openssl.digest").plain_name

local _M = require("moongate.hashing")(function(self, text) return crypto.hmac(self.digest, self.key, text) end)

--- An HMAC. @param key string @param digest string?: sha1 by default @return object; nil, err
function _M.new(key, digest)
    local plain = plain_name(digest or "sha1")
    if not crypto.hmac(plain, "", "") then
        return nil, "hmac.new: invalid digest type \"" .. tostring(digest) .. "\""
    end
    return _M.make({ key = key, digest = plain })
end

return _M
