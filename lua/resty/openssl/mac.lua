--- lua-resty-openssl's mac (its README): of the kind HMAC.

local hmac = require("resty.openssl.hmac")

local _M = { _VERSION = "1.5.1", istype = hmac.istype }

--- A code. @param key string @param kind string: "HMAC" @param cipher nil @param digest string @return object; nil, err
function _M.new(key, kind, _, digest)
    if kind ~= "HMAC" then return nil, "mac.new: invalid mac type \"" .. tostring(kind) .. "\"" end
    return hmac.new(key, digest)
end

return _M
