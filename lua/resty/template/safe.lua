--- `resty.template.safe`: as `resty.template`, but its functions return nil and the error (lua-resty-template's README).

local template = require("resty.template")

return setmetatable({}, {
    __index = function(_, name)
        local f = template[name]
        if type(f) ~= "function" then return f end
        return function(...)
            local ok, first, second = pcall(f, ...)
            if not ok then return nil, first end
            return first, second
        end
    end,
    __newindex = function(_, name, value)
        template[name] = value
    end,
})
