--- `core.event`: events inside one VM.
local ipairs = ipairs

local _M = { CONST = { BUILD_ROUTER = 1, WORKER_START = 2 } }
local listeners = {}

function _M.register(event, f)
    listeners[event] = listeners[event] or {}
    local list = listeners[event]
    list[#list + 1] = f
end

function _M.push(event, ...)
    for _, f in ipairs(listeners[event] or {}) do
        f(...)
    end
end

return _M
