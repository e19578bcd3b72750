--- `apisix.utils.router`: routers for endpoints of the gateway's own. All phases.
local radixtree = require("resty.radixtree")
local core = require("apisix.core")
local ipairs, type = ipairs, type

local _M = {}

--- A router of `routes`, an array of `{ methods, uri or uris, handler }`: `router:dispatch(uri, { method = … }, …)` calls
-- the handler with what follows: true, or nil when there is none.
function _M.create_radixtree_router(routes)
    local items = {}
    for i, route in ipairs(routes) do
        items[i] = {
            paths = route.uris or route.uri,
            methods = route.methods,
            handler = route.handler,
        }
    end
    return radixtree.new(items)
end

--- The path of a resource under the Admin API's prefix in its parts: an array of texts. nil for what is no text.
function _M.parse_path(path)
    if type(path) ~= "string" then
        return nil
    end
    local out = {}
    for part in path:gmatch("[^/]+") do
        core.table.insert(out, part)
    end
    return out
end

return _M
