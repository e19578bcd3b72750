--- Logging by level: `core.log.warn("x: ", x)`. A level below the configured one costs a compare.
--
-- Levels: stderr emerg alert crit error warn notice info debug. All phases.
local ngx = ngx
local select = select
local setmetatable = setmetatable
local tostring = tostring

local ngx_log = ngx.log
local errlog = require("ngx.errlog")

local levels = {
    stderr = ngx.STDERR,
    emerg = ngx.EMERG,
    alert = ngx.ALERT,
    crit = ngx.CRIT,
    error = ngx.ERR,
    warn = ngx.WARN,
    notice = ngx.NOTICE,
    info = ngx.INFO,
    debug = ngx.DEBUG,
}

local function ignore() end

-- One function per level and prefix, made on first use: a level that is off becomes a function that does nothing,
-- so that its arguments are all it costs. The check is made once; the level of a running gateway does not change.
local function logger(level, prefix)
    if level > errlog.get_sys_filter_level() then
        return ignore
    end
    if prefix then
        return function(...)
            return ngx_log(level, prefix, ...)
        end
    end
    return function(...)
        return ngx_log(level, ...)
    end
end

local function family(prefix)
    return setmetatable({}, {
        __index = function(self, name)
            local level = levels[name]
            if not level then
                return nil
            end
            local log = logger(level, prefix)
            self[name] = log
            return log
        end,
    })
end

local _M = family(nil)

--- A family of log functions that start every line with `prefix`.
function _M.new(prefix)
    return family(prefix)
end

local delayed_mt = {
    __tostring = function(self)
        return tostring(self.func(self[1], self[2], self[3], self[4], self[5], self[6]))
    end,
}

--- `core.log.delay_exec(f, ...)`: an argument for a log call that runs `f` only when the line is written.
function _M.delay_exec(func, ...)
    local n = select("#", ...)
    local call = setmetatable({ ... }, delayed_mt)
    call.func, call.n = func, n
    return call
end

return _M
