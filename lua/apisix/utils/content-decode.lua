--- `apisix.utils.content-decode`: bodies in a Content-Encoding, decoded.
local native = require("moongate.native").apisix

local _M = {}

-- A small body may unpack to a huge one.
local MAX_BYTES = 64 * 1024 * 1024

local decoders = {
    gzip = function(body)
        return native.inflate("gzip", body, MAX_BYTES)
    end,
    deflate = function(body)
        return native.inflate("deflate", body, MAX_BYTES)
    end,
}

--- The function that decodes that encoding (body -> text, or nil, the reason, and the text before the error); nil for an encoding
-- that is not known.
function _M.dispatch_decoder(encoding)
    return decoders[encoding]
end

return _M
