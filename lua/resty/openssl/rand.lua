--- lua-resty-openssl's rand.

local crypto = require("moongate.native").crypto

return { _VERSION = "1.5.1", bytes = function(n) return crypto.random(n) end }
