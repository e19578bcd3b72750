--- `require("ngx.req")`: add_header.

local _M = { version = "0.1.28" }

--- Adds a request header beside those of the same name.
function _M.add_header(name, value)
    local all = ngx.req.get_headers(0)[name]
    if all == nil then
        ngx.req.set_header(name, value)
        return
    end
    if type(all) ~= "table" then all = { all } end
    if type(value) == "table" then
        for _, v in ipairs(value) do all[#all + 1] = tostring(v) end
    else
        all[#all + 1] = tostring(value)
    end
    ngx.req.set_header(name, all)
end

return _M
