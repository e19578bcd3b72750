--- `core.timer`: a repeating background job.
local log = require("apisix.core.log")
local ngx = ngx
local pcall = pcall
local setmetatable = setmetatable

local _M = {}
local mt = { __index = _M }

local DEFAULT_INTERVAL_SECS = 1

local function run(premature, self)
    if premature or self.stopped then
        return
    end
    local ok, err = pcall(self.callback)
    if not ok then
        log.error("failed to run the timer: ", self.name, " err: ", err)
    end
    if not self.once then
        ngx.timer.at(self.interval, run, self)
    end
end

--- Calls `callback` every `opts.check_interval` seconds in the background, at once for the first time.
function _M.new(name, callback, opts)
    opts = opts or {}
    local self = setmetatable({
        name = name,
        callback = callback,
        interval = opts.check_interval or DEFAULT_INTERVAL_SECS,
    }, mt)
    local ok, err = ngx.timer.at(0, run, self)
    if not ok then
        return nil, err
    end
    return self
end

function _M.stop(self)
    self.stopped = true
end

return _M
