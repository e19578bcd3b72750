--- lua-resty-string: to_hex, atoi.

local crypto = require("moongate.native").crypto

local _M = { _VERSION = "0.15", to_hex = crypto.hex }

function _M.atoi(s)
    return tonumber((tostring(s):match("^%s*([+-]?%d+)"))) or 0
end

return _M
