--- Makes the class of an object that takes a text in pieces and gives its digest: resty.openssl's digest, hmac and mac.

local concat, select = table.concat, select

--- @param finish function(self, text): the result @return class: update, final, reset, and istype
return function(finish)
    local _M = { _VERSION = "1.5.1" }
    local mt = { __index = _M }

    function _M.make(object)
        object.parts = {}
        return setmetatable(object, mt)
    end

    --- Whether a value is an object of this class.
    function _M.istype(object)
        return getmetatable(object) == mt
    end

    --- Adds texts. @return true
    function _M:update(...)
        for i = 1, select("#", ...) do
            self.parts[#self.parts + 1] = (select(i, ...))
        end
        return true
    end

    --- The result over all that was added, and one text more. @return bytes; nil, err
    function _M:final(text)
        return finish(self, concat(self.parts) .. (text or ""))
    end

    --- Forgets what was added. @return true
    function _M:reset()
        self.parts = {}
        return true
    end

    return _M
end
