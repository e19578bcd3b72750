--- lua-resty-openssl's rand (its README): bytes from the system.

local crypto = require("moongate.native").crypto

local _M = { _VERSION = "1.5.1" }

--- @param n number: 1048576 at most @return bytes; nil, err
function _M.bytes(n)
    if type(n) ~= "number" then return nil, "rand.bytes: expect a number at #1" end
    return crypto.random(n)
end

return _M
