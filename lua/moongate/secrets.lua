--- What managers of secrets have, for certificates and keys.

local secret = require("apisix.secret")
local type = type

local _M = {}

--- The text that the reference stands for; nil and why there is none. May wait. What is known is not asked for again for
-- `apisix.lru.secret.ttl` seconds.
function _M.text(reference)
    local value, err = secret.fetch_known(reference)
    if type(value) == "string" then
        return value
    elseif value ~= nil then
        return nil, "it is no text"
    end
    return nil, secret.reason(err)
end

return _M
