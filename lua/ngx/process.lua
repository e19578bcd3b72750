--- `require("ngx.process")` (lua-resty-core's process.md). There is one process, whose threads are the workers.

local native = require("moongate.native")

local ngx = ngx
local error, type = error, type

local _M = { version = "0.1.28" }

--- @return "worker" where requests are served; "master" in the VM that only checks plugins and configurations
function _M.type()
    return native.purpose == "check" and "master" or "worker"
end

--- There is none: what belongs to one process only runs where ngx.worker.id() is 0. @return nil, err
function _M.enable_privileged_agent(connections)
    if ngx.get_phase() ~= "init_worker" then error("API disabled in the current context", 2) end
    if connections ~= nil and (type(connections) ~= "number" or connections < 1) then
        return nil, "bad 'connections' argument: positive number expected"
    end
    return nil, "there is no privileged agent: use the worker whose ngx.worker.id() is 0"
end

--- @return number: the process is its own master
function _M.get_master_pid()
    return ngx.worker.pid()
end

--- The whole gateway answers what it has begun and ends: a worker is not started again by itself. @return true; nil, err
function _M.signal_graceful_exit()
    return native.process.graceful_exit()
end

return _M
