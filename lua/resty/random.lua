--- lua-resty-string: random bytes from the system.

local crypto = require("moongate.native").crypto

local _M = { _VERSION = "0.15" }

--- The second argument asks for strong randomness; it always is.
function _M.bytes(len, _)
    return crypto.random(len)
end

--- A token of `len` letters and digits, or of the characters given.
function _M.token(len, chars)
    chars = chars or "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    local bytes, out = crypto.random(len * 2), {}
    for i = 1, len do
        local at = (bytes:byte(2 * i - 1) * 256 + bytes:byte(2 * i)) % #chars + 1
        out[i] = chars:sub(at, at)
    end
    return table.concat(out)
end

function _M.number(min, max)
    local b = crypto.random(4)
    local n = ((b:byte(1) * 256 + b:byte(2)) * 256 + b:byte(3)) * 256 + b:byte(4)
    return min + n % (max - min + 1)
end

return _M
