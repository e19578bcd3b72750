--- `core.base64`.
local ngx_decode = ngx.decode_base64

local _M = {}

--- The bytes of a `data:…;base64,…` URI; nil and the reason when it is none.
function _M.decode_data_uri(uri)
    local at = uri:find(";base64,", 1, true)
    if not at or uri:sub(1, 5) ~= "data:" then
        return nil, "invalid data uri"
    end
    local data = ngx_decode(uri:sub(at + 8))
    if not data then
        return nil, "failed to decode base64 data"
    end
    return data
end

return _M
