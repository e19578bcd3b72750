--- `apisix.debug`: whether conf/debug.yaml (debug-mode.md) is about the request that runs. The gateway reads the file and puts
-- the hooks on and off itself. Phases with a request; false without one.
local native = require("moongate.native").plugin

local _M = {}

--- Whether `basic` is enabled: the answer names the plugins that ran, in `Apisix-Plugins`. A boolean.
function _M.enable_debug()
    local _, basic = native.debugged()
    return basic
end

--- Whether the hooks tell of this request: they are on for all, or its header asks for them. A boolean. APISIX turns them on
-- here; that has been done.
function _M.dynamic_debug()
    return (native.debugged())
end

--- Nothing is left to make ready.
function _M.init_worker() end

return _M
