--- `require("ngx.base64")`: base64url without padding.

local crypto = require("moongate.native").crypto

return {
    _VERSION = "0.1.28",
    encode_base64url = function(s)
        if type(s) ~= "string" then return nil, "must provide a string" end
        return crypto.encode_base64url(s)
    end,
    decode_base64url = function(s)
        if type(s) ~= "string" then return nil, "must provide a string" end
        local decoded = crypto.decode_base64url(s)
        if not decoded then return nil, "invalid input" end
        return decoded
    end,
}
