--- `apisix.router`: what the gateway routes by, to be read. It routes by itself. All phases.
local core = require("apisix.core")
local error = error

local _M = {}

--- Every route: an array of items (`{ value, key, modifiedIndex }`) and its version.
function _M.http_routes()
    return core.config.fetch_created_obj("/routes")
end

--- Every service, as `http_routes`.
function _M.services()
    return require("apisix.http.service").services()
end

--- Every stream route, as `http_routes`.
function _M.stream_routes()
    return core.config.fetch_created_obj("/stream_routes")
end

--- Every global rule, as `http_routes`.
function _M.global_rules()
    return require("apisix.global_rules").global_rules()
end

--- A plugin's endpoints (`_M.api()`).
_M.api = require("apisix.api_router")

--- Matching is the gateway's: these raise.
_M.router_http = {
    match = function()
        error("the gateway matches routes by itself; ctx.matched_route is the one that it has found", 2)
    end,
}

return _M
