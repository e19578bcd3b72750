--- `require("ngx.errlog")`: lines of error.log that scripts read, and lines without a position (lua-resty-core's errlog.md).
-- One buffer for all workers, of `lua_options.lua_capture_error_log` bytes. Not open to uploaded functions but for raw_log.

local native = require("moongate.native")
local log, fast = native.log, native.fast

local error, type = error, type

local _M = { _VERSION = "0.1.28" }

--- The least severe line that is captured from now on. @param level number: ngx.WARN … @return true; nil, err
function _M.set_filter_level(level)
    if not level then return nil, 'missing "level" argument' end
    if type(level) ~= "number" then return nil, 'bad "level" argument' end
    return log.capture_level(level)
end

--- Takes captured lines out of the buffer, the oldest first.
-- @param max number?: lines; 0 or none: all @param res table?: filled from its begin, a nil behind the last
-- @return { level, time, text, level, … }; nil, err
function _M.get_logs(max, res)
    if max ~= nil and type(max) ~= "number" then
        error("bad argument #1 to 'get_logs' (number expected, got " .. type(max) .. ")", 2)
    end
    return log.captured(max or 0, res)
end

--- @return number: what error.log takes (nginx_config.error_log_level)
function _M.get_sys_filter_level()
    return fast.log_level()
end

--- A line without the caller's position. @param level number @param text string
function _M.raw_log(level, text)
    if type(level) ~= "number" then error("bad argument #1 to 'raw_log' (must be a number)", 2) end
    if type(text) ~= "string" then error("bad argument #2 to 'raw_log' (must be a string)", 2) end
    if not log.raw(level, text) then error("bad log level", 2) end
end

return _M
