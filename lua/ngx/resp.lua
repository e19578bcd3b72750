--- `require("ngx.resp")` (lua-resty-core): add_header, set_status, bypass_if_checks, get_headers.

local native = require("moongate.native").resp

local ngx = ngx
local error, next, tonumber, type = error, next, tonumber, type

local _M = { version = "0.1.28", get_headers = ngx.resp.get_headers }

--- Adds a response header beside those of the same name; one that there is only once (Content-Type) is replaced.
-- @param name string @param value string, number or list
function _M.add_header(name, value)
    if value == nil or type(value) == "table" and next(value) == nil then error("invalid header value", 2) end
    -- What is too late is said where all headers are set.
    if ngx.headers_sent or type(name) == "string" and native.single[name:lower()] then
        ngx.header[name] = value
    else
        native.add_header(name, value)
    end
end

--- @param status number @param reason string?: the phrase behind it; nil: the standard one. HTTP/2 has no phrases.
function _M.set_status(status, reason)
    local code = tonumber(status)
    if not code then error("number expected, got " .. type(status), 2) end
    if reason == nil then
        ngx.status = code
        return
    end
    native.set_status(code, reason)
end

--- The answer goes out whole, whatever If-Modified-Since says.
function _M.bypass_if_checks()
    native.bypass_if_checks()
end

return _M
