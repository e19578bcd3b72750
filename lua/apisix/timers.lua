--- `apisix.timers`: background jobs of a worker, each about once a second (batch-processor.md and others use them).
local log = require("apisix.core.log")
local ngx = ngx
local pairs, pcall, type = pairs, pcall, type

local _M = {}

-- Jobs by name: a plugin has few. More than these are a mistake, such as a name that is made anew for each request.
local MAX_TIMERS = 1024
local INTERVAL_SECS = 1

local timers, count = {}, 0
local ticking = false

local function run_one(premature, name, f)
    if premature then
        return
    end
    local ok, err = pcall(f)
    if not ok then
        log.error("failed to run timer ", name, ": ", err)
    end
end

-- Each job has a timer of its own in each turn: one that blocks holds up no other.
local function tick(premature)
    if premature then
        return
    end
    for name, f in pairs(timers) do
        local ok, err = ngx.timer.at(0, run_one, name, f)
        if not ok then
            log.error("failed to create timer ", name, ": ", err)
        end
    end
end

local function start()
    local ok, err = ngx.timer.every(INTERVAL_SECS, tick)
    if not ok then
        return log.error("failed to start the timers: ", err)
    end
    ticking = true
end

--- Calls `f()` about once a second from here on, whether the call before has ended or not. `privileged`: in one worker
-- only, the first. A job of the same name is replaced.
function _M.register_timer(name, f, privileged)
    if type(f) ~= "function" then
        return log.error("failed to register the timer ", name, ": it is no function")
    end
    if privileged and ngx.worker.id() ~= 0 then
        return
    end
    if not timers[name] then
        if count >= MAX_TIMERS then
            return log.error("failed to register the timer ", name, ": there are ", MAX_TIMERS, " already")
        end
        count = count + 1
    end
    timers[name] = f
    if not ticking then
        start()
    end
end

--- Ends the job of that name.
function _M.unregister_timer(name, privileged)
    if privileged and ngx.worker.id() ~= 0 or not timers[name] then
        return
    end
    timers[name] = nil
    count = count - 1
end

return _M
