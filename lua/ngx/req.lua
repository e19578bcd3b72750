--- `require("ngx.req")` (lua-resty-core): add_header, get_uri_ext.

local add = require("moongate.native").req.add_header

local ngx = ngx
local error, next, type = error, next, type

local _M = { version = "0.1.28" }

--- Adds a request header beside those of the same name. @param name string @param value string, number or list
function _M.add_header(name, value)
    if value == nil or type(value) == "table" and next(value) == nil then error("invalid header value", 2) end
    add(name, value)
end

--- What stands behind the last dot of the path's last part. @param max number?: 255 by default @return string: "" without one
function _M.get_uri_ext(max)
    if max ~= nil and (type(max) ~= "number" or max < 0) then
        error("bad argument #1 to 'get_uri_ext' (number expected, got " .. type(max) .. ")", 2)
    end
    local ext = ngx.var.uri:match("%.([^%./]*)$") or ""
    return ext:sub(1, max or 255)
end

return _M
