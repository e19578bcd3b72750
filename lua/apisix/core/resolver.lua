--- `core.resolver`: names to addresses through the gateway's resolver. Waits.
local native = require("moongate.native").apisix
local error = error

local _M = {}

--- One address of `host` as a text, or nil and the reason.
function _M.parse_domain(host)
    local addresses, err = native.resolve(host)
    if not addresses or not addresses[1] then
        return nil, err or "failed to parse domain"
    end
    return addresses[1]
end

function _M.init_resolver()
    error("the resolver is set in config.yaml", 2)
end

return _M
