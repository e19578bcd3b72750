--- `core.os`: the environment and the user. All phases.
local ffi = require("ffi")
local error = error
local math = math
local setmetatable = setmetatable
local type = type
local tostring = tostring

ffi.cdef([[
int setenv(const char *name, const char *value, int overwrite);
int usleep(unsigned int usec);
]])

-- Longer pauses are mistakes: requests wait meanwhile.
local MAX_PAUSE_US = 1000000

local _M = setmetatable({}, { __index = os })

--- Sets an environment variable of the process: `true`, or `false` and the reason.
function _M.setenv(name, value)
    if type(name) ~= "string" then
        return false, "invalid argument"
    end
    local kind = type(value)
    if kind ~= "string" and kind ~= "number" and kind ~= "boolean" then
        return false, "invalid argument"
    end
    return ffi.C.setenv(name, tostring(value), 1) == 0
end

--- Holds the whole worker for so many microseconds, a whole number up to a second: nothing else of it runs meanwhile, unlike
-- with `ngx.sleep`. Raises for another argument.
function _M.usleep(microseconds)
    if type(microseconds) ~= "number" or microseconds < 0 or microseconds % 1 ~= 0 then
        error("bad argument #1 to 'usleep' (a whole number from 0 expected)", 2)
    end
    return ffi.C.usleep(math.min(microseconds, MAX_PAUSE_US)) == 0
end

return _M
