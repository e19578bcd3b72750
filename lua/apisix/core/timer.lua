--- `core.timer`: a repeating background job.
local log = require("apisix.core.log")
local ngx = ngx
local pcall = pcall
local setmetatable = setmetatable
local type = type

local _M = {}
local mt = { __index = _M }

local DEFAULT_INTERVAL_SECS = 1
-- Seconds between two turns of a job that takes longer than its interval.
local PAUSE_SECS = 0.01

local function call(self)
    local ok, err = pcall(self.callback)
    if not ok then
        log.error("failed to run the timer: ", self.name, " err: ", err)
        ngx.sleep(self.sleep_fail)
    end
end

local run

local function start(self, delay)
    local ok, err = ngx.timer.at(delay, run, self)
    if not ok then
        log.error("failed to start the timer: ", self.name, " err: ", err)
    end
    return ok, err
end

function run(premature, self)
    if premature or self.stopped then
        return
    end
    if self.running then
        return
    end
    self.running = true
    local began = ngx.now()
    call(self)
    self.running = false
    if not self.stopped then
        local left = self.check_interval - (ngx.now() - began)
        start(self, left > 0 and left or PAUSE_SECS)
    end
end

--- Calls `callback` every `opts.check_interval` seconds (1) in the background, at once for the first time, and
-- `opts.sleep_fail` seconds (5) later than that after an error, which is in error.log. nil and the reason when it cannot be
-- started. Phases: those of `ngx.timer.at`.
function _M.new(name, callback, opts)
    if type(callback) ~= "function" then
        return nil, "the callback of the timer " .. name .. " is no function"
    end
    opts = opts or {}
    local self = setmetatable({
        name = name,
        callback = callback,
        check_interval = opts.check_interval or DEFAULT_INTERVAL_SECS,
        sleep_fail = opts.sleep_fail or 5,
    }, mt)
    local ok, err = start(self, 0)
    if not ok then
        return nil, err
    end
    return self
end

--- Ends the job; a turn that runs ends by itself.
function _M.stop(self)
    self.stopped = true
end

return _M
