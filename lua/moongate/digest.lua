--- Makes a lua-resty-string digest class (resty.sha256 and its like): new, update, final, reset.

local crypto = require("moongate.native").crypto
local concat = table.concat

return function(name)
    local _M = { _VERSION = "0.15" }
    local mt = { __index = _M }

    function _M.new(_)
        return setmetatable({ parts = {} }, mt)
    end

    function _M:update(s, len)
        if len then s = s:sub(1, len) end
        self.parts[#self.parts + 1] = s
        return true
    end

    function _M:final()
        return crypto.digest(name, concat(self.parts))
    end

    function _M:reset()
        self.parts = {}
        return true
    end

    return _M
end
