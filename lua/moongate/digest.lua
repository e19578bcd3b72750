--- Makes a lua-resty-string digest class (resty.sha256 and its like): new, update(text, length?), final, reset.

local crypto = require("moongate.native").crypto
local hashing = require("moongate.hashing")

--- @param name string: of a digest that `native.crypto.digest` knows @return class
return function(name)
    local _M = hashing(function(_, text) return crypto.digest(name, text) end)
    _M._VERSION = "0.15"
    local add = _M.update

    function _M.new(_)
        return _M.make({})
    end

    function _M:update(s, len)
        return add(self, len and s:sub(1, len) or s)
    end

    return _M
end
