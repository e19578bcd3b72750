--- `apisix.control.router`: the endpoints that plugins add to the control API (`_M.control_api()`, control-api.md). All phases.
local plugin = require("apisix.plugin")
local core = require("apisix.core")
local ipairs, next, type = ipairs, next, type

local _M = {}

-- uri -> array of { methods, handler }, of one load of the plugins.
local endpoints, built_of

local function collect()
    local out = {}
    for _, loaded in ipairs(plugin.plugins()) do
        for _, api in ipairs(type(loaded.control_api) == "function" and loaded.control_api() or {}) do
            local methods = {}
            for _, method in ipairs(api.methods or {}) do
                methods[method] = true
            end
            for _, uri in ipairs(api.uris or { api.uri }) do
                out[uri] = out[uri] or {}
                core.table.insert(out[uri], { methods = methods, handler = api.handler })
            end
        end
    end
    return out
end

--- Runs the endpoint of a plugin at `uri`, such as `/v1/plugin/example-plugin/hello`, for the request that runs: true and what
-- it returns (a status and a body), or false when there is none.
function _M.match(uri)
    local generation = plugin.plugins()
    if built_of ~= generation then
        endpoints, built_of = collect(), generation
    end
    local method = core.request.get_method()
    for _, endpoint in ipairs(endpoints[uri] or {}) do
        if not next(endpoint.methods) or endpoint.methods[method] then
            return true, endpoint.handler()
        end
    end
    return false
end

return _M
