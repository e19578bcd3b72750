--- `require("ngx.semaphore")`: light threads of one worker wait for each other.

local native = require("moongate.native").semaphore

local error, setmetatable, tonumber, type = error, setmetatable, tonumber, type

local _M = { version = "0.1.28" }
local mt = { __index = _M }

local function inside(self)
    local sem = type(self) == "table" and self.sem
    if not sem then error("not a semaphore instance", 3) end
    return sem
end

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
    return native.wait(inside(self), seconds)
end

--- sema:post(n?)
function _M:post(n)
    n = n == nil and 1 or tonumber(n)
    if not n or n < 1 then error("positive number required", 2) end
    return native.post(inside(self), n)
end

--- count = sema:count(): below zero, who waits.
function _M:count()
    return native.count(inside(self))
end

return _M
