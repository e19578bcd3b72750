--- `require("ngx.resp")`: add_header, get_headers, set_status.

local _M = { version = "0.1.28" }

--- Adds a response header beside those of the same name.
function _M.add_header(name, value)
    local all = ngx.header[name]
    if all == nil then
        ngx.header[name] = value
        return
    end
    if type(all) ~= "table" then all = { all } end
    if type(value) == "table" then
        for _, v in ipairs(value) do all[#all + 1] = tostring(v) end
    else
        all[#all + 1] = tostring(value)
    end
    ngx.header[name] = all
end

_M.get_headers = ngx.resp.get_headers

--- The reason is the standard one.
function _M.set_status(status, _)
    ngx.status = status
end

function _M.bypass_if_checks() end

return _M
