--- `require("ngx.semaphore")`: light threads of one worker wait for each other.

local native = require("moongate.native").semaphore

local _M = { version = "0.1.28" }
local mt = { __index = _M }

--- sema, err = new(n?)
function _M.new(n)
    n = tonumber(n) or 0
    if n < 0 then error("no negative number", 2) end
    return setmetatable({ sem = native.new(n) }, mt)
end

--- ok, err = sema:wait(timeout): seconds; 0 does not wait.
function _M:wait(seconds)
    seconds = tonumber(seconds)
    if not seconds or seconds < 0 then error("no negative number", 2) end
    return native.wait(self.sem, seconds)
end

--- sema:post(n?)
function _M:post(n)
    n = n == nil and 1 or tonumber(n)
    if not n or n < 1 then error("no positive number", 2) end
    return native.post(self.sem, n)
end

--- count = sema:count(): below zero, who waits.
function _M:count()
    return native.count(self.sem)
end

return _M
