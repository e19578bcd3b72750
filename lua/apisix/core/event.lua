--- `core.event`: events inside one VM. All phases.
local error, ipairs = error, ipairs

local IN_FUNCTIONS = require("moongate.native").purpose == "functions"

local _M = { CONST = { BUILD_ROUTER = 1, WORKER_START = 2 } }
local listeners = {}

--- Calls `f(...)` for each event of that name (`core.event.CONST`, or one's own) in this VM from here on.
function _M.register(event, f)
    if IN_FUNCTIONS then
        error("core.event.register is not open to functions: it would serve all of them", 2)
    end
    listeners[event] = listeners[event] or {}
    local list = listeners[event]
    list[#list + 1] = f
end

--- Calls what was registered for the event, in that order, with what follows.
function _M.push(event, ...)
    for _, f in ipairs(listeners[event] or {}) do
        f(...)
    end
end

return _M
