--- `require("ngx.req")` (lua-resty-core): add_header, get_uri_ext.

local add = require("moongate.native").req.add_header

local ngx = ngx
local error, next, type = error, next, type

local _M = { version = "0.1.28" }

-- Fields that nginx keeps one of.
local single = {}
for name in ([[host if-modified-since if-unmodified-since if-match if-none-match user-agent referer content-length content-type range
    if-range transfer-encoding expect upgrade accept-encoding via authorization keep-alive date depth destination overwrite
    x-real-ip]]):gmatch("%S+") do
    single[name] = true
end

--- Adds a request header beside those of the same name; one that nginx keeps one of is replaced.
-- @param name string @param value string, number or list
function _M.add_header(name, value)
    if value == nil then error("bad 'value' argument: string or table expected, got nil", 2) end
    local list = type(value) == "table"
    if list and next(value) == nil then error("bad 'value' argument: non-empty table expected", 2) end
    if type(name) == "string" and single[name:lower()] then
        ngx.req.set_header(name, list and value[#value] or value)
    else
        add(name, value)
    end
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
