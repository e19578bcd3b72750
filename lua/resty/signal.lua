--- `resty.signal`: kill and signum (lua-resty-signal's README). Not open to uploaded functions.

require("moongate.chunk").refuse_in_sandbox("resty.signal")

local native = require("moongate.native").process

local _M = { version = "0.04" }

--- The number of a signal. @param name string: INT, TERM, HUP, … @return number; nil, err
function _M.signum(name)
    local number = native.signum(tostring(name))
    if not number then return nil, "unknown signal name" end
    return number
end

--- Sends a signal to one process.
-- @param pid number or string @param signal string: a name, or number; 0 or "NONE" only asks whether it is there
-- @return true; nil, err
function _M.kill(pid, signal)
    local id = tonumber(pid)
    if not id then return nil, "bad pid: " .. tostring(pid) end
    if type(signal) == "string" then
        local number, err = _M.signum(signal)
        if not number then return nil, err end
        signal = number
    end
    return native.kill(id, signal)
end

return _M
