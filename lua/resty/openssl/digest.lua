--- lua-resty-openssl's digest: md5, sha1, sha224, sha256, sha384, sha512 (its README).

local crypto = require("moongate.native").crypto

local _M = require("moongate.hashing")(function(self, text) return crypto.digest(self.name, text) end)

--- OpenSSL's name of a digest as it is known here: `SHA256`, `sha-256`, `RSA-SHA256`.
function _M.plain_name(name)
    return (tostring(name):lower():gsub("^rsa%-", ""):gsub("%-", ""))
end

--- A digest. @param name string?: sha1 by default @return object; nil, err
function _M.new(name)
    local plain = _M.plain_name(name or "sha1")
    if not crypto.digest(plain, "") then
        return nil, "digest.new: invalid digest type \"" .. tostring(name) .. "\""
    end
    return _M.make({ name = plain })
end

return _M
