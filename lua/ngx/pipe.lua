--- `require("ngx.pipe")`: processes and their standard streams (lua-resty-core's pipe.md). Not open to uploaded functions.
-- A process ends with the request that started it, or when its object is collected.

require("moongate.chunk").refuse_in_sandbox("ngx.pipe")

local native = require("moongate.native").pipe

local error, setmetatable, type = error, setmetatable, type
local read = native.read

local _M = { _VERSION = "0.1.28" }

local methods = {}
local mt = { __index = methods }

local function inside(self)
    local process = type(self) == "table" and self[1]
    if not process then error("not a process instance", 3) end
    return process
end

--- Starts a process.
-- @param args table: program and arguments, or string for `sh -c`
-- @param opts table?: merge_stderr, buffer_size (4096), environ ({ "A=b" }); write_timeout, stdout_read_timeout,
--   stderr_read_timeout, wait_timeout in milliseconds (10000; 0: never)
-- @return object; nil, err
function _M.spawn(args, opts)
    if opts == nil then opts = {} end
    if type(opts) ~= "table" then error("bad opts arg: table expected, got " .. type(opts), 2) end
    if opts.environ ~= nil and type(opts.environ) ~= "table" then
        error("bad environ option: table expected, got " .. type(opts.environ), 2)
    end
    local process, err = native.spawn(args, opts.merge_stderr, opts.buffer_size, opts.environ, opts.write_timeout,
        opts.stdout_read_timeout, opts.stderr_read_timeout, opts.wait_timeout)
    if not process then return nil, err end
    return setmetatable({ process }, mt)
end

--- Milliseconds; nil leaves what was set, 0 is no limit.
function methods:set_timeouts(write, stdout, stderr, wait)
    return native.set_timeouts(inside(self), write, stdout, stderr, wait)
end

--- Waits for the end. @return ok (whether it ended with 0), "exit" or "signal", status; nil, err
function methods:wait()
    return native.wait(inside(self))
end

--- @return number
function methods:pid()
    return native.pid(inside(self))
end

--- @param signal number @return true; nil, "exited" or "invalid signal"
function methods:kill(signal)
    return native.kill(inside(self), signal)
end

--- Closes a stream; who waits on it gets nil, "aborted". @param direction string: stdin, stdout, stderr @return true; nil, err
function methods:shutdown(direction)
    return native.shutdown(inside(self), direction)
end

--- @param data string, number or list @return bytes written; nil, err
function methods:write(data)
    return native.write(inside(self), data)
end

for name, which in pairs({ stdout = 1, stderr = 2 }) do
    -- @return data; nil, err, partial
    methods[name .. "_read_all"] = function(self) return read(inside(self), which, "all") end
    methods[name .. "_read_line"] = function(self) return read(inside(self), which, "line") end
    methods[name .. "_read_bytes"] = function(self, len) return read(inside(self), which, "bytes", len) end
    methods[name .. "_read_any"] = function(self, max) return read(inside(self), which, "any", max) end
end

return _M
