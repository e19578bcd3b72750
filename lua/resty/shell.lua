--- `resty.shell`: runs a command while the worker serves others (lua-resty-shell's README). Not open to uploaded functions.

require("moongate.chunk").refuse_in_sandbox("resty.shell")

local native = require("moongate.native").process

local _M = { version = "0.03" }

--- Runs a command to its end; it is killed, with all that it started, when it is too slow or says too much.
-- @param cmd string for `sh -c`, or table: program and arguments
-- @param stdin string?
-- @param timeout number?: milliseconds, 10000 by default
-- @param max_size number?: bytes of each output, 128 KB by default
-- @return ok (true, or nil when it did not end with 0), stdout, stderr, reason ("exit", "signal", "timeout", "too much data" or why
--   it did not start), status (the code or the signal's number)
function _M.run(cmd, stdin, timeout, max_size)
    if type(cmd) ~= "string" and type(cmd) ~= "table" then
        error("bad argument #1 to 'run' (string or table expected, got " .. type(cmd) .. ")", 2)
    end
    return native.run(cmd, stdin, timeout, max_size)
end

return _M
